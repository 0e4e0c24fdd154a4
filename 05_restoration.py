r"""05 - Restoration: a trained generator G fills in hidden parts of a picture.

Papers   Yeh et al. 2017, arXiv:1607.07539 (the visible pixels determine z);
         Bora et al. 2017, arXiv:1703.03208 (min ‖A G(z) - y‖² + λ ‖z‖²)
Idea     z* = argmin_z ‖m (G(z) - y)‖² + λ ‖z‖². The mask m is 1 where
         y is visible, or "seen", and 0 where it is hidden          -> restore()
         If y = G(z) + noise of variance λ, z* is the most probable z given y.
         The restored picture is m y + (1 - m) G(z*).
         Blind, as in the reports: m = 1, so G has to fit the damage as well.
See      restored.png: six kinds of damage. noise.png: normal noise. Printed:
         PSNR (peak signal-to-noise ratio in dB, high is good). For a hidden
         square on MNIST it is 12.1 with known mask, 8.4 blind, and 10.4 for the
         mean of the neighbours. With --image: own.png and nothing else.
Differs  Yeh et al. take absolute errors (L1), with more weight near a hole, and
         log(1 - D(G(z))) in place of λ ‖z‖²; they blend the edges (Poisson).
Try      --lam 0.03: do the restored pictures gain or lose? Predict, then run.
Run      python 05_restoration.py [--image photo.jpg --mask scribble.png]
"""

import math
from functools import partial
from itertools import pairwise
from os.path import expanduser

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torchvision.transforms import functional as TF

import common

LR_D, LR_G, ADAM_BETAS = 5e-4, 2e-3, (0.0, 0.9)
SNAPSHOTS = (0.05, 0.2, 0.5, 1.0)  # shares of the steps after which process.png is written
N_TEST, N_NOISE = 200, 60          # test pictures for each mask, and for each level of noise
N_SAMPLES, CHUNK = 10_000, 125     # pictures in samples.pt; z in a batch (more are slower on CPUs)


# --- the idea ----------------------------------------------------------------------------------

def check_starts(G, x, z0):
    """Raises ValueError if G is in training mode, where batch norm lets the pictures of a batch
    change each other, or if the N pictures x, the starts z0 [N, R, d] and G(z) do not fit."""
    if any(module.training for module in G.modules()):
        raise ValueError("G must be in evaluation mode: call G.eval()")
    if z0.ndim != 3 or len(z0) != len(x):
        raise ValueError(f"z0 must be [N, R, d] with N = {len(x)} pictures, not {list(z0.shape)}")
    picture = G(z0[:1, 0].detach())
    if picture.shape[1:] != x.shape[1:]:
        raise ValueError(f"G generates {list(picture.shape[1:])}, the pictures are {list(x.shape)}")


def check_mask(mask, *pictures):
    """Raises ValueError unless the pictures have one shape [N, C, H, W], and the mask is [N or 1,
    C or 1, H, W] of type bool, or of any type with the values 0 and 1 alone."""
    shapes = [list(x.shape) for x in pictures]
    n, c, *side = shapes[0] if len(shapes[0]) == 4 else (0, 0)
    fits = [[i, j, *side] for i in (1, n) for j in (1, c)]
    if any(shape != shapes[0] for shape in shapes) or list(mask.shape) not in fits:
        raise ValueError(f"a mask {list(mask.shape)} does not fit pictures {shapes}")
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("a mask has the values 0 and 1, or is bool: compare a picture with 127")


def misfit(G, z, y, mask):
    """‖m (G(z) - y)‖² of each picture, [B]: the sum over the seen pixels of all channels.

    z: [B, d]; y: [B, C, H, W]; mask: 1 = seen, 0 = hidden, see check_mask(). What y holds where it
    is hidden, even nan, changes neither the value nor its gradient.
    """
    x = G(z)
    check_mask(mask, x, y)
    error = torch.where(mask == 1, x - y, 0.0)  # a product would be nan where y is
    return (error ** 2).flatten(1).sum(dim=1)


def restore(G, y, mask, z0, steps, lr, lam):
    """z* = argmin_z ‖m (G(z) - y)‖² + λ ‖z‖² by Adam, from R starts for each of N pictures.

    y: [N, C, H, W] in [-1, 1]; mask: [N, 1, H, W], or [1, 1, H, W] for all pictures, or with C
    channels, bool or 1 = seen, 0 = hidden; what y holds where it is hidden, even nan, does not
    matter; z0: [N, R, d]; lam: λ, the variance of one pixel's error: that of G plus that of noise.
    Squares are summed over the seen pixels of all channels, and over the dimensions of z. Each row
    of z is optimised by itself; the learning rate falls from lr to 0 along a cosine; with 0 steps
    z* is the start. Returns two tensors without gradient: z [N, d], for each picture that of the
    start with the lowest objective at the end (never nan: even inf is better), and all objectives
    at the end, [N, R]. G and z0 do not change. Raises ValueError: check_starts(), check_mask().
    """
    check_starts(G, y, z0)
    check_mask(mask, y)
    n, r, d = z0.shape
    z = z0.detach().clone().reshape(n * r, d).requires_grad_()  # Adam changes it in place
    target, seen = (a.repeat_interleave(r, dim=0) for a in (y, (mask == 1).expand(n, -1, -1, -1)))
    opt = torch.optim.Adam([z], lr=lr, betas=(0.9, 0.9))  # beta2 = 0.999 needs twice the steps
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    objective = lambda: misfit(G, z, target, seen) + lam * (z ** 2).sum(dim=1)
    for _ in range(steps):
        opt.zero_grad()
        objective().sum().backward(inputs=[z])  # a sum: a row gets the gradient of its own term
        opt.step()
        schedule.step()
    with torch.no_grad():
        objectives = objective().reshape(n, r)
    best = objectives.nan_to_num(nan=math.inf).argmin(dim=1)  # argmin would choose a nan
    return z.detach().reshape(n, r, d)[torch.arange(n), best], objectives


# --- the damage, and a baseline ----------------------------------------------------------------
# Masks of floats, 1 = seen, 0 = hidden, for n pictures of side x side. rng: a torch.Generator.

def pepper(n, side, rng):
    """Mask [n, 1, side, side]: 0 at round(0.3 side²) random pixels of each picture, 1 elsewhere."""
    order = torch.rand(n, side * side, generator=rng).argsort(dim=1)
    return (order >= round(0.3 * side * side)).float().view(n, 1, side, side)


def crosswalk(n, side, rng):
    """Mask [n, 1, side, side]: 0 in the second, fourth, ... row, 1 elsewhere."""
    return (torch.arange(side).view(1, 1, side, 1).expand(n, 1, side, side) % 2 == 0).float()


def square(n, side, rng):
    """Mask [n, 1, side, side]: 0 in a square, round(2/7 side) wide, at any place inside; else 1."""
    width = round(side * 2 / 7)
    corner = torch.randint(side - width + 1, (n, 2, 1), generator=rng)
    line = torch.arange(side)
    inside = (line >= corner) & (line < corner + width)                  # [n, 2, side]
    return (~(inside[:, 0, :, None] & inside[:, 1, None, :])).float()[:, None]


def holes(n, side, rng, count):
    """Mask [n, 1, side, side]: 0 in `count` discs, side / 4 wide, at any places inside; else 1."""
    radius = side / 8
    centre = radius + (side - 2 * radius) * torch.rand(n, count, 2, 1, 1, generator=rng)
    line = torch.arange(side) + 0.5
    distance2 = (line[:, None] - centre[:, :, 0]) ** 2 + (line - centre[:, :, 1]) ** 2
    return (distance2 > radius ** 2).all(dim=1).float()[:, None]


MASKS = {"pepper": pepper, "square": square, "crosswalk": crosswalk, "1 hole": partial(
    holes, count=1), "2 holes": partial(holes, count=2), "3 holes": partial(holes, count=3)}


def neighbours(y, mask):
    """y [N, C, H, W] with its hidden pixels filled, from the rim of a hole inwards: in each round a
    hidden pixel with known ones among the eight around it gets the mean of these.

    mask: 1 = seen, 0 = hidden, see check_mask(). Seen pixels do not change; what y holds where it
    is hidden, even nan, does not matter. Raises ValueError also if nothing of a picture is seen.
    """
    check_mask(mask, y)
    known = (mask == 1).expand(len(y), -1, -1, -1)
    if not known.flatten(1).any(dim=1).all():
        raise ValueError("a picture of which nothing is seen has no seen neighbours")
    known, filled = known.to(y), torch.where(known, y, 0.0)
    while not known.all():
        share = F.avg_pool2d(known, 3, stride=1, padding=1)  # of neighbours with a value
        means = F.avg_pool2d(filled, 3, stride=1, padding=1) / share.clamp(min=1e-6)
        new = (known == 0) & (share > 0)
        filled, known = torch.where(new, means, filled), torch.where(new, 1.0, known)
    return filled


# --- model -------------------------------------------------------------------------------------

def generator(d_z, c, side):
    """[B, d_z] -> pictures [B, C, side, side] in (-1, 1). Initial weights as in DCGAN: N(0, 0.02²).

    Convolutions: fully connected layers, as in 02, reach better samples, but fewer test digits.
    """
    widths = [32 * 2 ** i for i in range(max(1, int(math.log2(side / 4))))]
    small = side // 2 ** len(widths)  # side of the smallest map, 4 to 7 pixels
    layers = [nn.Linear(d_z, widths[-1] * small ** 2), nn.Unflatten(1, (widths[-1], small, small))]
    for i, o in pairwise([*widths[::-1], c]):
        layers += [nn.BatchNorm2d(i), nn.ReLU(),
                   nn.ConvTranspose2d(i, o, kernel_size=4, stride=2, padding=1)]
    for layer in layers:
        if isinstance(layer, (nn.Linear, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    # channels_last: faster on the CPU
    return nn.Sequential(*layers, nn.Tanh()).to(memory_format=torch.channels_last)


def discriminator(c, side):
    """[B, C, side, side] -> logits [B], without batch norm. Pictures of at most 1,024 values get
    fully connected layers, larger ones convolutions."""
    if c * side ** 2 <= 1024:
        layers, features = [nn.Flatten()], 512
        for i, o in pairwise([c * side ** 2, 512, 512]):
            layers += [nn.Linear(i, o), nn.SiLU()]
    else:
        widths = [32 * 2 ** i for i in range(max(1, int(math.log2(side / 4))))]
        small = side // 2 ** len(widths)  # side of the smallest map, 4 to 7 pixels
        layers, features = [], widths[-1] * small ** 2
        for i, o in pairwise([c, *widths]):
            layers += [nn.Conv2d(i, o, kernel_size=4, stride=2, padding=1), nn.SiLU()]
        layers.append(nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(features, 1), nn.Flatten(0))


# --- train -------------------------------------------------------------------------------------

def train_generator(run, args, G, D, images):
    """Trains G against D. Returns a state_dict of G in which the weights are a moving average."""
    lr_scale = min(1.0, (28 / images.x.shape[2]) ** 2)  # LR_G and LR_D are for 28 pixels
    opt_g = torch.optim.Adam(G.parameters(), LR_G * lr_scale, betas=ADAM_BETAS, fused=True)
    opt_d = torch.optim.Adam(D.parameters(), LR_D * lr_scale, betas=ADAM_BETAS, fused=True)
    # the learning rates are constant for half of the steps, then they fall linearly to 0
    fall = lambda step: min(1, 2 - 2 * step / args.steps)
    schedule_g, schedule_d = LambdaLR(opt_g, fall), LambdaLR(opt_d, fall)
    # averaged over about the last quarter of the steps, the weights generate better pictures
    average = AveragedModel(G, multi_avg_fn=get_ema_multi_avg_fn(math.exp(-4 / args.steps)))
    z_fixed = torch.randn(args.n_samples, args.z_dim).to(run.device)
    batches = run.batches(images, args.batch)

    for _ in run.steps(args.steps, G=G, D=D, average=average, opt_g=opt_g, opt_d=opt_d,
                       schedule_g=schedule_g, schedule_d=schedule_d):
        # D minimises -mean log σ(D(x)) - mean log(1 - σ(D(G(z)))), where -log σ(a) = softplus(-a)
        x, _ = next(batches)
        x_fake = G(torch.randn(len(x), args.z_dim, device=run.device))
        logits_real, logits_fake = D(torch.cat([x, x_fake.detach()])).split(len(x))
        loss_d = F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()
        opt_d.zero_grad()
        loss_d.backward()
        opt_d.step()

        # G minimises -mean log σ(D(G(z))); inputs=...: no gradient is stored in D
        loss_g = F.softplus(-D(x_fake)).mean()
        opt_g.zero_grad()
        loss_g.backward(inputs=[*G.parameters()])
        opt_g.step()
        average.update_parameters(G)

        schedule_d.step()
        schedule_g.step()
        run.log(loss_d=loss_d, loss_g=loss_g)
        if run.at(SNAPSHOTS):
            # batch norm's running statistics belong to other weights: compute the average's own
            update_bn(z_fixed[:1000].split(1000), average)
            with torch.no_grad():
                run.snapshot(average.eval()(z_fixed[:36]))
            average.train()

    update_bn(z_fixed.split(1000), average)
    return average.module.state_dict()


# --- measure -----------------------------------------------------------------------------------

def psnr(a, b, where):
    """10 log10(2² / mean (a - b)²) in dB over the pixels where `where` is 1, of all pictures.

    a, b: [N, C, H, W] in [-1, 1]; where: see check_mask(). The mean is over all pictures together,
    because the error of a single one may be 0. nan if `where` is 0 everywhere.
    """
    check_mask(where, a, b)
    squares = (a - b)[(where == 1).expand_as(a)] ** 2
    return (10 * torch.log10(4 / squares.mean())).item()


def measure(x, restored, mask):
    """How well the methods restored the pictures x [N, C, H, W]; restored: {method: [N, C, H, W]}.

    hidden: share of the pixels; psnr hidden, psnr all: {method: dB, on the hidden or all pixels};
    neighbours win: share of pictures where they have less error on hidden pixels than known mask.
    """
    errors = [(torch.where(mask == 1, 0.0, restored[method] - x) ** 2).flatten(1).sum(dim=1)
              for method in ("neighbours", "known mask")]
    return {"hidden": (1 - mask).mean().item(),
            "psnr hidden": {name: psnr(y, x, 1 - mask) for name, y in restored.items()},
            "psnr all": {name: psnr(y, x, torch.ones_like(mask)) for name, y in restored.items()},
            "neighbours win": (errors[0] < errors[1]).float().mean().item()}


def restore_in_parts(args, G, y, mask, lam, label):
    """G(z*) for any number of pictures y, CHUNK rows of z at a time; shows its progress."""
    z0 = torch.randn(len(y), args.starts, args.z_dim).to(y.device)
    z0[:, 0] = 0  # the most probable z: as a single start it is better than a random z
    n = max(1, CHUNK // args.starts)
    show, found = common.progress(label, math.ceil(len(y) / n)), []
    for part in zip(y.split(n), mask.split(n), z0.split(n)):
        found.append(G(restore(G, *part, args.restore_steps, args.restore_lr, lam)[0]))
        show(len(found))
    return torch.cat(found)


def restore_damage(args, G, x, masks):
    """For each mask: measure(), and pictures by method. Hidden pixels: -1, in figures blue."""
    results, blue = {}, torch.tensor([-1.0, -0.5, 0.5], device=x.device).view(3, 1, 1)
    for name, make in masks.items():
        mask = make(len(x), x.shape[3], torch.Generator().manual_seed(args.seed)).to(x.device)
        y, everywhere = torch.where(mask == 1, x, -1.0), torch.ones_like(mask)
        blind = restore_in_parts(args, G, y, everywhere, args.lam, f"{name}, blind")
        known = restore_in_parts(args, G, y, mask, args.lam, f"{name}, known mask")
        pictures = {"damaged": y, "neighbours": neighbours(y, mask), "blind": blind,
                    "known mask": torch.where(mask == 1, y, known)}
        shown = pictures | {"damaged": torch.where(mask == 1, y, blue)}
        results[name] = measure(x, pictures, mask) | {"pictures": shown}
    return results


def restore_noise(args, G, x):
    """The same for normal noise, whose variance is added to λ. Baseline: the mean of 3x3 pixels."""
    results, everywhere = {}, torch.ones_like(x[:, :1])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(args.seed)).to(x.device)
    for std in (level / 10 for level in range(11)):
        y, lam = x + std * noise, args.lam + std ** 2
        pictures = {"noisy": y, "3x3 mean": F.avg_pool2d(y, 3, 1, 1, count_include_pad=False),
                    "G": restore_in_parts(args, G, y, everywhere, lam, f"noise {std}")}
        psnrs = {method: psnr(y, x, everywhere) for method, y in pictures.items()}
        results[std] = {"psnr all": psnrs, "pictures": pictures}
    return results


# --- your own photo ----------------------------------------------------------------------------

def read_mask(file, height, width):
    """[1, height, width], 1 = seen, 0 = hidden, from a picture in which hidden pixels are white."""
    mask = (TF.to_tensor(common.read_picture(file, "L", "black")) < 0.5).float()
    if mask.shape[1:] != (height, width) or mask.mean() in (0, 1):
        raise ValueError(f"{file} is {mask.shape[2]}x{mask.shape[1]}, {1 - mask.mean():.0%} white: "
                         f"a mask is {width}x{height}, and white where the picture is hidden")
    return mask


def own_picture(args, c, side):
    """--image and --mask in the form of the data: x [1, C, side, side], mask [1, 1, side, side].

    x is in [-1, 1]. In colour: the middle square. In grey: a digit as in MNIST, its longer side 20
    pixels of 28, its centre of mass in the middle. Raises ValueError if there is none.
    """
    x = TF.to_tensor(common.read_picture(args.image, "RGB" if c == 3 else "L"))
    hidden = 1 - read_mask(args.mask, *x.shape[1:]) if args.mask else torch.zeros_like(x[:1])
    shape = [math.ceil(256 * n / max(x.shape)) for n in x.shape[1:]]  # fast, and enough for G
    x, hidden = (TF.resize(a, shape, antialias=True) for a in (x * (1 - hidden), hidden))
    mask = (hidden < 0.1).float()  # seen: at least nine tenths of a pixel
    x = neighbours((x / (1 - hidden).clamp(min=0.1))[None], mask[None])[0]  # now nothing is hidden
    centre, size = [n / 2 for n in shape], min(shape)
    if c == 1:
        x = find_digit(args, x, mask)
        pixels, weights, ink = x[0].nonzero() + 0.5, x[x > 0], (x[0] > 0.5).nonzero()
        size = math.ceil(1.4 * (1 + (ink.amax(0) - ink.amin(0)).max().item()))
        # in MNIST the centre of mass lies half a pixel of 28 below and right of the middle
        centre = (weights @ pixels / weights.sum() - size / 56).tolist()
    top, left = (round(at - size / 2) for at in centre)
    x, hidden = (TF.resized_crop(a, top, left, size, size, [side, side], antialias=True)
                 for a in (x, 1 - mask))  # beyond the border: 0, and not hidden
    seen = hidden[None] < 0.1
    if not seen.any():
        raise ValueError(f"{args.mask} hides all that G would see of {args.image}")
    return torch.where(seen, 2 * x - 1, -1.0), seen.float()


def find_digit(args, x, mask):
    """The ink of the digit in a grey photo x [1, H, W]: 0 to 1, and 0 elsewhere and where hidden.
    Raises ValueError if there is no digit, or if it is cut off."""
    width = min(x.shape[1:]) // 8 * 2 + 1  # of a square around each pixel, wider than any stroke
    mean = F.avg_pool2d(x, width, 1, width // 2, count_include_pad=False)
    if ((x - mean) ** 3).sum() > 0:  # ink is rare, so it is far from the mean: here it is light
        x = 1 - x
    # a closing: the lightest pixel around, then the darkest of these. Shadows stay, strokes vanish.
    light = F.max_pool2d(x, width, 1, width // 2)
    paper = -F.max_pool2d(-light, width, 1, width // 2)
    missing = mask * (paper - x)  # the light that ink absorbs
    if missing.quantile(0.995) < 0.05 or mask.mean() < 0.2:  # the grain of a photo takes 0.02
        raise ValueError(f"{args.image} shows no digit" if not args.mask else f"{args.mask} hides "
                         "all ink: white is restored, black is not; is it inverted?")
    dark = missing / paper.clamp(min=1e-6)
    pen = dark.quantile(0.995)  # of the pixels: half a percent of the photo, or more, is ink
    ink = (2 * dark / pen - 0.5).clamp(0, 1)  # 0 below a quarter of the pen: removes ruled lines
    # the digit: all strokes connected to the most ink, across gaps of 6 pixels and hidden pixels
    stroke = ink > 0.5
    around = stroke * F.avg_pool2d(stroke.float(), width, 1, width // 2)
    digit, grown = stroke, around == around.max()
    while not torch.equal(digit, grown):
        digit, grown = grown, (F.max_pool2d(grown.float(), 13, 1, 6) > 0) & (stroke | (mask == 0))
    digit = digit & stroke
    if digit[:, [0, -1]].any() or digit[:, :, [0, -1]].any():
        raise ValueError(f"ink touches the border of {args.image}: leave paper around the digit")
    return ink * F.max_pool2d(digit.float(), 5, 1, 2)  # with its soft edges


# --- figures -----------------------------------------------------------------------------------

TITLES = {"damaged": "damaged (hidden: blue)", "neighbours": "mean of the neighbours", "blind":
          "G, blind: fits all pixels", "known mask": "G with known mask"}


def figure(file, title, x, results, key):
    """For each of the results a row, in the order of the tables: 16 originals, then each method."""
    show = lambda y: common.panel(common.to_uint8(y[:16]), 4)
    rows = [(label, [("original\n", show(x))] + [
        (f"{TITLES.get(method, method)}\nPSNR {dB:.1f} dB", show(result["pictures"][method]))
        for method, dB in result[key].items()]) for label, result in results.items()]
    common.save_panels(file, rows, title, size=2.2)


def own_figure(args, pictures):
    """own.png: the photo, the part of it that G gets, and how the methods restore it."""
    photo = common.read_picture(args.image)
    photo.thumbnail((200, 200))  # fewer pixels than a panel has, or its frame would be lost
    common.save_panels(args.out / "own.png", [("", [
        ("your photo", common.panel(TF.pil_to_tensor(photo)[None])),
        *((TITLES[name], common.panel(common.to_uint8(y))) for name, y in pictures.items()
          if args.mask or name in ("damaged", "blind"))])])


# --- main --------------------------------------------------------------------------------------

def parse_args(argv=None):
    p, whole, above_0 = common.parser(__doc__, __file__), common.number(int, 1), \
        common.number(float, above=0)
    g = p.add_argument_group("the generator, trained once, saved in generator.pt")
    g.add_argument("--z-dim", type=whole, default=128, help="dimensions of z")
    g.add_argument("--steps", type=whole, default=2000, help="steps of G and D")
    g.add_argument("--batch", type=common.number(int, 2), default=64, help="pictures in a batch")
    g.add_argument("--generator", type=expanduser, help="a generator.pt of 04 or 05 to use")
    g = p.add_argument_group("restoration")
    g.add_argument("--mask", type=expanduser, help="picture: its white pixels are hidden")
    g.add_argument("--image", type=expanduser, help="restore this photo; without --mask: blind")
    g.add_argument("--starts", type=whole, default=1, help="1: z = 0; more: also random z")
    g.add_argument("--restore-steps", type=whole, default=100, help="steps from each start")
    g.add_argument("--restore-lr", type=above_0, default=0.2, help="learning rate of z, falls to 0")
    g.add_argument("--lam", type=common.number(float, 0), default=0.3, help="λ, weight of ‖z‖²")
    p.set_defaults(n_test=N_TEST, n_noise=N_NOISE, n_samples=N_SAMPLES)
    return common.parse(p, argv, quick=dict(data="digits", steps=10, restore_steps=10, n_test=16,
                                            n_noise=8, n_samples=1000))


def load_or_train(run, args, images):
    """G: from --generator, or from generator.pt if an earlier run saved it there, else trained."""
    torch.manual_seed(args.seed)
    c, side = images.x.shape[1:3]
    G, D = (net.to(run.device) for net in (generator(args.z_dim, c, side), discriminator(c, side)))
    fits = {"shape": str([c, side, side]), "z_dim": str(args.z_dim)}
    settings = fits | {"data": images.name} | {  # these, and nothing else, decide the weights
        name: str(getattr(args, name)) for name in ("seed", "steps", "batch", "training_pictures")}
    file = args.generator or args.out / "generator.pt"
    if args.generator or file.exists():
        print(f"G is loaded from {file}")
        saved = common.load_saved(file, fits if args.generator else settings, ["G"])
    else:
        for name in run.each(["generator"]):  # each() leaves out what --resume finds finished
            run.done[name] = train_generator(run, args, G, D, images)
        saved = {"settings": settings, "G": run.done["generator"]}
        common.save(saved, file)
    G.load_state_dict(saved["G"])
    return G.eval().requires_grad_(False)


def print_tables(name, results, noise):
    """PSNR by damage, on hidden and on all pixels; by strength of the noise."""
    def table(head, results, key, *more):
        methods = next(iter(results.values()))[key]
        common.print_table([head, *methods, *more], [
            [str(row), *(f"{result[key][method]:.1f}" for method in methods),
             *(f"{result[column]:.3f}" for column in more)] for row, result in results.items()])

    table(f"{name}: psnr hidden", results, "psnr hidden", "hidden", "neighbours win")
    table("psnr all", results, "psnr all")
    if noise:
        table("psnr, noise of", noise, "psnr all")


def main(argv=None):
    args = parse_args(argv)
    run = common.Run(args)
    images = common.load_images(args, run.device)
    try:  # before the training, so that a wrong file is refused at once
        if args.image:
            x, mask = own_picture(args, *images.x.shape[1:3])
        elif args.mask:
            mask = read_mask(args.mask, *images.x.shape[2:])
    except ValueError as e:
        common.fail(str(e))
    masks = MASKS if not (args.image or args.mask) else {
        "own": lambda n, side, rng: mask.expand(n, 1, side, side)}
    G = load_or_train(run, args, images)

    torch.manual_seed(args.seed)
    z = torch.randn(args.n_samples, args.z_dim).to(run.device)
    samples = torch.cat([common.to_uint8(G(part)) for part in z.split(1000)])
    common.save(samples.cpu(), args.out / "samples.pt")
    if args.image:
        return own_figure(args, restore_damage(args, G, x.to(run.device), masks)["own"]["pictures"])
    x = common.to_float(common.load_images(args, run.device, train=False).x[:args.n_test])
    title = f"Restoration on {images.name}, seed {args.seed}, PSNR"
    results, noise = restore_damage(args, G, x, masks), {}
    figure(args.out / "restored.png", f"{title} on hidden pixels", x, results, "psnr hidden")
    if not args.mask:
        noise = restore_noise(args, G, x[:args.n_noise])
        figure(args.out / "noise.png", f"{title} on all pixels; noise: standard deviation",
               x[:args.n_noise], {f"noise {s}": noise[s] for s in (0.2, 0.6, 1.0)}, "psnr all")
    print_tables(images.name, results, noise)


if __name__ == "__main__":
    main()
