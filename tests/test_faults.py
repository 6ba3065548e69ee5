"""What users and machines do wrong: one sentence, exit status 2, and nothing is lost or moved.

The list of faults is faults.txt; here is how they are made, and what no list can hold.
"""

import ast
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from itertools import product
from pathlib import Path
from string import Template

import filelock
import jupytext
import numpy as np
import papermill
import pytest
import torch
from conftest import ROOT, STEPS, Hostile, command, step
from papermill.translators import PythonTranslator
from PIL import Image

FEW = "--boundaries 0.1,0.44 --steps 4 --batch 8"


def put(patch, path, content=b"x"):
    """Put a file in place of what lies there; without content a folder."""
    path = next(Path().glob(path), Path(path))
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (path if content is None else path.parent).mkdir(parents=True, exist_ok=True)
    if content is not None:
        path.write_bytes(content)


def cut(patch, path, n):
    path = next(Path().glob(path))
    path.write_bytes(path.read_bytes()[: int(n)])


def half(patch, path):
    """Leave half of the pictures of a drawn set, in a file that is whole."""
    path = next(Path().glob(path))
    np.save(path, np.load(path)[:10])


def add(patch, path, *words):
    line = " ".join(words)
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(line + "\n" * line.endswith("}"))


def drop(patch, path):
    shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def change(patch, path, keys, value=None):
    """Give some entries of a checkpoint a value, or all of it."""
    content = torch.load(path, weights_only=True)
    named = {key: ast.literal_eval(value) for key in keys.split(",")} if value else {}
    torch.save({**content, **named} if value else ast.literal_eval(keys), path)


def scale(patch, path, key):
    content = torch.load(path, weights_only=True)
    content[key] = {name: 1.5 * weight for name, weight in content[key].items()}
    torch.save(content, path)


def paint(patch, folder, n, shade=0):
    Path(folder).mkdir(exist_ok=True)
    for i in range(int(n)):
        Image.new("RGB", (9, 9), (9 * i, int(shade), 99)).save(f"{folder}/{i}.png")


def flip(patch):
    known = step(0).DATASETS["digits"]
    pixels, labels = known["read"]("")
    patch.setitem(known, "read", lambda root: (pixels.flip(-1), labels))


def offline(patch):
    for name in ("create_connection", "getaddrinfo"):
        patch.setattr(socket, name, lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))


def lock(patch):
    held = [filelock.FileLock(Path(f"runs/{name}.lock").resolve()) for name in "rl"]
    for one in held:
        one.acquire()
    patch.setattr(step(0), "HELD", held, raising=False)  # until the test is over


def pipe(patch, path):
    Path(path).parent.mkdir(exist_ok=True)
    os.mkfifo(path)


BREAKS = dict(put=put, cut=cut, half=half, add=add, drop=drop, set=change, scale=scale, paint=paint)
BREAKS |= dict(flip=flip, offline=offline, lock=lock, pipe=pipe, keep=lambda patch: None)
BREAKS["env"] = lambda patch, name, value: patch.setenv(name, value)
BREAKS["folder"] = lambda patch, path: put(patch, path, None)
BREAKS["hostile"] = lambda patch, path: put(patch, path, pickle.dumps(Hostile()))


TEXT = (ROOT / "tests" / "faults.txt").read_text(encoding="utf-8")
WORDS = dict(re.findall(r"(?m)^([A-Z]+) = (.+)$", TEXT))


def listed():
    """Read the list: rows of (kind, sentence, command, break) and, where it is harmless, truth."""
    found = []
    for block in Template(TEXT).substitute(WORDS).strip().split("\n\n")[2:]:
        head, *lines = block.split("\n")
        kind, _, sentence = head.partition(": ")
        many = {mark: [] for mark in " !="}
        for line in lines:
            mark, line = (line[0], line[2:]) if line[0] in "!=" else (" ", line)
            start, between, rest = line.rpartition(" ~ ") if mark != "=" else ("", "", line)
            glue = "" if start.endswith("/") else " "
            many[mark] += [start + glue * bool(between) + part for part in rest.split(" | ")]
        for one, broken in product(many[" "], many["!"] or ["keep"]):
            found.append((kind, sentence, one, broken, *many["="]))
    return found


FAULTS = listed()


def named(row):
    return f"{row[0]}: {row[2]} ! {row[3]}"


def break_it(patch, how):
    name, *args = how.split(" ")
    for path in filter(Path.is_file, Path().glob(args[0]) if args else ()):
        content = path.read_bytes()
        path.unlink()  # the house has it, too
        path.write_bytes(content)
    BREAKS[name](patch, *args)


def told(line):
    number, *flags = shlex.split(line)
    return command(int(number), *flags)


def left():
    """Read all that lies here, but for locks and caches."""
    made = {"cache", "data", "figures"}
    files = [
        path for path in Path().rglob("*") if path.suffix != ".lock" and path.parts[0] not in made
    ]
    return {path: path.read_bytes() if path.is_file() else None for path in files}


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Runs of digits, of a folder's pictures and of latents, and a drawn set, in a folder."""
    folder = tmp_path_factory.mktemp("house")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(step(0), "CACHE", folder / "cache")
        known = step(0).DATASETS["digits"]
        patch.setitem(known, "read", cache(known["read"]))
        for name in ("digits", "digits_latent"):  # small: checkpoints are read again and again
            patch.setitem(step(3).NETWORKS[name], "mults", (1,))
        paint(patch, "pics", 6)
        for word in "RFSL":
            told(WORDS[word])
        yield folder


@pytest.fixture
def here(house, row, tmp_path, monkeypatch):
    """The house itself where nothing in it is broken, else a copy."""
    if row[3] == "keep":
        monkeypatch.chdir(house)
    elif len(row) == 4:
        how = dict(ignore=shutil.ignore_patterns("*.lock"), dirs_exist_ok=True)
        shutil.copytree(house, tmp_path, copy_function=os.link, **how)
    return monkeypatch


@pytest.mark.parametrize("row", [row for row in FAULTS if len(row) == 4], ids=named)
def test_a_fault_is_one_sentence_and_nothing_is_lost(row, here, capfd):
    _, sentence, line, broken = row
    break_it(here, broken)
    before = left()
    with pytest.raises((ValueError, SystemExit)) as caught:
        told(line)
    said = str(caught.value)
    if caught.type is SystemExit:  # argparse has told it
        assert caught.value.code == 2
        said = capfd.readouterr().err.strip()
    assert caught.typename in ("BadInput", "SystemExit") and "\n" not in said, said
    *_, flag, value = ["", *line.split()]
    for what, word in (("{flag}", flag.lstrip("-")), ("{value}", value)):
        sentence = sentence.replace(what, re.escape(word))
    assert re.search(sentence, said), said
    assert left() == before


def numbers(line, capsys):
    """Run a command and list the numbers that it leaves and prints."""
    capsys.readouterr()
    told(line)
    found = [row for row in capsys.readouterr().out.split("\n") if "GFLOPs" in row]
    for path in sorted(Path("runs").glob("*/metrics.json")):
        found.append(path.read_text(encoding="utf-8"))
    for path in sorted(Path("runs").glob("*/checkpoint.pt")):
        weights = step(0).read_checkpoint(path.parent)["ema"].values()
        rows = step(0).read_log(path.parent)
        found += [step(0).fingerprint(*weights), *[{**row, "images_per_s": 0} for row in rows]]
    return found


TRUE = {}  # what commands give where nothing is broken


@pytest.mark.parametrize("row", [row for row in FAULTS if len(row) == 5], ids=named)
def test_what_does_no_harm_gives_the_true_numbers(row, house, tmp_path, here, capsys):
    _, _, line, broken, truth = row

    def of(line, *faults):
        place = tmp_path / str(len(list(tmp_path.glob("[0-9]"))))
        shutil.copytree(house, place)
        here.chdir(place)
        here.setattr(step(0), "show_figure", lambda path: step(0).plt.close())
        for how in faults:
            break_it(here, how)
        return numbers(line, capsys)

    found = of(line, broken)
    if truth.startswith("drop "):  # what the same fault gives without something
        assert found == of(line, broken, truth)
    else:
        TRUE[truth] = TRUE.get(truth) or of(truth)
        assert found == TRUE[truth]


def test_the_list_is_long(capsys):
    kinds = {row[0] for row in FAULTS}
    with capsys.disabled():
        print(f"\n{len(FAULTS)} faults of {len(kinds)} kinds")
    assert len(set(FAULTS)) == len(FAULTS) >= 150 and len(kinds) >= 30


# ---------------------------------------------------------------------- processes: eleven real runs


def start(*arguments, cwd, **env):
    """Start a process as a user would, from another folder; Ctrl-C and a lost terminal reach it."""

    def let():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    how = dict(cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT), **env}, preexec_fn=let)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-u", *arguments], **how, **pipes)


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


def test_a_lost_terminal_lets_a_training_save(workshop, tmp_path):
    flags = f"{FEW} --steps 9999 --save_every 2 --name r".split()
    process = start(ROOT / "04_train.py", *flags, cwd=tmp_path)
    while not (tmp_path / "runs/r/checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGHUP)
    said = "".join(process.communicate(timeout=120))
    assert process.returncode == 129 and "Traceback" not in said
    made = workshop.read_checkpoint("runs/r")["step"]
    assert f"saved at step {made:,}: the same command with --resume goes on" in said


@pytest.mark.parametrize(
    "sink, status",
    [("> /dev/full", 1), (">&-", 0), ("2>&- >&-", 0), ("| head -1; exit ${PIPESTATUS[0]}", 141)],
)
def test_output_that_nobody_takes_ends_a_command_in_silence(tmp_path, sink, status):
    asked = f"04_train.py {FEW}" if "head" in sink else "00_workshop.py --check"
    line = f"{sys.executable} {ROOT}/{asked} {sink}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status and "Error" not in done.stderr


def test_torchrun_tells_a_refusal_once(tmp_path):
    asked = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    done = start(*asked, ROOT / "04_train.py", *FEW.split(), "--batch", "9", cwd=tmp_path)
    said = done.communicate(timeout=300)[1]
    sentence = "04_train.py: error: batch = 9 cannot be shared by 2 processes"
    assert done.returncode and said.count(sentence) == said.count("error: ") == 1
    assert not (tmp_path / "runs").exists()


def test_a_working_folder_that_is_gone(tmp_path):
    line = f"mkdir gone; cd gone; rmdir ../gone; {sys.executable} {ROOT}/04_train.py"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("04_train.py: error: this folder is gone")


def test_run_in_somebody_s_own_folder_of_notebooks(workshop, tmp_path):
    (tmp_path / "notebooks").mkdir()
    asked = ["-m", "IPython", "-c", f"%run {ROOT}/04_train.py {FEW} --name r"]
    done = start(*asked, cwd=tmp_path / "notebooks", MPLBACKEND="agg")
    assert "Error" not in "".join(done.communicate(timeout=300)) and done.returncode == 0
    assert not list(tmp_path.rglob("04_*"))  # the figures of a lesson
    assert workshop.read_checkpoint(tmp_path / "notebooks/runs/r")["step"] == 4


def test_papermill_from_another_folder_says_the_way_out(tmp_path):
    for name in STEPS[:2]:
        notebook, how = jupytext.read(ROOT / f"{name}.py"), dict(kernel_name="python3")
        with pytest.raises(papermill.PapermillExecutionError, match="papermill(:| needs) --cwd"):
            papermill.execute_notebook(notebook, "x.ipynb", progress_bar=False, **how)


# ------------------------------------------------------------------------ what the list cannot hold


@pytest.mark.parametrize("name", STEPS[1:])  # step zero has no number to give
def test_every_number_has_a_range_and_its_default_lies_in_it(workshop, name):
    numbers = [entry for entry in workshop.read_parameters(name) if type(entry[1]) in (int, float)]
    assert numbers
    for key, default, comment in numbers:
        assert re.search(r"[\[(]\S+, \S+[\])]$", comment), f"{key} has no range"
        assert workshop.check_value(key, default, type(default), comment) == default


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
        (dict(steps=4.7), "steps = 4.7 is no int"),
        (dict(steps=True), "steps = True is no int"),
        (dict(resume="false"), "resume = 'false' is no bool"),
        (dict(lr=float("nan")), r"lr = nan must lie in \[0, 10\]"),
        (dict(stpes=3), "unknown parameter 'stpes'"),
        (dict(steps="7", lr=1, boundaries="0.5"), None),
    ],
)
def test_what_papermill_hands_over_is_checked(workshop, injected, sentence):
    defaults = {key: default for key, default, _ in workshop.read_parameters("04_train")}
    cell = "# Parameters\n" + "".join(f"{key} = {value!r}\n" for key, value in injected.items())
    kernel = {"__name__": "__main__", **defaults, **injected, "In": ["", cell]}
    if sentence:
        with pytest.raises(workshop.BadInput, match=sentence):
            workshop.settings(kernel, "04_train")
    else:
        workshop.settings(kernel, "04_train")
        assert (kernel["steps"], kernel["lr"], kernel["boundaries"]) == (7, 1.0, "0.5")


def test_a_full_disk_during_training(workshop, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # no file grows beyond that
    try:
        with pytest.raises(workshop.BadInput, match="cannot write runs/r/checkpoint.pt"):
            told(WORDS["R"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.rglob("*.part*"))


def test_memory_used_up_anywhere_in_a_script_is_one_sentence(workshop, capfd):
    """Such as where a network or a data set is moved to a GPU that others fill."""
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
    with pytest.raises(SystemExit) as end:
        workshop.report_bad_input(type(full), full, None)
    assert end.value.code == 2
    assert re.search(r"^\S+ error: the memory is used up.* --batch", capfd.readouterr().err)
    workshop.report_bad_input(RuntimeError, RuntimeError("another bug"), None)
    assert capfd.readouterr().err.strip() == "RuntimeError: another bug"


def test_a_training_saves_before_its_output_is_missed(workshop, monkeypatch):
    plain = workshop.tqdm.set_postfix

    def broken(bar, *args):
        plain(bar, *args)
        if bar.n >= 3:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(workshop.tqdm, "set_postfix", broken)
    with pytest.raises(BrokenPipeError):
        told(WORDS["R"])
    assert workshop.read_checkpoint("runs/r")["step"] == 4
