"""Step 04: the loss, the times, the loop, and runs on disk."""

import copy
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command
from PIL import Image

TINY = dict(encoder=8, decoders=(8, 8, 8), attention=())
EDGES = torch.tensor([1e-3, 0.1, 0.44, 1.0])


def tiny(unet, **changes):
    torch.manual_seed(0)
    return unet.build_network("digits", **{**TINY, "boundaries": (0.1, 0.44), **changes})


@pytest.fixture(scope="module")
def pixels(workshop):
    return workshop.load_images("digits")[0][:64]


def settings_for(**changes):
    common = dict(dataset="digits", arch="multistage", network="digits", process="vp", steps=6)
    common.update(batch=4, lr=1e-3, warmup=2, seed=0, flip=False, stages="uniform", times="")
    common.update(cuts=None, weight="none", decay=0, boundaries=[0.1, 0.44])
    return {**common, **changes}


def equal(one, other):
    """Tell whether two dictionaries or networks hold the same tensors, bit for bit."""
    one, other = (v if isinstance(v, dict) else v.state_dict() for v in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---- the lesson ------------------------------------------------------------------------------


def test_a_plain_batch_is_of_one_stage_and_half_of_it_is_mirrored(training, pixels):
    x0, t, eps, k = training.draw_batch(pixels, EDGES, 400, 3, torch.Generator(), flip=True)
    assert x0.shape == eps.shape == (400, 1, 8, 8) and -1 <= x0.min() and x0.max() <= 1
    assert EDGES[k] <= t.min() and t.max() <= EDGES[k + 1]
    plain = pixels[torch.randint(64, (400,), generator=training.workshop.step_generator(0, 6))]
    turned = (x0 != plain / 127.5 - 1).flatten(1).any(1)
    assert turned.float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert torch.equal(x0[turned], (plain[turned] / 127.5 - 1).flip(-1))


def test_a_plain_step_clips_and_takes_its_share_of_the_rate(training):
    model = torch.nn.Linear(3, 1)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    loss = 100 * model(torch.tensor([3.0, 0.0, 4.0])).sum()
    training.training_step(model, optimizer, loss, rate=0.5)
    gradient = torch.tensor([3.0, 0.0, 4.0]) / 26**0.5  # of length 1 with that of the bias
    torch.testing.assert_close(before - model.weight, 5e-3 * gradient[None], rtol=1e-3, atol=1e-6)
    assert optimizer.param_groups[0]["lr"] == 5e-3 and model.weight.grad is None


def test_the_learning_rate_falls_to_zero(unet, training, pixels):
    """In even steps after the warm-up, the last being one step's worth above zero."""
    state, rates = training.new_state(tiny(unet), 0.5, seed=0), []
    for _ in training.train(state, pixels, 10, batch=2, warmup=2, decay=10):
        rates.append(state["optimizer"].param_groups[0]["lr"])
    expected = [0.5 * (11 - step) / 10 for step in range(1, 11)]
    assert rates == pytest.approx([expected[0] / 2, *expected[1:]])


def test_the_plain_average_forgets_faster_at_first(training):
    mean, model = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    for n, decay in ((1, 2 / 11), (20, 21 / 30), (10**6, 0.9999)):
        expected = decay * mean.weight + (1 - decay) * model.weight
        training.update_average(mean, model, n)
        torch.testing.assert_close(mean.weight.detach(), expected.detach())


@pytest.mark.parametrize("flip", [False, True])
def test_the_plain_loop_and_train_agree_bit_for_bit(unet, training, pixels, flip):
    model = unet.randomize(tiny(unet))
    average = copy.deepcopy(model)
    state = training.new_state(copy.deepcopy(model), 3e-3, seed=0)
    plain = list(training.train_plainly(model, average, pixels, EDGES, 12, flip=flip))
    fast = list(training.train(state, pixels, 12, batch=32, flip=flip))
    for (step, k, loss), (number, losses) in zip(plain, fast, strict=True):
        assert step == number and list(losses) == [k]
        assert losses[k].item() == pytest.approx(loss, rel=1e-6)
    assert len({k for _, k, _ in plain}) == 3
    for one, other in ((model, state["model"]), (average, state["ema"])):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)


# ---- times, weights, the loop ----------------------------------------------------------------


def test_vp_times_fill_each_stage_evenly(unet, training):
    model, generator = tiny(unet), torch.Generator().manual_seed(0)
    edges = training.stage_edges(model, "vp")
    assert edges.tolist() == pytest.approx([1e-3, 0.1, 0.44, 1.0])
    assert training.stage_chances(edges, "vp", [0, 1, 2]).tolist() == pytest.approx([1 / 3] * 3)
    assert training.stage_chances(edges, "vp", [0, 2]).tolist() == pytest.approx([0.5, 0, 0.5])
    for k in range(3):
        t = training.draw_times(edges, "vp", torch.full((20_000,), k), generator)
        assert model.stage(t).unique().tolist() == [k]
        length = edges[k + 1] - edges[k]
        assert (t.min() - edges[k]) / length < 1e-3 and (edges[k + 1] - t.max()) / length < 1e-3
        assert t.mean().item() == pytest.approx((edges[k] + length / 2).item(), abs=0.01)


def test_flow_times_are_uniform_over_its_timeline(unet, training):
    model = tiny(unet, boundaries=[0.3, 0.6])
    edges, generator = training.stage_edges(model, "flow"), torch.Generator().manual_seed(0)
    assert edges.tolist() == pytest.approx([0.001, 0.3, 0.6, 0.999])
    chance = training.stage_chances(edges, "flow", [0, 1, 2])
    k = torch.multinomial(chance, 40_000, replacement=True, generator=generator)
    t = training.draw_times(edges, "flow", k, generator)
    assert torch.equal(model.stage(t), k)
    counts = torch.histc(t, 10, 0, 1)
    assert ((counts - 4000) ** 2 / 4000).sum() < 27.9  # chi^2 with 9 degrees: 0.001


def test_edm_times_follow_the_log_normal(unet, training):
    model = tiny(unet, boundaries=[0.3, 1.2], time="edm")
    edges, generator = training.stage_edges(model, "edm"), torch.Generator().manual_seed(0)
    chance = training.stage_chances(edges, "edm", [0, 1, 2])
    exact = 0.5 * (1 + math.erf((math.log(0.3) + 1.2) / 1.2 / math.sqrt(2)))
    assert chance[0].item() == pytest.approx(exact, abs=1e-5)
    k = torch.multinomial(chance, 40_000, replacement=True, generator=generator)
    t = training.draw_times(edges, "edm", k, generator)
    assert torch.equal(model.stage(t), k)
    assert t.log().mean().item() == pytest.approx(-1.2, abs=0.02)
    assert t.log().std().item() == pytest.approx(1.2, abs=0.02)


def test_stages_can_be_drawn_by_their_lengths(unet, training):
    model = tiny(unet)
    edges = training.stage_edges(model, "vp")
    chance = training.stage_chances(edges, "vp", [0, 1, 2], "uniform")
    assert chance.tolist() == pytest.approx([0.099 / 0.999, 0.34 / 0.999, 0.56 / 0.999])
    even = training.stage_chances(training.stage_edges(model, "edm"), "edm", [0, 1, 2], "stages")
    assert even.tolist() == pytest.approx([1 / 3] * 3)


def watched(training, pixels, monkeypatch, model, steps, **options):
    """Train some steps: [(times, errors, the loss that is minimised, the losses that are told)]."""
    seen, ask, take = [], training.weighted_error, training.training_step

    def error(forward, x0, eps, t, process, **stage):
        seen.append([t, ask(forward, x0, eps, t, process, **stage)])
        return seen[-1][1]

    def step(model, optimizer, loss, *more):
        seen[-1].append(loss.item())
        take(model, optimizer, loss, *more)

    with monkeypatch.context() as patch:
        patch.setattr(training, "weighted_error", error)
        patch.setattr(training, "training_step", step)
        loop = training.train(training.new_state(model, 1e-4, 0), pixels, steps, **options)
        return [(*seen[-1], losses) for _, losses in loop]


@pytest.mark.parametrize("stages", ["uniform", "mixed"])
def test_one_decoder_is_dealt_the_times_of_three_stages(
    unet, training, pixels, monkeypatch, stages
):
    model, how = tiny(unet, decoders=(4,), boundaries=()), dict(batch=32, stages=stages)
    shares = []
    for more in (dict(times="stages", cuts=[0.1, 0.44]), {}):
        rows = watched(training, pixels, monkeypatch, model, 60, **how, **more)
        assert all(set(losses) == {0} for *_, losses in rows)
        t = torch.cat([row[0] for row in rows])
        shares.append((torch.bucketize(t, torch.tensor([0.1, 0.44])).bincount() / len(t)).tolist())
    # 60 draws of a stage have a standard deviation of 0.06; a mixed batch deals 11, 11 and 10
    assert shares[0] == pytest.approx([1 / 3] * 3, abs=0.2 if stages == "uniform" else 0.021)
    assert shares[1][0] == pytest.approx(0.1, abs=0.03)


def test_the_loss_is_the_mean_of_the_stages_and_min_snr_weighs_it_but_not_what_is_told(
    unet, sde, training, pixels, monkeypatch
):
    """With a mixed batch whose stages have 11, 10 and 10 pictures; one decoder or three."""
    for weight in ("none", "min-snr"):
        for more in (dict(decoders=(4,), boundaries=()), {}):
            model, cuts = unet.randomize(tiny(unet, **more)), [0.1, 0.44] if more else None
            how = dict(batch=31, stages="mixed", times="stages", cuts=cuts, weight=weight)
            for t, error, loss, told in watched(training, pixels, monkeypatch, model, 2, **how):
                snr = 1 / sde.VP.sigma(t) ** 2  # of the picture, whose own is 1
                weighed = error * snr.clamp(max=5) / snr if weight == "min-snr" else error
                means = [weighed[k::3].mean().item() for k in range(3)]
                assert loss == pytest.approx(sum(means) / 3, rel=1e-5)
                plain = [error.mean()] if more else [error[k::3].mean() for k in range(3)]
                assert [told[k].item() for k in sorted(told)] == pytest.approx(
                    [v.item() for v in plain], rel=1e-5
                )


@pytest.mark.parametrize("process", ["vp", "flow", "edm"])
def test_mixed_and_uniform_batches_have_the_same_expected_gradient(
    unet, training, pixels, monkeypatch, process
):
    """Both are unbiased for the objective they state: their gradients agree on average."""

    def gradients(stages, count=300):
        time = "edm" if process == "edm" else "vp"
        model = unet.randomize(tiny(unet, boundaries=[0.3, 0.6], time=time, mults=(1,)))
        state = training.new_state(model, 0.0, seed=int(stages == "mixed"))
        seen, how = [], dict(batch=6, warmup=1, ema=0.5, stages=stages)
        see = lambda weights, _: seen.append(next(weights).grad.flatten().clone())  # noqa: E731
        # in place of clipping, which is no part of the objective; of the encoder's first weights
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", see)
        list(training.train(state, pixels, count, process, **how))
        return torch.stack(seen).double()

    uniform, mixed = gradients("uniform"), gradients("mixed")
    error = ((uniform.var(0) + mixed.var(0)) / 300).sqrt()
    z = (uniform.mean(0) - mixed.mean(0)) / error
    assert z.abs().max() < 4.5 and z.square().mean() < 1.8
    assert (uniform.mean(0).abs() > 4 * error).any()  # there is something to agree on


def test_edm_noise_and_weight_are_those_of_its_paper(training):
    """Against c_skip, c_out, c_in and lambda as Karras et al. print them."""
    sigma, d = torch.tensor([0.01, 0.5, 3.0, 70.0]), 0.5
    x, x0 = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    network = lambda h, t: torch.tanh(h * 2) + 0.1  # noqa: E731
    s = sigma[:, None, None, None]
    c_skip, c_out = d**2 / (s**2 + d**2), s * d / (s**2 + d**2).sqrt()
    D = c_skip * x + c_out * network(x / (s**2 + d**2).sqrt(), sigma)
    eps = training.predict_noise(network, x, sigma, "edm")
    torch.testing.assert_close(x - s * eps, D, rtol=1e-4, atol=1e-4)
    theirs = (s**2 + d**2) / (s * d) ** 2 * (D - x0) ** 2
    ours = training.loss_weight(sigma, "edm")[:, None, None, None] * (eps - (x - x0) / s) ** 2
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_the_loss_of_flow_matching_is_that_of_its_velocity(sde, training):
    """Eq. 4 with predicted noise and its weight, against |F - (eps - x0)|^2 written out."""
    t, x0, eps = torch.tensor([0.01, 0.3, 0.9, 0.99]), *torch.randn(2, 4, 1, 8, 8)
    network = lambda x, t, **stage: torch.tanh(2 * x) + 0.1  # noqa: E731
    xt = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * eps
    theirs = ((network(xt, t) - (eps - x0)) ** 2).flatten(1).mean(1)
    ours = training.weighted_error(network, x0, eps, t, "flow")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("process", ["vp", "flow", "edm", "pfgm-64"])
def test_training_lowers_the_loss(unet, training, pixels, process):
    time = "vp" if process in ("vp", "flow") else "edm"
    model = tiny(unet, encoder=16, decoders=(16,), boundaries=(), time=time)
    state = training.new_state(model, 3e-3, seed=0)
    loop = training.train(state, pixels, 80, process, 32, 10)
    losses = [loss.item() for _, losses in loop for loss in losses.values()]
    assert len(losses) == 80 == state["step"]
    assert sum(losses[-20:]) < 0.75 * sum(losses[:20])


def test_the_loop_is_equation_4_and_its_average_is_as_stated(workshop, sde, unet, training, pixels):
    """One step redone by hand from the same random numbers."""
    model = unet.randomize(tiny(unet)).train()
    before = [p.detach().clone() for p in model.parameters()]
    state = training.new_state(model, 1e-2, seed=3)
    i = torch.randint(64, (5,), generator=workshop.step_generator(3, 2))
    dice = workshop.step_generator(3, 3)
    stage = torch.multinomial(torch.ones(3).double() / 3, 1, generator=dice).item()
    generator = torch.Generator().manual_seed(3)
    edges = training.stage_edges(model, "vp")
    t = training.draw_times(edges, "vp", torch.full((5,), stage), generator)
    eps = torch.randn(5, 1, 8, 8, generator=generator)
    x0 = pixels[i].float() / 255 * 2 - 1
    s, sigma = (f(t.double()).float()[:, None, None, None] for f in (sde.VP.s, sde.VP.sigma))
    with torch.no_grad():
        expected = ((model(s * (x0 + sigma * eps), t) - eps) ** 2).mean()
    step, losses = next(training.train(state, pixels, 1, batch=5, warmup=10))
    (k, loss), *rest = losses.items()
    assert (step, k, rest) == (1, stage, [])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert state["optimizer"].param_groups[0]["lr"] == pytest.approx(1e-3)  # 1 of 10 warm-up steps
    decay = 2 / 11
    after, average = list(model.parameters()), list(state["ema"].parameters())
    for old, new, mean in zip(before, after, average, strict=True):
        torch.testing.assert_close(mean, decay * old + (1 - decay) * new.detach())


@pytest.mark.parametrize("stages", ["uniform", "mixed"])
def test_a_batch_in_pieces_has_the_gradient_of_the_whole(
    unet, training, pixels, monkeypatch, stages
):
    """Of 32 pictures in 5 pieces, whose turns of three stages begin anywhere, and in 32 of one."""
    found, how = [], dict(batch=32, stages=stages, weight="min-snr")
    see = lambda weights, _: found.append([p.grad.clone() for p in weights if p.grad is not None])  # noqa: E731
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", see)
    for pieces in (1, 5, 32):
        state = training.new_state(unet.randomize(tiny(unet)), 1e-3, seed=0)
        _, losses = next(training.train(state, pixels, 1, pieces=pieces, **how))
        found[-1] += [losses[k] for k in sorted(losses)]
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * a.abs().max().item())


def test_only_the_stage_of_the_batch_is_trained(unet, training, pixels):
    model = unet.randomize(tiny(unet)).train()
    state = training.new_state(model, 1e-2, seed=0)
    old = [[p.detach().clone() for p in d.parameters()] for d in model.decoders]
    _, (stage,) = next(training.train(state, pixels, 1, batch=4))
    for k, decoder in enumerate(model.decoders):
        same = all(torch.equal(a, b) for a, b in zip(old[k], decoder.parameters(), strict=True))
        assert same == (k != stage)


def test_training_ends_once_no_stage_is_active(unet, training, pixels):
    state = training.new_state(tiny(unet), 1e-3, seed=0)
    for step, _ in training.train(state, pixels, 10, batch=4):
        if step == 3:
            state["active"].clear()
    assert state["step"] == 3 and sum(state["drawn"]) == 3
    assert list(training.train(state, pixels, 10, batch=4)) == []


# ---- what a run is made of -------------------------------------------------------------------


def test_boundaries_come_from_the_user_or_from_step_02(workshop, sde, clustering, unet, training):
    pixels, _ = workshop.load_images("digits")
    assert training.find_boundaries("0.2, 0.5", "digits", pixels, "vp") == [0.2, 0.5]
    assert training.find_boundaries("", "celeba", pixels, "vp") == pytest.approx(unet.PUBLISHED)
    found = training.find_boundaries("", "digits", pixels, "vp")
    assert found == pytest.approx(clustering.algorithm_1(pixels.float() / 255), rel=1e-6)
    moved = training.find_boundaries("", "digits", pixels, "edm")
    assert moved == pytest.approx([float(sde.VP.sigma(tau)) for tau in found], rel=1e-5)
    assert training.find_boundaries("", "digits", pixels, "vp", "table7_4") == pytest.approx(
        [0.376, 0.526, 0.726]
    )


@pytest.mark.parametrize("n", [1, 2, 10])
def test_a_handful_of_pictures_can_be_trained_on(unet, training, capsys, n):
    images = torch.linspace(0, 255, n).byte()[:, None, None, None].expand(-1, 3, 8, 8)
    found = training.find_boundaries("", "folder", images, "vp")
    none = "step 02 finds no boundaries" in capsys.readouterr().out
    assert (found == pytest.approx(unet.PUBLISHED)) == none and (none or n > 1)
    model = training.network_of(settings_for(boundaries=found, channels=3))
    state = training.new_state(model, 1e-3, seed=0)
    assert len(list(training.train(state, images, 2, batch=4))) == 2


def test_who_has_no_gpu_trains_a_small_network(workshop, training, monkeypatch, capsys):
    """And draws from it, and from its latents, with no flag but the folder; a GPU: the paper's."""
    noise = torch.randint(256, (40, 40, 40, 3), dtype=torch.uint8).numpy()
    for i, picture in enumerate(noise):
        Path("pics").mkdir(exist_ok=True)
        Image.fromarray(picture).save(f"pics/{i}.png")

    def offline(*args, **how):
        raise OSError("no network")

    monkeypatch.setattr("torch_fidelity.utils.create_feature_extractor", offline)
    where, few = ["--dataset", "folder", "--root", "pics"], ["--samples", 10, "--nfe", 2]
    command(4, *where, "--steps", 2, "--replay")
    assert "no GPU: a small" in (told := capsys.readouterr().out) and "replaying takes" in told
    command(5, "--name", "folder-multistage", *few)
    assert "no network): give their file with --weights" in capsys.readouterr().out
    command(6, *where, "--code_steps", 1, "--steps", 1, *few)
    for name, side in (("multistage", 32), ("latent", 16)):
        found = workshop.read_checkpoint(f"runs/folder-{name}")["settings"]
        assert found["network"].startswith("laptop") and (found["size"], found["batch"]) == (
            side,
            64,
        )
        assert Path(f"runs/folder-{name}/samples.png").exists()
    half, double = (workshop.about("celeba", size=n)["recipe"]["steps"] for n in (16, 64))
    assert half == 4 * double == workshop.LAPTOP["recipe"]["steps"]
    monkeypatch.setattr(workshop, "device", lambda: torch.device("cuda"))
    assert workshop.about("folder", size=64)["recipe"] is workshop.PAPER
    assert training.network_name("", "celeba", "multistage", "vp") == "table5_1"


def test_every_recipe_has_a_network(workshop, unet, training):
    for dataset, process in itertools.product(workshop.DATASETS, ("vp", "flow", "edm", "pfgm-64")):
        for arch in ("multistage", "unified", "separate"):
            kind = unet.NETWORKS[training.network_name("", dataset, arch, process)]
            assert len(kind["decoders"]) == (1 if arch == "unified" else 3)
            assert kind.get("shared", True) == (arch != "separate")
    assert training.network_name("cifar10", "celeba", "unified", "vp") == "cifar10_unified"
    assert training.network_name("table7_4", "cifar10", "multistage", "vp") == "table7_4"


def plan(workshop, training, recipe=None, **asked):
    """Plan a run on digits with some flags changed."""
    given = {key: default for key, default, _ in workshop.read_parameters("04_train")}
    recipe = workshop.about("digits")["recipe"] if recipe is None else recipe
    images = torch.empty(9, 1, 8, 8, device="meta")
    return training.plan_run({**given, "boundaries": "0.1,0.44", **asked}, recipe, images)


def test_flags_go_before_the_recipe_and_that_before_the_paper(workshop, training):
    keys = ("stages", "times", "weight", "decay")
    found = lambda *a, **how: tuple(plan(workshop, training, *a, **how)[k] for k in keys)  # noqa: E731
    few = dict(steps=5, batch=8, lr=1e-3, warmup=1, flip=False)
    own = dict(few, stages="mixed", times="stages", weight="min-snr", decay="linear")
    assert found(few) == ("uniform", "", "none", 0)
    assert found(own) == ("mixed", "stages", "min-snr", 5)
    assert found(own, steps=9) == ("mixed", "stages", "min-snr", 9)  # to where the rate falls
    # the times and weights of noise prediction are not those of others
    assert found(own, process="edm") == ("mixed", "", "none", 5)
    asked = dict(stages="uniform", times="uniform", weight="none", decay="none")
    assert found(own, **asked) == ("uniform", "uniform", "none", 0)
    assert plan(workshop, training, own, lr=0.5, batch=3)["lr"] == 0.5
    cuts = {arch: plan(workshop, training, own, arch=arch) for arch in ("unified", "multistage")}
    assert [cuts["unified"][key] for key in ("boundaries", "cuts")] == [[], [0.1, 0.44]]
    assert [cuts["multistage"][key] for key in ("boundaries", "cuts")] == [[0.1, 0.44], None]
    json.dumps(cuts)


def test_widths(workshop, training):
    tailored = dict(network="table3_separate_tailored", arch="separate")
    for asked, widths in (
        (dict(), (8, [8, 8, 8])),
        (dict(arch="unified"), (8, [8])),
        (dict(arch="separate"), (8, [8, 8, 8])),
        (dict(arch="separate", tailored=True), (8, [12, 8, 4])),
        (dict(network="digits"), (32, [48, 32, 16])),
        (dict(encoder=16), (16, [24, 16, 8])),
        (dict(encoder=10, decoders="[12, 8, 6]"), (10, [12, 8, 6])),
        (dict(decoders="9,9,9"), (32, [9, 9, 9])),
        (tailored, (128, [192, 128, 16])),
    ):
        found = plan(workshop, training, **asked)
        assert (found["encoder"], found["decoders"]) == widths


def test_processes_start_with_the_same_weights_and_drop_out_other_units(
    workshop, training, monkeypatch
):
    monkeypatch.setattr(training, "DistributedDataParallel", lambda model, *_, **how: model)
    drawn, weights = [], []
    for place in ((0, 2), (1, 2), (0, 1)):
        monkeypatch.setattr(workshop, "ranks", lambda place=place: place)
        weights.append(training.prepare_state(settings_for())["model"])
        drawn.append(torch.rand(1).item())
    assert equal(weights[0], weights[1]) and equal(weights[0], weights[2])
    assert len(set(drawn)) == 3


# ---- runs ------------------------------------------------------------------------------------

# what two processes and three stages divide; `digits` is trained by its own recipe
FLAGS = "--boundaries 0.1,0.44 --steps 12 --batch 12 --save_every 2 --name".split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of runs, with one named "whole" that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("runs")
    command(4, *FLAGS, "whole", "--out", folder)
    return folder


def same_run(workshop, *runs):
    """Tell whether two runs have the same weights, settings and logs, bit for bit."""
    one, other = (workshop.read_checkpoint(run) for run in runs)
    rows = [workshop.read_log(run) for run in runs]
    for row in rows[0] + rows[1]:
        del row["images_per_s"]
    same = all(equal(one[key], other[key]) for key in ("model", "ema"))
    return same and rows[0] == rows[1] and one["settings"] == other["settings"]


def test_a_run_says_what_it_trains_and_leaves_what_it_should(whole, workshop):
    run = whole / "whole"
    rows, settings = workshop.read_log(run), json.loads((run / "settings.json").read_text("utf-8"))
    assert settings == workshop.read_checkpoint(run)["settings"] and settings["decay"] == 12
    assert {path.name for path in run.iterdir()} >= {"loss.png", "progress.png", "denoised.png"}
    grids = sorted(int(path.stem) for path in (run / "samples").iterdir())
    assert grids == [3, 6, 9, 12] and [row["step"] for row in rows] == list(range(1, 13))
    assert [sorted(row) for row in rows[-1:]] == [
        ["images_per_s", "loss_0", "loss_1", "loss_2", "petaflops", "step", "true_petaflops"]
    ]


def test_a_signal_lets_the_step_finish_and_save_and_resume_goes_on_bit_for_bit(
    whole, workshop, monkeypatch
):
    plain = workshop.picked_in_step

    def interrupted(n, batch, seed, step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(n, batch, seed, step)

    monkeypatch.setattr(workshop, "picked_in_step", interrupted)
    flags = [*FLAGS, "ended", "--out", whole]
    with pytest.raises(SystemExit) as end:
        command(4, *flags)
    assert end.value.code == 128 + signal.SIGTERM
    assert workshop.read_checkpoint(whole / "ended")["step"] == 5
    monkeypatch.setattr(workshop, "picked_in_step", plain)
    command(4, *flags, "--boundaries", "", "--resume")  # those that it has
    assert same_run(workshop, whole / "whole", whole / "ended")


def test_a_killed_run_goes_on_bit_for_bit(whole, workshop):
    flags, run = [*FLAGS, "killed", "--out", str(whole)], whole / "killed"
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen([sys.executable, str(ROOT / "04_train.py"), *flags], **quiet)
    while not (run / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.Random().uniform(0, 0.3))
    process.kill()
    process.wait()
    assert 2 <= workshop.read_checkpoint(run)["step"] <= 12
    command(4, *flags, "--resume")
    assert same_run(workshop, whole / "whole", run)


TWO = """
import importlib, json, runpy, sys
sys.path.insert(0, {root!r})
try:
    runpy.run_path({root!r} + "/04_train.py", run_name="__main__")
except SystemExit as end:
    assert not end.code
training = importlib.import_module("04_train")
settings = json.load(open({folder!r} + "/two/settings.json")) | dict(stages="uniform")
state = training.prepare_state(settings)
training.fit(state, training.workshop.load_images("digits")[0], settings, {folder!r} + "/uniform-2")
"""


def test_two_processes_train_as_one(whole, workshop, training, tmp_path):
    """The command, and again with one stage a batch, where decoders take turns."""
    script = tmp_path / "two.py"
    script.write_text(TWO.format(root=str(ROOT), folder=str(whole)), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = [str(script), *FLAGS, "two", "--out", str(whole)]
    done = subprocess.run([*torchrun, *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    settings = workshop.read_checkpoint(whole / "whole")["settings"] | dict(stages="uniform")
    images = workshop.load_images("digits")[0]
    training.fit(training.prepare_state(settings), images, settings, whole / "uniform")
    for names in (("whole", "two"), ("uniform", "uniform-2")):
        one, two = (workshop.read_checkpoint(whole / name) for name in names)
        for part in ("model", "ema"):
            for key, value in one[part].items():
                torch.testing.assert_close(two[part][key], value, rtol=1e-3, atol=1e-4)
        for a, b in zip(*(workshop.read_log(whole / name) for name in names), strict=True):
            assert a.keys() == b.keys()
            for key in a.keys() - {"images_per_s"}:
                assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-6)


def test_weights_gone_bad_are_not_saved(workshop, training, pixels, tmp_path, monkeypatch):
    settings, plain = settings_for(steps=9), training.train
    state = training.prepare_state(settings)

    def spoiled(*args, **kw):
        for step, losses in plain(*args, **kw):
            if step == 4:
                next(state["model"].parameters()).data.fill_(torch.nan)
            yield step, losses

    monkeypatch.setattr(training, "train", spoiled)
    with pytest.raises(workshop.BadInput, match="no longer finite at step 6: lower --lr"):
        training.fit(state, pixels, settings, tmp_path, save_every=3)
    content = workshop.read_checkpoint(tmp_path)
    assert content["step"] == 3 and all(v.isfinite().all() for v in content["model"].values())


def test_early_stopping_keeps_each_stage_at_its_best(workshop, training, pixels, tmp_path):
    settings = settings_for(arch="separate", network="digits_separate", patience=2, steps=400)
    settings |= dict(encoder=8, decoders=[8, 8, 8], batch=8, lr=1e-2, process="edm")
    settings |= dict(boundaries=[0.3, 2.5])
    state = training.prepare_state(settings)
    training.fit(state, pixels[:8], settings, tmp_path, held_out=pixels[32:])
    rows = workshop.read_log(tmp_path)
    assert state["active"] == [] or state["step"] == 400
    assert len(state["active"]) < 3, "8 pictures are overfitted within 400 steps"
    assert {"0000050.png", "0000200.png"} <= {p.name for p in (tmp_path / "samples").iterdir()}
    model = training.averaged_model(workshop.read_checkpoint(tmp_path))
    best = dict(ema=model, active=[0, 1, 2], generator=torch.Generator())
    found = training.check_held_out(best, pixels[32:], "edm", 99)
    for k in range(3):
        seen = [row[f"held_out_{k}"] for row in rows if f"held_out_{k}" in row]
        assert found[k] == pytest.approx(min(seen), rel=1e-3)
        if k not in state["active"]:  # its last two looks were no better, and then it stopped
            assert min(seen) < min(seen[-2:]) and len(seen) <= len(rows)


def test_the_command_stops_early_and_tells_labels(workshop, training):
    flags = "--steps 2 --batch 8 --boundaries 0.1,0.44 --name r".split()
    command(4, *flags, "--classes", "--arch", "separate", "--patience", 2)
    content = workshop.read_checkpoint("runs/r")
    assert content["settings"]["classes"] == 10 == training.averaged_model(content).classes
    assert "held_out_0" in str(workshop.read_log("runs/r"))
