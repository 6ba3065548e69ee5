"""Step 01: kernels against integration, the optimal denoiser against its definition, data sets."""

import contextlib
import gzip
import math
import os
import pickle
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy.integrate import quad

NAMES = ["VP", "SubVP", "DDPM", "LDM", "VE", "EDM"]


@pytest.mark.parametrize(
    "name, t",
    [("VP", 0.01), ("VP", 0.4), ("VP", 1.0), ("SubVP", 0.05), ("SubVP", 0.7)]
    + [("DDPM", 0.0035), ("LDM", 0.0052), ("VE", 0.5), ("VE", 9), ("EDM", 20)],
)
def test_kernel_satisfies_equation_2(sde, name, t):
    kernel = getattr(sde, name)
    kinks = dict(points=[k / 1000 for k in range(1, 6)]) if name in ("DDPM", "LDM") else {}
    f = lambda xi: float(kernel.f(xi))  # noqa: E731
    s = lambda xi: math.exp(quad(f, 0, xi, **kinks)[0])  # noqa: E731
    variance = quad(lambda xi: float(kernel.g(xi)) ** 2 / s(xi) ** 2, 0, t, **kinks)[0]
    assert float(kernel.s(t)) == pytest.approx(s(t), rel=1e-9)
    assert float(kernel.sigma(t)) == pytest.approx(math.sqrt(variance), rel=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_integration_of_step_01_agrees_over_the_whole_range(sde, name):
    kernel = getattr(sde, name)
    for part in (0.3, 1.0):
        s, sigma = sde.integrate(kernel, part * kernel.t_max)
        torch.testing.assert_close(kernel.s(part * kernel.t_max), s, rtol=1e-6, atol=0)
        torch.testing.assert_close(kernel.sigma(part * kernel.t_max), sigma, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name, ends", [("DDPM", (1e-4, 0.02)), ("LDM", (0.0015, 0.0195))])
def test_discrete_schedules_have_the_products_of_their_steps(sde, name, ends):
    kernel = getattr(sde, name)
    power = 1 if name == "DDPM" else 2
    betas = np.linspace(ends[0] ** (1 / power), ends[1] ** (1 / power), 1000) ** power
    alpha_bar = np.cumprod(1 - betas)
    t = (torch.arange(1000).double() + 1) / 1000
    np.testing.assert_allclose(kernel.s(t) ** 2, alpha_bar, rtol=1e-10)
    np.testing.assert_allclose(kernel.s(t.float()) ** 2, alpha_bar, rtol=1e-4)
    np.testing.assert_allclose(kernel.sigma(t) ** 2, (1 - alpha_bar) / alpha_bar, rtol=1e-10)


def test_sub_vp_has_the_variance_of_song(sde):
    t = torch.linspace(0.01, 1, 20).double()
    noise = sde.SubVP.s(t) * sde.SubVP.sigma(t)
    torch.testing.assert_close(noise, 1 - torch.exp(-sde.VP.B(t)))
    assert (noise < sde.VP.s(t) * sde.VP.sigma(t)).all()


def test_snr_matching(sde):
    moved = sde.match_snr([0.442, 0.6308], sde.VP, sde.VE)
    assert moved == pytest.approx([2.511, 7.404], abs=1e-3)
    assert sde.match_snr([0.636], sde.VP, sde.EDM) == pytest.approx([7.6577], abs=1e-4)
    for name in NAMES:
        kernel = getattr(sde, name)
        there = sde.match_snr([0.2, 0.442, 0.6308], sde.VP, kernel)
        torch.testing.assert_close(
            kernel.sigma(torch.tensor(there, dtype=torch.float64)),
            sde.VP.sigma(torch.tensor([0.2, 0.442, 0.6308], dtype=torch.float64)),
        )
        assert sde.match_snr(there, kernel, sde.VP) == pytest.approx([0.2, 0.442, 0.6308])


def test_vp_preserves_variance_and_matches_known_values(sde):
    t = torch.linspace(1e-3, 1, 50, dtype=torch.float64)
    s, sigma = sde.VP.s(t), sde.VP.sigma(t)
    torch.testing.assert_close(s**2 * (1 + sigma**2), torch.ones_like(t))
    assert float(sde.VP.sigma(0.442)) == pytest.approx(2.511, abs=1e-3)
    assert float(sde.VP.sigma(0.6308)) == pytest.approx(7.404, abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_log_snr_and_its_inverse(sde, name):
    kernel = getattr(sde, name)
    t = torch.linspace(kernel.t_min, kernel.t_max, 101, dtype=torch.float64)
    expected = torch.log(kernel.s(t) ** 2 / (kernel.s(t) * kernel.sigma(t)) ** 2)
    torch.testing.assert_close(kernel.log_snr(t), expected)
    torch.testing.assert_close(kernel.time(kernel.log_snr(t)), t, rtol=1e-10, atol=0)


def test_perturb_has_the_moments_of_equation_1(sde):
    x0, t = torch.full((20_000, 1, 1, 1), 0.7), torch.full((20_000,), 0.3)
    xt = sde.perturb(x0, torch.randn_like(x0), t, sde.VP)
    s, sigma = float(sde.VP.s(0.3)), float(sde.VP.sigma(0.3))
    assert xt.mean().item() == pytest.approx(0.7 * s, abs=4 * s * sigma / math.sqrt(20_000))
    assert xt.std().item() == pytest.approx(s * sigma, rel=0.03)


def brute_force_posterior_mean(x, t, kernel, images):
    """Prop. 1 with Python loops in float64, nothing shared with the implementation."""
    out = np.zeros(x.shape)
    y = images.double().numpy()
    for b in range(len(x)):
        s, sigma = float(kernel.s(float(t[b]))), float(kernel.sigma(float(t[b])))
        log_w = []
        for i in range(len(y)):
            square = ((x[b].double().numpy() - s * y[i]) ** 2).sum()
            log_w.append(-square / (2 * s**2 * sigma**2))
        w = np.exp(np.array(log_w) - max(log_w))
        out[b] = np.tensordot(w / w.sum(), y, 1)
    return out


@pytest.mark.parametrize("sigma", [1e-3, 0.03, 0.3, 1.0, 5.0, 1e3])
def test_posterior_mean_equals_brute_force(sde, digits, sigma):
    images = digits[:150]
    t = torch.full((6,), sigma)
    x = sde.perturb(images[:6], torch.randn(6, 1, 8, 8), t, sde.VE)
    expected = brute_force_posterior_mean(x, t, sde.VE, images)
    for chunk in (7, 150, 2000):
        found = sde.posterior_mean(x, t, sde.VE, images, chunk=chunk)
        assert found.dtype == x.dtype
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


def softmax_mean(x, sigma, images):
    """The definition, in float64, one row at a time and without a product of matrices."""
    y, out = images.flatten(1).double(), []
    for z in x.flatten(1).double():
        out.append(torch.softmax(-((z - y) ** 2).sum(1) / (2 * sigma**2), 0) @ y)
    return torch.stack(out).reshape(x.shape)


@pytest.mark.parametrize("spread", [0.0003, 0.01, 0.3])
@pytest.mark.parametrize("sigma", [1e-3, 0.02, 0.3, 0.8, 1.5, 4.0, 1e3])
def test_float32_products_are_exact_enough(sde, spread, sigma):
    """3,000 colour pictures in families of near twins: logits differ by 1e7 and by next to 0."""
    family = torch.rand(150, 3, 24, 24)
    images = family.repeat(20, 1, 1, 1) + spread * torch.randn(3000, 3, 24, 24)
    assert images.numel() > 2**22  # else everything is float64
    x = images[::250] + sigma * torch.randn(12, 3, 24, 24)
    found, expected = sde.posterior_mean(x, sigma, sde.EDM, images), softmax_mean(x, sigma, images)
    assert found.dtype == torch.float32
    error = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error.max() < 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-6)


def test_more_equals_than_leaders_are_all_averaged(sde):
    """20 twins at a noise far below their distance to float32's reach: the float64 way out."""
    images = torch.rand(1500, 3, 32, 32)
    images[:20] = images[0] + 2e-5 * torch.randn(20, 3, 32, 32)
    x = images[:2] + 1e-3 * torch.randn(2, 3, 32, 32)
    found, expected = sde.posterior_mean(x, 1e-3, sde.EDM, images), softmax_mean(x, 1e-3, images)
    nearest = images[0] - expected[0].float()
    assert nearest.abs().max() > 1e-6  # it is an average, of more than one
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


MEMORY = """
import importlib, resource, torch
sde = importlib.import_module("01_sde_and_denoiser")
images = torch.empty(50_000, 3, 32, 32).uniform_()
x = torch.randn(512, 3, 32, 32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y = sde.posterior_mean(x, torch.linspace(0.05, 1, 512), sde.VP, images)
assert torch.isfinite(y).all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="resource is a Unix module")
def test_memory_does_not_grow_with_the_data_set():
    """512 evaluations against 50,000 pictures of 32x32x3 take less than 1 GiB beside the data."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, check=True
    )
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on a Mac, KiB elsewhere
    assert 0 < int(done.stdout) * unit < 2**30


def test_posterior_mean_takes_one_time_for_all(sde, digits):
    x = torch.randn(3, 1, 8, 8)
    one = sde.posterior_mean(x, 0.4, sde.VP, digits)
    torch.testing.assert_close(one, sde.posterior_mean(x, torch.full((3,), 0.4), sde.VP, digits))


def test_far_logits_pick_the_nearest_image(sde, digits):
    x = digits[:4] + 1e-3 * torch.randn(4, 1, 8, 8)
    found = sde.posterior_mean(x, torch.full((4,), 1e-3), sde.VE, digits)
    torch.testing.assert_close(found, digits[:4])


def test_optimal_denoiser_is_the_score_of_the_mixture(sde, digits):
    """-s sigma grad log p_t, with p_t (Eq. 14) from torch's own distributions."""
    images, t = digits[:50].double(), 0.25
    s, sigma = float(sde.VP.s(t)), float(sde.VP.sigma(t))
    x = sde.perturb(images[:5], torch.randn(5, 1, 8, 8).double(), torch.full((5,), t), sde.VP)
    x.requires_grad_()
    parts = torch.distributions.Independent(
        torch.distributions.Normal(s * images.flatten(1), s * sigma), 1
    )
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(50, dtype=torch.float64)), parts
    )
    (grad,) = torch.autograd.grad(mixture.log_prob(x.flatten(1)).sum(), x)
    found = sde.optimal_denoiser(x.detach(), torch.full((5,), t), sde.VP, images)
    torch.testing.assert_close(found, -s * sigma * grad, rtol=1e-8, atol=1e-10)


def test_optimal_denoiser_minimises_the_empirical_loss(sde, digits):
    """Eq. 17 by the density of Eq. 14: the gradient vanishes and no perturbation lowers it."""
    images, t = digits[:60].double(), 0.2
    s, sigma = float(sde.VP.s(t)), float(sde.VP.sigma(t))
    times = torch.full((4,), t, dtype=torch.float64)
    x = sde.perturb(images[:4], torch.randn(4, 1, 8, 8).double(), times, sde.VP)
    distance = ((x[:, None] - s * images[None]) ** 2).flatten(2).sum(2)
    weight = torch.exp(-(distance - distance.amin(1, True)) / (2 * s**2 * sigma**2))

    def loss(eps):
        error = eps[:, None] - (x[:, None] - s * images[None]) / (s * sigma)
        return (weight * (error**2).flatten(2).sum(2)).sum(1)

    best = sde.optimal_denoiser(x, t, sde.VP, images).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(best).sum(), best)
    assert gradient.abs().max() < 1e-10
    for size in (1e-4, 1e-2, 1.0):
        assert (loss(best + size * torch.randn_like(best)) > loss(best)).all()


def test_sampling_with_it_gives_back_training_images(sde, digits):
    images = digits[:100]
    best = lambda x, t: sde.optimal_denoiser(x, t, sde.VP, images)  # noqa: E731
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(6, 1, 8, 8, generator=generator)
    for solver in (sde.euler_maruyama, sde.probability_flow):
        *_, x = solver(best, sde.VP, start, 150, generator)
        gap = torch.cdist(x.flatten(1), images.flatten(1)).min(1).values / 8
        assert gap.max() < 0.05


@pytest.mark.parametrize(
    "x, t, images",
    [
        (torch.zeros(2, 1, 8, 8), 0.5, torch.zeros(3, 1, 9, 9)),
        (torch.zeros(2, 64), 0.5, torch.zeros(3, 1, 8, 8)),
        (torch.zeros(2, 1, 8, 8), 0.5, torch.zeros(0, 1, 8, 8)),
        (torch.zeros(2, 1, 8, 8), 0.0, torch.zeros(3, 1, 8, 8)),
    ],
)
def test_posterior_mean_refuses_what_cannot_be(workshop, sde, x, t, images):
    with pytest.raises(workshop.BadInput):
        sde.posterior_mean(x, t, sde.VP, images)


def test_digits_and_unknown_sets(workshop, sde):
    pixels, labels = workshop.load_images("digits")
    assert pixels.shape == (1797, 1, 8, 8) and pixels.dtype == torch.uint8
    assert pixels.max() == 255 and labels.bincount().tolist() == [178, 182, 177, 183, 181] + [
        *(182, 181, 179, 174, 180)
    ]
    with pytest.raises(workshop.BadInput, match="unknown dataset 'nope'"):
        workshop.load_images("nope")


def test_mnist_from_files(workshop, sde, tmp_path):
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


def test_cifar10_from_files(workshop, sde, tmp_path, monkeypatch):
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


def test_celeba_is_cropped_and_resized(workshop, sde, tmp_path, monkeypatch):
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


def test_folder_of_pictures(workshop, sde, tmp_path):
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


def test_missing_set_ends_in_one_sentence(workshop, sde, tmp_path, monkeypatch):
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


def test_damaged_mnist_is_named_with_the_way_out(workshop, sde, tmp_path):
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


def test_damaged_cifar10_is_named_with_the_way_out(workshop, sde, tmp_path, monkeypatch):
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
def test_a_host_that_never_answers_is_given_up(workshop, sde, tmp_path, monkeypatch, dataset):
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


def test_roots_that_are_no_folders(workshop, sde, tmp_path, monkeypatch):
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


def test_folders_with_what_is_no_picture(workshop, sde, tmp_path, monkeypatch):
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


def test_pictures_of_every_kind_are_read(workshop, sde, tmp_path):
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
def test_pictures_that_pil_refuses_are_counted(workshop, sde, tmp_path, capsys, monkeypatch, what):
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


def test_workers_decode_and_leave_ctrl_c_to_the_main_process(workshop, sde, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    state = torch.get_rng_state()
    assert workshop.read_pictures(Watched(), workers=2).min() == 1
    assert workshop.read_pictures(Watched(), workers=0).max() == 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def celeba(workshop, sde, tmp_path, monkeypatch):
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


def test_celeba_is_kept_decoded(workshop, sde, celeba, tmp_path, capsys, monkeypatch):
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


def test_celeba_is_read_where_nothing_can_be_written(sde, celeba, tmp_path, capsys, monkeypatch):
    def refuse(*args, **how):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(np, "save", refuse)
    assert len(celeba()) == 298
    said = capsys.readouterr().out
    assert "are not kept as" in said and "Permission denied" in said and "going on without" in said
    assert [path.name for path in (tmp_path / "celeba").iterdir()] == ["img_align_celeba"]


def test_celeba_that_was_not_wholly_unpacked(workshop, sde, celeba, tmp_path):
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


@pytest.mark.parametrize("n", [1, 3])
def test_the_step_works_with_a_handful_of_pictures(tmp_path, n):
    from PIL import Image

    (tmp_path / "few").mkdir()
    for i in range(n):
        noise = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((32, 32), 0).save(tmp_path / "few" / f"{i}.png")
    command = [sys.executable, str(ROOT / "01_sde_and_denoiser.py"), "--dataset", "folder"]
    command += ["--root", "few", "--samples", "2", "--steps", "20"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "figures" / "01_films.png").exists()


def test_files_are_replaced_whole_or_not_at_all(workshop, sde, tmp_path):
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


def test_pictures_are_tiled_with_space_between(workshop, sde):
    grid = workshop.tile_images(torch.zeros(5, 1, 8, 8), columns=3)
    assert grid.shape == (3, 2 * 48 + 3 * 6, 3 * 48 + 4 * 6)
    assert grid[0, 0, 0] == 1 and grid[0, 7, 7] == 0


def test_environment_names_what_is_missing(workshop, sde, monkeypatch, tmp_path):
    lines, complete = workshop.describe_environment()
    assert complete and any(line.startswith("torch ") for line in lines)
    (tmp_path / "requirements.txt").write_text("torch>=2\nno-such-package>=1\n", encoding="utf-8")
    monkeypatch.setattr(workshop, "ROOT", tmp_path)
    lines, complete = workshop.describe_environment()
    assert not complete and "no-such-package MISSING" in "\n".join(lines)


def test_products_are_exact_whatever_was_set(workshop, sde):
    """TF32, which a variable of the environment may turn on, would cost what is promised."""
    seen, before = [], torch.get_float32_matmul_precision()

    class Watched(sde.VE):
        @classmethod
        def sigma(cls, t):
            seen.append(torch.get_float32_matmul_precision())
            return sde.VE.sigma(t)

    x, images = torch.zeros(2, 1, 8, 8), torch.rand(5, 1, 8, 8)
    torch.set_float32_matmul_precision("high")
    try:
        sde.posterior_mean(x, 0.5, Watched, images)
        assert torch.get_float32_matmul_precision() == "high"
        with pytest.raises(workshop.BadInput):
            sde.posterior_mean(x, 0.0, Watched, images)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"highest"}


def test_memory_that_does_not_suffice_is_one_sentence(workshop, sde):
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


def test_tables_stay_where_they_are_used(sde):
    cpu = torch.device("cpu")
    assert sde.LDM.table(cpu) is sde.LDM.table(cpu) is not sde.DDPM.table(cpu)
    assert sde.LDM.table(cpu).dtype == sde.LDM.rate(cpu).dtype == torch.float64


def test_a_number_goes_with_pictures_of_any_precision(sde):
    x = torch.ones(2, 1, 3, 3, dtype=torch.float64)
    assert (sde.per_image(0.1, x) * x == 0.1).all()
    assert sde.per_image(torch.tensor([1.0, 2.0]), x).shape == (2, 1, 1, 1)
