"""What the chapters share: flags, runs, data, plots, files. No equation of a model lives here.

Importing it changes nothing. Pictures are uint8 [N, C, H, W] (0 to 255) in memory, and float32 in
[-1, 1] in a batch.
"""

import argparse
import contextlib
import csv
import difflib
import errno
import io
import math
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib import rcdefaults
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import distributed, nn
from torch.nn import functional as F
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as TF
from torchvision.utils import make_grid

TORCHVISION = {"mnist": datasets.MNIST, "fashion": datasets.FashionMNIST,
               "cifar10": datasets.CIFAR10}
SPLIT = re.compile("(train|test|val)(ing|id|idation)?([ _-]?(set|data|images|pictures))?", re.I)
N_QUICK = 2000  # pictures of the training part, and of the test part, that --quick uses
CLEAR = "\r\033[K"  # on a terminal: wipes an unfinished progress line
REFUSED = set()  # files that another program does not let us replace


# --- flags -------------------------------------------------------------------------------------

def fail(message, status=2):
    """Ends the run with one line on stderr. Status 2: the input was wrong. 130: Ctrl-C."""
    if RANK == 0:  # several processes fail together, and one of them says so
        print(CLEAR * sys.stderr.isatty() + "error: " * (status != 130) + message, file=sys.stderr)
    raise SystemExit(status)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        hidden = action.default is None or isinstance(action.default, (bool, list))
        return action.help if hidden else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag gives one line, with what may have been meant."""

    def error(self, message):
        known = [str(text) for action in self._actions
                 for text in [*action.option_strings, *(action.choices or [])]]
        word = re.search(r"(?:invalid choice: '|arguments: )([^ '=]*)", message + " ")
        meant = difflib.get_close_matches(word[1], known, 1) if word else []
        meant = "".join(f"did you mean {text}? " for text in meant)
        fail(f"{message} ({meant}see python {self.prog} --help)")


def number(kind, least=-math.inf, most=math.inf, above=-math.inf):
    """An argparse type: a finite int or float (`kind`) with least <= it <= most and above < it."""
    def parse(text):
        value = kind(text)  # argparse turns a ValueError into its own message
        if not (math.isfinite(value) and least <= value <= most and above < value):
            raise ValueError
        return value

    low = f"from {least}" if above == -math.inf else f"above {above}"
    parse.__name__ = f"{'whole ' * (kind is int)}number {low}" + f" to {most}" * (most < math.inf)
    return parse  # argparse says: invalid whole number from 1 value: '0'


def end(kind, e, trace):
    """sys.excepthook: what ends a run without a traceback."""
    if getattr(e, "errno", 0) in (errno.EPIPE, errno.EIO):  # | head: no reader is left
        os._exit(141)
    if kind is KeyboardInterrupt:
        fail("stopped", 130)
    if "loading state_dict" in str(e):
        fail(f"the saved networks differ, use another --out ({' '.join(str(e).split())[:250]})")
    sys.__excepthook__(kind, e, trace)


def parser(doc, file, trains=True, data=None, data_help="mnist, fashion, cifar10, digits "
           "(synthetic), or a folder of pictures; if not given: mnist, or digits without it"):
    """A parser with the flags that all chapters share; trains: with those for data, devices and
    --resume. `doc` becomes the head of --help."""
    sys.excepthook, sys.stdout, sys.stderr = end, *(  # streams may be closed by >&-
        stream or open(os.devnull, "w", encoding="utf-8") for stream in (
            not RANK and sys.stdout, sys.stderr))
    with contextlib.suppress(AttributeError):  # in a notebook
        sys.stdout.reconfigure(errors="replace")  # it may lack θ
    rcdefaults()  # figures are the same whatever style the reader's matplotlibrc asks for
    script, path = Path(file).resolve().stem, lambda text: Path(os.path.expanduser(text))
    p = Parser(f"{script}.py", description=doc, formatter_class=HelpFormatter,
               allow_abbrev=False)  # or 01's --k 5 would mean --k-test 5
    g = p.add_argument_group("shared flags")
    if trains:
        g.add_argument("--data", default=data, metavar="NAME", help=data_help)
        g.add_argument("--data-dir", type=path, default="data", help="folder of the data sets")
        g.add_argument("--size", type=int, default=64, choices=[16, 28, 32, 56, 64, 128],
                       help="pixels a side, for folders")
        g.add_argument("--skip", action="store_true", help="leave out damaged and small pictures")
        g.add_argument("--device", help="cpu, cuda, mps; if not given: the GPU if there is one")
        g.add_argument("--resume", action="store_true", help="continue from checkpoint.pt in --out")
    g.add_argument("--out", type=path, default=f"out/{script}", help="folder of the results")
    g.add_argument("--seed", type=number(int, 0, 2 ** 31 - 1), default=0,
                   help="same seed, same CPU: same numbers")
    g.add_argument("--quick", action="store_true",
                   help="seconds instead of minutes: the same code, few steps, synthetic digits")
    p.set_defaults(script=script)
    return p


def parse(p, argv, quick):
    """p.parse_args(argv); with --quick, flags that are not given take their values from `quick`,
    and the results go to a folder of their own within --out."""
    args = p.parse_args(argv)
    if args.quick:
        p.set_defaults(**quick)
        args = p.parse_args(argv)
        args.out /= "quick"
    return args


# --- a run -------------------------------------------------------------------------------------

class Run:
    """One execution of a chapter: its device, its log, and how far it has come. `steps` writes
    checkpoint.pt ten times in a training run, and on Ctrl-C; with --resume the same loops continue
    from there, to the same results. Attributes: device; step, of total; done, the results by name;
    rows, the log; extra, what a training run collects; snapshots, the pictures of process.png."""

    def __init__(self, args):
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            fail(f"cannot write to --out {args.out}: {e.strerror}")
        if WORLD > 1 and not distributed.is_initialized():
            distributed.init_process_group()
        best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        wanted = getattr(args, "device", "cpu") or str(best)
        try:
            if WORLD > 1 and wanted == "cuda":  # a GPU for each process
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            self.device = torch.zeros(1, device=wanted).device
        except (RuntimeError, AssertionError):  # unknown, not built in, absent, or taken
            fail(f"device {wanted} cannot be used here: use --device cpu")
        print(f"device {self.device}, {torch.get_num_threads()} threads of the CPU")
        self.args = args
        self.done, self.rows, self.extra, self.snapshots, self.numbers = {}, [], {}, {}, {}
        self.step = self.total = self.n_batches = 0  # since the first step
        self.state, self.saved, self.training, self.stopping = {}, None, False, False
        self.checkpoint, self.checkpoint_read = args.out / "checkpoint.pt", False
        torch.manual_seed(args.seed)
        with contextlib.suppress(ValueError):  # only the main thread may
            signal.signal(signal.SIGINT, self.on_ctrl_c)

    def on_ctrl_c(self, *_):
        """In a training run the first Ctrl-C stops after this step, any other one at once."""
        if not self.training or self.stopping or WORLD > 1:
            fail("stopped" + "; --resume continues" * self.checkpoint.exists(), 130)
        self.stopping = True

    def each(self, names):
        """The names of the training runs that are not finished yet, one after the other."""
        if self.args.resume and not self.checkpoint_read:
            self.checkpoint_read = True
            if self.checkpoint.exists():
                self.saved = load_saved(self.checkpoint, settings(self.args), ("state", "random"))
                self.done, self.rows, self.snapshots = map(
                    self.saved.get, ("done", "rows", "snapshots"))
            print(f"continuing after step {self.saved['step']} of {self.saved['name']}"
                  if self.saved else f"there is no {self.checkpoint}: from the beginning")
        for self.name in names:
            if self.name not in self.done:
                yield self.name
                self.save()

    def steps(self, total, **state):
        """1, 2, ..., total, or what is left of them after --resume. state: by name, what a step
        changes and has a state_dict(): networks, optimisers, schedules."""
        self.total, self.step, self.n_batches, self.extra, self.state = total, 0, 0, {}, state
        if WORLD > 1:
            share(state, self.args.seed)
        if self.saved and self.saved["name"] not in self.done:
            self.restore(self.saved)
        self.show = progress(self.name, total, self.step)
        self.training = True
        for self.step in range(self.step + 1, total + 1):
            yield self.step
            if self.every(10) or self.stopping:
                self.save()
            if self.stopping:
                fail(f"stopped at step {self.step}; the same command with --resume continues", 130)
        self.training = False

    def save(self):
        """Writes log.csv and checkpoint.pt, unless losses or weights are not finite."""
        self.read()
        for name, part in self.state.items():
            if isinstance(part, nn.Module) and not all(p.isfinite().all()
                                                       for p in part.parameters()):
                fail(f"weights of {name} are not finite after step {self.step}: not saved", 1)
        write_log(self.rows, self.args.out / "log.csv")
        gpu = None if self.device.type == "cpu" else torch.get_device_module().get_rng_state()
        random = [(torch.get_rng_state(), gpu)] * WORLD
        if WORLD > 1:
            distributed.all_gather_object(random, random[RANK])
        save({"settings": settings(self.args), "random": random, "n_batches": self.n_batches,
              "state": {name: part.state_dict() for name, part in self.state.items()},
              "name": self.name, "step": self.step, "extra": self.extra, "rows": self.rows,
              "snapshots": self.snapshots, "done": self.done}, self.checkpoint)

    def restore(self, saved):
        """Brings back the networks, optimisers, schedules and random states of a step."""
        if saved["name"] != self.name:
            fail(f"{self.checkpoint} is in the middle of {saved['name']}: name this one first")
        self.step, self.extra, self.n_batches = map(saved.get, ("step", "extra", "n_batches"))
        for name, part in self.state.items():
            part.load_state_dict(saved["state"][name])
        cpu, gpu = saved["random"][RANK]
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.get_device_module().set_rng_state(gpu)

    def batches(self, images, size):
        """Endless shuffled batches (x, y) of `size` pictures: x float [size, C, H, W] in [-1, 1],
        y labels [size], or None without labels. They depend on --seed and on their number alone. A
        last batch that is not full is left out. Of several processes, each gets its share."""
        self.data, size = images.name, min(size, len(images.x))
        size -= size % WORLD
        per_epoch = len(images.x) // size
        while True:
            epoch, first = divmod(self.n_batches, per_epoch)
            rng = torch.Generator().manual_seed(self.args.seed * 1_000_003 + epoch)
            order = torch.randperm(len(images.x), generator=rng).to(images.x.device)
            for chosen in order.split(size)[first:per_epoch]:
                self.n_batches += 1
                chosen = chosen[RANK::WORLD]
                yield to_float(images.x[chosen]), None if images.y is None else images.y[chosen]

    def every(self, times):
        """True after about `times` of the steps (after each if they are fewer), and at the end."""
        return self.step % max(1, self.total // times) == 0 or self.step == self.total

    def at(self, shares):
        """True after these shares of the steps: 0.5 is the middle of the run, 1 its end."""
        return self.step in {math.ceil(share * self.total) for share in shares}

    def log(self, **numbers):
        """The numbers of a step, as floats or tensors: 40 times in a training run they become a
        row of the log, 200 times they are shown. In the steps between, nothing waits for a GPU."""
        self.numbers = {name: value.detach() if torch.is_tensor(value) else value
                        for name, value in numbers.items()}
        if self.every(40):
            self.add_to_row()
        if self.every(200) or self.every(10):
            self.show(self.step, **self.read())

    def read(self):
        """The numbers of this step as floats. Ends the run if one is not finite."""
        self.numbers = {name: float(value) for name, value in self.numbers.items()}
        for name, value in self.numbers.items():
            if not math.isfinite(value):
                fail(f"{name} is {value} at step {self.step}: stopped, this step is not saved", 1)
        return self.numbers

    def add_to_row(self, **more):
        """Adds `more` to the row of this step in the log, which is made if there is none."""
        here = {"model": self.name, "step": self.step}
        if not self.rows or not here.items() <= self.rows[-1].items():
            self.rows.append(here | self.read())
        self.rows[-1] |= more

    def snapshot(self, x):
        """Adds pictures x of this step, [N, C, H, W] in [-1, 1], to process.png."""
        self.snapshots.setdefault(self.name, {})[self.step] = to_uint8(x).cpu()
        save_panels(self.args.out / "process.png", [
            (name, [(f"step {step:,}", panel(x, math.isqrt(len(x)))) for step, x in row.items()])
            for name, row in self.snapshots.items()],
            f"chapter {self.args.script[:2]} on {self.data}, seed {self.args.seed}", size=1.8)


def settings(args):
    """The flags and data that --resume needs unchanged, as text. Lists only name training runs."""
    return {"layout": "3", "processes": str(WORLD)} | {
        name: str(value) for name, value in vars(args).items()
        if not isinstance(value, list) and name not in ("out", "data_dir", "device", "resume")}


def load_saved(file, expected, needed=()):
    """What an earlier run saved in `file`: a dict with the keys `needed` and "settings". Ends this
    run if the file cannot be used, or was made with settings other than `expected`."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        theirs = dict(saved["settings"])
        [saved[key] for key in needed]
    except Exception as e:  # whatever is wrong with the file, the answer is the same
        reason = getattr(e, "strerror", "") or type(e).__name__
        fail(f"{file} cannot be used ({reason}): move it away, or use another --out")
    for name, value in expected.items():
        if theirs.get(name) != value:
            fail(f"{file} was made with {name} {theirs.get(name)}, this run has {value}: use the "
                 "same flags and data, or another --out")
    return saved


# --- several processes: torchrun --nproc-per-node 2 01_vae.py ----------------------------------

WORLD, RANK = (int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else alone
               for name, alone in (("WORLD_SIZE", 1), ("RANK", 0)))


def share(state, seed):
    """Gives all processes the networks of the first, and from then on the mean of all gradients."""
    for net in state.values():
        if isinstance(net, nn.Module):
            for tensor in net.state_dict().values():
                distributed.broadcast(tensor, src=0)
            for p in net.parameters():
                p.register_post_accumulate_grad_hook(
                    lambda p: distributed.all_reduce(p.grad.div_(WORLD)))
    torch.manual_seed(seed * WORLD + RANK)  # each process samples its own noise


# --- data --------------------------------------------------------------------------------------

class Images(NamedTuple):
    """A whole data set in memory: x uint8 [N, C, H, W], y int64 [N] or None, name for titles."""
    x: torch.Tensor
    y: torch.Tensor | None
    name: str


def load_images(args, device, train=True):
    """The training or test part of the data set args.data, as Images on `device`. Writes its name
    to args.data, and a checksum to args.training_pictures or args.test_pictures, for settings()."""
    if RANK:  # the first process downloads or decodes, the others read what it saved
        distributed.barrier()
    load = load_torchvision if args.data in (None, *TORCHVISION) else \
        load_digits if args.data == "digits" else load_folder
    images = load(args, train)
    if WORLD > 1 and RANK == 0:
        distributed.barrier()
    x, y = (part if part is None or not args.quick else part[:N_QUICK] for part in images[:2])
    checksum = zlib.crc32(x.contiguous().numpy(), zlib.crc32(b"" if y is None else y.numpy()))
    part = "training" if train else "test"
    setattr(args, f"{part}_pictures", f"{len(x)} with checksum {checksum:08x}")
    print(f"data {images.name}: {len(x):,} {part} pictures, {'x'.join(map(str, x.shape[1:]))}")
    return Images(x.to(device), None if y is None else y.to(device),
                  images.name + " (quick run)" * args.quick)


def load_torchvision(args, train):
    """MNIST, FashionMNIST or CIFAR10 from args.data_dir, downloaded if it is not there."""
    name, folder = args.data or "mnist", args.data_dir
    socket.setdefaulttimeout(10)  # seconds: a silent network must not hang the run
    try:
        try:
            data = TORCHVISION[name](folder, train=train)
        except RuntimeError:  # missing. Another run may download it too: whole files are moved
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as new:
                data = TORCHVISION[name](new, train=train, download=True)
                for file in filter(Path.is_file, Path(new).rglob("*")):
                    (folder / file.relative_to(new)).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(file, folder / file.relative_to(new))
        x, y = torch.as_tensor(data.data), torch.as_tensor(data.targets)
        if len(x) != len(y):
            raise ValueError(f"{len(x)} pictures and {len(y)} labels")
    except Exception as e:  # torchvision raises all kinds for damaged files
        reason = f"{name} cannot be read from {folder} or downloaded ({e})"
        if args.data:
            fail(f"{reason}: use --data digits")
        print(f"{reason}: using synthetic digits")
        args.data = "digits"
        return load_digits(args, train)
    args.data = name
    x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()
    return Images(x, y, TORCHVISION[name].__name__)


def load_folder(args, train):
    """Every picture below the folder args.data as RGB, cropped to its central square, resized.
    Every tenth picture of a fixed shuffle is for tests, unless the folder has such a split: some
    subfolders called train and test, or the like. If all pictures lie in two or more subfolders,
    these are the labels, in the order of their names. Pictures are decoded once and saved in
    args.out. Hidden files, and those that a run wrote, are not read."""
    folder, part = Path(args.data).expanduser().resolve(), "training" if train else "test"
    if not folder.is_dir():
        fail(f"--data {args.data} is neither a known data set (see --help) nor a folder")
    args.data = str(folder)  # the same for each spelling, for settings()
    places = {file: file.relative_to(folder).parts for file in sorted(folder.rglob("*"))
              if file.suffix.lower() in IMG_EXTENSIONS and file.is_file()
              and args.out.resolve() not in file.parents
              and not re.search(r"(^|/)(\.|__MACOSX)", file.relative_to(folder).as_posix())}
    if len(places) < 10:
        fail(f"{folder} holds {len(places)} pictures: give a folder with at least 10")
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
    files = [list(places)[i] for i in order]
    while len({inside[0] for inside in places.values()}) == 1 < min(map(len, places.values())) - 1:
        places = {file: inside[1:] for file, inside in places.items()}  # a folder around them all
    kinds = {file: match[1].lower() if (match := SPLIT.fullmatch(inside[0])) else ""
             for file, inside in places.items()}
    if "train" in kinds.values() and {"test", "val"} & {*kinds.values()}:
        files = [file for file in files if (kinds[file] in ("test", "val")) != train]
        places = {file: inside[1:] or inside for file, inside in places.items()}
    else:
        files = [file for i, file in enumerate(files) if (i % 10 == 9) != train]
    files = files[:N_QUICK if args.quick else None]
    source = str([args.size, *((str(file), file.stat().st_mtime_ns) for file in files)])
    cache, saved = args.out / f"{part}_pictures.pt", {}
    with contextlib.suppress(Exception):  # if it is missing or damaged, decode again
        saved = torch.load(cache, weights_only=True)
    if saved.get("source") != source:
        saved = {"source": source, **decode(files, args)}
        save(saved, cache)
    names, y = sorted({inside[0] for inside in places.values()}), None
    if len(names) > 1 and all(len(inside) > 1 for inside in places.values()):
        y = torch.tensor([names.index(places[files[i]][0]) for i in saved["used"]])
        print(f"labels: {', '.join(f'{i} {name}' for i, name in enumerate(names[:10]))}")
    name = folder.resolve().name.encode("latin-1", "replace").decode("latin-1")  # fonts have these
    return Images(saved["x"], y, name)


def decode(files, args):
    """Of the files that can be used, the pictures x uint8 [N, 3, size, size] and the indices. The
    others end the run with one line, or with --skip are left out."""
    x, used, bad = torch.empty(len(files), 3, args.size, args.size, dtype=torch.uint8), [], []
    show = progress("reading pictures", len(files))
    for i, file in enumerate(files):
        try:
            picture = read_picture(file)
            if min(picture.size) < args.size:
                raise ValueError(f"{file} is {picture.width}x{picture.height}")
            square = TF.center_crop(picture, min(picture.size))
            x[len(used)] = TF.pil_to_tensor(TF.resize(square, [args.size, args.size]))
            used.append(i)
        except ValueError as e:
            bad.append(str(e))
        show(i + 1)
    text = f"{len(bad)} of {len(files)} pictures cannot be used: {'; '.join(bad[:3])}"
    if bad and not args.skip or not used:
        fail(f"{text}; --skip leaves them out")
    if bad:
        print(f"left out: {text}")
    return {"x": x[:len(used)], "used": used}


def read_picture(file, mode="RGB", background="white"):
    """A picture file as an 8-bit PIL image of `mode`, upright, over `background` if transparent.
    Raises ValueError if it cannot be read, or has 32-bit or float values of unknown range."""
    try:
        with Image.open(file) as picture:
            grey_16 = picture.mode[:4] == "I;16" or picture.format in ("PNG", "PPM")
            if picture.mode[0] in "IF" and not grey_16:
                raise ValueError("which value is white? save it with 8 or 16 bits")
            picture = ImageOps.exif_transpose(picture)
        if picture.mode[0] == "I":  # convert() alone would cut off at 255
            picture = picture.convert("I").point(lambda value: value / 257 + 0.5).convert("L")
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture)
        return picture.convert("RGB").convert(mode)
    except Exception as e:  # Pillow raises all kinds for damaged files
        raise ValueError(f"{file} cannot be read as a picture ({e or type(e).__name__})") from None


def to_float(x):
    """uint8 0..255 to float32 in [-1, 1]."""
    return x.float().div_(127.5).sub_(1)


def to_uint8(x):
    """Float in [-1, 1] to uint8 0..255, rounded; the inverse of to_float."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def nearest(x, images):
    """For each x [N, C, H, W] the nearest of the first 10,000 training pictures, two [N]: its
    distance (root mean square over the pixels, in [-1, 1] units; blur lowers it) and its index."""
    x, train = x.flatten(1), to_float(images.x[:10_000]).flatten(1)
    indices = torch.cat([torch.cdist(part, train).argmin(dim=1) for part in x.split(1000)])
    return (x - train[indices]).square().mean(dim=1).sqrt(), indices  # exact: 0 for a copy


# --- synthetic digits: a pen, not a font -------------------------------------------------------

# The styles of each digit: strokes, separated by /, through points x,y in hundredths of a box (x to
# the right, y down). A semicolon is a sharp corner.
STROKES = {
    0: ["62,3 25,10 5,50 22,92 60,97 93,62 82,18 55,3"],
    1: ["50,0 49,50 50,100", "30,22 50,0; 50,0 50,100"],
    2: ["8,25 32,2 75,6 80,38 45,75 5,100; 5,100 95,97",
        "10,20 45,0 82,18 70,52 38,88 12,97 8,80 32,76 60,94 98,90"],
    3: ["12,10 48,0 82,20 66,43 36,48; 36,48 78,56 88,80 55,100 8,90"],
    4: ["22,2 8,55; 8,55 50,56 95,52 / 78,5 72,50 66,100",
        "70,100 72,50 74,0; 74,0 4,64; 4,64 96,62"],
    5: ["28,4 20,44; 20,44 58,36 90,64 62,97 6,90 / 28,4 92,0"],
    6: ["74,0 32,28 8,68 32,98 76,94 84,66 52,52 16,74"],
    7: ["6,6 50,5 92,3; 92,3 58,50 38,100", "6,6 92,3; 92,3 58,50 38,100 / 28,52 82,48"],
    8: ["80,14 50,0 20,20 48,46 84,74 50,100 14,78 48,48 80,20 70,5"],
    9: ["82,20 50,2 14,22 28,50 64,46 84,16; 84,16 80,60 74,100"],
}


def write_digits(style, n, rng):
    """n digits in one style of STROKES, uint8 [n, 1, 28, 28], light on dark. Each has its own bend,
    slant, turn, width and pen, in a box of 20 pixels, centred on its ink, as in MNIST."""
    def normal(*shape):
        return torch.randn(n, *shape, generator=rng)

    curves = [[tuple(map(int, point.split(","))) for point in curve.split()]
              for curve in re.split("[/;]", style)]
    points = list(dict.fromkeys(point for curve in curves for point in curve))
    moved = (torch.tensor(points) / 100 - 0.5 + 0.045 * normal(len(points), 2)).transpose(1, 2)
    pen = torch.cat([F.interpolate(  # a smooth path through the points of each curve
        moved[:, :, None, [points.index(point) for point in curve]], (1, 14 * len(curve)),
        mode="bicubic", align_corners=True)[:, :, 0] for curve in curves], dim=2).transpose(1, 2)
    pen = pen + 0.03 * normal(1, 2) * torch.sin(5 * pen.flip(2) + 3 * normal(1, 2))  # the bend
    width, slant, turn = 0.72 * (0.2 * normal()).exp(), 0.15 + 0.25 * normal(), 0.12 * normal()
    linear = torch.stack([width, -slant - turn, width * turn, torch.ones(n)], dim=1)
    pen = pen @ linear.view(n, 2, 2).transpose(1, 2)
    radius = (1.1 * (0.26 * normal(1, 1)).exp()).clamp(0.6, 1.9)  # of the pen, in pixels
    longer_side = (pen.amax(1) - pen.amin(1)).amax(1)[:, None, None]
    pen = pen * (20 - 2 * radius + 0.7 * normal(1, 1)) / longer_side
    pen = pen - pen.mean(1, keepdim=True) + 13.5 + 0.4 * normal(1, 2)
    pixels = torch.cartesian_prod(torch.arange(28.0), torch.arange(28.0)).flip(1)  # (x, y)
    distance = torch.cat([torch.cdist(pixels, part).amin(2) for part in pen.split(500)])
    return (255 * (radius[..., 0] + 0.5 - distance).clamp(0, 1)).round().byte().view(n, 1, 28, 28)


def make_digits(n, seed):
    """n synthetic digits, uint8 [n, 1, 28, 28], and their labels, int64 [n]."""
    rng = torch.Generator().manual_seed(seed)
    y, choice = torch.randint(10, (n,), generator=rng), torch.rand(n, generator=rng)
    x = torch.empty(n, 1, 28, 28, dtype=torch.uint8)
    for digit, styles in STROKES.items():
        for i, style in enumerate(styles):
            these = (y == digit) & ((choice * len(styles)).long() == i)
            x[these] = write_digits(style, int(these.sum()), rng)
    return x, y


def load_digits(args, train):
    """20,000 training or 4,000 test digits, the same for everyone; made once and saved."""
    cache = args.data_dir / "synthetic_digits.pt"
    try:
        parts = torch.load(cache, weights_only=True)
    except Exception:  # it is missing or damaged
        parts = [make_digits(4_000, seed=1), make_digits(20_000, seed=0)]
        with contextlib.suppress(OSError):  # a read-only folder
            cache.parent.mkdir(parents=True, exist_ok=True)
        if os.access(cache.parent, os.W_OK):
            save(parts, cache)
    return Images(*parts[train], "synthetic digits")


# --- plots -------------------------------------------------------------------------------------

def panel(x, columns=8):
    """Pictures uint8 [N, C, H, W] as a grid with `columns` columns: plot(ax) for save_panels."""
    def plot(ax):
        framed = F.pad(x, [1] * 4, value=128) if len(x) == 1 else x  # make_grid frames several only
        grid = make_grid(framed.cpu(), nrow=columns, padding=1, pad_value=128)
        ax.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        ax.axis("off")

    return plot


def figure(rows, columns, width, height, title=""):
    """A matplotlib figure of width x height inches, and its axes in a 2-D array."""
    fig = Figure(figsize=(width, height), layout="constrained")
    fig.get_layout_engine().set(h_pad=0.08)  # inches: keeps the title away from those of the panels
    fig.suptitle(title.replace("$", r"\$"), wrap=True)  # a folder's name may have two $ in it
    return fig, fig.subplots(rows, columns, squeeze=False)


def save_panels(file, rows, title="", size=2.6):
    """Rows of (label, [(title, plot)]): plot(ax) fills a panel of `size` inches of 110 pixels."""
    n = max(len(cells) for _, cells in rows)
    fig, axes = figure(len(rows), n, size * n, (size + 0.25) * len(rows) + 0.3, title)
    for line, (label, cells) in zip(axes, rows):
        for ax, (text, plot) in zip(line, cells):
            plot(ax)
            ax.set_title(text, fontsize=9)
        for ax in line[len(cells):]:
            ax.set_visible(False)
        line[0].text(-0.08, 0.5, label, transform=line[0].transAxes, rotation=90, ha="right",
                     va="center", fontsize=12)
    save_figure(fig, file)


def plot_curves(file, log, columns, title="", log_scale=()):
    """A panel for each of `columns`, {name in the log: title}, with a line for each model."""
    fig, axes = figure(1, len(columns), 3.2 * len(columns) + 1.5, 2.9, title)
    for ax, (column, text) in zip(axes[0], columns.items()):
        for model in dict.fromkeys(row["model"] for row in log):
            rows = [row for row in log if row["model"] == model and column in row]
            ax.plot([row["step"] for row in rows], [row[column] for row in rows], label=model,
                    linewidth=1, marker="." if len(rows) < 3 else "")
        ax.set(xlabel="step", yscale="log" if column in log_scale else "linear")
        ax.set_title(text, fontsize=9)
        ax.grid(alpha=0.3)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save_figure(fig, file)


def save_figure(fig, file):
    """Writes a figure as PNG, and prints where; of process.png, which is replaced, only once."""
    again = file.stem == "process" and file.exists()
    fig.savefig(png := io.BytesIO(), dpi=110)
    written = write(lambda f: f.write(png.getvalue()), file)
    if not again:
        print(f"{CLEAR * sys.stdout.isatty()}wrote {written}")


# --- text and files ----------------------------------------------------------------------------

def print_table(header, rows):
    """A table of text, one row per line: numbers to the right, words to the left."""
    rows = [["-" if cell == "nan" else str(cell) for cell in row] for row in rows]
    lines = [""] * (len(rows) + 1)
    for head, *cells in zip(header, *rows):
        width = max(map(len, [head, *cells]))
        words = any(cell.lstrip("-")[:1] not in {*"0123456789", ""} for cell in cells)
        lines = [f"{line}{cell:{'<' if words else '>'}{width}}  "
                 for line, cell in zip(lines, [head, *cells])]
    print("\n".join(line.rstrip() for line in lines))


def progress(label, total, first=0):
    """show(step, **numbers) prints them and the time left: on a terminal in one line that it
    updates, elsewhere ten times. first: the step before the first."""
    began, terminal = time.monotonic(), sys.stdout.isatty()

    def show(step, **numbers):
        if step < total and step % max(1, total // (200 if terminal else 10)):
            return
        seconds = time.monotonic() - began
        left = (total - step) * seconds / max(step - first, 1)
        text = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        line = f"{label}  step {step:,}/{total:,}  {left:.0f} s left  {text}"
        if terminal:
            line = CLEAR + line[:shutil.get_terminal_size().columns - 1]
        print(line, end="" if terminal and step < total else "\n", flush=True)

    return show


def write(writer, file):
    """writer(binary file), then a rename to `file`: after a kill or on a full disk the old one is
    whole. Returns where the content is: another program that shows `file` may refuse the rename."""
    if RANK:
        return file  # the first process writes
    new = file.with_name(f".{file.name}.new")
    try:
        with open(new, "wb") as f:
            writer(f)
        for _ in range(10):  # for a second
            with contextlib.suppress(PermissionError):
                os.replace(new, file)
                return file
            time.sleep(0.1)
    except (OSError, RuntimeError) as e:  # torch.save hides the OSError of a full disk
        new.unlink(missing_ok=True)
        e = e.__context__ or e if isinstance(e, RuntimeError) else e
        fail(f"cannot write {file} ({getattr(e, 'strerror', '') or e})", 1)
    if new not in REFUSED:
        print(f"{file} is used by another program: the new content is in {new}")
        REFUSED.add(new)
    return new


def save(value, file):
    """torch.save, atomically; the same value gives the same bytes."""
    write(lambda f: torch.save(value, f), file)


def write_log(log, file):
    """The log (a list of dicts) as CSV, atomically; its columns are all keys of the rows."""
    text = io.StringIO()
    rows = csv.DictWriter(text, list(dict.fromkeys(key for row in log for key in row)))
    rows.writeheader()
    rows.writerows(log)
    write(lambda f: f.write(text.getvalue().encode()), file)
