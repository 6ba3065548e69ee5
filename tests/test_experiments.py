"""The experiments' runner: what it runs, what it never runs twice, and the page it draws."""

import json
import re
import sys
import tomllib

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
import draw
import explained
import pairs
import run as runner

work = runner.work

TINY = """
title = "Tiny"
[settings]
dataset = "digits"
encoder = 4
points = [0.0005, 0.001]
batch = 4
samples = 20
nfe = 2
held_out = 0.01
[[runs]]
label = "unified"
arch = "unified"
decoders = [4]
keep = true
[[runs]]
label = "multistage"
decoders = [4, 4, 4]
boundaries = "0.1,0.44"
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder with one small experiment and a page; call it to run: the labels that were run."""
    (tmp_path / "page.md").write_text("before\n<!-- tiny -->\n<!-- /tiny -->\nafter\n")
    done, complete = [], work.complete

    def watched(definition):
        done.append((definition["arch"], definition["seed"]))
        return complete(definition)

    def go(*more):
        done.clear()
        places = ["--folder", tmp_path, "--out", tmp_path / "out", "--page", tmp_path / "page.md"]
        runner.main([*map(str, places), *more])
        return list(done)

    def write(text, name="tiny"):
        (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8")

    write(TINY)
    monkeypatch.setattr(work, "complete", watched)
    monkeypatch.setattr(work, "paths", dict(work.paths))
    go.folder, go.write = tmp_path, write
    return go


def settle(**changes):
    """Make a definition as a file would."""
    run = {**tomllib.loads(TINY)["settings"], "label": "x", **changes}
    [(_, [definition])] = runner.units({"runs": [run]}, "test")
    return definition


def test_runs_what_is_missing_and_only_that(workshop, tiny, capsys):
    assert tiny("--draw") == [] and "2 units, missing: 2" in capsys.readouterr().out
    page = tiny.folder / "page.md"
    assert "| unified | – |" in page.read_text(encoding="utf-8")
    assert tiny() == [("unified", 0), ("multistage", 0)]
    results = sorted((tiny.folder / "results").glob("*.json"))
    assert len(results) == 2
    ends = [json.loads(path.read_text())["curve"][-1]["frechet"] for path in results]
    text = page.read_text(encoding="utf-8")
    assert all(f"{end:.2f}" in text for end in ends)
    assert text.startswith("before\n") and text.endswith("after\n")

    assert tiny() == [] and "2 units, missing: 0" in capsys.readouterr().out
    changed = TINY.replace("0.1,0.44", "0.1,0.5").replace("points", "seeds = [0, 1]\npoints")
    tiny.write(changed)
    assert tiny("--seeds", "1") == [("unified", 1), ("multistage", 1)]
    assert tiny() == [("multistage", 0)]  # unified with seed 0 is unchanged
    tiny.write(changed.replace('"Tiny"', '"Twin"'), "twin")
    assert tiny() == []  # the same units under another name
    with pytest.raises(workshop.BadInput, match="unknown experiment 'x': take one of tiny, twin"):
        tiny("--only", "x")


def test_solvers_are_compared_on_the_network_that_a_run_ended_with(tiny, capsys):
    asked = '[["ddim", 2], ["dpm-solver-3", 3]]'
    more = f'label = "solvers"\nkind = "solvers"\nof = "unified"\nsolvers = {asked}\n'
    tiny.write(TINY[: TINY.index('label = "multistage"')] + more)
    assert len(tiny()) == 2
    (path,) = (tiny.folder / "results").glob("solvers*.json")
    curve = json.loads(path.read_text())["curve"]
    assert [row["solver"] for row in curve] == [["ddim", 2], ["dpm-solver-3", 3]]
    assert curve[0]["frechet"] != curve[1]["frechet"]

    path.unlink()  # and the weights: the run that is built on is trained again, to the same end
    for weights in (tiny.folder / "out").rglob("*.pt"):
        weights.unlink()
    assert len(tiny()) == 1 and "training them first" in capsys.readouterr().out
    assert json.loads(path.read_text())["curve"] == curve


def test_a_result_is_named_by_the_recipe_too(monkeypatch):
    plain, own = settle(batch=0), settle(lr=1e-3)
    names = work.fingerprint(plain), work.fingerprint(own)
    digits = work.workshop.DATASETS["digits"]
    monkeypatch.setitem(digits, "recipe", {**digits["recipe"], "lr": 1e-2})
    assert work.fingerprint(plain) != names[0]  # its learning rate is the recipe's
    assert work.fingerprint(own) == names[1]
    networks = {**work.unet.NETWORKS}
    networks["digits"] = {**networks["digits"], "encoder": 8}
    monkeypatch.setattr(work.unet, "NETWORKS", networks)
    assert work.fingerprint(own) != names[1]


@pytest.mark.parametrize(
    "arm, decoders",
    [
        (dict(arch="unified"), [32]),
        (dict(boundaries="0.1,0.44"), [48, 32, 16]),
        (dict(arch="separate", tailored=True, boundaries="0.1,0.44"), [48, 32, 16]),
        (dict(clustering="algorithm-2", number=4), [40, 28, 16, 16]),
    ],
    ids=["unified", "multistage", "tailored", "four stages"],
)
def test_every_arm_spends_the_same_training_compute(arm, decoders, monkeypatch):
    monkeypatch.setattr(work, "measure", lambda *_: dict(frechet=0.0))
    record = work.train(settle(encoder=0, points=[0.15], **arm))
    (row,) = record["curve"]
    assert 0.15 <= row["gflops"] <= 0.15 + max(record["gflops"])
    assert row["step"] * min(record["gflops"]) <= row["gflops"]
    assert row["gflops"] <= row["step"] * max(record["gflops"]) * (1 + 1e-9)
    assert record["decoders"] == decoders


def test_looking_changes_nothing_and_training_is_that_of_step_04(training, tmp_path, monkeypatch):
    monkeypatch.setitem(work.paths, "out", tmp_path)
    ends = []
    for points in ([3], [1, 2, 3]):
        d = settle(arch="unified", decoders=[4], keep=True, by="steps", points=points)
        work.train(d)
        ends.append(work.kept(d)[-1]["ema"])
    torch.manual_seed(0)
    settings = work.settings_of(d)
    state = training.new_state(training.network_of(settings), settings["lr"], 0)
    _, used = work.split(d)
    for _ in training.train(state, used, 3, batch=4, warmup=settings["warmup"]):
        pass
    for key, weight in state["ema"].state_dict().items():
        assert torch.equal(weight, ends[0][key]) and torch.equal(weight, ends[1][key])


def test_another_network_serves_the_other_intervals(unet):
    cuts = [0.1, 0.44]
    own = unet.randomize(unet.build_network("digits_separate", boundaries=cuts), seed=1)
    other = unet.randomize(unet.build_network("digits_unified"), seed=2)
    hybrid, x = work.serve_alone(own, [1], cuts, other), torch.randn(2, 1, 8, 8)
    for k, t in enumerate((0.05, 0.3, 0.7)):
        expected, t = own if k == 1 else other, torch.full((2,), t)
        assert hybrid.stage(t).tolist() == [k, k]
        assert torch.equal(hybrid(x, t, stage=k), expected(x, t))
    mine = unet.randomize(unet.build_network("digits", boundaries=(0.2, 0.7)))
    t = torch.tensor([0.15, 0.43])  # of one stage here, of two of its own
    assert torch.equal(work.Hybrid(cuts, [mine] * 3)(x, t, stage=1, label=None), mine(x, t))


def test_gradients_of_neighbouring_times_agree_and_follow_the_seed(digits, unet):
    model = unet.randomize(unet.build_network("digits_unified", encoder=8, decoders=[8]))
    images = digits[:64] * 2 - 1
    same = torch.tensor(work.alike(model, images, [0.5, 0.51, 0.52], "vp"))
    assert torch.equal(same, same.T) and same.min() > 0.9
    g, again, other = (work.gradient(model, images, 0.2, 0.4, seed, "vp") for seed in (0, 0, 1))
    assert torch.equal(g, again) and not torch.equal(g, other)


def test_features_of_a_resnet56(workshop, tmp_path):
    features, path = work.features, tmp_path / "resnet.th"
    net = features.ResNet56().eval()
    sizes = [p.numel() for name, p in net.named_parameters() if "conv" in name]
    # He et al. 2016: a convolution that reads the picture, and three groups of 18, all of 3×3
    group = lambda c, before: 9 * (before * c + 17 * c * c)  # noqa: E731
    assert len(sizes) == 55
    assert sum(sizes) == 9 * 3 * 16 + group(16, 16) + group(32, 16) + group(64, 32)
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, path)
    x = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    body = features.resnet56(path)
    assert torch.equal(body(x), net.features(features.prepare(x))) and body(x).shape == (4, 64)
    with pytest.raises(workshop.BadInput, match="give its checkpoint"):
        features.resnet56("")


def test_patches_from_anywhere_are_those_of_all_places(sde):
    x, known, t = torch.randn(2, 1, 3, 3), torch.rand(4, 1, 3, 3), torch.tensor([0.1, 0.3])
    found = explained.from_anywhere(x, t, sde.VP, known)
    best = sde.optimal_denoiser(x, t, sde.VP, known)  # the middle one's patch is the picture
    torch.testing.assert_close(found[..., 1, 1], best[..., 1, 1])
    corners = torch.cat([known[..., i : i + 2, j : j + 2] for i in (0, 1) for j in (0, 1)])
    corner = sde.optimal_denoiser(x[..., :2, 1:], t, sde.VP, corners)
    torch.testing.assert_close(found[..., 0, 2], corner[..., 0, 1])


def test_the_same_pictures_are_compared_in_other_features_too(evaluation, monkeypatch):
    pixels = lambda x: x[:, 0, 3].float()  # noqa: E731
    monkeypatch.setitem(work.features.RULERS, "pixels", lambda: pixels)
    d = settle(arch="unified", decoders=[4], points=[0.0005], ruler="pixels")
    row, plain = (work.train({**d, "ruler": ruler})["curve"][-1] for ruler in (d["ruler"], ""))
    assert {key: row[key] for key in plain} == plain  # neither training nor drawing notices
    metrics = {*evaluation.METRICS, "samples"}
    assert set(row) - set(plain) == {f"{key} in pixels" for key in set(plain) & metrics}
    real, few = (
        work.compare_real(settle(kind="real", ruler="pixels", pictures=n))["curve"][0]
        for n in (0, 20)
    )
    *_, half, rest = work.yardstick("digits", 0, 20)
    assert real["frechet in pixels"] == evaluation.evaluate(rest, half, pixels)["frechet"]
    assert real["frechet in pixels"] != real["frechet"] != few["frechet"]


def test_a_branch_pays_for_its_trunk_and_both_follow_one_falling_rate(tmp_path, monkeypatch):
    all_ = dict(batch=6, samples=20, nfe=3, encoder=4, decay="linear", stages="mixed")
    all_ |= dict(intervals=True, sampling_seeds=2)
    plan = dict(label="trunk", arch="unified", times="stages", decoders=[4], keep=True)
    plan = [plan | dict(points=[0.002, 0.006])]
    plan += [dict(label="branch", decoders=[4, 4, 4], points=[0.006], of="trunk", branch=1)]
    monkeypatch.setattr(work, "paths", {**work.paths, "out": tmp_path, "results": tmp_path})
    (_, [trunk]), (_, [branch]) = runner.units({"settings": all_, "runs": plan}, "test")
    rates, step = [], work.training.training_step

    def watch(model, optimizer, loss, rate):
        step(model, optimizer, loss, rate)
        rates.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(work.training, "training_step", watch)
    one = work.train(trunk)
    early, full = (row["step"] for row in one["curve"])
    plain = rates.copy()
    rates.clear()
    other = work.train(branch)
    assert len(plain) == full
    assert rates == pytest.approx(plain[early:])  # the same rate at the same step
    assert other["curve"][0]["gflops"] == pytest.approx(one["curve"][1]["gflops"])
    assert set(one["curve"][0]["held_out"]) == {0, 1, 2}  # though it has but one decoder
    assert len(one["curve"][0]["frechets"]) == 2
    kept = work.kept(trunk)[1]
    state = work.training.new_state(work.training.network_of(work.settings_of(branch)), 1e-3, 0)
    work.branch_off(state, kept)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.05, 0.3, 0.7])  # a picture of each stage
    torch.testing.assert_close(state["ema"](x, t), work.training.averaged_model(kept)(x, t))
    assert {float(own["step"]) for own in state["optimizer"].state.values()} == {float(early)}


BROKEN = {
    "no TOML": ("label", "is no TOML"),
    "unknown key": ('label = "a"\nstpes = 3', "unknown key 'stpes'"),
    "no label": ('arch = "unified"', "every run needs a label"),
    "unknown arch": ('label = "a"\narch = "x"\npoints = [1]', "unknown arch 'x'"),
    "unknown run": ('label = "a"\nof = "b"', "builds on 'b', unknown so far"),
    "nothing to look at": ('label = "a"\nkind = "solvers"', "needs `of`"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_bad_file_is_named_in_one_sentence(workshop, case, tmp_path):
    lines, sentence = BROKEN[case]
    (tmp_path / "bad.toml").write_text(f"[[runs]]\n{lines}\n", encoding="utf-8")
    with pytest.raises(workshop.BadInput, match=sentence) as error:
        runner.read_experiments(tmp_path)
    assert str(error.value).startswith("bad.toml")


def test_what_asks_for_data_runs_only_where_it_is_named(tiny, capsys):
    tiny.write('asks = "CIFAR-10"\n[[runs]]\nlabel = "a"\nkind = "cuts"\nnumber = 99\n')
    assert tiny() == [] and "tiny: left out, it asks for CIFAR-10" in capsys.readouterr().out
    assert tiny("--only", "tiny") == [("multistage", 0)]


@pytest.fixture(scope="module")
def committed():
    """The experiments of the project with their committed results."""
    return draw.collect(runner.read_experiments(ROOT / "experiments"), work.read_result)


def test_the_page_has_the_numbers_of_the_committed_results(committed):
    text = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    shown = re.findall(r"<!-- (\w+) -->", text)
    assert len(shown) == len(set(shown)) == text.count("<!-- /") >= 21
    assert draw.page(text, committed) == text
    assert draw.page(text.replace("±", "+"), committed) != text.replace("±", "+")


def test_no_result_is_left_over_and_no_seed_of_the_page_is_dropped(committed):
    """What the page does not show yet may be written down before it runs, if it says so."""
    text, there = (
        (ROOT / "RESULTS.md").read_text(encoding="utf-8"),
        ROOT / "experiments" / "results",
    )
    files = {path.name for path in there.iterdir()}
    names = {
        name: {work.result_path(d).name for _, ds in experiment["units"] for d in ds}
        for name, (experiment, _) in committed.items()
    }
    assert files <= set().union(*names.values())
    for name in names:
        shown = re.search(rf"<!-- {name} -->.*?<!-- /{name} -->", text, re.DOTALL)
        missing = len(names[name] - files)
        assert not shown or not missing or f"*Still to run: {missing}." in shown[0], name


def test_paired_differences_and_what_they_mean():
    rows = {"A": [3.0, 2.0, 4.0], "B": [2.5, 1.4, 3.7]}
    arms = {k: {i: {"frechet": v} for i, v in enumerate(vs)} for k, vs in rows.items()}
    del arms["A"][1]  # a seed that one of two lacks is left out
    found = pairs.differences(arms, "B", "A", lambda row: row["frechet"])
    assert found == pytest.approx([-0.5, -0.3])
    mean, half = pairs.interval(found)  # Student's quantile is 12.706 with one degree of freedom
    assert mean == pytest.approx(-0.4) and half == pytest.approx(12.706 * 0.1, rel=1e-3)
    [(_, _, of, p, corrected, said)] = pairs.family(arms, [("B − A", "B", "A", 3)])
    assert said == "open: 2 of 3 seeds" and corrected is None
    assert of == 3.5 and p == pytest.approx(0.156, abs=1e-3)  # t = 4: 1 − 2 arctan(4) / π


def test_a_verdict_is_corrected_for_the_size_of_its_family():
    assert pairs.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert pairs.holm([0.8, 0.7]) == [1, 1] and pairs.holm([]) == []
    ends = {"same": [0.01, -0.01, 0.02, -0.01], "less": [-0.5, -0.4, -0.6, -0.45], "base": [0] * 4}
    ends |= {"unsure": [-0.5, 0.4, -0.6, 0.2], "bit": [0.04, 0.05, 0.04, 0.05]}
    arms = {k: {i: dict(frechet=2 + i / 9 + x) for i, x in enumerate(v)} for k, v in ends.items()}
    asked = [(name, name, "base", 4) for name in ends if name != "base"]
    said = {row[0]: row[-1] for row in pairs.family(arms, asked)}
    assert said == dict(same="level", less="lower", unsure="open", bit="higher, by less than 3%")
    many = [("less", "less", "base", 4)] + 99 * [("unsure", "unsure", "base", 4)]
    assert next(pairs.family(arms, many))[-1] == "open"  # p = 0.001, of a hundred


def test_each_arm_gets_its_own_rate_and_what_diverged_is_not_taken():
    found = {"1": [4.2, 4.1], "2": [4.1, 4.0], "3": [3.95, 9.0], "4": [4.0, float("nan")]}
    *cells, taken = draw.tuning(found, list(found), 2)
    assert [cell[-8:] == "diverged" for cell in cells] == [True, False, True, True] and taken == "2"
    assert draw.tuning({"1": [4.1, 4.1], "2": [4.0]}, ["1", "2"], 2)[-1] == "open"
    curve = [dict(taken=[a, b], frechet=1 + 2 * a + 4 * b) for a in (0, 1) for b in (0, 1)]
    assert draw.effect(curve, 0) == 2 and draw.effect(curve, 1) == 4


def test_the_share_of_compute_is_read_between_runs_in_log_log():
    runs = [(1.0, 8.0), (4.0, 2.0)]  # the distance falls with the inverse of the compute
    assert pairs.share(runs, 4.0) == pytest.approx(2.0)
    assert pairs.share(runs, 9.0) == 1.0 and pairs.share(runs, 1.9) is None
