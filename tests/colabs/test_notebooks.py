"""Every notebook runs from top to bottom."""

import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted(pathlib.Path(__file__).parents[2].glob("colabs/*.ipynb"))

RESULT = {"01_samba": "bits per byte:", "02_mixers": "hybrid     accuracy:"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PUREZOO_MINUTES", "0.05")
    monkeypatch.setenv("PUREZOO_WORKDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit notebooks without outputs"
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    text = "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )
    assert RESULT[path.stem] in text
    difference = float(text.split("largest difference:")[1].split()[0])
    assert difference < 1e-4
