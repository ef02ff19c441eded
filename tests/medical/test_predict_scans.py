"""`segformer predict` on scans: masks in kind, areas, resuming, slices as images, and nothing that names a patient."""

import csv
import gzip
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("highdicom")

import highdicom
import nibabel
import pydicom
from PIL import Image

from hf_segformer import SegFormerImageProcessor, SegFormerPredictor
from hf_segformer.cli.main import main
from hf_segformer.inference.areas import longest_diameter
from tests.inference.test_predictor import lively, make_image
from tests.support import scans
from tests.support.commands import assert_one_line

WINDOW = "--value-range=window:100,400"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    lively(num_labels=3, id2label={0: "background", 1: "liver", 2: "lesion"}).save_pretrained(folder)
    SegFormerImageProcessor(do_resize=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("binary")
    lively(num_labels=1, id2label={0: "lesion"}).save_pretrained(folder)
    SegFormerImageProcessor(do_resize=False).save_pretrained(folder)
    return folder


@pytest.fixture
def study(tmp_path):
    """A folder with a series, a multi-frame file, a radiograph, a NIfTI volume, a photograph, and no images."""
    folder = tmp_path / "study"
    scans.ct_series(folder / "ct")
    scans.enhanced_ct(folder / "other" / "enhanced.dcm")
    scans.xray(folder / "other" / "chest.dcm")
    scans.nifti(folder / "head.nii.gz")
    scans.rt_struct(folder / "ct" / "plan.dcm")
    (folder / "DICOMDIR").write_bytes((folder / "ct" / "plan.dcm").read_bytes())
    make_image(40, 44).save(folder / "photo.png")
    return folder


def run(*arguments):
    return main(["predict", *(str(argument) for argument in arguments)])


def files(out):
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def expected_slices(checkpoint, volume):
    predictor = SegFormerPredictor.from_pretrained(checkpoint)
    predictor.processor.value_range = {"center": 100, "width": 400}
    return np.stack([each.segmentation for each in predictor(list(volume))])


def test_a_study_becomes_masks_in_kind_and_names_nobody(study, checkpoint, tmp_path, capfd):
    out = tmp_path / "out"
    assert run(checkpoint, study, "-o", out, WINDOW) == 0
    printed = capfd.readouterr()
    assert "5 images predicted" in printed.out
    assert "2 files skipped, not images: 1 without suffix, 1 .dcm" in printed.out
    assert files(out) == [
        *("ct_areas.csv", "ct_mask.dcm", "head_areas.csv", "head_mask.nii.gz"),
        *("other/chest_areas.csv", "other/chest_mask.dcm", "other/enhanced_areas.csv", "other/enhanced_mask.dcm"),
        *("photo_mask.png", "predictions.jsonl", "settings.json", "summary.json"),
    ]
    found = highdicom.seg.segread(out / "ct_mask.dcm")
    paths = {pydicom.dcmread(path).ImagePositionPatient[2]: path for path in (study / "ct").glob("im*.dcm")}
    uids = [pydicom.dcmread(paths[place]).SOPInstanceUID for place in sorted(paths)]
    expected = expected_slices(checkpoint, scans.ct_volume().astype(np.float32))
    masks = found.get_pixels_by_source_instance(uids, combine_segments=True)
    assert (masks != expected).mean() < 1e-3  # rounding differs in batches
    assert len(np.unique(expected)) > 1
    head = nibabel.load(study / "head.nii.gz").get_fdata().astype(np.float32)
    expected = expected_slices(checkpoint, np.moveaxis(head, (2, 1, 0), (0, 1, 2)))
    assert (
        np.moveaxis(np.asarray(nibabel.load(out / "head_mask.nii.gz").dataobj), 2, 0) != expected.swapaxes(1, 2)
    ).mean() < 1e-3
    for path in out.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            content = gzip.decompress(content) if path.suffix == ".gz" else content
            assert b"SECRET" not in content, path
    assert "SECRET" not in printed.out + printed.err


def test_areas_are_those_of_the_masks(study, checkpoint, tmp_path):
    assert run(checkpoint, study / "ct", study / "other" / "chest.dcm", "-o", tmp_path / "out", WINDOW) == 0
    tables = {}
    for name in ("ct", "chest"):
        with (tmp_path / "out" / f"{name}_areas.csv").open() as file:
            tables[name] = list(csv.DictReader(file))
    rows = tables["ct"]
    found = highdicom.seg.segread(tmp_path / "out" / "ct_mask.dcm")
    volume = found.get_volume(combine_segments=True)
    for number, name in ((1, "liver"), (2, "lesion")):
        [total] = [row for row in rows if (row["slice"], row["class"]) == ("", name)]
        pixels = int((volume.array == number).sum())
        assert int(total["pixels"]) == pixels
        assert float(total["cubic_mm"] or 0) == pytest.approx(pixels * volume.voxel_volume, rel=1e-5)
        slices = [row for row in rows if row["class"] == name and row["slice"]]
        assert sum(int(row["pixels"]) for row in slices) == pixels
        diameters = [longest_diameter(each == number, (0.75, 0.5)) for each in volume.array]
        assert float(total["diameter_mm"]) == pytest.approx(max(diameters))
        assert sorted(float(row["diameter_mm"]) for row in slices) == pytest.approx(sorted(filter(None, diameters)))
        for row in slices:  # 0.75 by 0.5 mm, written without binary digits
            assert row["square_mm"] == f"{int(row['pixels']) * 0.375:.9g}"
    [chest, _] = tables["chest"]
    assert chest["square_mm"] == chest["diameter_mm"] == ""  # the spacing at the detector is not that of the body


def test_a_run_is_resumed_and_one_bad_file_stops_no_other(study, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    (study / "cut.nii.gz").write_bytes((study / "head.nii.gz").read_bytes()[:500])
    [gap] = sorted(scans.ct_series(study / "gap", 5))[2:3]
    gap.unlink()
    assert run(checkpoint, study, "-o", out, WINDOW) == 1
    error = capsys.readouterr().err
    assert "2 images could not be predicted" in error
    assert "cut.nii.gz" in error
    assert "mm apart" in error
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*_mask.*")}
    assert len(stamps) == 5
    (out / "head_mask.nii.gz").unlink()
    (study / "cut.nii.gz").unlink()
    for path in (study / "gap").iterdir():
        path.unlink()
    assert run(checkpoint, study, "-o", out, WINDOW) == 0
    assert "4 of them by earlier runs" in capsys.readouterr().out
    changed = {path.name for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert changed == {"head_mask.nii.gz"}
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [(line["name"], line.get("slices")) for line in lines] == [
        *(("ct", 4), ("head", 4), ("other/chest", 1), ("other/enhanced", 3), ("photo", None)),
    ]


@pytest.mark.parametrize("pages", [(), ("--pages",)])
def test_a_series_of_other_files_is_refused_until_its_masks_are_deleted(study, checkpoint, tmp_path, capsys, pages):
    out = tmp_path / "out"
    paths = scans.ct_series(study / "ct2", 4)
    paths[0].rename(tmp_path / "kept")  # the first by position, not by name
    arguments = (checkpoint, study / "ct2", study / "photo.png", "-o", out, WINDOW, *pages)
    assert run(*arguments) == 0
    stamp = (out / "photo_mask.png").stat().st_mtime_ns
    (tmp_path / "kept").rename(paths[0])
    capsys.readouterr()
    assert run(*arguments) == 1
    name, page = ("ct2_p001", ", page 1") if pages else ("ct2", "")
    first, now = min(paths[1:]), min(paths)
    assert re.search(
        rf"out holds the prediction of {first} and 2 more files \(names \w+\){page} as {name}, which now is {now} and "
        rf"3 more files \(names \w+\){page}: choose another output folder, or delete {name}_mask\.\* there to predict "
        r"it again\n$",
        capsys.readouterr().err,
    )
    for path in out.glob("ct2*_mask.*"):
        path.unlink()
    for earlier in (1, 5 if pages else 2):
        assert run(*arguments) == 0
        assert f"{earlier} of them by earlier runs" in capsys.readouterr().out
    assert (out / "photo_mask.png").stat().st_mtime_ns == stamp
    if not pages:
        assert json.loads((out / "predictions.jsonl").read_text().splitlines()[0])["slices"] == 4


def test_two_series_of_one_folder_are_two_volumes(checkpoint, tmp_path):
    scans.ct_series(tmp_path / "ct", 2)
    for path in scans.ct_series(tmp_path / "more", 3, SeriesNumber=8):
        path.rename(tmp_path / "ct" / f"b{path.name}")
    assert run(checkpoint, tmp_path / "ct", "-o", tmp_path / "out", WINDOW) == 0
    assert [name for name in files(tmp_path / "out") if "mask" in name] == ["series_3_mask.dcm", "series_8_mask.dcm"]
    assert highdicom.seg.segread(tmp_path / "out" / "series_8_mask.dcm").SegmentSequence[1].SegmentLabel == "lesion"


def test_slices_as_images_in_the_window_of_the_file(study, checkpoint, tmp_path):
    out = tmp_path / "out"
    arguments = [study / "ct", study / "other", "-o", out, "--pages", "--value-range", "window", "--overlay"]
    assert run(checkpoint, *arguments) == 0
    masks = [name for name in files(out) if name.endswith("_mask.png")]
    assert masks == [
        *("chest_mask.png", *(f"ct_p00{number}_mask.png" for number in range(1, 5))),
        *(f"enhanced_p00{number}_mask.png" for number in range(1, 4)),
    ]
    shown = highdicom.imread(next(iter((study / "ct").glob("im3.dcm")))).get_frame(
        1, apply_voi_transform=True, voi_output_range=(0, 255)
    )
    expected = SegFormerPredictor.from_pretrained(checkpoint)(np.rint(shown).astype(np.uint8)).segmentation
    with Image.open(out / "ct_p001_mask.png") as mask:
        assert (np.asarray(mask) != expected).mean() < 0.01


def test_a_series_with_a_gap_is_predicted_as_images(checkpoint, tmp_path):
    scans.ct_series(tmp_path / "gap", 4)[2].unlink()
    assert run(checkpoint, tmp_path / "gap", "-o", tmp_path / "out", WINDOW, "--pages") == 0
    masks = [name for name in files(tmp_path / "out") if name.endswith("_mask.png")]
    assert masks == [f"gap_p00{number}_mask.png" for number in (1, 2, 3)]


def test_nifti_along_another_axis_with_black_and_white_masks(study, binary, tmp_path):
    path = study / "head.nii.gz"
    for axis in (1, 2):
        out = tmp_path / f"out{axis}"
        assert run(binary, path, "-o", out, WINDOW, "--axis", axis, "--masks-as", "255", "--threshold", 0.45) == 0
        found = nibabel.load(out / "head_mask.nii.gz")
        assert found.shape == (44, 36, 4)
        assert set(np.unique(np.asarray(found.dataobj))) <= {0, 255}
        with (out / "head_areas.csv").open() as file:
            assert {row["class"] for row in csv.DictReader(file)} == {"lesion"}
    assert run(binary, path, "-o", tmp_path / "out1", WINDOW, "--axis", 2, "--masks-as", "255") == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), "expected a value range: --value-range LOW,HIGH"),
        ((WINDOW, "--masks-as", "values"), "a mask of this kind holds segments, not values"),
        ((WINDOW, "--overlay"), "--overlay cannot be written for a volume: predict its slices as separate images"),
        ((WINDOW, "--axis", "1"), "leave --axis out"),
        ((WINDOW, "--format", "parquet"), "is a volume or damaged; expected an image for --format parquet"),
    ],
)
def test_what_a_dicom_file_cannot_become_is_said_in_one_line(checkpoint, tmp_path, capsys, options, reason):
    path = scans.ct_series(tmp_path, 1)[0]
    assert run(checkpoint, path, "-o", tmp_path / "out", *options) == 1
    error = capsys.readouterr().err.strip()
    assert reason in error
    assert "\n" not in error


def test_a_window_and_an_axis_are_refused_for_a_photograph(study, checkpoint, tmp_path, capsys):
    assert run(checkpoint, study / "photo.png", "-o", tmp_path / "out", "--value-range", "window") == 1
    assert "photo.png states no window for display" in capsys.readouterr().err
    assert run(checkpoint, study / "photo.png", "-o", tmp_path / "out2", "--axis", 1) == 1
    assert "photo.png is no volume that is cut along an axis" in capsys.readouterr().err


def test_the_identity_is_kept_where_asked_for(study, checkpoint, tmp_path):
    assert run(checkpoint, study / "ct", "-o", tmp_path / "out", WINDOW, "--keep-identity") == 0
    found = pydicom.dcmread(tmp_path / "out" / "ct_mask.dcm")
    assert (found.PatientName, found.PatientID) == (scans.NAME, scans.PATIENT_ID)


def test_the_identity_is_refused_where_no_mask_could_keep_it(study, checkpoint, tmp_path, capsys):
    out = ("-o", tmp_path / "out", WINDOW, "--keep-identity")
    assert run(checkpoint, study / "head.nii.gz", study / "photo.png", *out) == 1
    assert_one_line(capsys.readouterr().err, "--keep-identity is given, but no input is a DICOM file", "leave it out")
    assert run(checkpoint, study, *out, "--pages") == 2
    assert_one_line(capsys.readouterr().err, "--keep-identity is given with --pages")
    assert not (tmp_path / "out").exists()


def test_without_the_extra_scans_are_refused_in_one_line_and_images_are_predicted(
    study, checkpoint, tmp_path, capsys, monkeypatch
):
    for name in ("pydicom", "nibabel", "highdicom"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run(checkpoint, study, "-o", tmp_path / "out", WINDOW) == 1
    error = capsys.readouterr().err
    assert error.count("pip install 'hf-segformer[medical]'") == 4  # ct, other, DICOMDIR, head
    assert (tmp_path / "out" / "photo_mask.png").exists()


def test_the_commands_of_the_guide_run(study, checkpoint, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/guides/medical.md").read_text()
    commands = re.findall(r"^segformer (predict .*)$", page, re.MULTILINE)
    assert len(commands) == 4
    monkeypatch.chdir(tmp_path)
    shutil.copy(study / "head.nii.gz", tmp_path)
    (study / "head.nii.gz").unlink()  # which states no window
    for number, command in enumerate(commands):
        arguments = [
            {"MODEL": str(checkpoint), "predictions": f"out{number}"}.get(word, word) for word in shlex.split(command)
        ]
        if "window" in arguments and "--pages" not in arguments:
            (study / "photo.png").unlink()  # nor does this
        assert main(arguments) == 0, command
    assert (tmp_path / "out2" / "head_mask.nii.gz").exists()
    assert (tmp_path / "out3" / "ct_p004_overlay.png").exists()
