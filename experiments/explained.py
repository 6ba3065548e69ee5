"""Who explains a network of CIFAR-10? Step 08's measure, asked of a run of decisive.toml.

    python experiments/explained.py --root data --features resnet56.th    # five minutes of one core

The run's network is trained first where its weights are not kept, which takes as long.
"""

import argparse
import importlib
import sys
from itertools import product

import run as experiments
import torch
import work

whose_cuts = importlib.import_module("08_whose_cuts")
sde, VP = whose_cuts.sde, whose_cuts.VP


def from_anywhere(x, t, kernel, images, size=3):
    """Predict the noise in x as `local_denoiser` does, from patches wherever they lie in images.

    A patch that the rim cuts off is compared with patches of its own height and width.
    """
    mean, (*_, H, W), r = torch.empty_like(x), x.shape, size // 2
    groups = {}  # pixels whose patches have the same form: (top, left, height, width) around them
    for i, j in product(range(H), range(W)):
        top, left = min(i, r), min(j, r)
        form = top, left, top + 1 + min(H - 1 - i, r), left + 1 + min(W - 1 - j, r)
        groups.setdefault(form, []).append((i, j))
    for (top, left, h, w), pixels in groups.items():
        known = images.unfold(2, h, 1).unfold(3, w, 1)  # (N, C, places, places, h, w)
        known = known.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        for i, j in pixels:
            rows, columns = slice(i - top, i - top + h), slice(j - left, j - left + w)
            seen = sde.posterior_mean(x[..., rows, columns], t, kernel, known, chunk=20_000)
            mean[..., i, j] = seen[..., top, left]
    return sde.infer_noise(x, mean, t, kernel)


def main():
    parser = argparse.ArgumentParser("explained.py", description=__doc__.split("\n")[0])
    parser.add_argument("--run", default="L, colour", help="its label in decisive.toml")
    parser.add_argument("--seed", type=int, default=10, help="that it was trained with")
    parser.add_argument("--root", default="data", help="where cifar10 lies")
    parser.add_argument("--features", default="", help="checkpoint of a CIFAR-10 ResNet-56")
    parser.add_argument("--out", default="runs/experiments", help="where weights are kept")
    asked = parser.parse_args()
    work.paths.update(root=asked.root, out=asked.out, features=asked.features)
    work.paths["results"] = experiments.HERE / "results"
    units = dict(experiments.read_experiments(experiments.HERE)["decisive"]["units"])
    (unit,) = (d for d in units[asked.run] if d["seed"] == asked.seed)
    model, (held_out, used) = work.last_of(unit), (part / 255 for part in work.split(unit))
    times = torch.tensor([0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3]).double()
    print(f"{'t =':42s}", *(f"{t:6g}" for t in times.tolist()))

    def tell(name, form, pictures, known, draws=3):
        dice = [torch.Generator().manual_seed(seed) for seed in range(draws)]
        asking = dict(forms={name: form})
        found = [whose_cuts.unexplained(model, pictures, known, times, d, **asking) for d in dice]
        found, spread = torch.stack([row[name] for row in found]), ""
        if draws > 1:
            spread = f"  ± {100 * (found.std(0) / found.mean(0)).max():.0f}% or less"
        print(f"{name:42s}", *(f"{v:6.2f}" for v in found.mean(0)), spread, flush=True)

    forms, known = whose_cuts.FORMS, used[:10_000]
    tell("optimal, pictures that it knows", forms["optimal"], known[:90], known)
    for name, form in forms.items():
        tell(name, form, held_out[:90], known)
    tell("local, 3×3, from anywhere, 1,000 pictures", from_anywhere, held_out[:30], used[:1000], 1)


if __name__ == "__main__":
    sys.excepthook = work.workshop.report_bad_input
    main()
