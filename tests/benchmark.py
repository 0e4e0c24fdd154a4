"""Speed and memory, measured here and now: python tests/benchmark.py, with nothing else running."""

import importlib
import itertools
import resource
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent.parent))
import common

unrolled = importlib.import_module("03_unrolled_gan")


def seconds(run, least=1.0):
    """Seconds of one call of run(), the best of three bursts of at least `least` seconds in all."""
    run()
    best, calls = float("inf"), 1
    for _ in range(3):
        while True:
            began = time.perf_counter()
            for _ in range(calls):
                run()
            spent = time.perf_counter() - began
            if spent >= least / 3:
                break
            calls *= 2
        best = min(best, spent / calls)
    return best


def loaders():
    """Images/s into float batches of 64 from 60,000 pictures of MNIST's shape."""
    x = torch.randint(256, (60_000, 1, 28, 28), dtype=torch.uint8)
    stream = common.batches(common.Images(x, None, "noise"), 64, seed=0)
    ours = 64 / seconds(lambda: next(stream))
    loader = DataLoader(TensorDataset(x), batch_size=64, shuffle=True)
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    theirs = 64 / seconds(lambda: next(endless)[0].float() / 127.5 - 1)
    return [["common.batches", f"{ours:,.0f}", f"{ours / theirs:.0f} x"],
            ["DataLoader", f"{theirs:,.0f}", "1 x"]]


def generator_steps():
    """Milliseconds of one G step for each k: absolute, and as a multiple of k = 0."""
    rows = []
    for name, nets, shape in (("ring", unrolled.plane_nets, (2,)),
                              ("images", lambda d_z: unrolled.image_nets(d_z, 1, 28, 28),
                               (1, 28, 28))):
        setting = unrolled.SETTINGS[name]
        for exact in (True, False):
            first = None
            for k in (0, 1, 5, 10):
                torch.manual_seed(0)
                G, D = nets(setting["d_z"])
                x = torch.randn(setting["batch"], *shape)
                z = torch.randn(setting["batch"], setting["d_z"])

                def step():
                    loss = unrolled.unrolled_loss_g(D, x, G(z), k, setting["eta"], exact,
                                                    setting["saturating"])
                    torch.autograd.grad(loss, tuple(G.parameters()))
                spent = seconds(step)
                first = first or spent
                rows.append([name, "exact" if exact else "rollback", k, f"{1e3 * spent:.2f}",
                             f"{spent / first:.1f} x"])
    return rows


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    common.print_table(["loader", "images/s", "ratio"], loaders())
    print()
    common.print_table(["nets", "method", "k", "ms per G step", "ratio"], generator_steps())
    print()
    began = time.perf_counter()
    common.draw_digits(24_000, seed=0)
    print(f"24,000 digits drawn in {time.perf_counter() - began:.1f} s")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
