"""The student's version: a gap says what is to be written, and its check tells right from wrong."""

import importlib
import shutil
import subprocess
import sys

import matplotlib
import papermill
import pytest
from conftest import ROOT, STEPS

sys.path.insert(0, str(ROOT / "docs"))
student = importlib.import_module("student")
WITH_GAPS = [step for step in STEPS if any(gap["step"] == step for gap in student.GAPS.values())]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a short run, which step 05 asks for."""
    folder = tmp_path_factory.mktemp("student")
    asked = [sys.executable, ROOT / "04_train.py", "--steps", "3", "--out", folder / "runs"]
    subprocess.run(asked, cwd=folder, check=True, capture_output=True)
    return folder


def run(source, names):
    exec(compile(source, "<cell>", "exec"), names)


@pytest.mark.parametrize("step", WITH_GAPS)
def test_checks_tell_right_from_wrong(step, place, monkeypatch):
    """Runs a lesson once; at every gap also with the gap, and with the wrong answers."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", [f"{step}.py"])
    matplotlib.use("Agg")
    whole = student.with_gaps(step, chosen=[])
    names, seen = {"__name__": "__main__"}, set()
    last = max(i for i, c in enumerate(whole.cells) if c.source.startswith("# check: "))
    for i, cell in enumerate(whole.cells[: last + 1]):
        if cell.cell_type != "code":
            continue
        for name, gap in student.GAPS.items():
            check = whole.cells[i + 1].source
            if not check.startswith(f"# check: {name}\n"):
                continue
            seen.add(name)
            with pytest.raises(NotImplementedError, match=r"^\w.{20,}"):
                own = dict(names)
                run(student.opened(cell.source, gap), own)
                run(check, own)
            for what, lines in gap["wrong"].items():
                own = dict(names)
                try:
                    run(student.opened(cell.source, gap, lines), own)
                    run(check, own)
                except (AssertionError, RuntimeError) as error:  # torch's own words are as good
                    assert str(error), what
                else:
                    pytest.fail(f"{name}: {what} passes")
        run(cell.source, names)
    assert seen == {name for name, gap in student.GAPS.items() if gap["step"] == step}


@pytest.fixture(scope="module")
def handout(place):
    """What students get, in a folder where step 05 finds its run."""
    out = place / "handout"
    asked = [sys.executable, ROOT / "docs" / "student.py", "--out", out]
    subprocess.run(asked, check=True, capture_output=True)
    assert {path.stem for path in out.glob("*.ipynb")} == set(WITH_GAPS)
    shutil.copytree(place / "runs", out / "runs")
    return out


def execute(notebook, folder):
    draft = folder / "draft.ipynb"
    student.jupytext.write(notebook, draft)
    papermill.execute_notebook(draft, draft, kernel_name="python3", cwd=folder, progress_bar=False)


@pytest.mark.parametrize("step", WITH_GAPS)
def test_notebooks_stop_at_a_gap_and_run_once_it_is_filled(step, handout):
    """Through papermill: to the last gap with those before it filled, then past it."""
    gaps = [name for name, gap in student.GAPS.items() if gap["step"] == step]
    answers = {name: student.GAPS[name]["lines"] for name in gaps}
    last = answers.pop(gaps[-1])
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        execute(student.with_gaps(step, answers=answers), handout)
    assert caught.value.ename == "NotImplementedError"
    assert student.GAPS[gaps[-1]]["says"] in str(caught.value)
    filled = student.with_gaps(step, answers={**answers, gaps[-1]: last})
    cells = filled.cells
    end = max(i for i, c in enumerate(cells) if c.source.startswith("# check: "))
    filled.cells = cells[: end + 1]
    execute(filled, handout)


def test_the_handout_has_no_solution_and_every_wrong_answer_is_told_to_teachers():
    for name, gap in student.GAPS.items():
        text = "".join(cell.source for cell in student.with_gaps(gap["step"]).cells)
        assert gap["lines"].strip() not in text and gap["says"] in text, name
    page = (ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")
    assert all(name in page for name in student.GAPS)
    assert all(what in page for gap in student.GAPS.values() for what in gap["wrong"])
