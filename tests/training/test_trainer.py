"""The plain Trainer: resume, best checkpoint, accumulation, saving and gradient checkpointing keep every tensor."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from hf_segformer import SegFormerForSemanticSegmentation

NO_DROPOUT = {"drop_path_rate": 0.0, "classifier_dropout_prob": 0.0}

# Transformers gave the switch a new name on the way from 5.17 to 5.23 and warns of the old one.
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(SegFormerForSemanticSegmentation, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)


@pytest.fixture(scope="module")
def samples():
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "pixel_values": torch.randn(3, 40, 72, generator=generator),
            "labels": torch.randint(0, 5, (40, 72), generator=generator),
        }
        for _ in range(8)
    ]


def trainer(model, folder, samples, compute_metrics=None, **arguments):
    settings = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return Trainer(
        model,
        TrainingArguments(**{**settings, **arguments}),
        train_dataset=samples,
        eval_dataset=samples[:2],
        compute_metrics=compute_metrics,
    )


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differing(first, second):
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def all_that_move(tensors):
    """All names but those of the head's projections' biases: BatchNorm takes them out again, their gradient is 0."""
    return [name for name in tensors if not (name.startswith("decode_head.linear_c") and name.endswith("bias"))]


def overwritten(config):
    """A model of which no tensor is, by chance or by initialisation, what a checkpoint holds."""
    model = SegFormerForSemanticSegmentation(config)
    for tensor in model.state_dict().values():
        tensor.fill_(7)
    return model


def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(tiny_config, samples, tmp_path):
    """Drop path and dropout are on: the state of the random numbers is resumed too."""
    config = tiny_config(drop_path_rate=0.3)
    unbroken = SegFormerForSemanticSegmentation(config)
    trainer(unbroken, tmp_path, samples).train()
    resumed = overwritten(config)
    trainer(resumed, tmp_path, samples).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    at_the_break = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert differing(copy_of(unbroken), at_the_break) == all_that_move(copy_of(unbroken))
    assert not differing(copy_of(resumed), copy_of(unbroken))


def test_resuming_restores_every_tensor_of_the_checkpoint(tiny_config, samples, tmp_path):
    """The run was over at that checkpoint, so nothing is trained that could hide a tensor left out."""
    trainer(SegFormerForSemanticSegmentation(tiny_config()), tmp_path, samples, max_steps=4).train()
    folder = tmp_path / "checkpoint-4"
    model = overwritten(tiny_config())
    trainer(model, tmp_path, samples, max_steps=4).train(resume_from_checkpoint=str(folder))
    assert not differing(copy_of(model), load_file(folder / "model.safetensors"))


def test_the_best_checkpoint_is_restored_whole_at_the_end(tiny_config, samples, tmp_path):
    scores = iter([0.1, 0.9, 0.3])
    run = trainer(
        SegFormerForSemanticSegmentation(tiny_config()),
        tmp_path,
        samples,
        compute_metrics=lambda _: {"score": next(scores)},
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    run.train()
    last = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert differing(copy_of(run.model), last) == all_that_move(copy_of(run.model))
    assert not differing(copy_of(run.model), load_file(tmp_path / "checkpoint-4" / "model.safetensors"))


def one_step(config, folder, samples, **arguments):
    """Weights, logged loss and logged gradient norm of one step of plain gradient descent on all eight samples.

    BatchNorm sees one forward's samples at a time, so only without it are parts of a batch the same as the whole.
    Gradient descent, unlike Adam, shows the scale of a gradient in the step.
    """
    torch.manual_seed(0)
    model = SegFormerForSemanticSegmentation(config)
    model.decode_head.batch_norm = torch.nn.Identity()
    run = trainer(model, folder, samples, max_steps=1, optim="sgd", max_grad_norm=1e6, **arguments)
    run.train()
    log = run.state.log_history[0]
    return copy_of(model), log["loss"], log["grad_norm"]


@pytest.mark.parametrize("num_parts", [2, 4])
def test_accumulation_scales_neither_the_logged_loss_nor_the_gradients(num_parts, tiny_config, samples, tmp_path):
    config = tiny_config(**NO_DROPOUT)
    weights, loss, norm = one_step(config, tmp_path, samples, per_device_train_batch_size=8, learning_rate=1.0)
    parts = one_step(
        config,
        tmp_path,
        samples,
        per_device_train_batch_size=8 // num_parts,
        gradient_accumulation_steps=num_parts,
        learning_rate=1.0,
    )
    assert parts[1] == pytest.approx(loss, abs=1e-6)
    assert float(parts[2]) == pytest.approx(float(norm), rel=1e-5)
    for name, tensor in parts[0].items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-5, atol=1e-6, msg=name)


def test_what_the_trainer_saves_loads_as_the_same_model(tiny_config, samples, tmp_path):
    run = trainer(SegFormerForSemanticSegmentation(tiny_config()), tmp_path, samples, max_steps=2, save_strategy="no")
    run.train()
    run.save_model(str(tmp_path / "final"))
    loaded, report = SegFormerForSemanticSegmentation.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not differing(copy_of(loaded), copy_of(run.model))


def classic_names(stages, reduced):
    """Every tensor's name in a published segmentation checkpoint with one block a stage."""
    names = set()
    pair = ("weight", "bias")
    for stage in range(stages):
        encoder, block = "segformer.encoder", f"segformer.encoder.block.{stage}.0"
        modules = [
            f"{encoder}.patch_embeddings.{stage}.proj",
            f"{encoder}.patch_embeddings.{stage}.layer_norm",
            f"{encoder}.layer_norm.{stage}",
            *(f"{block}.{part}" for part in ("layer_norm_1", "layer_norm_2", "attention.output.dense")),
            *(f"{block}.attention.self.{part}" for part in ("query", "key", "value")),
            *(f"{block}.mlp.{part}" for part in ("dense1", "dwconv.dwconv", "dense2")),
            f"decode_head.linear_c.{stage}.proj",
        ]
        if stage in reduced:
            modules += [f"{block}.attention.self.sr", f"{block}.attention.self.layer_norm"]
        names |= {f"{module}.{kind}" for module in modules for kind in pair}
    norm = (*pair, "running_mean", "running_var", "num_batches_tracked")
    names |= {f"decode_head.batch_norm.{kind}" for kind in norm}
    return names | {"decode_head.linear_fuse.weight", "decode_head.classifier.weight", "decode_head.classifier.bias"}


def test_memory_trainer_checkpoint_and_published_file_have_the_same_names(tiny_config, samples, tmp_path):
    model = SegFormerForSemanticSegmentation(tiny_config())
    trainer(model, tmp_path, samples, max_steps=1, save_steps=1).train()
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert model.state_dict().keys() == saved.keys() == classic_names(4, reduced={0, 1, 2})


def gradients(model, samples):
    torch.manual_seed(3)
    batch = {name: torch.stack([sample[name] for sample in samples[:2]]) for name in samples[0]}
    model.train()
    model(**batch).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_blocks_and_gives_the_same_gradients(reentrant, tiny_config, samples):
    """Drop path and dropout are on: the second pass has to draw what the first one drew."""
    model = SegFormerForSemanticSegmentation(tiny_config(drop_path_rate=0.5, hidden_dropout_prob=0.2))
    expected = {name: gradient.clone() for name, gradient in gradients(model, samples).items()}
    model.zero_grad()
    calls = []
    for stage in model.segformer.encoder.block:
        stage[0].attention.register_forward_hook(lambda *_: calls.append(1))
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": reentrant})
    found = gradients(model, samples)
    assert len(calls) == 2 * len(model.config.depths)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-7, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_trainers_gradient_checkpointing_switch_changes_no_weight(
    reentrant, tiny_config, samples, tmp_path, monkeypatch
):
    """The reentrant kind runs forward without gradients, where fast paths add in another order: see test_fast_paths."""
    monkeypatch.setenv("HF_SEGFORMER_PLAIN", str(int(reentrant)))
    runs = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = SegFormerForSemanticSegmentation(tiny_config())
        trainer(
            model,
            tmp_path,
            samples,
            max_steps=2,
            **{CHECKPOINTING: checkpointing, f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}},
        ).train()
        assert getattr(model, f"is_{CHECKPOINTING}") is checkpointing
        runs.append(copy_of(model))
    assert not differing(*runs)
