"""Python code that loads a published model and uses it, for its card."""

import json

HALF = ("float16", "bfloat16")

_CLASSES = {"segmentation": "ForSemanticSegmentation", "classification": "ForImageClassification", "encoder": "Model"}
_RESULTS = {
    "segmentation": (
        "size = ImageOps.exif_transpose(image).size[::-1]  # upright, as the processor turns it\n"
        "[segmentation] = processor.post_process_semantic_segmentation(outputs, [size])"
    ),
    "classification": "label = model.config.id2label[outputs.logits.argmax().item()]",
    "encoder": "features = outputs.last_hidden_state",
}


def loading_classes(kind: str) -> tuple[str, str]:
    """Return the names of the classes that load a kind of model, this package's and Transformers'."""
    return f"SegFormer{_CLASSES[kind]}", f"AutoModel{_CLASSES[kind].removeprefix('Model')}"


def usage(kind: str, source: str, dtype: str) -> str:
    """Write the Python lines that load the model and use it on an image."""
    name, where = loading_classes(kind)[0], json.dumps(source, ensure_ascii=False)
    options = ", dtype=torch.float32" if dtype in HALF else ""
    lines = [
        *(["import torch"] if dtype in HALF else []),
        *(["from PIL import ImageOps"] if kind == "segmentation" else []),
        f"from hf_segformer import {name}, SegFormerImageProcessor",
        "",
        f"model = {name}.from_pretrained({where}{options}).eval()",
        f"processor = SegFormerImageProcessor.from_pretrained({where})",
        'outputs = model(**processor(image, return_tensors="pt"))  # image: a PIL image',
        _RESULTS[kind],
    ]
    return "\n".join(lines)


def remote_usage(kind: str, source: str, dtype: str, on_hub: bool) -> str:
    """Write the same lines for the code beside the weights, without the package."""
    name, where = loading_classes(kind)[1], json.dumps(source, ensure_ascii=False)
    pins = ', "revision": "COMMIT", "code_revision": "COMMIT"' if on_hub else ""
    dtype_option = ", dtype=torch.float32" if dtype in HALF else ""
    lines = [
        *(["import torch"] if dtype in HALF else []),
        f"from transformers import AutoImageProcessor, {name}",
        "",
        f'options = {{"trust_remote_code": True{pins}}}',
        f"model = {name}.from_pretrained({where}, **options{dtype_option}).eval()",
        f"processor = AutoImageProcessor.from_pretrained({where}, **options)",
    ]
    return "\n".join(lines)


__all__ = ["HALF", "loading_classes", "remote_usage", "usage"]
