"""Every training run keeps all its tensors on one device: that of the run.

The meta device has shapes and no numbers, needs no GPU, and refuses to mix with the CPU in most
operations. Two steps of each training run are made on it; what would read a number gets a 1.
"""

import importlib

import pytest
import torch
from torch.nn import functional as F

import common

losses = importlib.import_module("02_gan_losses")
TRAINING_RUNS = [
    *(("01_vae", ["--models", name]) for name in importlib.import_module("01_vae").MODELS),
    ("01_vae", ["--models", "vae", "-k", "3"]), ("01_vae", ["--likelihood", "gaussian"]),
    *(("02_gan_losses", ["--loss", name]) for name in losses.METHODS),
    ("02_gan_losses", ["--loss", "minimax", "--r1", "1", "--input-noise", "0.1", "--g-steps", "2",
                       "--label-noise", "0.1"]),
    *(("03_unrolled_gan", ["--data", data, "-k", "2", *more]) for data in ("ring", "mnist")
      for more in ([], ["--method", "rollback"])),
    ("04_inversion", []), ("05_restoration", []),
    *(("06_wae_moments", ["--models", name]) for name in ("ae", "moments", "mmd")),
    *(("07_sn_wgan_gp", ["--models", name]) for name in importlib.import_module(
        "07_sn_wgan_gp").MODELS)]


class Over(Exception):
    """A training run of two steps has come to its end."""


def two_steps(run, total, **parts):
    """In the place of Run.steps: no checkpoint; ends the run after its last training run."""
    run.total, run.extra, run.n_batches = total, {}, 0
    for run.step in (1, 2):
        yield run.step
    if run.name != "generator" or run.args.script == "05_restoration":
        raise Over


def one_hot(y, classes):
    """F.one_hot looks at the numbers of y, which are not there."""
    return torch.zeros(*y.shape, classes, dtype=torch.long, device=y.device)


@pytest.fixture
def meta(monkeypatch):
    """Everything that reads a number, or cannot do without one, is replaced."""
    images = common.Images(torch.zeros(64, 1, 28, 28, dtype=torch.uint8, device="meta"),
                           torch.zeros(64, dtype=torch.long, device="meta"), "nothing")
    monkeypatch.setattr(common, "load_images", lambda args, device, train=True: (
        setattr(args, "training_pictures", ""), images)[1])
    monkeypatch.setattr(common.Run, "steps", two_steps)
    monkeypatch.setattr(common.Run, "save", lambda run: None)
    monkeypatch.setattr(common.Run, "every", lambda run, times: False)
    monkeypatch.setattr(common.Run, "at", lambda run, shares: False)
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 1.0)
    monkeypatch.setattr(torch.Tensor, "__int__", lambda tensor: 9)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: False)  # nothing is refused
    monkeypatch.setattr(torch.Tensor, "__float__", lambda tensor: 1.0)
    monkeypatch.setattr(losses, "output_fault", lambda x, x_fake: None)
    monkeypatch.setattr(F, "one_hot", one_hot)
    adam = torch.optim.Adam  # the fused one has no meta version
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, fused=False, **rest: adam(*args, **rest))
    gan = importlib.import_module("07_sn_wgan_gp")
    monkeypatch.setattr(gan, "features_and_probs", lambda net, x: (
        torch.zeros(64, 64), torch.ones(64, 10) / 10))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: torch.zeros(
        tensor.shape, dtype=tensor.dtype))


@pytest.mark.parametrize("script, flags", TRAINING_RUNS, ids=lambda value: " ".join(value)
                         if isinstance(value, list) else value)
def test_a_training_run_stays_on_its_device(script, flags, meta, tmp_path):
    with pytest.raises(Over):
        importlib.import_module(script).main(
            ["--device", "meta", "--quick", "--out", str(tmp_path), *flags])


def test_noise_on_the_wrong_device_is_rejected(meta, tmp_path, monkeypatch):
    """The wrong twin: z is generated on the CPU, as it is without device=."""
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, device=None, **rest: randn(*shape, **rest))
    with pytest.raises(RuntimeError, match="(?i)device"):
        losses.main(["--device", "meta", "--quick", "--out", str(tmp_path)])
