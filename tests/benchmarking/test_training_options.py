"""The comparison of training options: its runs are recipes, and the page shows what was measured."""

from benchmarks.record import RESULTS
from benchmarks.training_options import FILE, FINE_TUNED, PAGE, RECIPE, SCRATCH, SETTINGS, VARIANTS, render
from hf_segformer.files import read_json
from hf_segformer.training.recipe import read_recipe


def test_every_variant_is_a_recipe_that_differs_from_the_one_without(tmp_path):
    seen = []
    for variant in VARIANTS:
        overrides = [each.format(checkpoint=tmp_path) for each in variant.overrides]
        recipe = read_recipe(RECIPE, [*SETTINGS, *overrides])
        recipe.check_trainable()
        assert recipe.tables not in seen, variant.name
        seen.append(recipe.tables)
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)


def test_the_page_is_written_from_the_file():
    assert PAGE.read_text() == render(read_json(RESULTS / FILE))


def test_gains_are_of_the_seeds_that_both_runs_have():
    first, second = (next(each.name for each in VARIANTS if each.start == start) for start in (SCRATCH, FINE_TUNED))
    option = VARIANTS[1].name
    runs = {
        first: {"mean_iou": [0.5, 0.7], "processor_seconds": [10.0, 10.0], "commits": ["one", "two"]},
        option: {"mean_iou": [0.52], "processor_seconds": [15.0], "commits": ["one"]},
        VARIANTS[2].name: {"mean_iou": [], "processor_seconds": [], "commits": []},
    }
    facts = dict.fromkeys(("processor", "threads", "torch", "date", "recipe"), "x")
    page = render({**facts, "settings": [], "checkpoint_mean_iou": 0.8, "runs": runs})
    assert f"| {first} | 60.0 | 50.0, 70.0 |  | 1.00x |" in page
    assert f"| {option} | 52.0 | 52.0 | +2.0 | 1.50x |" in page
    assert "by up to 20.0 points" in page
    assert "commits one, two" in page
    assert f"Not measured so far (`--missing` measures them): {VARIANTS[2].name}," in page
    assert f"## Training {FINE_TUNED}" not in page
    assert second in page
