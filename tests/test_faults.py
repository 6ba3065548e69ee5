"""What users and machines do wrong: one sentence, exit status 2, and nothing is lost."""

import os
import re
import resource
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, STEPS, command
from papermill.translators import PythonTranslator

FLAGS = ["--boundaries", "0.1,0.44", "--steps", "4", "--batch", "8", "--name", "r"]


def start(*arguments, cwd, **env):
    """Start a process as a user would, from another folder; Ctrl-C reaches it."""
    let = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    how = dict(cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT), **env}, preexec_fn=let)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-u", *arguments], **how, **pipes)


# ------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("name", STEPS[1:])  # step zero has no number to give
def test_every_number_has_a_range_and_its_default_lies_in_it(workshop, name):
    numbers = [entry for entry in workshop.read_parameters(name) if type(entry[1]) in (int, float)]
    assert numbers
    for key, default, comment in numbers:
        assert re.search(r"[\[(]\S+, \S+[\])]$", comment), f"{key} has no range"
        assert workshop.check_value(key, default, type(default), comment) == default
        for wrong in (float("nan"), float("inf"), -2, 10**30):
            with pytest.raises(workshop.BadInput, match=f"{key} = "):
                workshop.check_value(key, wrong, type(default), comment)


@pytest.mark.parametrize("name", STEPS)
def test_papermill_understands_every_parameter(workshop, name, caplog):
    cell = (ROOT / f"{name}.py").read_text(encoding="utf-8").split('tags=["parameters"]\n')[1]
    found = PythonTranslator.inspect({"source": cell.split("# %%")[0]})
    assert [p.name for p in found] == [key for key, _, _ in workshop.read_parameters(name)]
    assert caplog.text == ""


@pytest.mark.parametrize(
    "injected, sentence",
    [
        (dict(steps=[1, 2]), r"steps = \[1, 2\] is no int"),
        (dict(steps=None), "steps = None is no int"),
        (dict(name=None), "name = None is no str"),
        (dict(steps=4.7), "steps = 4.7 is no int"),
        (dict(steps=True), "steps = True is no int"),
        (dict(resume="false"), "resume = 'false' is no bool"),
        (dict(resume=1), "resume = 1 is no bool"),
        (dict(lr=float("nan")), r"lr = nan must lie in \[0, 10\]"),
        (dict(stpes=3), "unknown parameter 'stpes'"),
        (dict(steps="7", lr=1, boundaries="0.5"), None),
    ],
)
def test_what_papermill_hands_over_is_checked(workshop, monkeypatch, injected, sentence):
    monkeypatch.setattr(workshop, "NOTEBOOK", True)
    defaults = {key: default for key, default, _ in workshop.read_parameters("04_train")}
    cell = "# Parameters\n" + "".join(f"{key} = {value!r}\n" for key, value in injected.items())
    kernel = {"__name__": "__main__", **defaults, **injected, "In": ["", cell]}
    if sentence:
        with pytest.raises(workshop.BadInput, match=sentence):
            workshop.settings(kernel, "04_train")
    else:
        workshop.settings(kernel, "04_train")
        assert (kernel["steps"], kernel["lr"], kernel["boundaries"]) == (7, 1.0, "0.5")


# ------------------------------------------------------------------------- disks, files, other runs


def test_a_full_disk_during_training(workshop, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # no file grows beyond that
    try:
        with pytest.raises(workshop.BadInput, match="cannot write runs/r/checkpoint.pt"):
            command(4, *FLAGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.rglob("*.part*"))


def test_a_torn_row_of_a_log_is_left_out(workshop, tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "loss_0": 0.5}\n{"step": 2, "lo', encoding="utf-8")
    assert workshop.read_log(tmp_path) == [{"step": 1, "loss_0": 0.5}]


def test_checkpoints_that_do_not_fit(workshop, training):
    command(4, *FLAGS)
    content = workshop.read_checkpoint("runs/r")
    key = next(iter(content["model"]))
    for spoiled in ({key: torch.zeros(3)}, {}):
        del content["model"][key]
        content["model"].update(spoiled)
        with pytest.raises(workshop.BadInput, match=f"does not fit: .*{key}"):
            training.prepare_state(content["settings"], content)


def test_two_runs_of_one_name(workshop, tmp_path):
    claim = f"t = importlib.import_module('{STEPS[0]}'); t.claim_folder('r', False); print('held')"
    other = start("-c", f"import importlib, time; {claim}; time.sleep(99)", cwd=tmp_path)
    assert other.stdout.readline() == "held\n"
    (tmp_path / "r" / "checkpoint.pt").write_text("theirs", encoding="utf-8")
    for resume in (True, False):
        with pytest.raises(workshop.BadInput, match="another process is training in .*--name"):
            workshop.claim_folder(tmp_path / "r", resume)
    other.kill()
    other.communicate()
    workshop.claim_folder(tmp_path / "r", False)  # the lock died with its process
    workshop.claim_folder(tmp_path / "r", False)  # and one's own does not stand in the way
    assert (tmp_path / "r.1" / "checkpoint.pt").read_text(encoding="utf-8") == "theirs"


# ---------------------------------------------------------------------------- signals and memory


def test_ctrl_c_in_the_very_first_moments(tmp_path):
    """It comes from a module that stands in for argparse."""
    stub = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / "argparse.py").write_text(stub, encoding="utf-8")
    done = start(ROOT / "04_train.py", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert (*done.communicate(timeout=60), done.returncode) == ("", "", 130)


def test_sigterm_during_sampling_leaves_nothing_behind(tmp_path):
    flags = ["--name", "pretrained/digits-demo", "--nfe", "2000"]
    process, said = start(ROOT / "05_sample_eval.py", *flags, cwd=tmp_path), ""
    while "sampling" not in said:
        said += (letter := process.stderr.read(1))
        assert letter, said
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "Traceback" not in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_memory_used_up_anywhere_in_a_script_is_one_sentence(workshop, capfd):
    """Such as where a network or a data set is moved to a GPU that others fill."""
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
    with pytest.raises(SystemExit) as end:
        workshop.report_bad_input(type(full), full, None)
    assert end.value.code == 2
    assert re.search(r"^\S+ error: the GPU's memory is used up.* --batch", capfd.readouterr().err)
    workshop.report_bad_input(RuntimeError, RuntimeError("another bug"), None)
    assert capfd.readouterr().err.strip() == "RuntimeError: another bug"


# ---------------------------------------------------------------- identity, names, stages, output


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--name", "../../x"], r"name = '\.\./\.\./x' must be the name of a folder in runs"),
        (["--name", "/x"], "name = '/x' must be"),
        (["--name", "."], r"name = '\.' must be"),
        (["--process", "edm", "--boundaries", "1e-9,1e9"], "leave a stage of edm without times"),
        (["--process", "flow", "--boundaries", "0.99999,0.999999"], "of flow without times"),
        (["--tailored", "--arch", "unified"], "tailored widths are for --arch separate"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_anything_is_made(
    workshop, tmp_path, flags, sentence
):
    with pytest.raises(workshop.BadInput, match=sentence):
        command(4, *FLAGS, *flags)
    assert not list(tmp_path.iterdir())


def test_a_run_knows_its_pictures(workshop, monkeypatch):
    command(4, *FLAGS)
    load = workshop.DATASETS["digits"]["read"]
    monkeypatch.setitem(
        workshop.DATASETS["digits"], "read", lambda root: (load(root)[0].flip(-1), load(root)[1])
    )
    with pytest.raises(workshop.BadInput, match="trained on other pictures: give the --root"):
        command(4, *FLAGS, "--resume")
    with pytest.raises(workshop.BadInput, match="trained on other pictures: give the --root"):
        command(5, "--name", "r", "--samples", "20")


def test_output_that_nobody_takes_ends_a_command_in_silence(tmp_path):
    step = f"{sys.executable} {ROOT / '00_workshop.py'} --check"
    for sink, status in (("> /dev/full", 1), (">&-", 0), ("2>&- >&-", 0)):
        done = subprocess.run(
            f"{step} {sink}", shell=True, cwd=tmp_path, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (status, ""), sink


def test_a_training_saves_before_its_output_is_missed(workshop, monkeypatch):
    plain = workshop.tqdm.set_postfix

    def broken(bar, *args):
        plain(bar, *args)
        if bar.n >= 3:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(workshop.tqdm, "set_postfix", broken)
    with pytest.raises(BrokenPipeError):
        command(4, *FLAGS)
    assert workshop.read_checkpoint("runs/r")["step"] == 4
