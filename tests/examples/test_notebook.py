"""The notebook runs from its first cell to its last, on a tiny model, in a kernel of its own."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples/train_export_swap.ipynb"


def test_the_notebook_runs(device_folder, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    from nbclient import NotebookClient

    monkeypatch.setenv("REFT_EDGE_MODEL", str(device_folder / "hf"))
    monkeypatch.setenv("REFT_EDGE_LAYERS", "all")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(
        "".join(output.get("text", "")) for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "parameters, loss" in said
    assert "wrote report.html" in said
    assert {path.name for path in tmp_path.iterdir()} == {
        *("pirate.safetensors", "emoji.safetensors", "exported", "report.html")
    }
    answers = [line for line in said.splitlines() if line.startswith(("None ", "pirate ", "emoji "))]
    assert len(answers) == 4
    first, *others, last = (line[32:] for line in answers)
    assert first == last
    assert len({first, *others}) == 3


def test_outputs_are_cleared_and_training_takes_five_lines():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    (training,) = (cell for cell in code if "run = reft_edge.train(" in "".join(cell["source"]))
    assert len([line for line in training["source"] if line.strip()]) == 5
