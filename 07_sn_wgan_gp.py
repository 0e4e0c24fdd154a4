r"""07 - Three ways to bound D's slope, and two ways to score what G draws.

Papers   Arjovsky 2017, 1701.07875; Gulrajani 2017, 1704.00028; Miyato 2018,
         1802.05957; scores: Salimans 2016, 1606.03498; Heusel 2017, 1706.08500
Idea     D's slope is ‖∇D(x)‖, its gradient in the picture. W1, Wasserstein's
         distance of p and q, is max E_p D - E_q D for slopes <= 1 -> wgan_d()
         To bound the slope, clip D's weights (wgan)               -> clip()
         or divide layers by their top singular value (sn) -> spectral_norm()
         or add λ E (‖∇D‖ - 1)² to the loss (wgan-gp)    -> gradient_penalty()
         IS = exp E KL(p(y|x) ‖ p(y)), classes y           -> inception_score()
         FID = ‖m - m'‖² + tr(C + C' - 2 (C C')^½), means and covariances of a
         network's features of data and of samples        -> frechet_distance()
See      samples.png; scores.png: both scores and D's slope while training;
         truncation.png. On MNIST the FID is 10 to 16 for vanilla, which is the
         plain GAN, sn and wgan-gp, 57 for wgan: a stable GAN gains little.
Differs  Adam at 3e-4 to 3e-3, falling to 0 in the second half; a step of D to
         one of G; the logit of sn is 8 D(x). In the papers: rates up to 2e-4,
         often five steps of D, a penalty of weight 10. A small classifier
         scores grey pictures, so compare with no published score.
Try      With --n-critic 5, which model loses the least? Predict, then run.
Run      python 07_sn_wgan_gp.py
         python 07_sn_wgan_gp.py --score out/*/samples*.pt
"""

import contextlib
import math
import socket
from glob import glob
from itertools import pairwise
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torchvision.models import Inception_V3_Weights, inception_v3

import common

SMALL = 1024                     # numbers in a picture up to which layers are fully connected
HIDDEN_G, HIDDEN_D = [500, 500], [512, 512]  # units of their layers
SHOTS = (0.05, 0.2, 0.5, 1.0)    # shares of a training after which process.png is written
LAMBDA = 1.0                     # weight of the gradient penalty: Gulrajani 2017 has 10
SN_SCALE = 8.0                   # sn: the logit is so many times what a D of slope <= 1 says
CLIP = 0.03                      # wgan keeps D's weights in [-CLIP, CLIP]: in its paper 0.01
N_SAMPLES, N_NEAREST = 10_000, 1000  # pictures in samples_{model}.pt; compared with the data
TREND = 0.6                      # share of the trend that stays from one score to the next
LIMITS = (0.25, 0.5, 1.0, 2.0, math.inf)  # of |z|, for truncation.png


# --- the idea ----------------------------------------------------------------------------------
# The losses of D and G, both to be minimised, means over the batch. real, fake [B]: what D says to
# data and to G's pictures: logits for bce_d and nonsaturating_g, any numbers for wgan_d and wgan_g.

def bce_d(real, fake):
    """-E log σ(real) - E log(1 - σ(fake)) of logits [B], nats (Goodfellow et al. 2014, eq. 1).

    E is the mean over the batch. Exact also where σ is rounded to 0 or 1.
    """
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def nonsaturating_g(fake):
    """-E log σ(fake) of logits [B], nats: G wants its pictures called real.

    Goodfellow et al. 2014, sec. 3. E is the mean over the batch. Exact also where σ is rounded to
    0 or 1.
    """
    return F.softplus(-fake).mean()


def wgan_d(real, fake):
    """E fake - E real (Arjovsky et al. 2017). Minus this is at most K W1(data, fakes).

    real, fake [B]: what D says, any numbers; E is the mean over the batch. K: D's Lipschitz
    constant, its largest slope; the best D of this slope reaches K W1. W1: the least mean distance
    over which the fakes can be moved onto the data.
    """
    return fake.mean() - real.mean()


def wgan_g(fake):
    """-E fake, the mean over the batch of any numbers [B] (Arjovsky et al. 2017, alg. 1)."""
    return -fake.mean()


def clip(net, limit):
    """Every parameter of the module net into [-limit, limit], in place (Arjovsky 2017, alg. 1).

    A number outside moves to the nearer end, and one inside stays as it is. This holds D's slope
    below Π limit √(weights of a layer), times SiLU's largest slope 1.1 for each hidden layer: 240
    for 28x28 grey pixels and 0.03. What training reaches is a small part of it.
    """
    with torch.no_grad():
        for p in net.parameters():
            p.clamp_(-limit, limit)


def spectral_norm(weight, u, n_iter=1):
    """(σ, u): σ close to the largest singular value of weight [out, ...] seen as [out, rest].

    After n_iter rounds of power iteration, v = Wᵀu / ‖Wᵀu‖ and u = W v / ‖W v‖, v is computed once
    more, and σ = uᵀ W v. (Miyato et al. 2018, alg. 1, stop half a round earlier.) u [out]: of
    length 1, from the call before: weights move little in a step, so one round a call follows
    them; n_iter = 0 leaves u as it is. σ is a tensor without dimensions, and never above the true
    value; its gradient in the weight treats u and v as constants, and the new u has no gradient.
    Of a convolution it is the matrix that is normalised, as in the paper; the convolution's slope
    may be larger, by at most √n if each pixel lies in n patches: 2 for 4x4 with stride 2.
    """
    matrix = weight.flatten(1)
    with torch.no_grad():
        for _ in range(n_iter):
            v = F.normalize(matrix.T @ u, dim=0)
            u = F.normalize(matrix @ v, dim=0)
        v = F.normalize(matrix.T @ u, dim=0)
    return u @ matrix @ v, u


class SpectralNorm(nn.Module):
    """weight -> weight / σ.

    parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight)) puts it into a
    layer. Keeps u from call to call, and moves it in training mode alone. For Linear and Conv
    layers, whose weights begin with `out`. That of a ConvTranspose2d begins with `in`: its σ is
    that of [in, rest] here, where torch's spectral_norm takes [out, rest].
    """

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("u", F.normalize(torch.randn(len(weight)).to(weight), dim=0))

    def forward(self, weight):
        sigma, u = spectral_norm(weight, self.u, n_iter=int(self.training))
        if self.training and not u.is_inference():  # which no later training may use
            self.u = u
        return weight / sigma


def gradient_norms(critic, x):
    """‖∇_x critic(x)‖ of each example of x [B, ...], [B].

    Differentiable in the critic's parameters, with finite derivatives also where the gradient is 0;
    x counts as a constant. critic: [B, ...] -> [B], each score a function of its own example alone
    (so no batch norm), so that the gradient of their sum holds one gradient for each example.
    """
    x = x.detach().requires_grad_()
    grad, = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return torch.linalg.vector_norm(grad.flatten(1), dim=1)


def gradient_penalty(critic, x_real, x_fake, generator=None):
    """E (‖∇critic(x̂)‖ - 1)², x̂ = α x + (1 - α) x_fake (Gulrajani et al. 2017, eq. 3).

    x_real and x_fake [B, ...] -> a mean over the batch, differentiable in the critic's parameters
    as gradient_norms is. One α, uniform in [0, 1) and drawn with generator if there is one, for
    each example: x̂ lies on the line between a real and a fake one, and is all that the critic
    sees. Raises ValueError if the shapes differ.
    """
    if x_real.shape != x_fake.shape:
        raise ValueError(f"x_real {tuple(x_real.shape)} and x_fake {tuple(x_fake.shape)} differ")
    alpha = torch.rand(len(x_real), generator=generator).to(x_real)
    alpha = alpha.view(-1, *[1] * (x_real.ndim - 1))
    x_hat = alpha * x_real + (1 - alpha) * x_fake
    return ((gradient_norms(critic, x_hat) - 1) ** 2).mean()


def inception_score(probs, splits=1):
    """exp E_x KL(p(y|x) ‖ p(y)): mean and standard deviation over `splits` parts, two floats.

    probs [N, K]: rows of probabilities, in an order of no meaning (shuffle first), of any dtype,
    also of integers; computed in float64. The parts are cut in this order, and the deviation is
    that of the parts (divided by their number). From 1 (all rows equal) to K (each row sure of one
    class, all classes equally often). A softmax taken twice still gives rows of probabilities, and
    a score near 1. Raises ValueError if a row is no probability distribution: if its sum is off 1
    by more than 1e-3, or than four times the eps of a coarser dtype, or if a number is below 0 or
    nan. Raises ValueError for fewer rows than splits, and for no splits.
    """
    if not 1 <= splits <= len(probs):
        raise ValueError(f"{len(probs)} rows do not make {splits} splits")
    # a rounding changes a probability by less than eps of it, so the sum of a row by less than eps
    eps = torch.finfo(probs.dtype).eps if probs.is_floating_point() else 0.0
    wrong = (probs.double().sum(dim=1) - 1).abs()
    if not ((wrong <= max(1e-3, 4 * eps)) & (probs >= 0).all(dim=1)).all():
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

    A float: the squared W2 distance of two Gaussians with these means and covariances (unbiased,
    float64 for features of every dtype). The numbers of rows may differ, d may not.
    C_a^½ C_b C_a^½ has the eigenvalues of C_a C_b, and is symmetric. >= 0, and 0 for equal sets, up
    to rounding: where the covariances are singular, the result may be as low as -1e-8 d (tr C_a +
    tr C_b). Raises ValueError for features that are not finite, for different d, and for d rows or
    fewer: the result would say more of N than of the features.
    """
    d = features_a.shape[1]
    for features in (features_a, features_b):
        if len(features) < d + 1 or features.shape[1] != d:
            raise ValueError(f"{tuple(features_a.shape)}, {tuple(features_b.shape)}: needs the "
                             "same d and at least d + 1 rows in both")
        if not features.isfinite().all():
            raise ValueError("some features are not finite")
    a, b = features_a.double(), features_b.double()
    cov_a, cov_b = (torch.atleast_2d(torch.cov(x.T)) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    apart = (a.mean(dim=0) - b.mean(dim=0)).pow(2).sum()
    return (apart + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def truncated_normal(n, d, limit, generator=None):
    """[n, d] draws of N(0, 1), given that each of them lies within ±limit, in the default dtype.

    √2 erfinv(u erf(limit / √2)) for uniform u in [-1, 1): the inverse of the distribution function.
    Computed in float64: a limit may be as small as 1e-30 or as large as 1e300. No rounding carries
    a draw over the limit. The truncation trick (Brock et al. 2019, arXiv:1809.11096): a G that is
    fed with such z draws fewer kinds of pictures, and more typical ones. limit = inf: the numbers
    of torch.randn. Raises ValueError for a limit that is not above 0.
    """
    if not limit > 0:
        raise ValueError(f"no draw lies within ±{limit}")
    if limit == math.inf:
        return torch.randn(n, d, generator=generator)
    u = 2 * torch.rand(n, d, generator=generator, dtype=torch.float64) - 1
    z = math.sqrt(2) * torch.erfinv(u * math.erf(limit / math.sqrt(2)))
    return z.clamp(-limit, limit).to(torch.get_default_dtype())  # rounding may have passed it


# --- model -------------------------------------------------------------------------------------

def generator(d_z, c, side):
    """[B, d_z] -> pictures [B, C, side, side] in (-1, 1). Weights start as draws of N(0, 0.02²).

    Up to SMALL numbers in a picture: fully connected layers first, and narrow convolutions.
    """
    dense = c * side ** 2 <= SMALL
    width = 8 if dense else 32
    widths = [width * 2 ** i for i in range(max(1, int(math.log2(side / 4))))]
    small = side // 2 ** len(widths)  # side of the smallest map, 4 to 7 pixels
    layers = []
    for i, o in pairwise([d_z, *(HIDDEN_G if dense else []), widths[-1] * small ** 2]):
        layers += [nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU()]
    layers.append(nn.Unflatten(1, (widths[-1], small, small)))
    for i, o in pairwise([*widths[::-1], c]):
        layers += [nn.ConvTranspose2d(i, o, kernel_size=4, stride=2, padding=1),
                   nn.BatchNorm2d(o), nn.ReLU()]
    layers[-2:] = [nn.Tanh()]  # the last map is the picture
    for layer in layers:
        if isinstance(layer, (nn.Linear, nn.ConvTranspose2d)):  # as in DCGAN
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # draws faster on the CPU


def discriminator(c, side, sn):
    """[B, C, side, side] -> [B]: logits, or for the Wasserstein loss any numbers. No batch norm.

    Up to SMALL numbers in a picture: fully connected layers, else convolutions. sn: every layer has
    spectral norm. Power iteration needs some passes of D to find the σ: the largest singular value
    of a layer is up to 1.6 at first, and at most 1.05 after 20 passes.
    """
    # SiLU is smooth, as a penalty on ∇D wants it; but its slope is 1/2 at 0, and where no layer may
    # amplify, one after the other would halve what comes through
    activation = nn.LeakyReLU(0.2) if sn else nn.SiLU()
    if c * side ** 2 <= SMALL:
        layers, features = [nn.Flatten()], HIDDEN_D[-1]
        for i, o in pairwise([c * side ** 2, *HIDDEN_D]):
            layers += [nn.Linear(i, o), activation]
    else:
        widths = [32 * 2 ** i for i in range(max(1, int(math.log2(side / 4))))]
        small = side // 2 ** len(widths)  # side of the smallest map, 4 to 7 pixels
        layers, features = [], widths[-1] * small ** 2
        for i, o in pairwise([c, *widths]):
            layers += [nn.Conv2d(i, o, kernel_size=4, stride=2, padding=1), activation]
            nn.init.kaiming_normal_(layers[-2].weight)  # torch's start is smaller: D stays at 1/2
        layers.append(nn.Flatten())
    layers += [nn.Linear(features, 1), nn.Flatten(0)]
    for layer in layers:
        if sn and isinstance(layer, (nn.Conv2d, nn.Linear)):
            parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight))
    return nn.Sequential(*layers)


class Model(NamedTuple):
    """What both players descend, and what bounds the slope of D."""
    d: Callable                  # (real, fake) -> loss of D
    g: Callable                  # fake -> loss of G
    clip: float = math.inf       # D's weights stay in [-clip, clip]
    sn: bool = False             # D with spectral norm
    scale: float = 1.0           # the losses see so many times what D says
    penalty: float = 0.0         # weight of the gradient penalty in D's loss
    lr: tuple = (5e-4, 2e-3)     # Adam's rates at the start, of D and of G
    beta2: float = 0.9           # of Adam; beta1 is a flag

    def loss_d(self, D, x, x_fake):
        """What D descends. Data and fakes go through D in one pass."""
        real, fake = (self.scale * D(torch.cat([x, x_fake]))).split(len(x))
        loss = self.d(real, fake)
        return loss + self.penalty * gradient_penalty(D, x, x_fake) if self.penalty else loss

    def loss_g(self, D, x_fake):
        """What G descends."""
        return self.g(self.scale * D(x_fake))


MODELS = {
    "vanilla": Model(bce_d, nonsaturating_g),
    "sn": Model(bce_d, nonsaturating_g, sn=True, scale=SN_SCALE, lr=(3e-4, 3e-3), beta2=0.999),
    "wgan": Model(wgan_d, wgan_g, clip=CLIP, lr=(1e-3, 1e-3)),
    "wgan-sn": Model(wgan_d, wgan_g, sn=True, beta2=0.999),
    "wgan-gp": Model(wgan_d, wgan_g, penalty=LAMBDA, lr=(1e-3, 2e-3)),
}


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


# --- train -------------------------------------------------------------------------------------

def train(run, args, model, n_critic, images, ruler):
    """Trains one model; returns G and its pictures, uint8 [n_samples, C, H, W].

    n_critic: D's steps to one of G. Above 1 they are paid for with steps of G: D and G together
    have 2 --steps in every run. run logs, saves and draws: run.due(10) is true 10 times, run.note
    adds to the row of that step, run.shoot adds pictures to process.png.
    """
    torch.manual_seed(args.seed)
    c, side = images.x.shape[1:3]
    steps = max(1, round(2 * args.steps / (1 + n_critic)))
    z_fixed = torch.randn(args.n_samples, args.z_dim).to(run.device)  # the same for every model
    G = generator(args.z_dim, c, side).to(run.device)
    D = discriminator(c, side, model.sn).to(run.device)
    lr_d, lr_g = model.lr
    lr_g *= min(1.0, (28 / side) ** 2)  # at 64 pixels, a rate for 28 would be too much for G
    opt_d = torch.optim.Adam(D.parameters(), lr_d, (args.beta1, model.beta2), fused=True)
    opt_g = torch.optim.Adam(G.parameters(), lr_g, (args.beta1, model.beta2), fused=True)
    rate_d, rate_g = common.fading(opt_d, steps), common.fading(opt_g, steps)
    average = common.average_of(G, steps)
    batches = run.batches(images, args.batch)

    for _ in run.steps(steps, G=G, D=D, average=average, opt_g=opt_g, opt_d=opt_d, rate_g=rate_g,
                       rate_d=rate_d):
        # D's half, n_critic times: descend its loss on data and on G's pictures, G untouched
        for _ in range(n_critic):
            x = next(batches)[0]
            x_fake = G(torch.randn(len(x), args.z_dim, device=run.device))
            loss_d = model.loss_d(D, x, x_fake.detach())
            opt_d.zero_grad()
            loss_d.backward()
            opt_d.step()
            if model.clip < math.inf:
                clip(D, model.clip)

        # G's half: descend its loss. The gradient flows through D, but is kept for G alone (inputs)
        loss_g = model.loss_g(D, x_fake)
        opt_g.zero_grad()
        loss_g.backward(inputs=tuple(G.parameters()))
        opt_g.step()
        average.update_parameters(G)

        rate_d.step()
        rate_g.step()
        run.log(loss_d=loss_d, loss_g=loss_g)
        if run.due(10) or run.at(SHOTS):
            common.settle(average, z_fixed[:args.n_score])
        if run.due(10):
            run.note(slope=slope(D, torch.cat([x, x_fake])),
                     **ruler.glance(average, z_fixed[:args.n_score]))
        if run.at(SHOTS):
            run.shoot(generate(average, z_fixed[:36]))

    common.settle(average, z_fixed)
    return average.module, common.to_uint8(generate(average, z_fixed))


@torch.no_grad()
def generate(G, z):
    """G(z) with the batch norm of evaluation, a thousand at a time."""
    G.eval()
    x = torch.cat([G(part) for part in z.split(1000)])
    G.train()
    return x


def train_classifier(run, args, name, images, test):
    """A classifier of the data: that of a run before, or trained now and kept."""
    path = args.out / f"{name}_classifier.pt"
    expected = {"shape": str(list(images.x.shape[1:])), "data": images.name,
                "steps": str(args.classifier_steps), "seed": str(args.seed),
                "train_stamp": images.stamp}
    torch.manual_seed(args.seed)
    net = Classifier(images.x.shape[2], int(images.y.max()) + 1).to(run.device)
    opt = torch.optim.Adam(net.parameters(), fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.01, total_steps=args.classifier_steps)
    batches = run.batches(images, 128 - 128 % common.processes())

    for _ in run.each(["classifier"]):  # once, or not at all if --resume has it
        if path.exists():
            net.load_state_dict(common.load_kept(path, ("net",), expected)["net"])
        else:
            for _ in run.steps(args.classifier_steps, net=net, opt=opt, rate=rate):
                x, y = next(batches)
                loss = F.cross_entropy(net(x)[1], y)
                opt.zero_grad()
                loss.backward()
                opt.step()
                rate.step()
                run.log(loss=loss)
            common.save({"settings": expected, "net": net.state_dict()}, path)
        run.rows.clear()  # the losses of the classifier are of no use beside those of the GANs
        run.done["classifier"] = net.state_dict()

    net.load_state_dict(run.done["classifier"])
    correct = read(net.eval(), test.x)[1].argmax(dim=1) == test.y.cpu()
    print(f"the classifier reads {100 * correct.float().mean().item():.2f} % of the test pictures")
    return net


# --- measures ----------------------------------------------------------------------------------

class Ruler(NamedTuple):
    """The network that scores pictures, and the real ones that they are compared with.

    Scores of two rulers do not compare. Without a network there are no scores: all is empty.
    """
    name: str                    # "digit", "fashion" or "Inception"
    net: Callable                # x in [-1, 1] -> features [B, d], logits [B, K]; or None
    reference: torch.Tensor      # features of real pictures [N, d], on the CPU
    real: torch.Tensor           # other real pictures, uint8, to see what a perfect score is
    own: bool = True             # trained on this data, so that its classes are those of the data

    def score(self, x):
        """FID, IS, and of an own network's classes KL(their shares ‖ uniform), nats; x: uint8."""
        if self.net is None:
            return {}
        features, probs = read(self.net, x)
        numbers = {"FID": frechet_distance(features, self.reference),
                   "IS": inception_score(probs)[0]}
        if self.own:
            k = probs.shape[1]
            p = torch.bincount(probs.argmax(dim=1), minlength=k).double() / len(probs)
            numbers["KL"] = torch.special.xlogy(p, k * p).sum().item()
        return numbers

    def glance(self, G, z):
        """Scores of G while it trains; none by Inception, which would take minutes each time."""
        return self.score(common.to_uint8(generate(G, z))) if self.own else {}

    def calibration(self, images, seed, n=N_SAMPLES):
        """The two ends of the scale: measures of n real pictures, and of n pictures of noise."""
        if self.net is None:
            return {}
        rng = torch.Generator().manual_seed(seed)
        noise = torch.randint(256, self.real[:n].shape, dtype=torch.uint8, generator=rng)
        real = measure(self, self.real[:n], images)
        if len(images.x) < 2 * N_SAMPLES:
            del real["distance"]  # they would be compared with themselves
        return {"real training pictures": real,
                "noise": measure(self, noise.to(self.real.device), images)}


def no_ruler(args, why):
    """A Ruler without a network; says why, and ends a run that was to score files."""
    if args.score:
        common.fail(f"no scores: {why}")
    print(f"no scores: {why}")
    return Ruler("no", None, None, None, own=False)


def make_ruler(run, args, images, test):
    """For grey pictures a Ruler by a classifier of them, for colour by Inception, or by none."""
    if images.x.shape[1] == 1:
        name = "fashion" if images.name.startswith("Fashion") else "digit"
        net = train_classifier(run, args, name, images, test)
        return Ruler(name, net, read(net, test.x)[0], images.x[-N_SAMPLES:])
    weights, d = Inception_V3_Weights.IMAGENET1K_V1, 2048
    reference, real = (test.x, images.x) if len(test.x) > d else (images.x[::2], images.x[1::2])
    if min(len(real), args.n_samples) <= d:
        return no_ruler(args, f"a distance of {d} features needs {d + 1} samples and {2 * d + 2} "
                              f"training pictures; here are {args.n_samples} and {len(images.x)}")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds: a silent network must not hang the run
    try:
        state = weights.get_state_dict(check_hash=True, weights_only=True)
    except Exception:  # no network, or a broken file: the answer is the same
        return no_ruler(args, "colour pictures are scored by Inception v3, and its weights cannot "
                              f"be had: put torchvision's {Path(weights.url).name} into "
                              f"{Path(torch.hub.get_dir()) / 'checkpoints'}")
    finally:
        socket.setdefaulttimeout(before)
    net = Inception(state).to(run.device).eval()
    return Ruler("Inception", net, read(net, reference[:N_SAMPLES])[0], real[-N_SAMPLES:],
                 own=False)


@torch.no_grad()
def read(net, x):
    """Features and class probabilities of pictures uint8 [N, C, H, W], on the CPU."""
    some = max(1, 400_000 // x[0].numel())  # pictures at a time: Inception's maps are large
    pairs = [net(common.to_float(part)) for part in x.split(some)]
    features, logits = (torch.cat(parts).cpu() for parts in zip(*pairs))
    return features, logits.softmax(dim=1)


def slope(D, x):
    """Mean norm of D's gradient at the pictures x; in evaluation mode, where u does not move."""
    norms = gradient_norms(D.eval(), x)
    D.train()
    return norms.mean().item()


def measure(ruler, x, images):
    """Scores and distance of pictures x, uint8, how many they are, and 64 of them for a figure."""
    distances, _ = common.nearest(common.to_float(x[:N_NEAREST]), images)
    return {"n": len(x), **ruler.score(x), "pictures": x[:64].cpu().clone(),
            "distance": distances.mean().item()}


def path_measure(net, x):
    """What lies in the middle of the ways x, uint8 [N, 3, C, H, W]: start, middle, end.

    third: share of the middles that net reads as a class of neither end; confidence: mean of its
    highest probability over all middles; ground: mean lightness, 0 to 1, of those pixels of the
    middles that are black (darker than 5 %) at both ends.
    """
    probs = [read(net, part)[1] for part in x.unbind(dim=1)]
    start, middle, end = (p.argmax(dim=1) for p in probs)
    black = (x[:, [0, 2]] < 13).all(dim=1)
    return {"n": len(x), "third": ((middle != start) & (middle != end)).double().mean().item(),
            "confidence": probs[1].amax(dim=1).mean().item(),
            "ground": x[:, 1][black].double().mean().item() / 255}


def print_measures(title, ruler, measured, columns):
    """A table with one row for each name of `measured`."""
    header = [f"{ruler.name} {column}" if column in ("FID", "IS") else column for column in columns]
    common.print_table([title, *header], [
        [name, *(f"{numbers[column]:,}" if column == "n" else f"{numbers.get(column, math.nan):.3g}"
                 for column in columns)] for name, numbers in measured.items()])


def score_files(args, images, ruler):
    """scored.png and a table, the best FID first, of the files that --score names.

    Files of ways between two pictures (common.paths) have a table of their own.
    """
    d, shape, measured = ruler.reference.shape[1], list(images.x.shape[1:]), {}
    paths = {}
    # Windows leaves it to the program what * stands for
    files = [Path(file) for path in args.score for file in sorted(glob(str(path))) or [path]]
    for path in dict.fromkeys(files):
        x = None
        with contextlib.suppress(Exception):  # whatever is wrong with the file
            x = torch.load(path, map_location=images.x.device, weights_only=True)
        is_tensor = torch.is_tensor(x) and x.ndim > 0
        holds = f"holds {x.dtype} {list(x.shape)}" if is_tensor else "holds no tensor"
        if x is None:
            print(f"left out: {path} cannot be read" if path.exists() else
                  f"left out: there is no {path}")
        elif not is_tensor or list(x.shape[1:]) not in (shape, [3, *shape]):
            print(f"left out: {path} {holds}; wanted are pictures, torch.uint8 "
                  f"[N, {', '.join(map(str, shape))}]")
        elif x.dtype != torch.uint8:
            print(f"left out: {path} {holds}; of floats in [-1, 1] make bytes by "
                  "((x + 1) * 127.5).round().to(torch.uint8)")
        elif list(x.shape[1:]) == shape and len(x) > d:
            measured[common.relative(path)] = measure(ruler, x, images)
        elif x.ndim == 5 and len(x) and ruler.own:
            paths[common.relative(path)] = path_measure(ruler.net, x)
        else:
            print(f"left out: {path} {holds}; {d + 1} pictures or more are needed")
    if not measured and not paths:
        common.fail("no file is left to score: each must hold pictures like those of --data")
    if paths:
        x = images.x[:1001]
        mixed = ((x[:-1].float() + x[1:]) / 2).to(torch.uint8)
        paths["mean of two training pictures"] = path_measure(
            ruler.net, torch.stack([x[:-1], mixed, x[1:]], dim=1))
        print_measures(f"{images.name}, halfway", ruler, paths,
                       ["n", "third", "confidence", "ground"])
    if not measured:
        return
    measured = dict(sorted(measured.items(), key=lambda item: item[1]["FID"]))
    draw_samples(args.out / "scored.png", images, measured, f"{ruler.name} scores, {images.name}")
    print_measures(f"{images.name} (compare rows of equal n)", ruler, measured
                   | ruler.calibration(images, args.seed, max(m["n"] for m in measured.values())),
                   ["n", "FID", "IS", "KL", "distance"])


# --- figures -----------------------------------------------------------------------------------

def draw_samples(path, images, measured, title):
    """Pictures of the data and of all that was measured."""
    cells = [("data\n", common.panel(images.x[:64]))]
    for label, numbers in measured.items():
        path_of = Path(label.removesuffix(".pt"))  # of a file: its folder, and its name
        label = f"{path_of.parent.name}\n{path_of.name.removeprefix('samples_')}".strip()
        scores = ", ".join(f"{key} {numbers[key]:.3g}" for key in ("FID", "IS") if key in numbers)
        cells.append((f"{label}\n{scores}", common.panel(numbers["pictures"])))
    n = 3 if len(cells) <= 6 else 4  # in a row
    common.save_panels(path, [("", cells[i:i + n]) for i in range(0, len(cells), n)], title)


def draw_scores(args, images, names, log, ruler):
    """scores.png: scores and D's slope while training, up to five models in a panel."""
    columns = ["FID", "IS", "slope"] if ruler.own else ["slope"]
    groups = [names[i:i + 5] for i in range(0, len(names), 5)]
    fig, axes = common.figure(len(groups), len(columns), 3.3 * len(columns) + 1.2,
                              2.9 * len(groups) + 0.4, f"{images.name}, seed {args.seed}: "
                              f"scores of {args.n_score:,} pictures (thin) and their trend (thick)")
    for line, group in zip(axes, groups):
        for ax, column in zip(line, columns):
            for name in group:
                rows = [row for row in log if row["model"] == name and column in row]
                steps, values = [row["step"] for row in rows], [row[column] for row in rows]
                thick, = ax.plot(steps, trend(values), label=name)
                ax.plot(steps, values, color=thick.get_color(), linewidth=0.6, alpha=0.5)
            ax.set(title="slope of D: mean ‖∇D‖" if column == "slope" else f"{ruler.name} {column}",
                   xlabel="step of G")
        line[-1].set_yscale("log")  # of the slope
        line[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    common.save_figure(fig, args.out / "scores.png")


def trend(values):
    """s <- TREND s + (1 - TREND) v, from the first value on."""
    smooth = values[:1]
    for value in values[1:]:
        smooth.append(TREND * smooth[-1] + (1 - TREND) * value)
    return smooth


def truncation(args, images, ruler, name, weights):
    """truncation.png and its table: one G whose z lie within a limit, measured for each limit."""
    G = generator(args.z_dim, *images.x.shape[1:3]).to(images.x.device)
    G.load_state_dict(weights)
    rng, measured = torch.Generator().manual_seed(args.seed), {}
    for limit in LIMITS:
        z = truncated_normal(args.n_samples // 2, args.z_dim, limit, rng).to(images.x.device)
        measured[f"|z| < {limit:g}" if limit < math.inf else "any z"] = measure(
            ruler, common.to_uint8(generate(G, z)), images)
    draw_samples(args.out / "truncation.png", images, measured, f"{name} on {images.name}, seed "
                 f"{args.seed}, {args.n_samples // 2:,} samples for each limit of |z|")
    print_measures(f"{name}, truncated z", ruler, measured, ["n", "FID", "IS", "KL", "distance"])


# --- main --------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = common.parser(__doc__, __file__)
    g = p.add_argument_group("models")
    g.add_argument("--models", nargs="+", choices=MODELS, metavar="MODEL",
                   default=[name for name in MODELS if name != "wgan-sn"],
                   help=f"{', '.join(MODELS)}")
    g.add_argument("--n-critic", nargs="+", type=common.number(int, 1), default=[1], metavar="N",
                   help="D's steps to one of G; every model is trained with each of them, and D "
                   "and G together have as many steps as with 1")
    g.add_argument("--z-dim", type=common.number(int, 1), default=64, help="length of z")
    g = p.add_argument_group("training")
    g.add_argument("--steps", type=common.number(int, 1), default=2200,
                   help="of G, and as many of D (with --n-critic 1)")
    g.add_argument("--batch", type=common.number(int, 1), default=64, help="pictures in a batch")
    g.add_argument("--beta1", type=common.number(float, 0, 0.999), default=0.0,
                   help="momentum of Adam, for both players")
    g = p.add_argument_group("scores")
    g.add_argument("--score", nargs="+", type=Path, metavar="FILE",
                   help="trains no GAN: scores samples*.pt and paths*.pt of any chapter, or "
                   "your uint8 tensor")
    p.set_defaults(classifier_steps=1000, n_samples=N_SAMPLES, n_score=1000)
    args = common.parse(p, argv, quick=dict(data="digits", steps=6, classifier_steps=20,
                                            n_samples=1000, n_score=200))
    args.score = args.score or []
    return args


def train_models(run, args, images, ruler):
    """Trains every model with every n_critic; draws, prints and writes what they have come to."""
    models = {name if n == 1 else f"{name}-x{n}": (MODELS[name], n)
                 for n in args.n_critic for name in args.models}
    for name in run.each(models):
        G, samples = train(run, args, *models[name], images, ruler)
        common.save(samples.cpu(), args.out / f"samples_{name}.pt")
        common.save(G.state_dict(), args.out / f"weights_{name}.pt")
        run.done[name] = {"slope": run.rows[-1]["slope"], "G": G.state_dict(),
                          **measure(ruler, samples, images)}

    done = {name: numbers for name, numbers in run.done.items() if name != "classifier"}
    draw_samples(args.out / "samples.png", images, done, f"{images.name}, seed {args.seed}, "
                 f"{2 * args.steps:,} steps of D and G together"
                 + ", same z for all" * (len(done) > 1))
    draw_scores(args, images, list(done), run.rows, ruler)
    print_measures(images.name, ruler, done | ruler.calibration(images, args.seed),
                   ["FID", "IS", "KL", "distance", "slope"])
    if ruler.own:
        best = min(done, key=lambda name: done[name]["FID"])
        truncation(args, images, ruler, best, done[best]["G"])


def main(argv=None):
    args = parse_args(argv)
    with common.Run(args) as run:
        images = common.load_images(args, run.device)
        test = common.load_images(args, run.device, train=False)
        common.check_side(images)
        ruler = make_ruler(run, args, images, test)
        if args.score:
            score_files(args, images, ruler)
        else:
            train_models(run, args, images, ruler)


if __name__ == "__main__":
    common.as_script(main)
