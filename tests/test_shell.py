"""From the shell: help, silent imports, and every error as one sentence with exit status 2."""

import ast
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, STEPS


def run(*arguments, cwd, env=None):
    """Run a step (or -c code) as a user would, from an empty folder."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )


def script(name):
    return str(ROOT / f"{name}.py")


@pytest.mark.parametrize("step", STEPS)
def test_help_names_every_parameter(step, tmp_path):
    cell = (
        (ROOT / f"{step}.py")
        .read_text(encoding="utf-8")
        .split('tags=["parameters"]\n')[1]
        .split("# %%")[0]
    )
    names = [line.split(" = ")[0] for line in cell.splitlines() if " = " in line]
    done = run(script(step), "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert names and all(f"--{name}" in done.stdout for name in names)


@pytest.mark.parametrize("step", STEPS)
def test_import_is_silent_and_leaves_nothing(step, tmp_path):
    done = run("-c", f"import importlib; importlib.import_module('{step}')", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", STEPS)
def test_steps_import_only_earlier_steps(step):
    text = (ROOT / f"{step}.py").read_text(encoding="utf-8")
    used = [other for other in STEPS if f'import_module("{other}")' in text]
    assert all(other < step for other in used)
    assert step == STEPS[0] or used


WRONG = {
    "unknown flag": ("04_train", ["--stpes", "3"], "unrecognized arguments: --stpes 3"),
    "abbreviated flag": ("04_train", ["--data", "digits"], "unrecognized arguments: --data"),
    "no number": ("04_train", ["--steps", "many"], "invalid int value: 'many'"),
    "negative": ("04_train", ["--batch", "-3"], "batch = -3 must lie in [0, 1000000]"),
    "unknown arch": ("04_train", ["--arch", "u-net"], "unknown arch 'u-net'"),
    "unknown process": ("04_train", ["--process", "ve"], "unknown process 've'"),
    "unknown data set": ("04_train", ["--dataset", "imagenet"], "unknown dataset 'imagenet'"),
    "unknown data set in 01": ("01_sde_and_denoiser", ["--dataset", "x"], "unknown dataset 'x'"),
    "empty folder": ("04_train", ["--dataset", "folder", "--root", "."], "no pictures under '.'"),
    "boundaries": ("04_train", ["--boundaries", "0.5,0.2", "--steps", "1"], "strictly ascending"),
    "one boundary": ("04_train", ["--boundaries", "0.5", "--steps", "1"], "need 2 boundaries"),
    "no trunk": ("04_train", ["--start_from", "runs/x"], "there is no checkpoint runs/x"),
    "unknown times": ("04_train", ["--times", "even"], "unknown times 'even'"),
    "odd encoder": ("04_train", ["--encoder", "7"], "encoder = 7 must be an even number"),
    "widths in words": ("04_train", ["--decoders", "wide"], "decoders 'wide' must be channels"),
    "too few decoders": ("04_train", ["--decoders", "8,8", "--steps", "1"], "need 1 boundaries"),
    "stage of nothing": ("04_train", ["--only_stage", "0"], "give its --start_from"),
    "all held out": ("04_train", ["--hold_out", "1797"], "hold_out = 1797 of 1797: leave some"),
    "07 in colour": ("07_beyond", ["--dataset", "cifar10"], "about digits, not cifar10"),
    "nothing to resume": ("04_train", ["--resume"], "there is no checkpoint runs"),
    "unwritable": ("04_train", ["--out", "file/runs"], "cannot write to file/runs"),
    "no alpha": ("02_clustering", ["--alpha", "0", "--samples", "50"], "alpha = 0.0 leaves no"),
    "above one": ("02_clustering", ["--alpha", "2"], "alpha = 2.0 must lie in [0, 1]"),
    "unknown network": ("03_multistage_unet", ["--network", "x"], "unknown network 'x_unified'"),
    "missing run": ("05_sample_eval", ["--name", "x"], "there is no checkpoint runs/x"),
    "negative steps": ("06_ldm", ["--steps", "-1"], "steps = -1 must lie in [0, 1000000000]"),
    "unwritable 06": ("06_ldm", ["--out", "file/runs"], "cannot write to file/runs"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_one_sentence_and_status_2(case, tmp_path):
    step, flags, sentence = WRONG[case]
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    done = run(script(step), *flags, cwd=tmp_path)
    last = done.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert last.startswith(f"{step}.py: error: ") and sentence in last
    assert (tmp_path / "file").read_text(encoding="utf-8") == "kept"


def test_check_prints_the_environment_and_stops(tmp_path):
    done = run(script(STEPS[0]), "--check", cwd=tmp_path)
    assert done.returncode == 0
    for word in ("python 3.", "torch ", "torchvision ", "device ", "threads", "GiB of memory free"):
        assert word in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_check_works_without_torch(tmp_path):
    """On a machine where nothing is installed yet, --check must say so instead of failing."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n", encoding="utf-8")
    done = run(script(STEPS[0]), "--check", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and "no torch here" in done.stdout
    assert "Traceback" not in done.stderr


def test_train_sample_and_resume_from_the_shell(tmp_path):
    """The two commands of a scripted run, and going on where it ended."""
    common = ["--steps", "4", "--batch", "8", "--name", "r", "--decay", "none"]
    first = run(script("04_train"), *common, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    run_folder = tmp_path / "runs" / "r"
    left = {path.name for path in run_folder.iterdir()}
    pictures = {"denoised.png", "loss.png", "progress.png", "samples"}
    assert left == {"checkpoint.pt", "metrics.jsonl", "settings.json"} | pictures
    contradiction = run(script("04_train"), *common, "--seed", "9", "--resume", cwd=tmp_path)
    assert contradiction.returncode == 2
    assert "runs/r was trained with seed = 0, not 9" in contradiction.stderr
    more = run(script("04_train"), *common, "--resume", "--steps", "6", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    assert (run_folder / "metrics.jsonl").read_text(encoding="utf-8").count('"step"') == 6
    many = run(script("05_sample_eval"), "--name", "r", "--samples", "899", cwd=tmp_path)
    assert many.returncode == 2 and "take 898" in many.stderr
    assert not (run_folder / "sets").exists()  # said before anything is drawn
    few = ["--name", "r", "--samples", "20", "--nfe", "3"]
    done = run(script("05_sample_eval"), *few, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (run_folder / "samples.png").exists() and (run_folder / "metrics.json").exists()
    assert "real / real" in done.stdout and "FID" not in done.stdout
    many = run(
        script("05_sample_eval"), "--name", "r", "--samples", "899", "--nfe", "1", cwd=tmp_path
    )
    assert many.returncode == 2 and "more than half the data set" in many.stderr


# what a terminal without a locale is: no character beyond ASCII can be read or printed
ASCII = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("step", STEPS)
def test_help_is_printed_in_any_locale(step, tmp_path):
    done = run(script(step), "--help", cwd=tmp_path, env=ASCII)
    assert done.returncode == 0 and done.stderr == ""
    flag = "--check" if step == STEPS[0] else "--seed"
    assert flag in done.stdout and done.stdout.isascii()


def test_steps_run_in_any_locale(tmp_path):
    """With a run whose name the locale cannot write, too."""
    flags = ["--steps", "2", "--batch", "8", "--boundaries", "0.1,0.44", "--name", "größe"]
    trained = run(script("04_train"), *flags, cwd=tmp_path, env=ASCII)
    assert trained.returncode == 0, trained.stderr
    few = ["--name", "größe", "--samples", "20", "--nfe", "3"]
    drawn = run(script("05_sample_eval"), *few, cwd=tmp_path, env=ASCII)
    assert drawn.returncode == 0, drawn.stderr
    assert "recall ?" in drawn.stdout  # in place of its arrow
    text = (tmp_path / "runs" / "größe" / "metrics.json").read_text(encoding="utf-8")
    assert '"run": "runs/größe"' in text
    wrong = run(script("04_train"), "--arch", "ü", cwd=tmp_path, env=ASCII)
    assert wrong.returncode == 2 and "unknown arch" in wrong.stderr.splitlines()[-1]


def unencoded(text):
    """List the lines of Python code that open text without saying in which encoding."""
    lines = []
    for call in ast.walk(ast.parse(text)):
        if not isinstance(call, ast.Call):
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        owner = getattr(getattr(call.func, "value", None), "id", "")
        mode = [v.value for v in call.args if isinstance(v, ast.Constant)]
        mode += [k.value.value for k in call.keywords if k.arg == "mode"]
        binary = any(isinstance(v, str) and "b" in v and set(v) <= set("rwaxb+") for v in mode)
        opens = name == "open" and owner not in ("Image", "os", "PIL") and not binary
        if opens or name in ("read_text", "write_text", "fdopen"):
            if not any(k.arg == "encoding" for k in call.keywords):
                lines.append(call.lineno)
    return lines


def test_text_is_read_and_written_as_utf_8():
    wrong = ["p.read_text()", "p.write_text(x)", "open(p)", "p.open('a')", "open(b, mode='w')"]
    right = ["p.read_text(encoding='utf-8')", "open(p, 'rb')", "p.open('wb')", "Image.open(p)"]
    assert unencoded("\n".join(wrong)) == [1, 2, 3, 4, 5] and unencoded("\n".join(right)) == []
    files = [
        path
        for pattern in (
            "*.py",
            "experiments/*.py",
            "benchmarks/*.py",
            "notebooks/*.py",
            "docs/*.py",
            "pretrained/*.py",
            "tests/*.py",
        )
        for path in sorted(ROOT.glob(pattern))
    ]
    assert len(files) > 15
    found = {path.name: unencoded(path.read_text(encoding="utf-8")) for path in files}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_a_run_branches_off_from_another_and_is_resumed(tmp_path):
    common = ["--batch", "9", "--encoder", "4", "--stages", "mixed", "--decay", "linear"]
    cuts = ["--boundaries", "0.1,0.44"]
    trunk = ["--arch", "unified", "--times", "stages", "--steps", "2", "--name", "trunk"]
    done = run(script("04_train"), *common, *cuts, *trunk, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    branch = [*common, *cuts, "--decoders", "4,4,4", "--start_from", "runs/trunk", "--name", "b"]
    done = run(script("04_train"), *branch, "--steps", "5", "--weight", "min-snr", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "runs" / "b" / "metrics.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["step"] for line in log.splitlines()] == [3, 4, 5]
    assert '"loss_2"' in log
    more = [*branch, "--weight", "min-snr", "--resume", "--steps"]
    again = run(script("04_train"), *more, "5", cwd=tmp_path)  # finished already
    assert again.returncode == 0, again.stderr
    longer = run(script("04_train"), *more, "7", cwd=tmp_path)
    assert longer.returncode == 2
    assert "falls to zero at step 5: give --steps that, or go on" in longer.stderr
    other = [*branch, "--weight", "none", "--resume", "--steps", "5"]
    other = run(script("04_train"), *other, cwd=tmp_path)
    assert other.returncode == 2 and "trained with weight = 'min-snr', not ''" in other.stderr


def test_a_gpu_trains_and_draws(card, tmp_path):
    for step, *flags in (("04_train", "--steps", "3"), ("05_sample_eval", "--samples", "20")):
        done = run(script(step), "--batch", "8", *flags, cwd=tmp_path, env=card)
        assert done.returncode == 0 and " on cuda" in done.stdout, done.stderr


def test_a_hidden_gpu_can_be_had_by_every_process_of_the_tests():
    """The processes of `pytest -n` are started when the first one has hidden it already."""
    worker = [sys.executable, "-c", "import conftest; print(conftest.VISIBLE)"]
    first = f"import conftest, subprocess; subprocess.run({worker})"
    fresh = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    for key in ("CUDA_VISIBLE_DEVICES", "VISIBLE_TO_TESTS"):
        fresh.pop(key, None)
    for visible, expected in (({}, "0"), ({"CUDA_VISIBLE_DEVICES": "3"}, "3")):
        how = dict(env=fresh | visible, capture_output=True, text=True)
        done = subprocess.run([sys.executable, "-c", first], **how)
        assert done.stdout.strip() == expected, done.stderr
