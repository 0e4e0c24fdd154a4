"""What the chapters share: flags, data, pictures, files. No equation of any paper lives here.

A chapter is understood with this file closed. Flat functions; importing it does nothing.
All pictures are uint8 [N, C, H, W] in memory (0..255) and float32 in [-1, 1] in a batch.
"""

import argparse
import contextlib
import csv
import io
import math
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # pictures go to files: no window, no display needed
import matplotlib.pyplot as plt
import torch
from PIL import Image
from torchvision import datasets
from torchvision.transforms import functional as TF
from torchvision.utils import make_grid

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
N_QUICK = 2000  # pictures of each part that --quick takes
WIPE = "\r\033[K"  # on a terminal: back to the start of the line, and empty it
MAY_CHANGE_ON_RESUME = {"out", "data_dir", "device", "resume"}


# --- flags, errors, device ---------------------------------------------------------------------

def say(text, file=None):
    """print(text), in the place of a progress line that stands on the terminal unfinished."""
    file = file or sys.stdout
    print(f"{WIPE * file.isatty()}{text}", file=file)


def fail(message, status=2):
    """Ends the run with one line on stderr; status 2 means that the input was wrong."""
    say(f"error: {message}", sys.stderr)
    raise SystemExit(status)


class OneLineParser(argparse.ArgumentParser):
    """argparse, except that a wrong flag gives one line instead of the whole usage text."""

    def error(self, message):
        fail(f"{message} (see python {self.prog} --help)")


def positive_int(text):
    """argparse type: a whole number >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def whole_number(text):
    """argparse type: a whole number >= 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def seed_number(text):
    """argparse type: a whole number from 0 to 2^31 - 1."""
    if not text.isdecimal() or int(text) >= 2 ** 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2147483647")
    return int(text)


def number(text):
    """A float, or nan if the text is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def positive_float(text):
    """argparse type: a finite number > 0."""
    if not 0 < number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return float(text)


def not_negative(text):
    """argparse type: a finite number >= 0."""
    if not 0 <= number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return float(text)


def share(text):
    """argparse type: a number in [0, 1]."""
    if not 0 <= number(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return float(text)


def parser(doc, file, data=None, data_help="mnist, fashion, cifar10, digits (drawn, no download), "
           "or a folder of pictures; if not given: mnist, or digits if it cannot be had"):
    """A parser with the flags that every chapter has; `doc` becomes the head of --help."""
    script = Path(file).stem

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            shown = action.default not in (None, False)  # "(default: None)" tells nobody anything
            return super()._get_help_string(action) if shown else action.help

    p = OneLineParser(prog=f"{script}.py", description=doc, formatter_class=Formatter)
    g = p.add_argument_group("shared flags")
    g.add_argument("--data", default=data, metavar="NAME", help=data_help)
    g.add_argument("--data-dir", type=Path, default=Path("data"), help="where data sets are kept")
    g.add_argument("--size", type=positive_int, default=64, help="pixels a side, for folders")
    g.add_argument("--out", type=Path, default=Path("out") / script, help="where results go")
    g.add_argument("--seed", type=seed_number, default=0, help="same seed, same CPU: same numbers")
    g.add_argument("--device", help="cpu, cuda, mps; if not given: the GPU if there is one")
    g.add_argument("--resume", action="store_true", help="go on from checkpoint.pt in --out")
    g.add_argument("--quick", action="store_true", help="seconds instead of minutes, same code")
    p.set_defaults(script=script)
    return p


def parse(p, argv, quick):
    """p.parse_args(argv); with --quick the defaults are those of `quick`, what is given stands."""
    args = p.parse_args(argv)
    if args.quick:
        p.set_defaults(**quick)
        args = p.parse_args(argv)
    return args


def short_end(kind, error, trace):
    """sys.excepthook: one line for Ctrl-C between two trainings, where nothing is to be saved."""
    if issubclass(kind, KeyboardInterrupt):
        say("stopped; files are whole, and --resume goes on after the last checkpoint", sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def start(args):
    """Makes the output folder, seeds torch, picks the device and says which; returns the device."""
    sys.excepthook = short_end
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        lock = os.open(args.out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)  # never closed
    except OSError as e:
        fail(f"cannot write to {args.out} ({e.strerror}): choose another folder with --out")
    try:
        import fcntl
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows: nothing refuses a second run there
        pass
    except OSError:
        fail(f"another run is writing to {args.out}: wait for it, or choose another --out")
    for left in args.out.glob("*.[0-9]*.tmp"):  # by a run that was killed while it wrote
        left.unlink()
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        device = torch.device(args.device or best)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):  # not built in, or not in this machine
        fail(f"there is no device {args.device!r} here: leave --device out, or use --device cpu")
    torch.manual_seed(args.seed)
    print(f"device {device}" + (f", {torch.get_num_threads()} threads" * (device.type == "cpu")))
    return device


# --- data --------------------------------------------------------------------------------------

class Images(NamedTuple):
    """A whole data set in memory: x uint8 [N, C, H, W], y int64 [N] or None, name for titles."""
    x: torch.Tensor
    y: torch.Tensor | None
    name: str


def load_images(args, device, train=True):
    """The data set that args.data names, as Images on `device`; says which source it took.

    train: the training or the test part. Of a folder, every tenth picture is the test part.
    Sets args.data to what it took, so that a checkpoint knows.
    """
    name = args.data or "mnist"
    if name == "digits":
        images = load_digits(args, train)
    elif name in ("mnist", "fashion", "cifar10"):
        images = load_torchvision(name, args.data_dir, train)
        if images is None and args.data is None:
            print(f"MNIST is not in {args.data_dir} and cannot be downloaded: using drawn digits")
            name, images = "digits", load_digits(args, train)
            images = images._replace(name="drawn digits (no MNIST here)")
        elif images is None:
            where = {"mnist": "MNIST/raw: the four idx-ubyte files",
                     "fashion": "FashionMNIST/raw: the four idx-ubyte files",
                     "cifar10": "cifar-10-batches-py: the six batch files and batches.meta"}[name]
            fail(f"{name} cannot be downloaded: put it in {args.data_dir}/{where}, or use "
                 "--data digits")
    elif Path(name).is_dir():
        images = load_folder(Path(name), args.size, args.out, train)
    else:
        fail(f"--data {name}: neither a known data set (mnist, fashion, cifar10, digits; "
             "see --help) nor a folder")
    args.data = name
    if args.quick:
        images = images._replace(x=images.x[:N_QUICK], y=None if images.y is None
                                 else images.y[:N_QUICK])
    n, c, h, w = images.x.shape
    print(f"data {images.name}: {n:,} {'training' if train else 'test'} pictures, {c}x{h}x{w}")
    return images._replace(x=images.x.to(device), y=None if images.y is None
                           else images.y.to(device))


def load_torchvision(name, root, train):
    """MNIST, Fashion-MNIST or CIFAR-10 from `root`, downloaded if missing; None if impossible."""
    kind, title = {"mnist": (datasets.MNIST, "MNIST"),
                   "fashion": (datasets.FashionMNIST, "Fashion-MNIST"),
                   "cifar10": (datasets.CIFAR10, "CIFAR-10")}[name]
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds: a silent network must not hang the run
    try:
        for download in (False, True):
            with contextlib.suppress(RuntimeError, OSError, ValueError, EOFError), \
                    contextlib.redirect_stdout(io.StringIO()):
                data = kind(root, train=train, download=download)
                x = torch.as_tensor(data.data)
                x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)
                return Images(x.contiguous(), torch.as_tensor(data.targets), title)
    finally:
        socket.setdefaulttimeout(before)
    return None


def load_folder(folder, size, out, train):
    """Every picture below `folder` as RGB, centre-cropped to a square and resized to `size`.

    Decoded once, then kept in `out`/pictures.pt until a file of the folder changes.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES)
    if len(files) < 2:
        fail(f"{folder} holds {len(files)} pictures ({', '.join(sorted(PICTURE_SUFFIXES))}): "
             "give a folder with at least 2")
    if not train and len(files) < 10:
        fail(f"{folder} holds {len(files)} pictures, and every tenth is kept for tests: give a "
             "folder with at least 10")
    stamp = [size, *((str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files)]
    kept = out / "pictures.pt"
    x = None
    with contextlib.suppress(Exception):  # a missing or broken file is made anew
        cached = torch.load(kept, weights_only=True)
        x = cached["x"] if cached["stamp"] == stamp else None
    if x is None:
        x = torch.stack([read_picture(path, size) for path in files])
        save({"stamp": stamp, "x": x}, kept)
    held_out = torch.arange(len(x)) % 10 == 9
    return Images(x[~held_out if train else held_out], None, folder.name)


def read_picture(path, size):
    """One picture file as uint8 [3, size, size]."""
    skip = f"to leave it out, rename it to {path.name}.skip"
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        fail(f"{path} cannot be read as a picture; {skip}")
    side = min(picture.size)
    if side < size:
        fail(f"{path} is {picture.width}x{picture.height}, smaller than --size {size}: "
             f"use --size {side}, or {skip}")
    return TF.pil_to_tensor(TF.resize(TF.center_crop(picture, side), [size, size]))


def check_side(images, drawn):
    """Ends the run if the networks draw pictures of another side than those of the data."""
    side, fits = images.x.shape[2], max(4, drawn)
    if side != fits:
        fail(f"the pictures are {side}x{side}, the networks draw {fits}x{fits}: use --size {fits}")


def ring(m=8, radius=2.0):
    """Centres [m, 2] of m points on a circle, equally spaced (no end point twice)."""
    angle = 2 * math.pi * torch.arange(m) / m
    return radius * torch.stack([angle.cos(), angle.sin()], dim=1)


def grid(m=5, spacing=2.0):
    """Centres [m * m, 2] of a square grid around the origin."""
    line = spacing * (torch.arange(m) - (m - 1) / 2)
    return torch.cartesian_prod(line, line)


def gaussian_mixture(centres, std, n):
    """n samples [n, 2] of the mixture with equal weights and standard deviation `std`."""
    chosen = centres[torch.randint(len(centres), (n,), device=centres.device)]
    return chosen + std * torch.randn_like(chosen)


def to_float(x):
    """uint8 0..255 to float32 in [-1, 1]."""
    return x.float().div_(127.5).sub_(1)


def to_uint8(x):
    """Float in [-1, 1] to uint8 0..255, rounded; the inverse of to_float."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def batches(images, batch_size, seed, step=0):
    """Endless shuffled batches (x float in [-1, 1], y or None) of Images, from number `step` on.

    The order depends on `seed` and the step alone, so a resumed run sees what the straight run saw.
    A last batch that is not full is left out.
    """
    x, y, _ = images
    batch_size = min(batch_size, len(x))
    per_epoch = len(x) // batch_size
    while True:
        epoch, first = divmod(step, per_epoch)
        shuffle = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(x), generator=shuffle).to(x.device)
        for chosen in order.split(batch_size)[first:per_epoch]:
            yield to_float(x[chosen]), None if y is None else y[chosen]
        step = (epoch + 1) * per_epoch


# --- drawn digits: a pen, not a font -----------------------------------------------------------

# The ways to write each digit: strokes, separated by /, through points x,y in hundredths of a box
# (x to the right, y down). A point given twice in a row is a sharp corner.
STROKES = {
    0: ["62,3 25,10 5,50 22,92 60,97 93,62 82,18 55,3",
        "50,0 12,25 8,70 42,100 85,80 92,35 62,5 40,6"],
    1: ["50,0 49,50 50,100",
        "50,0 49,50 50,100",
        "30,22 50,0 50,0 50,100",
        "28,20 50,0 50,0 50,100 / 25,100 75,100"],
    2: ["8,25 32,2 75,6 80,38 45,75 5,100 5,100 95,97",
        "10,20 45,0 82,18 70,52 38,88 12,97 8,80 32,76 60,94 98,90"],
    3: ["12,10 48,0 82,20 66,43 36,48 36,48 78,56 88,80 55,100 8,90",
        "10,3 85,2 85,2 45,42 45,42 86,58 80,90 42,100 6,90"],
    4: ["22,2 8,55 8,55 50,56 95,52 / 78,5 72,50 66,100",
        "18,5 12,40 35,55 80,45 / 82,0 78,50 74,100",
        "70,100 72,50 74,0 74,0 4,64 4,64 96,62"],
    5: ["28,4 20,44 20,44 58,36 90,64 62,97 6,90 / 28,4 92,0",
        "88,2 30,4 30,4 22,44 22,44 62,40 86,70 52,100 6,90"],
    6: ["74,0 32,28 8,68 32,98 76,94 84,66 52,52 16,74",
        "48,0 16,40 10,78 40,100 82,84 70,58 36,62 16,84"],
    7: ["6,6 50,5 92,3 92,3 58,50 38,100",
        "6,22 10,4 10,4 90,4 90,4 62,45 45,100",
        "6,6 92,3 92,3 58,50 38,100 / 28,52 82,48"],
    8: ["80,14 50,0 20,20 48,46 84,74 50,100 14,78 48,48 80,20 70,5",
        "50,46 18,24 48,0 80,22 50,46 12,76 50,100 88,76 52,46"],
    9: ["82,20 50,2 14,22 28,50 64,46 84,16 84,16 80,60 74,100",
        "84,16 48,2 14,24 30,50 70,42 86,14 82,62 56,96 20,94"],
}


def pen_matrix(way, n):
    """The distinct points [m, 2] of a way, and the matrix [n, m] that maps them to n pen positions.

    The pen follows the Catmull-Rom curve through each stroke in about equal steps. The curve is
    linear in its points, so one matrix draws every bent copy of the way.
    """
    strokes = [[tuple(int(v) / 100 for v in point.split(",")) for point in stroke.split()]
               for stroke in way.split("/")]
    distinct = list(dict.fromkeys(point for stroke in strokes for point in stroke))
    points = torch.tensor(distinct)
    t = torch.linspace(0, 1, 40)[:, None]
    basis = torch.cat([-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3,
                       t + 4 * t**2 - 3 * t**3, t**3 - t**2], dim=1) / 2  # [40, 4]
    pieces = []  # 40 rows for each piece of a curve, between two neighbouring points
    for stroke in strokes:
        index = [distinct.index(point) for point in [stroke[0], *stroke, stroke[-1]]]
        pieces += [basis @ torch.eye(len(points))[index[i:i + 4]]
                   for i in range(len(index) - 3) if index[i + 1] != index[i + 2]]
    steps = [(piece @ points).diff(dim=0, prepend=piece[:1] @ points).norm(dim=1)
             for piece in pieces]  # no ink between two strokes
    length = torch.cat(steps).cumsum(0)
    at = torch.searchsorted(length, torch.linspace(0, length[-1].item(), n))
    return points, torch.cat(pieces)[at.clamp(max=len(length) - 1)]


def draw_digits(n, seed):
    """n drawn digits: uint8 [n, 1, 28, 28], light on dark, and their classes, int64 [n].

    Random bends, slant, turn, width and pen; then each is fitted to a box of 20 pixels and centred
    on its ink, as MNIST's digits are. A pixel's grey falls with its distance to the stroke.
    """
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    y = torch.randint(10, (n,), generator=rng)
    choice = torch.rand(n, generator=rng)
    pen = torch.empty(n, 72, 2)
    for digit, ways in STROKES.items():
        for i, way in enumerate(ways):
            mine = ((y == digit) & ((choice * len(ways)).long() == i)).nonzero()[:, 0]
            points, matrix = pen_matrix(way, 72)
            pen[mine] = matrix @ (points + 0.045 * normal(len(mine), *points.shape)) - 0.5

    pen += 0.03 * normal(n, 1, 2) * torch.sin(5 * pen.flip(2) + 3 * normal(n, 1, 2))  # a bend
    width = 0.72 * (0.2 * normal(n)).exp() * torch.where(y == 1, 0.6, 1.0)
    slant, turn = 0.15 + 0.25 * normal(n), 0.12 * normal(n)
    shape = torch.stack([width * turn.cos(), -turn.sin() - slant,
                         width * turn.sin(), turn.cos()], dim=1).view(n, 2, 2)
    pen = pen @ shape.transpose(1, 2)

    half = (1.1 * (0.26 * normal(n, 1)).exp()).clamp(0.6, 1.9)  # of the pen's width, in pixels
    low, high = pen.amin(1, keepdim=True), pen.amax(1, keepdim=True)
    box = 20 - 2 * half[..., None] + 0.7 * normal(n, 1, 1)
    pen = (pen - low) * box / (high - low).amax(2, keepdim=True)
    pen += 13.5 + 0.4 * normal(n, 1, 2) - pen.mean(1, keepdim=True)

    line = torch.arange(28.0)
    pixel = torch.cartesian_prod(line, line).flip(1)  # [784, 2], as (x, y)
    x = torch.empty(n, 1, 28, 28, dtype=torch.uint8)
    for i in range(0, n, 500):  # small pieces stay in the cache
        p = pen[i:i + 500]
        squared = torch.baddbmm(p.pow(2).sum(2)[:, None], pixel.expand(len(p), -1, -1),
                                p.transpose(1, 2), alpha=-2).amin(2) + pixel.pow(2).sum(1)
        ink = (half[i:i + 500] + 0.5 - squared.clamp(min=0).sqrt()).clamp(0, 1)
        x[i:i + 500] = (255 * ink).round().to(torch.uint8).view(-1, 1, 28, 28)
    return x, y


def load_digits(args, train):
    """20,000 training or 4,000 test digits, the same for everyone; drawn once, kept as one file."""
    kept = args.data_dir / "digits.pt"
    with contextlib.suppress(Exception):  # a missing or broken file is drawn anew
        return Images(*torch.load(kept, weights_only=True)[train], "drawn digits")
    both = [draw_digits(4_000, seed=1), draw_digits(20_000, seed=0)]
    with contextlib.suppress(OSError, RuntimeError):  # not kept: that costs seconds, no more
        kept.parent.mkdir(parents=True, exist_ok=True)
        replace(kept, lambda file: torch.save(both, file))
    return Images(*both[train], "drawn digits")


# --- pictures ----------------------------------------------------------------------------------

def panel(x, columns=8):
    """Pictures uint8 [N, C, H, W] as a grid with `columns` columns: draw(ax) for save_panels."""
    def draw(ax):
        picture = make_grid(x.cpu(), nrow=columns, padding=1, pad_value=128)
        ax.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
        ax.axis("off")

    return draw


def draw_points(ax, points, centres, reach, levels=None):
    """Points [N, 2] over the centres of a mixture, in the square of +-reach.

    `levels` [M, M] (optional): values on an M x M grid over that square, drawn as level lines.
    """
    if levels is not None:
        line = torch.linspace(-reach, reach, len(levels)).numpy()
        ax.contourf(line, line, levels.numpy(), 15, cmap="RdBu_r", alpha=0.5)
        ax.contour(line, line, levels.numpy(), 15, colors="grey", linewidths=0.3)
    ax.scatter(*centres.T.numpy(), s=70, facecolors="none", edgecolors="black", linewidths=0.6)
    colour = "tab:green" if levels is None else "black"
    ax.scatter(*points.T.numpy(), s=2, color=colour, linewidths=0)
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[], aspect="equal")


def save_panels(path, rows, title=""):
    """Small multiples: rows of (label, [(title, draw)]), where draw(ax) fills one panel."""
    n = max(len(cells) for _, cells in rows)
    fig, axes = plt.subplots(len(rows), n, figsize=(2.2 * n, 2.45 * len(rows) + 0.3), squeeze=False,
                             layout="constrained")
    for line, (label, cells) in zip(axes, rows):
        for ax, (text, draw) in zip(line, cells):
            draw(ax)
            ax.set_title(text, fontsize=9)
        for ax in line[len(cells):]:
            ax.set_visible(False)
        line[0].text(-0.08, 0.5, label, transform=line[0].transAxes, rotation=90, ha="right",
                     va="center", fontsize=12)
    fig.suptitle(title)
    save_figure(fig, path)


def plot_curves(path, log, columns, line, title=""):
    """One panel for each of `columns` of the log against its step, one line per value of `line`."""
    fig, axes = plt.subplots(1, len(columns), figsize=(3.4 * len(columns), 2.9), squeeze=False,
                             layout="constrained")
    for ax, column in zip(axes[0], columns):
        for value in dict.fromkeys(row[line] for row in log):
            mine = [row for row in log if row[line] == value]
            ax.plot([row["step"] for row in mine], [row[column] for row in mine],
                    label=f"{line} = {value}", linewidth=1)
        ax.set(title=column, xlabel="step")
        ax.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=6)
    fig.suptitle(title)
    save_figure(fig, path)


def save_figure(fig, path):
    write_whole(path, lambda file: fig.savefig(file, dpi=110, format="png"))
    plt.close(fig)
    print(f"wrote {relative(path)}")


# --- numbers, progress -------------------------------------------------------------------------

def print_table(header, rows):
    """A table of text, one row per line: numbers to the right, words to the left."""
    def is_number(cell):
        return cell.lstrip("-")[:1].isdigit() or cell in ("-", "inf")

    rows = [["-" if cell == "nan" else str(cell) for cell in row] for row in rows]
    lines = [""] * (len(rows) + 1)
    for column in zip(header, *rows):
        width = max(map(len, column))
        align = str.rjust if all(map(is_number, column[1:])) else str.ljust
        lines = [line + align(cell, width) + "  " for line, cell in zip(lines, column)]
    print("\n".join(line.rstrip() for line in lines))


def progress(label, total, per_step, first=0):
    """Returns show(step, **numbers): step, numbers, items/s and time left.

    On a terminal one line that updates in place; elsewhere a plain line at every tenth.
    `per_step` = items in one step, of data if there are any; `first` = the step before the first.
    """
    began, terminal = time.monotonic(), sys.stdout.isatty()
    last = 0.0

    def show(step, **numbers):
        nonlocal last
        now = time.monotonic()
        if step < total and (now - last < 0.2 if terminal else step % -(-total // 10)):
            return
        last = now
        rate = (step - first) / max(now - began, 1e-9)
        text = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        line = (f"{label}  step {step:,}/{total:,}  {text}  {rate * per_step:,.0f}/s  "
                f"{(total - step) / max(rate, 1e-9):.0f} s left")
        if terminal:
            line = WIPE + line[:shutil.get_terminal_size().columns - 1]
        print(line, end="\n" if step == total or not terminal else "", flush=True)

    return show


def due(step, steps, times):
    """True after about `times` of the steps (after each if they are fewer), and after the last."""
    return step % max(1, steps // times) == 0 or step == steps


def check_finite(step, **losses):
    """Stops the run if a loss is not finite; the last good checkpoint stays as it is."""
    for name, value in losses.items():
        if not math.isfinite(value):
            fail(f"{name} is {value} at step {step}: stopped, the last checkpoint is kept",
                 status=1)


@contextlib.contextmanager
def ctrl_c():
    """Within it the first Ctrl-C only makes pressed() true, so that a step is never cut in two."""
    pressed = []

    def note(*_):
        pressed.append(True)
        signal.signal(signal.SIGINT, before)  # a second Ctrl-C stops at once

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


# --- files -------------------------------------------------------------------------------------

def relative(path):
    """The path as seen from here, for printing."""
    return os.path.relpath(path)


def replace(path, write):
    """Calls write(temporary file), then renames it to path: a kill leaves the old file whole."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path, write):
    """replace(), or the end of the run with one line: a full disk, a folder that was closed."""
    try:
        replace(path, write)
    except (OSError, RuntimeError) as e:  # torch says RuntimeError for a full disk
        fail(f"cannot write {relative(path)} ({str(e).splitlines()[0]}); what was there is kept",
             status=1)


def save(value, path):
    """torch.save, atomically."""
    write_whole(path, lambda file: torch.save(value, file))


def write_log(path, log):
    """The log (a list of dicts) as CSV, whole and atomically; columns are the union of all keys."""
    columns = list(dict.fromkeys(key for row in log for key in row))

    def write(file):
        with open(file, "w", newline="") as f:
            writer = csv.DictWriter(f, columns)
            writer.writeheader()
            writer.writerows(log)

    write_whole(path, write)


def settings(args):
    """The flags that decide the numbers, as text: --resume needs the same ones."""
    return {"script": args.script} | {name: str(value) for name, value in vars(args).items()
                                      if name not in MAY_CHANGE_ON_RESUME}


def save_checkpoint(args, parts, **rest):
    """Writes the states of `parts` (networks, optimisers, ... by name), the random state, the flags
    and `rest` (tensors, numbers, text, lists, dicts) to checkpoint.pt."""
    gpu = torch.get_device_module() if torch.accelerator.is_available() else None
    save({"settings": settings(args), "parts": {k: part.state_dict() for k, part in parts.items()},
          "random": torch.get_rng_state(), "random_gpu": gpu and gpu.get_rng_state(), **rest},
         args.out / "checkpoint.pt")


def load_checkpoint(args):
    """With --resume, what save_checkpoint last wrote for the same flags; None if nothing."""
    path = args.out / "checkpoint.pt"
    if not args.resume:
        return None
    if not path.exists():
        print(f"no {relative(path)} yet: starting from the beginning")
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        theirs = saved["settings"]
    except Exception:  # whatever is wrong with the file, the answer is the same
        fail(f"{relative(path)} is not a readable checkpoint: move it away, or use another --out")
    for name, value in settings(args).items():
        if theirs.get(name) != value:
            fail(f"{relative(path)} was made with {name} {theirs.get(name)}, this run has {value}: "
                 "use the same flags, or another --out")
    return saved


def restore(saved, parts):
    """Puts the states of a loaded checkpoint, the random state too, back into `parts`."""
    for name, part in parts.items():
        part.load_state_dict(saved["parts"][name])
    torch.set_rng_state(saved["random"])
    if saved["random_gpu"] is not None and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(saved["random_gpu"])


def kept_path(args, name):
    """Where a chapter keeps a network it has trained; those of --quick lie apart."""
    return args.out / (f"{name}_quick.pt" if args.quick else f"{name}.pt")


def load_kept(path, needed, expected):
    """What a run before has kept in `path`: a dict with "settings" and the keys `needed`.

    expected: settings as text, by name; ends the run if one was another, or the file is no such.
    """
    if not path.exists():
        fail(f"there is no {relative(path)}")
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        theirs = kept["settings"]
        for key in needed:
            kept[key]
    except Exception:  # whatever is wrong with the file, the answer is the same
        fail(f"{relative(path)} does not hold {', '.join(needed)}: move it away")
    for name, value in expected.items():
        if theirs.get(name) != value:
            fail(f"{relative(path)} was trained with {name} {theirs.get(name)}, this run has "
                 f"{value}: use the same flags, or another --out")
    print(f"using what {relative(path)} has kept")
    return kept


def stop(step):
    """Ends the run after Ctrl-C, once the checkpoint is written."""
    fail(f"stopped at step {step}; --resume goes on from here", status=130)
