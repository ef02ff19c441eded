"""What the tests of the Hub share: the shipped files, the model they publish, and `segformer push` in a client."""

from pathlib import Path

import pytest
import transformers

PACKAGE = Path(__file__).resolve().parents[2] / "hf_segformer"
CODE = {path.name for path in PACKAGE.glob("*_segformer.py")}
SEGMENTATION = "AutoModelForSemanticSegmentation"
NEEDS_AUTO_IMAGE_PROCESSOR = pytest.mark.skipif(
    hasattr(transformers.AutoImageProcessor, "_backends"),  # a placeholder, where there is no torchvision
    reason="in this Transformers AutoImageProcessor itself needs torchvision",
)


def run_push(*arguments):
    """Run `segformer push`; returns status, stdout and stderr."""
    import contextlib
    import io
    from unittest import mock

    from hf_segformer.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch("time.sleep"):
        status = main(["push", *arguments])
    return status, out.getvalue(), err.getvalue()


def assert_refused(author, folder, repo_id, *words, options=()):
    """Check that a push fails with one line that holds every word."""
    status, out, err = author(run_push, folder, repo_id, *options)
    assert status == 1
    assert out == ""
    assert err.startswith("segformer: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
