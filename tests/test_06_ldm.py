"""Step 06: both autoencoders, LDM's first stage, latents on disk, the model on LDM's steps."""

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

TINY = dict(kind="kl", channels=1, code=2, width=8, mults=(1, 2), blocks=1, entries=16)


@pytest.fixture
def pixels(workshop, sde):
    return workshop.load_images("digits")[0]


@pytest.fixture
def tiny(ldm):
    return ldm.Autoencoder(**TINY).eval().requires_grad_(False)


def run(root, folder, *flags, launcher=()):
    """Run the step as a script in a folder: the finished process."""
    command = [sys.executable, *launcher, str(root / "06_ldm.py"), *flags]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


# ------------------------------------------------------------------------------- autoencoders


def test_the_published_layout_has_the_published_parameters(workshop, ldm):
    """55,322,782: counted in the code of LDM's authors."""
    with torch.device("meta"):
        model = ldm.Autoencoder(**workshop.VQ_F4)
        assert ldm.unet.count_parameters(model) == 55_322_782
        assert (
            ldm.unet.count_parameters(model.encoder) == 22_337_411 + 12
        )  # and the 1x1 convolution after it
        assert ldm.unet.count_parameters(model.decoder) == 32_960_771 + 12
        assert model.encode(torch.empty(2, 3, 256, 256)).shape == (2, 3, 64, 64)


@pytest.fixture
def recording(golden):
    """VQ-f4 with random weights as its authors' code runs it: (arrays, state dict)."""
    found = np.load(golden / "vq_autoencoder.npz")
    how = json.loads(str(found["weights"]))
    r = np.random.RandomState(how["seed"])
    draw = lambda shape: (r.randn(*shape) * how["scale"]).astype(np.float32)  # noqa: E731
    return found, {name: torch.from_numpy(draw(shape)) for name, shape in how["order"]}


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_the_released_first_stage_loads_and_agrees(
    workshop, ldm, recording, tmp_path, monkeypatch, prefix
):
    found, state = recording

    class ModelCheckpoint:  # LDM's files name this class of Lightning, which nobody has here
        pass

    ModelCheckpoint.__module__ = "pytorch_lightning.callbacks.model_checkpoint"
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", ModelCheckpoint.__module__):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    sys.modules[ModelCheckpoint.__module__].ModelCheckpoint = ModelCheckpoint
    ModelCheckpoint.__qualname__ = "ModelCheckpoint"
    more = {"loss.logvar": torch.zeros(1), "model.diffusion_model.out.bias": torch.zeros(1)}
    state = {prefix + name: value for name, value in state.items()} | more
    saved = {"state_dict": state, "callbacks": {ModelCheckpoint: {"best": 1.0}}}
    torch.save(saved, tmp_path / "model.ckpt")
    monkeypatch.undo()

    model = ldm.load_first_stage(tmp_path / "model.ckpt")
    assert model.options == workshop.VQ_F4
    with torch.no_grad():
        h = model.encode(torch.from_numpy(found["x"]))
        torch.testing.assert_close(h, torch.from_numpy(found["h"]), rtol=1e-5, atol=1e-6)
        assert torch.equal(model.codebook.nearest(h), torch.from_numpy(found["indices"]))
        torch.testing.assert_close(
            model.decode(h), torch.from_numpy(found["y"]), rtol=1e-4, atol=1e-5
        )
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_other_files_are_no_first_stage(workshop, ldm, recording, tmp_path):
    _, state = recording
    path = tmp_path / "x.pt"
    cases = {
        "holds no autoencoder": {"options": {"kind": "kl"}, "model": {}},
        "holds no autoencoder.*conv_in": {"state_dict": {"a": torch.zeros(1)}},
        "has attention at several": {"state_dict": {**state, "encoder.down.2.attn.0.q.weight": 0}},
        "still in training": {"options": TINY, "model": {}, "step": 3},
    }
    for sentence, content in cases.items():
        torch.save(content, path)
        with pytest.raises(workshop.BadInput, match=sentence):
            ldm.load_first_stage(path)
    path.write_bytes(b"torn")
    with pytest.raises(workshop.BadInput, match="cannot be read as plain tensors"):
        ldm.load_first_stage(path)
    with pytest.raises(workshop.BadInput, match="there is no checkpoint"):
        ldm.load_first_stage(tmp_path / "none.pt")


def test_pictures_that_do_not_fit_are_refused(workshop, ldm, tiny):
    colour = ldm.Autoencoder(**{**TINY, "channels": 3})
    with pytest.raises(workshop.BadInput, match="takes colour pictures, and these are grey"):
        colour.encode(torch.zeros(1, 1, 8, 8))
    with pytest.raises(workshop.BadInput, match="9×8 cannot be made 2 times smaller"):
        tiny.encode(torch.zeros(1, 1, 9, 8))
    with pytest.raises(workshop.BadInput, match="unknown autoencoder 'gan'"):
        ldm.Autoencoder(**{**TINY, "kind": "gan"})


def test_rounding_takes_the_nearest_entry_and_passes_the_gradient(ldm):
    torch.manual_seed(0)
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


def test_the_pull_of_vq_moves_both_sides(workshop, ldm, pixels, training):
    """Codebook to encoder with weight 1, encoder to codebook with beta."""
    model = ldm.Autoencoder(**{**TINY, "kind": "vq"})
    x = workshop.to_network_space(pixels[:8])
    _, pull, log = ldm.reconstruct(model, x, None, beta=0.25)
    h = model.encoder(x)
    e = model.codebook(h)[1]
    assert pull.item() == pytest.approx(1.25 * ((h - e) ** 2).mean().item(), rel=1e-5)
    vectors, last = model.codebook.vectors, model.encoder[-1].bias
    for part, weight in ((vectors, 1.0), (last, 0.25)):
        got = torch.autograd.grad(pull, part, retain_graph=True)[0]
        alone = torch.autograd.grad(((h - e) ** 2).mean(), part, retain_graph=True)[0]
        torch.testing.assert_close(got, weight * alone, rtol=1e-4, atol=1e-7)
    index = model.codebook.nearest(h)
    share = index.flatten().bincount(minlength=16) / index.numel()
    perplexity = np.exp(-sum(p * np.log(p) for p in share.tolist() if p))
    assert log["perplexity"].item() == pytest.approx(perplexity, rel=1e-4)


def test_dead_entries_are_moved_onto_latents(ldm):
    book = ldm.Codebook(8, 2)
    book.vectors.data = torch.full((8, 2), 100.0)
    book.vectors.data[0] = 0.0
    h = torch.randn(4, 2, 3, 3)
    book.used[0] = 5
    assert ldm.revive_entries(book, h, torch.Generator().manual_seed(0)) == 7
    assert torch.equal(book.vectors[0], torch.zeros(2)) and book.used.sum() == 0
    rows = h.movedim(1, 3).reshape(-1, 2)
    assert all((rows == vector).all(1).any() for vector in book.vectors[1:])


def test_the_pull_of_kl_is_that_of_gaussians(workshop, ldm, pixels, training):
    """Against torch's own."""
    torch.manual_seed(0)
    model = ldm.Autoencoder(**TINY)
    x = workshop.to_network_space(pixels[:32])
    mean, log_var = model.encoder(x).chunk(2, dim=1)
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(
        normal(mean, (log_var / 2).exp()), normal(torch.zeros_like(mean), 1.0)
    ).mean()
    _, pull, log = ldm.reconstruct(model, x, torch.Generator().manual_seed(5))
    assert pull.item() == log["kl"].item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_training_rebuilds_pictures(ldm, pixels, tmp_path, kind):
    plan = {**TINY, "kind": kind, "width": 16, "entries": 64}
    state = ldm.new_autoencoder_state(plan, 8, 3e-3, seed=0)
    ldm.fit_autoencoder(state, pixels, 250, 64, tmp_path)
    model = ldm.load_first_stage(tmp_path / "autoencoder.pt")
    rebuilt = ldm.decode_latents(model, ldm.encode_pictures(model, pixels[:500]), 1.0)
    truth = pixels[:500] / 255
    assert F.mse_loss(rebuilt, truth) < 0.35 * truth.var()  # far better than the mean picture
    rows = [
        json.loads(line)
        for line in (tmp_path / "autoencoder.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert rows[-1]["step"] == 250 and rows[-1]["error"] < rows[0]["error"]
    if kind == "vq":
        assert rows[-1]["perplexity"] > 8  # of 64; without revival a few entries serve all
    else:
        assert rows[-1]["kl"] > 0


def test_an_interrupted_autoencoder_goes_on_bit_for_bit(ldm, unet, pixels, tmp_path):
    plan = {**TINY, "kind": "vq"}
    how = dict(batch=8, adversarial=0.5)
    fresh = lambda: ldm.new_autoencoder_state(plan, 8, 1e-3, seed=0)  # noqa: E731
    whole, cut, again = fresh(), fresh(), fresh()
    for _ in ldm.train_autoencoder(whole, pixels, 6, **how):
        pass
    for step, _ in ldm.train_autoencoder(cut, pixels, 6, **how):
        if step == 3:
            break
    ldm.save_autoencoder(cut, tmp_path / "autoencoder.pt", finished=False)
    ldm.resume_autoencoder(again, unet.read_tensors(tmp_path / "autoencoder.pt"))
    assert [step for step, _ in ldm.train_autoencoder(again, pixels, 6, **how)] == [4, 5, 6]
    for key, value in whole["model"].state_dict().items():
        assert torch.equal(again["model"].state_dict()[key], value), key


def test_ctrl_c_saves_an_autoencoder_in_training(ldm, unet, pixels, tmp_path, monkeypatch):
    plain = ldm.train_autoencoder

    def interrupted(*args, **kw):
        for item in plain(*args, **kw):
            if item[0] == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield item

    monkeypatch.setattr(ldm, "train_autoencoder", interrupted)
    state = ldm.new_autoencoder_state(TINY, 8, 1e-3, seed=0)
    assert ldm.fit_autoencoder(state, pixels, 6, 8, tmp_path) is False
    assert unet.read_tensors(tmp_path / "autoencoder.pt")["step"] == 3
    assert ldm.fit_autoencoder(state, pixels, 5, 8, tmp_path) is True
    assert "step" not in unet.read_tensors(tmp_path / "autoencoder.pt")


def test_the_discriminator_judges_patches_and_is_trained(ldm, pixels):
    for size, patches in ((8, 3), (16, 2), (32, 2), (256, 30)):
        with torch.device("meta"):
            assert ldm.Patches(3, size)(torch.empty(1, 3, size, size)).shape[2:] == (patches,) * 2
    state = ldm.new_autoencoder_state(TINY, 8, 2e-3, seed=0)
    before = {k: v.clone() for k, v in state["critic"].state_dict().items()}
    log = [row for _, row in ldm.train_autoencoder(state, pixels, 20, 16, adversarial=0.5)]
    assert all(torch.isfinite(row["doubt"]) for row in log)
    moved = [k for k, v in state["critic"].state_dict().items() if not torch.equal(v, before[k])]
    assert len(moved) == len(before)
    assert log[-1]["doubt"] < log[0]["doubt"]  # rebuilt pictures are still easy to tell


def test_lpips_takes_part_and_training_goes_on_without_its_weights(
    ldm, pixels, monkeypatch, capsys
):
    from torch_fidelity import sample_similarity_lpips as library

    def nothing(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(library, "load_state_dict_from_url", nothing)
    assert ldm.load_lpips("cpu") is None
    assert "LPIPS's weights cannot be had (OSError): going on without it" in capsys.readouterr().out

    import torchvision

    torch.manual_seed(0)
    random = torchvision.models.vgg16(weights=None)
    monkeypatch.setattr(library, "torchvision_load_pretrained_vgg16", lambda: random)
    linear = {
        f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1)
        for i, c in enumerate((64, 128, 256, 512, 512))
    }
    linear |= {f"net.{k}": v for k, v in library.VGG16features().state_dict().items()}
    monkeypatch.setattr(
        library,
        "load_state_dict_from_url",
        lambda *a, **k: {n: v for n, v in linear.items() if n[0] == "l"},
    )
    lpips = ldm.load_lpips("cpu")
    a, b = torch.rand(2, 1, 32, 32) * 2 - 1, torch.rand(2, 1, 32, 32, requires_grad=True)
    assert lpips(a, a).item() == 0 and lpips(a, b).item() > 0
    assert torch.autograd.grad(lpips(a, b), b)[0].abs().sum() > 0


def test_a_host_of_lpips_that_never_answers_is_given_up(
    workshop, ldm, sde, tmp_path, monkeypatch, capsys
):
    from torch_fidelity import sample_similarity_lpips as library

    monkeypatch.setattr(workshop, "PATIENCE", 0.3)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    begin = time.monotonic()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(20)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/vgg16.pth"
        monkeypatch.setattr(library, "URL_VGG16_LPIPS", url)
        assert ldm.load_lpips("cpu") is None
    assert time.monotonic() - begin < 20 and socket.getdefaulttimeout() is None
    assert "(TimeoutError): going on without it" in capsys.readouterr().out
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# ------------------------------------------------------------------------- the plain forms


def test_the_plain_loop_trains_as_the_whole_one(workshop, ldm, pixels):
    """With the same pictures, bit for bit: weights and errors."""
    state = ldm.new_autoencoder_state({**TINY, "kind": "vq"}, 8, 5e-3, seed=3)
    twin = copy.deepcopy(state["model"])
    plain = list(ldm.train_plainly(twin, pixels, steps=4, batch=16, seed=3))
    whole = [row["error"].item() / 4 for _, row in ldm.train_autoencoder(state, pixels, 4, 16)]
    assert plain == whole
    for a, b in zip(twin.parameters(), state["model"].parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_small_autoencoder_learns_and_is_used_as_the_others(ldm, pixels):
    model = ldm.SmallAutoencoder(c=16)
    errors = list(ldm.train_plainly(model, pixels, steps=80))
    z = ldm.encode_pictures(model, pixels[:600])  # in parts
    assert z.shape == (600, 2, 4, 4)
    rebuilt, truth = ldm.decode_latents(model, z, 1.0), pixels[:600] / 255
    assert F.mse_loss(rebuilt, truth) < 0.35 * truth.var() and errors[-1] < 0.3 * errors[0]
    rounded = model.codebook(z)[0]
    torch.testing.assert_close(ldm.decode_latents(model, rounded, 1.0), rebuilt)  # it rounds
    torch.testing.assert_close(ldm.decode_latents(model, 3 * z, 3.0), rebuilt)


def test_what_the_user_gave_takes_the_recipe_s_place(ldm):
    recipe = dict(code_steps=5, code_batch=4, perceptual=1.0, adversarial=0.5, lr=0.1, warmup=7)
    recipe.update(times="uniform", decay="linear")
    given = dict(code_steps=0, perceptual=0.0, adversarial=-1.0, lr=0.2, kind="vq")
    given.update(times="", decay="none")
    expected = {**recipe, "perceptual": 0.0, "lr": 0.2, "decay": "none"}
    assert ldm.fill_recipe(recipe, given) == expected


# ------------------------------------------------------------------------------------ latents


def test_latents_have_unit_variance_and_come_back(ldm, tiny, pixels, tmp_path):
    scale = ldm.encode_set(tiny, pixels, tmp_path, dict(size=8), shard=700)
    assert sorted(path.name for path in tmp_path.glob("*.npy")) == [
        f"{n:08}.npy" for n in (0, 700, 1400)
    ]
    codes = ldm.Latents(tmp_path, scale)
    whole = codes.all()
    assert len(codes) == 1797 and whole.std().item() == pytest.approx(1, abs=1e-3)
    expected = scale * ldm.encode_pictures(tiny, pixels)
    torch.testing.assert_close(whole, expected, rtol=1e-3, atol=1e-3)  # half precision on disk
    for i in (0, 699, 700, 1796):
        assert torch.equal(codes[i], whole[i])
    torch.testing.assert_close(
        ldm.decode_latents(tiny, expected[:5], scale),
        ldm.decode_latents(tiny, ldm.encode_pictures(tiny, pixels[:5]), 1.0),
    )


def test_encoding_goes_on_where_it_stopped_and_refuses_stale_latents(
    workshop, ldm, tiny, pixels, tmp_path
):
    about = dict(dataset="digits", size=8)
    scale = ldm.encode_set(tiny, pixels, tmp_path, about, shard=500)
    note = json.loads((tmp_path / "latents.json").read_text(encoding="utf-8"))
    assert note["scale"] == scale and note["pictures"] == 1797
    kept, lost = tmp_path / "00000500.npy", tmp_path / "00001000.npy"
    content, when = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    unscaled = json.dumps({k: v for k, v in note.items() if k != "scale"})
    (tmp_path / "latents.json").write_text(unscaled, encoding="utf-8")
    assert ldm.encode_set(tiny, pixels, tmp_path, about, shard=500) == scale
    assert lost.read_bytes() == content and kept.stat().st_mtime_ns == when

    other = ldm.Autoencoder(**TINY).eval()  # another initialisation
    assert ldm.hash_weights(other) != ldm.hash_weights(tiny) == note["autoencoder"]
    with pytest.raises(workshop.BadInput, match="belong to autoencoder"):
        ldm.encode_set(other, pixels, tmp_path, about)
    with pytest.raises(workshop.BadInput, match="belong to pictures 1797, and this run has 100"):
        ldm.encode_set(tiny, pixels[:100], tmp_path, about)
    with pytest.raises(workshop.BadInput, match="belong to dataset 'digits'"):
        ldm.encode_set(tiny, pixels, tmp_path, dict(dataset="mnist", size=8))


def pictures(folder, n, size=40):
    folder.mkdir()
    for i in range(n):
        pixels = np.random.RandomState(i).randint(0, 255, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")


def test_files_are_encoded_without_the_unreadable(workshop, ldm, sde, tmp_path):
    pictures(tmp_path / "faces", 12)
    (tmp_path / "faces" / "005.png").write_bytes(b"torn")
    files = workshop.PictureFiles(workshop.list_picture_files("folder", tmp_path / "faces"), 16)
    model = ldm.Autoencoder(**{**TINY, "channels": 3}).eval()
    scale = ldm.encode_set(model, files, tmp_path / "latents", dict(size=16), shard=8)
    codes = ldm.Latents(tmp_path / "latents", scale).all()
    known = workshop.read_pictures(
        workshop.PictureFiles([f for f in files.files if f.name != "005.png"], 16)
    )
    torch.testing.assert_close(
        codes, scale * ldm.encode_pictures(model, known), rtol=1e-3, atol=1e-3
    )
    assert [len(half) for half in ldm.choose_real_sets(files, 5)] == [5, 5]  # 11 can be read
    torn = workshop.PictureFiles([f for f in files.files if f.name == "005.png"], 16)
    with pytest.raises(
        workshop.BadInput, match=r"none of 1 pictures is readable, such as .*005\.png"
    ):
        ldm.cut_out(torn, 0, 1, 0)


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


def test_the_network_is_told_the_step_and_latents_stay_as_they_are(workshop, training, unet):
    settings = dict(network="digits_latent", process="ldm", boundaries=[0.4425, 0.6315])
    assert training.network_of(settings).encoders[0].time == "ldm"
    assert training.network_of({**settings, "network": "digits"}).encoders[0].time == "ldm"
    with pytest.raises(workshop.BadInput, match="made for times of 'ldm'"):
        training.network_of({**settings, "process": "vp"})
    codes = torch.randn(32, 2, 4, 4)
    assert torch.equal(workshop.to_network_space(codes), codes)


def test_names_of_latent_networks(ldm, unet):
    assert ldm.latent_network("", "digits", "multistage") == "digits_latent"
    assert ldm.latent_network("", "mnist", "unified") == "mnist_latent_unified"
    assert ldm.latent_network("", "celeba", "multistage") == "table6_4"
    assert ldm.latent_network("ldm", "celeba", "multistage") == "ldm"
    assert ldm.latent_network("", "celeba", "separate") == "ldm_separate"
    assert ldm.latent_boundaries("", "table6_4") == list(unet.STEPS)
    assert ldm.latent_boundaries("", "ldm_unified") == list(unet.STEPS)
    assert ldm.latent_boundaries("0.2, 0.5", "table6_4") == [0.2, 0.5]


def test_a_unified_twin_differs_in_the_decoders_alone(ldm, training):
    recipe, how = dict(encoder=16), dict(stages="mixed", times="stages", weight="", decay="linear")
    describe = lambda arch, *more: ldm.describe_network(arch, *more, how)  # noqa: E731
    ours = describe("multistage", "", "digits", recipe, "0.2,0.5")
    twin = describe("unified", "", "digits", recipe, "0.2,0.5")
    assert ours["boundaries"] == twin["cuts"] == [0.2, 0.5] and ours["cuts"] is None
    assert twin["boundaries"] == [] and (ours["encoder"], twin["encoder"]) == (16, 16)
    assert (ours["decoders"], twin["decoders"]) == ([24, 16, 8], [16])
    differ = {key for key in ours if ours[key] != twin[key]}
    assert differ == {"arch", "network", "boundaries", "cuts", "decoders"}
    how["times"] = ""  # a unified network has all times, in no stages
    assert describe("unified", "", "digits", recipe, "")["cuts"] is None
    equal = dict(encoder=16, decoders="16,8,16")
    assert describe("multistage", "", "digits", equal, "")["decoders"] == [16, 8, 16]
    assert describe("unified", "", "digits", equal, "")["decoders"] == [16]
    own = describe("unified", "mnist_latent", "digits", recipe, "")
    assert own["network"] == "mnist_latent_unified" and own["encoder"] is None


def test_a_scaled_down_copy_of_the_published_configuration_takes_a_step(
    workshop, ldm, sde, unet, evaluation, tmp_path, monkeypatch
):
    """Faces in files, VQ-f4 with both losses, the published network; all of it narrower."""
    pictures(tmp_path / "faces", 10)
    files = workshop.PictureFiles(workshop.list_picture_files("folder", tmp_path / "faces"), 32)
    state = ldm.new_autoencoder_state(
        {**workshop.VQ_F4, "width": 8, "entries": 32}, 32, 1e-4, seed=0
    )
    ldm.fit_autoencoder(state, files, 1, 4, tmp_path, adversarial=0.75, bad=[])
    model = ldm.load_first_stage(tmp_path / "autoencoder.pt")
    scale = ldm.encode_set(model, files, tmp_path / "latents", dict(size=32))
    codes = ldm.Latents(tmp_path / "latents", scale)  # read while training
    assert codes[0].shape == (3, 8, 8)

    small = dict(encoder=32, decoders=(64, 32, 32), attention=(4, 2, 1))
    monkeypatch.setitem(unet.NETWORKS, "narrow", {**unet.NETWORKS["table6_4"], **small})
    settings = dict(dataset="folder", arch="multistage", network="narrow", process="ldm", seed=0)
    settings.update(boundaries=list(unet.STEPS), channels=3, size=8, scale=scale, flip=False)
    settings.update(steps=1, batch=4, lr=1e-4, warmup=1, ema=0.9999)
    back = lambda z: ldm.decode_latents(model, z, scale)  # noqa: E731
    state, finished = ldm.train_latents(settings, codes, tmp_path, decode=back)
    assert finished and (tmp_path / "checkpoint.pt").exists()
    x = evaluation.sample(state["ema"], "ldm", 2, "dpm-solver++-2m", 5, grid="time")
    assert back(x).shape == (2, 3, 32, 32) and torch.isfinite(x).all()


def test_what_autograd_keeps_is_counted(unet):
    net = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.ReLU(), torch.nn.Linear(20, 5))
    x = torch.randn(3, 10)
    # the input of the first layer, and the output of the rectifier, which two layers share
    assert unet.kept_bytes(lambda: net(x), net) == 4 * (3 * 10 + 3 * 20)


# ----------------------------------------------------------------------------- from the shell


def test_dry_run_of_the_published_configuration(root, tmp_path):
    done = run(root, tmp_path, "--dataset", "celeba", "--size", "256", "--dry_run")
    assert (done.returncode, done.stderr) == (0, "")
    for line in (
        "autoencoder (vq): 55.32 million parameters",
        "latents 3×64×64",
        "network table6_4: 493.8 million parameters",
        "stage 0: 316 million parameters, 105.8 GFLOPs",
        "20 evaluations a latent, by stage: 8, 4, 8; 76.21 GFLOPs",  # Table 6: 76.19
        "500,000 steps of 48",
    ):
        assert line in done.stdout
    assert not list(tmp_path.iterdir())


TINY_RUN = ("--code_steps", "4", "--batch", "8", "--samples", "20", "--nfe", "3")


def test_a_run_goes_on_and_draws_again(workshop, root, tmp_path, training):
    flags = (*TINY_RUN, "--no-compare", "--decay", "none")  # it goes on beyond its first end
    assert run(root, tmp_path, *flags, "--steps", "6", "--name", "whole").returncode == 0
    assert run(root, tmp_path, *flags, "--steps", "3", "--name", "parts").returncode == 0
    done = run(root, tmp_path, *flags, "--steps", "6", "--name", "parts", "--resume")
    assert done.returncode == 0, done.stderr
    whole, parts = (
        workshop.read_checkpoint(tmp_path / "runs" / name) for name in ("whole", "parts")
    )
    assert whole["settings"] == parts["settings"]
    for key, value in whole["ema"].items():
        assert torch.equal(parts["ema"][key], value)
    step = whole["settings"]["autoencoder"]

    again = ("--resume", "--name", "parts", "--sampler", "ddim", *flags, "--steps", "6")
    assert run(root, tmp_path, *again).returncode == 0
    metrics = json.loads((tmp_path / "runs" / "parts" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["sampler"] == "ddim" and metrics["step"] == 6
    assert workshop.read_checkpoint(tmp_path / "runs" / "parts")["settings"]["autoencoder"] == step

    # a run keeps its own autoencoder
    own = (tmp_path / "runs" / "parts" / "autoencoder.pt").read_bytes()
    flags_5 = (*flags, "--seed", "5", "--steps", "1", "--name", "five")
    assert run(root, tmp_path, *flags_5).returncode == 0
    swapped = (*flags, "--steps", "6", "--name", "parts", "--resume", "--first_stage")
    done = run(root, tmp_path, *swapped, "runs/five/autoencoder.pt")
    assert done.returncode == 2 and "has another autoencoder" in done.stderr
    assert (tmp_path / "runs" / "parts" / "autoencoder.pt").read_bytes() == own
    done = run(root, tmp_path, *swapped, "runs/parts/autoencoder.pt")
    assert done.returncode == 0, done.stderr

    # the latents of one run do not serve the autoencoder of another
    stale = ("--latents", "runs/whole/latents", "--seed", "5", "--name", "new", "--steps", "1")
    done = run(root, tmp_path, *flags, *stale)
    assert done.returncode == 2 and "belong to autoencoder" in done.stderr
    # its own autoencoder may use them
    reuse = ("--first_stage", "runs/whole/autoencoder.pt", "--latents", "runs/whole/latents")
    done = run(
        root, tmp_path, *flags, *reuse, "--arch", "unified", "--steps", "1", "--name", "reuse"
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "runs" / "reuse" / "latents").exists()
    # and step 05 says whose business a latent run is
    step_05 = [sys.executable, str(root / "05_sample_eval.py"), "--name", "whole"]
    done = subprocess.run(step_05, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "06_ldm.py --resume" in done.stderr.splitlines()[-1]


def test_two_processes_do_as_one(workshop, root, tmp_path, training):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    flags = (*TINY_RUN, "--steps", "4", "--no-compare", "--kind", "vq")
    flags += ("--batch", "12")  # which two processes and three stages divide
    for name, launcher in (("one", ()), ("two", torchrun)):
        done = run(root, tmp_path, *flags, "--name", name, launcher=launcher)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = ((tmp_path / "runs" / name) for name in ("one", "two"))
    a, b = (torch.load(path / "autoencoder.pt", weights_only=True)["model"] for path in (one, two))
    for key, value in a.items():
        if key != "codebook.used":
            torch.testing.assert_close(b[key], value, rtol=1e-3, atol=1e-3)
    a, b = (workshop.read_log(path) for path in (one, two))
    assert [row["step"] for row in a] == [row["step"] for row in b] == [1, 2, 3, 4]
    for row, other in zip(a, b, strict=True):
        losses = [key for key in row if key.startswith("loss")]
        assert losses and all(other[k] == pytest.approx(row[k], rel=0.02) for k in losses)


WRONG = {
    "size": (["--dataset", "celeba", "--size", "250"], "250×250 cannot be made 4 times smaller"),
    "colour": (["--first_stage", "colour.pt"], "takes colour pictures, and these are grey"),
    "no file": (["--first_stage", "none.pt"], "there is no checkpoint none.pt"),
    "data set": (["--dataset", "faces"], "unknown dataset 'faces'"),
    "kind": (["--kind", "gan"], "unknown autoencoder 'gan'"),
    "resume": (["--resume"], "there is nothing to resume"),
    "network": (["--network", "digits_latnet"], "unknown network 'digits_latnet'"),
    "grid": (["--grid", "even"], "unknown grid 'even'"),
    "sampler": (["--sampler", "dpm"], "unknown sampler 'dpm'"),
    "samples": (["--samples", "899"], "samples = 899 is more than half the data set: take 898"),
    "evaluations": (["--nfe", "0"], "nfe = 0 must lie in [1, 10000]"),
    "solver's grid": (["--sampler", "heun", "--nfe", "3"], "leave out grid = 'time'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_sentence(ldm, root, tmp_path, case):
    flags, sentence = WRONG[case]
    colour = ldm.Autoencoder(**{**TINY, "channels": 3})
    torch.save(dict(options=colour.options, model=colour.state_dict()), tmp_path / "colour.pt")
    done = run(root, tmp_path, *flags)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert sentence in done.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert not (tmp_path / "runs").exists()  # nothing has begun


def test_an_autoencoder_is_saved_by_time_and_says_where_memory_ends(
    workshop, ldm, training, pixels, tmp_path, monkeypatch
):
    saved = []
    monkeypatch.setattr(ldm, "save_autoencoder", lambda state, *_: saved.append(state["step"]))
    for minutes, expected in ((workshop.TEN_MINUTES, [3]), (-1, [1, 2, 3])):
        monkeypatch.setattr(workshop, "TEN_MINUTES", minutes)
        saved.clear()
        state = ldm.new_autoencoder_state(TINY, 8, 1e-3, seed=0)
        assert ldm.fit_autoencoder(state, pixels, 3, 8, tmp_path) and saved == expected

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    state = ldm.new_autoencoder_state(TINY, 8, 1e-3, seed=0)
    state["model"].decoder.forward = full
    with pytest.raises(workshop.BadInput, match="memory .* is used up .*smaller --size"):
        ldm.fit_autoencoder(state, pixels, 3, 8, tmp_path)
    with pytest.raises(workshop.BadInput, match="memory .* is used up .*smaller --size"):
        ldm.decode_latents(state["model"], torch.zeros(1, 2, 4, 4), 1.0)


def test_what_an_autoencoder_gives_is_float32_under_autocast(ldm):
    for kind in ("kl", "vq"):
        model = ldm.Autoencoder(**{**TINY, "kind": kind})
        with torch.autocast("cpu", torch.bfloat16):
            z = model.encode(torch.rand(2, 1, 8, 8))
            assert z.dtype == model.decode(z).dtype == torch.float32
            assert model.encoder[0](torch.rand(2, 1, 8, 8)).dtype == torch.bfloat16
