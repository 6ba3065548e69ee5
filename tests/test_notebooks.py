"""The steps as notebooks: the committed ones, run again, and training through papermill."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import papermill
import pytest
import torch
from conftest import ROOT, STEPS, command
from jupytext.cli import jupytext as jupytext_command


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A copy of the project in which papermill has run step 04; built once in all processes."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    (shared / "house").mkdir()  # which fails where another process has built it
    for path in [*ROOT.glob("0*.py"), ROOT / "requirements.txt", ROOT / "jupytext.toml"]:
        shutil.copy(path, shared / "house")
    papermill.execute_notebook(
        jupytext.read(ROOT / f"{STEPS[4]}.py"),
        shared / "house" / "04_train.ipynb",
        dict(steps=6, batch=8, boundaries="0.1,0.44"),
        **dict(kernel_name="python3", language="python", cwd=shared / "house", progress_bar=False),
    )
    return shared / "house"


def test_script_and_papermill_train_the_same_network(house):
    notebook = nbformat.read(house / "04_train.ipynb", 4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    command(4, "--steps", 6, "--batch", 8, "--boundaries", "0.1,0.44")
    one, other = (
        torch.load(folder / "runs/digits-multistage/checkpoint.pt", weights_only=True)
        for folder in (house, Path.cwd())
    )
    for part in ("ema", "model"):
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(one[part][key], other[part][key]) for key in one[part])


def test_nbval_runs_committed_notebooks_again(house):
    """As the README says: every cell again; marked output must come out, a false number is seen."""
    shutil.copytree(ROOT / "notebooks", house / "notebooks")
    false = house / "notebooks" / f"{STEPS[2]}.ipynb"
    text = false.read_text(encoding="utf-8")
    assert text.count("log-SNR [0.348, 0.709]") == 1
    false.write_text(text.replace("log-SNR [0.348,", "log-SNR [0.349,"), encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ((flag, some),) = re.findall(r"^pytest (--nbval\S*) (\S+)", readme, re.MULTILINE)
    asked = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", flag]
    notebooks = sorted(house.glob(some))
    done = subprocess.run([*asked, *notebooks], cwd=house, capture_output=True, text=True)
    said, marked = done.stdout, [path.read_text(encoding="utf-8") for path in notebooks]
    assert sum(text.count("nbval-check-output") for text in marked) > 15
    assert re.search(r"\b1 failed, \d+ passed", said) and "[0.349, 0.709]" in said, said[-3000:]


@pytest.mark.parametrize("step", STEPS)
def test_committed_notebooks_are_executed_and_fresh(step):
    script = jupytext.read(ROOT / f"{step}.py")
    notebook = nbformat.read(ROOT / "notebooks" / f"{step}.ipynb", 4)
    told = lambda cell: (cell.cell_type, cell.source, cell.metadata.get("tags", []))  # noqa: E731
    stale = f"notebooks/{step}.ipynb is staler than its script: make notebooks"
    assert list(map(told, notebook.cells)) == list(map(told, script.cells)), stale
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
    assert "papermill" not in notebook.metadata


def test_scripts_and_notebooks_are_paired_and_a_sync_changes_nothing(tmp_path, capsys):
    Path("notebooks").mkdir()
    names = script, notebook, _ = f"{STEPS[0]}.py", f"notebooks/{STEPS[0]}.ipynb", "jupytext.toml"
    before = [Path(shutil.copy(ROOT / name, name)).read_bytes() for name in names]
    for path, partner in ((script, notebook), (notebook, script)):
        jupytext_command(["--sync", path])
        capsys.readouterr()
        jupytext_command(["--paired-paths", path])
        assert capsys.readouterr().out.split() == [partner]
    assert [Path(name).read_bytes() for name in names] == before
