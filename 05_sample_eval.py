# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 05 · Drawing samples, and saying how good they are
#
# **You will** derive the solvers of the paper's Table 1, from DDIM to DPM-Solver++, from one line,
# check their order on a case with a known answer, draw digits with the network of step 04, and measure them with a Fréchet distance, KID and
# precision and recall, each beside the value that real pictures reach.

# %%
import importlib
import os

if __name__ == "__main__" and os.path.basename(os.getcwd()) == "notebooks":
    os.chdir("..")  # a notebook that was opened where it lies
workshop = importlib.import_module("00_workshop")  # first: it readies the process for torch

import copy
import inspect
import math
import sys
import time
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.integrate import solve_ivp
from torch import nn
from tqdm import tqdm

sde = importlib.import_module("01_sde_and_denoiser")
unet = importlib.import_module("03_multistage_unet")
training = importlib.import_module("04_train")
BadInput = workshop.BadInput

# %% tags=["parameters"]
name = "digits-multistage"  # name of the run to sample from
out = "runs"  # the folder that holds the runs
root = "data"  # where the run's data set lies or is downloaded to
sampler = "dpm-solver-3"  # any of SAMPLERS: ddim, deis-3, dpm-solver++-2m, heun, ancestral, …
nfe = 20  # evaluations of the network for one picture (heun: an odd number) [1, 10000]
grid = ""  # where the solver stops: log-snr, time or quadratic; empty: the solver's own choice
samples = 898  # pictures to draw and measure; at most half the data set [10, 10000000]
batch = 300  # pictures drawn at a time [1, 1000000]
seed = 1  # seed of the start noise [0, 4294967295]
reference = ""  # a folder of pictures to compare with; empty: the run's data set
weights = ""  # file of Inception's weights; empty: torch-fidelity's cache, else its download
features = ""  # TorchScript file, uint8 (B, C, H, W) to features (B, d), in place of Inception
compile = False  # compile the network first (worth it for thousands of pictures on a GPU)
compare = False  # also measure every kind of solver at 5 to 50 evaluations (minutes)
model_for_stage = ""  # runs that serve single stages: an example stands at `Hybrid` below

# %%
workshop.settings(globals(), "05_sample_eval")

# %% [markdown]
# ## One line behind all of them
#
# Divide the probability-flow ODE's solution by the scale, $z=x/s$, and measure time by the noise
# level $\sigma$ itself. The drift $f$ and all kernel constants cancel, and what is left is
#
# $$\frac{\mathrm dz}{\mathrm d\sigma}=\epsilon_\theta .$$
#
# Every solver below is a way to integrate this line, with or without fresh noise. All have the same
# arguments: a function `eps(x, t)` that predicts noise, the kernel, the start noise `x` (B, C, H, W)
# at `kernel.t_max`, the number of evaluations `nfe`, and a generator where they draw noise. All
# yield their states. Times and noise levels are float64 numbers on the CPU, as in step 01.
#
# First the times at which they stop. Three grids are in use: equal steps in log-SNR, in time, or in
# the root of time.


# %%
def time_grid(kernel, n, grid="log-snr"):
    """Divide the timeline into n steps: (n + 1,) float64 times from t_max to t_min.

    Raises BadInput for an unknown grid. Source: Lu et al. 2022, Section 3.4 and Appendix D.
    """
    if grid == "log-snr":
        return sde.log_snr_times(kernel, n)
    if grid not in ("time", "quadratic"):
        raise BadInput(f"unknown grid {grid!r}: take log-snr, time or quadratic")
    power = 1 if grid == "time" else 2
    ends = kernel.t_max ** (1 / power), kernel.t_min ** (1 / power)
    return torch.linspace(*ends, n + 1, dtype=torch.float64) ** power


def noise_at(eps, kernel, z, sigma):
    """Ask for the noise in z = x / s at the noise level sigma, a float64 scalar on the CPU."""
    t = kernel.time(-2 * sigma.log())
    x = (kernel.s(t) * z.double()).to(z.dtype)
    return eps(x, t.expand(len(z)).to(z.dtype))


def levels(kernel, x, times):
    """Return z = x / s at the start and the noise levels (n,) of the times."""
    s, sigma = kernel.s(times), kernel.sigma(times)
    return (x.double() / s[0]).to(x.dtype), sigma


def unscale(kernel, z, sigma):
    """Go back from z to x = s z at the noise level sigma."""
    return (kernel.s(kernel.time(-2 * sigma.log())) * z.double()).to(z.dtype)


# %% [markdown]
# **DDIM** is Euler's method on that line, $z'=z+(\sigma'-\sigma)\,\epsilon$; with $\eta>0$ part of
# the predicted noise is replaced by fresh noise, and $\eta=1$ is **DDPM's ancestral sampling**:
# draw $z'$ from the posterior of Gaussian noise, given $z$ and the predicted picture. **gDDIM**
# interpolates between the two in another way: it solves the SDE of noise strength $\lambda$ exactly
# where the data are one point.


# %%
def ddim(eps, kernel, x, nfe, generator=None, eta=0.0, grid="log-snr"):
    """Sample by DDIM; eta: 0 is deterministic, 1 adds as much noise as DDPM.

    Source: Song, Meng, Ermon 2021, Eq. 12.
    """
    z, sigmas = levels(kernel, x, time_grid(kernel, nfe, grid))
    for sigma, sigma_next in zip(sigmas, sigmas[1:], strict=False):
        e = noise_at(eps, kernel, z, sigma)
        # new noise of variance v, and so much less of the predicted noise
        v = (eta * sigma_next / sigma) ** 2 * (sigma**2 - sigma_next**2)
        z = z + ((sigma_next**2 - v).sqrt() - sigma) * e
        if eta:
            z = z + v.sqrt() * sde.fresh_noise(z, generator)
        yield unscale(kernel, z, sigma_next)


def posterior_step(eps, kernel, z, sigma, sigma_next, generator):
    """Draw z at sigma_next from q(z' | z, z_0) at the predicted z_0: one step of DDPM."""
    z_0 = z - sigma * noise_at(eps, kernel, z, sigma)
    keep = (sigma_next / sigma) ** 2
    spread = sigma_next * (1 - keep).sqrt()
    return keep * z + (1 - keep) * z_0 + spread * sde.fresh_noise(z, generator)


def ancestral(eps, kernel, x, nfe, generator=None, grid="time"):
    """Sample as DDPM does, from the posterior q(x' | x, x_0) at the predicted x_0.

    Source: Ho, Jain, Abbeel 2020, Eqs. 7 and 15 (variance beta tilde).
    """
    z, sigmas = levels(kernel, x, time_grid(kernel, nfe, grid))
    for sigma, sigma_next in zip(sigmas, sigmas[1:], strict=False):
        z = posterior_step(eps, kernel, z, sigma, sigma_next, generator)
        yield unscale(kernel, z, sigma_next)


def gddim(eps, kernel, x, nfe, generator=None, lam=0.5, grid="quadratic"):
    """Sample by gDDIM with noise strength lam: 0 is DDIM, 1 is DDPM.

    Source: Zhang, Tao, Chen 2023, Proposition 6 (isotropic case).
    """
    z, sigmas = levels(kernel, x, time_grid(kernel, nfe, grid))
    for sigma, sigma_next in zip(sigmas, sigmas[1:], strict=False):
        e = noise_at(eps, kernel, z, sigma)
        keep = (sigma_next / sigma) ** (lam**2)  # of the predicted noise
        z = z + (sigma_next * keep - sigma) * e
        if lam:
            spread = sigma_next * (1 - keep**2).sqrt()
            z = z + spread * sde.fresh_noise(z, generator)
        yield unscale(kernel, z, sigma_next)


# %% [markdown]
# **Score SDE** alternates: a *predictor* step of the reverse SDE (here the ancestral one), then a
# *corrector* step of Langevin dynamics at the new noise level, whose length follows from a wanted
# ratio of signal to noise. Two evaluations a step.


# %%
def predictor_corrector(eps, kernel, x, nfe, generator=None, snr=0.16, grid="time"):
    """Sample by predictor and corrector; nfe must be even.

    Source: Song et al. 2021, Algorithms 2 to 5 and Appendix G.
    """
    if nfe % 2:
        raise BadInput(f"nfe = {nfe}: predictor-corrector takes two evaluations a step, give 2n")
    z, sigmas = levels(kernel, x, time_grid(kernel, nfe // 2, grid))
    for sigma, sigma_next in zip(sigmas, sigmas[1:], strict=False):
        z = posterior_step(eps, kernel, z, sigma, sigma_next, generator)
        score = -noise_at(eps, kernel, z, sigma_next) / sigma_next
        noise = sde.fresh_noise(z, generator)
        length = [v.flatten(1).norm(dim=1).mean() for v in (noise, score)]
        step = 2 * (snr * length[0] / length[1]) ** 2
        z = z + step * score + (2 * step).sqrt() * noise
        yield unscale(kernel, z, sigma_next)


# %% [markdown]
# **RK45** leaves the steps to scipy's adaptive Runge–Kutta method: it takes the evaluations that its
# tolerance asks for, whatever `nfe` says.


# %%
def rk45(eps, kernel, x, nfe=None, generator=None, tolerance=1e-5):
    """Sample by scipy's RK45 on the line above, in log sigma, yielding the end alone.

    Source: Song et al. 2021, Section 4.3; Dormand and Prince 1980.
    """
    z, (first, last) = levels(kernel, x, torch.tensor([kernel.t_max, kernel.t_min]).double())

    def slope(log_sigma, flat):
        sigma = torch.tensor(log_sigma, dtype=torch.float64).exp()
        now = torch.from_numpy(flat).to(x).reshape(x.shape)
        return (sigma * noise_at(eps, kernel, now, sigma)).double().flatten().cpu().numpy()

    span, start = (float(first.log()), float(last.log())), z.double().flatten().cpu().numpy()
    found = solve_ivp(slope, span, start, method="RK45", rtol=tolerance, atol=tolerance)
    yield unscale(kernel, torch.from_numpy(found.y[:, -1]).to(x).reshape(x.shape), last)


# %% [markdown]
# **DEIS** (tAB) remembers the last evaluations, lays a polynomial in $t$ through them and integrates
# that exactly, here by Gauss–Legendre quadrature: $z'=z+\sum_j C_j\,\epsilon_{i-j}$ with
# $C_j=\int\ell_j\,\mathrm d\sigma$ and $\ell_j$ the Lagrange polynomials.


# %%
def deis(eps, kernel, x, nfe, generator=None, order=3, grid="quadratic"):
    """Sample by DEIS tAB of order 0 to 3 (the degree of the polynomial; 0 is DDIM).

    Source: Zhang and Chen 2023, Eqs. 14 and 15.
    """
    times = time_grid(kernel, nfe, grid)
    z, sigmas = levels(kernel, x, times)
    points, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(40))
    seen = []  # (time, noise), the latest first
    for i in range(nfe):
        seen = [(times[i], noise_at(eps, kernel, z, sigmas[i])), *seen][: order + 1]
        a, b = kernel.sigma(times[i]).log(), kernel.sigma(times[i + 1]).log()
        log_sigma = a + (b - a) * (points + 1) / 2  # quadrature in log sigma
        t = kernel.time(-2 * log_sigma)
        for j, (t_j, e) in enumerate(seen):
            others = [t_k for k, (t_k, _) in enumerate(seen) if k != j]
            basis = math.prod(((t - t_k) / (t_j - t_k) for t_k in others), start=torch.ones(40))
            C = (b - a) / 2 * (weights * basis * log_sigma.exp()).sum()
            z = z + float(C) * e
        yield unscale(kernel, z, sigmas[i + 1])


# %% [markdown]
# **DPM-Solver** writes the line in $\lambda=-\log\sigma$ (in its paper: half the log-SNR), where
# $z'=z-\int e^{-\lambda}\epsilon\,\mathrm d\lambda$, expands only $\epsilon$ in $\lambda$ and integrates
# the exponential exactly. **DPM-Solver++** does the same to the predicted picture $\hat x_0$:
# with $w=z/\sigma$, $w'=w+\int e^{\lambda}\hat x_0\,\mathrm d\lambda$. The two differ by a sign $c$:
#
# $$u'=u+c\int_\lambda^{\lambda'}e^{c\,l}\,m(l)\,\mathrm dl,\qquad
#   (c,u,m)=(-1,z,\epsilon)\ \text{or}\ (1,z/\sigma,\hat x_0),$$
#
# and one function covers both. What has to be known are the integrals of powers,
# $I_k=\int_0^h e^{c(\tau-h)}(\tau/h)^k\,\mathrm d\tau$, which a recursion gives:
# $I_k=c\,(1-\tfrac kh I_{k-1})$.


# %%
def power_integrals(h, c):
    """Return I_0, I_1, I_2 over a step h > 0 of lambda; see above."""
    I_0 = -c * torch.expm1(-c * h)
    I_1 = c * (1 - I_0 / h)
    return I_0, I_1, c * (1 - 2 * I_1 / h)


def prediction(eps, kernel, z, lam, c):
    """Ask for what is expanded at lambda: the noise (c = -1) or the picture (c = 1)."""
    sigma = torch.exp(-lam)
    e = noise_at(eps, kernel, z, sigma)
    return e if c == -1 else z - sigma * e


def advance(z, lam, h, c, total):
    """Step z from lambda to lambda + h, given the integral of m: `total`, times e^{-c lambda'}."""
    if c == -1:
        return z - torch.exp(-lam - h) * total
    return torch.exp(-h) * z + total


def solver_orders(nfe, order):
    """Split nfe evaluations into singlestep DPM-Solver steps: the order of each step.

    The rest that is too small for a full step goes into lower orders at the end.
    Source: Lu et al. 2022, Appendix D.3 (DPM-Solver-fast).
    """
    full, rest = divmod(nfe, order)
    if order == 3 and rest == 0 and full:
        return [3] * (full - 1) + [2, 1]
    return [order] * full + [rest] * (rest > 0)


def dpm_solver(eps, kernel, x, nfe, generator=None, order=3, plus=False, grid="log-snr"):
    """Sample by singlestep DPM-Solver (plus: DPM-Solver++) of order 1 to 3.

    Source: Lu et al. 2022a, Algorithms 1 and 2; 2022b, Algorithm 1 and Appendix B.
    """
    c, orders = 1 if plus else -1, solver_orders(nfe, order)
    times = time_grid(kernel, len(orders), grid)
    if grid != "log-snr":  # equal shares of time for equal numbers of evaluations
        times = time_grid(kernel, nfe, grid)[np.cumsum([0, *orders])]
    z, sigmas = levels(kernel, x, times)
    lambdas = -sigmas.log()
    for lam, lam_next, p in zip(lambdas, lambdas[1:], orders, strict=False):
        h = lam_next - lam
        m = prediction(eps, kernel, z, lam, c)

        def reach(r, terms, z=z, lam=lam, h=h):  # the share r of h, with some of the integrals
            I = power_integrals(r * h, c)  # noqa: E741
            return advance(z, lam, r * h, c, sum(I[k] * v for k, v in terms))

        if p == 1:
            z = reach(1, [(0, m)])
        if p == 2:
            m_1 = prediction(eps, kernel, reach(1 / 2, [(0, m)]), lam + h / 2, c)
            z = reach(1, [(0, m_1)])
        if p == 3:
            m_1 = prediction(eps, kernel, reach(1 / 3, [(0, m)]), lam + h / 3, c)
            z_2 = reach(2 / 3, [(0, m), (1, 2 * (m_1 - m))])
            m_2 = prediction(eps, kernel, z_2, lam + 2 / 3 * h, c)
            z = reach(1, [(0, m), (1, 1.5 * (m_2 - m))])
        yield unscale(kernel, z, torch.exp(-lam_next))


def dpm_multistep(
    eps, kernel, x, nfe, generator=None, order=2, plus=False, grid="log-snr", released=False
):
    """Sample by multistep DPM-Solver (plus: DPM-Solver++) of order 1 to 3: one evaluation a step.

    The first steps have lower orders, and with fewer than 10 evaluations the last ones too.
    released: halve a term of order 3 as its release does. Source: Lu et al. 2022b, Algorithm 2.
    """
    c, seen = 1 if plus else -1, []
    z, sigmas = levels(kernel, x, time_grid(kernel, nfe, grid))
    lambdas = -sigmas.log()
    for i in range(nfe):
        h = lambdas[i + 1] - lambdas[i]
        seen = [prediction(eps, kernel, z, lambdas[i], c), *seen][:order]
        p = min(len(seen), nfe - i) if nfe < 10 else len(seen)
        I_0, I_1, I_2 = power_integrals(h, c)
        total = I_0 * seen[0]
        if p > 1:
            r_0 = (lambdas[i] - lambdas[i - 1]) / h
            D = D_0 = (seen[0] - seen[1]) / r_0
        if p == 2:
            total = total + I_0 * D / 2
        if p == 3:
            r_1 = (lambdas[i - 1] - lambdas[i - 2]) / h
            D_2 = (D_0 - (seen[1] - seen[2]) / r_1) / (r_0 + r_1)
            # release: half of the last term, which leaves order 2; here: all of it, because D_2 is
            # half a second derivative already (see the measured orders below).
            total = total + I_1 * (D_0 + r_0 * D_2) + I_2 * D_2 / (2 if released else 1)
        z = advance(z, lambdas[i], h, c, total)
        yield unscale(kernel, z, sigmas[i + 1])


# %% [markdown]
# **EDM** uses Heun's method on the line as it stands: an Euler step, then the average of both slopes,
# and a last Euler step to $\sigma=0$. Its noise levels are evenly spaced in $\sigma^{1/7}$.
# *Churn* adds fresh noise before a step and so makes it stochastic.


# %%
def heun(eps, kernel, x, nfe, generator=None, rho=7, churn=0.0, s_noise=1.0):
    """Sample by EDM's Heun method in (nfe + 1) / 2 steps, the last one to sigma = 0.

    churn: S_churn, between infinite levels. Raises BadInput for an even nfe.
    Source: Karras et al. 2022, Algorithms 1 and 2, Eq. 5.
    """
    if nfe % 2 == 0:
        raise BadInput(f"nfe = {nfe}: heun takes 2n - 1 evaluations in n steps, give an odd number")
    n = (nfe + 1) // 2
    ends = torch.tensor([kernel.t_max, kernel.t_min]).double()
    z, (top, bottom) = levels(kernel, x, ends)
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    sigmas = (top ** (1 / rho) + ramp * (bottom ** (1 / rho) - top ** (1 / rho))) ** rho
    sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    for i in range(n):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        if churn and sigma * (1 + min(churn / n, 2**0.5 - 1)) <= top:
            hotter = sigma * (1 + min(churn / n, 2**0.5 - 1))
            more = (hotter**2 - sigma**2).sqrt() * s_noise
            z, sigma = z + more * sde.fresh_noise(z, generator), hotter
        e = noise_at(eps, kernel, z, sigma)
        z_next = z + (sigma_next - sigma) * e
        if sigma_next > 0:
            e_next = noise_at(eps, kernel, z_next, sigma_next)
            z_next = z + (sigma_next - sigma) * (e + e_next) / 2
        z = z_next
        yield unscale(kernel, z, sigma_next) if sigma_next > 0 else z


# %% [markdown]
# All of them by name, with the rule for the number of evaluations, and the order that the
# deterministic ones claim.

# %%
SAMPLERS = {
    "euler-maruyama": sde.euler_maruyama,
    "ancestral": ancestral,
    "predictor-corrector": predictor_corrector,
    "probability-flow": sde.probability_flow,
    "rk45": rk45,
    "ddim": ddim,
    "gddim": gddim,
    **{f"deis-{r}": partial(deis, order=r) for r in range(4)},
    **{f"dpm-solver-{p}": partial(dpm_solver, order=p) for p in (1, 2, 3)},
    **{f"dpm-solver-{p}m": partial(dpm_multistep, order=p) for p in (2, 3)},
    **{f"dpm-solver++-{p}": partial(dpm_solver, order=p, plus=True) for p in (2, 3)},
    **{f"dpm-solver++-{p}m": partial(dpm_multistep, order=p, plus=True) for p in (2, 3)},
    "heun": heun,
}
NFE_RULE = {name: "any number" for name in SAMPLERS}
NFE_RULE.update({"rk45": "as many as it takes", "heun": "2n - 1", "predictor-corrector": "2n"})
ORDER = {"probability-flow": 1, "ddim": 1, "heun": 2, "deis-0": 1, "deis-1": 2, "deis-2": 3}
ORDER["deis-3"] = 3  # 4 but for its first steps, which have to be of lower order
ORDER.update({name: int(name.rstrip("m")[-1]) for name in SAMPLERS if name.startswith("dpm")})

# %% [markdown]
# ## Are they what they claim?
#
# If the data are a mixture of Gaussians $\mathcal N(\mu_i,c^2)$, the best noise prediction is known:
# $\epsilon(x,t)=\sigma\sum_iw_i\,(x/s-\mu_i)/(c^2+\sigma^2)$, with $w_i$ the chance that $x$ came
# from the $i$-th. A tight Runge–Kutta solution of the ODE is the yardstick. A solver of order $p$
# must be wrong by a multiple of $n^{-p}$ after $n$ steps: a straight line of slope $-p$.


# %%
MEANS, WIDTH = (-1.0, 0.2, 1.0), 0.4


def mixture_noise(kernel, means=MEANS, c=WIDTH):
    """Return the exact noise prediction (x, t) -> eps for data from N(mu_i, c^2), equally often."""

    def eps(x, t):
        s, sigma = sde.per_image(kernel.s(t), x), sde.per_image(kernel.sigma(t), x)
        away = torch.stack([x / s - mu for mu in means])
        w = torch.softmax(-(away**2) / (2 * (c**2 + sigma**2)), 0)  # entry by entry
        return sigma * (w * away).sum(0) / (c**2 + sigma**2)

    return eps


def mixture_flow(kernel, x, end, means=MEANS, c=WIDTH):
    """Move x (float64) from t_max to the noise level `end` along the exact ODE, to 1e-11."""
    s, sigma = float(kernel.s(kernel.t_max)), float(kernel.sigma(kernel.t_max))
    means = np.array(means)

    def slope(sigma, z):
        away = z[:, None] - means
        w = np.exp(-(away**2 - (away**2).min(1, keepdims=True)) / (2 * (c**2 + sigma**2)))
        return sigma * (w * away).sum(1) / w.sum(1) / (c**2 + sigma**2)

    found = solve_ivp(
        slope, (sigma, end), x.flatten().numpy() / s, "DOP853", rtol=1e-11, atol=1e-12
    )
    return torch.from_numpy(found.y[:, -1]).reshape(x.shape)


def evaluations(name, n):
    """Return the evaluations that n full steps of a sampler take (and a lower last one may)."""
    if name == "heun":
        return 2 * n - 1
    order = ORDER[name]
    singlestep = name.startswith("dpm") and not name.endswith("m")
    return n * order + order - 1 if singlestep else n


def solver_errors(name, kernel, steps_list):
    """Measure the largest error of a sampler on the mixture for several numbers of steps."""
    start = torch.linspace(-2, 2, 41, dtype=torch.float64).reshape(-1, 1, 1, 1)
    start = start * kernel.s(kernel.t_max) * kernel.sigma(kernel.t_max)
    end = 0.0 if name == "heun" else float(kernel.sigma(kernel.t_min))
    exact, errors = mixture_flow(kernel, start, end), []
    for n in steps_list:
        *_, x = SAMPLERS[name](mixture_noise(kernel), kernel, start, evaluations(name, n))
        z = x if name == "heun" else x / kernel.s(kernel.t_min)
        errors.append((z - exact).abs().max().item())
    return errors


if __name__ == "__main__":
    steps_list = [10, 20, 40, 80, 160]
    plt.figure(figsize=(8, 3.6))
    for i, (kind, order) in enumerate(ORDER.items()):
        errors = solver_errors(kind, sde.VP, steps_list)
        slope = math.log2(errors[-2] / errors[-1])
        print(f"{kind:18s} measured order {slope:.2f}, claimed {order}")
        assert abs(slope - order) < 0.35
        style = {1: ":", 2: "--", 3: "-"}[order]
        plt.loglog(steps_list, errors, style, marker="o", ms=3, label=kind, color=plt.cm.tab20(i))
    plt.gca().set(xlabel="steps", ylabel="largest error", title="A mixture with a known answer")
    plt.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    workshop.show_figure(
        (Path("figures") if out == "runs" else Path(out) / "figures") / "05_orders.png"
    )

# %% [markdown]
# ## Drawing
#
# `sample` hands the solver a function of $(x,t)$, so the solver never hears of stages: the function
# (step 04's `noise_function`) asks the network which stage $t$ lies in, and runs the one decoder in
# charge.


# %%


def solver_of(sampler, grid=""):
    """Return a solver of SAMPLERS, with a grid of `time_grid` in place of its own.

    Raises BadInput for an unknown sampler, or a grid where it has none to choose.
    """
    if sampler not in SAMPLERS:
        raise BadInput(f"unknown sampler {sampler!r}: take one of {', '.join(SAMPLERS)}")
    if not grid:
        return SAMPLERS[sampler]
    if "grid" not in inspect.signature(SAMPLERS[sampler]).parameters:
        raise BadInput(f"sampler {sampler!r} has a grid of its own: leave out grid = {grid!r}")
    return partial(SAMPLERS[sampler], grid=grid)


def times_asked(sampler, kernel, nfe, grid=""):
    """List the times at which a sampler evaluates the noise, found on the mixture: floats.

    Raises BadInput where it cannot work so: worth a try before hours go into what comes first.
    """
    if nfe < 1:
        raise BadInput(f"nfe = {nfe} must be 1 or more")
    times, exact = [], mixture_noise(kernel)

    def eps(x, t):
        times.append(float(t[0]))
        return exact(x, t)

    list(solver_of(sampler, grid)(eps, kernel, torch.ones(1, 1, 1, 1), nfe, torch.Generator()))
    return times


@torch.no_grad()
@workshop.enough_memory()
def sample(
    model,
    process,
    n,
    sampler="dpm-solver-3",
    nfe=20,
    seed=0,
    batch=300,
    calls=None,
    progress=False,
    first=0,
    grid="",
):
    """Draw pictures first to first + n - 1 of the endless set that a seed names.

    Returns (n, C, H, W) in the network's space [-1, 1], on the CPU. Every picture has random
    numbers of its own, so the set does not depend on how it is divided into batches, calls or
    processes (but for rounding, and for the step lengths of predictor-corrector and rk45, which
    look at the whole batch). calls: a list that gets, for each evaluation of the network, its
    stage. sampler, grid: as in `solver_of`. Raises BadInput as that does, and for an impossible
    number of evaluations.
    """
    solver = solver_of(sampler, grid)
    if nfe < 1 or n < 1 or batch < 1:
        raise BadInput(f"nfe = {nfe}, samples = {n} and batch = {batch} must all be 1 or more")
    kernel, where = training.kernel_of(process), next(model.parameters()).device
    # rounding to bfloat16 would look like an error of the step to a solver that adapts it
    eps, done = training.noise_function(model, process, calls, half=sampler != "rk45"), []
    parts = torch.arange(first, first + n).split(batch)
    for part in tqdm(parts, "sampling", disable=not progress, leave=False):
        dice = [torch.Generator().manual_seed(1_000_003 * seed + i) for i in part.tolist()]
        x_T = torch.empty(len(part), model.channels, model.size, model.size, device=where)
        x_T = sde.start_noise(x_T, dice, kernel)
        *_, x = solver(eps, kernel, x_T, nfe, dice)
        done.append(x.cpu())
    return torch.cat(done)


# %% [markdown]
# A large set is kept on disk in shards of 500, each written aside and renamed: a killed run goes on
# where it was, and several processes (`torchrun 05_sample_eval.py …`) share the work.


# %%


def draw_set(model, process, folder, n, shard=500, decode=workshop.to_pictures, **how):
    """Draw n pictures with `sample`, kept in shards under `folder`: uint8 (n, C, H, W).

    decode: brings what the network draws to pictures in [0, 1].
    """
    (rank, world), folder, parts = workshop.ranks(), Path(folder), []
    shape = decode(torch.zeros(1, model.channels, model.size, model.size)).shape[1:]
    for j, first in enumerate(range(0, n, shard)):
        path, size = folder / f"{first:07}.npy", min(shard, n - first)
        have = workshop.open_shard(path, shape, np.uint8) if j % world == rank else None
        if j % world == rank and (have is None or len(have) < size):
            x = decode(sample(model, process, size, first=first, **how))
            with workshop.replacing(path) as aside, open(aside, "wb") as file:
                np.save(file, (x * 255).round().to(torch.uint8).numpy())
    if world > 1:
        dist.barrier()
    for first in range(0, n, shard):
        parts.append(torch.from_numpy(np.load(folder / f"{first:07}.npy")[: n - first]))
    return torch.cat(parts)


def stage_shares(model, process, sampler, nfe, grid=""):
    """Count which stages a sampler's evaluations fall into: (number of them, {stage: share})."""
    calls = []
    sample(model, process, 1, sampler, nfe, calls=calls, grid=grid)
    return len(calls), {k: calls.count(k) / len(calls) for k in sorted(set(calls))}


def check_number(n, real, least=10):
    """Raise BadInput where real pictures do not suffice for two sets of n, or n is below least."""
    if len(real) < 2 * least:
        raise BadInput(
            f"{len(real)} real pictures are too few to measure: give {2 * least} or more"
        )
    if n < least:
        raise BadInput(f"samples = {n} is too few to measure: take {least} or more")
    if n > len(real) // 2:
        raise BadInput(f"samples = {n} is more than half the data set: take {len(real) // 2}")


# %% [markdown]
# The paper's Figure 2 asks which stage profits from a network of its own, by letting one network
# serve some stages and another the rest. `--model_for_stage 1=runs/digits-unified` does that.


# %%
class Hybrid(nn.Module):
    """Let other networks serve some stages of a multistage one; others: {stage: network}."""

    def __init__(self, model, others):
        super().__init__()
        self.model, self.others = model, nn.ModuleDict({str(k): m for k, m in others.items()})
        self.channels, self.size, self.decoders = model.channels, model.size, model.decoders

    def stage(self, t):
        return self.model.stage(t)

    def forward(self, x, t, stage):
        if str(stage) in self.others:
            return self.others[str(stage)](x, t)
        return self.model(x, t, stage=stage)


def build_hybrid(model, process, text):
    """Read "1=RUN,2=RUN" and put the networks of these runs in charge of these stages.

    Returns the network and a name for it, which tells the runs and how far they were trained.
    Raises BadInput where the text, a stage or a run does not fit.
    """
    others, names = {}, []
    for entry in text.split(","):
        k, _, folder = entry.partition("=")
        if not (k.strip().isdecimal() and folder) or int(k) >= len(model.decoders):
            raise BadInput(
                f"model_for_stage = {entry!r}: give such as 1=runs/digits-unified, with a stage "
                f"from 0 to {len(model.decoders) - 1}"
            )
        content = workshop.read_checkpoint(folder)
        other, theirs = training.averaged_model(content), content["settings"]
        same = (other.channels, other.size) == (model.channels, model.size)
        if theirs["process"] != process or not same:
            raise BadInput(f"{folder} has another process or picture size: it cannot serve a stage")
        others[int(k)] = other
        names.append(f"{k.strip()}={folder.replace('/', '_')}-step{content['step']}")
    return Hybrid(model, others), "-".join(names)


def stage_gflops(model):
    """List the GFLOPs (paper's count) of one evaluation in each stage, whoever serves it."""
    if not isinstance(model, Hybrid):
        costs = unet.cost_of(copy.deepcopy(model).to("meta"))
        return [costs[k]["gflops"] for k in range(len(model.decoders))]
    found, cuts = stage_gflops(model.model), model.model.boundaries
    for k, other in model.others.items():
        # a time in stage k: the other network is a unified one, or is cut at the same times
        t = 0.999 * cuts[int(k)] if int(k) < len(cuts) else 1.001 * cuts[-1]
        found[int(k)] = stage_gflops(other)[int(other.stage(t[None]))]
    return found


# %%
if __name__ == "__main__":
    workshop.join_processes()
    run = Path(out) / name
    content = workshop.read_checkpoint(run)
    model, settings, made = training.averaged_model(content), content["settings"], content["step"]
    process = settings["process"]
    if "scale" in settings:
        raise BadInput(f"{run} draws latents, not pictures: 06_ldm.py --resume samples from it")
    folder = run / "sets" / f"step{made}-{sampler}-{nfe}{grid and '-'}{grid}-seed{seed}"
    if model_for_stage:
        model, served = build_hybrid(model, process, model_for_stage)
        folder = folder.with_name(f"{folder.name}-{served}")
    if reference and model.channels != 3:
        raise BadInput(f"reference {reference} is in colour, {name} draws grey: leave it out")
    rank, world = workshop.ranks()
    if rank == 0:  # what is compared with later must be there before hours go into drawing
        pixels, labels = workshop.load_images(settings["dataset"], root, settings.get("size") or 32)
        check_number(
            samples, workshop.list_picture_files("folder", reference) if reference else pixels
        )
    count, share = stage_shares(model, process, sampler, nfe, grid)
    if compile:
        model.compile()
    begin = time.perf_counter()
    how = dict(sampler=sampler, nfe=nfe, grid=grid, seed=seed, batch=batch, progress=True)
    drawn = draw_set(model, process, folder, samples, **how).float() / 255
    seconds = time.perf_counter() - begin
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        sys.exit()  # the first process measures
    print(
        f"{samples} pictures in {seconds:.1f} s on {workshop.device()}: {samples / seconds:.0f}/s"
    )

# %% [markdown]
# What does an evaluation cost on average? The equivalent GFLOPs of the paper's Table 2: those of
# the stages, weighted by the share of evaluations that falls into each.

# %%
if __name__ == "__main__":
    costs = stage_gflops(model)
    gflops = sum(part * costs[k] for k, part in share.items())
    print(f"{count} evaluations; by stage:", {k: round(part, 2) for k, part in share.items()})
    print(f"equivalent GFLOPs (paper's count): {gflops:.4g}")

# %%
if __name__ == "__main__":
    title = f"{name} after {made:,} steps: {sampler}, {nfe} NFE, seed {seed}"
    workshop.show_images([drawn[:96]], [title], run / "samples.png")

# %% [markdown]
# How does such a picture come about? Some states on the way, from noise to picture.

# %%
if __name__ == "__main__":
    eps, kernel = training.noise_function(model, process), training.kernel_of(process)
    dice = torch.Generator().manual_seed(seed)
    start = sde.start_noise(torch.empty(3, *drawn.shape[1:]), dice, kernel)
    with torch.no_grad():
        states = [start, *ddim(eps, kernel, start.to(workshop.device()), 15)]
    strip = torch.stack([state.cpu() for state in states], 1).flatten(0, 1)  # (3 * 16, C, H, W)
    workshop.show_images(
        [workshop.to_pictures(strip)], ["15 steps of DDIM, three pictures"], run / "strip.png"
    )

# %% [markdown]
# Are they copies? Under each of the first samples the training picture that is nearest in pixels.

# %%
if __name__ == "__main__":
    some, known = drawn[:16], pixels[:50_000].float() / 255
    gap, nearest = torch.cdist(some.flatten(1), known.flatten(1)).min(1)
    titles = ["samples", "the nearest training pictures"]
    workshop.show_images([some, known[nearest]], titles, run / "nearest.png")
    rms = gap / some[0].numel() ** 0.5
    apart = (
        torch.cdist(known[:500].flatten(1), known.flatten(1))
        .topk(min(2, len(known)), largest=False)  # the first is the picture itself
        .values[:, -1]
    )
    apart = apart / some[0].numel() ** 0.5
    print(f"root mean square to the nearest training picture: {rms.mean():.3f} a pixel;", end=" ")
    print(f"between training pictures {apart.mean():.3f}")

# %% [markdown]
# ## Measuring
#
# Sample quality is measured in the feature space of a classifier. The **Fréchet distance** compares
# mean and covariance of the features of two sets, **KID** compares them with a kernel and has no
# bias from the number of samples, **precision** is the share of samples that lie among the real
# ones, **recall** the share of real ones that lie among the samples. All come from torch-fidelity.
#
# The distance called FID uses one particular classifier, Inception on ImageNet, and 50,000 samples
# (with 5,000 it is called FID-5k, and is larger). Colour pictures are measured so, where Inception's
# weights can be had. For 8×8 digits that makes no sense, so a small classifier is trained on their
# labels and *registered* with torch-fidelity. **Its distances are no FIDs** and compare only with
# each other; the same holds for features of your own (`--features FILE`).


# %%
class DigitClassifier(nn.Module):
    """Classify grey pictures (B, 1, H, W) in [0, 1] into ten digits.

    `body` gives the 64 features before the decision, each with mean 0 and variance 1 over real
    pictures, so that distances between them have a scale.
    """

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *(
                nn.Conv2d(1, 32, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(32, 64, 3, padding=1),
                nn.ReLU(),
            ),
            *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 64)),
            nn.BatchNorm1d(64, affine=False),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(F.relu(self.body(x)))


def train_classifier(images, labels, steps=400, seed=0):
    """Train a DigitClassifier on four fifths of (images uint8, labels); return (it, accuracy).

    The accuracy is that on the last fifth of a random order, which it has not seen.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order].float() / 255, labels[order]
    cut, generator = len(images) * 4 // 5, torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = DigitClassifier()
    optimizer = torch.optim.Adam(classifier.parameters(), 2e-3)
    for _ in range(steps):
        i = torch.randint(cut, (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(classifier(images[i]), labels[i]).backward()
        optimizer.step()
    classifier.eval()
    with torch.no_grad():
        right = classifier(images[cut:]).argmax(1) == labels[cut:]
    return classifier, right.float().mean().item()


# %%
def register_features(body, width):
    """Register `body`, uint8 (B, C, H, W) to features (B, width), with torch-fidelity: its name."""
    import torch_fidelity
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    class Features(torch_fidelity.FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return (str(width),)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return str(width)

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, x):  # torch-fidelity wants a tuple
            return (body(x),)

    name = f"own-{len(FEATURE_EXTRACTORS_REGISTRY)}"  # a name can be registered only once
    torch_fidelity.register_feature_extractor(name, Features)
    return name


def own_features(path, pictures):
    """Load a TorchScript feature extractor and try it on pictures: its name for torch-fidelity.

    Raises BadInput where the file is none, and now or later where it fails to map uint8 pictures
    (B, C, H, W) to finite features (B, d), always with the same d of 2 or more.
    """
    try:
        net = torch.jit.load(path, map_location="cpu").eval()
    except Exception as error:  # torch.jit fails in many ways
        raise BadInput(
            f"{path} is no TorchScript file ({workshop.shorten(error)}): write one with "
            "torch.jit.script(network).save(file)"
        ) from error

    def body(x, wanted=None):
        given = "×".join(map(str, x.shape))
        try:
            with torch.no_grad():
                found = net(x.cpu())
            (rows, d), real = found.shape, not found.is_complex()
            found = found.float()
        except Exception as error:  # so does the network itself: it is someone else's
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise BadInput(
                f"{path} does not turn {given} uint8 numbers into features (B, d) "
                f"({reason[0][:100]}): mend that network"
            ) from error
        if rows != len(x) or d < 2 or d != (wanted or d) or not real or not found.isfinite().all():
            kind = ", some not finite" if real and not found.isfinite().all() else ""
            raise BadInput(
                f"{path} turns {given} uint8 numbers into {rows}×{d} features{kind}: it must give "
                f"{len(x)}×{wanted or 'd'}, d of 2 or more, all real and finite"
            )
        return found.to(x.device)

    d = body(pictures).shape[1]
    return register_features(lambda x: body(x, d), d)


class Pictures(torch.utils.data.Dataset):
    """Serve pictures (N, C, H, W), uint8 or in [0, 1], as torch-fidelity wants them: uint8."""

    def __init__(self, images):
        whole = images.dtype == torch.uint8
        self.images = images if whole else (images * 255).round().to(torch.uint8)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


@workshop.enough_memory("measure fewer --samples")
def evaluate(images, reference, extractor, weights=""):
    """Compare two sets of pictures (N, C, H, W), uint8 or in [0, 1]: a dictionary of metrics.

    extractor: a name registered with torch-fidelity; with "inception-v3-compat" the Fréchet
    distance is FID, and the inception score is there too; weights: a file of its weights.
    Keys: frechet, kid, kid_std, precision, recall, samples, with Inception inception_score.
    Raises BadInput for sets that are too small or do not fit, or weights that cannot be had.
    """
    import torch_fidelity

    n = min(len(images), len(reference))
    if images.shape[1:] != reference.shape[1:] or n < 10:
        raise BadInput(
            f"cannot compare {tuple(images.shape)} with {tuple(reference.shape)}: "
            "give two sets of 10 or more pictures of one size"
        )
    inception = extractor.startswith("inception")
    how = dict(cuda=torch.cuda.is_available(), save_cpu_ram=True, verbose=False, cache=False)
    try:
        with workshop.limit_downloads():  # Inception's weights may have to be downloaded
            found = torch_fidelity.calculate_metrics(
                input1=Pictures(images),
                input2=Pictures(reference),
                feature_extractor=extractor,
                feature_extractor_weights_path=weights or None,
                isc=inception,
                **dict(fid=True, kid=True, prc=True, kid_subset_size=min(n // 2, 1000)),
                **how,
            )
    except Exception as error:  # torch, torch-fidelity and the download each fail in their own way
        if not inception or workshop.is_out_of_memory(error):
            raise
        raise BadInput(
            f"Inception's weights cannot be had ({workshop.shorten(error)}): give their file with "
            f"--weights, put it into {torch.hub.get_dir()}/checkpoints (in place of a torn one), "
            "or give features of your own with --features"
        ) from error
    keys = dict(frechet="frechet_inception_distance", kid="kernel_inception_distance_mean")
    keys.update(kid_std="kernel_inception_distance_std", precision="precision", recall="recall")
    if inception:
        keys.update(inception_score="inception_score_mean")
    return {**{key: found[theirs] for key, theirs in keys.items()}, "samples": n}


# %% [markdown]
# A number alone says nothing. So the real pictures are cut into two random halves, and the same
# metrics are taken between them: that is what perfect samples would get. Both comparisons use the
# same number of pictures, because the Fréchet distance grows when there are fewer.


# %%
def real_halves(images, n):
    """Cut a data set (N, C, H, W) into two random sets of n pictures.

    Raises BadInput where it has fewer than 2 n.
    """
    check_number(n, images, least=1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[:n]], images[order[n : 2 * n]]


def read_reference(folder, size):
    """Read a folder of pictures of size × size to compare with: uint8 (N, 3, size, size).

    Raises BadInput for pictures of another size, because to resize them would change the metrics,
    and where more than 1% are unreadable.
    """
    from PIL import Image

    files = workshop.list_picture_files("folder", folder)
    for path in files:
        try:
            with Image.open(path) as picture:
                width, height = picture.size
        except Exception:  # PIL refuses a file in many ways; `read_pictures` counts these
            continue
        if (width, height) != (size, size):
            raise BadInput(
                f"reference {path} has {width}×{height} pixels, the samples {size}×{size}: resize "
                "the folder first"
            )
    return workshop.read_pictures(workshop.PictureFiles(files, size))


def pick_extractor(dataset, images, labels, features=""):
    """Choose features for a data set: (name for torch-fidelity, name for the reader)."""
    if features:
        return own_features(features, images[:4]), f"features of {Path(features).name}"
    if workshop.about(dataset).get("judge") != "digits":
        return "inception-v3-compat", "Inception features"
    classifier, accuracy = train_classifier(images, labels)
    # it stays on the CPU, wherever torch-fidelity wants its features
    body = lambda x: classifier.body(x.cpu().float() / 255).to(x.device)  # noqa: E731
    return register_features(
        body, 64
    ), f"features of a digit classifier, {accuracy:.1%} right on unseen digits"


def distance_name(extractor, n):
    """Name the Fréchet distance for what it is: FID only with Inception, with the count."""
    if not extractor.startswith("inception"):
        return "Fréchet distance ↓"
    return "FID ↓" if n == 50_000 else f"FID-{n / 1000:g}k ↓"


def print_metrics(table, title, distance="Fréchet distance ↓"):
    """Print {column: metrics} as a table with a metric a line."""
    print(title)
    print(f"{'':20s}" + "".join(f"{column:>24s}" for column in table))
    for key, label in (
        ("frechet", distance),
        ("kid", "KID ↓"),
        ("precision", "precision ↑"),
        ("recall", "recall ↑"),
        ("inception_score", "inception score ↑"),
    ):
        if all(key in metrics for metrics in table.values()):
            print(f"{label:20s}" + "".join(f"{metrics[key]:24.4f}" for metrics in table.values()))


if __name__ == "__main__":
    extractor, named = pick_extractor(settings["dataset"], pixels, labels, features)
    real = read_reference(reference, model.size) if reference else pixels
    half, other_half = real_halves(real, samples)
    table = {
        "samples / real": evaluate(drawn, half, extractor, weights),
        "real / real": evaluate(other_half, half, extractor, weights),
    }
    against = f"a random half of {reference or settings['dataset']}"
    title = (
        f"{samples} pictures a set against {against}, {named};\n{sampler}, {count} evaluations, "
    )
    title += f"averaged weights, seed {seed}"
    print_metrics(table, title, distance_name(extractor, samples))

# %%
if __name__ == "__main__":
    record = dict(run=str(run), step=made, sampler=sampler, nfe=count, equivalent_gflops=gflops)
    record.update(
        grid=grid or "own", seed=seed, weights="averaged", features=named, against=against, **table
    )
    workshop.write_json(record, run / "metrics.json")
    print(f"grid: {run / 'samples.png'}\nmetrics: {run / 'metrics.json'}")

# %% [markdown]
# ## Which solver, how many evaluations?
#
# With `--compare` the question of the paper's Table 1 is asked of this run: every kind of solver
# with 5 to 50 evaluations.


# %%
def compare_solvers(
    model, process, real, extractor, seed=1, batch=300, budgets=(5, 10, 20, 50), weights=""
):
    """Measure the distance of len(real) samples for each solver and budget: a list of rows.

    A row is (sampler, evaluations, distance, seconds); a budget that a solver cannot do is taken
    one lower.
    """
    rows = []
    for name in SAMPLERS:
        for nfe in budgets if NFE_RULE[name] != "as many as it takes" else budgets[:1]:
            odd = {"2n": 0, "2n - 1": 1}.get(NFE_RULE[name], nfe % 2)
            nfe -= nfe % 2 != odd
            begin = time.perf_counter()
            calls = []
            x = sample(model, process, len(real), name, nfe, seed, batch, calls)
            seconds = time.perf_counter() - begin
            distance = evaluate(workshop.to_pictures(x), real, extractor, weights)["frechet"]
            rows.append((name, len(calls) // -(-len(real) // batch), distance, seconds))
            print(f"{rows[-1][0]:20s} {rows[-1][1]:4d} {distance:10.2f} {seconds:8.1f} s")
    return rows


if __name__ == "__main__" and compare:
    print(f"{'sampler':20s}  NFE   distance     time")
    rows = compare_solvers(model, process, half, extractor, seed, batch, weights=weights)
    plt.figure(figsize=(8, 4))
    for i, kind in enumerate(SAMPLERS):
        points = [(n, distance) for name_, n, distance, _ in rows if name_ == kind]
        color = plt.cm.tab20(i % 20)
        if len(points) == 1:  # as many evaluations as it takes
            label = f"{kind}, {points[0][0]} evaluations"
            plt.axhline(points[0][1], color=color, ls="--", lw=1, label=label)
        else:
            plt.loglog(*zip(*points, strict=True), marker="o", ms=4, label=kind, color=color)
    floor = table["real / real"]["frechet"]
    plt.axhline(floor, color="gray", ls=":", label="real / real")
    plt.gca().set(xlabel="evaluations", ylabel="Fréchet distance")
    plt.minorticks_off()
    plt.xticks([5, 10, 20, 50], ["5", "10", "20", "50"])
    plt.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), ncol=2)
    workshop.show_figure(run / "solvers.png")
    workshop.write_json(rows, run / "solvers.json")

# %% [markdown]
# **You have** samples, a picture of how they come about, and numbers with a yardstick beside them.
# Step 06 does the same in the latent space of an autoencoder.
#
# ### Exercises
#
# 1. Measure `--nfe 5`, 10, 20, 50 with `ddim` and `dpm-solver-3`. Where do they meet?
#    <details><summary>Solution</summary>Both approach the distance of the exact ODE; the
#    third-order solver needs fewer evaluations to get there. Below about 10 its few large steps are
#    no advantage.</details>
# 2. Why is the Fréchet distance between two halves of the real data not zero?
#    <details><summary>Solution</summary>Means and covariances of 898 pictures are estimates; two
#    sets give two estimates. With more pictures the distance falls.</details>
