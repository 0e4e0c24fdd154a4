"""What test_processes.py starts by torchrun: tests/in_two_processes.py FOLDER WHAT ...

WHAT: killed, resumed, whole, gradients, chapters. Each process writes what it holds into FOLDER.
"""

import importlib
import os
import signal
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import common
from test_common import TEN, arguments, toy

CHAPTERS = {"01_vae": ["--models", "vae"], "02_gan_losses": ["--loss", "wgan-gp"],
            "03_unrolled_gan": ["-k", "2"], "07_sn_wgan_gp": ["--models", "sn"]}


def net_and_loss():
    """A net without batch norm, in float64, and the loss of a batch."""
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 5), torch.nn.Tanh(),
                              torch.nn.Linear(5, 1)).double()
    return net, lambda x, y: ((net(x.double())[:, 0] - y) ** 2).mean()


def gradients(folder):
    """Of the first batch, and the weights of a process that starts elsewhere."""
    with common.Run(arguments(folder / "gradients")) as run:
        for run.name in run.each(["a"]):
            net, loss = net_and_loss()
            if common.rank():
                torch.nn.init.zeros_(net[1].weight)  # the first's are what counts
            batches = run.batches(TEN, 8)
            for _ in run.steps(1, net=net):
                loss(*next(batches)).backward(inputs=tuple(net.parameters()))
                run.log(loss=float(common.rank()))
    torch.save({"grads": [p.grad for p in net.parameters()], "log": run.rows},
               folder / f"gradients{common.rank()}.pt")


def chapters(folder):
    """Ten steps each; what both processes hold after the last, before it is shared."""
    share = common.share_state
    common.save_figure = common.save_animation = lambda *args, **more: None  # the test has no use
    for name, flags in CHAPTERS.items():
        chapter, held = importlib.import_module(name), []

        def spy(parts):
            held.append({key: [p.detach().clone() for p in part.parameters()]
                         for key, part in parts.items() if isinstance(part, torch.nn.Module)})
            share(parts)
        common.share_state = spy
        chapter.main(["--quick", "--steps", "10", "--batch", "8", "--data-dir",
                      str(folder.parent / "data"), "--out", str(folder / name), *flags])
        torch.save(held, folder / f"{name}{common.rank()}.pt")


def killed(folder):
    """The second process dies in the midst of a step, with a sixth of the run done."""
    def die(run):
        if (common.rank(), run.name, run.step) == (1, "a", 5):
            os.kill(os.getpid(), signal.SIGKILL)
    toy(arguments(folder / "killed"), in_step=die)


def resumed(folder):
    """The runs of killed(), taken up again."""
    done = toy(arguments(folder / "killed", "--resume"))
    torch.save(done, folder / f"resumed{common.rank()}.pt")


def whole(folder):
    """The toy runs of test_common.py, in which no process dies."""
    torch.save(toy(arguments(folder / "whole")), folder / f"whole{common.rank()}.pt")


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    for what in sys.argv[2:]:
        globals()[what](Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
