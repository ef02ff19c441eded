"""The page in a headless Chromium: upload, result, classes, opacity, downloads, examples, and bad uploads.

Run by `make test-browser`, which installs what it needs.
"""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from hf_segformer import (
    SegFormerConfig,
    SegFormerForSemanticSegmentation,
    SegFormerImageProcessor,
    SegFormerPredictor,
)
from tests.support.tiny import TINY

pytestmark = pytest.mark.browser
pytest.importorskip("gradio")
pytest.importorskip("selenium")
if not (shutil.which("chromedriver") and (shutil.which("chromium") or shutil.which("google-chrome"))):
    pytest.skip("needs Chromium and chromedriver: apt-get install chromium chromium-driver", allow_module_level=True)

from tests.support.browser import browser, served  # noqa: E402 (Selenium is needed)

NAMES = ["road", "house", "tree", "river & lake", "<b>sky</b>"]
# Overlays come as JPEG: a colour is right to so much on average.
NEAR = 3


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A checkpoint with an example, a photo and a folder for downloads."""
    home = tmp_path_factory.mktemp("page")
    torch.manual_seed(0)
    model = SegFormerForSemanticSegmentation(SegFormerConfig(**TINY, id2label=dict(enumerate(NAMES))))
    torch.nn.init.normal_(model.decode_head.classifier.weight)
    model.save_pretrained(home / "streets")
    SegFormerImageProcessor(size={"shortest_edge": 64}, keep_ratio=True).save_pretrained(home / "streets")
    blocks = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    images = [Image.fromarray(each.repeat(40, axis=0).repeat(40, axis=1)) for each in blocks]
    (home / "streets" / "examples").mkdir()
    images[0].save(home / "photo.png")
    images[1].save(home / "streets" / "examples" / "corner.png")
    (home / "downloads").mkdir()
    return home


@pytest.fixture(scope="module")
def address(home):
    with served(home / "streets") as address:
        yield address


@pytest.fixture(scope="module")
def chromium(home):
    with browser(home / "downloads") as page:
        yield page


@pytest.fixture
def page(chromium, address):
    """The page, just opened."""
    chromium.open(address)
    return chromium


@pytest.fixture(scope="module")
def predictor(home):
    return SegFormerPredictor.from_pretrained(home / "streets", device="cpu")


@pytest.fixture(scope="module")
def photo(home):
    return np.asarray(Image.open(home / "photo.png").convert("RGB")).astype(float)


def upload(page, home, name="photo.png"):
    before = page.source()
    page.upload(home / name)
    return np.asarray(page.changed(before)).astype(float)


def differ(first, second, where=...):
    return np.abs(first[where] - second[where]).mean()


def test_an_upload_shows_its_classes_model_and_time(page, home, predictor, photo):
    shown = upload(page, home)
    labels = predictor(home / "photo.png").segmentation
    colors = np.array(predictor.palette, dtype=float)[labels]
    assert differ(shown, 0.4 * photo + 0.6 * colors) < NEAR
    assert differ(shown, photo) > 4 * NEAR
    counts = np.bincount(labels.ravel(), minlength=len(NAMES))
    assert list(page.classes()) == [NAMES[index] for index in np.argsort(-counts) if counts[index]]
    assert len(page.classes()) > 1
    assert all(page.classes().values())
    text = page.find("body")[0].text
    assert "5 classes" in text
    assert re.search(r"240 . 160 pixels · prepared in \d+ ms · predicted in [\d.]+ m?s on cpu", text)


def test_the_list_has_the_overlays_colours_and_shares(page, home, predictor):
    upload(page, home)
    labels = predictor(home / "photo.png").segmentation
    for place, name in enumerate(page.classes()):
        index = NAMES.index(name)
        style = "return getComputedStyle(document.querySelectorAll('#classes .wrap label')[arguments[0]]{}, '{}').{}"
        color = page.driver.execute_script(style.format(".querySelector('span')", "::before", "backgroundColor"), place)
        assert color == f"rgb{predictor.palette[index]}"
        share = page.driver.execute_script(style.format("", "::after", "content"), place)
        assert share.strip('"') in (f"{100 * (labels == index).mean():.1f} %", "< 0.1 %")


def test_a_class_is_switched_off_and_on_again(page, home, predictor, photo):
    before = upload(page, home)
    labels = predictor(home / "photo.png").segmentation
    name = next(iter(page.classes()))
    inside = labels == NAMES.index(name)
    source = page.source()
    page.switch(name)
    after = np.asarray(page.changed(source)).astype(float)
    assert not page.classes()[name]
    assert differ(after, photo, inside) < NEAR
    assert differ(after, before, inside) > 4 * NEAR
    assert differ(after, before, ~inside) < NEAR
    source = page.source()
    page.switch(name)
    assert differ(np.asarray(page.changed(source)).astype(float), before) < NEAR


def test_all_classes_at_once(page, home, photo):
    upload(page, home)
    source = page.source()
    page.find("#classes .select-all-checkbox")[0].click()
    assert differ(np.asarray(page.changed(source)).astype(float), photo) < NEAR
    assert not any(page.classes().values())


def test_without_opacity_the_image_is_shown_alone(page, home, photo):
    upload(page, home)
    source = page.source()
    page.fade_out()
    assert differ(np.asarray(page.changed(source)).astype(float), photo) < NEAR


def test_mask_and_selection_are_downloaded(page, home, predictor):
    upload(page, home)
    expected = predictor(home / "photo.png").segmentation
    path = page.download("mask")
    assert path.name == "photo_mask.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)), expected)
    name = next(iter(page.classes()))
    source = page.source()
    page.switch(name)
    page.changed(source)
    path = page.download("selection")
    assert path.name.startswith("photo_selection")
    np.testing.assert_array_equal(np.asarray(Image.open(path)), (expected != NAMES.index(name)) * 255)


def test_an_example_is_clicked(page, home, predictor):
    page.wait(lambda: page.find("#examples button img"), "the example")[0].click()
    shown = np.asarray(page.changed("")).astype(float)
    example = home / "streets" / "examples" / "corner.png"
    colors = np.array(predictor.palette, dtype=float)[predictor(example).segmentation]
    assert differ(shown, 0.4 * np.asarray(Image.open(example)) + 0.6 * colors) < NEAR


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("text.png", b"no image", "text.png"),
        ("<b>bold.png", b"no image", "bold.png"),
        ("empty.png", b"", "empty"),
        ("cut.png", None, "cut"),
    ],
)
def test_a_bad_upload_gives_a_message_and_the_page_goes_on(name, content, words, page, home):
    upload(page, home)
    before = page.source()
    (home / name).write_bytes((home / "photo.png").read_bytes()[:300] if content is None else content)
    page.upload(home / name)
    message = page.wait(lambda: " ".join(toast.text for toast in page.find(".toast-body")).strip(), "the message")
    assert words in message
    for never in ("Traceback", "segformer-app-", "/tmp"):
        assert never not in page.find("body")[0].text
    assert page.source() == before
    assert upload(page, home, "streets/examples/corner.png").shape == (160, 240, 3)


def test_the_page_asks_nobody_but_its_own_address(page, home, address):
    upload(page, home)
    asked = page.requests()
    assert address in asked
    foreign = {each for each in asked if not each.startswith((address, "data:", "blob:", "chrome:", "about:"))}
    assert not foreign
