"""The shape of the house: what stands above the line in each step, and a data set in one place."""

import importlib
import re
import sys
from statistics import median

import pytest
import torch
from conftest import ROOT, STEPS, command

LESSONS = STEPS[1:]
LINE = "# ## Below this line: faster, safer, as published"
MAIN = 'if __name__ == "__main__"'


def cells(text):
    """Cut a percent script into (head, body, number of its first line)."""
    found, at = [], 1
    for part in re.split(r"(?m)^(?=# %%)", text):
        if part.startswith("# %%"):
            head, _, body = part.partition("\n")
            found.append((head, body, at + 1))
        at += part.count("\n")
    return found


def counted(body):
    return sum(bool(line.strip("# ")) for line in body.splitlines())


def shows(body):
    """Tell whether a cell prints or draws where it is run."""
    return MAIN in body and re.search(r"print\(|show_|draw_", body.split(MAIN, 1)[1])


def measures(step):
    """Measure what stands above the line of a step: {name: number}."""
    text = (ROOT / f"{step}.py").read_text(encoding="utf-8")
    if step in STEPS[7:]:  # all of it is lesson
        text += LINE
    assert text.count(LINE) == 1, f"{step} has no line between the lesson and what is below"
    lesson = text[: text.index(LINE)]
    code = [cell for cell in cells(lesson) if "[markdown]" not in cell[0]]
    prose = sum(counted(body) for head, body, _ in cells(lesson) if "[markdown]" in head)
    told = [cell for cell in code if not re.search(r"import_module|workshop\.settings\(", cell[1])]
    told = [cell for cell in told if "parameters" not in cell[0]]
    idea = [cell for cell in code if "draws" not in cell[0]]  # others are folded on the site
    silent = longest = 0
    for _, body, _ in told:
        silent = 0 if shows(body) else silent + counted(body)
        longest = max(longest, silent)
    first = next((at + body[: body.index(MAIN)].count("\n") for _, body, at in told if shows(body)))
    return {
        "above": lesson.count("\n"),
        "longest cell": max(counted(body) for _, body, _ in idea),
        "prose a line of code": round(prose / sum(counted(body) for _, body, _ in idea), 2),
        "lines before they show something": longest,
        "median cell": median(counted(body) for head, body, _ in told if "draws" not in head),
        "first output": first,
    }


LIMITS = {
    "above": (0, 450),
    "longest cell": (0, 25),
    "prose a line of code": (0.7, 9),
    "lines before they show something": (0, 30),
    "median cell": (0, 10),
    "first output": (0, 60),
}
# Below the line, and elsewhere, is capability: it may shrink, and grows only with what is worth it.
MOST_LINES = {
    # pictures of every kind decoded right, output that nobody takes, runs that know whose they are
    "00_workshop": 860,  # and CUDA graphs that replay a step; colour pictures without a GPU; a zip
    "01_sde_and_denoiser": 742,  # five kernels as plain methods; Prop. 1 at the products' rate
    "02_clustering": 715,  # the pilot, without which cuts of digits scatter twice as much
    "03_multistage_unet": 1090,  # three published backbones, bit for bit, and their tables
    "04_train": 1030,  # five processes, early stopping; a step in pieces, or replayed on a card
    "05_sample_eval": 1100,  # every solver of Table 1, sets drawn together, the likelihood bound
    "06_ldm": 741,
    "07_beyond": 450,
    "08_whose_cuts": 300,
    "0[0-7]_*": 6710,
    "tools/release": 190,  # three backbones, a first stage, averages of every form
    "tests/*": 5000,  # with those of step 08, and the table of faults that runs
    "benchmarks/*": 700,
}


@pytest.mark.parametrize("step", LESSONS)
def test_the_lesson_is_short_and_the_rest_is_below(step):
    found = measures(step)
    print(step, found)
    limits = dict(LIMITS)
    if step in STEPS[7:]:  # of which nothing is below the line
        limits["prose a line of code"] = (0.6, 9)
    outside = {
        name: found[name] for name, (low, high) in limits.items() if not low <= found[name] <= high
    }
    assert not outside


def test_nothing_grows():
    lines = lambda path: path.read_text(encoding="utf-8").count("\n")  # noqa: E731
    found = {name: sum(map(lines, ROOT.glob(f"{name}.py"))) for name in MOST_LINES}
    print(found)
    assert {name: n for name, n in found.items() if not 0 < n <= MOST_LINES[name]} == {}


def read_noises(root):
    pixels = torch.randint(256, (80, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    return pixels.byte(), torch.arange(80) % 10


def test_a_data_set_is_added_in_one_place(workshop, monkeypatch):
    """Another entry of DATASETS is clustered, trained, drawn, measured and encoded by the steps."""
    new = {**workshop.DATASETS["digits"], "read": read_noises}
    new["recipe"] = dict(steps=2, batch=8, lr=1e-3, warmup=1, flip=False)
    new["latent_recipe"] = {**new["recipe"], "code_steps": 2, "code_batch": 8, "code_lr": 1e-3}
    monkeypatch.setitem(workshop.DATASETS, "noises", new)
    for step in STEPS[1:]:  # step 03 lists its networks where it is imported
        monkeypatch.delitem(sys.modules, step, raising=False)
    judge = workshop.read_checkpoint("pretrained/digits-classifier")
    workshop.write_checkpoint(judge, "pretrained/noises-classifier")
    few = ["--dataset", "noises", "--samples"]
    command(2, *few, 200, "--pairs", 2)
    command(4, "--dataset", "noises", "--boundaries", "0.1,0.44")
    command(5, "--name", "noises-multistage", "--samples", 20, "--nfe", 2)
    command(6, *few, 20, "--nfe", 2)
    for name in ("noises-multistage", "noises-latent", "noises-latent/unified"):
        assert workshop.read_checkpoint(f"runs/{name}")["settings"]["dataset"] == "noises"


WANTED = [f"Eq. {n}" for n in (*range(1, 9), 14, *range(17, 24))]
WANTED += ["Prop. 1", "Algorithm 1", "Algorithm 2", "footnote 4", "dispatch", "EMA", "Fréchet"]


def test_every_entry_of_the_index_is_where_it_says(evaluation, monkeypatch):
    """Rows | equation or idea | [function](file#line) |, against lines tagged with it."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    lines = importlib.import_module("lines")
    texts = [page.read_text(encoding="utf-8") for page in lines.PAGES]
    for text in texts:
        assert lines.relink(text) == text, "lines have moved: python docs/lines.py"
    rows = re.findall(r"^\| ([^|]+) \| \[`(\w+)`\]\(\S*(0\d_\w+)\.py#L", "\n".join(texts), re.M)
    for what, function, step in rows:
        if what in WANTED:
            assert f"# {what}" in lines.find_line(step, function, what)[1], (what, function)
    assert set(WANTED) <= {what for what, *_ in rows} and texts[0].count("py#L") == 10
    functions = {f for _, f, step in rows if step in (STEPS[1], evaluation.__name__)}
    solvers = [getattr(solver, "func", solver).__name__ for solver in evaluation.SAMPLERS.values()]
    assert set(solvers) <= functions


def test_the_readme_is_short_and_its_numbers_are_those_of_the_study():
    readme, study = ((ROOT / n).read_text("utf-8") for n in ("README.md", "RESULTS.md"))
    assert readme.count("\n") <= 180
    rows = [re.findall(r"(?<=\| )\d\.\d\d(?= \|)", line) for line in readme.splitlines()]
    pairs = {(row[i + 1], row[i]) for row in rows for i in range(0, len(row), 2)}
    told = re.findall(r"\| ([\d.]+) against ([\d.]+) \|", study)  # the cells of its tables
    assert len(pairs) == 7
    assert pairs <= {tuple(f"{float(number):.2f}" for number in pair) for pair in told}
