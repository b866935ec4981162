"""Holds the `flowroll` command. Importing it loads neither torch nor a model library; each command imports what it needs."""

from flowroll.errors import MissingExtraError
from flowroll.extras import extra_for

try:
    with extra_for("The flowroll command", "client"):
        from flowroll.cli.app import app
except MissingExtraError as error:
    _message = error.message

    def app(*, prog_name: str = "") -> None:  # type: ignore[misc]
        """Says what to install."""
        raise SystemExit(f"Error: {_message}")


__all__ = ["app"]
