"""Ensembles predict by the mean of their members' probabilities, as a slow mean of single predictors does."""

import json
import os
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import hf_segformer.conversion.checkpoints
from hf_segformer import (
    InferenceOptions,
    SegFormerConfig,
    SegFormerForSemanticSegmentation,
    SegFormerImageProcessor,
    SegFormerPredictor,
    evaluate,
    load_segmentation,
)
from hf_segformer.cli.main import main
from hf_segformer.conversion.ensembles import member_folders, read_member_names, write_ensemble
from hf_segformer.data.splits import write_division
from hf_segformer.inference.ensemble import Ensemble, load_model_or_ensemble
from hf_segformer.inference.segmenter import Segmenter
from tests.support.tiny import TINY

NAMES = ["fold_0", "fold_1", "fold_2"]


def save_ensemble(folder, num_labels=4, **processor):
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        labels = {index: f"class {index}" for index in range(num_labels)}
        model = SegFormerForSemanticSegmentation(SegFormerConfig(**{**TINY, "id2label": labels}))
        with torch.no_grad():  # fresh weights predict nearly the same everywhere
            for parameter in model.decode_head.classifier.parameters():
                parameter.normal_(std=3)
        model.save_pretrained(folder / name)
        options = {"size": {"shortest_edge": 40}, "keep_ratio": True, "size_divisor": 32, **processor}
        SegFormerImageProcessor(**options).save_pretrained(folder / name)
    write_ensemble(folder, NAMES)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_ensemble(tmp_path_factory.mktemp("ensemble"))


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    return save_ensemble(tmp_path_factory.mktemp("binary"), num_labels=1)


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (44, 60, 3), dtype=np.uint8)) for _ in range(3)]


def mean_of_members(folder, images, options):
    """Probabilities of single predictors, averaged in float64."""
    members = [SegFormerPredictor.from_pretrained(folder / name, device="cpu", options=options) for name in NAMES]
    return [
        np.mean([each(image, with_probabilities=True).probabilities.astype(np.float64) for each in members], axis=0)
        for image in images
    ]


@pytest.mark.parametrize("kind", ["folder", "binary"])
@pytest.mark.parametrize(
    "options",
    [{}, {"flip": True, "scales": [0.75, 1.0]}, {"sliding_window": 32, "stride": 24}],
    ids=["whole", "augmented", "sliding"],
)
def test_it_is_the_mean_of_single_predictors(kind, options, samples, request):
    folder, options = request.getfixturevalue(kind), InferenceOptions(**options)
    predictor = SegFormerPredictor.from_pretrained(folder, device="cpu", options=options)
    found = [predictor(image, with_probabilities=True) for image in samples]
    for prediction, expected in zip(found, mean_of_members(folder, samples, options), strict=True):
        np.testing.assert_allclose(prediction.probabilities, expected, rtol=0, atol=1e-6)
        margin = np.sort(expected, axis=0)
        decided = margin[-1] - margin[-2] > 1e-5
        assert decided.mean() > 0.9
        assert (prediction.segmentation == expected.argmax(0))[decided].all()
    for prediction, expected in zip(predictor(samples, with_probabilities=True), found, strict=True):  # in a batch
        np.testing.assert_allclose(prediction.probabilities, expected.probabilities, rtol=0, atol=1e-5)
    assert [each.segmentation.tolist() for each in map(predictor, samples)] == [
        each.segmentation.tolist() for each in found
    ]


def test_tiles_of_a_raster_have_the_logarithm_of_the_mean_probabilities(folder, samples):
    model, processor = load_model_or_ensemble(folder)
    tile = np.asarray(samples[0]).transpose(2, 0, 1)[:, :32, :32]
    found = Segmenter(model, processor).tile_logits([tile]).softmax(1)
    members = [Segmenter(member, processor).tile_logits([tile]).softmax(1) for member in model.members]
    torch.testing.assert_close(found, torch.stack(members).mean(0), rtol=0, atol=1e-6)


def test_evaluation_counts_the_ensemble(folder, samples):
    model, processor = load_model_or_ensemble(folder)
    masks = [image.convert("L").point(lambda value: value % 4) for image in samples]
    rows = [{"image": image, "label": mask} for image, mask in zip(samples, masks, strict=True)]
    expected = torch.zeros(4, 4, dtype=torch.int64)
    predictor = SegFormerPredictor(model, processor)
    for row in rows:
        cells = np.asarray(row["label"]).astype(int) * 4 + predictor(row["image"]).segmentation
        expected += torch.bincount(torch.from_numpy(cells.ravel()), minlength=16).reshape(4, 4)
    assert torch.equal(evaluate(model, processor, rows, progress=False).matrix[:, :4], expected)


def test_a_copy_in_another_type_has_all_members(folder):
    model, processor = load_model_or_ensemble(folder)
    segmenter = Segmenter(model, processor, InferenceOptions(dtype="bfloat16"))
    assert {member.dtype for member in segmenter.model.members} == {torch.bfloat16}
    assert model.dtype == torch.float32
    assert model.num_parameters() == 3 * model.members[0].num_parameters()
    with pytest.raises(NotImplementedError, match="no logits of its own"):
        model(torch.zeros(1, 3, 32, 32))


def test_predict_takes_the_folder_and_resumes(folder, samples, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    samples[0].save(tmp_path / "in" / "a.png")
    command = ["predict", str(folder), str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--device", "cpu"]
    assert main(command) == 0
    with Image.open(tmp_path / "out" / "a_mask.png") as mask:
        expected = SegFormerPredictor.from_pretrained(folder, device="cpu")(samples[0]).segmentation
        assert (np.asarray(mask) == expected).all()
    assert main(command) == 0
    assert "1 of them by earlier runs" in capsys.readouterr().out


def test_evaluate_warns_of_images_that_a_member_was_trained_on(folder, samples, tmp_path, capsys):
    from datasets import Dataset

    for index, image in enumerate(samples):
        for kind in ("images", "masks"):
            (tmp_path / kind).mkdir(exist_ok=True)
            (image if kind == "images" else image.convert("L").point(lambda value: value % 4)).save(
                tmp_path / kind / f"{index}.png"
            )
    paths = [str(tmp_path / "images" / f"{index}.png") for index in range(3)]
    rows = [Dataset.from_dict({"image": each, "label": each}) for each in (paths[:2], paths[2:])]
    write_division(folder / "fold_1", *rows)
    command = ["evaluate", str(folder), "--images", str(tmp_path / "images"), "--masks", str(tmp_path / "masks")]
    try:
        assert main([*command, "--device", "cpu"]) == 0
        assert "was trained on 2 of the 3 images, such as " in capsys.readouterr().err
        assert main([*command, "--device", "cpu", "-o", str(tmp_path / "report")]) == 0
        assert json.loads((tmp_path / "report" / "metrics.json").read_text())["dataset"]["trained_on"] == 2
        capsys.readouterr()
    finally:
        os.unlink(folder / "fold_1" / "split.csv")
    assert main([*command, "--device", "cpu"]) == 0
    assert "was trained on" not in capsys.readouterr().err


def test_a_threshold_is_saved_with_every_member(binary, samples, tmp_path, capsys):
    folder = Path(shutil.copytree(binary, tmp_path / "binary"))
    predictor = SegFormerPredictor.from_pretrained(folder, device="cpu")
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for index, image in enumerate(samples):
        image.save(tmp_path / "images" / f"{index}.png")
        probabilities = predictor(image, with_probabilities=True).probabilities[1]
        mask = (probabilities > np.quantile(probabilities, 0.8)).astype(np.uint8)
        Image.fromarray(mask).save(tmp_path / "masks" / f"{index}.png")
    command = ["evaluate", str(folder), "--images", str(tmp_path / "images"), "--masks", str(tmp_path / "masks")]
    command += ["--device", "cpu", "--save-threshold"]
    assert main(command) == 0
    assert capsys.readouterr().out.count("preprocessor_config.json") == 3
    found = [json.loads((folder / name / "preprocessor_config.json").read_text())["binary_threshold"] for name in NAMES]
    assert found[0] != 0.5
    assert found == 3 * [load_model_or_ensemble(folder)[1].binary_threshold]
    (folder / "fold_1" / "preprocessor_config.json").unlink()
    assert main(command) == 2
    assert "fold_1; expected the folder of a model with its preprocessor_config.json" in capsys.readouterr().err


class TestErrors:
    def test_export_and_loading_a_single_model_are_refused_by_name(self, folder, tmp_path, capsys):
        with pytest.raises(
            ValueError, match=r"is an ensemble \(ensemble.json\); expected a single model, such as .*fold_0"
        ):
            load_segmentation(folder)
        assert main(["export", str(folder), "--to", "onnx", str(tmp_path / "out")]) in (1, 2)
        assert "is an ensemble" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("members", "message"),
        [
            (["fold_0", "../other"], "expected folders below it"),
            (["fold_0", "/etc"], "expected folders below it"),
            (["fold_0", "fold_*"], "expected folders below it"),
            (["fold_0", "."], "expected folders below it"),
            (["fold_0", "a/../../b"], "expected folders below it"),
            ("fold_0", "expected folders below it"),
            (["fold_0"], "has 1 members; expected 2 to 100"),
            (["fold_0", "fold_0"], "expected 2 to 100 different ones"),
            (["fold_0", "fold_9"], "holds no such folder"),
        ],
    )
    def test_members_are_folders_below(self, tmp_path, members, message):
        (tmp_path / "fold_0").mkdir()
        (tmp_path / "ensemble.json").write_text(json.dumps({"members": members}))
        with pytest.raises((ValueError, OSError), match=message):
            member_folders(tmp_path)

    def test_a_link_out_of_the_folder_is_refused(self, tmp_path):
        (tmp_path / "ensemble" / "fold_0").mkdir(parents=True)
        (tmp_path / "other").mkdir()
        (tmp_path / "ensemble" / "fold_1").symlink_to(tmp_path / "other", target_is_directory=True)
        write_ensemble(tmp_path / "ensemble", ["fold_0", "fold_1"])
        with pytest.raises(ValueError, match="outside the folder"):
            read_member_names(tmp_path / "ensemble")

    def test_an_ensemble_of_ensembles_is_refused(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            write_ensemble(tmp_path / name, ["x", "y"])
            for member in ("x", "y"):
                (tmp_path / name / member).mkdir()
        write_ensemble(tmp_path, ["a", "b"])
        with pytest.raises(ValueError, match="is an ensemble"):
            load_model_or_ensemble(tmp_path)

    def test_members_agree_in_classes_and_processor(self, tmp_path, tiny_config):
        save_ensemble(tmp_path)
        SegFormerImageProcessor(size=64).save_pretrained(tmp_path / "fold_2")
        with pytest.raises(ValueError, match=r"fold_2 prepares images with .* expected that of .*fold_0"):
            load_model_or_ensemble(tmp_path)
        models = [SegFormerForSemanticSegmentation(tiny_config(num_labels=count)) for count in (3, 4)]
        with pytest.raises(ValueError, match="member 1 of the ensemble has num_labels 4; expected that of member 0, 3"):
            Ensemble(models)
        with pytest.raises(ValueError, match="no members"):
            Ensemble([])


def test_the_hub_is_asked_for_the_members_by_their_plain_names(folder):
    with mock.patch.object(hf_segformer.conversion.checkpoints, "snapshot_download") as download:
        download.return_value = str(folder)
        assert member_folders(hf_segformer.conversion.checkpoints.locate("me/ensemble")) == [folder / n for n in NAMES]
    assert download.call_args_list[1].kwargs["allow_patterns"][:2] == ["fold_0/*.json", "fold_0/*.safetensors"]
    assert download.call_args_list[1].kwargs["revision"] == folder.name
