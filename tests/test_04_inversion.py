"""Chapter 04: inversion against least squares, rows that stay alone, losses and measures."""

import importlib
import math
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from strategies import about, generator, normal, rejected, seeds

inversion = importlib.import_module("04_inversion")
EPS = torch.finfo(torch.float64).eps
counts, starts = st.integers(1, 5), st.integers(1, 4)


def small_problem(seed, n, r):
    """A smooth G from z [B, 3] to [B, 2, 3, 3] with batch norm, and n pictures with r starts."""
    torch.manual_seed(seed)
    G = nn.Sequential(nn.Linear(3, 20), nn.BatchNorm1d(20), nn.Tanh(), nn.Linear(20, 18),
                      nn.Unflatten(1, (2, 3, 3)), nn.Tanh()).double().eval()
    return G, normal(seed, n, 2, 3, 3).tanh(), normal(seed + 1, n, r, 3)


# --- inversion ---------------------------------------------------------------------------------

def each_row_is_searched_alone(invert, seed, n, r):
    """Each start moves as if it were alone, and each picture keeps the best of its own ends."""
    G, x, z0 = small_problem(seed, n, r)
    z, errors = invert(G, x, z0, 7, 0.3)
    assert z.shape == (n, 3) and errors.shape == (n, r, 8)
    for i in range(n):
        for j in range(r):
            alone = invert(G, x[i:i + 1], z0[i:i + 1, j:j + 1], 7, 0.3)[1][0, 0]
            # Adam divides by the gradient, which may be small: rounding errors become larger
            assert_close(alone, errors[i, j], rtol=1e-7, atol=1e-9)
            assert_close(alone[0], F.mse_loss(G(z0[i, j:j + 1])[0], x[i]), rtol=1e-9, atol=0)
        assert_close(F.mse_loss(G(z[i:i + 1])[0], x[i]), errors[i, :, -1].min(), rtol=1e-9, atol=0)


@about("invert")
@given(seeds(), counts, starts)
def test_each_row_is_searched_alone_and_each_picture_keeps_its_best(seed, n, r):
    each_row_is_searched_alone(inversion.invert, seed, n, r)


def a_start_that_ends_at_nan_loses(invert, seed, n, r):
    """Two starts more, which are nan for every picture: the best of the others is found."""
    G, x, z0 = small_problem(seed, n, r)
    z, errors = inversion.invert(G, x, z0, 4, 0.3)
    bad = torch.full((n, 1, 3), math.nan, dtype=torch.float64)
    z_of_more, errors_of_more = invert(G, x, torch.cat([bad, z0, bad], dim=1), 4, 0.3)
    assert_close(z_of_more, z, rtol=1e-9, atol=1e-12)  # rounding: products of another size
    assert_close(errors_of_more[:, 1:-1], errors, rtol=1e-9, atol=1e-12)
    assert errors_of_more[:, [0, -1]].isnan().all()


@about("invert", edge=True)
@given(seeds(), counts, starts)
def test_a_start_that_ends_at_nan_loses_to_all_others(seed, n, r):
    a_start_that_ends_at_nan_loses(inversion.invert, seed, n, r)


def choosing(choose):
    """invert() with another choice among the last errors [N, R] of all starts."""
    def twin(G, x, z0, steps, lr):
        errors = inversion.invert(G, x, z0, steps, lr)[1]
        best = z0[torch.arange(len(x)), choose(errors[:, :, -1])]
        return inversion.invert(G, x, best[:, None], steps, lr)[0], errors
    return twin


def normalised_over_the_batch(G, x, z0, steps, lr):
    """Gradient steps of one start, divided by the norm of the gradients of all pictures."""
    z, errors = z0[:, 0], []
    for _ in range(steps + 1):
        end = z.detach().requires_grad_()
        errors.append(((G(end) - x) ** 2).mean(dim=(1, 2, 3)))
        grad, = torch.autograd.grad(errors[-1].sum(), end)
        z = end - lr * grad / grad.norm()
    return end.detach(), torch.stack(errors, dim=1)[:, None].detach()


@pytest.mark.parametrize("prop, twin, r", [
    (each_row_is_searched_alone, choosing(lambda e: e.mean(dim=0).argmin().expand(len(e))), 4),
    (each_row_is_searched_alone, normalised_over_the_batch, 1),
    (a_start_that_ends_at_nan_loses, choosing(lambda e: e.argmin(dim=1)), 2)],
    ids=["one start for the whole batch", "gradients normalised over the batch", "plain argmin"])
def test_wrong_searches_are_rejected(prop, twin, r):
    assert rejected(prop, twin, 0, 5, r)


@about("invert", edge=True)
def test_a_nan_loses_to_an_infinite_error_and_no_steps_leave_the_start_as_it_is():
    G, x, z0 = small_problem(0, 2, 2)
    z0[:, 0] = math.nan
    z, errors = inversion.invert(G, 1e200 * x, z0, 0, 0.1)  # the squares are no float64
    assert errors[:, 1].isinf().all() and torch.equal(z, z0[:, 1])


@about("invert", "squared_error", "check_starts", edge=True)
@pytest.mark.parametrize("shape", [(4, 3, 3), (1, 2, 3, 3), (4, 2, 1, 3), (4, 1, 3, 3)])
def test_pictures_of_a_shape_that_g_does_not_generate_are_refused(shape):
    """They would broadcast: each picture with all, one for all, a row for all, grey for colour."""
    G, x, z0 = small_problem(0, 4, 2)
    pytest.raises(ValueError, inversion.squared_error, x, normal(1, *shape))
    pytest.raises(ValueError, inversion.invert, G, normal(1, *shape), z0, 1, 0.1)
    pytest.raises(ValueError, inversion.check_starts, G, normal(1, *shape), z0)


@about("invert", "check_starts", edge=True)
def test_a_generator_in_training_mode_and_starts_without_three_dimensions_are_refused():
    G, x, z0 = small_problem(0, 2, 1)
    for z in (z0[:, 0], z0[:1], z0[0, 0]):
        with pytest.raises(ValueError, match=re.escape(str(list(z.shape)))):
            inversion.check_starts(G, x, z)
        pytest.raises(ValueError, inversion.invert, G, x, z, 1, 0.1)
    pytest.raises(ValueError, inversion.invert, G.train(), x, z0, 1, 0.1)
    pytest.raises(ValueError, inversion.check_starts, G, x, z0)


@about("invert", edge=True)
@given(seeds())
def test_it_does_not_matter_how_tensors_lie_in_memory(seed):
    G, x, z0 = small_problem(seed, 3, 2)
    expected = inversion.invert(G, x, z0, 3, 0.3)
    x = x.to(memory_format=torch.channels_last)
    z0 = z0.transpose(0, 1).contiguous().transpose(0, 1)
    assert_close(inversion.invert(G, x, z0, 3, 0.3), expected)  # sums may have another order


@about("invert")
@settings(max_examples=8)
@given(seeds(), st.integers(1, 3))
def test_a_linear_generator_is_inverted_by_least_squares(seed, n):
    """The objective is convex: every start ends at the one minimum that torch's solver gives."""
    Q, x = torch.linalg.qr(normal(seed, 9, 4))[0], normal(seed + 1, n, 1, 3, 3)
    G = nn.Sequential(nn.Linear(4, 9, bias=False), nn.Unflatten(1, (1, 3, 3))).double().eval()
    G[0].weight.data = Q  # its columns are orthonormal, so that Adam's path is short
    z, errors = inversion.invert(G, x, normal(seed + 2, n, 2, 4), 400, 0.1)
    expected = torch.linalg.lstsq(Q, x.flatten(1).T).solution.T
    assert_close(z, expected, rtol=0, atol=0.01)  # what Adam's last small steps leave
    residual = ((expected @ Q.T - x.flatten(1)) ** 2).mean(dim=1)
    assert_close(errors[:, :, -1], residual[:, None].expand(-1, 2), rtol=0, atol=1e-4)


@about("invert")
@given(seeds())
def test_neither_the_generator_nor_the_starts_are_changed(seed):
    G, x, z0 = small_problem(seed, 2, 2)
    before = [v.clone() for v in (z0, *G.state_dict().values())]
    z, errors = inversion.invert(G, x, z0, 3, 0.1)
    assert_close([z0, *G.state_dict().values()], before, rtol=0, atol=0)
    assert all(p.grad is None for p in G.parameters())
    assert not z.requires_grad and not errors.requires_grad


# --- encoder, measures, networks ---------------------------------------------------------------

def both_terms_count(loss, seed):
    """E is the transpose of an orthonormal Q: z is found again, and off Q's plane pixels stay.

    An E that is off by a constant s pays for it in z and in the pixels; d(s² c)/ds = 2 s c.
    """
    Q, x, z = torch.linalg.qr(normal(seed, 9, 4))[0], normal(seed + 1, 6, 9), normal(seed + 2, 6, 4)
    s = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def cost(x):
        return loss(lambda x: x.flatten(1) @ Q + s, lambda z: (z @ Q.T).view(6, 1, 3, 3),
                    x.view(6, 1, 3, 3), z)

    on_the_plane = x @ Q @ Q.T
    assert_close(cost(x), F.mse_loss(on_the_plane, x), rtol=1e-9, atol=100 * EPS)
    s.data += 0.5
    paid, c = cost(on_the_plane), torch.tensor(1 + 4 / 9, dtype=torch.float64)
    assert_close(paid, c / 4, rtol=1e-9, atol=100 * EPS)
    assert_close(torch.autograd.grad(paid, s)[0], c, rtol=1e-9, atol=100 * EPS)


@about("encoder_loss")
@given(seeds())
def test_the_encoder_pays_for_codes_and_for_pixels(seed):
    both_terms_count(inversion.encoder_loss, seed)


@pytest.mark.parametrize("twin", [
    lambda E, G, x, z: F.mse_loss(E(G(z)), z),
    lambda E, G, x, z: F.mse_loss(G(E(x)), x),
    lambda E, G, x, z: F.mse_loss(E(G(z)), z, reduction="sum") + F.mse_loss(G(E(x)), x),
    lambda E, G, x, z: F.mse_loss(E(G(z)), z) + F.mse_loss(G(E(x).detach()), x)],
    ids=["codes alone", "pixels alone", "sum for mean", "no gradient through G"])
def test_wrong_encoder_losses_are_rejected(twin):
    assert rejected(both_terms_count, twin, 0)


@about("squared_error")
@given(seeds(), st.integers(1, 8))
def test_errors_and_measures_are_what_loops_over_pictures_give(seed, n):
    x, x_rec = normal(seed, n, 2, 3, 3), normal(seed + 1, n, 2, 3, 3)
    x_rec[0] = x[0] + 0.9 * inversion.FOUND ** 0.5  # the only one below FOUND
    z, z_true = normal(seed + 2, n, 4), normal(seed + 3, n, 4)
    y = torch.randint(3, (n,), generator=generator(seed))
    error = [math.dist(a.flatten(), b.flatten()) ** 2 / 18 for a, b in zip(x, x_rec)]
    assert inversion.squared_error(x, x_rec).tolist() == pytest.approx(error)
    expected = {"mse": sum(error) / n, "psnr": 10 * math.log10(4 / (sum(error) / n)),
                "found": 1 / n, "norm": sum(math.hypot(*a) for a in z) / n,
                "z error": sum(math.dist(a, b) ** 2 for a, b in zip(z, z_true)) / (4 * n)}
    for k in set(y.tolist()):
        mine = [e for e, label in zip(error, y) if label == k]
        expected[f"class {k}"] = sum(mine) / len(mine)
    assert inversion.measure(x, x_rec, z, z_true, y) == pytest.approx(expected)
    assert math.isnan(inversion.measure(x, x_rec, z, None, None)["z error"])


@settings(max_examples=5)
@given(seeds(), st.integers(1, 40))
def test_figures_take_any_number_of_pictures_and_show_the_largest_errors(seed, n):
    """worst.png, left to right: each picture before its inversion, the largest error first."""
    x, x_rec, saved = normal(seed, n, 1, 4, 4).tanh(), normal(seed + 1, n, 1, 4, 4).tanh(), {}
    found = {"x_rec": x_rec, "psnr": 0.0, "z": normal(seed, n, 3), "errors": torch.ones(n, 2, 3)}
    results = {label: {"random starts": found, "hybrid": found} for label in ("generated", "test")}
    with mock.patch.multiple(
            inversion.common, panel=lambda x, columns=8: x, to_uint8=lambda x: x,
            save_panels=lambda file, rows, *rest, **more: saved.update({file.name: rows})):
        inversion.figures(SimpleNamespace(out=Path(), seed=0), "data", lambda z: x[:1], {
            label: (x, None, None) for label in results}, results, x)
    errors = ((x - x_rec) ** 2).mean(dim=(1, 2, 3))
    order = sorted(range(n), key=lambda i: -errors[i])[:32]
    expected = [picture for i in order for picture in (x[i], x_rec[i])]
    assert_close(saved["worst.png"][0][1][1][1], torch.stack(expected), rtol=0, atol=0)
    assert set(saved) == {"inversion.png", "starts.png", "worst.png", "between.png"}


@given(st.integers(1, 40))
def test_interpolations_begin_and_end_at_pictures(n):
    x = torch.arange(float(n))[:, None, None, None].expand(n, 1, 4, 4) / n
    rows = inversion.interpolate(x).unflatten(0, (8, 9))
    assert_close(rows[:, [0, -1]].flatten(0, 1), torch.cat([x] * 16)[:16])
    assert_close(rows[:, 4], (rows[:, 0] + rows[:, -1]) / 2)


@pytest.mark.parametrize("c, side", [(1, 28), (3, 32), (3, 64)])
def test_networks_have_their_shapes(c, side):
    x = inversion.generator(5, c, side)(torch.randn(4, 5))
    assert x.shape == (4, c, side, side) and x.abs().max() <= 1
    assert inversion.discriminator(c, side)(x).shape == (4,)
    assert inversion.encoder(5, c, side)(x).shape == (4, 5)
