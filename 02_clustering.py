# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 02 · Where to cut the timeline
#
# **You will** measure how alike the optimal denoisers of two noise levels are, and let Algorithm 1
# of the paper turn that measurement into two times, $t_1$ and $t_2$. They cut the timeline into
# three stages, each of which gets its own decoder in step 03. No network is trained: everything
# here is a closed-form property of the data set.

# %%
import importlib
import math
import os

import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

if __name__ == "__main__" and os.path.basename(os.getcwd()) == "notebooks":
    os.chdir("..")  # a notebook that was opened where it lies
sde = importlib.import_module("01_sde_and_denoiser")
BadInput, VP = sde.BadInput, sde.VP

# %% tags=["parameters"]
dataset = "digits"  # digits, mnist, cifar10, celeba or folder
root = "data"  # where the data set lies or is downloaded to
samples = 5000  # K of Algorithm 1: triples of picture, noise and time
alpha = 0.9  # the average similarity a stage must keep
eta = 0.0078125  # 2/256: two pixels are alike when they differ by less (pixels in [0, 1])
seed = 0  # seed of every random number

# %%
sde.settings(globals(), "02_clustering")

# %% [markdown]
# ## How alike are two noise levels?
#
# Take one picture $x_0$ and one noise $\epsilon$, blur to two times $t_a$, $t_b$, and ask the
# optimal denoiser of each for the noise. The share of pixels on which the answers agree within
# $\eta$ is
#
# $$\mathcal D=\frac1n\sum_{i=1}^n\mathbb 1\big(|\epsilon^*_{t_a}(x_{t_a})-\epsilon^*_{t_b}(x_{t_b})|_i\le\eta\big),
#   \qquad \mathcal S(\epsilon^*_{t_a},\epsilon^*_{t_b})=\mathbb E_{x_0,\epsilon}[\mathcal D]. \tag{6}$$
#
# The paper calls $\mathcal D$ a distance, yet it is 1 where the two agree: a similarity.


# %%
def similarity(eps_a, eps_b, eta=2 / 256):
    """Compute the share of entries in which two noise predictions (B, C, H, W) agree: D, (B,).

    Source: paper, the equation before Eq. 6.
    """
    return ((eps_a - eps_b).abs() <= eta).flatten(1).double().mean(1)


# %% [markdown]
# Algorithm 1 compares every time with the two ends of the timeline.
#
# * **The image end, $t=0$.** As the noise vanishes the optimal denoiser knows the picture, so
#   $\epsilon^*_0(x_0)=\epsilon$: the noise that was put in.
# * **The noise end, $t=1$.** There the picture is lost and the best guess is the data set's mean
#   $\bar y$. The published cuts come out when this *constant* guess is asked about $x_t$, that is
#   $\hat\epsilon_1(x_t)=(x_t-s_t\bar y)/(s_t\sigma_t)$. Printed is $\epsilon^*_1(x_1)$, asked about
#   $x_1$; `reference="literal"` does that.


# %%
def similarity_to_ends(
    images, kernel=VP, samples=5000, eta=2 / 256, seed=0, reference="mean", progress=False
):
    """Sample lines 4 to 9 of Algorithm 1: (t, S0, S1), each float64 (samples,), t ascending.

    images: (N, C, H, W) floats in [0, 1]. reference: "mean" compares with the constant denoiser at
    x_t, "literal" with eps*_1 at x_1. Raises BadInput for unusable images or settings.
    """
    _check(images, samples, reference)
    generator = torch.Generator().manual_seed(seed)
    # paper: t_k uniform in [0, 1]; here: one uniform draw in each of K equal slices, because it
    # has the same expectation and spreads less from seed to seed.
    t = (torch.arange(samples) + torch.rand(samples, generator=generator).double()) / samples
    t = kernel.t_min + t * (kernel.t_max - kernel.t_min)
    y_mean = images.mean(0, keepdim=True)
    S0, S1 = [], []
    for t_k in tqdm(t.split(500), "Algorithm 1", disable=not progress, leave=False):
        i = torch.randint(len(images), t_k.shape, generator=generator)
        y = images[i.to(images.device)]
        eps = torch.randn(y.shape, generator=generator).to(y)  # drawn on the CPU: same everywhere
        t_k = t_k.to(y)
        xt = sde.perturb(y, eps, t_k, kernel)
        eps_t = sde.optimal_denoiser(xt, t_k, kernel, images)
        if reference == "mean":
            # paper: eps*_1(x_1); here: the constant denoiser y_mean at x_t, because that gives the
            # published t_2 (CIFAR-10: 0.632 against 0.782, published 0.631).
            s, sigma = (sde.per_image(v, xt) for v in (kernel.s(t_k), kernel.sigma(t_k)))
            eps_1 = (xt - s * y_mean) / (s * sigma)
        else:
            one = torch.full_like(t_k, kernel.t_max)
            eps_1 = sde.optimal_denoiser(sde.perturb(y, eps, one, kernel), one, kernel, images)
        S0.append(similarity(eps_t, eps, eta))
        S1.append(similarity(eps_t, eps_1, eta))
    return t, torch.cat(S0).cpu(), torch.cat(S1).cpu()


def _check(images, samples, reference):
    if images.dim() != 4 or len(images) < 2:
        raise BadInput(f"clustering needs 2 images or more (N, C, H, W), got {tuple(images.shape)}")
    if not torch.isfinite(images).all():
        raise BadInput("clustering needs finite pixels, and some are NaN or infinite")
    if samples < 2:
        raise BadInput(f"samples = {samples} is too few: give 2 or more")
    if reference not in ("mean", "literal"):
        raise BadInput(f"unknown reference {reference!r}: take 'mean' or 'literal'")


# %% [markdown]
# The two cuts are then read off running averages: $t_1$ is the largest $\tau$ such that the average
# similarity to the image end over $[0,\tau]$ is at least $\alpha$ (eq. 7), and $t_2$ the smallest
# $\tau$ with the same for the noise end over $[\tau,1]$ (eq. 8).


# %%
def cut(t, S0, S1, alpha=0.9):
    """Read t_1 and t_2 off similarity samples: lines 10 and 11 of Algorithm 1.

    t ascending; all (K,). Raises BadInput where no tau keeps an average of alpha.
    """
    count = torch.arange(1, len(t) + 1, dtype=torch.float64)
    up = torch.cumsum(S0, 0) / count  # average over t_k <= tau
    down = torch.flip(torch.cumsum(S1.flip(0), 0) / count, (0,))  # average over t_k >= tau
    low, high = t[up >= alpha], t[down >= alpha]
    if not (len(low) and len(high) and low[-1] < high[0]):
        raise BadInput(f"alpha = {alpha} leaves no t_1 < t_2 on this data set: try another alpha")
    return [low[-1].item(), high[0].item()]  # Eqs. 7 and 8


def algorithm_1(
    images,
    kernel=VP,
    samples=5000,
    alpha=0.9,
    eta=2 / 256,
    seed=0,
    reference="mean",
    progress=False,
):
    """Cut the timeline of a data set into three stages: [t_1, t_2], ascending floats.

    Arguments and errors as `similarity_to_ends` and `cut`. Source: paper, Algorithm 1.
    """
    return cut(*similarity_to_ends(images, kernel, samples, eta, seed, reference, progress), alpha)


# %%
if __name__ == "__main__":
    pixels, _ = sde.load_images(dataset, root)
    images = pixels[:50_000].to(sde.device()).float() / 255  # (N, C, H, W) in [0, 1]
    t, S0, S1 = similarity_to_ends(images, VP, samples, eta, seed, progress=True)
    t_1, t_2 = cut(t, S0, S1, alpha)
    print(f"{dataset}, {len(images):,} pictures, K = {samples:,}: t1 = {t_1:.4f}, t2 = {t_2:.4f}")

# %% [markdown]
# Why there? Look at the two similarities over time. The thin lines are the samples averaged in 100
# bins, the thick ones the running averages that the algorithm compares with $\alpha$.


# %%
def draw_similarity(t, S0, S1, alpha, boundaries, title):
    """Plot S to both ends over time, its running averages, the line alpha and the cuts."""
    figure, ax = plt.subplots(figsize=(9, 3.6))
    t, S0, S1 = (np.asarray(values) for values in (t, S0, S1))
    count = np.arange(1, len(t) + 1)
    ends = (
        ("image", "C0", S0, np.cumsum(S0) / count),
        ("noise", "C3", S1, (np.cumsum(S1[::-1]) / count)[::-1]),
    )
    for end, color, S, running in ends:
        bins = np.array_split(np.arange(len(t)), min(100, len(t)))
        points = [(t[b].mean(), S[b].mean()) for b in bins]
        ax.plot(*zip(*points, strict=True), color=color, lw=1, label=f"similarity to the {end} end")
        ax.plot(t, running, color=color, lw=2.5, alpha=0.5, label="… averaged from that end")
    ax.axhline(alpha, color="gray", ls=":", label=rf"$\alpha$ = {alpha:g}")
    for k, tau in enumerate(boundaries, start=1):
        ax.axvline(tau, color="black", ls="--", lw=1)
        ax.text(tau + 0.008, 0.03, f"$t_{k}$ = {tau:.3f}")
    ax.set(xlabel="t", ylabel="share of pixels alike", title=title, xlim=(0, 1), ylim=(0, 1.03))
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


if __name__ == "__main__":
    draw_similarity(t, S0, S1, alpha, [t_1, t_2], f"Two regimes and what lies between: {dataset}")
    sde.show("figures/02_similarity.png")

# %% [markdown]
# Near the image one function serves (copy the noise), near the noise another (subtract the mean),
# and in between the optimal denoiser changes with $t$. That is the case for three stages. On
# `digits` the first stage is short: 64 pixels say little, so a little noise suffices to confuse two
# digits. CIFAR-10 pictures have 3,072 values and stay recognisable much longer, up to $t_1$ = 0.442
# (published).
#
# Blue rises again at the right. There both answers are nearly the same noise, because the picture's
# share of $\epsilon=(x-s\,y)/(s\,\sigma)$ shrinks with $1/\sigma$; the running average is what
# keeps that tail out of stage one.
#
# ## Two rivals that do not look at the data
#
# Table 4 of the paper compares with clusterings by the time itself and by the log-SNR (after Go et
# al.): contiguous clusters, each costing the sum of distances to its middle element, and none
# smaller than $T/2n$ or larger than $3T/2n$. The best such clustering is found exactly by dynamic
# programming: the cheapest way to cover the first $j$ elements with $k$ clusters ends with some
# cluster $[i,j]$.


# %%
def middle_costs(v):
    """Sum |v - v_middle| over every interval [i, j] of a monotone sequence v (T,): (T, T)."""
    total = np.concatenate([[0], np.cumsum(v)])  # prefix sums
    i, j = np.indices((len(v), len(v)))
    m = (i + j) // 2
    left = (m - i) * v[m] - (total[m] - total[i])
    right = (total[j + 1] - total[m + 1]) - (j - m) * v[m]
    return np.abs(left) + np.abs(right)


def contiguous_clusters(cost, n):
    """Cover 0..T-1 by n contiguous clusters of least total cost: the first index of clusters 2..n.

    cost: (T, T), of the interval [i, j] inclusive. Sizes lie within T/2n and 3T/2n.
    Source: paper, Section C.4, after Go et al. 2023.
    """
    T = len(cost)
    if not 1 <= n <= T:
        raise BadInput(f"n = {n} clusters of {T} times are impossible: take 1 to {T}")
    i, j = np.indices((T, T))
    size = j - i + 1
    allowed = (size >= math.ceil(T / (2 * n))) & (size <= math.floor(3 * T / (2 * n)))
    # rounded, so that equal costs tie in spite of float error and the earliest cut wins
    cost = np.where(allowed, cost.round(6), np.inf)
    best, first = cost[0], []
    for _ in range(n - 1):
        through = best[:-1, None] + cost[1:]  # (end of the previous cluster, end of this one)
        first.append(through.argmin(0) + 1)
        best = through.min(0)
    cuts, end = [], T - 1
    for begin in reversed(first):
        cuts.append(int(begin[end]))
        end = begin[end] - 1
    return cuts[::-1]


def timestep_clusters(n, T=1000):
    """Cut [0, 1] into n stages by time alone: n - 1 ascending floats (paper, Table 4)."""
    t = np.arange(1, T + 1) / T
    return [float(t[i]) for i in contiguous_clusters(middle_costs(t), n)]


def snr_clusters(kernel, n, T=1000):
    """Cut a kernel's timeline into n stages by log-SNR: n - 1 ascending floats (paper, Table 4)."""
    t = np.arange(1, T + 1) / T * kernel.t_max
    log_snr = np.asarray(kernel.log_snr(torch.as_tensor(t)))
    return [float(t[i]) for i in contiguous_clusters(middle_costs(log_snr), n)]


# %% tags=["nbval-check-output"]
if __name__ == "__main__":
    cuts = {
        f"Algorithm 1 on {dataset}": [t_1, t_2],
        "Algorithm 1 on CIFAR-10, published": [0.442, 0.6308],
        "log-SNR": snr_clusters(VP, 3),
        "timestep": timestep_clusters(3),
    }
    print(f"{'clustering':36s}   t1      t2")
    for name, (low, high) in cuts.items():
        print(f"{name:36s} {low:.4f}  {high:.4f}")

# %%
if __name__ == "__main__":
    figure, ax = plt.subplots(figsize=(9, 1.8))
    for row, (low, high) in enumerate(cuts.values()):
        widths = [low, high - low, 1 - high]
        ax.barh(row, widths, left=[0, low, high], color=["C0", "C7", "C3"], alpha=0.7, ec="white")
    ax.set(yticks=range(len(cuts)), yticklabels=list(cuts), xlim=(0, 1), xlabel="t")
    ax.invert_yaxis()
    sde.show("figures/02_cuts.png")

# %% [markdown]
# The paper prints 0.330 and 0.670 for the timestep clustering; the procedure gives 0.334 and 0.667.
#
# The lower two rows know nothing of the data, and neither CIFAR-10's cuts nor theirs suit `digits`.
# Step 04 uses the first row.
#
# ## From one kernel to another
#
# A noise level is a noise level: a cut found with VP serves any kernel at the time with the same
# SNR.


# %%
def match_snr(boundaries, source, target):
    """Move times of one kernel to the times of another that have the same SNR: list of floats.

    Source: paper, footnote 4.
    """
    return [float(target.time(source.log_snr(tau))) for tau in boundaries]


if __name__ == "__main__":
    print("VP", [0.442, 0.6308], "is VE", np.round(match_snr([0.442, 0.6308], VP, sde.VE), 3))

# %% [markdown]
# The authors' release uses 2.5103 and 7.6577 for its EDM network. The first agrees; the second
# belongs to $t$ = 0.636, not to the 0.6308 that the paper states.
#
# **You have** the boundaries of three stages for any data set, and the curves that justify them.
#
# ### Exercises
#
# 1. Double `eta`. Which cut moves more, and why? <details><summary>Solution</summary>Both stages
#    grow, $t_2$ more than $t_1$: S to the image end falls steeply, so its running average crosses
#    $\alpha$ at nearly the same place; S to the noise end falls slowly.</details>
# 2. Use only the pictures of one digit (`images[labels == 3]`). What do you expect of $t_1$?
#    <details><summary>Solution</summary>Fewer candidates, but closer ones. Try it: the two effects
#    nearly cancel.</details>
