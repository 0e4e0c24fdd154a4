r"""06 - WAE by moments: an autoencoder whose codes are made to look like N(0, I).

Papers   Tolstikhin et al. 2018, arXiv:1711.01558 (Wasserstein autoencoder, MMD with the inverse
         multiquadratic kernel); the penalty by moments is the course's.
Idea     min mean (x - decode(z))² + λ penalty(z), z = encode(x): codes of a batch against N(0, I)
         mean, variance, kurtosis of each coordinate against 0, 1, 3                -> moment_loss()
         E k(z, z') + E k(u, u') - 2 E k(z, u), u ~ N(0, I): 0 only for equal laws      -> mmd_imq()
         λ = 0.001 * 2^epoch up to 2.048                                            -> weight()
See      pictures.png: reconstructions, samples, interpolations of three models; cdf.png: the codes
         against N(0, 1) while training; curves.png; limits.png: what moments do not see; log.csv,
         samples_{model}.pt, weights_{model}.pt. Printed: moments and MMD² of the codes, error,
         distance to the data.
         On MNIST: moments of the codes 0.000, 0.99, 2.94 (wanted: 0, 1, 3), on the test set -0.014,
         0.99, 2.94. The plain autoencoder decodes N(0, I) to fog: its codes have variance 10. From
         their own mean and variance it draws digits as near to the data (distance 0.398) as the
         moments do (0.402): fitting two numbers per coordinate does what the penalty does. What is
         missing is independence: the codes' MMD² to N(0, I) falls from 0.040 to 0.007 when each
         coordinate is shuffled by itself.
         A law on three points per coordinate has the moments 0, 1, 3; MMD tells it from N(0, 1) on
         one coordinate (0.43), and on 16 not at all (0.0001): it compares distances, and those of
         many independent coordinates look alike.
Time     3 min on 2 CPU cores, --quick 10 to 31 s.
Differs  from the course: λ doubles after each 14th of the run, not after an epoch; 16 latent
         coordinates, not 100. From Tolstikhin et al.: λ grows (there 10), 8 coordinates there.
Run      python 06_wae_moments.py
         python 06_wae_moments.py --z-dim 100 --models moments
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

import common

HIDDEN = 512                     # width of the layer beside the code, both sides
N_SAMPLES, N_CODES = 10_000, 2000  # pictures in samples_{model}.pt; codes compared with N(0, I)
SHOTS = (0.07, 0.25, 0.5, 1.0)   # shares of the training after which the CDF is kept


# --- the idea ----------------------------------------------------------------------------------

NORMAL = torch.tensor([[0.0], [1.0], [3.0]])  # mean, variance, kurtosis of N(0, 1)
SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # of the kernel: the code of Tolstikhin et al. 2018
EPOCHS = 14                      # parts of the training; λ doubles after each, 11 times


def moments(z):
    """Mean, variance and kurtosis of each coordinate of z [B, d]: three tensors [d].

    Population moments, without B - 1: var = E (z - mean)², kurtosis = E (z - mean)⁴ / var², which
    is 3 for a normal law (not the excess over it), and nan for a coordinate that is constant.
    Raises ValueError for fewer than 2 codes.
    """
    if z.ndim != 2 or len(z) < 2:
        raise ValueError(f"moments need codes [B, d] with B of 2 or more, not {tuple(z.shape)}")
    centred = z - z.mean(dim=0)
    variance = (centred ** 2).mean(dim=0)
    return z.mean(dim=0), variance, (centred ** 4).mean(dim=0) / variance ** 2


def moment_loss(z):
    """Mean over coordinates and moments of (mean - 0)², (variance - 1)², (kurtosis - 3)².

    Not 0 for a batch of N(0, I): about (1 + 2 + 24) / (3 B) from the luck of the draw.
    """
    found = torch.stack(moments(z))
    return F.mse_loss(found, NORMAL.to(found).expand_as(found))


def mmd_imq(z, z_prior):
    """MMD²(z, z_prior), unbiased, for k(a, b) = Σ_s C_s / (C_s + ‖a - b‖²), C_s = 2 d s.

    z, z_prior: [n, d], [m, d], n, m >= 2. Pairs of a point with itself are left out, so its mean is
    0 where both laws agree, and single values may be negative (Gretton et al. 2012, eq. 3). Raises
    ValueError for fewer than 2 points or codes of unequal length.
    """
    if min(len(z), len(z_prior)) < 2 or z.shape[1:] != z_prior.shape[1:]:
        raise ValueError(f"MMD needs two sets of 2 or more codes of equal length, not "
                         f"{tuple(z.shape)} and {tuple(z_prior.shape)}")

    def kernel(a, b):
        squares = (a ** 2).sum(dim=1)[:, None] + (b ** 2).sum(dim=1) - 2 * a @ b.T
        return sum(c / (c + squares) for c in (2 * a.shape[1] * scale for scale in SCALES))

    def within(a):
        k, n = kernel(a, a), len(a)
        return (k.sum() - k.diagonal().sum()) / (n * (n - 1))

    return within(z) + within(z_prior) - 2 * kernel(z, z_prior).mean()


def weight(step, steps):
    """λ at a step of 1 ... steps: 0.001, doubled after each of EPOCHS equal parts up to 2.048."""
    epoch = EPOCHS * (step - 1) // steps
    return 0.001 * 2 ** min(epoch, 11)


PENALTIES = {"ae": None, "moments": moment_loss,
             "mmd": lambda z: mmd_imq(z, torch.randn_like(z))}  # ae: the plain autoencoder


# --- model -------------------------------------------------------------------------------------

def channels(side):
    """Channels of the maps, largest map first; side of the smallest, 4 to 7 pixels if side >= 8."""
    halvings = max(1, int(math.log2(side / 4)))
    return [16 * 2 ** i for i in range(halvings)], side // 2 ** halvings


class Autoencoder(nn.Module):
    """encode: x [B, C, side, side] in [-1, 1] -> z [B, d_z], no noise; decode: z -> x_rec."""

    def __init__(self, c, side, d_z):
        super().__init__()
        widths, small = channels(side)
        features = widths[-1] * small ** 2
        layers = []
        for i, o in zip([c, *widths], widths):
            layers += [nn.Conv2d(i, o, kernel_size=4, stride=2, padding=1),
                       nn.BatchNorm2d(o), nn.SiLU()]
        self.encode = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, HIDDEN),
                                    nn.BatchNorm1d(HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, d_z))
        layers = [nn.Linear(d_z, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.SiLU(),
                  nn.Linear(HIDDEN, features), nn.Unflatten(1, (widths[-1], small, small))]
        for i, o in zip(widths[::-1], [*widths[-2::-1], c]):
            layers += [nn.BatchNorm2d(i), nn.SiLU(),
                       nn.ConvTranspose2d(i, o, kernel_size=4, stride=2, padding=1)]
        self.decode = nn.Sequential(*layers, nn.Tanh())


@torch.no_grad()
def in_parts(net, x):
    """net(x), a thousand at a time."""
    return torch.cat([net(part) for part in x.split(1000)])


# --- measures ----------------------------------------------------------------------------------

def code_report(z, n):
    """Moments of the codes z [N, d], means over the coordinates, and how far the worst one is off.

    mmd: MMD² between n of them and as many draws of N(0, I), which do not depend on z.
    """
    found = torch.stack(moments(z))
    prior = torch.randn(n, z.shape[1], generator=torch.Generator().manual_seed(0)).to(z)
    numbers = dict(zip(("mean", "variance", "kurtosis"), found.mean(dim=1).tolist()))
    worst = (found - NORMAL.to(z)).abs().amax(dim=1).tolist()
    return numbers | {f"{name} off": value for name, value in zip(numbers, worst)} \
        | {"moment loss": moment_loss(z).item(), "mmd": mmd_imq(z[:n], prior).item()}


def shuffled(z):
    """z [N, d] with each coordinate permuted over the examples by itself.

    All moments of all coordinates stay; what one coordinate says about another is gone.
    """
    return torch.stack([column[torch.randperm(len(z), device=z.device)] for column in z.T], dim=1)


def three_points(n, d):
    """n draws of d independent coordinates: -√3, 0, √3 with probabilities 1/6, 2/3, 1/6.

    Mean 0, variance 1 and kurtosis 3, as N(0, 1), and far from it.
    """
    p = torch.tensor([1 / 6, 2 / 3, 1 / 6])
    return 3 ** 0.5 * (torch.multinomial(p, n * d, replacement=True).view(n, d) - 1.0)


def nearest_distance(x, images):
    """Mean distance of x [N, C, H, W] to the nearest of 10,000 training pictures, root mean square.

    In [-1, 1] units. Blur lowers it: read it beside the picture.
    """
    train = common.to_float(images.x[:10_000]).flatten(1)
    return (torch.cdist(x.flatten(1), train).amin(dim=1) / train.shape[1] ** 0.5).mean().item()


# --- train -------------------------------------------------------------------------------------

def train(args, name, images, test, device, saved, done):
    """Trains one model; returns its log, numbers and pictures, and writes samples_{name}.pt and
    weights_{name}.pt.

    saved: the checkpoint to go on from, or None; done: results of the runs before, kept in it.
    """
    torch.manual_seed(args.seed)
    penalty, (c, side) = PENALTIES[name], images.x.shape[1:3]
    u_fixed = torch.randn(args.n_samples, args.z_dim).to(device)  # the same for every model
    net = Autoencoder(c, side, args.z_dim).to(device)
    opt = torch.optim.Adam(net.parameters(), lr=args.lr, fused=True)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(opt, args.steps)
    parts = dict(net=net, opt=opt, rate=rate)

    first, log, shots = 0, [], {}
    if saved:
        first, log, shots = saved["step"], saved["log"], saved["shots"]
        common.restore(saved, parts)
    batches = common.batches(images, args.batch, args.seed, first)
    show = common.progress(name, args.steps, args.batch, first)
    shot_steps = {math.ceil(share * args.steps) for share in SHOTS}

    with common.ctrl_c() as pressed:
        for step in range(first + 1, args.steps + 1):
            # x -> z -> x_rec: descend the error plus λ times the distance of the codes to N(0, I)
            x = next(batches)[0]
            z = net.encode(x)
            mse = F.mse_loss(net.decode(z), x)
            lam = weight(step, args.steps) if penalty else 0.0
            distance = penalty(z) if penalty else moment_loss(z.detach())
            loss = mse + lam * distance
            opt.zero_grad()
            loss.backward()
            opt.step()
            rate.step()

            common.check_finite(step, loss=loss.item())
            show(step, mse=mse.item(), penalty=distance.item())
            if common.due(step, args.steps, 56):
                log.append({"model": name, "step": step, "mse": mse.item(),
                            "penalty": distance.item(), "weighted": lam * distance.item()})
            if step in shot_steps:
                net.eval()
                shots[step] = in_parts(net.encode, common.to_float(test.x[:args.n_codes])).cpu()
                net.train()
            if common.due(step, args.steps, 10) or pressed():
                common.save_checkpoint(args, parts, model=name, step=step, log=log, shots=shots,
                                       done=done)
            if pressed():
                common.stop(step)

    net.eval()
    z = in_parts(lambda x: net.encode(common.to_float(x)), images.x)
    samples = in_parts(net.decode, u_fixed)
    fitted = in_parts(net.decode, z.mean(dim=0) + z.std(dim=0) * u_fixed[:1000])
    common.save(common.to_uint8(samples).cpu(), args.out / f"samples_{name}.pt")
    common.save(net.state_dict(), args.out / f"weights_{name}.pt")
    x = common.to_float(test.x)
    z_test = in_parts(net.encode, x)
    return {"log": log, "shots": shots, "pictures": pictures(net, x, z, samples, fitted),
            "codes": z[:args.n_codes].cpu(),
            "mse": F.mse_loss(in_parts(net.decode, z_test), x).item(),
            "distance": nearest_distance(samples[:1000], images),
            "fitted distance": nearest_distance(fitted, images),
            "train": code_report(z, args.n_codes), "test": code_report(z_test, args.n_codes)}


def pictures(net, x, z, samples, fitted):
    """What the figures show, uint8: test pictures x, reconstructions, samples, and so on.

    between: decoded (1 - alpha) z_a + alpha z_b for alpha = 0, 1/8, ..., 1 in a row; four rows for
    a picture and the one most like it, four for a picture and the next in the data.
    """
    near = x[:500].flatten(1)
    apart = torch.cdist(near, near).fill_diagonal_(math.inf)  # a picture is not like itself
    x = x[torch.arange(max(32, len(near))) % len(x)]  # a small folder has fewer than are shown
    pairs = [(i, apart[i % len(near)].argmin().item()) for i in range(4)] + \
        [(i, i + 1) for i in range(0, 8, 2)]
    a, b = (in_parts(net.encode, x[list(side)]) for side in zip(*pairs))
    alpha = torch.linspace(0, 1, 9, device=x.device).view(9, 1, 1)
    between = ((1 - alpha) * a + alpha * b).transpose(0, 1).flatten(0, 1)
    kept = {"test": x[:32], "rec": in_parts(net.decode, in_parts(net.encode, x[:32])),
            "samples": samples[:64], "fitted": fitted[:64],
            "between": in_parts(net.decode, between),
            "shuffled": in_parts(net.decode, shuffled(z)[:64])}
    return {name: common.to_uint8(x).cpu() for name, x in kept.items()}


# --- figures -----------------------------------------------------------------------------------

def figures(args, images, done):
    """pictures.png, cdf.png, curves.png and log.csv."""
    def panels(name, run):
        kept = run["pictures"]
        pairs = torch.stack([kept["test"], kept["rec"]], dim=1).flatten(0, 1)
        return name, [(f"test pictures, each left of its\nreconstruction (mse {run['mse']:.3g})",
                       common.panel(pairs)),
                      (f"samples: decoded N(0, I)\n(distance {run['distance']:.3g})",
                       common.panel(kept["samples"])),
                      (f"samples: the codes' own mean\nand variance "
                       f"({run['fitted distance']:.3g})", common.panel(kept["fitted"])),
                      ("training codes decoded, each\ncoordinate shuffled",
                       common.panel(kept["shuffled"])),
                      ("between two pictures: like\n(top four rows) and unlike ones",
                       common.panel(kept["between"], 9))]

    title = f"Autoencoders on {images.name}, seed {args.seed}, {args.z_dim} latent coordinates"
    common.save_panels(args.out / "pictures.png", [panels(*item) for item in done.items()], title)
    common.save_panels(args.out / "cdf.png", [
        (name, [(f"step {step:,}", lambda ax, z=z: draw_cdf(ax, z))
                for step, z in run["shots"].items()]) for name, run in done.items()],
        f"{title}\nCDF of each coordinate of the test codes (blue), of N(0, 1) (black)")
    common.save_panels(args.out / "curves.png", [("", [
        (name, lambda ax, run=run: draw_losses(ax, run["log"])) for name, run in done.items()])],
        title)
    common.write_log(args.out / "log.csv", [row for run in done.values() for row in run["log"]])


def draw_cdf(ax, z):
    """Empirical CDFs of the coordinates of z [N, d], at most 20 of them, over the normal one."""
    shares = (torch.arange(len(z)) + 0.5) / len(z)
    for column in z.T[:20]:
        ax.plot(column.sort().values.numpy(), shares.numpy(), "C0", linewidth=0.5, alpha=0.6)
    line = torch.linspace(-4, 4, 200)
    ax.plot(line.numpy(), torch.special.ndtr(line).numpy(), "black", linewidth=1.5)
    ax.set(xlim=(-4, 4), ylim=(0, 1), yticks=[])


def draw_losses(ax, log):
    """Error, penalty and weighted penalty against the step, on a log axis: without MMD² < 0."""
    for column in ("mse", "penalty", "weighted"):
        rows = [row for row in log if row[column] > 0]
        ax.semilogy([row["step"] for row in rows], [row[column] for row in rows], label=column,
                    linewidth=1)
    ax.set_xlabel("step")
    ax.legend(fontsize=7)


def draw_dependence(ax, z):
    """Those two coordinates of z [N, d] whose squares are correlated most."""
    related = torch.corrcoef((z ** 2).T).fill_diagonal_(0).abs()
    i, j = divmod(related.argmax().item(), z.shape[1])
    ax.scatter(*z[:, [i, j]].T.numpy(), s=1)


def limits(args, done):
    """limits.png; returns rows for a table: laws that moments or MMD can tell from N(0, I)."""
    torch.manual_seed(args.seed)
    prior = torch.randn(args.n_codes, args.z_dim)
    laws = {"N(0, I)": torch.randn(args.n_codes, args.z_dim),
            "three points, one coordinate": three_points(args.n_codes, 1),
            f"three points, {args.z_dim} coordinates": three_points(args.n_codes, args.z_dim)}
    for name, run in done.items():
        laws |= {f"codes of {name}": run["codes"], f"{name}, shuffled": shuffled(run["codes"])}
    common.save_panels(args.out / "limits.png", [("", [
        ("one coordinate of the\nlaw on three points",
         lambda ax: ax.hist(laws["three points, one coordinate"].numpy(), 41, range=(-3, 3))),
        *((f"codes of {name}: the two\nmost dependent coordinates",
           lambda ax, z=run["codes"]: draw_dependence(ax, z))
          for name, run in done.items() if PENALTIES[name])])],
        f"What moments do not see, seed {args.seed}")
    return [[name, f"{moment_loss(z).item():.4f}",
             f"{mmd_imq(z, prior[:, :z.shape[1]]).item():.5f}"] for name, z in laws.items()]


# --- main --------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = common.parser(__doc__, __file__)
    g = p.add_argument_group("model")
    g.add_argument("--models", nargs="+", choices=PENALTIES, default=list(PENALTIES),
                   metavar="MODEL", help=f"{', '.join(PENALTIES)}: the penalty on the codes")
    g.add_argument("--z-dim", type=common.positive_int, default=16, help="latent coordinates")
    g = p.add_argument_group("training")
    g.add_argument("--steps", type=common.positive_int, default=1000, help="of each model")
    g.add_argument("--batch", type=common.positive_int, default=128, help="pictures in a batch")
    g.add_argument("--lr", type=common.positive_float, default=4e-3, help="Adam's rate, falls to 0")
    p.set_defaults(n_samples=N_SAMPLES, n_codes=N_CODES)
    args = common.parse(p, argv, quick=dict(data="digits", steps=10, n_samples=1000, n_codes=500))
    args.models = list(dict.fromkeys(args.models))
    return args


def check(args, images, test):
    """Ends the run if the flags do not fit the data."""
    widths, small = channels(images.x.shape[2])
    common.check_side(images, small * 2 ** len(widths))
    if min(args.batch, len(images.x)) < 2:
        common.fail("moments are those of a batch: use --batch 2 or more")
    if args.z_dim < 2:
        common.fail("dependence takes two coordinates: use --z-dim 2 or more")
    if len(test.x) < 2:
        common.fail(f"{images.name} has one test picture, and moments need two: give a folder "
                    "with at least 20")


def main(argv=None):
    args = parse_args(argv)
    device = common.start(args)
    images = common.load_images(args, device)
    test = common.load_images(args, device, train=False)
    check(args, images, test)
    saved = common.load_checkpoint(args)
    done = saved["done"] if saved else {}
    for name in args.models:
        if name not in done:
            resumed = saved if saved and saved["model"] == name else None
            done[name] = train(args, name, images, test, device, resumed, dict(done))
    figures(args, images, done)
    common.print_table(["law", "moment loss", "MMD^2 to N(0, I)"], limits(args, done))
    columns = list(next(iter(done.values()))["test"])
    common.print_table(["codes", *columns], [
        [f"{name}, {part}", *(f"{run[part][column]:.3g}" for column in columns)]
        for name, run in done.items() for part in ("train", "test")])
    columns = ["mse", "distance", "fitted distance"]
    common.print_table([f"{images.name}: model", *columns], [
        [name, *(f"{run[column]:.4g}" for column in columns)] for name, run in done.items()])


if __name__ == "__main__":
    main()
