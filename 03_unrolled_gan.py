r"""03 - Unrolled GAN: G anticipates how D will react.

Paper    Metz, Poole, Pfau, Sohl-Dickstein 2017, arXiv:1611.02163, section 2
Game     f(θ_G, θ_D) = E log σ(D(x)) + E log(1 - σ(D(G(z))))       -> value()
         θ: weights; σ: the sigmoid. D returns logits and maximises f.
Idea     θ_D^k: θ_D after k steps θ <- θ + η ∇ f(θ_G, θ) in θ       -> unroll()
         G minimises f(θ_G, θ_D^k(θ_G)), so that its loss takes D's reaction
         into account; D takes one step. k = 0: plain GAN  -> unrolled_loss_g()
See      process.gif: three GANs on a ring of 8 modes (clusters of the data).
         With momentum, Adam's beta1 = 0.7, the plain GAN collapses: it covers
         0 or 1 mode. Unrolled (k = 5) it covers 8, and 96 % of the samples are
         good: within 3 standard deviations of a mode. The plain GAN *without*
         momentum covers 8 as well, with 95 to 96 %, in a quarter of the time.
Differs  The authors' notebook has beta1 = 0.5; with it 1 of 10 seeds does not
         collapse here. G is trained on -E log σ(D(G(z))) at θ_D^k, the non-
         saturating loss. D has one hidden layer. On pictures beta1 is 0.
Try      --beta1 0 -k 0: does the plain GAN still collapse? And what does
         --method rollback lose? Predict, then run.
Run      python 03_unrolled_gan.py
         python 03_unrolled_gan.py --data mnist
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

import common

# Defaults for every model; a flag (-k, --beta1, --steps, --batch, --eta, --z-dim) overrides one.
POINTS = dict(k=[0, 0, 5], beta1=[0.7, 0.0, 0.7], steps=9000, batch=256, eta=0.1, z_dim=4,
              lr_g=2e-3, lr_d=1e-3, averaged=False)
# One unrolled step changes D's logit by about eta ‖x‖² (784 eta for a digit): eta must be small.
PICTURES = dict(k=[0, 2], beta1=[0.0], steps=1600, batch=64, eta=0.005, z_dim=50, lr_g=2e-3,
                lr_d=5e-4, averaged=True)
SETTINGS = {"ring": POINTS, "grid": POINTS | dict(steps=12_000)}
D_HIDDEN = 256                   # width of the hidden layer of the D of points
CURVES = {"loss_g": "loss of G, nats", "f": "f, the value of the game, nats\n(dotted: D says 1/2)",
          "kl": "KL to equal shares, nats", "good": "good: share within\n3 standard deviations",
          "distance": "distance to the data"}    # what stands above the panels of curves.png
N_SAMPLES = 10_000               # for the numbers and the files of samples
SHOTS = (0.025, 0.1, 0.25, 0.5, 1.0)  # shares of the training after which a picture is kept


# --- the idea ----------------------------------------------------------------------------------

def value(D, theta, x, x_fake):
    """f(θ_G, θ_D) = mean log σ(D(x)) + mean log(1 - σ(D(x_fake))). A scalar <= 0, in nats.

    D returns logits [B]; theta: its parameters by name; x, x_fake: [B, ...], [B', ...]. D sees both
    as one batch, so that batch norm has the statistics of both. D maximises f, G minimises it.
    f = -2 log 2 = -1.386 when D cannot tell the two apart.
    """
    # functional_call: D as a function of its input and of the weights theta, which need not be
    # the ones that D holds.
    logits = torch.func.functional_call(D, theta, (torch.cat([x, x_fake]),))
    logits_real, logits_fake = logits.split([len(x), len(x_fake)])
    return F.logsigmoid(logits_real).mean() + F.logsigmoid(-logits_fake).mean()


def unroll(D, x, x_fake, k, eta, exact=True):
    """θ_D^k: D's parameters (by name) after k ascent steps of size eta on f of this one batch.

    f is that of value(). exact: the result is a differentiable function of x_fake, and through it
    of θ_G. Otherwise it is a constant. Frozen parameters stay as they are, and so do parameters
    that the logits do not use. The dict has copies of D's buffers as well, which batch norm and
    spectral norm update in every pass: D itself is not changed.
    """
    theta = dict(D.named_parameters()) | {name: b.clone() for name, b in D.named_buffers()}
    learned = [name for name, p in theta.items() if p.requires_grad]
    x_fake = x_fake if exact else x_fake.detach()
    for _ in range(k):
        grads = torch.autograd.grad(value(D, theta, x, x_fake), [theta[name] for name in learned],
                                    create_graph=exact,  # keep the graph of the gradient itself
                                    materialize_grads=True)  # 0 for what the logits do not use
        theta |= {name: theta[name] + eta * g for name, g in zip(learned, grads)}
        if not exact:
            theta |= {name: theta[name].detach().requires_grad_() for name in learned}
    return theta


def unrolled_loss_g(D, x, x_fake, k, eta, exact=True, saturating=True):
    """f(θ_G, θ_D^k(θ_G)), to be minimised by G. k = 0 is the plain GAN.

    exact: its gradient in θ_G is ∂f/∂θ_G + ∂f/∂θ_D^k · dθ_D^k/dθ_G; the second term is D's answer.
    Otherwise ("rollback") θ_D^k is a constant, as if one trained a copy of D for k steps.
    saturating=False, as this chapter trains: -mean log σ(D(x_fake)) at the same θ_D^k, whose slope
    does not vanish where D is sure of a fake. D's weights stay as they are; for its .grad to stay
    empty, too, ask for G's gradient alone: loss.backward(inputs=list(G.parameters())).
    """
    theta = unroll(D, x, x_fake, k, eta, exact)
    if saturating:
        return value(D, theta, x, x_fake)
    return -F.logsigmoid(torch.func.functional_call(D, theta, (x_fake,))).mean()


# --- model -------------------------------------------------------------------------------------

class Scale(nn.Module):
    """x -> factor * x."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def plane_nets(d_z):
    """For points in the plane: G [B, d_z] -> [B, 2], D [B, 2] -> logits [B]. Orthogonal start.

    D has one hidden layer on purpose: with two, the plain GAN reaches all 8 modes of the ring. G is
    continuous, so it draws something between two modes; a short z and large weights at the start
    (gain 1.6) make that a smaller share. x / 4 brings the data to a scale of 1.
    """
    G = nn.Sequential(nn.Linear(d_z, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
                      nn.Linear(128, 2))
    D = nn.Sequential(Scale(1 / 4), nn.Linear(2, D_HIDDEN), nn.ReLU(), nn.Linear(D_HIDDEN, 1),
                      nn.Flatten(0))                                         # [B]
    for layers, gain in ((G[:-1], 1.6), ([G[-1], *D], 0.8)):
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight, gain)
                nn.init.zeros_(layer.bias)
    return G, D


def image_nets(d_z, c, h, w):
    """For pictures: G [B, d_z] -> [B, c, h, w], D [B, c, h, w] -> logits [B].

    G: fully connected layers, then transposed convolutions, for MNIST 675,025 parameters, as in a
    coursework. Without two additions it drew only blots in 1,500 steps: batch norm (here without
    parameters), and a start with draws of N(0, 0.02²).
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
        nn.Linear(c * h * w, 512), nn.LeakyReLU(0.2),
        nn.Linear(512, 512), nn.LeakyReLU(0.2),
        nn.Linear(512, 1), nn.Flatten(0))                                    # [B]
    for layer in [*G, *D]:
        if isinstance(layer, (nn.Linear, nn.ConvTranspose2d)):  # as in DCGAN
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return G.to(memory_format=torch.channels_last), D  # faster on the CPU


# --- train -------------------------------------------------------------------------------------

def train(run, args, data, k, beta1):
    """Trains one GAN with k unrolled steps of D; returns G and the z of its samples.

    beta1: Adam's momentum, the weight of the previous steps in its running mean of the gradient.
    run logs, saves and plots. run.note adds to the row of this step; run.kept is for the figures.
    """
    torch.manual_seed(args.seed)  # every model starts from the same networks
    G, D = (net.to(run.device) for net in data.nets())
    opt_g, opt_d = (torch.optim.Adam(net.parameters(), lr=lr, betas=(beta1, 0.999), fused=True)
                    for net, lr in ((G, args.lr_g), (D, args.lr_d)))
    rate_g, rate_d = (common.fading(opt, args.steps) for opt in (opt_g, opt_d))
    average = common.average_of(G, args.steps * args.g_steps)
    drawing_g = average.module if args.averaged else G
    z_fixed = torch.randn(args.n_samples, args.z_dim).to(run.device)  # the same for every model
    batches = data.batches(run)

    for _ in run.steps(args.steps, G=G, D=D, average=average, opt_g=opt_g, opt_d=opt_d,
                       rate_g=rate_g, rate_d=rate_d):
        # G descends its loss at θ_D^k(θ_G); the gradient is asked for G alone, D stays untouched
        for _ in range(args.g_steps):
            x = next(batches)
            x_fake = G(torch.randn(len(x), args.z_dim, device=run.device))
            loss_g = unrolled_loss_g(D, x, x_fake, k, args.eta, exact=args.method == "exact",
                                     saturating=False)
            opt_g.zero_grad()
            loss_g.backward(inputs=tuple(G.parameters()))
            opt_g.step()
            average.update_parameters(G)

        # D climbs f(θ_G, θ_D): one ordinary step, from where it was
        for _ in range(args.d_steps):
            x = next(batches)
            x_fake = G(torch.randn(len(x), args.z_dim, device=run.device))
            loss_d = -value(D, dict(D.named_parameters()), x, x_fake.detach())
            opt_d.zero_grad()
            loss_d.backward()
            opt_d.step()

        rate_g.step()
        rate_d.step()
        run.log(loss_g=loss_g, f=-loss_d)
        if run.due(40) or run.at(SHOTS):  # 40 times in the training, and after its SHOTS
            few = generate(drawing_g, z_fixed[:1000])
            run.note(**data.measure(few))
            run.kept[run.step] = {"numbers": run.rows[-1], "picture": data.shot(few, D)}
        if run.at(SHOTS):
            draw_process(args, data, all_shots(run))

    return drawing_g, z_fixed


@torch.no_grad()
def generate(G, z):
    """G(z), a thousand at a time, which share the statistics of batch norm."""
    return torch.cat([G(part) for part in z.split(1000)])


# --- measures ----------------------------------------------------------------------------------

class Points:
    """The ring of 8 or the grid of 25 Gaussians in the plane: data, networks, measures."""
    legend = ("dots: samples; circles: modes; D says blue: real, white: 1/2, red: fake",
              "good: share of samples within 3 standard deviations of a mode; modes: how many have "
              "at least one good sample")

    def __init__(self, run, args):
        self.args, self.name = args, args.data
        self.centres, self.std = {"ring": (common.ring(), 0.02),
                                  "grid": (common.grid(), 0.05)}[args.data]
        self.reach = 1.5 * self.centres.abs().max().item()  # half a side of the plots
        self.examples = common.gaussian_mixture(self.centres, self.std, 1000)
        self.on_device = self.centres.to(run.device)

    def nets(self):
        return plane_nets(self.args.z_dim)

    def batches(self, run):
        while True:  # run.part: all of the batch, or with several processes the part of this one
            yield common.gaussian_mixture(self.on_device, self.std, run.part(self.args.batch))

    def measure(self, samples):
        return mode_report(samples, self.on_device, self.std)

    def as_file(self, samples):
        return samples.cpu()

    @torch.no_grad()
    def shot(self, samples, D):
        """The samples, and D's probability of real on a grid of 60 x 60 places."""
        line = torch.linspace(-self.reach, self.reach, 60)
        places = torch.cartesian_prod(line, line).flip(1).to(samples.device)  # (x, y), row by row
        return {"points": samples.cpu(), "levels": D(places).sigmoid().reshape(60, 60).cpu()}

    def draw(self, points, levels=None):
        return lambda ax: common.draw_points(ax, points, self.centres, self.reach, levels)


class Pictures:
    """Any data set of pictures whose sides are divisible by 4. The same methods as Points."""

    def __init__(self, run, args):
        self.args, self.images = args, common.load_images(args, run.device)
        self.legend = () if self.images.y is None else (
            "classes: how many occur among the nearest training pictures of the samples",)
        self.name, self.examples = self.images.name, self.images.x[:36]
        h, w = self.images.x.shape[2:]
        if h % 4 or w % 4:
            common.fail(f"the pictures are {w}x{h}, G needs sides divisible by 4: change --size")
        common.check_batch(args, self.images, "batch norm needs more than one picture")

    def nets(self):
        return image_nets(self.args.z_dim, *self.images.x.shape[1:])

    def batches(self, run):
        return (x for x, _ in run.batches(self.images, self.args.batch))

    def measure(self, samples):
        return class_report(samples, self.images)

    def as_file(self, samples):
        return common.to_uint8(samples).cpu()

    def shot(self, samples, D):
        return {"pictures": common.to_uint8(samples[:36]).cpu()}

    def draw(self, pictures):
        return common.panel(pictures, columns=6)


def mode_report(x, centres, std):
    """Which modes of a mixture samples x [N, 2] reach; good = within 3 std of the nearest centre.

    modes: how many centres have a good sample among the first 2,500 (while training, of 1,000);
    good: share of good samples, 0..1; kl: KL(shares of the modes among them ‖ equal shares), nats.
    """
    distance, nearest = torch.cdist(x, centres).min(dim=1)
    good = distance < 3 * std
    return {"modes": nearest[:2500][good[:2500]].unique().numel(),
            "good": good.float().mean().item(),
            "kl": kl_to_uniform(torch.bincount(nearest[good], minlength=len(centres)))}


def class_report(x, images):
    """The classes of samples x [N, C, H, W]: a sample has that of its nearest training picture.

    classes: how many occur; kl: of their histogram to uniform, nats (both only where the data has
    classes); distance: to that picture, mean over the samples.
    """
    distance, nearest = common.nearest(x, images)
    numbers = {"distance": distance.mean().item()}
    if images.y is None:
        return numbers
    counts = torch.bincount(images.y[nearest], minlength=int(images.y.max()) + 1)
    return {"classes": int((counts > 0).sum()), "kl": kl_to_uniform(counts), **numbers}


def kl_to_uniform(counts):
    """Σ p log(K p), nats, p = counts / sum: 0 if all K are equal, log K if one has all."""
    if counts.sum() == 0:
        return math.nan  # no sample was counted: there is no histogram
    p = counts.cpu().double()
    p = p / p.sum()
    return torch.special.xlogy(p, len(p) * p).sum().item()


# --- figures -----------------------------------------------------------------------------------

def all_shots(run):
    """Snapshots by k and step: of the finished training runs, and of the one that goes on."""
    shots = {name: numbers["shots"] for name, numbers in run.done.items()}
    return shots if run.name in shots else shots | {run.name: run.kept}


def draw_process(args, data, shots):
    """process.png: training from left to right, a row for each model."""
    shown = [math.ceil(share * args.steps) for share in SHOTS]
    rows = []
    for name, by_step in shots.items():
        cells = [("data\n", data.draw(data.examples))]
        cells += [(caption(shot["numbers"]), data.draw(**shot["picture"]))
                  for shot in (by_step[step] for step in shown if step in by_step)]
        rows.append((name, cells))
    title = "\n".join([title_of(args, data), *data.legend])
    first = len(shots) == 1 and len(rows[0][1]) == 2  # of many drawings: say where it is, once
    common.save_panels(args.out / "process.png", rows, title, tell=first)


def draw_animation(args, data, shots):
    """process.gif: the training on points, the models side by side."""
    frames = []
    for step in next(iter(shots.values())):
        fig, axes = common.figure(1, len(shots), 2.4 * len(shots), 2.9)
        for ax, (name, by_step) in zip(axes[0], shots.items()):
            data.draw(**by_step[step]["picture"])(ax)
            ax.set_title(f"{name}\n{caption(by_step[step]['numbers'], ', ')}", fontsize=9)
        frames.append(fig)
    common.save_animation(frames, args.out / "process.gif")


def title_of(args, data):
    return f"Unrolled GAN on {data.name}, {args.method} gradient, seed {args.seed}"


def caption(numbers, between="\n"):
    """The step of a snapshot, and what was measured there."""
    shown = [f"{key} {numbers[key]:.3g}" for key in ("modes", "classes", "good") if key in numbers]
    return between.join([f"step {numbers['step']:,}", ", ".join(shown)])


# --- main --------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = common.parser(__doc__, __file__, data="ring", data_help="ring, grid (points in the plane), "
                      "mnist, fashion, cifar10, digits (drawn, no download), a folder of pictures")
    g = p.add_argument_group("unrolling")
    g.add_argument("-k", type=common.number(int, 0), nargs="+", metavar="K",
                   help="unrolled steps of D, one model for each K; if not given: 0 5, for "
                   "pictures 0 2")
    g.add_argument("--beta1", type=common.number(float, 0, 0.999), nargs="+", metavar="B",
                   help="Adam's momentum: one for all K, or one for each; if not given: 0.7, for "
                   "pictures 0 (a run on points with neither flag adds K = 0 without momentum)")
    g.add_argument("--method", choices=["exact", "rollback"], default="exact",
                   help="does G's gradient flow through the unrolled steps?")
    g.add_argument("--eta", type=common.number(float, above=0),
                   help="size of an unrolled step; if not given: 0.1, for pictures 0.005")
    g.add_argument("--steps", type=common.number(int, 1), help="training steps for each k; if not "
                   "given: 9000, for the grid 12000, for pictures 1600")
    g.add_argument("--batch", type=common.number(int, 1), help="points or pictures in a batch; if "
                   "not given: 256, for pictures 64")
    g.add_argument("--z-dim", type=common.number(int, 1), help="length of z; if not given: 4, for "
                   "pictures 50")
    g.add_argument("--g-steps", type=common.number(int, 1), default=1,
                   help="steps of G in each training step")
    g.add_argument("--d-steps", type=common.number(int, 1), default=1,
                   help="steps of D in each training step")
    p.set_defaults(n_samples=N_SAMPLES)
    args = common.parse(p, argv, quick=dict(steps=20, n_samples=1000))
    defaults = SETTINGS.get(args.data, PICTURES)
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
    with common.Run(args) as run:
        data = (Points if args.data in SETTINGS else Pictures)(run, args)
        models = {f"k={k}, beta1={b:g}": (k, b) for k, b in zip(args.k, args.beta1)}
        for name in run.each(models):
            k, beta1 = models[name]
            G, z_fixed = train(run, args, data, k, beta1)
            samples = generate(G, z_fixed)
            common.save(data.as_file(samples), args.out / f"samples_k{k}_beta{beta1:g}.pt")
            common.save(G.state_dict(), args.out / f"weights_k{k}_beta{beta1:g}.pt")
            run.done[name] = {"shots": run.kept, **data.measure(samples)}
        common.plot_curves(args.out / "curves.png", run.rows, {
            column: CURVES.get(column, column) for column in run.rows[0]
            if column not in ("model", "step")},
            title_of(args, data), marks={"f": -2 * math.log(2)})
        if isinstance(data, Points):
            draw_animation(args, data, all_shots(run))
        columns = [key for key in next(iter(run.done.values())) if key != "shots"]
        common.print_table([f"{data.name}: model", *columns], [
            [name, *(f"{numbers[column]:.4g}" for column in columns)]
            for name, numbers in run.done.items()])


if __name__ == "__main__":
    common.as_script(main)
