"""--mine: right functions pass, wrong ones fail each in its lines, a missing file is written."""

import argparse
import importlib
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import mine

HOME = Path(__file__).parents[1]
STUDENT = '''
import torch
from torch.nn.utils import spectral_norm  # of torch, so not a function of the student

def kl_standard_normal(mu, logvar):                  # right
    return 0.5 * (mu.square() + logvar.expm1() - logvar).sum(1)

def reparameterise(mu, logvar, u):                   # wrong: logvar taken for log σ
    return mu + logvar.exp() * u

def vae_loss(x, x_rec, mu, logvar, x_sigma2):        # right, but for what it has to refuse
    kl = 2 * kl_standard_normal(mu, logvar).mean()
    data = ((x - x_rec) ** 2).mean() / x_sigma2
    return data + kl, data, kl

def negative_elbo(log_px_z, mu, logvar, kl_weight=1.0):  # right; its words of refusal are its own
    if log_px_z.ndim != 2 or len(log_px_z) < 1 or log_px_z.shape[1:] != mu.shape[:1]:
        raise ValueError("sizes")
    return kl_weight * kl_standard_normal(mu, logvar) - log_px_z.mean(0)

def log_bernoulli(x, logits):                        # breaks
    return x.no_such_method(logits)

def wgan_g(fake):                                    # right, for chapters 02 and 07
    return -fake.sum() / len(fake)

def iwae_bound(log_px_z, z, mu, logvar):
    raise NotImplementedError

def add_up(values):
    return sum(values)
'''


def pytest_on(file, *flags):
    """The exit status, and all that pytest says, for a student's file."""
    run = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider",
                          f"--mine={file}", *flags], cwd=HOME, text=True, capture_output=True,
                         encoding="utf-8")
    return run.returncode, run.stdout + run.stderr


def student(folder):
    """What pytest says of STUDENT, and for a file that is not there, twice."""
    file = folder / "common.py"  # it must not hide the book's, nor its neighbour a chapter
    file.write_text(STUDENT, encoding="utf-8")
    (folder / "01_vae.py").write_text("1 / 0", encoding="utf-8")
    new = folder / "new.py"
    return pytest_on(file), [pytest_on(new, "--chapter", "06"), pytest_on(new)], new


@pytest.mark.beside(run=student)
def test_right_functions_hold_and_wrong_ones_fail_each_in_its_lines(beside):
    (status, said), _, _ = beside
    assert status == 1
    for line in ("kl_standard_normal (chapter 01)", "wgan_g (chapter 02)", "wgan_g (chapter 07)"):
        assert re.search(rf"^{re.escape(line)}: all \d propert\w+ hold", said, re.MULTILINE)
    assert "\nnegative_elbo (chapter 01): all 4 properties hold\n" in said
    assert "\nreparameterise (chapter 01), formula: 1 of 2 fail\n" \
        "  samples have the mean and the variance asked for, for seed=0: their variance" in said
    assert "\nvae_loss (chapter 01), formula: all 2 hold\n" in said
    assert "\nvae_loss (chapter 01), edge cases: 2 of 2 fail\n" \
        "  a loss without meaning is refused, for b=2, b_rec=2, x_sigma2=0.0: DID NOT RAISE" in said
    at = STUDENT[:STUDENT.index("no_such_method")].count("\n") + 1
    assert f"AttributeError: 'Tensor' object has no attribute 'no_such_method' (line {at} of " \
        "common.py)\n" in said
    assert "\niwae_bound (chapter 01): not written yet\n" in said
    assert "in no chapter, not tested: add_up\n" in said
    assert "spectral_norm" not in said and "Traceback" not in said
    assert max(map(len, said.splitlines())) < 300 and said.count("\n") < 25


@pytest.mark.beside(run=student)
def test_a_missing_file_is_written_and_passes_nothing(beside):
    _, [(status, said), (second, told)], new = beside
    assert status == 0 and "wrote new.py: replace each `raise NotImplementedError`" in said
    text = new.read_text(encoding="utf-8")
    assert text.count("raise NotImplementedError") == len(mine.book("06")) == text.count("\ndef ")
    module = importlib.import_module("06_wae_moments")
    assert all(getattr(module, name).__doc__.splitlines()[0] in text for name in mine.book("06"))
    assert "\nPARTS = 14\n" in text and "\nSCALES = (" in text  # what the functions use
    assert second == 1 and "passed" not in told
    assert all(f"{name} (chapter 06): not written yet" in told for name in mine.book("06"))


def refusal(folder, text):
    """The line that a file of this text gets."""
    file = folder / "file.py"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(pytest.UsageError) as error:
        mine.Mine(types.SimpleNamespace(args=[], option=argparse.Namespace()), file,
                  list(mine.CHAPTERS))
    line, = error.value.args
    assert "\n" not in line
    return line


@pytest.mark.parametrize("text, line", [
    ("def f(:\n", "file.py does not import: SyntaxError: "),
    ("\n1 / 0\n", "file.py does not import: ZeroDivisionError: division by zero (line 2 of file."),
    ("exit(3)", "file.py does not import: SystemExit: 3"),
    ("", "the file has no function of the chapters"),
    ("def f():\n    pass", "the file has no function of the chapters, only f"),
    ("def vae_los(x):\n    pass", "vae_los is in no chapter; did you mean vae_loss? If it is a "
     "helper, call it _vae_los"),
    ("def vae_loss(x, y):\n    pass",
     "vae_loss(x, y) should be vae_loss(x, x_rec, mu, logvar, x_sigma2) as in chapter 01"),
    ("def inception_score(probs, splits):\n    pass", "inception_score(probs, splits) should be "
     "inception_score(probs, splits=1) as in chapter 07 or inception_score(probs) as in ")])
def test_a_file_that_cannot_be_tested_gets_one_line(tmp_path, monkeypatch, text, line):
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert refusal(tmp_path, text).startswith(line)


@pytest.mark.parametrize("number", mine.CHAPTERS)
def test_marks_name_functions_of_the_chapter_and_every_function_has_one(number):
    """Or a student would be told that a function has no property."""
    tests = importlib.import_module(f"test_{mine.CHAPTERS[number].stem}")
    marked = {name for test in vars(tests).values() for mark in getattr(test, "pytestmark", [])
              if mark.name == "about" for name in mark.args}
    assert marked == mine.book(number).keys()
