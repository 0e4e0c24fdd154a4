r"""04 - Inversion: given a picture x, find the z from which a trained generator draws it.

Papers   Creswell, Bharath 2016, arXiv:1611.05644 (inversion by gradient descent); Lipton, Tripathi
         2017, arXiv:1702.04782 (a generator's own pictures can be found again); Zhu et al. 2016,
         arXiv:1609.03552 (encoder first, then optimisation).
Idea     z* = argmin_z ‖G(z) - x‖² from R starts, the best start kept for each picture   -> invert()
         E descends mean (E(G(z)) - z)² + mean (G(E(x)) - x)²                      -> encoder_loss()
         Hybrid: the only start is E(x), with as many steps as all the random starts together.
See      inversion.png: targets above what was found; starts.png: the error of every start;
         worst.png: what G cannot draw; between.png: from one test picture to another; samples.pt,
         log.csv, and generator.pt, which the next run takes instead of training.
         On MNIST, 240 steps for each picture, mean squared errors: of 200 pictures of G the hybrid
         finds 196 again, three random starts of 80 steps 1. 400 test digits: 0.051 from random
         starts, 0.058 by the encoder, 0.0071 by the hybrid (0.001 for a 1, 0.011 for a 6). So most
         of what random starts leave is the search's fault, not G's: with 240 steps each they find
         98 of the 200, and have 0.013 on test digits. The hybrid's z has norm 9.4, draws of N(0, I)
         have 8.0: G is made to draw what it hardly ever would.
Time     3 to 4.5 min on 2 CPU cores, 1.6 min with the kept generator.
Differs  Adam with beta2 = 0.9 for z; the generator is chapter 02's nonsaturating, 1,000 steps.
Run      python 04_inversion.py
         python 04_inversion.py --starts 5 --invert-steps 200
"""

import math
import time

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.utils import draw_bounding_boxes

import common

LR, ADAM_BETAS = 4e-3, (0.0, 0.999)  # of G and D; E has the rate, and the usual betas
FOUND = 0.001                    # mean squared error below which a picture counts as found again
N_SELF, N_TEST = 200, 400        # pictures of G, and of the test set, that are inverted
N_SAMPLES = 10_000               # pictures in samples.pt
CHUNK = 125                      # rows of z in one batch: 500 leave the cache, 1.1 times the time


# --- the idea ----------------------------------------------------------------------------------

def squared_error(a, b):
    """Mean of (a - b)² over all but the first dimension, [B]: each picture has its own."""
    return ((a - b) ** 2).flatten(1).mean(dim=1)


def invert(G, x, z0, steps, lr):
    """z* = argmin_z ‖G(z) - x‖² by Adam, from R starts for each of N pictures, all in one batch.

    x: [N, C, H, W]; z0: [N, R, d]. The rate falls from lr to 0 along a cosine. Returns z [N, d] of
    the start that ends best for each picture, and the errors [N, R, steps + 1] on the way of every
    start, mean squares in the units of x. G's weights are left alone. Raises ValueError if G is in
    training mode: batch norm would let the pictures of a batch change each other.
    """
    if any(module.training for module in G.modules()):
        raise ValueError("G must be in evaluation mode: call G.eval()")
    n, r, d = z0.shape
    z = z0.detach().clone().view(n * r, d).requires_grad_()  # Adam moves it in place
    target = x.repeat_interleave(r, dim=0)
    opt = torch.optim.Adam([z], lr=lr, betas=(0.9, 0.9))  # 0.999: twice the steps
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    errors = []
    for _ in range(steps):
        error = squared_error(G(z), target)
        opt.zero_grad()
        error.sum().backward(inputs=[z])  # the sum: each row gets the gradient of its own error
        opt.step()
        rate.step()
        errors.append(error.detach())
    with torch.no_grad():
        errors.append(squared_error(G(z), target))
    errors = torch.stack(errors, dim=1).view(n, r, steps + 1)
    best = errors[:, :, -1].argmin(dim=1)
    return z.detach().view(n, r, d)[torch.arange(n), best], errors


def encoder_loss(E, G, x, z):
    """mean (E(G(z)) - z)² + mean (G(E(x)) - x)²: codes of G's pictures, and pixels of real ones.

    x: [B, C, H, W] in [-1, 1]; z: [B, d] drawn from N(0, I). The first term alone never sees a
    real picture; the second alone may leave the region where G draws well. G is not to be trained.
    """
    return F.mse_loss(E(G(z)), z) + F.mse_loss(G(E(x)), x)


# --- model -------------------------------------------------------------------------------------

def channels(side):
    """Channels of the maps, largest map first; side of the smallest, 4 to 7 pixels if side >= 8."""
    halvings = max(1, int(math.log2(side / 4)))
    return [32 * 2 ** i for i in range(halvings)], side // 2 ** halvings


def generator(d_z, c, side):
    """[B, d_z] -> pictures [B, C, side, side] in (-1, 1). Starts with normal weights of 0.02."""
    widths, small = channels(side)
    layers = [nn.Linear(d_z, widths[-1] * small ** 2), nn.Unflatten(1, (widths[-1], small, small))]
    for wide, narrow in zip(widths[::-1], [*widths[-2::-1], c]):
        layers += [nn.BatchNorm2d(wide), nn.ReLU(),
                   nn.ConvTranspose2d(wide, narrow, kernel_size=4, stride=2, padding=1)]
    for layer in layers:
        if isinstance(layer, (nn.Linear, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers, nn.Tanh()).to(memory_format=torch.channels_last)


def discriminator(c, side):
    """[B, C, side, side] -> logits [B]. No batch norm."""
    widths, small = channels(side)
    layers = []
    for i, o in zip([c, *widths], widths):
        layers += [nn.Conv2d(i, o, kernel_size=4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3),
                         nn.Linear(widths[-1] * small ** 2, 1), nn.Flatten(0))


def encoder(d_z, c, side):
    """[B, C, side, side] -> z [B, d_z], no noise."""
    widths, small = channels(side)
    layers = []
    for i, o in zip([c, *widths], widths):
        layers += [nn.Conv2d(i, o, kernel_size=4, stride=2, padding=1),
                   nn.BatchNorm2d(o), nn.SiLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * small ** 2, 512),
                         nn.BatchNorm1d(512), nn.SiLU(), nn.Linear(512, d_z))


# --- measures ----------------------------------------------------------------------------------

def report(x, x_rec, z, z_true, y):
    """Errors of x_rec [N, C, H, W] beside x in [-1, 1] units; with labels y [N] for each class too.

    mse: mean over all pictures; psnr: 10 log10(2² / mse), dB; found: share with an error below
    FOUND; norm: of z [N, d], √d for draws of N(0, I); z error: mean (z - z_true)², 2 for two
    unrelated draws, nan where z_true is None.
    """
    error = squared_error(x, x_rec)
    numbers = {"mse": error.mean().item(), "psnr": 10 * torch.log10(4 / error.mean()).item(),
               "found": (error < FOUND).float().mean().item(), "norm": z.norm(dim=1).mean().item(),
               "z error": math.nan if z_true is None else F.mse_loss(z, z_true).item()}
    if y is not None:
        numbers |= {f"class {k}": error[y == k].mean().item() for k in y.unique().tolist()}
    return numbers


def worst_window(x, x_rec, width):
    """Where G fails most: mean squared error of the worst window, and the row and column it begins.

    x, x_rec: [N, C, H, W]; the window is a square of `width` pixels; returns three tensors [N].
    """
    means = F.avg_pool2d(((x - x_rec) ** 2).mean(dim=1, keepdim=True), width, stride=1)
    value, at = means.flatten(1).max(dim=1)
    return value, at // means.shape[3], at % means.shape[3]


# --- train -------------------------------------------------------------------------------------

def train(args, images, device, saved):
    """Trains G against D, then E against the finished G; returns what generator.pt keeps of it.

    saved: the checkpoint to go on from, or None.
    """
    torch.manual_seed(args.seed)
    c, side = images.x.shape[1:3]
    G, D, E = (net.to(device) for net in (generator(args.z_dim, c, side), discriminator(c, side),
                                          encoder(args.z_dim, c, side)))
    lr = LR * min(1.0, (28 / side) ** 2)  # at 64, two layers more, 02 diverged at 4e-3
    opt_g, opt_d = (torch.optim.Adam(net.parameters(), lr=lr, betas=ADAM_BETAS, fused=True)
                    for net in (G, D))
    opt_e = torch.optim.Adam(E.parameters(), lr=LR, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    rate_g, rate_d = cosine(opt_g, args.steps), cosine(opt_d, args.steps)
    rate_e = cosine(opt_e, args.encoder_steps)
    parts = dict(G=G, D=D, E=E, opt_g=opt_g, opt_d=opt_d, opt_e=opt_e,
                 rate_g=rate_g, rate_d=rate_d, rate_e=rate_e)

    first, log, total = 0, [], args.steps + args.encoder_steps
    if saved:
        first, log = saved["step"], saved["log"]
        common.restore(saved, parts)
    batches = common.batches(images, args.batch, args.seed, first)
    show = common.progress("generator, encoder", total, args.batch, first)

    with common.ctrl_c() as pressed:
        for step in range(first + 1, total + 1):
            x = next(batches)[0]
            z = torch.randn(len(x), args.z_dim, device=device)
            G.train(step <= args.steps)
            if step <= args.steps:
                # D descends -E log σ(D(x)) - E log(1 - σ(D(G(z)))), G untouched
                x_fake = G(z)
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

                rate_d.step()
                rate_g.step()
                losses = {"loss_d": loss_d.item(), "loss_g": loss_g.item()}
            else:
                # E alone descends its errors, of codes and of pixels
                loss_e = encoder_loss(E, G, x, z)
                opt_e.zero_grad()
                loss_e.backward(inputs=tuple(E.parameters()))
                opt_e.step()
                rate_e.step()
                losses = {"loss_e": loss_e.item()}

            common.check_finite(step, **losses)
            show(step, **losses)
            if common.due(step, total, 40) or step == args.steps:
                log.append({"step": step, **losses})
            if common.due(step, total, 10) or pressed():
                common.save_checkpoint(args, parts, step=step, log=log)
            if pressed():
                common.stop(step)

    return {"settings": trained_with(args, images), "log": log, "G": G.state_dict(),
            "E": E.state_dict()}


def trained_with(args, images):
    """What decided the weights in generator.pt, as text."""
    names = ("seed", "z_dim", "steps", "encoder_steps", "batch")
    return {"shape": str(list(images.x.shape[1:])), "data": images.name} \
        | {name: str(getattr(args, name)) for name in names}


# --- invert ------------------------------------------------------------------------------------

def optimise(G, x, z0, steps, lr, label):
    """invert(), CHUNK rows of z at a time."""
    at_once = max(1, CHUNK // z0.shape[1])
    parts = list(zip(x.split(at_once), z0.split(at_once)))
    rows = min(len(x), at_once) * z0.shape[1]
    show = common.progress(label, len(parts), rows * steps)
    found = []
    for i, (targets, starts) in enumerate(parts, start=1):
        found.append(invert(G, targets, starts, steps, lr))
        show(i, error=found[-1][1][:, :, -1].amin(dim=1).mean().item())
    z, errors = zip(*found)
    return torch.cat(z), torch.cat(errors)


def invert_all(args, G, E, x, z_true, y, label):
    """x by three methods: for each z, its picture, the errors of all starts, numbers, seconds.

    hybrid: one start, from the encoder, with as many steps as all the random starts together.
    """
    torch.manual_seed(args.seed)
    z_random = torch.randn(len(x), args.starts, args.z_dim).to(x.device)
    z_encoder = torch.cat([E(part) for part in x.split(CHUNK)])[:, None]
    results = {}
    for method, z0, steps in (("optimisation", z_random, args.invert_steps),
                              ("encoder", z_encoder, 0),
                              ("hybrid", z_encoder, args.starts * args.invert_steps)):
        began = time.monotonic()
        z, errors = optimise(G, x, z0, steps, args.invert_lr, f"{label}, {method}")
        x_rec = torch.cat([G(part) for part in z.split(CHUNK)])
        results[method] = {"z": z, "x_rec": x_rec, "errors": errors,
                           **report(x, x_rec, z, z_true, y), "seconds": time.monotonic() - began}
    return results


# --- figures -----------------------------------------------------------------------------------

def first(x, n):
    """The first n of x, again from the beginning if there are fewer."""
    return x[torch.arange(n, device=x.device) % len(x)]


def above(x, x_rec):
    """Four rows of eight pictures, each above a row of what was found for them, uint8."""
    rows = torch.stack([first(part, 32).unflatten(0, (4, 8)) for part in (x, x_rec)], dim=1)
    return common.to_uint8(rows.flatten(0, 2))


def framed(x, top, left, width):
    """x uint8 [N, C, H, W] in colour, with a red frame around the window of each picture."""
    boxes = torch.stack([left, top, left + width - 1, top + width - 1], dim=1)[:, None].cpu()
    return torch.stack([draw_bounding_boxes(picture, box, colors="red")
                        for picture, box in zip(x.cpu(), boxes)])


def figures(args, name, G, x, y, results, samples):
    """inversion.png, starts.png, worst.png, between.png."""
    title = f"Inversion on {name}, seed {args.seed}"
    common.save_panels(args.out / "inversion.png", [(label, [
        (f"{method}\n{run['psnr']:.1f} dB", common.panel(above(x[label], run["x_rec"])))
        for method, run in methods.items()]) for label, methods in results.items()],
        f"{title}: targets above what was found")

    common.save_panels(args.out / "starts.png", [("", [
        (f"target {i}", lambda ax, i=i: draw_starts(ax, results["test"], i))
        for i in range(min(5, len(x["test"])))])],
        f"{title}: error of every start against the step, random (blue), the encoder's (red)")

    best = results["test"]["hybrid"]  # what is left is G's fault
    details = worst(x["test"], best["x_rec"], y)
    half = (len(details) // 8 + 1) // 2 * 8
    cells = [("samples of G", common.panel(common.to_uint8(samples[:64]))),
             ("worst-drawn details: target,\nand what comes nearest", common.panel(details[:half]))]
    if y is not None:
        maps = error_maps(x["test"], best["x_rec"], y)
        cells += [("(the other classes)", common.panel(details[half:])),
                  ("mean squared error of each\nclass, 0 (black) to 0.1", common.panel(maps, 4))]
    common.save_panels(args.out / "worst.png", [("", cells)], title)

    common.save_panels(args.out / "between.png", [("", [
        ("between the z of two test pictures\n(the ends: what was found)",
         common.panel(common.to_uint8(G(between(best["z"]))), 9)),
        ("between their pixels", common.panel(common.to_uint8(between(x["test"])), 9))])], title)


def between(v):
    """(1 - a) v[i] + a v[i + 1] for a = 0, 1/8, ..., 1, and i = 0, 2, ..., 14: 72 rows."""
    a = torch.linspace(0, 1, 9, device=v.device).view(9, *[1] * (v.ndim - 1))
    ends = first(v, 16).unflatten(0, (8, 2))
    return torch.cat([(1 - a) * one + a * other for one, other in ends])


def draw_starts(ax, methods, i):
    """Error of each start of target i against the step, for both searches, on a log axis."""
    for method, colour in (("optimisation", "C0"), ("hybrid", "C3")):
        for curve in methods[method]["errors"][i].cpu():
            ax.semilogy(curve.numpy(), colour, linewidth=1)
    ax.set(xlabel="step", ylim=(1e-4, 1))  # the same for all targets


def worst(x, x_rec, y):
    """The four pictures of each class whose worst window is worst, beside what was found."""
    width = x.shape[3] // 4
    value, top, left = worst_window(x, x_rec, width)
    groups = [torch.arange(len(x), device=x.device)] if y is None else \
        [(y == k).nonzero()[:, 0] for k in y.unique()]
    chosen = torch.cat([first(group[value[group].argsort(descending=True)], 4)
                        for group in groups])
    both = [framed(common.to_uint8(part[chosen]), top[chosen], left[chosen], width)
            for part in (x, x_rec)]
    return torch.stack(both, dim=1).flatten(0, 1)


def error_maps(x, x_rec, y):
    """Mean squared error of each pixel for each class, 0 to 0.1 as black to white."""
    squares = ((x - x_rec) ** 2).mean(dim=1, keepdim=True)
    maps = torch.stack([squares[y == k].mean(dim=0) for k in y.unique()])
    return common.to_uint8(20 * maps - 1)


# --- main --------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = common.parser(__doc__, __file__)
    g = p.add_argument_group("the generator and the encoder, trained once and kept in generator.pt")
    g.add_argument("--z-dim", type=common.positive_int, default=64, help="length of z")
    g.add_argument("--steps", type=common.positive_int, default=1000, help="steps of G and D")
    g.add_argument("--encoder-steps", type=common.positive_int, default=500, help="steps of E")
    g.add_argument("--batch", type=common.positive_int, default=64, help="pictures in a batch")
    g = p.add_argument_group("inversion")
    g.add_argument("--starts", type=common.positive_int, default=3, help="starts for each picture")
    g.add_argument("--invert-steps", type=common.positive_int, default=80, help="for each start")
    g.add_argument("--invert-lr", type=common.positive_float, default=0.1, help="Adam's rate for z")
    p.set_defaults(n_self=N_SELF, n_test=N_TEST, n_samples=N_SAMPLES)
    return common.parse(p, argv, quick=dict(
        data="digits", steps=10, encoder_steps=6, invert_steps=8, n_self=20, n_test=20,
        n_samples=1000))


def check(args, images):
    """Ends the run if the flags do not fit the data."""
    widths, small = channels(images.x.shape[2])
    common.check_side(images, small * 2 ** len(widths))
    if min(args.batch, len(images.x)) < 2:
        common.fail("batch norm needs more than one picture: use --batch 2 or more")


def main(argv=None):
    args = parse_args(argv)
    device = common.start(args)
    images = common.load_images(args, device)
    test = common.load_images(args, device, train=False)
    check(args, images)
    saved = common.load_checkpoint(args)
    path = common.kept_path(args, "generator")
    if path.exists():
        kept = common.load_kept(path, ("G", "E", "log"), trained_with(args, images))
    else:
        kept = train(args, images, device, saved)
        common.save(kept, path)
    c, side = images.x.shape[1:3]
    G, E = generator(args.z_dim, c, side), encoder(args.z_dim, c, side)
    for net, name in ((G, "G"), (E, "E")):
        net.load_state_dict(kept[name])
        net.to(device).eval().requires_grad_(False)

    torch.manual_seed(args.seed)
    z = torch.randn(args.n_samples, args.z_dim).to(device)
    samples = torch.cat([G(part) for part in z.split(1000)])
    common.save(common.to_uint8(samples).cpu(), args.out / "samples.pt")
    x = {"generated": samples[:args.n_self], "test": common.to_float(test.x[:args.n_test])}
    y = None if test.y is None else test.y[:args.n_test]
    results = {"generated": invert_all(args, G, E, x["generated"], z[:args.n_self], None,
                                       "generated"),
               "test": invert_all(args, G, E, x["test"], None, y, "test")}
    figures(args, images.name, G, x, y, results, samples)
    common.write_log(args.out / "log.csv", kept["log"])
    columns = ["mse", "psnr", "found", "norm", "z error", "seconds"]
    common.print_table([f"{images.name}: pictures", "method", *columns], [
        [name, method, *(f"{run[column]:.3g}" for column in columns)]
        for name, methods in results.items() for method, run in methods.items()])
    if y is not None:
        methods = results["test"]
        common.print_table(["error of test pictures", *methods], [
            [name, *(f"{run[name]:.4f}" for run in methods.values())]
            for name in methods["encoder"] if name.startswith("class")])


if __name__ == "__main__":
    main()
