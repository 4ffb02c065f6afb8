"""The notebook runs from top to bottom in any folder, and is stored without its outputs."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_stored_without_outputs(notebook):
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    caption = next(cell.source for cell in cells if "load_model" in cell.source)
    assert len([line for line in caption.splitlines() if line]) == 3  # three lines to a caption


@pytest.mark.long
@pytest.mark.mini
def test_it_runs_in_any_folder(notebook, tmp_path):
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    texts = [
        "".join(out.get("text") or out.get("data", {}).get("text/plain", "") for out in cell.outputs) for cell in cells
    ]
    together = "\n".join(texts)
    colour = re.search(r"What color is the shape\? (\w+)", texts[2]).group(1)
    assert f"{colour} " in texts[1]  # the caption and the answer name the same colour
    assert "3 turns here, 4 in the branch" in together
    assert "trained: ['llama_proj.weight', 'llama_proj.bias']" in together
    losses = [float(loss) for loss in together.split("nats per token: ")[1].split(" -> ")]
    assert losses[-1] < losses[0]
    assert list(tmp_path.iterdir()) == []
