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
# file is only the command below the line. `python 06_ldm.py --dataset celeba --size 256
# --first_stage FILE`, where FILE is the authors' autoencoder, is the paper's configuration.

# %% tags=["imports"]
import importlib
import os
import sys

if "__file__" not in globals():  # a notebook, which may have been opened where it lies
    os.chdir(".." if os.path.exists("../00_workshop.py") else ".")
    assert os.path.exists("00_workshop.py"), "papermill needs --cwd PROJECT"
workshop = importlib.import_module("00_workshop")  # before torch

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sde = importlib.import_module("01_sde_and_denoiser")
unet = importlib.import_module("03_multistage_unet")
training = importlib.import_module("04_train")
evaluation = importlib.import_module("05_sample_eval")
lesson = workshop.is_lesson()

# %% [markdown]
# ## The crudest squeeze
#
# A digit has 64 pixels. Replace each block of four by its mean, and 16 numbers are left; repeat
# each mean four times, and you have a picture again. **Predict first:** how much of the variation
# is lost? <details><summary>Answer</summary>A third, and the digits of the third row can hardly be
# read. A mean says how much ink there is in its block, but not where.</details>

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
# Which numbers would say more? Let two networks find out: an *encoder* that maps a picture to its
# latent $a=\mathrm{Enc}(x)$, a few channels at a lower resolution, and a *decoder* with
# $\mathrm{Dec}(a)\approx x$. They are trained together, once, before the diffusion model, and only
# on rebuilding pictures.
#
# The authors use the released **VQ-f4** of latent diffusion: pictures of 3×256×256, latents of
# 3×64×64, a sixteenth of the numbers. Ours turns 1×8×8 into 2×4×4, a half. A convolution costs in
# proportion to its positions, so every evaluation of the diffusion network becomes sixteen times
# (here: four times) cheaper, even without stages. What the paper saves comes on top of that.
#
# | symbol | in the code | meaning |
# |---|---|---|
# | $a=\mathrm{Enc}(x)$ | `model.encode(x)` | the latent as the encoder gives it, (B, c, h, w) |
# | $b$ | `codebook(a)[1]` | the same, each position rounded to an entry of the codebook |
# | $\mathrm{Dec}(a)$ | `model.decode(a)` | the decoder: it rounds first |
# | $a'$ | `scale * a` | the latent of unit variance that the diffusion model sees |
#
# ## A codebook
#
# What keeps the latents tidy? With no other rule to obey, an encoder may hide detail in tiny
# differences between large numbers, which a diffusion model could never draw well enough. Two kinds
# of autoencoders are in use, and they prevent that differently; the second, KL, comes below the
# line. The first, VQ (vector quantisation; van den Oord et al. 2017), lets the decoder see only
# vectors from a list, the *codebook*. Each position $a$ of the encoder's output is rounded to the
# nearest entry:
#
# $$b = b_j,\qquad j=\arg\min_i\|a-b_i\|_2 .$$
#
# Rounding has no useful gradient: a small change of $a$ changes nothing. So the gradient is passed
# *straight through*, as if nothing had been rounded. One line does both: forwards
# $a+\mathrm{sg}[b-a]$ is $b$, backwards it is $a$, where $\mathrm{sg}$ stops the gradient.


# %%
class Codebook(nn.Module):
    """Round latents (B, c, H, W) to the nearest of `entries` learned vectors of c numbers."""

    def __init__(self, entries, c):
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(entries, c).uniform_(-1, 1))

    def nearest(self, a):
        """Return the index of the nearest entry at each position: (B, H, W) int64."""
        rows = a.movedim(1, 3).flatten(0, 2).float()  # in parts: all distances may not fit
        index = [torch.cdist(part, self.vectors.float()).argmin(1) for part in rows.split(4096)]
        return torch.cat(index).reshape(len(a), *a.shape[2:])

    def forward(self, a):
        """Return the rounded latents (with the gradient of a), the entries and the indices."""
        index = self.nearest(a)
        b = self.vectors[index].movedim(3, 1)  # (B, c, H, W)
        return a + (b - a).detach(), b, index


# %%
if __name__ == "__main__" and lesson:
    book = Codebook(entries=3, c=2)
    book.vectors.data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    a = torch.tensor([0.75, 0.5]).reshape(1, 2, 1, 1).requires_grad_()
    rounded, b, index = book(a)
    (3 * rounded[0, 0] + 5 * rounded[0, 1]).sum().backward()
    squares = [sum((a[0, i, 0, 0] - v[i]) ** 2 for i in (0, 1)).item() for v in book.vectors]
    print("squared distances of (0.75, 0.5) from the three entries:", squares)
    print(f"it is rounded to entry {index.item()}:", rounded.flatten().tolist())
    print("the gradient behind is [3, 5]; before the rounding it is", a.grad.flatten().tolist())
    assert index.item() == squares.index(min(squares))

# %% [markdown]
# The nearest entry is found, and the gradient arrives as if nothing had happened: the encoder is
# told how the *rounded* latent should change, and changes its own in that direction.
#
# But the gradient reaches no entry on its way. How do entries learn? They and the encoder are
# pulled towards each other, the encoder more gently, with $\beta=\tfrac14$:
#
# $$\|b-\mathrm{sg}[a]\|^2+\beta\,\|a-\mathrm{sg}[b]\|^2 .$$


# %%
def pull_together(a, b, beta=0.25):
    """Compare encoded latents with their entries: the codebook's pull and the encoder's."""
    return F.mse_loss(b, a.detach()) + beta * F.mse_loss(a, b.detach())


if __name__ == "__main__" and lesson:
    book.zero_grad()
    pull_together(a.detach(), book(a.detach())[1]).backward()
    print("where the pull moves the three entries:", (0 - book.vectors.grad).tolist())

# %% [markdown]
# Only the entry that was nearest moves, towards the latent. Why the second term? Without it the
# encoder could run away from the entries, which follow at their own pace; the term commits it to
# the entry it has. An entry that is never the nearest never learns; so ours are spread out at the
# start.
#
# ## A small autoencoder
#
# Three convolutions each way, of which the middle one halves the resolution, or doubles it. The
# last one of the encoder has two channels: those of the latent.
#
# Where is the rounding? The diffusion model will work on the latents *before* they are rounded. So
# rounding belongs to the decoder, where it also mends small slips in the latents that were drawn.


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

    def encode(self, x):
        return self.encoder(x)

    def decode(self, a):
        return self.decoder(self.codebook(a)[0])

    def rebuild(self, x, generator):
        """Rebuild pictures as in training: them, and what is added to their loss."""
        a = self.encoder(x)
        rounded, b, _ = self.codebook(a)
        return self.decoder(rounded), pull_together(a, b)


# %%
if __name__ == "__main__" and lesson:
    torch.manual_seed(0)  # the initial weights
    small = workshop.move_to_device(SmallAutoencoder())
    x = workshop.to_network_space(digits[:5]).to(workshop.device())
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
#
# As in step 04, all that training changes is one dictionary, and the seed and the step decide which
# pictures are seen (`picked_in_step` of step 00). So the command below can stop and go on.


# %%
def new_autoencoder_state(model, lr, seed):
    """Bundle what training an autoencoder changes: model, optimiser, random numbers, step."""
    optimizer = torch.optim.Adam(model.parameters(), lr, betas=(0.5, 0.9))
    generator = torch.Generator(workshop.device()).manual_seed(seed)
    return dict(model=model, optimizer=optimizer, generator=generator, seed=seed, step=0)


# %%
def train_autoencoder(state, images, steps, batch=64):
    """Train on uint8 images (N, C, H, W) until `steps` in all: yields (step, {name: number})."""
    model, optimizer, generator = (state[key] for key in ("model", "optimizer", "generator"))
    for step in range(state["step"] + 1, steps + 1):
        i = workshop.picked_in_step(len(images), batch, state["seed"], step)
        x = workshop.to_network_space(images[i.to(images.device)].to(generator.device))
        with workshop.half_precision(x.device):
            rebuilt, pull = model.rebuild(x, generator)
        loss = F.l1_loss(rebuilt, x) + pull
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * (1 - (step - 1) / steps)
        optimizer.step()
        state["step"] = step
        error = F.mse_loss(rebuilt.detach(), x) / 4  # of pixels in [0, 1], not in [-1, 1]
        yield step, dict(error=error, pull=pull.detach())


if __name__ == "__main__" and lesson:
    loop = train_autoencoder(new_autoencoder_state(small, 5e-3, seed=0), digits, steps=200)
    errors = [log["error"].item() for _, log in loop]
    marks = ", ".join(f"{errors[n - 1]:.4f}" for n in (1, 25, 50, 100, 200))
    print("squared error after 1, 25, 50, 100 and 200 steps:", marks)

# %% [markdown]
# ## Latents
#
# Within 25 steps it beats the means. From now on its two halves are used separately: all pictures
# are encoded once, and only what is drawn has to be decoded. Large sets are handled in parts.


# %%
def pictures_at_once(side):
    """Tell how many pictures of this side to encode or decode at a time."""
    return max(1, min(500, 2**20 // side**2))


@torch.no_grad()
def encode_pictures(model, pictures):
    """Encode uint8 pictures (N, C, H, W), on any device: latents (N, c, h, w) on the model's."""
    where = next(model.parameters()).device
    parts = pictures.split(pictures_at_once(pictures.shape[-1]))
    return torch.cat([model.encode(workshop.to_network_space(part.to(where))) for part in parts])


@torch.no_grad()
def decode_latents(model, scaled, scale):
    """Decode latents that were multiplied by scale: pictures (N, C, H, W) in [0, 1], on the CPU."""
    where = next(model.parameters()).device
    parts = scaled.split(pictures_at_once(model.factor * scaled.shape[-1]))
    found = [model.decode(part.to(where) / scale).cpu() for part in parts]
    return workshop.to_pictures(torch.cat(found))


# %% tags=["draws"]
def draw_latents(model, pictures, scale, path):
    """Draw pictures, what an autoencoder makes of them, and the channels of their latents."""
    scaled = encode_pictures(model, pictures) * scale
    low, high = scaled.amin((0, 2, 3), keepdim=True), scaled.amax((0, 2, 3), keepdim=True)
    rows = [pictures.cpu() / 255, decode_latents(model, scaled, scale)]
    rows += ((scaled - low) / (high - low)).split(1, dim=1)
    shapes = ["×".join(map(str, v.shape[1:])) for v in (pictures, scaled[:, :1])]
    titles = [f"pictures, {shapes[0]}", "what comes back"]
    titles += [f"channel {i} of the latents, {shapes[1]}" for i in range(scaled.shape[1])]
    workshop.show_images(rows, titles, path)


# %%
if __name__ == "__main__" and lesson:
    draw_latents(small, digits[:16], 1.0, "figures/06_rebuilt.png")
    a = encode_pictures(small, digits)
    error = F.mse_loss(decode_latents(small, a, 1.0), x0)
    print(f"squared error {error:.4f} a pixel; of the means {F.mse_loss(blurred, x0):.4f}")

# %% [markdown]
# The strokes are back, and most of the greys, with a fifth of the error of the means. It took twice
# as many numbers, and they were chosen for the purpose. The latents are still small pictures: what
# stands somewhere in the picture stands at the same place in its latent. But the two channels are
# not colours, and what is bright in them is not bright in the picture.
#
# And the codebook? Here the two numbers of a position are a point in a plane. So the positions of
# all latents can be drawn as points (every fifth one is), with the 64 entries on top.

# %%
if __name__ == "__main__" and lesson:
    points, entries = a.movedim(1, 3).reshape(-1, 2).cpu(), small.codebook.vectors.detach().cpu()
    plt.figure(figsize=(5, 5))
    plt.scatter(*points[::5].T, s=2, alpha=0.3, label="positions of latents")
    plt.scatter(*entries.T, marker="x", color="black", label="entries of the codebook")
    plt.gca().set(xlabel="channel 0", ylabel="channel 1", aspect="equal")
    plt.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    workshop.show_figure("figures/06_codebook.png")
    print(f"entries in use: {len(small.codebook.nearest(a).unique())} of {len(entries)}")

# %% [markdown]
# The entries have spread over most of the part of the plane where latents are, and all are in use.
# Where the step to the next entry is large, as at the rim, the rounding costs accuracy.
#
# ## The scale
#
# The kernels of step 01 are made for data with a spread (standard deviation) near 1: noise of level
# 1 should be as strong as the data, and at the end of the timeline nothing of them should be left.
# Latents have whatever spread their autoencoder found convenient, so they are divided by it. That
# number is part of the model: before decoding, latents are multiplied by it again:
#
# $$a' = a\,/\,\mathrm{std}(a),\qquad \hat x = \mathrm{Dec}\big(a'\cdot\mathrm{std}(a)\big).$$
#
# The spread of ours is near 1; that of the KL autoencoder which is trained below on the same digits
# is more than twice as large. Without the scale each would see another schedule: the same step, a
# different share of noise.
#
# ## The multistage model, unchanged
#
# Take a network of step 03 for pictures of two channels and a side of four (`build_network`). The
# loop of step 04 (`train`, below the line there) trains it with the kernel of latent diffusion,
# whose time is one of 1,000 steps. The cuts are those that the authors' code uses for latents:
# stage 0, next to the image, has the steps up to 442, stage 1 those up to 631, and stage 2 the
# rest. Every batch has all three stages here, which serves a short training best. Not a line of
# steps 03 and 04 knows that these are latents.

# %%
if __name__ == "__main__" and lesson:
    scale = 1 / a.std()
    torch.manual_seed(0)
    model = workshop.move_to_device(unet.build_network("digits_latent", encoder=16))
    state, curves = training.new_state(model, 6e-3, seed=0), {0: [], 1: [], 2: []}
    how = dict(process="ldm", batch=64, stages="mixed", decay=400)
    for step, losses in training.train(state, scale * a, 400, **how):
        for k, loss in losses.items():
            curves[k].append((step, loss.item()))
    training.draw_losses(curves)
    workshop.show_figure("figures/06_losses.png")
    print(f"spread of the latents {a.std():.3f}; cuts {model.cuts}, amid two steps each")

# %% [markdown]
# The losses look as they did for pixels: near the noise (stage 2) the task is easy, near the image
# (stage 0) it is hard, and their losses lie a factor of a hundred apart.
#
# ## Drawing and decoding
#
# The start is noise of the latents' shape, (2, 4, 4). Step 05 draws latents from it (`sample`) with
# DPM-Solver++(2M), 20 evaluations in equal steps of time, as the authors' code does. They are
# multiplied by the spread, rounded, and decoded, all 48 in a moment. What the solver does 20 times
# happens in a space with half as many numbers, or with VQ-f4 a sixteenth.

# %%
if __name__ == "__main__" and lesson:
    drawn = evaluation.sample(state["ema"], "ldm", 48, "dpm-solver++-2m", 20, grid="time")
    pictures = decode_latents(small, drawn, scale)  # (48, 1, 8, 8)
    workshop.show_images([pictures], ["drawn as latents, and decoded"], "figures/06_drawn.png")

# %% [markdown]
# Many of them are digits, after seconds of training. Those that fail still look like handwriting,
# with broken or doubled lines: the decoder knows no other marks.
#
# **You have** all parts of latent diffusion: a codebook, an autoencoder, a scale, and the model of
# the steps before, which never saw a pixel. No sample can be better than what the autoencoder
# rebuilds; how good these are is measured below, after longer training.
#
# ### Exercises
#
# 1. Run with `--kind vq`. What does the rounding cost, next to the KL autoencoder?
#    <details><summary>Solution</summary>The column of the reconstructions has the price.</details>
# 2. Leave out the scale: train on `a` above. What do you expect of the losses of the three stages?
#    <details><summary>Solution</summary>Where the spread is below 1, the same step of the schedule
#    covers more, so that the noise is easier to tell and the losses fall; the model spends more of
#    its steps on nearly pure noise.</details>
# 3. Why are the means of a KL autoencoder (below) kept as latents, and not samples?
#    <details><summary>Solution</summary>Samples add noise that the decoder was trained to ignore;
#    the means are the cleaner data set. With a faint pull like ours the difference is
#    small.</details>
# 4. The paper takes the cuts over from pixels. Which does Algorithm 1 find for our latents, and how
#    good are they (`--boundaries`, as fractions of 1)? <details><summary>Solution</summary>
#    `importlib.import_module("02_clustering").algorithm_1(scale * a, kernel=sde.LDM)`: different
#    ones. Whichever wins, one seed is not enough to tell; give `--seed` three values.</details>
#
# ## Below this line: faster, safer, as published
#
# The command: the published layout, latents on disk, several GPUs, resuming, and a unified network
# beside the multistage one. Where a setting is 0 or empty the recipe of the data set decides
# (`workshop.DATASETS`, step 00).

# %% tags=["parameters"]
dataset = "digits"  # digits, mnist, cifar10, celeba or folder
root = "data"  # where the data set lies or is downloaded to
size = 0  # side of celeba's and a folder's pictures; 0: 32, with --first_stage 256 [0, 2048]
first_stage = ""  # file of a trained autoencoder, as by tools/release.py; empty: train one
kind = ""  # autoencoder to train: kl or vq; empty: the data set's recipe
code_steps = 0  # training steps of the autoencoder; 0: the recipe of the data set [0, 1000000000]
arch = "multistage"  # multistage, unified or separate
stages = ""  # uniform: one stage a batch; mixed: all stages in every batch; empty: the recipe
weight = ""  # min-snr: less weight near the image; none: that of Eq. 4; empty: the recipe
times = ""  # stages: all count the same; uniform: all times do; empty: the recipe
boundaries = ""  # inner boundaries such as 0.1,0.44; empty: LDM's steps 442 and 631
steps = 0  # training steps of the latent model; 0: the recipe [0, 1000000000]
batch = 0  # latents a step, over all devices; 0: the recipe [0, 1000000]
lr = 0.0  # Adam's learning rate of the latent model; 0: the recipe [0, 10]
decay = ""  # linear: the learning rate falls to zero over the run; none; empty: the recipe
sampler = "dpm-solver++-2m"  # any of step 05's SAMPLERS, such as ddim
grid = "time"  # where the solver stops: time, log-snr or quadratic; empty: the solver's own choice
nfe = 20  # evaluations of the network for one latent [1, 10000]
samples = 898  # pictures to draw and measure; at most half the data set [10, 10000000]
compare = True  # digits, mnist: also train a unified network with equal FLOPs
seed = 0  # seed of every random number [0, 4294967295]
name = ""  # name of the run; empty: dataset-latent
out = "runs"  # the folder that holds the runs
memory = 4.0  # GiB of pictures or latents held on the device; more are read later [0, 1000000]
save_every = 0  # steps between checkpoints; 0: every ten minutes [0, 1000000000]
resume = False  # go on with that run: train what is missing, then draw

# %% tags=["imports"]
workshop.settings(globals(), "06_ldm")

import statistics
from functools import partial
from pathlib import Path

BadInput = workshop.BadInput

# %% [markdown]
# ### The published layout
#
# Residual blocks and attention are those of step 03, but are not told the time. Only the halving
# differs: LDM's autoencoders pad only on the right and below. Two kinds share the layout: VQ, and
# **KL** (a variational autoencoder), whose encoder gives a Gaussian, $a=\mu+\sqrt v\,\epsilon$,
# with a faint pull of $\mathcal N(\mu,v)$ towards $\mathcal N(0,I)$.


# %%
NORM = partial(unet.group_norm, 32, 4, 1e-6)
BLOCK, ATTEND = partial(unet.ResBlock, e=0, norm=NORM), partial(unet.Attention, norm=NORM)


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
            halve = [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(c, c, 3, stride=2)]
            down += halve if level < len(mults) - 1 else []
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

    def encode(self, x):
        """Return the latent that the diffusion model works on: KL's mean, or VQ's before rounding.

        Raises BadInput for pictures that it cannot take.
        """
        if x.shape[1] != self.channels or x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise BadInput(
                f"the autoencoder takes {self.channels} channels and sides that {self.factor} "
                f"divides, not {tuple(x.shape[1:])}: give another --first_stage or --size"
            )
        with workshop.half_precision(x.device):
            a = self.encoder(x)
        return a.chunk(2, dim=1)[0] if self.kind == "kl" else a

    def decode(self, a):
        """Map latents back to pictures; VQ rounds them first."""
        with workshop.half_precision(a.device):
            return self.decoder(self.codebook(a)[0] if self.kind == "vq" else a)

    def rebuild(self, x, generator):
        """Rebuild pictures as in training: return them, and what is added to their loss.

        For VQ that is the pull of the lesson, for KL the divergence (nats an entry) times 1e-4.
        """
        a = self.encoder(x)
        if self.kind == "vq":
            # release: beta on the entries' pull instead of the encoder's, a slip that it keeps for
            # the sake of its checkpoints; here: as van den Oord et al. 2017, Eq. 3.
            rounded, b, _ = self.codebook(a)
            return self.decoder(rounded), pull_together(a, b)
        mean, log_var = a.chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator, device=x.device)
        kl = (mean**2 + log_var.exp() - 1 - log_var).mean() / 2
        return self.decoder(mean + noise * torch.exp(log_var / 2)), 1e-4 * kl


# %% tags=["nbval-check-output"]
if __name__ == "__main__":
    with torch.device("meta"):  # shapes without numbers
        vq_f4 = Autoencoder(**workshop.VQ_F4)
        made = "×".join(map(str, vq_f4.encode(torch.empty(1, 3, 256, 256)).shape[1:]))
    print(f"VQ-f4: {unet.count_parameters(vq_f4):,} parameters; 3×256×256 becomes {made}")

# %% [markdown]
# ### Its training and its latents
#
# For large pictures latent diffusion adds two judges, LPIPS and a patch discriminator, against blur.
# The paper does not train such an autoencoder but loads VQ-f4, and so does this step:
# `tools/release.py` turns its file into one for `--first_stage`. Under `torchrun` every process
# trains the same one.


# %%
def fit_autoencoder(state, images, steps, batch, folder, save_every=0):
    """Run `train_autoencoder` and leave autoencoder.pt and autoencoder.jsonl in `folder`."""

    def save(_):
        about = dict(options=state["model"].options, of=steps)
        if workshop.ranks()[0] == 0:
            workshop.write_checkpoint({**workshop.pack(state), **about}, folder, "autoencoder.pt")

    summarize = lambda recent: {key: float(value) for key, value in recent[-1].items()}  # noqa: E731
    loop, log = train_autoencoder(state, images, steps, batch), folder / "autoencoder.jsonl"
    how = dict(save_every=save_every, desc="autoencoder")
    workshop.keep_training(loop, state, steps, log, summarize, save, **how)


def load_first_stage(path):
    """Read a trained autoencoder from a file: in eval mode on the device.

    Raises BadInput if the file holds none, or if its training is unfinished.
    """
    content = workshop.read_checkpoint(Path(path).parent, Path(path).name)
    with workshop.reading(path):
        if content["step"] < content["of"]:
            raise BadInput(f"{path} is still in training: go on with that run (--resume) first")
        model = Autoencoder(**content["options"])
        model.load_state_dict(content["model"])
    return workshop.move_to_device(model).eval().requires_grad_(False)


def encode_set(model, images, path):
    """Encode all pictures into one file, and map it: float16 (N, c, h, w), and their scale.

    The latents have unit variance; scale is what they were multiplied by. The file says which
    pictures and which autoencoder it is from: latents of others would decode to nonsense.
    """
    whose = [workshop.fingerprint(images), workshop.fingerprint(*model.state_dict().values())]
    with workshop.reading(path):
        kept = torch.load(path, mmap=True, weights_only=True) if path.exists() else {}
    if kept.get("whose") != whose:
        if kept:
            print(f"{path} is of other pictures or another autoencoder: encoding anew")
        shape = encode_pictures(model, images[:1]).shape[1:]
        found = torch.empty(len(images), *shape, dtype=torch.half)
        for first in tqdm(range(0, len(images), 2000), "encoding", leave=False):
            part = images[first : first + 2000]
            found[first : first + len(part)] = encode_pictures(model, part)
        # release: VQ latents as they are (KL's: divided by their standard deviation); here: both
        # divided, because the kernel's noise levels are meant for data of unit variance.
        scale = 1 / float(found[:: -(-len(found) // 50_000)].float().std())
        content = dict(whose=whose, scale=scale, latents=found.mul_(scale))
        workshop.write_checkpoint(content, path.parent, path.name)
        kept = torch.load(path, mmap=True, weights_only=True)
    return kept["latents"], kept["scale"]


# %% [markdown]
# ### A run
#
# What does not fit is refused before the autoencoder is trained: a trial network is built first.


# %%
def plan_latents(arch):
    """Decide on a latent network and its training: the settings of a run."""
    flags = {key: globals()[key] for key, *_ in workshop.read_parameters("06_ldm")}
    flags.update(arch=arch, process="ldm", boundaries=boundaries or str(unet.STEPS))
    small = "laptop_latent" if colour else f"{dataset}_latent"
    flags.update(network=training.PAPER_NETWORKS["ldm"][arch] if published else small)
    flags.update(encoder=recipe.get("encoder", 0))
    settings = training.plan_run(flags, {**recipe, "flip": False}, blank)
    owner = workshop.fingerprint(*ready.state_dict().values()) if ready else None
    return settings | dict(autoencoder=owner, pictures=workshop.fingerprint(pixels))


if __name__ == "__main__":
    size = size or (256 if first_stage else 32)
    known = workshop.about(dataset, size=size)
    colour = known.get("judge") != "digits"
    published = colour and first_stage  # the paper's latent model, on its autoencoder
    training.check_settings(arch, "ldm", stages, 0, times, decay, weight)
    trial = evaluation.mixture_noise(sde.LDM), sde.LDM, torch.ones(1, 1, 1, 1), nfe
    list(evaluation.solver_of(sampler, grid)(*trial, torch.Generator()))  # does it work so?
    recipe = workshop.PAPER_LATENT if published else known["latent_recipe"]
    if first_stage and (kind or code_steps):
        raise BadInput(f"{first_stage} is trained: leave out --kind and --code_steps")
    workshop.join_processes()
    rank, world = workshop.ranks()
    run = workshop.run_folder(out, name or f"{dataset}-latent")
    file = Path(first_stage or run / "autoencoder.pt")
    plan = known["autoencoder"] | ({"kind": kind} if kind else {})
    ready = load_first_stage(file) if first_stage else None
    plan = ready.options if ready else plan
    with torch.device("meta"):
        pictures = torch.empty(1, *known.get("shape", (3, size, size)))
        blank = Autoencoder(**plan).encode(pictures)  # a latent's shape
    with workshop.first_process_first():
        pixels = workshop.open_data_set(dataset, root, size, memory)
        half, other_half = (part.cpu() for part in evaluation.real_halves(pixels, samples))
        extractor, named = evaluation.pick_extractor(dataset)
    settings = plan_latents(arch)
    training.prepare_state(settings)
    if resume and (run / "checkpoint.pt").exists():
        old = workshop.read_checkpoint(run)["settings"]
        workshop.check_same_settings(settings, old, run)
    saved = workshop.read_checkpoint(run, file.name) if resume and not first_stage else None
    workshop.check_same_settings(plan, (saved or {}).get("options", plan), file)
    if rank == 0:
        workshop.claim_folder(run, resume)

# %%
if __name__ == "__main__":
    if not first_stage:
        torch.manual_seed(seed)  # the initial weights
        model = workshop.move_to_device(Autoencoder(**plan))
        state = new_autoencoder_state(model, recipe["code_lr"], seed)
        if saved:
            workshop.unpack(state, saved)
        todo = settings["code_steps"], settings["code_batch"]
        fit_autoencoder(state, pixels, *todo, run, save_every)
    with workshop.first_process_first():  # which has written it
        autoencoder = load_first_stage(file)
        codes, scale = encode_set(autoencoder, pixels, run / "latents.pt")
    if 4 * codes.numel() <= memory * 2**30:
        codes = codes.float().to(workshop.device())
    workshop.print_once(f"{len(codes):,} latents of {tuple(codes.shape[1:])}, scale {scale:.4f}")
    if rank == 0:
        draw_latents(autoencoder, pixels[:16], scale, run / "latents.png")

# %% [markdown]
# ### Training and drawing
#
# On `digits` and `mnist` a unified network is trained, too, by the same recipe, for as many steps
# as cost the same FLOPs (counted by step 05's `stage_gflops`), on times drawn the same way.


# %%
def train_and_draw(settings, folder):
    """Train a latent model, or go on with it, and draw a set: (averaged network, pictures)."""
    settings, content = settings | dict(scale=scale), None
    if resume and (folder / "checkpoint.pt").exists():
        content = workshop.read_checkpoint(folder)
        workshop.check_same_settings(settings, content["settings"], folder)
    state = training.prepare_state(settings, content)
    if rank == 0:
        workshop.write_json(settings, folder / "settings.json")
    training.fit(state, codes, settings, folder, decode=back, save_every=save_every)
    how = dict(sampler=sampler, nfe=nfe, grid=grid, seed=seed + 1, decode=back)
    how.update(batch=min(300, pictures_at_once(pixels.shape[-1])))
    kept, whose = folder / "sets" / f"step{state['step']}", autoencoder.state_dict().values()
    return state["ema"], evaluation.draw_set(state["ema"], "ldm", kept, samples, also=whose, **how)


if __name__ == "__main__":
    back = lambda latents: decode_latents(autoencoder, latents, scale)  # noqa: E731
    compare = compare and known.get("judge") == "digits" and arch != "unified"
    model, drawn = train_and_draw(settings, run)
    columns = {f"{arch} / real": drawn}
    if compare:
        twin = plan_latents("unified")
        pair = model, workshop.move_to_device(training.network_of(twin))
        own, unified = (statistics.fmean(evaluation.stage_gflops(network)) for network in pair)
        twin["steps"] = round(own / unified * settings["steps"])
        twin["decay"] = twin["steps"] if twin["decay"] else 0
        columns["unified / real"] = train_and_draw(twin, run / "unified")[1]
    if rank > 0:
        sys.exit()  # the first process measures

# %% [markdown]
# ### How good is it?
#
# Reconstructions of real pictures are the floor. All sets are compared with the same half of the
# real pictures; the last set is the other half, and gets what perfect samples would get. The
# networks' pictures at the same place come from the same noise. See how far both are from the
# rebuilt pictures; one seed does not tell which network is ahead.

# %%
if __name__ == "__main__":
    rebuilt = back(encode_pictures(autoencoder, other_half) * scale)
    error = F.mse_loss(rebuilt, other_half / 255)
    print(f"squared error of a reconstruction: {error:.5f} a pixel", end="; ")
    print(f"pixels vary by {(half / 255).var():.4f}")
    columns.update({"rebuilt / real": evaluation.to_bytes(rebuilt), "real / real": other_half})
    rows, titles = [x[:48] / 255 for x in columns.values()], [key.split(" /")[0] for key in columns]
    workshop.show_images(rows, titles, run / "samples.png")
    table = {key: evaluation.evaluate(x, half, extractor) for key, x in columns.items()}
    title = f"{samples} pictures a set, {named};\n{sampler}, {nfe} evaluations, seed {seed + 1}"
    evaluation.print_metrics(table, title, named)
    record = dict(run=str(run), sampler=sampler, nfe=nfe, grid=grid or "own", seed=seed + 1)
    workshop.write_json({**record, "features": named, **table}, run / "metrics.json")

# %% [markdown]
# One seed says little, so here is what more of them say (RESULTS.md). In pixels, with 8 channels,
# five seeds and a learning rate of its own for each side, three decoders need fewer bits on
# CIFAR-10 at 16×16 than one. Their distance is smaller in colour, 3.08 against 3.62, and larger in
# grey, 2.42 against 1.34; on MNIST it is open. In latents one decoder is ahead (docs/samples.md):
# 0.89 ± 0.11 against 1.25 ± 0.11 with the release's recipe (three seeds, mean and deviation). The
# paper's claim is about far longer runs.
