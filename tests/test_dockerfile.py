"""The Dockerfile, as far as it can be checked without Docker: sources, arguments, health check, stop signal."""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

from hf_segformer import SegFormerImageProcessor
from hf_segformer.cli.main import parse

ROOT = Path(__file__).resolve().parent.parent
NEEDS_GRADIO = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")


def instructions():
    """Pairs of instruction and arguments, continued lines joined."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(re.split(r"\s+", line, maxsplit=1)) for line in lines]


def arguments_of(name):
    return [arguments for instruction, arguments in instructions() if instruction == name]


def command_of(name):
    """The list of an instruction in exec form."""
    [arguments] = arguments_of(name)
    return json.loads(arguments[arguments.index("[") :])


def sources():
    """Files and folders that are copied into the image, without those of build arguments."""
    return [source for each in arguments_of("COPY") for source in each.split()[:-1] if not source.startswith("$")]


def test_every_source_exists_and_is_not_ignored():
    assert len(sources()) >= 8
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for source in sources():
        assert (ROOT / source).exists(), source
        if tracked:
            assert any(name == source or name.startswith(f"{source}/") for name in tracked), f"{source} is not in git"
        assert not any(fnmatch(source, pattern.removeprefix("**/")) for pattern in patterns), f"{source} is ignored"


def test_the_stages_build_on_a_pinned_python_and_do_not_run_as_root():
    bases = [arguments.split()[0] for arguments in arguments_of("FROM")]
    names = [arguments.split()[2] for arguments in arguments_of("FROM") if " AS " in arguments]
    assert bases == ["python:3.12-slim", "page", "page"]
    assert names == ["page", "baked"]
    assert arguments_of("USER") == ["segformer"]
    order = [name for name, _ in instructions()]
    assert max(index for index, name in enumerate(order) if name == "RUN") < order.index("USER")
    minimum = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert tuple(map(int, minimum.removeprefix(">=").split("."))) <= (3, 12)
    constraints = (ROOT / "constraints.txt").read_text()
    for package in ("torch", "transformers", "gradio"):
        assert re.search(rf"^{package}==", constraints, re.MULTILINE)


def test_the_command_parses_and_its_port_is_the_one_that_is_checked():
    assert command_of("ENTRYPOINT") == ["segformer"]
    arguments = parse(command_of("CMD"))
    assert (arguments.command, arguments.model, arguments.host) == ("app", "/model", "0.0.0.0")
    assert arguments_of("EXPOSE") == [str(arguments.port)]
    assert f"http://127.0.0.1:{arguments.port}/" in command_of("HEALTHCHECK")[-1]


@pytest.mark.slow
def test_the_copied_files_build_the_package(tmp_path):
    folder = tmp_path / "src"
    folder.mkdir()
    for source in sources():
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, folder / source, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, folder)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "wheel"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path), str(folder)]
    subprocess.run([*pip, *options], check=True)
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"segformer_command.py", "hf_segformer/model_card.md", "hf_segformer/app/server.py"} <= names
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_segformer").rglob("*.py")} <= names


@NEEDS_GRADIO
@pytest.mark.slow
def test_the_health_check_answers_while_the_page_is_served_and_the_stop_signal_ends_it(model, tmp_path):
    model.save_pretrained(tmp_path)
    SegFormerImageProcessor(size=64).save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    [old] = arguments_of("EXPOSE")
    changed = {"/model": str(tmp_path), old: port, "0.0.0.0": "127.0.0.1"}
    arguments = [changed.get(each, each) for each in command_of("CMD")]
    check = [sys.executable, *(each.replace(f":{old}/", f":{port}/") for each in command_of("HEALTHCHECK")[1:])]
    assert subprocess.run(check, capture_output=True).returncode != 0
    program = [sys.executable, "-m", "hf_segformer", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as page:
        try:
            assert f":{port}" in page.stdout.readline()
            assert subprocess.run(check, capture_output=True).returncode == 0
        finally:
            page.send_signal(signal.SIGTERM)
        assert page.wait(60) == 0
