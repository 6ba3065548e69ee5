"""Compare arms that differ in one thing, seed by seed, and correct for the number of pairs."""

from statistics import fmean

import numpy as np
from scipy import stats

ONE_DECODER = "ABIL"  # arms that are unified


def key_of(label):
    """Read what a label says: (letter, encoder, budget)."""
    letter, encoder, budget = label.split(", ")
    return letter, int(encoder.removeprefix("encoder ")), float(budget)


def arms_of(runs):
    """Sort runs by what their labels say: {(letter, encoder, budget): {seed: last row}}."""
    runs = [(label, records) for label, records in runs if ", encoder " in label]
    rows = [{r["definition"]["seed"]: r["curve"][-1] for r in records} for _, records in runs]
    return {key_of(label): row for (label, _), row in zip(runs, rows, strict=True)}


def interval(values, level=0.95):
    """Return the mean of paired differences and the half-width of its interval (Student's)."""
    n = len(values)
    t = stats.t.ppf((1 + level) / 2, n - 1) if n > 1 else float("nan")
    return fmean(values), t * np.std(values, ddof=min(1, n - 1)) / n**0.5


def differences(arms, first, second, value):
    """Collect value(first) - value(second) over the seeds that both have."""
    a, b = arms.get(first, {}), arms.get(second, {})
    return [value(a[seed]) - value(b[seed]) for seed in sorted(set(a) & set(b))]


def frechet(row):
    """Return what is compared where nothing else is asked for."""
    return row["frechet"]


def holm(p):
    """Correct p-values for their number. Source: Holm 1979."""
    order, n = np.argsort(p), len(p)
    steps = [min(1.0, (n - i) * p[j]) for i, j in enumerate(order)]
    corrected = np.empty(n)
    corrected[order] = np.maximum.accumulate(steps) if n else []
    return corrected.tolist()


LEVEL = 3  # percent of the second arm's mean, within which a difference counts as none


def family(arms, asked, value=frechet):
    """Compare pairs of arms, of {name: {seed: row}}, as one family, whose p-values are corrected.

    asked: [(whatever, first, second, number of seeds)]. Yields (whatever, differences, mean of the
    second, p, corrected p, verdict). A pair that lacks seeds is open and is not counted.
    """
    found = []
    for whatever, first, second, seeds in asked:
        if values := differences(arms, first, second, value):
            of = fmean(value(arms[second][seed]) for seed in arms[first] if seed in arms[second])
            p = float(stats.ttest_1samp(values, 0).pvalue) if len(values) > 1 else float("nan")
            found.append((whatever, values, of, p, seeds))
    whole = iter(holm([p for _, values, _, p, seeds in found if len(values) >= seeds]))
    for whatever, values, of, p, seeds in found:
        if len(values) < seeds:
            yield whatever, values, of, p, None, f"open: {len(values)} of {seeds} seeds"
        else:
            corrected = next(whole)
            yield whatever, values, of, p, corrected, verdict(values, of, corrected)


def verdict(values, of, corrected):
    """Say what a corrected p-value makes of paired differences, and whether two arms are level.

    Level: the 90% interval lies within LEVEL percent of `of`, which is two one-sided tests at 5%.
    """
    mean, half = interval(values, 0.9)
    level = bool(abs(mean) + half <= LEVEL / 100 * abs(of))
    if corrected < 0.05:
        return ("lower" if mean < 0 else "higher") + f", by less than {LEVEL}%" * level
    return "level" if level else "open"


HEAD = ["seeds", "means", "difference", "90% interval, %", "p", "p, Holm", "verdict"]


def cells(found, digits=2):
    """Write a comparison of `family` under HEAD."""
    _, values, of, p, corrected, said = found
    mean, half = interval(values, 0.9)
    means = f"{of + mean:.{digits}f} against {of:.{digits}f}"
    percent = f"{100 * (mean - half) / of:+.1f} to {100 * (mean + half) / of:+.1f}"
    numbers = [percent, f"{p:.2g}"] if len(values) > 1 else ["–", "–"]
    numbers += ["–" if corrected is None else f"{corrected:.2g}"]
    return [len(values), means, told(values, digits), *numbers, said]


def study(experiment, arms, value=frechet):
    """Compare the pairs of a study, at every width and budget, as one family."""
    seeds, asked = len(experiment["settings"]["seeds"]), []
    for one, other, factor in experiment["pairs"]:
        for key in dict.fromkeys(key[1:] for key in arms):
            asked.append(((factor, one, other, *key), (one, *key), (other, *key), seeds))
    return family(arms, asked, value)


def compare(experiment, arms, value=frechet, digits=2):
    """Yield the rows of the table of pairs: factor, pair, encoder, GFLOPs, HEAD, three losses."""
    for found in study(experiment, arms, value):
        factor, one, other, *key = found[0]
        gains = losses(arms, (one, *key), (other, *key))
        about = [factor, f"{one} − {other}", key[0], f"{key[1]:g}"]
        yield [*about, *cells(found, digits), *gains]


def losses(arms, first, second):
    """Write by how many percent the held-out losses of the three stages differ."""
    written = []
    for k in "012":
        gains = differences(arms, first, second, lambda row, k=k: np.log(row["held_out"][k]))
        written.append(told([100 * np.expm1(gain) for gain in gains], 1))
    return written


def told(values, digits):
    """Write the mean of paired differences with its interval, which one alone has not."""
    mean, half = interval(values)
    return f"{mean:+.{digits}f}" + f" ± {half:.{digits}f}" * (len(values) > 1)


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
