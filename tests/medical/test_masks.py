"""Masks of volumes slice by slice: label volumes in any orientation, DICOM segmentations, and pairs of folders."""

import csv
import itertools
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("highdicom")

import highdicom
import nibabel
import pydicom
from nibabel.orientations import apply_orientation, inv_ornt_aff
from PIL import Image
from pydicom.uid import generate_uid

from hf_segformer import SegFormerImageProcessor
from hf_segformer.config import DataConfig, SplitConfig
from hf_segformer.data.pairing import decode_dataset, pair_images_and_masks
from hf_segformer.data.reader_protocol import ImageSource, ReadOptions
from hf_segformer.inference.tiling import MaskLayout
from hf_segformer.medical.dicom import DicomVolume
from hf_segformer.medical.masks import read_labels
from hf_segformer.medical.nifti import NiftiVolume
from hf_segformer.training.data import load_data
from hf_segformer.training.recipe import read_recipe
from tests.inference.test_predictor import lively
from tests.support import scans
from tests.support.commands import run

NAMES = ("background", "liver", "lesion")
CLASSES = dict(zip(NAMES, range(3), strict=True))
LAYOUT = MaskLayout(np.uint8, 255, [(0, 0, 0), (255, 0, 0), (0, 128, 255)], NAMES)


def labels_like(volume, seed=0):
    shape = (volume.num_slices, volume.height, volume.width)
    return np.random.default_rng(seed).integers(0, 3, shape).astype(np.uint8)


def dicom(*paths):
    files = [str(path) for path in paths] if len(paths) > 1 else ()
    return DicomVolume(ImageSource(str(paths[0]), files=files), ReadOptions(any_range=True))


def series(folder, number=4, **changes):
    return dicom(*scans.ct_series(folder, number, **changes))


def read(volume, path, classes=CLASSES, outside=0):
    return np.ma.stack(
        [read_labels(volume, ImageSource(path), index, classes, outside) for index in range(volume.num_slices)]
    )


def reason(volume, path, **options):
    with pytest.raises((ValueError, OSError)) as caught:
        read(volume, path, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert "SECRET" not in text
    return text


def segmentation(volume, labels, path, layout=LAYOUT):
    volume.write(path, iter(labels), layout)
    return path


# --- Label volumes ----------------------------------------------------------------------------------------------------

ORIENTATIONS = [
    np.array(list(zip(axes, signs, strict=True)), float)
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def turned(stored, affine, orientation):
    """Labels of one place, with axes in another order or direction, by nibabel."""
    return nibabel.Nifti1Image(apply_orientation(stored, orientation), affine @ inv_ornt_aff(orientation, stored.shape))


@pytest.mark.parametrize("axis", range(3))
def test_a_label_volume_of_any_orientation_is_turned(tmp_path, axis):
    path = scans.nifti(tmp_path / "a.nii", shape=(7, 6, 5))
    image = nibabel.load(path)
    volume = NiftiVolume(ImageSource(path), ReadOptions(any_range=True, axis=axis))
    stored = np.random.default_rng(1).integers(0, 3, image.shape).astype(np.uint8)
    expected = np.moveaxis(stored, axis, 0).swapaxes(1, 2)
    for number, orientation in enumerate(ORIENTATIONS):
        mask = tmp_path / f"m{number}.nii"
        nibabel.save(turned(stored, image.affine, orientation), mask)
        np.testing.assert_array_equal(read(volume, mask), expected)


def test_steps_need_not_be_at_right_angles(tmp_path):
    affine, stored = np.diag([2.0, 3, 4, 1]), np.random.default_rng(1).integers(0, 3, (7, 6, 5)).astype(np.uint8)
    affine[1, 2] = 1  # the gantry was tilted
    nibabel.save(nibabel.Nifti1Image(stored, affine), tmp_path / "a.nii")
    volume = NiftiVolume(ImageSource(tmp_path / "a.nii"), ReadOptions(any_range=True))
    assert volume.spacing == (None, None, None)
    for number, orientation in enumerate(ORIENTATIONS[::5]):
        mask = tmp_path / f"m{number}.nii"
        nibabel.save(turned(stored, affine, orientation), mask)
        np.testing.assert_array_equal(read(volume, mask), stored.transpose(2, 1, 0))
    straight = np.diag([2.0, 3, 4, 1])
    nibabel.save(nibabel.Nifti1Image(stored, straight), tmp_path / "straight.nii")
    assert "straight.nii is not on the grid of" in reason(volume, tmp_path / "straight.nii")
    content = (tmp_path / "straight.nii").read_bytes()
    (tmp_path / "flat.nii").write_bytes(content[:312] + bytes(16) + content[328:])  # srow_z
    assert "flat.nii states no place in space" in reason(volume, tmp_path / "flat.nii")


def test_a_label_volume_of_a_dicom_series_lies_where_highdicom_says(tmp_path):
    paths = scans.ct_series(tmp_path / "ct")
    space = highdicom.get_volume_from_series([pydicom.dcmread(path) for path in paths])
    expected = labels_like(dicom(*paths))
    in_space = expected if np.allclose(space.array[0], scans.ct_volume()[0]) else expected[::-1]
    affine = np.diag([-1, -1, 1, 1]) @ space.affine  # from left, back, up to right, front, up
    for number, orientation in enumerate(ORIENTATIONS[::5]):
        mask = tmp_path / f"m{number}.nii.gz"
        nibabel.save(turned(in_space, affine, orientation), mask)
        np.testing.assert_array_equal(read(dicom(*paths), mask), expected)


@pytest.mark.parametrize("places", [[0, 5, 2.5, 7.5], [7.5, 5, 2.5, 0]])
def test_masks_of_a_multi_frame_file_lie_where_its_frames_do(tmp_path, places):
    """A converter writes slices in the order of their positions, whatever the order of the frames."""
    path = scans.enhanced_ct(tmp_path / "a.dcm", places=places)
    volume, expected = dicom(path), np.empty((4, 36, 44), np.uint8)
    for index in range(4):
        expected[index] = places[volume.place_of(index).frame - 1] / 2.5
    row, column = np.split(np.array(scans.OBLIQUE), 2)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([row * 0.5, column * 0.75, np.cross(row, column) * 2.5], 1)
    by_position = np.broadcast_to(np.arange(4, dtype=np.uint8), (44, 36, 4))
    nibabel.save(nibabel.Nifti1Image(by_position, np.diag([-1, -1, 1, 1]) @ affine), tmp_path / "m.nii.gz")
    np.testing.assert_array_equal(read(volume, tmp_path / "m.nii.gz"), expected)
    labels = labels_like(volume)
    np.testing.assert_array_equal(read(volume, segmentation(volume, labels, tmp_path / "seg.dcm")), labels)


def test_a_label_volume_on_another_grid_is_refused(tmp_path):
    path = scans.nifti(tmp_path / "a.nii", shape=(7, 6, 5))
    affine = nibabel.load(path).affine
    volume = NiftiVolume(ImageSource(path), ReadOptions(any_range=True))
    stored = np.zeros((7, 6, 5), np.uint8)
    shifted, scaled = affine.copy(), affine @ np.diag([1, 1, 1.1, 1])
    shifted[:3, 3] += affine[:3, 0] * 0.4
    for name, (array, place) in {
        "shifted": (stored, shifted),
        "scaled": (stored, scaled),
        "elsewhere": (stored, np.eye(4)),
        "smaller": (stored[:6], affine),
    }.items():
        nibabel.save(nibabel.Nifti1Image(array, place), tmp_path / f"{name}.nii")
        text = reason(volume, tmp_path / f"{name}.nii")
        assert f"{name}.nii is not on the grid of" in text
        assert "resample the mask first, by nearest neighbour" in text
    nibabel.save(nibabel.Nifti1Image(stored, shifted - 0.35 * np.outer([*affine[:3, 0], 0], [0, 0, 0, 1])), path)
    assert not read(volume, path).any()  # a twentieth of a voxel apart: rounding
    photo = tmp_path / "x.dcm"
    assert "x.dcm states no place in space" in reason(dicom(scans.xray(photo)), tmp_path / "smaller.nii")


# --- Segmentations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["series", "frames", "xray"])
def test_a_segmentation_is_read_as_it_was_written(tmp_path, make):
    if make == "series":
        volume = series(tmp_path / "ct")
    else:
        volume = dicom(scans.enhanced_ct(tmp_path / "a.dcm") if make == "frames" else scans.xray(tmp_path / "a.dcm"))
    labels = labels_like(volume)
    path = segmentation(volume, labels, tmp_path / "seg.dcm")
    np.testing.assert_array_equal(read(volume, path), labels)
    values = {"LESION": 7, "liver": 5, "background": 9}
    np.testing.assert_array_equal(read(volume, path, values, 9), np.array([9, 5, 7])[labels])
    found = read(volume, path, {"liver": 0, "lesion": 1}, None)  # without a background the rest is ignored
    np.testing.assert_array_equal(np.ma.getmaskarray(found), labels == 0)
    np.testing.assert_array_equal(found.filled(8), np.array([8, 0, 1])[labels])


def test_frames_that_refer_to_no_image_are_found_by_their_position(tmp_path):
    volume = series(tmp_path / "ct", 4)
    labels = labels_like(volume)
    labels[1] = 0  # no frame is stored for it
    path = segmentation(volume, labels, tmp_path / "seg.dcm")
    made = pydicom.dcmread(path)
    for group in made.PerFrameFunctionalGroupsSequence:
        group.pop("DerivationImageSequence", None)
    made.save_as(path)
    np.testing.assert_array_equal(read(volume, path), labels)


@pytest.mark.parametrize("make", ["series", "frames"])
def test_a_segmentation_of_numbers_by_highdicom_is_read(tmp_path, make):
    paths = scans.ct_series(tmp_path / "ct") if make == "series" else [scans.enhanced_ct(tmp_path / "a.dcm")]
    labels = labels_like(dicom(*paths))
    written = pydicom.dcmread(segmentation(dicom(*paths), labels, tmp_path / "bits.dcm"))
    made = highdicom.seg.Segmentation(
        source_images=[pydicom.dcmread(path) for path in paths],
        pixel_array=labels,
        segmentation_type=list(highdicom.seg.SegmentationTypeValues)[-1],  # of segment numbers
        segment_descriptions=[highdicom.seg.SegmentDescription.from_dataset(item) for item in written.SegmentSequence],
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="M",
        manufacturer_model_name="M",
        software_versions="1",
        device_serial_number="1",
    )
    made.save_as(tmp_path / "numbers.dcm")
    np.testing.assert_array_equal(read(dicom(*paths), tmp_path / "numbers.dcm"), labels)
    made.SegmentSequence = [item for item in made.SegmentSequence if item.SegmentNumber != 2]
    made.save_as(tmp_path / "numbers.dcm")
    assert "has pixels of segment 2, which it does not describe" in reason(dicom(*paths), tmp_path / "numbers.dcm")


def test_other_segmentations_are_refused(tmp_path):
    volume = series(tmp_path / "ct")
    labels = labels_like(volume)
    path = segmentation(volume, labels, tmp_path / "seg.dcm")
    assert "seg.dcm has a segment 'liver'; expected classes, tumour: name them" in reason(
        volume, path, classes={"tumour": 1}
    )
    other = series(tmp_path / "other", FrameOfReferenceUID=generate_uid())
    assert "has another FrameOfReferenceUID" in reason(other, path)
    assert "is not on the grid of" in reason(series(tmp_path / "far", step=2.75), path)
    assert "is not on the grid of" in reason(series(tmp_path / "wide", PixelSpacing=[0.75, 0.75]), path)
    assert "expected the size of" in reason(dicom(scans.ultrasound(tmp_path / "u.dcm")), series_of_size(tmp_path))
    assert "no DICOM; expected NIfTI masks" in reason(
        NiftiVolume(ImageSource(scans.nifti(tmp_path / "a.nii")), ReadOptions(any_range=True)), path
    )
    [image] = scans.ct_series(tmp_path / "one", 1)
    assert "is DICOM of another kind (no segmentation)" in reason(volume, image)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "seg.dcm" in reason(volume, path)
    made = pydicom.dcmread(segmentation(volume, np.ones_like(labels), path))
    made.SegmentSequence[1].SegmentLabel = "liver"
    for number, group in enumerate(made.PerFrameFunctionalGroupsSequence):
        group.PlanePositionSequence = made.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence
        group.SegmentIdentificationSequence[0].ReferencedSegmentNumber = number % 2 + 1
    made.save_as(path)
    assert "segments that overlap in slice " in reason(volume, path)


def series_of_size(folder):
    """A segmentation of a radiograph of another size."""
    made = scans.dataset("1.2.840.10008.5.1.4.1.1.1", "CR")
    scans.set_pixels(made, np.zeros((20, 30), np.uint16))
    opened = dicom(scans.save(made, folder / "small.dcm"))
    return segmentation(opened, np.ones((1, 20, 30), np.uint8), folder / "small_seg.dcm")


# --- Pairs ------------------------------------------------------------------------------------------------------------


def write_nifti_pair(images, masks, name, suffix="", mask_suffix=""):
    path = scans.nifti(images / f"{name}{suffix}.nii.gz", shape=(36, 34, 4))
    image = nibabel.load(path)
    labels = np.digitize(np.asarray(image.dataobj), (70, 140)).astype(np.uint8)
    labels[:, :, 0] = 0
    masks.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(labels, image.affine), masks / f"{name}{mask_suffix}.nii.gz")


def write_study(root):
    """Three patients for training: NIfTI, a series with NIfTI labels, a series with a segmentation; one to evaluate."""
    images, masks = root / "images", root / "masks"
    write_nifti_pair(images / "train", masks / "train", "p1")
    write_nifti_pair(images / "val", masks / "val", "p4")
    for name in ("p2", "p3"):
        paths = scans.ct_series(images / "train" / name, series=generate_uid())
        volume = dicom(*paths)
        labels = np.digitize(scans.ct_volume(), (0, 120)).astype(np.uint8)
        if name == "p2":
            nibabel.save(nibabel.Nifti1Image(labels.transpose(2, 1, 0), volume.grid()), masks / "train" / "p2.nii.gz")
        else:
            segmentation(volume, labels, masks / "train" / "p3.dcm")
    (root / "classes.json").write_text(json.dumps({"names": NAMES}))


def test_pairs_of_every_kind_are_read_slice_by_slice(tmp_path):
    write_study(tmp_path)
    rows = pair_images_and_masks(tmp_path / "images" / "train", tmp_path / "masks" / "train")
    assert rows["page"] == list(range(4)) * 3
    assert sorted({path.rsplit("/", 1)[1] for path in rows["image"]}) == ["p1.nii.gz", "p2", "p3"]
    decoded = decode_dataset(rows, 3, 3, any_range=True, names=NAMES)
    for index, row in enumerate(decoded):
        limits = ((70, 140), (0, 120), (0, 120))[index // 4]
        expected = np.digitize(row["image"][0], limits)
        np.testing.assert_array_equal(row["label"], 0 if index == 0 else expected)


def test_names_are_matched_by_suffix_or_by_folder(tmp_path):
    one = tmp_path / "one"
    for name in ("a", "b"):
        write_nifti_pair(one / name, one / name, name, "_ct", "_seg")
    rows = pair_images_and_masks(one, one, "_ct", "_seg")
    assert [path.rsplit("/", 1)[1] for path in rows["label"]] == ["a_seg.nii.gz"] * 4 + ["b_seg.nii.gz"] * 4
    for name in ("a", "b"):
        write_nifti_pair(tmp_path / "images" / name, tmp_path / "masks" / name, "x", "_ct", "_seg")
    rows = pair_images_and_masks(tmp_path / "images", tmp_path / "masks")
    assert len(rows) == 8
    assert rows["label"][4].endswith("masks/b/x_seg.nii.gz")


def test_volumes_of_linked_folders_are_paired(tmp_path):
    write_study(tmp_path / "away")
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "linked").symlink_to(f"../away/{kind}/train")
    rows = pair_images_and_masks(tmp_path / "images", tmp_path / "masks")
    assert rows["page"] == list(range(4)) * 3
    assert rows["image"][4] == str(tmp_path / "images" / "linked" / "p2")  # a series


def test_a_suffix_that_is_the_whole_name_leaves_the_folder(tmp_path):
    """The usual layout of one folder for each patient: p1/image.nii.gz beside p1/mask.nii.gz."""
    for name in ("p1", "p2"):
        write_nifti_pair(tmp_path / name, tmp_path / name, "", "image", "mask")
    rows = pair_images_and_masks(tmp_path, tmp_path, "image", "mask")
    for column, name in (("image", "image"), ("label", "mask")):
        assert rows[column] == [str(tmp_path / each / f"{name}.nii.gz") for each in ("p1", "p2") for _ in range(4)]
    assert rows["page"] == [0, 1, 2, 3] * 2
    (tmp_path / "p2" / "mask.nii.gz").unlink()
    wanted = re.escape(f"{tmp_path}/p2/image.nii.gz has no mask; expected {tmp_path}/p2/mask.nii.gz") + "$"
    with pytest.raises(ValueError, match=wanted):
        pair_images_and_masks(tmp_path, tmp_path, "image", "mask")
    with pytest.raises(
        ValueError, match=r"holds no volumes whose names begin with 'x' and end in '_ct'; expected some"
    ):
        pair_images_and_masks(tmp_path, tmp_path, "_ct", "_seg", image_prefix="x")
    with pytest.raises(ValueError, match=r"holds no volumes whose names end in 'image'"):  # nothing names the pair
        pair_images_and_masks(tmp_path / "p1", tmp_path / "p1", "image", "mask")


def test_the_name_that_a_missing_partner_would_have_is_named(tmp_path):
    images, masks = tmp_path / "a", tmp_path / "b"
    for name in ("p1", "s/p2"):
        write_nifti_pair((images / name).parent, (masks / name).parent, Path(name).name, "_ct", "_seg")
    (masks / "s" / "p2_seg.nii.gz").rename(tmp_path / "kept.nii.gz")
    for mask_suffix in ("_seg", "_seg.nii.gz"):
        with pytest.raises(ValueError, match=re.escape(f"p2_ct.nii.gz has no mask; expected {masks}/s/p2_seg.nii.gz")):
            pair_images_and_masks(images, masks, "_ct", mask_suffix)
    (tmp_path / "kept.nii.gz").rename(masks / "p0_seg.nii.gz")
    with pytest.raises(ValueError, match=re.escape(f"p0_seg.nii.gz has no volume; expected {images}/p0_ct.nii.gz; ")):
        pair_images_and_masks(images, masks, "_ct", "_seg")
    for name in ("q1", "q2"):
        write_nifti_pair(tmp_path / "c" / name, tmp_path / "d" / name, "x", "_ct", "_seg")
    (tmp_path / "d/q2/x_seg.nii.gz").unlink()
    with pytest.raises(ValueError, match=re.escape(f"x_ct.nii.gz has no mask; expected one in {tmp_path}/d/q2")):
        pair_images_and_masks(tmp_path / "c", tmp_path / "d")


def test_a_radiograph_has_an_ordinary_mask(tmp_path):
    scans.xray(tmp_path / "images" / "a.dcm")
    (tmp_path / "masks").mkdir()
    Image.new("L", (44, 36), 1).save(tmp_path / "masks" / "a.png")
    [row] = decode_dataset(pair_images_and_masks(tmp_path / "images", tmp_path / "masks"), 3, 2, any_range=True)
    assert row["image"].shape == (1, 36, 44)
    assert (row["label"] == 1).all()


def test_what_does_not_pair_is_named(tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    write_nifti_pair(images, masks, "a")
    (masks / "a.nii.gz").rename(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"a\.nii\.gz has no mask; expected .*masks/a\.nii\.gz"):
        pair_images_and_masks(images, masks)
    (tmp_path / "kept").rename(masks / "b.nii.gz")
    with pytest.raises(ValueError, match=r"a\.nii\.gz has no mask; .*nor has b a partner"):
        pair_images_and_masks(images, masks)
    (masks / "b.nii.gz").rename(masks / "a.nii.gz")
    with pytest.raises(ValueError, match="holds volumes, of which each slice is taken"):
        pair_images_and_masks(images, masks, pages=True)
    Image.new("L", (9, 9)).save(images / "photo.png")
    with pytest.raises(ValueError, match=r"holds volumes, and images such as .*photo\.png; expected one kind"):
        pair_images_and_masks(images, masks)
    (images / "photo.png").unlink()
    scans.ct_series(images)
    with pytest.raises(ValueError, match="holds the files of 1 series; expected a folder for each series"):
        pair_images_and_masks(images, masks)
    Image.new("L", (36, 34)).save(masks / "a.png")
    (masks / "a.nii.gz").unlink()
    for path in images.glob("*.dcm"):
        path.unlink()
    with pytest.raises(ValueError, match=r"a\.png is one image, but .*a\.nii\.gz holds 4 slices"):
        decode_dataset(pair_images_and_masks(images, masks), 3, 2, any_range=True)[0]


# --- Training and evaluation ------------------------------------------------------------------------------------------


def data_config(root, **settings):
    return DataConfig("folders", str(root), value_range="window:60,400", **settings)


def test_volumes_are_never_divided_between_training_and_evaluation(tmp_path):
    for number in range(6):
        write_nifti_pair(tmp_path / "images" / "train", tmp_path / "masks" / "train", f"patient{number // 2}_{number}")
    (tmp_path / "classes.json").write_text(json.dumps({"names": NAMES}))
    data = load_data(data_config(tmp_path, eval_share=0.3))
    sides = [{*side.with_format(None)["image"]} for side in (data.train, data.evaluation)]
    assert sides[0].isdisjoint(sides[1])
    assert (len(data.train), len(data.evaluation)) == (16, 8)
    data = load_data(data_config(tmp_path, eval_share=0.3), split=SplitConfig(group=r"(patient\d)"))
    patients = [
        {path.split("patient")[1][0] for path in side.with_format(None)["image"]}
        for side in (data.train, data.evaluation)
    ]
    assert patients[0].isdisjoint(patients[1])


def test_the_settings_of_the_guide_hold_patients_out(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/guides/medical.md").read_text().replace("\\\n", " ")
    [command] = re.findall(r"^segformer train (.*)$", page, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    for name in ("patient01_a", "patient01_b", "patient02_a", "patient03_a", "patient04_a"):
        write_nifti_pair(Path("study/images"), Path("study/masks"), name)
    Path("study/classes.json").write_text(json.dumps({"names": NAMES}))
    recipe, *settings = shlex.split(command)
    recipe = read_recipe(recipe, settings)
    data = load_data(recipe.data, split=recipe.split)
    patients = [
        {re.search(r"patient\d+", path)[0] for path in side["image"]}
        for side in (data.train.with_format(None), data.evaluation.with_format(None))
    ]
    assert sorted(patients[0] | patients[1]) == ["patient01", "patient02", "patient03", "patient04"]
    assert patients[0].isdisjoint(patients[1])
    assert data.processor.value_range == {"center": 40, "width": 400}


def test_slices_of_background_are_capped(tmp_path):
    write_study(tmp_path)
    rows = load_data(data_config(tmp_path)).train
    empty = [index for index, row in enumerate(rows) if not row["label"].any()]
    assert len(empty) == 1  # of 12
    assert len(load_data(data_config(tmp_path, max_background=0.1)).train) == 12
    data = load_data(data_config(tmp_path, max_background=0.05))
    assert all(row["label"].any() for row in data.train)
    assert (len(data.train), len(data.evaluation)) == (11, 4)  # all slices are evaluated
    with pytest.raises(ValueError, match=r"data.max_background is 2; expected a share in \[0, 1\]"):
        data_config(tmp_path, max_background=2)
    with pytest.raises(ValueError, match="max_background is set for shapes, whose images are all taken: leave it out"):
        DataConfig("shapes", num_train=1, num_eval=1, max_background=0.5)


@pytest.mark.slow
def test_a_recipe_trains_and_evaluates_on_scans_and_names_nobody(tmp_path, capfd):
    write_study(tmp_path / "data")
    out = tmp_path / "run"
    overrides = [
        *(
            "data.source=folders",
            f"data.root={tmp_path / 'data'}",
            "data.value_range=window:60,400",
            "data.num_train=0",
        ),
        *("data.num_eval=0", "trainer.max_steps=3", f"trainer.output_dir={out}", "augmentation.crop_size=32"),
        *("model.hidden_sizes=[8,8,16,16]", "model.depths=[1,1,1,1]", "model.num_attention_heads=[1,1,2,2]"),
        "model.decoder_hidden_size=16",
    ]
    assert run("train", "shapes_b0", *overrides) == 0
    folders = ["--images", tmp_path / "data" / "images" / "val", "--masks", tmp_path / "data" / "masks" / "val"]
    assert run("evaluate", out, *folders, "-o", tmp_path / "report", "--device", "cpu") == 0
    printed = capfd.readouterr()
    assert "SECRET" not in printed.out + printed.err
    for folder in (out, tmp_path / "report"):
        for path in folder.rglob("*"):
            if path.is_file():
                assert b"SECRET" not in path.read_bytes(), path
    with (tmp_path / "report" / "per_image.csv").open() as file:
        names = [row["image"] for row in csv.DictReader(file)]
    assert names == [f"p4_p{number:03d}.nii.gz" for number in range(1, 5)]
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["intervals"] == {}  # one volume does not show how others vary, however many slices it has


def test_models_are_compared_by_volumes(tmp_path, capsys):
    write_study(tmp_path)
    for name in ("a", "b"):
        lively(num_labels=3, id2label=dict(enumerate(NAMES))).save_pretrained(tmp_path / name)
        SegFormerImageProcessor(do_resize=False).save_pretrained(tmp_path / name)
    folders = ["--images", tmp_path / "images" / "train", "--masks", tmp_path / "masks" / "train", "--device", "cpu"]
    command = ["compare", tmp_path / "a", tmp_path / "b", *folders, "--value-range=window:60,400", "--resamples", 200]
    assert run(*command) == 0
    assert "paired bootstrap over groups" in capsys.readouterr().out
    single = [str(each).replace("train", "val") for each in command]
    assert run(*single) == 1
    assert "slices of one volume, which cannot show how models differ on other volumes" in capsys.readouterr().err
    assert run(*single, "--group", ".+") == 0
    assert "4 images" in capsys.readouterr().out


def test_evaluation_counts_every_slice_of_every_volume(tmp_path, capsys):
    write_study(tmp_path)
    model = lively(num_labels=3, id2label=dict(enumerate(NAMES)))
    model.save_pretrained(tmp_path / "model")
    SegFormerImageProcessor(do_resize=False).save_pretrained(tmp_path / "model")
    folders = ["--images", tmp_path / "images" / "train", "--masks", tmp_path / "masks" / "train"]
    assert run("evaluate", tmp_path / "model", *folders, "--value-range=window:60,400", "--device", "cpu") == 0
    rows = pair_images_and_masks(tmp_path / "images" / "train", tmp_path / "masks" / "train")
    labels = [row["label"] for row in decode_dataset(rows, 3, 3, any_range=True, names=NAMES)]
    share = np.concatenate([each.ravel() for each in labels]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "background" in line]
    assert line.split()[-1] == f"{100 * share.mean():.1f}"
    assert run("evaluate", tmp_path / "model", *folders, "--device", "cpu") == 1
    assert "holds values in units of its own" in capsys.readouterr().err
