r"""04 - Inversion: given a picture x, find the z for which G(z) = x.

Papers   Creswell, Bharath 2016, arXiv:1611.05644 (gradient descent on z);
         Lipton, Tripathi 2017, arXiv:1702.04782 (pictures of G itself);
         Zhu et al. 2016, arXiv:1609.03552 (an encoder first, then descent)
Idea     z* = argmin_z ‖G(z) - x‖², the best of R random starts   -> invert()
         An encoder E is trained to predict z; it minimises
         mean (E(G(z)) - z)² + mean (G(E(x)) - x)²             -> encoder_loss()
         Hybrid: one start at E(x), with as many steps as the R starts together.
See      inversion.png: pictures beside their inversions. starts.png: the error
         of every start. worst.png: test pictures with the largest error.
         between.png: interpolations. Mean squared error on test digits of
         MNIST: random starts 0.030, hybrid 0.003. G is able to generate these
         digits, so most of the 0.030 is left by the search.
Differs  Adam with beta2 = 0.9 moves z. The weights of G are an average over the
         last quarter of its training steps.
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
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import common

LR_D, LR_G, LR_E, ADAM_BETAS = 5e-4, 2e-3, 4e-3, (0.0, 0.9)  # E has Adam's default betas
SNAPSHOTS = (0.05, 0.2, 0.5, 1.0)  # shares of the steps after which process.png is written
FOUND = 0.001                      # a picture counts as found if its mean squared error is below
N_SELF, N_TEST = 200, 400          # pictures of G, and of the test set, that are inverted
N_SAMPLES, CHUNK = 10_000, 125     # pictures in samples.pt; z in a batch (more: slower on a CPU)


# --- the idea ----------------------------------------------------------------------------------

def squared_error(a, b):
    """Mean of (a - b)² over all but the first dimension, [B]: one value for each picture.

    a, b: [B, C, H, W]. Raises ValueError if the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"pictures of shapes {list(a.shape)} and {list(b.shape)}")
    return ((a - b) ** 2).flatten(1).mean(dim=1)


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


def invert(G, x, z0, steps, lr):
    """z* = argmin_z ‖G(z) - x‖² by Adam, from R starts for each of N pictures, all in one batch.

    x: [N, C, H, W]; z0: [N, R, d]. Each of the N R rows of z moves as if it were alone. The
    learning rate falls from lr to 0 along a cosine; with 0 steps z* is the start. Returns the best
    end point of each picture, z [N, d], and the mean squared error of every start before the first
    step and after each, [N, R, steps + 1], both without gradient. A start that ends at nan is never
    chosen: even an infinite error is better. G, the .grad of its weights and z0 do not change.
    Raises ValueError as check_starts() does.
    """
    check_starts(G, x, z0)
    n, r, d = z0.shape
    z = z0.detach().clone().reshape(n * r, d).requires_grad_()  # Adam changes it in place
    target = x.repeat_interleave(r, dim=0)
    opt = torch.optim.Adam([z], lr=lr, betas=(0.9, 0.9))  # beta2 = 0.999 needs twice the steps
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    errors = []
    for _ in range(steps):
        error = squared_error(G(z), target)
        opt.zero_grad()
        error.sum().backward(inputs=[z])  # a sum: the gradient of a row is that of its own error
        opt.step()
        schedule.step()
        errors.append(error.detach())
    with torch.no_grad():
        errors.append(squared_error(G(z), target))
    errors = torch.stack(errors, dim=1).reshape(n, r, steps + 1)
    best = errors[:, :, -1].nan_to_num(nan=math.inf).argmin(dim=1)  # argmin would choose a nan
    return z.detach().reshape(n, r, d)[torch.arange(n), best], errors


def encoder_loss(E, G, x, z):
    """mean (E(G(z)) - z)² + mean (G(E(x)) - x)²: the error of codes, and that of pixels.

    x: real pictures [B, C, H, W] in [-1, 1]; z: samples of N(0, I), [B, d]; E maps pictures to z.
    Each mean is over the batch and over all values of a z or a picture; the result is a scalar, to
    be minimised by E alone. With the first term alone E never sees a real picture. With the second
    alone its codes may leave the region where G generates good pictures. The gradient reaches E
    through both terms, in the second through G.
    """
    return F.mse_loss(E(G(z)), z) + F.mse_loss(G(E(x)), x)


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


def encoder(d_z, c, side):
    """[B, C, side, side] -> z [B, d_z]: one z for each picture, not a distribution as in 01."""
    widths = [32 * 2 ** i for i in range(max(1, int(math.log2(side / 4))))]
    small = side // 2 ** len(widths)  # side of the smallest map, 4 to 7 pixels
    layers = []
    for i, o in pairwise([c, *widths]):
        layers += [nn.Conv2d(i, o, kernel_size=4, stride=2, padding=1),
                   nn.BatchNorm2d(o), nn.SiLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * small ** 2, 512),
                         nn.BatchNorm1d(512), nn.SiLU(), nn.Linear(512, d_z))


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


def train_encoder(run, args, G, E, images):
    """Trains E for the trained G, which does not change. Returns E's state_dict."""
    G.eval().requires_grad_(False)
    opt_e = torch.optim.Adam(E.parameters(), lr=LR_E, fused=True)
    schedule_e = CosineAnnealingLR(opt_e, args.encoder_steps)
    batches = run.batches(images, args.batch)

    for _ in run.steps(args.encoder_steps, E=E, opt_e=opt_e, schedule_e=schedule_e):
        # E minimises mean (E(G(z)) - z)² + mean (G(E(x)) - x)²
        x, _ = next(batches)
        z = torch.randn(len(x), args.z_dim, device=run.device)
        loss_e = encoder_loss(E, G, x, z)
        opt_e.zero_grad()
        loss_e.backward()
        opt_e.step()
        schedule_e.step()
        run.log(loss_e=loss_e)

    return E.state_dict()


def train(run, args, images):
    """Trains G, then E for it. Returns their state_dicts."""
    torch.manual_seed(args.seed)
    c, side = images.x.shape[1:3]
    G, D, E = (net.to(run.device) for net in (
        generator(args.z_dim, c, side), discriminator(c, side), encoder(args.z_dim, c, side)))
    for name in run.each(["generator"]):  # each() leaves out what --resume finds finished
        run.done[name] = train_generator(run, args, G, D, images)
    G.load_state_dict(run.done["generator"])  # the averaged weights, not G's last ones
    for name in run.each(["encoder"]):
        run.done[name] = train_encoder(run, args, G, E, images)
    return run.done["generator"], run.done["encoder"]


# --- measure -----------------------------------------------------------------------------------

def measure(x, x_rec, z, z_true, y):
    """How close the inversions x_rec = G(z) are to the pictures x: a dict of numbers.

    x, x_rec: [N, C, H, W] in [-1, 1]; z: [N, d]; z_true: [N, d] or None; y: labels [N] or None.
    mse: mean squared error; psnr: 10 log10(2² / mse) in dB; found: share of pictures with an error
    below FOUND; norm: mean ‖z‖, about √d for samples of N(0, I); z error: mean (z - z_true)², which
    is 2 for independent samples, and nan without z_true; class k: mse of class k.
    """
    error = squared_error(x, x_rec)
    numbers = {"mse": error.mean().item(), "psnr": 10 * torch.log10(4 / error.mean()).item(),
               "found": (error < FOUND).float().mean().item(), "norm": z.norm(dim=1).mean().item(),
               "z error": math.nan if z_true is None else F.mse_loss(z, z_true).item()}
    if y is not None:
        numbers |= {f"class {k}": error[y == k].mean().item() for k in y.unique().tolist()}
    return numbers


def invert_in_parts(G, x, z0, steps, lr, label):
    """invert() for any number of pictures, CHUNK rows of z at a time; shows its progress."""
    n = max(1, CHUNK // z0.shape[1])
    show, found = common.progress(label, math.ceil(len(x) / n)), []
    for x_part, z0_part in zip(x.split(n), z0.split(n)):
        found.append(invert(G, x_part, z0_part, steps, lr))
        show(len(found))
    return [torch.cat(parts) for parts in zip(*found)]


def invert_all(args, G, E, x, z_true, y, label):
    """For each of three methods a dict: z, x_rec = G(z), the errors of all starts, measure()."""
    z_random = torch.randn(len(x), args.starts, args.z_dim).to(x.device)
    z_encoder = torch.cat([E(part) for part in x.split(CHUNK)])[:, None]
    results = {}
    for method, z0, steps in (("random starts", z_random, args.invert_steps),
                              ("encoder", z_encoder, 0),
                              ("hybrid", z_encoder, args.starts * args.invert_steps)):
        z, errors = invert_in_parts(G, x, z0, steps, args.invert_lr, f"{label}, {method}")
        x_rec = torch.cat([G(part) for part in z.split(CHUNK)])
        results[method] = measure(x, x_rec, z, z_true, y) | dict(z=z, x_rec=x_rec, errors=errors)
    return results


# --- figures -----------------------------------------------------------------------------------

def in_pairs(x, x_rec):
    """A panel with each picture to the left of its inversion."""
    return common.panel(common.to_uint8(torch.stack([x, x_rec], dim=1).flatten(0, 1)))


def interpolate(v):
    """From v[i] to v[i + 1] in nine equal steps, for i = 0, 2, ..., 14: [72, ...]."""
    a = torch.linspace(0, 1, 9, device=v.device).view(9, *[1] * (v.ndim - 1))
    pairs = v[torch.arange(16, device=v.device) % len(v)].unflatten(0, (8, 2))
    return torch.cat([(1 - a) * one + a * other for one, other in pairs])


def figures(args, name, G, cases, results, samples):
    """inversion.png, starts.png, worst.png, between.png."""
    title, x = f"Inversion on {name}, seed {args.seed}", cases["test"][0]
    hybrid, n = results["test"]["hybrid"], min(5, len(x))
    common.save_panels(args.out / "inversion.png", [(label, [
        (f"{method}\n{found['psnr']:.1f} dB", in_pairs(cases[label][0][:32], found["x_rec"][:32]))
        for method, found in methods.items()]) for label, methods in results.items()],
        f"{title}: each picture to the left of its inversion")

    def error_curves(ax, i):
        for method, colour in (("random starts", "tab:blue"), ("hybrid", "tab:red")):
            curves = results["test"][method]["errors"][i].T.cpu().numpy()  # a column for each start
            ax.semilogy(curves, colour, linewidth=1)
        ax.set(ylim=(1e-4, 1), xlabel="step", ylabel="mean squared error")

    common.save_panels(args.out / "starts.png", [
        ("", [("", in_pairs(x[i:i + 1], hybrid["x_rec"][i:i + 1])) for i in range(n)]),
        ("", [("", lambda ax, i=i: error_curves(ax, i)) for i in range(n)])],
        f"{title}\nabove: test pictures, each to the left of its hybrid inversion\n"
        "below: the error of each random start (blue), and of the hybrid (red)", size=2.4)
    worst = squared_error(x, hybrid["x_rec"]).topk(min(32, len(x))).indices
    common.save_panels(args.out / "worst.png", [("", [
        ("samples of G\n", common.panel(common.to_uint8(samples[:64]))),
        ("test pictures with the largest error,\neach to the left of its hybrid inversion",
         in_pairs(x[worst], hybrid["x_rec"][worst]))])], title, size=3.2)
    common.save_panels(args.out / "between.png", [("", [
        ("G between the z of two test pictures\n(the ends are their inversions)",
         common.panel(common.to_uint8(G(interpolate(hybrid["z"]))), 9)),
        ("between their pixels\n", common.panel(common.to_uint8(interpolate(x)), 9))])],
        title, size=3.2)


# --- main --------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = common.parser(__doc__, __file__)
    g = p.add_argument_group("the generator and the encoder, trained once, saved in generator.pt")
    g.add_argument("--z-dim", type=common.number(int, 1), default=128, help="dimensions of z")
    g.add_argument("--steps", type=common.number(int, 1), default=2000, help="steps of G and D")
    g.add_argument("--encoder-steps", type=common.number(int, 1), default=500, help="steps of E")
    g.add_argument("--batch", type=common.number(int, 2), default=64, help="pictures in a batch")
    g = p.add_argument_group("inversion")
    g.add_argument("--starts", type=common.number(int, 1), default=3, help="random z per picture")
    g.add_argument("--invert-steps", type=common.number(int, 1), default=80, help="for each start")
    g.add_argument("--invert-lr", type=common.number(float, above=0), default=0.1,
                   help="Adam's learning rate for z, which falls to 0")
    p.set_defaults(n_self=N_SELF, n_test=N_TEST, n_samples=N_SAMPLES)
    return common.parse(p, argv, quick=dict(data="digits", steps=10, encoder_steps=6,
                                            invert_steps=8, n_self=20, n_test=20, n_samples=1000))


def load_or_train(run, args, images):
    """G and E: loaded from generator.pt if an earlier run saved it there, else trained now."""
    c, side = images.x.shape[1:3]
    settings = {"shape": str([c, side, side]), "data": images.name} | {
        name: str(getattr(args, name)) for name in  # these, and nothing else, decide the weights
        ("seed", "z_dim", "steps", "encoder_steps", "batch", "training_pictures")}
    file = args.out / "generator.pt"
    if file.exists():
        print(f"G and E are loaded from {file}")
        saved = common.load_saved(file, settings, ("G", "E"))
    else:
        saved = {"settings": settings, **dict(zip("GE", train(run, args, images)))}
        common.save(saved, file)
    nets = {"G": generator(args.z_dim, c, side), "E": encoder(args.z_dim, c, side)}
    for name, net in nets.items():
        net.load_state_dict(saved[name])
    return [net.to(run.device).eval().requires_grad_(False) for net in nets.values()]


def print_tables(name, results):
    """measure() by pictures and method; the error of test pictures by class, and by starts."""
    columns, methods = ["mse", "psnr", "found", "norm", "z error"], results["test"]
    common.print_table([f"{name}: pictures", "method", *columns], [
        [label, method, *(f"{numbers[column]:.3g}" for column in columns)]
        for label, methods in results.items() for method, numbers in methods.items()])
    if classes := [column for column in methods["hybrid"] if column.startswith("class")]:
        common.print_table(["error of test pictures", *methods], [
            [k, *(f"{numbers[k]:.4f}" for numbers in methods.values())] for k in classes])
    lowest = methods["random starts"]["errors"][:, :, -1].cummin(dim=1).values.mean(dim=0)
    print("error of test pictures, the best of 1, 2, ... random starts:",
          *(f"{error:.4f}" for error in lowest.tolist()))


def main(argv=None):
    args = parse_args(argv)
    run = common.Run(args)
    images = common.load_images(args, run.device)
    test = common.load_images(args, run.device, train=False)
    G, E = load_or_train(run, args, images)

    torch.manual_seed(args.seed)
    z = torch.randn(args.n_samples, args.z_dim).to(run.device)
    samples = torch.cat([G(part) for part in z.split(1000)])
    common.save(common.to_uint8(samples).cpu(), args.out / "samples.pt")
    x, y = common.to_float(test.x[:args.n_test]), None if test.y is None else test.y[:args.n_test]
    cases = {"generated": (samples[:args.n_self], z[:args.n_self], None), "test": (x, None, y)}
    results = {label: invert_all(args, G, E, *case, label) for label, case in cases.items()}
    figures(args, images.name, G, cases, results, samples)
    print_tables(images.name, results)


if __name__ == "__main__":
    main()
