"""Draw the idea of the paper in one picture, docs/idea.png: python docs/idea.py

A digit at five times, the timeline as Algorithm 1 cuts it, the encoder that all stages share, and
three decoders as wide as step 03's network for digits has them. The time chooses the decoder.
"""

import importlib
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
workshop = importlib.import_module("00_workshop")
sde = importlib.import_module("01_sde_and_denoiser")
clustering = importlib.import_module("02_clustering")
unet = importlib.import_module("03_multistage_unet")

TIMES, CHOSEN = [0.02, 0.07, 0.2, 0.36, 0.8], 2  # one of them is followed through the network
COLORS, PALE = ["C0", "C1", "C2"], ["#bad5e8", "#ffd8b6", "#bfe2bf"]  # of the stages
LEFT, LENGTH, LINE = 0.6, 12.8, 5.5  # where the timeline lies


def put_picture(ax, pixels, x, y, color):
    """Put pixels (H, W) in [0, 1] around the place (x, y), in a frame."""
    a, b, c, d = x - 0.85, x + 0.85, y - 0.85, y + 0.85
    ax.imshow(pixels, cmap="gray", extent=(a, b, c, d), vmin=0, vmax=1)
    ax.fill([a, b, b, a], [c, c, d, d], facecolor="none", edgecolor=color, lw=2, zorder=3)


def put_part(ax, x, y, left, right, color, name):
    """Draw a part of the network from x on around y, as high at its two ends as is said."""
    corners = [y - left / 2, y - right / 2, y + right / 2, y + left / 2]
    ax.fill([x, x + 2.4, x + 2.4, x], corners, color=color, lw=0)
    ax.text(x + 1.2, y, name, ha="center", va="center")


def put_arrow(ax, *points, color="0.45", width=2.4):
    """Draw a line through points (x, y), with a head at the last one."""
    ax.plot(*zip(*points[:-1], strict=True), color=color, lw=width)
    style = dict(arrowstyle="-|>", color=color, lw=width, shrinkA=0, shrinkB=0)
    ax.annotate("", points[-1], points[-2], arrowprops=style)


def draw_timeline(ax, noisy, cuts):
    """Draw the timeline with its stages, and above it a picture at each of TIMES."""
    for k, (start, end) in enumerate(pairwise([0, *cuts, 1])):
        a, b = LEFT + LENGTH * start, LEFT + LENGTH * end
        ax.fill([a, b, b, a], [LINE, LINE, LINE + 0.4, LINE + 0.4], color=COLORS[k], lw=0)
        ax.text((a + b) / 2, LINE + 0.18, f"stage {k}", color="white", ha="center", va="center")
    for i, (t, pixels) in enumerate(zip(TIMES, noisy, strict=True)):
        x, color = 1.5 + 2.75 * i, COLORS[unet.find_stage(torch.tensor(t), cuts)]
        put_picture(ax, pixels, x, LINE + 2, color)
        style = dict(color=color, lw=2.4 if i == CHOSEN else 1.2)
        ax.plot([x, LEFT + LENGTH * t], [LINE + 1.15, LINE + 0.4], **style)
        ax.text(x, LINE + 2.98, f"t = {t:g}", ha="center")
    ax.text(LEFT, LINE - 0.12, "the picture", va="top")
    ax.text(LEFT + LENGTH, LINE - 0.12, "pure noise", ha="right", va="top")


def draw_network(ax, noisy, predicted, stage, widths):
    """Draw the encoder and a decoder a stage, of which the time chooses one."""
    y, fork, top, color = 2.1, 6.1, 4.25, COLORS[stage]
    put_picture(ax, noisy, 1.45, y, color)
    ax.text(1.45, y - 1, "noisy picture", ha="center", va="top")
    put_arrow(ax, (2.35, y), (3, y), width=1.6)
    put_part(ax, 3, y, 3.4, 1.7, "0.85", "encoder,\nshared by\nall stages")
    ax.plot([5.4, fork], [y, y], color="0.45", lw=1.6)
    start = LEFT + LENGTH * TIMES[CHOSEN]
    put_arrow(ax, (start, LINE), (start, 4.5), (fork, 4.5), (fork, y), color=color)
    ax.text(start + 0.15, 4.62, "the time chooses the decoder", color=color)
    for k, width in enumerate(widths):
        height = 1.9 * width / max(widths)
        middle, shade = top - height / 2, COLORS[k] if k == stage else PALE[k]
        put_part(ax, 7.3, middle, height / 2, height, shade, f"decoder {k}")
        ax.text(9.85, middle + 0.15, f"{width} channels", fontsize=8)
        if k == stage:
            put_arrow(ax, (fork, y), (7.3, middle), color=color)
            put_arrow(ax, (9.7, middle), (11.65, middle), color=color)
            put_picture(ax, predicted, 12.55, middle, color)
            ax.text(12.55, middle + 1, "its noise", ha="center")
        else:
            ax.plot([fork, 7.3], [y, middle], color="0.6", lw=1.2, ls=":")
        top -= height + 0.3


if __name__ == "__main__":
    images = workshop.to_network_space(workshop.load_images("digits")[0])
    cuts, times = clustering.algorithm_1((images + 1) / 2), torch.tensor(TIMES)
    eps = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    x = sde.perturb(images[9:10], eps, times, sde.VP)  # (5, 1, 8, 8)
    predicted = sde.optimal_denoiser(x, times, sde.VP, images)[CHOSEN, 0]
    noisy, stage = workshop.to_pictures(x[:, 0]), int(unet.find_stage(times[CHOSEN], cuts))
    plt.rc("font", size=9)
    figure, ax = plt.subplots(figsize=(7, 4.7))
    draw_timeline(ax, noisy, cuts)
    widths = unet.NETWORKS["digits"]["decoders"]
    draw_network(ax, noisy[CHOSEN], 0.5 + predicted / 5, stage, widths)
    ax.set(xlim=(0, 14), ylim=(-0.3, 9.1), aspect="equal")
    ax.axis("off")
    figure.savefig(HERE / "idea.png", dpi=200, bbox_inches="tight", pad_inches=0.05)
