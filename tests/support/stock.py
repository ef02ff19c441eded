"""Transformers' own SegFormer beside ours, with the same weights."""

from torch import nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from hf_segformer import SegFormerForSemanticSegmentation
from tests.support.tiny import TINY


def close(ours, theirs, tolerance=2e-5):
    """Assert equal values up to a tolerance relative to the largest one."""
    assert ours.shape == theirs.shape
    scale = theirs.abs().max().clamp(min=1e-12)
    assert (ours - theirs).abs().max() <= tolerance * scale


def stock_pair(folder, model_class=SegformerForSemanticSegmentation, ours=SegFormerForSemanticSegmentation, **fields):
    """Return Transformers' model with random weights and statistics, and ours from the folder that it saved."""
    fields = {**TINY, "num_labels": 5, "drop_path_rate": 0.0, "classifier_dropout_prob": 0.0, **fields}
    stock = model_class(SegformerConfig(**fields))
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.2)
    if model_class is SegformerForSemanticSegmentation:
        stock.decode_head.batch_norm.running_mean.normal_()
        stock.decode_head.batch_norm.running_var.uniform_(0.5, 2)
    stock.save_pretrained(folder)
    model, info = ours.from_pretrained(folder, layer_norm_eps=1e-5, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return stock, model


def stock_names(stock):
    """Yield each of Transformers' parameters with its published name."""
    renames = {
        "linear_projections": "linear_c",
        "attention.q_proj": "attention.self.query",
        "attention.k_proj": "attention.self.key",
        "attention.v_proj": "attention.self.value",
        "attention.o_proj": "attention.output.dense",
        "attention.sequence_reduction.sequence_reduction": "attention.self.sr",
        "attention.sequence_reduction.layer_norm": "attention.self.layer_norm",
        "layernorm_before": "layer_norm_1",
        "layernorm_after": "layer_norm_2",
        "mlp.fc": "mlp.dense",
    }
    for name, parameter in stock.named_parameters():
        if ".stages." in name:
            head, stage, rest = name.replace(".stages.", ".", 1).split(".", 2)
            rest = rest.replace("patch_embeddings.", f"patch_embeddings.{stage}.", 1)
            rest = rest.replace("blocks.", f"block.{stage}.", 1)
            rest = f"layer_norm.{stage}.{rest[11:]}" if rest.startswith("layer_norm.") else rest
            name = f"{head}.encoder.{rest}"
        for theirs, classic in renames.items():
            name = name.replace(theirs, classic)
        yield parameter, name
