"""Compare the time that multistage and unified networks take for the same samples.

    python benchmarks/sampling.py [--multistage table5_1] [--unified table7_1] [--batch 4]

Draws pictures with DPM-Solver-3 and 20 evaluations from untrained networks (the work is the same),
in turns in this process. Printed are pictures a second, and the ratio of the times beside that of
the equivalent GFLOPs: those of the stages, weighted by the evaluations that fall into each.
"""

import argparse
import importlib

import torch
from stopwatch import DEVICE, FORM, machine, medians

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
    how = dict(sampler="dpm-solver-3", nfe=args.nfe)
    models, works = {}, {}
    for name in (args.multistage, args.unified):
        model = unet.build_network(name).to(DEVICE, memory_format=FORM).eval()
        draw = lambda m=model: evaluation.sample(m, "vp", args.batch, batch=args.batch, **how)  # noqa: E731
        models[name], works[name] = model, draw
    times, work = medians(args.rounds, **works), {}
    print(f"{machine()}, {args.nfe} NFE")
    for name, model in models.items():
        _, share = evaluation.stage_shares(model, "vp", **how)
        costs, kinds = unet.cost(name), ("gflops", "true_gflops")
        work[name] = [sum(part * costs[k][kind] for k, part in share.items()) for kind in kinds]
        counted, true = work[name]
        print(
            f"{name:18s} {args.batch / times[name]:8.3f} pictures/s, equivalent GFLOPs "
            f"{counted:.2f} (paper's count), {true:.2f} (true)"
        )
    ratios = [a / b for a, b in zip(*work.values(), strict=True)]
    ratio = times[args.multistage] / times[args.unified]
    print(f"ratio of the times {ratio:.3f}, of the GFLOPs {ratios[0]:.3f} (true: {ratios[1]:.3f})")


if __name__ == "__main__":
    main()
