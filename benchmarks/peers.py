"""Compare with what others have written, side by side in this process and in turns.

    pip install diffusers denoising-diffusion-pytorch smalldiffusion
    python benchmarks/peers.py [--batch 4] [--rounds 5]

training   a step of the unified network for CIFAR-10 against U-Nets of diffusers and of lucidrains,
           of about its FLOPs: the time a FLOP
sampling   DPM-Solver++(2M) with a network that costs nothing against diffusers' scheduler
posterior  posterior_mean against cdist and softmax, and against smalldiffusion's ideal denoiser

On a CPU with one thread, and in CPU time, so that other work on the machine does not matter. Each
row ends with the ratio of our time to theirs, of the medians, and its range over the rounds.
"""

import argparse
import importlib
import statistics
import sys
import time

import torch
from stopwatch import workshop
from torch.utils.flop_counter import FlopCounterMode

sde = importlib.import_module("01_sde_and_denoiser")
unet = importlib.import_module("03_multistage_unet")
evaluation = importlib.import_module("05_sample_eval")
try:
    import denoising_diffusion_pytorch as lucidrains
    import diffusers
    import smalldiffusion
except ImportError as error:
    needs = "pip install diffusers denoising-diffusion-pytorch smalldiffusion"
    sys.exit(f"{error.name} is missing: make an environment for this script alone, and {needs}")


def compare(what, rounds, ours, works, per=None):
    """Time works in turns, and print how `ours` compares; per: what their times are divided by."""
    turns = []
    for _ in range(rounds + 1):
        turns.append({})
        for name, work in works.items():
            begin = time.process_time()
            work()
            turns[-1][name] = (time.process_time() - begin) / (per[name] if per else 1)
    del turns[0]  # the warm-up
    median = {name: statistics.median(turn[name] for turn in turns) for name in works}
    for name in works.keys() - {ours}:
        ratios = sorted(turn[ours] / turn[name] for turn in turns)
        said = f"{median[ours] / median[name]:.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}"
        print(f"{what}: {ours} {median[ours]:.3g} s, {name} {median[name]:.3g} s; ratio {said}")


def training(args):
    x, eps = torch.randn(2, args.batch, 3, 32, 32)
    t, models = torch.rand(args.batch), {}
    models["ours"] = workshop.move_to_device(unet.build_network("cifar10_unified", dropout=0.0))
    down, attended, up = ("DownBlock2D", "AttnDownBlock2D", "UpBlock2D")
    kinds = dict(down_block_types=(down, attended, down), up_block_types=(up, "AttnUpBlock2D", up))
    models["diffusers"] = diffusers.UNet2DModel(
        sample_size=32, block_out_channels=(64, 128, 128), attention_head_dim=None, **kinds
    )
    models["lucidrains"] = lucidrains.Unet(dim=64, dim_mults=(1, 2, 2), flash_attn=False)
    works, gflop = {}, {}
    for name, model in models.items():
        adam = torch.optim.Adam(model.parameters(), 1e-4, fused=True)

        def step(model=model, adam=adam):
            adam.zero_grad()
            out = model(x, t)
            (getattr(out, "sample", out) - eps).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()

        with FlopCounterMode(display=False) as counter:
            step()
        works[name], gflop[name] = step, counter.get_total_flops() / 1e9
    print("GFLOP a step:", gflop)
    compare("a training step, a GFLOP", args.rounds, "ours", works, gflop)


def sampling(args):
    x, scheduler = torch.randn(16 * args.batch, 3, 32, 32), diffusers.DPMSolverMultistepScheduler()

    def theirs(z=x):
        scheduler.set_timesteps(20)
        for t in scheduler.timesteps:
            z = scheduler.step(0.9 * z, t, z).prev_sample

    ours = evaluation.SAMPLERS["dpm-solver++-2m"]
    work = lambda: list(ours(lambda z, t: 0.9 * z, sde.VP, x, 20))  # noqa: E731
    compare("20 steps of a solver", args.rounds, "ours", dict(ours=work, diffusers=theirs))


def posterior(args):
    images, sigma = 2 * torch.rand(10_000, 3, 32, 32) - 1, 0.5
    x = images[: 16 * args.batch] + sigma * torch.randn(16 * args.batch, 3, 32, 32)
    ideal, z, y = smalldiffusion.IdealDenoiser(images), x.flatten(1), images.flatten(1)
    theirs = lambda: ideal(x, torch.tensor(sigma))  # noqa: E731
    plain = lambda: torch.softmax(-(torch.cdist(z, y) ** 2) / (2 * sigma**2), 1) @ y  # noqa: E731
    works = dict(ours=lambda: sde.posterior_mean(x, sigma, sde.EDM, images), smalldiffusion=theirs)
    works["cdist and softmax"] = plain
    compare(f"{len(x)} posterior means of {len(images):,}", args.rounds, "ours", works)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=4, help="pictures a training step")
    parser.add_argument("--rounds", type=int, default=5, help="turns; the median counts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for part in (training, sampling, posterior):
        part(args)


if __name__ == "__main__":
    main()
