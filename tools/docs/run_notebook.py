"""Run a notebook of the documentation and keep what it prints.

`python tools/docs/run_notebook.py docs/tutorials/notebook.ipynb` runs it in the current folder. What goes to standard
error (progress, warnings of libraries) is not kept.
"""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any


def run(path: Path, folder: Path, seconds: int = 600) -> Any:
    """Execute all cells.

    Args:
        path: The notebook.
        folder: Where it runs.
        seconds: After which a cell is given up.

    Returns:
        The notebook with its outputs.

    Raises:
        CellExecutionError: A cell has failed.
    """
    import nbformat  # of the extra docs: the command line can be read without it
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=seconds, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata.pop("language_info", None)
    return notebook


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("notebook", type=Path)
    path = parser.parse_args().notebook
    found = run(path, Path.cwd())
    import nbformat

    nbformat.write(found, path)
