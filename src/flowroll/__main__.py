"""Lets `python -m flowroll` run the `flowroll` command."""

from flowroll.cli import app

if __name__ == "__main__":
    app(prog_name="flowroll")
