"""Compare the posterior mean with what this machine can do at best: matrix products alone.

    python benchmarks/posterior_mean.py [--root data] [--batch 1000]

Both are timed in turns in this process, on 50,000 pictures of 32x32x3 (CIFAR-10 where --root has
it, else random pictures: the work is the same) and on every sigma of a list. Printed is the
share of the products' float32 rate that the posterior mean reaches, which counts its own two
products only, and how far it is from Prop. 1 in float64.
"""

import argparse
import importlib
from pathlib import Path

import torch
from stopwatch import DEVICE, machine, medians, workshop

sde = importlib.import_module("01_sde_and_denoiser")
CHUNK = 1000


def softmax_mean(x, sigma, images, chunk=500):
    """Average the images as Prop. 1 defines it, in float64 from exact differences."""
    z, parts = x.flatten(1).double(), [part.double() for part in images.flatten(1).split(chunk)]
    logits = [-((z[:, None] - part) ** 2).sum(2) / (2 * sigma**2) for part in parts]
    weights = torch.softmax(torch.cat(logits, 1), 1).split(chunk, dim=1)
    return sum(w @ part for w, part in zip(weights, parts, strict=True)).reshape(x.shape)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", default="data", help="where CIFAR-10 lies")
    parser.add_argument("--batch", type=int, default=1000, help="denoiser evaluations a call")
    parser.add_argument("--rounds", type=int, default=3, help="turns; the median counts")
    args = parser.parse_args()
    torch.manual_seed(0)
    if (Path(args.root) / "cifar-10-batches-py").is_dir():
        images = workshop.load_images("cifar10", args.root)[0].to(DEVICE).float() / 255
    else:
        images = torch.rand(50_000, 3, 32, 32, device=DEVICE)
    y = images.flatten(1)
    q = torch.randn(args.batch, y.shape[1], device=DEVICE)

    def products():
        for part in y.split(CHUNK):
            (q @ part.T) @ part

    flops = 4 * args.batch * y.numel()
    print(machine())
    for sigma in (1e-3, 0.1, 0.5, 1.0, 2.5, 7.4, 152.0):
        x = images[: args.batch] + sigma * torch.randn_like(images[: args.batch])
        denoise = lambda x=x, s=sigma: sde.posterior_mean(x, s, sde.EDM, images, CHUNK)  # noqa: E731
        ours, peak = medians(args.rounds, denoise=denoise, products=products).values()
        exact = softmax_mean(x[:4], sigma, images)
        error = (denoise()[:4] - exact).norm() / exact.norm()
        print(
            f"sigma {sigma:7.3f}: {1e3 * ours / args.batch:6.3f} ms an evaluation, "
            f"{flops / ours / 1e9:8.0f} GFLOP/s; products alone {flops / peak / 1e9:8.0f}; "
            f"ratio {peak / ours:.3f}; error {error:.0e}"
        )


if __name__ == "__main__":
    main()
