"""Draw six of each digit, as asked for, by the weights that come with the project: docs/drawn.png.

    python docs/drawn.py        # seconds; needs no data set

None is selected: the first 60 of seed 1, with guidance at the noise, where the digit is decided.
"""

import importlib
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
workshop = importlib.import_module("00_workshop")
training = importlib.import_module("04_train")
evaluation = importlib.import_module("05_sample_eval")

if __name__ == "__main__":
    content = workshop.read_checkpoint(HERE.parent / "runs" / "pretrained" / "mnist-labels")
    model, process = training.averaged_model(content), content["settings"]["process"]
    asked = dict(seed=1, label=torch.arange(60) % 10, guidance=(0, 0, 1))
    x = evaluation.sample(model, process, 60, "dpm-solver-3", 20, **asked)
    big = torch.nn.functional.interpolate(workshop.to_pictures(x), scale_factor=3)
    grid = workshop.tile_images(big, 10).permute(1, 2, 0)  # (H, W, 3)
    plt.imsave(HERE / "drawn.png", grid.numpy())
