"""Chapter 07: spectral norm against the SVD, and the scores against closed forms and loops."""

import importlib
import math
from itertools import combinations, repeat
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from torchvision.models import inception_v3
from torchvision.transforms.functional import normalize

from strategies import about, generator, normal, rejected, seeds

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


@about("bce_d", "nonsaturating_g", "wgan_d", "wgan_g")
@given(seeds(), sizes)
def test_losses_are_their_formulas(seed, n):
    losses_are_their_formulas(gan.bce_d, gan.nonsaturating_g, gan.wgan_d, gan.wgan_g, seed, n)


@pytest.mark.parametrize("wrong", range(4))
@pytest.mark.parametrize("twin", [
    lambda loss: lambda *a: -loss(*a), lambda loss: lambda *a: 2 * loss(*a),
    lambda loss: lambda *a: loss(*(x.sigmoid() for x in a))])
def test_wrong_losses_are_rejected(twin, wrong):
    four = [gan.bce_d, gan.nonsaturating_g, gan.wgan_d, gan.wgan_g]
    four[wrong] = twin(four[wrong])
    assert rejected(losses_are_their_formulas, *four, 0, 5)


@about("bce_d", "nonsaturating_g", edge=True)
def test_losses_of_a_d_that_is_sure_are_finite_and_exact():
    """log σ(-1000) is -1000; by way of σ, which is 0 there, it would be -inf."""
    sure = torch.tensor([1000.0])
    assert gan.nonsaturating_g(-sure).item() == 1000 and gan.nonsaturating_g(sure).item() == 0
    assert gan.bce_d(-sure, sure).item() == 2000 and gan.bce_d(sure, -sure).item() == 0


@pytest.mark.parametrize("name, d, g, scale, penalty", [
    ("vanilla", gan.bce_d, gan.nonsaturating_g, 1, 0),
    ("sn", gan.bce_d, gan.nonsaturating_g, 8, 0),
    ("wgan", gan.wgan_d, gan.wgan_g, 1, 0), ("wgan-sn", gan.wgan_d, gan.wgan_g, 1, 0),
    ("wgan-gp", gan.wgan_d, gan.wgan_g, 1, 1)])
def test_a_step_of_train_has_the_losses_of_its_model(name, d, g, scale, penalty, monkeypatch):
    """D(x) = w.x, whose penalty is (‖w‖ - 1)²; its weight is 3 times that of the table.

    G's loss is that of the new w, and the fakes of both halves are the same.
    """
    calls, losses, x = [], {}, normal(1, 4, 1, 8, 8).float()
    D = nn.Sequential(nn.Flatten(), nn.Linear(64, 1, bias=False), nn.Flatten(0))
    D[1].weight.data = 0.1 * normal(0, 1, 64).float()
    D.register_forward_pre_hook(lambda D, x: calls.append((
        x[0].detach().flatten(1), D[1].weight[0].detach().clone())))
    monkeypatch.setattr(gan, "discriminator", lambda *_: D)
    run = SimpleNamespace(  # one step, without files
        device="cpu", steps=lambda total, **state: [1], batches=lambda *_: repeat((x, None)),
        log=losses.update, every=lambda times: False, at=lambda shares: False)
    args = SimpleNamespace(seed=0, steps=1, z_dim=3, n_samples=4, batch=4, beta1=0.0, lr_d=None,
                           lr_g=None, clip=None)
    model = gan.MODELS[name]._replace(penalty=3 * gan.MODELS[name].penalty)
    gan.train(run, args, model, 1, SimpleNamespace(x=x), quick_score=None)
    (both, w), (fakes, new) = calls[0], calls[-1]
    assert torch.equal(both, torch.cat([x.flatten(1), fakes])) and not torch.equal(w, new)
    assert (new.abs().max() <= 0.03) == (name == "wgan")
    expected = d(scale * both[:4] @ w, scale * fakes @ w) + 3 * penalty * (w.norm() - 1) ** 2
    assert_close(losses["loss_d"], expected, rtol=1e-5, atol=1e-6)  # float32, 64 terms
    assert_close(losses["loss_g"], g(scale * fakes @ new), rtol=1e-5, atol=1e-6)


# --- clipping ----------------------------------------------------------------------------------

@about("clip")
@given(seeds(), st.floats(0.01, 1))
def test_clip_moves_every_number_to_the_nearest_of_the_box(seed, limit):
    torch.manual_seed(seed)
    net = nn.Linear(4, 3).double()  # its numbers lie within ±1/2
    before = [p.flatten().tolist() for p in net.parameters()]
    gan.clip(net, limit)
    for p, numbers in zip(net.parameters(), before):
        assert p.flatten().tolist() == [min(max(a, -limit), limit) for a in numbers]


def test_clipping_holds_the_slope_below_its_documented_bound():
    """Π limit √(weights), times 1.1 (1.0998), SiLU's largest slope, for each hidden layer: 240."""
    D = gan.discriminator(1, 28, sn=False)
    for p in D.parameters():
        nn.init.ones_(p)
    gan.clip(D, 0.03)
    weights = [layer.weight for layer in D if isinstance(layer, nn.Linear)]
    bound = math.prod(0.03 * w.numel() ** 0.5 for w in weights) * 1.0998 ** 2
    assert bound == pytest.approx(240, abs=0.5)
    # equal weights and a light picture come near: there SiLU's slope is 1
    assert 0.7 * bound < gan.gradient_norms(D, torch.ones(1, 1, 28, 28)).item() <= bound


# --- spectral norm -----------------------------------------------------------------------------

def unit(seed, n):
    return nn.functional.normalize(normal(seed, n), dim=0)


def two_one(seed, *shape):
    """A weight with singular values 2, 1, 1, ...: power iteration is exact after 60 rounds."""
    left, _, right = torch.linalg.svd(normal(seed, *shape).flatten(1), full_matrices=False)
    values = torch.ones(len(left[0]), dtype=torch.float64)
    values[0] = 2
    return (left * values @ right).view(shape)


def sigma_converges_to_the_largest_singular_value(spectral_norm, seed, shape):
    """Singular values 2, 1, ...: each round divides tan of u's angle by 4, 40 rounds by 1e24."""
    weight = two_one(seed, *shape)
    sigma, _ = spectral_norm(weight, unit(seed + 1, shape[0]), 40)
    assert_close(sigma.item(), 2.0, rtol=8 * weight.numel() * EPS, atol=0)


@about("spectral_norm")
@given(seeds(), st.one_of(st.tuples(sizes, sizes),
                          st.tuples(sizes, sizes, st.integers(1, 3), st.integers(1, 3))))
def test_sigma_converges_to_the_largest_singular_value(seed, shape):
    sigma_converges_to_the_largest_singular_value(gan.spectral_norm, seed, shape)


@pytest.mark.parametrize("twin", [
    lambda weight, u, n_iter: (weight.norm(), u),                                 # Frobenius
    lambda weight, u, n_iter: (gan.spectral_norm(weight, u, n_iter)[0] ** 2, u),  # of W Wᵀ
    lambda weight, u, n_iter: gan.spectral_norm(weight.transpose(0, 1), u, n_iter),
    lambda weight, u, n_iter: gan.spectral_norm(weight, u, 0)])
def test_wrong_sigmas_are_rejected(twin):
    assert rejected(sigma_converges_to_the_largest_singular_value, twin, 0, (4, 4, 2, 2))


@about("spectral_norm")
@given(seeds(), sizes, sizes)
def test_every_round_brings_sigma_nearer_and_never_above(seed, out, rest):
    """‖Wᵀu‖ <= σ_1 for every unit u, and power iteration never lets it fall (Rayleigh quotients).

    Up to the rounding of sums of `out` and `rest` products.
    """
    weight, u, last = normal(seed, out, rest), unit(seed + 1, out), 0.0
    largest, rounding = torch.linalg.svdvals(weight)[0], 8 * (out + rest) * EPS
    for n_iter in (0, 1, 1, 2, 3):
        sigma, u = gan.spectral_norm(weight, u, n_iter)
        assert last * (1 - rounding) <= sigma <= largest * (1 + rounding)
        assert_close(u.norm().item(), 1.0, rtol=8 * out * EPS, atol=0)
        last = sigma


@about("spectral_norm")
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


@about("spectral_norm")
@given(seeds())
def test_the_gradient_of_sigma_is_that_of_the_largest_singular_value(seed):
    """At convergence dσ/dW = u vᵀ; torch's derivative of the SVD is the oracle."""
    weight = two_one(seed, 3, 4).requires_grad_()
    expected, = torch.autograd.grad(torch.linalg.svdvals(weight)[0], weight)
    got, = torch.autograd.grad(gan.spectral_norm(weight, unit(seed + 1, 3), 60)[0], weight)
    assert_close(got, expected, rtol=0, atol=100 * EPS)


def sigma_grows_with_the_weight(spectral_norm, seed, size):
    """σ(s W) = s σ(W), the same u. In float32 the square of 1e20 is infinite, that of 1e-25 0."""
    weight, u = normal(seed, 4, 6).float(), unit(seed + 1, 4).float()
    sigma, v = spectral_norm(weight, u, 3)
    got, u = spectral_norm(size * weight, u, 3)
    assert_close(got.item() / size, sigma.item(), rtol=1e-5, atol=0)
    assert_close(u, v, rtol=0, atol=1e-5)


@about("spectral_norm", edge=True)
@given(seeds(), st.sampled_from([1e-34, 1e-25, 1e-10, 1e10, 1e20, 1e34]))
def test_sigma_grows_with_the_weight(seed, size):
    sigma_grows_with_the_weight(gan.spectral_norm, seed, size)


def unscaled(weight, u, n_iter):
    for _ in range(n_iter):
        u = nn.functional.normalize(weight @ nn.functional.normalize(weight.T @ u, dim=0), dim=0)
    return u @ weight @ nn.functional.normalize(weight.T @ u, dim=0), u


@pytest.mark.parametrize("size, wrong", [(1e20, True), (1e-25, True), (2.0, False)])
def test_power_iteration_of_the_weights_as_they_are_is_rejected(size, wrong):
    assert rejected(sigma_grows_with_the_weight, unscaled, 0, size) == wrong


# --- spectral norm in the networks -------------------------------------------------------------

def normalised(layer, weight, steps=60):
    """The layer with this weight and SpectralNorm, after so many calls in training mode."""
    layer.weight.data = weight
    gan.parametrize.register_parametrization(layer, "weight", gan.SpectralNorm(layer.weight))
    for _ in range(steps):
        layer.weight  # each look is a round of power iteration
    return layer.eval()


def slope(layer, x, other):
    """‖f(x) - f(x')‖ / ‖x - x'‖ of each pair, the largest."""
    with torch.no_grad():
        change = (layer(x) - layer(other)).flatten(1).norm(dim=1)
    return (change / (x - other).flatten(1).norm(dim=1)).max().item()


@pytest.mark.parametrize("kind, options, shape, x_shape", [
    (nn.Linear, {}, (5, 6), (20, 6)),
    (nn.Conv2d, {"kernel_size": 2, "stride": 2}, (5, 2, 2, 2), (20, 2, 4, 4))])
@given(seed=seeds())
def test_a_normalised_layer_without_overlaps_is_1_lipschitz(kind, options, shape, x_shape, seed):
    layer = kind(shape[1], shape[0], **options, dtype=torch.float64)
    layer = normalised(layer, two_one(seed, *shape))
    assert slope(layer, normal(seed, *x_shape), normal(seed + 1, *x_shape)) <= 1 + 100 * EPS
    top = torch.linalg.svd(layer.weight.flatten(1))[2][0].detach().view(1, *shape[1:])
    assert_close(slope(layer, top, -top), 1.0, rtol=100 * EPS, atol=0)  # 1 is reached along v


def test_overlapping_patches_double_the_slope_at_most():
    """D's convolutions, 4x4 with stride 2: a pixel is in 4 patches, √4; equal weights reach it."""
    layer = nn.Conv2d(1, 1, kernel_size=4, stride=2, padding=1, dtype=torch.float64)
    layer = normalised(layer, torch.ones(1, 1, 4, 4, dtype=torch.float64))
    even = torch.ones(1, 1, 64, 64, dtype=torch.float64)
    assert 1.9 < slope(layer, even, -even) <= 2 + 100 * EPS  # less at the border
    assert slope(layer, normal(0, 200, 1, 12, 12), normal(1, 200, 1, 12, 12)) <= 2 + 100 * EPS


def test_of_a_transposed_convolution_another_matrix_is_normalised_than_by_torch():
    """What SpectralNorm's docstring says: [in, rest], and by torch [out, rest]."""
    torch.manual_seed(0)
    ours, theirs = (nn.ConvTranspose2d(3, 2, kernel_size=2, dtype=torch.float64) for _ in range(2))
    ours = normalised(ours, normal(1, 3, 2, 2, 2), 500)
    theirs = parametrizations.spectral_norm(theirs, n_power_iterations=500)
    for weight in (ours.weight, theirs.weight.transpose(0, 1)):
        largest = torch.linalg.matrix_norm(weight.flatten(1), ord=2).item()
        # 500 rounds: what is left of a second singular value of 0.97 of the first is 1e-13
        assert_close(largest, 1.0, rtol=1e-9, atol=0)


@pytest.mark.parametrize("sn", [True, False])
def test_power_iteration_normalises_all_layers_of_d_within_20_passes_and_only_with_sn(sn):
    """What discriminator's docstring says of the largest singular value of a layer."""
    def largest(D):
        return [torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2).item()
                for layer in D.eval() if isinstance(layer, (nn.Conv2d, nn.Linear))]

    for seed in range(3):
        torch.manual_seed(seed)
        D = gan.discriminator(1, 28, sn)
        at_first = largest(D)
        for _ in range(20):
            D.train()(torch.zeros(1, 1, 28, 28))
        assert len(at_first) == 3 and (1.05 < max(at_first) < 1.6 or not sn)
        assert all(1 - 1e-5 < value < 1.05 for value in largest(D)) == sn


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


def test_other_passes_do_not_spoil_a_backward_pass():
    """u is replaced, not changed in place; one made in inference mode could not be saved."""
    D, x = gan.discriminator(1, 28, sn=True), torch.randn(2, 1, 28, 28)
    with torch.inference_mode():
        D(x)
    scores = D.eval()(x) + D.train()(x) - D(-x)
    scores.sum().backward()
    assert all(p.grad.isfinite().all() for p in D.parameters())


@about("spectral_norm", edge=True)
def test_zero_weights_leave_u_and_a_layer_recovers_from_them():
    """0 / 0 would be nan, and an u that has become 0 would stay 0."""
    sigma, u = gan.spectral_norm(torch.zeros(3, 5).double(), unit(0, 3), 2)
    assert sigma == 0 and torch.equal(u, unit(0, 3))
    layer = normalised(nn.Linear(3, 2, bias=False), torch.zeros(2, 3)).train()
    layer(torch.ones(1, 3)).sum().backward()
    weight = layer.parametrizations.weight.original
    assert torch.equal(layer.weight, torch.zeros(2, 3)) and weight.grad.isfinite().all()
    weight.data = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    for _ in range(30):
        layer.weight
    assert_close(torch.linalg.svdvals(layer.weight), torch.tensor([1.0, 1 / 3]))


def test_autocast_rounds_neither_sigma_nor_u():
    """In bfloat16 both have 3 digits, and u of that type would make the next float32 call fail."""
    torch.manual_seed(0)
    layer = normalised(nn.Linear(6, 5, bias=False), torch.randn(5, 6), steps=2).train()
    module = layer.parametrizations.weight[0]
    weight, u = layer.parametrizations.weight.original, module.u
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = module(weight)
        assert layer(torch.ones(1, 6)).dtype == torch.bfloat16
    assert module.u.dtype == torch.float32 and layer(torch.ones(1, 6)).dtype == torch.float32
    assert torch.equal(got, weight / gan.spectral_norm(weight, u)[0])


@pytest.mark.parametrize("sn", [False, True])
def test_a_score_depends_on_its_own_picture_alone(sn):
    torch.manual_seed(0)
    D = gan.discriminator(1, 28, sn).double().train(not sn)  # in training, u moves with each pass
    x = normal(0, 3, 1, 28, 28)
    other = torch.cat([x[:1], normal(1, 2, 1, 28, 28)])
    assert_close(D(x)[0], D(other)[0], rtol=1e4 * EPS, atol=1e4 * EPS)  # sums of 3,136 terms


# --- gradient penalty --------------------------------------------------------------------------

def cubes(x):
    """A critic: Σ x³ of each example, whose gradient is 3 x²."""
    return (x ** 3).flatten(1).sum(dim=1)


def slopes_of_cubes(x):
    return [3 * math.hypot(*(a ** 2 for a in example.flatten().tolist())) for example in x]


@about("gradient_norms")
@given(seeds(), sizes)
def test_gradient_norms_are_one_for_each_example(seed, n):
    x = normal(seed, n, 2, 3)
    got = gan.gradient_norms(cubes, x)
    assert_close(got.tolist(), slopes_of_cubes(x), rtol=64 * EPS, atol=0)


def penalty_is_its_formula(penalty, seed, n):
    """E (‖3 x̂²‖ - 1)² at the points x̂ = α x + (1 - α) x' that the critic saw, one α for each."""
    x, x_fake, seen = normal(seed, n, 2, 3, 3), normal(seed + 1, n, 2, 3, 3), []

    def spy(x):
        seen.append(x.detach())
        return cubes(x)

    got = penalty(spy, x, x_fake, generator(seed))
    penalty(spy, x, x_fake, generator(seed))
    assert torch.equal(*seen)  # α comes from the generator
    alpha = ((seen[0] - x_fake) / (x - x_fake)).flatten(1)
    # the division loses as much as the two pictures are close to each other in a pixel
    loss = 100 * EPS / (x - x_fake).abs().min().item()
    assert (alpha - alpha[:, :1]).abs().max() <= loss and len(alpha[:, 0].unique()) == n
    assert -loss <= alpha.min() and alpha.max() <= 1 + loss
    norms = slopes_of_cubes(seen[0])
    assert_close(got.item(), sum((norm - 1) ** 2 for norm in norms) / n, rtol=0,
                 atol=100 * EPS * (1 + max(norms)) ** 2)


@about("gradient_penalty")
@given(seeds(), sizes)
def test_penalty_is_its_formula(seed, n):
    penalty_is_its_formula(gan.gradient_penalty, seed, n)


def penalty_by(sample=lambda n, rng: torch.rand(n, 1, 1, 1, generator=rng), of_scores=lambda a: a,
               norms=lambda grad: grad.flatten(1).norm(dim=1),
               over_batch=lambda norms: ((norms - 1) ** 2).mean()):
    """The right penalty, or a wrong one with other parts."""
    def penalty(critic, x, x_fake, rng):
        x_hat = (x_fake + sample(len(x), rng) * (x - x_fake)).requires_grad_()
        grad, = torch.autograd.grad(of_scores(critic(x_hat)).sum(), x_hat)
        return over_batch(norms(grad))
    return penalty


@pytest.mark.parametrize("wrong", [
    {"sample": lambda n, rng: torch.rand(n, 2, 3, 3, generator=rng)},  # for each pixel
    {"sample": lambda n, rng: 2 + torch.randn(n, 1, 1, 1, generator=rng)},  # normal
    {"sample": lambda n, rng: torch.rand(1, generator=rng)},  # one for all
    {"sample": lambda n, rng: torch.rand(n, 1, 1, 1)},  # without the generator
    {"of_scores": torch.sigmoid}, {"norms": lambda grad: grad.norm(dim=1)},  # over the channels
    {"norms": lambda grad: grad.norm()},                                     # over the batch
    {"over_batch": lambda norms: (norms ** 2).mean()},
    {"over_batch": lambda norms: ((norms - 1) ** 2).sum()}])
def test_wrong_penalties_are_rejected(wrong):
    assert rejected(penalty_is_its_formula, penalty_by(**wrong), 0, 4)
    assert not rejected(penalty_is_its_formula, penalty_by(), 0, 4)


@about("gradient_penalty", edge=True)
@pytest.mark.parametrize("x_fake", [torch.zeros(1, 3, 2, 2), torch.zeros(4, 1, 2, 2),
                                    torch.zeros(0, 3, 2, 2), torch.ones(4, 3, 2, 2).byte()])
@pytest.mark.parametrize("x", [torch.zeros(4, 3, 2, 2), torch.ones(4, 3, 2, 2).byte(),
                               torch.ones(4, 3, 2, 2).long()])
def test_a_penalty_of_other_shapes_or_of_integers_is_refused(x, x_fake):
    """Shapes would broadcast, grey fakes to pictures in colour; α as an integer is 0."""
    for pair in ((x, x_fake), (x_fake, x)):
        with pytest.raises(ValueError):
            gan.gradient_penalty(cubes, *pair)


@about("gradient_norms", "gradient_penalty", edge=True)
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


@about("inception_score")
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


@about("inception_score")
@given(seeds(), st.integers(1, 5), st.integers(1, 6))
def test_inception_score_lies_between_1_and_k_and_reaches_both(seed, n, k):
    got = gan.inception_score(probabilities(seed, n, k))[0]
    assert 1 - 1e3 * EPS <= got <= k * (1 + 1e3 * EPS)
    assert_close(gan.inception_score(torch.full((n, k), 1 / k))[0], 1.0, rtol=1e-6, atol=0)
    sure = torch.eye(k).repeat(n, 1)
    assert_close(gan.inception_score(sure)[0], float(k), rtol=64 * EPS, atol=0)


@about("inception_score")
@given(seeds(), st.integers(1, 4))
def test_splits_give_mean_and_deviation_over_the_parts(seed, splits):
    probs = probabilities(seed, 4 * splits, 3)
    parts = [gan.inception_score(part)[0] for part in probs.split(4)]
    got = gan.inception_score(probs, splits)
    assert_close(got, (float(np.mean(parts)), float(np.std(parts))), rtol=1e3 * EPS, atol=1e3 * EPS)


dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])


@about("inception_score", edge=True)
@given(seeds(), st.integers(1, 50), st.integers(1, 1000), dtypes)
def test_inception_score_takes_the_probabilities_of_coarse_types(seed, n, k, dtype):
    """Each is wrong by a rounding, and the score by as much of its logarithm and of itself."""
    probs = (2 * normal(seed, n, k)).to(dtype).softmax(dim=1)
    rows = probs.double() / probs.double().sum(dim=1, keepdim=True)
    assert_close(gan.inception_score(probs)[0], gan.inception_score(rows)[0],
                 rtol=8 * torch.finfo(dtype).eps * (1 + math.log(k)), atol=0)


@about("inception_score", edge=True)
def test_inception_score_takes_whole_numbers():
    assert gan.inception_score(torch.eye(4, dtype=torch.int64))[0] == pytest.approx(4)


NO_PROBABILITIES = {
    "logits": lambda a: a, "positive": lambda a: a.relu() + 0.1, "sigmoids": torch.sigmoid,
    "sum is 1.2": lambda a: 1.2 * a.softmax(dim=1), "not a number": lambda a: math.nan * a,
    "below 0": lambda a: torch.tensor([[2.0, -1.0]])}


@about("inception_score", edge=True)
@pytest.mark.parametrize("kind", NO_PROBABILITIES)
@given(seed=seeds(), k=st.integers(3, 1000), dtype=dtypes)
def test_inception_score_refuses_what_are_no_probabilities(kind, seed, k, dtype):
    """Five rows of other numbers that all sum to 1, up to bfloat16, are as rare as 1 in 1e7."""
    wrong = NO_PROBABILITIES[kind](2 * normal(seed, 5, k))
    with pytest.raises(ValueError):
        gan.inception_score(wrong.to(dtype))


@about("inception_score", edge=True)
@pytest.mark.parametrize("shape, splits", [((1, 1), 0), ((1, 1), 2), ((0, 2), 1), ((2,), 1),
                                           ((), 1), ((1, 1, 1), 1)])
def test_inception_score_refuses_other_dimensions_and_fewer_rows_than_splits(shape, splits):
    with pytest.raises(ValueError):
        gan.inception_score(torch.ones(shape), splits)


# --- Frechet distance --------------------------------------------------------------------------

def frechet_distance_of_gaussians_is_the_closed_form(frechet_distance, seed, d, n):
    """Sets of exactly these means and covariances, with common axes: ‖m - m'‖² + Σ (s_i - s'_i)².
    """
    x = normal(seed, n, d)
    white = torch.linalg.qr(x - x.mean(dim=0))[0] * (n - 1) ** 0.5  # mean 0, covariance 1
    axes = torch.linalg.qr(normal(seed + 1, d, d))[0]
    m, m_other, s, s_other = normal(seed + 2, 4, d)
    s, s_other = s.exp(), s_other.exp()
    got = frechet_distance(white * s @ axes + m, white * s_other @ axes + m_other)
    expected = ((m - m_other) ** 2).sum() + ((s - s_other) ** 2).sum()
    scale = 1 + sum((a ** 2).sum().item() for a in (m, m_other, s, s_other))
    # the root of a rounding error: √EPS where an eigenvalue is near 0
    assert_close(got, expected.item(), rtol=0, atol=1e-9 * scale)


@about("frechet_distance")
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


@about("frechet_distance")
@given(seeds(), st.integers(1, 5))
def test_frechet_distance_of_any_covariances_by_another_road(seed, d):
    """tr (C C')^½ is the sum of the roots of C C's eigenvalues; the covariances by numpy."""
    a, b = normal(seed, 3 * d, d) @ normal(seed + 1, d, d), normal(seed + 2, 4 * d, d)
    c, c_other = (np.atleast_2d(np.cov(x.numpy(), rowvar=False)) for x in (a, b))
    cross = np.sqrt(np.linalg.eigvals(c @ c_other).real.clip(min=0)).sum()
    apart = ((a.numpy().mean(0) - b.numpy().mean(0)) ** 2).sum()
    traces = np.trace(c + c_other)
    assert_close(gan.frechet_distance(a, b), float(apart + traces - 2 * cross), rtol=0,
                 atol=1e-6 * float(1 + traces))


@about("frechet_distance")
@given(seeds(), st.integers(1, 5))
def test_frechet_distance_is_symmetric_zero_for_equal_and_blind_to_a_common_motion(seed, d):
    a, b = normal(seed, 4 * d, d), 2 * normal(seed + 1, 4 * d, d) + 1
    turn, shift = torch.linalg.qr(normal(seed + 2, d, d))[0], normal(seed + 3, d)
    there = gan.frechet_distance(a, b)
    tight = dict(rtol=0, atol=1e-6 * (1 + there))
    assert_close(gan.frechet_distance(b, a), there, **tight)
    assert_close(gan.frechet_distance(a @ turn + shift, b @ turn + shift), there, **tight)
    assert_close(gan.frechet_distance(a, a), 0.0, rtol=0, atol=1e-6 * d)


@about("frechet_distance", edge=True)
@given(seeds())
def test_frechet_distance_is_computed_in_float64(seed):
    """Features come in float32, and differences of large means would be lost there."""
    a, b = (normal(seed + i, 9, 3).float() + 100 for i in range(2))
    assert gan.frechet_distance(a, b) == gan.frechet_distance(a.double(), b.double())


BAD_FEATURES = {
    "1 row": normal(0, 1, 4), "3 features": normal(0, 9, 3), "vector": normal(0, 9),
    "scalar": torch.tensor(1.0), "maps": normal(0, 9, 4, 1), "nan": math.nan * normal(0, 9, 4),
    "inf": normal(0, 9, 4).index_fill(0, torch.tensor([2]), math.inf)}


@about("check_features")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64])
def test_checked_features_are_the_same_in_float64(dtype):
    a, b = (10 * normal(0, 3, 4)).to(dtype), (10 * normal(1, 5, 4)).to(dtype)
    for found, x in zip(gan.check_features(a, b, 3), (a, b)):
        assert found.dtype == torch.float64 and torch.equal(found, x.double())
    with pytest.raises(ValueError):
        gan.check_features(a, b, 4)


@about("frechet_distance", "kernel_distance", "recall", edge=True)
@pytest.mark.parametrize("bad", ["3 features", "vector", "scalar", "maps"])
@pytest.mark.parametrize("compare", ["frechet_distance", "kernel_distance", "recall"])
def test_other_dimensions_than_those_of_features_are_refused(compare, bad):
    """One number for each picture is [N, 1]."""
    good, bad = normal(1, 9, 4), BAD_FEATURES[bad]
    for pair in ((good, bad), (bad, good), (good[:, 0], good[:, 0])):
        with pytest.raises(ValueError):
            getattr(gan, compare)(*pair)


@pytest.mark.parametrize("compare, rows", [(gan.frechet_distance, 4), (gan.kernel_distance, 1),
                                           (gan.recall, 3)])
@pytest.mark.parametrize("bad", BAD_FEATURES)
def test_features_without_a_distance_are_refused(compare, rows, bad):
    """Not asked of other people's functions: LAPACK may end Python where a value is not finite."""
    good = normal(1, 9, 4)
    for bad in (BAD_FEATURES[bad], good[:rows]):
        for pair in ((good, bad), (bad, good)):
            with pytest.raises(ValueError):
                compare(*pair)


@about("frechet_distance", edge=True)
@given(seeds(), st.sampled_from([2, 8, 32, 128]), st.sampled_from([1, 2, 8]))
def test_frechet_distance_of_features_of_low_rank_is_hardly_below_0(seed, d, rank):
    """d features that are sums of a few: most eigenvalues are 0, their roots up to √EPS of one."""
    a = normal(seed, 3 * d, rank) @ normal(seed + 1, rank, d)
    traces = 2 * torch.cov(a.T).trace().item()
    assert abs(gan.frechet_distance(a, a.flip(0))) <= 1e-8 * d * traces


# --- KID and recall ----------------------------------------------------------------------------

def kernel_distance_is_the_mean_over_pairs(kernel_distance, seed, n, m, d):
    """Each pair of different rows by itself, in Python numbers."""
    a, b = normal(seed, n, d), normal(seed + 1, m, d) + 1

    def mean_kernel(a, b, same):
        pairs = [(sum(map(math.prod, zip(u, v))) / d + 1) ** 3 for i, u in enumerate(a.tolist())
                 for j, v in enumerate(b.tolist()) if not (same and i == j)]
        return math.fsum(pairs) / len(pairs), math.fsum(map(abs, pairs)) / len(pairs)

    (aa, size), (bb, size_b), (ab, size_ab) = (
        mean_kernel(*pair) for pair in ((a, a, True), (b, b, True), (a, b, False)))
    assert_close(kernel_distance(a, b), aa + bb - 2 * ab, rtol=0,  # rounding: n m d sums
                 atol=EPS * n * m * (d + 9) * (1 + size + size_b + size_ab) * 9)


@about("kernel_distance")
@given(seeds(), st.integers(2, 6), st.integers(2, 6), st.integers(1, 4))
def test_kernel_distance_is_the_mean_over_pairs(seed, n, m, d):
    kernel_distance_is_the_mean_over_pairs(gan.kernel_distance, seed, n, m, d)


def kid_by(power=3, one=1.0, by_d=True, own=1):
    """own = 0: pairs of a row with itself count, a biased estimate."""
    def distance(a, b):
        def mean(a, b, same):
            k = (a @ b.T / (a.shape[1] if by_d else 1) + one) ** power
            return (k.sum() - same * k.diagonal().sum()) / (len(a) * (len(b) - same))
        return (mean(a, a, own) + mean(b, b, own) - 2 * mean(a, b, 0)).item()
    return distance


@pytest.mark.parametrize("twin", [kid_by(power=2), kid_by(one=0.0), kid_by(by_d=False),
                                  kid_by(own=0), lambda a, b: -gan.kernel_distance(a, b)])
def test_wrong_kernel_distances_are_rejected(twin):
    assert not rejected(kernel_distance_is_the_mean_over_pairs, kid_by(), 0, 3, 4, 2)
    assert rejected(kernel_distance_is_the_mean_over_pairs, twin, 0, 3, 4, 2)


@about("kernel_distance")
@given(seeds(), st.integers(2, 4), st.integers(1, 3))
def test_kernel_distance_is_0_on_average_over_all_ways_to_split_one_set(seed, n, d):
    """So it has no drift with the number of rows. The biased estimate is above 0 here."""
    x = normal(seed, 6, d)
    splits = [gan.kernel_distance(x[list(chosen)], x[[i for i in range(6) if i not in chosen]])
              for chosen in combinations(range(6), n)]
    assert abs(math.fsum(splits)) <= 1e4 * EPS * (1 + sum(map(abs, splits)))


def recall_is_that_of_the_loops(recall, seed, n, m, d, k):
    """Small whole numbers: distances are exact, and many are equal to the radius."""
    real, fake = (torch.randint(4, (rows, d), generator=generator(seed + i))
                  for i, rows in enumerate((n, m)))
    radii = [sorted(math.dist(f, g) for j, g in enumerate(fake.tolist()) if j != i)[k - 1]
             for i, f in enumerate(fake.tolist())]
    inside = [any(math.dist(r, f) <= radius for f, radius in zip(fake.tolist(), radii))
              for r in real.tolist()]
    assert_close(recall(real, fake, k), sum(inside) / n, rtol=0, atol=n * EPS)


@about("recall")
@given(seeds(), st.integers(4, 8), st.integers(4, 8), st.integers(1, 4), st.integers(1, 3))
def test_recall_is_that_of_the_loops(seed, n, m, d, k):
    recall_is_that_of_the_loops(gan.recall, seed, n, m, d, k)


@pytest.mark.parametrize("twin", [
    lambda real, fake, k: gan.recall(fake, real, k),      # precision
    lambda real, fake, k: gan.recall(real, fake, k - 1) if k > 1 else 0.0,  # counts itself
    lambda real, fake, k: gan.recall(real * 1.001, fake, k),                # < for <=
    lambda real, fake, k: 1 - gan.recall(real, fake, k)])
def test_wrong_recalls_are_rejected(twin):
    assert rejected(lambda twin: [recall_is_that_of_the_loops(twin, seed, 8, 7, 3, 2)
                                  for seed in range(20)], twin)


@about("recall")
@given(seeds(), st.integers(4, 30), st.integers(1, 5))
def test_recall_sees_variety(seed, n, d):
    """All of the data: 1. One picture again and again: only that one, while precision is 1."""
    real = normal(seed, n, d).float() + 100
    frozen = real[:1].expand(n, d)
    assert gan.recall(real, real) == 1 and gan.recall(real, real + 1e4) == 0
    assert_close(gan.recall(real, frozen), 1 / n, rtol=0, atol=EPS)
    assert gan.recall(frozen, real) == 1


@about("recall", edge=True)
@pytest.mark.parametrize("k", [0, -1, 9])
def test_recall_refuses_neighbours_that_are_not_there(k):
    with pytest.raises(ValueError):
        gan.recall(normal(0, 9, 2), normal(1, 9, 2), k)


# --- truncation --------------------------------------------------------------------------------

def truncated_draws_keep_the_limit_and_have_their_moments(truncated_normal, seed, limit):
    """Mean 0, variance 1 - 2 a φ(a) / (2 Φ(a) - 1); 40,000 samples, 6 standard errors.

    Below 0.01 that difference is all rounding, and the samples are uniform: variance limit² / 3.
    """
    z = truncated_normal(400, 100, limit, generator(seed))
    assert z.dtype == torch.float32 and z.abs().max() <= torch.tensor(limit)
    z = z.double()
    phi = math.exp(-limit * limit / 2) / math.sqrt(2 * math.pi)
    variance = 1 - 2 * limit * phi / math.erf(limit / math.sqrt(2))
    if limit < 0.01:
        variance = limit ** 2 / 3
    assert abs(z.mean()) <= 6 * z.std() / 200
    assert abs((z ** 2).mean() - variance) <= 6 * (z ** 2).std() / 200


@about("truncated_normal")
@given(seeds(), st.floats(0.01, 20))
def test_truncated_draws_keep_the_limit_and_have_their_moments(seed, limit):
    truncated_draws_keep_the_limit_and_have_their_moments(gan.truncated_normal, seed, limit)


@about("truncated_normal", edge=True)
@pytest.mark.parametrize("limit", [1e-30, 1e-8, 1e-5, 1e-3, 40.0, 1e30, 1e300])
def test_truncated_draws_of_extreme_limits_are_uniform_or_normal(limit):
    truncated_draws_keep_the_limit_and_have_their_moments(gan.truncated_normal, 0, limit)


@pytest.mark.parametrize("twin", [
    lambda n, d, limit, rng: torch.randn(n, d, generator=rng).clamp(-limit, limit),
    lambda n, d, limit, rng: limit * (2 * torch.rand(n, d, generator=rng) - 1)])
def test_clamped_and_uniform_draws_are_rejected(twin):
    assert rejected(truncated_draws_keep_the_limit_and_have_their_moments, twin, 0, 1.0)


@pytest.mark.parametrize("limit", [1.0, 10.0])
def test_the_extreme_of_the_uniform_numbers_gives_the_limit(monkeypatch, limit):
    """u = -1 can be sampled, and erfinv(-1) is -∞ where erf of the limit has rounded to 1."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.zeros(shape, dtype=torch.float64))
    assert gan.truncated_normal(1, 1, limit).item() == -limit


@about("truncated_normal", edge=True)
@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
def test_a_limit_that_no_draw_can_keep_is_refused(limit):
    with pytest.raises(ValueError):
        gan.truncated_normal(2, 2, limit)


@about("truncated_normal", edge=True)
def test_no_limit_is_the_plain_normal():
    assert torch.equal(gan.truncated_normal(3, 4, math.inf, generator(0)),
                       torch.randn(3, 4, generator=generator(0)))


# --- what is scored ----------------------------------------------------------------------------

def test_inception_sees_what_torchvision_makes_of_the_picture():
    """torchvision's own way: ImageNet's mean and deviation off, then its transform_input."""
    torch.manual_seed(0)
    # with torch's own start, init_weights=False, nothing of the picture comes through 48 layers
    reference = inception_v3(init_weights=True, transform_input=True).eval()
    ours = gan.inception(reference.state_dict()).eval()
    x = torch.rand(1, 3, 299, 299)
    with torch.no_grad():
        logits, unscaled, features = ours(2 * x - 1), ours(x), ours[:-1](torch.zeros(2, 3, 16, 16))
        expected = reference(normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    largest = expected.abs().max().item()
    assert_close(logits, expected, rtol=0, atol=1e-3 * largest)  # float32 through 48 layers
    assert (unscaled - expected).abs().max() > 0.1 * largest
    assert features.shape == (2, 2048)


def test_features_are_what_the_last_layer_gets(monkeypatch):
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 5))
    x = torch.randint(256, (250_000, 1, 2, 2), dtype=torch.uint8)  # in three parts
    features, probs = gan.features_and_probs(net, x)
    last = x[-1:].float() / 127.5 - 1
    assert features.shape == (250_000, 3) and probs.shape == (250_000, 5)
    assert_close(features[-1:], net[:3](last).detach())
    assert_close(probs[-1:], net(last).detach().softmax(dim=1))


def score_of(features, probs, reference, monkeypatch, trained_here=True, **more):
    """score() of pictures for which a metric finds these features and probs."""
    monkeypatch.setattr(gan, "features_and_probs", lambda net, x: (features, probs))
    metric = gan.Metric("", None, reference, None, trained_here)
    return gan.score(metric, torch.zeros(len(features), 1), **more)


def test_the_scores_are_of_the_reference_and_of_the_classes(monkeypatch):
    """40 features, -1 and 1 in the shares 3/4 and 1/4: scores that can be told by hand."""
    features = torch.tensor([[1.0], [-1.0], [-1.0], [-1.0]] * 10)
    probs = (100 * torch.cat([-features, features], dim=1)).softmax(dim=1)
    found = score_of(features, probs, torch.tensor([[-1.0], [1.0]] * 20), monkeypatch)
    p = [0.25, 0.75]
    assert found["KL"] == pytest.approx(sum(q * math.log(2 * q) for q in p))
    assert found["IS"] == pytest.approx(math.exp(-sum(q * math.log(q) for q in p)))
    s, s_ref = (math.sqrt(v * 40 / 39) for v in (0.75, 1.0))  # of -1 and 1 in these shares
    assert found["FID"] == pytest.approx(0.25 + (s - s_ref) ** 2, rel=1e-6)
    assert found["recall"] == 1.0  # both values occur among the samples
    alone = score_of(-features.abs(), probs, torch.tensor([[-1.0], [1.0]] * 20), monkeypatch)
    assert alone["recall"] == 0.5 and alone["KID"] > found["KID"]


@pytest.mark.parametrize("n, m", [(4, 9), (9, 4)])
def test_too_few_pictures_for_an_fid_have_the_other_scores(n, m, monkeypatch):
    probs = probabilities(0, n, 3)
    found = score_of(normal(1, n, 4), probs, normal(2, m, 4), monkeypatch, pairs=False)
    assert found.keys() == {"IS", "KL"} and found["IS"] == gan.inception_score(probs)[0]
    more = score_of(normal(1, n, 4), probs, normal(2, m, 4), monkeypatch, trained_here=False)
    assert more.keys() == {"IS", "KID", "recall"}  # classes of other data have no KL
    assert "FID" in score_of(normal(1, 5, 4), probabilities(0, 5, 3), normal(2, 5, 4), monkeypatch)


@pytest.mark.parametrize("order", [
    lambda x: x.sort().values, lambda x: x.view(10, -1).T.flatten()])  # labels 0, 1, ..., 9, 0, ...
def test_recall_and_kid_take_pictures_from_all_of_a_set(order, monkeypatch):
    """The first test pictures of MNIST are easier than others, and cgan's labels repeat: equal
    sets must stay equal, whatever their order. Ten classes, 100 apart, of 200 pictures each."""
    monkeypatch.setattr(gan, "N_PAIRS", 200)
    x = torch.arange(10.0).repeat_interleave(200) * 100 + torch.rand(2000, generator=generator(0))
    found = score_of(order(x)[:, None], probabilities(0, 2000, 3), x[:, None], monkeypatch)
    assert found["recall"] > 0.7 and abs(found["KID"]) < 0.2 * (x ** 6).mean()


def test_a_measure_keeps_64_pictures_and_not_the_rest():
    """It goes into every checkpoint, and torch.save writes all that a view looks at."""
    x = torch.zeros(100, 1, 4, 4, dtype=torch.uint8)
    found = gan.measure(None, x, SimpleNamespace(x=x))
    assert found["pictures"].untyped_storage().nbytes() == 64 * 4 * 4
    assert found["nearest"].untyped_storage().nbytes() == 64 * 4 * 4
    assert found.keys() == {"n", "distance", "pictures", "nearest"}  # no metric, no scores
