"""Execute the steps, in order, as notebooks.

    python notebooks/execute.py            into runs/demo/, with everything the steps leave
    python notebooks/execute.py --update   into notebooks/, the ones that are committed
    python notebooks/execute.py --update 02_clustering 03_multistage_unet   only those

The scripts are the source: each becomes a notebook by jupytext and runs through papermill.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import jupytext
import papermill

ROOT = Path(__file__).resolve().parent.parent
STEPS = sorted(path.stem for path in ROOT.glob("0[0-9]_*.py"))
SHORT = {  # in the demo, to stay within minutes
    "06_ldm": dict(code_steps=300, steps=500, compare=False),
    "07_beyond": dict(samples=200, seeds=2),
}


def last_states(text):
    """Keep of a progress bar what one would see at the end: the text after each line's last \\r."""
    states = [line.rstrip("\r").split("\r") for line in text.split("\n")]
    return "\n".join(row[-1].rstrip() if len(row) > 1 else row[0] for row in states)


def tidy(notebook):
    """Drop what differs from run to run without meaning: times, names, redrawn progress bars."""
    for name in ("papermill", "jupytext"):
        notebook.metadata.pop(name, None)
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"  # jupytext draws a new one each time
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if not tags(cell):
            cell.metadata.pop("tags", None)  # papermill adds an empty list
        if "draws" in tags(cell):
            cell.metadata["jupyter"] = {"source_hidden": True}  # so that Jupyter folds it, too
        if cell.cell_type != "code":
            continue
        joined = []
        for output in cell.outputs:
            same = joined and output.output_type == joined[-1].output_type == "stream"
            if same and output.name == joined[-1].name:
                joined[-1].text += output.text
            else:
                joined.append(output)
        for output in joined:
            if output.output_type == "stream":
                output.text = last_states(output.text)
        cell.outputs = [o for o in joined if o.output_type != "stream" or o.text.strip()]


def execute(step, target, parameters):
    """Run one step as a notebook and write it, executed, to `target`."""
    source = jupytext.read(ROOT / f"{step}.py")
    source.metadata["kernelspec"] = dict(display_name="Python 3", language="python", name="python3")
    known = source.cells[[tags(cell) for cell in source.cells].index(["parameters"])].source
    mine = {key: value for key, value in parameters.items() if f"\n{key} = " in f"\n{known}"}
    draft = target.with_suffix(".part.ipynb")
    quiet = ["--IPKernelApp.log_level=50"]  # it is interrupted when it ends, and would say so
    papermill.execute_notebook(
        *(source, draft, mine),
        **dict(cwd=ROOT, progress_bar=False, extra_arguments=quiet),
    )
    notebook = jupytext.read(draft)
    tidy(notebook)
    jupytext.write(notebook, target)
    draft.unlink()


def tags(cell):
    return cell.metadata.get("tags", [])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--update", action="store_true", help="refresh the committed notebooks")
    parser.add_argument("only", nargs="*", help="with --update: these steps, by name")
    arguments = parser.parse_args()
    update, steps = arguments.update, arguments.only or STEPS
    if not set(steps) <= set(STEPS) or (arguments.only and not update):
        parser.error(f"name steps only with --update, and only of {', '.join(STEPS)}")
    out = ROOT / "runs" / "demo"
    if update:
        folder, parameters = ROOT / "notebooks", {}
    else:
        folder, parameters = out / "notebooks", {"out": "runs/demo"}
        shutil.rmtree(out, ignore_errors=True)  # holds nothing but an earlier demo
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.pop("MPLBACKEND", None)  # a backend without windows would take the figures away
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # idle threads of the kernels sleep soon
    begin = time.perf_counter()
    for i, step in enumerate(steps, start=1):
        print(f"[{i}/{len(steps)}] {step} … ", end="", flush=True)
        start = time.perf_counter()
        try:
            short = {} if update else SHORT.get(step, {})
            execute(step, folder / f"{step}.ipynb", {**parameters, **short})
        except papermill.PapermillExecutionError as error:
            print(f"failed, see {folder}/{step}.part.ipynb\n{error}")
            sys.exit(1)
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
    print(f"all in {time.perf_counter() - begin:.0f} s\n")
    if not update:
        report(out, folder)


def report(out, folder):
    """Say where the results are, and the one number that sums them up."""
    here = lambda path: path.relative_to(ROOT)  # noqa: E731
    for name, column in (("digits-multistage", "samples"), ("digits-latent", "multistage")):
        metrics = json.loads((out / name / "metrics.json").read_text(encoding="utf-8"))
        ours, real = (metrics[f"{key} / real"]["frechet"] for key in (column, "real"))
        print(f"{name}: Fréchet distance {ours:.2f} (real against real: {real:.2f})")
        print(f"  sample grid         {here(out / name / 'samples.png')}")
        print(f"  metrics             {here(out / name / 'metrics.json')}")
    print(f"executed notebooks    {here(folder)}/")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack the … above
    main()
