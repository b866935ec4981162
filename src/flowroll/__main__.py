"""`python -m flowroll` is `flowroll`."""

from flowroll.cli import app

if __name__ == "__main__":
    app(prog_name="flowroll")
