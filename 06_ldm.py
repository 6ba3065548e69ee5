# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 06 · The same idea in latent space
#
# **You will** squeeze pictures into a small latent code with an autoencoder, train the multistage
# model of steps 03 and 04 on the codes instead of the pixels, and decode what it draws. Nothing of
# the diffusion model changes: a code is a small picture with unusual channels. The paper's largest
# saving, 30% of the training compute, is of this kind (latent diffusion on CelebA 256×256).

# %%
import importlib
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

if __name__ == "__main__" and os.path.basename(os.getcwd()) == "notebooks":
    os.chdir("..")  # a notebook that was opened where it lies
sde = importlib.import_module("01_sde_and_denoiser")
training = importlib.import_module("04_train")
evaluation = importlib.import_module("05_sample_eval")
BadInput = sde.BadInput

# %% tags=["parameters"]
code_steps = 300  # training steps of the autoencoder
steps = 400  # training steps of the latent model
batch = 128  # codes a step
lr = 0.002  # Adam's learning rate of the latent model
sampler = "dpm-solver-3"  # ddim, dpm-solver-2, dpm-solver-3, euler-maruyama, probability-flow
nfe = 20  # evaluations of the network for one code
samples = 898  # pictures to draw and to measure; at most half the data set
seed = 0  # seed of every random number
name = "digits-latent"  # name of the run
out = "runs"  # the folder that holds the runs

# %%
sde.settings(globals(), "06_ldm")

# %% [markdown]
# ## Squeezing
#
# A variational autoencoder maps an 8×8 digit to a Gaussian over codes of shape 2×4×4: half as many
# numbers as pixels. The loss is the squared error of the reconstruction plus a faint pull of the
# codes towards $\mathcal N(0, I)$, which keeps the code space free of holes:
#
# $$\mathcal L=\|x-\mathrm{dec}(z)\|^2+\beta\,\mathrm{KL}\big(\mathcal N(\mu(x),\operatorname{diag}v(x))\,\|\,\mathcal N(0,I)\big),
#   \qquad z=\mu+\sqrt v\,\epsilon .$$


# %%
class Autoencoder(nn.Module):
    """Map pictures (B, 1, H, W) in [-1, 1] to codes (B, 2, H/2, W/2) and back."""

    def __init__(self, channels=1, code=2, width=32):
        super().__init__()
        conv = lambda i, o, **kw: nn.Conv2d(i, o, 3, padding=1, **kw)  # noqa: E731
        self.encoder = nn.Sequential(
            *(conv(channels, width), nn.SiLU(), conv(width, width, stride=2), nn.SiLU()),
            *(conv(width, width), nn.SiLU(), conv(width, 2 * code)),
        )
        self.decoder = nn.Sequential(
            *(conv(code, width), nn.SiLU(), conv(width, 4 * width), nn.PixelShuffle(2), nn.SiLU()),
            *(conv(width, width), nn.SiLU(), conv(width, channels)),
        )

    def encode(self, x):
        """Return mean and log-variance of the code, each (B, 2, H/2, W/2)."""
        return self.encoder(x).chunk(2, dim=1)

    def decode(self, z):
        return self.decoder(z)


def train_autoencoder(model, images, steps, batch=128, lr=2e-3, beta=1e-4, seed=0):
    """Train an Autoencoder on pictures (N, 1, H, W) in [-1, 1], yielding (step, mse, kl)."""
    generator = torch.Generator(images.device).manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for step in range(1, steps + 1):
        x = images[torch.randint(len(images), (batch,), generator=generator, device=images.device)]
        mean, log_var = model.encode(x)
        noise = torch.randn(mean.shape, generator=generator, device=x.device)
        mse = F.mse_loss(model.decode(mean + noise * torch.exp(log_var / 2)), x)
        kl = (mean**2 + log_var.exp() - 1 - log_var).mean() / 2  # a code entry, in nats
        optimizer.zero_grad()
        (mse + beta * kl).backward()
        for group in optimizer.param_groups:  # down to zero in a straight line
            group["lr"] = lr * (1 - (step - 1) / steps)
        optimizer.step()
        yield step, mse.detach(), kl.detach()


# %%
if __name__ == "__main__":
    for key, value in dict(code_steps=code_steps, steps=steps, batch=batch, lr=lr).items():
        if not value > 0:
            raise BadInput(f"{key} = {value} must be above 0")
    run = Path(out) / name
    training.claim(run, resume=False)
    pixels, labels = sde.load_images("digits")
    x0 = training.network_space(pixels).to(sde.device())  # (N, 1, 8, 8) in [-1, 1]
    torch.manual_seed(seed)
    autoencoder = Autoencoder().to(sde.device())
    with tqdm(total=code_steps, desc="autoencoder") as bar:
        for _, mse, kl in train_autoencoder(autoencoder, x0, code_steps, seed=seed):
            bar.update()
            bar.set_postfix(mse=f"{mse:.4f}", kl=f"{kl:.2f}", refresh=False)
    print(
        f"squared error a pixel {mse:.4f} (pixels have variance {x0.var():.2f}), KL {kl:.2f} nats"
    )
    with sde.replacing(run / "autoencoder.pt") as aside:
        torch.save(autoencoder.state_dict(), aside)

# %% [markdown]
# ## Codes
#
# Every picture is encoded once. The codes are scaled to unit variance, because the kernel's noise
# levels are meant for data of about that size; the scale is part of the model.


# %%
@torch.no_grad()
def encode(autoencoder, x, scale=1.0):
    """Encode pictures (N, 1, H, W) in [-1, 1] to scaled codes (N, 2, H/2, W/2)."""
    return scale * torch.cat([autoencoder.encode(part)[0] for part in x.split(500)])


@torch.no_grad()
def decode(autoencoder, codes, scale):
    """Decode scaled codes to pictures (N, 1, H, W) in [0, 1], on the CPU."""
    where = next(autoencoder.parameters()).device
    parts = [autoencoder.decode(part.to(where) / scale).cpu() for part in codes.split(500)]
    return evaluation.to_pictures(torch.cat(parts))


# %%
if __name__ == "__main__":
    scale = 1 / encode(autoencoder, x0).std().item()
    codes = encode(autoencoder, x0, scale)
    rebuilt = decode(autoencoder, codes, scale)
    unit = (codes - codes.min()) / (codes.max() - codes.min())  # in [0, 1]
    rows = [pixels[:16] / 255, unit[:16, :1].cpu(), unit[:16, 1:].cpu(), rebuilt[:16]]
    titles = [
        "pictures, 8×8",
        "codes, channel 1 of 2, 4×4",
        "channel 2 of 2",
        "rebuilt from the codes",
    ]
    sde.show_images(rows, titles, run / "codes.png")

# %% [markdown]
# ## Where to cut
#
# The paper takes the boundaries that it found on pixels over to the codes, and so do we: those that
# step 02 finds on the pixels of the data set.

# %%
if __name__ == "__main__":
    boundaries = training.find_boundaries("", "digits", pixels, "vp")
    print("boundaries:", [round(tau, 4) for tau in boundaries])

# %% [markdown]
# ## Training and drawing
#
# The network is step 03's, for 2 channels of 4×4; the loop is step 04's; the sampler is step 05's.

# %%
if __name__ == "__main__":
    # paper: LDM's discrete schedule (0.0015 to 0.0195, 1000 steps); here: step 01's continuous VP
    # kernel, because it is the one the steps so far have explained.
    settings = dict(dataset="digits", arch="multistage", network="digits_latent", process="vp")
    settings.update(steps=steps, batch=batch, lr=lr, warmup=100, ema=0.9999, seed=seed, flip=False)
    settings.update(boundaries=boundaries, scale=scale)
    with sde.replacing(run / "settings.json") as aside:
        aside.write_text(json.dumps(settings, indent=1) + "\n")
    state = training.new_state(training.network_of(settings).to(sde.device()), lr, seed)
    finished = training.fit(state, codes, settings, run)
    print(training.read_metrics(run)[-1])

# %%
if __name__ == "__main__":
    drawn = evaluation.sample(state["ema"], "vp", samples, sampler, nfe, seed + 1, progress=True)
    pictures = decode(autoencoder, drawn, scale)
    title = f"{name} after {steps:,} steps: {sampler}, {nfe} NFE, seed {seed + 1}"
    sde.show_images([pictures[:96]], [title], run / "samples.png")

# %% [markdown]
# ## Measuring
#
# The same metrics as in step 05, with one more column. No latent model can be better than its
# autoencoder, so the reconstructions of real pictures are the floor.

# %%
if __name__ == "__main__":
    extractor, features = evaluation.pick_extractor("digits", pixels, labels)
    half, other_half = evaluation.real_halves(pixels, samples)
    rebuilt_half = decode(
        autoencoder, encode(autoencoder, (other_half * 2 - 1).to(x0), scale), scale
    )
    table = {
        "samples / real": evaluation.evaluate(pictures, half, extractor),
        "rebuilt / real": evaluation.evaluate(rebuilt_half, half, extractor),
        "real / real": evaluation.evaluate(other_half, half, extractor),
    }
    evaluation.print_metrics(table, f"{samples} pictures a set, {features}")
    record = dict(run=str(run), sampler=sampler, nfe=nfe, seed=seed + 1, features=features, **table)
    with sde.replacing(run / "metrics.json") as aside:
        aside.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")

# %% [markdown]
# **You have** all parts of the paper: the closed-form denoiser, the clustering, the multistage
# network, its training and sampling, in pixels and in codes.
#
# ### Exercises
#
# 1. Halve the code to one channel (`Autoencoder(code=1)`; the network needs `channels=1`). Which
#    column of the table tells you whether it was too much? <details><summary>Solution</summary>The
#    middle one: the floor rises when the autoencoder loses what the classifier looks at.</details>
# 2. Apply Algorithm 1 to the codes themselves, stretched to [0, 1]: `clustering.algorithm_1(unit)`.
#    Why is its first stage so short? <details><summary>Solution</summary>Codes have no black border
#    whose value is certain: a little noise already blurs every entry by more than two parts in 256
#    of the range.</details>
# 3. Why are the codes' means encoded, and not samples of the codes?
#    <details><summary>Solution</summary> The samples add noise that the decoder was trained to
#    ignore; the means are the cleaner data set. With a faint pull like ours the difference is
#    small.</details>
