# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 05 · Drawing samples, and saying how good they are
#
# **You will** derive DDIM and DPM-Solver from one line, check their order on a case with a known
# answer, draw digits with the network of step 04, and measure them with a Fréchet distance, KID and
# precision and recall, each beside the value that real pictures reach.

# %%
import importlib
import json
import math
import os
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

if __name__ == "__main__" and os.path.basename(os.getcwd()) == "notebooks":
    os.chdir("..")  # a notebook that was opened where it lies
sde = importlib.import_module("01_sde_and_denoiser")
training = importlib.import_module("04_train")
BadInput = sde.BadInput

# %% tags=["parameters"]
name = "digits-multistage"  # name of the run to sample from
out = "runs"  # the folder that holds the runs
root = "data"  # where the run's data set lies or is downloaded to
sampler = "dpm-solver-3"  # ddim, dpm-solver-2, dpm-solver-3, euler-maruyama, probability-flow
nfe = 20  # evaluations of the network for one picture
samples = 898  # pictures to draw and to measure; at most half the data set
batch = 300  # pictures drawn at a time
seed = 1  # seed of the start noise

# %%
sde.settings(globals(), "05_sample_eval")

# %% [markdown]
# ## One line behind two solvers
#
# Divide the probability-flow ODE's solution by the scale, $z=x/s$, and measure time by the noise
# level $\sigma$ itself. The drift $f$ and all kernel constants cancel, and what is left is
#
# $$\frac{\mathrm dz}{\mathrm d\sigma}=\epsilon_\theta .$$
#
# **DDIM** is Euler's method on that line: $z'=z+(\sigma'-\sigma)\,\epsilon$. **DPM-Solver** writes
# it in $\lambda=-\log\sigma$, where $z'=z-\int e^{-\lambda}\epsilon\,\mathrm d\lambda$, expands
# only $\epsilon$ in $\lambda$ and integrates the exponential exactly. To first order that is DDIM
# again; orders 2 and 3 look at $\epsilon$ at one or two points between. (In the DPM-Solver paper
# $\lambda$ is half the log-SNR.)


# %%
def ddim(eps, kernel, x, nfe, generator=None, eta=0.0):
    """Sample by DDIM in nfe steps, equal in log-SNR, yielding x (B, C, H, W) after each.

    eps: function (x, t) -> predicted noise; x: noise at kernel.t_max; eta: 0 is deterministic, 1
    adds as much noise as DDPM. Source: Song, Meng, Ermon 2021, Eq. 12.
    """
    times = sde.log_snr_times(kernel, nfe).to(x.device)
    for t, t_next in zip(times, times[1:], strict=False):
        (s, sigma), (s_next, sigma_next) = ((kernel.s(u), kernel.sigma(u)) for u in (t, t_next))
        e = eps(x, t.expand(len(x)).to(x.dtype))
        z = sde.per_image(1 / s, x) * x
        # new noise of variance v, and so much less of the predicted noise
        v = (eta * sigma_next / sigma) ** 2 * (sigma**2 - sigma_next**2)
        z = z + sde.per_image((sigma_next**2 - v).sqrt() - sigma, x) * e
        if eta:
            new = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            z = z + sde.per_image(v.sqrt(), x) * new
        x = sde.per_image(s_next, x) * z
        yield x


def solver_orders(nfe, order):
    """Split nfe evaluations into singlestep DPM-Solver steps: the order of each step.

    The rest that is too small for a full step goes into lower orders at the end.
    Source: Lu et al. 2022, Appendix D.3 (DPM-Solver-fast).
    """
    full, rest = divmod(nfe, order)
    if order == 3 and rest == 0 and full:
        return [3] * (full - 1) + [2, 1]
    return [order] * full + [rest] * (rest > 0)


def dpm_solver(eps, kernel, x, nfe, generator=None, order=3):
    """Sample by singlestep DPM-Solver of order 1 to 3, yielding x (B, C, H, W) after each step.

    Arguments as `ddim`; nothing is random. Source: Lu et al. 2022, Algorithms 1 and 2.
    """
    orders = solver_orders(nfe, order)
    times = sde.log_snr_times(kernel, len(orders)).to(x.device)
    lambdas = kernel.log_snr(times) / 2

    def at(z, lam):  # the noise predicted for z = x / s at the time of lambda
        t = kernel.time(2 * lam)
        xt = (sde.per_image(kernel.s(t), z) * z).to(x.dtype)
        return eps(xt, t.expand(len(z)).to(x.dtype))

    def gain(lam, h, k):  # of the k-th term: the integral of e^-lambda (lambda - start)^k
        sigma, grow = torch.exp(-lam - h), torch.expm1(h)
        return sigma * (grow if k == 0 else grow / h - 1)

    z = x / sde.per_image(kernel.s(times[0]), x)
    for lam, lam_next, p in zip(lambdas, lambdas[1:], orders, strict=False):
        h = lam_next - lam
        e = at(z, lam)

        def first_order(r, z=z, e=e, lam=lam, h=h):  # a DDIM step over the share r of h
            return z - sde.per_image(gain(lam, r * h, 0), z) * e

        z_next = first_order(1)
        if p == 2:
            change = at(first_order(1 / 2), lam + h / 2) - e
            z_next = z_next - sde.per_image(gain(lam, h, 0), z) * change
        if p == 3:
            first = at(first_order(1 / 3), lam + h / 3) - e
            z_two = first_order(2 / 3) - 2 * sde.per_image(gain(lam, 2 / 3 * h, 1), z) * first
            change = at(z_two, lam + 2 / 3 * h) - e
            z_next = z_next - 1.5 * sde.per_image(gain(lam, h, 1), z) * change
        z = z_next
        yield sde.per_image(kernel.s(kernel.time(2 * lam_next)), z) * z


SAMPLERS = {
    "ddim": ddim,
    "dpm-solver-2": lambda *args, **kw: dpm_solver(*args, **kw, order=2),
    "dpm-solver-3": dpm_solver,
    "euler-maruyama": sde.euler_maruyama,
    "probability-flow": sde.probability_flow,
}
ORDER = {"ddim": 1, "dpm-solver-2": 2, "dpm-solver-3": 3, "probability-flow": 1}  # of the ODE ones

# %% [markdown]
# ## Are they what they claim?
#
# If the data are a Gaussian $\mathcal N(\mu,c^2)$, the best noise prediction is linear,
# $\epsilon(x,t)=\sigma\,(x/s-\mu)/(c^2+\sigma^2)$, and the ODE has the solution
# $z'=\mu+(z-\mu)\sqrt{(c^2+\sigma'^2)/(c^2+\sigma^2)}$. A solver of order $p$ must be wrong by a
# multiple of $n^{-p}$ after $n$ steps: a straight line of slope $-p$.


# %%
def gaussian_noise(kernel, mu, c):
    """Return the exact noise prediction (x, t) -> eps for data from N(mu, c^2)."""

    def eps(x, t):
        s, sigma = sde.per_image(kernel.s(t), x), sde.per_image(kernel.sigma(t), x)
        return sigma * (x / s - mu) / (c**2 + sigma**2)

    return eps


def gaussian_flow(kernel, x, mu, c):
    """Move x from t_max to t_min along the exact ODE of data from N(mu, c^2)."""
    ends = torch.tensor([kernel.t_max, kernel.t_min], dtype=torch.float64)
    (s, s_end), (sigma, sigma_end) = kernel.s(ends), kernel.sigma(ends)
    return s_end * (mu + (x / s - mu) * ((c**2 + sigma_end**2) / (c**2 + sigma**2)).sqrt())


def solver_errors(solver, kernel, steps_list, order, mu=0.3, c=0.5):
    """Measure the largest error of a solver on a Gaussian for several numbers of full steps.

    A full step takes as many evaluations as its order. One evaluation fewer than a step more leaves
    a last step of one order less, which keeps the order of the whole; any other rest would not.
    """
    start = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(-1, 1, 1, 1)
    start = start * kernel.s(kernel.t_max) * kernel.sigma(kernel.t_max)
    exact, errors = gaussian_flow(kernel, start, mu, c), []
    for n in steps_list:
        *_, x = solver(gaussian_noise(kernel, mu, c), kernel, start, n * order + order - 1)
        errors.append((x - exact).abs().max().item())
    return errors


if __name__ == "__main__":
    steps_list = [10, 20, 40, 80, 160]
    plt.figure(figsize=(6, 3.2))
    for kind, order in ORDER.items():
        errors = solver_errors(SAMPLERS[kind], sde.VP, steps_list, order)
        slope = math.log2(errors[-2] / errors[-1])
        print(f"{kind:16s} measured order {slope:.2f}, claimed {order}")
        assert abs(slope - order) < 0.15
        plt.loglog(steps_list, errors, marker="o", label=kind)
    plt.gca().set(
        xlabel="steps", ylabel="largest error", title="A Gaussian, where the answer is known"
    )
    plt.legend(fontsize=8)
    sde.show("figures/05_orders.png")

# %% [markdown]
# ## Drawing
#
# `sample` hands the solver a function of $(x,t)$ and never says "stage": the network looks at $t$
# and runs the one decoder in charge. Below, the same run also counts who worked.


# %%
def to_pictures(x):
    """Map network space [-1, 1] to pictures in [0, 1]."""
    return ((x + 1) / 2).clamp(0, 1)


@torch.no_grad()
def sample(
    model, process, n, sampler="dpm-solver-3", nfe=20, seed=0, batch=300, calls=None, progress=False
):
    """Draw n pictures (n, C, H, W) in the network's space [-1, 1], on the CPU.

    The start noise is drawn at once for all, so the result does not depend on `batch` but for
    rounding and for samplers that draw noise themselves. calls: a list that gets, for each
    evaluation of the network, its stage. Raises BadInput for an unknown sampler or an impossible
    number of evaluations.
    """
    if sampler not in SAMPLERS:
        raise BadInput(f"unknown sampler {sampler!r}: take one of {', '.join(SAMPLERS)}")
    if nfe < 1 or n < 1 or batch < 1:
        raise BadInput(f"nfe = {nfe}, samples = {n} and batch = {batch} must all be 1 or more")
    kernel, where = training.KERNELS[process], next(model.parameters()).device
    noise = torch.randn(
        n, model.channels, model.size, model.size, generator=torch.Generator().manual_seed(seed)
    )
    generator = torch.Generator(where).manual_seed(seed)

    def eps(x, t):
        if calls is not None:
            calls.append(int(model.stage(t[0])))
        return training.predict_noise(model, x, t, process)

    x_T = noise * (kernel.s(kernel.t_max) * kernel.sigma(kernel.t_max)).float()
    done = []
    for part in tqdm(x_T.split(batch), "sampling", disable=not progress, leave=False):
        *_, x = SAMPLERS[sampler](eps, kernel, part.to(where), nfe, generator)
        done.append(x.cpu())
    return torch.cat(done)


# %%
if __name__ == "__main__":
    run, calls = Path(out) / name, []
    model, settings = training.load_model(run)
    begin = time.perf_counter()
    x = sample(model, settings["process"], samples, sampler, nfe, seed, batch, calls, progress=True)
    seconds, drawn = time.perf_counter() - begin, to_pictures(x)
    share = {k: calls.count(k) / len(calls) for k in sorted(set(calls))}
    print(
        f"{samples} pictures in {seconds:.1f} s on {sde.device()}: {samples / seconds:.0f} a second"
    )
    print("share of evaluations by stage:", {k: round(v, 2) for k, v in share.items()})

# %%
if __name__ == "__main__":
    title = f"{name} after {settings['steps']:,} steps: {sampler}, {nfe} NFE, seed {seed}"
    sde.show_images([drawn[:96]], [title], run / "samples.png")

# %% [markdown]
# How does such a picture come about? Some states on the way, from noise to picture.

# %%
if __name__ == "__main__":
    eps = lambda x, t: training.predict_noise(model, x, t, settings["process"])  # noqa: E731
    kernel = training.KERNELS[settings["process"]]
    start = torch.randn(3, *x.shape[1:], generator=torch.Generator().manual_seed(seed))
    start = start * (kernel.s(kernel.t_max) * kernel.sigma(kernel.t_max)).float()
    with torch.no_grad():
        states = [start, *ddim(eps, kernel, start.to(sde.device()), 15)]
    strip = torch.stack([state.cpu() for state in states], 1).flatten(0, 1)  # (3 * 16, C, H, W)
    sde.show_images([to_pictures(strip)], ["15 steps of DDIM, three pictures"], run / "strip.png")

# %% [markdown]
# ## Measuring
#
# Sample quality is measured in the feature space of a classifier. The **Fréchet distance** compares
# mean and covariance of the features of two sets, **KID** compares them with a kernel and has no
# bias from the number of samples, **precision** is the share of samples that lie among the real
# ones, **recall** the share of real ones that lie among the samples. All come from torch-fidelity.
#
# The distance called FID uses one particular classifier, Inception on ImageNet. For 8×8 digits that
# makes no sense, so a small classifier is trained on their labels and *registered* with
# torch-fidelity. **Its distances are no FIDs** and compare only with each other.


# %%
class DigitClassifier(nn.Module):
    """Classify grey pictures (B, 1, H, W) in [0, 1] into ten digits.

    `body` gives the 64 features before the decision, each with mean 0 and variance 1 over real
    pictures, so that distances between them have a scale.
    """

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *(
                nn.Conv2d(1, 32, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(32, 64, 3, padding=1),
                nn.ReLU(),
            ),
            *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 64)),
            nn.BatchNorm1d(64, affine=False),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(F.relu(self.body(x)))


def train_classifier(images, labels, steps=400, seed=0):
    """Train a DigitClassifier on four fifths of (images uint8, labels); return (it, accuracy).

    The accuracy is that on the last fifth of a random order, which it has not seen.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order].float() / 255, labels[order]
    cut, generator = len(images) * 4 // 5, torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = DigitClassifier()
    optimizer = torch.optim.Adam(classifier.parameters(), 2e-3)
    for _ in range(steps):
        i = torch.randint(cut, (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(classifier(images[i]), labels[i]).backward()
        optimizer.step()
    classifier.eval()
    with torch.no_grad():
        right = classifier(images[cut:]).argmax(1) == labels[cut:]
    return classifier, right.float().mean().item()


# %%
def register(classifier):
    """Register a classifier's features with torch-fidelity and return the name to ask for them."""
    import torch_fidelity
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    class Features(torch_fidelity.FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)
            self.classifier = classifier

        @staticmethod
        def get_provided_features_list():
            return ("64",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "64"

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, x):  # torch-fidelity gives uint8 (B, C, H, W) and wants a tuple
            return (self.classifier.body(x.float() / 255),)

    name = f"classifier-{len(FEATURE_EXTRACTORS_REGISTRY)}"  # a name can be registered only once
    torch_fidelity.register_feature_extractor(name, Features)
    return name


class Pictures(torch.utils.data.Dataset):
    """Serve a tensor of pictures (N, C, H, W) in [0, 1] as torch-fidelity wants them: uint8."""

    def __init__(self, images):
        self.images = (images * 255).round().to(torch.uint8)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


def evaluate(images, reference, extractor):
    """Compare two sets of pictures (N, C, H, W) in [0, 1]: a dictionary of metrics.

    extractor: a name registered with torch-fidelity; with "inception-v3-compat" the Fréchet
    distance is FID. Keys: frechet, kid, kid_std, precision, recall, samples.
    Raises BadInput for sets that are too small or do not fit, or weights that cannot be had.
    """
    import torch_fidelity

    n = min(len(images), len(reference))
    if images.shape[1:] != reference.shape[1:] or n < 10:
        raise BadInput(
            f"cannot compare {tuple(images.shape)} with {tuple(reference.shape)}: "
            "give two sets of 10 or more pictures of one size"
        )
    try:
        found = torch_fidelity.calculate_metrics(
            input1=Pictures(images),
            input2=Pictures(reference),
            feature_extractor=extractor,
            **dict(fid=True, kid=True, prc=True, kid_subset_size=min(n // 2, 1000)),
            **dict(cuda=torch.cuda.is_available(), save_cpu_ram=True, verbose=False, cache=False),
        )
    except OSError as error:
        raise BadInput(
            f"the weights of {extractor} cannot be had ({error}): torch-fidelity looks for them in "
            f"{torch.hub.get_dir()}/checkpoints"
        ) from error
    keys = dict(frechet="frechet_inception_distance", kid="kernel_inception_distance_mean")
    keys.update(kid_std="kernel_inception_distance_std", precision="precision", recall="recall")
    return {**{key: found[theirs] for key, theirs in keys.items()}, "samples": n}


# %% [markdown]
# A number alone says nothing. So the real pictures are cut into two random halves, and the same
# metrics are taken between them: that is what perfect samples would get. Both comparisons use the
# same number of pictures, because the Fréchet distance grows when there are fewer.


# %%
def real_halves(images, n):
    """Cut a data set (N, C, H, W) uint8 into two random sets of n pictures, floats in [0, 1]."""
    if n > len(images) // 2:
        raise BadInput(f"samples = {n} is more than half the data set: take {len(images) // 2}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[:n]].float() / 255, images[order[n : 2 * n]].float() / 255


def pick_extractor(dataset, images, labels):
    """Choose features for a data set: (name for torch-fidelity, name for the reader)."""
    if dataset not in ("digits", "mnist"):
        return "inception-v3-compat", "Inception: FID"
    classifier, accuracy = train_classifier(images, labels)
    return register(classifier), f"a digit classifier, {accuracy:.1%} right on unseen digits"


def print_metrics(table, title):
    """Print {column: metrics} as a table with a metric a line."""
    print(title)
    print(f"{'':20s}" + "".join(f"{column:>24s}" for column in table))
    for key, label in (
        ("frechet", "Fréchet distance ↓"),
        ("kid", "KID ↓"),
        ("precision", "precision ↑"),
        ("recall", "recall ↑"),
    ):
        print(f"{label:20s}" + "".join(f"{metrics[key]:24.4f}" for metrics in table.values()))


if __name__ == "__main__":
    pixels, labels = sde.load_images(settings["dataset"], root)
    extractor, features = pick_extractor(settings["dataset"], pixels, labels)
    half, other_half = real_halves(pixels, samples)
    table = {
        "samples / real": evaluate(drawn, half, extractor),
        "real / real": evaluate(other_half, half, extractor),
    }
    print_metrics(table, f"{samples} pictures a set, features of {features}")

# %%
if __name__ == "__main__":
    record = dict(run=str(run), sampler=sampler, nfe=nfe, seed=seed, features=features, **table)
    with sde.replacing(run / "metrics.json") as aside:
        aside.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(f"grid: {run / 'samples.png'}\nmetrics: {run / 'metrics.json'}")

# %% [markdown]
# **You have** samples, a picture of how they come about, and numbers with a yardstick beside them.
# Step 06 does the same in the latent space of an autoencoder.
#
# ### Exercises
#
# 1. Measure `--nfe 5`, 10, 20, 50 with `ddim` and `dpm-solver-3`. Where do they meet?
#    <details><summary>Solution</summary>Both approach the distance of the exact ODE; the
#    third-order solver needs fewer evaluations to get there. Below about 10 its few large steps are
#    no advantage.</details>
# 2. Why is the Fréchet distance between two halves of the real data not zero?
#    <details><summary>Solution</summary>Means and covariances of 898 pictures are estimates; two
#    sets give two estimates. With more pictures the distance falls.</details>
