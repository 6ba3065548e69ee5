# %% [markdown]
# # 05 · Drawing samples, and saying how good they are
#
# **You will** derive DDIM, Heun, DPM-Solver and DDPM from one line, check their order on a case
# with a known answer, draw digits with the network of step 04, and measure them beside real ones.
#
# How long is a sampler? Six lines, with the best denoiser of step 01 in place of a network
# (`optimal_denoiser` is its fast form).

# %% tags=["imports"]
import importlib
import math
import os
from itertools import pairwise

if "__file__" not in globals():  # a notebook, which may have been opened where it lies
    os.chdir(".." if os.path.exists("../00_workshop.py") else ".")
    assert os.path.exists("00_workshop.py"), "papermill needs --cwd PROJECT"
workshop = importlib.import_module("00_workshop")  # before torch

import torch
from matplotlib import pyplot as plt
from scipy.integrate import solve_ivp

sde = importlib.import_module("01_sde_and_denoiser")
training = importlib.import_module("04_train")
lesson = workshop.is_lesson()

# %%
if __name__ == "__main__" and lesson:
    digits = workshop.to_network_space(workshop.load_images("digits")[0])
    sigmas = sde.VP.sigma(sde.log_snr_times(sde.VP, 20)).tolist()  # 21 noise levels, downwards
    z = sigmas[0] * torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for sigma, sigma_next in pairwise(sigmas):
        t = sde.VP.time(-2 * math.log(sigma)).expand(len(z))
        e = sde.optimal_denoiser(sde.per_image(sde.VP.s(t), z) * z, t, sde.VP, digits)
        z = z + (sigma_next - sigma) * e
    workshop.show_images([workshop.to_pictures(z)], ["The loop's digits"], "figures/05_first.png")

# %% [markdown]
# Digits come out of noise: the training pictures themselves, which the best denoiser of a finite
# set knows by heart (step 01). Everything else in this step is about that loop: why its last line
# is right, how to get by with fewer turns of it, and how to tell how good its pictures are.
#
# ## One line behind all solvers
#
# Why is the loop right? Start from the probability-flow ODE of step 01 and put in the score, which
# is $-\epsilon_\theta/(s\sigma)$:
#
# $$\frac{\mathrm dx}{\mathrm dt}=f\,x+\frac{g^2}{2s\sigma}\,\epsilon_\theta .$$
#
# Eq. (2), differentiated, says $\dot s=f\,s$ for the scale, and $2\sigma\dot\sigma=g^2/s^2$ for the
# noise level. Now divide the picture by its scale, $z=x/s$, and differentiate $z$ by time:
#
# 1. $\dot z=\dot x/s-x\,\dot s/s^2=\dot x/s-f\,x/s$ by the quotient rule and the first half of eq.
#    (2);
# 2. $\dot z=\dfrac{g^2}{2s^2\sigma}\,\epsilon_\theta$ by the ODE: the drift $f$ cancels;
# 3. $\dot z=\dot\sigma\,\epsilon_\theta$ by the second half of eq. (2): $g$ and $s$ cancel as well.
#
# Measure time by the noise level itself, and what is left is
#
# $$\frac{\mathrm dz}{\mathrm d\sigma}=\epsilon_\theta .$$
#
# No kernel is left in it. So a solver for this line is a solver for all kernels. All solvers of this
# step integrate this line, some with fresh noise on the way. They have the same arguments: a
# function `eps(x, t)` that predicts noise, the kernel, the start noise `x` (B, C, H, W) at
# `kernel.t_max`, the number of evaluations `nfe`, and a generator where they draw noise. They yield
# their states, the last of which is the picture.
#
# The line needs three helpers. `levels` goes from $x$ to $z$ and lists the noise levels to stop at,
# equally spaced in $\log\sigma$, because fine detail is decided where noise is low. `unscale` goes
# back from $z$ to $x$. `noise_at` asks the network, which wants $x=s\,z$ and the time in place of
# $z$ and $\sigma$. Noise levels are plain numbers, so the loop never waits for a GPU.
#
# ## A case with a known answer
#
# Whether a solver is right cannot be seen in pictures. So take data of which everything is known: a
# mixture of Gaussians $\mathcal N(\mu_i,c^2)$. Its best noise prediction is
#
# $$\epsilon=\sigma\sum_iw_i\,\frac{z-\mu_i}{c^2+\sigma^2},$$
#
# with $w_i$ the chance that $z$ came from the $i$-th Gaussian. A Runge–Kutta solution of the one
# line with a tolerance of $10^{-11}$ is the yardstick.


# %% tags=["nbval-check-output"]
def levels(kernel, x, n, grid="log-snr"):
    """Return z = x / s, and n + 1 noise levels from t_max to t_min; grid: see `time_grid` below."""
    times = sde.log_snr_times(kernel, n) if grid == "log-snr" else time_grid(kernel, n, grid)
    return x / kernel.s(times[0]), kernel.sigma(times).tolist()


def unscale(kernel, z, sigma):
    """Go back from z to x = s z at the noise level sigma."""
    return kernel.s(kernel.time(-2 * math.log(sigma))) * z


def noise_at(eps, kernel, z, sigma):
    """Ask for the noise in z = x / s at the noise level sigma."""
    t = float(kernel.time(-2 * math.log(sigma)))
    return eps(kernel.s(t) * z, torch.full((len(z),), t, dtype=z.dtype))


if __name__ == "__main__" and lesson:
    print("noise levels of 8 steps:", *(f"{v:.3g}" for v in levels(sde.VP, torch.ones(1), 8)[1]))

# %%
MEANS, WIDTH = (-1.0, 0.2, 1.0), 0.4


def noise_in_mixture(z, sigma, means=MEANS, c=WIDTH):
    """Predict exactly the noise in z at level sigma, if every N(mu_i, c^2) is equally likely."""
    away = torch.stack([z - mu for mu in means])
    w = torch.softmax(-(away**2) / (2 * (c**2 + sigma**2)), 0)  # entry by entry
    return sigma * (w * away).sum(0) / (c**2 + sigma**2)


def mixture_noise(kernel, means=MEANS, c=WIDTH):
    """Return the exact noise prediction of the mixture as solvers want it: (x, t) -> eps."""
    part = sde.per_image
    return lambda x, t: noise_in_mixture(
        x / part(kernel.s(t), x), part(kernel.sigma(t), x), means, c
    )


def mixture_flow(kernel, x, end, means=MEANS, c=WIDTH):
    """Move x (float64) from t_max to the noise level `end` along the exact ODE, to 1e-11."""
    slope = lambda sigma, z: noise_in_mixture(torch.from_numpy(z), sigma, means, c).numpy()  # noqa: E731
    z, sigma = x.flatten().numpy() / float(kernel.s(kernel.t_max)), kernel.sigma(kernel.t_max)
    found = solve_ivp(slope, (float(sigma), end), z, "DOP853", rtol=1e-11, atol=1e-12)
    return torch.from_numpy(found.y[:, -1]).reshape(x.shape)


# %% [markdown]
# ## DDIM
#
# The simplest way along the line: hold the noise still during a step (Euler's method). That is
# DDIM,
#
# $$z'=z+(\sigma'-\sigma)\,\epsilon .$$
#
# A step along the tangent has an error of the order of the step squared, and there are $n$ steps:
# together they leave an error proportional to $1/n$. In general a solver has *order* $p$ when its
# error after $n$ evaluations is a multiple of $n^{-p}$. Measure it: the largest error on the
# mixture, over start noise of $-2$ to 2 standard deviations.


# %%
def ddim(eps, kernel, x, nfe, generator=None, grid="log-snr"):
    """Sample by DDIM, in nfe evaluations. Source: Song, Meng, Ermon 2021, Eq. 12."""
    z, sigmas = levels(kernel, x, nfe, grid)
    for sigma, sigma_next in pairwise(sigmas):
        e = noise_at(eps, kernel, z, sigma)
        z = z + (sigma_next - sigma) * e  # DDIM
        yield unscale(kernel, z, sigma_next)


# %%
def measure_errors(solver, kernel, budgets, end=None):
    """Measure a solver's largest error with each number of evaluations; end: 0 or (None) t_min."""
    z = kernel.sigma(kernel.t_max) * torch.linspace(-2, 2, 41, dtype=torch.float64)
    x = (kernel.s(kernel.t_max) * z).reshape(-1, 1, 1, 1)
    s, sigma = (1, 0) if end == 0 else (kernel.s(kernel.t_min), float(kernel.sigma(kernel.t_min)))
    exact, eps = mixture_flow(kernel, x, sigma), mixture_noise(kernel)
    ends = [list(solver(eps, kernel, x, nfe))[-1] / s for nfe in budgets]
    return [(found - exact).abs().max().item() for found in ends]


if __name__ == "__main__" and lesson:
    errors = measure_errors(ddim, sde.VP, [10, 20, 40, 80])
    print("DDIM, 10, 20, 40, 80 evaluations:", *(f"{e:.4f}" for e in errors))

# %% [markdown]
# Twice the evaluations, half the error: DDIM has order 1.
#
# ## Heun
#
# The next idea is to look where a step leads before taking it. **EDM** uses Heun's method: after an
# Euler step it asks for the noise there, then takes the step again with the average of both,
# $z'=z+(\sigma'-\sigma)\,\tfrac12(\epsilon+\epsilon')$. That costs two evaluations a step, except
# for the last one, to $\sigma=0$, which is a plain Euler step. The noise levels are evenly spaced
# in $\sigma^{1/7}$.


# %%
def heun(eps, kernel, x, nfe, generator=None, rho=7):
    """Sample by EDM's Heun method, down to sigma = 0. Source: Karras et al. 2022, Algorithm 1."""
    z, sigmas = x / kernel.s(kernel.t_max), heun_levels(kernel, nfe, rho)
    for sigma, sigma_next in pairwise(sigmas):
        e = noise_at(eps, kernel, z, sigma)
        if sigma_next > 0:
            e_next = noise_at(eps, kernel, z + (sigma_next - sigma) * e, sigma_next)
            e = (e + e_next) / 2
        z = z + (sigma_next - sigma) * e  # Heun
        yield unscale(kernel, z, sigma_next) if sigma_next > 0 else z


def heun_levels(kernel, nfe, rho):
    """List EDM's noise levels for nfe evaluations: Eq. 5 of Karras et al., and 0."""
    if nfe % 2 == 0:
        raise workshop.BadInput(f"nfe = {nfe}: heun takes 2n - 1 evaluations, give an odd number")
    top, bottom = (float(kernel.sigma(t)) ** (1 / rho) for t in (kernel.t_max, kernel.t_min))
    ramp = torch.linspace(0, 1, (nfe + 1) // 2, dtype=torch.float64)
    return [*((top + ramp * (bottom - top)) ** rho).tolist(), 0.0]


# %%
if __name__ == "__main__" and lesson:
    errors = measure_errors(heun, sde.VP, [19, 39, 79, 159], end=0)
    print("Heun, 19, 39, 79, 159 evaluations:", *(f"{e:.4f}" for e in errors))

# %% [markdown]
# Twice the evaluations, a fifth of the error. So it has order 2, which promises only a quarter.
#
# ## DPM-Solver
#
# Both methods take the line as it is. **DPM-Solver** (Lu et al. 2022a) writes the line in
# $\lambda=-\log\sigma$, half the log-SNR: $\mathrm dz=-e^{-\lambda}\epsilon\,\mathrm d\lambda$. The
# exponential is known, so it is integrated exactly; only $\epsilon$ is unknown, and is expanded in
# a Taylor series. Over a step from $\lambda$ to $\lambda+h$ its first two terms give, with
# $\dot\epsilon$ the slope of the noise in $\lambda$,
#
# $$z'=z-e^{-(\lambda+h)}\Big[(e^h-1)\,\epsilon+(e^h-1-h)\,\dot\epsilon+\dots\Big].$$
#
# The first term alone is DDIM once more. For the second, DPM-Solver-3 asks for the noise at two
# points inside the step, $u_1$ at the share $r_1=\frac13$ of it and $u_2$ at $r_2=\frac23$. It
# reaches them in the same way, and estimates the slope from the differences $D_1$ and $D_2$. That
# takes three evaluations a step; choosing $r_2=\frac23$ makes up for the missing third term. The
# letters are Lu's, and `expm1` is $e^h-1$, computed so that a small $h$ loses no digits.
#
# **Predict first:** with only 15 evaluations, is the solver of the higher order the better one?
# <details><summary>Answer</summary>Not always: Heun's eight large steps are worse than DDIM's
# fifteen small ones. The higher the order, the more is gained by a few extra evaluations.</details>


# %%
def dpm_solver_3(eps, kernel, x, nfe, generator=None):
    """Sample by nfe // 3 steps of DPM-Solver-3. Source: Lu et al. 2022a, Algorithm 2."""
    exp, expm1, r1, r2 = math.exp, math.expm1, 1 / 3, 2 / 3
    noise = lambda z, lam: noise_at(eps, kernel, z, exp(-lam))  # noqa: E731
    z, sigmas = levels(kernel, x, nfe // 3)
    for lam, lam_next in pairwise(-math.log(sigma) for sigma in sigmas):
        h = lam_next - lam
        e = noise(z, lam)
        u1 = z - exp(-lam - r1 * h) * expm1(r1 * h) * e
        D1 = noise(u1, lam + r1 * h) - e
        second = r2 / r1 * (expm1(r2 * h) / (r2 * h) - 1) * D1
        u2 = z - exp(-lam - r2 * h) * (expm1(r2 * h) * e + second)
        D2 = noise(u2, lam + r2 * h) - e
        second = 1 / r2 * (expm1(h) / h - 1) * D2
        z = z - exp(-lam - h) * (expm1(h) * e + second)  # DPM-Solver-3
        yield unscale(kernel, z, exp(-lam_next))


# %%
if __name__ == "__main__" and lesson:
    budgets = [15, 33, 63, 129, 255]  # divisible by 3, and odd for Heun
    for solver, order in ((sde.probability_flow, 1), (ddim, 1), (heun, 2), (dpm_solver_3, 3)):
        errors = measure_errors(solver, sde.VP, budgets, end=0 if solver is heun else None)
        slope = math.log(errors[-2] / errors[-1], budgets[-1] / budgets[-2])
        says = f"{solver.__name__}: order {order}, measured {slope:.2f}"
        plt.loglog(budgets, errors, "o-", label=says)
    plt.minorticks_off()
    plt.gca().set(xlabel="evaluations", ylabel="largest error", xticks=budgets, xticklabels=budgets)
    plt.legend(fontsize=8)
    workshop.show_figure("figures/05_orders.png")

# %% [markdown]
# A solver of order $p$ must give a straight line of slope $-p$ on these axes once there are enough
# steps, and these do. Only Heun's line is steeper: its last step, an Euler step from $\sigma_\min$
# to 0, stays the same however many evaluations there are, and its error cancels a part of the
# others'. Before that step the slope is 2.05.
#
# Equal order is not equal error. `probability_flow` of step 01 is Euler's method, too, and with a
# kernel of scale $s=1$ it is DDIM. With VP it follows $x$ in $t$, a path that bends less, and to
# both sides, so that the errors of its steps cancel in part; $z$ in $\sigma$ bends to one side all
# the way.
#
# In the paper DPM-Solver has 20 evaluations. Here 6 steps take 18; `dpm_solver` below uses all.
#
# ## Fresh noise
#
# **DDPM** also goes down step by step, but puts some noise back. It predicts the picture,
# $\hat z_0=z-\sigma\epsilon$, and draws $z'$ from the posterior of Gaussian noise, given $z$ and
# $\hat z_0$. With $\kappa=\sigma'^2/\sigma^2$ that is a Gaussian with the mean
# $\kappa z+(1-\kappa)\hat z_0$ and the variance $\sigma'^2(1-\kappa)$ (Ho et al. 2020, eq. 7,
# written for $z=x/s$).


# %%
def posterior_step(eps, kernel, z, sigma, sigma_next, generator):
    """Draw z at sigma_next from q(z' | z, z_0) at the predicted z_0. Source: Ho et al. 2020."""
    z_0 = z - sigma * noise_at(eps, kernel, z, sigma)
    keep = (sigma_next / sigma) ** 2
    spread = sigma_next * (1 - keep) ** 0.5
    return keep * z + (1 - keep) * z_0 + spread * sde.fresh_noise(z, generator)  # DDPM


# %%
def ancestral(eps, kernel, x, nfe, generator=None, grid="time"):
    """Sample as DDPM does. Source: Ho et al. 2020, Eqs. 7 and 15 (variance beta tilde)."""
    z, sigmas = levels(kernel, x, nfe, grid)
    for sigma, sigma_next in pairwise(sigmas):
        z = posterior_step(eps, kernel, z, sigma, sigma_next, generator)
        yield unscale(kernel, z, sigma_next)


# %%
if __name__ == "__main__" and lesson:
    dice = torch.Generator().manual_seed(1)
    start = torch.randn(20_000, 1, 1, 1, generator=dice)
    *_, x = ancestral(mixture_noise(sde.VP), sde.VP, start, 200, dice, grid="log-snr")
    print(f"DDPM, 200 evaluations: mean {x.mean():.2f}, standard deviation {x.std():.2f}")

# %% [markdown]
# The mixture has 0.07 and 0.91. There is no exact path to compare with, only the distribution.
# Fresh noise has its price: in the paper's Table 1 DDPM takes 1,000 evaluations, DPM-Solver 20.
#
# ## Drawing with the network of step 04
#
# Step 04's network, after 40,000 steps, comes with the project. (Below the line it is your own.)
# Two functions of step 04 are borrowed: `averaged_model` rebuilds a network with its averaged
# weights, and `noise_function` turns it into the `eps(x, t)` that solvers want. Solvers never hear
# of stages: `eps` asks the network which stage $t$ lies in and runs the one decoder in charge.
# `start_noise` of step 01 draws the noise to start from, as strong as at $t_\max$, each picture
# from its own random numbers. 48 pictures are drawn by DDIM; here are three of them on their way.

# %%
if __name__ == "__main__" and lesson:
    content = workshop.read_checkpoint("pretrained/digits-multistage")
    model, process = training.averaged_model(content), content["settings"]["process"]
    eps, kernel = training.noise_function(model, process), training.kernel_of(process)
    dice = [torch.Generator().manual_seed(1_000_003 + i) for i in range(48)]
    x_T = torch.empty(48, 1, 8, 8, device=workshop.device())
    with torch.no_grad():
        start = sde.start_noise(x_T, dice, kernel)
        states = [start, *ddim(eps, kernel, start, 15)][::-1]  # from image to noise
    states = workshop.to_pictures(torch.stack(states)).cpu()  # (16, 48, 1, 8, 8)

# %% tags=["draws"]
if __name__ == "__main__" and lesson:
    times = [f"{t:.2g}" for t in reversed(sde.log_snr_times(kernel, 15).tolist())]
    title = "15 steps of DDIM from right (noise) to left; on top, t"
    strip = [states[:, :3].transpose(0, 1).flatten(0, 1)]  # of (3 * 16, 1, 8, 8)
    workshop.show_images(strip, [title], "figures/05_strip.png", labels=times)

# %% [markdown]
# Read it from right to left. For half of the steps only noise is seen, then the shape is decided
# within a few, and the last ones clean a picture that is known. The paper's stages divide the work
# into these three parts: noise, decision and cleaning.
#
# ## How good are they?
#
# One picture cannot be judged, but a set can: compare it with a set of real ones, in some space of
# features. The **Fréchet distance** treats both sets as Gaussian clouds, with means $m_i$ and
# covariances $C_i$, and is the squared distance between these clouds:
#
# $$d^2=\|m_1-m_2\|^2+\operatorname{tr}\big(C_1+C_2-2\,(C_1C_2)^{1/2}\big).$$
#
# The trace of a matrix root is the sum of the roots of the eigenvalues. With the features of
# Inception, a classifier of ImageNet, and 50,000 samples the distance is called **FID**. To see it
# at work, four features will do here: the brightness of each quarter of a picture.


# %%
def frechet_distance(a, b):
    """Compare features (n, d) with features (m, d). Source: Heusel et al. 2017, Eq. 6."""
    (m1, C1), (m2, C2) = ((f.mean(0), torch.cov(f.T)) for f in (a.double(), b.double()))
    root = torch.linalg.eigvals(C1 @ C2).real.clamp(min=0).sqrt()
    return float(((m1 - m2) ** 2).sum() + C1.trace() + C2.trace() - 2 * root.sum())  # Fréchet


# %%
if __name__ == "__main__" and lesson:
    pixels, _ = workshop.load_images("digits")
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(1))
    half, other = (pixels[order[:96]].float() / 255).tensor_split(2)
    quarters = lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)  # noqa: E731
    for kind, x in (("drawn", states[0]), ("real", other)):
        print(f"{kind} / real: {frechet_distance(quarters(x), quarters(half)):.4f}")

# %% [markdown]
# A number alone says nothing. The yardstick is **real / real**: what another set of real pictures
# scores is what perfect samples would score. It is not zero, because means and covariances of few
# pictures are estimates, and it falls when there are more. So both comparisons must use the same
# number of pictures. And a distance sees no more than its features do: pictures whose quarters are
# as bright as they should be pass this test, whatever they show. Below the line come features that
# know digits, and three more measures. **KID** compares with a kernel in place of a Gaussian, and
# the number of pictures does not bias it; **precision** is the share of samples that lie among the
# real ones, **recall** the share of real ones that lie among the samples.
#
# **You have** the solvers of the paper's best rows in the notation of their papers, pictures drawn
# by a network, and a distance with a yardstick. What follows draws from your own run of step 04 and
# measures in the same way. Step 06 does the same in the latent space of an autoencoder.
#
# ### Exercises
#
# 1. Measure `--nfe 5`, 10, 20 and 50 with `ddim` and `dpm-solver-3`. Where do they meet?
#    <details><summary>Solution</summary>`python 05_sample_eval.py --sampler ddim --nfe 5`, and so
#    on. They cross between 5 and 10, where the third-order solver gains from its steps, and have
#    not met again at 50.</details>
# 2. How much of the Fréchet distance between real and real is due to the number of pictures?
#    <details><summary>Solution</summary>`[frechet_distance(torch.randn(n, 4), torch.randn(n, 4))
#    for n in (50, 500, 5000)]`: two sets of one distribution, and the distance falls like
#    1/n.</details>
# 3. Write the midpoint method: Euler to the middle of a step, then the whole step with the noise
#    that is found there. What is its order? <details><summary>Solution</summary>`middle = (sigma *
#    sigma_next) ** 0.5` in the loop of `ddim`, then `z_middle = z + (middle - sigma) * e` and `z =
#    z + (sigma_next - sigma) * noise_at(eps, kernel, z_middle, middle)`. Order 2: in log-SNR this
#    is the middle.</details>

# %% [markdown]
# ## Below this line: faster, safer, as published
#
# The other solvers of the paper's Table 1, large sets on disk, and the measures as published.

# %% tags=["parameters"]
name = "digits-multistage"  # name of the run to sample from
out = "runs"  # the folder that holds the runs
root = ""  # where the run's data set lies or is downloaded to; empty: where it lay in training
sampler = "dpm-solver-3"  # any of SAMPLERS: ddim, deis-3, dpm-solver++-2m, heun, ancestral, …
nfe = 20  # evaluations of the network for one picture (heun: an odd number) [1, 10000]
grid = ""  # where the solver stops: log-snr, time or quadratic; empty: the solver's own choice
samples = 898  # pictures to draw and measure; at most half the data set [10, 10000000]
batch = 300  # pictures drawn at a time [1, 1000000]
seed = 1  # seed of the start noise [0, 4294967295]
reference = ""  # a folder of pictures to compare with, brought to the size of the run's
weights = ""  # file of Inception's weights; empty: torch-fidelity's cache, else its download
label = -1  # draw this class alone, of a run with classes, and compare with it; -1: all [-1, 1000]
guidance = "0"  # how far beyond the label's noise to go: w of all stages, or of each: 1,2,4

# %% tags=["imports"]
workshop.settings(globals(), "05_sample_eval")

import inspect
import sys
import time
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

unet = importlib.import_module("03_multistage_unet")
BadInput = workshop.BadInput


# %%
def time_grid(kernel, n, grid="log-snr"):
    """Divide the timeline into n equal steps of log-snr, time, or (quadratic) the root of time.

    Returns (n + 1,) float64 times, t_max first. Source: Lu et al. 2022a, Section 3.4, Appendix D.
    """
    if grid == "log-snr":
        return sde.log_snr_times(kernel, n)
    if grid not in ("time", "quadratic"):
        raise BadInput(f"unknown grid {grid!r}: take log-snr, time or quadratic")
    power = 1 if grid == "time" else 2
    ends = kernel.t_max ** (1 / power), kernel.t_min ** (1 / power)
    return torch.linspace(*ends, n + 1, dtype=torch.float64) ** power


# %% [markdown]
# ### With fresh noise
#
# **gDDIM** covers the range from DDIM to DDPM: it solves the SDE of noise strength $\lambda$, and
# its step is exact where the data are one point. **Score SDE** alternates: a *predictor* step (here
# DDPM's), then a *corrector* step of Langevin dynamics at the new noise level, whose length is set
# by a chosen ratio of signal to noise.


# %%
def gddim(eps, kernel, x, nfe, generator=None, lam=0.5, grid="quadratic"):
    """Sample by gDDIM with noise strength lam: 0 is DDIM, 1 is DDPM.

    Source: Zhang, Tao, Chen 2023, Proposition 6 (isotropic case).
    """
    z, sigmas = levels(kernel, x, nfe, grid)
    for sigma, sigma_next in pairwise(sigmas):
        e = noise_at(eps, kernel, z, sigma)
        keep = (sigma_next / sigma) ** (lam**2)  # of the predicted noise
        z = z + (sigma_next * keep - sigma) * e  # gDDIM
        if lam:
            spread = sigma_next * (1 - keep**2) ** 0.5
            z = z + spread * sde.fresh_noise(z, generator)
        yield unscale(kernel, z, sigma_next)


def predictor_corrector(eps, kernel, x, nfe, generator=None, snr=0.16, grid="time"):
    """Sample by predictor and corrector, two evaluations a step; BadInput for an odd nfe.

    Source: Song et al. 2021, Algorithms 2 to 5 and Appendix G.
    """
    if nfe % 2:
        raise BadInput(f"nfe = {nfe}: predictor-corrector takes two evaluations a step, give 2n")
    z, sigmas = levels(kernel, x, nfe // 2, grid)
    for sigma, sigma_next in pairwise(sigmas):
        z = posterior_step(eps, kernel, z, sigma, sigma_next, generator)
        score = -noise_at(eps, kernel, z, sigma_next) / sigma_next
        noise = sde.fresh_noise(z, generator)
        length = [v.flatten(1).norm(dim=1).mean() for v in (noise, score)]
        step = 2 * (snr * length[0] / length[1]) ** 2
        z = z + step * score + (2 * step).sqrt() * noise  # predictor-corrector
        yield unscale(kernel, z, sigma_next)


# %% [markdown]
# ### Without
#
# **RK45** leaves the steps to scipy's adaptive Runge–Kutta method: it takes the evaluations that
# its tolerance asks for, whatever `nfe` says. **DEIS** (tAB) lays a polynomial in $t$ through the
# last evaluations and integrates that exactly, here by Gauss–Legendre quadrature:
# $z'=z+\sum_j C_j\,\epsilon_{i-j}$ with $C_j=\int\ell_j\,\mathrm d\sigma$ and $\ell_j$ the Lagrange
# polynomials.


# %%
def rk45(eps, kernel, x, nfe=None, generator=None, tolerance=1e-5):
    """Sample by scipy's RK45 on the one line, in log sigma, yielding the end alone.

    Source: Song et al. 2021, Section 4.3; Dormand and Prince 1980.
    """
    z, span = levels(kernel, x, 1)

    def slope(log_sigma, flat):
        now, sigma = torch.from_numpy(flat).to(x).reshape(x.shape), math.exp(log_sigma)
        return (sigma * noise_at(eps, kernel, now, sigma)).double().flatten().cpu().numpy()

    start, span = z.double().flatten().cpu().numpy(), [math.log(sigma) for sigma in span]
    found = solve_ivp(slope, span, start, method="RK45", rtol=tolerance, atol=tolerance)  # RK45
    z = torch.from_numpy(found.y[:, -1]).to(x).reshape(x.shape)
    yield unscale(kernel, z, math.exp(span[1]))


def deis(eps, kernel, x, nfe, generator=None, order=3, grid="quadratic"):
    """Sample by DEIS tAB of order 0 to 3 (the degree of the polynomial; 0 is DDIM).

    Source: Zhang and Chen 2023, Eqs. 14 and 15.
    """
    times = time_grid(kernel, nfe, grid).tolist()
    z, sigmas = levels(kernel, x, nfe, grid)
    points, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(40))
    seen = []  # (time, noise), the latest first
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        seen = [(times[i], noise_at(eps, kernel, z, sigma)), *seen][: order + 1]
        a, b = math.log(sigma), math.log(sigma_next)
        log_sigma = a + (b - a) * (points + 1) / 2  # quadrature in log sigma
        t = kernel.time(-2 * log_sigma)
        for j, (t_j, e) in enumerate(seen):
            others = [t_k for k, (t_k, _) in enumerate(seen) if k != j]
            basis = math.prod(((t - t_k) / (t_j - t_k) for t_k in others), start=torch.ones(40))
            C = (b - a) / 2 * (weights * basis * log_sigma.exp()).sum()
            z = z + float(C) * e  # DEIS
        yield unscale(kernel, z, sigma_next)


# %% [markdown]
# **DPM-Solver++** does to the predicted picture $\hat z_0$ what DPM-Solver does to the noise: with
# $w=z/\sigma$, $w'=w+\int e^{\lambda}\hat z_0\,\mathrm d\lambda$. The two differ by a sign $c$:
#
# $$u'=u+c\int_\lambda^{\lambda'}e^{c\,l}\,m(l)\,\mathrm dl,\qquad
#   (c,u,m)=(-1,z,\epsilon)\ \text{or}\ (1,z/\sigma,\hat z_0),$$
#
# so one function covers both, in all orders. What has to be known are the integrals of powers,
# $I_k=\int_0^h e^{c(\tau-h)}(\tau/h)^k\,\mathrm d\tau$: $I_0=c\,(1-e^{-ch})$, and by parts
# $I_k=c\,(1-\tfrac kh I_{k-1})$ for $k\ge1$. **Multistep** solvers take the earlier evaluations in
# place of those inside a step.


# %%
def power_integrals(h, c):
    """Return I_0, I_1, I_2 over a step h > 0 of lambda; see above."""
    I_0 = -c * math.expm1(-c * h)
    I_1 = c * (1 - I_0 / h)
    return I_0, I_1, c * (1 - 2 * I_1 / h)


def prediction(eps, kernel, z, lam, c):
    """Ask for what is expanded at lambda: the noise (c = -1) or the picture (c = 1)."""
    e = noise_at(eps, kernel, z, math.exp(-lam))
    return e if c == -1 else z - math.exp(-lam) * e


def advance(z, lam, h, c, total):
    """Step z from lambda to lambda + h, given the integral of m: `total`, times e^{-c lambda'}."""
    return z - math.exp(-lam - h) * total if c == -1 else math.exp(-h) * z + total


def solver_orders(nfe, order):
    """Split nfe evaluations into singlestep DPM-Solver steps: the order of each step.

    What is left over, too little for a full step, goes into lower orders at the end.
    Source: Lu et al. 2022a, Appendix D.3 (DPM-Solver-fast).
    """
    full, rest = divmod(nfe, order)
    if order == 3 and rest == 0 and full:
        return [3] * (full - 1) + [2, 1]
    return [order] * full + [rest] * (rest > 0)


def dpm_solver(
    eps, kernel, x, nfe, generator=None, order=3, plus=False, grid="log-snr", orders=None
):
    """Sample by singlestep DPM-Solver (plus: DPM-Solver++) of order 1 to 3.

    orders: of the single steps; None: as in `solver_orders`.
    Source: Lu et al. 2022a, Algorithms 1 and 2; 2022b, Algorithm 1 and Appendix B.
    """
    c, orders = 1 if plus else -1, orders or solver_orders(nfe, order)
    z, sigmas = levels(kernel, x, len(orders), grid)
    if grid != "log-snr":  # equal shares of time for equal numbers of evaluations
        _, sigmas = levels(kernel, x, nfe, grid)
        sigmas = [sigmas[i] for i in np.cumsum([0, *orders])]
    for (sigma, sigma_next), p in zip(pairwise(sigmas), orders, strict=True):
        lam, h = -math.log(sigma), math.log(sigma) - math.log(sigma_next)
        m = m_r = prediction(eps, kernel, z, lam, c)
        for k in range(1, p + 1):  # to the share r = k / p of the step
            I_0, I_1, _ = power_integrals(k / p * h, c)
            total = I_0 * (m_r if p == 2 else m)  # DPM-Solver-2
            if p == 3 and k > 1:
                total = total + I_1 * (k / (k - 1) * (m_r - m))  # DPM-Solver-3
            z_r = advance(z, lam, k / p * h, c, total)
            if k < p:
                m_r = prediction(eps, kernel, z_r, lam + k / p * h, c)
        z = z_r  # DPM-Solver++ where c = 1
        yield unscale(kernel, z, sigma_next)


# %%
def dpm_multistep(
    eps, kernel, x, nfe, generator=None, order=2, plus=False, grid="log-snr", released=False
):
    """Sample by multistep DPM-Solver (plus: DPM-Solver++) of order 1 to 3: one evaluation a step.

    The first steps have lower orders, and with fewer than 10 evaluations the last ones too.
    released: halve a term of order 3 as its release does. Source: Lu et al. 2022b, Algorithm 2.
    """
    c, seen = 1 if plus else -1, []
    z, sigmas = levels(kernel, x, nfe, grid)
    lambdas = [-math.log(sigma) for sigma in sigmas]
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
            total = total + I_0 * D / 2  # DPM-Solver++(2M)
        if p == 3:
            r_1 = (lambdas[i - 1] - lambdas[i - 2]) / h
            D_2 = (D_0 - (seen[1] - seen[2]) / r_1) / (r_0 + r_1)
            # release: half of the last term, which leaves order 2; here: all of it, because D_2 is
            # half a second derivative already (see the measured orders below).
            total = total + I_1 * (D_0 + r_0 * D_2) + I_2 * D_2 / (2 if released else 1)
        z = advance(z, lambdas[i], h, c, total)
        yield unscale(kernel, z, sigmas[i + 1])


# %% [markdown]
# Here are all of them by name, and the orders that deterministic ones claim. Do they keep to them?

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
ORDER = {"probability-flow": 1, "ddim": 1, "heun": 2, "deis-0": 1, "deis-1": 2, "deis-2": 3}
ORDER["deis-3"] = 3  # 4 but for its first steps, which have to be of lower order
ORDER.update({name: int(name.rstrip("m")[-1]) for name in SAMPLERS if name.startswith("dpm")})


def solver_errors(name, kernel, steps):
    """Measure the largest error of a sampler on the mixture for several numbers of full steps."""
    p = ORDER[name] if name.startswith("dpm") and not name.endswith("m") else 1  # a step's
    budgets = [2 * n - 1 if name == "heun" else n * p + p - 1 for n in steps]  # last: lower orders
    return measure_errors(SAMPLERS[name], kernel, budgets, end=0 if name == "heun" else None)


if __name__ == "__main__" and lesson:
    for kind, order in ORDER.items():
        errors = solver_errors(kind, sde.VP, [80, 160])
        slope = math.log2(errors[0] / errors[1])
        print(f"{kind:18s} measured order {slope:.2f}, claimed {order}; error {errors[1]:.1e}")
        assert abs(slope - order) < 0.35

# %% [markdown]
# ### Sets
#
# A large set is kept on disk in shards of 500, each written aside and then renamed: a killed run
# goes on where it stopped, and several processes (`torchrun 05_sample_eval.py …`) share the work.


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


def read_guidance(text):
    """Read w, or one for each stage, comma-separated: tuple of floats; BadInput for other text."""
    try:
        found = tuple(float(w) for w in str(text).strip("[]() ").split(","))
        if all(abs(w) <= 1000 for w in found):  # which nan is not
            return found
        raise ValueError
    except ValueError:
        raise BadInput(f"guidance {text!r} must be a number, or one a stage: 1,2,4") from None


def check_labels(model, label, guidance, n):
    """Bring labels to a tensor (n,), or None; BadInput where the network cannot draw them."""
    stages = len(model.decoders)
    if len(guidance) not in (1, stages):
        raise BadInput(f"guidance {list(guidance)} must be one number, or {stages}: one a stage")
    if label is None and any(guidance):
        raise BadInput(f"guidance {list(guidance)} leads to a label: give one")
    if label is None:
        return None
    label = torch.as_tensor(label).expand(n)
    if bad := [k for k in label.tolist() if not 0 <= k < model.classes]:
        known = f"which are 0 to {model.classes - 1}"
        known = known if model.classes else "which has none: train one with --classes"
        raise BadInput(f"label {bad[0]} is none of the network's, {known}")
    return label


@torch.no_grad()
def sample(
    model, process, n, sampler="dpm-solver-3", nfe=20, seed=0, batch=300, first=0, grid="", **told
):
    """Draw pictures first to first + n - 1 of the endless set that a seed names.

    Returns (n, C, H, W) in the network's space [-1, 1], on the CPU. Every picture has random
    numbers of its own, so the set does not depend on how it is divided into batches, calls or
    processes (but for rounding, and for the step lengths of predictor-corrector and rk45, which
    look at the whole batch). sampler, grid: as in `solver_of`. told: label (of all, or (n,) of
    each); guidance, calls and replay, as in `noise_function`. Raises BadInput as `check_labels` and
    `solver_of` do, and for an impossible number of evaluations.
    """
    solver = solver_of(sampler, grid)
    if nfe < 1 or n < 1 or batch < 1:
        raise BadInput(f"nfe = {nfe}, samples = {n} and batch = {batch} must all be 1 or more")
    kernel, where = training.kernel_of(process), next(model.parameters()).device
    label = check_labels(model, told.pop("label", None), told.get("guidance", (0.0,)), n)
    told["half"] = sampler != "rk45"  # rk45 adapts, and would take rounding for a step's error
    ask, done = training.noise_function(model, process, **told), []
    for part in torch.arange(first, first + n).split(batch):
        eps = ask if label is None else partial(ask, label=label[part - first].to(where))
        dice = [torch.Generator().manual_seed(1_000_003 * seed + i) for i in part.tolist()]
        x_T = torch.empty(len(part), model.channels, model.size, model.size, device=where)
        *_, x = solver(eps, kernel, sde.start_noise(x_T, dice, kernel), nfe, dice)
        done.append(x.cpu())
    return torch.cat(done)


if __name__ == "__main__" and lesson and workshop.device().type == "cpu":
    again = workshop.to_pictures(sample(model, process, 3, "ddim", 15, seed=1))
    torch.testing.assert_close(again, states[0, :3], rtol=0, atol=1e-3)
    print("`sample` draws the pictures of the strip")


# %%
def to_bytes(images):
    """Bring pictures in [0, 1] to uint8; those that are uint8 stay."""
    return images if images.dtype == torch.uint8 else (images * 255).round().to(torch.uint8)


def draw_set(model, process, folder, n, shard=500, decode=workshop.to_pictures, also=(), **how):
    """Draw n pictures with `sample`, kept in shards on disk: uint8 (n, C, H, W).

    decode: brings what the network draws to pictures in [0, 1]; also: tensors that decode depends
    on; how: as in `sample`. A hash of the weights and of all these ends the folder's name, so that
    pictures that were drawn in another way never stand in for these.
    """
    (rank, world), begin = workshop.ranks(), time.perf_counter()
    told = torch.tensor(list(f"{process} {sorted(how.items())}".encode()))
    folder = f"{folder}-{workshop.fingerprint(told, *also, *model.state_dict().values())}"
    sizes = {first: min(shard, n - first) for first in range(0, n, shard)}
    paths = {first: Path(folder) / f"{first:07}-{size}.npy" for first, size in sizes.items()}
    missing = [first for first in paths if not paths[first].exists()]
    if world > 1:
        dist.barrier()  # all have looked before one begins to draw
    bar = dict(desc="sampling", disable=rank > 0 or not missing, leave=False)
    for first in tqdm(missing[rank::world], **bar):
        x = decode(sample(model, process, sizes[first], first=first, **how))
        with workshop.replacing(paths[first]) as aside, open(aside, "wb") as file:
            np.save(file, to_bytes(x).numpy())
    if world > 1:
        dist.barrier()
    new, took = sum(sizes[first] for first in missing), time.perf_counter() - begin
    said = f"{new} drawn in {took:.1f} s on {workshop.device()}: {new / took:.0f}/s"
    workshop.print_once(f"{n} pictures, {said if new else 'already drawn'}")
    with workshop.reading(folder):
        return torch.from_numpy(np.concatenate([*map(np.load, paths.values())])).unflatten(0, (n,))


def stage_shares(model, process, sampler, nfe, grid=""):
    """Count which stages a sampler's evaluations fall into: (number of them, {stage: share})."""
    calls = []
    sample(model, process, 1, sampler, nfe, calls=calls, grid=grid)
    return len(calls), {k: calls.count(k) / len(calls) for k in sorted(set(calls))}


@torch.no_grad()
def stage_gflops(model):
    """List the GFLOPs (paper's count) of one evaluation in each stage.

    Weighted by `stage_shares` they are the equivalent GFLOPs of Table 2.
    """
    x = torch.zeros(1, model.channels, model.size, model.size, device=workshop.device())
    times = [0.999 * cut for cut in model.cuts] + [1.001 * max(model.cuts, default=0.5)]
    runs = [partial(model, x, x.new_full((1,), t), stage=k) for k, t in enumerate(times)]
    return [unet.macs_as_published(run, model) / 1e9 for run in runs]


# %% [markdown]
# ### Measures
#
# These are torch-fidelity's, with features of Inception. (The Fréchet distance is then FID, if
# there are 50,000 samples; with 5,000 it is called FID-5k, and is larger.) For small digits such
# features make no sense, so a digit classifier comes with the project. **Its distances are not
# FIDs** and can only be compared with each other.


# %%
class DigitClassifier(nn.Module):
    """Classify grey pictures (B, 1, H, W) in [0, 1] into ten digits.

    `body` gives the 64 features before the decision, each with mean 0 and variance 1 over real
    pictures, so that distances between them have a scale.
    """

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1)]
        layers += [nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 64)]
        self.body = nn.Sequential(*layers, nn.BatchNorm1d(64, affine=False))
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(F.relu(self.body(x)))


@cache
def load_classifier(dataset):
    """Load the classifier of a data set that pretrained/export.py wrote: (it, its accuracy)."""
    kept = workshop.read_checkpoint(f"pretrained/{dataset}-classifier")
    classifier = DigitClassifier()
    classifier.load_state_dict(kept["ema"])
    return classifier.eval().requires_grad_(False), kept["accuracy"]


def pick_extractor(dataset, weights=""):
    """Choose features for a data set: (function of uint8 (B, C, H, W) to (B, d), its name).

    weights: file of Inception's weights (BadInput if it is not one); "": torch's cache, or the
    download. If both fail there are no features, and a printed line says so.
    """
    if workshop.about(dataset).get("judge") == "digits":
        classifier, accuracy = load_classifier(dataset)  # stays on the CPU
        named = f"features of a digit classifier, {accuracy:.1%} right on unseen digits"
        return lambda x: classifier.body(x.cpu().float() / 255), named
    from torch_fidelity.utils import create_feature_extractor

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # else a file of weights could run code
    how = dict(cuda=torch.cuda.is_available(), feature_extractor_weights_path=weights or None)
    try:
        net = create_feature_extractor("inception-v3-compat", ["2048"], verbose=False, **how)
    except Exception as error:  # torch-fidelity and the download each fail in their own way
        why = (
            f"Inception's weights cannot be had ({workshop.shorten(error)}): give their file with "
            f"--weights, or put it into {torch.hub.get_dir()}/checkpoints"
        )
        if weights:
            raise BadInput(why) from error
        workshop.print_once(f"{why}; pictures are drawn and not measured")
        return None, "no features"
    return lambda x: net(x)[0], "Inception features"


# %%
METRICS = {  # torch-fidelity's names, and those of the table
    "frechet": ("frechet_inception_distance", "Fréchet distance ↓"),
    "kid": ("kernel_inception_distance_mean", "KID ↓"),
    "kid_std": ("kernel_inception_distance_std", ""),
    "precision": ("precision", "precision ↑"),
    "recall": ("recall", "recall ↑"),
}


@torch.no_grad()
def features_of(images, features):
    """Compute features of pictures, uint8 or in [0, 1], a part at a time on the device: (N, d)."""
    parts = (to_bytes(part).to(workshop.device()) for part in images.split(64))
    return torch.cat([features(part).cpu() for part in parts])


def evaluate(images, reference, features):
    """Compare two sets of pictures (N, C, H, W), uint8 or in [0, 1]: a dictionary of metrics.

    features: function of uint8 (B, C, H, W) to (B, d). Keys: those of METRICS, and samples, the
    size of the smaller set (ten or more); samples alone where features are None.
    """
    if not features:
        return {"samples": min(len(images), len(reference))}
    from torch_fidelity import metric_fid, metric_kid, metric_prc  # takes seconds

    a, b = features_of(images, features), features_of(reference, features)
    n = min(len(a), len(b))
    how = dict(kid_subset_size=min(n // 2, 1000), save_cpu_ram=True, verbose=False)
    found = metric_kid.kid_features_to_metric(a, b, **how)
    found |= metric_prc.prc_features_to_metric(a, b, **how)
    clouds = [metric_fid.fid_features_to_statistics(f) for f in (a, b)]
    found |= metric_fid.fid_statistics_to_metric(*clouds, verbose=False)
    return {key: found[theirs] for key, (theirs, _) in METRICS.items()} | {"samples": n}


def real_halves(images, n):
    """Cut a data set (N, C, H, W) into two random sets of n pictures; BadInput if it has fewer."""
    if not 10 <= n <= len(images) // 2:
        raise BadInput(
            f"samples = {n} must be 10 or more, and at most half of the {len(images)} real pictures"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[:n]], images[order[n : 2 * n]]


def print_metrics(table, title, named):
    """Print {column: metrics} as a table with a metric a line; named: the features."""
    print(title)
    if named != "no features":
        print(" " * 20 + "".join(f"{column:>24s}" for column in table))
    for key, (_, label) in METRICS.items():
        if key == "frechet" and named.startswith("Inception"):  # it is FID with these alone
            n = min(metrics["samples"] for metrics in table.values())
            label = "FID ↓" if n == 50_000 else f"FID-{n / 1000:g}k ↓"
        if label and all(key in metrics for metrics in table.values()):
            print(f"{label:20s}" + "".join(f"{metrics[key]:24.4f}" for metrics in table.values()))


# %% [markdown]
# A Fréchet distance depends on features. What a diffusion model is trained for does not: half its
# error in the noise, integrated over the logarithm of the SNR, bounds the bits that a picture costs
# (Kingma et al. 2021), and the stages' parts of that integral add up. Two parts are beyond any
# network: telling the 256 grey values apart at $t_\min$, and how far $x_T$ is from pure noise.


# %%
@torch.no_grad()
def likelihood_bound(predict, images, kernel, cuts=(), seed=0):
    """Bound -log2 p of uint8 pictures (N, C, H, W) in bits per dimension: parts to be summed.

    predict(xt, t): the noise in xt at times t (N,). Parts: grey values, each stage between `cuts`
    from the image on, start noise. Source: Kingma et al. 2021, Eqs. 11 to 15, for Gaussian noise.
    """
    x0, dice = workshop.to_network_space(images).cpu().double(), torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, x0.shape, generator=dice, dtype=torch.float64)
    ends = torch.tensor([kernel.t_min, *cuts, kernel.t_max], dtype=torch.float64)
    first, *_, last = kernel.sigma(ends)
    miss = (x0 + first * draw()) / first  # in units of the first noise, against every grey value
    grey = (torch.arange(256).double() / 127.5 - 1) / first
    parts = miss.flatten().split(2**16)
    logits = [torch.logsumexp(-((part[:, None] - grey) ** 2) / 2, -1) for part in parts]
    parts = [torch.cat(logits).mean() + ((miss - x0 / first) ** 2).mean() / 2]
    for high, low in pairwise(kernel.log_snr(ends).tolist()):
        place = torch.randperm(len(x0), generator=dice) + torch.rand(len(x0), generator=dice)
        t, eps = kernel.time(low + (high - low) * place.double() / len(x0)), draw()  # in strata
        xt = sde.perturb(x0, eps, t, kernel).float()
        some = zip(xt.split(500), t.split(500), strict=True)
        found = torch.cat([predict(*part) for part in some])
        parts.append((high - low) / 2 * ((found - eps) ** 2).mean())
    return torch.stack([*parts, (x0**2).mean() / (2 * last**2)]) / math.log(2)


# %% [markdown]
# ### Your own run
#
# All that can be refused is refused before hours go into drawing.

# %%
if __name__ == "__main__":
    workshop.join_processes()
    run = Path(out) / name
    content = workshop.read_checkpoint(run)
    with workshop.reading(run):
        settings, made = content["settings"], content["step"]
        dataset, process, there = (settings.get(key) for key in ("dataset", "process", "root"))
    if "scale" in settings:
        raise BadInput(f"{run} draws latents: 06_ldm.py --resume samples from it")
    model = training.averaged_model(content)
    told = dict(label=None if label < 0 else label, guidance=read_guidance(guidance))
    check_labels(model, **told, n=1)
    with workshop.first_process_first():
        pixels, labels = workshop.load_images(dataset, root or there or "data", model.size)
        if settings.get("pictures") not in (None, workshop.fingerprint(pixels)):
            raise BadInput(f"{run} was trained on other pictures: give the --root that it had")
        real = pixels if label < 0 else pixels[labels == label]
        samples = samples if label < 0 else min(samples, len(real) // 2)
        if reference:
            real = workshop.load_images("folder", reference, model.size)[0]
        half, other_half = real_halves(real, samples)
        extractor, named = pick_extractor(dataset, weights)
    if half.shape[1:] != (model.channels, model.size, model.size):
        raise BadInput(f"{reference or dataset} has not the shape of the pictures that {run} draws")

# %%
if __name__ == "__main__":
    count, share = stage_shares(model, process, sampler, nfe, grid)
    costs = stage_gflops(model)
    how = dict(sampler=sampler, nfe=nfe, grid=grid, seed=seed, batch=batch, **told)
    drawn = draw_set(model, process, run / "sets" / f"step{made}-{sampler}-{nfe}", samples, **how)
    if workshop.ranks()[0] > 0:
        sys.exit()  # the first process measures
    print(f"{count} evaluations; by stage:", {k: round(part, 2) for k, part in share.items()})
    both = [1 + bool(w and label >= 0) for w in told["guidance"]]  # with the label and without it
    gflops = sum(part * costs[k] * both[k % len(both)] for k, part in share.items())
    print(f"equivalent GFLOPs (paper's count): {gflops:.4g}")
    title = f"{name} after {made:,} steps: {sampler}, {nfe} NFE, seed {seed}"
    workshop.show_images([drawn[:96] / 255], [title], run / "samples.png")

# %% [markdown]
# Are they copies? Below each of the first samples is the training picture nearest to it in pixels.


# %%
def distances(x, images, chunk=2000):
    """Measure the root mean square, a pixel, between uint8 pictures: (len(x), len(images))."""
    flat = lambda x: x.flatten(1).float() / 255  # noqa: E731
    parts = [torch.cdist(flat(x), flat(part)) for part in images.split(chunk)]
    return torch.cat(parts, 1) / x[0].numel() ** 0.5


if __name__ == "__main__":
    gap, nearest = distances(drawn[:16], pixels).min(1)
    titles = ["samples", "the nearest training pictures"]
    workshop.show_images([drawn[:16] / 255, pixels[nearest] / 255], titles, run / "nearest.png")
    second = [distances(x, pixels).topk(2, largest=False) for x in pixels[:500].split(100)]
    between = torch.cat([found.values[:, 1] for found in second]).mean()  # not with itself
    print(f"root mean square to the nearest training picture: {gap.mean():.3f} a pixel;", end=" ")
    print(f"between training pictures {between:.3f}")
    copies = int((gap < between / 2).sum())
    print(f"nearer than half of that, as copies would be: {copies} of {len(gap)} samples")

# %% [markdown]
# How good are they? Here are torch-fidelity's measures, and the lesson's distance for comparison.

# %%
if __name__ == "__main__":
    pairs = {"samples / real": drawn, "real / real": other_half}
    table = {key: evaluate(images, half, extractor) for key, images in pairs.items()}
    against = f"a random half of {reference or dataset}" + f", {label}" * (label >= 0)
    title = f"{samples} pictures a set against {against}, {named};"
    title += f"\n{sampler}, {count} evaluations, averaged weights, seed {seed}"
    print_metrics(table, title, named)
    if process == "vp":  # the bound wants Gaussian noise and the end of its kernel
        cuts, here = settings["boundaries"] or settings.get("cuts") or [], workshop.device()
        ask = lambda xt, t: model(xt.to(here), t.float().to(here)).cpu()  # noqa: E731
        some = workshop.first_of(half, 1000, 2**25)  # more would take longer than drawing
        bits = likelihood_bound(ask, some, sde.VP, cuts)
        print(f"bits per dimension ≤ {bits.sum():.3f} of the {len(some)} real pictures:", end=" ")
        parts = [round(part, 3) for part in bits[1:-1].tolist()]
        print(f"stages {parts} (trained on most of them)")
    if samples > 64 and named.startswith("features"):  # more pictures than features
        sets = [features_of(images, extractor) for images in (drawn, half)]
        by_hand, theirs = frechet_distance(*sets), table["samples / real"]["frechet"]
        print(f"the five lines: {by_hand:.6f}, torch-fidelity: {theirs:.6f}")
        assert math.isclose(by_hand, theirs, rel_tol=1e-3)
    record = dict(run=str(run), step=made, sampler=sampler, nfe=count, equivalent_gflops=gflops)
    record.update(grid=grid or "own", seed=seed, weights="averaged", features=named)
    record.update(label=label, guidance=guidance)
    workshop.write_json({**record, "against": against, **table}, run / "metrics.json")
    print(f"grid: {run / 'samples.png'}\nmetrics: {run / 'metrics.json'}")
