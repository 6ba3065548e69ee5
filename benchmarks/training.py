"""Measure how much of step 04's time goes into anything but forward, backward and optimiser step.

    python benchmarks/training.py [--network digits] [--batch 64] [--steps 150]

Trains in the ordinary loop with a stopwatch around the network, `backward` and the step, which is
clearing and clipping gradients and Adam (on a GPU each waits for the device, which makes the rest
look larger than it is). Printed is the share of the time outside: pictures, noise, loss, averaged
weights; and what it is when clearing and clipping count as outside too.
"""

import argparse
import importlib
import statistics
import sys
from pathlib import Path

import torch
from stopwatch import machine, now

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
workshop = importlib.import_module("00_workshop")
sde = importlib.import_module("01_sde_and_denoiser")
unet = importlib.import_module("03_multistage_unet")
training = importlib.import_module("04_train")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", default="digits", help="name of NETWORKS")
    parser.add_argument("--batch", type=int, default=64, help="pictures a step")
    parser.add_argument("--steps", type=int, default=150, help="steps a turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns; the median counts")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = workshop.device()
    model = unet.build_network(args.network).to(device)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
    state = training.new_state(model, 1e-4, seed=0)
    shape = (2000, model.channels, model.size, model.size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    inside = clipping = 0.0

    def watched(work, clips=False):
        def run(*args, **kw):
            nonlocal inside, clipping
            begin = now()
            result = work(*args, **kw)
            seconds = now() - begin
            inside, clipping = inside + seconds, clipping + seconds * clips
            return result

        return run

    state["forward"] = watched(model)
    state["optimizer"].step = watched(state["optimizer"].step)
    state["optimizer"].zero_grad = watched(state["optimizer"].zero_grad, clips=True)
    torch.nn.utils.clip_grad_norm_ = watched(torch.nn.utils.clip_grad_norm_, clips=True)
    torch.Tensor.backward = watched(torch.Tensor.backward)
    shares = []
    for turn in range(args.rounds + 1):
        inside, clipping, begin = 0.0, 0.0, now()
        for _ in training.train(state, images, state["step"] + args.steps, batch=args.batch):
            pass
        whole = now() - begin
        if turn:  # the first one warms up
            shares.append(1 - inside / whole)
            more = shares[-1] + clipping / whole
            print(f"{whole:.2f} s, of which outside {shares[-1]:.1%} (or {more:.1%})")
    rate = args.batch * args.steps / whole
    print(
        f"{machine()}, {args.network}, batch {args.batch}: "
        f"{statistics.median(shares):.1%} outside (median), {rate:.0f} pictures/s"
    )


if __name__ == "__main__":
    main()
