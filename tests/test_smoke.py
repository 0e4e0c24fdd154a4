"""Every script with --quick ends well and leaves its files; its idea can be pasted alone."""

import ast
import builtins
import dis
import importlib
import inspect
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

ROOT = Path(__file__).parent.parent
PASTED = [
    ("01", "train(run, args, 'vae', None, images)"),
    ("03", "train(run, args, Mixture('ring', ring(), 0.02, 8, None, 3.0), 2, 0.5)"),
    ("03", "train(run, args, images, 1, 0.0)"),
    *(("02", f"train(run, args, METHODS['{name}'], images, 10)")
      for name in ("minimax", "acgan", "infogan", "mode-seeking", "began", "wgan-gp")),
    *((number, "train_generator(run, args, generator(8, 1, 28), discriminator(1, 28), images)")
      for number in ("04", "05")),
    ("04", "train_encoder(run, args, generator(8, 1, 28), encoder(8, 1, 28), images)"),
    ("06", "train(run, args, 'moments', images, images.x)"),
    ("07", "train(run, args, MODELS['wgan-gp'], 2, images, None)"),
    ("07", "train(run, args, MODELS['sn'], 1, images, None)")]
SCRIPTS = sorted(path.name for path in ROOT.glob("0[1-8]_*.py"))


def source(script):
    return (ROOT / script).read_text(encoding="utf-8")


def chapter(number):
    return importlib.import_module(SCRIPTS[int(number) - 1][:-3])


def quick(script):
    """A mark: the script with --quick as a user starts it, in a process of its own."""
    return pytest.mark.beside(run=lambda folder: (folder, subprocess.run(
        [sys.executable, ROOT / script, "--quick"], cwd=folder, text=True, capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})))


@pytest.mark.parametrize("script", [pytest.param(name, marks=quick(name)) for name in SCRIPTS])
def test_quick_run(script, beside):
    folder, run = beside
    assert (run.returncode, run.stderr) == (0, "")
    written = re.findall(r"^wrote (.+)$", run.stdout, re.MULTILINE)
    assert written and all((folder / path).stat().st_size > 0 for path in written)
    assert not any(Path(path).is_absolute() for path in written)
    heads = re.search("^(synthetic digits|ring) .quick run.(:|  )", run.stdout, re.MULTILINE)
    assert script[:2] == "08" or heads
    out, = (folder / "out" / script[:-3]).iterdir()
    assert out.name == "quick" and not list(out.glob(".*"))
    assert script[:2] == "08" or (out / "log.csv").read_text(encoding="utf-8").count("\n") > 1
    for samples in out.glob("samples*.pt"):
        assert len(torch.load(samples, weights_only=True)) >= 1000  # 10,000 in a full run


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_chapter_and_every_flag_is_used(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        chapter(script[:2]).main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "Idea" in shown and "default: [" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    for flag in re.findall(r"^  (?:-\w, )?--([a-z-]+)", shown, re.MULTILINE):
        name, text = flag.replace("-", "_"), source(script) + source("common.py")
        used = f"args.{name}" in text or f'(args, "{name}"' in text
        assert flag == "help" or used, f"--{flag} is not used"


def globals_of(code):
    """Names that a code object, and those within it, look up outside."""
    inner = [c for c in code.co_consts if inspect.iscode(c)]
    return {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}.union(
        *map(globals_of, inner))


@pytest.mark.parametrize("script", SCRIPTS[:7])
def test_the_idea_stands_alone(script):
    """README: paste this section, import math and torch, and every function finds all it calls."""
    _, found, rest = source(script).partition("# --- the idea")
    code = compile(rest[rest.index("\n"):].partition("# --- ")[0], script, "exec")
    idea = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional}
    exec(code, idea)
    assert found and globals_of(code) <= idea.keys() | vars(builtins).keys() | {"math"}


@pytest.mark.parametrize("script, build", [
    ("01", "VAE(1, 28, 5), VAE(3, 64, 5)"),
    ("02", "generator(8, 1, 28), generator(8, 3, 64), Discriminator(1, 28, 10, HIDDEN_D, 0)"),
    ("03", "plane_nets(4), image_nets(8, 1, 28, 28)"),
    ("04", "generator(8, 1, 28), discriminator(1, 28), discriminator(3, 64), encoder(8, 1, 28)"),
    ("05", "generator(8, 1, 28), discriminator(1, 28), discriminator(3, 64)"),
    ("06", "Autoencoder(1, 28, 8), Autoencoder(3, 64, 8)"),
    ("07", "generator(8, 1, 28), discriminator(1, 28, True), discriminator(3, 64, False)")])
def test_every_network_is_built_without_common(script, build):
    """All that stands above "train", without the line `import common`: it can be pasted."""
    text = source(next(name for name in SCRIPTS if name.startswith(script)))
    pasted = text.partition("# --- train")[0].replace("\nimport common\n", "\n")
    names = {"__name__": "pasted"}
    exec(compile(pasted, script, "exec"), names)
    assert "common" not in names and eval(build, names)


class StubRun:
    """What a reader writes in the place of common.Run: three steps, and a loader of noise."""
    device, name = "cpu", "vae"
    extra, rows, done, numbers = {}, [], {}, {}

    def steps(self, total, **state):
        return range(1, 4)

    def batches(self, images, size):
        while True:
            yield 2 * torch.rand(size, *images.x.shape[1:]) - 1, torch.arange(size) % 10

    def every(self, times):
        return False

    at = every

    def log(self, **numbers):
        self.numbers = numbers


@pytest.mark.parametrize("script, call", PASTED)
def test_idea_model_and_train_can_be_pasted(script, call):
    """They train without common.py, with a run of ten lines."""
    name = next(name for name in SCRIPTS if name.startswith(script))
    pasted = source(name).partition("# --- measure")[0].replace("\nimport common\n", "\n")
    images = type("Images", (), {"x": torch.zeros(9, 1, 28, 28), "y": torch.arange(9)})
    args = chapter(script).parse_args(["--steps", "3", "--batch", "8", "--z-dim", "8"])
    args.n_samples, args.nets = 40, "dense"
    names = {"__name__": "pasted", "run": StubRun(), "args": args, "images": images}
    exec(compile(pasted, name, "exec"), names)
    eval(call, names)
    assert "common" not in names and names["run"].numbers


@given(st.integers(8, 300))
def test_maps_halve_down_to_four_to_seven_pixels(side):
    """28 -> 14 -> 7; the channels double at each halving, and the last layer takes what is left."""
    with torch.device("meta"):
        layers = list(chapter("04").encoder(8, 1, side).modules())
    widths = [layer.out_channels for layer in layers if isinstance(layer, torch.nn.Conv2d)]
    for _ in widths:
        side //= 2
    linear = next(layer for layer in layers if isinstance(layer, torch.nn.Linear))
    assert widths == [32 * 2 ** i for i in range(len(widths))] and 4 <= side <= 7
    assert linear.in_features == widths[-1] * side ** 2


@pytest.mark.parametrize("one, other, names", [
    ("02", "07", "gradient_norms gradient_penalty clip wgan_d wgan_g generate"),
    ("04", "05", "generator discriminator train_generator")])
def test_what_chapters_repeat_they_repeat_to_the_letter(one, other, names):
    """But for docstrings: a reader of both meets only what is new; a bug is fixed in both."""
    for name in names.split():
        functions = [ast.parse(inspect.getsource(getattr(chapter(number), name))).body[0]
                     for number in (one, other)]
        for function in functions:
            del function.body[0]
        assert ast.dump(functions[0]) == ast.dump(functions[1]), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_batch_norm_keeps_its_eps(script):
    """BatchNorm2d(n, 0.8), seen elsewhere, was meant as a momentum and is an eps of 0.8."""
    calls = [node for node in ast.walk(ast.parse(source(script)))
             if isinstance(node, ast.Call) and "BatchNorm" in ast.unparse(node.func)]
    assert all(len(call.args) == 1 and not {k.arg for k in call.keywords} & {"eps", "momentum"}
               for call in calls)


@pytest.mark.parametrize("script", ["common.py", *SCRIPTS])
def test_importing_does_nothing(script, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / script), run_name="imported")
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("number, make", [
    ("02", lambda c: c.generator(8, 1, 28)), ("02", lambda c: c.generator(8, 1, 28, [20], width=0)),
    ("02", lambda c: c.generator(8, 3, 32, [], width=4)), ("04", lambda c: c.generator(8, 1, 28)),
    ("03", lambda c: c.image_nets(8, 1, 28, 28)[0]), ("07", lambda c: c.generator(8, 1, 28)),
    ("07", lambda c: c.generator(8, 3, 64))])
def test_a_generator_makes_light_and_dark_pixels(number, make):
    """With a ReLU before the tanh no pixel would be darker than grey."""
    torch.manual_seed(0)
    G = make(chapter(number))
    assert 0.1 < (G(torch.randn(16, 8)) < 0).float().mean() < 0.9


@pytest.mark.parametrize("number, scores", [
    ("02", lambda c, x: c.Discriminator(3, 64, 10, [], 32)(x)[0]),
    ("07", lambda c, x: c.discriminator(3, 64, sn=False)(x))])
def test_a_d_of_convolutions_tells_pictures_apart_at_the_start(number, scores):
    """0.06 to 0.13; with torch's own start 0.001 to 0.003, and D never leaves 1/2."""
    torch.manual_seed(0)
    assert scores(chapter(number), 2 * torch.rand(32, 3, 64, 64) - 1).std() > 0.03
