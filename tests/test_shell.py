"""From the shell: help, silent imports, a run of every step, and errors as one sentence."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

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


def test_a_run_goes_on_with_the_same_settings_alone(ran, workshop, monkeypatch):
    monkeypatch.chdir(ran[0])
    with pytest.raises(workshop.BadInput, match="digits-multistage was made with seed = 0, not 9"):
        command(4, *RUNS[4], "--resume", "--seed", 9)
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


WRONG = [
    (4, "--stpes 3", "unrecognized arguments: --stpes 3"),
    (4, "--data digits", "unrecognized arguments: --data"),  # no abbreviation
    (4, "--steps many", "invalid int value: 'many'"),
    (4, "--batch -3", "batch = -3 must lie in [0, 1000000]"),
    (4, "--arch u-net", "unknown arch 'u-net'"),
    (4, "--process ve", "unknown process 've'"),
    (4, "--dataset imagenet", "unknown dataset 'imagenet'"),
    (4, "--dataset folder --root .", "no pictures under '.'"),
    (4, "--boundaries 0.5,0.2 --steps 1", "leave a stage of vp without times"),
    (7, "--dataset cifar10", "about digits, not cifar10"),
    (4, "--resume", "there is no runs"),
    (4, "--out file/runs", "cannot write to file/runs"),
    (2, "--alpha 0 --samples 50", "alpha = 0.0 leaves no"),
    (3, "--network x", "unknown network 'x_unified'"),
    (5, "--name x", "there is no runs/x"),
    (6, "--out file/runs", "cannot write to file/runs"),
]


@pytest.mark.parametrize("number, flags, sentence", WRONG)
def test_errors_are_one_sentence(number, flags, sentence, workshop, capfd):
    Path("file").write_text("kept", encoding="utf-8")
    with pytest.raises((workshop.BadInput, SystemExit)) as caught:
        command(number, *flags.split())
    if caught.type is SystemExit:  # argparse has printed it
        assert caught.value.code == 2 and sentence in capfd.readouterr().err
    else:
        assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert Path("file").read_text(encoding="utf-8") == "kept"


def test_a_process_says_the_sentence_and_ends_with_status_2(tmp_path):
    done = start(ROOT / "04_train.py", "--arch", "u-net", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("04_train.py: error: unknown arch 'u-net'")
