"""The steps as notebooks: papermill and nbval at small scale, and the committed ones."""

import importlib
import os
import shutil
import subprocess
import sys

import jupytext
import nbclient
import nbformat
import papermill
import pytest
import torch
from conftest import ROOT, STEPS

SMALL = {
    "00_workshop": {},
    "01_sde_and_denoiser": dict(samples=4, steps=100),
    "02_clustering": dict(samples=1000),
    "03_multistage_unet": {},
    "04_train": dict(steps=6, batch=8),
    "05_sample_eval": dict(samples=40, nfe=5),
    "06_ldm": dict(code_steps=20, steps=6, batch=8, samples=40, nfe=5),
    "07_beyond": dict(steps=20, samples=70, seeds=2),
}


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A copy of the project's steps, in which all have been run by papermill."""
    folder = tmp_path_factory.mktemp("house")
    for path in [*ROOT.glob("0*.py"), ROOT / "requirements.txt"]:
        shutil.copy(path, folder)
    (folder / "notebooks").mkdir()
    for step in STEPS:
        papermill.execute_notebook(
            jupytext.read(folder / f"{step}.py"),
            folder / "notebooks" / f"{step}.ipynb",
            SMALL[step],
            kernel_name="python3",
            cwd=folder,
            progress_bar=False,
        )
    return folder


def test_papermill_runs_every_step_and_leaves_what_it_should(house):
    for name in ("runs/digits-multistage", "runs/digits-latent"):
        for file in ("checkpoint.pt", "samples.png", "metrics.json", "metrics.jsonl"):
            assert (house / name / file).exists()
    for step in STEPS:
        notebook = nbformat.read(house / "notebooks" / f"{step}.ipynb", 4)
        outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
        assert any("image/png" in o.get("data", {}) for o in outputs), f"{step} shows no figure"


def test_the_demo_ends_with_where_its_results_are(house, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    execute = importlib.import_module("execute")
    monkeypatch.setattr(execute, "ROOT", house)
    execute.report(house / "runs", house / "notebooks")
    said = capsys.readouterr().out
    assert said.count("Fréchet distance") == 2 and "runs/digits-latent/samples.png" in said


def test_nbval_runs_the_executed_notebooks_again(house):
    """Every cell again, in the notebook's folder; tables marked for it must come out the same."""
    notebooks = [str(house / "notebooks" / f"{step}.ipynb") for step in STEPS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax", *notebooks],
        cwd=house,
        env={key: value for key, value in os.environ.items() if key != "MPLBACKEND"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout


def weights(folder):
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    return {**content["ema"], **{f"model.{k}": v for k, v in content["model"].items()}}


def test_script_papermill_and_an_edited_cell_train_the_same_network(house):
    flags = ["--steps", "6", "--batch", "8", "--name", "script"]
    subprocess.run([sys.executable, "04_train.py", *flags], cwd=house, check=True)

    notebook = jupytext.read(house / "04_train.py")
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    for old, new in (("steps = 0", "steps = 6"), ("batch = 0", "batch = 8")):
        cell.source = cell.source.replace(old, new)
    cell.source = cell.source.replace('name = ""', 'name = "edited"')
    client = nbclient.NotebookClient(
        notebook, kernel_name="python3", resources={"metadata": {"path": str(house)}}
    )
    client.execute()

    # what papermill left was trained anew by nbval: the earlier one is kept as .1
    by_papermill = weights(sorted((house / "runs").glob("digits-multistage*"))[-1])
    for name in ("script", "edited"):
        found = weights(house / "runs" / name)
        assert found.keys() == by_papermill.keys()
        assert all(torch.equal(found[key], by_papermill[key]) for key in found)


def test_a_parameter_of_the_wrong_type_is_named(house):
    with pytest.raises(papermill.PapermillExecutionError, match="steps = 'many' is no int"):
        papermill.execute_notebook(
            jupytext.read(house / "04_train.py"),
            house / "wrong.ipynb",
            dict(steps="many"),
            kernel_name="python3",
            cwd=house,
            progress_bar=False,
        )


@pytest.mark.parametrize("step", STEPS)
def test_committed_notebooks_are_executed_and_fresh(step):
    script = jupytext.read(ROOT / f"{step}.py")
    notebook = nbformat.read(ROOT / "notebooks" / f"{step}.ipynb", 4)
    sources = [(cell.cell_type, cell.source) for cell in script.cells]
    committed = [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert committed == sources, f"notebooks/{step}.ipynb is staler than its script: make notebooks"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    outputs = [o for cell in code for o in cell.outputs]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert not any(o.output_type == "error" for o in outputs)
    assert "papermill" not in notebook.metadata


def test_scripts_and_notebooks_are_paired():
    script, notebook = f"{STEPS[0]}.py", f"notebooks/{STEPS[0]}.ipynb"
    for path, partner in ((script, notebook), (notebook, script)):
        asked = [sys.executable, "-m", "jupytext", "--paired-paths", path]
        done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.split() == [partner]
