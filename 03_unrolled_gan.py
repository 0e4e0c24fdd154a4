r"""03 - Unrolled GAN: let G see how D will answer.

Paper    Metz, Poole, Pfau, Sohl-Dickstein 2017, arXiv:1611.02163, section 2.
Game     f(θ_G, θ_D) = E log σ(D(x)) + E log(1 - σ(D(G(z)))):  D climbs, G descends   -> value()
Idea     θ_D^0 = θ_D,  θ_D^{j+1} = θ_D^j + η ∇_{θ_D} f(θ_G, θ_D^j)                    -> unroll()
         G descends f(θ_G, θ_D^k(θ_G)); then D takes one step from θ_D     -> unrolled_loss_g()
         k = 0 is the plain GAN. Large k comes near f against a D that answers perfectly: G cannot
         win by running to one mode any more, because it sees D follow.
See      process.png: training from left to right, k = 0 above k = 5, with D's level lines;
         curves.png, log.csv, samples_k{k}.pt, weights_k{k}.pt (of G). Printed: modes reached of 8,
         share of samples within 3 standard deviations of a mode (good), KL of the modes' histogram
         to uniform in nats.
         Measured, seeds 0 to 4: 0 or 1 modes and below 1 % good at k = 0, 8 modes and 91 to 94 % at
         k = 5, with --method rollback 8 and 90 to 93 %: here it is enough to meet the D of later,
         without the gradient through it. What misses are the bridges: G is continuous.
Time     113 to 154 s on 2 CPU cores; --data grid 182 s, --data mnist 203 s; --quick 11 to 22 s.
Differs  plain gradient steps inside the unroll and Adam outside; rates of 3e-3 and 1e-3 that fall
         along a cosine, z of 16, batches of 128 (1e-4, 256, 512 there); D has one hidden layer of
         512; on pictures G uses the non-saturating loss at the same θ_D^k.
Run      python 03_unrolled_gan.py -k 0 1 5
         python 03_unrolled_gan.py --data mnist
"""

import math
from typing import Callable, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import common

SETTINGS = {  # one setting for every k; both rates fall to 0 along a cosine
    "ring": dict(k=[0, 5], steps=5000, batch=128, d_z=16, lr_g=3e-3, lr_d=1e-3, beta1=0.5,
                 eta=0.1, saturating=True),
    "grid": dict(k=[0, 5], steps=8000, batch=128, d_z=16, lr_g=3e-3, lr_d=1e-3, beta1=0.5,
                 eta=0.1, saturating=True),
    # a step of eta moves D(x) by about eta |x|^2, and |x|^2 is near 784: eta must be small here
    "images": dict(k=[0, 2], steps=1200, batch=64, d_z=50, lr_g=5e-4, lr_d=5e-4, beta1=0.0,
                   eta=0.005, saturating=False),
}
D_HIDDEN = 512
N_SAMPLES = 10_000               # for the numbers and samples_k{k}.pt
SHOTS = (0.025, 0.1, 0.25, 0.5, 1.0)  # shares of the training after which a picture is kept


# --- the idea ----------------------------------------------------------------------------------

def value(D, theta, x, x_fake):
    """f(θ_G, θ_D) = mean log σ(D(x)) + mean log(1 - σ(D(x_fake))). A scalar <= 0, in nats.

    D returns logits [B]; theta: its parameters by name; x, x_fake: [B, ...], equal shapes.
    D maximises it, G minimises it. -2 log 2 = -1.386 when D cannot tell the two apart.
    """
    logits = torch.func.functional_call(D, theta, (torch.cat([x, x_fake]),))  # one pass
    logits_real, logits_fake = logits.split(len(x))
    return F.logsigmoid(logits_real).mean() + F.logsigmoid(-logits_fake).mean()


def unroll(D, x, x_fake, k, eta, exact=True):
    """θ_D^k: D's parameters (dict by name) after k gradient ascent steps of size eta on f.

    exact: the result is a differentiable function of x_fake, so of θ_G (double backward).
    Otherwise it is a constant. D itself is not changed either way.
    """
    theta = dict(D.named_parameters())
    x_fake = x_fake if exact else x_fake.detach()
    for _ in range(k):
        grads = torch.autograd.grad(value(D, theta, x, x_fake), tuple(theta.values()),
                                    create_graph=exact)
        theta = {name: p + eta * g for (name, p), g in zip(theta.items(), grads)}
        if not exact:
            theta = {name: p.detach().requires_grad_() for name, p in theta.items()}
    return theta


def unrolled_loss_g(D, x, x_fake, k, eta, exact=True, saturating=True):
    """f(θ_G, θ_D^k(θ_G)), to be minimised by G. k = 0 is the plain GAN.

    exact: the gradient also flows through θ_D^k, so G feels how D will answer.
    Otherwise "rollback": G steps against the D of k steps ahead as if it stood there for ever,
    which is what training a copy of D and putting the old one back does.
    saturating=False: -mean log σ(D(x_fake)) at the same θ_D^k, which still has a gradient where
    D is sure of itself: on pictures D soon is, and f freezes near 0.
    """
    theta = unroll(D, x, x_fake, k, eta, exact)
    if saturating:
        return value(D, theta, x, x_fake)
    return -F.logsigmoid(torch.func.functional_call(D, theta, (x_fake,))).mean()


# --- model -------------------------------------------------------------------------------------

def plane_nets(d_z):
    """Plane points. G: d_z -> 2; D: a single hidden layer on x / 4. ReLU, orthogonal start.

    With a second hidden layer in D the plain GAN does not collapse (8 of 8 modes, 88 % good, seed
    0), and there is nothing to show; with tanh for ReLU it still does (2 modes).
    """
    G = nn.Sequential(nn.Linear(d_z, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
                      nn.Linear(128, 2))
    D = nn.Sequential(Scale(1 / 4), nn.Linear(2, D_HIDDEN), nn.ReLU(), nn.Linear(D_HIDDEN, 1),
                      nn.Flatten(0))                                         # [B]
    for layer in [*G, *D]:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, gain=0.8)
            nn.init.zeros_(layer.bias)
    return G, D


class Scale(nn.Module):
    """x -> factor * x."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def image_nets(d_z, c, h, w):
    """The coursework's networks: for MNIST G has 675,025 parameters and D 1,460,225.

    Added: batch norm without parameters in G and a normal start of 0.02; without the two no digits
    came in 1,500 steps, only blots, nearly the same for every z.
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
        nn.Linear(c * h * w, 1024), nn.LeakyReLU(0.2), nn.Dropout(0.1),
        nn.Linear(1024, 512), nn.LeakyReLU(0.2), nn.Dropout(0.1),
        nn.Linear(512, 256), nn.LeakyReLU(0.2), nn.Dropout(0.1),
        nn.Linear(256, 1), nn.Flatten(0))                                    # [B]
    for layer in [*G, *D]:
        if isinstance(layer, (nn.Linear, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return G.to(memory_format=torch.channels_last), D  # its few channels run faster side by side


# --- data and measures -------------------------------------------------------------------------

class Task(NamedTuple):
    """All that differs between points and pictures."""
    name: str
    nets: Callable      # () -> G, D
    batches: Callable   # number of the first batch -> endless batches of data
    measure: Callable   # samples -> dict of numbers
    keep: Callable      # samples -> what samples_k{k}.pt holds
    snapshot: Callable  # samples, D -> dict of tensors
    draw: Callable      # snapshot, or None for the data -> function that fills a panel


def plane_task(args, setting, device):
    """The ring of 8 or the grid of 25 Gaussians."""
    centres, std = {"ring": (common.ring(), 0.02), "grid": (common.grid(), 0.05)}[args.data]
    reach = 1.5 * centres.abs().max().item()
    line = torch.linspace(-reach, reach, 60)
    places = torch.cartesian_prod(line, line).flip(1).to(device)  # (x, y), row by row
    data = common.gaussian_mixture(centres, std, 1000)
    on_device = centres.to(device)

    def batches(_):
        while True:
            yield common.gaussian_mixture(on_device, std, args.batch)

    @torch.no_grad()
    def snapshot(samples, D):
        return {"points": samples.cpu(), "levels": D(places).reshape(60, 60).cpu()}

    def draw(shot):
        points, levels = (shot["points"], shot["levels"]) if shot else (data, None)
        return lambda ax: common.draw_points(ax, points, centres, reach, levels)

    return Task(args.data, lambda: plane_nets(setting["d_z"]), batches,
                lambda x: mode_report(x, on_device, std), lambda x: x, snapshot, draw)


def image_task(args, setting, device):
    """Pictures of any data set whose sides are divisible by 4."""
    images = common.load_images(args, device)
    c, h, w = images.x.shape[1:]
    if h % 4 or w % 4:
        common.fail(f"the pictures are {w}x{h}, G needs sides divisible by 4: change --size")

    def batches(first):
        return (x for x, _ in common.batches(images, args.batch, args.seed, first))

    def snapshot(samples, _):
        return {"pictures": common.to_uint8(samples[:36]).cpu()}

    def draw(shot):
        return common.panel(shot["pictures"] if shot else images.x[:36], columns=6)

    return Task(images.name, lambda: image_nets(setting["d_z"], c, h, w), batches,
                lambda x: class_report(x, images), common.to_uint8, snapshot, draw)


def mode_report(x, centres, std):
    """Which modes of a mixture samples x [N, 2] reach; good = within 3 std of the nearest centre.

    modes: centres with a good sample among the first 2,500 (the protocol of VEEGAN);
    good: share of good samples, 0..1; kl: of the modes' histogram of good samples to uniform, nats.
    """
    distance, nearest = torch.cdist(x, centres).min(dim=1)
    good = distance < 3 * std
    return {"modes": nearest[:2500][good[:2500]].unique().numel(),
            "good": good.float().mean().item(),
            "kl": kl_to_uniform(torch.bincount(nearest[good], minlength=len(centres)))}


def class_report(x, images):
    """The classes of samples x [N, C, H, W] by their nearest of the first 10,000 training pictures.

    classes: those that occur; kl: of the class histogram to uniform, nats (both only where the data
    has classes); distance: to that picture, root mean square in [-1, 1] units, mean over samples.
    """
    train = common.to_float(images.x[:10_000]).flatten(1)
    found = [torch.cdist(part, train).min(dim=1) for part in x.flatten(1).split(1000)]
    distance = torch.cat([f.values for f in found]).mean().item() / train.shape[1] ** 0.5
    if images.y is None:
        return {"distance": distance}
    classes = images.y[torch.cat([f.indices for f in found])]
    counts = torch.bincount(classes, minlength=int(images.y.max()) + 1)
    return {"classes": int((counts > 0).sum()), "kl": kl_to_uniform(counts), "distance": distance}


def kl_to_uniform(counts):
    """Σ p log(K p), nats, p = counts / sum: 0 if all K are equal, log K if one has all."""
    if counts.sum() == 0:
        return math.nan  # no sample was counted: there is no histogram
    p = counts.cpu().double()
    p = p / p.sum()
    return torch.special.xlogy(p, len(p) * p).sum().item()


# --- train -------------------------------------------------------------------------------------

def train(args, setting, task, k, device, saved, done):
    """Trains one GAN with k unrolled steps; returns its log, snapshots and numbers, and writes
    samples_k{k}.pt and weights_k{k}.pt.

    saved: the checkpoint to go on from, or None; done: results of the runs before, kept in it.
    """
    torch.manual_seed(args.seed)  # every k starts from the same networks
    G, D = (net.to(device) for net in task.nets())
    betas = setting["beta1"], 0.999
    opt_g = torch.optim.Adam(G.parameters(), lr=setting["lr_g"], betas=betas, fused=True)
    opt_d = torch.optim.Adam(D.parameters(), lr=setting["lr_d"], betas=betas, fused=True)
    rate_g = torch.optim.lr_scheduler.CosineAnnealingLR(opt_g, args.steps)
    rate_d = torch.optim.lr_scheduler.CosineAnnealingLR(opt_d, args.steps)
    parts = dict(G=G, D=D, opt_g=opt_g, opt_d=opt_d, rate_g=rate_g, rate_d=rate_d)
    z_fixed = torch.randn(args.n_samples, setting["d_z"]).to(device)  # the same for every k

    first, log, shots = 0, [], []
    if saved:
        first, log, shots = saved["step"], saved["log"], saved["shots"]
        common.restore(saved, parts)
    batches = task.batches(first * (args.g_steps + args.d_steps))
    shot_steps = {math.ceil(share * args.steps) for share in SHOTS}
    per_step = args.batch * (args.g_steps + args.d_steps)
    show = common.progress(f"k={k}", args.steps, per_step, first)

    def draw(x):
        """As many of G's as there are in x."""
        return G(torch.randn(len(x), setting["d_z"], device=device))

    with common.ctrl_c() as pressed:
        for step in range(first + 1, args.steps + 1):
            # G descends f(θ_G, θ_D^k(θ_G)); the gradient is asked for G alone, D stays untouched
            for _ in range(args.g_steps):
                x = next(batches)
                loss_g = unrolled_loss_g(D, x, draw(x), k, args.eta, args.method == "exact",
                                         setting["saturating"])
                opt_g.zero_grad()
                loss_g.backward(inputs=tuple(G.parameters()))
                opt_g.step()

            # D climbs f(θ_G, θ_D): one ordinary step, from where it was
            for _ in range(args.d_steps):
                x = next(batches)
                loss_d = -value(D, dict(D.named_parameters()), x, draw(x).detach())
                opt_d.zero_grad()
                loss_d.backward()
                opt_d.step()

            rate_g.step()
            rate_d.step()
            common.check_finite(step, loss_g=loss_g.item(), loss_d=loss_d.item())
            show(step, loss_g=loss_g.item(), f=-loss_d.item())
            if common.due(step, args.steps, 40) or step in shot_steps:
                few = generate(G, z_fixed[:1000])
                numbers = {"k": k, "step": step, "loss_g": loss_g.item(), "f": -loss_d.item(),
                           **task.measure(few)}
                log.append(numbers)
                if step in shot_steps:
                    shots.append({**numbers, **task.snapshot(few, D)})
            if common.due(step, args.steps, 10) or pressed():
                common.save_checkpoint(args, parts, k=k, step=step, log=log, shots=shots, done=done)
            if pressed():
                common.stop(step)

    samples = generate(G, z_fixed)
    common.save(task.keep(samples).cpu(), args.out / f"samples_k{k}.pt")
    common.save(G.state_dict(), args.out / f"weights_k{k}.pt")
    return {"log": log, "shots": shots, **task.measure(samples)}


@torch.no_grad()
def generate(G, z):
    """G(z), a thousand at a time."""
    return torch.cat([G(part) for part in z.split(1000)])


# --- figures -----------------------------------------------------------------------------------

def figures(args, task, done):
    """process.png: training from left to right, a row for each k; curves.png: the log as curves."""
    def caption(shot):
        numbers = [f"{name} {shot[name]:.3g}" for name in ("modes", "classes", "good")
                   if name in shot]
        return f"step {shot['step']:,}\n{', '.join(numbers)}"

    rows = [(f"k = {k}", [("data\n", task.draw(None))]
             + [(caption(shot), task.draw(shot)) for shot in run["shots"]])
            for k, run in done.items()]
    title = f"Unrolled GAN on {task.name}: {args.method}, seed {args.seed}"
    common.save_panels(args.out / "process.png", rows, title)
    log = [row for run in done.values() for row in run["log"]]
    common.plot_curves(args.out / "curves.png", log, list(log[0])[2:], "k", title)
    common.write_log(args.out / "log.csv", log)


# --- main --------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = common.parser(__doc__, __file__, data="ring", data_help="ring, grid (plane points), mnist, "
                      "fashion, cifar10, digits (drawn, no download), or a folder of pictures")
    g = p.add_argument_group("unrolling")
    g.add_argument("-k", type=common.whole_number, nargs="+", metavar="K",
                   help="unrolled steps of D to compare; if not given: 0 5, for pictures 0 2")
    g.add_argument("--method", choices=["exact", "rollback"], default="exact",
                   help="does G's gradient flow through the unrolled steps?")
    g.add_argument("--eta", type=common.positive_float, help="size of an unrolled step")
    g.add_argument("--steps", type=common.positive_int, help="training steps for each k")
    g.add_argument("--batch", type=common.positive_int, help="points or pictures in a batch")
    g.add_argument("--g-steps", type=common.positive_int, default=1, help="G steps per step")
    g.add_argument("--d-steps", type=common.positive_int, default=1, help="D steps per step")
    p.set_defaults(n_samples=N_SAMPLES)
    args = common.parse(p, argv, quick=dict(n_samples=1000))
    setting = SETTINGS.get(args.data, SETTINGS["images"])
    args.k = list(dict.fromkeys(args.k or setting["k"]))
    args.eta = args.eta or setting["eta"]
    args.batch = args.batch or setting["batch"]
    args.steps = args.steps or setting["steps"] // (40 if args.quick else 1)
    return args, setting


def main(argv=None):
    args, setting = parse_args(argv)
    device = common.start(args)
    task = (plane_task if args.data in ("ring", "grid") else image_task)(args, setting, device)
    saved = common.load_checkpoint(args)
    done = saved["done"] if saved else {}
    for k in args.k:
        if k not in done:
            resumed = saved if saved and saved["k"] == k else None
            done[k] = train(args, setting, task, k, device, resumed, dict(done))
    figures(args, task, done)
    columns = [name for name in next(iter(done.values())) if name not in ("log", "shots")]
    common.print_table([f"{task.name}: k", *columns], [
        [k, *(f"{run[column]:.4g}" for column in columns)] for k, run in done.items()])


if __name__ == "__main__":
    main()
