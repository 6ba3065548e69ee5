"""Step 04: the loss, the times, the loop, and runs on disk."""

import json
import math
import os
import signal

import pytest
import torch

TINY = dict(encoder=8, decoders=(8, 8, 8), attention=())


def tiny(unet, **changes):
    torch.manual_seed(0)
    return unet.build("digits", **{**TINY, "boundaries": (0.1, 0.44), **changes})


@pytest.fixture(scope="module")
def pixels(sde):
    return sde.load_images("digits")[0][:64]


def settings_for(**changes):
    common = dict(dataset="digits", arch="multistage", network="digits", process="vp", steps=6)
    common.update(batch=4, lr=1e-3, warmup=2, ema=0.9999, seed=0, flip=False)
    return {**common, "boundaries": [0.1, 0.44], **changes}


def test_vp_times_fill_each_stage_evenly(sde, unet, training):
    model, generator = tiny(unet), torch.Generator().manual_seed(0)
    edges, seen = [1e-3, 0.1, 0.44, 1.0], [0, 0, 0]
    for _ in range(600):
        k, t = training.draw_times(model, "vp", 50, generator)
        assert edges[k] <= t.min() and t.max() <= edges[k + 1]
        assert model.stage(t).unique().tolist() == [k]
        seen[k] += 1
    assert min(seen) > 150  # a third each


def test_edm_times_follow_the_log_normal(unet, training):
    cuts = [0.3, 1.2]
    model, generator = tiny(unet, boundaries=cuts), torch.Generator().manual_seed(0)
    drawn = [training.draw_times(model, "edm", 20, generator) for _ in range(3000)]
    for k, t in drawn:
        assert model.stage(t).unique().tolist() == [k]
    log = torch.stack([t[0] for _, t in drawn]).log()
    assert log.mean().item() == pytest.approx(-1.2, abs=0.08)
    assert log.std().item() == pytest.approx(1.2, abs=0.08)
    share = sum(k == 0 for k, _ in drawn) / 3000
    exact = 0.5 * (1 + math.erf((math.log(0.3) + 1.2) / 1.2 / math.sqrt(2)))
    assert share == pytest.approx(exact, abs=0.03)


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


@pytest.mark.parametrize("process", ["vp", "edm"])
def test_training_lowers_the_loss(unet, training, pixels, process):
    model = tiny(unet, encoder=16, decoders=(16,), boundaries=(), time=process)
    state = training.new_state(model, 3e-3, seed=0)
    losses = [loss.item() for _, _, loss in training.train(state, pixels, 80, process, 32, 10)]
    assert len(losses) == 80 == state["step"]
    assert sum(losses[-20:]) < 0.75 * sum(losses[:20])


def test_the_loop_is_equation_4_and_its_average_is_as_stated(sde, unet, training, pixels):
    """One step redone by hand from the same random numbers."""
    model = unet.randomize(tiny(unet)).train()
    before = [p.detach().clone() for p in model.parameters()]
    state = training.new_state(model, 1e-2, seed=3)
    generator = torch.Generator().manual_seed(3)
    i = torch.randint(64, (5,), generator=generator)
    stage, t = training.draw_times(model, "vp", 5, generator)
    eps = torch.randn(5, 1, 8, 8, generator=generator)
    x0 = pixels[i].float() / 255 * 2 - 1
    s, sigma = (f(t.double()).float()[:, None, None, None] for f in (sde.VP.s, sde.VP.sigma))
    with torch.no_grad():
        expected = ((model(s * (x0 + sigma * eps), t) - eps) ** 2).mean()
    step, k, loss = next(training.train(state, pixels, 1, batch=5, warmup=10))
    assert (step, k) == (1, stage)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert state["optimizer"].param_groups[0]["lr"] == pytest.approx(1e-3)  # 1 of 10 warm-up steps
    decay = 2 / 11
    after, average = list(model.parameters()), list(state["ema"].parameters())
    for old, new, mean in zip(before, after, average, strict=True):
        torch.testing.assert_close(mean, decay * old + (1 - decay) * new.detach())


def test_only_the_stage_of_the_batch_is_trained(unet, training, pixels):
    model = unet.randomize(tiny(unet)).train()
    state = training.new_state(model, 1e-2, seed=0)
    old = [[p.detach().clone() for p in d.parameters()] for d in model.decoders]
    _, stage, _ = next(training.train(state, pixels, 1, batch=4))
    for k, decoder in enumerate(model.decoders):
        same = all(torch.equal(a, b) for a, b in zip(old[k], decoder.parameters(), strict=True))
        assert same == (k != stage)


def test_a_loss_that_is_not_finite_stops_the_run(sde, unet, training, pixels):
    state = training.new_state(unet.randomize(tiny(unet)), 1e-3, seed=0)
    next(state["model"].parameters()).data.fill_(torch.nan)
    with pytest.raises(sde.BadInput, match="the loss is nan at step 50"):
        list(training.train(state, pixels, 60, batch=2))


def fit_run(training, settings, pixels, folder, steps=None):
    training.claim(folder, resume=steps is not None)
    torch.manual_seed(settings["seed"])
    state = training.new_state(training.network_of(settings), settings["lr"], settings["seed"])
    if steps is not None:
        training.restore(state, training.load(folder))
    assert training.fit(state, pixels, settings, folder, save_every=3)
    return state


def test_resuming_goes_on_bit_for_bit(training, pixels, tmp_path):
    whole = fit_run(training, settings_for(steps=7), pixels, tmp_path / "whole")
    fit_run(training, settings_for(steps=4), pixels, tmp_path / "parts")
    parts = fit_run(training, settings_for(steps=7), pixels, tmp_path / "parts", steps=7)
    for key in ("model", "ema"):
        for a, b in zip(whole[key].parameters(), parts[key].parameters(), strict=True):
            assert torch.equal(a, b)
    rows = training.read_metrics(tmp_path / "parts")
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert all("images_per_s" in row for row in rows)


def test_ctrl_c_finishes_the_step_and_saves(training, pixels, tmp_path, monkeypatch):
    settings = settings_for(steps=50)
    state = training.new_state(training.network_of(settings), 1e-3, 0)
    plain = training.train

    def interrupted(*args, **kw):
        for item in plain(*args, **kw):
            if item[0] == 5:
                os.kill(os.getpid(), signal.SIGINT)
            yield item

    monkeypatch.setattr(training, "train", interrupted)
    assert training.fit(state, pixels, settings, tmp_path) is False
    assert training.load(tmp_path)["step"] == state["step"] == 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_earlier_run_is_kept(training, tmp_path):
    run = tmp_path / "run"
    for expected in ([], ["run.1"], ["run.1", "run.2"]):
        training.claim(run, resume=False)
        (run / "checkpoint.pt").write_text("weights")
        kept = sorted(p.name for p in tmp_path.iterdir() if p.name != "run")
        assert kept == expected
    training.claim(run, resume=True)
    assert (run / "checkpoint.pt").exists()


def test_broken_checkpoints_are_named(sde, training, pixels, tmp_path):
    with pytest.raises(sde.BadInput, match="there is no checkpoint"):
        training.load(tmp_path)
    fit_run(training, settings_for(), pixels, tmp_path)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], b"not a checkpoint"):
        path.write_bytes(broken)
        with pytest.raises(sde.BadInput, match="no readable checkpoint"):
            training.load(tmp_path)
    torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(sde.BadInput, match="no readable checkpoint"):
        training.load(tmp_path)


class Attack:
    """A pickled call, as a hostile checkpoint would hold."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_cannot_run_code(sde, training, tmp_path):
    torch.save({"settings": {}, "ema": Attack(tmp_path / "owned")}, tmp_path / "checkpoint.pt")
    with pytest.raises(sde.BadInput):
        training.load(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_boundaries_come_from_the_user_or_from_step_02(sde, clustering, unet, training):
    pixels, _ = sde.load_images("digits")
    assert training.find_boundaries("0.2, 0.5", "digits", pixels, "vp") == [0.2, 0.5]
    assert training.find_boundaries("", "celeba", pixels, "vp") == pytest.approx(unet.PUBLISHED)
    found = training.find_boundaries("", "digits", pixels, "vp")
    assert found == pytest.approx(clustering.algorithm_1(pixels.float() / 255), rel=1e-6)
    moved = training.find_boundaries("", "digits", pixels, "edm")
    assert moved == pytest.approx([float(sde.VP.sigma(tau)) for tau in found], rel=1e-5)
    with pytest.raises(sde.BadInput, match="must be numbers"):
        training.find_boundaries("0.2;0.5", "digits", pixels, "vp")


def test_contradictions_on_resume_are_named(sde, training):
    old = settings_for()
    training.agree({**old, "steps": 99}, old, "runs/x")
    with pytest.raises(sde.BadInput, match="trained with batch = 4, not 8"):
        training.agree({**old, "batch": 8}, old, "runs/x")


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"arch": "u"}, "unknown arch 'u'"),
        ({"process": "ve"}, "unknown process 've'"),
        ({"steps": -1}, "steps = -1"),
        ({"lr": -0.1}, r"lr = -0\.1"),
        ({"ema": 1.0}, r"ema = 1\.0"),
    ],
)
def test_settings_that_cannot_work(sde, training, change, sentence):
    good = dict(arch="unified", process="vp", steps=1, batch=1, lr=0.1, ema=0.9, save_every=1)
    training.check_settings(**good)
    with pytest.raises(sde.BadInput, match=sentence):
        training.check_settings(**{**good, **change})


def test_every_recipe_has_a_network(unet, training):
    for dataset, recipe in training.RECIPES.items():
        for arch in ("multistage", "unified", "separate"):
            assert training.network_name(dataset, arch) in unet.NETWORKS
        assert {"steps", "batch", "lr", "warmup", "flip"} == set(recipe)


def test_a_run_can_be_loaded_for_sampling(training, pixels, tmp_path):
    settings = settings_for(arch="separate", network="digits_separate", process="edm")
    state = fit_run(training, settings, pixels, tmp_path)
    model, stored = training.load_model(tmp_path)
    assert json.loads(json.dumps(stored)) == stored == settings
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.05, 0.3, 5.0])
    model, ema = model.cpu(), state["ema"]
    torch.testing.assert_close(model(x, t), ema(x, t))
