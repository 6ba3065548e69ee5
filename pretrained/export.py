"""Keep what a run has learned as one small file beside this script, for step 05 to draw with.

    python pretrained/export.py runs/digits-multistage
    python 05_sample_eval.py --name pretrained/digits-multistage

The file holds the averaged weights, the run's settings, its steps, and when and in how many minutes
it was trained. The classifiers that `digits` and `mnist` are measured with come with the project
too, so that distances are the same on every machine, and nobody waits for them to be trained again.
Another data set of digits needs its own:

    python pretrained/export.py --classifier mnist --root data
"""

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
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


def train_classifier(images, labels, steps=400, seed=0):
    """Train a DigitClassifier on 4/5 of (images uint8, labels): (it, accuracy on the rest)."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order], labels[order]
    cut, generator = len(images) * 4 // 5, torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = evaluation.DigitClassifier()
    optimizer = torch.optim.Adam(classifier.parameters(), 2e-3)
    for _ in range(steps):
        i = torch.randint(cut, (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(classifier(images[i].float() / 255), labels[i]).backward()
        optimizer.step()
    classifier.eval().requires_grad_(False)
    said = torch.cat([classifier(part.float() / 255).argmax(1) for part in images[cut:].split(500)])
    return classifier, (said == labels[cut:]).float().mean().item()


def export_classifier(dataset, root):
    """Train the classifier that a data set is measured with and write it; returns the path."""
    classifier, accuracy = train_classifier(*workshop.load_images(dataset, root))
    print(f"right on {accuracy:.2%} of a fifth of {dataset} that it was not trained on")
    return write(f"{dataset}-classifier", classifier.state_dict(), accuracy=accuracy)


if __name__ == "__main__":
    sys.excepthook = workshop.report_bad_input
    parser = argparse.ArgumentParser("export.py", description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", help="folder of the run")
    parser.add_argument("--name", default="", help="name of the file; empty: that of the run")
    parser.add_argument("--classifier", help="data set whose classifier is written instead")
    parser.add_argument("--root", default="data", help="where that data set lies")
    asked = parser.parse_args()
    if not (asked.run or asked.classifier):
        parser.error("give the folder of a run, or --classifier and a data set")
    if asked.classifier:
        print(export_classifier(asked.classifier, asked.root))
    else:
        print(export(asked.run, asked.name))
