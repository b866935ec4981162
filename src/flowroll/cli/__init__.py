"""The `flowroll` command. Importing it loads no model library; each command imports what it needs."""

from flowroll.cli.app import app

__all__ = ["app"]
