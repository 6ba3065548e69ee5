"""Step 01: kernels against integration, the optimal denoiser against its definition."""

import math
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from scipy.integrate import quad

NAMES = ["VP", "DDPM", "LDM", "VE", "EDM", "Flow"]


@pytest.mark.parametrize(
    "name, t",
    [
        ("VP", 0.01),
        ("VP", 0.4),
        ("VP", 1.0),
        ("DDPM", 0.0035),
        ("LDM", 0.0052),
        ("VE", 0.5),
        ("VE", 9),
        ("EDM", 20),
    ]
    + [("Flow", 0.1), ("Flow", 0.97)],
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
    for part in (0.3, 0.9 if name == "Flow" else 1.0):  # whose drift is infinite at t = 1
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


def test_vp_preserves_variance(sde):
    t = torch.linspace(1e-3, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(sde.VP.s(t) ** 2 * (1 + sde.VP.sigma(t) ** 2), torch.ones_like(t))


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


def softmax_mean(x, sigma, images):
    """Prop. 1 for s = 1, in float64, one row at a time and without a product of matrices."""
    y, out = images.flatten(1).double(), []
    for z in x.flatten(1).double():
        out.append(torch.softmax(-((z - y) ** 2).sum(1) / (2 * sigma**2), 0) @ y)
    return torch.stack(out).reshape(x.shape)


@pytest.mark.parametrize("sigma", [1e-3, 0.03, 0.3, 1.0, 5.0, 1e3])
def test_posterior_mean_is_the_definition(sde, digits, sigma):
    images, t = digits[:150], torch.full((6,), sigma)
    x = sde.perturb(images[:6], torch.randn(6, 1, 8, 8), t, sde.VE)
    expected = softmax_mean(x, sigma, images)
    forms = [sde.posterior_mean(x, t, sde.VE, images, chunk=chunk) for chunk in (7, 150, 2000)]
    for found in (sde.plain_posterior_mean(x, t, sde.VE, images), *forms):
        assert found.dtype == x.dtype
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spread", [0.0003, 0.01, 0.3])
@pytest.mark.parametrize("sigma", [1e-3, 0.02, 0.3, 0.55, 1.0, 4.0, 1e3])
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


def test_more_equals_than_the_nearest_are_all_averaged(sde):
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
x = torch.randn(128, 3, 32, 32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y = sde.posterior_mean(x, torch.linspace(0.05, 1, 128), sde.VP, images)
assert torch.isfinite(y).all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="resource is a Unix module")
def test_memory_does_not_grow_with_the_data_set():
    """128 evaluations against 50,000 pictures of 32x32x3 take less than 1 GiB beside the data."""
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
        assert torch.cdist(x.flatten(1), images.flatten(1)).min(1).values.max() / 8 < 0.05


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


@pytest.mark.parametrize("n", [1, 3])
def test_the_step_works_with_a_handful_of_pictures(workshop, sde, tmp_path, monkeypatch, n):
    (tmp_path / "few").mkdir()
    for i in range(n):
        noise = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((32, 32), 0).save(tmp_path / "few" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workshop, "CACHE", tmp_path / "cache")
    flags = "step --dataset folder --root few --samples 2 --steps 20"
    monkeypatch.setattr(sys, "argv", flags.split())
    runpy.run_path(sde.__file__, run_name="__main__")
    assert (tmp_path / "figures" / "01_films.png").exists()


def test_products_are_exact_whatever_was_set(sde):
    """TF32, which a variable of the environment may turn on, would cost what is promised."""
    torch.set_float32_matmul_precision("high")
    runpy.run_path(sde.__file__)  # a second copy of the step, executed
    assert torch.get_float32_matmul_precision() == "highest"


def test_tables_stay_where_they_are_used(sde):
    cpu = torch.device("cpu")
    assert sde.LDM.tables(cpu) is sde.LDM.tables(cpu) is not sde.DDPM.tables(cpu)
    assert all(table.dtype == torch.float64 for table in sde.LDM.tables(cpu))


def test_a_number_goes_with_pictures_of_any_precision(sde):
    x = torch.ones(2, 1, 3, 3, dtype=torch.float64)
    assert (sde.per_image(0.1, x) * x == 0.1).all()
    assert sde.per_image(torch.tensor([1.0, 2.0]), x).shape == (2, 1, 1, 1)


@pytest.mark.parametrize("name", NAMES)
def test_plain_and_streamed_forms_are_equal(sde, digits, name):
    kernel, images = getattr(sde, name), digits[:300].double()
    t = kernel.time(torch.linspace(-6, 8, 10, dtype=torch.float64))
    x = sde.perturb(images[:10], torch.randn(10, 1, 8, 8).double(), t, kernel)
    for plain, fast in (
        (sde.plain_posterior_mean, sde.posterior_mean),
        (sde.plain_optimal_denoiser, sde.optimal_denoiser),
    ):
        expected = plain(x, t, kernel, images)
        torch.testing.assert_close(fast(x, t, kernel, images), expected, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(plain(x[4:5], float(t[4]), kernel, images), expected[4:5])


def test_noise_is_inferred_from_a_picture_and_its_origin(sde, digits):
    t, eps = torch.linspace(0.01, 1, 8), torch.randn(8, 1, 8, 8).double()
    x = sde.perturb(digits[:8].double(), eps, t, sde.VP)
    torch.testing.assert_close(sde.infer_noise(x, digits[:8].double(), t, sde.VP), eps)


def test_minimum_of_the_loss_is_found_from_anywhere(sde, digits):
    """By its own gradient; the one of the proof is the one of automatic differentiation."""
    images, t = digits[:60].double(), 0.2
    x = sde.perturb(images[:4], torch.randn(4, 1, 8, 8).double(), t, sde.VP)
    best = sde.optimal_denoiser(x, t, sde.VP, images)
    guess = (10 * torch.randn_like(best)).requires_grad_()
    loss, gradient = sde.empirical_loss(guess, x, t, sde.VP, images)
    (expected,) = torch.autograd.grad(loss.sum(), guess)
    torch.testing.assert_close(gradient, expected)
    found = sde.minimise_loss(guess.detach(), x, t, sde.VP, images)
    torch.testing.assert_close(found, best, rtol=1e-9, atol=1e-9)
    least = sde.empirical_loss(best, x, t, sde.VP, images)[0]
    torch.testing.assert_close(loss - least, ((guess - best) ** 2).flatten(1).sum(1))


def test_mixture_density_is_the_one_of_torch(sde):
    points, x = torch.tensor([-1.0, 0.2, 1.0]).double(), torch.linspace(-3, 3, 50).double()
    t = torch.tensor([0.01, 0.2, 1.0]).double()
    found = sde.mixture_density(x, t, sde.VP, points)
    for row, time in zip(found, t, strict=True):
        s = sde.VP.s(time)
        bells = torch.distributions.Normal(s * points, s * sde.VP.sigma(time))
        torch.testing.assert_close(row, bells.log_prob(x[:, None]).exp().mean(1))


@pytest.mark.parametrize("name", NAMES)
def test_solvers_arrive_at_the_only_picture(sde, digits, name):
    """With one picture the noise is known, and so is where every path must end."""
    kernel, only = getattr(sde, name), digits[:1]
    known = lambda x, t: sde.infer_noise(x, only, t, kernel)  # noqa: E731
    start = sde.start_noise(only, torch.Generator().manual_seed(0), kernel)
    for solver in (sde.euler_maruyama, sde.probability_flow):
        states = list(solver(known, kernel, start, 100, torch.Generator().manual_seed(1)))
        assert len(states) == 100 and states[-1].shape == only.shape
        level = float(kernel.s(kernel.t_min) * kernel.sigma(kernel.t_min))
        assert (states[-1] - only).square().mean().sqrt() < 1.5 * level


@pytest.mark.parametrize("D", [None, 3.0])
def test_noise_of_a_generator_each_does_not_depend_on_the_batch(sde, D):
    kernel, x = sde.PFGM(D) if D else sde.VP, torch.zeros(5, 1, 4, 4)
    dice = lambda first, last: [torch.Generator().manual_seed(i) for i in range(first, last)]  # noqa: E731
    all_at_once = sde.fresh_noise(x, dice(0, 5), kernel)
    ends = ((0, 2), (2, 5))
    parts = [sde.fresh_noise(x[a:b], dice(a, b), kernel) for a, b in ends]
    assert torch.equal(all_at_once, torch.cat(parts))
    alone = sde.fresh_noise(x[:1], torch.Generator().manual_seed(3), kernel)
    assert torch.equal(all_at_once[3:4], alone)
