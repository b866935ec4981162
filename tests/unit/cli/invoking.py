"""Runs `flowroll` in this process, as its entry point does."""

from typing import Any

from typer.testing import CliRunner, Result

from flowroll.cli import app


def run_cli(*arguments: Any, columns: int = 200) -> Result:
    """The result of a command on a terminal of this width; an exception that no command may end with is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": str(columns)})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def assert_one_line_error(result: Result, message: str) -> None:
    """The user's own mistake: status 1 and one line on stderr."""
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
