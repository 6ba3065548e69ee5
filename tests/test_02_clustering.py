"""Step 02: Algorithm 1 against quadrature on two pictures, the clusterings against enumeration."""

import itertools
import math

import numpy as np
import pytest
import torch


def two_point_similarities(sde, t, eta):
    """S to both ends for the data set {0, 1} of one-pixel pictures, by quadrature over eps."""
    sigma = float(sde.VP.sigma(t))
    eps = np.linspace(-8, 8, 40_001)
    density = np.exp(-(eps**2) / 2) / math.sqrt(2 * math.pi) * (eps[1] - eps[0])
    S0 = S1 = 0.0
    for y in (0.0, 1.0):
        z = y + sigma * eps
        y_hat = 1 / (1 + np.exp(np.clip((0.5 - z) / sigma**2, -700, 700)))
        S0 += 0.5 * density[np.abs(y_hat - y) / sigma <= eta].sum()
        S1 += 0.5 * density[np.abs(y_hat - 0.5) / sigma <= eta].sum()
    return S0, S1


def test_algorithm_1_equals_quadrature_on_two_pictures(sde, clustering):
    eta, alpha = 2 / 256, 0.9
    grid = np.linspace(1e-3, 1, 1500)
    S0, S1 = np.array([two_point_similarities(sde, t, eta) for t in grid]).T
    n = np.arange(1, len(grid) + 1)
    t_1 = grid[np.cumsum(S0) / n >= alpha].max()
    t_2 = grid[(np.cumsum(S1[::-1]) / n)[::-1] >= alpha].min()
    images = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    found = clustering.algorithm_1(images, samples=20_000, alpha=alpha, eta=eta)
    assert found == pytest.approx([t_1, t_2], abs=0.01)


def test_algorithm_1_on_digits(clustering, digits):
    runs = np.array([clustering.algorithm_1(digits, seed=seed) for seed in range(3)])
    assert runs.dtype == float and (runs[:, 0] < runs[:, 1]).all()
    assert runs.std(0).max() < 0.01  # the samples are many enough to agree between seeds
    assert (abs(runs.mean(0) - [0.095, 0.441]) < 0.01).all()
    literal = clustering.algorithm_1(digits, reference="literal")
    assert literal[1] > runs[:, 1].max() + 0.1  # the printed reference cuts much later


def test_similarity_counts_entries(clustering):
    a = torch.zeros(2, 1, 2, 2)
    b = torch.tensor([[0.0, 0.1], [0.2, 0.3]]).expand(2, 1, 2, 2)
    assert clustering.similarity(a, b, eta=0.15).tolist() == [0.5, 0.5]


def test_cut_reads_the_running_averages(clustering):
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    # averages from the left 1, 1, 0.9, 0.675, 0.54; from the right 0.56, 0.7, 0.93, 1, 1
    S0, S1 = torch.tensor([1.0, 1, 0.7, 0, 0]), torch.tensor([0.0, 0, 0.8, 1, 1])
    assert clustering.cut(t, S0, S1, 0.95) == pytest.approx([0.3, 0.7])
    assert clustering.cut(t, S0, S1, 0.91) == pytest.approx([0.3, 0.5])
    with pytest.raises(ValueError, match=r"alpha = 1\.5"):
        clustering.cut(t, S0, S1, 1.5)


@pytest.mark.parametrize(
    "images, settings, sentence",
    [
        (torch.zeros(1, 1, 4, 4), {}, "2 images"),
        (torch.full((3, 1, 4, 4), torch.nan), {}, "NaN"),
        (torch.rand(3, 1, 4, 4), {"samples": 1}, "samples = 1"),
        (torch.rand(3, 1, 4, 4), {"reference": "x"}, "unknown reference 'x'"),
        (torch.rand(3, 1, 4, 4), {"alpha": 1.1}, r"alpha = 1\.1"),
    ],
)
def test_bad_input(sde, clustering, images, settings, sentence):
    with pytest.raises(sde.BadInput, match=sentence):
        clustering.algorithm_1(images, **{"samples": 50, **settings})


def test_published_rivals(sde, clustering):
    assert clustering.snr_clusters(sde.VP, 3) == [0.348, 0.709]  # paper, Table 4
    assert clustering.timestep_clusters(3) == [0.334, 0.667]
    assert clustering.timestep_clusters(2) == pytest.approx([0.5], abs=0.002)
    assert clustering.snr_clusters(sde.VP, 1) == []


@pytest.mark.parametrize("n", [2, 3, 4])
def test_dynamic_program_equals_enumeration(clustering, n):
    v = np.sort(np.random.default_rng(n).normal(size=14))
    cost = clustering.middle_costs(v)

    def total(cuts):
        edges, price = [0, *cuts, len(v)], 0.0
        for i, j in itertools.pairwise(edges):
            if not len(v) / (2 * n) <= j - i <= 3 * len(v) / (2 * n):
                return math.inf
            middle = v[(i + j - 1) // 2]
            price += sum(abs(value - middle) for value in v[i:j])
        return price

    options = itertools.combinations(range(1, len(v)), n - 1)
    best = min(total(cuts) for cuts in options)
    found = clustering.contiguous_clusters(cost, n)
    assert total(found) == pytest.approx(best, abs=1e-5)


def test_more_clusters_than_times(sde, clustering):
    with pytest.raises(sde.BadInput, match="n = 11"):
        clustering.timestep_clusters(11, T=10)


def test_snr_matching(sde, clustering):
    moved = clustering.match_snr([0.442, 0.6308], sde.VP, sde.VE)
    assert moved == pytest.approx([2.511, 7.404], abs=1e-3)
    assert clustering.match_snr(moved, sde.VE, sde.VP) == pytest.approx([0.442, 0.6308])
