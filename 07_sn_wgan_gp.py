r"""07 - Spectral norm, Wasserstein loss, gradient penalty; and how generators are scored.

Papers   Arjovsky 2017, arXiv:1701.07875 (Wasserstein loss, clipping); Gulrajani 2017,
         arXiv:1704.00028 (gradient penalty); Miyato 2018, arXiv:1802.05957 (spectral norm);
         Salimans 2016, arXiv:1606.03498 (inception score); Heusel 2017, arXiv:1706.08500 (FID).
Idea     W1(p, q) = max over f of slope <= 1 of E_p f - E_q f: D is that f            -> wgan_d()
         Three ways to hold the slope: clip D's weights                                 -> clip()
         divide each layer by its largest singular value                       -> spectral_norm()
         or charge E (‖∇D(x̂)‖ - 1)² between data and fakes                  -> gradient_penalty()
         IS = exp E KL(p(y|x) ‖ p(y)): sure of each, of all kinds               -> inception_score()
         FID = ‖m - m'‖² + tr(C + C' - 2 (C C')^½) of features                 -> frechet_distance()
See      samples.png; scores.png: both scores and D's slope while training; truncation.png; log.csv,
         samples_{model}.pt, weights_{model}.pt (of G); scored.png with --score. Printed: FID and IS
         of a classifier of the digits, KL of its classes to uniform, distance to the data, slope of
         D, and the step whose FID was best: the last, 600, but for wgan-gp (540) and wgan (480).
         On MNIST, FID and slope: vanilla 70, 0.8; sn 75, 0.2; wgan-gp 81, 1.0; wgan-sn 104, 0.4;
         wgan 112, 0.002; real pictures 1.9, noise 542. Seeds 0 to 2, by one classifier: 70 ± 3,
         79 ± 4, 79 ± 2, 106 ± 10, 116 ± 6: where nothing breaks, nothing is to be stabilised. With
         20 steps of D to one of G (--full) it matters: vanilla collapses (319), sn has 162, wgan-gp
         129. Truncated z do not help this G: FID only grows (within 2: 76, 1: 120, 0.5: 271).
Time     3.5 to 4.3 min on 2 CPU cores; --full 68 min on one core; --quick 13 to 23 s.
Differs  Adam at 4e-3 (wgan's D: 1e-3), falling along a cosine, beta1 = 0, one step of D to one of
         G; Arjovsky: RMSprop 5e-5, Gulrajani: Adam 1e-4, both five. No dropout in D, as 02 has.
         "digit" scores come from 64 features of a small classifier: no published ones compare.
         Pictures in colour are scored at the end alone, for Inception takes minutes, and their z is
         not truncated; without Inception's weights there are no scores.
Run      python 07_sn_wgan_gp.py
         python 07_sn_wgan_gp.py --score out/*/samples*.pt
"""

import math
import socket
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torchvision.models import Inception_V3_Weights, inception_v3

import common

ADAM_BETAS = (0.0, 0.999)
LAMBDA = 10.0                    # weight of the gradient penalty: Gulrajani 2017
CLIP = 0.01                      # wgan keeps D's weights in [-CLIP, CLIP]: Arjovsky 2017, alg. 1
Z = 64                           # length of z
N_SAMPLES, N_NEAREST = 10_000, 1000  # pictures in samples_{model}.pt; compared with the data
TREND = 0.6                      # share of the trend that stays from one score to the next
LIMITS = (0.25, 0.5, 1.0, 1.5, 2.0, math.inf)  # of the truncated z


# --- the idea ----------------------------------------------------------------------------------
# D's and G's loss, both to be minimised, means over the batch. real, fake [B]: D's logits, or
# scores, of data and of G's pictures.

def bce_d(real, fake):
    """-E log σ(real) - E log(1 - σ(fake)), nats (Goodfellow et al. 2014, eq. 1)."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def nonsaturating_g(fake):
    """-E log σ(fake): G wants its pictures called real (Goodfellow et al. 2014, sec. 3). nats."""
    return F.softplus(-fake).mean()


def wgan_d(real, fake):
    """E fake - E real: minus the estimate of W1, times D's Lipschitz constant (Arjovsky 2017)."""
    return fake.mean() - real.mean()


def wgan_g(fake):
    """-E fake (Arjovsky et al. 2017, alg. 1)."""
    return -fake.mean()


def clip(net, limit):
    """Every parameter into [-limit, limit] (Arjovsky et al. 2017, alg. 1).

    Holds the slope below Π limit √(weights of a layer), times 2 for each convolution with strides:
    0.92 for 28x28 grey pixels and 0.01. What training reaches is a small part of it.
    """
    with torch.no_grad():
        for p in net.parameters():
            p.clamp_(-limit, limit)


def spectral_norm(weight, u, n_iter=1):
    """(σ, u): σ close to the largest singular value of weight [out, ...] seen as [out, rest].

    n_iter rounds of power iteration, v = Wᵀu / ‖Wᵀu‖, u = W v / ‖W v‖, and then σ = ‖Wᵀu‖: half a
    round more than Miyato et al. 2018, alg. 1, so that v need not be kept. u [out]: of length 1,
    from the call before: weights move little in a step, so one round a call follows them. σ is
    never above the true value; its gradient in the weight treats u and v as constants. Of a
    convolution it is the matrix that is normalised, as in the paper; the convolution's slope may be
    larger, by at most √(patches that hold a pixel): 2 for kernels of 4x4 with stride 2.
    """
    matrix = weight.flatten(1)
    with torch.no_grad():
        for _ in range(n_iter):
            v = F.normalize(matrix.T @ u, dim=0)
            u = F.normalize(matrix @ v, dim=0)
        v = F.normalize(matrix.T @ u, dim=0)
    return u @ matrix @ v, u


class SpectralNorm(nn.Module):
    """weight -> weight / σ: parametrize.register_parametrization(layer, "weight", SpectralNorm(w)).

    Keeps u from call to call, and moves it in training mode alone.
    """

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("u", F.normalize(torch.randn(len(weight)).to(weight), dim=0))

    def forward(self, weight):
        sigma, u = spectral_norm(weight, self.u, n_iter=int(self.training))
        if self.training:
            self.u = u
        return weight / sigma


def gradient_norms(critic, x):
    """‖∇_x critic(x)‖ of each example, [B]. Differentiable, also where the gradient is 0.

    critic: [B, ...] -> [B], each score a function of its own example alone (so no batch norm).
    """
    x = x.detach().requires_grad_()
    grad, = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return torch.linalg.vector_norm(grad.flatten(1), dim=1)


def gradient_penalty(critic, x_real, x_fake, generator=None):
    """E (‖∇critic(x̂)‖ - 1)², x̂ = α x + (1 - α) x_fake (Gulrajani et al. 2017, eq. 3).

    One α, uniform in [0, 1), for each example: x̂ lies on the line between a real and a fake one.
    Add 10 times this to the critic's loss; x_fake detached, for G has no part in it.
    """
    alpha = torch.rand(len(x_real), generator=generator).to(x_real)
    alpha = alpha.view(-1, *[1] * (x_real.ndim - 1))
    return ((gradient_norms(critic, alpha * x_real + (1 - alpha) * x_fake) - 1) ** 2).mean()


def inception_score(probs, splits=1):
    """exp E_x KL(p(y|x) ‖ p(y)): mean and standard deviation over `splits` parts.

    probs [N, K]: rows of probabilities, in an order of no meaning (shuffle first). From 1 (all rows
    equal) to K (each row sure of one class, all classes equally often). A softmax taken twice still
    gives rows of probabilities, and a score near 1. Raises ValueError for rows that are none
    (logits), and for fewer rows than splits.
    """
    if not 1 <= splits <= len(probs):
        raise ValueError(f"{len(probs)} rows do not make {splits} splits")
    if not (((probs.sum(dim=1) - 1).abs() < 1e-3) & (probs >= 0).all(dim=1)).all():
        raise ValueError("the rows are no probabilities: take the softmax of logits first")
    scores = []
    for part in probs.double().tensor_split(splits):
        p_y = part.mean(dim=0)
        kl = (torch.special.xlogy(part, part) - torch.special.xlogy(part, p_y)).sum(dim=1)
        scores.append(kl.mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def frechet_distance(features_a, features_b):
    """‖m_a - m_b‖² + tr(C_a + C_b - 2 (C_a^½ C_b C_a^½)^½), features [N, d] (Heusel et al. 2017).

    The squared W2 distance of two Gaussians with these means and covariances (unbiased, float64).
    >= 0 up to rounding, 0 for equal sets. Raises ValueError for d rows or fewer: their covariance
    is singular, and the result would say more of N than of the features.
    """
    d = features_a.shape[1]
    for features in (features_a, features_b):
        if len(features) < d + 1 or features.shape[1] != d:
            raise ValueError(f"{tuple(features_a.shape)}, {tuple(features_b.shape)}: needs the "
                             f"same d and at least d + 1 rows in both")
    a, b = features_a.double(), features_b.double()
    cov_a, cov_b = (torch.atleast_2d(torch.cov(x.T)) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    apart = (a.mean(dim=0) - b.mean(dim=0)).pow(2).sum()
    return (apart + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def truncated_normal(n, d, limit, generator=None):
    """n draws of N(0, I) in d dimensions, every coordinate drawn again until it is within ±limit.

    The truncation trick (Brock et al. 2019, arXiv:1809.11096): fewer kinds, nearer the typical.
    Raises ValueError for a limit that is not above 0.
    """
    if not limit > 0:
        raise ValueError(f"no draw lies within ±{limit}")
    z = torch.randn(n, d, generator=generator)
    while (outside := z.abs() > limit).any():
        z[outside] = torch.randn(int(outside.sum()), generator=generator)
    return z


# --- the table of models -----------------------------------------------------------------------

class Model(NamedTuple):
    """Both losses, what holds D's slope, and both rates."""
    d: Callable                  # (real, fake) -> loss of D
    g: Callable                  # fake -> loss of G
    lr: tuple = (4e-3, 4e-3)     # of D, of G
    clip: bool = False
    sn: bool = False
    penalty: bool = False


MODELS = {
    "vanilla": Model(bce_d, nonsaturating_g),
    "sn": Model(bce_d, nonsaturating_g, sn=True),
    "wgan": Model(wgan_d, wgan_g, lr=(1e-3, 4e-3), clip=True),  # a step of 4e-3 fills the box
    "wgan-sn": Model(wgan_d, wgan_g, sn=True),
    "wgan-gp": Model(wgan_d, wgan_g, penalty=True),
}


# --- model -------------------------------------------------------------------------------------

def channels(side):
    """Channels of the maps, largest map first; side of the smallest, 4 to 7 pixels if side >= 8."""
    halvings = max(1, int(math.log2(side / 4)))
    return [32 * 2 ** i for i in range(halvings)], side // 2 ** halvings


def generator(c, side):
    """[B, Z] -> pictures [B, C, side, side] in (-1, 1). Starts with normal weights of 0.02."""
    widths, small = channels(side)
    layers = [nn.Linear(Z, widths[-1] * small ** 2), nn.Unflatten(1, (widths[-1], small, small))]
    for wide, narrow in zip(widths[::-1], [*widths[-2::-1], c]):
        layers += [nn.BatchNorm2d(wide), nn.ReLU(),
                   nn.ConvTranspose2d(wide, narrow, kernel_size=4, stride=2, padding=1)]
    for layer in layers:
        if isinstance(layer, (nn.Linear, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers, nn.Tanh()).to(memory_format=torch.channels_last)  # draws faster


def discriminator(c, side, sn):
    """[B, C, side, side] -> logits or scores [B]. No batch norm; sn: σ = 1 in every layer."""
    widths, small = channels(side)
    layers = []
    for i, o in zip([c, *widths], widths):
        layers += [nn.Conv2d(i, o, kernel_size=4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    layers += [nn.Flatten(), nn.Linear(widths[-1] * small ** 2, 1), nn.Flatten(0)]
    for layer in layers:
        if sn and isinstance(layer, (nn.Conv2d, nn.Linear)):
            parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight))
    return nn.Sequential(*layers)


class Classifier(nn.Module):
    """x [B, 1, side, side] in [-1, 1] -> features [B, 64], logits [B, classes]."""

    def __init__(self, side, classes):
        super().__init__()
        small = math.ceil(math.ceil(side / 2) / 2)
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * small ** 2, 64), nn.ReLU())
        self.logits = nn.Linear(64, classes)

    def forward(self, x):
        h = self.features(x)
        return h, self.logits(h)


class Inception(nn.Module):
    """Inception v3 of torchvision: x [B, 3, H, W] in [-1, 1] -> features [B, 2048], logits."""

    def __init__(self, weights):
        super().__init__()
        self.net = inception_v3(init_weights=False)  # it takes [-1, 1]: transform_input is off
        self.net.load_state_dict(weights)
        self.logits, self.net.fc = self.net.fc, nn.Identity()

    def forward(self, x):
        x = F.interpolate(x, size=(299, 299), mode="bilinear", antialias=True)
        h = self.net(x)
        return h, self.logits(h)


# --- scores ------------------------------------------------------------------------------------

class Ruler(NamedTuple):
    """What scores are read with; those of two rulers do not compare."""
    name: str                    # "digit", "fashion" or "Inception"
    net: Callable                # x in [-1, 1] -> features [B, d], logits [B, K]
    reference: torch.Tensor      # features of real pictures [N, d], on the CPU
    real: torch.Tensor           # other real pictures, uint8, to see what a perfect score is


def make_ruler(args, images, test, device):
    """The ruler for this data and "", or None and why there is none."""
    if images.x.shape[1] == 1:
        name = "fashion" if images.name.startswith("Fashion") else "digit"
        net = classifier(args, name, images, test, device)
        return Ruler(name, net, read(net, test.x)[0], images.x[-N_SAMPLES:]), ""
    weights, d = Inception_V3_Weights.IMAGENET1K_V1, 2048
    reference, real = (test.x, images.x) if len(test.x) > d else (images.x[::2], images.x[1::2])
    if min(len(real), args.n_samples) <= d:
        return None, (f"a distance of {d} features needs {d + 1} samples and {2 * d + 2} training "
                      f"pictures; here are {args.n_samples} and {len(images.x)}")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds: a silent network must not hang the run
    try:
        state = weights.get_state_dict(check_hash=True, weights_only=True)
    except Exception:  # no network, or a broken file: the answer is the same
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        return None, (f"colour pictures are scored by Inception v3, and its weights cannot be had: "
                      f"put torchvision's {Path(weights.url).name} into {folder}")
    finally:
        socket.setdefaulttimeout(before)
    net = Inception(state).to(device).eval()
    return Ruler("Inception", net, read(net, reference[:N_SAMPLES])[0], real[:N_SAMPLES]), ""


def classifier(args, name, images, test, device):
    """A classifier of the data: that of a run before, or trained now and kept."""
    path = common.kept_path(args, f"{name}_classifier")
    expected = {"shape": str(list(images.x.shape[1:])), "data": images.name,
                "steps": str(args.classifier_steps), "seed": str(args.seed)}
    torch.manual_seed(args.seed)
    net = Classifier(images.x.shape[2], int(images.y.max()) + 1).to(device)
    if path.exists():
        kept = common.load_kept(path, ("net",), expected)
        net.load_state_dict(kept["net"])
    else:
        train_classifier(args, net, images)
        common.save({"settings": expected, "net": net.state_dict()}, path)
    correct = read(net.eval(), test.x)[1].argmax(dim=1) == test.y.cpu()
    print(f"the classifier reads {100 * correct.float().mean().item():.2f} % of the test pictures")
    return net


def train_classifier(args, net, images):
    opt = torch.optim.Adam(net.parameters(), fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.01, total_steps=args.classifier_steps)
    show = common.progress("classifier", args.classifier_steps, 128)
    batches = common.batches(images, 128, args.seed)
    for step in range(1, args.classifier_steps + 1):
        x, y = next(batches)
        loss = F.cross_entropy(net(x)[1], y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        rate.step()
        common.check_finite(step, loss=loss.item())
        show(step, loss=loss.item())


@torch.no_grad()
def read(net, x):
    """Features and class probabilities of pictures uint8 [N, C, H, W], on the CPU."""
    some = max(1, 400_000 // x[0].numel())  # pictures at a time: Inception's maps are large
    pairs = [net(common.to_float(part)) for part in x.split(some)]
    features, logits = (torch.cat(parts).cpu() for parts in zip(*pairs))
    return features, logits.softmax(dim=1)


def score(ruler, x):
    """FID to the ruler's reference, IS, and KL of a classifier's classes to uniform in nats."""
    features, probs = read(ruler.net, x)
    numbers = {"FID": frechet_distance(features, ruler.reference), "IS": inception_score(probs)[0]}
    if ruler.name != "Inception":
        k = probs.shape[1]
        p = torch.bincount(probs.argmax(dim=1), minlength=k).double() / len(probs)
        numbers["KL"] = torch.special.xlogy(p, k * p).sum().item()
    return numbers


def nearest_distance(x, images):
    """Mean distance of x [N, C, H, W] to the nearest of 10,000 training pictures, root mean square.

    In [-1, 1] units. Blur lowers it: read it beside the picture.
    """
    train = common.to_float(images.x[:10_000]).flatten(1)
    return (torch.cdist(x.flatten(1), train).amin(dim=1) / train.shape[1] ** 0.5).mean().item()


# --- train -------------------------------------------------------------------------------------

def train(args, name, n_critic, images, device, ruler, saved, done):
    """Trains one model; returns log, scores, pictures and G, and writes samples_{label}.pt and
    weights_{label}.pt.

    saved: the checkpoint to go on from, or None; done: results of the runs before, kept in it.
    n_critic: D's steps to one of G. All runs make --steps steps of D and G together, so
    that a high n_critic is paid for with steps of G.
    """
    torch.manual_seed(args.seed)
    model, (c, side), label = MODELS[name], images.x.shape[1:3], run_name(name, n_critic)
    steps = max(1, round(args.steps / (1 + n_critic)))
    z_fixed = torch.randn(args.n_samples, Z).to(device)  # the same for every model
    G, D = generator(c, side).to(device), discriminator(c, side, model.sn).to(device)
    # the rates are for 28 pixels: at 64, with two layers more, they diverge
    opt_d, opt_g = (torch.optim.Adam(net.parameters(), lr=lr * min(1.0, (28 / side) ** 2),
                                     betas=ADAM_BETAS, fused=True)
                    for net, lr in zip((D, G), model.lr))
    rate_d, rate_g = (torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
                      for opt in (opt_d, opt_g))
    parts = dict(G=G, D=D, opt_g=opt_g, opt_d=opt_d, rate_g=rate_g, rate_d=rate_d)

    first, log = 0, []
    if saved:
        first, log = saved["step"], saved["log"]
        common.restore(saved, parts)
    batches = common.batches(images, args.batch, args.seed, first * n_critic)
    show = common.progress(label, steps, args.batch * n_critic, first)

    with common.ctrl_c() as pressed:
        for step in range(first + 1, steps + 1):
            # D's half, n_critic times: descend its loss, with the slope held; G untouched
            for _ in range(n_critic):
                x = next(batches)[0]
                x_fake = G(torch.randn(len(x), Z, device=device))
                real, fake = D(torch.cat([x, x_fake.detach()])).split(len(x))
                loss_d = total_d = model.d(real, fake)
                if model.penalty:
                    total_d = total_d + LAMBDA * gradient_penalty(D, x, x_fake.detach())
                opt_d.zero_grad()
                total_d.backward()
                opt_d.step()
                if model.clip:
                    clip(D, CLIP)

            # G's half: descend its loss through D, D untouched
            loss_g = model.g(D(x_fake))
            opt_g.zero_grad()
            loss_g.backward(inputs=tuple(G.parameters()))
            opt_g.step()

            rate_d.step()
            rate_g.step()
            common.check_finite(step, loss_d=total_d.item(), loss_g=loss_g.item())
            show(step, loss_d=loss_d.item(), loss_g=loss_g.item())
            if common.due(step, steps, 10):
                slope = gradient_norms(D.eval(), torch.cat([x, x_fake])).mean().item()
                D.train()
                log.append({"model": label, "step": step, "updates": step * (1 + n_critic),
                            "loss_d": loss_d.item(), "loss_g": loss_g.item(), "slope": slope})
                if ruler and ruler.name != "Inception":  # that would take minutes each time
                    log[-1] |= score(ruler, generate(G, z_fixed[:args.n_score]))
            if common.due(step, steps, 10) or pressed():
                common.save_checkpoint(args, parts, model=label, step=step, log=log, done=done)
            if pressed():
                common.stop(step)

    samples = generate(G, z_fixed)
    common.save(samples.cpu(), args.out / f"samples_{label}.pt")
    common.save(G.state_dict(), args.out / f"weights_{label}.pt")
    best = min(log, key=lambda row: row["FID"])["step"] if "FID" in log[-1] else math.nan
    return {"log": log, "pictures": samples[:64].cpu().clone(), "slope": log[-1]["slope"],
            "best step": best,
            "G": {key: value.cpu() for key, value in G.state_dict().items()},
            **(score(ruler, samples) if ruler else {}),
            "distance": nearest_distance(common.to_float(samples[:N_NEAREST]), images)}


def run_name(name, n_critic):
    return name if n_critic == 1 else f"{name}-x{n_critic}"


@torch.no_grad()
def generate(G, z):
    """G(z) with the batch norm of evaluation, a thousand at a time, as uint8."""
    G.eval()
    x = torch.cat([common.to_uint8(G(part)) for part in z.split(1000)])
    G.train()
    return x


# --- figures -----------------------------------------------------------------------------------

def cell(title, x, numbers=()):
    """A cell for save_panels: 64 of the pictures, titled with the scores if there are any."""
    found = ", ".join(f"{key} {numbers[key]:.3g}" for key in ("FID", "IS") if key in numbers)
    return f"{title}\n{found}", common.panel(x[:64])


def figures(args, images, runs, done):
    """samples.png, scores.png and log.csv; a row for each n_critic that was asked for."""
    title = f"{images.name}, seed {args.seed}, {args.steps:,} steps of D and G together"
    rows = {n: {label: done[label] for label, run in runs.items() if run[1] == n}
            for n in args.n_critic}
    common.save_panels(args.out / "samples.png", [
        (f"n_critic {n}", [cell("data", images.x), *(cell(label, run["pictures"], run)
                                                      for label, run in row.items())])
        for n, row in rows.items()], f"{title}, same z")
    columns = [column for column in ("FID", "IS", "slope")
               if column in next(iter(done.values()))["log"][0]]
    common.save_panels(args.out / "scores.png", [("", [
        (f"{column}, n_critic {n}", lambda ax, row=row, column=column: draw_trends(ax, row, column))
        for column in columns]) for n, row in rows.items()],
        f"{title}\n{args.n_score:,} samples; thick: trend")
    common.write_log(args.out / "log.csv", [row for run in done.values() for row in run["log"]])


def draw_trends(ax, row, column):
    """A column of each run's log, thin, and its exponential moving average, thick."""
    for colour, (label, run) in enumerate(row.items()):
        updates, values = ([line[key] for line in run["log"]] for key in ("updates", column))
        ax.plot(updates, values, f"C{colour}", linewidth=0.6, alpha=0.5)
        ax.plot(updates, trend(values), f"C{colour}", label=label)
    if column == "slope":
        ax.set_yscale("log")
        ax.legend(fontsize=6)
    ax.set_xlabel("steps of D and G")


def trend(values):
    """s <- TREND s + (1 - TREND) v, from the first value on."""
    smooth = values[:1]
    for value in values[1:]:
        smooth.append(TREND * smooth[-1] + (1 - TREND) * value)
    return smooth


def truncation(args, images, ruler, label, kept, device):
    """truncation.png and its table: scores of one G when every coordinate of z is within ±limit."""
    G = generator(*images.x.shape[1:3]).to(device)
    G.load_state_dict(kept)
    rng = torch.Generator().manual_seed(args.seed)
    x = {limit: generate(G, truncated_normal(args.n_samples // 2, Z, limit, rng).to(device))
         for limit in LIMITS}
    numbers = {limit: score(ruler, pictures) for limit, pictures in x.items()}
    names = ["none" if limit == math.inf else f"{limit:g}" for limit in LIMITS]

    def curve(key):
        return lambda ax: ax.plot(names, [numbers[limit][key] for limit in LIMITS], "o-")

    cells = [(f"{ruler.name} {key} against\nthe limit of |z|", curve(key)) for key in ("FID", "IS")]
    cells += [cell(name, x[limit], numbers[limit]) for name, limit in zip(names, LIMITS)]
    common.save_panels(args.out / "truncation.png", [("", cells[:4]), ("", cells[4:])],
                       f"truncated z, {label} on {images.name}, {args.n_samples // 2:,} samples")
    common.print_table([f"truncated at ({args.n_samples // 2:,} samples)", *numbers[math.inf]], [
        [name, *(f"{value:.3g}" for value in numbers[limit].values())]
        for name, limit in zip(names, LIMITS)])


# --- tables ------------------------------------------------------------------------------------

def calibration(args, ruler, images):
    """Scores of what needs no judge: real pictures that the ruler does not compare with, noise."""
    real = ruler.real
    rng = torch.Generator().manual_seed(args.seed)
    noise = torch.randint(256, real.shape, dtype=torch.uint8, generator=rng).to(real.device)
    results = {label: report(ruler, x, images)
               for label, x in (("real training pictures", real), ("noise", noise))}
    if len(images.x) < 2 * N_SAMPLES:
        del results["real training pictures"]["distance"]  # they would be compared with themselves
    return results


def report(ruler, x, images):
    """Scores and distance of pictures x, and how many they are."""
    return {"n": len(x), **score(ruler, x),
            "distance": nearest_distance(common.to_float(x[:N_NEAREST]), images)}


def print_scores(images, ruler, results, columns):
    """One row for each name of `results`."""
    header = [f"{ruler.name} {column}" if ruler and column in ("FID", "IS") else column
              for column in columns]
    common.print_table([images.name, *header], [
        [label, *(f"{numbers.get(column, math.nan):{',' if column == 'n' else '.3g'}}"
                  for column in columns)]
        for label, numbers in results.items()])


def read_files(args, images):
    """What --score names, by path: uint8 [N, C, H, W]. Other shapes are left out, aloud."""
    shape, found = list(images.x.shape[1:]), {}
    for path in args.score:
        try:
            x = torch.load(path, map_location="cpu", weights_only=True)
            theirs = x.dtype, list(x.shape[1:])
        except Exception:  # whatever is wrong with the file, the answer is the same
            common.fail(f"{path} cannot be read: --score takes what torch.save made of a uint8 "
                        "tensor [N, C, H, W]")
        if theirs == (torch.uint8, shape):
            found[common.relative(path)] = x
        else:
            print(f"left out: {path} holds {theirs[0]} {theirs[1]}, the data torch.uint8 {shape}")
    if not found:
        common.fail("no file is left to score: are they of this data set? (see --data)")
    return found


def score_files(args, images, ruler, files):
    """scored.png and the table of --score, best first."""
    d = ruler.reference.shape[1]
    for label, x in files.items():
        if len(x) <= d:
            common.fail(f"{label} holds {len(x)} pictures, and a distance of {d} features needs "
                        f"{d + 1}")
    results = {label: report(ruler, x.to(images.x.device), images) for label, x in files.items()}
    results = dict(sorted(results.items(), key=lambda item: item[1]["FID"]))
    cells = [cell("data\n", images.x)] + [
        cell("\n".join(Path(label).with_suffix("").parts[-2:]), files[label], numbers)
        for label, numbers in results.items()]
    common.save_panels(args.out / "scored.png", [
        ("", cells[i:i + 6]) for i in range(0, len(cells), 6)],
        f"{ruler.name} scores, {images.name}")
    print_scores(images, ruler, results | calibration(args, ruler, images),
                 ["n", "FID", "IS", "KL", "distance"])
    if len({run["n"] for run in results.values()}) > 1:
        print("n differs: FID falls as n grows, so compare rows of equal n")


# --- main --------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = common.parser(__doc__, __file__)
    g = p.add_argument_group("models")
    g.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL",
                   help=f"{', '.join(MODELS)}")
    g.add_argument("--n-critic", nargs="+", type=common.positive_int, metavar="N",
                   help="D's steps to one of G, one run for each; if not given: 1")
    g = p.add_argument_group("training")
    g.add_argument("--steps", type=common.positive_int, default=1200,
                   help="of D and G together, in each run")
    g.add_argument("--batch", type=common.positive_int, default=64, help="pictures in a batch")
    g.add_argument("--full", action="store_true",
                   help="the study: n_critic 1, 2, 5, 20, and twice the steps")
    g = p.add_argument_group("scores")
    g.add_argument("--score", nargs="+", type=Path, metavar="FILE",
                   help="no training: score samples.pt of any chapter, or your own uint8 tensor")
    p.set_defaults(classifier_steps=1000, n_samples=N_SAMPLES, n_score=2000)
    args = common.parse(p, argv, quick=dict(data="digits", steps=12, classifier_steps=20,
                                            n_samples=1000, n_score=200))
    args.n_critic = args.n_critic or ([1, 2, 5, 20] if args.full else [1])
    args.steps *= 2 if args.full else 1
    return args


def check(images):
    """Ends the run if the pictures do not fit the networks."""
    widths, small = channels(images.x.shape[2])
    common.check_side(images, small * 2 ** len(widths))


def main(argv=None):
    args = parse_args(argv)
    device = common.start(args)
    images = common.load_images(args, device)
    test = common.load_images(args, device, train=False)
    check(images)
    saved = common.load_checkpoint(args)
    files = read_files(args, images) if args.score else None
    ruler, why = make_ruler(args, images, test, device)
    if files and not ruler:
        common.fail(f"no scores: {why}")
    if files:
        return score_files(args, images, ruler, files)
    if not ruler:
        print(f"no scores: {why}")
    runs = {run_name(name, n): (name, n) for n in args.n_critic for name in args.models}
    done = saved["done"] if saved else {}
    for label, (name, n) in runs.items():
        if label not in done:
            resumed = saved if saved and saved["model"] == label else None
            done[label] = train(args, name, n, images, device, ruler, resumed, dict(done))
    figures(args, images, runs, done)
    results = done | (calibration(args, ruler, images) if ruler else {})
    print_scores(images, ruler, results, ["FID", "IS", "KL", "distance", "slope", "best step"])
    if ruler and ruler.name != "Inception":
        best = min(done, key=lambda label: done[label]["FID"])
        truncation(args, images, ruler, best, done[best]["G"], device)


if __name__ == "__main__":
    main()
