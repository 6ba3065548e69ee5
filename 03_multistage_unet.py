# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 03 · One encoder, a decoder for each stage
#
# **You will** build the network of the paper: a U-Net whose encoder serves all stages of the
# timeline and whose decoders serve one stage each, wide near the image, narrow near the noise. You
# will see that one stage gives back a plain U-Net, that a batch may mix stages, what each stage
# costs (Tables 5, 6 and 7), and how the authors' weights fit in.
#
# Why not one network for all times (*unified*)? It is too small for the fine work near the image
# and too large for the easy work near the noise, and the gradients of different times disturb each
# other. Why not one network a stage (*separate*)? Nothing is shared, so each sees less and
# overfits. The *multistage* network shares what is common, the encoder, and separates what is not.

# %%
import importlib
import os

if __name__ == "__main__" and os.path.basename(os.getcwd()) == "notebooks":
    os.chdir("..")  # a notebook that was opened where it lies
workshop = importlib.import_module("00_workshop")  # first: it readies the process for torch

import math
import sys
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sde = importlib.import_module("01_sde_and_denoiser")
BadInput = workshop.BadInput

# %% tags=["parameters"]
network = "digits"  # the data set whose three networks are compared: digits, mnist or cifar10
table = 0  # 5, 6 or 7: print that table of the paper and stop [0, 7]
seed = 0  # seed of every random number [0, 4294967295]

# %%
workshop.settings(globals(), "03_multistage_unet")

# %% [markdown]
# ## The parts
#
# Nothing here is special to stages: residual blocks that are told the time, self-attention on small
# feature maps, and halving or doubling of the resolution. Each part takes `(h, emb)`, so that they
# can stand in one list. (Step 06 builds an autoencoder of the same parts, which knows no time.)
#
# The paper builds on three networks of other papers: NCSN++ (for VP), DDPM++ (for EDM) and ADM (for
# latent diffusion). They are the same U-Net in slightly different taste, and one set of parts
# serves all three: `norm` (how many groups), `scale` (residual sums of NCSN++ and DDPM++ are divided
# by $\sqrt2$) and `heads` (channels of an attention head; none: one head).
#
# A GPU that can computes in bfloat16 (*autocast*). Two layers have their own mind about it: norms,
# which would fall back to float32 and then spend more time on moving numbers than all convolutions
# do on theirs, and the last layer, whose output is the prediction.


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


class ResBlock(nn.Module):
    """Transform (B, c_in, H, W) to (B, c_out, H, W), told the time by emb (B, e); e = 0: no time.

    resample: a `Filter` that changes the resolution on the way, inside the block.
    """

    def __init__(self, c_in, c_out, e, norm, dropout=0.0, scale=1.0, resample=None):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(e, c_out) if e else None
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        project = c_in != c_out or resample is not None
        self.skip = nn.Conv2d(c_in, c_out, 1) if project else nn.Identity()
        self.resample, self.dropout = resample or nn.Identity(), nn.Dropout(dropout)
        self.scale = scale

    def forward(self, h, emb=None):
        new = self.conv1(self.resample(F.silu(self.norm1(h))))
        if self.time:
            new = new + self.time(F.silu(emb))[:, :, None, None]
        new = self.conv2(self.dropout(F.silu(self.norm2(new))))
        return (self.skip(self.resample(h)) + new) * self.scale


class Attention(nn.Module):
    """Let every position of (B, c, H, W) attend to every other, in heads of `heads` channels."""

    def __init__(self, c, norm, heads=None, scale=1.0):
        super().__init__()
        self.norm, self.qkv, self.out = norm(c), nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)
        self.heads, self.scale = c // (heads or c), scale

    def forward(self, h, emb=None):
        B, c, H, W = h.shape
        qkv = self.qkv(self.norm(h)).reshape(B, 3, self.heads, c // self.heads, H * W)
        new = F.scaled_dot_product_attention(*qkv.transpose(3, 4).unbind(1))  # (B, heads, HW, d)
        return (h + self.out(new.transpose(2, 3).reshape(B, c, H, W))) * self.scale


class Layers(nn.Sequential):
    """Run parts in a row that all take (h, emb)."""

    def forward(self, h, emb=None):
        for layer in self:
            h = layer(h, emb)
        return h


# %% [markdown]
# Resolution changes in one of two ways. ADM has convolutions for it. NCSN++ and DDPM++ put a fixed
# *FIR filter* into a residual block: taps (1, 1) average or repeat pixels, (1, 3, 3, 1) is smoother.
# As the filter treats every channel alike, it is one depthwise convolution.


# %%
class Down(nn.Module):
    """Halve the resolution of (B, c, H, W) by a strided convolution."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, h, emb):
        return self.conv(h)


class Up(nn.Module):
    """Double the resolution of (B, c, H, W) by repeating pixels, then smooth by a convolution."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, h, emb=None):
        return self.conv(F.interpolate(h, scale_factor=2, mode="nearest"))


class Filter(nn.Module):
    """Halve ("down"), double ("up") or only "blur" (B, c, H, W) by FIR taps, as (1, 3, 3, 1)."""

    def __init__(self, taps, change):
        super().__init__()
        f = torch.tensor(taps, dtype=torch.float32)
        f = torch.outer(f, f) / f.sum() ** 2 * (4 if change == "up" else 1)
        self.register_buffer("f", f[None, None], persistent=False)
        self.change = change

    def forward(self, h):
        c, taps = h.shape[1], self.f.shape[-1]
        f = self.f.to(h.dtype).expand(c, 1, taps, taps)
        if self.change == "up":
            return F.conv_transpose2d(h, f, stride=2, padding=taps // 2 - 1 + taps % 2, groups=c)
        if self.change == "down":
            return F.conv2d(h, f, stride=2, padding=taps // 2 - 1 + taps % 2, groups=c)
        return F.conv2d(h, f, padding=taps // 2, groups=c)


class Pyramid(nn.Module):
    """Add the input, made smaller once more, to features: the input pyramid of NCSN++.

    It takes (p, h): p (B, c_in, 2H, 2W), the last of the pyramid, and h (B, c, H, W).
    """

    def __init__(self, c_in, c, taps):
        super().__init__()
        self.blur, self.conv = Filter(taps, "blur"), nn.Conv2d(c_in, c, 3, stride=2)

    def forward(self, p, h):
        return (h + self.conv(self.blur(p))) * 0.5**0.5


# %% [markdown]
# ## The time
#
# A network is told the time as sines and cosines of many frequencies. What counts as the time
# differs: $999\,t$ for VP, $\tfrac14\ln\sigma$ for EDM, and for latent diffusion the step of its
# schedule, $1000\,t-1$.


# %%
def embed_time(t, width, time):
    """Embed times t (B,) of the kernel `time`, "vp", "edm" or "ldm": (B, width)."""
    half = width // 2
    i = torch.arange(half, device=t.device)
    if time == "ldm":
        angle = (1000 * t - 1)[:, None] * torch.exp(-math.log(10_000) * i / half)
        return torch.cat([angle.cos(), angle.sin()], 1)
    tau = t.log() / 4 if time == "edm" else 999 * t
    angle = tau[:, None] * torch.exp(-math.log(10_000) * i / max(half - 1, 1))
    return torch.cat([angle.sin(), angle.cos()], 1)


# %% [markdown]
# ## The encoder
#
# It turns a noisy picture and a time into features: one after the first convolution, one after
# every block and every halving (the *skips*), and the middle of the U. The time is embedded once
# and shared by all decoders.
#
# `block` and `attend` build a residual block and an attention of the network's taste.


# %%
def resizing_part(c, change, block, taps):
    """Build the part that halves ("down") or doubles ("up") the resolution of c channels."""
    if taps is None:
        return Down(c) if change == "down" else Up(c)
    return block(c, c, resample=Filter(taps, change))


def middle_block(c, block, attend):
    """Build the middle of the U: (B, c, H, W) at the lowest resolution to the same shape."""
    return Layers(block(c, c), attend(c), block(c, c))


class Encoder(nn.Module):
    """Turn x (B, C, H, W) and t (B,) into (middle, skips, emb), all that a decoder needs."""

    def __init__(
        self, channels, width, time, pyramid, middle, size, mults, blocks, attention, *parts
    ):
        super().__init__()
        block, attend, taps = parts
        e, c, p = 4 * width, width, channels
        self.width, self.time = width, time
        self.embed = nn.Sequential(nn.Linear(width, e), nn.SiLU(), nn.Linear(e, e))
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.layers, self.skip_widths = nn.ModuleList(), [width]
        for level, mult in enumerate(mults):
            for _ in range(blocks):
                row = [block(c, c := width * mult)] + [attend(c)] * (size in attention)
                self.layers.append(Layers(*row))
                self.skip_widths.append(c)
            if level < len(mults) - 1:
                self.layers.append(Layers(resizing_part(c, "down", block, taps)))
                self.skip_widths.append(c)
                size //= 2
                if pyramid:
                    self.layers.append(Pyramid(p, p := c, taps))
        self.middle = middle_block(c, block, attend) if middle else Layers()

    def forward(self, x, t):
        emb = self.embed(embed_time(t.to(x.device), self.width, self.time).to(x.dtype))
        skips, p = [self.first(x)], x
        for layer in self.layers:
            if isinstance(layer, Pyramid):
                skips[-1] = p = layer(p, skips[-1])
            else:
                skips.append(layer(skips[-1], emb))
        return self.middle(skips[-1], emb), skips, emb


# %% [markdown]
# ## A decoder
#
# It climbs back to full resolution and consumes one skip a block. Its width is its own: the skips
# keep the encoder's channels, so a decoder of 16 channels may read from an encoder of 128.


# %%
class Decoder(nn.Module):
    """Turn the encoder's (middle, skips, emb) into a prediction (B, C, H, W).

    attended: the blocks that get attention at the sizes that have it: "every", the "last", "none".
    """

    def __init__(
        self, channels, width, attended, skips, middle, size, mults, blocks, attention, *parts
    ):
        super().__init__()
        block, attend, taps = parts
        waiting, norm = list(skips), block.keywords["norm"]
        c = waiting[-1]
        self.middle = middle_block(c, block, attend) if middle else Layers()
        size //= 2 ** (len(mults) - 1)
        self.layers = nn.ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            for i in range(blocks + 1):
                row = [block(c + waiting.pop(), c := width * mult)]
                if size in attention and (attended == "every" or (attended, i) == ("last", blocks)):
                    row.append(attend(c))
                if level and i == blocks:
                    row.append(resizing_part(c, "up", block, taps))
                self.layers.append(Layers(*row))
            size *= 2
        self.norm, self.last = norm(c), LastConv2d(c, channels, 3, padding=1)

    def forward(self, middle, skips, emb):
        h = self.middle(middle, emb)
        for layer, skip in zip(self.layers, reversed(skips), strict=True):
            h = layer(torch.cat([h, skip], 1), emb)
        return self.last(F.silu(self.norm(h)))


# %% [markdown]
# ## The multistage network
#
# The boundaries $t_1<\dots<t_{n-1}$ say which decoder a time belongs to: stage $k$ serves
# $[t_k,t_{k+1})$. All pictures of a batch go through the encoder together; then each decoder takes
# its own.
#
# `unified` is one stage. `separate` has an encoder of its own for each decoder. Neither needs a
# second class.
#
# The first eleven arguments make the plain network that the next steps train. The others say what
# distinguishes the three published ones.


# %%
class MultistageUNet(nn.Module):
    """Predict noise with a shared encoder and a decoder for each stage of the timeline.

    channels, size: of the pictures. encoder: channels of the encoder; decoders: those of each
    decoder, from the image end to the noise end; boundaries: the inner boundaries, ascending, one
    fewer than decoders. mults: channel multiplier of each resolution level; blocks: residual blocks
    a level (one more in decoders); attention: the sizes that get self-attention. shared=False gives
    every decoder its own encoder (`separate`). add_input: predict x plus what the decoder says.

    time: the kernel that times belong to, "vp", "edm" or "ldm". norm: groups at most, channels a
    group at least, eps. taps: of the filter that changes the resolution inside residual blocks,
    whose sums are then scaled by 1/sqrt(2); None: convolutions do, nothing is scaled. pyramid: add
    the filtered input at each resolution. heads: channels of an attention head; None: one head.
    attended: the decoders' blocks with attention, "last", "every" or "none", one for all or one
    each. middle: the part that has the middle of the U, "encoder" or "decoder".
    Raises BadInput for contradictory settings. Source: paper, Section 3.1 and Figure 1(c).
    """

    def __init__(
        self,
        channels,
        size,
        encoder,
        decoders,
        boundaries=(),
        mults=(1, 2),
        blocks=1,
        attention=(),
        dropout=0.0,
        shared=True,
        add_input=False,
        time="vp",
        norm=(16, 4, 1e-6),
        taps=None,
        pyramid=False,
        heads=None,
        attended="last",
        middle="encoder",
    ):
        super().__init__()
        self.channels, self.size, self.multiple = channels, size, 2 ** (len(mults) - 1)
        self.add_input, self.latest = add_input, math.inf if time == "edm" else 1.0
        cuts = [float(tau) for tau in boundaries]
        if len(decoders) != len(cuts) + 1:
            raise BadInput(
                f"{len(decoders)} decoders need {len(decoders) - 1} boundaries, got {cuts}"
            )
        if cuts != sorted(set(cuts)) or not all(0 < tau < self.latest for tau in cuts):
            raise BadInput(
                f"boundaries {cuts} must be positive, strictly ascending and below {self.latest:g}"
            )
        if size % self.multiple:
            raise BadInput(f"size {size} must be divisible by {self.multiple}")
        attended = [attended] * len(decoders) if isinstance(attended, str) else attended
        known = [(time, ("vp", "edm", "ldm")), (middle, ("encoder", "decoder"))]
        for value, names in known + [(where, ("every", "last", "none")) for where in attended]:
            if value not in names:
                raise BadInput(f"{value!r} is unknown here: take one of {', '.join(names)}")
        if pyramid and taps is None:
            raise BadInput("the pyramid needs a filter: give taps, as (1, 3, 3, 1)")
        norm, scale = partial(group_norm, *norm), 1.0 if taps is None else 0.5**0.5
        block = partial(ResBlock, e=4 * encoder, norm=norm, dropout=dropout, scale=scale)
        attend = partial(Attention, norm=norm, heads=heads, scale=scale)
        plan = (size, mults, blocks, attention, block, attend, taps)
        self.encoders = nn.ModuleList(
            Encoder(channels, encoder, time, pyramid, middle == "encoder", *plan)
            for _ in (decoders[:1] if shared else decoders)
        )
        skips = self.encoders[0].skip_widths
        self.decoders = nn.ModuleList(
            Decoder(channels, width, where, skips, middle == "decoder", *plan)
            for width, where in zip(decoders, attended, strict=True)
        )
        self.register_buffer("boundaries", torch.tensor(cuts), persistent=False)
        self.cuts = cuts  # the same as plain numbers, which can be compared with times anywhere
        self.apply(initialize_part)

    def stage(self, t):
        """Tell which stage each time belongs to: (B,) int64; a boundary opens the later stage.

        Raises BadInput for times off the timeline, NaN included.
        """
        stage = self._stage(t)
        if (stage < 0).any():
            self._refuse(t)
        return stage

    def _stage(self, t):
        stage = torch.zeros_like(t, dtype=torch.int64)
        for tau in self.cuts:
            stage += t >= tau
        return stage.masked_fill(~((t >= 0) & (t <= self.latest)), -1)

    def _refuse(self, t):
        t = t[~((t >= 0) & (t <= self.latest))][0]
        raise BadInput(f"t = {float(t):g} lies outside the timeline [0, {self.latest:g}]")

    def branch(self, x, t, k):
        """Run the plain U-Net that stage k amounts to, whatever the times: (B, C, H, W)."""
        return self._finish(x, self.decoders[k](*self._encoder(k)(x, t)))

    def forward(self, x, t, stage=None):
        """Predict the noise in x (B, C, H, W) at times t (B,); the batch may mix stages.

        stage: saves looking at t, for which a GPU has to be waited for, where the caller knows it:
        the stage of all of them, or a list of stages, each once, that the batch takes in turns.
        """
        if (
            x.dim() != 4
            or x.shape[1] != self.channels
            or any(n % self.multiple for n in x.shape[2:])
        ):
            raise BadInput(
                f"x has shape {tuple(x.shape)}, but this network takes (B, {self.channels}, H, W) "
                f"with H and W divisible by {self.multiple}"
            )
        if isinstance(stage, int) or len(self.decoders) == 1:
            return self.branch(x, t, stage if isinstance(stage, int) else 0)
        places = self._places(t) if stage is None else places_in_turns(stage, len(x), x.device)
        if len(places) == 1:
            return self.branch(x, t, *places)
        shared, parts = self.encoders[0](x, t) if len(self.encoders) == 1 else None, []
        for k, mine in places.items():
            features = (
                select_entries(shared, mine) if shared else self.encoders[k](x[mine], t[mine])
            )
            parts.append(self.decoders[k](*features))
        order = torch.cat(list(places.values())).argsort()
        return self._finish(x, torch.cat(parts)[order])  # in the order of x

    def _places(self, t):
        stage = self._stage(t)
        stages = stage.unique().tolist()  # the one value that has to come from the device
        if stages[0] < 0:
            self._refuse(t)
        return {k: (stage == k).nonzero()[:, 0] for k in stages}

    def _finish(self, x, predicted):
        # paper: the decoder's output alone; here, for the small networks: plus x, because near the
        # noise x is the noise to within a percent, and learning to copy it costs them many steps
        return x + predicted if self.add_input else predicted

    def _encoder(self, k):
        return self.encoders[k if len(self.encoders) > 1 else 0]


def places_in_turns(stages, n, device):
    """Tell which of n pictures are in which stage where they take them in turns: {k: (b,)}."""
    places = torch.arange(n, device=device)
    return {k: places[i :: len(stages)] for i, k in enumerate(stages[:n])}


def select_entries(features, i):
    """Take the batch entries i (b,) out of the encoder's (middle, skips, emb)."""
    middle, skips, emb = features
    return middle[i], [skip[i] for skip in skips], emb[i]


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
# A network is a dictionary of arguments. First those of this course, small, for pictures of 8 to 32
# pixels, each in three forms. Their widths follow the paper's choice (encoder 128, decoders 192, 128,
# 16), scaled to the data.

# %%
PUBLISHED = (0.442, 0.6308)  # t_1, t_2 of the paper; step 04 puts those of the data set in place
STEPS = (0.4425, 0.6315)  # amid two steps of LDM: 442 and 631 are the times 0.443 and 0.632
LATENT = dict(boundaries=STEPS, time="ldm")

NETWORKS = {}
for name, known in workshop.DATASETS.items():
    if "network" not in known:
        continue  # of those the paper's are trained
    (C, size, _), plan = known["shape"], known["autoencoder"]
    latent = dict(channels=plan["code"], size=size // 2 ** (len(plan["mults"]) - 1))
    for kind, small in {
        name: dict(channels=C, size=size, boundaries=PUBLISHED, **known["network"]),
        f"{name}_latent": {**latent, **LATENT, **known["latent_network"]},
    }.items():
        NETWORKS[kind] = small = {**small, "add_input": True}
        NETWORKS[f"{kind}_unified"] = {**small, "decoders": (small["encoder"],), "boundaries": ()}
        NETWORKS[f"{kind}_separate"] = {**small, "decoders": (small["encoder"],) * 3}
        NETWORKS[f"{kind}_separate"]["shared"] = False
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
ALONE = dict(shared=False)
for name, (backbone, cuts), encoder, decoders, more in [
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
    widths = dict(encoder=encoder, decoders=decoders, boundaries=cuts)
    NETWORKS[name] = {**backbone, **widths, **more}


def build_network(name, **changes):
    """Build a network of NETWORKS by name, with some arguments of `MultistageUNet` changed.

    Raises BadInput for an unknown name.
    """
    if name not in NETWORKS:
        raise BadInput(f"unknown network {name!r}: take one of {', '.join(sorted(NETWORKS))}")
    return MultistageUNet(**{**NETWORKS[name], **changes})


# %% [markdown]
# ## Two checks
#
# **One stage is a plain U-Net.** With one decoder, `forward` is `x + decoder(encoder(x, t))`, nothing
# else. **Mixed batches.** Each picture must get what it would get alone, and must not touch another
# decoder.


# %%
def randomize(model, seed=0):
    """Fill every parameter with noise: zero-initialised layers would make checks empty."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.1
    return model.eval()


if __name__ == "__main__" and not table:
    torch.manual_seed(seed)
    unified, model = (
        randomize(build_network(f"{network}_unified")),
        randomize(build_network(network)),
    )
    x = torch.randn(6, model.channels, model.size, model.size)
    t = torch.tensor([0.9, 0.1, 0.5, 0.05, 0.5, 0.7])
    plain = x + unified.decoders[0](*unified.encoders[0](x, t))
    print("one stage equals a plain U-Net:", torch.equal(unified(x, t), plain))
    assert torch.equal(unified(x, t), plain)

    alone = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(len(x))])
    print("stages of the batch:", model.stage(t).tolist())
    print(f"largest difference mixed - alone: {(model(x, t) - alone).abs().max():.1e}")
    torch.testing.assert_close(model(x, t), alone, rtol=1e-4, atol=1e-4)

# %%
if __name__ == "__main__" and not table:
    model(x[:1], t[:1]).sum().backward()  # one picture of the noise end
    touched = [any(p.grad is not None for p in d.parameters()) for d in model.decoders]
    print("decoders that a picture at t = 0.9 trains:", touched)
    assert touched == [False, False, True]

# %% [markdown]
# ## What it looks like
#
# Drawn from the module itself: a bar is a layer, its length the channels, its colour the resolution.
# Each layer of a decoder stands beside the layer of the encoder whose skip it reads.


# %%
def count_parameters(*modules):
    """Count the parameters of modules."""
    return sum(p.numel() for part in modules for p in part.parameters())


def draw_architecture(name, path):
    """Draw a network of NETWORKS: a column for the encoder, one for each decoder."""
    with torch.device("meta"):
        model = build_network(name)
        x, t = torch.empty(1, model.channels, model.size, model.size), torch.empty(1)
        _, skips, _ = model.encoders[0](x, t)
    sizes = [skip.shape[2] for skip in skips]
    columns = [[skip.shape[1] for skip in skips]]
    columns += [[part[0].conv1.out_channels for part in d.layers][::-1] for d in model.decoders]
    titles = [f"encoder\nall stages\n{count_parameters(model.encoders[0]) / 1e6:.3g}M"]
    cuts = [0, *NETWORKS[name]["boundaries"], model.latest]
    for k, decoder in enumerate(model.decoders):
        titles.append(
            f"decoder {k}\n{cuts[k]:.3g} to {cuts[k + 1]:.3g}\n{count_parameters(decoder) / 1e6:.3g}M"
        )
    gap, high = 1.35 * max(map(max, columns)), len(sizes)
    figure, ax = plt.subplots(figsize=(9, 1.5 + 0.08 * max(high, 16)))
    ax.hlines(range(high), 0, gap * (len(columns) - 1), color="0.85", lw=0.8, zorder=0)  # skips
    for j, (widths, title) in enumerate(zip(columns, titles, strict=True)):
        for i, size in enumerate(sorted(set(sizes), reverse=True)):
            rows = [row for row in range(high) if sizes[row] == size]
            wide = [widths[row] for row in rows]
            left = [j * gap - w / 2 for w in wide]
            ax.barh(
                rows, wide, 0.8, left, color=f"C{i}", label=f"{size}×{size}" if j == 0 else None
            )
        ax.text(j * gap, -0.05 * high - 0.5, title, ha="center", va="bottom", fontsize=9)
    for j in [0] if len(model.encoders[0].middle) else range(1, len(columns)):
        label = "middle" if j < 2 else None
        ax.barh(
            high + 0.2, columns[0][-1], 0.8, j * gap - columns[0][-1] / 2, color="0.6", label=label
        )
    ax.invert_yaxis()
    ax.axis("off")
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    workshop.show_figure(path)


if __name__ == "__main__" and not table:
    draw_architecture(network, "figures/03_network.png")
    draw_architecture("table5_1", "figures/03_published.png")

# %% [markdown]
# Above the small network, below the published one for CIFAR-10, which has 36 layers a side. (Bars
# show widths, not work: a layer of equal width costs 64 times more at 32×32 than at 4×4.)
#
# ## What a stage costs
#
# Two counts, both for one picture. **GFLOPs as the paper prints them** are multiply-accumulates of
# convolutions, linear layers and GroupNorms only; attention and filters are not counted. **True
# FLOPs** are what torch's own counter finds, two for each multiply-accumulate. Neither needs the
# weights, so the network is built on the `meta` device, which has shapes but no memory.


# %%
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


def count_work(run, model):
    """Count what `run()` does with the model, in both ways: {"gflops", "true_gflops"}."""
    with FlopCounterMode(display=False) as counter:
        macs = macs_as_published(run, model)
    return dict(gflops=macs / 1e9, true_gflops=counter.get_total_flops() / 1e9)


def cost(name, **changes):
    """Count parameters and work of a network: a dictionary for each stage, "shared" and "total".

    Keys: parameters (encoder and decoder of the stage), gflops (as the paper counts, one picture),
    true_gflops (torch's counter). "shared" is the encoder; the total has parameters only, as its
    work depends on the sampler. Changes as in `build`.
    """
    with torch.device("meta"):
        return cost_of(build_network(name, **changes))


def cost_of(model):
    """Count parameters and work of a network that lies on the meta device, as `cost`."""
    x = torch.empty(1, model.channels, model.size, model.size, device="meta")
    t = torch.empty(1, device="meta")
    features = model.encoders[0](x, t)
    shared = count_work(lambda: model.encoders[0](x, t), model)
    rows = {}
    for k, decoder in enumerate(model.decoders):
        alone = count_work(lambda decoder=decoder: decoder(*features), model)
        rows[k] = {kind: shared[kind] + alone[kind] for kind in shared}
        rows[k]["parameters"] = count_parameters(model._encoder(k), decoder)
    if len(model.encoders) == 1:
        rows["shared"] = {**shared, "parameters": count_parameters(*model.encoders)}
    rows["total"] = dict(parameters=count_parameters(model))
    return rows


def kept_bytes(run, model):
    """Count the bytes that autograd keeps for the backward pass of `run()`, without parameters.

    On `meta` tensors too, which hold no numbers: it tells what would not fit before it is tried.
    """
    own, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for key, storage in kept.items() if key not in own)


# %% tags=["nbval-check-output"]
if __name__ == "__main__" and not table:
    forms = [f"{network}_unified", f"{network}_separate", network]
    costs = {name: cost(name) for name in forms}
    print(f"{'network':18s} stage   parameters  GFLOPs (paper's count)  true GFLOPs")
    for name, rows in costs.items():
        for k, row in rows.items():
            work = [f"{row[kind]:.4f}" if kind in row else "" for kind in ("gflops", "true_gflops")]
            print(f"{name:18s} {k!s:6s} {row['parameters']:11,}  {work[0]:>22s}  {work[1]:>12s}")


# %%
def draw_costs(networks, path):
    """Draw parameters and GFLOPs a stage as bars: networks is {label: name of NETWORKS}."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.6))
    kinds = (("parameters", "million parameters", 1e6), ("gflops", "GFLOPs (paper's count)", 1))
    for i, (label, name) in enumerate(networks.items()):
        rows = cost(name)
        stages = [k for k in rows if isinstance(k, int)]
        places = [k + 0.27 * (i - 1) for k in stages] if len(stages) > 1 else [-0.27]
        for ax, (kind, title, unit) in zip(axes, kinds, strict=True):
            heights = [rows[k][kind] / unit for k in stages]
            ax.bar(places, heights, 0.25, label=label, color=f"C{i}")
            ax.set(ylabel=title, xticks=range(3), xticklabels=["0 (image)", "1", "2 (noise)"])
            ax.set_xlabel("stage")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    workshop.show_figure(path)


if __name__ == "__main__" and not table:
    small = {"unified": forms[0], "separate": forms[1], "multistage": network}
    draw_costs(small, "figures/03_cost.png")
    large = {"unified": "table7_1", "separate": "table3_separate", "multistage": "table5_1"}
    draw_costs(large, "figures/03_cost_published.png")

# %% [markdown]
# The multistage network spends most near the image and least near the noise, on top of the encoder,
# which every stage pays for. (The unified network has one bar: it costs the same at all times.)
#
# ## Tables 5, 6 and 7
#
# Next to every number the published one. A table's *total* GFLOPs are an average over stages, and
# what reproduces them differs from table to table:
#
# * **Table 5** says "weighted by NFE". Its totals are averages over *uniform times* with the cuts
#   0.426 and 0.626, which are Algorithm 2's for three stages and not the network's. (DPM-Solver's 20
#   evaluations, evenly spread in log-SNR, fall 11, 2 and 7 times into the stages: 20.4 GFLOPs for
#   the first row, not 18.65.)
# * **Table 6**: 20 uniform steps, of which 8, 4 and 8 fall into the stages.
# * **Table 7**: the lengths of the intervals.
#
# Three printed entries fit no network and are taken for slips: the total GFLOPs of Table 5's last
# row (they repeat the row above), the GFLOPs of Table 7's two stages (those of other widths than
# its parameters) and its 230M for three stages, which are Table 5's 237M.

# %%
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
        "table7_5": [
            (154, 30.38),
            (88, 16.82),
            (88, 16.82),
            (27, 4.42),
            (21, 3.28),
            None,
            (336, 17.03),
        ],
    },
}


def average_gflops(table, name, rows):
    """Average the stages' GFLOPs as the table's total does (see above)."""
    cuts = NETWORKS[name]["boundaries"]
    if table == 5 or name == "table5_1":
        cuts = (0.426, 0.626)
    if table == 6:
        cuts = (0.4, 0.6)  # 8, 4 and 8 of 20 steps
    edges = (0.0, *cuts, 1.0)
    return sum((edges[k + 1] - edges[k]) * rows[k]["gflops"] for k in range(len(cuts) + 1))


def print_table(table):
    """Print Table 5, 6 or 7 of the paper, ours beside published, with the true FLOPs."""
    print(f"Table {table}       stage   million parameters   GFLOPs (paper's count)  true GFLOPs")
    print(f"{'':21s} {'ours':>10s} published {'ours':>12s} published")
    for name, printed in TABLES[table].items():
        rows = cost(name)
        rows["total"]["gflops"] = average_gflops(table, name, rows)
        for (k, row), pair in zip(rows.items(), printed, strict=True):
            stage = f"{k + 1}/{len(NETWORKS[name]['decoders'])}" if isinstance(k, int) else k
            known = [f"{number:g}" for number in pair] if pair else ["", ""]
            true = f"{row['true_gflops']:10.1f}" if "true_gflops" in row else ""
            print(
                f"{name:13s} {stage:7s} {row['parameters'] / 1e6:10.2f} {known[0]:>9s} "
                f"{row['gflops']:12.2f} {known[1]:>9s} {true:>12s}"
            )


# %%
if __name__ == "__main__":
    if table not in (0, *TABLES):
        raise BadInput(f"table = {table}: take 5, 6 or 7, or 0 for the whole step")
    for number in [table] if table else TABLES:
        print_table(number)
    if table and not workshop.NOTEBOOK:
        sys.exit()

# %% [markdown]
# ### Where the widths of Table 7 come from
#
# For other numbers of stages the paper interpolates: an interval gets the average of the three-stage
# $p_1,p_2,p_3$ over its length (eq. 23).


# %%
def interpolate_parameters(interval, boundaries, p):
    """Average p, one value a stage, over an interval (t_a, t_b) of [0, 1]: a float.

    boundaries: those of the stages that p belongs to. Source: paper, Eq. 23.
    """
    t_a, t_b = interval
    edges = (0.0, *boundaries, 1.0)
    overlap = [
        max(0.0, min(t_b, end) - max(t_a, start))
        for start, end in zip(edges, edges[1:], strict=False)
    ]
    return sum(length * value for length, value in zip(overlap, p, strict=True)) / (t_b - t_a)


# %%
if __name__ == "__main__" and not table:
    p = [million for million, _ in TABLES[5]["table5_1"][:3]]
    width = NETWORKS["table5_1"]["decoders"]
    print("stages  interval         parameters (M): eq. 23  Table 7    width: eq. 23  Table 7")
    for n in (2, 4, 5):
        printed, kind = TABLES[7][f"table7_{n}"], NETWORKS[f"table7_{n}"]
        edges = (0.0, *kind["boundaries"], 1.0)
        for k in range(n):
            here = edges[k], edges[k + 1]
            million = interpolate_parameters(here, PUBLISHED, p)
            wide = interpolate_parameters(here, PUBLISHED, width)
            print(
                f"{n:6d}  {here[0]:.3f} to {here[1]:.3f} {million:23.0f} {printed[k][0]:8d} "
                f"{wide:16.0f} {kind['decoders'][k]:8d}"
            )

# %% [markdown]
# Equation 23 gives the direction and not the numbers. Within stage one it can only repeat $p_1$ (169
# million or a width of 192), and the published first stages have 159 and 154 million, widths of 208
# and 224; within stage three only $p_3$, and they have 32 and 21 million. The encoder shrinks
# with the number of stages (128, 96, 64 channels) and the decoders take up part of what it loses:
# a second choice, which the paper does not mention. We take the published widths as they are.
#
# ## The authors' checkpoints
#
# The release names its parameters otherwise, but their *order* is that of the modules above: going
# through both side by side fills the network. What differs is stored differently: 1×1 convolutions
# of attention as matrices (NCSN++) or over sequences (ADM), and $q,k,v$ apart, interleaved, or head
# by head.


# %%
def match_release(model, named):
    """Pair the release's parameters with a network's: its state dict.

    named: [(name, tensor)] in the release's order. Raises BadInput where they do not fit.
    """
    waiting, found = list(named)[::-1], {}
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d, nn.GroupNorm)):
            continue
        apart = name.endswith("qkv") and waiting and 3 * len(waiting[-1][1]) == len(layer.weight)
        pairs = 3 if apart else 1
        taken = [waiting.pop() for _ in range(2 * pairs) if waiting]
        if len(taken) < 2 * pairs:
            raise BadInput(f"the checkpoint ends before {name}")
        weight, bias = [tensor for _, tensor in taken[::2]], [tensor for _, tensor in taken[1::2]]
        if isinstance(layer, nn.Conv2d) and weight[0].dim() == 2:
            weight = [matrix.T for matrix in weight]  # NCSN++ has (in, out)
        weight, bias = torch.cat(weight), torch.cat(bias)
        if name.endswith("qkv") and pairs == 1:  # head by head, or the three interleaved
            first = model.get_submodule(name[:-4]).heads if weight.dim() == 3 else len(bias) // 3
            weight, bias = (
                v.reshape(first, 3, -1).transpose(0, 1).reshape(v.shape) for v in (weight, bias)
            )
        weight = weight.reshape(*weight.shape, *[1] * (layer.weight.dim() - weight.dim()))
        for kind, tensor in (("weight", weight), ("bias", bias)):
            if tensor.shape != getattr(layer, kind).shape:
                raise BadInput(
                    f"{taken[0][0]} has shape {tuple(tensor.shape)}, "
                    f"where {name} has {tuple(getattr(layer, kind).shape)}"
                )
            found[f"{name}.{kind}"] = tensor.contiguous()
    if waiting:
        raise BadInput(f"the checkpoint has {waiting[-1][0]}, for which there is no place")
    return found


class Inert:
    """Stand in for a class that a checkpoint names but nobody needs."""


LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"  # LDM's files name it


def read_tensors(path):
    """Read a checkpoint of others onto the CPU, as plain tensors and never as code.

    Raises BadInput where there is none, or it is damaged or holds code.
    """
    try:
        with torch.serialization.safe_globals([(Inert, LIGHTNING)]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"there is no checkpoint {path}") from None
    except Exception as error:  # a torn file fails in many ways
        reason = str(error).split("\n")[0][:150]
        raise BadInput(
            f"{path} cannot be read as plain tensors ({reason}): it is damaged, or holds "
            "pickled code; download it again, or save its tensors alone where you trust it"
        ) from None


def release_parameters(saved, averaged=True):
    """List the network's parameters [(name, tensor)] in what a release checkpoint holds.

    The list is empty where it holds no multistage network.
    """
    saved = saved if isinstance(saved, dict) else {}
    state, shadow = saved.get("model", {}), saved.get("ema", {}).get("shadow_params")
    if "state_dict" in saved:  # LDM
        state, prefix = saved["state_dict"], "model.diffusion_model."
        mean = lambda name: "model_ema.diffusion_model" + name.replace(".", "")  # noqa: E731
        state = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        shadow = [saved["state_dict"].get(mean(name), v) for name, v in state.items()]
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if not any(name.startswith("de_modules.") for name in state):
        return []
    named = [(n, v) for n, v in state.items() if n != "sigmas"]  # a table, no parameter
    if averaged and shadow is not None:
        if len(shadow) != len(named):
            raise BadInput(f"{len(shadow)} averaged weights for {len(named)} parameters")
        named = [(name, mean) for (name, _), mean in zip(named, shadow, strict=True)]

    def place(entry):  # LDM lists the last layers of all decoders at the end
        part, k, *_ = (*entry[0].split("."), "")
        return (int(k), part == "outs") if part in ("de_modules", "outs") else (-1, False)

    return sorted(named, key=place)


def load_release_checkpoint(path, averaged=True):
    """Read a network from a checkpoint of the authors' release: a `MultistageUNet` in eval mode.

    Their multistage DPM-Solver checkpoints ("model", with or without "module." before the names,
    and "ema", a list in parameter order) and LDM's ("state_dict" with "model.diffusion_model." and
    "model_ema." names) are known; the network is the one of NETWORKS that they fit. averaged: take
    the averaged weights where the file has them. Only tensors are read, never code.
    Raises BadInput for anything else.
    """
    saved = read_tensors(path)
    try:
        named = release_parameters(saved, averaged)
        width = next((len(v) for _, v in named if v.dim() == 4), None)
        reason = "it lacks their entries" if width is None else f"none has an encoder of {width}"
        for name in [n for n, kind in NETWORKS.items() if kind["encoder"] == width]:
            with torch.device("meta"):
                blank = build_network(name)
            try:
                found = match_release(blank, named)
            except BadInput as error:
                reason = f"{name}: {error}"
                continue
            model = build_network(name)
            model.load_state_dict(found)
            return model.eval()
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        reason = str(error)  # not what these entries should be
    raise BadInput(f"{path} holds none of the published networks ({reason})")


# %% [markdown]
# **You have** the architecture of the paper in three forms behind one call, and its price a stage.
# Step 04 trains it.
#
# ### Exercises
#
# 1. Give stage 2 a decoder of 8 channels: `cost("digits", decoders=(48, 32, 8))`. What share of the
#    stage is now encoder? <details><summary>Solution</summary>Nearly all of it. Below some width a
#    decoder costs next to nothing, and the shared encoder is the floor.</details>
# 2. Build a two-stage network with the boundary at 0.5. <details><summary>Solution</summary>
#    `build("digits", decoders=(48, 16), boundaries=[0.5])`.</details>
