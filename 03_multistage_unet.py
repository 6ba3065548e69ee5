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
# will see that one stage gives back a plain U-Net, that a batch may mix stages, and what each stage
# costs.
#
# Why not one network for all times (*unified*)? It is too small for the fine work near the image
# and too large for the easy work near the noise, and the gradients of different times disturb each
# other. Why not one network a stage (*separate*)? Nothing is shared, so each sees less and
# overfits. The *multistage* network shares what is common, the encoder, and separates what is not.

# %%
import importlib
import math
import os

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

if __name__ == "__main__" and os.path.basename(os.getcwd()) == "notebooks":
    os.chdir("..")  # a notebook that was opened where it lies
sde = importlib.import_module("01_sde_and_denoiser")
BadInput = sde.BadInput

# %% tags=["parameters"]
network = "digits"  # the data set whose three networks are compared: digits, mnist or cifar10
seed = 0  # seed of every random number

# %%
sde.settings(globals(), "03_multistage_unet")

# %% [markdown]
# ## The parts
#
# Nothing here is special to stages: residual blocks that are told the time, self-attention on small
# feature maps, and halving or doubling of the resolution. Each part takes `(h, emb)`, so that they
# can stand in one list.


# %%
def norm(channels):
    """Build the GroupNorm used everywhere: about 4 channels a group, at most 16 groups."""
    groups = next(n for n in range(min(channels // 4, 16), 0, -1) if channels % n == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Transform (B, c_in, H, W) to (B, c_out, H, W), told the time by emb (B, e)."""

    def __init__(self, c_in, c_out, e, dropout):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(e, c_out)
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.conv2.weight)  # a block begins as the identity
        nn.init.zeros_(self.conv2.bias)

    def forward(self, h, emb):
        new = self.conv1(F.silu(self.norm1(h))) + self.time(F.silu(emb))[:, :, None, None]
        new = self.conv2(self.dropout(F.silu(self.norm2(new))))
        return self.skip(h) + new


class Attention(nn.Module):
    """Let every position of (B, c, H, W) attend to every other, with one head."""

    def __init__(self, c):
        super().__init__()
        self.norm, self.qkv, self.out = norm(c), nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, h, emb):
        q, k, v = self.qkv(self.norm(h)).flatten(2).transpose(1, 2).chunk(3, dim=2)  # (B, HW, c)
        new = F.scaled_dot_product_attention(q, k, v)
        return h + self.out(new.transpose(1, 2).reshape(h.shape))


class Down(nn.Module):
    """Halve the resolution of (B, c, H, W) by a strided convolution."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, h, emb):
        return self.conv(h)


class Up(nn.Module):
    """Double the resolution of (B, c, H, W) by repeating pixels; the next block smooths them."""

    def forward(self, h, emb):
        return F.interpolate(h, scale_factor=2, mode="nearest")


class Layers(nn.Sequential):
    """Run parts in a row that all take (h, emb)."""

    def forward(self, h, emb):
        for layer in self:
            h = layer(h, emb)
        return h


# %% [markdown]
# ## The encoder
#
# It turns a noisy picture and a time into features: one after the first convolution, one after
# every block and every halving (the *skips*), and the middle of the U. The time is embedded once,
# as sines and cosines of $999\,t$ and a small network, and shared by all decoders.


# %%
def sinusoid(tau, width):
    """Embed tau (B,) as sines and cosines of geometrically spaced frequencies: (B, width)."""
    half = width // 2
    i = torch.arange(half, device=tau.device) / max(half - 1, 1)
    angle = tau[:, None] * torch.exp(-math.log(10_000) * i)
    return torch.cat([angle.sin(), angle.cos()], 1)


class Encoder(nn.Module):
    """Turn x (B, C, H, W) and t (B,) into (middle, skips, emb), all that a decoder needs."""

    def __init__(self, channels, size, width, mults, blocks, attention, dropout, log_time):
        super().__init__()
        e, c = 4 * width, width
        self.width, self.log_time = width, log_time
        self.embed = nn.Sequential(nn.Linear(width, e), nn.SiLU(), nn.Linear(e, e))
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.skip_widths = [width]
        self.layers = nn.ModuleList()
        for level, mult in enumerate(mults):
            for _ in range(blocks):
                parts = [ResBlock(c, c := width * mult, e, dropout)]
                parts += [Attention(c)] if size in attention else []
                self.layers.append(Layers(*parts))
                self.skip_widths.append(c)
            if level < len(mults) - 1:
                self.layers.append(Down(c))
                self.skip_widths.append(c)
                size //= 2
        self.middle = Layers(ResBlock(c, c, e, dropout), Attention(c), ResBlock(c, c, e, dropout))

    def forward(self, x, t):
        # EDM (Karras et al. 2022) embeds c_noise = log(sigma) / 4 in place of the time
        emb = self.embed(sinusoid(t.log() / 4 if self.log_time else 999 * t, self.width))
        skips = [self.first(x)]
        for layer in self.layers:
            skips.append(layer(skips[-1], emb))
        return self.middle(skips[-1], emb), skips, emb


# %% [markdown]
# ## A decoder
#
# It climbs back to full resolution and consumes one skip a block. Its width is its own: the skips
# keep the encoder's channels, so a decoder of 16 channels may read from an encoder of 128.


# %%
class Decoder(nn.Module):
    """Turn the encoder's (middle, skips, emb) into a prediction (B, C, H, W)."""

    def __init__(self, channels, size, width, mults, blocks, attention, dropout, encoder):
        super().__init__()
        waiting, e = list(encoder.skip_widths), 4 * encoder.width
        c = waiting[-1]
        size //= 2 ** (len(mults) - 1)
        self.layers = nn.ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            for block in range(blocks + 1):
                parts = [ResBlock(c + waiting.pop(), c := width * mult, e, dropout)]
                parts += [Attention(c)] if size in attention and block == blocks else []
                parts += [Up()] if level and block == blocks else []
                self.layers.append(Layers(*parts))
            size *= 2
        self.norm, self.last = norm(c), nn.Conv2d(c, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)  # the first prediction is zero
        nn.init.zeros_(self.last.bias)

    def forward(self, middle, skips, emb):
        h = middle
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


# %%
class MultistageUNet(nn.Module):
    """Predict noise with a shared encoder and a decoder for each stage of the timeline.

    channels, size: of the pictures. encoder: channels of the encoder; decoders: those of each
    decoder, from the image end to the noise end; boundaries: the inner boundaries, ascending, one
    fewer than decoders. mults: channel multiplier of each resolution level; blocks: residual blocks
    a level (one more in decoders); attention: the sizes that get self-attention. shared=False gives
    every decoder its own encoder (`separate`). log_time: the time is a sigma, embed its logarithm.
    add_input: predict the noise as x plus what the decoder says.
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
        log_time=False,
        add_input=False,
    ):
        super().__init__()
        self.channels, self.size, self.multiple = channels, size, 2 ** (len(mults) - 1)
        self.add_input = add_input
        cuts = [float(tau) for tau in boundaries]
        if len(decoders) != len(cuts) + 1:
            raise BadInput(
                f"{len(decoders)} decoders need {len(decoders) - 1} boundaries, got {cuts}"
            )
        if cuts != sorted(set(cuts)) or (cuts and not cuts[0] > 0):
            raise BadInput(f"boundaries {cuts} must be positive and strictly ascending")
        if size % self.multiple:
            raise BadInput(f"size {size} must be divisible by {self.multiple}")
        common = (mults, blocks, attention, dropout)
        self.encoders = nn.ModuleList(
            Encoder(channels, size, encoder, *common, log_time)
            for _ in (decoders[:1] if shared else decoders)
        )
        self.decoders = nn.ModuleList(
            Decoder(channels, size, width, *common, self.encoders[0]) for width in decoders
        )
        self.register_buffer("boundaries", torch.tensor(cuts), persistent=False)

    def stage(self, t):
        """Tell which stage each time belongs to: (B,) int64; a boundary opens the later stage."""
        return torch.bucketize(t, self.boundaries.to(t.dtype), right=True)

    def branch(self, x, t, k):
        """Run the plain U-Net that stage k amounts to, whatever the times: (B, C, H, W)."""
        return self._finish(x, self.decoders[k](*self._encoder(k)(x, t)))

    def forward(self, x, t):
        """Predict the noise in x (B, C, H, W) at times t (B,); the batch may mix stages."""
        if (
            x.dim() != 4
            or x.shape[1] != self.channels
            or any(n % self.multiple for n in x.shape[2:])
        ):
            raise BadInput(
                f"x has shape {tuple(x.shape)}, but this network takes (B, {self.channels}, H, W) "
                f"with H and W divisible by {self.multiple}"
            )
        if len(self.decoders) == 1:
            return self.branch(x, t, 0)
        stage, parts, order = self.stage(t), [], []
        stages = stage.unique().tolist()
        if len(stages) == 1:
            return self.branch(x, t, stages[0])
        shared = self.encoders[0](x, t) if len(self.encoders) == 1 else None
        for k in stages:
            mine = (stage == k).nonzero()[:, 0]
            features = select(shared, mine) if shared else self.encoders[k](x[mine], t[mine])
            parts.append(self.decoders[k](*features))
            order.append(mine)
        return self._finish(x, torch.cat(parts)[torch.cat(order).argsort()])  # in the order of x

    def _finish(self, x, predicted):
        # paper: the decoder's output alone; here, for the small networks: plus x, because near the
        # noise x is the noise to within a percent, and learning to copy it costs them many steps
        return x + predicted if self.add_input else predicted

    def _encoder(self, k):
        return self.encoders[k if len(self.encoders) > 1 else 0]


def select(features, i):
    """Take the batch entries i (b,) out of the encoder's (middle, skips, emb)."""
    middle, skips, emb = features
    return middle[i], [skip[i] for skip in skips], emb[i]


# %% [markdown]
# ## Named networks
#
# A network is a dictionary of arguments. The widths follow the paper's chosen architecture (encoder
# 128, decoders 192, 128, 16), scaled to the size of the data.


# %%
PUBLISHED = (0.442, 0.6308)  # t_1, t_2 of the paper; step 04 puts those of the data set in place

NETWORKS = {
    "digits": dict(channels=1, size=8, encoder=32, decoders=(48, 32, 16), attention=(4,)),
    "digits_latent": dict(channels=2, size=4, encoder=32, decoders=(48, 32, 16), attention=(4,)),
    "mnist": dict(channels=1, size=28, encoder=32, decoders=(48, 32, 16), mults=(1, 2, 2)),
    "cifar10": dict(
        channels=3,
        size=32,
        encoder=64,
        decoders=(96, 64, 16),
        mults=(1, 2, 2),
        blocks=2,
        attention=(16,),
        dropout=0.1,
    ),
}
for name, network_of in list(NETWORKS.items()):
    width, stages = network_of["encoder"], len(network_of["decoders"])
    network_of = {**network_of, "add_input": True}
    NETWORKS[name] = {**network_of, "boundaries": PUBLISHED}
    NETWORKS[f"{name}_unified"] = {**network_of, "decoders": (width,)}
    NETWORKS[f"{name}_separate"] = {
        **NETWORKS[name],
        "decoders": (width,) * stages,
        "shared": False,
    }


def build(name, **changes):
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


if __name__ == "__main__":
    torch.manual_seed(seed)
    unified, model = randomize(build(f"{network}_unified")), randomize(build(network))
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
if __name__ == "__main__":
    model(x[:1], t[:1]).sum().backward()  # one picture of the noise end
    touched = [any(p.grad is not None for p in d.parameters()) for d in model.decoders]
    print("decoders that a picture at t = 0.9 trains:", touched)
    assert touched == [False, False, True]

# %% [markdown]
# ## What a stage costs
#
# Two counts, both for one picture. **GFLOPs as the paper prints them** are multiply-accumulates of
# convolutions, linear layers and GroupNorms only; attention is not counted. **True FLOPs** are what
# torch's own counter finds, two for each multiply-accumulate. Neither needs the weights, so the
# network is built on the `meta` device, which has shapes but no memory.


# %%
def macs_as_published(run, model):
    """Count multiply-accumulates of Conv2d, Linear and GroupNorm while `run()` uses the model."""
    macs = 0

    def count(layer, args, out):
        nonlocal macs
        if isinstance(layer, nn.Conv2d):
            macs += out.numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.Linear):
            macs += out.numel() * layer.in_features
        elif isinstance(layer, nn.GroupNorm):
            macs += 2 * out.numel()

    hooks = [layer.register_forward_hook(count) for layer in model.modules()]
    run()
    for hook in hooks:
        hook.remove()
    return macs


def cost(name, **changes):
    """Count parameters and work of a network: one dictionary a stage, then "total".

    Keys: parameters (encoder and decoder of the stage), gflops (as the paper counts, one picture),
    true_gflops (torch's counter). The total has parameters only. Changes as in `build`.
    """
    with torch.device("meta"):
        model = build(name, **changes)
        x, t = torch.empty(1, model.channels, model.size, model.size), torch.empty(1)
    rows = {}
    for k, decoder in enumerate(model.decoders):
        parts = nn.ModuleList([model._encoder(k), decoder])
        macs = macs_as_published(lambda k=k: model.branch(x, t, k), model)
        with FlopCounterMode(display=False) as counter:
            model.branch(x, t, k)
        rows[k] = dict(
            parameters=sum(p.numel() for p in parts.parameters()),
            gflops=macs / 1e9,
            true_gflops=counter.get_total_flops() / 1e9,
        )
    rows["total"] = dict(parameters=sum(p.numel() for p in model.parameters()))
    return rows


# %% tags=["nbval-check-output"]
if __name__ == "__main__":
    forms = [f"{network}_unified", f"{network}_separate", network]
    costs = {name: cost(name) for name in forms}
    print(f"{'network':18s} stage  parameters  GFLOPs (paper's count)  true GFLOPs")
    for name, rows in costs.items():
        for k, row in rows.items():
            work = [f"{row[kind]:.4f}" if kind in row else "" for kind in ("gflops", "true_gflops")]
            print(f"{name:18s} {k!s:5s} {row['parameters']:11,}  {work[0]:>22s}  {work[1]:>12s}")

# %%
if __name__ == "__main__":
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.6))
    kinds = (("parameters", "parameters (thousands)", 1e3), ("true_gflops", "true MFLOPs", 1e-3))
    for ax, (kind, label, unit) in zip(axes, kinds, strict=True):
        for i, (name, rows) in enumerate(costs.items()):
            stages = [k for k in rows if k != "total"]
            places = [k + 0.27 * (i - 1) for k in stages] if len(stages) > 1 else [-0.27]
            heights = [rows[k][kind] / unit for k in stages]
            form = name.removeprefix(network).strip("_") or "multistage"
            ax.bar(places, heights, 0.25, label=form, color=f"C{i}")
        ax.set(ylabel=label, xticks=range(3), xticklabels=["stage 0\n(image)", "1", "2\n(noise)"])
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    sde.show("figures/03_cost.png")

# %% [markdown]
# The multistage network spends most near the image and least near the noise, on top of the encoder,
# which every stage pays for. (The unified network has one bar: it costs the same at all times.)
#
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
