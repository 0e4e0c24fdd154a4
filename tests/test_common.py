"""common.py: data, a run on a toy, files, one line for every mistake."""

import argparse
import ast
import csv
import importlib
import io
import math
import re
import signal
import sys
from pathlib import Path
from unittest import mock

import matplotlib
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.testing import assert_close

import common
from harness import batches, ctrl_c, killed_after, one_line  # noqa: F401
from strategies import generator, seeds

ROOT = Path(common.__file__).parent
unrolled = importlib.import_module("03_unrolled_gan")


def arguments(tmp_path, *flags):
    """The flags of chapter 03 with everything under tmp_path."""
    folders = ["--out", tmp_path / "out", "--data-dir", tmp_path / "data"]
    return unrolled.parse_args([str(flag) for flag in [*folders, *flags]])


# --- data --------------------------------------------------------------------------------------

def test_scaling_round_trips_every_byte():
    x = torch.arange(256, dtype=torch.uint8)
    y = common.to_float(x)
    assert y.dtype == torch.float32 and y.min() == -1 and y.max() == 1
    assert torch.equal(common.to_uint8(y), x)
    assert torch.equal(common.to_uint8(torch.tensor([-3.0, 3.0])), torch.tensor([0, 255]).byte())


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
    assert common.nearest(common.to_float(images.x), images)[0].max() == 0  # copies
    many, _ = common.nearest(x[:1].expand(1001, -1, -1, -1), images)
    assert many.shape == (1001,) and (many - distances[0]).abs().max() < 2e-3


def numbered(n):
    """n pictures of one pixel, each of the grey value of its number, which is also its label."""
    y = torch.arange(n, dtype=torch.uint8)
    return common.Images(y.view(n, 1, 1, 1), y, "numbers")


@given(st.integers(1, 50), st.integers(1, 12), st.integers(0, 40), seeds())
def test_batches_from_any_step_continue_the_same_stream(n, size, step, seed):
    images = numbered(n)
    straight, later = batches(images, size, seed), batches(images, size, seed, step)
    for _ in range(step):
        next(straight)
    for _ in range(5):
        (x, y), (later_x, later_y) = next(straight), next(later)
        assert torch.equal(x, later_x) and torch.equal(y, later_y)
        assert torch.equal(common.to_uint8(x).flatten(), y)  # each picture with its own label


@given(st.integers(1, 50), st.integers(1, 12), seeds())
def test_an_epoch_shows_each_picture_at_most_once(n, size, seed):
    stream = batches(numbered(n)._replace(y=None), size, seed)
    epoch = torch.cat([next(stream)[0] for _ in range(n // min(size, n))])
    assert len(epoch.unique()) == len(epoch) > n - size


def test_synthetic_digits_are_what_the_table_promises(tmp_path, monkeypatch):
    asked, make = [], common.make_digits
    monkeypatch.setattr(common, "make_digits", lambda n, seed: asked.append(n) or make(1_000, seed))
    args = arguments(tmp_path, "--data", "digits")
    train, test = (common.load_images(args, "cpu", train=part) for part in (True, False))
    assert sorted(asked) == [4_000, 20_000] and torch.equal(test.x, make(1_000, seed=1)[0])
    assert train.x.shape == (1_000, 1, 28, 28) and train.x.dtype == torch.uint8
    assert train.x.min() == 0 and train.x.max() == 255 and not torch.equal(train.x, test.x)
    assert (torch.bincount(train.y) - 100).abs().max() < 57  # six standard deviations
    border = torch.ones(28, 28, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    assert train.x[:, 0, border].float().mean() < 2  # a 20-pixel box in the middle of 28


@given(seeds())
def test_no_two_synthetic_digits_are_alike(seed):
    x, _ = common.make_digits(50, seed)
    assert len(x.flatten(1).unique(dim=0)) == 50


def data_with(monkeypatch, x, y):
    """The checksum of these pictures and labels, as load_images writes it for --resume."""
    args = argparse.Namespace(data="digits", quick=False)
    monkeypatch.setattr(common, "load_digits", lambda args, train: common.Images(x, y, "these"))
    common.load_images(args, "cpu")
    return args.training_pictures


def test_the_checksum_sees_every_change_of_the_data(monkeypatch):
    """One byte, one label, two pictures that change places, one picture less, no labels."""
    rng = generator(0)
    x, y = torch.randint(256, (6, 3, 4, 4), dtype=torch.uint8, generator=rng), torch.arange(6)
    byte, label = x.clone(), y.clone()
    byte[3, 1, 2, 0] += 1
    label[5] += 1
    swapped = x[torch.tensor([1, 0, 2, 3, 4, 5])]
    found = [data_with(monkeypatch, *each) for each in (
        (x, y), (byte, y), (x, label), (swapped, y), (x[:5], y[:5]), (x, None))]
    assert len(set(found)) == 6
    apart = x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)  # another order in memory
    assert data_with(monkeypatch, apart, y.clone()) == found[0]


# --- a run on a toy ----------------------------------------------------------------------------

TEN = common.Images(torch.arange(160, dtype=torch.uint8).view(10, 1, 4, 4), torch.arange(10), "ten")


def toy(args, names=("a", "b"), in_step=lambda run: None):
    """Training runs of 12 steps that need all that a checkpoint holds: weights, Adam, the learning
    rate, noise, the order of the data, what was collected, and the result of the run before."""
    run = common.Run(args)
    for name in run.each(names):
        torch.manual_seed(args.seed + len(run.done))
        net = nn.Linear(16, 1)
        opt = torch.optim.Adam(net.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 12)
        stream = run.batches(TEN, 4)
        for step in run.steps(12, net=net, opt=opt, schedule=schedule):
            x, y = next(stream)
            loss = ((net(x.flatten(1) + torch.randn(16))[:, 0] - y) ** 2).mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
            run.log(loss=loss)
            if run.at((0.25, 0.5)):
                run.extra[step] = net.bias.item()
            in_step(run)
        run.done[name] = {"extra": run.extra, "weight": net.weight.tolist()}
    return {"log": (args.out / "log.csv").read_text(encoding="utf-8"), "rows": run.rows, **run.done}


def in_step(number, name, act):
    """For toy(in_step=...): act(run) in one step of one training."""
    return lambda run: act(run) if (run.step, run.name) == (number, name) else None


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return toy(arguments(tmp_path_factory.mktemp("straight")))


def test_a_run_keeps_its_log_and_what_it_was_asked_to(straight):
    assert straight["a"] != straight["b"]
    assert [(row["model"], row["step"]) for row in straight["rows"]] == [
        (name, step) for name in "ab" for step in range(1, 13)]
    for name in "ab":
        assert list(straight[name]["extra"]) == [3, 6]
    written = list(csv.DictReader(straight["log"].splitlines()))
    assert written == [{key: str(value) for key, value in row.items()} for row in straight["rows"]]


@given(st.integers(1, 300), st.integers(1, 60))
def test_every_is_true_as_often_as_asked_evenly_and_at_the_end(steps, times):
    hits = [step for step in range(1, steps + 1)
            if common.Run.every(argparse.Namespace(step=step, total=steps), times)]
    assert hits[-1] == steps and min(times, steps) <= len(hits) <= 2 * times + 1
    assert len({b - a for a, b in zip([0, *hits], hits[:-1])}) <= 1  # but for the last


def test_numbers_between_the_rows_of_the_log_get_a_row(tmp_path):
    run = common.Run(arguments(tmp_path))
    run.name = next(run.each(["a"]))
    next(run.steps(1000))
    run.log(loss=0.5)
    assert run.rows == []  # 40 of the 1,000 steps have a row, and the first is none of them
    run.add_to_row(score=7)
    assert run.rows == [{"model": "a", "step": 1, "loss": 0.5, "score": 7}]


@pytest.mark.parametrize("deaths", [[1], [13], [26], [3, 5, 11]])
def test_a_run_killed_after_any_checkpoint_resumes_to_the_same_bits(tmp_path, straight, deaths):
    """Each death comes right after that many checkpoints of its own life: 13 for each training."""
    args = arguments(tmp_path, "--resume")
    for death in deaths:
        with killed_after(death):
            toy(args)
    assert toy(args) == straight
    assert toy(args) == straight  # a finished run resumes to itself


@pytest.mark.parametrize("step, name", [(1, "a"), (5, "a"), (12, "b")])
def test_a_run_killed_within_a_step_resumes_to_the_same_bits(tmp_path, straight, step, name):
    args = arguments(tmp_path, "--resume")
    with pytest.raises(ZeroDivisionError):
        toy(args, in_step=in_step(step, name, lambda run: 1 / 0))
    assert toy(args) == straight


@pytest.mark.parametrize("lost", [None, "n_batches", "rows", "extra", "random"])
def test_a_checkpoint_that_lacks_a_part_is_found_out(tmp_path, straight, monkeypatch, lost):
    """The wrong twins of the tests above."""
    args, load = arguments(tmp_path, "--resume"), common.load_saved
    with killed_after(7):
        toy(args)
    start = {"n_batches": 0, "rows": [], "extra": {}, "random": [(generator(9).get_state(), None)]}
    monkeypatch.setattr(common, "load_saved", lambda *given: (
        load(*given) | ({lost: start[lost]} if lost else {})))
    assert (toy(args) == straight) == (lost is None)


@pytest.mark.parametrize("times, saved, words", [(1, 5, "stopped at step 5"),
                                                 (2, 4, "stopped; --resume")])
def test_the_first_ctrl_c_waits_for_the_end_of_the_step_and_the_second_does_not(
        tmp_path, straight, capsys, times, saved, words):
    def press(run):
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)

    args = arguments(tmp_path, "--resume")
    one_line(capsys, lambda: toy(args, in_step=in_step(5, "b", press)), words, "--resume",
             status=130)
    assert torch.load(args.out / "checkpoint.pt")["step"] == saved
    assert toy(args) == straight


def spoil_weights(run):
    """The loss of a step is still good when its update is not."""
    run.state["net"].weight.data[0, 3] = math.nan


@pytest.mark.parametrize("step, spoil, words", [
    (4, lambda run: run.log(loss_d=1.0, loss_g=torch.tensor(math.nan)), "loss_g is nan at step 4"),
    (4, lambda run: run.log(loss_d=-math.inf), "loss_d is -inf at step 4"),
    (6, spoil_weights, "weights of net are not finite after step 6"),
    (12, spoil_weights, "weights of net are not finite after step 12")])  # the last step
def test_what_is_not_finite_is_named_and_never_saved(tmp_path, straight, capsys, step, spoil,
                                                     words):
    args = arguments(tmp_path, "--resume")
    one_line(capsys, lambda: toy(args, in_step=in_step(step, "b", spoil)), words, status=1)
    assert torch.load(args.out / "checkpoint.pt")["step"] == step - 1
    assert toy(args) == straight


def test_a_finished_run_can_be_given_a_second_model(tmp_path, straight):
    args = arguments(tmp_path, "--resume", "-k", 0)
    toy(args, names=["a"])
    args.k = [0, 5]  # flags that are lists name the training runs
    assert toy(args) == straight


def test_a_training_that_is_half_done_is_not_dropped_for_another(tmp_path, straight, capsys):
    args = arguments(tmp_path, "--resume")
    with killed_after(5):
        toy(args)
    one_line(capsys, lambda: toy(args, names=["b", "a"]), "in the middle of a")
    assert toy(args) == straight


# --- files -------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, words", [
    (lambda args, file: setattr(args, "seed", 2), ["seed 0", "2", "another --out"]),
    (lambda args, file: setattr(args, "script", "99_other"), ["03_unrolled_gan", "99_other"]),
    (lambda args, file: file.write_bytes(file.read_bytes()[:50]), ["cannot be used"]),
    (lambda args, file: torch.save({"settings": common.settings(args), "state": print}, file),
     ["cannot be used"]),
    (lambda args, file: torch.save(torch.load(file) | {"settings": {}}, file), ["layout None"])],
    ids=["other flags", "another script", "half a file", "code in it", "an older layout"])
def test_a_checkpoint_that_does_not_fit_is_refused_and_kept(tmp_path, capsys, change, words):
    args = arguments(tmp_path, "--resume")
    with killed_after(5):
        toy(args)
    file = args.out / "checkpoint.pt"
    change(args, file)
    before = file.read_bytes()
    one_line(capsys, lambda: toy(args), *words)
    assert file.read_bytes() == before


class Full(io.BytesIO):
    """A file on a disk that has 700 bytes left."""
    def write(self, content):
        if self.tell() + len(bytes(content)) > 700:
            super().write(bytes(content)[:7])
            raise OSError(28, "the disk is full")
        return super().write(content)


@pytest.mark.parametrize("part, full", [
    ("open", lambda *_: Full()), ("os", mock.Mock(replace=mock.Mock(side_effect=OSError(
        28, "the disk is full"))))])
@pytest.mark.parametrize("write", [
    lambda path: common.save(torch.zeros(9), path),  # torch.save hides the OSError in another
    lambda path: common.write_log([{"step": i} for i in range(999)], path),
    lambda path: common.save_panels(path, [("", [("", lambda ax: None)])])])
def test_a_failed_write_says_so_and_leaves_the_old_file(tmp_path, capsys, monkeypatch, write, part,
                                                        full):
    path = tmp_path / "x.pt"
    common.save(torch.ones(3), path)
    monkeypatch.setattr(common, part, full, raising=False)
    one_line(capsys, lambda: write(path), "cannot write", "x.pt", "disk is full", status=1)
    assert torch.equal(torch.load(path), torch.ones(3)) and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("refusals, refused", [(3, False), (29, True)])
def test_a_file_that_another_program_holds_is_tried_again(tmp_path, capsys, monkeypatch, refusals,
                                                          refused):
    """Excel holds an open file: the run waits a second, says it once, and loses nothing."""
    replace, left = common.os.replace, [refusals]

    def refuse(*names):
        left[0] -= 1
        return replace(*names) if left[0] < 0 else exec("raise PermissionError(13, 'denied')")

    monkeypatch.setattr(common.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(common.os, "replace", refuse)
    file, other = tmp_path / "x.pt", tmp_path / ".x.pt.new"
    for i in range(2):
        where = common.write(lambda f: f.write(b"%d" % i), file)
        assert where == (other if refused else file) and where.read_bytes() == b"%d" % i
    assert capsys.readouterr().out.count("used by another program") == refused
    assert common.write(lambda f: f.write(b"2"), file) == file
    assert list(tmp_path.iterdir()) == [file]


def test_files_of_the_reader_stay(tmp_path):
    for name in ("x.pt.tmp", "x.pt.new", "thesis.2024.tmp"):
        (tmp_path / name).write_text("mine", encoding="utf-8")
    common.save(torch.ones(3), tmp_path / "x.pt")
    assert len(list(tmp_path.iterdir())) == 4
    assert (tmp_path / "x.pt.tmp").read_text(encoding="utf-8") == "mine"


def test_some_ends_of_a_run_have_no_traceback(capsys):
    """Changed networks with --resume or a saved generator; Ctrl-C outside of a training run."""
    with pytest.raises(RuntimeError) as error:
        nn.Linear(2, 3).load_state_dict(nn.Linear(3, 3).state_dict())
    one_line(capsys, lambda: common.end(error.type, error.value, error.tb), "networks differ",
             "another --out", "[3, 3]")
    one_line(capsys, lambda: common.end(KeyboardInterrupt, KeyboardInterrupt(), None), "stopped",
             status=130)
    common.end(ValueError, ValueError("a mistake"), None)
    assert "ValueError: a mistake" in capsys.readouterr().err


def test_the_same_value_gives_the_same_bytes(tmp_path):
    for name in ("a.pt", "b.pt"):
        common.save({"x": torch.ones(3)}, tmp_path / name)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_a_style_of_the_readers_own_does_not_change_the_pictures(tmp_path):
    """image.origin: lower would turn them upside down; text.usetex needs LaTeX."""
    x, written = torch.arange(0, 200, dtype=torch.uint8).view(2, 1, 10, 10), []
    for style in ({}, {"image.origin": "lower", "text.usetex": True, "axes.titlecolor": "red"}):
        with matplotlib.rc_context(style):
            common.parser("", __file__)
            common.save_panels(tmp_path / "x.png", [("row", [("title", common.panel(x))])], "title")
        written.append((tmp_path / "x.png").read_bytes())
    assert written[0] == written[1]


def test_a_home_folder_may_be_written_as_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.setenv("USERPROFILE", "/somewhere")
    args = unrolled.parse_args(["--out=~/x", "--data-dir=~/y"])
    assert (args.out, args.data_dir) == (Path("/somewhere/x"), Path("/somewhere/y"))


@pytest.mark.parametrize("n", [1, 2, 9])
def test_pictures_stand_in_a_grey_frame(n):
    """White ones would have no edge on the paper."""
    ax = mock.Mock()
    common.panel(torch.full((n, 1, 6, 6), 255, dtype=torch.uint8))(ax)
    picture, = ax.imshow.call_args.args
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (edge == 128).all()
    assert (picture == 255).sum() == n * 6 * 6 * 3


@pytest.mark.parametrize("wrap", [True, False])  # False: the wrong twin
def test_a_title_is_no_wider_than_its_figure(wrap):
    fig, _ = common.figure(1, 1, 2.6, 3.2, "a folder of pictures, seed 0, 4,400 steps of D and G")
    fig._suptitle.set_wrap(fig._suptitle.get_wrap() and wrap)
    fig.draw_without_rendering()
    whole, shown = fig.bbox, fig._suptitle.get_window_extent()
    assert (whole.x0 <= shown.x0 and shown.x1 <= whole.x1 and shown.y1 <= whole.y1) == wrap


def test_titles_are_no_formulas():
    """Matplotlib would take what stands between two $ for a formula, and this one is none."""
    common.figure(1, 1, 2.6, 3.2, "a$^$b on digits, seed 0")[0].draw_without_rendering()


def text_without_encoding(source):
    """The lines in which a text file is opened, read or written in the machine's own encoding."""
    lines = []
    for call in [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]:
        name, text = ast.unparse(call.func), ast.unparse(call)
        opens = name.split(".")[-1] in ("open", "read_text", "write_text")
        binary = name in ("Image.open", "os.open") or re.search("'[rwax+]*b[rwax+]*'", text)
        if opens and not binary and "encoding=" not in text:
            lines.append(call.lineno)
    return lines


@pytest.mark.parametrize("file", [ROOT / "common.py", *sorted(ROOT.glob("tests/*.py"))],
                         ids=lambda file: file.name)
def test_text_files_have_an_encoding(file):
    """Windows would take cp1252, which has no σ."""
    assert text_without_encoding(file.read_text(encoding="utf-8")) == []


def test_text_files_without_an_encoding_are_found():
    """The wrong twins are found, and nothing else."""
    wrong = 'open(a)\na.open("w")\na.read_text()\na.write_text(b)'
    right = 'open(a, "rb")\na.open(mode="wb")\nImage.open(a)\na.read_text(encoding="utf-8")'
    assert text_without_encoding(f"{wrong}\n{right}") == [1, 2, 3, 4]


# --- flags, and what is printed ----------------------------------------------------------------

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
        with pytest.raises(ValueError):  # argparse makes one line of it
            parse(text)


@pytest.mark.parametrize("flags, words", [
    (["--size", "30"], ["--size", "28, 32"]), (["--steps", "many"], ["--steps", "many"]),
    (["--steps", "0"], ["--steps", "invalid whole number from 1 value: '0'"]),
    (["-k", "-1"], ["-k"]), (["--eta", "nan"], ["--eta"]), (["--seed", "-1"], ["--seed"]),
    (["--seed", "2147483648"], ["--seed", "2147483647"]),
    (["--method", "exakt"], ["did you mean exact?"]), (["--colour"], ["--colour"]),
    (["--step", "1"], ["did you mean --steps?"]), (["--step=1"], ["did you mean --steps?"]),
    (["--out", "~nobody/x", "--size", "9"], ["--size"]),
    (["--see", "1"], ["--see"]),  # no part of a flag is a flag
    (["--data", "mnits"], ["mnits", "neither"]), (["--data", __file__], ["neither"]),
    (["--data", str(ROOT / "tests")], ["holds 0 pictures"]),
    (["--data", "mnist"], ["mnist cannot be read", "--data digits"]),
    (["--data", "digits", "--batch", "1"], ["--batch", "from 2"]),
    (["--device", "toaster"], ["toaster", "--device cpu"]),
    (["--out", __file__], ["cannot write", "--out"])])
def test_a_wrong_flag_gives_one_line(capsys, tmp_path, digits_dir, no_download, flags, words):
    shared = ["--out", str(tmp_path), "--data-dir", str(digits_dir), "--quick"]
    one_line(capsys, lambda: unrolled.main([*shared, *flags]), *words)


def test_a_flag_that_is_given_stands_and_a_quick_run_has_its_own_folder(tmp_path):
    for flags, steps, n_samples, out in (([], 9000, 10_000, "out"),
                                         (["--quick"], 20, 1000, "out/quick"),
                                         (["--quick", "--steps", "9"], 9, 1000, "out/quick")):
        args = arguments(tmp_path, *flags)
        assert (args.steps, args.n_samples, args.out) == (steps, n_samples, tmp_path / out), flags


def test_a_character_that_the_output_lacks_is_replaced(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with pytest.raises(UnicodeEncodeError):
        print("σ = 1")
    common.parser("", __file__)
    print("σ = 1", flush=True)
    assert raw.getvalue().split() == [b"?", b"=", b"1"]
