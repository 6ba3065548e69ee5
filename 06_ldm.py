# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 06 · The same idea in latent space
#
# **You will** squeeze digits into small latents with an autoencoder, see what is lost, train the
# multistage model of steps 03 and 04 on the latents in place of the pixels, and decode what it
# draws. Nothing of the diffusion model changes: a latent is a small picture with unusual channels.
#
# Here the paper saves most. On CelebA 256×256 its multistage latent diffusion reaches nearly the
# FID of the plain one (8.38 and 8.29) with 30% of the training compute: 70% is saved (Table 2).
#
# `python 06_ldm.py` shows this lesson, and then trains on digits at greater length. With flags the
# file is the command below the line alone: `python 06_ldm.py --dataset celeba --size 256` is the
# paper's configuration, and with `--dry_run` it says what that would take.

# %%
import importlib
import os
import sys

if __name__ == "__main__" and os.path.basename(os.getcwd()) == "notebooks":
    os.chdir("..")  # a notebook that was opened where it lies
workshop = importlib.import_module("00_workshop")  # first: it readies the process for torch

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

sde = importlib.import_module("01_sde_and_denoiser")
unet = importlib.import_module("03_multistage_unet")
training = importlib.import_module("04_train")
evaluation = importlib.import_module("05_sample_eval")
lesson = workshop.is_lesson()

# %% [markdown]
# ## The crudest squeeze
#
# A digit has 64 pixels. Replace each block of four by its mean, and 16 numbers are left; repeat
# each mean four times, and a picture is back. How much is lost?

# %%
if __name__ == "__main__" and lesson:
    digits = workshop.load_images("digits")[0]  # uint8 (1797, 1, 8, 8)
    x0 = digits / 255  # in [0, 1]
    means = F.avg_pool2d(x0, 2)  # (1797, 1, 4, 4)
    blurred = F.interpolate(means, scale_factor=2.0)  # (1797, 1, 8, 8)
    titles = ["digits, 1×8×8", "means of four pixels, 1×4×4", "and back"]
    workshop.show_images([row[:16] for row in (x0, means, blurred)], titles, "figures/06_means.png")
    print(f"squared error {F.mse_loss(blurred, x0):.4f} a pixel; pixels vary by {x0.var():.4f}")

# %% [markdown]
# A third of all that varies: the third row can hardly be read. A mean says how much ink there is in
# its block, and not where.
#
# Which numbers would say more? Let two networks find out: an *encoder* $\mathcal E$ that maps a
# picture to its latent $h=\mathcal E(x)$, a few channels at a lower resolution, and a *decoder*
# $\mathcal D$ with $\mathcal D(h)\approx x$. They are trained together, once, before the diffusion
# model, and only on rebuilding pictures.
#
# The authors use the released **VQ-f4** of latent diffusion: pictures of 3×256×256, latents of
# 3×64×64, a sixteenth of the numbers. Ours make 2×4×4 of 1×8×8, a half. A convolution costs as much
# as there are positions, so every evaluation of the diffusion network becomes sixteen times (here:
# four times) cheaper, before any stage is cut. What the paper saves comes on top of that.
# ($\mathcal D$ and $z$ mean other things in steps 02 and 05.)
#
# | symbol | in the code | meaning |
# |---|---|---|
# | $h=\mathcal E(x)$ | `model.encode(x)` | the latent as the encoder gives it, (B, c, h, w) |
# | $e$ | `codebook(h)[1]` | the same, each position rounded to an entry of the codebook |
# | $\mathcal D$ | `model.decode(h)` | the decoder: it rounds first |
# | $z$ | `scale * h` | the latent of unit variance that the diffusion model sees |
#
# ## A codebook
#
# What keeps the latents tidy? Two kinds of autoencoders are in use, and they differ in the answer;
# the other kind, KL, stands below the line. With nothing else to obey, an encoder may hide detail
# in tiny differences between large numbers, which a diffusion model could never draw well enough.
# VQ (vector quantisation; van den Oord et al. 2017) allows the decoder no more than a list of $K$
# vectors, the *codebook*. Each position $h$ of the encoder's output is rounded to the nearest
# entry:
#
# $$e = e_j,\qquad j=\arg\min_i\|h-e_i\|_2 .$$
#
# Rounding has no useful gradient: a small change of $h$ changes nothing. So the gradient is passed
# *straight through*, as if nothing had been rounded. One line does both: forwards
# $h+\mathrm{sg}[e-h]$ is $e$, backwards it is $h$, where $\mathrm{sg}$ stops the gradient.
#
# (The counter `used` and the parts serve large codebooks, such as the 8,192 entries of VQ-f4.)


# %%
class Codebook(nn.Module):
    """Round latents (B, c, H, W) to the nearest of `entries` learned vectors of c numbers."""

    def __init__(self, entries, c):
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(entries, c).uniform_(-1 / entries, 1 / entries))
        self.register_buffer("used", torch.zeros(entries))  # how often, since the last revival

    def nearest(self, h):
        """Return the index of the nearest entry at each position: (B, H, W) int64."""
        rows = h.movedim(1, 3).flatten(0, 2).float()  # in parts: all distances may not fit
        index = [torch.cdist(part, self.vectors.float()).argmin(1) for part in rows.split(4096)]
        return torch.cat(index).reshape(len(h), *h.shape[2:])

    def forward(self, h):
        """Return the rounded latents, with the gradient of h, their entries and the indices."""
        index = self.nearest(h)
        e = self.vectors[index].movedim(3, 1)  # (B, c, H, W)
        return h + (e - h).detach(), e, index


# %%
if __name__ == "__main__" and lesson:
    book = Codebook(entries=3, c=2)
    book.vectors.data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    h = torch.tensor([0.75, 0.5]).reshape(1, 2, 1, 1).requires_grad_()
    rounded, e, index = book(h)
    (3 * rounded[0, 0] + 5 * rounded[0, 1]).sum().backward()
    squares = [sum((h[0, i, 0, 0] - v[i]) ** 2 for i in (0, 1)).item() for v in book.vectors]
    print("squared distances of (0.75, 0.5) from the three entries:", squares)
    print(f"it is rounded to entry {index.item()}:", rounded.flatten().tolist())
    print("the gradient behind is [3, 5]; before the rounding it is", h.grad.flatten().tolist())
    assert index.item() == squares.index(min(squares))

# %% [markdown]
# The nearest entry is found, and the gradient arrives as if nothing had happened: the encoder is
# told how the *rounded* latent should change, and changes its own in that direction.
#
# But the gradient reaches no entry on its way. How do entries learn? They and the encoder are
# pulled towards each other, the encoder more gently, with $\beta=\tfrac14$:
#
# $$\|e-\mathrm{sg}[h]\|^2+\beta\,\|h-\mathrm{sg}[e]\|^2 .$$


# %%
def pull_together(h, e, beta=0.25):
    """Compare encoded latents with their entries: the codebook's pull and the encoder's."""
    return F.mse_loss(e, h.detach()) + beta * F.mse_loss(h, e.detach())


if __name__ == "__main__" and lesson:
    book.zero_grad()
    pull_together(h.detach(), book(h.detach())[1]).backward()
    print("where the pull moves the three entries:", (0 - book.vectors.grad).tolist())

# %% [markdown]
# Only the entry that was nearest moves, towards the latent. Why the second term? Without it the
# encoder could run away from the entries, which follow at their own pace; with it, it commits
# itself to the entry it has. An entry that is never the nearest never learns; so ours are spread
# out at the start, and below the line dead ones are moved.
#
# ## A small autoencoder
#
# Three convolutions each way, of which the middle one halves the resolution, or doubles it. The
# last one of the encoder has two channels: those of the latent.
#
# Where is the rounding? The diffusion model will work on the latents *before* they are rounded. So
# rounding belongs to the decoder, which mends small slips of what was drawn by it.


# %%
class SmallAutoencoder(nn.Module):
    """Map pictures (B, 1, 8, 8) in [-1, 1] to latents (B, 2, 4, 4) and back."""

    factor = 2  # how much smaller a latent's side is

    def __init__(self, c=32, entries=64):
        super().__init__()
        layers = [nn.Conv2d(1, c, 3, padding=1), nn.SiLU()]
        layers += [nn.Conv2d(c, c, 4, stride=2, padding=1), nn.SiLU()]  # 8×8 to 4×4
        self.encoder = nn.Sequential(*layers, nn.Conv2d(c, 2, 3, padding=1))
        layers = [nn.Conv2d(2, c, 3, padding=1), nn.SiLU()]
        layers += [nn.ConvTranspose2d(c, c, 4, stride=2, padding=1), nn.SiLU()]  # 4×4 to 8×8
        self.decoder = nn.Sequential(*layers, nn.Conv2d(c, 1, 3, padding=1))
        self.codebook = Codebook(entries, 2)
        self.codebook.vectors.data.uniform_(-1, 1)

    def encode(self, x):
        return self.encoder(x)

    def decode(self, z):
        return self.decoder(self.codebook(z)[0])


# %%
if __name__ == "__main__" and lesson:
    torch.manual_seed(0)  # the initial weights
    small, x = SmallAutoencoder(), workshop.to_network_space(digits[:5])
    shapes = [tuple(v.shape) for v in (x, small.encode(x), small.decode(small.encode(x)))]
    print(*shapes, sep=" -> ", end=f"; {unet.count_parameters(small):,} parameters\n")

# %% [markdown]
# From 64 numbers to 32 and back to 64. The weights are still random, so nothing comes back yet.
#
# ## Its training
#
# The loss is the absolute error of a pixel, plus the pull. (The squared error would make blurs; the
# absolute one keeps edges.) The learning rate falls to zero, so that the last steps polish. Nobody
# asks what the latents mean: whatever helps to rebuild the picture is welcome.


# %%
def train_plainly(model, images, steps=200, batch=64, lr=5e-3, seed=0):
    """Train a VQ autoencoder on uint8 images (N, C, H, W), yielding each step's squared error."""
    optimizer = torch.optim.Adam(model.parameters(), lr, betas=(0.5, 0.9))
    todo = range(1, steps + 1)
    source = workshop.pictures_of_steps(images, batch, seed, todo)
    for step, pictures in zip(todo, source, strict=True):
        x = workshop.to_network_space(pictures)  # (b, C, H, W)
        h = model.encoder(x)
        rounded, e, _ = model.codebook(h)
        rebuilt = model.decoder(rounded)
        loss = F.l1_loss(rebuilt, x) + pull_together(h, e)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - (step - 1) / steps)
        optimizer.step()
        yield F.mse_loss(rebuilt, x).item() / 4  # in [0, 1], not in [-1, 1]


if __name__ == "__main__" and lesson:
    errors = list(train_plainly(small, digits))
    marks = ", ".join(f"{errors[n - 1]:.4f}" for n in (1, 25, 50, 100, 200))
    print("squared error after 1, 25, 50, 100 and 200 steps:", marks)

# %% [markdown]
# ## Latents
#
# After some fifty steps it is ahead of the means. From now on its two halves are used apart: all
# pictures are encoded once, and only what is drawn has to be decoded. Many pictures go in parts.


# %%
def pictures_at_once(side):
    """Tell how many pictures of this side to encode or decode at a time."""
    return max(1, min(500, 2**20 // side**2))


@torch.no_grad()
@workshop.enough_memory("take pictures of a smaller --size")
def encode_pictures(model, pictures):
    """Encode uint8 pictures (N, C, H, W), on any device: latents (N, c, h, w) on the model's."""
    where = next(model.parameters()).device
    parts = pictures.split(pictures_at_once(pictures.shape[-1]))
    return torch.cat([model.encode(workshop.to_network_space(part.to(where))) for part in parts])


@torch.no_grad()
@workshop.enough_memory("take pictures of a smaller --size")
def decode_latents(model, z, scale):
    """Decode latents, times scale, to pictures (N, C, H, W) in [0, 1], on the CPU."""
    where = next(model.parameters()).device
    parts = z.split(pictures_at_once(model.factor * z.shape[-1]))
    found = [model.decode(part.to(where) / scale).cpu() for part in parts]
    return workshop.to_pictures(torch.cat(found))


# %%
def draw_latents(model, pictures, scale, path):
    """Draw pictures, what an autoencoder makes of them, and the channels of their latents."""
    z = encode_pictures(model, pictures) * scale
    low, high = z.amin((0, 2, 3), keepdim=True), z.amax((0, 2, 3), keepdim=True)
    rows = [pictures.cpu() / 255, decode_latents(model, z, scale)]
    rows += ((z - low) / (high - low)).split(1, dim=1)
    shapes = ["×".join(map(str, v.shape[1:])) for v in (pictures, z[:, :1])]
    titles = [f"pictures, {shapes[0]}", "what comes back"]
    titles += [f"channel {i} of the latents, {shapes[1]}" for i in range(z.shape[1])]
    workshop.show_images(rows, titles, path)


if __name__ == "__main__" and lesson:
    draw_latents(small, digits[:16], 1.0, "figures/06_rebuilt.png")
    h = encode_pictures(small, digits)
    error = F.mse_loss(decode_latents(small, h, 1.0), x0)
    print(f"squared error {error:.4f} a pixel; of the means {F.mse_loss(blurred, x0):.4f}")

# %% [markdown]
# The strokes are back, and most of the greys, with a fifth of the error of the means. It took twice
# their numbers, and numbers that were chosen for the purpose. The latents are small pictures still:
# what stands at a place of the picture stands at the same place of its latent. But their two
# channels are no colours, and what is bright in them is not bright in the picture.
#
# And the codebook? Here the two numbers of a position are a point of the plane, so that all
# positions of all latents can be drawn, and the 64 entries over them.

# %%
if __name__ == "__main__" and lesson:
    points, entries = h.movedim(1, 3).reshape(-1, 2), small.codebook.vectors.detach()
    plt.figure(figsize=(5, 5))
    plt.scatter(*points[::4].T, s=2, alpha=0.3, label="positions of latents")
    plt.scatter(*entries.T, marker="x", color="black", label="entries of the codebook")
    plt.gca().set(xlabel="channel 0", ylabel="channel 1", aspect="equal")
    plt.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    workshop.show_figure("figures/06_codebook.png")
    print(f"entries in use: {len(small.codebook.nearest(h).unique())} of {len(entries)}")

# %% [markdown]
# The entries cover the part of the plane where latents are, about evenly, and all are in use. Large
# steps to the next entry, as at the rim, cost accuracy; few latents lie there.
#
# ## The scale
#
# The kernels of step 01 are made for data of a spread near 1: a noise level of 1 shall be as strong
# as what it covers, and at the end of time nothing shall be left. Latents have whatever spread
# their autoencoder found convenient, so they are divided by it. The number is part of the model,
# and before decoding it is multiplied by again:
#
# $$z = h\,/\,\mathrm{std}(h),\qquad \hat x = \mathcal D\big(z\cdot\mathrm{std}(h)\big).$$
#
# The spread of ours is 0.88, and 2.15 that of the KL autoencoder which is trained below on the same
# digits. Without the scale each would see another schedule: the same step, a different share of
# noise.
#
# ## The multistage model, unchanged
#
# A network of step 03 for pictures of two channels and a side of four, trained by step 04's loop
# with the kernel of latent diffusion, whose time is one of 1,000 steps. The cuts are those that the
# authors' code takes for latents, after the steps 442 and 631: stage 0 has the times up to 0.442,
# next to the image, stage 2 those from 0.632 on. Every batch has all three stages here, which
# serves a short training best. Not a line of steps 03 and 04 knows that these are latents.

# %%
if __name__ == "__main__" and lesson:
    scale = 1 / h.std()
    torch.manual_seed(0)
    model = unet.build_network("digits_latent")
    state, curves = training.new_state(model, 3e-3, seed=0), {0: [], 1: [], 2: []}
    how = dict(process="ldm", batch=64, warmup=20, stages="mixed")
    for step, losses in training.train(state, scale * h, 150, **how):
        for k, loss in losses.items():
            curves[k].append((step, loss))
    training.draw_losses(curves)
    workshop.show_figure("figures/06_losses.png")
    print(f"spread of the latents {h.std():.3f}; cuts {model.cuts}")

# %% [markdown]
# The same picture as in pixels: near the noise (stage 2) the task is easy, near the image (stage 0)
# it is hard, and the losses lie a factor of a hundred apart.
#
# ## Drawing and decoding
#
# The start is noise of the latents' shape, (2, 4, 4). Step 05 draws latents from it with
# DPM-Solver++(2M), 20 evaluations in equal steps of time, as the authors' code does. They are
# multiplied by the spread, rounded, and decoded, all 48 in a moment: what the solver repeats 20
# times happens in a space of half the numbers, and with VQ-f4 of a sixteenth.

# %%
if __name__ == "__main__" and lesson:
    drawn = evaluation.sample(state["ema"], "ldm", 48, "dpm-solver++-2m", 20, grid="time")
    pictures = decode_latents(small, drawn, scale)  # (48, 1, 8, 8)
    workshop.show_images([pictures], ["drawn as latents, and decoded"], "figures/06_drawn.png")

# %% [markdown]
# Strokes, some of them digits, after seconds of training. Where they fail they fail as digits do,
# with broken or doubled lines: the decoder knows no other marks.
#
# **You have** all parts of latent diffusion: a codebook, an autoencoder, a scale, and the model of
# the steps before, which never saw a pixel. No sample can be better than what the autoencoder
# rebuilds; how good these are is measured below, on longer trainings.
#
# ### Exercises
#
# 1. Run with `--kind vq`. What is the perplexity of its 256 entries, and what does the rounding
#    cost? <details><summary>Solution</summary>`autoencoder.jsonl` has the perplexity; the column of
#    the reconstructions has the price.</details>
# 2. Leave out the scale: train on `h` above. What do you expect of the losses of the three stages?
#    <details><summary>Solution</summary>Where the spread is below 1, the same step of the schedule
#    covers more, so that the noise is easier to tell and the losses fall; the model spends more of
#    its steps on nearly pure noise.</details>
# 3. Why are the means of a KL autoencoder (below) kept as latents, and not samples?
#    <details><summary>Solution</summary>Samples add noise that the decoder was trained to ignore;
#    the means are the cleaner data set. With a faint pull like ours the difference is
#    small.</details>
# 4. Train with the cuts that Algorithm 1 gives for the latents (`--boundaries`, as parts of 1) in
#    place of the published ones. <details><summary>Solution</summary>Whichever wins: one seed is
#    not enough to tell. Give `--seed` three values before you believe it.</details>
#
# ## Below this line: faster, safer, as published
#
# The command: published and released autoencoders, their judges, latents on disk, several GPUs,
# resuming, a unified network beside the multistage one, and what it would all take. Where a setting
# is 0 or empty the recipe of the data set decides (`workshop.DATASETS`, step 00).

# %% tags=["parameters"]
dataset = "digits"  # digits, mnist, cifar10, celeba or folder
root = "data"  # where the data set lies or is downloaded to
size = 256  # side in pixels that pictures of celeba and folder are brought to [4, 2048]
first_stage = ""  # file of a trained autoencoder, own or LDM's VQ-f4; empty: train one
kind = ""  # autoencoder to train: kl or vq; empty: the data set's recipe
code_steps = 0  # training steps of the autoencoder; 0: the recipe of the data set [0, 1000000000]
code_lr = 0.0  # Adam's learning rate of the autoencoder; 0: the recipe [0, 10]
perceptual = -1.0  # weight of LPIPS in the autoencoder's loss; below 0: the recipe [-1, 1000]
adversarial = -1.0  # weight of a patch discriminator in it; below 0: the recipe [-1, 1000]
latents = ""  # folder of the latents; empty: latents/ in the run
arch = "multistage"  # multistage, unified or separate
network = ""  # a name of step 03's NETWORKS such as ldm; empty: the data set's recipe
stages = ""  # uniform: one stage a batch; mixed: all stages in every batch; empty: the recipe
weight = ""  # min-snr: less weight near the image; none: that of Eq. 4; empty: the recipe
times = ""  # stages: as many latents in each; uniform: over the timeline; empty: the recipe
boundaries = ""  # inner boundaries such as 0.1,0.44; empty: LDM's steps 442 and 631
steps = 0  # training steps of the latent model; 0: the recipe [0, 1000000000]
batch = 0  # latents a step, over all devices, and drawn at a time; 0: the recipe [0, 1000000]
lr = 0.0  # Adam's learning rate of the latent model; 0: the recipe [0, 10]
decay = ""  # linear: the learning rate falls to zero over the run; none; empty: the recipe
ema = 0.9999  # decay of the averaged weights, approached by (1 + n)/(10 + n) [0, 1)
sampler = "dpm-solver++-2m"  # any of step 05's SAMPLERS, such as ddim
grid = "time"  # where the solver stops: time, log-snr or quadratic; empty: the solver's own choice
nfe = 20  # evaluations of the network for one latent [1, 10000]
samples = 898  # pictures to draw and measure; at most half the data set [10, 10000000]
weights = ""  # file of Inception's weights; empty: torch-fidelity's cache, else its download
compare = True  # digits, mnist: also train a unified network with equal FLOPs, and draw both curves
seed = 0  # seed of every random number [0, 4294967295]
name = ""  # name of the run; empty: dataset-latent, and the arch where it is not multistage
out = "runs"  # the folder that holds the runs
save_every = 0  # steps between checkpoints; 0: every ten minutes [0, 1000000000]
sample_every = 0  # steps between grids of samples; 0: a fifth of the steps [0, 1000000000]
memory = 4.0  # GiB of pictures or latents held on the device; more are read later [0, 1000000]
workers = 4  # processes that read them then [0, 1024]
compile = False  # compile the network first (worth it for hours on a GPU)
resume = False  # go on with that run: train what is missing, then draw
dry_run = False  # say what the run would take (parameters, GFLOPs, memory, time) and stop

# %%
workshop.settings(globals(), "06_ldm")

import copy
import hashlib
import json
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

clustering = importlib.import_module("02_clustering")
BadInput = workshop.BadInput

# %% [markdown]
# ### The published layout
#
# Residual blocks and attention are those of step 03, told no time. Only the halving differs: LDM's
# autoencoders pad on the right and below alone. Two kinds share the layout: VQ, and **KL** (a
# variational autoencoder), whose encoder gives a Gaussian, $z=\mu+\sqrt v\,\epsilon$, with a faint
# pull of $\mathcal N(\mu,v)$ towards $\mathcal N(0,I)$.


# %%
NORM = partial(unet.group_norm, 32, 4, 1e-6)
BLOCK, ATTEND = partial(unet.ResBlock, e=0, norm=NORM), partial(unet.Attention, norm=NORM)


class Halve(nn.Conv2d):
    """Halve the resolution of (B, c, H, W) by a strided convolution."""

    def __init__(self, c):
        super().__init__(c, c, 3, stride=2)

    def forward(self, h):
        return super().forward(F.pad(h, (0, 1, 0, 1)))


class Autoencoder(nn.Module):
    """Map pictures (B, C, H, W) in [-1, 1] to latents (B, code, H/f, W/f), f = 2^(levels - 1).

    kind: "kl" or "vq", which has a codebook of `entries`. channels: of the pictures; code: of the
    latents; width: channels at full resolution, times mults at each level; blocks: residual blocks
    a level (one more in the decoder). Raises BadInput for another kind.
    Source: Rombach et al. 2022, Appendix G.
    """

    def __init__(self, kind, channels, code, width, mults, blocks, entries=None):
        super().__init__()
        if kind not in ("kl", "vq"):
            raise BadInput(f"unknown autoencoder {kind!r}: take kl or vq")
        self.options = dict(kind=kind, channels=channels, code=code, width=width)
        self.options.update(mults=tuple(mults), blocks=blocks, entries=entries)
        self.kind, self.factor, self.channels = kind, 2 ** (len(mults) - 1), channels
        said = 2 * code if kind == "kl" else code  # mean and log-variance, or the latent
        c, down = width, [nn.Conv2d(channels, width, 3, padding=1)]
        for level, mult in enumerate(mults):
            down += [BLOCK(c if i == 0 else width * mult, width * mult) for i in range(blocks)]
            c = width * mult
            down += [Halve(c)] * (level < len(mults) - 1)
        down += [unet.middle_block(c, BLOCK, ATTEND), NORM(c), nn.SiLU()]
        down += [nn.Conv2d(c, said, 3, padding=1), unet.LastConv2d(said, said, 1)]
        up = [nn.Conv2d(code, code, 1), nn.Conv2d(code, c, 3, padding=1)]
        up += [unet.middle_block(c, BLOCK, ATTEND)]
        for level, mult in reversed(list(enumerate(mults))):
            up += [BLOCK(c if i == 0 else width * mult, width * mult) for i in range(blocks + 1)]
            c = width * mult
            up += [unet.Up(c)] * (level > 0)
        up += [NORM(c), nn.SiLU(), unet.LastConv2d(c, channels, 3, padding=1)]
        self.encoder, self.decoder = nn.Sequential(*down), nn.Sequential(*up)
        self.codebook = Codebook(entries, code) if kind == "vq" else None

    def check_shape(self, shape):
        """Raise BadInput for pictures of a shape (…, C, H, W) that this autoencoder cannot take."""
        C, H, W = shape[-3:]
        if C != self.channels:
            colours = {1: "grey", 3: "colour"}
            raise BadInput(
                f"this autoencoder takes {colours.get(self.channels, self.channels)} pictures, and "
                f"these are {colours.get(C, C)} (channels: {C}): train one for them, or give "
                "another --first_stage"
            )
        if H % self.factor or W % self.factor:
            raise BadInput(
                f"pictures of {H}×{W} cannot be made {self.factor} times smaller: take a --size "
                f"that {self.factor} divides"
            )

    def encode(self, x):
        """Return the latent that the diffusion model works on: KL's mean, or VQ's before rounding.

        Raises BadInput as `check_shape`.
        """
        self.check_shape(x.shape)
        with workshop.half_precision(x.device):
            h = self.encoder(x)
        return h.chunk(2, dim=1)[0] if self.kind == "kl" else h

    def decode(self, z):
        """Map latents back to pictures; VQ rounds them first."""
        with workshop.half_precision(z.device):
            return self.decoder(self.codebook(z)[0] if self.kind == "vq" else z)


# %% tags=["nbval-check-output"]
if __name__ == "__main__":
    with torch.device("meta"):
        for title, plan in dict(small=workshop.SMALL, VQ_F4=workshop.VQ_F4).items():
            whole = Autoencoder(**plan)
            parts = [unet.count_parameters(v) for v in (whole.encoder, whole.decoder, whole)]
            print("{:6s} encoder {:11,}  decoder {:11,}  all {:11,}".format(title, *parts))
        made = whole.encode(torch.empty(1, 3, 256, 256)).shape
        print("VQ-f4 turns 3×256×256 into", "×".join(map(str, made[1:])))

# %% [markdown]
# ### What is a good reconstruction?
#
# Large pictures come out blurred, because a blurred texture is closer in pixels than a sharp one in
# the wrong place. Latent diffusion therefore adds two judges: **LPIPS**, a distance between the
# features of an ImageNet classifier, and a **patch discriminator**, which is trained along. Its weight
# is adapted so that its gradient is as large as the other losses' at the decoder's last layer.


# %%
class Patches(nn.Module):
    """Judge patches of pictures (B, C, H, W): (B, 1, h, w), above zero for real.

    Source: Isola et al. 2017, Appendix 6.1.2, with fewer layers for pictures below 32 pixels.
    """

    def __init__(self, channels, size, width=64):
        super().__init__()
        halvings = max(1, min(3, size.bit_length() - 3))
        c, layers = width, [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, halvings + 1):
            stride = 2 if i < halvings else 1
            layers += [nn.Conv2d(c, 2 * c, 4, stride, 1, bias=False), nn.BatchNorm2d(2 * c)]
            layers, c = [*layers, nn.LeakyReLU(0.2)], 2 * c
        self.net = nn.Sequential(*layers, nn.Conv2d(c, 1, 4 if size >= 16 else 3, 1, 1))

    def forward(self, x):
        with workshop.half_precision(x.device):
            return self.net(x).float()


def load_lpips(where):
    """Load LPIPS (torch-fidelity's), as a function of two sets of pictures in [-1, 1] to a number.

    Returns None, and says so, where its weights cannot be had.
    """
    from torch_fidelity.sample_similarity_lpips import SampleSimilarityLPIPS

    try:
        with workshop.limit_downloads():
            net = SampleSimilarityLPIPS("lpips-vgg16").to(where)
    except Exception as error:  # each host fails in its own way
        workshop.print_once(
            f"LPIPS's weights cannot be had ({type(error).__name__}): going on without it; put "
            f"vgg16-397923af.pth and weights-vgg16-lpips.pth into {torch.hub.get_dir()}"
            "/checkpoints (in place of torn ones) to train with it"
        )
        return None
    grey = lambda x: (x.expand(-1, 3, -1, -1) + 1) * 127.5  # noqa: E731 - and colour as it is
    return lambda a, b: net(grey(a), grey(b)).mean()


# %% [markdown]
# The loop logs how healthy a codebook is: its **perplexity** is the number of entries that are in
# equal use, at most `entries`. Dead entries are moved onto latents of the batch every 100 steps.


# %%
def reconstruct(model, x, generator, beta=0.25):
    """Encode and decode pictures as in training: (rebuilt, pull, {name: number to log}).

    The pull is the KL divergence (nats an entry) or the codebook's and the encoder's commitment.
    """
    h = model.encoder(x)
    if model.kind == "kl":
        mean, log_var = h.chunk(2, dim=1)
        (rank, world), (b, *shape) = workshop.ranks(), mean.shape
        noise = torch.randn(world * b, *shape, generator=generator, device=x.device)
        noise = noise.chunk(world)[rank]  # of the whole batch, so that processes do not share it
        kl = (mean**2 + log_var.exp() - 1 - log_var).mean() / 2
        return model.decoder(mean + noise * torch.exp(log_var / 2)), kl, dict(kl=kl.detach())
    rounded, e, index = model.codebook(h)
    # release: beta on the entries' pull instead of the encoder's, a slip that it keeps for the sake
    # of its checkpoints; here: on the encoder's, as van den Oord et al. 2017, Eq. 3.
    pull = pull_together(h, e, beta)
    index = index.flatten()
    used = torch.zeros_like(model.codebook.used)
    used.index_add_(0, index, torch.ones_like(index).float())
    model.codebook.used += used
    entropy = torch.special.entr(used / used.sum()).sum()  # sum of -p log p, 0 for the unused
    return model.decoder(rounded), pull, dict(perplexity=torch.exp(entropy))


@torch.no_grad()
def revive_entries(codebook, h, generator):
    """Move the codebook's unused entries onto random latents of h (B, c, H, W): how many."""
    rank, world = workshop.ranks()
    if world > 1:
        dist.all_reduce(codebook.used)
    dead = (codebook.used == 0).nonzero()[:, 0]
    rows = h.movedim(1, 3).flatten(0, 2)
    new = torch.randint(len(rows), (len(dead),), generator=generator, device=h.device)
    codebook.vectors[dead] = rows[new].to(codebook.vectors)
    if world > 1:
        dist.broadcast(codebook.vectors.data, 0)
    codebook.used.zero_()
    return len(dead)


# %%
def new_autoencoder_state(plan, size, lr, seed):
    """Bundle what training an autoencoder changes: models, optimisers, step, random numbers."""
    torch.manual_seed(seed)  # the initial weights
    model, critic = Autoencoder(**plan), Patches(plan["channels"], size)
    model, critic = workshop.move_to_device(model), workshop.move_to_device(critic)
    adam = lambda part: torch.optim.Adam(part.parameters(), lr, betas=(0.5, 0.9))  # noqa: E731
    generator = torch.Generator(workshop.device()).manual_seed(seed)
    state = dict(model=model, critic=critic, optimizer=adam(model), critic_optimizer=adam(critic))
    return dict(**state, generator=generator, step=0, seed=seed)


def train_autoencoder(
    state, images, steps, batch, pull=None, lpips=None, perceptual=0.0, adversarial=0.0, **read
):
    """Train an autoencoder for `steps` steps in all, yielding (step, {name: number}) after each.

    state: from `new_autoencoder_state`, changed in place; images: uint8 (N, C, H, W) or
    `PictureFiles`; pull: its weight in the loss, by default 1e-4 for KL and 1 for VQ; lpips: from
    `load_lpips`; perceptual, adversarial: weights of the two judges; read: more arguments of
    `workshop.pictures_of_steps`. Source: Rombach et al. 2022, Appendix G.
    """
    model, critic, generator, seed = (state[k] for k in ("model", "critic", "generator", "seed"))
    pull = {"kl": 1e-4, "vq": 1.0}[model.kind] if pull is None else pull
    lr, last, todo = state["optimizer"].defaults["lr"], model.decoder[-1].weight, state["step"] + 1
    todo = range(todo, steps + 1)
    model.train()
    source = workshop.pictures_of_steps(images, batch, seed, todo, **read)
    for step, pictures in zip(todo, source, strict=False):
        x = workshop.to_network_space(pictures)  # (b, C, H, W)
        with workshop.half_precision(x.device):
            rebuilt, pulled, log = reconstruct(model, x, generator)
        loss = F.l1_loss(rebuilt, x)
        log.update(error=F.mse_loss(rebuilt, x).detach())
        if lpips:
            loss = loss + perceptual * lpips(rebuilt, x)
        if adversarial:
            blame = -critic(rebuilt).mean()
            sizes = [
                torch.autograd.grad(v, last, retain_graph=True)[0].norm() for v in (loss, blame)
            ]
            loss = loss + adversarial * (sizes[0] / (sizes[1] + 1e-4)).clamp(max=1e4) * blame
        take_step(state["optimizer"], model, loss + pull * pulled, lr * (1 - (step - 1) / steps))
        if adversarial:
            real, fake = critic(x), critic(rebuilt.detach())
            doubt = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
            take_step(state["critic_optimizer"], critic, doubt, lr)
            log.update(doubt=doubt.detach())
        if model.kind == "vq" and step % 100 == 0 and step <= 0.8 * steps:
            with torch.no_grad(), workshop.half_precision(x.device):
                log.update(revived=revive_entries(model.codebook, model.encoder(x), generator))
        state["step"] = step
        yield step, log


def take_step(optimizer, model, loss, lr):
    """Take one step of an optimiser at this learning rate, by the gradients of all processes."""
    optimizer.zero_grad()
    loss.backward()
    world = workshop.ranks()[1]
    for p in model.parameters() if world > 1 else ():
        dist.all_reduce(p.grad)
        p.grad /= world
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


if __name__ == "__main__" and lesson and workshop.device().type == "cpu":  # a GPU rounds otherwise
    state = new_autoencoder_state({**workshop.SMALL, "kind": "vq"}, 8, 5e-3, seed=0)
    twin = copy.deepcopy(state["model"])
    errors = list(train_plainly(twin, digits, steps=5))
    logs = [log for _, log in train_autoencoder(state, digits, 5, 64)]
    pairs = list(zip(twin.parameters(), state["model"].parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert errors == [log["error"].item() / 4 for log in logs]
    print(f"5 steps of both loops: {len(pairs)} tensors of weights equal, bit for bit")

# %% [markdown]
# While it trains, all that it needs to go on lies in `autoencoder.pt`; when it is done, the
# autoencoder alone. LDM's files are read too: a first stage on its own, or the one inside a whole
# latent diffusion model. Its layout follows from the shapes of its weights.


# %%
TRAINED = ("critic", "optimizer", "critic_optimizer")


def save_autoencoder(state, path, finished):
    """Write an autoencoder, and until it is finished what training needs to go on."""
    content = dict(options=state["model"].options, model=state["model"].state_dict())
    if not finished:
        content.update({key: state[key].state_dict() for key in TRAINED})
        content.update(step=state["step"], generator=state["generator"].get_state())
    with workshop.replacing(path) as aside:
        workshop.write_tensors(content, aside)


@workshop.enough_memory("take pictures of a smaller --size, or a trained --first_stage")
def fit_autoencoder(state, images, steps, batch, folder, save_every=0, **how):
    """Run `train_autoencoder` and leave autoencoder.pt and autoencoder.jsonl in `folder`.

    save_every: as in `workshop.is_save_due`.
    Returns True when finished, False when Ctrl-C stopped it (the step is finished and saved).
    Raises BadInput where the error is no longer finite.
    """

    def summarize(recent):
        row = {key: float(f"{float(value):.5g}") for key, value in recent[-1].items()}
        if not np.isfinite(row["error"]):
            raise BadInput(f"the autoencoder fails at step {state['step']}: give a lower --code_lr")
        return row

    def save(_):
        if workshop.ranks()[0] == 0:
            save_autoencoder(state, folder / "autoencoder.pt", state["step"] == steps)

    loop, log = train_autoencoder(state, images, steps, batch, **how), folder / "autoencoder.jsonl"
    todo = loop, state, steps, log, summarize, save
    return workshop.keep_training(*todo, save_every=save_every, desc="autoencoder")


def resume_autoencoder(state, content):
    """Put what `save_autoencoder` wrote back into a fresh state.

    Raises BadInput where it does not fit, such as an autoencoder of another kind.
    """
    with workshop.fitting_checkpoint("the unfinished autoencoder.pt"):
        options = state["model"].options, content["options"]
        workshop.check_same_settings(*options, "the run's autoencoder")
        for key in ("model", *TRAINED):
            state[key].load_state_dict(content[key])
        for key in ("optimizer", "critic_optimizer"):
            workshop.restore_moments(state[key])
        state["step"] = content["step"]
        workshop.restore_generator(state, content)


# %%
def from_release(state):
    """Build an autoencoder from the state dict of LDM's first stage.

    Raises BadInput for one with attention outside the middle, which LDM has at f = 8 and above.
    """
    tensors = {name.removeprefix("first_stage_model."): v for name, v in state.items()}
    if any(".attn." in name for name in tensors):
        raise BadInput("this first stage has attention at several resolutions: take VQ-f4 or KL-f4")
    width, channels = tensors["encoder.conv_in.weight"].shape[:2]
    widths = []
    while f"encoder.down.{len(widths)}.block.0.conv1.weight" in tensors:
        widths.append(len(tensors[f"encoder.down.{len(widths)}.block.0.conv1.weight"]))
    blocks = sum(name.startswith("encoder.down.0.") and "conv1.w" in name for name in tensors)
    vectors = tensors.get("quantize.embedding.weight")
    plan = dict(kind="kl" if vectors is None else "vq", channels=channels, width=width)
    plan.update(blocks=blocks, mults=[c // width for c in widths])
    plan.update(code=len(tensors["post_quant_conv.weight"]))
    plan.update(entries=None if vectors is None else len(vectors))

    parts = ("encoder.", "quant_conv.", "post_quant_conv.", "decoder.")
    named = [(n, v) for part in parts for n, v in tensors.items() if n.startswith(part)]

    def place(entry):  # the release lists the decoder's levels from the picture inwards
        part, what, k, *_ = (*entry[0].split("."), "", "")
        order = ["conv_in", "mid", "up", "norm_out", "conv_out"]
        rank = order.index(what) if part == "decoder" else 0
        return parts.index(f"{part}."), rank, -int(k) if (part, what) == ("decoder", "up") else 0

    model = Autoencoder(**plan)
    found = unet.match_release(model, sorted(named, key=place))
    if model.kind == "vq":
        found.update({"codebook.vectors": vectors, "codebook.used": model.codebook.used})
    model.load_state_dict(found)
    return model


def load_first_stage(path):
    """Read a trained autoencoder, ours or LDM's, from a file: in eval mode on the device.

    Only tensors are read, never code. Raises BadInput where the file is none, or is unfinished.
    """
    saved = unet.read_tensors(path)
    saved = saved if isinstance(saved, dict) else {}
    try:
        if "state_dict" in saved:
            model = from_release(saved["state_dict"])
        elif "step" in saved:
            raise BadInput(f"{path} is still in training: go on with that run (--resume) first")
        else:
            model = Autoencoder(**saved["options"])
            model.load_state_dict(saved["model"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise BadInput(
            f"{path} holds no autoencoder ({str(error).splitlines()[0][:100]}): give an "
            "autoencoder.pt of this step, or the model.ckpt of LDM's VQ-f4"
        ) from None
    return workshop.move_to_device(model).eval().requires_grad_(False)


def hash_weights(model):
    """Hash an autoencoder's weights: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        if key != "codebook.used":
            digest.update(key.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# %% [markdown]
# ### Recipes
#
# The published row follows latent diffusion's settings for CelebA-HQ (Rombach et al. 2022, Appendix
# E); the paper trains it for 500,000 steps. LDM trained VQ-f4 on another data set, so one loads it
# (`--first_stage model.ckpt`); training one here is possible, and its length is our guess.

# %%
JUDGES = ("perceptual", "adversarial")


def fill_recipe(recipe, given):
    """Put what the user gave into a recipe: what is not 0 or empty, of a judge not below 0."""
    unset = lambda key: given[key] < 0 if key in JUDGES else not given[key]  # noqa: E731
    return recipe | {key: given[key] for key in recipe if key in given and not unset(key)}


def latent_network(network, dataset, arch):
    """Name the entry of NETWORKS for latents: an own one, a small one, or the paper's."""
    small = f"{dataset}_latent" if "latent_network" in workshop.DATASETS[dataset] else ""
    return training.network_name(network or small, dataset, arch, "ldm")


def latent_boundaries(text, name):
    """Decide on the inner boundaries: what the user gave, or those of the named network."""
    if text:
        return training.find_boundaries(text, "", None, "ldm")
    return list(unet.NETWORKS.get(name, {}).get("boundaries") or unet.STEPS)


def describe_network(arch, network, dataset, recipe, text, how):
    """Decide on a latent network: the settings that say which one it is, and `how` it is trained.

    A unified network has no boundaries, but may be dealt the times of the stages between them.
    """
    name = latent_network(network, dataset, arch)
    widths = (0, "") if network else training.recipe_widths(recipe, arch)
    widths = dict(zip(("encoder", "decoders"), training.widths_of(name, *widths), strict=True))
    edges, cuts = latent_boundaries(text, name), None
    if arch == "unified":
        edges, cuts = [], edges if how["times"] == "stages" else None
    return dict(arch=arch, network=name, boundaries=edges, cuts=cuts, **widths, **how)


# %%
if __name__ == "__main__":
    known = workshop.about(dataset)
    training.check_settings(arch, "ldm", stages, 0, times, decay, weight)
    moments = evaluation.times_asked(sampler, sde.LDM, nfe, grid)
    recipe = fill_recipe(known["latent_recipe"], globals())
    shape = known.get("shape", (3, size, size))
    ready = load_first_stage(first_stage) if first_stage else None
    plan = ready.options if ready else known["autoencoder"] | ({"kind": kind} if kind else {})
    with torch.device("meta"):
        blank = Autoencoder(**plan)
        code = blank.encode(torch.empty(1, *shape)).shape[1:]  # of a latent
    asked = dict(dataset=dataset, process="ldm", ema=ema, seed=seed, flip=False)
    asked_for = network, dataset, recipe, boundaries
    chosen = training.choose_recipe(recipe, globals(), "ldm")
    asked.update(describe_network(arch, *asked_for, chosen))
    asked.update({key: recipe[key] for key in ("steps", "batch", "lr", "warmup")})
    asked.update(channels=code[0], size=code[1])
    with torch.device("meta"):
        network_blank = training.network_of(asked)

# %% [markdown]
# ### What would it take?
#
# Everything can be built on the `meta` device, which knows shapes but holds no numbers. Even the
# activations can be counted there: autograd is asked what it keeps (`kept_bytes` of step 03).


# %%
def product_rate():
    """Measure the device's rate of a matrix product, in FLOP/s (bfloat16 on a GPU that can)."""
    where, seconds = workshop.device(), []
    n, products = (8192, 10) if where.type == "cuda" else (2048, 1)  # enough to keep it busy
    a = torch.ones(n, n, device=where)
    with workshop.half_precision(where):
        a = a @ a / n  # warms up, and is ones again, in the type that products have
        for _ in range(5):
            begin = time.perf_counter()
            for _ in range(products):
                b = a @ a
            b[0, 0].item()  # waits for the result
            seconds.append((time.perf_counter() - begin) / products)
    return 2 * n**3 / min(seconds)


def estimate_run(autoencoder, model, settings, shape, devices, times):
    """Print what a run takes: parameters, GFLOPs, memory a device and time.

    autoencoder, model: on `meta`; times: those at which a sampler evaluates the model.
    """
    x = torch.empty(1, *shape, device="meta")
    z, (steps, batch) = autoencoder.encode(x), (settings["steps"], settings["batch"])
    work = lambda row: f"{row['gflops']:.4g} GFLOPs (true: {row['true_gflops']:.4g})"  # noqa: E731
    million = lambda n: f"{n / 1e6:.4g} million parameters"  # noqa: E731
    print(f"autoencoder ({autoencoder.kind}): {million(unet.count_parameters(autoencoder))}")
    halves = dict(encode=partial(autoencoder.encode, x), decode=partial(autoencoder.decoder, z))
    for what, half in halves.items():
        print(f"  to {what} a picture: {work(unet.count_work(half, autoencoder))}")
    gigabytes = 2 * z[0].numel() / 1e4
    print(f"latents {'×'.join(map(str, z.shape[1:]))}: {gigabytes:.3g} GB for 100,000 on disk")

    costs = unet.cost_of(model)
    stages = [costs[k] for k in range(len(model.decoders))]
    parameters = costs["total"]["parameters"]
    print(f"network {settings['network']}: {million(parameters)}")
    for k, row in enumerate(stages):
        print(f"  stage {k}: {million(row['parameters'])}, {work(row)}")
    stage = np.searchsorted(settings["boundaries"], times, side="right")
    calls = np.bincount(stage, minlength=len(stages))
    drawing = sum(n * row["gflops"] for n, row in zip(calls, stages, strict=True)) / len(times)
    print(f"{len(times)} evaluations a latent, by stage: {', '.join(map(str, calls))};", end=" ")
    print(f"{drawing:.4g} GFLOPs each on average")
    x, t = torch.empty(batch // devices, *z.shape[1:], device="meta"), torch.empty(1, device="meta")
    keep = lambda k: unet.kept_bytes(lambda: model(x, t.expand(len(x)), stage=k), model)  # noqa: E731
    fixed = 20 * parameters / 2**30  # weights, gradients, Adam's two, the average
    moving = max(keep(k) for k in range(len(stages))) / 2**30
    print(
        f"memory a device: {fixed:.3g} GiB for weights, gradients, Adam, the average; "
        f"{moving:.3g} GiB for the activations of {len(x)} latents in float32"
    )
    mean = {key: statistics.fmean(row[key] for row in stages) for key in stages[0]}
    true, rate = 3 * mean["true_gflops"] * 1e9 * batch * steps, product_rate()
    print(
        f"{steps:,} steps of {batch}: {steps * mean['gflops'] / 1e6:.4g} PFLOPs as Table 2 counts, "
        f"{true / 1e15:,.2f} in truth"
    )
    print(
        f"a {workshop.device().type} multiplies matrices with {rate / 1e12:.3g} TFLOP/s here: "
        f"{true / rate / devices / 3600:,.1f} hours or more on {devices} of them"
    )


if __name__ == "__main__" and dry_run:
    estimate_run(blank, network_blank, asked, shape, int(os.environ.get("WORLD_SIZE", 1)), moments)

# %% [markdown]
# ### The autoencoder of the run
#
# From here on the run leaves its files in `runs/<name>/`. Under `torchrun` all processes train
# together, and divide the encoding between them.

# %%
if __name__ == "__main__" and not dry_run:
    workshop.join_processes()
    rank, world = workshop.ranks()
    if asked["batch"] % world or recipe["code_batch"] % world:
        raise BadInput(
            f"batches of {asked['batch']} and {recipe['code_batch']} cannot be shared by {world}"
        )
    training.check_batch(asked)
    if ready is None:
        picture = torch.empty(1, *shape, device="meta")
        kept = unet.kept_bytes(lambda: blank.decode(blank.encode(picture)), blank)
        workshop.check_memory(recipe["code_batch"] // world * kept, f"size = {shape[1]}")
    run = Path(out) / (name or f"{dataset}-latent" + f"-{arch}" * (arch != "multistage"))
    if resume and not (run / "autoencoder.pt").exists():
        raise BadInput(f"there is nothing to resume in {run}: leave out --resume")
    started = resume and any((run / f"checkpoint{old}.pt").exists() for old in ("", ".previous"))
    content = workshop.read_checkpoint(run) if started else None
    with workshop.first_process_first():
        pixels = workshop.open_data_set(dataset, root, size, memory, workers)
    if rank == 0:
        evaluation.check_number(samples, pixels)  # which are compared in the end
        workshop.claim_folder(run, resume)
    if world > 1:
        dist.barrier()


# %%
def stop_script(step, what=""):
    """Say that a training was stopped and saved, and end with the status of an interrupt."""
    workshop.print_once(
        f"stopped and saved at step {step}{what}: the same command with --resume goes on"
    )
    sys.exit(130)


def compile_parts(model, wanted):
    """Compile an autoencoder's encoder and decoder where that is wanted."""
    for part in (model.encoder, model.decoder) if wanted else ():
        part.compile()


if __name__ == "__main__" and not dry_run:
    file = run / "autoencoder.pt"
    saved = unet.read_tensors(file) if resume else None
    unfinished = saved is None or "step" in saved
    if ready is None and unfinished:
        judges = {key: recipe[key] for key in JUDGES}
        lpips = load_lpips(workshop.device()) if judges["perceptual"] else None
        state = new_autoencoder_state(plan, shape[1], recipe["code_lr"], seed)
        # the discriminator's weight takes two gradients of one pass, which compiled parts refuse
        compile_parts(state["model"], compile and not judges["adversarial"])
        if resume:
            resume_autoencoder(state, saved)
        how = dict(save_every=save_every, lpips=lpips, workers=workers, bad=[], **judges)
        todo = recipe["code_steps"], recipe["code_batch"]
        if not fit_autoencoder(state, pixels, *todo, run, **how):
            stop_script(state["step"], " of the autoencoder")
        del state
    elif ready is not None and resume:
        if unfinished or hash_weights(ready) != hash_weights(load_first_stage(file)):
            raise BadInput(
                f"{run} has another autoencoder than {first_stage}: leave one of them out"
            )
    elif ready is not None and rank == 0:
        save_autoencoder(dict(model=ready), file, finished=True)
    if world > 1:
        dist.barrier()
    autoencoder = load_first_stage(file)
    compile_parts(autoencoder, compile)
    workshop.print_once(f"{unet.count_parameters(autoencoder):,} parameters")
    if (run / "autoencoder.jsonl").exists():
        for row in workshop.read_log(run, "autoencoder.jsonl")[-1:]:
            workshop.print_once(f"last step: {row}")

# %% [markdown]
# ### Latents on disk
#
# They lie in shards, each written aside and renamed, so that an interrupted encoding goes on. Beside
# them stands whose they are: the autoencoder's hash, the data set and its size. Latents of another
# autoencoder would train without complaint and decode to nonsense, so they are refused.


# %%
def cut_out(images, first, last, workers):
    """Return pictures first to last - 1 of a tensor, or the readable ones of `PictureFiles`.

    Raises BadInput where none of them is readable.
    """
    if torch.is_tensor(images):
        return images[first:last]
    chosen = torch.utils.data.Subset(images, range(first, min(last, len(images))))
    how = dict(num_workers=workers, collate_fn=list, worker_init_fn=workshop.ignore_interrupts)
    loader = torch.utils.data.DataLoader(chosen, batch_size=50, **how)
    readable = [picture for some in loader for picture in some if picture is not None]
    if not readable:
        raise BadInput(
            f"none of {len(chosen):,} pictures is readable, such as {images.files[first]}: mend or "
            "remove them"
        )
    return torch.stack(readable)


def encode_set(model, images, folder, about, shard=2000, workers=0):
    """Encode all pictures into shards under `folder`, as far as they are not there; give the scale.

    about: what to remember of the pictures, {name: value}. The shards are float16 (n, c, h, w).
    Raises BadInput for latents of another autoencoder or of other pictures.
    """
    (rank, world), folder, n = workshop.ranks(), Path(folder), len(images)
    whose = dict(autoencoder=hash_weights(model), pictures=n, **about)
    note = folder / "latents.json"
    try:
        known = json.loads(note.read_text(encoding="utf-8")) if note.exists() else whose
        known.get  # noqa: B018 - some other text is no dictionary
    except (AttributeError, ValueError):
        raise BadInput(f"{note} is damaged: remove {folder}, and it is encoded anew") from None
    for key, value in whose.items():
        if known.get(key) != value:
            raise BadInput(
                f"the latents in {folder} belong to {key} {known.get(key)!r}, and this run has "
                f"{value!r}: give --latents another folder, or remove this one"
            )
    if rank == 0 and "scale" not in known:
        workshop.write_json(known, note)
    picture = images.shape[1:] if torch.is_tensor(images) else (3, images.size, images.size)
    shape = encode_pictures(model, torch.zeros(1, *picture)).shape[1:]
    for j, first in enumerate(tqdm(range(0, n, shard), "encoding", disable=rank > 0, leave=False)):
        path = folder / f"{first:08}.npy"
        if j % world == rank and workshop.open_shard(path, shape, np.float16) is None:
            z = encode_pictures(model, cut_out(images, first, first + shard, workers))
            with workshop.replacing(path) as aside, open(aside, "wb") as file:
                np.save(file, z.half().cpu().numpy())
    if world > 1:
        dist.barrier()
    if "scale" not in known:
        # release: VQ latents as they are (KL's: divided by their standard deviation); here: both
        # divided, because the kernel's noise levels are meant for data of unit variance.
        known["scale"] = 1 / Latents(folder, 1).spread()
        if rank == 0:
            workshop.write_json(known, note)
    return known["scale"]


class Latents(torch.utils.data.ConcatDataset):
    """Read latents from the shards of a folder when they are asked for, times scale: (c, h, w)."""

    def __init__(self, folder, scale):
        super().__init__([np.load(p, mmap_mode="r") for p in sorted(Path(folder).glob("*.npy"))])
        self.scale = scale

    def __getitem__(self, i):
        return self.scale * torch.from_numpy(super().__getitem__(i).astype(np.float32))

    def all(self):
        """Read them all: float32 (N, c, h, w)."""
        parts = [torch.from_numpy(shard.astype(np.float32)) for shard in self.datasets]
        return self.scale * torch.cat(parts)

    def spread(self):
        """Return the standard deviation of all numbers in the shards."""
        n, total, square = 0, 0.0, 0.0
        for z in self.datasets:
            n, total = n + z.size, total + z.sum(dtype=np.float64)
            square += float((z.astype(np.float64) ** 2).sum())
        return float((square / n - (total / n) ** 2) ** 0.5)


# %%
if __name__ == "__main__" and not dry_run:
    folder = Path(latents or run / "latents")
    about = dict(dataset=dataset, size=shape[1])
    scale = encode_set(autoencoder, pixels, folder, about, workers=workers)
    codes = Latents(folder, scale)
    if 4 * len(codes) * codes[0].numel() < memory * 2**30:
        codes = codes.all().to(workshop.device())
    workshop.print_once(f"{len(codes):,} latents of {tuple(codes[0].shape)}, scale {scale:.4f}")

# %% [markdown]
# What is lost? And what lies between two latents? A straight line between them, and under it the
# same line between the pixels, which is a double exposure.

# %%
if __name__ == "__main__" and not dry_run and rank == 0:
    first = cut_out(pixels, 0, 16, workers)
    draw_latents(autoencoder, first, scale, run / "latents.png")
    z, rows = encode_pictures(autoencoder, first).cpu() * scale, []
    share = torch.linspace(0, 1, 12)[:, None, None, None]
    for a, b in ((0, 5 % len(z)), (3 % len(z), 8 % len(z))):
        line = torch.lerp(z[a], z[b], share)
        rows.append(decode_latents(autoencoder, line, scale))
        rows.append(torch.lerp(first[a].cpu() / 255, first[b].cpu() / 255, share))
    titles = ["a line between two latents", "the same between their pixels"] * 2
    workshop.show_images(rows, titles, run / "interpolation.png", columns=12)

# %% [markdown]
# ### Where would the cuts lie?
#
# The paper takes the boundaries that it found on the pixels of CIFAR-10 over to the latents of
# CelebA. Algorithm 1 needs no network, so it can be asked about the latents themselves. One choice is
# open: $\eta$ = 2/256 is meant for pixels in [0, 1], while latents have unit variance. Both readings:

# %%
if __name__ == "__main__" and not dry_run and rank == 0:
    few = range(min(2000, len(codes)))
    some = codes if torch.is_tensor(codes) else torch.stack([codes[i] for i in few])
    some = some.to(workshop.device())  # latents that are read in training lie on disk
    low, high = some.min(), some.max()
    small_set = cut_out(pixels, 0, 50_000 if torch.is_tensor(pixels) else 2000, workers)
    readings = {
        "pixels in [0, 1]": small_set.to(some) / 255,
        "latents of unit variance": some[:50_000],
        "latents stretched to [0, 1]": (some[:50_000] - low) / (high - low),
    }
    for title, data in readings.items():
        curves = clustering.similarity_curves(data, sde.LDM, seed=seed)
        tau, up, down = clustering.running_averages(curves)
        t_1, t_2 = 1000 * tau[up >= 0.9].max(initial=0), 1000 * tau[down >= 0.9].min(initial=1)
        print(f"{title:28s} steps {f'{t_1:.0f}' if t_1 else 'none'}, {t_2:.0f}")
    print(f"{'published':28s} steps 442, 631; pixel cuts at the same SNR: 479, 690")

# %% [markdown]
# The answer depends on the reading more than on the space. Stretched to [0, 1] latents are several
# times smaller against the same noise: no time is early enough to agree with the picture end, and
# nearly all agree with the noise end. So we, too, take the paper's cuts; `--boundaries` takes others.
#
# ### Training
#
# On `digits` and `mnist` a unified network is trained as well, for as many steps as cost the same
# FLOPs, and both are measured on the way: decoded samples against real pictures, as in step 05.


# %%
def choose_real_sets(images, n, workers=0):
    """Choose two random sets of n pictures, uint8, out of a tensor or of `PictureFiles`."""
    if torch.is_tensor(images):
        return [half.cpu() for half in evaluation.real_halves(images, n)]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    order = order[: 2 * n + n // 50 + 10]  # some more, because up to a hundredth may be unreadable
    chosen = workshop.PictureFiles([images.files[i] for i in order.tolist()], images.size)
    return evaluation.real_halves(cut_out(chosen, 0, len(chosen), workers), n)


def choose_measure(images):
    """Choose what samples are measured by: (two real sets, features' name for code, readers)."""
    half, other_half = choose_real_sets(images, samples, workers)
    few, labels = half, None
    if known.get("judge") == "digits":
        few, labels = workshop.load_images(dataset, root)
    return half, other_half, *evaluation.pick_extractor(dataset, few, labels)


def train_latents(settings, codes, run, content=None, compile=False, **options):
    """Train a latent model as its settings say, into the folder `run`: (its state, finished).

    content: of the checkpoint to go on from; options: those of step 04's `fit`.
    """
    if content:
        training.check_resumed(settings, content["settings"], run)
    state = training.prepare_state(settings, content, compile)
    if workshop.ranks()[0] == 0:
        workshop.write_json(settings, run / "settings.json")
    finished = training.fit(state, codes, settings, run, **options)
    workshop.unlock_folder(run)
    return state, finished


# %%
if __name__ == "__main__" and not dry_run:
    asked.update(scale=scale, autoencoder=hash_weights(autoencoder))
    back = lambda z: decode_latents(autoencoder, z, scale)  # noqa: E731
    options = dict(save_every=save_every, sample_every=sample_every, workers=workers, decode=back)
    compare = compare and known.get("judge") == "digits" and arch != "unified"
    compare = compare and network in ("", *unet.SMALL_NETWORKS)  # which have unified twins
    how = dict(sampler=sampler, nfe=nfe, grid=grid, seed=seed + 1)
    how["batch"] = min(300, pictures_at_once(shape[1]), batch or 300)
    if compare:
        half, other_half, extractor, named = choose_measure(pixels)

        def judge(model):
            drawn = back(evaluation.sample(model, "ldm", samples, **how))
            return dict(frechet=evaluation.evaluate(drawn, half, extractor)["frechet"])

        options["measure"] = judge
    state, finished = train_latents(asked, codes, run, content, compile, **options)
    if not finished:
        stop_script(state["step"])

# %%
if __name__ == "__main__" and not dry_run and compare:
    unified = asked | describe_network("unified", *asked_for, chosen)
    other = run.with_name(f"{run.name}-unified")
    costs = map(evaluation.stage_gflops, (state["model"], training.network_of(unified)))
    own_cost, unified_cost = map(statistics.fmean, costs)
    unified["steps"] = round(own_cost / unified_cost * asked["steps"])
    old = resume and (other / "checkpoint.pt").exists()
    if rank == 0:
        workshop.claim_folder(other, old)
    old = workshop.read_checkpoint(other) if old else None
    options["sample_every"] = -(-unified["steps"] // 5)
    unified_state, finished = train_latents(unified, codes, other, old, compile, **options)
    if not finished:
        stop_script(unified_state["step"], " of unified")

# %% [markdown]
# ### Drawing and measuring
#
# `--sampler ddim` is the other solver that the paper uses. The set lies on disk in shards.

# %%
if __name__ == "__main__" and not dry_run:
    label = f"step{state['step']}-{sampler}-{nfe}-{grid or 'own'}-seed{seed + 1}"
    draw = partial(evaluation.draw_set, process="ldm", n=samples, decode=back, progress=True, **how)
    if compile:
        state["ema"].compile()
    drawn = draw(state["ema"], folder=run / "sets" / label)
    drawn_unified = draw(unified_state["ema"], folder=other / "sets" / label) if compare else None
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        sys.exit()  # the first process measures
    title = f"{run.name} after {state['step']:,} steps: {sampler}, {nfe} NFE, seed {seed + 1}"
    workshop.show_images([drawn[:96] / 255], [title], run / "samples.png")

# %% [markdown]
# Reconstructions of real pictures are the floor. All columns are compared with the same half of the
# real pictures; the last one is the other half, which is what perfect samples would get.

# %%
if __name__ == "__main__" and not dry_run:
    if not compare:
        half, other_half, extractor, named = choose_measure(pixels)
    rebuilt = back(encode_pictures(autoencoder, other_half) * scale)
    error = F.mse_loss(rebuilt, other_half / 255)
    print(f"squared error of a reconstruction: {error:.5f} a pixel", end="; ")
    print(f"pixels vary by {(half / 255).var():.4f}")
    columns = {f"{arch} / real": drawn, "unified / real": drawn_unified}
    columns.update({"rebuilt / real": rebuilt, "real / real": other_half})
    columns = {title: x for title, x in columns.items() if x is not None}
    table = {key: evaluation.evaluate(x, half, extractor, weights) for key, x in columns.items()}
    title = f"{samples} pictures a set, {named};\n{sampler}, {nfe} evaluations, seed {seed + 1}"
    evaluation.print_metrics(table, title, evaluation.distance_name(extractor, samples))
    record = dict(run=str(run), step=state["step"], sampler=sampler, nfe=nfe, grid=grid or "own")
    record.update(seed=seed + 1, features=named, error=float(error), **table)
    workshop.write_json(record, run / "metrics.json")

# %% [markdown]
# ### One decoder or three?
#
# The two networks had the same recipe, the same training FLOPs and the same times; all that differs
# are the decoders. From the same noise they draw:

# %%
if __name__ == "__main__" and not dry_run and compare:
    n = min(48, len(drawn) // 8 * 8)  # in rows of eight
    left, right = (x[:n].unflatten(0, (-1, 8)) / 255 for x in (drawn, drawn_unified))
    pairs = torch.cat([left, torch.ones_like(left[:, :1]), right], 1).flatten(0, 1)
    title = f"left: {arch}, right: unified, the same noise at the same place"
    workshop.show_images([pairs], [title], run / "pairs.png", columns=17)

# %% [markdown]
# And in numbers, on the way to the end of the learning rate. The lines below are the floors of the
# table: what the autoencoder makes of real pictures, and real pictures themselves.

# %%
if __name__ == "__main__" and not dry_run and compare:
    ends = {}
    for label, folder in ((arch, run), ("unified", other)):
        rows = [row for row in workshop.read_log(folder) if "frechet" in row]
        spent, distances = ([row[key] for row in rows] for key in ("petaflops", "frechet"))
        spent = [1e6 * value for value in spent]
        plt.plot(spent, distances, marker="o", label=label)
        if rows:  # else the log was lost
            ends[label] = f"{label} {distances[-1]:.2f} after {spent[-1]:.3g} GFLOPs"
    for style, key in (("--", "rebuilt"), (":", "real")):
        floor = table[f"{key} / real"]["frechet"]
        plt.axhline(floor, color="grey", linestyle=style, label=f"{key} pictures")
    plt.gca().set(xlabel="training GFLOPs (as Table 2 counts)", ylabel="Fréchet distance")
    plt.gca().set(xlim=0, ylim=0)
    plt.legend()
    workshop.show_figure(run / "curves.png")
    print("; ".join(ends.values()))

# %% [markdown]
# One seed says little, so here is what more of them say (RESULTS.md). In pixels, with 8 channels and
# one recipe for both, three decoders beat one on CIFAR-10 at 16×16, by 0.46 ± 0.21 of 3.82 (three
# seeds, 95% interval), are level with it on `digits`, −0.00 ± 0.08 of 1.45 (five seeds), if the one
# decoder has the times of the stages too, and a little behind on MNIST. In latents one decoder is
# ahead in all runs that were made: 0.89 ± 0.11 against 1.25 ± 0.11 with the release's recipe (three
# seeds, mean and deviation), and in this one. The paper's claim is about far longer runs.
