# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 01 · Noise, its reversal, and the best possible denoiser
#
# **You will** turn pictures into noise with six kernels, turn noise back into pictures with an SDE
# and an ODE, and derive the one function that does this best for a given data set (Proposition 1 of
# the paper). It needs no training, and you will see why we train networks all the same.
#
# The paper is Zhang, Lu et al., *Improving Efficiency of Diffusion Models via Multi-Stage Framework
# and Tailored Multi-Decoder Architectures*. These symbols stay the same through all six steps:
#
# | in the paper | in the code | meaning |
# |---|---|---|
# | $x_0$, $y_i$ | `x0`, `images` | a picture; the $N$ pictures of the data set |
# | $x_t$ | `xt`, `x` | the picture with noise at time $t$, shape (B, C, H, W) |
# | $\epsilon$ | `eps` | standard Gaussian noise of the same shape |
# | $s_t, \sigma_t$ | `kernel.s(t)`, `kernel.sigma(t)` | scale and noise level of the kernel |
# | $f(t), g(t)$ | `kernel.f(t)`, `kernel.g(t)` | drift and diffusion of its SDE |
# | $\epsilon^*_t(x)$ | `optimal_denoiser` | the best noise prediction for the data set |
# | $t_1, t_2$ | `boundaries` | where the timeline is cut into stages (step 02) |
# | $\epsilon_\theta$ | `model` | the network (step 03) |
# | $\omega(t)$ | `weight` | the weight of the loss (step 04) |

# %%
import importlib
import os

if __name__ == "__main__" and os.path.basename(os.getcwd()) == "notebooks":
    os.chdir("..")  # a notebook that was opened where it lies
workshop = importlib.import_module("00_workshop")  # first: it readies the process for torch

import functools
from contextlib import contextmanager

import matplotlib.pyplot as plt
import numpy as np
import torch

BadInput = workshop.BadInput

# %% tags=["parameters"]
dataset = "digits"  # digits, mnist, cifar10, celeba or folder
root = "data"  # where the data set lies or is downloaded to
samples = 16  # pictures drawn with the optimal denoiser [1, 100000]
steps = 200  # solver steps for drawing them [2, 10000]
seed = 0  # seed of every random number [0, 4294967295]

# %%
workshop.settings(globals(), "01_sde_and_denoiser")

# %%
if __name__ == "__main__":
    torch.manual_seed(seed)
    pixels, labels = workshop.load_images(dataset, root)
    images = pixels[:50_000].to(workshop.device()).float() / 255  # (N, C, H, W) in [0, 1]
    states_size = 4 * samples * (steps + 1) * images[0].numel()  # of all paths, in bytes
    workshop.check_memory(states_size, f"samples = {samples} with steps = {steps}")
    workshop.show_images(
        [images[:16]], [f"{dataset}: the first 16 of {len(pixels):,}"], "figures/01_data.png"
    )

# %% [markdown]
# ## From pictures to noise
#
# The forward process blends a picture with noise. Its *perturbation kernel* is a Gaussian with a
# scale $s_t$ and a noise level $\sigma_t$:
#
# $$p_t(x_t \mid x_0) = \mathcal N(x_t;\, s_t x_0,\, s_t^2\sigma_t^2 I) \tag{1}$$
#
# It is the law of the SDE $\mathrm dx = f(t)\,x\,\mathrm dt + g(t)\,\mathrm dw$ when
#
# $$s_t = \exp\Big(\int_0^t f(\xi)\,\mathrm d\xi\Big),\qquad
#   \sigma_t^2 = \int_0^t \frac{g(\xi)^2}{s_\xi^2}\,\mathrm d\xi. \tag{2}$$
#
# A kernel is therefore four functions of time, and six are in use:
#
# | kernel | $s_t$ | $\sigma_t$ | time | used by |
# |---|---|---|---|---|
# | `VP` | $e^{-B/2}$ | $\sqrt{e^{B}-1}$ | $[10^{-3},1]$ | the paper's CIFAR-10 and CelebA models |
# | `SubVP` | $e^{-B/2}$ | $e^{B/2}-e^{-B/2}$ | as VP | Song et al. 2021 |
# | `DDPM`, `LDM` | as VP, $B$ a table | as VP | step/1000 | Ho et al. 2020; latent diffusion |
# | `VE` | 1 | $\sigma$ itself | $[0.01,50]$ | Song et al. 2021 |
# | `EDM` | 1 | $\sigma$ itself | $[0.002,80]$ | Karras et al. 2022 |
#
# Here $B(t)=\int_0^t\beta$. **VP** (variance preserving) shrinks the picture while the noise grows,
# so that $s^2(1+\sigma^2)=1$; sub-VP shrinks it alike with less noise. **VE** (variance exploding)
# leaves the picture alone. Song et al. let $\sigma$ grow geometrically with a time in [0, 1];
# the paper (footnote 4) and EDM take $\sigma$ itself as the time.


# %%
def as_time(t):
    """Take a tensor as it is and anything else as float64: formulas below then work on both."""
    return t if torch.is_tensor(t) else torch.as_tensor(t, dtype=torch.float64)


class VP:
    """Describe the variance-preserving kernel with linear beta, over t in [1e-3, 1].

    Every method maps times of any shape to values of the same shape. Source: paper, Section 5.
    """

    # paper: prints s and sigma with signs and exponents lost; here: the forms that satisfy Eq. 2
    # and s^2 (1 + sigma^2) = 1, which are also the ones behind the published numbers.
    beta_d, beta_min = 19.9, 0.1
    t_min, t_max = 1e-3, 1.0

    @classmethod
    def beta(cls, t):
        return cls.beta_min + cls.beta_d * as_time(t)

    @classmethod
    def B(cls, t):  # the integral of beta from 0 to t
        return cls.beta_d / 2 * as_time(t) ** 2 + cls.beta_min * as_time(t)

    @classmethod
    def time_of_B(cls, B):
        root = torch.sqrt(cls.beta_min**2 + 2 * cls.beta_d * B)
        return 2 * B / (cls.beta_min + root)  # this form of the root loses no digits

    @classmethod
    def s(cls, t):
        return torch.exp(-cls.B(t) / 2)

    @classmethod
    def sigma(cls, t):
        return torch.sqrt(torch.expm1(cls.B(t)))  # expm1: exact where B is tiny

    @classmethod
    def f(cls, t):
        return -cls.beta(t) / 2

    @classmethod
    def g(cls, t):
        return torch.sqrt(cls.beta(t))

    @classmethod
    def log_snr(cls, t):  # log s^2 / (s sigma)^2
        return -2 * torch.log(cls.sigma(t))

    @classmethod
    def time(cls, log_snr):  # the inverse of log_snr, from B(t) = log(1 + sigma^2)
        return cls.time_of_B(torch.nn.functional.softplus(-as_time(log_snr)))


class SubVP(VP):
    """Describe the sub-VP kernel: as `VP` with a noise s sigma = 1 - exp(-B), always below VP's.

    Source: Song et al. 2021, Eqs. 28 and 29.
    """

    @classmethod
    def sigma(cls, t):
        return 2 * torch.sinh(cls.B(t) / 2)

    @classmethod
    def g(cls, t):
        return torch.sqrt(-cls.beta(t) * torch.expm1(-2 * cls.B(t)))

    @classmethod
    def time(cls, log_snr):
        return cls.time_of_B(2 * torch.asinh(torch.exp(-as_time(log_snr) / 2) / 2))


class DDPM(VP):
    """Describe the discrete schedule of DDPM: 1000 steps, step k (from 0) at t = (k + 1) / 1000.

    Between its steps B runs straight and beta is constant, so it is a VP kernel in continuous time.
    Source: Ho et al. 2020, Section 4.
    """

    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)

    @classmethod
    @functools.cache  # once for each device: to copy them there at every call would hold it up
    def table(cls, device):  # B at t = 0, 1/1000, ..., 1: s^2 is the product of the (1 - beta_k)
        B = -torch.log1p(-cls.betas).cumsum(0)
        return torch.cat([torch.zeros_like(B[:1]), B]).to(device)

    @classmethod
    @functools.cache
    def rate(cls, device):  # beta in each of the steps
        return -1000 * torch.log1p(-cls.betas).to(device)

    @classmethod
    def beta(cls, t):
        t = as_time(t)
        step = (t * 1000).long().clamp(0, 999)
        return cls.rate(t.device)[step].to(t.dtype)

    @classmethod
    def B(cls, t):
        t = as_time(t)
        step = (t * 1000).long().clamp(0, 999)
        below = cls.table(t.device)[step]
        return (below + cls.beta(t) * (t.double() - step.double() / 1000)).to(t.dtype)

    @classmethod
    def time_of_B(cls, B):
        table = cls.table(B.device)
        step = torch.searchsorted(table, B.double().contiguous(), right=True).clamp(1, 1000) - 1
        part = (B - table[step]) / (table[step + 1] - table[step])
        return ((step + part) / 1000).to(B.dtype)


class LDM(DDPM):
    """Describe latent diffusion's discrete schedule: as `DDPM`, the square root of beta is linear.

    Source: Rombach et al. 2022; its ends (0.0015, 0.0195) are those of the paper's LDM.
    """

    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2


class VE:
    """Describe the variance-exploding kernel whose time is sigma itself, in [0.01, 50].

    Methods as in `VP`. Source: paper, footnote 4; the range is that of Song et al. 2021.
    """

    t_min, t_max = 0.01, 50.0

    @classmethod
    def s(cls, t):
        return torch.ones_like(as_time(t))

    @classmethod
    def sigma(cls, t):
        return as_time(t)

    @classmethod
    def f(cls, t):
        return torch.zeros_like(as_time(t))

    @classmethod
    def g(cls, t):
        return torch.sqrt(2 * as_time(t))

    @classmethod
    def log_snr(cls, t):
        return -2 * torch.log(as_time(t))

    @classmethod
    def time(cls, log_snr):
        return torch.exp(-as_time(log_snr) / 2)


class EDM(VE):
    """Describe EDM's kernel: `VE` over sigma in [0.002, 80] (Karras et al. 2022, Table 1)."""

    t_min, t_max = 0.002, 80.0


class PFGM(EDM):
    """Describe EDM's kernel with the heavy-tailed noise of PFGM++ in D extra dimensions.

    The noise is Student's t with D degrees of freedom: D = 1 is PFGM, D to infinity is EDM. Make
    another D by `PFGM.with_D(D)`. Source: Xu et al. 2023, Eq. 5 with r = sigma sqrt(D).
    """

    D = 1.0

    @classmethod
    def with_D(cls, D):
        """Return the kernel for another D. Raises BadInput unless D > 0."""
        if not D > 0:
            raise workshop.BadInput(f"PFGM needs D above 0, got {D:g}")
        return type(f"PFGM{D:g}", (cls,), {"D": float(D)})


EVERY_KERNEL = (VP, SubVP, DDPM, LDM, VE, EDM)


def fresh_noise(x, generator=None, kernel=VP):
    """Draw noise like x (B, C, H, W) of unit scale: Gaussian, or a PFGM kernel's.

    generator: one for all, or a list with one for each picture, which makes a picture's noise
    independent of the batch that it is drawn in.
    """
    if isinstance(generator, list):
        one = torch.empty(1, *x.shape[1:], dtype=x.dtype)  # on the CPU, and all cross over at once
        return torch.cat([fresh_noise(one, g, kernel) for g in generator]).to(x.device)
    where = x.device if generator is None else generator.device
    noise = torch.randn(x.shape, generator=generator, device=where, dtype=x.dtype)
    if hasattr(kernel, "D"):  # Student's t: Gaussian over the root of an independent chi^2 / D
        half = torch.full((len(x),), kernel.D / 2, device=where, dtype=torch.float64)
        chi2 = 2 * torch._standard_gamma(half, generator=generator)
        noise = noise * per_image((kernel.D / chi2).sqrt(), x).to(noise)
    return noise.to(x.device)


def start_noise(x, generator, kernel):
    """Draw what sampling starts from: noise like x (B, C, H, W) of the level at t_max."""
    return kernel.s(kernel.t_max) * kernel.sigma(kernel.t_max) * fresh_noise(x, generator, kernel)


# %% [markdown]
# Do the formulas satisfy eq. (2)? Integrate $f$ and $g$ numerically and compare. And is `time` the
# inverse of the log-SNR?


# %%
def integrate(kernel, t, n=100_000):
    """Compute (s_t, sigma_t) of Eq. 2 from f and g alone, by the midpoint rule. t: a float."""
    xi = (torch.arange(n, dtype=torch.float64) + 0.5) * t / n
    log_s = torch.cumsum(kernel.f(xi), 0) * t / n
    s_xi = torch.exp(log_s - kernel.f(xi) * t / n / 2)  # at the midpoints
    return log_s[-1].exp(), torch.sqrt((kernel.g(xi) ** 2 / s_xi**2).sum() * t / n)  # Eq. 2


if __name__ == "__main__":
    for kernel in EVERY_KERNEL:
        t = kernel.t_max / 2
        s, sigma = integrate(kernel, t)
        back = kernel.time(kernel.log_snr(t))
        print(f"{kernel.__name__:5s} t = {t:4g}: s {kernel.s(t):.5f}, integrated {s:.5f};", end=" ")
        print(f"sigma {kernel.sigma(t):8.5f}, integrated {sigma:8.5f}; time(log-SNR) {back:.4g}")
        torch.testing.assert_close(kernel.s(t), s, rtol=1e-6, atol=0)
        torch.testing.assert_close(kernel.sigma(t), sigma, rtol=1e-5, atol=0)
        assert abs(back - t) < 1e-9 * t

# %% [markdown]
# A picture with the same signal-to-noise ratio is equally hard to clean whatever the kernel, up to
# a scaling that is known. So a time of one kernel has its match in every other:


# %%
def match_snr(times, source, target):
    """Move times of one kernel to the times of another that have the same SNR: list of floats.

    times: floats within `source`'s range. Source: paper, footnote 4.
    """
    return [float(target.time(source.log_snr(float(tau)))) for tau in times]


if __name__ == "__main__":
    print("the paper's cuts t1, t2 at the same SNR:")
    for kernel in EVERY_KERNEL:
        print(
            f"{kernel.__name__:5s} "
            + ", ".join(f"{t:.4f}" for t in match_snr([0.442, 0.6308], VP, kernel))
        )

# %% [markdown]
# The authors' release uses 2.5103 and 7.6577 for its EDM network. The first agrees; the second
# belongs to $t$ = 0.636, not to the 0.6308 that the paper states. And its LDM cuts at the steps 442
# and 631 of 1000 as if time were the same there: by SNR, the steps would be those above.

# %% [markdown]
# Forward noising is eq. (1) in one line. Below, three digits on their way to noise.


# %%
def per_image(value, x):
    """Reshape a value a batch entry, (B,) or scalar, so that it multiplies x (B, C, H, W)."""
    value = as_time(value)
    if value.dim() == 0:  # goes with any x as it is, wherever that lies
        return value.to(x.dtype)
    return value.to(x.device).to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))  # (B, 1, 1, 1)


def perturb(x0, eps, t, kernel):
    """Draw x_t from the perturbation kernel: (B, C, H, W) of x0 and noise eps at times t (B,)."""
    t = as_time(t).double()
    return per_image(kernel.s(t), x0) * (x0 + per_image(kernel.sigma(t), x0) * eps)  # Eq. 1


# %%
if __name__ == "__main__":
    generator = torch.Generator(workshop.device()).manual_seed(seed)
    eps = torch.randn(images[:1].shape, generator=generator, device=workshop.device())
    times = torch.linspace(VP.t_min, 1, 12, device=workshop.device())
    shown = sorted({min(i, len(images) - 1) for i in (0, 3, 9)})  # fewer of a small set
    noisy = [perturb(image.expand(12, -1, -1, -1), eps, times, VP) for image in images[shown]]
    title = "VP kernel, t from 0.001 to 1 in equal steps, the same noise in each row"
    workshop.show_images([torch.cat(noisy)], [title], "figures/01_forward.png", columns=12)

# %% [markdown]
# From the third column on ($t\approx0.2$) one has to guess, and from the sixth there is nothing
# left to guess from: the rows are alike. That is the first hint that the timeline is not uniform.
# Its early part cleans a picture that is known, its late part sees only noise.
#
# ## From noise to pictures
#
# If the *score* $\nabla\log p_t$ is known, the forward SDE can be run backwards
#
# $$\mathrm dx = [f(t)\,x - g(t)^2\,\nabla_x\log p_t(x)]\,\mathrm dt + g(t)\,\mathrm d\bar w \tag{3}$$
#
# and the *probability-flow ODE* moves through the same distributions without noise:
# $\mathrm dx = [f(t)\,x - \tfrac12 g(t)^2\,\nabla_x\log p_t(x)]\,\mathrm dt$. A network that
# predicts the noise gives the score, because $\nabla\log p_t(x) = -\epsilon_t(x)/(s_t\sigma_t)$.
# Both solvers below take equal steps in log-SNR, since all of the fine detail is decided in a short
# stretch near $t=0$. Their times are float64 numbers on the CPU, which go with pictures on a GPU as
# plain numbers do; to fetch them from there would make the GPU wait at every step.


# %%
def score(eps, t, kernel):
    """Turn a noise prediction eps (B, C, H, W) at times t (B,) into the score of p_t."""
    return -eps / per_image(kernel.s(t) * kernel.sigma(t), eps)


def log_snr_times(kernel, n):
    """Return n + 1 times from t_max down to t_min, equally spaced in log-SNR, float64."""
    ends = float(kernel.log_snr(kernel.t_max)), float(kernel.log_snr(kernel.t_min))
    return kernel.time(torch.linspace(*ends, n + 1, dtype=torch.float64))


def euler_maruyama(eps, kernel, x, nfe, generator=None):
    """Solve the reverse SDE (paper, Eq. 3) by Euler-Maruyama, yielding x after each of nfe steps.

    eps: function (x, t) -> predicted noise; x: (B, C, H, W) noise at t_max; t is passed as (B,), on
    the CPU.
    """
    times = log_snr_times(kernel, nfe)
    for t, t_next in zip(times, times[1:], strict=False):
        dt = t_next - t  # negative: time runs backwards
        grad = score(eps(x, t.expand(len(x)).to(x.dtype)), t, kernel)
        z = fresh_noise(x, generator)
        drift = kernel.f(t) * x - kernel.g(t) ** 2 * grad
        x = x + dt * drift + kernel.g(t) * (-dt).sqrt() * z  # Eq. 3
        yield x


def probability_flow(eps, kernel, x, nfe, generator=None):
    """Solve the probability-flow ODE by Euler's method, yielding x after each of nfe steps.

    Arguments as `euler_maruyama`; nothing is random. Source: Song et al. 2021, Eq. 13.
    """
    times = log_snr_times(kernel, nfe)
    for t, t_next in zip(times, times[1:], strict=False):
        grad = score(eps(x, t.expand(len(x)).to(x.dtype)), t, kernel)
        drift = kernel.f(t) * x - kernel.g(t) ** 2 / 2 * grad
        x = x + (t_next - t) * drift
        yield x


# %% [markdown]
# ## The best possible denoiser (Proposition 1)
#
# Which function $\epsilon_\theta(x, t)$ minimises the training loss
# $\mathbb E\,\|\epsilon-\epsilon_\theta(x_t,t)\|^2$ (eq. 5) over a finite data set $\{y_i\}$? Take
# paper and pencil; three steps.
#
# **1. The data are points.** A finite data set is a sum of spikes,
# $p_\text{data}=\frac1N\sum_i\delta(x-y_i)$. The kernel (1) blurs each spike to a Gaussian, and
# integrating over $x_0$ is evaluating at the spikes, so $p_t$ is a mixture (eqs. 10–14):
#
# $$p_t(x)=\int p_t(x\mid x_0)\,p_\text{data}(x_0)\,\mathrm dx_0
#   =\frac1N\sum_i\mathcal N(x;\,s_ty_i,\,s_t^2\sigma_t^2I). \tag{14}$$
#
# **2. Given the point, the noise is known.** If $x$ came from $y_i$, then
# $x=s_ty_i+s_t\sigma_t\epsilon$, so it was made with $\epsilon=(x-s_ty_i)/(s_t\sigma_t)$ (eq. 16).
# Write the loss as an integral over $x$ and a sum over the points it can have come from:
#
# $$\mathcal L=\int\underbrace{\frac1N\sum_i\mathcal N(x;s_ty_i,s_t^2\sigma_t^2I)
#   \Big\|\epsilon_\theta(x,t)-\frac{x-s_ty_i}{s_t\sigma_t}\Big\|^2}_{\mathcal L(\epsilon_\theta;\,x,\,t)}
#   \mathrm dx. \tag{17}$$
#
# **3. Every $x$ is its own problem.** No two $x$ share a term, and a function may take any value at
# each. So minimise the integrand at one $x$, with the vector $e=\epsilon_\theta(x,t)$ as the
# unknown (eq. 18): a sum of squares with weights $w_i=\mathcal N(x;s_ty_i,s_t^2\sigma_t^2I)>0$. It
# is strictly convex, so where its gradient vanishes is the one minimum (eqs. 19–21):
#
# $$2\sum_i w_i\Big(e-\frac{x-s_ty_i}{s_t\sigma_t}\Big)=0
#   \;\Rightarrow\; e\sum_i w_i=\frac{x\sum_i w_i-s_t\sum_i w_iy_i}{s_t\sigma_t}.$$
#
# Divide by $\sum_iw_i$:
#
# $$\epsilon^*_t(x)=\frac{x-s_t\,\hat y_t(x)}{s_t\sigma_t},\qquad
#   \hat y_t(x)=\frac{\sum_i \mathcal N(x;\,s_ty_i,\,s_t^2\sigma_t^2I)\;y_i}
#                    {\sum_i \mathcal N(x;\,s_ty_i,\,s_t^2\sigma_t^2I)}. \tag{Prop. 1}$$
#
# Nothing but eq. (1) was used: the result holds for every kernel above.
#
# $\hat y_t$ is the *posterior mean*: the average of all pictures, each weighted by how likely $x$
# came from it. The weights are $\mathrm{softmax}_i(-\|x/s_t-y_i\|^2/2\sigma_t^2)$, which is
# attention with the data set as keys and values, and it is computed as one computes attention:
#
# * **Two matrix products**: $z\cdot y_i$ for the logits, weights times pictures for the mean. They
#   are all of the cost, so they run in float32, at the speed the machine has.
# * **In chunks** of the data set, with running sums that are rescaled whenever a larger logit
#   appears (the *online softmax*): memory does not grow with $N$.
# * **Around a centre**: $\|z-y_i\|^2$ is taken as $\|q\|^2-2\,q\cdot d_i+\|d_i\|^2$ with $q=z-c$,
#   $d_i=y_i-c$ and $c$ the mean picture. Smaller numbers, smaller rounding errors.
# * **The best again in float64**: a product of float32 numbers is off by about
#   $10^{-7}\|q\|\|d\|$, and at $\sigma=10^{-3}$ that is divided by $10^{-6}$. But where errors
#   matter only a few pictures have weight: the eight best are weighed again from exact differences.


# %%
@contextmanager
def exact_products():
    """Multiply float32 matrices as they are: TF32, which a setting may allow, has three digits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@exact_products()
def posterior_mean(x, t, kernel, images, chunk=0, best=8):
    """Average the data set as x sees it at time t: y_hat of Prop. 1.

    x: (B, C, H, W) at times t, (B,) or scalar; images: (N, C, H, W) floats in [0, 1]. chunk: images
    to compare with at a time; 0: 1,000, or up to 16,384 on a GPU, which small products leave idle.
    Returns (B, C, H, W) in x's dtype. If x or images is float64 all of it is, else the two matrix
    products are float32 and the result is good to 1e-5 for any sigma from 1e-3 to 1e3.
    Raises BadInput where shapes do not match or a time has no noise. Source: paper, Prop. 1.
    """
    if x.dim() != 4 or images.dim() != 4 or x.shape[1:] != images.shape[1:] or len(images) < 1:
        raise workshop.BadInput(
            f"x {tuple(x.shape)} and images {tuple(images.shape)} must share C, H, W"
        )
    t = as_time(t).double()
    if not (kernel.sigma(t) > 0).all():
        raise workshop.BadInput(
            "the posterior mean needs noise: every time must give a sigma above 0"
        )
    t = t.to(x.device).expand(len(x))
    s, sigma = kernel.s(t)[:, None], kernel.sigma(t)[:, None]  # (B, 1)
    exact = torch.float64 in (x.dtype, images.dtype) or images.numel() <= 2**22  # small: cheap
    dtype = torch.float64 if exact else torch.float32
    y, z = images.flatten(1), x.flatten(1).double() / s  # (N, n), (B, n)
    at_once = 1000 if x.device.type == "cpu" else min(16_384, 2**26 // y.shape[1] + 1)
    chunk = chunk or at_once  # of 2^26 numbers: a quarter of a GiB
    centre = y[:chunk].mean(0)  # any point is right, one amid the pictures keeps q and d small
    q, variance = (z - centre).to(dtype), (sigma**2).to(dtype)
    top = torch.full_like(variance, -torch.inf)  # the largest logit so far, (B, 1)
    total, mean, radius = torch.zeros_like(top), torch.zeros_like(q), q.new_zeros(())
    leaders = top[:, :0], top[:, :0].long()  # logits and indices of the best so far
    space = q.new_empty(min(chunk, len(y)), q.shape[1])
    for first in range(0, len(y), chunk):
        part = y[first : first + chunk].to(dtype)  # (chunk, n)
        d = torch.sub(part, centre, out=space[: len(part)])  # in place: fresh memory is slow
        length = torch.linalg.vector_norm(d, dim=1)
        logits = (q @ d.T).sub_(length**2 / 2).div_(variance)  # (B, chunk); |q|^2 is common to all
        leaders = leaders if exact else _leaders(leaders, logits, first, best)
        new = torch.maximum(top, logits.amax(1, keepdim=True))
        weight = logits.sub_(new).clamp_(min=-70).exp_()  # below e^-70 floats turn slow, not real
        decay = torch.exp(top - new)
        total.mul_(decay).add_(weight.sum(1, keepdim=True))
        mean.mul_(decay).addmm_(weight, part)
        top, radius = new, torch.maximum(radius, length.max())
    if exact:
        return (mean / total).reshape(x.shape).to(x.dtype)
    return _weigh_again(x, t, kernel, images, mean, total, top, leaders, centre, radius)


def _leaders(leaders, logits, first, best):
    """Keep the `best` largest logits of those so far and of a chunk that starts at `first`."""
    values, where = logits.topk(min(best, logits.shape[1]), dim=1)
    values = torch.cat([leaders[0], values], 1)
    where = torch.cat([leaders[1], where + first], 1)
    values, order = values.topk(min(best, values.shape[1]), dim=1)
    return values, where.gather(1, order)


def _weigh_again(x, t, kernel, images, mean, total, top, leaders, centre, radius):
    """Finish a float32 posterior mean: give its leaders the weights of exact logits."""
    y, z = images.flatten(1), x.flatten(1).double() / kernel.s(t)[:, None]
    variance = kernel.sigma(t)[:, None] ** 2
    length = torch.linalg.vector_norm(z - centre, dim=1, keepdim=True)  # |q|, (B, 1)
    rough, where = leaders[0].double(), leaders[1]  # (B, best)
    # The error of a float32 logit: what rounding does in practice, with a margin of 4.
    error = 2 * torch.finfo(torch.float32).eps * length * radius / variance
    alone = error > 1e-3  # here only the leaders are trusted, elsewhere they are corrected
    behind = rough[:, :1] - rough
    near = behind < 30 + 2 * error  # might have weight
    matters = torch.where(alone, near, error * torch.exp(-behind) > 1e-5)
    logits = torch.where(alone, -torch.inf, rough)
    for row, k in (pairs.T for pairs in matters.nonzero().split(1024)):
        gap = torch.linalg.vector_norm(z[row] - y[where[row, k]], dim=1)  # float64
        logits[row, k] = (length[row, 0] ** 2 - gap**2) / 2 / variance[row, 0]
    change = torch.exp(rough - top) * torch.expm1(logits - rough)
    change = torch.where(alone, torch.softmax(logits, 1), change).to(mean.dtype)
    mean, total = mean.masked_fill(alone, 0), total.masked_fill(alone, 0)
    for row, k in (pairs.T for pairs in change.nonzero().split(1024)):
        mean.index_add_(0, row, change[row, k, None] * y[where[row, k]])
    mean = (mean / (total + change.sum(1, keepdim=True))).reshape(x.shape).to(x.dtype)
    unsure = (alone & near[:, -1:])[:, 0]  # there pictures beyond the leaders might have weight
    if len(y) > where.shape[1] and unsure.any():
        mean[unsure] = posterior_mean(x[unsure].double(), t[unsure], kernel, images).to(x.dtype)
    return mean


def optimal_denoiser(x, t, kernel, images):
    """Predict the noise in x as well as this data set allows: eps* of Prop. 1.

    Shapes and errors as `posterior_mean`. Source: paper, Prop. 1 and Eq. 21.
    """
    t = as_time(t).double()
    s, sigma = per_image(kernel.s(t), x), per_image(kernel.sigma(t), x)
    return (x - s * posterior_mean(x, t, kernel, images)) / (s * sigma)  # Prop. 1


# %% [markdown]
# Is it really the minimum? Two checks on the formula, both from the definition of the loss (eq.
# 17): its gradient at $\epsilon^*$ must vanish, and no change of $\epsilon^*$ may lower it. Being a
# square, the loss must rise by exactly the squared length of the change.


# %%
def empirical_loss(guess, x, t, kernel, images):
    """Evaluate eq. 17 at each x, up to a factor that does not depend on the guess: (B,) float64."""
    s, sigma = float(kernel.s(t)), float(kernel.sigma(t))
    x, y = x.double().flatten(1)[:, None], images.double().flatten(1)[None]  # (B, 1, n), (1, N, n)
    weight = torch.softmax(-((x - s * y) ** 2).sum(2) / (2 * s**2 * sigma**2), 1)  # (B, N)
    error = ((guess.double().flatten(1)[:, None] - (x - s * y) / (s * sigma)) ** 2).sum(2)
    return (weight * error).sum(1)


if __name__ == "__main__":
    few, t = images[:200].double(), 0.2
    x = perturb(few[:8], torch.randn_like(few[:8]), torch.full((len(few[:8]),), t).to(few), VP)
    best = optimal_denoiser(x, t, VP, few).requires_grad_()
    loss = empirical_loss(best, x, t, VP, few)
    (gradient,) = torch.autograd.grad(loss.sum(), best)
    print(f"largest gradient entry at eps*: {gradient.abs().max():.1e}")
    assert gradient.abs().max() < 1e-10
    for size in (1e-3, 1e-1, 10):
        change = size * torch.randn_like(best)
        rise = empirical_loss(best + change, x, t, VP, few) - loss
        expected = (change**2).flatten(1).sum(1)
        print(f"eps* + {size:g} * noise: the loss rises by {rise.min():.2e} or more,", end=" ")
        print(f"the change's square to {(rise / expected - 1).abs().max():.0e}")
        assert (rise > 0).all()

# %% [markdown]
# ## What it sees
#
# One digit with more and more noise, and the optimal denoiser's estimate $\hat y_t$ of the picture.

# %%
if __name__ == "__main__":
    times = torch.tensor([0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.7, 1.0])
    xt = perturb(images[shown[-1]].expand(12, -1, -1, -1), eps, times.to(workshop.device()), VP)
    seen = posterior_mean(xt, times, VP, images)
    titles = [
        "with noise, t = " + ", ".join(f"{t:.2g}" for t in times.tolist()),
        r"what $\hat y_t$ sees",
    ]
    workshop.show_images([xt, seen], titles, "figures/01_posterior_mean.png", columns=12)

# %% [markdown]
# Near the image it returns the very picture; near the noise the mean of all digits, whatever it is
# shown; between them it wavers among candidates. Three regimes: step 02 measures where they begin
# and end.
#
# ## Sampling with it
#
# First a data set that can be drawn: three "pictures" of one pixel each. The grey shade is the
# mixture $p_t$ of eq. (14); the lines are paths through it that start as noise at $t=1$, steered
# by nothing but $\epsilon^*$.


# %%
def collect_paths(solver, eps, kernel, x, nfe, generator=None):
    """Collect a solver's (times, states): (nfe + 1,) and (nfe + 1, B, C, H, W), noise first."""
    states = [x, *solver(eps, kernel, x, nfe, generator)]
    return log_snr_times(kernel, nfe), torch.stack(states)


def draw_paths(points, kernel, runs, path):
    """Plot (title, times, states) of one-pixel pictures over p_t, one panel a run."""
    t, x = torch.linspace(kernel.t_min, kernel.t_max, 300).double(), torch.linspace(-3, 3, 400)
    centre, width = kernel.s(t)[:, None, None] * points, (kernel.s(t) * kernel.sigma(t))[:, None]
    bump = torch.exp(-((x[:, None] - centre) ** 2) / 2 / width[..., None] ** 2)
    density = bump.mean(2) / width  # Eq. 14: (300, 400)
    figure, axes = plt.subplots(1, len(runs), figsize=(10, 3.4), sharey=True)
    for ax, (title, times, states) in zip(axes, runs, strict=True):
        ax.pcolormesh(t, x, density.T.clamp(max=1), cmap="Greys", shading="auto", rasterized=True)
        ax.plot(times, states.flatten(1), lw=0.9)
        ax.set(title=title, xlabel="t", xlim=(1, 0))
    axes[0].set_ylabel("x")
    figure.tight_layout()
    workshop.show_figure(path)


if __name__ == "__main__":
    points = torch.tensor([-1.0, 0.2, 1.0])
    toy = lambda x, t: optimal_denoiser(x, t, VP, points.reshape(3, 1, 1, 1))  # noqa: E731
    quantiles = torch.distributions.Normal(0, 1).icdf((torch.arange(12) + 0.5) / 12)
    noise, dice = quantiles.reshape(12, 1, 1, 1), torch.Generator().manual_seed(seed)
    runs = [
        ("probability-flow ODE", *collect_paths(probability_flow, toy, VP, noise, 300)),
        ("reverse SDE", *collect_paths(euler_maruyama, toy, VP, noise, 300, dice)),
    ]
    draw_paths(points, VP, runs, "figures/01_paths.png")

# %% [markdown]
# The ODE's paths never cross and share the axis out among the points; the SDE's may change their
# mind. Both commit themselves in a stretch, here about $0.1<t<0.3$: before it nothing tells the
# paths of the three points apart, after it each only slides into its point.
#
# Now the same with real pictures.

# %%
if __name__ == "__main__":
    best = lambda x, t: optimal_denoiser(x, t, VP, images)  # noqa: E731
    start = torch.randn(samples, *images.shape[1:], generator=generator, device=workshop.device())
    *_, from_sde = euler_maruyama(best, VP, start, steps, generator)
    times, states = collect_paths(probability_flow, best, VP, start, steps)
    ode = states[-1]
    gap, nearest = torch.cdist(from_sde.flatten(1), images.flatten(1)).min(1)
    titles = ["reverse SDE", "probability-flow ODE, same start", "training picture nearest to SDE"]
    workshop.show_images([from_sde, ode, images[nearest]], titles, "figures/01_samples.png")

# %%
if __name__ == "__main__":
    for name, drawn in (("SDE", from_sde), ("ODE", ode)):
        gap = torch.cdist(drawn.flatten(1), images.flatten(1)).min(1).values
        rms = gap / np.sqrt(images[0].numel())  # per pixel
        print(
            f"{name}: root mean square to the nearest training picture {rms.max():.3f} at", end=" "
        )
        print(f"worst, a pixel; the pixels themselves spread by {images.std():.2f}")
        # with a few steps it is the solver that misses them
        assert rms.max() < 0.05 or steps < 50, "training pictures should come back"

# %% [markdown]
# Every sample is a training picture, up to the noise that $t_\min$ leaves. **This is why networks
# are trained at all**: the minimiser of the loss memorises, and a network is useful because it does
# *not* reach it. Its limited capacity makes it generalise. How much capacity, and where in time, is
# the question of this paper.
#
# ## Where it decides
#
# Follow the estimate $\hat y_t$ along the ODE's paths: how far is it from the picture that the path
# ends in? At the noise end it is the mean of all pictures, whatever the path.

# %%
if __name__ == "__main__":
    some = [i for i, t in enumerate(times) if t < 0.9995][:: max(1, steps // 50)]
    seen = torch.stack([posterior_mean(states[i], times[i], VP, images) for i in some])
    left = (seen - ode).flatten(2).norm(dim=2) / (images.mean(0) - ode).flatten(1).norm(dim=1)
    figure, ax = plt.subplots(figsize=(9, 3))
    ax.plot(times[some], left.cpu(), color="C0", lw=0.6, alpha=0.6)
    ax.plot(times[some], left.mean(1).cpu(), color="black", lw=2, label="average of the paths")
    ax.set(xlabel="t", ylabel="distance to the final picture", xlim=(1, 0))
    ax.set_title("where the estimate turns from the mean (1) into a picture (0)", fontsize=10)
    ax.legend(fontsize=8)
    workshop.show_figure("figures/01_decides.png")

# %%
if __name__ == "__main__":
    at = [int((times - t).abs().argmin()) for t in (0.9, 0.7, 0.6, 0.5, 0.45, 0.4, 0.35, 0.3)]
    at += [int((times - t).abs().argmin()) for t in (0.25, 0.2, 0.1, 0.01)]
    films = [posterior_mean(states[at, k], times[at], VP, images) for k in range(min(3, samples))]
    title = r"$\hat y_t$ on some paths, t = " + ", ".join(f"{t:.2g}" for t in times[at].tolist())
    workshop.show_images([torch.cat(films)], [title], "figures/01_films.png", columns=12)

# %% [markdown]
# (The 0.04 that remain are the noise that $t_\min$ leaves.) One function for the right end (return
# what you see), one for the left (return the mean), and a window between in which the picture is chosen. Step 02 puts numbers on the ends of that window.
#
# **You have** six kernels checked against their SDE, two ways to sample, and the closed-form
# optimum that step 02 uses to cut the timeline.
#
# ### Exercises
#
# 1. Sample with `EDM` in place of `VP`. What must change? <details><summary>Solution</summary>The
#    start: noise at `EDM.t_max` has standard deviation $s\sigma$ = 80, so `start * 80`; then pass
#    `EDM` to the denoiser and to the solver. The samples are training pictures again.</details>
# 2. Keep only 10 images as the data set. At what $t$ does $\hat y_t$ stop returning the very
#    picture, and why later than with 1,797? <details><summary>Solution</summary>With fewer, more
#    distant candidates, more noise is needed to confuse them: the posterior concentrates as long as
#    $\sigma_t^2\log N$ is small against the squared distance between pictures.</details>
# 3. Redo the derivation for a network that predicts $x_0$ in place of $\epsilon$. What is its
#    optimum? <details><summary>Solution</summary>Step 2 becomes $\|x_\theta-y_i\|^2$ with the same
#    weights, so the optimum is $\hat y_t$ itself: the two predictions are one
#    affine map apart.</details>
