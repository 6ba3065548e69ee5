"""Check and measure the project on one GPU, in at most ten minutes.

    python benchmarks/gpu.py [--data ROOT] [--out gpu.jsonl] [--parts machine,resume] [--quick]

Each part runs in a process of its own with a time limit, so that one that hangs or crashes spoils
no other, and prints one JSON line when it ends: what it found (when cut, as much as it had), its
seconds, and "error" or "cut" where it came to that. A line "summary" ends the run.

--quick takes tiny sizes, which a CPU can do too: what needs a card is then null, and no speed means
anything. `--part NAME` runs one part in this process and prints its line each time that it grows.
"""

import contextlib
import copy
import importlib
import math
import os
import pickle
import platform
import re
import shutil
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

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import apart
from network import medians
from stopwatch import GPU, now, seconds

workshop = importlib.import_module("00_workshop")

sde = importlib.import_module("01_sde_and_denoiser")
clustering = importlib.import_module("02_clustering")
unet = importlib.import_module("03_multistage_unet")
training = importlib.import_module("04_train")
evaluation = importlib.import_module("05_sample_eval")
ldm = importlib.import_module("06_ldm")

DEVICE, LAST = workshop.device(), torch.channels_last
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
    card = torch.cuda.is_initialized()
    if card:
        torch.cuda.reset_peak_memory_stats()
    return seconds(work), torch.cuda.max_memory_allocated() / 2**30 if card else None


def difference(a, b):
    """Return the norm of a - b over that of b."""
    return float((a.cpu() - b.cpu()).norm() / b.cpu().norm())


def pictures(args, n):
    """Return n colour pictures of 32×32 as uint8 (n, 3, 32, 32), and in words what they are.

    Real ones as far as the batches of CIFAR-10 in --data go, then digits on smooth textures.
    """
    real, dice = torch.empty(0, 3, 32, 32, dtype=torch.uint8), torch.Generator().manual_seed(0)
    for path in sorted(Path(args.data, "cifar-10-batches-py").glob("data_batch_*")):
        batch = pickle.loads(path.read_bytes(), encoding="latin1")["data"]
        real = torch.cat([real, torch.from_numpy(batch).reshape(-1, 3, 32, 32)])[:n]
    if len(real) == n:
        return real, f"{n} of CIFAR-10"
    coarse = torch.rand(n - len(real), 3, 4, 4, generator=dice)
    made = F.interpolate(coarse, size=32, mode="bilinear")
    with contextlib.suppress(ImportError):  # without scikit-learn textures have to do
        digits = workshop.load_images("digits")[0].repeat_interleave(3, 2).repeat_interleave(3, 3)
        which = torch.randint(len(digits), (len(made),), generator=dice)
        ink = F.pad(digits[which], (4, 4, 4, 4)) / 255
        made = made * (1 - ink) + ink * torch.rand(len(made), 3, 1, 1, generator=dice)
    whole = torch.cat([real, (made * 255).to(torch.uint8)])
    return whole, f"{len(real)} of CIFAR-10, {len(made)} made"


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
    model = model.to(DEVICE, memory_format=LAST)
    state = training.new_state(model, 2e-4, seed=0)
    train_steps(state, pictures(args, 1000)[0].to(DEVICE), steps, batch)
    return state["ema"]


def step_04(folder, *flags, card=True):
    """Start step 04 in a folder, without the card where card=False: its process."""
    command = [sys.executable, str(ROOT / "04_train.py"), "--name", "r", *map(str, flags)]
    env = {**os.environ, "MPLBACKEND": "Agg"} | ({} if card else {"CUDA_VISIBLE_DEVICES": ""})
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=folder, env=env, **pipes)


def printed(process):
    """Wait for a process and return what it printed. Raises RuntimeError where it failed."""
    text = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(f"status {process.returncode}: {text.strip()[-300:]}")
    return text


# ---- the parts: each yields pieces of what it finds --------------------------------------------


def machine(args):
    """Name the software and the card, and measure what it can do at best."""
    x = torch.zeros(2**20 if args.quick else 2**28, device=DEVICE)  # the card is awake from here on
    y, card = torch.empty_like(x), torch.cuda.is_initialized()
    yield dict(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda)
    yield dict(device=str(DEVICE), cudnn=torch.backends.cudnn.version() if card else None)
    about = torch.cuda.get_device_properties(0) if card else None
    yield dict(card=about and about.name, gib=about and about.total_memory / 2**30)
    yield dict(multiprocessors=about and about.multi_processor_count, cores=os.cpu_count())
    yield dict(capability=about and f"{about.major}.{about.minor}")
    if shutil.which("nvidia-smi"):
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        yield dict(driver=subprocess.run(ask, capture_output=True, text=True).stdout.strip())
    spent = medians(3, copy=lambda: [y.copy_(x) for _ in range(10)])["copy"]
    yield dict(copy_tb_per_s=20 * x.nbytes / spent / 1e12)  # read and written
    yield dict(bfloat16_tflops=product_rate(args) / 1e12)
    for name, on in (("float32_tflops", False), ("tf32_tflops", True)):
        allow_tf32(on)
        yield {name: product_rate(args, torch.float32) / 1e12}


def agree_networks(args):
    """Compare networks on both devices, [output, gradients], in three precisions.

    A batch has a picture of each stage. "rounding" is what bfloat16 does on the CPU: the card may
    be as far off where that is more than 1e-2.
    """
    small = [name for name in unet.NETWORKS if name.startswith(tuple(unet.SMALL_NETWORKS))]
    first = [*small, *PUBLISHED]  # all kinds; then the others, as far as the time goes
    others = [name for name in unet.NETWORKS if name not in first]
    for name in ("digits", "table5_1", "edm", "ldm") if args.quick else [*first, *others]:
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
        model = model.to(DEVICE, memory_format=LAST)
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
    """Time step 04's loop on each stage of table5_1, as it is and as replayed CUDA graphs."""
    yield from time_forms(args, ("as_it_is", "replayed"), (0, 1, 2))


def compiled_speed(args):
    """Time step 04's loop with `--compile` on the last stage, whose compilation takes minutes."""
    yield from time_forms(args, ("compiled",), (2,))


def time_forms(args, forms, stages):
    """Time training steps of table5_1: its own stages in forms, and how busy the card is."""
    batch, n, changes = (4, 1, TINY) if args.quick else (128, 10, {})
    costs, peak = unet.cost("table5_1", **changes), product_rate(args)
    yield dict(batch=batch, bfloat16_tflops=peak / 1e12)
    images = pictures(args, 1000)[0].to(DEVICE)
    for form in forms:
        found = {}
        for k in stages:
            torch.manual_seed(0)
            model = unet.build_network("table5_1", **changes).to(DEVICE, memory_format=LAST)
            state = training.new_state(model, 2e-4, seed=0) | dict(active=[k])
            run = lambda n, state=state: train_steps(state, images, n, batch)  # noqa: E731
            try:
                if form == "compiled":
                    backend = "eager" if args.quick else "inductor"
                    state["forward"] = torch.compile(model, backend=backend)
                elif form == "replayed":
                    state["forward"] = replayed(model, k, batch)
                row = found[f"stage_{k}"] = dict(warm_up_s=seconds(lambda run=run: run(3)))
                spent, row["peak_gib"] = measured(lambda run=run: run(n))
            except Exception as error:  # out of memory, or no compiler: the other forms go on
                found["error"] = f"{type(error).__name__}: {str(error)[:300]}"
                break
            finally:
                yield {form: found}
            rate = 3e9 * costs[k]["true_gflops"] * batch * n / spent  # backward counts twice
            row.update(pictures_per_s=batch * n / spent, tflops=rate / 1e12, share=rate / peak)
            row.update(profile(lambda run=run: run(1), spent / n))
            yield {form: found}
            del model, state, run
            torch.cuda.empty_cache()


def profile(work, alone):
    """List what the card spends its time on in `work`, and how much of `alone` seconds it works.

    launches: how many kernels the host has to start, one by one.
    """
    card, kinds = torch.cuda.is_initialized(), torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA if card else kinds.CPU]) as found:
        work()
        now()
    time_of = lambda e: e.self_device_time_total if card else e.self_cpu_time_total  # noqa: E731
    on = torch.autograd.DeviceType.CUDA if card else torch.autograd.DeviceType.CPU
    rows = [e for e in found.key_averages() if e.device_type == on]
    # an annotation spans kernels that have rows of their own
    rows = [e for e in rows if not getattr(e, "is_user_annotation", False)]
    total = sum(map(time_of, rows)) or 1
    launches, rows = sum(e.count for e in rows), sorted(rows, key=time_of, reverse=True)[:8]
    kernels = [[e.key[:70], time_of(e) / total, e.count] for e in rows]
    busy, launches = (total / 1e6 / alone, launches) if card else (None, None)
    return dict(busy=busy, launches=launches, kernels=kernels)


def posterior_mean(args):
    """Compare step 01's posterior mean with float64 and with its two matrix products alone."""
    N, batch, checked = (1500, 20, 4) if args.quick else (50_000, 1000, 16)
    pixels, source = pictures(args, N)
    yield dict(pictures=source, batch=batch)
    images, dice = pixels.to(DEVICE).float() / 255, torch.Generator().manual_seed(0)
    y, q = images.flatten(1), torch.randn(batch, 3072, generator=dice).to(DEVICE)
    for sigma in (1e-3, 0.1, 0.5, 1.0, 2.5, 7.4, 152.0):
        x = images[:batch] + sigma * torch.randn(batch, 3, 32, 32, generator=dice).to(DEVICE)
        denoise = lambda x=x, s=sigma: sde.posterior_mean(x, s, sde.EDM, images)  # noqa: E731
        found, expected = denoise()[:checked], softmax_mean(x[:checked], sigma, images)
        error = max(map(difference, found, expected))
        spent = medians(3, denoise=denoise, products=lambda: (q @ y.T) @ y)
        row = dict(error=error, ms_an_evaluation=1e3 * spent["denoise"] / batch)
        row["tflops_of_products"] = 4 * batch * y.numel() / spent["products"] / 1e12
        yield {f"sigma_{sigma:g}": row | dict(share=spent["products"] / spent["denoise"])}


def softmax_mean(x, sigma, images, chunk=500):
    """Average the images as Prop. 1 defines it, in float64 from exact differences."""
    z, parts = x.flatten(1).double(), [part.double() for part in images.flatten(1).split(chunk)]
    logits = [-((z[:, None] - part) ** 2).sum(2) / (2 * sigma**2) for part in parts]
    weights = torch.softmax(torch.cat(logits, 1), 1).split(chunk, dim=1)
    return sum(w @ part for w, part in zip(weights, parts, strict=True)).reshape(x.shape)


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
        begin = time.perf_counter()
        printed(step_04(folder, *flags, "--boundaries", "0.442,0.6308"))
        yield dict(wall_s=time.perf_counter() - begin)
        rows = workshop.read_log(Path(folder, "runs", "r"))
    losses = [value for row in rows for key, value in row.items() if key.startswith("loss")]
    yield dict(pictures_per_s=statistics.median(row["images_per_s"] for row in rows))
    yield dict(finite=all(map(math.isfinite, losses)), reached=rows[-1]["step"], last=rows[-1])


def resume(args):
    """Kill step 04 in the middle and resume it; then carry its checkpoint to the CPU and back."""
    steps, every = (60, 4) if args.quick else (120, 10)
    flags = ["--boundaries", "0.1,0.44", "--save_every", every, "--sample_every", 10**6]
    flags += ["--decay", "none"]  # a learning rate that falls to zero at an end could not go on
    with tempfile.TemporaryDirectory() as folder:
        run, process = Path(folder, "runs", "r"), step_04(folder, *flags, "--steps", steps)
        while process.poll() is None and not (run / "checkpoint.previous.pt").exists():
            time.sleep(0.01)
        process.kill()
        process.communicate()
        killed = process.returncode == -signal.SIGKILL
        yield dict(killed=killed, killed_after=workshop.read_checkpoint(run)["step"])
        for name, more, card in (("resumed", 0, True), ("on_cpu", 20, False), ("back", 40, True)):
            goal = steps + more
            text = printed(step_04(folder, *flags, "--resume", "--steps", goal, card=card))
            reached, where = (
                workshop.read_checkpoint(run)["step"],
                re.search(r"pictures on (\w+)", text),
            )
            rows = [row["step"] for row in workshop.read_log(run)]
            whole = rows == sorted(set(rows)) and rows[-1] == reached == goal
            yield {name: dict(device=where and where[1], step=reached, rows_whole=whole)}


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


def algorithm_1(args):
    """Find the cuts of a large and a small data set on both devices, from the same samples."""
    n, many, more = (1500, 100, 500) if args.quick else (15_000, 1000, 5000)
    pixels, source = pictures(args, n)
    for name, samples in ((source, many), ("digits", more)):
        pixels = workshop.load_images("digits")[0] if name == "digits" else pixels
        row, cuts = dict(samples=samples), []
        for where in dict.fromkeys(("cpu", DEVICE.type)):
            images = pixels.to(where).float() / 255
            find = lambda: cuts.append(clustering.algorithm_1(images, samples=samples))  # noqa: B023, E731
            spent = seconds(find)
            row[where] = dict(cuts=cuts[-1], seconds=spent)
        gaps = [abs(a - b) for a, b in zip(cuts[0], cuts[-1], strict=True)]
        yield {name: row | dict(gap=max(gaps))}


def autoencoder(args):
    """Time a training step of VQ-f4 with its patch discriminator (no LPIPS) at 256×256."""
    size, batch, n, plan = (32, 2, 1, dict(width=32, entries=64)) if args.quick else (256, 8, 8, {})
    pixels = torch.randint(256, (32, 3, size, size), dtype=torch.uint8).to(DEVICE)
    state = ldm.new_autoencoder_state({**workshop.VQ_F4, **plan}, size, 4e-5, seed=0)
    yield dict(batch=batch, size=size)

    def run(n):
        for _ in ldm.train_autoencoder(state, pixels, state["step"] + n, batch, adversarial=0.75):
            pass

    yield dict(warm_up_s=seconds(lambda: run(2)))
    spent, gib = measured(lambda: run(n))
    yield dict(seconds_a_step=spent / n, pictures_per_s=batch * n / spent, peak_gib=gib)


def demo(args):
    """Run the demo in a copy of the project (--quick: one step of it)."""
    leave = shutil.ignore_patterns(".*", "runs", "data", "figures", "shared", "__pycache__")
    command = [sys.executable, "notebooks/execute.py"]
    command += ["--update", "02_clustering"] if args.quick else []
    pipes, lines = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True), []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        place, begin = shutil.copytree(ROOT, Path(folder, "project"), ignore=leave), now()
        with subprocess.Popen(command, cwd=place, **pipes) as process:
            for line in process.stdout:
                lines.append(line.rstrip())
                yield dict(demo_s=now() - begin, printed=lines[-16:])
    if process.returncode:
        raise RuntimeError(f"notebooks/execute.py ended with {process.returncode}: {lines[-1:]}")


PARTS = {  # name: (function, seconds it may take); the last two take what the others leave
    "machine": (machine, 30),
    "agree_networks": (agree_networks, 75),
    "training_speed": (training_speed, 110),
    "posterior_mean": (posterior_mean, 35),
    "sampling_speed": (sampling_speed, 75),
    "train_run": (train_run, 95),
    "resume": (resume, 95),
    "agree_samplers": (agree_samplers, 60),
    "algorithm_1": (algorithm_1, 25),
    "autoencoder": (autoencoder, 30),
    "compiled_speed": (compiled_speed, 300),
    "demo": (demo, 600),
}


if __name__ == "__main__":
    apart.main(PARTS, __doc__.split("\n")[0], GPU)
