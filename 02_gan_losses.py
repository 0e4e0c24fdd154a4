r"""02 - GAN losses: twelve methods, one training loop.

Papers   Goodfellow et al. 2014, arXiv:1406.2661; functions name the others.
Idea     A generator G turns noise z into pictures. A discriminator D gives each
         picture x a score, the logit D(x); σ(D(x)): probability of "real".
         D maximises E log σ(D(x)) + E log(1 - σ(D(G(z))))            -> bce_d()
         G minimises E log(1 - σ(a)), a = D(G(z)). Its derivative in a, -σ(a),
         is almost 0 if D is sure of a fake: it saturates         -> minimax_g()
         Or -E log σ(a): its derivative is then almost -1   -> nonsaturating_g()
         Other methods change the losses, add a penalty or labels, or use an
         autoencoder as D; each is a row of a table                -> methods()
See      samples.png: pictures of each G from the same z. saturation.png: if D
         takes three steps for each of G ("-ahead"), the minimax G stops
         learning. Printed: how many classes each G covers and, if its losses
         stop moving, the likely cause.
Differs  D has no batch norm, so each score depends on one picture alone. All
         methods use Adam; learning rates fall to 0 in the second half. Samples
         are from an average of G's weights. Gradient penalties have weight 1.
Run      python 02_gan_losses.py [--loss all]
Try      --loss minimax-ahead --real-label 0.9: where will loss_d stop falling?
"""

import math
from functools import partial
from itertools import pairwise
from typing import Callable, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as lrs, swa_utils

import common

LAMBDA = 1.0        # weight of gradient penalties; in the papers 10
LAMBDA_MS = 0.1     # weight of mode_seeking; the paper's 1 makes strokes thicker here
CLIP = 0.03         # wgan clips D's weights to [-CLIP, CLIP]; in the paper 0.01
MARGIN = 0.3        # ebgan: D's loss ignores fakes with a larger error
GAMMA, LAMBDA_K = 0.9, 0.1  # began; the paper has λ_k = 0.001 and 100 times more steps
LABEL_SCALE = 3.0   # G's labels times this: ten of them must have an effect beside 64 values of z
HIDDEN_G, HIDDEN_D = [500, 500], [512, 512]  # units of fully connected layers
SNAPSHOTS = (0.05, 0.2, 0.5, 1.0)  # shares of a training run after which process.png is written
N_SAMPLES, N_NEAREST, N_SPECKS = 10_000, 2000, 500  # saved; compared with the data; for specks()


# --- the idea ----------------------------------------------------------------------------------
# All losses are to be minimised; E is the mean over the batch. real, fake: D's scores of data and
# of G's pictures, floats [B]. rng: a torch.Generator, or None. critic: x -> D's scores.

def bce_d(real, fake, real_label=1.0, label_noise=0.0, rng=None):
    """BCE(real, y) + BCE(fake, y'), where BCE(a, y) = -E[y log σ(a) + (1 - y) log(1 - σ(a))], nats.
    Logits [B]; ±1000 are exact. y = real_label in [0, 1], y' = 0. With y = 1 the loss is 2 log 2 =
    1.386 if D says 1/2 to all. y < 1 is one-sided smoothing (Salimans et al. 2016): the minimum of
    the loss is then the entropy of y. label_noise = w > 0: each score has its own label, sampled by
    rng, uniform in an interval of width w around y or y'; the gradient is the same on average."""
    y, y_fake = torch.full_like(real, real_label), torch.zeros_like(fake)
    if label_noise:  # without label noise no random numbers are used
        y, y_fake = (label + label_noise * (torch.rand(len(label), generator=rng).to(label) - 0.5)
                     for label in (y, y_fake))
    bce = F.binary_cross_entropy_with_logits
    return bce(real, y) + bce(fake, y_fake)


def minimax_g(fake):
    """E log(1 - σ(fake)), nats (Goodfellow et al. 2014, eq. 1). Logits [B]; ±1000 are exact."""
    return F.logsigmoid(-fake).mean()


def nonsaturating_g(fake):
    """-E log σ(fake), nats (Goodfellow et al. 2014, sec. 3). Logits [B]; ±1000 are exact."""
    return F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))


def lsgan_d(real, fake):
    """E (real - 1)² + E fake²: scores [B] should be 1 and 0 (Mao et al. 2017, without its 1/2)."""
    return ((real - 1) ** 2).mean() + (fake ** 2).mean()


def lsgan_g(fake):
    """E (fake - 1)² (Mao et al. 2017, without its 1/2). Scores [B]."""
    return ((fake - 1) ** 2).mean()


def wgan_d(real, fake):
    """E fake - E real (Arjovsky et al. 2017, alg. 1). Scores [B]. Minus this is at most K W1: K the
    largest norm of D's gradient, W1 the least mean distance that moves the fakes onto the data."""
    return fake.mean() - real.mean()


def wgan_g(fake):
    """-E fake (Arjovsky et al. 2017, alg. 1). Scores [B]."""
    return -fake.mean()


def clip(net, limit):
    """Clips every parameter of net to [-limit, limit], in place (Arjovsky et al. 2017, alg. 1)."""
    with torch.no_grad():
        for p in net.parameters():
            p.clamp_(-limit, limit)


def gradient_norms(critic, x):
    """‖∇_x critic(x)‖ of each example, [B]; it can be differentiated again, also where it is 0.
    critic: x [B, ...] -> scores [B], each of its own example alone (no batch norm). Therefore the
    gradient of the sum of the scores holds the gradient of each of them."""
    x = x.detach().requires_grad_()
    grad, = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return torch.linalg.vector_norm(grad.flatten(1), dim=1)


def gradient_penalty(critic, x_real, x_fake, rng=None):
    """E (‖∇critic(x̂)‖ - 1)², x̂ = α x_real + (1 - α) x_fake (Gulrajani et al. 2017, eq. 3): the best
    critic with norms <= 1 has 1 there. critic: see gradient_norms. x_real, x_fake: floats [B, ...];
    else ValueError. α: one for each example, uniform in [0, 1), from rng."""
    if x_real.shape != x_fake.shape:
        raise ValueError(f"x_real {tuple(x_real.shape)} and x_fake {tuple(x_fake.shape)} differ")
    if not (x_real.is_floating_point() and x_fake.is_floating_point()):
        raise ValueError(f"x_real {x_real.dtype} and x_fake {x_fake.dtype} are not both floats")
    alpha = torch.rand(len(x_real), *[1] * (x_real.ndim - 1), generator=rng).to(x_real)
    x_hat = alpha * x_real + (1 - alpha) * x_fake
    return ((gradient_norms(critic, x_hat) - 1) ** 2).mean()


def dragan_penalty(critic, x_real, rng=None):
    """E (‖∇critic(x_real + α s u / 2)‖ - 1)²: near the data (Kodali et al. 2017, as in their code).
    critic: see gradient_norms. x_real: [B, ...]. From rng, uniform in [0, 1): α for each example, u
    for each pixel. s: standard deviation (divisor n) of this picture (theirs: of the batch)."""
    alpha = torch.rand(len(x_real), generator=rng).to(x_real)
    u = torch.rand(x_real.shape, generator=rng).to(x_real)
    scale = alpha * x_real.flatten(1).std(dim=1, correction=0) / 2
    x_hat = x_real + scale.view(-1, *[1] * (x_real.ndim - 1)) * u
    return ((gradient_norms(critic, x_hat) - 1) ** 2).mean()


def r1_penalty(critic, x_real):
    """E ‖∇critic(x_real)‖² (Mescheder et al. 2018, there times γ/2). critic: see gradient_norms."""
    return (gradient_norms(critic, x_real) ** 2).mean()


def mode_seeking(x1, x2, z1, z2):
    """1 / (r + 1e-5), r = E|x1 - x2| / E|z1 - z2| (the code of Mao et al. 2019): at most 1e5, and
    small if different z give different pictures. x1 = G(z1), x2 = G(z2): [B, ...]. z1, z2: noise
    [B, d], not the same. E: over all values of the batch. ValueError if the shapes differ."""
    if x1.shape != x2.shape or z1.shape != z2.shape:
        raise ValueError(f"shapes differ: {[tuple(a.shape) for a in (x1, x2, z1, z2)]}")
    return 1 / ((x1 - x2).abs().mean() / (z1 - z2).abs().mean() + 1e-5)


def ebgan_d(real_error, fake_error, margin):
    """E real_error + E max(0, margin - fake_error) (Zhao et al. 2017). Errors of D [B]."""
    return real_error.mean() + F.relu(margin - fake_error).mean()


def pull_away(codes):
    """Mean cos² of the angle between two codes, over all pairs of codes [B, d] (Zhao et al. 2017).
    1 if all are parallel, 0 if all are orthogonal or 0. ValueError if B < 2."""
    n = len(codes)
    if n < 2:
        raise ValueError(f"there are no pairs in codes {tuple(codes.shape)}: B must be 2 or more")
    largest = codes.detach().abs().amax(dim=1, keepdim=True).clamp(torch.finfo(codes.dtype).tiny)
    codes = codes / torch.exp2(torch.log2(largest).floor())  # exact; the squares do not overflow
    cosine = F.normalize(codes, dim=1)
    squares = (cosine @ cosine.T) ** 2
    return (squares.sum() - squares.diagonal().sum()) / (n * (n - 1))


def began_d(real_error, fake_error, k):
    """E real_error - k E fake_error (Berthelot et al. 2017). Errors: see ebgan_d; k: began_k."""
    return real_error.mean() - k * fake_error.mean()


def began_k(k, real_error, fake_error, lambda_k, gamma):
    """The next k: k + λ_k (γ E real_error - E fake_error), clipped to [0, 1], a float. This keeps
    E fake_error near γ E real_error (Berthelot et al. 2017). k: a float; errors: [B]."""
    balance = gamma * real_error.mean() - fake_error.mean()
    return min(max(k + lambda_k * balance.item(), 0.0), 1.0)


def began_convergence(real_error, fake_error, gamma):
    """E real_error + |γ E real_error - E fake_error|, a float: it falls while began learns."""
    return (real_error.mean() + (gamma * real_error.mean() - fake_error.mean()).abs()).item()


# --- model -------------------------------------------------------------------------------------

def generator(d_in, c, side, hidden=HIDDEN_G, width=8):
    """G: z and labels [B, d_in] -> pictures [B, C, side, side] in (-1, 1); a tanh ends it. Fully
    connected layers with `hidden` units, then transposed convolutions with `width` channels at half
    the side, 2 width at a quarter, ... With width = 0 all layers are fully connected."""
    widths = [width * 2 ** i for i in range(max(1, int(math.log2(side / 4))))]
    small, layers = side // 2 ** len(widths), []  # sides 7, 14, 28: widths [8, 16], small = 7
    last = widths[-1] * small ** 2 if width else c * side ** 2
    for n_in, n_out in pairwise([d_in, *hidden, last]):
        layers += [nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.ReLU()]
    if width:
        layers.append(nn.Unflatten(1, (widths[-1], small, small)))
        for n_in, n_out in pairwise([*widths[::-1], c]):
            layers += [nn.ConvTranspose2d(n_in, n_out, kernel_size=4, stride=2, padding=1),
                       nn.BatchNorm2d(n_out), nn.ReLU()]
    layers[-2:] = [nn.Tanh()] if width else [nn.Tanh(), nn.Unflatten(1, (c, side, side))]
    for layer in layers:
        if isinstance(layer, (nn.Linear, nn.ConvTranspose2d)):  # initial weights as in DCGAN
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # faster on the CPU


class Discriminator(nn.Module):
    """x [B, C, side, side] -> scores [B] and, for acgan and infogan, guesses of the label (logits)
    [B, classes]. Fully connected layers with `hidden` units or, if there are none, convolutions of
    stride 2 with `width`, 2 width, ... channels. conditional, for cgan (Mirza, Osindero 2014): the
    score is score(x) + guess(x)[y] for the one-hot y [B, classes] (after Miyato, Koyama 2018)."""

    def __init__(self, c, side, classes, hidden, width, conditional=False):
        super().__init__()
        widths = [width * 2 ** i for i in range(max(1, int(math.log2(side / 4))))]
        small, layers = side // 2 ** len(widths), []
        for n_in, n_out in pairwise([c, *widths] if not hidden else []):
            layers += [nn.Conv2d(n_in, n_out, kernel_size=4, stride=2, padding=1), nn.SiLU()]
            nn.init.kaiming_normal_(layers[-2].weight)  # torch's are too small: D stays at 1/2
        layers.append(nn.Flatten())
        for n_in, n_out in pairwise([c * side ** 2, *hidden]):
            layers += [nn.Linear(n_in, n_out), nn.SiLU()]
        features = hidden[-1] if hidden else widths[-1] * small ** 2
        self.trunk, self.conditional = nn.Sequential(*layers), conditional
        self.score, self.guess = nn.Linear(features, 1), nn.Linear(features, classes)

    def forward(self, x, y=None):
        h = self.trunk(x)
        score, guess = self.score(h).flatten(), self.guess(h)
        return score + (guess * y).sum(dim=1) if self.conditional else score, guess


class Autoencoder(nn.Module):
    """x -> errors ‖x - decode(encode(x))‖ / √(C side²) [B], codes [B, d]: D of ebgan and began.
    This root of the mean squared error has a bounded gradient, so a few bad fakes do not dominate.
    There is no tanh at the end: its derivative would be near 0 at black, -1."""

    def __init__(self, c, side, d):
        super().__init__()
        sizes = [c * side ** 2, *HIDDEN_D, d]
        down = [layer for ends in pairwise(sizes) for layer in (nn.Linear(*ends), nn.SiLU())]
        up = [layer for ends in pairwise(sizes[::-1]) for layer in (nn.Linear(*ends), nn.ReLU())]
        self.encode = nn.Sequential(nn.Flatten(), *down[:-1])
        self.decode = nn.Sequential(*up[:-1], nn.Unflatten(1, (c, side, side)))
        self.register_buffer("k", torch.zeros(()))  # of began_k; a buffer is saved with D

    def forward(self, x, y=None):
        codes = self.encode(x)
        error = (x - self.decode(codes)).flatten(1)
        return torch.linalg.vector_norm(error, dim=1) / error.shape[1] ** 0.5, codes


def build(args, method, c, side, classes):
    """G and D of a method (a row of the table below), for pictures [C, side, side]."""
    hidden, width = {"fc": (HIDDEN_G, 0), "dense": (HIDDEN_G, 8), "conv": ([], 32)}[args.nets]
    d_in = args.z_dim + classes * bool(method.labels)
    G = generator(d_in, c, side, hidden, args.width_g or width)
    D = Autoencoder(c, side, method.code) if method.code else Discriminator(
        c, side, classes, hidden and HIDDEN_D, args.width_d or 32, method.conditional)
    return G, D


def with_labels(z, y):
    """G's input: z [B, z_dim] with the one-hot labels y [B, classes], or [B, 0] for none."""
    return torch.cat([z, LABEL_SCALE * y], dim=1)


# --- the methods -------------------------------------------------------------------------------
# A method has two losses: loss_d(D, x, x_fake, y) and loss_g(D, x_fake, y, z, progress). x: data.
# x_fake: G's pictures. z: noise. y: labels that G was given, one-hot [B, classes] or [B, 0].
# progress: from 0 to 1 during training. D(x, y) returns scores and guesses of the label, an
# autoencoder errors and codes. loss_d_of and loss_g_of make the two losses from losses of scores.

def loss_d_of(loss, penalty=None):
    """loss_d: loss(scores of the data, scores of the fakes) + LAMBDA penalty(critic, x, x_fake)."""
    def loss_d(D, x, x_fake, y):
        added = LAMBDA * penalty(lambda x: D(x, y)[0], x, x_fake) if penalty else 0.0
        return loss(D(x, y)[0], D(x_fake, y)[0]) + added
    return loss_d


def loss_g_of(loss):
    """loss_g: loss(scores of the fakes)."""
    return lambda D, x_fake, y, z, progress: loss(D(x_fake, y)[0])


def acgan_d(bce, D, x, x_fake, y):
    """acgan: D also guesses the labels of data and of fakes (Odena et al. 2017)."""
    score, guess = D(torch.cat([x, x_fake]))
    return bce(*score.split(len(x))) + F.cross_entropy(guess, torch.cat([y, y]))


def infogan_d(bce, D, x, x_fake, y):
    """infogan: the labels are random, and D guesses those of fakes. A constant minus the cross-
    entropy is a lower bound on the mutual information of label and picture (Chen et al. 2016)."""
    score, guess = D(torch.cat([x, x_fake]))
    return bce(*score.split(len(x))) + F.cross_entropy(guess[len(x):], y)


def guessed_g(D, x_fake, y, z, progress):
    """acgan, infogan: D should call the fakes real, and guess their labels."""
    score, guess = D(x_fake)
    return nonsaturating_g(score) + F.cross_entropy(guess, y)


def mode_seeking_g(D, x_fake, y, z, progress):
    """mode-seeking: the pictures of one half of the batch must differ from those of the other."""
    n = len(z) // 2
    alike = mode_seeking(x_fake[:n], x_fake[n:2 * n], z[:n], z[n:2 * n])
    return nonsaturating_g(D(x_fake)[0]) + LAMBDA_MS * alike


def balanced_d(D, x, x_fake, y):
    """began: k is stored in D; after each loss, began_k sets the next one."""
    real, fake = D(x)[0], D(x_fake)[0]
    loss = began_d(real, fake, D.k.item())
    D.k.fill_(began_k(D.k.item(), real, fake, LAMBDA_K, GAMMA))
    return loss


def pulled_apart(start, end, D, x_fake, y, z, progress):
    """ebgan, began: D's error and pull_away, whose weight goes from start to end in a run."""
    error, codes = D(x_fake)
    return error.mean() + (start + progress * (end - start)) * pull_away(codes)


class Method(NamedTuple):
    """A row of the table: two losses, and what else is particular to the method."""
    loss_d: Callable
    loss_g: Callable
    lr_d: float = 5e-4         # learning rates
    lr_g: float = 2e-3
    logits: bool = True        # D's scores are logits: the log has the mean of σ(score)
    clip: float = 0.0          # D's weights are clipped to [-clip, clip]; 0: they are not
    labels: str = ""           # that G is given: "" (none), "data" (those of x), or "made up"
    conditional: bool = False  # D is given the labels as well
    code: int = 0              # D is an autoencoder with codes of this length
    length: float = 1.0        # of a training run, in units of --steps
    d_steps: int = 1           # steps of D for each step of G
    eps: float = 1e-8          # G's Adam divides by √(mean of gradient²) + eps


def methods(bce=bce_d):
    """{name: Method}. bce: bce_d with the labels of the flags. After the losses: lr_d and lr_g."""
    table = {
        "minimax": Method(loss_d_of(bce), loss_g_of(minimax_g)),
        "nonsaturating": Method(loss_d_of(bce), loss_g_of(nonsaturating_g)),
        "lsgan": Method(loss_d_of(lsgan_d), loss_g_of(lsgan_g), logits=False),
        "wgan": Method(loss_d_of(wgan_d), loss_g_of(wgan_g), 1e-3, 1e-3, logits=False, clip=CLIP),
        "wgan-gp": Method(loss_d_of(wgan_d, gradient_penalty), loss_g_of(wgan_g), 1e-3, 2e-3,
                          logits=False),
        "dragan": Method(loss_d_of(bce, lambda critic, x, x_fake: dragan_penalty(critic, x)),
                         loss_g_of(nonsaturating_g), 1e-3, 1e-3),
        "cgan": Method(loss_d_of(bce), loss_g_of(nonsaturating_g), labels="data", conditional=True),
        "acgan": Method(partial(acgan_d, bce), guessed_g, 1e-3, 1e-3, labels="data"),
        "infogan": Method(partial(infogan_d, bce), guessed_g, 1e-3, 1e-3, labels="made up",
                          length=1.25),
        "mode-seeking": Method(loss_d_of(bce), mode_seeking_g),
        # In the paper the weight of pull_away is 0.1. With a smaller lr_d some pictures are grey
        "ebgan": Method(loss_d_of(partial(ebgan_d, margin=MARGIN)), partial(pulled_apart, 1.0, 1.0),
                        2e-3, 2e-3, logits=False, code=64),
        # pull_away is not in the paper. Without it G generates little but ones, which are easy to
        # reconstruct; at the end it would deform digits. With longer codes D reconstructs too much
        "began": Method(balanced_d, partial(pulled_apart, 2.5, 0.0), 1e-3, 1e-3, logits=False,
                        code=16, length=2.0)}
    # D far ahead. Adam divides a gradient by its own size, so that even 1e-6 makes a full step, and
    # saturation is not visible. With a larger eps a small gradient makes a small step
    ahead = dict(lr_d=2e-3, lr_g=4e-3, d_steps=3, eps=3e-3, length=0.2)
    return table | {f"{name}-ahead": table[name]._replace(**ahead)
                    for name in ("minimax", "nonsaturating", "lsgan")}


METHODS = methods()
MISTAKES = {  # found in the reports; --break repeats one of them, in these methods
    "double-sigmoid": ["minimax", "nonsaturating", "minimax-ahead", "nonsaturating-ahead"],
    "averaged-log": ["minimax", "nonsaturating", "minimax-ahead", "nonsaturating-ahead"],
    "mse-sigmoid": ["lsgan", "lsgan-ahead"]}


def broken(method, mistake):
    """The method, changed so that it makes one of the MISTAKES."""
    if mistake == "averaged-log":  # the mean of the two terms, not their sum
        return method._replace(loss_d=lambda *args: method.loss_d(*args) / 2)
    # D gets a sigmoid at its end. The loss takes its output for a logit, or for the score of lsgan.
    # The log uses D without this sigmoid, whose scores are logits
    with_sigmoid = lambda D: lambda x, y: (D(x, y)[0].sigmoid(), None)
    return method._replace(loss_d=lambda D, *args: method.loss_d(with_sigmoid(D), *args),
                           loss_g=lambda D, *args: method.loss_g(with_sigmoid(D), *args),
                           logits=True)


# --- train -------------------------------------------------------------------------------------

def labels_for_g(kind, x, y, classes):
    """G's labels, one-hot [B, classes], or [B, 0]. kind: Method.labels; y: labels of the data x."""
    if kind == "made up":
        y = torch.randint(classes, (len(x),), device=x.device)
    return F.one_hot(y, classes).float() if kind else x.new_zeros(len(x), 0)


def optimisers(args, method, G, D, steps, side):
    """Adam for D and G, and the schedules of their learning rates."""
    lr_d = args.lr_d or method.lr_d
    lr_g = args.lr_g or method.lr_g * min(1.0, (28 / side) ** 2)  # less for larger pictures
    opt_d = torch.optim.Adam(D.parameters(), lr_d, (args.beta1, 0.9), fused=True)
    opt_g = torch.optim.Adam(G.parameters(), lr_g, (args.beta1, 0.9), method.eps, fused=True)
    linear = partial(lrs.LambdaLR, lr_lambda=lambda step: min(1, 2 - 2 * step / steps))
    schedule_d = {"linear": linear,  # constant in the first half of the steps, then to 0
                  "constant": partial(lrs.ConstantLR, factor=1.0),
                  "cosine": partial(lrs.CosineAnnealingLR, T_max=steps),
                  "restarts": partial(lrs.CosineAnnealingWarmRestarts, T_0=max(1, steps // 4)),
                  "cyclic": partial(lrs.CyclicLR, base_lr=lr_d / 10, max_lr=lr_d,
                                    step_size_up=max(1, steps // 8), cycle_momentum=False)}
    return opt_d, opt_g, schedule_d[args.d_schedule](opt_d), linear(opt_g)


def train(run, args, method, images, classes):
    """Trains a method; returns an average of G, and the input for samples. run: see 01_vae.py."""
    torch.manual_seed(args.seed)
    z = torch.randn(args.n_samples, args.z_dim)  # the same for every method
    y = F.one_hot(torch.arange(len(z)) % classes, classes)[:, :classes * bool(method.labels)]
    z_fixed = with_labels(z, y).to(run.device)
    c, side = images.x.shape[1:3]
    steps = max(1, round(args.steps * method.length))
    G, D = (net.to(run.device) for net in build(args, method, c, side, classes))
    opt_d, opt_g, schedule_d, schedule_g = optimisers(args, method, G, D, steps, side)
    decay = math.exp(-4 / (steps * args.g_steps))  # an average over about a quarter of the steps
    average = swa_utils.AveragedModel(G, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay))
    batches = run.batches(images, args.batch)

    for step in run.steps(steps, G=G, D=D, average=average, opt_g=opt_g, opt_d=opt_d,
                          schedule_g=schedule_g, schedule_d=schedule_d):
        std = args.input_noise * (1 - step / steps)
        noisy = lambda x: x + std * torch.randn_like(x) if std else x  # for D's input

        # D's step: D minimises loss_d. detach() stops the gradient: it does not reach G
        for _ in range(args.d_steps or method.d_steps):
            x, y = next(batches)
            y = labels_for_g(method.labels, x, y, classes)
            z = torch.randn(len(x), args.z_dim, device=run.device)
            x_fake = G(with_labels(z, y))
            loss_d = method.loss_d(D, noisy(x), noisy(x_fake.detach()), y)
            if args.r1:
                loss_d = loss_d + args.r1 / 2 * r1_penalty(lambda x: D(x, y)[0], x)
            opt_d.zero_grad()
            loss_d.backward()
            opt_d.step()
            if method.clip:
                clip(D, method.clip)

        # G's step: G minimises loss_g. backward() passes through D, but stores no gradient there
        for g_step in range(args.g_steps):
            if g_step:  # the first of these steps uses the pictures that D has just seen
                z = torch.randn(len(x), args.z_dim, device=run.device)
                x_fake = G(with_labels(z, y))
            loss_g = method.loss_g(D, noisy(x_fake), y, z, step / steps)
            opt_g.zero_grad()
            loss_g.backward(inputs=tuple(G.parameters()))
            opt_g.step()
            average.update_parameters(G)

        schedule_d.step()
        schedule_g.step()
        run.log(loss_d=loss_d, loss_g=loss_g)
        if run.every(40):
            run.add_to_row(**readings(method, G, D, x, x_fake.detach(), y, z))
            tell_causes(run, args, method, x, x_fake)
        if run.at(SNAPSHOTS):
            swa_utils.update_bn(z_fixed[:1000].split(1000), average)
            run.snapshot(generate(average, z_fixed[:36]))

    # The batch norm statistics in `average` belong to other weights: compute them again
    swa_utils.update_bn(z_fixed.split(1000), average)
    return average.module, z_fixed


@torch.no_grad()
def generate(G, z):
    """G(z) in evaluation mode (batch norm has fixed statistics), a thousand z at a time."""
    G.eval()
    x = torch.cat([G(part) for part in z.split(1000)])
    G.train()
    return x


def readings(method, G, D, x, x_fake, y, z):
    """Numbers for the log, after a step of G. D(x), D(G(z)): means of the scores, or of σ(logits).
    derivative: Σ_b |∂loss_G / ∂score_b|. As loss_G is a mean over b, this sum is the average for
    one picture. gradient: the norm of the gradient in all weights of G."""
    with torch.no_grad():
        (real, _), (fake, other) = D(x, y), D(x_fake, y)
    fake.requires_grad_()  # loss_g as a function of D's scores: in place of D, what it returned
    loss_g = method.loss_g(lambda x, y=None: (fake, other), x_fake, y, z, 1.0)
    derivative, = torch.autograd.grad(loss_g, fake)
    means = [(a.sigmoid() if method.logits else a).mean().item() for a in (real, fake)]
    numbers = {"D(x)": means[0], "D(G(z))": means[1], "derivative": derivative.abs().sum().item(),
               "gradient": nn.utils.get_total_norm([p.grad for p in G.parameters()]).item()}
    if method.loss_d is balanced_d:
        numbers["convergence"] = began_convergence(real, fake, GAMMA)
    return numbers


# --- measures ----------------------------------------------------------------------------------

def output_fault(x, x_fake):
    """A fault of G's pictures x_fake [B, C, H, W] that training cannot fix, as text, or None: their
    shape is not that of the data x, or some pixels do not depend on z."""
    if x.shape[1:] != x_fake.shape[1:]:
        return f"the data are {tuple(x.shape[1:])}, G generates {tuple(x_fake.shape[1:])}"
    constant = (x_fake == x_fake[:1]).all(dim=0)
    if len(x_fake) > 1 and constant.any():
        return (f"{constant.float().mean():.1%} of G's pixels are the same for every z: "
                f"{x_fake[0][constant].mean():g}, the most common value of the data is "
                f"{x.flatten().mode().values:g}")


def fingerprint(loss_d, loss_g, real_label=1.0):
    """The likely cause of two losses that have stopped moving, as text, or None if none is known.
    loss_d: of bce_d, the sum of its two terms or (a mistake) their mean, nats. loss_g: of minimax_g
    or nonsaturating_g; its sign does not matter. real_label: above 0, to 1."""
    def data_term(a):  # of bce_d, if D gives the logit a to all data
        return real_label * math.log1p(math.exp(-a)) + (1 - real_label) * math.log1p(math.exp(a))

    best = math.log(real_label / max(1 - real_label, 1e-17))  # the logit with the least data_term
    squashed = min(1.0, max(0.0, best))  # the best if D can only return values of a sigmoid
    log_2, entropy = math.log(2), data_term(best)
    known = [  # loss_d, |loss_g|, tolerance of |loss_g|, cause
        (2 * log_2, log_2, 0.005, "D says 1/2 to all: the start, a balance, or D learns nothing"),
        (data_term(squashed) + log_2, log_2, 0.005, "a sigmoid applied twice: D must return "
         f"logits, and these are probabilities, {squashed:.3g} for data and 0 for fakes"),
        (0.0, 1.0, 0.05, "squared errors of a sigmoid saturate as well: D must return raw scores"),
        (entropy, 0.0, 0.005, "D is perfect and the minimax G has no gradient: use nonsaturating"),
        (entropy, 0.0, math.inf, f"D is perfect: its loss is the entropy of label {real_label:g}")]
    for scale, halves in ((1.0, ""), (0.5, " (loss_d is the mean of its halves, not the sum)")):
        for d, g, tolerance, cause in known:
            if abs(loss_d - scale * d) < 0.005 and abs(abs(loss_g) - g) < tolerance:
                return cause + halves


def tell_causes(run, args, method, x, x_fake):
    """Prints known causes, each once: a fault, or a fingerprint that the last three rows share."""
    rows, told = [r for r in run.rows if r["model"] == run.name], run.extra.setdefault("told", [])
    if len(rows) == 1 and (fault := output_fault(x, x_fake)):
        print(f"{run.name}: training cannot fix this: {fault}")
    causes = {fingerprint(row["loss_d"], row["loss_g"], args.real_label) for row in rows[-3:]}
    if method.logits and len(rows) >= 3 and len(causes) == 1 and not causes & {None, *told}:
        told += causes
        print("{model}, step {step}: {loss_d:.4f}, {loss_g:.4f}:".format(**rows[-1]), told[-1])


def measure(x, y, images, labels=""):
    """Numbers for samples x [N, C, H, W] that G made for the labels y [N]; labels: Method.labels.
    distance: to the nearest training picture, whose label is taken as the class of the sample.
    classes: how many classes occur. kl: KL(their shares ‖ equal shares), nats."""
    distance, nearest = common.nearest(x, images)
    numbers = {"distance": distance.mean().item(), "specks": specks(x[:N_SPECKS])}
    if images.y is not None:
        found, n = images.y[nearest].cpu(), int(images.y.max()) + 1
        p = torch.bincount(found, minlength=n).double() / len(found)
        numbers |= {"classes": int((p > 0).sum()), "kl": torch.special.xlogy(p, n * p).sum().item()}
        if labels:
            numbers["label accuracy"] = label_accuracy(y, found, labels == "made up")
    return numbers


def label_accuracy(y, found, made_up=False):
    """Share of samples whose class found [N] is the label y [N] that they were made for.
    made_up: a label then stands for the class that is most frequent among its samples."""
    if made_up:
        return sum(found[y == label].bincount().max().item() for label in y.unique()) / len(y)
    return (found == y).float().mean().item()


def specks(x):
    """Specks (salt and pepper) in a picture of x [N, C, H, W], on average: pixels that are lighter
    than all eight neighbours by more than 0.5, a quarter of the range, or darker than all."""
    patches = F.unfold(F.pad(x, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None], 3)
    lighter = (patches[:, 4:5] - patches)[:, [0, 1, 2, 3, 5, 6, 7, 8]]    # [N C, 8, H W]
    return ((lighter > 0.5).all(dim=1) | (lighter < -0.5).all(dim=1)).sum().item() / len(x)


# --- figures -----------------------------------------------------------------------------------

def figures(args, images, table, done, log):
    """samples.png, saturation.png, curves.png. table: {name: Method}; done: {name: results}."""
    title = f"GAN losses on {images.name}, seed {args.seed}, same z" + (
        f", --break {args.breaks}" if args.breaks else "")
    cells = {"data": ("data\n", common.panel(images.x[:64]))}
    for name, numbers in done.items():
        shown = [f"{key} {numbers[key]:.3g}" for key in ("kl", "label accuracy") if key in numbers]
        cells[name] = f"{name}\n{', '.join(shown)}", common.panel(numbers["pictures"])
    rows = [("", list(cells.values())[i:i + 4]) for i in range(0, len(cells), 4)]
    common.save_panels(args.out / "samples.png", rows, title)
    plots = [("lines: computed\ndots: measured in training", partial(plot_derivatives, table, log)),
             ("D far ahead:\ngradient in G's weights", partial(plot_gradients, log)), cells["data"]]
    if ahead := [cell for name, cell in cells.items() if name.endswith("-ahead")]:
        common.save_panels(args.out / "saturation.png", [("", plots), ("", ahead)], title, size=3)
    fair = [row for row in log if not row["model"].endswith("-ahead")]
    common.plot_curves(args.out / "curves.png", fair or log, {
        "loss_d": "loss of D", "loss_g": "loss of G", "D(G(z))": "D(G(z)): D's output for fakes"},
        title)


def plot_derivatives(table, log, ax):
    """|∂loss_G / ∂score| against D(G(z)): computed for all scores (lines), measured (dots)."""
    for colour, name in enumerate(("minimax", "nonsaturating", "lsgan")):
        scores = torch.linspace(-8, 8, 1601, requires_grad=True)
        loss_g = table[name].loss_g(lambda x, y: (scores, None), None, None, None, 1.0)
        derivative, = torch.autograd.grad(len(scores) * loss_g, scores)  # loss_g is a mean
        p = (scores.sigmoid() if table[name].logits else scores).detach()
        ax.plot(p, derivative.abs(), f"C{colour}", label=name)
        rows = [row for row in log if row["model"] in (name, f"{name}-ahead")]
        x, y = ([row[key] for row in rows] for key in ("D(G(z))", "derivative"))
        ax.plot(x, y, f"C{colour}.", markeredgecolor="black", markeredgewidth=0.4)
        if name == "minimax" and rows:  # where the derivative is 0, no dot is easy to see
            ax.annotate(f"{rows[-1]['model']} ends at {y[-1]:.1g}", (x[-1], y[-1]), (0.15, -0.42),
                        fontsize=9, arrowprops={"arrowstyle": "->"})
    ax.set(xlim=(-0.05, 1.05), ylim=(-0.5, 3), xlabel="D(G(z))", ylabel="|∂loss_G / ∂score|")
    ax.legend(fontsize=8)


def plot_gradients(log, ax):
    """The norm of the gradient in G's weights, for the -ahead runs. Colours: plot_derivatives()."""
    for colour, name in enumerate(("minimax", "nonsaturating", "lsgan")):
        rows = [row for row in log if row["model"] == f"{name}-ahead"]
        ax.semilogy([row["step"] for row in rows], [row["gradient"] for row in rows], f"C{colour}")
    ax.set(xlabel="step", ylabel="norm of the gradient (same colours)")


# --- main --------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = common.parser(__doc__, __file__)
    add, whole, real = p.add_argument, partial(common.number, int), partial(common.number, float)
    usual = [name for name in METHODS if name.startswith(("minimax", "nonsat", "lsgan"))]
    add("--loss", nargs="+", choices=[*METHODS, "all"], metavar="LOSS",
        help=f"{', '.join(METHODS)}, or all; if not given: {', '.join(usual)}")
    add("--steps", type=whole(1), default=2500, help="of G; infogan 1.25x, began 2x, -ahead 0.2x")
    add("--batch", type=whole(2), default=64, help="pictures in a batch")
    add("--z-dim", type=whole(1), default=64, help="length of z")
    add("--nets", choices=["fc", "dense", "conv"], help="fully connected, with convolutions at G's "
        "end, or convolutions; if not given: dense for small pictures, else conv")
    add("--width-g", type=whole(1), help="channels before G's last layer; if not given: 8, conv 32")
    add("--width-d", type=whole(1), help="after D's first layer, for conv; if not given: 32")
    for player in ("d", "g"):
        add(f"--lr-{player}", type=real(above=0), help="learning rate; if not given: the method's")
    add("--beta1", type=real(0, 0.999), default=0.0, help="momentum of Adam, for both players")
    add("--d-steps", type=whole(1), help="steps of D before those of G; if not given: the method's")
    add("--g-steps", type=whole(1), default=1, help="steps of G")
    add("--d-schedule", choices=["linear", "constant", "cosine", "restarts", "cyclic"],
        default="linear", help="how D's learning rate changes")
    add("--real-label", type=real(above=0, most=1), default=1.0, help="0.9: label smoothing")
    add("--label-noise", type=real(0, 1), default=0.0, help="fuzzy labels: width of their interval")
    add("--input-noise", type=real(0, 1), default=0.0,
        help="standard deviation of noise on D's input, in [-1, 1] units; it falls to 0")
    add("--r1", type=real(0), default=0.0, help="gamma, weight of the R1 penalty")
    add("--break", choices=MISTAKES, dest="breaks", help="make a mistake, to see its log: D "
        "ends in a sigmoid, applied twice or squared; loss_d is a mean instead of a sum")
    p.set_defaults(n_samples=N_SAMPLES)
    args = common.parse(p, argv, quick=dict(data="digits", steps=8, n_samples=1000))
    args.loss = args.loss or MISTAKES.get(args.breaks, usual)
    args.loss = list(METHODS) if "all" in args.loss else list(dict.fromkeys(args.loss))
    return args


def main(argv=None):
    args = parse_args(argv)
    run = common.Run(args)
    images = common.load_images(args, run.device)
    args.nets = args.nets or ("dense" if images.x[0].numel() <= 1024 else "conv")
    if args.width_d and args.nets != "conv" or args.width_g and args.nets == "fc":
        common.fail(f"--width-g or --width-d: --nets {args.nets} has no convolutions there")
    for name in args.loss:
        if name not in (fits := MISTAKES.get(args.breaks, METHODS)):
            common.fail(f"--break {args.breaks} is for {', '.join(fits)}, not for {name}")
        if METHODS[name].labels == "data" and images.y is None:
            common.fail(f"{name} needs labels; {images.name} has none: use two subfolders or more")
        if not METHODS[name].logits and (args.real_label, args.label_noise) != (1.0, 0.0):
            common.fail(f"--real-label and --label-noise are for cross-entropy, not for {name}")
    classes = 10 if images.y is None else int(images.y.max()) + 1
    table = methods(partial(bce_d, real_label=args.real_label, label_noise=args.label_noise))
    table |= {name: broken(table[name], args.breaks) for name in MISTAKES.get(args.breaks, [])}
    for name in run.each(args.loss):
        G, z = train(run, args, table[name], images, classes)
        x, y = generate(G, z), torch.arange(len(z)) % classes  # y: the labels in z
        common.save(common.to_uint8(x).cpu(), args.out / f"samples_{name}.pt")
        common.save(G.state_dict(), args.out / f"weights_{name}.pt")
        run.done[name] = {"pictures": common.to_uint8(x[:64]).cpu(), **measure(
            x[:N_NEAREST], y[:N_NEAREST], images, table[name].labels)}
    figures(args, images, table, run.done, run.rows)
    columns = ["classes", "kl", "distance", "specks", "label accuracy"]
    common.print_table([f"{images.name}: loss", *columns], [
        [name, *(f"{numbers.get(column, math.nan):.3g}" for column in columns)]
        for name, numbers in run.done.items()])
    print(f"(specks: lone pixels; data: {specks(common.to_float(images.x[:N_SPECKS])):.3g})")


if __name__ == "__main__":
    main()
