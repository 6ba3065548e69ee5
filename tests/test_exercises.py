"""What the exercises ask can be done with the names at hand, and what their solutions say is so."""

import ast
import builtins
import math
import re
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import ROOT, STEPS


def solutions(step):
    """Read the solutions of a step, each as one line: (solutions, what the student has by then)."""
    text = (ROOT / f"{step}.py").read_text(encoding="utf-8")
    begin = text.index("# ### Exercises")
    end = min(text.find(mark, begin) % len(text) for mark in ("\n\n", "## Below this line"))
    said = re.sub(r"\n#\s+", " ", text[begin:end])
    later = text[end:] if "below)" in said else ""  # their answers may need what comes later
    return re.findall(r"<summary>Solution</summary>(.*?)</details>", said), text[:begin] + later


def snippets(step):
    """List the pieces of Python in a step's solutions, in their order."""
    found = [code for said in solutions(step)[0] for code in re.findall(r"`([^`]+)`", said)]
    return [code for code in found if not code.startswith(("-", "python ")) and parses(code)]


def parses(code):
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


def names(text, kind):
    """Collect the names that Python code reads (ast.Load) or makes (ast.Store)."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)]
    return {node.id for node in nodes if isinstance(node.ctx, kind)}


@pytest.mark.parametrize("step", STEPS[1:])
def test_every_solution_uses_names_that_the_notebook_has(step):
    found, text = solutions(step)
    assert len(found) >= 2
    code = "\n".join(snippets(step))
    wanted = names(code, ast.Load) - names(code, ast.Store) - set(dir(builtins))
    assert wanted <= set(re.findall(r"\w+", text))


def value(step, start, variables):
    """Evaluate the snippet of a step that starts so."""
    (code,) = [code for code in snippets(step) if code.startswith(start)]
    return eval(code, dict(variables))


def test_step_01_samples_with_another_kernel(workshop, sde):
    images = workshop.load_images("digits")[0].float() / 255
    start = torch.randn(8, 1, 8, 8)
    best = lambda x, t: sde.plain_optimal_denoiser(x, t, sde.EDM, images)  # noqa: E731

    def nearest(x):
        *_, x = sde.probability_flow(best, sde.EDM, x, 100)
        gap, which = torch.cdist(x.flatten(1), images.flatten(1)).min(1)
        assert (gap / 8 < 0.01).all()
        return set(which.tolist())

    assert len(nearest(value(STEPS[1], "start *", {**vars(sde), "start": start}))) > 5
    assert len(nearest(start)) == 1


def test_step_01_fewer_pictures_are_known_for_longer(sde, digits):
    (said,) = [said for said in solutions(STEPS[1])[0] if "Fewer" in said]
    for n, t in zip((10, len(digits)), map(float, re.findall(r"\d\.\d+", said)), strict=True):
        right = []
        for at in (t - 0.025, t, t + 0.025):
            i = torch.arange(4000) % n
            xt = sde.perturb(digits[i], torch.randn(4000, 1, 8, 8), torch.tensor(at), sde.VP)
            seen = sde.posterior_mean(xt, torch.tensor(at), sde.VP, digits[:n])
            near = torch.cdist(seen.flatten(1), digits[:n].flatten(1)).argmin(1)
            right.append((near == i).float().mean().item())
        assert right[0] > 0.995 > right[1] > 0.98 > right[2]


def test_step_02(workshop, clustering, digits):
    known = {**vars(clustering), "images": digits, "labels": workshop.load_images("digits")[1]}
    calls = [code for code in snippets(STEPS[2]) if code.startswith("plain_")]
    calls += re.findall(r"`(plain_similarity_matrix\([^`]*\))`", asked(STEPS[2]))
    doubled, threes, pictures = (eval(call, dict(known)) for call in calls)
    cuts, *_ = clustering.plain_algorithm_1(digits, 2000)
    assert doubled[0] > cuts[0] and cuts[1] - doubled[1] > 3 * (doubled[0] - cuts[0])
    assert abs(threes[0] - cuts[0]) < 0.02 and threes[1] < cuts[1] - 0.03
    noises = clustering.plain_similarity_matrix(digits, 100)
    assert pictures[14:, 14:].mean() > noises[14:, 14:].mean() + 0.05


def asked(step):
    """Read the exercises of a step as one line."""
    text = (ROOT / f"{step}.py").read_text(encoding="utf-8")
    return re.sub(r"\n#\s+", " ", text[text.index("# ### Exercises") :])


def test_step_03(unet):
    (call,) = re.findall(r"`(cost\([^`]*\))`", asked(STEPS[3]))
    for width in ("8", "16"):
        rows = eval(call.replace("32, 8)", f"32, {width})"), vars(unet))
        share = rows["shared"]["gflops"] / rows[2]["gflops"]
        assert f"{share:.0%}" in solutions(STEPS[3])[0][0]
    model = value(STEPS[3], "build_network", vars(unet))
    assert model(torch.randn(2, 1, 8, 8), torch.tensor([0.4, 0.6])).shape == (2, 1, 8, 8)
    assert len(model.decoders) == 2 and model.cuts == [0.5]


def test_step_04(workshop, training):
    pixels, edges = workshop.load_images("digits")[0], torch.tensor([0.001, 0.1, 0.44, 1])
    best, dice = value(STEPS[4], "lambda", {**vars(training), "pixels": pixels}), torch.Generator()
    batches = [training.draw_batch(pixels, edges, 32, step, dice)[:3] for step in range(12)]
    lowest = np.mean([training.compute_loss(best, *batch).item() for batch in batches])
    assert 0.005 < lowest < 0.5  # a network that knows nothing has 1


def test_step_04_boundaries_by_log_snr(sde, clustering):
    text = (ROOT / f"{STEPS[4]}.py").read_text(encoding="utf-8")
    (said,) = re.findall(r"Give boundaries by log-SNR \(`--boundaries (\S+) ", text)
    cuts = clustering.snr_clusters(sde.VP, 3)
    assert [float(cut) for cut in said.split(",")] == pytest.approx(cuts, abs=6e-4)


def test_step_05(sde, evaluation):
    runs = [value(STEPS[5], "[frechet_distance", vars(evaluation)) for _ in range(5)]
    few, more, many = np.mean(runs, 0)
    assert 5 < few / more < 20 and 5 < more / many < 20
    code = {line.split(" ")[0]: line for line in snippets(STEPS[5])}

    def midpoint(eps, kernel, x, nfe):
        z, sigmas = evaluation.levels(kernel, x, nfe // 2)
        names = {"noise_at": evaluation.noise_at, "eps": eps, "kernel": kernel, "z": z}
        for names["sigma"], names["sigma_next"] in pairwise(sigmas):
            names["e"] = evaluation.noise_at(eps, kernel, names["z"], names["sigma"])
            for line in ("middle", "z_middle", "z"):
                exec(code[line], names)
        yield evaluation.unscale(kernel, names["z"], sigmas[-1])

    errors = evaluation.measure_errors(midpoint, sde.VP, [80, 160])
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.2)


def test_step_07(workshop, beyond):
    assert value(STEPS[7], "steps_at", vars(beyond)) == pytest.approx(8 / 30)
    images = workshop.to_network_space(workshop.load_images("digits")[0])
    truth, known = images[:90], images[90:]
    (line,) = [code for code in snippets(STEPS[7]) if code.startswith("known =")]
    variables = {"torch": torch, "known": known, "truth": truth}
    exec(line, variables)
    for A, tau in beyond.PROBLEMS.values():
        y = A(truth) + tau * torch.randn(A(truth).shape)
        drawn = beyond.draw_exactly(y, A, tau, variables["known"], torch.Generator())
        assert ((drawn - truth).flatten(1).norm(dim=1) == 0).float().mean() > 0.8
    A, tau = beyond.PROBLEMS["a hole"]
    names = {**vars(beyond), "few": truth[:24], "problem": "a hole", "dice": torch.Generator()}
    names["points"] = lambda x, t: beyond.sde.plain_optimal_denoiser(x, t, beyond.sde.VP, known)
    names["y"] = A(truth[:24]) + tau * torch.randn(A(truth[:24]).shape)
    exact = beyond.draw_exactly(names["y"], A, tau, known, torch.Generator())
    led = value(STEPS[7], "repair(", names)
    assert abs(beyond.psnr(led, truth[:24]) - beyond.psnr(exact, truth[:24])) < 1


def test_step_08(workshop, sde, training, whose_cuts, digits):
    unified = training.averaged_model(workshop.read_checkpoint("pretrained/digits-unified"))
    network = partial(whose_cuts.ask_network, unified)
    known = {**vars(whose_cuts), "images": digits, "asked": {"digits-unified": (digits, network)}}
    t_1, t_2 = value(STEPS[8], "clustering.plain", known)
    assert t_1 == 0.001 and t_2 == pytest.approx(0.29, abs=0.02)
    x = torch.randn(5, 1, 8, 8)
    seen = value(STEPS[8], "clean(", {**known, "xt": x, "t": torch.rand(5), "used": digits})
    assert seen[..., 0, 0].abs().max() < 1e-4 < seen[..., 3, 3].abs().max()
