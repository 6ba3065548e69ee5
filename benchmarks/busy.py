"""Time the demo's training step alone, beside a busy process, and beside another training.

    python benchmarks/busy.py [--spins 1000] [--rounds 3]

Two OpenMP threads that spin while they wait for each other stall when another process takes one of
their cores. Steps that run as scripts therefore let idle threads sleep sooner (`SPINS` of step 00).
In turns, each in a process of its own: threads as OpenMP has them by default, and with each number
of spins; alone, beside a loop that keeps one core busy, and beside a training like itself. Printed
are milliseconds a step (means, as stalls are rare and long; medians of the turns), each as a
multiple of those alone, and what it costs alone. One thread stands below as what remains when
threads do not wait for each other.
"""

import argparse
import importlib
import itertools
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
BESIDE = ("alone", "a busy loop", "a training")


def train(steps):
    """Train steps of 64 digits (0: until killed) and return the milliseconds that one took."""
    workshop = importlib.import_module("00_workshop")
    unet = importlib.import_module("03_multistage_unet")
    training = importlib.import_module("04_train")
    state = training.new_state(unet.build_network("digits", boundaries=(0.1, 0.44)), 1e-3, seed=0)
    images, begin = workshop.load_images("digits")[0], None
    for step, _ in training.train(state, images, steps + 5 if steps else 10**9, batch=64):
        if step == 5:  # the first ones warm up
            begin = time.perf_counter()
    return 1e3 * (time.perf_counter() - begin) / steps


def arm(threads, beside, steps):
    """Time `train` in a process whose environment has `threads`, beside another or not."""
    known = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    env = {key: value for key, value in os.environ.items() if key not in known} | threads
    me = [sys.executable, __file__, "--train"]
    alone = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"  # ends with it
    other = {"a busy loop": [sys.executable, "-c", alone], "a training": [*me, "0"]}
    process = subprocess.Popen(other[beside], env=env) if beside in other else None
    try:
        if beside == "a training":
            time.sleep(10)  # until it trains
        done = subprocess.run([*me, str(steps)], env=env, stdout=subprocess.PIPE, check=True)
        print(threads, beside, done.stdout.decode().strip(), "ms", file=sys.stderr, flush=True)
        return float(done.stdout)
    finally:
        if process:
            process.kill()
            process.wait()


def main():
    workshop = importlib.import_module("00_workshop")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--spins", default=workshop.SPINS, help="numbers of spins, comma-separated")
    parser.add_argument("--rounds", type=int, default=3, help="turns; the median counts")
    parser.add_argument("--steps", type=int, default=40, help="training steps a turn")
    parser.add_argument("--train", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train is not None:
        print(train(args.train))
        return
    kinds = {"OpenMP's default": {}}
    kinds |= {f"{n} spins": {"GOMP_SPINCOUNT": n} for n in args.spins.split(",")}
    kinds["one thread"] = {"OMP_NUM_THREADS": "1"}
    arms = list(itertools.product(kinds, BESIDE))
    turns = [{(k, b): arm(kinds[k], b, args.steps) for k, b in arms} for _ in range(args.rounds)]
    found = {one: statistics.median(turn[one] for turn in turns) for one in arms}
    default = found["OpenMP's default", "alone"]
    print(f"{os.cpu_count()} cores, ms a step" + "".join(f"{b:>20s}" for b in BESIDE))
    for kind in kinds:
        alone = found[kind, "alone"]
        cells = [f"{found[kind, b]:.1f} ({found[kind, b] / alone:.2f})" for b in BESIDE[1:]]
        first = f"{alone:.1f} ({alone / default:.2f})"
        print(f"{kind:20s}" + "".join(f"{cell:>20s}" for cell in [first, *cells]))


if __name__ == "__main__":
    main()
