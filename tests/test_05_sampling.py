"""Step 05: solvers against closed forms and recorded trajectories, metrics against theirs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

GOLDEN = Path(__file__).parent / "golden" / "solvers.npz"


@pytest.mark.parametrize("kernel", ["VP", "VE"])
@pytest.mark.parametrize("name", ["probability-flow", "ddim", "dpm-solver-2", "dpm-solver-3"])
def test_each_solver_converges_at_its_order(sde, evaluation, name, kernel):
    order = evaluation.ORDER[name]
    errors = evaluation.solver_errors(
        evaluation.SAMPLERS[name], getattr(sde, kernel), [20, 40, 80], order
    )
    slope = math.log2(errors[1] / errors[2])
    assert slope == pytest.approx(order, abs=0.2)


def test_the_closed_form_flow_solves_the_ode(sde, evaluation):
    """The yardstick itself: z moves as dz/dsigma = eps, checked by finite differences."""
    c, mu, h = 0.5, 0.3, 1e-4
    x = torch.tensor([1.3], dtype=torch.float64).reshape(1, 1, 1, 1)

    def flow_to(t):
        class Until(sde.VP):
            t_min = t

        return evaluation.gaussian_flow(Until, x, mu, c) / float(sde.VP.s(t))

    t = 0.4
    slope = (flow_to(t + h) - flow_to(t - h)) / float(sde.VP.sigma(t + h) - sde.VP.sigma(t - h))
    eps = evaluation.gaussian_noise(sde.VP, mu, c)(flow_to(t) * float(sde.VP.s(t)), t)
    torch.testing.assert_close(slope, eps, rtol=1e-6, atol=0)


recorded = [
    pytest.param(row, id=row["key"])
    for row in json.loads(str(np.load(GOLDEN)["meta"]))
    if row["algorithm"] == "dpmsolver"
    and (row["method"], row["skip_type"]) == ("singlestep", "logSNR")
]


@pytest.mark.parametrize("row", recorded)
def test_recorded_trajectories_of_the_release(sde, evaluation, row):
    golden = np.load(GOLDEN)

    class Until(sde.VP):
        t_min = row["t_end"]

    eps = evaluation.gaussian_noise(Until, float(golden["mu"]), float(golden["c"]))
    x_T = torch.tensor(golden["x_T"])
    *_, x = evaluation.dpm_solver(eps, Until, x_T, row["steps"], order=row["order"])
    np.testing.assert_allclose(x.numpy(), golden[row["key"]], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name, kw", [("euler-maruyama", {}), ("ddim", {"eta": 1.0})])
def test_stochastic_solvers_reach_the_distribution(sde, evaluation, name, kw):
    mu, c, n = 0.3, 0.5, 20_000
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n, 1, 1, 1, generator=generator, dtype=torch.float64)
    eps = evaluation.gaussian_noise(sde.VP, mu, c)
    *_, x = evaluation.SAMPLERS[name](eps, sde.VP, start, 200, generator, **kw)
    assert x.mean().item() == pytest.approx(mu, abs=5 * c / math.sqrt(n))
    assert x.std().item() == pytest.approx(c, rel=0.03)


@pytest.mark.parametrize("name", ["ddim", "dpm-solver-2", "dpm-solver-3", "euler-maruyama"])
@pytest.mark.parametrize("nfe", [1, 2, 3, 7, 12, 20])
def test_evaluations_are_as_many_as_asked(sde, evaluation, name, nfe):
    count = []

    def eps(x, t):
        assert t.shape == (2,)
        count.append(t)
        return x

    *_, x = evaluation.SAMPLERS[name](eps, sde.VP, torch.randn(2, 1, 4, 4), nfe)
    assert len(count) == nfe and x.shape == (2, 1, 4, 4)


@pytest.fixture
def model(unet):
    return unet.randomize(unet.build("digits", encoder=8, decoders=(8, 8, 8), attention=()))


def test_sampling_does_not_depend_on_the_batch(evaluation, model):
    a = evaluation.sample(model, "vp", 7, "dpm-solver-3", 5, seed=2, batch=7)
    b = evaluation.sample(model, "vp", 7, "dpm-solver-3", 5, seed=2, batch=3)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    other = evaluation.sample(model, "vp", 7, "dpm-solver-3", 5, seed=3, batch=7)
    assert (a - other).abs().max() > 0.1


def test_sampling_walks_through_the_stages_from_noise_to_image(evaluation, model):
    calls = []
    evaluation.sample(model, "vp", 2, "ddim", 12, calls=calls)
    assert len(calls) == 12 and calls == sorted(calls, reverse=True) and set(calls) == {0, 1, 2}


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"sampler": "rk4"}, "unknown sampler 'rk4': take one of ddim"),
        ({"nfe": 0}, "nfe = 0"),
        ({"n": 0}, "samples = 0"),
    ],
)
def test_impossible_sampling(sde, evaluation, model, change, sentence):
    with pytest.raises(sde.BadInput, match=sentence):
        evaluation.sample(model, "vp", **{"n": 2, **change})


@pytest.fixture(scope="module")
def measured(sde, evaluation):
    pixels, labels = sde.load_images("digits")
    classifier, accuracy = evaluation.train_classifier(pixels, labels, steps=150)
    return pixels, classifier, accuracy, evaluation.register(classifier)


def test_the_classifier_knows_digits(measured):
    _, classifier, accuracy, _ = measured
    assert accuracy > 0.93
    assert not classifier.training


def test_metrics_rank_real_noisy_and_noise(evaluation, measured):
    pixels, _, _, extractor = measured
    half, other = evaluation.real_halves(pixels, 400)
    sets = [other, (other + 0.3 * torch.randn_like(other)).clamp(0, 1), torch.rand_like(other)]
    found = [evaluation.evaluate(images, half, extractor) for images in sets]
    assert found[0]["frechet"] < found[1]["frechet"] < found[2]["frechet"]
    assert found[0]["kid"] < found[1]["kid"] < found[2]["kid"]
    assert found[0]["precision"] > 0.7 > 0.5 > found[2]["precision"]
    assert found[0]["recall"] > 0.7 > 0.3 > found[2]["recall"]
    assert found[0]["samples"] == 400
    assert not any("fid" in key for key in found[0])  # the name belongs to Inception


def test_frechet_distance_equals_its_formula(evaluation, measured):
    pixels, classifier, _, extractor = measured
    half, other = evaluation.real_halves(pixels, 300)
    noisy = (other + 0.3 * torch.randn_like(other)).clamp(0, 1)
    stats = []
    for images in (noisy, half):
        with torch.no_grad():
            f = classifier.body((images * 255).round() / 255).double().numpy()
        stats.append((f.mean(0), np.cov(f, rowvar=False)))
    (m1, c1), (m2, c2) = stats
    root = scipy.linalg.sqrtm(c1 @ c2).real
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * root)
    found = evaluation.evaluate(noisy, half, extractor)["frechet"]
    assert found == pytest.approx(expected, rel=1e-3)


def test_precision_and_recall_are_not_swapped(evaluation, measured):
    """Copies of a few real pictures: every sample is real, most of the real is missing."""
    pixels, _, _, extractor = measured
    half, _ = evaluation.real_halves(pixels, 300)
    few = half[:12].repeat(25, 1, 1, 1)
    found = evaluation.evaluate(few, half, extractor)
    assert found["precision"] == 1.0 and found["recall"] < 0.5


def test_halves_are_disjoint_and_bounded(sde, evaluation, measured):
    pixels = torch.arange(100, dtype=torch.uint8).reshape(100, 1, 1, 1)
    a, b = evaluation.real_halves(pixels, 50)
    assert len(set(a.flatten().tolist()) | set(b.flatten().tolist())) == 100
    with pytest.raises(sde.BadInput, match="samples = 51 is more than half the data set: take 50"):
        evaluation.real_halves(pixels, 51)


def test_sets_that_cannot_be_compared(sde, evaluation, measured):
    extractor = measured[3]
    with pytest.raises(sde.BadInput, match="10 or more"):
        evaluation.evaluate(torch.rand(5, 1, 8, 8), torch.rand(20, 1, 8, 8), extractor)
    with pytest.raises(sde.BadInput, match="of one size"):
        evaluation.evaluate(torch.rand(20, 1, 9, 9), torch.rand(20, 1, 8, 8), extractor)


def test_missing_inception_weights_are_one_sentence(sde, evaluation, monkeypatch):
    def offline(**kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torch_fidelity.calculate_metrics", offline)
    pictures = torch.rand(20, 3, 32, 32)
    with pytest.raises(sde.BadInput, match="weights of inception-v3-compat cannot be had"):
        evaluation.evaluate(pictures, pictures, "inception-v3-compat")
    assert evaluation.pick_extractor("cifar10", None, None) == (
        "inception-v3-compat",
        "Inception: FID",
    )
