r"""03 - Unrolled GAN: G anticipates how D will react.

Paper    Metz, Poole, Pfau, Sohl-Dickstein 2017, arXiv:1611.02163, section 2
Game     f(θ_G, θ_D) = E log σ(D(x)) + E log(1 - σ(D(G(z))))       -> value()
         θ: weights; σ: the sigmoid. D returns logits and maximises f.
Idea     θ_D^k, k no power: after k steps θ <- θ + η ∂f/∂θ          -> unroll()
         G minimises f(θ_G, θ_D^k(θ_G)), so that its loss takes D's reaction
         into account; D takes one step. k = 0: plain GAN  -> unrolled_loss_g()
See      process.gif: three GANs on a ring of 8 modes (clusters of the data).
         With momentum, Adam's beta1 = 0.7, the plain GAN collapses: it covers
         0 or 1 mode. Unrolled (k = 5) it covers 8, and 96 % of the samples are
         good: within 3 standard deviations of a mode. The plain GAN *without*
         momentum covers 8 as well, with 95 to 96 %, in a quarter of the time.
Differs  The authors' notebook has beta1 = 0.5; here 1 of 10 seeds then covers
         all modes. G is trained on the non-saturating loss at θ_D^k, that is
         -E log σ(D(G(z))). D has one hidden layer. On pictures beta1 is 0.
Try      --method rollback: what is lost? Predict, then run.
Run      python 03_unrolled_gan.py [--data mnist]
"""

import io
import itertools
import math
from functools import partial
from typing import NamedTuple

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

import common

# Defaults for every model; a flag (-k, --beta1, --steps, --batch, --eta, --z-dim) overrides one.
RING = dict(k=[0, 0, 5], beta1=[0.7, 0.0, 0.7], steps=9000, batch=256, eta=0.1, z_dim=4, lr_d=1e-3)
# One unrolled step changes D's logit by about eta ‖x‖² (784 eta for a digit): eta must be small.
PICTURES = dict(k=[0, 2], beta1=[0.0], steps=1600, batch=64, eta=0.005, z_dim=50, lr_d=5e-4)
LR_G = 2e-3                      # learning rate of G
N_SAMPLES = 10_000               # samples that are measured and saved
SNAPSHOTS = (0.025, 0.1, 0.25, 0.5, 1.0)  # shares of the steps after which process.png is written


# --- the idea ----------------------------------------------------------------------------------

def value(D, theta, x, x_fake):
    """f(θ_G, θ_D) = mean log σ(D(x)) + mean log(1 - σ(D(x_fake))). A scalar <= 0, in nats.

    D returns logits [B]; theta: its parameters by name; x, x_fake: [B, ...], [B', ...]. D sees both
    as one batch, so that batch norm has the statistics of both. D maximises f, G minimises it.
    f = -2 log 2 = -1.386 when D cannot tell the two apart.
    """
    # functional_call: D as a function of its input and of any weights theta, not only its own
    logits = torch.func.functional_call(D, theta, (torch.cat([x, x_fake]),))
    logits_real, logits_fake = logits.split([len(x), len(x_fake)])
    return F.logsigmoid(logits_real).mean() + F.logsigmoid(-logits_fake).mean()


def unroll(D, x, x_fake, k, eta, exact=True):
    """θ_D^k: D's parameters (by name) after k ascent steps of size eta on f of this one batch.

    f is that of value(). exact: the result is a differentiable function of x_fake, and through it
    of θ_G; if False, it is a constant. Frozen parameters do not change, nor do parameters that the
    logits do not use. The dict also has copies of D's buffers, which batch norm and spectral norm
    update in every forward pass: D itself is not changed.
    """
    theta = dict(D.named_parameters()) | {name: b.clone() for name, b in D.named_buffers()}
    learned = [name for name, p in theta.items() if p.requires_grad]
    x_fake = x_fake if exact else x_fake.detach()
    for _ in range(k):
        grads = torch.autograd.grad(value(D, theta, x, x_fake), [theta[name] for name in learned],
                                    create_graph=exact,  # keep the graph of the gradient itself
                                    materialize_grads=True)  # 0 for unused parameters
        theta |= {name: theta[name] + eta * g for name, g in zip(learned, grads)}
        if not exact:  # rollback: forget the graph of this step
            theta |= {name: theta[name].detach().requires_grad_() for name in learned}
    return theta


def unrolled_loss_g(D, x, x_fake, k, eta, exact=True, saturating=True):
    """f(θ_G, θ_D^k(θ_G)), to be minimised by G. k = 0 is the plain GAN.

    exact: its gradient in θ_G is ∂f/∂θ_G + ∂f/∂θ_D^k · dθ_D^k/dθ_G; the second term is D's
    reaction. If False ("rollback"), θ_D^k is a constant, as if a copy of D was trained for k steps.
    saturating=False gives the loss that this chapter trains G on: -mean log σ(D(x_fake)) at the
    same θ_D^k. Its gradient does not vanish where D is sure of a fake. D does not change; for its
    .grad to stay empty, ask for G's gradient alone: loss.backward(inputs=list(G.parameters())).
    """
    theta = unroll(D, x, x_fake, k, eta, exact)
    if saturating:
        return value(D, theta, x, x_fake)
    return -F.logsigmoid(torch.func.functional_call(D, theta, (x_fake,))).mean()


# --- model -------------------------------------------------------------------------------------

def plane_nets(d_z):
    """For points in the plane: G [B, d_z] -> [B, 2], D [B, 2] -> logits [B].

    D has one hidden layer on purpose: with two, the plain GAN covers all 8 modes of the ring. G is
    continuous, so some samples fall between two modes. They are fewer if z is short and the initial
    weights are large (orthogonal, gain 1.6).
    """
    G = nn.Sequential(nn.Linear(d_z, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
                      nn.Linear(128, 2))
    D = nn.Sequential(nn.Linear(2, 256), nn.ReLU(), nn.Linear(256, 1), nn.Flatten(0))  # [B]
    D.register_forward_pre_hook(lambda D, inputs: (inputs[0] / 4,))  # D sees x / 4, near 1 in size
    for layers, gain in ((G[:-1], 1.6), ([G[-1], *D], 0.8)):
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight, gain)
                nn.init.zeros_(layer.bias)
    return G, D


def image_nets(d_z, c, h, w):
    """For pictures: G [B, d_z] -> [B, c, h, w], D [B, c, h, w] -> logits [B]. h, w: multiples of 4.

    The networks of one report: for MNIST 675,025 parameters in G, 1,460,225 in D. Batch norm in G
    (without parameters) and the initialisation N(0, 0.02²) were added; without them G collapses.
    D's dropout of 0.3 was left out: with it the FID of k = 0 is 78, without it 48.
    """
    def norm(channels, kind):
        return kind(channels, affine=False, track_running_stats=False)

    G = nn.Sequential(
        nn.Linear(d_z, 500), norm(500, nn.BatchNorm1d), nn.ReLU(),
        nn.Linear(500, 500), norm(500, nn.BatchNorm1d), nn.ReLU(),
        nn.Linear(500, h * w), norm(h * w, nn.BatchNorm1d), nn.ReLU(),
        nn.Unflatten(1, (16, h // 4, w // 4)),                               # [B, 16, H/4, W/4]
        nn.ConvTranspose2d(16, 16, kernel_size=4, stride=2, padding=1),      # [B, 16, H/2, W/2]
        norm(16, nn.BatchNorm2d), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, kernel_size=4, stride=2, padding=1),       # [B, 8, H, W]
        norm(8, nn.BatchNorm2d), nn.ReLU(),
        nn.ConvTranspose2d(8, c, kernel_size=3, padding=1), nn.Tanh())       # [B, C, H, W]
    D = nn.Sequential(
        nn.Flatten(),
        nn.Linear(c * h * w, 1024), nn.LeakyReLU(0.2),
        nn.Linear(1024, 512), nn.LeakyReLU(0.2),
        nn.Linear(512, 256), nn.LeakyReLU(0.2),
        nn.Linear(256, 1), nn.Flatten(0))                                    # [B]
    for layer in [*G, *D]:
        if isinstance(layer, (nn.Linear, nn.ConvTranspose2d)):  # as in DCGAN
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return G.to(memory_format=torch.channels_last), D  # faster on the CPU


@torch.no_grad()
def generate(G, z):
    """G(z), in batches of a thousand, each with its own statistics of batch norm."""
    return torch.cat([G(part) for part in z.split(1000)])


# --- data: points in the plane -----------------------------------------------------------------

class Mixture(NamedTuple):
    """Gaussians of equal weight in the plane."""
    name: str
    centres: torch.Tensor        # [m, 2]
    std: float
    batch: int                   # points in a batch
    examples: torch.Tensor       # [1000, 2], for the figures
    side: float                  # half of a side of the figures


def ring(m=8, radius=2.0):
    """m centres [m, 2] on a circle, equally spaced, without repeating the first."""
    angle = 2 * math.pi * torch.arange(m) / m
    return radius * torch.stack([angle.cos(), angle.sin()], dim=1)


def grid(m=5, spacing=2.0):
    """m² centres [m², 2] of a square grid around the origin."""
    line = spacing * (torch.arange(m) - (m - 1) / 2)
    return torch.cartesian_prod(line, line)


def gaussian_mixture(centres, std, n):
    """n samples [n, 2] of the mixture with equal weights and standard deviation std."""
    chosen = centres[torch.randint(len(centres), (n,), device=centres.device)]
    return chosen + std * torch.randn_like(chosen)


# --- train -------------------------------------------------------------------------------------

def train(run, args, data, k, beta1):
    """Trains one GAN with k unrolled steps of D; returns G and the z of its samples.

    data: a Mixture, or Images with x and y. beta1: Adam's momentum, the weight of earlier steps in
    its running mean of the gradient. run.extra collects what the figures need.
    """
    torch.manual_seed(args.seed)  # every model starts from the same networks
    if isinstance(data, Mixture):
        G, D = plane_nets(args.z_dim)
        batches = (gaussian_mixture(data.centres, data.std, data.batch) for _ in itertools.count())
    else:
        G, D = image_nets(args.z_dim, *data.x.shape[1:])
        batches = (x for x, _ in run.batches(data, args.batch))
    G, D = G.to(run.device), D.to(run.device)
    opt_g, opt_d = (torch.optim.Adam(net.parameters(), lr=lr, betas=(beta1, 0.999), fused=True)
                    for net, lr in ((G, LR_G), (D, args.lr_d)))
    schedule_g, schedule_d = (  # constant for half of the steps, then linear to 0
        LambdaLR(opt, lambda step: min(1, 2 - 2 * step / args.steps)) for opt in (opt_g, opt_d))
    z_fixed = torch.randn(args.n_samples, args.z_dim).to(run.device)  # the same for every model

    for _ in run.steps(args.steps, G=G, D=D, opt_g=opt_g, opt_d=opt_d, schedule_g=schedule_g,
                       schedule_d=schedule_d):
        # G's step: minimise its loss at θ_D^k(θ_G). Only G gets a gradient (inputs)
        for _ in range(args.g_steps):
            x = next(batches)
            x_fake = G(torch.randn(len(x), args.z_dim, device=run.device))
            loss_g = unrolled_loss_g(D, x, x_fake, k, args.eta, exact=args.method == "exact",
                                     saturating=False)
            opt_g.zero_grad()
            loss_g.backward(inputs=tuple(G.parameters()))
            opt_g.step()

        # D's step: maximise f(θ_G, θ_D), with ordinary steps from the weights it had
        for _ in range(args.d_steps):
            x = next(batches)
            x_fake = G(torch.randn(len(x), args.z_dim, device=run.device))
            loss_d = -value(D, dict(D.named_parameters()), x, x_fake.detach())
            opt_d.zero_grad()
            loss_d.backward()
            opt_d.step()

        schedule_g.step()
        schedule_d.step()
        run.log(loss_g=loss_g, f=-loss_d)
        if run.every(40) or run.at(SNAPSHOTS):
            samples = generate(G, z_fixed[:1000])
            run.add_to_row(**measure(samples, data))
            run.extra[run.step] = caption(run.rows[-1]), snapshot(samples, D, data)
        if run.at(SNAPSHOTS):
            plot_process(run, args, data)

    return G, z_fixed


# --- measure -----------------------------------------------------------------------------------

def measure(x, data):
    """Numbers for samples x: which modes of a Mixture, or which classes of pictures, G covers.

    good: share of the samples within 3 standard deviations of the nearest centre, 0 to 1. modes:
    how many centres have a good sample among the first 2,500 (while training: 1,000). kl: KL(shares
    of the modes among the good samples ‖ equal shares), nats. For pictures: distance to the nearest
    training picture, whose class is taken as that of the sample; classes: how many occur; their kl.
    """
    if isinstance(data, Mixture):
        distance, nearest = torch.cdist(x, data.centres).min(dim=1)
        good = distance < 3 * data.std
        return {"modes": nearest[:2500][good[:2500]].unique().numel(),
                "good": good.float().mean().item(),
                "kl": kl_to_uniform(torch.bincount(nearest[good], minlength=len(data.centres)))}
    distance, nearest = common.nearest(x, data)
    numbers = {"distance": distance.mean().item()}
    if data.y is None:
        return numbers
    counts = torch.bincount(data.y[nearest], minlength=int(data.y.max()) + 1)
    return {"classes": int((counts > 0).sum()), "kl": kl_to_uniform(counts), **numbers}


def kl_to_uniform(counts):
    """Σ p log(K p) of the K shares p, nats: 0 if all are equal, log K if one has all."""
    p = counts.cpu().double() / counts.sum().cpu()
    return torch.special.xlogy(p, len(p) * p).sum().item()


# --- figures -----------------------------------------------------------------------------------

@torch.no_grad()
def snapshot(samples, D, data):
    """For a panel: 36 pictures; or points, and D's probability of "real" on 60 x 60 places."""
    if not isinstance(data, Mixture):
        return {"samples": common.to_uint8(samples[:36]).cpu()}
    line = torch.linspace(-data.side, data.side, 60, device=samples.device)
    places = torch.cartesian_prod(line, line).flip(1)  # (x, y), row by row
    return {"samples": samples.cpu(), "levels": D(places).sigmoid().reshape(60, 60).cpu()}


def plot_snapshot(ax, data, samples, levels=None):
    """Pictures; or points over the centres of a Mixture, in the square of +-data.side, and D's
    probability of real: red 0.35 and less, white 1/2, blue 0.65 and more."""
    if not isinstance(data, Mixture):
        return common.panel(samples, columns=6)(ax)
    if levels is not None:
        line = torch.linspace(-data.side, data.side, 60).numpy()
        heights = torch.linspace(0, 1, 21).numpy()
        ax.contourf(line, line, levels.numpy(), heights, cmap="RdBu", vmin=0.35, vmax=0.65,
                    alpha=0.7)
        ax.contour(line, line, levels.numpy(), heights, colors="grey", linewidths=0.3)
    ax.scatter(*data.centres.cpu().T.numpy(), s=70, facecolors="none", edgecolors="black",
               linewidths=0.6)
    ax.scatter(*samples.T.numpy(), s=2, color="black", linewidths=0)
    limits = -data.side, data.side
    ax.set(xlim=limits, ylim=limits, xticks=[], yticks=[], aspect="equal")


def caption(row):
    """A panel's title: the step of a row of the log, and what was measured after it."""
    found = [f"{key} {row[key]:.3g}" for key in ("modes", "classes", "good") if key in row]
    return f"step {row['step']:,}\n{', '.join(found)}"


def plot_process(run, args, data):
    """process.png: a row for each model, with the data and its SNAPSHOTS from left to right."""
    shown = {math.ceil(share * args.steps) for share in SNAPSHOTS}
    examples = data.examples if isinstance(data, Mixture) else data.x[:36]
    rows = []
    for name, snapshots in snapshots_of(run).items():
        cells = [("data\n", partial(plot_snapshot, data=data, samples=examples))]
        cells += [(title, partial(plot_snapshot, data=data, **panel))
                  for step, (title, panel) in snapshots.items() if step in shown]
        rows.append((name, cells))
    title = f"Unrolled GAN on {data.name}, {args.method} gradient, seed {args.seed}"
    if isinstance(data, Mixture):
        title += ("\ndots: samples; circles: modes; D says blue: real, white: 1/2, red: fake\n"
                  "good: share of samples within 3 standard deviations of a mode; modes: number of "
                  "modes with a good sample")
    common.save_panels(args.out / "process.png", rows, title)


def save_animation(run, args, data):
    """process.gif: the training runs side by side, five snapshots a second."""
    snapshots, frames = snapshots_of(run), []
    fig, axes = common.figure(1, len(snapshots), 2.4 * len(snapshots), 3.4, "circles: modes of "
                              "the data, dots: samples; D says blue: real, red: fake")
    for step in next(iter(snapshots.values())):
        for ax, (name, by_step) in zip(axes[0], snapshots.items()):
            ax.clear()
            title, panel = by_step[step]
            plot_snapshot(ax, data, **panel)
            ax.set_title(f"{name}\n{title}", fontsize=9)
        fig.savefig(png := io.BytesIO(), dpi=80)
        frames.append(Image.open(png))
    duration = [200] * (len(frames) - 1) + [2000]  # milliseconds
    print("wrote", common.write(lambda f: frames[0].save(
        f, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0),
        args.out / "process.gif"))


def snapshots_of(run):
    """{model: {step: what is shown}} of the finished training runs and of the current one."""
    done = {name: numbers["snapshots"] for name, numbers in run.done.items()}
    return done if run.name in done else done | {run.name: run.extra}


# --- main --------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = common.parser(__doc__, __file__, data="ring", data_help="ring, grid (points in the plane), "
                      "mnist, fashion, cifar10, digits (synthetic), a folder of pictures")
    g = p.add_argument_group("models and training")
    usual = {name: f"(ring: {RING[name]}; pictures: {PICTURES[name]})" for name in RING}
    add, whole, real = g.add_argument, partial(common.number, int), partial(common.number, float)
    add("-k", type=whole(0), nargs="+", metavar="K",
        help=f"unrolled steps of D: one model for each {usual['k']}")
    add("--beta1", type=real(0, 0.999), nargs="+", metavar="B",
        help=f"Adam's momentum: one for all K, or one for each {usual['beta1']}")
    add("--method", choices=["exact", "rollback"], default="exact",
        help="exact: G's gradient flows through D's k steps")
    add("--eta", type=real(above=0), help=f"size of an unrolled step {usual['eta']}")
    add("--steps", type=whole(1), help=f"training steps for each model {usual['steps']}")
    add("--batch", type=whole(2), help=f"points or pictures in a batch {usual['batch']}")
    add("--z-dim", type=whole(1), help=f"length of z {usual['z_dim']}")
    add("--g-steps", type=whole(1), default=1, help="steps of G in each training step")
    add("--d-steps", type=whole(1), default=1, help="steps of D in each training step")
    p.set_defaults(n_samples=N_SAMPLES)
    args = common.parse(p, argv, quick=dict(steps=20, n_samples=1000))
    defaults = {"ring": RING, "grid": RING | {"steps": 12_000}}.get(args.data, PICTURES)
    if args.k or args.beta1:  # then each k once, with one beta1
        defaults = defaults | dict(k=sorted(set(defaults["k"])), beta1=defaults["beta1"][:1])
    for name, default in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, default)
    if len(args.beta1) not in (1, len(args.k)):
        p.error(f"--beta1 has {len(args.beta1)} values and -k {len(args.k)}: give one, or as many")
    args.beta1 = args.beta1 * (len(args.k) // len(args.beta1))
    return args


def main(argv=None):
    args = parse_args(argv)
    run = common.Run(args)
    if args.data in ("ring", "grid"):
        centres, std = (ring(), 0.02) if args.data == "ring" else (grid(), 0.05)
        data = Mixture(args.data + " (quick run)" * args.quick, centres.to(run.device), std,
                       args.batch // common.WORLD, gaussian_mixture(centres, std, 1000),
                       1.5 * centres.abs().max().item())
    else:
        data = common.load_images(args, run.device)
    models = {f"k={k}, beta1={b:g}": (k, b) for k, b in zip(args.k, args.beta1)}
    for name in run.each(models):
        k, beta1 = models[name]
        G, z_fixed = train(run, args, data, k, beta1)
        samples = generate(G, z_fixed)
        common.save(samples.cpu() if isinstance(data, Mixture) else common.to_uint8(samples).cpu(),
                    args.out / f"samples_k{k}_beta{beta1:g}.pt")
        common.save(G.state_dict(), args.out / f"weights_k{k}_beta{beta1:g}.pt")
        run.done[name] = {"snapshots": run.extra, **measure(samples, data)}

    columns = [key for key in next(iter(run.done.values())) if key != "snapshots"]
    if isinstance(data, Mixture):
        save_animation(run, args, data)
    common.print_table([f"{data.name}: model", *columns], [
        [name, *(f"{numbers[column]:.4g}" for column in columns)]
        for name, numbers in run.done.items()])


if __name__ == "__main__":
    main()
