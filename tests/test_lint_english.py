"""The English lint refuses what it should, and accepts ordinary technical prose."""

import pytest

from tests.support.lint_english import check_file, fragments, phrases


@pytest.mark.parametrize(
    "line",
    [
        "the file can not be read",
        "num_pictures = 3",
        "write the label maps",
        "label_map[0]",
        "A label-map of the image.",
        "the twin of each kernel",
        "the config that lies beside it",
        "files are whole or not at all",
        "the user is told which",
        "def told(error):",
        "Whoever calls this",
        "a batch, likewise",
        "start anew",
        "the mean over the pixels that count",
        "label of pixels which do not count",
        "where no pixel counts",
        "the number type of the weights",
        "a page without anything from elsewhere",
        "the name of a job, `predict` say.",
        "a prefix, `img_` say; a suffix",
        "numbers have nine digits that count",
        "a stranger's file",
        "a module that lies in the current folder",
    ],
)
def test_refused_phrases_are_reported_with_their_line(line):
    [(number, message), *_] = phrases(f"a good line\n{line}\n")
    assert number == 2
    assert "write:" in message


@pytest.mark.parametrize(
    "line",
    [
        "label_mapping = LabelMapping()",
        "the mask and its labels",
        "a multiple of 32",
        "predict every image",
        "cannot",
        "all pixel counts are 0",
        "strange values",
        "`--bands` say how images are read",
    ],
)
def test_ordinary_lines_pass(line):
    assert list(phrases(line)) == []


@pytest.mark.parametrize(
    "first", ["What is read.", "Whether it fits.", "How far.", "Of the two.", "The same for rows."]
)
def test_docstring_fragments_are_reported(first):
    source = f'def function():\n    """{first}"""\n'
    [(line, message)] = fragments(source)
    assert line == 2
    assert first.split()[0] in message


def test_noun_phrases_imperatives_and_predicates_pass():
    for first in ("Return True if the file fits.", "Network in one table.", "Offset of the tile.", "Howard's rule."):
        assert list(fragments(f'"""{first}"""\n')) == []


def test_a_file_reports_both_kinds_in_order(tmp_path):
    path = tmp_path / "module.py"
    path.write_text('"""What it is."""\n# a picture\n')
    assert [line for line, _ in check_file(path)] == [1, 2]
