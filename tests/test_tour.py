"""The notebook: what is committed is whole, and it runs."""

import json
import re
from pathlib import Path

import pytest

TOUR = Path(__file__).parent.parent / "results" / "tour" / "tour.ipynb"


def printed(notebook):
    """All that the notebook's cells print."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return "".join("".join(x["text"]) for cell in cells for x in cell["outputs"] if x["output_type"] == "stream")


@pytest.mark.quick
def test_committed_outputs_are_those_of_one_run_from_the_top():
    notebook = json.loads(TOUR.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [x for cell in code for x in cell["outputs"]]
    assert not [x for x in outputs if x["output_type"] == "error" or x.get("name") == "stderr"]
    kinds = [kind for x in outputs for kind in x.get("data", {})]
    assert (kinds.count("image/png"), kinds.count("image/gif")) == (5, 1)
    assert TOUR.stat().st_size < 300_000
    text = "".join("".join(cell["source"]) for cell in notebook["cells"])
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (TOUR.parent / link).exists(), link
    assert 'pip install -e ".[notebook]"' in text


@pytest.mark.slow
def test_runs(tmp_path):
    """In a folder of its own; the swing-up is learned in each part: random actions earn -1,200."""
    nbformat, nbclient = (pytest.importorskip(name) for name in ("nbformat", "nbclient"))
    notebook = nbformat.reads(TOUR.read_text(), 4)
    nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = printed(notebook)
    for returns in re.findall(r"each epoch:\s*\[([^\]]+)\]", said):
        assert max(map(float, returns.split())) > -400
    assert float(re.search(r"final greedy return: (\S+)", said)[1]) > -200
