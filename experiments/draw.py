"""Draw the tables and figures of RESULTS.md from the results of `run.py`.

A table is written between `<!-- name -->` and `<!-- /name -->` in the page. Every number comes from
a file in `results/`; a cell is the mean over seeds ± their standard deviation.
"""

import functools
import importlib
import re
from statistics import fmean, mode

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
    return f"{text} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


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
    return "\n\n".join([table(head, rows), *paired(experiment, runs)])


def paired(experiment, runs):
    """Return a list of one table, of the pairs that an experiment asks for, or of none."""
    budget, wanted = experiment.get("at"), experiment.get("pairs", [])
    runs = [(label, records) for label, records in runs if label in sum(wanted, [])]
    arms = {label: {r["definition"]["seed"]: at(r, budget) for r in rs} for label, rs in runs}
    seeds = len(experiment["settings"]["seeds"])
    asked = [(f"{one} − {other}", one, other, seeds) for one, other in wanted]
    rows = [[found[0], *pairs.cells(found)] for found in pairs.family(arms, asked)]
    return [table(["pair", *pairs.HEAD], rows)] if rows else []


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
    parts += paired(experiment, runs)
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
    arms, seeds = {}, len(experiment["settings"]["seeds"])
    for label, records in runs:
        for record in records if "trained" not in label else ():
            for row in record["curve"]:
                key = label, *row["solver"]
                arms.setdefault(key, {})[record["definition"]["seed"]] = row
    solvers = dict.fromkeys(key[1:] for key in arms)
    asked = [(x, ("multistage", *x), ("unified", *x), seeds) for x in solvers]
    rows = [[*found[0], *pairs.cells(found)] for found in pairs.family(arms, asked)]
    return table(["solver", "evaluations", *pairs.HEAD], rows)


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
    return "\n\n".join([table(head, rows), *paired(experiment, runs)])


def figure2(experiment, runs):
    """Write distances and losses of networks that serve one interval only."""
    whole = runs
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
    return "\n\n".join([table(head, rows), *paired(experiment, whole)])


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


MEASURES = {  # of a comparison at own rates: how to read it, and its digits
    "bound of the stages, bits per dimension": (lambda row: sum(row["bits"][1:-1]), 4),
    "loss with Min-SNR weights": (lambda row: sum(row["min_snr"]), 5),
    DISTANCE: (pairs.frechet, 2),
}


def bounds(experiment, runs):
    """Write which learning rate an arm gets by its bound, and what arms differ by with their own.

    A run has diverged where its bound is not finite or 5% above the lowest of its arm; its rate is
    not taken. The control is the first of the arms.
    """
    tuned, asked = {}, experiment["units"]
    for label, records in runs:
        if label.endswith(", tuning"):
            *key, rate = label.removesuffix(", tuning").split(", ")
            found = [sum(at(record)["bits"]) for record in records]
            tuned.setdefault(", ".join(key), {})[rate.removeprefix("rate ")] = found
    rates, seeds = list(dict.fromkeys(sum(map(list, tuned.values()), []))), len(asked[0][1])
    there = [arm for arm, found in tuned.items() if any(found.values())]
    rows = [[arm, *tuning(tuned[arm], rates, seeds)] for arm in there]
    parts = (
        [table(["arm", *(f"rate {rate}" for rate in rates), "rate taken"], rows)] if rows else []
    )
    if rows := list(at_own_rates(experiment, runs)):
        parts.append(table(["measure", "data", "pair", *pairs.HEAD], rows))
    if rows := list(exchanged(runs)):
        parts.append(table(["data", "seeds", *(f"stage {k}" for k in range(3))], rows))
    if missing := sum(map(len, dict(asked).values())) - sum(len(records) for _, records in runs):
        parts.append(f"*Still to run: {missing}. Until then fewer comparisons are corrected for.*")
    return "\n\n".join(parts)


def tuning(found, rates, seeds):
    """Return cells: an arm's mean bound at each rate, those that diverged, the rate to take."""
    limit = 1.05 * np.nanmin([bound for bounds in found.values() for bound in bounds])
    cells, means = [], {}
    for rate in rates:
        bounds = found.get(rate, [])
        lost = sum(not bound <= limit for bound in bounds)
        cells.append(spread(bounds, 3) + f", {lost} diverged" * (lost > 0))
        means[rate] = fmean(bounds) if bounds and not lost else float("inf")
    best = min(means, key=means.get)
    whole = all(len(bounds) == seeds for bounds in found.values()) and np.isfinite(means[best])
    return [*cells, best if whole else "open"]


def finals(experiment, runs):
    """Collect runs at the arms' own rates: ({(arm, data): {seed: last row}}, pairs to compare)."""
    arms, asked, (control, *others) = {}, [], experiment["arms"]
    for label, records in runs:
        key = letter, data = (*label.split(", "), "")[:2]
        if letter in experiment["arms"] and "tuning" not in label:
            arms[key] = {record["definition"]["seed"]: at(record) for record in records}
            seeds = len(dict(experiment["units"])[label])
            asked += [(key, key, (control, data), seeds)] * (letter in others)
    return arms, asked


def at_own_rates(experiment, runs):
    """Yield a row for each measure, data set and arm against the control: a measure is a family."""
    (arms, asked), control = finals(experiment, runs), next(iter(experiment["arms"]))
    for name, (value, digits) in MEASURES.items():
        for found in pairs.family(arms, asked, value):
            letter, data = found[0]
            yield [name, data, f"{letter} − {control}", *pairs.cells(found, digits)]


def exchanged(runs):
    """Yield rows: the main effect on the distance of taking each stage from the other arm."""
    for label, records in runs:
        if records and label.startswith("stages exchanged"):
            effects = [[effect(record["curve"], k) for record in records] for k in range(3)]
            yield [label.split(", ")[1], len(records), *(pairs.told(x, 2) for x in effects)]


def effect(curve, k):
    """Return the mean distance with stage k from the first arm, minus that with the second's."""
    first, second = ([row["frechet"] for row in curve if row["taken"][k] == i] for i in (1, 0))
    return fmean(first) - fmean(second)


def ran(everything):
    """Write what was run: units, seeds and minutes; a unit that experiments share counts once."""
    rows, seen = [], set()
    for name, (experiment, runs) in everything.items():
        records = [record for _, found in runs for record in found]
        if not records:  # written down, and not run so far
            continue
        new = {str(r["definition"]): r for r in records if str(r["definition"]) not in seen}
        seen |= set(new)
        seeds = ", ".join(map(str, sorted({r["definition"]["seed"] for r in records})))
        minutes = sum(r["seconds"] for r in new.values()) / 60
        rows.append([experiment.get("title", name), len(new), seeds, f"{minutes:.0f}"])
    return table(["experiment", "new units", "seeds", "minutes"], rows)


def win(experiment, runs):
    """Write the pairs of a study."""
    head = ["factor", "pair", "encoder", "GFLOPs", *pairs.HEAD]
    head += [f"held-out loss of stage {k}, %" for k in range(3)]
    return table(head, pairs.compare(experiment, pairs.arms_of(runs)))


def rates(everything):
    """Write what the tuned learning rate changes: arms of tuned.toml against those of win.toml."""
    arms, names = {}, everything["tuned"][0]["arms"]
    for rate, name in (("3e-3", "win"), ("6e-3", "tuned")):
        for letter, rows in pairs.arms_of(everything[name][1]).items():
            if letter[1:] == (8, 2.88):
                arms[letter[0], rate] = rows
    asked = [(letter, (letter, "6e-3"), (letter, "3e-3"), 5) for letter in names]
    found = pairs.family(arms, asked)
    rows = [[f"{letter}: {names[letter]}", *pairs.cells((letter, *row))] for letter, *row in found]
    return table(["arm", *pairs.HEAD], rows)


def capacity(everything):
    """Write J - L, three decoders against one of the same recipe, in networks of several widths."""
    head = ["data", "channels", "rate", "tried for", *pairs.HEAD]
    head += [*(f"held-out loss of stage {k}, %" for k in range(3)), "of the timeline, %", "its p"]
    arms, asked, rates = settings_of(everything)
    losses = {found[0]: found for found in pairs.family(arms, asked, timeline)}
    rows = []
    for found in pairs.family(arms, asked):
        about = found[0]
        row = [*about, f"{rates[about]:g}", SETTINGS[about][1], *pairs.cells(found)]
        row += pairs.losses(arms, ("J", about), ("L", about))
        _, gains, _, p, *_ = losses[about]
        rows.append([*row, pairs.told([100 * np.expm1(x) for x in gains], 1), f"{p:.2g}"])
    return table(head, rows)


SETTINGS = {  # data, channels: the study in which J and L have them, and who the rate was tried for
    ("`digits`", 4): ("width", "both"),
    ("`digits`", 8): ("tuned", "both"),
    ("MNIST", 8): ("mnist16", "both; bad for three"),
    ("CIFAR-10", 4): ("width16", "one only"),
    ("CIFAR-10", 8): ("win16", "three only"),
}


def settings_of(everything):
    """Collect J and L of all settings, at their largest budgets: (arms, pairs, learning rates)."""
    arms, asked, rates = {}, [], {}
    for about, (name, _) in SETTINGS.items():
        experiment, runs = everything[name]
        mine = [
            (label, records) for label, records in runs if label.startswith("J, enc") and records
        ]
        if not mine:
            continue
        label, records = max(mine, key=lambda run: float(run[0].split(", ")[2]))
        for letter in "JL":
            rows = pairs.arms_of(runs)[pairs.key_of(letter + label[1:])]
            cuts = records[0]["boundaries"]
            arms[letter, about] = {seed: row | dict(cuts=cuts) for seed, row in rows.items()}
        rates[about] = records[0]["definition"]["lr"]
        seeds = len(experiment["settings"]["seeds"])
        asked.append((about, ("J", about), ("L", about), seeds))
    return arms, asked, rates


def timeline(row):
    """Return the logarithm of the held-out loss of all stages: of the bound, where a row has it."""
    if "bits" in row:
        return np.log(sum(row["bits"][1:-1]))
    return np.log(np.dot(np.diff([0, *row["cuts"], 1]), list(row["held_out"].values())))


def families(everything):
    """Count how many comparisons of each study a correction for their number leaves."""
    rows, every = [], []
    for name in STUDIES:
        experiment, runs = everything[name]
        found = [x for x in pairs.study(experiment, pairs.arms_of(runs)) if x[4] is not None]
        every += [x[3] for x in found]
        counts = [sum(x[i] < 0.05 for x in found) for i in (3, 4)]
        rows.append([experiment["title"], len(found), *counts])
    counts = [sum(p < 0.05 for p in some) for some in (every, pairs.holm(every))]
    rows.append(["all of them as one family", len(every), *counts])
    return table(["study", "comparisons", "p < 0.05", "the same with Holm's correction"], rows)


def rulers(experiment, runs):
    """Write the pairs of a study whose pictures were compared in other features as well."""
    value = lambda row: row[f"frechet in {experiment['settings']['ruler']}"]  # noqa: E731
    head, rows = ["factor", "pair", "encoder", "GFLOPs", *pairs.HEAD], []
    for row in pairs.compare(experiment, pairs.arms_of(runs), value, 1):
        rows.append(row[: len(head)])
    return table(head, rows)


TABLES = dict(table1=table1, table3=table3, scarce=table3, table4=table4, table7=table4)
TABLES |= dict(figure1d=figure1d, cifar16=figure1d, figure2=figure2, overfitting=figure2)
TABLES |= dict(gradients=gradients, cuts=cuts, decisive=bounds, whose_cuts=bounds)
TABLES |= dict.fromkeys(("whose_cuts16", "whose_cuts_uniform", "whose_cuts_times"), bounds)
TABLES |= dict(win=win, tuned=win, win16=win, mnist16=win, ruler16=rulers)

# tables across experiments, and the experiments that they ask for
ACROSS = dict(ran=(ran, ()), rates=(rates, ("win", "tuned")))
STUDIES = "win", "tuned", "win16", "mnist16", "width", "width16"
ACROSS.update(capacity=(capacity, STUDIES), families=(families, STUDIES))


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
    """Draw a study: every seed at encoder 8 and the budget that most arms have."""
    experiment, runs = everything[name]
    arms, names = pairs.arms_of(runs), experiment["arms"]
    budgets = sorted((key[2] for key, rows in arms.items() if key[1] == 8 and rows), reverse=True)
    if not budgets:
        return
    budget = mode(budgets)  # of equals the first, which is the largest
    there = [letter for letter in names if arms.get((letter, 8, budget))]
    size = 6.5, 1 + 0.22 * len(there)
    figure, ax = plt.subplots(figsize=size, layout="constrained")
    for i, letter in enumerate(there):
        color = "black" if letter in pairs.ONE_DECODER else "C0"
        draw_dots(ax, i, [row["frechet"] for row in arms[letter, 8, budget].values()], color)
    rows = [f"{letter}: {names[letter]}" for letter in there]
    ax.set(yticks=range(len(there)), yticklabels=rows, ylim=(len(there) - 0.5, -0.5))
    ax.set(xlabel=f"{DISTANCE} after {budget:g} GFLOPs")
    ax.grid(axis="x", color="0.9")
    save(figure, path)


def draw_finding(everything, path):
    """Draw three decoders against one: the distance, and the held-out loss; a row a setting."""
    arms, asked, _ = settings_of(everything)
    own, both = finals(*everything["decisive"])
    said = "{0}, {1} channels\nrate tried for {2}".format
    names = {"colour": "CIFAR-10, colour", "grey": "CIFAR-10, grey"}
    first = [(f"{names.get(d, d)}, 8 channels\neach its own rate", *pair) for (_, d), *pair in both]
    asked = first + [(said(*about, SETTINGS[about][1]), *pair) for about, *pair in asked]
    panels = {DISTANCE: lambda row: np.log(row["frechet"]), "Loss on held-out pictures": timeline}
    figure, axes = plt.subplots(2, 1, figsize=(4.8, 1 + 0.8 * len(asked)), layout="constrained")
    for ax, (title, value) in zip(axes, panels.items(), strict=True):
        found = list(pairs.family(arms | own, asked, value))
        for i, (name, values, *_) in enumerate(found):
            mean, half = pairs.interval(values)
            color = "C3" if "own rate" in name else "C0"
            ax.plot(100 * np.expm1([mean - half, mean + half]), [i, i], color=color, lw=2)
            ax.plot(100 * np.expm1(mean), i, "o", color=color, ms=8)
        ax.axvline(0, color="black", lw=1)
        names = [row[0].replace("`", "") for row in found]
        ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
        ax.set(title=title, xlabel="three decoders − one, %")
        ax.grid(axis="x", color="0.9")
    save(figure, path)


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
    """Draw Figure 2 with all pictures and with few."""
    figure, axes = plt.subplots(2, 2, figsize=(7, 5.4), layout="constrained")
    panels = [(name, k) for name in ("figure2", "overfitting") for k in (0, 2)]
    styles = {f"width {n}": dict(color=f"C{i}") for i, n in enumerate((16, 32, 48))}
    styles["unified"] = dict(color="black", ls="--")
    for ax, (name, k) in zip(axes.flat, panels, strict=True):
        experiment, runs = everything[name]
        mine = [(label.split(": ")[1], r) for label, r in runs if label.startswith(f"interval {k}")]
        for label, records in mine:
            if records:
                x, mean, sd = curve_of(records, "step")
                style = dict(marker="o", ms=4, capsize=3, label=label)
                ax.errorbar(x, mean, sd, **style, **styles[label])
        few = experiment["settings"].get("pictures")
        title = f"interval {k} alone" + f", {few} pictures" * bool(few)
        ax.set(title=title, xscale="log", yscale="log", ylim=(1.2, 8.5))
        plain_ticks(ax, (75, 300, 1200) if few else (150, 600), (1.5, 2, 3, 4, 5, 7))
    for ax in axes[:, 0]:
        ax.set_ylabel(DISTANCE)
    for ax in axes[1]:
        ax.set_xlabel("iterations")
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
    "finding": (draw_finding, ("decisive", *STUDIES)),
    "win": (draw_win, ("win",)),
    "tuned": (functools.partial(draw_win, name="tuned"), ("tuned",)),
    "win16": (functools.partial(draw_win, name="win16"), ("win16",)),
    "mnist16": (functools.partial(draw_win, name="mnist16"), ("mnist16",)),
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
