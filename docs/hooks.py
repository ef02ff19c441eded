"""MkDocs hook: copy the repository's files that pages link to into the site.

A link such as `../tests/test_docs.py` works in a checkout as it is. In the site it leads to a copy of that file under
`repository/`, so that pages can cite tests, recipes and measurements with one kind of link.
"""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"(\]\()(\.\./[^)\s#]+)")


def _outside(page: str, target: str) -> str | None:
    """Return the path within the repository of a link that leads out of docs/, or None."""
    path = Path(os.path.normpath(Path("docs", page).parent / target))
    return None if path.is_relative_to("docs") or not (ROOT / path).is_file() else path.as_posix()


def _copy_of(path: str) -> str:
    """Return the place of a repository file's copy in the site; browsers show .txt instead of downloading it."""
    return f"repository/{path}" + ("" if path.endswith((".png", ".svg", ".csv", ".json")) else ".txt")


def on_files(files, config):
    """Add every linked file to the site."""
    pages = [file.src_uri for file in files.documentation_pages()]
    links = {(page, link[1]) for page in pages for link in _LINK.findall((ROOT / "docs" / page).read_text())}
    for path in {path for page, target in links if (path := _outside(page, target))}:
        files.append(File.generated(config, _copy_of(path), content=(ROOT / path).read_bytes()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point such links to the copies."""

    def replace(match):
        path = _outside(page.file.src_uri, match[2])
        if path is None:
            return match[0]
        return match[1] + os.path.relpath(_copy_of(path), Path(page.file.src_uri).parent)

    return _LINK.sub(replace, markdown)
