"""Chapter 07: spectral norm against the SVD, scores against closed forms, a kill loses nothing."""

import importlib
import math
import re
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from torchvision.models import inception_v3

import common
from harness import (all_white, folder_of_pictures, killed_after, one_line, rejected, results,
                     same)
from strategies import generator, normal, seeds

gan = importlib.import_module("07_sn_wgan_gp")
EPS = torch.finfo(torch.float64).eps
sizes = st.integers(1, 8)


# --- the losses, against sums over Python numbers ----------------------------------------------

def losses_are_their_formulas(bce_d, nonsaturating_g, wgan_d, wgan_g, seed, n):
    """softplus(a) = log (1 + e^a) of numbers of a few σ = 3: sums of n terms, each positive."""
    real, fake = 3 * normal(seed, n), 3 * normal(seed + 1, n)
    r, f = real.tolist(), fake.tolist()
    size = 1 + max(map(abs, r + f))
    for got, expected in [
            (bce_d(real, fake), sum(math.log1p(math.exp(-a)) for a in r) / n
             + sum(math.log1p(math.exp(a)) for a in f) / n),
            (nonsaturating_g(fake), sum(math.log1p(math.exp(-a)) for a in f) / n),
            (wgan_d(real, fake), sum(f) / n - sum(r) / n),
            (wgan_g(fake), -sum(f) / n)]:
        assert_close(got.item(), expected, rtol=0, atol=8 * (n + 1) * EPS * size)


@given(seeds(), sizes)
def test_losses_are_their_formulas(seed, n):
    losses_are_their_formulas(gan.bce_d, gan.nonsaturating_g, gan.wgan_d, gan.wgan_g, seed, n)


def test_losses_of_a_d_that_is_sure_are_finite_and_exact():
    """log σ(-1000) is -1000; by way of σ, which is 0 there, it would be -inf."""
    sure = torch.tensor([1000.0])
    assert gan.nonsaturating_g(-sure).item() == 1000 and gan.nonsaturating_g(sure).item() == 0
    assert gan.bce_d(-sure, sure).item() == 2000 and gan.bce_d(sure, -sure).item() == 0


@pytest.mark.parametrize("wrong", range(4))
@pytest.mark.parametrize("twin", [
    lambda loss: lambda *a: -loss(*a), lambda loss: lambda *a: 2 * loss(*a),
    lambda loss: lambda *a: loss(*(x.sigmoid() for x in a))])
def test_wrong_losses_are_rejected(twin, wrong):
    four = [gan.bce_d, gan.nonsaturating_g, gan.wgan_d, gan.wgan_g]
    four[wrong] = twin(four[wrong])
    assert rejected(losses_are_their_formulas, *four, 0, 5)


# --- spectral norm -----------------------------------------------------------------------------

def unit(seed, n):
    return nn.functional.normalize(normal(seed, n), dim=0)


def sigma_is_never_above_the_largest_singular_value(spectral_norm, seed, out, rest, n_iter):
    """‖Wᵀu‖ <= σ_1 for every unit u: up to the rounding of sums of `out` and `rest` products."""
    weight = normal(seed, out, rest)
    largest = torch.linalg.svdvals(weight)[0]
    sigma, u = spectral_norm(weight, unit(seed + 1, out), n_iter)
    assert sigma <= largest * (1 + 8 * (out + rest) * EPS)
    assert_close(u.norm().item(), 1.0, rtol=8 * out * EPS, atol=0)


@given(seeds(), sizes, sizes, st.integers(0, 3))
def test_sigma_is_never_above_the_largest_singular_value(seed, out, rest, n_iter):
    sigma_is_never_above_the_largest_singular_value(gan.spectral_norm, seed, out, rest, n_iter)


def sigma_converges_to_the_largest_singular_value(spectral_norm, seed, shape):
    """Singular values 2, 1, ...: each round divides tan of u's angle by 4, 40 rounds by 1e24."""
    weight = normal(seed, *shape)
    left, _, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    values = torch.ones(len(left[0]), dtype=torch.float64)
    values[0] = 2
    weight = (left * values @ right).view(shape)
    sigma, _ = spectral_norm(weight, unit(seed + 1, shape[0]), 40)
    assert_close(sigma.item(), 2.0, rtol=8 * weight.numel() * EPS, atol=0)


shapes = st.one_of(st.tuples(sizes, sizes), st.tuples(sizes, sizes, st.integers(1, 3),
                                                       st.integers(1, 3)))


@given(seeds(), shapes)
def test_sigma_converges_to_the_largest_singular_value(seed, shape):
    sigma_converges_to_the_largest_singular_value(gan.spectral_norm, seed, shape)


@pytest.mark.parametrize("twin", [
    lambda weight, u, n_iter: (weight.norm(), u),                                 # Frobenius
    lambda weight, u, n_iter: (gan.spectral_norm(weight, u, n_iter)[0] ** 2, u),  # of W Wᵀ
    lambda weight, u, n_iter: gan.spectral_norm(weight.transpose(0, 1), u, n_iter),
    lambda weight, u, n_iter: gan.spectral_norm(weight, u, 0)])
def test_wrong_sigmas_are_rejected(twin):
    assert rejected(sigma_converges_to_the_largest_singular_value, twin, 0, (4, 4, 2, 2))


@given(seeds(), sizes, sizes)
def test_every_round_brings_sigma_nearer(seed, out, rest):
    """uᵀ W Wᵀ u never falls under power iteration (Rayleigh quotients of a positive matrix)."""
    weight, u, last = normal(seed, out, rest), unit(seed + 1, out), 0.0
    for _ in range(6):
        sigma, u = gan.spectral_norm(weight, u)
        assert sigma >= last * (1 - 8 * (out + rest) * EPS)
        last = sigma


@given(seeds(), st.integers(2, 6), st.integers(2, 6))
def test_sigma_is_that_of_torch_from_the_same_start(seed, out, rest):
    """torch keeps v too; from v = Wᵀu / ‖Wᵀu‖ it makes the same steps in the same order."""
    layer = nn.Linear(rest, out, bias=False, dtype=torch.float64)
    layer.weight.data = normal(seed, out, rest)
    weight, u = layer.weight.detach().clone(), unit(seed + 1, out)
    parametrizations.spectral_norm(layer, n_power_iterations=1)
    theirs = layer.parametrizations.weight[0]
    theirs._u.copy_(u)
    theirs._v.copy_(nn.functional.normalize(weight.T @ u, dim=0))
    sigma, _ = gan.spectral_norm(weight, u)
    assert_close(layer.weight, weight / sigma, rtol=64 * (out + rest) * EPS, atol=0)


@given(seeds())
@settings(max_examples=10)
def test_the_gradient_of_sigma_is_that_of_the_largest_singular_value(seed):
    """At convergence dσ/dW = u vᵀ; torch's derivative of the SVD is the oracle."""
    weight = normal(seed, 3, 4).requires_grad_()
    values = torch.linalg.svdvals(weight)
    expected, = torch.autograd.grad(values[0], weight)
    sigma, _ = gan.spectral_norm(weight, unit(seed + 1, 3), 2000)
    got, = torch.autograd.grad(sigma, weight)
    gap = ((values[0] - values[1]) / values[0]).item()  # u's error grows where two are close
    assert_close(got, expected, rtol=0, atol=1e3 * EPS / gap + (1 - gap) ** 4000)


# --- spectral norm in the networks -------------------------------------------------------------

def normalised(layer, steps=60):
    """The layer with SpectralNorm after so many calls: its weight as a user's D has it."""
    gan.parametrize.register_parametrization(layer, "weight", gan.SpectralNorm(layer.weight))
    for _ in range(steps):
        layer.weight
    return layer.eval()


def slope(layer, x, other):
    """‖f(x) - f(x')‖ / ‖x - x'‖ of each pair, the largest."""
    with torch.no_grad():
        change = (layer(x) - layer(other)).flatten(1).norm(dim=1)
    return (change / (x - other).flatten(1).norm(dim=1)).max().item()


def two_one(*shape, seed=0):
    """A weight with singular values 2, 1, 1, ...: power iteration is exact after 60 rounds."""
    left, _, right = torch.linalg.svd(normal(seed, *shape).flatten(1), full_matrices=False)
    values = torch.ones(len(left[0]), dtype=torch.float64)
    values[0] = 2
    return (left * values @ right).view(shape)


@given(seeds())
def test_a_normalised_linear_layer_is_1_lipschitz(seed):
    layer = nn.Linear(6, 5, dtype=torch.float64)
    layer.weight.data = two_one(5, 6, seed=seed)
    layer = normalised(layer)
    assert slope(layer, normal(seed, 20, 6), normal(seed + 1, 20, 6)) <= 1 + 100 * EPS
    top = torch.linalg.svd(layer.weight)[2][:1].detach()  # and 1 is reached, along v
    assert_close(slope(layer, top, -top), 1.0, rtol=100 * EPS, atol=0)


@given(seeds())
def test_a_normalised_convolution_is_1_lipschitz_where_patches_do_not_overlap(seed):
    layer = nn.Conv2d(2, 5, kernel_size=2, stride=2, dtype=torch.float64)
    layer.weight.data = two_one(5, 2, 2, 2, seed=seed)
    layer = normalised(layer)
    assert slope(layer, normal(seed, 20, 2, 4, 4), normal(seed + 1, 20, 2, 4, 4)) <= 1 + 100 * EPS


def test_overlapping_patches_double_the_slope_at_most():
    """D's convolutions, 4x4 with stride 2: a pixel is in 4 patches, √4; equal weights reach it."""
    layer = nn.Conv2d(1, 1, kernel_size=4, stride=2, padding=1, dtype=torch.float64)
    layer.weight.data = torch.ones_like(layer.weight)
    layer = normalised(layer)
    even, zero = torch.ones(1, 1, 64, 64, dtype=torch.float64), torch.zeros(1, 1, 64, 64).double()
    assert 1.9 < slope(layer, even, zero) <= 2 + 100 * EPS  # less at the border
    x, other = normal(0, 200, 1, 12, 12), normal(1, 200, 1, 12, 12)
    assert slope(layer, x, other) <= 2 + 100 * EPS


def test_all_layers_of_d_are_normalised_and_only_with_sn():
    torch.manual_seed(0)
    for sn in (True, False):
        D = gan.discriminator(1, 28, sn)
        for _ in range(300):
            D(torch.zeros(1, 1, 28, 28))
        sigmas = [torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2).item()
                  for layer in D if isinstance(layer, (nn.Conv2d, nn.Linear))]
        assert len(sigmas) == 3
        # power iteration of random weights comes to within 1 % in 300 rounds, from above
        assert all(1 - 1e-5 < sigma < 1.01 for sigma in sigmas) == sn


def test_power_iteration_needs_some_passes():
    """What discriminator's docstring says of the largest singular value of a layer."""
    for seed in range(20):
        torch.manual_seed(seed)
        D = gan.discriminator(1, 28, sn=True)

        def largest():
            weights = (layer.weight.flatten(1).double() for layer in D.eval()
                       if isinstance(layer, (nn.Conv2d, nn.Linear)))
            return max(torch.linalg.eigvalsh(w @ w.T).max().sqrt().item() for w in weights)

        assert 1.05 < largest() < 1.6
        for _ in range(20):
            D.train()(torch.zeros(1, 1, 28, 28))
        assert 1 - 1e-5 < largest() < 1.05


def test_evaluation_does_not_move_u_and_training_does():
    torch.manual_seed(0)
    D = gan.discriminator(1, 28, sn=True)
    x = torch.randn(2, 1, 28, 28)
    u = [buffer.clone() for buffer in D.buffers()][:-1]  # the last layer has one row: u is 1
    D.eval()
    assert torch.equal(D(x), D(x))
    assert all(torch.equal(a, b) for a, b in zip(u, D.buffers()))
    D.train()(x)
    assert not any(torch.equal(a, b) for a, b in zip(u, D.buffers()))


def test_a_pass_without_autograd_does_not_spoil_d():
    """A u that was made in inference mode could not be saved for a backward pass."""
    D = gan.discriminator(1, 28, sn=True)
    with torch.inference_mode():
        D(torch.zeros(1, 1, 28, 28))
    for training in (False, True):
        D.train(training)(torch.randn(2, 1, 28, 28)).sum().backward()
    assert all(p.grad.isfinite().all() for p in D.parameters())


def test_of_a_transposed_convolution_another_matrix_is_normalised_than_by_torch():
    """What SpectralNorm's docstring says: [in, rest], and by torch [out, rest]."""
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(3, 2, kernel_size=2, dtype=torch.float64)
    ours, theirs = (normal(1, 3, 2, 2, 2) for _ in range(2))
    layer.weight.data = ours
    other = nn.ConvTranspose2d(3, 2, kernel_size=2, dtype=torch.float64)
    other.weight.data = theirs
    other = parametrizations.spectral_norm(other, n_power_iterations=500)
    for net, turned in ((normalised(layer, 500), False), (other, True)):
        weight = net.weight.transpose(0, 1) if turned else net.weight
        # 500 rounds: what is left of a second singular value of 0.97 of the first is 1e-13
        assert_close(torch.linalg.matrix_norm(weight.flatten(1), ord=2).item(), 1.0, rtol=1e-9,
                     atol=0)


def test_two_passes_before_one_backward():
    """u is replaced, not changed in place, so the first pass can still be differentiated."""
    D = gan.discriminator(1, 28, sn=True)
    x = torch.randn(2, 1, 28, 28)
    (D(x) - D(-x)).sum().backward()
    assert all(p.grad.isfinite().all() for p in D.parameters())


@pytest.mark.parametrize("sn", [False, True])
def test_a_score_depends_on_its_own_picture_alone(sn):
    torch.manual_seed(0)
    D = gan.discriminator(1, 28, sn).double().train(not sn)  # in training, u moves with each pass
    x = normal(0, 3, 1, 28, 28)
    other = torch.cat([x[:1], normal(1, 2, 1, 28, 28)])
    assert_close(D(x)[0], D(other)[0], rtol=1e4 * EPS, atol=1e4 * EPS)  # sums of 3,136 terms


# --- gradient penalty --------------------------------------------------------------------------

def penalty_of_a_linear_critic_is_its_closed_form(penalty, seed, n):
    """critic(x) = w.x has the gradient w everywhere: (‖w‖ - 1)²."""
    w = normal(seed, 2, 3, 3)
    got = penalty(lambda x: (x * w).flatten(1).sum(dim=1), normal(seed + 1, n, 2, 3, 3),
                  normal(seed + 2, n, 2, 3, 3))
    assert_close(got.item(), (w.norm().item() - 1) ** 2, rtol=0,
                 atol=1e3 * EPS * (1 + w.norm() ** 2))


@given(seeds(), sizes)
def test_penalty_of_a_linear_critic_is_its_closed_form(seed, n):
    penalty_of_a_linear_critic_is_its_closed_form(gan.gradient_penalty, seed, n)


def norm_over_channels(critic, x, x_fake):
    x = x.requires_grad_()
    grad, = torch.autograd.grad(critic(x).sum(), x)
    return ((grad.norm(2, dim=1) - 1) ** 2).mean()


@pytest.mark.parametrize("twin", [
    norm_over_channels,
    lambda critic, x, x_fake: gan.gradient_penalty(lambda x: critic(x).sigmoid(), x, x_fake),
    lambda critic, x, x_fake: gan.gradient_norms(critic, x).mean() ** 2])
def test_wrong_penalties_are_rejected(twin):
    assert rejected(penalty_of_a_linear_critic_is_its_closed_form, twin, 0, 3)


def points_lie_between(penalty, seed, n):
    """What the critic sees is α x + (1 - α) x', with one α in [0, 1) for each example."""
    x, x_fake, seen = normal(seed, n, 1, 4, 4), normal(seed + 1, n, 1, 4, 4), []
    penalty(lambda x: seen.append(x.detach()) or (x ** 2).flatten(1).sum(dim=1), x, x_fake)
    alpha = ((seen[0] - x_fake) / (x - x_fake)).flatten(1)
    # the division loses as much as the two pictures are close to each other in a pixel
    loss = 100 * EPS / (x - x_fake).abs().min().item()
    assert (alpha - alpha[:, :1]).abs().max() <= loss
    assert -loss <= alpha.min() and alpha.max() <= 1 + loss
    assert n == 1 or alpha[:, 0].unique().numel() == n


@given(seeds(), sizes)
def test_points_lie_between(seed, n):
    points_lie_between(gan.gradient_penalty, seed, n)


def between_by(draw):
    return lambda critic, x, x_fake: critic(x_fake + draw(x) * (x - x_fake))


@pytest.mark.parametrize("twin", [
    between_by(torch.rand_like),                                                  # per pixel
    between_by(lambda x: 2 + torch.randn(len(x), 1, 1, 1, dtype=x.dtype)),        # normal
    between_by(lambda x: torch.rand(1, dtype=x.dtype))])                          # one for all
def test_points_elsewhere_are_rejected(twin):
    torch.manual_seed(0)
    assert rejected(points_lie_between, twin, 0, 4)


def test_a_penalty_of_pictures_that_differ_in_shape_is_refused():
    """They would broadcast: a fake for all reals, grey fakes for pictures in colour."""
    x = torch.zeros(4, 3, 2, 2)
    for x_fake in (x[:1], x[:, :1], x[:0]):
        with pytest.raises(ValueError, match=rf"\(4, 3, 2, 2\).*\({len(x_fake)}, "):
            gan.gradient_penalty(lambda x: x.flatten(1).sum(dim=1), x, x_fake)


@given(seeds())
def test_the_penalty_of_two_is_the_mean_of_two_penalties_of_one(seed):
    x, x_fake = normal(seed, 2, 1, 4, 4), normal(seed + 1, 2, 1, 4, 4)

    def critic(x):
        return (x ** 3).flatten(1).sum(dim=1)

    rng = generator(seed)
    apart = [gan.gradient_penalty(critic, x[i:i + 1], x_fake[i:i + 1], rng) for i in range(2)]
    both = gan.gradient_penalty(critic, x, x_fake, generator(seed))
    assert_close(both, sum(apart) / 2, rtol=64 * EPS, atol=0)


def test_a_critic_without_slope_has_penalty_1_and_finite_derivatives():
    w = torch.zeros(16, dtype=torch.float64, requires_grad=True)
    got = gan.gradient_penalty(lambda x: x.flatten(1) @ w, normal(0, 3, 1, 4, 4),
                               normal(1, 3, 1, 4, 4))
    assert got.requires_grad, "the penalty has no gradient: was it made with create_graph=True?"
    got.backward()
    assert got.item() == 1.0 and w.grad.isfinite().all()


# --- inception score ---------------------------------------------------------------------------

def probabilities(seed, n, k):
    return (2 * normal(seed, n, k)).softmax(dim=1)


def inception_score_is_the_naive_one(inception_score, seed, n, k):
    rows = probabilities(seed, n, k).tolist()
    p_y = [sum(row[j] for row in rows) / n for j in range(k)]
    kl = sum(p * math.log(p / q) for row in rows for p, q in zip(row, p_y)) / n
    got = inception_score(probabilities(seed, n, k))[0]
    assert_close(got, math.exp(kl), rtol=1e3 * EPS, atol=0)


@given(seeds(), sizes, st.integers(2, 6))
def test_inception_score_is_the_naive_one(seed, n, k):
    inception_score_is_the_naive_one(gan.inception_score, seed, n, k)


def reversed_score(probs):
    p_y = probs.mean(dim=0)
    return ((p_y * (p_y / probs).log()).sum(dim=1).mean().exp().item(),)


@pytest.mark.parametrize("twin", [
    reversed_score, lambda probs: gan.inception_score(probs.softmax(dim=1)),  # normalised twice
    lambda probs: (math.log(gan.inception_score(probs)[0]),),
    lambda probs: (math.exp((probs * probs.log()).sum(dim=1).mean()),)])      # p(y) forgotten
def test_wrong_inception_scores_are_rejected(twin):
    assert rejected(inception_score_is_the_naive_one, twin, 0, 5, 4)


@given(seeds(), sizes, st.integers(1, 6))
def test_inception_score_lies_between_1_and_k(seed, n, k):
    got = gan.inception_score(probabilities(seed, n, k))[0]
    assert 1 - 1e3 * EPS <= got <= k * (1 + 1e3 * EPS)


@given(st.integers(1, 8), st.integers(1, 5))
def test_inception_score_reaches_both_ends(k, n):
    assert_close(gan.inception_score(torch.full((n, k), 1 / k))[0], 1.0, rtol=1e-6, atol=0)
    sure = torch.eye(k).repeat(n, 1)
    assert_close(gan.inception_score(sure)[0], float(k), rtol=64 * EPS, atol=0)


@given(seeds(), st.integers(1, 4))
def test_splits_give_mean_and_deviation_over_the_parts(seed, splits):
    probs = probabilities(seed, 4 * splits, 3)
    parts = [gan.inception_score(part)[0] for part in probs.split(4)]
    got = gan.inception_score(probs, splits)
    assert_close(got, (float(np.mean(parts)), float(np.std(parts))), rtol=1e3 * EPS, atol=1e3 * EPS)


@given(seeds(), st.integers(1, 50), st.integers(1, 1000),
       st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_inception_score_takes_the_probabilities_of_coarse_types(seed, n, k, dtype):
    """Each is wrong by a rounding, and the score by as much of its logarithm and of itself."""
    probs = (2 * normal(seed, n, k)).to(dtype).softmax(dim=1)
    rows = probs.double() / probs.double().sum(dim=1, keepdim=True)
    assert_close(gan.inception_score(probs)[0], gan.inception_score(rows)[0],
                 rtol=8 * torch.finfo(dtype).eps * (1 + math.log(k)), atol=0)


@given(seeds(), st.integers(2, 1000),
       st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]))
def test_inception_score_refuses_logits_of_every_type(seed, k, dtype):
    logits = 2 * normal(seed, 5, k)
    for wrong in (logits, logits.relu() + 0.1, logits.sigmoid(), 1.2 * logits.softmax(dim=1)):
        assume((wrong.sum(dim=1) - 1).abs().max() > 0.1)
        with pytest.raises(ValueError, match="no probabilities"):
            gan.inception_score(wrong.to(dtype))


def test_inception_score_takes_whole_numbers():
    assert gan.inception_score(torch.eye(4, dtype=torch.int64))[0] == pytest.approx(4)


def test_inception_score_refuses_what_are_no_probabilities():
    for wrong in (torch.randn(5, 3), torch.full((5, 3), 0.5), torch.tensor([[2.0, -1.0]]),
                  torch.tensor([[math.nan, 1.0]])):
        with pytest.raises(ValueError, match="no probabilities"):
            gan.inception_score(wrong)
    for splits in (0, 2):
        with pytest.raises(ValueError, match="splits"):
            gan.inception_score(torch.ones(1, 1), splits)


# --- Frechet distance --------------------------------------------------------------------------

def with_moments(seed, n, mean, root):
    """n rows whose sample mean and unbiased covariance are exactly `mean` and rootᵀ root."""
    d = len(mean)
    x = normal(seed, n, d)
    x = x - x.mean(dim=0)
    white = torch.linalg.qr(x)[0] * (n - 1) ** 0.5
    return white @ root + mean


def frechet_distance_of_gaussians_is_the_closed_form(frechet_distance, seed, d, n):
    """Covariances with common axes: ‖m - m'‖² + Σ (s_i - s'_i)²."""
    m, other = normal(seed, d), normal(seed + 1, d)
    s, s_other = normal(seed + 2, d).exp(), normal(seed + 3, d).exp()
    axes = torch.linalg.qr(normal(seed + 4, d, d))[0]
    expected = ((m - other) ** 2).sum() + ((s - s_other) ** 2).sum()
    got = frechet_distance(with_moments(seed + 5, n, m, (axes * s).T),
                           with_moments(seed + 6, n + 3, other, (axes * s_other).T))
    scale = 1 + (s ** 2).sum() + (s_other ** 2).sum() + (m ** 2).sum() + (other ** 2).sum()
    # the root of a rounding error: √EPS where an eigenvalue is near 0
    assert_close(got, expected.item(), rtol=0, atol=1e-9 * scale.item())


@given(seeds(), st.integers(1, 5), st.integers(8, 20))
def test_frechet_distance_of_gaussians_is_the_closed_form(seed, d, n):
    frechet_distance_of_gaussians_is_the_closed_form(gan.frechet_distance, seed, d, n)


def frechet_by(cov, factor=2.0, power=2):
    def distance(a, b):
        c, c_other = cov(a), cov(b)
        cross = torch.linalg.eigvals(c @ c_other).real.clamp(min=0).sqrt().sum()
        return ((a.mean(0) - b.mean(0)).norm() ** power + c.trace() + c_other.trace()
                - factor * cross).item()
    return distance


@pytest.mark.parametrize("twin", [
    frechet_by(lambda x: torch.cov(x.T, correction=0)), frechet_by(lambda x: torch.cov(x.T), 1.0),
    frechet_by(lambda x: torch.cov(x.T), power=1), lambda a, b: gan.frechet_distance(a, b) ** 0.5])
def test_wrong_frechet_distances_are_rejected(twin):
    assert rejected(frechet_distance_of_gaussians_is_the_closed_form, twin, 0, 3, 9)


@given(seeds(), st.integers(1, 5))
def test_frechet_distance_of_any_covariances_by_another_road(seed, d):
    """tr (C C')^½ is the sum of the roots of C C's eigenvalues; the covariances by numpy."""
    a, b = normal(seed, 3 * d, d) @ normal(seed + 1, d, d), normal(seed + 2, 4 * d, d)
    c, c_other = (np.atleast_2d(np.cov(x.numpy(), rowvar=False)) for x in (a, b))
    cross = np.sqrt(np.linalg.eigvals(c @ c_other).real.clip(min=0)).sum()
    expected = ((a.numpy().mean(0) - b.numpy().mean(0)) ** 2).sum() \
        + np.trace(c + c_other) - 2 * cross
    scale = 1 + np.trace(c + c_other)
    assert_close(gan.frechet_distance(a, b), float(expected), rtol=0, atol=1e-6 * float(scale))


@given(seeds(), st.integers(1, 5))
def test_frechet_distance_is_symmetric_zero_for_equal_and_blind_to_a_common_motion(seed, d):
    a, b = normal(seed, 4 * d, d), 2 * normal(seed + 1, 4 * d, d) + 1
    turn, shift = torch.linalg.qr(normal(seed + 2, d, d))[0], normal(seed + 3, d)
    there = gan.frechet_distance(a, b)
    tight = dict(rtol=0, atol=1e-6 * (1 + there))
    assert_close(gan.frechet_distance(b, a), there, **tight)
    assert_close(gan.frechet_distance(a @ turn + shift, b @ turn + shift), there, **tight)
    assert_close(gan.frechet_distance(a, a), 0.0, rtol=0, atol=1e-6 * d)


@given(seeds())
def test_frechet_distance_reckons_in_float64(seed):
    """Features come in float32, and differences of large means would be lost there."""
    a, b = (normal(seed + i, 9, 3).float() + 100 for i in range(2))
    assert gan.frechet_distance(a, b) == gan.frechet_distance(a.double(), b.double())


def test_frechet_distance_refuses_too_few_rows_and_other_features():
    for a, b in ((torch.zeros(4, 4), torch.zeros(5, 4)), (torch.zeros(5, 4), torch.zeros(4, 4)),
                 (torch.zeros(9, 4), torch.zeros(9, 3))):
        with pytest.raises(ValueError, match=r"d \+ 1 rows"):
            gan.frechet_distance(a, b)


def test_frechet_distance_refuses_what_is_not_finite():
    for value in (math.nan, math.inf):
        bad = torch.randn(9, 4, generator=generator(0))
        bad[3, 2] = value
        for a, b in ((bad, bad.nan_to_num(0, 0)), (bad.nan_to_num(0, 0), bad)):
            with pytest.raises(ValueError, match="not finite"):
                gan.frechet_distance(a, b)


@given(seeds(), st.sampled_from([2, 8, 32, 128]), st.sampled_from([1, 2, 8]))
def test_frechet_distance_of_features_of_low_rank_is_hardly_below_0(seed, d, rank):
    """d features that are sums of a few: most eigenvalues are 0, their roots up to √EPS of one."""
    a = normal(seed, 3 * d, rank) @ normal(seed + 1, rank, d)
    traces = 2 * torch.cov(a.T).trace().item()
    assert abs(gan.frechet_distance(a, a.flip(0))) <= 1e-8 * d * traces


# --- truncation, trend -------------------------------------------------------------------------

def truncated_draws_have_their_variance(truncated_normal, seed, limit):
    """1 - 2 a φ(a) / (2 Φ(a) - 1); 40,000 draws, tolerance 6 standard errors of a mean square."""
    z = truncated_normal(400, 100, limit, generator(seed)).double()
    phi = math.exp(-limit ** 2 / 2) / math.sqrt(2 * math.pi)
    variance = 1 - 2 * limit * phi / math.erf(limit / math.sqrt(2))
    assert z.abs().max() <= limit
    assert abs((z ** 2).mean() - variance) <= 6 * (z ** 2).std() / 200


@settings(max_examples=10)
@given(seeds(), st.sampled_from([0.25, 1.0, 2.0]))
def test_truncated_draws_have_their_variance(seed, limit):
    truncated_draws_have_their_variance(gan.truncated_normal, seed, limit)


@pytest.mark.parametrize("twin", [
    lambda n, d, limit, rng: torch.randn(n, d, generator=rng).clamp(-limit, limit),
    lambda n, d, limit, rng: limit * (2 * torch.rand(n, d, generator=rng) - 1)])
def test_clamped_and_uniform_draws_are_rejected(twin):
    assert rejected(truncated_draws_have_their_variance, twin, 0, 1.0)


@given(seeds(), st.sampled_from([1e-30, 1e-8, 1e-5, 1e-3]))
def test_draws_within_a_small_limit_are_uniform(seed, limit):
    """The density hardly falls there: mean square limit² / 3; 6 standard errors of 40,000."""
    ratio = gan.truncated_normal(400, 100, limit, generator(seed)).double() / limit
    assert ratio.abs().max() <= 1 + torch.finfo(torch.float32).eps
    assert abs((ratio ** 2).mean() - 1 / 3) <= 6 * math.sqrt(4 / 45) / 200
    assert abs(ratio.mean()) <= 6 * math.sqrt(1 / 3) / 200


@pytest.mark.parametrize("limit", [40.0, 1e30, 1e300])
def test_a_limit_that_is_never_met_leaves_a_normal(limit):
    """Mean square 1, whose square has mean 3: 6 standard errors of 40,000. 1e300 is no float32."""
    z = gan.truncated_normal(400, 100, limit, generator(0)).double()
    assert abs((z ** 2).mean() - 1) <= 6 * 2 ** 0.5 / 200 and z.abs().max() < 7


@given(seeds(), st.floats(0.01, 20))
def test_no_draw_passes_its_limit(seed, limit):
    z = gan.truncated_normal(20, 50, limit, generator(seed))
    assert z.dtype == torch.float32 and z.abs().max() <= torch.tensor(limit)


def test_the_extreme_of_the_uniform_numbers_gives_the_limit(monkeypatch):
    """u = -1 can be drawn, and erfinv(-1) is -∞ where erf of the limit has rounded to 1."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.zeros(shape, dtype=torch.float64))
    for limit in (1.0, 10.0):
        assert gan.truncated_normal(1, 1, limit).item() == -limit


def test_a_limit_that_no_draw_can_keep_is_refused():
    for limit in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="no draw"):
            gan.truncated_normal(2, 2, limit)


def test_no_limit_is_the_plain_normal():
    assert torch.equal(gan.truncated_normal(3, 4, math.inf, generator(0)),
                       torch.randn(3, 4, generator=generator(0)))


def test_the_trend_follows_slowly_and_keeps_a_constant():
    assert gan.trend([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert gan.trend([0.0, 1.0, 1.0]) == pytest.approx([0.0, 1 - gan.TREND, 1 - gan.TREND ** 2])


# --- Inception v3 ------------------------------------------------------------------------------

def test_inception_sees_what_torchvision_makes_of_the_picture():
    """torchvision's own way: ImageNet's mean and deviation off, then its transform_input."""
    torch.manual_seed(0)
    reference = inception_v3(init_weights=False, transform_input=True).eval()
    ours = gan.Inception(reference.state_dict()).eval()
    x = torch.rand(1, 3, 299, 299)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        features, logits = ours(2 * x - 1)
        expected = reference((x - mean) / std)
    assert features.shape == (1, 2048)
    # float32 through 48 layers: 1e-3 of the largest logit; without the scale it is off by half
    assert_close(logits, expected, rtol=0, atol=1e-3 * expected.abs().max().item())
    assert ours(torch.zeros(1, 3, 16, 16))[0].shape == (1, 2048)


# --- whole runs --------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def small_runs(request, monkeypatch, no_figures):
    """A few hundred pictures instead of thousands; all are still scored at every step."""
    whole, parse_args = common.load_digits, gan.parse_args

    def part(args, train):
        images = whole(args, train)
        return images._replace(x=images.x[:400], y=images.y[:400])

    def fewer(argv):
        args = parse_args(argv)
        args.n_samples, args.n_score = min(args.n_samples, 140), 80  # the half of 140 are above 64
        args.classifier_steps = 20
        return args
    monkeypatch.setattr(common, "load_digits", part)
    monkeypatch.setattr(gan, "parse_args", fewer)
    if not request.node.get_closest_marker("draws"):
        monkeypatch.setattr(gan, "draw_scores", lambda *_: None)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """One classifier, trained once for all tests."""
    return tmp_path_factory.mktemp("kept") / "digit_classifier.pt"


def run(out, digits_dir, kept, *flags):
    """4 steps, and the classifier of the test before if there is one."""
    out.mkdir(exist_ok=True)
    mine = out / kept.name
    if kept.exists():
        mine.write_bytes(kept.read_bytes())
    gan.main(["--data", "digits", "--data-dir", str(digits_dir), "--steps", "4", "--batch", "8",
              "--out", str(out), *flags])
    if mine.exists():
        kept.write_bytes(mine.read_bytes())
    return results(out) if (out / "log.csv").exists() else None


RUNS = {}  # by model, for all tests


@pytest.fixture
def straight(tmp_path, digits_dir, kept):
    """straight(name): what a run of one model alone leaves; each is made once."""
    def results_of(name):
        if name not in RUNS:
            RUNS[name] = run(tmp_path / "straight", digits_dir, kept, "--models", name)
        return RUNS[name]
    return results_of


def test_all_models_killed_in_the_middle_resume_to_the_same_bits(tmp_path, digits_dir, kept):
    """Power iteration's u, too, goes on where it was."""
    flags = [digits_dir, kept, "--models", *gan.MODELS]
    straight = run(tmp_path / "straight", *flags)
    assert len(straight) == len(gan.MODELS) + 1
    for death in (2, 5, 4, 3):
        with killed_after(death):
            run(tmp_path / "killed", *flags, "--resume")
    assert same(run(tmp_path / "killed", *flags, "--resume"), straight)


def classifier_of(out):
    return torch.load(out / "digit_classifier.pt")["net"]


def test_a_kill_around_the_classifier_resumes_to_the_same_bits(tmp_path, digits_dir, monkeypatch):
    """Within its training, between its file and the next checkpoint, and within the next training.

    20 steps of the classifier make 10 checkpoints, the model's 4 steps as many.
    """
    flags, none = ["--models", "vanilla", "--resume"], tmp_path / "none"
    straight = run(tmp_path / "straight", digits_dir, none, *flags)
    killed = tmp_path / "killed"
    with killed_after(4):
        run(killed, digits_dir, none, *flags)
    assert not (killed / "digit_classifier.pt").exists()
    assert torch.load(killed / "checkpoint.pt")["step"] == 8
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(gan, "train", mock.Mock(side_effect=RuntimeError("killed")))
        run(killed, digits_dir, none, *flags)
    assert (killed / "digit_classifier.pt").exists()
    assert torch.load(killed / "checkpoint.pt")["name"] == "classifier"
    with monkeypatch.context() as patch:
        patch.setattr(gan.F, "cross_entropy", lambda *_: pytest.fail("trained again"))
        with killed_after(2):
            run(killed, digits_dir, none, *flags)
        assert torch.load(killed / "checkpoint.pt")["name"] == "vanilla"
        assert same(run(killed, digits_dir, none, *flags), straight)
    assert same(classifier_of(killed), classifier_of(tmp_path / "straight"))


def test_a_checkpoint_holds_64_pictures_of_a_run_and_not_the_rest(tmp_path, digits_dir, kept):
    """torch.save writes all that a view looks at."""
    run(tmp_path, digits_dir, kept, "--models", "vanilla", "wgan")
    kept_pictures = torch.load(tmp_path / "checkpoint.pt")["done"]["vanilla"]["pictures"]
    assert kept_pictures.untyped_storage().nbytes() == 64 * 28 * 28


def test_steps_of_both_players_are_counted(tmp_path, digits_dir, kept, monkeypatch):
    """4 steps of each are with n_critic 3 two rounds of 3 D steps and one of G."""
    run(tmp_path, digits_dir, kept, "--models", "wgan-gp", "--n-critic", "3")  # keeps a classifier
    steps, original = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda opt, *a: (
        steps.append(sum(p.numel() for g in opt.param_groups for p in g["params"])),
        original(opt, *a))[1])
    run(tmp_path, digits_dir, kept, "--models", "wgan-gp", "--n-critic", "3")
    of_g, of_d = (sum(p.numel() for p in net.parameters())
                  for net in (gan.generator(64, 1, 28), gan.discriminator(1, 28, sn=False)))
    assert steps == 2 * ([of_d] * 3 + [of_g])


@pytest.mark.usefixtures("no_checkpoints")
@pytest.mark.parametrize("name", gan.MODELS)
def test_g_learns_what_the_data_look_like(tmp_path, digits_dir, kept, monkeypatch, name):
    """All data white: with the right signs G's pictures, grey at the start, become lighter.

    Trained the wrong way round they would become darker.
    """
    all_white(monkeypatch)
    run(tmp_path, digits_dir, tmp_path / "none", "--models", name, "--steps", "30")
    assert torch.load(tmp_path / f"samples_{name}.pt").float().mean() > 160


@pytest.mark.usefixtures("no_checkpoints")
def test_the_kept_weights_draw_the_samples(tmp_path, digits_dir, kept):
    samples = run(tmp_path, digits_dir, kept, "--models", "sn")["samples_sn.pt"]
    torch.manual_seed(0)
    z = torch.randn(len(samples), 64)
    G = gan.generator(64, 1, 28)
    G.load_state_dict(torch.load(tmp_path / "weights_sn.pt"))
    assert torch.equal(common.to_uint8(gan.generate(G, z)), samples)


def checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)["parts"]


def test_wgan_keeps_its_weights_in_the_box_and_no_other(tmp_path, digits_dir, kept):
    for name in ("wgan", "wgan-sn"):
        run(tmp_path / name, digits_dir, kept, "--models", name)
        largest = max(p.abs().max().item() for p in checkpoint(tmp_path / name)["D"].values())
        assert (largest <= gan.CLIP) == (name == "wgan")


def test_clipping_holds_the_slope_below_its_documented_bound():
    """Π limit √(weights), times 1.1 (1.0998), SiLU's largest slope, for each hidden layer: 240."""
    D = gan.discriminator(1, 28, sn=False)
    for p in D.parameters():
        nn.init.ones_(p)
    gan.clip(D, gan.CLIP)
    weights = [layer.weight for layer in D if isinstance(layer, nn.Linear)]
    bound = math.prod(gan.CLIP * w.numel() ** 0.5 for w in weights) * 1.0998 ** 2
    assert bound == pytest.approx(240, abs=0.5)
    # equal weights and a light picture come near: there SiLU's slope is 1
    assert 0.7 * bound < gan.gradient_norms(D, torch.ones(1, 1, 28, 28)).item() <= bound


@pytest.mark.usefixtures("no_checkpoints")
@pytest.mark.parametrize("name, column", [
    ("vanilla", {"sn": True}), ("sn", {"sn": False}), ("sn", {"d": gan.wgan_d}),
    ("sn", {"g": gan.wgan_g}), ("sn", {"scale": 1.0}), ("wgan", {"clip": math.inf}),
    ("wgan-sn", {"d": gan.bce_d}), ("wgan-sn", {"g": gan.nonsaturating_g}),
    ("wgan-gp", {"penalty": 0.0}), ("wgan-gp", {"penalty": 2.0}), ("vanilla", {"lr": (1e-3, 2e-3)}),
    ("vanilla", {"beta2": 0.99})])
def test_every_column_of_the_table_reaches_the_training(tmp_path, digits_dir, kept, straight,
                                                        monkeypatch, name, column):
    plain = straight(name)
    monkeypatch.setitem(gan.MODELS, name, gan.MODELS[name]._replace(**column))
    assert not same(run(tmp_path, digits_dir, kept, "--models", name), plain)


@pytest.mark.usefixtures("no_checkpoints")
@pytest.mark.parametrize("flags", [["--batch", "9"], ["--seed", "1"], ["--n-critic", "2"],
                                   ["--z-dim", "8"]])
def test_options_change_what_they_should(tmp_path, digits_dir, straight, flags):
    other = run(tmp_path, digits_dir, tmp_path / "none", "--models", "vanilla", *flags)
    assert not same(other, straight("vanilla"))


@pytest.mark.usefixtures("no_checkpoints")
def test_memory_does_not_grow_with_the_steps(tmp_path, digits_dir, kept, tensors_alive,
                                             monkeypatch):
    """create_graph keeps graphs alive in cycles if several terms are differentiated apart."""
    monkeypatch.setattr(common.Run, "shoot", lambda run, x: None)  # it keeps pictures
    run(tmp_path, digits_dir, kept, "--models", "wgan-gp", "--steps", "8")
    assert len(tensors_alive) == 8 and max(tensors_alive[3:]) <= tensors_alive[2]


@pytest.mark.draws
@pytest.mark.usefixtures("no_checkpoints")
def test_the_study_runs_every_n_critic(tmp_path, digits_dir, kept):
    out = run(tmp_path, digits_dir, kept, "--n-critic", "1", "2", "5", "20", "--models", "sn",
              "wgan", "--steps", "1")
    assert set(out) == {"log.csv"} | {f"samples_{name}-x{n}.pt" for name in ("sn", "wgan")
                                      for n in (2, 5, 20)} | {"samples_sn.pt", "samples_wgan.pt"}


def test_a_loss_that_explodes_names_itself(tmp_path, digits_dir, kept, monkeypatch, capsys):
    monkeypatch.setitem(gan.MODELS, "wgan-gp", gan.MODELS["wgan-gp"]._replace(penalty=math.nan))
    one_line(capsys, lambda: run(tmp_path, digits_dir, kept, "--models", "wgan-gp"),
             "loss_d is nan at step 1", status=1)
    assert not (tmp_path / "checkpoint.pt").exists()


# --- the ruler ---------------------------------------------------------------------------------

def rows(capsys):
    """The last table printed: its rows by their first cell, as dicts by column."""
    lines = capsys.readouterr().out.splitlines()
    head = max(i for i, line in enumerate(lines) if "digit FID" in line or "halfway" in line)
    _, *names = re.split(r"  +", lines[head].replace("digit FID", "FID").replace("digit IS", "IS"))
    found = {}
    for line in lines[head + 1:]:
        label, *cells = re.split(r"  +", line.strip())
        found[label] = dict(zip(names, cells))
    return found


def test_the_ruler_is_calibrated(tmp_path, digits_dir, kept, capsys):
    """Real pictures score near 0, noise far away; copies of the data have the distance 0."""
    args = gan.parse_args(["--data", "digits", "--data-dir", str(digits_dir)])
    real = common.load_digits(args, train=True).x
    torch.save(real[:300].flip(3), tmp_path / "mirrored.pt")
    torch.save(real[:300], tmp_path / "copies.pt")
    copies, mirrored = (common.relative(tmp_path / f"{name}.pt") for name in ("copies", "mirrored"))
    run(tmp_path, digits_dir, kept, "--score", mirrored, copies)
    found = rows(capsys)
    fid = {label: float(row["FID"]) for label, row in found.items()}
    assert fid["real training pictures"] < fid[mirrored] / 5 and fid[copies] < fid[mirrored] / 5
    assert fid[mirrored] < fid["noise"]
    assert list(found) == [copies, mirrored, "real training pictures", "noise"]  # best first
    assert float(found[copies]["distance"]) < 1e-3 and found[copies]["n"] == "300"
    assert found["real training pictures"]["distance"] == "-"  # they would meet themselves
    assert not (tmp_path / "checkpoint.pt").exists()


def test_the_rows_are_the_same_whether_the_classifier_was_kept(tmp_path, digits_dir, capsys):
    torch.save(torch.zeros(80, 1, 28, 28, dtype=torch.uint8), tmp_path / "black.pt")
    found = []
    for _ in range(2):
        gan.main(["--data", "digits", "--data-dir", str(digits_dir), "--out",
                  str(tmp_path), "--score", str(tmp_path / "black.pt")])
        found.append(rows(capsys))
    assert found[0] == found[1] and "noise" in found[0]


def test_the_scores_are_of_the_reference_and_of_the_classes():
    """A ruler that looks at one pixel: scores that can be told by hand."""
    def net(x):
        brightness = x[:, 0, 0, 0]
        return brightness[:, None], 100 * torch.stack([-brightness, brightness], dim=1)

    x = torch.zeros(40, 1, 2, 2, dtype=torch.uint8)
    x[:10, 0, 0, 0] = 255
    ruler = gan.Ruler("digit", net, torch.tensor([[-1.0], [1.0]] * 20), x)
    found = ruler.score(x)
    p = [0.25, 0.75]
    assert found["KL"] == pytest.approx(sum(q * math.log(2 * q) for q in p))
    assert found["IS"] == pytest.approx(math.exp(-sum(q * math.log(q) for q in p)))
    s, s_ref = (math.sqrt(v * 40 / 39) for v in (0.75, 1.0))  # of -1 and 1 in these shares
    assert found["FID"] == pytest.approx(0.25 + (s - s_ref) ** 2, rel=1e-6)


def test_the_middle_of_a_way_is_read_and_its_ground_measured(tmp_path, digits_dir, kept, capsys):
    """A net whose class is the brightness of one pixel in thirds; the ground is another pixel."""
    def net(x):
        third = ((x[:, 0, 0, 0] + 1) * 1.499).long()
        return x.flatten(1), 2.0 * nn.functional.one_hot(third, 3)

    x = torch.zeros(4, 3, 1, 2, 2, dtype=torch.uint8)  # start, middle, end
    x[:, 2, 0, 0, 0] = 255                             # from class 0 to class 2
    x[:3, 1, 0, 0, 0] = 128                            # three middles of class 1, one of class 0
    x[:, 1, 0, 1, 1] = 51
    x[:, 0, 0, 0, 1] = 255                             # an end that is not black
    found = gan.path_measure(net, x)
    assert found["third"] == 0.75 and found["n"] == 4
    assert found["ground"] == pytest.approx(0.2 / 2)   # of two pixels that are black at both ends
    assert found["confidence"] == pytest.approx(math.e ** 2 / (math.e ** 2 + 2))
    torch.save(x.repeat(1, 1, 1, 14, 14), tmp_path / "paths.pt")
    run(tmp_path, digits_dir, kept, "--score", str(tmp_path / "path?.pt"))  # as cmd.exe gives it
    shown = rows(capsys)
    assert shown[common.relative(tmp_path / "paths.pt")]["n"] == "4"
    assert "mean of two training pictures" in shown and "noise" not in shown


def test_the_classifier_is_kept_and_refused_when_it_does_not_fit(tmp_path, digits_dir, kept, capsys,
                                                                 monkeypatch):
    run(tmp_path, digits_dir, kept, "--models", "sn")
    first = (tmp_path / kept.name).read_bytes()
    monkeypatch.setattr(gan.F, "cross_entropy", lambda *_: pytest.fail("trained again"))
    run(tmp_path, digits_dir, kept, "--models", "sn")
    assert (tmp_path / kept.name).read_bytes() == first
    capsys.readouterr()
    one_line(capsys, lambda: run(tmp_path, digits_dir, kept, "--seed", "1"), "seed 0", "has 1")
    read = common.load_digits
    with monkeypatch.context() as patch:  # the same name, and pictures upside down
        patch.setattr(common, "load_digits", lambda args, train: read(args, train)._replace(
            x=read(args, train).x.flip(2)))
        one_line(capsys, lambda: run(tmp_path, digits_dir, kept), kept.name, "other pictures")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / kept.name).write_bytes(b"no torch file")
    one_line(capsys, lambda: run(tmp_path / "b", digits_dir, tmp_path / "none"),
             kept.name, "does not hold net")


def test_samples_that_cannot_be_scored_are_named(tmp_path, digits_dir, kept, capsys):
    torch.save({"x": 1}, tmp_path / "dict.pt")
    torch.save(torch.zeros(64, 1, 28, 28).byte(), tmp_path / "few.pt")
    (tmp_path / "text.pt").write_text("hello")
    torch.save(torch.zeros(100, 1, 28, 28), tmp_path / "float.pt")
    for name, told in (
            ("dict.pt", "dict.pt holds no tensor; wanted are pictures, torch.uint8 [N, 1, 28, 28]"),
            ("text.pt", "text.pt cannot be read"), ("none.pt", "there is no "),
            ("float.pt", "float.pt holds torch.float32 [100, 1, 28, 28]; of floats in [-1, 1]"),
            ("few.pt", "few.pt holds torch.uint8 [64, 1, 28, 28]; 65 pictures or more")):
        with pytest.raises(SystemExit) as stop:
            run(tmp_path, digits_dir, kept, "--score", str(tmp_path / name))
        shown = capsys.readouterr()
        assert stop.value.code == 2 and shown.err.count("\n") == 1 and told in shown.out
        assert "no file is left" in shown.err


def test_one_bad_file_does_not_end_the_scores_of_the_others(tmp_path, digits_dir, kept, capsys):
    torch.save(torch.zeros(100, 1, 28, 28).byte(), tmp_path / "black.pt")
    (tmp_path / "text.pt").write_text("hello")
    run(tmp_path, digits_dir, kept, "--score", *(str(tmp_path / f"{name}.pt") for name in (
        "text", "none", "black")))
    shown = capsys.readouterr().out
    assert "text.pt cannot be read" in shown and "there is no " in shown
    assert re.search(r"black.pt +100 ", shown)


def test_samples_of_other_data_are_left_out_aloud(tmp_path, digits_dir, kept, capsys):
    """As out/*/samples*.pt finds them: points of the ring, pictures in colour."""
    torch.save(torch.randn(300, 2), tmp_path / "ring.pt")
    torch.save(torch.zeros(100, 3, 28, 28).byte(), tmp_path / "colour.pt")
    torch.save(torch.zeros(100, 1, 28, 28).byte(), tmp_path / "black.pt")
    paths = [common.relative(tmp_path / f"{name}.pt") for name in ("ring", "colour", "black")]
    run(tmp_path, digits_dir, kept, "--score", *paths)
    shown = capsys.readouterr().out
    assert "ring.pt holds torch.float32 [300, 2]" in shown
    assert "colour.pt holds torch.uint8 [100, 3, 28, 28]" in shown
    assert re.search(r"black.pt +100 ", shown)
    one_line(capsys, lambda: run(tmp_path, digits_dir, kept, "--score", *paths[:2]),
             "no file is left")


def test_the_rate_of_g_falls_with_the_side(tmp_path, monkeypatch):
    rates, begin = [], torch.optim.Adam.__init__
    monkeypatch.setattr(torch.optim.Adam, "__init__", lambda opt, params, lr, *args, **more: (
        rates.append(lr), begin(opt, params, lr, *args, **more))[1])
    gan.main(["--data", folder_of_pictures(tmp_path / "p", 12, 56), "--size", "56", "--steps", "1",
              "--batch", "4", "--models", "wgan", "--out", str(tmp_path / "out")])
    assert rates == pytest.approx([1e-3, 1e-3 / 4])  # 56 is twice 28


@pytest.mark.draws
def test_colour_without_inception_trains_without_scores_and_says_so(tmp_path, capsys, monkeypatch):
    folder, many = folder_of_pictures(tmp_path / "p", 20, 16), torch.zeros(4098, 3, 16, 16).byte()
    torch.save(many[:99], tmp_path / "a.pt")

    def run_folder(*flags):
        gan.main(["--data", folder, "--size", "16", "--steps", "2", "--batch", "4", "--models",
                  "wgan-sn", "--out", str(tmp_path / "out"), *flags])

    monkeypatch.setattr(gan, "parse_args", lambda argv, parse=gan.parse_args: set_samples(
        parse(argv), 2049))
    run_folder()
    assert "4098 training pictures; here are 2049 and 18" in capsys.readouterr().out
    assert torch.load(tmp_path / "out" / "samples_wgan-sn.pt").shape == (2049, 3, 16, 16)
    one_line(capsys, lambda: run_folder("--score", str(tmp_path / "a.pt")), "here are 2049 and 18")

    monkeypatch.setattr(common, "load_images", lambda args, device, train=True: common.Images(
        many if train else many[:99], None, "faces"))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url",
                        mock.Mock(side_effect=OSError("no network")))
    run_folder()
    assert "inception_v3_google" in capsys.readouterr().out
    one_line(capsys, lambda: run_folder("--score", str(tmp_path / "a.pt")), "inception_v3_google",
             "put")


def set_samples(args, n):
    args.n_samples = n
    return args


@pytest.mark.draws
def test_colour_is_scored_when_the_weights_are_there(tmp_path, capsys, monkeypatch):
    """A small network in Inception's place; the rest of the way is as it is."""
    class Small(nn.Module):
        def __init__(self, weights):
            super().__init__()

        def forward(self, x):
            return x[:, 0].flatten(1), x.flatten(1)[:, :10]

    noise = torch.randint(256, (4200, 3, 4, 4), dtype=torch.uint8, generator=generator(0))
    monkeypatch.setattr(gan, "Inception", Small)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: {})
    monkeypatch.setattr(common, "load_images", lambda args, device, train=True: common.Images(
        noise if train else noise[:99], None, "faces"))
    monkeypatch.setattr(gan, "parse_args", lambda argv, parse=gan.parse_args: set_samples(
        parse(argv), 2049))
    gan.main(["--data", "cifar10", "--steps", "1", "--batch", "4", "--models", "sn", "--out",
              str(tmp_path)])
    shown = capsys.readouterr().out
    assert "Inception FID" in shown and "real training pictures" in shown
    assert "truncated" not in shown


def test_real_pictures_in_colour_are_not_those_they_are_compared_with(monkeypatch):
    """Distances are to the first 10,000 training pictures, as in grey; CIFAR-10 has 50,000."""
    monkeypatch.setattr(gan, "Inception", lambda weights: nn.Identity())
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: {})
    monkeypatch.setattr(gan, "read", lambda net, x: (x.flatten(1).float(), None))
    monkeypatch.setattr(gan, "N_SAMPLES", 50)
    x = torch.randint(256, (2200, 3, 2, 2), dtype=torch.uint8, generator=generator(0))
    images, test = common.Images(x, None, "faces"), common.Images(x[:2100], None, "faces")
    args, run = set_samples(gan.parse_args(["--data", "cifar10"]), 2049), mock.Mock(device="cpu")
    ruler = gan.make_ruler(run, args, images, test)
    assert torch.equal(ruler.real, x[-50:]) and len(ruler.reference) == 50


@pytest.mark.parametrize("flags, words", [
    (["--models", "gan"], ["--models", "gan"]), (["--n-critic", "0"], ["--n-critic", "0"]),
    (["--steps", "0"], ["--steps", "0"]), (["--batch", "0"], ["--batch", "0"]),
    (["--score"], ["--score"])])
def test_bad_flags_get_one_line(tmp_path, digits_dir, kept, capsys, flags, words):
    one_line(capsys, lambda: run(tmp_path, digits_dir, kept, *flags), *words)


def test_bad_sizes_get_one_line(tmp_path, digits_dir, kept, capsys):
    folder = folder_of_pictures(tmp_path / "p", 12, 40)
    one_line(capsys, lambda: run(tmp_path, digits_dir, kept, "--data", folder, "--size", "36"),
             "use --size 32")
