"""What the chapters share: flags, runs, data, pictures, files. No equation of a model lives here.

A chapter is understood with this file closed. Importing it changes nothing.
All pictures are uint8 [N, C, H, W] in memory (0..255) and float32 in [-1, 1] in a batch.
"""

import argparse
import collections
import contextlib
import csv
import errno
import io
import logging
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import distributed, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import functional as TF
from torchvision.utils import make_grid

PICTURE_FORMATS = {"AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG",
                   "PPM", "PSD", "QOI", "SGI", "TGA", "TIFF", "WEBP"}  # those with photos in them
N_QUICK = 2000  # pictures of each part that --quick takes
WIPE = "\r\033[K"  # on a terminal: back to the start of the line, and empty it
MAY_CHANGE_ON_RESUME = {"out", "data_dir", "device", "resume"}


# --- flags, errors -----------------------------------------------------------------------------

def say(text, file=None):
    """print(text), in the place of a progress line that stands on the terminal unfinished."""
    file = file or sys.stdout
    print(f"{WIPE * file.isatty()}{text}", file=file)


def fail(message, status=2):
    """Ends the run with one line on stderr; status 2 means that the input was wrong."""
    if rank() == 0:  # all processes fail alike, and one of them says so
        say("error: " * (status != 130) + shown(message), sys.stderr)  # 130: Ctrl-C is no error
    raise SystemExit(status)


class OneLineParser(argparse.ArgumentParser):
    """argparse, except that a wrong flag gives one line instead of the whole usage text."""

    def error(self, message):
        fail(f"{message} (see python {self.prog} --help)")


def number(kind, least=None, most=None, above=None):
    """argparse type: a finite int or float (`kind`) with least <= it <= most, or above < it."""
    low = least if above is None else above
    bounds = f"from {low} to {most}" if most is not None else \
        f"of {least} or more" if above is None else f"above {above}"
    wanted = f"a {'whole ' if kind is int else ''}number {bounds}"

    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value < math.inf and value != above and (most is None or value <= most):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")

    return parse


def parser(doc, file, trains=True, data=None, data_help="mnist, fashion, cifar10, digits (drawn, "
           "no download), or a folder of pictures; if not given: mnist, or digits without it"):
    """A parser with the flags that all chapters share; `doc` becomes the head of --help.

    trains: with the flags for data, devices and --resume.
    """
    script = Path(file).stem

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            if isinstance(action.default, list):
                return f"{action.help} (default: {' '.join(map(str, action.default))})"
            hidden = action.default is None or action.default is False  # tells nobody anything
            return action.help if hidden else super()._get_help_string(action)

    p = OneLineParser(prog=f"{script}.py", description=doc, formatter_class=Formatter,
                      allow_abbrev=False)  # or 01's --k 5 would be taken for --k-test 5
    g = p.add_argument_group("shared flags")
    if trains:
        g.add_argument("--data", default=data, metavar="NAME", help=data_help)
        g.add_argument("--data-dir", type=Path, default=Path("data"),
                       help="where data sets are kept")
        g.add_argument("--size", type=number(int, 1), default=64, help="pixels a side, for folders")
        g.add_argument("--skip", action="store_true",
                       help="leave out what cannot be used of a folder: broken, or below --size")
        g.add_argument("--device", help="cpu, cuda, mps; if not given: the GPU if there is one")
        g.add_argument("--resume", action="store_true", help="go on from checkpoint.pt in --out")
    g.add_argument("--out", type=Path, default=Path("out") / script, help="where results go")
    g.add_argument("--seed", type=number(int, 0, 2 ** 31 - 1), default=0,
                   help="same seed, same CPU: same numbers")
    g.add_argument("--quick", action="store_true", help="seconds instead of minutes: the same "
                   "code, few steps, drawn digits if no --data is given" if trains else
                   "with one seed")
    p.set_defaults(script=script)
    return p


def parse(p, argv, quick):
    """p.parse_args(argv); with --quick, flags that are not given take their values from `quick`.

    A quick run writes to a folder of its own within --out, where it replaces no picture or weights.
    """
    args = p.parse_args(argv)
    if args.quick:
        p.set_defaults(**quick)
        args = p.parse_args(argv)
        args.out /= "quick"
        if quick and not rank():  # 08 has nothing to train: its pictures are the same
            print(f"a quick run tests the code, in {relative(args.out)}: expect grey, leave "
                  "--quick out for pictures")
    return args


def as_script(main):
    """Runs main(), for `if __name__ == "__main__"`, whatever stdout and stderr are.

    A character that the encoding lacks is replaced; what is written to a closed stream (>&-) is
    dropped; when the reader leaves (| head), the run ends silently with status 141, as by SIGPIPE.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the shell has closed it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    with contextlib.suppress(AttributeError):  # IDLE's has no encoding
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            with stopped_in_one_line():
                main()
        finally:
            sys.stdout.flush()  # here, not when Python has ended
    except OSError as e:
        left = (errno.EPIPE, errno.EINVAL) if os.name == "nt" else (errno.EPIPE,)  # the reader has
        if e.filename or e.errno not in (*left, errno.ENOSPC):
            raise  # that is of a file, not of what is printed
        nowhere = os.open(os.devnull, os.O_WRONLY)  # for what Python writes when it ends
        os.dup2(nowhere, sys.stdout.fileno())
        if e.errno == errno.ENOSPC:
            fail("cannot print: the disk is full; files are whole", status=1)
        os.dup2(nowhere, sys.stderr.fileno())
        raise SystemExit(141)


def check_batch(args, images, why):
    """Ends the run if a process would get one picture of a batch. why: the reason it is told."""
    least = 2 * processes()
    if min(args.batch, len(images.x)) < least:
        fail(f"{why}: use --batch {least} or more, and as many pictures")


# --- a run -------------------------------------------------------------------------------------

class Run:
    """One execution of a chapter: its device, its processes, and how far it has come.

        with Run(args) as run:                          # takes --out, and gives it back at the end
            for name in run.each(names):                # the training runs that are not over yet
                ...
                batches = run.batches(images, 64)
                for step in run.steps(800, net=net, opt=opt):
                    x, y = next(batches)
                    ...                                 # a step of the training, written out
                    run.log(loss=loss)
                run.done[name] = ...                    # what the training has come to

    `steps` writes the checkpoint between two steps: ten times in a training, and on Ctrl-C. After
    --resume the same loops go on where they were. Attributes: device; step, of total; done, the
    results by name; rows, the log of all training runs; kept, a dict for what a training collects;
    shots, the pictures of process.png by training and step.

    Under torchrun every process runs the same lines on its part of each batch. Gradients are
    averaged over the processes, all else is the affair of each: its noise, and the statistics of
    its batch norms, which CUDA alone has means to share. Only the first prints and writes.
    """

    def __init__(self, args):
        self.args, self.done, self.kept, self.rows, self.shots = args, {}, {}, [], {}
        self.saved, self.looked, self.training, self.pressed = None, False, False, False
        self.parts = None  # of the training that goes on, or of the last one

    def __enter__(self):
        with contextlib.ExitStack() as taken:
            taken.enter_context(stopped_in_one_line(resumes="resume" in self.args))
            taken.enter_context(joined())
            taken.enter_context(contextlib.redirect_stdout(io.StringIO()) if rank()
                                else locked(self.args.out))
            if threading.current_thread() is threading.main_thread():  # others get no signals
                before = signal.signal(signal.SIGINT, self.on_ctrl_c)
                taken.callback(signal.signal, signal.SIGINT, before)
            self.device = pick_device(self.args.device) if "device" in self.args \
                else torch.device("cpu")
            torch.manual_seed(self.args.seed)
            taken.push(self.finish)
            self.taken = taken.pop_all()
        return self

    def __exit__(self, *error):
        return self.taken.__exit__(*error)

    def finish(self, failed, *_):
        """A run that has come to its end says so in its checkpoint: its last training is done."""
        if not failed and self.parts is not None and self.name in self.done:
            self.save()

    def on_ctrl_c(self, *_):
        """In a training the first Ctrl-C asks steps() to stop after this step; a second one stops
        at once, or with several processes is ignored. Elsewhere Ctrl-C stops at once."""
        if not self.training or self.pressed and processes() == 1:
            raise KeyboardInterrupt
        self.pressed = True

    def each(self, names):
        """The names of the training runs that are not over yet, one after the other."""
        if not self.looked:  # not earlier: load_images adds to args what is compared with it
            self.saved, self.looked = load_checkpoint(self.args), True
            if self.saved:
                self.done, self.rows, self.shots = (
                    self.saved[key] for key in ("done", "rows", "shots"))
                print(f"going on after {place(self.saved)}")
        for self.name in names:
            if self.name not in self.done:
                yield self.name

    def steps(self, total, **parts):
        """1, 2, ..., total, or what is left of them after --resume.

        parts: by name, what a step changes and has a state_dict(): networks, optimisers, rates.
        """
        self.total, self.step, self.kept = total, 0, {}
        self.drawn = self.pictures = 0  # batches since step 0, pictures since the start
        if self.parts is None and not self.args.resume:
            tell_replaced(self.args.out)
        self.parts = parts
        join_processes(parts, self.args.seed, self.device)
        if self.saved and self.saved["name"] not in self.done:
            if self.saved["name"] != self.name:
                fail(f"{relative(self.args.out / 'checkpoint.pt')} is in the midst of "
                     f"{self.saved['name']}: name it too, before {self.name}")
            self.step, self.kept, self.drawn = (
                self.saved[key] for key in ("step", "kept", "drawn"))
            restore(self.saved, parts)
        self.saved = None
        self.show = progress(self.name, total, self.step)
        self.training = True
        for self.step in range(self.step + 1, total + 1):
            yield self.step
            stop = any(of_all_processes(self.pressed))
            if self.due(10) or stop:
                write_log(self.args.out / "log.csv", self.rows)
                self.save()
            if stop:
                fail(f"stopped at step {self.step}; the same command with --resume goes on",
                     status=130)
        self.training = False
        if any(of_all_processes(self.pressed)):  # while the last checkpoint was written
            fail(f"stopped at step {self.step}; the same command with --resume goes on", status=130)
        share_state(parts)

    def save(self):
        """Writes the checkpoint, with all that the next life of this run needs; no broken one."""
        for name, part in self.parts.items():
            if isinstance(part, nn.Module) and not all(p.isfinite().all()
                                                       for p in part.parameters()):
                fail(f"the weights of {name} are not finite after step {self.step}: stopped, the "
                     "last checkpoint is kept", status=1)
        save_checkpoint(self.args, self.parts, name=self.name, step=self.step, rows=self.rows,
                        kept=self.kept, shots=self.shots, drawn=self.drawn, done=self.done)

    def batches(self, images, size):
        """Endless shuffled batches (x, y) of `size` pictures, of which this process gets its part.

        x: float [size, C, H, W] in [-1, 1]; y: labels [size], or None where the data has none.
        """
        self.data = images.name
        size = self.part(min(size, len(images.x))) * processes()
        mine = slice(rank(), None, processes())
        for x, y in batches(images, size, self.args.seed, self.drawn, mine):
            self.drawn += 1
            self.pictures += size
            yield x, y

    def part(self, n):
        """How many of n examples fall to this process."""
        if n % processes():
            fail(f"{n} examples do not divide among {processes()} processes: use --batch "
                 f"{max(n - n % processes(), processes())}")
        return n // processes()

    def due(self, times):
        """True after about `times` of the steps (after each if they are fewer), and at the end."""
        return due(self.step, self.total, times)

    def at(self, shares):
        """True after these shares of the steps: 0.5 is the middle of the training, 1 its end."""
        return self.step in {math.ceil(share * self.total) for share in shares}

    def log(self, **numbers):
        """Shows the numbers of a step, means over the processes, and keeps 40 rows of them.

        Ends the run if one is not finite; the last checkpoint, which is good, stays as it is.
        """
        mine = [value.item() if torch.is_tensor(value) else value for value in numbers.values()]
        self.numbers = {name: sum(every) / len(every)
                        for name, every in zip(numbers, zip(*of_all_processes(mine)))}
        check_finite(self.step, **self.numbers)
        self.show(self.step, self.pictures, **self.numbers)
        if self.due(40):
            self.note()

    def note(self, **more):
        """Keeps the numbers of this step, and more, as a row for log.csv."""
        here = {"model": self.name, "step": self.step}
        if not self.rows or not here.items() <= self.rows[-1].items():
            self.rows.append(here | self.numbers)
        self.rows[-1] |= more

    def shoot(self, x):
        """Adds pictures x of this step, [N, C, H, W] in [-1, 1], to process.png, written again."""
        first = not self.shots
        self.shots.setdefault(self.name, {})[self.step] = to_uint8(x).cpu()
        save_process(self.args.out / "process.png", self.shots,
                     f"chapter {self.args.script[:2]} on {self.data}, seed {self.args.seed}",
                     tell=first)


@contextlib.contextmanager
def stopped_in_one_line(resumes=False):
    """Within it a KeyboardInterrupt, see Run.on_ctrl_c, ends the run with one line."""
    try:
        yield
    except KeyboardInterrupt:
        fail("stopped; files are whole"
             + ", and --resume goes on after the last checkpoint" * resumes, 130)


@contextlib.contextmanager
def locked(out):
    """Within it no other run writes into the folder `out`, which is made if it is not there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "a", encoding="utf-8")
    except OSError as e:
        fail(f"cannot write to {out} ({e.strerror}): choose another folder with --out")
    with lock:
        try:
            import fcntl
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows: nothing refuses a second run there
            pass
        except OSError as e:
            if e.errno in (errno.EACCES, errno.EAGAIN):  # else: a file system without locks
                fail(f"another run is writing to {out}: wait for it, or choose another --out")
        for left in out.glob("*.[0-9]*.tmp"):  # by a run that was killed while it wrote
            left.unlink()
        yield


def pick_device(name):
    """The device called `name`, or the best that is there if it is None; says which."""
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        device = torch.device(name or best)
        if device.type == "cuda" and processes() > 1:  # each has a GPU of its own
            here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
            if here > gpus:  # all processes see it alike
                fail(f"{here} processes for {gpus} GPUs: use --nproc-per-node {gpus}, or --device "
                     "cpu")
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):  # not built in, not in this machine, or taken
        fail(f"device {str(name or best)!r} cannot be used here: use --device cpu")
    print(f"device {device}" + f", {torch.get_num_threads()} threads" * (device.type == "cpu")
          + f", {processes()} processes" * (processes() > 1))
    return device


# --- rates, and an average of weights -----------------------------------------------------------

def fading(opt, steps):
    """A schedule for a rate: constant for half of the steps, then in a straight line to 0."""
    return LambdaLR(opt, lambda step: min(1, 2 - 2 * step / steps))


def average_of(net, steps):
    """An average of a network's weights, kept beside it: average.update_parameters(net) each step.

    Over about a quarter of the steps: a <- d a + (1 - d) w, d = exp(-4 / steps). Draws better than
    the last weights do. Its batch norms have to be settled before it is used.
    """
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(math.exp(-4 / steps)))


def settle(average, z):
    """Gives the batch norms of an average the statistics of its own maps, at these z [N, d].

    Those of the networks that were averaged do not fit it: with them it draws grey.
    """
    update_bn(z.split(1000), average)


# --- several processes -------------------------------------------------------------------------

def processes():
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank():
    """The number of this process, from 0 on."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


@contextlib.contextmanager
def joined():
    """Within it the processes that torchrun has started can reach each other."""
    mine = processes() > 1 and not distributed.is_initialized()
    if mine:
        distributed.init_process_group()  # nccl for what lies on GPUs, gloo for the rest
    yield
    if mine:
        distributed.destroy_process_group()


def of_all_processes(value):
    """A list: this value, as each of the processes has it."""
    values = [value] * processes()
    if processes() > 1:
        distributed.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def first_alone():
    """The first process goes through it before the others do, which then find what it wrote."""
    if rank():
        distributed.barrier()
    yield
    if processes() > 1 and rank() == 0:
        distributed.barrier()


def join_processes(parts, seed, device):
    """The same networks for all processes, and from here on the mean of their gradients."""
    if processes() == 1:
        return
    share_state(parts)
    for net in parts.values():
        if isinstance(net, nn.Module):
            if device.type == "cuda":
                nn.SyncBatchNorm.convert_sync_batchnorm(net)
            for p in net.parameters():
                p.register_post_accumulate_grad_hook(
                    lambda p: distributed.all_reduce(p.grad.div_(processes())))
    torch.manual_seed(seed * processes() + rank())  # each its own noise


def share_state(parts):
    """Gives the networks of all processes the weights and statistics of the first."""
    for net in parts.values():
        if processes() > 1 and isinstance(net, nn.Module):
            for tensor in net.state_dict().values():
                distributed.broadcast(tensor, src=0)


# --- data --------------------------------------------------------------------------------------

class Images(NamedTuple):
    """A whole data set in memory: x uint8 [N, C, H, W], y int64 [N] or None, name for titles.

    stamp: a short text that is another one for other pictures or labels (see stamp_of).
    """
    x: torch.Tensor
    y: torch.Tensor | None
    name: str
    stamp: str = ""


def load_images(args, device, train=True):
    """The data set that args.data names, as Images on `device`; says which source it took.

    train: the training or the test part.
    Sets args.data to what it took and args.train_stamp or test_stamp, so that a checkpoint knows.
    """
    with first_alone():  # what is downloaded, drawn or decoded is kept, and the others read it
        images = find_images(args, train)
    if args.quick:
        images = images._replace(x=images.x[:N_QUICK], y=None if images.y is None
                                 else images.y[:N_QUICK])
    images = images._replace(stamp=stamp_of(images))
    if len(set(of_all_processes(images.stamp))) > 1:
        fail("the processes have read different pictures: give all of them the same --data-dir")
    setattr(args, "train_stamp" if train else "test_stamp", images.stamp)
    n, c, h, w = images.x.shape
    print(f"data {images.name}: {n:,} {'training' if train else 'test'} pictures, {c}x{h}x{w}")
    return images._replace(x=images.x.to(device), y=None if images.y is None
                           else images.y.to(device))


def find_images(args, train):
    """load_images, without a device and with all pictures."""
    name = "mnist" if args.data is None else args.data
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
    elif os.path.isdir(name):
        images = load_folder(args, Path(name), train)
    elif os.path.exists(name):
        fail(f"--data {shown(name)} is no folder: give the folder of the pictures, unpacked")
    else:
        fail(f"--data {shown(name)}: neither a known data set (mnist, fashion, cifar10, digits; "
             "see --help) nor a folder")
    args.data = name
    return images


def load_torchvision(name, root, train):
    """MNIST, Fashion-MNIST or CIFAR-10 from `root`, downloaded if missing; None if impossible.

    Ends the run if files of it are there and cannot be read.
    """
    kind, title = {"mnist": (datasets.MNIST, "MNIST"),
                   "fashion": (datasets.FashionMNIST, "Fashion-MNIST"),
                   "cifar10": (datasets.CIFAR10, "CIFAR-10")}[name]
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds: a silent network must not hang the run
    try:
        for download in (False, True):
            with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
                data = kind(root, train=train, download=download)
                x, y = torch.as_tensor(data.data), torch.as_tensor(data.targets)
                x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)
                if len(x) == len(y):
                    return Images(x.contiguous(), y, title)
    finally:
        socket.setdefaulttimeout(before)
    wrong = wrong_file(kind, root)
    if wrong:
        fail(f"{title}: {wrong}, or use --data digits")
    return None


def wrong_file(kind, root):
    """What is wrong with the files of torchvision's data set `kind` below `root`, and what to do.

    None if no file of it is there.
    """
    if kind is datasets.CIFAR10:
        folder, archive = root / kind.base_folder, root / kind.filename
        parts = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
        known = {folder / name: md5 for name, md5 in parts if folder.is_dir()} or {
            file: kind.tgz_md5 for file in [archive] if file.exists()}
        wrong = [relative(file) for file, md5 in known.items() if not check_integrity(file, md5)]
        return f"{few(wrong)} is missing or damaged: put the true one there" if wrong else None

    home, lengths = root / kind.__name__, {}
    loose = root.glob("*ubyte*") if kind is datasets.MNIST else ()  # Fashion's have these names too
    there = [file for file in sorted([*loose, *home.rglob("*ubyte*")]) if file.is_file()]
    for archive, md5 in kind.resources if there else ():
        packed = home / "raw" / archive
        file = packed.with_suffix("")
        if file in there:
            try:
                read = read_image_file if "images" in archive else read_label_file
                lengths[archive.split("-idx")[0]] = len(read(file))
            except Exception as e:
                why = getattr(e, "strerror", None) or "it is damaged or cut off"
                return f"{relative(file)} cannot be read ({why}): put the true one there"
        elif packed in there and not check_integrity(packed, md5):
            return f"{relative(packed)} is damaged or cut off: put the true one there"
        elif packed not in there:
            like = [other for other in there if other.name.replace(".", "-").startswith(file.name)]
            return f"{relative(like[0])} has to be {relative(file)}: rename it" if like else \
                   f"{relative(file)} is missing: put it there"
    for part in ("train", "t10k"):
        pictures, numbers = (lengths.get(f"{part}-{what}") for what in ("images", "labels"))
        if None not in (pictures, numbers) and pictures != numbers:
            return f"the {part} files in {relative(home / 'raw')} have {pictures} pictures and " \
                   f"{numbers} labels: put the true ones there"
    return f"the .gz files in {relative(home / 'raw')} cannot be unpacked there: unpack them" \
        if there else None


def load_folder(args, folder, train):
    """Every picture below `folder` as RGB, centre-cropped to a square and resized to args.size.

    Every tenth is for tests: of all pictures, or with labels() of each label, where a label of
    fewer than ten gives its last. Pictures of all labels alternate evenly.
    """
    files, left_out = picture_files(folder, args.out)
    pictures = decoded(args, folder, files)
    bad = [shown(file.relative_to(folder)) for file in files if file not in pictures]
    left_out += [f"{len(bad):,} that cannot be used ({few(bad)})"] * bool(bad)
    left_out = f"left out {', '.join(left_out)}" if left_out else ""
    if len(pictures) < 2:
        fail(f"{shown(folder)} holds {len(pictures)} pictures: give a folder with at least 2"
             + f" ({left_out})" * bool(left_out))
    y, said = labels(folder, list(pictures))
    for text in (left_out, said):
        if text and train:  # said once
            say(f"{shown(folder)}: {text}")

    group = torch.zeros(len(pictures), dtype=torch.long) if y is None else y
    counts = torch.bincount(group)
    nth = torch.arange(len(group)) - (counts.cumsum(0) - counts)[group]  # among its like
    held_out = nth % 10 == (9 if y is None else (counts - 1).clamp(max=9)[group])
    order = ((nth + 0.5).double() / counts[group]).argsort(stable=True)
    chosen = order[held_out[order] != train]  # to train: those that are not held out
    if not len(chosen):
        fail(f"{shown(folder)} holds {len(pictures)} pictures, and every tenth is kept for tests: "
             "give a folder with at least 10")
    x = list(pictures.values())
    return Images(torch.stack([x[i] for i in chosen.tolist()]), None if y is None else y[chosen],
                  shown(folder.resolve().name))


def labels(folder, files):
    """The labels of sorted `files`, int64 [N] or None, and what is to be said about them.

    If all lie in subfolders of `folder`, two or more, and each of these holds two or more, then the
    subfolders are the labels, in the order of their names.
    """
    parts = [file.relative_to(folder).parts for file in files]
    counts = collections.Counter(part[0] for part in parts)
    if len(counts) < 2 or any(len(part) == 1 for part in parts):
        return None, ""
    single = [shown(name) for name, n in counts.items() if n == 1]
    if single:
        return None, (f"no labels, since {len(single):,} of {len(counts):,} subfolders hold one "
                      f"picture ({few(single)})")
    number = {name: i for i, name in enumerate(counts)}
    names = few([f"{i} {shown(name)}" for name, i in number.items()], 10)
    return torch.tensor([number[part[0]] for part in parts]), f"labels {names}"


def picture_files(folder, out):
    """The picture files below `folder`, and what is left out, as a list of texts.

    Files: {path: the path that links lead to}, sorted by name. What is hidden is passed over,
    linked folders are followed, each file is taken once, results of runs are left out.
    """
    def refuse(e):
        fail(f"{shown(e.filename)} cannot be read ({e.strerror}): change that, or move it away")

    Image.init()
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items()
                if kind in PICTURE_FORMATS and kind in Image.OPEN}
    top, results = (Path(os.path.realpath(path)) for path in (folder, out))
    if top == results:
        fail(f"--out is {shown(folder)}, where the data lie: choose another")

    def written(path):
        return path.is_relative_to(results) and not top.is_relative_to(results)

    files, others, no_files, runs, seen = {}, collections.Counter(), [], [], set()
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = Path(os.path.realpath(here))
        root = here == str(folder)
        above = top.is_relative_to(real)  # a link back: what it holds is not of this folder
        if not root and (written(real) or above or real in seen or ".lock" in names):
            folders.clear()
            if ".lock" in names and not written(real):
                runs.append(shown(here))
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in sorted([*folders, *names]):
            path = Path(here, name)
            suffix = path.suffix.lower()
            if is_hidden(name) or name in folders and suffix not in suffixes:
                continue
            if suffix not in suffixes:
                others[suffix or "without suffix"] += 1
            elif not path.is_file():
                no_files.append(shown(path.relative_to(folder)))
            elif (true := Path(os.path.realpath(path))) not in seen and not written(true):
                seen.add(true)
                files[path] = str(true)
    left_out = [f"{n:,} {shown(suffix)}" for suffix, n in others.most_common(5)]
    left_out += [f"{len(others) - 5} other kinds of files"] * (len(others) > 5)
    left_out += [f"{len(no_files):,} that are no files ({few(no_files)})"] * bool(no_files)
    left_out += [f"results of runs ({few(runs)})"] * bool(runs)
    return dict(sorted(files.items(), key=lambda file: file[0].parts)), left_out


def is_hidden(name):
    """What an operating system puts beside the pictures."""
    return name.startswith(".") or name == "__MACOSX"


def decoded(args, folder, files):
    """{path: uint8 [3, size, size]} for those of `files`, see picture_files, that can be used.

    If some cannot, the run ends with one line, or with --skip they are missing here. What was
    decoded is kept in args.out/pictures.pt; later only new and changed files are decoded.
    """
    size, kept = args.size, args.out / "pictures.pt"
    stamps = {file: f"{true!a} {stat.st_size} {stat.st_mtime_ns}"
              for file, true in files.items() for stat in [file.stat()]}
    known = {}
    with contextlib.suppress(Exception):  # a missing or broken file is made again
        saved = torch.load(kept, weights_only=True)
        if saved["size"] == size:
            known = dict(zip(saved["stamps"], saved["x"], strict=True))
    pictures = {file: known.get(stamps[file]) for file in files}  # in their order
    new = [file for file in files if pictures[file] is None]
    bad, sides, show = {}, [], progress("reading pictures", len(new))
    try:
        for i, file in enumerate(new, start=1):
            try:
                picture = read_picture(file, "RGB", "white")
                side = min(picture.size)
                if side < size:
                    sides.append(side)
                    raise ValueError(f"is {picture.width}x{picture.height}")
                pictures[file] = TF.pil_to_tensor(
                    TF.resize(TF.center_crop(picture, side), [size, size]))
            except ValueError as e:
                bad[file] = f"{shown(file.relative_to(folder))} {e}"
            show(i)
    finally:  # after Ctrl-C too: what has been decoded is not lost
        pictures = {file: picture for file, picture in pictures.items() if picture is not None}
        if any(file in pictures for file in new):
            save({"size": size, "stamps": [stamps[file] for file in pictures],
                  "x": torch.stack(list(pictures.values()))}, kept)
    if bad and not args.skip:
        small = f"--size {fitting(min(sides))} takes those that are smaller than {size}, " \
            if sides and min(sides) > 3 else ""
        fail(f"{len(bad):,} of {len(files):,} pictures in {shown(folder)} cannot be used: "
             f"{few(list(bad.values()))}; {small}--skip leaves all such out")
    return pictures


def few(texts, n=3):
    """The first n texts, and how many there are besides."""
    return ", ".join(texts[:n]) + f" and {len(texts) - n:,} more" * (len(texts) > n)


def shown(text):
    """The text or path for printing: on one line, whatever characters or bytes it is made of."""
    return str(text) if str(text).isprintable() else ascii(str(text))


def open_picture(path, mode, ground="white", skip=""):
    """The picture file at `path` as a PIL image of the mode "L" or "RGB", 8 bits, upright.

    Turned by its EXIF orientation; 16-bit grey is scaled to 8 bits; transparent parts show `ground`
    ("white" for pictures, "black" for masks); of an animated file the first frame. Ends the run
    with one line that names the file and the true reason if it cannot be read faithfully (32-bit
    and float pictures whose range is not known, truncated files, files above Pillow's pixel limit);
    skip: what the line says about leaving it out.
    """
    try:
        return read_picture(path, mode, ground)
    except ValueError as e:
        fail(f"{shown(path)} {e}" + f"; {skip}" * bool(skip))


def read_picture(path, mode, ground):
    """open_picture(), but raises ValueError with the reason: "cannot be read ..."."""
    try:
        if not os.path.isfile(path):
            raise ValueError("there is no such file")
        with quiet(), Image.open(path) as picture:
            return flattened(picture, mode, ground)
    except Image.DecompressionBombError:
        reason = f"it has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, Pillow's limit: make " \
                 "it smaller"
    except UnidentifiedImageError:
        reason = "it is damaged, or in no format that Pillow reads"
    except Exception as e:  # Pillow raises all kinds for damaged files
        reason = getattr(e, "strerror", None) or shown(str(e) or "it is damaged")
    raise ValueError(f"cannot be read as a picture ({reason})")


@contextlib.contextmanager
def quiet():
    """Within it Pillow and its libraries write nothing: they read a file, or raise."""
    log = logging.getLogger("PIL")
    with contextlib.ExitStack() as after, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after.callback(log.setLevel, log.level)
        log.setLevel(logging.CRITICAL)
        if sys.__stderr__:  # libtiff writes there, past Python
            stderr = os.dup(2)
            after.callback(os.close, stderr)
            after.callback(os.dup2, stderr, 2)
            with open(os.devnull, "w", encoding="utf-8") as nothing:
                os.dup2(nothing.fileno(), 2)
        yield


def flattened(picture, mode, ground):
    """An open picture upright, in `mode`, over the colour `ground`; see open_picture."""
    tags = getattr(picture, "tag_v2", {})  # TIFF: 339 signed or float, 258 bits, 262: 0 is black
    deep = picture.mode.startswith("I;16") or (
        picture.mode == "I" and picture.format in ("PNG", "PPM"))  # their white is 65,535
    if (set(tags.get(339, (1,))) != {1} or picture.mode in ("I", "F") and not deep
            or deep and (tags.get(258, (16,)), tags.get(262, 1)) != ((16,), 1)):
        raise ValueError("which of its values is white is not known: save it with 8 or 16 bits, "
                         "unsigned, 0 for black")
    if (picture.format == "PNG" and picture.mode != "P" and "transparency" in picture.info
            and ";" in str(picture.tile)):  # a colour of 2, 4 or 16 bits, compared with one of 8
        raise ValueError("Pillow misses its transparent colour: save it with an alpha channel")
    ImageOps.exif_transpose(picture, in_place=True)
    if deep:
        picture = picture.convert("I").point(lambda value: value / 257 + 0.5).convert("L")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        if not picture.getchannel("A").getbbox():
            raise ValueError("all of it is transparent")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, ground), picture)
    return picture.convert("RGB").convert(mode)


def fitting(side):
    """The largest side up to `side`, from 4 on, that halving it down to 4 to 7 leaves whole."""
    times = 2 ** max(1, int(math.log2(side / 4)))
    return max(4, side // times * times)


def check_side(images):
    """Ends the run if the networks, which halve a side and double it again, draw another one."""
    side = images.x.shape[2]
    fits = fitting(side)
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


def paths(draw, codes):
    """For each two neighbours among the codes the first, their middle, the second, as pictures.

    draw(codes [N, d]) -> pictures in [-1, 1]; uint8 [N - 1, 3, C, H, W]. For 07's --score.
    """
    ends, middle = (to_uint8(draw(part)).cpu() for part in (codes, (codes[:-1] + codes[1:]) / 2))
    return torch.stack([ends[:-1], middle, ends[1:]], dim=1)


def nearest(x, images):
    """Of each x [N, C, H, W] the distance to the nearest of the first 10,000 training pictures, and
    its index: two [N].

    Root mean square over the pixels, in [-1, 1] units. Blur lowers it: look at the pictures, too.
    """
    train = to_float(images.x[:10_000]).flatten(1)
    found = [torch.cdist(part, train).min(dim=1) for part in x.flatten(1).split(1000)]
    distances, indices = (torch.cat(parts) for parts in zip(*found))
    return distances / train.shape[1] ** 0.5, indices


def batches(images, batch_size, seed, step=0, part=slice(None)):
    """Endless shuffled batches (x float in [-1, 1], y or None) of Images, from number `step` on.

    The order depends on `seed` and the step alone, so a resumed run sees what the straight run saw.
    A last batch that is not full is left out. part: those of each batch that are wanted.
    """
    x, y = images.x, images.y
    batch_size = min(batch_size, len(x))
    per_epoch = len(x) // batch_size
    while True:
        epoch, first = divmod(step, per_epoch)
        shuffle = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(x), generator=shuffle).to(x.device)
        for chosen in order.split(batch_size)[first:per_epoch]:
            chosen = chosen[part]
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
    with contextlib.suppress(Exception):  # a missing or broken file is drawn again
        return Images(*torch.load(kept, weights_only=True)[train], "drawn digits")  # [test, train]
    both = [draw_digits(4_000, seed=1), draw_digits(20_000, seed=0)]
    with contextlib.suppress(OSError, RuntimeError):  # not kept: that costs seconds, no more
        kept.parent.mkdir(parents=True, exist_ok=True)
        replace(kept, lambda file: torch.save(both, file))
    return Images(*both[train], "drawn digits")


# --- a picture of one's own --------------------------------------------------------------------

def read_mask(path, height, width):
    """1 = seen, 0 = hidden, [1, H, W], from a picture in which the hidden pixels are white."""
    if path is None:
        return torch.ones(1, height, width)
    mask = (TF.to_tensor(open_picture(path, "L", "black")) < 0.5).float()
    if mask.shape[1:] != (height, width):
        fail(f"{path} is {mask.shape[2]}x{mask.shape[1]}, the picture is {width}x{height}: "
                    "a mask has the size of its picture")
    if mask.all() or not mask.any():
        fail(f"{path} hides {'nothing' if mask.all() else 'everything'}: paint what is to "
                    "be repaired white, all else black")
    return mask


def cut(args, x, mask, top, left, height, width, size):
    """A part of x [C, H, W] and of its mask, resized; what hidden pixels hold does not matter."""
    x, hidden = (TF.resized_crop(a, top, left, height, width, size, antialias=True)
                 for a in (x * mask, 1 - mask))  # beyond the rim: 0, and seen
    mask = (hidden < 0.1).float()  # a pixel is seen if nine tenths of it are
    if not mask.any():
        fail(f"{args.mask} hides all that is left of the picture at {size[1]}x{size[0]}")
    return x / (1 - hidden).clamp(min=0.9), mask


def over_squares(pool, x, side):
    """F.max_pool2d or F.avg_pool2d of x [1, H, W] over the square of an odd side at each pixel."""
    rows = pool(x, (side, 1), 1, (side // 2, 0))
    return pool(rows, (1, side), 1, (0, side // 2))


def darkness(x, mask):
    """The share of its ground's light that each pixel of a grey x lacks: [1, H, W], 0 to 1.

    Ink covers less than its ground and so differs more from the mean around it: if it is the
    lighter one, x is inverted. A stroke is thinner than a quarter of the picture, so that every
    square of this side shows some ground. The ground of a pixel is the lightest pixel of the
    square around it in which that is darkest (a closing): it follows a shadow, and no stroke.
    """
    side = min(x.shape[1:]) // 8 * 2 + 1
    mean, seen = (over_squares(F.avg_pool2d, a, side) for a in (x * mask, mask))
    if torch.where(mask == 1, (x - mean / seen) ** 3, 0.0).sum() > 0:
        x = 1 - x
    light = over_squares(F.max_pool2d, torch.where(mask == 1, x, -math.inf), side)
    ground = -over_squares(F.max_pool2d, torch.where(light == -math.inf, light, -light), side)
    return torch.where(mask == 1, (ground - x) / ground.clamp(min=1e-6), 0.0)


def otsu(values):
    """The cut through values [N] in 0 to 1 that parts two classes best (Otsu 1979).

    It has the largest n1 n2 (mean1 - mean2)², which is N² times the variance between the classes.
    """
    n, at = torch.histc(values, 256, 0, 1).double(), (torch.arange(256) + 0.5) / 256
    n1, sum1 = n.cumsum(0), (n * at).cumsum(0)
    n2, sum2 = n1[-1] - n1, sum1[-1] - sum1
    between = n1 * n2 * (sum1 / n1.clamp(min=1) - sum2 / n2.clamp(min=1)) ** 2
    return (between.argmax() + 1) / 256


def pieces(where):
    """Numbers [1, H, W], the same for all pixels of a connected piece of `where`; 0 elsewhere."""
    numbers = torch.arange(1.0, where.numel() + 1).view(where.shape) * where
    while True:  # a pixel takes the highest number beside it, then that of the pixel it began at
        higher = F.max_pool2d(numbers, 3, 1, 1) * where
        higher = torch.cat([torch.zeros(1), higher.flatten()])[higher.long()]
        if torch.equal(higher, numbers):
            return numbers.long()
        numbers = higher


def box(where):
    """Of the true pixels of [1, H, W]: the first row and column, how many rows and columns."""
    rows, columns = (where[0].any(dim=d).nonzero()[:, 0].tolist() for d in (1, 0))
    return rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1


def find_digit(args, x, mask):
    """The digit in a grey photo x [1, H, W]: its ink, 1 on 0, then top, left, rows and columns.

    Ends the run if there is none, or if it is cut off; says what else may be wrong.
    """
    dark = darkness(x, mask)
    ink = dark[(mask == 1) & (dark > otsu(dark[mask == 1]))]
    pen = ink[ink > otsu(ink)].mean()  # not the ink's mean: soft rims and ruled lines are paler
    if not pen >= 0.1:  # grain takes a twentieth of the light, a pale pencil a fifth; nan: no ink
        fail(f"{args.image} is of one colour: there is no digit to see")
    ink = (2 * dark / pen - 0.5).clamp(0, 1)  # 1/4 of the pen or less is ground, 3/4 or more ink
    stroke = ink > 0.5  # a pixel that the pen covers by half has half of its darkness
    number = pieces(stroke | (mask == 0))  # a stroke may go on where it is hidden
    amount = torch.bincount(number.flatten(), stroke.flatten())
    largest = number == amount.argmax()
    # the bar of a 5 is an eighth of it and nearer than a quarter of its length; a speck is smaller
    reach = max(box(largest & stroke)[2:]) // 4 * 2 + 1
    near = torch.isin(torch.arange(len(amount)),
                      number[over_squares(F.max_pool2d, largest.float(), reach) == 1])
    no_speck = amount > amount.max() / 20
    mine = (near & no_speck)[number] & stroke
    top, left, rows, columns = box(mine)
    if not (0 < top < x.shape[1] - rows and 0 < left < x.shape[2] - columns):
        fail(f"what looks like ink touches the rim of {args.image}: show a whole digit, on "
                    "a sheet that fills the photo")
    if (no_speck & ~near).any():
        print(f"{args.image} shows more than one thing: the one with the most ink is taken; cut "
              "the photo if the digit is another")
    if mask[0, top:top + rows, left:left + columns].mean() < 0.5:
        print(f"{args.mask} hides more than half of the digit: its size and middle are those of "
              "what is left")
    soft = over_squares(F.max_pool2d, mine.float(), max(rows, columns) // 20 * 2 + 1)
    return ink * soft, top, left, rows, columns  # soft rims stay, as wide as one of G's pixels


def own_picture(args, c, side):
    """--image and --mask in G's form: x [1, C, side, side] in [-1, 1], mask [1, 1, side, side].

    In colour: the middle square. In grey a digit is brought into the form of MNIST: light on dark,
    the ink's longer side 20 pixels of 28, its centre of mass on pixel 14 of 0 to 27. What hidden
    pixels hold does not matter.
    """
    if args.data == "fashion":
        fail("--image is for digits and for colour: of a grey photo the ink of a digit is taken")
    x = TF.to_tensor(open_picture(args.image, "RGB" if c == 3 else "L", "white"))
    height, width = x.shape[1:]
    mask = read_mask(args.mask, height, width)
    size = min(height, width)
    if size < side and c == 3:
        fail(f"{args.image} is {width}x{height}, and {side}x{side} is the least")
    top, left = (height - size) // 2, (width - size) // 2
    if c == 1:
        scale = 384 / max(height, width)  # fast, and G's 20 pixels are a 19th of it
        x, mask = cut(args, x, mask, 0, 0, height, width,
                      [math.ceil(scale * height), math.ceil(scale * width)])
        x, *corner, rows, columns = find_digit(args, x, mask)
        longer = max(rows, columns)
        if longer < max(1, scale) * side / 2:
            fail(f"the ink in {args.image} is {longer / max(1, scale):.0f} pixels long, and "
                 f"{side / 2:.0f} is the least: go nearer, or cut the photo down to it")
        size = math.ceil(1.4 * longer)
        mass = [(x[0].sum(dim=d) @ torch.arange(1.0 * x.shape[2 - d]) / x.sum()).item()
                for d in (1, 0)]
        top, left = (min(max(math.floor(at + 1 - 14.5 / 28 * size), first + n - size), first)
                     for at, first, n in zip(mass, corner, (rows, columns)))  # all ink inside
    x, mask = cut(args, x, mask, top, left, size, size, [side, side])
    if mask.all():
        why = f"{args.mask} hides nothing that G sees" if args.mask else "there is no --mask"
        print(f"{why}: G redraws the whole digit, blind; a mask of the photo's size, white where "
              "the photo is damaged and black elsewhere, would have that alone repaired")
    return torch.where(mask == 1, 2 * x - 1, -1.0)[None], mask[None]


# --- pictures ----------------------------------------------------------------------------------

def panel(x, columns=8):
    """Pictures uint8 [N, C, H, W] as a grid with `columns` columns: draw(ax) for save_panels."""
    def draw(ax):
        alone = F.pad(x, [1] * 4, value=128)  # make_grid frames pictures if they are several
        picture = make_grid((x if len(x) > 1 else alone).cpu(), nrow=columns, padding=1,
                            pad_value=128)
        ax.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
        ax.axis("off")

    return draw


def draw_points(ax, points, centres, reach, levels=None):
    """Points [N, 2] over the centres of a mixture, in the square of +-reach.

    `levels` [M, M] (optional): probabilities on an M x M grid over that square, drawn as level
    lines every 0.05, from red (0.35 and less) over white (1/2) to blue (0.65 and more).
    """
    if levels is not None:
        line = torch.linspace(-reach, reach, len(levels)).numpy()
        steps = torch.linspace(0, 1, 21).numpy()
        ax.contourf(line, line, levels.numpy(), steps, cmap="RdBu", vmin=0.35, vmax=0.65, alpha=0.7)
        ax.contour(line, line, levels.numpy(), steps, colors="grey", linewidths=0.3)
    ax.scatter(*centres.T.numpy(), s=70, facecolors="none", edgecolors="black", linewidths=0.6)
    ax.scatter(*points.T.numpy(), s=2, color="black", linewidths=0)
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[], aspect="equal")


def figure(rows, columns, width, height, title=""):
    """A matplotlib figure of width x height inches, and its axes in a 2-D array."""
    fig = Figure(figsize=(width, height), layout="constrained")
    fig.get_layout_engine().set(h_pad=0.08)  # inches: the title keeps off those of the panels
    fig.suptitle(title.replace("$", r"\$"), wrap=True)  # a folder's name may have two $ in it
    return fig, fig.subplots(rows, columns, squeeze=False)


def save_panels(path, rows, title="", size=2.6, tell=True):
    """Small multiples: rows of (label, [(title, draw)]), where draw(ax) fills one panel.

    size: of a panel, in inches; in 2.6 eight pictures beside each other have 28 pixels each.
    """
    n = max(len(cells) for _, cells in rows)
    fig, axes = figure(len(rows), n, size * n, (size + 0.25) * len(rows) + 0.3, title)
    for line, (label, cells) in zip(axes, rows):
        for ax, (text, draw) in zip(line, cells):
            draw(ax)
            ax.set_title(text, fontsize=9)
        for ax in line[len(cells):]:
            ax.set_visible(False)
        line[0].text(-0.08, 0.5, label, transform=line[0].transAxes, rotation=90, ha="right",
                     va="center", fontsize=12)
    save_figure(fig, path, tell)


def save_process(path, shots, title, tell=True):
    """Pictures while training, uint8 [N, C, H, W] by training and step: a row for each training.

    One picture for all, since it is drawn again and again: a panel of matplotlib takes ten times
    as long.
    """
    cells = [(name, step, make_grid(x, nrow=math.isqrt(len(x)), padding=1, pad_value=128), i, j)
             for i, (name, row) in enumerate(shots.items())
             for j, (step, x) in enumerate(row.items())]
    columns = max(3, *map(len, shots.values()))  # three, for the title has to fit
    above = cells[0][2].shape[2] // 4  # room for two lines of text
    height, width = cells[0][2].shape[1] + above, round(1.1 * cells[0][2].shape[2])
    inches = 1.8 * len(shots) * height / width
    fig = Figure(figsize=(1.8 * columns, inches + 0.4))
    fig.suptitle(title.replace("$", r"\$"), fontsize=10, wrap=True)
    ax = fig.add_axes((0.01, 0, 0.98, inches / (inches + 0.4)))  # left, bottom, width, height
    whole = torch.full((3, height * len(shots), width * columns), 255, dtype=torch.uint8)
    for name, step, grid, i, j in cells:
        top, left = i * height + above, j * width
        whole[:, top:top + grid.shape[1], left:left + grid.shape[2]] = grid
        ax.text(left, top - above / 8, f"{name if j == 0 else ''}\nstep {step:,}", fontsize=9)
    ax.imshow(whole.permute(1, 2, 0).numpy(), interpolation="nearest")
    ax.axis("off")
    save_figure(fig, path, tell)


def plot_curves(path, log, columns, title="", marks={}):
    """One panel for each of `columns` of the log against its step, with a line for each model.

    columns: {name in the log: what stands above its panel}. marks: {name: where a dotted line is}.
    """
    fig, axes = figure(1, len(columns), 3.2 * len(columns) + 1.5, 2.9, title)
    for ax, (column, text) in zip(axes[0], columns.items()):
        for model in dict.fromkeys(row["model"] for row in log):
            mine = [row for row in log if row["model"] == model and column in row]
            ax.plot([row["step"] for row in mine], [row[column] for row in mine], label=model,
                    linewidth=1, marker="." if len(mine) < 3 else "")
        if all(isinstance(row.get(column, 0), int) for row in log):
            ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        if column in marks:
            ax.axhline(marks[column], color="black", linestyle=":", linewidth=1)
        ax.set(xlabel="step")
        ax.set_title(text, fontsize=9)
        ax.grid(alpha=0.3)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save_figure(fig, path)


def save_figure(fig, path, tell=True):
    """Writes a figure as PNG, and says where."""
    write_whole(path, lambda file: fig.savefig(file, dpi=110, format="png"))
    if tell:
        say(f"wrote {relative(path)}")


def save_animation(figures, path):
    """Writes figures of one size as an animated GIF: a fifth of a second each, two for the last."""
    frames = []
    for fig in figures:
        fig.set_layout_engine(None)  # half the time, and all frames alike
        fig.subplots_adjust(left=0.02, bottom=0.02, right=0.98, top=0.84, wspace=0.05)
        file = io.BytesIO()
        fig.savefig(file, dpi=80, format="png")
        # 64 colours, as far apart as they are: a rare blue stays blue among many greys
        frames.append(Image.open(file).convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE))
    write_whole(path, lambda file: frames[0].save(
        file, format="GIF", save_all=True, append_images=frames[1:], loop=0,
        duration=[200] * (len(frames) - 1) + [2000]))  # milliseconds
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


def progress(label, total, first=0):
    """Returns show(step, items, **numbers): step, numbers, speed and time left.

    On a terminal one line that updates in place; elsewhere a plain line at every tenth.
    `first` = the step before the first; items: pictures seen so far, whose speed is shown.
    """
    began, terminal = time.monotonic(), sys.stdout.isatty()
    last = 0.0

    def show(step, items=0, **numbers):
        nonlocal last
        now = time.monotonic()
        if step < total and (now - last < 0.2 if terminal else step % -(-total // 10)):
            return
        last = now
        seconds = max(now - began, 1e-9)
        text = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        speed, unit = (items, "pictures") if items else (step - first, "steps")
        left = (total - step) * seconds / max(step - first, 1)
        line = (f"{label}  step {step:,}/{total:,}  {left:.0f} s left  {speed / seconds:,.0f} "
                f"{unit}/s  {text}")
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


# --- files -------------------------------------------------------------------------------------

def relative(path):
    """The path as seen from here, for printing."""
    try:
        return os.path.relpath(path)
    except ValueError:  # Windows: from another drive it is not seen
        return os.path.abspath(path)


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
    if rank():
        return  # the first process writes
    try:
        replace(path, write)
    except (OSError, RuntimeError) as e:  # torch says RuntimeError for a full disk
        why = (str(e) or type(e).__name__).splitlines()[0]
        fail(f"cannot write {relative(path)} ({why}); what was there is kept", status=1)


def save(value, path):
    """torch.save, atomically."""
    write_whole(path, lambda file: torch.save(value, file))


def write_log(path, log):
    """The log (a list of dicts) as CSV, whole and atomically; columns are the union of all keys."""
    columns = list(dict.fromkeys(key for row in log for key in row))

    def write(file):
        with open(file, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, columns)
            writer.writeheader()
            writer.writerows(log)

    write_whole(path, write)


def stamp_of(images):
    """The checksum of shapes, pictures and labels as text; 0.04 s for 13,000 faces of 64x64."""
    crc = 0
    for part in (images.x, images.y):
        if part is not None:
            crc = zlib.crc32(str(part.shape).encode(), crc)
            crc = zlib.crc32(part.contiguous().numpy(), crc)
    return f"{crc:08x}"


def settings(args):
    """The flags that decide the numbers, as text: --resume needs the same ones.

    Lists name the training runs to make, and a run may go on with more of them.
    """
    return {"script": args.script, "processes": str(processes())} | {
        name: str(value) for name, value in vars(args).items()
        if name not in MAY_CHANGE_ON_RESUME and not isinstance(value, list)}


def save_checkpoint(args, parts, **rest):
    """Writes the states of `parts` (networks, optimisers, ... by name), the random state, the flags
    and `rest` (tensors, numbers, text, lists, dicts) to checkpoint.pt."""
    gpu = torch.get_device_module() if args.device != "cpu" and torch.accelerator.is_available() \
        else None
    random = of_all_processes((torch.get_rng_state(), gpu and gpu.get_rng_state()))
    save({"settings": settings(args), "parts": {k: part.state_dict() for k, part in parts.items()},
          "random": random, **rest}, args.out / "checkpoint.pt")


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
    refuse_others(path, "made", theirs, settings(args))
    return saved


def refuse_others(path, made, theirs, ours):
    """Ends the run if what is in `path` was `made` with other settings, or pictures, than ours."""
    for name, value in ours.items():
        if theirs.get(name) != value:
            fail(f"{relative(path)} was {made} with " + (
                f"other pictures than {ours['data']} has now: use another --out"
                if name.endswith("stamp") else
                f"{name} {theirs.get(name)}, this run has {value}: use the same flags, or another "
                "--out"))


def place(saved):
    """How far the run of a checkpoint has come, as text."""
    done = saved["name"] in saved["done"]
    return saved["name"] if done else f"step {saved['step']:,} of {saved['name']}"


def tell_replaced(out):
    """Says that the run whose checkpoint is in `out`, if there is one, will be replaced."""
    path = out / "checkpoint.pt"
    if path.exists():
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            left = "a finished run" if saved["name"] in saved["done"] else (
                f"a run that has come to {place(saved)} (--resume goes on with it)")
        except Exception:  # it is replaced whatever is wrong with it
            left = "a checkpoint that cannot be read"
        print(f"{relative(out)} holds {left}: this run begins again and replaces its "
          "log and figures; weights and samples of other training runs stay")


def restore(saved, parts):
    """Puts the states of a loaded checkpoint, the random state too, back into `parts`."""
    try:
        for name, part in parts.items():
            part.load_state_dict(saved["parts"][name])
    except (KeyError, ValueError, RuntimeError):
        fail("the checkpoint is of other networks than this chapter has now: use another --out")
    cpu, gpu = saved["random"][rank()]
    torch.set_rng_state(cpu)
    if gpu is not None and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(gpu)


def load_kept(path, needed, expected):
    """What a run before has kept in `path`: a dict with "settings" and the keys `needed`.

    expected: settings as text, by name, as refuse_others wants them; ends the run if one was
    another, or the file is no such.
    """
    if not path.exists():
        fail(f"there is no {relative(path)}")
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        theirs = kept["settings"]
        [kept[key] for key in needed]
    except Exception:  # whatever is wrong with the file, the answer is the same
        fail(f"{relative(path)} does not hold {', '.join(needed)}: move it away")
    refuse_others(path, "trained", theirs, expected)
    print(f"using what {relative(path)} has kept"
          + (f", trained with {theirs['steps']} steps" if "steps" in theirs else ""))
    return kept
