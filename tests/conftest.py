"""Settings of all tests, --mine, and the fixtures of whole runs, for tests that ask for them.

A test of a formula needs torch and its chapter: nothing here that it uses imports common.
"""

import gc
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, settings

import mine

torch.set_num_threads(1)  # the same rounding on every machine, and no fight over two cores

settings.register_profile("everyday", deadline=None, print_blob=True, max_examples=30,
                          derandomize=bool(os.environ.get("CI")),
                          suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", settings.get_profile("everyday"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "everyday"))

pytest_addoption, pytest_configure = mine.pytest_addoption, mine.pytest_configure


@pytest.fixture(scope="session")
def second_core(request, tmp_path_factory):
    """Calls the functions of all marks beside(run=...), two at a time, while the tests run.

    They start processes and wait for them; with the tests that is enough to fill two cores.
    """
    folder = tmp_path_factory.mktemp("beside")
    runs = dict.fromkeys(mark.kwargs["run"] for item in request.session.items
                         for mark in item.iter_markers("beside"))
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {run: pool.submit(run, folder) for run in runs}
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session", autouse=True)
def second_core_from_the_start(request):
    """The processes start with the first test, if any test waits for one."""
    if any(item.get_closest_marker("beside") for item in request.session.items):
        request.getfixturevalue("second_core")


@pytest.fixture
def beside(request, second_core):
    """What run(folder) of the test's mark beside(run=...) returned; all runs share the folder."""
    return second_core[request.node.get_closest_marker("beside").kwargs["run"]].result()


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A --data-dir that all tests share, with a tenth of the synthetic digits, made once."""
    import common
    folder = tmp_path_factory.mktemp("data")
    torch.save([common.make_digits(400, seed=1), common.make_digits(2000, seed=0)],
               folder / "synthetic_digits.pt")
    return folder


@pytest.fixture
def no_figures(monkeypatch):
    """No figure is made: a figure takes longer than a few steps of training."""
    from harness import make_no_figures
    make_no_figures(monkeypatch)


@pytest.fixture
def no_checkpoints(monkeypatch):
    """None is written, which in a short run takes longer than the steps between two."""
    import common
    save = common.save
    monkeypatch.setattr(common, "save", lambda value, file: (
        None if file.name == "checkpoint.pt" else save(value, file)))


@pytest.fixture
def tensors_alive(monkeypatch):
    """A list that grows by one number in each step of a GAN: how many tensors the test has made."""
    import common
    alive = []

    def log(run, **losses):
        run.numbers = {name: loss.item() for name, loss in losses.items()}
        if "loss_g" in losses:
            gc.collect()
            alive.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))

    monkeypatch.setattr(common.Run, "log", log)
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
