"""Every field of `TrainingArguments` is supported, shown to be harmless, or refused by name with a remedy."""

from dataclasses import fields

import pytest
from transformers import TrainingArguments

from hf_segformer.training.arguments import PROGRAM, REFUSED, RULES, check_arguments, check_recipe_arguments
from hf_segformer.training.trainer import SegFormerTrainer

WRONG = {
    "label_smoothing_factor": 0.1,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "neftune_noise_alpha": 5.0,
    "include_num_input_tokens_seen": "all",
    "optim_target_modules": ["query"],
    "parallelism_config": object(),
    "deepspeed": "zero.json",
}


def arguments(folder, **values):
    return TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **values)


def test_every_field_of_the_installed_version_is_classified():
    names = {field.name for field in fields(TrainingArguments) if not field.name.startswith("_")}
    assert not names - RULES.keys()


def test_default_values_are_accepted(tmp_path):
    check_arguments(arguments(tmp_path))


def test_every_refused_value_has_an_example():
    assert WRONG.keys() == {name for name, rule in RULES.items() if rule.support == REFUSED}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_refused_by_name_with_the_remedy(tmp_path, name):
    wrong = arguments(tmp_path)
    setattr(wrong, name, WRONG[name])  # some need packages that are not installed
    with pytest.raises(ValueError, match=f"^{name} is .*, which cannot be used here: ") as caught:
        check_arguments(wrong)
    assert RULES[name].note in str(caught.value)


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.support in (PROGRAM, REFUSED)])
def test_recipes_refuse_by_name_with_the_remedy(name):
    with pytest.raises(ValueError, match=rf"^trainer\.{name} cannot be set: "):
        check_recipe_arguments(["max_steps", name])


def test_recipes_accept_all_others():
    check_recipe_arguments(name for name, rule in RULES.items() if rule.support not in (PROGRAM, REFUSED))


def test_the_trainer_refuses_at_construction(model, tmp_path):
    with pytest.raises(ValueError, match=r"SegmentationLoss\(label_smoothing=...\)"):
        SegFormerTrainer(model, arguments(tmp_path, label_smoothing_factor=0.1))
    with pytest.raises(ValueError, match=r"expected OptimizerConfig\(power=...\)"):
        SegFormerTrainer(model, arguments(tmp_path, lr_scheduler_kwargs={"power": 2}))


def test_a_compiled_training_step_is_supported(tmp_path, capsys):
    """By the backend that compiles nothing, so that the wrapping alone is tested."""
    from tests.support.training import train

    compiled = ("trainer.torch_compile=true", "trainer.torch_compile_backend=eager", "trainer.max_steps=2")
    assert train(tmp_path / "run", *compiled, "trainer.eval_strategy=steps", "trainer.eval_steps=1") == 0
    assert (tmp_path / "run" / "training.json").is_file()
