"""Tables and figure of `win.toml`: arms that differ in one thing, compared seed by seed."""

from statistics import fmean

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

DISTANCE = "Fréchet distance"


def arms_of(runs):
    """Sort runs by what their labels say: {(letter, encoder, budget): {seed: last row}}."""
    found = {}
    for label, records in runs:
        if "," not in label:
            continue
        letter, encoder, budget = label.split(", ")
        key = letter, int(encoder.removeprefix("encoder ")), float(budget)
        found[key] = {r["definition"]["seed"]: r["curve"][-1] for r in records}
    return found


def interval(values):
    """Return the mean of paired differences and the half-width of its 95% interval (Student's)."""
    n = len(values)
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5 if n > 1 else float("nan")
    return fmean(values), half


def differences(arms, first, second, value):
    """Collect value(first) - value(second) over the seeds that both have."""
    a, b = arms.get(first, {}), arms.get(second, {})
    return [value(a[seed]) - value(b[seed]) for seed in sorted(set(a) & set(b))]


def verdict(values, seeds):
    """Say what the rule of decision makes of paired differences, once all seeds are there."""
    mean, half = interval(values)
    if len(values) < seeds:
        return f"open: {len(values)} of {seeds} seeds"
    return "no difference" if abs(mean) <= half else "helps" if mean < 0 else "harms"


def compare(experiment, arms):
    """Yield the rows of the table of pairs."""
    for one, other, factor in experiment["pairs"]:
        for encoder, budget in dict.fromkeys(key[1:] for key in arms):
            first, second = (one, encoder, budget), (other, encoder, budget)
            found = differences(arms, first, second, lambda row: row["frechet"])
            if not found:
                continue
            mean, half = interval(found)
            cells = [factor, f"{one} − {other}", encoder, f"{budget:g}", len(found)]
            cells += [f"{mean:+.2f} ± {half:.2f}" if len(found) > 1 else f"{mean:+.2f}"]
            for k in "012":
                gains = differences(
                    arms, first, second, lambda row, k=k: np.log(row["held_out"][k])
                )
                mean, half = interval([100 * np.expm1(gain) for gain in gains])
                cells.append(f"{mean:+.1f} ± {half:.1f}" if len(found) > 1 else f"{mean:+.1f}")
            yield [*cells, verdict(found, len(experiment["settings"]["seeds"]))]


def share(runs, goal):
    """Return the GFLOPs at which runs [(GFLOPs, distance)] reach a distance; None: they do not.

    Between runs the distance is taken to be straight in log-log.
    """
    before = None
    for spent, distance in sorted(runs):
        if distance <= goal:
            if before is None:
                return spent
            x, y = np.log([before[0], spent]), np.log([before[1], distance])
            return float(np.exp(np.interp(-np.log(goal), -y, x)))
        before = spent, distance
    return None


def budgets_of(arms, letter, encoder):
    """List the budgets at which an arm was run."""
    return sorted(key[2] for key in arms if key[:2] == (letter, encoder) and arms[key])


def best_recipe(arms, encoder=8):
    """Choose the multistage arm with the lowest mean distance at the smallest budget."""
    means = {}
    for letter in "CDEFGHJK":
        budgets = budgets_of(arms, letter, encoder)
        if budgets:
            rows = arms[letter, encoder, budgets[0]].values()
            means[letter] = fmean(row["frechet"] for row in rows)
    return min(means, key=means.get) if means else None


def shares(arms, encoder=8):
    """Yield rows: at which share of a control's larger budget the best recipe is as good."""
    best = best_recipe(arms, encoder)
    # a recipe with weights is compared with controls that have them too
    for control in ("IL" if best in "JK" else "AB") if best else "":
        budgets = budgets_of(arms, control, encoder)[1:]  # the larger ones
        for seed, row in sorted(arms[control, encoder, budgets[-1]].items() if budgets else []):
            mine = [arms[best, encoder, b] for b in budgets_of(arms, best, encoder)]
            points = [
                (found[seed]["gflops"], found[seed]["frechet"]) for found in mine if seed in found
            ]
            spent = share(points, row["frechet"])
            least = spent is not None and spent == min(points)[0]
            found = "not reached" if spent is None else f"{'≤ ' * least}{spent / row['gflops']:.2f}"
            yield [best, control, seed, f"{row['frechet']:.2f}", found]


def tables(experiment, runs, table, spread):
    """Write the tables of pairs, of arms and of shares of compute."""
    arms = arms_of(runs)
    head = ["factor", "pair", "encoder", "GFLOPs", "seeds", f"difference in {DISTANCE}"]
    head += [f"held-out loss of stage {k}, %" for k in range(3)]
    parts = [table([*head, "so it"], compare(experiment, arms))]
    head = ["recipe", "control", "seed", "its distance", "share of its GFLOPs to reach that"]
    if rows := list(shares(arms)):
        parts.append(table(head, rows))
    head = ["arm", "decoders", "GFLOPs an evaluation", "steps", "seeds", DISTANCE]
    head += [f"held-out loss, stage {k}" for k in range(3)]
    rows = []
    for label, records in runs:
        if not records or "," not in label:
            continue
        ends = [record["curve"][-1] for record in records]
        cells = [label, ", ".join(map(str, records[0]["decoders"]))]
        cells += [f"{records[0]['equivalent_gflops']:.5f}", ends[0]["step"], len(records)]
        cells += [spread([row["frechet"] for row in ends])]
        for k, digits in zip("012", (4, 4, 5), strict=True):
            cells += [spread([row["held_out"][k] for row in ends], digits)]
        rows.append(cells)
    return "\n\n".join([*parts, table(head, rows)])


COLORS = dict(
    A="black",
    B="gray",
    C="C0",
    D="C4",
    E="C1",
    F="C2",
    G="C3",
    H="C5",
    I="black",
    J="C0",
    K="C3",
    L="gray",
)


def draw(experiment, runs):
    """Draw every seed at encoder 8 and the smaller budget, then curves: the figure, or None.

    A panel of curves is an encoder, with Min-SNR weights or without, that was run at two budgets.
    """
    arms = arms_of(runs)
    panels = [(encoder, letters) for encoder in (8, 16, 32) for letters in ("ABCDEFGH", "IJKL")]
    panels = [
        (encoder, [x for x in letters if len(budgets_of(arms, x, encoder)) > 1])
        for encoder, letters in panels
    ]
    panels = [panel for panel in panels if panel[1]]
    least = min((key[2] for key, rows in arms.items() if key[1] == 8 and rows), default=None)
    if least is None:
        return None
    how = dict(figsize=(6.5 + 3 * len(panels), 4), layout="constrained")
    ratios = [1.2] + [1] * len(panels)
    figure, axes = plt.subplots(1, 1 + len(panels), width_ratios=ratios, squeeze=False, **how)
    draw_dots(axes[0, 0], experiment["arms"], arms, least)
    for ax, panel in zip(axes[0, 1:], panels, strict=True):
        draw_curves(ax, arms, *panel)
    return figure


def draw_dots(ax, names, arms, budget):
    """Draw a dot for each seed of the arms at encoder 8 and a budget, and a bar for their mean."""
    letters = [letter for letter in names if arms.get((letter, 8, budget))]
    for i, letter in enumerate(letters):
        values = [row["frechet"] for row in arms[letter, 8, budget].values()]
        ax.plot(values, [i] * len(values), "o", color=COLORS[letter], ms=6, alpha=0.6)
        ax.plot(fmean(values), i, "|", color="black", ms=16)
    rows = [f"{letter}: {names[letter]}" for letter in letters]
    ax.set(yticks=range(len(letters)), yticklabels=rows, ylim=(len(letters) - 0.5, -0.5))
    ax.set(title=f"encoder 8, {budget:g} GFLOPs", xlabel=DISTANCE)
    ax.grid(axis="x", color="0.9")


def draw_curves(ax, arms, encoder, letters):
    """Draw distance against training GFLOPs: a thin line a seed, a thick one for their mean."""
    for letter in letters:
        budgets = budgets_of(arms, letter, encoder)
        rows = [arms[letter, encoder, budget] for budget in budgets]
        for seed in set().union(*rows):
            y = [found[seed]["frechet"] if seed in found else float("nan") for found in rows]
            ax.plot(budgets, y, ".-", color=COLORS[letter], lw=0.5, ms=3, alpha=0.5)
        means = [fmean(row["frechet"] for row in found.values()) for found in rows]
        style = dict(color=COLORS[letter], lw=1.8, ms=6, ls="--" if letter in "ABIL" else "-")
        ax.plot(budgets, means, marker="o", label=letter, **style)
    title = f"encoder {encoder}" + ", Min-SNR" * ("I" in letters)
    ax.set(xscale="log", yscale="log", title=title, xlabel="training GFLOPs")
    ax.minorticks_off()
    ax.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
    low, high = ax.get_ylim()
    ticks = [y for y in (0.3, 0.5, 0.7, 1, 1.5, 2, 2.5, 3, 5, 7, 10) if low <= y <= high]
    ax.set_yticks(ticks, [f"{y:g}" for y in ticks])
    ax.legend(fontsize=8)
