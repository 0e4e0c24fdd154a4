r"""05 - Restoration: repair a damaged picture with a trained generator G.

Papers   Yeh et al. 2017, arXiv:1607.07539 (the pixels that were seen choose z);
         Bora et al. 2017, arXiv:1703.03208 (min ‖A G(z) - y‖² + λ ‖z‖²)
Idea     z* = argmin_z ‖m (G(z) - y)‖² + λ ‖z‖², m is 1 where y was seen
                                                                   -> restore()
         If y = G(z) + noise of variance λ, z* is the most probable z given y.
         The repaired picture is m y + (1 - m) G(z*).
         Blind, as coursework does it: m = 1 everywhere, so that G is asked to
         draw the damage too.
See      restored.png: six kinds of damage and their repair. noise.png: the same
         for normal noise. own.png alone if --image is given. The next run takes
         G from generator.pt. Printed: PSNR (peak signal-to-noise ratio, high is
         good). On the pixels of a hidden square on MNIST it is 12.3 dB, blind
         8.4, and 10.4 if they are filled with the mean of their neighbours.
Differs  λ ‖z‖² in place of Yeh et al.'s penalty log(1 - D(G(z))); all seen
         pixels weigh the same; a plain paste, no Poisson blending; the search
         starts from the best of 2,000 random z.
Try      --lam 0.03: do the repaired pictures gain or lose? Predict, then run.
Run      python 05_restoration.py
         python 05_restoration.py --image photo.jpg --mask scribble.png
"""

import math
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import functional as TF

import common

LR_D, LR_G, ADAM_BETAS = 5e-4, 2e-3, (0.0, 0.9)
SMALL = 1024                     # numbers in a picture up to which D is fully connected
HIDDEN_D = [512, 512]            # units of its layers
SHOTS = (0.05, 0.2, 0.5, 1.0)    # shares of the training after which process.png is written
N_TEST, N_NOISE = 200, 60        # test pictures for each mask, and for each level of noise
N_POOL = 2000                    # random z; those whose pictures fit y best are the starts
N_SAMPLES = 10_000               # pictures in samples.pt
CHUNK = 125                      # rows of z in one batch: 500 do not fit into a CPU's cache


# --- the idea ----------------------------------------------------------------------------------

def seen(mask, *pictures):
    """Where the mask is 1, as booleans of its shape that broadcast with the pictures [N, C, H, W].

    mask: [N, 1, H, W] or [N, C, H, W], of any type, bool too. Raises ValueError if the pictures
    differ in shape, or if the mask has not their four dimensions, each of the same size or 1.
    """
    shape = pictures[0].shape
    if (any(x.shape != shape for x in pictures) or mask.ndim != len(shape)
            or any(m not in (1, size) for m, size in zip(mask.shape, shape))):
        shapes = [tuple(x.shape) for x in pictures]
        raise ValueError(f"a mask {tuple(mask.shape)} does not fit pictures {shapes}")
    return mask == 1


def misfit(G, z, y, mask):
    """‖m (G(z) - y)‖² of each picture, [B]: the sum over channels and pixels that were seen.

    z: [B, d]; y: [B, C, H, W]; mask: as in seen(). What y holds where the mask is not 1, even nan,
    changes neither the value nor its gradient in z. Raises ValueError if the sizes do not fit.
    """
    x = G(z)
    error = torch.where(seen(mask, x, y), x - y, 0.0)  # 0 times nan would be nan
    return (error ** 2).flatten(1).sum(dim=1)


def restore(G, y, mask, z0, steps, lr, lam):
    """z* = argmin_z ‖m (G(z) - y)‖² + λ ‖z‖² by Adam, from R starts for each of N pictures.

    y: [N, C, H, W] in [-1, 1]; mask: [N, 1, H, W] or [N, C, H, W] of any type, 1 = seen, 0 =
    hidden: what y holds there, even nan, does not matter; z0: [N, R, d]; lam: λ, the variance of
    one pixel's error, G's and that of noise. They may have any memory layout. The squares are
    summed, over the seen pixels of all channels and over the numbers of z. Each of the N R rows of
    z moves as if it were alone. The learning rate falls from lr to 0 along a cosine. Returns z
    [N, d] of the start that ends lowest for each picture, and the objective [N, R] at the end of
    all. With 0 steps the end is the start. A start that ends at nan loses to all others, even to an
    infinite objective. Raises ValueError if the sizes do not fit, or if G is in training mode, in
    which batch norm would let the pictures of a batch change each other.
    """
    if any(module.training for module in G.modules()):
        raise ValueError("G must be in evaluation mode: call G.eval()")
    n, r, d = z0.shape
    z = z0.detach().clone().reshape(n * r, d).requires_grad_()  # Adam moves it in place
    y, mask = (a.repeat_interleave(r, dim=0) for a in (y, mask))
    opt = torch.optim.Adam([z], lr=lr, betas=(0.9, 0.9))  # beta2 = 0.999 needs twice the steps
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)

    def objective():
        return misfit(G, z, y, mask) + lam * (z ** 2).sum(dim=1)

    for _ in range(steps):
        opt.zero_grad()
        objective().sum().backward(inputs=[z])  # rows are independent: each gets its own gradient
        opt.step()
        rate.step()
    with torch.no_grad():
        objectives = objective().reshape(n, r)
    best = objectives.nan_to_num(nan=math.inf).argmin(dim=1)
    return z.detach().reshape(n, r, d)[torch.arange(n), best], objectives


# --- the damage --------------------------------------------------------------------------------
# Masks for pictures of side x side pixels; rng: a torch.Generator.

def pepper(n, side, rng):
    """A mask [n, 1, side, side] of floats, 1 = seen, 0 = hidden: it hides 30 % of the pixels.

    These are exactly round(0.3 side²), at random places, other ones in each picture.
    """
    order = torch.rand(n, side * side, generator=rng).argsort(dim=1)
    return (order >= round(0.3 * side * side)).float().view(n, 1, side, side)


def crosswalk(n, side, rng):
    """A mask [n, 1, side, side], 1 = seen, 0 = hidden: it hides the second, fourth, ... row."""
    rows = (torch.arange(side) % 2 == 0).float()
    return rows.view(1, 1, side, 1).expand(n, 1, side, side).clone()


def square(n, side, rng):
    """A mask [n, 1, side, side], 1 = seen, 0 = hidden: it hides a square inside each picture.

    Its width is round(2/7 side), 8 pixels of 28. All places are equally likely, up to the corners.
    """
    width = round(side * 2 / 7)
    corner = torch.randint(side - width + 1, (n, 2, 1), generator=rng)
    line = torch.arange(side)
    inside = (line >= corner) & (line < corner + width)                  # [n, 2, side]
    return (~(inside[:, 0, :, None] & inside[:, 1, None, :])).float()[:, None]


def holes(n, side, rng, count):
    """A mask [n, 1, side, side], 1 = seen, 0 = hidden: it hides `count` discs in each picture.

    Their diameter is a quarter of the side, 7 pixels of 28. They lie inside the picture, at random
    and independent places, so they may overlap.
    """
    radius = side / 8
    centre = radius + (side - 2 * radius) * torch.rand(n, count, 2, 1, 1, generator=rng)
    line = torch.arange(side) + 0.5
    distance2 = (line[:, None] - centre[:, :, 0]) ** 2 + (line - centre[:, :, 1]) ** 2
    return (distance2 > radius ** 2).all(dim=1).float()[:, None]


MASKS = {"pepper": pepper, "square": square, "crosswalk": crosswalk,
         "1 hole": partial(holes, count=1), "2 holes": partial(holes, count=2),
         "3 holes": partial(holes, count=3)}


# --- the baseline ------------------------------------------------------------------------------

def neighbours(y, mask):
    """y [N, C, H, W] whose hidden pixels are filled with means of their neighbours, from the rim
    of the hole inwards.

    mask: as in seen(). In each round every hidden pixel that has neighbours with a value, among the
    eight around it, gets the mean of these; the values of a round count from the next round on.
    What was seen stays as it is, and what y holds where it is hidden, even nan, does not matter.
    Raises ValueError if nothing was seen of a picture, or the sizes do not fit.
    """
    known = seen(mask, y)
    if not known.flatten(1).any(dim=1).all():
        raise ValueError("a picture of which nothing was seen has no seen neighbours")
    known, filled = known.to(y), torch.where(known, y, 0.0)
    while not known.all():
        count = F.avg_pool2d(known, 3, stride=1, padding=1)
        means = F.avg_pool2d(filled, 3, stride=1, padding=1) / count.clamp(min=1e-6)
        new = (known == 0) & (count > 0)
        filled, known = torch.where(new, means, filled), torch.where(new, 1.0, known)
    return filled


# --- model -------------------------------------------------------------------------------------

def generator(d_z, c, side):
    """[B, d_z] -> pictures [B, C, side, side] in (-1, 1). Weights start as draws of N(0, 0.02²).

    Convolutions, because the pictures of chapter 02's fully connected layers, though better drawn,
    change along few directions of z: many test digits are not among them.
    """
    widths = [32 * 2 ** i for i in range(max(1, int(math.log2(side / 4))))]
    small = side // 2 ** len(widths)  # side of the smallest map, 4 to 7 pixels
    layers = [nn.Linear(d_z, widths[-1] * small ** 2), nn.Unflatten(1, (widths[-1], small, small))]
    for wide, narrow in pairwise([*widths[::-1], c]):
        layers += [nn.BatchNorm2d(wide), nn.ReLU(),
                   nn.ConvTranspose2d(wide, narrow, kernel_size=4, stride=2, padding=1)]
    for layer in layers:
        if isinstance(layer, (nn.Linear, nn.ConvTranspose2d)):  # as in DCGAN
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    # channels_last: draws faster on the CPU
    return nn.Sequential(*layers, nn.Tanh()).to(memory_format=torch.channels_last)


def discriminator(c, side):
    """[B, C, side, side] -> logits [B]. No batch norm.

    Up to SMALL numbers in a picture: fully connected layers, else convolutions.
    """
    if c * side ** 2 <= SMALL:
        layers, features = [nn.Flatten()], HIDDEN_D[-1]
        for i, o in pairwise([c * side ** 2, *HIDDEN_D]):
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
    """Trains G against D; returns an average of G's weights, over about a quarter of the steps."""
    lower = min(1.0, (28 / images.x.shape[2]) ** 2)  # LR_G and LR_D are for 28 pixels
    opt_g, opt_d = (torch.optim.Adam(net.parameters(), lr * lower, betas=ADAM_BETAS, fused=True)
                    for net, lr in ((G, LR_G), (D, LR_D)))
    rate_g, rate_d = (common.fading(opt, args.steps) for opt in (opt_g, opt_d))
    average = common.average_of(G, args.steps)
    z_fixed = torch.randn(args.n_samples, args.z_dim).to(run.device)
    batches = run.batches(images, args.batch)

    for _ in run.steps(args.steps, G=G, D=D, average=average, opt_g=opt_g, opt_d=opt_d,
                       rate_g=rate_g, rate_d=rate_d):
        # D descends -E log σ(D(x)) - E log(1 - σ(D(G(z)))), G untouched
        x, _ = next(batches)
        x_fake = G(torch.randn(len(x), args.z_dim, device=run.device))
        real, fake = D(torch.cat([x, x_fake.detach()])).split(len(x))
        loss_d = F.softplus(-real).mean() + F.softplus(fake).mean()
        opt_d.zero_grad()
        loss_d.backward()
        opt_d.step()

        # G descends -E log σ(D(G(z))), D untouched
        loss_g = F.softplus(-D(x_fake)).mean()
        opt_g.zero_grad()
        loss_g.backward(inputs=tuple(G.parameters()))
        opt_g.step()
        average.update_parameters(G)

        rate_d.step()
        rate_g.step()
        run.log(loss_d=loss_d, loss_g=loss_g)
        if run.at(SHOTS):
            common.settle(average, z_fixed[:1000])
            with torch.no_grad():
                run.shoot(average.eval()(z_fixed[:36]))
            average.train()

    common.settle(average, z_fixed)
    return average.module.state_dict()


def trained(run, args, images):
    """G: trained now, unless --generator or generator.pt has it."""
    torch.manual_seed(args.seed)
    c, side = images.x.shape[1:3]
    G, D = (net.to(run.device) for net in (
        generator(args.z_dim, c, side), discriminator(c, side)))
    fits = {"shape": str([c, side, side]), "z_dim": str(args.z_dim)}
    decided = {**fits, "data": images.name, "seed": str(args.seed), "steps": str(args.steps),
               "batch": str(args.batch), "train_stamp": images.stamp}
    path = args.out / "generator.pt"
    if args.generator:  # it may have been trained in any way, and on any data
        kept = common.load_kept(args.generator, ("G",), fits)
    elif path.exists():  # for a picture of one's own, however long it was trained
        kept = common.load_kept(path, ("G",), {**fits, "data": images.name} if args.image
                                else decided)
    else:
        for name in run.each(["generator"]):  # once, or not at all if --resume has it
            run.done[name] = train_generator(run, args, G, D, images)
        kept = {"settings": decided, "G": run.done["generator"]}
        common.save(kept, path)
    G.load_state_dict(kept["G"])
    return G.eval().requires_grad_(False)


# --- measures ----------------------------------------------------------------------------------

def psnr(a, b, where):
    """10 log10(2² / mean (a - b)²) in dB over the pixels where `where` is 1, of all pictures.

    a, b: [N, C, H, W] in [-1, 1]; where: [N, 1, H, W]. The mean is over all pictures at once: a
    black square on black ground is repaired without an error, so its own PSNR would be infinite.
    Where no pixel counts there is none: nan. Raises ValueError if the sizes do not fit.
    """
    squares = (a - b)[seen(where, a, b).expand_as(a)] ** 2
    return (10 * torch.log10(4 / squares.mean())).item()


def share_of_wins(a, b, x, where):
    """Share of the pictures that a [N, C, H, W] comes nearer to x than b, where `where` is 1."""
    errors = [(torch.where(seen(where, c, x), c - x, 0.0) ** 2).flatten(1).sum(dim=1)
              for c in (a, b)]
    return (errors[0] < errors[1]).float().mean().item()


def best_starts(pool, y, mask, lam, r):
    """The r of the pool's z with the lowest objective of restore(), for each y: [N, r, d].

    pool: (z [P, d], their pictures [P, C, H, W]). With ‖m (x - y)‖² = m·x² - 2 m y·x + ‖m y‖²
    two matrix products compare every x with every y; the last term is the same for all x.
    """
    z, x = pool
    m, y, x = mask.expand_as(y).flatten(1), y.flatten(1), x.flatten(1)
    objective = m @ (x ** 2).T - 2 * torch.where(m == 1, y, 0.0) @ x.T + lam * (z ** 2).sum(dim=1)
    return z[objective.topk(r, largest=False).indices]


def repair(args, G, pool, y, mask, lam, label):
    """G(z*) for pictures y [N, C, H, W], CHUNK rows of z at a time."""
    at_once = max(1, CHUNK // args.starts)
    show = common.progress(label, len(y))
    drawn = []
    for part, mask_part in zip(y.split(at_once), mask.split(at_once)):
        z0 = best_starts(pool, part, mask_part, lam, args.starts)
        z, _ = restore(G, part, mask_part, z0, args.restore_steps, args.restore_lr, lam)
        drawn.append(G(z))
        show(sum(map(len, drawn)))
    return torch.cat(drawn)


def repair_by_all(args, G, pool, y, mask, label):
    """What each method makes of y, whose hidden pixels are black."""
    blind = repair(args, G, pool, y, torch.ones_like(mask), args.lam, f"{label}, blind")
    repaired = repair(args, G, pool, y, mask, args.lam, f"{label}, known mask")
    return {"damaged": y, "neighbours": neighbours(y, mask), "blind": blind,
            "known mask": torch.where(mask == 1, y, repaired)}


def mask_study(args, G, pool, x, masks):
    """For each kind of damage the pictures of all methods, and PSNR on hidden and on all pixels.

    lost: share of the pictures whose hidden pixels "neighbours" repairs better than "known mask".
    """
    results = {}
    for name, make in masks.items():
        rng = torch.Generator().manual_seed(args.seed)
        mask = make(len(x), x.shape[3], rng).to(x.device)
        restored = repair_by_all(args, G, pool, torch.where(mask == 1, x, -1.0), mask, name)
        results[name] = {
            "hidden": 1 - mask.mean().item(), "mask": mask, "pictures": restored,
            "psnr hidden": {k: psnr(v, x, 1 - mask) for k, v in restored.items()},
            "psnr all": {k: psnr(v, x, torch.ones_like(mask)) for k, v in restored.items()},
            "lost": share_of_wins(restored["neighbours"], restored["known mask"], x, 1 - mask)}
    return results


def noise_study(args, G, pool, x):
    """Pictures and PSNR for normal noise of standard deviation 0, 0.1, ..., 1; baseline: 3x3 mean.

    λ + std², the variance of what G and the noise get wrong in one pixel, takes the place of λ.
    """
    results = {}
    everywhere = torch.ones_like(x[:, :1])
    for level in range(11):
        std = level / 10
        rng = torch.Generator().manual_seed(args.seed)
        y = x + std * torch.randn(x.shape, generator=rng).to(x.device)
        restored = {"noisy": y, "3x3 mean": F.avg_pool2d(y, 3, 1, 1, count_include_pad=False),
                    "G": repair(args, G, pool, y, everywhere, args.lam + std ** 2, f"noise {std}")}
        results[std] = {"pictures": restored,
                        "psnr": {k: psnr(v, x, everywhere) for k, v in restored.items()}}
    return results


# --- figures -----------------------------------------------------------------------------------

def first(x):
    """The first 16 pictures as a panel."""
    return common.panel(common.to_uint8(x[:16]), 4)


def mask_figure(args, name, x, results):
    """restored.png: a row for each kind of damage."""
    rows = []
    for damage, result in results.items():
        y = result["pictures"]["damaged"]
        blue = torch.tensor([-1.0, -0.5, 0.5], device=y.device).view(3, 1, 1)
        shown = result["pictures"] | {"damaged": torch.where(result["mask"] == 1, y, blue)}
        rows.append((damage, [("original\n", first(x)), *(
            (f"{method}\n{result['psnr hidden'][method]:.1f} dB", first(pictures))
            for method, pictures in shown.items())]))
    common.save_panels(args.out / "restored.png", rows, f"Restoration on {name}, seed {args.seed}: "
                       "PSNR on hidden pixels (blue)", size=2.2)


def noise_figure(args, name, results):
    """noise.png: PSNR against the noise, and a row of pictures for three levels of it."""
    def draw(ax):
        for method in results[0.0]["psnr"]:
            psnrs = [result["psnr"][method] for result in results.values()]
            ax.plot(list(results), psnrs, label=method)
        ax.set(xlabel="standard deviation of the noise", ylabel="PSNR in dB", ylim=(0, 40))
        ax.legend(loc="upper left", bbox_to_anchor=(1.05, 1)).set_in_layout(False)

    rows = [("", [("", draw)])] + [
        (f"noise {std}", [(f"{method}\n{results[std]['psnr'][method]:.1f} dB", first(pictures))
                          for method, pictures in results[std]["pictures"].items()])
        for std in (0.2, 0.6, 1.0)]
    common.save_panels(args.out / "noise.png", rows, f"Restoration on {name}, seed {args.seed}",
                       size=2.2)


def own_figure(args, G, pool, x, mask):
    """own.png: the photo, the same as G sees it and, with a --mask, what it hides; the repairs."""
    photo = common.open_picture(args.image, "RGB", "white")
    photo.thumbnail((600, 600))  # a panel has fewer pixels
    as_seen = "as G sees it" if mask.all() else "as G sees it,\nhidden: black"
    pictures = {"photo": TF.pil_to_tensor(photo)[None], as_seen: common.to_uint8(x)}
    if mask.all():  # no --mask, or one that hides nothing
        made = {"blind": repair(args, G, pool, x, mask, args.lam, "your picture, blind")}
    else:
        made = {"hidden": 1 - 2 * mask} | repair_by_all(args, G, pool, x, mask, "your picture")
        del made["damaged"]
    pictures |= {name: common.to_uint8(picture) for name, picture in made.items()}
    common.save_panels(args.out / "own.png", [("", [
        (name, common.panel(picture)) for name, picture in pictures.items()])])


# --- main --------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = common.parser(__doc__, __file__)
    g = p.add_argument_group("the generator, trained once and kept in generator.pt")
    g.add_argument("--z-dim", type=common.number(int, 1), default=128, help="length of z")
    g.add_argument("--steps", type=common.number(int, 1), default=2000, help="steps of G and D")
    g.add_argument("--batch", type=common.number(int, 1), default=64, help="pictures in a batch")
    g.add_argument("--generator", type=Path, help="a kept generator.pt to use, of 04 or of this")
    g = p.add_argument_group("restoration")
    g.add_argument("--mask", type=Path, help="picture whose white pixels are hidden")
    g.add_argument("--image", type=Path, help="repair this picture, and no test pictures")
    g.add_argument("--starts", type=common.number(int, 1), default=1,
                   help="starts for each picture")
    g.add_argument("--restore-steps", type=common.number(int, 1), default=100,
                   help="for each start")
    g.add_argument("--restore-lr", type=common.number(float, above=0), default=0.2,
                   help="Adam's rate for z, falls to 0")
    g.add_argument("--lam", type=common.number(float, 0), default=0.3,
                   help="λ: variance of one pixel's error, in [-1, 1] units")
    p.set_defaults(n_test=N_TEST, n_noise=N_NOISE, n_pool=N_POOL, n_samples=N_SAMPLES)
    return common.parse(p, argv, quick=dict(
        data="digits", steps=10, restore_steps=10, n_test=16, n_noise=8, n_pool=100,
        n_samples=1000))


def check(args, images):
    """Ends the run if the flags do not fit the data."""
    common.check_side(images)
    if args.starts > args.n_pool:
        common.fail(f"--starts {args.starts}: there are {args.n_pool} to choose from")


def masks_to_study(args, side):
    """All kinds of damage, or the reader's --mask for every test picture."""
    if not args.mask:
        return MASKS
    mask = common.read_mask(args.mask, side, side)
    return {"mask": lambda n, side, rng: mask.expand(n, 1, side, side)}


def study(args, G, pool, x, masks, name):
    """Repairs test pictures x: of every kind of damage, and of noise if there is no --mask."""
    results = mask_study(args, G, pool, x, masks)
    mask_figure(args, name, x, results)
    noise = {}
    if not args.mask:
        noise = noise_study(args, G, pool, x[:args.n_noise])
        noise_figure(args, name, noise)
    print_tables(name, results, noise)


def print_tables(name, results, noise):
    """PSNR by damage, hidden pixels alone and all; by strength of the noise."""
    methods = ["damaged", "neighbours", "blind", "known mask"]
    common.print_table([f"{name}: psnr hidden", "hidden", *methods, "lost"], [
        [damage, f"{result['hidden']:.3f}", *(f"{result['psnr hidden'][m]:.1f}" for m in methods),
         f"{result['lost']:.2f}"] for damage, result in results.items()])
    common.print_table(["psnr all", *methods], [
        [damage, *(f"{result['psnr all'][m]:.1f}" for m in methods)]
        for damage, result in results.items()])
    if noise:
        methods = ["noisy", "3x3 mean", "G"]
        common.print_table(["psnr, noise of", *methods], [
            [f"{std:.1f}", *(f"{result['psnr'][m]:.1f}" for m in methods)]
            for std, result in noise.items()])


def main(argv=None):
    args = parse_args(argv)
    with common.Run(args) as run:
        images = common.load_images(args, run.device)
        check(args, images)
        c, side = images.x.shape[1:3]
        if args.image:  # read now: a wrong file is refused before the training
            own = common.own_picture(args, c, side)
        else:
            masks = masks_to_study(args, side)
        G = trained(run, args, images)

        torch.manual_seed(args.seed)
        z = torch.randn(args.n_samples, args.z_dim).to(run.device)
        samples = torch.cat([G(part) for part in z.split(1000)])
        common.save(common.to_uint8(samples).cpu(), args.out / "samples.pt")
        pool = z[:args.n_pool], samples[:args.n_pool]
        if args.image:
            own_figure(args, G, pool, *(a.to(run.device) for a in own))
        else:
            test = common.load_images(args, run.device, train=False)
            study(args, G, pool, common.to_float(test.x[:args.n_test]), masks, images.name)


if __name__ == "__main__":
    common.as_script(main)
