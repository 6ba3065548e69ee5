# %% [markdown]
# # 03 · One encoder, a decoder for each stage
#
# **You will** build the network of the paper: a U-Net whose encoder serves all stages of the
# timeline and whose decoders serve one stage each, wide near the image, narrow near the noise.
# You will check that one stage gives back a plain U-Net, that a batch may mix stages, and that a
# picture trains the decoder of its own stage only. (Section 3.1 and Figure 1(c) of the paper.)

# %% tags=["imports"]
import importlib
import math
import os
from functools import partial
from types import SimpleNamespace

if "__file__" not in globals():  # a notebook, which may have been opened where it lies
    os.chdir(".." if os.path.exists("../00_workshop.py") else ".")
    assert os.path.exists("00_workshop.py"), "papermill needs --cwd PROJECT"
workshop = importlib.import_module("00_workshop")  # before torch

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

# %% tags=["parameters"]
network = "digits"  # the data set whose networks are compared below: digits, mnist or cifar10
table = 0  # 5, 6 or 7: print that table of the paper and stop [0, 7]
seed = 0  # seed of every random number [0, 4294967295]

# %% tags=["imports"]
workshop.settings(globals(), "03_multistage_unet")

# %% [markdown]
# Step 02 cut the timeline of `digits` at $t_1$ = 0.096 and $t_2$ = 0.443 (its fast form with 5,000
# samples; the plain one came close). Stage $k$ serves the times $[t_k,t_{k+1})$, with $t_0=0$.
# Stage 0 lies at the image; the last one lies at the noise and includes $t=1$. A network with a
# decoder for each stage has to ask of every time: which stage does it belong to?


# %%
def find_stage(t, boundaries):
    """Tell which stage each time belongs to; a boundary is in the later one: (B,) int64."""
    stage = torch.zeros_like(t, dtype=torch.int64)
    for tau in boundaries:
        stage += t >= tau
    return stage


# %% tags=["nbval-check-output"]
if __name__ == "__main__" and not table:
    torch.manual_seed(seed)
    cuts = (0.096, 0.443)  # what Algorithm 1 finds for digits
    t = torch.tensor([0.05, 0.096, 0.3, 0.7, 0.9])
    print("the stages of 0.05, 0.096, 0.3, 0.7 and 0.9:", find_stage(t, cuts).tolist())

# %% [markdown]
# ## Why not one network, and why not three?
#
# The paper calls one network for all times *unified*, and one network for each stage *separate*. It
# puts forward hypotheses against both (Section 4), and supports them with curves of networks of 47
# to 169 million parameters. The right column says what this project finds on `digits`, with
# networks a hundred times smaller. RESULTS.md has the numbers.
#
# | the paper's hypothesis | here |
# |---|---|
# | near the noise, unified is larger than it needs to be | holds |
# | near the image, it is too small | open: the loss says so, the pictures do not tell |
# | gradients of distant times differ … | holds, for the first and the last stage |
# | … and therefore unified learns slowly | does not show: at first it learns fastest |
# | separate is worse than unified | in each of three seeds; open once corrected |
# | … because each of its networks overfits | not with all pictures; with a tenth, unified does equally |
# | one encoder with several decoders is better than both | than unified on CIFAR-10: by bits; by pictures only in colour |
#
# So read this step as a design with reasons that can be tested, not as one that is known to win.
# What fails at this scale is not refuted at the paper's.
#
# The idea in one sentence: *share the part that all times have in common, the encoder, and give
# each stage a decoder of its own*. A decoder can then be as wide as its stage needs, and learns
# from its own stage only. The encoder learns from all pictures at all times, so it should hardly
# overfit.
#
# ## The parts of a U-Net
#
# A U-Net makes a picture smaller in a few steps, and larger again in as many. On the way down it
# keeps its features (the *skips*), and reads them on the way up: what is coarse comes from below,
# what is fine from the side. It has four kinds of parts, and none of them knows about stages.
#
# A **residual block** adds a correction to its input $h$, so that it has to learn only what
# should change. Between its two convolutions it is told the time: a linear layer turns the vector
# `emb`, which stands for the time, into one number for each channel:
#
# $$h \leftarrow \mathrm{skip}(h)+\mathrm{conv}_2\big(\mathrm{conv}_1(h)+\mathrm{time}(\mathrm{emb})\big)$$
#
# Before each convolution the values are normalised, in groups of channels, and bent by
# $\mathrm{silu}(a)=a/(1+e^{-a})$: without a bend between them, two convolutions would be no more
# than one. `norm(c)` builds the normalisation of $c$ channels. `skip` is a convolution only where
# the number of channels changes, so that the sum has a meaning; elsewhere it does nothing. `Layers`
# runs parts one after the other; those that have no use for the time ignore it. (With e = 0 a block
# is not told the time, as in step 06.) Here two pictures of 4 channels, with 3 numbers each for
# their times, become two of 8 channels:


# %% tags=["nbval-check-output"]
class ResBlock(nn.Module):
    """Transform (B, c_in, H, W) to (B, c_out, H, W), told the time by emb (B, e); e = 0: none."""

    def __init__(self, c_in, c_out, e, norm):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(e, c_out) if e else None
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, h, emb=None):
        new = self.conv1(F.silu(self.norm1(h)))
        if self.time:
            new = new + self.time(F.silu(emb))[:, :, None, None]
        new = self.conv2(F.silu(self.norm2(new)))
        return self.skip(h) + new


class Layers(nn.Sequential):
    """Run parts in a row, each told the time by emb (B, e)."""

    def forward(self, h, emb=None):
        for layer in self:
            h = layer(h, emb)
        return h


if __name__ == "__main__" and not table:
    print(ResBlock(4, 8, e=3, norm=nn.Identity)(torch.ones(2, 4, 8, 8), torch.ones(2, 3)).shape)

# %% [markdown]
# A convolution sees only neighbours. **Self-attention** lets every position look at all others:
#
# $$h \leftarrow h+\mathrm{out}\big(\mathrm{softmax}(q\,k^\top/\sqrt c)\,v\big)$$
#
# $q$, $k$ and $v$ are three linear maps of the $c$ channels: what a position looks for, what it
# offers to be found by, and what it then tells. Each row of the softmax says how much a position
# listens to every other. The work grows with the square of the number of positions, so it is done
# at small sizes only: for `digits` at 4×4, where 16 positions look at 16.
#
# The **resolution** is halved by a convolution that takes every second position. It is doubled by
# repeating positions, and a convolution smooths what comes out. The number of channels is kept.


# %%
class Attention(nn.Module):
    """Let every position of (B, c, H, W) attend to every other."""

    def __init__(self, c, norm):
        super().__init__()
        self.norm, self.qkv, self.out = norm(c), nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)

    def forward(self, h, emb=None):
        B, c, H, W = h.shape
        q, k, v = self.qkv(self.norm(h)).reshape(B, 3, 1, c, H * W).transpose(3, 4).unbind(1)
        new = F.scaled_dot_product_attention(q, k, v)  # (B, 1, HW, c)
        return h + self.out(new.transpose(2, 3).reshape(B, c, H, W))


class Down(nn.Module):
    """Halve the resolution of (B, c, H, W) by a strided convolution."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, h, emb=None):
        return self.conv(h)


class Up(nn.Module):
    """Double the resolution of (B, c, H, W) by repeating pixels, then smooth by a convolution."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, h, emb=None):
        return self.conv(F.interpolate(h, scale_factor=2, mode="nearest"))


# %% [markdown]
# The **time** is one number, and a network needs to tell 0.01 from 0.02 as well as 0.1 from 0.9. So
# it gets the time as sines and cosines of many frequencies: the fast ones tell close times apart,
# the slow ones distant times. With $w$ numbers they are
#
# $$\sin(999\,t\cdot\omega_i),\ \cos(999\,t\cdot\omega_i),\qquad
#   \omega_i = 10\,000^{-i/(w/2-1)},\quad i=0,\dots,w/2-1.$$
#
# Two linear layers of the encoder turn them into `emb`. Two times should be told apart even if only
# a thousandth of the timeline lies between them. Each vector has length 4, so two vectors that are
# 5.7 apart have nothing in common:


# %% tags=["nbval-check-output"]
def embed_time(tau, width):
    """Embed times tau (B,), about 0 to 1000, as sines and cosines: (B, width)."""
    i = torch.arange(width // 2, device=tau.device)
    angle = tau[:, None] * torch.exp(-math.log(10_000) * i / max(width // 2 - 1, 1))
    return torch.cat([angle.sin(), angle.cos()], 1)


if __name__ == "__main__" and not table:
    near = embed_time(999 * torch.tensor([0.1, 0.101, 0.9]), 32)
    small, large = (near[1:] - near[0]).norm(dim=1).tolist()
    print(f"0.1 lies {small:.2f} from 0.101 and {large:.2f} from 0.9")

# %% [markdown]
# ## The encoder
#
# It turns a noisy picture and its time into sets of features: one after the first convolution, one
# after every block, one after every halving. These are the skips, which the decoders will read. The
# last of them goes through the *middle* of the U: a block, attention, a block.
#
# Each level of resolution has `blocks` residual blocks of `mult` times `width` channels. If the
# level's `size` is in `attention`, attention follows each block. `make` holds the functions that
# build the parts from numbers of channels; below the line, others build the published networks.


# %%
class Encoder(nn.Module):
    """Turn x (B, C, H, W) and t (B,) into (middle, skips, emb), all that a decoder needs."""

    def __init__(self, channels, width, size, mults, blocks, attention, make):
        super().__init__()
        e, c = 4 * width, width
        self.embed = nn.Sequential(nn.Linear(width, e), nn.SiLU(), nn.Linear(e, e))
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.layers, self.skip_widths = nn.ModuleList(), [width]
        for level, mult in enumerate(mults):
            for _ in range(blocks):
                block, attend = make.block(c, width * mult), make.attend(width * mult)
                self.layers.append(Layers(block, attend) if size in attention else Layers(block))
                c = width * mult
                self.skip_widths.append(c)
            if level < len(mults) - 1:
                self.layers.append(Layers(make.down(c)))
                self.skip_widths.append(c)
                size //= 2
        self.middle = make.middle(c)

    def forward(self, x, t):
        emb, skips = self.embed(embed_time(999 * t, self.first.out_channels)), [self.first(x)]
        for layer in self.layers:
            skips.append(layer(skips[-1], emb))
        return self.middle(skips[-1], emb), skips, emb


# %% [markdown]
# The encoder of `digits` has 32 channels at 8×8 and 64 at 4×4, where it attends. What becomes of
# five pictures, whose times are those from above? (Noise stands in for pictures, and no weight is
# trained: the shapes are the same.) The entries of `make` are the parts above, with the choices
# for the whole network filled in: how many numbers `emb` has, and how values are normalised.


# %% tags=["nbval-check-output"]
def plain_norm(c):
    """Build a GroupNorm of c channels, in groups of 4 but at most 16 groups."""
    return nn.GroupNorm(min(c // 4, 16), c, eps=1e-6)


def middle_block(c, block, attend):
    """Build the middle of the U: (B, c, H, W) at the lowest resolution to the same shape."""
    return Layers(block(c, c), attend(c), block(c, c))


if __name__ == "__main__" and not table:
    block = partial(ResBlock, e=4 * 32, norm=plain_norm)
    attend = partial(Attention, norm=plain_norm)
    make = SimpleNamespace(norm=plain_norm, block=block, attend=attend, down=Down, up=Up)
    make.middle = partial(middle_block, block=block, attend=attend)
    make.last = partial(nn.Conv2d, kernel_size=3, padding=1)
    plan = dict(size=8, mults=(1, 2), blocks=1, attention=(4,), make=make)
    encoder, x = Encoder(1, 32, **plan), torch.randn(len(t), 1, 8, 8)
    middle, skips, emb = encoder(x, t)
    for name, parts in dict(x=[x], skips=skips, middle=[middle], emb=[emb]).items():
        print(f"{name:7s}", *[tuple(part.shape) for part in parts])

# %% [markdown]
# ## A decoder
#
# The five pictures have become four skips at two sizes, and each picture has 128 numbers for its
# time. A decoder climbs back to full resolution. Each of its blocks reads one skip, the last skip
# first, together with what comes from below. Each level has one block more than in the encoder, to
# read the skip of the halving, or at the top that of the first convolution. Attention follows the
# last block of a level, and then comes the doubling.
#
# Each decoder has its own width, and here the paper saves: near the noise a decoder may be narrow.
# A decoder of 16 channels may read the skips of an encoder of 32, because the first convolution of
# a block takes all channels and gives 16. The paper has decoders of 192, 128 and 16 channels beside
# an encoder of 128. Those for `digits` have 48, 32 and 16 channels, beside an encoder of 32.


# %%
class Decoder(nn.Module):
    """Turn the encoder's (middle, skips, emb) into a prediction (B, C, H, W)."""

    def __init__(self, channels, width, skips, size, mults, blocks, attention, make):
        super().__init__()
        waiting, c, self.layers = list(skips), skips[-1], nn.ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            for i in range(blocks + 1):
                row = [make.block(c + waiting.pop(), width * mult)]
                c = width * mult
                if i == blocks and size // 2**level in attention:
                    row.append(make.attend(c))
                if i == blocks and level > 0:
                    row.append(make.up(c))
                self.layers.append(Layers(*row))
        self.norm, self.last = make.norm(c), make.last(c, channels)

    def forward(self, middle, skips, emb):
        h = middle
        for layer, skip in zip(self.layers, reversed(skips), strict=True):
            h = layer(torch.cat([h, skip], 1), emb)
        return self.last(F.silu(self.norm(h)))


# %% [markdown]
# ## Which decoder does a time belong to?
#
# Every decoder can read the same skips; now the times decide which one does. All pictures of a
# batch go through the encoder together. Then each decoder takes those of its own stage, which
# `mine` picks out, and what it says is put in their places. So a batch may mix stages, and a
# decoder that no picture of the batch needs costs nothing.
#
# $$\epsilon_\theta(x_t,t) = x_t + D_k\big(E(x_t,t)\big)\quad\text{for}\quad t_k \le t < t_{k+1}$$
#
# $E$ is the encoder, $D_k$ the decoder of stage $k$. In training (step 04), all pictures of a
# batch usually belong to one stage, which is drawn at random. In sampling (step 05) all pictures
# go from the last stage to stage 0 together, and change the decoder on the way.
#
# Only the small networks of this course add $x_t$. Near the noise $x_t$ *is* the noise to within a
# percent, and learning to copy it would cost a small network many steps. The published networks do
# not add it.


# %%
def dispatch_batch(x, t, encoder, decoders, boundaries):
    """Predict the noise in x (B, C, H, W) at t (B,), each picture by the decoder of its stage."""
    middle, skips, emb = encoder(x, t)
    stage, noise = find_stage(t, boundaries), torch.empty_like(x)
    for k, decoder in enumerate(decoders):
        mine = stage == k  # dispatch: (B,) of truth values
        if mine.any():
            noise[mine] = decoder(middle[mine], [skip[mine] for skip in skips], emb[mine])
    return x + noise


# %% tags=["nbval-check-output"]
if __name__ == "__main__" and not table:
    decoders = [Decoder(1, width, encoder.skip_widths, **plan) for width in (48, 32, 16)]
    mixed = dispatch_batch(x, t, encoder, decoders, cuts)
    alone = [dispatch_batch(x[i : i + 1], t[i : i + 1], encoder, decoders, cuts) for i in range(5)]
    assert (mixed - torch.cat(alone)).abs().max() < 1e-4
    print("largest difference between a mixed batch and each picture alone: below 1e-4")

# %% [markdown]
# **In a mixed batch each picture gets what it would get alone.** (The difference is rounding: in
# other batches, sums run in another order.) Two more checks, still with random weights.
#
# **One stage is a plain U-Net.** With a single decoder and no boundary nothing is left but
# $x_t+D_0(E(x_t,t))$. That is `unified`, and `separate` is three of them, each used only at the
# times of its own stage. Neither needs a second kind of network.
#
# **A picture trains the decoder of its own stage**, and no other: the others do not get gradients
# of zero, they get none at all. The encoder learns from all pictures.

# %% tags=["nbval-check-output"]
if __name__ == "__main__" and not table:
    one = dispatch_batch(x, t, encoder, decoders[1:2], ())
    assert torch.equal(one, x + decoders[1](*encoder(x, t)))
    alone[4].sum().backward()
    trained = [any(p.grad is not None for p in decoder.parameters()) for decoder in decoders]
    print("one stage is a plain U-Net; a picture at t = 0.9 trains the decoders", trained)
    assert trained == [False, False, True]

# %% [markdown]
# ## What it looks like
#
# A bar's length is the number of a layer's channels. A decoder's layer stands beside the encoder's
# layer whose skip it reads (the grey lines). Dark arrows show the way of a picture at $t$ = 0.3.


# %% tags=["draws"]
def draw_architecture(x, t, encoder, decoders, cuts, path):
    """Draw encoder, middle and decoders as a U, and the way of a picture x (1, C, H, W) at t."""
    sizes, edges = [h.shape[2] for h in encoder(x, torch.ones(1))[1]], (0, *cuts, 1)
    columns = [[layer[0].conv1.out_channels for layer in d.layers][::-1] for d in decoders]
    columns, n = [encoder.skip_widths, *columns], len(sizes)
    gap, half = 1.35 * max(map(max, columns)), encoder.skip_widths[-1] / 2
    figure, ax = plt.subplots(figsize=(9, 3.2))
    text = partial(ax.text, ha="center", va="center", fontsize=9)
    ax.hlines(range(n), 0, gap * len(decoders), color="0.85", lw=0.8, zorder=0)  # the skips
    ax.barh(n + 0.5, 2 * half, 0.8, -half, color="0.7")
    text(0, n + 0.5, "middle")
    text(gap / 2, n + 0.4, f"t = {t:g}", va="bottom", weight="bold")
    for j, (part, widths) in enumerate(zip([encoder, *decoders], columns, strict=True)):
        left = [j * gap - width / 2 for width in widths]
        ax.barh(range(n), widths, 0.8, left, color=[f"C{sizes.index(size)}" for size in sizes])
        name, own = f"decoder {j - 1}" if j else "encoder", j == 0 or edges[j - 1] <= t < edges[j]
        million = sum(p.numel() for p in part.parameters()) / 1e6
        text(j * gap, -2.3, f"{name}\n{million:.3g}M parameters")
        arrows = [(0, -1.5), (0, -0.5)], [(0, n - 0.5), (0, n + 0.1)]
        if j:
            stage = f"t from {edges[j - 1]:.3g} to {edges[j]:.3g}"
            text(j * gap, n + 1, stage, weight="bold" if own else "normal")
            arrows = [(half, n + 0.5), (j * gap, n - 0.5)], [(j * gap, -0.5), (j * gap, -1.5)]
        for start, end in arrows:
            way = dict(arrowstyle="->", connectionstyle="angle,angleA=0,angleB=90", lw=1.5)
            way.update(color="black" if own else "0.6", shrinkA=0, shrinkB=0)
            ax.annotate("", end, start, arrowprops=way, zorder=2 + own)
    ax.set_yticks(range(n), [f"{size}×{size}" for size in sizes])
    ax.tick_params(length=0)
    ax.set(ylim=(n + 1.3, -3), xticks=[], frame_on=False)
    workshop.show_figure(path)


if __name__ == "__main__" and not table:
    draw_architecture(x[:1], 0.3, encoder, decoders, cuts, "figures/03_network.png")

# %% [markdown]
# The encoder is the left column, and serves all stages. A picture goes down this column, through
# the middle, and up one of the other three, which its time chooses. Decoder 0 has nearly half of
# all parameters, and works only in the first tenth of the timeline. Decoder 2 has a tenth of the
# parameters and serves more than half of the timeline.
#
# Bars show widths, not work: a layer of equal width costs four times as much at 8×8 as at 4×4.
# By the count below the line, the network costs 1.7 times as much as unified in stage 0, the same
# in stage 1, and half as much in stage 2. **Predict first:** stage 2 has more than half of the
# timeline. Are 20 evaluations of step 05 cheaper than unified's? <details><summary>Answer</summary>
# They cost the same, because 6 of the 20 fall into the short stage 0.</details>
#
# **You have** the architecture of the paper: an encoder, decoders, and a few lines that decide
# which decoder a picture gets. Step 04 trains it, and also its one-stage form, the plain U-Net.
#
# ### Exercises (after running what is below)
#
# 1. Give stage 2 a decoder of 8 channels: `cost("digits", decoders=(48, 32, 8))`. What share of the
#    stage is now encoder? <details><summary>Solution</summary>79% of its GFLOPs; 58% with 16
#    channels. The shared encoder is the floor, however narrow the decoder.</details>
# 2. Build a two-stage network with the boundary at 0.5. <details><summary>Solution</summary>
#    `build_network("digits", decoders=(48, 16), boundaries=[0.5])`.</details>

# %% [markdown]
# ## Below this line: faster, safer, as published
#
# The module that the next steps train, the networks of the paper, and what a stage of them costs
# (Tables 5, 6 and 7). `tools/release.py` fills them with the authors' weights.

# %%
import sys
from itertools import pairwise

from torch.utils.flop_counter import FlopCounterMode

sde = importlib.import_module("01_sde_and_denoiser")
BadInput = workshop.BadInput

# %% [markdown]
# ## In bfloat16
#
# A GPU that supports bfloat16 computes in it (*autocast*). Two kinds of layers need care: the
# norms, which would fall back to float32 and take longer than all convolutions, and the last layer,
# which stays in float32 because its output is the prediction.


# %%
class GroupNorm(nn.GroupNorm):
    """Normalise (B, c, H, W) in its own dtype; the sums within are float32 in any case."""

    def forward(self, h):
        if h.dtype == self.weight.dtype:
            return super().forward(h)
        weight, bias = self.weight.to(h.dtype), self.bias.to(h.dtype)
        with torch.autocast(h.device.type, enabled=False):
            return F.group_norm(h, self.num_groups, weight, bias, self.eps)


class LastConv2d(nn.Conv2d):
    """Convolve (B, c, H, W) in float32, whatever the layers before computed in."""

    def forward(self, h):
        if h.dtype == self.weight.dtype:
            return super().forward(h)
        with torch.autocast(h.device.type, enabled=False):
            return super().forward(h.to(self.weight.dtype))


def group_norm(groups, least, eps, channels):
    """Build a GroupNorm of at most `groups` groups with `least` channels or more in each."""
    fit = range(max(min(channels // least, groups), 1), 0, -1)
    return GroupNorm(next(n for n in fit if channels % n == 0), channels, eps=eps)


# %% [markdown]
# ## Three backbones
#
# The paper builds on three networks by others: NCSN++ (for VP), DDPM++ (for EDM) and ADM (for
# latent diffusion). All are variants of the U-Net above. ADM has several attention heads. NCSN++
# and DDPM++ divide residual sums by $\sqrt2$, and their residual blocks change the resolution with
# a fixed *FIR filter*: taps (its weights) of (1, 1) average or repeat pixels, (1, 3, 3, 1) is
# smoother. As the filter treats all channels alike, it is one depthwise convolution.


# %%
class Filter(nn.Module):
    """Halve ("down"), double ("up") or only "blur" (B, c, H, W) by FIR taps, as (1, 3, 3, 1)."""

    def __init__(self, taps, change):
        super().__init__()
        f = torch.tensor(taps, dtype=torch.float32)
        f = torch.outer(f, f) / f.sum() ** 2 * (4 if change == "up" else 1)
        self.register_buffer("f", f[None, None], persistent=False)
        self.change = change

    def forward(self, h):
        c, taps = h.shape[1], self.f.shape[-1]  # an even number
        f = self.f.to(h.dtype).expand(c, 1, taps, taps)
        if self.change == "blur":
            return F.conv2d(h, f, padding=taps // 2, groups=c)
        conv = F.conv_transpose2d if self.change == "up" else F.conv2d
        return conv(h, f, stride=2, padding=taps // 2 - 1, groups=c)


class Pyramid(nn.Module):
    """Add the input, made smaller once more, to features: the input pyramid of NCSN++.

    It takes (p, h): p (B, c_in, 2H, 2W), the last of the pyramid, and h (B, c, H, W).
    """

    def __init__(self, c_in, c, taps):
        super().__init__()
        self.blur, self.conv = Filter(taps, "blur"), nn.Conv2d(c_in, c, 3, stride=2)

    def forward(self, p, h):
        return (h + self.conv(self.blur(p))) * 0.5**0.5


class PublishedBlock(ResBlock):
    """Transform as `ResBlock`, with dropout and scaled; resample: a `Filter`, used on the way."""

    def __init__(self, c_in, c_out, e, norm, dropout, scale, resample=None):
        super().__init__(c_in, c_out, e, norm)
        if resample and c_in == c_out:
            self.skip = nn.Conv2d(c_in, c_out, 1)
        self.resample, self.dropout = resample or nn.Identity(), nn.Dropout(dropout)
        self.scale = scale

    def forward(self, h, emb):
        new = self.conv1(self.resample(F.silu(self.norm1(h))))
        new = new + self.time(F.silu(emb))[:, :, None, None]
        new = self.conv2(self.dropout(F.silu(self.norm2(new))))
        return (self.skip(self.resample(h)) + new) * self.scale


class PublishedAttention(Attention):
    """Attend as `Attention`, in heads of `heads` channels (None: one head), and scaled."""

    def __init__(self, c, norm, heads, scale):
        super().__init__(c, norm)
        self.heads, self.scale = c // (heads or c), scale

    def forward(self, h, emb):
        B, c, H, W = h.shape
        qkv = self.qkv(self.norm(h)).reshape(B, 3, self.heads, c // self.heads, H * W)
        new = F.scaled_dot_product_attention(*qkv.transpose(3, 4).unbind(1))  # (B, heads, HW, d)
        return (h + self.out(new.transpose(2, 3).reshape(B, c, H, W))) * self.scale


# %% [markdown]
# What counts as the time differs: $999\,t$ for VP, $\tfrac14\ln\sigma$ for EDM, and for latent
# diffusion the step of its schedule, $1000\,t-1$. NCSN++ adds the filtered input at each resolution
# (`pyramid`), DDPM++ has the middle of the U in its decoders, and ADM's decoders attend after every
# block. A network with `classes` (step 07) adds a vector for the label to that of the time.


# %%
class PublishedEncoder(Encoder):
    """Encode as `Encoder`; time: "vp", "edm" or "ldm"; pyramid: the taps of its filter, or None."""

    def __init__(self, channels, width, size, mults, blocks, attention, make, time, pyramid):
        super().__init__(channels, width, size, mults, blocks, attention, make)
        self.time, self.labels, layers = time, None, nn.ModuleList()
        c_in = channels  # of the picture; below it, of the pyramid
        for i, (layer, c) in enumerate(zip(self.layers, self.skip_widths[1:], strict=True)):
            layers.append(layer)
            if pyramid and i % (blocks + 1) == blocks:  # where the resolution was halved
                layers.append(Pyramid(c_in, c, pyramid))
                c_in = c
        self.layers = layers

    def embed_time(self, t):
        width = self.first.out_channels
        if self.time != "ldm":
            return embed_time(t.log() / 4 if self.time == "edm" else 999 * t, width)
        i = torch.arange(width // 2, device=t.device)  # other frequencies, and cosines first
        angle = (1000 * t - 1)[:, None] * torch.exp(-math.log(10_000) * i / (width // 2))
        return torch.cat([angle.cos(), angle.sin()], 1)

    def forward(self, x, t, label=None):
        emb = self.embed(self.embed_time(t.to(x.device)).to(x.dtype))
        if self.labels is not None:  # the last of its vectors stands for none
            emb = emb + (self.labels.weight[-1] if label is None else self.labels(label))
        skips, p = [self.first(x)], x
        for layer in self.layers:
            if isinstance(layer, Pyramid):
                skips[-1] = p = layer(p, skips[-1])
            else:
                skips.append(layer(skips[-1], emb))
        return self.middle(skips[-1], emb), skips, emb


class PublishedDecoder(Decoder):
    """Decode as `Decoder`; middle: what builds the middle of the U here.

    where: the blocks that get attention at the sizes that have it, "every", the "last" or "none".
    """

    def __init__(self, channels, width, skips, size, mults, blocks, attention, make, where, middle):
        attention = attention if where != "none" else ()
        super().__init__(channels, width, skips, size, mults, blocks, attention, make)
        for i, layer in enumerate(self.layers):
            here = size // 2 ** (len(mults) - 1 - i // (blocks + 1))
            if where == "every" and here in attention and i % (blocks + 1) < blocks:
                layer.append(make.attend(layer[0].conv1.out_channels))
        parts = self.layers, self.norm, self.last
        del self.layers, self.norm, self.last  # and back again: checkpoints have the middle first
        self.middle, (self.layers, self.norm, self.last) = middle(skips[-1]), parts

    def forward(self, middle, skips, emb):
        return super().forward(self.middle(middle, emb), skips, emb)


# %% [markdown]
# ## The multistage network
#
# This is the module that the next steps train. `unified` is its form with one stage; `separate` has
# an encoder for each decoder. The arguments from `time` on are for the published networks.


# %%
class MultistageUNet(nn.Module):
    """Predict noise with a shared encoder and a decoder for each stage of the timeline.

    Raises BadInput for contradictory arguments. Source: paper, Section 3.1 and Figure 1(c).
    """

    def __init__(
        self,
        channels,  # of the pictures
        size,  # of the pictures; their height and width
        encoder,  # channels of the encoder
        decoders,  # channels of each decoder, from the image end to the noise end
        boundaries=(),  # inner boundaries of the stages, ascending, one fewer than decoders
        mults=(1, 2),  # channel multiplier of each resolution level
        blocks=1,  # residual blocks a level (one more in decoders)
        attention=(),  # the sizes that get self-attention
        dropout=0.0,
        shared=True,  # False: an encoder for each decoder (`separate`)
        add_input=False,  # predict x plus what the decoder says
        time="vp",  # the kernel that times belong to: "vp", "edm" or "ldm"
        norm=(16, 4, 1e-6),  # groups at most, channels a group at least, eps
        taps=None,  # of the filters in residual blocks, which are scaled; None: convolutions
        pyramid=False,  # add the filtered input at each resolution
        heads=None,  # channels of an attention head; None: one head
        attended="last",  # blocks of decoders with attention: "last", "every", "none", or one each
        middle="encoder",  # the part that has the middle of the U, or "decoder"
        classes=0,  # labels 0 to classes - 1 that it can be told; one more stands for none
    ):
        super().__init__()
        self.channels, self.size, self.classes = channels, size, classes
        self.add_input, self.multiple = add_input, 2 ** (len(mults) - 1)
        self.latest, n = math.inf if time == "edm" else 1.0, len(decoders)
        self.cuts = cuts = [float(tau) for tau in boundaries]  # plain numbers, on no device
        self.register_buffer("boundaries", torch.tensor(cuts), persistent=False)
        if n != len(cuts) + 1:
            raise BadInput(f"{n} decoders need {n - 1} boundaries, got {cuts}")
        if cuts != sorted(set(cuts)) or not all(0 < tau < self.latest for tau in cuts):
            rule = f"must be positive, strictly ascending and below {self.latest:g}"
            raise BadInput(f"boundaries {cuts} {rule}")
        if size % self.multiple:
            raise BadInput(f"size {size} must be divisible by {self.multiple}")
        attended = [attended] * n if isinstance(attended, str) else attended
        norm, scale = partial(group_norm, *norm), 1.0 if taps is None else 0.5**0.5
        block = partial(PublishedBlock, e=4 * encoder, norm=norm, dropout=dropout, scale=scale)
        attend = partial(PublishedAttention, norm=norm, heads=heads, scale=scale)
        make = SimpleNamespace(norm=norm, block=block, attend=attend, down=Down, up=Up)
        make.last = partial(LastConv2d, kernel_size=3, padding=1)
        if taps is not None:
            make.down = lambda c: block(c, c, resample=Filter(taps, "down"))
            make.up = lambda c: block(c, c, resample=Filter(taps, "up"))
        middles = partial(middle_block, block=block, attend=attend), lambda c: Layers()
        make.middle, own_middle = middles if middle == "encoder" else middles[::-1]
        plan, pyramid = (size, mults, blocks, attention, make), taps if pyramid else None
        self.encoders = nn.ModuleList(
            PublishedEncoder(channels, encoder, *plan, time, pyramid)
            for _ in (decoders[:1] if shared else decoders)
        )
        skips = self.encoders[0].skip_widths
        self.decoders = nn.ModuleList(
            PublishedDecoder(channels, width, skips, *plan, where, own_middle)
            for width, where in zip(decoders, attended, strict=True)
        )
        self.apply(initialize_part)
        for part in self.encoders if classes else ():  # last: the other weights stay the same
            part.labels = nn.Embedding(classes + 1, 4 * encoder)
            nn.init.zeros_(part.labels.weight)

    def stage(self, t):
        """Tell which stage each time belongs to: (B,) int64; a boundary is in the later stage.

        Raises BadInput for times off the timeline, NaN included.
        """
        off = t[~((t >= 0) & (t <= self.latest))]
        if len(off):
            raise BadInput(f"t = {off[0]:g} lies outside the timeline [0, {self.latest:g}]")
        return find_stage(t, self.cuts)

    def branch(self, x, t, k, label=None):
        """Run the plain U-Net that stage k amounts to, whatever the times: (B, C, H, W)."""
        encoder = self.encoders[k if len(self.encoders) > 1 else 0]
        return self._finish(x, self.decoders[k](*encoder(x, t, label)))

    def forward(self, x, t, stage=None, label=None):
        """Predict the noise in x (B, C, H, W) at times t (B,); the batch may mix stages.

        stage: the stage of all pictures, or a list of stages, each once, that the batch takes in
        turns. If the caller gives it, t is not looked at, which would mean waiting for a GPU.
        label: (B,) int64 of a network with classes; None: no picture has one.
        Raises BadInput for pictures, times or labels that it cannot take.
        """
        if label is not None and not self.classes:
            raise BadInput("this network knows no classes: leave out the label, or train with them")
        c, multiple = self.channels, self.multiple
        if x.dim() != 4 or x.shape[1] != c or any(n % multiple for n in x.shape[2:]):
            takes = f"(B, {c}, H, W) with H and W divisible by {multiple}"
            raise BadInput(f"x has shape {tuple(x.shape)}, but this network takes {takes}")
        if isinstance(stage, int) or len(self.decoders) == 1:
            return self.branch(x, t, stage if isinstance(stage, int) else 0, label)
        places = self._places(x, t, stage)
        if len(places) == 1:
            return self.branch(x, t, *places, label)
        shared, parts = self.encoders[0](x, t, label) if len(self.encoders) == 1 else None, []
        for k, i in places.items():
            if shared:
                middle, skips, emb = shared
                features = middle[i], [skip[i] for skip in skips], emb[i]
            else:
                features = self.encoders[k](x[i], t[i], label if label is None else label[i])
            parts.append(self.decoders[k](*features))
        order = torch.cat(list(places.values())).argsort()
        return self._finish(x, torch.cat(parts)[order])  # in the order of x

    def _places(self, x, t, stages):
        """Tell which pictures of a batch are in which stage: {k: (b,) of places}."""
        if stages is None:
            stage = self.stage(t)
            return {k: (stage == k).nonzero()[:, 0] for k in stage.unique().tolist()}
        places = torch.arange(len(x), device=x.device)  # in turns
        return {k: places[i :: len(stages)] for i, k in enumerate(stages[: len(x)])}

    def _finish(self, x, predicted):
        # paper: the decoder's output alone; here, for small networks: plus x, because learning to
        # copy it near the noise costs them many steps
        return x + predicted if self.add_input else predicted


def initialize_part(part):
    """Start as DDPM does: weights uniform by fan, biases zero, the last layer of each part zero.

    Every residual block then begins as the identity, and the first prediction is zero.
    """
    if isinstance(part, (nn.Conv2d, nn.Linear)):
        nn.init.xavier_uniform_(part.weight)
        nn.init.zeros_(part.bias)
    for name, kind in (("conv2", ResBlock), ("out", Attention), ("last", Decoder)):
        if isinstance(part, kind):
            nn.init.zeros_(getattr(part, name).weight)


# %% [markdown]
# ## Named networks
#
# A network is a dictionary of arguments. First come the small ones of this course, in three forms.

# %%
PUBLISHED = (0.442, 0.6308)  # t_1, t_2 of the paper; step 04 puts those of the data set in place
STEPS = (0.4425, 0.6315)  # amid two steps of LDM: 442 and 631 are the times 0.443 and 0.632

NETWORKS, ALONE = {}, dict(shared=False)
small = {**workshop.COLOUR, **workshop.LAPTOP}
for name, known in {**workshop.DATASETS, "laptop": small}.items():
    if "network" not in known:
        continue  # for these the paper's networks are trained
    (C, size, _), code = known.get("shape", (3, 32, 32)), known["autoencoder"]
    pixels = dict(channels=C, size=size, boundaries=PUBLISHED, **known["network"])
    latent = dict(channels=code["code"], size=size // 2 ** (len(code["mults"]) - 1), time="ldm")
    latent.update(boundaries=STEPS, **known["latent_network"])
    for kind, small in ((name, pixels), (f"{name}_latent", latent)):
        small, one = {**small, "add_input": True}, (small["encoder"],)
        NETWORKS[kind] = small
        NETWORKS[f"{kind}_unified"] = {**small, "decoders": one, "boundaries": ()}
        NETWORKS[f"{kind}_separate"] = {**small, "decoders": one * 3, **ALONE}
SMALL_NETWORKS = [name for name in NETWORKS if not name.endswith(("_unified", "_separate"))]

# %% [markdown]
# Then the published ones, named by their row: `table5_1` is the paper's choice for CIFAR-10,
# `table6_4` the one for latent diffusion, `edm` the one for CelebA. Three backbones, and the widths:

# %%
NCSNPP = dict(channels=3, size=32, mults=(1, 2, 2, 2), blocks=8, attention=(16,), dropout=0.1)
NCSNPP |= {"taps": (1, 3, 3, 1), "pyramid": True}
# paper: 17.65 GFLOPs unified, which is NCSN++'s number; here: the release's plan (20.69 GFLOPs),
# because its weights fit no other. EDM's own code has GroupNorms of 32 groups, the release 16.
DDPMPP = dict(channels=3, size=32, mults=(2, 2, 2), blocks=4, attention=(16,), dropout=0.13)
DDPMPP |= {"time": "edm", "taps": (1, 1), "middle": "decoder"}
ADM = dict(channels=3, size=64, mults=(1, 2, 3, 4), blocks=2, attention=(32, 16, 8), heads=32)
ADM |= {"time": "ldm", "norm": (32, 1, 1e-5), "attended": "every"}

# paper: attention in every decoder; here: also the release's networks, whose later decoders have
# none (their downsampling counter is never reset), because only these have the printed parameters.
FIRST = dict(attended=("every", "none", "none"))
CIFAR, CELEBA = (NCSNPP, PUBLISHED), ({**ADM, **FIRST}, STEPS)
EDM_CUTS = tuple(sde.match_snr(PUBLISHED, sde.VP, sde.EDM))
for name, (backbone, edges), width, widths, more in [
    ("table5_1", CIFAR, 128, (192, 128, 16), {}),
    ("table5_2", CIFAR, 160, (160, 128, 16), {}),
    ("table5_3", CIFAR, 192, (144, 112, 16), {}),
    ("table5_4", CIFAR, 192, (128, 64, 16), {}),
    ("table6_1", CELEBA, 192, (224, 192, 160), {}),
    ("table6_2", CELEBA, 160, (224, 192, 128), {}),
    ("table6_3", CELEBA, 224, (224, 192, 128), {}),
    ("table6_4", CELEBA, 224, (256, 192, 128), {}),
    ("table7_1", (NCSNPP, ()), 128, (128,), {}),
    ("table7_2", (NCSNPP, (0.476,)), 128, (160, 112), {}),
    ("table7_4", (NCSNPP, (0.376, 0.526, 0.726)), 96, (208, 144, 112, 32), {}),
    ("table7_5", (NCSNPP, (0.376, 0.476, 0.626, 0.776)), 64, (224, 160, 160, 64, 48), {}),
    ("table3_separate", CIFAR, 128, (128, 128, 128), ALONE),
    ("table3_separate_tailored", CIFAR, 128, (192, 128, 16), ALONE),
    ("edm", (DDPMPP, EDM_CUTS), 128, (192, 128, 16), {}),
    ("edm_unified", (DDPMPP, ()), 128, (128,), {}),
    ("edm_separate", (DDPMPP, EDM_CUTS), 128, (128, 128, 128), ALONE),
    ("ldm", (ADM, STEPS), 224, (256, 192, 128), {}),  # table6_4 with attention everywhere
    ("ldm_unified", (ADM, ()), 224, (224,), {}),
    ("ldm_separate", (ADM, STEPS), 224, (224, 224, 224), ALONE),
]:
    NETWORKS[name] = {**backbone, "encoder": width, "decoders": widths, "boundaries": edges, **more}


def attended_sides(plan):
    """List the sides of pictures at which a plan's network attends: the nearest to `attention`.

    A network that is made for 32×32 and attends at 16×16 attends at 12×12 in pictures of 48×48.
    """
    sides = [max(1, plan["size"] // 2**level) for level in range(len(plan.get("mults", (1, 2))))]
    wanted = plan.get("attention", ())
    return tuple({min(sides, key=lambda side: abs(math.log(side / near))) for near in wanted})


def build_network(name, **changes):
    """Build a network of NETWORKS, some arguments changed. Raises BadInput for an unknown name.

    With another `size` it attends at `attended_sides`.
    """
    if name not in NETWORKS:
        raise BadInput(f"unknown network {name!r}: take one of {', '.join(sorted(NETWORKS))}")
    plan = {**NETWORKS[name], **changes}
    return MultistageUNet(**{**plan, "attention": attended_sides(plan)})


# %% tags=["nbval-check-output"]
def randomize(model, seed=0):
    """Fill every parameter with noise: zero-initialised layers would make checks empty."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.1
    return model.eval()


if __name__ == "__main__" and not table:
    torch.manual_seed(seed)
    model = randomize(build_network("digits", boundaries=cuts))
    encoder.load_state_dict(model.encoders[0].state_dict())
    for plain, full in zip(decoders, model.decoders, strict=True):
        plain.load_state_dict(full.state_dict())
    plain = dispatch_batch(x, t, encoder, decoders, cuts)
    assert (model(x, t) - plain).abs().max() < 1e-4
    print("largest difference between the full form and the plain one: below 1e-4")

# %% [markdown]
# ## What a stage costs
#
# Two counts, both for one picture. **GFLOPs as the paper prints them** are multiply-accumulates of
# convolutions, linear layers and GroupNorms only; attention and filters are not counted. **True
# FLOPs** are what torch's own counter finds, two for each multiply-accumulate. Neither needs the
# weights, so the network is built on the `meta` device.


# %%
def count_parameters(*modules):
    """Count the parameters of modules."""
    return sum(p.numel() for part in modules for p in part.parameters())


def macs_as_published(run, model):
    """Count multiply-accumulates of Conv2d, Linear and GroupNorm while `run()` uses the model."""
    macs = 0

    def add(layer, args, out):
        nonlocal macs
        if isinstance(layer, nn.Conv2d):
            macs += out.numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.Linear):
            macs += out.numel() * layer.in_features
        elif isinstance(layer, nn.GroupNorm):
            macs += 2 * out.numel()

    skipped = [part for part in model.modules() if isinstance(part, (Attention, Pyramid))]
    skipped = {layer for part in skipped for layer in part.modules()}
    hooks = [part.register_forward_hook(add) for part in model.modules() if part not in skipped]
    run()
    for hook in hooks:
        hook.remove()
    return macs


def cost(name, **changes):
    """Count parameters and work of a network: a dictionary for each stage, "shared" and "total".

    Keys: parameters (encoder and decoder of the stage), gflops (as the paper counts, one picture),
    true_gflops (torch's counter). "shared" is the encoder; the total has parameters only, as its
    work depends on the sampler. Changes as in `build_network`.
    """
    with torch.device("meta"):
        return cost_of(build_network(name, **changes))


def cost_of(model):
    """Count parameters and work of a network that lies on the meta device, as `cost`."""

    def work(part, *args):
        with FlopCounterMode(display=False) as counter:
            macs = macs_as_published(lambda: part(*args), model)
        return dict(gflops=macs / 1e9, true_gflops=counter.get_total_flops() / 1e9)

    x = torch.empty(1, model.channels, model.size, model.size, device="meta")
    t, rows = torch.empty(1, device="meta"), {}
    features, shared = model.encoders[0](x, t), work(model.encoders[0], x, t)
    for k, decoder in enumerate(model.decoders):
        encoder, own = model.encoders[k % len(model.encoders)], work(decoder, *features)
        rows[k] = {kind: shared[kind] + own[kind] for kind in shared}
        rows[k]["parameters"] = count_parameters(encoder, decoder)
    if len(model.encoders) == 1:
        rows["shared"] = {**shared, "parameters": count_parameters(*model.encoders)}
    rows["total"] = dict(parameters=count_parameters(model))
    return rows


# %% tags=["nbval-check-output"]
if __name__ == "__main__" and not table:
    forms = [f"{network}_unified", f"{network}_separate", network]
    costs = {name: cost(name) for name in forms}
    print(f"{'network':18s} stage   parameters  GFLOPs (paper's count)  true GFLOPs")
    for name, rows in costs.items():
        for k, row in rows.items():
            work = [f"{row[kind]:.4f}" if kind in row else "" for kind in ("gflops", "true_gflops")]
            print(f"{name:18s} {k!s:6s} {row['parameters']:11,}  {work[0]:>22s}  {work[1]:>12s}")


# %% [markdown]
# The multistage network spends most near the image and least near the noise, on top of the encoder,
# which every stage pays for. Unified and `separate` cost the same at all times.
#
# ## Tables 5, 6 and 7
#
# Next to every number stands the published one. The *total* GFLOPs are an average over stages:
#
# * **Table 5** says "weighted by NFE". Its totals are averages over *uniform times* with the cuts
#   0.426 and 0.626, which are Algorithm 2's for three stages, not the network's. (Of DPM-Solver's
#   20 evaluations 11, 2 and 7 fall into the stages: 20.4 GFLOPs for the first row, not 18.65.)
# * **Table 6**: 20 uniform steps, of which 8, 4 and 8 fall into the stages.
# * **Table 7**: the lengths of the intervals.
#
# Three printed entries fit no network: the total GFLOPs of Table 5's last row (they repeat the row
# above), the GFLOPs of Table 7's two stages (they belong to other widths than its parameters do),
# and its 230M for three stages, where Table 5 has 237M.

# %% tags=["nbval-check-output"]
# row: published (million parameters, GFLOPs) of each stage, shared, total; None: not printed
TABLES = {
    5: {
        "table5_1": [(169, 29.95), (108, 17.65), (47, 6.31), (43, 5.75), (237, 18.65)],
        "table5_2": [(168, 27.57), (138, 21.73), (72, 9.65), (68, 8.98), (242, 19.7)],
        "table5_3": [(189, 29.43), (160, 23.91), (103, 13.7), (98, 12.93), (256, 22.45)],
        "table5_4": [(174, 26.54), (126, 17.62), (103, 13.7), (98, 12.93), (207, 22.45)],
    },
    6: {
        "table6_1": [(238, 80.03), (189, 64.95), (161, 51.87), (79, 16.69), (428, 65.75)],
        "table6_2": [(206, 72.61), (158, 57.85), (108, 34.38), (55, 11.6), (361, 54.37)],
        "table6_3": [(274, 88.39), (224, 72.97), (170, 48.17), (108, 22.71), (452, 69.22)],
        "table6_4": [(316, 105.82), (224, 72.97), (170, 48.17), (108, 22.71), (494, 76.19)],
    },
    7: {
        "table7_1": [(108, 17.65), None, (108, 17.65)],
        "table7_2": [(136, 26.59), (95, 16.85), None, (188, 21.49)],
        "table5_1": [(169, 29.95), (108, 17.65), (47, 6.31), None, (230, 18.65)],
        "table7_4": [(159, 29.78), (95, 16.85), (71, 11.97), (32, 4.41), None, (284, 17.33)],
        "table7_5": [(154, 30.38), *[(88, 16.82)] * 2, (27, 4.42), (21, 3.28), None, (336, 17.03)],
    },
}


def average_gflops(table, name, rows):
    """Average the stages' GFLOPs as the table's total does (see above)."""
    cuts = NETWORKS[name]["boundaries"]
    if table == 5 or name == "table5_1":
        cuts = (0.426, 0.626)
    if table == 6:
        cuts = (0.4, 0.6)  # 8, 4 and 8 of 20 steps
    spans = enumerate(pairwise((0.0, *cuts, 1.0)))
    return sum((end - start) * rows[k]["gflops"] for k, (start, end) in spans)


def print_table(table):
    """Print Table 5, 6 or 7 of the paper, ours beside published, with the true FLOPs."""
    print(f"Table {table}       stage   million parameters   GFLOPs (paper's count)  true GFLOPs")
    print(f"{'':21s} {'ours':>10s} published {'ours':>12s} published")
    for name, printed in TABLES[table].items():
        rows = cost(name)
        rows["total"]["gflops"] = average_gflops(table, name, rows)
        for (k, row), pair in zip(rows.items(), printed, strict=True):
            stage = f"{k} of {len(NETWORKS[name]['decoders'])}" if isinstance(k, int) else k
            known = [f"{number:g}" for number in pair] if pair else ["", ""]
            true = f"{row['true_gflops']:10.1f}" if "true_gflops" in row else ""
            print(
                f"{name:13s} {stage:7s} {row['parameters'] / 1e6:10.2f} {known[0]:>9s} "
                f"{row['gflops']:12.2f} {known[1]:>9s} {true:>12s}"
            )


if __name__ == "__main__":
    if table not in (0, *TABLES):
        raise BadInput(f"table = {table}: take 5, 6 or 7, or 0 for the whole step")
    for number in [table] if table else TABLES:
        print_table(number)
    if table and workshop.flags():
        sys.exit()

# %% [markdown]
# ### Where the widths of Table 7 come from
#
# For other numbers of stages the paper interpolates: an interval gets the average of the values
# $p_0,p_1,p_2$ of the three stages, taken over its length:
#
# $$\hat p = \frac{1}{t_b-t_a}\sum_k p_k\,\big|[t_a,t_b]\cap[t_k,t_{k+1}]\big| \tag{23}$$


# %% tags=["nbval-check-output"]
def interpolate_parameters(interval, boundaries, p):
    """Average p, a value for each stage between boundaries, over an interval (t_a, t_b)."""
    (t_a, t_b), edges = interval, (0.0, *boundaries, 1.0)
    overlap = [max(0.0, min(t_b, end) - max(t_a, start)) for start, end in pairwise(edges)]
    total = sum(length * value for length, value in zip(overlap, p, strict=True))
    return total / (t_b - t_a)  # Eq. 23


if __name__ == "__main__" and not table:
    known = [million for million, _ in TABLES[5]["table5_1"][:3]], NETWORKS["table5_1"]["decoders"]
    print("stages  interval         parameters (M): eq. 23  Table 7    width: eq. 23  Table 7")
    for n in (2, 4, 5):
        printed, kind = TABLES[7][f"table7_{n}"], NETWORKS[f"table7_{n}"]
        for k, here in enumerate(pairwise((0.0, *kind["boundaries"], 1.0))):
            million, wide = [interpolate_parameters(here, PUBLISHED, p) for p in known]
            print(
                f"{n:6d}  {here[0]:.3f} to {here[1]:.3f} {million:23.0f} {printed[k][0]:8d} "
                f"{wide:16.0f} {kind['decoders'][k]:8d}"
            )

# %% [markdown]
# Equation 23 gives the trend but not the numbers: within a stage it can only repeat $p_k$. In the
# paper the encoder also shrinks as stages are added (128, 96, 64 channels), and the decoders make
# up for part of that. The paper does not say so. We take the published widths as they are.
