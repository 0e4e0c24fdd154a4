"""Several processes: torchrun starts every chapter as it stands, and Run shares the work."""

import os
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
    """Two processes on one core each; their folder, how they ended, and what they said."""
    folder.mkdir(exist_ok=True)
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         Path(__file__).parent / "in_two_processes.py", folder, *what],
        text=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    return folder, run.returncode, run.stdout + run.stderr


def straight(folder):
    """All that goes to its end, in one start of the two processes."""
    return torchrun(folder / "straight", "gradients", "whole", "chapters")


def killed_then_resumed(folder):
    """The runs of "whole" in which one process dies, and these runs taken up again."""
    return [torchrun(folder / "killed", "killed"), torchrun(folder / "killed", "whole")]


@pytest.mark.beside(run=straight)
def test_the_averaged_gradient_is_that_of_the_whole_batch(beside):
    """Two halves of a batch of 8: the mean of two means of 4 is the mean of 8."""
    folder, status, said = beside
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


@pytest.mark.beside(run=straight)
def test_chapters_keep_equal_parameters_and_write_one_set_of_files(beside):
    folder, status, said = beside
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
    assert said.count("device cpu") == 2 + len(CHAPTERS)  # the first process alone speaks


@pytest.mark.beside(run=straight)
@pytest.mark.beside(run=killed_then_resumed)  # the nearest is the fixture beside
def test_a_killed_process_ends_the_other_and_the_run_goes_on_to_the_same_bits(beside, second_core):
    (_, killed, _), (resumed, again, said_again) = beside
    folder, status, said = second_core[straight].result()
    assert status == 0 and again == 0, said + said_again
    assert killed != 0 and "step 5/12" not in said_again.partition("b  step")[0].splitlines()[0]
    for rank in (0, 1):
        results = [torch.load(folder / f"done{rank}.pt") for folder in (folder, resumed)]
        assert same_results(*results)


def test_a_batch_that_does_not_divide_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(common, "processes", lambda: 3)
    run = common.Run.__new__(common.Run)
    assert run.part(9) == 3
    for n, use in ((8, "--batch 6"), (2, "--batch 3")):
        with pytest.raises(SystemExit) as stop:
            run.part(n)
        assert stop.value.code == 2 and use in capsys.readouterr().err
