"""Chapter 06: moments and MMD against independent oracles, their limits, a kill loses nothing."""

import csv
import importlib
import math
from argparse import Namespace
from functools import partial
from statistics import mean, stdev
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

import common
from harness import folder_of_pictures, killed_after, one_line, rejected, results, same
from strategies import generator, normal, seeds

wae = importlib.import_module("06_wae_moments")
EPS = torch.finfo(torch.float64).eps
counts, sizes = st.integers(2, 12), st.integers(1, 5)


# --- moments -----------------------------------------------------------------------------------

def moments_are_those_of_numpy(moments, seed, n, d):
    z = 2 * normal(seed, n, d) + 1
    a = z.numpy()
    m2, m4 = (np.mean((a - a.mean(0)) ** p, axis=0) for p in (2, 4))
    for got, expected in zip(moments(z), (a.mean(0), a.var(0), m4 / m2 ** 2)):
        # two coordinates that nearly agree: the variance loses |z|² / variance digits, twice
        slack = 50 * n * EPS * (1 + (a ** 2).max() / m2.min()) ** 2
        assert_close(got, torch.from_numpy(expected), rtol=slack, atol=slack)


@given(seeds(), counts, sizes)
def test_moments_are_those_of_numpy(seed, n, d):
    moments_are_those_of_numpy(wae.moments, seed, n, d)


@pytest.mark.parametrize("twin", [
    lambda z: (z.mean(0), z.var(0), wae.moments(z)[2]),               # B - 1
    lambda z: (*wae.moments(z)[:2], wae.moments(z)[2] - 3),           # the excess
    lambda z: (*wae.moments(z)[:2], (z ** 4).mean(0) / (z ** 2).mean(0) ** 2),  # not centred
    lambda z: tuple(m.mean().expand(z.shape[1]) for m in wae.moments(z))])      # over coordinates
def test_wrong_moments_are_rejected(twin):
    assert rejected(moments_are_those_of_numpy, twin, 0, 9, 3)


@given(seeds(), counts, st.floats(0.1, 10), st.floats(-5, 5))
def test_kurtosis_does_not_depend_on_place_and_scale(seed, n, scale, shift):
    z = normal(seed, n, 3)
    moved = wae.moments(scale * z + shift)
    mean, variance, kurtosis = wae.moments(z)
    largest = ((scale * z + shift) ** 2).max().item() / (scale ** 2 * variance.min().item())
    slack = 1000 * n * EPS * (1 + largest) ** 2
    assert_close(moved[0], scale * mean + shift, rtol=slack, atol=slack)
    assert_close(moved[1], scale ** 2 * variance, rtol=slack, atol=slack)
    assert_close(moved[2], kurtosis, rtol=slack, atol=slack)


@given(seeds(), counts, sizes)
def test_moment_loss_is_the_mean_of_its_squares_and_blind_to_order(seed, n, d):
    z = normal(seed, n, d)
    expected = [(value.item() - target) ** 2
                for target, found in zip((0, 1, 3), wae.moments(z)) for value in found]
    assert_close(wae.moment_loss(z).item(), sum(expected) / (3 * d), rtol=100 * EPS, atol=0)
    mixed = wae.shuffled(z)
    size = wae.moments(z)[2].max().item() ** 2
    assert_close(wae.moment_loss(mixed), wae.moment_loss(z), rtol=0, atol=1e5 * EPS * (1 + size))


@given(seeds())
@settings(max_examples=10)
def test_a_batch_of_the_prior_has_the_moment_loss_of_its_luck(seed):
    """About (1 + 2 + 24) / (3 B): the mean varies by 1/B, the variance by 2/B, kurtosis by 24/B."""
    n, d = 2000, 200
    loss = wae.moment_loss(normal(seed, n, d)).item()
    # 200 coordinates of a law near 24/B χ²: relative deviation √(2/200) = 0.1; 6 of them, and the
    # kurtosis of 2,000 draws still has heavy tails
    assert 0.3 < loss / (27 / (3 * n)) < 2


@given(seeds(), st.integers(2, 300), st.sampled_from([0.1, 1e-3, 777.7, -5.3]))
def test_a_constant_coordinate_has_no_kurtosis_and_no_variance(seed, n, value):
    """In float32 the mean of n copies of 0.1 is not 0.1: rounding must not count as a variance."""
    z = normal(seed, n, 2).float()
    z[:, 0] = value
    mean, variance, kurtosis = wae.moments(z)
    assert variance[0] == 0 and kurtosis[0].isnan() and kurtosis[1].isfinite()
    assert abs(mean[0].item() - value) <= n * torch.finfo(z.dtype).eps * abs(value)


def test_codes_without_moments_or_of_other_length_are_refused():
    for z in (torch.zeros(1, 3), torch.zeros(4)):
        with pytest.raises(ValueError):
            wae.moments(z)
    for a, b in ((torch.zeros(1, 3), torch.zeros(4, 3)), (torch.zeros(4, 2), torch.zeros(4, 3))):
        with pytest.raises(ValueError):
            wae.mmd_imq(a, b)


# --- MMD ---------------------------------------------------------------------------------------

def mmd_is_its_double_sum(mmd, seed, n, m, d):
    """One pair at a time, with Python numbers."""
    a, b = normal(seed, n, d), 1.5 * normal(seed + 1, m, d) + 0.5
    scales = [2 * d * s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10)]

    def k(x, y):
        return sum(c / (c + math.dist(x, y) ** 2) for c in scales)

    def kernel_mean(pairs):
        values = [k(x, y) for x, y in pairs]
        return sum(values) / len(values)

    x, y = a.tolist(), b.tolist()
    expected = kernel_mean([(p, q) for i, p in enumerate(x) for j, q in enumerate(x) if i != j]) \
        + kernel_mean([(p, q) for i, p in enumerate(y) for j, q in enumerate(y) if i != j]) \
        - 2 * kernel_mean([(p, q) for p in x for q in y])
    # |a|² + |b|² - 2ab near 0 has the error of |a|², here below 100, over the smallest c 0.2 d
    assert_close(mmd(a, b).item(), expected, rtol=0, atol=1e4 * EPS)


@given(seeds(), counts, counts, sizes)
def test_mmd_is_its_double_sum(seed, n, m, d):
    mmd_is_its_double_sum(wae.mmd_imq, seed, n, m, d)


@pytest.mark.parametrize("twin", [
    lambda a, b: -wae.mmd_imq(a, b),
    lambda a, b: wae.mmd_imq(a, b) ** 0.5,
    lambda a, b: wae.mmd_imq(a, b) + len(wae.SCALES) / len(a),   # pairs with itself: biased
    lambda a, b: wae.mmd_imq(a * 2 ** 0.5, b * 2 ** 0.5),        # another scale
    lambda a, b: wae.mmd_imq(a, b + 10)])                        # only one of them moved
def test_wrong_mmds_are_rejected(twin):
    assert rejected(mmd_is_its_double_sum, twin, 0, 5, 7, 2)


def mmd_in_float32_is_that_in_float64(mmd, seed, place, prior_place):
    """For the same numbers: wherever they are, two points at a small distance keep it."""
    d, eps = 16, torch.finfo(torch.float32).eps
    z, prior = (normal(seed, 2, 20, d) + torch.tensor([place, prior_place])[:, None, None]).float()
    exact = wae.mmd_imq(z.double(), prior.double()).item()
    # moved near 0, a coordinate is below 5 + 6 σ, so ‖a‖² < 11² d. Some of its roundings are the
    # error of ‖a - b‖², and a kernel changes by that divided by its C
    slack = 8 * eps * 11 ** 2 * d / (2 * d * min(wae.SCALES))
    assert_close(mmd(z, prior).item(), exact, rtol=0, atol=slack)


places = st.sampled_from([0.0, 4.0, -1000.0, 3000.0, 1e5])


@given(seeds(), places, places)
def test_mmd_in_float32_is_that_in_float64(seed, place, prior_place):
    mmd_in_float32_is_that_in_float64(wae.mmd_imq, seed, place, prior_place)


def mmd_by_products(z, z_prior, least=0.0):
    """With ‖a - b‖² = ‖a‖² + ‖b‖² - 2 a·b; least: what is below counts as this."""
    def kernel(a, b):
        squares = (a ** 2).sum(dim=1)[:, None] + (b ** 2).sum(dim=1) - 2 * a @ b.T
        squares = squares.clamp(min=least)
        return sum(c / (c + squares) for c in (2 * a.shape[1] * s for s in wae.SCALES))

    def within(a):
        return (kernel(a, a).sum() - kernel(a, a).trace()) / (len(a) * (len(a) - 1))

    return within(z) + within(z_prior) - 2 * kernel(z, z_prior).mean()


@pytest.mark.parametrize("place, prior_place", [(3000.0, 3000.0), (3000.0, 0.0), (0.0, 3000.0)])
def test_an_mmd_that_loses_small_distances_is_rejected(place, prior_place):
    assert rejected(mmd_in_float32_is_that_in_float64, mmd_by_products, 0, place, prior_place)
    mmd_in_float32_is_that_in_float64(mmd_by_products, 0, 0.0, 0.0)  # near 0 it is right


def mmd_has_no_negative_distances(mmd, seed):
    """p, p, -p, -p: 2 of the 6 pairs have k = 7, the largest value, the others nearly 0.

    So each set has a mean k from 0 to 7/3. Roundings of ‖p‖², 10^8 or so, are as large as C.
    """
    p = 3000 * normal(seed, 1, 16).float()
    z = torch.cat([p, p, -p, -p])
    assert -1e-4 < mmd(z, 100 * z).item() <= 14 / 3 + 1e-4


@given(seeds())
def test_mmd_has_no_negative_distances(seed):
    mmd_has_no_negative_distances(wae.mmd_imq, seed)


def test_an_mmd_of_negative_distances_is_rejected():
    twin = partial(mmd_by_products, least=-math.inf)
    assert any(rejected(mmd_has_no_negative_distances, twin, seed) for seed in range(9))


def mmd_has_mean_zero_for_equal_laws(mmd, seed, runs=400):
    rng = generator(seed)
    values = torch.tensor([mmd(*torch.randn(2, 6, 3, generator=rng)).item() for _ in range(runs)])
    assert abs(values.mean().item()) <= 6 * values.std().item() / runs ** 0.5


@given(seeds())
@settings(max_examples=5)
def test_mmd_has_mean_zero_for_equal_laws(seed):
    mmd_has_mean_zero_for_equal_laws(wae.mmd_imq, seed)


def test_a_biased_mmd_is_rejected():
    assert rejected(mmd_has_mean_zero_for_equal_laws,
                    lambda a, b: wae.mmd_imq(a, b) + len(wae.SCALES) / len(a), 0)


@given(seeds(), st.sampled_from(["shift", "scale", "dependence"]))
@settings(max_examples=12)
def test_mmd_is_positive_for_laws_that_differ(seed, how):
    """600 draws: its error is 0.003 or so, the distances are 0.03 and more."""
    z = normal(seed, 600, 2)
    other = {"shift": z + 1, "scale": 2 * z, "dependence": z[:, :1].expand(-1, 2)}[how]
    assert wae.mmd_imq(other, normal(seed + 1, 600, 2)).item() > 0.01


def test_three_points_have_the_moments_of_a_normal_and_are_not_one():
    """In exact proportions the moment loss is 0; MMD is 20 times that of as many normal draws."""
    law = 3 ** 0.5 * torch.tensor([-1.0] + 4 * [0.0] + [1.0]).double().repeat(300)[:, None]
    assert wae.moment_loss(law).item() < 100 * EPS
    u, v = normal(0, 2, 1800, 1)
    assert wae.mmd_imq(law, u).item() > 20 * abs(wae.mmd_imq(v, u).item())


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
    mixed = wae.shuffled(z)
    assert torch.equal(mixed.sort(dim=0).values, z)
    line = torch.arange(200.0)[:, None].expand(-1, 2)
    assert abs(torch.corrcoef(wae.shuffled(line).T)[0, 1].item()) < 6 / 200 ** 0.5


def test_draws_of_the_prior_are_compared_with_other_draws():
    """With the same ones MMD² is not about 0, but -2 (7 - E k) / n. The default seed is 0."""
    mmd = [wae.limits(Namespace(seed=seed, n_codes=300, z_dim=16), {})["N(0, I)"]["mmd"]
           for seed in range(10)]
    assert abs(mmd[0]) < 6 * stdev(mmd[1:])


# --- schedule and networks ---------------------------------------------------------------------

@given(st.integers(1, 3000))
def test_weight_starts_at_a_thousandth_doubles_and_ends_at_2048(steps):
    found = [wae.weight(step, steps) for step in range(1, steps + 1)]
    assert found[0] == 0.001 and all(b in (a, 2 * a) for a, b in zip(found, found[1:])) \
        if steps >= wae.PARTS else found == sorted(found)
    if steps >= wae.PARTS:
        assert found[-1] == pytest.approx(2.048) and len(set(found)) == 12


@pytest.mark.parametrize("c, side", [(1, 28), (3, 32), (3, 64)])
def test_codes_and_pictures_have_their_shapes(c, side):
    torch.manual_seed(0)
    net = wae.Autoencoder(c, side, 5).eval()
    x = torch.rand(4, c, side, side) * 2 - 1
    z = net.encode(x)
    assert z.shape == (4, 5) and torch.equal(z, net.encode(x))  # no noise
    x_rec = net.decode(z)
    assert x_rec.shape == x.shape and x_rec.abs().max() <= 1


# --- whole runs --------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def small_runs(monkeypatch, no_figures):
    monkeypatch.setattr(wae, "N_SAMPLES", 100)
    monkeypatch.setattr(wae, "N_CODES", 50)
    load = common.load_images
    monkeypatch.setattr(common, "load_images", lambda *a, **k: few(load(*a, **k)))


def few(images):
    return images._replace(x=images.x[:600], y=None)


def run(out, digits_dir, *flags):
    wae.main(["--data", "digits", "--data-dir", str(digits_dir), "--steps", "4", "--batch", "8",
              "--out", str(out), *flags])
    return results(out)


def test_all_models_killed_in_the_middle_resume_to_the_same_bits(tmp_path, digits_dir, capsys):
    straight = run(tmp_path / "straight", digits_dir)
    table = capsys.readouterr().out.split("law ")[1]
    assert sorted(straight) == ["log.csv", *(f"samples_{name}.pt" for name in
                                             ("ae", "mmd", "moments"))]
    for death in (2, 4, 3):
        with killed_after(death):
            run(tmp_path / "killed", digits_dir, "--resume")
    capsys.readouterr()
    assert same(run(tmp_path / "killed", digits_dir, "--resume"), straight)
    assert capsys.readouterr().out.split("law ")[1] == table


@pytest.mark.usefixtures("no_checkpoints")
def test_the_kept_weights_draw_the_samples(tmp_path, digits_dir):
    samples = run(tmp_path, digits_dir, "--models", "mmd")["samples_mmd.pt"]
    torch.manual_seed(0)
    z = torch.randn(len(samples), 8)
    net = wae.Autoencoder(1, 28, 8)
    net.load_state_dict(torch.load(tmp_path / "weights_mmd.pt"))
    assert torch.equal(common.to_uint8(wae.in_parts(net.eval().decode, z)), samples)


@pytest.mark.usefixtures("no_checkpoints")
def test_options_change_the_training_and_nothing_else(tmp_path, digits_dir):
    short = ["--models", "moments"]
    plain = run(tmp_path / "plain", digits_dir, *short)
    assert same(run(tmp_path / "again", digits_dir, *short), plain)
    for flags in (["--lr", "0.01"], ["--z-dim", "3"], ["--seed", "1"], ["--batch", "9"]):
        out = run(tmp_path / "".join(flags), digits_dir, *short, *flags)
        assert out.keys() == plain.keys() and not same(out, plain), flags


@pytest.mark.usefixtures("no_checkpoints")
def test_the_plain_autoencoder_ignores_the_penalty(tmp_path, digits_dir, monkeypatch):
    """λ a thousand times larger changes the other two alone."""
    plain = run(tmp_path / "plain", digits_dir)
    original = wae.weight
    monkeypatch.setattr(wae, "weight", lambda step, steps: 1000 * original(step, steps))
    heavy = run(tmp_path / "heavy", digits_dir)
    changed = {name for name in plain if name.endswith(".pt")
               and not torch.equal(plain[name], heavy[name])}
    assert changed == {"samples_moments.pt", "samples_mmd.pt"}


@pytest.mark.usefixtures("no_checkpoints")
def test_training_brings_the_codes_nearer_to_the_prior(tmp_path, digits_dir, monkeypatch):
    """30 steps with λ = 2: the penalty falls to a third or less for both, from 0.5 and more."""
    monkeypatch.setattr(wae, "weight", lambda step, steps: 2.0)
    run(tmp_path, digits_dir, "--models", "moments", "mmd", "--steps", "30", "--batch", "64")
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    for name in ("moments", "mmd"):
        penalties = [float(row["penalty"]) for row in rows if row["model"] == name]
        assert mean(penalties[-5:]) < mean(penalties[:2]) / 3, name


def test_a_loss_that_explodes_names_itself(tmp_path, digits_dir, monkeypatch, capsys):
    monkeypatch.setitem(wae.PENALTIES, "moments", lambda z: z.sum() * math.nan)
    one_line(capsys, lambda: run(tmp_path, digits_dir, "--models", "moments"),
             "loss is nan at step 1", status=1)
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("flags, words", [
    (["--models", "vae"], ["--models", "vae"]),
    (["--z-dim", "0"], ["--z-dim", "0"]),
    (["--z-dim", "1"], ["--z-dim", "2 or more"]),
    (["--lr", "-1"], ["--lr", "-1"]),
    (["--batch", "1"], ["--batch 2 or more"])])
def test_bad_flags_get_one_line(tmp_path, digits_dir, capsys, flags, words):
    one_line(capsys, lambda: run(tmp_path, digits_dir, *flags), *words)


@pytest.mark.draws
def test_a_small_folder_is_enough_and_a_tiny_one_is_refused(tmp_path, digits_dir, capsys):
    flags = ["--size", "32", "--models", "moments", "--z-dim", "2"]
    run(tmp_path / "a", digits_dir, "--data", folder_of_pictures(tmp_path / "p", 20, 32), *flags)
    for n, words in ((9, "at least 10"), (19, "at least 20")):
        folder = folder_of_pictures(tmp_path / f"{n}", n, 32)
        one_line(capsys, lambda: run(tmp_path / "b", digits_dir, "--data", folder, *flags), words)


@pytest.mark.parametrize("n", [2, 5, 20, 600])
def test_like_pictures_are_the_nearest_of_the_others(n):
    """However few there are, none is compared with itself; codes are the pixels here."""
    x = normal(n, n, 1, 2, 2).float().clamp(-1, 1)
    net = mock.Mock(encode=nn.Flatten(), decode=nn.Unflatten(1, (1, 2, 2)))
    rows = wae.pictures(net, x, x.flatten(1), x, x)["between"].unflatten(0, (8, 9))
    for i in range(4):
        one, other = rows[i, 0], rows[i, -1]
        others = common.to_uint8(torch.cat([x[:500][:i % n], x[:500][i % n + 1:]]))
        gaps = (others.float() - common.to_uint8(x)[i % n].float()).flatten(1).norm(dim=1)
        assert torch.equal(one, common.to_uint8(x)[i % n])
        assert torch.equal(other, others[gaps.argmin()])


def test_odd_sides_are_refused(tmp_path, digits_dir, capsys):
    folder = folder_of_pictures(tmp_path / "p", 20, 30)
    one_line(capsys, lambda: run(tmp_path / "o", digits_dir, "--data", folder, "--size", "30"),
             "--size 28")
