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
workshop = importlib.import_module("00_workshop")  # first: it readies the process for torch

import contextlib
import copy
import itertools
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sde = importlib.import_module("01_sde_and_denoiser")
clustering = importlib.import_module("02_clustering")
unet = importlib.import_module("03_multistage_unet")
BadInput = workshop.BadInput

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
workshop.settings(globals(), "04_train")

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


def noise_function(model, process, calls=None, half=True):
    """Return eps(x, t) of a network for the solvers, which ask for one time at a time.

    calls: a list that gets the stage of each evaluation. half: allow `half_precision`.
    """

    def eps(x, t):
        k = int(model.stage(t[:1]))  # solvers keep t on the CPU: a GPU would have to be waited for
        if calls is not None:
            calls.append(k)
        times = torch.full(t.shape, float(t[0]), dtype=x.dtype, device=x.device)
        with workshop.half_precision(x.device) if half else contextlib.nullcontext():
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


def stages_in_turns(active, batch):
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


# %% [markdown]
# ## The loop
#
# `train` is a generator: it yields after every step and leaves bars, plots and files to its caller.
# All that changes during training lies in one `state`, so that a checkpoint is that state on disk.


# %%


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
    edges, (rank, world) = stage_edges(model, process), workshop.ranks()
    there = edges.to(device, torch.float32)
    todo = range(state["step"] + 1, steps + 1)
    going = itertools.takewhile(lambda _: state["active"], todo)  # until no stage is left
    source = workshop.pictures_of_steps(images, batch, state["seed"], todo, workers, bad)
    model.train()
    for step, pictures in zip(going, source, strict=False):
        x0 = workshop.to_network_space(pictures)  # (b, C, H, W)
        chance = stage_chances(edges, process, state["active"])
        dice = workshop.step_generator(state["seed"], 2 * step + 1)
        k = torch.multinomial(chance, 1, generator=dice).expand(batch)  # one stage for all
        if stages == "mixed":
            k = stages_in_turns(state["active"], batch)
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
        with workshop.half_precision(device):
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


def save_checkpoint(state, settings, folder):
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
    workshop.write_checkpoint(content, folder)


def restore_checkpoint(state, content):
    """Put a checkpoint's content back into a fresh state. Raises BadInput where it does not fit."""
    with workshop.fitting_checkpoint("the checkpoint"):
        for key in STATES:
            state[key].load_state_dict(content[key])
        workshop.restore_moments(state["optimizer"])
        kept = ("step", "active", "stopping", "petaflops")
        state.update({key: content[key] for key in kept if key in content})
        workshop.restore_generator(state, content)
        torch.set_rng_state(content["torch_rng"])
        if torch.cuda.is_available() and "cuda_rng" in content:
            torch.cuda.set_rng_state(content["cuda_rng"])


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
    return unet.build_network(settings["network"], **kind)


def averaged_model(content):
    """Build the averaged network of a checkpoint's content, in eval mode on the device.

    With early stopping each stage has the weights of its best look at held-out pictures.
    """
    with workshop.fitting_checkpoint("the checkpoint"):
        model = network_of(content["settings"])
        model.load_state_dict({**content["ema"], **content.get("stopping", {}).get("weights", {})})
    return workshop.move_to_device(model).eval()


def load_model(folder):
    """Load the averaged network of a run: (model in eval mode on the device, its settings)."""
    content = workshop.read_checkpoint(folder)
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
PAPER_NETWORKS = {
    "vp": dict(multistage="table5_1", unified="table7_1", separate="table3_separate"),
    "edm": dict(multistage="edm", unified="edm_unified", separate="edm_separate"),
    "ldm": dict(multistage="table6_4", unified="ldm_unified", separate="ldm_separate"),
}


def network_name(network, dataset, arch, process):
    """Name the entry of NETWORKS for what was asked: an own one, a small one or the paper's.

    Raises BadInput for an own one that is of another arch.
    """
    base = network or dataset
    paper = workshop.about(dataset)["recipe"] is workshop.PAPER  # and its networks with it
    if base in unet.SMALL_NETWORKS and (network or not paper):
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
        progress = workshop.ranks()[0] == 0
        try:
            cuts = clustering.algorithm_1(images[:50_000].float() / 255, progress=progress)
        except BadInput as error:
            if len(images) >= FEW:
                raise BadInput(
                    f"step 02 finds no boundaries ({error}): give --boundaries"
                ) from None
            workshop.print_once(
                f"{len(images)} pictures are too few to find boundaries: taking the published ones"
            )
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


def estimate_training(state, settings):
    """Say what will be trained and, after a trial of each kind of step, until when: stages' costs.

    The trial changes nothing: neither weights nor random numbers.
    """
    device, model, process = state["generator"].device, state["model"], settings["process"]
    costs, (rank, world) = unet.cost_of(copy.deepcopy(model).to("meta")), workshop.ranks()
    left, n = settings["steps"] - state["step"], len(model.decoders)
    cuts = ", ".join(f"{tau:.4f}" for tau in settings["boundaries"]) or "none"
    workshop.print_once(
        f"{left:,} steps of {settings['batch']} pictures on {device}, processes: {world}",
        f"{settings['arch']} network {settings['network']}, boundaries {cuts}",
    )
    for k in range(n):
        million, gflops = costs[k]["parameters"] / 1e6, costs[k]["gflops"]
        workshop.print_once(
            f"  stage {k}: {million:.2f} million parameters, {gflops:.4g} GFLOPs a picture"
        )
    x = torch.zeros(settings["batch"] // world, model.channels, model.size, model.size).to(device)
    t, seconds = torch.full((len(x),), 0.5, device=device), {}
    chance = stage_chances(stage_edges(model, process), process, state["active"]).tolist()
    kinds = list(enumerate(chance))
    if settings.get("stages") == "mixed" and len(state["active"]) > 1:  # no other is ever compiled
        mine = stages_in_turns(state["active"], settings["batch"]).chunk(world)[rank]
        kinds = [(mine[: len(state["active"])].tolist(), 1.0)]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for i, (stage, _) in [*enumerate(kinds), *enumerate(kinds)]:  # the first round warms up
            begin = time.perf_counter()
            with workshop.half_precision(device):
                predicted = predict_noise(state["forward"], x, t, process, stage=stage)
            predicted.float().square().mean().backward()
            state["optimizer"].zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[i] = time.perf_counter() - begin
    step = sum(p * seconds[i] for i, (_, p) in enumerate(kinds))
    end = time.strftime("%d %b %H:%M", time.localtime(time.time() + left * step))
    workshop.print_once(
        f"about {settings['batch'] / step:,.0f} pictures a second, done about {end}"
    )
    return costs


@torch.no_grad()
def draw_grid(state, process, path, decode=None, n=32, nfe=25):
    """Draw n pictures with the averaged weights and save them as a grid; decode: from latents."""
    from torchvision.utils import save_image

    model, kernel, device = state["ema"], kernel_of(process), state["generator"].device
    x = torch.empty(n, model.channels, model.size, model.size)
    x = sde.start_noise(x, torch.Generator().manual_seed(1), kernel).to(device)
    *_, x = sde.probability_flow(noise_function(model, process), kernel, x, nfe)
    with workshop.replacing(path) as aside:
        save_image(
            workshop.tile_images(decode(x) if decode else (x.cpu() + 1) / 2), aside, format="png"
        )


@torch.no_grad()
def check_held_out(state, held_out, process, patience):
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
            x0, stage = workshop.to_network_space(part), torch.full((len(part),), k, device=device)
            t = draw_times(edges, process, stage, generator)
            eps = sde.fresh_noise(x0, generator, kernel_of(process))
            with workshop.half_precision(device):
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
                workshop.print_once(
                    f"stage {k} stops: no gain on held-out pictures in {patience} looks"
                )
    return found


def mean_losses(recent, n, device):
    """Average each stage's losses over steps and processes: {stage: float}."""
    table = torch.zeros(2, n, device=device)
    for losses in recent:
        for k, loss in losses.items():
            table[0, k] += loss
            table[1, k] += 1
    if workshop.ranks()[1] > 1:
        dist.all_reduce(table)
    return {k: (table[0, k] / table[1, k]).item() for k in range(n) if table[1, k]}


@workshop.enough_memory()
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
    folder, first, bad = Path(folder), workshop.ranks()[0] == 0, []
    log, costs = folder / "metrics.jsonl", estimate_training(state, settings)
    options = {key: settings[key] for key in ("process", "batch", "warmup", "ema", "flip")}
    options.update(stages=settings.get("stages", "uniform"), workers=workers, bad=bad)
    loop, begin = train(state, images, steps, **options), time.perf_counter()

    def summarize(recent):
        nonlocal begin
        seconds, begin = time.perf_counter() - begin, time.perf_counter()
        row = dict(images_per_s=round(len(recent) * batch / seconds))
        means = mean_losses(recent, len(state["model"].decoders), state["generator"].device)
        row.update({f"loss_{k}": round(loss, 7) for k, loss in means.items()})
        if held_out is not None:
            found = check_held_out(state, held_out, process, settings["patience"])
            row.update({f"held_out_{k}": round(loss, 7) for k, loss in found.items()})
        petaflops = zip(("petaflops", "true_petaflops"), state["petaflops"], strict=True)
        return row | {key: float(f"{value:.6g}") for key, value in petaflops}

    def save(losses):
        if not all(torch.isfinite(loss) for loss in losses.values()):
            raise BadInput(
                f"the loss is no longer finite at step {state['step']}: train with a lower --lr "
                "(the last checkpoint is kept)"
            )
        if first:
            save_checkpoint(state, settings, folder)

    def after(step):
        if step % (sample_every or -(-steps // 5)) == 0 or step == steps:
            draw_grid(state, process, folder / "samples" / f"{step:07}.png", decode)
            if measure:
                row = dict(step=step, petaflops=state["petaflops"][0])
                workshop.append_row({**row, **measure(state["ema"])}, log)

    finished = workshop.keep_training(
        *(count_petaflops(loop, state, costs, batch), state, steps, log, summarize, save, after),
        **dict(save_every=save_every, batch=batch, shown="loss", unit="img", unit_scale=True),
    )
    if finished:
        workshop.report_unreadable(bad, len(images))
    return finished


def count_petaflops(loop, state, costs, batch):
    """Pass a training's (step, losses) on and add up in state["petaflops"] what the steps cost.

    As Table 2 counts (forward, of one picture a step) and in truth (all, backward twice).
    """
    state.setdefault("petaflops", [0.0, 0.0])
    for step, losses in loop:
        # paper: iterations times the average over a sampler's evaluations; here: the stages that
        # were drawn, because they are what training costs.
        for k in losses:
            state["petaflops"][0] += costs[k]["gflops"] / len(losses) / 1e6
            state["petaflops"][1] += 3 * costs[k]["true_gflops"] * batch / len(losses) / 1e6
        yield step, losses


# %% [markdown]
# Under `torchrun` every process runs this file. PyTorch's data parallelism averages their gradients;
# the first process alone prints and writes.


# %%


def wrap_model(state, compile):
    """Set state["forward"]: the model, shared between processes and compiled where asked."""
    model, several = state["model"], workshop.ranks()[1] > 1
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
    batch = settings["batch"] // workshop.ranks()[1]
    workshop.check_memory(batch * kept, f"batch = {settings['batch']}")


def prepare_state(settings, content=None, compile=False):
    """Build what a run's settings describe: a state ready to train.

    content: of the checkpoint to go on from. Raises BadInput where a batch is smaller than the
    number of stages that it shall mix.
    """
    check_batch(settings)
    torch.manual_seed(settings["seed"])  # the initial weights
    model = workshop.move_to_device(network_of(settings))
    n, batch = len(model.decoders), settings["batch"]
    if settings.get("stages") == "mixed" and batch < n:
        raise BadInput(f"batch = {batch} cannot mix {n} stages: give {n} or more")
    state = new_state(model, settings["lr"], settings["seed"])
    if content:
        restore_checkpoint(state, content)
    rank, world = workshop.ranks()
    if world > 1:  # dropout differs between processes
        torch.manual_seed((settings["seed"] + state["step"]) * world + rank)
    wrap_model(state, compile)
    return state


# %%
if __name__ == "__main__":
    check_settings(arch, process, stages, patience)
    workshop.join_processes()
    rank, world = workshop.ranks()
    with workshop.first_process_first():
        pixels = workshop.open_data_set(dataset, root, size, memory, workers)
    recipe = workshop.about(dataset)["recipe"]
    run = Path(out) / (name or f"{dataset}-{arch}" + f"-{process}" * (process != "vp"))
    asked = dict(dataset=dataset, arch=arch)
    asked["network"] = network_name(network, dataset, arch, process)
    asked.update(process=process, stages=stages, patience=patience, ema=ema, seed=seed)
    asked.update(steps=steps or recipe["steps"], batch=batch or recipe["batch"])
    asked.update(lr=lr or recipe["lr"], warmup=recipe["warmup"], flip=recipe["flip"])
    asked.update(channels=None, size=None, decoders=None)
    if "shape" not in workshop.DATASETS[dataset]:
        asked.update(channels=3, size=size)
    if tailored:
        multistage = network_name(network, dataset, "multistage", process)
        asked["decoders"] = list(unet.NETWORKS[multistage]["decoders"])
    if asked["batch"] % world:
        raise BadInput(f"batch = {asked['batch']} cannot be shared by {world} processes")
    content = workshop.read_checkpoint(run) if resume else None

# %%
if __name__ == "__main__":
    if resume:
        if boundaries:
            asked["boundaries"] = find_boundaries(boundaries, dataset, pixels, process)
        workshop.check_same_settings(asked, content["settings"], run)
        asked["boundaries"] = content["settings"]["boundaries"]
    elif arch == "unified":
        asked["boundaries"] = []
    else:
        with workshop.first_process_first():
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
    state = prepare_state(asked, content, compile)
    if rank == 0:  # nothing is touched before everything is known to fit
        workshop.claim_folder(run, resume)
        workshop.write_json(asked, run / "settings.json")

# %%
if __name__ == "__main__":
    workshop.print_once(f"the run lies in {run}")
    finished = fit(state, training_set, asked, run, save_every, sample_every, workers, held_out)
    workshop.unlock_folder(run)
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
    rows = workshop.read_log(folder)
    plt.figure(figsize=(8, 3))
    for key in sorted({key for row in rows for key in row if key.startswith("loss")}):
        points = [(row["step"], row[key]) for row in rows if key in row]
        plt.plot(*zip(*points, strict=True), marker=".", label=f"stage {key[-1]}")
    plt.gca().set(yscale="log", xlabel="step", ylabel="loss (eq. 4)")
    plt.legend(loc="center left", bbox_to_anchor=(1, 0.5))


if __name__ == "__main__":
    draw_losses(run)
    workshop.show_figure(run / "loss.png")
    last = workshop.read_log(run)[-1]
    print(f"{last['images_per_s']:,} images/s on {workshop.device()}")
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
    workshop.show_figure(run / "progress.png")

# %% [markdown]
# And what the network sees in noise, beside the optimal denoiser of step 01. Both estimate the
# picture: $\hat x_0=x_t/s_t-\sigma_t\,\epsilon_\theta(x_t,t)$.

# %%
if __name__ == "__main__":
    trained, _ = load_model(run)
    kernel, generator = kernel_of(process), torch.Generator().manual_seed(seed)
    levels = sde.VP.log_snr(torch.tensor([0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.7]))
    t = kernel.time(levels).float().to(workshop.device())  # the same noise levels in either process
    if not torch.is_tensor(pixels):
        pixels = workshop.read_pictures(workshop.PictureFiles(pixels.files[:1000], size), workers)
        pixels = pixels.to(workshop.device())
    x0 = workshop.to_network_space(pixels[torch.arange(8) % len(pixels)])  # a small set starts over
    xt = sde.perturb(x0, torch.randn(x0.shape, generator=generator).to(x0), t, kernel)
    with torch.no_grad(), workshop.half_precision(xt.device):
        eps = predict_noise(trained, xt, t, process)
    s, sigma = (sde.per_image(v, xt) for v in (kernel.s(t), kernel.sigma(t)))
    learned = xt / s - sigma * eps
    best = sde.posterior_mean(xt, t, kernel, workshop.to_network_space(pixels[:50_000]))
    rows = [(row + 1) / 2 for row in (x0, xt, learned, best)]
    titles = [
        "picture",
        "with noise, more from left to right",
        "the network",
        "the optimal denoiser",
    ]
    workshop.show_images(rows, titles, run / "denoised.png", columns=8)

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
