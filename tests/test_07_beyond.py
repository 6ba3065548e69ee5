"""Step 07 and what it asks of the others: flow matching's clock, labels, guidance, one stage."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command
from test_05_sampling import ORDERS


def network(unet, **more):
    kind = dict(channels=1, size=8, encoder=8, decoders=(8, 8, 8), boundaries=[0.1, 0.44])
    torch.manual_seed(0)
    return unet.MultistageUNet(**{**kind, **more})


def with_classes(unet):
    model = unet.randomize(network(unet, classes=10)).eval()
    torch.nn.init.normal_(model.encoders[0].labels.weight)
    return model


# ---- the clock -------------------------------------------------------------------------------


@pytest.mark.parametrize("nfe", [1, 3, 20])
def test_a_step_of_euler_on_the_velocity_is_a_step_of_ddim(sde, evaluation, nfe):
    eps, x = evaluation.mixture_noise(sde.Flow), torch.randn(9, 1, 1, 1).double()
    states = list(evaluation.ddim(eps, sde.Flow, x, nfe, grid="time"))
    times = evaluation.time_grid(sde.Flow, nfe, "time")
    for t, after, state in zip(times, times[1:], states, strict=False):
        e = eps(x, t.expand(9))
        x = x + (after - t) * (e - (x - t * e) / (1 - t))
        torch.testing.assert_close(x, state, rtol=1e-9, atol=1e-9)


def test_in_vp_s_clock_euler_is_another_formula(sde, evaluation):
    eps, x, gaps = evaluation.mixture_noise(sde.VP), torch.randn(9, 1, 1, 1).double(), []
    for nfe in (20, 40):
        solvers = evaluation.ddim, sde.probability_flow
        (*_, a), (*_, b) = (solve(eps, sde.VP, x, nfe) for solve in solvers)
        gaps.append((a - b).abs().max())
    assert gaps[0] > 1e-3 and gaps[1] < 0.7 * gaps[0]  # the same only in the limit


@pytest.mark.parametrize("name", [name for name in ORDERS if name != "heun"])  # it ends at t = 0
def test_solvers_keep_their_orders_in_flow_s_clock(sde, evaluation, name):
    """But DEIS: its first step is of order 1, which counts as soon as that step is no trifle."""
    errors = evaluation.solver_errors(name, sde.Flow, [160, 320])
    expected = 2 if name in ("deis-2", "deis-3") else ORDERS[name]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(expected, abs=0.35)


def test_a_shift_multiplies_sigma_and_moves_steps_across_a_cut(sde, beyond):
    t = torch.linspace(0.01, 0.99, 50).double()
    torch.testing.assert_close(sde.Flow.sigma(beyond.shift_time(t, 5)), 5 * sde.Flow.sigma(t))
    assert [beyond.steps_at_noise(*how) for how in ((0.875, 12, 40), (0.9, 5, 40))] == [26, 15]
    assert beyond.steps_at_noise(0.9, 1, 40) == 5  # from t = 1 down to 0.9
    assert beyond.shift_time(0.875, 12) == pytest.approx(0.988, abs=5e-4)


def test_the_cuts_are_those_of_the_clock_that_they_were_averaged_in(sde, clustering, digits):
    """Similarity is a function of the noise level, its average over time is not."""
    cuts = {k: clustering.algorithm_1(digits, kernel=k, samples=3000) for k in (sde.VP, sde.Flow)}
    moved = sde.match_snr(cuts[sde.Flow], sde.Flow, sde.VP)
    assert moved[1] - cuts[sde.VP][1] > 0.04
    S = []
    for kernel in cuts:  # at the same noise level, whatever the clock
        curves = clustering.similarity_curves(digits, kernel, 3000)
        sigma = kernel.sigma(torch.from_numpy((curves.edges[1:] + curves.edges[:-1]) / 2))
        S.append(np.interp(1.0, sigma.numpy(), clustering.smooth(curves.S[0])))
    assert S[0] == pytest.approx(S[1], abs=0.05)


# ---- labels ----------------------------------------------------------------------------------


def test_without_classes_a_network_is_what_it_was(workshop, unet):
    plain, known = network(unet), network(unet, classes=10)
    names = dict(known.named_parameters())
    for name, p in plain.named_parameters():
        assert torch.equal(p, names.pop(name))  # the same random numbers, bit by bit
    assert list(names) == ["encoders.0.labels.weight"]
    assert names["encoders.0.labels.weight"].shape == (11, 32)
    x, t = torch.randn(6, 1, 8, 8), torch.linspace(0.05, 0.9, 6)
    assert torch.equal(plain(x, t), known(x, t, label=torch.arange(6)))  # they begin as zero
    with pytest.raises(workshop.BadInput, match="knows no classes: leave out the label"):
        plain(x, t, label=torch.arange(6))


def test_a_label_changes_its_own_picture_only_in_every_form_of_a_batch(unet):
    model, x, t = with_classes(unet), torch.randn(6, 1, 8, 8), torch.linspace(0.05, 0.9, 6)
    label = torch.tensor([3, 10, 3, 0, 10, 9])
    mixed, none = model(x, t, label=label), model(x, t)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], label=label[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(mixed, alone, rtol=1e-4, atol=1e-5)
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(mixed, none, strict=True)]
    assert same == (label == 10).tolist()  # the label "none" is no label
    by_stage = model(x[:2], t[:2] * 0 + 0.05, stage=0, label=label[:2])
    torch.testing.assert_close(by_stage, model(x[:2], t[:2] * 0 + 0.05, label=label[:2]))


def test_training_tells_nine_labels_of_ten_and_the_right_ones(
    unet, training, workshop, monkeypatch
):
    images = torch.arange(50).byte()[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
    labels, seen, ask = torch.arange(50) % 10, [], training.weighted_error

    def watch(model, x0, *more, label, **stage):
        seen.append((((x0[:, 0, 0, 0] + 1) * 127.5).round().long() % 10, label))
        return ask(model, x0, *more, label=label, **stage)

    monkeypatch.setattr(training, "weighted_error", watch)
    state = training.new_state(network(unet, classes=10), 1e-3, seed=0)
    list(training.train(state, images, 30, batch=60, labels=labels))
    true, told = (torch.cat(part) for part in zip(*seen, strict=True))
    dropped = told == 10
    assert torch.equal(true[~dropped], told[~dropped])
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.03)  # of 1,800


def test_labels_change_nothing_else_that_is_drawn(unet, training):
    """The labels' own random numbers come last, so that a step's times and noise stay."""
    images, drawn = (torch.rand(40, 1, 8, 8) * 255).byte(), []
    for labels in (None, torch.zeros(40, dtype=torch.long)):
        model = network(unet, classes=10)  # whose labels begin as zero
        state = training.new_state(model, 1e-3, seed=0)
        drawn.append([loss for _, loss in training.train(state, images, 1, batch=8, labels=labels)])
    assert str(drawn[0]) == str(drawn[1])


@pytest.mark.parametrize("arch", ["multistage", "unified", "separate"])
def test_the_command_trains_and_draws_with_labels(workshop, arch):
    """Step 04 with every arch, step 05 with a label: the set, its name, its record."""
    few = "--steps 4 --batch 8 --boundaries 0.1,0.44 --classes --decay none --name r".split()
    command(4, *few, "--arch", arch)
    command(4, *few, "--arch", arch, "--steps", 6, "--resume")
    command(5, *"--name r --label 7 --guidance 2 --nfe 2 --sampler ddim".split())
    assert workshop.read_checkpoint("runs/r")["settings"]["classes"] == 10
    record = json.loads(Path("runs/r/metrics.json").read_text(encoding="utf-8"))
    assert record["against"] == "a random half of digits, 7" and record["label"] == 7
    (shard,) = Path("runs/r/sets").rglob("*.npy")
    assert np.load(shard).shape == (89, 1, 8, 8)  # a half of 179 sevens


# ---- guidance --------------------------------------------------------------------------------


def test_guided_noise_is_the_formula_in_its_own_stage(training, unet):
    model, x = with_classes(unet), torch.randn(4, 1, 8, 8)
    label = torch.tensor([1, 1, 7, 7])
    for t, k in ((0.05, 0), (0.3, 1), (0.9, 2)):
        times = torch.full((4,), t)
        with torch.no_grad():
            told, without = model(x, times, label=label), model(x, times)
            for guidance in ((0.0,), (2.0,), (0.5, 1.0, 4.0), (0.0, 3.0, 0.0)):
                w = guidance[k % len(guidance)]
                eps = training.noise_function(model, "vp", guidance=guidance)(x, times, label)
                expected = (1 + w) * told - w * without
                torch.testing.assert_close(eps, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver-3", "heun", "ancestral"])
def test_every_picture_has_its_own_label_however_it_is_divided(evaluation, unet, sampler):
    model, label = with_classes(unet), torch.arange(6)
    how = dict(sampler=sampler, nfe=5, label=label, guidance=(1.0, 0.0, 2.0))
    whole = evaluation.sample(model, "vp", 6, **how)
    parts = evaluation.sample(model, "vp", 6, batch=2, **how)
    torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-3)
    one = evaluation.sample(model, "vp", 1, first=4, **{**how, "label": 4})
    torch.testing.assert_close(whole[4:5], one, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "classes, how, sentence",
    [
        (10, dict(label=10), "label 10 is none of the network's, which are 0 to 9"),
        (10, dict(label=-2), "label -2 is none"),
        (0, dict(label=3), "which has none: train one with --classes"),
        (0, dict(guidance=(2.0,)), "leads to a label: give one"),
        (10, dict(label=3, guidance=(1.0, 2.0)), r"\[1.0, 2.0\] must be one number, or 3"),
    ],
)
def test_labels_that_cannot_be_drawn(workshop, evaluation, unet, classes, how, sentence):
    with pytest.raises(workshop.BadInput, match=sentence):
        evaluation.sample(network(unet, classes=classes), "vp", 2, nfe=1, sampler="ddim", **how)


# ---- one stage alone -------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 2])
def test_one_stage_learns_and_the_others_say_the_same_bit_by_bit(
    workshop, training, beyond, tmp_path, k
):
    settings = dict(network="digits", arch="multistage", process="vp", boundaries=[0.1, 0.44])
    settings.update(encoder=8, decoders=[8, 8, 8], lr=1e-2, seed=0, steps=4, batch=8, classes=10)
    settings.update(weight="", stages="mixed")
    images = (torch.rand(30, 1, 8, 8) * 255).byte()
    state = training.prepare_state(settings)
    list(training.train(state, images, 4, batch=8, stages="mixed"))
    training.save_checkpoint(state, settings, tmp_path)
    before = copy.deepcopy(state["ema"])
    content = workshop.read_checkpoint(tmp_path)
    after = beyond.train_alone(content, k, images, n=5, lr=1e-2)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.05, 0.3, 0.9])
    with torch.no_grad():
        same = [torch.equal(a, b) for a, b in zip(before(x, t), after(x, t), strict=True)]
    assert same == [j != k for j in range(3)]
    for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b) == (not name.startswith(f"decoders.{k}.")), name


def test_what_is_chosen_gets_a_red_frame(beyond):
    framed = beyond.frame(torch.full((2, 1, 4, 4), 0.5), torch.tensor([True, False]))
    assert framed.shape == (2, 3, 6, 6) and (framed[:, :, 1:-1, 1:-1] == 0.5).all()
    assert framed[:, :, 0, 0].tolist() == [[1, 0, 0], [1, 1, 1]]


# ---- repairing -------------------------------------------------------------------------------


def test_exact_draws_have_the_probabilities_of_bayes(beyond):
    images = torch.tensor([-1.0, 0.0, 0.5, 1.0]).reshape(4, 1, 1, 1).expand(4, 1, 4, 4).clone()
    y = torch.full((4000, 1, 2, 2), 0.3)
    drawn = beyond.draw_exactly(y, beyond.shrink, 0.5, images, torch.Generator())
    weight = np.exp(-4 * (0.3 - np.array([-1, 0, 0.5, 1])) ** 2 / (2 * 0.25))
    weight /= weight.sum()
    counts = [(drawn[:, 0, 0, 0] == v).float().mean().item() for v in (-1, 0, 0.5, 1)]
    assert counts == pytest.approx(weight, abs=0.03)


@pytest.mark.parametrize("way", ["replace", "guide"])
@pytest.mark.parametrize("problem", ["a hole", "half the resolution", "much noise"])
def test_what_is_repaired_agrees_with_what_is_known(sde, beyond, digits, problem, way):
    images = digits[:200] * 2 - 1
    eps = lambda x, t: sde.plain_optimal_denoiser(x, t, sde.VP, images)  # noqa: E731
    A, tau = beyond.PROBLEMS[problem]
    truth, dice = images[:6], torch.Generator().manual_seed(0)
    y = A(truth) + tau * torch.randn(A(truth).shape, generator=dice)
    off = []
    for stages in ((), (0, 1, 2)):
        x = beyond.repair(eps, y, truth.shape, problem, way, dice, stages, (0.1, 0.44))
        off.append(float((y - A(x)).square().mean().sqrt()))
    assert off[1] < 0.8 * off[0] or (way == "replace" and problem == "much noise")


def test_psnr_is_that_of_its_definition(beyond):
    truth = torch.zeros(2, 1, 4, 4)
    assert beyond.psnr(truth + 0.2, truth) == pytest.approx(20.0)  # 4 / 0.04 is a hundred
