"""scripts/notebook.ipynb runs from top to bottom, and its outputs show what its text says."""

import re

import pytest
from conftest import ROOT

nbclient = pytest.importorskip("nbclient", reason='nbclient is not installed: pip install -e ".[test]"')
nbformat = pytest.importorskip("nbformat", reason='nbformat is not installed: pip install -e ".[test]"')


@pytest.mark.full
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "scripts" / "notebook.ipynb", 4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert float(re.search(r"loss (\d\.\d+)", text)[1]) < 3.2, text  # the untrained model has ln 257 = 5.5
    assert float(re.search(r"largest error (\S+)", text)[1]) < 1e-6, text
    assert re.search(r"out of bounds: .* `inp`, which has 1000 of 4 bytes .* broken_gelu.cu:\d+", text), text
    assert not list(tmp_path.glob("*.cu"))
