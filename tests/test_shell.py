"""From the shell: help, silent imports, a run of every step, and errors as one sentence."""

import importlib
import os
import subprocess
import sys

import pytest
from conftest import ROOT, STEPS, command

# as a user would run each step, in this order, from one folder
RUNS = [
    ["--check"],
    ["--samples", "2", "--steps", "20"],
    ["--samples", "500", "--pairs", "2"],
    ["--table", "5"],
    ["--steps", "4", "--batch", "8", "--boundaries", "0.1,0.44", "--decay", "none"],
    ["--samples", "20", "--nfe", "3"],
    ["--code_steps", "2", "--steps", "2", "--batch", "8", "--samples", "20", "--nfe", "2"],
    ["--steps", "2", "--samples", "20", "--seeds", "2"],
    ["--samples", "50", "--seeds", "2"],
]


def start(*arguments, cwd):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    asked = [sys.executable, *arguments]
    return subprocess.run(asked, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Every step run once, from a folder that was empty: (the folder, what the processes said)."""
    folder, said = tmp_path_factory.mktemp("ran"), []
    for step, flags in zip(STEPS, RUNS, strict=True):
        said.append(start(ROOT / f"{step}.py", *flags, cwd=folder))
    return folder, said


@pytest.mark.parametrize("number", range(9))
def test_every_step_runs_as_a_command(ran, number):
    done = ran[1][number]
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    said = ["device cpu", "figure: ", "Algorithm 1 ", "table5_1", "images/s on cpu"]
    said += ["real / real", "real / real", "figure: ", "optimal, held out"]
    assert said[number] in done.stdout


def test_what_the_steps_leave(ran):
    folder = ran[0]
    assert {path.name for path in folder.iterdir()} == {"figures", "runs"}
    left = {path.name for path in (folder / "runs" / "digits-multistage").iterdir()}
    files = {"checkpoint.pt", "metrics.jsonl", "settings.json", "metrics.json", "samples.png"}
    assert files <= left and not [name for name in left if ".part" in name]
    log = (folder / "runs/digits-multistage/metrics.jsonl").read_text(encoding="utf-8")
    assert log.count('"step"') == 4


def test_the_demo_ends_with_where_its_results_are(ran, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    execute = importlib.import_module("execute")
    monkeypatch.setattr(execute, "ROOT", ran[0])
    execute.report(ran[0] / "runs", ran[0] / "notebooks")
    said = capsys.readouterr().out
    assert said.count("Fréchet distance") == 2 and "runs/digits-latent/samples.png" in said


def test_a_run_goes_on(ran, workshop, monkeypatch):
    monkeypatch.chdir(ran[0])
    command(4, *RUNS[4], "--resume", "--steps", 6)
    assert workshop.read_log("runs/digits-multistage")[-1]["step"] == 6


@pytest.mark.parametrize("number", range(9))
def test_help_names_every_parameter(number, workshop, capsys):
    command(number, "--help")
    said, names = capsys.readouterr(), [row[0] for row in workshop.read_parameters(STEPS[number])]
    assert said.err == "" and names and all(f"--{name}" in said.out for name in names)


def test_imports_are_silent_and_leave_nothing(tmp_path):
    done = start(
        "-c", f"import importlib\nfor s in {STEPS}: importlib.import_module(s)", cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
