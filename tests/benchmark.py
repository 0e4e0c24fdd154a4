"""Speed and memory, measured here and now: python tests/benchmark.py, with nothing else running."""

import cProfile
import contextlib
import importlib
import io
import itertools
import pstats
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent.parent))
import common

losses = importlib.import_module("02_gan_losses")
unrolled = importlib.import_module("03_unrolled_gan")
inversion = importlib.import_module("04_inversion")
critics = importlib.import_module("07_sn_wgan_gp")


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
                              ("pictures", lambda d_z: unrolled.image_nets(d_z, 1, 28, 28),
                               (1, 28, 28))):
        setting = unrolled.SETTINGS.get(name, unrolled.PICTURES)
        for exact in (True, False):
            first = None
            for k in (0, 1, 5, 10):
                torch.manual_seed(0)
                G, D = nets(setting["z_dim"])
                x = torch.randn(setting["batch"], *shape)
                z = torch.randn(setting["batch"], setting["z_dim"])

                def step():
                    loss = unrolled.unrolled_loss_g(D, x, G(z), k, setting["eta"], exact,
                                                    saturating=False)
                    torch.autograd.grad(loss, tuple(G.parameters()))
                spent = seconds(step)
                first = first or spent
                rows.append([name, "exact" if exact else "rollback", k, f"{1e3 * spent:.2f}",
                             f"{spent / first:.1f} x"])
    return rows


def upsampling_nets():
    """The DCGAN of a much-used collection (PyTorch-GAN, dcgan.py) at its published settings."""
    def block(i, o, norm):
        return [nn.Conv2d(i, o, kernel_size=3, stride=2, padding=1), nn.LeakyReLU(0.2),
                nn.Dropout2d(0.25), *([nn.BatchNorm2d(o)] if norm else [])]

    def up(i, o):
        return [nn.Upsample(scale_factor=2), nn.Conv2d(i, o, kernel_size=3, padding=1),
                nn.BatchNorm2d(o), nn.LeakyReLU(0.2)]
    G = nn.Sequential(nn.Linear(100, 128 * 64), nn.Unflatten(1, (128, 8, 8)), nn.BatchNorm2d(128),
                      *up(128, 128), *up(128, 64), nn.Conv2d(64, 1, kernel_size=3, padding=1),
                      nn.Tanh())
    D = nn.Sequential(*block(1, 16, False), *block(16, 32, True), *block(32, 64, True),
                      *block(64, 128, True), nn.Flatten(), nn.Linear(512, 1), nn.Flatten(0))
    return G, D


def gan_step(G, D, x, d_z):
    """Forward, backward and optimiser of one D and one G step, on the same batch again and again.

    D: x -> logits.
    """
    opt_d, opt_g = (torch.optim.Adam(net.parameters(), lr=1e-4, fused=True) for net in (D, G))

    def step():
        x_fake = G(torch.randn(len(x), d_z))
        real, fake = D(torch.cat([x, x_fake.detach()])).split(len(x))
        loss_d = losses.bce_d(real, fake)
        opt_d.zero_grad()
        loss_d.backward()
        opt_d.step()
        loss_g = losses.nonsaturating_g(D(x_fake))
        opt_g.zero_grad()
        loss_g.backward(inputs=tuple(G.parameters()))
        opt_g.step()
    return step


def gan_steps():
    """Pictures/s of one training step at batch 64, and what chapter 02's loop adds to it."""
    theirs = 64 / seconds(gan_step(*upsampling_nets(), torch.rand(64, 1, 32, 32), 100), least=6)
    images = common.Images(torch.randint(256, (60_000, 1, 28, 28), dtype=torch.uint8), None, "")
    losses.N_SAMPLES, profile = 64, cProfile.Profile()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        args = losses.parse_args(["--out", out])
        with common.Run(args) as run:
            method = losses.METHODS["nonsaturating"](args, classes=10)
            for _ in run.each(["nonsaturating"]):
                began = time.perf_counter()
                profile.runcall(losses.train, run, args, method, images)
                loop = (time.perf_counter() - began) / args.steps
    spent = pstats.Stats(profile).stats.items()
    work = {("module.py", "_call_impl"), ("_tensor.py", "backward"), ("adam.py", "step"),
            ("02_gan_losses.py", "bce_d"), ("02_gan_losses.py", "nonsaturating_g")}
    inside = sum(row[3] for (file, _, name), row in spent if (Path(file).name, name) in work)
    print("outside forward, backward, optimiser: "
          f"{100 * (1 - inside / loop / args.steps):.1f} % of chapter 02's loop")
    return [[name, f"{speed:,.0f}", f"{speed / theirs:.1f} x"] for name, speed in (
        ("02_gan_losses, its loop", 64 / loop), ("PyTorch-GAN's dcgan.py", theirs))]


def critic_steps():
    """Milliseconds of a step of D for each model of chapter 07, and as a multiple of the first."""
    rows, first = [], None
    x, x_fake = torch.rand(2, 64, 1, 28, 28)
    for name, model in critics.MODELS.items():
        D = critics.discriminator(1, 28, model.sn)
        opt = torch.optim.Adam(D.parameters(), lr=1e-4, fused=True)

        def step():
            loss = model.loss_d(D, x, x_fake)
            opt.zero_grad()
            loss.backward()
            opt.step()
            if model.clip < float("inf"):
                critics.clip(D, model.clip)
        spent = seconds(step)
        first = first or spent
        rows.append([name, f"{1e3 * spent:.1f}", f"{spent / first:.2f} x"])
    return rows


def inversions():
    """Steps of one start for one picture each second: one at a time, and many in one batch."""
    G = inversion.generator(128, 1, 28).eval().requires_grad_(False)
    rows, alone = [], None
    for pictures, starts in ((1, 1), (10, 5), (100, 5), (200, 5)):
        x, z0 = torch.rand(pictures, 1, 28, 28), torch.randn(pictures, starts, 128)
        steps = max(4, 1000 // (pictures * starts))
        speed = pictures * starts * steps / seconds(
            lambda: inversion.invert(G, x, z0, steps, 0.1), least=3)
        alone = alone or speed
        rows.append([f"{pictures} x {starts}", f"{speed:,.0f}", f"{speed / alone:.1f} x"])
    return rows


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    common.print_table(["loader", "images/s", "ratio"], loaders())
    print()
    common.print_table(["nets", "method", "k", "ms per G step", "ratio"], generator_steps())
    print()
    common.print_table(["GAN step, batch 64", "pictures/s", "ratio"], gan_steps())
    print()
    common.print_table(["D step, batch 64", "ms", "ratio"], critic_steps())
    print()
    common.print_table(["inverted pictures x starts", "steps/s", "ratio"], inversions())
    print()
    began = time.perf_counter()
    common.draw_digits(24_000, seed=0)
    print(f"24,000 digits drawn in {time.perf_counter() - began:.1f} s")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
