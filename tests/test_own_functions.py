"""--mine: right functions of a student pass, wrong ones fail in a line, bad files get one line."""

import argparse
import importlib
import inspect
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from own_functions import Mine, book, places, uses

vae = importlib.import_module("01_vae")
HOME = Path(__file__).parents[1]
STUDENT = '''
import torch
from torch.nn.utils import spectral_norm  # of torch, so not a function of the student

def kl_standard_normal(mu, logvar):                  # right, for chapter 01
    return 0.5 * (mu.square() + logvar.expm1() - logvar).sum(1)

def reparameterise(mu, logvar, u):                   # logvar taken for log σ
    return mu + logvar.exp() * u

def negative_elbo(log_px_z, mu, logvar):             # right; its words of refusal are its own
    if log_px_z.shape != log_px_z.shape[:1] + mu.shape[:1]:
        raise ValueError("sizes")
    return kl_standard_normal(mu, logvar) - log_px_z.mean(0)

def receptive_field(layers):                         # right
    size, stride, padding = 1, 1, 0
    for kernel, s, p, dilation in layers:
        size, padding = size + dilation * (kernel - 1) * stride, padding + p * stride
        stride *= s
    return size, stride, padding

def masks(n, p):                                     # right; no test calls it, but the book does
    m = torch.cartesian_prod(*n * [torch.arange(2).double()]).reshape(2 ** n, n)
    return m, (m * (1 - p) + (1 - m) * p).prod(dim=1)

def jensen_shannon(p, q):                            # breaks
    return p.no_such_method(q)

def log_normal(x, mu, sigma):                        # the chapters have no property for it
    return 0

def add_up(values):
    return sum(values)
'''


def student(folder):
    """The exit status, and all that pytest says, for this file."""
    file = folder / "common.py"  # it must not hide the book's, nor its neighbour a chapter
    file.write_text(STUDENT)
    (folder / "08_theory_checks.py").write_text("1 / 0")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--mine={file}"], cwd=HOME,
        text=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    return run.returncode, run.stdout + run.stderr


@pytest.mark.beside(run=student)
def test_right_functions_hold_and_wrong_ones_fail_each_in_its_lines(beside):
    status, said = beside
    assert status == 1
    for name, chapter in (("kl_standard_normal", "01"), ("negative_elbo", "01"),
                          ("receptive_field", "08")):
        line, = [line for line in said.splitlines() if line.startswith(name)]
        assert line.startswith(f"{name} (chapter {chapter}): ") and line.endswith("hold")
    assert "masks (chapter 08): 1 property holds\n" in said
    assert re.search(r"\nreparameterise \(chapter 01\): 2 of \d properties fail\n", said)
    assert "\n  gradients flow through the sample" not in said  # they do
    assert re.search(r"\n  samples have the mean and the variance asked for, for seed=0: "
                     r"(AssertionError: )?their variance is [\d.]+ times exp\(logvar\)", said)
    at = STUDENT[:STUDENT.index("p.no_such")].count("\n") + 1
    assert "\n  a sure d has value 0 where supports are apart, for seed=0, n=1, m=1: " \
        "AttributeError: 'Tensor' object has no attribute 'no_such_method' " \
        f"(line {at} of common.py)\n" in said
    assert "log_normal (chapter 08): not tested, the chapters have no property for it\n" in said
    assert "in no chapter, not tested: add_up\n" in said
    assert "spectral_norm" not in said and "Traceback" not in said
    assert max(map(len, said.splitlines())) < 300 and said.count("\n") < 25


def refusal(folder, text):
    """The line that a file of this text gets."""
    file = folder / "file.py"
    if text is not None:
        file.write_text(text)
    config = types.SimpleNamespace(invocation_params=argparse.Namespace(dir=folder),
                                   getoption=lambda name: "file.py")
    with pytest.raises(pytest.UsageError) as error:
        Mine(config)
    line, = error.value.args
    assert "\n" not in line
    return line


@pytest.mark.parametrize("text, line", [
    (None, "file.py does not import: FileNotFoundError: "),
    ("def f(:\n", "file.py does not import: SyntaxError: "),
    ("\n1 / 0\n", "file.py does not import: ZeroDivisionError: division by zero (line 2 of file."),
    ("exit(3)", "file.py does not import: SystemExit: 3"),
    ("", "the file has no function of the chapters"),
    ("def f():\n    pass", "the file has no function of the chapters, only f"),
    ("def _vae_loss():\n    pass", "the file has no function of the chapters"),
    ("def vae_los(x):\n    pass", "vae_los is in no chapter; did you mean vae_loss? If it is a "
     "helper, call it _vae_los"),
    ("def vae_loss(x, y):\n    pass",
     "vae_loss(x, y) should be vae_loss(x, x_rec, mu, logvar, x_sigma2) as in chapter 01"),
    ("def inception_score(probs, splits):\n    pass", "inception_score(probs, splits) should be "
     "inception_score(probs, splits=1) as in chapter 07 or inception_score(probs) as in "),
    ("def gradient_penalty(D, x):\n    pass", "gradient_penalty(D, x) should be gradient_penalty("
     "critic, x_real, x_fake, generator=None) as in chapter 07 or gradient_penalty(critic, x) as")])
def test_a_file_that_cannot_be_tested_gets_one_line(tmp_path, monkeypatch, text, line):
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert refusal(tmp_path, text).startswith(line)


@pytest.mark.parametrize("text, chapters", [
    ("def gradient_penalty(critic, x): 0", ["08_theory_checks"]),
    ("def gradient_penalty(critic, x_real, x_fake, generator=None): 0",
     ["02_gan_losses", "07_sn_wgan_gp"]),
    ("def moments(z): 0", ["06_wae_moments", "08_theory_checks"]),
    ("def inception_score(probs, splits=1): 0", ["07_sn_wgan_gp"]),
    ("def minimax_g(fake): 0\ndef minimax_d(fake): 0", ["02_gan_losses"])])  # a helper of that name
def test_the_parameters_choose_the_chapters(text, chapters):
    functions = {}
    exec(text, functions)
    functions = {name: f for name, f in functions.items() if inspect.isfunction(f)}
    assert [chapter for chapter, _ in places(functions, book())] == chapters


@pytest.mark.parametrize("test, outcome", [
    (lambda: None, {}), (lambda: vae.vae_loss(), {"test": None})])
def test_a_property_that_does_not_call_the_function_does_not_count(test, outcome):
    mine, place = object.__new__(Mine), ("01_vae", "vae_loss")
    mine.functions, mine.outcomes = {place: lambda: 1}, {place: {}}
    mine.run(types.SimpleNamespace(obj=test, originalname="test"), place)
    assert mine.outcomes[place] == outcome


def test_the_book_is_its_ideas_and_no_parts_of_programs():
    known = book()
    assert known["kl_standard_normal"] == ["01_vae", "08_theory_checks"]
    assert known["neighbours"] == ["05_restoration"]  # a section between the idea and the model
    assert {"channels", "train", "main", "VAE", "row", "equal", "relu_dead"}.isdisjoint(known)


# Functions that are nobody's exercise, in three depths, and the tests that there could be of them.
chapter = types.ModuleType("01_vae")
exec("def inner(x): return x\ndef outer(x): return [inner(y) for y in x]", vars(chapter))


def helper(x):
    return [chapter.outer(y) for y in x]


def rejected(prop, twin):
    raise AssertionError


@pytest.mark.parametrize("test, direct, deep", [
    (lambda: helper([[1]]), {"outer"}, {"outer", "inner"}),
    (lambda: (lambda: chapter.inner(1))(), {"inner"}, {"inner"}),
    (lambda: rejected(helper, chapter.outer), set(), set()),
    (lambda f: f(1), set(), set())])
def test_what_a_test_uses_is_read_off_its_code(test, direct, deep):
    for through_the_book, expected in ((False, direct), (True, deep)):
        found = uses(test, through_the_book)
        assert {name for name in ("inner", "outer") if ("01_vae", name) in found} == expected
