"""The command `segformer`, through `main` and as a process of its own."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForSemanticSegmentation

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerModel
from hf_segformer.cli.main import COMMANDS, build_parser, main
from hf_segformer.image_processing_segformer import SegFormerImageProcessor
from hf_segformer.version import __version__


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


def run(*arguments):
    return main([str(argument) for argument in arguments])


def assert_one_line(stderr, *words):
    """One line on stderr, from the program, that holds every word."""
    assert stderr.startswith("segformer: ")
    assert stderr.count("\n") == 1
    for word in words:
        assert str(word) in stderr


def test_the_command_is_installed():
    (script,) = entry_points(group="console_scripts", name="segformer")
    assert script.load() is main


def test_info_prints_the_table(capsys):
    assert run("info", "b0", "--size", "128x128") == 0
    stdout = capsys.readouterr().out
    assert "1024x16" in stdout
    assert "decode head" in stdout


def test_info_takes_another_number_of_labels(capsys):
    assert run("info", "b0", "--num-labels", 150) == 0
    assert "3,752,694" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["info", "b7"], ["'b7'", "known are b0, b1, b2, b3, b4, b5"]),
        (["info", "b0", "--size", "128"], ["'128'", "HEIGHTxWIDTH", "512x512"]),
        (["info", "b0", "--size", "4x128"], ["4x128", "at least"]),
        (["info", "b0", "--num-labels", "0"], ["num_labels", "0"]),
    ],
)
def test_info_refuses_in_one_line(arguments, words, capsys):
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


def test_convert_takes_bands_and_an_empty_folder(weights, tmp_path):
    destination = tmp_path / "converted"
    destination.mkdir()
    assert run("convert", weights, destination, "--num-channels", 4) == 0
    assert SegFormerForSemanticSegmentation.from_pretrained(destination).config.num_channels == 4
    assert len(SegFormerImageProcessor.from_pretrained(destination).image_mean) == 4


def test_convert_leaves_the_head_out_when_asked(weights, tmp_path, capsys):
    assert run("convert", weights, tmp_path / "encoder", "--encoder-only") == 0
    assert "SegFormerModel: depths [1, 1, 1, 1]" in capsys.readouterr().out
    config = SegFormerConfig.from_pretrained(tmp_path / "encoder")
    assert config.architectures == ["SegFormerModel"]
    assert SegFormerModel.from_pretrained(tmp_path / "encoder").config.depths == [1, 1, 1, 1]


@torch.no_grad()
def test_convert_to_transformers_writes_what_its_own_model_loads(model, tmp_path, capsys):
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


def test_convert_never_writes_into_what_is_there(weights, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    assert run("convert", weights, tmp_path / "full") == 1
    assert_one_line(capsys.readouterr().err, tmp_path / "full", "a new or an empty folder")
    assert run("convert", weights, weights) == 1
    assert_one_line(capsys.readouterr().err, weights, "is a file")
    assert os.listdir(tmp_path / "full") == ["precious.txt"]


def test_a_conversion_that_fails_leaves_nothing_behind(weights, tmp_path, capsys, monkeypatch):
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


def test_a_folder_that_can_not_be_replaced_is_filled(weights, tmp_path, monkeypatch):
    """The current one, a link, and one whose parent is not ours to write to (a mounted disk, say)."""
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
def test_a_source_that_does_not_exist_is_named_without_asking_the_hub(source, tmp_path, capsys):
    assert run("convert", source, tmp_path / "converted") == 1
    assert_one_line(capsys.readouterr().err, "no such file or folder", Path(source))
    assert os.listdir(tmp_path) == []


def test_a_web_address_is_named_as_given(tmp_path, capsys):
    source = "https://huggingface.co/nvidia/mit-b0"
    assert run("convert", source, tmp_path / "converted") == 1
    assert_one_line(capsys.readouterr().err, source, "owner/name")


def test_debug_shows_where_an_error_comes_from_before_and_after_the_command(capsys):
    for arguments in (["--debug", "info", "b7"], ["info", "b7", "--debug"]):
        assert run(*arguments) == 1
        assert "Traceback" in capsys.readouterr().err
    assert run("info", "b7") == 1
    assert "Traceback" not in capsys.readouterr().err


def test_an_error_of_many_lines_becomes_one(tmp_path, capsys):
    SegFormerConfig().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"depths": "many"}))
    assert run("info", tmp_path / "config.json") == 1
    assert_one_line(capsys.readouterr().err, "config.json", "depths")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convrt", "a", "b"], "unknown command 'convrt': did you mean 'convert'?"),
        (["--debug", "inof"], "unknown command 'inof': did you mean 'info'?"),
        (["dance"], "unknown command 'dance': known are "),
        ([], "required: COMMAND"),
        (["convert", "a"], "required: destination"),
        (["convert", "a", "b", "--to", "keras"], "invalid choice: 'keras'"),
        (["convert", "a", "b", "--num-channels", "many"], "invalid int value: 'many'"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_is_right(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_every_command_has_its_function_and_help():
    parser, names = build_parser()
    assert len(names) == len(COMMANDS)
    for name in names:
        assert f"    {name}" in parser.format_help()


def test_an_interrupt_ends_without_a_traceback(monkeypatch, capsys):
    def interrupt(source):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_segformer.benchmarking.cost.load_config", interrupt)
    assert run("info", "b0") == 130
    assert_one_line(capsys.readouterr().err, "interrupted")


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as caught:
        run("--version")
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"segformer {__version__}\n"


@pytest.mark.slow
def test_as_a_process_it_survives_a_reader_that_leaves():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "hf_segformer.cli.main", "info", "b0"]
    left = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (left.returncode, left.stderr) == (1, "")


def test_what_the_system_refuses_is_told_without_its_number(tmp_path, capsys):
    taken, folder = tmp_path / "taken", str(tmp_path)
    taken.write_text("a file")
    assert main(["evaluate", "b0", "--images", folder, "--labels", folder, "--out", str(taken)]) == 1
    assert capsys.readouterr().err == f"segformer: {taken}: File exists\n"
