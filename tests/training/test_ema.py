"""Averaged weights: the value by a loop in float64, who sees them, and runs that resume to the last bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_segformer import SegFormerForSemanticSegmentation
from hf_segformer.config import EmaConfig
from hf_segformer.training.ema import WeightAverage, averaged_tensors
from hf_segformer.training.resume import find_defect
from tests.support.distributed import tiny_trainer
from tests.support.training import error_of, train

EVALUATED = ("trainer.eval_strategy=steps", "trainer.eval_steps=2", "trainer.save_steps=2", "trainer.max_steps=4")


class Recorder(TrainerCallback):
    """Copies of the training's weights: the first ones, and after each optimizer step."""

    def __init__(self):
        self.weights = []

    def keep(self, model):
        self.weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.keep(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.keep(model)


def averaged(weights, decay, warmup):
    """The average by its definition, in float64."""
    average = {name: tensor.double() for name, tensor in weights[0].items()}
    for step, live in enumerate(weights[1:]):
        kept = min(decay, (1 + step) / (10 + step)) if warmup else decay
        average = {name: kept * tensor + (1 - kept) * live[name].double() for name, tensor in average.items()}
    return average


def trained(folder, ema, **arguments):
    """A finished tiny run with chance, and what was recorded of it."""
    recorder = Recorder()
    trainer = tiny_trainer(folder, True, options={"ema": ema, "callbacks": [recorder]}, **arguments)
    trainer.train()
    return trainer, recorder.weights


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """6 steps, checkpoints at 4 and 6: the folder, the weights of every step, those that the trainer ends with."""
    folder = tmp_path_factory.mktemp("ema") / "run"
    trainer, weights = trained(folder, EmaConfig(decay=0.9))
    return folder, weights, {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize(("decay", "warmup", "parts"), [(0.9, False, 1), (0.15, True, 2)])
def test_the_average_is_that_of_a_loop_one_update_for_each_optimizer_step(tmp_path, decay, warmup, parts):
    arguments = {"per_device_train_batch_size": 4 // parts, "gradient_accumulation_steps": parts, "max_steps": 4}
    trainer, weights = trained(tmp_path, EmaConfig(decay, warmup), save_strategy="no", **arguments)
    assert len(weights) == 5
    expected = averaged(weights, decay, warmup)
    for name, tensor in trainer.model.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-8, msg=name)
    norm = trainer.model.decode_head.batch_norm
    assert norm.num_batches_tracked == 4 * parts
    assert not torch.allclose(norm.running_mean, weights[-1]["decode_head.batch_norm.running_mean"], rtol=1e-3)


def test_the_warm_up_is_below_the_decay_until_it_reaches_it():
    average = WeightAverage(torch.nn.Linear(1, 1), EmaConfig(decay=0.5))
    decays = []
    for _ in range(11):
        decays.append(average.decay)
        average.update()
    assert decays == pytest.approx([0.1, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5, 0.5])


def test_averaging_changes_no_step_of_the_training(run, tmp_path):
    _, weights = trained(tmp_path, None, save_strategy="no")
    for found, expected in zip(run[1], weights, strict=True):
        assert_equal(found, expected)


def test_a_checkpoint_holds_the_average_and_the_training_weights(run):
    folder, weights, final = run
    saved = torch.load(folder / "checkpoint-6" / "training_weights.pt", weights_only=True)
    assert saved["num_updates"] == 6
    assert_equal(saved["weights"], {name: weights[6][name] for name in saved["weights"]})
    assert_equal(load_file(folder / "checkpoint-6" / "model.safetensors"), final)


def test_a_resumed_run_is_an_uninterrupted_one_to_the_last_bit(run, tmp_path):
    folder, _, final = run
    shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4")
    trainer = tiny_trainer(tmp_path, True, options={"ema": EmaConfig(decay=0.9)})
    trainer.train(resume_from_checkpoint=True)
    assert_equal(trainer.model.state_dict(), final)
    saved = [
        torch.load(each / "checkpoint-6" / "training_weights.pt", weights_only=True) for each in (tmp_path, folder)
    ]
    assert_equal(saved[0]["weights"], saved[1]["weights"])


@pytest.mark.parametrize(("holds", "ema"), [(True, None), (False, EmaConfig(decay=0.9))])
def test_a_run_resumes_with_an_average_only_where_it_had_one(run, tmp_path, holds, ema):
    checkpoint = shutil.copytree(run[0] / "checkpoint-4", tmp_path / "checkpoint-4")
    if not holds:
        (checkpoint / "training_weights.pt").unlink()
    trainer = tiny_trainer(tmp_path, True, options={"ema": ema})
    with pytest.raises(ValueError, match=f"holds {'' if holds else 'no '}averaged weights, but ema.decay is 0"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_without_the_training_weights_is_broken(run, tmp_path):
    checkpoint = shutil.copytree(run[0] / "checkpoint-4", tmp_path / "checkpoint-4")
    assert find_defect(checkpoint) is None
    (checkpoint / "training_weights.pt").unlink()
    assert find_defect(checkpoint) == "training_weights.pt is missing"


def test_evaluation_sees_the_average_and_leaves_the_training_weights(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, **kwargs):
            seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    recorder = Recorder()
    options = {"ema": EmaConfig(decay=0.9, warmup=False), "callbacks": [recorder, Look()]}
    trainer = tiny_trainer(
        tmp_path, True, options=options, max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="no"
    )
    trainer.train()
    for step, found in enumerate(seen, start=1):
        expected = averaged(recorder.weights[: step + 1], 0.9, False)
        for name, tensor in found.items():
            if tensor.is_floating_point():
                torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-8, msg=name)
    # The next step continues from the training's weights: averages of averages would be smaller steps.
    assert len(seen) == 3
    assert_equal(trainer.model.state_dict(), seen[-1])


@pytest.mark.slow
def test_a_trainers_best_checkpoint_is_an_average(tmp_path):
    trainer, weights = trained(
        tmp_path,
        EmaConfig(decay=0.9),
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        max_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="mean_iou",
    )
    best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    expected = averaged(weights[: best + 1], 0.9, True)
    for name, tensor in trainer.model.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-8, msg=name)


def test_where_the_best_checkpoint_is_gone_the_average_stays(tmp_path):
    trainer, _ = trained(
        tmp_path,
        EmaConfig(decay=0.9),
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        max_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="mean_iou",
    )
    trainer._average = WeightAverage(trainer.model, trainer.ema)
    expected = {name: tensor.clone() for name, tensor in trainer._average.average.items()}
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(1)
    trainer.state.best_model_checkpoint = str(tmp_path / "gone")
    trainer._load_best_model()
    held = trainer.model.state_dict()
    assert_equal({name: held[name] for name in expected}, expected)


# PEFT asks by the name that Transformers 5.23 renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_only_what_is_trained_is_averaged(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["decode_head"])
    names = averaged_tensors(peft.get_peft_model(model, config)).keys()
    assert any("lora_A" in name for name in names)
    assert all("lora_" in name or ".modules_to_save." in name or name.endswith(("_mean", "_var")) for name in names)


def test_weights_in_half_precision_are_refused(tiny_config):
    model = SegFormerForSemanticSegmentation(tiny_config()).bfloat16()
    with pytest.raises(ValueError, match=r"ema.decay is 0.9, but .* is torch.bfloat16; expected weights in float32"):
        WeightAverage(model, EmaConfig(decay=0.9))


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_impossible_decays_are_named(decay):
    with pytest.raises(ValueError, match=f"ema.decay is {decay}; expected a number in"):
        EmaConfig(decay)


@pytest.fixture(scope="module")
def recipe_run(tmp_path_factory):
    """A recipe's run with an average; evaluated at 2 and 4."""
    folder = tmp_path_factory.mktemp("recipe") / "run"
    assert train(folder, *EVALUATED, "ema.decay=0.9") == 0
    return folder


def test_a_recipe_saves_and_scores_what_it_evaluated(recipe_run):
    metrics = json.loads((recipe_run / "metrics.json").read_text())
    state = json.loads((recipe_run / "checkpoint-4" / "trainer_state.json").read_text())
    logged = [row["eval_mean_iou"] for row in state["log_history"] if "eval_mean_iou" in row][-1]
    assert logged == pytest.approx(metrics["mean_iou"], rel=1e-12)
    weights = load_file(recipe_run / "model.safetensors")
    assert_equal(weights, load_file(recipe_run / "checkpoint-4" / "model.safetensors"))
    live = torch.load(recipe_run / "checkpoint-4" / "training_weights.pt", weights_only=True)["weights"]
    assert not torch.equal(weights["decode_head.classifier.weight"], live["decode_head.classifier.weight"])
    assert json.loads((recipe_run / "training.json").read_text())["recipe"]["ema"] == {"decay": 0.9}


def test_a_recipe_that_lost_its_average_does_not_resume(recipe_run, tmp_path, capsys):
    shutil.copytree(recipe_run / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    error = error_of(capsys, tmp_path / "run", *EVALUATED, "--resume")
    assert "checkpoint-2 holds averaged weights, but ema.decay is 0.0; expected that of its run" in error


# PEFT asks by the name that Transformers 5.23 renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.slow
def test_averaged_adapters_resume_to_the_last_bit(trained_run, tmp_path):
    pytest.importorskip("peft")
    arguments = [f"model.checkpoint={trained_run}", "lora.rank=2", "ema.decay=0.9", *EVALUATED]
    assert train(tmp_path / "whole", *arguments) == 0
    (tmp_path / "run").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    assert train(tmp_path / "run", *arguments, "--resume") == 0
    assert_equal(*(load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole")))
