"""Step 06: both autoencoders, LDM's first stage, latents on disk, the model on LDM's steps."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import command
from PIL import Image

TINY = dict(kind="kl", channels=1, code=2, width=8, mults=(1, 2), blocks=1, entries=16)


@pytest.fixture(scope="module")
def pixels(workshop):
    return workshop.load_images("digits")[0]


# ------------------------------------------------------------------------------- autoencoders


def test_the_published_layout_has_the_published_parameters(workshop, ldm):
    """55,322,782: counted in the code of LDM's authors."""
    with torch.device("meta"):
        model = ldm.Autoencoder(**workshop.VQ_F4)
        assert ldm.unet.count_parameters(model) == 55_322_782
        # 12: the 1x1 convolution behind the encoder, and that before the decoder
        assert ldm.unet.count_parameters(model.encoder) == 22_337_411 + 12
        assert ldm.unet.count_parameters(model.decoder) == 32_960_771 + 12
        assert model.encode(torch.empty(2, 3, 256, 256)).shape == (2, 3, 64, 64)


def test_rounding_takes_the_nearest_entry_and_passes_the_gradient(ldm):
    book = ldm.Codebook(16, 3)
    book.vectors.data = torch.randn(16, 3)
    h = torch.randn(2, 3, 4, 5, requires_grad=True)
    rounded, e, index = book(h)
    for b, i, j in ((0, 0, 0), (1, 3, 4), (0, 2, 1)):
        gaps = [((h[b, :, i, j] - vector) ** 2).sum().item() for vector in book.vectors]
        assert index[b, i, j] == gaps.index(min(gaps))
        torch.testing.assert_close(rounded[b, :, i, j], book.vectors[index[b, i, j]])
    torch.testing.assert_close(e, rounded)
    weight = torch.randn_like(h)
    (rounded * weight).sum().backward()
    assert torch.equal(h.grad, weight) and book.vectors.grad is None


def test_the_pull_of_vq_moves_both_sides(workshop, ldm, pixels):
    """Codebook to encoder with weight 1, encoder to codebook with a quarter."""
    model, x = ldm.Autoencoder(**{**TINY, "kind": "vq"}), workshop.to_network_space(pixels[:8])
    rebuilt, pull = model.rebuild(x, None)
    h = model.encoder(x)
    gap = ((h - model.codebook(h)[1]) ** 2).mean()
    assert pull.item() == pytest.approx(1.25 * gap.item(), rel=1e-5)
    for part, weight in ((model.codebook.vectors, 1.0), (model.encoder[-1].bias, 0.25)):
        got, alone = (torch.autograd.grad(v, part, retain_graph=True)[0] for v in (pull, gap))
        torch.testing.assert_close(got, weight * alone, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(rebuilt, model.decode(h))  # which rounds


def test_the_pull_of_kl_is_that_of_gaussians(workshop, ldm, pixels):
    """Against torch's own; and what is decoded is a sample of them."""
    model, x = ldm.Autoencoder(**TINY), workshop.to_network_space(pixels[:32])
    mean, log_var = model.encoder(x).chunk(2, dim=1)
    theirs = torch.distributions.Normal(mean, (log_var / 2).exp())
    normal = torch.distributions.Normal(torch.zeros_like(mean), 1.0)
    exact = torch.distributions.kl_divergence(theirs, normal).mean()
    rebuilt, pull = model.rebuild(x, torch.Generator().manual_seed(5))
    assert pull.item() == pytest.approx(1e-4 * exact.item(), rel=1e-4)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(rebuilt, model.decoder(mean + noise * theirs.scale))


@pytest.mark.parametrize("kind", ["kl", "vq", "lesson"])
def test_training_rebuilds_pictures(ldm, pixels, kind):
    torch.manual_seed(0)  # the initial weights
    plan = {**TINY, "kind": kind, "width": 16, "entries": 64}
    model = ldm.SmallAutoencoder(c=16) if kind == "lesson" else ldm.Autoencoder(**plan)
    state = ldm.new_autoencoder_state(model, 5e-3 if kind == "lesson" else 3e-3, seed=0)
    errors = [log["error"] for _, log in ldm.train_autoencoder(state, pixels, 100, batch=32)]
    h, truth = ldm.encode_pictures(model, pixels[:600]), pixels[:600] / 255  # in parts
    rebuilt = ldm.decode_latents(model, h, 1.0)
    error = F.mse_loss(rebuilt, truth)
    assert error < 0.35 * truth.var()  # far better than the mean picture
    assert errors[-1] == pytest.approx(error.item(), rel=0.5) and errors[-1] < 0.3 * errors[0]
    torch.testing.assert_close(ldm.decode_latents(model, 3 * h, 3.0), rebuilt)
    if kind != "kl":
        rounded, _, index = model.codebook(h)
        torch.testing.assert_close(ldm.decode_latents(model, rounded, 1.0), rebuilt)  # it rounds
        share = index.flatten().bincount() / index.numel()
        assert torch.special.entr(share).sum().exp() > 8  # of 64 entries, in equal use


def test_what_an_autoencoder_gives_is_float32_under_autocast(ldm):
    for kind in ("kl", "vq"):
        model = ldm.Autoencoder(**{**TINY, "kind": kind})
        with torch.autocast("cpu", torch.bfloat16):
            h = model.encode(torch.rand(2, 1, 8, 8))
            assert h.dtype == model.decode(h).dtype == torch.float32
            assert model.encoder[0](torch.rand(2, 1, 8, 8)).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------ latents


def test_latents_have_unit_variance_come_back_and_know_whose_they_are(
    ldm, pixels, tmp_path, capsys
):
    path, tiny = tmp_path / "latents.pt", ldm.Autoencoder(**TINY).eval().requires_grad_(False)
    codes, scale = ldm.encode_set(tiny, pixels, path)
    assert codes.dtype == torch.half and codes.float().std().item() == pytest.approx(1, abs=1e-3)
    expected = scale * ldm.encode_pictures(tiny, pixels)
    torch.testing.assert_close(codes.float(), expected, rtol=2e-3, atol=1e-3)  # half precision
    plain = ldm.decode_latents(tiny, expected[:5] / scale, 1.0)
    torch.testing.assert_close(ldm.decode_latents(tiny, expected[:5], scale), plain)

    written = path.stat().st_mtime_ns
    again, same = ldm.encode_set(tiny, pixels, path)
    assert torch.equal(again, codes) and same == scale and path.stat().st_mtime_ns == written
    assert not capsys.readouterr().out
    changed = pixels.clone()
    changed[7, 0, 0, 0] += 1
    other = ldm.Autoencoder(**TINY).eval()  # another initialisation
    for model, pictures in ((other, pixels), (tiny, changed), (tiny, pixels[:100])):
        codes, scale = ldm.encode_set(model, pictures, path)
        expected = (scale * ldm.encode_pictures(model, pictures)).half()
        torch.testing.assert_close(codes, expected, rtol=2e-3, atol=1e-3)
        assert "of other pictures or another autoencoder: encoding anew" in capsys.readouterr().out


# --------------------------------------------------------------------------- the latent model


def test_times_are_steps_of_the_schedule_in_their_stage(training, unet, sde):
    model = unet.build_network("digits_latent")
    edges = training.stage_edges(model, "ldm")
    assert edges.tolist() == pytest.approx([0, 0.442, 0.631, 1])
    generator = torch.Generator().manual_seed(0)
    for k, (first, last) in enumerate([(1, 442), (443, 631), (632, 1000)]):
        t = training.draw_times(edges, "ldm", torch.full((40_000,), k), generator)
        steps = (1000 * t).round()
        torch.testing.assert_close(1000 * t, steps, rtol=1e-6, atol=1e-4)
        assert (steps.min(), steps.max()) == (first, last)
        assert len(steps.unique()) == last - first + 1  # none is left out
        assert set(model.stage(t).tolist()) == {k}
    assert training.stage_chances(edges, "ldm", [0, 2]).tolist() == [0.5, 0, 0.5]
    assert training.kernel_of("ldm") is sde.LDM
    on_a_step = unet.build_network("digits_latent", boundaries=(0.443, 0.632))
    assert training.stage_edges(on_a_step, "ldm").tolist() == edges.tolist()


def test_the_network_is_told_the_step_and_latents_stay_as_they_are(workshop, training):
    settings = dict(network="digits_latent", process="ldm", boundaries=[0.4425, 0.6315])
    for network in ("digits_latent", "digits"):
        assert training.network_of({**settings, "network": network}).encoders[0].time == "ldm"
    with pytest.raises(workshop.BadInput, match="made for times of 'ldm'"):
        training.network_of({**settings, "process": "vp"})
    codes = torch.randn(32, 2, 4, 4).half()
    assert torch.equal(workshop.to_network_space(codes), codes.float())


# ----------------------------------------------------------------------------- the command

FEW = "--code_steps 4 --batch 8 --samples 20 --nfe 3".split()
PARTS = [*FEW, "--no-compare", "--decay", "none"]  # it may go on beyond its first end


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of some steps with its unified network."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command(6, *FEW, "--steps", 6, "--name", "whole", "--decay", "none")
    return folder


def test_a_run_leaves_what_it_should(workshop, trained):
    run = trained / "runs" / "whole"
    table = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    sets = ("multistage / real", "unified / real", "rebuilt / real", "real / real")
    assert all(table[key]["samples"] == 20 for key in sets)
    ours, twin = (workshop.read_checkpoint(path)["settings"] for path in (run, run / "unified"))
    assert (ours["encoder"], ours["decoders"]) == (16, [24, 16, 8])
    assert (twin["encoder"], twin["decoders"], twin["boundaries"]) == (16, [16], [])
    assert ours["boundaries"] == [0.4425, 0.6315] and twin["cuts"] is None
    differ = {key for key in ours if ours[key] != twin[key]}
    assert differ == {"arch", "network", "boundaries", "decoders"}  # at six steps not even in those
    assert all((run / name).exists() for name in ("samples.png", "latents.png", "metrics.jsonl"))


def test_a_killed_run_goes_on_and_draws_again(workshop, trained, monkeypatch):
    """Killed in the middle of either training, and gone on with, it ends in the same bits."""
    write, fatal = workshop.write_checkpoint, {}

    def then_die(content, folder, name="checkpoint.pt"):
        write(content, folder, name)
        if name in fatal and fatal[name] == content["step"]:
            raise KeyboardInterrupt  # as abrupt as kill -9: nothing comes after it

    monkeypatch.setattr(workshop, "write_checkpoint", then_die)
    flags = [*PARTS, "--steps", 6, "--name", "parts", "--save_every", 2]
    for name, step, more in (("autoencoder.pt", 2, []), ("checkpoint.pt", 4, ["--resume"])):
        fatal.clear()
        fatal[name] = step
        with pytest.raises(KeyboardInterrupt):
            command(6, *flags, *more)
    fatal.clear()
    command(6, *flags, "--resume", "--sampler", "ddim")
    for name, part in (("autoencoder.pt", "model"), ("checkpoint.pt", "ema")):
        one = workshop.read_checkpoint(trained / "runs" / "whole", name)
        two = workshop.read_checkpoint("runs/parts", name)
        assert one["step"] == two["step"] and set(one[part]) == set(two[part])
        for key, value in one[part].items():
            assert torch.equal(two[part][key], value), key
    assert '"sampler": "ddim"' in Path("runs/parts/metrics.json").read_text(encoding="utf-8")


def test_a_run_keeps_its_autoencoder(workshop, trained, monkeypatch):
    monkeypatch.chdir(trained)
    flags = [*FEW[2:], "--name", "reuse", "--steps", 1, "--arch", "unified"]
    command(6, *flags, "--first_stage", "runs/whole/autoencoder.pt")  # that of another run
    other = workshop.read_checkpoint("runs/whole", "autoencoder.pt")
    other["model"] = {key: value + 1 for key, value in other["model"].items()}
    torch.save(other, "other.pt")
    for first_stage in (["--first_stage", "other.pt"], []):
        with pytest.raises(workshop.BadInput, match="was made with autoencoder = "):
            command(6, *flags, "--resume", *first_stage)


def test_two_processes_do_as_one(workshop, root):
    """They train the same autoencoder, and a latent model that differs by rounding."""
    flags = [*PARTS, "--batch", "12", "--steps", "4", "--kind", "vq"]  # which 2 and 3 divide
    command(6, *flags, "--name", "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    asked = [*torchrun, root / "06_ldm.py", *flags, "--name", "two"]
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    read = lambda file, part: (  # noqa: E731
        workshop.read_checkpoint(f"runs/{name}", file)[part] for name in ("one", "two")
    )
    a, b = read("autoencoder.pt", "model")
    assert all(torch.equal(b[key], value) for key, value in a.items())
    a, b = read("checkpoint.pt", "ema")
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-4, atol=1e-5)


@pytest.fixture
def vq(workshop, ldm):
    """A file of VQ-f4, narrower."""
    model = ldm.Autoencoder(**{**workshop.VQ_F4, "width": 32, "entries": 32})
    content = dict(options=model.options, model=model.state_dict(), step=0, of=0)
    workshop.write_checkpoint(content, ".", "vq.pt")


def test_a_colour_folder_trains_the_paper_s_network(workshop, unet, evaluation, monkeypatch, vq):
    """All narrower: on latents of VQ-f4. Latents stay on the disk."""
    Path("faces").mkdir()
    for i in range(24):
        noise = np.random.RandomState(i).randint(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(f"faces/{i:03}.png")
    small = dict(encoder=32, decoders=(64, 32, 32), attention=(4, 2, 1))
    monkeypatch.setitem(unet.NETWORKS, "table6_4", {**unet.NETWORKS["table6_4"], **small})
    few = lambda x: x.flatten(1)[:, :9].float()  # noqa: E731 - Inception's weights are not here
    monkeypatch.setattr(evaluation, "pick_extractor", lambda _: (few, "nine pixels"))
    flags = "--dataset folder --root faces --first_stage vq.pt --size 32 --memory 0"
    command(6, *flags.split(), *"--steps 1 --batch 4 --samples 12 --nfe 2".split())
    kept = torch.load("runs/folder-latent/latents.pt", weights_only=True)["latents"]
    assert kept.shape == (24, 3, 8, 8)
    settings = workshop.read_checkpoint("runs/folder-latent")["settings"]
    assert settings["size"] == 8 and settings["network"] == "table6_4"
