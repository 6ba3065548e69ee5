# %% [markdown]
# # 00 · The workshop
#
# The lessons need some machinery that teaches nothing about diffusion models: settings from the
# shell, pictures from disk, runs that survive a power cut, several processes. It lives here, so that
# the lessons can be short. **Begin with step 01**, and come here to add a data set (one entry of
# `DATASETS`).
#
# The rule for this file: *what is here holds no equation of the paper, is used by at least two
# steps, and imports no step.*

# %% tags=["imports"]
import builtins
import os
import re
import signal
import sys


def flags():
    """Return the words after a step's name, from a shell or %run; None in a notebook's cells."""
    return sys.argv[1:] if re.fullmatch(r"0\d_\w+\.py", os.path.basename(sys.argv[0])) else None


NOTEBOOK = hasattr(builtins, "get_ipython")  # true in a notebook's kernel, even under %run
SCRIPT = flags() is not None and not NOTEBOOK
FIRST = os.environ.get("RANK", "0") == "0"  # of the processes of torchrun, or the only one
SIGNALS = [getattr(signal, name, 0) for name in ("SIGINT", "SIGTERM", "SIGHUP")]  # not on Windows
SIGNALS = [kind for kind in SIGNALS if kind and signal.getsignal(kind) != signal.SIG_IGN]  # nohup

if SCRIPT:  # before torch is loaded, which takes a while
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # idle threads sleep soon, and do not spin
    for kind in SIGNALS:  # end quietly, once every `finally` has run
        signal.signal(kind, lambda number, _: sys.exit(128 + number))
    for name in ("stdout", "stderr"):  # a shell may close them, a terminal may lack letters
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")
        stream.reconfigure(errors="replace", line_buffering=True)
        setattr(sys, name, stream)

import argparse
import ast
import atexit
import datetime
import errno
import hashlib
import importlib.metadata
import json
import platform
import shutil
import socket
import threading
import time
from contextlib import contextmanager
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

if "__file__" not in globals() and os.path.exists("../00_workshop.py"):
    os.chdir("..")  # a notebook that was opened where it lies
ROOT = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "multistage")


def is_lesson():
    """Tell whether a step shows its lesson: in a notebook, and as a script without a flag."""
    return flags() is None or not (flags() or "RANK" in os.environ)


# %% [markdown]
# ## Errors
#
# A mistake that the user can correct is a `BadInput`: a script prints its one sentence and exits
# with status 2. Every other error is a bug and keeps its traceback.


# %%
class BadInput(ValueError):
    """Say in one sentence what is wrong with the user's input, and how to correct it."""


def report_bad_input(kind, error, trace):
    """Report a user's mistake in one line, with status 2; leave real bugs their traceback."""
    if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC):
        os._exit(128 + signal.SIGPIPE if error.errno == errno.EPIPE else 1)  # nobody listens
    if "Memory" in kind.__name__ or "can't allocate memory" in str(error):  # the latter: a CPU's
        error = BadInput("the memory is used up: take a smaller --batch, or more --pieces in 04")
    if not isinstance(error, BadInput):
        return sys.__excepthook__(kind, error, trace)
    if FIRST:  # torch takes sys.stderr away from processes that have joined
        place = sys.stderr if NOTEBOOK else sys.__stderr__
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=place, flush=True)
    sys.exit(2)


if SCRIPT:
    sys.excepthook = report_bad_input
if not (os.stat(".").st_nlink and (ROOT / "00_workshop.py").exists()):
    raise BadInput("this folder is gone, or not the project's: change into it (papermill: --cwd)")

# %% [markdown]
# ## Settings
#
# A step keeps its settings in one cell tagged `parameters`. `settings` turns them into flags when
# the file runs as a script; in a notebook you edit the cell itself, or papermill overrides it. The
# comment after a number ends with its range, which is checked in all three cases.


# %%
def read_parameters(step):
    """Read the `parameters` cell of a step: a list of (name, default, comment)."""
    text = (ROOT / f"{step}.py").read_text(encoding="utf-8")
    cell = text.split('# %% tags=["parameters"]\n')[1].split("# %%")[0]
    entries = re.findall(r"^(\w+) = (.+?)  # (.+)$", cell, re.MULTILINE)
    return [(name, ast.literal_eval(value), comment) for name, value, comment in entries]


def settings(namespace, step):
    """Let the `parameters` cell of `step` be set from the shell, papermill or the cell itself.

    namespace: the step's `globals()`. A wrong name, type or range ends a script with status 2; in a
    notebook it raises `BadInput`.
    """
    if namespace["__name__"] != "__main__":
        return
    known = read_parameters(step)
    if flags() is None:  # papermill's own cell may hold names that no parameter has
        injected = [cell for cell in namespace.get("In", []) if cell.startswith("# Parameters\n")]
        names = re.findall(r"^(\w+) =", "\n".join(injected), re.MULTILINE)
        if unknown := set(names) - {name for name, *_ in known}:
            raise BadInput(f"unknown parameter {min(unknown)!r}: see the cell of the parameters")
    else:
        parser = argparse.ArgumentParser(f"{step}.py", allow_abbrev=False)
        parser.error = lambda message: report_bad_input(BadInput, BadInput(message), None)
        for name, default, comment in known:
            kind = type(default)
            how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind)
            text = f"{comment} (default: {default!r})".replace("%", "%%")
            parser.add_argument(f"--{name}", default=default, help=text, **how)
        namespace.update(vars(parser.parse_args()))
    for name, default, comment in known:
        namespace[name] = check_value(name, namespace[name], type(default), comment)


def check_value(name, value, kind, comment):
    """Convert a value to its kind (bool, int, float, str); check the range that ends `comment`."""
    try:
        found = kind(value)
        other = value is None or isinstance(value, bool) != (kind is bool)
        if other or kind is int and found != float(value):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise BadInput(f"{name} = {value!r} is no {kind.__name__}") from None
    limits = re.search(r"([\[(])(\S+), (\S+)([\])])$", comment)
    if limits and kind is not str:
        low, high = float(limits[2]), float(limits[3])
        out = found == low and limits[1] == "(" or found == high and limits[4] == ")"
        if out or not low <= found <= high:  # so that nan is refused as well
            raise BadInput(f"{name} = {found} must lie in {limits[0]}")
    return os.path.expanduser(found) if kind is str else found


# %% tags=["parameters"]
dataset = "digits"  # the data set that is shown, one of DATASETS below
root = "data"  # where the data set lies or is downloaded to
check = False  # print versions and the device, then stop

# %%
settings(globals(), "00_workshop")

import filelock
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm


def device():
    """Return the torch device that the steps run on: the first CUDA GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe_environment():
    """List python, device, and each package of requirements.txt: its version, or MISSING."""
    lines = [f"python {platform.python_version()}", f"device {device()}"]
    required = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    for name in re.findall(r"^([\w-]+)", required, re.MULTILINE):
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} MISSING: pip install -r requirements.txt -c constraints.txt")
    return lines


if __name__ == "__main__" and check and flags():
    print(*describe_environment(), sep="\n")
    sys.exit()

# %% [markdown]
# ## Files and figures
#
# A file is written under another name and then renamed, so that nobody ever reads half of it.
# Figures go through `show_figure`: it always writes a PNG, and in a notebook also shows the figure.


# %%
@contextmanager
def replacing(path):
    """Give a path to write to, and rename it to `path` once it is whole and on the disk.

    Raises BadInput where that fails: no such place, no permission, disk full.
    """
    path = Path(path)
    aside = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut may leave the new name without its content
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter on a full disk
        raise BadInput(f"cannot write {path} ({shorten(error)}): choose another place") from error
    finally:
        if os.path.isfile(aside):
            aside.unlink()


def write_json(content, path):
    """Write a dictionary to a file. Raises BadInput where it cannot be written."""
    with replacing(path) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def shorten(error):
    """Shorten the message of an exception from someone else's code to one line."""
    return " ".join(str(error).split())[:150] or type(error).__name__


# %%
def show_figure(path):
    """Save the current matplotlib figure as `path` and, in a notebook, put it on the page."""
    with replacing(path) as aside:
        plt.savefig(aside, dpi=110, bbox_inches="tight", format="png")
    plt.show() if NOTEBOOK else print(f"figure: {path}")
    plt.close()


def tile_images(images, columns=16):
    """Arrange images (N, C, H, W), floats in [0, 1], as one spaced and enlarged (3, H', W')."""
    big, columns = images.detach().cpu().float().clamp(0, 1), min(columns, len(images))
    big = F.interpolate(big, scale_factor=max(1, 48 // big.shape[-1]))
    big = big.expand(-1, 3, -1, -1)  # grey is a colour
    big = torch.cat([big, big.new_ones(-len(big) % columns, *big.shape[1:])])
    # torchvision's make_grid does this too, but takes seconds to import; (rows, columns, C, h, w):
    big = F.pad(big, (6, 0, 6, 0), value=1.0).unflatten(0, (-1, columns))
    return F.pad(big.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2), (0, 6, 0, 6), value=1.0)


def show_images(rows, titles, path, columns=16, labels=None):
    """Draw titled grids of images under each other: `rows` is a list of (n, C, H, W) in [0, 1].

    labels: words that stand over the columns of the first grid, such as times.
    """
    grids = [tile_images(row, columns) for row in rows]
    height = sum(grid.shape[1] for grid in grids) / grids[0].shape[2] * 10 + 0.35 * len(rows)
    figure, axes = plt.subplots(len(rows), 1, figsize=(10, height), squeeze=False)
    for ax, grid, title in zip(axes[:, 0], grids, titles, strict=True):
        ax.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        ax.set_title(title, fontsize=10, loc="left", pad=18 if labels and ax is axes[0, 0] else 6)
        ax.axis("off")
    for i, label in enumerate(labels or []):
        middle = (i + 0.5) * (grids[0].shape[2] - 6) / columns + 3  # tiles lie 6 pixels apart
        axes[0, 0].text(middle, 0, label, ha="center", va="bottom", fontsize=9)
    figure.tight_layout()
    show_figure(path)


# %% [markdown]
# ## Data sets
#
# Everything that depends on the data set is in `DATASETS`, so a new data set is one more entry.
# `shape` is a picture's (C, H, W); without one, `--size` decides. `read` turns `--root` into (uint8
# (N, C, H, W), labels), or `torchvision` names the class that does. If the `judge` is "digits",
# step 05 measures with a classifier of ten labels, else with Inception. `network` and `recipe` are
# a small network of step 03 and how step 04 trains it. Colour pictures use the paper's, or those of
# `LAPTOP` where there is no GPU. The rest is for step 06.


# %%
def read_digits(root):
    """Read scikit-learn's digits, which need no folder: (uint8 (1797, 1, 8, 8), labels)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.tensor(data.images / 16 * 255).round().to(torch.uint8)  # 17 grey levels
    return pixels[:, None], torch.tensor(data.target)


PAPER = dict(steps=450_000, batch=128, lr=2e-4, warmup=5000, flip=True)
# latent diffusion's for CelebA-HQ (Rombach et al. 2022, Appendix E), 500,000 steps as in the paper
PAPER_LATENT = dict(steps=500_000, batch=48, lr=9.6e-5, warmup=1)
VQ_F4 = dict(kind="vq", channels=3, code=3, width=128, mults=(1, 2, 4), blocks=2, entries=8192)
SMALL = dict(kind="kl", channels=1, code=2, width=16, mults=(1, 2), blocks=1, entries=256)
WIDTHS = dict(encoder=32, decoders=(48, 32, 16))  # a quarter of the paper's, but for the last
# not the paper's: what helped in runs of minutes (RESULTS.md), with one decoder and with three
FOUND = dict(stages="mixed", times="stages", weight="min-snr", decay="linear")
# pictures in colour, in 20 to 40 minutes on two cores (docs/samples.md says what was tried)
NARROW = dict(encoder=24, decoders=(36, 24, 12), mults=(1, 2, 2), attention=(8,))
BRIEF = dict(steps=4000, batch=64, lr=2e-3, warmup=100, **FOUND)
LAPTOP = dict(small="laptop", network=NARROW, recipe=dict(BRIEF, flip=True))
COLOUR = dict(recipe=PAPER, autoencoder={**SMALL, "channels": 3, "code": 4}, latent_network=NARROW)
COLOUR["latent_recipe"] = dict(code_steps=1500, code_batch=64, code_lr=2e-3, **BRIEF)

DATASETS = {
    "digits": dict(
        shape=(1, 8, 8),
        read=read_digits,
        judge="digits",
        network=dict(**WIDTHS, attention=(4,)),
        recipe=dict(steps=2700, batch=64, lr=6e-3, warmup=100, flip=False)
        | dict(encoder=8, decoders="8,8,8", **FOUND),
        autoencoder=SMALL,
        latent_network=dict(**WIDTHS, attention=(4,)),
        latent_recipe=dict(code_steps=600, code_batch=64, code_lr=2e-3, **FOUND)
        | dict(steps=1200, batch=64, lr=6e-3, warmup=100, encoder=16, times="uniform"),
    ),
    "mnist": dict(
        shape=(1, 28, 28),
        torchvision="MNIST",
        judge="digits",
        network=dict(**WIDTHS, mults=(1, 2, 2)),
        recipe=dict(steps=10_000, batch=128, lr=1e-3, warmup=500, flip=False),
        autoencoder=SMALL,
        latent_network=dict(**WIDTHS, attention=(7,)),
        latent_recipe=dict(code_steps=800, code_batch=64, code_lr=2e-3)
        | dict(steps=1500, batch=64, lr=2e-3, warmup=100),
    ),
    "cifar10": dict(
        shape=(3, 32, 32),
        torchvision="CIFAR10",
        network=dict(encoder=64, decoders=(96, 64, 16), mults=(1, 2, 2), blocks=2)
        | dict(attention=(16,), dropout=0.1),
        **COLOUR,
    ),
    "celeba": COLOUR,
    "folder": COLOUR,
}


def about(dataset, network="", size=32):
    """Return the entry of DATASETS, with LAPTOP's parts where the paper's would take years.

    This happens without a GPU, unless a network is named. Raises BadInput for an unknown data set.
    """
    if dataset not in DATASETS:
        raise BadInput(f"unknown dataset {dataset!r}: take one of {', '.join(DATASETS)}")
    known = DATASETS[dataset]
    if known["recipe"] is PAPER and not network and device().type == "cpu":
        known = known | LAPTOP
    share = min(1, (32 / known.get("shape", (3, size, size))[2]) ** 2)  # large ones take no longer
    for kind in ("recipe", "latent_recipe"):
        if known[kind] is not PAPER:
            steps = {key: n for key, n in known[kind].items() if key.endswith("steps")}
            shorter = {key: max(1, round(share * n)) for key, n in steps.items()}
            known = known | {kind: known[kind] | shorter}
    return known


# %% [markdown]
# Pictures are one uint8 tensor (N, C, H, W). Those of `celeba` and `folder` are decoded once, into
# a file that the tensor then *maps*: what is not in memory is read when it is needed.


# %%
def load_images(dataset="digits", root="data", size=32):
    """Load a data set as (images uint8 (N, C, H, W), labels int64 (N,) or None).

    size: the side in pixels for sets without a shape of their own (centre crop, then antialiased
    resize). Raises BadInput where the set is unknown, damaged or not available.
    """
    known = about(dataset)
    if "read" in known:
        return known["read"](root)
    if "shape" not in known:
        files = list_celeba(root) if dataset == "celeba" else list_pictures(root)
        return decode(files, size), None
    data = torchvision_set(known["torchvision"], root)
    pixels, labels = torch.as_tensor(data.data), torch.as_tensor(data.targets)
    pixels = pixels[:, None] if pixels.dim() == 3 else pixels.movedim(3, 1)  # (N, C, H, W)
    return pixels.contiguous(), labels


BY_HAND = dict(  # what to do if a download fails: for CelebA, Google's quota often refuses it
    MNIST="{} takes the four *-ubyte.gz of its page into MNIST/raw",
    CIFAR10="{} takes cifar-10-python.tar.gz of its page",
    CelebA="{}/celeba takes img_align_celeba.zip, list_eval_partition.txt, identity_CelebA.txt and "
    "list_attr, list_bbox and list_landmarks_align_celeba.txt of its page",
)


def torchvision_set(name, root, **options):
    """Open one of torchvision's sets, downloaded if need be."""
    from torchvision import datasets

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds that a host may be silent
    try:
        return getattr(datasets, name)(root, download=True, **options)
    except Exception as error:  # each host, and each torn file, fails in its own way
        raise BadInput(
            f"{name} in {root} is missing or damaged and could not be downloaded "
            f"({shorten(error)}): remove what is damaged or download by hand; "
            f"{BY_HAND[name].format(root)}"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def list_celeba(root):
    """List the files of CelebA's training split."""
    folder = Path(root) / "celeba" / "img_align_celeba"
    packed, aside = folder.with_suffix(".zip"), folder.with_name("unpacking")
    if packed.is_file() and not folder.exists():
        print(f"unpacking {packed}, once")
        with reading(packed):
            shutil.unpack_archive(packed, aside)
            next(aside.rglob("*.jpg")).parent.rename(folder)
    names = torchvision_set("CelebA", root, split="train").filename
    places = [place for place in (folder, folder / folder.name) if (place / names[0]).is_file()]
    if not places:
        raise BadInput(f"{folder} lacks {names[0]}: the pictures belong into it")
    return [places[0] / name for name in names]


def list_pictures(root):
    """List the pictures in all folders below root except hidden ones; linked folders count.

    Raises BadInput where there are none, or a folder cannot be read.
    """
    from PIL import Image

    def refuse(error):
        raise BadInput(f"cannot read {error.filename!r} ({error.strerror}): give another folder")

    files, seen = [], set()
    for folder, deeper, names in os.walk(root, followlinks=True, onerror=refuse):
        if (place := os.path.realpath(folder)) in seen:  # a link led back
            deeper.clear()
            continue
        seen.add(place)
        deeper[:] = sorted(name for name in deeper if not name.startswith((".", "__")))
        paths = [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
        files += [path for path in paths if path.is_file()]  # no pipes: reading one blocks
    known = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    pictures = [path for path in files if path.suffix.lower() in known]
    if not pictures:
        raise BadInput(f"no pictures under {str(root)!r}: give a folder that holds some")
    if other := {path.suffix or path.name for path in set(files) - set(pictures)}:
        print_once(f"no pictures, left out: {', '.join(sorted(other))}")
    return pictures


def decode(files, size):
    """Decode pictures by threads, once, into a file of the cache: a mapped uint8 (N, 3, s, s).

    Raises BadInput where more than 1% of them are unreadable.
    """
    found = [(str(path.absolute()), path.stat()) for path in files if path.exists()]
    found = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in found]  # not others' pixels
    name = hashlib.sha256(repr(found).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    kept, bad = CACHE / f"{name}-{size}.uint8", []
    if not kept.exists():
        print(f"decoding pictures, once, into {kept}")
        with replacing(kept) as aside, aside.open("wb") as file, ThreadPool() as pool:
            pixels = pool.imap(partial(decode_picture, size=size), files, 16)
            for path, some in zip(files, tqdm(pixels, "decoding", len(files)), strict=True):
                bad += [path] if some is None else []
                file.write(some or b"")
            if bad:
                print(f"unreadable: {len(bad):,} of {len(files):,} pictures, such as {bad[0]}")
            if len(bad) > 0.01 * len(files):
                raise BadInput("more than 1% of the pictures are unreadable: mend or remove them")
    pixels = torch.from_file(str(kept), size=kept.stat().st_size, dtype=torch.uint8)
    return pixels.view(-1, 3, size, size)


def decode_picture(path, size):
    """Decode a file as RGB, cropped and resized: the bytes of (3, size, size), None if it fails."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture)  # a camera that was held upright
            if picture.mode == "F":
                return None  # nobody knows which number is white
            if picture.mode.startswith("I"):  # up to 16 bits, of which PIL would cut off the upper
                grey = np.asarray(picture).astype(np.int64)
                span = 4095 if grey.max() < 4096 else 65535  # 12 bits are kept in 16, too
                picture = Image.fromarray((grey * 255 // span).clip(0, 255).astype(np.uint8))
            if picture.has_transparency_data:  # what shines through is white
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture.convert("RGBA"))
            picture = ImageOps.fit(picture.convert("RGB"), (size, size), Image.BILINEAR)
    except Exception:  # PIL refuses a file in many ways
        return None
    return np.moveaxis(np.asarray(picture), 2, 0).tobytes()


def open_data_set(dataset, root, size, memory):
    """Load a data set as one uint8 tensor, on the device if it takes `memory` GiB or less."""
    pixels = load_images(dataset, root, size)[0]
    return pixels.to(device()) if pixels.numel() <= memory * 2**30 else pixels


def first_of(images, most, numbers=2**28):
    """Take the first `most` of images (N, C, H, W), or as many as have `numbers` entries in all."""
    return images[: min(most, numbers // images[0].numel())]


def to_network_space(images):
    """Bring uint8 pictures into [-1, 1], where the network works; floats are there already."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()


def to_pictures(x):
    """Map network space [-1, 1] to pictures in [0, 1]."""
    return ((x + 1) / 2).clamp(0, 1)


# %%
if __name__ == "__main__":
    pixels, labels = load_images(dataset, root)
    title = f"{dataset}: the first 64 of {len(pixels):,}, uint8 {tuple(pixels.shape)}"
    show_images([pixels[:64] / 255], [title], "figures/00_data.png")

# %% [markdown]
# ## Device and processes
#
# A GPU that supports bfloat16 computes in it (*autocast*), with the channels last in memory. Under
# `torchrun` every process runs the same file. Only the first one prints and writes.


# %%
def half_precision(device):
    """Return a context that computes in bfloat16 where the hardware is made for it."""
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast("cuda", torch.bfloat16, enabled=able)


def move_to_device(model):
    """Move a module to the device, with the channels last in memory, as convolutions like it."""
    return model.to(device(), memory_format=torch.channels_last)


class Replayed:
    """Call work(key, *tensors), which returns a tensor; where `on` and on a GPU, replay it.

    What a call gives the GPU to do is recorded as a CUDA graph, once for each key, shapes and
    types, and then started in one go. So `work` must not look into a tensor, and what changes
    between calls of a key has to come in tensors. The first calls (`first`, and each key's first)
    run as they are: there cuDNN chooses its algorithms, Adam makes its moments, and memory is freed
    before graphs, which share theirs, take it up. Dropout draws anew: torch sees to that.
    """

    def __init__(self, work, on, first=0):
        self.work, self.on = work, on and device().type == "cuda"
        self.first, self.seen, self.graphs = first, set(), {}
        if self.on:
            self.side, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, key, *tensors):
        if not self.on:
            return self.work(key, *tensors)
        kind, here = (key, *((x.shape, x.dtype) for x in tensors)), torch.cuda.current_stream()
        self.first -= 1
        if kind not in self.seen or self.first >= 0:
            self.seen.add(kind)
            self.side.wait_stream(here)
            with torch.cuda.stream(self.side):  # autograd keeps to the stream that it began on
                found = self.work(key, *tensors)
            here.wait_stream(self.side)
            return found
        if kind not in self.graphs:
            graph, held = torch.cuda.CUDAGraph(), [x.clone() for x in tensors]
            with torch.cuda.graph(graph, self.pool, self.side):
                self.graphs[kind] = graph, held, self.work(key, *held)
        graph, held, found = self.graphs[kind]
        for own, x in zip(held, tensors, strict=True):
            own.copy_(x)
        graph.replay()
        return found.clone()  # the next replay writes there


def ranks():
    """Tell which process this is, of how many: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def print_once(*lines):
    """Print, but only in the first of several processes."""
    if ranks()[0] == 0:
        print(*lines, sep="\n")


def join_processes():
    """Prepare for long work: fast convolutions, and the other processes of torchrun, if any."""
    torch.backends.cudnn.benchmark = torch.cuda.is_available()  # try its algorithms, take the best
    if os.environ.get("WORLD_SIZE", "1") != "1":
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        patient = datetime.timedelta(hours=12)  # one may have to wait for another that downloads
        kind = "nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(kind, timeout=patient)
        except (ValueError, RuntimeError) as error:
            raise BadInput(
                f"processes do not find each other ({shorten(error)}): use torchrun"
            ) from None
        atexit.register(dist.destroy_process_group)


@contextmanager
def first_process_first():
    """Let the first process go ahead, for example to download, and the others follow."""
    rank, world = ranks()
    if rank > 0:
        try:
            dist.barrier()
        except RuntimeError:  # the first has ended, and has said why
            sys.exit(2)
    yield
    if world > 1 and rank == 0:
        dist.barrier()


# %% [markdown]
# Which pictures a step sees follows from the seed and the step alone. So a run that was interrupted
# goes on as if nothing had happened, and several processes agree without asking each other: each
# takes its own part of the same batch.


# %%
def step_generator(seed, step):
    """Make shared random numbers; a step n takes 2 n for its pictures and 2 n + 1 for its stage."""
    return torch.Generator().manual_seed(2_000_003 * seed + step)


def picked_in_step(n, batch, seed, step):
    """Pick which of n pictures a step sees, in all processes: (batch,) int64."""
    return torch.randint(n, (batch,), generator=step_generator(seed, 2 * step))


# %% [markdown]
# ## A run on disk
#
# `runs/<name>/` holds `settings.json`, `metrics.jsonl` (one line for each log step), grids of
# samples, and `checkpoint.pt`, which has everything that training changes. A folder is locked while
# a process writes into it, and the lock ends with that process.


# %%
LOCKS = {}  # of the folders that this process writes into; a lock that is dropped opens


def run_folder(out, name):
    """Tell where the run of a name lies. Raises BadInput for a name that leads out of `out`."""
    if Path(name).is_absolute() or {"", ".", ".."} & set(name.split("/")):
        raise BadInput(f"name = {name!r} must be the name of a folder in {out}, such as my-run")
    return Path(out) / name


def claim_folder(folder, resume):
    """Make and lock a run's folder, else BadInput; an earlier run is kept as `folder`.1, `.2`, …"""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = LOCKS.setdefault(folder.resolve(), filelock.FileLock(f"{folder.resolve()}.lock"))
        lock.acquire(blocking=False)
        left = [name for name in ("checkpoint.pt", "autoencoder.pt") if (folder / name).exists()]
        if left and not resume:
            n = next(n for n in range(1, 10_000) if not Path(f"{folder}.{n}").exists())
            folder.rename(f"{folder}.{n}")
            print(f"an earlier run is kept as {folder}.{n}")
            folder.mkdir()
    except filelock.Timeout:
        raise BadInput(f"another process is training in {folder}: give this run a --name") from None
    except OSError as error:
        raise BadInput(
            f"cannot write to {folder} ({error.strerror}): give another --out"
        ) from error


def check_same_settings(asked, old, folder):
    """Raise BadInput where a resumed run gets other pictures or settings; steps may differ."""
    if asked.get("pictures") != old.get("pictures"):
        raise BadInput(f"{folder} was trained on other pictures: give the --root that it had")
    for key in sorted(set(asked) - {"steps", "root"}):
        was, now = old.get(key), asked[key]
        if (was or None) != (now or None):  # one that is missing counts as empty
            what = "a learning rate of zero at step" if key == "decay" else f"{key} ="
            raise BadInput(
                f"{folder} was made with {what} {was!r}, not {now!r}: give another --name"
            )


# %%
@contextmanager
def reading(what):
    """Say in one sentence what goes wrong while a file (a run's, for example) is read."""
    try:
        yield
    except (BadInput, MemoryError, torch.OutOfMemoryError):
        raise
    except FileNotFoundError:
        raise BadInput(f"there is no {what}: train or make it first") from None
    except Exception as error:  # a broken or foreign file fails in many ways
        reason = f"it has no {error}" if isinstance(error, KeyError) else shorten(error)
        raise BadInput(f"{what} is damaged or does not fit ({reason}): give another") from error


def write_checkpoint(content, folder, name="checkpoint.pt"):
    """Write a file of tensors whole or not at all."""
    with replacing(Path(folder) / name) as aside:
        torch.save(content, aside)


def read_checkpoint(folder, name="checkpoint.pt"):
    """Read a checkpoint onto the CPU, as tensors and never as code. Raises BadInput without one.

    If a folder like runs/pretrained/NAME has none, it stands for weights that come with the
    project. pretrained/export.py wrote them, without the state of the training.
    """
    path, kept = Path(folder) / name, ROOT / "pretrained" / f"{Path(folder).name}.safetensors"
    if path.is_file() or Path(folder).parent.name != "pretrained" or not kept.is_file():
        with reading(path):
            return torch.load(path, map_location="cpu", weights_only=True)
    from safetensors import safe_open

    with reading(kept), safe_open(kept, "pt") as file:
        about = {key: json.loads(value) for key, value in file.metadata().items()}
        return {**about, "ema": {key: file.get_tensor(key) for key in file.keys()}}


def fingerprint(*tensors):
    """Identify tensors by their content: 16 hexadecimal digits of a hash of shapes and bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


# %%
def pack(state):
    """Turn what a training changes, a dictionary, into one that `torch.save` can keep."""
    kept = {key: value for key, value in state.items() if key != "forward"}
    for key, value in kept.items():
        if isinstance(value, torch.Generator):
            kept[key] = value.get_state()
        elif hasattr(value, "state_dict"):
            kept[key] = value.state_dict()
    rng = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {**kept, "torch_rng": torch.get_rng_state(), "cuda_rng": rng}  # dropout draws from them


def unpack(state, content):
    """Put what `pack` kept back into a fresh state. Raises BadInput where it does not fit."""
    with reading("the checkpoint"):
        for key in content.keys() - {"settings", "torch_rng", "cuda_rng"}:
            known, value = state.get(key), content[key]
            if hasattr(known, "load_state_dict"):
                known.load_state_dict(value)
            elif not isinstance(known, torch.Generator):
                state[key] = value if known is None else type(known)(value)
            elif len(value) == len(known.get_state()):
                known.set_state(value)
            else:
                print_once("saved on another kind of device: going on with other random numbers")
                known.manual_seed(1_000_003 * state["seed"] + content["step"])
        for weight, moments in state["optimizer"].state.items():
            for name in ("exp_avg", "exp_avg_sq"):  # to lie as the weight does, for fused Adam
                moments[name] = torch.empty_like(weight).copy_(moments[name])
        torch.set_rng_state(content["torch_rng"])
        if torch.cuda.is_available() and content["cuda_rng"] is not None:
            torch.cuda.set_rng_state(content["cuda_rng"])


# %% [markdown]
# ## The loop that keeps a training
#
# A training is a generator: it yields after every step and knows nothing of progress bars and
# files. This loop runs any training, logs a row after every fortieth of the steps, and saves. On
# Ctrl-C or a scheduler's SIGTERM it finishes the step before it stops.


# %%
def read_log(folder, file="metrics.jsonl"):
    """Read a run's log as a list of dictionaries."""
    path = Path(folder) / file
    with reading(path):
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # not a torn one
        return [row for row in rows if isinstance(row.get("step"), int)]  # nor anybody else's


def keep_training(loop, state, steps, log, summarize, save, after=None, save_every=0, desc=""):
    """Run a training to its end, and return True; a signal lets it save and end the process.

    loop: yields (step, {name: number}) after every step; state: its "step" is where it begins. log:
    a file of JSON lines, for which summarize(recent) makes a row of the numbers of some steps.
    save(numbers): writes a checkpoint, every `save_every` steps or, if that is 0, every ten
    minutes. after(step): what else the first process does.
    """
    (rank, world), every, begin = ranks(), max(1, steps // 40), state["step"]
    recent, stop, last = [], [0], time.monotonic()
    if rank == 0:  # keep what the log has up to this step
        old = [json.dumps(row) + "\n" for row in read_log(log.parent, log.name)]
        with replacing(log) as aside:
            aside.write_text("".join(row for row in old if json.loads(row)["step"] <= begin))
    main = threading.current_thread() is threading.main_thread()  # which alone may take signals
    note, caught = lambda number, _: stop.append(number), SIGNALS if main else []
    before = {kind: signal.signal(kind, note) for kind in caught}
    try:
        bar = tqdm(loop, desc, steps, initial=begin, disable=rank > 0)
        for step, numbers in bar:
            recent.append(numbers)
            if step % every == 0 or step == steps:
                row, recent = summarize(recent), []
                bar.set_postfix({k: f"{v:.4g}" for k, v in row.items() if k.startswith("loss")})
                if rank == 0:
                    with log.open("a", encoding="utf-8") as lines:
                        lines.write(json.dumps(dict(step=step, **row)) + "\n")
            halt = stop[-1]
            if world > 1:  # all stop in the same step; they ask each other every tenth
                halt = torch.tensor(halt * (step % 10 == 0), device=device())
                dist.all_reduce(halt, dist.ReduceOp.MAX) if step % 10 == 0 else None
            due = step % save_every == 0 if save_every else time.monotonic() - last > 600
            if due or halt or step == steps:
                save(numbers)
                begin, last = step, time.monotonic()
            if rank == 0 and after:
                after(step)
            if halt and step < steps:
                print_once(f"saved at step {step:,}: the same command with --resume goes on")
                sys.exit(128 + int(halt))
        if begin < state["step"]:  # it ended by itself
            save(numbers)
        return True
    except OSError:  # for example because the terminal is gone
        if begin < state["step"]:
            save(numbers)
        raise
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


# %% [markdown]
# **You have seen** the tools. The lessons begin with step 01.
