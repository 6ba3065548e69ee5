"""Weights that come with the project draw what docs/samples.md says, and are kept."""

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


SAMPLES = (ROOT / "docs" / "samples.md").read_text(encoding="utf-8")
SAID = re.findall(r"^\| `(digits-\w+)` \|.*\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", SAMPLES, re.M)


@pytest.mark.parametrize("name, said", [(name, said) for name, *said in SAID])
def test_the_weights_draw_what_is_said(name, said, tmp_path):
    asked = [sys.executable, ROOT / "05_sample_eval.py", "--name", f"pretrained/{name}"]
    asked += ["--out", tmp_path]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "pretrained" / name
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["samples / real"]
    for value, key in zip(said, ("frechet", "precision", "recall"), strict=True):
        assert found[key] == pytest.approx(float(value), abs=0.03)
    assert (folder / "samples.png").is_file()
    if name == "digits-demo":  # is the network of the first column
        for label, key in (("Fréchet distance ↓", "frechet"), ("precision ↑", "precision")):
            (value,) = re.findall(rf"^\| {label} \| ([\d.]+) \|", SAMPLES, re.M)
            assert found[key] == pytest.approx(float(value), abs=0.03)


def test_the_page_knows_all_weights_and_they_are_small():
    files = sorted((ROOT / "pretrained").glob("*.safetensors"))
    assert {path.stem for path in files if "classifier" not in path.stem} == set(
        re.findall(r"^\| `((?:digits|mnist)-\w+)` \|", SAMPLES, re.M)
    )
    assert len(SAID) == 3 and sum(path.stat().st_size for path in files) < 12e6


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
