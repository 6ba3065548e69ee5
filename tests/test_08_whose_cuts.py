"""Step 08: the closed forms by hand, a network asked in another space, and Algorithm 1 of all."""

import pytest
import torch


@pytest.fixture
def noisy(sde, digits):
    """Six digits with noise at six times, which are not among the pictures: (x, t, pictures)."""
    t = torch.tensor([0.01, 0.05, 0.1, 0.2, 0.4, 0.8]).double()
    return sde.perturb(digits[:6], torch.randn(6, 1, 8, 8), t, sde.VP), t, digits[100:160]


@pytest.mark.parametrize("size, rows, columns", [(1, [3], [7]), (3, [2, 3, 4], [6, 7])])
def test_a_pixel_is_told_by_its_patch_alone(sde, whose_cuts, noisy, size, rows, columns):
    """Pixel (3, 7), at the rim, against the sum over pictures written out."""
    x, t, pictures = noisy
    eps = whose_cuts.local_denoiser(x, t, sde.VP, pictures, size)
    for k in range(len(x)):
        s, sigma, total, weights = sde.VP.s(t[k]), sde.VP.sigma(t[k]), 0.0, 0.0
        for y in pictures.double():
            gaps = [(x[k, 0, i, j] / s - y[0, i, j]) ** 2 for i in rows for j in columns]
            weight = torch.exp(-sum(gaps) / (2 * sigma**2))
            total, weights = total + weight * y[0, 3, 7], weights + weight
        expected = (x[k, 0, 3, 7] - s * total / weights) / (s * sigma)
        assert float(eps[k, 0, 3, 7]) == pytest.approx(float(expected), abs=1e-4)


def test_a_patch_that_covers_the_picture_is_proposition_1(sde, whose_cuts, noisy):
    x, t, pictures = noisy
    best = sde.plain_optimal_denoiser(x, t, sde.VP, pictures)
    found = (whose_cuts.local_denoiser(x, t, sde.VP, pictures, size) for size in (15, 13))
    off = [(eps - best).abs().max() for eps in found]
    assert off[0] < 1e-5 < off[1]


def test_the_gaussian_form_is_its_formula(sde, whose_cuts, noisy):
    x, t, pictures = noisy
    y, z = pictures.flatten(1).double(), x.flatten(1).double() / sde.VP.s(t)[:, None]
    mu, Sigma = y.mean(0), (y - y.mean(0)).T @ (y - y.mean(0)) / len(y)
    eps = whose_cuts.gaussian_denoiser(x, t, sde.VP, pictures).flatten(1)
    for k, sigma in enumerate(sde.VP.sigma(t)):
        gain = Sigma @ torch.linalg.inv(Sigma + sigma**2 * torch.eye(64))
        expected = (z[k] - mu - gain @ (z[k] - mu)) / sigma
        torch.testing.assert_close(eps[k].double(), expected, rtol=1e-4, atol=1e-4)


def test_a_network_of_the_other_space_hears_the_same_noise(sde, whose_cuts, noisy):
    x, t, pictures = noisy
    model = lambda x, u: sde.optimal_denoiser(x, u, sde.VP, pictures * 2 - 1)  # noqa: E731
    said = whose_cuts.ask_network(model, x, t, sde.VP)
    expected = sde.optimal_denoiser(x, t, sde.VP, pictures)
    torch.testing.assert_close(said, expected, rtol=1e-3, atol=1e-3)
    loud = sde.perturb(pictures, torch.randn_like(pictures), 1.0, sde.VP)  # its times end before
    heard = whose_cuts.ask_network(lambda x, u: x, loud, 1.0, sde.VP)
    assert float(heard.std()) == pytest.approx(1, abs=0.05)


def test_algorithm_1_asks_the_denoiser_that_it_is_given(sde, clustering, whose_cuts, digits):
    ask = lambda K, **how: clustering.plain_algorithm_1(digits, K, **how)[0]  # noqa: E731
    cuts = [ask(600, denoiser=form) for form in whose_cuts.FORMS.values()]
    assert cuts[0] == ask(600)
    t_1, t_2 = zip(*cuts, strict=True)
    assert sorted(t_1, reverse=True) == list(t_1) and t_1[0] > 5 * t_1[3] and t_1[4] == 0.001
    assert max(t_2) - min(t_2) < 0.05
