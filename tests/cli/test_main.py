"""The command `segformer`: parser, errors, `info` and `convert`."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForSemanticSegmentation

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerModel
from hf_segformer.cli.main import COMMANDS, build_parser, parse
from hf_segformer.image_processing_segformer import SegFormerImageProcessor
from hf_segformer.version import __version__
from tests.support.commands import assert_one_line, assert_usage_error, run


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = SegFormerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[4, 8, 20, 32], decoder_hidden_size=12, num_labels=5, layer_norm_eps=1e-5
    )
    return SegFormerForSemanticSegmentation(config).eval()


@pytest.fixture
def weights(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_info_prints_the_table(capsys):
    assert run("info", "b0", "--size", "128x128") == 0
    stdout = capsys.readouterr().out
    assert "1024x16" in stdout
    assert "decode head" in stdout


def test_info_replaces_the_number_of_labels(capsys):
    assert run("info", "b0", "--num-labels", 150) == 0
    assert "3,752,694" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["info", "b7"], ["'b7'", "known are b0, b1, b2, b3, b4, b5"]),
        (["info", "b0", "--size", "4x128"], ["4x128", "at least"]),
    ],
)
def test_info_errors_are_one_line(arguments, words, capsys):
    assert run(*arguments) == 1
    assert_one_line(capsys.readouterr().err, *words)


def test_convert_writes_a_checkpoint_that_from_pretrained_loads(model, weights, tmp_path, capsys):
    destination = tmp_path / "new" / "converted"
    assert run("convert", weights, destination) == 0
    loaded = AutoModelForSemanticSegmentation.from_pretrained(destination)
    assert type(loaded) is SegFormerForSemanticSegmentation
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert SegFormerImageProcessor.from_pretrained(destination).size == {"height": 512, "width": 512}
    assert str(destination) in capsys.readouterr().out
    assert os.listdir(destination.parent) == ["converted"]


def test_convert_adapts_channels_and_fills_an_empty_folder(weights, tmp_path):
    destination = tmp_path / "converted"
    destination.mkdir()
    assert run("convert", weights, destination, "--num-channels", 4) == 0
    assert SegFormerForSemanticSegmentation.from_pretrained(destination).config.num_channels == 4
    assert len(SegFormerImageProcessor.from_pretrained(destination).image_mean) == 4


def test_convert_encoder_only_drops_the_head(weights, tmp_path, capsys):
    assert run("convert", weights, tmp_path / "encoder", "--encoder-only") == 0
    assert "SegFormerModel: depths [1, 1, 1, 1]" in capsys.readouterr().out
    config = SegFormerConfig.from_pretrained(tmp_path / "encoder")
    assert config.architectures == ["SegFormerModel"]
    assert SegFormerModel.from_pretrained(tmp_path / "encoder").config.depths == [1, 1, 1, 1]


@torch.no_grad()
def test_convert_to_transformers_loads_in_its_own_model(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "ours")
    SegFormerImageProcessor(size=64).save_pretrained(tmp_path / "ours")
    assert run("convert", tmp_path / "ours", tmp_path / "theirs", "--to", "transformers") == 0
    assert "differs by at most" in capsys.readouterr().out
    stock = transformers.SegformerForSemanticSegmentation.from_pretrained(tmp_path / "theirs")
    pixels = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(stock(pixels).logits, model(pixels).logits, rtol=0, atol=2e-5)
    processor = json.loads((tmp_path / "theirs" / "preprocessor_config.json").read_text())
    assert processor["image_processor_type"] == "SegformerImageProcessor"
    assert processor["size"] == {"height": 64, "width": 64}


def test_convert_refuses_existing_files_and_folders(weights, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    assert run("convert", weights, tmp_path / "full") == 2
    assert_one_line(capsys.readouterr().err, tmp_path / "full", "a new or an empty folder")
    assert run("convert", weights, weights) == 2
    assert_one_line(capsys.readouterr().err, weights, "is a file")
    assert os.listdir(tmp_path / "full") == ["precious.txt"]


def test_a_failed_conversion_leaves_nothing_behind(weights, tmp_path, capsys, monkeypatch):
    broken = tmp_path / "broken.pth"
    broken.write_bytes(weights.read_bytes()[:5000])
    assert run("convert", broken, tmp_path / "deep" / "converted") == 1
    assert_one_line(capsys.readouterr().err, "broken.pth", "cut short")

    def fail(self, folder):
        (folder / "half").write_text("written")
        raise OSError(f"no space left for {folder.name}")

    monkeypatch.setattr(SegFormerImageProcessor, "save_pretrained", fail)
    (tmp_path / "empty").mkdir()
    for destination in ("converted", "new/deep/converted", "empty"):
        assert run("convert", weights, tmp_path / destination) == 1
        assert_one_line(capsys.readouterr().err.splitlines(keepends=True)[-1], "no space left")
    assert sorted(os.listdir(tmp_path)) == ["broken.pth", "empty", "weights.pth"]
    assert os.listdir(tmp_path / "empty") == []


def test_a_folder_that_cannot_be_replaced_is_filled(weights, tmp_path, monkeypatch):
    """The current folder, a link, and a mount point, whose parent may not be writable."""
    for name in ("here", "mounted/disk"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "mounted")
    monkeypatch.chdir(tmp_path / "here")
    before = os.stat(tmp_path / "mounted" / "disk").st_ino
    for destination in (".", tmp_path / "link" / "disk"):
        assert run("convert", weights, destination, "--encoder-only") == 0
        assert sorted(path.name for path in Path(destination).iterdir() if path.suffix != ".py") == [
            "config.json",
            "model.safetensors",
            "preprocessor_config.json",
        ]
    assert os.stat(tmp_path / "mounted" / "disk").st_ino == before
    assert sorted(os.listdir(tmp_path)) == ["here", "link", "mounted", "weights.pth"]


@pytest.mark.parametrize("source", ["missing.pth", "./missing", "a/b/c", "nobody/missing.safetensors"])
def test_a_missing_source_is_named_without_asking_the_hub(source, tmp_path, capsys):
    assert run("convert", source, tmp_path / "converted") == 1
    assert_one_line(capsys.readouterr().err, "no such file or folder", Path(source))
    assert os.listdir(tmp_path) == []


def test_errors_quote_a_web_address_as_given(tmp_path, capsys):
    source = "https://huggingface.co/nvidia/mit-b0"
    assert run("convert", source, tmp_path / "converted") == 1
    assert_one_line(capsys.readouterr().err, source, "owner/name")


def test_debug_prints_a_traceback_before_or_after_the_command(capsys):
    for arguments in (["--debug", "info", "b7"], ["info", "b7", "--debug"]):
        assert run(*arguments) == 1
        assert "Traceback" in capsys.readouterr().err
    assert run("info", "b7") == 1
    assert "Traceback" not in capsys.readouterr().err


def test_a_multi_line_error_becomes_one_line(tmp_path, capsys):
    SegFormerConfig().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"depths": "many"}))
    assert run("info", tmp_path / "config.json") == 1
    assert_one_line(capsys.readouterr().err, "config.json", "depths")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convrt", "a", "b"], ["unknown command 'convrt'; did you mean 'convert'?"]),
        (["--debug", "inof"], ["unknown command 'inof'; did you mean 'info'?"]),
        (["dance"], ["unknown command 'dance'; expected one of ", "predict"]),
        ([], ["required: COMMAND", "(see segformer --help)"]),
        (["convert", "a"], ["required: destination", "(see segformer convert --help)"]),
        (["convert", "a", "b", "--to", "keras"], ["invalid choice: 'keras'"]),
        (["convert", "a", "b", "--num-channels", "many"], ["--num-channels: got 'many'; expected a whole number"]),
        (["convert", "a", "b", "c"], ["unexpected argument 'c'"]),
        (["info", "b0", "--siz", "64x64"], ["unknown option '--siz'; did you mean '--size'?"]),
        (["info", "b0", "--quux=1"], ["unknown option '--quux' (see segformer info --help)"]),
        (["predict", "m", "a.png", "--out", "o", "-o", "p"], ["unknown option '--out'; did you mean '--output-dir'?"]),
    ],
)
def test_wrong_usage_exits_with_2_and_names_the_remedy(arguments, words, capsys):
    assert_usage_error(arguments, capsys, *words)


@pytest.mark.parametrize("size", ["512", "512x", "x512", "512x512x3", "-8x64", "8.5x64", " 8x64", "axb", "", "²x8"])
def test_malformed_sizes_are_refused(size, capsys):
    assert_usage_error(["info", "b0", f"--size={size}"], capsys, "expected HEIGHTxWIDTH in pixels, such as 512x512")


def test_sizes_are_height_by_width(capsys):
    assert run("info", "b0", "--size", "64X128") == 0
    assert capsys.readouterr().out.startswith("64x128 pixels")


def test_options_may_stand_between_arguments():
    arguments = parse(["predict", "-o", "out", "model", "a.png", "--flip", "b.png"])
    assert (arguments.model, arguments.inputs, arguments.flip) == ("model", ["a.png", "b.png"], True)


def test_every_command_has_its_function_and_help():
    parser, names = build_parser()
    assert len(names) == len(COMMANDS)
    for name in names:
        assert f"    {name}" in parser.format_help()


def test_an_interrupt_ends_without_a_traceback(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_segformer.benchmarking.cost.load_config", interrupt)
    assert run("info", "b0") == 130
    assert_one_line(capsys.readouterr().err, "interrupted")


def test_the_version_is_the_packages(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"segformer {__version__}\n"


def test_bench_explains_which_fast_paths_run(capsys):
    assert run("bench", "b0", "--explain", "--size", "64x96", "--size", "32x32", "--threads", 1) == 0
    first, second = capsys.readouterr().out.split("\n\n")
    assert first.startswith("64x96, batch of 1, cpu, inference\n")
    paths = dict(line.split(maxsplit=1) for line in first.splitlines()[1:])
    assert paths.keys() == {"mix_ffn", "attention", "decode_head", "upsample_cross_entropy", "upsample_argmax"}
    assert not paths["decode_head"].startswith("reference")
    assert second.startswith("32x32")
    assert run("bench", "b0", "--explain", "--size", "64x96", "--train", "--threads", 1) == 0
    assert "training step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--value-range", "0,1000"], [0, 1000]),
        (["--value-range=-1000,400.5"], [-1000, 400.5]),
        (["--value-range", "percentiles:2,98"], {"percentiles": [2, 98]}),
        (["--value-range", "window:40,400"], {"center": 40, "width": 400}),
        ([], None),
    ],
)
def test_value_range_is_spelled_as_in_recipes(words, expected):
    arguments = parse(["predict", "m", "a.png", "-o", "out", *words, "--flip"])
    arguments.check(arguments)
    assert arguments.value_range == expected


@pytest.mark.parametrize(
    "value",
    ["5", "5,5", "1,2,3", "percentiles:2,101", "percentiles:2", "window:40,0", "nan,1", "0,inf", "window:a,b"],
)
def test_wrong_value_ranges_are_refused(value, capsys):
    words = ["predict", "m", "a.png", "-o", "out", "--value-range", value]
    assert_usage_error(words, capsys, value, "window:CENTER,WIDTH")


def test_evaluate_names_keys_of_the_recipe_that_exist():
    from hf_segformer.cli.evaluate import _IN_RECIPE
    from hf_segformer.config import DataConfig, InferenceOptions

    known = {f"data.{each.name}" for each in fields(DataConfig)}
    known |= {f"evaluation.{each.name}" for each in fields(InferenceOptions)}
    assert set(_IN_RECIPE.values()) <= known


@pytest.mark.slow
def test_a_closed_pipe_ends_the_process_silently():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "hf_segformer", "info", "b0"]
    left = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (left.returncode, left.stderr) == (1, "")


def test_system_errors_are_shown_without_their_number(tmp_path, capsys):
    (tmp_path / "taken").write_text("a file")
    folder = str(tmp_path)
    assert run("evaluate", "b0", "--images", folder, "--masks", folder, "-o", tmp_path / "taken") == 2
    message = f"{tmp_path}/taken cannot be written to ({tmp_path}/taken: Not a directory)"
    assert_one_line(capsys.readouterr().err, message, "--output-dir")


def test_an_output_folder_is_checked_and_not_created(tmp_path):
    assert run("evaluate", "nothing", "--images", tmp_path, "--masks", tmp_path, "-o", tmp_path / "out") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--group", "^(a)"], ["--group", "--output-dir"]),
        (["--title", "mine"], ["--title", "--output-dir"]),
        (["--split", "test"], ["--split", "--dataset"]),
        (["--mask-column", "annotation"], ["--mask-column", "--dataset"]),
    ],
)
def test_evaluate_refuses_options_without_effect(weights, tmp_path, capsys, options, words):
    assert run("evaluate", weights, "--images", tmp_path, "--masks", tmp_path, *options) == 2
    assert_one_line(capsys.readouterr().err, *words)


def test_evaluate_names_a_wrong_pattern_of_groups(weights, tmp_path, capsys):
    folders = ["--images", tmp_path, "--masks", tmp_path, "--output-dir", tmp_path / "out"]
    assert run("evaluate", weights, *folders, "--group", "([") == 2
    assert_one_line(capsys.readouterr().err, "--group", "regular expression")


def test_inspect_says_that_a_video_is_none_of_its_images(tmp_path, capsys):
    (tmp_path / "film.mp4").touch()
    assert run("inspect", "nothing", tmp_path / "film.mp4") != 0
    assert_one_line(capsys.readouterr().err, f"{tmp_path}/film.mp4 is a video, which segformer predict takes", "ffmpeg")
