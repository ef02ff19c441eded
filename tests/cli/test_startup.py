"""The light entry point: help and usage errors import nothing heavy, Ctrl-C is one line, the package is one object.

No test asserts a time: what is checked is that PyTorch, Transformers and the like are not imported.
"""

import os
import signal
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

import segformer_command

COMMANDS = ("train", "pretrain", "evaluate", "predict", "export", "convert", "push", "app", "info", "bench")
HEAVY = ("torch", "transformers", "numpy", "PIL", "datasets", "accelerate", "huggingface_hub", "evaluate")

RUN = f"""
import sys
import segformer_command
status = segformer_command.main(sys.argv[1:])
print("status", status, [name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""

# A package as heavy as one likes: its __init__ says that it has begun, and waits.
SLOW_PACKAGE = """
import sys
import segformer_command

class Loader:
    def create_module(self, spec): return None
    def exec_module(self, module):
        print("loading", flush=True)
        try:
            import time
            time.sleep(60)
        except BaseException:
            print("swallowed", flush=True)

segformer_command.defer_package()
sys.modules["hf_segformer"].__spec__.loader = Loader()
sys.exit(segformer_command.main())
"""


def python(code, *arguments, **options):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_the_command_is_installed():
    [script] = entry_points(group="console_scripts", name="segformer")
    assert script.load() is segformer_command.main


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("train", "--list"),
        ("pretrain", "--list"),
        *((command, "--help") for command in COMMANDS),
    ],
)
def test_help_and_version_import_nothing_heavy(arguments):
    result = python(RUN, *arguments)
    assert result.stdout.startswith(("usage: segformer", "segformer ", "ade20k_b0 ", "imagenet_b0 "))
    assert result.stderr == "status 0 []\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inof"], "unknown command 'inof'; did you mean 'info'?"),
        ([], "required: COMMAND"),
        (["info"], "required: source"),
        (["info", "b0", "--num-labls", "3"], "unknown option '--num-labls'; did you mean '--num-labels'?"),
        (["info", "b0", "--size", "128"], "got '128'; expected HEIGHTxWIDTH in pixels"),
        (["info", "b0", "--num-labels", "0"], "got '0'; expected a whole number of at least 1"),
        (["bench", "b0", "--size", "16x128"], "--size is 16x128; expected sides of at least 32"),
        (["convert", "a", ".", "--to", "keras"], "invalid choice: 'keras'"),
        (["convert", "a", "."], "expected a new or an empty folder"),
        (["predict", "model"], "required: -o/--output-dir"),
        (["predict", "model", "-o", "out"], "expected either images"),
        (
            ["predict", "model", "a.png", "-o", "out", "--stride", "32"],
            "--stride is 32; expected 0 without a sliding window: set --sliding-window",
        ),
        (["predict", "model", "a.png", "-o", "out", "--scales", "0"], "--scales is [0.0]"),
        (["predict", "model", "a.png", "-o", "out", "--legend", "below"], "expected together with --overlay"),
        (["predict", "model", "a.png", "-o", "out", "--format", "parquet", "--overlay"], "use --format png"),
        (["evaluate", "model"], "expected images with masks"),
        (["evaluate", "model", "--images", "missing", "--masks", "."], "--images is missing; expected a folder"),
        (["export", "a", "new", "--to", "onnx", "--int8", "static"], "add --calibration-dir DIR"),
        (["export", "a", "new", "--to", "onnx", "--fp16", "--include-processing"], "--fp16 is given with"),
        (["export", "a", "new", "--to", "torch", "--fp16"], "expected --to onnx or transformers.js"),
        (["evaluate", "model", "--recipe", "shapes_b0", "data.rot=x"], "did you mean 'data.root'?"),
        (["evaluate", "model", "--recipe", "shapes_b0", "--flip"], "set evaluation.flip=VALUE instead"),
        (["train"], "--list"),
        (["train", "shapes_b1"], "there is no recipe shapes_b1"),
        (["train", "shapes_b0", "trainer.max_step=3"], "did you mean 'trainer.max_steps'?"),
        (["train", "shapes_b0", "evaluation.stride=64"], "evaluation.stride is 64"),
        (["pretrain", "masked_b0", "data.root=.", "augmentation.mixup=1"], "set augmentation.mixup=0"),
        (
            ["predict", "model", "a.png", "-o", "out", "--value-range", "9,5"],
            "--value-range is '9,5'; expected LOW,HIGH",
        ),
        (["predict", "model", "--dataset", "d", "-o", "out", "--pages"], "--pages is given with --dataset"),
        (["app", "model", "--port", "70000"], "got '70000'; expected a whole number from 1 to 65535"),
    ],
)
def test_usage_errors_import_nothing_heavy(arguments, words, tmp_path):
    (tmp_path / "file").touch()
    result = python(RUN, *arguments, cwd=tmp_path)
    message, status = result.stderr.splitlines()
    assert message.startswith("segformer: ")
    assert words in message
    assert status == "status 2 []"


def test_a_command_that_runs_registers_the_auto_classes_in_the_same_module_object():
    code = """
import sys
import segformer_command
segformer_command.defer_package()
deferred = sys.modules["hf_segformer"]
assert segformer_command.main(["info", "b0", "--size", "64x64"]) == 0
import hf_segformer
assert hf_segformer is deferred
assert type(hf_segformer) is type(sys)
from transformers import AutoConfig
assert type(AutoConfig.for_model("hf_segformer")) is hf_segformer.SegFormerConfig
assert hf_segformer.cli.main is sys.modules["hf_segformer.cli.main"]
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert "decode head" in result.stdout


def test_a_deferred_package_runs_its_init_when_it_is_used():
    code = """
import sys
import segformer_command
assert segformer_command.main(["info"]) == 2
assert "torch" not in sys.modules
from hf_segformer import SegFormerConfig
from transformers import AutoConfig
assert type(AutoConfig.for_model("hf_segformer")) is SegFormerConfig
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_a_package_whose_init_fails_is_one_line_and_not_left_half_imported():
    code = """
import sys
import segformer_command
sys.modules["transformers"] = None
assert segformer_command.main(["info", "b0"]) == 1
assert "hf_segformer" not in sys.modules
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("segformer: ")
    assert result.stderr.count("\n") == 1
    assert "transformers" in result.stderr


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_during_the_heavy_import_is_one_line():
    """Even where a library swallows the KeyboardInterrupt."""
    command = [sys.executable, "-c", SLOW_PACKAGE, "info", "b0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_restore_interrupt
    )
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (130, "", "segformer: interrupted\n")


def _restore_interrupt():
    """A process that a shell started in the background inherits that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.slow
def test_children_that_spawn_import_the_package_as_usual(tmp_path):
    script = tmp_path / "segformer"  # as the console script: executed again in each child, under another name
    script.write_text(
        "import sys\nfrom segformer_command import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
    )
    arguments = ["bench", "b0", "--size", "32x32", "--no-compile", "--repeats", "1", "--threads", "1"]
    result = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "MiB" in result.stdout or "not known" in result.stdout


def test_the_package_as_a_program_has_the_same_parser():
    result = subprocess.run([sys.executable, "-m", "hf_segformer", "info"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "segformer: the following arguments are required: source (see segformer info --help)\n"
