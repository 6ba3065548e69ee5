# %% [markdown]
# # 01 · Noise, its reversal, and the best possible denoiser
#
# **You will** turn pictures into noise, turn noise back into pictures with an SDE and an ODE, and
# derive the one function that does this best for a given data set: Proposition 1 of Zhang, Lu et
# al., *Improving Efficiency of Diffusion Models via Multi-Stage Framework and Tailored
# Multi-Decoder Architectures*. It needs no training, and you will see why we train networks all the
# same. These symbols stay the same through all steps:
#
# | in the paper | in the code | meaning |
# |---|---|---|
# | $x_0$, $y_i$ | `x0`, `images` | a picture; the $N$ pictures of the data set |
# | $x_t$ | `xt`, `x` | the picture with noise at time $t$, shape (B, C, H, W) |
# | $\epsilon$ | `eps` | standard Gaussian noise of the same shape |
# | $s_t, \sigma_t$ | `kernel.s(t)`, `kernel.sigma(t)` | scale and noise level of the kernel |
# | $f(t), g(t)$ | `kernel.f(t)`, `kernel.g(t)` | drift and diffusion of its SDE |
# | $\epsilon^*_t(x)$ | `optimal_denoiser` | the best noise prediction for the data set |
# | $t_1, t_2$ | `boundaries` | where the timeline is cut into stages 0, 1, 2 (step 02) |
# | $\epsilon_\theta$ | `model` | the network (step 03) |
# | $\omega(t)$ | `weight` | the weight of the loss (step 04) |

# %% tags=["imports"]
import importlib
import os
from itertools import pairwise

if "__file__" not in globals():  # a notebook, which may have been opened where it lies
    os.chdir(".." if os.path.exists("../00_workshop.py") else ".")
    assert os.path.exists("00_workshop.py"), "papermill needs --cwd PROJECT"
workshop = importlib.import_module("00_workshop")  # before torch

import matplotlib.pyplot as plt
import torch

# %% tags=["parameters"]
dataset = "digits"  # digits, mnist, cifar10, celeba or folder
root = "data"  # where the data set lies or is downloaded to
samples = 16  # pictures drawn with the optimal denoiser [1, 100000]
steps = 200  # solver steps for drawing them [2, 10000]
seed = 0  # seed of every random number [0, 4294967295]

# %% tags=["imports"]
workshop.settings(globals(), "01_sde_and_denoiser")


def as_time(t):
    """Take a tensor as it is and anything else as float64: formulas below then work on both."""
    return t if torch.is_tensor(t) else torch.as_tensor(t, dtype=torch.float64)


# %%
if __name__ == "__main__":
    torch.manual_seed(seed)
    pixels = workshop.load_images(dataset, root)[0]
    images = pixels[:2000].to(workshop.device()).float() / 255  # (N, C, H, W) in [0, 1]
    workshop.show_images([images[:16]], [f"16 of {len(pixels):,} {dataset}"], "figures/01_data.png")

# %% [markdown]
# ## From pictures to noise
#
# These are the pictures $y_i$ of this lesson: at most 2,000 of a data set, because the plain code
# compares every $x$ with every picture. The forward process blends a picture with noise. Its
# *perturbation kernel* is a Gaussian with a scale $s_t$ and a noise level $\sigma_t$:
#
# $$p_t(x_t \mid x_0) = \mathcal N(x_t;\, s_t x_0,\, s_t^2\sigma_t^2 I) \tag{1}$$
#
# Large $t$ means much noise. A kernel is four functions of time: scale and noise level say where
# the process has got to; drift $f$ and diffusion $g$ say how it moves there, as the stochastic
# differential equation (SDE) $\mathrm dx = f(t)\,x\,\mathrm dt + g(t)\,\mathrm dw$. The two pairs
# fit together when
#
# $$s_t = \exp\Big(\int_0^t f(\xi)\,\mathrm d\xi\Big),\qquad
#   \sigma_t = \sqrt{\int_0^t \frac{g(\xi)^2}{s_\xi^2}\,\mathrm d\xi}. \tag{2}$$
#
# The paper cuts the timeline of the kernel **VP**, which its DPM-Solver models use. VP has a rate
# $\beta(t)=\beta_\text{min}+\beta_d\,t$, whose integral is $B(t)$:
#
# $$s_t=e^{-B/2},\qquad \sigma_t=\sqrt{e^{B}-1},\qquad f(t)=-\tfrac12\beta(t),\qquad
#   g(t)=\sqrt{\beta(t)}.$$
#
# As the noise grows the picture shrinks, so that $s_t^2+(s_t\sigma_t)^2=1$: VP is short for
# *variance preserving*. With $\beta_\text{min}=0.1$ and $\beta_d=19.9$, $B$ ends at 10.05: there
# 0.7% of the picture is left, under noise of variance 1. The signal-to-noise ratio
# $\mathrm{SNR}=s_t^2/(s_t\sigma_t)^2$ falls all the way, so its logarithm is another clock; `time`
# turns it into $t$. Do the four satisfy eq. (2)? Integrate $f$ and $g$ numerically, and compare.


# %%
class VariancePreserving:
    """Describe the kernel VP over t in [1e-3, 1]: methods take times of any shape to values."""

    # paper: Section 5 prints s and sigma exchanged, without the t of beta_min t, the -1 inside the
    # exponent; here: forms that satisfy Eq. 2, because the published numbers come from them.
    name, t_min, t_max, beta_min, beta_d = "VP", 1e-3, 1.0, 0.1, 19.9

    def beta(self, t):
        return self.beta_min + self.beta_d * as_time(t)

    def B(self, t):
        return self.beta_d / 2 * as_time(t) ** 2 + self.beta_min * as_time(t)

    def s(self, t):
        return torch.exp(-self.B(t) / 2)

    def sigma(self, t):
        return torch.sqrt(torch.expm1(self.B(t)))  # expm1(B) = e^B - 1

    def f(self, t):
        return -self.beta(t) / 2

    def g(self, t):
        return torch.sqrt(self.beta(t))

    def log_snr(self, t):
        return -2 * torch.log(self.sigma(t))

    def time(self, log_snr):  # B(t) = log(1 + sigma^2), and then the t that has it
        B = torch.nn.functional.softplus(-as_time(log_snr))
        return 2 * B / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * self.beta_d * B))


VP = VariancePreserving()


# %%
def integrate(kernel, t, n=100_000):
    """Compute (s_t, sigma_t) of Eq. 2 from f and g alone, by the midpoint rule. t: a float."""
    xi = (torch.arange(n, dtype=torch.float64) + 0.5) * t / n
    log_s = torch.cumsum(kernel.f(xi), 0) * t / n
    s_xi = torch.exp(log_s - kernel.f(xi) * t / n / 2)  # at the midpoints
    return log_s[-1].exp(), torch.sqrt((kernel.g(xi) ** 2 / s_xi**2).sum() * t / n)  # Eq. 2


# %% tags=["nbval-check-output"]
if __name__ == "__main__":
    s, sigma = integrate(VP, 0.5)
    print(f"VP at t = 0.5: s {VP.s(0.5):.5f}, integrated {s:.5f};", end=" ")
    print(f"sigma {VP.sigma(0.5):.5f}, integrated {sigma:.5f}")

# %% [markdown]
# They do. Eq. (1) itself is one line: add $\sigma_t$ times the noise to the picture, and scale both.
# Here are four pictures on their way to noise, the same noise for all of them.


# %%
def per_image(value, x):
    """Reshape one value per batch entry, (B,) or scalar, so that it multiplies x (B, C, H, W)."""
    value = as_time(value)
    if value.dim() == 0:  # fits any x as it is, on any device
        return value.to(x.dtype)
    return value.to(x.device).to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))  # (B, 1, 1, 1)


def fresh_noise(x, generator=None, kernel=VP):
    """Draw noise like x (B, C, H, W): from one generator, or a list with one for each picture."""
    if isinstance(generator, list) or hasattr(kernel, "D"):
        return draw_special_noise(x, generator, kernel)  # see below the line
    where = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=where, dtype=x.dtype).to(x.device)


def perturb(x0, eps, t, kernel):
    """Draw x_t (B, C, H, W) from the perturbation kernel, with x0, noise eps and times t (B,)."""
    t = as_time(t).double()
    return per_image(kernel.s(t), x0) * (x0 + per_image(kernel.sigma(t), x0) * eps)  # Eq. 1


# %%
if __name__ == "__main__":
    generator = torch.Generator(workshop.device()).manual_seed(seed)
    eps = fresh_noise(images[:1], generator)
    times = torch.tensor([0.001, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 1.0])
    noisy = [perturb(image.expand(12, -1, -1, -1), eps, times, VP) for image in images[:10:3]]
    title = "pictures at time t, all with the same noise"
    marks = [f"t = {t:.3g}" for t in times.tolist()]
    workshop.show_images([torch.cat(noisy)], [title], "figures/01_forward.png", 12, marks)

# %% [markdown]
# From $t\approx0.2$ on one has to guess, and from $t\approx0.5$ on the rows look alike. So the
# timeline is not uniform: early, a known picture has to be cleaned; late, there is only noise.
#
# ## The best possible denoiser (Proposition 1)
#
# Which function $\epsilon_\theta(x, t)$ predicts the noise in $x_t$ best, that is, minimises the
# training loss $\mathbb E\,\|\epsilon-\epsilon_\theta(x_t,t)\|^2$ (eq. 5) over a finite data set
# $\{y_i\}$? Take paper and pencil: three steps lead to the answer.
#
# **1. The data are points.** A finite data set is a sum of spikes,
# $p_\text{data}=\frac1N\sum_i\delta(x-y_i)$. The kernel (1) blurs each spike into a Gaussian, and
# to integrate over $x_0$ is to evaluate at the spikes, so $p_t$ is a mixture (eqs. 10–14):
#
# $$p_t(x)=\int p_t(x\mid x_0)\,p_\text{data}(x_0)\,\mathrm dx_0
#   =\frac1N\sum_i\mathcal N(x;\,s_ty_i,\,s_t^2\sigma_t^2I). \tag{14}$$
#
# **2. Given the point, the noise is known.** If $x$ came from $y_i$, then
# $x=s_ty_i+s_t\sigma_t\epsilon$, so it was made with $\epsilon=(x-s_ty_i)/(s_t\sigma_t)$ (eq. 16).
# Write the loss as an integral over $x$ and a sum over the points that $x$ can have come from:
#
# $$\mathcal L=\int\underbrace{\frac1N\sum_i\mathcal N(x;s_ty_i,s_t^2\sigma_t^2I)
#   \Big\|\epsilon_\theta(x,t)-\frac{x-s_ty_i}{s_t\sigma_t}\Big\|^2}_{\mathcal L(\epsilon_\theta;\,x,\,t)}
#   \mathrm dx. \tag{17}$$
#
# **3. Every $x$ is its own problem.** No two $x$ share a term, and a function may take any value at
# each. So minimise the integrand at one $x$, with the vector $e=\epsilon_\theta(x,t)$ as the
# unknown (eq. 18): a sum of squares with weights $w_i=\mathcal N(x;s_ty_i,s_t^2\sigma_t^2I)>0$. It
# is strictly convex, so its only minimum is where its gradient vanishes (eq. 19). Dividing by
# $\sum_iw_i$ then gives $e$:
#
# $$2\sum_i w_i\Big(e-\frac{x-s_ty_i}{s_t\sigma_t}\Big)=0
#   \;\Rightarrow\; e\sum_i w_i=\frac{x\sum_i w_i-s_t\sum_i w_iy_i}{s_t\sigma_t}. \tag{20}$$
#
# $$\epsilon^*_t(x)=\frac{x-s_t\,\hat y_t(x)}{s_t\sigma_t},\qquad
#   \hat y_t(x)=\frac{\sum_i \mathcal N(x;\,s_ty_i,\,s_t^2\sigma_t^2I)\;y_i}
#                    {\sum_i \mathcal N(x;\,s_ty_i,\,s_t^2\sigma_t^2I)}. \tag{21, Prop. 1}$$
#
# This holds for every kernel. It is eq. (16) again, with $\hat y_t$ in place of the picture: the
# *posterior mean*, the average of all pictures, weighted by the chance that $x$ came from each. The
# weights are $\mathrm{softmax}_i(-\|x/s_t-y_i\|^2/2\sigma_t^2)$, and the code is four lines. Here
# is one of the pictures above, with its $\hat y_t$:


# %%
def infer_noise(x, y, t, kernel):
    """Infer the noise that turns pictures y into x at times t: all (B, C, H, W)."""
    t = as_time(t).double()
    s, sigma = per_image(kernel.s(t), x), per_image(kernel.sigma(t), x)
    return (x - s * y) / (s * sigma)  # Eq. 16


def plain_posterior_mean(x, t, kernel, images):
    """Average the data set, weighted for x (B, C, H, W) at times t: y_hat of Prop. 1."""
    z, y = x.double().flatten(1), images.double().flatten(1)  # (B, n), (N, n)
    square = torch.cdist(z / per_image(kernel.s(t), z), y) ** 2  # |x/s - y_i|^2: (B, N)
    weights = torch.softmax(-square / (2 * per_image(kernel.sigma(t), z) ** 2), 1)
    return (weights @ y).to(x.dtype).reshape(x.shape)  # Prop. 1


def plain_optimal_denoiser(x, t, kernel, images):
    """Predict the noise in x (B, C, H, W) as well as this data set allows: eps* of Prop. 1."""
    return infer_noise(x, plain_posterior_mean(x, t, kernel, images), t, kernel)  # Eq. 21


# %%
if __name__ == "__main__":
    seen = plain_posterior_mean(noisy[-1], times, VP, images)
    titles = ["a picture at time t", r"what $\hat y_t$ sees in it"]
    workshop.show_images([noisy[-1], seen], titles, "figures/01_posterior_mean.png", 12, marks)

# %% [markdown]
# Near the image, $\hat y_t$ is the very picture: $\sigma_t$ is small beside the distances between
# pictures, so one weight is 1 and the others are 0. Near the noise it is the mean of all pictures,
# whatever $x$ is: $\sigma_t$ is large beside all distances, so every weight is $1/N$. In between it
# wavers among candidates. Step 02 measures where these three regimes begin and end.
#
# Is $\epsilon^*$ really the minimum? Ask the loss itself, the integrand of (17) at one $x$, divided
# by $\sum_iw_i$. Its gradient (20) must vanish at $\epsilon^*$. The loss is a sum of squares whose
# weights sum to 1, so its minimum lies half a gradient away from any guess: start at 0, let the
# computer find the gradient, and arrive at $\epsilon^*$.


# %%
def empirical_loss(guess, x, t, kernel, images):
    """Evaluate the loss of a guess at each x (B, C, H, W), t a float: (loss (B,), gradient)."""
    noise = infer_noise(x[:, None], images, t, kernel).flatten(2)  # of every case: (B, N, n)
    weight = torch.softmax(-(noise**2).sum(2) / 2, 1)[..., None]  # w_i / sum of w
    gap = guess.flatten(1)[:, None] - noise
    loss = (weight * gap**2).sum((1, 2))  # Eq. 17
    return loss, 2 * (weight * gap).sum(1).reshape(guess.shape)  # Eq. 20


def minimise_loss(guess, x, t, kernel, images):
    """Find the minimum of `empirical_loss` from any guess, by automatic differentiation alone."""
    guess = guess.clone().requires_grad_()
    total = empirical_loss(guess, x, t, kernel, images)[0].sum()
    (gradient,) = torch.autograd.grad(total, guess)  # Eq. 19
    return (guess - gradient / 2).detach()  # Eq. 18


# %% tags=["nbval-check-output"]
if __name__ == "__main__":
    few = images[:200].double()
    case = (perturb(few[:8], torch.randn_like(few[:8]), 0.2, VP), 0.2, VP, few)  # as above
    best = plain_optimal_denoiser(*case)
    off = (minimise_loss(torch.zeros_like(best), *case) - best).abs().max()
    steepest = empirical_loss(best, *case)[1].abs().max()
    assert max(steepest, off) < 1e-12
    print("the gradient at eps*, and how far the minimum found from 0 is off it: below 1e-12")

# %% [markdown]
# ## From noise to pictures
#
# If the *score* $\nabla\log p_t$ is known, the forward SDE can be run backwards
#
# $$\mathrm dx = [f(t)\,x - g(t)^2\,\nabla_x\log p_t(x)]\,\mathrm dt + g(t)\,\mathrm d\bar w \tag{3}$$
#
# and the *probability-flow ODE* moves through the same distributions without noise:
# $\mathrm dx = [f(t)\,x - \tfrac12 g(t)^2\,\nabla_x\log p_t(x)]\,\mathrm dt$. A noise predictor
# also gives the score. Differentiate (14), one Gaussian at a time, divide by $p_t$, and use (20):
#
# $$\nabla\log p_t(x)=\frac{\nabla p_t(x)}{p_t(x)}
#   =\frac{-\sum_iw_i\,(x-s_ty_i)/(s_t\sigma_t)^2}{\sum_iw_i}=-\frac{\epsilon^*_t(x)}{s_t\sigma_t}.$$
#
# The density grows in the direction opposite to the noise. So the first term of (3) undoes the
# shrinking, the second climbs to where pictures are, and fresh noise restores the spread that the
# climb loses. The ODE climbs half as fast and loses no spread.
#
# Euler's method replaces $\mathrm dt$ by the difference of two times and, for an SDE
# (Euler-Maruyama), $\mathrm d\bar w$ by fresh noise times $\sqrt{|\mathrm dt|}$. The steps are
# equal in log-SNR: if they were equal in $t$, most would be spent where there is nothing but noise,
# and few close to $t=0$, where the fine detail is decided.


# %%
def log_snr_times(kernel, n):
    """Return n + 1 times from t_max to t_min, equally spaced in log-SNR, float64 on the CPU."""
    ends = float(kernel.log_snr(kernel.t_max)), float(kernel.log_snr(kernel.t_min))
    return kernel.time(torch.linspace(*ends, n + 1, dtype=torch.float64))


def score(eps, x, t, kernel):
    """Compute the score of p_t at x (B, C, H, W) from a noise predictor eps; t is on the CPU."""
    noise = eps(x, t.expand(len(x)).to(x.dtype))
    return -noise / per_image(kernel.s(t) * kernel.sigma(t), x)


def euler_maruyama(eps, kernel, x, nfe, generator=None):
    """Solve the reverse SDE from x at t_max in nfe steps, yielding x; eps: (x, t) -> noise."""
    for t, t_next in pairwise(log_snr_times(kernel, nfe)):
        dt = t_next - t  # negative: time runs backwards
        drift = kernel.f(t) * x - kernel.g(t) ** 2 * score(eps, x, t, kernel)
        x = x + dt * drift + kernel.g(t) * (-dt).sqrt() * fresh_noise(x, generator)  # Eq. 3
        yield x


def probability_flow(eps, kernel, x, nfe, generator=None):
    """Solve the probability-flow ODE likewise; nothing is random (Song et al. 2021, Eq. 13)."""
    for t, t_next in pairwise(log_snr_times(kernel, nfe)):
        drift = kernel.f(t) * x - kernel.g(t) ** 2 / 2 * score(eps, x, t, kernel)
        x = x + (t_next - t) * drift
        yield x


# %% [markdown]
# First a data set that fits into a plot: three "pictures" of one pixel each. The grey shade is the
# mixture $p_t$ of eq. (14), at each time darkest where it is highest. The lines are paths through
# it that start as noise at $t=1$, on the right, and are steered by nothing but $\epsilon^*$.


# %%
def mixture_density(x, t, kernel, points):
    """Evaluate p_t of one-pixel pictures, points (N,), at values x: (times, values)."""
    centre, width = kernel.s(t)[:, None] * points, (kernel.s(t) * kernel.sigma(t))[:, None, None]
    bell = torch.distributions.Normal(centre[:, None], width)  # (times, 1, N)
    return bell.log_prob(x[:, None]).exp().mean(2)  # Eq. 14


# %% tags=["draws"]
if __name__ == "__main__":
    points, dice = torch.tensor([-1.0, 0.2, 1.0]), torch.Generator().manual_seed(seed)
    toy = lambda x, t: plain_optimal_denoiser(x, t, VP, points.reshape(3, 1, 1, 1))  # noqa: E731
    noise = torch.distributions.Normal(0, 1).icdf((torch.arange(5) + 0.5) / 5).reshape(5, 1, 1, 1)
    t, values = torch.linspace(VP.t_min, 1, 300).double(), torch.linspace(-3, 3, 400)
    shade = mixture_density(values, t, VP, points).T
    heat = t.numpy(), values.numpy(), (shade / shade.amax(0)).numpy()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
    solvers = {"probability-flow ODE": probability_flow, "reverse SDE": euler_maruyama}
    for ax, title in zip(axes, solvers, strict=True):
        ax.pcolormesh(*heat, cmap="Greys", vmax=2.5, rasterized=True)
        states = torch.stack([noise, *solvers[title](toy, VP, noise, 300, dice)])
        ax.plot(log_snr_times(VP, 300), states.flatten(1), lw=1.2)
        ax.set(title=title, xlabel="t", ylabel="x", xlim=(0, 1))
    workshop.show_figure("figures/01_paths.png")

# %% [markdown]
# Every path ends in one of the points. Paths of the ODE never cross; those of the SDE may change
# their mind. Most decide late, at about $0.05<t<0.2$: to the right of that, the shade has one bump.
#
# **Predict first:** now with real pictures. Does the best possible denoiser draw new ones?
# <details><summary>Answer</summary>No. Every sample is a training picture, up to the noise
# that $t_\min$ leaves: the minimiser of the loss memorises.</details>


# %%
if __name__ == "__main__":
    best = lambda x, t: plain_optimal_denoiser(x, t, VP, images)  # noqa: E731
    start = fresh_noise(images[:1].expand(samples, -1, -1, -1), generator)
    *_, sde = euler_maruyama(best, VP, start, steps, generator)
    states = torch.stack([start, *probability_flow(best, VP, start, steps)])
    times, ode = log_snr_times(VP, steps), states[-1]
    for name, drawn in (("SDE", sde), ("ODE", ode)):
        gap, nearest = torch.cdist(drawn.flatten(1), images.flatten(1)).min(1)
        rms = gap.max() / images[0].numel() ** 0.5  # per pixel
        print(f"{name}: {rms:.3f} or less off a training picture; pixels' std {images.std():.2f}")
        assert rms < 0.05 or steps < 50, "with enough steps training pictures come back"
    titles = ["reverse SDE", "probability-flow ODE, same start", "training picture nearest to it"]
    workshop.show_images([sde, ode, images[nearest]], titles, "figures/01_samples.png")

# %% [markdown]
# **This is why networks are trained at all**: they do not memorise. Limited capacity is one reason,
# and how much capacity, and where in time, is the question of this paper. Short training is another
# (Bonnaire et al. 2025, arXiv 2505.17638), and step 08 has two more. (From the same start the two
# solvers end in different pictures: the SDE forgets its start, the ODE's end is a function of it.)
#
# ## Where it decides
#
# Follow the estimate $\hat y_t$ along the ODE's paths, from right to left: how far is it from the
# picture that the path ends in?

# %%
if __name__ == "__main__":
    seen = [plain_posterior_mean(states[i], t, VP, images) for i, t in enumerate(times)]
    seen = torch.stack(seen)  # (steps + 1, samples, C, H, W)
    left = (seen - ode).flatten(2).norm(dim=2) / (images.mean(0) - ode).flatten(1).norm(dim=1)

# %% tags=["draws"]
if __name__ == "__main__":
    figure, ax = plt.subplots(figsize=(9, 3))
    ax.plot(times, left.cpu(), color="C0", lw=0.6, alpha=0.6)
    ax.plot(times, left.mean(1).cpu(), color="black", lw=2)
    ax.set(xlabel="t", ylabel="distance to the final picture\n(mean of all: 1)", xlim=(0, 1))
    workshop.show_figure("figures/01_decides.png")
    wanted = (0.01, 0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.9)
    at = [int((times - t).abs().argmin()) for t in wanted]
    films, marks = seen[at, :3].transpose(0, 1).flatten(0, 1), [f"t = {times[i]:.2f}" for i in at]
    workshop.show_images([films], [r"$\hat y_t$ on some paths"], "figures/01_films.png", 12, marks)

# %% [markdown]
# Most curves fall between $t=0.5$ and $t=0.1$; on average (black) half of the way is done near
# 0.23. So there is one function for the image end (return what you see), one for the noise end
# (return the mean), and between them a window in which the picture is chosen.
#
# **You have** a kernel checked against its SDE, two ways to sample, and the closed form of the best
# denoiser. Step 02 compares this denoiser at different times, and so finds the ends of that window.
#
# ### Exercises
#
# 1. Sample with the kernel `EDM` (below) in place of `VP`. What must change?
#    <details><summary>Solution</summary>The start: noise at `EDM.t_max` has standard deviation
#    $s\sigma$ = 80, so `start * EDM.t_max`; then pass `EDM` to the denoiser and to the solver. The
#    samples are training pictures again. (From `start` itself all end in one picture.)</details>
# 2. Keep only 10 images as the data set. At which $t$ is $\hat y_t$ nearest to a wrong picture in
#    one case of a hundred, and why does that happen later than with all 1,797?
#    <details><summary>Solution</summary>Near 0.13, not 0.05. Fewer, more distant candidates need
#    more noise to be confused: the posterior concentrates as long as $\sigma_t^2\log N$ is small
#    against the squared distance between pictures.</details>
# 3. Redo the derivation for a network that predicts $x_0$ in place of $\epsilon$. What is its
#    optimum? <details><summary>Solution</summary>Step 2 becomes $\|x_\theta-y_i\|^2$ with the same
#    weights, so its optimum is $\hat y_t$: the predictions are one affine map apart.</details>

# %% [markdown]
# ## Below this line: faster, safer, as published
#
# The other kernels that are in use, with the methods of `VP`; their noise; and the posterior mean
# of large data sets. `DDPM` and `LDM` are VP kernels whose $B$ is a table. **VE** (variance
# exploding) leaves the picture as it is, and its time is $\sigma$ itself. (Likewise in the paper's
# footnote 4, and in EDM. Song et al. 2021 let $\sigma$ grow geometrically with a time in [0, 1].)
# `Flow` is the kernel of flow matching.


# %%
import functools


class DiscreteSteps(VariancePreserving):
    """Describe a schedule of 1000 steps with given betas, step k (from 0) at t = (k + 1) / 1000.

    Between its steps B is linear and beta is constant, so it is a VP kernel in continuous time.
    """

    def __init__(self, name, betas):
        self.name, self.betas = name, betas
        self.tables = functools.cache(self.make_tables)  # a copy at every call would hold a GPU up

    def make_tables(self, device):  # beta in each step, and B at t = 0, 1/1000, ..., 1
        part = -torch.log1p(-self.betas)  # s^2 is the product of the (1 - beta_k)
        return 1000 * part.to(device), torch.nn.functional.pad(part.cumsum(0), (1, 0)).to(device)

    def beta(self, t):
        t = as_time(t)
        return self.tables(t.device)[0][(t * 1000).long().clamp(0, 999)].to(t.dtype)

    def B(self, t):
        t = as_time(t)
        step = (t * 1000).long().clamp(0, 999)
        below = self.tables(t.device)[1][step]
        return (below + self.beta(t) * (t.double() - step.double() / 1000)).to(t.dtype)

    def time(self, log_snr):
        B = torch.nn.functional.softplus(-as_time(log_snr))
        table = self.tables(B.device)[1]
        step = torch.searchsorted(table, B.double().contiguous(), right=True).clamp(1, 1000) - 1
        part = (B - table[step]) / (table[step + 1] - table[step])
        return ((step + part) / 1000).to(B.dtype)


straight = functools.partial(torch.linspace, steps=1000, dtype=torch.float64)
DDPM = DiscreteSteps("DDPM", straight(1e-4, 0.02))  # Ho et al. 2020, Section 4
# Rombach et al. 2022: the square root of beta is straight; the ends are those of the paper's LDM
LDM = DiscreteSteps("LDM", straight(0.0015**0.5, 0.0195**0.5) ** 2)


# %%
class VarianceExploding:
    """Describe a kernel whose time is sigma itself (paper, footnote 4)."""

    def __init__(self, name, t_min, t_max):
        self.name, self.t_min, self.t_max = name, t_min, t_max

    def s(self, t):
        return torch.ones_like(as_time(t))

    def sigma(self, t):
        return as_time(t)

    def f(self, t):
        return torch.zeros_like(as_time(t))

    def g(self, t):
        return torch.sqrt(2 * as_time(t))

    def log_snr(self, t):
        return -2 * torch.log(as_time(t))

    def time(self, log_snr):
        return torch.exp(-as_time(log_snr) / 2)


class PFGM(VarianceExploding):
    """Describe EDM's kernel with the heavy-tailed noise of PFGM++ in D extra dimensions.

    The noise is Student's t with D degrees of freedom: D = 1 is PFGM, D to infinity is EDM. Raises
    BadInput unless D > 0. Source: Xu et al. 2023, Eq. 5 with r = sigma sqrt(D).
    """

    def __init__(self, D):
        if not D > 0:
            raise workshop.BadInput(f"PFGM needs D above 0, got {D:g}")
        super().__init__(f"PFGM{D:g}", EDM.t_min, EDM.t_max)
        self.D = float(D)


VE = VarianceExploding("VE", 0.01, 50.0)  # the range is that of Song et al. 2021
EDM = VarianceExploding("EDM", 0.002, 80.0)  # Karras et al. 2022, Table 1


# %%
class StraightLine:
    """Describe the straight line from picture to noise, x_t = (1 - t) x_0 + t eps, as a kernel.

    Its ends, t = 0 and 1, are left out, because log-SNR is infinite there.
    Source: Liu et al. 2023 (rectified flow), Eq. 1, with time from the picture to the noise.
    """

    name, t_min, t_max = "Flow", 1e-3, 1 - 1e-3

    def s(self, t):
        return 1 - as_time(t)

    def sigma(self, t):
        return as_time(t) / (1 - as_time(t))

    def f(self, t):
        return -1 / (1 - as_time(t))

    def g(self, t):
        return torch.sqrt(2 * as_time(t) / (1 - as_time(t)))

    def log_snr(self, t):
        return -2 * torch.logit(as_time(t))

    def time(self, log_snr):
        return torch.sigmoid(-as_time(log_snr) / 2)


Flow = StraightLine()
EVERY_KERNEL = (VP, DDPM, LDM, VE, EDM, Flow)

# %% [markdown]
# A picture with the same signal-to-noise ratio is equally hard to clean whatever the kernel, up to
# a scaling that is known. So a time of one kernel has its match in every other:


# %% tags=["nbval-check-output"]
def match_snr(times, source, target):
    """Move times of one kernel to the times of another that have the same SNR: list of floats.

    times: floats within `source`'s range. Source: paper, footnote 4.
    """
    return [float(target.time(source.log_snr(float(tau)))) for tau in times]  # footnote 4


if __name__ == "__main__":
    for kernel in EVERY_KERNEL:
        cuts = match_snr([0.442, 0.6308], VP, kernel)
        print(f"{kernel.name:5s} the paper's cuts at the same SNR: {cuts[0]:.4f}, {cuts[1]:.4f}")

# %% [markdown]
# The authors' release uses 2.5103 and 7.6577 for its EDM network. The first agrees; the second
# belongs to $t$ = 0.636, not to the 0.6308 that the paper states. And the release cuts LDM at the
# steps 442 and 631 of 1000, as if LDM had VP's times: by SNR, the steps would be those above.


# %%
def draw_special_noise(x, generator, kernel):
    """Draw noise as `fresh_noise` does, from a list of generators or for a PFGM kernel.

    A generator for each picture makes its noise independent of the batch that it is drawn in.
    """
    if isinstance(generator, list):
        one = torch.empty(1, *x.shape[1:], dtype=x.dtype)  # on the CPU, and all cross over at once
        return torch.cat([fresh_noise(one, g, kernel) for g in generator]).to(x.device)
    where = x.device if generator is None else generator.device
    noise = fresh_noise(x.to(where), generator)
    # Student's t is a Gaussian over the root of an independent chi^2 / D
    half = torch.full((len(x),), kernel.D / 2, device=where, dtype=torch.float64)
    chi2 = 2 * torch._standard_gamma(half, generator=generator)
    return (noise * per_image((kernel.D / chi2).sqrt(), x).to(noise)).to(x.device)


def start_noise(x, generator, kernel):
    """Draw what sampling starts from: noise like x (B, C, H, W) of the level at t_max."""
    return kernel.s(kernel.t_max) * kernel.sigma(kernel.t_max) * fresh_noise(x, generator, kernel)


# %% [markdown]
# ## The posterior mean of 50,000 pictures
#
# The weights are a softmax of distances: attention with the data set as keys and values. It is
# computed as attention is, **in chunks** of the data set, with running sums that are rescaled
# whenever a larger logit appears (the *online softmax*): memory does not grow with $N$. Two matrix
# products are nearly all of the cost, and run in float32. Two things keep that exact enough:
#
# * **A centre**: $\|z-y_i\|^2$ is taken as $\|q\|^2-2\,q\cdot d_i+\|d_i\|^2$ with $q=z-c$,
#   $d_i=y_i-c$ and $c$ the mean picture. Smaller numbers, smaller rounding errors.
# * **The nearest in float64**: the error of a product, about $10^{-7}\|q\|\|d_i\|$, is divided by
#   $\sigma^2$. But where $\sigma$ is so small that this matters, only a few pictures have weight.
#   So there the product only finds the eight nearest; their weights come from exact differences.


# %%
torch.set_float32_matmul_precision("highest")  # the environment may allow TF32: three digits


def posterior_mean(x, t, kernel, images, chunk=0):
    """Average the data set as x sees it at time t: y_hat of Prop. 1.

    x: (B, C, H, W) at times t, (B,) or scalar; images: (N, C, H, W) floats. chunk: images to
    compare with at a time; 0: 1,000, or up to 16,384 on a GPU, which small products leave idle.
    Returns (B, C, H, W) in x's dtype. Computes in float64 if x or images is, or if the set is
    small; else products are float32, and the result is good to 1e-5 for any sigma from 1e-3 to 1e3.
    Raises BadInput where shapes do not match or a time has no noise. Source: paper, Prop. 1.
    """
    if x.dim() != 4 or images.dim() != 4 or x.shape[1:] != images.shape[1:] or len(images) < 1:
        shapes = f"x {tuple(x.shape)} and images {tuple(images.shape)}"
        raise workshop.BadInput(f"{shapes} must share C, H, W")
    t = as_time(t).double().to(x.device).expand(len(x))
    s, sigma = kernel.s(t)[:, None], kernel.sigma(t)[:, None]  # (B, 1)
    if not (sigma > 0).all():
        raise workshop.BadInput("the posterior mean needs noise: a sigma above 0 at every time")
    y, z = images.flatten(1), x.flatten(1).double() / s  # (N, n), (B, n)
    # of 2^26 numbers: a quarter of a GiB
    chunk = chunk or (1000 if x.device.type == "cpu" else min(16_384, 2**26 // y.shape[1] + 1))
    if torch.float64 in (x.dtype, images.dtype) or y.numel() <= 2**22:  # small: cheap
        return average_all(z, sigma, y, chunk, torch.float64).reshape(x.shape).to(x.dtype)
    mean = torch.empty_like(z, dtype=x.dtype)
    # Rounding moves a logit by some eps |q| |d| / sigma^2, and so a pixel of the mean by
    # eps std sqrt(n) std / sigma: with this margin less than 1e-5 for pixels in [0, 1].
    near = sigma[:, 0] < 0.04 * y[:chunk].std() * y.shape[1] ** 0.5
    for some, average in ((near, average_nearest), (~near, average_all)):
        rows = some.nonzero()[:, 0]  # indices, because each use of a mask waits for a GPU
        if len(rows):
            mean[rows] = average(z[rows], sigma[rows], y, chunk, torch.float32).to(x.dtype)
    return mean.reshape(x.shape)


def average_all(z, sigma, y, chunk, dtype):
    """Average pictures y (N, n), weighted for z (B, n), by an online softmax in dtype: (B, n)."""
    centre = y[:chunk].mean(0)  # any point would do; one amid the pictures keeps q and d small
    q, variance = (z - centre).to(dtype), (sigma**2).to(dtype)
    top = torch.full_like(variance, -torch.inf)  # the largest logit so far, (B, 1)
    total, mean = torch.zeros_like(top), torch.zeros_like(q)
    space = q.new_empty(min(chunk, len(y)), q.shape[1])
    for part in y.split(chunk):
        part = part.to(dtype)  # (chunk, n)
        d = torch.sub(part, centre, out=space[: len(part)])  # in place: fresh memory is slow
        length = torch.linalg.vector_norm(d, dim=1)
        logits = (q @ d.T).sub_(length**2 / 2).div_(variance)  # (B, chunk); |q|^2 is common to all
        new = torch.maximum(top, logits.amax(1, keepdim=True))
        weight = logits.sub_(new).clamp_(min=-70).exp_()  # smaller weights are slow, and negligible
        decay = torch.exp(top - new)
        total.mul_(decay).add_(weight.sum(1, keepdim=True))
        mean.mul_(decay).addmm_(weight, part)
        top = new
    return mean / total


def average_nearest(z, sigma, y, chunk, dtype, best=8):
    """Average likewise where few pictures have weight: the nearest, from exact differences."""
    likely, which = [], []
    for first, part in zip(range(0, len(y), chunk), y.split(chunk), strict=True):
        length = torch.linalg.vector_norm(part, dim=1)
        logits, where = (z.to(dtype) @ part.T).sub_(length**2 / 2).topk(min(best, len(part)))
        likely, which = [*likely, logits], [*which, where + first]
    order = torch.cat(likely, 1).topk(min(best, len(y))).indices
    which = torch.cat(which, 1).gather(1, order)  # (B, best)
    mean, behind = [], []
    for rows in torch.arange(len(z), device=z.device).split(2**18 // y.shape[1] + 1):
        picked = y[which[rows]].double()  # (some, best, n)
        logits = -(z[rows, None] - picked).square().sum(2) / (2 * sigma[rows] ** 2)
        mean.append((torch.softmax(logits, 1)[..., None] * picked).sum(1))
        behind.append(logits.amax(1) - logits[:, -1])
    mean, unsure = torch.cat(mean), (torch.cat(behind) < 25).nonzero()[:, 0]
    if len(unsure):  # there pictures beyond the nearest may have weight
        mean[unsure] = average_all(z[unsure], sigma[unsure], y, chunk, torch.float64)
    return mean


def optimal_denoiser(x, t, kernel, images):
    """Predict the noise in x as well as this data set allows: eps* of Prop. 1.

    Shapes and errors as `posterior_mean`. Source: paper, Prop. 1 and Eq. 21.
    """
    return infer_noise(x, posterior_mean(x, t, kernel, images), t, kernel)  # Prop. 1


# %% [markdown]
# Does it agree with the four lines above? Compare them on our pictures, which are few enough for
# float64, and on so many random ones that float32 does the work.

# %% tags=["nbval-check-output"]
if __name__ == "__main__":
    t, dice = torch.linspace(VP.t_min, 1, 12).double(), torch.Generator().manual_seed(seed)
    others = torch.rand(1500, 3, 32, 32, generator=dice).to(images.device)
    for name, pictures in (("of the lesson", images), ("at random", others)):
        noise = fresh_noise(pictures[:1].expand(12, -1, -1, -1), dice)
        x = perturb(pictures[:1], noise, t, VP)
        plain = plain_posterior_mean(x.double(), t, VP, pictures)
        off = (posterior_mean(x, t, VP, pictures, chunk=400) - plain).abs().max()
        assert off < 1e-5
        print(f"{len(pictures):,} pictures {name}: off the plain form by less than 1e-5")
