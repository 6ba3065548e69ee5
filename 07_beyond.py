# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 07 · Beyond the paper: another clock, labels, holes, and one stage alone
#
# The paper ends with what it leaves open: conditional models and inverse problems. Since then its
# idea, another network for another level of noise, has reached models of billions of weights, and
# their users ask what this course can answer with code: are the parts trained together or apart? Which
# part of training does each get? Why does training cut the timeline at another place than sampling?
#
# **You will** look at the same cuts by the clock of flow matching, draw digits that you ask for, see
# in which stage asking works, repair pictures and compare that with the exact answer, and train one
# stage while all others stay as they are, bit by bit.

# %%
import importlib
import os

if __name__ == "__main__" and os.path.basename(os.getcwd()) == "notebooks":
    os.chdir("..")  # a notebook that was opened where it lies
workshop = importlib.import_module("00_workshop")  # first: it readies the process for torch

from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

import torch
import torch.nn.functional as F
from tqdm import tqdm

sde = importlib.import_module("01_sde_and_denoiser")
clustering = importlib.import_module("02_clustering")
training = importlib.import_module("04_train")
evaluation = importlib.import_module("05_sample_eval")
BadInput = workshop.BadInput

# %% tags=["parameters"]
dataset = "digits"  # digits or mnist
root = "data"  # where the data set lies or is downloaded to
out = "runs"  # the folder that holds the runs
name = ""  # name of the run with labels that is trained here; empty: the data set and -labels
steps = 0  # steps of its training; 0: the recipe of the data set [0, 1000000000]
samples = 450  # pictures of a set that is measured [20, 1000000]
pictures = 48  # held-out pictures that are repaired [2, 90]
seeds = 3  # seeds of sampling, over which a number has its spread [2, 100]
seed = 0  # seed of every other random number [0, 4294967295]

# %%
workshop.settings(globals(), "07_beyond")

if __name__ == "__main__":
    if workshop.about(dataset).get("judge") != "digits":
        raise BadInput(f"this lesson is about digits, not {dataset}: take digits or mnist")
    workshop.join_processes()
    pixels, labels = workshop.load_images(dataset, root)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    held_out, rest = pixels[order[:pictures]], order[90:]  # always as many are left to train on
    pixels, labels = pixels[rest].to(workshop.device()), labels[rest]
    figures = Path("figures") if out == "runs" else Path(out) / "figures"


def tell(values, digits=2):
    """Write numbers as mean ± standard deviation over the seeds."""
    return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}"


# %% [markdown]
# ## The clock of flow matching
#
# Many models of today call the time what step 01 calls a kernel: the picture goes to the noise on a
# straight line, $x_t=(1-t)\,x_0+t\,\epsilon$, and the network predicts the velocity
# $v=\epsilon-x_0$. That is eq. (1) with $s_t=1-t$ and $\sigma_t=t/(1-t)$: `Flow`, below the line of
# step 01. `04_train.py --process flow` trains so, and every solver of step 05 works as it is.
#
# Nothing new is solved, either. Euler's step of the velocity, $x'=x+(t'-t)\,v$, keeps $x_0$ and
# $\epsilon$ still. So does DDIM. In this clock the two are the same formula, not only in the limit:

# %%
if __name__ == "__main__":
    eps, kernel = evaluation.mixture_noise(sde.Flow), sde.Flow
    x = torch.linspace(-2, 2, 41, dtype=torch.float64).reshape(-1, 1, 1, 1)
    *_, by_ddim = evaluation.ddim(eps, kernel, x, 10, grid="time")
    times = evaluation.time_grid(kernel, 10, "time")
    for t, t_next in pairwise(times):
        e = eps(x, t.expand(len(x)))
        x0 = x / kernel.s(t) - kernel.sigma(t) * e
        x = x + (t_next - t) * (e - x0)  # Euler on v
    print(f"ten steps of Euler on v are off ten steps of DDIM by {(x - by_ddim).abs().max():.0e}")
    assert torch.allclose(x, by_ddim)

# %% [markdown]
# What the clock does change is how many steps fall where. Many models *shift* it,
# $t\to s\,t/(1+(s-1)\,t)$, which multiplies $\sigma$ by $s$: more steps at high noise. A cut between two
# networks is a level of noise, so it stays where it is, but the steps on both sides of it do not.
# Wan2.2, of two networks with 14 billion weights each, cuts at $t$ = 0.875 with a shift of 12 (text to
# video), and at 0.900 with a shift of 5 (from a picture), with 40 steps.


# %%
def shift_time(t, s):
    """Shift times of `Flow` towards the noise: sigma becomes s sigma (Esser et al. 2024, Eq. 23)."""
    return s * t / (1 + (s - 1) * t)


def steps_at_noise(cut, s, n):
    """Count how many of n steps, uniform from t = 1 down before the shift, begin at cut or above."""
    t = shift_time(1 - torch.arange(n).double() / n, s)
    return int((t >= cut).sum())


if __name__ == "__main__":
    for cut, s in ((0.875, 12), (0.9, 5)):
        n, sigma = steps_at_noise(cut, s, 40), float(sde.Flow.sigma(cut))
        print(f"a cut at t = {cut:.3f}, shift {s:2d}: {n} of 40 steps at the noise,", end=" ")
        print(f"{40 - n} at the picture; sigma {sigma:.2f}, of the timeline {1 - cut:.1%}")
    print(f"the paper's t2 = 0.631 of VP: sigma {float(sde.VP.sigma(0.631)):.2f},", end=" ")
    print(f"or t = {sde.match_snr([0.631], sde.VP, sde.Flow)[0]:.3f} of Flow")

# %% [markdown]
# So the noise end, an eighth of the time or a tenth, gets 26 of 40 steps or 15. And those cuts lie
# next to the paper's $t_2$, though found in other ways, for data of another scale: videos in a latent
# space against CIFAR-10. (A $\sigma$ means little without the size of what it blurs.)
#
# Who trains such a network needs the cut as a *noise level*. Given as a share of the steps, or of the
# unshifted time, it is another cut: 0.875 before a shift of 12 is 0.988 after it.
#
# **Does Algorithm 1 find the same cuts in this clock?** Similarity at a time depends on nothing but
# the noise level. But the algorithm *averages* it over time, and each clock gives the noise levels
# weights of its own:

# %%
if __name__ == "__main__":
    for kernel in (sde.VP, sde.Flow):
        curves = clustering.similarity_curves(pixels.float() / 255, kernel, seed=seed)
        cuts = clustering.read_cuts(curves)
        errors = clustering.standard_errors(curves, cuts)
        said = [f"{cut:.3f} ± {error:.3f}" for cut, error in zip(cuts, errors, strict=True)]
        as_vp = [f"{t:.3f}" for t in sde.match_snr(cuts, kernel, sde.VP)]
        print(f"{kernel.__name__:4s} cuts at {', '.join(said)}: of VP's clock {', '.join(as_vp)}")

# %% [markdown]
# They differ by many standard errors. The cuts of the paper are those of VP's clock; to find them
# anew in another clock is another definition. To *move* them by their SNR (`match_snr`) is not.
#
# ## Asking for a digit
#
# To be told a label the network needs one vector for each, added to that of the time, and one more
# for "none" (step 03). In one case of ten step 04 tells it "none" (`--classes`). So one network knows
# the noise for a label $c$ and for any picture, and what tells the two apart can be exaggerated
# (*classifier-free guidance*; Ho and Salimans 2022):
#
# $$\hat\epsilon=(1+w)\,\epsilon_\theta(x_t,t,c)-w\,\epsilon_\theta(x_t,t,\varnothing)$$
#
# The cell trains one, or takes the run that is there. (90 pictures are left out, for later.)


# %%
def train_with_labels(run, images, labels):
    """Train a multistage network with classes by the recipe of its data set, or read that run."""
    recipe, nothing = workshop.about(dataset)["recipe"], dict.fromkeys(training.PAPERS_WAY, "")
    network = training.network_name("", dataset, "multistage", "vp")
    asked = dict(dataset=dataset, arch="multistage", network=network, process="vp", seed=seed)
    asked.update({key: recipe[key] for key in ("steps", "batch", "lr", "warmup", "flip")})
    asked.update(training.choose_recipe(recipe, nothing, "vp"), classes=10, cuts=None, ema=0.9999)
    widths = training.recipe_widths(recipe, "multistage")
    asked["encoder"], asked["decoders"] = training.widths_of(network, *widths)
    asked["steps"] = steps or asked["steps"]
    if (run / "checkpoint.pt").exists():
        content = workshop.read_checkpoint(run)
        boundaries = content["settings"]["boundaries"]
        workshop.check_same_settings({**asked, "boundaries": boundaries}, content["settings"], run)
        if content["step"] == asked["steps"]:
            return training.averaged_model(content)
        raise BadInput(f"{run} has {content['step']} steps, not {asked['steps']}: give --name")
    asked["boundaries"] = training.find_boundaries("", dataset, images, "vp", network)
    state = training.prepare_state(asked)
    options = {key: asked[key] for key in ("process", "batch", "warmup", "ema", "flip")}
    options.update({key: asked[key] for key in ("stages", "times", "weight")}, labels=labels)
    options["decay"] = asked["steps"] if asked["decay"] == "linear" else 0
    for _ in tqdm(training.train(state, images, asked["steps"], **options), total=asked["steps"]):
        pass
    training.save_checkpoint(state, asked, run)
    return state["ema"]


if __name__ == "__main__":
    run = Path(out) / (name or f"{dataset}-labels")
    model = train_with_labels(run, pixels, labels)
    rows = []
    for w in (0.0, 2.0):
        each = torch.arange(10).repeat_interleave(12)  # a row a digit
        drawn = evaluation.sample(model, "vp", 120, seed=seed, label=each, guidance=(w,))
        rows.append(workshop.to_pictures(drawn).unflatten(0, (10, 12)))
    both = torch.cat([rows[0], torch.ones_like(rows[0][:, :1]), rows[1]], 1).flatten(0, 1)
    title = "a row a digit, the same noise: left w = 0, right w = 2"
    workshop.show_images([both], [title], figures / "07_labels.png", columns=25)

# %% [markdown]
# ## Where does guidance act?
#
# The weight may differ from stage to stage (`05_sample_eval.py --guidance 1,2,4`). So let it act in
# one stage at a time. Two marks: the share of pictures that a classifier (step 05's, trained on real
# digits) takes for what was asked, and the Fréchet distance. Mean and deviation are over the seeds of
# sampling; the network is one.


# %%
def measure_guidance(model, extractor, classifier, half, guidance):
    """Draw as many of each digit, for each seed: ([share that is as asked], [distances])."""
    asked, shares, distances = torch.arange(len(half)) % 10, [], []
    for s in range(seeds):
        drawn = evaluation.sample(model, "vp", len(half), seed=s, label=asked, guidance=guidance)
        drawn = workshop.to_pictures(drawn)
        with torch.no_grad():
            shares.append(float((classifier(drawn).argmax(1) == asked).float().mean()))
        distances.append(evaluation.evaluate(drawn, half, extractor)["frechet"])
    return shares, distances


if __name__ == "__main__":
    classifier, accuracy = evaluation.train_classifier(pixels.cpu(), labels)
    extractor, _ = evaluation.pick_extractor(dataset, pixels.cpu(), labels)
    half, other = evaluation.real_halves(pixels.cpu(), samples)
    floor = evaluation.evaluate(other, half, extractor)["frechet"]
    print(f"the classifier is right on {accuracy:.1%} of real digits; real / real: {floor:.2f}\n")
    print("w  acting in   share as asked     distance")
    for w in (0.0, 1.0, 3.0):
        places = {"–": (0.0,)} if not w else {"all": (w,)}
        for k in range(3) if w else ():
            places[f"stage {k}"] = tuple(w * (j == k) for j in range(3))
        for place, guidance in places.items():
            found = measure_guidance(model, extractor, classifier, half, guidance)
            print(f"{w:.0f}  {place:10s} {tell(found[0], 3)}   {tell(found[1])}")

# %% [markdown]
# READ_GUIDANCE
#
# ## Repairing pictures
#
# An inverse problem asks for a picture $x_0$ of which only $y=A(x_0)+\tau n$ is known, with noise $n$:
# a hole in it, half of its resolution, much noise. The network as it is, without a label, can be led
# to such pictures, step by step from the noise:
#
# * **Replacement** (as RePaint; Lugmayr et al. 2022): in the predicted $\hat x_0$ put what is known in
#   its place. Where noise is all that is wrong, start from $y$ itself, at the time whose noise it has.
# * **Posterior guidance** (DPS; Chung et al. 2023): after a step, go down the gradient of
#   $\|y-A(\hat x_0(x))\|$ by $\zeta$, which is our choice of the first that was tried: 1.


# %%
def average_halves(x):
    """Halve the resolution."""
    return F.avg_pool2d(x, 2)


def cut_hole(x):
    """Set the middle, half as high and wide as the picture, to the grey between black and white."""
    h, w = x.shape[2] // 4, x.shape[3] // 4
    return F.pad(torch.zeros_like(x[:, :, h:-h, w:-w]), (w, w, h, h), value=1) * x


# a problem: what A does, its tau, and how pictures are brought to agree with y, if they can be
PROBLEMS = {
    "a hole": (cut_hole, 0.05, lambda x, y: x - cut_hole(x) + y),
    "half the resolution": (
        average_halves,
        0.05,
        lambda x, y: x + F.interpolate(y - average_halves(x), scale_factor=2),
    ),
    "much noise": (lambda x: x, 0.5, None),
}


def fill(problem, y, mean):
    """Repair without a network: the mean picture in the hole, bicubic, the noisy picture itself."""
    if problem == "a hole":
        return y + mean - cut_hole(mean)
    size = mean.shape[2:]
    return y if y.shape[2:] == size else F.interpolate(y, size, mode="bicubic")


def repair(eps, y, shape, problem, way, stages, edges, generator, n=60, zeta=1.0):
    """Draw pictures (B, C, H, W) for what is known, y, by n steps of DDPM with the kernel VP.

    eps: (x, t) -> noise, differentiable; way: "replace" or "guide", in these stages, else not led;
    edges: inner boundaries. Source: Lugmayr et al. 2022, Eq. 8; Chung et al. 2023, Algorithm 1.
    """
    A, tau, put_back = PROBLEMS[problem]
    times, x = sde.log_snr_times(sde.VP, n), torch.randn(shape, generator=generator)
    if way == "replace" and put_back is None:
        times = times[sde.VP.sigma(times) <= tau]
        x = sde.VP.s(times[0]) * y
    for t, t_next in pairwise(times):
        led = sum(float(t) >= edge for edge in edges) in stages
        (s, sigma), (s_next, sigma_next) = ((sde.VP.s(u), sde.VP.sigma(u)) for u in (t, t_next))
        x = x.float().requires_grad_()
        x0 = x / s - sigma * eps(x, t.expand(len(x)).float())
        told = put_back(x0, y) if led and way == "replace" and put_back else x0
        keep = (sigma_next / sigma) ** 2
        noise = torch.randn(x.shape, generator=generator)
        z = keep * x / s + (1 - keep) * told + sigma_next * (1 - keep).sqrt() * noise
        new = s_next * z
        if led and way == "guide":
            off = (y - A(x0)).flatten(1).norm(dim=1).sum()
            new = new - zeta * torch.autograd.grad(off, x)[0]
        x = new.detach()
    return x


# %% [markdown]
# **The yardstick.** How good can it get? If the pictures could only be those of a finite set $y_i$, the
# answer is known: picture $i$ has the probability $\mathrm{softmax}_i(-\|y-A(y_i)\|^2/2\tau^2)$ (Bayes,
# with as much belief in each), and one can draw from it. The same set has an optimal denoiser
# (step 01), so the two ways can be tried on it, without a network, where the truth is known.
# PSNR is $10\log_{10}(4/\text{mean square error})$ decibels, pixels being in [-1, 1].


# %%
def draw_exactly(y, A, tau, images, generator):
    """Draw from the posterior over a data set: (a picture each, the mean), all (B, C, H, W)."""
    square = ((y[:, None] - A(images)[None]) ** 2).flatten(2).sum(2)
    weight = torch.softmax(-square.double() / (2 * tau**2), 1)
    i = torch.multinomial(weight, 1, generator=generator)[:, 0]
    return images[i], (weight.float() @ images.flatten(1)).reshape(len(y), *images.shape[1:])


def psnr(x, truth):
    """Measure the peak signal-to-noise ratio of pictures in [-1, 1], decibels, averaged."""
    error = ((x.clamp(-1, 1) - truth) ** 2).flatten(1).mean(1)
    return float((10 * torch.log10(4 / error.clamp(min=1e-10))).mean())


if __name__ == "__main__":
    known, truth = (workshop.to_network_space(x).cpu() for x in (pixels[:2000], held_out))
    network = training.noise_function(model.cpu(), "vp")
    points = lambda x, t: sde.plain_optimal_denoiser(x, t, sde.VP, known)  # noqa: E731
    edges, everywhere, shown = model.cuts, (0, 1, 2), []
    ways = {f"led by {k}": ("guide", (k,)) for k in everywhere}
    ways = dict(replacement=("replace", everywhere), DPS=("guide", everywhere), **ways)
    for problem, (A, tau, _) in PROBLEMS.items():
        table = {}
        for s in range(seeds):
            dice = torch.Generator().manual_seed(s)
            y = A(truth) + tau * torch.randn(A(truth).shape, generator=dice)
            y = cut_hole(y) if problem == "a hole" else y  # of the hole nothing is known
            exact, mean = draw_exactly(y, A, tau, known, dice)
            found = {"without a network": fill(problem, y, known.mean(0, keepdim=True))}
            for way, how in ways.items():
                found[way] = repair(network, y, truth.shape, problem, *how, edges, dice)
            for way in ("replacement", "DPS"):
                how = ways[way]
                found[f"points: {way}"] = repair(points, y, truth.shape, problem, *how, edges, dice)
            found.update({"points: exact draw": exact, "points: exact mean": mean})
            for way, x in found.items():
                table.setdefault(way, []).append(psnr(x, truth))
        print(f"{problem}: " + "; ".join(f"{way} {tell(v, 1)}" for way, v in table.items()))
        rows = [fill(problem, y, -torch.ones_like(truth[:1])), found["replacement"], found["DPS"]]
        shown += [workshop.to_pictures(x[:16]) for x in (*rows, exact)]
    ways = ("what is known", "replacement", "DPS", "exact, among the training pictures")
    titles = [f"{problem}: {way}" for problem in PROBLEMS for way in ways]
    shown = [workshop.to_pictures(truth[:16]), *shown]
    workshop.show_images(shown, ["the truth", *titles], figures / "07_repaired.png")

# %% [markdown]
# READ_REPAIRED
#
# ## One stage alone
#
# Users of networks in stages train one of them and ask what the others do. Here the encoder is shared, so
# it must be frozen: then one decoder can learn, and what the others say stays as it is, bit by bit
# (`04_train.py --only_stage 0 --start_from RUN`). Let one decoder see nothing but sevens, and draw
# from the same noise as before, without a label.


# %%
def train_alone(run, k, images, n=300, lr=1e-3):
    """Let the decoder of stage k of a run go on alone, on some pictures: the averaged network."""
    content = workshop.read_checkpoint(run)
    asked = {**content["settings"], "only_stage": str(k), "start_from": str(run), "lr": lr}
    asked["steps"] = content["step"] + n
    state = training.prepare_state(asked, trunk=content)
    for _ in training.train(state, images, asked["steps"], weight=asked["weight"]):
        pass
    return state["ema"].eval()


if __name__ == "__main__":
    sevens, asked = pixels[labels == 7], torch.arange(samples) % 10
    networks = {"before": model}
    for k in range(3):
        networks[f"stage {k} saw sevens"] = train_alone(run, k, sevens)
    t = torch.tensor([0.5 * edges[0], 0.5 * sum(edges), 0.9]).repeat_interleave(8)
    x, rows = torch.randn(24, 1, *pixels.shape[2:], generator=torch.Generator().manual_seed(0)), []
    for title, other in networks.items():
        with torch.no_grad():
            same = (other(x, t) == model(x, t)).flatten(1).all(1).unflatten(0, (3, 8)).all(1)
        shares = []
        for s in range(seeds):
            drawn = workshop.to_pictures(
                evaluation.sample(other.to(pixels.device), "vp", samples, seed=s)
            )
            with torch.no_grad():
                shares.append(float((classifier(drawn).argmax(1) == 7).float().mean()))
        other.cpu()
        rows.append(drawn[:16])
        print(f"{title:19s} share of sevens {tell(shares, 3)}; stages that say the same:", end=" ")
        print(*same.nonzero()[:, 0].tolist())
    workshop.show_images(rows, list(networks), figures / "07_alone.png")

# %% [markdown]
# READ_ALONE
#
# ## Who shares what
#
# LINEAGE
#
# ### Exercises
#
# 1. Draw "sevens only" with step 05, with the run of this lesson and guidance in one stage alone.
#    <details><summary>Solution</summary>`python 05_sample_eval.py --name digits-labels --label 7
#    --guidance 0,2,0` (the weights of stages 0, 1, 2).</details>
# 2. At which step of 30 would a network hand over that is cut at $t$ = 0.9, with a shift of 3?
#    <details><summary>Solution</summary>`steps_at_noise(0.9, 3, 30)`: after 8.</details>
# 3. Why does the hole of a picture get 16 dB at most, even with the exact posterior?
#    <details><summary>Solution</summary>Its set does not have the truth in it. Put the held-out pictures
#    into `known`, and the exact draw is the truth itself nearly always.</details>
