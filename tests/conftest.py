"""Make the numbered steps importable and hand them to the tests under short names."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

# The tests mean the CPU, whatever this machine has: hidden before anything asks for a GPU, here and
# in the processes that the tests start. The fixture `card` gives it back to those that want it.
# Kept in the environment too: the processes of `pytest -n` come after it was hidden.
VISIBLE = os.environ.setdefault("VISIBLE_TO_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# They run side by side, and OpenMP threads that share cores wait for each other: one will do.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
STEPS = sorted(path.stem for path in ROOT.glob("0[0-9]_*.py"))
sys.path.insert(0, str(ROOT))


def pytest_collection_modifyitems(items):
    """Begin with the notebooks, which take longest and stay together in one process."""
    for item in items:
        if item.path.name == "test_notebooks.py":
            item.add_marker(pytest.mark.xdist_group("notebooks"))
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def step(number):
    return importlib.import_module(STEPS[number])


@pytest.fixture(scope="session")
def workshop():
    return step(0)


@pytest.fixture(scope="session")
def sde():
    return step(1)


@pytest.fixture(scope="session")
def clustering():
    return step(2)


@pytest.fixture(scope="session")
def unet():
    return step(3)


@pytest.fixture(scope="session")
def training():
    return step(4)


@pytest.fixture(scope="session")
def evaluation():
    return step(5)


@pytest.fixture(scope="session")
def ldm():
    return step(6)


@pytest.fixture(scope="session")
def beyond():
    return step(7)


@pytest.fixture(scope="session")
def digits(workshop, sde):
    """The digits as floats in [0, 1], (1797, 1, 8, 8)."""
    return workshop.load_images("digits")[0].float() / 255


@pytest.fixture(scope="session")
def card():
    """The environment of a process that may use this machine's GPU."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": VISIBLE}
    asked = [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]
    if subprocess.run(asked, env=env, capture_output=True, text=True).stdout.strip() != "True":
        pytest.skip("there is no GPU that torch can use on this machine")
    return env


@pytest.fixture(scope="session")
def golden():
    """Where the recorded outputs of the authors' released code lie."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def root():
    return ROOT
