"""Chapter 02: every loss against an oracle, every G step toward the data, a kill loses nothing."""

import argparse
import csv
import importlib
import itertools
import math
import re
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import common
from harness import (all_white, folder_of_pictures, killed_after, one_line, rejected, results,
                     same)
from strategies import generator, normal, seeds

losses = importlib.import_module("02_gan_losses")
EPS = torch.finfo(torch.float64).eps
Z = 64  # default of --z-dim
HIDDEN_G = losses.HIDDEN_G  # before small_runs
sizes = st.integers(1, 8)


def mean(values):
    return sum(values) / len(values)


# --- the losses, against sums over Python numbers ----------------------------------------------

def scores(seed, n):
    return 3 * normal(seed, n), 3 * normal(seed + 1, n)


def cross_entropy(a, y):
    """-y log σ(a) - (1 - y) log(1 - σ(a)) of one number."""
    p = 1 / (1 + math.exp(-a))
    return -y * math.log(p) - (1 - y) * math.log1p(-p)


def bce_is_two_cross_entropies(bce_d, seed, n, real_label):
    """1 - σ(a) loses e^|a| <= e^12 or so in the oracle: tolerance 1e6 EPS."""
    real, fake = scores(seed, n)
    fake_label = {0: 1, 1: 0}.get(real_label, 0)
    expected = (mean([cross_entropy(a, real_label) for a in real.tolist()])
                + mean([cross_entropy(a, fake_label) for a in fake.tolist()]))
    assert_close(bce_d(real, fake, real_label=real_label).item(), expected, rtol=1e6 * EPS, atol=0)


@given(seeds(), sizes, st.sampled_from([0, 1, 0.9, 0.7]))
def test_bce_is_two_cross_entropies(seed, n, real_label):
    bce_is_two_cross_entropies(losses.bce_d, seed, n, real_label)


@pytest.mark.parametrize("twin", [
    lambda real, fake, real_label: losses.bce_d(fake, real, real_label),
    lambda real, fake, real_label: losses.bce_d(real, fake, real_label) / 2,
    lambda real, fake, real_label: losses.bce_d(real.sigmoid(), fake.sigmoid(), real_label)])
def test_wrong_cross_entropies_are_rejected(twin):
    assert rejected(bce_is_two_cross_entropies, twin, 0, 5, 1)


@given(seeds(), sizes, st.floats(0, 1), st.floats(0, 0.5))
def test_fuzzy_labels_are_uniform_around_the_label_reals_first(seed, n, real_label, width):
    """The same draws by hand: all labels of the reals, then all of the fakes."""
    real, fake = scores(seed, n)
    rng = generator(seed)
    fake_label = 1 - real_label if real_label in (0, 1) else 0
    y = real_label + width * (torch.rand(n, generator=rng) - 0.5)
    y_fake = fake_label + width * (torch.rand(n, generator=rng) - 0.5)
    expected = sum(mean([(1 - t) * a + math.log1p(math.exp(-a))
                         for a, t in zip(scores.tolist(), labels.tolist())])
                   for scores, labels in ((real, y), (fake, y_fake)))
    got = losses.bce_d(real, fake, real_label, width, generator=generator(seed))
    # labels are drawn in float32 and their sum with real_label may be rounded there: 1e-7 |a|
    largest = (real.abs().max() + fake.abs().max()).item()
    assert_close(got.item(), expected, rtol=0, atol=1e-6 * (1 + largest))


def test_smoothing_cannot_go_below_the_entropy_of_the_label():
    a = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    lowest = min(losses.bce_d(one[None], torch.tensor([-40.0]).double(), 0.9).item() for one in a)
    entropy = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    assert entropy <= lowest < entropy + 1e-5 and f"{entropy:.4f}" == "0.3251"


@given(seeds(), sizes)
def test_scores_losses_are_their_formulas(seed, n):
    real, fake = scores(seed, n)
    r, f = real.tolist(), fake.tolist()
    for got, expected in [
            (losses.minimax_g(fake), mean([-math.log1p(math.exp(a)) for a in f])),
            (losses.nonsaturating_g(fake), mean([math.log1p(math.exp(-a)) for a in f])),
            (losses.lsgan_d(real, fake),
             mean([(a - 1) ** 2 for a in r]) + mean([a ** 2 for a in f])),
            (losses.lsgan_g(fake), mean([(a - 1) ** 2 for a in f])),
            (losses.wgan_d(real, fake), mean(f) - mean(r)),
            (losses.wgan_g(fake), -mean(f)),
            (losses.ebgan_d(real ** 2, fake ** 2, 5.0),
             mean([a ** 2 for a in r]) + mean([max(0, 5 - a ** 2) for a in f])),
            (losses.began_d(real ** 2, fake ** 2, 0.3),
             mean([a ** 2 for a in r]) - 0.3 * mean([a ** 2 for a in f]))]:
        assert_close(got.item(), expected, rtol=0,
                     atol=8 * n * EPS * (1 + max(map(abs, r + f))) ** 2)


def test_losses_of_a_d_that_is_sure_are_finite_and_exact():
    """log σ(-1000) is -1000; by way of σ, which is 0 there, it would be -inf."""
    sure = torch.tensor([1000.0])
    assert losses.nonsaturating_g(-sure).item() == 1000 and losses.nonsaturating_g(sure).item() == 0
    assert losses.minimax_g(sure).item() == -1000 and losses.minimax_g(-sure).item() == 0
    assert losses.bce_d(-sure, sure).item() == 2000 and losses.bce_d(sure, -sure).item() == 0


@given(st.floats(0, 5), st.floats(0, 5), st.floats(0, 1))
def test_began_has_converged_when_data_is_coded_and_the_balance_is_met(real, fake, gamma):
    measure = losses.began_convergence(*torch.tensor([[real], [fake]], dtype=torch.float64), gamma)
    assert_close(measure, real + abs(gamma * real - fake), rtol=0, atol=50 * EPS)


@given(st.floats(0, 1), st.floats(0, 5), st.floats(0, 5), st.floats(0, 1), st.floats(0, 1))
def test_began_moves_k_toward_the_balance_and_keeps_it_in_zero_to_one(k, real, fake, rate, gamma):
    errors = torch.tensor([[real], [fake]], dtype=torch.float64)
    new = losses.began_k(k, *errors, rate, gamma)
    assert 0 <= new <= 1
    wanted = k + rate * (gamma * real - fake)
    assert_close(new, min(1.0, max(0.0, wanted)), rtol=0, atol=16 * EPS)


# --- penalties ---------------------------------------------------------------------------------

def smooth_critic(seed, d):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(d, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0))
    return net.double()


@given(seeds(), sizes)
def test_penalty_of_a_linear_critic(seed, n):
    """‖∇‖ = ‖w‖ everywhere: (‖w‖ - 1)² for wgan-gp and dragan, ‖w‖² for R1."""
    x, x_fake, w = normal(seed, n, 1, 3, 3), normal(seed + 1, n, 1, 3, 3), normal(seed + 2, 9)
    critic = lambda x: x.flatten(1) @ w
    size = math.dist(w.tolist(), [0] * 9)
    rounding = 50 * EPS * (1 + size) ** 2
    for got, expected in [
            (losses.gradient_penalty(critic, x, x_fake), (size - 1) ** 2),
            (losses.dragan_penalty(critic, x), (size - 1) ** 2),
            (losses.r1_penalty(critic, x), size ** 2)]:
        assert_close(got.item(), expected, rtol=0, atol=rounding)


def penalty_is_the_mean_over_examples(penalty, seed):
    """The batch of two is the mean of two batches of one, for the same α (one for each example)."""
    x, x_fake = normal(seed, 2, 4), normal(seed + 1, 2, 4)
    critic = smooth_critic(seed, 4)
    together = penalty(critic, x, x_fake, generator(seed))
    rng = generator(seed)  # draws α of the first, then of the second
    alone = [penalty(critic, x[i:i + 1], x_fake[i:i + 1], rng) for i in range(2)]
    assert_close(together, (alone[0] + alone[1]) / 2, rtol=0, atol=100 * EPS)


def gp(critic, x, x_fake, rng):
    return losses.gradient_penalty(critic, x, x_fake, generator=rng)


@given(seeds())
def test_penalties_are_means_over_examples(seed):
    penalty_is_the_mean_over_examples(gp, seed)
    penalty_is_the_mean_over_examples(lambda critic, x, *_: losses.r1_penalty(critic, x), seed)


@pytest.mark.parametrize("twin", [
    lambda critic, x, x_fake, rng: len(x) * gp(critic, x, x_fake, rng),      # a sum
    lambda critic, x, x_fake, rng: (torch.autograd.functional.jacobian(      # one norm for all
        lambda x: critic(x).sum(), x).norm() - 1) ** 2])
def test_wrong_penalties_are_rejected(twin):
    assert rejected(penalty_is_the_mean_over_examples, twin, 0)


@given(seeds(), sizes)
def test_penalties_look_where_they_should(seed, n):
    """wgan-gp between a real and its fake, on one line for all pixels; dragan near reals alone."""
    x, x_fake = normal(seed, n, 1, 2, 3), normal(seed + 1, n, 1, 2, 3)
    seen = []

    def spy(x):
        seen.append(x.detach())
        return x.flatten(1).sum(1)
    losses.gradient_penalty(spy, x, x_fake)
    alpha = ((seen[0] - x_fake) / (x - x_fake)).flatten(1)
    slack = 100 * EPS * ((x.abs() + x_fake.abs()) / (x - x_fake).abs()).max()
    assert (alpha.amax(1) - alpha.amin(1)).max() <= slack
    assert alpha.min() >= -slack and alpha.max() <= 1 + slack
    losses.dragan_penalty(spy, x)
    moved = (seen[1] - x).flatten(1)
    spread = x.flatten(1).std(1, keepdim=True, correction=0)
    assert moved.min() >= 0 and (moved <= spread / 2 + 10 * EPS).all()
    one_pixel = normal(seed, n, 1)  # it has no spread, so the penalty looks at the data itself
    losses.dragan_penalty(spy, one_pixel)
    assert torch.equal(seen[2], one_pixel)


@given(seeds())
def test_a_flat_critic_has_penalty_one_and_a_finite_second_derivative(seed):
    critic = smooth_critic(seed, 4)
    nn.init.zeros_(critic[3].weight)
    x = normal(seed, 3, 4)
    for penalty, expected in ((losses.gradient_penalty(critic, x, -x), 1.0),
                              (losses.dragan_penalty(critic, x), 1.0),
                              (losses.r1_penalty(critic, x), 0.0)):
        assert penalty.item() == expected
        grads = torch.autograd.grad(penalty, tuple(critic.parameters()), allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in grads)


def test_sizes_that_do_not_fit_are_refused():
    """They would broadcast: a fake for all reals, grey fakes for pictures in colour."""
    critic, x = lambda x: x.flatten(1).sum(dim=1), torch.zeros(4, 3, 2, 2)
    for x_fake in (x[:1], x[:, :1], x[:0]):
        with pytest.raises(ValueError, match=rf"\(4, 3, 2, 2\).*\({len(x_fake)}, "):
            losses.gradient_penalty(critic, x, x_fake)
    for n in (0, 1):
        with pytest.raises(ValueError, match=rf"no pairs in codes \({n}, 3\)"):
            losses.pull_away(torch.zeros(n, 3))


@given(seeds(), st.integers(2, 6), st.integers(1, 6))
def test_pull_away_is_the_mean_squared_cosine_of_all_pairs(seed, n, d):
    codes = normal(seed, n, d)
    cosines = [F.cosine_similarity(codes[i], codes[j], dim=0).item() ** 2
               for i, j in itertools.permutations(range(n), 2)]
    assert_close(losses.pull_away(codes).item(), mean(cosines), rtol=0, atol=20 * n * d * EPS)
    assert_close(losses.pull_away(codes[:1].expand(n, d)).item(), 1.0, rtol=0, atol=20 * d * EPS)
    assert losses.pull_away(torch.eye(n).double()).item() == 0


# --- the methods -------------------------------------------------------------------------------

def made(name, real_label=1.0, **attributes):
    """A method of the table with its default options, with other attributes if some are given."""
    kind = type(name, (losses.METHODS[name],), attributes)
    return kind(argparse.Namespace(real_label=real_label, label_noise=0.0, z_dim=Z, nets=None,
                                   width_g=None, width_d=None), 10)


class OneNumber:
    """A D that has learned: of pictures of one number x, data at +1 and fakes at -1, it says the
    score x, or as an autoencoder the error |x - 1|; its guess is that of class 3, or its code x."""
    k = torch.tensor(0.5)

    def __init__(self, method):
        self.autoencoder = isinstance(method, losses.EBGAN)

    def __call__(self, x):
        if self.autoencoder:
            return (x[:, 0] - 1).abs(), x
        return x[:, 0], 1.0 * F.one_hot(torch.full((len(x),), 3), 10)


@pytest.mark.parametrize("name", losses.METHODS)
def test_a_step_of_g_moves_its_picture_toward_the_data(name):
    """Descending G's loss must move its pictures to the right, D's must tell the two apart.

    began pushes pictures apart at first: at the end of the training, when the push is over.
    """
    method = made(name)
    D = OneNumber(method)
    y = F.one_hot(torch.tensor([3, 3]), 10).float()[:, :10 * method.sees_labels]
    x, x_fake = torch.tensor([[1.0], [1.1]]), torch.tensor([[-1.0], [-1.2]], requires_grad=True)
    slope, = torch.autograd.grad(method.loss_g(D, x_fake, y, progress=1.0), x_fake)
    assert (slope < 0).all()
    x_fake = x_fake.detach()
    assert method.loss_d(D, x, x_fake, y) < method.loss_d(D, x_fake, x, y)


def scores_stand_alone(score, c, side):
    """The score of a picture in a batch is its score alone, while training (dropout is off)."""
    x, y = torch.randn(4, c, side, side), torch.eye(10)[:4]
    together, alone = score(x, y), torch.cat([score(x[i:i + 1], y[i:i + 1]) for i in range(4)])
    assert together.shape == (4,)
    # float32 sums of up to side² c 16 terms of size 1 or less, in another order
    assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["minimax", "cgan", "ebgan"])
@pytest.mark.parametrize("c, side", [(1, 28), (3, 32), (3, 64)])
def test_scores_of_d_do_not_depend_on_the_rest_of_the_batch(name, c, side):
    """So there is no batch norm in D: with it no per-example penalty and no honest score."""
    torch.manual_seed(0)
    method = made(name)
    G, D = method.nets(c, side)
    scores_stand_alone(lambda x, y: method.score(D, x, y), c, side)
    x = G(torch.randn(4, Z + 10 * (name == "cgan")))
    assert x.shape == (4, c, side, side) and x.abs().max() <= 1


def test_a_d_with_batch_norm_is_rejected():
    torch.manual_seed(0)
    _, D = made("minimax").nets(3, 32)  # of convolutions
    D.trunk.insert(1, nn.BatchNorm2d(32))
    assert rejected(scores_stand_alone, lambda x, y: D(x)[0], 3, 32)


def test_the_code_of_infogan_teaches_both_g_and_q():
    """The gradient of log Q(c | G(z, c)) reaches the weights of Q and every weight of G."""
    torch.manual_seed(0)
    method = made("infogan", g=staticmethod(lambda fake: 0 * fake.sum()))  # the code's part alone
    G, D = method.nets(1, 28)
    y = F.one_hot(torch.arange(4), 10).float()
    x_fake = G(losses.with_labels(torch.randn(4, Z), y))
    method.loss_g(D, x_fake, y, progress=0.0).backward()
    assert all(p.grad.abs().sum() > 0 for p in [*G.parameters()][:1] + [D.guess.weight])
    code = G[0].weight.grad[:, Z:]
    assert (code[:, :4].abs().sum(0) > 0).all() and (code[:, 4:] == 0).all()  # of the codes used


@pytest.mark.parametrize("name", ["infogan", "acgan"])
def test_what_d_guesses_is_in_its_loss_too(name):
    """acgan: of data and of fakes; infogan: of fakes alone, for data has no code."""
    method = made(name, d=staticmethod(lambda real, fake: 0 * fake.sum()))
    y = F.one_hot(torch.tensor([3, 3]), 10).float()
    wrong = F.one_hot(torch.tensor([4, 4]), 10).float()
    x = torch.ones(2, 1)

    class Knows(OneNumber):
        def __call__(self, x):
            guess = 50.0 * F.one_hot(torch.tensor([3, 3, 5, 5] if both_right is None else
                                                  [3, 3, 3, 3]), 10)
            return x[:, 0], guess
    both_right = True
    assert method.loss_d(Knows(method), x, -x, y).item() < 1e-6
    assert method.loss_d(Knows(method), x, -x, wrong).item() > 10
    both_right = None  # fakes guessed wrong
    assert method.loss_d(Knows(method), x, -x, y).item() > 10


@given(seeds())
def test_penalties_are_added_to_the_loss_of_d_with_their_weights(seed):
    """D(x) = w x: λ (‖w‖ - 1)², between data and fakes or near data alone: the same for a line."""
    w, x, x_fake = (common.to_float(torch.randint(256, (3, 9), generator=generator(seed)))
                    for _ in range(3))
    D, y = lambda x: (x @ w[0], None), torch.zeros(3, 0)
    for name, plain in (("wgan-gp", "wgan"), ("dragan", "nonsaturating")):
        got = made(name).loss_d(D, x, x_fake, y) - made(plain).loss_d(D, x, x_fake, y)
        # float32: a few roundings of numbers up to 100
        assert_close(got.item(), losses.LAMBDA * (w[0].norm().item() - 1) ** 2, rtol=0, atol=1e-3)


def test_labels_go_to_their_own_pictures_in_both_halves():
    """Two halves of a batch: D's guesses for data, then for fakes, of the same labels in order."""
    y = F.one_hot(torch.tensor([3, 1, 2]), 4).float()
    method = made("acgan", d=staticmethod(lambda *_: 0.0), g=staticmethod(lambda *_: 0.0))
    D = lambda x: (x.sum(dim=1), 50.0 * (y if len(x) == 3 else torch.cat([y, y])))
    for loss in (method.loss_d(D, torch.ones(3, 2), torch.ones(3, 2), y),
                 method.loss_g(D, torch.ones(3, 2), y, 0.0)):
        assert loss.item() < 1e-6


def test_a_conditional_d_asks_for_the_label():
    """Its score differs between two labels as its guesses do; that of the others does not."""
    torch.manual_seed(0)
    x, labels = torch.randn(3, 1, 28, 28), torch.eye(10)
    for name in ("cgan", "acgan"):
        method = made(name)
        _, D = method.nets(1, 28)
        a, b = (method.score(D, x, labels[i].expand(3, -1)) for i in (2, 7))
        guess = D(x)[1]
        expected = guess[:, 2] - guess[:, 7] if name == "cgan" else torch.zeros(3)
        assert_close(a - b, expected, rtol=1e-4, atol=1e-6)


def test_adam_hides_a_small_slope_and_a_larger_eps_does_not():
    """Its first step is rate g / (|g| + eps): full for g = 1e-6 and torch's eps of 1e-8."""
    for eps, expected in ((1e-8, 0.99), (losses.METHODS["minimax-ahead"].eps, 3.3e-4)):
        p = torch.zeros(1, requires_grad=True)
        p.grad = torch.tensor([1e-6])
        torch.optim.Adam([p], lr=1.0, betas=losses.ADAM_BETAS, eps=eps).step()
        assert_close(-p.item(), expected, rtol=0.02, atol=0)


@given(st.floats(-30, 30))
@settings(max_examples=20)
def test_fingerprints_know_their_losses(a):
    """A D without weights, one with two sigmoids, a perfect one: computed, then recognised."""
    half, sure = torch.zeros(4), torch.full((4,), 30.0)
    d, g = losses.bce_d(half, half), losses.nonsaturating_g(half)
    assert "1/2" in str(losses.fingerprint(d.item(), g.item()))
    twice = [torch.sigmoid(s) for s in (sure, -sure)]
    d, g = losses.bce_d(*twice), losses.nonsaturating_g(twice[1])
    assert f"{d:.4f} {g:.4f}" == "1.0064 0.6931"
    assert "twice" in str(losses.fingerprint(d.item(), g.item()))
    smooth = torch.full((4,), math.log(9.0))  # σ = 0.9
    d, g = losses.bce_d(smooth, -sure, 0.9), losses.nonsaturating_g(-sure)
    assert "entropy" in str(losses.fingerprint(d.item(), g.item(), 0.9))
    d, g = losses.bce_d(sure, -sure), losses.minimax_g(-sure)
    assert "no gradient" in str(losses.fingerprint(d.item(), g.item()))
    assert losses.fingerprint(1.0 + 0.1, 1.5 + abs(a)) is None


@pytest.mark.parametrize("real_label, d, g", [
    (1.0, "1.0064", "0.6931"), (0.9, "1.1064", "0.6931"), (0.0, "1.0064", "1.3133")])
def test_fingerprints_of_two_sigmoids_for_every_label(real_label, d, g):
    """Of all pairs of "logits" in [0, 1] the best one is found by search, and then recognised.

    With flipped labels (real_label 0) G sees the negative of the score.
    """
    line = torch.linspace(0, 1, 101)
    real, fake = torch.cartesian_prod(line, line).T
    loss = torch.stack([losses.bce_d(r[None], f[None], real_label) for r, f in zip(real, fake)])
    best = loss.argmin()
    seen_by_g = fake[best][None] * made("minimax", real_label).sign
    loss_g = losses.nonsaturating_g(seen_by_g)
    assert (f"{loss[best]:.4f}", f"{loss_g:.4f}") == (d, g)
    for scale, one in itertools.product((1.0, 0.5), (loss_g, losses.minimax_g(seen_by_g))):
        told = losses.fingerprint(scale * loss[best].item(), one.item(), real_label)
        assert "twice" in told and ("halves" in told) == (scale == 0.5)


@given(seeds(), st.floats(0, 1))
def test_labels_without_noise_draw_no_random_number(seed, real_label):
    """So that a training with the plain loss is the same to the bit as one without this flag."""
    real, fake, rng = normal(seed, 4), normal(seed + 1, 5), generator(seed)
    before, of_all = rng.get_state(), torch.get_rng_state()
    losses.bce_d(real, fake, real_label, 0.0, rng)
    assert torch.equal(rng.get_state(), before) and torch.equal(torch.get_rng_state(), of_all)
    losses.bce_d(real, fake, real_label, 0.1, rng)
    assert not torch.equal(rng.get_state(), before)


def test_the_log_of_averaged_halves_starts_at_log_2():
    start = math.log(2), math.log(2)
    assert "1/2" in losses.fingerprint(*start) and "halves" in losses.fingerprint(*start)


@given(seeds(), st.integers(1, 40))
def test_report_counts_copies_of_training_pictures(seed, n):
    """Copies of training pictures, asked for with labels that are right for some of them."""
    x = torch.randint(256, (60, 1, 4, 4), dtype=torch.uint8, generator=generator(seed))
    images = common.Images(x, torch.arange(60) % 10, "noise")
    chosen, asked = torch.randint(60, (2, n), generator=generator(seed))
    numbers = losses.report(common.to_float(x[chosen]), asked % 10, images, losses.CGAN)
    found = [i % 10 for i in chosen.tolist()]
    assert numbers["classes"] == len(set(found)) and numbers["distance"] < 1e-3
    assert_close(numbers["obeyed"], mean([f == a % 10 for f, a in zip(found, asked.tolist())]))
    shares = [found.count(i) / n for i in set(found)]
    assert_close(numbers["kl"], sum(p * math.log(10 * p) for p in shares), rtol=1e-9, atol=1e-12)
    assert "obeyed" not in losses.report(common.to_float(x[chosen]), asked, images, losses.Minimax)
    # codes that stand for other labels obey: shift all by one
    shifted = losses.report(common.to_float(x[chosen]), (chosen + 1) % 10, images, losses.InfoGAN)
    assert shifted["obeyed"] == 1


@given(seeds(), st.integers(1, 40))
def test_a_code_stands_for_the_label_that_most_of_its_pictures_have(seed, n):
    y, found = torch.randint(4, (2, n), generator=generator(seed))
    pairs = list(zip(y.tolist(), found.tolist()))
    most = sum(max(pairs.count((code, label)) for label in range(4)) for code in range(4))
    assert_close(losses.InfoGAN.obeyed(y, found), most / n, rtol=1e-6, atol=0)
    assert losses.CGAN.obeyed(y, found) <= losses.InfoGAN.obeyed(y, found) + 1e-6


# --- whole runs --------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def small_runs(monkeypatch, no_figures):
    for name, value in (("N_SAMPLES", 200), ("N_PATHS", 50), ("HIDDEN_G", [60, 60]),
                        ("HIDDEN_D", [60, 60])):
        monkeypatch.setattr(losses, name, value)


def run(out, digits_dir, *flags):
    losses.main(["--data", "digits", "--data-dir", str(digits_dir), "--steps", "6", "--batch", "8",
                 "--out", str(out), *flags])
    return results(out)


def test_all_methods_killed_in_the_middle_resume_to_the_same_bits(tmp_path, digits_dir):
    """All rows of the table, one after the other; noise and schedule resume too."""
    flags = ["--loss", "all", "--steps", "3", "--input-noise", "0.1", "--d-schedule", "cyclic"]
    straight = run(tmp_path / "straight", digits_dir, *flags)
    assert len(straight) == len(losses.METHODS) + 1
    for death in (2, 13, 4):
        with killed_after(death):
            run(tmp_path / "killed", digits_dir, "--resume", *flags)
    assert same(run(tmp_path / "killed", digits_dir, "--resume", *flags), straight)


@pytest.mark.draws
def test_methods_with_columns_of_their_own_are_drawn_beside_others(tmp_path, digits_dir):
    """began alone has a measure of convergence, whichever place it takes."""
    run(tmp_path, digits_dir, "--loss", "began", "minimax", "--steps", "1")
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert {row["model"] for row in rows} == {"began", "minimax"}
    assert all(bool(row["convergence"]) == (row["model"] == "began") for row in rows)


@pytest.mark.usefixtures("no_checkpoints")
def test_options_change_the_training_and_nothing_else(tmp_path, digits_dir):
    short = ["--loss", "nonsaturating", "--steps", "3"]
    plain = run(tmp_path / "plain", digits_dir, *short)
    assert same(run(tmp_path / "again", digits_dir, *short), plain)
    for flags in (["--real-label", "0.9"], ["--label-noise", "0.2"], ["--input-noise", "0.1"],
                  ["--lr-d", "0.001"], ["--lr-g", "0.001"], ["--d-steps", "3"], ["--g-steps", "2"],
                  ["--r1", "1"], ["--z-dim", "8"], ["--width-g", "4"], ["--nets", "conv"],
                  ["--nets", "fc"],
                  ["--d-schedule", "constant"], ["--d-schedule", "restarts"]):
        out = run(tmp_path / "".join(flags), digits_dir, *short, *flags)
        assert out.keys() == plain.keys() and not same(out, plain), flags


@pytest.mark.usefixtures("no_checkpoints")
@pytest.mark.parametrize("name", ["minimax", "nonsaturating", "lsgan", "wgan", "ebgan", "began"])
def test_g_learns_what_the_data_look_like(tmp_path, digits_dir, monkeypatch, name):
    """All data white: with the right signs G's pictures, grey (127) at first, become lighter."""
    all_white(monkeypatch)
    steps = "120" if name in ("ebgan", "began") else "25"
    run(tmp_path, digits_dir, "--loss", name, "--steps", steps)
    assert torch.load(tmp_path / f"samples_{name}.pt").float().mean() > 138


@pytest.mark.usefixtures("no_checkpoints")
def test_the_kept_weights_draw_the_samples_and_more(tmp_path, digits_dir, monkeypatch):
    """By the chapter's functions, and by the lines of the README."""
    out = tmp_path / "out" / "02_gan_losses"
    monkeypatch.setattr(losses, "HIDDEN_G", HIDDEN_G)
    samples = run(out, digits_dir, "--loss", "nonsaturating")["samples_nonsaturating.pt"]
    torch.manual_seed(0)
    z = torch.randn(len(samples), Z)
    G = losses.generator(Z, 1, 28)
    G.load_state_dict(torch.load(out / "weights_nonsaturating.pt"))
    assert torch.equal(common.to_uint8(losses.generate(G, z)), samples)

    monkeypatch.chdir(tmp_path)
    readme = (Path(losses.__file__).parent / "README.md").read_text()
    lines, = re.findall(r"(?:^    .*\n)+", readme.partition("Draw more:")[2], re.MULTILINE)[:1]
    names = {}
    exec(textwrap.dedent(lines), names)
    assert names["x"].shape == (16, 1, 28, 28) and names["x"].abs().max() <= 1
    assert not names["x"].requires_grad and (tmp_path / "new.png").stat().st_size > 0


@pytest.mark.usefixtures("no_checkpoints")
@pytest.mark.parametrize("name", ["cgan", "acgan"])
def test_g_draws_what_it_is_told(tmp_path, digits_dir, monkeypatch, name):
    """Class 0 is black and class 1 is white; samples.pt asks for 0, 1, 0, 1, ..."""
    y = torch.arange(70) % 2
    x = (255 * y).to(torch.uint8).view(70, 1, 1, 1).expand(70, 1, 28, 28)
    monkeypatch.setattr(common, "load_images",
                        lambda args, device, train=True: common.Images(x, y, "black and white"))
    run(tmp_path, digits_dir, "--loss", name, "--steps", "60")
    black, white = torch.load(tmp_path / f"samples_{name}.pt").float().unflatten(0, (-1, 2)).mean(
        (0, 2, 3, 4))
    assert white > black + 60


def test_a_d_that_ends_in_a_sigmoid_is_named_in_the_run(tmp_path, digits_dir, monkeypatch, capsys):
    """It says 1 to dark pictures, the data, and 0 to grey fakes: probabilities, no logits."""
    build = losses.Minimax.nets

    def sure(method, c, side):
        G, D = build(method, c, side)
        D.forward = lambda x: ((x.mean((1, 2, 3)) < -0.4) + 0 * x.mean((1, 2, 3))
                               + 0 * sum(p.sum() for p in D.parameters()), None)
        return G, D
    monkeypatch.setattr(losses.Minimax, "nets", sure)
    run(tmp_path, digits_dir, "--loss", "nonsaturating", "--steps", "4")
    assert "twice" in capsys.readouterr().out
    row = list(csv.DictReader((tmp_path / "log.csv").open()))[-1]
    assert float(row["D(x)"]) > 0.7 and float(row["D(G(z))"]) == 0.5


@pytest.mark.usefixtures("no_checkpoints")
@pytest.mark.parametrize("mistake, floor", [("double-sigmoid", 1.00636), ("averaged-log", 0.0),
                                            ("other-size", 0.0)])
def test_broken_on_purpose(tmp_path, digits_dir, capsys, mistake, floor):
    steps = "4" if mistake == "other-size" else "12"  # those are slow
    run(tmp_path, digits_dir, "--loss", "nonsaturating", "--steps", steps, "--d-steps", "2",
        "--break", mistake)
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    told = capsys.readouterr().out
    assert min(float(row["loss_d"]) for row in rows) >= floor - 1e-6
    assert (abs(float(rows[0]["loss_d"]) - math.log(2)) < 0.1) == (mistake == "averaged-log")
    # 21 x 21 = 441 pixels; with a kernel of 1 and stride 2, 10 x 10 of them hold a number
    assert ("77.3%" in told) == (mistake == "other-size") == told.count("no training mends")


@given(seeds(), st.integers(1, 3), st.integers(0, 6))
def test_specks_are_lone_pixels(seed, c, n):
    """n lone pixels on a smooth ground, apart from each other; edges of a square are none, and at
    the rim of a picture the rim goes on.
    """
    x = torch.linspace(-1, -0.5, 400).view(1, 1, 20, 20).repeat(2, c, 1, 1)
    x[1, 0, 5:12, 5:12] = 1.0
    places = torch.randperm(49, generator=generator(seed))[:n]
    x[0, 0, 1 + 2 * (places // 7), 1 + 2 * (places % 7)] = 1.0
    x[1, 0, 0, 0] = 1.0
    x[1, 0, 4, 5:12] = 0.2  # between black and white there is grey
    assert losses.specks(x) == n / 2


@pytest.mark.parametrize("flags", [["--width-d", "8"], ["--nets", "fc", "--width-g", "8"],
                                   ["--nets", "fc", "--width-d", "8"]])
def test_a_width_that_no_layer_has_is_refused(tmp_path, digits_dir, capsys, flags):
    one_line(capsys, lambda: run(tmp_path, digits_dir, *flags), flags[-2], "no convolutions")


def test_constant_pixels_and_other_sizes_are_told():
    x, x_fake = torch.rand(8, 1, 5, 5) - 2, torch.rand(8, 1, 5, 5)
    x[0, 0, 0, :2] = -1.0
    assert losses.unmendable(x, x_fake) is None and losses.unmendable(x, x_fake[:1]) is None
    x_fake[:, :, :, 4] = 0.5
    assert "20.0% of G's pixels are the same for every z: 0.5, " in losses.unmendable(x, x_fake)
    assert "(1, 5, 5), G draws (1, 4, 5)" in losses.unmendable(x, x_fake[:, :, :4])


def test_steps_of_both_players_are_counted(tmp_path, digits_dir, monkeypatch):
    """3 D steps and 2 G steps for each of 6 steps."""
    steps = []
    original = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda opt, *a: (
        steps.append(sum(p.numel() for g in opt.param_groups for p in g["params"])),
        original(opt, *a))[1])
    run(tmp_path, digits_dir, "--loss", "lsgan", "--d-steps", "3", "--g-steps", "2")
    G, D = made("lsgan").nets(1, 28)
    of_g, of_d = (sum(p.numel() for p in net.parameters()) for net in (G, D))
    assert steps == 6 * ([of_d] * 3 + [of_g] * 2)


@pytest.mark.usefixtures("no_checkpoints")
@pytest.mark.parametrize("name, attribute, value", [
    ("wgan", "after_d", losses.Minimax.after_d), ("wgan", "d_steps", 2),
    ("wgan-gp", "loss_d", losses.Minimax.loss_d), ("wgan-gp", "lr", (1e-3, 1e-3)),
    ("dragan", "loss_d", losses.Minimax.loss_d), ("cgan", "score", losses.Minimax.score),
    ("acgan", "loss_d", losses.Minimax.loss_d), ("acgan", "loss_g", losses.Minimax.loss_g),
    ("infogan", "labels", losses.CGAN.labels), ("infogan", "loss_d", losses.ACGAN.loss_d),
    ("ebgan", "loss_g", losses.Minimax.loss_g), ("began", "pull", (2.5, 2.5)),
    ("began", "loss_d", losses.Minimax.loss_d), ("ebgan", "code", 8), ("lsgan", "eps", 0.1),
    ("minimax-ahead", "d_steps", 1), ("minimax", "share", 0.5), ("lsgan", "lr", (1e-3, 2e-3))])
def test_every_change_that_a_method_makes_reaches_the_training(tmp_path, digits_dir, monkeypatch,
                                                               name, attribute, value):
    flags = ["--loss", name, "--steps", "4"]
    plain = run(tmp_path / "plain", digits_dir, *flags)
    monkeypatch.setattr(losses.METHODS[name], attribute, value)
    assert not same(run(tmp_path / "other", digits_dir, *flags), plain)


@pytest.mark.usefixtures("no_checkpoints")
def test_the_rate_of_g_falls_with_the_side(tmp_path, monkeypatch):
    rates, begin = [], torch.optim.Adam.__init__
    monkeypatch.setattr(torch.optim.Adam, "__init__", lambda opt, params, lr, *args, **more: (
        rates.append(lr), begin(opt, params, lr, *args, **more))[1])
    losses.main(["--data", folder_of_pictures(tmp_path / "p", 12, 56), "--size", "56", "--steps",
                 "2", "--batch", "4", "--loss", "wgan-gp", "--out", str(tmp_path / "out")])
    assert rates == pytest.approx([1e-3, 2e-3 / 4])  # 56 is twice 28


@pytest.mark.usefixtures("no_checkpoints")
def test_r1_is_added_to_the_loss_of_d_with_half_its_weight(tmp_path, digits_dir, monkeypatch):
    monkeypatch.setattr(losses, "r1_penalty", lambda critic, x: torch.tensor(0.5))
    first = []
    for r1 in ("1", "3"):
        run(tmp_path / r1, digits_dir, "--loss", "nonsaturating", "--steps", "1", "--r1", r1)
        row, = csv.DictReader((tmp_path / r1 / "log.csv").open())
        first.append(float(row["loss_d"]))
    assert_close(first[1] - first[0], (3 - 1) / 2 * 0.5, rtol=0, atol=1e-5)  # float32 near 2


@pytest.mark.usefixtures("no_checkpoints")
@pytest.mark.parametrize("name, constant, value", [
    ("ebgan", "MARGIN", 0.9),
    ("began", "GAMMA", 0.5), ("began", "LAMBDA_K", 0.5), ("dragan", "LAMBDA", 10.0)])
def test_every_constant_reaches_the_training(tmp_path, digits_dir, monkeypatch, name, constant,
                                             value):
    flags = ["--loss", name, "--steps", "3"]
    plain = run(tmp_path / "plain", digits_dir, *flags)
    monkeypatch.setattr(losses, constant, value)
    assert not same(run(tmp_path / "other", digits_dir, *flags), plain)


def test_wgan_keeps_its_weights_in_the_box(tmp_path, digits_dir):
    run(tmp_path, digits_dir, "--loss", "wgan", "--steps", "2")
    D = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["parts"]["D"]
    assert max(p.abs().max().item() for p in D.values()) == pytest.approx(losses.CLIP)


@pytest.mark.usefixtures("no_checkpoints")
@pytest.mark.parametrize("name", ["wgan-gp", "infogan"])
def test_memory_does_not_grow_with_the_steps(tmp_path, digits_dir, tensors_alive, monkeypatch,
                                             name):
    """create_graph keeps graphs alive in cycles if several terms are differentiated apart."""
    monkeypatch.setattr(common.Run, "shoot", lambda run, x: None)  # it keeps pictures
    run(tmp_path, digits_dir, "--loss", name, "--steps", "6")
    assert len(tensors_alive) >= 6 and max(tensors_alive[3:]) <= tensors_alive[2]


def test_flipped_labels_teach_g_the_same_as_ordinary_ones(tmp_path, digits_dir, monkeypatch):
    """With D's last layer negated at the start the two runs are mirror images: equal pictures."""
    flags = ["--loss", "minimax", "nonsaturating", "--steps", "2"]
    plain = run(tmp_path / "plain", digits_dir, *flags)
    build = losses.Minimax.nets

    def mirrored(method, c, side):
        G, D = build(method, c, side)
        for p in D.score.parameters():
            p.data.neg_()
        return G, D
    monkeypatch.setattr(losses.Minimax, "nets", mirrored)
    flipped = run(tmp_path / "flipped", digits_dir, *flags, "--real-label", "0")
    for name in ("samples_minimax.pt", "samples_nonsaturating.pt"):
        # float32: log σ(a) and log(1 - σ(-a)) are rounded apart; 1 of 255 grey levels
        assert (plain[name].int() - flipped[name].int()).abs().max() <= 1


def test_a_frozen_log_is_named_once():
    """Three rows with the same fingerprint: named at the third, not again, not for one row less."""
    frozen, moving = {"loss_d": 1.0064, "loss_g": 0.6931}, {"loss_d": 1.2, "loss_g": 0.9}
    log = [moving, *5 * [frozen]]
    perfect = [{"loss_d": d, "loss_g": -d / 2} for d in (0.0008, 0.0012, 0.0021)]
    assert "no gradient" in losses.new_fingerprint(perfect, 1.0)
    named = [losses.new_fingerprint(log[:i], 1.0) is not None for i in range(1, len(log) + 1)]
    assert named == [False, False, False, True, False, False]
    assert "twice" in losses.new_fingerprint(log[:4], 1.0)


def test_a_loss_that_explodes_names_itself(tmp_path, digits_dir, monkeypatch, capsys):
    monkeypatch.setattr(losses.WGAN, "g", staticmethod(lambda fake: fake.mean() * math.nan))
    one_line(capsys, lambda: run(tmp_path, digits_dir, "--loss", "wgan"), "loss_g is nan at step 1",
             status=1)


def test_a_penalty_that_explodes_is_never_saved(tmp_path, digits_dir, monkeypatch, capsys):
    """The loss without it is still finite, the weights after it are not."""
    monkeypatch.setattr(losses, "gradient_penalty", lambda *_: torch.tensor(math.nan))
    one_line(capsys, lambda: run(tmp_path, digits_dir, "--loss", "wgan-gp", "--d-steps", "1"),
             "loss_d is nan at step 1", status=1)
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("flags, words", [
    (["--loss", "gan"], ["--loss", "gan"]),
    (["--loss", "lsgan", "--real-label", "0.9"], ["--real-label", "lsgan"]),
    (["--real-label", "1.5"], ["--real-label", "1.5"]),
    (["--r1", "-1"], ["--r1", "-1"]),
    (["--loss", "began", "--r1", "1"], ["--r1", "began"]),
    (["--batch", "0"], ["--batch", "0"])])
def test_bad_flags_get_one_line(tmp_path, digits_dir, capsys, flags, words):
    one_line(capsys, lambda: run(tmp_path, digits_dir, *flags), *words)


def test_bad_sizes_and_batches_get_one_line(tmp_path, digits_dir, capsys):
    folder = folder_of_pictures(tmp_path / "p", 4, 40)
    for flags, words in ((["--data", folder, "--size", "36"], "use --size 32"),
                         (["--loss", "ebgan", "--batch", "1"], "--batch 2 or more")):
        one_line(capsys, lambda: run(tmp_path / "out", digits_dir, *flags), words)


def test_labels_are_asked_for_only_where_there_are_some(tmp_path, digits_dir, capsys):
    flags = ["--data", folder_of_pictures(tmp_path / "p", 12, 8), "--size", "8", "--steps", "2",
             "--nets", "conv", "--width-g", "4"]
    run(tmp_path / "code", digits_dir, *flags, "--loss", "infogan")  # makes its codes up
    one_line(capsys, lambda: run(tmp_path / "guess", digits_dir, *flags, "--loss", "acgan"),
             "acgan needs labels")
    for i in range(12):
        picture = tmp_path / "p" / f"{i:02}.png"
        picture.parent.joinpath(f"kind{i % 3}").mkdir(exist_ok=True)
        picture.rename(picture.parent / f"kind{i % 3}" / picture.name)
    run(tmp_path / "told", digits_dir, *flags, "--loss", "cgan", "acgan")
    G = torch.load(tmp_path / "told" / "weights_cgan.pt")
    assert "labels 0 kind0, 1 kind1, 2 kind2" in capsys.readouterr().out
    assert next(iter(G.values())).shape[1] == Z + 3  # it sees three labels
