"""Ask Table 1's question of a run of step 04: which solver, with how many evaluations?

    python experiments/solvers.py runs/digits-multistage

Every sampler of step 05 draws --samples pictures (half the data set, 1,000 at most), and the
Fréchet distance to a random half of the real ones is printed. A number of evaluations that a
sampler cannot do is taken one lower; rk45 takes as many as it takes.
"""

import argparse
import sys

from work import BadInput, evaluation, training, workshop


def compare_solvers(model, process, real, features, budgets=(5, 10, 20, 50), **how):
    """Yield (sampler, evaluations, distance) of len(real) pictures; how: as in `sample`."""
    for name in evaluation.SAMPLERS:
        for nfe in budgets if name != "rk45" else budgets[:1]:
            for n in (nfe, nfe - 1):
                calls = []
                try:
                    how.update(sampler=name, nfe=n, batch=len(real), calls=calls)
                    x = evaluation.sample(model, process, len(real), **how)
                except BadInput:  # an even number, or an odd one
                    continue
                found = evaluation.evaluate(workshop.to_pictures(x), real, features)
                yield name, len(calls), found["frechet"]
                break


def main():
    parser = argparse.ArgumentParser("solvers.py", description=__doc__.split("\n")[0])
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("--root", default="data", help="where the data set lies")
    parser.add_argument("--samples", type=int, default=0, help="pictures a set; 0: half of all")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    content = workshop.read_checkpoint(asked.run)
    settings, model = content["settings"], training.averaged_model(content)
    pixels, _ = workshop.load_images(settings["dataset"], asked.root, model.size)
    half, _ = evaluation.real_halves(pixels, asked.samples or min(1000, len(pixels) // 2))
    features, named = evaluation.pick_extractor(settings["dataset"])
    print(f"{len(half)} pictures a set, {named}\n{'sampler':20s}  NFE   distance")
    for row in compare_solvers(model, settings["process"], half, features, seed=asked.seed):
        print("{:20s} {:4d} {:10.2f}".format(*row), flush=True)


if __name__ == "__main__":
    sys.excepthook = workshop.report_bad_input
    main()
