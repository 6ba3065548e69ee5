# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 04 · Training, stage by stage
#
# **You will** train the network of step 03 to predict noise, keep an average of its weights, and
# leave a run on disk that step 05 can sample from and that survives an interruption. From the shell
# the same file is the training command, on a laptop, on a GPU, or on several under `torchrun`:
# `python 04_train.py --dataset celeba`.

# %%
import importlib
import os

if __name__ == "__main__" and os.path.basename(os.getcwd()) == "notebooks":
    os.chdir("..")  # a notebook that was opened where it lies
sde = importlib.import_module("01_sde_and_denoiser")  # first: it readies the process for torch

import contextlib
import copy
import datetime
import json
import signal
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

clustering = importlib.import_module("02_clustering")
unet = importlib.import_module("03_multistage_unet")
BadInput = sde.BadInput

# %% tags=["parameters"]
dataset = "digits"  # digits, mnist, cifar10, celeba or folder
root = "data"  # where the data set lies or is downloaded to
size = 32  # side in pixels that pictures of celeba and folder are brought to [4, 2048]
arch = "multistage"  # multistage, unified or separate
tailored = False  # give separate networks the decoder widths of the multistage one
network = ""  # a name of step 03's NETWORKS such as cifar10; empty: the data set's recipe
process = "vp"  # vp or ldm (noise prediction), edm (preconditioned), pfgm or pfgm-128 (tails, D)
stages = "uniform"  # uniform: one stage a batch; mixed: all stages in every batch
boundaries = ""  # inner boundaries such as 0.1,0.44; empty: those that step 02 finds
steps = 0  # training steps; 0: the recipe of the data set (table below) [0, 1000000000]
batch = 0  # pictures a step, over all devices; 0: the recipe of the data set [0, 1000000]
lr = 0.0  # Adam's learning rate; 0: the recipe of the data set [0, 10]
ema = 0.9999  # decay of the averaged weights, approached by (1 + n)/(10 + n) [0, 1)
patience = 0  # early stopping: looks at held-out pictures without gain; 0: none [0, 1000000]
seed = 0  # seed of every random number [0, 4294967295]
name = ""  # name of the run; empty: dataset-arch, and the process where it is not vp
out = "runs"  # the folder that holds the runs
save_every = 0  # steps between checkpoints; 0: every ten minutes [0, 1000000000]
sample_every = 0  # steps between grids of samples; 0: a fifth of the steps [0, 1000000000]
memory = 4.0  # GiB of pictures to hold on the device; more are read in training [0, 1000000]
workers = 4  # processes that read pictures [0, 1024]
compile = False  # compile the network first (worth it for hours on a GPU)
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
# Four processes are on offer. **vp**: the kernel of step 01, the network predicts $\epsilon$,
# $\omega=1$. **edm** (Karras et al. 2022): the time is $\sigma$, and the network is wrapped so that
# its input and its target have unit variance at every $\sigma$. EDM writes this for a denoiser
# $D=c_\text{skip}x+c_\text{out}F$; in terms of the noise, $\epsilon_\theta=(x-D)/\sigma$, it is
# linear in $F$ and its weight $\lambda(\sigma)=(\sigma^2+\sigma_d^2)/(\sigma\sigma_d)^2$ becomes
# $\omega=(\sigma^2+\sigma_d^2)/\sigma_d^2$. **pfgm-D** is edm with heavy-tailed noise (PFGM++; Xu et
# al. 2023), a rival of the paper's Table 1: only the draw of $\epsilon$ changes. **ldm** is vp with
# the schedule of latent diffusion, whose time has 1,000 steps; step 06 uses it.

# %%
SIGMA_DATA = 0.5  # of pictures in [-1, 1], as in EDM
PLAIN = ("vp", "ldm")  # the network's output is the noise, and its time runs from 0 to 1


def kernel_of(process):
    """Return the kernel of a process by its name: vp, ldm, edm, pfgm (D = 1) or pfgm-<D>.

    Raises BadInput for another name.
    """
    name, _, D = process.partition("-")
    known = {"vp": sde.VP, "ldm": sde.LDM, "edm": sde.EDM, "pfgm": sde.PFGM}
    if process in known:
        return known[process]
    if name != "pfgm" or not D.replace(".", "", 1).isdecimal():
        raise BadInput(f"unknown process {process!r}: take vp, ldm, edm, pfgm or such as pfgm-128")
    return sde.PFGM.with_D(float(D))


def predict_noise(model, x, t, process, **stage):
    """Ask a network for the noise in x (B, C, H, W) at times t (B,): eps_theta of the paper.

    stage: what a multistage network need not find out, see its `forward`.
    """
    if process in PLAIN:
        return model(x, t, **stage)
    sigma, d = sde.per_image(t, x), SIGMA_DATA
    norm = (sigma**2 + d**2).sqrt()
    return sigma / norm**2 * x - d / norm * model(x / norm, t, **stage)  # (x - D) / sigma


def half_precision(device):
    """Compute in bfloat16 where the hardware is made for it: a context."""
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast("cuda", torch.bfloat16, enabled=able)


def noise_function(model, process, calls=None, half=True):
    """Return eps(x, t) of a network for the solvers, which ask for one time at a time.

    calls: a list that gets the stage of each evaluation. half: allow `half_precision`.
    """

    def eps(x, t):
        k = int(model.stage(t[:1]))  # solvers keep t on the CPU: a GPU would have to be waited for
        if calls is not None:
            calls.append(k)
        times = torch.full(t.shape, float(t[0]), dtype=x.dtype, device=x.device)
        with half_precision(x.device) if half else contextlib.nullcontext():
            return predict_noise(model, x, times, process, stage=k)

    return eps


def loss_weight(t, process):
    """Return omega(t) of Eq. 4, (B,)."""
    return torch.ones_like(t) if process in PLAIN else (t**2 + SIGMA_DATA**2) / SIGMA_DATA**2


def weighted_error(model, x0, eps, t, process, **stage):
    """Compare predicted noise with eps as Eq. 4 does, averaged over a picture's entries: (B,)."""
    xt = sde.perturb(x0, eps, t, kernel_of(process))
    error = (predict_noise(model, xt, t, process, **stage).float() - eps) ** 2
    return loss_weight(t, process) * error.flatten(1).mean(1)  # Eq. 4


# %% [markdown]
# ## Which times?
#
# The paper trains one stage a batch (`--stages uniform`). With vp a stage is drawn uniformly, then
# every picture's $t$ uniformly inside it. So a short stage gets as many batches as a long one: with
# `digits`, a third of the work goes into the 10% of the timeline next to the image. With ldm $t$ is
# one of the thousand steps. With edm a
# $\sigma$ drawn from EDM's log-normal distribution picks the stage, and the batch is drawn from the
# same distribution cut to that stage.
#
# `--stages mixed` is our own: every batch has all stages, in turns, and the losses of a stage are
# weighted by its chance over its share of the batch. That is the same objective, only that the chance
# of drawing a stage is replaced by its expectation. On `digits` it was the better choice with each of
# three seeds (see the README).


# %%
def stage_edges(model, process):
    """Return the ends of the stages (n + 1,) float64: times, or (edm) shares of its log-normal.

    With ldm an end is the last of the thousand steps before a boundary.

    Source: the authors' release; edm: Karras et al. 2022, Table 1 (log sigma ~ N(-1.2, 1.2^2)).
    """
    cuts = model.boundaries.double().cpu()
    if process == "vp":
        return torch.cat([torch.tensor([sde.VP.t_min]), cuts, torch.tensor([sde.VP.t_max])])
    if process == "ldm":  # a step on the boundary belongs to the later stage
        before = ((1000 * cuts - 1e-3).ceil() - 1) / 1000
        return torch.cat([torch.zeros(1), before, torch.ones(1)]).double()
    cdf = torch.special.ndtr((cuts.log() + 1.2) / 1.2)
    return torch.cat([torch.tensor([1e-6]), cdf, torch.tensor([1 - 1e-6])])


def stage_chances(edges, process, active):
    """Return how often each stage is drawn, (n,) float64, where only some are still active."""
    chance = torch.ones(len(edges) - 1) if process in PLAIN else edges.diff()
    chance = chance.double() * torch.tensor([k in active for k in range(len(chance))])
    return chance / chance.sum()


def in_turns(active, batch):
    """Deal the stages to the pictures of a mixed batch, over and over: (batch,) int64."""
    return torch.tensor(active).repeat(batch)[:batch]


def draw_times(edges, process, k, generator):
    """Draw a time inside stage k (B,) int64 for each picture: (B,) float32."""
    edges = edges.to(generator.device, torch.float32)
    u = torch.rand(len(k), generator=generator, device=generator.device)
    if process == "ldm":  # one of the steps n[k] + 1 to n[k + 1], each equally often
        n = (1000 * edges).round()
        return (n[k] + 1 + (u * n.diff()[k]).floor().minimum(n.diff()[k] - 1)) / 1000
    u = edges[k] + u * (edges[k + 1] - edges[k])
    return u if process == "vp" else torch.exp(1.2 * torch.special.ndtri(u) - 1.2)


# %% [markdown]
# ## Which pictures?
#
# Which pictures a step sees follows from the seed and the step alone. So a run that was interrupted
# goes on as if nothing had happened, and several processes agree without asking each other: each
# takes its own part of the same batch. A small data set lies on the device as one tensor; a large
# one is read by workers, ahead of time.


# %%
def step_generator(seed, step):
    """Make the random numbers that all processes share in a step.

    Twice the step gives the pictures, one more the stage.
    """
    return torch.Generator().manual_seed(2_000_003 * seed + step)


def pictures_of_steps(images, batch, seed, steps, workers=0, bad=None):
    """Yield the uint8 pictures (b, C, H, W) of each step of the range `steps`.

    images: a tensor, or `PictureFiles` to read from. b is this process' part of `batch`. bad: a
    list that gets the unreadable files; others of the batch stand in for them.
    """
    rank, world = ranks()

    def picks():
        for step in steps:
            i = torch.randint(len(images), (batch,), generator=step_generator(seed, 2 * step))
            yield i.chunk(world)[rank]

    if torch.is_tensor(images):
        for i in picks():
            yield images[i.to(images.device)]
        return
    loader = DataLoader(
        Indexed(images),
        batch_sampler=(i.tolist() for i in picks()),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=sde.ignore_interrupts,
    )
    for pictures, unreadable in loader:
        for i in unreadable:
            if images.files[i] not in bad:
                bad.append(images.files[i])
                tqdm.write(f"unreadable, skipped: {bad[-1]}")
        if len(bad) > 0.01 * len(images):
            sde.report_unreadable(bad, len(images))
        if pictures is None:
            raise BadInput("none of the pictures of a batch is readable: see the files named above")
        yield pictures.to(sde.device(), non_blocking=True)


class Indexed:
    """Give (i, picture) in place of the picture."""

    def __init__(self, images):
        self.images = images

    def __getitem__(self, i):
        return i, self.images[i]


def collate(items):
    """Stack pictures, with readable ones in the place of None: (pictures, unreadable indices).

    Where none is readable there are no pictures either, but None.
    """
    good = [picture for _, picture in items if picture is not None]
    stack = [good[j % len(good)] if p is None else p for j, (_, p) in enumerate(items) if good]
    return torch.stack(stack) if good else None, [i for i, picture in items if picture is None]


def ranks():
    """Tell which process this is, of how many: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


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
    """Bundle what training changes: step, model, averaged model, optimiser, random numbers.

    "forward" is what the loss calls; several processes or a compiler put their wrapper there.
    """
    where = next(model.parameters()).device
    return dict(
        step=0,
        seed=seed,
        model=model,
        forward=model,
        ema=copy.deepcopy(model).eval().requires_grad_(False),
        optimizer=torch.optim.Adam(model.parameters(), lr, fused=True),
        generator=torch.Generator(where).manual_seed(seed),
        active=list(range(len(model.decoders))),
    )


def train(
    state,
    images,
    steps,
    process="vp",
    batch=64,
    warmup=100,
    ema=0.9999,
    flip=False,
    stages="uniform",
    workers=0,
    bad=None,
):
    """Train for `steps` steps in all by denoising score matching, yielding after each.

    state: from `new_state`, changed in place. images: (N, C, H, W) on the model's device, uint8
    pictures or floats that are in the network's space already (the latents of step 06), or
    `PictureFiles`. Yields (step, {stage: loss}), losses as tensors that are not yet waited for.
    Raises BadInput where a loss is no longer finite (looked at every 50 steps).
    Source: paper, Eq. 4, and the recipe of the authors' release.
    """
    model, optimizer, generator = (state[key] for key in ("model", "optimizer", "generator"))
    kernel, peak, device = kernel_of(process), optimizer.defaults["lr"], generator.device
    pairs = list(state["ema"].parameters()), list(model.parameters())
    edges, (rank, world) = stage_edges(model, process), ranks()
    there = edges.to(device, torch.float32)
    todo = range(state["step"] + 1, steps + 1)
    source = pictures_of_steps(images, batch, state["seed"], todo, workers, bad)
    model.train()
    for step, pictures in zip(todo, source, strict=False):
        x0 = network_space(pictures)  # (b, C, H, W)
        if not state["active"]:
            return
        chance = stage_chances(edges, process, state["active"])
        dice = step_generator(state["seed"], 2 * step + 1)
        k = torch.multinomial(chance, 1, generator=dice).expand(batch)  # one stage for all
        if stages == "mixed":
            k = in_turns(state["active"], batch)
        share = (chance[k] if stages == "mixed" else 1) / k.bincount()[k]  # (batch,), sums to 1
        turns = k.chunk(world)[rank][: len(state["active"]) if stages == "mixed" else 1].tolist()
        k, share = torch.stack([k.double(), share.double()]).to(device)  # one copy to wait for
        # the random numbers of the whole batch, of which this process takes its part
        t = draw_times(there, process, k.long(), generator)
        eps = sde.fresh_noise(x0[:1].expand(batch, -1, -1, -1), generator, kernel)
        turn = torch.rand(batch, generator=generator, device=device) < 0.5
        t, eps, turn, share = (v.chunk(world)[rank] for v in (t, eps, turn, share))
        if flip:
            x0 = torch.where(turn[:, None, None, None], x0.flip(-1), x0)
        stage = turns if len(turns) > 1 else turns[0]
        with half_precision(device):
            error = weighted_error(state["forward"], x0, eps, t, process, stage=stage)
        # the processes' gradients are averaged, their losses shall be summed
        loss = world * (share.to(error) * error).sum()

        if step % 50 == 0 and not torch.isfinite(loss):
            raise BadInput(f"the loss is {loss.item()} at step {step}: train with a lower --lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, step / warmup)
        optimizer.step()
        with torch.no_grad():  # the average forgets faster at first: (1 + n) / (10 + n)
            torch._foreach_lerp_(*pairs, 1 - min(ema, (1 + step) / (10 + step)))
        state["step"] = step
        error = error.detach()
        yield step, {j: error[i :: len(turns)].clone().mean() for i, j in enumerate(turns)}


# %% [markdown]
# ## A run on disk
#
# `runs/<name>/` holds `settings.json`, `metrics.jsonl` (a line a log step), `loss.png`, grids of
# samples in `samples/`, and `checkpoint.pt`. The checkpoint is written aside and renamed, the one
# before it is kept, and it contains everything that training changes, so `--resume` goes on as if
# nothing had happened.


# %%
STATES = ("model", "ema", "optimizer")


def write_tensors(content, path):
    """Save tensors as the file `path`. Raises OSError on a full disk, unlike torch."""
    try:
        torch.save(content, path)
    except RuntimeError as error:
        raise OSError(f"{str(error).splitlines()[0]}; is the disk full?") from error


def save(state, settings, folder):
    """Write state and settings to `folder`/checkpoint.pt; the one before becomes .previous.pt.

    Raises BadInput where it cannot be written, such as on a full disk; what was there stays.
    """
    content = {key: state[key].state_dict() for key in STATES}
    content.update(
        {key: state[key] for key in ("step", "active", "stopping", "petaflops") if key in state}
    )
    content.update(settings=settings, generator=state["generator"].get_state())
    content["torch_rng"] = torch.get_rng_state()  # dropout draws from it
    if torch.cuda.is_available():
        content["cuda_rng"] = torch.cuda.get_rng_state()
    path = Path(folder) / "checkpoint.pt"
    with sde.replacing(path) as aside:
        write_tensors(content, aside)
        if path.exists():
            os.replace(path, path.with_name("checkpoint.previous.pt"))


def load(folder):
    """Read `folder`/checkpoint.pt onto the CPU, or the one before it where it is torn.

    Raises BadInput where there is none that can be read.
    """
    paths = [Path(folder) / name for name in ("checkpoint.pt", "checkpoint.previous.pt")]
    if not any(path.is_file() for path in paths):
        raise BadInput(f"there is no checkpoint {paths[0]}: train one with 04_train.py")
    for path in paths:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            content["settings"], content["ema"]  # noqa: B018 - some other file has neither
        except Exception:  # torch.load fails in many ways on a broken or foreign file
            continue
        if path != paths[0]:
            print(f"{paths[0]} is missing or torn: going back to {path}, step {content['step']:,}")
        return content
    raise BadInput(f"{paths[0]} is no readable checkpoint of 04_train.py: train anew")


@contextlib.contextmanager
def fitting(what):
    """Raise BadInput where `what`, a checkpoint, lacks an entry or has one of another shape."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, (BadInput, torch.OutOfMemoryError)):
            raise
        last = (str(error).splitlines() or [""])[-1].strip()[:150]
        reason = f"it has no {error}" if isinstance(error, KeyError) else last
        raise BadInput(
            f"{what} does not fit its run ({reason}): put an intact one in its place, such as "
            "checkpoint.previous.pt, or train anew"
        ) from error


def restore(state, content):
    """Put a checkpoint's content back into a fresh state. Raises BadInput where it does not fit."""
    with fitting("the checkpoint"):
        for key in STATES:
            state[key].load_state_dict(content[key])
        restore_layout(state["optimizer"])
        kept = ("step", "active", "stopping", "petaflops")
        state.update({key: content[key] for key in kept if key in content})
        restore_generator(state, content)
        torch.set_rng_state(content["torch_rng"])
        if torch.cuda.is_available() and "cuda_rng" in content:
            torch.cuda.set_rng_state(content["cuda_rng"])


def restore_layout(optimizer):
    """Lay Adam's moments out in memory like their weights: fused Adam takes that for granted.

    They come as they were saved, and on a GPU weights have their channels last.
    """
    for weight, moments in optimizer.state.items():
        for key in ("exp_avg", "exp_avg_sq"):
            moments[key] = torch.empty_like(weight).copy_(moments[key])


def restore_generator(state, content):
    """Put a generator back, or start another where the device is of another kind."""
    saved, generator = content["generator"], state["generator"]
    if len(saved) == len(generator.get_state()):
        generator.set_state(saved)
    else:
        say("saved on another kind of device: going on with other random numbers")
        generator.manual_seed(1_000_003 * state["seed"] + content["step"])


def write_settings(settings, folder):
    """Write a run's settings to `folder`/settings.json, for people; checkpoints hold them too."""
    with sde.replacing(Path(folder) / "settings.json") as aside:
        aside.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def network_of(settings):
    """Build the untrained network that a run's settings describe."""
    asked = ("boundaries", "channels", "size", "decoders")
    kind = {key: settings[key] for key in asked if settings.get(key) is not None}
    time = unet.NETWORKS.get(settings["network"], {}).get("time", "vp")
    if settings["process"] == "ldm":
        kind.update(time="ldm")
    elif settings["process"] != "vp":  # EDM's wrapping adds the input already
        kind.update(time="edm", add_input=False)
    elif time != "vp":
        raise BadInput(f"network {settings['network']!r} is made for times of {time!r}, not of vp")
    return unet.build(settings["network"], **kind)


def on_device(model):
    """Move a module to the device; on a GPU with the channels last, as its convolutions want it."""
    device = sde.device()
    return model.to(
        device,
        memory_format=torch.channels_last if device.type == "cuda" else torch.preserve_format,
    )


def averaged_model(content):
    """Build the averaged network of a checkpoint's content, in eval mode on the device.

    With early stopping each stage has the weights of its best look at held-out pictures.
    """
    with fitting("the checkpoint"):
        model = network_of(content["settings"])
        model.load_state_dict({**content["ema"], **content.get("stopping", {}).get("weights", {})})
    return on_device(model).eval()


def load_model(folder):
    """Load the averaged network of a run: (model in eval mode on the device, its settings)."""
    content = load(folder)
    return averaged_model(content), content["settings"]


# %% [markdown]
# ## Recipes
#
# The paper's recipe is for 450,000 steps of its own network on a GPU. `digits` and `mnist` get small
# networks, which a laptop trains in a minute or an hour. For colour pictures on little hardware there
# is `--network cifar10`. The rows of Table 3 are flags: `--arch unified`, `--arch separate`, with
# `--patience 5` (early stopping), `--tailored` (the widths of the multistage decoders), or both, and
# `--arch multistage`.

# %%
PAPER = dict(steps=450_000, batch=128, lr=2e-4, warmup=5000, flip=True)
RECIPES = {
    "digits": dict(steps=900, batch=64, lr=3e-3, warmup=100, flip=False),
    "mnist": dict(steps=10_000, batch=128, lr=1e-3, warmup=500, flip=False),
    "cifar10": PAPER,
    "celeba": PAPER,
    "folder": PAPER,
}
PAPER_NETWORKS = {
    "vp": dict(multistage="table5_1", unified="table7_1", separate="table3_separate"),
    "edm": dict(multistage="edm", unified="edm_unified", separate="edm_separate"),
    "ldm": dict(multistage="table6_4", unified="ldm_unified", separate="ldm_separate"),
}
SMALL_NETWORKS = ("digits", "mnist", "cifar10", "digits_latent", "mnist_latent", "cifar10_latent")


def network_name(network, dataset, arch, process):
    """Name the entry of NETWORKS for what was asked: an own one, a small one or the paper's.

    Raises BadInput for an own one that is of another arch.
    """
    base = network or dataset
    if base in SMALL_NETWORKS and (base != "cifar10" or network):
        return base if arch == "multistage" else f"{base}_{arch}"
    if network in unet.NETWORKS:
        kind = unet.NETWORKS[network]
        own = "multistage" if kind.get("shared", True) else "separate"
        own = "unified" if len(kind["decoders"]) == 1 else own
        if own != arch:
            raise BadInput(f"network {network!r} is {own}, not {arch}: give --arch {own}")
    return network or PAPER_NETWORKS[process if process in PLAIN else "edm"][arch]


FEW = 100  # pictures; where Algorithm 1 fails on fewer it is no fault of theirs


def find_boundaries(text, dataset, images, process, network="digits"):
    """Decide on the inner boundaries, in the time of the process: list of floats.

    text: what the user gave, comma-separated, or empty for step 02's answer; a network that has not
    three stages brings its own. Raises BadInput where there is no such answer; for less than FEW
    pictures the published cuts are taken then, which is said.
    """
    own = unet.NETWORKS.get(network, unet.NETWORKS["digits"])["boundaries"]
    if text:
        try:
            return [float(tau) for tau in text.strip("[]() ").split(",")]
        except ValueError:
            raise BadInput(f"boundaries {text!r} must be numbers such as 0.1,0.44") from None
    if len(own) != 2:
        cuts = own
    elif dataset == "celeba" or not torch.is_tensor(images):
        cuts = unet.PUBLISHED  # the paper, too, uses CIFAR-10's boundaries for CelebA
    else:
        progress = ranks()[0] == 0
        try:
            cuts = clustering.algorithm_1(images[:50_000].float() / 255, progress=progress)
        except BadInput as error:
            if len(images) >= FEW:
                raise BadInput(
                    f"step 02 finds no boundaries ({error}): give --boundaries"
                ) from None
            say(f"{len(images)} pictures are too few to find boundaries: taking the published ones")
            cuts = unet.PUBLISHED
    return sde.match_snr(cuts, sde.VP, kernel_of(process))


def check_settings(arch, process, stages, patience):
    """Raise BadInput for settings that are unknown or do not go together."""
    for what, value, known in (
        ("arch", arch, ("multistage", "unified", "separate")),
        ("stages", stages, ("uniform", "mixed")),
    ):
        if value not in known:
            raise BadInput(f"unknown {what} {value!r}: take {', '.join(known)}")
    kernel_of(process)
    if patience and arch == "multistage":
        raise BadInput("early stopping (patience) needs stages that share nothing: --arch separate")


# %% [markdown]
# ## Training
#
# Short functions around the loop: make room for the run, decide everything before the first step,
# and train with a bar, a log, grids of samples, checkpoints, and a Ctrl-C that finishes the step it
# is in.


# %%
def say(*lines):
    """Print, but only in the first of several processes."""
    if ranks()[0] == 0:
        print(*lines, sep="\n")


def claim(folder, resume):
    """Make the folder of a run and hold it; an earlier run of that name is kept as `folder`.1, …

    Raises BadInput where the folder cannot be made, or another process writes into it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sde.hold(folder)
        left = [name for name in ("checkpoint.pt", "autoencoder.pt") if (folder / name).exists()]
        if left and not resume:
            n = next(n for n in range(1, 10_000) if not Path(f"{folder}.{n}").exists())
            folder.rename(f"{folder}.{n}")
            print(f"an earlier run is kept as {folder}.{n}")
            folder.mkdir()
            sde.hold(folder)  # the lock on the old one went with it
    except OSError as error:
        raise BadInput(
            f"cannot write to {folder} ({error.strerror}): choose another --out"
        ) from error


def agree(asked, old, folder):
    """Raise BadInput where a resumed run is asked for other settings than it has (but steps)."""
    for key in sorted(set(asked) - {"steps"}):
        if asked[key] != old.get(key):
            raise BadInput(
                f"{folder} was trained with {key} = {old.get(key)!r}, not {asked[key]!r}"
            )


def expect(state, settings):
    """Say what will be trained and, after a trial of each kind of step, until when: stages' costs.

    The trial changes nothing: neither weights nor random numbers.
    """
    device, model, process = state["generator"].device, state["model"], settings["process"]
    costs, (rank, world) = unet.cost_of(copy.deepcopy(model).to("meta")), ranks()
    left, n = settings["steps"] - state["step"], len(model.decoders)
    cuts = ", ".join(f"{tau:.4f}" for tau in settings["boundaries"]) or "none"
    say(
        f"{left:,} steps of {settings['batch']} pictures on {device}, processes: {world}",
        f"{settings['arch']} network {settings['network']}, boundaries {cuts}",
    )
    for k in range(n):
        million, gflops = costs[k]["parameters"] / 1e6, costs[k]["gflops"]
        say(f"  stage {k}: {million:.2f} million parameters, {gflops:.4g} GFLOPs a picture")
    x = torch.zeros(settings["batch"] // world, model.channels, model.size, model.size).to(device)
    t, seconds = torch.full((len(x),), 0.5, device=device), {}
    chance = stage_chances(stage_edges(model, process), process, state["active"]).tolist()
    kinds = list(enumerate(chance))
    if settings.get("stages") == "mixed" and len(state["active"]) > 1:  # no other is ever compiled
        mine = in_turns(state["active"], settings["batch"]).chunk(world)[rank]
        kinds = [(mine[: len(state["active"])].tolist(), 1.0)]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for i, (stage, _) in [*enumerate(kinds), *enumerate(kinds)]:  # the first round warms up
            begin = time.perf_counter()
            with half_precision(device):
                predicted = predict_noise(state["forward"], x, t, process, stage=stage)
            predicted.float().square().mean().backward()
            state["optimizer"].zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[i] = time.perf_counter() - begin
    step = sum(p * seconds[i] for i, (_, p) in enumerate(kinds))
    end = time.strftime("%d %b %H:%M", time.localtime(time.time() + left * step))
    say(f"about {settings['batch'] / step:,.0f} pictures a second, done about {end}")
    return costs


@torch.no_grad()
def draw_grid(state, process, path, decode=None, n=32, nfe=25):
    """Draw n pictures with the averaged weights and save them as a grid; decode: from latents."""
    from torchvision.utils import save_image

    model, kernel, device = state["ema"], kernel_of(process), state["generator"].device
    x = torch.empty(n, model.channels, model.size, model.size)
    x = sde.start_noise(x, torch.Generator().manual_seed(1), kernel).to(device)
    *_, x = sde.probability_flow(noise_function(model, process), kernel, x, nfe)
    with sde.replacing(path) as aside:
        save_image(sde.tile(decode(x) if decode else (x.cpu() + 1) / 2), aside, format="png")


@torch.no_grad()
def look(state, held_out, process, patience):
    """Early stopping: compare each active stage's held-out loss with its best: {stage: loss}.

    The weights of a stage's best look are kept; after `patience` looks without gain it is no longer
    trained. Times and noise are the same at every look.
    """
    model, found, n = state["ema"], {}, len(state["ema"].decoders)
    stopping = state.setdefault("stopping", dict(best=[float("inf")] * n, waited=[0] * n))
    edges, device = stage_edges(model, process), state["generator"].device
    for k in list(state["active"]):
        generator, total = torch.Generator(device).manual_seed(k), 0.0
        for part in held_out.split(500):
            x0, stage = network_space(part), torch.full((len(part),), k, device=device)
            t = draw_times(edges, process, stage, generator)
            eps = sde.fresh_noise(x0, generator, kernel_of(process))
            with half_precision(device):
                error = weighted_error(model, x0, eps, t, process, stage=k)
            total += float(error.sum())
        found[k] = total / len(held_out)
        if found[k] < stopping["best"][k]:
            stopping["best"][k], stopping["waited"][k] = found[k], 0
            own = {f"encoders.{k}", f"decoders.{k}"}
            mine = [key for key in model.state_dict() if ".".join(key.split(".")[:2]) in own]
            best = {key: model.state_dict()[key].clone() for key in mine}
            stopping["weights"] = {**stopping.get("weights", {}), **best}
        else:
            stopping["waited"][k] += 1
            if stopping["waited"][k] >= patience:
                state["active"].remove(k)
                say(f"stage {k} stops: no gain on held-out pictures in {patience} looks")
    return found


@contextlib.contextmanager
def stopping_gently():
    """Note Ctrl-C and SIGTERM in place of dying of them: a list, empty until one comes."""
    stop = []
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    for kind in before:
        signal.signal(kind, lambda *_: stop.append(True))
    try:
        yield stop
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def halts(stop, step, device):
    """Tell all processes alike whether one was asked to stop; several talk every tenth step."""
    return (ranks()[1] == 1 or step % 10 == 0) and all_agree(bool(stop), device)


def all_agree(flag, device):
    """Tell whether any process has raised its flag, to all of them alike."""
    if ranks()[1] == 1:
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def mean_losses(recent, n, device):
    """Average each stage's losses over steps and processes: {stage: float}."""
    table = torch.zeros(2, n, device=device)
    for losses in recent:
        for k, loss in losses.items():
            table[0, k] += loss
            table[1, k] += 1
    if ranks()[1] > 1:
        dist.all_reduce(table)
    return {k: (table[0, k] / table[1, k]).item() for k in range(n) if table[1, k]}


def trim(log, step):
    """Keep of a log, a file of JSON lines, what was written until `step`; make it if need be."""
    old = read_metrics(log.parent, log.name) if log.is_file() else []
    with sde.replacing(log) as aside:
        kept = (json.dumps(row) for row in old if row["step"] <= step)
        aside.write_text("".join(f"{row}\n" for row in kept), encoding="utf-8")


def append(row, log):
    """Add a row, a dictionary, to a log. Raises BadInput where it cannot be written."""
    try:
        with log.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
    except OSError as error:
        raise BadInput(
            f"cannot write to {log} ({error.strerror}): make room, then --resume goes on from the "
            "last checkpoint"
        ) from error


def read_metrics(folder, file="metrics.jsonl"):
    """Read a run's log as a list of dictionaries; torn rows, as of a full disk, are dropped."""
    rows, path = [], Path(folder) / file
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            say(f"{path}: a torn row is dropped: {line[:60]}")
    return rows


TEN_MINUTES = 600  # what a power cut may cost where --save_every does not count steps


def due(step, every, last):
    """Tell whether to save after a step: every so many, or (0) ten minutes after `last`."""
    return step % every == 0 if every else time.monotonic() - last > TEN_MINUTES


@sde.enough_memory()
def fit(
    state,
    images,
    settings,
    folder,
    save_every=0,
    sample_every=0,
    workers=0,
    held_out=None,
    decode=None,
    measure=None,
):
    """Run `train` to settings["steps"] and leave metrics, sample grids and checkpoints in `folder`.

    save_every: as in `due`. held_out: pictures for early stopping; decode: turns latents into
    pictures for the grids; measure: gives numbers on the averaged network, a dictionary, which are
    logged with each grid.
    Returns True when finished, False when Ctrl-C stopped it (the step is finished and saved).
    """
    steps, batch, process = settings["steps"], settings["batch"], settings["process"]
    folder, first, device = Path(folder), ranks()[0] == 0, state["generator"].device
    recent, bad, saved, n = [], [], state["step"], len(state["model"].decoders)
    last_save = time.monotonic()
    every, log, costs = max(1, steps // 40), folder / "metrics.jsonl", expect(state, settings)
    state.setdefault("petaflops", [0.0, 0.0])
    if first:
        trim(log, state["step"])
    options = {key: settings[key] for key in ("process", "batch", "warmup", "ema", "flip")}
    options.update(stages=settings.get("stages", "uniform"), workers=workers, bad=bad)
    loop, begin = train(state, images, steps, **options), time.perf_counter()
    done = dict(total=steps * batch, initial=state["step"] * batch)
    done.update(unit="img", unit_scale=True, disable=not first)
    with stopping_gently() as stop, tqdm(**done) as bar:
        for step, losses in loop:
            bar.update(batch)
            recent.append(losses)
            # As Table 2 counts (forward, of one picture a step) and in truth (all, backward twice).
            # paper: iterations times the average over a sampler's evaluations; here: the stages
            # that were drawn, because they are what training costs.
            for k in losses:
                state["petaflops"][0] += costs[k]["gflops"] / len(losses) / 1e6
                state["petaflops"][1] += 3 * costs[k]["true_gflops"] * batch / len(losses) / 1e6
            if step % every == 0 or step == steps:
                seconds, begin = time.perf_counter() - begin, time.perf_counter()
                row = dict(step=step, images_per_s=round(len(recent) * batch / seconds))
                means = mean_losses(recent, n, device)
                row.update({f"loss_{k}": round(loss, 7) for k, loss in means.items()})
                bar.set_postfix({key: f"{row[key]:.4g}" for key in row if key.startswith("loss")})
                if held_out is not None:
                    found = look(state, held_out, process, settings["patience"])
                    row.update({f"held_out_{k}": round(loss, 7) for k, loss in found.items()})
                petaflops = zip(("petaflops", "true_petaflops"), state["petaflops"], strict=True)
                row.update({key: float(f"{value:.6g}") for key, value in petaflops})
                recent = []
                if first:
                    append(row, log)
            halt = halts(stop, step, device)
            if due(step, save_every, last_save) or step == steps or halt or not state["active"]:
                if not all(torch.isfinite(loss) for loss in losses.values()):
                    raise BadInput(
                        f"the loss is no longer finite at step {step}: train with a lower --lr "
                        f"(step {saved} is saved)"
                    )
                if first:
                    save(state, settings, folder)
                saved, last_save = step, time.monotonic()
            if first and (step % (sample_every or -(-steps // 5)) == 0 or step == steps):
                draw_grid(state, process, folder / "samples" / f"{step:07}.png", decode)
                if measure:
                    row = dict(step=step, petaflops=state["petaflops"][0])
                    append({**row, **measure(state["ema"])}, log)
            if halt:
                return False
        sde.report_unreadable(bad, len(images))
    return True


# %% [markdown]
# Under `torchrun` every process runs this file. PyTorch's data parallelism averages their gradients;
# the first process alone prints and writes.


# %%
def join():
    """Make ready for long work: fast convolutions, and the other processes of torchrun, if any.

    Raises BadInput where there are more processes than GPUs.
    """
    torch.backends.cudnn.benchmark = torch.cuda.is_available()  # try its algorithms, take the best
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if torch.cuda.is_available():
            place, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if place >= there:
                raise BadInput(
                    f"process {place + 1} of this machine finds no GPU of its own among {there}: "
                    f"give torchrun --nproc_per_node={there}"
                )
            torch.cuda.set_device(place)
        # one process may have to wait long for another that downloads
        patient = dict(timeout=datetime.timedelta(hours=12))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", **patient)


@contextlib.contextmanager
def one_at_a_time():
    """Let the first process go ahead, such as to download, and the others follow."""
    rank, world = ranks()
    if rank > 0:
        dist.barrier()
    yield
    if world > 1 and rank == 0:
        dist.barrier()


def open_pictures(dataset, root, size, memory, workers=0):
    """Load a data set onto the device as uint8 (N, C, H, W), or open its files if it is large.

    memory: GiB that it may take; workers: processes that decode its files.
    """
    if dataset not in ("celeba", "folder"):
        return sde.load_images(dataset, root)[0].to(sde.device())
    pictures = sde.open_files(dataset, root, size)
    large = len(pictures) * 3 * size**2 > memory * 2**30
    return pictures if large else sde.read_pictures(pictures, workers).to(sde.device())


def wrap(state, compile):
    """Set state["forward"]: the model, shared between processes and compiled where asked."""
    model, several = state["model"], ranks()[1] > 1
    if several:
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else None
        unused = len(model.decoders) > 1  # a batch of one stage leaves the other decoders alone
        model = DistributedDataParallel(model, devices, find_unused_parameters=unused)
    state["forward"] = torch.compile(model) if compile else model


def check_batch(settings):
    """Raise BadInput for a batch whose activations cannot fit into this machine's memory."""
    with torch.device("meta"):
        model = network_of(settings)
        x, t = torch.empty(1, model.channels, model.size, model.size), torch.empty(1)
    stages = range(len(model.decoders))
    kept = max(unet.kept_bytes(lambda k=k: model(x, t, stage=k), model) for k in stages)
    batch = settings["batch"] // ranks()[1]
    sde.check_memory(batch * kept, f"batch = {settings['batch']}")


def prepare(settings, content=None, compile=False):
    """Build what a run's settings describe: a state ready to train.

    content: of the checkpoint to go on from. Raises BadInput where a batch is smaller than the
    number of stages that it shall mix.
    """
    check_batch(settings)
    torch.manual_seed(settings["seed"])  # the initial weights
    model = on_device(network_of(settings))
    n, batch = len(model.decoders), settings["batch"]
    if settings.get("stages") == "mixed" and batch < n:
        raise BadInput(f"batch = {batch} cannot mix {n} stages: give {n} or more")
    state = new_state(model, settings["lr"], settings["seed"])
    if content:
        restore(state, content)
    rank, world = ranks()
    if world > 1:  # dropout differs between processes
        torch.manual_seed((settings["seed"] + state["step"]) * world + rank)
    wrap(state, compile)
    return state


# %%
if __name__ == "__main__":
    check_settings(arch, process, stages, patience)
    join()
    rank, world = ranks()
    with one_at_a_time():
        pixels = open_pictures(dataset, root, size, memory, workers)
    recipe = RECIPES[dataset]
    run = Path(out) / (name or f"{dataset}-{arch}" + f"-{process}" * (process != "vp"))
    asked = dict(dataset=dataset, arch=arch)
    asked["network"] = network_name(network, dataset, arch, process)
    asked.update(process=process, stages=stages, patience=patience, ema=ema, seed=seed)
    asked.update(steps=steps or recipe["steps"], batch=batch or recipe["batch"])
    asked.update(lr=lr or recipe["lr"], warmup=recipe["warmup"], flip=recipe["flip"])
    asked.update(channels=None, size=None, decoders=None)
    if dataset in ("celeba", "folder"):
        asked.update(channels=3, size=size)
    if tailored:
        multistage = network_name(network, dataset, "multistage", process)
        asked["decoders"] = list(unet.NETWORKS[multistage]["decoders"])
    if asked["batch"] % world:
        raise BadInput(f"batch = {asked['batch']} cannot be shared by {world} processes")
    content = load(run) if resume else None

# %%
if __name__ == "__main__":
    if resume:
        if boundaries:
            asked["boundaries"] = find_boundaries(boundaries, dataset, pixels, process)
        agree(asked, content["settings"], run)
        asked["boundaries"] = content["settings"]["boundaries"]
    elif arch == "unified":
        asked["boundaries"] = []
    else:
        with one_at_a_time():
            found = find_boundaries(boundaries, dataset, pixels, process, asked["network"])
            asked["boundaries"] = found
    held_out, training_set = None, pixels
    if patience:
        if not torch.is_tensor(pixels):
            raise BadInput("early stopping needs the pictures in memory: give --memory more GiB")
        if len(pixels) < 10:
            raise BadInput(
                f"{len(pixels)} pictures are too few for early stopping: give 10 or more"
            )
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
        held_out, training_set = (
            pixels[order[: len(pixels) // 10]],
            pixels[order[len(pixels) // 10 :]],
        )
    state = prepare(asked, content, compile)
    if rank == 0:  # nothing is touched before everything is known to fit
        claim(run, resume)
        write_settings(asked, run)

# %%
if __name__ == "__main__":
    say(f"the run lies in {run}")
    finished = fit(state, training_set, asked, run, save_every, sample_every, workers, held_out)
    sde.release(run)
    if world > 1:
        dist.destroy_process_group()
    if not finished and rank == 0:
        print(f"stopped and saved at step {state['step']}: the same command with --resume goes on")
    if not finished or rank > 0:
        sys.exit(0 if finished else 130)

# %% [markdown]
# ## What it learned
#
# The loss of each stage over training. Near the noise ($k=2$) the noise is nearly the whole picture
# and easy to read off; near the image ($k=0$) it is a faint grain, and hard. The losses differ by
# orders of magnitude, which is one way to see that these are different tasks.


# %%
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
    last = read_metrics(run)[-1]
    print(f"{last['images_per_s']:,} images/s on {sde.device()}")
    print(f"{1e6 * last['petaflops']:.4g} GFLOPs as Table 2 counts: one picture a step, forward")
    print(
        f"{1e6 * last['true_petaflops']:.4g} GFLOPs in truth: every picture, forward and backward"
    )

# %% [markdown]
# How the samples came about: a row of the grids that were drawn on the way, always from the same
# noise.

# %%
if __name__ == "__main__":
    grids = sorted((run / "samples").glob("*.png"))
    figure, axes = plt.subplots(len(grids), 1, figsize=(10, 1.0 * len(grids)), squeeze=False)
    for ax, path in zip(axes[:, 0], grids, strict=True):
        grid = plt.imread(path)
        ax.imshow(grid[: len(grid) // 2 + 3])  # the first of its two rows
        ax.set_title(f"step {int(path.stem):,}", fontsize=9, loc="left")
        ax.axis("off")
    figure.tight_layout()
    sde.show(run / "progress.png")

# %% [markdown]
# And what the network sees in noise, beside the optimal denoiser of step 01. Both estimate the
# picture: $\hat x_0=x_t/s_t-\sigma_t\,\epsilon_\theta(x_t,t)$.

# %%
if __name__ == "__main__":
    trained, _ = load_model(run)
    kernel, generator = kernel_of(process), torch.Generator().manual_seed(seed)
    levels = sde.VP.log_snr(torch.tensor([0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.7]))
    t = kernel.time(levels).float().to(sde.device())  # the same noise levels in either process
    if not torch.is_tensor(pixels):
        pixels = sde.read_pictures(sde.PictureFiles(pixels.files[:1000], size), workers)
        pixels = pixels.to(sde.device())
    x0 = network_space(pixels[torch.arange(8) % len(pixels)])  # a small set starts over
    xt = sde.perturb(x0, torch.randn(x0.shape, generator=generator).to(x0), t, kernel)
    with torch.no_grad(), half_precision(xt.device):
        eps = predict_noise(trained, xt, t, process)
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
