"""The experiments' runner: what it runs, what it never runs twice, and the page it draws."""

import json
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))

TINY = """
title = "Tiny"
[settings]
dataset = "digits"
points = [0.02, 0.04]
batch = 4
samples = 20
nfe = 2
held_out = 0.01
[[runs]]
label = "unified"
arch = "unified"
keep = true
[[runs]]
label = "multistage"
boundaries = "0.1,0.44"
"""


@pytest.fixture(scope="session")
def runner():
    import run

    return run


@pytest.fixture(scope="session")
def work(runner):
    return runner.work


@pytest.fixture
def tiny(runner, tmp_path, monkeypatch):
    """A folder with one small experiment and a page; call it to run: the labels that were run."""
    (tmp_path / "tiny.toml").write_text(TINY, encoding="utf-8")
    (tmp_path / "page.md").write_text(
        "before\n<!-- tiny -->\n<!-- /tiny -->\nafter\n", encoding="utf-8"
    )
    done, complete = [], runner.work.complete

    def watched(definition):
        done.append((definition["arch"], definition["seed"]))
        return complete(definition)

    monkeypatch.setattr(runner.work, "complete", watched)

    def go(*more):
        done.clear()
        places = ["--folder", tmp_path, "--out", tmp_path / "out", "--page", tmp_path / "page.md"]
        runner.main([*map(str, places), *more])
        return list(done)

    go.folder = tmp_path
    return go


def test_runs_what_is_missing_and_only_that(tiny):
    assert tiny() == [("unified", 0), ("multistage", 0)]
    results = sorted((tiny.folder / "results").glob("*.json"))
    assert len(results) == 2
    page = (tiny.folder / "page.md").read_text(encoding="utf-8")
    ends = [
        json.loads(path.read_text(encoding="utf-8"))["curve"][-1]["frechet"] for path in results
    ]
    assert all(f"{end:.2f}" in page for end in ends)
    assert page.startswith("before\n") and page.endswith("after\n")

    before = [path.read_bytes() for path in results]
    assert tiny() == []
    assert before == [path.read_bytes() for path in results]

    text = (tiny.folder / "tiny.toml").read_text(encoding="utf-8")
    text = text.replace('boundaries = "0.1,0.44"', 'boundaries = "0.1,0.5"')
    (tiny.folder / "tiny.toml").write_text(
        text.replace("points", "seeds = [0, 1]\npoints"), encoding="utf-8"
    )
    # unified with seed 0 is unchanged
    assert sorted(tiny()) == [("multistage", 0), ("multistage", 1), ("unified", 1)]
    (tiny.folder / "twin.toml").write_text(text.replace('"Tiny"', '"Twin"'), encoding="utf-8")
    assert tiny() == []  # the same units under another name


def test_an_interruption_loses_one_unit(work, tiny, monkeypatch):
    train = work.WORK["training"]

    def interrupted(definition):
        if definition["arch"] == "multistage":
            raise KeyboardInterrupt
        return train(definition)

    monkeypatch.setitem(work.WORK, "training", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny()
    assert len(list((tiny.folder / "results").iterdir())) == 1
    monkeypatch.setitem(work.WORK, "training", train)
    assert tiny() == [("multistage", 0)]


def test_a_seed_can_be_asked_for(workshop, tiny, sde):
    text = (tiny.folder / "tiny.toml").read_text(encoding="utf-8")
    (tiny.folder / "tiny.toml").write_text(
        text.replace("points", "seeds = [0, 1]\npoints", 1), encoding="utf-8"
    )
    assert tiny("--seeds", "1") == [("unified", 1), ("multistage", 1)]
    with pytest.raises(workshop.BadInput, match="--seeds 'one' must be whole numbers"):
        tiny("--seeds", "one")


def test_solvers_are_compared_on_the_network_that_a_run_ended_with(tiny, capsys):
    asked = '[["ddim", 2], ["dpm-solver-3", 3]]'
    more = f'[[runs]]\nlabel = "solvers"\nkind = "solvers"\nof = "unified"\nsolvers = {asked}\n'
    text = (
        (tiny.folder / "tiny.toml")
        .read_text(encoding="utf-8")
        .replace('[[runs]]\nlabel = "multistage"', more)
    )
    (tiny.folder / "tiny.toml").write_text(
        text.replace('boundaries = "0.1,0.44"', ""), encoding="utf-8"
    )
    assert len(tiny()) == 2
    (path,) = (tiny.folder / "results").glob("solvers*.json")
    curve = json.loads(path.read_text(encoding="utf-8"))["curve"]
    assert [row["solver"] for row in curve] == [["ddim", 2], ["dpm-solver-3", 3]]
    assert curve[0]["frechet"] != curve[1]["frechet"]

    path.unlink()  # and the weights: the run that is built on is trained again, to the same end
    for weights in (tiny.folder / "out").rglob("*.pt"):
        weights.unlink()
    (first,) = (tiny.folder / "results").glob("training*.json")
    text = first.read_text(encoding="utf-8") + " "  # as if from another machine
    first.write_text(text, encoding="utf-8")
    assert len(tiny()) == 1 and "training them first" in capsys.readouterr().out
    assert json.loads(path.read_text(encoding="utf-8"))["curve"] == curve
    assert first.read_text(encoding="utf-8").endswith(" ")  # a result that is there stays


def test_drawing_alone_runs_nothing(tiny):
    assert tiny("--draw") == []
    assert "| unified | – |" in (tiny.folder / "page.md").read_text(encoding="utf-8")


def settle(runner, **changes):
    """Make a definition as a file would."""
    run = {**tomllib.loads(TINY)["settings"], "label": "x", **changes}
    [(_, [definition])] = runner.units({"runs": [run]}, "test")
    return definition


def test_few_pictures_are_a_part_of_those_that_are_not_held_out(work, runner):
    few, all_ = (work.split(settle(runner, pictures=n, held_out=0.1)) for n in (10, 0))
    assert len(few[1]) == 10 and torch.equal(few[1], all_[1][:10])
    assert torch.equal(few[0], all_[0]) and len(all_[0]) + len(all_[1]) == 1797


def test_a_result_is_named_by_the_recipe_too(work, runner, monkeypatch):
    plain, own = settle(runner, batch=0), settle(runner, lr=1e-3)
    names = work.fingerprint(plain), work.fingerprint(own)
    digits = work.workshop.DATASETS["digits"]
    monkeypatch.setitem(digits, "recipe", {**digits["recipe"], "lr": 1e-2})
    assert work.fingerprint(plain) != names[0]  # its learning rate is the recipe's
    assert work.fingerprint(own) == names[1]
    networks = {**work.unet.NETWORKS}
    networks["digits"] = {**networks["digits"], "encoder": 8}
    monkeypatch.setattr(work.unet, "NETWORKS", networks)
    assert work.fingerprint(own) != names[1]
    solved = settle(runner, kind="cuts")
    assert "recipe" not in str(solved) and work.fingerprint(solved)  # nothing is trained


def test_few_real_pictures_are_farther_from_real_ones_than_half_of_all(work, runner):
    found = [
        work.compare_real(settle(runner, kind="real", samples=898, pictures=n, held_out=0.1))
        for n in (0, 90)
    ]
    half, few = (record["curve"][0]["frechet"] for record in found)
    assert half < few


@pytest.mark.parametrize(
    "arm",
    [
        dict(arch="unified"),
        dict(boundaries="0.1,0.44"),
        dict(arch="separate", tailored=True, boundaries="0.1,0.44"),
        dict(clustering="algorithm-2", number=4),
    ],
    ids=["unified", "multistage", "tailored", "four stages"],
)
def test_every_arm_spends_the_same_training_compute(work, runner, arm, monkeypatch):
    monkeypatch.setattr(work, "measure", lambda *_: dict(frechet=0.0))
    record = work.train(settle(runner, points=[0.15], **arm))
    (row,) = record["curve"]
    assert 0.15 <= row["gflops"] <= 0.15 + max(record["gflops"])
    assert row["step"] * min(record["gflops"]) <= row["gflops"]
    assert row["gflops"] <= row["step"] * max(record["gflops"]) * (1 + 1e-9)
    assert (
        record["decoders"]
        == {1: [32], 3: [48, 32, 16], 4: [40, 28, 16, 16]}[len(record["decoders"])]
    )


def test_looking_changes_nothing_and_training_is_that_of_step_04(work, runner, training, tmp_path):
    work.paths["out"] = tmp_path
    ends = []
    for points in ([3], [1, 2, 3]):
        d = settle(runner, arch="unified", keep=True, by="steps", points=points)
        work.train(d)
        folder = tmp_path / work.fingerprint(d)
        ends.append(torch.load(folder / f"{len(points)}.pt", weights_only=True)["ema"])
    torch.manual_seed(0)
    settings = work.settings_of(d)
    state = training.new_state(training.network_of(settings), settings["lr"], 0)
    _, used = work.split(d)
    for _ in training.train(state, used, 3, batch=4, warmup=settings["warmup"]):
        pass
    for key, weight in state["ema"].state_dict().items():
        assert torch.equal(weight, ends[0][key]) and torch.equal(weight, ends[1][key])


def test_early_stopping_stops_before_the_budget_is_spent(work, runner, monkeypatch):
    monkeypatch.setattr(work, "measure", lambda *_: dict(frechet=0.0))
    worse = lambda state, *_: state["active"].clear()  # noqa: E731 - as if nothing had helped
    monkeypatch.setattr(work.training, "check_held_out", worse)
    monkeypatch.setattr(work, "losses", lambda *_: {})
    d = settle(runner, arch="separate", boundaries="0.1,0.44", patience=1, points=[1.0, 2.0])
    record = work.train(d)
    assert len(record["curve"]) == 1 and record["curve"][0]["gflops"] < 1.0
    assert d["active"] == []  # the definition, which names the result, is as it was


def test_another_network_serves_the_other_intervals(work, unet):
    own = unet.randomize(unet.build_network("digits_separate", boundaries=(0.1, 0.44)), seed=1)
    other = unet.randomize(unet.build_network("digits_unified"), seed=2)
    hybrid, x = work.others_serve(own, [1], other), torch.randn(2, 1, 8, 8)
    for k, t in enumerate((0.05, 0.3, 0.7)):
        expected = own if k == 1 else other
        t = torch.full((2,), t)
        assert torch.equal(hybrid(x, t, stage=k), expected(x, t))


def test_gradients_of_neighbouring_times_agree_and_follow_the_seed(work, digits, unet):
    model = unet.randomize(unet.build_network("digits_unified"))
    images = digits[:64] * 2 - 1
    same = torch.tensor(work.alike(model, images, [0.5, 0.51, 0.52], "vp"))
    assert torch.equal(same, same.T) and same.min() > 0.9
    g = work.gradient(model, images, 0.2, 0.4, 0, "vp")
    assert torch.equal(g, work.gradient(model, images, 0.2, 0.4, 0, "vp"))
    assert not torch.equal(g, work.gradient(model, images, 0.2, 0.4, 1, "vp"))


def test_ratio_of_compute_at_which_another_run_is_as_good():
    import draw

    curve = lambda *pairs: dict(curve=[dict(gflops=g, frechet=f) for g, f in pairs])  # noqa: E731
    one = curve((1, 8.0), (2, 4.0), (4, 2.0), (8, 3.0))  # best at 4
    assert draw.reach(one, curve((1, 4.0), (4, 1.0))) == pytest.approx(0.5)  # at 2
    assert draw.reach(one, curve((1, 2.0))) == 0.25
    assert draw.reach(one, curve((1, 4.0), (8, 2.5))) is None
    for record, gflops in ((one, 1.0), (other := curve((1, 2.0)), 3.0)):
        record.update(equivalent_gflops=gflops)
        for row in record["curve"]:
            row["step"] = 10 * row["gflops"]
    paper, steps = (draw.COSTS[key] for key in ("by the paper's count", "by iterations"))
    assert draw.reach(one, other, steps) == 0.25
    assert draw.reach(one, other, paper) == 0.75


def test_features_of_a_resnet56(workshop, work, evaluation, sde, tmp_path):
    features, path = work.features, tmp_path / "resnet.th"
    torch.manual_seed(0)
    net = features.ResNet56().eval()
    sizes = [p.numel() for name, p in net.named_parameters() if "conv" in name]
    # He et al. 2016: a convolution that reads the picture, and three groups of 18, all of 3×3
    group = lambda c, before: 9 * (before * c + 17 * c * c)  # noqa: E731
    assert len(sizes) == 55
    assert sum(sizes) == 9 * 3 * 16 + group(16, 16) + group(32, 16) + group(64, 32)
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, path)

    x = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        same = features.load(path).features(features.prepare(x))
        assert torch.equal(same, net.features(features.prepare(x))) and same.shape == (40, 64)
    mean = features.prepare(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)).mean((2, 3))
    assert torch.allclose(
        mean * torch.tensor(features.STD) + torch.tensor(features.MEAN), mean * 0 + 1
    )

    extractor = features.resnet56(path)
    near = evaluation.evaluate(x[:20], x[20:], extractor)["frechet"]
    assert 0 <= near < evaluation.evaluate(x[:20] // 4, x[20:], extractor)["frechet"]

    path.write_bytes(b"no checkpoint")
    for asked, sentence in ((path, "is no checkpoint of a CIFAR-10 ResNet-56"), ("", "give its")):
        with pytest.raises(workshop.BadInput, match=sentence):
            features.resnet56(asked)


def test_the_same_pictures_are_compared_in_other_features_too(work, workshop, runner, monkeypatch):
    d = settle(runner, arch="unified", points=[0.02], ruler="efficientnet-lite0")
    with monkeypatch.context() as patched, pytest.raises(workshop.BadInput, match="takes colour"):
        patched.setattr(work.training, "train", None)
        work.train(d)  # said before it trains

    evaluation, pick = work.evaluation, work.evaluation.pick_extractor
    pixels = lambda x: x[:, 0, 3].float()  # noqa: E731
    other = lambda *a: (pixels, "") if a[3:] == (d["ruler"],) else pick(*a)  # noqa: E731
    monkeypatch.setattr(evaluation, "pick_extractor", other)
    row, plain = (work.train({**d, "ruler": ruler})["curve"][-1] for ruler in (d["ruler"], ""))
    assert {key: row[key] for key in plain} == plain  # neither training nor drawing notices
    metrics = {*evaluation.METRICS, "samples"}
    assert set(row) - set(plain) == {f"{key} in {d['ruler']}" for key in set(plain) & metrics}

    (real,) = work.compare_real(settle(runner, kind="real", ruler=d["ruler"]))["curve"]
    *_, half, rest = work.yardstick("digits", 0, 20)
    assert (
        real["frechet in efficientnet-lite0"] == evaluation.evaluate(rest, half, pixels)["frechet"]
    )
    assert real["frechet in efficientnet-lite0"] != real["frechet"]
    work.yardstick.cache_clear()


def test_a_factor_may_count_in_some_features_and_not_in_others():
    import draw

    def records(*distances):
        row = lambda a, b: {"frechet": a, "kid": 0, "frechet in x": b, "kid in x": 0, "gflops": 1}  # noqa: E731
        rows = [row(*pair) for pair in distances]
        return [dict(definition=dict(seed=i), curve=[row]) for i, row in enumerate(rows)]

    experiment = dict(settings=dict(seeds=[0, 1], ruler="x"), pairs=[["J", "L", "decoders"]])
    runs = [("J, encoder 8, 1", records((1.0, 3.0), (1.1, 5.0)))]
    runs += [("L, encoder 8, 1", records((2.0, 4.0), (2.1, 4.0)))]
    found = draw.rulers(experiment, runs)
    assert "| J − L | 1 | 2 | -1.00 ± 0.00 | helps | +0.0 ± 12.7 | no difference |" in found
    assert "| L, encoder 8, 1 | 2 | 2.05 ± 0.07 | 4.0 ± 0.0 |" in found


BROKEN = {
    "unknown key": ('label = "a"\nstpes = 3', "unknown key 'stpes'"),
    "wrong type": ('label = "a"\nbatch = "many"', "batch = 'many' is no int"),
    "no label": ('arch = "unified"', "every run needs a label"),
    "unknown kind": ('label = "a"\nkind = "x"', "unknown kind 'x'"),
    "unknown arch": ('label = "a"\narch = "x"\npoints = [1]', "unknown arch 'x'"),
    "never measured": ('label = "a"', "needs points at which it is measured"),
    "unknown run": ('label = "a"\nof = "b"', "builds on 'b', unknown so far"),
    "no TOML": ("label", "is no TOML"),
    "no number": ('label = "a"\nbatch = true', "batch = True is no int"),
    "unknown data": ('label = "a"\ndataset = "x"', "unknown dataset 'x'"),
    "unknown sampler": ('label = "a"\nsampler = "x"', "unknown sampler 'x'"),
    "unknown solver": ('label = "a"\nkind = "real"\nsolvers = [["x", 2]]', "unknown sampler 'x'"),
    "unknown count": ('label = "a"\nby = "epochs"\npoints = [1]', "by = 'epochs' must be"),
    "nothing held out": ('label = "a"\nheld_out = 0.0\npoints = [1]', "held_out = 0.0 must lie"),
    "points in disorder": ('label = "a"\npoints = [2, 1]', "must be numbers above 0, ascending"),
    "points of text": ('label = "a"\npoints = ["x"]', "must be numbers above 0, ascending"),
    "unknown stage": ('label = "a"\nactive = [7]', "must name stages of three"),
    "nothing to look at": ('label = "a"\nkind = "solvers"', "needs `of`"),
    "twice": ('label = "a"\nkind = "real"\n[[runs]]\nlabel = "a"', "two runs have the label 'a'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_bad_file_is_named_in_one_sentence(workshop, case, runner, sde, tmp_path):
    lines, sentence = BROKEN[case]
    (tmp_path / "bad.toml").write_text(f"[[runs]]\n{lines}\n", encoding="utf-8")
    with pytest.raises(workshop.BadInput, match=sentence) as error:
        runner.read_experiments(tmp_path)
    assert str(error.value).startswith("bad.toml")


def test_missing_data_is_a_sentence_and_is_asked_for_only_where_needed(
    workshop, work, runner, sde, tmp_path, monkeypatch, capsys
):
    def offline(*_, download, **__):
        raise RuntimeError("no network") if not download else OSError("no network")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", offline)
    text = 'asks = "CIFAR-10"\n[[runs]]\nlabel = "a"\nkind = "cuts"\ndataset = "cifar10"\n'
    (tmp_path / "colour.toml").write_text(text, encoding="utf-8")
    places = ["--folder", str(tmp_path), "--page", str(tmp_path / "x"), "--root", "nowhere"]
    runner.main(places)
    assert "colour: left out, it asks for CIFAR-10" in capsys.readouterr().out
    work.pictures.cache_clear()
    with pytest.raises(workshop.BadInput, match="CIFAR10 is not in nowhere"):
        runner.main([*places, "--only", "colour"])


def test_from_the_shell_an_unknown_experiment_is_a_sentence_and_status_2(tmp_path):
    command = [sys.executable, str(ROOT / "experiments" / "run.py"), "--only", "table9"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("run.py: error: unknown experiment 'table9': take one of table3")


@pytest.fixture(scope="module")
def committed(runner, work):
    """The experiments of the project with their committed results."""
    import draw

    work.paths["results"] = ROOT / "experiments" / "results"
    return draw.collect(runner.read_experiments(ROOT / "experiments"), work.read_result)


def test_the_page_has_the_numbers_of_the_committed_results(committed):
    import draw

    text = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    for name in [*committed, "ran", "rates", "capacity"]:
        assert text.count(f"<!-- {name} -->") == text.count(f"<!-- /{name} -->") == 1
    assert draw.page(text, committed) == text
    assert draw.page(text.replace("±", "+"), committed) != text.replace("±", "+")


def test_no_result_is_left_over_and_no_seed_is_dropped(work, committed):
    named, missing = set(), []
    for experiment, _ in committed.values():
        for label, seeds in experiment["units"]:
            for d in seeds:
                path = ROOT / "experiments" / "results" / work.result_path(d).name
                named.add(path.name)
                if not path.is_file():
                    missing.append((label, d["seed"]))
    assert {path.name for path in path.parent.iterdir()} == named
    assert not missing


def test_committed_arms_were_trained_alike(committed):
    for name in ("table3", "table4", "table7"):
        experiment, runs = committed[name]
        budget, recipes = experiment["at"], set()
        for label, records in runs:
            for record in (r for r in records if r["definition"]["kind"] == "training"):
                d = record["definition"]
                recipe = [record["recipe"][k] for k in ("batch", "lr", "warmup", "flip")]
                recipes.add(json.dumps([*recipe, *(d[k] for k in ("ema", "held_out", "nfe"))]))
                rows = [row for row in record["curve"] if row["gflops"] >= budget]
                stopped = d["patience"] and not record["curve"][-1]["active"]
                assert stopped or rows[0]["gflops"] <= budget + max(record["gflops"]), label
        assert len(recipes) == 1


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        ("win", "2.88"),
        ("tuned", "2.88"),
        ("win16", "7.91"),
        ("mnist16", "7.76"),
        ("ruler16", "7.91"),
    ],
)
def test_arms_of_the_study_differ_in_one_thing(committed, name, budget):
    experiment, runs = committed[name]
    everywhere = ("decay", "lr", "batch", "warmup", "ema", "held_out", "nfe", "samples")
    alike = set()
    definitions = {label: seeds[0] for label, seeds in experiment["units"] if ", e" in label}
    for label, d in definitions.items():
        alike.add(tuple(d[key] for key in (*everywhere, "sampling_seeds", "intervals")))
        assert d["points"][-1] == float(label.split(", ")[-1]), label
    assert len(alike) == 1 and "linear" in next(iter(alike))
    for one, other, factor in experiment["pairs"]:
        a, b = (definitions[f"{letter}, encoder 8, {budget}"] for letter in (one, other))
        differ = {key for key in a if a[key] != b[key]} - {"points", "keep", "of"}
        assert len(differ - {"decoders", "arch", "number"}) <= 1 + ("and" in factor), factor
    for label, records in runs:
        for record in records:
            row = record["curve"][-1]
            if label in definitions:
                end = float(label.split(", ")[-1])
                assert end <= row["gflops"] <= end + max(record["gflops"]), label
                assert len(row["frechets"]) == 3


def test_other_features_judge_the_networks_of_the_study(committed):
    study, again = (dict(committed[name][1]) for name in ("win16", "ruler16"))
    for label in set(again) & set(study):
        for one, other in zip(study[label], again[label], strict=True):
            d = other["definition"]
            assert {key for key in d if d[key] != one["definition"].get(key)} == {"ruler"}
            first, last = one["curve"][-1], other["curve"][-1]
            assert {key: last[key] for key in first} == first, label
    assert len(set(again) & set(study)) == 8


def test_paired_differences_and_what_they_mean():
    import pairs

    rows = {"A": [3.0, 2.0, 4.0], "B": [2.5, 1.4, 3.7], "C": [3.5, 1.9, 4.1]}
    arms = {(k, 8, 1.0): {i: {"frechet": v} for i, v in enumerate(vs)} for k, vs in rows.items()}
    del arms["A", 8, 1.0][1]  # a seed that one of two lacks is left out
    at = [(k, 8, 1.0) for k in "ABC"]
    found = pairs.differences(arms, at[1], at[0], lambda row: row["frechet"])
    assert found == pytest.approx([-0.5, -0.3])
    mean, half = pairs.interval(found)  # Student's quantile is 12.706 with one degree of freedom
    assert mean == pytest.approx(-0.4) and half == pytest.approx(12.706 * 0.1, rel=1e-3)
    assert pairs.verdict(found, 2) == "no difference"
    assert pairs.verdict([-0.5, -0.4, -0.6], 3) == "helps"
    assert pairs.verdict([0.5, 0.4, 0.6], 3) == "harms"
    assert pairs.verdict([-0.5, -0.4, -0.6], 5) == "open: 3 of 5 seeds"


def test_the_share_of_compute_is_read_between_runs_in_log_log():
    import pairs

    runs = [(1.0, 8.0), (4.0, 2.0)]  # the distance falls with the inverse of the compute
    assert pairs.share(runs, 4.0) == pytest.approx(2.0)
    assert pairs.share(runs, 9.0) == 1.0 and pairs.share(runs, 1.9) is None
    row = dict(frechet=4.0, gflops=4.0)
    arms = {("A", 8, b): {0: row} for b in (1.0, 4.0)}
    for budget, distance in runs:
        arms["C", 8, budget] = {0: dict(frechet=distance, gflops=budget)}
    assert list(pairs.shares(arms)) == [["C", "A", 0, "4.00", "0.50"]]


def test_a_branch_pays_for_its_trunk_and_both_follow_one_falling_rate(
    work, runner, tmp_path, monkeypatch
):
    text = """
[settings]
dataset = "digits"
seeds = [0]
batch = 6
samples = 20
nfe = 3
encoder = 4
decay = "linear"
stages = "mixed"
intervals = true
sampling_seeds = 2
[[runs]]
label = "trunk"
arch = "unified"
times = "stages"
decoders = [4]
points = [0.002, 0.006]
keep = true
[[runs]]
label = "branch"
decoders = [4, 4, 4]
points = [0.006]
of = "trunk"
branch = 1
"""
    (tmp_path / "a.toml").write_text(text, encoding="utf-8")
    monkeypatch.setitem(work.paths, "out", tmp_path / "out")
    monkeypatch.setitem(work.paths, "results", tmp_path / "results")
    (_, (trunk,)), (_, (branch,)) = runner.read_experiments(tmp_path)["a"]["units"]
    rates, step = [], work.training.training_step

    def watch(model, optimizer, loss, i, *more):
        step(model, optimizer, loss, i, *more)
        rates.append((i, optimizer.param_groups[0]["lr"]))

    monkeypatch.setattr(work.training, "training_step", watch)
    one = work.train(trunk)
    early, full = (row["step"] for row in one["curve"])
    plain = rates.copy()
    rates.clear()
    other = work.train(branch)
    assert [i for i, _ in rates] == list(range(early + 1, full + 1))
    assert dict(rates) == pytest.approx(dict(plain[early:]))  # the same rate at the same step
    assert other["curve"][0]["gflops"] == pytest.approx(one["curve"][1]["gflops"])
    assert set(one["curve"][0]["held_out"]) == {0, 1, 2}  # though it has but one decoder
    assert len(one["curve"][0]["frechets"]) == 2


def test_what_the_distance_follows_is_found(work):
    """Made runs: 1% more loss in stage 1 makes 3% more distance, whatever the seed's own level."""
    import pairs

    arms = {}
    dice = np.random.default_rng(0)
    level = {seed: dice.normal(size=4) for seed in range(3)}
    for letter in "ABCDEF":
        rows = {}
        for seed in range(3):
            low = dice.normal(size=3) / 10
            losses = np.exp(low + level[seed][:3])
            far = np.exp(level[seed][3] + 3 * low[1] + dice.normal() / 1000)
            rows[seed] = dict(frechet=far, held_out=dict(zip("012", losses, strict=True)))
        arms[letter, 8, 2.88] = rows
        arms[letter, 16, 2.88] = {0: dict(frechet=1.0, held_out={"0": 1, "1": 1, "2": 1})}
    found = list(pairs.follow(arms))
    assert [row[:2] for row in found] == [[k, 18] for k in range(3)]
    slopes = [float(row[3].split(" ± ")[0]) for row in found]
    assert slopes == pytest.approx([0, 3, 0], abs=0.05)
    assert float(found[1][4]) > 0.99 and list(pairs.follow({})) == []
