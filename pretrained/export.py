"""Keep what a run has learned as one small file beside this script, for step 05 to draw with.

    python pretrained/export.py runs/digits-multistage
    python 05_sample_eval.py --name pretrained/digits-multistage

The file holds the averaged weights, the run's settings, its steps, and when and in how many minutes
it was trained. The classifier that digits are measured with comes with the project too, so that
distances are the same on every machine, and nobody waits for it to be trained again:

    python pretrained/export.py --classifier digits
"""

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
workshop = importlib.import_module("00_workshop")
training = importlib.import_module("04_train")
evaluation = importlib.import_module("05_sample_eval")


def write(name, weights, **about):
    """Write weights {name: tensor} and what is said about them, aside first; returns the path."""
    path = HERE / f"{name}.safetensors"
    weights = {key: value.contiguous() for key, value in weights.items()}
    about = {key: json.dumps(value) for key, value in about.items()}
    with workshop.replacing(path) as aside:
        save_file(weights, aside, about | dict(date=json.dumps(time.strftime("%Y-%m-%d"))))
    return path


def export(run, name=""):
    """Write the averaged weights of a run; returns the file's path."""
    content = workshop.read_checkpoint(run)
    model = training.averaged_model(content).cpu()
    rows = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, rows) if "images_per_s" in row]
    seconds, before = 0.0, 0
    for row in rows:
        seconds += (row["step"] - before) * content["settings"]["batch"] / row["images_per_s"]
        before = row["step"]
    about = dict(settings=content["settings"], step=content["step"])
    return write(
        name or Path(run).name, model.state_dict(), **about, minutes=round(seconds / 60, 1)
    )


def export_classifier(dataset):
    """Train the classifier that a data set is measured with and write it; returns the path."""
    classifier, accuracy = evaluation.train_classifier(*workshop.load_images(dataset))
    return write(f"{dataset}-classifier", classifier.state_dict(), accuracy=accuracy)


if __name__ == "__main__":
    sys.excepthook = workshop.report_bad_input
    parser = argparse.ArgumentParser("export.py", description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", help="folder of the run")
    parser.add_argument("--name", default="", help="name of the file; empty: that of the run")
    parser.add_argument("--classifier", choices=["digits"], help="write this classifier instead")
    asked = parser.parse_args()
    if not (asked.run or asked.classifier):
        parser.error("give the folder of a run, or --classifier digits")
    print(
        export_classifier(asked.classifier) if asked.classifier else export(asked.run, asked.name)
    )
