"""The student's version: a gap says what is to be written, and its check tells right from wrong."""

import importlib
import sys

import papermill
import pytest
from conftest import ROOT, STEPS, command

sys.path.insert(0, str(ROOT / "docs"))
student = importlib.import_module("student")
WITH_GAPS = [step for step in STEPS if any(gap["step"] == step for gap in student.GAPS.values())]


def run(source, names):
    exec(compile(source, "<cell>", "exec"), names)


def lesson(step, monkeypatch):
    """Run the cells of a lesson one after the other; yields (cell, the next one, names) before."""
    monkeypatch.setattr(sys, "argv", [f"{step}.py"])
    names = {"__name__": "__main__", "__file__": f"{step}.py"}
    cells = student.with_gaps(step, chosen=[]).cells
    last = max(i for i, c in enumerate(cells) if c.source.startswith("# check: "))
    for cell, after in zip(cells[:last], cells[1:], strict=False):
        if cell.cell_type == "code":
            yield cell.source, after.source, names
            run(cell.source, names)


@pytest.mark.parametrize("step", WITH_GAPS)
def test_checks_tell_right_from_wrong(step, monkeypatch):
    """Runs a lesson once; at every gap also with the gap, and with the wrong answers."""
    if step == STEPS[5]:  # which draws from a run
        command(4, "--steps", 3, "--boundaries", "0.1,0.44")
    gaps, seen = {name: gap for name, gap in student.GAPS.items() if gap["step"] == step}, set()
    for source, check, names in lesson(step, monkeypatch):
        for name, gap in gaps.items():
            if not check.startswith(f"# check: {name}\n"):
                continue
            seen.add(name)
            with pytest.raises(NotImplementedError, match=r"^\w.{20,}"):
                run(student.opened(source, gap) + "\n" + check, dict(names))
            for what, lines in gap["wrong"].items():
                try:
                    run(student.opened(source, gap, lines) + "\n" + check, dict(names))
                except AssertionError as error:
                    print(f"{name}: {what}: {error}")
                    assert len(str(error).split()) > 8, what  # a sentence that says what is wrong
                else:
                    pytest.fail(f"{name}: {what} passes")
            run(source + "\n" + check, dict(names))
    assert seen == gaps.keys()


def test_a_notebook_stops_at_its_gap_and_nowhere_before(tmp_path, monkeypatch):
    """As students meet it: the last gap of step 05, which draws from a run and kept weights."""
    name, handout = "the Fréchet distance", tmp_path / "handout"
    student.write(handout, chosen=[name])
    assert {path.stem for path in handout.glob("*.ipynb")} == set(WITH_GAPS)
    monkeypatch.chdir(handout)
    command(4, "--steps", 3, "--boundaries", "0.1,0.44")
    how = dict(kernel_name="python3", cwd=handout, progress_bar=False)
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        papermill.execute_notebook(handout / f"{STEPS[5]}.ipynb", tmp_path / "out.ipynb", **how)
    assert caught.value.ename == "NotImplementedError"
    assert student.GAPS[name]["says"] in str(caught.value)


def test_the_handout_has_no_solution_and_every_wrong_answer_is_told_to_teachers():
    for name, gap in student.GAPS.items():
        assert len(gap["wrong"]) >= 5, name
        text = "".join(cell.source for cell in student.with_gaps(gap["step"]).cells)
        assert gap["lines"].strip() not in text and gap["says"] in text, name
        assert not any(told in text for told in gap.get("hides", {})), name
    page = " ".join((ROOT / "docs" / "teaching.md").read_text(encoding="utf-8").split())
    assert all(name in page for name in student.GAPS)
    assert all(what in page for gap in student.GAPS.values() for what in gap["wrong"])
