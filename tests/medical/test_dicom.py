"""DICOM against highdicom's own reader: pixels in units and windows, order of slices, segmentations, refusals."""

import re

import numpy as np
import pytest

pytest.importorskip("highdicom")

import highdicom
import pydicom
from pydicom import Dataset
from pydicom.uid import RLELossless, generate_uid

from hf_segformer.data.reader_protocol import ImageSource, ReadOptions
from hf_segformer.data.readers import count_pages, kind_of, open_image, read_whole_image
from hf_segformer.inference.tiling import MaskLayout
from hf_segformer.medical.dicom import DicomVolume
from hf_segformer.medical.volumes import decode_errors, describe
from tests.support import scans

LAYOUT = MaskLayout(np.uint8, 255, [(0, 0, 0), (255, 0, 0), (0, 128, 255)], ["Background", "liver", "lesion\\=1"])


def volume(*paths, **options):
    source = ImageSource(str(paths[0]), files=[str(path) for path in paths] if len(paths) > 1 else ())
    return DicomVolume(source, ReadOptions(**{"any_range": True, **options}))


def pixels(opened):
    return np.stack([opened.slice(index) for index in range(opened.num_slices)])


def message(*paths, read=True, **options):
    with pytest.raises((ValueError, OSError)) as caught:
        pixels(volume(*paths, **options)) if read else volume(*paths, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert "SECRET" not in text
    return text


# --- Pixels -----------------------------------------------------------------------------------------------------------


def test_a_series_is_ordered_by_position_in_hounsfield_units(tmp_path):
    paths = scans.ct_series(tmp_path)
    assert [path.name for path in paths] != sorted(path.name for path in paths)
    opened = volume(*sorted(paths))
    np.testing.assert_array_equal(pixels(opened)[:, 0], scans.ct_volume())
    assert opened.spacing == pytest.approx((2.5, 0.75, 0.5))
    assert (opened.kind, opened.height, opened.width, opened.num_bands, opened.nodata) == ("volume", 36, 44, 1, (None,))
    expected = highdicom.get_volume_from_series([pydicom.dcmread(path) for path in paths])
    assert expected.spacing == pytest.approx(opened.spacing)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_the_window_of_the_tags_is_that_of_highdicom(tmp_path, function):
    [path] = scans.ct_series(tmp_path, 1, VOILUTFunction=function, WindowWidth=400, WindowCenter=90)
    shown = volume(path, window=True, any_range=False).slice(0)[0]
    assert shown.dtype == np.uint8
    expected = highdicom.imread(path).get_frame(1, apply_voi_transform=True, voi_output_range=(0, 255))
    assert np.abs(shown - expected).max() <= 0.5 + 1e-6
    assert len(np.unique(shown)) > 20


def test_a_table_is_used_where_there_is_no_window(tmp_path):
    table = Dataset()
    values = (np.arange(600) ** 2 // 700).astype("<u2")
    table.LUTDescriptor, table.LUTData = [600, 50, 10], values.tobytes()
    path = scans.xray(tmp_path / "x.dcm", "MONOCHROME2", WindowCenter=None, WindowWidth=None, VOILUTSequence=[table])
    shown = volume(path, window=True).slice(0)[0]
    stored = pydicom.dcmread(path).pixel_array.astype(int)
    expected = values.astype(float)[np.clip(stored - 50, 0, 599)] * 255 / 1023
    assert np.abs(shown - expected).max() <= 0.5


def test_transforms_of_each_frame_of_a_multi_frame_file(tmp_path):
    path = scans.enhanced_ct(tmp_path / "e.dcm")
    opened, expected = volume(path), highdicom.imread(path)
    for index in range(3):
        np.testing.assert_array_equal(opened.slice(index)[0], expected.get_frame(index + 1))
    shown = volume(path, window=True).slice(2)[0]
    windowed = expected.get_frame(3, apply_voi_transform=True, voi_output_range=(0, 255))
    assert np.abs(shown - windowed).max() <= 0.5 + 1e-6
    assert opened.spacing == pytest.approx((2.5, 0.75, 0.5))


def test_monochrome1_is_inverted(tmp_path):
    stored = pydicom.dcmread(scans.xray(tmp_path / "x.dcm")).pixel_array
    np.testing.assert_array_equal(volume(tmp_path / "x.dcm").slice(0)[0], 1023.0 - stored)
    shown = volume(tmp_path / "x.dcm", window=True).slice(0)[0]
    plain = volume(scans.xray(tmp_path / "y.dcm", "MONOCHROME2"), window=True).slice(0)[0]
    np.testing.assert_array_equal(shown, 255 - plain)
    expected = highdicom.imread(tmp_path / "x.dcm").get_frame(1, apply_voi_transform=True, voi_output_range=(0, 255))
    assert np.abs(shown - expected).max() <= 0.5 + 1e-6


def test_colours_and_bytes_need_no_value_range(tmp_path):
    path = scans.ultrasound(tmp_path / "u.dcm")
    colors = volume(path, any_range=False).slice(0)
    np.testing.assert_array_equal(np.moveaxis(colors, 0, -1), pydicom.dcmread(path).pixel_array)
    assert read_whole_image(path, 3).shape == (3, 36, 44)
    assert open_image(path, bands=[2], num_channels=1).image().shape == (1, 36, 44)


def test_bytes_are_units_where_any_slice_has_others(tmp_path):
    paths = scans.ct_series(tmp_path / "ct", 3)
    for index, (path, slope) in enumerate(zip(paths, (1, 2.5, 1), strict=True)):
        made = pydicom.dcmread(path)
        made.RescaleSlope, made.RescaleIntercept = slope, 0
        pixels = np.full((36, 44), 200, np.uint8) if index < 2 else np.full((36, 44), 2000, np.uint16)
        scans.set_pixels(made, pixels)
        made.save_as(path)
    for number, expected in ((1, [200]), (2, [200, 500]), (3, [200, 500, 2000])):
        opened = volume(*paths[:number])
        assert [opened.slice(index).max() for index in range(number)] == expected
        assert opened.dtype == (np.uint8 if number == 1 else np.float32)


def test_values_in_units_need_a_value_range(tmp_path):
    [path] = scans.ct_series(tmp_path, 1)
    text = message(path, any_range=False)
    assert "from -1000 to" in text
    assert "--value-range LOW,HIGH or window:CENTER,WIDTH" in text
    assert volume(path, any_range=False, num_channels=1).slice(0).dtype == np.float32  # measurements


def test_run_length_encoding_is_decoded_and_other_syntaxes_are_named(tmp_path):
    [path] = scans.ct_series(tmp_path, 1)
    plain = pixels(volume(path))
    packed = pydicom.dcmread(path)
    packed.compress(RLELossless)
    packed.save_as(tmp_path / "rle.dcm")
    np.testing.assert_array_equal(pixels(volume(tmp_path / "rle.dcm")), plain)
    made = pydicom.dcmread(path)
    for syntax, name in (("1.2.840.10008.1.2.4.57", "JPEG Lossless"), ("1.2.840.10008.1.2.4.102", "MPEG-4")):
        made.file_meta.TransferSyntaxUID = syntax
        made["PixelData"].is_undefined_length = True
        made.PixelData = pydicom.encaps.encapsulate([b"1234"])
        made.save_as(tmp_path / "other.dcm")
        text = message(tmp_path / "other.dcm")
        assert name in text
        assert "decompress it first" in text


# --- What does not make up one volume ---------------------------------------------------------------------------------


def test_series_of_a_folder_are_told_apart_and_named(tmp_path):
    first = scans.ct_series(tmp_path, 3)
    [single] = scans.ct_series(tmp_path / "one", 1, SeriesNumber=9)
    struct, many = scans.rt_struct(tmp_path / "rs.dcm"), scans.enhanced_ct(tmp_path / "e.dcm")
    every = [str(each) for each in (*first, single, struct, many)]
    groups, dropped = DicomVolume.gather(every)
    assert groups == {"": tuple(map(str, first))}
    assert dropped == [str(struct)]
    second = scans.ct_series(tmp_path / "two", 2, SeriesNumber=5)
    groups, _ = DicomVolume.gather([*every, *map(str, second)])
    assert groups == {"series_3": tuple(map(str, first)), "series_5": tuple(map(str, second))}
    third = scans.ct_series(tmp_path / "three", 2, SeriesNumber=5, series="1.2.3")
    groups, _ = DicomVolume.gather([*every, *map(str, second), *map(str, third)])
    assert set(groups) == {"series_3", f"series_{pydicom.dcmread(second[0]).SeriesInstanceUID}", "series_1.2.3"}


def changed(path, **tags):
    made = pydicom.dcmread(path)
    for name, value in tags.items():
        if value is None:
            delattr(made, name)
        else:
            setattr(made, name, value)
    made.save_as(path)


def test_a_mixed_series_is_refused(tmp_path):
    paths = scans.ct_series(tmp_path)
    other = scans.ct_series(tmp_path / "other", 2)
    assert "SeriesInstanceUID" in message(*paths, other[0])
    for tags, reason in (
        ({"PixelSpacing": None}, "PixelSpacing"),
        ({"ImagePositionPatient": None}, "ImagePositionPatient"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}, "not parallel"),
        ({"FrameOfReferenceUID": generate_uid()}, "FrameOfReferenceUID"),
        ({"PixelSpacing": [0.7, 0.5]}, "PixelSpacing"),
        ({"ImagePositionPatient": pydicom.dcmread(paths[0]).ImagePositionPatient}, "at one position"),
    ):
        folder = tmp_path / reason
        copies = scans.ct_series(folder)
        for number, path in enumerate(copies):
            path.write_bytes(paths[number].read_bytes())
        changed(copies[2], **tags)
        assert reason in message(*copies), tags


def test_a_missing_slice_is_found_by_its_gap(tmp_path):
    paths = scans.ct_series(tmp_path, 5)
    assert "its slices are 2.5 to 5 mm apart" in message(*paths[:2], *paths[3:])
    assert volume(*paths[1:4]).num_slices == 3
    path = scans.enhanced_ct(tmp_path / "e.dcm", places=[0, 2.5, 7.5])
    assert "2.5 to 5 mm apart" in message(path)


def test_slices_that_make_up_no_volume_are_images_by_position(tmp_path):
    gap = scans.ct_series(tmp_path / "gap", 5)
    phases = scans.ct_series(tmp_path / "phases", 2) + scans.ct_series(tmp_path / "phases2", 2)
    for path in phases:
        changed(path, SeriesInstanceUID="1.2.3")
    bare = scans.ct_series(tmp_path / "bare", 2)
    for path in bare:
        changed(path, PixelSpacing=None)
    cases = {"mm apart": gap[:2] + gap[3:], "at one position": phases, "some have no PixelSpacing": bare}
    for reason, paths in cases.items():
        assert re.search(f"{reason}.*predict them as separate images \\(--pages\\)", message(*paths))
        source = ImageSource(paths[0], files=[str(path) for path in sorted(paths)])
        assert count_pages(source) == len(paths)
    expected = scans.ct_volume(5)[[0, 1, 3, 4]]
    shown = [volume(*sorted(cases["mm apart"]), page=page).image()[0] for page in range(4)]
    np.testing.assert_array_equal(shown, expected)
    frames = scans.enhanced_ct(tmp_path / "e.dcm", places=[2.5, 0, 2.5])
    assert "at one position" in message(frames)
    assert [volume(frames, page=page).place_of(page).frame for page in range(3)] == [2, 1, 3]


def test_one_slice_of_several_is_an_image_by_its_page(tmp_path):
    path = scans.enhanced_ct(tmp_path / "e.dcm")
    with pytest.raises(ValueError, match="holds 3 slices; expected one image"):
        volume(path).image()
    np.testing.assert_array_equal(volume(path, page=1).image(), volume(path).slice(1))
    with pytest.raises(ValueError, match="has no slice 4; expected at most 3"):
        volume(path, page=3).image()


# --- Bad files --------------------------------------------------------------------------------------------------------


def test_files_that_are_no_images_are_named(tmp_path):
    assert "holds no pixels (RT Structure Set Storage)" in message(scans.rt_struct(tmp_path / "rs.dcm"))
    (tmp_path / "text.dcm").write_text("no scan")
    assert "text.dcm is no DICOM file" in message(tmp_path / "text.dcm")
    (tmp_path / "empty.dcm").touch()
    assert "empty.dcm is no DICOM file" in message(tmp_path / "empty.dcm")
    [path] = scans.ct_series(tmp_path / "cut", 1)
    path.write_bytes(path.read_bytes()[:-700])
    assert "slice 1 is cut short, damaged or unusual" in message(path)
    [path] = scans.ct_series(tmp_path / "none", 1)
    changed(path, PixelData=None)
    assert str(path) in message(path)


def test_damaged_fields_give_short_messages(tmp_path):
    [path] = scans.ct_series(tmp_path, 1)
    content = path.read_bytes()
    group_length = content.index(b"\x02\0\0\0UL") + 6
    path.write_bytes(content[:group_length] + b"\x06" + content[group_length + 1 :])
    assert "is no DICOM file, or cut short" in message(path, read=False)
    path.write_bytes(content)
    changed(path, BitsAllocated=[16] * 3000)
    assert len(message(path, read=False)) < 300


def overwrite(path, old, new):
    content = path.read_bytes()
    assert (content.count(old), len(old)) == (1, len(new))
    path.write_bytes(content.replace(old, new))


@pytest.mark.parametrize(
    ("tag", "value", "place"), [("RescaleSlope", 1.234567, ", slice 1"), ("PixelSpacing", [0.765432, 0.5], "")]
)
def test_fields_that_a_name_has_overwritten_are_not_quoted(tmp_path, tag, value, place):
    [path] = scans.ct_series(tmp_path, 1)
    changed(path, **{tag: value})
    overwrite(path, str(value if tag == "RescaleSlope" else value[0]).encode(), b"DOE^JOHN")
    assert message(path) == f"{path}{place} is cut short, damaged or unusual: ValueError"


def test_tags_are_shown_without_control_characters(tmp_path):
    paths = scans.ct_series(tmp_path)
    changed(paths[1], FrameOfReferenceUID="1.2.3.4567.89")
    overwrite(paths[1], b"1.2.3.4567.89", b"1.2.3.\x1b[31m\n.")
    expected = r"FrameOfReferenceUID 1.2.3.\x1b[31m\n.; expected "
    assert message(*paths).startswith(f"{paths[1]} has {expected}")


def test_errors_that_quote_the_bytes_of_a_file_are_named_by_their_kind():
    error = pydicom.errors.BytesLengthException("Instead received b'SECRETCOMMENT'")
    assert isinstance(error, decode_errors())
    assert describe(error) == "BytesLengthException"
    assert describe(ValueError("two\nlines")) == "two lines"


def test_sizes_are_checked_before_pixels_are_read(tmp_path):
    [path] = scans.ct_series(tmp_path, 1)
    changed(path, Rows=60000, Columns=60000)
    assert "60000x60000" in message(path, read=False)
    path = scans.enhanced_ct(tmp_path / "e.dcm")
    changed(path, NumberOfFrames=2**30)
    assert "slices of 36x44" in message(path, read=False)


def test_a_file_that_is_packed_as_a_whole_is_refused_unread(tmp_path, monkeypatch):
    made = pydicom.dcmread(scans.ct_series(tmp_path, 1)[0])
    made.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    made.save_as(tmp_path / "packed.dcm")
    monkeypatch.setattr("zlib.decompress", lambda *_, **__: pytest.fail("was unpacked"))
    assert "is deflated as a whole" in message(tmp_path / "packed.dcm")


def test_an_axis_is_refused(tmp_path):
    assert "leave --axis out" in message(*scans.ct_series(tmp_path), axis=1)


def test_dicom_is_known_by_content(tmp_path):
    [path] = scans.ct_series(tmp_path, 1)
    bare = path.rename(tmp_path / "IM0001")
    assert kind_of(bare) == "volume"
    assert kind_of(ImageSource(bare.read_bytes(), "row 1")) == "volume"
    assert open_image(bare.read_bytes(), any_range=True).image().shape == (1, 36, 44)


def test_what_is_missing_is_named_with_its_extra(tmp_path, monkeypatch):
    paths = scans.ct_series(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    assert "is a DICOM file, which needs pydicom: pip install 'hf-segformer[medical]'" in message(paths[0])
    assert DicomVolume.gather([str(path) for path in paths])[0] == {"": tuple(map(str, paths))}


# --- Segmentations ----------------------------------------------------------------------------------------------------


def written(opened, path, **options):
    labels = np.random.default_rng(1).integers(0, 3, (opened.num_slices, opened.height, opened.width), dtype=np.uint8)
    labels[0, 0, :4] = 255
    opened.write(path, iter(labels), LAYOUT, **options)
    return np.where(labels == 255, 0, labels), highdicom.seg.segread(path)


def test_a_segmentation_lies_where_its_series_does(tmp_path):
    paths = scans.ct_series(tmp_path)
    opened = volume(*sorted(paths))
    labels, found = written(opened, tmp_path / "seg.dcm")
    uids = [pydicom.dcmread(path).SOPInstanceUID for path in paths]
    combined = found.get_pixels_by_source_instance(uids, combine_segments=True)
    np.testing.assert_array_equal(combined, labels)
    images = highdicom.get_volume_from_series([pydicom.dcmread(path) for path in paths])
    masks = found.get_volume(combine_segments=True).match_geometry(images)
    np.testing.assert_allclose(masks.affine, images.affine, atol=1e-4)
    ordered = labels if np.array_equal(images.array + 0, scans.ct_volume()) else labels[::-1]
    np.testing.assert_array_equal(masks.array, ordered)
    assert found.FrameOfReferenceUID == scans.FRAME_OF_REFERENCE
    assert found.StudyInstanceUID == scans.STUDY
    assert [each.SegmentLabel for each in found.SegmentSequence] == ["liver", "lesion/=1"]
    assert found.get_segment_description(1).segmented_property_category.meaning == "Spatial and Relational Concept"
    assert found.get_segment_description(2).segmented_property_type.scheme_designator == "99HFSEGFORMER"


def test_a_missing_slice_thickness_is_the_distance_of_slices(tmp_path):
    paths = scans.ct_series(tmp_path, 3)
    for path in paths[:2]:
        made = pydicom.dcmread(path)
        made.SliceThickness = None
        made.save_as(path)
    labels, found = written(volume(*paths), tmp_path / "seg.dcm")
    assert found.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness == 2.5
    uids = [pydicom.dcmread(path).SOPInstanceUID for path in paths]
    np.testing.assert_array_equal(found.get_pixels_by_source_instance(uids, combine_segments=True), labels)
    with pytest.raises(ValueError, match=r"has no SliceThickness; expected it beside ImagePositionPatient"):
        written(volume(paths[0]), tmp_path / "one.dcm")


def test_a_segmentation_of_a_multi_frame_file_refers_to_its_frames(tmp_path):
    path = scans.enhanced_ct(tmp_path / "e.dcm")
    labels, found = written(volume(path), tmp_path / "seg.dcm")
    source = pydicom.dcmread(path)
    combined = found.get_pixels_by_source_frame(source.SOPInstanceUID, [1, 2, 3], combine_segments=True)
    np.testing.assert_array_equal(combined, labels)
    masks = found.get_volume(combine_segments=True)
    images = highdicom.imread(path).get_volume()
    np.testing.assert_allclose(masks.match_geometry(images).affine, images.affine, atol=1e-4)


def test_frames_are_ordered_by_position_and_segmentations_refer_to_their_numbers(tmp_path):
    path = scans.enhanced_ct(tmp_path / "e.dcm", places=[0, 5, 2.5, 7.5])
    opened, source = volume(path), highdicom.imread(path)
    numbers = [1, 3, 2, 4]
    assert [opened.place_of(index).frame for index in range(4)] == numbers
    np.testing.assert_array_equal(pixels(opened)[:, 0], [source.get_frame(number) for number in numbers])
    labels, found = written(opened, tmp_path / "seg.dcm")
    combined = found.get_pixels_by_source_frame(source.SOPInstanceUID, numbers, combine_segments=True)
    np.testing.assert_array_equal(combined, labels)
    masks, images = found.get_volume(combine_segments=True), source.get_volume()
    np.testing.assert_allclose(masks.match_geometry(images).affine, images.affine, atol=1e-4)


@pytest.mark.parametrize("make", [scans.xray, scans.ultrasound])
def test_an_image_without_a_place_has_a_segmentation_without_one(tmp_path, make):
    labels, found = written(volume(make(tmp_path / "x.dcm")), tmp_path / "seg.dcm")
    assert "FrameOfReferenceUID" not in found
    uid = pydicom.dcmread(tmp_path / "x.dcm").SOPInstanceUID
    np.testing.assert_array_equal(found.get_pixels_by_source_instance([uid], combine_segments=True), labels)


def test_an_empty_segmentation_can_be_written(tmp_path):
    opened = volume(*scans.ct_series(tmp_path))
    opened.write(tmp_path / "seg.dcm", iter(np.zeros((4, 36, 44), np.uint8)), LAYOUT)
    found = highdicom.seg.segread(tmp_path / "seg.dcm")
    assert found.number_of_segments == 2
    assert not found.pixel_array.any()


def test_frames_without_positions_are_refused_a_segmentation(tmp_path):
    made = scans.dataset("1.2.840.10008.5.1.4.1.1.3.1", "US")
    scans.set_pixels(made, np.zeros((3, 36, 44), np.uint8))
    opened = volume(scans.save(made, tmp_path / "cine.dcm"))
    with pytest.raises(ValueError, match=r"holds 3 frames without positions .* separate images \(--pages\)"):
        written(opened, tmp_path / "seg.dcm")


IDENTITY = {"PatientName": scans.NAME, "PatientID": scans.PATIENT_ID, "StudyID": "SECRETSTUDY", "StudyDate": "20200102"}


@pytest.mark.parametrize("make", ["series", "frames"])
def test_nothing_names_the_patient_unless_asked(tmp_path, make):
    paths = scans.ct_series(tmp_path) if make == "series" else [scans.enhanced_ct(tmp_path / "e.dcm")]
    opened = volume(*paths)
    assert b"SECRET" in paths[0].read_bytes()
    _, found = written(opened, tmp_path / "seg.dcm")
    assert b"SECRET" not in (tmp_path / "seg.dcm").read_bytes()
    for name in (*IDENTITY, "PatientBirthDate", "PatientSex", "AccessionNumber", "ReferringPhysicianName"):
        assert not found[name].value, name
    _, found = written(opened, tmp_path / "named.dcm", keep_identity=True)
    assert {name: found[name].value for name in IDENTITY} == IDENTITY
    content = (tmp_path / "named.dcm").read_bytes()
    for text in (b"SECRETHOSPITAL", b"SECRETOP", b"SECRETCOMMENT", b"SECRETSERIAL"):
        assert text not in content
