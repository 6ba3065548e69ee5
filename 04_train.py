# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 04 · Training, stage by stage
#
# **You will** train the network of step 03 to predict noise, one stage a batch, keep an average of
# its weights, and leave a run on disk that step 05 can sample from and that survives an
# interruption. From the shell the same file is the training command: `python 04_train.py --dataset
# celeba`.

# %%
import copy
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

if __name__ == "__main__" and os.path.basename(os.getcwd()) == "notebooks":
    os.chdir("..")  # a notebook that was opened where it lies
sde = importlib.import_module("01_sde_and_denoiser")
clustering = importlib.import_module("02_clustering")
unet = importlib.import_module("03_multistage_unet")
BadInput = sde.BadInput

# %% tags=["parameters"]
dataset = "digits"  # digits, mnist, cifar10, celeba or folder
root = "data"  # where the data set lies or is downloaded to
arch = "multistage"  # multistage, unified or separate
process = "vp"  # vp (noise prediction, t in [0, 1]) or edm (preconditioned, time is sigma)
boundaries = ""  # inner boundaries such as 0.1,0.44; empty: those that step 02 finds
steps = 0  # training steps; 0: the recipe of the data set (table below)
batch = 0  # pictures a step; 0: the recipe of the data set
lr = 0.0  # Adam's learning rate; 0: the recipe of the data set
ema = 0.9999  # decay of the averaged weights, approached by (1 + n)/(10 + n)
seed = 0  # seed of every random number
name = ""  # name of the run; empty: dataset-arch, and -edm where that is the process
out = "runs"  # the folder that holds the runs
save_every = 1000  # steps between checkpoints
resume = False  # go on from the checkpoint of that run

# %%
sde.settings(globals(), "04_train")

# %% [markdown]
# ## The loss
#
# Denoising score matching (eq. 4 of the paper) asks the network for the noise that was put in:
#
# $$\min_\theta\;\mathbb E\big[\,\omega(t)\,\|\epsilon_\theta(x_t,t)-\epsilon\|_2^2\,\big] \tag{4}$$
#
# Two processes are on offer. **vp**: the kernel of step 01, the network predicts $\epsilon$,
# $\omega=1$. **edm** (Karras et al. 2022): the time is $\sigma$, and the network is wrapped so that
# its input and its target have unit variance at every $\sigma$. EDM writes this for a denoiser
# $D=c_\text{skip}x+c_\text{out}F$; in terms of the noise, $\epsilon_\theta=(x-D)/\sigma$, it is
# linear in $F$ and its weight $\lambda(\sigma)=(\sigma^2+\sigma_d^2)/(\sigma\sigma_d)^2$ becomes
# $\omega=(\sigma^2+\sigma_d^2)/\sigma_d^2$.

# %%
KERNELS = {"vp": sde.VP, "edm": sde.EDM}
SIGMA_DATA = 0.5  # of pictures in [-1, 1], as in EDM


def predict_noise(model, x, t, process):
    """Ask a network for the noise in x (B, C, H, W) at times t (B,): eps_theta of the paper."""
    if process == "vp":
        return model(x, t)
    sigma, d = sde.per_image(t, x), SIGMA_DATA
    norm = (sigma**2 + d**2).sqrt()
    return sigma / norm**2 * x - d / norm * model(x / norm, t)  # (x - D) / sigma


def loss_weight(t, process):
    """Return omega(t) of Eq. 4, (B,)."""
    return torch.ones_like(t) if process == "vp" else (t**2 + SIGMA_DATA**2) / SIGMA_DATA**2


# %% [markdown]
# ## Which times?
#
# The paper trains one stage a batch. With vp a stage is drawn uniformly, then every picture's $t$
# uniformly inside it. So a short stage gets as many batches as a long one: with `digits`, a third
# of the work goes into the 10% of the timeline next to the image. With edm a $\sigma$ drawn from
# EDM's log-normal distribution picks the stage, and the batch is drawn from the same distribution
# cut to that stage.


# %%
def draw_times(model, process, batch, generator):
    """Draw a stage, and times inside it for a whole batch: (stage, t (batch,) float32).

    Source: paper, Section 4.2, and the authors' release; edm: Karras et al. 2022, Table 1.
    """
    cuts, where = model.boundaries.tolist(), generator.device
    u = torch.rand(batch + 1, generator=generator, device=where)
    if process == "vp":
        edges = [sde.VP.t_min, *cuts, sde.VP.t_max]
        k = int(u[-1] * len(model.decoders))
        return k, edges[k] + u[:-1] * (edges[k + 1] - edges[k])
    mean, std = -1.2, 1.2  # of log sigma
    cdf = torch.special.ndtr((torch.tensor(cuts).log() - mean) / std).to(where)
    k = int((u[-1] >= cdf).sum())
    edges = torch.cat([cdf.new_tensor([1e-6]), cdf, cdf.new_tensor([1 - 1e-6])])
    inside = edges[k] + u[:-1] * (edges[k + 1] - edges[k])
    return k, torch.exp(mean + std * torch.special.ndtri(inside))


# %% [markdown]
# ## The loop
#
# `train` is a generator: it yields after every step and leaves bars, plots and files to its caller.
# All that changes during training lies in one `state`, so that a checkpoint is that state on disk.


# %%
def network_space(images):
    """Bring uint8 pictures into [-1, 1], where the network works; floats are there already."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def new_state(model, lr, seed):
    """Bundle what training changes: step, model, averaged model, optimiser, random numbers."""
    where = next(model.parameters()).device
    return dict(
        step=0,
        model=model,
        ema=copy.deepcopy(model).eval().requires_grad_(False),
        optimizer=torch.optim.Adam(model.parameters(), lr, fused=True),
        generator=torch.Generator(where).manual_seed(seed),
    )


def train(state, images, steps, process="vp", batch=64, warmup=100, ema=0.9999, flip=False):
    """Train for `steps` steps in all by denoising score matching, yielding after each.

    state: from `new_state`, changed in place. images: (N, C, H, W) on the model's device, uint8
    pictures or floats that are in the network's space already (the latents of step 06).
    Yields (step, stage, loss), the loss as a tensor that is not yet waited for.
    Raises BadInput where the loss is no longer finite (looked at every 50 steps).
    Source: paper, Eq. 4, and the recipe of the authors' release.
    """
    model, optimizer, generator = (state[key] for key in ("model", "optimizer", "generator"))
    kernel, peak = KERNELS[process], optimizer.defaults["lr"]
    pairs = list(state["ema"].parameters()), list(model.parameters())
    model.train()
    while state["step"] < steps:
        i = torch.randint(len(images), (batch,), generator=generator, device=images.device)
        x0 = network_space(images[i])  # (B, C, H, W)
        if flip:
            turn = torch.rand(batch, generator=generator, device=x0.device) < 0.5
            x0 = torch.where(turn[:, None, None, None], x0.flip(-1), x0)
        stage, t = draw_times(model, process, batch, generator)
        eps = torch.randn(x0.shape, generator=generator, device=x0.device)
        xt = sde.perturb(x0, eps, t, kernel)
        error = (predict_noise(model, xt, t, process) - eps) ** 2
        loss = (loss_weight(t, process) * error.flatten(1).mean(1)).mean()  # Eq. 4

        step = state["step"] + 1
        if step % 50 == 0 and not torch.isfinite(loss):
            raise BadInput(f"the loss is {loss.item()} at step {step}: lower --lr and --resume")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, step / warmup)
        optimizer.step()
        with torch.no_grad():  # the average forgets faster at first: (1 + n) / (10 + n)
            torch._foreach_lerp_(*pairs, 1 - min(ema, (1 + step) / (10 + step)))
        state["step"] = step
        yield step, stage, loss.detach()


# %% [markdown]
# ## A run on disk
#
# `runs/<name>/` holds `settings.json`, `metrics.jsonl` (a line a log step), `loss.png` and
# `checkpoint.pt`. The checkpoint is written aside and renamed, and contains everything that
# training changes, so `--resume` goes on as if nothing had happened.


# %%
def save(state, settings, folder):
    """Write state and settings to `folder`/checkpoint.pt, aside first, then renamed."""
    content = dict(settings=settings, step=state["step"])
    content.update({key: state[key].state_dict() for key in ("model", "ema", "optimizer")})
    content["generator"] = state["generator"].get_state()
    content["torch_rng"] = torch.get_rng_state()  # dropout draws from it
    if torch.cuda.is_available():
        content["cuda_rng"] = torch.cuda.get_rng_state()
    with sde.replacing(Path(folder) / "checkpoint.pt") as aside:
        torch.save(content, aside)


def load(folder):
    """Read `folder`/checkpoint.pt onto the CPU. Raises BadInput where it is missing or broken."""
    path = Path(folder) / "checkpoint.pt"
    if not path.is_file():
        raise BadInput(f"there is no checkpoint {path}: train one with 04_train.py")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["settings"], content["ema"]  # noqa: B018 - some other file has neither
        return content
    except Exception as error:  # torch.load fails in many ways on a broken or foreign file
        raise BadInput(f"{path} is no readable checkpoint of 04_train.py: train anew") from error


def restore(state, content):
    """Put a checkpoint's content back into a fresh state."""
    for key in ("model", "ema", "optimizer"):
        state[key].load_state_dict(content[key])
    state["generator"].set_state(content["generator"])
    torch.set_rng_state(content["torch_rng"])
    if torch.cuda.is_available() and "cuda_rng" in content:
        torch.cuda.set_rng_state(content["cuda_rng"])
    state["step"] = content["step"]


def network_name(dataset, arch):
    """Name the entry of NETWORKS for a data set and an architecture; colour sets share one."""
    base = dataset if dataset in unet.NETWORKS else "cifar10"
    return base if arch == "multistage" else f"{base}_{arch}"


def network_of(settings):
    """Build the untrained network that a run's settings describe."""
    kind = dict(boundaries=settings["boundaries"])
    if settings["process"] == "edm":  # its wrapping adds the input already
        kind.update(time="edm", add_input=False)
    return unet.build(settings["network"], **kind)


def load_model(folder):
    """Load the averaged network of a run: (model in eval mode on the device, its settings)."""
    content = load(folder)
    model = network_of(content["settings"])
    model.load_state_dict(content["ema"])
    return model.to(sde.device()).eval(), content["settings"]


# %% [markdown]
# ## Recipes
#
# The paper's recipe is for 450,000 steps on a GPU. `digits` gets one that a laptop finishes in
# minutes.

# %%
PAPER = dict(steps=450_000, batch=128, lr=2e-4, warmup=5000, flip=True)
RECIPES = {
    "digits": dict(steps=900, batch=64, lr=3e-3, warmup=100, flip=False),
    "mnist": dict(steps=10_000, batch=128, lr=1e-3, warmup=500, flip=False),
    "cifar10": PAPER,
    "celeba": PAPER,
    "folder": PAPER,
}


def find_boundaries(text, dataset, images, process):
    """Decide on the inner boundaries, in the time of the process: list of floats.

    text: what the user gave, comma-separated, or empty for step 02's answer.
    """
    if text:
        try:
            return [float(tau) for tau in text.strip("[]() ").split(",")]
        except ValueError:
            raise BadInput(f"boundaries {text!r} must be numbers such as 0.1,0.44") from None
    if dataset == "celeba":
        cuts = unet.PUBLISHED  # the paper, too, uses CIFAR-10's boundaries for CelebA
    else:
        cuts = clustering.algorithm_1(images[:50_000].float() / 255, progress=True)
    return sde.match_snr(cuts, sde.VP, KERNELS[process])


def check_settings(arch, process, steps, batch, lr, ema, save_every):
    """Raise BadInput for a setting that cannot work."""
    if arch not in ("multistage", "unified", "separate"):
        raise BadInput(f"unknown arch {arch!r}: take multistage, unified or separate")
    if process not in KERNELS:
        raise BadInput(f"unknown process {process!r}: take vp or edm")
    for key, value in dict(steps=steps, batch=batch, lr=lr).items():
        if value < 0:
            raise BadInput(f"{key} = {value} is negative: give a positive one, or 0 for the recipe")
    if not 0 <= ema < 1 or save_every < 1:
        raise BadInput(f"ema = {ema} must lie in [0, 1) and save_every = {save_every} above 0")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise BadInput("this step trains in one process: start it without torchrun")


# %% [markdown]
# ## Training
#
# Three short functions around the loop: make room for the run, decide everything before the first
# step, and train with a bar, a log, checkpoints, and a Ctrl-C that finishes the step it is in.


# %%
def claim(folder, resume):
    """Make the folder of a run; an earlier run of that name is kept as `folder`.1, .2, …

    Raises BadInput where the folder cannot be made.
    """
    folder = Path(folder)
    try:
        if (folder / "checkpoint.pt").exists() and not resume:
            n = next(n for n in range(1, 10_000) if not Path(f"{folder}.{n}").exists())
            folder.rename(f"{folder}.{n}")
            print(f"an earlier run is kept as {folder}.{n}")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(
            f"cannot write to {folder} ({error.strerror}): choose another --out"
        ) from error


def agree(asked, old, folder):
    """Raise BadInput where a resumed run is asked for other settings than it has (but steps)."""
    for key in sorted(set(asked) - {"steps"}):
        if asked[key] != old[key]:
            raise BadInput(f"{folder} was trained with {key} = {old[key]!r}, not {asked[key]!r}")


def fit(state, images, settings, folder, save_every=1000):
    """Run `train` to settings["steps"] and leave metrics.jsonl and checkpoint.pt in `folder`.

    Returns True when finished, False when Ctrl-C stopped it (the step is finished and saved).
    """
    steps, batch, recent, stop = settings["steps"], settings["batch"], [], []
    every, log = max(1, steps // 40), Path(folder) / "metrics.jsonl"
    old = log.read_text().splitlines() if log.is_file() else []
    kept = [line for line in old if json.loads(line)["step"] <= state["step"]]
    with sde.replacing(log) as aside:
        aside.write_text("".join(f"{line}\n" for line in kept))
    before = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    keys = ("process", "batch", "warmup", "ema", "flip")
    loop = train(state, images, steps, **{key: settings[key] for key in keys})
    bar = tqdm(total=steps * batch, initial=state["step"] * batch, unit="img", unit_scale=True)
    begin = time.perf_counter()
    try:
        for step, stage, loss in loop:
            bar.update(batch)
            recent.append((stage, loss))
            if step % every == 0 or step == steps:
                seconds, begin = time.perf_counter() - begin, time.perf_counter()
                row = dict(step=step, images_per_s=round(len(recent) * batch / seconds))
                for k in sorted({k for k, _ in recent}):
                    losses = [loss for j, loss in recent if j == k]
                    row[f"loss_{k}"] = round(torch.stack(losses).mean().item(), 5)
                bar.set_postfix({key: row[key] for key in row if key.startswith("loss")})
                with log.open("a") as lines:
                    lines.write(json.dumps(row) + "\n")
                recent = []
            if step % save_every == 0 or step == steps or stop:
                save(state, settings, folder)
            if stop:
                break
    finally:
        bar.close()
        signal.signal(signal.SIGINT, before)
    return not stop


# %%
if __name__ == "__main__":
    check_settings(arch, process, steps, batch, lr, ema, save_every)
    pixels, _ = sde.load_images(dataset, root)
    pixels = pixels.to(sde.device())  # uint8 (N, C, H, W), all of it
    recipe = RECIPES[dataset]
    run = Path(out) / (name or f"{dataset}-{arch}" + "-edm" * (process == "edm"))
    asked = dict(dataset=dataset, arch=arch, network=network_name(dataset, arch))
    asked.update(process=process, ema=ema, seed=seed)
    asked.update(steps=steps or recipe["steps"], batch=batch or recipe["batch"])
    asked.update(lr=lr or recipe["lr"], warmup=recipe["warmup"], flip=recipe["flip"])
    content = load(run) if resume else None
    claim(run, resume)

# %%
if __name__ == "__main__":
    if resume:
        agree(asked, content["settings"], run)
        asked["boundaries"] = content["settings"]["boundaries"]
    elif arch == "unified":
        asked["boundaries"] = []
    else:
        asked["boundaries"] = find_boundaries(boundaries, dataset, pixels, process)
    torch.manual_seed(seed)  # the initial weights
    model = network_of(asked).to(sde.device())
    state = new_state(model, asked["lr"], seed)
    if resume:
        restore(state, content)
    with sde.replacing(run / "settings.json") as aside:
        aside.write_text(json.dumps(asked, indent=1) + "\n")

# %%
if __name__ == "__main__":
    cuts = ", ".join(f"{tau:.4f}" for tau in asked["boundaries"]) or "none"
    total = sum(p.numel() for p in model.parameters())
    print(f"{run}: {asked['steps']:,} steps of {asked['batch']} pictures on {sde.device()}")
    print(f"{arch}, {total:,} parameters, boundaries {cuts}")
    finished = fit(state, pixels, asked, run, save_every)
    if not finished:
        print(f"stopped and saved at step {state['step']}: the same command with --resume goes on")
        sys.exit(130)

# %% [markdown]
# ## What it learned
#
# The loss of each stage over training. Near the noise ($k=2$) the noise is nearly the whole picture
# and easy to read off; near the image ($k=0$) it is a faint grain, and hard. The losses differ by
# orders of magnitude, which is one way to see that these are different tasks.


# %%
def read_metrics(folder):
    """Read `folder`/metrics.jsonl as a list of dictionaries."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def draw_losses(folder):
    """Plot the training loss of each stage in `folder`/metrics.jsonl."""
    rows = read_metrics(folder)
    plt.figure(figsize=(8, 3))
    for key in sorted({key for row in rows for key in row if key.startswith("loss")}):
        points = [(row["step"], row[key]) for row in rows if key in row]
        plt.plot(*zip(*points, strict=True), marker=".", label=f"stage {key[-1]}")
    plt.gca().set(yscale="log", xlabel="step", ylabel="loss (eq. 4)")
    plt.legend(loc="center left", bbox_to_anchor=(1, 0.5))


if __name__ == "__main__":
    draw_losses(run)
    sde.show(run / "loss.png")
    print(f"{read_metrics(run)[-1]['images_per_s']:,} images/s on {sde.device()}")

# %% [markdown]
# And what the network sees in noise, beside the optimal denoiser of step 01. Both estimate the
# picture: $\hat x_0=x_t/s_t-\sigma_t\,\epsilon_\theta(x_t,t)$.

# %%
if __name__ == "__main__":
    network, _ = load_model(run)
    kernel, generator = KERNELS[process], torch.Generator().manual_seed(seed)
    levels = sde.VP.log_snr(torch.tensor([0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.7]))
    t = kernel.time(levels).float().to(sde.device())  # the same noise levels in either process
    x0 = network_space(pixels[:8])
    xt = sde.perturb(x0, torch.randn(x0.shape, generator=generator).to(x0), t, kernel)
    with torch.no_grad():
        eps = predict_noise(network, xt, t, process)
    s, sigma = (sde.per_image(v, xt) for v in (kernel.s(t), kernel.sigma(t)))
    learned = xt / s - sigma * eps
    best = sde.posterior_mean(xt, t, kernel, network_space(pixels[:50_000]))
    rows = [(row + 1) / 2 for row in (x0, xt, learned, best)]
    titles = [
        "picture",
        "with noise, more from left to right",
        "the network",
        "the optimal denoiser",
    ]
    sde.show_images(rows, titles, run / "denoised.png", columns=8)

# %% [markdown]
# Where noise is low both return the picture. In the middle columns the optimal denoiser still
# knows *which training picture* it was, while the network, which cannot store them all, returns a
# similar digit in its own, softer hand. At the right both see little more than an average. The gap
# in the middle is what makes the network generative.
#
# **You have** a trained multistage model in `runs/`, and the loss of each stage. Step 05 draws with
# it.
#
# ### Exercises
#
# 1. Train `--arch unified` and compare stage by stage: its one loss is an average over all $t$.
#    What would you measure instead? <details><summary>Solution</summary>The loss of the averaged
#    model at fixed times, on the same pictures and noise, for both models.</details>
# 2. Give boundaries by log-SNR (`--boundaries 0.348,0.709 --name digits-snr`) and compare in step
#    05. <details><summary>Solution</summary>`python 05_sample_eval.py --name digits-snr` prints the
#    same table for that run.</details>
