"""Takes the model card's template into what is built; all else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

TEMPLATE = "model_card.md"


class BuildWithTemplate(build_py):
    """Builds the package with the template beside its modules; an editable install reads it where it is."""

    def run(self):
        """Build, then copy."""
        super().run()
        if not self.editable_mode:
            self.copy_file(TEMPLATE, str(Path(self.build_lib) / "hf_segformer" / TEMPLATE))

    def get_source_files(self):
        """What a source distribution needs, too."""
        return [*super().get_source_files(), TEMPLATE]


setup(cmdclass={"build_py": BuildWithTemplate})
