"""MkDocs hooks: copy the repository's files that pages link to into the site, and list the options of the commands.

A link such as `../tests/test_docs.py` works in a checkout as it is. In the site it leads to a copy of that file under
`repository/`, so that pages can cite tests, recipes and measurements with one kind of link.

The page of the command line gets the options from the argument parsers, so that it lists all of them, with the text of
`--help`.
"""

import argparse
import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
OPTIONS_MARK = "<!-- options of every command -->"
_LINK = re.compile(r"(\]\()(\.\./[^)\s#]+)")


def _outside(page: str, target: str) -> str | None:
    """Return the path within the repository of a link that leads out of docs/, or None."""
    path = Path(os.path.normpath(Path("docs", page).parent / target))
    return None if path.is_relative_to("docs") or not (ROOT / path).is_file() else path.as_posix()


def _copy_of(path: str) -> str:
    """Return the place of a repository file's copy in the site; browsers show .txt instead of downloading it."""
    return f"repository/{path}" + ("" if path.endswith((".png", ".svg", ".csv", ".json")) else ".txt")


def options_of_commands() -> str:
    """Return a section for each command: its description, and a table of its arguments and its own options."""
    from segformer_command import defer_package

    defer_package()  # the parsers need no PyTorch
    from hf_segformer.cli.main import build_parser

    _, commands = build_parser()
    return "\n\n".join(
        f"## segformer {name}\n\n{_as_markdown(parser.description or '')}\n\n{_table_of(parser)}"
        for name, parser in commands.items()
    )


def _table_of(parser: argparse.ArgumentParser) -> str:
    """Return the table of a parser's arguments and options, with a row for the title of each group after the first."""
    formatter = parser._get_formatter()
    lines = ["| option | meaning |", "|---|---|"]
    for number, group in enumerate(parser._action_groups):
        rows = [
            f"| `{formatter._format_action_invocation(action)}` | {_as_markdown(formatter._expand_help(action))} |"
            for action in group._group_actions
            if action.help not in (None, argparse.SUPPRESS) and action.dest not in ("help", "debug")
        ]
        if rows and number > 1:  # the first two are argparse's own: arguments and options
            lines.append(f"| **{group.title}** | |")
        lines += rows
    return "\n".join(lines)


def _as_markdown(text: str) -> str:
    """Escape the signs of a help text that Markdown would take for its own."""
    return re.sub(r"([*|])", r"\\\1", " ".join(text.split())).replace("<", "&lt;")


def on_files(files, config):
    """Add every linked file to the site."""
    pages = [file.src_uri for file in files.documentation_pages()]
    links = {(page, link[1]) for page in pages for link in _LINK.findall((ROOT / "docs" / page).read_text())}
    for path in {path for page, target in links if (path := _outside(page, target))}:
        files.append(File.generated(config, _copy_of(path), content=(ROOT / path).read_bytes()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point such links to the copies, and list the options of the commands."""

    def replace(match):
        path = _outside(page.file.src_uri, match[2])
        if path is None:
            return match[0]
        return match[1] + os.path.relpath(_copy_of(path), Path(page.file.src_uri).parent)

    markdown = _LINK.sub(replace, markdown)
    return markdown.replace(OPTIONS_MARK, options_of_commands()) if OPTIONS_MARK in markdown else markdown
