# %% [markdown]
# # 04 · Training, stage by stage
#
# **You will** train the network of step 03 to predict noise, first on digits, in a loop of ten
# lines that you can follow. Below the line the same training is a command, for a laptop, a GPU, or
# several under `torchrun`. It survives an interruption, and step 05 samples from what it leaves.
#
# `python 04_train.py` shows this lesson and then trains on digits. With flags, as in
# `python 04_train.py --dataset celeba`, the file is the command alone.

# %% tags=["imports"]
import copy
import importlib
import os
import sys

if "__file__" not in globals():  # a notebook, which may have been opened where it lies
    os.chdir(".." if os.path.exists("../00_workshop.py") else ".")
    assert os.path.exists("00_workshop.py"), "papermill needs --cwd PROJECT"
workshop = importlib.import_module("00_workshop")  # before torch

import matplotlib.pyplot as plt
import torch

sde = importlib.import_module("01_sde_and_denoiser")
unet = importlib.import_module("03_multistage_unet")
lesson = workshop.is_lesson()

# %% [markdown]
# ## What the network is asked
#
# A training example is a picture $x_0$, a time $t$ and noise $\epsilon$. The network is given the
# mixture $x_t=s_t(x_0+\sigma_t\,\epsilon)$ of eq. (1) and the time, and is asked for the noise.
# (Networks see pixels in [−1, 1], twice the spread of steps 01 and 02; the cuts stay those of [0,
# 1]. Step 00's `workshop` loads pictures, maps them there and back, and shows them; `perturb` is
# eq. (1), from step 01.)

# %%
if __name__ == "__main__" and lesson:
    pixels, _ = workshop.load_images("digits")  # uint8 (1797, 1, 8, 8)
    t = torch.tensor([0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.44, 0.6, 0.8, 1.0])
    x0 = workshop.to_network_space(pixels[3:4]).expand(10, -1, -1, -1)  # (10, 1, 8, 8)
    eps = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).expand_as(x0)
    xt = sde.perturb(x0, eps, t, sde.VP)
    rows = [workshop.to_pictures(xt), workshop.to_pictures(eps)]
    titles = [r"it is given $x_t$ and $t$", r"it is asked for $\epsilon$"]
    labels = [f"t = {tau:g}" for tau in t.tolist()]
    workshop.show_images(rows, titles, "figures/04_task.png", columns=10, labels=labels)

# %% [markdown]
# One answer, ten questions. At the right it can be read off, because $x_t$ is almost nothing but
# noise. At the left it is a faint grain on a picture, and the picture has to be known first. These
# are different tasks, which is why each stage has a decoder of its own.
#
# Why predict the noise, and not the picture? Each gives the other, because $x_t$ is known. But an
# error in the noise becomes $\sigma_t$ times that error in the picture. So a network's errors are
# small where the picture is nearly clean, which is where they would be seen.
#
# ## The loss
#
# The paper trains by denoising score matching:
#
# $$\min_\theta\;\mathbb E\big[\,\omega(t)\,\|\epsilon_\theta(x_t,t)
#   +s_t\sigma_t\nabla_{x_t}\log p_t(x_t\mid x_0)\|_2^2\,\big] \tag{4}$$
#
# Where is the noise in it? The kernel $p_t(x_t\mid x_0)$ is a Gaussian around $s_tx_0$ (eq. 1), so
# its score is $-(x_t-s_tx_0)/(s_t\sigma_t)^2=-\epsilon/(s_t\sigma_t)$, and the second term is
# $-\epsilon$: the network is compared with the noise. The cell below asks automatic differentiation
# whether that is right.
#
# The expectation is over pictures, times and noise, and each batch is a fresh sample of all three.
# The weight $\omega(t)$ says how much each time matters; with the VP kernel it is 1, as in DDPM.
# The code takes the mean over the pixels, not their sum. That only changes the unit of the loss.


# %%
def compute_loss(model, x0, t, eps):
    """Compare predicted noise with eps: a scalar. x0, eps: (B, C, H, W), t: (B,)."""
    xt = sde.perturb(x0, eps, t, sde.VP)  # Eq. 1
    return ((model(xt, t) - eps) ** 2).mean()  # Eq. 4


# %%
if __name__ == "__main__" and lesson:
    s, sigma = (sde.per_image(value, x0) for value in (sde.VP.s(t), sde.VP.sigma(t)))
    xt = xt.clone().requires_grad_()
    log_p = -((xt - s * x0) ** 2 / (2 * (s * sigma) ** 2)).sum()  # of Eq. 1, up to a constant
    (score,) = torch.autograd.grad(log_p, xt)
    gap = (s * sigma * score + eps).abs().max()
    print("how far the second term of eq. (4) is off -eps: below 1e-4")
    found = [compute_loss(lambda x, t: x, *example) for example in zip(x0, t, eps, strict=True)]
    print("loss of a network that returns its input:", *[f"{loss:.3f}" for loss in found])
    assert gap < 1e-4

# %% [markdown]
# Those are the losses at the ten times of the figure above. Noise has variance 1, so a network that
# always says 0 has a loss of 1 at every time. Returning the input is worse than that near the
# image, and nearly perfect near the noise. Our small networks start by doing just that: they add
# their input to the decoder's output, which is 0 at first (step 03). The lowest possible loss is
# that of the optimal denoiser of step 01.
#
# ## Which times?
#
# The authors' code trains one stage in each batch. It draws a stage, all being equally likely, then
# a $t$ for every picture, uniformly inside that stage. So the encoder learns from every batch, and
# a decoder from a third of them.
#
# The seed and the number of the step alone decide which pictures and which stage a step sees
# (`step_generator` of step 00), so that a run can go on where it stopped. Times and noise come from
# one generator that goes on from step to step. Half of the photographs are mirrored, as in the
# authors' recipe; digits are not, because a mirrored digit is no digit.


# %%
edges = torch.tensor([sde.VP.t_min, 0.1, 0.44, sde.VP.t_max])  # 02's cuts of digits, rounded


def draw_batch(images, edges, batch, step, generator, flip=False):
    """Draw what a step sees: x0 (B, C, H, W), t (B,) of one stage, eps (B, C, H, W), the stage."""
    dice = [workshop.step_generator(0, 2 * step + i) for i in (0, 1)]
    i = torch.randint(len(images), (batch,), generator=dice[0])
    k = int(torch.multinomial(torch.ones(len(edges) - 1).double(), 1, generator=dice[1]))
    x0 = workshop.to_network_space(images[i])
    t = edges[k] + torch.rand(batch, generator=generator) * (edges[k + 1] - edges[k])
    eps = torch.randn(x0.shape, generator=generator)
    turn = torch.rand(batch, generator=generator) < 0.5
    if flip:
        x0 = torch.where(turn[:, None, None, None], x0.flip(-1), x0)
    return x0, t, eps, k


# %%
if __name__ == "__main__" and lesson:
    generator, times = torch.Generator().manual_seed(0), {0: [], 1: [], 2: []}
    for step in range(1, 301):
        _, t, _, k = draw_batch(pixels, edges, 64, step, generator)
        times[k] += t.tolist()
    for k, drawn in times.items():
        low, high, share = min(drawn), max(drawn), len(drawn) / (300 * 64)
        print(f"stage {k}: {share:.0%} of the times, from {low:.3f} to {high:.3f}")

# %% [markdown]
# Each stage gets a third, up to chance. So a third of the work goes into the tenth of the timeline
# next to the image. A network for all times, trained with $t$ uniform, would spend a tenth of its
# work there. The two networks differ in their times as well as in their decoders, and a fair
# comparison has to separate these two effects (below the line, `--times`).
#
# *Mixed* batches, with all stages in each, are the better estimator: the same expectation with less
# scatter. On `digits` each of five seeds is better with them, so its recipe uses them (RESULTS.md).
#
# ## One step
#
# In a step Adam goes down the gradient of the loss. The recipe takes two precautions. Gradients
# longer than 1 are cut to that length, so that one odd batch cannot throw the weights off. And the
# learning rate grows linearly during the first steps (*warm-up*), when Adam's averages of the
# gradients have hardly seen anything. Then it is constant, as in the paper; with `decay` it falls
# linearly to zero, so that the last steps, too small to jitter, settle what the large ones found.
#
# A batch of one stage has no gradient for the other decoders: they and their averages in Adam stay
# as they are. Does the network learn? Take the one for digits from step 03 (`build_network`), and
# train it on one batch, again and again.


# %%
def training_step(model, optimizer, loss, rate=1):
    """Take one step of Adam down the gradient of a loss, at a share of the learning rate."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = optimizer.defaults["lr"] * rate
    optimizer.step()
    optimizer.zero_grad()


# %%
if __name__ == "__main__" and lesson:
    torch.manual_seed(0)  # the initial weights
    model = unet.build_network("digits", boundaries=(0.1, 0.44))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    x0, t, eps, k = draw_batch(pixels, edges, 32, 1, torch.Generator().manual_seed(0))
    found = []
    for _ in range(10):
        loss = compute_loss(model, x0, t, eps)
        training_step(model, optimizer, loss)
        found.append(f"{loss.item():.3f}")
    print(f"loss of a batch of stage {k}, step after step:", *found)

# %% [markdown]
# It does. But the weights jitter from batch to batch, because each batch pulls at them in its own
# direction, and samples suffer from that more than the loss shows. So one does not sample with the
# trained weights $\theta$, but with their exponential moving average (*EMA*)
#
# $$\bar\theta\leftarrow d\,\bar\theta+(1-d)\,\theta,\qquad d=\min\Big(0.9999,\frac{1+n}{10+n}\Big)
#   \quad\text{after step }n.$$
#
# A decay of 0.9999 averages over about 10,000 steps. Used from the beginning, it would remember the
# initial weights for too long: after 150 steps they would still be 98.5% of the average. So $d$
# grows towards 0.9999, and after step $n$ the average looks back on about $n/9$ steps.


# %%
@torch.no_grad()
def update_average(average, model, n, decay=0.9999):
    """Let the averaged weights follow those of the model after its step n."""
    d = min(decay, (1 + n) / (10 + n))
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(weight, 1 - d)  # EMA: d * mean + (1 - d) * weight


# %% [markdown]
# ## The whole loop
#
# These pieces make up the training: draw a batch, compare, step, average. It is written as a
# generator: it yields after every step, and leaves all else to its caller. (`fused` computes Adam
# for all weights at once. The learning rate of 3e-3 suits small networks and short runs; the
# authors' 2e-4 is for a hundred million weights and 450,000 steps.)
#
# **Predict first:** which stage has the lowest loss, from the beginning? <details>
# <summary>Answer</summary>Stage 2, next to the noise: its input is nearly the answer. In stage 0
# the noise is hard to tell from the picture.</details>


# %%
def train_plainly(model, average, images, edges, steps, batch=32, lr=3e-3, flip=False):
    """Train a model for some steps, and its average with it: yields (step, stage, loss)."""
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        x0, t, eps, k = draw_batch(images, edges, batch, step, generator, flip)
        loss = compute_loss(model, x0, t, eps)
        training_step(model, optimizer, loss, rate=min(1, step / 100))
        update_average(average, model, step)
        yield step, k, loss.item()


# %% tags=["draws"]
def draw_losses(curves):
    """Plot the losses of stages over training. curves: {stage: [(step, loss)]}."""
    plt.figure(figsize=(8, 3))
    for k, points in sorted(curves.items()):
        plt.plot(*zip(*points, strict=True), marker=".", color=f"C{k}", label=f"stage {k}")
    plt.gca().set(yscale="log", xlabel="step", ylabel="loss (Eq. 4)")
    plt.legend(loc="center left", bbox_to_anchor=(1, 0.5))


# %%
if __name__ == "__main__" and lesson:
    torch.manual_seed(0)
    model = unet.build_network("digits", boundaries=(0.1, 0.44))
    average, curves = copy.deepcopy(model), {0: [], 1: [], 2: []}
    for step, k, loss in train_plainly(model, average, pixels, edges, steps=150):
        curves[k].append((step, loss))
    draw_losses(curves)
    workshop.show_figure("figures/04_plain.png")

# %% [markdown]
# One point is one step, in the colour of the stage that was drawn. (The 150 steps take seconds, the
# run below takes minutes.) Much of the scatter does not come from the network: within a stage small
# times are harder than large ones, and every batch has its own times.
#
# ## What it sees
#
# If you know the noise, you know the picture. Solved for the picture, eq. (1) reads $\hat
# x_0=x_t/s_t-\sigma_t\,\epsilon_\theta(x_t,t)$. Here is one digit at eight times, as the averaged
# network sees it, and in the last row as the optimal denoiser of step 01 does, which has all digits
# at hand (`posterior_mean`, from below that step's line, is its fast form).


# %% tags=["draws"]
@torch.no_grad()
def show_estimates(predict, images, kernel, path):
    """Show one of the uint8 images at noise levels, as predict(xt, t) and the optimum see it."""
    t = torch.tensor([0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.7])
    t = kernel.time(sde.VP.log_snr(t)).float().to(images.device)  # the same levels in any kernel
    x0 = workshop.to_network_space(images[3 % len(images)]).expand(len(t), -1, -1, -1)
    eps = torch.randn(x0[:1].shape, generator=torch.Generator().manual_seed(0)).to(x0)
    xt = sde.perturb(x0, eps, t, kernel)
    s, sigma = (sde.per_image(value, xt) for value in (kernel.s(t), kernel.sigma(t)))
    learned = xt / s - sigma * predict(xt, t)  # Eq. 1, solved for x0
    some = workshop.to_network_space(workshop.first_of(images, 50_000))
    best = sde.posterior_mean(xt, t, kernel, some)
    rows = [workshop.to_pictures(row) for row in (xt, learned, best)]
    titles = ["with noise", "what the network sees", "what the optimal denoiser sees"]
    labels = [f"t = {tau:.2g}" for tau in t.tolist()]
    workshop.show_images(rows, titles, path, columns=len(t), labels=labels)


if __name__ == "__main__" and lesson:
    show_estimates(average.eval(), pixels, sde.VP, "figures/04_plain_denoised.png")

# %% [markdown]
# After 150 steps the network hardly cleans the left columns. From $t$ = 0.1 on it does more, and at
# 0.3 it guesses and sees a blurred digit. At the right it nears the mean of all digits, the best
# answer there. The run below ends in the same figure, for a narrower network and more steps.
#
# **You have** the whole method of this step: eq. (4) as a line, a batch of one stage, a step, an
# average, and the loop. What follows trains in the same way, and a check shows that it does.
#
# ### Exercises
#
# 1. What is the loss of the optimal denoiser? Is it 0? <details><summary>Solution</summary>Pass
#    `lambda x, t: sde.optimal_denoiser(x, t, sde.VP, workshop.to_network_space(pixels))` to
#    `compute_loss`, with batches of `draw_batch`. It is the lowest, but not 0: where noise is high,
#    several pictures may have led to $x_t$.</details>
# 2. Train a network for all times: `unet.build_network("digits_unified")`, edges 0.001 and 1. Why can
#    its curve not be compared with those above? <details><summary>Solution</summary>It averages over
#    all $t$. Measure the loss of both averaged networks on the same batches of `draw_batch` with the
#    edges of the three stages.</details>
#
# ## Below this line: faster, safer, as published
#
# The training command: other processes, mixed batches, several GPUs, checkpoints, early stopping.
# Where a setting is 0 or empty, the recipe of the data set decides (`workshop.DATASETS`, step 00).

# %% tags=["parameters"]
dataset = "digits"  # digits, mnist, cifar10, celeba or folder
root = "data"  # where the data set lies or is downloaded to
size = 32  # side in pixels that pictures of celeba and folder are brought to [4, 2048]
arch = "multistage"  # multistage, unified or separate
tailored = False  # give separate networks the decoder widths of the multistage one
network = ""  # a name of step 03's NETWORKS such as cifar10; empty: the data set's recipe
process = "vp"  # vp or ldm (predict noise), flow (velocity), edm (preconditioned), pfgm or pfgm-128
encoder = 0  # channels of the encoder; 0: the recipe's, or the network's [0, 4096]
decoders = ""  # channels of the decoders such as 48,32,16; empty: the recipe's, or the network's
stages = ""  # uniform: one stage a batch; mixed: all stages in every batch; empty: the recipe
weight = ""  # min-snr: less weight near the image; none: that of Eq. 4; empty: the recipe
times = ""  # stages: all count the same; uniform: all times do; empty: the recipe
boundaries = ""  # inner boundaries such as 0.1,0.44; empty: those that step 02 finds
classes = False  # tell the network the label of each picture, except for one in ten
steps = 0  # training steps; 0: the recipe of the data set [0, 1000000000]
batch = 0  # pictures a step, over all devices; 0: the recipe of the data set [0, 1000000]
pieces = 1  # parts into which a step's pictures are split, to save memory [1, 1000000]
lr = 0.0  # Adam's learning rate; 0: the recipe of the data set [0, 10]
decay = ""  # linear: the learning rate falls to zero over the run; none; empty: the recipe
patience = 0  # early stopping: looks at held-out pictures without gain; 0: none [0, 1000000]
seed = 0  # seed of every random number [0, 4294967295]
name = ""  # name of the run; empty: dataset-arch, and the process where it is not vp
out = "runs"  # the folder that holds the runs
memory = 4.0  # GiB of pictures to hold on the device; more are read in training [0, 1000000]
replay = False  # replay steps on a GPU as CUDA graphs; off, as no card has confirmed it yet
save_every = 0  # steps between checkpoints; 0: every ten minutes [0, 1000000000]
resume = False  # go on from the checkpoint of that run

# %% tags=["imports"]
workshop.settings(globals(), "04_train")

import time
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

clustering = importlib.import_module("02_clustering")
BadInput = workshop.BadInput

# %% [markdown]
# ### The loss of other processes
#
# **vp** is the one above; **ldm** the same with latent diffusion's schedule of 1,000 steps, for
# step 06. **edm** (Karras et al. 2022): the time is $\sigma$, and the network is wrapped so that its
# input and its target have unit variance at every $\sigma$. In terms of the noise their denoiser
# $D=c_\text{skip}x+c_\text{out}F$ is $\epsilon_\theta=(x-D)/\sigma$, linear in $F$, and their weight
# $\lambda(\sigma)=(\sigma^2+\sigma_d^2)/(\sigma\sigma_d)^2$ becomes
# $\omega=(\sigma^2+\sigma_d^2)/\sigma_d^2$. **pfgm-D** is edm with heavy-tailed noise (PFGM++; Xu
# et al. 2023), a rival of the paper's Table 1: only the draw of $\epsilon$ changes.
#
# **flow** (flow matching; Liu et al. 2023, Lipman et al. 2023): $x_t=(1-t)x_0+t\epsilon$ goes
# straight to the noise, and the network predicts the velocity $v=\epsilon-x_0$. So
# $\epsilon=x_t+(1-t)v$, and the squared error of $v$ is eq. (4) with $\omega=1/(1-t)^2$.

# %%
SIGMA_DATA = 0.5  # of pictures in [-1, 1], as in EDM
PLAIN = ("vp", "ldm")  # the network's output is the noise, and its time runs from 0 to 1


def kernel_of(process):
    """Return the kernel of a process: vp, ldm, flow, edm, pfgm (or pfgm-<D>); else BadInput."""
    name, _, D = process.partition("-")
    known = dict(vp=sde.VP, ldm=sde.LDM, flow=sde.Flow, edm=sde.EDM, pfgm=sde.PFGM(1))
    if process in known:
        return known[process]
    if name != "pfgm" or not D.replace(".", "", 1).isdecimal():
        raise BadInput(f"unknown process {process!r}: take {', '.join(known)} or such as pfgm-128")
    return sde.PFGM(float(D))


def predict_noise(model, x, t, process, **stage):
    """Ask a network for the noise in x (B, C, H, W) at times t (B,): eps_theta of the paper.

    stage: tells a multistage network the stage, which it then need not find; see its `forward`.
    """
    if process in PLAIN:
        return model(x, t, **stage)
    if process == "flow":
        return x + (1 - sde.per_image(t, x)) * model(x, t, **stage)
    sigma, d = sde.per_image(t, x), SIGMA_DATA
    norm = (sigma**2 + d**2).sqrt()
    return sigma / norm**2 * x - d / norm * model(x / norm, t, **stage)  # (x - D) / sigma


def noise_function(model, process, calls=None, half=True, guidance=(0.0,), replay=False):
    """Return eps(x, t, label=None) of a network for the solvers, which ask for one time at a time.

    calls: a list that gets the stage of each evaluation. half: allow `half_precision`. guidance:
    one w for all stages, or one for each, used where a label (B,) int64 is given. replay: see
    `Replayed` of step 00. Source of the guided noise: Ho and Salimans 2022, Eq. 6.
    """

    def ask(k, x, times, label=None):
        with workshop.half_precision(x.device if half else torch.device("cpu")):
            return predict_noise(model, x, times, process, stage=k, label=label)

    run = workshop.Replayed(ask, replay)

    def eps(x, t, label=None):
        k = int(model.stage(t[:1]))  # solvers keep t on the CPU, so that nobody waits for a GPU
        if calls is not None:
            calls.append(k)
        times = torch.full(t.shape, float(t[0]), dtype=x.dtype, device=x.device)
        if label is None:
            return run(k, x, times)
        w, found = guidance[k % len(guidance)], run(k, x, times, label)
        return (1 + w) * found - w * run(k, x, times) if w else found

    return eps


def loss_weight(t, process):
    """Return omega(t) of Eq. 4, (B,)."""
    if process == "flow":
        return 1 / (1 - t) ** 2
    return torch.ones_like(t) if process in PLAIN else (t**2 + SIGMA_DATA**2) / SIGMA_DATA**2


def weighted_error(model, x0, eps, t, process, **stage):
    """Compare predicted noise with eps as Eq. 4 does, averaged over a picture's entries: (B,)."""
    xt = sde.perturb(x0, eps, t, kernel_of(process))
    error = (predict_noise(model, xt, t, process, **stage).float() - eps) ** 2
    return loss_weight(t, process) * error.flatten(1).mean(1)  # Eq. 4


# %% [markdown]
# ### Which times?
#
# vp and flow draw as above. With ldm $t$ is one of the thousand steps. With edm a $\sigma$ of EDM's
# log-normal distribution picks the stage, and the batch is drawn from the part inside that stage.
#
# `--stages mixed` is our own: every batch has all stages, in turns. A stage's losses are weighted
# by its chance divided by its share of the batch, so the expectation takes the place of the draw.
#
# `--times` says how often a stage is drawn, or how much its losses weigh in mixed batches. In the
# release each stage is equally likely (`stages`), and a unified network has times uniform over the
# timeline (`uniform`). So the two differ in *two* things, and a comparison needs a control: any
# network can have either. A unified one with `--times stages` gets the times of the three stages.
#
# `--weight min-snr` is $\omega(t)=\min(1, 5\,\sigma_t^2)$: in terms of the picture, whose error is
# $\sigma_t$ times that of the noise, no time weighs more than 5 (Hang et al. 2023).
#
# The recipe of `digits` uses all of these, and a falling learning rate and a narrow network, both
# with one decoder and with three; RESULTS.md says what each gains. The paper's way is `--stages
# uniform --weight none --decay none --encoder 32`.


# %%
def stage_edges(model, process, cuts=None):
    """Return the ends of the stages (n + 1,) float64: times, or (edm) shares of its log-normal.

    cuts: inner boundaries in place of the model's. With ldm an end is the last of the thousand
    steps before a boundary.
    Source: the authors' release; edm: Karras et al. 2022, Table 1 (log sigma ~ N(-1.2, 1.2^2)).
    """
    cuts = model.boundaries.double().cpu() if cuts is None else torch.tensor(cuts).double()
    if process in ("vp", "flow"):
        kernel = kernel_of(process)
        return torch.cat([torch.tensor([kernel.t_min]), cuts, torch.tensor([kernel.t_max])])
    if process == "ldm":  # a step on the boundary belongs to the later stage
        before = ((1000 * cuts - 1e-3).ceil() - 1) / 1000
        return torch.cat([torch.zeros(1), before, torch.ones(1)]).double()
    cdf = torch.special.ndtr((cuts.log() + 1.2) / 1.2)
    return torch.cat([torch.tensor([1e-6]), cdf, torch.tensor([1 - 1e-6])])


def stage_chances(edges, process, active, times=""):
    """Return how often each stage is drawn, (n,) float64, where only some are still active."""
    equal = times == "stages" or (not times and process in PLAIN)
    chance = torch.ones(len(edges) - 1) if equal else edges.diff()
    chance = chance.double() * torch.tensor([k in active for k in range(len(chance))])
    return chance / chance.sum()


def draw_times(edges, process, k, generator):
    """Draw a time inside stage k (B,) int64 for each picture: (B,) float32."""
    edges = edges.to(generator.device, torch.float32)
    u = torch.rand(len(k), generator=generator, device=generator.device)
    if process == "ldm":  # one of the steps n[k] + 1 to n[k + 1], each equally often
        n = (1000 * edges).round()
        return (n[k] + 1 + (u * n.diff()[k]).floor().minimum(n.diff()[k] - 1)) / 1000
    u = edges[k] + u * (edges[k + 1] - edges[k])
    return u if process in ("vp", "flow") else torch.exp(1.2 * torch.special.ndtri(u) - 1.2)


# %%
def new_state(model, lr, seed):
    """Bundle what training changes: step, model, averaged model, optimiser, random numbers.

    "forward" is what the loss calls: with several processes the model's wrapper. "active": the
    stages that are still trained; "drawn": how many batches each of them has had.
    """
    state = dict(step=0, seed=seed, model=model, forward=model)
    state["ema"] = copy.deepcopy(model).eval().requires_grad_(False)
    state["optimizer"] = torch.optim.Adam(model.parameters(), lr, fused=True)
    state["generator"] = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    n = len(model.decoders)
    return state | dict(active=list(range(n)), drawn=[0.0] * n)


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
    times="",
    cuts=None,
    weight="none",
    decay=0,
    labels=None,
    pieces=1,
    replay=False,
):
    """Train for `steps` steps in all by denoising score matching, yielding after each.

    state: from `new_state`, changed in place. images: (N, C, H, W), uint8 pictures, or floats that
    are in the network's space already (the latents of step 06). stages: "uniform", one a batch, or
    "mixed", all in turns; times: see `stage_chances`; cuts: stages for the times of a unified
    network; weight: "min-snr" or none; decay: the step at which the learning rate has fallen to
    zero, 0: it is constant. labels: (N,) int64 for a network with classes. pieces: parts of a
    batch, whose gradients are added; replay: see `Replayed` of step 00, not with several processes.
    Yields (step, {stage: loss}): losses of Eq. 4, as tensors that a GPU may still be computing.
    Source: paper, Eq. 4, and the recipe of the authors' release.
    """
    model, optimizer, generator = (state[key] for key in ("model", "optimizer", "generator"))
    kernel, device, (rank, world) = kernel_of(process), generator.device, workshop.ranks()
    weights = [list(part.parameters()) for part in (state["ema"], model)]
    unified = len(model.decoders) == 1
    edges = stage_edges(model, process, cuts if unified else None)
    there = edges.to(device, torch.float32)

    def send(v):  # without waiting until a GPU has fetched it
        return v if v.device.type == device.type else v.pin_memory().to(device, non_blocking=True)

    def take_step(turns, rate, *given):
        """Take a step with pictures that belong to the stages `turns` in turn: return losses."""
        errors, loss = [], None
        for x0, eps, t, share, *label in zip(*(v.chunk(pieces) for v in given), strict=True):
            if loss is not None:
                loss.backward()  # of the last part, before memory is needed for this one
            at = sum(map(len, errors)) % len(turns)
            told = dict(stage=[*turns[at:], *turns[:at]] if len(turns) > 1 else turns[0])
            told.update(label=label[0] if label else None)
            with workshop.half_precision(device):
                error = weighted_error(state["forward"], x0, eps, t, process, **told)
            if weight == "min-snr":  # min(SNR, 5) / SNR, with the SNR 1 / sigma^2 of x0 in [-1, 1]
                share = share * (5 * kernel.sigma(t) ** 2).clamp(max=1)
            # gradients are averaged over processes, but losses are to be summed
            loss = world * (share.to(error) * error).sum()
            errors.append(error.detach())
        training_step(model, optimizer, loss, rate)
        error = torch.cat(errors)
        return torch.stack([error[i :: len(turns)].clone().mean() for i in range(len(turns))])

    run = workshop.Replayed(take_step, replay and world == 1, first=10 * (len(edges) - 1))
    if replay and not run.on:
        workshop.print_once("steps are taken as they are: replaying takes a GPU and one process")
    optimizer.param_groups[0]["capturable"] = run.on
    model.train()
    for step in range(state["step"] + 1, steps + 1):
        if not state["active"]:
            return  # early stopping has ended all stages
        picked = workshop.picked_in_step(len(images), batch, state["seed"], step)
        active = list(range(len(edges) - 1)) if unified else state["active"]
        dice = workshop.step_generator(state["seed"], 2 * step + 1)
        chance = stage_chances(edges, process, active, times)
        k = torch.multinomial(chance, 1, generator=dice).expand(batch)  # one stage for all
        if stages == "mixed":  # all of them, in turns
            k = torch.tensor(active).repeat(batch)[:batch]
        share = (chance[k] if stages == "mixed" else 1) / k.bincount()[k]  # of the loss, (batch,)
        turns = [0] if unified else list(dict.fromkeys(k.chunk(world)[rank].tolist()))
        numbers = [picked, k, share] + ([] if labels is None else [labels[picked]])
        i, k, share, *label = send(torch.stack([v.double() for v in numbers]))
        i = i.long() if images.device == device else picked
        x0 = workshop.to_network_space(send(images[i.chunk(world)[rank]]))  # this process' part
        # the random numbers of the whole batch, of which this process takes its part
        t = draw_times(there, process, k.long(), generator)
        eps = sde.fresh_noise(x0[:1].expand(batch, -1, -1, -1), generator, kernel)
        turn = torch.rand(batch, generator=generator, device=device) < 0.5
        if label:  # one in ten is hidden: the network learns to do without (Ho and Salimans 2022)
            drop = torch.rand(batch, generator=generator, device=device) < 0.1
            label = [torch.where(drop, model.classes, label[0].long())]
        eps, t, share, turn, *label = (v.chunk(world)[rank] for v in (eps, t, share, turn, *label))
        if flip:
            x0 = torch.where(turn[:, None, None, None], x0.flip(-1), x0)
        rate = min(1, step / warmup) * (1 - (step - 1) / decay if decay else 1)
        rate = torch.full((), rate, device=device) if run.on else rate
        losses = run(tuple(turns), rate, x0, eps, t, share, *label)
        with torch.no_grad():  # as update_average, all weights at once
            torch._foreach_lerp_(*weights, 1 - min(ema, (1 + step) / (10 + step)))
        for j in turns:
            state["drawn"][j] += 1 / len(turns)
        state["step"] = step
        yield step, dict(zip(turns, losses, strict=True))


# %%
if __name__ == "__main__" and lesson:
    # Is it the plain loop? Both draw the same numbers in the same order, so every bit must agree.
    # (On the CPU, and with means over powers of two: dividing by them early or late is exact.)
    torch.manual_seed(1)
    model = unet.build_network("digits", boundaries=(0.1, 0.44))
    average, state = copy.deepcopy(model), new_state(copy.deepcopy(model), lr=3e-3, seed=0)
    list(train_plainly(model, average, pixels, edges, steps=6, flip=True))
    list(train(state, pixels, steps=6, batch=32, flip=True))
    for one, other in ((model, state["model"]), (average, state["ema"])):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
    print("after 6 steps train_plainly and train agree in every bit of every weight")

# %% [markdown]
# ### Networks, checkpoints
#
# The rows of Table 3 are flags: `--arch unified`; `--arch separate`, also with `--patience 5`
# (early stopping), `--tailored` (the multistage network's widths) or both; `--arch multistage`. A
# checkpoint holds state and settings, so that `--resume` goes on as if nothing had happened.


# %%
def network_of(settings):
    """Build the untrained network that a run's settings describe."""
    asked = ("boundaries", "channels", "size", "encoder", "decoders", "classes")
    kind = {key: settings[key] for key in asked if settings.get(key) is not None}
    time = unet.NETWORKS.get(settings["network"], {}).get("time", "vp")
    if settings["process"] == "ldm":
        kind.update(time="ldm")
    elif settings["process"] not in ("vp", "flow"):  # EDM's wrapping adds the input already
        kind.update(time="edm", add_input=False)
    elif time != "vp":
        raise BadInput(f"network {settings['network']!r} is made for times of {time!r}, not of vp")
    if settings["process"] == "flow":  # where the input is the picture, a velocity is far from it
        kind.update(add_input=False)
    return unet.build_network(settings["network"], **kind)


def prepare_state(settings, content=None):
    """Build what a run's settings describe: a state ready to train.

    content: of the checkpoint to go on from. Raises BadInput for what does not fit or divide.
    """
    with torch.device("meta"):  # weight, average, gradient, moments: 20 bytes each, which must fit
        need = 20 * unet.count_parameters(network_of(settings))
    if hasattr(os, "sysconf") and need > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise BadInput(f"weights of {need / 2**30:,.0f} GiB do not fit here: give fewer channels")
    torch.manual_seed(settings["seed"])  # the initial weights
    model = workshop.move_to_device(network_of(settings))
    narrow = model.encoders[0].skip_widths[0] < 20 and model.size < 32
    if workshop.device().type == "cpu" and narrow:
        torch.set_num_threads(1)  # two are no faster at such layers, and stall beside other work
    n, (rank, world) = len(settings.get("cuts") or model.cuts) + 1, workshop.ranks()
    if settings.get("stages") == "mixed" and settings["batch"] < n:
        raise BadInput(f"batch = {settings['batch']} cannot mix {n} stages: give {n} or more")
    if settings["batch"] % world:
        raise BadInput(f"batch = {settings['batch']} cannot be shared by {world} processes")
    state = new_state(model, settings["lr"], settings["seed"])
    if content:
        workshop.unpack(state, content)
    if world > 1:  # their gradients are averaged, their dropout differs
        torch.manual_seed((settings["seed"] + state["step"]) * world + rank)
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else None
        unused = len(model.decoders) > 1  # a batch of one stage leaves the other decoders alone
        state["forward"] = DistributedDataParallel(model, devices, find_unused_parameters=unused)
    return state


def save_checkpoint(state, settings, folder):
    """Write state and settings to `folder`/checkpoint.pt."""
    workshop.write_checkpoint({**workshop.pack(state), "settings": settings}, folder)


def averaged_model(content):
    """Build the averaged network of a checkpoint's content, in eval mode on the device.

    With early stopping each stage has the weights of its best look at held-out pictures.
    Raises BadInput where they do not fit.
    """
    with workshop.reading("the checkpoint"):
        model = network_of(content["settings"])
        model.load_state_dict({**content["ema"], **content.get("stopping", {}).get("weights", {})})
    return workshop.move_to_device(model).eval()


# %% [markdown]
# ### What a run is made of
#
# A flag decides; without one, the recipe of the data set; without that, the paper's way. This gives
# the settings of a run. All that follows is built from them, also when resuming and in step 05.

# %%
# paper: one stage a batch, all of Eq. 4's weights 1, a constant learning rate; here: what is
# neither asked for nor in a recipe is so, and a recipe may know better (RESULTS.md)
PAPERS_WAY = dict(stages="uniform", times="", weight="none", decay="none", encoder=0, decoders="")
PAPER_NETWORKS = {
    "vp": dict(multistage="table5_1", unified="table7_1", separate="table3_separate"),
    "edm": dict(multistage="edm", unified="edm_unified", separate="edm_separate"),
    "ldm": dict(multistage="table6_4", unified="ldm_unified", separate="ldm_separate"),
}
PAPER_NETWORKS["flow"] = PAPER_NETWORKS["vp"]


def check_settings(arch, process, stages, patience, times="", decay="", weight="", tailored=False):
    """Raise BadInput for settings that are unknown or do not go together."""
    known = {"arch": (arch, "multistage", "unified", "separate")}
    known |= {"stages": (stages, "uniform", "mixed"), "times": (times, "stages", "uniform")}
    known |= {"decay": (decay, "linear", "none"), "weight": (weight, "min-snr", "none")}
    for what, (value, *words) in known.items():
        if value and value not in words:
            raise BadInput(f"unknown {what} {value!r}: take {', '.join(words)}")
    kernel_of(process)
    if weight == "min-snr" and process not in PLAIN:
        raise BadInput(f"process {process!r} has weights of its own: leave out --weight")
    if tailored and arch != "separate":
        raise BadInput(f"--tailored widths are for --arch separate, not {arch}")
    if patience and arch == "multistage":
        raise BadInput("early stopping (patience) needs stages that share nothing: --arch separate")


def network_name(network, dataset, arch, process):
    """Name the entry of NETWORKS for what was asked: the one given, a small one or the paper's.

    Raises BadInput for one that is unknown, or of another arch.
    """
    known = workshop.about(dataset, network)
    if not network and known["recipe"] is workshop.PAPER:  # and its networks
        return PAPER_NETWORKS[process if process in PAPER_NETWORKS else "edm"][arch]
    network = network or known.get("small", dataset)
    if arch != "multistage" and f"{network}_{arch}" in unet.NETWORKS:
        return f"{network}_{arch}"
    if network not in unet.NETWORKS:
        raise BadInput(f"unknown network {network!r}: take one of {', '.join(unet.NETWORKS)}")
    kind = unet.NETWORKS[network]
    own = "multistage" if kind.get("shared", True) else "separate"
    own = "unified" if len(kind["decoders"]) == 1 else own
    if own != arch:
        raise BadInput(f"network {network!r} is {own}, not {arch}: give --arch {own}")
    return network


def read_numbers(what, text, kind, example):
    """Read comma-separated numbers, with or without the brackets that papermill may pass."""
    try:
        return [kind(part) for part in text.strip("[]() ").split(",") if part.strip()]
    except ValueError:
        raise BadInput(f"{what} {text!r} must be {example}") from None


def find_boundaries(text, dataset, images, process, network="digits"):
    """Decide on the inner boundaries, in the time of the process: list of floats.

    text: what the user gave, comma-separated, or empty for step 02's answer; a network without
    three stages brings its own boundaries. Where step 02 has no answer, as for a handful of
    pictures, the published ones are used, and a message says so.
    """
    if text:
        return read_numbers("boundaries", text, float, "numbers such as 0.1,0.44")
    cuts = unet.NETWORKS[network]["boundaries"]
    if len(cuts) == 2:
        cuts = unet.PUBLISHED  # the paper, too, uses CIFAR-10's boundaries for CelebA
        if dataset != "celeba":
            some = workshop.first_of(images, 50_000)
            try:
                progress = workshop.ranks()[0] == 0
                cuts = clustering.algorithm_1(some.float() / 255, progress=progress)
            except BadInput as why:
                workshop.print_once(f"step 02 finds no boundaries ({why}): taking the published")
    return sde.match_snr(cuts, sde.VP, kernel_of(process))


def plan_run(given, recipe, images):
    """Decide on a run: its settings, a dictionary of what `settings.json` can hold.

    given: the flags, 0 or empty where the recipe decides. images: (N, C, H, W), what is trained on.
    """
    arch, process, dataset = (given[key] for key in ("arch", "process", "dataset"))
    name = partial(network_name, given["network"], dataset, process=process)
    network, recipe = name(arch=arch), {**PAPERS_WAY, **recipe}
    if process not in PLAIN:  # others have times and weights of their own
        recipe.update(times="", weight="none")
    if given["network"] or given.get("encoder") or given.get("decoders"):
        recipe.update(encoder=0, decoders="")  # a recipe's widths are for its network
    if arch != "multistage":
        recipe.update(decoders="")
    plan = {key: given.get(key) or usual for key, usual in recipe.items()}
    plan.update(decay=plan["steps"] if plan["decay"] == "linear" else 0)
    plan.update(dataset=dataset, arch=arch, process=process, network=network, seed=given["seed"])
    own = unet.NETWORKS[name(arch="multistage") if given.get("tailored") else network]
    encoder = plan["encoder"] = plan["encoder"] or own["encoder"]
    decoders = read_numbers("decoders", plan["decoders"], int, "channels such as 48,32,16")
    grown = [max(4, round(width * encoder / own["encoder"])) for width in own["decoders"]]
    plan.update(decoders=decoders or grown)  # by default they grow or shrink with the encoder
    if encoder % 2 or not all(4 <= width <= 8192 for width in (encoder, *plan["decoders"])):
        widths = f"encoder = {encoder} and decoders = {plan['decoders']}"
        raise BadInput(f"{widths} must be 4 to 8192, the encoder's even")
    plan.update(channels=images.shape[1], size=images.shape[2], boundaries=[], cuts=None)
    where = given["boundaries"], dataset, images, process
    if arch != "unified":
        plan["boundaries"] = find_boundaries(*where, network)
    elif plan["times"] == "stages":
        plan["cuts"] = find_boundaries(*where)
    cuts = plan["cuts"] or plan["boundaries"]
    if (stage_edges(None, process, cuts).float().diff() <= 0).any():
        raise BadInput(f"boundaries {cuts} leave a stage of {process} without times: choose others")
    return plan


# %% [markdown]
# ### A run
#
# Besides training, a run says what it costs, looks at held-out pictures, draws grids and counts its
# operations. `fit` connects all of this to step 00's loop, which saves and resumes a training.


# %%
def describe_training(state, settings):
    """Say what will be trained, and return what a picture costs at each stage (`cost_of`)."""
    costs = unet.cost_of(copy.deepcopy(state["model"]).to("meta"))
    cuts = ", ".join(f"{tau:.4f}" for tau in settings["boundaries"]) or "none"
    workshop.print_once(f"{settings['arch']} network {settings['network']}, boundaries {cuts}")
    plan = {**unet.NETWORKS[settings["network"]], "size": state["model"].size}
    if sides := [f"{side}×{side}" for side in unet.attended_sides(plan)]:
        workshop.print_once(f"  attention at {', '.join(sides)}")
    for k in range(len(state["model"].decoders)):
        million, gflops = costs[k]["parameters"] / 1e6, costs[k]["gflops"]
        workshop.print_once(f"  stage {k}: {million:.2f}M weights, {gflops:.4g} GFLOPs a picture")
    return costs


def mean_losses(recent, n, device):
    """Average n stages' losses over some steps, in all processes: a row of the log."""
    table = torch.zeros(n, 2, device=device)  # sums and counts
    for k, loss in (item for losses in recent for item in losses.items()):
        table[k, 0] += loss
        table[k, 1] += 1
    if workshop.ranks()[1] > 1:
        dist.all_reduce(table)
    sums, counts = table.T.tolist()
    return {f"loss_{k}": round(sums[k] / counts[k], 7) for k in range(n) if counts[k]}


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
        for part in (some.to(device) for some in held_out.split(500)):
            x0, stage = workshop.to_network_space(part), torch.full((len(part),), k, device=device)
            t = draw_times(edges, process, stage, generator)
            eps = sde.fresh_noise(x0, generator, kernel_of(process))
            with workshop.half_precision(device):
                total += float(weighted_error(model, x0, eps, t, process, stage=k).sum())
        found[k], stopping["waited"][k] = total / len(held_out), stopping["waited"][k] + 1
        if found[k] < stopping["best"][k]:
            stopping["best"][k], stopping["waited"][k] = found[k], 0
            own, weights = (f"encoders.{k}.", f"decoders.{k}."), model.state_dict()
            best = {key: weights[key].clone() for key in weights if key.startswith(own)}
            stopping["weights"] = {**stopping.get("weights", {}), **best}
        elif stopping["waited"][k] >= patience:
            state["active"].remove(k)
            workshop.print_once(f"stage {k} stops: {patience} looks at held-out pictures in vain")
    return found


@torch.no_grad()
def draw_grid(state, process, path, decode=None, n=32, nfe=25):
    """Draw n pictures with the averaged weights and save them as a grid; decode: from latents."""
    model, kernel, device = state["ema"], kernel_of(process), state["generator"].device
    x = torch.empty(n, model.channels, model.size, model.size)
    x = sde.start_noise(x, torch.Generator().manual_seed(1), kernel).to(device)
    *_, x = sde.probability_flow(noise_function(model, process), kernel, x, nfe)
    images = decode(x) if decode else workshop.to_pictures(x.cpu())
    with workshop.replacing(path) as aside:
        plt.imsave(aside, workshop.tile_images(images).permute(1, 2, 0).numpy(), format="png")


def fit(state, images, settings, folder, held_out=None, decode=None, save_every=0, **how):
    """Run `train` to settings["steps"] and leave metrics, sample grids and checkpoints in `folder`.

    held_out: pictures for early stopping; decode: turns latents into pictures for the grids;
    save_every: steps between checkpoints, 0: ten minutes; how: labels, pieces, replay, see `train`.
    A signal such as Ctrl-C ends the process, after the step is finished and saved.
    """
    steps, batch, process = settings["steps"], settings["batch"], settings["process"]
    folder, costs, begin = Path(folder), describe_training(state, settings), time.perf_counter()

    def petaflops(kind):
        # paper: iterations times the average over a sampler's evaluations; here: the stages that
        # were drawn, because they are what training costs.
        return sum(n * costs[k][kind] for k, n in enumerate(state["drawn"])) / 1e6

    def summarize(recent):
        nonlocal begin
        seconds, begin = time.perf_counter() - begin, time.perf_counter()
        row = dict(images_per_s=round(len(recent) * batch / seconds))
        row |= mean_losses(recent, len(state["drawn"]), state["generator"].device)
        if held_out is not None:
            found = check_held_out(state, held_out, process, settings["patience"])
            row |= {f"held_out_{k}": round(loss, 7) for k, loss in found.items()}
        # as Table 2 counts: a picture a step, forward; below: all of them, backward twice as much
        row |= {"petaflops": petaflops("gflops")}
        return row | {"true_petaflops": 3 * batch * petaflops("true_gflops")}

    def save(losses):
        if not all(torch.isfinite(loss) for loss in losses.values()):  # the last checkpoint stays
            raise BadInput(f"the loss is no longer finite at step {state['step']}: lower --lr")
        if workshop.ranks()[0] == 0:
            save_checkpoint(state, settings, folder)

    def after(step):
        if step in (50, 200, steps) or step % -(-steps // 5) == 0:  # at first much changes
            draw_grid(state, process, folder / "samples" / f"{step:07}.png", decode)

    same = ("process", "batch", "warmup", "flip", "stages", "times", "cuts", "weight", "decay")
    how.update({key: settings[key] for key in same})
    loop, log = train(state, images, steps, **how), folder / "metrics.jsonl"
    return workshop.keep_training(loop, state, steps, log, summarize, save, after, save_every)


# %%
if __name__ == "__main__":
    check_settings(arch, process, stages, patience, times, decay, weight, tailored)
    workshop.join_processes()
    rank, world = workshop.ranks()
    name = name or f"{dataset}-{arch}" + f"-{process}" * (process != "vp")
    run = workshop.run_folder(out, name)
    content = workshop.read_checkpoint(run) if resume else dict(settings={})
    with workshop.reading(run):  # boundaries that it has are not looked for again
        old = content["settings"]
        cuts = old.get("boundaries") or old.get("cuts") or []
        boundaries = boundaries or ",".join(map(str, cuts))
    with workshop.first_process_first():  # it may have to download
        pixels, labels = workshop.open_data_set(dataset, root, size, memory), None
        if classes:
            labels = workshop.load_images(dataset, root, size)[1]
            if labels is None:
                raise BadInput(f"the pictures of {dataset} have no labels: leave out --classes")
        flags = {key: globals()[key] for key, *_ in workshop.read_parameters("04_train")}
        known = workshop.about(dataset, network, size)
        asked = plan_run(flags, known["recipe"], pixels)
    asked.update(patience=patience, classes=int(labels.max()) + 1 if classes else None)
    asked.update(root=root, pictures=workshop.fingerprint(pixels))
    if resume:
        workshop.check_same_settings(asked, old, run)
    held_out, used = None, pixels
    if patience:  # a tenth of the pictures is held out, to look at
        n = max(1, len(pixels) // 10)
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
        held_out, used = pixels[order[:n]], pixels[order[n:]]
        labels = labels if labels is None else labels[order[n:]]
    state = prepare_state(asked, content if resume else None)
    if rank == 0:  # nothing is touched before everything is known to fit
        workshop.claim_folder(run, resume)
        workshop.write_json(asked, run / "settings.json")

# %%
if __name__ == "__main__":
    if "small" in known:
        workshop.print_once("no GPU: a small network, 30 minutes; the paper's: --network table5_1")
    elif asked["network"] == "table5_1" and not steps:
        workshop.print_once("the paper's recipe: on an H100 at 32×32 some 26 hours")
    workshop.print_once(f"on {workshop.device()}, processes: {world}; the run lies in {run}")
    how = dict(labels=labels, pieces=pieces, replay=replay)
    fit(state, used, asked, run, held_out, save_every=save_every, **how)
    if rank > 0:
        sys.exit()  # the first process draws

# %% [markdown]
# ### What it learned
#
# First the losses: a point is now an average of many steps. Then samples from the same noise during
# training: they change most in the first few hundred steps. Last, what the network sees now.

# %%
if __name__ == "__main__":
    rows, curves = workshop.read_log(run), {}
    for k in range(len(state["model"].decoders)):
        curves[k] = [(row["step"], row[f"loss_{k}"]) for row in rows if f"loss_{k}" in row]
    draw_losses(curves)
    workshop.show_figure(run / "loss.png")
    paths = [path for path in sorted((run / "samples").glob("*.png")) if path.stem.isdecimal()]
    with workshop.reading(f"a file of {run}"):
        speed, *work = (rows[-1][k] for k in ("images_per_s", "petaflops", "true_petaflops"))
        grids = [torch.tensor(plt.imread(path)).movedim(2, 0)[None, :3] for path in paths]
        rows = [grid[:, :, : grid.shape[2] // 2 + 3] for grid in grids]  # the first of its two rows
        titles = [f"step {int(path.stem):,}" for path in paths]
        workshop.show_images(rows, titles, run / "progress.png", columns=1)
    print(f"{speed:,} images/s on {workshop.device()}")
    print(f"{1e6 * work[0]:.4g} GFLOPs as Table 2 counts: one picture a step, forward")
    print(f"{1e6 * work[1]:.4g} GFLOPs in truth: every picture, forward and backward")
    trained = averaged_model(workshop.read_checkpoint(run))
    predict = lambda xt, t: predict_noise(trained, xt, t, process)  # noqa: E731
    show_estimates(predict, pixels, kernel_of(process), run / "denoised.png")

# %% [markdown]
# Up to $t$ = 0.1 the optimal denoiser knows *which training picture* it was; from 0.15 on it blends
# in others. The network cannot store them all, and returns a similar digit in softer strokes. At
# the right both see an average. The gap in the middle is what makes the network generative.
#
# **You have** a trained multistage model in `runs/`. Step 05 draws with it.
#
# **Exercise.** Give boundaries by log-SNR (`--boundaries 0.348,0.709 --name digits-snr`) and
# compare in step 05. <details><summary>Solution</summary>`--name digits-snr` there, too.</details>
