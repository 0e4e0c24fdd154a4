"""The same mistakes in every chapter: one line that names what is wrong, status 2, nothing lost."""

import importlib

import pytest
import torch
from PIL import Image

import common
from harness import folder_of_pictures, one_line

SCRIPTS = ["01_vae", "02_gan_losses", "03_unrolled_gan", "04_inversion", "05_restoration",
           "06_wae_moments", "07_sn_wgan_gp"]
every_script = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(script, flags, words): the chapter ends with one line that holds the words."""
    def check(script, flags, *words):
        main = importlib.import_module(script).main
        out = ["--out", str(tmp_path / "out")]
        one_line(capsys, lambda: main([*out, "--quick", *map(str, flags)]), *words)
    return check


def pictures(tmp_path, change=None):
    """The flags for a folder of 20 good pictures, one of them changed."""
    folder = folder_of_pictures(tmp_path / "p", 20, 32)
    if change:
        change(tmp_path / "p" / "07.png")
    return ["--data", folder, "--size", 32]


@every_script
@pytest.mark.parametrize("flags, words", [
    (["--data", "mnits"], ["mnits", "mnist, fashion"]), (["--data", "no/folder"], ["no/folder"]),
    (["--device", "toaster"], ["toaster", "--device cpu"]), (["--size", "0"], ["--size", "'0'"]),
    (["--steps", "0"], ["--steps", "'0'"]), (["--steps", "-1"], ["--steps"]),
    (["--steps", "many"], ["--steps", "many"]), (["--seed", "x"], ["--seed"]),
    (["--seed", "9" * 20], ["--seed", "2147483647"]),
    (["--colour"], ["--colour"]), (["--see", "1"], ["--see"]),  # no part of a flag is a flag
    (["--data", ""], ["--data", "neither"])])
def test_flags(script, flags, words, refused):
    refused(script, flags, *words)


@every_script
def test_folders(script, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(script, ["--data", tmp_path / "empty"], "holds 0 pictures")
    refused(script, pictures(tmp_path, lambda file: file.write_bytes(b"no picture")), "07.png",
            "--skip")
    Image.new("RGB", (31, 90)).save(tmp_path / "p" / "07.png")
    refused(script, ["--data", tmp_path / "p", "--size", 32], "07.png", "31x90", "--size 28")


@every_script
def test_a_single_pixel(script, refused, tmp_path):
    refused(script, ["--data", folder_of_pictures(tmp_path / "p", 20, 32), "--size", "1"], "1x1")


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "03_unrolled_gan"])
def test_a_side_that_halving_and_doubling_does_not_give_back(script, refused, tmp_path):
    """36 -> 18 -> 9 -> 4 pixels in a D, but 4 -> 8 -> 16 -> 32 in a G."""
    refused(script, ["--data", folder_of_pictures(tmp_path / "p", 20, 40), "--size", "36"], "36x36",
            "--size 32")


@pytest.mark.parametrize("script, flags", [
    ("01_vae", []), ("02_gan_losses", ["--loss", "ebgan"]), ("02_gan_losses", ["--loss", "began"]),
    ("03_unrolled_gan", []), ("04_inversion", []), ("06_wae_moments", [])])
def test_a_batch_of_one_where_two_are_needed(script, flags, refused, digits_dir):
    refused(script, ["--data", "digits", "--data-dir", digits_dir, "--batch", "1", *flags],
            "--batch 2 or more")


@pytest.mark.parametrize("n, batch, processes, fits", [
    (9, 2, 1, True), (9, 1, 1, False), (1, 9, 1, False), (9, 4, 2, True), (9, 3, 2, False),
    (3, 9, 2, False), (9, 9, 5, False)])
def test_each_process_gets_two_pictures_of_a_batch(n, batch, processes, fits, capsys, monkeypatch):
    monkeypatch.setattr(common, "processes", lambda: processes)
    images = common.Images(torch.zeros(n, 1, 28, 28, dtype=torch.uint8), torch.arange(n), "")
    losses = importlib.import_module("02_gan_losses")
    args = losses.parse_args(["--loss", "ebgan", "--batch", str(batch)])
    if fits:
        losses.check(args, images)
    else:
        one_line(capsys, lambda: losses.check(args, images), f"--batch {2 * processes} or more")


@every_script
def test_an_output_folder_that_is_a_file(script, tmp_path, capsys):
    (tmp_path / "file").touch()
    main = importlib.import_module(script).main
    one_line(capsys, lambda: main(["--quick", "--out", str(tmp_path / "file" / "out")]),
             "cannot write", "--out")


@every_script
def test_checkpoints_that_do_not_fit_are_refused_and_kept(script, refused, tmp_path):
    """Of another script, of other flags, half a file, code for unpickling."""
    path = tmp_path / "out" / "quick" / "checkpoint.pt"
    path.parent.mkdir(parents=True)
    flags = ["--resume", *pictures(tmp_path)]
    other = {"settings": {"script": "99_other"}, "done": {}, "parts": {}}
    for write, words in (
            (lambda: torch.save(other, path), ["99_other", "--out"]),
            (lambda: torch.save({"settings": {"script": script}}, path), ["--out"]),
            (lambda: path.write_bytes(path.read_bytes()[:50]), ["not a readable checkpoint"]),
            (lambda: torch.save({"settings": common.fail}, path), ["not a readable checkpoint"])):
        write()
        before = path.read_bytes()
        refused(script, flags, "checkpoint.pt", *words)
        assert path.read_bytes() == before
