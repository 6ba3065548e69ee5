"""Compare arms of `win.toml` that differ in one thing, seed by seed."""

from statistics import fmean

import numpy as np
from scipy import stats

ONE_DECODER, WEIGHTED = "ABIL", "IJKLMNP"  # arms that are unified, and that have Min-SNR weights


def arms_of(runs):
    """Sort runs by what their labels say: {(letter, encoder, budget): {seed: last row}}."""
    found = {}
    for label, records in runs:
        if ", encoder " not in label:
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
    seeds = len(experiment["settings"]["seeds"])
    for one, other, factor in experiment["pairs"]:
        for encoder, budget in dict.fromkeys(key[1:] for key in arms):
            if cells := weigh(arms, (one, encoder, budget), (other, encoder, budget), seeds):
                yield [factor, f"{one} − {other}", encoder, f"{budget:g}", *cells]


def weigh(arms, first, second, seeds):
    """Return the cells of one pair: seeds, differences of distance and losses, the verdict."""
    found = differences(arms, first, second, lambda row: row["frechet"])
    if not found:
        return []
    cells = [len(found), told(found, 2)]
    for k in "012":
        gains = differences(arms, first, second, lambda row, k=k: np.log(row["held_out"][k]))
        cells.append(told([100 * np.expm1(gain) for gain in gains], 1))
    return [*cells, verdict(found, seeds)]


def told(values, digits):
    """Write the mean of paired differences with its interval, which one alone has not."""
    mean, half = interval(values)
    return f"{mean:+.{digits}f}" + f" ± {half:.{digits}f}" * (len(values) > 1)


def within_seeds(arms, encoder=8):
    """Collect how runs lie to the mean of their seed and budget, in logarithms.

    Returns (held-out losses of the three stages (n, 3), distances (n,), number of means taken).
    """
    groups = {}
    for (_, width, budget), rows in arms.items():
        for seed, row in rows.items() if width == encoder else ():
            cells = [*(row["held_out"][k] for k in "012"), row["frechet"]]
            groups.setdefault((seed, budget), []).append(np.log(cells))
    parts = [group - np.mean(group, axis=0) for group in groups.values()]
    values = np.concatenate(parts) if parts else np.empty((0, 4))
    return values[:, :3], values[:, 3], len(parts)


def follow(arms, encoder=8):
    """Yield rows: by how much the distance grows with the held-out loss of each stage.

    Least squares on `within_seeds`, all three stages at once; 95% intervals (Student's).
    """
    x, y, means = within_seeds(arms, encoder)
    free = len(y) - means - 3
    if free < 3:
        return
    slopes = np.linalg.lstsq(x, y, rcond=None)[0]
    variance = ((y - x @ slopes) ** 2).sum() / free * np.diag(np.linalg.inv(x.T @ x))
    half = stats.t.ppf(0.975, free) * variance**0.5
    for k in range(3):
        alone = np.corrcoef(x[:, k], y)[0, 1]
        low, high = 100 * np.expm1([x[:, k].min(), x[:, k].max()])
        yield [
            k,
            len(y),
            f"{low:+.0f} to {high:+.0f}",
            f"{slopes[k]:+.1f} ± {half[k]:.1f}",
            f"{alone:+.2f}",
        ]


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
    """Choose the multistage arm with the lowest mean distance at the smallest budget all have.

    An arm of which seeds are missing does not count.
    """
    found = {key: rows for key, rows in arms.items() if key[1] == encoder and rows}
    found = {key: rows for key, rows in found.items() if key[0] not in ONE_DECODER}
    seeds = max(map(len, found.values()), default=0)
    letters = {key[0] for key, rows in found.items() if len(rows) == seeds}
    budgets = [set(budgets_of(arms, letter, encoder)) for letter in letters]
    common = set.intersection(*budgets) if letters else None
    if not common:
        return None

    def mean(letter):
        return fmean(row["frechet"] for row in arms[letter, encoder, min(common)].values())

    return min(sorted(letters), key=mean)


def shares(arms, encoder=8):
    """Yield rows: at which share of a control's largest budget the best recipe is as good."""
    best = best_recipe(arms, encoder)
    if best is None:
        return
    mine = [arms[best, encoder, budget] for budget in budgets_of(arms, best, encoder)]
    # a recipe with weights is compared with controls that have them too
    for control in ONE_DECODER:
        if (control in WEIGHTED) != (best in WEIGHTED):
            continue
        budgets = budgets_of(arms, control, encoder)
        if not budgets or budgets[-1] <= budgets_of(arms, best, encoder)[0]:
            continue  # it could not be less
        for seed, row in sorted(arms[control, encoder, budgets[-1]].items()):
            points = [
                (found[seed]["gflops"], found[seed]["frechet"]) for found in mine if seed in found
            ]
            spent = share(points, row["frechet"])
            least = spent is not None and spent == min(points)[0]
            found = "not reached" if spent is None else f"{'≤ ' * least}{spent / row['gflops']:.2f}"
            yield [best, control, seed, f"{row['frechet']:.2f}", found]
