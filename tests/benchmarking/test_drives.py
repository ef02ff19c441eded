"""The comparison on drives held out: its runs are recipes, and the page shows what was measured."""

import pytest
from PIL import Image

from benchmarks import drives
from hf_segformer.training.recipe import read_recipe


def run_of(part, iou, seed=0, held_out="0001TP", **others):
    return {
        "part": part,
        "held_out": held_out,
        "seed": seed,
        "mean_iou": iou,
        "classes": {"sky": iou, "pole": None},
        "processor_seconds": 10.0,
        "commit": "one",
        "processor": "a processor",
        "torch": "2",
        **others,
    }


def test_every_part_is_a_recipe_of_its_own(tmp_path):
    seen = []
    for part in drives.PARTS:
        recipe = read_recipe(drives.RECIPE, [*part.recipe_settings, f"data.root={tmp_path}"])
        recipe.check_trainable()
        assert part.is_pretrained or recipe.tables not in seen, part.name
        seen.append(recipe.tables)
    assert len({part.name for part in drives.PARTS}) == len(drives.PARTS)


def test_the_page_is_written_from_the_file():
    assert drives.PAGE.read_text() == drives.render(drives.read_runs(drives.FILE))


def test_a_table_for_each_drive_with_the_gain_over_the_recipe():
    runs = [
        run_of("recipe", 0.5),
        run_of("recipe", 0.6, held_out="0006R0"),
        run_of(drives.PARTS[1].name, 0.53, processor_seconds=15.0, commit="two"),
        run_of("recipe", 0.52, seed=1),
    ]
    page = drives.render(runs)
    assert "## Held out: 0001TP, at dusk; 600 steps, 60 of them warm-up, of 8 crops of 128 pixels" in page
    assert "| recipe | 51.0 | 50.0, 52.0 |  | 1.00x |" in page
    assert f"| {drives.PARTS[1].name} | 53.0 | 53.0 | +3.0 | 1.50x |" in page
    assert f"| {drives.PARTS[1].name} | 53 |  |" in page
    assert "| recipe | 60.0 | 60.0 |  | 1.00x |" in page
    assert page.count("up to 2.0 points apart") == 1  # the other drive has one run
    assert "what another seed would give was not measured" in page
    assert "- commit one: recipe (seed 0), recipe (seed 0), recipe (seed 1)" in page
    assert f"- commit two: {drives.PARTS[1].name} (seed 0)" in page


def test_a_table_without_the_recipe_has_no_differences():
    page = drives.render([run_of("CutMix and class balance, longer", 0.5)])
    assert "2,000 steps, 200 of them warm-up, of 8 crops of 192 pixels" in page
    assert "| CutMix and class balance, longer | 50.0 | 50.0 |  |  |" in page


def test_the_name_of_a_part_chooses_no_longer_one(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(drives, "measure", lambda part, *others: measured.append(part.name))
    monkeypatch.setattr(drives, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(drives, "read_runs", lambda path: [run_of("recipe", 0.5, seed=9)])
    drives.main(["recipe", "--data", str(tmp_path)])
    assert measured == ["recipe"]
    drives.main(["longer", "--data", str(tmp_path)])
    assert len(measured) == 7


def test_images_of_the_drive_held_out_are_not_pretrained_on(tmp_path):
    (tmp_path / "train").mkdir()
    for name in ("0001TP_1.png", "0006R0_1.png", "0016E5_1.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / "train" / name)
    folder = drives.image_folder(tmp_path, "0001TP", tmp_path / "images")
    assert [path.name for path in sorted(folder.iterdir())] == ["0006R0_1.png", "0016E5_1.png"]


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        drives.main(["no such part"])
    assert "no part is called no such part" in capsys.readouterr().err
