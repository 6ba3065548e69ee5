"""What users and machines do wrong: one sentence, exit status 2, and nothing is lost."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, STEPS
from papermill.translators import PythonTranslator

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
FLAGS = ["--boundaries", "0.1,0.44", "--steps", "4", "--batch", "8", "--name", "r"]


def start(step, *flags, cwd, **how):
    """Start a step as a user would, from another folder."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / f"{step}.py"), *flags],
        **dict(cwd=cwd, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how),
    )


def fails(step, *flags, cwd, **how):
    """Run a step that must fail as it should: the sentence that it ends with."""
    process = start(step, *flags, cwd=cwd, **how)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 2 and "Traceback" not in said, said
    last = said.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith(f"{step}.py: error: ")
    return last


# ------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("name", STEPS[1:])  # step zero has no number to give
def test_every_number_has_a_range_and_its_default_lies_in_it(workshop, sde, name):
    numbers = [entry for entry in workshop.read_parameters(name) if type(entry[1]) in (int, float)]
    assert numbers
    for key, default, comment in numbers:
        assert re.search(r"[\[(]\S+, \S+[\])]$", comment), f"{key} has no range"
        assert workshop.check_value(key, default, type(default), comment) == default
        for wrong in (float("nan"), float("inf"), -2, 10**30):
            with pytest.raises(workshop.BadInput, match=f"{key} = "):
                workshop.check_value(key, wrong, type(default), comment)


@pytest.mark.parametrize("name", STEPS)
def test_papermill_understands_every_parameter(workshop, sde, name, caplog):
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
        (dict(resume="false"), "resume = 'false' is no bool: give True or False"),
        (dict(resume=1), "resume = 1 is no bool"),
        (dict(lr=float("nan")), r"lr = nan must lie in \[0, 10\]"),
        (dict(stpes=3), "unknown parameter 'stpes': take one of dataset, root"),
    ],
)
def test_what_papermill_hands_over_is_checked(workshop, sde, monkeypatch, injected, sentence):
    monkeypatch.setattr(workshop, "NOTEBOOK", True)
    defaults = {key: default for key, default, _ in workshop.read_parameters("04_train")}
    cell = "# Parameters\n" + "".join(f"{key} = {value!r}\n" for key, value in injected.items())
    kernel = {"__name__": "__main__", **defaults, **injected, "In": ["", cell]}
    with pytest.raises(workshop.BadInput, match=sentence):
        workshop.settings(kernel, "04_train")
    fine = {
        **defaults,
        "steps": 7.0,
        "lr": 1,
        "boundaries": 0.5,
        "In": ["", "# Parameters\nlr = 1"],
    }
    workshop.settings(fine := {"__name__": "__main__", **fine}, "04_train")
    assert (fine["steps"], fine["lr"], fine["boundaries"]) == (7, 1.0, "0.5")


@pytest.mark.parametrize(
    "key, value", [("steps", -1), ("lr", -0.1), ("ema", 1.0), ("patience", -1), ("save_every", -1)]
)
def test_where_a_range_ends(workshop, sde, key, value):
    comment = next(
        comment for name, _, comment in workshop.read_parameters("04_train") if name == key
    )
    with pytest.raises(workshop.BadInput, match=rf"{key} = {value} must lie in \[0, "):
        workshop.check_value(key, value, type(value), comment)


OUT_OF_RANGE = [
    ("01_sde_and_denoiser", "--samples 100000 --steps 10000", "samples = 100000 with steps = 1"),
    ("04_train", "--lr nan", "lr = nan must lie in [0, 10]"),
    ("04_train", "--batch 1000000 --name r", "batch = 1000000 would take"),
    ("05_sample_eval", "--nfe 1000000000000", "nfe = 1000000000000 must lie in [1, 10000]"),
    ("06_ldm", "--batch 1000000 --name r", "batch = 1000000 would take"),
]


@pytest.mark.parametrize("name, flags, sentence", OUT_OF_RANGE)
def test_numbers_out_of_range(name, flags, sentence, tmp_path):
    assert sentence in fails(name, *flags.split(), cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------- disks, files, other runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of step 04, in runs/r of this folder."""
    folder = tmp_path_factory.mktemp("run")
    process = start("04_train", *FLAGS, cwd=folder)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    return folder


def small_files():
    """Let no file of this process grow beyond 300 KB, as a full disk would."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))


def test_a_full_disk_during_training(training, tmp_path):
    said = fails("04_train", *FLAGS, cwd=tmp_path, preexec_fn=small_files)
    assert "cannot write runs/r/checkpoint.pt" in said
    assert not list(tmp_path.rglob("*.part*"))
    said = fails("06_ldm", "--code_steps", "2", "--name", "l", cwd=tmp_path, preexec_fn=small_files)
    assert "cannot write runs/l/autoencoder.pt" in said
    assert not list(tmp_path.rglob("*.part*"))


def test_a_name_that_is_too_long(workshop, tmp_path):
    long = tmp_path / ("x" * 300)
    assert workshop.open_shard(long, (1, 8, 8), np.uint8) is None
    with pytest.raises(workshop.BadInput, match="cannot write .*too long"):
        with workshop.replacing(long / "file"):
            pass
    with pytest.raises(workshop.BadInput, match="there is no checkpoint"):
        workshop.read_checkpoint(long)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_log_on_a_full_disk(workshop, sde, training, tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(workshop.BadInput, match="cannot write to .*No space left"):
        workshop.append_row({"step": 1}, tmp_path / "metrics.jsonl")


def test_a_torn_row_is_dropped_and_said(workshop, training, tmp_path, capsys):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "loss_0": 0.5}\n{"step": 2, "lo', encoding="utf-8")
    workshop.trim_log(log, 9)
    assert 'a torn row is dropped: {"step": 2, "lo' in capsys.readouterr().out
    assert log.read_text(encoding="utf-8") == '{"step": 1, "loss_0": 0.5}\n'


def test_a_run_whose_log_was_lost_goes_on(run, workshop, tmp_path):
    """Nothing is left to train, and no row is there to draw or to print."""
    shutil.copytree(run / "runs", tmp_path / "runs")
    log = tmp_path / "runs" / "r" / "metrics.jsonl"
    for text in (b"", b"12\nnull\n{}\n", b"\xff\xfe\x00\n", b'{"st'):
        log.write_bytes(text)
        assert workshop.read_log(log.parent) == []
    process = start("04_train", *FLAGS, "--resume", cwd=tmp_path)
    out, said = process.communicate(timeout=300)
    assert process.returncode == 0 and "Traceback" not in said, said
    assert 'a torn row is dropped: {"st' in out


@pytest.mark.parametrize("spoil", [dict(step="x"), dict(settings=1), dict(ema=[])])
def test_files_that_are_no_checkpoints(workshop, tmp_path, spoil, capsys):
    whole = dict(step=1, settings={}, ema={})
    torch.save({**whole, **spoil}, tmp_path / "checkpoint.pt")
    with pytest.raises(workshop.BadInput, match="is no readable checkpoint"):
        workshop.read_checkpoint(tmp_path)
    torch.save({k: v for k, v in whole.items() if k not in spoil}, tmp_path / "checkpoint.pt")
    with pytest.raises(workshop.BadInput, match="is no readable checkpoint"):
        workshop.read_checkpoint(tmp_path)
    torch.save(whole, tmp_path / "checkpoint.previous.pt")
    assert workshop.read_checkpoint(tmp_path) == whole
    assert "going back to" in capsys.readouterr().out


def spoiled(content, how):
    """A checkpoint without its optimiser or a weight, or with a weight of another shape."""
    key = next(iter(content["ema"]))
    if how == "no optimiser":
        del content["optimizer"]
    elif how == "no weight":
        del content["ema"][key], content["model"][key]
    else:
        content["ema"][key] = content["model"][key] = torch.zeros(3)
    return content


@pytest.mark.parametrize("how", ["no optimiser", "no weight", "another shape"])
def test_checkpoints_that_do_not_fit(workshop, sde, training, run, how):
    content = workshop.read_checkpoint(run / "runs" / "r")
    with pytest.raises(workshop.BadInput, match="the checkpoint does not fit its run"):
        training.prepare_state(content["settings"], spoiled(content, how))
    if how != "no optimiser":  # which sampling does not need
        with pytest.raises(workshop.BadInput, match="the checkpoint does not fit its run"):
            training.averaged_model(content)


def test_an_unfinished_autoencoder_of_another_kind(workshop, sde, ldm, tmp_path):
    state = ldm.new_autoencoder_state(workshop.SMALL, 8, 1e-3, 0)
    ldm.save_autoencoder(state, tmp_path / "autoencoder.pt", finished=False)
    content = torch.load(tmp_path / "autoencoder.pt", weights_only=True)
    other = ldm.new_autoencoder_state({**workshop.SMALL, "kind": "vq"}, 8, 1e-3, 0)
    with pytest.raises(workshop.BadInput, match="trained with kind = 'kl', not 'vq'"):
        ldm.resume_autoencoder(other, content)
    del content["critic"]
    with pytest.raises(workshop.BadInput, match="autoencoder.pt does not fit its run"):
        ldm.resume_autoencoder(state, content)


def test_two_runs_of_one_name(workshop, sde, training, tmp_path):
    hold = f"t = importlib.import_module('{STEPS[0]}'); t.claim_folder('r', False); print('held')"
    code = f"import importlib; {hold}; import time; time.sleep(99)"
    how = dict(cwd=tmp_path, env=ENV, stdout=subprocess.PIPE, text=True)
    other = subprocess.Popen([sys.executable, "-uc", code], **how)
    assert other.stdout.readline() == "held\n"
    (tmp_path / "r" / "checkpoint.pt").write_text("theirs", encoding="utf-8")
    for resume in (True, False):
        with pytest.raises(workshop.BadInput, match="another process is training in .*--name"):
            workshop.claim_folder(tmp_path / "r", resume)
    assert [path.name for path in tmp_path.iterdir()] == ["r"]
    other.kill()
    other.communicate()
    workshop.claim_folder(tmp_path / "r", False)  # the lock died with its process
    workshop.claim_folder(tmp_path / "r", False)  # and one's own does not stand in the way
    assert (tmp_path / "r.1" / "checkpoint.pt").read_text(encoding="utf-8") == "theirs"
    workshop.unlock_folder(tmp_path / "r")


def damage(path):
    """Ways in which a file of arrays goes bad."""
    whole = path.read_bytes()
    yield lambda: path.write_bytes(whole[: len(whole) // 2])
    yield lambda: path.write_bytes(b"")
    yield lambda: path.write_bytes(os.urandom(300))
    yield lambda: np.save(path, np.zeros((4, 3, 8, 8), np.uint8))


def test_torn_sets_are_drawn_again(unet, evaluation, tmp_path, capsys):
    model = unet.build_network("digits").eval()
    draw = lambda: evaluation.draw_set(model, "vp", tmp_path, 12, shard=8, nfe=2)  # noqa: E731
    whole, second = draw(), tmp_path / "0000008.npy"
    assert "again" not in capsys.readouterr().out
    for spoil in damage(second):
        spoil()
        assert torch.equal(draw(), whole)
        assert f"{second} is torn or holds something else" in capsys.readouterr().out


def test_torn_latents_are_encoded_again(workshop, sde, ldm, tmp_path, capsys):
    model = ldm.Autoencoder(**workshop.SMALL).eval()
    pictures = workshop.load_images("digits")[0][:20]
    encode = lambda: ldm.encode_set(model, pictures, tmp_path, {"size": 8}, shard=8)  # noqa: E731
    scale, second = encode(), tmp_path / "00000008.npy"
    whole = ldm.Latents(tmp_path, scale).all()
    for spoil in damage(second):
        spoil()
        assert encode() == scale
        assert torch.equal(ldm.Latents(tmp_path, scale).all(), whole)
        assert f"{second} is torn or holds something else" in capsys.readouterr().out
    for text in ("{", "null", "[]"):
        (tmp_path / "latents.json").write_text(text, encoding="utf-8")
        with pytest.raises(workshop.BadInput, match=r"latents\.json is damaged: remove"):
            encode()


def test_a_stage_is_named_by_a_decimal_number(workshop, sde, unet, evaluation):
    with pytest.raises(workshop.BadInput, match="model_for_stage = '²=x'"):
        evaluation.build_hybrid(unet.build_network("digits"), "vp", "²=x")


# ---------------------------------------------------------------------------------------- signals


def wait_for(happened, process, seconds=120):
    begin = time.monotonic()
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - begin < seconds
        time.sleep(0.01)


def read_until(stream, word):
    """Read what a process prints until a word comes."""
    said = ""
    while word not in said:
        letter = stream.read(1)
        assert letter, said
        said += letter
    return said


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_torch_is_being_loaded(kind, status, tmp_path):
    let = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = start("04_train", cwd=tmp_path, preexec_fn=let)  # a background job ignores Ctrl-C
    maps = f"/proc/{process.pid}/maps"
    wait_for(lambda: "torch" in open(maps, encoding="utf-8").read(), process)
    process.send_signal(kind)
    said = process.communicate(timeout=60)
    assert (process.returncode, *said) == (status, "", "")


@pytest.mark.parametrize("name", STEPS)
def test_a_signal_while_the_standard_library_is_being_loaded(name, tmp_path):
    """A Ctrl-C in the very first moments: it comes from a module that stands in for argparse."""
    stub = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / "argparse.py").write_text(stub, encoding="utf-8")
    let = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    env = {**ENV, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(ROOT / f"{name}.py")],
        **dict(cwd=tmp_path, env=env, capture_output=True, text=True, preexec_fn=let),
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_sigterm_during_clustering(tmp_path):
    process = start("02_clustering", "--samples", "1000000", cwd=tmp_path)
    read_until(process.stderr, "Algorithm 1")
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in said


def test_sigterm_during_sampling_leaves_nothing_behind(run, tmp_path):
    out, flags = run / "runs", ("--nfe", "2000", "--out", str(run / "runs"), "--name", "r")
    process = start("05_sample_eval", *flags, cwd=tmp_path)
    read_until(process.stderr, "sampling")
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in said
    assert not list(out.rglob("*.part*"))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------- threads


def test_idle_threads_sleep_soon_in_a_script_and_nowhere_else(workshop, sde, monkeypatch):
    kept = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    asked = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")

    def spins(main, **env):
        for key in asked:
            monkeypatch.delenv(key, raising=False)
        for key, value in env.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(sys.modules["__main__"], "__file__", str(ROOT / main), raising=False)
        workshop.prepare_script()
        return os.environ.get("GOMP_SPINCOUNT")

    try:
        assert spins("own_script.py") is None and spins("tests/04_x.py") is None
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == kept
        assert spins("04_train.py") == workshop.SPINS
        assert spins("04_train.py", OMP_WAIT_POLICY="active") is None
        assert spins("04_train.py", GOMP_SPINCOUNT="7") == "7"
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), kept, strict=True):
            signal.signal(number, handler)


@pytest.mark.parametrize("name", STEPS)
def test_the_process_is_readied_before_torch_is_loaded(name):
    """What it sets for torch's threads counts only then."""
    lines = (ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()
    first = lambda word: next(i for i, line in enumerate(lines) if line.startswith(word))  # noqa: E731
    readied = (
        "SCRIPT = prepare_script()" if name == STEPS[0] else "workshop = importlib.import_module("
    )
    heavy = [
        first(word)
        for word in ("import torch", "import matplotlib", "import numpy")
        if any(line.startswith(word) for line in lines)
    ]
    assert first(readied) < min(heavy)


def test_memory_used_up_anywhere_in_a_script_is_one_sentence(workshop, capsys):
    """Such as where a network or a data set is moved to a GPU that others fill."""
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
    with pytest.raises(SystemExit) as end:
        workshop.report_bad_input(type(full), full, None)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert re.search(r"error: the memory .* is used up \(for 2\.00 GiB more\): .*--batch", said)
    workshop.report_bad_input(RuntimeError, RuntimeError("another bug"), None)
    assert capsys.readouterr().err.strip() == "RuntimeError: another bug"
