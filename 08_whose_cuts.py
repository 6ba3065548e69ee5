# %% [markdown]
# # 08 · Whose cuts are these?
#
# Algorithm 1 asks the *optimal* denoiser of the data set where the timeline is to be cut. But a
# network then serves the stages. **You will** ask a network the same question, and also two closed
# forms that predict better what networks say: one sees only a patch, one knows only the mean and
# the covariance.
#
# **Predict first:** which of the two cuts does a network have as well, $t_1$ or $t_2$?
# <details><summary>Answer</summary>$t_2$, as soon as it may err by a little more. It has no stage
# next to the image.</details>

# %% tags=["imports"]
import importlib
import math
import os
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

if "__file__" not in globals():  # a notebook, which may have been opened where it lies
    os.chdir(".." if os.path.exists("../00_workshop.py") else ".")
    assert os.path.exists("00_workshop.py"), "papermill needs --cwd PROJECT"
workshop = importlib.import_module("00_workshop")  # before torch

import matplotlib.pyplot as plt
import torch

sde = importlib.import_module("01_sde_and_denoiser")
clustering = importlib.import_module("02_clustering")
training = importlib.import_module("04_train")
VP = sde.VP

# %% tags=["parameters"]
out = "runs"  # the folder that holds the runs
samples = 2000  # K of Algorithm 1 [50, 1000000]
seeds = 3  # seeds over which a number has its spread [2, 100]

# %% tags=["imports"]
workshop.settings(globals(), "08_whose_cuts")
figures = Path("figures") if out == "runs" else Path(out) / "figures"

# %%
if __name__ == "__main__":
    images = workshop.load_images("digits")[0].to(workshop.device()).float() / 255  # in [0, 1]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    left, used = images[order[:90]], images[order[90:]]  # as in step 07
    times = torch.tensor([0.01, 0.03, 0.06, 0.1, 0.15, 0.2]).double()
    y, t = left[[33, 28]].repeat_interleave(len(times), 0), times.repeat(2)
    xt = sde.perturb(y, sde.fresh_noise(y, torch.Generator().manual_seed(0)), t, VP)
    rows = [y, xt / sde.per_image(VP.s(t), xt), sde.posterior_mean(xt, t, VP, used)]
    titles = ["two digits", "with noise, at time t", "what the optimal denoiser sees in that"]
    shown = dict(columns=len(t), labels=[f"t = {v:g}" for v in t.tolist()])
    workshop.show_images(rows, titles, figures / "08_optimal.png", **shown)

# %% [markdown]
# The optimal denoiser knows the 1,707 digits `used`, and these two are not among them. So even
# where there is hardly any noise to remove, it replaces them by digits that it knows. Nobody wants
# a network to do that. Yet $t_1$ comes from such times: it says up to when $\epsilon^*_t$ names the
# very noise that was put in, $\epsilon^*_0=\epsilon$.
#
# Only a *finite* set has that end of the timeline. Step 01 found that
# $\epsilon^*_t(x)=-s_t\sigma_t\nabla\log p_t(x)$. Where pictures have a smooth density the gradient
# stays finite as $t\to0$, so $\epsilon^*_t$ goes to **zero**: nobody can tell in which direction so
# little noise has moved a picture. With a set of points one can: away from the nearest point.
#
# ## What a network says
#
# Two networks come with the project: `digits-unified`, one decoder and 40,000 steps on all 1,797
# digits, and `digits-labels`, three decoders and 2,700 steps on `used` (here without a label). They
# work in [−1, 1], where pictures have twice the spread. There the same noise on the same picture
# has the level $2\sigma_t$, which belongs to a later time $u$. (Above $t$ = 0.93 no time has such a
# level. There the networks get their last time, and a fainter picture.)


# %%
def ask_network(model, x, t, kernel, images=None):
    """Let a network of VP name the noise in x (B, C, H, W), of pictures in [0, 1] at times t."""
    t = sde.as_time(t).double().to(x.device).expand(len(x))
    u = kernel.time(kernel.log_snr(t) - math.log(4)).clamp(max=kernel.t_max)  # twice the sigma
    scale = kernel.s(u) * kernel.sigma(u) / kernel.sigma(t)
    x = sde.per_image(scale, x) * (x / sde.per_image(kernel.s(t), x) - 0.5)
    parts = zip(x.split(500), u.to(x).split(500), strict=True)
    with torch.no_grad():
        return torch.cat([training.predict_noise(model, *part, "vp") for part in parts])


def clean(x, eps, t, kernel):
    """Take noise eps out of x (B, C, H, W) at times t: the picture that is left."""
    return x / sde.per_image(kernel.s(t), x) - sde.per_image(kernel.sigma(t), x) * eps


# %%
if __name__ == "__main__":
    runs = [workshop.read_checkpoint(f"pretrained/digits-{kind}") for kind in ("unified", "labels")]
    unified, labels = map(training.averaged_model, runs)

# %% [markdown]
# ## A denoiser that sees a patch
#
# What keeps a network from the optimum? One account is *locality*: a convolution looks at what is
# near. Let the answer at a pixel $p$ depend on a patch $\Omega_p$ around it and on nothing else,
# and ask for the best such answer. Step 01 said that every $x$ is its own problem; now every patch
# $x_{\Omega_p}$ is. The loss (17) is a sum over pixels, and the noise of the pixels is independent,
# so integrating over what lies outside of the patch leaves the Gaussian of what lies inside. Then
# go through (18) to (21) for one number $e$, the answer at $p$:
#
# $$\epsilon^\Omega_t(x)_p=\frac{x_p-s_t\,\hat y_p}{s_t\sigma_t},\qquad
#   \hat y_p=\frac{\sum_iw_i\,y_{i,p}}{\sum_iw_i},\qquad
#   w_i=\exp\Big(-\frac{\|x_{\Omega_p}/s_t-y_{i,\Omega_p}\|^2}{2\sigma_t^2}\Big).$$
#
# It is Prop. 1 with the patch's distance in place of the picture's: the *local score machine* of
# Kamb and Ganguli (ICML 2025, arXiv 2412.20292). In another form of theirs patches may come from
# anywhere in the picture; digits are centred, so here patches stay in place. (Niedoba et al., ICML
# 2025, 2411.19339, average whole patches, which overlap.) The code asks step 01 about every patch:


# %%
def local_denoiser(x, t, kernel, images, size):
    """Predict the noise in x (B, C, H, W), each pixel's from size × size pixels, cut at the rim."""
    mean, r = torch.empty_like(x), size // 2
    for i, j in product(range(x.shape[2]), range(x.shape[3])):
        top, left = max(i - r, 0), max(j - r, 0)
        patch = ..., slice(top, i + r + 1), slice(left, j + r + 1)
        seen = sde.posterior_mean(x[patch], t, kernel, images[patch])  # Prop. 1 of a patch
        mean[..., i, j] = seen[..., i - top, j - left]
    return sde.infer_noise(x, mean, t, kernel)


# %%
if __name__ == "__main__":
    best = sde.optimal_denoiser(xt, t, VP, used)
    for size in (15, 7, 5, 3, 1):
        off = (local_denoiser(xt, t, VP, used, size) - best).square().mean().sqrt()
        print(f"{size:2d}×{size:<2d} is off the optimal denoiser by {off:.2g} of the noise")

# %% [markdown]
# With 15×15 every pixel of a digit sees all of it, and Prop. 1 is back.
#
# ## A denoiser that knows mean and covariance
#
# Another account is that networks are nearly *linear*. If pictures were Gaussian,
# $y\sim\mathcal N(\mu,\Sigma)$, then $y$ and $z=x/s_t=y+\sigma_t\epsilon$ would be jointly
# Gaussian, and the best guess of $y$ from $z$ would be a linear regression. With the principal
# components $U\Lambda U^\top=\Sigma$ it is
#
# $$\hat y=\mu+\Sigma\,(\Sigma+\sigma_t^2I)^{-1}(z-\mu)
#   =\mu+U\,\frac{\Lambda}{\Lambda+\sigma_t^2}\,U^\top(z-\mu).$$
#
# Along each component it keeps the share of what it sees that is picture, not noise. (Li, Dai and
# Qu, NeurIPS 2024, 2410.24060. Qu is an author of this project's paper, too.)


# %%
def gaussian_denoiser(x, t, kernel, images):
    """Predict the noise in x (B, C, H, W) from the mean and the covariance of images alone."""
    y, z = images.flatten(1).double(), x.flatten(1).double()
    mu, (Lambda, U) = y.mean(0), torch.linalg.eigh(torch.cov(y.T, correction=0))
    keep = Lambda / (Lambda + sde.per_image(kernel.sigma(t), z) ** 2)
    z = z / sde.per_image(kernel.s(t), z)
    mean = mu + ((z - mu) @ U * keep) @ U.T
    return sde.infer_noise(x, mean.to(x.dtype).reshape(x.shape), t, kernel)


# %%
FORMS = {"optimal": sde.optimal_denoiser}
FORMS |= {f"local, {n}×{n}": partial(local_denoiser, size=n) for n in (7, 5, 3)}
FORMS["Gaussian"] = gaussian_denoiser

if __name__ == "__main__":
    asked = {"digits-labels": partial(ask_network, labels), **FORMS}
    rows = [clean(xt, denoiser(xt, t, VP, used), t, VP) for denoiser in asked.values()]
    workshop.show_images(rows, list(asked), figures / "08_forms.png", **shown)

# %% [markdown]
# The network has not seen the two digits either, yet it keeps them as long as they are visible. The
# large patches replace them, piece by piece, as the optimal denoiser does. The small ones keep
# them, and so does the Gaussian. From $t$ = 0.15 on all rows begin to agree.
#
# ## How much of the network is explained?
#
# In numbers: take the squared difference between the noise that a form names and the noise that the
# network names, and divide it by the network's own squared error (from the noise that was put in).
# At 0 the form says what the network says. At 1 the form is as far from the network as the true
# noise is.


# %%
def unexplained(model, pictures, images, times, dice, forms=FORMS):
    """Measure how far forms are from a network, relative to its own error: {name: (times,)}.

    pictures: (B, C, H, W), to which noise is added. images: the ones that the forms know.
    """
    t, y = times.repeat_interleave(len(pictures)), pictures.repeat(len(times), 1, 1, 1)
    eps = sde.fresh_noise(y, dice)
    x = sde.perturb(y, eps, t, VP)
    said = ask_network(model, x, t, VP)
    add = lambda gap: gap.square().reshape(len(times), -1).sum(1).cpu()  # noqa: E731
    return {name: add(f(x, t, VP, images) - said) / add(eps - said) for name, f in forms.items()}


# %%
if __name__ == "__main__":
    cases = {"digits-unified, digits it has seen": (unified, images[:90], images)}
    cases["digits-labels, digits it has seen"] = (labels, used[:90], used)
    cases["digits-labels, held out"] = (labels, left, used)
    when = torch.tensor([0.005, 0.01, 0.02, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3]).double()
    _, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True)
    for ax, (title, case) in zip(axes, cases.items(), strict=True):
        dice = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
        found = [unexplained(*case, when, one) for one in dice]
        print(f"{title}; t =", *(f"{v:5g}" for v in when.tolist()))
        for name in FORMS:
            drawn = torch.stack([row[name] for row in found])
            ax.errorbar(when, drawn.mean(0), drawn.std(0), marker=".", label=name)
            print(f"{name:{len(title) + 5}}", *(f"{v:5.2f}" for v in drawn.mean(0)), end="")
            print(f"  ± {100 * (drawn.std(0) / drawn.mean(0)).max():.0f}% or less")
        ax.axhline(1, color="gray", ls=":")
        ax.set(title=title, xscale="log", yscale="log", xlabel="time t")
    axes[0].set_ylabel("squared difference to the\nnetwork over its own error")
    axes[0].legend(fontsize=8)
    workshop.show_figure(figures / "08_explained.png")

# %% [markdown]
# **Next to the image** the optimal denoiser explains nothing: it names the true noise in digits
# that it knows (1.00) and replaces others. At $t$ = 0.01 the Gaussian is nearest to both networks.
# **Among the patches** 3×3 is nearest, then 5×5 at 0.1, then larger, as if a network saw more of a
# picture with more noise. **From $t$ = 0.2 on** all forms are near. (Kamb and Ganguli also fit the
# patch size to each time. ± is the largest standard deviation over noise draws, for 90 digits.)
#
# The middle and right panels differ in the forms that recognise training pictures, not in the
# Gaussian: the network treats digits that it has seen like others. The left network, trained 15
# times as long, is farther from the Gaussian up to $t$ = 0.2, and from there on nearest to the
# optimal denoiser: on noisy *training* pictures better networks come nearer to it (Song et al.
# 2025, 2510.01378). But each is measured by its own error, and they differ in other ways, too.
#
# ## Algorithm 1, asked anew
#
# `plain_algorithm_1` of step 02 takes any denoiser. In the last row the optimal one is asked about
# the 90 digits that it does not know.

# %%
if __name__ == "__main__":
    asked = {name: (images, form) for name, form in FORMS.items()}
    asked["digits-unified"] = images, partial(ask_network, unified)
    asked["optimal, held out"] = left, lambda *x: sde.optimal_denoiser(*x[:3], used)
    _, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True)
    for i, (name, (pictures, denoiser)) in enumerate(asked.items()):
        cuts, alike = [], []
        for seed in range(seeds):
            asking = dict(seed=seed, denoiser=denoiser)
            found, S_0, _, curves = clustering.plain_algorithm_1(pictures, samples, **asking)
            cuts.append(found)
            alike.append(float(S_0[1][S_0[0] < 0.1].mean()))
            for ax, average in zip(axes, curves[1:], strict=True):
                ax.plot(curves[0], average, color=f"C{i}", lw=1, label=None if seed else name)
        cells = []
        for end, column in zip((VP.t_min, VP.t_max), zip(*cuts, strict=True), strict=True):
            told = f"{fmean(column):.3f} ± {stdev(column):.3f}"
            cells.append("none" if end in column else told)
        print(f"{name:18s} t1 {cells[0]:14s} t2 {cells[1]:14s}", end=" ")
        print(f"alike with the image end, t < 0.1: {fmean(alike):.2f} ± {stdev(alike):.2f}")
    for ax, end in zip(axes, ("image", "noise"), strict=True):
        ax.axhline(0.9, color="gray", ls=":")
        ax.set(title=f"share alike with the {end} end", xlabel=r"averaged from there to $\tau$")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    workshop.show_figure(figures / "08_cuts.png")

# %% [markdown]
# (Mean and standard deviation over seeds, each with its own lines; *none*: no $\tau$ keeps an
# average of 0.9. The last column is the similarity to the image end, averaged over $t$ < 0.1.)
#
# **Nearly all share $t_2$.** All forms cut within 0.03 of each other (0.09 on CIFAR-10,
# RESULTS.md): with so much noise what remains is the mean, and all of them know the mean. (In the
# last row it is that of 90 digits.) The network misses it by a little more than $\eta$ = 2/256, so
# it has no $t_2$; with 8/256 it has the same one as the optimal denoiser (exercise 1).
#
# **$t_1$ is a property of memorising.** The less a form sees, the smaller its $t_1$. The Gaussian
# has none, a network has none, and the optimal denoiser itself has none for digits that it does not
# know: $t_1$ is where a denoiser no longer recognises a training picture.
#
# Are the paper's cuts bad, then? That does not follow: they may be good for another reason than the
# one that led to them. **Do cuts taken from the local denoiser train better than the paper's, or
# than equal thirds?** How to decide was written down before anything ran. The answer (RESULTS.md,
# *Whose cuts?*): on `digits` the likelihood says yes, the pictures say no; on CIFAR-10 it is open.
#
# (Two networks, 8×8 digits. We read only the abstracts of these papers, and Niedoba's code.
# Lukoianov et al., 2509.09672, find that locality comes from the data and not from convolutions.)
#
# ### Exercises
#
# 1. Does the network have cuts where $\eta$ is larger?
#    <details><summary>Solution</summary>`clustering.plain_algorithm_1(images, 2000, eta=8 / 256,
#    denoiser=asked["digits-unified"][1])[0]`: a $t_2$ near 0.29, where the optimal denoiser has it
#    with this $\eta$. The network has no $t_1$ with any $\eta$ up to 64/256.</details>
# 2. What does a denoiser know if it sees one pixel only, and what does it make of the pixel at the
#    top left? <details><summary>Solution</summary>`clean(xt, local_denoiser(xt, t, VP, used, 1), t,
#    VP)`: how often each grey value occurs at that place. The top left is black in all digits, so
#    the denoiser makes it black, whatever it sees.</details>
