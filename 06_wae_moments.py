r"""06 - WAE by moments: an autoencoder whose codes should look like N(0, I).

Papers   Tolstikhin et al. 2018, arXiv:1711.01558: the Wasserstein autoencoder.
         The penalty by moments is the course's.
Idea     min mean (x - decode(z))² + λ penalty(z), z = encode(x). The penalty is
         small if the codes of a batch look like N(0, I): each coordinate has
         mean 0, variance 1, kurtosis 3                         -> moment_loss()
         or the maximum mean discrepancy of codes and draws u of N(0, I) is 0:
         MMD² = E k(z, z') + E k(u, u') - 2 E k(z, u), k a kernel   -> mmd_imq()
         λ = 0.001, doubled after each 14th of the steps, to 2.048 -> weight()
See      pictures.png: reconstructions, samples, and the way between two codes.
         cdf.png: the codes against N(0, 1) during the training. limits.png and
         the first table: distributions that are not normal and have a small
         penalty. On MNIST the codes of the plain autoencoder have variance 27,
         so samples of N(0, I) decode to a blur; with moments the variance is
         0.99, and the samples are digits.
Differs  In the course λ doubles after each epoch, and z has 100 coordinates; 8,
         as here, in Tolstikhin et al., whose λ is 10 at all steps, and whose
         error is a sum over the pixels.
Try      Write 1.8 for the 3 in NORMAL, the kurtosis of a uniform distribution.
         What do the curves in cdf.png become? Predict, then run.
Run      python 06_wae_moments.py --models moments
"""

import math
from functools import partial
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

import common

HIDDEN = 512                     # width of the layer beside the code, both sides
N_SAMPLES = 10_000               # pictures in samples_{model}.pt
N_PATHS = 1000                   # test pictures in paths_{model}.pt
N_CODES = 2000                   # codes that are compared with N(0, I)
SHOTS = (0.05, 0.2, 0.5, 1.0)    # shares of a training after which codes and pictures are kept


# --- the idea ----------------------------------------------------------------------------------

NORMAL = torch.tensor([[0.0], [1.0], [3.0]])  # mean, variance, kurtosis of N(0, 1)
SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # of the kernel: the code of Tolstikhin et al. 2018
PARTS = 14                       # λ doubles after each of the first 11 of these parts


def moments(z):
    """Mean, variance and kurtosis of each coordinate of z [B, d]: three tensors [d].

    Averages over B, not B - 1: variance = mean (z - mean)², kurtosis = mean (z - mean)⁴ /
    variance², which is 3 for a normal distribution (not the excess over it), and nan for a
    coordinate that is constant, or whose deviations are below about 1e-11 in float32. A constant
    coordinate has the variance 0, exactly, even if its mean is rounded. Raises ValueError if z does
    not have two dimensions, or has fewer than 2 codes.
    """
    if z.ndim != 2 or len(z) < 2:
        raise ValueError(f"moments need codes [B, d] with B of 2 or more, not {tuple(z.shape)}")
    constant = (z == z[0]).all(dim=0)  # the mean may be rounded, and z - mean not be 0 then
    centred = (z - z.mean(dim=0)).masked_fill(constant, 0)
    variance = (centred ** 2).mean(dim=0)
    return z.mean(dim=0), variance, (centred ** 4).mean(dim=0) / variance ** 2


def moment_loss(z):
    """Mean over coordinates and moments of (mean - 0)², (variance - 1)², (kurtosis - 3)².

    z: [B, d]; returns one number, as a tensor []. Not 0 for a batch of N(0, I): about
    (1 + 2 + 24) / (3 B), because the moments of a batch are random.
    """
    found = torch.stack(moments(z))
    return F.mse_loss(found, NORMAL.to(found).expand_as(found))


def mmd_imq(z, z_prior):
    """MMD²(z, z_prior), unbiased, for k(a, b) = Σ_s C_s / (C_s + ‖a - b‖²), C_s = 2 d s.

    z, z_prior: [n, d], [m, d], n, m >= 2; s: each of SCALES. E k(z, z') + E k(u, u') - 2 E k(z, u)
    with means over the pairs. Pairs of a point with itself are left out, so its mean is 0 where
    both distributions agree, and single values may be negative (Gretton et al. 2012, eq. 3).
    Float32 is enough for codes far from 0: small distances among them are not lost in rounding.
    Returns one number, as a tensor []. Raises ValueError for fewer than 2 points or codes of
    unequal length.
    """
    if min(len(z), len(z_prior)) < 2 or z.shape[1:] != z_prior.shape[1:]:
        raise ValueError(f"MMD needs two sets of 2 or more codes of equal length, not "
                         f"{tuple(z.shape)} and {tuple(z_prior.shape)}")

    def kernel(a, b):  # not by ‖a‖² + ‖b‖² - 2 a·b, in which small distances far from 0 are lost
        squares = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") ** 2
        return sum(c / (c + squares) for c in (2 * a.shape[1] * scale for scale in SCALES))

    def within(a):
        k, n = kernel(a, a), len(a)
        return (k.sum() - k.diagonal().sum()) / (n * (n - 1))

    return within(z) + within(z_prior) - 2 * kernel(z, z_prior).mean()


def mmd_loss(z):
    """MMD² of the codes z [B, d] to as many samples of N(0, I), new ones at each call."""
    return mmd_imq(z, torch.randn_like(z))


def weight(step, steps):
    """λ at a step of 1 ... steps: the run has PARTS equal parts; λ is 0.001 in the first of them.

    It doubles after each of the first 11 parts, and stays at 2.048 in those that remain. If PARTS
    does not divide steps, the parts are equal up to rounding. With fewer steps than PARTS, λ leaves
    some of its 12 values out.
    """
    part = PARTS * (step - 1) // steps
    return 0.001 * 2 ** min(part, 11)


PENALTIES = {"ae": moment_loss, "moments": moment_loss, "mmd": mmd_loss}  # of ae: only logged


# --- model -------------------------------------------------------------------------------------

class Autoencoder(nn.Module):
    """encode: x [B, C, side, side] in [-1, 1] -> z [B, d_z], no noise; decode: z -> x_rec."""

    def __init__(self, c, side, d_z):
        super().__init__()
        widths = [16 * 2 ** i for i in range(max(1, int(math.log2(side / 4))))]
        small = side // 2 ** len(widths)  # side of the smallest map, 4 to 7 pixels
        features = widths[-1] * small ** 2
        layers = []
        for i, o in pairwise([c, *widths]):
            layers += [nn.Conv2d(i, o, kernel_size=4, stride=2, padding=1),
                       nn.BatchNorm2d(o), nn.SiLU()]
        self.encode = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, HIDDEN),
                                    nn.BatchNorm1d(HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, d_z))
        layers = [nn.Linear(d_z, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.SiLU(),
                  nn.Linear(HIDDEN, features), nn.Unflatten(1, (widths[-1], small, small))]
        for i, o in pairwise([*widths[::-1], c]):
            layers += [nn.BatchNorm2d(i), nn.SiLU(),
                       nn.ConvTranspose2d(i, o, kernel_size=4, stride=2, padding=1)]
        self.decode = nn.Sequential(*layers, nn.Tanh())


@torch.no_grad()
def in_parts(net, x):
    """net(x), a thousand at a time."""
    return torch.cat([net(part) for part in x.split(1000)])


# --- train -------------------------------------------------------------------------------------

def train(run, args, name, images, test):
    """Trains one model; returns its network and the u ~ N(0, I) that its samples are decoded from.

    u: [n_samples, d_z]. run.kept: codes of test pictures, by the step after which they were taken.
    """
    torch.manual_seed(args.seed)
    c, side = images.x.shape[1:3]
    u = torch.randn(args.n_samples, args.z_dim).to(run.device)  # the same for every model
    net = Autoencoder(c, side, args.z_dim).to(run.device)
    opt = torch.optim.Adam(net.parameters(), lr=args.lr, fused=True)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(opt, args.steps)
    batches = run.batches(images, args.batch)

    for step in run.steps(args.steps, net=net, opt=opt, rate=rate):
        # x -> z -> x_rec: descend the error plus λ times the distance of the codes to N(0, I)
        x = next(batches)[0]
        z = net.encode(x)
        mse = F.mse_loss(net.decode(z), x)
        distance = PENALTIES[name](z)
        lam = 0.0 if name == "ae" else weight(step, args.steps)
        loss = mse + lam * distance
        opt.zero_grad()
        loss.backward()
        opt.step()
        rate.step()
        run.log(loss=loss, mse=mse, penalty=distance, weighted=lam * distance)
        if run.at(SHOTS):
            net.eval()
            run.kept[step] = in_parts(net.encode, common.to_float(test.x[:args.n_codes])).cpu()
            run.shoot(in_parts(net.decode, u[:36]))
            net.train()

    return net.eval(), u


# --- measures ----------------------------------------------------------------------------------

def results(args, name, net, u, images, test):
    """Numbers and pictures of a trained model; writes its samples, paths and weights."""
    x = common.to_float(test.x)
    z = in_parts(lambda part: net.encode(common.to_float(part)), images.x)
    z_test = in_parts(net.encode, x)
    samples = in_parts(net.decode, u)
    # draws with the codes' own mean and standard deviation
    fitted = in_parts(net.decode, z.mean(dim=0) + z.std(dim=0) * u[:1000])
    common.save(common.to_uint8(samples).cpu(), args.out / f"samples_{name}.pt")
    common.save(common.paths(lambda codes: in_parts(net.decode, codes), z_test[:N_PATHS]),
                args.out / f"paths_{name}.pt")
    common.save(net.state_dict(), args.out / f"weights_{name}.pt")
    return {"pictures": pictures(net, x, z, samples, fitted),
            "codes": z.cpu(), "test codes": z_test.cpu(),
            "mse": F.mse_loss(in_parts(net.decode, z_test), x).item(),
            "distance": common.nearest(samples[:1000], images)[0].mean().item(),
            "fitted distance": common.nearest(fitted, images)[0].mean().item()}


def code_report(z, n):
    """Moments of the codes z [N, d], means over the coordinates, and both penalties.

    mmd: MMD² between the first n codes and n draws of N(0, I), the same draws in every call.
    """
    prior = torch.randn(n, z.shape[1], generator=torch.Generator().manual_seed(0)).to(z)
    mean, variance, kurtosis = (m.mean().item() for m in moments(z))
    return {"mean": mean, "variance": variance, "kurtosis": kurtosis,
            "moment loss": moment_loss(z).item(), "mmd": mmd_imq(z[:n], prior).item()}


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


def limits(args, done):
    """code_report by name: of draws of three distributions, and of the codes of each model."""
    torch.manual_seed(args.seed + 1)  # 0 is the seed of the draws in code_report
    n, d = args.n_codes, args.z_dim
    samples = {"N(0, I)": torch.randn(n, d), "three points, one coordinate": three_points(n, 1),
               f"three points, {d} coordinates": three_points(n, d)}
    for name, result in done.items():
        samples[f"codes of {name}"] = result["codes"]
        samples[f"{name}, test pictures"] = result["test codes"]
        samples[f"{name}, shuffled"] = shuffled(result["codes"])
    return {name: code_report(z, n) for name, z in samples.items()}


def pictures(net, x, z, samples, fitted):
    """What the figures show, uint8: test pictures x, reconstructions, samples, and so on.

    between: decoded (1 - alpha) z_a + alpha z_b for alpha = 0, 1/8, ..., 1 in a row; four rows for
    a picture and the one most like it, four for a picture and the next in the data.
    """
    near = x[:500].flatten(1)
    apart = torch.cdist(near, near).fill_diagonal_(math.inf)  # a picture is not like itself
    x = x[torch.arange(max(32, len(near))) % len(x)]  # those of a small folder are repeated
    pairs = [(i, apart[i % len(near)].argmin().item()) for i in range(4)] + \
        [(i, i + 1) for i in range(0, 8, 2)]
    a, b = (in_parts(net.encode, x[list(ends)]) for ends in zip(*pairs))
    alpha = torch.linspace(0, 1, 9, device=x.device).view(9, 1, 1)
    between = ((1 - alpha) * a + alpha * b).transpose(0, 1).flatten(0, 1)
    x_rec = in_parts(net.decode, in_parts(net.encode, x[:32]))
    kept = {"pairs": torch.stack([x[:32], x_rec], dim=1).flatten(0, 1),
            "samples": samples[:64], "fitted": fitted[:64],
            "shuffled": in_parts(net.decode, shuffled(z)[:64]),
            "between": in_parts(net.decode, between)}
    return {name: common.to_uint8(x).cpu() for name, x in kept.items()}


# --- figures -----------------------------------------------------------------------------------

def figures(args, images, done, log):
    """pictures.png, cdf.png, curves.png and limits.png."""
    title = f"Autoencoders on {images.name}, seed {args.seed}, {args.z_dim} latent coordinates"
    titles = ["test pictures, each left\nof its reconstruction", "samples: decoded\nz ~ N(0, I)",
              "samples: z with mean and\nvariance of the codes",
              "training codes decoded, each\ncoordinate shuffled",
              "between two pictures: like\n(top four rows) and unlike ones"]
    rows, shots = [], []
    for name, result in done.items():
        panels = [common.panel(x, 9 if kind == "between" else 8)
                  for kind, x in result["pictures"].items()]
        rows.append((f"{name}, mse {result['mse']:.3g}", list(zip(titles, panels))))
        titles = [""] * 5  # they stand above the first row
        shots.append((name, [(f"step {step:,}", partial(draw_cdf, z=z))
                             for step, z in result["shots"].items()]))
    common.save_panels(args.out / "pictures.png", rows, title)
    common.save_panels(args.out / "cdf.png", shots, f"{title}\nshare (0 to 1) of test codes with a "
                       "coordinate below the value on the axis\nblue: each coordinate, black: "
                       "N(0, 1)")

    fig, axes = common.figure(1, len(done), 1.5 + 3 * len(done), 2.9,
                              f"Losses on {images.name}, seed {args.seed} (without MMD² <= 0)")
    for ax, name in zip(axes[0], done):
        draw_losses(ax, [row for row in log if row["model"] == name])
        ax.set_title(name)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center")
    common.save_figure(fig, args.out / "curves.png")

    fig, axes = common.figure(1, 1 + len(done), 3 + 3 * len(done), 3.2,
                              f"What moments do not see, {images.name}, seed {args.seed}")
    axes[0, 0].bar([-3 ** 0.5, 0, 3 ** 0.5], [1 / 6, 2 / 3, 1 / 6], width=0.1)
    axes[0, 0].set(title="a distribution with the\nmoments 0, 1, 3", xlabel="value",
                   ylabel="probability")
    for ax, (name, result) in zip(axes[0, 1:], done.items()):
        draw_dependence(ax, result["codes"][:args.n_codes])
        ax.set_title(f"two dependent coordinates\nof the codes of {name}")
    common.save_figure(fig, args.out / "limits.png")


def draw_cdf(ax, z):
    """Empirical CDFs of the coordinates of z [N, d], at most 20 of them, over the normal one."""
    shares = (torch.arange(len(z)) + 0.5) / len(z)
    for column in z.T[:20]:
        ax.plot(column.sort().values.numpy(), shares.numpy(), "C0", linewidth=0.5, alpha=0.6)
    line = torch.linspace(-4, 4, 200)
    ax.plot(line.numpy(), torch.special.ndtr(line).numpy(), "black", linewidth=1.5)
    ax.set(xlim=(-4, 4), ylim=(0, 1), yticks=[])


def draw_losses(ax, log):
    """Error, penalty and weighted penalty against the step, on a log axis: without MMD² <= 0."""
    for column in ("mse", "penalty", "weighted"):
        rows = [row for row in log if row[column] > 0]
        ax.semilogy([row["step"] for row in rows], [row[column] for row in rows], linewidth=1,
                    label="λ penalty" if column == "weighted" else column)
    ax.set_xlabel("step")


def draw_dependence(ax, z):
    """Those two coordinates of z [N, d] whose squares are correlated most."""
    related = torch.corrcoef((z ** 2).T).fill_diagonal_(0).abs()
    i, j = divmod(related.argmax().item(), z.shape[1])
    ax.scatter(*z[:, [i, j]].T.numpy(), s=1)
    ax.set(xlabel=f"coordinate {i}", ylabel=f"coordinate {j}")


# --- main --------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = common.parser(__doc__, __file__)
    g = p.add_argument_group("model")
    g.add_argument("--models", nargs="+", choices=PENALTIES, default=list(PENALTIES),
                   metavar="MODEL", help=f"{', '.join(PENALTIES)}: the penalty on the codes")
    g.add_argument("--z-dim", type=common.number(int, 2), default=8,
                   help="latent coordinates, 2 or more")
    g = p.add_argument_group("training")
    g.add_argument("--steps", type=common.number(int, 1), default=1600, help="of each model")
    g.add_argument("--batch", type=common.number(int, 1), default=128, help="pictures in a batch")
    g.add_argument("--lr", type=common.number(float, above=0), default=4e-3,
                   help="Adam's rate, falls to 0")
    p.set_defaults(n_samples=N_SAMPLES, n_codes=N_CODES)
    args = common.parse(p, argv, quick=dict(data="digits", steps=10, n_samples=1000, n_codes=500))
    args.models = list(dict.fromkeys(args.models))
    return args


def check(args, images, test):
    """Ends the run if the flags do not fit the data."""
    common.check_side(images)
    common.check_batch(args, images, "a single code has no moments")
    if len(test.x) < 2:
        common.fail(f"{images.name} has one test picture, and moments need two: give a folder "
                    "with at least 20")


def main(argv=None):
    args = parse_args(argv)
    with common.Run(args) as run:
        images = common.load_images(args, run.device)
        test = common.load_images(args, run.device, train=False)
        check(args, images, test)
        for name in run.each(args.models):
            net, u = train(run, args, name, images, test)
            run.done[name] = {"shots": run.kept, **results(args, name, net, u, images, test)}
        figures(args, images, run.done, run.rows)
        report = limits(args, run.done)
        columns = list(report["N(0, I)"])
        common.print_table(["distribution", *columns], [
            [name, *(f"{numbers[column]:.3g}" for column in columns)]
            for name, numbers in report.items()])
        columns = ["mse", "distance", "fitted distance"]
        common.print_table([f"{images.name}: model", *columns], [
            [name, *(f"{numbers[column]:.4g}" for column in columns)]
            for name, numbers in run.done.items()])


if __name__ == "__main__":
    common.as_script(main)
