"""Write the student's version: notebooks with gaps, and a check after each (make student).

    python docs/student.py           # into student/

A gap is a piece of a lesson that stands here once more, with what is asked for in its place, a
check that tells right from wrong, and wrong answers that students give. The notebooks import the
whole scripts of earlier steps, so that no week depends on the one before.
"""

import argparse
import re
import shutil
import sys
import textwrap
from pathlib import Path

import jupytext
import nbformat

ROOT = Path(__file__).resolve().parent.parent
STEPS = sorted(path.stem for path in ROOT.glob("0[0-9]_*.py"))

# step, lines: what is taken out; says: what is to be written, with its shapes; check: what follows
# the cell, which fails on a wrong answer; wrong: {what goes wrong: the lines of such an answer}
GAPS = {
    "the kernel's σ": dict(
        step="01_sde_and_denoiser",
        lines="""
        return torch.sqrt(torch.expm1(self.B(t)))  # expm1(B) = e^B - 1
""",
        says="return sigma_t, of t's shape, from self.B(t): s² (1 + σ²) = 1",
        check="""
t = torch.tensor([0.01, 0.1, 0.5, 1.0])
kept = VP.s(t) ** 2 * (1 + VP.sigma(t) ** 2)
assert torch.allclose(kept, torch.ones_like(kept)), f"variance is not preserved: {kept.tolist()}"
""",
        wrong={
            "the noise in x_t, sσ, for σ": """
        return torch.sqrt(-torch.expm1(-self.B(t)))
""",
            "the square root forgotten": """
        return torch.expm1(self.B(t))
""",
        },
    ),
    "Proposition 1": dict(
        step="01_sde_and_denoiser",
        lines="""
    weights = torch.softmax(-square / (2 * per_image(kernel.sigma(t), z) ** 2), 1)
    return (weights @ y).to(x.dtype).reshape(x.shape)  # Prop. 1
""",
        says="write the weights (B, N) of the pictures, and return their average, of x's shape",
        check="""
pair, t = torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1), torch.tensor([0.1, 0.3])
x = torch.tensor([0.3, -0.2]).reshape(2, 1, 1, 1)
seen = plain_posterior_mean(x, t, VP, pair).flatten()
known = torch.tanh(x.flatten() / VP.s(t) / VP.sigma(t) ** 2)  # of two points, -1 and 1
assert torch.allclose(seen.double(), known.double()), f"of two points it is {known}, not {seen}"
""",
        wrong={
            "the factor 2 of the exponent": """
    weights = torch.softmax(-square / per_image(kernel.sigma(t), z) ** 2, 1)
    return (weights @ y).to(x.dtype).reshape(x.shape)
""",
            "softmax over the batch": """
    weights = torch.softmax(-square / (2 * per_image(kernel.sigma(t), z) ** 2), 0)
    return (weights @ y).to(x.dtype).reshape(x.shape)
""",
        },
    ),
    "the similarity D": dict(
        step="02_clustering",
        lines="""
    return ((eps_a - eps_b).abs() <= eta).flatten(1).double().mean(1)  # Eq. 6
""",
        says="return for each of B the share of its C·H·W entries that differ by eta or less: (B,)",
        check="""
a = torch.zeros(2, 1, 2, 2)
b = torch.tensor([[0.0, 0.007, -0.007, -1.0], [1.0, 1.0, 1.0, 0.0]]).reshape(2, 1, 2, 2)
found = similarity(a, b).tolist()
assert found == [0.75, 0.25], f"of four entries 3 and 1 agree, not {found}"
""",
        wrong={
            "no absolute value": """
    return (eps_a - eps_b <= eta).flatten(1).double().mean(1)
""",
            "one number for the batch": """
    return ((eps_a - eps_b).abs() <= eta).double().mean()
""",
        },
    ),
    "Algorithm 1's last two lines": dict(
        step="02_clustering",
        lines="""
    t_1 = max(tau[up >= alpha].tolist(), default=VP.t_min)  # Eq. 7
    t_2 = min(tau[down >= alpha].tolist(), default=VP.t_max)  # Eq. 8
""",
        says="write t_1 and t_2, two floats, from tau (T,) and the averages up and down (T,)",
        check="""
(t_1, t_2), _, _, (tau, up, down) = plain_algorithm_1(images, 500)
assert up[tau <= t_1][-1] >= 0.9 > up[tau > t_1].max(), f"t_1 = {t_1} is not Eq. 7's"
assert down[tau >= t_2][0] >= 0.9 > down[tau < t_2].max(), f"t_2 = {t_2} is not Eq. 8's"
""",
        wrong={
            "the first time in place of the last": """
    t_1 = min(tau[up >= alpha].tolist(), default=VP.t_min)
    t_2 = max(tau[down >= alpha].tolist(), default=VP.t_max)
""",
            "both from one end": """
    t_1 = max(tau[up >= alpha].tolist(), default=VP.t_min)
    t_2 = min(tau[up <= alpha].tolist(), default=VP.t_max)
""",
        },
    ),
    "the dispatch": dict(
        step="03_multistage_unet",
        lines="""
        mine = stage == k  # (B,) of truth values
        if mine.any():
            noise[mine] = decoder(middle[mine], [skip[mine] for skip in skips], emb[mine])
""",
        says="let decoder k fill noise (B, C, H, W) where stage (B,) is k, from its own pictures",
        check="""
decoders = [Decoder(1, width, encoder.skip_widths, **plan) for width in (48, 32, 16)]
mixed = dispatch_batch(x, t, encoder, decoders, cuts)
swapped = dispatch_batch(x.flip(0), t.flip(0), encoder, decoders, cuts).flip(0)
gap = (mixed - swapped).abs().max()
assert gap < 1e-4, f"in another order the pictures get other answers: off by {gap}"
""",
        wrong={
            "one decoder for the whole batch": """
        if k == stage[0]:
            noise = decoder(middle, skips, emb)
""",
        },
    ),
    "Eq. 4": dict(
        step="04_train",
        lines="""
    xt = sde.perturb(x0, eps, t, sde.VP)  # Eq. 1
    return ((model(xt, t) - eps) ** 2).mean()  # Eq. 4
""",
        says="blur x0 (B, C, H, W) with eps at t (B,), and return the model's mean squared error",
        check="""
s, sigma = (sde.per_image(value, x0) for value in (sde.VP.s(t), sde.VP.sigma(t)))
knows = lambda x, t: (x / s - x0) / sigma  # a network that knows the picture
off = compute_loss(knows, x0, t, eps)
assert off < 1e-6, f"who knows the picture knows the noise; its loss is {off}, not 0"
nothing = compute_loss(lambda x, t: 0 * x, x0, t, eps)
assert abs(nothing - (eps**2).mean()) < 1e-6, f"who says 0 is off by {nothing}, not eps² on average"
""",
        wrong={
            "the picture in place of the noise": """
    xt = sde.perturb(x0, eps, t, sde.VP)
    return ((model(xt, t) - x0) ** 2).mean()
""",
            "the sum in place of the mean": """
    xt = sde.perturb(x0, eps, t, sde.VP)
    return ((model(xt, t) - eps) ** 2).sum()
""",
        },
    ),
    "the moving average": dict(
        step="04_train",
        lines="""
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(weight, 1 - d)  # d * mean + (1 - d) * weight
""",
        says="move every averaged parameter, in place: d of itself, 1 - d of the model's",
        check="""
one, other = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
one.weight.data.fill_(0.0), other.weight.data.fill_(1.0)
update_average(one, other, n=8)  # d is 9/18
update_average(one, other, n=90)  # d is 91/100
assert abs(one.weight.item() - 0.545) < 1e-6, f"0, then 0.5, then 0.545, not {one.weight.item()}"
""",
        wrong={
            "d and 1 − d exchanged": """
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(weight, d)
""",
            "a new tensor in place of the old": """
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean = d * mean + (1 - d) * weight
""",
        },
    ),
    "DDIM": dict(
        step="05_sample_eval",
        lines="""
        z = z + (sigma_next - sigma) * e  # DDIM
""",
        says="go from sigma to sigma_next along the noise e; z and e have x's shape",
        check="""
errors = measure_errors(ddim, sde.VP, [40, 80])
order = math.log2(errors[0] / errors[1])
assert 0.8 < order < 1.3, f"half the step, half the error: its order is 1, not {order:.2f}"
""",
        wrong={
            "the sign": """
        z = z - (sigma_next - sigma) * e
""",
            "to the picture in place of the next level": """
        z = z - sigma * e
""",
        },
    ),
    "DPM-Solver-3": dict(
        step="05_sample_eval",
        lines="""
        D2 = noise(u2, lam + r2 * h) - e
        second = 1 / r2 * (expm1(h) / h - 1) * D2
        z = z - exp(-lam - h) * (expm1(h) * e + second)  # DPM-Solver-3
""",
        says="write the last of three evaluations and the step, as Algorithm 2 of Lu et al. 2022a",
        check="""
errors = measure_errors(dpm_solver_3, sde.VP, [129, 255])
order = math.log(errors[0] / errors[1], 255 / 129)
assert order > 2.5, f"its order is {order:.2f}: a term is missing or wrong"
""",
        wrong={
            "without the second difference, of order 1": """
        z = z - exp(-lam - h) * expm1(h) * e
""",
            "the first difference once more, of order 2": """
        second = 1 / r1 * (expm1(h) / h - 1) * D1
        z = z - exp(-lam - h) * (expm1(h) * e + second)
""",
        },
    ),
    "the Fréchet distance": dict(
        step="05_sample_eval",
        lines="""
    (m1, C1), (m2, C2) = ((f.mean(0), torch.cov(f.T)) for f in (a.double(), b.double()))
    root = torch.linalg.eigvals(C1 @ C2).real.clamp(min=0).sqrt()
    return float(((m1 - m2) ** 2).sum() + C1.trace() + C2.trace() - 2 * root.sum())  # Frechet
""",
        says="compare the means (d,) and covariances (d, d) of a (n, d) and b (m, d): a float",
        check="""
a = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)).double()
a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(a.T))).T  # exactly whitened
found = frechet_distance(a, 3 * a + torch.tensor([1.0, 2.0]))
assert abs(found - 13) < 1e-6, f"1² + 2² for the means, (3 - 1)² twice: 13, not {found}"
""",
        wrong={
            "the product of the covariances without its root": """
    (m1, C1), (m2, C2) = ((f.mean(0), torch.cov(f.T)) for f in (a.double(), b.double()))
    return float(((m1 - m2) ** 2).sum() + (C1 + C2 - 2 * C1 @ C2).trace())
""",
            "pictures in rows and columns exchanged": """
    (m1, C1), (m2, C2) = ((f.mean(0), torch.cov(f)) for f in (a.double(), b.double()))
    root = torch.linalg.eigvals(C1 @ C2).real.clamp(min=0).sqrt()
    return float(((m1 - m2) ** 2).sum() + C1.trace() + C2.trace() - 2 * root.sum())
""",
        },
    ),
    "the latent scale": dict(
        step="06_ldm",
        lines="""
    scale = 1 / h.std()
""",
        says="write the number by which the latents h are multiplied, so that their variance is 1",
        check="""
assert abs((scale * h).std() - 1) < 1e-3, f"the spread is {(scale * h).std():.3f}, not 1"
""",
        wrong={
            "the spread itself": """
    scale = h.std()
""",
            "one over the variance": """
    scale = 1 / h.var()
""",
        },
    ),
}


def opened(source, gap, lines=None):
    """Replace a gap's lines in a cell's source: by what it asks for, or by other lines."""
    own = gap["lines"].strip("\n")
    if lines is None:
        indent = own[: len(own) - len(own.lstrip())]
        raises = f'raise NotImplementedError("{gap["says"]}")  # in place of this line'
        lines = indent + raises
    return source.replace(own, lines.strip("\n"))


def cut_behind(source, lines):
    """Cut a cell behind its gap, so that the check comes before what uses it: (first, second)."""
    before, rest = source.split(lines)
    function, main, use = rest.partition('\n\n\nif __name__ == "__main__"')
    if main:  # the gap is in a function, and what follows uses it
        return before + lines + function, main.strip() + use
    *_, head = re.findall('^if __name__ == "__main__".*$', before, re.MULTILINE) or [""]
    if head and rest:
        return before + lines, head + rest
    return source, ""


def with_gaps(step, chosen=None):
    """Make the notebook of a step with its gaps, or those chosen, and a check behind each."""
    notebook = jupytext.read(ROOT / f"{step}.py")
    for name, gap in GAPS.items():
        if gap["step"] != step:
            continue
        lines = gap["lines"].strip("\n")
        (i,) = [i for i, cell in enumerate(notebook.cells) if lines in cell.source]
        cell = notebook.cells[i]
        cell.source, use = cut_behind(cell.source, lines)
        body = textwrap.indent(gap["check"].strip(), "    ")  # leaves the lesson's names alone
        more = [f"# check: {name}\ndef check():\n{body}\n\n\ncheck()", use]
        notebook.cells[i + 1 : i + 1] = [nbformat.v4.new_code_cell(code) for code in more if code]
        if chosen is None or name in chosen:
            cell.source = opened(cell.source, gap)
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "exercise"]
    return notebook


def write(out):
    """Write the student's version into a folder, which is replaced."""
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for step in STEPS:
        shutil.copy(ROOT / f"{step}.py", part)
        if any(gap["step"] == step for gap in GAPS.values()):
            jupytext.write(with_gaps(step), part / f"{step}.ipynb")
    for name in ("requirements.txt", "constraints.txt"):
        shutil.copy(ROOT / name, part)
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)
    print(f"{len(GAPS)} gaps in {out}: open its notebooks there, each says what is to be written")


if __name__ == "__main__":
    parser = argparse.ArgumentParser("student.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "student", help="folder to write")
    write(parser.parse_args().out)
    sys.exit(0)
