"""Weights that come with the project: what they draw is what the README says, and they are kept."""

import importlib
import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "pretrained"))
exporting = importlib.import_module("export")


def test_the_weights_draw_what_the_readme_says(tmp_path):
    name = "pretrained/digits-multistage"
    asked = [sys.executable, ROOT / "05_sample_eval.py", "--name", name, "--out", tmp_path]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / name / "metrics.json").read_text(encoding="utf-8"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for label, key in (("Fréchet distance ↓", "frechet"), ("precision ↑", "precision")):
        (said,) = re.findall(rf"^\| {label} \| ([\d.]+) \|", text, re.MULTILINE)
        assert found["samples / real"][key] == pytest.approx(float(said), abs=0.03)
    assert (tmp_path / name / "samples.png").is_file()


def test_the_kept_classifier_is_the_one_that_would_be_trained(workshop, evaluation):
    pixels, labels = workshop.load_images("digits")
    kept, said = evaluation.load_classifier("digits", pixels, labels)
    trained, accuracy = evaluation.train_classifier(pixels, labels)
    some = pixels.float() / 255
    with torch.no_grad():
        both = kept.body(some), trained.body(some)
        right = (kept(some).argmax(1) == labels).float().mean()
    # another machine rounds otherwise, and training makes that larger
    distance = evaluation.frechet_distance(*both)
    halves = evaluation.frechet_distance(both[0][::2], both[0][1::2])
    assert distance < 0.5 * halves and abs(said - accuracy) < 0.01 and right > 0.99
    other = evaluation.load_classifier("nothing", pixels[:200], labels[:200])[0]
    assert not torch.equal(other.head.weight, kept.head.weight)


def test_a_run_is_kept_and_read_back(workshop, unet, training, tmp_path, monkeypatch):
    run = tmp_path / "runs" / "short"
    flags = ["--steps", "3", "--out", tmp_path / "runs", "--name", "short"]
    subprocess.run(
        [sys.executable, ROOT / "04_train.py", *flags],
        check=True,
        capture_output=True,
        cwd=tmp_path,
    )
    monkeypatch.setattr(exporting, "HERE", tmp_path)
    path = exporting.export(run)
    assert path == tmp_path / "short.safetensors"
    content, kept = workshop.read_checkpoint(run), workshop.read_pretrained(path)
    assert (kept["settings"], kept["step"]) == (content["settings"], 3) and kept["minutes"] >= 0
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.05, 0.7])
    one, other = (training.averaged_model(part)(x, t) for part in (content, kept))
    assert torch.equal(one, other)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(workshop.BadInput, match=r"short\.safetensors is damaged"):
        workshop.read_pretrained(path)
    with pytest.raises(workshop.BadInput, match="there is no checkpoint"):
        workshop.read_checkpoint(tmp_path / "pretrained" / "nothing")
