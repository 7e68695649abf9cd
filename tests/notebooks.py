"""Small notebooks for tests of what runs them."""

from __future__ import annotations

from pathlib import Path

import nbformat

SETTINGS = 'scale = "pocket"\nseed = 0\nreferences = ""'


def write_notebook(folder: Path, name: str, *cells: str, settings: str = SETTINGS, title: str = "A question?") -> Path:
    """A notebook of a title, a cell of parameters and these cells."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    first = nbformat.v4.new_code_cell(settings, metadata={"tags": ["parameters"]}, id="parameters")
    others = [nbformat.v4.new_code_cell(cell, id=f"cell-{number}") for number, cell in enumerate(cells)]
    notebook.cells = [nbformat.v4.new_markdown_cell(f"# {title}", id="title"), first, *others]
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"
