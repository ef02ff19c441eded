"""Names of SegFormer's weights in each code base, and their mapping to the published ones.

Each code base is a table of names, written down rather than guessed with patterns: the complete list of keys that a
checkpoint must hold follows from it, so that missing and unexpected keys are known by name.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path

import torch

MAX_STAGES = 4

# Published name to a code base's name, up to the dot before `weight`; `{number}` counts stages from 1, `{reverse}` from
# the last. Where a name occurs several times, its tensor holds those modules' rows, stacked in the order given here.
_PAPER = {
    "patch_embeddings.{stage}.proj.": "patch_embed{number}.proj.",
    "patch_embeddings.{stage}.layer_norm.": "patch_embed{number}.norm.",
    "block.{stage}.{block}.layer_norm_1.": "block{number}.{block}.norm1.",
    "block.{stage}.{block}.attention.self.query.": "block{number}.{block}.attn.q.",
    "block.{stage}.{block}.attention.self.key.": "block{number}.{block}.attn.kv.",
    "block.{stage}.{block}.attention.self.value.": "block{number}.{block}.attn.kv.",
    "block.{stage}.{block}.attention.self.sr.": "block{number}.{block}.attn.sr.",
    "block.{stage}.{block}.attention.self.layer_norm.": "block{number}.{block}.attn.norm.",
    "block.{stage}.{block}.attention.output.dense.": "block{number}.{block}.attn.proj.",
    "block.{stage}.{block}.layer_norm_2.": "block{number}.{block}.norm2.",
    "block.{stage}.{block}.mlp.dense1.": "block{number}.{block}.mlp.fc1.",
    "block.{stage}.{block}.mlp.dwconv.dwconv.": "block{number}.{block}.mlp.dwconv.dwconv.",
    "block.{stage}.{block}.mlp.dense2.": "block{number}.{block}.mlp.fc2.",
    "layer_norm.{stage}.": "norm{number}.",
}
# torch's own MultiheadAttention, and 1x1 convolutions for the Mix-FFN's linear layers.
_MMSEGMENTATION = {
    "patch_embeddings.{stage}.proj.": "layers.{stage}.0.projection.",
    "patch_embeddings.{stage}.layer_norm.": "layers.{stage}.0.norm.",
    "block.{stage}.{block}.layer_norm_1.": "layers.{stage}.1.{block}.norm1.",
    "block.{stage}.{block}.attention.self.query.": "layers.{stage}.1.{block}.attn.attn.in_proj_",
    "block.{stage}.{block}.attention.self.key.": "layers.{stage}.1.{block}.attn.attn.in_proj_",
    "block.{stage}.{block}.attention.self.value.": "layers.{stage}.1.{block}.attn.attn.in_proj_",
    "block.{stage}.{block}.attention.self.sr.": "layers.{stage}.1.{block}.attn.sr.",
    "block.{stage}.{block}.attention.self.layer_norm.": "layers.{stage}.1.{block}.attn.norm.",
    "block.{stage}.{block}.attention.output.dense.": "layers.{stage}.1.{block}.attn.attn.out_proj.",
    "block.{stage}.{block}.layer_norm_2.": "layers.{stage}.1.{block}.norm2.",
    "block.{stage}.{block}.mlp.dense1.": "layers.{stage}.1.{block}.ffn.layers.0.",
    "block.{stage}.{block}.mlp.dwconv.dwconv.": "layers.{stage}.1.{block}.ffn.layers.1.",
    "block.{stage}.{block}.mlp.dense2.": "layers.{stage}.1.{block}.ffn.layers.4.",
    "layer_norm.{stage}.": "layers.{stage}.2.",
}
# Transformers 5 renames on load and save: `state_dict()` of its own model gives these.
_IN_MEMORY = {
    "patch_embeddings.{stage}.proj.": "stages.{stage}.patch_embeddings.proj.",
    "patch_embeddings.{stage}.layer_norm.": "stages.{stage}.patch_embeddings.layer_norm.",
    "block.{stage}.{block}.layer_norm_1.": "stages.{stage}.blocks.{block}.layernorm_before.",
    "block.{stage}.{block}.attention.self.query.": "stages.{stage}.blocks.{block}.attention.q_proj.",
    "block.{stage}.{block}.attention.self.key.": "stages.{stage}.blocks.{block}.attention.k_proj.",
    "block.{stage}.{block}.attention.self.value.": "stages.{stage}.blocks.{block}.attention.v_proj.",
    "block.{stage}.{block}.attention.self.sr.": (
        "stages.{stage}.blocks.{block}.attention.sequence_reduction.sequence_reduction."
    ),
    "block.{stage}.{block}.attention.self.layer_norm.": (
        "stages.{stage}.blocks.{block}.attention.sequence_reduction.layer_norm."
    ),
    "block.{stage}.{block}.attention.output.dense.": "stages.{stage}.blocks.{block}.attention.o_proj.",
    "block.{stage}.{block}.layer_norm_2.": "stages.{stage}.blocks.{block}.layernorm_after.",
    "block.{stage}.{block}.mlp.dense1.": "stages.{stage}.blocks.{block}.mlp.fc1.",
    "block.{stage}.{block}.mlp.dwconv.dwconv.": "stages.{stage}.blocks.{block}.mlp.dwconv.dwconv.",
    "block.{stage}.{block}.mlp.dense2.": "stages.{stage}.blocks.{block}.mlp.fc2.",
    "layer_norm.{stage}.": "stages.{stage}.layer_norm.",
}
_PUBLISHED = {name: name for name in _PAPER}
_BLOCK = "block.{stage}.{block}."

# Prefixes of an encoder's names. segmentation_models_pytorch keeps the paper's names under `encoder.`.
_ENCODERS = (
    ("segformer.encoder.", _PUBLISHED),
    ("encoder.", _PUBLISHED),
    ("segformer.", _IN_MEMORY),
    ("", _IN_MEMORY),
    ("backbone.", _PAPER),
    ("encoder.", _PAPER),
    ("", _PAPER),
    ("backbone.", _MMSEGMENTATION),
    ("", _MMSEGMENTATION),
)

# All of them concatenate stages 4, 3, 2, 1 before fusing, so no fusing weight moves.
_LINEAR = "decode_head.linear_c.{stage}.proj."
_FUSE = "decode_head.linear_fuse."
_NORM = "decode_head.batch_norm."
_PREDICT = "decode_head.classifier."
_PUBLISHED_HEAD = {name: name for name in (_LINEAR, _FUSE, _NORM, _PREDICT)}
_IN_MEMORY_HEAD = {**_PUBLISHED_HEAD, _LINEAR: "decode_head.linear_projections.{stage}.proj."}
_PAPER_HEAD = {
    _LINEAR: "decode_head.linear_c{number}.proj.",
    _FUSE: "decode_head.linear_fuse.conv.",
    _NORM: "decode_head.linear_fuse.bn.",
    _PREDICT: "decode_head.linear_pred.",
}
_MODELS_PYTORCH_HEAD = {
    _LINEAR: "decoder.mlp_stage.{reverse}.linear.",
    _FUSE: "decoder.fuse_stage.0.",
    _NORM: "decoder.fuse_stage.1.",
    _PREDICT: "segmentation_head.0.",
}
# By the prefix of their keys, the more particular before `linear_c`.
_HEADS = {
    "decode_head.linear_c.": _PUBLISHED_HEAD,
    "decode_head.linear_projections.": _IN_MEMORY_HEAD,
    "decode_head.linear_c": _PAPER_HEAD,
    "decoder.mlp_stage.": _MODELS_PYTORCH_HEAD,
    "classifier.": {"classifier.": "classifier."},
    "head.": {"classifier.": "head."},
}
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_TENSORS = {
    _FUSE: ("weight",),
    _NORM: ("weight", "bias", *_STATISTICS),
}
_UNUSED = ("decode_head.conv_seg.weight", "decode_head.conv_seg.bias")  # built, never read by the paper's code
_OTHER_HEAD = ("decode_head.convs.", "decode_head.fusion_conv.")  # mmsegmentation 0.2x and 1.x
_ANY_HEAD = (
    "decode_head.",
    "auxiliary_head.",
    "decoder.",
    "segmentation_head.",
    "classification_head.",
    "classifier.",
    "head.",
)


def to_published(
    path: Path, held: Mapping[str, torch.Tensor], *, encoder_only: bool = False
) -> dict[str, torch.Tensor]:
    """Map a checkpoint's tensors to their published names, splitting stacked ones.

    Args:
        path: names the checkpoint in errors.
        held: its tensors.
        encoder_only: drop any head first, SegFormer's or another network's.

    Raises:
        ValueError: if this is no SegFormer, if its decode head is another network's, or if a key is missing or
            unexpected: every one has exactly one use.
    """
    if encoder_only:
        held = {key: tensor for key, tensor in held.items() if not key.startswith(_ANY_HEAD)}
    weights = {}
    for key, names in _published_names(path, held).items():
        tensor = held[key]
        if len(names) == 1:
            weights[names[0]] = tensor
            continue
        if tensor.ndim == 0 or len(tensor) % len(names):
            raise ValueError(f"{path}: {key} is {tuple(tensor.shape)}, but it must hold {len(names)} equal parts")
        weights |= zip(names, tensor.chunk(len(names)), strict=True)
    return weights


def _published_names(path: Path, held: Collection[str]) -> dict[str, list[str]]:
    """Map each of a checkpoint's keys to the published weights it holds; several where they are stacked."""
    if any(key.startswith(_OTHER_HEAD) for key in held):
        raise ValueError(
            f"{path} holds mmsegmentation's decode head, another network: it runs BatchNorm and ReLU on each scale "
            "before upsampling, where SegFormer's is linear; only the encoder fits: convert it with encoder_only=True "
            "(segformer convert --encoder-only)"
        )
    prefix, encoder, blocks = _find_encoder(path, held)
    depths = num_blocks(path, held, blocks)
    head = next((head for begin, head in _HEADS.items() if any(key.startswith(begin) for key in held)), {})
    wanted = defaultdict(list)
    for own, published in _pairs(encoder, depths):
        wanted[prefix + own].append("segformer.encoder." + published)
    for own, published in _pairs(head, depths):
        wanted[own].append(published)
    for stage in range(len(depths)):
        reduction = re.compile(rf"segformer\.encoder\.block\.{stage}\.\d+\.attention\.self\.(sr|layer_norm)\.")
        keys = [key for key, names in wanted.items() if reduction.match(names[0])]
        if not any(key in held for key in keys):  # a stage with full attention has none of them
            for key in keys:
                del wanted[key]
    require_same(path, wanted, set(held) - set(_UNUSED) if head is _PAPER_HEAD else held)
    return dict(wanted)


def num_blocks(path: Path, held: Iterable[str], blocks: str) -> list[int]:
    """Count the blocks of each stage by the indices in a checkpoint's keys.

    Args:
        path: names the checkpoint in errors.
        held: a checkpoint's keys.
        blocks: prefix of a block's keys up to its index, with `{stage}` or `{number}`.

    Raises:
        ValueError: if a stage's indices have a gap; one stray high index would otherwise ask for millions of names.
    """
    depths = []
    for stage in range(MAX_STAGES):
        begin = blocks.format(stage=stage, number=stage + 1)
        names = {key.removeprefix(begin).split(".")[0] for key in held if key.startswith(begin)}
        indices = {int(name) for name in names if name.isdecimal()}
        depth = next(index for index in count() if index not in indices)
        if depth < len(indices):
            raise ValueError(f"{path} holds {begin}{max(indices)}, but no {begin}{depth}; expected blocks without gaps")
        depths.append(depth)
    num_stages = max(stage for stage, depth in enumerate(depths, start=1) if depth)
    return [max(depth, 1) for depth in depths[:num_stages]]


def require_same(path: Path, wanted: Collection[str], held: Collection[str]) -> None:
    """Raise ValueError with the keys that are missing or unexpected, if any."""
    missing, unexpected = sorted(set(wanted) - set(held)), sorted(set(held) - set(wanted))
    faults = [f"misses {some(missing)}"] if missing else []
    if missing and all(key.endswith(_STATISTICS) for key in missing):
        faults.append(
            "the running statistics of the head's BatchNorm were not saved with its weights: save the whole "
            "state_dict(), buffers included (PEFT: list decode_head in modules_to_save)"
        )
    if unexpected:
        faults.append(f"holds keys that SegFormer has no place for, {some(unexpected)}")
        if any(key.startswith(_ANY_HEAD) for key in unexpected):
            faults.append("encoder_only=True (segformer convert --encoder-only) leaves a head out")
    if faults:
        raise ValueError(f"{path} {'; '.join(faults)}")


def some(keys: Collection[str]) -> str:
    """Format the number of keys and the first ten of them."""
    shown = ", ".join(sorted(keys)[:10])
    return f"{len(keys)} in all: {shown}{', ...' if len(keys) > 10 else ''}"


def _find_encoder(path: Path, held: Collection[str]) -> tuple[str, dict[str, str], str]:
    """Find the prefix of the encoder's keys, its table of names, and the prefix of a stage's blocks."""
    for prefix, names in _ENCODERS:
        blocks = prefix + names[_BLOCK + "layer_norm_1."].split("{block}")[0]
        first = blocks.format(stage=0, number=1) + "0."
        if any(key.startswith(first) for key in held):
            return prefix, names, blocks
    raise ValueError(f"{path} is not SegFormer's: none of its keys belongs to a first block ({some(held)})")


def _pairs(names: Mapping[str, str], depths: list[int]) -> Iterator[tuple[str, str]]:
    """Yield a code base's keys with the published ones, module by module, stage by stage, block by block."""
    for published, own in names.items():
        stages = enumerate(depths) if "{stage}" in published else [(0, 1)]
        for stage, depth in stages:
            places = {"stage": stage, "number": stage + 1, "reverse": len(depths) - 1 - stage}
            for block in range(depth if "{block}" in published else 1):
                for tensor in _TENSORS.get(published, ("weight", "bias")):
                    yield own.format(block=block, **places) + tensor, published.format(block=block, **places) + tensor


__all__ = ["MAX_STAGES", "num_blocks", "require_same", "some", "to_published"]
