"""Check and measure the project on one GPU, in at most ten minutes.

    python benchmarks/gpu.py [--data ROOT] [--out gpu.jsonl] [--parts machine,train_run] [--quick]

Each part runs in a process of its own with a time limit, so that one that hangs or crashes spoils
no other, and prints one JSON line when it ends: what it found (when cut, as much as it had), its
seconds, and "error" or "cut" where it came to that.

--quick takes tiny sizes, which a CPU can do too: what needs a card is then null, and no speed means
anything. How fast and how exact the posterior mean is, posterior_mean.py tells.
"""

import argparse
import contextlib
import copy
import importlib
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from stopwatch import DEVICE, FORM, GPU, ROOT, medians, now, seconds, workshop

unet = importlib.import_module("03_multistage_unet")
training = importlib.import_module("04_train")
evaluation = importlib.import_module("05_sample_eval")

PUBLISHED = ("table5_1", "table7_5", "edm", "table6_4", "ldm")  # all backbones, 3 and 5 stages
TINY = dict(encoder=32, decoders=(32, 32, 32), blocks=1)  # a network of three stages for --quick

# ---- small parts -----------------------------------------------------------------------------


def product_rate(args, dtype=torch.bfloat16, times=20):
    """Return the FLOP/s of square matrix products; those of bfloat16 are the parts' yardstick."""
    n = 256 if args.quick else 8192
    a = torch.randn(n, n, device=DEVICE, dtype=dtype)
    spent = medians(3, product=lambda: [a @ a for _ in range(times)])["product"]
    return 2 * n**3 * times / spent


def allow_tf32(on):
    """Let products and convolutions round float32 to TF32, or not; torch has a switch for each."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


def float32_only():
    """Keep the steps from computing in bfloat16: a context."""
    return mock.patch.object(workshop, "half_precision", lambda _: contextlib.nullcontext())


def measured(work):
    """Run `work()`: its seconds, and the most GiB that tensors held (None without a card)."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    return seconds(work), torch.cuda.max_memory_allocated() / 2**30 if GPU else None


def difference(a, b):
    """Return the norm of a - b over that of b."""
    return float((a.cpu() - b.cpu()).norm() / b.cpu().norm())


def pictures(args, n):
    """Return n colour pictures of 32×32 as uint8 (n, 3, 32, 32), and in words what they are.

    Real ones where CIFAR-10 lies in --data, else smooth textures.
    """
    if Path(args.data, "cifar-10-batches-py").is_dir():
        return workshop.load_images("cifar10", args.data)[0][:n], f"{n} of CIFAR-10"
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    made = F.interpolate(coarse, size=32, mode="bilinear")
    return (made * 255).to(torch.uint8), f"{n} smooth textures"


def train_steps(state, images, n, batch):
    """Train `state` for n more steps in step 04's loop."""
    how = dict(batch=batch, warmup=10, ema=0.9, flip=True)
    for _ in training.train(state, images, state["step"] + n, **how):
        pass


def trained(name, args, steps, batch):
    """Train a network of NETWORKS shortly, as an untrained one predicts zero: its average.

    It adds its input, else hundreds of steps would not do for samples that are no noise.
    """
    torch.manual_seed(0)
    model = unet.build_network(name, add_input=True, **TINY if args.quick else {})
    model = model.to(DEVICE, memory_format=FORM)
    state = training.new_state(model, 2e-4, seed=0)
    train_steps(state, pictures(args, 1000)[0].to(DEVICE), steps, batch)
    return state["ema"]


# ---- the parts: each yields pieces of what it finds --------------------------------------------


def machine(args):
    """Name the software and the card, and measure what it can do at best."""
    x = torch.zeros(2**20 if args.quick else 2**28, device=DEVICE)  # the card is awake from here on
    y, about = torch.empty_like(x), torch.cuda.get_device_properties(0) if GPU else None
    yield dict(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda)
    yield dict(card=about and about.name, gib=about and about.total_memory / 2**30)
    yield dict(capability=about and f"{about.major}.{about.minor}", cores=os.cpu_count())
    spent = medians(3, copy=lambda: [y.copy_(x) for _ in range(10)])["copy"]
    yield dict(copy_tb_per_s=20 * x.nbytes / spent / 1e12)  # read and written
    yield dict(bfloat16_tflops=product_rate(args) / 1e12)
    for name, on in (("float32_tflops", False), ("tf32_tflops", True)):
        allow_tf32(on)
        yield {name: product_rate(args, torch.float32) / 1e12}


def agree_networks(args, names=()):
    """Compare networks on both devices, [output, gradients], in three precisions.

    A batch has a picture of each stage. "rounding" is what bfloat16 does on the CPU: the card may
    be as far off where that is more than 1e-2.
    """
    small = [name for name in unet.NETWORKS if name.startswith(tuple(unet.SMALL_NETWORKS))]
    first = [*small, *PUBLISHED]  # all kinds; then the others, as far as the time goes
    others = [name for name in unet.NETWORKS if name not in first]
    quick = ("digits", "table5_1", "edm", "ldm")
    for name in names or (quick if args.quick else [*first, *others]):
        torch.manual_seed(0)
        model = unet.build_network(name, dropout=0.0, **TINY if args.quick else {})
        for p in model.parameters():  # what starts at zero would hide all that is before it
            if p.dim() > 1 and not p.any():
                torch.nn.init.xavier_uniform_(p)
        cuts = [0.0, *model.boundaries.tolist(), min(model.latest, 80.0)]
        t = torch.tensor([(a + b) / 2 for a, b in zip(cuts, cuts[1:], strict=False)])
        x = torch.randn(len(t), model.channels, model.size, model.size)
        same = x, t, torch.randn_like(x)
        exact, rounded = answer(model, *same), answer(model, *same, half=True)
        errors = dict(rounding=list(map(difference, rounded, exact)))
        limits = dict(float32=[1e-4] * 2, tf32=[1e-2] * 2)
        limits.update(bfloat16=[max(1e-2, 1.5 * error) for error in errors["rounding"]])
        model = model.to(DEVICE, memory_format=FORM)
        for precision in limits:
            allow_tf32(precision == "tf32")
            found = answer(model, *same, half=precision == "bfloat16")
            errors[precision] = list(map(difference, found, exact))
        pairs = [pair for kind in limits for pair in zip(errors[kind], limits[kind], strict=True)]
        yield {name: dict(**errors, ok=all(error <= limit for error, limit in pairs))}


def answer(model, x, t, direction, half=False):
    """Return a network's output, and the gradients of its product with `direction` as one."""
    where = next(model.parameters()).device
    model.zero_grad(set_to_none=True)
    with torch.autocast(where.type, torch.bfloat16, enabled=half):
        out = model(x.to(where), t.to(where))
    (out.float() * direction.to(where)).sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return out.detach().float().cpu(), torch.cat(gradients).cpu()


class Stage(torch.nn.Module):
    """One stage of a network as the plain U-Net that it is, in bfloat16 by itself."""

    def __init__(self, model, k):
        super().__init__()
        self.encoder, self.decoder = model.encoders[0], model.decoders[k]

    def forward(self, x, t):
        # kept casts of the weights would be part of no graph
        half = dict(enabled=DEVICE.type == "cuda", cache_enabled=False)
        with torch.autocast(DEVICE.type, torch.bfloat16, **half):
            return self.decoder(*self.encoder(x, t))


def replayed(model, k, batch):
    """Record what stage k launches, forward and backward, once: a `forward` that replays it."""
    x, t = torch.randn(batch, 3, model.size, model.size), torch.rand(batch)
    stage = Stage(model, k).to(DEVICE).train()
    if DEVICE.type == "cuda":
        stage = torch.cuda.make_graphed_callables(stage, (x.to(DEVICE), t.to(DEVICE)))
    return lambda x, t, **_: stage(x.contiguous(), t)


def training_speed(args):
    """Time step 04's loop on each stage of table5_1, as it is and as replayed CUDA graphs.

    Of each: pictures a second, the share of a bfloat16 product's rate, and how busy the card is.
    """
    batch, n, changes = (4, 1, TINY) if args.quick else (128, 10, {})
    costs, peak = unet.cost("table5_1", **changes), product_rate(args)
    yield dict(batch=batch, bfloat16_tflops=peak / 1e12)
    images = pictures(args, 1000)[0].to(DEVICE)
    for form, k in ((form, k) for form in ("as_it_is", "replayed") for k in range(3)):
        torch.manual_seed(0)
        model = unet.build_network("table5_1", **changes).to(DEVICE, memory_format=FORM)
        state = training.new_state(model, 2e-4, seed=0) | dict(active=[k])
        if form == "replayed":
            state["forward"] = replayed(model, k, batch)
        run = lambda n, state=state: train_steps(state, images, n, batch)  # noqa: E731
        warm_up = seconds(lambda run=run: run(3))
        spent, gib = measured(lambda run=run: run(n))
        rate = 3e9 * costs[k]["true_gflops"] * batch * n / spent  # backward counts twice
        row = dict(pictures_per_s=batch * n / spent, tflops=rate / 1e12, share=rate / peak)
        row.update(warm_up_s=warm_up, peak_gib=gib, **profile(lambda run=run: run(1), spent / n))
        yield {f"{form}_{k}": row}
        del model, state, run
        torch.cuda.empty_cache()


def profile(work, alone):
    """List what the card spends its time on in `work`, and how much of `alone` seconds it works.

    launches: how many kernels the host has to start, one by one.
    """
    kinds, types = torch.profiler.ProfilerActivity, torch.autograd.DeviceType
    with torch.profiler.profile(activities=[kinds.CUDA if GPU else kinds.CPU]) as found:
        work()
        now()
    time_of = lambda e: e.self_device_time_total if GPU else e.self_cpu_time_total  # noqa: E731
    on = types.CUDA if GPU else types.CPU
    rows = [e for e in found.key_averages() if e.device_type == on]
    # an annotation spans kernels that have rows of their own
    rows = [e for e in rows if not getattr(e, "is_user_annotation", False)]
    total = sum(map(time_of, rows)) or 1
    launches, rows = sum(e.count for e in rows), sorted(rows, key=time_of, reverse=True)[:8]
    kernels = [[e.key[:70], time_of(e) / total, e.count] for e in rows]
    busy, launches = (total / 1e6 / alone, launches) if GPU else (None, None)
    return dict(busy=busy, launches=launches, kernels=kernels)


def sampling_speed(args):
    """Draw with table5_1 by DPM-Solver-3: in float32, and in what the project takes on a card.

    Convolutions of float32 may use TF32, which is torch's default.
    """
    n, steps, batch, changes = (4, 5, 4, TINY) if args.quick else (256, 30, 128, {})
    model, how = trained("table5_1", args, steps, batch), dict(sampler="dpm-solver-3", nfe=20)
    count, shares = evaluation.stage_shares(model, "vp", **how)
    costs = unet.cost("table5_1", **changes)
    work = count * sum(part * costs[k]["true_gflops"] for k, part in shares.items())
    yield dict(pictures=n, evaluations=count, gflop_a_picture=work)
    drawn, contexts = {}, dict(float32=float32_only, bfloat16=contextlib.nullcontext)

    def draw(kind):
        with contexts[kind]():
            drawn[kind] = evaluation.sample(model, "vp", n, batch=n, **how)

    spent = medians(2, **{kind: lambda kind=kind: draw(kind) for kind in contexts})
    peak = product_rate(args) / 1e9
    for kind, s in spent.items():
        yield {kind: dict(pictures_per_s=n / s, share_of_bfloat16_product=work * n / s / peak)}
    a, b = (workshop.to_pictures(drawn[kind]) for kind in contexts)
    yield dict(difference=difference(drawn["bfloat16"], drawn["float32"]))
    yield dict(rms_pixel_difference=float((a - b).square().mean().sqrt()))
    yield dict(spread=float(drawn["float32"].std()))  # of entries that should lie in [-1, 1]


def train_run(args):
    """Run step 04 from the shell on 5,000 picture files: its speed, start and end included."""
    from PIL import Image

    n, steps, flags = 5000, 100, []  # the recipe: table5_1, 128 pictures a step
    if args.quick:
        n, steps, flags = 40, 6, ["--network", "digits", "--size", 8, "--batch", 8]
    pixels, source = pictures(args, n)
    yield dict(pictures=source, steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pictures").mkdir()
        for i, picture in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
            Image.fromarray(picture).save(f"{folder}/pictures/{i:05}.png", compress_level=1)
        flags += ["--dataset", "folder", "--root", "pictures", "--steps", steps]
        flags += ["--boundaries", "0.442,0.6308", "--name", "r"]
        command = [sys.executable, ROOT / "04_train.py", *map(str, flags)]
        train = lambda: subprocess.run(command, cwd=folder, stdout=sys.stderr, check=True)  # noqa: E731
        yield dict(wall_s=seconds(train))
        rows = workshop.read_log(Path(folder, "runs", "r"))
    losses = [value for row in rows for key, value in row.items() if key.startswith("loss")]
    yield dict(pictures_per_s=statistics.median(row["images_per_s"] for row in rows))
    yield dict(finite=all(map(math.isfinite, losses)), reached=rows[-1]["step"], last=rows[-1])


def agree_samplers(args):
    """Draw the same pictures on both devices with six samplers, in float32 without TF32."""
    allow_tf32(False)
    steps, batch, n = (5, 4, 2) if args.quick else (60, 64, 16)
    model = trained("cifar10", args, steps, batch)
    models = copy.deepcopy(model).cpu(), model
    for name in ("ddim", "heun", "dpm-solver-3", "dpm-solver++-2m", "deis-3", "ancestral"):
        with float32_only():
            nfe = 19 if name == "heun" else 20
            cpu, card = (evaluation.sample(model, "vp", n, name, nfe) for model in models)
        error = difference(card, cpu)
        yield {name: dict(difference=error, ok=error <= 1e-3)}


PARTS = {  # name: (function, seconds it may take)
    "machine": (machine, 30),
    "agree_networks": (agree_networks, 75),
    "agree_samplers": (agree_samplers, 60),
    "training_speed": (training_speed, 120),
    "sampling_speed": (sampling_speed, 75),
    "train_run": (train_run, 95),
}

# ---- running them ------------------------------------------------------------------------------


def tidy(found):
    """Write a dictionary as JSON, its floats with 4 digits and NaN as text."""
    few = dict(parse_float=lambda x: float(f"{float(x):.4g}"), parse_constant=str)
    return json.dumps(json.loads(json.dumps(found), **few))


def tell(name, args):
    """Run a part in this process, printing what it has found as it grows."""
    found = dict(part=name, quick=args.quick)
    for piece in PARTS[name][0](args):
        found.update(piece)
        print(tidy(found), flush=True)


def watch(command, name, limit):
    """Run a command that tells of a part, for `limit` seconds at most: its last line."""
    begin, cut = time.perf_counter(), False
    # files, not pipes: what outlives the command would hold a pipe open
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as out,
        tempfile.TemporaryFile("w+", encoding="utf-8") as err,
    ):
        process = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            cut = True
        finally:  # with its children
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        out.seek(0), err.seek(0)
        lines = [line for line in out if line.startswith('{"part"') and line.endswith("}\n")]
        last = (err.read().strip().splitlines() or [""])[-1]
    found = json.loads(lines[-1]) if lines else dict(part=name)
    found.update(seconds=time.perf_counter() - begin)
    if cut or status:
        found.update(
            dict(cut=f"after {limit} s") if cut else dict(error=last[-300:] or str(status))
        )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="parts to run, comma-separated")
    parser.add_argument("--part", choices=PARTS, help="run this one, in this process")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--data", default="data", help="where CIFAR-10 lies, if at all")
    parser.add_argument("--out", default="", help="a file that also gets the lines")
    args = parser.parse_args()
    if args.part:
        return tell(args.part, args)
    if unknown := set(names := args.parts.split(",")) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}: take of {', '.join(PARTS)}")
    if not (GPU or args.quick):
        parser.error("there is no GPU here: give --quick to see that the parts run")
    lines, more = [], ["--data", args.data] + ["--quick"] * args.quick
    for name in names:
        lines.append(watch([sys.executable, __file__, "--part", name, *more], name, PARTS[name][1]))
        print(text := tidy(lines[-1]), flush=True)
        if args.out:
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(f"{text}\n")
    sys.exit(any("error" in line for line in lines))


if __name__ == "__main__":
    main()
