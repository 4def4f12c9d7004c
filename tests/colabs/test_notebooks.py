"""Every notebook runs from top to bottom."""

import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted(pathlib.Path(__file__).parents[2].glob("colabs/*.ipynb"))

# What each notebook prints, and the least and the greatest number that may follow it.
RESULTS = {
    "01_samba": {"largest difference:": (0.0, 1e-4), "bits per byte:": (0.0, 9.0)},
    "02_mixers": {
        "prefill and decoding, largest difference:": (0.0, 1e-4),
        "token by token:": (0.0, 1e-4),
        "hybrid     accuracy:": (0.0, 1.0),
    },
    "03_alignment": {
        "largest difference:": (0.0, 1e-4),
        "away from log 2:": (0.0, 1e-6),
        "dpo margin of held-out pairs, rise:": (1e-3, 100.0),
        "simpo margin of held-out pairs, rise:": (1e-3, 100.0),
        "mean reward:": (0.0, 1.0),
    },
}


def test_every_notebook_has_results():
    assert [path.stem for path in NOTEBOOKS] == sorted(RESULTS)


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
    for label, (least, greatest) in RESULTS[path.stem].items():
        assert text.count(label) == 1, label
        assert least <= float(text.split(label)[1].split()[0]) <= greatest, label
