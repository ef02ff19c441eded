"""The newest complete checkpoint of a run.

A run that is cut off while it writes leaves a checkpoint that looks like one and fails, or worse, when it is loaded.
"""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..files import resolve_inside

# Of a run with an average of its weights: those that training continues from. model.safetensors holds the average.
TRAINING_WEIGHTS = "training_weights.pt"
# State of a loss that is a module, which is not saved with the model.
LOSS_STATE = "loss_function.pt"
# The Trainer writes its state last; without the others a run cannot be resumed.
_NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")


def list_checkpoints(folder: Path) -> list[Path]:
    """The folders `checkpoint-N` of a run, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and _step(path).isdecimal()]
    return sorted(found, key=lambda path: int(_step(path)), reverse=True)


def newest_whole_checkpoint(folder: Path) -> Path:
    """Find the newest checkpoint that is whole, and print which newer ones are not.

    Args:
        folder: the run's `trainer.output_dir`.

    Raises:
        ValueError: if there is none; the message says what was found.
    """
    checkpoints = list_checkpoints(folder)
    for checkpoint in checkpoints:
        defect = find_defect(checkpoint)
        if defect is None:
            return checkpoint
        print(f"Skipping {checkpoint}, which is broken: {defect}")
    found = f"none of its {len(checkpoints)} is whole" if checkpoints else "it holds none"
    raise ValueError(f"no checkpoint in {folder} to resume from, {found}: run without --resume to start again")


def find_defect(checkpoint: Path) -> str | None:
    """Return the first defect of a checkpoint, or None: every file is opened, and read where it has a checksum."""
    names = {path.name for path in checkpoint.iterdir()}
    adapters = any(name.startswith("adapter_") for name in names)
    needed = [*_NEEDED, "adapter_config.json" if adapters else "config.json"]
    if "rng_state.pth" not in names:  # several processes save one each, not all of them before the state
        needed += [f"rng_state_{rank}.pth" for rank in range(int(os.environ.get("WORLD_SIZE", 1)))]
    if saved_attributes(checkpoint).get("averaged"):
        needed.append(TRAINING_WEIGHTS)
    missing = [name for name in needed if name not in names]
    if missing:
        return f"{missing[0]} is missing"
    if not any(name.endswith(".safetensors") for name in names):
        return "its weights, *.safetensors, are missing"
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            try:
                _open(path)
            except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
                return f"{path.name} does not open ({error})"
    return None


def read_run_id(checkpoint: Path) -> str | None:
    """Return the identity of the run that wrote a checkpoint; None where it has none."""
    return saved_attributes(checkpoint).get("run_id")


def saved_attributes(checkpoint: Path) -> dict[str, Any]:
    """Return what `SegFormerTrainer` keeps in a checkpoint's trainer_state.json; empty where it has kept nothing."""
    callbacks = read_json_or_empty(checkpoint / "trainer_state.json").get("stateful_callbacks") or {}
    return callbacks.get("SegFormerTrainer", {}).get("attributes", {})


def read_json_or_empty(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty where the file is missing, cut off or holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _open(path: Path) -> None:
    """Open a file as what it is; raises one of the errors above if it is not whole."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt"):  # compares the header with the file's length
            pass
    elif path.suffix in (".pt", ".pth", ".bin"):  # written by torch.save, which is a zip archive
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} in it has a wrong checksum")
    elif path.suffix == ".json":
        values = json.loads(path.read_text(encoding="utf-8"))
        for shard in set(values.get("weight_map", {}).values()):
            resolve_inside(path.parent, str(shard)).stat()
    else:
        path.read_bytes()


def _step(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix("checkpoint-")


__all__ = [
    "TRAINING_WEIGHTS",
    "find_defect",
    "list_checkpoints",
    "newest_whole_checkpoint",
    "read_json_or_empty",
    "read_run_id",
    "saved_attributes",
]
