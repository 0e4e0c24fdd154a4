"""Several processes, which torchrun starts: Run shares the work among them.

torchrun starts this file with a folder and names of TASKS. Each process writes there what they
return.
"""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch.testing import assert_close

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import common
from harness import batches
from test_common import TEN, arguments, in_step, toy


def net_and_loss():
    """A net without batch norm, in float64, and the loss of a batch."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    return net, lambda x, y: ((net(x.double())[:, 0] - y) ** 2).mean()


def gradients(folder):
    """Of the first batch; one process has other weights, and those of the first are what counts."""
    run = common.Run(arguments(folder / "gradients"))
    for run.name in run.each(["a"]):
        net, loss = net_and_loss()
        if common.RANK:
            nn.init.zeros_(net[1].weight)
        stream = run.batches(TEN, 8)
        for _ in run.steps(1, net=net):
            loss(*next(stream)).backward(inputs=tuple(net.parameters()))
            noise = torch.randn(5)
    return [p.grad for p in net.parameters()], noise


def chapter(folder):
    """Ten steps: the parameters at the start and at the end, before the first shares its own, and
    how many files were written."""
    state, replace = {}, mock.Mock(wraps=os.replace)
    share = common.share
    common.save_figure = lambda *args, **more: None  # the test has no use for them
    common.share = lambda nets, seed: (share(nets, seed), state.update(nets))
    common.os.replace = replace
    importlib.import_module("03_unrolled_gan").main([
        "-k", "2", "--data", "digits", "--quick", "--steps", "10", "--batch", "8", "--data-dir",
        str(folder / "data"), "--out", str(folder / "chapter")])
    return [p.detach() for net in (state["G"], state["D"]) for p in net.parameters()], \
        replace.call_count


def die(run):
    if common.RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)


TASKS = {"gradients": gradients, "chapter": chapter,
         "killed": lambda folder: toy(arguments(folder / "k"), in_step=in_step(5, "a", die)),
         "resumed": lambda folder: toy(arguments(folder / "k", "--resume")),
         "whole": lambda folder: toy(arguments(folder / "w"))}


def torchrun(folder, *tasks):
    """Two processes: how they ended, and what they said."""
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--nproc-per-node", "2", __file__, folder, *tasks],
                         text=True, capture_output=True, timeout=300,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    return run.returncode, run.stdout + run.stderr


def two_starts(folder):
    """The folder, what both processes return for a task, and what was said after the kill."""
    folder = folder / "processes"
    (folder / "data").mkdir(parents=True)
    torch.save([common.make_digits(400, seed) for seed in (1, 0)],
               folder / "data" / "synthetic_digits.pt")
    status, said = torchrun(folder, "killed")
    assert status != 0 and not list(folder.glob("killed*.pt")), said  # none has come to its end
    status, said = torchrun(folder, "resumed", "whole", "gradients", "chapter")
    assert status == 0, said
    return folder, lambda task: [torch.load(folder / f"{task}{rank}.pt") for rank in (0, 1)], said


@pytest.mark.beside(run=two_starts)
def test_the_averaged_gradient_is_that_of_the_whole_batch(beside):
    """Two halves of a batch of 8: the mean of two means of 4 is the mean of 8."""
    (first, noise), (second, other_noise) = beside[1]("gradients")
    net, loss = net_and_loss()
    loss(*next(batches(TEN, 8, seed=0))).backward()
    size = max(p.grad.abs().max().item() for p in net.parameters())
    for p, mine, other in zip(net.parameters(), first, second):
        assert torch.equal(mine, other)
        assert_close(mine, p.grad, rtol=0, atol=100 * size * torch.finfo(torch.float64).eps)
    assert (noise != other_noise).all()  # each process samples its own


def test_half_of_the_batch_is_rejected():
    """The wrong twin: a process that keeps the gradient of its own half."""
    net, loss = net_and_loss()
    x, y = next(batches(TEN, 8, seed=0))
    whole, half = (torch.autograd.grad(loss(x[part], y[part]), net[1].weight)[0]
                   for part in (slice(None), slice(0, None, 2)))
    assert (whole - half).abs().max() > 1e-3 * whole.abs().max()


@pytest.mark.beside(run=two_starts)
def test_a_chapter_keeps_equal_parameters_and_writes_one_set_of_files(beside):
    folder, returned, said = beside
    (weights, files), (other, other_files) = returned("chapter")
    assert all(map(torch.equal, weights, other)) and files > 0 == other_files
    out = folder / "chapter" / "quick"
    assert (out / "checkpoint.pt").exists() and not list(out.glob(".*"))
    assert (out / "log.csv").read_text(encoding="utf-8").count("\n") == 11  # a head, ten steps
    assert said.count("device cpu") == 4  # the first process alone speaks, once for each task


@pytest.mark.beside(run=two_starts)
def test_a_killed_process_ends_the_other_and_the_run_resumes_to_the_same_bits(beside):
    _, returned, said = beside
    assert "continuing after step 4 of a" in said
    (first, second), (whole, other) = returned("resumed"), returned("whole")
    assert first == whole  # the second process has a log of its own losses, which nobody sees
    assert all(second[name]["weight"] == other[name]["weight"] for name in "ab")


def test_all_processes_get_equally_many_pictures(monkeypatch):
    """A batch of 8 for three processes: two each, all different; two are left out."""
    monkeypatch.setattr(common, "WORLD", 3)
    seen = []
    for rank in range(3):
        monkeypatch.setattr(common, "RANK", rank)
        seen.append(next(batches(TEN, 8, seed=0))[1].tolist())
    assert list(map(len, seen)) == [2, 2, 2] and len({*sum(seen, [])}) == 6


if __name__ == "__main__":
    for task in sys.argv[2:]:
        file = Path(sys.argv[1], f"{task}{common.RANK}.pt")
        torch.save(TASKS[task](file.parent), file)
