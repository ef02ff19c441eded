"""Shared helpers of the Hub tests: the shipped code, the command, and refusals."""

import contextlib
import io
from pathlib import Path
from unittest import mock

import pytest
import transformers

PACKAGE = Path(__file__).resolve().parents[2] / "hf_segformer"
CODE = {path.name for path in PACKAGE.glob("*_segformer.py")}
SEGMENTATION = "AutoModelForSemanticSegmentation"
WITH_SPACE = "--with-space"
NEEDS_AUTO_IMAGE_PROCESSOR = pytest.mark.skipif(
    hasattr(transformers.AutoImageProcessor, "_backends"),  # a placeholder, where there is no torchvision
    reason="in this Transformers AutoImageProcessor itself needs torchvision",
)


def run_command(*arguments):
    """Run `segformer push`; returns status, stdout and stderr."""
    from hf_segformer.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch("time.sleep"):
        status = main(["push", *arguments])
    return status, out.getvalue(), err.getvalue()


def assert_refused(author, folder, repo_id, *expected_words, options=()):
    """Assert that a push ends with one line that holds these words."""
    status, out, err = author(run_command, folder, repo_id, *options)
    assert status == 1
    assert out == ""
    assert err.startswith("segformer: ")
    assert err.count("\n") == 1
    for expected in expected_words:
        assert expected in err
