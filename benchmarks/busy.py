"""Time the demo's training step alone and beside a process that keeps one core busy.

    python benchmarks/busy.py [--spins 2000,300000] [--rounds 3]

Two OpenMP threads that spin while they wait for each other stall when another process takes one of
their cores. Steps that run as scripts therefore let idle threads sleep sooner (`SPINS` of step 01).
In turns, each in a process of its own: threads as OpenMP has them by default, and with each number
of spins; alone, and beside a busy loop. Printed are milliseconds a step (mean, as stalls are rare
and long), and both ratios: busy to alone, and alone to alone with OpenMP's default.
"""

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
LOOP = "while True: pass"


def train(steps):
    """Train steps of 64 digits and return the milliseconds that one took (after 5 to warm up)."""
    sde = importlib.import_module("01_sde_and_denoiser")
    unet = importlib.import_module("03_multistage_unet")
    training = importlib.import_module("04_train")
    state = training.new_state(unet.build("digits", boundaries=(0.1, 0.44)), 1e-3, seed=0)
    images, begin = sde.load_images("digits")[0], None
    for step, _ in training.train(state, images, steps + 5, batch=64):
        if step == 5:
            begin = time.perf_counter()
    return 1e3 * (time.perf_counter() - begin) / steps


def arm(spins, busy, steps):
    """Run `train` in a process of so many spins (0: as OpenMP has it), maybe beside a busy loop."""
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    env.update({"GOMP_SPINCOUNT": str(spins)} if spins else {})
    other = subprocess.Popen([sys.executable, "-c", LOOP]) if busy else None
    try:
        me = [sys.executable, __file__, "--train", str(steps)]
        return float(subprocess.run(me, env=env, capture_output=True, check=True).stdout)
    finally:
        if other:
            other.kill()


def main():
    sde = importlib.import_module("01_sde_and_denoiser")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--spins", default=sde.SPINS, help="numbers of spins, comma-separated")
    parser.add_argument("--rounds", type=int, default=3, help="turns; the median counts")
    parser.add_argument("--steps", type=int, default=60, help="training steps a turn")
    parser.add_argument("--train", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        print(train(args.train))
        return
    arms = [(spins, busy) for spins in [0, *map(int, args.spins.split(","))] for busy in (0, 1)]
    turns = [{one: arm(*one, args.steps) for one in arms} for _ in range(args.rounds)]
    found = {one: statistics.median(turn[one] for turn in turns) for one in arms}
    print(
        f"{os.cpu_count()} cores, milliseconds a step"
        f"{'alone':>20s}{'busy':>9s}{'busy/alone':>13s}{'alone/default':>16s}"
    )
    for spins in dict.fromkeys(spins for spins, _ in arms):
        alone, busy = found[spins, 0], found[spins, 1]
        label = f"{spins:,} spins" if spins else "OpenMP's default"
        ratio = alone / found[0, 0]
        print(f"{label:38s} {alone:8.1f} {busy:8.1f} {busy / alone:12.2f} {ratio:15.2f}")


if __name__ == "__main__":
    main()
