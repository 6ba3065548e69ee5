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


def test_plain_algorithm_1_equals_quadrature_on_two_pictures(clustering):
    """The same data set by the printed lines alone, and its averages against plain sums."""
    images = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    eta, alpha = 2 / 256, 0.9
    expected = clustering.algorithm_1(images, samples=20_000, alpha=alpha, eta=eta)
    found, S_0, S_1, (tau, up, down) = clustering.plain_algorithm_1(images, 4000, alpha, eta)
    assert found == pytest.approx(expected, abs=0.03)
    assert S_0.shape == S_1.shape == (2, 4000) and len(tau) == len(up) == len(down) == 9999
    at = 4321
    low = [D for t, D in S_0.T.tolist() if t <= tau[at]]
    high = [D for t, D in S_1.T.tolist() if t >= tau[at]]
    assert up[at] == pytest.approx(sum(low) / len(low))
    assert down[at] == pytest.approx(sum(high) / len(high))


def test_plain_algorithm_1_on_digits(clustering, digits):
    """Its averages at a time have the expectation of the fast form's; its cuts scatter more."""
    fast = clustering.similarity_curves(digits, samples=20_000)
    cuts = clustering.read_cuts(fast)
    at = np.searchsorted(clustering.running_averages(fast)[0], cuts)
    runs = [clustering.plain_algorithm_1(digits, 500, seed=seed) for seed in range(12)]
    kept = np.array([[float(up[at[0]]), float(down[at[1]])] for *_, (_, up, down) in runs])
    error = kept.std(0, ddof=1) / 12**0.5
    assert (abs(kept.mean(0) - 0.9) < 4 * error + 0.002).all() and error.max() < 0.02
    assert (abs(np.mean([run[0] for run in runs], 0) - cuts) < 0.02).all()
    # a threshold that nothing keeps, or all: no error, but an empty or a full stage
    assert clustering.plain_algorithm_1(digits[:9], 50, alpha=1.1)[0] == [0.001, 1.0]


def test_mean_denoiser_is_the_optimal_one_where_the_picture_is_lost(sde, clustering, digits):
    """Of a data set that holds its mean alone, at every time; of `digits`, near the noise end."""
    eps, y_mean = torch.randn(20, 1, 8, 8), digits.mean(0, keepdim=True)
    for t, images in ((0.4, y_mean), (1.0, digits)):
        x = sde.perturb(digits[:20], eps, t, clustering.VP)
        best = sde.optimal_denoiser(x, t, clustering.VP, images)
        found = clustering.mean_denoiser(x, t, clustering.VP, y_mean)
        torch.testing.assert_close(found, best, rtol=0, atol=1e-4 if len(images) == 1 else 2e-3)


def test_algorithm_1_on_digits(clustering, digits):
    runs = np.array([clustering.algorithm_1(digits, seed=seed) for seed in range(3)])
    assert runs.dtype == float and (runs[:, 0] < runs[:, 1]).all()
    assert runs.std(0).max() < 0.005  # the samples are many enough to agree between seeds
    assert (abs(runs.mean(0) - [0.096, 0.441]) < 0.004).all()
    literal = clustering.algorithm_1(digits, reference="literal")
    assert literal[1] > runs[:, 1].max() + 0.1  # the printed reference cuts much later


def test_cuts_are_unbiased_and_their_errors_honest(clustering, digits):
    """40 runs with K = 500 scatter around a run with K = 40,000, by as much as they say."""
    truth = np.array(clustering.algorithm_1(digits, samples=40_000, seed=99))
    runs = [clustering.similarity_curves(digits, samples=500, seed=seed) for seed in range(40)]
    cuts = np.array([clustering.read_cuts(run) for run in runs])
    said = np.array([clustering.standard_errors(run, clustering.read_cuts(run)) for run in runs])
    spread = cuts.std(0, ddof=1)
    assert (abs(cuts.mean(0) - truth) < 3.5 * spread / 40**0.5 + 0.0005).all()
    assert (0.6 * spread < said.mean(0)).all() and (said.mean(0) < 1.8 * spread).all()


def test_samples_go_where_they_tell(clustering, digits):
    """The spread over seeds is far below that of one sample in each of K equal slices."""
    spread = np.std([clustering.algorithm_1(digits, samples=1000, seed=s) for s in range(12)], 0)

    def plain(seed):
        cells, generator = np.linspace(1e-3, 1, 201), torch.Generator().manual_seed(seed)
        settings = np.full(200, 5), generator, digits, clustering.VP, False
        return clustering.read_cuts(clustering.sample_cells(cells, *settings))

    uniform = np.std([plain(s) for s in range(12)], 0)
    assert (spread**2).sum() < 0.7 * (uniform**2).sum()


def test_an_unlucky_pilot_does_no_harm(clustering, digits):
    """Where its two samples a cell put t_1 too early, the cells at the true t_1 are sampled too."""
    edges = np.linspace(0, 1, 101)
    centre = (edges[1:] + edges[:-1]) / 2
    S0 = np.clip(1.3 - 2 * centre, 0, 1)
    S, none = np.stack([S0, S0[::-1]]), np.zeros((2, 100))
    tight = clustering.Curves(edges, S, none)
    loose = clustering.Curves(edges, S, none + [[0.08], [0]])
    t_1, t_2 = clustering.read_cuts(tight, 0.9)
    error, _ = clustering.standard_errors(loose, [t_1, t_2], 0.9)
    assert error > 0.02
    sampled = centre[(clustering.weigh_cells(loose, 0.9) > 0) & (centre < (t_1 + t_2) / 2)]
    assert abs(sampled[-1] - (t_1 + 2 * error)) < 0.01
    sampled = centre[(clustering.weigh_cells(tight, 0.9) > 0) & (centre < (t_1 + t_2) / 2)]
    assert abs(sampled[-1] - (t_1 + 0.03)) < 0.01
    cuts = []
    for seed in range(10):  # the same pictures in other orders: other luck
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
        cuts.append(clustering.algorithm_1(digits[order], seed=seed))
    assert np.std(cuts, 0).max() < 0.002


def test_similarity_counts_entries(clustering):
    a = torch.zeros(2, 1, 2, 2)
    b = torch.tensor([[0.0, 0.1], [0.2, 0.3]]).expand(2, 1, 2, 2)
    assert clustering.similarity(a, b, eta=0.15).tolist() == [0.5, 0.5]


def test_cut_reads_the_running_averages(clustering):
    edges = np.linspace(0, 1, 501)
    S0, S1 = np.repeat([1.0, 1, 0.5, 0, 0], 100), np.repeat([0.0, 0, 0.5, 1, 1], 100)
    curves = clustering.Curves(edges, np.stack([S0, S1]), np.zeros((2, 500)))
    # the area 0.4 + 0.5 (tau - 0.4) is 0.9 tau at tau = 0.5, and the same from the right
    tau, low, high = clustering.running_averages(curves)
    assert tau[low >= 0.9][-1] == pytest.approx(0.5, abs=2e-4)
    assert tau[high >= 0.9][0] == pytest.approx(0.5, abs=2e-4)
    assert clustering.read_cuts(curves, 0.95) == pytest.approx([4 / 9, 5 / 9], abs=2e-4)
    with pytest.raises(ValueError, match=r"alpha = 1\.5"):
        clustering.read_cuts(curves, 1.5)


@pytest.mark.parametrize(
    "images, settings, sentence",
    [
        (torch.zeros(1, 1, 4, 4), {}, "2 images"),
        (torch.rand(3, 1, 4, 4), {"samples": 20}, "samples = 20"),
        (torch.rand(3, 1, 4, 4), {"alpha": 1.1}, r"alpha = 1\.1"),
    ],
)
def test_bad_input(workshop, sde, clustering, images, settings, sentence):
    with pytest.raises(workshop.BadInput, match=sentence):
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

    one_by_one = np.zeros((14, 14))
    for i, j in itertools.combinations_with_replacement(range(14), 2):
        one_by_one[i, j] = np.abs(v[i : j + 1] - v[(i + j) // 2]).sum()
    np.testing.assert_allclose(cost, one_by_one, atol=1e-12)
    options = itertools.combinations(range(1, len(v)), n - 1)
    best = min(total(cuts) for cuts in options)
    assert total(clustering.contiguous_clusters(cost, n)) == pytest.approx(best, abs=1e-5)


def test_more_clusters_than_times(workshop, sde, clustering):
    with pytest.raises(workshop.BadInput, match="n = 11"):
        clustering.timestep_clusters(11, T=10)


def test_gradient_clusters_follow_the_affinity(clustering):
    """Three blocks of like gradients are found; too many stages are refused."""
    block = np.repeat([0, 1, 2], [30, 45, 25])
    affinity = (block[:, None] == block[None]).astype(float)
    assert clustering.gradient_clusters(affinity, 3) == pytest.approx([0.31, 0.76])
    with pytest.raises(ValueError, match="n = 101"):
        clustering.gradient_clusters(affinity, 101)


def test_task_affinity_is_the_cosine_of_gradients(clustering):
    direction = lambda t: torch.tensor([np.cos(t), np.sin(t)]) * (1 + t)  # noqa: E731
    times = np.arange(1, 6) / 5
    expected = np.cos(times[:, None] - times[None])
    np.testing.assert_allclose(clustering.task_affinity(direction, T=5), expected, atol=1e-6)


def test_small_network_learns_and_yields_its_gradients(clustering, digits):
    nets = clustering.small_network_gradients(digits, steps=40, checkpoints=2, batch=16, width=8)
    matrices = [clustering.task_affinity(gradient, T=10) for gradient in nets]
    assert len(matrices) == 2 and not np.allclose(*matrices)
    for affinity in matrices:
        np.testing.assert_allclose(np.diag(affinity), 1, rtol=1e-5)
        near, far = affinity[4, 5], affinity[0, 9]
        assert near > far  # neighbours in time want alike changes


def pairwise(clustering, sde, images, t_a, t_b, runs=4000):
    """S of Eq. 6 for one pair by plain Monte Carlo, every sample its own picture and noise."""
    y = images[torch.randint(len(images), (runs,))]
    eps = torch.randn_like(y)
    seen = []
    for t in (t_a, t_b):
        times = torch.full((runs,), t).double()
        xt = sde.perturb(y, eps, times, sde.VP)
        seen.append(sde.optimal_denoiser(xt, times, sde.VP, images))
    return clustering.similarity(*seen).mean().item()


def test_similarity_matrix_holds_equation_6(sde, clustering, digits):
    S = clustering.plain_similarity_matrix(digits, 400)
    assert S.shape == (21, 21) and np.allclose(S, S.T) and np.allclose(np.diag(S), 1)
    assert (S >= 0).all() and (S <= 1).all()
    for a, b in ((1, 3), (4, 5), (8, 12), (15, 20)):
        times = float(clustering.NODES[a]), float(clustering.NODES[b])
        assert S[a, b] == pytest.approx(pairwise(clustering, sde, digits, *times), abs=0.06)
    pictures = clustering.plain_similarity_matrix(digits, 50, function=sde.posterior_mean)
    assert not np.allclose(S, pictures, atol=0.1)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_best_intervals_equal_enumeration(clustering, n):
    root = np.random.default_rng(n).random((21, 6))
    S = root @ root.T / 6

    def price(first):
        blocks = [S[i:j, i:j] for i, j in itertools.pairwise([0, *first, 21])]
        return sum((1 - block)[np.triu_indices(len(block), 1)].sum() for block in blocks)

    nodes = np.asarray(clustering.NODES)
    np.fill_diagonal(S, 1.0)
    best = min(itertools.combinations(range(1, 21), n - 1), key=price)
    expected = [(nodes[k - 1] + nodes[k]) / 2 for k in best]
    assert clustering.best_intervals(S, n) == pytest.approx(expected)


def test_algorithm_2_on_digits(sde, clustering, digits):
    cuts = clustering.algorithm_2(digits, 3, samples=100)
    assert len(cuts) == 2 and cuts == sorted(cuts) and all(type(tau) is float for tau in cuts)
    moved = clustering.algorithm_2(digits, 3, kernel=sde.EDM, samples=100)
    assert sde.match_snr(moved, sde.EDM, sde.VP) == pytest.approx(cuts)
    # the same optimal denoiser seen through another kernel: the same similarities at the same SNR
    y, eps, seen = digits[:50], torch.randn(50, 1, 8, 8), []
    for kernel in (sde.VP, sde.EDM):
        t_a, t_b = sde.match_snr([0.3, 0.5], sde.VP, kernel)
        xs = [(sde.perturb(y, eps, t, kernel), t, kernel, digits) for t in (t_a, t_b)]
        seen.append(clustering.similarity(*[sde.optimal_denoiser(*x) for x in xs]))
    assert (seen[0] - seen[1]).abs().max() <= 1 / 64  # a pixel on the edge of eta may fall
    with pytest.raises(ValueError, match="n = 22"):
        clustering.algorithm_2(digits, 22)
