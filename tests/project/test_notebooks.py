"""Every notebook runs from the first cell to the last, at small size, in a temporary folder."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS_PER_CELL = 240


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS, "the glob above finds nothing, so that nothing below is tested"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSAMPLE_NOTEBOOK_SIZE", "small")
    # The kernel starts in a folder of its own and imports this checkout, installed or not.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=SECONDS_PER_CELL, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    try:
        client.execute()
    except CellExecutionError as error:
        pytest.fail(f"{path.name}: a cell raised {error.ename}: {error.evalue}\n\n{error}", pytrace=False)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_executed(path: Path) -> None:
    """What a reader sees on a web page: every cell in order, with its output, and no error among them."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    remedy = "run `make notebooks` and commit what it writes"
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), remedy
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs, remedy
    assert not [output for output in outputs if output.output_type == "error"], remedy
    assert path.stat().st_size < 500_000, f"{path.name} has {path.stat().st_size} bytes: store smaller figures"


def test_a_failing_cell_is_shown(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("raise KeyError('planted')")])
    nbformat.write(notebook, tmp_path / "planted.ipynb")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(pytest.fail.Exception, match="planted"):
        test_notebook_runs(tmp_path / "planted.ipynb", tmp_path, patch)
