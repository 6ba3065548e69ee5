"""Check and measure the project on one GPU, in at most eight minutes, with ten lines in the end.

    python benchmarks/gpu.py [--data ROOT] [--parts replay,speed] [--quick]

Each part runs in a process of its own with a time limit, so that one that hangs or crashes spoils
no other; what it had found when it was cut counts. The parts go in the order of their worth.

replay     40 steps of step 04, replayed as CUDA graphs, against the same steps one by one
speed      training each stage of table5_1: as it is, replayed, with fused norms, another layout
sampling   drawing with table5_1, as it is and replayed
train_run  step 04 from the shell on 10,000 picture files, replayed, from start to end
right      networks and a sampler, the card against the CPU

--quick takes tiny sizes, which a CPU can do too: no speed then means anything.
"""

import argparse
import contextlib
import copy
import importlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from stopwatch import DEVICE, FORM, GPU, ROOT, machine, medians, now, seconds, workshop

unet = importlib.import_module("03_multistage_unet")
training = importlib.import_module("04_train")
evaluation = importlib.import_module("05_sample_eval")

TINY = dict(encoder=16, decoders=(16, 16, 16), blocks=1, mults=(1, 2))  # for --quick
Replayed = workshop.Replayed
RATE = 2**-12  # near 2e-4; a replayed rate is a float32, which has this one exactly

# ---- small parts -----------------------------------------------------------------------------


def product_rate(args, times=20):
    """Return the FLOP/s of square matrix products in bfloat16, the yardstick."""
    n = 64 if args.quick else 8192
    a = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16)
    spent = medians(3, product=lambda: [a @ a for _ in range(times)])["product"]
    return 2 * n**3 * times / spent


def in_float32():
    """Compute in float32, neither bfloat16 nor TF32: a context."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return mock.patch.object(workshop, "half_precision", lambda _: contextlib.nullcontext())


def difference(a, b):
    """Return the norm of a - b over that of b."""
    return float((a.cpu() - b.cpu()).norm().detach() / b.cpu().norm().detach())


def pictures(args, n):
    """Return n colour pictures of 32×32 as uint8 (n, 3, 32, 32): CIFAR-10's, or smooth textures."""
    if Path(args.data, "cifar-10-batches-py").is_dir():
        return workshop.load_images("cifar10", args.data)[0][:n]
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(coarse, size=32, mode="bilinear") * 255).to(torch.uint8)


def soon(work, on, first=0):
    """Replay what step 04 would, but from the fourth step on: time is short."""
    return Replayed(work, on, first=3)


def ready(args, name="table5_1", device=None, **changes):
    """Build a network, always the same, and what trains it."""
    torch.manual_seed(0)
    model = unet.build_network(name, **(TINY if args.quick else {}) | changes)
    return training.new_state(model.to(device or DEVICE, memory_format=FORM), RATE, seed=0)


@torch.compile(dynamic=True, backend="inductor" if GPU else "eager")
def norm_and_bend(h, groups, weight, bias, eps):
    """Normalise (B, c, H, W) in groups of channels, in any layout, and bend it, in one kernel."""
    x = h.float().unflatten(1, (groups, -1))
    x = x - x.mean((2, 3, 4), keepdim=True)
    x = (x * torch.rsqrt(x.square().mean((2, 3, 4), keepdim=True) + eps)).flatten(1, 2)
    return F.silu(x * weight[:, None, None] + bias[:, None, None]).to(h.dtype)


@contextlib.contextmanager
def fused(model):
    """Let the norms of residual blocks and decoders bend what they normalise."""
    for part in model.modules():
        block = isinstance(part, unet.ResBlock)
        norms = [part.norm1, part.norm2] if block else []
        for norm in [part.norm] if isinstance(part, unet.Decoder) else norms:
            how = norm.num_groups, norm.weight, norm.bias, norm.eps
            norm.forward = lambda h, how=how: norm_and_bend(h, *how)
    bent = SimpleNamespace(**{**vars(F), "silu": lambda h: h if h.dim() == 4 else F.silu(h)})
    torch._dynamo.config.recompile_limit = 64  # beyond it, it falls back in silence
    with mock.patch.object(unet, "F", bent):
        yield


# ---- the parts: each yields pieces of what it finds --------------------------------------------


def replay(args):
    """Compare replayed steps with the same steps one by one, and two replays with dropout."""
    n, batch, images = *((6, 4) if args.quick else (40, 32)), pictures(args, 1000).to(DEVICE)
    for kind, stages in itertools.product(("float32", "bfloat16"), ("uniform", "mixed")):
        how = dict(batch=batch, warmup=64, stages=stages, pieces=1 + (stages == "mixed"))
        ends, limit = [], dict(float32=1e-5, bfloat16=1e-3)[kind]
        for on in (False, False, True):  # the second one tells how far two right ones are apart
            with in_float32() if kind == "float32" else contextlib.nullcontext():
                state = ready(args, "cifar10")
                logs = list(training.train(state, images, n, **how, replay=on))
            found = [state[name].parameters() for name in ("model", "ema")]
            found.append(loss for _, losses in logs for loss in losses.values())
            ends.append([torch.cat([v.detach().flatten() for v in part]) for part in found])
        plain, again, replayed = ends
        off, floor = (max(map(difference, end, plain)) for end in (replayed, again))
        ok = off <= max(limit, 2 * floor)
        yield {f"{kind}, {stages}": dict(difference=off, of_two_plain_runs=floor, ok=ok)}
    model = unet.randomize(ready(args, "cifar10", "cpu", dropout=0.5)["model"]).train().to(DEVICE)
    again = Replayed(lambda k, x, t: model(x, t, stage=k), on=True)
    x, t = torch.randn(4, 3, 32, 32, device=DEVICE), torch.full((4,), 0.1, device=DEVICE)
    with torch.no_grad():
        *_, one, other = [again(0, x, t) for _ in range(4)]
    yield dict(dropout_draws_anew=difference(one, other) > 0)


def speed(args):
    """Time step 04's loop on each stage of table5_1: a row a stage and batch."""
    costs, peak = unet.cost("table5_1", **TINY if args.quick else {}), product_rate(args)
    images, n, rows = pictures(args, 1000).to(DEVICE), 1 if args.quick else 5, {}
    yield dict(bfloat16_tflops=peak / 1e12)
    batches, model = (4,) if args.quick else (128, 512), ready(args, device="cpu")["model"]
    forms = {"plain": batches, "replayed": batches, "channels_first": batches[:1], "fused": batches}
    cases = ((form, *case) for form in forms for case in itertools.product(forms[form], range(3)))
    for form, batch, k in cases:
        layout = torch.contiguous_format if form == "channels_first" else FORM
        there = copy.deepcopy(model).to(DEVICE, memory_format=layout)
        state = training.new_state(there, RATE, seed=0) | dict(active=[k])
        how = dict(batch=batch, flip=True, replay=form in ("replayed", "fused"))
        loop, row = training.train(state, images, 10**9, **how), {}
        with contextlib.ExitStack() as stack, contextlib.suppress(torch.OutOfMemoryError):
            stack.enter_context(fused(there)) if form == "fused" else None
            run = lambda n, loop=loop: [next(loop) for _ in range(n)]  # noqa: E731
            torch.cuda.reset_peak_memory_stats() if GPU else None  # a replay takes no memory anew
            row = dict(first_s=seconds(lambda run=run: run(5)))
            speed = batch * n / (spent := seconds(lambda run=run: run(n)))
            rate = 3e9 * costs[k]["true_gflops"] * speed  # backward counts twice
            row.update(pictures_per_s=speed, share=rate / peak)
            row.update(gib=torch.cuda.max_memory_allocated() / 2**30 if GPU else None)
            row.update(profile(lambda run=run: run(1), spent / n))
        rows.setdefault(f"stage {k}, batch {batch}", {})[form] = row
        yield rows
        del there, state, loop, run
        torch.cuda.empty_cache()  # nothing without a GPU


def profile(work, alone):
    """Tell for what share of `alone` seconds the card works in `work`, and what the host starts."""
    if not GPU:
        return {}
    kinds, types = torch.profiler.ProfilerActivity, torch.autograd.DeviceType
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as seen:
        work()
        now()
    rows = [e for e in seen.key_averages() if not getattr(e, "is_user_annotation", False)]
    busy = sum(e.self_device_time_total for e in rows if e.device_type == types.CUDA) / 1e6
    starts = ("cudaLaunch", "cudaGraphLaunch", "cuLaunch")
    return dict(busy=busy / alone, launches=sum(e.count for e in rows if e.key.startswith(starts)))


def sampling(args):
    """Draw with table5_1 by DPM-Solver-3, 20 evaluations, as it is and replayed."""
    n, model, how = 4 if args.quick else 512, ready(args)["ema"], dict(sampler="dpm-solver-3")
    how.update(nfe=20, batch=n // 2)
    draw = lambda **more: evaluation.sample(model, "vp", n, **how, **more)  # noqa: E731
    spent = medians(2, plain=draw, replayed=lambda: draw(replay=True))
    yield {f"{kind}_pictures_per_s": n / s for kind, s in spent.items()}


def train_run(args):
    """Run step 04 from the shell on picture files: its speed, start and end included."""
    from PIL import Image

    n, steps, flags = 10_000, 150, ["--replay"]  # the recipe: table5_1, 128 pictures a step
    if args.quick:
        n, steps, flags = 40, 6, ["--network", "digits", "--size", 8, "--batch", 8]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pictures").mkdir()
        for i, picture in enumerate(pictures(args, n).permute(0, 2, 3, 1).numpy()):
            Image.fromarray(picture).save(f"{folder}/pictures/{i:05}.png", compress_level=1)
        flags += ["--dataset", "folder", "--root", "pictures", "--steps", steps]
        flags += ["--boundaries", "0.442,0.6308", "--name", "r"]
        command = [sys.executable, ROOT / "04_train.py", *map(str, flags)]
        run = lambda: subprocess.run(command, cwd=folder, stdout=sys.stderr, check=True)  # noqa: E731
        yield dict(wall_s=seconds(run), pictures=n, steps=steps)
        rows = workshop.read_log(Path(folder, "runs", "r"))
    speed = statistics.median(row["images_per_s"] for row in rows)
    yield dict(pictures_per_s=speed, reached=rows[-1]["step"], loss_0=rows[-1].get("loss_0"))


def right(args):
    """Compare networks and a sampler on both devices, in float32: the largest differences."""
    t, outputs, gradients = torch.tensor([0.1, 0.5, 0.9]), [], []
    with in_float32():
        for name in ("digits", "digits_latent", "cifar10", "table5_1"):
            model, found = unet.randomize(ready(args, name, "cpu", dropout=0.0)["model"]), []
            x = torch.randn(3, model.channels, model.size, model.size)
            for device in ("cpu", DEVICE):
                there = copy.deepcopy(model).to(device, memory_format=FORM)
                out = there(x.to(device), t.to(device))
                out.square().mean().backward()
                found += [out.detach(), torch.cat([p.grad.flatten() for p in there.parameters()])]
            outputs.append(difference(found[2], found[0]))
            gradients.append(difference(found[3], found[1]))
            with fused(there):
                bent = difference(there(x.to(device), t.to(device)), out)
            yield dict(outputs=max(outputs), gradients=max(gradients), fused=bent)
        model = unet.randomize(ready(args, "digits", "cpu")["model"])
        there = copy.deepcopy(model).to(DEVICE, memory_format=FORM)
        draw = lambda model: evaluation.sample(model, "vp", 4, "dpm-solver-3", 20)  # noqa: E731
        yield dict(sampler=difference(draw(there), draw(model)))


PARTS = {  # name: (function, seconds it may take)
    "replay": (replay, 60),
    "speed": (speed, 210),
    "sampling": (sampling, 60),
    "train_run": (train_run, 100),
    "right": (right, 50),
}

# ---- running them ------------------------------------------------------------------------------


def tidy(found):
    """Write a dictionary as JSON, its floats with 4 digits and NaN as text."""
    few = dict(parse_float=lambda x: float(f"{float(x):.4g}"), parse_constant=str)
    return json.dumps(json.loads(json.dumps(found), **few))


def tell(name, args):
    """Run a part in this process, printing what it has found as it grows."""
    found = dict(part=name, quick=args.quick)
    workshop.join_processes()  # cuDNN shall choose as it does in the steps
    with mock.patch.object(workshop, "Replayed", soon):
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
    bad = dict(cut=f"after {limit} s") if cut else dict(error=last[-300:] or str(status))
    return found | dict(seconds=time.perf_counter() - begin) | (bad if cut or status else {})


def say(found):
    """Put what was found, a dictionary of dictionaries, into words."""
    if not isinstance(found, dict):
        return str(found)
    return ", ".join(f"{key} {say(value)}" for key, value in found.items())


def rows(found):
    """Make of what a part has found the rows of the table: (name, words)."""
    found = json.loads(tidy(found))
    stages = {key: found.pop(key) for key in [*found] if key.startswith("stage ")}
    last = [found.pop("part"), *stages][-1]  # has what is said of all
    stages[last] = stages.get(last, {}) | found
    yield from ((key, say(row)) for key, row in stages.items())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="parts to run, comma-separated")
    parser.add_argument("--part", choices=PARTS, help="run this one, in this process")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--data", default="data", help="where CIFAR-10 lies, if at all")
    args = parser.parse_args()
    if args.part:
        return tell(args.part, args)
    if unknown := set(names := args.parts.split(",")) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}: take of {', '.join(PARTS)}")
    if not (GPU or args.quick):
        parser.error("there is no GPU here: give --quick to see that the parts run")
    failed, more = False, ["--data", args.data] + ["--quick"] * args.quick
    print(f"| {machine()} | found |\n|---|---|", flush=True)
    for name in names:
        found = watch([sys.executable, __file__, "--part", name, *more], name, PARTS[name][1])
        failed |= "error" in found or '"ok": false' in json.dumps(found)
        for kind, said in rows(found):
            print(f"| {kind} | {said} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
