"""Picture files, folders of them, and MNIST's files: read faithfully, or refused by name."""

import struct
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.transforms import functional as TF

import common
from harness import folder_of_pictures, one_line
from strategies import generator
from test_common import arguments


pytestmark = pytest.mark.usefixtures("no_download")


def pixels(path, mode="RGB", ground="white"):
    """What open_picture reads: uint8 [C, H, W]."""
    return TF.pil_to_tensor(common.open_picture(path, mode, ground))


def load(tmp_path, data, *flags):
    """Two Images, the training part and the test part, of what --data names."""
    args = arguments(tmp_path, "--data", data, "--size", 16, *flags)
    args.data = data and args.data  # None: no --data
    args.out.mkdir(exist_ok=True)
    return [common.load_images(args, "cpu", train=train) for train in (True, False)]


# --- one picture -------------------------------------------------------------------------------

@pytest.mark.parametrize("orientation, quarters", [(3, 2), (6, 1)])  # EXIF tag 274
def test_a_photo_stands_upright(tmp_path, orientation, quarters):
    """The camera was turned by so many quarters of a circle, and the file holds what it saw."""
    x = torch.zeros(3, 32, 48, dtype=torch.uint8)
    x[0, :16], x[1, :, :16] = 255, 255  # blocks of 16 pixels, which JPEG does not mix
    exif = Image.Exif()
    exif[274] = orientation
    TF.to_pil_image(torch.rot90(x, quarters, (1, 2))).save(
        tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    assert torch.equal(pixels(tmp_path / "a.jpg") > 127, x > 127)


def test_grey_of_16_bits_is_scaled(tmp_path):
    """65,535 = 257 * 255."""
    values = torch.randint(65536, (600,), generator=generator(0)).tolist()
    Image.frombytes("I;16", (30, 20), struct.pack("<600H", *values)).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png", "L").flatten().tolist() == [round(v / 257) for v in values]


@pytest.mark.parametrize("ground, level", [("white", 255), ("black", 0)])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_shows_the_ground(tmp_path, mode, ground, level):
    """x a + ground (1 - a) for each channel x; rounding twice is off by 1 at most."""
    x = torch.randint(256, (len(mode), 20, 30), dtype=torch.uint8, generator=generator(0))
    TF.to_pil_image(x, mode).save(tmp_path / "a.png")
    a = x[-1] / 255
    expected = x[:-1] * a + level * (1 - a)
    assert (pixels(tmp_path / "a.png", ground=ground) - expected).abs().max() <= 1


def test_a_palette_may_be_transparent(tmp_path):
    picture = Image.new("P", (4, 1))
    picture.putpalette([grey for grey in (0, 60, 120, 240) for _ in "RGB"])
    picture.putdata([0, 1, 2, 3])
    picture.save(tmp_path / "a.png", transparency=b"\x00\xff\x33\xff")  # 0x33 is a fifth of 255
    assert pixels(tmp_path / "a.png", "L").flatten().tolist() == [255, 60, 228, 240]


@pytest.mark.parametrize("mode, kind, words", [
    ("I", "TIFF", "which of its values is white"), ("F", "TIFF", "which of its values is white"),
    ("RGBA", "PNG", "all of it is transparent")])
def test_a_picture_of_unknown_meaning_is_refused(tmp_path, capsys, mode, kind, words):
    Image.new(mode, (4, 4)).save(tmp_path / "a", kind)
    one_line(capsys, lambda: pixels(tmp_path / "a"), str(tmp_path / "a"), words)


# --- a folder ----------------------------------------------------------------------------------

def test_pictures_are_cropped_resized_and_every_tenth_is_for_tests(tmp_path):
    folder_of_pictures(tmp_path / "p", 12, 20)
    for name in ("._00.png", ".thumbs/a.png", "__MACOSX/b.png"):  # hidden: these are passed over
        (tmp_path / "p" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "p" / name).write_bytes(b"no picture")
    wide = Image.new("RGB", (60, 20), "blue")
    ImageDraw.Draw(wide).rectangle((20, 0, 39, 19), "red")
    wide.save(tmp_path / "p" / "99.png")
    for _ in range(2):  # decoded, then from the file in which they are kept
        train, test = load(tmp_path, tmp_path / "p")
        assert train.x.shape == (12, 3, 16, 16) and train.x.dtype == torch.uint8
        assert train.x[:, 0, 8, 8].tolist() == [*(255 * i // 12 for i in range(12) if i != 9), 255]
        assert test.x[:, 0, 0, 0].tolist() == [255 * 9 // 12] and train.y is None
        assert (train.x[-1, 2] == 0).all()  # the middle square of the wide one


@pytest.mark.parametrize("a, b", [(40, 20), (3, 2)])
def test_subfolders_are_labels_and_every_tenth_of_each_is_for_tests(tmp_path, capsys, a, b):
    for label, (name, n) in enumerate({"ant": a, "bee": b}.items()):
        (tmp_path / "p" / name).mkdir(parents=True)
        for i in range(n):  # red tells the subfolder, green the picture
            Image.new("RGB", (16, 16), (50 * label, i, 0)).save(tmp_path / f"p/{name}/{i:02}.png")
    train, test = load(tmp_path, tmp_path / "p")
    assert capsys.readouterr().out.count("labels 0 ant, 1 bee") == 1
    for label, n in enumerate((a, b)):
        held = list(range(9, n, 10)) or [n - 1]  # the last of fewer than ten
        for images, wanted in ((train, [i for i in range(n) if i not in held]), (test, held)):
            x = images.x[images.y == label, :, 8, 8]
            assert x[:, 1].tolist() == wanted and (x[:, 0] == 50 * label).all()
    share = (train.y == 0).float().cumsum(0) / torch.arange(1, len(train.y) + 1)
    assert (share[8:] - 2 / 3).abs().le(1 / 9).all()  # evenly mixed, off by one picture at most


@pytest.mark.parametrize("change, words", [
    (lambda file: file.write_bytes(b"no picture"), "damaged"),
    (lambda file: file.write_bytes(file.read_bytes()[:60]), "cannot be read"),
    (lambda file: Image.new("RGB", (15, 90)).save(file), "15x90")])
def test_a_picture_that_cannot_be_used_is_named_or_left_out(tmp_path, capsys, change, words):
    folder_of_pictures(tmp_path / "p", 12, 20)
    change(tmp_path / "p" / "03.png")
    one_line(capsys, lambda: load(tmp_path, tmp_path / "p"), "1 of 12", "03.png", words, "--skip")
    assert len(load(tmp_path, tmp_path / "p", "--skip")[0].x) == 10
    assert "left out 1 that cannot be used (03.png)" in capsys.readouterr().out


def test_a_changed_folder_is_decoded_again_and_its_run_does_not_go_on(tmp_path, capsys):
    folder_of_pictures(tmp_path / "p", 12, 20)
    args = arguments(tmp_path, "--data", tmp_path / "p", "--size", 16, "--resume")

    def go_on():
        common.load_images(args, "cpu", train=False)
        return common.load_checkpoint(args)
    with common.Run(args):
        go_on()
        common.save_checkpoint(args, {})
    assert go_on()
    Image.new("RGB", (20, 20), "white").save(tmp_path / "p" / "09.png")  # the one for tests
    assert common.load_images(args, "cpu", train=False).x.min() == 255
    one_line(capsys, go_on, "other pictures", str(tmp_path / "p"), "another --out")


# --- MNIST and CIFAR-10 ------------------------------------------------------------------------

def write_mnist(raw, n=20):
    """A tiny MNIST: n random pictures in the four idx files, labels 0, 1, ..."""
    raw.mkdir(parents=True)
    x = torch.randint(256, (n, 1, 28, 28), dtype=torch.uint8, generator=generator(0))
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, n, 28, 28) + x.numpy().tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 2049, n) + bytes(i % 10 for i in range(n)))
    return x


def test_mnist_is_read_from_files_without_download(tmp_path):
    x = write_mnist(tmp_path / "data" / "MNIST" / "raw")
    for images in load(tmp_path, "mnist"):
        assert torch.equal(images.x, x) and images.y.tolist() == [i % 10 for i in range(20)]


@pytest.mark.parametrize("file, content, words", [
    ("train-images-idx3-ubyte", b"half", "train-images-idx3-ubyte cannot be read"),
    ("t10k-images-idx3-ubyte", b"half", "t10k-images-idx3-ubyte cannot be read"),
    ("train-labels-idx1-ubyte", struct.pack(">II", 2049, 7) + bytes(7), "20 pictures and 7")])
def test_a_wrong_file_of_mnist_is_named(tmp_path, capsys, file, content, words):
    """Digits are no substitute for it, even without --data."""
    write_mnist(tmp_path / "data" / "MNIST" / "raw")
    (tmp_path / "data" / "MNIST" / "raw" / file).write_bytes(content)
    one_line(capsys, lambda: load(tmp_path, None), words)


def test_without_mnist_digits_are_taken_and_that_is_said(tmp_path, digits_dir, capsys):
    args = arguments(tmp_path, "--data-dir", digits_dir)
    args.data = None
    images = common.load_images(args, "cpu")
    assert "cannot be downloaded: using drawn digits" in capsys.readouterr().out
    assert args.data == "digits" and "no MNIST" in images.name  # --resume will not take MNIST


def test_cifar_gives_channels_first(tmp_path, monkeypatch):
    x = torch.randint(256, (6, 32, 32, 3), dtype=torch.uint8, generator=generator(1))
    monkeypatch.setattr(common.datasets, "CIFAR10", lambda root, train, download: SimpleNamespace(
        data=x.numpy(), targets=[0, 1, 2, 3, 4, 5]))
    images, _ = load(tmp_path, "cifar10")
    assert torch.equal(images.x, torch.stack([x[..., c] for c in range(3)], dim=1))
    assert images.x.dtype == torch.uint8 and images.y.tolist() == [0, 1, 2, 3, 4, 5]
