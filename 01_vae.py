r"""01 - VAE: two networks maximise a lower bound on log p(x).

Papers   Kingma, Welling 2013, arXiv:1312.6114: the variational autoencoder.
         Burda et al. 2015, arXiv:1509.00519: importance weighting.
Idea     A decoder turns a code z into p(x|z), a distribution of pictures. With
         codes from p(z) = N(0, I) the model of the data is p(x) = E p(x|z). An
         encoder turns a picture x into q(z|x), a normal distribution of codes,
         with means mu and variances exp(logvar).
         z = mu + exp(logvar / 2) u, u ~ N(0, I)             -> reparameterise()
         KL(q ‖ N(0, I)) = ½ Σ (exp(logvar) + mu² - 1 - logvar)
                                                         -> kl_standard_normal()
         E_q log p(x|z) - KL <= log p(x): the evidence lower bound (ELBO)
                                                             -> negative_elbo()
         A tighter bound: the log of the mean, over k samples z of q, of the
         importance weights p(x|z) p(z) / q(z|x)                 -> iwae_bound()
         One report minimises -2 ELBO plus a constant              -> vae_loss()
See      pictures.png: reconstructions and samples. study.png: four short runs
         with Gaussian pixels, three with different variances and one without
         the KL term. Printed: nll = -(tighter bound), on average at least
         -log p(x): 86.8 nats for 1,000 MNIST test digits (Burda et al.: 86.8).
Differs  Convolutions with batch norm; in the papers fully connected layers.
Try      With --z-dim 2, what gets worse, the reconstructions or the samples?
Run      python 01_vae.py [--models vae -k 5 --steps 6400] (the tighter bound)
"""

import math
from functools import partial
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

import common

HIDDEN = 512                     # width of the layers before and after the code
SNAPSHOTS = (0.05, 0.2, 0.5, 1.0)    # shares of the steps after which process.png is written
N_SAMPLES, N_TEST = 10_000, 1000     # pictures in samples.pt; test pictures that are measured
# A factor of --x-sigma2, and the weight of the KL term. "vae" has Bernoulli pixels by default, to
# which the factor means nothing. The other four have Gaussian pixels and few steps, for study.png.
MODELS = {"vae": (1, 1), "low-sigma2": (0.1, 1), "mid-sigma2": (1, 1), "high-sigma2": (10, 1),
          "no-kl": (1, 0)}
SHORT = 0.036    # the other four get 180 of 5,000 steps, and 36 of 1,000 test pictures


# --- the idea ----------------------------------------------------------------------------------

def reparameterise(mu, logvar, u):
    """z = mu + σ u, σ = exp(logvar / 2): a sample of N(mu, σ²), of the shape of u.

    mu, logvar: [B, d]; u: a sample of N(0, I), [B, d], or [k, B, d] for k samples of z. For a given
    u, z is a differentiable function of mu and logvar: this is how the encoder gets a gradient.
    """
    return mu + torch.exp(logvar / 2) * u


def kl_standard_normal(mu, logvar):
    """KL(N(mu, σ²) ‖ N(0, I)) = ½ Σ_j (σ_j² + mu_j² - 1 - log σ_j²) of each example, nats [B].

    mu, logvar = log σ²: [B, d]. The KL is never negative, and 0 only if mu = 0 and σ = 1.
    """
    return 0.5 * (torch.expm1(logvar) - logvar + mu ** 2).sum(dim=-1)  # expm1: exact near 0


def negative_elbo(log_px_z, mu, logvar, kl_weight=1.0):
    """Minus the evidence lower bound: KL(q(z|x) ‖ N(0, I)) - E_q log p(x|z), nats [B]; a loss.

    log_px_z = log p(x|z): [k, B], for k samples z of q = N(mu, exp(logvar)); mu, logvar: [B, d].
    E_q is estimated by the mean over the k samples; the KL is exact. On average over z the result
    is above -log p(x), by KL(q(z|x) ‖ p(z|x)). More samples make it less noisy, not tighter.
    kl_weight multiplies the KL; with 0, only the reconstruction term remains. Raises ValueError if
    log_px_z is not [k, B] with k of 1 or more and the B of mu.
    """
    if log_px_z.ndim != 2 or not len(log_px_z) or log_px_z.shape[1:] != mu.shape[:1]:
        raise ValueError(f"log_px_z must be [k, B] for mu [B, d], not {tuple(log_px_z.shape)} for "
                         f"{tuple(mu.shape)}")
    return kl_weight * kl_standard_normal(mu, logvar) - log_px_z.mean(dim=0)


def vae_loss(x, x_rec, mu, logvar, x_sigma2):
    """The loss of one report, (loss, data_term, kl_term), means over the batch; to be minimised.

    data_term: the mean over the pixels of (x - x_rec)² / x_sigma2. kl_term: 2 KL. loss: their sum.
    x, x_rec: [B, ...] with d_x values each; mu, logvar: [B, d]; x_sigma2 > 0. The ELBO has a sum
    over the pixels, not a mean. Therefore x_sigma2 stands for pixels of variance s² = x_sigma2 d_x
    (MNIST: 0.001 means 0.784), and -ELBO = loss / 2 + (d_x / 2) log(2 π s²), nats. train() has
    -ELBO as its loss, with s² as the variance of a pixel. Raises ValueError if x_sigma2 is not
    above 0, if shapes do not fit, or if the batch is empty.
    """
    if not x_sigma2 > 0 or x.shape != x_rec.shape or not 0 < len(x) == len(mu):
        raise ValueError(f"x_sigma2 {x_sigma2} must be positive, and the shapes must fit: "
                         f"{tuple(x.shape)}, {tuple(x_rec.shape)}, {tuple(mu.shape)}")
    data_term = ((x - x_rec) ** 2).mean() / x_sigma2
    kl_term = 2 * kl_standard_normal(mu, logvar).mean()
    return data_term + kl_term, data_term, kl_term


def log_bernoulli(x, logits):
    """log p(x|z) = Σ [x log σ(a) + (1 - x) log(1 - σ(a))] over C, H and W, nats; a: the logits.

    x: pixels [..., C, H, W], 0 or 1; logits: broadcastable with x. Returns [...], the dimensions
    before C. For grey x the result is not a log-probability: a Bernoulli variable is 0 or 1. Raises
    ValueError for fewer dimensions, and for x outside of [0, 1].
    """
    if x.ndim < 3 or x.min() < 0 or x.max() > 1:
        raise ValueError(f"x must be [..., C, H, W] in [0, 1], not {tuple(x.shape)} in "
                         f"[{x.min():g}, {x.max():g}]")
    return (x * F.logsigmoid(logits) + (1 - x) * F.logsigmoid(-logits)).sum(dim=(-3, -2, -1))


def log_gaussian(x, mean, variance):
    """log p(x|z) where p(x|z) = N(mean, variance I): a sum over C, H and W, nats.

    x, mean: floats [..., C, H, W], broadcastable, or ValueError; returns [...]. variance > 0: a
    number, or a tensor that broadcasts with x, such as [] or [B, 1, 1, 1], which can be learned.
    """
    if x.ndim < 3 or not (x.is_floating_point() and mean.is_floating_point()):
        raise ValueError(f"x must be floats [..., C, H, W], not {x.dtype} {tuple(x.shape)}")
    normaliser = 2 * math.pi * variance
    log_normaliser = normaliser.log() if torch.is_tensor(normaliser) else math.log(normaliser)
    return -0.5 * ((x - mean) ** 2 / variance + log_normaliser).sum(dim=(-3, -2, -1))


def iwae_bound(log_px_z, z, mu, logvar):
    """log (1/k Σ_i p(x|z_i) p(z_i) / q(z_i|x)) for each example, nats [B] (Burda et al. 2015).

    log_px_z = log p(x|z_i): [k, B]; z: [k, B, d], samples of q = N(mu, exp(logvar)); mu, logvar:
    [B, d]. The importance weight p(x|z) p(z) / q(z|x) has the mean p(x) for z from q. By Jensen's
    inequality the mean of its log is at most log p(x); for k = 1 it is the ELBO. On average the
    bound rises with k toward log p(x). If q(z|x) = p(z|x), each weight is p(x): the bound is exact.
    Raises ValueError if log_px_z is not [k, B], if z is not [k, B, d] with the same k and B, and if
    rounding z moves the bound by about 0.1 nats (small σ: use float64).
    """
    if log_px_z.ndim != 2 or not len(log_px_z) or not (
            z.shape[:2] == log_px_z.shape and z.shape[1:] == mu.shape):
        raise ValueError("log_px_z must be [k, B] for z [k, B, d], not "
                         f"{tuple(log_px_z.shape)} for {tuple(z.shape)}")
    rounding = torch.finfo(z.dtype).eps * (mu.abs() / torch.exp(logvar / 2)).sum(dim=-1)
    if (rounding > 0.1).any():
        raise ValueError(f"σ is too small beside mu for {z.dtype}: logvar {logvar.min():g}")
    log_pz = -0.5 * (z ** 2).sum(dim=-1)  # both without -d/2 log 2π: it cancels in log_pz - log_q
    log_q = -0.5 * ((z - mu) ** 2 / logvar.exp() + logvar).sum(dim=-1)
    return torch.logsumexp(log_px_z + log_pz - log_q, dim=0) - math.log(len(z))


# --- model -------------------------------------------------------------------------------------

class VAE(nn.Module):
    """encode: x [B, C, side, side] in [0, 1] -> mu, logvar [B, d_z].
    decode: z [..., d_z] -> logits [..., C, side, side]; their sigmoid is the mean of p(x|z)."""

    def __init__(self, c, side, d_z):
        super().__init__()
        widths = [16 * 2 ** i for i in range(max(1, int(math.log2(side / 4))))]  # channels
        small = side // 2 ** len(widths)  # sides 28 -> 14 -> 7: widths [16, 32], small 7
        features = widths[-1] * small ** 2
        layers = []
        for n_in, n_out in pairwise([c, *widths]):
            layers += [nn.Conv2d(n_in, n_out, kernel_size=4, stride=2, padding=1),
                       nn.BatchNorm2d(n_out), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, HIDDEN),
                                   nn.BatchNorm1d(HIDDEN), nn.SiLU())
        self.mu, self.logvar = nn.Linear(HIDDEN, d_z), nn.Linear(HIDDEN, d_z)
        layers = [nn.Linear(d_z, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.SiLU(),
                  nn.Linear(HIDDEN, features), nn.Unflatten(1, (widths[-1], small, small))]
        for n_in, n_out in pairwise([*widths[::-1], c]):
            layers += [nn.BatchNorm2d(n_in), nn.SiLU(),
                       nn.ConvTranspose2d(n_in, n_out, kernel_size=4, stride=2, padding=1)]
        self.decoder = nn.Sequential(*layers)

    def encode(self, x):
        h = self.trunk(x)
        return self.mu(h), self.logvar(h)

    def decode(self, z):
        flat = z.flatten(0, -2)  # the layers need one batch dimension
        return self.decoder(flat).unflatten(0, z.shape[:-1])


def log_likelihood(x, logits, variance):
    """log p(x|z), nats: of grey pixels with this variance or, if it is None, of pixels 0 or 1."""
    if variance is None:
        return log_bernoulli(x, logits)
    return log_gaussian(x, logits.sigmoid(), variance)


# --- train -------------------------------------------------------------------------------------

# `run` does all that is not mathematics: run.batches shuffles the data, run.steps counts 1, 2, ...
# and saves what it is given (for --resume), run.log shows and saves numbers, run.snapshot adds to
# process.png, run.at(shares) is true after these shares of the steps. To paste train() elsewhere,
# see "Copy a part into your coursework" in the README.

def train(run, args, name, variance, images):
    """Trains one of MODELS; returns it, and the z [n_samples, d_z] of its samples. variance: of a
    Gaussian pixel, or None if pixels are 0 or 1. images.x: training pictures [N, C, side, side]."""
    torch.manual_seed(args.seed)
    c, side = images.x.shape[1:3]
    kl_weight = MODELS[name][1]
    steps, k = (args.steps, args.k) if name == "vae" else (max(1, round(SHORT * args.steps)), 1)
    z_fixed = torch.randn(args.n_samples, args.z_dim).to(run.device)  # the same for every model
    net = VAE(c, side, args.z_dim).to(run.device)
    opt = torch.optim.Adam(net.parameters(), lr=args.lr, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    batches = run.batches(images, args.batch)

    for _ in run.steps(steps, net=net, opt=opt, schedule=schedule):
        # x -> q(z|x) -> z -> p(x|z); minimise -ELBO, or with k > 1 samples minus the tighter bound
        x01 = (next(batches)[0] + 1) / 2                            # pictures come in [-1, 1]
        x = torch.bernoulli(x01) if variance is None else x01       # grey: the probability of a 1
        mu, logvar = net.encode(x)
        z = reparameterise(mu, logvar, torch.randn(k, *mu.shape, device=run.device))
        logits = net.decode(z)                                      # [k, B, C, side, side]
        log_px_z = log_likelihood(x, logits, variance)
        if k == 1:  # iwae_bound would estimate the KL from z, with more noise
            loss = negative_elbo(log_px_z, mu, logvar, kl_weight).mean()
        else:
            loss = -iwae_bound(log_px_z, z, mu, logvar).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        run.log(loss=loss, kl=kl_standard_normal(mu, logvar).mean(),
                mse=F.mse_loss(logits[0].sigmoid(), x01))           # of the first of k samples
        if run.at(SNAPSHOTS):
            run.snapshot(generate(net.eval(), z_fixed[:36]))
            net.train()

    return net.eval(), z_fixed


# --- measure -----------------------------------------------------------------------------------

@torch.no_grad()
def measure(net, variance, x01, x, k):
    """Means over test pictures [N, C, H, W]: grey x01 in [0, 1]; x, as the likelihood expects them.

    nll (minus iwae_bound with k samples of z), -elbo and kl are in nats. For Gaussian pixels, nll
    and -elbo are of densities: compare only models with the same variance. mse: between x01 and its
    reconstruction, which is decoded from mu."""
    chunk, parts = max(1, 1000 // k), []  # so that about 1,000 pictures are decoded at once
    for x01_part, x_part in zip(x01.split(chunk), x.split(chunk)):
        mu, logvar = (part.cpu().double() for part in net.encode(x_part))  # iwae_bound needs it
        z = reparameterise(mu, logvar, torch.randn(k, *mu.shape).double())
        logits, means = (net.decode(code.float().to(x.device)).cpu() for code in (z, mu))
        log_px_z = log_likelihood(x_part.cpu(), logits, variance)
        squares = (means.sigmoid() - x01_part.cpu()) ** 2
        parts.append({"nll": -iwae_bound(log_px_z, z, mu, logvar),
                      "-elbo": negative_elbo(log_px_z, mu, logvar),
                      "kl": kl_standard_normal(mu, logvar), "mse": squares.mean(dim=(1, 2, 3))})
    return {name: torch.cat([part[name] for part in parts]).mean().item() for name in parts[0]}


@torch.no_grad()
def generate(net, z):
    """The mean of p(x|z) for z [N, d_z], in [-1, 1]. A sample of p(x|z) would add pixel noise."""
    return torch.cat([2 * net.decode(part).sigmoid() - 1 for part in z.split(1000)])


@torch.no_grad()
def pictures(net, x, samples):
    """The panels of pictures.png, {name: uint8}. x: test pictures in [0, 1]."""
    x = x[torch.arange(32) % len(x)]  # repeated if fewer than 32
    mu, logvar = net.encode(x)
    five = reparameterise(mu[:6], logvar[:6], torch.randn(5, 6, mu.shape[1], device=x.device))
    alpha = torch.linspace(0, 1, 8, device=x.device)[:, None]
    paths = torch.cat([(1 - alpha) * mu[i] + alpha * mu[i + 1] for i in range(0, 12, 2)])
    panels = {"test": torch.stack([2 * x - 1, generate(net, mu)], dim=1).flatten(0, 1),
              "five": torch.cat([2 * x[:6] - 1, generate(net, five.flatten(0, 1))]),
              "samples": samples[:64], "interpolation": generate(net, paths)}
    if mu.shape[1] == 2:  # a grid of z: quantiles of N(0, 1), from -1.64 to 1.64 in each direction
        line = torch.distributions.Normal(0, 1).icdf(torch.linspace(0.05, 0.95, 15)).to(x.device)
        panels["plane"] = generate(net, torch.cartesian_prod(line, line).flip(1))
    return {name: common.to_uint8(picture).cpu() for name, picture in panels.items()}


# --- figures -----------------------------------------------------------------------------------

CAPTIONS = {  # for each panel: its number of columns, and its title
    "test": (8, "test pictures{},\nleft: original, right: reconstruction"),
    "five": (6, "top row: originals; below: each\ndecoded from five samples of z"),
    "samples": (8, "samples: decoded z ~ N(0, I)\n"),
    "interpolation": (8, "each row: from one code to another\nin equal steps"),
    "plane": (15, "the plane of all z, by\nquantiles of the prior")}


def figures(args, images, y, run):
    """pictures.png, curves.png: the first model. study.png: all models, from their results."""
    title = f"VAE on {images.name}, seed {args.seed}, z has {args.z_dim} dimensions"
    name, numbers = next(iter(run.done.items()))
    binarised = ", binarised" * (numbers["likelihood"] == "bernoulli")
    panels = [(CAPTIONS[kind][1].format(binarised), common.panel(x, CAPTIONS[kind][0]))
              for kind, x in numbers["pictures"].items()]
    if args.z_dim == 2:
        panels.append(("codes of test pictures by class;\nblack: samples of one q(z|x)",
                       partial(plot_codes, *numbers["codes"], y)))
    common.save_panels(args.out / "pictures.png", [("", panels)], f"{title}: {name}")
    if len(run.done) > 1:
        common.save_panels(args.out / "study.png", [
            (row, [(f"{name}\n{', '.join(f'{key} {numbers[key]:.3g}' for key in keys)}",
                    common.panel(numbers["pictures"][kind])) for name, numbers in run.done.items()])
            for row, kind, keys in (("reconstructions", "test", ("mse", "kl")),
                                    ("samples", "samples", ("distance",)))], title)
    rows = [row for row in run.rows if row["model"] == name]
    common.plot_curves(args.out / "curves.png", rows, {
        "loss": "loss of a batch, nats", "kl": "KL(q ‖ N(0, I)), nats",
        "mse": "mean squared error of a pixel in [0, 1],\nfor one sample of z"}, title)


def plot_codes(mu, logvar, y, ax):
    """The means of q(z|x) [N, 2], colours by the class y; 200 samples of the first q."""
    ax.scatter(*mu.T.numpy(), s=4, cmap="tab10",
               c=torch.zeros(len(mu)) if y is None else y[:len(mu)].cpu())
    ax.scatter(*reparameterise(mu[0], logvar[0], torch.randn(200, 2)).T.numpy(), s=1, c="black")


# --- main --------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = common.parser(__doc__, __file__)
    add, whole, real = p.add_argument, partial(common.number, int), partial(common.number, float)
    add("--models", nargs="+", choices=MODELS, metavar="MODEL", help=f"{', '.join(MODELS)}: the "
        "VAE; Gaussian pixels with 0.1, 1 and 10 times --x-sigma2; the same without the KL term")
    add("--likelihood", choices=["bernoulli", "gaussian"],
        help="of the vae; if not given: bernoulli for one channel, else gaussian")
    add("--x-sigma2", type=real(above=0), default=0.001,
        help="times C H W (MNIST: 784), it is the variance of a Gaussian pixel")
    add("--z-dim", type=whole(1), default=50, help="length of z; with 2 it is plotted")
    add("-k", type=whole(1), default=1, help="samples of z in the bound that the vae maximises; "
        "above 1: the importance-weighted autoencoder")
    add("--steps", type=whole(1), default=5000, help="of the vae; others: 3.6 %% of it")
    add("--batch", type=whole(2), default=128, help="pictures in a batch")
    add("--lr", type=real(above=0), default=1e-2, help="Adam's learning rate, which falls to 0")
    add("--k-test", type=whole(1), default=100, help="samples of z in the bound on test pictures")
    p.set_defaults(n_samples=N_SAMPLES, n_test=N_TEST)
    args = common.parse(p, argv, quick=dict(data="digits", steps=32, n_samples=1000, n_test=20))
    args.models = list(dict.fromkeys(args.models or MODELS))
    return args


def main(argv=None):
    args = parse_args(argv)
    run = common.Run(args)
    images = common.load_images(args, run.device)
    test = common.load_images(args, run.device, train=False)
    likelihood = args.likelihood or ("bernoulli" if images.x.shape[1] == 1 else "gaussian")
    for name in run.each(args.models):
        variance = MODELS[name][0] * args.x_sigma2 * images.x[0].numel()  # the s² of vae_loss
        if name == "vae" and likelihood == "bernoulli":
            variance = None
        net, z_fixed = train(run, args, name, variance, images)
        samples = generate(net, z_fixed)
        common.save(net.state_dict(), args.out / f"weights_{name}.pt")
        common.save(common.to_uint8(samples).cpu(), args.out / f"samples_{name}.pt")

        torch.manual_seed(args.seed)  # so that the pixels 0 and 1 do not depend on the training
        x01 = (common.to_float(test.x[:args.n_test]) + 1) / 2
        x = torch.bernoulli(x01) if variance is None else x01
        n = args.n_test if name == "vae" else max(1, round(SHORT * args.n_test))
        run.done[name] = {  # distance: of samples to the nearest training picture
            "likelihood": "gaussian" if variance else "bernoulli", "n": len(x[:n]),
            "pictures": pictures(net, x, samples),
            **measure(net, variance, x01[:n], x[:n], args.k_test),
            "distance": common.nearest(samples[:1000], images)[0].mean().item()}
        if args.z_dim == 2:
            run.done[name]["codes"] = [a.detach().cpu() for a in net.encode(x)]
    figures(args, images, test.y, run)
    columns = ["n", "nll", "-elbo", "kl", "mse", "distance"]
    common.print_table([f"{images.name}: model", "likelihood", *columns], [
        [name, numbers["likelihood"], *(f"{numbers[column]:.4g}" for column in columns)]
        for name, numbers in run.done.items()])


if __name__ == "__main__":
    main()
