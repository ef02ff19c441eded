"""Download of Transformers' common model tests, which its wheel lacks, into `.cache/`.

The source distribution of the installed version contains them. `make install` runs this, so that the tests need no
network.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache"


def main() -> None:
    """Download the source distribution, keep its `tests/*.py`, drop the rest."""
    release = version("transformers")
    target = CACHE / f"transformers-tests-{release}"
    if (target / "tests" / "test_modeling_common.py").exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-binary", "transformers"]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, "--dest", folder, f"transformers=={release}"],
            check=True,
        )
        archive = next(Path(folder).glob("transformers-*.tar.gz"))
        with tarfile.open(archive) as tar:
            root = f"transformers-{release}/tests/"
            for member in tar.getmembers():
                name = member.name.removeprefix(root)
                if member.name.startswith(root) and name.endswith(".py") and "/" not in name:
                    tar.extract(member, folder, filter="data")
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        shutil.move(Path(folder) / f"transformers-{release}" / "tests", target / "tests")


if __name__ == "__main__":
    main()
