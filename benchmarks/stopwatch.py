"""Time work on this machine, waiting for its GPU where it has one."""

import importlib
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
workshop = importlib.import_module("00_workshop")

GPU = torch.cuda.is_available()
DEVICE = workshop.device()
FORM = torch.channels_last  # of networks and pictures, as step 00 moves them
HALF = dict(device_type=DEVICE.type, dtype=torch.bfloat16, enabled=GPU)  # for torch.autocast


def now():
    """Return the time in seconds, once the GPU has done what it was given."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work):
    """Return how long `work()` takes."""
    begin = now()
    work()
    return now() - begin


def medians(rounds, **works):
    """Time each piece of work once a round, in turns: the median seconds by name."""
    for work in works.values():
        work()  # warm up
    turns = [{name: seconds(work) for name, work in works.items()} for _ in range(rounds)]
    return {name: statistics.median(turn[name] for turn in turns) for name in works}


def machine():
    """Name the device, its threads and torch's version."""
    where = torch.cuda.get_device_name() if GPU else "CPU"
    return f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}"
