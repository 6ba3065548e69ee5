"""Step 06: the autoencoder and its codes."""

import pytest
import torch


@pytest.fixture(scope="module")
def trained(sde, training, ldm):
    torch.manual_seed(0)
    x0 = training.network_space(sde.load_images("digits")[0])
    autoencoder = ldm.Autoencoder(width=16)
    log = [mse.item() for _, mse, _ in ldm.train_autoencoder(autoencoder, x0, 250)]
    return autoencoder, x0, log


def test_training_rebuilds_pictures(trained):
    _, x0, log = trained
    assert len(log) == 250
    assert log[-1] < 0.3 * x0.var()  # far better than the mean picture


def test_codes_are_half_the_pixels_and_have_unit_variance(ldm, trained):
    autoencoder, x0, _ = trained
    scale = 1 / ldm.encode(autoencoder, x0).std().item()
    codes = ldm.encode(autoencoder, x0, scale)
    assert codes.shape == (1797, 2, 4, 4)
    assert codes.std().item() == pytest.approx(1, abs=1e-3)
    rebuilt = ldm.decode(autoencoder, codes, scale)
    assert rebuilt.shape == x0.shape and rebuilt.min() >= 0 and rebuilt.max() <= 1
    error = ((rebuilt * 2 - 1 - x0) ** 2).mean()
    assert error < 0.3 * x0.var()


def test_the_pull_is_the_kl_of_gaussians(sde, training, ldm, trained):
    """The KL that training reports, against torch's own."""
    x0 = trained[1]
    torch.manual_seed(0)
    model = ldm.Autoencoder(width=16)
    generator = torch.Generator().manual_seed(5)
    x = x0[torch.randint(len(x0), (128,), generator=generator)]
    with torch.no_grad():
        mean, log_var = model.encode(x)
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(
        normal(mean, (log_var / 2).exp()), normal(torch.zeros_like(mean), 1.0)
    ).mean()
    _, _, kl = next(ldm.train_autoencoder(model, x0, 1, seed=5))
    assert kl.item() == pytest.approx(exact.item(), rel=1e-4)


def test_the_latent_network_trains_on_codes_as_they_are(unet, training):
    """Float data are not rescaled: only uint8 pictures are."""
    codes = torch.randn(32, 2, 4, 4)
    assert torch.equal(training.network_space(codes), codes)
    model = unet.build("digits_latent", encoder=8, decoders=(8, 8, 8), attention=())
    state = training.new_state(model, 1e-3, seed=0)
    steps = [step for step, _ in training.train(state, codes, 3, batch=4)]
    assert steps == [1, 2, 3]
