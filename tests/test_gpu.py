"""What a GPU would refuse or be waited for, on a pretended one, and the benchmark for real ones."""

import json
import sys
from types import SimpleNamespace

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
    asked = dict(network="digits", batch=12, lr=2**-9, seed=0, process=process)
    return training.prepare_state({**asked, "boundaries": CUTS[process], **more}, content)


def test_the_pretended_gpu_refuses_and_counts(workshop, waits):
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
    one = torch.ones(1, device="cuda")
    added = workshop.Replayed(lambda key, x: one.add_(1).add_(x.sum() * key), on=True)
    assert [added(2, x).item() for x in (a, 2 * a, 2 * a)] == [8, 21, 34]
    looked = workshop.Replayed(lambda key, x: x * x.max().item(), on=True)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        [looked(0, a) for _ in range(2)]


@pytest.mark.parametrize("stages, pieces", [("uniform", 1), ("mixed", 2)])
@pytest.mark.parametrize("process", CUTS)
def test_a_training(workshop, training, waits, process, stages, pieces, tmp_path, monkeypatch):
    """It never waits; replayed, at rates that float32 holds, it is the same in every bit."""
    pixels, ends = workshop.load_images("digits")[0][:200], []
    how = dict(process=process, stages=stages, batch=12, flip=True, warmup=64)
    kind, made = workshop.Replayed, []
    soon = lambda work, on, first: made.append(kind(work, on, 1)) or made[-1]  # noqa: E731
    monkeypatch.setattr(workshop, "Replayed", soon)

    def go(state, steps, **more):
        for part in state["model"].modules():
            part.p = 0.5  # of dropout, which draws anew at each replay
        loop, told = training.train(state, pixels, steps, **how, **more), []
        for step in range(state["step"] + 1, steps + 1):
            number, (_, losses) = counted(waits, lambda: next(loop))
            assert number == 0 or not told, dict(waits)  # the first one makes what stays
            told.append([step, *(loss.item() for loss in losses.values())])
        return told, torch.cat([p.detach().flatten().cpu() for p in state["ema"].parameters()])

    for replay in (False, True):  # from pictures of the CPU, and of the GPU
        pixels = pixels.to(workshop.device()) if replay else pixels
        state = prepared(training, process) | dict(active=[1] if stages == "uniform" else [0, 1, 2])
        ends.append(go(state, 4, pieces=pieces, replay=replay))
    assert [len(one.graphs) for one in made] == [0, 1]
    training.check_held_out(state, pixels[:9].to("cpu"), process, patience=2)
    workshop.write_checkpoint(workshop.pack(state), tmp_path)
    ends.append(go(state, 5))
    ends.append(go(prepared(training, process, workshop.read_checkpoint(tmp_path)), 5))
    for (told, one), (same, other) in (ends[:2], ends[2:]):
        assert told == same and torch.equal(one, other)


@pytest.mark.parametrize(
    "process, sampler, each",
    [("vp", "dpm-solver-3", 0), ("ldm", "dpm-solver++-2m", 0), ("pfgm-128", "heun", 0)]
    + [("vp", "probability-flow", 0), ("ldm", "ancestral", 1)],
)
def test_a_sampler_waits_for_its_noise_alone(training, evaluation, waits, process, sampler, each):
    """Once a draw and batch; an evaluation of the network does not wait, and can be replayed."""
    model, found, seen = prepared(training, process)["ema"], [], []
    model.encoders[0].first.register_forward_hook(lambda layer, x, out: seen.append(out.dtype))
    for nfe in (3, 5, 9):  # the first one makes what stays
        draw = lambda **how: evaluation.sample(model, process, 4, sampler, batch=2, **how)  # noqa: E731
        number, x = counted(waits, lambda nfe=nfe, draw=draw: draw(nfe=nfe))
        again = counted(waits, lambda nfe=nfe, draw=draw: draw(nfe=nfe, replay=True))
        assert again[0] == number and torch.equal(again[1], x)
        assert torch.isfinite(x).all() and x.device.type == "cpu"
        found.append(number)
    ends = 2  # the start, and the end
    assert found[1:] == [2 * (ends + 5 * each), 2 * (ends + 9 * each)], dict(waits)
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


@pytest.mark.parametrize("pretended", [False, True])
def test_the_benchmark_runs_on_the_cpu_and_on_the_pretended_gpu(
    workshop, pretended, monkeypatch, request, capfd
):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    plain = gpu.norm_and_bend._torchdynamo_orig_callable  # compiled for a GPU alone
    changes = dict(norm_and_bend=plain, GPU=pretended, DEVICE=torch.device("cpu"))
    if pretended:
        request.getfixturevalue("waits")
        changes.update(DEVICE=workshop.device(), profile=lambda work, alone: work() and {})
    for name, value in changes.items():
        monkeypatch.setattr(gpu, name, value)
    found = {}
    for name in [part for part in gpu.PARTS if not (pretended and part == "train_run")]:
        gpu.tell(name, SimpleNamespace(quick=True, data=""))
        found[name] = json.loads(capfd.readouterr().out.splitlines()[-1])
    table = [row for part in found.values() for row in gpu.rows(part)]
    assert len(table) == (6 if pretended else 7)  # the larger batch has three more
    assert found["replay"]["dropout_draws_anew"] and found["replay"]["float32, mixed"]["ok"]
    assert all(error < 1e-4 for error in found["right"].values() if isinstance(error, float))


def test_a_part_of_the_benchmark_that_hangs_or_fails_spoils_no_other(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    trial = """import time; print('{"part": "x", "found": 1}', flush=True); print("a step's own")"""
    cut, error = dict(cut="after 1 s"), dict(error="ZeroDivisionError: division by zero")
    for more, said in (("time.sleep(9)", cut), ("1 / 0", error), ("pass", {})):
        found = gpu.watch([sys.executable, "-c", f"{trial}; {more}"], "x", 1)
        assert 0 < found.pop("seconds") < 9 and found == {"part": "x", "found": 1, **said}
