"""Picture files, folders of them, and MNIST's files: read faithfully, or refused by name."""

import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.transforms import functional as TF

import common
from harness import ctrl_c, folder_of_pictures, one_line  # noqa: F401
from strategies import generator
from test_common import arguments


pytestmark = pytest.mark.usefixtures("no_download")


def pixels(path, mode="RGB", background="white"):
    """What read_picture reads: uint8 [C, H, W]."""
    return TF.pil_to_tensor(common.read_picture(path, mode, background))


def load(tmp_path, data, *flags):
    """Two Images, the training part and the test part, of what --data names."""
    args = arguments(tmp_path, "--data", data, "--size", 16, *flags)
    args.data = data and args.data  # None: no --data
    args.out.mkdir(parents=True, exist_ok=True)
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


@pytest.mark.parametrize("background, level", [("white", 255), ("black", 0)])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_shows_the_background(tmp_path, mode, background, level):
    """x a + background (1 - a) for each channel x; rounding twice is off by 1 at most."""
    x = torch.randint(256, (len(mode), 20, 30), dtype=torch.uint8, generator=generator(0))
    TF.to_pil_image(x, mode).save(tmp_path / "a.png")
    a = x[-1] / 255
    expected = x[:-1] * a + level * (1 - a)
    assert (pixels(tmp_path / "a.png", background=background) - expected).abs().max() <= 1


def test_a_palette_may_be_transparent(tmp_path):
    picture = Image.new("P", (4, 1))
    picture.putpalette([grey for grey in (0, 60, 120, 240) for _ in "RGB"])
    picture.putdata([0, 1, 2, 3])
    picture.save(tmp_path / "a.png", transparency=b"\x00\xff\x33\xff")  # 0x33 is a fifth of 255
    assert pixels(tmp_path / "a.png", "L").flatten().tolist() == [255, 60, 228, 240]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_picture_of_unknown_range_is_refused(tmp_path, mode):
    Image.new(mode, (4, 4)).save(tmp_path / "a", "TIFF")
    with pytest.raises(ValueError, match="/a cannot be read as a picture .which value is white"):
        pixels(tmp_path / "a")


# --- a folder ----------------------------------------------------------------------------------

def test_pictures_are_cropped_resized_and_every_tenth_is_for_tests(tmp_path):
    folder_of_pictures(tmp_path / "p", 12, 20)
    for name in ("._00.png", ".thumbs/a.png", "__MACOSX/b.png"):  # hidden: these are passed over
        (tmp_path / "p" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "p" / name).write_bytes(b"no picture")
    wide = Image.new("RGB", (60, 20), "blue")
    ImageDraw.Draw(wide).rectangle((20, 0, 39, 19), "red")
    wide.save(tmp_path / "p" / "99.png")
    for _ in range(2):  # decoded, then from the file in which they were saved
        train, test = load(tmp_path, tmp_path / "p")
        assert train.x.shape == (12, 3, 16, 16) and train.x.dtype == torch.uint8
        assert len(test.x) == 1 and train.y is None
        red = torch.cat([train.x, test.x])[:, 0, 8, 8].sort().values
        assert red.tolist() == [*(255 * i // 12 for i in range(12)), 255]
        assert (train.x[:, 2] == 0).all()  # the central square of the wide one has no blue


def test_subfolders_are_labels_and_every_tenth_picture_is_for_tests(tmp_path, capsys):
    for label, (name, n) in enumerate({"ant": 40, "bee": 20}.items()):
        (tmp_path / "p" / name).mkdir(parents=True)
        for i in range(n):  # red tells the subfolder, green the picture
            Image.new("RGB", (16, 16), (50 * label, i, 0)).save(tmp_path / f"p/{name}/{i:02}.png")
    train, test = load(tmp_path, tmp_path / "p")
    assert capsys.readouterr().out.count("labels: 0 ant, 1 bee") == 2
    assert (len(train.x), len(test.x)) == (54, 6)
    for images in (train, test):
        assert torch.equal(images.x[:, 0, 8, 8], (50 * images.y).byte())
    pictures = torch.cat([train.x, test.x])[:, :2, 8, 8]
    assert len(pictures.unique(dim=0)) == 60  # each once
    assert torch.equal(load(tmp_path, tmp_path / "p")[0].x, train.x)  # the same for every run


@pytest.mark.parametrize("train, test", [
    ("train", "Test"), ("Training", "validation"), ("training_set", "test-set"), ("train", "val"),
    ("data/train", "data/test")])  # within one folder more
@pytest.mark.parametrize("more", ["", "extra/ant/x.png"])
def test_a_folder_with_a_split_of_its_own_keeps_it(tmp_path, train, test, more):
    """These are no labels, and no test picture is trained on; their subfolders are labels."""
    places = [f"{part}/{kind}/{i}.png" for part in (train, test) for kind in ("ant", "bee")
              for i in range(10)]
    top = "data/" * train.startswith("data")
    for i, place in enumerate([*places, top + more] if more else places):
        (tmp_path / "p" / place).parent.mkdir(parents=True, exist_ok=True)
        color = (200 * place.startswith(test), 100 * ("bee" in place), i)
        Image.new("RGB", (16, 16), color).save(tmp_path / "p" / place)
    for images, red, n in zip(load(tmp_path, tmp_path / "p"), (0, 200), (20 + bool(more), 20)):
        assert len(images.x) == n and (images.x[:, 0] == red).all()
        assert torch.equal(images.x[:, 1, 0, 0], (100 * images.y).byte())


def test_a_picture_beside_the_split_is_trained_on(tmp_path):
    for place in [*(f"{part}/{i}.png" for part in ("train", "test") for i in range(9)), "x.png"]:
        (tmp_path / "p" / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (200 * place.startswith("test"), 0, 0)).save(
            tmp_path / "p" / place)
    train, test = load(tmp_path, tmp_path / "p")
    assert (train.x[:, 0] == 0).all() and len(train.x) == 10 and (test.x[:, 0] == 200).all()


def test_names_like_a_split_may_be_labels(tmp_path):
    """Without a part to train on, or to test on, they are."""
    for names in (("test", "val"), ("train", "truck")):
        for name in names:
            (tmp_path / names[0] / name).mkdir(parents=True)
            for i in range(10):
                Image.new("RGB", (16, 16)).save(tmp_path / names[0] / name / f"{i}.png")
        parts = load(tmp_path, tmp_path / names[0])
        assert [len(part.x) for part in parts] == [18, 2] and len(parts[0].y.unique()) == 2


def test_one_folder_written_in_two_ways_is_the_same(tmp_path, monkeypatch):
    folder_of_pictures(tmp_path / "p", 12, 20)
    (tmp_path / "link").symlink_to(tmp_path / "p")
    monkeypatch.chdir(tmp_path)
    found = []
    for data in ("p", "p/", "./p", tmp_path / "p", "../" + tmp_path.name + "/p", "link"):
        args = arguments(tmp_path, "--data", data, "--size", 16)
        args.out.mkdir(exist_ok=True)
        common.load_images(args, "cpu")
        found.append(common.settings(args))
    assert all(settings == found[0] for settings in found)


def test_a_quick_run_decodes_only_the_pictures_that_it_uses(tmp_path, monkeypatch):
    folder_of_pictures(tmp_path / "p", 30, 20)
    monkeypatch.setattr(common, "N_QUICK", 5)
    read, opened = common.read_picture, []
    monkeypatch.setattr(common, "read_picture", lambda file: opened.append(file) or read(file))
    assert [len(part.x) for part in load(tmp_path, tmp_path / "p", "--quick")] == [5, 3]
    assert len(opened) == 8


def test_few_pictures_are_refused(tmp_path, capsys):
    folder_of_pictures(tmp_path / "p", 9, 20)
    one_line(capsys, lambda: load(tmp_path, tmp_path / "p"), "9 pictures", "at least 10")


@pytest.mark.parametrize("change, words", [
    (lambda file: file.write_bytes(b"no picture"), "cannot identify"),
    (lambda file: file.write_bytes(file.read_bytes()[:60]), "cannot be read"),
    (lambda file: Image.new("RGB", (15, 90)).save(file), "15x90")])
def test_a_picture_that_cannot_be_used_is_named_or_left_out(tmp_path, capsys, change, words):
    folder_of_pictures(tmp_path / "p", 12, 20)
    change(tmp_path / "p" / "03.png")
    one_line(capsys, lambda: load(tmp_path, tmp_path / "p"), "1 of 11", "03.png", words, "--skip")
    assert len(load(tmp_path, tmp_path / "p", "--skip")[0].x) == 10
    assert "left out: 1 of 11 pictures cannot be used" in capsys.readouterr().out


def test_a_changed_folder_is_decoded_again_and_its_run_does_not_go_on(tmp_path, capsys):
    folder_of_pictures(tmp_path / "p", 12, 20)
    args = arguments(tmp_path, "--data", tmp_path / "p", "--size", 16, "--resume")

    def train():
        """One step, or none if it was made before."""
        run = common.Run(args)
        common.load_images(args, "cpu")
        for name in run.each(["a"]):
            made.append(list(run.steps(1)))
            run.done[name] = True

    made = []
    train()
    train()
    assert made == [[1]]
    for file in (tmp_path / "p").iterdir():
        Image.new("RGB", (20, 20), "white").save(file)
    one_line(capsys, train, "training_pictures", "another --out")
    assert common.load_images(args, "cpu", train=False).x.min() == 255


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b"half"),
                                    lambda file: file.unlink(missing_ok=True)])
@pytest.mark.parametrize("writable", [True, False])
def test_synthetic_digits_are_made_again_and_need_no_file(tmp_path, monkeypatch, damage, writable):
    make = common.make_digits
    monkeypatch.setattr(common, "make_digits", lambda n, seed: make(99, seed))
    first = load(tmp_path, "digits")[0]
    damage(tmp_path / "data" / "synthetic_digits.pt")
    before = sorted(file.stat().st_mtime_ns for file in (tmp_path / "data").iterdir())
    monkeypatch.setattr(common.os, "access", lambda *_: writable)
    assert torch.equal(load(tmp_path, "digits")[0].x, first.x)
    after = sorted(file.stat().st_mtime_ns for file in (tmp_path / "data").iterdir())
    assert (after != before) == writable


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
    ("train-images-idx3-ubyte", b"half", "mnist cannot be read"),
    ("train-labels-idx1-ubyte", struct.pack(">II", 2049, 7) + bytes(7), "20 pictures and 7")])
def test_a_wrong_file_of_mnist_is_said(tmp_path, capsys, file, content, words):
    write_mnist(tmp_path / "data" / "MNIST" / "raw")
    (tmp_path / "data" / "MNIST" / "raw" / file).write_bytes(content)
    one_line(capsys, lambda: load(tmp_path, "mnist"), words, "--data digits")


def test_a_download_is_not_seen_by_others_before_it_is_whole(tmp_path, monkeypatch):
    """In the middle of each file of the first run, a second run starts, and downloads as well."""
    x, loaded = write_mnist(tmp_path / "source"), []

    def download(url, download_root, filename, md5):
        name = filename.removesuffix(".gz")
        content, file = (tmp_path / "source" / name).read_bytes(), Path(download_root) / name
        file.write_bytes(content[:9])
        if len(loaded) < 4 and not inside:
            inside.append(True)
            loaded.extend(load(tmp_path, "mnist"))
            inside.clear()
        file.write_bytes(content)

    inside = []
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", download)
    loaded.extend(load(tmp_path, "mnist"))
    assert len(loaded) == 6 and all(torch.equal(images.x, x) for images in loaded)
    assert [file.name for file in (tmp_path / "data").iterdir()] == ["MNIST"]


def test_without_mnist_digits_are_taken_and_that_is_said(tmp_path, digits_dir, capsys):
    args = arguments(tmp_path, "--data-dir", digits_dir)
    args.data = None
    images = common.load_images(args, "cpu")
    assert "using synthetic digits" in capsys.readouterr().out
    assert (args.data, images.name) == ("digits", "synthetic digits")


def test_cifar_gives_channels_first(tmp_path, monkeypatch):
    x = torch.randint(256, (6, 32, 32, 3), dtype=torch.uint8, generator=generator(1))
    monkeypatch.setitem(common.TORCHVISION, "cifar10", type("CIFAR10", (SimpleNamespace,), {
        "__init__": lambda data, root, **more: SimpleNamespace.__init__(
            data, data=x.numpy(), targets=[0, 1, 2, 3, 4, 5])}))
    images, _ = load(tmp_path, "cifar10")
    assert torch.equal(images.x, torch.stack([x[..., c] for c in range(3)], dim=1))
    assert images.x.dtype == torch.uint8 and images.y.tolist() == [0, 1, 2, 3, 4, 5]
