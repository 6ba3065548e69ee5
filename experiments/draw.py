"""Draw the tables and figures of RESULTS.md from the results of `run.py`.

A table is written between `<!-- name -->` and `<!-- /name -->` in the page. Every number comes from
a file in `results/`; a cell is the mean over seeds ± their standard deviation.
"""

import functools
import importlib
import re
from statistics import fmean, mode, stdev

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

workshop = importlib.import_module("00_workshop")

pairs = importlib.import_module("pairs")
DISTANCE = "Fréchet distance"


# ---- small parts -----------------------------------------------------------------------------


def spread(values, digits=2):
    """Write numbers as mean ± standard deviation; a dash where there is none."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    text = f"{fmean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def table(head, rows):
    """Write rows as a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def at(record, budget=None):
    """Return the row of a curve where `budget` GFLOPs were reached, or its last."""
    reached = [row for row in record["curve"] if budget and row["gflops"] >= budget]
    return (reached or record["curve"][-1:])[0]


def each(records, key, budget=None):
    """Collect a number of the row at a budget over the seeds."""
    return [at(record, budget)[key] for record in records]


def numbers(values, digits=3):
    """Write a list of numbers."""
    return ", ".join(f"{value:.{digits}f}" for value in values) or "none"


def printed(experiment, label):
    """Write what the paper prints for a run."""
    value = experiment["paper"].get(label)
    return f"{value:.2f}" if value else "–"


def curve_of(records, x="gflops", y="frechet"):
    """Average curves over seeds: (x, mean, standard deviation), each (points,)."""
    n = min(len(record["curve"]) for record in records)
    xs, ys = (np.array([[row[key] for row in r["curve"][:n]] for r in records]) for key in (x, y))
    return xs.mean(0), ys.mean(0), ys.std(0, ddof=1) if len(records) > 1 else 0 * ys[0]


# ---- tables ----------------------------------------------------------------------------------


def table3(experiment, runs):
    """Write Table 3: architectures at equal training compute."""
    budget = experiment["at"]
    head = ["", "GFLOPs an evaluation", "million parameters", "iterations", "training GFLOPs"]
    head += [DISTANCE, "KID", "held-out / trained loss", "paper (FID)"]
    rows = []
    for label, records in runs:
        if not records or records[0]["definition"]["kind"] != "training":
            distance = [
                f"{spread(each(records, key), n)}" for key, n in (("frechet", 2), ("kid", 3))
            ]
            rows.append([label, "–", "–", "–", "–", *distance, "–", "–"])
            continue
        first = records[0]
        cells = [label, f"{first['equivalent_gflops']:.5f}", f"{first['parameters'] / 1e6:.2f}"]
        cells += [spread(each(records, "step", budget), 0)]
        cells += [spread(each(records, "gflops", budget))]
        cells += [spread(each(records, "frechet", budget)), spread(each(records, "kid", budget), 3)]
        gaps = [mean_gap(at(record, budget)) for record in records]
        rows.append([*cells, spread(gaps), printed(experiment, label)])
    return table(head, rows)


def mean_gap(row):
    """Return held-out over trained loss, averaged over the stages."""
    return fmean(row["held_out"][k] / row["trained"][k] for k in row["held_out"])


def figure1d(experiment, runs):
    """Write the distance against training compute, and Table 2's ratio."""
    real = [r for label, records in runs if label.startswith("real") for r in records]
    runs = [(label, records) for label, records in runs if not label.startswith("real")]
    (one, first), *others = runs
    head, rows, ratios = ["training GFLOPs"], [], []
    for label, _ in runs:
        head += [f"{label}: iterations", DISTANCE]
    points = max((r["definition"]["points"] for _, found in runs for r in found), default=[])
    for budget in points:
        row = [f"{budget:.2f}"]
        for _, records in runs:
            row += [spread(each(records, "step", budget), 0)]
            row += [spread(each(records, "frechet", budget))]
        rows.append(row)
    for label, records in others:
        for who, theirs, whose, best in (
            (label, records, one, first),
            (one, first, label, records),
        ):
            pairs = list(zip(best, theirs, strict=False))
            cells = [told([reach(a, b, cost) for a, b in pairs]) for cost in COSTS.values()]
            ratios.append([f"{who} as good as the best of {whose}", *cells])
    parts = [table(head, rows), table(["share of the other's training", *COSTS], ratios)]
    if real:
        parts.append(f"Two halves of the real pictures: {spread(each(real, 'frechet'))}.")
    return "\n\n".join(parts)


COSTS = {  # of a training up to a row of its curve
    "by GFLOPs spent": lambda record, row: row["gflops"],
    "by the paper's count": lambda record, row: row["step"] * record["equivalent_gflops"],
    "by iterations": lambda record, row: row["step"],
}


def reach(record, other, cost=COSTS["by GFLOPs spent"]):
    """Return the share of a run's cost at which another reaches its best; None: it does not."""
    best = min(record["curve"], key=lambda row: row["frechet"])
    points = [(cost(other, row), row["frechet"]) for row in other["curve"]]
    spent = pairs.share(points, best["frechet"])
    return None if spent is None else spent / cost(record, best)


def told(ratios):
    """Write ratios, seed by seed."""
    return ", ".join(f"{ratio:.2f}" if ratio else "not reached" for ratio in ratios) or "–"


def table1(experiment, runs):
    """Write the distances of several solvers on two trained networks."""
    runs = [(label, records) for label, records in runs if "trained" not in label]
    found = {label: [record["curve"] for record in records] for label, records in runs}
    asked = next((curves[0] for curves in found.values() if curves), [])
    rows = []
    for i, (name, nfe) in enumerate(row["solver"] for row in asked):
        cells = [spread([curve[i]["frechet"] for curve in curves]) for curves in found.values()]
        rows.append([name, nfe, *cells])
    return table(["solver", "evaluations", *(f"{DISTANCE}, {n}" for n in found)], rows)


def table4(experiment, runs):
    """Write Table 4 or 7: cuts, widths and the distance at equal training compute."""
    budget = experiment["at"]
    head = ["", "cuts", "decoders", "million parameters", "GFLOPs an evaluation", "iterations"]
    head += [DISTANCE, "KID", "paper (FID)"]
    rows = []
    for label, records in runs:
        if not experiment["paper"].get(label) and label == "unified":
            continue  # only built on
        if not records:
            rows.append([label, *["–"] * 8])
            continue
        first = records[0]
        cuts = [
            spread(column, 3) for column in zip(*(r["boundaries"] for r in records), strict=True)
        ]
        if len({tuple(record["boundaries"]) for record in records}) == 1:
            cuts = [f"{tau:.3f}" for tau in first["boundaries"]]
        cells = [label, ", ".join(cuts) or "none", ", ".join(map(str, first["decoders"]))]
        cells += [f"{first['parameters'] / 1e6:.2f}"]
        costs = [r["equivalent_gflops"] for r in records]
        cells += [spread(costs if max(costs) > min(costs) else costs[:1], 5)]
        cells += [spread(each(records, "step", budget), 0)]
        cells += [spread(each(records, "frechet", budget)), spread(each(records, "kid", budget), 3)]
        rows.append([*cells, printed(experiment, label)])
    return table(head, rows)


def figure2(experiment, runs):
    """Write distances and losses of networks that serve one interval only."""
    runs = [(label.removeprefix("interval "), r) for label, r in runs if "interval" in label]
    points = max((r["definition"]["points"] for _, records in runs for r in records), default=[])
    head = ["interval", "network", *(f"{DISTANCE}, {n} iterations" for n in points)]
    head += ["held-out loss", "trained loss", "held-out / trained", "seeds"]
    rows = []
    for label, records in runs:
        rows_at = [[moment(r, step) for r in records] for step in points]
        cells = [spread([row["frechet"] for row in found]) for found in rows_at]
        ends = rows_at[-1] if rows_at else []
        for key in ("held_out", "trained"):
            cells.append(spread([fmean(row[key].values()) for row in ends], 4))
        cells += [spread([mean_gap(row) for row in ends], 3), len(records)]
        rows.append([*label.split(": "), *cells])
    return table(head, rows)


def moment(record, step):
    """Return the row of a curve at about a step."""
    return min(record["curve"], key=lambda row: abs(row["step"] - step))


def gradients(experiment, runs):
    """Write the cosine similarity of the stages' gradients over training."""
    records = dict(runs).get("gradients")
    if not records:
        return "–"
    pairs = [(0, 0), (1, 1), (2, 2), (0, 1), (1, 2), (0, 2)]
    head = ["iterations", *(f"stage {a} and {b}" for a, b in pairs)]
    rows = []
    for i, row in enumerate(records[0]["moments"]):
        found = [[record["moments"][i]["stages"][a][b] for record in records] for a, b in pairs]
        rows.append([row["step"], *(spread(values) for values in found)])
    return table(head, rows)


def cuts(experiment, runs):
    """Write Algorithm 1's cuts for sizes and numbers of pictures."""
    head = ["data", "pictures", "entries of a picture", "$t_1$", "$t_2$"]
    rows = []
    for label, records in runs:
        good = [r["cuts"] for r in records if r["cuts"]]
        if records:
            t = [spread([pair[k] for pair in good], 3) for k in (0, 1)]
            named = label.split(",")[0]
            entries = next((r["entries"] for r in records if r["cuts"]), "–")
            rows.append([named, f"{records[0]['pictures']:,}", entries, *t])
    return table(head, sorted(rows, key=lambda row: (row[0].split()[0], row[2])))


def plain(experiment, runs):
    """Write label and last distance: an experiment without a table of its own."""
    rows = []
    for label, records in runs:
        rows.append([label, spread(each([r for r in records if "curve" in r], "frechet"))])
    return table(["", DISTANCE], rows)


def bounds(experiment, runs):
    """Write the bounds on held-out pictures, seed by seed: what the stages cost, in bits."""
    head = ["run", "seeds", "bits a dimension of the stages", "loss with Min-SNR weights"]
    rows = []
    for label, records in runs:
        seeds = ", ".join(str(record["definition"]["seed"]) for record in records) or "open"
        bits = [sum(at(record)["bits"][1:-1]) for record in records]
        rows.append(
            [label, seeds, numbers(bits), numbers([sum(at(r)["min_snr"]) for r in records], 5)]
        )
    return table(head, rows)


def ran(everything):
    """Write what was run: units, seeds and minutes; a shared unit counts once."""
    rows, seen = [], set()
    for name, (experiment, runs) in everything.items():
        records = [record for _, found in runs for record in found]
        if not records:  # written down, and not run so far
            continue
        new = {str(r["definition"]): r for r in records if str(r["definition"]) not in seen}
        seen |= set(new)
        how = sorted(
            {f"{r['device']}, threads: {r['threads']}, torch {r['torch']}" for r in records}
        )
        seeds = sorted({r["definition"]["seed"] for r in records})
        minutes = sum(r["seconds"] for r in new.values()) / 60
        seeds = ", ".join(map(str, seeds))
        title = experiment.get("title", name)
        rows.append([title, len(records), len(new), seeds, f"{minutes:.1f}", "; ".join(how)])
    head = ["experiment", "units", "of them not shared with one above", "seeds", "minutes", "on"]
    return table(head, rows)


def win(experiment, runs):
    """Write the study of what makes the multistage network win: pairs, shares of compute, arms."""
    arms = pairs.arms_of(runs)
    head = ["factor", "pair", "encoder", "GFLOPs", "seeds", f"difference in {DISTANCE}"]
    head += [f"held-out loss of stage {k}, %" for k in range(3)]
    parts = [table([*head, "so it"], pairs.compare(experiment, arms))]
    head = ["recipe", "control", "seed", "its distance", "share of its GFLOPs to reach that"]
    if rows := list(pairs.shares(arms)):
        parts.append(table(head, rows))
    head = ["stage", "runs", "its held-out loss varies by, %"]
    head += ["the distance grows with 1% more of it by, %", "correlation"]
    if rows := list(pairs.follow(arms)):
        parts.append(table(head, rows))
    head = ["arm", "decoders", "GFLOPs an evaluation", "steps", "seeds", DISTANCE]
    head += [f"held-out loss, stage {k}" for k in range(3)]
    rows = []
    for label, records in runs:
        if not records or ", encoder " not in label:
            continue
        ends = [record["curve"][-1] for record in records]
        cells = [label, ", ".join(map(str, records[0]["decoders"]))]
        cells += [f"{records[0]['equivalent_gflops']:.5f}", ends[0]["step"], len(records)]
        cells += [spread(each(records, "frechet"))]
        for k, digits in zip("012", (4, 4, 5), strict=True):
            cells += [spread([row["held_out"][k] for row in ends], digits)]
        rows.append(cells)
    return "\n\n".join([*parts, table(head, rows)])


def rates(everything):
    """Write what the tuned learning rate changes: arms of tuned.toml against those of win.toml."""
    slow, fast = (pairs.arms_of(everything[name][1]) for name in ("win", "tuned"))
    rows = []
    for letter, name in everything["tuned"][0]["arms"].items():
        arms = dict(slow=slow.get((letter, 8, 2.88), {}), fast=fast.get((letter, 8, 2.88), {}))
        found = pairs.differences(arms, "fast", "slow", lambda row: row["frechet"])
        if found:
            means = [spread([row["frechet"] for row in rows.values()]) for rows in arms.values()]
            rows.append([f"{letter}: {name}", len(found), *means, pairs.told(found, 2)])
    return table(["arm", "seeds", "rate 3e-3", "rate 6e-3", "difference"], rows)


def capacity(everything):
    """Write J - L, three decoders against one of the same recipe, in networks of several widths."""
    head = ["data", "encoder", "GFLOPs", "learning rate", "one decoder (L)", "three (J)", "seeds"]
    head += ["J − L", *(f"held-out loss of stage {k}, %" for k in range(3)), "so it", "in % of L"]
    rows = []
    for data, experiment, arms, key in widths(everything):
        cells = pairs.weigh(arms, ("J", *key), ("L", *key), len(experiment["settings"]["seeds"]))
        means = [spread([r["frechet"] for r in arms[x, *key].values()]) for x in "LJ"]
        lr = dict(experiment["units"])[f"J, encoder {key[0]}, {key[1]:g}"][0]["lr"]
        ratios = pairs.differences(arms, ("J", *key), ("L", *key), lambda r: np.log(r["frechet"]))
        ratios = pairs.told([100 * np.expm1(ratio) for ratio in ratios], 0)
        rows.append([data, key[0], f"{key[1]:g}", f"{lr:g}", *means, *cells, ratios])
    return table(head, rows)


def rulers(experiment, runs):
    """Write the pairs of a study whose pictures were compared in two kinds of features."""
    arms, seeds = pairs.arms_of(runs), len(experiment["settings"]["seeds"])
    again = f" in {experiment['settings']['ruler']}"
    kinds = {"FD-ResNet56": ("frechet", 2), "FD-EfficientNetLite0": (f"frechet{again}", 1)}
    kinds |= {"KID, ResNet56": ("kid", 3), "KID, EfficientNetLite0": (f"kid{again}", 3)}
    seen = {name: judged(arms, metric) for name, (metric, _) in kinds.items()}
    head, rows = ["factor", "pair", "GFLOPs", "seeds"], []
    for name in kinds:
        head += [f"difference in {name}", *["so it"] * name.startswith("FD")]
    for one, other, factor in experiment["pairs"]:
        for key in dict.fromkeys(key[1:] for key in arms):
            both, cells = ((one, *key), (other, *key)), []
            for name, (_, digits) in kinds.items():
                if found := pairs.differences(seen[name], *both, lambda row: row["frechet"]):
                    cells += [pairs.told(found, digits)]
                    cells += [pairs.verdict(found, seeds)] * name.startswith("FD")
            if cells:
                rows.append([factor, f"{one} − {other}", f"{key[1]:g}", len(found), *cells])
    parts = [table(head, rows)]
    head = ["features", "recipe", "control", "seed", "its distance"]
    head += ["share of its GFLOPs to reach that"]
    distances = [name for name in kinds if name.startswith("FD")]
    if rows := [[name, *row] for name in distances for row in pairs.shares(seen[name])]:
        parts.append(table(head, rows))
    rows = []
    for label, records in runs:
        cells = [spread(each(records, metric), digits) for metric, digits in kinds.values()]
        rows.append([label, len(records), *cells])
    return "\n\n".join([*parts, table(["arm", "seeds", *kinds], rows)])


def judged(arms, metric):
    """Let a metric take the place of the Fréchet distance in the rows of arms."""
    swap = lambda row: row | dict(frechet=row[metric])  # noqa: E731
    return {key: {seed: swap(row) for seed, row in rows.items()} for key, rows in arms.items()}


def widths(everything):
    """Yield (data, experiment, arms, (encoder, budget)) of J and L, at their largest budgets."""
    sets = {"`digits`": ("width", "tuned"), "MNIST": ("mnist16",), "CIFAR-10": ("width16", "win16")}
    for data, names in sets.items():
        found = [(pairs.arms_of(everything[name][1]), everything[name][0]) for name in names]
        largest = {}
        for arms, experiment in found:
            for letter, *key in sorted(key for key, rows in arms.items() if rows):
                if letter == "J" and arms.get(("L", *key)):
                    largest[key[0]] = data, experiment, arms, tuple(key)
        yield from (largest[encoder] for encoder in sorted(largest))


TABLES = dict(
    win=win, table3=table3, figure1d=figure1d, table4=table4, table7=table4, figure2=figure2
)
TABLES.update(
    decisive=bounds,
    whose_cuts=bounds,
    tuned=win,
    win16=win,
    mnist16=win,
    ruler16=rulers,
    scarce=table3,
    overfitting=figure2,
    table1=table1,
    cifar16=figure1d,
    gradients=gradients,
    cuts=cuts,
)

# tables across experiments, and the experiments that they ask for
ACROSS = dict(ran=(ran, ()), rates=(rates, ("win", "tuned")))
ACROSS["capacity"] = capacity, ("width", "tuned", "mnist16", "width16", "win16")


# ---- figures ---------------------------------------------------------------------------------


def draw_arms(everything, path):
    """Draw every seed of Tables 3, 4 and 7 as a dot, and what real pictures get."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 6), layout="constrained")
    floor = dict(everything["table3"][1])["real digits"]
    for ax, name in zip(axes.flat, ("table3", "scarce", "table4", "table7"), strict=True):
        experiment, runs = everything[name]
        only = ("real", "the 180") + ("unified",) * (name == "table4")  # no arms, or built on
        arms = [run for run in runs if not run[0].startswith(only) and run[1]]
        for i, (_, records) in enumerate(arms):
            draw_dots(ax, i, each(records, "frechet", experiment["at"]))
        names = [label.replace("early stopping", "ES").split(" (A")[0] for label, _ in arms]
        names = [name.replace("times uniform, mixed", "dealt alike") for name in names]
        if name == "table7":
            names = [f"stages: {name}" for name in names]
        real = dict(runs).get("the 180 pictures themselves", floor)
        if real:
            ax.axvline(fmean(each(real, "frechet")), color="gray", ls=":")
        ax.set(title=experiment["title"], yticks=range(len(arms)), yticklabels=names)
        ax.set(xlabel=DISTANCE, ylim=(len(arms) - 0.5, -0.5), xlim=(0, None))
        ax.grid(axis="x", color="0.9")
    save(figure, path)


def draw_curves(everything, path):
    """Draw distance against training compute."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for ax, name in zip(axes, ("figure1d", "cifar16"), strict=True):
        experiment, runs = everything[name]
        for i, (label, records) in enumerate(runs):
            if records and label.startswith("real"):
                level = each(records, "frechet")[0]
                ax.axhline(level, color="gray", ls=":", label="two halves of the real pictures")
            elif records:
                x, mean, sd = curve_of(records)
                style = dict(marker="o", ms=4, capsize=3, color=f"C{i - 1}", label=label)
                ax.errorbar(x, mean, sd, **style)
        title = "digits" if name == "figure1d" else experiment["title"]
        ax.set(xscale="log", yscale="log", title=title, ylabel=DISTANCE)
        ax.set(xlabel="training GFLOPs")
        ax.legend(fontsize=8)
    plain_ticks(axes[0], x=(5, 10, 20, 40, 80), y=(0.5, 1, 2, 5, 10))
    plain_ticks(axes[1], x=(15, 30, 60, 120, 180), y=(0.1, 0.2, 0.5, 1, 2, 5, 10, 20))
    save(figure, path)


def draw_win(everything, path, name="win"):
    """Draw a study: every seed at encoder 8 and the budget that most arms have, then curves.

    A panel of curves is an encoder, with Min-SNR weights or without, that was run at two budgets.
    """
    experiment, runs = everything[name]
    arms = pairs.arms_of(runs)
    budgets = sorted((key[2] for key, rows in arms.items() if key[1] == 8 and rows), reverse=True)
    if not budgets:
        return
    budget = mode(budgets)  # of equals the first, which is the largest
    panels = []
    for encoder in (8, 16, 32):
        twice = [x for x in ARMS if len(pairs.budgets_of(arms, x, encoder)) > 1]
        for weighted in (False, True):
            letters = [x for x in twice if (x in pairs.WEIGHTED) == weighted]
            panels += [(encoder, letters)] if letters else []
    how = dict(figsize=(6.5 + 3 * len(panels), 4), layout="constrained", squeeze=False)
    ratios = [1.2] + [1] * len(panels)
    figure, axes = plt.subplots(1, 1 + len(panels), width_ratios=ratios, **how)
    ax, names = axes[0, 0], experiment["arms"]
    there = [letter for letter in names if arms.get((letter, 8, budget))]
    for i, letter in enumerate(there):
        draw_dots(ax, i, [row["frechet"] for row in arms[letter, 8, budget].values()], ARMS[letter])
    rows = [f"{letter}: {names[letter]}" for letter in there]
    ax.set(yticks=range(len(there)), yticklabels=rows, ylim=(len(there) - 0.5, -0.5))
    ax.set(title=f"encoder 8, {budget:g} GFLOPs", xlabel=DISTANCE)
    ax.grid(axis="x", color="0.9")
    for ax, (encoder, letters) in zip(axes[0, 1:], panels, strict=True):
        draw_budgets(ax, arms, encoder, letters)
    save(figure, path)


# the arms of the study, in colours that arms with and without weights share
ARMS = dict(zip("ABCDEFGH", "black gray C0 C4 C1 C2 C3 C5".split(), strict=True))
ARMS |= dict(zip("IJKLMNP", "black C0 C3 gray C1 C6 C5".split(), strict=True))


def draw_stages(everything, path):
    """Draw what the distance follows: the held-out loss of which stage? A dot is a run."""
    x, y, _ = pairs.within_seeds(pairs.arms_of(everything["win"][1]))
    if not len(y):
        return
    figure, axes = plt.subplots(1, 3, figsize=(9, 3), sharey=True, layout="constrained")
    for k, ax in enumerate(axes):
        ax.plot(100 * np.expm1(x[:, k]), np.exp(y), "o", ms=4, alpha=0.5, color=f"C{k}")
        ax.set(xlabel=f"held-out loss of stage {k}, %", yscale="log")
        ax.grid(color="0.9")
    axes[0].set(ylabel=f"{DISTANCE}\nover the mean of its seed")
    plain_ticks(axes[0], y=(0.7, 0.8, 1, 1.2, 1.4))
    save(figure, path)


def draw_capacity(everything, path):
    """Draw what three decoders gain over one in networks of several widths: a dot is a seed."""
    figure, ax = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
    found, named = list(widths(everything)), set()
    for data, _, arms, key in found:
        color, shift = {"CIFAR-10": ("C0", 0.95), "MNIST": ("C2", 1.05)}.get(data, ("C1", 1.0))
        both = ("J", *key), ("L", *key)
        ratios = pairs.differences(arms, *both, lambda row: np.log(row["frechet"]))
        percent = [100 * np.expm1(ratio) for ratio in ratios]
        label = None if data in named else data.strip("`")
        ax.plot([key[0] * shift] * len(percent), percent, "o", color=color, alpha=0.6, label=label)
        ax.plot(key[0] * shift, fmean(percent), "_", color=color, ms=24, mew=2)
        named.add(data)
    ax.axhline(0, color="gray", ls=":")
    ax.set(xscale="log", xlabel="channels of the encoder and of every decoder")
    ax.set(ylabel="distance of three decoders\nagainst that of one, %")
    ax.margins(x=0.15)
    plain_ticks(ax, sorted({key[0] for *_, key in found}))
    if found:
        ax.legend(fontsize=8)
    save(figure, path)


def draw_finding(everything, path):
    """Draw one recipe for one decoder and for three, on three data sets, for the README."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for ax, name in zip(axes, ("tuned", "mnist16", "win16"), strict=True):
        experiment, runs = everything[name]
        arms = pairs.arms_of(runs)
        letters = [x for x in "ILPJ" if len(pairs.budgets_of(arms, x, 8)) > 1]
        if letters:
            draw_budgets(ax, arms, 8, letters, experiment["arms"])
        ax.set(title=experiment["shows"], ylabel=DISTANCE)
    save(figure, path)


def draw_budgets(ax, arms, encoder, letters, names=None):
    """Draw distance against training GFLOPs: a thin line a seed, a thick one for their mean."""
    ticks = set()
    for letter in letters:
        budgets = pairs.budgets_of(arms, letter, encoder)
        ticks.update(budgets)
        rows = [arms[letter, encoder, budget] for budget in budgets]
        for seed in set().union(*rows):
            y = [found[seed]["frechet"] if seed in found else float("nan") for found in rows]
            ax.plot(budgets, y, ".-", color=ARMS[letter], lw=0.5, ms=3, alpha=0.5)
        whole = set.intersection(*map(set, rows))  # a mean over other seeds would be no curve
        means = [
            fmean(found[seed]["frechet"] for seed in whole) if whole else None for found in rows
        ]
        style = dict(color=ARMS[letter], lw=1.8, ms=6, marker="o")
        style["label"] = (names or {}).get(letter, letter).split(", Min-SNR")[0]
        ax.plot(budgets, means, ls="--" if letter in pairs.ONE_DECODER else "-", **style)
    title = f"encoder {encoder}" + ", Min-SNR" * (letters[0] in pairs.WEIGHTED)
    ax.set(xscale="log", yscale="log", title=title, xlabel="training GFLOPs")
    plain_ticks(ax, sorted(ticks), (0.3, 0.5, 0.7, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 10))
    ax.legend(fontsize=8)


def draw_dots(ax, i, values, color="C0"):
    """Draw an arm's distances as dots in row i, and a bar for their mean."""
    ax.plot(values, [i] * len(values), "o", color=color, ms=6, alpha=0.7)
    if values:
        ax.plot(fmean(values), i, "|", color="black", ms=16)


def plain_ticks(ax, x=None, y=None):
    """Label logarithmic axes with plain numbers."""
    for axis, ticks in ((ax.xaxis, x), (ax.yaxis, y)):
        if ticks:
            axis.set_major_locator(matplotlib.ticker.FixedLocator(ticks))
            axis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
            axis.set_minor_locator(matplotlib.ticker.NullLocator())


def draw_intervals(everything, path):
    """Draw Figure 2 with all pictures and with few, and below held-out over trained loss."""
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.2), layout="constrained")
    panels = [(name, k) for name in ("figure2", "overfitting") for k in (0, 2)]
    colors = {"width 16": "C0", "width 32": "C1", "width 48": "C2"}
    for (top, low), (name, k) in zip(axes.T, panels, strict=True):
        experiment, runs = everything[name]
        mine = [(label.split(": ")[1], r) for label, r in runs if label.startswith(f"interval {k}")]
        for label, records in mine:
            if not records:
                continue
            style = (
                dict(color="black", ls="--") if label == "unified" else dict(color=colors[label])
            )
            style.update(marker="o", ms=4, capsize=3, label=label)
            x, mean, sd = curve_of(records, "step")
            top.errorbar(x, mean, sd, **style)
            gaps = np.array([[mean_gap(row) for row in r["curve"]] for r in records])
            sd = gaps.std(0, ddof=1) if len(gaps) > 1 else 0
            low.errorbar(x, gaps.mean(0), sd, **style)
        few = experiment["settings"].get("pictures")
        title = f"interval {k} alone" + f", {few} pictures" * bool(few)
        top.set(title=title, xscale="log", yscale="log")
        top.set_ylim(1.2, 8.5)
        low.set(xlabel="iterations", xscale="log")
        low.axhline(1, color="gray", ls=":")
        points = (75, 300, 1200) if few else (150, 600)
        plain_ticks(top, points, (1.5, 2, 3, 4, 5, 7))
        if few and k == 0:
            low.set_yscale("log")
            plain_ticks(low, points, (1, 2, 5, 10))
        else:  # a scale of its own, because the effect is a hundredth of that panel's
            low.set_ylim(0.97, 1.06)
            plain_ticks(low, points)
    axes[0, 0].set_ylabel(DISTANCE)
    axes[1, 0].set_ylabel("held-out / trained loss")
    if axes[0, 0].has_data():
        axes[0, 0].legend(fontsize=8, loc="upper right")
    save(figure, path)


def draw_gradients(everything, path):
    """Draw the similarity of gradients over ten bins of time: a row a seed, over training."""
    records = dict(everything["gradients"][1]).get("gradients")
    if not records:
        return
    shape = len(records), len(records[0]["moments"])
    how = dict(figsize=(3 * shape[1], 2.7 * shape[0]), sharex=True, sharey=True, squeeze=False)
    figure, axes = plt.subplots(*shape, layout="constrained", **how)
    for i, (row, record) in enumerate(zip(axes, records, strict=True)):
        for ax, moment in zip(row, record["moments"], strict=True):
            edges = np.linspace(0, 1, len(moment["bins"]) + 1)
            mesh = ax.pcolormesh(edges, edges, moment["bins"], vmin=-1, vmax=1, cmap="RdBu_r")
            for tau in record["boundaries"]:
                ax.axvline(tau, color="black", lw=0.8, ls="--")
                ax.axhline(tau, color="black", lw=0.8, ls="--")
            ax.set_aspect("equal")
            if i == 0:
                ax.set_title(f"{moment['step']:,} iterations")
        row[0].set_ylabel(f"t (seed {record['definition']['seed']})")
    for ax in axes[-1]:
        ax.set_xlabel("t")
    figure.colorbar(mesh, ax=axes, label="cosine similarity", shrink=0.5)
    save(figure, path)


def draw_cuts(everything, path):
    """Draw t1 and t2 against the number of pictures and of entries of a picture."""
    points = {}  # (data set, entries, pictures): the cuts of each seed
    for label, records in everything["cuts"][1]:
        for r in (r for r in records if r["cuts"]):
            points.setdefault((label.split()[0], r["entries"], r["pictures"]), []).append(r["cuts"])
    points = {key: np.mean(found, 0) for key, found in sorted(points.items())}
    if not points:
        return
    most = {}  # (data set, entries): the most pictures that were cut
    for data, entries, n in points:
        most[data, entries] = max(n, most.get((data, entries), 0))
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 3.6), sharey=True, layout="constrained")
    sets = sorted({data for data, _ in most})
    for data, entries in most:
        line = [(n, cut) for (d, e, n), cut in points.items() if (d, e) == (data, entries)]
        i, sizes = sets.index(data), [e for d, e in most if d == data]
        shade = 0.4 + 0.5 * (sizes.index(entries) + 1) / len(sizes)  # larger pictures are darker
        color = (plt.cm.Blues, plt.cm.Oranges, plt.cm.Greens)[i](shade)
        cut_lines(axes[0], line, color, "os^"[i], f"{data}, {entries:,} entries")
    for i, data in enumerate(sets):
        line = [(e, points[d, e, n]) for (d, e), n in most.items() if d == data]
        label = f"{data}, {max(n for (d, _), n in most.items() if d == data):,} pictures"
        cut_lines(axes[1], line, f"C{i}", "os^"[i], label)
    axes[0].set(xlabel="pictures", ylabel="$t_1$ (solid), $t_2$ (dashed)", ylim=(0, 0.8))
    axes[1].set(xlabel="entries of a picture")
    axes[0].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes[1].legend(fontsize=8, loc="upper left")
    save(figure, path)


def cut_lines(ax, line, color, marker, label):
    """Plot [(x, (t1, t2))] as a solid and a dashed line."""
    x = [x for x, _ in line]
    ax.plot(x, [cut[0] for _, cut in line], "-", color=color, marker=marker, ms=4, label=label)
    ax.plot(x, [cut[1] for _, cut in line], "--", color=color, marker=marker, ms=4)
    ax.set_xscale("log")


FIGURES = {
    "finding": (draw_finding, ("tuned", "mnist16", "win16")),
    "win": (draw_win, ("win",)),
    "tuned": (functools.partial(draw_win, name="tuned"), ("tuned",)),
    "win16": (functools.partial(draw_win, name="win16"), ("win16",)),
    "mnist16": (functools.partial(draw_win, name="mnist16"), ("mnist16",)),
    "capacity": (draw_capacity, ("width", "tuned", "mnist16", "width16", "win16")),
    "stages": (draw_stages, ("win",)),
    "arms": (draw_arms, ("table3", "scarce", "table4", "table7")),
    "curves": (draw_curves, ("figure1d", "cifar16")),
    "intervals": (draw_intervals, ("figure2", "overfitting")),
    "gradients": (draw_gradients, ("gradients",)),
    "cuts": (draw_cuts, ("cuts",)),
}


def save(figure, path):
    """Write a figure."""
    with workshop.replacing(path) as aside:
        figure.savefig(aside, dpi=90, bbox_inches="tight", format="png")
    plt.close(figure)


# ---- the page --------------------------------------------------------------------------------


def collect(experiments, read_result):
    """Pair every experiment with its results: {name: (experiment, [(label, records)])}."""
    found = {}
    for name, experiment in experiments.items():
        runs = []
        for label, seeds in experiment["units"]:
            records = [read_result(definition) for definition in seeds]
            runs.append((label, [record for record in records if record]))
        found[name] = experiment, runs
    return found


def page(text, everything):
    """Put the tables into a page, between its markers."""
    tables = {n: TABLES.get(n, plain)(*pair) for n, pair in everything.items()}
    for name, (write, asks) in ACROSS.items():
        if all(ask in everything for ask in asks):
            tables[name] = write(everything)
    for name, found in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, lambda m, t=found: f"{m[1]}\n{t}\n\n{m[2]}", text, flags=re.DOTALL)
    return text


def everything(experiments, read_result, figures, path):
    """Draw all figures and put all tables into the page."""
    found = collect(experiments, read_result)
    for name, (draw, asks) in FIGURES.items():
        if all(ask in found for ask in asks):
            draw(found, figures / f"{name}.png")
    if path.is_file():
        text = page(path.read_text(encoding="utf-8"), found)
        with workshop.replacing(path) as aside:
            aside.write_text(text, encoding="utf-8")
