"""Runs the notebooks and keeps what they show: `python -m tools.notebooks [NAME...]`.

A notebook in the repository has the outputs of its last run, so that it can be read without one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
_TIMEOUT_S = 900


def run(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Runs a notebook's cells in their order, in a kernel of its own.

    Args:
        path: The notebook.
        folder: Where the kernel works.

    Raises:
        CellExecutionError: A cell raised an error; the message has its traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=_TIMEOUT_S, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # Times of the day.
        # What a machine complains of is of no use to a reader.
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    return notebook


def main() -> None:
    """Runs all notebooks, or those that are named, and writes them back."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="their names without .ipynb; default: all")
    names = parser.parse_args().names
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not names or path.stem in names:
            nbformat.write(run(path, FOLDER), path)
            print(path.name)


if __name__ == "__main__":
    main()
