r"""07 - Three ways to bound the slope of D, and four scores for generators.

Papers   WGAN 1701.07875, WGAN-GP 1704.00028, spectral norm 1802.05957; scores:
         IS 1606.03498, FID 1706.08500, KID 1801.01401, recall 1904.06991
Idea     The slope of D at a picture x is ‖∇D(x)‖. Data p and samples q have
         Wasserstein distance: largest E_p D - E_q D, slopes <= 1  -> wgan_d()
         To bound the slope: clip D's weights (wgan)               -> clip()
         or divide weights by their top singular value (sn) -> SpectralNorm()
         or add λ E (‖∇D‖ - 1)² to the loss (wgan-gp)  -> gradient_penalty()
         IS = exp E KL(p(y|x) ‖ p(y)), classes y         -> inception_score()
         FID = ‖m - m'‖² + tr(C + C' - 2 (C C')^½): means, covariances of a
         network's features of data and samples        -> frechet_distance()
         KID: MMD² of these features, unbiased           -> kernel_distance()
         Recall: the share of real pictures near a sample         -> recall()
See      samples.png, scores.png, truncation.png. On MNIST the FID is 10 to 16
         for vanilla (plain GAN), sn, wgan-gp; 60 for wgan. Little is gained.
Differs  Learning rates above the papers', one step of D to one of G (theirs:
         often five), λ = 1 (10); the logit of sn is 8 D(x). Grey pictures are
         scored by a small classifier: compare with no published score.
Try      With --n-critic 5, which model loses the least? Predict, then run.
Run      python 07_sn_wgan_gp.py [--score out/*/samples*.pt]
"""

import math
import socket
from glob import glob
from itertools import pairwise
from os.path import expanduser
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim import lr_scheduler, swa_utils

import common

SMALL = 1024  # pictures of at most so many values (C·H·W) have fully connected layers
SNAPSHOTS = (0.05, 0.2, 0.5, 1.0)  # shares of a training run after which process.png is written
N_SAMPLES, N_PAIRS = 10_000, 2000  # samples of a model; of these, recall and KID compare all pairs
LIMITS = (0.25, 0.5, 1.0, 2.0, math.inf)  # of |z|, for truncation.png


# --- the idea ----------------------------------------------------------------------------------
# Losses of D and G, to be minimised: tensors without dimensions. real, fake [B]: what D returns for
# data and for G's pictures. E: mean over the batch. softplus(a) = log(1 + exp(a)) = -log σ(-a).

def bce_d(real, fake):
    """-E log σ(real) - E log(1 - σ(fake)) of logits [B], in nats (Goodfellow et al. 2014, eq. 1).
    Exact also where σ is rounded to 0 or 1."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def nonsaturating_g(fake):
    """-E log σ(fake) of logits [B], in nats: G wants its pictures to be called real (Goodfellow et
    al. 2014, sec. 3). Exact also where σ is rounded to 0 or 1."""
    return F.softplus(-fake).mean()


def wgan_d(real, fake):
    """E fake - E real, of any numbers [B] (Arjovsky et al. 2017). Minus this is at most
    K W1(data, fakes), K the largest slope of D, and the best D attains it. W1 (Wasserstein): the
    least mean distance over which the fakes can be moved onto the data."""
    return fake.mean() - real.mean()


def wgan_g(fake):
    """-E fake, of any numbers [B] (Arjovsky et al. 2017, alg. 1)."""
    return -fake.mean()


def clip(net, limit):
    """Clips every parameter of the module net to [-limit, limit], in place (Arjovsky 2017, alg. 1).
    This bounds the slope of D: 240 for 28x28 grey pixels and 0.03. Training reaches far less."""
    with torch.no_grad():
        for p in net.parameters():
            p.clamp_(-limit, limit)


def spectral_norm(weight, u, n_iter=1):
    """(σ, u): σ is close to the largest singular value of W, the weight [out, ...] as a matrix.

    n_iter rounds of power iteration, v = Wᵀu / ‖Wᵀu‖, u = W v / ‖W v‖, and one more v give
    σ = uᵀ W v, never above the true value (Miyato et al. 2018, alg. 1, stop half a round earlier).
    u [out]: of length 1, from the call before, since W changes little in a step; n_iter = 0 and
    W = 0 return u as it is. σ: no dimensions; its gradient takes u and v as constants, and the new
    u has none. float32: max |W| from 1e-35 to 1e35. The slope of a convolution may be larger, by at
    most √n if each pixel lies in n patches: 2 for 4x4 with stride 2."""
    matrix = weight.flatten(1)
    with torch.no_grad():
        # by a power of 2, which is exact; else the squares in ‖Wᵀu‖ may be infinite, or 0
        largest = matrix.abs().amax().clamp(min=torch.finfo(matrix.dtype).tiny)
        scaled = matrix / largest.log2().floor().exp2()
        for _ in range(n_iter):
            v = F.normalize(scaled.T @ u, dim=0)
            u = torch.where(v.any(), F.normalize(scaled @ v, dim=0), u)  # not 0 if W is
        v = F.normalize(scaled.T @ u, dim=0)
    return u @ matrix @ v, u


class SpectralNorm(nn.Module):
    """weight -> weight / σ, or weight itself where σ is 0.

    parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight)) adds it to a
    Linear or Conv layer. The buffer u changes in training mode only. The weight of a
    ConvTranspose2d is [in, ...]: [in, rest] is normalised, where torch's own takes [out, rest]."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("u", F.normalize(torch.randn(len(weight)).to(weight), dim=0))

    def forward(self, weight):
        device = "cpu" if weight.is_meta else weight.device.type  # "meta" has no autocast
        with torch.autocast(device, enabled=False):  # autocast would round u and σ to bfloat16
            sigma, u = spectral_norm(weight, self.u, n_iter=int(self.training))
        if self.training and not u.is_inference():  # torch.inference_mode's cannot be trained with
            self.u = u
        return weight / torch.where(sigma > 0, sigma, 1.0)


def gradient_norms(critic, x):
    """‖∇_x critic(x)‖ of each example of x [B, ...], a tensor [B]. Differentiable in the critic's
    parameters, with finite derivatives also where the gradient is 0; x counts as a constant.
    critic: [B, ...] -> [B], each score a function of its own example alone (so no batch norm): then
    the gradient of their sum holds the gradient of each example."""
    x = x.detach().requires_grad_()
    grad, = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return torch.linalg.vector_norm(grad.flatten(1), dim=1)


def gradient_penalty(critic, x_real, x_fake, rng=None):
    """E (‖∇critic(x̂)‖ - 1)², x̂ = α x_real + (1 - α) x_fake (Gulrajani et al. 2017, eq. 3).

    x_real, x_fake: floats [B, ...]. One α for each example, uniform in [0, 1), from rng if given:
    x̂ lies on the line between a real and a fake picture. Mean over the batch, differentiable as in
    gradient_norms. Raises ValueError for different shapes, and for integers, where α would be 0."""
    if x_real.shape != x_fake.shape:
        raise ValueError(f"x_real {tuple(x_real.shape)} and x_fake {tuple(x_fake.shape)} differ")
    if not (x_real.is_floating_point() and x_fake.is_floating_point()):
        raise ValueError(f"x_real {x_real.dtype} and x_fake {x_fake.dtype} are not both floats")
    alpha = torch.rand(len(x_real), *[1] * (x_real.ndim - 1), generator=rng).to(x_real)
    x_hat = alpha * x_real + (1 - alpha) * x_fake
    return ((gradient_norms(critic, x_hat) - 1) ** 2).mean()


def inception_score(probs, splits=1):
    """exp E_x KL(p(y|x) ‖ p(y)): mean and standard deviation over `splits` parts, two floats.

    probs [N, K]: rows of probabilities of any dtype, also integers; computed in float64. The parts
    are consecutive rows (shuffle them first); the deviation divides by their number. From 1, all
    rows equal, to K, each row sure of one class and all classes equally often. Raises ValueError
    for other dimensions, splits < 1 or > N, and rows that are no distributions: a sum off 1 by more
    than 1e-3 (or four times the eps of a coarser dtype), a value below 0 or nan."""
    if probs.ndim != 2 or not 1 <= splits <= len(probs):
        raise ValueError(f"probs {tuple(probs.shape)}, {splits} splits: needs [N, K], N >= splits")
    # rounding changes a probability p by less than eps p, so their sum by less than eps
    eps = torch.finfo(probs.dtype).eps if probs.is_floating_point() else 0.0
    wrong = (probs.double().sum(dim=1) - 1).abs()
    if not ((wrong <= max(1e-3, 4 * eps)) & (probs >= 0).all(dim=1)).all():
        raise ValueError("the rows are no probabilities: take the softmax of logits first")
    scores = torch.stack([
        (torch.xlogy(part, part) - torch.xlogy(part, part.mean(dim=0))).sum(dim=1).mean().exp()
        for part in probs.double().tensor_split(splits)])
    return scores.mean().item(), scores.std(correction=0).item()


def check_features(features_a, features_b, rows):
    """Both in float64. ValueError unless they are [N, d] of any dtype with the same d (1 or more),
    at least `rows` rows each (N may differ), and finite values."""
    for x in (features_a, features_b):
        if x.ndim != 2 or x.shape[1:] != features_a.shape[1:] or len(x) < rows or (
                not x.isfinite().all()):
            raise ValueError(f"features {tuple(features_a.shape)} and {tuple(features_b.shape)} "
                             f"must be finite, [N, d] with the same d and at least {rows} rows")
    return features_a.double(), features_b.double()


def frechet_distance(features_a, features_b):
    """‖m_a - m_b‖² + tr(C_a + C_b - 2 (C_a^½ C_b C_a^½)^½), a float (Heusel et al. 2017).

    features: see check_features; m: means, C: unbiased covariances. The squared W2 distance of two
    Gaussians with these m and C; 0 for equal sets, else above 0, but rounding may give
    -1e-8 d (tr C_a + tr C_b) if the C are singular. ValueError for d rows or fewer, where the
    result would say more about N than about the features."""
    a, b = check_features(features_a, features_b, math.prod(features_a.shape[1:]) + 1)
    cov_a, cov_b = (torch.atleast_2d(torch.cov(x.T)) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    # C_a^½ C_b C_a^½ is symmetric and has the eigenvalues of C_a C_b
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    apart = (a.mean(dim=0) - b.mean(dim=0)).pow(2).sum()
    return (apart + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def kernel_distance(features_a, features_b):
    """KID: E k(a, a') + E k(b, b') - 2 E k(a, b), k(a, b) = (a·b / d + 1)³ (Binkowski et al. 2018).
    A float. Means over all pairs of different rows, so it is unbiased: 0 on average for samples of
    one distribution, however few; a single value may be negative. features: see check_features.
    ValueError for fewer than 2 rows."""
    a, b = check_features(features_a, features_b, 2)

    def total(a, b):  # over all pairs, a thousand rows at a time
        return sum(((part @ b.T / b.shape[1] + 1) ** 3).sum() for part in a.split(1000))

    def within(a):
        with_itself = (((a ** 2).mean(dim=1) + 1) ** 3).sum()
        return (total(a, a) - with_itself) / (len(a) * (len(a) - 1))

    return (within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b))).item()


def recall(features_real, features_fake, k=3):
    """Share of the real rows within the radius of a fake row, which is the distance to its k-th
    nearest other fake row (Kynkäänniemi et al. 2019, eq. 2): how much of the data's variety the
    fakes have. A float; compare equal N only. features: see check_features. ValueError for k < 1
    and k rows or fewer. Precision, with the roles exchanged, is left out: a G that generates a
    single good picture has the precision 1."""
    real, fake = check_features(features_real, features_fake, k + 1)
    if k < 1:
        raise ValueError(f"k must be 1 or more, not {k}")
    exact = "donot_use_mm_for_euclid_dist"  # the distance of equal rows is 0
    radii = torch.cat([torch.cdist(part, fake, compute_mode=exact).topk(  # k + 1: with itself
        k + 1, largest=False).values[:, -1] for part in fake.split(1000)])
    inside = [(torch.cdist(part, fake, compute_mode=exact) <= radii).any(dim=1)
              for part in real.split(1000)]
    return torch.cat(inside).double().mean().item()


def truncated_normal(n, d, limit, rng=None):
    """[n, d] samples of N(0, 1) given |z| <= limit: √2 erfinv(u erf(limit / √2)), u in [-1, 1).
    The truncation trick (Brock et al. 2019, 1809.11096): from such z, G generates fewer kinds of
    pictures, and more typical ones. Computed in float64, for limits from 1e-30 to 1e300; returned
    in the default dtype. limit = inf: torch.randn. ValueError for a limit that is not above 0."""
    if not limit > 0:
        raise ValueError(f"no sample lies within ±{limit}")
    if limit == math.inf:
        return torch.randn(n, d, generator=rng)
    u = 2 * torch.rand(n, d, generator=rng, dtype=torch.float64) - 1
    z = math.sqrt(2) * torch.erfinv(u * math.erf(limit / math.sqrt(2)))
    return z.clamp(-limit, limit).to(torch.get_default_dtype())  # rounding may have passed it


# --- model -------------------------------------------------------------------------------------

def generator(d_z, c, side):
    """[B, d_z] -> pictures [B, C, side, side] in (-1, 1). Weights are initialised by N(0, 0.02²).
    Small pictures (SMALL): fully connected layers first, and few channels."""
    hidden, width = ([500, 500], 8) if c * side ** 2 <= SMALL else ([], 32)
    widths = [width * 2 ** i for i in range(max(1, int(math.log2(side / 4))))]
    small = side // 2 ** len(widths)  # side of the smallest map, 4 to 7 pixels
    layers = []
    for i, o in pairwise([d_z, *hidden, widths[-1] * small ** 2]):
        layers += [nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU()]
    layers.append(nn.Unflatten(1, (widths[-1], small, small)))
    for i, o in pairwise([*widths[::-1], c]):
        layers += [nn.ConvTranspose2d(i, o, kernel_size=4, stride=2, padding=1),  # side doubles
                   nn.BatchNorm2d(o), nn.ReLU()]
    layers[-2:] = [nn.Tanh()]  # in the place of the last batch norm and ReLU
    for layer in layers:
        if isinstance(layer, (nn.Linear, nn.ConvTranspose2d)):  # as in DCGAN
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # faster on the CPU


def discriminator(c, side, sn):
    """[B, C, side, side] -> [B]: logits, or for the Wasserstein loss any numbers. No batch norm.
    sn: spectral norm; 20 passes bring the largest singular values from up to 1.6 below 1.05."""
    # SiLU is smooth, as the gradient penalty needs it. But its slope is 1/2 at 0: with spectral
    # norm, where no layer amplifies, every layer would halve the signal
    activation = nn.LeakyReLU(0.2) if sn else nn.SiLU()
    if c * side ** 2 <= SMALL:
        layers, features = [nn.Flatten()], 512
        for i, o in pairwise([c * side ** 2, 512, features]):
            layers += [nn.Linear(i, o), activation]
    else:
        widths = [32 * 2 ** i for i in range(max(1, int(math.log2(side / 4))))]
        small = side // 2 ** len(widths)  # side of the smallest map, 4 to 7 pixels
        layers, features = [], widths[-1] * small ** 2
        for i, o in pairwise([c, *widths]):
            layers += [nn.Conv2d(i, o, kernel_size=4, stride=2, padding=1), activation]
            nn.init.kaiming_normal_(layers[-2].weight)  # torch's is smaller, and D would stay 1/2
        layers.append(nn.Flatten())
    layers += [nn.Linear(features, 1), nn.Flatten(0)]
    for layer in layers:
        if sn and isinstance(layer, (nn.Conv2d, nn.Linear)):
            parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight))
    return nn.Sequential(*layers)


class Model(NamedTuple):
    """The losses of a model, what bounds the slope of D, and settings that suit it."""
    loss_d: Callable             # (real, fake) -> loss of D
    loss_g: Callable             # fake -> loss of G
    clip: float = 0.0            # if above 0: D's weights stay in [-clip, clip]
    sn: bool = False             # D has spectral norm
    penalty: float = 0.0         # λ, the weight of the gradient penalty in D's loss
    scale: float = 1.0           # s: the losses see s D(x); a small slope keeps D(x) near 0
    lr_d: float = 5e-4           # Adam's learning rates at the start
    lr_g: float = 2e-3
    beta2: float = 0.9           # of Adam; beta1 is a flag


MODELS = {
    "vanilla": Model(bce_d, nonsaturating_g),
    "sn": Model(bce_d, nonsaturating_g, sn=True, scale=8.0, lr_d=3e-4, lr_g=3e-3, beta2=0.999),
    "wgan": Model(wgan_d, wgan_g, clip=0.03, lr_d=1e-3, lr_g=1e-3),  # Arjovsky 2017: 0.01
    "wgan-gp": Model(wgan_d, wgan_g, penalty=1.0, lr_d=1e-3),        # Gulrajani 2017: 10
    "wgan-sn": Model(wgan_d, wgan_g, sn=True, beta2=0.999),
}


def classifier(side, classes):
    """[B, 1, side, side] in [-1, 1] -> logits [B, classes]; without the last layer: 64 features."""
    small = math.ceil(math.ceil(side / 2) / 2)
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * small ** 2, 64), nn.ReLU(), nn.Linear(64, classes))


def inception(weights):
    """torchvision's: [B, 3, H, W] in [-1, 1] -> logits; without the last layer: 2,048 features."""
    net = torchvision.models.inception_v3(init_weights=False)  # for [-1, 1]: no transform_input
    net.load_state_dict(weights)
    logits, net.fc = net.fc, nn.Identity()
    return nn.Sequential(torchvision.transforms.Resize((299, 299)), net, logits)


# --- train -------------------------------------------------------------------------------------

def train(run, args, model, n_critic, images, quick_score):
    """Trains one model, with n_critic steps of D to one of G, which together are 2 --steps. Returns
    the averaged G, and z [n_samples, d_z] for its samples. quick_score: (G, z) -> dict, or {}."""
    torch.manual_seed(args.seed)
    c, side = images.x.shape[1:3]
    steps = max(1, round(2 * args.steps / (1 + n_critic)))
    z_fixed = torch.randn(args.n_samples, args.z_dim).to(run.device)  # the same for every model
    G = generator(args.z_dim, c, side).to(run.device)
    D = discriminator(c, side, model.sn).to(run.device)
    opt_d, opt_g, schedule_d, schedule_g = optimisers(args, model, G, D, steps, side)
    # the average of G's weights over about a quarter of the steps: better pictures than the last
    average = swa_utils.AveragedModel(
        G, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(math.exp(-4 / steps)))
    batches = run.batches(images, args.batch)

    for _ in run.steps(steps, G=G, D=D, average=average, opt_d=opt_d, opt_g=opt_g,
                       schedule_d=schedule_d, schedule_g=schedule_g):
        # D's half, n_critic times: minimise loss_d(s D(x), s D(G(z))) + λ E (‖∇D(x̂)‖ - 1)²
        for _ in range(n_critic):
            x = next(batches)[0]
            x_fake = G(torch.randn(len(x), args.z_dim, device=run.device))
            scores = model.scale * D(torch.cat([x, x_fake.detach()]))  # [2 B], both in one pass
            loss_d = model.loss_d(*scores.split(len(x)))  # real, fake
            if model.penalty:
                loss_d = loss_d + model.penalty * gradient_penalty(D, x, x_fake)
            opt_d.zero_grad()
            loss_d.backward()
            opt_d.step()
            if model.clip:
                clip(D, args.clip or model.clip)

        # G's half: minimise loss_g(s D(G(z))), the pictures that D has just seen, with the new D
        loss_g = model.loss_g(model.scale * D(x_fake))
        opt_g.zero_grad()
        loss_g.backward(inputs=tuple(G.parameters()))  # through D, but no gradients for D's weights
        opt_g.step()
        average.update_parameters(G)
        schedule_d.step()
        schedule_g.step()
        run.log(loss_d=loss_d, loss_g=loss_g)
        if run.every(10) or run.at(SNAPSHOTS):
            z = z_fixed[:args.n_score]
            swa_utils.update_bn(z.split(1000), average)  # it had the statistics of other weights
            if run.at(SNAPSHOTS):
                run.snapshot(generate(average, z[:36]))
        if run.every(10):  # in evaluation mode, the u of SpectralNorm does not change
            slope = gradient_norms(D.eval(), torch.cat([x, x_fake])).mean().item()
            run.add_to_row(slope=slope, **quick_score(average, z))
            D.train()

    swa_utils.update_bn(z_fixed.split(1000), average)
    return average.module, z_fixed


def optimisers(args, model, G, D, steps, side):
    """Adam for D and G; both learning rates are constant for half of the steps, then fall to 0."""
    lr_g = args.lr_g or model.lr_g * min(1.0, (28 / side) ** 2)  # smaller for large pictures
    opts = [torch.optim.Adam(net.parameters(), lr, (args.beta1, model.beta2), fused=True)
            for net, lr in ((D, args.lr_d or model.lr_d), (G, lr_g))]
    return *opts, *(lr_scheduler.LambdaLR(opt, lambda step: min(1, 2 - 2 * step / steps))
                    for opt in opts)


@torch.no_grad()
def generate(G, z):
    """G(z) with the batch norm of evaluation, a thousand at a time."""
    G.eval()
    x = torch.cat([G(part) for part in z.split(1000)])
    G.train()
    return x


# --- measures ----------------------------------------------------------------------------------

class Metric(NamedTuple):
    """A network and real pictures to compare with. Scores of different metrics do not compare."""
    name: str                    # "digit", "fashion" or "Inception"
    net: nn.Sequential           # x in [-1, 1] -> logits [B, K]; before the last layer: features
    reference: torch.Tensor      # features of real pictures [N, d], on the CPU
    real: torch.Tensor           # other real pictures, uint8, to see what a perfect score is
    trained_here: bool           # on this data: it is fast, and its classes are those of the data


def make_metric(run, args, images, test):
    """A classifier of grey pictures, trained here; Inception v3 for colour, or None without it."""
    if images.x.shape[1] == 1:
        net, name = train_classifier(run, args, images, test), "digit"
    else:
        weights = torchvision.models.Inception_V3_Weights.IMAGENET1K_V1
        socket.setdefaulttimeout(10)  # seconds: a silent network must not hang the run
        try:
            state = weights.get_state_dict(check_hash=True, weights_only=True)
        except Exception:  # no network, or a broken file: the answer is the same
            why = ("no scores: Inception v3, which scores colour pictures, cannot be downloaded; "
                   f"put {Path(weights.url).name} into {Path(torch.hub.get_dir()) / 'checkpoints'}")
            return common.fail(why) if args.score else print(why)
        net, name = inception(state).to(run.device).eval(), "Inception"
    reference, _ = features_and_probs(net, test.x[:N_SAMPLES])
    if min(len(reference), args.n_samples) <= reference.shape[1]:
        print(f"no FID: it needs {reference.shape[1] + 1:,} test pictures, and as many samples")
    return Metric("fashion" if args.data == "fashion" else name, net, reference,
                  images.x[-N_SAMPLES:], name == "digit")


def train_classifier(run, args, images, test):
    """A classifier of the data. The same data and seed give the same one."""
    print("training a classifier, whose features the scores need")
    torch.manual_seed(args.seed)
    net = classifier(images.x.shape[2], int(images.y.max()) + 1).to(run.device)
    opt = torch.optim.Adam(net.parameters(), fused=True)
    schedule = lr_scheduler.OneCycleLR(opt, max_lr=0.01, total_steps=args.classifier_steps)
    batches = run.batches(images, 128 * common.WORLD)  # each process trains its own
    for _ in range(args.classifier_steps):
        x, y = next(batches)
        loss = F.cross_entropy(net(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
    right = features_and_probs(net.eval(), test.x)[1].argmax(dim=1) == test.y.cpu()
    print(f"it is right for {100 * right.float().mean():.2f} % of the test pictures")
    return net


@torch.no_grad()
def features_and_probs(net, x):
    """Features [N, d] and class probabilities [N, K] of pictures uint8 [N, C, H, W], on the CPU."""
    size = max(1, 400_000 // x[0].numel())  # pictures at a time: Inception's maps are large
    features = [net[:-1](common.to_float(part)) for part in x.split(size)]
    logits = torch.cat([net[-1](part) for part in features])
    return torch.cat(features).cpu(), logits.cpu().softmax(dim=1)


def score(metric, x, pairs=True):
    """A dict for pictures x, uint8: FID (if there are enough), IS, KL(shares of the classes ‖
    uniform) in nats and, which takes longer, KID and recall of about N_PAIRS of them."""
    features, probs = features_and_probs(metric.net, x)
    scores = {"IS": inception_score(probs)[0]}
    if metric.trained_here:  # the classes are those of the data
        p = torch.bincount(probs.argmax(dim=1), minlength=probs.shape[1]).double() / len(probs)
        scores["KL"] = torch.xlogy(p, len(p) * p).sum().item()
    if min(len(features), len(metric.reference)) > features.shape[1]:
        scores["FID"] = frechet_distance(features, metric.reference)
    if pairs and len(x) > 3:
        pair = [f[torch.randperm(len(f), generator=torch.Generator().manual_seed(0))[:N_PAIRS]]
                for f in (metric.reference, features)]  # at random: labels may repeat in the order
        scores |= {"KID": kernel_distance(*pair), "recall": recall(*pair)}
    return scores


def quick_score(metric, G, z):
    """Scores of G during training; {} for Inception, which would take minutes each time."""
    if metric is None or not metric.trained_here:
        return {}
    return score(metric, common.to_uint8(generate(G, z)), pairs=False)


def measure(metric, x, images):
    """A row of the tables for pictures x, uint8, and 64 of them for a figure. distance: from x to
    the nearest of 10,000 training pictures, root mean square over the pixels, in [-1, 1] units."""
    distances, indices = common.nearest(common.to_float(x[:1000]), images)
    return {"n": len(x), "distance": distances.mean().item(), "pictures": x[:64].cpu().clone(),
            "nearest": images.x[indices[:64]].cpu(), **(score(metric, x) if metric else {})}


def print_measures(title, metric, images, rows):
    """A table of all rows by name, and of real pictures and noise, the ends of the scale."""
    if metric:
        rng = torch.Generator().manual_seed(0)
        real = metric.real[:min(row["n"] for row in rows.values())]  # scores depend on n
        noise = torch.randint(256, real.shape, dtype=torch.uint8, generator=rng).to(real.device)
        rows = rows | {"real training pictures": measure(metric, real, images),
                       "noise": measure(metric, noise, images)}
    heads = {c: f"{metric.name} {c}" if c in ("FID", "KID", "IS") else c
             for c in ("n", "FID", "KID", "recall", "IS", "KL", "distance", "slope")
             if any(c in row for row in rows.values())}
    common.print_table([title, *heads.values()], [
        [name, *(f"{v:,}" if isinstance(v := row.get(c, math.nan), int) else f"{v:.3g}"
                 for c in heads)] for name, row in rows.items()])


def score_files(args, images, metric):
    """scored.png and a table, the best FID first, of the files that --score names."""
    shape, rows = list(images.x.shape[1:]), {}
    for file in dict.fromkeys(file for path in args.score for file in sorted(glob(path)) or [path]):
        try:
            x = torch.load(file, map_location=images.x.device, weights_only=True)
            holds = f"{x.dtype} {list(x.shape)}"
        except Exception as e:  # whatever is wrong with the file, it is left out
            x, holds = torch.empty(0), f"no tensor ({type(e).__name__})"
        if x.dtype == torch.uint8 and list(x.shape[1:]) == shape and len(x):
            rows[file] = measure(metric, x, images)
        else:
            print(f"left out: {file} holds {holds}, not torch.uint8 [N, {str(shape)[1:]}")
    if not rows:
        common.fail("no file is left to score: each must hold pictures like those of --data")
    rows = dict(sorted(rows.items(), key=lambda item: item[1].get("FID", math.inf)))
    plot_samples(args.out / "scored.png", images, rows, f"{metric.name} scores, {images.name}")
    print_measures(f"{images.name} (compare rows of equal n)", metric, images, rows)


# --- figures -----------------------------------------------------------------------------------

def plot_samples(file, images, rows, title):
    """Pictures of the data and of all that was measured."""
    cells = [("data\n", common.panel(images.x[:64]))]
    for name, row in rows.items():
        name = "\n".join(Path(name).parts[-2:]).removesuffix(".pt").replace("samples_", "")
        scores = ", ".join(f"{key} {row[key]:.3g}" for key in ("FID", "recall") if key in row)
        cells.append((f"{name}\n{scores}", common.panel(row["pictures"])))
        if len(images.x) < 1000:  # few enough to be learned by heart
            cells.append((f"{name}\nnearest training pictures", common.panel(row["nearest"])))
    n = 3 if len(cells) <= 6 else 4  # in a row
    common.save_panels(file, [("", cells[i:i + n]) for i in range(0, len(cells), n)], title)


def truncation(args, images, metric, name, weights):
    """truncation.png and its table: samples of one G from z within a limit, for each limit."""
    G = generator(args.z_dim, *images.x.shape[1:3]).to(images.x.device)
    G.load_state_dict(weights)
    rng, rows = torch.Generator().manual_seed(args.seed), {}
    for limit in LIMITS:
        z = truncated_normal(args.n_samples // 2, args.z_dim, limit, rng).to(images.x.device)
        rows[f"|z| < {limit:g}"] = measure(metric, common.to_uint8(generate(G, z)), images)
    plot_samples(args.out / "truncation.png", images, rows, f"{name} on {images.name}, seed "
                 f"{args.seed}, {args.n_samples // 2:,} samples for each limit of |z|")
    print_measures(f"{name}, truncated z", metric, images, rows)


# --- main --------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = common.parser(__doc__, __file__)
    positive, count = common.number(float, above=0), common.number(int, 1)
    g = p.add_argument_group("models and training")
    g.add_argument("--models", nargs="+", choices=MODELS, metavar="MODEL", default=[*MODELS][:4],
                   help=f"{', '.join(MODELS)}; if not given: the first four")
    g.add_argument("--n-critic", nargs="+", type=count, default=[1], metavar="N", help="steps of D "
                   "to one of G; for each of these every model is trained; if not given: 1")
    g.add_argument("--z-dim", type=count, default=64, help="length of z")
    g.add_argument("--steps", type=count, default=2200, help="of G, and (--n-critic 1) of D")
    g.add_argument("--batch", type=common.number(int, 2), default=64, help="pictures in a batch")
    for player in "dg":
        g.add_argument(f"--lr-{player}", type=positive, help="learning rate, else the model's")
    g.add_argument("--beta1", type=common.number(float, 0, 0.999), default=0.0, help="momentum")
    g.add_argument("--clip", type=positive, help="bound of wgan's weights; if not given: 0.03")
    g.add_argument("--score", nargs="+", metavar="FILE", type=expanduser,
                   help="trains no GAN: scores samples*.pt of any chapter, or your uint8 tensor")
    p.set_defaults(classifier_steps=1000, n_samples=N_SAMPLES, n_score=1000)
    args = common.parse(p, argv, quick=dict(data="digits", steps=6, classifier_steps=20,
                                            n_samples=1000, n_score=200))
    if args.clip and "wgan" not in args.models:
        common.fail("--clip is for wgan alone: add it to --models")
    return args


def main(argv=None):
    args = parse_args(argv)
    run = common.Run(args)
    images = common.load_images(args, run.device)
    test = common.load_images(args, run.device, train=False)
    metric = make_metric(run, args, images, test)
    if args.score:
        return score_files(args, images, metric)
    models = {name if n == 1 else f"{name}-x{n}": (MODELS[name], n)
              for n in args.n_critic for name in args.models}
    for name in run.each(models):
        G, z = train(run, args, *models[name], images, lambda G, z: quick_score(metric, G, z))
        samples = common.to_uint8(generate(G, z))
        common.save(samples.cpu(), args.out / f"samples_{name}.pt")
        common.save(G.state_dict(), args.out / f"weights_{name}.pt")
        run.done[name] = measure(metric, samples, images) | {
            "slope": run.rows[-1]["slope"], "G": G.state_dict()}
    rows, trained_here = run.done, metric and metric.trained_here
    plot_samples(args.out / "samples.png", images, rows, f"{images.name}, seed {args.seed}, "
                 f"{2 * args.steps:,} steps of D and G together, same z for all")
    keys = {"FID": f"{metric.name} FID", "IS": f"{metric.name} IS"} if trained_here else {}
    common.plot_curves(args.out / "scores.png", run.rows, keys | {
        "slope": "slope of D: mean ‖∇D‖"}, f"{images.name}, seed {args.seed}, scores of "
        f"{args.n_score:,} samples", log_scale=["slope"])
    print_measures(images.name, metric, images, rows)
    if trained_here:
        best = min(rows, key=lambda name: rows[name]["FID"])
        truncation(args, images, metric, best, rows[best]["G"])


if __name__ == "__main__":
    main()
