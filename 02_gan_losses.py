r"""02 - GAN losses: eleven losses for D and G, and one loop.

Papers   Goodfellow et al. 2014, arXiv:1406.2661; each method names its own.
Idea     A generator G draws pictures from noise z. A discriminator D gives each
         picture a score, the logit a; the sigmoid σ(a) is how real it looks.
         D climbs E log σ(a(x)) + E log(1 - σ(a(G(z))))               -> bce_d()
         G descends E log(1 - σ(a)); its slope in a is -σ(a), near 0 where D is
         sure of a fake                                           -> minimax_g()
         G climbs E log σ(a) instead: slope 1 - σ(a)        -> nonsaturating_g()
         Others: squares (lsgan), distance (wgan, wgan-gp), penalty (dragan),
         labels (cgan, acgan, infogan), an autoencoder's error (ebgan, began)
See      samples.png: what each G draws from the same z. saturation.png: three
         GANs whose D is far ahead; the G of minimax stands still. (Their Adam
         has a larger eps: the usual one hides it.) Printed: how many classes
         G draws, and a hint when both losses stand still for a known reason.
Differs  D has no batch norm, so that every score is of one picture alone. Adam
         for all, at rates that fall to 0 in the second half of the steps. What
         is kept is an average of G's weights. Gradient penalties have weight 1,
         in the papers 10. See the class of a method.
Try      --loss minimax-ahead --real-label 0.9: where will loss_d stop falling?
Run      python 02_gan_losses.py    (three losses, and their -ahead)
         python 02_gan_losses.py --loss all
"""

import functools
import math
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

import common

BETA2 = 0.9                      # of Adam; its beta1 is a flag
SMALL = 1024                     # numbers in a picture up to which layers are fully connected
HIDDEN_G, HIDDEN_D = [500, 500], [512, 512]  # units of their layers
LAMBDA = 1.0                     # weight of wgan-gp's and dragan's penalty: in their papers 10
CLIP = 0.03                      # wgan keeps D's weights in [-CLIP, CLIP]: in its paper 0.01
MARGIN = 0.3                     # ebgan: for errors that are roots of mean squares
GAMMA, LAMBDA_K = 0.9, 0.1       # began: Berthelot 2017 has λ_k 0.001 and 100 times more steps
LABEL_SCALE = 3.0                # G sees one-hot labels times this
MISTAKES = ["double-sigmoid", "averaged-log", "other-size"]  # for --break
SHOTS = (0.05, 0.2, 0.5, 1.0)    # shares of a training after which process.png is written
N_SAMPLES, N_NEAREST = 10_000, 2000  # pictures in samples_{loss}.pt; compared with the data
N_PATHS, N_SPECKS = 1000, 500    # z in paths_{loss}.pt; pictures whose specks are counted


# --- the idea ----------------------------------------------------------------------------------
# The losses of D and G, both to be minimised, means over the batch. real, fake [B]: D's scores of
# data and of G's pictures, which are logits, or for EBGAN and BEGAN reconstruction errors. The
# argument generator is a torch.Generator of random numbers, not G.

def bce_d(real, fake, real_label=1.0, label_noise=0.0, generator=None):
    """-E[y log σ(real) + (1 - y) log(1 - σ(real))] - E[the same of fake], labels y and y'.

    real, fake: logits [B]. E: the mean over the batch. Returns a tensor of one number, in nats,
    which is exact for logits of 1000 and -1000, too. y = real_label; y' = 0, or 1 where real_label
    is 0 (flipped labels). A real_label between the two is one-sided smoothing (Salimans et al.
    2016). label_noise = w makes both uniform, of width w around these values: each score has a
    label of its own, drawn with the torch.Generator `generator`. Where w is 0, no random number is
    drawn. The loss is linear in the labels, so this noise leaves the mean of the gradient as it
    is. Without noise the loss is at least the entropy of real_label, and 2 log 2 = 1.386 if D says
    1/2 to all.
    """
    fake_label = 1.0 - real_label if real_label in (0, 1) else 0.0
    y, y_fake = torch.full_like(real, real_label), torch.full_like(fake, fake_label)
    if label_noise:  # else no random number is drawn
        y = y + label_noise * (torch.rand(len(y), generator=generator).to(y) - 0.5)
        u = torch.rand(len(y_fake), generator=generator).to(y_fake)
        y_fake = y_fake + label_noise * (u - 0.5)
    bce = F.binary_cross_entropy_with_logits
    return bce(real, y) + bce(fake, y_fake)


def minimax_g(fake):
    """E log(1 - σ(fake)): G descends what D climbs (Goodfellow et al. 2014, eq. 1). <= 0, nats.

    fake: logits [B]. Returns their mean as a tensor, exact for logits of 1000 and -1000, too.
    """
    return F.logsigmoid(-fake).mean()


def nonsaturating_g(fake):
    """-E log σ(fake): G wants its pictures called real (Goodfellow et al. 2014, sec. 3). nats.

    fake: logits [B]. Returns their mean as a tensor, exact for logits of 1000 and -1000, too.
    """
    return F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))


def lsgan_d(real, fake):
    """E (real - 1)² + E fake² (Mao et al. 2017, without its 1/2). 0.5 if D cannot tell.

    real, fake: scores [B]. Returns a tensor of one number.
    """
    return ((real - 1) ** 2).mean() + (fake ** 2).mean()


def lsgan_g(fake):
    """E (fake - 1)² (Mao et al. 2017, without its 1/2). fake: scores [B]; a tensor of one number.
    """
    return ((fake - 1) ** 2).mean()


def wgan_d(real, fake):
    """E fake - E real (Arjovsky et al. 2017). Minus this is at most K W1(data, fakes).

    real, fake: scores [B]. Returns a tensor of one number. K: D's Lipschitz constant, its largest
    slope; the best D of this slope reaches K W1. W1: the least mean distance over which the fakes
    can be moved onto the data.
    """
    return fake.mean() - real.mean()


def wgan_g(fake):
    """-E fake (Arjovsky et al. 2017, alg. 1). fake: scores [B]; a tensor of one number."""
    return -fake.mean()


def clip(net, limit):
    """Every parameter into [-limit, limit], in place (Arjovsky et al. 2017, alg. 1).

    A parameter inside stays as it is, one outside becomes -limit or limit. Returns nothing.
    """
    with torch.no_grad():
        for p in net.parameters():
            p.clamp_(-limit, limit)


def gradient_norms(critic, x):
    """‖∇_x critic(x)‖ of each example, [B]. Differentiable, also where the gradient is 0.

    The norm is that of all numbers of an example. Its gradient reaches the critic's weights.
    critic: [B, ...] -> [B], each score a function of its own example alone (so no batch norm), so
    that the gradient of their sum holds one gradient for each example.
    """
    x = x.detach().requires_grad_()
    grad, = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return torch.linalg.vector_norm(grad.flatten(1), dim=1)


def gradient_penalty(critic, x_real, x_fake, generator=None):
    """E (‖∇critic(x̂)‖ - 1)², x̂ = α x + (1 - α) x_fake (Gulrajani et al. 2017, eq. 3).

    x_real, x_fake: [B, ...]; critic: as in gradient_norms. One α for each example, uniform between
    0 and 1, drawn with the torch.Generator `generator`: x̂ lies on the line between a real and a
    fake one. Returns the mean over the examples as a tensor; its gradient is finite where ∇ is 0,
    too. Raises ValueError if the shapes differ.
    """
    if x_real.shape != x_fake.shape:
        raise ValueError(f"x_real {tuple(x_real.shape)} and x_fake {tuple(x_fake.shape)} differ")
    alpha = torch.rand(len(x_real), generator=generator).to(x_real)
    alpha = alpha.view(-1, *[1] * (x_real.ndim - 1))
    x_hat = alpha * x_real + (1 - alpha) * x_fake
    return ((gradient_norms(critic, x_hat) - 1) ** 2).mean()


def dragan_penalty(critic, x_real, generator=None):
    """E (‖∇critic(x + δ)‖ - 1)² near the data alone (Kodali et al. 2017).

    x_real: [B, ...]; critic: as in gradient_norms. δ as in the authors' code, not the Gaussian of
    the paper: α s u / 2, u uniform in [0, 1) for each pixel, α for each example, both drawn with
    the torch.Generator `generator`. s is the standard deviation of the pixels of the example, where
    theirs is that of the whole batch: the root of their mean squared deviation from their mean, so
    that it is 0 for one pixel. Returns the mean over the examples as a tensor; its gradient is
    finite where ∇ is 0, too.
    """
    alpha = torch.rand(len(x_real), generator=generator).to(x_real)
    u = torch.rand(x_real.shape, generator=generator).to(x_real)
    scale = alpha * x_real.flatten(1).std(dim=1, correction=0) / 2
    x_hat = x_real + scale.view(-1, *[1] * (x_real.ndim - 1)) * u
    return ((gradient_norms(critic, x_hat) - 1) ** 2).mean()


def r1_penalty(critic, x_real):
    """E ‖∇critic(x)‖² on data (Mescheder et al. 2018; there times γ/2).

    x_real: [B, ...]; critic: as in gradient_norms. Returns the mean over the examples as a tensor.
    """
    return (gradient_norms(critic, x_real) ** 2).mean()


def ebgan_d(real_error, fake_error, margin):
    """E L(x) + E max(0, margin - L(G(z))), L an autoencoder's error (Zhao et al. 2017).

    real_error, fake_error: the errors of data and of G's pictures, [B]. A tensor of one number.
    """
    return real_error.mean() + F.relu(margin - fake_error).mean()


def pull_away(codes):
    """Mean cos² of the codes [B, d] of all pairs of different pictures (Zhao et al. 2017).

    0 if all are orthogonal, 1 if all are parallel: it pushes G's pictures apart. Returns a tensor
    of one number. Raises ValueError for fewer than 2 codes.
    """
    if len(codes) < 2:
        raise ValueError(f"there are no pairs in codes {tuple(codes.shape)}: B must be 2 or more")
    cosine = F.normalize(codes, dim=1)
    squares = (cosine @ cosine.T) ** 2
    n = len(codes)
    return (squares.sum() - squares.diagonal().sum()) / (n * (n - 1))


def began_d(real_error, fake_error, k):
    """E L(x) - k E L(G(z)) (Berthelot et al. 2017).

    real_error, fake_error: the errors of data and of G's pictures, [B]. A tensor of one number.
    """
    return real_error.mean() - k * fake_error.mean()


def began_k(k, real_error, fake_error, lambda_k, gamma):
    """k <- k + λ_k (γ E L(x) - E L(G(z))), clipped to [0, 1]: keeps E L(G(z)) near γ E L(x).

    k: a number. real_error, fake_error: [B]. Returns the new k as a float.
    """
    balance = gamma * real_error.mean() - fake_error.mean()
    return min(max(k + lambda_k * balance.item(), 0.0), 1.0)


def began_convergence(real_error, fake_error, gamma):
    """E L(x) + |γ E L(x) - E L(G(z))|: falls as a BEGAN learns (Berthelot et al. 2017).

    real_error, fake_error: [B]. Returns a float.
    """
    balance = gamma * real_error.mean() - fake_error.mean()
    return (real_error.mean() + balance.abs()).item()


# --- model -------------------------------------------------------------------------------------

def generator(d_in, c, side, hidden=HIDDEN_G, width=8):
    """[B, d_in] -> pictures [B, C, side, side] in (-1, 1); d_in: z_dim, and classes if it sees y.

    Fully connected layers with `hidden` units, then convolutions: `width` channels on the map of
    half the side, 2 width on that of a quarter, and so on; with width = 0 one more fully connected
    layer draws the picture. Weights start as draws of N(0, 0.02²), biases as 0.
    """
    widths = [width * 2 ** i for i in range(max(1, int(math.log2(side / 4))))]
    small = side // 2 ** len(widths)  # side of the smallest map, 4 to 7 pixels
    layers = []
    for i, o in pairwise([d_in, *hidden] + ([widths[-1] * small ** 2] if width else [])):
        layers += [nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU()]
    if width:
        layers.append(nn.Unflatten(1, (widths[-1], small, small)))
        for i, o in pairwise([*widths[::-1], c]):
            layers += [nn.ConvTranspose2d(i, o, kernel_size=4, stride=2, padding=1),
                       nn.BatchNorm2d(o), nn.ReLU()]
        layers[-2:] = [nn.Tanh()]  # the last map is the picture
    else:
        layers += [nn.Linear(hidden[-1], c * side ** 2), nn.Unflatten(1, (c, side, side)),
                   nn.Tanh()]
    for layer in layers:
        if isinstance(layer, (nn.Linear, nn.ConvTranspose2d)):  # as in DCGAN
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # draws faster on the CPU


def trunk(c, side, hidden, width):
    """(net, n): net takes pictures [B, C, side, side] to features [B, n]. No batch norm.

    Fully connected layers with `hidden` units, or where there are none convolutions with strides,
    the first of `width` channels.
    """
    if hidden:
        layers = [nn.Flatten()]
        for i, o in pairwise([c * side ** 2, *hidden]):
            layers += [nn.Linear(i, o), nn.SiLU()]
        return nn.Sequential(*layers), hidden[-1]
    widths = [width * 2 ** i for i in range(max(1, int(math.log2(side / 4))))]
    small = side // 2 ** len(widths)  # side of the smallest map, 4 to 7 pixels
    layers = []
    for i, o in pairwise([c, *widths]):
        layers += [nn.Conv2d(i, o, kernel_size=4, stride=2, padding=1), nn.SiLU()]
        nn.init.kaiming_normal_(layers[-2].weight)  # torch's start is smaller, and D stays at 1/2
    return nn.Sequential(*layers, nn.Flatten()), widths[-1] * small ** 2


def kind_of_nets(args, c, side):
    """What --nets says; else "dense" up to SMALL numbers in a picture, "conv" above."""
    return args.nets or ("dense" if c * side ** 2 <= SMALL else "conv")


class Discriminator(nn.Module):
    """x -> logits [B], and a number for each label [B, classes]: for cgan, acgan, infogan."""

    def __init__(self, c, side, classes, hidden, width):
        super().__init__()
        self.trunk, features = trunk(c, side, hidden, width)
        self.score, self.guess = nn.Linear(features, 1), nn.Linear(features, classes)

    def forward(self, x):
        h = self.trunk(x)
        return self.score(h).flatten(), self.guess(h)


class Autoencoder(nn.Module):
    """x -> errors ‖x - decoded(x)‖ / √(C side²) [B], codes [B, d]. Fully connected layers.

    The root and not the square: its gradient is bounded, so that bad fakes do not dominate. No tanh
    at the end, whose slope would be 0 at black.
    """

    def __init__(self, c, side, d):
        super().__init__()
        layers, features = trunk(c, side, HIDDEN_D, width=0)
        self.encode = nn.Sequential(layers, nn.Linear(features, d))
        layers = []
        for i, o in pairwise([d, *HIDDEN_D[::-1]]):
            layers += [nn.Linear(i, o), nn.ReLU()]
        self.decode = nn.Sequential(*layers, nn.Linear(HIDDEN_D[0], c * side ** 2),
                                    nn.Unflatten(1, (c, side, side)))
        self.register_buffer("k", torch.zeros(()))  # began's: a buffer is saved with D

    def forward(self, x):
        codes = self.encode(x)
        error = (x - self.decode(codes)).flatten(1)
        return torch.linalg.vector_norm(error, dim=1) / error.shape[1] ** 0.5, codes


def with_labels(z, y):
    """G's input: z [B, z_dim], then the one-hot labels y [B, classes], or [B, 0], scaled."""
    return torch.cat([z, LABEL_SCALE * y], dim=1)


def noisy(x, std):
    """x with normal noise; nothing is drawn where std is 0."""
    return x + std * torch.randn_like(x) if std else x


# --- the methods -------------------------------------------------------------------------------

class Minimax:
    """minimax: the GAN of Goodfellow et al. 2014. Each class below says what it changes.

    The argument y: the one-hot labels that G sees, [B, classes], or [B, 0] if it sees none.
    """
    # staticmethod: called as d(real, fake), without self
    d, g = staticmethod(bce_d), staticmethod(minimax_g)  # losses, as functions of scores
    says = staticmethod(torch.sigmoid)  # what the log has of a score: σ of logits
    lr = 5e-4, 2e-3              # of D, of G
    d_steps = 1
    eps = 1e-8                   # G's Adam divides by √(mean g²) + eps
    share = 1.0                  # of --steps
    sees_labels = False          # does G see y?

    def __init__(self, args, classes):
        self.args, self.classes = args, classes
        # flipped labels (D calls data 0): since σ(-a) = 1 - σ(a), the sign turns D's answer round
        self.sign = -1 if args.real_label == 0 else 1
        if self.d is bce_d:
            self.d = functools.partial(bce_d, real_label=args.real_label,
                                       label_noise=args.label_noise)

    def nets(self, c, side):
        args, d_in = self.args, self.args.z_dim + self.classes * self.sees_labels
        kind = kind_of_nets(args, c, side)
        hidden_g, hidden_d = ([], []) if kind == "conv" else (HIDDEN_G, HIDDEN_D)
        width = {"fc": 0, "dense": 8, "conv": 32}[kind]
        return (generator(d_in, c, side, hidden_g, args.width_g or width),
                Discriminator(c, side, self.classes, hidden_d, args.width_d or width))

    def labels(self, x, classes):
        """One-hot labels for G's pictures; classes: those of the data x, numbers [B] or None."""
        return x.new_zeros(len(x), 0)

    def sample_labels(self, n):
        """One-hot labels of n samples: the classes in turn."""
        y = torch.arange(n) % self.classes
        return F.one_hot(y, self.classes)[:, :self.classes * self.sees_labels]

    def score(self, D, x, y):
        """D's logits [B], or what the method has in their place."""
        return D(x)[0]

    def loss_d(self, D, x, x_fake, y):
        """What D descends. The fakes were drawn for the labels y of the data."""
        real, fake = self.score(D, x, y), self.score(D, x_fake, y)
        return self.d(real, fake)

    def after_d(self, D):
        """What follows each step of D."""

    def loss_g(self, D, x_fake, y, progress):
        """What G descends. progress: how much of the training is over, from 0 to 1."""
        return self.g(self.sign * self.score(D, x_fake, y))


class Nonsaturating(Minimax):
    """nonsaturating: G climbs log σ of the score instead (Goodfellow et al. 2014, section 3)."""
    g = staticmethod(nonsaturating_g)


class LSGAN(Minimax):
    """lsgan: squared distances of the scores to 1 and 0 (Mao et al. 2017)."""
    d, g, says = staticmethod(lsgan_d), staticmethod(lsgan_g), nn.Identity()


class WGAN(Minimax):
    """wgan: D estimates a distance; clipping its weights bounds its slope (Arjovsky 2017)."""
    d, g, says = staticmethod(wgan_d), staticmethod(wgan_g), nn.Identity()
    lr = 1e-3, 1e-3

    def after_d(self, D):
        clip(D, CLIP)


class WGANGP(WGAN):
    """wgan-gp: a penalty holds the slope of D near 1 instead (Gulrajani et al. 2017)."""
    lr = 1e-3, 2e-3
    after_d = Minimax.after_d    # no clipping

    def loss_d(self, D, x, x_fake, y):
        penalty = gradient_penalty(lambda x: self.score(D, x, y), x, x_fake)
        return super().loss_d(D, x, x_fake, y) + LAMBDA * penalty


class DRAGAN(Nonsaturating):
    """dragan: the same penalty on logits, and only near the data (Kodali et al. 2017)."""
    lr = 1e-3, 1e-3

    def loss_d(self, D, x, x_fake, y):
        penalty = dragan_penalty(lambda x: self.score(D, x, y), x)
        return super().loss_d(D, x, x_fake, y) + LAMBDA * penalty


class CGAN(Nonsaturating):
    """cgan: G and D are told the label (Mirza, Osindero 2014).

    The score of x with label y is score(x) + guess(x)[y] (after Miyato, Koyama 2018).
    """
    sees_labels = True

    def labels(self, x, classes):
        return F.one_hot(classes, self.classes).float()

    def score(self, D, x, y):
        score, guess = D(x)
        return score + (guess * y).sum(dim=1)

    @staticmethod
    def obeyed(y, found):
        """Share of the pictures in which the label y [N] was found."""
        return (found == y).float().mean().item()


class ACGAN(CGAN):
    """acgan: D is not told the label but guesses it, and both players gain if the guess is right
    (Odena et al. 2017)."""
    lr = 1e-3, 1e-3
    score = Minimax.score

    def loss_d(self, D, x, x_fake, y):
        score, guess = D(torch.cat([x, x_fake]))
        return self.d(*score.split(len(x))) + F.cross_entropy(guess, torch.cat([y, y]))

    def loss_g(self, D, x_fake, y, progress):
        score, guess = D(x_fake)
        return self.g(self.sign * score) + F.cross_entropy(guess, y)


class InfoGAN(ACGAN):
    """infogan: labels are made up, and D guesses those of fakes (Chen et al. 2016).

    Minus the cross-entropy is, up to a constant, a lower bound on the mutual information of label
    and picture: G must draw each label in a way of its own.
    """
    share = 1.25                 # it takes longer

    def labels(self, x, classes):
        made_up = torch.randint(self.classes, (len(x),), device=x.device)
        return F.one_hot(made_up, self.classes).float()

    def loss_d(self, D, x, x_fake, y):
        score, guess = D(torch.cat([x, x_fake]))
        return self.d(*score.split(len(x))) + F.cross_entropy(guess[len(x):], y)

    @staticmethod
    def obeyed(y, found):
        """Share of the pictures with the most frequent class of their made-up label."""
        return sum(found[y == label].bincount().max().item() for label in y.unique()) / len(y)


class EBGAN(Minimax):
    """ebgan: D is an autoencoder, and its score is its error, high for fakes (Zhao et al. 2017).

    pull_away pushes G's pictures apart (its weight is 0.1 in the paper).
    """
    d, g = staticmethod(lambda real, fake: ebgan_d(real, fake, MARGIN)), staticmethod(torch.mean)
    says = nn.Identity()
    lr = 2e-3, 2e-3              # with a slower D some z stay grey, which pull_away pays for
    code = 64                    # length of the autoencoder's codes
    pull = 1.0, 1.0              # weight of pull_away at the start and at the end of a training

    def nets(self, c, side):
        G, _ = super().nets(c, side)
        return G, Autoencoder(c, side, self.code)

    def loss_g(self, D, x_fake, y, progress):
        (start, end), (error, codes) = self.pull, D(x_fake)
        return self.g(error) + (start + progress * (end - start)) * pull_away(codes)


class BEGAN(EBGAN):
    """began: k keeps the errors of data and fakes in balance (Berthelot et al. 2017).

    Not in the paper: pull_away. The digit 1 is the easiest to redraw, and without a push G would
    draw little else.
    """
    lr = 1e-3, 1e-3
    pull = 2.5, 0.0              # at the end it tears digits
    code = 16                    # with 64 the autoencoder copies bad pictures too
    share = 2.0

    def loss_d(self, D, x, x_fake, y):
        real, fake = self.score(D, x, y), self.score(D, x_fake, y)
        loss = began_d(real, fake, D.k.item())
        D.k.fill_(began_k(D.k.item(), real, fake, LAMBDA_K, GAMMA))
        return loss


class Ahead:
    """-ahead: three steps of D to one of G, higher rates, a fifth of the steps.

    Adam divides a gradient by its own size, so that even 1e-6 gives a full step, which hides that
    the minimax G has no slope. With a larger eps a small gradient is a small step.
    """
    lr = 2e-3, 4e-3
    d_steps = 3
    eps = 3e-3
    share = 0.2


METHODS = {"minimax": Minimax, "nonsaturating": Nonsaturating, "lsgan": LSGAN, "wgan": WGAN,
           "wgan-gp": WGANGP, "dragan": DRAGAN, "cgan": CGAN, "infogan": InfoGAN, "acgan": ACGAN,
           "ebgan": EBGAN, "began": BEGAN}
for name in ("minimax", "nonsaturating", "lsgan"):  # what Ahead says goes before what they say
    METHODS[f"{name}-ahead"] = type(f"{name}-ahead", (Ahead, METHODS[name]), {})


# --- broken on purpose -------------------------------------------------------------------------
# Three mistakes of the coursework's GANs, whose losses then tell what was wrong.

def other_size(d_z, c):
    """The coursework's generator: its last two layers make 16x16 to 12x12 and that to 21x21.

    A kernel of 1 with stride 2 leaves most pixels 0 whatever z is, and no training fixes that.
    """
    return nn.Sequential(
        nn.Unflatten(1, (d_z, 1, 1)),
        nn.ConvTranspose2d(d_z, 512, kernel_size=4), nn.BatchNorm2d(512), nn.ReLU(),       # 4x4
        nn.ConvTranspose2d(512, 256, kernel_size=4, stride=2, padding=1),
        nn.BatchNorm2d(256), nn.ReLU(),                                                    # 8x8
        nn.ConvTranspose2d(256, 128, kernel_size=4, stride=2, padding=1),
        nn.BatchNorm2d(128), nn.ReLU(),                                                    # 16x16
        nn.ConvTranspose2d(128, 32, kernel_size=1, padding=2, bias=False),
        nn.BatchNorm2d(32), nn.ReLU(),                                                     # 12x12
        nn.ConvTranspose2d(32, c, kernel_size=1, stride=2, padding=1, bias=False), nn.Tanh())


def break_it(mistake, method, G, D, c):
    """G and D with one of the MISTAKES in them or, for averaged-log, in method's loss."""
    if mistake == "double-sigmoid":  # D says a probability, and the loss takes it for a logit
        D.score = nn.Sequential(D.score, nn.Sigmoid())
    elif mistake == "averaged-log":
        method.d = lambda real, fake, d=method.d: d(real, fake) / 2
    elif mistake == "other-size":  # D averages its last maps to 4x4, so that it takes every size
        G, D = other_size(method.args.z_dim, c), Discriminator(c, 16, method.classes, [], width=32)
        D.trunk.insert(len(D.trunk) - 1, nn.AdaptiveAvgPool2d(4))
    return G, D


def output_fault(x, x_fake):
    """A fault that training cannot fix: another size, pixels that do not depend on z; None if none.

    x, x_fake: [B, C, H, W]. Compare these first if D wins and nothing helps.
    """
    told = []
    if x.shape[1:] != x_fake.shape[1:]:
        told.append(f"the data are {tuple(x.shape[1:])}, G draws {tuple(x_fake.shape[1:])}")
    constant = (x_fake == x_fake[:1]).all(dim=0)  # the same for every z
    if len(x_fake) > 1 and constant.any():
        told.append(f"{constant.float().mean():.1%} of G's pixels are the same for every z: "
                    f"{x_fake[0][constant].mean():g}, the commonest value of the data is "
                    f"{x.flatten().mode().values:g}")
    return "; ".join(told) or None


# --- train -------------------------------------------------------------------------------------

def schedule(name, opt, steps):
    """A torch schedule for a learning rate; linear: constant for half of the steps, then to 0."""
    return {"linear": lambda: common.fading(opt, steps),
            "constant": lambda: lr_scheduler.ConstantLR(opt, factor=1.0),
            "cosine": lambda: lr_scheduler.CosineAnnealingLR(opt, steps),
            "restarts": lambda: lr_scheduler.CosineAnnealingWarmRestarts(opt, max(1, steps // 4)),
            "cyclic": lambda: lr_scheduler.CyclicLR(
                opt, opt.param_groups[0]["lr"] / 10, opt.param_groups[0]["lr"],
                max(1, steps // 8), cycle_momentum=False)}[name]()


def train(run, args, method, images):
    """Trains one method; returns the average G and what it draws its samples from.

    run logs, saves and draws: run.due(40) is true 40 times, run.note adds to the row of that step,
    run.shoot adds pictures to process.png.
    """
    torch.manual_seed(args.seed)
    c, side = images.x.shape[1:3]
    steps, d_steps = max(1, round(args.steps * method.share)), args.d_steps or method.d_steps
    z = torch.randn(args.n_samples, args.z_dim).to(run.device)  # the same for every method
    z_fixed = with_labels(z, method.sample_labels(args.n_samples).to(run.device))
    G, D = break_it(args.breaks, method, *method.nets(c, side), c)
    G, D = G.to(run.device), D.to(run.device)
    average = common.average_of(G, steps * args.g_steps)
    lr_d, lr_g = method.lr
    lr_g *= min(1.0, (28 / side) ** 2)  # at 64 pixels, a rate for 28 would be too much for G
    betas = (args.beta1, BETA2)
    opt_d = torch.optim.Adam(D.parameters(), args.lr_d or lr_d, betas, fused=True)
    opt_g = torch.optim.Adam(G.parameters(), args.lr_g or lr_g, betas, method.eps, fused=True)
    rate_d, rate_g = schedule(args.d_schedule, opt_d, steps), schedule("linear", opt_g, steps)
    batches = run.batches(images, args.batch)

    for step in run.steps(steps, G=G, D=D, average=average, opt_g=opt_g, opt_d=opt_d,
                          rate_g=rate_g, rate_d=rate_d):
        std = args.input_noise * (1 - step / steps)

        # D's half: descend its loss on data and on G's pictures, G untouched
        for _ in range(d_steps):
            x, labels = next(batches)
            y = method.labels(x, labels)
            x_fake = G(with_labels(torch.randn(len(x), args.z_dim, device=run.device), y))
            loss_d = method.loss_d(D, noisy(x, std), noisy(x_fake.detach(), std), y)
            if args.r1:
                loss_d = loss_d + args.r1 / 2 * r1_penalty(lambda x: method.score(D, x, y), x)
            opt_d.zero_grad()
            loss_d.backward()
            opt_d.step()
            method.after_d(D)

        if step == 1 and (why := output_fault(x, x_fake)):
            common.say(f"{run.name}: training cannot fix this: {why}")

        # G's half: descend its loss. The gradient flows through D, but is kept for G alone (inputs)
        for g_step in range(args.g_steps):
            if g_step:  # the first step takes the pictures that D has just seen
                x_fake = G(with_labels(torch.randn(len(x), args.z_dim, device=run.device), y))
            loss_g = method.loss_g(D, noisy(x_fake, std), y, step / steps)
            opt_g.zero_grad()
            loss_g.backward(inputs=tuple(G.parameters()))
            opt_g.step()
            average.update_parameters(G)

        rate_d.step()
        rate_g.step()
        run.log(loss_d=loss_d, loss_g=loss_g)
        if run.due(40):
            run.note(**readings(method, G, D, x, x_fake.detach(), y))
            tell_fingerprint(method, [row for row in run.rows if row["model"] == run.name])
        if run.at(SHOTS):
            common.settle(average, z_fixed[:1000])
            run.shoot(generate(average, z_fixed[:36]))

    common.settle(average, z_fixed)
    return average.module, z_fixed


@torch.no_grad()
def generate(G, z):
    """G(z) with the batch norm of evaluation, a thousand at a time."""
    G.eval()
    x = torch.cat([G(part) for part in z.split(1000)])
    G.train()
    return x


# --- measures ----------------------------------------------------------------------------------

def readings(method, G, D, x, x_fake, y):
    """What the log keeps beside the losses, after a step of G.

    D(x), D(G(z)): means over the scores, of logits of their σ. slope: mean over the fakes of
    |derivative of a fake's own loss in its score|; loss_g is the mean of B such losses, so that the
    sum of its B derivatives is their mean. gradient: the norm of what reached G's weights.
    """
    with torch.no_grad():
        real, fake = (method.sign * method.score(D, pictures, y) for pictures in (x, x_fake))
    fake = fake.clone().requires_grad_()
    slope, = torch.autograd.grad(method.g(fake), fake)
    numbers = {"D(x)": method.says(real).mean().item(), "D(G(z))": method.says(fake).mean().item(),
               "slope": slope.abs().sum().item(), "gradient": nn.utils.get_total_norm(
                   [p.grad for p in G.parameters()]).item()}
    if isinstance(method, BEGAN):
        numbers["convergence"] = began_convergence(real, fake, GAMMA)
    return numbers


def fingerprint(loss_d, loss_g, real_label=1.0):
    """The likely cause of two losses that stand still, or None if none is known.

    loss_d: by bce_d, the sum for data and fakes, or half of it; loss_g: by minimax_g or
    nonsaturating_g; nats; loss_g is compared without its sign, which is minimax_g's alone.
    Where real_label is 0, loss_g is that of the turned score, -a.
    """
    def cross_entropy(a, label):
        return label * math.log1p(math.exp(-a)) + (1 - label) * math.log1p(math.exp(a))

    log_2 = math.log(2)
    smooth = 0 < real_label < 1
    logit = math.log(real_label / (1 - real_label)) if smooth else math.inf * (real_label - 0.5)
    entropy = cross_entropy(logit, real_label) if smooth else 0.0
    # a sigmoid taken twice: the best "logits" in [0, 1] for data and, whose label is 0 or 1, fakes
    sure, fake = min(1.0, max(0.0, logit)), float(real_label == 0)
    known = [
        (2 * log_2, [log_2], "D says 1/2 to all: the start, a balance, or a D that learns nothing"),
        (cross_entropy(sure, real_label) + cross_entropy(fake, fake),
         [cross_entropy(-fake, label) for label in (0, 1)],
         "a sigmoid applied twice: D must return logits, and these are probabilities, "
         f"{sure:.3g} for data and {fake:g} for fakes"),
        (entropy, [0.0], "D is perfect and the minimax G has no gradient: use nonsaturating"),
        (entropy, [], f"D is perfect: its loss is at the entropy of the label {real_label:g}"),
    ]
    for halves, scale in (("", 1.0), (" (loss_d is the mean of its halves, not the sum)", 0.5)):
        for d, g, cause in known:
            if abs(loss_d - scale * d) < 0.005 and (
                    not g or any(abs(abs(loss_g) - value) < 0.005 for value in g)):
                return cause + halves
    return None


def new_fingerprint(log, real_label):
    """The cause that fits all of the last three rows, or None if it fitted before already."""
    causes = [fingerprint(row["loss_d"], row["loss_g"], real_label) for row in log[-4:]]
    new = len(causes) < 4 or causes[0] != causes[-1]
    return causes[-1] if new and len(causes) >= 3 and len(set(causes[-3:])) == 1 else None


def tell_fingerprint(method, rows):
    """Prints, once, why the losses stand still, where that is known."""
    cause = new_fingerprint(rows, method.args.real_label)
    if cause and method.says is torch.sigmoid:  # all that is known is of cross-entropies
        common.say(f"{rows[-1]['model']}: losses stay at {rows[-1]['loss_d']:.4f} and "
                   f"{rows[-1]['loss_g']:.4f}: {cause}")


def report(x, y, images, method):
    """Numbers for samples x [N, C, H, W] that were drawn for labels y [N].

    distance: to the nearest training picture; classes: how many labels those have; kl: of their
    histogram to uniform, nats; obeyed: share of samples with the label asked for (infogan: with the
    most frequent class of their made-up label).
    """
    if x.shape[1:] != images.x.shape[1:]:
        return {}  # pictures of another size are like none of them
    distance, nearest = common.nearest(x, images)
    numbers = {"distance": distance.mean().item(), "specks": specks(x[:N_SPECKS])}
    if images.y is not None:
        found = images.y[nearest].cpu()
        k = int(images.y.max()) + 1
        p = torch.bincount(found, minlength=k).double() / len(found)
        numbers |= {"classes": int((p > 0).sum()), "kl": torch.special.xlogy(p, k * p).sum().item()}
        if method.sees_labels:
            numbers["obeyed"] = method.obeyed(y.cpu(), found)
    return numbers


def specks(x):
    """Salt and pepper in pictures x [N, C, H, W]: how many pixels of one, in the mean, are lighter
    than all eight around them by more than 0.5, a quarter of the range, or darker than all.
    """
    patches = F.unfold(F.pad(x, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None], 3)
    lighter = (patches[:, 4:5] - patches)[:, [0, 1, 2, 3, 5, 6, 7, 8]]    # [N C, 8, H W]
    return ((lighter > 0.5).all(dim=1) | (lighter < -0.5).all(dim=1)).sum().item() / len(x)


# --- figures -----------------------------------------------------------------------------------

def figures(args, images, done, log):
    """samples.png, saturation.png, curves.png."""
    title = f"GAN losses on {images.name}, seed {args.seed}, same z"
    cells = {}
    for name, numbers in done.items():
        shown = [f"{key} {numbers[key]:.3g}" for key in ("kl", "obeyed") if key in numbers]
        cells[name] = f"{name}\n{', '.join(shown)}", common.panel(numbers["pictures"])
    all_cells = [("data\n", common.panel(images.x[:64])), *cells.values()]
    common.save_panels(args.out / "samples.png",
                       [("", all_cells[i:i + 4]) for i in range(0, len(all_cells), 4)], title)

    ahead = [cell for name, cell in cells.items() if name.endswith("-ahead")]
    if ahead:
        fig, axes = common.figure(1, 2 + len(ahead), 5.2 + 2.6 * len(ahead), 3.4,
                                  f"{title}, D far ahead")
        draw_slopes(axes[0, 0], log)
        draw_ahead(axes[0, 1], log)
        for ax, (text, draw) in zip(axes[0, 2:], ahead):
            draw(ax)
            ax.set_title(text, fontsize=9)
        fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
        common.save_figure(fig, args.out / "saturation.png")
    fair = [row for row in log if not row["model"].endswith("-ahead")]
    common.plot_curves(args.out / "curves.png", fair or log, {
        "loss_d": "loss of D", "loss_g": "loss of G", "D(x)": "D(x): what D says to data",
        "D(G(z))": "D(G(z)): and to fakes", "gradient": "norm of the gradient in G"}, title)


def draw_slopes(ax, log):
    """|d loss_G / d score| against D(G(z)): by formula (lines), measured while training (dots).

    With p = D(G(z)): minimax p, nonsaturating 1 - p, lsgan, whose score itself is p, 2 (1 - p).
    """
    p = torch.linspace(0, 1, 2)
    for colour, (name, slope) in enumerate({"minimax": p, "nonsaturating": 1 - p,
                                            "lsgan": 2 * (1 - p)}.items()):
        ax.plot(p, slope, f"C{colour}", label=name)
        rows = [row for row in log if row["model"] in (name, f"{name}-ahead")]
        ax.plot([row["D(G(z))"] for row in rows], [row["slope"] for row in rows], ".",
                color=f"C{colour}", markeredgecolor="black", markeredgewidth=0.4)
    ax.set(xlim=(-0.05, 1.05), ylim=(-0.05, 2.05), xlabel="D(G(z))", ylabel="|∂loss_G / ∂score|")
    ax.set_title("lines: by the formula\ndots: while training", fontsize=9)


def draw_ahead(ax, log):
    """Norm of the gradient of G's loss in all weights of G while D was ahead, against the step.

    In the colours of draw_slopes.
    """
    for colour, name in enumerate(("minimax", "nonsaturating", "lsgan")):
        rows = [row for row in log if row["model"] == f"{name}-ahead"]
        ax.semilogy([row["step"] for row in rows], [row["gradient"] for row in rows], f"C{colour}")
    ax.set(xlabel="step", ylabel="norm of the gradient")
    ax.set_title("D far ahead:\nwhat reached G's weights", fontsize=9)


# --- main --------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = common.parser(__doc__, __file__)
    g = p.add_argument_group("losses")
    g.add_argument("--loss", nargs="+", choices=[*METHODS, "all"], metavar="LOSS",
                   default=[n for n in METHODS if n.startswith(("minimax", "nonsat", "lsgan"))],
                   help=f"{', '.join(METHODS)}, or all")
    g.add_argument("--steps", type=common.number(int, 1), default=2500, help="steps of G; "
                   "infogan makes 1.25 times as many, began 2 times, -ahead 0.2 times")
    g.add_argument("--batch", type=common.number(int, 1), default=64, help="pictures in a batch")
    g = p.add_argument_group("networks")
    g.add_argument("--z-dim", type=common.number(int, 1), default=64, help="length of z")
    g.add_argument("--nets", choices=["fc", "dense", "conv"], help="fc: fully connected; dense: "
                   "with convolutions at G's end; conv: convolutions; if not given: dense for "
                   "small grey pictures, else conv")
    g.add_argument("--width-g", type=common.number(int, 1),
                   help="channels of G's map of half the side; if not given: 8 for dense, 32 for "
                   "conv")
    g.add_argument("--width-d", type=common.number(int, 1),
                   help="channels of D's map of half the side, for conv; if not given: 32")
    g = p.add_argument_group("rates and steps of the two players")
    g.add_argument("--lr-d", type=common.number(float, above=0), help="D's rate; else the method's")
    g.add_argument("--lr-g", type=common.number(float, above=0), help="G's rate; else the method's")
    g.add_argument("--beta1", type=common.number(float, 0, 0.999), default=0.0,
                   help="momentum of Adam, for both players")
    g.add_argument("--d-steps", type=common.number(int, 1), help="D steps; else the method's")
    g.add_argument("--g-steps", type=common.number(int, 1), default=1, help="G steps after them")
    g.add_argument("--d-schedule", choices=["linear", "constant", "cosine", "restarts", "cyclic"],
                   default="linear", help="how D's rate moves during the training")
    g = p.add_argument_group("against a D that is too strong")
    g.add_argument("--real-label", type=common.number(float, 0, 1), default=1.0,
                   help="0.9: one-sided label smoothing, 0: flipped labels (cross-entropy only)")
    g.add_argument("--label-noise", type=common.number(float, 0, 1), default=0.0,
                   help="fuzzy labels: width around the label (cross-entropy only)")
    g.add_argument("--input-noise", type=common.number(float, 0, 1), default=0.0,
                   help="standard deviation of noise on D's input, in [-1, 1] units, falls to 0")
    g.add_argument("--r1", type=common.number(float, 0), default=0.0, help="weight of R1, gamma")
    g.add_argument("--break", choices=MISTAKES, dest="breaks", help="trains with a mistake of the "
                   "coursework, to see its log: a D that ends in a sigmoid, which the loss takes "
                   "again; a loss_d that is a mean of two; a G that draws 21x21")
    p.set_defaults(n_samples=N_SAMPLES)
    args = common.parse(p, argv, quick=dict(data="digits", steps=8, n_samples=1000))
    args.loss = list(METHODS) if "all" in args.loss else list(dict.fromkeys(args.loss))
    return args


def check(args, images):
    """Ends the run if the flags do not fit the data or the losses."""
    common.check_side(images)
    kind = kind_of_nets(args, *images.x.shape[1:3])
    if args.width_d and kind != "conv":
        common.fail(f"--width-d is for --nets conv: the D of {kind} has no convolutions")
    if args.width_g and kind == "fc":
        common.fail("--width-g is for dense and conv: the G of --nets fc has no convolutions")
    for name in args.loss:
        method = METHODS[name]
        if images.y is None and name in ("cgan", "acgan"):
            common.fail(f"{name} needs labels, and {images.name} has none: a folder's labels are "
                        "its subfolders, two or more, with all pictures in them")
        if method.d is not bce_d and (args.real_label, args.label_noise) != (1.0, 0.0):
            common.fail(f"--real-label and --label-noise are for cross-entropy, not for {name}")
        if args.breaks and not name.startswith(("minimax", "nonsaturating")):
            common.fail(f"--break is for minimax and nonsaturating, not for {name}")
        if issubclass(method, EBGAN):
            common.check_batch(args, images, f"{name} compares the pictures of a batch")
        if issubclass(method, EBGAN) and args.r1:
            common.fail(f"--r1 is for scores, and the D of {name} is an autoencoder")


def main(argv=None):
    args = parse_args(argv)
    with common.Run(args) as run:
        images = common.load_images(args, run.device)
        check(args, images)
        classes = 10 if images.y is None else int(images.y.max()) + 1
        for name in run.each(args.loss):
            method = METHODS[name](args, classes)
            G, z_fixed = train(run, args, method, images)
            samples = generate(G, z_fixed)
            y = torch.arange(args.n_samples) % classes  # as in sample_labels
            common.save(common.to_uint8(samples).cpu(), args.out / f"samples_{name}.pt")
            common.save(common.paths(lambda z: generate(G, z), z_fixed[:N_PATHS]),
                        args.out / f"paths_{name}.pt")
            common.save(G.state_dict(), args.out / f"weights_{name}.pt")
            run.done[name] = {"pictures": common.to_uint8(samples[:64]).cpu(),
                              **report(samples[:N_NEAREST], y[:N_NEAREST], images, method)}
        figures(args, images, run.done, run.rows)
        columns = ["classes", "kl", "distance", "specks", "obeyed"]
        common.print_table([f"{images.name}: loss", *columns], [
            [name, *(f"{numbers.get(column, math.nan):.3g}" for column in columns)]
            for name, numbers in run.done.items()])
        found = specks(common.to_float(images.x[:N_SPECKS]))
        print(f"(pictures of the data have {found:.3g} specks)")


if __name__ == "__main__":
    common.as_script(main)
