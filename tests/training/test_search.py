"""Search of a recipe's values: by Optuna where it is installed, and the checks of the space in any case."""

import json
import math
from types import SimpleNamespace

import pytest

from hf_segformer.training.recipe import read_recipe
from hf_segformer.training.search import Objective, build_search_trainer, check_space, search, suggest
from tests.support.training import SMALL


class Trial:
    """Draws the lower end, and remembers what it was asked for."""

    def __init__(self):
        self.asked = []

    def _draw(self, kind, key, low, high, log):
        self.asked.append((kind, key, high, log))
        return low

    def suggest_int(self, key, low, high, log):
        return self._draw("int", key, low, high, log)

    def suggest_float(self, key, low, high, log):
        return self._draw("float", key, low, high, log)

    def suggest_categorical(self, key, values):
        return values[-1]


def test_ranges_become_optunas_suggestions():
    space = {
        "trainer.learning_rate": (1e-4, 1e-2, "log"),
        "model.decoder_hidden_size": (16, 64),
        "loss.dice": [0.0, 1.0],
    }
    check_space(space)
    trial = Trial()
    assert suggest(trial, space) == {"trainer.learning_rate": 1e-4, "model.decoder_hidden_size": 16, "loss.dice": 1.0}
    assert trial.asked == [
        ("float", "trainer.learning_rate", 1e-2, True),
        ("int", "model.decoder_hidden_size", 64, False),
    ]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "the space is empty"),
        ({"data.eval_size": (32, 64)}, "data.eval_size cannot be searched; expected a key of model, loss"),
        ({"trainer.output_dir": ["a"]}, "trainer.output_dir cannot be searched"),
        ({"trainer.bf16": [False, True]}, "trainer.bf16 cannot be searched"),
        ({"loss.dice": (1.0, 0.0)}, "expected low below high"),
        ({"trainer.learning_rate": (0.0, 1.0, "log")}, "above 0 on a logarithmic scale"),
        ({"loss.dice": (0.0, 1.0, "lin")}, r"expected \(low, high\) or"),
        ({"loss.dice": 1.0}, "or a list of values"),
        ({"loss.dicee": (0.0, 1.0)}, "did you mean 'loss.dice'"),
        ({"model.variant": [0, 1]}, "model.variant is 0; expected '0', a str"),
        ({"model.num_channels": [3, 4]}, "model.num_channels cannot be searched"),
        ({"loss.dice": (0.0, math.inf)}, "expected finite bounds"),
    ],
)
def test_impossible_spaces_are_named(space, message):
    with pytest.raises(ValueError, match=message):
        check_space(space)


def test_a_metric_that_evaluation_lacks_is_refused_before_a_trial(monkeypatch):
    model = SimpleNamespace(config=SimpleNamespace(id2label={0: "road", 1: "sky"}))
    monkeypatch.setattr("hf_segformer.training.search._optuna", lambda: None)
    monkeypatch.setattr(
        "hf_segformer.training.search.build_search_trainer", lambda *arguments: SimpleNamespace(model=model)
    )
    with pytest.raises(ValueError, match=r"^metric is 'dice'; expected one of mean_iou, .*iou_road"):
        search(read_recipe("shapes_b0", SMALL), {"loss.dice": [0.0, 1.0]}, 2, metric="dice")


@pytest.mark.parametrize(
    ("is_kept", "greater", "judged", "scores", "wanted"),
    [
        (False, None, [0.5, 0.9, 0.7], [1, 2, 3], [1, 2, 3]),  # the last one
        (True, True, [0.5, 0.9, 0.7], [1, 2, 3], [1, 2, 2]),
        (True, False, [0.5, 0.2, 0.7], [1, 2, 3], [1, 2, 2]),
        (True, True, [math.nan, 0.1, 0.0], [1, 2, 3], [1, 2, 2]),
    ],
)
def test_a_trial_has_the_score_of_the_checkpoint_that_it_keeps(is_kept, greater, judged, scores, wanted):
    arguments = SimpleNamespace(
        load_best_model_at_end=is_kept, metric_for_best_model="eval_loss", greater_is_better=greater
    )
    trainer = SimpleNamespace(args=arguments, objective=None)
    objective = Objective(trainer, "mean_iou")
    for _ in range(2):  # two trials
        trainer.objective, found = None, []
        for loss, score in zip(judged, scores, strict=True):
            trainer.objective = objective({"eval_loss": loss, "eval_mean_iou": score})
            found.append(trainer.objective)
        assert found == wanted


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_trials_have_the_recipes_adapters_and_teacher(trained_run, tmp_path):
    pytest.importorskip("peft")
    overrides = [f"model.checkpoint={trained_run}", "lora.rank=2", f"distill.teacher={trained_run}"]
    recipe = read_recipe("shapes_b0", [*SMALL, *overrides, f"trainer.output_dir={tmp_path}"])
    space = {"loss.dice": [0.25, 0.75]}
    trainer = build_search_trainer(recipe, space)
    assert trainer.teacher.source == str(trained_run)
    model = trainer.call_model_init(Trial())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name or "decode_head" in name for name in trained)
    assert model.get_base_model().loss_function.dice == 0.75


def test_a_trial_is_trained_with_the_numbers_that_were_drawn(tmp_path):
    """The Trainer rounds a share to the type of the recipe's whole number."""
    recipe = read_recipe("shapes_b0", [*SMALL, f"trainer.output_dir={tmp_path}"])
    space = {"trainer.warmup_steps": (0.25, 0.5), "trainer.max_grad_norm": (0.5, 2.0)}
    trainer = build_search_trainer(recipe, space)
    trainer.args.warmup_steps, trainer.args.max_grad_norm = 0, 0  # what the Trainer makes of them
    trainer.call_model_init(Trial())
    assert (trainer.args.warmup_steps, trainer.args.max_grad_norm) == (0.25, 0.5)


@pytest.mark.slow
def test_trials_train_the_recipe_with_their_values(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    from hf_segformer.training.trainer import SegFormerTrainer

    seen = []
    create = SegFormerTrainer.create_optimizer

    def watch(self, *arguments):
        optimizer = create(self, *arguments)
        rates = sorted({group["lr"] for group in optimizer.param_groups})
        seen.append((rates, self.model.loss_function.dice, self.train_dataset.transform.augmentation.flip))
        return optimizer

    monkeypatch.setattr(SegFormerTrainer, "create_optimizer", watch)
    recipe = read_recipe("shapes_b0", [*SMALL, "trainer.max_steps=1", f"trainer.output_dir={tmp_path}"])
    space = {
        "trainer.learning_rate": (1e-4, 1e-2, "log"),
        "optimizer.head_lr_multiplier": (2.0, 4.0),
        "loss.dice": [0.25, 0.75],
        "augmentation.flip": (0.1, 0.9),
    }
    found = search(recipe, space, 2)
    assert len(seen) == 2
    assert seen[0] != seen[1]
    assert found.overrides.keys() == space.keys()
    values = found.overrides
    rate, head = values["trainer.learning_rate"], values["optimizer.head_lr_multiplier"]
    best = next(each for each in seen if each[2] == pytest.approx(values["augmentation.flip"]))
    assert best == ([pytest.approx(rate), pytest.approx(rate * head)], values["loss.dice"], values["augmentation.flip"])
    assert 0 <= found.score <= 1
    assert found.recipe.trainer["learning_rate"] == rate
    assert found.recipe.optimizer.head_lr_multiplier == head
    json.dumps(found.overrides)


FINAL = ("augmentation.final_crop_size=48", "augmentation.final_share=0.5", "trainer.max_steps=24")


def test_a_trial_crops_its_last_passes_larger(tmp_path):
    """Six steps a pass, four passes: the last two of the recipe, and the last one of the trial."""
    recipe = read_recipe("shapes_b0", [*SMALL, *FINAL, f"trainer.output_dir={tmp_path}"])
    trainer = build_search_trainer(recipe, {"augmentation.final_share": (0.25, 0.75)})
    assert trainer.train_dataset.final_epoch == 2
    trainer.model_init(Trial())
    assert trainer.train_dataset.final_epoch == 3


@pytest.mark.parametrize("settings", [FINAL, ()])
def test_the_length_is_not_searched_together_with_the_last_passes(tmp_path, settings):
    recipe = read_recipe("shapes_b0", [*SMALL, *settings, f"trainer.output_dir={tmp_path}"])
    space = {"trainer.max_steps": (12, 48), **({} if settings else {"augmentation.final_crop_size": (32, 48)})}
    with pytest.raises(ValueError, match=r"trainer.max_steps is searched together with augmentation.final_crop_size"):
        build_search_trainer(recipe, space)
