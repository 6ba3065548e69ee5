"""What a GPU would refuse, and what it would have to be waited for, on a pretended one."""

import pytest
import torch

try:
    from pretended_gpu import pretended_gpu
except (ImportError, AttributeError) as error:  # as below, only earlier
    reason = f"this torch cannot be made to pretend a GPU: {error}"
    pytest.skip(reason, allow_module_level=True)

SETTINGS = dict(dataset="digits", arch="multistage", network="digits", steps=9, batch=12, lr=1e-3)
SETTINGS |= dict(warmup=2, ema=0.9999, seed=0, flip=True)
CUTS = {"vp": [0.1, 0.44], "edm": [0.3, 2.5], "pfgm-128": [0.3, 2.5], "ldm": [0.4425, 0.6315]}


@pytest.fixture
def waits():
    """Pretend a GPU; the counter of waits {(what, line): number}."""
    try:
        with pretended_gpu():
            layer = torch.nn.Linear(2, 1).to("cuda")
            optimizer = torch.optim.Adam(layer.parameters(), fused=True)
            layer(torch.ones(1, 2, device="cuda")).sum().backward()
            optimizer.step()
    except Exception as error:
        pytest.skip(f"this torch cannot be made to pretend a GPU: {error}")
    with pretended_gpu() as counter:
        yield counter


@pytest.fixture
def pixels(workshop, sde, waits):
    return workshop.load_images("digits")[0][:200].to(workshop.device())


def counted(waits, work):
    """How often a piece of work waits, and its result."""
    waits.clear()
    result = work()
    return sum(waits.values()), result


def prepared(training, process, stages="uniform", content=None):
    more = dict(network="digits_latent", channels=1, size=8) if process == "ldm" else {}
    asked = dict(process=process, stages=stages, boundaries=CUTS[process])
    return training.prepare_state({**SETTINGS, **asked, **more}, content)


def test_the_pretended_gpu_refuses_and_counts(waits):
    a, b = torch.ones(3, device="cuda"), torch.ones(3)
    i = torch.tensor([1], device="cuda")
    for mix in (lambda: a + b, lambda: torch.cat([b, a]), lambda: b.mul_(a), lambda: b[i]):
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    with pytest.raises(TypeError, match="numpy"):
        a.numpy()
    with pytest.raises(RuntimeError, match="a generator of the device"):
        torch.randn(3, device="cuda", generator=torch.Generator())
    assert counted(waits, lambda: 2 * a + torch.tensor(0.5))[0] == 0  # a single number may mix
    looks = [lambda: a.sum().item(), lambda: float(a[0]), a.tolist, a.cpu, a.nonzero, a.unique]
    looks += [lambda: a[torch.tensor([1])], lambda: a[a > 0], lambda: b.to(a)]
    looks += [lambda: b.copy_(a), lambda: a.copy_(b)]
    assert [counted(waits, look)[0] for look in looks] == [1] * len(looks)


@pytest.mark.parametrize("stages", ["uniform", "mixed"])
@pytest.mark.parametrize("process", CUTS)
def test_a_training_step_waits_twice_at_most(training, waits, pixels, process, stages):
    """For the pictures' numbers, and for the stages and their shares."""
    state = prepared(training, process, stages)
    loop = training.train(state, pixels, 3, process, 12, flip=True, stages=stages)
    next(loop)  # makes what stays
    for _ in range(2):
        number, (_, losses) = counted(waits, lambda: next(loop))
        assert number <= 2, dict(waits)
        assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize(
    "process, sampler, each",
    [("vp", "dpm-solver-3", 0), ("ldm", "dpm-solver++-2m", 0), ("edm", "heun", 0)]
    + [("vp", "probability-flow", 0), ("vp", "euler-maruyama", 1), ("ldm", "ancestral", 1)],
)
def test_a_sampler_waits_for_its_noise_alone(training, evaluation, waits, process, sampler, each):
    """Once a draw, however many pictures; an evaluation of the network does not wait."""
    model, found = prepared(training, process)["ema"], []
    for nfe in (3, 5, 9):  # the first one makes what stays
        draw = lambda nfe=nfe: evaluation.sample(model, process, 3, sampler, nfe)  # noqa: E731
        number, x = counted(waits, draw)
        assert torch.isfinite(x).all() and x.device.type == "cpu"
        found.append(number)
    assert found[1:] == [2 + 5 * each, 2 + 9 * each], dict(waits)  # the start, and the end


@pytest.mark.parametrize("n", [400, 1500])  # all in float64; float32 and the best again
def test_the_posterior_mean_does_not_wait_for_chunks(sde, waits, n):
    images, t = torch.rand(n, 3, 32, 32), torch.full((4,), 0.2)
    x, found = images[:4] + 0.3 * torch.randn(4, 3, 32, 32), []
    expected, there = sde.posterior_mean(x, t, sde.VP, images), [images.to("cuda"), x.to("cuda")]
    for chunk in (0, n // 8):
        work = lambda c=chunk: sde.posterior_mean(there[1], t, sde.VP, there[0], c)  # noqa: E731
        number, mean = counted(waits, work)
        torch.testing.assert_close(mean.cpu(), expected, rtol=1e-5, atol=2e-6)
        found.append(number)
    assert found[0] == found[1] <= 4


def test_a_gpu_compares_with_more_pictures_at_a_time(sde, waits, monkeypatch):
    images, begins, plain = torch.rand(1500, 3, 32, 32), [], sde._leaders
    watched = lambda so_far, new, at, best: begins.append(at) or plain(so_far, new, at, best)  # noqa: E731
    monkeypatch.setattr(sde, "_leaders", watched)
    for where in ("cpu", "cuda"):
        sde.posterior_mean(images[:2].to(where), 0.2, sde.VP, images.to(where))
    assert begins == [0, 1000, 0]


def test_a_card_s_rate_is_that_of_large_products_in_a_row(ldm, waits, monkeypatch):
    asked, ones = [], torch.ones
    small = lambda *size, **how: asked.append(size) or ones(4, 4, **how)  # noqa: E731
    monkeypatch.setattr(torch, "ones", small)
    assert counted(waits, ldm.product_rate)[0] == 5 and asked == [(8192, 8192)]  # a wait for ten


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_an_autoencoder_on_a_gpu(workshop, ldm, waits, pixels, kind):
    state = ldm.new_autoencoder_state({**workshop.SMALL, "kind": kind}, 8, 1e-3, 0)
    loop = ldm.train_autoencoder(state, pixels, 3, 8, adversarial=0.5)
    next(loop)
    number, (_, row) = counted(waits, lambda: next(loop))
    assert number <= 1 and torch.isfinite(row["error"]), dict(waits)
    model = state["model"].eval()
    assert (
        ldm.decode_latents(model, ldm.encode_pictures(model, pixels[:4]), 1.0).device.type == "cpu"
    )


def test_a_run_on_a_gpu_goes_on_and_draws(workshop, training, waits, pixels, tmp_path):
    how, ends = dict(process="vp", batch=12, stages="mixed"), []
    state = prepared(training, "vp", "mixed")
    list(training.train(state, pixels, 2, **how))
    settings = {**SETTINGS, "process": "vp", "boundaries": CUTS["vp"]}
    training.save_checkpoint(state, settings, tmp_path)
    again = prepared(training, "vp", "mixed", workshop.read_checkpoint(tmp_path))
    for run in (state, again):
        assert [step for step, _ in training.train(run, pixels, 4, **how)] == [3, 4]
        ends.append(torch.cat([p.detach().flatten().cpu() for p in run["ema"].parameters()]))
    assert torch.equal(*ends)
    # in half precision, the channels last
    model, seen = training.averaged_model(training.workshop.read_checkpoint(tmp_path)), []
    first = model.encoders[0].first
    assert first.weight.is_contiguous(memory_format=torch.channels_last)
    first.register_forward_hook(lambda layer, x, out: seen.append(out.dtype))
    noise = training.noise_function(model, "vp")(pixels[:2] / 255, torch.full((2,), 0.3))
    assert seen == [torch.bfloat16] and noise.dtype == torch.float32


def test_a_branch_on_a_gpu_trains_with_weights_and_dealt_times(
    workshop, training, waits, pixels, tmp_path
):
    asked = {**SETTINGS, "process": "vp", "encoder": 8, "start_from": "runs/trunk"}
    trunk = {**asked, "network": "digits_unified", "decoders": [8], "boundaries": []}
    state = training.prepare_state(trunk) | dict(petaflops=[0.0, 0.0])
    how = dict(batch=12, stages="mixed", times="stages", weight="min-snr")
    loop = training.train(state, pixels, 3, cuts=CUTS["vp"], **how)
    next(loop)
    assert counted(waits, lambda: next(loop))[0] <= 2
    training.save_checkpoint(state, trunk, tmp_path)
    three = {**asked, "decoders": [8, 8, 8], "boundaries": CUTS["vp"]}
    branch = training.prepare_state(three, trunk=workshop.read_checkpoint(tmp_path))
    moments = [value for own in branch["optimizer"].state.values() for value in own.values()]
    assert {value.device.type for value in moments} == {"cuda"}
    assert [step for step, _ in training.train(branch, pixels, 4, **how)] == [3, 4]
