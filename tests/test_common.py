"""common.py: data in, pictures and files out, one line for every mistake."""

import argparse
import contextlib
import csv
import errno
import importlib
import io
import math
import ntpath
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image
from torch import nn
from torch.testing import assert_close
from torchvision.transforms.functional import pil_to_tensor

import common
from harness import killed_after, one_line, rejected
from strategies import generator, seeds

unrolled = importlib.import_module("03_unrolled_gan")


def arguments(tmp_path, *flags):
    """The flags of chapter 03 with everything under tmp_path."""
    folders = ["--out", tmp_path / "out", "--data-dir", tmp_path / "data"]
    return unrolled.parse_args([str(flag) for flag in [*folders, *flags]])


def start(args):
    """A run that does nothing: makes the output folder."""
    with common.Run(args):
        pass


def write_mnist(root, n=20):
    """A tiny MNIST: n random pictures in the four idx files, labels 0, 1, ..."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        pixels = torch.randint(256, (n, 28, 28), dtype=torch.uint8, generator=generator(0))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, n, 28, 28) + bytes(pixels.flatten().tolist()))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 2049, n) + bytes(i % 10 for i in range(n)))
    return pixels


def write_folder(folder, n=12, size=(30, 40), mode="RGB"):
    """n one-coloured pictures; number i has the grey value 20 * i."""
    (folder / "deep").mkdir(parents=True)
    for i in range(n):
        colour = 20 * i if mode == "L" else (20 * i,) * 3
        Image.new(mode, size, colour).save(folder / "deep" / f"{i:02d}.png")


# --- mixtures ----------------------------------------------------------------------------------

def has_distinct_equal_centres(centres, m):
    """m centres on one circle, each as far from its nearest as a regular polygon's corners."""
    gaps = torch.cdist(centres, centres) + 9 * torch.eye(len(centres))
    radius = centres.norm(dim=1)
    chord = 2 * radius.mean() * math.sin(math.pi / m)
    return (len(centres) == m and torch.allclose(radius, radius[0].expand(m), rtol=1e-5)
            and torch.allclose(gaps.amin(1), chord.expand(m), rtol=1e-4))


@given(st.integers(3, 40))
def test_ring_has_m_distinct_equally_spaced_centres(m):
    assert has_distinct_equal_centres(common.ring(m), m)


@given(st.integers(3, 40))
def test_a_ring_whose_ends_meet_is_rejected(m):
    """The slip of the authors' notebook: linspace(0, 2π, m) gives m - 1 modes, one double."""
    angle = torch.linspace(0, 2 * math.pi, m)
    twin = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
    assert not has_distinct_equal_centres(twin, m)


def test_grid_is_centred_and_spaced_by_two():
    line = (-4, -2, 0, 2, 4)
    assert sorted(common.grid().tolist()) == [[x, y] for x in line for y in line]


@given(seeds())
def test_mixture_weights_are_equal_and_spread_is_std(seed):
    torch.manual_seed(seed)
    centres, n, std = common.ring(), 8000, 0.02
    x = common.gaussian_mixture(centres, std, n)
    distance, nearest = torch.cdist(x, centres).min(dim=1)
    counts = torch.bincount(nearest, minlength=8)
    # counts are binomial(n, 1/8); six standard deviations
    assert (counts - n / 8).abs().max() < 6 * math.sqrt(n * (1 / 8) * (7 / 8))
    # sum of distance² / std² is chi squared with 2n degrees: mean 2n, variance 4n
    assert abs((distance / std).pow(2).sum().item() - 2 * n) < 6 * math.sqrt(4 * n)


# --- pictures ----------------------------------------------------------------------------------

def test_scaling_round_trips_every_byte():
    x = torch.arange(256, dtype=torch.uint8)
    y = common.to_float(x)
    assert y.dtype == torch.float32 and y.min() == -1 and y.max() == 1
    assert torch.equal(common.to_uint8(y), x)
    assert torch.equal(common.to_uint8(torch.tensor([-3.0, 3.0])), torch.tensor([0, 255]).byte())


@pytest.mark.parametrize("steps", [2, 10, 1000])
def test_a_fading_rate_is_constant_for_half_and_ends_at_zero(steps):
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    rate, seen = common.fading(opt, steps), []
    for _ in range(steps):
        seen.append(opt.param_groups[0]["lr"])
        opt.step()
        rate.step()
    assert set(seen[:steps // 2 + 1]) == {0.3} and opt.param_groups[0]["lr"] == 0
    second = torch.tensor([*seen[steps // 2:], 0.0], dtype=torch.float64)
    assert second.diff().std(correction=0) < 1e-15 and (second.diff() < 0).all()


def test_an_average_of_weights_is_the_weighted_sum_of_all():
    """Σ (1 - d) d^(n - i) w_i, the first one with all the weight that is left; d = e^-1."""
    net = nn.Linear(1, 1).requires_grad_(False)
    average, weights = common.average_of(net, 4), []
    for _ in range(6):
        net.weight.fill_(torch.randn(()))
        weights.append(net.weight.item())
        average.update_parameters(net)
    d = math.exp(-1)
    share = [d ** 5] + [(1 - d) * d ** (5 - i) for i in range(1, 6)]
    assert average.module.weight.item() == pytest.approx(
        sum(s * w for s, w in zip(share, weights)), abs=1e-6)


def test_settled_batch_norms_have_the_statistics_of_the_maps():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = common.average_of(net, 10)
    average.update_parameters(net)
    z = 5 + torch.randn(2000, 3)  # two parts of 1000: means of means and of variances
    common.settle(average, z)
    maps = average.module[0](z).detach()
    norm = average.module[1]
    torch.testing.assert_close(norm.running_mean, maps.mean(dim=0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.running_var, torch.stack(
        [part.var(dim=0) for part in maps.split(1000)]).mean(dim=0), rtol=1e-4, atol=1e-5)


def test_paths_lead_from_each_code_over_the_middle_to_the_next():
    codes = torch.tensor([[0.0, 0.2], [1.0, 0.4], [-1.0, 0.0]])
    got = common.paths(lambda z: z[:, None, None], codes)
    wanted = [[codes[i], (codes[i] + codes[i + 1]) / 2, codes[i + 1]] for i in range(2)]
    wanted = common.to_uint8(torch.stack([torch.stack(way) for way in wanted]))
    assert torch.equal(got, wanted[:, :, None, None])


def test_mnist_is_read_from_files_without_download(tmp_path, no_download):
    pixels = write_mnist(tmp_path / "data")
    images = common.load_images(arguments(tmp_path, "--data", "mnist"), "cpu")
    assert torch.equal(images.x, pixels[:, None]) and images.x.dtype == torch.uint8
    assert images.y.tolist() == [i % 10 for i in range(20)]


def test_cifar_gives_channels_first(tmp_path, monkeypatch):
    pixels = torch.randint(256, (6, 32, 32, 3), dtype=torch.uint8, generator=generator(1))

    class Fake:
        def __init__(self, root, train, download):
            self.data, self.targets = pixels.numpy(), [0, 1, 2, 3, 4, 5]
    monkeypatch.setattr(common.datasets, "CIFAR10", Fake)
    images = common.load_images(arguments(tmp_path, "--data", "cifar10"), "cpu")
    assert images.x.shape == (6, 3, 32, 32) and images.x.dtype == torch.uint8
    assert torch.equal(images.x[3, 2], pixels[3, :, :, 2]) and images.y.dtype == torch.int64


def test_default_falls_back_to_digits_and_says_so(tmp_path, digits_dir, no_download, capsys):
    args = arguments(tmp_path)
    args.data, args.data_dir = None, digits_dir
    images = common.load_images(args, "cpu", train=False)
    assert "cannot be downloaded: using drawn digits" in capsys.readouterr().out
    assert "no MNIST" in images.name
    common.load_images(args, "cpu")
    assert "cannot be downloaded" not in capsys.readouterr().out  # said once


def test_a_run_that_fell_back_to_digits_does_not_go_on_with_mnist(tmp_path, digits_dir, no_download,
                                                                  capsys):
    args = arguments(tmp_path)
    args.data, args.data_dir = None, digits_dir
    start(args)
    common.load_images(args, "cpu")
    common.save_checkpoint(args, {})
    write_mnist(tmp_path / "mnist")
    args.data, args.data_dir, args.resume = None, tmp_path / "mnist", True
    common.load_images(args, "cpu")
    one_line(capsys, lambda: common.load_checkpoint(args), "data digits", "mnist")


def test_digits_are_what_the_table_promises(tmp_path):
    args = arguments(tmp_path, "--data", "digits")
    args.data_dir = tmp_path
    train, test = (common.load_images(args, "cpu", train=part) for part in (True, False))
    assert train.x.shape == (20_000, 1, 28, 28) and test.x.shape == (4_000, 1, 28, 28)
    assert train.x.dtype == torch.uint8 and train.x.min() == 0 and train.x.max() == 255
    assert torch.bincount(train.y).min() > 1_700  # 2,000 expected; six standard deviations are 255
    border = torch.ones(28, 28, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    assert train.x[:, 0, border].float().mean() < 2  # a 20-pixel box in the middle of 28
    assert torch.equal(test.x[:50], common.draw_digits(4_000, seed=1)[0][:50])


@given(seeds())
def test_no_two_drawn_digits_are_alike(seed):
    x, _ = common.draw_digits(50, seed)
    assert len(x.flatten(1).unique(dim=0)) == 50


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_folder_is_cropped_resized_and_split(tmp_path, mode):
    write_folder(tmp_path / "pictures", mode=mode)
    args = arguments(tmp_path, "--data", tmp_path / "pictures", "--size", 16)
    start(args)
    for _ in range(2):  # decoded, then from the kept file
        train, test = (common.load_images(args, "cpu", train=part) for part in (True, False))
        assert train.x.shape == (11, 3, 16, 16) and train.x.dtype == torch.uint8
        assert train.x[:, 1, 8, 8].tolist() == [20 * i for i in range(12) if i != 9]
        assert test.x[0, 0, 0, 0] == 180 and train.y is None
        assert (tmp_path / "out" / "pictures.pt").exists()


def test_a_changed_folder_is_decoded_again(tmp_path):
    write_folder(tmp_path / "pictures")
    args = arguments(tmp_path, "--data", tmp_path / "pictures", "--size", 16)
    start(args)
    common.load_images(args, "cpu")
    first = tmp_path / "pictures" / "deep" / "00.png"
    before = first.stat()
    Image.new("RGB", (30, 40), (7, 7, 7)).save(first)
    os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns - 1))  # older, and of the same size
    assert common.load_images(args, "cpu").x[0, 0, 0, 0] == 7
    first.unlink()
    assert common.load_images(args, "cpu").x[0, 0, 0, 0] == 20


def stamp_sees_every_change(stamp, seed):
    """One byte, one label, two pictures that change places, another shape, no labels."""
    rng = generator(seed)
    x = torch.randint(256, (6, 3, 4, 4), dtype=torch.uint8, generator=rng)
    y, at = torch.arange(6), torch.randint(6 * 48, (), generator=rng)
    images = common.Images(x, y, "")
    one, label = x.clone(), y.clone()
    one.view(-1)[at] += 1
    label[at % 6] += 1
    swapped = x[torch.tensor([1, 0, 2, 3, 4, 5])]
    others = [common.Images(*other, "") for other in (
        (one, y), (x, label), (swapped, y), (x.view(6, 3, 2, 8), y), (x, None))]
    assert len({stamp(data) for data in [images, *others]}) == 6  # alike once in 2^32
    apart = x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)  # lies otherwise in memory
    assert stamp(common.Images(apart, y.clone(), "other name")) == stamp(images)


@given(seeds())
def test_the_stamp_sees_every_change_of_the_data(seed):
    stamp_sees_every_change(common.stamp_of, seed)


def test_a_sum_of_all_bytes_is_found_out():
    """The wrong twin: two pictures that change places have the same."""
    assert rejected(stamp_sees_every_change, lambda images: (
        images.x.shape, images.x.sum().item(), images.y is None or images.y.sum().item()), 0)


@pytest.mark.parametrize("changed", ["00", "09"])  # a training picture, a test picture
def test_a_run_does_not_go_on_with_data_that_have_changed(tmp_path, capsys, changed):
    write_folder(tmp_path / "p")
    args = arguments(tmp_path, "--data", tmp_path / "p", "--size", 16, "--resume")

    def go_on():
        start(args)
        for train in (True, False):
            common.load_images(args, "cpu", train=train)
        return common.load_checkpoint(args)

    go_on()
    common.save_checkpoint(args, {})
    picture = tmp_path / "p" / "deep" / f"{changed}.png"
    before = picture.read_bytes()
    picture.write_bytes(before)  # a new file with the same pixels
    assert go_on()
    Image.new("RGB", (30, 40), (7, 7, 7)).save(picture)
    one_line(capsys, go_on, "other pictures", str(tmp_path / "p"), "another --out")
    picture.write_bytes(before)
    assert go_on()


def numbered(n):
    """n pictures of one pixel, each of the grey value of its number, which is also its label."""
    y = torch.arange(n, dtype=torch.uint8)
    return common.Images(y.view(n, 1, 1, 1), y, "numbers")


@given(seeds(), st.integers(1, 20), st.integers(1, 3))
def test_nearest_is_the_smallest_root_mean_square(seed, n, c):
    """Against a loop over all pairs; a thousand and one x are looked at in two parts."""
    rng = generator(seed)
    images = common.Images(torch.randint(256, (n, c, 2, 3), dtype=torch.uint8, generator=rng),
                           None, "noise")
    x = 2 * torch.rand(3, c, 2, 3, generator=rng) - 1
    train = images.x.double() / 127.5 - 1
    pairs = [[math.sqrt(((one - other) ** 2).mean()) for other in train] for one in x.double()]
    distances, indices = common.nearest(x, images)
    # float32 may take a matrix product: √eps times the norm of a picture, up to √(c 6)
    assert_close(distances.tolist(), [min(row) for row in pairs], rtol=0, atol=2e-3)
    assert all(row[i] <= min(row) + 2e-3 for row, i in zip(pairs, indices.tolist()))
    many, _ = common.nearest(x[:1].expand(1001, -1, -1, -1), images)
    assert many.shape == (1001,) and (many - distances[0]).abs().max() < 2e-3


def test_copies_of_training_pictures_have_distance_zero():
    images = common.Images(torch.arange(64).view(4, 1, 4, 4).to(torch.uint8), None, "ramp")
    copies = common.nearest(common.to_float(images.x[:2]), images)
    assert copies[0].max() < 1e-3 and copies[1].tolist() == [0, 1]
    # every pixel 127.5 of 255 further: one unit of [-1, 1]
    assert_close(common.nearest(common.to_float(images.x[3:]) + 1, images)[0].item(), 1.0)


@given(st.integers(1, 50), st.integers(1, 12), st.integers(0, 40), seeds())
def test_batches_from_any_step_continue_the_same_stream(n, size, step, seed):
    images = numbered(n)
    straight, later = common.batches(images, size, seed), common.batches(images, size, seed, step)
    for _ in range(step):
        next(straight)
    for _ in range(5):
        (x, y), (later_x, later_y) = next(straight), next(later)
        assert torch.equal(x, later_x) and torch.equal(y, later_y)
        assert torch.equal(common.to_uint8(x).flatten(), y)  # each picture with its own label


@given(st.integers(1, 50), st.integers(1, 12), seeds())
def test_an_epoch_shows_each_picture_at_most_once(n, size, seed):
    stream = common.batches(numbered(n)._replace(y=None), size, seed)
    epoch = torch.cat([next(stream)[0] for _ in range(n // min(size, n))])
    assert len(epoch.unique()) == len(epoch) > n - size


# --- networks ----------------------------------------------------------------------------------

@given(st.integers(8, 300), st.integers(1, 64))
def test_maps_halve_down_to_four_to_seven_pixels(side, width):
    widths, small = common.channels(side, width)
    assert widths == [width * 2 ** i for i in range(len(widths))]
    for _ in widths:
        side //= 2
    assert side == small and 4 <= small <= 7


# --- mistakes of the user ----------------------------------------------------------------------

@pytest.mark.parametrize("flags, word", [
    (["--size", "0"], "'0' is not a whole number of 1 or more"),
    (["--size", "many"], "--size"),
    (["--steps", "-3"], "--steps"),
    (["-k", "-1"], "-k"),
    (["--eta", "nan"], "--eta"),
    (["--method", "magic"], "magic"),
    (["--colour"], "--colour"),
    (["--seed", "-1"], "--seed"),
    (["--seed", "2147483648"], "--seed"),
])
def test_wrong_flags_give_one_line(capsys, tmp_path, flags, word):
    one_line(capsys, lambda: arguments(tmp_path, *flags), word)


@pytest.mark.parametrize("device", ["cuda:77", "toaster"])
def test_missing_device_gives_one_line(capsys, tmp_path, device):
    one_line(capsys, lambda: start(arguments(tmp_path, "--device", device)), device)


def test_unwritable_output_gives_one_line(capsys, tmp_path):
    (tmp_path / "file").touch()
    args = arguments(tmp_path)
    args.out = tmp_path / "file" / "out"
    one_line(capsys, lambda: start(args), "cannot write", "--out")


def load(tmp_path, *flags):
    args = arguments(tmp_path, *flags)
    args.out.mkdir(exist_ok=True)
    return lambda: common.load_images(args, "cpu")


def test_unknown_data_gives_one_line(capsys, tmp_path):
    one_line(capsys, load(tmp_path, "--data", "mnits"), "mnits", "mnist, fashion")


def test_missing_data_set_says_which_files_to_put_where(capsys, tmp_path, no_download):
    one_line(capsys, load(tmp_path, "--data", "mnist"), "data/MNIST/raw", "idx-ubyte")


def test_empty_folder_gives_one_line(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    one_line(capsys, load(tmp_path, "--data", tmp_path / "empty"), "holds 0 pictures")


@pytest.mark.parametrize("content", [b"", b"not a picture", None])
def test_corrupt_picture_is_named_with_how_to_leave_it_out(capsys, tmp_path, content):
    write_folder(tmp_path / "p")
    broken = tmp_path / "p" / "deep" / "03.png"
    broken.write_bytes(broken.read_bytes()[:60] if content is None else content)
    flags = ["--data", tmp_path / "p", "--size", 16]
    one_line(capsys, load(tmp_path, *flags), "1 of 12", "03.png", "--skip")
    assert len(load(tmp_path, *flags, "--skip")().x) == 10
    assert "left out 1 that cannot be used (deep/03.png)" in capsys.readouterr().out


def test_small_picture_is_named(capsys, tmp_path):
    write_folder(tmp_path / "p")
    Image.new("RGB", (15, 90)).save(tmp_path / "p" / "small.png")
    one_line(capsys, load(tmp_path, "--data", tmp_path / "p", "--size", 16), "small.png", "15x90")


# --- terminals ---------------------------------------------------------------------------------

CHAPTERS = sorted(path.stem for path in Path(common.__file__).parent.glob("0[1-8]_*.py"))
SCREENS = [*((name, "--help") for name in CHAPTERS), ("08_theory_checks", "--list")]


def printed(monkeypatch, encoding, run):
    """What run() prints on a stdout of that encoding, which raises for what it has not."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with contextlib.suppress(SystemExit):
        run()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("chapter, flag", SCREENS)
def test_a_character_that_the_output_lacks_is_replaced(monkeypatch, chapter, flag, encoding):
    main = importlib.import_module(chapter).main
    shown = printed(monkeypatch, encoding, lambda: common.as_script(lambda: main([flag])))
    whole = printed(monkeypatch, "utf8", lambda: common.as_script(lambda: main([flag])))
    assert shown == whole.encode(encoding, "replace").decode(encoding) and len(shown) > 500


def test_without_replacement_it_is_an_error(monkeypatch):
    """The wrong twin."""
    main = importlib.import_module("08_theory_checks").main
    with pytest.raises(UnicodeEncodeError):
        printed(monkeypatch, "ascii", lambda: main(["--list"]))


def readers_that_leave(folder):
    """By name: status, and what was said on stderr, of scripts whose output is closed.

    Both by the shell before the start; after three lines of a training; before a list comes, which
    Python may still hold when it ends.
    """
    here = Path(common.__file__).parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    quick = [sys.executable, here / "03_unrolled_gan.py", "--quick", "-k", "0", "--out"]

    def leave_after(lines, command):
        run = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(lines):
            run.stdout.readline()
        run.stdout.close()
        return run.wait(), run.stderr.read()

    closed = subprocess.run(["sh", "-c", '"$0" "$@" >&- 2>&-', *quick, folder / "closed", "--steps",
                             "2"], env=env, capture_output=True)
    return folder, {
        "closed": (closed.returncode, closed.stdout + closed.stderr),
        "training": leave_after(3, [*quick, folder / "left"]),
        "list": leave_after(0, [sys.executable, here / "08_theory_checks.py", "--list"])}


@pytest.mark.beside(run=readers_that_leave)
def test_without_a_reader_a_script_ends_quietly_and_its_files_are_whole(beside):
    """141 is the status that a shell gives to a program which SIGPIPE has ended."""
    folder, ends = beside
    assert ends == {"closed": (0, b""), "training": (141, b""), "list": (141, b"")}
    assert (folder / "closed" / "quick" / "process.png").stat().st_size > 0
    assert not list(folder.glob("left/quick/*.tmp"))
    for file in folder.glob("left/quick/*.pt"):
        torch.load(file)


def test_a_file_that_cannot_be_read_is_not_taken_for_a_reader_that_left(tmp_path):
    with pytest.raises(IsADirectoryError):
        common.as_script(lambda: open(tmp_path))


def test_a_path_on_another_drive_is_absolute(monkeypatch):
    """With the functions of Windows, where relpath raises ValueError."""
    for name in ("relpath", "abspath"):
        monkeypatch.setattr(os.path, name, getattr(ntpath, name))
    monkeypatch.setattr(os, "getcwd", lambda: "C:\\course")
    assert common.relative("C:\\course\\out\\a.png") == "out\\a.png"
    assert common.relative("D:\\out\\a.png") == "D:\\out\\a.png"


# --- checkpoints and files ---------------------------------------------------------------------

def test_checkpoint_round_trips_networks_and_random_state(tmp_path):
    args = arguments(tmp_path, "--resume")
    start(args)
    net = torch.nn.Linear(3, 2)
    common.save_checkpoint(args, {"net": net}, step=7)
    expected, other = torch.rand(4), torch.nn.Linear(3, 2)
    saved = common.load_checkpoint(args)
    common.restore(saved, {"net": other})
    assert saved["step"] == 7 and torch.equal(torch.rand(4), expected)
    assert_close(list(other.parameters()), list(net.parameters()), rtol=0, atol=0)


def test_resume_without_checkpoint_begins(tmp_path, capsys):
    assert common.load_checkpoint(arguments(tmp_path, "--resume")) is None
    assert "starting from the beginning" in capsys.readouterr().out


def test_checkpoint_of_other_flags_or_script_is_refused(tmp_path, capsys):
    args = arguments(tmp_path, "--seed", 1)
    start(args)
    common.save_checkpoint(args, {})
    other = arguments(tmp_path, "--seed", 2, "--resume")
    one_line(capsys, lambda: common.load_checkpoint(other), "seed 1", "2")
    args.resume, args.script = True, "07_sn_wgan_gp"
    one_line(capsys, lambda: common.load_checkpoint(args), "03_unrolled_gan")


def test_broken_checkpoint_is_refused(tmp_path, capsys):
    args = arguments(tmp_path, "--resume")
    start(args)
    (args.out / "checkpoint.pt").write_bytes(b"half a file")
    one_line(capsys, lambda: common.load_checkpoint(args), "checkpoint.pt", "not a readable")


def test_checkpoint_with_code_in_it_is_refused(tmp_path, capsys):
    args = arguments(tmp_path, "--resume")
    start(args)
    torch.save({"settings": common.settings(args), "parts": print}, args.out / "checkpoint.pt")
    one_line(capsys, lambda: common.load_checkpoint(args), "not a readable")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.pt"
    common.save(torch.ones(3), path)

    def half(file):
        file.write_bytes(b"half")
        raise OSError("disk full")
    with pytest.raises(OSError):
        common.replace(path, half)
    assert torch.equal(torch.load(path), torch.ones(3)) and list(tmp_path.iterdir()) == [path]


def in_new_process(code, *args):
    """Runs code, which sees common and its arguments in sys.argv, in a process of its own."""
    return subprocess.Popen([sys.executable, "-c", f"import sys, common\n{code}", *map(str, args)],
                            cwd=Path(common.__file__).parent, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def full_disk(folder):
    """A process that may not write more than 2,000 bytes into a file tries three times."""
    path = folder / "full" / "x.pt"
    path.parent.mkdir()
    common.save(torch.ones(3), path)
    return path, in_new_process("""
import contextlib, pathlib, resource, torch
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
path = pathlib.Path(sys.argv[1])
for write in (lambda: common.save(torch.zeros(9999), path),
              lambda: common.write_log(path, [{"step": "9" * 9999}]),
              lambda: common.save_panels(path, [("", [("", lambda ax: None)])])):
    try:
        write()
    except SystemExit as end:
        print(end.code)""", path).communicate()


@pytest.mark.beside(run=full_disk)
def test_a_full_disk_gives_one_line_and_leaves_the_old_file(beside):
    path, (printed, error) = beside
    assert printed.split() == ["1"] * 3 and error.count("\n") == 3, error
    assert all("x.pt" in line and "cannot write" in line for line in error.splitlines())
    assert torch.equal(torch.load(path), torch.ones(3)) and list(path.parent.iterdir()) == [path]


START = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" ignores it
with common.Run(common.parser("", "03_unrolled_gan.py").parse_args(["--out", sys.argv[1]])):
    print("ready", flush=True)
    signal.pause()"""


def two_at_once(folder):
    """Two runs into one folder; the one that is left waits until it is killed."""
    args = arguments(folder / "two")
    runs = [in_new_process(START, args.out) for _ in range(2)]
    while all(run.poll() is None for run in runs):
        time.sleep(0.01)
    refused, running = sorted(runs, key=lambda run: run.poll() is None)
    said = running.stdout.readline()
    running.kill()
    running.communicate()
    return args, said, refused.communicate()[1], refused.returncode


@pytest.mark.beside(run=two_at_once)
def test_of_two_runs_into_the_same_folder_one_is_refused_until_the_other_is_dead(beside):
    args, said, error, status = beside
    assert "device" in said and status == 2
    assert error.count("\n") == 1 and "another run" in error
    left, mine = args.out / "checkpoint.pt.17.tmp", args.out / "notes.tmp"
    left.touch()  # what a kill in the middle of a write leaves
    mine.touch()
    start(args)
    assert not left.exists() and mine.exists()


def interrupted(folder):
    run = in_new_process(START, folder / "interrupted")
    run.stdout.readline()
    run.send_signal(signal.SIGINT)
    return run.communicate()[1], run.returncode


@pytest.mark.beside(run=interrupted)
def test_ctrl_c_outside_of_a_training_gives_one_line(beside):
    error, status = beside
    assert status not in (0, None) and error.strip().count("\n") == 0 and "stopped" in error


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_named(bad, capsys):
    common.check_finite(3, loss_d=1.0)
    with pytest.raises(SystemExit) as stop:
        common.check_finite(4, loss_d=1.0, loss_g=bad)
    assert stop.value.code == 1 and f"loss_g is {bad} at step 4" in capsys.readouterr().err


@given(st.integers(1, 300), st.integers(1, 60))
def test_due_as_often_as_asked_evenly_and_at_the_end(steps, times):
    hits = [step for step in range(1, steps + 1) if common.due(step, steps, times)]
    assert hits[-1] == steps and min(times, steps) <= len(hits) <= 2 * times + 1
    assert len({b - a for a, b in zip([0, *hits], hits[:-1])}) <= 1  # but for the last


def test_progress_prints_tenths_when_not_a_terminal(capsys):
    show = common.progress("k=5", 40)
    for step in range(1, 41):
        show(step, 128 * step, loss=0.5)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and "step 40/40" in lines[-1] and "loss 0.5" in lines[0]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@contextlib.contextmanager
def terminal():
    """What is written to stdout and to stderr, if they are a terminal of 40 columns."""
    with contextlib.redirect_stdout(Terminal()) as out, \
            contextlib.redirect_stderr(Terminal()) as err, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "get_terminal_size", lambda *_: os.terminal_size((40, 24)))
        yield out, err


def test_progress_on_a_terminal_stays_on_one_line():
    with terminal() as (out, _):
        show = common.progress("k=5", 2)
        show(1, loss_d=0.5, loss_g=0.25)
        first = out.getvalue()
        show(2, loss_d=0.5, loss_g=0.25)
    assert first.startswith(common.WIPE) and "\n" not in first
    assert len(first) - len(common.WIPE) < 40  # a longer one would scroll
    assert out.getvalue().count(common.WIPE) == 2 and out.getvalue().endswith("\n")


def test_messages_take_the_place_of_an_unfinished_progress_line():
    with terminal() as (out, err):
        with pytest.raises(SystemExit):
            common.fail("loss_d is nan")
        common.say("hint")
    assert out.getvalue() == f"{common.WIPE}hint\n"
    assert err.getvalue() == f"{common.WIPE}error: loss_d is nan\n"


def test_numbers_stand_to_the_right_words_to_the_left(capsys):
    common.print_table(["name", "psnr"], [["a", "inf"], ["long name", "-1.5"], ["b", "nan"]])
    assert capsys.readouterr().out.splitlines() == [
        "name       psnr", "a           inf", "long name  -1.5", "b             -"]


def test_what_is_given_stands_whatever_quick_says(tmp_path):
    for flags, steps, n_samples in (([], 9000, 10_000), (["--quick"], 20, 1000),
                                    (["--quick", "--steps", "9"], 9, 1000)):
        args = arguments(tmp_path, *flags)
        assert (args.steps, args.n_samples) == (steps, n_samples), flags


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_quick_run_has_a_folder_of_its_own_and_says_so(tmp_path, capsys, chapter):
    parse_args = importlib.import_module(chapter).parse_args
    for flags, folder in (([], "out"), (["--quick"], "out/quick")):
        assert parse_args(["--out", str(tmp_path / "out"), *flags]).out == tmp_path / folder
    said = capsys.readouterr().out
    trains = chapter != "08_theory_checks"  # whose pictures are the same
    assert said.count("\n") == said.count(f"out{os.sep}quick: expect grey") == trains


# --- runs --------------------------------------------------------------------------------------

TEN = common.Images(torch.arange(160, dtype=torch.uint8).view(10, 1, 4, 4), torch.arange(10), "ten")


def toy(args, names=("a", "b"), in_step=lambda run: None):
    """Trainings of 12 steps that need all that a checkpoint holds: weights, Adam, the rate, noise,
    the order of the data, what was kept, and what the training before has come to."""
    with common.Run(args) as run:
        for name in run.each(names):
            torch.manual_seed(args.seed + len(run.done))
            net = torch.nn.Linear(16, 1)
            opt = torch.optim.Adam(net.parameters(), lr=0.01)
            rate = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 12)
            batches = run.batches(TEN, 4)
            for step in run.steps(12, net=net, opt=opt, rate=rate):
                x, y = next(batches)
                loss = ((net(x.flatten(1) + torch.randn(16))[:, 0] - y) ** 2).mean()
                opt.zero_grad()
                loss.backward()
                opt.step()
                rate.step()
                run.log(loss=loss)
                if run.at((0.25, 0.5)):
                    run.kept[step] = net.bias.detach().clone()
                in_step(run)
            run.done[name] = {"kept": run.kept, "weight": net.weight.detach()}
    return {"log": (args.out / "log.csv").read_text(), "rows": run.rows, **run.done}


def same_results(a, b):
    """Equal to the last bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_results(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_results, a, b))
    return a == b


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return toy(arguments(tmp_path_factory.mktemp("straight")))


def test_a_run_keeps_its_log_and_what_it_was_asked_to(straight):
    assert not same_results(straight["a"], straight["b"])
    assert [(row["model"], row["step"]) for row in straight["rows"]] == [
        (name, step) for name in "ab" for step in range(1, 13)]
    for name in "ab":
        assert list(straight[name]["kept"]) == [3, 6]
    written = list(csv.DictReader(straight["log"].splitlines()))
    assert written == [{key: str(value) for key, value in row.items()} for row in straight["rows"]]


@pytest.mark.parametrize("deaths", [[1], [7], [12], [13], [24], [3, 5, 11]])
def test_a_run_killed_after_any_checkpoint_goes_on_to_the_same_bits(tmp_path, straight, deaths):
    """Each death comes right after that many checkpoints of its own life: 12 for each training."""
    args = arguments(tmp_path, "--resume")
    for death in deaths:
        with killed_after(death):
            toy(args)
    assert same_results(toy(args), straight)
    assert same_results(toy(args), straight)  # a finished run resumes to itself


@pytest.mark.parametrize("step, name", [(1, "a"), (5, "a"), (12, "a"), (1, "b"), (12, "b")])
def test_a_run_killed_within_a_step_goes_on_to_the_same_bits(tmp_path, straight, step, name):
    def die(run):
        if (run.step, run.name) == (step, name):
            raise RuntimeError("killed")

    args = arguments(tmp_path, "--resume")
    with pytest.raises(RuntimeError, match="killed"):
        toy(args, in_step=die)
    assert same_results(toy(args), straight)


@pytest.mark.parametrize("lost", [None, "drawn", "rows", "kept", "random"])
def test_a_checkpoint_that_lacks_a_part_is_found_out(tmp_path, straight, monkeypatch, lost):
    """The wrong twins of the tests above."""
    args, load = arguments(tmp_path, "--resume"), common.load_checkpoint
    with killed_after(7):
        toy(args)
    start = {"drawn": 0, "rows": [], "kept": {}, "random": [(generator(9).get_state(), None)]}
    monkeypatch.setattr(common, "load_checkpoint", lambda args: (
        load(args) | ({lost: start[lost]} if lost else {})))
    assert same_results(toy(args), straight) == (lost is None)


def press_ctrl_c_at(step):
    def press(run):
        if (run.step, run.name) == (step, "b"):
            signal.raise_signal(signal.SIGINT)
    return press


def test_the_first_ctrl_c_waits_for_the_end_of_the_step(tmp_path, straight, capsys):
    args = arguments(tmp_path, "--resume")
    one_line(capsys, lambda: toy(args, in_step=press_ctrl_c_at(5)), "stopped at step 5", "--resume",
             status=130)
    assert torch.load(args.out / "checkpoint.pt")["step"] == 5
    assert same_results(toy(args), straight)


def test_the_second_ctrl_c_stops_at_once(tmp_path, straight, capsys):
    def press_twice(run):
        press_ctrl_c_at(5)(run)
        press_ctrl_c_at(5)(run)

    args = arguments(tmp_path, "--resume")
    one_line(capsys, lambda: toy(args, in_step=press_twice), "files are whole", status=130)
    assert torch.load(args.out / "checkpoint.pt")["step"] == 4
    assert same_results(toy(args), straight)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tmp_path, straight, capsys,
                                                                        bad):
    def spoil(run):
        if (run.step, run.name) == (4, "b"):
            run.log(loss_d=torch.tensor(1.0), loss_g=torch.tensor(bad, requires_grad=True))

    args = arguments(tmp_path, "--resume")
    one_line(capsys, lambda: toy(args, in_step=spoil), f"loss_g is {bad} at step 4", status=1)
    assert torch.load(args.out / "checkpoint.pt")["step"] == 3
    assert same_results(toy(args), straight)


@pytest.mark.parametrize("step", [6, 12])  # checkpoints are due after both; 12 is the last step
def test_weights_that_are_not_finite_are_never_saved(tmp_path, straight, capsys, step):
    """The loss of a step is still good when its update is not."""
    def spoil(run):
        if (run.step, run.name) == (step, "b"):
            run.parts["net"].weight.data[0, 3] = math.nan

    args = arguments(tmp_path, "--resume")
    one_line(capsys, lambda: toy(args, in_step=spoil), f"weights of net are not finite after step "
             f"{step}", status=1)
    assert torch.load(args.out / "checkpoint.pt")["step"] == step - 1
    assert same_results(toy(args), straight)


def test_a_checkpoint_of_other_networks_is_refused(tmp_path, capsys):
    """A reader who has changed a layer goes on with --resume."""
    args = arguments(tmp_path, "--resume")
    with killed_after(5):
        toy(args)
    with mock.patch.object(torch.nn, "Linear", lambda i, o: torch.nn.Bilinear(i, i, o)):
        one_line(capsys, lambda: toy(args), "other networks", "--out")


def test_a_line_of_an_error_is_one_line(capsys):
    """Names of files may hold any character but / and the zero byte."""
    one_line(capsys, lambda: common.fail("no file two\nlines.png"), "two\\nlines")


@pytest.mark.parametrize("n", [1, 2, 9])
def test_pictures_stand_in_a_grey_frame(n):
    """White ones would have no edge on the paper."""
    ax = mock.Mock()
    common.panel(torch.full((n, 1, 6, 6), 255, dtype=torch.uint8))(ax)
    picture, = ax.imshow.call_args.args
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (edge == 128).all()
    assert (picture == 255).sum() == n * 6 * 6 * 3


@pytest.mark.parametrize("wrap, fits", [(True, True), (False, False)])
def test_a_title_is_no_wider_than_its_figure(wrap, fits):
    fig, _ = common.figure(1, 1, 2.6, 3.2, "a folder of pictures, seed 0, 4,400 steps of D and G")
    title = fig._suptitle
    assert title.get_wrap()
    title.set_wrap(wrap)  # False: the wrong twin
    fig.canvas.draw()
    whole, shown = fig.bbox, title.get_window_extent()
    assert (whole.x0 <= shown.x0 and shown.x1 <= whole.x1 and shown.y1 <= whole.y1) == fits


def test_titles_are_no_formulas(tmp_path):
    """A folder may be called a$^$b; matplotlib would take what stands between $ for mathematics."""
    common.plot_curves(tmp_path / "a.png", [{"model": "a", "step": 1, "loss": 1.0}], {"loss": ""},
                       title="a$^$b")
    common.save_process(tmp_path / "b.png", {"a": {1: torch.zeros(4, 1, 8, 8).byte()}}, "a$^$b")
    assert (tmp_path / "a.png").stat().st_size and (tmp_path / "b.png").stat().st_size


def test_a_finished_run_can_be_given_more_trainings(tmp_path, straight):
    args = arguments(tmp_path, "--resume", "-k", 0)
    toy(args, names=["a"])
    args.k = [0, 5]  # flags that are lists name the trainings
    assert same_results(toy(args), straight)


def test_a_training_that_is_half_done_is_not_dropped_for_another(tmp_path, straight, capsys):
    args = arguments(tmp_path, "--resume")
    with killed_after(5):
        toy(args)
    before = (args.out / "checkpoint.pt").read_bytes()
    one_line(capsys, lambda: toy(args, names=["b", "a"]), "in the midst of a", "before b")
    assert (args.out / "checkpoint.pt").read_bytes() == before
    assert same_results(toy(args), straight)


def test_numbers_noted_outside_of_the_log_have_a_row(tmp_path):
    """Steps 1 to 12 of 1,000: none of the 40 rows is due, and one is asked for."""
    with common.Run(arguments(tmp_path)) as run:
        for run.name in run.each(["a"]):
            for step in run.steps(1000):
                run.log(loss=1.0 / step)
                if step == 12:
                    run.note(score=7)
                    break
    assert run.rows == [{"model": "a", "step": 12, "loss": 1 / 12, "score": 7}]


def test_a_run_that_begins_anew_says_what_it_replaces(tmp_path, capsys):
    args = arguments(tmp_path)

    def said(*flags, death=None):
        args.resume = "--resume" in flags
        with killed_after(death) if death else contextlib.nullcontext():
            toy(args)
        return "\n".join(line for line in capsys.readouterr().out.splitlines()
                         if "begins anew" in line or "going on" in line)

    assert said(death=17) == ""
    assert "out holds a run that has come to step 5 of b (--resume" in said(death=12)
    assert said("--resume", death=12) == "going on after step 12 of a"
    assert said("--resume") == "going on after step 12 of b"
    assert said("--resume") == "going on after b"
    assert "out holds a finished run: this run begins anew" in said(death=24)
    assert "step 12 of b (--resume" in said()  # it was killed before its figures
    (args.out / "checkpoint.pt").write_bytes(b"no torch file")
    assert "cannot be read: this run begins anew" in said()
    args.seed = 1
    assert "a finished run: this run begins anew" in said()  # whatever its flags were


def taken():
    """What a run takes from its process, and what it might."""
    return (signal.getsignal(signal.SIGINT), sys.excepthook, socket.getdefaulttimeout(), sys.stdout,
            sys.stdout.errors, list(warnings.filters), dict(os.environ), os.getcwd(),
            threading.active_count(), torch.get_num_threads(), torch.get_default_dtype(),
            torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled())


def test_a_run_gives_back_what_it_took(tmp_path):
    """In a notebook the process goes on, and another may want the folder."""
    ends = {"well": lambda run: None, "refused": lambda run: common.fail("no"),
            "killed": lambda run: 1 / 0, "stopped": press_ctrl_c_at(5)}
    before = taken()
    for how, end in ends.items():
        with contextlib.suppress(SystemExit, ZeroDivisionError):
            toy(arguments(tmp_path / how), in_step=end)
        assert taken() == before, how
    other = """import fcntl, sys
for lock in sys.argv[1:]:
    fcntl.lockf(open(lock, "a"), fcntl.LOCK_EX | fcntl.LOCK_NB)"""
    locks = [arguments(tmp_path / how).out / ".lock" for how in ends]
    assert all(lock.exists() for lock in locks)
    subprocess.run([sys.executable, "-c", other, *locks], check=True)


def test_a_run_outside_of_the_main_thread_goes_without_ctrl_c(tmp_path, straight):
    with ThreadPoolExecutor() as pool:
        assert same_results(pool.submit(toy, arguments(tmp_path)).result(), straight)


def test_a_file_system_without_locks_is_no_other_run(tmp_path, capsys, monkeypatch):
    import fcntl
    for code, refused in ((errno.ENOLCK, False), (errno.ENOTSUP, False), (errno.EAGAIN, True),
                          (errno.EACCES, True)):
        monkeypatch.setattr(fcntl, "lockf", mock.Mock(side_effect=OSError(code, "no")))
        if refused:
            one_line(capsys, lambda: start(arguments(tmp_path)), "another run")
        else:
            start(arguments(tmp_path))


def imported(folder):
    code = "import matplotlib\nassert 'matplotlib.pyplot' not in sys.modules"
    return in_new_process(code).wait()


@pytest.mark.beside(run=imported)
def test_importing_the_project_leaves_matplotlib_as_it_is(beside):
    assert beside == 0


@pytest.mark.parametrize("kind, bounds, good, bad", [
    (int, dict(least=1), ["1", "7"], ["0", "-1", "1.5", "x", "", "nan"]),
    (int, dict(least=0, most=9), ["0", "9"], ["-1", "10"]),
    (float, dict(above=0), ["1e-9", "3"], ["0", "-1", "nan", "inf", "x"]),
    (float, dict(least=0), ["0", "1e9"], ["-1e-9", "inf", "nan"]),
    (float, dict(least=0, most=1), ["0", "1", ".5"], ["1.01", "-0.1", "nan"])])
def test_numbers_of_flags_have_bounds(kind, bounds, good, bad):
    parse = common.number(kind, **bounds)
    assert [parse(text) for text in good] == [kind(text) for text in good]
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="is not a"):
            parse(text)


# --- figures -----------------------------------------------------------------------------------

def test_an_animation_keeps_rare_colours(tmp_path):
    """Grey steps fill the picture and a pale blue and red have a corner each, as D's answer may."""
    frames = []
    for _ in range(2):
        fig, ((ax,),) = common.figure(1, 1, 2, 2)
        x = torch.linspace(0, 1, 64).repeat(64, 1)[..., None].repeat(1, 1, 3)
        x[:6, :6], x[-6:, -6:] = torch.tensor([0.85, 0.9, 1.0]), torch.tensor([1.0, 0.9, 0.85])
        ax.imshow(x.numpy())
        ax.axis("off")
        frames.append(fig)
    common.save_animation(frames, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        shown = pil_to_tensor(gif.convert("RGB")).flatten(1).T.float()
    assert ((shown - torch.tensor([217.0, 230, 255])).abs().amax(dim=1) < 12).sum() > 50
    assert ((shown - torch.tensor([255.0, 230, 217])).abs().amax(dim=1) < 12).sum() > 50
