"""Uploads of a `SegFormerTrainer` to the Hub: the files of its model, nothing of the machine or the user.

The Trainer of Transformers uploads its whole output folder, in which are also the lock of the run, with the user's name
and host, and training_args.bin, with the token.
"""

import shutil
from concurrent.futures import Future
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..hub.model_card import IMAGES

_ARGUMENTS = "training_args.bin"
_MODEL = (
    "config.json",
    "preprocessor_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "*_segformer.py",
)
_PUBLISHED = (*_MODEL, "README.md", "metrics.json", "training.json", *IMAGES)


def upload_model(folder: str | Path, repo_id: str, **options: Any) -> Any:
    """Upload the model, image processor, code, card and figures of a folder, and nothing else that it holds.

    Args:
        folder: `output_dir` of a Trainer.
        repo_id: an existing repository.
        **options: of `HfApi.upload_folder`.

    Returns:
        what `HfApi.upload_folder` returns.
    """
    return HfApi().upload_folder(
        repo_id=repo_id, folder_path=folder, allow_patterns=[*_PUBLISHED], ignore_patterns=["*/*"], **options
    )


def upload_checkpoint(checkpoint: Path, repo_id: str, name: str, **options: Any) -> list[Future]:
    """Begin to upload the model of a checkpoint, by way of the folder that holds it, and the checkpoint itself.

    Args:
        checkpoint: of a Trainer.
        repo_id: an existing repository.
        name: folder in the repository to upload the whole checkpoint to, with what a resume needs; empty for none.
        **options: of `HfApi.upload_folder`.
    """
    for path in checkpoint.iterdir():
        if any(fnmatch(path.name, pattern) for pattern in _MODEL):
            shutil.copy(path, checkpoint.parent)
    jobs = [upload_model(checkpoint.parent, repo_id, run_as_future=True, **options)]
    if name:
        jobs.append(
            HfApi().upload_folder(
                repo_id=repo_id,
                folder_path=checkpoint,
                path_in_repo=name,
                ignore_patterns=[_ARGUMENTS],
                run_as_future=True,
                **options,
            )
        )
    return jobs


__all__ = ["upload_checkpoint", "upload_model"]
