"""Do one unit of an experiment's work with the functions of the steps, and keep its result.

A unit is a *definition*: a dictionary of all settings and a seed (see run.py). `WORK` has a
function for each kind of unit, which returns what goes into its result.
"""

import copy
import functools
import hashlib
import importlib
import itertools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
workshop = importlib.import_module("00_workshop")
sde = importlib.import_module("01_sde_and_denoiser")
clustering = importlib.import_module("02_clustering")
unet = importlib.import_module("03_multistage_unet")
training = importlib.import_module("04_train")
evaluation = importlib.import_module("05_sample_eval")
features = importlib.import_module("features")
BadInput = workshop.BadInput

SAMPLING_SEED = 1
paths = dict(root="data", out="runs/experiments", results=HERE / "results", features="")
paths["cuts"] = HERE / "boundaries.json"


# ---- results ---------------------------------------------------------------------------------


def fingerprint(definition):
    """Name a definition by its content; what is empty is left out, so new keys change nothing."""
    said = {key: value for key, value in definition.items() if value}
    if definition["kind"] == "training":
        said["recipe"] = recipe_of(definition)
    for key in ("of", "against"):
        if definition.get(key):
            said[key] = fingerprint(definition[key])
    text = json.dumps(said, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def recipe_of(definition):
    """Look up what step 04 and step 03 decide for a training that its definition does not say."""
    d, recipe = definition, workshop.about(definition["dataset"], definition["network"])["recipe"]
    names = [d["arch"], *["multistage"] * d["tailored"]]  # whose widths a tailored network has
    names = [training.network_name(d["network"], d["dataset"], n, d["process"]) for n in names]
    found = {key: d[key] or recipe[key] for key in ("batch", "lr", "warmup")}
    return {**found, "flip": recipe["flip"], "networks": {n: unet.NETWORKS[n] for n in names}}


def result_path(definition):
    """Tell where the result of a unit lies."""
    return Path(paths["results"]) / f"{definition['kind']}-{fingerprint(definition)}.json"


def complete(definition):
    """Do a unit of work and write its result."""
    begin = time.perf_counter()
    found = WORK[definition["kind"]](definition)
    record = dict(definition=definition, **found, seconds=round(time.perf_counter() - begin, 1))
    if definition["kind"] == "training":
        record["recipe"] = recipe_of(definition)
    record.update(device=str(workshop.device()), threads=torch.get_num_threads())
    record["torch"] = torch.__version__
    with workshop.replacing(result_path(definition)) as aside:
        aside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def read_result(definition):
    """Read the result of a unit, or None."""
    path = result_path(definition)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


# ---- data and measures -----------------------------------------------------------------------


@functools.cache
def pictures(dataset, size=0, channels=0):
    """Load a data set, reduced to size × size or to grey where asked: (uint8 tensor, labels)."""
    pixels, labels = workshop.load_images(dataset, paths["root"])
    if size and size != pixels.shape[-1]:
        how = dict(size=(size, size), mode="bilinear", antialias=True)
        parts = [F.interpolate(part.float(), **how) for part in pixels.split(5000)]
        pixels = torch.cat(parts).round().clamp(0, 255).to(torch.uint8)
    if channels == 1 < pixels.shape[1]:
        luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]  # ITU-R BT.601
        pixels = (pixels.float() * luma).sum(1, keepdim=True).round().to(torch.uint8)
    return pixels, labels


def pictures_of(definition):
    """Load the pictures that a definition asks for."""
    return pictures(definition["dataset"], definition["size"], definition["channels"])[0]


@functools.cache
def yardstick(dataset, size, samples, channels=0, ruler=""):
    """Choose features and two random halves of the real pictures: (extractor, half, other)."""
    pixels, labels = pictures(dataset, size, channels)
    if ruler:
        extractor = features.RULERS[ruler]()
    elif dataset == "cifar10":
        extractor = features.resnet56(paths["features"])
    elif size:  # the classifier that comes with the project has seen pictures as they are
        extractor = features.digit_classifier(pixels, labels)
    else:
        extractor, _ = evaluation.pick_extractor(dataset)
    return extractor, *evaluation.real_halves(pixels, samples)


def yardsticks(definition):
    """Choose what a definition is measured with: {end of the metrics' names: (features, half)}."""
    d, data = definition, [definition[k] for k in ("dataset", "size", "samples", "channels")]
    ends = {"": "", f" in {d['ruler']}": d["ruler"]} if d["ruler"] else {"": ""}
    return {end: yardstick(*data, ruler)[:2] for end, ruler in ends.items()}


def compare(images, definition):
    """Compare pictures with real ones: step 05's metrics, in all features asked for."""
    found = {}
    for end, (extractor, half) in yardsticks(definition).items():
        row = evaluation.evaluate(images, half, extractor)
        found |= {key + end: value for key, value in row.items()}
    return found


def measure(model, definition):
    """Draw pictures and compare them with real ones."""
    d, found = definition, []
    for seed in range(SAMPLING_SEED, SAMPLING_SEED + (d["sampling_seeds"] or 1)):
        with torch.random.fork_rng():  # training must not notice that it is looked at
            x = evaluation.sample(model, d["process"], d["samples"], d["sampler"], d["nfe"], seed)
            found.append(compare(workshop.to_pictures(x), d))
    if len(found) == 1:
        return found[0]
    means = {key: sum(row[key] for row in found) / len(found) for key in found[0]}
    return {**means, "frechets": [row["frechet"] for row in found]}


def losses(model, images, process, stages):
    """Compute the loss of some stages on pictures, always with the same noise: {stage: loss}."""
    state = dict(ema=model, active=list(stages), generator=torch.Generator(workshop.device()))
    return training.check_held_out(state, images, process, math.inf)


def split(definition):
    """Hold out a share of the pictures, as step 04 does: (held out, used)."""
    d, pixels = definition, pictures_of(definition)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(d["seed"]))
    n = int(len(pixels) * d["held_out"])
    used = pixels[order[n:]][: d["pictures"] or None]
    return pixels[order[:n]].to(workshop.device()), used.to(workshop.device())


@torch.no_grad()
def likelihood(model, images, cuts):
    """Measure bounds on the bits of pictures, and the loss with Min-SNR weights, part by part.

    Noise and places in time are those of all networks. The loss is that of a stage's times, dealt
    uniformly, times the stage's length, so that its sum is that of the timeline.
    """
    ask = lambda xt, t: model(xt.to(workshop.device()), t.float().to(workshop.device())).cpu()  # noqa: E731
    bits = evaluation.likelihood_bound(ask, images.cpu(), sde.VP, cuts)
    x0, dice = workshop.to_network_space(images.cpu()), torch.Generator().manual_seed(1)
    weighted, ends = [], [sde.VP.t_min, *cuts, sde.VP.t_max]
    for low, high in itertools.pairwise(ends):
        t = low + (high - low) * torch.rand(len(x0), generator=dice)
        eps = torch.randn(x0.shape, generator=dice)
        parts = zip(sde.perturb(x0, eps, t, sde.VP).split(500), t.split(500), strict=True)
        found = torch.cat([ask(*part) for part in parts])
        error = ((found - eps) ** 2).flatten(1).mean(1)
        weighted.append(
            float((high - low) * (error * (5 * sde.VP.sigma(t) ** 2).clamp(max=1)).mean())
        )
    return dict(bits=bits.tolist(), min_snr=weighted)


# ---- training --------------------------------------------------------------------------------


def settings_of(definition):
    """Decide what step 04 decides before it trains: its settings."""
    d, recipe = definition, recipe_of(definition)
    network, *multistage = recipe["networks"]
    settings = {**d, **{key: recipe[key] for key in ("batch", "lr", "warmup", "flip")}}
    asked = ("channels", "size", "encoder", "decoders")
    settings.update(network=network, **{k: d[k] or None for k in asked})
    if multistage:  # of a tailored network
        settings["decoders"] = list(unet.NETWORKS[multistage[0]]["decoders"])
    settings["boundaries"] = [] if d["arch"] == "unified" else cuts_of(d)
    if d["arch"] == "unified" and d["times"] == "stages":
        settings["cuts"] = cuts_of(d)
    if d["clustering"] == "algorithm-2" and not d["decoders"]:
        settings["decoders"] = widths(settings["boundaries"], d, network)
    return settings


def cuts_of(definition):
    """Find the inner boundaries that a definition asks for."""
    d, pixels = definition, pictures_of(definition)
    if d["clustering"] == "timestep":
        return clustering.timestep_clusters(3)
    if d["clustering"] == "log-snr":
        return clustering.snr_clusters(sde.VP, 3)
    if d["clustering"] == "gradient":
        return gradient_cuts(d)
    if d["clustering"] == "algorithm-2":
        return clustering.algorithm_2(pixels[:50_000].float() / 255, d["number"])
    if d["clustering"]:
        raise BadInput(f"unknown clustering {d['clustering']!r}")
    if d["boundaries"]:
        return training.find_boundaries(d["boundaries"], d["dataset"], pixels, d["process"])
    return algorithm_1(d)


def algorithm_1(definition):
    """Find the boundaries of a data set as step 04 does, once: what was found is kept.

    So all units are cut alike, whatever becomes of the way in which step 02 draws its samples.
    """
    kept = json.loads(Path(paths["cuts"]).read_text(encoding="utf-8"))
    d, pixels = definition, pictures_of(definition)
    name = d["dataset"] + " in grey" * (d["dataset"] == "cifar10" and d["channels"] == 1)
    name += f" at {d['size']}" * bool(d["size"]) + f", {d['process']}"
    if name not in kept:
        kept[name] = training.find_boundaries("", d["dataset"], pixels, d["process"])
        workshop.write_json(kept, paths["cuts"])
    return kept[name]


def widths(cuts, definition, network):
    """Interpolate the three-stage network's decoders by Eq. 23, to multiples of four channels."""
    d, edges = definition, [0.0, *cuts, 1.0]
    three = algorithm_1(d)
    wanted = [
        unet.interpolate_parameters(pair, three, unet.NETWORKS[network]["decoders"])
        for pair in zip(edges, edges[1:], strict=False)
    ]
    return [max(4, 4 * round(width / 4)) for width in wanted]


def train(definition):
    """Train one network and measure it at the points asked for."""
    d, settings = definition, settings_of(definition)
    if d["samples"]:
        yardsticks(d)  # features that cannot be had are said now, not after the training
    held_out, used = split(d)
    torch.manual_seed(d["seed"])  # the initial weights
    state = training.new_state(
        training.network_of(settings).to(workshop.device()), settings["lr"], d["seed"]
    )
    state["active"] = list(d["active"]) or state["active"]
    costs = unet.cost_of(copy.deepcopy(state["model"]).to("meta"))
    every, spent = look_every(d, costs, state["active"]), [0.0, 0.0]
    keys = ("process", "batch", "warmup", "ema", "flip", "stages", "times", "weight")
    options = dict({k: settings[k] for k in keys}, cuts=settings.get("cuts"))
    if d["branch"]:
        trunk = kept(d["of"])[d["branch"]]
        branch_off(state, trunk)
        spent = [1e6 * value for value in trunk["petaflops"]]  # it has to be paid for
    if d["decay"] == "linear":
        options["decay"] = horizon(d, costs, state, spent, options)
    curve, waiting, position = [], list(d["points"]), 0
    keep_weights(d, 0, state, settings, spent)

    def note():
        model = training.averaged_model(checkpoint_of(state, settings))
        if d["active"] and d["of"]:
            model = serve_alone(model, d["active"], settings["boundaries"], last_of(d["of"]))
        stages = d["active"] or range(len(costs_of_stages(costs)))
        row = dict(step=state["step"], gflops=spent[0], true_gflops=spent[1])
        looked_at, at = (in_three(model, d), range(3)) if d["intervals"] else (model, stages)
        row["held_out"] = losses(looked_at, held_out, d["process"], at)
        row["trained"] = losses(looked_at, used[: len(held_out)], d["process"], at)
        if d["bits"]:
            row.update(likelihood(model, held_out, algorithm_1(d)))
        found = measure(model, d) if d["samples"] else {}
        curve.append({**row, **found, "active": list(state["active"])})
        keep_weights(d, len(curve), state, settings, spent)

    for step, found in training.train(state, used, 10**9, **options):
        for k in found:
            spent[0] += costs[k]["gflops"] / len(found)
            spent[1] += 3 * costs[k]["true_gflops"] * settings["batch"] / len(found)
        if d["patience"] and step % every == 0:
            training.check_held_out(state, held_out, d["process"], d["patience"])
        position = step if d["by"] == "steps" else spent[0]
        if position >= waiting[0]:
            note()
            waiting.pop(0)
        if not waiting:
            break
    if waiting:  # early stopping has ended all stages before the budget was spent
        note()
    plain, stages = training.network_of(settings), costs_of_stages(costs)
    _, shares = evaluation.stage_shares(
        plain.to(workshop.device()), d["process"], d["sampler"], d["nfe"]
    )
    return dict(
        boundaries=settings["boundaries"],
        decoders=[decoder.last.in_channels for decoder in plain.decoders],
        parameters=costs["total"]["parameters"],
        gflops=stages,
        equivalent_gflops=sum(share * stages[k] for k, share in shares.items()),
        stopping=state.get("stopping", {}).get("waited"),
        curve=curve,
    )


def horizon(definition, costs, state, spent, options):
    """Tell the step at which the learning rate has fallen to zero: that of the last point."""
    d, end = definition, definition["points"][-1]
    if d["by"] == "steps":
        return end
    own = [costs[k]["gflops"] for k in state["active"]]
    chance = torch.full((len(own),), 1 / len(own), dtype=torch.float64)
    if options["stages"] == "uniform" and len(own) > 1:
        edges = training.stage_edges(state["model"], d["process"])
        chance = training.stage_chances(edges, d["process"], state["active"], options["times"])
    mean = sum(c * gflops for c, gflops in zip(chance.tolist(), own, strict=True))
    return state["step"] + math.ceil((end - spent[0]) / mean)


def branch_off(state, trunk):
    """Let every stage begin with what a network of one decoder has learned.

    trunk: what `keep_weights` wrote of it. Weights, averages and Adam's moments are copied, and
    steps are counted on from its last. Source: eDiff-I (Balaji et al. 2022), whose experts for
    parts of the timeline begin so.
    """
    with torch.device("meta"):
        theirs = training.network_of(trunk["settings"])
    places = {name: i for i, (name, _) in enumerate(theirs.named_parameters())}
    for name, p in state["model"].named_parameters():
        part, _, rest = name.split(".", 2)
        source = f"{part}.0.{rest}"
        p.data.copy_(trunk["model"][source])
        state["ema"].get_parameter(name).data.copy_(trunk["ema"][source])
        moments = trunk["optimizer"]["state"][places[source]]
        own = {key: value.to(p.device, copy=True) for key, value in moments.items()}
        state["optimizer"].state[p] = own
    state.update(step=trunk["step"])


def in_three(model, definition):
    """Let a network be asked for each of the three stages of Algorithm 1, whatever it has."""
    return Hybrid(algorithm_1(definition), [model] * 3)


def costs_of_stages(costs):
    """Return the GFLOPs of each stage as the paper counts them, from step 03's costs."""
    return [row["gflops"] for k, row in costs.items() if isinstance(k, int)]


def look_every(definition, costs, active):
    """Return the steps between looks at held-out pictures: a fortieth, as in step 04."""
    d = definition
    mean = sum(costs[k]["gflops"] for k in active) / len(active)
    return max(1, round(d["points"][-1] / (1 if d["by"] == "steps" else mean) / 40))


def checkpoint_of(state, settings):
    """Return what step 04's `averaged_model` reads from a checkpoint."""
    weights = {key: state[key].state_dict() for key in ("model", "ema")}
    return {**weights, "settings": settings, "stopping": state.get("stopping", {})}


def keep_weights(definition, i, state, settings, spent):
    """Write the weights at the i-th point (0: the start), where the definition wants it."""
    if definition["keep"]:
        content = {**checkpoint_of(state, settings), "step": state["step"]}
        content["optimizer"] = state["optimizer"].state_dict()
        content["petaflops"] = [gflops / 1e6 for gflops in spent]
        workshop.write_checkpoint(content, folder_of(definition), f"{i}.pt")


def folder_of(definition):
    """Tell where the weights of a run are kept."""
    return Path(paths["out"]) / fingerprint(definition)


def kept(definition):
    """Load the weights of a run at its start and its points; train it where they are missing."""
    folder = folder_of(definition)
    names = [f"{i}.pt" for i in range(len(definition["points"]) + 1)]
    if not all((folder / name).is_file() for name in names):
        print("  the weights that this builds on are missing: training them first", flush=True)
        # A result that is there stays: another machine may come to other last digits.
        train(definition) if result_path(definition).is_file() else complete(definition)
    return [workshop.read_checkpoint(folder, name) for name in names]


# ---- the other kinds of work -----------------------------------------------------------------


def last_of(definition):
    """Load the averaged network that a run ended with."""
    return training.averaged_model(kept(definition)[-1])


class Hybrid(nn.Module):
    """Cut the timeline and let a network of a list serve each stage, whatever cuts it has itself.

    It stands in for a network of step 03 wherever pictures are drawn and losses are measured.
    """

    def __init__(self, cuts, networks):
        super().__init__()
        self.decoders = nn.ModuleList(networks).eval()
        self.channels, self.size, self.cuts = networks[0].channels, networks[0].size, cuts
        self.register_buffer("boundaries", torch.tensor(cuts, device=workshop.device()))

    def stage(self, t):
        return unet.find_stage(t, self.cuts)

    def forward(self, x, t, stage, label=None):
        model = self.decoders[stage]
        alike = torch.equal(model.boundaries, self.boundaries)
        return model(x, t, stage=stage if alike else None, label=label)  # else by the times


def serve_alone(model, own, cuts, other):
    """Let a network serve its `own` stages of those that cuts make, and `other` the rest."""
    return Hybrid(cuts, [model if k in own else other for k in range(len(cuts) + 1)])


def serve(definition):
    """Let every state of a unified network serve one interval, and its end the others (Fig. 2)."""
    d, curve = definition, []
    (k,) = d["active"]
    held_out, used = split(d["of"])
    weights = kept(d["of"])
    cuts, end = settings_of({**d, "arch": "separate"})["boundaries"], last_of(d["of"])
    for moment in [weights[i] for i in d["moments"]] or weights[1:]:
        model = serve_alone(training.averaged_model(moment), [k], cuts, end)
        row = dict(step=moment["step"], held_out=losses(model, held_out, d["process"], [k]))
        row["trained"] = losses(model, used[: len(held_out)], d["process"], [k])
        curve.append({**row, **measure(model, d)})
    return dict(boundaries=model.boundaries.tolist(), curve=curve)


def gradient(model, images, low, high, seed, process):
    """Compute the gradient of the loss over times from low to high, flattened (P,).

    The same seed gives the same pictures, noise and places between low and high.
    """
    generator = torch.Generator().manual_seed(seed)
    x0 = workshop.to_network_space(images)
    eps = torch.randn(x0.shape, generator=generator).to(x0)
    t = low + (high - low) * torch.rand(len(x0), generator=generator).to(x0)
    loss = training.weighted_error(model, x0, eps, t, process).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def raw_model(moment):
    """Build the network that was being trained, not its average."""
    model = training.network_of(moment["settings"]).to(workshop.device())
    model.load_state_dict(moment["model"])
    return model


def alike(model, images, edges, process):
    """Compare gradients of intervals by their cosine: (n, n), from two independent draws.

    Because rows and columns see different pictures and noise, the diagonal is not 1 but says how
    alike two estimates of the same gradient are.
    """
    pairs, n = list(zip(edges, edges[1:], strict=False)), len(edges) - 1
    half = len(images) // 2

    def of_interval(t):
        i = round(t * 2 * n) - 1
        draw = images[:half] if i < n else images[half:]
        return gradient(model, draw, *pairs[i % n], i // n, process)

    cross = clustering.task_affinity(of_interval, 2 * n)[:n, n:]
    return ((cross + cross.T) / 2).round(4).tolist()


def compare_gradients(definition):
    """Compare the gradients of bins of time and of the three stages, over training."""
    d, moments = definition, []
    _, used = split(d["of"])
    separate = settings_of({**d, "arch": "separate"})["boundaries"]
    weights = kept(d["of"])
    for moment in [weights[i] for i in d["moments"]] or weights:
        model, images = raw_model(moment), used[:512]
        t_min, t_max = sde.VP.t_min, sde.VP.t_max
        bins = np.linspace(t_min, t_max, 11).tolist()
        row = dict(step=moment["step"], bins=alike(model, images, bins, d["process"]))
        row["stages"] = alike(model, images, [t_min, *separate, t_max], d["process"])
        moments.append(row)
    return dict(boundaries=separate, moments=moments)


def gradient_cuts(definition):
    """Cut the timeline by the gradients of a trained network, averaged over its points."""
    d = definition
    _, used = split(d["of"])
    affinities = []
    for moment in kept(d["of"])[1:]:
        model = raw_model(moment)
        at = lambda t, model=model: gradient(model, used[:64], t, t, 0, d["process"])  # noqa: E731
        affinities.append(clustering.task_affinity(at))
    return clustering.gradient_clusters(np.mean(affinities, axis=0), 3)


def cut(definition):
    """Cut the timeline of some pictures of a data set by Algorithm 1."""
    d = definition
    pixels, _ = pictures(d["dataset"], d["size"])
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(d["seed"]))
    images = pixels[order[: d["number"]]].float() / 255
    try:
        found = clustering.algorithm_1(images, seed=d["seed"])
    except BadInput as error:  # some data sets have no three stages
        return dict(cuts=None, why=str(error), pictures=len(images))
    return dict(cuts=found, pictures=len(images), entries=images[0].numel())


def solve(definition):
    """Measure every solver asked for on the network that another run ended with (Table 1)."""
    d, model = definition, last_of(definition["of"])
    found = [measure(model, {**d, "sampler": name, "nfe": nfe}) for name, nfe in d["solvers"]]
    return dict(
        curve=[{**row, "solver": which} for row, which in zip(found, d["solvers"], strict=True)]
    )


def swap(definition):
    """Draw all networks that take each of the three stages from `of` or from `against`, once."""
    d, curve = definition, []
    pair = last_of(d["against"]), last_of(d["of"])
    for taken in itertools.product((0, 1), repeat=3):  # 1: from `of`
        model = Hybrid(algorithm_1(d), [pair[i] for i in taken])
        curve.append({**measure(model, d), "taken": taken})
    return dict(curve=curve)


def compare_real(definition):
    """Compare real pictures with the reference half: the other half, or those few trained on."""
    d = definition
    *_, other = yardstick(d["dataset"], d["size"], d["samples"], d["channels"])
    if d["pictures"]:
        _, few = split(d)
        other = few[torch.arange(d["samples"]) % len(few)]
    return dict(curve=[compare(other, d)])


WORK = dict(training=train, served=serve, gradients=compare_gradients)
WORK.update(cuts=cut, real=compare_real, solvers=solve, swaps=swap)
