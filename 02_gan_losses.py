r"""02 - GAN losses: eleven ways to pay D and G, one skeleton, and how to read a GAN's log.

Papers   Goodfellow 2014 (minimax, nonsaturating), Mao 2017 (lsgan), Arjovsky 2017 (wgan), Gulrajani
         2017 (wgan-gp), Kodali 2017 (dragan), Mirza, Osindero 2014 (cgan), Chen 2016 (infogan),
         Odena 2017 (acgan), Zhao 2017 (ebgan), Berthelot 2017 (began).
Idea     D climbs E log D(x) + E log(1 - D(G(z)))                                       -> bce_d()
         G descends E log(1 - D(G(z))): no slope where D is sure of a fake          -> minimax_g()
         G climbs E log D(G(z)) instead: full slope there                     -> nonsaturating_g()
         All others change D's question: lsgan_d, wgan_d, gradient_penalty, ebgan_d, began_d, ...
         The table METHODS says which two losses, which penalty and which labels make a method.
See      samples.png: every loss from the same z; saturation.png: which slope reaches G, and three
         generators whose D is far ahead: minimax freezes; curves.png, log.csv, samples_{loss}.pt,
         weights_{loss}.pt (of G). Printed: classes by nearest training picture, their KL to uniform
         in nats, labels obeyed, and what a frozen log means. On MNIST: 10 classes, KL 0.002 to 0.07
         (began: 0.16); acgan obeys 95 % of the labels, cgan 90 % (97 % by a classifier), infogan's
         code agrees with the digit for 83 %.
Time     4.4 min on 2 CPU cores; --loss all 22 min.
Differs  no batch norm in D; Adam with beta1 = 0 for all; wgan and wgan-gp make 3 and 2 steps of D,
         not 5; rates fall along a cosine; cgan's D adds its guess of the label to the score
         (Miyato, Koyama 2018); infogan's Q sees disturbed pictures and must agree with itself on
         data (Ji et al. 2019); dragan's noise as in its code; ebgan's and began's errors are root
         mean squares; G's pictures are pushed apart with weight 1 (ebgan, there 0.1), and for
         began too; -ahead: a larger eps in G's Adam (see METHODS).
Run      python 02_gan_losses.py --loss all
         python 02_gan_losses.py --loss nonsaturating --real-label 0.9
"""

import math
import time
from typing import Callable, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

import common

ADAM_BETAS = (0.0, 0.999)
LAMBDA = 10.0                    # weight of both gradient penalties: Gulrajani 2017, Kodali 2017
CLIP = 0.01                      # wgan keeps D's weights in [-CLIP, CLIP]: Arjovsky 2017, alg. 1
MARGIN = 0.3                     # ebgan: for errors that are roots of mean squares
GAMMA, LAMBDA_K = 0.9, 0.1       # began: Berthelot 2017 has λ_k 0.001 and 100 times more steps
PANEL = 60                       # pictures of each loss in samples.png, a column for each label
Z, LABEL = 64, 3.0               # length of z; of a one-hot label beside it
AGREEMENT = 2.0                  # infogan: weight of Q's agreement with itself on data
N_SAMPLES, N_NEAREST = 10_000, 2000  # pictures in samples_{loss}.pt; compared with the data
VEIL = torch.tensor([0.6, 0.4, 0.6, 0.2, 0.2])  # infogan: range of turn, stretch, shear, two shifts


# --- the idea ----------------------------------------------------------------------------------
# D's and G's loss for each method, both to be minimised, means over the batch. real, fake [B]:
# D's logits (or scores) of data and of G's pictures; for EBGAN and BEGAN: reconstruction errors.

def bce_d(real, fake, real_label=1.0, label_noise=0.0, generator=None):
    """-E[y log σ(real) + (1 - y) log(1 - σ(real))] - E[the same of fake], labels y and y'.

    y = real_label, y' = 1 - real_label for labels 0 and 1 (flipped labels) and else 0 (one-sided
    smoothing, Salimans et al. 2016). label_noise = w makes both uniform, of width w
    around these values; those of the reals are drawn first. The loss is linear in the labels, so
    this noise leaves the mean of the gradient as it is. In nats; without noise >= H(real_label),
    and 2 log 2 = 1.386 if D says 1/2 to all.
    """
    fake_label = 1.0 - real_label if real_label in (0, 1) else 0.0
    y, y_fake = (label + label_noise * (torch.rand(len(a), generator=generator).to(a) - 0.5)
                 for label, a in ((real_label, real), (fake_label, fake)))
    bce = F.binary_cross_entropy_with_logits
    return bce(real, y) + bce(fake, y_fake)


def minimax_g(fake):
    """E log(1 - σ(fake)): G descends what D climbs (Goodfellow et al. 2014, eq. 1). <= 0, nats."""
    return F.logsigmoid(-fake).mean()


def nonsaturating_g(fake):
    """-E log σ(fake): G wants its pictures called real (Goodfellow et al. 2014, sec. 3). nats."""
    return F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))


def lsgan_d(real, fake):
    """E (real - 1)² + E fake² (Mao et al. 2017, without its 1/2). 0.5 if D cannot tell."""
    return ((real - 1) ** 2).mean() + (fake ** 2).mean()


def lsgan_g(fake):
    """E (fake - 1)² (Mao et al. 2017, without its 1/2)."""
    return ((fake - 1) ** 2).mean()


def wgan_d(real, fake):
    """E fake - E real: minus the estimate of W1, times D's Lipschitz constant (Arjovsky 2017)."""
    return fake.mean() - real.mean()


def wgan_g(fake):
    """-E fake (Arjovsky et al. 2017, alg. 1)."""
    return -fake.mean()


def gradient_norms(critic, x):
    """‖∇_x critic(x)‖ of each example, [B]. Differentiable, also where the gradient is 0.

    critic: [B, ...] -> [B], each score a function of its own example alone (so no batch norm).
    """
    x = x.detach().requires_grad_()
    grad, = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return torch.linalg.vector_norm(grad.flatten(1), dim=1)


def gradient_penalty(critic, x_real, x_fake, target=1.0, generator=None):
    """E (‖∇critic(x̂)‖ - target)², x̂ = α x + (1 - α) x_fake (Gulrajani et al. 2017, eq. 3).

    One α, uniform in [0, 1), for each example: x̂ lies on the line between a real and a fake one.
    """
    alpha = torch.rand(len(x_real), generator=generator).to(x_real)
    alpha = alpha.view(-1, *[1] * (x_real.ndim - 1))
    x_hat = alpha * x_real + (1 - alpha) * x_fake
    return ((gradient_norms(critic, x_hat) - target) ** 2).mean()


def dragan_penalty(critic, x_real, generator=None):
    """E (‖∇critic(x + δ)‖ - 1)² near the data alone (Kodali et al. 2017).

    δ as in the authors' code, not the Gaussian of the paper: α σ u / 2, u uniform in [0, 1) for
    each pixel, α for each example; here σ is the standard deviation of the example, not the batch.
    """
    alpha = torch.rand(len(x_real), generator=generator).to(x_real)
    u = torch.rand(x_real.shape, generator=generator).to(x_real)
    scale = alpha * x_real.flatten(1).std(dim=1) / 2
    x_hat = x_real + scale.view(-1, *[1] * (x_real.ndim - 1)) * u
    return ((gradient_norms(critic, x_hat) - 1) ** 2).mean()


def r1_penalty(critic, x_real):
    """E ‖∇critic(x)‖² on data (Mescheder et al. 2018; there times γ/2)."""
    return (gradient_norms(critic, x_real) ** 2).mean()


def ebgan_d(real_error, fake_error, margin):
    """E L(x) + E max(0, margin - L(G(z))), L an autoencoder's error (Zhao et al. 2017)."""
    return real_error.mean() + F.relu(margin - fake_error).mean()


def pull_away(codes):
    """Mean cos² of the codes [B, d] of all pairs of different pictures (Zhao et al. 2017).

    0 if all are orthogonal, 1 if all are parallel: it pushes G's pictures apart.
    """
    cosine = F.normalize(codes, dim=1)
    squares = (cosine @ cosine.T) ** 2
    n = len(codes)
    return (squares.sum() - squares.diagonal().sum()) / (n * (n - 1))


def mutual_information(p, q):
    """I(c; c') of the labels guessed for two views of the same pictures, in nats: 0 to log K.

    p, q: probabilities [B, K]; their joint law is the mean of p qᵀ, made symmetric (Ji et al.
    2019). To be maximised: log K if both views always agree and all K labels are as frequent.
    """
    joint = (p[:, :, None] * q[:, None, :]).mean(dim=0)
    joint = (joint + joint.T) / 2
    p_c = joint.sum(dim=0)
    return torch.special.xlogy(joint, joint).sum() - 2 * torch.special.xlogy(p_c, p_c).sum()


def began_d(real_error, fake_error, k):
    """E L(x) - k E L(G(z)) (Berthelot et al. 2017)."""
    return real_error.mean() - k * fake_error.mean()


def began_k(k, real_error, fake_error, lambda_k, gamma):
    """k <- k + λ_k (γ E L(x) - E L(G(z))), clipped to [0, 1]: keeps E L(G(z)) near γ E L(x)."""
    balance = gamma * real_error.mean() - fake_error.mean()
    return min(max(k + lambda_k * balance.item(), 0.0), 1.0)


def began_convergence(real_error, fake_error, gamma):
    """E L(x) + |γ E L(x) - E L(G(z))|: falls as a BEGAN learns (Berthelot et al. 2017)."""
    balance = gamma * real_error.mean() - fake_error.mean()
    return (real_error.mean() + balance.abs()).item()


# --- the table of methods ----------------------------------------------------------------------

class Method(NamedTuple):
    """What makes a method; real and fake are D's scores, or errors if it is an autoencoder."""
    d: Callable                  # (real, fake) -> loss of D
    g: Callable                  # fake -> loss of G
    lr: tuple = (4e-3, 4e-3)     # of D, of G
    d_steps: int = 1
    dropout: float = 0.3         # on D's features; a Lipschitz critic does better without
    labels: str = ""             # "condition": both get y; "guess": D says it; "code": invented
    penalty: Callable = None     # (critic, x, x_fake) -> term added to D's loss, times LAMBDA
    clip: bool = False
    autoencoder: int = 0         # length of D's code; its score is then its reconstruction error
    pull_away: tuple = ()        # its weight in G's loss, at the start and at the end
    eps: float = 1e-8            # G's Adam divides by √(mean g²) + eps
    share: float = 1.0           # of --steps


METHODS = {
    "minimax": Method(bce_d, minimax_g),
    "nonsaturating": Method(bce_d, nonsaturating_g),
    "lsgan": Method(lsgan_d, lsgan_g, lr=(2e-3, 2e-3)),  # at 4e-3 the squares blow up
    "wgan": Method(wgan_d, wgan_g, lr=(1e-3, 2e-3), d_steps=3, dropout=0.0, clip=True),
    "wgan-gp": Method(wgan_d, wgan_g, lr=(2e-3, 2e-3), d_steps=2, dropout=0.0,
                      penalty=gradient_penalty),
    "dragan": Method(bce_d, nonsaturating_g,
                     penalty=lambda critic, x, x_fake: dragan_penalty(critic, x)),
    "cgan": Method(bce_d, nonsaturating_g, labels="condition"),
    "infogan": Method(bce_d, nonsaturating_g, labels="code", share=1.25),
    "acgan": Method(bce_d, nonsaturating_g, labels="guess"),
    "ebgan": Method(lambda real, fake: ebgan_d(real, fake, MARGIN), torch.mean, lr=(2e-3, 2e-3),
                    autoencoder=64, pull_away=(1.0, 1.0)),  # Zhao 2017: 0.1
    # a 1 has half the error of other digits: without the pull-away G draws little else; it falls to
    # 0, for digits that are pushed apart are torn. Through a code of 64 D redraws rubbish too
    "began": Method(began_d, torch.mean, lr=(1e-3, 1e-3), autoencoder=16, pull_away=(2.5, 0.0),
                    share=2.0),
}
# D far ahead: three steps to one. Adam divides even a slope of 1e-6 up to a full step and so hides
# that minimax is saturated; with a larger eps in G's Adam a small slope is a small step.
METHODS |= {f"{name}-ahead": METHODS[name]._replace(lr=(2e-3, 4e-3), d_steps=3, eps=3e-3, share=0.2)
            for name in ("minimax", "nonsaturating", "lsgan")}


# --- how to read a log -------------------------------------------------------------------------

def fingerprint(loss_d, loss_g, real_label=1.0):
    """The likely cause of losses that stay where they are, or None if they say nothing.

    loss_d is the sum over both halves, both losses by bce_d and minimax_g or nonsaturating_g, nats;
    loss_g is compared without its sign, which is minimax_g's alone.
    """
    entropy = 0.0 if real_label in (0, 1) else -(real_label * math.log(real_label)
                                                 + (1 - real_label) * math.log(1 - real_label))
    half = math.log(2)
    known = [
        (2 * half, half, "D says 1/2 to all: the start, a balance, or a D that learns nothing"),
        (math.log(1 + math.exp(-1)) + half, half, "a sigmoid applied twice (softplus(-1) + ln 2 "
         "and ln 2): D must return logits"),
        (entropy, 0.0, "D is perfect and the minimax G has no gradient: use nonsaturating"),
        (entropy, None, f"D is perfect: its loss is at the entropy of the label {real_label:g}"),
    ]
    for d, g, cause in known:
        if abs(loss_d - d) < 0.005 and (g is None or abs(abs(loss_g) - g) < 0.005):
            return cause
    return None


def new_fingerprint(log, real_label):
    """The fingerprint that the last three rows of a log share, if the row before had not."""
    causes = [fingerprint(row["loss_d"], row["loss_g"], real_label) for row in log[-4:]]
    new = len(causes) < 4 or causes[0] != causes[-1]
    return causes[-1] if new and len(causes) >= 3 and len(set(causes[-3:])) == 1 else None


# --- model -------------------------------------------------------------------------------------

def channels(side):
    """Channels of the maps, largest map first; side of the smallest, 4 to 7 pixels if side >= 8."""
    halvings = max(1, int(math.log2(side / 4)))
    return [32 * 2 ** i for i in range(halvings)], side // 2 ** halvings


def decoder(d_in, c, side, norm):
    """Layers [B, d_in] -> [B, C, side, side], unbounded."""
    widths, small = channels(side)
    layers = [nn.Linear(d_in, widths[-1] * small ** 2), nn.Unflatten(1, (widths[-1], small, small))]
    for wide, narrow in zip(widths[::-1], [*widths[-2::-1], c]):
        layers += [norm(wide), nn.ReLU(),
                   nn.ConvTranspose2d(wide, narrow, kernel_size=4, stride=2, padding=1)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # draws faster on the CPU


def generator(d_in, c, side):
    """[B, d_in] -> pictures [B, C, side, side] in (-1, 1); d_in = Z, + classes if G sees labels.

    Starts with normal weights of 0.02 and zero biases.
    """
    net = nn.Sequential(*decoder(d_in, c, side, nn.BatchNorm2d), nn.Tanh())
    for layer in net:
        if isinstance(layer, (nn.Linear, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return net


def trunk(c, side):
    """Strided convolutions [B, C, side, side] -> features [B, F], and F. No batch norm."""
    widths, small = channels(side)
    layers = []
    for i, o in zip([c, *widths], widths):
        layers += [nn.Conv2d(i, o, kernel_size=4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten()), widths[-1] * small ** 2


class Discriminator(nn.Module):
    """(x, y) -> logits [B], guesses of the label [B, classes].

    conditional: to the logit is added the guess of the label asked for, y one-hot [B, classes]
    (Miyato, Koyama 2018); else y is not used.
    """

    def __init__(self, c, side, classes, conditional, dropout):
        super().__init__()
        self.conditional = conditional
        self.trunk, features = trunk(c, side)
        self.drop = nn.Dropout(dropout)
        self.score, self.guess = nn.Linear(features, 1), nn.Linear(features, classes)

    def forward(self, x, y):
        h = self.drop(self.trunk(x))
        score, guess = self.score(h).flatten(), self.guess(h)
        return score + (guess * y).sum(dim=1) if self.conditional else score, guess


class Autoencoder(nn.Module):
    """(x, y) -> errors ‖x - decoded(x)‖ / √(C side²) [B], codes [B, d]; y is not used.

    The root, not the square: however bad a fake, D gains at a bounded rate from making it worse.
    No tanh at the end, whose slope would be 0 at black.
    """

    def __init__(self, c, side, d):
        super().__init__()
        convolutions, features = trunk(c, side)
        self.encode = nn.Sequential(convolutions, nn.Linear(features, d))
        self.decode = decoder(d, c, side, nn.Identity)

    def forward(self, x, y):
        codes = self.encode(x)
        error = (x - self.decode(codes)).flatten(1)
        return torch.linalg.vector_norm(error, dim=1) / error.shape[1] ** 0.5, codes


def with_labels(z, one_hot):
    """G's input: z, followed by the one-hot label, of length LABEL, if there is one."""
    return z if one_hot is None else torch.cat([z, LABEL * one_hot], dim=1)


def disturbed(x):
    """x turned, scaled, sheared and shifted at random, with noise as strong as the picture.

    What InfoGAN's code stands for is what Q can read. From clean pictures it reads any detail that
    G chooses to hide the code in; through this veil only what is plain survives: the digit.
    """
    n = len(x)
    turn, stretch, shear, right, down = ((torch.rand(5, n, device=x.device) - 0.5)
                                         * VEIL.to(x.device)[:, None])
    rows = [(1 + stretch) * turn.cos(), shear - turn.sin(), right,
            turn.sin(), (1 + stretch) * turn.cos(), down]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(n, 2, 3), x.shape, align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1 + torch.randn_like(x)


# --- measures ----------------------------------------------------------------------------------

def report(x, y, images, labels):
    """Numbers for samples x [N, C, H, W] that were asked for with labels y [N].

    distance: to the nearest of 10,000 training pictures, root mean square in [-1, 1] units;
    classes: the labels of those that occur; kl: of their histogram to uniform, nats; obeyed: share
    of samples with the label asked for (infogan: with the label that its code stands for, after
    the best one-to-one matching of codes and labels).
    """
    train = common.to_float(images.x[:10_000]).flatten(1)
    nearest = [torch.cdist(part, train).min(dim=1) for part in x.flatten(1).split(1000)]
    distance = torch.cat([n.values for n in nearest]) / train.shape[1] ** 0.5
    numbers = {"distance": distance.mean().item()}
    if images.y is not None:
        found = images.y[torch.cat([n.indices for n in nearest])].cpu()
        k = int(images.y.max()) + 1
        p = torch.bincount(found, minlength=k).double() / len(found)
        numbers |= {"classes": int((p > 0).sum()), "kl": torch.special.xlogy(p, k * p).sum().item()}
        if labels:
            table = torch.zeros(k, k).index_put_((y.cpu(), found), torch.ones(1), True)
            obeyed = best_matching(table) if labels == "code" else table.trace().item()
            numbers["obeyed"] = obeyed / len(found)
    return numbers


def best_matching(table):
    """Largest Σ_i table[i, σ(i)] over all permutations σ, table [K, K].

    Row by row, the best total for each set of columns used so far (Held, Karp 1962): 2^K K steps.
    """
    best = {0: 0.0}
    for row in table.tolist():
        grown = {}
        for used, total in best.items():
            for column, value in enumerate(row):
                if not used >> column & 1:
                    key = used | 1 << column
                    grown[key] = max(grown.get(key, -math.inf), total + value)
        best = grown
    return best[2 ** len(table) - 1]


# --- train -------------------------------------------------------------------------------------

def schedule(name, opt, steps):
    """A schedule of torch for a learning rate."""
    return {"constant": lambda: lr_scheduler.ConstantLR(opt, factor=1.0),
            "cosine": lambda: lr_scheduler.CosineAnnealingLR(opt, steps),
            "restarts": lambda: lr_scheduler.CosineAnnealingWarmRestarts(opt, max(1, steps // 4)),
            "cyclic": lambda: lr_scheduler.CyclicLR(
                opt, opt.param_groups[0]["lr"] / 10, opt.param_groups[0]["lr"],
                max(1, steps // 8), cycle_momentum=False)}[name]()


def nets(method, c, side, classes):
    """G and D of a method, for pictures of `side` pixels."""
    G = generator(Z + classes * bool(method.labels), c, side)
    if method.autoencoder:
        return G, Autoencoder(c, side, method.autoencoder)
    return G, Discriminator(c, side, classes, method.labels == "condition", method.dropout)


def draw(method, G, y, n, classes, device):
    """Labels for n pictures (infogan invents them), one-hot if the method has any, and pictures."""
    if method.labels == "code":
        y = torch.randint(classes, (n,), device=device)
    one_hot = F.one_hot(y, classes).float() if method.labels else None
    return y, one_hot, G(with_labels(torch.randn(n, Z, device=device), one_hot))


def noisy(x, std):
    """x with normal noise; nothing is drawn where std is 0."""
    return x + std * torch.randn_like(x) if std else x


def loss_of_d(args, method, real, fake, k):
    """The method's loss of D, with what it takes beside the scores."""
    if method.d is bce_d:
        return bce_d(real, fake, args.real_label, args.label_noise)
    return began_d(real, fake, k) if method.d is began_d else method.d(real, fake)


def loss_of_labels(method, D, x_fake, y, guess):
    """Cross-entropy of the labels y: acgan's D says them, infogan's Q reads them in x_fake."""
    if method.labels == "code":
        return F.cross_entropy(D(disturbed(x_fake), None)[1], y)
    if method.labels == "guess":
        return F.cross_entropy(guess, y.repeat(len(guess) // len(y)))  # of D's two halves
    return 0.0


def disagreement(method, D, x):
    """infogan's Q should also read the same code in two disturbed copies of a data picture."""
    if method.labels != "code":
        return 0.0
    p, q = (D(disturbed(x), None)[1].softmax(dim=1) for _ in range(2))
    return -AGREEMENT * mutual_information(p, q)


def penalties(args, method, critic, x, x_fake):
    """What holds D's slope, weighted: the method's own penalty, and R1 if it is asked for."""
    own = LAMBDA * method.penalty(critic, x, x_fake) if method.penalty else 0.0
    r1 = args.r1 / 2 * r1_penalty(critic, x) if args.r1 else 0.0
    return own + r1


def clip(net, limit):
    """Every parameter into [-limit, limit] (Arjovsky et al. 2017, alg. 1)."""
    with torch.no_grad():
        for p in net.parameters():
            p.clamp_(-limit, limit)


def train(args, name, images, device, saved, done):
    """Trains one method; returns its log, numbers and pictures, and writes samples_{name}.pt and
    weights_{name}.pt.

    saved: the checkpoint to go on from, or None; done: results of the runs before, kept in it.
    """
    torch.manual_seed(args.seed)
    method, (c, side) = METHODS[name], images.x.shape[1:3]
    steps, d_steps = max(1, round(args.steps * method.share)), args.d_steps or method.d_steps
    classes = 10 if images.y is None else int(images.y.max()) + 1
    z_fixed = torch.randn(args.n_samples, Z).to(device)  # the same for every method and figure
    y_fixed = torch.arange(args.n_samples, device=device) % classes
    G, D = (net.to(device) for net in nets(method, c, side, classes))
    # the methods' rates are for 28 pixels: at 64, with two layers more, 4e-3 diverges in 200 steps
    lr_d, lr_g = (lr * min(1.0, (28 / side) ** 2) for lr in method.lr)
    opt_d = torch.optim.Adam(D.parameters(), lr=args.lr_d or lr_d, betas=ADAM_BETAS, fused=True)
    opt_g = torch.optim.Adam(G.parameters(), lr=args.lr_g or lr_g, betas=ADAM_BETAS,
                             eps=method.eps, fused=True)
    rate_d, rate_g = schedule(args.d_schedule, opt_d, steps), schedule("cosine", opt_g, steps)
    parts = dict(G=G, D=D, opt_g=opt_g, opt_d=opt_d, rate_g=rate_g, rate_d=rate_d)

    first, log, k = 0, [], 0.0  # k: BEGAN's
    if saved:
        first, log, k = saved["step"], saved["log"], saved["k"]
        common.restore(saved, parts)
    sign = -1 if args.real_label == 0 else 1  # flipped labels: D says 0 to data, G wants the same
    batches = common.batches(images, args.batch, args.seed, first * d_steps)
    show = common.progress(name, steps, args.batch * d_steps, first)
    start = time.monotonic()

    with common.ctrl_c() as pressed:
        for step in range(first + 1, steps + 1):
            milestone = common.due(step, steps, 40)
            std = args.input_noise * (1 - step / steps)

            # D's half: descend its loss on data and on G's pictures, G untouched
            for _ in range(d_steps):
                x, y = next(batches)
                y, one_hot, x_fake = draw(method, G, y, len(x), classes, device)
                both = noisy(torch.cat([x, x_fake.detach()]), std)  # one pass for both
                score, guess = D(both, None if one_hot is None else one_hot.repeat(2, 1))
                real, fake = score.split(len(x))
                loss_d = loss_of_d(args, method, real, fake, k)
                total_d = loss_d + loss_of_labels(method, D, x_fake.detach(), y, guess) \
                    + disagreement(method, D, x) \
                    + penalties(args, method, lambda x: D(x, one_hot)[0], x, x_fake.detach())
                opt_d.zero_grad()
                total_d.backward()
                opt_d.step()
                if method.clip:
                    clip(D, CLIP)
                if method.d is began_d:
                    k = began_k(k, real, fake, LAMBDA_K, GAMMA)

            # G's half: descend its loss through D, D untouched
            for g_step in range(args.g_steps):
                if g_step:
                    y, one_hot, x_fake = draw(method, G, y, len(x), classes, device)
                fake, guess = D(noisy(x_fake, std), one_hot)  # guess: the codes of an autoencoder
                loss_g = method.g(sign * fake)
                total_g = loss_g + loss_of_labels(method, D, x_fake, y, guess)
                if method.pull_away:
                    a, b = method.pull_away
                    total_g = total_g + (a + (b - a) * step / steps) * pull_away(guess)
                if milestone:
                    slope, = torch.autograd.grad(loss_g, fake, retain_graph=True)
                opt_g.zero_grad()
                total_g.backward(inputs=tuple(G.parameters()))
                opt_g.step()

            rate_d.step()
            rate_g.step()
            common.check_finite(step, loss_d=total_d.item(), loss_g=total_g.item())
            show(step, loss_d=loss_d.item(), loss_g=loss_g.item())
            if milestone:
                read = torch.sigmoid if method.d is bce_d else nn.Identity()
                log.append({"loss": name, "step": step, "loss_d": loss_d.item(),
                            "loss_g": loss_g.item(), "D(x)": read(sign * real).mean().item(),
                            "D(G(z))": read(sign * fake).mean().item(),
                            "slope": slope.abs().sum().item(), "gradient": nn.utils.get_total_norm(
                                [p.grad for p in G.parameters()]).item()})
                if method.d is began_d:
                    log[-1]["convergence"] = began_convergence(real, fake, GAMMA)
                cause = method.d is bce_d and new_fingerprint(log, args.real_label)
                if cause:
                    common.say(f"{name}: losses stay at {loss_d:.4f} and {loss_g:.4f}: {cause}")
            if common.due(step, steps, 10) or pressed():
                common.save_checkpoint(args, parts, loss=name, step=step, log=log, k=k, done=done)
            if pressed():
                common.stop(step)

    seconds = time.monotonic() - start
    samples = generate(G, with_labels(
        z_fixed, F.one_hot(y_fixed, classes).float() if method.labels else None))
    common.save(common.to_uint8(samples).cpu(), args.out / f"samples_{name}.pt")
    common.save(G.state_dict(), args.out / f"weights_{name}.pt")
    return {"log": log, "pictures": common.to_uint8(samples[:PANEL]).cpu(),
            "ms a step": 1000 * seconds / (steps - first) if steps > first else math.nan,
            **report(samples[:N_NEAREST], y_fixed[:N_NEAREST], images, method.labels)}


@torch.no_grad()
def generate(G, z):
    """G(z) with the batch norm of evaluation, a thousand at a time."""
    G.eval()
    x = torch.cat([G(part) for part in z.split(1000)])
    G.train()
    return x


# --- figures -----------------------------------------------------------------------------------

def figures(args, images, done):
    """samples.png, saturation.png, curves.png, log.csv."""
    def cell(name, run):
        numbers = [f"{key} {run[key]:.3g}" for key in ("kl", "obeyed") if key in run]
        return f"{name}\n{', '.join(numbers)}", common.panel(run["pictures"], columns=10)

    title = f"GAN losses on {images.name}, seed {args.seed}, same z"
    cells = [("data\n", common.panel(images.x[:PANEL], columns=10))]
    cells += [cell(name, run) for name, run in done.items()]
    common.save_panels(args.out / "samples.png",
                       [("", cells[i:i + 4]) for i in range(0, len(cells), 4)], title)
    log = [row for run in done.values() for row in run["log"]]
    ahead = {name: run for name, run in done.items() if name.endswith("-ahead")}
    if ahead:
        common.save_panels(args.out / "saturation.png", [("", [
            ("slope of G's loss against D(G(z)):\nformula, and where training was",
             lambda ax: draw_slopes(ax, log)),
            ("gradient that reached G's weights,\nD ahead", lambda ax: draw_ahead(ax, log)),
            *(cell(name, run) for name, run in ahead.items())])], f"{title}, D far ahead")
    common.plot_curves(args.out / "curves.png", log, ["loss_d", "loss_g", "D(x)", "D(G(z))",
                                                      "gradient"], "loss", title)
    common.write_log(args.out / "log.csv", log)


def draw_slopes(ax, log):
    """|d loss_G / d score| against D(G(z)): by formula (lines), measured while training (dots).

    σ(a) = D for minimax, 1 - D for nonsaturating, 2 (1 - D) for lsgan, whose score is D itself.
    """
    p = torch.linspace(0, 1, 2)
    for colour, (name, slope) in enumerate({"minimax": p, "nonsaturating": 1 - p,
                                            "lsgan": 2 * (1 - p)}.items()):
        ax.plot(p, slope, f"C{colour}", label=name)
        rows = [row for row in log if row["loss"] in (name, f"{name}-ahead")]
        ax.plot([row["D(G(z))"] for row in rows], [row["slope"] for row in rows], ".",
                color=f"C{colour}", markersize=4, alpha=0.5)
    ax.set(xlim=(-0.05, 1.05), ylim=(-0.05, 2.05))
    ax.legend(fontsize=7)


def draw_ahead(ax, log):
    """Norm of the gradient of G's loss in all weights of G while D was ahead, against the step."""
    for colour, name in enumerate(("minimax", "nonsaturating", "lsgan")):
        rows = [row for row in log if row["loss"] == f"{name}-ahead"]
        ax.semilogy([row["step"] for row in rows], [row["gradient"] for row in rows], f"C{colour}")
    ax.set(xlabel="step")


# --- main --------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = common.parser(__doc__, __file__)
    g = p.add_argument_group("losses")
    g.add_argument("--loss", nargs="+", choices=[*METHODS, "all"], metavar="LOSS",
                   default=[n for n in METHODS if n.startswith(("minimax", "nonsat", "lsgan"))],
                   help=f"{', '.join(METHODS)}, or all")
    g.add_argument("--steps", type=common.positive_int, default=800, help="steps of G")
    g.add_argument("--batch", type=common.positive_int, default=64, help="pictures in a batch")
    g = p.add_argument_group("what the two players get")
    g.add_argument("--lr-d", type=common.positive_float, help="D's rate; else the method's")
    g.add_argument("--lr-g", type=common.positive_float, help="G's rate; else the method's")
    g.add_argument("--d-steps", type=common.positive_int, help="D steps; else the method's")
    g.add_argument("--g-steps", type=common.positive_int, default=1, help="G steps after them")
    g.add_argument("--d-schedule", choices=["constant", "cosine", "restarts", "cyclic"],
                   default="cosine", help="how D's rate moves during the training")
    g = p.add_argument_group("what keeps D modest")
    g.add_argument("--real-label", type=common.share, default=1.0,
                   help="0.9: one-sided label smoothing, 0: flipped labels (cross-entropy only)")
    g.add_argument("--label-noise", type=common.share, default=0.0,
                   help="fuzzy labels: width around the label (cross-entropy only)")
    g.add_argument("--input-noise", type=common.share, default=0.0,
                   help="standard deviation of noise on D's input, in [-1, 1] units, falls to 0")
    g.add_argument("--r1", type=common.not_negative, default=0.0, help="weight of R1, gamma")
    p.set_defaults(n_samples=N_SAMPLES)
    args = common.parse(p, argv, quick=dict(data="digits", steps=8, n_samples=1000))
    args.loss = list(METHODS) if "all" in args.loss else list(dict.fromkeys(args.loss))
    return args


def check(args, images):
    """Ends the run if the flags do not fit the data or the losses."""
    widths, small = channels(images.x.shape[2])
    common.check_side(images, small * 2 ** len(widths))
    for name in args.loss:
        method = METHODS[name]
        if images.y is None and method.labels in ("condition", "guess"):
            common.fail(f"{name} needs labels, and {images.name} has none")
        if method.d is not bce_d and (args.real_label, args.label_noise) != (1.0, 0.0):
            common.fail(f"--real-label and --label-noise are for cross-entropy, not for {name}")
        if method.pull_away and min(args.batch, len(images.x)) < 2:
            common.fail(f"{name} compares the pictures of a batch: use --batch 2 or more")
        if method.autoencoder and args.r1:
            common.fail(f"--r1 is for scores, and the D of {name} is an autoencoder")


def main(argv=None):
    args = parse_args(argv)
    device = common.start(args)
    images = common.load_images(args, device)
    check(args, images)
    saved = common.load_checkpoint(args)
    done = saved["done"] if saved else {}
    for name in args.loss:
        if name not in done:
            resumed = saved if saved and saved["loss"] == name else None
            done[name] = train(args, name, images, device, resumed, dict(done))
    figures(args, images, done)
    columns = ["classes", "kl", "distance", "obeyed", "ms a step"]
    common.print_table([f"{images.name}: loss", *columns], [
        [name, *(f"{run.get(column, math.nan):.3g}" for column in columns)]
        for name, run in done.items()])


if __name__ == "__main__":
    main()
