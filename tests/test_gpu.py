"""What a GPU would refuse or be waited for, on a pretended one, and the benchmark for real ones."""

import sys

import pytest
import torch
from conftest import ROOT
from pretended_gpu import pretended_gpu

CUTS = {"vp": [0.1, 0.44], "pfgm-128": [0.3, 2.5], "ldm": [0.4425, 0.6315]}


@pytest.fixture
def waits():
    """Pretend a GPU; the counter of waits {(what, line): number}."""
    with pretended_gpu() as counter:
        yield counter


def counted(waits, work):
    """How often a piece of work waits, and its result."""
    waits.clear()
    result = work()
    return sum(waits.values()), result


def prepared(training, process, content=None):
    more = dict(network="digits_latent", channels=1, size=8) if process == "ldm" else {}
    asked = dict(network="digits", batch=12, lr=1e-3, seed=0, process=process)
    return training.prepare_state({**asked, "boundaries": CUTS[process], **more}, content)


def test_the_pretended_gpu_refuses_and_counts(waits):
    a, b, i = torch.ones(3, device="cuda"), torch.ones(3), torch.tensor([1], device="cuda")
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
def test_a_training(workshop, training, waits, process, stages, tmp_path):
    """It waits twice a step, for the pictures' numbers and the stages' shares, and goes on."""
    pixels = workshop.load_images("digits")[0][:200].to(workshop.device())
    state, how, ends = prepared(training, process), dict(process=process, stages=stages), []
    loop = training.train(state, pixels, 3, batch=12, flip=True, **how)
    next(loop)  # makes what stays
    for _ in range(2):
        number, (_, losses) = counted(waits, lambda: next(loop))
        assert number <= 2, dict(waits)
        assert all(torch.isfinite(loss) for loss in losses.values())
    workshop.write_checkpoint(workshop.pack(state), tmp_path)
    again = prepared(training, process, workshop.read_checkpoint(tmp_path))
    for run in (state, again):
        assert [step for step, _ in training.train(run, pixels, 4, batch=12, **how)] == [4]
        ends.append(torch.cat([p.detach().flatten().cpu() for p in run["ema"].parameters()]))
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    "process, sampler, each",
    [("vp", "dpm-solver-3", 0), ("ldm", "dpm-solver++-2m", 0), ("pfgm-128", "heun", 0)]
    + [("vp", "probability-flow", 0), ("ldm", "ancestral", 1)],
)
def test_a_sampler_waits_for_its_noise_alone(training, evaluation, waits, process, sampler, each):
    """Once a draw, however many pictures; an evaluation of the network does not wait."""
    model, found, seen = prepared(training, process)["ema"], [], []
    model.encoders[0].first.register_forward_hook(lambda layer, x, out: seen.append(out.dtype))
    for nfe in (3, 5, 9):  # the first one makes what stays
        draw = lambda nfe=nfe: evaluation.sample(model, process, 3, sampler, nfe)  # noqa: E731
        number, x = counted(waits, draw)
        assert torch.isfinite(x).all() and x.device.type == "cpu"
        found.append(number)
    assert found[1:] == [2 + 5 * each, 2 + 9 * each], dict(waits)  # the start, and the end
    assert set(seen) == {torch.bfloat16} and x.dtype == torch.float32


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


def test_a_part_of_the_benchmark_that_hangs_or_fails_spoils_no_other(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    trial = """import time; print('{"part": "x", "found": 1}', flush=True); print("a step's own")"""
    cut, error = dict(cut="after 1 s"), dict(error="ZeroDivisionError: division by zero")
    for more, said in (("time.sleep(9)", cut), ("1 / 0", error), ("pass", {})):
        found = gpu.watch([sys.executable, "-c", f"{trial}; {more}"], "x", 1)
        assert 0 < found.pop("seconds") < 9 and found == {"part": "x", "found": 1, **said}
