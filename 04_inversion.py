r"""04 - Inversion: given a picture x, find the z from which G draws it.

Papers   Creswell, Bharath 2016, arXiv:1611.05644 (z by gradient descent);
         Lipton, Tripathi 2017, arXiv:1702.04782 (a generator's own pictures);
         Zhu et al. 2016, arXiv:1609.03552 (an encoder first, then descent)
Idea     z* = argmin_z ‖G(z) - x‖², the best of several starts    -> invert()
         An encoder E is trained to guess z; it descends
         mean (E(G(z)) - z)² + mean (G(E(x)) - x)²            -> encoder_loss()
         Hybrid: one start, E(x), with the steps of all random starts together.
See      inversion.png: pictures, and what was found for them. starts.png: the
         error of every start. worst.png: where the best z found fits least.
         between.png: from one test picture to another. The next run takes G and
         E from generator.pt. Printed: mean squared errors. On test digits of
         MNIST random starts leave 0.031, the hybrid 0.0031 in as many steps:
         most of what random starts miss is the fault of the search, not of G.
Differs  Adam with beta2 = 0.9 moves z. G has averaged weights, and is trained
         for 2,000 steps only. A z of 64 numbers leaves over twice the error.
Try      --starts 10 --invert-steps 24 is as much work as 3 starts of 80 steps.
         Are more starts or longer ones better? Predict, then run.
Run      python 04_inversion.py
         python 04_inversion.py --starts 5 --invert-steps 200
"""

import math
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.utils import draw_bounding_boxes

import common

LR_D, LR_G, ADAM_BETAS = 5e-4, 2e-3, (0.0, 0.9)
LR_E = 4e-3                      # E has Adam's usual betas
SMALL = 1024                     # numbers in a picture up to which D is fully connected
HIDDEN_D = [512, 512]            # units of its layers
SHOTS = (0.05, 0.2, 0.5, 1.0)    # shares of the training after which process.png is written
FOUND = 0.001                    # mean squared error below which a picture counts as found again
N_SELF, N_TEST = 200, 400        # pictures of G, and of the test set, that are inverted
N_SAMPLES = 10_000               # pictures in samples.pt
CHUNK = 125                      # rows of z in one batch: 500 do not fit into a CPU's cache


# --- the idea ----------------------------------------------------------------------------------

def squared_error(a, b):
    """Mean of (a - b)² over all but the first dimension, [B]: each picture has its own.

    a, b: [B, C, H, W]. Raises ValueError if the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"pictures of shapes {tuple(a.shape)} and {tuple(b.shape)}")
    return ((a - b) ** 2).flatten(1).mean(dim=1)


def invert(G, x, z0, steps, lr):
    """z* = argmin_z ‖G(z) - x‖² by Adam, from R starts for each of N pictures, all in one batch.

    x: [N, C, H, W]; z0: [N, R, d], in any memory layout. Each of the N R rows of z moves as if it
    were alone. The learning rate falls from lr to 0 along a cosine. Returns the best end point of
    each picture, z [N, d], and the mean squared error of every start before the first step and
    after each, [N, R, steps + 1]; no gradient flows through either. With 0 steps the end point is
    the start. A start that ends at nan is never the best: it loses even to an infinite error. G,
    the .grad of its weights and z0 stay as they are. Raises ValueError if G does not generate
    pictures of the shape of x, or is in training mode, in which batch norm would let the pictures
    of a batch change each other.
    """
    if any(module.training for module in G.modules()):
        raise ValueError("G must be in evaluation mode: call G.eval()")
    n, r, d = z0.shape
    z = z0.detach().clone().reshape(n * r, d).requires_grad_()  # Adam moves it in place
    target = x.repeat_interleave(r, dim=0)
    opt = torch.optim.Adam([z], lr=lr, betas=(0.9, 0.9))  # beta2 = 0.999 needs twice the steps
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    errors = []
    for _ in range(steps):
        error = squared_error(G(z), target)
        opt.zero_grad()
        error.sum().backward(inputs=[z])  # of a sum each row gets its own gradient
        opt.step()
        rate.step()
        errors.append(error.detach())
    with torch.no_grad():
        errors.append(squared_error(G(z), target))
    errors = torch.stack(errors, dim=1).reshape(n, r, steps + 1)
    best = errors[:, :, -1].nan_to_num(nan=math.inf).argmin(dim=1)  # argmin would prefer a nan
    return z.detach().reshape(n, r, d)[torch.arange(n), best], errors


def encoder_loss(E, G, x, z):
    """mean (E(G(z)) - z)² + mean (G(E(x)) - x)²: codes of G's pictures, and pixels of real ones.

    x: [B, C, H, W] in [-1, 1]; z: [B, d] sampled from N(0, I); E maps pictures to z, G maps z to
    pictures. Each mean is over the batch and over all numbers of one z or picture; the result is a
    scalar. With the first term alone E never sees a real picture; with the second alone its codes
    may leave the region where G generates good pictures. The gradient flows into both calls of E,
    into the second through G; G itself is not to be trained with it.
    """
    return F.mse_loss(E(G(z)), z) + F.mse_loss(G(E(x)), x)


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


def encoder(d_z, c, side):
    """[B, C, side, side] -> z [B, d_z], no noise."""
    widths = [32 * 2 ** i for i in range(max(1, int(math.log2(side / 4))))]
    small = side // 2 ** len(widths)  # side of the smallest map, 4 to 7 pixels
    layers = []
    for i, o in zip([c, *widths], widths):
        layers += [nn.Conv2d(i, o, kernel_size=4, stride=2, padding=1),
                   nn.BatchNorm2d(o), nn.SiLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * small ** 2, 512),
                         nn.BatchNorm1d(512), nn.SiLU(), nn.Linear(512, d_z))


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


def train_encoder(run, args, G, E, images):
    """Trains E for the finished G, which stays as it is; returns E's weights."""
    G.eval().requires_grad_(False)
    opt_e = torch.optim.Adam(E.parameters(), lr=LR_E, fused=True)
    rate_e = torch.optim.lr_scheduler.CosineAnnealingLR(opt_e, args.encoder_steps)
    batches = run.batches(images, args.batch)

    for _ in run.steps(args.encoder_steps, E=E, opt_e=opt_e, rate_e=rate_e):
        # E descends the errors of codes and of pixels, G untouched
        x, _ = next(batches)
        z = torch.randn(len(x), args.z_dim, device=run.device)
        loss_e = encoder_loss(E, G, x, z)
        opt_e.zero_grad()
        loss_e.backward()
        opt_e.step()
        rate_e.step()
        run.log(loss_e=loss_e)

    return E.state_dict()


def trained(run, args, images):
    """G and E: trained now, unless generator.pt has kept them."""
    torch.manual_seed(args.seed)
    c, side = images.x.shape[1:3]
    G, D, E = (net.to(run.device) for net in (
        generator(args.z_dim, c, side), discriminator(c, side), encoder(args.z_dim, c, side)))
    flags = ("seed", "z_dim", "steps", "encoder_steps", "batch")
    decided = {"shape": str([c, side, side]), "data": images.name,  # what the weights depend on
               **{name: str(getattr(args, name)) for name in flags}, "train_stamp": images.stamp}
    path = args.out / "generator.pt"
    if path.exists():
        kept = common.load_kept(path, ("G", "E"), decided)
    else:
        for name in run.each(["generator"]):  # once, or not at all if --resume has it
            run.done[name] = train_generator(run, args, G, D, images)
        G.load_state_dict(run.done["generator"])  # the averaged weights, not G's last ones
        for name in run.each(["encoder"]):
            run.done[name] = train_encoder(run, args, G, E, images)
        kept = {"settings": decided, "G": run.done["generator"], "E": run.done["encoder"]}
        common.save(kept, path)
    for net, name in ((G, "G"), (E, "E")):
        net.load_state_dict(kept[name])
        net.eval().requires_grad_(False)
    return G, E


# --- measures ----------------------------------------------------------------------------------

def report(x, x_rec, z, z_true, y):
    """Errors of x_rec [N, C, H, W] against x in [-1, 1] units; with labels y for each class too.

    mse: mean over all pictures; psnr: 10 log10(2² / mse), dB; found: share with an error below
    FOUND; norm: of z [N, d], about √d for draws of N(0, I); z error: mean (z - z_true)², which is 2
    for two unrelated draws, and nan where z_true is None.
    """
    error = squared_error(x, x_rec)
    numbers = {"mse": error.mean().item(), "psnr": 10 * torch.log10(4 / error.mean()).item(),
               "found": (error < FOUND).float().mean().item(), "norm": z.norm(dim=1).mean().item(),
               "z error": math.nan if z_true is None else F.mse_loss(z, z_true).item()}
    if y is not None:
        numbers |= {f"class {k}": error[y == k].mean().item() for k in y.unique().tolist()}
    return numbers


def worst_window(x, x_rec, width):
    """Where G fails most: mean squared error of the worst window, its first row, its first column.

    x, x_rec: [N, C, H, W]; the window is a square of `width` pixels; returns three tensors [N].
    """
    means = F.avg_pool2d(((x - x_rec) ** 2).mean(dim=1, keepdim=True), width, stride=1)
    value, at = means.flatten(1).max(dim=1)
    return value, at // means.shape[3], at % means.shape[3]


def invert_in_parts(G, x, z0, steps, lr, label):
    """invert() for any number of pictures, CHUNK rows of z at a time; shows its progress."""
    at_once = max(1, CHUNK // z0.shape[1])
    parts = list(zip(x.split(at_once), z0.split(at_once)))
    show = common.progress(label, len(parts))
    found = []
    for i, (targets, starts) in enumerate(parts, start=1):
        found.append(invert(G, targets, starts, steps, lr))
        show(i, i * at_once, error=found[-1][1][:, :, -1].amin(dim=1).mean().item())
    z, errors = zip(*found)
    return torch.cat(z), torch.cat(errors)


def invert_all(args, G, E, x, z_true, y, label):
    """Inverts x by three methods; for each: z, G(z), the errors of all starts, and report()."""
    z_random = torch.randn(len(x), args.starts, args.z_dim).to(x.device)
    z_encoder = torch.cat([E(part) for part in x.split(CHUNK)])[:, None]
    results = {}
    for method, z0, steps in (("random starts", z_random, args.invert_steps),
                              ("encoder", z_encoder, 0),
                              ("hybrid", z_encoder, args.starts * args.invert_steps)):
        z, errors = invert_in_parts(G, x, z0, steps, args.invert_lr, f"{label}, {method}")
        x_rec = torch.cat([G(part) for part in z.split(CHUNK)])
        results[method] = {"z": z, "x_rec": x_rec, "errors": errors,
                           **report(x, x_rec, z, z_true, y)}
    return results


# --- figures -----------------------------------------------------------------------------------

def figures(args, name, G, targets, y, results, samples):
    """inversion.png, starts.png, worst.png, between.png."""
    title = f"Inversion on {name}, seed {args.seed}"
    common.save_panels(args.out / "inversion.png", [(label, [
        (f"{method}\n{found['psnr']:.1f} dB", common.panel(
            beside(targets[label][:32], found["x_rec"][:32])))
        for method, found in methods.items()]) for label, methods in results.items()],
        f"{title}: each picture left of what was found for it")
    starts_figure(args.out / "starts.png", title, targets["test"], results["test"])

    best = results["test"]["hybrid"]  # G's own error is at most what it leaves
    pictures, columns, rows = worst(targets["test"], best["x_rec"], y)
    common.save_panels(args.out / "worst.png", [("", [
        ("samples of G", common.panel(common.to_uint8(samples[:64]))),
        ("worst windows of test pictures, each left\nof what was found" + rows,
         common.panel(pictures, columns))])], title,
        size=3.2)

    common.save_panels(args.out / "between.png", [("", [
        ("between the z of two test pictures\n(the ends: what was found)",
         common.panel(common.to_uint8(G(between(best["z"]))), 9)),
        ("between their pixels", common.panel(common.to_uint8(between(targets["test"])), 9))])],
        title, size=3.2)


def beside(x, x_rec):
    """Each picture left of what was found for it, uint8 [2 N, C, H, W]."""
    return common.to_uint8(torch.stack([x, x_rec], dim=1).flatten(0, 1))


def starts_figure(path, title, x, methods):
    """The error of every start of five test pictures x against the step, below the picture."""
    n = min(5, len(x))
    fig, axes = common.figure(2, n, 2.2 * n, 3.8, f"{title}\n{n} test pictures, each left of what "
                              "hybrid found for it; below: the error of every start")
    for i, (top, ax) in enumerate(axes.T):
        common.panel(beside(x[i:i + 1], methods["hybrid"]["x_rec"][i:i + 1]))(top)
        for method, colour in (("random starts", "C0"), ("hybrid", "C3")):
            curves = methods[method]["errors"][i].T.cpu().numpy()  # a column for each start
            ax.semilogy(curves, colour, linewidth=1)[0].set_label(method)
        ax.set_ylim(1e-4, 1)
    axes[1, 0].set_ylabel("mean squared error")
    fig.supxlabel("step", fontsize="medium")
    fig.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside right upper")
    common.save_figure(fig, path)


def worst(x, x_rec, y):
    """The 20 pictures with the worst windows, equally many of each class, each left of what was
    found; the number of columns, with which a class of up to 4 has a row; and words that say so.
    """
    width = x.shape[3] // 4
    value, top, left = worst_window(x, x_rec, width)
    rows = "" if y is None else "; a row for each class"
    y = torch.zeros_like(top) if y is None else y
    groups = [(y == k).nonzero()[:, 0] for k in y.unique()]
    each = max(1, 20 // len(groups))
    chosen = torch.cat([group[value[group].argsort(descending=True)][:each]
                        for group in groups])[:20]
    top, left = (at[chosen].repeat_interleave(2) for at in (top, left))
    pictures = framed(beside(x[chosen], x_rec[chosen]), top, left, width)
    return pictures, 2 * min(each, 4), rows if each <= 4 else ""


def framed(x, top, left, width):
    """Copies of x, uint8 [N, C, H, W], in colour, with a red frame around each window."""
    boxes = torch.stack([left, top, left + width - 1, top + width - 1], dim=1)[:, None].cpu()
    return torch.stack([draw_bounding_boxes(picture, box, colors="red")
                        for picture, box in zip(x.cpu(), boxes)])


def between(v):
    """(1 - a) v[i] + a v[i + 1] for a = 0, 1/8, ..., 1, and i = 0, 2, ..., 14: 72 rows.

    If v has fewer than 16 rows, it begins again after the last.
    """
    a = torch.linspace(0, 1, 9, device=v.device).view(9, *[1] * (v.ndim - 1))
    ends = v[torch.arange(16, device=v.device) % len(v)].unflatten(0, (8, 2))
    return torch.cat([(1 - a) * one + a * other for one, other in ends])


# --- main --------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = common.parser(__doc__, __file__)
    g = p.add_argument_group("the generator and the encoder, trained once and kept in generator.pt")
    g.add_argument("--z-dim", type=common.number(int, 1), default=128, help="length of z")
    g.add_argument("--steps", type=common.number(int, 1), default=2000, help="steps of G and D")
    g.add_argument("--encoder-steps", type=common.number(int, 1), default=500, help="steps of E")
    g.add_argument("--batch", type=common.number(int, 1), default=64, help="pictures in a batch")
    g = p.add_argument_group("inversion")
    g.add_argument("--starts", type=common.number(int, 1), default=3,
                   help="random starts for each picture")
    g.add_argument("--invert-steps", type=common.number(int, 1), default=80, help="for each start")
    g.add_argument("--invert-lr", type=common.number(float, above=0), default=0.1,
                   help="Adam's rate for z, falls to 0")
    p.set_defaults(n_self=N_SELF, n_test=N_TEST, n_samples=N_SAMPLES)
    return common.parse(p, argv, quick=dict(
        data="digits", steps=10, encoder_steps=6, invert_steps=8, n_self=20, n_test=20,
        n_samples=1000))


def print_tables(name, results):
    """Numbers by pictures and method; errors of test pictures by class, if the data have labels."""
    columns = ["mse", "psnr", "found", "norm", "z error"]
    common.print_table([f"{name}: pictures", "method", *columns], [
        [label, method, *(f"{numbers[column]:.3g}" for column in columns)]
        for label, methods in results.items() for method, numbers in methods.items()])
    methods = results["test"]
    classes = [column for column in methods["encoder"] if column.startswith("class")]
    if classes:
        common.print_table(["error of test pictures", *methods], [
            [column, *(f"{numbers[column]:.4f}" for numbers in methods.values())]
            for column in classes])


def main(argv=None):
    args = parse_args(argv)
    with common.Run(args) as run:
        images = common.load_images(args, run.device)
        test = common.load_images(args, run.device, train=False)
        common.check_side(images)
        common.check_batch(args, images, "batch norm needs more than one picture")
        G, E = trained(run, args, images)

        torch.manual_seed(args.seed)
        z = torch.randn(args.n_samples, args.z_dim).to(run.device)
        samples = torch.cat([G(part) for part in z.split(1000)])
        common.save(common.to_uint8(samples).cpu(), args.out / "samples.pt")
        targets = {"generated": samples[:args.n_self],
                   "test": common.to_float(test.x[:args.n_test])}
        y = None if test.y is None else test.y[:args.n_test]
        results = {"generated": invert_all(args, G, E, targets["generated"], z[:args.n_self], None,
                                           "generated"),
                   "test": invert_all(args, G, E, targets["test"], None, y, "test")}
        figures(args, images.name, G, targets, y, results, samples)
        print_tables(images.name, results)


if __name__ == "__main__":
    common.as_script(main)
