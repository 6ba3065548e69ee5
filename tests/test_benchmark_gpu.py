"""The benchmark of a GPU: a line for each part, whatever happens to the parts before it."""

import importlib
import json
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT

PARTS = """
import os, subprocess, sys, time
sys.path.insert(0, BENCHMARKS)
import apart

def hangs(args):
    yield dict(found=1, child=subprocess.Popen(["sleep", "600"]).pid)
    time.sleep(600)

def raises(args):
    print("a line of a step's own")
    yield dict(found=2)
    yield dict(found=1 / 0)

def crashes(args):
    yield dict(found=3)
    os.abort()

def works(args):
    yield dict(found=float("nan"))
    yield dict(more=[1 / 3])

apart.main({part.__name__: (part, 3) for part in (hangs, raises, crashes, works)}, "a trial")
"""


def lines_of(done):
    """Read what a run printed: {part: its line}, one line a part."""
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({line["part"] for line in lines}) == len(lines)
    return {line["part"]: line for line in lines}


def run(*arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def trial(tmp_path):
    """Run the parts above by the benchmark's own runner, with flags: the process."""
    script = tmp_path / "trial.py"
    script.write_text(PARTS.replace("BENCHMARKS", repr(str(ROOT / "benchmarks"))), encoding="utf-8")
    return lambda *flags: run(script, *flags)


def test_a_part_that_hangs_raises_or_crashes_spoils_no_other(trial):
    done = trial()
    assert done.returncode == 1
    found = lines_of(done)
    assert list(found) == ["hangs", "raises", "crashes", "works", "summary"]
    hangs, raises, crashes, works, summary = found.values()
    assert hangs["found"] == 1 and hangs["cut"] == "after 3 s" and 3 <= hangs["seconds"] < 60
    child = hangs["child"]  # of the part: ended with it
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert raises["found"] == 2 and raises["error"] == "ZeroDivisionError: division by zero"
    assert crashes["found"] == 3 and "ended with status -6" in crashes["error"]
    assert works["found"] == "nan" and works["more"] == [0.3333]
    assert not {"error", "cut"} & set(works)
    assert summary["error"] == ["raises", "crashes"] and summary["cut"] == ["hangs"]
    assert set(summary["seconds"]) == {"hangs", "raises", "crashes", "works"}


def test_parts_beyond_the_budget_are_named(trial):
    found = lines_of(trial("--parts", "works,hangs,raises", "--budget", "2"))
    assert found["works"]["more"] and "cut" not in found["works"]
    assert "cut" in found["hangs"] and found["hangs"]["seconds"] < 2.5  # its own limit is 3
    assert found["raises"] == dict(part="raises", cut="the budget of 2 s is spent")
    assert found["summary"]["cut"] == ["hangs", "raises"]


def test_what_was_found_is_told_when_the_run_is_ended(trial, tmp_path):
    script = tmp_path / "trial.py"
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as process:
        own = psutil.Process(process.pid)  # parts that hang have a child of their own
        while not any(child.name() == "sleep" for child in own.children(recursive=True)):
            time.sleep(0.05)
        process.terminate()
        found = json.loads(process.stdout.read())
    assert process.returncode == 143
    assert found["part"] == "hangs" and found["found"] == 1 and "after" in found["cut"]


def test_quick_parts_of_the_benchmark(tmp_path):
    """On whatever device; the first part finds a torn file of pictures."""
    torn = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    torn.parent.mkdir()
    torn.write_bytes(b"torn")
    out, parts = tmp_path / "gpu.jsonl", "algorithm_1,machine,agree_networks"
    where = ("--data", tmp_path, "--out", out)
    done = run(ROOT / "benchmarks" / "gpu.py", "--quick", "--parts", parts, *where)
    assert done.stdout == out.read_text(encoding="utf-8")
    found = lines_of(done)
    assert list(found) == [*parts.split(","), "summary"]
    assert found["summary"]["error"] == ["algorithm_1"] and done.returncode == 1
    assert "UnpicklingError" in found["algorithm_1"]["error"]
    machine, networks = found["machine"], found["agree_networks"]
    assert machine["torch"] and {"card", "gib", "capability", "cuda", "cudnn"} <= set(machine)
    speeds = ("copy_tb_per_s", "bfloat16_tflops", "float32_tflops", "tf32_tflops")
    assert all(machine[key] > 0 for key in speeds)
    compared = [row for row in networks.values() if isinstance(row, dict)]
    assert len(compared) == 4 and all(row["ok"] for row in compared)
    for row in compared:  # rounding is seen, so the comparison is of something
        assert min(row["rounding"]) > 10 * max(row["float32"])


def test_the_yardsticks_of_the_benchmark(sde, monkeypatch):
    """The float64 posterior mean is the exact one, and made pictures are pictures."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    gpu = importlib.import_module("gpu")

    class Args:
        data, quick = "nowhere", True

    pixels, source = gpu.pictures(Args, 40)
    assert pixels.shape == (40, 3, 32, 32) and source == "0 of CIFAR-10, 40 made"
    assert pixels.float().std() > 20 and len(pixels.flatten(1).unique(dim=0)) == 40
    images = pixels.double() / 255
    for sigma in (0.01, 3.0):
        x = images[:3] + sigma
        exact = sde.posterior_mean(x, sigma, sde.EDM, images)
        assert gpu.difference(gpu.softmax_mean(x, sigma, images, chunk=7), exact) < 1e-12
