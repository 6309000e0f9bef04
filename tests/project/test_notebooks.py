"""Every notebook runs from the first cell to the last, at small size, in a temporary folder, after any other."""

import os
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client import KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS_PER_CELL = 240


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS, "the glob above finds nothing, so that nothing below is tested"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelManager]:
    """One process for all notebooks: starting it and importing torch takes longer than most of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERSAMPLE_NOTEBOOK_SIZE", "small")
        # The kernel starts in a folder of its own and imports this checkout, installed or not.
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
        manager = KernelManager(kernel_name="python3")
        manager.start_kernel(cwd=str(tmp_path_factory.mktemp("notebooks")))
    yield manager
    manager.shutdown_kernel(now=True)


FRESH = """%reset -f
import matplotlib.pyplot, torch
matplotlib.pyplot.close("all")
matplotlib.rcdefaults()
torch.set_default_dtype(torch.float32)
%matplotlib inline
%reset -f
"""


def run(path: Path, kernel: KernelManager) -> None:
    """Runs a notebook whose names and settings are its own."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FRESH))
    client = NotebookClient(notebook, timeout=SECONDS_PER_CELL, km=kernel)
    try:
        client.execute()
    except CellExecutionError as error:
        pytest.fail(f"{path.name}: a cell raised {error.ename}: {error.evalue}\n\n{error}", pytrace=False)
    finally:
        client.kc.stop_channels()  # the client leaves them to the owner of the kernel


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, kernel: KernelManager) -> None:
    run(path, kernel)


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


def test_a_failing_cell_is_shown(tmp_path: Path, kernel: KernelManager) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("raise KeyError('planted')")])
    nbformat.write(notebook, tmp_path / "planted.ipynb")
    with pytest.raises(pytest.fail.Exception, match="planted"):
        run(tmp_path / "planted.ipynb", kernel)


def test_nothing_is_left_for_the_next_notebook(tmp_path: Path, kernel: KernelManager) -> None:
    for number, source in enumerate(("import torch\nleft = 1", "assert not {'left', 'torch'} & globals().keys()")):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        nbformat.write(notebook, tmp_path / f"{number}.ipynb")
        run(tmp_path / f"{number}.ipynb", kernel)
