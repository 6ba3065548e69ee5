# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 00 · The workshop
#
# The six lessons need some machinery that teaches nothing about diffusion models: settings from the
# shell, pictures from disk, checkpoints that survive a power cut, several processes. It lives here,
# so that the lessons can be short. **Begin with step 01**, and come here when you want to know how
# something is done, or to add a data set (one entry of `DATASETS`).
#
# The rule of admission: *what stands here holds no equation of the paper, serves at least two
# steps, and imports no step.* (A test keeps to it.)

# %%
import builtins
import os
import signal
import sys

NOTEBOOK = hasattr(builtins, "get_ipython")  # true in a notebook's kernel, false in a script
SPINS = "1000"  # turns of an idle thread before it sleeps; OpenMP's own default is 300,000


def is_lesson():
    """Tell whether a step shows its lesson: in a notebook, and as a script without a flag."""
    return NOTEBOOK or (len(sys.argv) == 1 and "RANK" not in os.environ)


def let_idle_threads_sleep():
    """Let idle threads of processes that load torch from now on sleep soon, unless the user chose.

    Two OpenMP threads that spin while they wait for each other stall as soon as another process
    takes one of their cores.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


def prepare_script():
    """Ready the process of a step that runs as a script, if it does; returns whether that is so.

    A signal ends it quietly with status 130 or 143, and what waits in a `finally` is done. All
    steps import this one first.
    """
    main = os.path.realpath(getattr(sys.modules["__main__"], "__file__", ""))
    folder, name = os.path.split(main)
    step = name[:1] + name[2:3] == "0_" and not NOTEBOOK
    if not step or folder != os.path.dirname(os.path.realpath(__file__)):
        return False  # a step that is imported as a library leaves the process as it is
    let_idle_threads_sleep()
    for kind in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(kind) != signal.SIG_IGN:  # as a shell's background job has it
            signal.signal(kind, lambda number, _: sys.exit(128 + number))
    return True


SCRIPT = prepare_script()  # before all that takes a while to load

import argparse
import ast
import datetime
import importlib.metadata
import json
import platform
import re
import socket
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where two runs under one name are not told apart
    fcntl = None

if __name__ == "__main__" and os.path.basename(os.getcwd()) == "notebooks":
    os.chdir("..")  # a notebook that was opened where it lies
ROOT = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()

# %% [markdown]
# ## Errors, and what this machine has
#
# What a user can mend is a `BadInput`: a script prints its one sentence and exits with status 2.
# Everything else is a bug and keeps its trace.


# %%
class BadInput(ValueError):
    """Say in one sentence what is wrong with what the user gave, and the way out."""


def replace_unprintable():
    """Print a question mark in place of what the terminal's encoding lacks, such as a ×."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")


def report_bad_input(kind, error, trace):
    """Report what a user can mend in one line with exit status 2; leave real bugs their trace."""
    if issubclass(kind, RuntimeError) and is_out_of_memory(error):
        error = used_up(error, "end what else uses it, or ask for less, as by --batch or --memory")
    elif not issubclass(kind, BadInput):
        return sys.__excepthook__(kind, error, trace)
    exit_with(error)


def exit_with(message):
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


if SCRIPT:
    replace_unprintable()
    sys.excepthook = report_bad_input


# %%
def describe_environment():
    """Describe this machine: (lines to print, whether everything required is there and fits)."""
    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    complete = True
    required = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    for name in re.findall(r"^([\w-]+)", required, re.MULTILINE):
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} MISSING: pip install -r requirements.txt -c constraints.txt")
            complete = False
    try:
        import psutil
        import torch
        import torchvision  # noqa: F401 - fails to load beside a torch it was not built for

        free = f"{psutil.virtual_memory().available / 2**30:.1f} GiB of memory free"
        lines.append(f"device {device()}, {torch.get_num_threads()} threads, {free}")
        if torch.cuda.is_available():
            lines.append(f"{torch.cuda.mem_get_info()[0] / 2**30:.1f} GiB free on the GPU")
    except Exception as error:  # whatever it is, the reader should see it in one line
        lines.append(f"torch DOES NOT LOAD ({error}): install the versions of constraints.txt")
        complete = False
    return lines, complete


def device():
    """Return the torch device that the steps run on: the first CUDA GPU, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# %% [markdown]
# ## Settings
#
# A step keeps its settings in one cell tagged `parameters`. `settings` makes flags of them when the
# file runs as a script; in a notebook the cell itself is what you edit, and what papermill
# overrides. The comment of a number ends with its range, which is checked in all three cases.


# %%
def read_parameters(step):
    """Read the `parameters` cell of a step: a list of (name, default, comment)."""
    text = (ROOT / f"{step}.py").read_text(encoding="utf-8")
    cell = text.split('# %% tags=["parameters"]\n')[1].split("# %%")[0]
    entries = re.findall(r"^(\w+) = (.+?)  # (.+)$", cell, re.MULTILINE)
    return [(name, ast.literal_eval(value), comment) for name, value, comment in entries]


def settings(namespace, step):
    """Let the `parameters` cell of `step` be set from the shell, papermill or the cell itself.

    namespace: the step's `globals()`. As a script every assignment of the cell becomes a flag: its
    value is the default and the type, its comment the help, which ends with a number's range. In a
    notebook the values are only checked (papermill hands over whatever was typed).
    An unknown name, a value of the wrong type or out of its range exits with status 2, in a
    notebook as `BadInput`.
    """
    if namespace["__name__"] != "__main__":
        return
    known = read_parameters(step)
    if NOTEBOOK:  # papermill's own cell may hold names that no parameter has
        injected = [source for source in namespace["In"] if source.startswith("# Parameters\n")]
        for name in re.findall(r"^(\w+) =", "\n".join(injected), re.MULTILINE):
            if name not in (names := [name for name, _, _ in known]):
                raise BadInput(f"unknown parameter {name!r}: take one of {', '.join(names)}")
    else:
        parser = argparse.ArgumentParser(f"{step}.py", usage="%(prog)s [flags]", allow_abbrev=False)
        parser.error = lambda message: exit_with(f"{message} (--help lists the flags)")
        for name, default, comment in known:
            kind = type(default)
            how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind)
            text = f"{comment} (default: {default!r})".replace("%", "%%")
            parser.add_argument(f"--{name}", default=default, help=text, **how)
        namespace.update(vars(parser.parse_args()))
    for name, default, comment in known:
        namespace[name] = check_value(name, namespace[name], type(default), comment)


def check_value(name, value, kind, comment):
    """Bring a parameter's value to its kind (bool, int, float or str), within its range.

    comment: ends with the range of a number, as in "pictures to draw [1, 100]" or "[0, 1)".
    Raises BadInput for a value that is of another kind, or outside.
    """
    wrong = BadInput(
        f"{name} = {value!r} is no {kind.__name__}" + ": give True or False" * (kind is bool)
    )
    if value is None or isinstance(value, bool) != (kind is bool):
        raise wrong
    try:
        found = kind(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None
    if kind is int and isinstance(value, float) and found != value:
        raise wrong
    limits = re.search(r"([\[(])(\S+), (\S+)([\])])$", comment)
    if limits and kind is not str:
        low, high = float(limits[2]), float(limits[3])
        above = found > low if limits[1] == "(" else found >= low
        below = found < high if limits[4] == ")" else found <= high
        if not (above and below):  # so that nan is refused as well
            raise BadInput(f"{name} = {found} must lie in {limits[0]}")
    return found


# %% tags=["parameters"]
dataset = "digits"  # the data set that is shown, one of DATASETS below
root = "data"  # where the data set lies or is downloaded to
check = False  # print versions, device, threads, free memory and what is missing, then stop

# %%
settings(globals(), "00_workshop")
if __name__ == "__main__":
    report, complete = describe_environment()
    print("\n".join(report))
    if check and not NOTEBOOK:
        sys.exit(0 if complete else 1)

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

# %% [markdown]
# ## Files
#
# Files are written aside and renamed, so that nobody ever reads half of one. Figures go through
# `show_figure`: into a PNG always, and on the page as well when this is a notebook.


# %%
@contextmanager
def replacing(path):
    """Give a path to write to and rename it to `path` once it is whole.

    Raises BadInput where the file cannot be written: no such place, no permission, disk full.
    """
    path = Path(path)
    aside = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        os.replace(aside, path)
    except OSError as error:
        reason = error.strerror or error
        raise BadInput(f"cannot write {path} ({reason}): choose another place") from error
    finally:
        if os.path.isfile(aside):  # False, too, for a name that is too long
            aside.unlink()


def write_json(content, path):
    """Write a dictionary to a file. Raises BadInput where it cannot be written."""
    with replacing(path) as aside:
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        # the name of a run may have letters that the locale lacks: they keep their bytes
        aside.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_tensors(content, path):
    """Save tensors as the file `path`. Raises OSError on a full disk, unlike torch."""
    try:
        torch.save(content, path)
    except RuntimeError as error:
        raise OSError(f"{str(error).splitlines()[0]}; is the disk full?") from error


def open_shard(path, shape, kind):
    """Open a file of arrays (n, *shape) of a numpy kind, without reading it.

    Returns None where there is none, or, which is said, one that is torn or holds something else.
    """
    if not os.path.exists(path):  # which its name may be too long for
        return None
    try:
        found = np.load(path, mmap_mode="r")
    except Exception:  # a torn file fails in many ways
        found = np.empty(0)
    if len(found) and found.shape[1:] == tuple(shape) and found.dtype == kind:
        return found
    print_once(f"{path} is torn or holds something else: it is made again")
    return None


# %%
def show_figure(path):
    """Save the current matplotlib figure as `path` and, in a notebook, put it on the page."""
    with replacing(path) as aside:
        plt.savefig(aside, dpi=110, bbox_inches="tight", format="png")
    if NOTEBOOK:
        plt.show()
    else:
        print(f"figure: {path}")
    plt.close()


def tile_images(images, columns=16, scale=0):
    """Arrange images (N, C, H, W), floats in [0, 1], as one spaced and enlarged (C, H', W')."""
    scale, columns = scale or max(1, 48 // images.shape[-1]), min(columns, len(images))
    big = images.clamp(0, 1).repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    big = big.expand(-1, max(3, big.shape[1]), -1, -1)  # grey is a colour
    big = torch.cat([big, big.new_ones(-len(big) % columns, *big.shape[1:])])
    # what torchvision's make_grid does, which takes seconds to import; (rows, columns, C, h, w):
    big = F.pad(big, (6, 0, 6, 0), value=1.0).unflatten(0, (-1, columns))
    big = big.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return F.pad(big, (0, 6, 0, 6), value=1.0)


def show_images(rows, titles, path, columns=16, labels=None):
    """Draw titled grids of images under each other: `rows` is a list of (n, C, H, W) in [0, 1].

    labels: words that stand over the columns of the first grid, such as times.
    """
    grids = [tile_images(row.detach().cpu().float(), columns) for row in rows]
    height = sum(grid.shape[1] for grid in grids) / grids[0].shape[2] * 10 + 0.35 * len(rows)
    figure, axes = plt.subplots(len(rows), 1, figsize=(10, height), squeeze=False)
    for ax, grid, title in zip(axes[:, 0], grids, titles, strict=True):
        ax.imshow(grid.permute(1, 2, 0), interpolation="nearest")
        # the name of a run may have letters that the locale lacks: their bytes stand for them
        title = title.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
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
# All that the steps decide by the data set stands here, so a new one is one more entry:
#
# | key | meaning |
# |---|---|
# | `shape` | of a picture, (C, H, W); without one `--size` decides, and pictures are in colour |
# | `read` | function of `--root` to (uint8 (N, C, H, W), labels) |
# | `torchvision`, `place` | in its place: torchvision's class, and where its files lie below `--root` |
# | `judge` | "digits": measured by a classifier of its ten labels (step 05); none: by Inception |
# | `network`, `recipe` | steps 03, 04: a small network, how long to train and how; none: the paper's |
# | `autoencoder`, `latent_network`, `latent_recipe` | the same for step 06 |
#
# The paper's recipe is for 450,000 steps of its own network on a GPU. `digits` and `mnist` get
# small networks, which a laptop trains in minutes or an hour; for colour pictures on little hardware
# there is `--network cifar10`. Widths follow the paper's choice (encoder 128, decoders 192, 128,
# 16). A recipe may name narrower ones, and ways of training that step 04 explains (`PAPERS_WAY`).


# %%
def read_digits(root):
    """Read scikit-learn's digits, which lie in no folder: (uint8 (1797, 1, 8, 8), labels)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.tensor(data.images / 16 * 255).round().to(torch.uint8)  # 17 grey levels
    return pixels[:, None], torch.tensor(data.target)


PAPER = dict(steps=450_000, batch=128, lr=2e-4, warmup=5000, flip=True)
# latent diffusion's for CelebA-HQ (Rombach et al. 2022, Appendix E), 500,000 steps as in the paper;
# how long to train its autoencoder, which it loads, is our guess
PAPER_LATENT = dict(code_steps=300_000, code_batch=8, code_lr=4e-5, perceptual=1.0)
PAPER_LATENT |= dict(adversarial=0.75, steps=500_000, batch=48, lr=9.6e-5, warmup=1)
VQ_F4 = dict(kind="vq", channels=3, code=3, width=128, mults=(1, 2, 4), blocks=2, entries=8192)
SMALL = dict(kind="kl", channels=1, code=2, width=16, mults=(1, 2), blocks=1, entries=256)
PUBLISHED = dict(recipe=PAPER, autoencoder=VQ_F4, latent_recipe=PAPER_LATENT)
WIDTHS, NO_JUDGES = dict(encoder=32, decoders=(48, 32, 16)), dict(perceptual=0.0, adversarial=0.0)
# not the paper's, but what helped in minutes (RESULTS.md), with one decoder as with three
FOUND = dict(stages="mixed", times="stages", weight="min-snr", decay="linear")

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
        latent_recipe=dict(code_steps=600, code_batch=64, code_lr=2e-3, **NO_JUDGES, **FOUND)
        | dict(steps=1200, batch=64, lr=6e-3, warmup=100, encoder=16, times="uniform"),
    ),
    "mnist": dict(
        shape=(1, 28, 28),
        torchvision="MNIST",
        place="MNIST/raw",
        judge="digits",
        network=dict(**WIDTHS, mults=(1, 2, 2)),
        recipe=dict(steps=10_000, batch=128, lr=1e-3, warmup=500, flip=False),
        autoencoder=SMALL,
        latent_network=dict(**WIDTHS, attention=(7,)),
        latent_recipe=dict(code_steps=800, code_batch=64, code_lr=2e-3, **NO_JUDGES)
        | dict(steps=1500, batch=64, lr=2e-3, warmup=100),
    ),
    "cifar10": dict(
        shape=(3, 32, 32),
        torchvision="CIFAR10",
        place="cifar-10-batches-py",
        network=dict(encoder=64, decoders=(96, 64, 16), mults=(1, 2, 2), blocks=2)
        | dict(attention=(16,), dropout=0.1),
        recipe=PAPER,
        autoencoder={**SMALL, "channels": 3, "code": 4, "width": 64},
        latent_network=dict(encoder=64, decoders=(96, 64, 16), blocks=2, attention=(8,)),
        latent_recipe=dict(code_steps=20_000, code_batch=64, code_lr=5e-4, perceptual=1.0)
        | dict(adversarial=0.75, steps=100_000, batch=128, lr=5e-4, warmup=1000),
    ),
    "celeba": dict(torchvision="CelebA", place="celeba", **PUBLISHED),
    "folder": PUBLISHED,
}


def about(dataset):
    """Return the entry of DATASETS. Raises BadInput for an unknown data set."""
    if dataset not in DATASETS:
        known = " or ".join([", ".join([*DATASETS][:-1]), [*DATASETS][-1]])
        raise BadInput(f"unknown dataset {dataset!r}: take {known}")
    return DATASETS[dataset]


# %%
def load_images(dataset="digits", root="data", size=32):
    """Load a data set as (images uint8 (N, C, H, W), labels int64 (N,) or None).

    size: the side in pixels for sets without a shape of their own (centre crop, then antialiased
    resize). Raises BadInput where the set is unknown, damaged or not to be had.
    """
    known = about(dataset)
    if "read" in known:
        return known["read"](root)
    if "shape" not in known:
        return read_pictures(open_picture_files(dataset, root, size)), None
    data, shape = _torchvision_set(dataset, root), known["shape"]
    pixels, labels = torch.as_tensor(data.data), torch.as_tensor(data.targets)
    pixels = pixels[:, None] if pixels.dim() == 3 else pixels.movedim(3, 1)  # (N, C, H, W)
    if pixels.shape[1:] != shape or not 0 < len(pixels) == len(labels) or labels.max() > 9:
        found = f"{tuple(pixels.shape)} pictures and {len(labels)} labels"
        raise _damaged(dataset, root, f"its files hold {found}")
    return pixels.contiguous(), labels


def _torchvision_set(dataset, root, **options):
    from torchvision import datasets

    name, place = DATASETS[dataset]["torchvision"], Path(root) / DATASETS[dataset]["place"]
    kind = getattr(datasets, name)
    try:
        return kind(root, download=False, **options)
    except Exception as error:  # torn files make torchvision fail in many ways
        missing = isinstance(error, RuntimeError) and str(error).startswith("Dataset")
        if os.path.exists(place) and not missing:
            raise _damaged(dataset, root, shorten(error)) from error
    if os.path.exists(root) and not os.path.isdir(root):
        raise BadInput(f"{root} is no folder: give --root one that holds {name} or can take it")
    state = f"{name} is not in {root}"
    if os.path.exists(place):
        state = f"{name} in {place} is damaged or incomplete"
    print(f"{state}: downloading it")
    try:
        with limit_downloads():
            return kind(root, download=True, **options)
    except Exception as error:  # each host fails in its own way
        raise BadInput(
            f"{state} and could not be downloaded ({shorten(error)}): put its files there as "
            f"torchvision.datasets.{name} documents, or give --root"
        ) from error


def _damaged(dataset, root, reason):
    place = Path(root) / DATASETS[dataset]["place"]
    return BadInput(f"{place} is damaged ({reason}): remove it, and it is downloaded again")


PATIENCE = 30  # seconds without a byte after which a download has failed


@contextmanager
def limit_downloads():
    """Let downloads fail, in place of waiting for ever, where a host is silent for PATIENCE s."""
    import requests  # what gdown fetches CelebA with: it does not heed the sockets' default

    adapter, before = requests.adapters.HTTPAdapter, socket.getdefaulttimeout()
    send = adapter.send
    adapter.send = lambda *args, timeout=None, **how: send(
        *args, timeout=PATIENCE if timeout is None else timeout, **how
    )
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
        adapter.send = send


def shorten(error):
    """Say on one line and in short what an exception of someone else's code says."""
    return " ".join(str(error).split())[:150] or type(error).__name__


# %%
if __name__ == "__main__":
    pixels, labels = load_images(dataset, root)
    title = f"{dataset}: the first 64 of {len(pixels):,}, uint8 {tuple(pixels.shape)}"
    show_images([pixels[:64] / 255], [title], "figures/00_data.png")

# %% [markdown]
# Pictures are uint8 tensors (N, C, H, W). The kernels of steps 01 and 02 want floats in [0, 1],
# networks want [−1, 1]:


# %%
def to_network_space(images):
    """Bring uint8 pictures into [-1, 1], where the network works; floats are there already."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def to_pictures(x):
    """Map network space [-1, 1] to pictures in [0, 1]."""
    return ((x + 1) / 2).clamp(0, 1)


# %% [markdown]
# ### Pictures in files
#
# They are decoded by several processes. CelebA's 162,770 take minutes even so, and are therefore
# kept decoded, as one array beside the data. An unreadable file is named and skipped; more than 1%
# of them is an error.


# %%
def list_picture_files(dataset, root):
    """List the picture files of `celeba` (its training split) or of all folders below root.

    Raises BadInput where there are none, or a folder cannot be read.
    """
    from torchvision import datasets

    files = []
    if dataset == "celeba":
        folder = Path(root) / "celeba" / "img_align_celeba"
        names = _torchvision_set("celeba", root, split="train").filename
        files = [folder / name for name in names]
        there = {name for *_, some in os.walk(folder, onerror=_refuse_folder) for name in some}
        lost = [name for name in names if name not in there]
        if len(lost) > 0.01 * len(names):
            raise BadInput(
                f"{folder} lacks {len(lost):,} of {len(names):,} pictures, such as {lost[0]}: "
                "remove it, and it is unpacked again"
            )
    else:
        for folder, _, names in os.walk(root, onerror=_refuse_folder):
            files += [Path(folder) / name for name in names]
        files = sorted(p for p in files if p.suffix.lower() in datasets.folder.IMG_EXTENSIONS)
    if not files:
        raise BadInput(f"no pictures under {str(root)!r}: give a folder that holds some")
    return files


def _refuse_folder(error):
    raise BadInput(
        f"cannot read the folder {error.filename} ({error.strerror}): give one that can be read"
    ) from error


class PictureFiles:
    """Decode picture files when they are asked for: item i is uint8 (3, size, size).

    Centre crop, antialiased resize. An unreadable file gives None. kept: the file in which
    `read_pictures` keeps the decoded set; None: it does not. Raises BadInput for a size below 1.
    """

    def __init__(self, files, size, kept=None):
        from torchvision.transforms import v2

        if size < 1:
            raise BadInput(f"size = {size} must be 1 or more")
        self.files, self.size, self.kept = files, size, kept
        self.crop = v2.Compose(
            [v2.Resize(size, antialias=True), v2.CenterCrop(size), v2.PILToTensor()]
        )

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        try:
            return self.crop(open_picture(self.files[i]))
        except Exception:  # PIL refuses a file in many ways
            return None


def open_picture_files(dataset, root, size):
    """Open the pictures of `celeba` or `folder` as PictureFiles. Raises as `list_picture_files`."""
    kept = Path(root) / "celeba" / f"train-{size}.npy" if dataset == "celeba" else None
    return PictureFiles(list_picture_files(dataset, root), size, kept)


def open_picture(path):
    """Decode a picture file to a PIL image in RGB.

    Raises what PIL raises; what PIL only warns of, because it is suspiciously large, raises too.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as picture:
            if picture.mode == "F":
                raise ValueError("pixels that are no whole numbers have no known range")
            if picture.mode.startswith("I"):  # 16 bits, of which PIL's RGB would cut off the upper
                grey = np.clip(np.asarray(picture) / 257, 0, 255).round()
                return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
            return picture.convert("RGB")


# %%
def read_pictures(pictures, workers=0):
    """Read all of PictureFiles into one uint8 tensor (N, 3, size, size), without the unreadable.

    workers: processes that decode them; 0, or few pictures: this one does.
    Raises BadInput where more than 1% of the files are unreadable.
    """
    known = _read_kept(pictures) if pictures.kept else None
    pixels, bad = known or _decode(pictures, workers)
    for i in bad:
        print(f"unreadable, skipped: {pictures.files[i]}")
    report_unreadable([pictures.files[i] for i in bad], len(pictures))
    if pictures.kept and not known:
        _keep(pictures.kept, pixels, bad)
    return pixels


def _decode(pictures, workers):
    """Decode PictureFiles: (uint8 tensor without the unreadable, the indices of these)."""
    n, size = len(pictures), pictures.size
    pixels, good, bad, first = torch.empty(n, 3, size, size, dtype=torch.uint8), 0, [], 0
    loader = DataLoader(
        pictures,
        batch_size=max(1, min(64, 2**21 // (3 * size**2))),
        num_workers=min(workers, n // 200, os.cpu_count() or 1),
        collate_fn=_stack,
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator(),  # else it draws from the random numbers of everybody
    )
    with tqdm(total=n, desc="reading pictures", leave=False) as bar:
        for readable, some in loader:
            bad += [first + j for j, fine in enumerate(readable) if not fine]
            pixels[good : good + sum(readable)] = some
            good, first = good + sum(readable), first + len(readable)
            bar.update(len(readable))
    return pixels[:good], bad


def _stack(items):
    """Stack what is readable: ([whether each is], uint8 (n, 3, size, size))."""
    good = [picture for picture in items if picture is not None]
    return [picture is not None for picture in items], torch.stack(good) if good else 0


def ignore_interrupts(worker):
    """Leave signals to the main process, which ends its workers, and to it alone what it holds."""
    for kind in (signal.SIGINT, signal.SIGTERM):  # a terminal or a scheduler sends them to all
        signal.signal(kind, signal.SIG_IGN)
    for folder in list(LOCKED):
        unlock_folder(folder)


def _keep(path, pixels, bad):
    """Write a decoded set: two arrays in one file, the pixels and the indices of the unreadable."""
    try:
        with replacing(path) as aside, open(aside, "wb") as file:
            np.save(file, pixels.numpy())
            np.save(file, np.array(bad, dtype=np.int64))
        print(f"decoded pictures: kept as {path} for the next time")
    except BadInput as error:
        reason = shorten(error.__cause__)
        print(f"decoded pictures are not kept as {path} ({reason}): going on without")


def _read_kept(pictures):
    """Read what `_keep` wrote, as `_decode` gives it; None where there is none that fits."""
    if not os.path.isfile(pictures.kept):
        return None
    try:
        with open(pictures.kept, "rb") as file:
            pixels, bad = np.load(file), np.load(file).tolist()
        shape = (len(pictures) - len(bad), 3, pictures.size, pictures.size)
        if pixels.shape != shape or pixels.dtype != np.uint8:
            raise ValueError(f"{pixels.dtype} {pixels.shape} in place of uint8 {shape}")
        if any(pictures[i] is not None for i in bad):
            raise ValueError("a picture that was unreadable no longer is")
    except Exception as error:  # numpy fails in many ways on a torn or foreign file
        print(f"{pictures.kept} does not fit ({shorten(error)}): decoding the pictures again")
        return None
    return torch.from_numpy(pixels), bad


def report_unreadable(bad, total):
    """Print how many files were skipped. Raises BadInput where they are more than 1% of total."""
    if len(bad) > 0.01 * total:
        raise BadInput(
            f"{len(bad)} of {total:,} pictures are unreadable, which is more than 1%, "
            f"such as {bad[0]}: mend or remove them"
        )
    if bad:
        print(f"{len(bad)} of {total:,} pictures were unreadable and skipped")


def open_data_set(dataset, root, size, memory, workers=0):
    """Load a data set onto the device as uint8 (N, C, H, W), or open its files if it is large.

    memory: GiB that it may take; workers: processes that decode its files.
    """
    if "shape" in about(dataset):
        return load_images(dataset, root)[0].to(device())
    pictures = open_picture_files(dataset, root, size)
    large = len(pictures) * 3 * size**2 > memory * 2**30
    return pictures if large else read_pictures(pictures, workers).to(device())


# %% [markdown]
# ## Device and memory
#
# A GPU that can computes in bfloat16 (*autocast*), with the channels last in memory. What cannot
# fit is refused by estimate before it is tried; where memory runs out all the same, the sentence
# says what to do.


# %%
def half_precision(device):
    """Compute in bfloat16 where the hardware is made for it: a context."""
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast("cuda", torch.bfloat16, enabled=able)


def move_to_device(model):
    """Move a module to the device; on a GPU with the channels last, as its convolutions want it."""
    form = torch.channels_last if device().type == "cuda" else torch.preserve_format
    return model.to(device(), memory_format=form)


def check_memory(size, what):
    """Raise BadInput where `what` needs `size` bytes or more and this machine has not as many free.

    The size is a lower bound: what passes may still be too much, what is refused always is. A GPU
    is not asked: it refuses by itself, where a CPU's operating system would kill the process.
    """
    import psutil

    if device().type != "cpu":
        return
    free = psutil.virtual_memory().available
    if size > free:
        raise BadInput(
            f"{what} would take {size / 2**30:,.0f} GiB of memory or more, and "
            f"{free / 2**30:.1f} GiB are free: take fewer, or smaller ones"
        )


def is_out_of_memory(error):
    """Tell whether an error says that the memory of a GPU, or of this machine, is used up."""
    known = getattr(sys.modules.get("torch"), "OutOfMemoryError", ())  # it may not be loaded yet
    return isinstance(error, known) or "can't allocate memory" in str(error)


def used_up(error, way_out):
    """Make BadInput, with a way out, of torch's page about memory."""
    wanted = re.search(r"allocate ([\d.,]+ \w+)", str(error))
    wanted = f" (for {wanted[1]} more)" if wanted else ""
    whose = "GPU" if device().type == "cuda" else "machine"
    return BadInput(f"the memory of this {whose} is used up{wanted}: {way_out}")


@contextmanager
def enough_memory(way_out="give a smaller --batch"):
    """Say what to do where what is done within, or in the function below, runs out of memory.

    Raises BadInput with the way out in place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise used_up(error, way_out) from error


# %% [markdown]
# ## Processes
#
# Under `torchrun` every process runs the same file. The first one alone prints and writes.


# %%
def ranks():
    """Tell which process this is, of how many: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def print_once(*lines):
    """Print, but only in the first of several processes."""
    if ranks()[0] == 0:
        print(*lines, sep="\n")


def join_processes():
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


@contextmanager
def first_process_first():
    """Let the first process go ahead, such as to download, and the others follow."""
    rank, world = ranks()
    if rank > 0:
        dist.barrier()
    yield
    if world > 1 and rank == 0:
        dist.barrier()


# %% [markdown]
# ## Which pictures does a step see?
#
# That follows from the seed and the step alone. So a run that was interrupted goes on as if nothing
# had happened, and several processes agree without asking each other: each takes its own part of
# the same batch. A small data set lies on the device as one tensor; a large one is read by workers,
# ahead of time.


# %%
def step_generator(seed, step):
    """Make the random numbers that all processes share in a step.

    Twice the step gives the pictures, one more the stage.
    """
    return torch.Generator().manual_seed(2_000_003 * seed + step)


def picked_in_step(n, batch, seed, step):
    """Pick which of n pictures a step sees, in all processes: (batch,) int64."""
    return torch.randint(n, (batch,), generator=step_generator(seed, 2 * step))


def pictures_of_steps(images, batch, seed, steps, workers=0, bad=None):
    """Yield the uint8 pictures (b, C, H, W) of each step of the range `steps`.

    images: a tensor, or `PictureFiles` to read from. b is this process' part of `batch`. bad: a
    list that gets the unreadable files; others of the batch stand in for them.
    """
    rank, world = ranks()

    def picks():
        for step in steps:
            yield picked_in_step(len(images), batch, seed, step).chunk(world)[rank]

    if torch.is_tensor(images):
        for i in picks():
            yield images[i.to(images.device)]
        return
    loader = DataLoader(
        images,
        batch_sampler=(i.tolist() for i in picks()),
        num_workers=workers,
        collate_fn=_stack,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_interrupts,
    )
    for i, (readable, pictures) in zip(picks(), loader, strict=True):
        readable = torch.tensor(readable)
        for j in i[~readable].tolist():
            if images.files[j] not in bad:
                bad.append(images.files[j])
                tqdm.write(f"unreadable, skipped: {bad[-1]}")
        if len(bad) > 0.01 * len(images):
            report_unreadable(bad, len(images))
        if not readable.any():
            raise BadInput("none of the pictures of a batch is readable: see the files named above")
        if not readable.all():
            stand_in = torch.arange(len(i)) % len(pictures)
            pictures = pictures[torch.where(readable, readable.cumsum(0) - 1, stand_in)]
        yield pictures.to(device(), non_blocking=True)


# %% tags=["nbval-check-output"]
if __name__ == "__main__":
    parts = [next(pictures_of_steps(torch.arange(1000), 6, seed=0, steps=[n])) for n in (1, 2, 1)]
    print("pictures of the steps 1, 2 and 1 again:", *[part.tolist() for part in parts])
    assert torch.equal(parts[0], parts[2]) and not torch.equal(parts[0], parts[1])

# %% [markdown]
# ## A run on disk
#
# `runs/<name>/` holds `settings.json`, `metrics.jsonl` (a line a log step), grids of samples, and
# `checkpoint.pt`, which has everything that training changes. The checkpoint before it is kept. A
# folder is locked while it is written into, by a lock that dies with its process.


# %%
LOCKED = {}  # the folders that this process writes into, each open and locked: {path: descriptor}


def lock_folder(folder):
    """Lock a folder, until `unlock_folder` or the end of this process.

    Raises BadInput where another process holds it.
    """
    unlock_folder(folder)
    if fcntl is None:
        return
    LOCKED[Path(folder).resolve()] = place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        unlock_folder(folder)
        raise BadInput(
            f"another process is training in {folder}: wait for it, or give this run a --name"
        ) from None
    except OSError:  # some network's file system knows no locks
        pass


def unlock_folder(folder):
    """Give back a folder that `lock_folder` locked, if it did."""
    if (place := LOCKED.pop(Path(folder).resolve(), None)) is not None:
        os.close(place)


def claim_folder(folder, resume):
    """Make the folder of a run and lock it; an earlier run of that name is kept as `folder`.1, …

    Raises BadInput where the folder cannot be made, or another process writes into it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder)
        left = [name for name in ("checkpoint.pt", "autoencoder.pt") if (folder / name).exists()]
        if left and not resume:
            n = next(n for n in range(1, 10_000) if not Path(f"{folder}.{n}").exists())
            folder.rename(f"{folder}.{n}")
            print(f"an earlier run is kept as {folder}.{n}")
            folder.mkdir()
            lock_folder(folder)  # the lock on the old one went with it
    except OSError as error:
        raise BadInput(
            f"cannot write to {folder} ({error.strerror}): choose another --out"
        ) from error


def check_same_settings(asked, old, folder):
    """Raise BadInput where a resumed run is asked for other settings than it has (but steps)."""
    for key in sorted(set(asked) - {"steps"}):
        if (asked[key] or None) != (old.get(key) or None):  # what it does not know is empty
            raise BadInput(
                f"{folder} was trained with {key} = {old.get(key)!r}, not {asked[key]!r}"
            )


# %%
def write_checkpoint(content, folder):
    """Write `folder`/checkpoint.pt; the one before becomes checkpoint.previous.pt.

    Raises BadInput where it cannot be written, such as on a full disk; what was there stays.
    """
    path = Path(folder) / "checkpoint.pt"
    with replacing(path) as aside:
        write_tensors(content, aside)
        if path.exists():
            os.replace(path, path.with_name("checkpoint.previous.pt"))


def read_pretrained(path):
    """Read a file of pretrained/export.py as a checkpoint without its training state."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            about = {key: json.loads(value) for key, value in file.metadata().items()}
            return {**about, "ema": {key: file.get_tensor(key) for key in file.keys()}}
    except Exception as error:
        raise BadInput(f"{path} is damaged ({shorten(error)}): restore it from git") from error


def read_checkpoint(folder):
    """Read `folder`/checkpoint.pt onto the CPU, or the one before it where it is torn.

    A folder like runs/pretrained/NAME without one stands for weights that come with the project.
    Raises BadInput where there is none that can be read.
    """
    paths = [Path(folder) / name for name in ("checkpoint.pt", "checkpoint.previous.pt")]
    kept = Path(__file__).parent / "pretrained" / f"{Path(folder).name}.safetensors"
    if not any(os.path.isfile(path) for path in paths):
        if Path(folder).parent.name == "pretrained" and kept.is_file():
            return read_pretrained(kept)
        raise BadInput(f"there is no checkpoint {paths[0]}: train one with 04_train.py")
    for path in paths:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            parts = [type(content[key]) for key in ("settings", "ema", "step")]
        except Exception:  # torch.load fails in many ways on a broken or foreign file
            continue
        if not (issubclass(parts[0], dict) and issubclass(parts[1], dict) and parts[2] is int):
            continue
        if path != paths[0]:
            print(f"{paths[0]} is missing or torn: going back to {path}, step {content['step']:,}")
        return content
    raise BadInput(f"{paths[0]} is no readable checkpoint of 04_train.py: train anew")


@contextmanager
def fitting_checkpoint(what):
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


def restore_moments(optimizer):
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
        print_once("saved on another kind of device: going on with other random numbers")
        generator.manual_seed(1_000_003 * state["seed"] + content["step"])


# %%
def trim_log(log, step):
    """Keep of a log, a file of JSON lines, what was written until `step`; make it if need be."""
    old = read_log(log.parent, log.name) if log.is_file() else []
    with replacing(log) as aside:
        kept = (json.dumps(row) for row in old if row["step"] <= step)
        aside.write_text("".join(f"{row}\n" for row in kept), encoding="utf-8")


def append_row(row, log):
    """Add a row, a dictionary, to a log. Raises BadInput where it cannot be written."""
    try:
        with log.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
    except OSError as error:
        raise BadInput(
            f"cannot write to {log} ({error.strerror}): make room, then --resume goes on from the "
            "last checkpoint"
        ) from error


def read_log(folder, file="metrics.jsonl"):
    """Read a run's log as a list of dictionaries; torn rows, as of a full disk, are dropped."""
    rows, path = [], Path(folder) / file
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            row["step"]  # noqa: B018 - every row has one
            rows.append(row)
        except (KeyError, TypeError, ValueError):
            print_once(f"{path}: a torn row is dropped: {line[:60]}")
    return rows


# %% [markdown]
# ## The loop that keeps a training
#
# Trainings are generators: they yield after every step and know nothing of bars and files. This
# loop runs any of them, logs a row every fortieth of the way, saves, and lets Ctrl-C or a
# scheduler's SIGTERM finish the step before it stops.


# %%
@contextmanager
def defer_signals():
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


def asked_to_stop(stop, step, device):
    """Tell all processes alike whether one was asked to stop; several talk every tenth step."""
    if ranks()[1] == 1 or step % 10:
        return bool(stop) and ranks()[1] == 1
    flag = torch.tensor(float(bool(stop)), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


TEN_MINUTES = 600  # what a power cut may cost where --save_every does not count steps


def is_save_due(step, every, last):
    """Tell whether to save after a step: every so many, or (0) ten minutes after `last`."""
    return step % every == 0 if every else time.monotonic() - last > TEN_MINUTES


def keep_training(
    loop, state, steps, log, summarize, save, after=None, save_every=0, batch=1, shown="", **bar
):
    """Run a training to its end or to Ctrl-C; returns True when it is finished, False when stopped.

    loop: yields (step, {name: number}) after every step. state: its "step" is where it begins, its
    "generator" lies on the device. log: a file of JSON lines. summarize(recent): makes a
    row of the numbers of some steps. save(numbers): writes a checkpoint. after(step): what else is
    to be done, in the first process. save_every: as in `is_save_due`. batch: what the bar counts in
    a step; shown: how the keys begin that it shows; bar: more arguments of tqdm.
    """
    first, every, device = ranks()[0] == 0, max(1, steps // 40), state["generator"].device
    saved, recent, last_save = state["step"], [], time.monotonic()
    if first:
        trim_log(log, saved)
    bar.update(total=steps * batch, initial=saved * batch, disable=not first)
    with defer_signals() as stop, tqdm(**bar) as bar:
        for step, numbers in loop:
            bar.update(batch)
            recent.append(numbers)
            if step % every == 0 or step == steps:
                row, recent = summarize(recent), []
                bar.set_postfix({k: f"{v:.4g}" for k, v in row.items() if k.startswith(shown)})
                if first:
                    append_row(dict(step=step, **row), log)
            halt = asked_to_stop(stop, step, device)
            if is_save_due(step, save_every, last_save) or step == steps or halt:
                save(numbers)
                saved, last_save = step, time.monotonic()
            if first and after:
                after(step)
            if halt and step < steps:
                return False
        if saved < state["step"]:  # it ended by itself
            save(numbers)
    return True


# %% [markdown]
# **You have seen** the tools. The lessons begin with step 01.
