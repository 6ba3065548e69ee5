"""Every test runs on the CPU, with one thread, in an empty folder, with the steps by short names.

What it leaves running is ended; a file that it leaves in the project's folder fails the whole.
"""

import importlib
import os
import resource
import runpy
import sys
from contextlib import suppress
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for a real GPU there is benchmarks/gpu.py
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that share cores wait for each other

import matplotlib
import psutil
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
STEPS = sorted(path.stem for path in ROOT.glob("0[0-9]_*.py"))
sys.path.insert(0, str(ROOT))
matplotlib.use("Agg")  # here alone: MPLBACKEND would take the figures from notebooks


def left_in_project():
    """List the files that runs leave, with the times at which they were written."""
    names = ("data", "figures", "runs", "site", "student")
    return {path: path.stat().st_mtime for name in names for path in (ROOT / name).rglob("*")}


BEFORE = left_in_project()


def pytest_sessionfinish(session):
    if left := left_in_project().items() - BEFORE.items():
        print("\nthe tests left in the project's folder:", *sorted(str(path) for path, _ in left))
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):  # which has waited for its workers, and they for theirs
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        print(f"\nCPU seconds: {sum(use.ru_utime + use.ru_stime for use in used):.0f}")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(step(0), "CACHE", tmp_path / "cache")
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def no_strays():
    yield
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it may have ended by itself
            process.kill()


class Hostile:
    """What touches a file where it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


def command(number, *flags):
    """Run a step as a command, but in this process: command(4, "--steps", 3)."""
    file = str(ROOT / f"{STEPS[number]}.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [file, *map(str, flags)])
        try:
            runpy.run_path(file, run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise


def step(number):
    return importlib.import_module(STEPS[number])


STEP_NAMES = "workshop sde clustering unet training evaluation ldm beyond whose_cuts".split()
MADE_ONCE = {name: lambda n=n: step(n) for n, name in enumerate(STEP_NAMES)} | {
    "root": lambda: ROOT,
    "golden": lambda: ROOT / "tests" / "golden",  # outputs of the authors' released code
    "digits": lambda workshop: workshop.load_images("digits")[0].float() / 255,  # (1797, 1, 8, 8)
}
for name, make in MADE_ONCE.items():
    globals()[name] = pytest.fixture(make, scope="session", name=name)
