r"""06 - WAE by moments: an autoencoder whose codes should look like N(0, I).

Papers   Tolstikhin et al. 2018, arXiv:1711.01558: the Wasserstein autoencoder.
         The penalty by moments comes from one report.
Idea     min mean (x - decode(z))² + λ penalty(z), z = encode(x). The penalty is
         small if the codes of a batch look like N(0, I): either each coordinate
         has mean 0, variance 1 and kurtosis 3                  -> moment_loss()
         or the maximum mean discrepancy between the codes and samples u of
         N(0, I) is 0: MMD² = E k(z, z') + E k(u, u') - 2 E k(z, u), where k is
         a kernel                                                  -> mmd_imq()
         Training is split into 14 equal parts. λ is 0.001 at first, and doubles
         after each of the first 11 parts                           -> weight()
See      pictures.png: reconstructions, samples and interpolations. cdf.png: the
         distribution of the codes beside N(0, 1) during training. limits.png
         and the first table: distributions that are not normal but have a small
         penalty. On MNIST the codes of a plain autoencoder have variance 27,
         and samples of N(0, I) decode to a blur. With the penalty by moments
         the variance is 0.99, and the samples are digits.
Differs  In the report λ doubles after each epoch, and z has 100 dimensions.
         Here it has 8, as in Tolstikhin et al., whose λ is always 10.
Try      Write 1.8 for the 3 in TARGET_MOMENTS, the kurtosis of a uniform
         distribution. What becomes of the curves in cdf.png? Predict, then run.
Run      python 06_wae_moments.py
         python 06_wae_moments.py --models moments
"""

import math
from functools import partial
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

import common

HIDDEN = 512                     # width of the layers before and after the code
N_SAMPLES = 10_000               # pictures in samples_{model}.pt
N_CODES = 2000                   # codes that are compared with N(0, I)
SNAPSHOTS = (0.05, 0.2, 0.5, 1.0)  # shares of the steps after which codes and pictures are saved


# --- the idea ----------------------------------------------------------------------------------

TARGET_MOMENTS = torch.tensor([[0.0], [1.0], [3.0]])  # mean, variance, kurtosis of N(0, 1)
SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # of the kernel: code of Tolstikhin et al. 2018
PARTS = 14                       # of a training run: λ doubles after each of the first 11


def moments(z):
    """Mean, variance and kurtosis of each coordinate of z [B, d]: three tensors [d].

    Averages over B, not B - 1: variance = mean (z - mean)², kurtosis = mean (z - mean)⁴ /
    variance². It is 3 for a normal distribution (not the excess kurtosis), and nan for a constant
    coordinate, or one whose deviations are below about 1e-11 in float32. A constant coordinate has
    exactly the variance 0. Raises ValueError unless z has two dimensions and 2 or more codes.
    """
    if z.ndim != 2 or len(z) < 2:
        raise ValueError(f"moments need codes [B, d] with B of 2 or more, not {tuple(z.shape)}")
    constant = (z == z[0]).all(dim=0)  # because of rounding, z - mean need not be exactly 0
    centred = (z - z.mean(dim=0)).masked_fill(constant, 0)
    variance = (centred ** 2).mean(dim=0)
    return z.mean(dim=0), variance, (centred ** 4).mean(dim=0) / variance ** 2


def moment_loss(z):
    """Mean over coordinates and moments of (mean - 0)², (variance - 1)², (kurtosis - 3)².

    z: [B, d]; returns a scalar. For a batch of N(0, I) it is not 0 but about (1 + 2 + 24) / (3 B),
    because the moments of a batch are random. Raises ValueError as moments() does.
    """
    found = torch.stack(moments(z))
    return F.mse_loss(found, TARGET_MOMENTS.to(found).expand_as(found))


def mmd_imq(z, z_prior):
    """MMD²(z, z_prior), unbiased, for k(a, b) = Σ_s C_s / (C_s + ‖a - b‖²), C_s = 2 d s.

    E k(z, z') + E k(u, u') - 2 E k(z, u), with means over the pairs. z, z_prior: [n, d], [m, d],
    n, m >= 2; s: each of SCALES; d: the length of a code. Pairs of a point with itself are left
    out, so the estimate is unbiased: 0 on average if both distributions are equal, and some values
    are negative (Gretton et al. 2012, eq. 3). Float32 is enough, even for codes far from 0. Returns
    a scalar. Raises ValueError for fewer than 2 codes or codes of unequal length.
    """
    if min(len(z), len(z_prior)) < 2 or z.shape[1:] != z_prior.shape[1:]:
        raise ValueError(f"MMD needs two sets of 2 or more codes of equal length, not "
                         f"{tuple(z.shape)} and {tuple(z_prior.shape)}")

    def kernel(a, b):  # not with ‖a‖² + ‖b‖² - 2 a·b, which loses precision far from 0
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
    """λ at a step of 1 ... steps. The steps are split into PARTS parts, equal up to rounding. λ is
    0.001 in the first, doubles after each of the first 11, and is 2.048 in the last three.
    """
    part = PARTS * (step - 1) // steps
    return 0.001 * 2 ** min(part, 11)


MODELS = {"ae": (moment_loss, 0), "moments": (moment_loss, 1), "mmd": (mmd_loss, 1)}
# A penalty, and a factor of λ: the penalty of the plain autoencoder is only logged.


# --- model -------------------------------------------------------------------------------------

class Autoencoder(nn.Module):
    """encode: x [B, C, side, side] in [-1, 1] -> z [B, d_z], no noise; decode: z -> x_rec."""

    def __init__(self, c, side, d_z):
        super().__init__()
        widths = [16 * 2 ** i for i in range(max(1, int(math.log2(side / 4))))]
        small = side // 2 ** len(widths)  # 28x28 pictures: widths 16 and 32, maps of 14 and 7
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
    """Trains one model; returns its network and the u ~ N(0, I) of its samples, [n_samples, d_z].

    run.extra: codes of test pictures, by the step after which they were computed.
    """
    torch.manual_seed(args.seed)
    c, side = images.x.shape[1:3]
    penalty_of, factor = MODELS[name]
    u = torch.randn(args.n_samples, args.z_dim).to(run.device)  # the same for every model
    net = Autoencoder(c, side, args.z_dim).to(run.device)
    opt = torch.optim.Adam(net.parameters(), lr=args.lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, args.steps)
    batches = run.batches(images, args.batch)

    for step in run.steps(args.steps, net=net, opt=opt, schedule=schedule):
        # x -> z -> x_rec; minimise the error plus λ times the penalty on the codes
        x = next(batches)[0]
        z = net.encode(x)
        mse = F.mse_loss(net.decode(z), x)
        penalty = penalty_of(z)
        lam = factor * weight(step, args.steps)
        loss = mse + lam * penalty
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        run.log(loss=loss, mse=mse, penalty=penalty, weighted=lam * penalty)
        if run.at(SNAPSHOTS):
            net.eval()
            run.extra[step] = in_parts(net.encode, test[:args.n_codes]).cpu()
            run.snapshot(in_parts(net.decode, u[:36]))
            net.train()

    return net.eval(), u


# --- measure -----------------------------------------------------------------------------------

def measure(z, n):
    """Moments of the codes z [N, d], means over the coordinates, and both penalties.

    mmd: MMD² between the first n codes and n samples of N(0, I), the same samples in every call.
    """
    prior = torch.randn(n, z.shape[1], generator=torch.Generator().manual_seed(0)).to(z)
    mean, variance, kurtosis = (m.mean().item() for m in moments(z))
    return {"mean": mean, "variance": variance, "kurtosis": kurtosis,
            "moment loss": moment_loss(z).item(), "mmd": mmd_imq(z[:n], prior).item()}


def shuffled(z):
    """z [N, d] with each coordinate permuted over the examples by itself.

    All moments of each coordinate stay the same; the dependence between coordinates is gone.
    """
    return torch.stack([column[torch.randperm(len(z), device=z.device)] for column in z.T], dim=1)


def three_points(n, d):
    """n samples of d independent coordinates: -√3, 0, √3 with probabilities 1/6, 2/3, 1/6.

    They have mean 0, variance 1 and kurtosis 3, as N(0, 1) has, and are far from it.
    """
    p = torch.tensor([1 / 6, 2 / 3, 1 / 6])
    return 3 ** 0.5 * (torch.multinomial(p, n * d, replacement=True).view(n, d) - 1.0)


def limits(args, done):
    """measure() by name: of samples of three distributions, and of the codes of each model."""
    torch.manual_seed(args.seed + 1)  # 0 is the seed of the samples in measure()
    n, d = args.n_codes, args.z_dim
    codes = {"N(0, I)": torch.randn(n, d), "three points, one coordinate": three_points(n, 1),
             f"three points, {d} coordinates": three_points(n, d)}
    for name, result in done.items():
        codes |= {f"codes of {name}": result["codes"], f"{name}, test pictures":
                  result["test codes"], f"{name}, shuffled": shuffled(result["codes"])}
    return {name: measure(z, n) for name, z in codes.items()}


def pictures(net, x, z, samples, fitted):
    """The pictures of the figures, uint8, by name. x: test pictures, z: codes of training pictures.

    interpolation: decoded (1 - alpha) z_a + alpha z_b with alpha = 0, 1/8, ..., 1 in a row. In the
    first four rows b is the test picture nearest to a, in the others the next one in the data.
    """
    first = x[:500].flatten(1)
    distances = torch.cdist(first, first).fill_diagonal_(math.inf)  # not from a picture to itself
    x = x[torch.arange(max(32, len(first))) % len(x)]  # a small folder's pictures are repeated
    pairs = [(i, distances[i % len(first)].argmin().item()) for i in range(4)] + \
        [(i, i + 1) for i in range(0, 8, 2)]
    a, b = (in_parts(net.encode, x[list(ends)]) for ends in zip(*pairs))
    alpha = torch.linspace(0, 1, 9, device=x.device).view(9, 1, 1)
    paths = ((1 - alpha) * a + alpha * b).transpose(0, 1).flatten(0, 1)
    x_rec = in_parts(net.decode, in_parts(net.encode, x[:32]))
    found = {"test": torch.stack([x[:32], x_rec], dim=1).flatten(0, 1), "samples": samples[:64],
             "fitted": fitted[:64], "shuffled": in_parts(net.decode, shuffled(z)[:64]),
             "interpolation": in_parts(net.decode, paths)}
    return {name: common.to_uint8(picture).cpu() for name, picture in found.items()}


# --- figures -----------------------------------------------------------------------------------

TITLES = ["test pictures,\nleft: original, right: reconstruction", "samples: decoded\nz ~ N(0, I)",
          "samples: z ~ N with mean\nand variance of the codes", "training codes, each coordinate\n"
          "shuffled, then decoded", "interpolations, four similar\npairs, four different ones"]


def figures(args, images, run):
    """pictures.png, cdf.png, curves.png and limits.png."""
    title = f"Autoencoders on {images.name}, seed {args.seed}, z has {args.z_dim} dimensions"
    rows, cdfs = [], []
    for name, result in run.done.items():
        panels = [common.panel(x, 9 if kind == "interpolation" else 8)
                  for kind, x in result["pictures"].items()]
        rows.append((f"{name}, mse {result['mse']:.3g}", list(zip(TITLES, panels))))
        cdfs.append(("", [(f"{name}, step {step:,}", partial(plot_cdf, z=z))
                          for step, z in result["snapshots"].items()]))
    common.save_panels(args.out / "pictures.png", rows, title)
    common.save_panels(args.out / "cdf.png", cdfs, f"{title}\nblue: the coordinates of the test"
                       " codes, black: N(0, 1)")

    fig, axes = common.figure(1, len(rows), 1.5 + 3 * len(rows), 2.9,
                              f"Losses on {images.name}, seed {args.seed} (without MMD² <= 0)")
    for ax, name in zip(axes[0], run.done):
        for column in ("mse", "penalty", "weighted"):
            log = [row for row in run.rows if row["model"] == name and row[column] > 0]
            ax.semilogy([row["step"] for row in log], [row[column] for row in log], linewidth=1,
                        label="λ penalty" if column == "weighted" else column)
        ax.set(title=name, xlabel="step")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center")
    common.save_figure(fig, args.out / "curves.png")

    fig, axes = common.figure(1, 2 + len(rows), 6 + 3 * len(rows), 3.2,
                              f"What moments do not see, {images.name}, seed {args.seed}")
    axes[0, 0].bar([-3 ** 0.5, 0, 3 ** 0.5], [1 / 6, 2 / 3, 1 / 6], width=0.1)
    axes[0, 0].set(title="a distribution with the\nmoments 0, 1, 3", xlabel="value",
                   ylabel="probability")
    normal = torch.randn(args.n_codes, args.z_dim, generator=torch.Generator().manual_seed(0))
    codes = {"samples of N(0, I)": normal} | {
        f"codes of {name}": result["codes"] for name, result in run.done.items()}
    for ax, (name, z) in zip(axes[0, 1:], codes.items()):
        z = z[:args.n_codes]
        correlation = torch.corrcoef((z ** 2).T).fill_diagonal_(0).abs()  # of the squares
        i, j = divmod(correlation.argmax().item(), z.shape[1])
        ax.scatter(*z[:, [i, j]].T.numpy(), s=1)
        ax.set(xlabel=f"coordinate {i}", ylabel=f"coordinate {j}",
               title=f"{name}, the two\nmost dependent coordinates")
    common.save_figure(fig, args.out / "limits.png")


def plot_cdf(ax, z):
    """CDFs of the coordinates of codes z [N, d], at most 20 of them, and that of N(0, 1)."""
    shares = (torch.arange(len(z)) + 0.5) / len(z)
    for column in z.T[:20]:
        ax.plot(column.sort().values.numpy(), shares.numpy(), "C0", linewidth=0.5, alpha=0.6)
    line = torch.linspace(-4, 4, 200)
    ax.plot(line.numpy(), torch.special.ndtr(line).numpy(), "black", linewidth=1.5)
    ax.set(xlim=(-4, 4), ylim=(0, 1), yticks=[0, 0.5, 1], ylabel="share of codes below")


# --- main --------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = common.parser(__doc__, __file__)
    g = p.add_argument_group("model and training")
    g.add_argument("--models", nargs="+", choices=MODELS, metavar="MODEL",
                   help=f"the penalties on the codes: {', '.join(MODELS)}; if not given: all")
    g.add_argument("--z-dim", type=common.number(int, 2), default=8, help="dimensions of z")
    g.add_argument("--steps", type=common.number(int, 1), default=1600, help="steps of each model")
    g.add_argument("--batch", type=common.number(int, 2), default=128, help="pictures in a batch")
    g.add_argument("--lr", type=common.number(float, above=0), default=4e-3,
                   help="Adam's learning rate, which falls to 0")
    p.set_defaults(n_samples=N_SAMPLES, n_codes=N_CODES)
    args = common.parse(p, argv, quick=dict(data="digits", steps=10, n_samples=1000, n_codes=500))
    args.models = list(dict.fromkeys(args.models or MODELS))
    return args


def main(argv=None):
    args = parse_args(argv)
    run = common.Run(args)
    images = common.load_images(args, run.device)
    test = common.load_images(args, run.device, train=False)
    if len(test.x) < 2:
        common.fail(f"{images.name} has one test picture, and moments need two: use 20 pictures")
    x = common.to_float(test.x)
    for name in run.each(args.models):
        net, u = train(run, args, name, images, x)
        z = in_parts(lambda part: net.encode(common.to_float(part)), images.x)
        z_test = in_parts(net.encode, x)
        samples = in_parts(net.decode, u)
        # samples of z with the mean and the standard deviation of the codes
        fitted = in_parts(net.decode, z.mean(dim=0) + z.std(dim=0) * u[:1000])
        common.save(common.to_uint8(samples).cpu(), args.out / f"samples_{name}.pt")
        common.save(net.state_dict(), args.out / f"weights_{name}.pt")
        run.done[name] = {
            "snapshots": run.extra, "pictures": pictures(net, x, z, samples, fitted),
            "codes": z.cpu(), "test codes": z_test.cpu(),
            "mse": F.mse_loss(in_parts(net.decode, z_test), x).item(),
            "distance": common.nearest(samples[:1000], images)[0].mean().item(),
            "fitted distance": common.nearest(fitted, images)[0].mean().item()}
    figures(args, images, run)

    found = limits(args, run.done)
    columns = list(found["N(0, I)"])
    common.print_table(["distribution", *columns], [
        [name, *(f"{numbers[column]:.3g}" for column in columns)]
        for name, numbers in found.items()])
    columns = ["mse", "distance", "fitted distance"]
    common.print_table([f"{images.name}: model", *columns], [
        [name, *(f"{numbers[column]:.4g}" for column in columns)]
        for name, numbers in run.done.items()])


if __name__ == "__main__":
    main()
