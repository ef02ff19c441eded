"""Copies the model card's template and the recipes into what is built; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FILES = ["model_card.md", *sorted(path.as_posix() for path in Path("configuration").rglob("*.toml"))]


class BuildWithFiles(build_py):
    """Builds the package with template and recipes inside; an editable install reads them where they are."""

    def run(self):
        """Build, then copy."""
        super().run()
        if not self.editable_mode:
            for file in FILES:
                target = Path(self.build_lib) / "hf_segformer" / file
                target.parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(file, str(target))

    def get_source_files(self):
        """List the files for a source distribution too."""
        return [*super().get_source_files(), *FILES]


setup(cmdclass={"build_py": BuildWithFiles})
