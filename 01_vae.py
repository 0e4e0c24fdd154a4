r"""01 - VAE: a bound on log p(x) that a pair of networks can climb.

Papers   Kingma, Welling 2013, arXiv:1312.6114; Burda 2015, arXiv:1509.00519
Idea     An encoder turns a picture x into a normal distribution q(z|x) of code
         z: independent coordinates, with means mu and variances exp(logvar). A
         decoder gives p(x|z), a distribution of pictures.
         z = mu + exp(logvar / 2) u, u ~ N(0, I): a draw  -> reparameterise()
         KL(q ‖ N(0, I)) = ½ Σ (exp(logvar) + mu² - 1 - logvar)
                                                         -> kl_standard_normal()
         p(x) = ∫ p(x|z) p(z) dz, p(z) = N(0, I). Its log has the lower bound
         ELBO = E_q log p(x|z) - KL = log p(x) - KL(q ‖ p(z|x))
                                                              -> negative_elbo()
         A course's loss for Gaussian pixels, -2 ELBO + constant   -> vae_loss()
         The log of a mean of k weights is a tighter bound       -> iwae_bound()
See      pictures.png: reconstructions, samples. study.png: 180 steps each with
         three values of --x-sigma2, and without the KL term. Printed: nll, on
         average an upper bound on -log p(x), in nats: 86.9 for test pictures of
         MNIST with 100 draws of z (Burda et al. 2015, with 5,000: 86.8).
Differs  Convolutions with batch norm; in the papers fully connected layers.
Try      With --z-dim 2, what suffers more, reconstructions or samples?
Run      python 01_vae.py    (the VAE, and four short runs for the study)
         python 01_vae.py --models vae -k 5 --steps 6400
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import common

HIDDEN = 512                     # width of the layers before and after the code
MODELS = ["vae", "low-sigma2", "mid-sigma2", "high-sigma2", "no-kl"]
STUDY = 0.036                    # for all but vae: this share of steps (180) and test pictures (36)
N_TEST = 1000                    # test pictures in the bound
N_SAMPLES = 10_000               # pictures in samples.pt
SHOTS = (0.05, 0.2, 0.5, 1.0)    # shares of a training after which process.png is written


# --- the idea ----------------------------------------------------------------------------------

def reparameterise(mu, logvar, u):
    """z = mu + σ u, σ = exp(logvar / 2): a sample of N(mu, σ²), of the shape of u.

    mu, logvar: [B, d]; u: standard normal, [B, d], or [k, B, d] for k samples of each. Gradients
    flow to mu and logvar.
    """
    return mu + torch.exp(logvar / 2) * u


def kl_standard_normal(mu, logvar):
    """KL(N(mu, σ²) ‖ N(0, I)) = ½ Σ_j (σ_j² + mu_j² - 1 - log σ_j²) of each example, nats [B].

    mu, logvar = log σ²: [B, d]. >= 0, and 0 only if mu = 0 and σ = 1.
    """
    return 0.5 * (logvar.exp() + mu ** 2 - 1 - logvar).sum(dim=-1)


def negative_elbo(log_px_z, mu, logvar):
    """KL(q(z|x) ‖ N(0, I)) - E_q log p(x|z) of each example, nats [B]; to be minimised.

    log_px_z = log p(x|z): [k, B], for k samples z of q = N(mu, exp(logvar)); mu, logvar: [B, d].
    E_q is the mean over the k samples, the KL has its closed form. On average over z it is an upper
    bound on -log p(x), and equal to it where q(z|x) = p(z|x). More samples make it less noisy, not
    tighter. Raises ValueError if log_px_z is not [k, B] with the B of mu.
    """
    if log_px_z.ndim != 2 or log_px_z.shape[1:] != mu.shape[:1]:
        raise ValueError(f"log_px_z must be [k, B] for mu [B, d], not {tuple(log_px_z.shape)} for "
                         f"{tuple(mu.shape)}")
    return kl_standard_normal(mu, logvar) - log_px_z.mean(dim=0)


def vae_loss(x, x_rec, mu, logvar, x_sigma2):
    """The loss of a course: (loss, data_term, kl_term), batch means; loss = data_term + kl_term.

    data_term = mean of (x - x_rec)² over the pixels / x_sigma2,  kl_term = 2 KL.
    x, x_rec: [B, ...] of d_x numbers each; mu, logvar: [B, d]; x_sigma2 > 0. To be minimised. It is
    -2 ELBO up to a constant, for Gaussian pixels of variance s² = x_sigma2 d_x, not x_sigma2 (for
    MNIST 0.001 gives 0.784): -ELBO = loss / 2 + d_x / 2 log(2 π s²), in nats. Raises ValueError if
    x_sigma2 is not above 0 (nan is not), x and x_rec differ in shape or the batch is empty.
    """
    if not x_sigma2 > 0 or x.shape != x_rec.shape or len(x) == 0:
        raise ValueError(f"x_sigma2 {x_sigma2} must be positive, and the shapes equal, with B of 1 "
                         f"or more: {tuple(x.shape)}, {tuple(x_rec.shape)}")
    data_term = ((x - x_rec) ** 2).mean() / x_sigma2
    kl_term = 2 * kl_standard_normal(mu, logvar).mean()
    return data_term + kl_term, data_term, kl_term


def log_bernoulli(x, logits):
    """log p(x|z) = Σ x log σ(a) + (1 - x) log(1 - σ(a)), a: logits, over the last three dimensions.

    In nats. x: pixels [..., C, H, W], 0 or 1; logits broadcastable with x. Returns [...], the other
    dimensions after broadcasting. A grey x gives a number, but no log-probability: only 0 and 1 are
    values of a Bernoulli variable.
    """
    # log σ(a) = a - softplus(a) and log(1 - σ(a)) = -softplus(a)
    return (x * logits - F.softplus(logits)).sum(dim=(-3, -2, -1))


def log_gaussian(x, mean, variance):
    """log p(x|z) of N(mean, variance I) over the last three dimensions, nats.

    x, mean: [..., C, H, W], broadcastable; returns [...]. variance > 0: a number, or a tensor that
    is learned, of any shape that broadcasts with them: [], [1], [B, 1, 1, 1] and so on. Gradients
    flow to such a tensor, too.
    """
    area = 2 * math.pi * variance
    log_area = area.log() if torch.is_tensor(area) else math.log(area)
    return -0.5 * ((x - mean) ** 2 / variance + log_area).sum(dim=(-3, -2, -1))


def iwae_bound(log_px_z, z, mu, logvar):
    """log (1/k Σ_i p(x|z_i) p(z_i) / q(z_i|x)) for each example, nats [B] (Burda et al. 2015).

    log_px_z = log p(x|z_i): [k, B]; z: [k, B, d], drawn from q = N(mu, exp(logvar)); mu, logvar:
    [B, d]. The mean of p(x|z) p(z) / q(z|x) over q is p(x), so by Jensen the mean of the log is a
    lower bound on log p(x): for k = 1 the ELBO. This mean never falls with k and tends to log p(x);
    where q(z|x) = p(z|x), the bound itself is log p(x), for every z and k. Raises ValueError if
    log_px_z is not [k, B], or z is not [k, B, d] with the same k and B.
    """
    if log_px_z.ndim != 2 or z.shape != (*log_px_z.shape, mu.shape[-1]):
        raise ValueError("log_px_z must be [k, B] for z [k, B, d], not "
                         f"{tuple(log_px_z.shape)} for {tuple(z.shape)}")
    log_pz = -0.5 * (z ** 2).sum(dim=-1)
    log_q = -0.5 * ((z - mu) ** 2 / logvar.exp() + logvar).sum(dim=-1)  # both lack -d/2 log 2π
    return torch.logsumexp(log_px_z + log_pz - log_q, dim=0) - math.log(len(z))


# --- model -------------------------------------------------------------------------------------

class VAE(nn.Module):
    """encode: x [B, C, side, side] in [0, 1] -> mu, logvar [B, d_z]; decode: z -> logits
    like x, whose sigmoid is the mean of p(x|z)."""

    def __init__(self, c, side, d_z):
        super().__init__()
        widths = [16 * 2 ** i for i in range(max(1, int(math.log2(side / 4))))]
        small = side // 2 ** len(widths)  # side of the smallest map, 4 to 7 pixels
        features = widths[-1] * small ** 2
        layers = []
        for i, o in pairwise([c, *widths]):
            layers += [nn.Conv2d(i, o, kernel_size=4, stride=2, padding=1),
                       nn.BatchNorm2d(o), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, HIDDEN),
                                   nn.BatchNorm1d(HIDDEN), nn.SiLU())
        self.mu, self.logvar = nn.Linear(HIDDEN, d_z), nn.Linear(HIDDEN, d_z)
        layers = [nn.Linear(d_z, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.SiLU(),
                  nn.Linear(HIDDEN, features), nn.Unflatten(1, (widths[-1], small, small))]
        for i, o in pairwise([*widths[::-1], c]):
            layers += [nn.BatchNorm2d(i), nn.SiLU(),
                       nn.ConvTranspose2d(i, o, kernel_size=4, stride=2, padding=1)]
        self.decoder = nn.Sequential(*layers)

    def encode(self, x):
        h = self.trunk(x)
        return self.mu(h), self.logvar(h)

    def decode(self, z):
        """z [..., d_z] -> logits [..., C, side, side]. For the layers the first are made one."""
        return self.decoder(z.flatten(0, -2)).unflatten(0, z.shape[:-1])


class Objective(NamedTuple):
    """Which loss a VAE is trained on."""
    likelihood: str              # of a pixel: "bernoulli" or "gaussian"
    x_sigma2: float              # of gaussian pixels: see vae_loss
    k: int = 1                   # draws of z in the bound
    with_kl: bool = True         # has the course's loss its KL term?
    share: float = 1.0           # of --steps and of the test pictures


def objective_of(name, args, c):
    """The objective of one of MODELS: vae, or one of the four short training runs of study.png."""
    if name == "vae":
        likelihood = args.likelihood or ("bernoulli" if c == 1 else "gaussian")
        return Objective(likelihood, args.x_sigma2, args.k)
    x_sigma2 = args.x_sigma2 * {"low-sigma2": 0.1, "high-sigma2": 10}.get(name, 1)
    return Objective("gaussian", x_sigma2, with_kl=name != "no-kl", share=STUDY)


def log_likelihood(objective, x, logits):
    """log p(x|z), nats; a Gaussian pixel has the variance x_sigma2 d_x, see vae_loss."""
    if objective.likelihood == "bernoulli":
        return log_bernoulli(x, logits)
    return log_gaussian(x, logits.sigmoid(), objective.x_sigma2 * x[0].numel())


def loss_of(objective, x, logits, z, mu, logvar):
    """The loss, mean over the batch: minus the bound with k draws of z, or the course's loss.

    In nats, but the course's is twice as much, up to a constant. With one draw the KL has its
    closed form, which has less noise than a draw.
    """
    if objective.k > 1:
        return -iwae_bound(log_likelihood(objective, x, logits), z, mu, logvar).mean()
    if objective.likelihood == "bernoulli":
        return negative_elbo(log_bernoulli(x, logits), mu, logvar).mean()
    x_rec = logits[0].sigmoid()  # of the only draw
    loss, data_term, _ = vae_loss(x, x_rec, mu, logvar, objective.x_sigma2)
    return loss if objective.with_kl else data_term


def mirrored(x):
    """Mirrors each colour picture with probability 1/2. Grey ones are not: a digit has a side."""
    if x.shape[1] == 1:
        return x
    return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)


def observed(objective, x):
    """x in [0, 1] as the likelihood takes it: a Bernoulli pixel is 1 with probability x, else 0."""
    return torch.bernoulli(x) if objective.likelihood == "bernoulli" else x


# --- train -------------------------------------------------------------------------------------

# `run` does what is no mathematics: run.batches shuffles the data, run.steps counts 1, 2, ... and
# saves what it is given, so that --resume can go on, run.log shows and keeps the numbers, and
# run.shoot adds pictures to process.png.

def train(run, args, objective, images):
    """Trains one VAE; returns it, and the z [n_samples, d_z] from which its samples are drawn."""
    torch.manual_seed(args.seed)
    c, side = images.x.shape[1:3]
    steps = max(1, round(args.steps * objective.share))
    z_fixed = torch.randn(args.n_samples, args.z_dim).to(run.device)  # the same for every model
    net = VAE(c, side, args.z_dim).to(run.device)
    opt = torch.optim.Adam(net.parameters(), lr=args.lr, betas=(0.9, 0.99), fused=True)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    batches = run.batches(images, args.batch)

    for _ in run.steps(steps, net=net, opt=opt, rate=rate):
        # x -> q(z|x) -> z -> p(x|z): descend -ELBO, or what the objective has in its place
        x01 = (mirrored(next(batches)[0]) + 1) / 2  # pictures come in [-1, 1]
        x = observed(objective, x01)
        mu, logvar = net.encode(x)
        z = reparameterise(mu, logvar, torch.randn(objective.k, *mu.shape, device=run.device))
        logits = net.decode(z)                                      # [k, B, C, side, side]
        loss = loss_of(objective, x, logits, z, mu, logvar)
        opt.zero_grad()
        loss.backward()
        opt.step()
        rate.step()
        run.log(loss=loss, kl=kl_standard_normal(mu, logvar).mean(),
                mse=F.mse_loss(logits[0].sigmoid(), x01))
        if run.at(SHOTS):
            run.shoot(generate(net.eval(), z_fixed[:36]))
            net.train()

    return net.eval(), z_fixed


# --- measures ----------------------------------------------------------------------------------

def results(args, name, objective, net, z_fixed, images, test):
    """Numbers and pictures of a trained VAE. Writes its weights, and for vae samples.pt and
    paths.pt: pictures between neighbouring codes, which chapter 07 reads with --score."""
    torch.manual_seed(args.seed)  # the same binarised test pictures in every run
    x01 = (common.to_float(test.x[:args.n_test]) + 1) / 2
    x = observed(objective, x01)
    n = max(1, round(args.n_test * objective.share))
    samples = generate(net, z_fixed[:1000])
    common.save(net.state_dict(), args.out / f"weights_{name}.pt")
    if name == "vae":
        common.save(common.to_uint8(generate(net, z_fixed)).cpu(), args.out / "samples.pt")
        common.save(common.paths(lambda z: generate(net, z), net.encode(x)[0]),
                    args.out / "paths.pt")
    x_train = observed(objective, (common.to_float(images.x[:32]) + 1) / 2)
    return {"pictures": pictures(net, x, x_train, samples), "likelihood": objective.likelihood,
            "n": len(x01[:n]), **measure(net, objective, x01[:n], x[:n], args.k_test),
            "distance": common.nearest(samples, images)[0].mean().item()}


@torch.no_grad()
def measure(net, objective, x01, x, k):
    """Numbers for test pictures [N, C, H, W] in [0, 1]: x01 as they are, x as they are observed.

    nll (minus iwae_bound with k draws of z), -elbo and kl are in nats for each picture. Those of
    Gaussian pixels are of densities, so they compare only at the same x_sigma2. mse: of the
    reconstruction from mu to x01. spread: root of the mean variance of the coordinates of z over
    all pictures, 1 for the prior.
    """
    nll, elbo, kl, mse, codes = [], [], [], [], []
    chunk = max(1, 1000 // k)  # so that about 1,000 pictures are decoded at once
    for x01_part, x_part in zip(x01.split(chunk), x.split(chunk)):
        mu, logvar = net.encode(x_part)
        z = reparameterise(mu, logvar, torch.randn(k, *mu.shape, device=x.device))
        log_px_z = log_likelihood(objective, x_part, net.decode(z))
        kl.append(kl_standard_normal(mu, logvar))
        nll.append(-iwae_bound(log_px_z, z, mu, logvar))
        elbo.append(negative_elbo(log_px_z, mu, logvar))
        mse.append(((net.decode(mu).sigmoid() - x01_part) ** 2).flatten(1).mean(dim=1))
        codes.append(z[0])
    numbers = {"nll": nll, "-elbo": elbo, "kl": kl, "mse": mse}
    spread = torch.cat(codes).var(dim=0, correction=0).mean().sqrt().item()
    return {name: torch.cat(parts).mean().item() for name, parts in numbers.items()} | {
        "spread": spread}


@torch.no_grad()
def generate(net, z):
    """The mean of p(x|z), in [-1, 1], for z [N, d_z]: a draw of p(x|z) would add pixel noise."""
    return torch.cat([2 * net.decode(part).sigmoid() - 1 for part in z.split(1000)])


@torch.no_grad()
def pictures(net, x, x_train, samples):
    """What the figures show, uint8, by name. x: test pictures, x_train: training ones, [0, 1]."""
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
    return {name: common.to_uint8(picture).cpu() for name, picture in kept.items()}


# --- figures -----------------------------------------------------------------------------------

def figures(args, images, done, log):
    """pictures.png: the first model; study.png: all; curves.png and study_curves.png."""
    title = f"VAE on {images.name}, seed {args.seed}, {args.z_dim} latent coordinates"
    name, numbers = next(iter(done.items()))
    cells = [(text, common.panel(numbers["pictures"][kind], columns)) for kind, columns, text in (
        ("pairs_train", 8, "training pictures, each left\nof its reconstruction"),
        ("pairs", 8, "test pictures, each left of\nits reconstruction"),
        ("several", 6, "top row: pictures; below: each\ndecoded from five draws of z"),
        ("samples", 8, "samples: decoded\nz ~ N(0, I)"),
        ("between", 8, "from one code to another\nin equal steps"),
        ("manifold", 15, "the latent plane, by\nquantiles of the prior"))
        if kind in numbers["pictures"]]
    common.save_panels(args.out / "pictures.png", [("", cells)], f"{title}: {name}")

    if len(done) > 1:
        reconstructions, samples = [], []
        for name, numbers in done.items():
            reconstructions.append((f"{name}\nmse {numbers['mse']:.3g}, kl {numbers['kl']:.3g}",
                                    common.panel(numbers["pictures"]["pairs"])))
            samples.append((
                f"spread {numbers['spread']:.3g}, distance {numbers['distance']:.3g}",
                common.panel(numbers["pictures"]["samples"])))
        common.save_panels(args.out / "study.png", [
            ("reconstructions", reconstructions), ("samples", samples)], title)

    for file, of_vae in (("curves.png", True), ("study_curves.png", False)):
        rows = [row for row in log if (row["model"] == "vae") == of_vae]
        if rows:
            common.plot_curves(args.out / file, rows, {
                "loss": "loss of a batch", "kl": "KL(q ‖ N(0, I)), nats",
                "mse": "mean squared error of a pixel in [0, 1],\nfor a draw of z"}, title)


# --- main --------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = common.parser(__doc__, __file__)
    g = p.add_argument_group("model")
    g.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL",
                   help=f"{', '.join(MODELS)}: the VAE; the course's loss with sigma^2 a tenth, "
                   "once, ten times --x-sigma2; without its KL term")
    g.add_argument("--likelihood", choices=["bernoulli", "gaussian"],
                   help="of the vae; if not given: bernoulli for one channel, else gaussian")
    g.add_argument("--x-sigma2", type=common.number(float, above=0), default=0.001,
                   help="divides the mean squared error in the course's loss (gaussian)")
    g.add_argument("--z-dim", type=common.number(int, 1), default=50, help="latent coordinates; 2: "
                   "draws the latent plane")
    g = p.add_argument_group("training")
    g.add_argument("-k", type=common.number(int, 1), default=1, help="samples of z in the bound "
                   "that the vae climbs; above 1: the importance-weighted autoencoder")
    g.add_argument("--steps", type=common.number(int, 1), default=5000, help="of the vae")
    g.add_argument("--batch", type=common.number(int, 1), default=128, help="pictures in a batch")
    g.add_argument("--lr", type=common.number(float, above=0), default=1e-2,
                   help="Adam's rate, falls to 0")
    g.add_argument("--k-test", type=common.number(int, 1), default=100, help="samples of z in the "
                   "bound on test pictures: more of them, a tighter bound")
    p.set_defaults(n_samples=N_SAMPLES, n_test=N_TEST)
    args = common.parse(p, argv, quick=dict(data="digits", steps=32, n_samples=1000, n_test=20))
    args.models = list(dict.fromkeys(args.models))
    return args


def main(argv=None):
    args = parse_args(argv)
    with common.Run(args) as run:
        images = common.load_images(args, run.device)
        test = common.load_images(args, run.device, train=False)
        common.check_side(images)
        common.check_batch(args, images, "batch norm needs more than one picture")
        for name in run.each(args.models):
            objective = objective_of(name, args, images.x.shape[1])
            net, z_fixed = train(run, args, objective, images)
            run.done[name] = results(args, name, objective, net, z_fixed, images, test)
        figures(args, images, run.done, run.rows)
        columns = ["n", "nll", "-elbo", "kl", "mse", "spread", "distance"]
        common.print_table([f"{images.name}: model", "likelihood", *columns], [
            [name, numbers["likelihood"], *(f"{numbers[column]:.4g}" for column in columns)]
            for name, numbers in run.done.items()])


if __name__ == "__main__":
    common.as_script(main)
