"""Chapter 03: the unrolled gradient is right, and k = 0 is the plain GAN."""

import copy
import importlib
import math
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, note, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from strategies import about, generator, normal, rejected, seeds

unrolled = importlib.import_module("03_unrolled_gan")
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EPS = torch.finfo(torch.float64).eps


def smooth_nets(seed):
    """A tiny G and D in float64 with tanh, so that finite differences are meaningful."""
    torch.manual_seed(seed)
    G = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    D = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0)).double()
    return G, D


def linear_unrolled_value(x, x_fake, w, b, k, eta, saturating):
    """Oracle, by hand: G's loss after k ascent steps of the linear D(x) = w.x + b, in closed form.

    ∂f/∂w = mean (1 - σ(D(x))) x - mean σ(D(x')) x', likewise for b with x = 1.
    """
    sigma = torch.sigmoid
    for _ in range(k):
        pull, push = 1 - sigma(x @ w + b), sigma(x_fake @ w + b)
        w, b = (w + eta * ((pull[:, None] * x).mean(0) - (push[:, None] * x_fake).mean(0)),
                b + eta * (pull.mean() - push.mean()))
    if not saturating:
        return -sigma(x_fake @ w + b).log().mean()
    return sigma(x @ w + b).log().mean() + (1 - sigma(x_fake @ w + b)).log().mean()


@about("unrolled_loss_g", "unroll", "value")
@given(seeds(), st.integers(0, 6), st.floats(0.01, 1.0), st.booleans())
def test_unrolled_value_equals_the_closed_form_of_a_linear_discriminator(seed, k, eta, saturating):
    torch.manual_seed(seed)
    D = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)).double()
    x, x_fake = normal(seed, 2, 6, 2)
    w, b = D[0].weight[0].detach(), D[0].bias[0].detach()
    expected = linear_unrolled_value(x, x_fake, w, b, k, eta, saturating)
    got = unrolled.unrolled_loss_g(D, x, x_fake.requires_grad_(), k, eta, saturating=saturating)
    # about 100 roundings a step of numbers near 1; 1e4 eps leaves room for the logs' cancellation
    assert_close(got, expected, rtol=0, atol=1e4 * EPS * (k + 1))


def central_differences(f, x, eps=1e-6):
    """∂f/∂x entry by entry, from values alone."""
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        step = torch.zeros_like(x).flatten()
        step[i] = eps
        step = step.view_as(x)
        gradient.view(-1)[i] = (f(x + step) - f(x - step)) / (2 * eps)
    return gradient


def gradients(seed, k, eta, exact, saturating=True):
    """The gradient for G's last layer: the chapter's, and finite differences through k steps."""
    G, D = smooth_nets(seed)
    x, z = normal(seed, 6, 2), normal(seed + 1, 6, 3)
    weight = G[2].weight

    def loss(w):
        x_fake = G[1](G[0](z)) @ w.T + G[2].bias
        return unrolled.unrolled_loss_g(D, x, x_fake, k, eta, exact, saturating)
    got = torch.autograd.grad(loss(weight), weight)[0]
    return got, central_differences(lambda w: loss(w).item(), weight.detach())


@about("unrolled_loss_g", "unroll")
@given(seeds(), st.integers(0, 5), st.floats(0.1, 1.0), st.booleans())
def test_exact_gradient_is_the_finite_difference_through_all_steps(seed, k, eta, saturating):
    """Truncation eps² = 1e-12 and rounding EPS / eps = 2e-10, times derivatives up to 10."""
    got, expected = gradients(seed, k, eta, True, saturating)
    assert_close(got, expected, rtol=1e-6, atol=1e-8)


@given(seeds(), st.integers(0, 3), st.floats(0.1, 1.0))
def test_the_lines_of_the_readme_are_the_chapter(seed, k, eta):
    """Both ask autograd for the same sums, in an order of their own."""
    G, D = smooth_nets(seed)
    x, z = normal(seed, 6, 2), normal(seed + 1, 6, 3)
    after = README.partition("real from fake:")[2]
    lines = re.search(r"(?:^(?:    .*)?\n)+", after, re.MULTILINE)[0]
    exec(textwrap.dedent(lines), {"torch": torch, "value": unrolled.value, "G": G, "D": D, "x": x,
                                  "z": z, "k": k, "eta": eta,
                                  "opt_g": torch.optim.SGD(G.parameters(), 0.0)})
    got = [p.grad for p in G.parameters()]
    loss = unrolled.unrolled_loss_g(D, x, G(z), k, eta)
    assert_close(got, list(torch.autograd.grad(loss, tuple(G.parameters()))), rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in D.parameters())


@given(seeds(), st.integers(1, 5), st.floats(0.5, 1.0))
def test_rollback_lacks_the_reaction_of_d(seed, k, eta):
    """The wrong twin: the first-order gradient is rejected by the test above for every k > 0."""
    got, expected = gradients(seed, k, eta, exact=False)
    note(f"{got} {expected}")
    with pytest.raises(AssertionError):
        assert_close(got, expected, rtol=1e-6, atol=1e-8)


@about("unrolled_loss_g", "unroll")
@given(seeds(), st.integers(0, 5), st.floats(0.01, 1.0))
def test_rollback_is_the_plain_gradient_against_a_discriminator_trained_k_steps(seed, k, eta):
    """What coursework does: train a copy of D with plain SGD, step G against it, forget it."""
    G, D = smooth_nets(seed)
    x, z = normal(seed, 6, 2), normal(seed + 1, 6, 3)
    got = torch.autograd.grad(unrolled.unrolled_loss_g(D, x, G(z), k, eta, exact=False),
                              tuple(G.parameters()))
    copy = smooth_nets(seed)[1]
    sgd = torch.optim.SGD(copy.parameters(), lr=eta)
    bce = nn.BCEWithLogitsLoss()
    real, fake = torch.ones(6).double(), torch.zeros(6).double()
    for _ in range(k):
        sgd.zero_grad()
        (bce(copy(x), real) + bce(copy(G(z).detach()), fake)).backward()
        sgd.step()
    plain = torch.autograd.grad(-bce(copy(G(z)), fake), tuple(G.parameters()))
    assert_close(got, plain, rtol=1e-9, atol=1e-12)  # the same sums in another order, k + 1 times


@about("unrolled_loss_g", "value")
@given(seeds(), st.booleans())
def test_without_unrolling_the_gradient_is_the_plain_one(seed, exact):
    G, D = smooth_nets(seed)
    x, z = normal(seed, 6, 2), normal(seed + 1, 6, 3)
    got = torch.autograd.grad(unrolled.unrolled_loss_g(D, x, G(z), 0, 0.3, exact),
                              tuple(G.parameters()))
    real, fake = D(torch.cat([x, G(z)])).split(6)
    plain = F.logsigmoid(real).mean() + F.logsigmoid(-fake).mean()
    plain = torch.autograd.grad(plain, tuple(G.parameters()))
    assert_close(got, plain, rtol=1e-12, atol=1e-15)  # a few roundings, if in another order


@about("unrolled_loss_g", "unroll", edge=True)
@given(seeds(), st.integers(0, 5), st.booleans())
def test_a_generator_step_leaves_the_discriminator_untouched(seed, k, exact):
    G, D = smooth_nets(seed)
    before = [p.clone() for p in D.parameters()]
    loss = unrolled.unrolled_loss_g(D, normal(seed, 6, 2), G(normal(seed, 6, 3)), k, 0.5, exact)
    torch.autograd.grad(loss, tuple(G.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(D.parameters(), before))
    assert all(p.grad is None and p.requires_grad for p in D.parameters())


class OneOfTwoHeads(nn.Module):
    """A layer that is frozen, batch norm, spectral norm, and a head that the logits do not use."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(2, 4).requires_grad_(False), nn.BatchNorm1d(4), nn.Tanh(),
            nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Tanh())
        self.score, self.guess = nn.Linear(3, 1), nn.Linear(3, 10)

    def forward(self, x):
        return self.score(self.trunk(x)).flatten()


@about("unrolled_loss_g", "unroll", edge=True)
@given(seeds(), st.integers(0, 4), st.booleans(), st.booleans())
def test_buffers_and_frozen_weights_of_d_stay_as_they_are(seed, k, exact, saturating):
    torch.manual_seed(seed)
    D = OneOfTwoHeads().double()
    before = copy.deepcopy(D.state_dict())
    x, x_fake = normal(seed, 2, 6, 2)
    loss = unrolled.unrolled_loss_g(D, x, x_fake.requires_grad_(), k, 0.5, exact, saturating)
    assert torch.autograd.grad(loss, x_fake)[0].isfinite().all()
    after = D.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [p.requires_grad for p in D.parameters()] == \
        [p.requires_grad for p in OneOfTwoHeads().parameters()]


@about("unrolled_loss_g", "unroll", edge=True)
@given(seeds(), st.integers(0, 4))
def test_a_d_with_buffers_unrolls_as_a_copy_that_is_trained(seed, k):
    """Frozen weights are not trained, and u and v of spectral norm move with every pass."""
    torch.manual_seed(seed)
    D = OneOfTwoHeads().double()
    x, x_fake = normal(seed, 2, 6, 2)
    got = unrolled.unrolled_loss_g(D, x, x_fake, k, 0.3, exact=False)
    sgd = torch.optim.SGD([p for p in D.parameters() if p.requires_grad], lr=0.3)
    for step in range(k + 1):
        real, fake = D(torch.cat([x, x_fake])).split(6)
        loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        if step < k:
            sgd.zero_grad()
            loss.backward()
            sgd.step()
    assert_close(got, -loss, rtol=1e-9, atol=1e-12)  # the same sums in another order, k + 1 times


@about("value")
@given(seeds(), st.integers(1, 5), st.integers(1, 5))
def test_value_takes_more_or_fewer_fakes_than_data(seed, n, m):
    _, D = smooth_nets(seed)
    x, x_fake = normal(seed, n, 2), normal(seed + 1, m, 2)
    f = unrolled.value(D, dict(D.named_parameters()), x, x_fake)
    expected = D(x).sigmoid().log().mean() + (1 - D(x_fake).sigmoid()).log().mean()
    assert_close(f, expected, rtol=0, atol=1e3 * EPS)  # logits of a few: 1 - σ loses e^5 or so


@about("unrolled_loss_g", "unroll")
@given(seeds(), st.floats(0.001, 0.05))
def test_unrolling_climbs(seed, eta):
    """A small ascent step raises f; a descent step (the wrong twin: flipped sign) lowers it."""
    G, D = smooth_nets(seed)
    x, x_fake = normal(seed, 6, 2), G(normal(seed, 6, 3)).detach()

    def f(steps, size):
        return unrolled.unrolled_loss_g(D, x, x_fake.requires_grad_(), steps, size).item()
    assert f(3, eta) > f(0, eta) > f(3, -eta)


@about("value")
@given(seeds())
def test_value_is_minus_two_log_two_for_a_blind_discriminator(seed):
    D = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)).double()
    nn.init.zeros_(D[0].weight), nn.init.zeros_(D[0].bias)
    f = unrolled.value(D, dict(D.named_parameters()), *normal(seed, 2, 6, 2))
    assert_close(f.item(), -2 * math.log(2), rtol=4 * EPS, atol=0)


def test_courseworks_generator_has_its_published_size():
    G, _ = unrolled.image_nets(50, 1, 28, 28)
    assert sum(p.numel() for p in G.parameters()) == 675_025


@given(st.integers(1, 3), st.sampled_from([8, 28, 32]), st.integers(2, 4))
@settings(max_examples=8)
def test_image_nets_fit_any_channels_and_size(c, side, batch):
    G, D = unrolled.image_nets(5, c, side, side)
    x = G(torch.randn(batch, 5))
    assert x.shape == (batch, c, side, side) and x.abs().max() <= 1 and D(x).shape == (batch,)


@pytest.mark.parametrize("nets, shape", [(lambda: unrolled.plane_nets(3), (2,)),
                                         (lambda: unrolled.image_nets(3, 1, 8, 8), (1, 8, 8))])
def test_d_returns_logits(nets, shape):
    """A sigmoid at its end would be a second one."""
    _, D = nets()
    [layer for layer in D if isinstance(layer, nn.Linear)][-1].weight.data.mul_(1e4)
    score = D(torch.randn(8, *shape))
    assert score.min() < 0 or score.max() > 1


# --- measures ----------------------------------------------------------------------------------

@given(st.lists(st.integers(0, 50), min_size=8, max_size=8), seeds())
def test_measure_counts_the_modes_that_were_put_there(counts, seed):
    """Points put at 1 std of chosen modes are good, points in the middle of the ring are not."""
    angle = torch.arange(8) * math.pi / 4
    centres, lost = 2 * torch.stack([angle.cos(), angle.sin()], dim=1), 10
    near = centres + torch.tensor([0.02, 0.0])
    x = torch.cat([near[i].expand(n, 2) for i, n in enumerate(counts)] + [torch.zeros(lost, 2)])
    x = x[torch.randperm(len(x), generator=generator(seed))]
    report = unrolled.measure(x, unrolled.Mixture("ring", centres, 0.02, 256, None, 3.0))
    total = sum(counts)
    assert report["modes"] == sum(n > 0 for n in counts)
    assert_close(report["good"], total / (total + lost), rtol=1e-6, atol=0)
    if total:
        by_hand = sum(n / total * math.log(8 * n / total) for n in counts if n)
        assert_close(report["kl"], by_hand, rtol=1e-9, atol=1e-12)
    else:
        assert math.isnan(report["kl"])


def test_kl_to_uniform_reaches_both_ends():
    assert unrolled.kl_to_uniform(torch.full((8,), 5)) == 0
    one_mode = unrolled.kl_to_uniform(torch.tensor([9, 0, 0, 0]))
    assert_close(one_mode, math.log(4), rtol=4 * EPS, atol=0)


@given(seeds(), st.lists(st.integers(0, 59), min_size=1, max_size=30))
def test_measure_finds_copies_of_training_pictures(seed, chosen):
    x = torch.randint(256, (60, 1, 4, 4), dtype=torch.uint8, generator=generator(seed))
    images = SimpleNamespace(x=x, y=torch.arange(60) % 10)
    copies = x[chosen] / 127.5 - 1
    report = unrolled.measure(copies, images)
    assert report["classes"] == len({i % 10 for i in chosen})
    assert report["distance"] < 1e-3  # float32 cdist by matrix product: sqrt(eps) * norm, norm <= 4
    images.y = None
    assert unrolled.measure(copies, images).keys() == {"distance"}


# --- data --------------------------------------------------------------------------------------

def has_distinct_equal_centres(ring, m):
    """All m complex roots of z^m = 2^m, which are the corners of a regular polygon."""
    centres = ring(m).double()
    power = (torch.view_as_complex(centres) / 2) ** m
    assert_close(power, torch.ones_like(power), rtol=0, atol=1e-4)  # m roundings of float32
    assert torch.pdist(centres).min() > 1 / m


@given(st.integers(3, 40))
def test_ring_has_m_distinct_equally_spaced_centres(m):
    has_distinct_equal_centres(unrolled.ring, m)


@given(st.integers(3, 40))
def test_a_ring_whose_ends_meet_is_rejected(m):
    """The slip of the authors' notebook: linspace(0, 2π, m) gives m - 1 modes, one double."""
    def twin(m):
        angle = torch.linspace(0, 2 * math.pi, m)
        return 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
    assert rejected(has_distinct_equal_centres, twin, m)


def test_grid_is_centred_and_spaced_by_two():
    line = (-4, -2, 0, 2, 4)
    assert sorted(unrolled.grid().tolist()) == [[x, y] for x in line for y in line]


@given(seeds())
def test_mixture_weights_are_equal_and_spread_is_std(seed):
    torch.manual_seed(seed)
    centres, n, std = unrolled.ring(), 8000, 0.02
    x = unrolled.gaussian_mixture(centres, std, n)
    distance, nearest = torch.cdist(x, centres).min(dim=1)
    counts = torch.bincount(nearest, minlength=8)
    # counts are binomial(n, 1/8); six standard deviations
    assert (counts - n / 8).abs().max() < 6 * math.sqrt(n * (1 / 8) * (7 / 8))
    # sum of distance² / std² is chi squared with 2n degrees: mean 2n, variance 4n
    assert abs((distance / std).pow(2).sum().item() - 2 * n) < 6 * math.sqrt(4 * n)
