"""NIfTI against nibabel: slices along each axis, scale, spacing, label volumes, refusals."""

import gzip
import struct

import numpy as np
import pytest

pytest.importorskip("nibabel")

import nibabel

from hf_segformer.data.reader_protocol import ImageSource, ReadOptions
from hf_segformer.data.readers import kind_of, open_image, read_whole_mask, without_suffix
from hf_segformer.inference.tiling import MaskLayout
from hf_segformer.medical import nifti
from hf_segformer.medical.nifti import NiftiVolume
from tests.support import scans

LAYOUT = MaskLayout(np.uint8, 255, [(0, 0, 0)] * 3, ["background", "liver", "lesion"])


def volume(path, **options):
    return NiftiVolume(ImageSource(str(path)), ReadOptions(**{"any_range": True, **options}))


def message(path, **options):
    with pytest.raises((ValueError, OSError)) as caught:
        volume(path, **options).slice(0)
    text = str(caught.value)
    assert "\n" not in text
    assert path.name in text
    assert "SECRET" not in text
    return text


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_slices_are_those_of_nibabel(tmp_path, axis, name):
    path = scans.nifti(tmp_path / name, version=2 if axis == 1 else 1)
    opened, expected = volume(path, axis=axis), nibabel.load(path).get_fdata()
    cut = 2 if axis is None else axis
    assert opened.num_slices == expected.shape[cut]
    for index in range(opened.num_slices):
        np.testing.assert_array_equal(opened.slice(index)[0], np.take(expected, index, cut).T)
    zooms = nibabel.affines.voxel_sizes(nibabel.load(path).affine)
    others = [each for each in range(3) if each != cut]
    assert opened.spacing == pytest.approx((zooms[cut], zooms[others[1]], zooms[others[0]]), rel=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, ">i2", np.int32, np.uint16, np.float32, np.float64, np.int64])
def test_types_and_scale(tmp_path, dtype):
    values = (np.arange(24 * 20 * 3).reshape(24, 20, 3) % 120).astype(dtype)
    image = nibabel.Nifti1Image(values, np.eye(4), dtype=values.dtype)
    image.header.set_slope_inter(2.5, -7)
    if np.dtype(dtype).byteorder == ">":
        image = image.as_byteswapped() if hasattr(image, "as_byteswapped") else image
    nibabel.save(image, tmp_path / "a.nii")
    expected = nibabel.load(tmp_path / "a.nii").get_fdata()
    opened = volume(tmp_path / "a.nii")
    for index in range(3):
        np.testing.assert_allclose(opened.slice(index)[0], expected[:, :, index].T, rtol=1e-6)


def test_bytes_need_no_value_range_and_others_do(tmp_path):
    assert volume(scans.nifti(tmp_path / "a.nii", np.uint8), any_range=False).slice(0).dtype == np.uint8
    assert "expected a value range" in message(scans.nifti(tmp_path / "b.nii"), any_range=False)


def test_the_window_is_that_of_the_header(tmp_path):
    path = scans.nifti(tmp_path / "a.nii", np.float32, cal_min=50, cal_max=150)
    stored = nibabel.load(path).get_fdata()[:, :, 1].T
    shown = volume(path, window=True, any_range=False).slice(1)[0]
    np.testing.assert_array_equal(shown, np.rint(np.clip((stored - 50) * 2.55, 0, 255)))
    assert "states no window" in message(scans.nifti(tmp_path / "b.nii"), window=True)


def test_values_that_are_no_numbers_are_no_data(tmp_path):
    values = np.ones((24, 20, 2), np.float32)
    values[3, 4, 1] = np.nan
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii")
    opened = volume(tmp_path / "a.nii")
    assert opened.may_lack_data
    assert not np.ma.isMaskedArray(opened.slice(0))
    assert np.argwhere(np.ma.getmaskarray(opened.slice(1))[0]).tolist() == [[4, 3]]


def test_units_of_space(tmp_path):
    for unit, factor in (("mm", 1), ("micron", 1e-3), ("meter", 1e3), ("unknown", 1)):
        image = nibabel.Nifti1Image(np.zeros((5, 6, 7), np.uint8), np.diag([2, 3, 4, 1]))
        image.header.set_xyzt_units(unit)
        nibabel.save(image, tmp_path / "a.nii")
        assert volume(tmp_path / "a.nii").spacing == pytest.approx((4 * factor, 3 * factor, 2 * factor))
    sheared = np.diag([2.0, 3, 4, 1])
    sheared[0, 1] = 1
    nibabel.save(nibabel.Nifti1Image(np.zeros((5, 6, 7), np.uint8), sheared), tmp_path / "s.nii")
    assert volume(tmp_path / "s.nii").spacing == (None, None, None)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("version", [1, 2])
def test_label_volumes_lie_where_their_images_do(tmp_path, axis, name, version):
    path = scans.nifti(tmp_path / name, version=version)
    opened, source = volume(path, axis=axis), nibabel.load(path)
    assert opened.mask_suffix == name[1:]
    shape = (opened.num_slices, opened.height, opened.width)
    labels = np.random.default_rng(axis).integers(0, 3, shape, dtype=np.uint8)
    opened.write(tmp_path / f"mask{name[1:]}", iter(labels), LAYOUT)
    found = nibabel.load(tmp_path / f"mask{name[1:]}")
    assert (found.shape, found.get_data_dtype()) == (source.shape, np.uint8)
    for index in range(opened.num_slices):
        np.testing.assert_array_equal(np.take(np.asarray(found.dataobj), index, axis).T, labels[index])
    np.testing.assert_array_equal(found.affine, source.affine)
    for field in ("qform_code", "sform_code", "pixdim", "xyzt_units", "quatern_b", "qoffset_x", "srow_y"):
        np.testing.assert_array_equal(found.header[field], source.header[field])
    assert found.header.get_intent()[0] == "label"
    assert nibabel.aff2axcodes(found.affine) == nibabel.aff2axcodes(source.affine)
    content = (tmp_path / f"mask{name[1:]}").read_bytes()
    assert b"SECRET" not in (gzip.decompress(content) if name.endswith("gz") else content)


def test_a_mask_is_read_as_whole_numbers(tmp_path):
    values = np.zeros((24, 20, 1), np.float32)
    values[2:5, 3] = 2
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(read_whole_mask(tmp_path / "mask.nii.gz"), values[:, :, 0].T)
    nibabel.save(nibabel.Nifti1Image(values + 0.5, np.eye(4)), tmp_path / "half.nii.gz")
    with pytest.raises(ValueError, match="no whole numbers"):
        read_whole_mask(tmp_path / "half.nii.gz")


def test_shapes(tmp_path):
    for shape in ((12, 10), (12, 10, 3), (12, 10, 3, 1), (12, 10, 1, 1, 1)):
        nibabel.save(nibabel.Nifti1Image(np.zeros(shape, np.uint8), np.eye(4)), tmp_path / "a.nii")
        opened = volume(tmp_path / "a.nii")
        assert opened.num_slices == (shape[2] if len(shape) > 2 else 1)
        opened.write(tmp_path / "m.nii", iter(np.zeros((opened.num_slices, 10, 12), np.uint8)), LAYOUT)
        assert nibabel.load(tmp_path / "m.nii").shape == shape
    path = scans.nifti(tmp_path / "4d.nii.gz", shape=(12, 10, 3, 5))
    assert "holds 5 volumes (12x10x3x5); expected one" in message(path)


def test_slices_as_images(tmp_path):
    path = scans.nifti(tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match="holds 4 slices; expected one image"):
        open_image(path, any_range=True).image()
    image = open_image(path, any_range=True, page=2).image()
    np.testing.assert_array_equal(image[0], nibabel.load(path).get_fdata()[:, :, 2].T)
    assert NiftiVolume.count(ImageSource(str(path))) == 4
    assert without_suffix("x/a.nii.gz") == "x/a"


def test_nifti_is_known_by_content(tmp_path):
    path = scans.nifti(tmp_path / "a.nii.gz").rename(tmp_path / "scan")
    assert kind_of(path) == "volume"
    opened = NiftiVolume(ImageSource(path.read_bytes(), "row"), ReadOptions(any_range=True))
    assert opened.slice(3).shape == (1, 36, 44)
    (tmp_path / "photo.gz").write_bytes(gzip.compress(b"no volume" * 99))
    assert kind_of(tmp_path / "photo.gz") == "image"


# --- Bad files --------------------------------------------------------------------------------------------------------


def test_damaged_headers_are_refused(tmp_path):
    path = scans.nifti(tmp_path / "a.nii")
    whole = path.read_bytes()

    def patched(offset, layout, *values):
        size = struct.calcsize(layout)
        path.write_bytes(whole[:offset] + struct.pack(layout, *values) + whole[offset + size :])
        return path

    assert "expected 1 to 7 of at least 1" in message(patched(40, "<h", 9))
    assert "expected 1 to 7 of at least 1" in message(patched(42, "<h", -3))
    assert "32767x32767 (height x width)" in message(patched(40, "<4h", 3, 32767, 32767, 1))
    assert "voxels" in message(patched(40, "<4h", 3, 9000, 9000, 32767))
    assert "data type 128" in message(patched(70, "<h", 128))
    assert "has its voxels at byte nan" in message(patched(108, "<f", float("nan")))
    assert "sform_code [0, -9]" in message(patched(252, "<2h", 0, -9))
    assert "is the header of a pair of files" in message(patched(344, "4s", b"ni1\0"))
    assert "is cut short: it holds" in message(patched(40, "<4h", 3, 44, 36, 400))
    path.write_bytes(whole[:-5])
    assert "is cut short: it holds" in message(path)
    path.write_bytes(b"")
    assert "is no NIfTI file, or cut short" in message(path)


def test_packed_files_are_unpacked_as_far_as_their_header_says(tmp_path, monkeypatch):
    path = scans.nifti(tmp_path / "a.nii.gz")
    plain = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(plain[:-100]))
    assert "100 of" in message(path)
    path.write_bytes(gzip.compress(plain)[:-200])
    assert "cut short" in message(path)
    path.write_bytes(gzip.compress(plain)[:-8] + bytes(8))  # a wrong checksum
    assert "CRC" in message(path)
    path.write_bytes(gzip.compress(plain + bytes(50 << 20)))
    assert "has data after its voxels" in message(path)
    huge = plain[:40] + struct.pack("<4h", 3, 1000, 1000, 1000) + plain[48:]
    path.write_bytes(gzip.compress(huge))
    assert "packed bytes cannot hold" in message(path)
    monkeypatch.setattr(nifti.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    path.write_bytes(gzip.compress(plain))
    assert "where 10 are free" in message(path)


def test_an_axis_that_does_not_exist_is_refused(tmp_path):
    assert "expected an axis from 1 to 3" in message(scans.nifti(tmp_path / "a.nii"), axis=3)


def test_what_is_missing_is_named_with_its_extra(tmp_path, monkeypatch):
    path = scans.nifti(tmp_path / "a.nii.gz")
    monkeypatch.setitem(__import__("sys").modules, "nibabel", None)
    assert "is a NIfTI file, which needs nibabel: pip install 'hf-segformer[medical]'" in message(path)
