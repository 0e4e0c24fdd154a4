"""Chapter 02: every loss is its formula, and every method moves G's pictures toward the data."""

import importlib
import itertools
import math
from statistics import fmean as mean
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from strategies import about, generator, normal, rejected, seeds

losses = importlib.import_module("02_gan_losses")
EPS = torch.finfo(torch.float64).eps
Z = 64  # length of z
sizes = st.integers(1, 8)


# --- the losses, against sums over Python numbers ----------------------------------------------

def scores(seed, n):
    return 3 * normal(seed, n), 3 * normal(seed + 1, n)


def cross_entropy(logits, y):
    """The mean of -y log σ(a) - (1 - y) log(1 - σ(a)), where -log σ(a) = log(1 + e^-a)."""
    return mean([y * math.log1p(math.exp(-a)) + (1 - y) * math.log1p(math.exp(a))
                 for a in logits.tolist()])


def bce_is_two_cross_entropies(bce_d, seed, n, real_label):
    real, fake = scores(seed, n)
    expected = cross_entropy(real, real_label) + cross_entropy(fake, 0)
    assert_close(bce_d(real, fake, real_label=real_label).item(), expected, rtol=100 * EPS, atol=0)


@about("bce_d")
@given(seeds(), sizes, st.sampled_from([0, 1, 0.9, 0.7]))
def test_bce_is_two_cross_entropies(seed, n, real_label):
    bce_is_two_cross_entropies(losses.bce_d, seed, n, real_label)


@pytest.mark.parametrize("twin", [
    lambda real, fake, real_label: losses.bce_d(fake, real, real_label),
    lambda real, fake, real_label: losses.bce_d(real, fake, real_label) / 2,
    lambda real, fake, real_label: losses.bce_d(real.sigmoid(), fake.sigmoid(), real_label)])
def test_wrong_cross_entropies_are_rejected(twin):
    assert rejected(bce_is_two_cross_entropies, twin, 0, 5, 1)


@about("bce_d")
@given(seeds(), st.sampled_from([0, 1, 0.9]), st.floats(0.1, 0.5))
def test_fuzzy_labels_are_uniform_around_the_label(seed, real_label, width):
    """The derivative of the loss in a logit a is (σ(a) - y) / n, which gives every label y away.

    The tolerance 0.07 fails once in 10^8 (Dvoretzky, Kiefer, Wolfowitz: 2 exp(-2 n 0.07²)).
    """
    n = 2000
    real, fake = (a.requires_grad_() for a in scores(seed, n))
    losses.bce_d(real, fake, real_label, width, generator(seed)).backward()
    for a, label in ((real, real_label), (fake, 0)):
        u = (a.sigmoid().detach() - n * a.grad - label) / width + 0.5
        assert -1e-5 <= u.min() and u.max() <= 1 + 1e-5  # labels may be sampled in float32
        assert (u.sort().values - (torch.arange(n) + 0.5) / n).abs().max() <= 0.07


@about("bce_d", edge=True)
@given(seeds(), st.floats(0, 1))
def test_labels_without_noise_draw_no_random_number(seed, real_label):
    """So that training with the plain loss is the same to the bit as without this flag."""
    before = torch.get_rng_state()
    losses.bce_d(*scores(seed, 4), real_label, label_noise=0.0)
    assert torch.equal(torch.get_rng_state(), before)


@about("bce_d")
def test_smoothing_cannot_go_below_the_entropy_of_the_label():
    sure_of_fakes = torch.tensor([-40.0]).double()
    lowest = min(losses.bce_d(real[None], sure_of_fakes, 0.9).item()
                 for real in torch.linspace(-20, 20, 401, dtype=torch.float64))
    entropy = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    assert entropy <= lowest < entropy + 1e-5 and f"{entropy:.4f}" == "0.3251"


@about("minimax_g", "nonsaturating_g", "lsgan_d", "lsgan_g", "wgan_d", "wgan_g", "ebgan_d",
       "began_d")
@given(seeds(), sizes)
def test_losses_of_scores_are_their_formulas(seed, n):
    real, fake = scores(seed, n)
    r, f = real.tolist(), fake.tolist()
    for got, expected in [
            (losses.minimax_g(fake), -cross_entropy(fake, 0)),
            (losses.nonsaturating_g(fake), cross_entropy(fake, 1)),
            (losses.lsgan_d(real, fake), mean([(a - 1) ** 2 + b ** 2 for a, b in zip(r, f)])),
            (losses.lsgan_g(fake), mean([(a - 1) ** 2 for a in f])),
            (losses.wgan_d(real, fake), mean(f) - mean(r)),
            (losses.wgan_g(fake), -mean(f)),
            (losses.ebgan_d(real ** 2, fake ** 2, 5.0),
             mean([a ** 2 + max(0, 5 - b ** 2) for a, b in zip(r, f)])),
            (losses.began_d(real ** 2, fake ** 2, 0.3),
             mean([a ** 2 - 0.3 * b ** 2 for a, b in zip(r, f)]))]:
        assert_close(got.item(), expected, rtol=0,
                     atol=8 * n * EPS * (1 + max(map(abs, r + f))) ** 2)


@about("bce_d", "minimax_g", "nonsaturating_g", edge=True)
def test_losses_of_a_d_that_is_sure_are_finite_and_exact():
    """log σ(-1000) is -1000; by way of σ, which is 0 there, it would be -inf."""
    sure = torch.tensor([1000.0])
    assert losses.nonsaturating_g(-sure).item() == 1000 and losses.nonsaturating_g(sure).item() == 0
    assert losses.minimax_g(sure).item() == -1000 and losses.minimax_g(-sure).item() == 0
    assert losses.bce_d(-sure, sure).item() == 2000 and losses.bce_d(sure, -sure).item() == 0


@about("began_convergence", "began_k")
@given(st.floats(0, 1), st.floats(0, 5), st.floats(0, 5), st.floats(0, 1), st.floats(0, 1))
def test_k_of_began_moves_toward_the_balance(k, real, fake, rate, gamma):
    """And the measure of convergence counts how far off the balance is."""
    errors, balance = torch.tensor([[real], [fake]], dtype=torch.float64), gamma * real - fake
    measure, new = losses.began_convergence(*errors, gamma), losses.began_k(k, *errors, rate, gamma)
    assert_close(measure, real + abs(balance), rtol=0, atol=50 * EPS)
    assert_close(new, min(1.0, max(0.0, k + rate * balance)), rtol=0, atol=50 * EPS)
    assert 0 <= new <= 1


@about("clip")
@given(seeds(), st.floats(0.01, 1))
def test_clipping_moves_what_is_outside_of_the_box_to_its_edge(seed, limit):
    torch.manual_seed(seed)
    net = nn.Linear(5, 1).double()  # its parameters start within 1 / √5 = 0.45
    expected = [min(max(a, -limit), limit) for p in net.parameters() for a in p.flatten().tolist()]
    losses.clip(net, limit)
    assert [a for p in net.parameters() for a in p.flatten().tolist()] == expected


# --- penalties ---------------------------------------------------------------------------------

def penalty_is_a_mean_over_examples(penalty, seed, n, of_norm):
    """The critic is linear on either side of 0 in the first pixel, gradients of norm ‖w_0‖, ‖w_1‖.

    This pixel is -10 or 10, so that no penalty looks across: dragan's moves it by 2.3 or less.
    """
    x, x_fake = normal(seed, n, 1, 3, 3), normal(seed + 1, n, 1, 3, 3)
    w = normal(seed + 2, 2, 9) / 3  # of norms around 1
    side = torch.arange(n) % 2
    x[:, 0, 0, 0] = x_fake[:, 0, 0, 0] = 20.0 * side - 10
    critic = lambda x: torch.where(x[:, 0, 0, 0] < 0, x.flatten(1) @ w[0], x.flatten(1) @ w[1])
    norms = [math.dist(w[i].tolist(), [0] * 9) for i in side]
    assert_close(penalty(critic, x, x_fake).item(), mean([of_norm(norm) for norm in norms]),
                 rtol=0, atol=100 * EPS * (1 + max(norms)) ** 2)


@about("gradient_norms", "gradient_penalty", "dragan_penalty", "r1_penalty")
@given(seeds(), sizes)
def test_penalties_are_means_over_examples(seed, n):
    for penalty, of_norm in [
            (lambda critic, x, _: losses.gradient_norms(critic, x).mean(), lambda norm: norm),
            (losses.gradient_penalty, lambda norm: (norm - 1) ** 2),
            (lambda critic, x, _: losses.dragan_penalty(critic, x), lambda norm: (norm - 1) ** 2),
            (lambda critic, x, _: losses.r1_penalty(critic, x), lambda norm: norm ** 2)]:
        penalty_is_a_mean_over_examples(penalty, seed, n, of_norm)


@pytest.mark.parametrize("twin", [
    lambda critic, x, _: len(x) * losses.r1_penalty(critic, x),           # a sum
    lambda critic, x, _: losses.gradient_norms(critic, x).mean() ** 2,    # not a mean of squares
    lambda critic, x, _: losses.gradient_norms(critic, x).norm() ** 2])   # one norm for all
def test_wrong_penalties_are_rejected(twin):
    assert rejected(penalty_is_a_mean_over_examples, twin, 0, 2, lambda norm: norm ** 2)


def places(penalty):
    """Where a penalty looks at its critic."""
    seen = []
    penalty(lambda x: (seen.append(x.detach()), x.flatten(1).sum(dim=1))[1])
    return torch.cat(seen)


@about("gradient_penalty")
@given(seeds())
def test_gradient_penalty_looks_between_each_real_and_its_fake(seed):
    """The fakes are the data moved by 1, so that x̂ is x_fake + α: one α for all pixels of one."""
    x, rng = normal(seed, 200, 1, 2, 3), generator(seed)
    x_hat = places(lambda critic: losses.gradient_penalty(critic, x, x - 1, rng=rng))
    alpha = (x_hat - (x - 1)).flatten(1)
    assert (alpha.amax(dim=1) - alpha.amin(dim=1)).max() <= 100 * EPS
    assert alpha.min() >= -100 * EPS and alpha.max() <= 1 + 100 * EPS
    # uniform: the error of a rank is above 0.25 once in 10^10 (as for fuzzy labels)
    rank = (torch.arange(200) + 0.5) / 200
    assert (alpha[:, 0].sort().values - rank).abs().max() <= 0.25


@about("dragan_penalty")
@given(seeds(), sizes)
def test_dragan_penalty_looks_near_the_data_alone(seed, n):
    """Each pixel is moved by another amount, at most half the standard deviation of its picture."""
    x, rng = normal(seed, n, 1, 2, 3), generator(seed)
    x_hat = places(lambda critic: losses.dragan_penalty(critic, x, rng=rng))
    moved, spread = (x_hat - x).flatten(1), x.flatten(1).std(1, keepdim=True, correction=0)
    assert moved.min() >= -10 * EPS and (moved <= spread / 2 + 10 * EPS).all()
    assert (moved.amax(dim=1) > moved.amin(dim=1)).all()


@about("dragan_penalty", edge=True)
@given(seeds(), sizes)
def test_a_picture_of_one_pixel_has_no_spread_and_is_not_moved(seed, n):
    x = normal(seed, n, 1)
    assert torch.equal(places(lambda critic: losses.dragan_penalty(critic, x)), x)


@about("gradient_norms", "gradient_penalty", "dragan_penalty", "r1_penalty", edge=True)
def test_a_flat_critic_has_penalty_one_and_a_finite_second_derivative():
    """The root of a sum of squares has an infinite derivative at 0, which would become nan."""
    x, w = normal(0, 3, 4), torch.zeros(4, dtype=torch.float64, requires_grad=True)
    critic = lambda x: x @ w
    for penalty, expected in ((losses.gradient_norms(critic, x).mean(), 0.0),
                              (losses.gradient_penalty(critic, x, -x), 1.0),
                              (losses.dragan_penalty(critic, x), 1.0),
                              (losses.r1_penalty(critic, x), 0.0)):
        assert penalty.item() == expected
        assert torch.autograd.grad(penalty, w)[0].isfinite().all()


@about("gradient_penalty", edge=True)
@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (4, 1, 2, 2), (0, 3, 2, 2)])
def test_fakes_of_another_shape_are_refused(shape):
    """They would broadcast: one fake for all reals, grey fakes for pictures in colour."""
    with pytest.raises(ValueError):
        losses.gradient_penalty(lambda x: x.flatten(1).sum(dim=1), torch.zeros(4, 3, 2, 2),
                                torch.zeros(shape))


@about("pull_away", edge=True)
@pytest.mark.parametrize("n", [0, 1])
def test_codes_without_pairs_are_refused(n):
    with pytest.raises(ValueError):
        losses.pull_away(torch.zeros(n, 3))


@about("pull_away")
@given(seeds(), st.integers(2, 6), st.integers(1, 6))
def test_pull_away_is_the_mean_squared_cosine_of_all_pairs(seed, n, d):
    codes = normal(seed, n, d)
    cosines = [F.cosine_similarity(codes[i], codes[j], dim=0).item() ** 2
               for i, j in itertools.permutations(range(n), 2)]
    assert_close(losses.pull_away(codes).item(), mean(cosines), rtol=0, atol=20 * n * d * EPS)
    assert_close(losses.pull_away(codes[:1].expand(n, d)).item(), 1.0, rtol=0, atol=20 * d * EPS)
    assert losses.pull_away(torch.eye(n).double()).item() == 0


@about("pull_away", edge=True)
@given(seeds(), st.sampled_from([1e20, 1e-25, 1e-40]), st.integers(2, 6))
def test_pull_away_does_not_depend_on_the_lengths_of_the_codes(seed, size, n):
    """In float32, where 1e20² and 1e-25² are inf and 0. 1e-40 has three digits: it is subnormal."""
    codes = normal(seed, n, 5).float()
    scale = torch.tensor([size, *[1.0] * (n - 1)])[:, None]
    tolerance = 1e-4 if size < 1e-38 else 1e-6
    assert_close(losses.pull_away(scale * codes), losses.pull_away(codes), rtol=0, atol=tolerance)
    assert_close(losses.pull_away(size * codes[:1].expand(n, 5)).item(), 1.0, rtol=0, atol=1e-6)


@about("pull_away", edge=True)
def test_a_code_of_zeros_is_orthogonal_to_all_and_has_a_finite_gradient():
    codes = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]], requires_grad=True)
    value = losses.pull_away(codes)
    assert_close(value.item(), 1 / 3)  # one of three pairs
    assert torch.autograd.grad(value, codes)[0].isfinite().all()


def mode_seeking_is_its_formula(mode_seeking, seed, n, d):
    (x1, x2), (z1, z2) = normal(seed, 2, n, d), normal(seed + 1, 2, n)
    x, z = (sum(abs(a - b) for a, b in zip(one.flatten().tolist(), two.flatten().tolist()))
            / one.numel() for one, two in ((x1, x2), (z1, z2)))
    assert_close(mode_seeking(x1, x2, z1, z2).item(), 1 / (x / z + 1e-5), rtol=100 * EPS, atol=0)


@about("mode_seeking")
@given(seeds(), sizes, st.integers(1, 4))
def test_mode_seeking_is_its_formula(seed, n, d):
    mode_seeking_is_its_formula(losses.mode_seeking, seed, n, d)


@pytest.mark.parametrize("twin", [
    lambda x1, x2, z1, z2: -losses.mode_seeking(x1, x2, z1, z2),
    lambda x1, x2, z1, z2: losses.mode_seeking(z1, z2, x1, x2),                # upside down
    lambda x1, x2, z1, z2: 1 / ((x1 - x2).norm() / (z1 - z2).norm() + 1e-5),   # Euclidean
    lambda x1, x2, z1, z2: losses.mode_seeking(x1, x2, z1 * len(z1), z2 * len(z2))])  # a sum
def test_wrong_mode_seeking_is_rejected(twin):
    assert rejected(mode_seeking_is_its_formula, twin, 0, 3, 2)


@about("mode_seeking")
@given(seeds())
def test_mode_seeking_falls_if_pictures_move_apart(seed):
    x1, x2, z1, z2 = (normal(seed + i, 3, 2) for i in range(4))
    further = losses.mode_seeking(x1 + 0.1 * (x1 - x2), x2, z1, z2)
    assert further < losses.mode_seeking(x1, x2, z1, z2)


@about("mode_seeking", edge=True)
def test_mode_seeking_of_equal_pictures_is_finite_and_other_shapes_are_refused():
    x, z = torch.ones(2, 3), torch.eye(2)
    assert losses.mode_seeking(x, x, z[:1], z[1:]).item() == pytest.approx(1e5)
    for case in ((x, x[:1], z, z), (x, x, z, z[:1])):
        with pytest.raises(ValueError):
            losses.mode_seeking(*case)


# --- the methods -------------------------------------------------------------------------------

def nets(name, c=1, side=28, classes=10, kind=None):
    """G and D of a method, with the default options."""
    args = SimpleNamespace(z_dim=Z, nets=kind or ("dense" if c * side ** 2 <= 1024 else "conv"),
                           width_g=None, width_d=None)
    return losses.build(args, losses.METHODS[name], c, side, classes)


class OneNumber:
    """A D that has learned, of pictures of one number x: 1 in data, -1 in fakes. Its score is x and
    its guess class 3; as an autoencoder its error is |x - 1| and its code x."""

    def __init__(self, name):
        self.autoencoder, self.k = losses.METHODS[name].code > 0, torch.tensor(0.5)

    def __call__(self, x, y=None):
        if self.autoencoder:
            return (x[:, 0] - 1).abs(), x
        return x[:, 0], 1.0 * F.one_hot(torch.full((len(x),), 3), 10)


@pytest.mark.parametrize("name", losses.METHODS)
def test_a_step_of_g_moves_its_picture_toward_the_data(name):
    """Minimising G's loss must raise its numbers, and D's loss must tell data and fakes apart.

    progress = 1: at the start began pushes pictures apart instead. z: nearly the same for both, so
    that mode seeking is content.
    """
    method, z = losses.METHODS[name], torch.tensor([[0.0], [1e-6]])
    D, y = OneNumber(name), F.one_hot(torch.tensor([3, 3]), 10).float()
    x, x_fake = torch.tensor([[1.0], [1.1]]), torch.tensor([[-1.0], [-1.2]], requires_grad=True)
    derivative, = torch.autograd.grad(method.loss_g(D, x_fake, y, z, 1.0), x_fake)
    x_fake = x_fake.detach()
    assert (derivative < 0).all()
    assert method.loss_d(D, x, x_fake, y) < method.loss_d(D, x_fake, x, y)


@pytest.mark.parametrize("name, plain", [("wgan-gp", "wgan"), ("dragan", "nonsaturating")])
def test_penalties_are_added_to_the_loss_of_d_with_their_weights(name, plain, monkeypatch):
    """D(x) = w x: λ (‖w‖ - 1)², between data and fakes or near data alone: the same for a line."""
    monkeypatch.setattr(losses, "LAMBDA", 3.0)  # not 1, which would hide that it is missing
    w, x, x_fake = normal(0, 9), normal(1, 3, 9), normal(2, 3, 9)
    D, y = lambda x, y: (x @ w, None), torch.zeros(3, 0)
    got, without = (losses.METHODS[n].loss_d(D, x, x_fake, y) for n in (name, plain))
    assert_close((got - without).item(), 3 * (w.norm().item() - 1) ** 2, rtol=0, atol=1000 * EPS)


@pytest.mark.parametrize("n", [4, 5])
def test_mode_seeking_compares_the_halves_of_a_batch(n, monkeypatch):
    """The last picture of an odd batch has no partner."""
    monkeypatch.setattr(losses, "LAMBDA_MS", 3.0)
    D, x, z = (lambda x, y=None: (x.sum(dim=1), None)), normal(0, n, 6), normal(1, n, 2)
    got, plain = (losses.METHODS[name].loss_g(D, x, None, z, 0.0)
                  for name in ("mode-seeking", "nonsaturating"))
    assert_close(got - plain, 3 * losses.mode_seeking(x[:2], x[2:4], z[:2], z[2:4]))


@pytest.mark.parametrize("name, loss_d, k, weights", [
    ("ebgan", 0.15 + (losses.MARGIN - 0.1) / 2, 0.5, [1.0, 1.0, 1.0]),
    ("began", 0.15 - 0.5 * 0.3, 0.5 + losses.LAMBDA_K * (losses.GAMMA * 0.15 - 0.3),
     [2.5, 1.25, 0.0])])
def test_losses_of_autoencoders_have_their_constants_in_them(name, loss_d, k, weights):
    """Errors: 0.1, 0.2 of data, 0.1, 0.5 of fakes. Codes of one number are parallel, so that
    pull_away is 1; its weights: at the start of the training, in the middle, at the end."""
    method, D, y = losses.METHODS[name], OneNumber(name), torch.zeros(2, 0)
    x, x_fake = torch.tensor([[1.1], [0.8]]), torch.tensor([[1.1], [0.5]])
    got = [method.loss_d(D, x, x_fake, y), D.k,
           *(method.loss_g(D, x_fake, y, None, progress) for progress in (0.0, 0.5, 1.0))]
    expected = [loss_d, k, *(0.3 + weight for weight in weights)]
    assert_close(torch.stack(got), torch.tensor(expected), rtol=0, atol=1e-6)  # float32 near 1


def test_the_code_of_infogan_teaches_both_g_and_q(monkeypatch):
    """The gradient of log Q(c | G(z, c)) reaches the weights of Q and those of G."""
    monkeypatch.setattr(losses, "nonsaturating_g", lambda fake: 0 * fake.sum())  # the code's alone
    torch.manual_seed(0)
    (G, D), z, y = nets("infogan"), torch.randn(4, Z), F.one_hot(torch.arange(4), 10).float()
    losses.METHODS["infogan"].loss_g(D, G(losses.with_labels(z, y)), y, z, 0.0).backward()
    assert G[0].weight.grad.abs().sum() > 0 and D.guess.weight.grad.abs().sum() > 0
    code = G[0].weight.grad[:, Z:]
    assert (code[:, :4].abs().sum(0) > 0).all() and (code[:, 4:] == 0).all()  # of the codes used


@pytest.mark.parametrize("name, guesses_data", [("acgan", True), ("infogan", False)])
def test_what_d_guesses_is_in_the_losses_for_each_picture_with_its_own_label(
        name, guesses_data, monkeypatch):
    """acgan: of data and of fakes; infogan: of fakes alone, for data has no code.

    A picture is its label here, and D guesses it right; other: the labels in another order.
    """
    monkeypatch.setattr(losses, "nonsaturating_g", lambda fake: 0.0)
    method, D = losses.methods(lambda *scores: 0.0)[name], lambda x, y=None: (x.sum(dim=1), 50 * x)
    y = F.one_hot(torch.tensor([3, 1, 2]), 4).float()
    other = y.roll(1, dims=0)
    assert method.loss_d(D, y, y, y) < 1e-6 and method.loss_g(D, y, y, None, 0.0) < 1e-6
    assert method.loss_d(D, y, other, y) > 10 and method.loss_g(D, other, y, None, 0.0) > 10
    assert (method.loss_d(D, other, y, y) > 10) == guesses_data


def test_a_conditional_d_asks_for_the_label():
    """The score of cgan is score + guess[y]; that of acgan, which guesses y, does without it."""
    torch.manual_seed(0)
    x, y = torch.randn(3, 1, 28, 28), torch.tensor([2, 0, 3])
    for name, weight in (("cgan", 1), ("acgan", 0)):
        _, D = nets(name)
        h = D.trunk(x)
        expected = [D.score(h)[i, 0] + weight * D.guess(h)[i, y[i]] for i in range(3)]
        assert_close(D(x, F.one_hot(y, 10))[0], torch.stack(expected))


def test_g_sees_the_labels_of_the_data_and_that_of_infogan_made_up_ones():
    torch.manual_seed(0)
    x, classes = torch.zeros(300, 1), torch.arange(300) % 3
    labels = lambda name, y: losses.labels_for_g(losses.METHODS[name].labels, x, y, 3)
    for name, seen in (("minimax", 0), ("cgan", 3), ("infogan", 3)):
        assert nets(name, classes=3)[0][0].in_features == Z + seen
        assert labels(name, classes).shape == (300, seen)
    assert torch.equal(labels("cgan", classes), torch.eye(3)[classes])
    y = labels("infogan", None)  # it needs no labels
    assert torch.equal(y.sort(dim=1).values, torch.tensor([[0.0, 0, 1]]).expand(300, 3))
    assert (y.mean(dim=0) - 1 / 3).abs().max() < 6 * (2 / 9 / 300) ** 0.5  # 6 standard errors


def test_adam_hides_a_small_slope_and_a_larger_eps_does_not():
    """Its first step is rate g / (|g| + eps): full for g = 1e-6 and torch's eps of 1e-8."""
    for eps, expected in ((1e-8, 0.99), (losses.METHODS["minimax-ahead"].eps, 3.3e-4)):
        p = torch.zeros(1, requires_grad=True)
        p.grad = torch.tensor([1e-6])
        torch.optim.Adam([p], lr=1.0, betas=(0.0, 0.9), eps=eps).step()
        assert_close(-p.item(), expected, rtol=0.02, atol=0)


def scores_stand_alone(score, c, side):
    """The score of a picture in a batch is its score alone, while training (dropout is off)."""
    x, y = torch.randn(4, c, side, side), torch.eye(10)[:4]
    together, alone = score(x, y), torch.cat([score(x[i:i + 1], y[i:i + 1]) for i in range(4)])
    assert together.shape == (4,)
    # float32 sums of up to side² c 16 terms of size 1 or less, in another order
    assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, c, side", [("minimax", 1, 28), ("minimax", 3, 64), ("cgan", 3, 32),
                                           ("ebgan", 1, 28), ("ebgan", 3, 64)])
def test_scores_of_d_do_not_depend_on_the_rest_of_the_batch(name, c, side):
    """So there is no batch norm in D: with it no per-example penalty and no honest score."""
    torch.manual_seed(0)
    G, D = nets(name, c, side)
    scores_stand_alone(lambda x, y: D(x, y)[0], c, side)
    x = G(torch.randn(4, Z + 10 * (name == "cgan")))
    assert x.shape == (4, c, side, side) and x.abs().max() <= 1


def test_a_d_with_batch_norm_is_rejected():
    torch.manual_seed(0)
    _, D = nets("minimax", 3, 32)  # of convolutions
    D.trunk.insert(1, nn.BatchNorm2d(32))
    assert rejected(scores_stand_alone, lambda x, y: D(x)[0], 3, 32)


@pytest.mark.parametrize("name, d", [("ebgan", 64), ("began", 16)])
def test_the_score_of_an_autoencoder_is_the_root_of_its_mean_squared_error(name, d):
    torch.manual_seed(0)
    _, D = nets(name)
    x = torch.randn(2, 1, 28, 28)
    error, codes = D(x)
    assert codes.shape == (2, d)
    assert_close(error ** 2, ((x - D.decode(codes)) ** 2).mean(dim=(1, 2, 3)))


# --- broken on purpose, and what the log tells of it -------------------------------------------

@pytest.mark.parametrize("real, fake, loss_g, real_label, cause", [
    (0.0, 0.0, "nonsaturating_g", 1.0, "1/2"),
    (math.log(9), -30.0, "nonsaturating_g", 0.9, "entropy"),  # σ(log 9) = 0.9
    (30.0, -30.0, "minimax_g", 1.0, "no gradient")])
def test_fingerprints_know_their_losses(real, fake, loss_g, real_label, cause):
    """A D without weights, and two perfect ones: their losses are computed, then recognised."""
    real, fake = torch.tensor([[real], [fake]])
    d, g = losses.bce_d(real, fake, real_label).item(), getattr(losses, loss_g)(fake).item()
    assert cause in losses.fingerprint(d, g, real_label)
    assert losses.fingerprint(d + 0.1, g, real_label) is None


@pytest.mark.parametrize("real_label, d", [(1.0, "1.0064"), (0.9, "1.1064"), (0.3, "1.3863")])
def test_fingerprints_of_two_sigmoids_for_every_label(real_label, d):
    """Of all "logits" in [0, 1] the best for data and fakes are searched for, then recognised.

    For a label below 1/2 the best is 0 for both, as if D said 1/2 to all.
    """
    line = torch.linspace(0, 1, 101).split(1)
    real = min(line, key=lambda a: losses.bce_d(a, line[0], real_label))
    fake = min(line, key=lambda a: losses.bce_d(line[0], a, real_label))
    loss_d, loss_g = (loss.item() for loss in (losses.bce_d(real, fake, real_label),
                                               losses.nonsaturating_g(fake)))
    assert (f"{loss_d:.4f}", f"{loss_g:.4f}") == (d, "0.6931")
    for scale, one in itertools.product((1.0, 0.5), (loss_g, losses.minimax_g(fake).item())):
        told = losses.fingerprint(scale * loss_d, one, real_label)
        assert ("twice" if real_label > 0.5 else "1/2") in told
        assert ("halves" in told) == (scale == 0.5)


def test_a_frozen_log_is_named_once(capsys):
    """Three rows with the same fingerprint: named at the third, not before and not again."""
    frozen, moving = {"loss_d": 1.0064, "loss_g": 0.6931}, {"loss_d": 1.2, "loss_g": 0.9}
    log = [row | {"model": "m", "step": 9} for row in [moving, *3 * [frozen], moving,
                                                       *4 * [frozen]]]
    run, args = SimpleNamespace(name="m", extra={}), SimpleNamespace(real_label=1.0)
    named, x = [], torch.rand(2, 1, 3, 3)
    for n in range(1, len(log) + 1):
        run.rows = log[:n]
        losses.tell_causes(run, args, losses.METHODS["minimax"], x, x)
        named.append("step 9: 1.0064, 0.6931: a sigmoid applied twice" in capsys.readouterr().out)
    assert named == [n == 4 for n in range(1, len(log) + 1)]


@pytest.mark.parametrize("mistake", losses.MISTAKES)
def test_each_mistake_leaves_its_trace(mistake):
    """Scores x: of data 100, of fakes -100, then 0 for both.

    double-sigmoid: log(1 + 1/e) + log 2 at least; a mean starts at log 2, not at 2 log 2; squared
    errors of a sigmoid: 0, and G's loss is 1 and has no derivative.
    """
    x, x_fake, D = torch.tensor([[100.0]]), torch.tensor([[-100.0]]), lambda x, y: (x[:, 0], None)
    x_fake.requires_grad_()
    method = losses.broken(losses.METHODS[losses.MISTAKES[mistake][0]], mistake)
    d, g = method.loss_d(D, x, x_fake, None).item(), method.loss_g(D, x_fake, None, None, 0.0)
    start = method.loss_d(D, 0 * x, 0 * x_fake, None).item()
    derivative = torch.autograd.grad(g, x_fake)[0].abs()
    told = losses.fingerprint(d, g.item())
    if mistake == "double-sigmoid":
        assert d == pytest.approx(1.00641, abs=1e-5) and "twice" in told and derivative < 1e-30
    elif mistake == "averaged-log":
        assert start == pytest.approx(math.log(2)) and derivative < 1e-30  # of minimax
        assert "halves" in losses.fingerprint(math.log(2), math.log(2))
    else:
        assert (d, g) == (0, 1) and "squared errors of a sigmoid" in told and derivative < 1e-30


@pytest.mark.parametrize("mistake, derivative", [
    (None, 0.8808), ("double-sigmoid", 0.0494), ("averaged-log", 0.8808)])
def test_readings_are_those_of_d_as_it_is(mistake, derivative):
    """Logits 2 of data, -2 of fakes: D says σ(2) = 0.8808 and 0.1192 = s also if its last layer is
    the sigmoid. Nonsaturating: 1 - s; σ twice: (1 - σ(s)) s (1 - s)."""
    method = losses.METHODS["nonsaturating"]
    method = losses.broken(method, mistake) if mistake else method
    G = nn.Linear(1, 1)
    G(torch.ones(1, 1)).backward()
    got = losses.readings(method, G, lambda x, y: (x[:, 0].clone(), None), torch.full((3, 1), 2.0),
                          torch.full((3, 1), -2.0), None, None)
    assert [f"{got[key]:.4f}" for key in ("D(x)", "D(G(z))", "derivative")] == [
        "0.8808", "0.1192", f"{derivative:.4f}"]
    assert got["gradient"] == pytest.approx(2 ** 0.5)  # of the weight and the bias, 1 each


def test_constant_pixels_and_other_sizes_are_told():
    x, x_fake = torch.rand(8, 1, 5, 5) - 2, torch.rand(8, 1, 5, 5)
    x[0, 0, 0, :2] = -1.0
    assert losses.output_fault(x, x_fake) is None and losses.output_fault(x, x_fake[:1]) is None
    x_fake[:, :, :, 4] = 0.5
    assert "20.0% of G's pixels are the same for every z: 0.5, " in losses.output_fault(x, x_fake)
    assert "(1, 5, 5), G generates (1, 4, 5)" in losses.output_fault(x, x_fake[:, :, :4])


# --- measures ----------------------------------------------------------------------------------

@given(seeds(), st.integers(1, 40))
def test_measure_counts_copies_of_training_pictures(seed, n):
    """Copies of training pictures, asked for with labels that are right for some of them."""
    x = torch.randint(256, (60, 1, 4, 4), dtype=torch.uint8, generator=generator(seed))
    images = SimpleNamespace(x=x, y=torch.arange(60) % 10, name="noise")
    chosen, asked = torch.randint(60, (2, n), generator=generator(seed))
    copies, asked, found = x[chosen] / 127.5 - 1, asked % 10, (chosen % 10).tolist()
    numbers = losses.measure(copies, asked, images, "data")
    assert numbers["classes"] == len(set(found)) and numbers["distance"] < 1e-3
    right = mean([f == a for f, a in zip(found, asked.tolist())])
    assert_close(numbers["label accuracy"], right)
    shares = [found.count(i) / n for i in set(found)]
    assert_close(numbers["kl"], sum(p * math.log(10 * p) for p in shares), rtol=1e-9, atol=1e-12)
    assert "label accuracy" not in losses.measure(copies, asked, images)
    # made-up labels may stand for other classes: shift all by one
    assert losses.measure(copies, (chosen + 1) % 10, images, "made up")["label accuracy"] == 1


@given(seeds(), st.integers(1, 40))
def test_a_made_up_label_stands_for_the_class_that_most_of_its_pictures_have(seed, n):
    y, found = torch.randint(4, (2, n), generator=generator(seed))
    pairs = list(zip(y.tolist(), found.tolist()))
    most = sum(max(pairs.count((code, label)) for label in range(4)) for code in range(4))
    made_up = losses.label_accuracy(y, found, made_up=True)
    assert_close(made_up, most / n, rtol=1e-6, atol=0)
    assert losses.label_accuracy(y, found) <= made_up + 1e-6


@given(seeds(), st.integers(1, 3), st.integers(0, 6))
def test_specks_are_lone_pixels(seed, c, n):
    """n lone pixels on a smooth background. Edges of a square are none, nor is a corner pixel."""
    x = torch.linspace(-1, -0.5, 400).view(1, 1, 20, 20).repeat(2, c, 1, 1)
    x[1, 0, 5:12, 5:12] = 1.0
    places = torch.randperm(49, generator=generator(seed))[:n]
    x[0, 0, 1 + 2 * (places // 7), 1 + 2 * (places % 7)] = 1.0
    x[1, 0, 0, 0] = 1.0
    x[1, 0, 4, 5:12] = 0.2  # between black and white there is grey
    assert losses.specks(x) == losses.specks(-x) == n / 2  # light or dark
