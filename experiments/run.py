"""Run the experiments behind RESULTS.md: of all that the `*.toml` files ask for, what is missing.

    python experiments/run.py                  # everything, then tables and figures
    python experiments/run.py --only table3    # one experiment, or several: table3,table4
    python experiments/run.py --seeds 0        # one seed of each; --seeds 1,2 in a second shell
    python experiments/run.py --draw           # run nothing, draw tables and figures anew

An experiment that asks for data runs only where it is named.

A file holds `[settings]` for all of its runs and a `[[runs]]` for each; their keys are those of
KNOWN below. A run with one seed is a unit of work. Its result lies in `results/` under a
fingerprint of all its settings, step 04's recipe and step 03's network among them: a changed unit
is run again, an unchanged one never, and one that two experiments share is run once. A change of
the code goes unnoticed: delete results then. Ctrl-C loses the unit in work.
"""

import argparse
import importlib
import sys
import time
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
work = importlib.import_module("work")
draw = importlib.import_module("draw")
workshop = work.workshop
training, evaluation, BadInput = work.training, work.evaluation, work.BadInput

KNOWN = dict(  # every key of a run, with its default
    # as the parameters of step 04 are called
    dataset="digits",
    arch="multistage",
    tailored=False,
    network="",
    process="vp",
    encoder=0,
    stages="uniform",  # here no recipe decides on it
    times="",
    weight="",
    boundaries="",
    batch=0,
    lr=0.0,
    decay="",
    patience=0,
    # and our own
    kind="training",  # training, served, gradients, solvers, swaps, cuts or real: WORK in work.py
    label="",  # the name of the run in tables and figures
    paper=0.0,  # the distance that the paper prints for it, for the table
    seeds=[0],  # the run is repeated with each
    ema=0.9999,  # decay of the averaged weights
    by="gflops",  # training is counted in "gflops" (forward, one picture a step) or in "steps"
    points=[],  # counts at which the averaged network is measured; training ends at the last
    held_out=0.1,  # share of the pictures that is not trained on
    pictures=0,  # pictures trained on (kind real: compared); 0: all that are not held out
    size=0,  # side in pixels that the pictures are reduced to; 0: as they are
    channels=0,  # channels of the pictures; 0: the network's
    warmup=0,  # steps until the full learning rate; 0: the recipe's
    decoders=[],  # channels of the decoders; empty: the network's
    clustering="",  # timestep, log-snr, gradient or algorithm-2; empty: `boundaries` as in step 04
    number=0,  # stages of algorithm-2, or pictures of a run of kind cuts
    active=[],  # the stages that are trained; empty: all
    of="",  # label of the run that this one builds on
    against="",  # label of the one with which a run of kind swaps exchanges its stages
    branch=0,  # the point of `of` that a training goes on from; 0: it starts from scratch
    bits=False,  # bounds on the bits of held-out pictures, of the three stages of Algorithm 1
    intervals=False,  # held-out losses of the three stages of Algorithm 1, whatever the network has
    sampling_seeds=0,  # sets that are drawn, whose metrics are averaged; 0: one
    ruler="",  # one of RULERS in features.py, in which the sets are compared once more
    keep=False,  # keep the weights at the start and at every point, for runs that build on this one
    sampler="dpm-solver-3",
    nfe=20,
    solvers=[],  # of a run of kind solvers: pairs of a sampler and its number of evaluations
    samples=898,  # pictures that are drawn and compared; 0: none
    moments=[],  # points of a kept run that are looked at; 0: its start; empty: all
)


# ---- what there is to do ---------------------------------------------------------------------


def read_experiments(folder):
    """Read the experiments of a folder, in the order that they give: {name: experiment}.

    An experiment is its file's content; its "units" are [(label, [a definition for each seed])].
    """
    found = {}
    for path in sorted(Path(folder).glob("*.toml")):
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise BadInput(f"{path.name} is no TOML: {error}") from None
        paper = {run.get("label"): run.get("paper") for run in content.get("runs", [])}
        found[path.stem] = {**content, "paper": paper, "units": list(units(content, path.name))}
    return dict(sorted(found.items(), key=lambda item: item[1].get("order", 99)))


def units(content, file):
    """Yield (label, [definition for each seed]) of the runs of a file."""
    runs = {}
    for run in content.get("runs", []):
        asked = {**content.get("settings", {}), **run}
        for key in sorted(asked):
            if key not in KNOWN:
                raise BadInput(f"{file}: unknown key {key!r}: take one of {', '.join(KNOWN)}")
            kind = type(KNOWN[key])
            right = isinstance(asked[key], (int, float) if kind is float else kind)
            if not right or isinstance(asked[key], bool) != (kind is bool):
                raise BadInput(f"{file}: {key} = {asked[key]!r} is no {kind.__name__}")
        if not asked.get("label"):
            raise BadInput(f"{file}: every run needs a label")
        if asked["label"] in runs:
            raise BadInput(f"{file}: two runs have the label {asked['label']!r}: rename one")
        runs[asked["label"]] = whole = {**KNOWN, **asked}
        for of in filter(None, (whole["of"], whole["against"])):
            if of not in runs:
                raise BadInput(f"{file}: {whole['label']!r} builds on {of!r}, unknown so far")
        if whole["kind"] not in work.WORK:
            raise BadInput(f"{file}: unknown kind {whole['kind']!r}: take {', '.join(work.WORK)}")
        try:
            check(whole)
        except BadInput as error:
            raise BadInput(f"{file}: {whole['label']!r}: {error}") from None
        yield asked["label"], [define(whole, seed, runs) for seed in whole["seeds"]]


def check(run):
    """Raise BadInput where a run cannot work, before hours are spent on others."""
    workshop.about(run["dataset"])  # raises for an unknown one
    for name in [run["sampler"], *(pair[0] for pair in run["solvers"])]:
        evaluation.solver_of(name)
    if run["ruler"] and run["ruler"] not in work.features.RULERS:
        raise BadInput(f"unknown ruler {run['ruler']!r}: take {', '.join(work.features.RULERS)}")
    building = run["branch"] or run["kind"] in ("served", "gradients", "solvers", "swaps")
    if building and not run["of"] or run["kind"] == "swaps" and not run["against"]:
        raise BadInput("it needs `of`, the run that it builds on (and swaps `against`)")
    if run["kind"] != "training":
        return
    keys = ("arch", "process", "stages", "patience", "times", "decay", "weight")
    training.check_settings(*(run[k] for k in keys))
    points = run["points"]
    if not points or points != sorted({0, *points})[1:]:
        raise BadInput(f"points = {points} must be numbers above 0, ascending, one or more")


def define(run, seed, runs):
    """Settle a run with one seed; what it builds on becomes part of it."""
    unsaid = ("label", "paper", "seeds")
    settled = {key: value for key, value in run.items() if key not in unsaid}
    built = {k: define(runs[run[k]], seed, runs) if run[k] else None for k in ("of", "against")}
    return {**settled, "seed": seed, **built}


# ---- running ---------------------------------------------------------------------------------


def work_off(experiments, named=(), seeds=()):
    """Run the missing units of experiments, seed by seed, with a line for each."""
    for name, experiment in experiments.items():
        todo = [(j, label, d) for label, seeds in experiment["units"] for j, d in enumerate(seeds)]
        todo = [unit for unit in todo if work.read_result(unit[2]) is None]
        todo = [unit for unit in todo if not seeds or unit[2]["seed"] in seeds]
        asks = experiment.get("asks", "")
        if todo and asks and name not in named:
            print(f"{name}: left out, it asks for {asks}; run it with --only {name}")
            continue
        for i, (_, label, d) in enumerate(sorted(todo, key=lambda unit: unit[0]), start=1):
            if work.read_result(d) is not None:  # another unit needed it and has run it by now
                continue
            record = work.complete(d)
            end = record.get("curve", [{}])[-1].get("frechet")
            says = f"distance {end:.2f}" if end is not None else ""
            clock = time.strftime("%H:%M")
            print(
                f"{clock}  {name} {i}/{len(todo)}  {label}, seed {d['seed']}: "
                f"{record['seconds']:.0f} s  {says}",
                flush=True,
            )


def main(arguments=None):
    """Run what is missing and draw."""
    parser = argparse.ArgumentParser("run.py", allow_abbrev=False)
    parser.add_argument("--only", default="", help="names of experiments, comma-separated")
    parser.add_argument("--draw", action="store_true", help="run nothing, only draw")
    parser.add_argument("--seeds", default="", help="run only these, comma-separated: 0,2")
    parser.add_argument("--root", default="data", help="where cifar10 and mnist lie")
    parser.add_argument("--features", default="", help="checkpoint of a CIFAR-10 ResNet-56")
    parser.add_argument("--out", default="runs/experiments", help="where weights are kept")
    parser.add_argument("--folder", default=str(HERE), help="the folder of the *.toml files")
    parser.add_argument("--page", default=str(HERE.parent / "RESULTS.md"), help="page of tables")
    asked = parser.parse_args(arguments)
    work.paths.update(root=asked.root, out=asked.out, features=asked.features)
    work.paths["results"] = Path(asked.folder) / "results"
    experiments = read_experiments(asked.folder)
    named = [name for name in asked.only.split(",") if name]
    for name in named:
        if name not in experiments:
            raise BadInput(f"unknown experiment {name!r}: take one of {', '.join(experiments)}")
    seeds = training.read_numbers("--seeds", asked.seeds, int, "whole numbers such as 0,2")
    units = [d for e in experiments.values() for _, ds in e["units"] for d in ds]
    paths = {work.result_path(d) for d in units}
    print(f"{len(paths)} units, missing: {sum(not path.is_file() for path in paths)}")
    if not asked.draw:
        todo = {n: e for n, e in experiments.items() if n in named or not named}
        work_off(todo, named, seeds)
    draw.everything(experiments, work.read_result, Path(asked.folder) / "figures", Path(asked.page))


if __name__ == "__main__":
    sys.excepthook = workshop.report_bad_input
    main()
