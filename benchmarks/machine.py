"""The machine of a measurement: processor with instruction set and caches, system, versions and commit."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hf_segformer.cpu_runtime_segformer import first_processor

ROOT = Path(__file__).resolve().parent.parent
_RUNTIMES = ("onnxruntime", "openvino")
_INSTRUCTIONS = {"AVX512": "AVX-512", "DEFAULT": "baseline"}  # other names of PyTorch's are shown as they are
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@cache
def machine() -> dict[str, Any]:
    """Processor, system and versions, as each record holds them."""
    return {
        "processor": _processor(),
        "instructions": instructions(),
        "caches": _caches(),
        "cores": os.cpu_count(),
        "gibibytes": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "runtimes": " ".join(f"{name} {found}" for name in _RUNTIMES if (found := _version(name))),
        "commit": _commit(),
    }


def instructions() -> str:
    """Widest instruction set that PyTorch uses here, "limited" if the environment keeps it from wider ones.

    Raises:
        ValueError: if it keeps PyTorch from them, but not oneDNN and MKL.
    """
    found = torch.backends.cpu.get_cpu_capability()
    name = _INSTRUCTIONS.get(found, found)
    if found == "AVX512" or "ATEN_CPU_CAPABILITY" not in os.environ or not _has_avx512():
        return name
    missing = [each for each in ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS") if each not in os.environ]
    if missing:
        raise ValueError(f"ATEN_CPU_CAPABILITY is set, but not {', '.join(missing)}: set all three, or none")
    return f"{name} limited"


def _has_avx512() -> bool:
    path = Path("/proc/cpuinfo")
    return path.exists() and "avx512f" in first_processor(path.read_text("utf-8")).get("flags", "").split()


def processor_of_cpuinfo(text: str) -> str:
    """Return a processor's name from the text of /proc/cpuinfo, with AMD's generation; "" if there is none."""
    fields = first_processor(text)
    name = fields.get("model name", "").strip()
    if fields.get("vendor_id") != "AuthenticAMD":
        return name
    zen = _zen(int(fields["cpu family"]), int(fields["model"]))
    return f"{name} ({zen})" if zen else name


def _zen(family: int, model: int) -> str:
    """AMD's generation by the numbers of CPUID: cloud machines hide the processor's name."""
    if family == 25:
        return "Zen 4" if model // 16 in (1, 6, 7, 10) else "Zen 3"
    return {26: "Zen 5"}.get(family, "")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    name = processor_of_cpuinfo(cpuinfo.read_text()) if cpuinfo.exists() else ""
    return name or platform.processor() or "not known"


def _caches() -> str:
    """Sizes of the first core's data caches, from the first level up; "" where the system does not tell."""
    sizes = {}
    for folder in sorted(_CACHES.glob("index*")):
        kind, level, size = ((folder / name).read_text().strip() for name in ("type", "level", "size"))
        if kind != "Instruction":
            sizes[level] = f"L{level} {int(size.removesuffix('K')):,} KiB"
    return ", ".join(sizes.values())


def _memory() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (AttributeError, ValueError, OSError):  # not every system tells
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit that was measured, marked where files of code differ from it."""

    def git(*arguments: str) -> str:
        try:
            result = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
        except OSError:  # there is no git
            return ""
        return result.stdout.strip()

    changes = git("status", "--porcelain", "--", "hf_segformer", "benchmarks/*.py")
    return (git("rev-parse", "--short=10", "HEAD") or "not known") + ("+changes" if changes else "")
