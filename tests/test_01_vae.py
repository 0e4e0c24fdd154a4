"""Chapter 01: the bound is a bound, its terms are what they say, a kill loses nothing."""

import csv
import importlib
import itertools
import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence
from torch.testing import assert_close

import common
from harness import folder_of_pictures, killed_after, one_line, rejected, results, same
from strategies import normal, seeds

vae = importlib.import_module("01_vae")
EPS = torch.finfo(torch.float64).eps
sizes = st.integers(1, 6)


def gaussian(seed, n, d):
    """mu and logvar [n, d]; σ from e^-2 to e^2 or so, so that no rounding error is blown up."""
    return 2 * normal(seed, n, d), normal(seed + 1, n, d)


# --- the terms ---------------------------------------------------------------------------------

def kl_is_that_of_torch(kl, seed, n, d):
    mu, logvar = gaussian(seed, n, d)
    expected = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(dim=1)
    size = (logvar.exp() + mu ** 2 + 1 + logvar.abs()).sum(dim=1).max().item()
    assert_close(kl(mu, logvar), expected, rtol=0, atol=8 * d * EPS * size)


@given(seeds(), sizes, sizes)
def test_kl_is_that_of_two_normals(seed, n, d):
    kl_is_that_of_torch(vae.kl_standard_normal, seed, n, d)


@pytest.mark.parametrize("twin", [
    lambda mu, logvar: 2 * vae.kl_standard_normal(mu, logvar),
    lambda mu, logvar: vae.kl_standard_normal(mu, 2 * logvar),              # logvar taken for log σ
    lambda mu, logvar: vae.kl_standard_normal(mu, logvar) / mu.shape[1],    # a mean over d
    lambda mu, logvar: vae.kl_standard_normal(mu, logvar) + logvar.sum(1)])  # a flipped sign
def test_wrong_kls_are_rejected(twin):
    assert rejected(kl_is_that_of_torch, twin, 0, 3, 2)


def negative_elbo_is_its_mean(negative_elbo, seed, n, k):
    """KL by torch, and the mean over the k draws by a sum in Python."""
    mu, logvar = gaussian(seed, n, 3)
    log_px = normal(seed + 2, k, n)
    kl = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(dim=1)
    expected = kl - sum(log_px) / k
    size = (logvar.exp() + mu ** 2 + 1 + logvar.abs()).sum(dim=1).max() + log_px.abs().max()
    atol = 8 * (k + 3) * EPS * size.item()
    assert_close(negative_elbo(log_px, mu, logvar), expected, rtol=0, atol=atol)


@given(seeds(), sizes, sizes)
def test_negative_elbo_is_kl_minus_the_mean_log_likelihood(seed, n, k):
    negative_elbo_is_its_mean(vae.negative_elbo, seed, n, k)


@pytest.mark.parametrize("twin", [
    lambda log_px, mu, logvar: vae.kl_standard_normal(mu, logvar) + log_px.mean(dim=0),
    lambda log_px, mu, logvar: vae.kl_standard_normal(mu, logvar) - log_px.sum(dim=0),
    lambda log_px, mu, logvar: vae.kl_standard_normal(mu, logvar) - log_px.logsumexp(dim=0)])
def test_wrong_elbos_are_rejected(twin):
    assert rejected(negative_elbo_is_its_mean, twin, 0, 3, 2)


@given(seeds(), sizes)
def test_kl_is_zero_only_at_the_prior(seed, d):
    zero = torch.zeros(1, d, dtype=torch.float64)
    mu, logvar = gaussian(seed, 1, d)
    assert vae.kl_standard_normal(zero, zero).item() == 0
    assert vae.kl_standard_normal(mu, zero).item() > 0 < vae.kl_standard_normal(zero, logvar).item()


@given(seeds(), sizes, sizes, st.floats(1e-3, 10))
def test_the_loss_of_the_course_is_its_formula(seed, n, d, x_sigma2):
    """Written with matrices, one example at a time: tr Σ + ‖mu‖² - d - log det Σ."""
    mu, logvar = gaussian(seed, n, d)
    x, x_rec = normal(seed + 2, n, 1, 2, 3), normal(seed + 3, n, 1, 2, 3)
    data, kl = 0.0, 0.0
    for i in range(n):
        covariance = torch.diag(logvar[i].exp())
        data += math.dist(x[i].flatten().tolist(), x_rec[i].flatten().tolist()) ** 2 / x_sigma2 / 6
        kl += (covariance.trace() + mu[i] @ mu[i] - d - covariance.logdet()).item()
    loss, data_term, kl_term = vae.vae_loss(x, x_rec, mu, logvar, x_sigma2)
    assert_close(data_term.item(), data / n, rtol=50 * EPS, atol=0)
    size = (logvar.exp() + mu ** 2 + 1 + logvar.abs()).sum().item()
    assert_close(kl_term.item(), kl / n, rtol=0, atol=50 * EPS * size)
    assert_close(loss, data_term + kl_term, rtol=0, atol=0)


@given(seeds(), sizes, st.floats(0.01, 10))
def test_the_loss_of_the_course_is_minus_two_elbo_up_to_a_constant(seed, n, x_sigma2):
    """-ELBO = loss / 2 + d_x / 2 log(2 π s²) for pixels of variance s² = σ² d_x."""
    mu, logvar = gaussian(seed, n, 2)
    x, x_rec = normal(seed + 2, n, 1, 2, 2), normal(seed + 3, n, 1, 2, 2)
    variance = 4 * x_sigma2
    elbo = Normal(x_rec, variance ** 0.5).log_prob(x).sum(dim=(1, 2, 3)).mean() \
        - vae.kl_standard_normal(mu, logvar).mean()
    loss, data_term, _ = vae.vae_loss(x, x_rec, mu, logvar, x_sigma2)
    constant = 4 / 2 * math.log(2 * math.pi * variance)
    assert_close((loss / 2 + constant).item(), -elbo.item(), rtol=0,
                 atol=100 * EPS * (loss.abs().item() + abs(constant) + data_term.item()))


def test_a_loss_without_meaning_is_refused():
    x, mu = torch.zeros(2, 1, 4, 4), torch.zeros(2, 3)
    for x, x_rec, x_sigma2 in ((x, x, 0.0), (x, x, -1.0), (x, x, math.nan), (x, x[:1], 1.0),
                               (x[:0], x[:0], 1.0)):
        with pytest.raises(ValueError):
            vae.vae_loss(x, x_rec, mu, mu, x_sigma2)


@pytest.mark.parametrize("log_px, z", [((4,), (4, 2)), ((1, 4), (4, 2)), ((3, 2), (3, 4, 2)),
                                       ((3, 4, 1), (3, 4, 2))])
def test_bounds_of_sizes_that_do_not_fit_are_refused(log_px, z):
    """Such as those of a picture each that has lost its dimension k: a mean over the batch."""
    mu, log_px, z = torch.zeros(4, 2), torch.zeros(log_px), torch.zeros(z)
    with pytest.raises(ValueError, match=r"log_px_z must be \[k, B\]"):
        vae.iwae_bound(log_px, z, mu, mu)
    if log_px.shape != (1, 4):
        with pytest.raises(ValueError, match=r"log_px_z must be \[k, B\]"):
            vae.negative_elbo(log_px, mu, mu)


@given(seeds(), sizes, sizes)
def test_likelihoods_are_those_of_torch(seed, k, n):
    logits, x = normal(seed, k, n, 1, 2, 3), (normal(seed + 1, n, 1, 2, 3) > 0).double()
    expected = Bernoulli(logits=logits).log_prob(x.expand(k, -1, -1, -1, -1)).sum((-3, -2, -1))
    # x a - softplus(a) cancels where x is likely: the error is that of |a|, up to 6 pixels of 6
    assert_close(vae.log_bernoulli(x, logits), expected, rtol=0, atol=1000 * EPS)
    expected = Normal(logits, 0.7).log_prob(x).sum((-3, -2, -1))
    assert_close(vae.log_gaussian(x, logits, 0.49), expected, rtol=0,
                 atol=100 * EPS * (1 + expected.abs().max().item()))


@given(seeds(), st.sampled_from([(), (1,), (4, 1, 1, 1), (1, 2, 1, 1), (4, 1, 2, 3)]))
def test_a_learned_variance_has_the_gradient_that_it_has_in_torch(seed, shape):
    """One for all, for each picture, each colour, each pixel."""
    x, mean = normal(seed, 4, 2, 2, 3), normal(seed + 1, 5, 4, 2, 2, 3)
    variance = normal(seed + 2, math.prod(shape)).exp().view(shape).requires_grad_()
    expected = Normal(mean, variance.sqrt()).log_prob(x).sum((-3, -2, -1))
    got = vae.log_gaussian(x, mean, variance)
    # e^3 and more is rare for the inverse variance: sums of up to 240 terms of a few hundred
    assert_close(got, expected, rtol=1e-11, atol=1e-11)
    slopes = (torch.autograd.grad(values.sum(), variance)[0] for values in (got, expected))
    assert_close(*slopes, rtol=1e-9, atol=1e-9)


@given(seeds())
def test_probabilities_of_all_pictures_sum_to_one(seed):
    """All 16 pictures of 2x2 pixels."""
    x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)), dtype=torch.float64)
    p = vae.log_bernoulli(x.view(16, 1, 2, 2), 3 * normal(seed, 1, 1, 2, 2)).exp()
    assert_close(p.sum().item(), 1.0, rtol=0, atol=100 * EPS)


# --- the bound, in a model whose log p(x) is known ---------------------------------------------

def linear_gaussian(seed, d=2, d_x=3, s2=0.5):
    """p(x|z) = N(Wz, s² I), z ~ N(0, I), W's columns orthogonal, so that p(z|x) is diagonal.

    Returns x [1, d_x], log p(x), the posterior's mu and logvar, and z -> log p(x|z).
    """
    W = torch.linalg.qr(normal(seed, d_x, d))[0] * torch.tensor([2.0, 0.7]).double()
    x = 2 * normal(seed + 1, 1, d_x)
    s2_eye = s2 * torch.eye(d_x, dtype=torch.float64)
    log_p = MultivariateNormal(torch.zeros(d_x).double(), W @ W.T + s2_eye).log_prob(x)
    precision = 1 + (W ** 2).sum(dim=0) / s2
    mu = x @ W / s2 / precision
    return x, log_p, mu, -precision.log()[None], lambda z: vae.log_gaussian(
        x.view(1, 1, 1, d_x), (z @ W.T)[..., None, None, :], s2)


def bound_is_exact_at_the_posterior(bound, seed, k):
    """q = p(z|x): every sample has the weight p(x), whatever z and k."""
    x, log_p, mu, logvar, log_px = linear_gaussian(seed)
    z = vae.reparameterise(mu, logvar, normal(seed + 2, k, 1, 2))
    assert_close(bound(log_px(z), z, mu, logvar), log_p, rtol=0,
                 atol=1000 * EPS * (1 + log_p.abs().max().item() + (z ** 2).max().item()))


@given(seeds(), st.integers(1, 20))
def test_the_bound_is_exact_at_the_posterior(seed, k):
    bound_is_exact_at_the_posterior(vae.iwae_bound, seed, k)


@pytest.mark.parametrize("twin", [
    lambda log_px, z, mu, logvar: vae.iwae_bound(log_px, z, mu, logvar) + math.log(len(z)),
    lambda log_px, z, mu, logvar: vae.iwae_bound(log_px, z, mu, -logvar),
    lambda log_px, z, mu, logvar: vae.iwae_bound(log_px, z, mu, 2 * logvar),
    lambda log_px, z, mu, logvar: vae.iwae_bound(log_px + (z ** 2).sum(-1), z, mu, logvar)])
def test_wrong_bounds_are_rejected(twin):
    assert rejected(bound_is_exact_at_the_posterior, twin, 0, 3)


@given(seeds())
def test_the_bound_is_a_bound_and_rises_with_k(seed):
    """For a q that is wrong: E bound(1) <= E bound(8) <= log p(x), within 6 standard errors."""
    x, log_p, mu, logvar, log_px = linear_gaussian(seed)
    mu, logvar = (mu + 0.3).expand(4000, 2), (logvar + 0.4).expand(4000, 2)
    means, errors = [], []
    for k in (1, 8):
        z = vae.reparameterise(mu, logvar, normal(seed + k, k, 4000, 2))
        bound = vae.iwae_bound(log_px(z), z, mu, logvar)
        means.append(bound.mean().item())
        errors.append(bound.std().item() / 4000 ** 0.5)
    assert means[0] <= means[1] + 6 * math.hypot(*errors)
    assert means[1] <= log_p.item() + 6 * errors[1]


@given(seeds())
def test_elbo_with_the_kl_in_closed_form_is_the_bound_of_one_sample_in_the_mean(seed):
    x, _, mu, logvar, log_px = linear_gaussian(seed)
    mu, logvar = (mu - 0.2).expand(4000, 2), (logvar + 0.1).expand(4000, 2)
    z = vae.reparameterise(mu, logvar, normal(seed + 2, 1, 4000, 2))
    difference = vae.iwae_bound(log_px(z), z, mu, logvar) \
        - (log_px(z)[0] - vae.kl_standard_normal(mu, logvar))
    assert abs(difference.mean().item()) <= 6 * difference.std().item() / 4000 ** 0.5


# --- reparameterisation and the networks -------------------------------------------------------

@given(seeds())
def test_samples_have_the_mean_and_the_variance_asked_for(seed):
    n = 20_000
    mu, logvar = gaussian(seed, 1, 1)
    z = vae.reparameterise(mu, logvar, normal(seed + 2, n, 1, 1)).flatten()
    std = math.exp(logvar.item() / 2)
    apart, times = (z.mean().item() - mu.item()) / std, z.var().item() / std ** 2
    assert abs(apart) <= 6 / n ** 0.5, f"their mean is {apart:.2f} σ from mu"
    assert abs(times - 1) <= 6 * (2 / n) ** 0.5, f"their variance is {times:.2f} times exp(logvar)"


@given(seeds(), sizes)
def test_gradients_flow_through_the_sample(seed, d):
    mu, logvar = (a.requires_grad_() for a in gaussian(seed, 2, d))
    u = normal(seed + 2, 2, d)
    assert torch.autograd.gradcheck(lambda m, v: vae.reparameterise(m, v, u), (mu, logvar))


@pytest.mark.parametrize("c, side", [(1, 28), (3, 32), (3, 64)])
def test_encoding_twice_differs_and_decoding_twice_does_not(c, side):
    torch.manual_seed(0)
    net = vae.VAE(c, side, 5).eval()
    x = torch.rand(4, c, side, side)
    mu, logvar = net.encode(x)
    assert mu.shape == logvar.shape == (4, 5)
    z, again = (vae.reparameterise(mu, logvar, torch.randn(2, 4, 5)) for _ in range(2))
    assert not torch.equal(z, again)
    logits = net.decode(z)
    assert logits.shape == (2, 4, c, side, side) and torch.equal(logits, net.decode(z))
    # float32 sums in another order
    assert_close(logits[1], net.decode(z[1]), rtol=1e-4, atol=1e-5)


@given(seeds())
def test_mirrored_pictures_are_themselves_or_their_mirror_image(seed):
    torch.manual_seed(seed)
    x = torch.rand(64, 3, 2, 5)
    mirrored = vae.mirrored(x)
    kept, turned = ((mirrored == a).flatten(1).all(dim=1) for a in (x, x.flip(3)))
    assert (kept ^ turned).all() and kept.any() and turned.any()  # all alike: 2 times in 2^64


# --- whole runs --------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def small_runs(monkeypatch, no_figures):
    monkeypatch.setattr(vae, "N_SAMPLES", 100)
    monkeypatch.setattr(vae, "N_TEST", 40)


def run(out, digits_dir, *flags):
    vae.main(["--data", "digits", "--data-dir", str(digits_dir), "--steps", "3", "--batch", "8",
              "--k-test", "3", "--out", str(out), *flags])
    return results(out)


def test_all_models_killed_in_the_middle_resume_to_the_same_bits(tmp_path, digits_dir, monkeypatch):
    monkeypatch.setattr(vae, "STUDY", 1.0)
    straight = run(tmp_path / "straight", digits_dir)
    assert sorted(straight) == ["log.csv", "samples.pt"]
    for death in (2, 4):
        with killed_after(death):
            run(tmp_path / "killed", digits_dir, "--resume")
    assert same(run(tmp_path / "killed", digits_dir, "--resume"), straight)


@pytest.mark.usefixtures("no_checkpoints")
def test_more_samples_tighten_the_printed_bound(tmp_path, digits_dir, capsys):
    """The mean of the bound grows with k (Burda et al. 2015, theorem 1): the NLL falls."""
    nll = []
    for k in ("1", "100"):
        run(tmp_path / k, digits_dir, "--models", "vae", "--k-test", k)
        nll.append(float(capsys.readouterr().out.splitlines()[-1].split()[3]))
    assert nll[1] < nll[0]


@pytest.mark.usefixtures("no_checkpoints")
def test_the_kept_weights_draw_the_samples(tmp_path, digits_dir):
    samples = run(tmp_path, digits_dir, "--models", "vae")["samples.pt"]
    torch.manual_seed(0)
    z = torch.randn(len(samples), 50)
    net = vae.VAE(1, 28, 50)
    net.load_state_dict(torch.load(tmp_path / "weights_vae.pt"))
    assert torch.equal(common.to_uint8(vae.generate(net.eval(), z)), samples)


@pytest.mark.usefixtures("no_checkpoints")
@pytest.mark.parametrize("k", ["1", "3"])
def test_the_bound_is_climbed(tmp_path, digits_dir, k):
    """30 steps: the loss, 28 * 28 log 2 = 543 nats for a decoder that knows nothing, falls."""
    run(tmp_path, digits_dir, "--models", "vae", "-k", k, "--steps", "30", "--batch", "32")
    losses = [float(row["loss"]) for row in csv.DictReader((tmp_path / "log.csv").open())]
    assert losses[0] > 400 and 0 < losses[-1] < 300


@pytest.mark.usefixtures("no_checkpoints")
def test_without_its_term_the_kl_is_free_to_grow(tmp_path, digits_dir):
    """With pixels of variance 1 the data says little: the KL falls with its term, else it rises."""
    run(tmp_path, digits_dir, "--models", "mid-sigma2", "no-kl", "--x-sigma2", "1",
        "--steps", str(round(30 / vae.STUDY)), "--batch", "32")
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    first, last = ({row["model"]: float(row["kl"]) for row in some} for some in
                   (reversed(rows), rows))
    assert last["mid-sigma2"] < first["mid-sigma2"] / 2 and last["no-kl"] > first["no-kl"]


@pytest.mark.usefixtures("no_checkpoints")
def test_the_study_climbs_the_loss_of_the_course_whatever_k_is(tmp_path, digits_dir):
    flags = ["--models", "mid-sigma2", "no-kl", "--steps", "9"]
    logs = [run(tmp_path / k, digits_dir, *flags, "-k", k) for k in ("1", "2")]
    assert same(*logs)


@pytest.mark.usefixtures("no_checkpoints")
def test_options_change_the_training_and_nothing_else(tmp_path, digits_dir):
    short = ["--models", "vae", "--steps", "2"]
    plain = run(tmp_path / "plain", digits_dir, *short)
    assert same(run(tmp_path / "again", digits_dir, *short), plain)
    for flags in (["-k", "3"], ["--likelihood", "gaussian"], ["--lr", "0.001"], ["--z-dim", "2"]):
        out = run(tmp_path / "".join(flags), digits_dir, *short, *flags)
        assert out.keys() == plain.keys() and not same(out, plain), flags
    gaussian = ["--likelihood", "gaussian"]
    assert not same(run(tmp_path / "s", digits_dir, *short, *gaussian, "--x-sigma2", "1"),
                    results(tmp_path / "--likelihoodgaussian"))


@pytest.mark.draws
def test_a_small_folder_of_colour_pictures_is_enough(tmp_path, digits_dir):
    folder = folder_of_pictures(tmp_path / "p", 12, 32)
    samples = run(tmp_path / "o", digits_dir, "--data", folder, "--size", "32")["samples.pt"]
    assert samples.shape == (100, 3, 32, 32)


@pytest.mark.usefixtures("no_checkpoints")
def test_the_table_says_how_many_pictures_were_measured(tmp_path, digits_dir, capsys):
    """A folder of 12 keeps one for tests, whatever the number that is asked for."""
    run(tmp_path / "o", digits_dir, "--data", folder_of_pictures(tmp_path / "p", 12, 32), "--size",
        "32", "--models", "vae", "no-kl")
    header, *rows = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert header[3] == "n" and [row[2] for row in rows] == ["1", "1"]


def test_a_loss_that_explodes_names_itself(tmp_path, digits_dir, monkeypatch, capsys):
    monkeypatch.setattr(vae, "log_bernoulli", lambda x, logits: logits.sum((-3, -2, -1)) * math.nan)
    one_line(capsys, lambda: run(tmp_path, digits_dir), "loss is nan at step 1", status=1)
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("flags, words", [
    (["--models", "gan"], ["--models", "gan"]),
    (["--x-sigma2", "0"], ["--x-sigma2", "0"]),
    (["-k", "0"], ["-k", "0"]), (["--batch", "1"], ["--batch 2 or more"]),
    (["--z-dim", "x"], ["--z-dim", "x"])])
def test_bad_flags_get_one_line(tmp_path, digits_dir, capsys, flags, words):
    one_line(capsys, lambda: run(tmp_path, digits_dir, *flags), *words)
