"""Step 03: the network against a plain U-Net written out by hand, mixed batches, cost."""

import math

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture
def multistage(unet):
    return unet.randomize(unet.build("digits"))


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
    c = conv(b, f"{e}.layers.1.conv", stride=2, padding=1)  # 4x4
    f = attend(block(c, f"{e}.layers.2.0"), f"{e}.layers.2.1")
    h = block(attend(block(f, f"{e}.middle.0"), f"{e}.middle.1"), f"{e}.middle.2")

    h = block(torch.cat([h, f], 1), f"{d}.layers.0.0")
    h = attend(block(torch.cat([h, c], 1), f"{d}.layers.1.0"), f"{d}.layers.1.1")
    h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
    h = block(torch.cat([h, b], 1), f"{d}.layers.2.0")
    h = block(torch.cat([h, a], 1), f"{d}.layers.3.0")
    return x + conv(F.silu(norm(h, f"{d}.norm")), f"{d}.last", padding=1)


def test_one_stage_equals_a_plain_unet(unet):
    model = unet.randomize(unet.build("digits_unified"))
    x, t = torch.randn(5, 1, 8, 8), torch.rand(5)
    torch.testing.assert_close(
        model(x, t), plain_unet(model.state_dict(), x, t), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["digits", "digits_separate"])
def test_a_mixed_batch_equals_each_picture_alone(unet, name):
    model = unet.randomize(unet.build(name, boundaries=(0.3, 0.6)))
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
    assert unet.build("digits", add_input=False)(x, t).abs().max() == 0
    assert torch.equal(unet.build("digits")(x, t), x)


def test_every_network_runs_and_its_parts_are_shared_as_named(unet):
    for name, kind in unet.NETWORKS.items():
        with torch.device("meta"):
            model = unet.build(name)
            x = torch.empty(1, model.channels, model.size, model.size)
            for k in range(len(model.decoders)):
                assert model.branch(x, torch.empty(1), k).shape == x.shape
        assert len(model.decoders) == len(kind["decoders"])
        assert len(model.encoders) == (len(model.decoders) if name.endswith("separate") else 1)


def test_cost_counts_a_convolution_and_everything_once(unet):
    layer = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.GroupNorm(1, 5), torch.nn.Flatten()
    )
    layer.append(torch.nn.Linear(5 * 16, 7))
    macs = unet.macs_as_published(lambda: layer(torch.zeros(1, 3, 4, 4)), layer)
    assert macs == 16 * 5 * 3 * 9 + 2 * 5 * 16 + 80 * 7
    rows = unet.cost("digits")
    model = unet.build("digits")
    assert rows["total"]["parameters"] == sum(p.numel() for p in model.parameters())
    shared = sum(p.numel() for p in model.encoders.parameters())
    assert (
        sum(rows[k]["parameters"] - shared for k in range(3)) + shared
        == (rows["total"]["parameters"])
    )
    for k in range(3):  # two true FLOPs a multiply-accumulate, attention on top, norms not
        assert 1.9 < rows[k]["true_gflops"] / rows[k]["gflops"] < 2.2
    assert rows[0]["gflops"] > rows[1]["gflops"] > rows[2]["gflops"]


def test_a_width_that_no_group_of_four_divides(unet):
    model = unet.build("digits", encoder=20, decoders=(36, 28, 6))
    assert model(torch.randn(1, 1, 8, 8), torch.tensor([0.9])).shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"boundaries": (0.5,)}, "3 decoders need 2 boundaries"),
        ({"boundaries": (0.6, 0.4)}, "strictly ascending"),
        ({"boundaries": (0.4, 0.4)}, "strictly ascending"),
        ({"boundaries": (0.0, 0.4)}, "positive"),
        ({"size": 9}, "divisible by 2"),
    ],
)
def test_contradictory_settings(unet, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        unet.build("digits", **changes)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 7, 8), (1, 8, 8)])
def test_pictures_that_do_not_fit(multistage, shape):
    with pytest.raises(ValueError, match="this network takes"):
        multistage(torch.zeros(shape), torch.zeros(shape[0]) + 0.5)


def test_unknown_network(unet):
    with pytest.raises(ValueError, match="unknown network 'nope': take one of cifar10"):
        unet.build("nope")
