"""Chapter 08: the functions to paste against oracles that share no code with them, and the claims.

Rounding: a sum of n products is off by at most n EPS Σ |terms| (Higham 2002, section 3.1), in each
of the two computations that are compared.
"""

import contextlib
import functools
import importlib
import inspect
import io
import itertools
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision import models

from harness import one_line
from strategies import about, generator, normal, seeds

theory = importlib.import_module("08_theory_checks")
original = SimpleNamespace(**vars(theory))  # for wrong twins that stand in theory and call it
EPS = torch.finfo(torch.float64).eps
NODES, WEIGHTS = np.polynomial.legendre.leggauss(100)
MOMENTA = st.floats(-0.9, 0.9) | st.sampled_from([1e-260, -3e-258, 7e-263, 5e-324, 1e-150, -1e-90])
THEMES = {claim.theme.__name__: claim.theme for claim in theory.CLAIMS.values()}
SLOW = {"batches", "codes", "never_zeroed", "blind_spots", "critics"}
REFUTED = {"dropout-place", "embedding-needed", "sigmoid-tanh", "relu-vanish", "relu-linear",
           "relu-sign", "label-constraints", "mlp-grads", "sgd-steps", "sgd-below-gd", "gd-memory",
           "gd-global", "gd-no-slope", "newton-ravine", "bilevel", "tbptt-reach",
           "grad-accumulate-sgd", "grad-norm-noise", "vae-posterior", "perfect-d", "detach-d",
           "saturation-high", "g-loss-alone", "g-low-d-high", "moments-not-gaussian"}


def close(a, b, bound):
    """|a - b| <= bound, entry by entry."""
    a, b, bound = (torch.as_tensor(value, dtype=torch.float64) for value in (a, b, bound))
    assert ((a - b).abs() <= bound).all(), f"off by {(a - b).abs().max():.2e}, bound {bound}"


def result(name, seed=0, check=None):
    """The row of a claim and whether its evidence confirms the verdict."""
    rows = theory.run(check or theory.CLAIMS[name].theme, [seed])
    return next((row, n == 1) for row, n in rows if row.name == name)


def confirmed(name):
    try:
        return result(name)[1]
    except (IndexError, RuntimeError, ValueError):  # of a wrong twin
        return False


# --- the table ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name", THEMES)
def test_a_verdict_does_not_depend_on_the_seed(name):
    seeds = [123] if name in SLOW else [123, 1234, 12345]
    assert [row for row, n in theory.run(THEMES[name], seeds) if n < len(seeds)] == []


@pytest.mark.parametrize("name", [name for name in THEMES if name not in SLOW])
def test_what_is_listed_is_what_a_theme_yields(name):
    """--list reads the source of a theme and does not run it."""
    listed = [(c.verdict, claim, c.statement) for claim, c in theory.CLAIMS.items()
              if c.theme is THEMES[name]]
    assert listed == [row[:3] for row in THEMES[name]()]


def test_60_claims_hold_and_these_25_are_refuted():
    """A row's evidence is for its verdict, so the verdicts are pinned here."""
    refuted = {name for name, claim in theory.CLAIMS.items() if claim.verdict == "refuted"}
    assert refuted == REFUTED and len(refuted) == 25 and len(theory.CLAIMS) == 60 + 25
    assert "85 claims: 60 hold, 25 are refuted" in " ".join(theory.__doc__.split())
    assert f"Four figures:\n         {', '.join(theory.FIGURES)}" in theory.__doc__


def test_every_theme_says_why_and_every_topic_what_it_is_about():
    for claim in theory.CLAIMS.values():
        assert len(claim.theme.__doc__.split()) >= 40 and claim.statement.endswith((".", ")"))
    assert list(dict.fromkeys(c.topic for c in theory.CLAIMS.values())) == list(theory.TOPICS)
    for introduction in theory.TOPICS.values():
        assert re.fullmatch(r"[A-Z]\S*(\s+\S+){19,}[.?!]", introduction)


def test_what_is_said_of_the_reports_is_what_they_say():
    """There are four. Only their own words stand in quotation marks; 31/16 and real are ours. No
    report states, asks or calls false the other claims."""
    text = inspect.getsource(theory)
    assert "four coursework reports" in " ".join(theory.__doc__.split())
    assert not re.search("the course|five coursework|coursework.s|no report", text, re.I)
    reasons = [" ".join(check.__doc__.split()) for check in THEMES.values()]
    statements = [claim.statement for claim in theory.CLAIMS.values()]
    quoted = {words for one in reasons + statements for words in re.findall('"(.+?)"', one)}
    assert quoted == {"using only one sample or a batch", "or a batch", "decrease", "31/16", "real",
                      "exploding exponentially", "an asymptotic bound"}
    for words in ("where N(I) is the network's answer to image I", "each class k but the label"):
        assert words in " ".join(reasons)
    said = " ".join(s for one in reasons for s in re.split(r"(?<=[.?]) ", one) if "report" in s)
    for name in ("fid-gaussians", "iou-dice", "gd-memory", "numeric-grad", "sigmoid-tanh",
                 "residual-filters", "loss-tells-which", "FID", "IoU"):
        assert name not in said


def test_a_claim_is_stated_once(monkeypatch):
    monkeypatch.setattr(theory, "CLAIMS", {})
    assert theory.theme(original.blur) is original.blur
    assert list(theory.CLAIMS) == ["vae-mean", "shift-blind"]
    with pytest.raises(AssertionError, match="vae-mean"):
        theory.theme(original.blur)


def shaky(name, *evidence):
    """A theme with one claim that finds these in turn; what was measured is their place."""
    outcomes = iter(enumerate(evidence))

    def check():
        """Why."""
        place, value = next(outcomes)
        yield theory.Row(theory.CLAIMS[name].verdict, name, "What.", "claimed", str(place), value)
    return check


@pytest.mark.parametrize("evidence", [False, math.nan, None, 1.0, torch.tensor(True),
                                      torch.tensor(math.nan), np.float64("nan")], ids=repr)
def test_no_claim_is_confirmed_by_anything_but_true(evidence):
    assert not result("rf-nets", check=shaky("rf-nets", evidence))[1]


def test_the_row_with_the_wrong_verdict_is_the_one_that_is_shown():
    (row, n), = theory.run(shaky("rf-nets", True, False, True), range(3))
    assert (row.measured, n) == ("1", 2)


def test_a_claim_starts_from_the_seed_whatever_stands_before_it():
    def check(first):
        for i in range(2):
            x = torch.rand(1 + first * (1 - i))[0].item()
            yield theory.Row("holds", str(i), "", "", x, True)
    for first in (0, 5):
        one, two = theory.run(lambda: check(first), [7])
        assert one[0].measured == two[0].measured


@pytest.mark.parametrize("source", ["normal", "gradient", "double"])
def test_a_check_that_meets_nan_confirms_nothing(source, monkeypatch):
    """Of these functions nearly every check takes its numbers; linear algebra may refuse nan."""
    right, met, seen = getattr(theory, source), [], 0
    poison = lambda value: (tuple(map(poison, value)) if isinstance(value, tuple)
                            else math.nan * value)

    def wrong(*args):
        met.append(args)
        return poison(right(*args))

    monkeypatch.setattr(theory, source, wrong)
    for name in THEMES.keys() - SLOW:
        torch.manual_seed(0)
        with contextlib.suppress(RuntimeError, ValueError):
            for row in THEMES[name]():
                assert not met or row.evidence is not True, row
                seen += bool(met)
                met.clear()
        met.clear()
    assert seen >= 5


@pytest.mark.parametrize("wrong", [1 + 1e-9, math.nan, math.inf])
def test_the_comparisons_reject_what_differs(wrong):
    one = torch.ones(3, dtype=torch.float64)
    other = torch.tensor([1.0, wrong, 1.0], dtype=torch.float64)
    assert theory.equal((one, one), (one, 1))[2] is True
    assert theory.equal((one, other), (one, one))[2] is False
    assert theory.equal((one, one), (one, other))[2] is False
    assert theory.equal((one, one), and_also=torch.tensor(False))[2] is False
    assert theory.agree(1, 1 + 1e-11)[2] is True
    assert theory.agree(1, wrong)[2] is False
    assert theory.agree(1, 1, and_also=torch.tensor(False))[2] is False
    assert theory.exactly([1, 2], [1.0, 2])[2] is True and theory.exactly("9", "8")[2] is False
    assert theory.exactly([1, 2], [1 + EPS, 2])[2] is theory.exactly([1], [math.nan])[2] is False


# --- receptive fields --------------------------------------------------------------------------

# up to four layers; kernels to 5, strides to 4 (so also larger than the kernel), paddings to 3,
# dilations to 3: inputs stay under 2,000 pixels
layer_stacks = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 3),
                                  st.integers(1, 3)), max_size=4)


@about("receptive_field")
@given(layer_stacks)
def test_receptive_field_is_what_moves_the_output(layers):
    """Oracle: bump one input after the other, see which outputs move; all weights positive."""
    size, stride, padding = theory.receptive_field(layers)
    n = size + 4 * stride + 2 * padding
    outputs = torch.eye(n, dtype=torch.float64)[:, None]  # one bump in each row
    for kernel, s, p, d in layers:
        outputs = F.conv1d(outputs, torch.ones(1, 1, kernel).double(), None, s, p, d)
    for j in range(outputs.shape[2]):
        moved = outputs[:, 0, j].nonzero()
        first, last = j * stride - padding, j * stride - padding + size - 1
        if first >= 0 and last < n:
            assert (moved.min().item(), moved.max().item()) == (first, last)
            return
    raise AssertionError("no output sees a whole field inside the picture")


@about("receptive_field")
@given(layer_stacks, layer_stacks)
def test_two_stacks_are_one(a, b):
    """The stack is a layer: fields of a then b compose as (size, stride, padding) of two layers."""
    first, second = theory.receptive_field(a), theory.receptive_field(b)
    assert theory.receptive_field(a + b) == theory.receptive_field([(*first, 1), (*second, 1)])


@about("transposed_coverage")
@given(layer_stacks.map(lambda layers: [layer[:3] for layer in layers]), st.integers(1, 6))
def test_transposed_coverage_is_torchs(layers, n):
    """Oracle: torch's transposed convolutions with weights 1 of n ones; or nothing is left."""
    x = torch.ones(1, 1, n, dtype=torch.float64)
    for kernel, stride, padding in layers:
        if (x.shape[2] - 1) * stride + kernel <= 2 * padding:
            with pytest.raises(ValueError):
                theory.transposed_coverage(layers, n)
            return
        x = F.conv_transpose1d(x, torch.ones(1, 1, kernel).double(), None, stride, padding)
    assert theory.transposed_coverage(layers, n).tolist() == x[0, 0].tolist()


@about("covered")
def test_generators_reach_what_the_picture_shows():
    """The report's: odd rows and columns, 100 of 441 pixels. A deep one: up to 4^40 paths lead to a
    pixel, far more than an int64 can count."""
    assert theory.covered(40 * [(4, 1, 0)]).all()
    reached = theory.covered(theory.REPORT_G)
    assert reached.shape == (21, 21) and reached.sum() == 100 and reached[1::2, 1::2].all()
    fixed = theory.covered(theory.FIXED_G)
    assert fixed.shape == (28, 28) and fixed.all()


def layers_of(modules):
    """(kernel, stride, padding, dilation) of torchvision's convolutions and poolings, in order."""
    kinds = (torch.nn.Conv2d, torch.nn.MaxPool2d)
    return [tuple(v[0] if isinstance(v, tuple) else v
                  for v in (m.kernel_size, m.stride, m.padding, m.dilation))
            for m in modules if isinstance(m, kinds)]


@about("resnet_50")
def test_layer_lists_are_torchvisions_networks():
    """The original ResNet-50, with a stage's stride in the 1x1 before, sees 483."""
    with torch.device("meta"):
        assert layers_of(models.vgg16().features) == theory.VGG_16
        assert layers_of(models.vgg11().features) == theory.VGG_A
        alexnet, resnet = layers_of(models.alexnet().features), models.resnet50()
    assert [layer[:2] for layer in alexnet] == [layer[:2] for layer in theory.ALEXNET]
    assert theory.receptive_field(alexnet)[0] == 195
    blocks = [m for i in range(1, 5) for block in getattr(resnet, f"layer{i}")
              for m in (block.conv1, block.conv2, block.conv3)]
    found = theory.receptive_field(layers_of([resnet.conv1, resnet.maxpool, *blocks]))
    assert found == theory.receptive_field(theory.resnet_50("3x3")) and found[0] == 427
    assert theory.receptive_field(theory.resnet_50("1x1"))[0] == 483


# --- convolution -------------------------------------------------------------------------------

@st.composite
def convolutions(draw):
    """Sizes of a convolution: 1x1 to 4x3 kernels, stride up to 4 (over the kernel's size), padding,
    dilation, groups, not square."""
    groups, out_per_group, in_per_group = (draw(st.integers(1, 3)) for _ in range(3))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 3)))
    stride, padding, dilation = (draw(st.tuples(values, values)) for values in (
        st.integers(1, 4), st.integers(0, 3), st.integers(1, 3)))
    height, width = (d * (k - 1) + 1 + draw(st.integers(0, 5)) for d, k in zip(dilation, kernel))
    shapes = ((draw(st.integers(1, 3)), groups * in_per_group, height, width),
              (groups * out_per_group, in_per_group, *kernel))
    return shapes, dict(stride=stride, padding=padding, dilation=dilation, groups=groups)


def by_autograd(x, w, g, kind):
    x, w = (a.clone().requires_grad_() for a in (x, w))
    return torch.autograd.grad(F.conv2d(x, w, **kind), (x, w), g)


@about("conv2d_grad_input", "conv2d_grad_weight")
@given(convolutions(), seeds(), st.booleans())
@settings(max_examples=max(200, settings().max_examples))
def test_convolution_gradients_are_autograds(case, seed, turned):
    """The bound is the same sum over absolute values, times 2 n EPS; n = its number of terms.
    turned: the tensors lie in memory column by column."""
    (x_shape, w_shape), kind = case
    x, w = normal(seed, *x_shape), normal(seed + 1, *w_shape)
    g = normal(seed + 2, *F.conv2d(x, w, **kind).shape)
    if turned:
        x, w, g = (a.transpose(2, 3).contiguous().transpose(2, 3) for a in (x, w, g))
    got = (theory.conv2d_grad_input(x_shape, w, g, **kind),
           theory.conv2d_grad_weight(x, w_shape, g, **kind))
    terms = w[:, 0].numel(), g[:, 0].numel()
    for a, b, size, n in zip(got, by_autograd(x, w, g, kind),
                             by_autograd(x.abs(), w.abs(), g.abs(), kind), terms):
        assert a.shape == b.shape
        close(a, b, 2 * n * EPS * size)


@about("conv2d_grad_input", "conv2d_grad_weight", "check_conv", edge=True)
@pytest.mark.parametrize("x, w, y, kind", [
    ((1, 1, 5, 5), (1, 1, 3, 3), (1, 1, 2, 2), {}), ((1, 1, 5, 5), (1, 1, 3, 3), (1, 1, 3, 1), {}),
    ((1, 1, 5, 5), (1, 1, 3, 3), (2, 1, 3, 3), {}), ((1, 1, 5, 5), (1, 1, 3, 3), (1, 2, 3, 3), {}),
    ((1, 2, 5, 5), (1, 1, 3, 3), (1, 1, 3, 3), {}), ((1, 1, 2, 5), (1, 1, 3, 3), (1, 1, 0, 3), {}),
    ((1, 2, 5, 5), (3, 1, 3, 3), (1, 3, 3, 3), dict(groups=2)),
    ((1, 1, 5, 5), (1, 1, 3, 3), (1, 1, 3, 3), dict(stride=2)),
    ((1, 1, 5, 5), (1, 1, 3, 3), (1, 1, 3, 3), dict(padding=(1, 0))),
    ((1, 1, 5, 5), (1, 1, 3, 3), (1, 1, 3, 3), dict(dilation=2))])
def test_convolution_gradients_of_sizes_that_do_not_fit_are_refused(x, w, y, kind):
    """Such as no convolution has: a y of another side, batch, or channels, another x or groups."""
    for f, *sizes in ((theory.conv2d_grad_input, x, torch.ones(w)),
                      (theory.conv2d_grad_weight, torch.ones(x), w)):
        with pytest.raises((ValueError, RuntimeError)):
            f(*sizes, torch.ones(y), **kind)


# --- the other layers --------------------------------------------------------------------------

@about("dropout_mask_average", "masks")
@given(seeds(), st.integers(1, 6), st.floats(0, 0.9))
def test_dropout_mask_average_is_exact(seed, n, p):
    """E dropout(x) = x and E (Σ dropout(x))² = (Σ x)² + p / (1 - p) Σ x², in closed form."""
    x = normal(seed, n)
    bound = 2 ** n * 4 * n * EPS * (x.abs().sum() / (1 - p)) ** 2 + 4 * n * EPS
    close(theory.dropout_mask_average(x, p), x, bound)
    close(theory.dropout_mask_average(x, p, lambda x: x.sum() ** 2),
          x.sum() ** 2 + p / (1 - p) * x.pow(2).sum(), bound)


@about("self_attention")
@given(seeds(), st.integers(1, 6), st.integers(1, 5))
def test_self_attention_is_torchs(seed, n, d):
    x, *w = normal(seed, n, d), *normal(seed + 1, 3, d, d)
    q, k, v = (x @ one for one in w)
    expected = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
    # softmax turns an error e of its logits into 2 e of its weights; the logits are sums of d terms
    logits = (q.abs() @ k.abs().T).max()
    bound = 8 * (n + d) * EPS * (1 + logits) * v.abs().max()
    close(theory.self_attention(x, *w)[0], expected, bound)


@about("dice_from_iou")
@given(st.sets(st.integers(0, 12), min_size=1), st.sets(st.integers(0, 12), min_size=1))
def test_dice_from_iou_counts_right(a, b):
    dice = theory.dice_from_iou(len(a & b) / len(a | b))
    assert_close(dice, 2 * len(a & b) / (len(a) + len(b)), rtol=4 * EPS, atol=0)


@about("average_precision")
@given(st.lists(st.booleans(), max_size=20), st.integers(0, 5))
def test_average_precision_is_an_integral(hits, missed):
    """Recall r needs the first ⌈r objects⌉ hits: at the middle of each step, exactly computed."""
    objects = max(1, sum(hits) + missed)
    places = [place for place, hit in enumerate(hits, 1) if hit]
    expected = math.fsum(number / place for number, place in enumerate(places, 1)) / objects
    assert_close(theory.average_precision(hits, objects), expected,
                 rtol=4 * (len(hits) + 1) * EPS, atol=0)


# --- optimisation ------------------------------------------------------------------------------

@about("mlp_grads", "mlp_loss")
@given(seeds(), st.tuples(*4 * [st.integers(1, 6)]), st.floats(0, 2))
def test_mlp_gradients_are_autograds(seed, sizes, lam):
    b, d, h, k = sizes
    x, y = normal(seed, b, d), torch.rand(b, k, generator=generator(seed), dtype=torch.float64)
    w1, b1, w2, b2 = (normal(seed + i, *s) for i, s in enumerate(((h, d), (h,), (k, h), (k,)), 1))
    leaves = {"x": x, "W1": w1, "b1": b1, "W2": w2, "b2": b2}
    for leaf in leaves.values():
        leaf.requires_grad_()
    a2 = (x @ w1.T + b1).relu() @ w2.T + b2
    zero = torch.zeros_like(a2)  # log (1 + e^a); F.softplus is a itself above 20, off by e^-20
    loss = ((y.detach() * torch.logaddexp(-a2, zero) + (1 - y) * torch.logaddexp(a2, zero)).mean()
            + lam / 2 * (torch.linalg.matrix_norm(w1) ** 2 + torch.linalg.matrix_norm(w2) ** 2))
    exact = dict(zip(leaves, torch.autograd.grad(loss, tuple(leaves.values()))))
    with torch.no_grad():
        assert_close(theory.mlp_loss(x, y, w1, b1, w2, b2, lam), loss.detach(),
                     rtol=8 * (b * k + d * h) * EPS, atol=0)
        size = 1 + sum(leaf.abs().sum() for leaf in leaves.values())  # bounds every factor
        got = theory.mlp_grads(x, y, w1, b1, w2, b2, lam)
        assert got.keys() == exact.keys()
        for name in exact:
            close(got[name], exact[name], (b + d + h + k) * EPS * size ** 2)


@about("numeric_grad")
@given(seeds(), st.integers(1, 8), st.floats(1e-7, 1e-2))
def test_numeric_gradient_is_the_gradient(seed, n, eps):
    """f = Σ a sin(b x): the error is at most eps² |f'''| / 6 and the rounding of f and of x ± eps
    over eps; f''' = -a b³ cos, at most |a b³|."""
    a, b, x = normal(seed, 3, n)
    got = theory.numeric_grad(lambda x: (a * (b * x).sin()).sum(), x, eps)
    cut = eps ** 2 / 6 * (a * b ** 3).abs()
    rounding = 4 * EPS * (n * a.abs().sum() + (a * b).abs() * (x.abs() + 1)) / eps
    close(got, a * b * (b * x).cos(), cut + rounding)


@about("numeric_grad", edge=True)
@given(seeds(), st.sampled_from(["transposed", "channels last", "expanded", "0-d", "learned"]))
def test_numeric_gradient_takes_tensors_however_they_lie_in_memory(seed, how):
    x = {"transposed": lambda: normal(seed, 3, 2).T, "0-d": lambda: normal(seed, 1)[0],
         "channels last": lambda: normal(seed, 2, 3, 2, 2).to(memory_format=torch.channels_last),
         "expanded": lambda: normal(seed, 1, 2).expand(3, 2),
         "learned": lambda: normal(seed, 3, 2).requires_grad_()}[how]()
    before = x.clone()
    got = theory.numeric_grad(lambda x: x.sin().sum(), x)
    assert got.shape == x.shape and not got.requires_grad and torch.equal(x, before)
    close(got, x.detach().cos(), 1e-11 + 4 * EPS * x.numel() / 6e-6)


@about("rnn")
@given(seeds(), st.integers(2, 6), st.integers(1, 6), st.integers(1, 4))
def test_truncation_cuts_the_gradient_and_only_the_gradient(seed, t, s, h):
    """The state is that of torch's RNN; the gradient is zero for all inputs but the last s, and
    that of the last s steps from the state before them, a constant."""
    s = min(s, t)
    x, w_x = normal(seed, t, 3).requires_grad_(), normal(seed + 1, h, 3)
    w_h = normal(seed + 2, h, h)
    torchs = torch.nn.RNN(3, h, bias=False, dtype=torch.float64)
    torchs.weight_ih_l0.data, torchs.weight_hh_l0.data = w_x, w_h
    early = torchs(x[:-s])[1].detach() if s < t else torch.zeros(1, h, dtype=torch.float64)
    last = torchs(x[-s:], early)[1][0]
    got = theory.rnn(x, w_x, w_h, s)
    bound = 4 * (h + 3) * t * EPS * (1 + w_h.abs().sum(1).max()) ** t * (1 + w_x.abs().sum())
    close(got, last.detach(), bound)
    (exact,), (cut,) = (torch.autograd.grad(out.sum(), x) for out in (last, got))
    close(cut, exact, 10 * bound * (1 + w_x.abs().sum()))
    assert (cut[:-s] == 0).all()


@about("ridge")
@given(seeds(), st.integers(1, 8), st.integers(1, 4), st.floats(0.01, 10))
def test_ridge_is_the_least(seed, n, d, lam):
    """|x w - y|² + λ |w|² is the square of one longer system of equations, which lstsq solves."""
    x, y = normal(seed, n, d), normal(seed + 1, n)
    longer = torch.cat([x, lam ** 0.5 * torch.eye(d, dtype=torch.float64)])
    w = torch.linalg.lstsq(longer, torch.cat([y, torch.zeros(d, dtype=torch.float64)])).solution
    # the normal equations lose the square of the condition number
    bound = 20 * (n + d) * EPS * torch.linalg.cond(longer) ** 2 * (1 + w.norm() + y.norm())
    close(theory.ridge(x, y, lam), w, bound)


@about("noise_parts")
@given(seeds(), st.floats(-2, 2))
def test_noise_is_a_penalty_where_the_slope_of_the_loss_averages_to_0_over_the_labels(seed, t):
    """Roth et al. 2017: for a GAN's whole loss with the best D for the shares of real and fake, as
    for a squared error at its minimum; not for one label alone, nor for another target t."""
    w, x = normal(seed, 3), normal(seed + 1, 1, 3)
    D = lambda x: torch.tanh(x @ w) + x @ x / 8
    share, real = torch.sigmoid(D(x[0])), lambda d: F.softplus(-d)
    whole = lambda d: share * real(d) + (1 - share) * real(-d)
    for loss in (whole, lambda d: (d - D(x[0])) ** 2):
        penalty, rest = theory.noise_parts(loss, D, x)
        assert penalty > 0
        close(rest, 0, 100 * EPS * (1 + x.abs().sum() + w.abs().sum()) ** 2)
    for loss in (real, lambda d: (d - D(x[0]) - 1 - t ** 2) ** 2):
        assert theory.noise_parts(loss, D, x)[1].abs() > 1e-9


@about("noise_parts")
@given(seeds(), st.integers(1, 4), st.integers(1, 4))
def test_noise_parts_are_those_of_squares(seed, b, d):
    """D = xᵀA x / 2 and L = u D² + v D: half of 2 u |A x|² and half of (2 u D + v) tr A."""
    x, a, (u, v) = normal(seed, b, d), normal(seed + 1, d, d), normal(seed + 2, 2)
    a = a + a.T
    D = torch.einsum("bi,ij,bj->b", x, a, x) / 2
    got = theory.noise_parts(lambda y: u * y ** 2 + v * y, lambda x: x @ a @ x / 2, x)
    size = (1 + x.abs().sum()) ** 2 * (1 + a.abs().sum()) ** 2 * (1 + u.abs() + v.abs())
    close(got[0], u * (x @ a).pow(2).sum(1), 8 * d * EPS * size)
    close(got[1], (2 * u * D + v) * a.trace() / 2, 8 * d * EPS * size)


# --- flows and autoencoders --------------------------------------------------------------------

@about("coupling_log_prob", "random_coupling")
@given(seeds(), st.integers(2, 5), st.integers(0, 5))
def test_coupling_density_is_the_jacobians(seed, d, depth):
    """log N(z) - log |det ∂M/∂z| with M from z to x written again and its Jacobian by autograd."""
    torch.manual_seed(seed)
    layers, z = theory.random_coupling(d, depth), normal(seed, d)

    def M(z):
        for mask, scale, shift in layers:
            kept = (mask * z)[None]
            z = torch.where(mask == 1, z, z * scale(kept)[0].exp() + shift(kept)[0])
        return z

    jacobian = torch.autograd.functional.jacobian(M, z)
    expected = (torch.distributions.Normal(0, 1).log_prob(z).sum().item()
                - torch.linalg.slogdet(jacobian).logabsdet.item())
    # going back divides by scales of e^-1/2 to e^1/2: errors of x grow by the Jacobian's condition
    bound = 100 * d * (depth + 1) * EPS * torch.linalg.cond(jacobian) * (1 + z.abs().max()) ** 2
    close(theory.coupling_log_prob(M(z)[None], layers)[0], expected, bound)


@about("kl_standard_normal", "log_normal", "random_covariance")
@given(seeds(), st.integers(1, 5))
def test_normals_are_torchs_and_their_kl_is_zero_only_at_the_prior(seed, d):
    torch.manual_seed(seed)
    mu, x, sigma = normal(seed, d), normal(seed + 1, d), theory.random_covariance(d)
    assert sigma.allclose(sigma.T) and torch.linalg.eigvalsh(sigma)[0] > 0.1 - 100 * d * EPS
    one = torch.eye(d, dtype=torch.float64)
    q, p = (torch.distributions.MultivariateNormal(m, s) for m, s in ((mu, sigma), (0 * mu, one)))
    # eigenvalues of 0.1 and more: the Cholesky factors lose a condition number
    bound = 20 * d * EPS * torch.linalg.cond(sigma) * (1 + sigma.trace() + mu @ mu)
    kl = theory.kl_standard_normal(mu, sigma)
    close(kl, torch.distributions.kl_divergence(q, p), bound)
    close(theory.kl_standard_normal(0 * mu, one), 0, 8 * d * EPS)
    close(theory.log_normal(x, mu, sigma), q.log_prob(x), 10 * bound * (1 + x @ x))
    assert kl > 0


@about("best_linear_vae", "linear_elbo")
@given(st.floats(0.1, 2), st.floats(0.1, 4), st.integers(1, 3))
def test_the_best_linear_vae_explains_what_exceeds_the_noise(variance, v, pixels):
    """‖w‖² = λ - v, to a step of its grid, as the ELBO has one maximum; λ, the largest eigenvalue
    of the covariance, and not the variance of a pixel is the limit."""
    w, kl = theory.best_linear_vae(variance, v, pixels)
    largest = torch.linalg.eigvalsh(torch.full(
        (pixels, pixels), variance, dtype=torch.float64))[-1].item()
    assert abs(w - max(0, largest - v) ** 0.5) < 0.05 + 1e-9
    expected = (w ** 2 * (largest / (v + w ** 2) - 1) / (v + w ** 2) + math.log1p(w ** 2 / v)) / 2
    assert_close(kl, expected, rtol=0, atol=100 * EPS)


# --- GANs --------------------------------------------------------------------------------------

@about("jensen_shannon")
@given(seeds(), st.integers(1, 8), st.sampled_from([1, 30]))
def test_jensen_shannon_is_symmetric_and_between_zero_and_log_two(seed, n, sharpness):
    p, q = (sharpness * normal(seed, 2, n)).softmax(1)
    jsd, m = theory.jensen_shannon(p, q), (p + q) / 2
    by_torch = (F.kl_div(m.log(), p, reduction="sum") + F.kl_div(m.log(), q, reduction="sum")) / 2
    close(jsd, by_torch, 20 * n * EPS * (1 + m.log().abs().max()))
    close(jsd, theory.jensen_shannon(q, p), 4 * n * EPS)
    assert -4 * n * EPS <= jsd <= math.log(2) + 4 * n * EPS


@about("gan_value", "jensen_shannon")
@given(seeds(), st.integers(1, 4), st.integers(1, 4))
def test_a_sure_d_has_value_0_where_supports_are_apart(seed, n, m):
    """2 JSD - log 4 = 0: nothing is mistaken, and 0 log 0 is 0."""
    p = torch.cat([normal(seed, n).softmax(0), torch.zeros(m).double()])
    q = torch.cat([torch.zeros(n).double(), normal(seed + 1, m).softmax(0)])
    assert theory.gan_value(p / (p + q), p, q) == 0
    close(theory.jensen_shannon(p, q), math.log(2), 8 * (n + m) * EPS)


@about("x_log_y", "jensen_shannon", "gan_value", edge=True)
@given(seeds(), st.integers(1, 4), st.integers(1, 4))
def test_gradients_are_finite_where_a_probability_is_0_or_1(seed, n, m):
    """And right where none is: as those of torch's xlogy, which are nan at 0."""
    full, edge = normal(seed, n + m).softmax(0), F.pad(normal(seed, n).softmax(0), (0, m))
    other, apart = normal(seed + 1, n + m).softmax(0), F.pad(normal(seed, m).softmax(0), (n, 0))
    cases = full, edge, apart, other
    for p, q in itertools.product(cases, repeat=2):
        D = torch.where(p + q > 0, p / (p + q), 0.5)  # sure where supports are apart
        for grad in (*original.gradient(theory.jensen_shannon, p, q),
                     *original.gradient(theory.gan_value, D, p, q)):
            assert grad.isfinite().all()
    xlogy = lambda p, q: (torch.special.xlogy(p, p) + torch.special.xlogy(q, q)
                          - torch.special.xlogy(p + q, (p + q) / 2)).sum() / 2
    for a, b in zip(*(original.gradient(f, full, other)
                      for f in (theory.jensen_shannon, xlogy))):
        close(a, b, 100 * EPS * (1 + b.abs()))


@about("smoothed_d")
@given(seeds(), st.floats(0, 1), st.floats(0, 1))
def test_smoothed_d_is_the_best(seed, real, fake):
    """In the logit a the loss is a (p (1 - real) + q (1 - fake)) + (p + q) log(1 + e^-a), convex:
    its derivative there is 0."""
    p, q = normal(seed, 2, 5).softmax(1)
    D = theory.smoothed_d(p, q, real, fake)
    derivative = (p * (1 - real) + q * (1 - fake)) - (p + q) * (1 - D)
    close(derivative, 0, 8 * EPS)


def bilinear_map(eta, k=0, exact=True, alternating=False, r1=0.0):
    """The matrix of a step, by hand: c = 1 - η r1, y_k = c^k y + S x, S = η (1 + c + ... c^(k-1)).

    x y_k has the derivative c^k y + 2 S x if the gradient goes through y_k, else c^k y + S x."""
    c = 1 - eta * r1
    derivative = (2 if exact else 1) * eta * sum(c ** j for j in range(k))
    x_row = np.array([1 - eta * derivative, -eta * c ** k])
    return np.array([x_row, eta * (x_row if alternating else np.array([1, 0])) + [0, c]])


@about("bilinear_step", "growth")
@given(seeds(), st.floats(0.001, 3), st.integers(0, 8), st.booleans(), st.booleans(),
       st.floats(0, 0.6))
def test_steps_of_the_bilinear_game_are_those_written_out(seed, eta, k, exact, alternating, r1):
    """Alternating steps, too, run away once η > 2. With r1 up to 0.6, |c| stays under 1."""
    kind = dict(k=k, exact=exact, alternating=alternating, r1=r1)
    state, by_hand = normal(seed, 2), bilinear_map(eta, **kind)
    size = 3 ** k * (1 + eta) ** 4 * state.abs().sum()  # (1 + η r1)^k <= 3^k
    close(torch.stack(theory.bilinear_step(*state, eta, **kind)), by_hand @ state.numpy(),
          20 * EPS * size)
    expected = float(np.abs(np.linalg.eigvals(by_hand)).max())
    # where two eigenvalues meet, half of the digits are lost
    growth = theory.growth(functools.partial(theory.bilinear_step, eta=eta, **kind), 2)
    assert_close(growth, expected, rtol=1e-6, atol=0)


@about("bilinear_step")
@given(seeds(), st.floats(0.01, 1), st.integers(1, 8), st.booleans())
def test_r1_of_weight_2_k_eta_damps_as_k_unrolled_steps(seed, eta, k, alternating):
    """Cayley, Hamilton: a matrix is a root of its characteristic polynomial, here of the map of k
    exactly unrolled steps. In the plane no other quadratic λ² + ... makes 0 of z_2, z_1, z_0."""
    polynomial = np.poly(bilinear_map(eta, k=k, alternating=alternating))
    start = normal(seed, 2)
    rounding = 100 * EPS * (4 + 4 * k * eta ** 2) ** 2 * start.abs().sum()  # of two such maps
    for kind in (dict(k=k), dict(r1=2 * k * eta)):
        path = [tuple(start)]
        for _ in range(2):
            path.append(theory.bilinear_step(*path[-1], eta, alternating=alternating, **kind))
        close(sum(a * torch.stack(z) for a, z in zip(polynomial, path[::-1])), 0, rounding)


@about("momentum_step")
@given(st.floats(0.01, 1), MOMENTA, st.booleans())
def test_momentum_moves_by_velocities(eta, momentum, alternating):
    """v <- m v + gradient step, from rest. Rounding grows less than 7 times a step: 1 + η + 2 |m|
    for x, and that again for y."""
    x, y, v_x, v_y, state = 1.0, 0.0, 0.0, 0.0, [1.0, 0.0, 1.0, 0.0]
    for n in range(1, 9):
        before = x, y
        v_x = momentum * v_x - eta * y
        v_y = momentum * v_y + eta * (x + v_x if alternating else x)
        x, y = x + v_x, y + v_y
        state = theory.momentum_step(*state, eta=eta, momentum=momentum, alternating=alternating)
        close(state, [x, y, *before], 10 * EPS * 7 ** n)


@about("momentum_step", "growth")
@given(st.floats(0.01, 1), MOMENTA, st.booleans())
def test_growth_with_momentum_is_the_largest_root(eta, momentum, alternating):
    """For x_n = X λ^n and y_n = Y λ^n the steps say: (λ - 1)(λ - m) X = -η λ Y, and
    (λ - 1)(λ - m) Y = η λ² X in turn, η λ X at once. Multiply both: ((λ - 1)(λ - m))² = -η² λ³ in
    turn, -η² λ² at once."""
    seen = momentum if abs(momentum) > 1e-30 else 0.0  # LAPACK fails for some of 1e-260
    polynomial = np.poly([1, 1, seen, seen])
    polynomial[1 if alternating else 2] += eta ** 2
    largest = float(np.abs(np.roots(polynomial)).max())
    # where two roots meet, as the 0s of m = 0 do, half of the digits are lost
    assert_close(theory.growth(functools.partial(
        theory.momentum_step, eta=eta, momentum=momentum, alternating=alternating), 4), largest,
                 rtol=1e-6, atol=0)


# --- samples and scores ------------------------------------------------------------------------

@about("inception_score", edge=True)
@given(seeds(), st.integers(1, 6), st.integers(2, 5))
def test_inception_score_has_finite_gradients_for_sure_answers(seed, n, k):
    sure = F.one_hot(torch.randint(k, (n,), generator=generator(seed)), k).double()
    for f in (theory.inception_score, lambda a: theory.inception_score((1000 * a).softmax(1))):
        assert original.gradient(f, sure).isfinite().all()


@about("inception_score")
@given(seeds(), st.integers(1, 20), st.integers(1, 6), st.floats(0, 20))
def test_inception_score_is_exp_of_mutual_information_within_its_bounds(seed, n, k, sharpness):
    probs = (sharpness * normal(seed, n, k)).softmax(1)
    score = theory.inception_score(probs)
    entropy = lambda p: torch.distributions.Categorical(p).entropy()
    information = entropy(probs.mean(0)) - entropy(probs).mean()
    # Categorical clamps probabilities at EPS: p log p is off by up to EPS log(1 / EPS) = 36 EPS
    close(score.log(), information, 100 * k * EPS)
    assert 1 - 20 * k * EPS <= score <= k * (1 + 20 * k * EPS)


@about("frechet_distance")
@given(seeds(), st.integers(1, 5))
def test_frechet_distance_of_any_two_gaussians(seed, d):
    """Oracle: tr (A B)^½ from the eigenvalues of A B, which is not symmetric."""
    torch.manual_seed(seed)
    mu_a, mu_b = normal(seed, 2, d)
    a, b = original.random_covariance(d), original.random_covariance(d)
    cross = torch.linalg.eigvals(a @ b).real.sqrt().sum()
    expected = (mu_a - mu_b).pow(2).sum() + a.trace() + b.trace() - 2 * cross
    # eigenvalues of A B are good to cond of the eigenvectors, at most the root of cond(A)
    bound = 100 * d * EPS * torch.linalg.cond(a) * torch.linalg.cond(b) * (1 + expected + a.trace())
    close(theory.frechet_distance(mu_a, a, mu_b, b), expected, bound)
    close(theory.frechet_distance(mu_b, b, mu_a, a), expected, bound)


@about("frechet_distance", edge=True)
@given(seeds(), st.integers(2, 64), st.sampled_from([torch.float32, torch.float64]))
def test_equal_gaussians_are_0_apart_in_every_dtype(seed, d, dtype):
    """Nearly singular: rounding in float32 made it -0.57. In float64 roots of the d eigenvalues
    that are 0 up to EPS tr are off by √(EPS tr) each."""
    a = normal(seed, d, d) @ torch.diag(torch.logspace(0, -8, d, dtype=torch.float64)) @ normal(
        seed + 1, d, d)
    cov, mu = (a @ a.T / d).to(dtype), normal(seed + 2, d).to(dtype)
    cov = (cov + cov.T) / 2
    found = theory.frechet_distance(mu, cov, mu, cov)
    assert found.dtype == torch.float64
    # float32 covariances have negative eigenvalues of its own rounding, which are taken as 0
    size = cov.double().trace()
    close(found, 0, 20 * d * size * (EPS ** 0.5 if dtype == torch.float64 else 1e-6))


@about("truncated_normal_variance")
@given(st.floats(1e-50, 1) | st.floats(0.05, 8))
def test_truncated_variance_is_the_integral(limit):
    """Oracle: Gauss-Legendre with 100 nodes, exact to rounding for limits up to 8. Near 0 it is
    limit² / 3, that of a uniform one. A power as exp(a log x) loses 1.5 |log limit²| EPS."""
    density = WEIGHTS * np.exp(-(limit * NODES) ** 2 / 2)
    expected = limit ** 2 * float((density * NODES ** 2).sum() / density.sum())
    assert_close(theory.truncated_normal_variance(limit), expected,
                 rtol=(100 + 3 * abs(math.log(limit))) * EPS, atol=0)


@about("truncated_normal_variance", edge=True)
def test_truncated_variance_rises_to_1_without_a_limit():
    limits = [1 - 1e-9, 1.0, 1 + 1e-9, 2.0, 8.0, 38.0, 40.0, 1e200, math.inf]
    found = [theory.truncated_normal_variance(limit) for limit in limits]
    assert found == sorted(found) and found[-4:] == 4 * [1.0]


@about("merge_batch_statistics")
@given(seeds(), st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
       st.sampled_from([torch.float64, torch.float32, torch.int64]))
def test_merged_statistics_are_those_of_the_joined_batch(seed, counts, dtype):
    """The mean of an empty part is nan. Whole numbers as counts lose no digits of the means.
    Variances are of numbers near offset: their rounding is that of the squares."""
    parts = [3 * i + normal(seed + i, n, 2) for i, n in enumerate(counts)]
    joined = torch.cat(parts)
    means = [p.mean(0) for p in parts]
    variances = [((p - m) ** 2).mean(0) for p, m in zip(parts, means)]
    mean, variance = theory.merge_batch_statistics(
        torch.tensor(counts, dtype=dtype), torch.stack(means), torch.stack(variances))
    bound = 8 * len(joined) * EPS * (1 + joined.abs().max() ** 2)
    close(mean, joined.mean(0), bound)
    close(variance, joined.var(0, correction=0), bound)


# --- what is refused ---------------------------------------------------------------------------

def zeros(*shapes):
    return [torch.zeros(shape) for shape in shapes]


MU, COV = zeros(2, (2, 2))
REFUSED = [
    *[("numeric_grad", torch.sum, torch.zeros(2, dtype=dtype))
      for dtype in (torch.float32, torch.bfloat16, torch.int64)],  # they round the step away
    ("average_precision", [True, True], 1), ("average_precision", [], 0),
    ("average_precision", [False], -1), ("average_precision", [0.9, 0.4], 2),
    *[("dice_from_iou", iou) for iou in (1.2, -0.1, math.nan, torch.tensor([0.5, 1.1]))],
    *[("dropout_mask_average", torch.ones(2), p) for p in (1, 1.5, -0.1)],
    *[("rnn", *zeros((5, 3), (2, 3), (2, 2)), s) for s in (0, -1, 6)],
    *[("receptive_field", [layer]) for layer in ((0, 1, 0, 1), (3, 0, 0, 1), (3, 1, 0, 0))],
    ("self_attention", *zeros((2, 4, 3), (3, 3), (3, 3), (3, 3))),
    ("coupling_log_prob", torch.zeros(1, 2), [(torch.tensor([0.5, 1]), abs, abs)]),
    *[("inception_score", probs) for probs in (torch.zeros(3, 2), torch.eye(2) * 2 - 0.5)],
    ("jensen_shannon", *zeros(3, 1)), ("jensen_shannon", *zeros(3, (3, 1))),
    *[("gan_value", *zeros(*sizes)) for sizes in ((3, 3, 1), (3, 1, 1), (3, 3, (3, 1)))],
    *[("frechet_distance", *both) for mu, cov in zip(zeros(1, 2, (2, 1), 2),
                                                     zeros((2, 2), (1, 2), (2, 2), 2))
      for both in ((MU, COV, mu, cov), (mu, cov, MU, COV))],
    *[("frechet_distance", MU, COV, *bad) for inf in (math.nan, math.inf)
      for bad in ((MU + inf, COV), (MU, COV + inf))],
    *[("frechet_distance", MU, *covs, MU, *others) for bad in (
        torch.tensor([[1, 0.5], [0, 1]]), torch.tensor([[1, 2.0], [2, 1]]), -torch.eye(2))
      for covs, others in (([bad], [torch.eye(2)]), ([torch.eye(2)], [bad]))],
    *[("truncated_normal_variance", limit) for limit in (0.0, -1.0, 1e-80, -math.inf, math.nan)],
    ("merge_batch_statistics", *zeros(2, (2, 3), (2, 3))),  # all parts are empty
    *[("merge_batch_statistics", torch.ones(n), *zeros(*shapes)) for n, *shapes in (
        (3, (2, 3), (2, 3)), (2, 2, 2), (2, (2, 3), (2, 1)))]]


@about(*dict.fromkeys(name for name, *_ in REFUSED), edge=True)
@pytest.mark.parametrize("name, args", [(name, args) for name, *args in REFUSED])
def test_what_has_no_meaning_is_refused(name, args):
    with pytest.raises(ValueError):
        getattr(theory, name)(*args)


# --- wrong twins -------------------------------------------------------------------------------

def mlp_without_a_sigmoid(x, y, w1, b1, w2, b2, lam):
    """Squared error of the output itself: ∂a2 = a2 - y."""
    a2 = (x @ w1.T + b1).clamp(min=0) @ w2.T + b2
    return original.mlp_grads(x, y + a2.sigmoid() - a2, w1, b1, w2, b2, lam)


CONVOLUTION = ((2, 2, 7, 7), (3, 2, 3, 3)), dict(stride=1, padding=0, dilation=2, groups=1)
WRONG = [  # a property, one case of it, a claim, the function of both, what must not take its place
    (test_receptive_field_is_what_moves_the_output, [[(3, 2, 1, 1), (3, 2, 1, 1)]],
     "rf-alexnet", "receptive_field",
     lambda layers: (1 + sum(d * (k - 1) for k, _, _, d in layers),  # without strides
                     *original.receptive_field(layers)[1:]),
     lambda layers: original.receptive_field([  # each stride too early
         one for k, s, p, d in layers for one in ((1, s, 0, 1), (k, 1, p, d))])),
    (test_transposed_coverage_is_torchs, [[(1, 1, 2), (1, 2, 1)], 16],
     "transposed-coverage", "transposed_coverage",  # without gaps, without paddings
     lambda net, n=1: original.transposed_coverage([(max(k, s), s, p) for k, s, p in net], n),
     lambda net, n=1: original.transposed_coverage([(k, s, 0) for k, s, _ in net], n)),
    (test_convolution_gradients_are_autograds, [CONVOLUTION, 0, True],
     "conv-grad-input", "conv2d_grad_input",
     lambda x, w, g, **kind: original.conv2d_grad_input(x, w.flip(2, 3), g, **kind),  # not turned
     lambda x, w, g, **kind: original.conv2d_grad_input(x, w, g / len(g), **kind)),  # batch mean
    (test_convolution_gradients_are_autograds, [CONVOLUTION, 0, True], None, "conv2d_grad_input",
     lambda x, w, g, **kind: F.pad(  # without dilation
         original.conv2d_grad_input((*x[:2], 5, 5), w, g), (0, 2, 0, 2))),
    (test_convolution_gradients_are_autograds, [CONVOLUTION, 0, True],
     "conv-grad-weight", "conv2d_grad_weight",
     lambda x, w, g, **kind: original.conv2d_grad_weight(x, w, g, **kind).flip(2, 3),
     lambda x, w, g, **kind: original.conv2d_grad_weight(x, w, g / len(g), **kind)),
    (test_dropout_mask_average_is_exact, [0, 3, 0.3], "dropout-scale", "dropout_mask_average",
     lambda x, p, f=lambda x: x: original.dropout_mask_average(x * (1 - p), p, f),  # not scaled
     lambda x, p, f=lambda x: x: torch.stack([  # all masks equally likely
         f(x * m / (1 - p)) for m in original.masks(len(x), p)[0]]).mean(0)),
    (test_average_precision_is_an_integral, [[True, False, True, False], 2],
     "average-precision", "average_precision",
     lambda hits, n: original.average_precision(hits, max(1, sum(hits))),
     lambda hits, n: np.mean(np.cumsum([*map(float, hits)]) / np.arange(1, len(hits) + 1))),
    (test_mlp_gradients_are_autograds, [0, (4, 3, 5, 3), 0.5],
     "mlp-backprop", "mlp_grads", mlp_without_a_sigmoid,
     lambda *p, lam=0.5: original.mlp_grads(*p[:6], lam=lam / 2),
     lambda x, *p, **lam: {k: len(x) * g for k, g in original.mlp_grads(x, *p, **lam).items()}),
    (test_numeric_gradient_is_the_gradient, [0, 4, 1e-4], "numeric-grad", "numeric_grad",
     lambda f, x, h=6e-6: torch.stack([(f(x + h * e) - f(x)) / h for e in torch.eye(len(x))]),
     lambda f, x, eps=6e-6: 2 * original.numeric_grad(f, x, eps)),
    (test_truncation_cuts_the_gradient_and_only_the_gradient, [0, 5, 2, 3], "tbptt", "rnn",
     lambda x, w_x, w_h, s=None: original.rnn(x, w_x, w_h),
     lambda x, w_x, w_h, s=None: original.rnn(x, w_x, w_h, s and s + 1),
     lambda x, w_x, w_h, s=None: original.rnn(x[-s:] if s else x, w_x, w_h)),
    (test_ridge_is_the_least, [0, 6, 3, 0.5], "bilevel", "ridge",
     lambda x, y, lam: original.ridge(x, y, 2 * lam), lambda x, y, lam: original.ridge(x, y, 0)),
    (test_noise_parts_are_those_of_squares, [0, 2, 3], "grad-norm-noise", "noise_parts",
     lambda loss, D, x: [2 * part for part in original.noise_parts(loss, D, x)],
     lambda loss, D, x: [part * (1 - i) for i, part in enumerate(  # only a penalty
         original.noise_parts(loss, D, x))]),
    (test_coupling_density_is_the_jacobians, [0, 3, 3], None, "coupling_log_prob",
     lambda x, layers: original.coupling_log_prob(x, layers[::-1]),
     lambda x, layers: 2 * original.coupling_log_prob(  # the other sign of log det
         x, [(mask, lambda k: 0 * k, lambda k: 0 * k) for mask, _, _ in layers])
     - original.coupling_log_prob(x, layers)),
    (test_smoothed_d_is_the_best, [0, 0.9, 0.1], "smoothing-optimum", "smoothed_d",
     lambda p, q, real=0.9, fake=0.0: real * p / (p + q),
     lambda p, q, real=0.9, fake=0.0: p / (p + q)),
    (test_r1_of_weight_2_k_eta_damps_as_k_unrolled_steps, [0, 0.1, 2, True],
     "r1-game", "bilinear_step",  # a weight of k η where 2 k η is asked for
     lambda *state, r1=0.0, **kind: original.bilinear_step(*state, r1=r1 / 2, **kind)),
    *[(test, [0.1, 0.5, True], "momentum-game", "momentum_step",
       lambda *state, eta, momentum, alternating=True: original.momentum_step(
           *state, eta, -momentum, alternating),
       lambda *state, eta, momentum, alternating=True: original.momentum_step(
           *state, eta, momentum, not alternating)) for test in (
        test_momentum_moves_by_velocities, test_growth_with_momentum_is_the_largest_root)],
    (test_truncated_variance_is_the_integral, [1.0], "truncation", "truncated_normal_variance",
     lambda t: 1.0,
     lambda t: 1 - 2 * t * math.exp(-t * t / 2) / (2 * math.pi) ** 0.5 / (1 + math.erf(t / 2**.5))),
    (test_merged_statistics_are_those_of_the_joined_batch, [0, [2, 5, 3], torch.float64],
     "cross-replica-bn", "merge_batch_statistics",
     lambda n, m, v: (original.merge_batch_statistics(n, m, v)[0], v.mean(0)),
     lambda n, m, v: original.merge_batch_statistics(torch.ones_like(n), m, v))]


@pytest.mark.parametrize("test, case, claim, name, twin", [
    (*row[:4], twin) for row in WRONG for twin in row[4:]])
def test_a_wrong_twin_fails_the_property_and_the_claim(test, case, claim, name, twin, monkeypatch):
    monkeypatch.setattr(theory, name, twin)
    with pytest.raises(AssertionError):
        test.hypothesis.inner_test(*case)
    assert claim is None or not confirmed(claim)


@pytest.mark.parametrize("claim, name, twin", [
    ("tbptt-reach", "rnn", lambda x, w_x, w_h, truncate=None: original.rnn(x[-5:], w_x, w_h)),
    ("posterior-collapse", "best_linear_vae",  # the variance of a pixel as the limit
     lambda variance, v, pixels=1: original.best_linear_vae(variance, v)),
    ("no-density", "log_normal", lambda x, mu, sigma: original.log_normal(
        x, mu, sigma + torch.eye(len(x)).double())),
    ("bilevel", "ridge", lambda x, y, lam: 1.01 * original.ridge(x, y, lam)),
    ("rf-recursion", "receptive_field", lambda net: (  # padding does not widen it
        sum(original.receptive_field(net)[::2]), *original.receptive_field(net)[1:])),
    ("detector-shapes", "receptive_field", lambda net: original.receptive_field(net[1:])),
    ("transposed-coverage", "REPORT_G", theory.FIXED_G),
    ("posterior-collapse", "linear_elbo",
     lambda *args: original.linear_elbo(*args) + original.kl_standard_normal(*args[3:])),
    *[("bilinear-game", "bilinear_step", lambda *state, alternating=False, turn=turn, **kind:
       original.bilinear_step(*state, alternating=turn, **kind)) for turn in (False, True)]])
def test_a_claim_on_a_wrong_function_is_not_confirmed(claim, name, twin, monkeypatch):
    monkeypatch.setattr(theory, name, twin)
    assert not confirmed(claim)


@pytest.mark.parametrize("name, right, wrong", [
    ("dropout-scale", "x ** 2 / (1 - p)", "x ** 2"), ("js-vs-w1", ".cumsum(0)", ""),
    ("gp-linear", ".norm(dim=1)", ".abs().sum(dim=1)"), ("spectral", "(w.T @", "(w.T.abs() @"),
    ("gp-linear", "- 1) ** 2).mean()", ") ** 2).mean()"),
    ("vae-mean", "answer: (x - answer).pow(2)", "answer: (x - answer).abs()"),
    ("moments-not-gaussian", "[p, -q]", "[p, q]"), ("moments-not-gaussian", "1, 2, 4", "1, 2, 3"),
    ("smoothing-floor", "0.1 * math.log(0.1)", "0.1 * math.log(0.9)"),
    ("linear-first-layer", "weight.flatten(1)", "weight.flip(2).flatten(1)"),
    ("embedding-needed", "index % 2 == 1", "index >= 4"),
    ("attention-alignment", "(h @ decoder / 2).softmax(dim=0)", "torch.eye(20).double()[19]"),
    ("sigmoid-tanh", "(torch.sigmoid, torch.tanh)", "(torch.sigmoid, torch.sigmoid)"),
    ("sigmoid-tanh", "(None, nn.init.xavier_normal_)", "(None, nn.init.zeros_)"),
    ("sigmoid-tanh", "torch.tanh)\n", "lambda x: torch.tanh(0.6 * x))\n"),  # 1e10 times, not 1e14
    ("relu-sign", "torch.relu(x) * grad", "torch.relu(x) * grad.abs()"),
    ("relu-dead", "double(-50.0)", "double(0.0)"), ("relu-dead", "60 * w", "40 * w"),
    ("loss-tells-which", "w / 7, y", "w / 1.1, y"), ("loss-tells-which", "3 * w", "w"),
    ("label-constraints", "(answer > k)", "(answer >= k)"),
    ("label-constraints", "(answer > k) + (answer < k)", "2 * (answer != k)"),
    ("mlp-grads", "lam * w)", "w)"), ("sgd-steps", "(1, 64)", "(1, 1)"),
    ("gd-memory", "len(part) / 60", "1 / len(parts)"),
    ("gd-global", "noise * normal(runs)", "0 * normal(runs)"), ("gd-global", "0.3 * x", "-0.3 * x"),
    ("gd-no-slope", "(x @ w).sign()) / 2", "(x @ w).tanh()) / 2"),
    ("gd-no-slope", "wrong(w)[i]", "(x[i] @ w)"),  # SGD has a gradient
    ("newton-ravine", "x - torch", "x - 0.9 * torch"),
    ("newton-ravine", "double([1.0, -1.0])", "double([1.0, 1.0])"),
    ("tbptt-reach", "torch.eye(8, dtype=torch.float64)", "torch.eye(8).double() / 2"),
    ("grad-accumulate", "(True, False)", "(True, True)"),
    ("grad-accumulate", "powers=(1, 2, 4)", "powers=(1, 2)"),
    ("grad-accumulate-sgd", "False, (1, 2)", "False, (1, 2, 4)"),
    ("grad-norm-noise", "(penalty + rest)", "penalty"),
    ("grad-norm-noise", "share * real(d) + (1 - share) * real(-d)", "(real(d) + real(-d)) / 2"),
    ("grad-norm-noise", "normal(100, 1)", "D(x)[:, None]"),  # a squared error at its minimum
    ("vae-mean", "mean, error = x.mean(dim=0)", "mean, error = x.median(dim=0).values"),
    ("shift-blind", "x.roll(1, 2)", "x"), ("shift-blind", "(1, 2), x.mean", "(28, 2), x.mean"),
    ("perfect-d", "range(200)", "range(0)"), ("perfect-d", "logits.softmax(0)).norm", "p).norm"),
    ("detach-d", "grads(G(z).detach())", "grads(G(z))"),
    ("mse-sigmoid", " (a - 1) ** 2", " (a.sigmoid() - 1) ** 2"),
    ("mse-sigmoid", "-a.sigmoid() ** 2", "-a.sigmoid()"),
    ("log-plus-eps", "sigmoid(a) + 1e-8", "sigmoid(a) + 1e-12"),
    ("smoothing-optimum", "(0.9, 0.1)", "(0.9, 0.0)"),
    ("smoothing-optimum", "for mean in (0, 6)", "for mean in (-60, 6)"),  # p is exactly 0
    ("g-loss-alone", "F.softplus(-b) + F.softplus(b)", "F.softplus(-b)"),
    ("g-loss-alone", "(0.0, 0.3, 2.0)", "(0.0, 1.0, 2.0)"),
    ("g-low-d-high", "(0.0, 0.3, 2.0)", "(0.0, 0.3, -2.0)"),
    ("loss-symmetry", "(-F.softplus(a)).exp()", "F.softplus(a).exp()"),
    ("minimax-maximin", "games.amax(2, keepdim=True)", "games.amin(2, keepdim=True)"),
    ("minimax-maximin", "[[[1, -1], [-1, 1]]]", "[[[1, 1], [-1, 1]]]"),
    ("maximin-collapse", "D.argmax()", "D.argmin()"),
    ("maximin-collapse", "gan_value(p / (p + q), p, q)", "gan_value(half, p, q)"),
    ("double-sigmoid", "torch.sigmoid(a), torch.sigmoid(-a)", "a, -a"),
    ("r1-game", "r1=2 * k * eta", "r1=k * eta"), ("momentum-game", "0.5, -0.3)", "0.5, 0.3)")])
def test_a_claim_that_computes_something_else_is_not_confirmed(name, right, wrong):
    """Each new or corrected claim among them: what its statement said before is a wrong one."""
    check = theory.CLAIMS[name].theme
    source = inspect.getsource(check)
    assert source.count(right) == 1
    names = {**vars(theory), "theme": lambda check: check}
    exec(source.replace(right, wrong), names)
    assert not result(name, check=names[check.__name__])[1]


@pytest.mark.parametrize("name, verdict, words, shown", [
    ("loss-tells-which", "holds", "If gradients vanish or explode", "minimum"),
    ("sigmoid-tanh", "refuted", "no difference", ": 4e+14 times"),
    ("perfect-d", "refuted", "50 %", "p ≠ q, weak D"),
    ("gd-no-slope", "refuted", "or SGD", "SGD's 0"),
    ("posterior-collapse", "holds", "largest eigenvalue", "two pixels"),
    ("grad-norm-noise", "refuted", "gradient penalty", "squared error"),
    ("smoothing-optimum", "holds", "flat where p is small", "β = 0"),
    ("grad-accumulate-sgd", "refuted", "any loss", "without")])
def test_a_claim_says_under_which_condition_it_is_decided(name, verdict, words, shown):
    claim = theory.CLAIMS[name]
    assert claim.verdict == verdict and words in claim.statement
    assert shown in result(name)[0].measured


# --- the program -------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["depth-numbers", "relu-linear"])
def test_a_wrong_verdict_ends_with_status_one(name, monkeypatch, capsys):
    monkeypatch.setitem(theory.CLAIMS, name, theory.CLAIMS[name]._replace(
        theme=shaky(name, *10 * [math.nan])))
    one_line(capsys, lambda: theory.main(["--only", name]), f"not the expected verdict: {name}\n",
             status=1)


def test_a_table_is_100_columns_wide_and_says_what_is_not_confirmed(capsys):
    rows = [(theory.Row("refuted", name, "", 9 * "long ", 30 * "long ", False), i)
            for i, name in enumerate(theory.CLAIMS)]
    theory.print_results(rows, 100)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert re.match("claim +the claim says +measured +verdict", out)
    assert "confirmed" in out and "by 7 of" in out
    theory.main(["--list"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100 and all(name in out for name in theory.CLAIMS)


def test_only_runs_a_theme_and_says_why_and_writes_nothing(tmp_path, capsys):
    theory.main(["--only", "double-sigmoid", "--out", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert "1.0064, 0.6931" in out and "g-low-d-high" in out and "saturation-high" not in out
    for text in (theory.reading_a_log.__doc__, theory.TOPICS["GANs"],
                 "g-low-d-high: Ideally G's loss is low and D's loss is high."):
        assert " ".join(text.split()) in " ".join(out.split())
    assert "4 of 4, seeds for each: 5" in out and not list(tmp_path.iterdir())
    one_line(capsys, lambda: theory.main(["--only", "mse_sigmod"]), "did you mean mse-sigmoid?")


@pytest.mark.parametrize("name", theory.FIGURES)
def test_no_text_of_a_figure_is_cut_off_or_lies_on_another_panel(name):
    fig = theory.FIGURES[name]()
    boxes = [part.get_tightbbox() for part in (*fig.axes, fig._suptitle)]
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= fig.bbox.x1 and box.y1 <= fig.bbox.y1
    for a, b in itertools.combinations(boxes, 2):
        assert min(a.x1, b.x1) <= max(a.x0, b.x0) or min(a.y1, b.y1) <= max(a.y0, b.y0)


def quiz(lines, monkeypatch, capsys):
    """What --predict prints for these lines; the claims are refuted, holds, refuted."""
    monkeypatch.setattr(sys, "stdin", lines if lines is None else io.StringIO(lines))
    theory.main(["--predict", "--only", "relu-linear", "relu-dead", "saturation-high"])
    return capsys.readouterr().out


@pytest.mark.parametrize("lines, right, asked", [
    ("r\nh\nr\n", 3, 3), ("refuted\nHOLDS \nRefuted\n", 3, 3), ("h\nr\nh\n", 0, 3),
    ("h\nh\nr\n", 2, 3), ("\nh\n\n", 1, 1), ("\n\n\n", 0, 0), ("", 0, 0), ("r", 1, 1),
    ("r\nr\n", 1, 2), ("yes\n1\nr\nhr\nh\n?\nr\n", 3, 3), ("r\nq\n", 1, 1), (None, 0, 0)])
def test_the_quiz_counts_the_hits(lines, right, asked, monkeypatch, capsys):
    """Letters or words; an empty line skips, q or the end of input ends it, anything else asks
    again. Python has no stdin if it was closed before the start, as by a shell's <&-."""
    out = quiz(lines, monkeypatch, capsys)
    assert out.endswith(f"\nyou were right on {right} of {asked}\n")
    assert (out.count("an empty line skips") > 3) == ("?" in (lines or ""))


def test_the_quiz_asks_before_it_shows_both_sides(tmp_path, monkeypatch, capsys):
    """A part of the output for each question: it ends with the question. No file is written."""
    monkeypatch.chdir(tmp_path)
    first, second, third, end = quiz("r\nr\n\n", monkeypatch, capsys).split("holds or refuted?")
    assert "relu-linear" in first and "1 : 1 : 1" not in first
    assert "1 : 1 : 1" in second and second.count("refuted") == 1
    assert theory.CLAIMS["relu-dead"].statement in second and "moved inputs" not in second
    assert third.count("holds") == 1 and "moved inputs" in third
    assert "-1.0000" not in end  # a claim that is skipped keeps its secret
    assert not list(tmp_path.iterdir())
