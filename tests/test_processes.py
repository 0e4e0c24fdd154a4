"""Several processes: torchrun starts every chapter as it stands, and Run shares the work."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import common
from in_two_processes import CHAPTERS, net_and_loss
from test_common import TEN, same_results

EPS = torch.finfo(torch.float64).eps


def torchrun(folder, *what):
    """Two processes on one core each: how they ended, and what they said."""
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         Path(__file__).parent / "in_two_processes.py", folder, *what],
        text=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    return run.returncode, run.stdout + run.stderr


def two_starts(folder):
    """Runs in which one process dies; in a second start these are taken up, and then all others."""
    folder = folder / "processes"
    folder.mkdir()
    killed, _ = torchrun(folder, "killed")
    return folder, killed, *torchrun(folder, "resumed", "whole", "gradients", "chapters")


@pytest.mark.beside(run=two_starts)
def test_the_averaged_gradient_is_that_of_the_whole_batch(beside):
    """Two halves of a batch of 8: the mean of two means of 4 is the mean of 8."""
    folder, _, status, said = beside
    assert status == 0, said
    found = [torch.load(folder / f"gradients{rank}.pt") for rank in (0, 1)]
    net, loss = net_and_loss()
    loss(*next(common.batches(TEN, 8, seed=0))).backward()
    size = max(p.grad.abs().max().item() for p in net.parameters())
    for p, *grads in zip(net.parameters(), *(part["grads"] for part in found)):
        assert torch.equal(*grads)
        assert_close(grads[0], p.grad, rtol=0, atol=100 * EPS * size)
    assert found[0]["log"] == found[1]["log"] and found[0]["log"][0]["loss"] == 0.5  # the mean


def test_half_of_the_batch_is_rejected():
    """The wrong twin: a process that keeps the gradient of its own half."""
    net, loss = net_and_loss()
    x, y = next(common.batches(TEN, 8, seed=0))
    whole, half = (torch.autograd.grad(loss(x[part], y[part]), net[1].weight)[0]
                   for part in (slice(None), slice(0, None, 2)))
    assert (whole - half).abs().max() > 1e-3 * whole.abs().max()


@pytest.mark.beside(run=two_starts)
def test_chapters_keep_equal_parameters_and_write_one_set_of_files(beside):
    folder, _, status, said = beside
    assert status == 0, said
    for name in CHAPTERS:
        both = [torch.load(folder / f"{name}{rank}.pt") for rank in (0, 1)]
        start, end = both[0][0], both[0][-1]
        assert same_results(end, both[1][-1]), name  # before they are shared
        assert not same_results(start, end)
        out = folder / name / "quick"
        files = {file.name for file in out.iterdir()}
        assert {"checkpoint.pt", "log.csv"} < files and not any(".tmp" in file for file in files)
        rows = (out / "log.csv").read_text().splitlines()
        assert len(rows) == 11, name  # a head, and one row for each step
    assert said.count("device cpu") == 3 + len(CHAPTERS)  # the first process alone speaks


@pytest.mark.beside(run=two_starts)
def test_a_killed_process_ends_the_other_and_the_run_goes_on_to_the_same_bits(beside):
    folder, killed, status, said = beside
    assert killed != 0 and status == 0, said
    first = re.search(r"a  step (\d+)/12", said)  # that is printed, of every second one
    assert first[1] == "6"  # the second start began with step 5
    for rank in (0, 1):
        resumed, whole = (torch.load(folder / f"{name}{rank}.pt") for name in ("resumed", "whole"))
        assert same_results(resumed, whole)


def test_a_batch_that_does_not_divide_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(common, "processes", lambda: 3)
    run = common.Run.__new__(common.Run)
    assert run.part(9) == 3
    for n, use in ((8, "--batch 6"), (2, "--batch 3")):
        with pytest.raises(SystemExit) as stop:
            run.part(n)
        assert stop.value.code == 2 and use in capsys.readouterr().err
