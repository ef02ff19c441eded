"""Lines of docs/explanation/threat-model.md: what an untrusted file tries, and that it fails."""

import ast
import json
import os
import re
import zipfile
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from unittest.mock import MagicMock

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForSemanticSegmentation

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.cli.main import main
from hf_segformer.conversion.checkpoints import read_checkpoint
from hf_segformer.conversion.loading import load_segmentation
from hf_segformer.data.pairing import load_splits, open_split, two_columns
from hf_segformer.data.reader_protocol import ImageSource, Tile
from hf_segformer.data.readers import open_raster
from hf_segformer.data.sources import DatasetSource, FileSource, find_inputs
from hf_segformer.hub.push import checked_files
from hf_segformer.inference.batch import Report
from hf_segformer.inference.png_writer import RECORD, PngWriter
from tests.support.tiny import TINY

ROOT = Path(__file__).resolve().parents[1]
SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----"


@pytest.fixture
def secret(tmp_path):
    """A private file beside all untrusted files."""
    path = tmp_path / "private" / "id_ed25519"
    path.parent.mkdir()
    path.write_text(SECRET)
    return path


@pytest.fixture
def folder(tmp_path):
    """A model's folder that can be published."""
    torch.manual_seed(0)
    SegFormerForSemanticSegmentation(SegFormerConfig(**TINY, num_labels=3)).save_pretrained(tmp_path / "model")
    SegFormerImageProcessor(size=64).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def published(folder):
    """Contents of everything that a push would publish."""
    files = checked_files(folder, "me/model", token="hf_x").values()
    return b"".join(each if isinstance(each, bytes) else Path(each).read_bytes() for each in files)


def test_every_test_named_on_the_page_exists():
    text = (ROOT / "docs" / "explanation" / "threat-model.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 15
    for path, function in named:
        assert f"def {function}(" in (ROOT / path).read_text(), f"{path}::{function}"


@pytest.mark.parametrize(
    "values",
    [
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel"},
        {"_attn_implementation_internal": "evil/kernel:run"},
        {"experts_implementation": "evil/kernel"},
        {"auto_map": {"AutoModelForSemanticSegmentation": "evil/code--modeling.Evil"}},
        {"quantization_config": {"quant_method": "evil"}},
        {"custom_pipelines": {"image-segmentation": {"impl": "evil.Pipeline"}}},
        {"dtype": "load"},
        {"torch_dtype": "hub"},
        {"architectures": ["Evil"]},
        {"_name_or_path": "evil/origin"},
    ],
    ids=lambda values: next(iter(values)),
)
def test_fields_that_choose_code_are_dropped(values, folder):
    expected = load_segmentation(folder)[0]
    edit(folder / "config.json", **values)
    model, _ = load_segmentation(folder)
    assert model.config._attn_implementation == expected.config._attn_implementation
    assert "evil" not in model.config.to_json_string(use_diff=False).lower()
    assert model.dtype == torch.float32
    pixels = torch.randn(1, 3, 64, 96)
    assert torch.equal(model(pixels).logits, expected(pixels).logits)


def sharded(folder):
    model = SegFormerForSemanticSegmentation.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize("name", ["../private/id_ed25519", "/etc/hostname", "up/id_ed25519", "..", "link.safetensors"])
def test_shards_outside_the_folder_are_refused(name, folder, secret):
    index = sharded(folder)
    (folder / "up").symlink_to("../private")
    (folder / "link.safetensors").symlink_to("../private/id_ed25519")
    weights = json.loads(index.read_text())
    weights["weight_map"][next(iter(weights["weight_map"]))] = name
    index.write_text(json.dumps(weights))
    uses = (load_segmentation, published, SegFormerForSemanticSegmentation.from_pretrained)
    for use in (*uses, AutoModelForSemanticSegmentation.from_pretrained):
        with pytest.raises(ValueError, match=r"index\.json names|is a link to|leads outside"):
            use(folder)


def test_a_cached_repository_names_no_shards_elsewhere(folder, tmp_path):
    """Transformers joins names to the snapshot's path, so that one may reach another repository's files."""
    index, repository = sharded(folder), tmp_path / "cache" / "models--me--model"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    snapshot = folder.rename(repository / "snapshots" / ("a" * 40))
    blob = repository / "blobs" / ("b" * 64)
    blob.parent.mkdir()
    shard = next(snapshot.glob("model-*.safetensors"))
    shard.rename(blob)
    shard.symlink_to(blob)
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    assert SegFormerForSemanticSegmentation.from_pretrained("me/model", **options)
    index = snapshot / index.name
    weights = json.loads(index.read_text())
    name = next(iter(weights["weight_map"]))
    index.write_text(json.dumps(weights | {"weight_map": {**weights["weight_map"], name: f"../../blobs/{blob.name}"}}))
    with pytest.raises(ValueError, match=r"index\.json names \.\./\.\./blobs"):
        SegFormerForSemanticSegmentation.from_pretrained("me/model", **options)


@pytest.mark.parametrize(
    "name",
    [
        "curve.png",
        "confusion.png",
        "prediction.png",
        "metrics.json",
        "training.json",
        "README.md",
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
        "modeling_segformer.py",
        "examples/street.png",
    ],
)
def test_a_link_out_of_the_folder_is_not_published(name, folder, secret):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    outside = secret.with_name(path.name)
    if path.exists():  # the file is right, but elsewhere
        outside.write_bytes(path.read_bytes())
        path.unlink()
    else:
        outside.write_text("{}" if name.endswith(".json") else SECRET)
    path.symlink_to(os.path.relpath(outside, path.parent))
    with pytest.raises(ValueError, match="is a link to"):
        published(folder)
    path.unlink()
    path.write_bytes(outside.read_bytes())
    assert published(folder)  # the copy is


def test_a_linked_folder_of_examples_is_not_published(folder, secret):
    secret.rename(secret.with_suffix(".png"))
    (folder / "examples").symlink_to("../private")
    with pytest.raises(ValueError, match="is a link to"):
        published(folder)


@pytest.mark.parametrize("module", ["{secret}", "../private/id_ed25519", "/private/id_ed25519", "linked"])
def test_code_outside_the_folder_is_not_published(module, folder, secret):
    secret = secret.rename(secret.with_suffix(".py"))
    (folder / "linked.py").symlink_to(secret)
    module = module.format(secret=secret.with_suffix(""))
    imported = {"up": module.replace("/", ".")} if module == "linked" else {}
    edit(folder / "config.json", auto_map={"AutoModel": f"{module}.Model", **imported})
    with pytest.raises((ValueError, OSError)):
        published(folder)
    (folder / "own.py").write_text(f"from .{module} import key\n")
    edit(folder / "config.json", auto_map={"AutoModel": "own.Model"})
    with pytest.raises((ValueError, OSError)):
        published(folder)


@pytest.mark.parametrize(
    "name",
    [
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "custom_pipelines",
        "quantization_config",
        "use_kernels",
        "dtype",
    ],
)
def test_fields_that_choose_code_are_not_published(name, folder):
    edit(folder / "config.json", **{name: "evil/kernel"})
    with pytest.raises(ValueError, match=f"{name} is evil/kernel, which may choose code"):
        published(folder)


@pytest.mark.parametrize("value", ["../evil.Cfg", "evil", "a/b.C", ".Cfg"])
def test_the_refusal_names_what_auto_map_says(value, folder):
    edit(folder / "config.json", auto_map={"AutoConfig": value})
    with pytest.raises(ValueError, match=f"auto_map names {re.escape(repr(value))}; expected"):
        published(folder)


@pytest.mark.parametrize("auto_map", [{"AutoModel": "evil/code--modeling_segformer.SegFormerModel"}, ["a"], {"a": 3}])
def test_code_of_another_repository_is_not_published(auto_map, folder):
    edit(folder / "config.json", auto_map=auto_map)
    with pytest.raises(ValueError, match="auto_map"):
        published(folder)


@pytest.fixture
def images(tmp_path):
    """Images in a/x and in b, beside a folder for results."""
    for name in ("a/x", "b"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (9, 6)).save(tmp_path / name / "1.png")
    return tmp_path


@pytest.mark.parametrize("pattern", ["a/*/../../b/*.png", "a/*/../../../{name}/b/*.png", "a/**/../../../b/*.png"])
def test_results_stay_in_the_output_folder(pattern, images, monkeypatch):
    monkeypatch.chdir(images)
    with pytest.raises(ValueError, match=r"outside|holds no"):
        find_inputs([pattern.format(name=images.name)], Path("out"))
    assert not (images.parent / "b").exists()
    (images / "list.txt").write_text("a/../../b/1.png\nb/1.png\n")
    if (images.parent / "b" / "1.png").exists():
        assert all(".." not in item.name for item in find_inputs(["@list.txt"], Path("out")))


def test_a_link_in_the_output_folder_is_not_followed(images):
    (images / "out").mkdir()
    (images / "out" / "x").symlink_to(images / "b")
    with pytest.raises(ValueError, match="is a link to"):
        FileSource([str(images / "a")], images / "out")
    writer = PngWriter.__new__(PngWriter)
    writer.out = images / "out"
    for name in ("../b/1", "/b/1", "x/1"):
        with pytest.raises(ValueError, match="outside"):
            writer._path(name)
    (images / "out" / f".{RECORD}.00000").symlink_to(images / "b" / "1.png")
    with pytest.raises(ValueError, match="is a link to"):
        PngWriter(MagicMock(out=images / "out", outputs=MagicMock(clear=()), predictor=MagicMock(names=["a"])))


@pytest.mark.parametrize("base", ["../base.toml", "/base.toml", "sub/base.toml", "link.toml"])
def test_a_base_is_a_recipe_beside_it(base, tmp_path, capsys):
    from hf_segformer.training.recipe import read_recipe

    (tmp_path / "recipes" / "sub").mkdir(parents=True)
    (tmp_path / "base.toml").write_text('secret = "key"')
    (tmp_path / "recipes" / "sub" / "base.toml").write_text('secret = "key"')
    (tmp_path / "recipes" / "link.toml").symlink_to("../base.toml")
    (tmp_path / "recipes" / "recipe.toml").write_text(f'base = "{base}"\n')
    with pytest.raises(ValueError, match=r"beside it|is a link to"):
        read_recipe(tmp_path / "recipes" / "recipe.toml")


@pytest.mark.parametrize("kind", ["image", "string"])
def test_rows_name_files_of_their_data_set_only(kind, images):
    feature = datasets.Image(decode=False) if kind == "image" else datasets.Value("string")
    features = datasets.Features({"image": feature, "label": feature})

    def save(name, path):
        value = {"bytes": None, "path": path} if kind == "image" else path
        rows = datasets.Dataset.from_dict({"image": [value], "label": [value]}, features=features)
        (images / name).mkdir(exist_ok=True)
        rows.to_parquet(images / name / "train.parquet")
        return str(images / name)

    outside = save("data", str(images / "b" / "1.png"))
    with pytest.raises(ValueError, match=r"names the file .*expected one below"):
        DatasetSource(outside, "train", "image")
    with pytest.raises(ValueError, match=r"names the file .*expected one below"):
        open_split(outside, "train")
    climbing = save("climbing", str(images / "climbing" / ".." / "b" / "1.png"))
    with pytest.raises(ValueError, match="names the file"):
        open_split(climbing, "train")
    (images / "own").mkdir()
    Image.new("RGB", (9, 6)).save(images / "own" / "1.png")
    own = save("own", str(images / "own" / "1.png"))
    assert len(open_split(own, "train")) == 1


def test_metadata_names_files_of_its_folder_only(images):
    (images / "a" / "metadata.jsonl").write_text(
        json.dumps({"image_file_name": "../b/1.png", "label_file_name": "../b/1.png"}) + "\n"
    )
    with pytest.raises((ValueError, OSError)):
        open_split(str(images / "a"), "train")


@pytest.mark.parametrize(
    "data_files",
    ["/etc/*", "../b/*.parquet", "https://evil.example/a.csv", [{"split": "train", "path": ["../b/a.csv"]}]],
)
def test_a_card_names_data_of_its_folder_only(data_files, images):
    card = json.dumps({"configs": [{"config_name": "default", "data_files": data_files}]})
    (images / "a" / "README.md").write_text(f"---\n{card}\n---\n")
    with pytest.raises(ValueError, match=r"outside|names https"):
        load_splits(str(images / "a"))


@pytest.mark.parametrize("name", ["../b", "/b", "link"])
def test_a_saved_data_set_names_files_of_its_folder_only(name, images):
    datasets.Dataset.from_dict({"image": ["1.png"]}).save_to_disk(images / "saved")
    (images / "saved" / "link").symlink_to(images / "b")
    state = json.loads((images / "saved" / "state.json").read_text())
    (images / "saved" / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": name}]}))
    with pytest.raises(ValueError, match="outside"):
        load_splits(str(images / "saved"))
    (images / "dict").mkdir()
    (images / "dict" / "link").symlink_to(images / "b")
    (images / "dict" / "dataset_dict.json").write_text(json.dumps({"splits": [name]}))
    with pytest.raises(ValueError, match="outside"):
        load_splits(str(images / "dict"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("dataset_dict.json", '{"splits": 3}', "splits 3; expected a list"),
        ("state.json", '{"_data_files": {"a": 1}}', "_data_files {'a': 1}; expected a list"),
        ("README.md", "---\nconfigs: [3]\n---\n", "3 in configs; expected a mapping"),
    ],
)
def test_damaged_metadata_of_a_data_set_are_refused_in_one_line(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, OSError), match=message):
        load_splits(str(tmp_path))


def test_a_data_set_script_is_not_run(tmp_path):
    data = tmp_path / "street"
    data.mkdir()
    (data / "street.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')\n")
    (data / "a.csv").write_text("image\na.png\n")
    with suppress(ValueError, OSError, RuntimeError):
        load_splits(str(data))
    assert not (tmp_path / "was run").exists()


def test_one_line_for_whoever_loads_a_hostile_folder(folder, secret, capsys):
    (folder / "curve.png").symlink_to(secret)
    assert main(["push", str(folder), "me/model"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "curve.png" in error
    assert SECRET not in error


DANGEROUS = {"eval", "exec", "__import__", "extractall", "unpack_archive", "system", "popen"}
DANGEROUS |= {"expandvars", "expanduser", "urlopen", "urlretrieve", "create_module", "exec_module"}


def dangerous_calls(source):
    """Yield calls that run code or unpack what others wrote, and arguments that allow it."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        owner = getattr(getattr(node.func, "value", None), "id", "")
        keywords = {each.arg: ast.unparse(each.value) for each in node.keywords}
        is_method_eval = name == "eval" and isinstance(node.func, ast.Attribute)  # of a module
        if name in DANGEROUS and not is_method_eval:
            yield ast.unparse(node)
        if owner == "torch" and name == "load" and keywords.get("weights_only") != "True":
            yield ast.unparse(node)
        if owner in ("np", "numpy") and name == "load" and keywords.get("allow_pickle") != "False":
            yield ast.unparse(node)
        if owner in ("pickle", "yaml") and name in ("load", "loads", "Unpickler"):
            yield ast.unparse(node)
        if keywords.get("trust_remote_code") == "True" or keywords.get("shell") == "True":
            yield ast.unparse(node)


def test_no_dangerous_calls():
    for bad in (
        "torch.load(p)",
        "np.load(p)",
        "tar.extractall()",
        "eval(x)",
        "f(trust_remote_code=True)",
        "pickle.load(f)",
        "os.path.expandvars(p)",
        "Path(p).expanduser()",
        "urllib.request.urlopen(a)",
    ):
        assert list(dangerous_calls(bad)), bad
    for path in sorted((ROOT / "hf_segformer").rglob("*.py")):
        assert not list(dangerous_calls(path.read_text())), path


def test_archives_of_weights_that_unpack_to_more_are_refused(tmp_path):
    torch.save({"norm.weight": torch.zeros(100_000)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as stored, zipfile.ZipFile(tmp_path / "b.pth", "w", 8) as packed:
        for each in stored.namelist():
            packed.writestr(each, stored.read(each))
    with pytest.raises(ValueError, match=r"b\.pth unpacks from [\d,]+ to 400,\d+ bytes; expected at most 4 times"):
        read_checkpoint(tmp_path / "b.pth")
    assert len(read_checkpoint(tmp_path / "a.pth").weights["norm.weight"]) == 100_000


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**6, 10**6),
        torch.zeros(2, 3).as_strided((10**5, 3), (0, 1)),
        torch.sparse_coo_tensor([[0], [0]], [1.0], (10**6, 10**6), check_invariants=True),
        torch.empty(10**6, 10**6, device="meta"),
    ],
    ids=["expanded", "strided", "sparse", "meta"],
)
def test_tensors_larger_than_what_is_stored_are_refused(tensor, tmp_path):
    torch.save({"norm.weight": tensor}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"holds fewer values than 'norm\.weight'"):
        read_checkpoint(tmp_path / "a.pth")


ADDRESSES = [
    "http://127.0.0.1:9/a.png",
    "https://evil.example/a.png",
    "file:///etc/hostname",
    "s3://bucket/a.png",
    "zip://a.png::http://127.0.0.1:9/a.zip",
    "file:///etc/hostname::hf://datasets/me/street@main/a.png",
    "hf://datasets/me/street@main/../../else/a.png",
    "hf://me/model/a.png",
    "hf://datasets/evil/street/a.png",
]


@pytest.fixture
def no_network(monkeypatch):
    """Fail where an address is opened."""
    monkeypatch.setattr("fsspec.open", lambda address: pytest.fail(f"{address} was opened"))


@pytest.mark.parametrize("address", ADDRESSES)
def test_rows_name_no_addresses(address, images, no_network, monkeypatch):
    """In the working folder too, below which an address would be a relative path."""
    monkeypatch.chdir(images)
    features = datasets.Features({name: datasets.Image(decode=False) for name in ("image", "label")})
    row = {"bytes": None, "path": address}
    rows = datasets.Dataset.from_dict({"image": [row], "label": [row]}, features=features)
    for dataset in (rows, rows.to_iterable_dataset()):
        for root in (".", "me/street"):
            with pytest.raises(ValueError, match="names"):
                list(two_columns(dataset, root, ("image", "label"), ("a", "b")))


@pytest.mark.parametrize("address", [*ADDRESSES, "hf://datasets/me/street@main/a.png"])
def test_lists_and_paths_name_no_addresses(address, images, no_network, monkeypatch):
    monkeypatch.chdir(images)
    (images / "list.txt").write_text(f"{address}\n")
    with suppress(ValueError):
        [item] = find_inputs(["@list.txt"], Path("out"), pages=True)
        assert ".." not in item.name
        with pytest.raises(OSError, match="cannot read"):
            FileSource(["@list.txt"], Path("out")).read(item)
    with pytest.raises(OSError, match="cannot read"):
        ImageSource(address)


def test_a_stream_reads_the_files_of_its_own_data_set(monkeypatch):
    opened = []

    def open_address(address):
        opened.append(address)
        return BytesIO(b"content")

    monkeypatch.setattr("fsspec.open", open_address)
    features = datasets.Features({name: datasets.Image(decode=False) for name in ("image", "label")})
    names = ["hf://datasets/me/street@0a1b/a/1.png", "zip://a/1.png::hf://datasets/me/street@0a1b/a.zip"]
    rows = [{"image": {"bytes": None, "path": name}, "label": {"bytes": None, "path": name}} for name in names]
    stream = datasets.Dataset.from_list(rows, features=features).to_iterable_dataset()
    for row in two_columns(stream, "me/street", ("image", "label"), ("a", "b")):
        assert ImageSource(row["image"]).content == b"content"
    assert opened == names


@pytest.mark.parametrize("name", ["../secret/a.tif", "{folder}/secret/a.tif", "http://127.0.0.1:9/a.tif"])
def test_a_microscope_image_does_not_open_others(name, tmp_path, monkeypatch):
    """OME metadata may name the files that hold its planes."""
    tifffile = pytest.importorskip("tifffile")
    (tmp_path / "secret").mkdir()
    (tmp_path / "own").mkdir()
    tifffile.imwrite(tmp_path / "secret" / "a.tif", np.full((6, 9), 77, np.uint8))
    plane = f'<TiffData IFD="0" PlaneCount="1"><UUID FileName="{name.format(folder=tmp_path)}">urn:b</UUID></TiffData>'
    description = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:a">'
        '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="9" SizeY="6" SizeC="1" '
        f'SizeZ="1" SizeT="1">{plane}</Pixels></Image></OME>'
    )
    path = tmp_path / "own" / "a.ome.tif"
    tifffile.imwrite(path, np.full((6, 9), 5, np.uint8), description=description, metadata=None)
    opened = []
    monkeypatch.setattr("tifffile.tifffile.FileHandle.open", spied(opened, tifffile.tifffile.FileHandle.open))
    with open_raster(path, 1) as raster:
        pixels, _ = raster.read(Tile(0, 0, 6, 9))
    assert (pixels == 5).all()
    assert set(opened) == {str(path)}


def spied(opened, function):
    def spy(handle, *arguments, **options):
        function(handle, *arguments, **options)
        opened.append(handle.path)

    return spy


HOSTILE = {
    "attn_implementation": "evil/kernel",
    "_attn_implementation_internal": "evil/kernel:run",
    "experts_implementation": "evil/kernel",
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "dtype": "os.system",
    "torch_dtype": "load",
    "sub_configs": {"evil": "evil/kernel"},
    "use_kernels": True,
    "base_model_tp_plan": {"evil": "evil/kernel"},
    "backbone_config": {"model_type": "evil"},
    "per_layer_config": {"0": {"evil": 1}},
    "save_pretrained": "evil/kernel",
    "custom_pipelines": {"image-segmentation": {"impl": "evil.Pipeline"}},
    "auto_map": {"AutoModelForSemanticSegmentation": "evil/code--modeling.Evil"},
    "architectures": ["Evil"],
    "transformers_weights": "../private/other.safetensors",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_config_chooses_no_code_in_from_pretrained(name, folder, secret):
    """Transformers' own loader, of the class, reads the same fields."""
    pixels = torch.randn(1, 3, 64, 96)
    expected = SegFormerForSemanticSegmentation.from_pretrained(folder)
    other = SegFormerForSemanticSegmentation(expected.config)
    save_file(other.state_dict(), secret.with_name("other.safetensors"), {"format": "pt"})
    edit(folder / "config.json", **{name: HOSTILE[name]})
    model = SegFormerForSemanticSegmentation.from_pretrained(folder)
    assert type(model) is SegFormerForSemanticSegmentation
    assert model.config._attn_implementation == expected.config._attn_implementation
    assert torch.equal(model(pixels).logits, expected(pixels).logits)
    model.save_pretrained(folder / "again")
    saved = (folder / "again" / "config.json").read_text()
    assert "evil/" not in saved
    assert "kernel" not in saved
    assert "other" not in saved
    assert name in ("auto_map", "architectures", "dtype") or f'"{name}"' not in saved


def test_files_beside_a_raster_are_checked_as_gdal_reads_them(tmp_path):
    """In any case of letters, with escaped letters, and whatever their length."""
    rasterio = pytest.importorskip("rasterio")
    (tmp_path / "own").mkdir()
    path, other = tmp_path / "own" / "s.tif", tmp_path / "other.tif"
    for place, side in ((path, 64), (other, 32)):
        profile = {"width": side, "height": side, "count": 1, "dtype": "uint8"}
        with rasterio.open(place, "w", driver="GTiff", transform=rasterio.Affine(2, 0, 0, 0, -2, 0), **profile) as file:
            file.write(np.full((1, side, side), 77, np.uint8))
    item = '<PAMDataset>{}<Metadata domain="OVERVIEWS"><MDI key="{}">{}</MDI></Metadata></PAMDataset>'
    secret = str(other).replace("/", "&#47;")
    texts = {
        "s.tif.aux.xml": item.format("", "OVERVIEW&#95;FILE", secret),
        "S.TIF.AUX.XML": item.format("", "OVERVIEW_FILE", other),
        "s.aux.xml": item.format("", "&#x4F;VERVIEW_FILE", secret),
        "s.tif.Aux.xml": item.format(f"<!-- {' ' * (16 << 20)} -->", "OVERVIEW_FILE", other),
        "s.tif.OVR": "<VRTDataset/>",
        "S.TIF.Msk": "<VRTDataset/>",
        "S.AUX": "<VRTDataset/>",
    }
    for name, text in texts.items():
        (path.parent / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name} (refers to other files|is not the raster)"):
            open_raster(path, 1)
        (path.parent / name).unlink()
    (path.parent / "s.tif.aux.xml").write_text(item.format("", "STATISTICS_MEAN", "a &lt; b"))
    with open_raster(path, 1) as raster:
        assert raster.height == 64


ESRI = """<PAMDataset>
  <Metadata domain="xml:ESRI" format="xml">
    <GeodataXform xsi:type='typens:IdentityXform' xmlns:xsi='http://www.w3.org/2001/XMLSchema-instance'
      xmlns:typens='http://www.esri.com/schemas/ArcGIS/10.8'></GeodataXform>
  </Metadata>
  <PAMRasterBand band="1"><Metadata><MDI key="STATISTICS_MEAN">3.5</MDI></Metadata></PAMRasterBand>
</PAMDataset>"""
ADDRESS = "http://127.0.0.1:9/a"


@pytest.mark.parametrize(
    ("text", "is_read"),
    [
        (ESRI, True),
        (f'<?xml version="1.0"?>\n{ESRI}', True),
        (f'<PAMDataset><Metadata><MDI key="SOURCE">{ADDRESS}</MDI></Metadata></PAMDataset>', True),
        (f"<PAMDataset><SRS>{ADDRESS}</SRS></PAMDataset>", False),
        ("<PAMDataset><SRS>http:&#47;/127.0.0.1:9/a</SRS></PAMDataset>", False),
        (f'<PAMDataset><GCPList Projection="{ADDRESS}"/></PAMDataset>', False),
        (f"<PAMDataset><mdi>{ADDRESS}</mdi></PAMDataset>", False),
        (f"<PAMDataset><SRS><MDI/>{ADDRESS}</SRS></PAMDataset>", False),
        (f'<PAMDataset><SRS><!-- <MDI key="a"> -->{ADDRESS}</SRS></PAMDataset>', False),
        (f'<PAMDataset><?a y="?><MDI key="">{ADDRESS}</MDI></PAMDataset>', False),
        (f"<PAMDataset><MDI>{ADDRESS}</PAMDataset>", False),
        (f'<PAMDataset><Metadata><MDI key="OVERVIEW_FILE">{ADDRESS}</MDI></Metadata></PAMDataset>', False),
    ],
)
def test_only_addresses_that_gdal_may_open_are_refused(tmp_path, text, is_read):
    pytest.importorskip("rasterio")
    from hf_segformer.geo.vrt import check_sidecars

    (tmp_path / "s.tif").write_bytes(b"II*\0" + bytes(20))
    (tmp_path / "s.tif.aux.xml").write_text(text)
    if is_read:
        check_sidecars(tmp_path / "s.tif")
    else:
        with pytest.raises(ValueError, match=r"s\.tif\.aux\.xml refers to other files"):
            check_sidecars(tmp_path / "s.tif")


def test_pages_that_a_file_beside_a_raster_names_are_not_opened(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(2, 0, 0, 0, -2, 0)}
    with rasterio.open(tmp_path / "s.tif", "w", "GTiff", 9, 6, 1, dtype="uint8", **place) as file:
        file.write(np.ones((1, 6, 9), np.uint8))
    names = "".join(f'<MDI key="SUBDATASET_{i}_NAME">{name}</MDI>' for i, name in ((1, ADDRESS), (2, "/etc/passwd")))
    document = f'<PAMDataset><Metadata domain="SUBDATASETS">{names}</Metadata></PAMDataset>'
    (tmp_path / "s.tif.aux.xml").write_text(document)
    with open_raster(tmp_path / "s.tif", 1) as raster:
        assert raster.height == 6


def test_an_ending_of_a_skipped_file_is_printed_escaped():
    report = Report.__new__(Report)
    object.__setattr__(report, "skipped", {".\x1b[31m": 1})
    assert "1 .\\x1b[31m" in report.format_skipped()
