"""Step 05: solvers against closed forms and recorded trajectories, metrics against theirs."""

import json
import math
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity
from conftest import Hostile
from torch_fidelity import feature_extractor_inceptionv3 as inception

GOLDEN = Path(__file__).parent / "golden" / "solvers.npz"


ORDERS = {"probability-flow": 1, "ddim": 1, "heun": 2, "deis-0": 1, "deis-1": 2, "deis-2": 3}
ORDERS |= {"deis-3": 3, "dpm-solver-1": 1, "dpm-solver-2": 2, "dpm-solver-3": 3}
ORDERS |= {"dpm-solver-2m": 2, "dpm-solver-3m": 3, "dpm-solver++-2": 2, "dpm-solver++-3": 3}
ORDERS |= {"dpm-solver++-2m": 2, "dpm-solver++-3m": 3}


@pytest.mark.parametrize("name", ORDERS)
def test_each_solver_converges_at_its_order(sde, evaluation, name):
    assert evaluation.ORDER == ORDERS
    kernel = sde.EDM if name == "heun" else sde.VP  # heun ends at sigma = 0, beyond t_min
    errors = evaluation.solver_errors(name, kernel, [40, 80, 160])
    assert errors[-1] < errors[0] / 2.5
    assert math.log2(errors[1] / errors[2]) == pytest.approx(ORDERS[name], abs=0.35)


def test_the_yardstick_solves_the_ode(sde, evaluation):
    """For one Gaussian the flow is known in closed form; for a mixture dz/dsigma = eps holds."""
    c, mu = 0.5, 0.3
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(-1, 1, 1, 1)
    z, sigma, end = x / sde.VP.s(1.0), float(sde.VP.sigma(1.0)), 0.7
    exact = mu + (z - mu) * math.sqrt((c**2 + end**2) / (c**2 + sigma**2))
    found = evaluation.mixture_flow(sde.VP, x, end, (mu,), c)
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-9)
    h = 1e-4
    ends = [evaluation.mixture_flow(sde.VP, x, end + d) for d in (-h, 0, h)]
    t = sde.VP.time(torch.tensor(-2 * math.log(end), dtype=torch.float64))
    eps = evaluation.mixture_noise(sde.VP)(ends[1] * sde.VP.s(t), t)
    torch.testing.assert_close((ends[2] - ends[0]) / (2 * h), eps, rtol=1e-4, atol=1e-5)


def test_noise_levels_are_plain_numbers(sde, evaluation):
    """And z = x / s is undone by `unscale`, for every kernel."""
    for kernel in sde.EVERY_KERNEL:
        x = torch.randn(2, 1, 2, 2, dtype=torch.float64)
        for grid in ("log-snr", "time", "quadratic"):
            z, sigmas = evaluation.levels(kernel, x, 7, grid)
            assert len(sigmas) == 8 and all(type(sigma) is float for sigma in sigmas)
            torch.testing.assert_close(evaluation.unscale(kernel, z, sigmas[0]), x)


def test_the_line_behind_all_solvers(sde, evaluation):
    """dz/dsigma = eps, from f, g, s and sigma of the kernels and the ODE of step 01."""
    x, e, h = 0.7, -1.3, 1e-5
    for kernel in (sde.VP, sde.DDPM, sde.VE, sde.Flow):
        t = 0.40042
        s, sigma = kernel.s(t), kernel.sigma(t)
        dx = kernel.f(t) * x + kernel.g(t) ** 2 / (2 * s * sigma) * e
        ds, dsigma = ((of(t + h) - of(t - h)) / (2 * h) for of in (kernel.s, kernel.sigma))
        assert float((dx / s - x * ds / s**2) / dsigma) == pytest.approx(e, rel=1e-6)


@pytest.mark.parametrize("nfe", [6, 15, 30])  # of one huge step the rounding is magnified
def test_the_plain_solvers_are_the_general_one(sde, evaluation, nfe):
    eps, x = evaluation.mixture_noise(sde.VP), torch.randn(6, 1, 2, 2, dtype=torch.float64)
    for plain, orders in (
        (evaluation.ddim, [1] * nfe),
        (evaluation.dpm_solver_3, [3] * (nfe // 3)),
    ):
        general = evaluation.dpm_solver(eps, sde.VP, x, nfe, orders=orders)
        for a, b in zip(plain(eps, sde.VP, x, nfe), general, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


recorded = [pytest.param(r, id=r["key"]) for r in json.loads(str(np.load(GOLDEN)["meta"]))]


@pytest.mark.parametrize("row", recorded)
def test_recorded_trajectories_of_the_release(sde, evaluation, row):
    golden = np.load(GOLDEN)
    mu, c = float(golden["mu"]), float(golden["c"])

    class Until(type(sde.VP)):
        t_min = row.get("t_end")

    if row["algorithm"] == "edm_heun":
        eps, start = evaluation.mixture_noise(sde.EDM, (mu,), c), torch.tensor(golden["edm_z"])
        *_, x = evaluation.heun(eps, sde.EDM, start * row["sigma_max"], 2 * row["num_steps"] - 1)
    else:
        eps, start = evaluation.mixture_noise(Until(), (mu,), c), torch.tensor(golden["x_T"])
        how = dict(order=row["order"], plus=row["algorithm"].endswith("++"))
        how["grid"] = {"logSNR": "log-snr", "time_uniform": "time"}[row["skip_type"]]
        solver = evaluation.dpm_solver
        if row["method"] == "multistep":
            solver, how["released"] = evaluation.dpm_multistep, True
        *_, x = solver(eps, Until(), start, row["steps"], **how)
    np.testing.assert_allclose(x.numpy(), golden[row["key"]], rtol=1e-8, atol=1e-8)


def test_what_the_lesson_says_of_the_measured_orders(sde, evaluation):
    """Heun's slope before its last step; probability_flow is DDIM where s = 1, and not with VP."""

    def all_but_the_last(*args):
        yield [*evaluation.heun(*args)][-2]

    errors = evaluation.measure_errors(all_but_the_last, sde.VP, [129, 255])
    assert math.log(errors[0] / errors[1], 255 / 129) == pytest.approx(2.05, abs=0.005)
    x, found = torch.randn(6, 1, 2, 2, dtype=torch.float64), {}
    for kernel in (sde.EDM, sde.VP):
        eps, pair = evaluation.mixture_noise(kernel), (evaluation.ddim, sde.probability_flow)
        found[kernel.name] = [[*solver(eps, kernel, x, 9)][-1] for solver in pair]
    torch.testing.assert_close(*found["EDM"], rtol=1e-9, atol=1e-9)
    assert (found["VP"][0] - found["VP"][1]).abs().max() > 0.01


@pytest.mark.parametrize("c", [-1, 1])
@pytest.mark.parametrize("h", [0.1, 1.7])
def test_the_integrals_of_powers(evaluation, c, h):
    points, weights = np.polynomial.legendre.leggauss(30)
    tau = h * (points + 1) / 2
    exact = [(h / 2 * weights * np.exp(c * (tau - h)) * (tau / h) ** k).sum() for k in range(3)]
    assert evaluation.power_integrals(h, c) == pytest.approx(exact, rel=1e-10)


def test_the_release_loses_an_order_of_the_third_order_multistep_solver(sde, evaluation):
    """Its halved term leaves order 2; the name's claim holds with the whole term."""
    released = partial(evaluation.dpm_multistep, order=3, released=True)
    errors = evaluation.measure_errors(released, sde.VP, [80, 160])
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.2)


STOCHASTIC = [(name, {}) for name in ("euler-maruyama", "ancestral", "predictor-corrector")]
STOCHASTIC += [("gddim", {"lam": 0.5}), ("gddim", {"lam": 1.0})]


@pytest.mark.parametrize("name, kw", STOCHASTIC)
def test_stochastic_solvers_reach_the_distribution(sde, evaluation, name, kw):
    """Mean and covariance of the samples are those of the mixture."""
    n, steps = 8_000, 400
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n, 1, 1, 2, generator=generator, dtype=torch.float64)
    eps = evaluation.mixture_noise(sde.VP)
    *_, x = evaluation.SAMPLERS[name](eps, sde.VP, start, steps, generator, **kw)
    means = np.array(evaluation.MEANS)
    variance = means.var() + evaluation.WIDTH**2
    x = x.flatten(1)
    assert x.mean(0).tolist() == pytest.approx([means.mean()] * 2, abs=5 * (variance / n) ** 0.5)
    # the corrector's finite steps widen the result by a factor of 1 / (1 - snr^2), 1.3% in length
    covariance = torch.cov(x.T)
    assert covariance.diagonal().tolist() == pytest.approx([variance] * 2, rel=0.06)
    assert covariance[0, 1].item() == pytest.approx(0, abs=5 * variance / n**0.5)


def test_gddim_has_ddim_and_ddpm_at_its_ends(sde, evaluation):
    eps, start = evaluation.mixture_noise(sde.VP), torch.randn(5, 1, 2, 2, dtype=torch.float64)
    for lam, solver in ((0.0, evaluation.ddim), (1.0, evaluation.ancestral)):
        dice = [torch.Generator().manual_seed(0) for _ in range(2)]
        *_, a = evaluation.gddim(eps, sde.VP, start, 9, dice[0], lam=lam, grid="quadratic")
        *_, b = solver(eps, sde.VP, start, 9, dice[1], grid="quadratic")
        torch.testing.assert_close(a, b)


def test_rk45_meets_its_tolerance(sde, evaluation):
    start, calls = torch.randn(6, 1, 2, 2, dtype=torch.float64), []
    exact = evaluation.mixture_noise(sde.VP)
    eps = lambda x, t: calls.append(t) or exact(x, t)  # noqa: E731
    end = evaluation.mixture_flow(sde.VP, start, float(sde.VP.sigma(sde.VP.t_min)))
    for tolerance in (1e-4, 1e-8):
        calls.clear()
        *_, x = evaluation.rk45(eps, sde.VP, start, tolerance=tolerance)
        assert (x / sde.VP.s(sde.VP.t_min) - end).abs().max() < 30 * tolerance
        assert 20 < len(calls) < 2000


@pytest.mark.parametrize("nfe", [1, 2, 3, 7, 12, 20])
def test_evaluations_are_as_many_as_asked(workshop, sde, evaluation, nfe):
    start, count = torch.randn(2, 1, 4, 4), []
    eps = lambda x, t: count.append(len(t)) or x  # noqa: E731
    for name, solver in evaluation.SAMPLERS.items():
        count.clear()
        if {"predictor-corrector": 1, "heun": 0}.get(name) == nfe % 2:
            with pytest.raises(workshop.BadInput, match=f"nfe = {nfe}"):
                list(solver(eps, sde.VP, start, nfe))
        elif name != "rk45":  # which takes as many as it needs
            *_, x = solver(eps, sde.VP, start, nfe)
            assert count == [2] * nfe and x.shape == (2, 1, 4, 4), name
            assert x.dtype == torch.float32


@pytest.fixture
def model(unet):
    return unet.randomize(unet.build_network("digits", encoder=8, decoders=(8, 8, 8), attention=()))


def test_grids(workshop, sde, evaluation, model):
    for grid in ("log-snr", "time", "quadratic"):
        times = evaluation.time_grid(sde.VP, 10, grid)
        assert times[[0, -1]].tolist() == pytest.approx([1, 1e-3]) and (times.diff() < 0).all()
    assert times[5] == pytest.approx(((1 + 1e-3**0.5) / 2) ** 2)
    draw = lambda **how: evaluation.sample(model, "vp", 2, "ddim", 4, seed=3, **how)  # noqa: E731
    assert torch.equal(draw(), draw(grid="log-snr"))
    assert not torch.equal(draw(), draw(grid="time"))
    with pytest.raises(workshop.BadInput, match="unknown grid 'cubic'"):
        draw(grid="cubic")
    with pytest.raises(workshop.BadInput, match="'heun' has a grid of its own"):
        evaluation.solver_of("heun", "time")


@pytest.mark.parametrize("name", ["dpm-solver-3", "ancestral", "euler-maruyama"])
def test_a_picture_depends_on_seed_and_index_alone(evaluation, model, name):
    whole = evaluation.sample(model, "vp", 7, name, 5, seed=2, batch=7)
    parts = evaluation.sample(model, "vp", 7, name, 5, seed=2, batch=3)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)
    later = evaluation.sample(model, "vp", 3, name, 5, seed=2, first=4)
    torch.testing.assert_close(whole[4:], later, rtol=1e-4, atol=1e-4)
    other = evaluation.sample(model, "vp", 7, name, 5, seed=3, batch=7)
    assert (whole - other).abs().max() > 0.1


def test_a_set_is_drawn_in_shards_and_goes_on(
    workshop, evaluation, model, tmp_path, monkeypatch, capsys
):
    how = dict(sampler="ancestral", nfe=4, seed=2, batch=2)
    draw = lambda n, name="one", **more: evaluation.draw_set(  # noqa: E731
        model, "vp", tmp_path / name, n, shard=3, **{**how, **more}
    )
    whole = draw(7)
    assert whole.shape == (7, 1, 8, 8) and whole.dtype == torch.uint8
    assert "7 pictures, 7 drawn in" in capsys.readouterr().out
    drawn, plain = [], evaluation.sample

    def counted(model, process, n, first=0, **how):
        drawn.append((first, n))
        return plain(model, process, n, first=first, **how)

    monkeypatch.setattr(evaluation, "sample", counted)
    (folder,) = tmp_path.glob("one-*")
    (folder / "0000003-3.npy").unlink()  # killed before this one
    for name in ("._0000003-3.npy", "best.png", "0000003-3.npy.part7"):  # not the set's own names
        (folder / name).write_bytes(b"")
    (folder / "0000009-3.npy.png").mkdir()
    assert torch.equal(draw(7), whole) and drawn == [(3, 3)]
    drawn.clear(), capsys.readouterr()
    assert torch.equal(draw(7), whole) and drawn == []
    assert capsys.readouterr().out == "7 pictures, already drawn\n"
    assert torch.equal(draw(9)[:6], whole[:6]) and drawn == [(6, 3)]  # it was a single picture

    drawn.clear()
    local, barrier = threading.local(), threading.Barrier(2)  # two threads in place of processes
    monkeypatch.setattr("torch.distributed.barrier", barrier.wait)
    monkeypatch.setattr(workshop, "ranks", lambda: (local.rank, 2))

    def share(rank):
        local.rank = rank
        return draw(7, "two")

    with ThreadPoolExecutor(2) as pool:
        assert all(torch.equal(each, whole) for each in pool.map(share, range(2)))
    assert sorted(drawn) == [(0, 3), (3, 3), (6, 1)]


def test_a_set_is_known_by_all_that_made_it(evaluation, model, tmp_path):
    """Above all by the weights: those of another training stop at the same step."""
    how = dict(sampler="ddim", nfe=2, seed=2, label=None, decode=torch.sigmoid)
    draw = lambda **more: evaluation.draw_set(model, "vp", tmp_path / "s", 3, **{**how, **more})  # noqa: E731
    plain, again = draw(), draw()
    assert torch.equal(plain, again) and len([*tmp_path.iterdir()]) == 1
    changed = [dict(nfe=3), dict(seed=3), dict(sampler="ancestral"), dict(grid="time")]
    changed.append(dict(decode=lambda x: torch.sigmoid(2 * x), also=[torch.tensor(2)]))
    for i, more in enumerate(changed):
        assert not torch.equal(draw(**more), plain) and len([*tmp_path.iterdir()]) == i + 2
    with torch.no_grad():
        next(model.parameters()).add_(0.3)
    assert not torch.equal(draw(), plain) and len([*tmp_path.iterdir()]) == len(changed) + 2


def test_equivalent_work_is_weighted_by_evaluations(evaluation, unet, model):
    whole = unet.build_network("digits", encoder=8, decoders=(8, 8, 8), boundaries=unet.PUBLISHED)
    count, share = evaluation.stage_shares(whole, "vp", "dpm-solver-3", 20)
    assert count == 20 and share == {0: 11 / 20, 1: 2 / 20, 2: 7 / 20}
    count, share = evaluation.stage_shares(whole, "vp", "rk45", 20)
    assert count > 20 and sum(share.values()) == pytest.approx(1)
    calls = []  # from noise to image
    evaluation.sample(model, "vp", 2, "ddim", 12, calls=calls)
    assert len(calls) == 12 and calls == sorted(calls, reverse=True) and set(calls) == {0, 1, 2}


@pytest.fixture(scope="module")
def measured(workshop, evaluation):
    """The digits, and the features that they are measured with."""
    return workshop.load_images("digits")[0], evaluation.pick_extractor("digits")[0]


def test_metrics_rank_real_noisy_and_noise(evaluation, measured):
    pixels, features = measured
    half, other = (part / 255 for part in evaluation.real_halves(pixels, 400))
    sets = [other, (other + 0.3 * torch.randn_like(other)).clamp(0, 1), torch.rand_like(other)]
    found = [evaluation.evaluate(images, half, features) for images in sets]
    assert found[0]["frechet"] < found[1]["frechet"] < found[2]["frechet"]
    assert found[0]["kid"] < found[1]["kid"] < found[2]["kid"]
    assert found[0]["precision"] > 0.7 > 0.5 > found[2]["precision"]
    assert found[0]["recall"] > 0.7 > 0.3 > found[2]["recall"]
    assert found[0]["samples"] == 400
    as_bytes = evaluation.evaluate((sets[1] * 255).round().to(torch.uint8), half, features)
    assert as_bytes == found[1]


def test_metrics_equal_their_formula_and_torch_fidelity_from_end_to_end(evaluation, measured):
    pixels, features = measured
    half, other = evaluation.real_halves(pixels, 300)
    noisy = (other + 60 * torch.randn(other.shape)).clamp(0, 255).to(torch.uint8)
    found = evaluation.evaluate(noisy, half, features)
    sets = [evaluation.features_of(images, features) for images in (noisy, half)]
    arrays = [features.double().numpy() for features in sets]
    (m1, c1), (m2, c2) = ((f.mean(0), np.cov(f, rowvar=False)) for f in arrays)
    root = scipy.linalg.sqrtm(c1 @ c2).real
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * root)
    assert evaluation.frechet_distance(*sets) == pytest.approx(expected, rel=1e-6)
    assert found["frechet"] == pytest.approx(expected, rel=1e-3)

    class Features(torch_fidelity.FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)

        get_provided_features_list = staticmethod(lambda: ("own",))
        get_default_feature_layer_for_metric = staticmethod(lambda metric: "own")
        forward = lambda self, x: (features(x),)  # noqa: E731

    class Pictures(torch.utils.data.TensorDataset):
        __getitem__ = lambda self, i: self.tensors[0][i]  # noqa: E731

    torch_fidelity.register_feature_extractor("digits", Features)
    how = dict(fid=True, kid=True, prc=True, feature_extractor="digits", kid_subset_size=150)
    how |= dict(save_cpu_ram=True, cuda=False, cache=False, verbose=False)
    theirs = torch_fidelity.calculate_metrics(input1=Pictures(noisy), input2=Pictures(half), **how)
    theirs["samples"], names = 300, {key: name for key, (name, _) in evaluation.METRICS.items()}
    assert found == {key: theirs[names.get(key, key)] for key in found} and {*names} < {*found}


def test_the_frechet_distance_of_known_clouds(evaluation):
    a, b = torch.randn(50, 3).double(), torch.randn(50, 3).double()
    assert evaluation.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    moved = evaluation.frechet_distance(a, a + torch.tensor([1.0, 2.0, 0.0]))
    assert moved == pytest.approx(5, abs=1e-6)
    assert evaluation.frechet_distance(a, b) == pytest.approx(evaluation.frechet_distance(b, a))


def test_precision_and_recall_are_not_swapped(evaluation, measured):
    """Copies of a few real pictures: every sample is real, most of the real is missing."""
    pixels, features = measured
    half, _ = evaluation.real_halves(pixels, 300)
    found = evaluation.evaluate(half[:12].repeat(25, 1, 1, 1), half, features)
    assert found["precision"] == 1.0 and found["recall"] < 0.5


def test_no_more_than_a_part_of_a_set_is_held_as_float(evaluation, measured):
    pixels, seen = measured[0], []

    def features(x):
        seen.append(len(x))
        return x.flatten(1).float()

    found = evaluation.features_of(pixels / 255, features)
    assert torch.equal(found, pixels.flatten(1).float()) and max(seen) == 64
    few = evaluation.distances(pixels[:5], pixels[:50], chunk=7)
    expected = ((pixels[:5, None].float() - pixels[None, :50].float()) ** 2).flatten(2).mean(2)
    torch.testing.assert_close(few, expected.sqrt() / 255, rtol=1e-5, atol=1e-4)


def test_halves_are_disjoint_and_bounded(workshop, evaluation):
    pixels = torch.arange(100, dtype=torch.uint8).reshape(100, 1, 1, 1)
    a, b = evaluation.real_halves(pixels, 50)
    assert len(set(a.flatten().tolist()) | set(b.flatten().tolist())) == 100
    for n in (9, 51):
        with pytest.raises(workshop.BadInput, match=f"samples = {n} must be 10 .* of the 100 real"):
            evaluation.real_halves(pixels, n)


def test_inceptions_weights_are_missing_foreign_or_hostile(
    workshop, evaluation, monkeypatch, capsys
):
    Path("hostile.pth").write_bytes(pickle.dumps(Hostile()))
    torch.save({"fc.bias": torch.zeros(3)}, "foreign.pth")
    for file in ("hostile.pth", "foreign.pth", "missing.pth"):
        with pytest.raises(workshop.BadInput, match=r"weights cannot be had \(.*--weights"):
            evaluation.pick_extractor("cifar10", file)
    assert not Path("touched").exists()
    monkeypatch.setattr(inception, "URL_INCEPTION_V3", "file:///nowhere/weights.pth")
    assert evaluation.pick_extractor("cifar10") == (None, "no features")
    evaluation.print_metrics({"a / b": {"samples": 9}}, "a title", "no features")
    assert capsys.readouterr().out.split("--weights")[1].endswith("not measured\na title\n")


def test_only_inceptions_distance_is_called_fid(evaluation, capsys):
    for named, n, label in (
        ("Inception features", 50_000, "FID ↓  "),
        ("Inception features", 5_000, "FID-5k ↓"),
        ("features of a digit classifier", 50_000, "Fréchet distance ↓"),
    ):
        row = dict.fromkeys(evaluation.METRICS, 0.5) | {"samples": n}
        evaluation.print_metrics({"a / b": row}, "title", named)
        assert f"\n{label}" in capsys.readouterr().out


def test_pfgm_noise_is_student_s_and_tends_to_a_gaussian(workshop, sde):
    x, D = torch.empty(40_000, 1, 1, 2, dtype=torch.float64), 5.0
    generator = torch.Generator().manual_seed(0)
    noise = sde.fresh_noise(x, generator, sde.PFGM(D)).flatten(1)
    # Student's t in N = 2 dimensions: P(|noise|^2 / D > q) = (1 + q)^(-D / 2), exactly
    for q in (0.1, 0.5, 2.0):
        share = (noise.square().sum(1) / D > q).double().mean().item()
        assert share == pytest.approx((1 + q) ** (-D / 2), abs=0.01)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    gauss = sde.fresh_noise(x, generators[0])
    far = sde.fresh_noise(x, generators[1], sde.PFGM(1e8))
    torch.testing.assert_close(far, gauss, rtol=1e-3, atol=1e-6)
    with pytest.raises(workshop.BadInput, match="D above 0"):
        sde.PFGM(0)


@pytest.mark.parametrize("D", [1.0, 64.0])
def test_pfgm_is_sampled_by_heun(sde, evaluation, D):
    """With the exact denoiser of Student noise the samples are data points, equally often."""
    kernel, points = sde.PFGM(D), torch.tensor([-1.0, 0.2, 1.0])

    def eps(x, t):
        away, sigma = x.flatten(1) - points, t[:, None]
        w = torch.softmax(-(D + 1) / 2 * torch.log1p(away**2 / (D * sigma**2)), 1)
        return ((w * away).sum(1, keepdim=True) / sigma).reshape(x.shape)

    generator = torch.Generator().manual_seed(0)
    start = 80 * sde.fresh_noise(torch.empty(3000, 1, 1, 1).double(), generator, kernel)
    *_, x = evaluation.heun(eps, kernel, start, 79)
    gap, nearest = (x.flatten(1) - points).abs().min(1)
    assert (gap < 0.02).double().mean() > 0.97
    assert (nearest.bincount(minlength=3) / 3000).tolist() == pytest.approx([1 / 3] * 3, abs=0.05)


def test_the_likelihood_bound_is_exact_for_a_gaussian_and_its_best_denoiser(evaluation, sde):
    """Its stages and start are then the information that x at t_min has of the picture."""
    kernel, dice = sde.VP, torch.Generator().manual_seed(3)
    images = (torch.randn(4000, 1, 8, 8, generator=dice) * 30 + 128).round().clamp(0, 255)
    images = images.to(torch.uint8)
    x0 = evaluation.workshop.to_network_space(images).double()
    mean, spread = x0.mean(), x0.std()

    def best(xt, t):  # of a Gaussian around the mean
        s, sigma = (sde.per_image(value, xt) for value in (kernel.s(t), kernel.sigma(t)))
        return sigma * (xt / s - mean) / (spread**2 + sigma**2)

    bits = evaluation.likelihood_bound(best, images, kernel, cuts=(0.1, 0.44))
    first = float(kernel.sigma(torch.tensor(kernel.t_min, dtype=torch.float64)))
    information = math.log2(math.hypot(first, spread) / first)
    assert bits[1:].sum() == pytest.approx(information, abs=0.03)
    worse = evaluation.likelihood_bound(lambda x, t: 1.1 * best(x, t), images, kernel, (0.1, 0.44))
    assert (worse[1:-1] > bits[1:-1]).all() and worse[0] == bits[0] and worse[-1] == bits[-1]
    x = x0[:200] + first * torch.randn(200, 1, 8, 8, dtype=torch.float64, generator=dice)
    grey = torch.arange(256).double() / 127.5 - 1
    told = torch.log_softmax(-((x[..., None] - grey) ** 2) / (2 * first**2), -1)
    told = told.gather(-1, images[:200].long()[..., None]).mean() / math.log(2)
    assert bits[0] == pytest.approx(-float(told), abs=0.05)
