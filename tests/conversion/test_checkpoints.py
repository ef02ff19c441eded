"""Files and folders of weights: formats that are read, and refusals."""

import json
import os
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from hf_segformer import SegFormerConfig, SegFormerForImageClassification, SegFormerModel
from hf_segformer.benchmarking.cost import load_config, model_info
from hf_segformer.conversion import checkpoints
from hf_segformer.conversion.checkpoints import is_repository, locate, read_checkpoint, read_config
from tests.support.tiny import TINY


@pytest.fixture
def weights():
    return {"norm.weight": torch.randn(30, 40), "norm.bias": torch.randn(30), "norm.count": torch.tensor(7)}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def saved(folder, content, name="weights.pth"):
    torch.save(content, folder / name)
    return folder / name


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".safetensors"])
def test_every_kind_of_file_is_read(suffix, weights, tmp_path):
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights, path)
    assert_equal(read_checkpoint(path).weights, weights)
    assert_equal(read_checkpoint(str(path)).weights, weights)
    assert_equal(read_checkpoint(tmp_path).weights, weights)


def test_files_in_torchs_old_format_are_read(weights, tmp_path):
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_equal(read_checkpoint(tmp_path / "old.pth").weights, weights)


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_wrappers_of_training_programs_are_removed(wrapper, weights, tmp_path):
    inner = {f"module._orig_mod.{key}": tensor for key, tensor in weights.items()}
    path = saved(tmp_path, {wrapper: inner, "epoch": 3, "optimizer": {"state": {}}})
    assert_equal(read_checkpoint(path).weights, weights)


def test_a_prefix_that_not_all_keys_share_stays(weights, tmp_path):
    mixed = {"module.norm.weight": weights["norm.weight"], "norm.bias": weights["norm.bias"]}
    assert_equal(read_checkpoint(saved(tmp_path, mixed)).weights, mixed)


@pytest.mark.parametrize(
    ("meta", "classes"),
    [
        ({"CLASSES": ("road", "sky"), "PALETTE": [[0, 0, 0]]}, ["road", "sky"]),
        ({"dataset_meta": {"classes": ["road", "sky"]}}, ["road", "sky"]),
        ({"CLASSES": None, "epoch": 3}, []),
        ("a note", []),
    ],
)
def test_names_of_classes_are_found_where_mmcv_and_mmengine_keep_them(meta, classes, weights, tmp_path):
    assert read_checkpoint(saved(tmp_path, {"state_dict": weights, "meta": meta})).classes == classes


def test_a_folder_brings_its_config_and_a_file_does_not(tmp_path):
    model = SegFormerModel(SegFormerConfig(depths=[1, 1, 1, 1], layer_norm_eps=1e-3))
    model.save_pretrained(tmp_path)
    assert read_checkpoint(tmp_path).config.layer_norm_eps == 1e-3
    assert read_checkpoint(tmp_path / "model.safetensors").config is None


def test_a_config_of_another_library_is_not_taken_for_transformers(weights, tmp_path):
    saved(tmp_path, weights, "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"_model_class": "Segformer", "encoder_name": "mit_b0"}))
    assert read_checkpoint(tmp_path).config is None


def test_shards_are_put_together_and_a_missing_one_is_named(tmp_path):
    model = SegFormerModel(SegFormerConfig(depths=[1, 1, 1, 1], hidden_sizes=[4, 8, 20, 32]))
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert_equal(read_checkpoint(tmp_path).weights, model.state_dict())
    shards[-1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"index\.json names {shards[-1].name}, but"):
        read_checkpoint(tmp_path)


def test_transformers_own_file_wins_over_other_files_of_a_folder(weights, tmp_path):
    save_file(weights, tmp_path / "model.safetensors")
    saved(tmp_path, {"lr": 0.1}, "optimizer.pt")
    assert_equal(read_checkpoint(tmp_path).weights, weights)


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*mit_b0\.pth"):
        read_checkpoint(tmp_path / "mit_b0.pth")


def test_a_web_address_is_named_as_given(tmp_path):
    source = "https://huggingface.co/nvidia/mit-b0"
    with pytest.raises(ValueError, match=f"{source} is a web address.*owner/name"):
        locate(source)
    with pytest.raises(FileNotFoundError, match=source):
        read_checkpoint(source)


def test_a_folder_without_or_with_several_files_of_weights_is_refused(weights, tmp_path):
    with pytest.raises(ValueError, match=r"must hold one file of weights .* but it holds none"):
        read_checkpoint(tmp_path)
    saved(tmp_path, weights, "a.pth")
    saved(tmp_path, weights, "b.pth")
    with pytest.raises(ValueError, match=r"it holds a\.pth, b\.pth"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_a_broken_config_is_named(content, weights, tmp_path):
    saved(tmp_path, weights)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_checkpoint(tmp_path)


def test_a_config_of_another_network_or_of_wrong_types_is_refused(weights, tmp_path):
    saved(tmp_path, weights)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="'bert'"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "segformer", "depths": "many"}))
    with pytest.raises(ValueError, match=r"config\.json: [\s\S]*depths"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>404</html>", "is a web page"),
        (b"\n <html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b"hello, world", "no checkpoint|no safetensors file"),
    ],
)
def test_other_files_are_named_for_what_they_are(suffix, content, reason, tmp_path):
    path = tmp_path / f"mit_b0{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"mit_b0{suffix} .*({reason})") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["zip", "old", "safetensors"])
def test_a_file_cut_anywhere_is_called_cut(form, weights, tmp_path):
    path = tmp_path / ("cut.safetensors" if form == "safetensors" else "cut.pth")
    if form == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    for share in range(20, 100, 3):
        path.write_bytes(whole[: len(whole) * share // 100])
        with pytest.raises(ValueError, match=r"cut\.(pth|safetensors) is cut short") as caught:
            read_checkpoint(path)
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's word on one of the changed bytes
def test_no_damage_to_a_file_escapes_as_another_error(weights, tmp_path):
    path, generator = saved(tmp_path, {"norm.bias": weights["norm.bias"]}), torch.Generator().manual_seed(0)
    whole = path.read_bytes()
    for _ in range(300):
        damaged = bytearray(whole)
        for place in torch.randint(2, min(len(whole), 600), (3,), generator=generator).tolist():
            damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            read_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017 (some damage only changes a number)


class Malicious:
    """Makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_needs_code_is_refused_and_its_code_not_run(weights, tmp_path):
    path = saved(tmp_path, {"state_dict": weights, "hooks": Malicious(tmp_path / "was run")})
    with pytest.raises(ValueError, match=r"needs the code of \w+\.mkdir to be read.*save its state dict") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "was run").exists()
    pickle.loads(pickle.dumps(Malicious(tmp_path / "was run")))
    assert (tmp_path / "was run").exists()  # the bait works


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, {"state_dict": {"epoch": 3}}, {1: torch.zeros(1)}])
def test_a_file_without_a_state_dict_is_refused(content, tmp_path):
    with pytest.raises(ValueError, match=r"weights\.pth must hold"):
        read_checkpoint(saved(tmp_path, content))


@pytest.mark.parametrize("source", ["nvidia/mit-b0", "smp-hub/segformer-b0-512x512-ade-160k"])
def test_a_name_with_its_owner_is_looked_for_on_the_hub(source):
    assert is_repository(source)


def test_paths_are_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "b0").touch()
    for source in ("weights/b0", "weights/b1", "nobody/weights.pth", "b0", "./b0", "/a/b", "a/b/c", ""):
        assert not is_repository(source)
        assert str(locate(source)) == os.path.normpath(source)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["model.safetensors", "pytorch_model.bin", "tf_model.h5"], ["config.json", "model.safetensors"]),
        (["pytorch_model.bin", "tf_model.h5"], ["config.json", "pytorch_model.bin"]),
    ],
)
def test_of_a_repository_only_the_weights_that_are_needed_are_fetched(names, wanted, tmp_path, monkeypatch):
    remote, local = tmp_path / "remote", tmp_path / "local"
    for name in ["config.json", "checkpoint-9/model.safetensors", *names]:
        (remote / name).parent.mkdir(parents=True, exist_ok=True)
        (remote / name).touch()
    local.mkdir()

    def snapshot_download(repo_id, allow_patterns, ignore_patterns):
        assert repo_id == "owner/name"
        names = [str(path.relative_to(remote)) for path in remote.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(remote / name, local / name)
        return str(local)

    monkeypatch.setattr(checkpoints, "snapshot_download", snapshot_download)
    assert sorted(path.name for path in locate("owner/name").iterdir()) == wanted


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (RepositoryNotFoundError("a long text", response=SimpleNamespace(headers={}, request=None)), "no repository"),
        (LocalEntryNotFoundError("a long text"), "cannot be reached"),
    ],
)
def test_an_unreachable_repository_is_one_line(monkeypatch, raised, message):
    def snapshot_download(**kwargs):
        raise raised

    monkeypatch.setattr(checkpoints, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match=f"there is no folder owner/name, and .*{message}"):
        locate("owner/name")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (["SegFormerForImageClassification"], ["SegFormerForImageClassification"]),
        (["SegformerModel"], ["SegformerModel"]),
        (["Evil", "SegFormerModel", 3], ["SegFormerModel"]),
        (["os.SegFormerModel"], None),
        ("SegFormerModel", None),
        (None, None),
    ],
)
def test_architectures_are_kept_where_they_are_segformers(written, expected, tmp_path):
    SegFormerConfig(architectures=["SegFormerModel"]).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {"architectures": written}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path).architectures == expected


def test_the_cost_of_a_saved_classifier_has_a_classifier(tmp_path):
    SegFormerForImageClassification(SegFormerConfig(**TINY, num_labels=5)).save_pretrained(tmp_path)
    assert model_info(load_config(str(tmp_path)), 64, 96)[-1].name == "classifier"
