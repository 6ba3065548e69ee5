"""Compare the network with what this machine can do at best: matrix products alone.

    python benchmarks/network.py [--network table5_1] [--batch 8]

Times, in turns in this process, a forward pass, a forward and backward pass of stage 0, and a
square matrix product. Printed is the share of the product's rate that the network's true FLOPs
(torch's counter; a backward pass counts twice the forward pass) reach. Then a batch that mixes all
stages against the same images grouped by stage beforehand. On the CPU all of it is float32; on a
GPU bfloat16.
"""

import argparse
import importlib

import torch
from stopwatch import DEVICE, FORM, GPU, HALF, machine, medians

unet = importlib.import_module("03_multistage_unet")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", default="table5_1", help="name of NETWORKS")
    parser.add_argument("--batch", type=int, default=8, help="images a pass")
    parser.add_argument("--rounds", type=int, default=5, help="turns; the median counts")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = unet.build_network(args.network, dropout=0.0).to(DEVICE, memory_format=FORM)
    true = 1e9 * unet.cost(args.network)[0]["true_gflops"] * args.batch
    x = torch.randn(args.batch, model.channels, model.size, model.size, device=DEVICE)
    x, t = x.to(memory_format=FORM), torch.full((args.batch,), 0.1, device=DEVICE)
    a = torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16 if GPU else torch.float32)
    stage = lambda x, t: model(x, t, stage=0)  # noqa: E731

    @torch.no_grad()
    def forward(parts=((x, t),), run=stage):
        with torch.autocast(**HALF):
            for images, times in parts:
                run(images, times)

    def both():
        with torch.autocast(**HALF):
            loss = stage(x, t).float().square().mean()
        loss.backward()
        model.zero_grad()

    print(f"{machine()}, {a.dtype}")
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
    times = torch.tensor(middles, device=DEVICE).repeat(args.batch)[: args.batch]
    groups = [(times == tau).nonzero()[:, 0] for tau in middles]
    groups = [(x[g].contiguous(memory_format=FORM), times[g]) for g in groups if len(g)]
    mixed = lambda: forward([(x, times)], model)  # noqa: E731
    found = medians(args.rounds, mixed=mixed, grouped=lambda: forward(groups, model))
    print(
        f"{args.batch} images of {stages} stages: mixed {found['mixed']:.3f} s, grouped beforehand "
        f"{found['grouped']:.3f} s; ratio {found['mixed'] / found['grouped']:.3f}"
    )


if __name__ == "__main__":
    main()
