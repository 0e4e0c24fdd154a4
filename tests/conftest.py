"""Settings of all tests: one thread, no surprise from time, the same examples on every CI run."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import HealthCheck, settings

import common

torch.set_num_threads(1)  # the same rounding on every machine, and no fight over two cores

settings.register_profile("everyday", deadline=None, print_blob=True, max_examples=30,
                          derandomize=bool(os.environ.get("CI")),
                          suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", settings.get_profile("everyday"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "everyday"))


@pytest.fixture(scope="session", autouse=True)
def quick_runs(request, tmp_path_factory):
    """The scripts of test_quick_run with --quick as a user starts them, and their folder.

    They run one after the other on a second core while the other tests have the first.
    """
    folder, root = tmp_path_factory.mktemp("quick"), Path(common.__file__).parent

    def quick(script):
        return subprocess.run([sys.executable, root / script, "--quick"], cwd=folder, text=True,
                              capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    scripts = [item.callspec.params["script"] for item in request.session.items
               if item.originalname == "test_quick_run"]
    with ThreadPoolExecutor(max_workers=1) as pool:
        yield folder, {script: pool.submit(quick, script) for script in scripts}
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A --data-dir that all tests share, so that the digits are drawn once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def no_figures(monkeypatch):
    """Figures are made but not written, which takes longer than a few steps of training."""
    monkeypatch.setattr(common, "save_figure", lambda fig, path: plt.close(fig))


@pytest.fixture
def no_checkpoints(monkeypatch):
    """None is written, which in a short run takes longer than the steps between two."""
    monkeypatch.setattr(common, "save_checkpoint", lambda *args, **state: None)


@pytest.fixture
def no_download(monkeypatch):
    """Every attempt of torchvision to download fails at once."""
    def refuse(*args, **kwargs):
        raise OSError("no network in tests")
    for module in ("mnist", "cifar"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", refuse)
