"""Chapter 05: restoration against ridge regression, masks of the stated shape, hidden is hidden."""

import importlib
import itertools
import math
import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.transforms import functional as TF

from strategies import about, generator, normal, rejected, seeds

restoration = importlib.import_module("05_restoration")
counts, starts, sides = st.integers(1, 4), st.integers(1, 3), st.sampled_from([28, 32, 64])


def random_mask(seed, n, side):
    """About half of the pixels seen, and never none."""
    mask = torch.rand(n, 1, side, side, generator=generator(seed)).round().double()
    mask[:, :, 0, 0] = 1
    return mask


def small_problem(seed, n, r):
    """A smooth G from z [B, 3] to [B, 2, 3, 3]; n pictures, their masks, and r starts for each."""
    torch.manual_seed(seed)
    G = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 18), nn.Unflatten(1, (2, 3, 3)),
                      nn.Tanh()).double().eval()
    return G, normal(seed, n, 2, 3, 3), random_mask(seed, n, 3), normal(seed + 1, n, r, 3)


def squares_where(a, b, where):
    """(a - b)² of one picture in all channels where `where` [1, H, W] is 1, as a list."""
    numbers = (c.expand_as(a).flatten().tolist() for c in (a, b, where))
    return [(p - q) ** 2 for p, q, seen in zip(*numbers) if seen == 1]


# --- restoration -------------------------------------------------------------------------------

@about("misfit")
@given(seeds(), counts)
def test_the_misfit_is_the_sum_over_channels_and_seen_pixels(seed, n):
    G, y, mask, z0 = small_problem(seed, n, 1)
    expected = [sum(squares_where(x, *case)) for x, *case in zip(G(z0[:, 0]), y, mask)]
    assert restoration.misfit(G, z0[:, 0], y, mask).tolist() == pytest.approx(expected)


def hidden_pixels_do_not_matter(restore, seed, n, r, scale):
    """Whatever y holds where the mask is 0: the same z and objectives, to the last bit."""
    G, y, mask, z0 = small_problem(seed, n, r)
    other = torch.where(mask == 1, y, scale * normal(seed + 2, *y.shape))
    expected, found = (restore(G, a, mask, z0, 5, 0.1, 0.03) for a in (y, other))
    assert_close(found, expected, rtol=0, atol=0)


@about("restore", "misfit")
@given(seeds(), counts, starts)
def test_hidden_pixels_do_not_matter_at_all(seed, n, r):
    hidden_pixels_do_not_matter(restoration.restore, seed, n, r, 10)


@about("restore", "misfit", "neighbours", edge=True)
@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_hidden_pixels_that_are_no_numbers_do_not_matter(scale):
    hidden_pixels_do_not_matter(restoration.restore, 0, 4, 3, scale)
    G, y, mask, z0 = small_problem(0, 4, 1)
    other = torch.where(mask == 1, y, scale)
    for f in (restoration.neighbours, lambda y, mask: restoration.misfit(G, z0[:, 0], y, mask)):
        assert_close(f(other, mask), f(y, mask), rtol=0, atol=0)


@pytest.mark.parametrize("scale, twin", [
    (10, lambda G, z, y, mask: ((G(z) - y) ** 2).flatten(1).sum(dim=1)),
    (math.nan, lambda G, z, y, mask: (mask * (G(z) - y) ** 2).flatten(1).sum(dim=1)),
    (math.nan, lambda G, z, y, mask: torch.where(mask == 1, (G(z) - y) ** 2, 0).sum((1, 2, 3)))],
    ids=["blind", "0 times nan", "0 times nan in the gradient"])
def test_what_does_not_hide_is_rejected(scale, twin, monkeypatch):
    monkeypatch.setattr(restoration, "misfit", twin)
    assert rejected(hidden_pixels_do_not_matter, restoration.restore, 0, 2, 2, scale)


def each_row_is_searched_alone(restore, seed, n, r):
    """Each start moves as if it were alone, and each picture keeps the best of its own ends."""
    G, y, mask, z0 = small_problem(seed, n, r)
    z, objectives = restore(G, y, mask, z0, 5, 0.1, 0.2)
    for i in range(n):
        alone = [restore(G, y[i:i + 1], mask[i:i + 1], z0[i:i + 1, j:j + 1], 5, 0.1, 0.2)
                 for j in range(r)]
        # Adam divides by the gradient, which may be small: rounding errors become larger
        assert_close(objectives[i], torch.cat([ends[0] for _, ends in alone]), rtol=1e-7, atol=1e-9)
        assert_close(z[i:i + 1], alone[objectives[i].argmin()][0], rtol=1e-6, atol=1e-8)
        own = (mask[i] * (G(z[i:i + 1])[0] - y[i]) ** 2).sum() + 0.2 * (z[i] ** 2).sum()
        assert_close(own, objectives[i].min(), rtol=1e-9, atol=0)


@about("restore")
@given(seeds(), counts, starts)
def test_each_row_is_searched_alone_and_each_picture_keeps_its_best(seed, n, r):
    each_row_is_searched_alone(restoration.restore, seed, n, r)


def a_start_that_ends_at_nan_loses(restore, seed, n, r):
    """Two starts more, which are nan for every picture: the best of the others is found."""
    G, y, mask, z0 = small_problem(seed, n, r)
    bad = torch.full((n, 1, 3), math.nan, dtype=torch.float64)
    z, objectives = restoration.restore(G, y, mask, z0, 4, 0.1, 0.2)
    z_of_more, of_more = restore(G, y, mask, torch.cat([bad, z0, bad], dim=1), 4, 0.1, 0.2)
    assert_close(z_of_more, z, rtol=1e-9, atol=1e-12)  # rounding: products of another size
    assert_close(of_more[:, 1:-1], objectives, rtol=1e-9, atol=1e-12)
    assert of_more[:, [0, -1]].isnan().all()


@about("restore", edge=True)
@given(seeds(), counts, starts)
def test_a_start_that_ends_at_nan_loses_to_all_others(seed, n, r):
    a_start_that_ends_at_nan_loses(restoration.restore, seed, n, r)


@pytest.mark.parametrize("prop, choose", [
    (each_row_is_searched_alone, lambda ends: ends.mean(dim=0).argmin().expand(len(ends))),
    (a_start_that_ends_at_nan_loses, lambda ends: ends.argmin(dim=1))],
    ids=["one start for the whole batch", "plain argmin"])
def test_wrong_choices_of_the_start_are_rejected(prop, choose):
    def twin(G, y, mask, z0, *rest):
        objectives = restoration.restore(G, y, mask, z0, *rest)[1]
        best = z0[torch.arange(len(y)), choose(objectives)]
        return restoration.restore(G, y, mask, best[:, None], *rest)[0], objectives
    assert rejected(prop, twin, 0, 4, 3)


@about("restore", edge=True)
def test_a_nan_loses_to_an_infinite_objective_and_no_steps_leave_the_start_as_it_is():
    G, y, mask, z0 = small_problem(0, 2, 2)
    z0[:, 0], z0[:, 1] = math.nan, 1e200
    z, objectives = restoration.restore(G, y, mask, z0, 0, 0.1, 0.2)
    assert objectives[:, 1].isinf().all() and torch.equal(z, z0[:, 1])


REFUSED = [
    ((2, 3, 3), (2, 1, 3, 3)), ((2, 2, 3, 3), (2, 3, 3)), ((1, 2, 3, 3), (1, 1, 3, 3)),
    ((2, 2, 3, 3), (3, 3)), ((2, 2, 3, 3), (3, 1, 3, 3)), ((2, 1, 3, 3), (2, 1, 3, 3)),
    ((2, 2, 3, 3), (2, 1, 3, 2)), ((2, 2, 3, 3), (2, 1, 1, 1)), ((2, 2, 3, 4), (2, 1, 3, 4))]


@about("check_mask", "misfit", "restore", edge=True)
@pytest.mark.parametrize("y, mask", REFUSED)
def test_sizes_that_do_not_fit_are_refused(y, mask):
    """They would broadcast: each picture with every mask, one for all, grey for colour."""
    G, x, _, z0 = small_problem(0, 2, 3)
    y, mask = torch.zeros(y).double(), torch.ones(mask)
    pytest.raises(ValueError, restoration.check_mask, mask, x, y)
    pytest.raises(ValueError, restoration.misfit, G, z0[:, 0], y, mask)
    pytest.raises(ValueError, restoration.psnr, x, y, mask)
    with pytest.raises(ValueError) as refused:
        restoration.restore(G, y, mask, z0, 1, 0.1, 0.2)
    assert "[6, " not in str(refused.value)  # the reader's own shapes, and not those of all starts


@about("check_starts", "restore", edge=True)
def test_starts_that_do_not_fit_and_a_generator_in_training_mode_are_refused():
    G, y, mask, z0 = small_problem(0, 2, 1)
    for z in (z0[:, 0], z0[:1], z0[0, 0]):
        with pytest.raises(ValueError, match=re.escape(str(list(z.shape)))):
            restoration.check_starts(G, y, z)
        pytest.raises(ValueError, restoration.restore, G, y, mask, z, 1, 0.1, 0.2)
    pytest.raises(ValueError, restoration.restore, G.train(), y, mask, z0, 1, 0.1, 0.2)
    pytest.raises(ValueError, restoration.check_starts, G, y, z0)


def other_values_than_0_and_1_are_refused(restore):
    """A mask of 0 and 255, or of 0 and 0.999, would hide every pixel: z* = 0 fits them all."""
    G, y, mask, z0 = small_problem(0, 2, 1)
    for bad in ((255 * mask).to(torch.uint8), 0.999 * mask, -mask, mask / 0):
        try:
            restore(G, y, bad, z0, 1, 0.1, 0.2)
        except ValueError:
            continue
        raise AssertionError(f"not refused: a mask of {bad.dtype}, {bad.min()} to {bad.max()}")


@about("restore", edge=True)
def test_other_values_than_0_and_1_are_refused():
    other_values_than_0_and_1_are_refused(restoration.restore)


@about("check_mask", "misfit", "neighbours", edge=True)
@pytest.mark.parametrize("factor", [255, 0.999, -1, math.nan])
def test_other_values_than_0_and_1_are_refused_everywhere(factor):
    G, y, mask, z0 = small_problem(0, 2, 1)
    pytest.raises(ValueError, restoration.check_mask, factor * mask, y)
    pytest.raises(ValueError, restoration.misfit, G, z0[:, 0], y, factor * mask)
    pytest.raises(ValueError, restoration.neighbours, y, factor * mask)
    pytest.raises(ValueError, restoration.psnr, y, -y, factor * mask)


def test_a_mask_whose_values_are_not_looked_at_is_rejected():
    assert rejected(other_values_than_0_and_1_are_refused, lambda G, y, mask, *rest:
                    restoration.restore(G, y, mask == 1, *rest))


@about("check_mask", "misfit", "restore", "neighbours", edge=True)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16])
def test_masks_of_every_type_and_as_large_as_the_pictures_hide_the_same(dtype):
    G, y, mask, z0 = small_problem(0, 2, 1)

    def all_of(mask):
        return (restoration.misfit(G, z0[:, 0], y, mask), restoration.neighbours(y, mask),
                restoration.restore(G, y, mask, z0, 2, 0.1, 0.2), restoration.psnr(y, -y, mask))
    for other in (mask.to(dtype), mask.to(dtype).expand_as(y)):
        assert restoration.check_mask(other, y) is None
        assert_close(all_of(other), all_of(mask), rtol=0, atol=0)


def one_mask_serves_all_pictures(restore, n, r):
    """[1, 1, H, W] is the same as N copies of it, whatever the numbers of pictures and starts."""
    G, y, mask, z0 = small_problem(0, n, r)
    expected = restore(G, y, mask[:1].expand(n, 1, 3, 3), z0, 3, 0.1, 0.2)
    try:
        found = restore(G, y, mask[:1], z0, 3, 0.1, 0.2)
    except ValueError:
        raise AssertionError("refused") from None
    assert_close(found, expected, rtol=0, atol=0)


@about("restore", edge=True)
@given(counts, starts)
def test_one_mask_serves_all_pictures(n, r):
    one_mask_serves_all_pictures(restoration.restore, n, r)
    _, y, mask, _ = small_problem(0, n, r)
    assert_close(restoration.neighbours(y, mask[:1]),
                 restoration.neighbours(y, mask[:1].expand(n, 1, 3, 3)), rtol=0, atol=0)


def test_a_mask_that_is_repeated_as_it_is_is_rejected():
    """[1, 1, H, W] becomes [R, 1, H, W]: that fits N R pictures only for R = 1 or N = 1."""
    def twin(G, y, mask, z0, *rest):
        restoration.check_mask(mask.repeat_interleave(z0.shape[1], dim=0),
                               y.repeat_interleave(z0.shape[1], dim=0))
        return restoration.restore(G, y, mask, z0, *rest)
    assert rejected(one_mask_serves_all_pictures, twin, 2, 3)


@about("restore", edge=True)
@given(seeds())
def test_it_does_not_matter_how_tensors_lie_in_memory(seed):
    G, y, mask, z0 = small_problem(seed, 3, 2)
    expected = restoration.restore(G, y, mask, z0, 3, 0.1, 0.2)
    y = y.to(memory_format=torch.channels_last)
    mask = mask.transpose(2, 3).contiguous().transpose(2, 3)
    z0 = z0.transpose(0, 1).contiguous().transpose(0, 1)
    found = restoration.restore(G, y, mask, z0, 3, 0.1, 0.2)
    assert_close(found, expected)  # sums may have another order


def linear_restoration_is_ridge_regression(restore, seed, lam):
    """G(z) = A z: the minimum is z = (Aᵀ M A + λ I)⁻¹ Aᵀ M y, whatever the starts."""
    A, _ = torch.linalg.qr(normal(seed, 9, 3))
    G = nn.Sequential(nn.Linear(3, 9, bias=False), nn.Unflatten(1, (1, 3, 3))).double().eval()
    G[0].weight.data = A
    y, mask = normal(seed + 1, 2, 1, 3, 3), random_mask(seed, 2, 3)
    z, objectives = restore(G, y, mask, normal(seed + 2, 2, 2, 3), 500, 0.1, lam)
    for z_i, ends, m, y_i in zip(z, objectives, mask.flatten(1), y.flatten(1)):
        system = A.T * m @ A + lam * torch.eye(3, dtype=torch.float64)
        best = torch.linalg.solve(system, A.T * m @ y_i)
        lowest = (m * (A @ best - y_i) ** 2).sum() + lam * (best ** 2).sum()
        # what Adam's last small steps leave; z itself is loose where few pixels were seen
        assert_close(ends, lowest.expand(2), rtol=0.01, atol=0.002)
        assert_close(system @ z_i, A.T * m @ y_i, rtol=0, atol=0.05)


@about("restore")
@settings(max_examples=6)
@given(seeds(), st.sampled_from([0.1, 0.5, 2.0]))
def test_with_a_linear_generator_it_is_ridge_regression(seed, lam):
    linear_restoration_is_ridge_regression(restoration.restore, seed, lam)


@pytest.mark.parametrize("twin", [
    lambda G, y, m, z0, k, lr, lam: restoration.restore(G, y, m, z0, k, lr, 0.0),
    lambda G, y, m, z0, k, lr, lam: restoration.restore(G, y, m, z0, k, lr, lam / 9),
    lambda G, y, m, z0, k, lr, lam: restoration.restore(G, m * y, 0 * m + 1, z0, k, lr, lam)],
    ids=["no prior", "mean for sum", "blind"])
def test_wrong_restorations_are_rejected(twin):
    assert rejected(linear_restoration_is_ridge_regression, twin, 0, 2.0)


# --- masks, psnr, baseline ---------------------------------------------------------------------

@about("pepper")
@given(seeds(), counts, sides)
def test_pepper_hides_three_pixels_of_ten_exactly_and_others_in_each_picture(seed, n, side):
    masks = [restoration.pepper(n, side, generator(seed + i)) for i in range(2)]
    mask = torch.cat(masks)
    assert masks[0].shape == (n, 1, side, side) and set(mask.unique().tolist()) == {0.0, 1.0}
    assert ((mask == 0).flatten(1).sum(dim=1) == round(0.3 * side ** 2)).all()
    assert len(mask.unique(dim=0)) == 2 * n


@about("crosswalk")
@given(seeds(), counts, sides)
def test_crosswalk_hides_every_second_row(seed, n, side):
    mask = restoration.crosswalk(n, side, generator(seed))
    assert mask.shape == (n, 1, side, side)
    assert (mask[:, :, ::2] == 1).all() and (mask[:, :, 1::2] == 0).all()


@about("square")
@given(seeds(), counts, sides)
def test_the_square_is_a_square(seed, n, side):
    mask, width = restoration.square(n, side, generator(seed)), round(side * 2 / 7)
    assert mask.shape == (n, 1, side, side) and (side != 28 or width == 8)
    for hidden in mask[:, 0] == 0:
        assert hidden.sum() == width ** 2
        for at in hidden.nonzero().T:
            assert at.max() - at.min() == width - 1


@about("square")
def test_the_square_reaches_every_corner():
    mask = restoration.square(4000, 28, generator(0))  # 21² places: one is missed with p 5e-4
    assert (mask[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]] == 0).any(dim=0).all()


@about("holes")
@given(seeds(), counts, sides, st.integers(1, 3))
def test_holes_are_discs_inside_the_picture(seed, n, side, count):
    """Each disc holds about π r² pixels; `count` of them at most that many times as many."""
    mask = restoration.holes(n, side, generator(seed), count)
    assert mask.shape == (n, 1, side, side)
    disc, rim = math.pi * (side / 8) ** 2, 2 * math.pi * side / 8 * 1.5
    hidden = (mask == 0).flatten(1).sum(dim=1)
    assert (hidden >= disc - rim).all() and (hidden <= count * (disc + rim)).all()
    for one in mask[:, 0] if count == 1 else []:
        for at in (one == 0).nonzero().T:
            assert at.max() - at.min() <= side / 4


@about("holes")
def test_three_holes_hide_more_than_one():
    few, many = ((restoration.holes(200, 28, generator(0), k) == 0).sum() for k in (1, 3))
    assert many > 2 * few


@given(seeds(), counts)
def test_measures_by_their_definitions(seed, n):
    """PSNR on hidden pixels and on all, and the share of pictures in which the neighbours win."""
    a, b, x = normal(seed, 3 * n, 2, 4, 4).split(n)
    mask = random_mask(seed, n, 4)
    mask[:, :, 1, 1] = 0
    found = restoration.measure(x, {"neighbours": a, "known mask": b}, mask)

    def decibels(squares):
        return 20 * math.log10(2 / math.sqrt(sum(squares) / len(squares)))
    for where, name in ((1 - mask, "psnr hidden"), (torch.ones_like(mask), "psnr all")):
        squares = [[squares_where(*one) for one in zip(c, x, where)] for c in (a, b)]
        assert list(found[name].values()) == pytest.approx([decibels(sum(c, [])) for c in squares])
        if name == "psnr hidden":
            wins = sum(sum(p) < sum(q) for p, q in zip(*squares)) / n
    assert found["neighbours win"] == pytest.approx(wins)
    assert found["hidden"] == pytest.approx((mask == 0).double().mean().item())
    same = restoration.measure(x, {"neighbours": b, "known mask": b}, mask)
    assert same["neighbours win"] == 0
    nan = torch.where(mask == 1, math.nan, a)  # what does not count does not matter
    assert restoration.psnr(nan, x, 1 - mask) == found["psnr hidden"]["neighbours"]


def test_psnr_of_half_precision_does_not_overflow():
    """The sum of 245,760 ones is above the largest number of float16; their mean is 1."""
    a, where = torch.ones(20, 3, 64, 64).half(), torch.ones(20, 1, 64, 64).half()
    eps = torch.finfo(torch.float16).eps  # of 10 log10 4, in a few roundings
    assert restoration.psnr(a, 0 * a, where) == pytest.approx(10 * math.log10(4), rel=4 * eps)


def neighbours_are_averaged(fill, seed, n):
    """Against loops over pixels, ring by ring."""
    y, mask = normal(seed, n, 2, 6, 6), random_mask(seed, n, 6)
    mask[:, :, 1:5, 2:6] = 0  # a hole of more than one ring
    found, pixels = fill(y, mask), set(itertools.product(range(6), repeat=2))
    around = list(itertools.product((-1, 0, 1), repeat=2))
    for i in range(n):
        value = {(h, w): y[i, :, h, w] for h, w in pixels if mask[i, 0, h, w]}
        while len(value) < 36:
            near = {(h, w): [value[h + p, w + q] for p, q in around if (h + p, w + q) in value]
                    for h, w in pixels - value.keys()}
            value |= {at: sum(values) / len(values) for at, values in near.items() if values}
        for h, w in pixels:
            assert_close(found[i, :, h, w], value[h, w], rtol=1e-9, atol=1e-12)


@about("neighbours")
@settings(max_examples=10)
@given(seeds(), st.integers(1, 2))
def test_neighbours_are_averaged_ring_by_ring(seed, n):
    neighbours_are_averaged(restoration.neighbours, seed, n)


@pytest.mark.parametrize("twin", [
    lambda y, m: restoration.neighbours(torch.where(m == 1, y, -1.0), torch.ones_like(m)),
    lambda y, m: m * y,
    lambda y, m: F.avg_pool2d(y, 3, 1, 1)], ids=["damage kept", "black", "blur"])
def test_wrong_baselines_are_rejected(twin):
    assert rejected(neighbours_are_averaged, twin, 0, 1)


@about("neighbours", edge=True)
@pytest.mark.parametrize("mask", [torch.tensor([1.0, 0]).view(2, 1, 1, 1).expand(2, 1, 4, 4),
                                  torch.ones(2, 4, 4)], ids=["nothing seen of one", "sizes"])
def test_masks_without_neighbours_are_refused(mask):
    pytest.raises(ValueError, restoration.neighbours, torch.ones(2, 1, 4, 4), mask)


# --- your own photo ----------------------------------------------------------------------------

SEVEN = [(-30, -50), (30, -50), (-5, 50)]
PHOTOS = {"small, on its side": dict(size=1, orientation=6), "shadow": dict(shadow=0.55),
          "turned, near the edge": dict(turn=12, at=(530, 130), light=0.4),
          "light pen on dark": dict(paper=0.15, ink=0.85, light=0.5),
          "all at once": dict(shadow=0.45, turn=-8, orientation=8, at=(400, 200))}


def photograph(path, size=2, at=(320, 240), turn=0, paper=0.85, ink=0.15, light=0.9, shadow=0,
               orientation=1):
    """Writes a photo of 640x480 pixels; returns the share of each pixel that the pen covers."""
    sheet = Image.new("L", (640, 480))
    ImageDraw.Draw(sheet).line([(at[0] + size * x, at[1] + size * y) for x, y in SEVEN], fill=255,
                               width=9 * size, joint="curve")
    pen = TF.to_tensor(sheet.rotate(turn, Image.Resampling.BICUBIC, center=at))[0]
    y, x = torch.linspace(-1, 1, 480)[:, None], torch.linspace(-1, 1, 640)
    shade = (30 * torch.minimum(y + 0.2 * x + 0.3, x + 0.1)).sigmoid()  # below, on the right
    bright = (1 - (1 - light) * (x ** 2 + y ** 2) / 2) * (1 - shadow * shade)  # light: at corners
    scene = bright * (paper + (ink - paper) * pen) * torch.tensor([1, 0.97, 0.9])[:, None, None]
    scene += 0.01 * torch.randn(scene.shape, generator=generator(0))
    picture, exif = TF.to_pil_image(scene.clamp(0, 1)), Image.Exif()
    exif[0x0112] = orientation
    picture = picture.rotate({1: 0, 6: 90, 8: -90}[orientation], expand=True)
    picture.save(path, quality=50, exif=exif)
    return pen


def own(image, mask=None, c=1, side=28):
    return restoration.own_picture(SimpleNamespace(data="digits", image=image, mask=mask), c, side)


def in_the_form_of_mnist(pen, picture):
    """By Pillow: the pen's longer side is 20 pixels of 28, its centre of mass in pixel 14."""
    rows, columns = ((pen > 0.5).any(dim=d).nonzero()[:, 0] for d in (1, 0))
    size = 1.4 * (1 + max(rows.max() - rows.min(), columns.max() - columns.min())).item()
    y, x = (pen.sum(dim=d) @ (torch.arange(1.0 * pen.shape[1 - d]) + 0.5) / pen.sum()
            for d in (1, 0))
    top, left = (500 + at.item() - 14.5 / 28 * size for at in (y, x))
    sheet = TF.to_pil_image(F.pad(picture, [500] * 4))  # Pillow does not cut beyond the rim
    return TF.to_tensor(sheet.resize((28, 28), Image.Resampling.BOX,
                                     (left, top, left + size, top + size)))[0]


def a_photo_becomes_what_the_pen_drew(path, changes):
    pen = photograph(path, **changes)
    pen, ink = in_the_form_of_mnist(pen, pen), (own(path)[0][0, 0] + 1) / 2
    assert torch.corrcoef(torch.stack([ink.flatten(), pen.flatten()]))[0, 1] > 0.95
    far = F.max_pool2d(pen[None], 5, 1, 2)[0] < 0.05  # more than two pixels from the pen
    assert ink[far].mean() < 0.001


@pytest.mark.parametrize("changes", PHOTOS.values(), ids=PHOTOS)
def test_a_photo_becomes_what_the_pen_drew(tmp_path, changes):
    a_photo_becomes_what_the_pen_drew(tmp_path / "a.jpg", changes)


def test_one_grey_for_all_paper_is_rejected(tmp_path, monkeypatch):
    """Without the closing: the paper has the grey of its lightest pixel everywhere."""
    monkeypatch.setattr(F, "max_pool2d", lambda x, *size: x.amax().expand_as(x))
    with pytest.raises((AssertionError, ValueError)):
        a_photo_becomes_what_the_pen_drew(tmp_path / "a.jpg", PHOTOS["shadow"])


def scribble(path, *box):
    """A mask in which this box is hidden."""
    mask = Image.new("L", (640, 480))
    mask.paste(255, box)
    mask.save(path)
    return path


def test_a_mask_lies_on_the_upright_photo_and_moves_with_it(tmp_path):
    """It hides no ink, so the digit keeps its place."""
    mask = scribble(tmp_path / "m.png", 265, 200, 300, 270)
    for orientation in (1, 6, 8):
        pen = photograph(tmp_path / "a.jpg", orientation=orientation)
        hidden = own(tmp_path / "a.jpg", mask)[1][0, 0] == 0
        share = in_the_form_of_mnist(pen, TF.to_tensor(Image.open(mask))[0])
        near = F.max_pool2d(share[None], 3, 1, 1)[0]
        assert (share > 0.25).any() and hidden[share > 0.25].all() and not hidden[near == 0].any()


@pytest.mark.parametrize("c, side", [(1, 28), (3, 32)])
def test_nothing_under_the_mask_matters(tmp_path, c, side):
    """A blob, larger than the digit and hidden; nor does black leak into the pixels beside it."""
    blob = (90, 10, 190, 110)
    photograph(tmp_path / "a.png")
    picture = Image.open(tmp_path / "a.png")
    picture.paste("black", blob)
    picture.save(tmp_path / "b.png")
    mask = scribble(tmp_path / "m.png", *blob)
    (x, seen), (y, _) = (own(tmp_path / name, mask, c, side) for name in ("a.png", "b.png"))
    all_of_x, all_of_y = (own(tmp_path / name, None, c, side)[0] for name in ("a.png", "b.png"))
    assert torch.equal(x, y) and not torch.allclose(all_of_x, all_of_y, atol=0.5)
    assert_close(x, torch.where(seen == 1, all_of_x, -1.0), rtol=0, atol=0.05)
    if c == 3:  # the middle square begins at column 80; 15 of its pixels are one of G's
        hidden = torch.cartesian_prod(torch.arange(8), torch.arange(8))  # 10/15 to 110/15
        assert torch.equal((seen[0, 0] == 0).nonzero(), hidden)


@pytest.mark.parametrize("at, words", [((320, 30), "border"), ((9999, 240), "no digit")])
def test_a_photo_without_a_whole_digit_is_refused(tmp_path, at, words):
    photograph(tmp_path / "a.jpg", at=at)
    with pytest.raises(ValueError, match=f"a.jpg.*{words}|{words}.*a.jpg"):
        own(tmp_path / "a.jpg")


@pytest.mark.parametrize("more", [dict(), dict(paper=0.15, ink=0.85, light=0.5)])
def test_ruled_lines_and_specks_are_no_ink(tmp_path, more):
    pen = photograph(tmp_path / "a.png", **more)
    clean = own(tmp_path / "a.png")[0]
    picture = TF.to_tensor(Image.open(tmp_path / "a.png"))
    paper, ink = more.get("paper", 0.85), more.get("ink", 0.15)
    picture[:, 20::40] += 0.15 * (ink - paper)  # ruled: a seventh of the pen
    picture[:, 40:52, 60:72] = picture[:, 400:412, 560:572] = ink  # specks
    TF.to_pil_image(picture.clamp(0, 1)).save(tmp_path / "b.png")
    assert pen.sum() > 100 and (own(tmp_path / "b.png")[0] - clean).abs().mean() < 0.01


def test_an_inverted_mask_is_blamed(tmp_path):
    """It hides all but the damage: the line names the mask, not the photo."""
    photograph(tmp_path / "a.jpg")
    for box, whole in (((20, 20, 90, 90), (0, 0, 640, 480)), ((300, 200, 340, 240), None)):
        mask = Image.open(scribble(tmp_path / "m.png", *box))
        Image.eval(mask, lambda value: 255 - value).save(tmp_path / "inverted.png")
        with pytest.raises(ValueError, match="inverted.png hides .* inverted"):
            own(tmp_path / "a.jpg", tmp_path / "inverted.png")


@pytest.mark.parametrize("box, size", [((0, 0, 640, 480), (640, 480)), ((0, 0, 1, 1), (480, 640)),
                                       ((700, 0, 800, 9), (640, 480))],
                         ids=["all hidden", "another size", "nothing hidden"])
def test_a_mask_that_cannot_be_meant_is_refused(tmp_path, box, size):
    mask = Image.new("L", size)
    mask.paste(255, box)
    mask.save(tmp_path / "m.png")
    with pytest.raises(ValueError, match="m.png is .* 640x480"):
        restoration.read_mask(tmp_path / "m.png", 480, 640)


@pytest.mark.parametrize("size", [(300, 200), (200, 300)])
def test_own_png_shows_the_frame_of_every_photo_whole(tmp_path, size):
    """A grey frame, one pixel wide: on a portrait photo, too, none of its sides is cut off."""
    Image.new("RGB", size, "white").save(tmp_path / "a.png")
    pictures = {name: -torch.ones(1, 1, 28, 28) for name in ("damaged", "neighbours", "blind",
                                                             "known mask")}
    restoration.own_figure(SimpleNamespace(image=tmp_path / "a.png", mask="m.png", out=tmp_path),
                           pictures)
    first_panel = TF.to_tensor(Image.open(tmp_path / "own.png").convert("L"))[0, :, :286]
    grey = (first_panel - 128 / 255).abs() < 0.01
    (top, *_, bottom), (left, *_, right) = ((grey.sum(dim=d) > 150).nonzero()[:, 0].tolist()
                                            for d in (1, 0))
    height, width = bottom - top, right - left
    assert height / width == pytest.approx(size[1] / size[0], rel=0.02)
    assert grey[[top, bottom], left:right].all() and grey[top:bottom, [left, right]].all()
