"""Step 03: the networks against recorded outputs of the authors' code and a plain U-Net written
out by hand; mixed batches, the paper's tables; the converter of the authors' checkpoints."""

import importlib.util
import json
import math
import re
import runpy
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import command
from torch import nn


@pytest.fixture
def multistage(unet):
    return unet.randomize(unet.build_network("digits"))


def plain_unet(w, x, t):
    """The unified digits network written out with the functional API: w is its state dict."""

    def norm(h, name):
        channels = h.shape[1]
        groups = max(n for n in range(1, min(channels // 4, 16) + 1) if channels % n == 0)
        return F.group_norm(h, groups, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    def conv(h, name, **kw):
        return F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], **kw)

    def block(h, name):
        new = conv(F.silu(norm(h, f"{name}.norm1")), f"{name}.conv1", padding=1)
        shift = F.linear(F.silu(emb), w[f"{name}.time.weight"], w[f"{name}.time.bias"])
        new = F.silu(norm(new + shift[:, :, None, None], f"{name}.norm2"))
        skip = conv(h, f"{name}.skip") if f"{name}.skip.weight" in w else h
        return skip + conv(new, f"{name}.conv2", padding=1)

    def attend(h, name):
        B, c, H, W = h.shape
        q, k, v = conv(norm(h, f"{name}.norm"), f"{name}.qkv").reshape(B, 3, c, H * W).unbind(1)
        weight = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(c), 2)
        new = torch.einsum("bij,bcj->bci", weight, v).reshape(B, c, H, W)
        return h + conv(new, f"{name}.out")

    e, d = "encoders.0", "decoders.0"
    angle = 999 * t[:, None] * torch.exp(-math.log(1e4) * torch.arange(16) / 15)
    emb = torch.cat([angle.sin(), angle.cos()], 1)
    emb = F.silu(F.linear(emb, w[f"{e}.embed.0.weight"], w[f"{e}.embed.0.bias"]))
    emb = F.linear(emb, w[f"{e}.embed.2.weight"], w[f"{e}.embed.2.bias"])

    a = conv(x, f"{e}.first", padding=1)  # 8x8
    b = block(a, f"{e}.layers.0.0")
    c = conv(b, f"{e}.layers.1.0.conv", stride=2, padding=1)  # 4x4
    f = attend(block(c, f"{e}.layers.2.0"), f"{e}.layers.2.1")
    h = block(attend(block(f, f"{e}.middle.0"), f"{e}.middle.1"), f"{e}.middle.2")

    h = block(torch.cat([h, f], 1), f"{d}.layers.0.0")
    h = attend(block(torch.cat([h, c], 1), f"{d}.layers.1.0"), f"{d}.layers.1.1")
    h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
    h = conv(h, f"{d}.layers.1.2.conv", padding=1)
    h = block(torch.cat([h, b], 1), f"{d}.layers.2.0")
    h = block(torch.cat([h, a], 1), f"{d}.layers.3.0")
    return x + conv(F.silu(norm(h, f"{d}.norm")), f"{d}.last", padding=1)


def test_one_stage_equals_a_plain_unet(unet):
    model = unet.randomize(unet.build_network("digits_unified"))
    x, t = torch.randn(5, 1, 8, 8), torch.rand(5)
    torch.testing.assert_close(
        model(x, t), plain_unet(model.state_dict(), x, t), rtol=1e-4, atol=1e-4
    )


def plain_parts(unet, e):
    """What step 03 builds its small networks of above the line."""
    block = partial(unet.ResBlock, e=e, norm=unet.plain_norm)
    attend = partial(unet.Attention, norm=unet.plain_norm)
    make = SimpleNamespace(norm=unet.plain_norm, block=block, attend=attend)
    make.down, make.up, make.last = unet.Down, unet.Up, partial(nn.Conv2d, kernel_size=3, padding=1)
    make.middle = partial(unet.middle_block, block=block, attend=attend)
    return make


def test_the_plain_parts_and_dispatch_are_the_small_network(unet):
    """With the same weights, under the same names in the same order."""
    model = unet.randomize(unet.build_network("digits", boundaries=(0.1, 0.44)))
    plan = (8, (1, 2), 1, (4,), plain_parts(unet, 128))
    encoder = unet.Encoder(1, 32, *plan)
    decoders = [unet.Decoder(1, width, encoder.skip_widths, *plan) for width in (48, 32, 16)]
    for plain, full in zip([encoder, *decoders], [*model.encoders, *model.decoders], strict=True):
        assert list(plain.state_dict()) == list(full.state_dict())
        plain.load_state_dict(full.state_dict())
    x, t = torch.randn(9, 1, 8, 8), torch.tensor([0.9, 0.1, 0.05, 0.3, 0.6, 0.2, 1.0, 0.001, 0.44])
    assert torch.equal(unet.find_stage(t, (0.1, 0.44)), model.stage(t))
    assert unet.find_stage(t, ()).tolist() == [0] * 9
    found = unet.dispatch_batch(x, t, encoder, decoders, (0.1, 0.44))
    torch.testing.assert_close(found, model(x, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["digits", "digits_separate"])
def test_a_mixed_batch_equals_each_picture_alone(unet, name):
    model = unet.randomize(unet.build_network(name, boundaries=(0.3, 0.6)))
    x, t = torch.randn(9, 1, 8, 8), torch.tensor([0.9, 0.1, 0.5, 0.3, 0.6, 0.2, 1.0, 0.001, 0.59])
    assert model.stage(t).tolist() == [2, 0, 1, 1, 2, 0, 2, 0, 1]
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(9)])
    torch.testing.assert_close(model(x, t), alone, rtol=1e-4, atol=1e-4)


def test_gradients_of_a_mixed_batch_are_those_of_its_parts(multistage):
    x, t = torch.randn(6, 1, 8, 8), torch.tensor([0.9, 0.1, 0.5, 0.2, 0.7, 0.5])
    multistage(x, t).square().sum().backward()
    mixed = {n: p.grad.clone() for n, p in multistage.named_parameters()}
    multistage.zero_grad()
    for i in range(6):
        multistage(x[i : i + 1], t[i : i + 1]).square().sum().backward()
    for n, p in multistage.named_parameters():
        torch.testing.assert_close(mixed[n], p.grad, rtol=1e-3, atol=1e-3 * p.grad.abs().max())


def test_a_stage_does_not_touch_other_decoders(multistage):
    multistage(torch.randn(2, 1, 8, 8), torch.tensor([0.05, 0.1])).sum().backward()
    touched = [any(p.grad is not None for p in d.parameters()) for d in multistage.decoders]
    assert touched == [True, False, False]
    assert all(p.grad is not None for p in multistage.encoders.parameters())


def test_the_untrained_network_predicts_zero_or_its_input(unet):
    x, t = torch.randn(4, 1, 8, 8), torch.rand(4)
    assert unet.build_network("digits", add_input=False)(x, t).abs().max() == 0
    assert torch.equal(unet.build_network("digits")(x, t), x)


def test_every_network_runs_and_its_parts_are_shared_as_named(unet):
    for name, kind in unet.NETWORKS.items():
        if re.match("table[567]", name):
            continue  # these run where their cost is counted
        with torch.device("meta"):
            model = unet.build_network(name)
            x = torch.empty(1, model.channels, model.size, model.size)
            for k in {0, len(model.decoders) - 1}:
                assert model.branch(x, torch.empty(1), k).shape == x.shape
        assert len(model.decoders) == len(kind["decoders"])
        assert len(model.encoders) == (len(model.decoders) if "separate" in name else 1)


def test_cost_counts_a_convolution_and_everything_once(unet):
    layer = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.GroupNorm(1, 5), nn.Flatten())
    layer.append(nn.Linear(5 * 16, 7))
    macs = unet.macs_as_published(lambda: layer(torch.zeros(1, 3, 4, 4)), layer)
    assert macs == 16 * 5 * 3 * 9 + 2 * 5 * 16 + 80 * 7
    rows = unet.cost("digits")
    model = unet.build_network("digits")
    assert rows["total"]["parameters"] == sum(p.numel() for p in model.parameters())
    shared = sum(p.numel() for p in model.encoders.parameters())
    own = [rows[k]["parameters"] - shared for k in range(3)]
    assert sum(own) + shared == rows["total"]["parameters"]
    for k in range(3):  # two true FLOPs a multiply-accumulate, attention on top, norms not
        assert 1.9 < rows[k]["true_gflops"] / rows[k]["gflops"] < 2.2
    assert rows[0]["gflops"] > rows[1]["gflops"] > rows[2]["gflops"]


def test_a_width_that_no_group_of_four_divides(unet):
    model = unet.build_network("digits", encoder=20, decoders=(36, 28, 6))
    assert model(torch.randn(1, 1, 8, 8), torch.tensor([0.9])).shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"boundaries": (0.5,)}, "3 decoders need 2 boundaries"),
        ({"boundaries": (0.6, 0.4)}, "strictly ascending"),
        ({"boundaries": (0.4, 0.4)}, "strictly ascending"),
        ({"boundaries": (0.0, 0.4)}, "positive"),
        ({"size": 9}, "divisible by 2"),
        ({"boundaries": (0.4, 1.5)}, "below 1"),
    ],
)
def test_contradictory_settings(unet, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        unet.build_network("digits", **changes)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 7, 8), (1, 8, 8)])
def test_pictures_that_do_not_fit(multistage, shape):
    with pytest.raises(ValueError, match="this network takes"):
        multistage(torch.zeros(shape), torch.zeros(shape[0]) + 0.5)


SHRUNK = dict(size=16, encoder=16, decoders=(24, 16, 8), mults=(1, 2), blocks=1, attention=(8,))
# wide enough to tell GroupNorms of 16 groups from those of 32
WIDE = dict(SHRUNK, size=8, encoder=80, decoders=(96, 80, 16), attention=(4,))


def draw_weights(path):
    """What a recording holds, and its weights [(name, tensor)], in the release's order."""
    data = np.load(path)
    how = json.loads(str(data["weights"]))
    stream = np.random.RandomState(how["seed"])
    draw = lambda shape: (stream.randn(*shape) * how["scale"]).astype(np.float32)  # noqa: E731
    return data, [(name, torch.from_numpy(draw(shape))) for name, shape in how["order"]]


def recorded(unet, golden, which):
    """A shrunk network of the release: (arguments, recording, [(name, tensor)] in its order)."""
    data, named = draw_weights(golden / f"{which}_network.npz")
    ldm = dict(SHRUNK, encoder=32, decoders=(64, 32, 32), boundaries=unet.STEPS)
    kind = {
        "dpm": {**unet.NCSNPP, **SHRUNK, "boundaries": unet.PUBLISHED},
        "edm": {**unet.DDPMPP, **SHRUNK, "boundaries": (2.5103, 7.6577)},
        "edm_wide": {**unet.DDPMPP, **WIDE, "boundaries": (2.5103, 7.6577)},
        "ldm": {**unet.ADM, **ldm, "attended": ("every", "none", "none")},
    }[which]
    return kind, data, named


@pytest.fixture(scope="module")
def release(root):
    spec = importlib.util.spec_from_file_location("release", root / "tools" / "release.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def in_release_form(which, named, prefix="", state_dict=False):
    """What torch.save gets in the release: raw weights are halved, averaged ones are not."""
    if which.startswith("edm"):
        filters = {"model.enc.8x8_down.conv0.resample_filter": torch.ones(1, 1, 2, 2)}
        return dict(ema={**filters, **{f"{prefix}model.{name}": v for name, v in named}})
    if which == "ldm":
        state = {"betas": torch.zeros(1000), "model_ema.decay": torch.zeros(())}
        for name, tensor in named:
            state[f"model.{prefix}diffusion_model.{name}"] = tensor / 2
            state["model_ema.diffusion_model" + name.replace(".", "")] = tensor
        return dict(state_dict=state, global_step=3)
    raw = {f"{prefix}{name}": tensor / 2 for name, tensor in named}
    ema = dict(decay=0.9999, num_updates=3, shadow_params=[tensor for _, tensor in named])
    if state_dict:
        ema = {f"{prefix}{name}": tensor for name, tensor in named}
    return dict(model={**raw, "sigmas": torch.zeros(7)}, ema=ema, optimizer={}, step=3)


CASES = [
    ("dpm", ""),
    ("dpm", "module."),
    ("dpm", "state dict"),
    ("edm", ""),
    ("edm_wide", "module."),
]
CASES += [("ldm", ""), ("ldm", "_orig_mod.")]


@pytest.mark.parametrize("which, prefix", CASES)
def test_outputs_equal_those_of_the_release(
    workshop, unet, training, release, golden, monkeypatch, which, prefix
):
    """Through the converter, a run's checkpoint and back: the averages, in each stage."""
    kind, data, named = recorded(unet, golden, which)
    monkeypatch.setitem(unet.NETWORKS, "shrunk", kind)
    as_dict = prefix == "state dict"
    saved = in_release_form(which, named, "_orig_mod.module." if as_dict else prefix, as_dict)
    torch.save(saved, "model.ckpt")
    assert release.convert("model.ckpt", "runs/released") == ["runs/released/checkpoint.pt"]
    content, edm = workshop.read_checkpoint("runs/released"), which.startswith("edm")
    model = training.averaged_model(content)
    assert content["step"] == (0 if edm else 3) and not model.training
    x = torch.from_numpy(data["x"])
    for k in range(3):
        t = torch.tensor(float(data[f"sigma{k}" if edm else f"t{k}"])).expand(2)
        t = (t + 1) / 1000 if which == "ldm" else t  # a step of the schedule
        assert model.stage(t).tolist() == [k, k]
        expected = torch.from_numpy(data[f"F{k}" if edm else f"y{k}"])
        with torch.no_grad():
            found = model(x, t)
            assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
            if f"D{k}" in data:
                xt, s = x * t[0], t[:, None, None, None]
                D = xt - s * training.predict_noise(model, xt, t, "edm")
                expected = torch.from_numpy(data[f"D{k}"])
                assert (D - expected).abs().max() < 1e-4 * expected.abs().max()


def test_step_05_draws_from_what_the_converter_writes(
    unet, release, golden, root, monkeypatch, capsys
):
    """A network for grey pictures, made as the recorded one for colour."""
    kind, _, named = recorded(unet, golden, "dpm")
    monkeypatch.setitem(
        unet.NETWORKS, "shrunk", {**kind, "channels": 1, "size": 8, "attention": (4,)}
    )
    grey = [[1 if n == 3 and i < 2 else n for i, n in enumerate(v.shape)] for _, v in named]
    named = [(name, torch.randn(shape) / 10) for (name, _), shape in zip(named, grey, strict=True)]
    torch.save(in_release_form("dpm", named), "model.ckpt")
    monkeypatch.setattr(sys, "excepthook", None)
    flags = ["release.py", "model.ckpt", "runs/released", "--dataset", "digits"]
    monkeypatch.setattr(sys, "argv", flags)
    runpy.run_path(str(root / "tools" / "release.py"), run_name="__main__")
    assert sys.excepthook.__name__ == "report_bad_input"  # one sentence, and status 2
    command(5, "--name", "released", "--samples", 20, "--nfe", 3)
    out = capsys.readouterr().out
    assert "wrote runs/released/checkpoint.pt" in out and "3 evaluations; by stage: {0" in out
    assert "samples / real" in out


class Code:
    def __reduce__(self):
        return (print, ("this must never run",))


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_the_first_stage_of_ldm_loads_and_agrees(
    workshop, ldm, release, golden, monkeypatch, prefix
):
    """VQ-f4 with random weights as its authors' code runs it."""
    found, state = draw_weights(golden / "vq_autoencoder.npz")
    state = {prefix + name: value for name, value in state} | {"loss.logvar": torch.zeros(1)}
    path = "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": path})  # which LDM's files name
    with monkeypatch.context() as patch:
        for name in (path[:17], path[:27], path):
            patch.setitem(sys.modules, name, SimpleNamespace(ModelCheckpoint=callback))
        torch.save({"state_dict": state, "callbacks": {callback: {"best": 1.0}}}, "model.ckpt")
    assert release.convert("model.ckpt", "runs/vq") == ["runs/vq/autoencoder.pt"]
    model = ldm.load_first_stage("runs/vq/autoencoder.pt")
    assert model.options == workshop.VQ_F4
    with torch.no_grad():
        h = model.encode(torch.from_numpy(found["x"]))
        torch.testing.assert_close(h, torch.from_numpy(found["h"]), rtol=1e-5, atol=1e-6)
        assert torch.equal(model.codebook.nearest(h), torch.from_numpy(found["indices"]))
        y = model.decode(h)
        torch.testing.assert_close(y, torch.from_numpy(found["y"]), rtol=1e-4, atol=1e-5)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_other_files_are_no_checkpoints(workshop, unet, release, golden, monkeypatch, capsys):
    kind, _, named = recorded(unet, golden, "dpm")
    monkeypatch.setitem(unet.NETWORKS, "shrunk", kind)
    good = in_release_form("dpm", named)
    raw, (last, _) = good["model"], named[-1]
    latent = in_release_form("ldm", recorded(unet, golden, "ldm")[2])["state_dict"]
    del latent["model_ema.diffusion_modeltime_embed0weight"]
    for saved, sentence in [
        ({**good, "extra": Code()}, "model.ckpt is damaged, or holds more than tensors"),
        ({"model": dict(named[:-1])}, "shrunk: the checkpoint ends before decoders.2.last"),
        ({"model": {**raw, "de_modules.2.8.weight": torch.zeros(3)}}, "no place"),
        ({"model": {**raw, last: torch.zeros(4)}}, "has shape"),
        ({"model": {"de_modules.0.weight": torch.zeros(2)}}, "none of the published networks"),
        ({"model": {"conv.weight": torch.zeros(2)}}, "neither a network of the paper nor"),
        ([1, 2], "neither a network of the paper nor"),
        ({**good, "ema": {"shadow_params": [torch.zeros(1)]}}, "1 averaged weights for 304"),
        ({**good, "ema": {}}, "neither a network of the paper nor"),  # and not the raw weights
        ({"state_dict": latent}, "233 averaged weights for 234 parameters"),
    ]:
        torch.save(saved, "model.ckpt")
        with pytest.raises(workshop.BadInput, match=sentence):
            release.convert("model.ckpt", "runs/released")
    with pytest.raises(workshop.BadInput, match="there is no file none.pth"):
        release.convert("none.pth", "runs/released")
    assert not Path("runs").exists() and "this must never run" not in capsys.readouterr().out
    torch.save({"model": raw}, "model.ckpt")
    release.convert("model.ckpt", "runs/released")
    assert "no averaged weights: taking the raw ones" in capsys.readouterr().out
    with pytest.raises(workshop.BadInput, match="runs/released has checkpoint.pt already"):
        release.convert("model.ckpt", "runs/released")


def test_the_edm_network_is_the_released_one(unet, evaluation, training):
    rows, unified = unet.cost("edm"), unet.cost("edm_unified")
    assert rows["total"]["parameters"] == 128_792_233
    assert unified[0]["gflops"] == pytest.approx(20.69, abs=0.005)
    assert rows[0]["gflops"] == pytest.approx(35.15, abs=0.005)
    assert rows[2]["gflops"] == pytest.approx(7.31, abs=0.005)
    assert rows[1] == {**unified[0], "parameters": rows[1]["parameters"]}
    with torch.device("meta"):
        model = unet.build_network("edm")
    norms = [part for part in model.modules() if isinstance(part, torch.nn.GroupNorm)]
    assert max(norm.num_groups for norm in norms) == 16
    kernel, times = training.kernel_of("edm"), []
    eps = lambda x, t: times.append(float(t[0])) or x  # noqa: E731
    list(evaluation.heun(eps, kernel, torch.ones(1, 1, 1, 1), 35))
    stages = [sum(t >= cut for cut in unet.EDM_CUTS) for t in times]
    assert [stages.count(k) for k in range(3)] == [18, 4, 13]


SLIPS = {("table5_4", "total"), ("table7_2", 0), ("table7_2", 1), ("table7_2", "total")}  # GFLOPs


@pytest.mark.parametrize("table", [5, 6, 7])
def test_the_tables_of_the_paper_come_out(unet, table):
    for name, printed in unet.TABLES[table].items():
        rows = unet.cost(name)
        rows["total"]["gflops"] = unet.average_gflops(table, name, rows)
        for (k, row), pair in zip(rows.items(), printed, strict=True):
            if pair is None:
                continue
            if (table, pair[0]) != (7, 230):  # a slip for 237
                assert round(row["parameters"] / 1e6) == pair[0], (name, k)
            if (name, k) not in SLIPS:
                assert row["gflops"] == pytest.approx(pair[1], rel=0.01), (name, k)


def test_equation_23(unet):
    mean = unet.interpolate_parameters
    assert mean((0.0, 0.3), (0.4, 0.6), (10, 20, 30)) == pytest.approx(10)
    assert mean((0.3, 0.7), (0.4, 0.6), (10, 20, 30)) == pytest.approx(20)
    assert mean((0.0, 1.0), (0.4, 0.6), (10, 20, 30)) == pytest.approx(20)
    assert mean((0.5, 1.0), (0.4, 0.6), (10, 20, 30)) == pytest.approx(28)


@pytest.mark.parametrize("t", [-0.1, 1.01, math.nan])
def test_times_off_the_timeline(workshop, sde, multistage, t):
    x = torch.zeros(2, 1, 8, 8)
    for use in (lambda t: multistage(x, t), multistage.stage):
        with pytest.raises(workshop.BadInput, match=f"t = {t:g} lies outside the timeline"):
            use(torch.tensor([0.5, t]))


def test_filters_are_the_published_ones(unet):
    """One depthwise convolution equals zero-filling, padding and filtering written out."""
    h, taps = torch.randn(2, 3, 8, 8), (1, 3, 3, 1)
    k = torch.outer(torch.tensor(taps), torch.tensor(taps)) / 64.0

    def correlate(h):
        return F.conv2d(h, k.expand(3, 1, 4, 4), groups=3)

    zeros = torch.zeros(2, 3, 16, 16)
    zeros[..., ::2, ::2] = h
    up = 4 * correlate(F.pad(zeros, (2, 1, 2, 1)))
    torch.testing.assert_close(unet.Filter(taps, "up")(h), up)
    down = correlate(F.pad(h, (1, 1, 1, 1)))[..., ::2, ::2]
    torch.testing.assert_close(unet.Filter(taps, "down")(h), down)
    torch.testing.assert_close(unet.Filter((1, 1), "down")(h), F.avg_pool2d(h, 2))
    nearest = F.interpolate(h, scale_factor=2, mode="nearest")
    torch.testing.assert_close(unet.Filter((1, 1), "up")(h), nearest)


def test_known_stages_in_turns_give_the_same_as_looking_at_the_times(unet, multistage):
    x, t = torch.randn(8, 1, 8, 8), torch.tensor([0.9, 0.1, 0.5] * 3)[:8]
    assert torch.equal(multistage(x, t, stage=[2, 0, 1]), multistage(x, t))
    assert torch.equal(multistage(x[:1], t[:1], stage=[2, 0, 1]), multistage(x[:1], t[:1]))
    separate = unet.randomize(unet.build_network("digits_separate"))
    assert torch.equal(separate(x, t, stage=[2, 0, 1]), separate(x, t))


def test_under_autocast_norms_are_in_bfloat16_and_the_last_layer_is_not(unet):
    model, kinds = unet.build_network("digits"), {}
    note = lambda part, x, out: kinds.setdefault(type(part), set()).add(out.dtype)  # noqa: E731
    for part in model.modules():
        if isinstance(part, (nn.Conv2d, nn.GroupNorm)):
            part.register_forward_hook(note)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 1, 8, 8), torch.rand(2), stage=1)
    assert kinds[unet.GroupNorm] == kinds[nn.Conv2d] == {torch.bfloat16}
    assert kinds[unet.LastConv2d] == {torch.float32}


def test_attention_belongs_to_the_level_nearest_to_the_asked_one(unet):
    for size, sides in ((32, (16,)), (64, (16,)), (48, (12,)), (40, (20,)), (16, (16,))):
        assert unet.attended_sides({**unet.NETWORKS["table5_1"], "size": size}) == sides
    with torch.device("meta"):
        networks = [unet.build_network("table5_1", size=size) for size in (32, 48)]
    blocks = [sum("Attention" in type(m).__name__ for m in net.modules()) for net in networks]
    assert blocks == [12, 12]
