"""Whole runs of the chapters, a few steps long: what cannot be said of a function alone."""

import csv
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
from statistics import mean
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import common
from harness import all_white, folder_of_pictures, make_no_figures, one_line, results, same
from strategies import generator

vae = importlib.import_module("01_vae")
losses_02 = importlib.import_module("02_gan_losses")
unrolled = importlib.import_module("03_unrolled_gan")
inversion = importlib.import_module("04_inversion")
restoration = importlib.import_module("05_restoration")
wae = importlib.import_module("06_wae_moments")
critics = importlib.import_module("07_sn_wgan_gp")


# --- chapter 01 --------------------------------------------------------------------------------

@pytest.fixture
def run_01(tmp_path, digits_dir, monkeypatch, no_figures, no_checkpoints):
    """run_01(*flags): what a run of few steps leaves in tmp_path."""
    monkeypatch.setattr(vae, "N_SAMPLES", 100)
    monkeypatch.setattr(vae, "N_TEST", 40)

    def run(*flags):
        vae.main(["--data", "digits", "--data-dir", str(digits_dir), "--steps", "3", "--batch",
                  "8", "--k-test", "3", "--out", str(tmp_path), *flags])
        return results(tmp_path)
    return run


def log_01(out, model):
    """The rows of one model in the log."""
    with (out / "log.csv").open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["model"] == model]


def test_more_samples_tighten_the_printed_bound(run_01, capsys):
    """The mean of the bound grows with k (Burda et al. 2015, theorem 1): the NLL falls."""
    nll = []
    for k in ("1", "100"):
        run_01("--models", "vae", "--k-test", k)
        nll.append(float(capsys.readouterr().out.splitlines()[-1].split()[3]))
    assert nll[1] < nll[0]


@pytest.mark.parametrize("k", ["1", "3"])
def test_the_bound_is_maximised(run_01, tmp_path, k):
    """30 steps: the loss, 28 * 28 log 2 = 543 nats for a decoder that knows nothing, falls."""
    run_01("--models", "vae", "-k", k, "--steps", "30", "--batch", "32")
    losses = [float(row["loss"]) for row in log_01(tmp_path, "vae")]
    assert losses[0] > 400 and 0 < losses[-1] < 300


def test_without_its_term_the_kl_grows(run_01, tmp_path):
    """With pixels of variance 784 the data say little: the KL falls, or rises without its term."""
    run_01("--models", "mid-sigma2", "no-kl", "--x-sigma2", "1",
           "--steps", str(round(30 / 0.036)), "--batch", "32")
    kl = {name: [float(row["kl"]) for row in log_01(tmp_path, name)]
          for name in ("mid-sigma2", "no-kl")}
    assert kl["mid-sigma2"][-1] < kl["mid-sigma2"][0] / 2 and kl["no-kl"][-1] > kl["no-kl"][0]


def test_the_study_has_one_sample_of_z_whatever_k_is(run_01):
    flags = ["--models", "mid-sigma2", "no-kl", "--steps", "9"]
    logs = [run_01(*flags, "-k", k) for k in ("1", "2")]
    assert same(*logs)


def test_codes_of_two_dimensions_are_plotted_with_their_classes(run_01, monkeypatch):
    """Dots: mu, coloured by the label of the same picture; black: samples of the first q."""
    panels = []
    monkeypatch.setattr(common, "save_panels", lambda file, rows, *_, **__: panels.extend(
        rows[0][1] if file.name == "pictures.png" else []))
    monkeypatch.setattr(vae, "pictures", lambda *_: {})
    encoded = []
    encode = vae.VAE.encode
    monkeypatch.setattr(vae.VAE, "encode", lambda net, x: encoded.append(encode(net, x)) or
                        encoded[-1])
    run_01("--models", "vae", "--z-dim", "2")
    (title, plot), = panels
    mu, logvar = next(a for a in encoded[::-1] if len(a[0]) == 40)
    ax = Figure().subplots()
    plot(ax)
    dots, black = ax.collections
    assert "by class" in title and len({*dots.get_array().tolist()}) > 5
    assert torch.equal(torch.tensor(dots.get_offsets().data), mu.detach().double())
    off = (torch.tensor(black.get_offsets().data) - mu[0].detach()) / (logvar[0].detach() / 2).exp()
    assert len(off) == 200 and off.mean(dim=0).abs().max() < 6 / 200 ** 0.5  # six standard errors
    assert (off.std(dim=0) - 1).abs().max() < 6 / 400 ** 0.5


# --- chapter 02 --------------------------------------------------------------------------------

@pytest.fixture
def run_02(tmp_path, digits_dir, monkeypatch, no_figures, no_checkpoints):
    """run_02(*flags): what a run of few steps leaves in tmp_path."""
    small = dict(N_SAMPLES=200, HIDDEN_G=[60, 60], HIDDEN_D=[60, 60])
    for name, value in small.items():
        monkeypatch.setattr(losses_02, name, value)

    def run(*flags):
        losses_02.main(["--data", "digits", "--data-dir", str(digits_dir), "--steps", "6",
                        "--batch", "8", "--out", str(tmp_path), *flags])
        return results(tmp_path)
    return run


def log_02(out):
    with (out / "log.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name, steps", [("nonsaturating", "25"), ("ebgan", "120")])
def test_g_learns_what_the_data_look_like(run_02, monkeypatch, name, steps):
    """All data white: with the right signs G's pictures, grey (127) at first, become lighter."""
    all_white(monkeypatch)
    samples = run_02("--loss", name, "--steps", steps)[f"samples_{name}.pt"]
    assert samples.float().mean() > 138


def test_a_conditional_g_generates_what_it_is_told(run_02, monkeypatch):
    """Class 0 is black and class 1 is white; samples are asked for as 0, 1, 0, 1, ..."""
    y = torch.arange(70) % 2
    x = (255 * y).to(torch.uint8).view(70, 1, 1, 1).expand(70, 1, 28, 28)
    monkeypatch.setattr(common, "load_images",
                        lambda args, device, train=True: common.Images(x, y, "black and white"))
    samples = run_02("--loss", "cgan", "--steps", "60")["samples_cgan.pt"]
    assert samples[1::2].float().mean() > samples[0::2].float().mean() + 60


def test_the_kept_weights_of_a_gan_generate_its_samples(run_02, tmp_path, monkeypatch):
    """By the chapter's functions, and others by the lines of the README."""
    out = tmp_path / "out" / "02_gan_losses"
    monkeypatch.setattr(losses_02, "HIDDEN_G", [500, 500])  # the default of generator()
    run_02("--loss", "nonsaturating", "--out", str(out))
    samples = torch.load(out / "samples_nonsaturating.pt")
    torch.manual_seed(0)
    z, G = torch.randn(len(samples), 64), losses_02.generator(64, 1, 28)
    G.load_state_dict(torch.load(out / "weights_nonsaturating.pt"))
    assert torch.equal(common.to_uint8(losses_02.generate(G, z)), samples)

    monkeypatch.chdir(tmp_path)
    readme = Path(losses_02.__file__).with_name("README.md").read_text(encoding="utf-8")
    lines, = [block for block in re.findall(r"(?m)(?:^    .*\n)+", readme)
              if "weights_nonsaturating.pt" in block]
    names = {}
    exec(textwrap.dedent(lines), names)
    assert names["x"].shape == (16, 1, 28, 28) and names["x"].abs().max() <= 1
    assert (tmp_path / "new.png").stat().st_size > 0


def test_a_d_that_ends_in_a_sigmoid_is_named_once(run_02, tmp_path, monkeypatch, capsys):
    """It says 1 to dark pictures, the data, and 0 to grey fakes: probabilities, no logits."""
    build = losses_02.build

    def sure(*args):
        G, D = build(*args)
        D.forward = lambda x, y: ((x.mean((1, 2, 3)) < -0.4) + 0 * x.mean((1, 2, 3))
                                  + 0 * sum(p.sum() for p in D.parameters()), None)
        return G, D

    monkeypatch.setattr(losses_02, "build", sure)
    run_02("--loss", "nonsaturating")
    assert capsys.readouterr().out.count("a sigmoid applied twice") == 1
    last = log_02(tmp_path)[-1]
    assert float(last["D(x)"]) > 0.7 and float(last["D(G(z))"]) == 0.5  # σ(1), σ(0)


def test_a_mistake_is_made_in_the_losses_that_can_have_it(run_02, capsys):
    assert run_02("--break", "mse-sigmoid").keys() >= {"samples_lsgan.pt", "samples_lsgan-ahead.pt"}
    one_line(capsys, lambda: run_02("--break", "mse-sigmoid", "--loss", "lsgan", "minimax"),
             "--break mse-sigmoid is for lsgan, lsgan-ahead, not for minimax")
    one_line(capsys, lambda: run_02("--loss", "wgan", "--real-label", "0.9"), "not for wgan")
    one_line(capsys, lambda: run_02("--width-d", "8"), "--nets dense has no convolutions")
    for label in ("0", "1.1"):
        one_line(capsys, lambda: run_02("--real-label", label), "--real-label", label)


@pytest.mark.parametrize("flags", [
    ["--loss", "lsgan", "--d-steps", "3", "--g-steps", "2"],
    ["--loss", "minimax-ahead", "--steps", "30", "--g-steps", "2"]])  # 3 of D, a fifth of the steps
def test_steps_of_both_players_are_counted(run_02, monkeypatch, flags):
    """3 D steps and 2 G steps for each of 6 steps."""
    players, step = [], torch.optim.Adam.step

    def spy(opt, *args):
        players.append(len(opt.param_groups[0]["params"]))
        return step(opt, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    run_02(*flags)
    D, G = players[0], players[-1]
    assert D != G and players == 6 * ([D] * 3 + [G] * 2)


def test_the_learning_rate_of_g_falls_with_the_side(run_02, tmp_path, monkeypatch):
    """56 is twice 28: a quarter of the rate. Rates and eps are those of the method, first of D."""
    made, begin = [], torch.optim.Adam.__init__

    def spy(opt, params, lr, betas, eps=1e-8, **more):
        made.append((lr, eps))
        begin(opt, params, lr, betas, eps, **more)

    monkeypatch.setattr(torch.optim.Adam, "__init__", spy)
    run_02("--data", folder_of_pictures(tmp_path / "p", 12, 56), "--size", "56", "--nets", "fc",
           "--loss", "minimax-ahead", "--out", str(tmp_path / "out"))
    assert made == [pytest.approx((2e-3, 1e-8)), pytest.approx((4e-3 / 4, 3e-3))]


def test_r1_is_added_to_the_loss_of_d_with_half_its_weight(run_02, tmp_path, monkeypatch):
    monkeypatch.setattr(losses_02, "r1_penalty", lambda critic, x: torch.tensor(0.5))
    first = []
    for r1 in ("1", "3"):
        run_02("--loss", "nonsaturating", "--steps", "1", "--r1", r1)
        first.append(float(log_02(tmp_path)[0]["loss_d"]))
    assert first[1] - first[0] == pytest.approx((3 - 1) / 2 * 0.5, abs=1e-5)  # float32 near 2


def test_wgan_keeps_its_weights_in_the_box(run_02, monkeypatch):
    kept = []
    monkeypatch.setattr(common.Run, "save", lambda run: kept.append(run.state))
    run_02("--loss", "wgan", "--steps", "2")
    largest = max(p.abs().max().item() for p in kept[-1]["D"].parameters())
    assert largest == pytest.approx(losses_02.CLIP)


@pytest.mark.parametrize("name", ["wgan-gp", "infogan"])
def test_memory_does_not_grow_with_the_steps_of_a_gan(run_02, tensors_alive, monkeypatch, name):
    """create_graph keeps graphs alive in cycles if several terms are differentiated apart."""
    monkeypatch.setattr(common.Run, "snapshot", lambda run, x: None)  # it keeps pictures
    run_02("--loss", name)
    assert len(tensors_alive) >= 6 and max(tensors_alive[3:]) <= tensors_alive[2]


# --- chapter 03 --------------------------------------------------------------------------------

def run_03(out, *flags):
    unrolled.main(["--quick", "--steps", "12", "-k", "0", "2", "--out", str(out), *flags])
    return results(out / "quick")


@pytest.fixture(scope="module")
def straight_03(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        make_no_figures(patch)
        return run_03(tmp_path_factory.mktemp("straight"))


@pytest.mark.usefixtures("no_figures")
def test_same_seed_same_numbers_other_seed_others(tmp_path, straight_03):
    assert same(run_03(tmp_path / "a"), straight_03)
    assert not same(run_03(tmp_path / "b", "--seed", "1"), straight_03)


@pytest.mark.usefixtures("no_figures", "no_checkpoints")
@pytest.mark.parametrize("flags", [["--method", "rollback"], ["--eta", "0.2"]])
def test_what_concerns_unrolling_changes_the_unrolled_gan_alone(tmp_path, straight_03, flags):
    other = run_03(tmp_path, *flags)
    assert torch.equal(other["samples_k0_beta0.7.pt"], straight_03["samples_k0_beta0.7.pt"])
    assert not torch.equal(other["samples_k2_beta0.7.pt"], straight_03["samples_k2_beta0.7.pt"])


@pytest.mark.usefixtures("no_figures", "no_checkpoints")
def test_momentum_is_a_setting_of_each_model(tmp_path, straight_03):
    """One for all models, or one for each; the networks and the data are the same."""
    other = run_03(tmp_path, "--beta1", "0.7", "0")
    assert torch.equal(other["samples_k0_beta0.7.pt"], straight_03["samples_k0_beta0.7.pt"])
    assert not torch.equal(other["samples_k2_beta0.pt"], straight_03["samples_k2_beta0.7.pt"])
    assert unrolled.parse_args([]).k == [0, 0, 5] and unrolled.parse_args(["-k", "5"]).k == [5]
    assert unrolled.parse_args(["--beta1", "0"]).beta1 == [0.0, 0.0]


@pytest.mark.usefixtures("no_figures", "no_checkpoints")
def test_momentum_reaches_both_optimisers(tmp_path, monkeypatch):
    betas, start = [], torch.optim.Adam.__init__
    monkeypatch.setattr(torch.optim.Adam, "__init__", lambda opt, params, betas_=None, **more: (
        betas.append(more["betas"]), start(opt, params, **more))[1])
    run_03(tmp_path, "--steps", "1", "-k", "0", "0", "--beta1", "0.25", "0")
    assert betas == 2 * [(0.25, 0.999)] + 2 * [(0.0, 0.999)]


@pytest.mark.usefixtures("no_figures", "no_checkpoints")
def test_steps_of_both_players_of_03_are_counted(tmp_path, monkeypatch):
    """2 G steps and 3 D steps for each of 12 steps, for both k."""
    steps, original = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda opt, *a: (
        steps.append(sum(p.numel() for g in opt.param_groups for p in g["params"])),
        original(opt, *a))[1])
    run_03(tmp_path, "--g-steps", "2", "--d-steps", "3")
    of_g, of_d = (sum(p.numel() for p in net.parameters()) for net in unrolled.plane_nets(4))
    assert steps == 2 * 12 * ([of_g] * 2 + [of_d] * 3)


@pytest.mark.usefixtures("no_figures", "no_checkpoints")
def test_memory_does_not_grow_with_the_unrolled_steps(tmp_path, tensors_alive, monkeypatch):
    """Each G step keeps the graphs of k steps of D, and drops them."""
    monkeypatch.setattr(unrolled, "snapshot", lambda samples, D, data: {})
    for name in ("plot_process", "save_animation"):
        monkeypatch.setattr(unrolled, name, lambda run, args, data: None)
    run_03(tmp_path, "-k", "2")
    assert len(tensors_alive) == 12 and max(tensors_alive[8:]) <= tensors_alive[7]


@pytest.mark.usefixtures("no_figures", "no_checkpoints")
def test_g_of_03_goes_where_the_data_are(tmp_path, monkeypatch):
    """All data at (2, 0): with the right signs both G's points, around 0 at first, go there."""
    monkeypatch.setattr(unrolled, "gaussian_mixture",
                        lambda centres, std, n: centres[:1].expand(n, 2))
    for samples in (part for name, part in run_03(tmp_path, "--steps", "100").items()
                    if "k" in name):
        assert samples[:, 0].mean() > 1 and samples[:, 1].mean().abs() < 0.5


@pytest.mark.usefixtures("no_figures", "no_checkpoints")
def test_the_readme_shows_what_03_prints_and_the_same_numbers_twice(tmp_path, capsys):
    readme = Path(common.__file__).with_name("README.md").read_text(encoding="utf-8")
    shown = re.split(r"The chapter\s+ends with", readme)[1].split("\n\n")[1].split("\n")
    unrolled.main(["--steps", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out.splitlines()[-4:]
    table = readme.partition("### 03: the unrolled GAN")[2]
    assert printed[0].split() == shown[0].split()
    for line, own in zip(shown[1:], printed[1:], strict=True):
        name, (modes, good, kl) = line.strip().split("  ")[0], line.split()[-3:]
        assert own.strip().startswith(name)
        row = re.search(rf"^\| {re.escape(name)} \|.*", table, re.MULTILINE)[0]
        cells = row.split(" | ")
        assert cells[1:3] == [modes, f"{100 * float(good):.1f} %"]
        told = cells[3].split()[0]  # one digit, or "-" if no mode is covered
        assert told == kl or float(told) == pytest.approx(float(kl), rel=0.15)


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


@pytest.mark.usefixtures("no_figures")
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.beside(run=killed_and_interrupted)
def test_a_process_that_is_killed_or_interrupted_resumes_to_the_same_bits(tmp_path, beside):
    straight = run_03(tmp_path, *LONG)
    for (out, status, error), expected in zip(beside, (-signal.SIGKILL, 130)):
        assert status == expected and "Traceback" not in error
        assert same(run_03(out, *LONG), straight)


@pytest.mark.usefixtures("no_figures", "no_checkpoints")
def test_pictures_are_the_second_branch_of_03(tmp_path, digits_dir):
    unrolled.main(["--quick", "--data", "digits", "--data-dir", str(digits_dir), "--steps", "2",
                   "-k", "1", "--batch", "16", "--out", str(tmp_path)])
    samples = results(tmp_path / "quick")["samples_k1_beta0.pt"]
    assert samples.shape == (1000, 1, 28, 28) and samples.dtype == torch.uint8


def test_a_run_whose_terminal_is_closed_ends_quietly_and_resumes(tmp_path):
    """In the background of a terminal: each write then fails with EIO."""
    pty = pytest.importorskip("pty")
    command = [sys.executable, unrolled.__file__, "--quick", "-k", "0", "--steps", "400",
               "--out", str(tmp_path)]
    ours, theirs = pty.openpty()
    run = subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE, start_new_session=True)
    os.close(theirs)
    while b"step 80/400" not in os.read(ours, 65536):
        pass
    os.close(ours)
    assert run.communicate(timeout=60)[1] == b"" and run.returncode == 141
    assert torch.load(tmp_path / "quick" / "checkpoint.pt")["step"] < 400
    again = subprocess.run([*command, "--resume"], capture_output=True, timeout=60)
    assert (again.returncode, again.stderr) == (0, b"") and b"continuing after step" in again.stdout


# --- chapter 04 ---------------------------------------------------------------------------------

@pytest.fixture
def small_04(monkeypatch, no_figures, no_checkpoints):
    for name, value in (("N_SAMPLES", 100), ("N_SELF", 3), ("N_TEST", 5), ("CHUNK", 4)):
        monkeypatch.setattr(inversion, name, value)


def run_04(out, digits_dir, *flags):
    inversion.main(["--data", "digits", "--data-dir", str(digits_dir), "--steps", "5", "--batch",
                    "8", "--encoder-steps", "4", "--starts", "2", "--invert-steps", "3",
                    "--out", str(out), *flags])
    return results(out)


@pytest.mark.usefixtures("small_04")
def test_the_saved_g_of_04_gives_the_same_numbers_again(tmp_path, digits_dir, monkeypatch):
    found = []
    monkeypatch.setattr(inversion, "figures", lambda args, name, G, cases, results, samples: (
        found.append({(label, method, key): numbers[key] for label, methods in results.items()
                      for method, numbers in methods.items() for key in ("z", "errors")})))
    fresh = run_04(tmp_path, digits_dir)
    for name in ("train_generator", "train_encoder"):
        monkeypatch.setattr(inversion, name, lambda *args: pytest.fail("trained again"))
    assert same(run_04(tmp_path, digits_dir), fresh) and same(*found)
    run_04(tmp_path, digits_dir, "--starts", "1")  # says nothing about the generator


@pytest.mark.usefixtures("small_04")
def test_no_random_start_is_the_answer(tmp_path, digits_dir, monkeypatch):
    """The z of G's own pictures and the starts differ, though both are of one seed. The hybrid
    makes as many steps as both random starts together, the encoder none."""
    answers, calls, measure, invert = [], [], inversion.measure, inversion.invert
    monkeypatch.setattr(inversion, "measure", lambda x, x_rec, z, z_true, y: (
        answers.append(z_true) or measure(x, x_rec, z, z_true, y)))
    monkeypatch.setattr(inversion, "invert", lambda G, x, z0, steps, lr: (
        calls.append((z0, steps, lr)) or invert(G, x, z0, steps, lr)))
    run_04(tmp_path, digits_dir, "--invert-lr", "0.01")
    assert answers[0].shape == (3, 128) and answers[-1] is None
    starts = torch.cat([z0.flatten(0, 1) for z0, *_ in calls])
    assert torch.cdist(starts, answers[0]).min() > 1  # unrelated samples: √(2 · 128) = 16
    assert {(z0.shape[1], *more) for z0, *more in calls} == {(2, 3, 0.01), (1, 0, 0.01),
                                                             (1, 6, 0.01)}


@pytest.mark.usefixtures("small_04")
def test_the_generator_stays_as_it_is_while_the_encoder_learns(tmp_path, digits_dir):
    """Not even the statistics of its batch norms move: the samples are the same."""
    one, many = (run_04(tmp_path / n, digits_dir, "--encoder-steps", n) for n in "19")
    assert torch.equal(one["samples.pt"], many["samples.pt"])


@pytest.mark.usefixtures("small_04")
def test_g_of_04_learns_what_the_data_look_like(tmp_path, digits_dir, monkeypatch):
    """All data white: with the right signs G's pictures, grey at the start, become lighter."""
    all_white(monkeypatch)
    load = common.load_images
    monkeypatch.setattr(common, "load_images", lambda args, *rest, **more: (
        setattr(args, "training_pictures", "white") or load(args, *rest, **more)))
    assert run_04(tmp_path, digits_dir, "--steps", "40")["samples.pt"].float().mean() > 160


# --- chapter 05 ---------------------------------------------------------------------------------

@pytest.fixture
def small_05(monkeypatch, no_figures, no_checkpoints):
    for name, value in (("N_SAMPLES", 100), ("N_TEST", 4), ("N_NOISE", 2), ("CHUNK", 4)):
        monkeypatch.setattr(restoration, name, value)


def run_05(out, digits_dir, *flags):
    restoration.main(["--data", "digits", "--data-dir", str(digits_dir), "--steps", "5", "--batch",
                      "8", "--restore-steps", "3", "--out", str(out), *flags])
    return results(out)


@pytest.mark.usefixtures("small_05", "small_04")
def test_the_generator_of_04_fits_05_and_other_generators_are_refused(tmp_path, digits_dir, capsys):
    samples = run_04(tmp_path / "04", digits_dir)["samples.pt"]
    asked = ["--generator", str(tmp_path / "04/generator.pt")]
    assert same(run_05(tmp_path / "05", digits_dir, *asked), {"samples.pt": samples})
    capsys.readouterr()
    one_line(capsys, lambda: run_05(tmp_path / "05", digits_dir, *asked, "--z-dim", "9"),
             "generator.pt", "z_dim 128", "has 9")


@pytest.mark.usefixtures("small_05")
def test_the_variance_of_the_noise_is_added_to_lambda(tmp_path, digits_dir, monkeypatch):
    calls, restore = [], restoration.restore
    monkeypatch.setattr(restoration, "restore", lambda G, y, mask, z0, steps, lr, lam: (
        calls.append((z0.shape[1], steps, lr, lam)) or restore(G, y, mask, z0, steps, lr, lam)))
    run_05(tmp_path, digits_dir, "--starts", "3", "--restore-lr", "0.01", "--lam", "9")
    assert set(calls) == {(3, 3, 0.01, 9 + (level / 10) ** 2) for level in range(11)}


def test_one_start_is_z_0_and_others_are_random(tmp_path, digits_dir, monkeypatch):
    starts, restore = [], restoration.restore
    monkeypatch.setattr(restoration, "restore", lambda G, y, mask, z0, *rest: (
        starts.append(z0) or restore(G, y, mask, z0, *rest)))
    run_05(tmp_path, digits_dir, "--starts", "3")
    z0 = torch.cat(starts)
    assert (z0[:, 0] == 0).all() and z0[:, 1:].std() == pytest.approx(1, abs=0.05)


def half_is_hidden(monkeypatch, restore_in_parts):
    """What restore_damage() makes of pictures that are -0.5, with their upper half hidden."""
    monkeypatch.setattr(restoration, "restore_in_parts", restore_in_parts)
    x, half = torch.full((3, 1, 4, 4), -0.5), torch.ones(3, 1, 4, 4)
    half[:, :, :2] = 0
    return x, half, restoration.restore_damage(SimpleNamespace(seed=0, lam=1), None, x, {
        "half": lambda n, side, rng: half})["half"]


def test_what_was_seen_stays_and_blind_does_not_know_the_mask(monkeypatch):
    """A G that generates 7 everywhere: the known mask pastes it into the holes, blind over all."""
    asked = []
    x, mask, found = half_is_hidden(monkeypatch, lambda args, G, y, mask, lam, label: (
        asked.append((y, mask)) or torch.full_like(y, 7)))
    pictures, black = found["pictures"], torch.where(mask == 1, x, -1.0)
    assert torch.equal(pictures["known mask"], torch.where(mask == 1, x, 7.0))
    assert (pictures["blind"] == 7).all() and all(torch.equal(y, black) for y, _ in asked)
    assert asked[0][1].all() and torch.equal(asked[1][1], mask)


def test_the_first_table_is_of_hidden_pixels_alone(monkeypatch):
    """Half of x is hidden and made 0.5 too dark: 10 log10(4 / 0.25) dB there, 3 dB more in all."""
    *_, numbers = half_is_hidden(monkeypatch, lambda args, G, y, mask, *rest: y)
    assert numbers["hidden"] == 0.5
    assert numbers["psnr hidden"]["known mask"] == pytest.approx(10 * math.log10(4 / 0.25))
    assert numbers["psnr all"]["known mask"] == pytest.approx(10 * math.log10(8 / 0.25))


@pytest.mark.usefixtures("small_05")
@pytest.mark.parametrize("flags, words", [
    (["--image", "none.png"], "none.png"), (["--mask", "none.png"], "none.png"),
    (["--mask", "large.png"], "a mask is 28x28")])
def test_a_wrong_picture_is_refused_before_the_training(tmp_path, digits_dir, capsys, monkeypatch,
                                                        flags, words):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (99, 28)).save("large.png")
    monkeypatch.setattr(restoration, "train_generator", lambda *args: pytest.fail("trained"))
    one_line(capsys, lambda: run_05(tmp_path / "05", digits_dir, *flags), words)


# --- chapter 06 --------------------------------------------------------------------------------

@pytest.fixture
def run_06(tmp_path, digits_dir, monkeypatch, no_figures, no_checkpoints):
    """run_06(*flags): what a run of few steps leaves in tmp_path."""
    monkeypatch.setattr(wae, "N_SAMPLES", 100)
    monkeypatch.setattr(wae, "N_CODES", 50)

    def run(*flags):
        wae.main(["--data", "digits", "--data-dir", str(digits_dir), "--steps", "4", "--batch",
                  "8", "--out", str(tmp_path), *flags])
        return results(tmp_path)
    return run


def test_training_brings_the_codes_nearer_to_the_prior(run_06, tmp_path, monkeypatch):
    """30 steps with λ = 2: the penalty falls to a third or less for both, from 0.5 and more."""
    monkeypatch.setattr(wae, "weight", lambda step, steps: 2.0)
    run_06("--models", "moments", "mmd", "--steps", "30", "--batch", "64")
    rows = list(csv.DictReader((tmp_path / "log.csv").open(encoding="utf-8")))
    for name in ("moments", "mmd"):
        penalties = [float(row["penalty"]) for row in rows if row["model"] == name]
        assert mean(penalties[-5:]) < mean(penalties[:2]) / 3, name


def test_the_plain_autoencoder_ignores_the_penalty(run_06, monkeypatch):
    """λ a thousand times larger changes the other two alone."""
    plain, weight = run_06(), wae.weight
    monkeypatch.setattr(wae, "weight", lambda step, steps: 1000 * weight(step, steps))
    heavy = run_06()
    changed = {name for name in plain if name != "log.csv"
               and not torch.equal(plain[name], heavy[name])}
    assert changed == {"samples_moments.pt", "samples_mmd.pt"}


def test_the_kept_weights_generate_the_samples_of_06(run_06, tmp_path):
    samples = run_06("--models", "mmd")["samples_mmd.pt"]
    torch.manual_seed(0)
    z = torch.randn(len(samples), 8)
    net = wae.Autoencoder(1, 28, 8)
    net.load_state_dict(torch.load(tmp_path / "weights_mmd.pt"))
    assert torch.equal(common.to_uint8(wae.in_parts(net.eval().decode, z)), samples)


# --- chapter 07 --------------------------------------------------------------------------------

def run_07(out, data_dir, *flags, n_samples=140):
    """4 steps, a classifier of 20, and scores of a few samples instead of thousands."""
    def few(argv, parse_args=critics.parse_args):
        args = parse_args(argv)
        args.n_samples, args.n_score, args.classifier_steps = n_samples, 80, 20
        return args

    with mock.patch.object(critics, "parse_args", few):
        critics.main(["--data", "digits", "--data-dir", str(data_dir), "--steps", "4", "--batch",
                      "8", "--out", str(out), *map(str, flags)])


@pytest.fixture
def small_07(monkeypatch, no_figures, no_checkpoints):
    """Neither figures nor checkpoints."""


@pytest.mark.usefixtures("small_07")
@pytest.mark.parametrize("flags, lr_d, lr_g", [
    ([], 3e-4, 3e-3 / 4), (["--lr-d", "1e-4", "--lr-g", "2e-4"], 1e-4, 2e-4)])
def test_steps_of_both_players_of_07_are_counted_for_each_n_critic(tmp_path, monkeypatch, flags,
                                                                   lr_d, lr_g):
    """4 steps of each are with n_critic 3 two rounds of 3 D steps and one of G.

    Learning rates are those of the table, that of G smaller for a side of 56, or as they are given.
    """
    steps, step = [], torch.optim.Adam.step

    def count(opt, *args):
        group, = opt.param_groups
        steps.append((group["initial_lr"], group["betas"]))
        return step(opt, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", count)
    run_07(tmp_path / "out", tmp_path, "--data", folder_of_pictures(tmp_path / "p", 12, 56),
           "--size", "56", "--models", "sn", "--n-critic", "1", "3", *flags)
    d, g = (lr_d, (0.0, 0.999)), (lr_g, (0.0, 0.999))
    assert steps == 4 * [d, g] + 2 * [d, d, d, g]


@pytest.mark.usefixtures("small_07")
def test_g_of_07_learns_what_the_data_look_like(tmp_path, digits_dir, monkeypatch):
    """All data white: with the right signs G's pictures, grey at the start, become lighter."""
    all_white(monkeypatch)
    run_07(tmp_path, digits_dir, "--models", "sn", "--steps", "30")
    assert torch.load(tmp_path / "samples_sn.pt").float().mean() > 160


@pytest.mark.usefixtures("small_07")
@pytest.mark.parametrize("flags, limit", [([], 0.03), (["--clip", "0.01"], 0.01)])
def test_wgan_alone_is_clipped_and_sn_alone_is_normalised(tmp_path, digits_dir, monkeypatch, flags,
                                                          limit):
    made, original = [], critics.discriminator
    monkeypatch.setattr(critics, "discriminator", lambda *args: (
        made.append(original(*args)), made[-1])[1])
    run_07(tmp_path, digits_dir, "--steps", "1", "--models", *critics.MODELS, *flags)
    for name, D in zip(critics.MODELS, made, strict=True):
        largest = max(p.abs().max().item() for p in D.parameters())
        assert largest == pytest.approx(limit) if name == "wgan" else largest > 0.031
        assert hasattr(D[1], "parametrizations") == (name in ("sn", "wgan-sn"))


def test_clip_without_wgan_is_refused(capsys):
    one_line(capsys, lambda: critics.main(["--clip", "0.01", "--models", "sn"]), "--clip", "wgan")


@pytest.mark.usefixtures("small_07")
def test_memory_of_07_does_not_grow_with_the_steps(tmp_path, digits_dir, tensors_alive,
                                                   monkeypatch):
    """create_graph keeps graphs alive in cycles if several terms are differentiated apart."""
    monkeypatch.setattr(common.Run, "snapshot", lambda run, x: None)  # it keeps pictures
    monkeypatch.setattr(critics, "quick_score", lambda *_: {})
    run_07(tmp_path, digits_dir, "--models", "wgan-gp", "--steps", "8")
    assert len(tensors_alive) == 8 and max(tensors_alive[3:]) <= tensors_alive[2]


def rows_07(capsys):
    """The rows of the tables that were printed: the cells by the first of them."""
    lines = capsys.readouterr().out.splitlines()
    return {label: cells for label, *cells in (re.split(r"  +", line.strip()) for line in lines)}


@pytest.mark.usefixtures("small_07")
def test_scoring_twice_gives_the_same_table_and_leaves_a_checkpoint_alone(tmp_path, digits_dir,
                                                                          capsys):
    """So a training run that was interrupted can still be continued."""
    torch.save(torch.zeros(80, 1, 28, 28).byte(), tmp_path / "black.pt")
    (tmp_path / "checkpoint.pt").write_text("of a training run", encoding="utf-8")
    tables = []
    for _ in range(2):
        run_07(tmp_path, digits_dir, "--score", tmp_path / "black.pt")
        tables.append(rows_07(capsys))
    assert list(tables[0])[-3:] == [str(tmp_path / "black.pt"), "real training pictures", "noise"]
    assert all(tables[0][label] == tables[1][label] for label in list(tables[0])[-3:])
    assert (tmp_path / "checkpoint.pt").read_text(encoding="utf-8") == "of a training run"


@pytest.mark.usefixtures("small_07")
def test_the_scale_is_calibrated(tmp_path, digits_dir, capsys):
    """Real pictures score near 0, noise far away; copies of the data have the distance 0."""
    real = torch.load(next(digits_dir.glob("*digits.pt")))[1][0]
    copies, mirrored = (str(tmp_path / f"{name}.pt") for name in ("copies", "mirrored"))
    torch.save(real[:300].flip(3), mirrored)
    torch.save(real[:300], copies)
    run_07(tmp_path, digits_dir, "--score", mirrored, copies)
    found = rows_07(capsys)
    assert list(found)[-4:] == [copies, mirrored, "real training pictures", "noise"]  # best first
    fid = {label: float(cells[1]) for label, cells in list(found.items())[-4:]}
    assert max(fid[copies], fid["real training pictures"]) < fid[mirrored] / 5
    assert fid[mirrored] < fid["noise"]
    assert found[copies][0] == "300" and float(found[copies][6]) < 1e-3


@pytest.mark.usefixtures("small_07")
def test_score_names_a_file_that_cannot_be_scored_and_goes_on(tmp_path, digits_dir, capsys):
    black = torch.zeros(100, 1, 28, 28)
    for name, content in {"dict": {"x": 1}, "few": black[:64].byte(), "float": black,
                          "ring": torch.randn(300, 2), "black": black.byte(),
                          "colour": torch.zeros(100, 3, 28, 28).byte(),
                          "paths": torch.zeros(4, 3, 1, 28, 28).byte()}.items():
        torch.save(content, tmp_path / f"{name}.pt")
    (tmp_path / "text.pt").write_text("hello", encoding="utf-8")
    flags = [tmp_path / "out", digits_dir, "--score"]
    run_07(*flags, tmp_path / "none.pt", tmp_path / "*.pt")  # * as cmd.exe gives it
    shown = capsys.readouterr().out
    for told in ("dict.pt holds no tensor", "none.pt holds no tensor (FileNotFoundError)",
                 "text.pt holds no tensor", "ring.pt holds torch.float32 [300, 2]",
                 "float.pt holds torch.float32 [100, 1, 28, 28], not torch.uint8 [N, 1, 28, 28]",
                 "colour.pt holds torch.uint8 [100, 3, 28, 28]", "paths.pt holds torch.uint8 [4,"):
        assert told in shown
    assert re.search(r"black.pt +100 +\d", shown)
    assert re.search(r"few.pt +64 +- +\S+ +\S+ +1 ", shown)
    one_line(capsys, lambda: run_07(*flags, tmp_path / "text.pt"), "no file is left")


@pytest.fixture
def colour_07(monkeypatch):
    """4,200 pictures of noise in colour, which are enough for Inception, but not its weights."""
    noise = torch.randint(256, (4200, 3, 4, 4), dtype=torch.uint8, generator=generator(0))
    monkeypatch.setattr(common, "load_images", lambda args, device, train=True: common.Images(
        noise if train else noise[:99], None, "faces"))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url",
                        mock.Mock(side_effect=OSError("no network")))
    return noise


@pytest.mark.usefixtures("small_07", "colour_07")
def test_colour_without_inception_trains_without_scores_and_says_so(tmp_path, capsys):
    flags = [tmp_path, tmp_path, "--models", "wgan-sn"]
    run_07(*flags)
    shown = capsys.readouterr().out
    assert "inception_v3_google" in shown and not re.search("FID|IS", shown)
    assert torch.load(tmp_path / "samples_wgan-sn.pt").shape == (140, 3, 4, 4)
    one_line(capsys, lambda: run_07(*flags, "--score", "a.pt"), "inception_v3_google")


def inception_07(monkeypatch, features):
    """A small network with that many features in Inception's place."""
    monkeypatch.setattr(critics, "inception", lambda weights: nn.Sequential(
        nn.Flatten(), nn.Linear(48, features), nn.Linear(features, 10)))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: {})


def test_colour_is_scored_when_the_weights_are_there(tmp_path, capsys, monkeypatch, colour_07):
    """The pictures of a perfect score are not those of the reference."""
    inception_07(monkeypatch, features=16)
    run_07(tmp_path, tmp_path, "--models", "sn", n_samples=2049)
    shown = capsys.readouterr().out
    assert "Inception FID" in shown and "real training pictures" in shown
    assert not re.search("truncated|KL|no FID", shown)
    monkeypatch.setattr(critics, "N_SAMPLES", 50)  # of 4,200; distances are to the first
    metric = critics.make_metric(mock.Mock(device="cpu"), SimpleNamespace(n_samples=50, data=""),
                                 *(common.Images(x, None, "") for x in (colour_07, colour_07[:99])))
    assert torch.equal(metric.real, colour_07[-50:])
    assert torch.equal(metric.reference,
                       critics.features_and_probs(metric.net, colour_07[:50])[0])


@pytest.mark.usefixtures("small_07")
def test_few_colour_pictures_have_all_scores_but_an_fid(tmp_path, capsys, monkeypatch, colour_07):
    inception_07(monkeypatch, features=2048)
    faces = common.Images(colour_07[:530], None, "faces")
    monkeypatch.setattr(common, "load_images", lambda args, device, train=True: faces)
    run_07(tmp_path, tmp_path, "--models", "sn")
    shown = capsys.readouterr().out
    assert "no FID: it needs 2,049 test pictures" in shown
    head, row = (re.split(r"  +", line) for line in shown.splitlines()[-4:-2])
    assert head == ["faces", "n", "Inception KID", "recall", "Inception IS", "distance", "slope"]
    assert row[1] == "140" and 0 <= float(row[3]) <= 1 <= float(row[4]) <= 10
