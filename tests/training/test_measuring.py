"""Measurements of a plan: what a cost depends on, memory of a step, and the range test on known curves."""

import math
from itertools import pairwise
from unittest import mock

import pytest
import torch

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.config import DataConfig
from hf_segformer.training import measuring
from hf_segformer.training.data import load_data
from hf_segformer.training.distillation import Teacher
from hf_segformer.training.measuring import (
    Probe,
    has_diverged,
    learning_rates,
    smoothed,
    steepest_descent,
    this_machine,
)
from tests.support.tiny import TINY


def tables(batch_size=2, **trainer):
    return {
        "data": {"source": "shapes", "image_size": 32, "num_train": 3, "num_eval": 2},
        "model": {"variant": "b0", **TINY},
        "augmentation": {"crop_size": 32},
        "loss": {"class_weights": "log"},
        "optimizer": {},
        "evaluation": {},
        "trainer": {"per_device_train_batch_size": batch_size, **trainer},
    }


@pytest.fixture(scope="module")
def probe():
    with mock.patch.object(measuring, "_MOST_STEPS", 2):
        yield Probe(torch.device("cpu"))


class TestCost:
    def test_every_part_is_measured(self, probe):
        cost = probe.measure(tables())
        assert min(cost.step_seconds, cost.reading_seconds, cost.evaluation_seconds, cost.image_bytes) > 0

    def test_later_decisions_are_not_measured_again(self, probe):
        cost = probe.measure(tables())
        later = tables(max_steps=9, learning_rate=1e-3, bf16=False)
        later["model"]["drop_path_rate"] = 0.0
        later["augmentation"]["scale"] = [0.5, 2.0]
        assert probe.measure(later) is cost

    def test_values_that_a_trial_cannot_have_stop_no_plan(self, probe, tmp_path, monkeypatch):
        """Classes are not counted yet, there is no evaluation, and the user's own code is what the user asked for."""
        (tmp_path / "mine.py").write_text("def augment(image, mask):\n    return image, mask\n")
        monkeypatch.syspath_prepend(tmp_path)
        trial = tables(batch_size=3)
        trial["augmentation"] |= {"class_balance": 0.5, "custom": "mine:augment", "final_crop_size": 48, "cutmix": 0.5}
        trial["early_stopping"] = {"patience": 2}
        assert probe.measure(trial).reading_seconds > 0

    def test_steps_of_a_teacher_are_timed(self, probe, tmp_path):
        trial = tables()
        names = load_data(DataConfig(**trial["data"])).names
        config = SegFormerConfig(**TINY, num_labels=len(names), id2label=dict(enumerate(names)))
        SegFormerForSemanticSegmentation(config).save_pretrained(tmp_path)
        SegFormerImageProcessor().save_pretrained(tmp_path)
        with mock.patch.object(Teacher, "loss", autospec=True, side_effect=Teacher.loss) as loss:
            assert probe.measure(trial | {"distill": {"teacher": str(tmp_path)}}) is not probe.measure(trial)
        assert loss.call_count > 2  # each step of the first trial

    def test_a_batch_larger_than_the_data_is_filled(self, probe):
        cost = probe.measure(tables(batch_size=5))
        assert cost.image_bytes == pytest.approx(probe.measure(tables()).image_bytes, rel=0.25)

    def test_memory_is_that_of_the_saved_tensors(self, probe):
        """A layer saves its input, a square its own, of one size, and neither weights; twice that is planned for."""
        model, images = torch.nn.Linear(8, 8), torch.ones(100, 8)
        with mock.patch.object(probe, "_step", side_effect=lambda model: (model(images) ** 2).sum().backward()):
            assert probe._bytes_of_step(model) == 2 * 2 * images.untyped_storage().nbytes()

    def test_weights_and_random_numbers_of_a_run_are_its_own(self, probe):
        """A run sets its seed after the plan: the trial leaves no mode or hook behind."""
        before = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
        probe.measure(tables(batch_size=1))
        assert (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()) == before


class TestRangeTest:
    def test_rates_rise_by_one_factor(self):
        rates = learning_rates(100)
        assert rates[0] == 1e-6
        assert rates[-1] == pytest.approx(1e-1)
        factors = [after / before for before, after in pairwise(rates)]
        assert max(factors) == pytest.approx(min(factors)) == pytest.approx(10 ** (5 / 99))

    def test_smoothing_is_the_weighted_mean_of_what_was_seen(self):
        losses = [3.0, 1.0, 4.0, 1.0, 5.0]
        for number in range(1, 6):
            weights = [0.9 ** (number - 1 - index) for index in range(number)]
            mean = sum(w * loss for w, loss in zip(weights, losses, strict=False)) / sum(weights)
            assert smoothed(losses[:number])[-1] == pytest.approx(mean)

    def test_the_steepest_descent_of_a_known_curve(self):
        """A logistic descent around 1e-3 and an explosion at 3e-2."""
        rates = learning_rates(100)
        losses = [2 / (1 + (rate / 1e-3) ** 2) + (rate / 3e-2) ** 4 for rate in rates]
        assert 1e-3 <= steepest_descent(rates, losses) <= 3e-3  # smoothing lags behind

    def test_divergence(self):
        assert not has_diverged([2.0, 1.0, 1.5])
        assert has_diverged([1.0] * 5 + [100.0])
        assert has_diverged([1.0, math.nan])

    def test_a_network_is_trained_at_the_rates(self, probe):
        with mock.patch.object(measuring, "_RANGE_STEPS", 6):
            rate = probe.find_learning_rate(tables())
        assert 1e-6 < rate <= 1e-1
        assert float(f"{rate:.2g}") == rate


class TestMachine:
    def test_this_machine(self):
        machine = this_machine(use_cpu=True)
        assert machine.device == "cpu"
        assert machine.processors >= 1
        assert 2**28 < machine.memory < 2**50
        assert machine.find_learning_rate is None
        assert this_machine(find_learning_rate=True).find_learning_rate is not None

    @pytest.mark.parametrize(
        ("flags", "expected"), [("fpu avx512_bf16 ht", True), ("fpu amx_bf16", True), ("fpu avx512f bf16x", False)]
    )
    def test_bfloat16_is_read_from_the_processors_flags(self, flags, expected, monkeypatch):
        monkeypatch.setattr(measuring.Path, "is_file", lambda self: True)
        monkeypatch.setattr(measuring.Path, "read_text", lambda self, **_: f"flags\t: {flags}\n")
        assert measuring._has_bfloat16(torch.device("cpu")) is expected
