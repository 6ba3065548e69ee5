"""Write the student's version: notebooks with gaps, and a check after each (make student).

    python docs/student.py           # into student/
    python docs/student.py --solved  # with the gaps filled, into solved/ (make solved)

A gap is a piece of a lesson that stands here once more, with what is asked for in its place, a
check that tells right from wrong, and wrong answers that students give. What the lesson says above
a gap is left out where the answer could be copied. The notebooks import the whole scripts of
earlier steps, so that no week depends on the one before.
"""

import argparse
import re
import shutil
import textwrap
from pathlib import Path

import jupytext
import nbformat

ROOT = Path(__file__).resolve().parent.parent
STEPS = sorted(path.stem for path in ROOT.glob("0[0-9]_*.py"))

# step, lines: what is taken out; says: what is to be written, with its shapes; hides: {what the
# lesson says above, where it would only be copied: what stands there instead}; check: what follows
# the cell, and says in a sentence what is wrong; wrong: {what goes wrong: lines of such an answer}
GAPS = {
    "the kernel's σ": dict(
        step="01_sde_and_denoiser",
        lines="""
        return torch.sqrt(torch.expm1(self.B(t)))  # expm1(B) = e^B - 1
""",
        says="return sigma_t, of t's shape, from self.B(t): s² (1 + σ²) = 1",
        hides={r"\sigma_t=\sqrt{e^{B}-1}": r"\sigma_t=\;?"},
        check="""
t = torch.tensor([0.01, 0.1, 0.5, 1.0])
s, sigma = VP.s(t), torch.as_tensor(VP.sigma(t))
assert sigma.shape == t.shape, f"four times have four σ, not one tensor of {tuple(sigma.shape)}"
assert sigma[-1] > 1, f"at t = 1 noise covers the picture, so σ is above 1, not {sigma[-1]:.3f}"
kept = s**2 * (1 + sigma**2)
said = ", ".join(f"{v:.3f}" for v in kept)
assert torch.allclose(kept, torch.ones(4)), f"s² (1 + σ²) is to be 1 at all times, not {said}"
""",
        wrong={
            "the noise in x_t, sσ, for σ": """
        return torch.sqrt(-torch.expm1(-self.B(t)))
""",
            "the square root forgotten": """
        return torch.expm1(self.B(t))
""",
            "e^B without the 1": """
        return torch.exp(self.B(t) / 2)
""",
            "half of B": """
        return torch.sqrt(torch.expm1(self.B(t) / 2))
""",
            "the scale in place of the noise level": """
        return torch.exp(-self.B(t) / 2)
""",
            "one number for all times": """
        return torch.sqrt(torch.expm1(self.B(t))).mean()
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
        hides={
            r"""The
weights are $\mathrm{softmax}_i(-\|x/s_t-y_i\|^2/2\sigma_t^2)$, and the code is four lines.""": """
Divide by what all Gaussians share: that leaves the weights, and the code is four lines."""
        },
        check="""
pair, t = torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1), torch.tensor([0.1, 0.2, 0.3])
x = torch.tensor([0.3, -0.2, 0.4]).reshape(3, 1, 1, 1)
ask = lambda x, t, known=pair: plain_posterior_mean(x, t, VP, known).double().flatten()
say = lambda values: [round(v, 3) for v in values.tolist()]
only = ask(x, t, pair[1:])
assert torch.allclose(only, torch.ones(3).double()), f"the only picture is 1; you see {say(only)}"
near, far = ask(pair, torch.full((2,), 1e-3)), ask(x, torch.ones(3))
assert (near - pair.flatten()).abs().max() < 0.01, f"in clean pictures of -1, 1 you see {say(near)}"
assert far.abs().max() < 0.01, f"in nothing but noise the mean of -1 and 1 is 0, not {say(far)}"
seen, alone = ask(x, t), torch.cat([ask(x[i : i + 1], t[i : i + 1]) for i in range(3)])
assert torch.allclose(seen, alone), "what is seen in a picture depends on the others of its batch"
known = torch.tanh(x.flatten() / VP.s(t) / VP.sigma(t) ** 2).double()  # of two points, -1 and 1
why = f"between picture and noise you see {say(seen)}, not {say(known)}: look at the exponent"
assert torch.allclose(seen, known), why
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
            "the sign of the exponent": """
    weights = torch.softmax(square / (2 * per_image(kernel.sigma(t), z) ** 2), 1)
    return (weights @ y).to(x.dtype).reshape(x.shape)
""",
            "weights that do not sum to one": """
    weights = torch.exp(-square / (2 * per_image(kernel.sigma(t), z) ** 2))
    return (weights @ y).to(x.dtype).reshape(x.shape)
""",
            "σ in place of σ²": """
    weights = torch.softmax(-square / (2 * per_image(kernel.sigma(t), z)), 1)
    return (weights @ y).to(x.dtype).reshape(x.shape)
""",
            "the nearest picture in place of the average": """
    return y[square.argmin(1)].to(x.dtype).reshape(x.shape)
""",
            "the mean of all pictures": """
    return y.mean(0).expand_as(z).to(x.dtype).reshape(x.shape)
""",
        },
    ),
    "the similarity D": dict(
        step="02_clustering",
        lines="""
    return ((eps_a - eps_b).abs() <= eta).flatten(1).double().mean(1)  # Eq. 6
""",
        says="return for each of B the share of its C·H·W entries that differ by eta or less: (B,)",
        hides={
            r"""=\frac1n\sum_{i=1}^n
  \mathbb 1\big(|\epsilon^*_{t_a}(x_{t_a})-\epsilon^*_{t_b}(x_{t_b})|_i\le\eta\big)""": r"=\;?"
        },
        check="""
a = torch.zeros(2, 2, 1, 2)
b = torch.tensor([[0.0, 0.007, -0.007, -1.0], [1.0, 1.0, 1.0, 2 / 256]]).reshape(a.shape)
found = torch.as_tensor(similarity(a, b))
assert found.shape == (2,), f"two pictures have two D, not a tensor of {tuple(found.shape)}"
assert found.tolist() == [0.75, 0.25], f"of four entries 3 and 1 are alike, so not {found.tolist()}"
found = similarity(a, b, eta=0.001).tolist()
assert found == [0.25, 0], f"with eta = 0.001 one entry and none are alike, so not {found}"
""",
        wrong={
            "no absolute value": """
    return (eps_a - eps_b <= eta).flatten(1).double().mean(1)
""",
            "one number for the batch": """
    return ((eps_a - eps_b).abs() <= eta).double().mean()
""",
            "less than η in place of at most": """
    return ((eps_a - eps_b).abs() < eta).flatten(1).double().mean(1)
""",
            "the share that is not alike": """
    return ((eps_a - eps_b).abs() > eta).flatten(1).double().mean(1)
""",
            "a number in place of a share": """
    return ((eps_a - eps_b).abs() <= eta).flatten(1).double().sum(1)
""",
            "all channels of a pixel at once": """
    return ((eps_a - eps_b).abs() <= eta).all(1).flatten(1).double().mean(1)
""",
            "η written as a number": """
    return ((eps_a - eps_b).abs() <= 2 / 256).flatten(1).double().mean(1)
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
        hides={
            r"""t_1=\arg\max_\tau\{\tau\mid\mathbb E_{t\sim[0,\tau]}
  [\mathcal S(\epsilon^*_t,\epsilon^*_0)]\ge\alpha\},""": r"t_1=\;?,",
            r"""t_2=\arg\min_\tau\{\tau\mid\mathbb E_{t\sim[\tau,1]}
  [\mathcal S(\epsilon^*_t,\epsilon^*_1)]\ge\alpha\}.""": r"t_2=\;?",
            r"""$t_1=\arg\max_\tau\Big\{\tau\,\Big|\,
> \frac{\sum_{(t_k,\mathcal S_0^k)\in\mathcal S_0}[\mathcal S_0^k\cdot\mathbb 1(t_k\le\tau)]}
> {\sum_{(t_k,\mathcal S_0^k)\in\mathcal S_0}[\mathbb 1(t_k\le\tau)]}\ge\alpha\Big\}$""": "…",
            r"""$t_2=\arg\min_\tau\Big\{\tau\,\Big|\,
> \frac{\sum_{(t_k,\mathcal S_1^k)\in\mathcal S_1}[\mathcal S_1^k\cdot\mathbb 1(t_k\ge\tau)]}
> {\sum_{(t_k,\mathcal S_1^k)\in\mathcal S_1}[\mathbb 1(t_k\ge\tau)]}\ge\alpha\Big\}$""": "…",
        },
        check="""
for alpha in (0.9, 0.95):
    cuts, _, _, (tau, up, down) = plain_algorithm_1(images, 500, alpha=alpha)
    for name, cut, average in (("t_1", cuts[0], up), ("t_2", cuts[1], down)):
        assert 0 < cut < 1, f"{name} = {cut} is no time between 0 and 1"
        here = average[(tau - cut).abs().argmin()]
        why = f"a stage up to {name} = {cut:.3f} is alike to {here:.2f} on average, not to {alpha}"
        assert here >= alpha, why
        longer = average[tau > cut if name == "t_1" else tau < cut]
        why = f"with α = {alpha} the stage could be longer than to {name} = {cut:.3f}"
        assert not (longer >= alpha).any(), why
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
            "the averages exchanged": """
    t_1 = max(tau[down >= alpha].tolist(), default=VP.t_min)
    t_2 = min(tau[up >= alpha].tolist(), default=VP.t_max)
""",
            "below α in place of above": """
    t_1 = max(tau[up <= alpha].tolist(), default=VP.t_min)
    t_2 = min(tau[down <= alpha].tolist(), default=VP.t_max)
""",
            "the dots in place of their average": """
    t_1 = max(S_0[0][S_0[1] >= alpha].tolist(), default=VP.t_min)
    t_2 = min(S_1[0][S_1[1] >= alpha].tolist(), default=VP.t_max)
""",
            "t_1 and t_2 exchanged": """
    t_2 = max(tau[up >= alpha].tolist(), default=VP.t_min)
    t_1 = min(tau[down >= alpha].tolist(), default=VP.t_max)
""",
            "the place in the list in place of the time": """
    t_1 = int((up >= alpha).nonzero().max())
    t_2 = int((down >= alpha).nonzero().min())
""",
            "α written as a number": """
    t_1 = max(tau[up >= 0.9].tolist(), default=VP.t_min)
    t_2 = min(tau[down >= 0.9].tolist(), default=VP.t_max)
""",
        },
    ),
    "the dispatch": dict(
        step="03_multistage_unet",
        lines="""
        mine = stage == k  # dispatch: (B,) of truth values
        if mine.any():
            noise[mine] = decoder(middle[mine], [skip[mine] for skip in skips], emb[mine])
""",
        says="let decoder k fill noise (B, C, H, W) where stage (B,) is k, from its own pictures",
        hides={", which\n`mine` picks out, and what it says is put in their places.": "."},
        check="""
constant = [lambda middle, *_, k=k: torch.full((len(middle), 1, 8, 8), k) for k in (1.0, 2.0, 3.0)]
noise = (dispatch_batch(x, t, encoder, constant, cuts) - x).mean((1, 2, 3))
said, asked = [f"{v - 1:.3g}" for v in noise.tolist()], [f"{k}" for k in find_stage(t, cuts)]
why = f"pictures of the stages {' '.join(asked)} were given to the decoders {' '.join(said)}"
assert said == asked, why
mean = lambda middle, skips, emb: sum(v.flatten(1).mean(1) for v in (middle, *skips, emb))
tells = lambda *given: mean(*given)[:, None, None, None].expand(-1, *x.shape[1:])
gap = (dispatch_batch(x, t, encoder, [tells] * 3, cuts) - x - tells(*encoder(x, t))).abs().max()
why = f"a decoder was given the features, skips or time of other pictures: {gap:.2g} off"
assert gap < 1e-5, why
""",
        wrong={
            "one decoder for the whole batch": """
        if k == stage[0]:
            noise = decoder(middle, skips, emb)
""",
            "the last decoder for everybody": """
        noise = decoder(middle, skips, emb)
""",
            "every stage but its own": """
        mine = stage != k
        if mine.any():
            noise[mine] = decoder(middle[mine], [skip[mine] for skip in skips], emb[mine])
""",
            "the stages reversed": """
        mine = stage == len(decoders) - 1 - k
        if mine.any():
            noise[mine] = decoder(middle[mine], [skip[mine] for skip in skips], emb[mine])
""",
            "stages up to k": """
        mine = stage <= k
        if mine.any():
            noise[mine] = decoder(middle[mine], [skip[mine] for skip in skips], emb[mine])
""",
            "the features of the first pictures": """
        mine = stage == k
        n = int(mine.sum())
        if n:
            noise[mine] = decoder(middle[:n], [skip[:n] for skip in skips], emb[:n])
""",
            "no times": """
        mine = stage == k
        if mine.any():
            noise[mine] = decoder(middle[mine], [skip[mine] for skip in skips], 0 * emb[mine])
""",
            "the times of the first pictures": """
        mine = stage == k
        if mine.any():
            few = [skip[mine] for skip in skips]
            noise[mine] = decoder(middle[mine], few, emb[: len(few[0])])
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
        hides={
            r"""$-(x_t-s_tx_0)/(s_t\sigma_t)^2=-\epsilon/(s_t\sigma_t)$, and the second term is
$-\epsilon$: the network is compared with the noise.""": "known. What is the second term?"
        },
        check="""
shown = []
nothing = compute_loss(lambda x, t: shown.append((x, t)) or 0 * x, x0, t, eps)
assert nothing.shape == (), f"a loss is one number, not a tensor of {tuple(nothing.shape)}"
away = (shown[0][0] - sde.perturb(x0, eps, t, sde.VP)).abs().max()
assert away < 1e-5, f"show the model x_t, each at its own time; what it saw is {away:.2g} off"
why = f"tell the model the time of each picture, such as {t[0]:.3g}, not {shown[0][1]}"
assert torch.equal(shown[0][1], t), why
why = f"the loss of who says 0 is the mean of eps², {(eps**2).mean():.3f}, not {nothing:.3f}"
assert abs(nothing - (eps**2).mean()) < 1e-6, why
s, sigma = (sde.per_image(value, x0) for value in (sde.VP.s(t), sde.VP.sigma(t)))
knows = lambda x, t: (x / s - x0) / sigma  # a network that knows the picture
off = compute_loss(knows, x0, t, eps)
assert off < 1e-6, f"who knows the picture knows the noise, so its loss is 0, not {off:.3g}"
""",
        wrong={
            "the model is not told the time": """
    xt = sde.perturb(x0, eps, t, sde.VP)
    return ((model(xt, 0 * t) - eps) ** 2).mean()
""",
            "the picture in place of the noise": """
    xt = sde.perturb(x0, eps, t, sde.VP)
    return ((model(xt, t) - x0) ** 2).mean()
""",
            "the sum in place of the mean": """
    xt = sde.perturb(x0, eps, t, sde.VP)
    return ((model(xt, t) - eps) ** 2).sum()
""",
            "the sign of the noise": """
    xt = sde.perturb(x0, eps, t, sde.VP)
    return ((model(xt, t) + eps) ** 2).mean()
""",
            "the clean picture is shown": """
    return ((model(x0, t) - eps) ** 2).mean()
""",
            "one time for the whole batch": """
    xt = sde.perturb(x0, eps, t[0], sde.VP)
    return ((model(xt, t) - eps) ** 2).mean()
""",
            "the absolute error": """
    xt = sde.perturb(x0, eps, t, sde.VP)
    return (model(xt, t) - eps).abs().mean()
""",
            "a loss for each picture": """
    xt = sde.perturb(x0, eps, t, sde.VP)
    return ((model(xt, t) - eps) ** 2).mean((1, 2, 3))
""",
        },
    ),
    "the moving average": dict(
        step="04_train",
        lines="""
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(weight, 1 - d)  # EMA: d * mean + (1 - d) * weight
""",
        says="let every averaged parameter follow the model's, in place, by the decay d",
        hides={r"\bar\theta\leftarrow d\,\bar\theta+(1-d)\,\theta,\qquad d=": "d="},
        check="""
one, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
for net, value in ((one, 0.0), (other, 1.0)):
    net.weight.data.fill_(value), net.bias.data.fill_(value)
mean, bias = one.weight, one.bias
update_average(one, other, n=8)  # d is 9/18
assert mean.item() != 0, "the average has not changed: write into the parameter itself, in place"
assert other.weight.item() == 1, f"the model may not change; its 1 is now {other.weight.item()}"
assert mean.item() == 0.5, f"half of 0 and half of 1 is 0.5, not {mean.item():.3f}"
update_average(one, other, n=90)  # d is 91/100
assert abs(mean.item() - 0.545) < 1e-6, f"91% of 0.5 and 9% of 1 is 0.545, not {mean.item():.3f}"
why = f"all parameters are to follow, and the bias is {bias.item():.3f}, not 0.545"
assert abs(bias.item() - 0.545) < 1e-6, why
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
            "the model follows its average": """
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        weight.lerp_(mean, 1 - d)
        mean.copy_(weight)
""",
            "a copy of the model": """
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean.copy_(weight)
""",
            "the final decay from the beginning": """
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(weight, 1 - decay)
""",
            "added, and nothing forgotten": """
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean.add_(weight, alpha=1 - d)
""",
            "the first parameter only": """
    mean, weight = next(average.parameters()), next(model.parameters())
    mean.lerp_(weight, 1 - d)
""",
        },
    ),
    "Heun": dict(
        step="05_sample_eval",
        lines="""
            e_next = noise_at(eps, kernel, z + (sigma_next - sigma) * e, sigma_next)
            e = (e + e_next) / 2
""",
        says="look where Euler's step leads, and let e be the noise to go with, of z's shape",
        hides={",\n$z'=z+(\\sigma'-\\sigma)\\,\\tfrac12(\\epsilon+\\epsilon')$": ""},
        check="""
seen, (sigma, sigma_next, _) = [], heun_levels(sde.VP, 3, 7)
says = lambda x, t: seen.append(x.item()) or torch.full_like(x, 2.0 * len(seen) - 1)  # 1, then 3
x = next(heun(says, sde.VP, torch.zeros(1, 1, 1, 1).double(), 3)).item()
why = f"in a step of Heun's method the noise is asked for twice, not {len(seen)} times"
assert len(seen) == 2, why
there = float(unscale(sde.VP, sigma_next - sigma, sigma_next))
why = f"where Euler's step ends, x is {there:.4g}; the noise was asked for at {seen[1]:.4g}"
assert abs(seen[1] - there) < 1e-6 * abs(there), why
why = f"the noises 1 and 3 lead from 0 to {2 * there:.4g}, by their mean, and not to {x:.4g}"
assert abs(x - 2 * there) < 1e-6 * abs(there), why
""",
        wrong={
            "the noise at the end alone": """
            e = noise_at(eps, kernel, z + (sigma_next - sigma) * e, sigma_next)
""",
            "the noise at the beginning alone": """
            e_next = noise_at(eps, kernel, z + (sigma_next - sigma) * e, sigma_next)
""",
            "the sum in place of the average": """
            e_next = noise_at(eps, kernel, z + (sigma_next - sigma) * e, sigma_next)
            e = e + e_next
""",
            "asked before the step is taken": """
            e_next = noise_at(eps, kernel, z, sigma_next)
            e = (e + e_next) / 2
""",
            "asked at the old noise level": """
            e_next = noise_at(eps, kernel, z + (sigma_next - sigma) * e, sigma)
            e = (e + e_next) / 2
""",
            "unequal weights": """
            e_next = noise_at(eps, kernel, z + (sigma_next - sigma) * e, sigma_next)
            e = (e + 2 * e_next) / 3
""",
            "the middle of the step": """
            middle = (sigma + sigma_next) / 2
            e = noise_at(eps, kernel, z + (middle - sigma) * e, middle)
""",
            "the step is taken twice": """
            z = z + (sigma_next - sigma) * e
            e = (e + noise_at(eps, kernel, z, sigma_next)) / 2
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
why = f"more evaluations do not help: z ends {errors[1]:.2g} off the exact path"
assert order > 0.5, why
why = "1 means no slope, or a wrong one, and 2 a slope from the first difference"
assert order > 2.5, f"order {order:.1f}, not 3: {why}"
""",
        wrong={
            "without the second difference, of order 1": """
        z = z - exp(-lam - h) * expm1(h) * e
""",
            "the first difference once more, of order 2": """
        second = 1 / r1 * (expm1(h) / h - 1) * D1
        z = z - exp(-lam - h) * (expm1(h) * e + second)
""",
            "1/r₂ forgotten": """
        D2 = noise(u2, lam + r2 * h) - e
        z = z - exp(-lam - h) * (expm1(h) * e + (expm1(h) / h - 1) * D2)
""",
            "the noise in place of its difference": """
        D2 = noise(u2, lam + r2 * h)
        second = 1 / r2 * (expm1(h) / h - 1) * D2
        z = z - exp(-lam - h) * (expm1(h) * e + second)
""",
            "asked at the end of the step": """
        D2 = noise(u2, lam + h) - e
        second = 1 / r2 * (expm1(h) / h - 1) * D2
        z = z - exp(-lam - h) * (expm1(h) * e + second)
""",
            "the sign of the slope": """
        D2 = noise(u2, lam + r2 * h) - e
        second = 1 / r2 * (expm1(h) / h - 1) * D2
        z = z - exp(-lam - h) * (expm1(h) * e - second)
""",
            "from u₂ on in place of z": """
        D2 = noise(u2, lam + r2 * h) - e
        second = 1 / r2 * (expm1(h) / h - 1) * D2
        z = u2 - exp(-lam - h) * (expm1(h) * e + second)
""",
        },
    ),
    "the Fréchet distance": dict(
        step="05_sample_eval",
        lines="""
    (m1, C1), (m2, C2) = ((f.mean(0), torch.cov(f.T)) for f in (a.double(), b.double()))
    root = torch.linalg.eigvals(C1 @ C2).real.clamp(min=0).sqrt()
    return float(((m1 - m2) ** 2).sum() + C1.trace() + C2.trace() - 2 * root.sum())  # Fréchet
""",
        says="compare the means (d,) and covariances (d, d) of a (n, d) and b (m, d): a float",
        hides={
            "The trace of a matrix root is the sum of the roots of the eigenvalues.": (
                "Whose eigenvalues give the trace of the root?"
            )
        },
        check="""
a = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)).double()
a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(a.T))).T  # exactly whitened
moved, wide = a + torch.tensor([1.0, 2.0]), a * torch.tensor([1.0, 4.0])
turned = a @ torch.linalg.cholesky(torch.tensor([[5.0, 4.0], [4.0, 5.0]]).double()).T
found = frechet_distance(a, moved)
assert abs(found - 5) < 1e-6, f"a cloud moved by 1 and 2 is 1² + 2² = 5 away, not {found:.3f}"
found = frechet_distance(a, 3 * a)
why = f"three times as wide in 2 directions is (3 - 1)² + (3 - 1)² = 8 away, not {found:.3f}"
assert abs(found - 8) < 1e-6, why
found, known = frechet_distance(wide, turned), 27 - 2 * 109**0.5  # in closed form, of 2×2 matrices
why = f"these two covariances do not commute; their clouds are {known:.3f} apart, not {found:.3f}"
assert abs(found - known) < 1e-6, why
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
            "the variances alone": """
    (m1, v1), (m2, v2) = ((f.mean(0), f.var(0)) for f in (a.double(), b.double()))
    return float(((m1 - m2) ** 2).sum() + ((v1.sqrt() - v2.sqrt()) ** 2).sum())
""",
            "the eigenvalues of each matrix by itself": """
    (m1, C1), (m2, C2) = ((f.mean(0), torch.cov(f.T)) for f in (a.double(), b.double()))
    root = (torch.linalg.eigvalsh(C1) * torch.linalg.eigvalsh(C2)).sqrt()
    return float(((m1 - m2) ** 2).sum() + C1.trace() + C2.trace() - 2 * root.sum())
""",
            "the root of the trace": """
    (m1, C1), (m2, C2) = ((f.mean(0), torch.cov(f.T)) for f in (a.double(), b.double()))
    return float(((m1 - m2) ** 2).sum() + C1.trace() + C2.trace() - 2 * (C1 @ C2).trace().sqrt())
""",
            "the distance of the means, not its square": """
    (m1, C1), (m2, C2) = ((f.mean(0), torch.cov(f.T)) for f in (a.double(), b.double()))
    root = torch.linalg.eigvals(C1 @ C2).real.clamp(min=0).sqrt()
    return float((m1 - m2).norm() + C1.trace() + C2.trace() - 2 * root.sum())
""",
            "the means forgotten": """
    C1, C2 = (torch.cov(f.T) for f in (a.double(), b.double()))
    root = torch.linalg.eigvals(C1 @ C2).real.clamp(min=0).sqrt()
    return float(C1.trace() + C2.trace() - 2 * root.sum())
""",
        },
    ),
    "the latent scale": dict(
        step="06_ldm",
        lines="""
    scale = 1 / a.std()
""",
        says="write the number by which a is multiplied, so that the latents have variance 1",
        hides={
            r"a' = a\,/\,\mathrm{std}(a),\qquad "
            r"\hat x = \mathrm{Dec}\big(a'\cdot\mathrm{std}(a)\big).": r"a' = \;?"
        },
        check="""
shape = tuple(torch.as_tensor(scale).shape)
assert shape == (), f"one number for all latents is wanted, not a tensor of {shape}"
spread = (scale * a).std()
assert abs(spread - 1) < 1e-3, f"times scale the latents spread by {spread:.3f}, not by 1"
""",
        wrong={
            "the spread itself": """
    scale = a.std()
""",
            "one over the variance": """
    scale = 1 / a.var()
""",
            "a number for each channel": """
    scale = 1 / a.std((0, 2, 3), keepdim=True)
""",
            "the largest value to 1": """
    scale = 1 / a.abs().max()
""",
            "the spread of the pictures": """
    scale = 1 / x0.std()
""",
            "the spread of one picture": """
    scale = 1 / a[0].std()
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
    python = dict(display_name="Python 3", language="python", name="python3")
    notebook.metadata["kernelspec"] = python
    for cell in notebook.cells:
        if "draws" in cell.metadata.get("tags", []):
            cell.metadata["jupyter"] = {"source_hidden": True}  # so that Jupyter folds it
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
            for told, instead in gap.get("hides", {}).items():
                (above,) = [c for c in notebook.cells[:i] if told in c.source]
                above.source = above.source.replace(told, instead.strip("\n"))
    return notebook


def write(out, chosen=None):
    """Write the notebooks with their gaps, or those chosen, into a folder, which is replaced."""
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for step in STEPS:
        shutil.copy(ROOT / f"{step}.py", part)
        if any(gap["step"] == step for gap in GAPS.values()):
            jupytext.write(with_gaps(step, chosen), part / f"{step}.ipynb")
    for name in ("requirements.txt", "constraints.txt"):
        shutil.copy(ROOT / name, part)
    no_cache = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "pretrained", part / "pretrained", ignore=no_cache)
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)
    gaps = len(GAPS if chosen is None else chosen)
    print(f"notebooks with {gaps} gaps are in {out}: open them there")


if __name__ == "__main__":
    parser = argparse.ArgumentParser("student.py", description=__doc__.splitlines()[0])
    parser.add_argument("--solved", action="store_true", help="fill the gaps, keep the checks")
    parser.add_argument("--out", type=Path, help="folder to write, if not student/ or solved/")
    asked = parser.parse_args()
    out = asked.out or ROOT / ("solved" if asked.solved else "student")
    write(out, chosen=[] if asked.solved else None)
