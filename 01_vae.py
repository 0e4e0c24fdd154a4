r"""01 - VAE: a bound of log p(x) that a pair of networks can climb.

Papers   Kingma, Welling 2013, arXiv:1312.6114; Burda et al. 2015,
         arXiv:1509.00519. "The course" is where the second loss comes from.
Idea     An encoder gives each picture x a normal law of codes z, with mean mu
         and variance σ²; a decoder draws pictures from codes.
         z = mu + σ u, u ~ N(0, I): gradients reach mu and σ -> reparameterise()
         KL = ½ Σ (σ² + mu² - 1 - log σ²) to N(0, I)     -> kl_standard_normal()
         log p(x) >= E log p(x|z) - KL; descend the negative  -> negative_elbo()
         The course's loss is twice that, up to a constant         -> vae_loss()
         With k draws of z the bound comes nearer to log p(x)    -> iwae_bound()
See      pictures.png: reconstructions, one picture encoded five times, samples,
         the way from one code to another. study.png: what σ² and the KL do.
         Printed: -log p(x) of test pictures (NLL), 87.8 nats on MNIST.
Differs  Convolutions with batch norm where the papers have perceptrons. Pixels
         are drawn to 0 or 1 anew in each batch, as Burda et al. do (86.8 nats).
Try      With --z-dim 2, what suffers more, reconstructions or samples? Predict,
         then run.
Run      python 01_vae.py
         python 01_vae.py --models vae -k 5 --steps 6400
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import common

HIDDEN = 512                     # width of the layer beside the code, both sides
MODELS = ["vae", "low-sigma2", "mid-sigma2", "high-sigma2", "no-kl"]
STUDY = 0.05                     # the last four take this share of the vae's steps and tests
N_TEST = 1000                    # test pictures in the bound
N_SAMPLES = 10_000               # pictures in samples.pt


# --- the idea ----------------------------------------------------------------------------------

def reparameterise(mu, logvar, u):
    """z = mu + σ u, σ = exp(logvar / 2): a sample of N(mu, σ²) through which gradients flow.

    mu, logvar: [B, d]; u: standard normal [..., B, d], so that k samples for each are [k, B, d].
    """
    return mu + torch.exp(logvar / 2) * u


def kl_standard_normal(mu, logvar):
    """KL(N(mu, σ²) ‖ N(0, I)) = ½ Σ_j (σ_j² + mu_j² - 1 - log σ_j²) of each example, nats [B].

    mu, logvar = log σ²: [B, d]. >= 0, and 0 only if mu = 0 and σ = 1.
    """
    return 0.5 * (logvar.exp() + mu ** 2 - 1 - logvar).sum(dim=-1)


def negative_elbo(log_px, mu, logvar):
    """KL(q(z|x) ‖ N(0, I)) - E_q log p(x|z) of each example, nats [B]; to be minimised.

    log_px = log p(x|z): [k, B], for k draws z of q = N(mu, exp(logvar)), both [B, d]. An upper
    bound of -log p(x) in the mean, exact where q is the posterior of the decoder. Raises ValueError
    if the sizes do not fit.
    """
    if log_px.ndim != 2 or log_px.shape[1:] != mu.shape[:1]:
        raise ValueError(f"log_px must be [k, B] for mu [B, d], not {tuple(log_px.shape)} for "
                         f"{tuple(mu.shape)}")
    return kl_standard_normal(mu, logvar) - log_px.mean(dim=0)


def vae_loss(x, x_rec, mu, logvar, x_sigma2):
    """(loss, data_term, kl_term) of the course, means over the batch; loss = data_term + kl_term.

    data_term = ‖x - x_rec‖² / (σ² d_x),  kl_term = tr Σ + ‖mu‖² - d_z - log det Σ = 2 KL.
    x, x_rec: [B, ...] of d_x numbers each; x_sigma2 = σ² > 0. To be minimised.
    It is -2 ELBO up to a constant, for pixels of variance s² = σ² d_x:
    -ELBO = loss / 2 + d_x / 2 log(2 π s²), in nats. Raises ValueError if x_sigma2 is not above 0,
    the shapes differ or the batch is empty.
    """
    if not x_sigma2 > 0 or x.shape != x_rec.shape or len(x) == 0:
        raise ValueError(f"x_sigma2 {x_sigma2} must be positive, and the shapes equal, with B of 1 "
                         f"or more: {tuple(x.shape)}, {tuple(x_rec.shape)}")
    data_term = ((x - x_rec) ** 2).flatten(1).mean(dim=1).mean() / x_sigma2
    kl_term = 2 * kl_standard_normal(mu, logvar).mean()
    return data_term + kl_term, data_term, kl_term


def log_bernoulli(x, logits):
    """log p(x|z) = Σ x log σ(a) + (1 - x) log(1 - σ(a)) over the last three dimensions, nats.

    x: pixels [..., C, H, W], 0 or 1; logits a: broadcastable with x. A grey x gives a number, but
    no log-probability: only 0 and 1 are values of a Bernoulli variable.
    """
    return (x * logits - F.softplus(logits)).sum(dim=(-3, -2, -1))


def log_gaussian(x, mean, variance):
    """log p(x|z) of N(mean, variance I) over the last three dimensions, nats.

    x, mean: [..., C, H, W]; variance > 0: a number, or a tensor that is learned, of any shape that
    broadcasts with them: [], [1], [B, 1, 1, 1] and so on.
    """
    area = 2 * math.pi * variance
    log_area = area.log() if torch.is_tensor(area) else math.log(area)
    return -0.5 * ((x - mean) ** 2 / variance + log_area).sum(dim=(-3, -2, -1))


def iwae_bound(log_px, z, mu, logvar):
    """log 1/k Σ_i p(x|z_i) p(z_i) / q(z_i|x) for each example, nats [B] (Burda et al. 2015).

    log_px = log p(x|z_i): [k, B]; z: [k, B, d], drawn from q = N(mu, exp(logvar)), both [B, d].
    A lower bound of log p(x) in the mean. That mean is the ELBO for k = 1, rises with k and tends
    to log p(x). Raises ValueError if the sizes do not fit.
    """
    if log_px.ndim != 2 or z.shape != (*log_px.shape, mu.shape[-1]):
        raise ValueError(f"log_px must be [k, B] for z [k, B, d], not {tuple(log_px.shape)} for "
                         f"{tuple(z.shape)}")
    log_pz = -0.5 * (z ** 2).sum(dim=-1)
    log_q = -0.5 * ((z - mu) ** 2 / logvar.exp() + logvar).sum(dim=-1)  # both without d/2 log 2π
    return torch.logsumexp(log_px + log_pz - log_q, dim=0) - math.log(len(z))


# --- model -------------------------------------------------------------------------------------

def channels(side):
    """Channels of the maps, largest map first; side of the smallest, 4 to 7 pixels if side >= 8."""
    halvings = max(1, int(math.log2(side / 4)))
    return [16 * 2 ** i for i in range(halvings)], side // 2 ** halvings


class VAE(nn.Module):
    """encode: x [B, C, side, side] in [0, 1] -> mu, logvar [B, d_z]; decode: z -> logits like x."""

    def __init__(self, c, side, d_z):
        super().__init__()
        widths, small = channels(side)
        features = widths[-1] * small ** 2
        layers = []
        for i, o in zip([c, *widths], widths):
            layers += [nn.Conv2d(i, o, kernel_size=4, stride=2, padding=1),
                       nn.BatchNorm2d(o), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, HIDDEN),
                                   nn.BatchNorm1d(HIDDEN), nn.SiLU())
        self.mu, self.logvar = nn.Linear(HIDDEN, d_z), nn.Linear(HIDDEN, d_z)
        layers = [nn.Linear(d_z, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.SiLU(),
                  nn.Linear(HIDDEN, features), nn.Unflatten(1, (widths[-1], small, small))]
        for i, o in zip(widths[::-1], [*widths[-2::-1], c]):
            layers += [nn.BatchNorm2d(i), nn.SiLU(),
                       nn.ConvTranspose2d(i, o, kernel_size=4, stride=2, padding=1)]
        self.decoder = nn.Sequential(*layers)

    def encode(self, x):
        h = self.trunk(x)
        return self.mu(h), self.logvar(h)

    def decode(self, z):
        """z [..., d_z] -> logits [..., C, side, side]."""
        return self.decoder(z.flatten(0, -2)).unflatten(0, z.shape[:-1])


class Model(NamedTuple):
    """What one training descends."""
    likelihood: str              # of a pixel: "bernoulli" or "gaussian"
    x_sigma2: float              # σ² of the course's loss, which has a gaussian likelihood
    k: int = 1                   # samples of z in the bound
    kl_weight: float = 1.0       # in the course's loss
    share: float = 1.0           # of --steps


def model_called(name, args, c):
    """The VAE of the chapter, or one of the study of σ² and the KL term, for c colours."""
    if name == "vae":
        likelihood = args.likelihood or ("bernoulli" if c == 1 else "gaussian")
        return Model(likelihood, args.x_sigma2, args.k)
    x_sigma2 = {"low-sigma2": args.x_sigma2 / 10, "high-sigma2": args.x_sigma2 * 10}
    return Model("gaussian", x_sigma2.get(name, args.x_sigma2),
                 kl_weight=0.0 if name == "no-kl" else 1.0, share=STUDY)


def log_likelihood(model, x, logits):
    """log p(x|z), nats, by the model's likelihood; Gaussian: variance σ² d_x, see vae_loss."""
    if model.likelihood == "bernoulli":
        return log_bernoulli(x, logits)
    return log_gaussian(x, logits.sigmoid(), model.x_sigma2 * x[0].numel())


def loss_of(model, x, logits, z, mu, logvar):
    """The model's loss, mean over the batch: minus the bound with k samples, or the course's."""
    if model.k > 1:
        return -iwae_bound(log_likelihood(model, x, logits), z, mu, logvar).mean()
    if model.likelihood == "bernoulli":
        return negative_elbo(log_bernoulli(x, logits), mu, logvar).mean()
    _, data_term, kl_term = vae_loss(x, logits[0].sigmoid(), mu, logvar, model.x_sigma2)
    return data_term + model.kl_weight * kl_term


def mirrored(x):
    """Every second picture in colour, by chance, from left to right: a face may be, a digit not."""
    if x.shape[1] == 1:
        return x
    return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)


def seen(model, x):
    """The batch x in [0, 1] as the model sees it: for Bernoulli drawn anew to 0 or 1."""
    return torch.bernoulli(x) if model.likelihood == "bernoulli" else x


# --- train -------------------------------------------------------------------------------------

def train(run, args, model, images):
    """Trains one model; returns its networks and the codes [n_samples, d_z] of its samples."""
    torch.manual_seed(args.seed)
    c, side = images.x.shape[1:3]
    steps = max(1, round(args.steps * model.share))
    z_fixed = torch.randn(args.n_samples, args.z_dim).to(run.device)  # the same for every model
    net = VAE(c, side, args.z_dim).to(run.device)
    opt = torch.optim.Adam(net.parameters(), lr=args.lr, betas=(0.9, 0.99), fused=True)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    batches = run.batches(images, args.batch)

    for _ in run.steps(steps, net=net, opt=opt, rate=rate):
        # x -> q(z|x) -> z -> p(x|z): descend -ELBO, or what the model has in its place
        grey = (mirrored(next(batches)[0]) + 1) / 2
        x = seen(model, grey)
        mu, logvar = net.encode(x)
        z = reparameterise(mu, logvar, torch.randn(model.k, *mu.shape, device=run.device))
        logits = net.decode(z)
        loss = loss_of(model, x, logits, z, mu, logvar)
        opt.zero_grad()
        loss.backward()
        opt.step()
        rate.step()
        run.log(loss=loss, kl=kl_standard_normal(mu, logvar).mean(),
                mse=F.mse_loss(logits[0].sigmoid(), grey))

    return net.eval(), z_fixed


# --- measures ----------------------------------------------------------------------------------

def results(args, name, model, net, z_fixed, images, test):
    """Numbers and pictures of a trained model; writes its weights, and the samples of the vae."""
    torch.manual_seed(args.seed)  # the same binarised test pictures for every model
    grey = (common.to_float(test.x[:args.n_test]) + 1) / 2
    x, n = seen(model, grey), max(1, round(args.n_test * model.share))
    samples = generate(net, z_fixed[:1000])
    common.save(net.state_dict(), args.out / f"weights_{name}.pt")
    if name == "vae":
        common.save(common.to_uint8(generate(net, z_fixed)).cpu(), args.out / "samples.pt")
    x_train = seen(model, (common.to_float(images.x[:32]) + 1) / 2)
    return {"likelihood": model.likelihood, "pictures": pictures(net, x, x_train, samples),
            **measure(net, model, grey[:n], x[:n], args.k_test),
            "distance": nearest_distance(samples, images)}


@torch.no_grad()
def measure(net, model, grey, x, k):
    """Numbers for test pictures [N, C, H, W] in [0, 1]: grey as they are, x as the model sees them.

    nll: -iwae_bound with k samples, -elbo, kl: all in nats for each picture. mse: of the
    reconstruction from mu to the grey picture. spread: standard deviation of the codes z of all
    pictures, 1 if together they fill the prior.
    """
    nll, elbo, kl, mse, codes = [], [], [], [], []
    some = max(1, 1000 // k)  # times k decoded pictures at once
    for few_grey, few in zip(grey.split(some), x.split(some)):
        mu, logvar = net.encode(few)
        z = reparameterise(mu, logvar, torch.randn(k, *mu.shape, device=x.device))
        log_px = log_likelihood(model, few, net.decode(z))
        kl.append(kl_standard_normal(mu, logvar))
        nll.append(-iwae_bound(log_px, z, mu, logvar))
        elbo.append(negative_elbo(log_px, mu, logvar))
        mse.append(((net.decode(mu).sigmoid() - few_grey) ** 2).flatten(1).mean(dim=1))
        codes.append(z[0])
    numbers = {"nll": nll, "-elbo": elbo, "kl": kl, "mse": mse}
    spread = torch.cat(codes).var(dim=0, correction=0).mean().sqrt().item()
    return {name: torch.cat(parts).mean().item() for name, parts in numbers.items()} | {
        "spread": spread}


def nearest_distance(x, images):
    """Mean distance of x [N, C, H, W] to the nearest of 10,000 training pictures, root mean square.

    In [-1, 1] units. Blur lowers it: read it beside the picture.
    """
    train = common.to_float(images.x[:10_000]).flatten(1)
    return (torch.cdist(x.flatten(1), train).amin(dim=1) / train.shape[1] ** 0.5).mean().item()


@torch.no_grad()
def generate(net, z):
    """The mean of p(x|z) in [-1, 1] for z [N, d_z], a thousand at a time."""
    return torch.cat([2 * net.decode(part).sigmoid() - 1 for part in z.split(1000)])


@torch.no_grad()
def pictures(net, x, x_train, samples):
    """What the figures show, uint8: pictures with their reconstructions, samples, and so on."""
    x, x_train = (a[torch.arange(32) % len(a)] for a in (x, x_train))  # a small folder has fewer
    mu, logvar = net.encode(x)
    several = reparameterise(mu[:6], logvar[:6], torch.randn(5, 6, mu.shape[1], device=x.device))
    alpha = torch.linspace(0, 1, 8, device=x.device)[:, None]
    between = torch.cat([(1 - alpha) * mu[i] + alpha * mu[i + 1] for i in range(0, 12, 2)])
    pairs, pairs_train = (torch.stack([2 * a - 1, generate(net, net.encode(a)[0])], dim=1)
                          .flatten(0, 1) for a in (x, x_train))
    kept = {"pairs": pairs, "pairs_train": pairs_train, "samples": samples[:64],
            "several": torch.cat([2 * x[:6] - 1, generate(net, several.flatten(0, 1))]),
            "between": generate(net, between)}
    if mu.shape[1] == 2:  # the quantiles of the prior, from -1.64 to 1.64 in both directions
        line = torch.distributions.Normal(0, 1).icdf(torch.linspace(0.05, 0.95, 15)).to(x.device)
        kept["manifold"] = generate(net, torch.cartesian_prod(line, line).flip(1))
    return {name: common.to_uint8(x).cpu() for name, x in kept.items()}


# --- figures -----------------------------------------------------------------------------------

def figures(args, images, done, log):
    """pictures.png: one model; study.png: all; curves.png and study_curves.png."""
    title = f"VAE on {images.name}, seed {args.seed}, {args.z_dim} latent coordinates"
    name, numbers = next(iter(done.items()))
    cells = [(text, common.panel(numbers["pictures"][kind], columns)) for kind, columns, text in (
        ("pairs_train", 8, "training pictures, each left\nof its reconstruction"),
        ("pairs", 8, "test pictures, each left of\nits reconstruction"),
        ("several", 6, "top row: pictures; below:\neach encoded five times"),
        ("samples", 8, "samples: decoded\nz ~ N(0, I)"),
        ("between", 8, "from one code to another\nin equal steps"),
        ("manifold", 15, "the latent plane, by\nquantiles of the prior"))
        if kind in numbers["pictures"]]
    common.save_panels(args.out / "pictures.png", [("", cells)], f"{title}: {name}")

    if len(done) > 1:
        rows = [("reconstructions", [(f"{name}\nmse {run['mse']:.3g}, kl {run['kl']:.3g}",
                                      common.panel(run["pictures"]["pairs"]))
                                     for name, run in done.items()]),
                ("samples", [(f"spread {run['spread']:.3g}, distance {run['distance']:.3g}",
                              common.panel(run["pictures"]["samples"])) for run in done.values()])]
        common.save_panels(args.out / "study.png", rows, title)

    for file, of_vae in (("curves.png", True), ("study_curves.png", False)):
        rows = [row for row in log if (row["model"] == "vae") == of_vae]
        if rows:
            common.plot_curves(args.out / file, rows, ["loss", "kl", "mse"], title)


# --- main --------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = common.parser(__doc__, __file__)
    g = p.add_argument_group("model")
    g.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL",
                   help=f"{', '.join(MODELS)}: the VAE; the course's loss with sigma^2 a tenth, "
                   "once, ten times --x-sigma2; without its KL term")
    g.add_argument("--likelihood", choices=["bernoulli", "gaussian"],
                   help="of the vae; if not given: bernoulli for grey pictures, else gaussian")
    g.add_argument("--x-sigma2", type=common.number(float, above=0), default=0.001,
                   help="sigma^2 of the course's loss, pixels in [0, 1] (gaussian)")
    g.add_argument("--z-dim", type=common.number(int, 1), default=50, help="latent coordinates; 2: "
                   "draws the latent plane")
    g = p.add_argument_group("training")
    g.add_argument("-k", type=common.number(int, 1), default=1, help="samples of z in the bound "
                   "that the vae climbs; above 1: the importance-weighted autoencoder")
    g.add_argument("--steps", type=common.number(int, 1), default=3200, help="of the vae")
    g.add_argument("--batch", type=common.number(int, 1), default=128, help="pictures in a batch")
    g.add_argument("--lr", type=common.number(float, above=0), default=1e-2,
                   help="Adam's rate, falls to 0")
    g.add_argument("--k-test", type=common.number(int, 1), default=100, help="samples of z in the "
                   "bound on test pictures: more of them, a tighter bound")
    p.set_defaults(n_samples=N_SAMPLES, n_test=N_TEST)
    args = common.parse(p, argv, quick=dict(data="digits", steps=32, n_samples=1000, n_test=20))
    args.models = list(dict.fromkeys(args.models))
    return args


def check(args, images):
    """Ends the run if the flags do not fit the data."""
    common.check_side(images)
    least = 2 * common.processes()
    if min(args.batch, len(images.x)) < least:
        common.fail(f"batch norm needs more than one picture: use --batch {least} or more")


def main(argv=None):
    args = parse_args(argv)
    with common.Run(args) as run:
        images = common.load_images(args, run.device)
        test = common.load_images(args, run.device, train=False)
        check(args, images)
        known = {name: model_called(name, args, images.x.shape[1]) for name in args.models}
        for name in run.each(args.models):
            net, z_fixed = train(run, args, known[name], images)
            run.done[name] = results(args, name, known[name], net, z_fixed, images, test)
        figures(args, images, run.done, run.rows)
        columns = ["nll", "-elbo", "kl", "mse", "spread", "distance"]
        common.print_table([f"{images.name}: model", "likelihood", *columns], [
            [name, numbers["likelihood"], *(f"{numbers[column]:.4g}" for column in columns)]
            for name, numbers in run.done.items()])


if __name__ == "__main__":
    main()
