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

import torch
from stopwatch import DEVICE, FORM, machine, now, seconds

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
    model = unet.build_network(args.network).to(DEVICE, memory_format=FORM)
    state = training.new_state(model, 1e-4, seed=0)
    shape = (2000, model.channels, model.size, model.size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
    spent = dict(inside=0.0, clipping=0.0)

    def watched(work, *kinds):
        def run(*args, **kw):
            begin = now()
            result = work(*args, **kw)
            for kind in ("inside", *kinds):
                spent[kind] += now() - begin
            return result

        return run

    optimizer, utils = state["optimizer"], torch.nn.utils
    state["forward"] = watched(model)
    optimizer.step = watched(optimizer.step)
    optimizer.zero_grad = watched(optimizer.zero_grad, "clipping")
    utils.clip_grad_norm_ = watched(utils.clip_grad_norm_, "clipping")
    torch.Tensor.backward = watched(torch.Tensor.backward)

    def turn():
        list(training.train(state, images, state["step"] + args.steps, batch=args.batch))

    shares, _ = [], turn()  # the first one warms up
    for _ in range(args.rounds):
        spent.update(inside=0.0, clipping=0.0)
        whole = seconds(turn)
        shares.append(1 - spent["inside"] / whole)
        more = shares[-1] + spent["clipping"] / whole
        print(f"{whole:.2f} s, of which outside {shares[-1]:.1%} (or {more:.1%})")
    rate = args.batch * args.steps / whole
    print(
        f"{machine()}, {args.network}, batch {args.batch}: "
        f"{statistics.median(shares):.1%} outside (median), {rate:.0f} pictures/s"
    )


if __name__ == "__main__":
    main()
