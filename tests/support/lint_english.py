"""Refuse wording that reads as translated or archaic: run by `make lint`.

Two rules, on every tracked source, page, recipe and notebook:

1. A docstring does not begin with a fragment (`FRAGMENTS`): its first line is a noun phrase or an imperative, and that
   of a predicate begins "Return True if".
2. No line matches a pattern of `PHRASES`, which names what to write instead. Identifiers count, too.
"""

import argparse
import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHECKED = (".py", ".md", ".toml", ".ipynb", ".yml", ".yaml", ".cff", ".cfg", "Makefile", "run")
# This file and its test quote what they refuse; the others are written by programs or by other people.
EXEMPT = ("tests/support/lint_english.py", "tests/test_lint_english.py", "tests/node/", "docs/results/")

FRAGMENTS = re.compile(
    r"(What|Whatever|Whether|How|Where|Which|Who|Whoever|Why|Of|As|From|Those|That|So|Also|Nothing|The same)\b"
)
PHRASES = {
    r"\bcan not\b": "cannot",
    r"\blikewise\b": "also, or say it again",
    r"\blabel[- ]?maps?\b|\blabel_maps?(?![a-z])": "mask (ground truth) or segmentation map (prediction)",
    r"pictures?(?![a-z])": "image",
    r"\blabelling\b": "batch inference, prediction or annotation",
    r"\btold\b": "report, name, know",
    r"\b(lie|lies|lay|lying) (in|on|beside|apart|next|under|at|there|over)\b": "is, or stored in",
    r"\btwins?\b": "reference (implementation), or fast path",
    r"\bwhole or not\b|\bwhole, or not\b|\bor not there\b": "atomic",
    r"\banew\b": "again",
    r"\bamid\b": "in the middle of",
    r"\ball the same\b": "anyway, or equal",
    r"\b(whoever|whomever|whosoever)\b": "users who",
    r"\bin words\b(?![:)\]])|\bin one sentence\b": "with a message",
    r"\bput aside\b": "archive, or move",
    r"\bpeople have\b|\bother people's\b": "existing, third-party",
    r"\bunasked\b|\bto be had\b|\bhence\b|\bwherein\b|\bthereof\b|\bhitherto\b|\bunto\b|\blest\b": "modern words",
    r"\bbut for\b": "except",
    r"\bgo on where\b|\bgoes on where\b|\bgo(es)? on (from|with)\b": "resume, continue",
    r"\bnought\b|\bnaught\b": "zero",
    r"\bpixels?,? (that |which )(do(es)? not )?counts?\b|\bpixels? do(es)? not count\b|\bno pixel counts\b": (
        "valid pixels, ignored pixels"
    ),
    r"\bnumber[- ]types?\b": "dtype",
    r"\bfrom elsewhere\b": "from other hosts or folders, or self-contained",
    r"\bsay;|[\"`0-9],? say[.,)]": "such as",
    r"\bdigits that count\b": "significant digits",
    r"\bstrangers?(?![a-z])": "untrusted, or the user",
}
_COMPILED = [(re.compile(pattern, re.IGNORECASE), instead) for pattern, instead in PHRASES.items()]


def fragments(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and message of each docstring that begins with a fragment."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = FRAGMENTS.match(ast.get_docstring(node) or "")
            if found:
                message = f"docstring begins with {found[0]!r}; expected a noun phrase or an imperative"
                yield node.body[0].lineno, message


def phrases(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and message of each refused phrase."""
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, instead in _COMPILED:
            found = pattern.search(line)
            if found:
                yield number, f"{found[0]!r}; write: {instead}"


def check_file(path: Path) -> list[tuple[int, str]]:
    """List the faults of a file, by line."""
    text = path.read_text(encoding="utf-8")
    faults = list(phrases(text))
    if path.suffix == ".py":
        faults += fragments(text)
    return sorted(faults)


def tracked_files() -> list[Path]:
    """List the tracked files that are checked."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    names = [name for name in listed.split("\0") if name.endswith(CHECKED) and not name.startswith(EXEMPT)]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def main() -> int:
    """Print every fault, or with `--count` the number in each file; the status is 1 if there is any."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: all tracked files")
    parser.add_argument("--count", action="store_true", help="print the number of faults per file")
    arguments = parser.parse_args()
    counts: Counter[str] = Counter()
    for path in arguments.files or tracked_files():
        name = str(path.resolve().relative_to(ROOT))
        for line, message in check_file(path):
            counts[name] += 1
            if not arguments.count:
                print(f"{name}:{line}: {message}")
    if arguments.count:
        for name, number in counts.most_common():
            print(f"{number:5d}  {name}")
    if counts:
        print(f"{counts.total()} faults in {len(counts)} files", file=sys.stderr)
    return int(bool(counts))


if __name__ == "__main__":
    sys.exit(main())
