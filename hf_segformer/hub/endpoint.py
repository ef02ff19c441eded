"""Files by which a published model answers as a Hugging Face Inference Endpoint: handler.py and requirements.txt."""

from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement

# Packages that the handler and the shipped code import, or by which Transformers loads the weights.
_NEEDED = ("torch", "transformers", "numpy", "pillow", "safetensors")
_MARK = "published by `segformer push`"
HANDLER_FILES = ("handler.py", "requirements.txt")


def handler_files() -> dict[str, bytes]:
    """Collect the files by name.

    Raises:
        OSError: if this package is not installed, so that its requirements are unknown.
    """
    try:
        needed = [Requirement(line) for line in requires("hf-segformer") or ()]
    except PackageNotFoundError as error:
        raise OSError(
            "hf-segformer is not installed, so that the requirements of handler.py are unknown: pip install ., or give "
            "--without-handler (with_handler=False)"
        ) from error
    lines = [
        f"# of handler.py, {_MARK}",
        *(str(each) for each in needed if each.marker is None and each.name in _NEEDED),
    ]
    handler = Path(__file__).with_name("endpoint_handler.py").read_bytes()
    return {"handler.py": handler, "requirements.txt": "".join(f"{line}\n" for line in lines).encode()}


def is_own(content: str) -> bool:
    """Return True if a published file of that name is one of these."""
    return _MARK in content


__all__ = ["HANDLER_FILES", "handler_files", "is_own"]
