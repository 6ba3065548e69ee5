"""Step 04: the loss, the times, the loop, and runs on disk."""

import copy
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

TINY = dict(encoder=8, decoders=(8, 8, 8), attention=())


def tiny(unet, **changes):
    torch.manual_seed(0)
    return unet.build_network("digits", **{**TINY, "boundaries": (0.1, 0.44), **changes})


@pytest.fixture(scope="module")
def pixels(workshop, sde):
    return workshop.load_images("digits")[0][:64]


def settings_for(**changes):
    common = dict(dataset="digits", arch="multistage", network="digits", process="vp", steps=6)
    common.update(batch=4, lr=1e-3, warmup=2, ema=0.9999, seed=0, flip=False)
    return {**common, "boundaries": [0.1, 0.44], **changes}


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


@pytest.mark.parametrize("process", ["vp", "flow", "edm"])
def test_mixed_and_uniform_batches_have_the_same_expected_gradient(unet, training, pixels, process):
    """Both are unbiased for the objective they state: their gradients agree on average."""

    def gradients(stages, count=600):
        time = "edm" if process == "edm" else "vp"
        model = unet.randomize(tiny(unet, boundaries=[0.3, 0.6], time=time))
        state = training.new_state(model, 0.0, seed=int(stages == "mixed"))
        weight, seen = model.encoders[0].first.weight, []
        loop = training.train(
            state, pixels, count, process, batch=6, warmup=1, ema=0.5, stages=stages
        )
        for _ in loop:
            seen.append(weight.grad.flatten().clone())
        return torch.stack(seen).double()

    original = torch.nn.utils.clip_grad_norm_
    torch.nn.utils.clip_grad_norm_ = lambda *args: None  # clipping is no part of the objective
    try:
        uniform, mixed = gradients("uniform"), gradients("mixed")
    finally:
        torch.nn.utils.clip_grad_norm_ = original
    error = ((uniform.var(0) + mixed.var(0)) / 600).sqrt()
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


def test_only_the_stage_of_the_batch_is_trained(unet, training, pixels):
    model = unet.randomize(tiny(unet)).train()
    state = training.new_state(model, 1e-2, seed=0)
    old = [[p.detach().clone() for p in d.parameters()] for d in model.decoders]
    _, (stage,) = next(training.train(state, pixels, 1, batch=4))
    for k, decoder in enumerate(model.decoders):
        same = all(torch.equal(a, b) for a, b in zip(old[k], decoder.parameters(), strict=True))
        assert same == (k != stage)


def test_a_loss_that_is_not_finite_stops_the_run(workshop, sde, unet, training, pixels):
    state = training.new_state(unet.randomize(tiny(unet)), 1e-3, seed=0)
    next(state["model"].parameters()).data.fill_(torch.nan)
    with pytest.raises(workshop.BadInput, match="the loss is nan at step 50"):
        list(training.train(state, pixels, 60, batch=2))


def fit_run(training, settings, pixels, folder, steps=None):
    training.workshop.claim_folder(folder, resume=steps is not None)
    torch.manual_seed(settings["seed"])
    state = training.new_state(training.network_of(settings), settings["lr"], settings["seed"])
    if steps is not None:
        training.restore_checkpoint(state, training.workshop.read_checkpoint(folder))
    assert training.fit(state, pixels, settings, folder, save_every=3)
    return state


def test_resuming_goes_on_bit_for_bit(workshop, training, pixels, tmp_path):
    whole = fit_run(training, settings_for(steps=7), pixels, tmp_path / "whole")
    fit_run(training, settings_for(steps=4), pixels, tmp_path / "parts")
    parts = fit_run(training, settings_for(steps=7), pixels, tmp_path / "parts", steps=7)
    for key in ("model", "ema"):
        for a, b in zip(whole[key].parameters(), parts[key].parameters(), strict=True):
            assert torch.equal(a, b)
    rows = workshop.read_log(tmp_path / "parts")
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert all("images_per_s" in row for row in rows)
    grids = sorted(path.name for path in (tmp_path / "parts" / "samples").iterdir())
    assert "0000007.png" in grids and len(grids) >= 5


def test_a_checkpoint_from_another_kind_of_device_goes_on(
    workshop, training, pixels, tmp_path, capsys
):
    """As a GPU saves it: a generator's state of 16 bytes, and moments with their channels last."""
    state = fit_run(training, settings_for(steps=4), pixels, tmp_path)
    content = workshop.read_checkpoint(tmp_path)
    content["generator"] = torch.zeros(16, dtype=torch.uint8)
    for moments in content["optimizer"]["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            if moments[key].dim() == 4:
                moments[key] = moments[key].to(memory_format=torch.channels_last)
    again = training.new_state(training.network_of(settings_for()), 1e-3, 0)
    training.restore_checkpoint(again, content)
    assert "another kind of device" in capsys.readouterr().out
    assert not torch.equal(again["generator"].get_state(), torch.Generator().get_state())
    theirs, ours = (list(s["optimizer"].state.items()) for s in (state, again))
    for (_, a), (weight, b) in zip(theirs, ours, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(a[key], b[key]) and b[key].stride() == weight.stride()
    for s in (state, again):  # and a step of Adam is the same
        for group in s["optimizer"].param_groups:
            group["lr"] = 1e-2
        for weight in s["model"].parameters():
            weight.grad = torch.ones_like(weight)
        s["optimizer"].step()
    for a, b in zip(state["model"].parameters(), again["model"].parameters(), strict=True):
        assert torch.equal(a, b)


def test_processes_start_with_the_same_weights_and_drop_out_other_units(
    workshop, training, monkeypatch
):
    monkeypatch.setattr(training, "DistributedDataParallel", lambda model, *_, **how: model)
    drawn, weights = [], []
    for place in ((0, 2), (1, 2), (0, 1)):
        monkeypatch.setattr(workshop, "ranks", lambda place=place: place)
        state = training.prepare_state(settings_for())
        weights.append(torch.cat([p.flatten() for p in state["model"].parameters()]))
        drawn.append(torch.rand(1).item())
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    assert len(set(drawn)) == 3


def test_a_batch_too_small_to_mix_all_stages_is_refused(workshop, sde, training):
    with pytest.raises(workshop.BadInput, match="batch = 2 cannot mix 3 stages: give 3 or more"):
        training.prepare_state(settings_for(stages="mixed", batch=2))


def test_ctrl_c_finishes_the_step_and_saves(workshop, training, pixels, tmp_path, monkeypatch):
    settings = settings_for(steps=50)
    state = training.new_state(training.network_of(settings), 1e-3, 0)
    plain, handler = training.train, signal.getsignal(signal.SIGINT)

    def interrupted(*args, **kw):
        for item in plain(*args, **kw):
            if item[0] == 5:
                os.kill(os.getpid(), signal.SIGINT)
            yield item

    monkeypatch.setattr(training, "train", interrupted)
    assert training.fit(state, pixels, settings, tmp_path) is False
    assert workshop.read_checkpoint(tmp_path)["step"] == state["step"] == 5
    assert signal.getsignal(signal.SIGINT) == handler  # in a background job: SIG_IGN


def test_an_earlier_run_is_kept(workshop, training, tmp_path):
    run = tmp_path / "run"
    for expected in ([], ["run.1"], ["run.1", "run.2"]):
        workshop.claim_folder(run, resume=False)
        (run / "checkpoint.pt").write_text("weights", encoding="utf-8")
        kept = sorted(p.name for p in tmp_path.iterdir() if p.name != "run")
        assert kept == expected
    workshop.claim_folder(run, resume=True)
    assert (run / "checkpoint.pt").exists()


def test_broken_checkpoints_are_named_and_the_one_before_serves(
    workshop, sde, training, pixels, tmp_path, capsys
):
    with pytest.raises(workshop.BadInput, match="there is no checkpoint"):
        workshop.read_checkpoint(tmp_path)
    fit_run(training, settings_for(), pixels, tmp_path)
    path, before = tmp_path / "checkpoint.pt", tmp_path / "checkpoint.previous.pt"
    whole = path.read_bytes()
    assert workshop.read_checkpoint(tmp_path)["step"] == 6
    capsys.readouterr()
    for broken in (b"", whole[: len(whole) // 2], b"not a checkpoint"):
        path.write_bytes(broken)
        assert workshop.read_checkpoint(tmp_path)["step"] == 3
        assert "going back to" in capsys.readouterr().out
    path.unlink()  # killed between the two renames
    assert workshop.read_checkpoint(tmp_path)["step"] == 3
    before.write_bytes(whole[:1000])
    with pytest.raises(workshop.BadInput, match="no readable checkpoint"):
        workshop.read_checkpoint(tmp_path)
    torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(workshop.BadInput, match="no readable checkpoint"):
        workshop.read_checkpoint(tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint(
    workshop, sde, training, pixels, tmp_path, monkeypatch
):
    fit_run(training, settings_for(), pixels, tmp_path)
    whole, save = (tmp_path / "checkpoint.pt").read_bytes(), torch.save

    def full(content, path):
        save(content, path)
        os.truncate(path, 1000)
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    state = training.new_state(training.network_of(settings_for()), 1e-3, 0)
    with pytest.raises(workshop.BadInput, match="cannot write .*is the disk full"):
        training.save_checkpoint(state, settings_for(), tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == whole
    assert not list(tmp_path.glob("*.part*"))


def test_weights_gone_bad_are_not_saved(workshop, sde, unet, training, pixels, tmp_path):
    settings = settings_for(steps=9)
    state = training.new_state(training.network_of(settings), 1e-3, 0)
    plain = training.train

    def spoiled(*args, **kw):
        for step, losses in plain(*args, **kw):
            if step == 4:
                next(state["model"].parameters()).data.fill_(torch.nan)
            yield step, losses

    training.train = spoiled
    try:
        with pytest.raises(workshop.BadInput, match=r"no longer finite at step 6.*step 3 is saved"):
            training.fit(state, pixels, settings, tmp_path, save_every=3)
    finally:
        training.train = plain
    assert all(v.isfinite().all() for v in workshop.read_checkpoint(tmp_path)["model"].values())


def test_early_stopping_keeps_each_stage_at_its_best(workshop, unet, training, pixels, tmp_path):
    settings = settings_for(
        arch="separate", network="digits_separate", steps=400, batch=8, lr=1e-2, patience=2
    )
    settings["decoders"] = (8, 8, 8)
    torch.manual_seed(0)
    state = training.new_state(training.network_of(settings), 1e-2, 0)
    assert training.fit(state, pixels[:8], settings, tmp_path, held_out=pixels[32:])
    rows = workshop.read_log(tmp_path)
    assert state["active"] == [] or state["step"] == 400
    assert len(state["active"]) < 3, "8 pictures are overfitted within 400 steps"
    model = training.averaged_model(workshop.read_checkpoint(tmp_path))
    best = dict(model=model, ema=model.cpu(), active=[0, 1, 2], generator=torch.Generator())
    found = training.check_held_out(best, pixels[32:], "vp", 99)
    for k in range(3):
        seen = [row[f"held_out_{k}"] for row in rows if f"held_out_{k}" in row]
        assert found[k] == pytest.approx(min(seen), rel=1e-3)
        if k not in state["active"]:  # its last two looks were no better, and then it stopped
            assert min(seen) < min(seen[-2:]) and len(seen) <= len(rows)


class Attack:
    """A pickled call, as a hostile checkpoint would hold."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_cannot_run_code(workshop, sde, training, tmp_path):
    torch.save({"settings": {}, "ema": Attack(tmp_path / "owned")}, tmp_path / "checkpoint.pt")
    with pytest.raises(workshop.BadInput):
        workshop.read_checkpoint(tmp_path)
    assert not (tmp_path / "owned").exists()


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
    with pytest.raises(workshop.BadInput, match="must be numbers"):
        training.find_boundaries("0.2;0.5", "digits", pixels, "vp")


def test_contradictions_on_resume_are_named(workshop, sde, training):
    old = settings_for()
    workshop.check_same_settings({**old, "steps": 99}, old, "runs/x")
    with pytest.raises(workshop.BadInput, match="trained with batch = 4, not 8"):
        workshop.check_same_settings({**old, "batch": 8}, old, "runs/x")


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"arch": "u"}, "unknown arch 'u'"),
        ({"process": "ve"}, "unknown process 've'"),
        ({"process": "pfgm-x"}, "such as pfgm-128"),
        ({"stages": "all"}, "unknown stages 'all'"),
        ({"patience": 1, "arch": "multistage"}, "--arch separate"),
        ({"times": "even"}, "unknown times 'even': take stages, uniform"),
        ({"weight": "snr"}, "unknown weight 'snr': take min-snr, none"),
        ({"weight": "min-snr", "process": "edm"}, "leave out --weight"),
        ({"decay": "cosine"}, "unknown decay 'cosine': take linear, none"),
    ],
)
def test_settings_that_cannot_work(workshop, sde, training, change, sentence):
    good = dict(arch="unified", process="vp", stages="mixed", patience=0)
    training.check_settings(**good)
    with pytest.raises(workshop.BadInput, match=sentence):
        training.check_settings(**{**good, **change})


def test_every_recipe_has_a_network(workshop, sde, unet, training):
    for dataset, known in workshop.DATASETS.items():
        for arch in ("multistage", "unified", "separate"):
            for process in ("vp", "flow", "edm", "pfgm-64"):
                assert training.network_name("", dataset, arch, process) in unet.NETWORKS
        needed, more = {"steps", "batch", "lr", "warmup", "flip"}, {"encoder", "decoders"}
        assert needed <= set(known["recipe"]) <= needed | more | set(training.PAPERS_WAY)
    assert training.network_name("", "celeba", "multistage", "vp") == "table5_1"
    assert training.network_name("cifar10", "celeba", "unified", "vp") == "cifar10_unified"
    assert training.network_name("table7_4", "cifar10", "multistage", "vp") == "table7_4"
    for network, arch, own in (
        *(("table5_1", "separate", "multistage"), ("table5_1", "unified", "multistage")),
        *(("table7_1", "multistage", "unified"), ("table3_separate", "unified", "separate")),
    ):
        with pytest.raises(
            workshop.BadInput, match=f"'{network}' is {own}, not {arch}: give --arch"
        ):
            training.network_name(network, "cifar10", arch, "vp")


def test_what_is_asked_for_goes_before_the_recipe_and_that_before_the_paper(training):
    nothing = dict.fromkeys(training.PAPERS_WAY, "")
    papers = dict(stages="uniform", times="", weight="", decay="none")
    assert training.choose_recipe({}, nothing, "vp") == papers
    own = dict(stages="mixed", times="stages", weight="min-snr", decay="linear")
    recipe = dict(steps=5, **own)
    assert training.choose_recipe(recipe, nothing, "vp") == own
    # the times and weights of noise prediction are not those of others
    assert training.choose_recipe(recipe, nothing, "edm") == {**own, "times": "", "weight": ""}
    asked = dict(stages="uniform", times="uniform", weight="none", decay="none")
    assert training.choose_recipe(recipe, asked, "vp") == {**asked, "weight": ""}


def test_a_decayed_run_is_resumed_to_its_own_end_only(workshop, training):
    old = dict(steps=5, decay="linear", lr=1e-3)
    training.check_resumed(dict(old), old, "runs/a")
    training.check_resumed(dict(steps=7, lr=1e-3), dict(steps=5, lr=1e-3), "runs/a")
    with pytest.raises(
        workshop.BadInput, match="runs/a falls to zero at step 5: give --steps that"
    ):
        training.check_resumed({**old, "steps": 7}, old, "runs/a")
    with pytest.raises(workshop.BadInput, match="trained with lr = 0.001, not 0.1"):
        training.check_resumed({**old, "lr": 0.1}, old, "runs/a")


def test_a_network_for_other_times_is_refused(workshop, sde, training):
    with pytest.raises(workshop.BadInput, match="'edm' is made for times of 'edm', not of vp"):
        training.network_of(settings_for(network="edm"))


def test_files_read_while_training_give_the_same_weights(workshop, sde, training, tmp_path):
    from PIL import Image

    stream = random.Random(0)
    for i in range(12):
        colour = tuple(stream.randrange(256) for _ in range(3))
        Image.new("RGB", (20, 16), colour).save(tmp_path / f"{i:02}.png")
    files = workshop.PictureFiles(workshop.list_picture_files("folder", tmp_path), 8)
    held = workshop.read_pictures(files)
    settings = settings_for(channels=3, size=8, flip=True)
    ends = []
    for images, workers in ((held, 0), (files, 0), (files, 2)):
        torch.manual_seed(0)
        state = training.new_state(training.network_of(settings), 1e-3, 0)
        options = dict(batch=4, warmup=2, flip=True, workers=workers, bad=[])
        assert [step for step, _ in training.train(state, images, 4, **options)] == [1, 2, 3, 4]
        ends.append(torch.cat([p.detach().flatten() for p in state["model"].parameters()]))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_unreadable_files_are_named_and_counted(workshop, sde, training, tmp_path, capsys):
    from PIL import Image

    for i in range(150):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:03}.png")
    torn = tmp_path / "007.png"
    torn.write_bytes(torn.read_bytes()[:40])
    files = workshop.PictureFiles(workshop.list_picture_files("folder", tmp_path), 8)
    assert workshop.read_pictures(files).shape == (149, 3, 8, 8)
    said = capsys.readouterr().out
    assert "unreadable, skipped" in said and "007.png" in said and "1 of 150" in said
    bad = []
    for pictures in workshop.pictures_of_steps(files, 50, 0, range(1, 12), bad=bad):
        assert pictures.shape == (50, 3, 8, 8)
    assert bad == [torn]
    (tmp_path / "008.png").write_bytes(b"nothing")
    with pytest.raises(workshop.BadInput, match="2 of 150 pictures are unreadable"):
        workshop.read_pictures(files)
    with pytest.raises(workshop.BadInput, match="2 of 150 pictures are unreadable"):
        list(workshop.pictures_of_steps(files, 50, 0, range(1, 30), bad=[]))


def test_a_batch_without_a_readable_picture_is_one_sentence(workshop, sde, training, tmp_path):
    """From a worker too, whose exceptions arrive with its whole trace."""
    (tmp_path / "a.png").write_bytes(b"nothing")
    files = workshop.PictureFiles(workshop.list_picture_files("folder", tmp_path) * 1000, 8)
    for workers in (0, 1):
        # all of them are one file, so that it counts once: far below the 1% that are refused
        with pytest.raises(
            workshop.BadInput, match="^none of the pictures of a batch is readable"
        ) as e:
            list(workshop.pictures_of_steps(files, 4, 0, range(1, 3), workers, bad=[]))
        assert "\n" not in str(e.value)


def test_pictures_are_opened_by_as_many_workers_as_asked(
    workshop, sde, training, tmp_path, monkeypatch
):
    from PIL import Image

    Image.new("RGB", (8, 8), (9, 8, 7)).save(tmp_path / "a.png")
    asked, read = [], workshop.read_pictures
    watched = lambda pictures, workers: asked.append(workers) or read(pictures)  # noqa: E731
    monkeypatch.setattr(workshop, "read_pictures", watched)
    found = workshop.open_data_set("folder", tmp_path, 8, 4.0, 3)
    assert found[:, :, 0, 0].tolist() == [[9, 8, 7]] and asked == [3]
    large = workshop.open_data_set("folder", tmp_path, 8, 0.0, 3)
    assert isinstance(large, workshop.PictureFiles) and asked == [3]


def test_a_few_pictures_take_the_published_boundaries(
    workshop, sde, unet, training, capsys, monkeypatch
):
    def fail(*args, **how):
        raise workshop.BadInput("alpha = 0.9 leaves no t_1 < t_2")

    def find(n):
        return training.find_boundaries("", "folder", torch.zeros(n, 3, 8, 8).byte(), "vp")

    assert find(1) == pytest.approx(unet.PUBLISHED)  # clustering needs two
    assert "1 pictures are too few to find boundaries" in capsys.readouterr().out
    monkeypatch.setattr(training.clustering, "algorithm_1", fail)
    assert find(training.FEW - 1) == pytest.approx(unet.PUBLISHED)
    with pytest.raises(
        workshop.BadInput, match=r"no boundaries \(alpha = 0.9 .*\): give --boundaries"
    ):
        find(training.FEW)


@pytest.mark.parametrize("n", [1, 3, 10])
def test_a_handful_of_pictures_can_be_trained_on(workshop, root, training, tmp_path, n):
    from PIL import Image

    (tmp_path / "few").mkdir()
    for i in range(n):
        Image.new("RGB", (20, 20), (80 * i % 256, 30, 200)).save(tmp_path / "few" / f"{i}.png")
    flags = ("--dataset", "folder", "--root", str(tmp_path / "few"), "--size", "8", "--steps", "2")
    run_step(root, tmp_path, *flags, "--network", "digits", "--boundaries", "", "--name", "few")
    assert workshop.read_checkpoint(tmp_path / "few")["settings"]["boundaries"]
    assert (tmp_path / "few" / "denoised.png").is_file()


def run_step(root, out, *flags, launcher=(), wait=True):
    """Start step 04 on `digits` as a user would, one thread a process."""
    command = [sys.executable, *launcher, str(root / "04_train.py")]
    command += ["--boundaries", "0.1,0.44", "--steps", "12", "--batch", "8", "--out", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    process = subprocess.Popen(
        [*command, *flags], cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if wait:
        said = process.communicate(timeout=300)[0].decode()
        assert process.returncode == 0, said
    return process


def weights_of(training, folder):
    content = training.workshop.read_checkpoint(folder)
    return {**content["model"], **{f"ema.{k}": v for k, v in content["ema"].items()}}


@pytest.mark.parametrize("stages", ["uniform", "mixed"])
def test_two_processes_train_as_one(workshop, root, training, tmp_path, stages):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    rows = {}
    for name, launcher in (("one", ()), ("two", torchrun)):
        how = "--stages", stages, "--batch", "12"  # which two processes and three stages divide
        run_step(root, tmp_path, "--name", name, *how, launcher=launcher)
        rows[name] = workshop.read_log(tmp_path / name)
    assert len(rows["one"]) == len(rows["two"]) == 12
    for one, two in zip(rows["one"], rows["two"], strict=True):
        losses = [key for key in one if key.startswith("loss")]
        assert losses and losses == [key for key in two if key.startswith("loss")]
        for key in losses:
            assert two[key] == pytest.approx(one[key], rel=1e-5, abs=1e-6)
    one, two = (weights_of(training, tmp_path / name) for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4)
    assert not list(tmp_path.glob("two.*"))


def test_a_killed_run_goes_on_bit_for_bit(workshop, root, training, tmp_path):
    run_step(root, tmp_path, "--name", "whole")
    flags = ("--name", "killed", "--save_every", "2", "--sample_every", "1")
    process = run_step(root, tmp_path, *flags, wait=False)
    checkpoint, begin = tmp_path / "killed" / "checkpoint.pt", time.monotonic()
    while not checkpoint.exists() and time.monotonic() - begin < 120:
        time.sleep(0.01)
    time.sleep(random.Random().uniform(0, 0.3))
    process.kill()
    process.communicate()
    assert 2 <= workshop.read_checkpoint(tmp_path / "killed")["step"] <= 12
    run_step(root, tmp_path, *flags, "--resume")
    whole, killed = (weights_of(training, tmp_path / name) for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    rows = workshop.read_log(tmp_path / "killed")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["petaflops"] == workshop.read_log(tmp_path / "whole")[-1]["petaflops"]


def test_a_run_can_be_loaded_for_sampling(workshop, training, pixels, tmp_path):
    settings = settings_for(arch="separate", network="digits_separate", process="edm")
    state = fit_run(training, settings, pixels, tmp_path)
    content = workshop.read_checkpoint(tmp_path)
    model, stored = training.averaged_model(content), content["settings"]
    assert json.loads(json.dumps(stored)) == stored == settings
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.05, 0.3, 5.0])
    model, ema = model.cpu(), state["ema"]
    torch.testing.assert_close(model(x, t), ema(x, t))


def test_bfloat16_only_where_the_hardware_has_it(workshop, training, monkeypatch):
    """An RTX 20xx says that it can: it emulates, but for convolutions."""
    emulates = lambda including_emulation=True: including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulates)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with workshop.half_precision(torch.device("cuda")):
        assert not torch.is_autocast_enabled("cuda")


def test_more_processes_than_gpus_are_refused(workshop, sde, training, monkeypatch):
    before = torch.backends.cudnn.benchmark
    assert not before  # importing the steps has set nothing
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    try:
        workshop.join_processes()
        assert torch.backends.cudnn.benchmark
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", "1")
        with pytest.raises(workshop.BadInput, match="among 1: give torchrun --nproc_per_node=1"):
            workshop.join_processes()
    finally:
        torch.backends.cudnn.benchmark = before


def test_the_trial_takes_the_steps_that_training_takes(training, pixels, tmp_path):
    for stages, kinds in (("mixed", [[0, 1, 2]]), ("uniform", [0, 1, 2])):
        settings, seen = settings_for(stages=stages), []
        state = training.new_state(training.network_of(settings), 1e-3, 0)
        model = state["model"]
        state["forward"] = lambda x, t, stage, m=model, s=seen: s.append(stage) or m(x, t, stage)
        training.estimate_training(state, settings)
        assert seen == 2 * kinds
        seen.clear()
        loop = training.train(state, pixels, 6, batch=4, stages=stages)
        assert all(list(losses) == sorted(losses) for _, losses in loop)
        assert len(seen) == 6 and all(stage in kinds for stage in seen)


def test_without_a_number_of_steps_time_tells_when_to_save(
    workshop, training, pixels, tmp_path, monkeypatch
):
    saved, state, settings = [], None, settings_for()
    monkeypatch.setattr(training, "save_checkpoint", lambda state, *_: saved.append(state["step"]))
    for minutes, expected in ((workshop.TEN_MINUTES, [6]), (-1, [1, 2, 3, 4, 5, 6])):
        monkeypatch.setattr(workshop, "TEN_MINUTES", minutes)
        state = training.new_state(training.network_of(settings), 1e-3, 0)
        saved.clear()
        assert training.fit(state, pixels, settings, tmp_path) and saved == expected


def test_training_without_enough_memory_is_one_sentence(workshop, sde, training, pixels, tmp_path):
    def full(*args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    state = training.new_state(training.network_of(settings_for()), 1e-3, 0)
    state["forward"] = full
    with pytest.raises(workshop.BadInput, match=r"\(for 2\.00 GiB more\): give a smaller --batch"):
        training.fit(state, pixels, settings_for(), tmp_path)


EDGES = torch.tensor([1e-3, 0.1, 0.44, 1.0])


def test_the_second_term_of_equation_4_is_the_noise(sde, training, pixels):
    x0 = pixels[:5].double() / 127.5 - 1
    eps, t = torch.randn(5, 1, 8, 8).double(), torch.tensor([0.01, 0.1, 0.3, 0.6, 1.0]).double()
    s, sigma = (f(t)[:, None, None, None] for f in (sde.VP.s, sde.VP.sigma))
    xt = (s * (x0 + sigma * eps)).requires_grad_()
    log_p = torch.distributions.Normal(s * x0, s * sigma).log_prob(xt).sum()
    (score,) = torch.autograd.grad(log_p, xt)
    torch.testing.assert_close(s * sigma * score, -eps)
    model = lambda x, t: 0.3 * x  # noqa: E731
    expected = ((0.3 * xt + s * sigma * score) ** 2).mean()
    assert training.compute_loss(model, x0, t, eps).item() == pytest.approx(expected.item())


def test_a_plain_batch_is_of_one_stage_each_as_often(unet, training, pixels):
    model, generator = tiny(unet), torch.Generator().manual_seed(0)
    seen, turned = [], 0
    for step in range(1, 601):
        x0, t, eps, k = training.draw_batch(pixels, EDGES, 32, step, generator, flip=step > 500)
        assert x0.shape == eps.shape == (32, 1, 8, 8) and -1 <= x0.min() and x0.max() <= 1
        assert model.stage(t).unique().tolist() == [k]
        seen.append((k, (t.mean() - EDGES[k]) / (EDGES[k + 1] - EDGES[k])))
        i = torch.randint(64, (32,), generator=training.workshop.step_generator(0, 2 * step))
        turned += int((x0 != pixels[i] / 127.5 - 1).flatten(1).any(1).sum())
    for k in range(3):
        places = torch.stack([place for stage, place in seen if stage == k])
        assert len(places) == pytest.approx(200, abs=50)
        assert places.mean().item() == pytest.approx(0.5, abs=0.02)
    assert turned == pytest.approx(1600, abs=150)  # half of the pictures of the last 100 steps


def test_a_plain_step_clips_and_warms_up(training):
    model = torch.nn.Linear(3, 1)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    loss = 100 * model(torch.tensor([3.0, 0.0, 4.0])).sum()
    training.training_step(model, optimizer, loss, step=5, warmup=10)
    gradient = torch.tensor([3.0, 0.0, 4.0]) / 26**0.5  # of length 1 with that of the bias
    torch.testing.assert_close(before - model.weight, 5e-3 * gradient[None], rtol=1e-3, atol=1e-6)
    assert training.training_step(model, optimizer, model.bias.sum(), 99, 10) is None
    assert optimizer.param_groups[0]["lr"] == 1e-2


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


def test_no_batch_is_read_once_no_stage_is_active(workshop, unet, training, pixels, monkeypatch):
    read, plain = [], workshop.pictures_of_steps

    def watched(images, batch, seed, steps, *rest):
        for step in steps:
            read.append(step)
            yield from plain(images, batch, seed, [step], *rest)

    monkeypatch.setattr(workshop, "pictures_of_steps", watched)
    state = training.new_state(tiny(unet), 1e-3, seed=0)
    for step, _ in training.train(state, pixels, 10, batch=4):
        if step == 3:
            state["active"].clear()
    assert state["step"] == 3 and read == [1, 2, 3]
    assert list(training.train(state, pixels, 10, batch=4)) == [] and read == [1, 2, 3]


def test_losses_are_drawn_a_stage_a_colour(training):
    training.draw_losses({2: [(1, 0.1), (3, 0.05)], 0: [(2, 1.0)], 1: []})
    found = [(line.get_label(), line.get_color()) for line in training.plt.gca().get_lines()]
    training.plt.close()
    assert found == [("stage 0", "C0"), ("stage 2", "C2")]


def test_the_learning_rate_falls_to_zero(training):
    """In even steps after the warm-up, the last being one step's worth above zero."""
    model = torch.nn.Linear(1, 1)
    optimizer, rates = torch.optim.Adam(model.parameters(), 0.5), []
    for step in range(1, 11):
        training.training_step(model, optimizer, model.bias.sum(), step, warmup=2, decay=10)
        rates.append(optimizer.param_groups[0]["lr"])
    expected = [0.5 * (11 - step) / 10 for step in range(1, 11)]
    assert rates == pytest.approx([expected[0] / 2, *expected[1:]])


def drawn_times(training, pixels, monkeypatch, model, **options):
    """Train a few steps and collect the times that the network was asked about."""
    seen, ask = [], training.weighted_error

    def watch(forward, x0, eps, t, process, **stage):
        seen.append(t.clone())
        return ask(forward, x0, eps, t, process, **stage)

    monkeypatch.setattr(training, "weighted_error", watch)
    state = training.new_state(model, 1e-4, seed=0)
    for _, losses in training.train(state, pixels, 60, batch=32, **options):
        assert set(losses) <= set(range(len(model.decoders)))
    return torch.cat(seen)


@pytest.mark.parametrize("stages", ["uniform", "mixed"])
def test_one_decoder_is_dealt_the_times_of_three_stages(
    unet, training, pixels, monkeypatch, stages
):
    model = tiny(unet, decoders=(4,), boundaries=())
    how = dict(stages=stages, times="stages", cuts=[0.1, 0.44])
    t = drawn_times(training, pixels, monkeypatch, model, **how)
    shares = torch.bucketize(t, torch.tensor([0.1, 0.44])).bincount() / len(t)
    # 60 draws of a stage have a standard deviation of 0.06; a mixed batch deals 11, 11 and 10
    off = 0.2 if stages == "uniform" else 0.021
    assert shares.tolist() == pytest.approx([1 / 3] * 3, abs=off)
    plain = drawn_times(training, pixels, monkeypatch, model, stages=stages)
    assert (plain < 0.1).float().mean().item() == pytest.approx(0.1, abs=0.03)


def test_stages_can_be_drawn_by_their_lengths(unet, training):
    model = tiny(unet)
    edges = training.stage_edges(model, "vp")
    chance = training.stage_chances(edges, "vp", [0, 1, 2], "uniform")
    assert chance.tolist() == pytest.approx([0.099 / 0.999, 0.34 / 0.999, 0.56 / 0.999])
    even = training.stage_chances(training.stage_edges(model, "edm"), "edm", [0, 1, 2], "stages")
    assert even.tolist() == pytest.approx([1 / 3] * 3)


def test_times_of_the_stages_weigh_them_alike(unet, training, pixels):
    """A mixed batch of a unified network has the mean of the three stages' losses as its loss."""
    model, losses = unet.randomize(tiny(unet, decoders=(4,), boundaries=())), []
    state = training.new_state(model, 0.0, seed=0)
    how = dict(batch=31, stages="mixed", times="stages", cuts=[0.1, 0.44])  # 11, 10 and 10
    original = training.training_step

    def step(model, optimizer, loss, *args):
        losses.append(loss.item())
        return original(model, optimizer, loss, *args)

    training.training_step = step
    try:
        errors, ask = [], training.weighted_error
        training.weighted_error = lambda *a, **k: errors.append(ask(*a, **k)) or errors[-1]
        list(training.train(state, pixels, 2, **how))
    finally:
        training.training_step, training.weighted_error = original, ask
    for loss, error in zip(losses, errors, strict=True):
        means = [error[k::3].mean().item() for k in range(3)]
        assert loss == pytest.approx(sum(means) / 3, rel=1e-5)


def trunk_of(training, pixels, folder, **changes):
    """Train a network of one decoder for three steps and save it: the content of its checkpoint."""
    settings = settings_for(
        network="digits_unified", decoders=[4], encoder=4, boundaries=[], **changes
    )
    state = training.prepare_state(settings)
    state["petaflops"] = [3e-9, 9e-9]
    list(training.train(state, pixels, 3, batch=8))
    training.save_checkpoint(state, settings, folder)
    return settings, state


def test_every_stage_begins_with_what_the_trunk_has_learned(workshop, training, pixels, tmp_path):
    _, trunk = trunk_of(training, pixels, tmp_path)
    settings = settings_for(encoder=4, decoders=[4, 4, 4], start_from=str(tmp_path))
    state = training.prepare_state(settings, trunk=workshop.read_checkpoint(tmp_path))
    assert state["step"] == 3 and state["petaflops"] == [3e-9, 9e-9]
    x, t = torch.randn(9, 1, 8, 8), torch.linspace(0.02, 0.98, 9)
    for key in ("model", "ema"):
        with torch.no_grad():
            torch.testing.assert_close(state[key](x, t), trunk[key].eval()(x, t))
    theirs = dict(trunk["model"].named_parameters())
    for name, p in state["model"].named_parameters():
        part, _, rest = name.split(".", 2)
        old = trunk["optimizer"].state[theirs[f"{part}.0.{rest}"]]
        for key, value in state["optimizer"].state[p].items():
            assert torch.equal(value, old[key]) and value is not old[key]
    before = [p.clone() for p in state["model"].decoders[0].parameters()]
    list(training.train(state, pixels, 5, batch=8, stages="mixed"))
    assert state["step"] == 5  # and the decoders go ways of their own
    for other in state["model"].decoders[1:]:
        assert not torch.equal(other.last.weight, state["model"].decoders[0].last.weight)
    assert not torch.equal(before[0], next(state["model"].decoders[0].parameters()))


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(decoders=[8, 4, 4]), "encoder of 4 channels and decoders of 4, here are"),
        (dict(encoder=8), "here are an encoder of 8 channels"),
        (dict(process="edm", boundaries=[0.1, 3.0]), "has process 'vp', not 'edm'"),
        (dict(steps=3), "has come to step 3, from which steps are counted on"),
    ],
)
def test_a_trunk_that_does_not_fit(workshop, training, pixels, tmp_path, change, sentence):
    trunk_of(training, pixels, tmp_path)
    settings = settings_for(encoder=4, decoders=[4, 4, 4], start_from="runs/trunk")
    with pytest.raises(workshop.BadInput, match=sentence):
        trunk = workshop.read_checkpoint(tmp_path)
        training.prepare_state({**settings, **change}, trunk=trunk)


def test_a_torn_trunk_is_named(workshop, training, pixels, tmp_path):
    trunk_of(training, pixels, tmp_path)
    trunk = workshop.read_checkpoint(tmp_path)
    del trunk["optimizer"]
    settings = settings_for(encoder=4, decoders=[4, 4, 4], start_from="runs/trunk")
    with pytest.raises(workshop.BadInput, match="checkpoint of runs/trunk does not fit"):
        training.prepare_state(settings, trunk=trunk)


def test_networks_of_three_do_not_become_one(workshop, training, tmp_path):
    three = settings_for(encoder=4, decoders=[4, 4, 4])
    training.save_checkpoint(
        training.prepare_state(three) | dict(petaflops=[0, 0]), three, tmp_path
    )
    one = settings_for(network="digits_unified", encoder=4, decoders=[4], boundaries=[])
    trunk = workshop.read_checkpoint(tmp_path)
    with pytest.raises(workshop.BadInput, match="3 decoders, which cannot become 1"):
        training.prepare_state({**one, "start_from": "runs/three"}, trunk=trunk)


@pytest.mark.parametrize(
    "encoder, decoders, expected",
    [
        (0, "", (None, None)),
        (8, "", (8, [12, 8, 4])),
        (8, "8, 8, 8", (8, [8, 8, 8])),
        (0, "[9]", (None, [9])),
    ],
)
def test_widths(training, encoder, decoders, expected):
    assert training.widths_of("digits", encoder, decoders) == expected


@pytest.mark.parametrize("encoder, decoders", [(7, ""), (2, ""), (0, "8,x"), (0, "8,0")])
def test_widths_that_cannot_be(workshop, training, encoder, decoders):
    with pytest.raises(workshop.BadInput, match="encoder = |decoders '"):
        training.widths_of("digits", encoder, decoders)


def test_min_snr_weighs_the_picture_s_error_by_5_at_most(sde, training):
    t = torch.tensor([0.001, 0.02, 0.1, 0.3, 0.9])
    weight = training.min_snr(t, sde.VP)
    snr = (sde.VP.s(t) / (sde.VP.s(t) * sde.VP.sigma(t))) ** 2
    torch.testing.assert_close(weight * snr, snr.clamp(max=5), check_dtype=False)


def test_weights_change_the_loss_that_is_minimised_and_not_the_one_that_is_told(
    unet, sde, training, pixels, monkeypatch
):
    told, minimised, original = {}, {}, training.training_step
    for weight in ("", "min-snr"):
        losses = minimised.setdefault(weight, [])

        def step(model, optimizer, loss, *args, losses=losses):
            losses.append(loss.item())
            return original(model, optimizer, loss, *args)

        monkeypatch.setattr(training, "training_step", step)
        state = training.new_state(unet.randomize(tiny(unet)), 0.0, seed=0)
        steps = training.train(state, pixels, 4, batch=9, stages="mixed", weight=weight)
        told[weight] = [{k: loss.item() for k, loss in losses.items()} for _, losses in steps]
    assert told[""] == told["min-snr"]
    for plain, less in zip(minimised[""], minimised["min-snr"], strict=True):
        assert 0.1 * plain < less < 0.9 * plain
