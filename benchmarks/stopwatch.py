"""Time work on this machine, waiting for its GPU where it has one."""

import time

import torch

GPU = torch.cuda.is_available()


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


def machine():
    """Name the device, its threads and torch's version."""
    where = torch.cuda.get_device_name() if GPU else "CPU"
    return f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}"
