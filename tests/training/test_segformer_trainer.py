"""The Trainer with the paper's optimiser and schedule: each against the recipe as the paper's code has it."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from hf_segformer import SegFormerForImageClassification, SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.config import AugmentationConfig, OptimizerConfig
from hf_segformer.data.torch_datasets import EvalDataset, TrainDataset, collate
from hf_segformer.evaluation.evaluate import evaluate
from hf_segformer.evaluation.metrics import SegmentationMetrics
from hf_segformer.training.optimization import parameter_groups, poly_lr_with_warmup
from hf_segformer.training.trainer import SegFormerTrainer
from hf_segformer.upsampling_segformer import upsample_argmax


def arguments(folder, **overrides):
    values = {"output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    return TrainingArguments(**{**values, "learning_rate": 6e-5, "weight_decay": 0.01, **overrides})


def settings(model, **options):
    """Name -> (learning rate, weight decay) of each parameter, as multiples of the arguments' values."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 1.0, 1.0, OptimizerConfig(**options))
    return {names[parameter]: (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}


def test_parameter_groups_are_the_papers(model):
    found = settings(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    for name, (rate, decay) in found.items():
        assert rate == (10 if name.startswith("decode_head.") else 1), name
        assert decay == (0 if name.rpartition(".")[0] in norms else 1), name
    # Biases and the head's BatchNorm are decayed there.
    assert found["decode_head.batch_norm.weight"] == (10, 1)
    assert found["segformer.encoder.block.0.0.mlp.dense1.bias"] == (1, 1)
    assert found["segformer.encoder.block.0.0.attention.self.layer_norm.weight"] == (1, 0)


def test_rates_fall_by_depth_from_the_last_block_down(tiny_config):
    model = SegFormerForSemanticSegmentation(tiny_config(depths=[1, 2, 1, 1]))
    rates = {name: rate for name, (rate, _) in settings(model, layer_lr_decay=0.5).items()}
    assert rates["segformer.encoder.block.3.0.layer_norm_1.weight"] == 1
    assert rates["segformer.encoder.layer_norm.3.weight"] == 1
    assert rates["segformer.encoder.patch_embeddings.3.proj.weight"] == 0.5
    assert rates["segformer.encoder.block.2.0.layer_norm_1.weight"] == 0.5
    assert rates["segformer.encoder.block.1.1.layer_norm_1.weight"] == 0.25
    assert rates["segformer.encoder.block.1.0.layer_norm_1.weight"] == 0.125
    assert rates["segformer.encoder.block.0.0.layer_norm_1.weight"] == 0.0625
    assert rates["segformer.encoder.patch_embeddings.0.proj.weight"] == 0.03125
    assert rates["decode_head.classifier.weight"] == 10


@pytest.mark.parametrize("depths", [[1, 1, 1, 1], [3, 4, 6, 3]])
@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_rates_are_those_of_a_walk_from_the_head_to_the_image(tiny_config, depths, decay):
    """A factor of the decay for each block that the walk leaves behind it."""
    with torch.device("meta"):
        model = SegFormerForSemanticSegmentation(tiny_config(depths=depths))
    encoder, expected, rate = model.segformer.encoder, {}, 1.0
    for stage in reversed(range(4)):
        expected |= dict.fromkeys(encoder.layer_norm[stage].parameters(), rate)
        for block in reversed(encoder.block[stage]):
            expected |= dict.fromkeys(block.parameters(), rate)
            rate *= decay
        expected |= dict.fromkeys(encoder.patch_embeddings[stage].parameters(), rate)
    assert len(expected) == len(list(encoder.parameters()))
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = settings(model, layer_lr_decay=decay)
    for parameter, rate in expected.items():
        assert found[names[parameter]][0] == pytest.approx(rate, rel=1e-12), names[parameter]


def test_a_classifiers_head_learns_faster_too(tiny_config):
    assert settings(SegFormerForImageClassification(tiny_config()))["classifier.weight"] == (10, 1)


# PEFT asks by the name that Transformers 5.23 renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_and_the_head_are_all_that_is_trained(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["decode_head"])
    found = settings(peft.get_peft_model(model, config))
    assert all("lora_" in name or ".modules_to_save." in name for name in found)
    assert {rate for name, (rate, _) in found.items() if "lora_" in name} == {1}
    assert {rate for name, (rate, _) in found.items() if "modules_to_save" in name} == {10}


def mmcv_rate(step, base=6e-5, total=160_000, warmup=1500, ratio=1e-6):
    """mmcv's poly policy and its linear warm-up, as its hooks compute them."""
    regular = base * (1 - step / total) ** 1.0
    if step >= warmup:
        return regular
    k = (1 - step / warmup) * (1 - ratio)
    return regular * (1 - k)


@pytest.mark.parametrize("step", [0, 1, 749, 1499, 1500, 80_000, 159_999, 160_000])
def test_the_schedule_is_mmcvs(step):
    assert 6e-5 * poly_lr_with_warmup(step, 160_000, 1500, 1.0) == pytest.approx(mmcv_rate(step), rel=1e-12)


def test_the_trainer_takes_groups_and_schedule(model, tmp_path):
    trainer = SegFormerTrainer(model, arguments(tmp_path, warmup_steps=2))
    trainer.create_optimizer_and_scheduler(num_training_steps=10)
    rates = []
    for _ in range(10):
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    expected = [mmcv_rate(step, total=10, warmup=2) for step in range(10)]
    assert [min(step) for step in rates] == pytest.approx(expected)
    assert [max(step) for step in rates] == pytest.approx([10 * rate for rate in expected])
    assert isinstance(trainer.optimizer, torch.optim.AdamW)


def test_another_schedule_is_transformers_own(model, tmp_path):
    trainer = SegFormerTrainer(model, arguments(tmp_path, lr_scheduler_type="constant"))
    trainer.create_optimizer_and_scheduler(num_training_steps=10)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    assert sorted({group["lr"] for group in trainer.optimizer.param_groups}) == pytest.approx([6e-5, 6e-4])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_resumed_run_takes_over_changed_rates_and_weight_decay(model, tmp_path, schedule):
    def rates(**changed):
        """Settings of the optimizer at each step."""
        found = {}

        class Record(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
                names = ("lr", "weight_decay", "betas")
                found[state.global_step] = [[group[name] for name in names] for group in optimizer.param_groups]

        values = {"learning_rate": 1e-3, "max_steps": 4, "save_steps": 2, "lr_scheduler_type": schedule, **changed}
        head = values.pop("head", 10.0)
        run = evaluating_trainer(model, tmp_path, [], optimizer=OptimizerConfig(head_lr_multiplier=head), **values)
        run.add_callback(Record())
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if changed else None)
        return found

    before = rates()
    assert list(before) == [0, 1, 2, 3]
    assert rates(save_steps=9) == {step: before[step] for step in (2, 3)}
    after = rates(save_steps=9, learning_rate=1e-6, weight_decay=0.5, adam_beta2=0.9, head=20.0)
    for step in (2, 3):
        for (old_rate, old_decay, _), (rate, decay, betas) in zip(before[step], after[step], strict=True):
            assert rate == pytest.approx(old_rate * (2e-3 if old_rate == before[step][0][0] else 1e-3))
            assert decay == (0.5 if old_decay else 0)
            assert betas == (0.9, 0.9)
    with pytest.raises(ValueError, match=r"checkpoint-2 holds parameters in other groups .* trainer\.weight_decay of"):
        rates(weight_decay=0.0)


def test_a_resumed_run_takes_over_changed_intervals(model, tmp_path):
    run = evaluating_trainer(model, tmp_path, [], max_steps=2, save_steps=2)
    run.train()
    run = evaluating_trainer(model, tmp_path, [], max_steps=6, save_steps=3)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert run.state.save_steps == 3
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (2, 3, 6)]


def test_a_frozen_encoder_gets_no_optimiser(model, tmp_path):
    trainer = SegFormerTrainer(model, arguments(tmp_path), optimizer_config=OptimizerConfig(freeze_encoder=True))
    optimizer = trainer.create_optimizer()
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == set(model.decode_head.parameters())
    assert not any(parameter.requires_grad for parameter in model.segformer.parameters())


@pytest.mark.parametrize("number", [1, 2, 4])
def test_frozen_stages_keep_every_weight_and_the_others_change(model, tmp_path, number):
    """Weights are followed through training steps; frozen are those that a forward pass meets up to a stage's norm."""
    trainer = evaluating_trainer(
        model, tmp_path, [(32, 32)], max_steps=2, optimizer=OptimizerConfig(freeze_stages=number), save_strategy="no"
    )
    encoder = model.segformer.encoder
    frozen = {
        parameter
        for modules in (encoder.patch_embeddings, encoder.block, encoder.layer_norm)
        for parameter in modules[:number].parameters()
    }
    # Without a gradient: of a single key all scores are 1, and BatchNorm takes the biases of projections out again.
    idle = {
        each for name, each in model.named_parameters() if name.endswith(("query.bias", "key.bias", "proj.bias"))
    } - frozen
    before = {parameter: parameter.detach().clone() for parameter in model.parameters()}
    trainer.train()
    unmoved = {parameter for parameter, value in before.items() if torch.equal(parameter, value)}
    assert unmoved - idle == frozen
    assert {parameter for parameter in before if not parameter.requires_grad} == frozen


def test_more_stages_than_there_are_cannot_be_frozen(model, tmp_path):
    with pytest.raises(ValueError, match=r"optimizer.freeze_stages is 5; expected at most 4, all stages"):
        SegFormerTrainer(model, arguments(tmp_path), optimizer_config=OptimizerConfig(freeze_stages=5))


def rows(sizes):
    """Images of the given (height, width) with masks that they show."""
    generator = torch.Generator().manual_seed(0)
    masks = [torch.randint(5, size, generator=generator, dtype=torch.uint8) for size in sizes]
    return [{"image": (mask[None] * 50).expand(3, -1, -1).numpy(), "label": mask.numpy()} for mask in masks]


def evaluating_trainer(model, folder, sizes, dataset=None, optimizer=None, **overrides):
    """A Trainer as in the README, that need not set `batch_eval_metrics`."""
    processor = SegFormerImageProcessor(do_resize=False)
    augmentation = AugmentationConfig(crop_size=32, distortion=0)
    metrics = SegmentationMetrics(list("abcde"))
    return SegFormerTrainer(
        model,
        arguments(folder, per_device_eval_batch_size=1, remove_unused_columns=False, **overrides),
        data_collator=collate,
        train_dataset=TrainDataset(rows([(40, 48)] * 4), augmentation, processor),
        eval_dataset=dataset or EvalDataset(rows(sizes), processor),
        compute_metrics=metrics,
        preprocess_logits_for_metrics=metrics.preprocess_logits,
        optimizer_config=optimizer,
    )


@pytest.mark.parametrize("batch_eval_metrics", [False, True])
def test_metrics_are_those_of_all_images_whatever_the_arguments(model, tmp_path, batch_eval_metrics):
    sizes = [(40, 56), (56, 40), (33, 64)]
    trainer = evaluating_trainer(model, tmp_path, sizes, batch_eval_metrics=batch_eval_metrics)
    found = trainer.evaluate()
    expected = evaluate(
        model, SegFormerImageProcessor(do_resize=False), rows(sizes), names=list("abcde"), progress=False
    )
    for name in ("mean_iou", "mean_accuracy", "overall_accuracy"):
        assert found[f"eval_{name}"] == expected.metrics[name]
    assert [found[f"eval_iou_{name}"] for name in "abcde"] == expected.metrics["per_category_iou"]
    assert found["eval_loss"] > 0


def test_no_evaluation_image_is_dropped(model, tmp_path):
    settings = {"dataloader_drop_last": True}
    trainer = evaluating_trainer(model, tmp_path, [(40, 40)] * 3, **settings)
    trainer.args.per_device_eval_batch_size = 2
    first = trainer.evaluate()
    assert trainer.args.dataloader_drop_last
    trainer = evaluating_trainer(model, tmp_path, [(40, 40)] * 3)
    assert trainer.evaluate()["eval_mean_iou"] == first["eval_mean_iou"]


@pytest.mark.parametrize("metrics", [True, False])
def test_predictions_without_labels_have_the_prepared_size(model, tmp_path, metrics):
    sizes = [(40, 56), (64, 32)]
    trainer = evaluating_trainer(model, tmp_path, sizes)
    if not metrics:
        trainer.compute_metrics = None
    unlabeled = [{"pixel_values": sample["pixel_values"]} for sample in trainer.eval_dataset]
    output = trainer.predict(unlabeled)
    assert output.label_ids is None
    assert not any("iou" in name for name in output.metrics)
    for sample, prediction in zip(unlabeled, output.predictions, strict=True):
        logits = model(sample["pixel_values"][None]).logits
        assert (prediction == upsample_argmax(logits, prediction.shape)[0].numpy()).all()
        assert prediction.shape == sample["pixel_values"].shape[-2:]


def test_predictions_of_one_size_are_one_array_with_their_labels(model, tmp_path):
    trainer = evaluating_trainer(model, tmp_path, [(40, 56)] * 2)
    output = trainer.predict(trainer.eval_dataset)
    assert output.predictions.shape == output.label_ids.shape == (2, 40, 56)
    assert output.metrics["test_mean_iou"] == trainer.evaluate()["eval_mean_iou"]


def test_evaluation_that_fails_does_so_before_the_first_step(model, tmp_path):
    """The labels of the evaluation data are none of the model's classes."""
    wrong = [{"pixel_values": torch.zeros(3, 32, 32), "labels": torch.full((32, 32), 77)}]
    trainer = evaluating_trainer(model, tmp_path, [], wrong, eval_strategy="steps", eval_steps=100, max_steps=3)
    with pytest.raises(ValueError, match="77"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_trial_evaluation_leaves_nothing_in_the_metrics(model, tmp_path):
    sizes = [(40, 56), (56, 40)]
    trainer = evaluating_trainer(model, tmp_path, sizes, eval_strategy="steps", eval_steps=2, max_steps=2)
    trainer.train()
    logged = next(row for row in trainer.state.log_history if "eval_mean_iou" in row)
    assert logged["eval_mean_iou"] == trainer.evaluate()["eval_mean_iou"]


def test_a_frozen_encoder_stays_frozen_with_model_init(tiny_config, tmp_path):
    from hf_segformer import SegFormerForSemanticSegmentation

    processor = SegFormerImageProcessor(do_resize=False)
    trainer = SegFormerTrainer(
        args=arguments(tmp_path, max_steps=1, remove_unused_columns=False),
        model_init=lambda: SegFormerForSemanticSegmentation(tiny_config()),
        data_collator=collate,
        train_dataset=TrainDataset(rows([(40, 48)] * 4), AugmentationConfig(crop_size=32, distortion=0), processor),
        optimizer_config=OptimizerConfig(freeze_encoder=True),
    )

    def trainable():
        return {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}

    before = trainable()
    assert {name.split(".")[0] for name in before} == {"decode_head"}
    trainer.train()
    assert trainable() == before


class Chance(Dataset):
    """A user's data set whose samples are random."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return torch.rand(3)


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_workers_of_other_data_sets_are_seeded_as_the_trainer_seeds_them(model, tmp_path, kind):
    data = {f"{kind}_dataset": Chance(), "data_collator": torch.stack}

    def drawn(seed):
        settings = arguments(tmp_path, seed=seed, dataloader_num_workers=1, dataloader_pin_memory=False)
        trainer = SegFormerTrainer(model, settings, **data)
        [samples] = trainer.get_train_dataloader() if kind == "train" else trainer.get_eval_dataloader()
        return samples

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"head_lr_multiplier": 0.0}, "optimizer.head_lr_multiplier is 0"),
        ({"layer_lr_decay": 1.5}, "optimizer.layer_lr_decay is 1.5"),
        ({"power": -1.0}, "optimizer.power"),
        ({"freeze_stages": -1}, "optimizer.freeze_stages is -1; expected at least 0"),
        ({"freeze_stages": 1, "freeze_encoder": True}, "freeze_encoder and optimizer.freeze_stages are both set"),
    ],
)
def test_impossible_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**values)
