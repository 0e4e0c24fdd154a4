"""Ways to interrupt a chapter and to compare what it left."""

import contextlib
from unittest import mock

import pytest
import torch

import common


@contextlib.contextmanager
def killed_after(saves):
    """Within it the run dies right after that many checkpoints."""
    keep, left = common.save_checkpoint, [saves]

    def save_and_die(*args, **state):
        keep(*args, **state)
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("killed")

    with mock.patch.object(common, "save_checkpoint", save_and_die), \
            pytest.raises(RuntimeError, match="killed"):
        yield


def results(out):
    """All samples and the log that a run left in its folder."""
    return {file.name: torch.load(file) if file.suffix == ".pt" else file.read_text()
            for file in [*out.glob("samples*.pt"), out / "log.csv"]}


def same(a, b):
    """Equal to the last bit, and the same files."""
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name]
        for name in a)


def rejected(prop, twin, *case):
    """The property fails for the wrong twin."""
    try:
        prop(twin, *case)
    except AssertionError:
        return True
    return False
