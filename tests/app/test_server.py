"""The page as Gradio builds it, and the command; tests/app/test_browser.py opens it in a browser."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys

import pytest
from PIL import Image

from hf_segformer import SegFormerForSemanticSegmentation, SegFormerImageProcessor, SegFormerPredictor
from hf_segformer.app.server import build_app
from hf_segformer.cli.main import main

NEEDS_GRADIO = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")

# Pages are served in processes of their own: Gradio leaves sockets and event loops unclosed, which are errors here.
SETTINGS = """
import json, os, signal, sys, threading
from hf_segformer import SegFormerPredictor
from hf_segformer.app.server import _own_folder, _wait_for_signal, build_app, launch

with _own_folder():
    kept = os.environ["GRADIO_TEMP_DIR"]
    blocks = build_app(SegFormerPredictor.from_pretrained(sys.argv[1]), "streets", [(sys.argv[2], "a street")])
    names = ["share", "share_url", "analytics_enabled", "ssr_mode", "run_history", "footer_links", "stylesheets"]
    names += ["max_file_size", "state_session_capacity"]
    state = {"address": launch(blocks), **{name: getattr(blocks, name) for name in names}, "kept": kept}
    state["network"] = [each.concurrency_id for each in blocks.fns.values() if each.concurrency_limit == 1]
    state["analytics"], state["was_there"] = os.environ["GRADIO_ANALYTICS_ENABLED"], os.path.isdir(kept)
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    _wait_for_signal("here")
    blocks.close(verbose=False)
print(json.dumps(state))
"""


@pytest.fixture
def folder(model, tmp_path):
    """A checkpoint."""
    model.save_pretrained(tmp_path / "streets.v2")
    SegFormerImageProcessor(size={"shortest_edge": 32}, keep_ratio=True).save_pretrained(tmp_path / "streets.v2")
    return tmp_path / "streets.v2"


def one_line(err):
    assert err.startswith("segformer: ")
    assert err.count("\n") == 1
    return err


def command(folder, *options, **environment):
    """`segformer app`, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "hf_segformer", "app", str(folder), "--device", "cpu", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


@NEEDS_GRADIO
@pytest.mark.slow
def test_gradio_is_restricted_to_this_machine(folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GRADIO_SHARE": "true", "GRADIO_ANALYTICS_ENABLED": "True"}
    Image.new("RGB", (90, 60)).save(folder / "street.png")
    arguments = [sys.executable, "-c", SETTINGS, str(folder), str(folder / "street.png")]
    out = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment).stdout
    state = json.loads(out.splitlines()[-1])
    assert state["address"].startswith("http://127.0.0.1:")
    assert (state["share"], state["share_url"]) == (False, None)
    assert (state["analytics_enabled"], state["analytics"], state["run_history"]) == (False, "False", False)
    assert (state["ssr_mode"], state["footer_links"], state["stylesheets"]) == (False, [], [])
    assert (state["max_file_size"], state["state_session_capacity"]) == (256 * 2**20, 200)
    assert state["network"] == ["network"] * 2  # one image at a time, an upload or an example
    assert state["was_there"]
    assert not os.path.exists(state["kept"])


@pytest.mark.parametrize("port", ["0", "65536", "-1"])
def test_impossible_port_is_refused(port, folder, capsys):
    assert main(["app", str(folder), "--port", port]) == 2
    assert f"--port: got '{port}'; expected a whole number from 1 to 65535" in one_line(capsys.readouterr().err)


@NEEDS_GRADIO
def test_folder_without_a_model_is_refused(tmp_path, capsys):
    assert main(["app", str(tmp_path)]) == 1
    assert str(tmp_path) in one_line(capsys.readouterr().err)


@NEEDS_GRADIO
def test_model_of_many_channels_has_no_page(tiny_config):
    model = SegFormerForSemanticSegmentation(tiny_config(num_channels=4))
    processor = SegFormerImageProcessor(size=64, image_mean=[0.5] * 4, image_std=[0.5] * 4)
    with pytest.raises(ValueError, match="takes images of 4 channels; expected 1 or 3"):
        build_app(SegFormerPredictor(model, processor), "bands")


def test_without_gradio_one_line_says_what_to_install(folder, capsys, monkeypatch):
    monkeypatch.setattr("hf_segformer.app.server.find_spec", lambda name: None)
    assert main(["app", str(folder)]) == 1
    assert "pip install 'hf-segformer[app]'" in one_line(capsys.readouterr().err)


@NEEDS_GRADIO
@pytest.mark.slow
def test_taken_port_is_refused_and_ctrl_c_leaves_nothing(folder, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    page = command(folder, TMPDIR=str(scratch))
    try:
        address = re.fullmatch(r"streets\.v2 is at http://127.0.0.1:(\d+)/ .*\n", page.stdout.readline())
        second = command(folder, "--port", address[1])
        out, err = second.communicate(timeout=120)
        assert (second.returncode, out) == (1, "")
        assert f"cannot serve on port {address[1]} of 127.0.0.1: choose another --port" in one_line(err)
        assert list(scratch.glob("segformer-app-*"))
        page.send_signal(signal.SIGINT)
        _, err = page.communicate(timeout=120)
    finally:
        page.kill()
    assert (page.returncode, err) == (0, "")
    assert not list(scratch.glob("segformer-app-*"))
