"""Chapter 06: moments and MMD against independent oracles, and the limits of both."""

import importlib
import math
from argparse import Namespace
from functools import partial
from statistics import stdev
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

from strategies import about, generator, normal, rejected, seeds

wae = importlib.import_module("06_wae_moments")
EPS = torch.finfo(torch.float64).eps
SCALES = (0.1, 0.2, 0.5, 1, 2, 5, 10)  # of the kernel, for the oracle
counts, sizes = st.integers(2, 12), st.integers(1, 5)
places = st.sampled_from([0.0, 4.0, -1000.0, 3000.0, 1e5])


# --- moments -----------------------------------------------------------------------------------

def moments_by_numpy(z):
    """Mean, variance, kurtosis of each column, and how far rounding may move them."""
    a = z.numpy()
    m2, m4 = (np.mean((a - a.mean(0)) ** p, axis=0) for p in (2, 4))
    # two coordinates that nearly agree: the variance loses |z|² / variance digits, twice
    slack = 50 * len(a) * EPS * (1 + (a ** 2).max() / m2.min()) ** 2
    return (a.mean(0), a.var(0), m4 / m2 ** 2), slack


def moments_are_those_of_numpy(moments, seed, n, d, scale=2.0, shift=1.0):
    z = scale * normal(seed, n, d) + shift
    expected, slack = moments_by_numpy(z)
    for got, value in zip(moments(z), expected, strict=True):
        assert_close(got, torch.from_numpy(value), rtol=slack, atol=slack)


@about("moments")
@given(seeds(), counts, sizes, st.floats(0.1, 10), st.floats(-5, 5))
def test_moments_are_those_of_numpy_at_every_scale_and_place(seed, n, d, scale, shift):
    moments_are_those_of_numpy(wae.moments, seed, n, d, scale, shift)


@pytest.mark.parametrize("twin", [
    lambda z: (z.mean(0), z.var(0), wae.moments(z)[2]),               # B - 1
    lambda z: (*wae.moments(z)[:2], wae.moments(z)[2] - 3),           # the excess
    lambda z: (*wae.moments(z)[:2], (z ** 4).mean(0) / (z ** 2).mean(0) ** 2),  # not centred
    lambda z: tuple(m.mean().expand(z.shape[1]) for m in wae.moments(z))])      # over coordinates
def test_wrong_moments_are_rejected(twin):
    assert rejected(moments_are_those_of_numpy, twin, 0, 9, 3)


@about("moment_loss")
@given(seeds(), counts, sizes)
def test_moment_loss_is_the_mean_of_its_squares_and_blind_to_order(seed, n, d):
    """A change of the order in each coordinate by itself changes no moment."""
    z = normal(seed, n, d)
    found, slack = moments_by_numpy(z)
    expected = sum(((m - m_normal) ** 2).sum() for m, m_normal in zip(found, (0, 1, 3))) / (3 * d)
    atol = 24 * n * slack  # a kurtosis is at most n <= 12: its square moves by 2 · 12 as much as it
    torch.manual_seed(seed)
    for batch in (z, wae.shuffled(z)):
        assert_close(wae.moment_loss(batch).item(), expected, rtol=0, atol=atol)


@about("moment_loss")
@given(seeds())
@settings(max_examples=10)
def test_a_batch_of_the_prior_has_a_moment_loss_of_27_over_3_b(seed):
    """About (1 + 2 + 24) / (3 B): the mean varies by 1/B, the variance by 2/B, kurtosis by 24/B."""
    n, d = 2000, 200
    loss = wae.moment_loss(normal(seed, n, d)).item()
    # 200 coordinates, distributed near 24/B χ²: relative deviation √(2/200) = 0.1; 6 of them, and
    # the kurtosis of 2,000 samples still has heavy tails
    assert 0.3 < loss / (27 / (3 * n)) < 2


@about("moments", edge=True)
@given(seeds(), st.integers(2, 300), st.sampled_from([0.1, 1e-3, 777.7, -5.3]))
def test_a_constant_coordinate_has_no_kurtosis_and_no_variance(seed, n, value):
    """In float32 the mean of n copies of 0.1 is not 0.1: rounding must not count as a variance."""
    z = normal(seed, n, 2).float()
    z[:, 0] = value
    mean, variance, kurtosis = wae.moments(z)
    assert variance[0] == 0 and kurtosis[0].isnan() and kurtosis[1].isfinite()
    assert abs(mean[0].item() - value) <= n * torch.finfo(z.dtype).eps * abs(value)


@about("moments", edge=True)
@pytest.mark.parametrize("shape", [(1, 3), (4,)])
def test_codes_without_moments_are_refused(shape):
    with pytest.raises(ValueError):
        wae.moments(torch.zeros(shape))


@about("mmd_imq", edge=True)
@pytest.mark.parametrize("shape, shape_prior", [((1, 3), (4, 3)), ((4, 3), (1, 3)),
                                                ((4, 2), (4, 3))])
def test_codes_without_an_mmd_are_refused(shape, shape_prior):
    with pytest.raises(ValueError):
        wae.mmd_imq(torch.zeros(shape), torch.zeros(shape_prior))


# --- MMD ---------------------------------------------------------------------------------------

def double_sum(a, b):
    """MMD², one pair at a time, with Python's numbers."""
    x, y = a.tolist(), b.tolist()
    constants = [2 * len(x[0]) * s for s in SCALES]

    def kernel_mean(pairs):
        squares = [math.dist(p, q) ** 2 for p, q in pairs]
        return sum(c / (c + square) for square in squares for c in constants) / len(squares)

    def within(points):
        return kernel_mean([(p, q) for i, p in enumerate(points) for j, q in enumerate(points)
                            if i != j])

    return within(x) + within(y) - 2 * kernel_mean([(p, q) for p in x for q in y])


def mmd_is_its_double_sum(mmd, seed, n, m, d):
    a, b = normal(seed, n, d), 1.5 * normal(seed + 1, m, d) + 0.5
    # |a|² + |b|² - 2ab near 0 has the error of |a|², here below 100, over the smallest c 0.2 d
    assert_close(mmd(a, b).item(), double_sum(a, b), rtol=0, atol=1e4 * EPS)


@about("mmd_imq")
@given(seeds(), counts, counts, sizes)
def test_mmd_is_its_double_sum(seed, n, m, d):
    mmd_is_its_double_sum(wae.mmd_imq, seed, n, m, d)


@pytest.mark.parametrize("twin", [
    lambda a, b: -wae.mmd_imq(a, b),
    lambda a, b: wae.mmd_imq(a, b) ** 0.5,
    lambda a, b: wae.mmd_imq(a, b) + len(SCALES) / len(a),       # pairs with itself: biased
    lambda a, b: wae.mmd_imq(a * 2 ** 0.5, b * 2 ** 0.5),        # another scale
    lambda a, b: wae.mmd_imq(a, b + 10)])                        # only one of them moved
def test_wrong_mmds_are_rejected(twin):
    assert rejected(mmd_is_its_double_sum, twin, 0, 5, 7, 2)


def codes_at(place, prior_place, seed=0):
    """Two sets of codes in float32 around these places."""
    return (normal(seed, 2, 20, 16) + torch.tensor([place, prior_place])[:, None, None]).float()


def copies(seed):
    """p, p, -p, -p, and the same farther out: distances of 0, where ‖p‖² is 10^8 or so."""
    p = 3000 * normal(seed, 1, 16).float()
    z = torch.cat([p, p, -p, -p])
    return z, 100 * z


def mmd_in_float32_is_that_in_float64(mmd, z, prior):
    """For the same numbers: wherever they are, two points at a small distance keep it."""
    # moved near 0, a coordinate is below 5 + 6 σ, so ‖a‖² < 11² d. Some of its roundings are the
    # error of ‖a - b‖², and a kernel changes by that divided by its C = 2 d s
    slack = 8 * torch.finfo(torch.float32).eps * 11 ** 2 / (2 * min(SCALES))
    assert_close(mmd(z, prior).item(), double_sum(z, prior), rtol=0, atol=slack)


@about("mmd_imq", edge=True)
@given(seeds(), places, places)
def test_mmd_in_float32_is_that_in_float64(seed, place, prior_place):
    for z, prior in (codes_at(place, prior_place, seed), copies(seed)):
        mmd_in_float32_is_that_in_float64(wae.mmd_imq, z, prior)


def mmd_by_products(z, z_prior, least=0.0):
    """With ‖a - b‖² = ‖a‖² + ‖b‖² - 2 a·b; least: what is below counts as this."""
    def kernel(a, b):
        squares = (a ** 2).sum(dim=1)[:, None] + (b ** 2).sum(dim=1) - 2 * a @ b.T
        squares = squares.clamp(min=least)
        return sum(c / (c + squares) for c in 2 * a.shape[1] * torch.tensor(SCALES))

    def within(a):
        return (kernel(a, a).sum() - kernel(a, a).trace()) / (len(a) * (len(a) - 1))

    return within(z) + within(z_prior) - 2 * kernel(z, z_prior).mean()


@pytest.mark.parametrize("least, codes", [
    (0.0, codes_at(3000.0, 3000.0)), (0.0, codes_at(3000.0, 0.0)), (0.0, codes_at(0.0, 3000.0)),
    (-math.inf, copies(0))])  # squares below 0
def test_an_mmd_that_loses_small_distances_is_rejected(least, codes):
    twin = partial(mmd_by_products, least=least)
    assert rejected(mmd_in_float32_is_that_in_float64, twin, *codes)
    mmd_in_float32_is_that_in_float64(twin, *codes_at(0.0, 0.0))  # near 0 it is right


def mmd_has_mean_zero_for_equal_laws(mmd, seed, runs=200):
    rng = generator(seed)
    values = torch.tensor([mmd(*torch.randn(2, 6, 3, generator=rng)).item() for _ in range(runs)])
    assert abs(values.mean().item()) <= 6 * values.std().item() / runs ** 0.5


@about("mmd_imq", "mmd_loss")
@given(seeds())
@settings(max_examples=5)
def test_mmd_has_mean_zero_for_equal_laws(seed):
    torch.manual_seed(seed + 1)  # for the samples of mmd_loss
    mmd_has_mean_zero_for_equal_laws(wae.mmd_imq, seed)
    mmd_has_mean_zero_for_equal_laws(lambda z, _: wae.mmd_loss(z), seed)


@pytest.mark.parametrize("twin", [
    lambda a, b: wae.mmd_imq(a, b) + len(SCALES) / len(a),  # biased
    lambda a, b: wae.mmd_imq(a, torch.rand_like(a))])       # another distribution
def test_an_mmd_of_another_mean_is_rejected(twin):
    assert rejected(mmd_has_mean_zero_for_equal_laws, twin, 0)


@about("mmd_imq", "mmd_loss")
@given(seeds(), st.sampled_from(["shift", "scale", "dependence"]))
@settings(max_examples=12)
def test_mmd_is_positive_for_laws_that_differ(seed, how):
    """300 samples: the means are 0.9, 0.47 and 0.29, the standard deviations 0.11, 0.06, 0.03."""
    z = normal(seed, 300, 2)
    other = {"shift": z + 1, "scale": 2 * z, "dependence": z[:, :1].expand(-1, 2)}[how]
    torch.manual_seed(seed + 1)  # for the samples of mmd_loss
    assert wae.mmd_imq(other, normal(seed + 1, 300, 2)).item() > 0.05 < wae.mmd_loss(other).item()


@about("mmd_loss")
def test_each_call_of_mmd_loss_has_new_samples_of_the_prior():
    z = normal(0, 9, 2)
    assert len({wae.mmd_loss(z).item() for _ in range(9)}) == 9


@about("moment_loss", "mmd_imq")
def test_three_points_have_the_moments_of_a_normal_and_are_not_one():
    """In exact proportions the moment loss is 0; MMD is 20 times that of as many normal samples."""
    three = 3 ** 0.5 * torch.tensor([-1.0] + 4 * [0.0] + [1.0]).double().repeat(100)[:, None]
    assert wae.moment_loss(three).item() < 100 * EPS
    u, v = normal(0, 2, 600, 1)
    assert wae.mmd_imq(three, u).item() > 20 * abs(wae.mmd_imq(v, u).item())


@given(seeds())
@settings(max_examples=5)
def test_three_points_come_with_their_probabilities(seed):
    torch.manual_seed(seed)
    z = wae.three_points(2000, 3).flatten()
    for value, p in ((-3 ** 0.5, 1 / 6), (0.0, 2 / 3), (3 ** 0.5, 1 / 6)):
        share = torch.isclose(z, torch.tensor(value)).float().mean().item()
        assert abs(share - p) <= 6 * (p * (1 - p) / len(z)) ** 0.5


@given(seeds(), counts, sizes)
def test_shuffling_keeps_each_coordinate_and_loses_the_rest(seed, n, d):
    torch.manual_seed(seed)
    z = torch.arange(n * d).view(d, n).T
    assert torch.equal(wae.shuffled(z).sort(dim=0).values, z)
    line = torch.arange(200.0)[:, None].expand(-1, 2)
    assert abs(torch.corrcoef(wae.shuffled(line).T)[0, 1].item()) < 6 / 200 ** 0.5


def test_samples_of_the_prior_are_compared_with_other_samples():
    """With the same ones MMD² is not about 0, but -2 (7 - E k) / n. The default seed is 0."""
    mmd = [wae.limits(Namespace(seed=seed, n_codes=300, z_dim=16), {})["N(0, I)"]["mmd"]
           for seed in range(10)]
    assert abs(mmd[0]) < 6 * stdev(mmd[1:])


@pytest.mark.parametrize("n", [2, 5, 20, 600])
def test_like_pictures_are_the_nearest_of_the_others(n):
    """However few there are, none is compared with itself; codes are the pixels here."""
    pixels = torch.randint(256, (n, 1, 2, 2), generator=generator(n), dtype=torch.uint8)
    x = pixels / 127.5 - 1
    net = mock.Mock(encode=nn.Flatten(), decode=nn.Unflatten(1, (1, 2, 2)))
    rows = wae.pictures(net, x, x.flatten(1), x, x)["interpolation"].unflatten(0, (8, 9))
    for i in range(4):
        one, others = pixels[i % n], torch.cat([pixels[:i % n], pixels[i % n + 1:500]])
        gaps = (others.float() - one.float()).flatten(1).norm(dim=1)
        assert torch.equal(rows[i, 0], one) and torch.equal(rows[i, -1], others[gaps.argmin()])


# --- schedule and networks ---------------------------------------------------------------------

@about("weight")
@given(st.integers(1, 100))
def test_weight_doubles_after_each_of_the_first_11_of_14_equal_parts(n):
    """Parts of n steps: 0.001 in the first, 2.048 in the last three."""
    found = [wae.weight(step, 14 * n) for step in range(1, 14 * n + 1)]
    assert found == pytest.approx([0.001 * 2 ** min(i, 11) for i in range(14) for _ in range(n)])


@about("weight", edge=True)
@given(st.integers(1, 3000))
def test_weight_never_falls_whatever_the_number_of_steps(steps):
    found = [wae.weight(step, steps) for step in range(1, steps + 1)]
    assert found[0] == pytest.approx(0.001) and found == sorted(found)
    if steps >= 14:
        assert found[-1] == pytest.approx(2.048)
        assert set(np.diff(np.log2(found)).round(9)) == {0, 1}  # the same, or twice as much


@pytest.mark.parametrize("c, side", [(1, 28), (3, 32), (3, 64)])
def test_codes_and_pictures_have_their_shapes(c, side):
    torch.manual_seed(0)
    net = wae.Autoencoder(c, side, 5).eval()
    x = torch.rand(4, c, side, side) * 2 - 1
    z = net.encode(x)
    assert z.shape == (4, 5) and torch.equal(z, net.encode(x))  # no noise
    assert net.decode(z).shape == x.shape and net.decode(z).abs().max() <= 1
