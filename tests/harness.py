"""What tests of whole runs share: ways to end a run, to compare what it left, and small data."""

import contextlib
import importlib
import signal
from types import SimpleNamespace
from unittest import mock

import numpy
import pytest
import torch
from PIL import Image

import common


@pytest.fixture(autouse=True)
def ctrl_c():
    """A Run takes the signal of Ctrl-C; this gives it back."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def killed_after(saves):
    """Within it the run dies right after that many checkpoints."""
    save, left = common.save, [saves]

    def save_and_die(value, file):
        save(value, file)
        left[0] -= file.name == "checkpoint.pt"
        if left[0] == 0:
            raise RuntimeError("killed")

    with mock.patch.object(common, "save", save_and_die), \
            pytest.raises(RuntimeError, match="killed"):
        yield


def results(out):
    """All samples and the log that a run left in its folder."""
    return {file.name: torch.load(file) if file.suffix == ".pt"
            else file.read_text(encoding="utf-8")
            for file in [*out.glob("samples*.pt"), *out.glob("log.csv")]}


def same(a, b):
    """Equal to the last bit, and the same files."""
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name]
        for name in a)


def one_line(capsys, run, *words, status=2):
    """run() must end with this status and one line on stderr that holds all words."""
    with pytest.raises(SystemExit) as stop:
        run()
    error = capsys.readouterr().err
    assert stop.value.code == status and error.count("\n") == 1
    for word in words:
        assert word in error


def make_no_figures(patch):
    """From here on axes take every call and plot nothing, and no picture is written."""
    def figure(rows, columns, *size):
        axes = numpy.empty((rows, columns), dtype=object)
        for place in numpy.ndindex(axes.shape):
            axes[place] = mock.MagicMock()
        return mock.MagicMock(), axes

    patch.setattr(common, "figure", figure)
    for name in ("save_figure", "save_panels", "plot_curves"):
        patch.setattr(common, name, lambda *args, **more: None)
    patch.setattr(importlib.import_module("03_unrolled_gan"), "save_animation", lambda *_: None)


def batches(images, size, seed=0, step=0):
    """What run.batches of a Run supplies after so many batches."""
    run = SimpleNamespace(args=SimpleNamespace(seed=seed), n_batches=step)
    return common.Run.batches(run, images, size)


def all_white(monkeypatch):
    """From here on every data set is 70 white pictures of 28 pixels."""
    white = common.Images(torch.full((70, 1, 28, 28), 255, dtype=torch.uint8),
                          torch.arange(70) % 10, "white")
    monkeypatch.setattr(common, "load_images", lambda args, device, train=True: white)


def folder_of_pictures(folder, n, side):
    """n pictures of `side` pixels, from black to red, in a new folder; its path as text."""
    folder.mkdir()
    for i in range(n):
        Image.new("RGB", (side, side), (255 * i // n, 0, 0)).save(folder / f"{i:02}.png")
    return str(folder)
