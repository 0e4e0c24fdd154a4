"""Settings of all tests: one thread, no surprise from time, the same examples on every CI run."""

import gc
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, settings

import common
from harness import draw_nothing
from own_functions import Mine

torch.set_num_threads(1)  # the same rounding on every machine, and no fight over two cores

settings.register_profile("everyday", deadline=None, print_blob=True, max_examples=30,
                          derandomize=bool(os.environ.get("CI")),
                          suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", settings.get_profile("everyday"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "everyday"))


def pytest_addoption(parser):
    parser.addoption("--mine", metavar="FILE", default="tests",  # see .pytest.ini
                     help="put the functions of this file in the place of the chapters', and "
                          "run the properties that are about them, nothing else")


def pytest_configure(config):
    if config.getoption("mine", "tests") != "tests":
        config.pluginmanager.register(Mine(config))


@pytest.fixture(scope="session", autouse=True)
def second_core(request, tmp_path_factory):
    """Calls the functions of all marks beside(run=...), one after the other, while the tests go on.

    They start processes and wait for them, which leaves the first core to the tests.
    """
    folder = tmp_path_factory.mktemp("beside")
    runs = dict.fromkeys(mark.kwargs["run"] for item in request.session.items
                         for mark in item.iter_markers("beside"))
    with ThreadPoolExecutor(max_workers=1) as pool:
        yield {run: pool.submit(run, folder) for run in runs}
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def beside(request, second_core):
    """What run(folder) of the test's mark beside(run=...) returned; all runs share the folder."""
    return second_core[request.node.get_closest_marker("beside").kwargs["run"]].result()


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A --data-dir that all tests share, with a tenth of the digits, drawn once."""
    folder = tmp_path_factory.mktemp("data")
    torch.save([common.draw_digits(400, seed=1), common.draw_digits(2000, seed=0)],
               folder / "digits.pt")
    return folder


@pytest.fixture
def no_figures(request, monkeypatch):
    """None is made, or if the test is marked with draws, none is written."""
    monkeypatch.setattr(common, "save_figure", lambda fig, path, tell=True: None)
    if not request.node.get_closest_marker("draws"):
        draw_nothing(monkeypatch)


@pytest.fixture
def no_checkpoints(monkeypatch):
    """None is written, which in a short run takes longer than the steps between two."""
    monkeypatch.setattr(common, "save_checkpoint", lambda *args, **state: None)


@pytest.fixture
def tensors_alive(monkeypatch):
    """A list that grows by one number in each step of a GAN: how many tensors the test has made."""
    alive = []

    def count(step, **losses):
        if "loss_g" in losses:
            gc.collect()
            alive.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))

    monkeypatch.setattr(common, "check_finite", count)
    gc.collect()
    gc.freeze()  # what is there already is neither collected nor listed, which takes 0.2 s a time
    yield alive
    gc.unfreeze()


@pytest.fixture
def no_download(monkeypatch):
    """Every attempt of torchvision to download fails at once."""
    def refuse(*args, **kwargs):
        raise OSError("no network in tests")
    for module in ("mnist", "cifar"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", refuse)
