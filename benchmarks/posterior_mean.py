"""Compare the posterior mean with what this machine can do at best: matrix products alone.

    python benchmarks/posterior_mean.py [--root data] [--batch 1000]

Both are timed in turns in this process, on 50,000 pictures of 32x32x3 (CIFAR-10 where --root has
it, else random pictures: the work is the same) and on every sigma of a list. Printed is the
share of the products' float32 rate that the posterior mean reaches, which counts its own two
products only.
"""

import argparse
import importlib
import statistics
import sys
from pathlib import Path

import torch
from stopwatch import machine, seconds

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
workshop = importlib.import_module("00_workshop")
sde = importlib.import_module("01_sde_and_denoiser")
CHUNK = 1000


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", default="data", help="where CIFAR-10 lies")
    parser.add_argument("--batch", type=int, default=1000, help="denoiser evaluations a call")
    parser.add_argument("--rounds", type=int, default=3, help="turns; the median counts")
    args = parser.parse_args()
    torch.manual_seed(0)
    if (Path(args.root) / "cifar-10-batches-py").is_dir():
        images = workshop.load_images("cifar10", args.root)[0].to(workshop.device()).float() / 255
    else:
        images = torch.rand(50_000, 3, 32, 32, device=workshop.device())
    N, n = len(images), images[0].numel()
    q = torch.randn(args.batch, n, device=workshop.device())
    y = images.flatten(1)

    def products():
        for part in y.split(CHUNK):
            w = q @ part.T
            w @ part

    flops = 4 * args.batch * N * n
    print(machine())
    for sigma in (1e-3, 0.1, 0.5, 1.0, 2.5, 7.4, 152.0):
        x = images[: args.batch] + sigma * torch.randn_like(images[: args.batch])
        denoise = lambda x=x, s=sigma: sde.posterior_mean(x, s, sde.EDM, images, CHUNK)  # noqa: E731
        denoise(), products()
        turns = [(seconds(denoise), seconds(products)) for _ in range(args.rounds)]
        ours, peak = (statistics.median(times) for times in zip(*turns, strict=True))
        print(
            f"sigma {sigma:7.3f}: {1e3 * ours / args.batch:6.3f} ms an evaluation, "
            f"{flops / ours / 1e9:8.0f} GFLOP/s; products alone {flops / peak / 1e9:8.0f}; "
            f"ratio {peak / ours:.3f}"
        )


if __name__ == "__main__":
    main()
