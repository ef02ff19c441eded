"""The command `segformer` in tests: run in this process, and its one-line errors."""

from hf_segformer.cli.main import main


def run(*arguments) -> int:
    """Run a command in this process and return its exit status."""
    return main([str(argument) for argument in arguments])


def assert_one_line(stderr: str, *words) -> None:
    """Check that stderr is one line, from the program, with every word in it."""
    assert stderr.startswith("segformer: ")
    assert stderr.count("\n") == 1
    for word in words:
        assert str(word) in stderr


def assert_usage_error(arguments, capsys, *words) -> None:
    """Check that a command refuses its arguments with status 2, in one line with every word in it."""
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert_one_line(captured.err, *words)
