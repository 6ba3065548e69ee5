"""Compare the time that multistage and unified networks take for the same samples.

    python benchmarks/sampling.py [--multistage table5_1] [--unified table7_1] [--batch 4]

Draws pictures with DPM-Solver-3 and 20 evaluations from untrained networks (the work is the same),
in turns in this process. Printed are pictures a second, and the ratio of the times beside that of
the equivalent GFLOPs: those of the stages, weighted by the evaluations that fall into each.
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
unet = importlib.import_module("03_multistage_unet")
evaluation = importlib.import_module("05_sample_eval")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--multistage", default="table5_1", help="name of NETWORKS")
    parser.add_argument("--unified", default="table7_1", help="name of NETWORKS")
    parser.add_argument("--batch", type=int, default=4, help="pictures drawn at a time")
    parser.add_argument("--nfe", type=int, default=20, help="evaluations of a picture")
    parser.add_argument("--rounds", type=int, default=3, help="turns; the median counts")
    args = parser.parse_args()
    torch.manual_seed(0)
    device, form = workshop.device(), torch.contiguous_format
    if device.type == "cuda":
        form = torch.channels_last
    names, how = (args.multistage, args.unified), dict(sampler="dpm-solver-3", nfe=args.nfe)
    models = [unet.build_network(name).to(device, memory_format=form).eval() for name in names]

    def draw(model):
        evaluation.sample(model, "vp", args.batch, batch=args.batch, **how)

    for model in models:
        draw(model)  # warm up
    turns = [
        [seconds(lambda model=model: draw(model)) for model in models] for _ in range(args.rounds)
    ]
    times = [statistics.median(turn) for turn in zip(*turns, strict=True)]
    print(f"{machine()}, {args.nfe} NFE")
    work = []
    for name, model, spent in zip(names, models, times, strict=True):
        _, share = evaluation.stage_shares(model, "vp", **how)
        costs = unet.cost(name)
        kinds = ("gflops", "true_gflops")
        work.append([sum(part * costs[k][kind] for k, part in share.items()) for kind in kinds])
        print(
            f"{name:18s} {args.batch / spent:8.3f} pictures/s, equivalent GFLOPs {work[-1][0]:.2f} "
            f"(paper's count), {work[-1][1]:.2f} (true)"
        )
    ratio = times[0] / times[1]
    counted, true = (work[0][i] / work[1][i] for i in (0, 1))
    print(f"ratio of the times {ratio:.3f}, of the GFLOPs {counted:.3f} (true: {true:.3f})")


if __name__ == "__main__":
    main()
