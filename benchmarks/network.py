"""Compare the network with what this machine can do at best: matrix products alone.

    python benchmarks/network.py [--network table5_1] [--batch 8]

Times, in turns in this process, a forward pass, a forward and backward pass of stage 0, and a
square matrix product. Printed is the share of the product's rate that the network's true FLOPs
(torch's counter; a backward pass counts twice the forward pass) reach. Then a batch that mixes all
stages against the same images grouped by stage beforehand. On the CPU all of it is float32; on a
GPU bfloat16, channels_last and torch.compile.
"""

import argparse
import importlib
import statistics
import sys
from pathlib import Path

import torch
from stopwatch import GPU, machine, seconds

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
workshop = importlib.import_module("00_workshop")
sde = importlib.import_module("01_sde_and_denoiser")
unet = importlib.import_module("03_multistage_unet")


def medians(rounds, **works):
    """Time each piece of work once a round, in turns: the median seconds by name."""
    for work in works.values():
        work()  # warm up
    turns = [{name: seconds(work) for name, work in works.items()} for _ in range(rounds)]
    return {name: statistics.median(turn[name] for turn in turns) for name in works}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", default="table5_1", help="name of NETWORKS")
    parser.add_argument("--batch", type=int, default=8, help="images a pass")
    parser.add_argument("--rounds", type=int, default=5, help="turns; the median counts")
    args = parser.parse_args()
    torch.manual_seed(0)
    device, dtype = workshop.device(), torch.bfloat16 if GPU else torch.float32
    form = torch.channels_last if GPU else torch.contiguous_format
    model = unet.build_network(args.network, dropout=0.0).to(device).to(memory_format=form)
    true = 1e9 * unet.cost(args.network)[0]["true_gflops"] * args.batch
    x = torch.randn(args.batch, model.channels, model.size, model.size, device=device)
    x, t = x.to(memory_format=form), torch.full((args.batch,), 0.1, device=device)
    a = torch.randn(4096, 4096, device=device, dtype=dtype)
    stage = lambda x, t: model.branch(x, t, 0)  # noqa: E731
    stage = torch.compile(stage, fullgraph=True) if GPU else stage

    def forward():
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=GPU):
            stage(x, t)

    def both():
        with torch.autocast(device.type, dtype, enabled=GPU):
            loss = stage(x, t).float().square().mean()
        loss.backward()
        model.zero_grad()

    print(f"{machine()}, {dtype}")
    print(f"{args.network}, stage 0, batch {args.batch}: {true / 1e9:.0f} GFLOP forward")
    found = medians(args.rounds, forward=forward, both=both, product=lambda: a @ a)
    peak = 2 * 4096**3 / found["product"]
    for name, flops in (("forward", true), ("both", 3 * true)):
        print(
            f"{name:8s} {found[name]:7.3f} s, {args.batch / found[name]:7.1f} images/s, "
            f"{flops / found[name] / 1e9:7.0f} GFLOP/s; a matrix product {peak / 1e9:7.0f}; "
            f"ratio {flops / found[name] / peak:.3f}"
        )
    stages = len(model.decoders)
    cuts = [0.0, *model.boundaries.tolist(), min(model.latest, 80.0)]
    middles = [(a + b) / 2 for a, b in zip(cuts, cuts[1:], strict=False)]
    times = torch.tensor(middles, device=device).repeat(-(-args.batch // stages))[: args.batch]
    groups = [(times == tau).nonzero()[:, 0] for tau in middles]
    groups = [(x[g].contiguous(memory_format=form), times[g]) for g in groups if len(g)]

    @torch.no_grad()
    def mixed():
        with torch.autocast(device.type, dtype, enabled=GPU):
            model(x, times)

    @torch.no_grad()
    def grouped():
        with torch.autocast(device.type, dtype, enabled=GPU):
            for images, tau in groups:
                model(images, tau)

    found = medians(args.rounds, mixed=mixed, grouped=grouped)
    print(
        f"{args.batch} images of {stages} stages: mixed {found['mixed']:.3f} s, grouped beforehand "
        f"{found['grouped']:.3f} s; ratio {found['mixed'] / found['grouped']:.3f}"
    )


if __name__ == "__main__":
    main()
