"""Builds the notebooks from their scripts: `python notebooks/build.py [NAME ...]`; `--check` only compares.

A script's cells start with `# %%` (code), `# %% [markdown]` or `# %% [install]`, which is the cell in `install.py`.
Cell ids are the cells' numbers, so that a rebuilt notebook differs only where its script or its pictures do. Building
executes the notebook and keeps what it printed.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import nbformat

HERE = Path(__file__).parent
NO_NOTEBOOKS = ("build.py", "install.py")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def from_script(path: Path) -> nbformat.NotebookNode:
    """Returns the notebook of a script, without outputs."""
    cells = []
    for number, block in enumerate(re.split(r"^# %%", path.read_text(), flags=re.M)[1:]):
        head, _, body = block.partition("\n")
        body = (Path(__file__).parent / "install.py").read_text() if "[install]" in head else body
        body = body.strip("\n")
        if "[markdown]" in head:
            text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.split("\n"))
            cell = nbformat.v4.new_markdown_cell(text)
        else:
            cell = nbformat.v4.new_code_cell(body)
        cell["id"] = f"cell-{number:02d}"
        cells.append(cell)
    return nbformat.v4.new_notebook(cells=cells, metadata=METADATA)


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Runs all cells in a fresh kernel; a cell that raises raises here."""
    from nbclient import NotebookClient

    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day, which no two builds share
    return notebook


def sources(notebook: nbformat.NotebookNode) -> list[tuple[str, str, str]]:
    """Returns id, kind and source of every cell."""
    return [(cell["id"], cell["cell_type"], cell["source"]) for cell in notebook.cells]


def main(argv: list[str] | None = None) -> int:
    """Builds or compares; 1 if a notebook is not that of its script."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    scripts = [p for p in sorted(HERE.glob("*.py")) if p.name not in NO_NOTEBOOKS]
    scripts = [p for p in scripts if not args.names or p.stem in args.names]
    stale = []
    for script in scripts:
        target, made = script.with_suffix(".ipynb"), from_script(script)
        if args.check:
            if not target.exists() or sources(nbformat.read(target, 4)) != sources(made):
                stale.append(target.name)
        else:
            nbformat.write(execute(made), target)
            print(f"built {target.name}")
    if stale:
        print(f"not built from their scripts: {', '.join(stale)}; run python notebooks/build.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
