"""Chapter 01: the bound is a bound, and its terms are what they say."""

import importlib
import itertools
import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence
from torch.testing import assert_close

from strategies import about, generator, normal, rejected, seeds

vae = importlib.import_module("01_vae")
EPS = torch.finfo(torch.float64).eps
sizes = st.integers(1, 6)


def gaussian(seed, n, d):
    """mu and logvar [n, d]; σ from e^-2 to e^2 or so, so that no rounding error is blown up."""
    return 2 * normal(seed, n, d), normal(seed + 1, n, d)


# --- the terms ---------------------------------------------------------------------------------

def kl_is_that_of_torch(kl, seed, n, d):
    mu, logvar = gaussian(seed, n, d)
    expected = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(dim=1)
    size = (logvar.exp() + mu ** 2 + 1 + logvar.abs()).sum(dim=1).max().item()
    assert_close(kl(mu, logvar), expected, rtol=0, atol=8 * d * EPS * size)


@about("kl_standard_normal")
@given(seeds(), sizes, sizes)
def test_kl_is_that_of_two_normals(seed, n, d):
    kl_is_that_of_torch(vae.kl_standard_normal, seed, n, d)


@pytest.mark.parametrize("twin", [
    lambda mu, logvar: 2 * vae.kl_standard_normal(mu, logvar),
    lambda mu, logvar: vae.kl_standard_normal(mu, 2 * logvar),              # logvar taken for log σ
    lambda mu, logvar: vae.kl_standard_normal(mu, logvar) / mu.shape[1],    # a mean over d
    lambda mu, logvar: vae.kl_standard_normal(mu, logvar) + logvar.sum(1)])  # a flipped sign
def test_wrong_kls_are_rejected(twin):
    assert rejected(kl_is_that_of_torch, twin, 0, 3, 2)


def negative_elbo_is_its_mean(negative_elbo, seed, n, k):
    """KL by torch, and the mean over the k samples by a sum in Python."""
    mu, logvar = gaussian(seed, n, 3)
    log_px = normal(seed + 2, k, n)
    kl = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(dim=1)
    expected = kl - sum(log_px) / k
    size = (logvar.exp() + mu ** 2 + 1 + logvar.abs()).sum(dim=1).max() + log_px.abs().max()
    atol = 8 * (k + 3) * EPS * size.item()
    assert_close(negative_elbo(log_px, mu, logvar), expected, rtol=0, atol=atol)


@about("negative_elbo")
@given(seeds(), sizes, sizes)
def test_negative_elbo_is_kl_minus_the_mean_log_likelihood(seed, n, k):
    negative_elbo_is_its_mean(vae.negative_elbo, seed, n, k)


@about("negative_elbo")
@given(seeds(), sizes, sizes, st.floats(0, 10))
def test_the_weight_of_the_kl_multiplies_the_kl_alone(seed, n, k, weight):
    """Linear in the weight: from the reconstruction alone (0) to -ELBO (1), and on."""
    mu, logvar = gaussian(seed, n, 3)
    log_px = normal(seed, k, n)
    at_0, at_1, at = (vae.negative_elbo(log_px, mu, logvar, w) for w in (0.0, 1.0, weight))
    assert torch.equal(at_0, -log_px.mean(dim=0))
    assert_close(at, at_0 + weight * (at_1 - at_0), rtol=1e-10, atol=1e-10)  # a few roundings


@pytest.mark.parametrize("twin", [
    lambda log_px, mu, logvar: vae.kl_standard_normal(mu, logvar) + log_px.mean(dim=0),
    lambda log_px, mu, logvar: vae.kl_standard_normal(mu, logvar) - log_px.sum(dim=0),
    lambda log_px, mu, logvar: vae.kl_standard_normal(mu, logvar) - log_px.logsumexp(dim=0)])
def test_wrong_elbos_are_rejected(twin):
    assert rejected(negative_elbo_is_its_mean, twin, 0, 3, 2)


@about("kl_standard_normal")
@given(seeds(), sizes)
def test_kl_is_zero_only_at_the_prior(seed, d):
    zero = torch.zeros(1, d, dtype=torch.float64)
    mu, logvar = gaussian(seed, 1, d)
    assert vae.kl_standard_normal(zero, zero).item() == 0
    assert vae.kl_standard_normal(mu, zero).item() > 0 < vae.kl_standard_normal(zero, logvar).item()


@about("vae_loss")
@given(seeds(), sizes, sizes, st.floats(1e-3, 10))
def test_the_loss_of_the_course_is_its_formula(seed, n, d, x_sigma2):
    """Written with matrices, one example at a time: tr Σ + ‖mu‖² - d - log det Σ."""
    mu, logvar = gaussian(seed, n, d)
    x, x_rec = normal(seed + 2, n, 1, 2, 3), normal(seed + 3, n, 1, 2, 3)
    data, kl = 0.0, 0.0
    for i in range(n):
        covariance = torch.diag(logvar[i].exp())
        data += math.dist(x[i].flatten().tolist(), x_rec[i].flatten().tolist()) ** 2 / x_sigma2 / 6
        kl += (covariance.trace() + mu[i] @ mu[i] - d - covariance.logdet()).item()
    loss, data_term, kl_term = vae.vae_loss(x, x_rec, mu, logvar, x_sigma2)
    assert_close(data_term.item(), data / n, rtol=50 * EPS, atol=0)
    size = (logvar.exp() + mu ** 2 + 1 + logvar.abs()).sum().item()
    assert_close(kl_term.item(), kl / n, rtol=0, atol=50 * EPS * size)
    assert_close(loss, data_term + kl_term, rtol=10 * EPS, atol=0)  # both may be rounded sums


@about("vae_loss")
@given(seeds(), sizes, st.floats(0.01, 10))
def test_the_loss_of_the_course_is_minus_two_elbo_up_to_a_constant(seed, n, x_sigma2):
    """-ELBO = loss / 2 + d_x / 2 log(2 π s²) for pixels of variance s² = σ² d_x."""
    mu, logvar = gaussian(seed, n, 2)
    x, x_rec = normal(seed + 2, n, 1, 2, 2), normal(seed + 3, n, 1, 2, 2)
    variance = 4 * x_sigma2
    elbo = Normal(x_rec, variance ** 0.5).log_prob(x).sum(dim=(1, 2, 3)).mean() \
        - vae.kl_standard_normal(mu, logvar).mean()
    loss, data_term, _ = vae.vae_loss(x, x_rec, mu, logvar, x_sigma2)
    constant = 4 / 2 * math.log(2 * math.pi * variance)
    assert_close((loss / 2 + constant).item(), -elbo.item(), rtol=0,
                 atol=100 * EPS * (loss.abs().item() + abs(constant) + data_term.item()))


@about("vae_loss", edge=True)
@pytest.mark.parametrize("b, b_rec, x_sigma2", [(2, 2, 0.0), (2, 2, -1.0), (2, 2, math.nan),
                                                (2, 1, 1.0), (0, 0, 1.0)])
def test_a_loss_without_meaning_is_refused(b, b_rec, x_sigma2):
    with pytest.raises(ValueError):
        vae.vae_loss(torch.zeros(b, 1, 4, 4), torch.zeros(b_rec, 1, 4, 4), torch.zeros(b, 3),
                     torch.zeros(b, 3), x_sigma2)


@about("iwae_bound", edge=True)
@pytest.mark.parametrize("log_px_z, z", [((4,), (4, 2)), ((1, 4), (4, 2)), ((3, 2), (3, 4, 2)),
                                         ((3, 4, 1), (3, 4, 2))])
def test_a_bound_of_sizes_that_do_not_fit_is_refused(log_px_z, z):
    """A lost dimension k would be broadcast: a mean over the batch."""
    with pytest.raises(ValueError):
        vae.iwae_bound(torch.zeros(log_px_z), torch.zeros(z), torch.zeros(4, 2), torch.zeros(4, 2))


@about("negative_elbo", edge=True)
@pytest.mark.parametrize("log_px_z", [(4,), (3, 2), (3, 4, 1)])
def test_an_elbo_of_sizes_that_do_not_fit_is_refused(log_px_z):
    with pytest.raises(ValueError):
        vae.negative_elbo(torch.zeros(log_px_z), torch.zeros(4, 2), torch.zeros(4, 2))


@about("log_bernoulli", "log_gaussian")
@given(seeds(), sizes, sizes)
def test_likelihoods_are_those_of_torch(seed, k, n):
    logits, x = normal(seed, k, n, 1, 2, 3), (normal(seed + 1, n, 1, 2, 3) > 0).double()
    expected = Bernoulli(logits=logits).log_prob(x.expand(k, -1, -1, -1, -1)).sum((-3, -2, -1))
    # x a - softplus(a) cancels where x is likely: the error is that of |a|, up to 6 pixels of 6
    assert_close(vae.log_bernoulli(x, logits), expected, rtol=0, atol=1000 * EPS)
    expected = Normal(logits, 0.7).log_prob(x).sum((-3, -2, -1))
    assert_close(vae.log_gaussian(x, logits, 0.49), expected, rtol=0,
                 atol=100 * EPS * (1 + expected.abs().max().item()))


@about("log_gaussian")
@given(seeds(), st.sampled_from([(), (1,), (4, 1, 1, 1), (1, 2, 1, 1), (4, 1, 2, 3)]))
def test_a_learned_variance_has_the_gradient_that_it_has_in_torch(seed, shape):
    """One for all, for each picture, each colour, each pixel."""
    x, mean = normal(seed, 4, 2, 2, 3), normal(seed + 1, 5, 4, 2, 2, 3)
    variance = normal(seed + 2, math.prod(shape)).exp().view(shape).requires_grad_()
    expected = Normal(mean, variance.sqrt()).log_prob(x).sum((-3, -2, -1))
    got = vae.log_gaussian(x, mean, variance)
    # e^3 and more is rare for the inverse variance: sums of up to 240 terms of a few hundred
    assert_close(got, expected, rtol=1e-11, atol=1e-11)
    derivatives = (torch.autograd.grad(values.sum(), variance)[0] for values in (got, expected))
    assert_close(*derivatives, rtol=1e-9, atol=1e-9)


@about("log_bernoulli")
@given(seeds())
def test_probabilities_of_all_pictures_sum_to_one(seed):
    """All 16 pictures of 2x2 pixels."""
    x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)), dtype=torch.float64)
    p = vae.log_bernoulli(x.view(16, 1, 2, 2), 3 * normal(seed, 1, 1, 2, 2)).exp()
    assert_close(p.sum().item(), 1.0, rtol=0, atol=100 * EPS)


# --- the bound, in a model whose log p(x) is known ---------------------------------------------

def linear_gaussian(seed, d=2, d_x=3, s2=0.5):
    """p(x|z) = N(Wz, s² I), z ~ N(0, I), W's columns orthogonal, so that p(z|x) is diagonal.

    Returns x [1, d_x], log p(x), the posterior's mu and logvar, and z -> log p(x|z).
    """
    W = torch.linalg.qr(normal(seed, d_x, d))[0] * torch.tensor([2.0, 0.7]).double()
    x = 2 * normal(seed + 1, 1, d_x)
    s2_eye = s2 * torch.eye(d_x, dtype=torch.float64)
    log_p = MultivariateNormal(torch.zeros(d_x).double(), W @ W.T + s2_eye).log_prob(x)
    precision = 1 + (W ** 2).sum(dim=0) / s2
    mu = x @ W / s2 / precision
    return x, log_p, mu, -precision.log()[None], lambda z: vae.log_gaussian(
        x.view(1, 1, 1, d_x), (z @ W.T)[..., None, None, :], s2)


def bound_is_exact_at_the_posterior(bound, seed, k):
    """q = p(z|x): every sample has the weight p(x), whatever z and k."""
    x, log_p, mu, logvar, log_px = linear_gaussian(seed)
    z = vae.reparameterise(mu, logvar, normal(seed + 2, k, 1, 2))
    assert_close(bound(log_px(z), z, mu, logvar), log_p, rtol=0,
                 atol=1000 * EPS * (1 + log_p.abs().max().item() + (z ** 2).max().item()))


@about("iwae_bound")
@given(seeds(), st.integers(1, 20))
def test_the_bound_is_exact_at_the_posterior(seed, k):
    bound_is_exact_at_the_posterior(vae.iwae_bound, seed, k)


@pytest.mark.parametrize("twin", [
    lambda log_px, z, mu, logvar: vae.iwae_bound(log_px, z, mu, logvar) + math.log(len(z)),
    lambda log_px, z, mu, logvar: vae.iwae_bound(log_px, z, mu, -logvar),
    lambda log_px, z, mu, logvar: vae.iwae_bound(log_px, z, mu, 2 * logvar),
    lambda log_px, z, mu, logvar: vae.iwae_bound(log_px + (z ** 2).sum(-1), z, mu, logvar)])
def test_wrong_bounds_are_rejected(twin):
    assert rejected(bound_is_exact_at_the_posterior, twin, 0, 3)


@about("iwae_bound")
@given(seeds())
def test_the_bound_is_a_bound_and_rises_with_k(seed):
    """For a q that is wrong: E bound(1) <= E bound(8) <= log p(x), within 6 standard errors."""
    x, log_p, mu, logvar, log_px = linear_gaussian(seed)
    mu, logvar = (mu + 0.3).expand(4000, 2), (logvar + 0.4).expand(4000, 2)
    means, errors = [], []
    for k in (1, 8):
        z = vae.reparameterise(mu, logvar, normal(seed + k, k, 4000, 2))
        bound = vae.iwae_bound(log_px(z), z, mu, logvar)
        means.append(bound.mean().item())
        errors.append(bound.std().item() / 4000 ** 0.5)
    assert means[0] <= means[1] + 6 * math.hypot(*errors)
    assert means[1] <= log_p.item() + 6 * errors[1]


@about("iwae_bound", "kl_standard_normal")
@given(seeds())
def test_elbo_with_the_kl_in_closed_form_is_the_bound_of_one_sample_in_the_mean(seed):
    x, _, mu, logvar, log_px = linear_gaussian(seed)
    mu, logvar = (mu - 0.2).expand(4000, 2), (logvar + 0.1).expand(4000, 2)
    z = vae.reparameterise(mu, logvar, normal(seed + 2, 1, 4000, 2))
    difference = vae.iwae_bound(log_px(z), z, mu, logvar) \
        - (log_px(z)[0] - vae.kl_standard_normal(mu, logvar))
    assert abs(difference.mean().item()) <= 6 * difference.std().item() / 4000 ** 0.5


# --- reparameterisation and the networks -------------------------------------------------------

@about("reparameterise")
@given(seeds())
def test_samples_have_the_mean_and_the_variance_asked_for(seed):
    n = 20_000
    mu, logvar = gaussian(seed, 1, 1)
    z = vae.reparameterise(mu, logvar, normal(seed + 2, n, 1, 1)).flatten()
    std = math.exp(logvar.item() / 2)
    apart, times = (z.mean().item() - mu.item()) / std, z.var().item() / std ** 2
    assert abs(apart) <= 6 / n ** 0.5, f"their mean is {apart:.2f} σ from mu"
    assert abs(times - 1) <= 6 * (2 / n) ** 0.5, f"their variance is {times:.2f} times exp(logvar)"


@about("reparameterise")
@given(seeds(), sizes)
def test_gradients_flow_through_the_sample(seed, d):
    mu, logvar = (a.requires_grad_() for a in gaussian(seed, 2, d))
    u = normal(seed + 2, 2, d)
    assert torch.autograd.gradcheck(lambda m, v: vae.reparameterise(m, v, u), (mu, logvar))


@pytest.mark.parametrize("c, side", [(1, 28), (3, 32), (3, 64)])
def test_encoding_twice_differs_and_decoding_twice_does_not(c, side):
    torch.manual_seed(0)
    net = vae.VAE(c, side, 5).eval()
    x = torch.rand(4, c, side, side)
    mu, logvar = net.encode(x)
    assert mu.shape == logvar.shape == (4, 5)
    z, again = (vae.reparameterise(mu, logvar, torch.randn(2, 4, 5)) for _ in range(2))
    assert not torch.equal(z, again)
    logits = net.decode(z)
    assert logits.shape == (2, 4, c, side, side) and torch.equal(logits, net.decode(z))
    # float32 sums in another order
    assert_close(logits[1], net.decode(z[1]), rtol=1e-4, atol=1e-5)


# --- small numbers, wrong input ----------------------------------------------------------------

@about("kl_standard_normal", edge=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(st.floats(-1e-3, 1e-3))
def test_a_kl_is_never_below_0(dtype, logvar):
    """exp(a) - 1 - a is about a² / 2, which exp(a) - 1 loses in rounding."""
    mu, logvar = torch.zeros(1, 3, dtype=dtype), torch.full((1, 3), logvar, dtype=dtype)
    assert vae.kl_standard_normal(mu, logvar).item() >= 0


@about("iwae_bound", edge=True)
@pytest.mark.parametrize("logvar, fits", [(-10.0, True), (-28.0, False), (-40.0, False)])
def test_the_bound_is_right_or_refused_in_float32(logvar, fits):
    """z = mu + σ u loses u where σ is below the spacing of floats near mu; float64 does not."""
    mu, logvar = torch.ones(1, 200), torch.full((1, 200), logvar)
    u, log_px = torch.randn(3, 1, 200, generator=generator(0)), torch.zeros(3, 1)
    exact = vae.iwae_bound(log_px.double(), vae.reparameterise(
        mu.double(), logvar.double(), u.double()), mu.double(), logvar.double())
    z = vae.reparameterise(mu, logvar, u)
    if fits:
        assert_close(vae.iwae_bound(log_px, z, mu, logvar).double(), exact, rtol=0, atol=0.1)
    else:
        with pytest.raises(ValueError, match="too small"):
            vae.iwae_bound(log_px, z, mu, logvar)


@about("log_bernoulli", edge=True)
@pytest.mark.parametrize("logit, expected", [(15.0, -3.059e-7), (40.0, -4.248e-18)])
def test_a_confident_bernoulli_keeps_its_last_digits(logit, expected):
    """log σ(a) = -log(1 + exp(-a)), about -exp(-a)."""
    found = vae.log_bernoulli(torch.ones(1, 1, 1), torch.full((1, 1, 1), logit)).item()
    assert found == pytest.approx(expected, rel=1e-3)


@about("log_bernoulli", "log_gaussian", "vae_loss", "negative_elbo", "iwae_bound", edge=True)
@pytest.mark.parametrize("call", [
    lambda: vae.log_bernoulli(torch.zeros(5, 784), torch.zeros(2, 5, 784)),   # flat pictures
    lambda: vae.log_bernoulli(-torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)),
    lambda: vae.log_gaussian(torch.zeros(5, 784), torch.zeros(5, 784), 1.0),
    lambda: vae.log_gaussian(*torch.zeros(2, 1, 2, 2, dtype=torch.uint8), 1.0),  # 0 - 1 is 255
    lambda: vae.vae_loss(torch.zeros(4, 9), torch.zeros(4, 9), *torch.zeros(2, 3, 5), 1.0),
    lambda: vae.negative_elbo(torch.zeros(0, 4), *torch.zeros(2, 4, 5)),
    lambda: vae.iwae_bound(torch.zeros(0, 4), torch.zeros(0, 4, 5), *torch.zeros(2, 4, 5)),
    lambda: vae.iwae_bound(torch.zeros(2, 4), torch.zeros(2, 4, 5), *torch.zeros(2, 1, 5))])
def test_input_that_does_not_fit_is_refused(call):
    with pytest.raises(ValueError):
        call()
