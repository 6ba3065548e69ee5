"""Step 00: who may enter the workshop, files, data sets, pictures, memory."""

import ast
import contextlib
import gzip
import os
import pickle
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ROOT, STEPS
from torchvision.utils import make_grid

SHOWN = {"describe_environment"}  # by the workshop's own demonstration
HALVES = {"write_checkpoint"}  # step 04 writes what the steps read with read_checkpoint


def names_within(node):
    """Collect the names that a piece of the source mentions."""
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def definitions_of(tree):
    """Collect the functions, classes and constants of a module: {name: node}."""
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            stored = {name for target in node.targets for name in names_within(target)}
            found |= {name: node for name in stored if name.isupper()}
    return found


def test_only_what_two_steps_use_is_admitted_to_the_workshop():
    """Or what something admitted uses in turn, or what runs on every import."""
    tree = ast.parse((ROOT / f"{STEPS[0]}.py").read_text(encoding="utf-8"))
    defined, uses = definitions_of(tree), dict.fromkeys(definitions_of(tree), 0)
    for step in STEPS[1:7]:
        text = (ROOT / f"{step}.py").read_text(encoding="utf-8")
        for name in set(re.findall(r"\bworkshop\.(\w+)", text)) & defined.keys():
            uses[name] += 1
    admitted = {name for name, n in uses.items() if n >= 2} | SHOWN | HALVES
    for node in tree.body:
        runs_on_import = ast.unparse(node).startswith(("SCRIPT = ", "if SCRIPT:"))
        if isinstance(node, ast.Expr) or runs_on_import:
            admitted |= names_within(node) & defined.keys()
    before = set()
    while before != admitted:
        before = set(admitted)
        for name in before:
            admitted |= names_within(defined[name]) & defined.keys()
    outside = {name: uses[name] for name in defined.keys() - admitted}
    assert not outside, f"used by so few steps: {outside}"
    assert HALVES == {name for name in HALVES if uses[name] == 1}, "no exception any more"


def test_the_workshop_holds_no_equation_and_imports_no_step():
    text = (ROOT / f"{STEPS[0]}.py").read_text(encoding="utf-8")
    assert not re.search(r"# (Eqs?\.|Prop\.|Algorithm|footnote) ?\d", text)
    assert not re.search(r"import_module\(\W*0\d_", text)
    code = "import importlib, sys; importlib.import_module(sys.argv[1]); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, STEPS[0]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {name for name in done.stdout.split() if re.match(r"0\d_", name)} == {STEPS[0]}


def test_labels_stand_over_the_middle_of_their_columns(workshop, tmp_path, monkeypatch):
    seen = {}

    def look(path):
        seen["axes"] = plt.gcf().axes
        plt.close()

    monkeypatch.setattr(workshop, "show_figure", look)
    rows = [torch.zeros(7, 1, 8, 8), torch.zeros(3, 1, 8, 8)]
    workshop.show_images(rows, ["above", "below"], tmp_path / "a.png", 4, ["a", "b", "c", "d"])
    above, below = seen["axes"]
    assert [text.get_text() for text in above.texts] == ["a", "b", "c", "d"] and not below.texts
    line = workshop.tile_images(rows[0], 4)[0, 20]  # across the first row of pictures, 48 wide
    for text in above.texts:
        middle = round(text.get_position()[0])
        assert (line[middle - 23 : middle + 23] == 0).all()
        assert line[middle - 27] == line[middle + 27] == 1


def test_digits_and_unknown_sets(workshop):
    pixels, labels = workshop.load_images("digits")
    assert pixels.shape == (1797, 1, 8, 8) and pixels.dtype == torch.uint8
    assert pixels.max() == 255 and labels.bincount().tolist() == [178, 182, 177, 183, 181] + [
        *(182, 181, 179, 174, 180)
    ]
    with pytest.raises(workshop.BadInput, match="unknown dataset 'nope'"):
        workshop.load_images("nope")


def test_mnist_from_files(workshop, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for split, n in (("train", 5), ("t10k", 5)):
        image_file, label_file = f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte"
        (raw / image_file).write_bytes(struct.pack(">4i", 2051, n, 28, 28) + pixels.tobytes())
        (raw / label_file).write_bytes(struct.pack(">2i", 2049, n) + bytes(range(n)))
        (raw / f"{image_file}.gz").write_bytes(gzip.compress((raw / image_file).read_bytes()))
    images, labels = workshop.load_images("mnist", str(tmp_path))
    assert images.shape == (5, 1, 28, 28) and labels.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(images[:, 0].numpy(), pixels)


def test_cifar10_from_files(workshop, tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    # files made here cannot have the published checksums
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (5, 2, 3072), dtype=np.uint8)
    for i in range(5):
        content = {"data": rows[i], "labels": [i, i]}
        (folder / f"data_batch_{i + 1}").write_bytes(pickle.dumps(content))
    images, labels = workshop.load_images("cifar10", str(tmp_path))
    assert images.shape == (10, 3, 32, 32) and labels.tolist() == sorted([*range(5)] * 2)
    np.testing.assert_array_equal(images.flatten(1).numpy(), rows.reshape(10, 3072))


def test_celeba_is_cropped_and_resized(workshop, tmp_path, monkeypatch):
    from PIL import Image
    from torchvision.datasets import CelebA

    folder = tmp_path / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (178, 218), (10 * i, 20, 30)).save(folder / f"{i}.png")

    class Made(CelebA):
        def __init__(self, root, split, download):
            assert split == "train" and not download
            self.filename = ["0.png", "1.png", "2.png"]  # 3.png belongs to another split

    monkeypatch.setattr("torchvision.datasets.CelebA", Made)
    images, labels = workshop.load_images("celeba", str(tmp_path), size=32)
    assert images.shape == (3, 3, 32, 32) and labels is None
    assert images[2, :, 16, 16].tolist() == [20, 20, 30]


def test_folder_of_pictures(workshop, tmp_path):
    from PIL import Image

    with pytest.raises(workshop.BadInput, match="no pictures under"):
        workshop.load_images("folder", str(tmp_path))
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (40, 60), (255, 0, 0)).save(tmp_path / "deep" / "red.png")
    Image.new("L", (64, 64), 77).save(tmp_path / "grey.jpg")
    images, _ = workshop.load_images("folder", str(tmp_path), size=16)
    assert images.shape == (2, 3, 16, 16)
    assert images[0, :, 8, 8].tolist() == [255, 0, 0]
    (tmp_path / "torn.png").write_bytes(b"not a picture")
    with pytest.raises(workshop.BadInput, match=r"torn\.png"):
        workshop.load_images("folder", str(tmp_path), size=16)


def test_missing_set_ends_in_one_sentence(workshop, tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    def unreachable(self):
        raise OSError("no network")

    monkeypatch.setattr(CIFAR10, "download", unreachable)
    with pytest.raises(workshop.BadInput, match="put its files there"):
        workshop.load_images("cifar10", str(tmp_path))


def write_mnist(folder, pixels, labels):
    """Write training files of MNIST's format, and of the test set those that are looked for."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    images = struct.pack(">4i", 2051, *pixels.shape) + pixels.tobytes()
    marks = struct.pack(">2i", 2049, len(labels)) + bytes(labels)
    for split in ("train", "t10k"):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(marks)
    return raw / "train-images-idx3-ubyte"


def test_damaged_mnist_is_named_with_the_way_out(workshop, tmp_path):
    pixels = np.zeros((5, 28, 28), dtype=np.uint8)
    path = write_mnist(tmp_path, pixels, [0, 1, 2, 3, 4])
    whole, noise = path.read_bytes(), np.random.default_rng(0).bytes(5000)
    for content in (b"", noise, whole[:-1], whole[:10], b"\0" * 5000):
        path.write_bytes(content)
        with pytest.raises(
            workshop.BadInput, match=r"MNIST/raw is damaged \(.*\): remove it, and it is"
        ):
            workshop.load_images("mnist", str(tmp_path))
    for wrong, labels in (  # whole files that are no MNIST
        (pixels, [1, 2, 3]),
        (pixels, [1, 2, 3, 4, 10]),
        (np.zeros((5, 14, 28), dtype=np.uint8), [1, 2, 3, 4, 5]),
        (pixels[:0], []),
    ):
        write_mnist(tmp_path, wrong, labels)
        with pytest.raises(workshop.BadInput, match="MNIST/raw is damaged"):
            workshop.load_images("mnist", str(tmp_path))


def test_damaged_cifar10_is_named_with_the_way_out(workshop, tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(np.random.default_rng(0).bytes(5000))

    def unreachable(self):
        raise OSError("no network")

    monkeypatch.setattr(CIFAR10, "download", unreachable)
    sentence = r"cifar-10-batches-py is damaged or incomplete and could not be .*no network"
    with pytest.raises(workshop.BadInput, match=sentence):
        workshop.load_images("cifar10", str(tmp_path))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)  # right sums, wrong content
    for content in (b"", b"random", pickle.dumps({"labels": [1]})):
        (folder / "data_batch_1").write_bytes(content)
        with pytest.raises(
            workshop.BadInput, match=r"cifar-10-batches-py is damaged \(.*remove it"
        ):
            workshop.load_images("cifar10", str(tmp_path))


@contextlib.contextmanager
def silent_host():
    """Listen as a host that takes every connection and never answers: its address."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(20)
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"


@pytest.mark.parametrize("dataset", ["mnist", "cifar10", "celeba"])
def test_a_host_that_never_answers_is_given_up(workshop, tmp_path, monkeypatch, dataset):
    import requests
    from torchvision import datasets

    monkeypatch.setattr(workshop, "PATIENCE", 0.3)
    before, begin = requests.adapters.HTTPAdapter.send, time.monotonic()
    with silent_host() as url:
        monkeypatch.setattr(datasets.MNIST, "mirrors", [url, url])
        monkeypatch.setattr(datasets.CIFAR10, "url", url + "cifar.tar.gz")
        # what gdown does, which fetches CelebA
        fetch = lambda *args: requests.get(url, stream=True)  # noqa: E731
        monkeypatch.setattr("torchvision.datasets.celeba.download_file_from_google_drive", fetch)
        with pytest.raises(
            workshop.BadInput, match=r"is not in .* could not be downloaded \(.*time"
        ):
            workshop.load_images(dataset, str(tmp_path))
    assert time.monotonic() - begin < 10
    assert socket.getdefaulttimeout() is None and requests.adapters.HTTPAdapter.send is before
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_roots_that_are_no_folders(workshop, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(b"kept")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link", "missing"):
        with pytest.raises(workshop.BadInput, match=f"cannot read the folder .*{name} "):
            workshop.load_images("folder", str(tmp_path / name))
    for dataset in ("mnist", "cifar10", "celeba"):
        with pytest.raises(
            workshop.BadInput, match="file is no folder: give --root one that holds"
        ):
            workshop.load_images(dataset, str(file))
    assert file.read_bytes() == b"kept"


def save_pictures(folder, n, side=8):
    """Save n coloured pictures under names that sort."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.new("RGB", (side, side), (i % 256, i // 256, 30)).save(folder / f"{i:04}.png")


def test_folders_with_what_is_no_picture(workshop, tmp_path, monkeypatch):
    save_pictures(tmp_path / "deep", 3)
    (tmp_path / "x.png").mkdir()  # a folder in spite of its name
    assert len(workshop.load_images("folder", tmp_path, 8)[0]) == 3
    (tmp_path / "gone.png").symlink_to("nowhere")
    with pytest.raises(
        workshop.BadInput, match=r"1 of 4 pictures are unreadable, .*gone\.png: mend or"
    ):
        workshop.load_images("folder", tmp_path, 8)
    scan = os.scandir

    def locked(path):
        if Path(path).name == "deep":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", locked)  # as root one may read everything
    with pytest.raises(
        workshop.BadInput, match=r"cannot read the folder .*deep \(Permission denied\)"
    ):
        workshop.load_images("folder", tmp_path, 8)
    with pytest.raises(workshop.BadInput, match="size = 0 must be 1 or more"):
        workshop.PictureFiles([], 0)


def test_pictures_of_every_kind_are_read(workshop, tmp_path):
    from PIL import Image

    colour = Image.new("RGB", (20, 20), (200, 100, 50))
    for kind, file in dict(P="p.png", LA="la.png", RGBA="a.webp", CMYK="c.jpg").items():
        colour.convert(kind).save(tmp_path / file)
    colour.convert("1").save(tmp_path / "1.png")
    Image.fromarray(np.full((20, 20), 257 * 90, dtype=np.uint16)).save(tmp_path / "16.png")
    Image.new("RGB", (1, 300)).save(tmp_path / "thin.png")
    files = workshop.list_picture_files("folder", tmp_path)
    found = {path.name: workshop.PictureFiles([path], 8)[0] for path in files}
    assert all(x.shape == (3, 8, 8) and x.dtype == torch.uint8 for x in found.values())
    assert found["16.png"].unique().tolist() == [90]  # the upper 8 of its 16 bits
    assert found["p.png"][:, 4, 4].tolist() == pytest.approx([200, 100, 50], abs=30)


@pytest.mark.parametrize("what", ["torn", "empty", "bomb", "warning", "floats"])
def test_pictures_that_pil_refuses_are_counted(workshop, tmp_path, capsys, monkeypatch, what):
    from PIL import Image

    save_pictures(tmp_path, 120)
    path = tmp_path / "0005.png"
    if what in ("torn", "empty"):
        path.write_bytes(path.read_bytes()[:50] if what == "torn" else b"")
    elif what == "floats":  # of unknown range: they would come out black
        Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)).save(tmp_path / "0005.tiff")
        path.unlink()
    else:
        Image.new("RGB", (40, 40)).save(path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500 if what == "bomb" else 1000)
    images, _ = workshop.load_images("folder", tmp_path, 8)
    assert images[:, 0, 4, 4].tolist() == [i for i in range(120) if i != 5]
    said = capsys.readouterr().out
    assert "unreadable, skipped" in said and "1 of 120 pictures were unreadable" in said


class Watched:
    """Stand in for PictureFiles: tell whether a process decodes apart, and ignores Ctrl-C."""

    size, kept = 2, None

    def __len__(self):
        return 500

    def __getitem__(self, i):
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        return torch.full((3, 2, 2), ignored, dtype=torch.uint8)


def test_workers_decode_and_leave_ctrl_c_to_the_main_process(workshop, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    state = torch.get_rng_state()
    assert workshop.read_pictures(Watched(), workers=2).min() == 1
    assert workshop.read_pictures(Watched(), workers=0).max() == 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def celeba(workshop, tmp_path, monkeypatch):
    """300 files in CelebA's place, two of them unreadable; call it to load them."""
    from torchvision.datasets import CelebA

    folder = tmp_path / "celeba" / "img_align_celeba"
    save_pictures(folder, 300)
    for name in ("0007.png", "0250.png"):
        (folder / name).write_bytes(b"torn")

    class Made(CelebA):
        def __init__(self, root, split, download):
            self.filename = [f"{i:04}.png" for i in range(300)]

    monkeypatch.setattr("torchvision.datasets.CelebA", Made)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    return lambda workers=0: workshop.read_pictures(
        workshop.open_picture_files("celeba", tmp_path, 8), workers
    )


def test_celeba_is_kept_decoded(workshop, celeba, tmp_path, capsys, monkeypatch):
    from PIL import Image

    kept = tmp_path / "celeba" / "train-8.npy"
    first = celeba()
    counted = "2 of 300 pictures were unreadable and skipped"
    assert counted in capsys.readouterr().out and kept.is_file()
    alone = [i for i in range(300) if i not in (7, 250)]
    assert (first[:, 0, 0, 0] + 256 * first[:, 1, 0, 0].int()).tolist() == alone
    decode = workshop.open_picture

    def refused(path):
        assert path.name in ("0007.png", "0250.png")  # these are looked at again
        return decode(path)

    with monkeypatch.context() as patch:
        patch.setattr(workshop, "open_picture", refused)
        assert torch.equal(celeba(), first)
        assert torch.equal(workshop.load_images("celeba", tmp_path, 8)[0], first)
    said = capsys.readouterr().out
    assert said.count(counted) == 2 and "does not fit" not in said
    whole = kept.read_bytes()
    wrong = [b"", b"nothing", whole[:100], whole[:30_000], whole[:-8], whole[:-300]]
    for content in wrong:  # torn, wherever it may be
        kept.write_bytes(content)
        assert torch.equal(celeba(workers=2), first)
        assert "train-8.npy does not fit" in capsys.readouterr().out
        assert kept.read_bytes() == whole
    for shape in ((298, 3, 16, 16), (299, 3, 8, 8), (300, 3, 8)):  # whole, and not theirs
        with kept.open("wb") as file:
            np.save(file, np.zeros(shape, dtype=np.uint8))
            np.save(file, np.array([7, 250]))
        assert torch.equal(celeba(), first)
        assert "does not fit" in capsys.readouterr().out
    Image.new("RGB", (8, 8), (7, 0, 30)).save(kept.parent / "img_align_celeba" / "0007.png")
    assert len(celeba()) == 299  # mended meanwhile
    assert "no longer is" in capsys.readouterr().out


def test_celeba_is_read_where_nothing_can_be_written(celeba, tmp_path, capsys, monkeypatch):
    def refuse(*args, **how):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(np, "save", refuse)
    assert len(celeba()) == 298
    said = capsys.readouterr().out
    assert "are not kept as" in said and "Permission denied" in said and "going on without" in said
    assert [path.name for path in (tmp_path / "celeba").iterdir()] == ["img_align_celeba"]


def test_celeba_that_was_not_wholly_unpacked(workshop, celeba, tmp_path):
    folder = tmp_path / "celeba" / "img_align_celeba"
    for i in range(200, 300):
        (folder / f"{i:04}.png").unlink()
    with pytest.raises(
        workshop.BadInput, match="lacks 100 of 300 pictures, such as 0200.png: remove it"
    ):
        celeba()
    shutil.rmtree(folder)
    with pytest.raises(workshop.BadInput, match="cannot read the folder .*img_align_celeba"):
        celeba()


def test_files_are_replaced_whole_or_not_at_all(workshop, tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with workshop.replacing(path) as aside:
        aside.write_text("first", encoding="utf-8")
    with pytest.raises(RuntimeError), workshop.replacing(path) as aside:
        aside.write_text("half", encoding="utf-8")
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "first"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    with (
        pytest.raises(workshop.BadInput, match="cannot write"),
        workshop.replacing(path / "below") as aside,
    ):
        aside.write_text("never", encoding="utf-8")


def test_pictures_are_tiled_with_space_between(workshop):
    grid = workshop.tile_images(torch.zeros(5, 1, 8, 8), columns=3)
    assert grid.shape == (3, 2 * 48 + 3 * 6, 3 * 48 + 4 * 6)
    assert grid[0, 0, 0] == 1 and grid[0, 7, 7] == 0
    for n, channels, columns in ((40, 3, 16), (2, 1, 16), (17, 1, 4)):  # as torchvision has it
        x = torch.rand(n, channels, 8, 8)
        big = x.repeat_interleave(6, -1).repeat_interleave(6, -2)
        theirs = make_grid(big, nrow=columns, padding=6, pad_value=1.0)
        assert torch.equal(workshop.tile_images(x, columns), theirs)


def test_environment_names_what_is_missing(workshop, monkeypatch, tmp_path):
    lines, complete = workshop.describe_environment()
    assert complete and any(line.startswith("torch ") for line in lines)
    (tmp_path / "requirements.txt").write_text("torch>=2\nno-such-package>=1\n", encoding="utf-8")
    monkeypatch.setattr(workshop, "ROOT", tmp_path)
    lines, complete = workshop.describe_environment()
    assert not complete and "no-such-package MISSING" in "\n".join(lines)


def test_memory_that_does_not_suffice_is_one_sentence(workshop):
    with pytest.raises(
        workshop.BadInput, match="memory of this machine is used up.*smaller --batch"
    ):
        with workshop.enough_memory():
            torch.empty(2**50, dtype=torch.uint8)  # a pebibyte
    with pytest.raises(workshop.BadInput, match=r"for 20\.00 GiB more\): sell something"):
        with workshop.enough_memory("sell something"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0")
    with pytest.raises(RuntimeError, match="another bug"), workshop.enough_memory():
        raise RuntimeError("another bug")
