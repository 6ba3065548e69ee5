"""Step 00: who may enter the workshop, files, data sets, pictures, checkpoints."""

import ast
import os
import pickle
import re
import shutil
import struct

import numpy as np
import pytest
import torch
from conftest import ROOT, STEPS
from PIL import Image
from torchvision import datasets
from torchvision.utils import make_grid

OWN = {
    "describe_environment",
    "Replayed",
}  # a command; what 04 trains with, and 05 draws through 04


def names_within(node):
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def test_only_what_two_steps_use_is_admitted_to_the_workshop():
    """Or what something admitted uses in turn, or what runs on every import."""
    tree = ast.parse((ROOT / f"{STEPS[0]}.py").read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    defined = {node.name: node for node in tree.body if isinstance(node, kinds)}
    texts = [(ROOT / f"{step}.py").read_text(encoding="utf-8") for step in STEPS[1:]]
    used = [set(re.findall(r"\bworkshop\.(\w+)", text)) for text in texts]
    admitted = OWN | {name for name in defined if sum(name in names for names in used) >= 2}
    for node in tree.body:
        if not isinstance(node, kinds):
            admitted |= names_within(node) & defined.keys()
    for _ in defined:
        for name in set(admitted):
            admitted |= names_within(defined[name]) & defined.keys()
    alone = sorted(defined.keys() - admitted)
    assert not alone, f"used by one step or none: {alone}"


def test_the_workshop_holds_no_equation_and_imports_no_step():
    text = (ROOT / f"{STEPS[0]}.py").read_text(encoding="utf-8")
    assert not re.search(r"# (Eqs?\.|Prop\.|Algorithm|footnote) ?\d", text)
    assert not re.search(r"import_module\(\W*0\d_", text)


def test_files_are_replaced_whole_or_not_at_all(workshop, tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with workshop.replacing(path) as aside:
        aside.write_text("first", encoding="utf-8")
    with pytest.raises(KeyError), workshop.replacing(path) as aside:
        aside.write_text("half", encoding="utf-8")
        raise KeyError
    assert path.read_text(encoding="utf-8") == "first"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    with pytest.raises(workshop.BadInput, match="cannot write"):
        workshop.write_json({}, path / "below")


def test_pictures_are_tiled_as_torchvision_does(workshop):
    for n, channels, columns in ((5, 1, 3), (40, 3, 16), (2, 1, 16), (17, 1, 4)):
        x = torch.rand(n, channels, 8, 8)
        big = x.repeat_interleave(6, -1).repeat_interleave(6, -2)
        theirs = make_grid(big, nrow=columns, padding=6, pad_value=1.0)
        assert torch.equal(workshop.tile_images(x, columns), theirs)


def test_environment_names_what_is_missing(workshop, monkeypatch, tmp_path):
    assert not [line for line in workshop.describe_environment() if "MISSING" in line]
    (tmp_path / "requirements.txt").write_text("torch>=2\nno-such-package>=1\n", encoding="utf-8")
    monkeypatch.setattr(workshop, "ROOT", tmp_path)
    assert "no-such-package MISSING" in "\n".join(workshop.describe_environment())


def test_digits_and_unknown_sets(workshop):
    pixels, labels = workshop.load_images("digits")
    assert pixels.shape == (1797, 1, 8, 8) and pixels.dtype == torch.uint8 and pixels.max() == 255
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_mnist_from_files(workshop, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for split in ("train", "t10k"):
        images = struct.pack(">4i", 2051, 5, 28, 28) + pixels.tobytes()
        (raw / f"{split}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 2049, 5) + bytes(range(5))
        )
    images, labels = workshop.load_images("mnist", tmp_path)
    assert images.shape == (5, 1, 28, 28) and labels.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(images[:, 0].numpy(), pixels)


def test_cifar10_from_files(workshop, tmp_path, monkeypatch):
    # files made here cannot have the published checksums
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.CIFAR10, "_load_meta", lambda self: None)
    (tmp_path / "cifar-10-batches-py").mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (5, 2, 3072), dtype=np.uint8)
    for i in range(5):
        content = pickle.dumps({"data": rows[i], "labels": [i, i]})
        (tmp_path / "cifar-10-batches-py" / f"data_batch_{i + 1}").write_bytes(content)
    images, labels = workshop.load_images("cifar10", tmp_path)
    assert images.shape == (10, 3, 32, 32) and labels.tolist() == sorted([*range(5)] * 2)
    np.testing.assert_array_equal(images.flatten(1).numpy(), rows.reshape(10, 3072))


@pytest.mark.parametrize("layout", ["as the original", "a folder too deep", "the zip"])
def test_celeba_lies_there_by_hand(workshop, tmp_path, monkeypatch, layout):
    """Of 30 faces every third belongs to another split; torchvision's hashes alone are left out."""
    made = [(where, None, name) for where, _, name in datasets.CelebA.file_list]
    monkeypatch.setattr(datasets.CelebA, "file_list", made)
    place = tmp_path / "celeba"
    folder = place / "img_align_celeba"
    (folder / (folder.name if layout == "a folder too deep" else "")).mkdir(parents=True)
    names = [f"{i + 1:06}.jpg" for i in range(30)]
    for _, _, table in made[1:]:
        head = "30\nsome names\n" * ("list_" in table and "eval" not in table)
        rows = [f"{name} {i % 3 // 2}\n" for i, name in enumerate(names)]
        (place / table).write_text(head + "".join(rows))
    with pytest.raises(workshop.BadInput, match=r"lacks 000001\.jpg: the pictures belong into it"):
        workshop.load_images("celeba", tmp_path, 32)
    for i, name in enumerate(names):
        face = Image.new("RGB", (178, 218), (8 * i, 20, 30))
        face.save(next(folder.glob("img*"), folder) / name, quality=100)
    if layout == "the zip":
        shutil.make_archive(folder, "zip", place, folder.name)
        shutil.rmtree(folder)
    images, labels = workshop.load_images("celeba", tmp_path, 32)
    assert images.shape == (20, 3, 32, 32) and labels is None
    assert (images[-1, :, 16, 16].int() - torch.tensor([8 * 28, 20, 30])).abs().max() < 3


def test_a_download_that_fails_says_what_to_do_by_hand(workshop, tmp_path, monkeypatch):
    def refuse(*args, **how):
        raise RuntimeError("quota")

    for name in workshop.BY_HAND:
        monkeypatch.setattr(datasets, name, refuse)
        with pytest.raises(workshop.BadInput, match=f"quota.*by hand; {tmp_path}.* takes .*[.]"):
            workshop.torchvision_set(name, tmp_path)


def test_a_folder_is_searched_as_its_owner_sees_it(workshop, tmp_path, capsys):
    red = Image.new("RGB", (9, 9), (255, 0, 0))
    for place in (".thumbnails", "__MACOSX", "deep/er", "elsewhere"):
        (tmp_path / "pics" / place).mkdir(parents=True)
        red.save(tmp_path / "pics" / place / "a.png")
    (tmp_path / "pics" / "elsewhere").rename(tmp_path / "elsewhere")
    (tmp_path / "pics" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "pics" / "deep" / "back").symlink_to(tmp_path / "pics")  # a loop
    red.save(tmp_path / "pics" / "._a.png")
    red.save(tmp_path / "pics" / "b.JFIF", "JPEG")
    (tmp_path / "pics" / "x.heic").write_bytes(b"nobody can")
    os.mkfifo(tmp_path / "pics" / "pipe.png")
    found = workshop.list_pictures(tmp_path / "pics")
    names = [str(path.relative_to(tmp_path / "pics")) for path in found]
    assert names == ["b.JFIF", "deep/er/a.png", "linked/a.png"]
    assert "no pictures, left out: .heic" in capsys.readouterr().out


def test_pictures_of_every_kind_come_out_as_they_look(workshop, tmp_path):
    colour = Image.new("RGB", (20, 20), (200, 100, 50))
    half = Image.new("RGB", (20, 20))
    half.paste((255, 255, 255), (0, 0, 20, 10))
    exif = half.getexif()
    exif[274] = 6  # to be turned by a quarter
    half.save(tmp_path / "exif.png", exif=exif)
    colour.convert("CMYK").save(tmp_path / "c.tiff")
    colour.save(tmp_path / "w.webp", lossless=True)
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("P", (20, 20), 1).save(tmp_path / "clear.gif", transparency=1)
    for name, value in (("16.png", 257 * 90), ("12.png", 2048), ("16.tiff", 257 * 90)):
        Image.fromarray(np.full((20, 20), value, dtype=np.uint16)).save(tmp_path / name)
    Image.new("RGB", (1, 300)).save(tmp_path / "thin.bmp")
    files = workshop.list_pictures(tmp_path)
    pixels = dict(zip([path.name for path in files], workshop.decode(files, 8), strict=True))
    assert all(x.shape == (3, 8, 8) and x.dtype == torch.uint8 for x in pixels.values())
    middle = {name: x[:, 4, 4].tolist() for name, x in pixels.items()}
    assert pixels["exif.png"][0, 4].tolist() == sorted(pixels["exif.png"][0, 4].tolist())
    assert pixels["exif.png"][0, 4, 0] == 0 and pixels["exif.png"][0, 4, 7] == 255
    assert middle["clear.png"] == middle["clear.gif"] == [255, 255, 255]
    assert middle["16.png"] == middle["16.tiff"] == [90] * 3 and middle["12.png"] == [127] * 3
    assert middle["w.webp"] == [200, 100, 50]
    assert middle["c.tiff"] == pytest.approx([200, 100, 50], abs=2)


def save_pictures(folder, n):
    for i in range(n):
        Image.new("RGB", (8, 8), (i % 256, i // 256, 30)).save(folder / f"{i:04}.png")


@pytest.mark.parametrize("what", ["torn", "empty", "floats"])
def test_pictures_that_cannot_be_read_are_counted(workshop, tmp_path, capsys, what):
    save_pictures(tmp_path, 120)
    path = tmp_path / "0005.png"
    path.write_bytes(path.read_bytes()[:50] if what == "torn" else b"")
    if what == "floats":  # they would come out black
        path.unlink()
        Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)).save(tmp_path / "0005.tiff")
    images, _ = workshop.load_images("folder", tmp_path, 8)
    assert images[:, 0, 4, 4].tolist() == [i for i in range(120) if i != 5]
    assert "unreadable: 1 of 120 pictures, such as" in capsys.readouterr().out
    (tmp_path / "0007.png").write_bytes(b"")
    with pytest.raises(workshop.BadInput, match="more than 1% of the pictures"):
        workshop.load_images("folder", tmp_path, 8)


def test_decoded_pictures_are_kept_for_these_pictures_alone(workshop, tmp_path, monkeypatch):
    save_pictures(tmp_path, 20)
    first, _ = workshop.load_images("folder", tmp_path, 8)
    with monkeypatch.context() as patch:
        patch.setattr(workshop, "decode_picture", None)  # kept: nothing is decoded
        again, _ = workshop.load_images("folder", tmp_path, 8)
        assert torch.equal(again, first)
    assert workshop.fingerprint(again) == workshop.fingerprint(first)
    path = tmp_path / "0003.png"
    Image.new("RGB", (8, 8), (99, 0, 30)).save(path)  # another picture of that name
    os.utime(path, ns=(0, 0))
    other, _ = workshop.load_images("folder", tmp_path, 8)
    assert other[3, 0, 0, 0] == 99 and not torch.equal(other, first)
    assert workshop.fingerprint(other) != workshop.fingerprint(first)
