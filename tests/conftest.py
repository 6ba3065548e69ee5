"""Make the numbered steps importable and hand them to the tests under short names."""

import importlib
import os
import sys
from pathlib import Path

import pytest

# Tests run side by side, and OpenMP threads that share cores wait for each other: one is enough.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded
import torch

ROOT = Path(__file__).resolve().parent.parent
STEPS = sorted(path.stem for path in ROOT.glob("0[1-9]_*.py"))
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
    return importlib.import_module(STEPS[number - 1])


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
def digits(sde):
    """The digits as floats in [0, 1], (1797, 1, 8, 8)."""
    return sde.load_images("digits")[0].float() / 255


@pytest.fixture(scope="session")
def golden():
    """Where the recorded outputs of the authors' released code lie."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def root():
    return ROOT
