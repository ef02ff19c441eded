"""Reading of a model's folder: its configuration, the kind of its model, and the headers of its weights."""

from pathlib import Path
from typing import Any

from ..conversion.checkpoints import read_shards_of
from ..files import read_json, resolve_inside

MODEL_TYPES = ("hf_segformer", "segformer")
_KINDS = {"ForSemanticSegmentation": "segmentation", "ForImageClassification": "classification"}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def read_model_config(folder: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        ValueError: if it is damaged, another network's, or a link out of the folder.
        OSError: if there is none.
    """
    path = resolve_inside(folder, "config.json")
    if not path.is_file():
        raise OSError(f"{folder} holds no config.json; expected a folder that save_pretrained wrote")
    config = read_json(path)
    if config.get("model_type") not in MODEL_TYPES:
        raise ValueError(f"{path} has model_type {config.get('model_type')!r}; expected 'hf_segformer' or 'segformer'")
    return config


def read_weights(folder: Path) -> tuple[int, str]:
    """Count the parameters and name their type, by the headers of the folder's *.safetensors.

    Returns:
        number of parameters, without BatchNorm's running statistics; name of the type, empty if there are several.

    Raises:
        ValueError: if a file is damaged or cut short, or one of several is missing.
        OSError: if there are none.
    """
    from safetensors import SafetensorError, safe_open

    count, dtypes = 0, set()
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118 (a file is not a dictionary)
                    if key.endswith(_BUFFERS):
                        continue
                    tensor, product = file.get_slice(key), 1
                    for side in tensor.get_shape():
                        product *= side
                    count += product
                    dtypes.add(tensor.get_dtype())
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged or was not written to its end ({error}): save the model again"
            ) from None
    return count, _DTYPES.get(dtypes.pop(), "") if len(dtypes) == 1 else ""


def weight_files(folder: Path) -> list[Path]:
    """List the file of the weights, or all that its index names.

    Raises:
        ValueError: if the index names a file elsewhere, or a file is a link out of the folder.
        OSError: if one is missing.
    """
    if (folder / "model.safetensors").is_file():
        return [resolve_inside(folder, "model.safetensors")]
    index = resolve_inside(folder, "model.safetensors.index.json")
    if not index.is_file():
        raise OSError(f"{folder} holds no model.safetensors; expected a folder that save_pretrained wrote")
    return read_shards_of(index)


def read_optional(folder: Path, name: str) -> dict[str, Any]:
    """Read the object in a JSON file of a folder; empty without the file."""
    return read_json(resolve_inside(folder, name)) if (folder / name).is_file() else {}


def model_kind(folder: Path) -> str:
    """Return what a folder's model is: "segmentation", "classification" or "encoder"."""
    architectures = read_model_config(folder).get("architectures") or [""]
    return next((kind for end, kind in _KINDS.items() if str(architectures[0]).endswith(end)), "encoder")


__all__ = ["model_kind", "read_model_config", "read_optional", "read_weights", "weight_files"]
