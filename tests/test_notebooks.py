"""Notebooks are built from their scripts, and their cells run from a fresh kernel."""

import importlib.util
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
spec = importlib.util.spec_from_file_location("notebooks_build", NOTEBOOKS / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
SCRIPTS = [path for path in sorted(NOTEBOOKS.glob("*.py")) if path.name not in build.NO_NOTEBOOKS]


def test_notebooks_are_those_of_their_scripts(capsys):
    assert SCRIPTS and build.main(["--check"]) == 0, capsys.readouterr().err
    for script in SCRIPTS:
        cells = nbformat.read(script.with_suffix(".ipynb"), 4).cells
        assert any("image/png" in o.get("data", {}) for cell in cells for o in cell.get("outputs", [])), script


@pytest.mark.filterwarnings("ignore")  # those of the kernel's own libraries
@pytest.mark.parametrize("script", SCRIPTS, ids=[script.stem for script in SCRIPTS])
def test_notebook_runs(script):
    notebook = build.execute(build.from_script(script))
    assert not any(o.output_type == "error" for cell in notebook.cells for o in cell.get("outputs", []))


def test_a_changed_script_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "HERE", tmp_path)
    script = tmp_path / "toy.py"
    script.write_text("# %% [markdown]\n# # Toy\n\n# %%\nx = 1\n")
    assert build.main(["--check"]) == 1 and "toy.ipynb" in capsys.readouterr().err
    nbformat.write(build.from_script(script), tmp_path / "toy.ipynb")
    assert build.main(["--check"]) == 0
    script.write_text("# %% [markdown]\n# # Toy\n\n# %%\nx = 2\n")
    assert build.main(["--check"]) == 1
