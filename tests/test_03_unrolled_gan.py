"""Chapter 03: the unrolled gradient is right, k = 0 is the plain GAN, a kill loses nothing."""

import copy
import importlib
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, note, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import common
from harness import draw_nothing, folder_of_pictures, killed_after, one_line, results, same
from strategies import generator, normal, seeds

unrolled = importlib.import_module("03_unrolled_gan")
Z = unrolled.POINTS["z_dim"]
README = (Path(common.__file__).parent / "README.md").read_text()
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
def test_rollback_lacks_the_answer_of_d(seed, k, eta):
    """The wrong twin: the first-order gradient is rejected by the test above for every k > 0."""
    got, expected = gradients(seed, k, eta, exact=False)
    note(f"{got} {expected}")
    with pytest.raises(AssertionError):
        assert_close(got, expected, rtol=1e-6, atol=1e-8)


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


@given(seeds(), st.booleans())
def test_without_unrolling_the_gradient_is_the_plain_one_bitwise(seed, exact):
    G, D = smooth_nets(seed)
    x, z = normal(seed, 6, 2), normal(seed + 1, 6, 3)
    got = torch.autograd.grad(unrolled.unrolled_loss_g(D, x, G(z), 0, 0.3, exact),
                              tuple(G.parameters()))
    real, fake = D(torch.cat([x, G(z)])).split(6)
    plain = F.logsigmoid(real).mean() + F.logsigmoid(-fake).mean()
    plain = torch.autograd.grad(plain, tuple(G.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, plain))


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


@given(seeds(), st.integers(1, 5), st.integers(1, 5))
def test_value_takes_more_or_fewer_fakes_than_data(seed, n, m):
    _, D = smooth_nets(seed)
    x, x_fake = normal(seed, n, 2), normal(seed + 1, m, 2)
    f = unrolled.value(D, dict(D.named_parameters()), x, x_fake)
    expected = D(x).sigmoid().log().mean() + (1 - D(x_fake).sigmoid()).log().mean()
    assert_close(f, expected, rtol=0, atol=1e3 * EPS)  # logits of a few: 1 - σ loses e^5 or so


@given(seeds(), st.floats(0.001, 0.05))
def test_unrolling_climbs(seed, eta):
    """A small ascent step raises f; a descent step (the wrong twin: flipped sign) lowers it."""
    G, D = smooth_nets(seed)
    x, x_fake = normal(seed, 6, 2), G(normal(seed, 6, 3)).detach()

    def f(steps, size):
        return unrolled.unrolled_loss_g(D, x, x_fake.requires_grad_(), steps, size).item()
    assert f(3, eta) > f(0, eta) > f(3, -eta)


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
def test_mode_report_counts_what_was_put_there(counts, seed):
    """Points put at 1 std of chosen modes are good, points in the middle of the ring are not."""
    centres, lost = common.ring(), 10
    near = centres + torch.tensor([0.02, 0.0])
    x = torch.cat([near[i].expand(n, 2) for i, n in enumerate(counts)] + [torch.zeros(lost, 2)])
    x = x[torch.randperm(len(x), generator=generator(seed))]
    report = unrolled.mode_report(x, centres, 0.02)
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
def test_class_report_finds_copies_of_training_pictures(seed, chosen):
    x = torch.randint(256, (60, 1, 4, 4), dtype=torch.uint8, generator=generator(seed))
    images = common.Images(x, torch.arange(60) % 10, "noise")
    copies = common.to_float(x[chosen])
    report = unrolled.class_report(copies, images)
    assert report["classes"] == len({i % 10 for i in chosen})
    assert report["distance"] < 1e-3  # float32 cdist by matrix product: sqrt(eps) * norm, norm <= 4
    assert unrolled.class_report(copies, images._replace(y=None)).keys() == {"distance"}


# --- whole runs --------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("no_figures")


def run(out, *flags):
    unrolled.main(["--quick", "--steps", "12", "-k", "0", "2", "--out", str(out), *flags])
    return results(out / "quick")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        return run(tmp_path_factory.mktemp("straight"))


def test_same_seed_same_numbers_other_seed_others(tmp_path, straight):
    assert same(run(tmp_path / "a"), straight)
    assert not same(run(tmp_path / "b", "--seed", "1"), straight)


def test_steps_of_both_players_are_counted(tmp_path, monkeypatch):
    """2 G steps and 3 D steps for each of 12 steps, for both k."""
    steps, original = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda opt, *a: (
        steps.append(sum(p.numel() for g in opt.param_groups for p in g["params"])),
        original(opt, *a))[1])
    run(tmp_path, "--g-steps", "2", "--d-steps", "3")
    of_g, of_d = (sum(p.numel() for p in net.parameters()) for net in unrolled.plane_nets(Z))
    assert steps == 2 * 12 * ([of_g] * 2 + [of_d] * 3)


@pytest.mark.usefixtures("no_checkpoints")
def test_the_readme_shows_what_is_printed_and_the_same_numbers_twice(tmp_path, capsys):
    shown = re.split(r"The chapter\s+ends with", README)[1].split("\n\n")[1]
    unrolled.main(["--steps", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out.splitlines()[-3:]
    assert printed[0].split() == shown.split("\n")[0].split()
    table = README.partition("<b>03: the unrolled GAN</b>")[2]
    for line, own in zip(shown.split("\n")[1:], printed[1:], strict=True):
        label, modes, good, kl = line.split()
        assert own.split()[0] == label
        row = re.search(rf"^\| {label.replace('=', ' = ')},.*", table, re.MULTILINE)[0]
        cells = row.split(" | ")
        assert cells[1:3] == [modes, f"{100 * float(good):.1f} %"]
        told = cells[3].split()[0]  # one digit, or "-" if no mode is reached
        assert told == kl or float(told) == pytest.approx(float(kl), rel=0.15)


@pytest.mark.usefixtures("no_checkpoints")
@pytest.mark.parametrize("flags", [["--method", "rollback"], ["--eta", "0.2"]])
def test_what_concerns_unrolling_changes_the_unrolled_gan_alone(tmp_path, straight, flags):
    other = run(tmp_path, *flags)
    assert torch.equal(other["samples_k0.pt"], straight["samples_k0.pt"])
    assert not torch.equal(other["samples_k2.pt"], straight["samples_k2.pt"])
    assert not torch.equal(straight["samples_k0.pt"], straight["samples_k2.pt"])


@pytest.mark.usefixtures("no_checkpoints")
def test_a_k_that_is_named_twice_is_trained_once(tmp_path, straight):
    assert same(run(tmp_path, "-k", "0", "2", "2", "0"), straight)


@pytest.mark.usefixtures("no_checkpoints")
@pytest.mark.parametrize("flags", [["--batch", "100"], ["--z-dim", "3"]])
def test_the_batch_and_the_length_of_z_reach_the_training(tmp_path, straight, flags):
    assert not same(run(tmp_path, *flags), straight)


@pytest.mark.usefixtures("no_checkpoints")
def test_memory_does_not_grow_with_the_steps(tmp_path, tensors_alive, monkeypatch):
    """Each G step keeps the graphs of k steps of D, and drops them."""
    monkeypatch.setattr(unrolled.Points, "shot", lambda data, samples, D: {})  # no snapshots
    for name in ("draw_process", "draw_animation"):
        monkeypatch.setattr(unrolled, name, lambda args, data, shots: None)
    run(tmp_path, "-k", "2")
    assert len(tensors_alive) == 12 and max(tensors_alive[8:]) <= tensors_alive[7]


def test_the_kept_weights_draw_the_samples(tmp_path):
    samples = run(tmp_path)["samples_k2.pt"]
    torch.manual_seed(0)
    G, _ = unrolled.plane_nets(Z)
    z = torch.randn(len(samples), Z)
    G.load_state_dict(torch.load(tmp_path / "quick" / "weights_k2.pt"))
    assert torch.equal(unrolled.generate(G, z), samples)


@pytest.mark.usefixtures("no_checkpoints")
def test_g_goes_where_the_data_are(tmp_path, monkeypatch):
    """All data at (2, 0): with the right signs both G's points, around 0 at the start, go there."""
    monkeypatch.setattr(common, "gaussian_mixture",
                        lambda centres, std, n: centres[:1].expand(n, 2))
    for samples in (part for name, part in run(tmp_path, "--steps", "100").items() if "k" in name):
        assert samples[:, 0].mean() > 1 and samples[:, 1].mean().abs() < 0.5


@pytest.mark.parametrize("deaths", [[1], [7], [12], [13], [20], [3, 5, 11]])
def test_a_run_killed_after_any_checkpoint_resumes_to_the_same_bits(tmp_path, straight, deaths):
    """Each death comes right after that many checkpoints of its own life."""
    for death in deaths:
        with killed_after(death):
            run(tmp_path, "--resume")
    assert same(run(tmp_path, "--resume"), straight)
    assert same(run(tmp_path, "--resume"), straight)  # a finished run resumes to itself


@pytest.mark.draws
def test_pictures_resume_to_the_same_bits(tmp_path, digits_dir, monkeypatch):
    """Here the order of the data and dropout have to be put back too."""
    monkeypatch.setattr(unrolled, "N_SAMPLES", 500)
    def result(out, *more):
        unrolled.main(["--data", "digits", "--data-dir", str(digits_dir), "--steps", "6", "-k", "1",
                       "--batch", "16", "--out", str(out), *more])
        return results(out)
    expected = result(tmp_path / "straight")
    with killed_after(4):
        result(tmp_path / "killed")
    assert same(result(tmp_path / "killed", "--resume"), expected)
    samples = expected["samples_k1.pt"]
    assert samples.shape == (500, 1, 28, 28) and samples.dtype == torch.uint8


LONG = ["--steps", "200", "-k", "0", "--device", "cpu", "--resume"]


def killed_and_interrupted(folder):
    """Each signal at the first checkpoint of a process: its folder, its status, what it said."""
    def end(signal_number):
        out = folder / signal_number.name
        process = subprocess.Popen(
            [sys.executable, unrolled.__file__, "--quick", *LONG, "--out", out], text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE)
        while not (out / "quick" / "checkpoint.pt").exists() and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal_number)
        error = process.communicate()[1]
        return out, process.returncode, error

    return [end(signal.SIGKILL), end(signal.SIGINT)]


@pytest.mark.beside(run=killed_and_interrupted)
def test_a_process_that_is_killed_or_interrupted_resumes_to_the_same_bits(tmp_path, beside):
    straight = run(tmp_path, *LONG)
    for (out, status, error), expected in zip(beside, (-signal.SIGKILL, 130)):
        assert status == expected and "Traceback" not in error
        assert same(run(out, *LONG), straight)


@pytest.mark.draws
def test_a_small_folder_is_enough(tmp_path):
    """Fewer pictures than a batch: as many of G's stand beside them."""
    folder = folder_of_pictures(tmp_path / "p", 20, 8)
    unrolled.main(["--quick", "--steps", "2", "-k", "1", "--out", str(tmp_path / "o"), "--data",
                   folder, "--size", "8"])
    assert results(tmp_path / "o" / "quick")["samples_k1.pt"].shape == (1000, 3, 8, 8)


def test_a_loss_that_explodes_names_itself_and_keeps_the_checkpoint(tmp_path, monkeypatch, capsys):
    run(tmp_path)
    before = (tmp_path / "quick" / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(unrolled, "unrolled_loss_g",
                        lambda D, x, x_fake, *_, **__: x_fake.sum() * math.nan)
    one_line(capsys, lambda: run(tmp_path), "loss_g is nan at step 1", status=1)
    assert (tmp_path / "quick" / "checkpoint.pt").read_bytes() == before


def test_odd_sides_are_refused(tmp_path, capsys):
    folder = folder_of_pictures(tmp_path / "p", 3, 30)
    one_line(capsys, lambda: unrolled.main(
        ["--data", folder, "--size", "30", "--out", str(tmp_path / "o")]), "divisible by 4")
