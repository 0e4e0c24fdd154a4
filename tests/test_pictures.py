"""Picture files, folders of them, and torchvision's files: read faithfully, or refused by name."""

import io
import os
import random
import shutil
import struct
import warnings
import zlib
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageDraw
from torchvision.transforms import functional as TF

import common
from harness import folder_of_pictures, one_line
from strategies import generator
from test_common import arguments, write_mnist


@pytest.fixture
def path(tmp_path):
    """Where the test writes its picture; Pillow looks at the content, not at the name."""
    return tmp_path / "picture"


def pixels(path, mode="RGB", ground="white"):
    """What open_picture reads, uint8 [C, H, W]; nothing may be written to stderr meanwhile."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = common.open_picture(path, mode, ground)
    assert picture.mode == mode
    return TF.pil_to_tensor(picture)


def noise(mode, *shape, seed=0):
    """Random pixels uint8 [C, H, W], and their picture in the mode."""
    x = torch.randint(256, shape, dtype=torch.uint8, generator=generator(seed))
    return x, TF.to_pil_image(x, mode)


def png(bits, colour, row, *chunks):
    """A PNG of one row of 4 pixels, by the specification: Pillow does not write all that it reads.

    colour: 0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGB with alpha; chunks: (name, content).
    """
    head = struct.pack(">IIBBBBB", 4, 1, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(b"\0" + row)),
                           (b"IEND", b"")])


# --- upright -----------------------------------------------------------------------------------

# EXIF 2.3, tag 274: where the first row and the first column of the file belong.
SIDES = {1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
         5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom")}


def stored(x, orientation):
    """The pixels of a file whose viewer, if it obeys the orientation, shows x [C, H, W]."""
    row, column = SIDES[orientation]
    if "bottom" in (row, column):
        x = x.flip(1)
    if "right" in (row, column):
        x = x.flip(2)
    return x.transpose(1, 2) if row in ("left", "right") else x


@pytest.mark.parametrize("orientation", SIDES)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG", "MPO"])
def test_pictures_stand_upright_whatever_the_orientation(path, kind, orientation):
    x = torch.zeros(3, 32, 48, dtype=torch.uint8)
    x[0, :16], x[1, :, :16] = 255, 255  # four blocks of 16 that JPEG leaves apart
    exif = Image.Exif()
    exif[274] = orientation
    TF.to_pil_image(stored(x, orientation)).save(path, kind, exif=exif, lossless=True, quality=95,
                                                 subsampling=0)
    assert torch.equal(pixels(path) > 127, x > 127)


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_mask_lands_where_the_upright_picture_has_its_pixels(tmp_path, orientation):
    """A photo that a camera has turned, and a mask painted on what a viewer shows of it."""
    x, _ = noise("L", 1, 20, 30)
    exif = Image.Exif()
    exif[274] = orientation
    TF.to_pil_image(stored(x, orientation)).save(tmp_path / "photo.png", exif=exif)
    TF.to_pil_image((x > 99) * torch.tensor(255, dtype=torch.uint8)).save(tmp_path / "mask.png")
    photo, mask = (pixels(tmp_path / name, "L") for name in ("photo.png", "mask.png"))
    assert torch.equal(mask == 255, photo > 99)


# --- depth -------------------------------------------------------------------------------------

def deep(n):
    """n greys of 16 bits, and the nearest greys of 8 bits: 65,535 = 257 * 255."""
    values = torch.randint(65536, (n,), generator=generator(0)).tolist()
    return values, [round(value / 257) for value in values]


@pytest.mark.parametrize("kind, mode", [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B"),
                                        ("JPEG2000", "I;16"), ("PPM", "I")])
def test_grey_of_16_bits_is_scaled(path, kind, mode):
    values, expected = deep(600)
    packed = struct.pack({"I;16": "<600H", "I;16B": ">600H", "I": "=600i"}[mode], *values)
    Image.frombytes(mode, (30, 20), packed).save(path, kind)
    assert pixels(path, "L").flatten().tolist() == expected
    assert pixels(path)[1].flatten().tolist() == expected


@pytest.mark.parametrize("content, expected", [
    (png(1, 0, b"\xa0"), [255, 0, 255, 0]),
    (png(2, 0, b"\x1b"), [0, 85, 170, 255]),
    (png(4, 0, b"\x1f\x0c"), [17, 255, 0, 204]),
    (png(16, 0, struct.pack(">4H", 0, 257, 25700, 65535)), [0, 1, 100, 255]),
    (png(16, 2, struct.pack(">12H", *[0] * 3, *[257] * 3, *[25700] * 3, *[65535] * 3)),
     [0, 1, 100, 255]),
    (png(16, 4, struct.pack(">8H", 0, 65535, 257, 65535, 25700, 65535, 9, 0)), [0, 1, 100, 255]),
    (b"P5 4 1 15 \x00\x01\x0c\x0f", [0, 17, 204, 255]),
    (b"P2 4 1 1023 0 341 682 1023", [0, 85, 170, 255]),
    (b"P5 4 1 1023 " + struct.pack(">4H", 0, 341, 682, 1023), [0, 85, 170, 255]),
    (b"P6 4 1 1023 " + struct.pack(">12H", *[0] * 3, *[341] * 3, *[682] * 3, *[1023] * 3),
     [0, 85, 170, 255]),
    (b"P4 4 1 \xa0", [0, 255, 0, 255])])
def test_every_depth_runs_from_black_to_white(path, content, expected):
    path.write_bytes(content)
    assert pixels(path, "L").flatten().tolist() == expected


def retagged(data, tag, value):
    """A little-endian TIFF whose tag of one short number has another value."""
    at = data.index(struct.pack("<HHI", tag, 3, 1)) + 8
    return data[:at] + struct.pack("<I", value) + data[at + 4:]


def tiff(mode, **options):
    file = io.BytesIO()
    Image.new(mode, (4, 4)).save(file, "TIFF", **options)
    return file.getvalue()


@pytest.mark.parametrize("content", [
    tiff("I"), tiff("F"), b"Pf 1 1 -1.0 \0\0\0\0",
    retagged(tiff("I;16"), 258, 12), retagged(tiff("I;16"), 262, 0),  # 12 bits; 0 is white
    retagged(tiff("L", tiffinfo={339: 1}), 339, 2)],  # signed
    ids=["32 bits", "float", "pfm", "12 bits", "white is 0", "signed"])
def test_values_of_unknown_range_are_refused_by_name(path, capsys, content):
    path.write_bytes(content)
    one_line(capsys, lambda: common.open_picture(path, "L", skip="leave it out"), "picture",
             "which of its values is white", "; leave it out")


def test_the_modes_of_print_are_read(path):
    """A JPEG in CMYK, whose four inks Adobe writes as 255 - ink; R = (1 - C)(1 - K)."""
    Image.new("CMYK", (16, 16), (200, 100, 0, 50)).save(path, "JPEG", quality=100)
    expected = torch.tensor([(255 - ink) * (255 - 50) / 255 for ink in (200, 100, 0)])
    assert (pixels(path).float().mean(dim=(1, 2)) - expected).abs().max() < 3  # JPEG rounds


# --- transparency ------------------------------------------------------------------------------

@pytest.mark.parametrize("ground, level", [("white", 255), ("black", 0)])
@pytest.mark.parametrize("kind, mode", [("PNG", "RGBA"), ("PNG", "LA"), ("TIFF", "RGBA"),
                                        ("TIFF", "LA"), ("WEBP", "RGBA"), ("TIFF", "PA")])
def test_what_is_transparent_shows_the_ground(path, kind, mode, ground, level):
    """x a + ground (1 - a) for each channel x; rounding twice is off by 1 at most."""
    x, picture = noise("RGBA", 4, 20, 30)
    if mode == "PA":  # a palette of 256 colours, which here are greys, and alpha
        picture = Image.merge("LA", picture.split()[2:])
        x = x[[2, 2, 2, 3]]
        palette = Image.new("PA", picture.size)
        palette.putpalette([i for i in range(256) for _ in range(3)])
        palette.putdata(list(zip(*(list(band.tobytes()) for band in picture.split()))))
        picture = palette
    elif mode == "LA":
        picture, x = Image.merge("LA", picture.split()[2:]), x[[2, 2, 2, 3]]
    picture.save(path, kind, lossless=True, exact=True)
    a = x[3] / 255
    assert (pixels(path, ground=ground) - (x[:3] * a + level * (1 - a))).abs().max() <= 1


PALETTE = b"PLTE", bytes([0, 0, 0, 60, 60, 60, 120, 120, 120, 240, 240, 240])


@pytest.mark.parametrize("content, expected", [
    (png(8, 0, b"\x00\x3c\x78\xf0", (b"tRNS", b"\x00\x3c")), [0, 255, 120, 240]),
    (png(8, 2, bytes([0] * 3 + [60] * 3 + [120] * 3 + [240] * 3), (b"tRNS", b"\x00\x3c" * 3)),
     [0, 255, 120, 240]),
    (png(1, 0, b"\xa0", (b"tRNS", b"\x00\x00")), [255] * 4),
    (png(8, 3, b"\x00\x01\x02\x03", PALETTE, (b"tRNS", b"\xff\x00")), [0, 255, 120, 240]),
    (png(2, 3, b"\x1b", PALETTE, (b"tRNS", b"\x00\xff\x33\xff")), [255, 60, 228, 240]),
    (png(8, 3, b"\x00\x01\x02\x03", PALETTE), [0, 60, 120, 240])],
    ids=["grey key", "colour key", "bit key", "palette key", "palette table", "palette"])
def test_colours_said_to_be_transparent_show_white(path, content, expected):
    path.write_bytes(content)
    assert pixels(path, "L").flatten().tolist() == expected


@pytest.mark.parametrize("content", [
    png(2, 0, b"\x1b", (b"tRNS", b"\x00\x03")), png(4, 0, b"\x1f\x0c", (b"tRNS", b"\x00\x0f")),
    png(16, 0, bytes(8), (b"tRNS", b"\x12\x34")),
    png(16, 2, bytes(24), (b"tRNS", b"\x12\x34" * 3))])
def test_keys_that_pillow_misses_are_refused(path, capsys, content):
    path.write_bytes(content)
    one_line(capsys, lambda: common.open_picture(path, "L"), "transparent colour", "alpha channel")


def test_a_picture_that_is_transparent_everywhere_is_refused(path, capsys):
    Image.new("RGBA", (4, 4)).save(path, "PNG")
    one_line(capsys, lambda: common.open_picture(path, "L"), "all of it is transparent")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_black_drawing_on_nothing_does_not_vanish(path, mode):
    picture = Image.new("RGBA", (30, 30))
    ImageDraw.Draw(picture).line((5, 5, 25, 25), "black", 3)
    picture.convert(mode).save(path, "PNG")
    x = pixels(path, "L")
    assert x[0, 15, 15] == 0 and x[0, 0, 29] == 255


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF"])
def test_of_many_frames_the_first_is_taken(path, kind):
    Image.init()
    if kind not in Image.SAVE_ALL:
        pytest.skip(f"this Pillow writes no {kind}")
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    red.save(path, kind, save_all=True, append_images=[blue])
    assert (pixels(path).float().mean(dim=(1, 2)) - torch.tensor([255.0, 0, 0])).abs().max() < 4


# --- what cannot be read -----------------------------------------------------------------------

@pytest.mark.parametrize("make, words", [
    (lambda path: None, ["there is no such file"]), (lambda path: path.mkdir(), ["no such file"]),
    (lambda path: os.mkfifo(path), ["no such file"]),  # opening it would wait for ever
    (lambda path: path.symlink_to(path), ["no such file"]),
    (lambda path: path.write_bytes(b""), ["damaged, or in no format"]),
    (lambda path: path.write_text("text"), ["damaged, or in no format"])],
    ids=["missing", "folder", "pipe", "link to itself", "empty", "text"])
def test_the_reason_is_said(path, capsys, make, words):
    make(path)
    one_line(capsys, lambda: common.open_picture(path, "RGB"), str(path), *words)


def test_a_picture_above_the_limit_of_pixels_is_no_damaged_one(path, capsys, monkeypatch):
    Image.new("1", (300, 100)).save(path, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    assert pixels(path).shape == (3, 100, 300)  # Pillow warns above it, stops above twice as many
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    one_line(capsys, lambda: common.open_picture(path, "RGB"), "more than 20,000 pixels", "smaller")


def test_a_file_that_may_not_be_read_is_no_damaged_one(path, capsys):
    Image.new("1", (3, 3)).save(path, "PNG")
    with mock.patch.object(Image, "open", side_effect=PermissionError(13, "Permission denied")):
        one_line(capsys, lambda: common.open_picture(path, "RGB"), "Permission denied")


def written():
    """Small pictures in every format that this Pillow writes, as bytes."""
    Image.init()
    exif = Image.Exif()
    exif[274] = 6
    colours = noise("RGB", 3, 9, 12)[1]
    for kind in sorted(Image.SAVE.keys() - {"ICNS"}):  # that one has a million pixels
        for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "LAB", "I", "I;16", "F"):
            picture = Image.new("I;16", (12, 9), 777) if mode == "I;16" else colours.convert(
                "L" if mode == "PA" else "RGB").convert(mode)
            for options in {}, {"exif": exif}, {"save_all": True, "append_images": [colours]}, \
                    {"compression": "tiff_lzw"}:
                file = io.BytesIO()
                try:
                    picture.save(file, kind, **options)
                except Exception:
                    continue  # not in this mode, or not with these options
                yield file.getvalue()


def damaged(data, rng, others):
    """The file cut off, with flipped bits, with another head, spliced with another, or whole."""
    how, at = rng.choice(["cut", "flip", "head", "splice", "whole"]), rng.randrange(len(data))
    if how == "cut":
        return data[:at]
    if how == "splice":
        other = rng.choice(others)
        return data[:at] + other[rng.randrange(len(other)):]
    changed = bytearray(data)
    for _ in range({"flip": 9, "head": 3, "whole": 0}[how]):
        if how == "flip":
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            changed[rng.randrange(min(64, len(data)))] = rng.randrange(256)
    return bytes(changed)


@pytest.fixture(scope="module")
def files_of_all_formats():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(written())


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_give_a_picture_or_one_line(tmp_path, capfd, monkeypatch, seed,
                                                  files_of_all_formats):
    """500 files for each seed, of all formats, under names of all formats."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)  # a damaged size must not cost seconds
    rng, suffixes, read = random.Random(seed), sorted(Image.registered_extensions()), 0
    for _ in range(500):
        path = tmp_path / f"x{rng.choice(suffixes)}"
        path.write_bytes(damaged(rng.choice(files_of_all_formats), rng, files_of_all_formats))
        try:
            pixels(path, rng.choice(["L", "RGB"]), rng.choice(["white", "black"]))
            read, lines = read + 1, 0
        except SystemExit:
            lines = 1
        error = capfd.readouterr().err
        assert error.count("\n") == lines and error.startswith(f"error: {path} cannot"[:len(error)])
    assert 100 < read < 400  # neither all refused nor all whole


# --- folders -----------------------------------------------------------------------------------

@pytest.fixture
def load(tmp_path):
    """load(*flags, train=True) of the folder tmp_path/p, in which 12 pictures of 20 pixels lie."""
    folder_of_pictures(tmp_path / "p", 12, 20)

    def load(*flags, train=True, data=tmp_path / "p"):
        args = arguments(tmp_path, "--data", data, "--size", 16, *flags)
        args.out.mkdir(parents=True, exist_ok=True)
        return common.load_images(args, "cpu", train=train)
    return load


def picture(path, side=20, colour="white"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), colour).save(path)


def test_a_folder_of_turned_photos_is_upright(tmp_path, load):
    x = torch.zeros(3, 20, 20, dtype=torch.uint8)
    x[:, :10] = 255
    for orientation in SIDES:
        exif = Image.Exif()
        exif[274] = orientation
        TF.to_pil_image(stored(x, orientation)).save(tmp_path / "p" / f"{orientation:02}.png",
                                                     exif=exif)
    x = load().x
    assert (x[1:9, :, 2] == 255).all() and (x[1:9, :, 13] == 0).all()


def test_hidden_files_and_folders_are_no_pictures(tmp_path, load, capsys):
    for name in ("._00.png", ".thumbs/a.png", "__MACOSX/._00.png", "__MACOSX/b.png"):
        (tmp_path / "p" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "p" / name).write_bytes(b"no picture")
    assert len(load().x) == 11 and "left out" not in capsys.readouterr().out


def test_what_is_no_file_is_left_out_aloud(tmp_path, load, capsys):
    (tmp_path / "p" / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "p" / "loop.png").symlink_to("loop.png")
    picture(tmp_path / "p" / "folder.jpg" / "deep.png")
    os.mkfifo(tmp_path / "p" / "pipe.png")
    assert len(load().x) == 12
    assert "left out 4 that are no files (folder.jpg, gone.png, loop.png and 1 more)" \
        in capsys.readouterr().out


def test_linked_folders_are_followed_without_loops_and_each_file_once(tmp_path, load):
    picture(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "p" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "p" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "self").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "p" / "top").symlink_to(tmp_path / "p")
    (tmp_path / "p" / "above").symlink_to(tmp_path)
    picture(tmp_path / "beside.png")  # above is a loop, not a folder of pictures
    (tmp_path / "p" / "twin.png").symlink_to("00.png")
    assert len(load().x) == 13 - 1


@pytest.mark.parametrize("name, taken", [("a.gif", True), ("a.JPG", True), ("a.webp", True),
                                         ("a.heic", False), ("b.svg", False), ("c", False)])
def test_what_is_left_out_by_its_suffix_is_counted(tmp_path, load, capsys, name, taken):
    file = tmp_path / "p" / name
    if taken:
        picture(file)
    else:
        file.touch()
    n = len(load().x) + len(load(train=False).x)
    assert n == 12 + taken
    assert capsys.readouterr().out.count(
        f"left out 1 {file.suffix or 'without suffix'}") == (not taken)  # once for both parts


@pytest.mark.parametrize("out", ["p/out", "p/deep/er", "elsewhere"])
def test_what_a_run_has_written_is_no_data(tmp_path, load, out):
    """Neither for itself nor for another run, nor through a link."""
    (tmp_path / "p" / "link").symlink_to(tmp_path / "elsewhere")
    with common.Run(arguments(tmp_path, "--out", tmp_path / out)):
        picture(tmp_path / out / "samples.png")
    (tmp_path / "p" / "newest.png").symlink_to(tmp_path / out / "samples.png")
    assert len(load("--out", tmp_path / out).x) == 11
    (tmp_path / "p" / "newest.png").unlink()
    assert len(load("--out", tmp_path / "other").x) == 11


def test_results_do_not_go_among_the_data(tmp_path, load, capsys):
    one_line(capsys, lambda: load("--out", tmp_path / "p"), "--out", "choose another")
    assert len(load("--out", tmp_path).x) == 11  # what holds the data's folder may hold results


def test_data_may_be_the_folder_one_is_in(tmp_path, load, monkeypatch):
    monkeypatch.chdir(tmp_path / "p")
    args = arguments(tmp_path, "--data", ".", "--size", 16)
    args.out = Path("out") / "03"
    for _ in range(2):
        with common.Run(args):
            images = common.load_images(args, "cpu")
            picture(args.out / "samples.png")
        assert len(images.x) == 11 and images.name == "p"


def spoil(folder):
    """Three broken files and two small ones among twelve."""
    for i in (1, 3, 5):
        (folder / f"{i:02}.png").write_bytes(b"broken")
    picture(folder / "07.png", 13)
    picture(folder / "08.png", 15)


def test_all_that_cannot_be_used_comes_in_one_line(tmp_path, load, capsys):
    spoil(tmp_path / "p")
    one_line(capsys, load, "5 of 12", "01.png cannot be read", "and 2 more", "--size 12", "--skip")
    assert len(load("--skip").x) == 7
    assert "left out 5 that cannot be used (01.png, 03.png, 05.png and 2 more)" \
        in capsys.readouterr().out
    for i in (1, 3, 5):
        picture(tmp_path / "p" / f"{i:02}.png")
    one_line(capsys, load, "2 of 12", "07.png is 13x13, 08.png is 15x15", "--size 12")
    assert len(load("--size", 12).x) == 11  # the advice holds for all


@given(st.integers(4, 5000))
def test_the_advised_size_fits_the_networks(side):
    fits = common.fitting(side)
    common.check_side(common.Images(torch.empty(1, 1, fits, fits), None, ""))  # does not end
    assert side / 2 < fits <= side


def decoding(load, *flags):
    """How many files are decoded."""
    with mock.patch.object(common, "read_picture", wraps=common.read_picture) as read:
        try:
            load(*flags)
        except (SystemExit, KeyboardInterrupt):
            pass
    return read.call_count


def test_what_was_decoded_is_not_decoded_again(tmp_path, load):
    spoil(tmp_path / "p")
    assert decoding(load) == 12
    assert decoding(load) == 5  # the good ones are kept
    for i in (1, 3, 5, 7, 8):
        picture(tmp_path / "p" / f"{i:02}.png")
    assert decoding(load) == 5 and decoding(load) == 0
    assert decoding(load, "--size", 12) == 12 and decoding(load) == 12  # kept for one size
    picture(tmp_path / "p" / "05.png", colour="red")
    picture(tmp_path / "p" / "99.png")
    assert decoding(load) == 2
    assert load().x[5, :, 0, 0].tolist() == [255, 0, 0]


def test_ctrl_c_keeps_what_was_decoded(load):
    read, left = common.read_picture, [7]

    def stop(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return read(*args)
    with mock.patch.object(common, "read_picture", stop), pytest.raises(KeyboardInterrupt):
        load()
    assert decoding(load) == 5


def test_a_folder_shows_progress(load, capsys):
    load()
    assert "reading pictures  step 12/12" in capsys.readouterr().out
    load()
    assert "reading" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a\nb.png", os.fsdecode(b"\xff.png"), "\x1b[2J.png"])
def test_names_of_any_bytes_stay_on_their_line(tmp_path, load, capsys, name):
    (tmp_path / "p" / name).write_bytes(b"broken")
    one_line(capsys, load, "1 of 13", ascii(name)[1:-1])
    assert len(load("--skip").x) == 11
    shutil.copy(tmp_path / "p" / "01.png", tmp_path / "p" / name)
    assert decoding(load) == 1 and decoding(load) == 0


def test_a_folder_that_may_not_be_read_is_named(tmp_path, load, capsys):
    picture(tmp_path / "p" / "closed" / "a.png")
    listed = os.scandir

    def scan(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)
    with mock.patch.object(os, "scandir", scan):
        one_line(capsys, load, "closed cannot be read (Permission denied)")


def test_a_file_as_data_is_refused(tmp_path, load, capsys):
    one_line(capsys, lambda: load(data=tmp_path / "p" / "00.png"), "00.png is no folder")


def test_the_order_is_not_that_of_the_file_system(tmp_path, load):
    picture(tmp_path / "p" / "deep" / "a.png", colour="blue")
    expected, walk = load().x, os.walk

    def backwards(*args, **flags):
        for here, folders, names in walk(*args, **flags):
            folders.reverse()
            names.reverse()
            yield here, folders, names
    with mock.patch.object(os, "walk", backwards):
        assert torch.equal(load().x, expected)


# --- labels ------------------------------------------------------------------------------------

def sorted_folder(folder, **counts):
    """counts[name] pictures in each subfolder; red tells the subfolder, green the picture."""
    for label, (name, n) in enumerate(sorted(counts.items())):
        for i in range(n):
            picture(folder / name / "deep" / f"{i:03}.png", 16, (50 * label, i, 0))
    return folder


@settings(max_examples=12)  # each makes folders
@given(st.dictionaries(st.sampled_from("abcd"), st.integers(2, 25), min_size=2))
def test_subfolders_are_labels_and_every_tenth_of_each_is_for_tests(tmp_path_factory, counts):
    home = tmp_path_factory.mktemp("labels")
    folder = sorted_folder(home / "p", **counts)
    args = arguments(home, "--data", folder, "--size", 16)
    args.out.mkdir()
    train, test = (common.load_images(args, "cpu", train=part) for part in (True, False))
    for images in (train, test):
        assert torch.equal(images.x[:, 0, 8, 8].long(), 50 * images.y)  # each its own label
    for label, n in enumerate(counts[name] for name in sorted(counts)):
        kept, held = (images.x[images.y == label, 1, 8, 8].tolist() for images in (train, test))
        assert sorted(kept + held) == list(range(n))
        assert held == (list(range(9, n, 10)) or [n - 1])


def test_labels_follow_each_other_evenly(tmp_path):
    """The first pictures have all labels in their shares: chapters look at the first 10,000."""
    args = arguments(tmp_path, "--data", sorted_folder(tmp_path / "p", a=40, b=20), "--size", 16)
    args.out.mkdir()
    y = common.load_images(args, "cpu").y
    share = y.float().cumsum(0) / torch.arange(1, len(y) + 1)
    assert (share[8:] - 1 / 3).abs().max() < 1 / 9  # off by one picture at most


def test_labels_are_said_by_name(tmp_path, capsys):
    args = arguments(tmp_path, "--data", sorted_folder(tmp_path / "p", dog=3, cat=4), "--size", 16)
    args.out.mkdir()
    for train in (True, False):
        common.load_images(args, "cpu", train=train)
    assert capsys.readouterr().out.count("labels 0 cat, 1 dog") == 1


@pytest.mark.parametrize("counts, beside, said", [
    (dict(only=12), [], ""), (dict(a=6, b=6), ["top.png"], ""),
    (dict(a=11, b=1, c=1), [], "no labels, since 2 of 3 subfolders hold one picture (b, c)")])
def test_other_folders_have_no_labels(tmp_path, capsys, counts, beside, said):
    folder = sorted_folder(tmp_path / "p", **counts)
    for name in beside:
        picture(folder / name)
    args = arguments(tmp_path, "--data", folder, "--size", 16)
    args.out.mkdir()
    assert common.load_images(args, "cpu").y is None
    assert said in capsys.readouterr().out


# --- the files of MNIST and CIFAR-10 -----------------------------------------------------------

def mnist(tmp_path, digits_dir, change, flags=()):
    """load_images with the four files of MNIST, one of which change(folder) has changed."""
    write_mnist(tmp_path / "data")
    shutil.copy(digits_dir / "digits.pt", tmp_path / "data")
    change(tmp_path / "data" / "MNIST" / "raw")
    args = arguments(tmp_path, *flags)
    args.data = "mnist" if flags else None
    return lambda: [common.load_images(args, "cpu", train=part) for part in (True, False)]


def cut(name):
    def change(raw):
        os.truncate(raw / name, 13)
    return change


@pytest.mark.parametrize("flags", [[], ["--data", "mnist"]])
@pytest.mark.parametrize("change, words", [
    (cut("train-images-idx3-ubyte"), ["train-images-idx3-ubyte cannot be read", "cut off"]),
    (cut("t10k-labels-idx1-ubyte"), ["t10k-labels-idx1-ubyte cannot be read"]),
    (lambda raw: (raw / "train-labels-idx1-ubyte").write_bytes(b""), ["train-labels-idx1-ubyte"]),
    (lambda raw: (raw / "train-labels-idx1-ubyte").write_bytes(b"<!DOCTYPE html>"), ["cut off"]),
    (lambda raw: (raw / "train-images-idx3-ubyte").rename(raw / "train-images.idx3-ubyte"),
     ["train-images.idx3-ubyte has to be", "raw/train-images-idx3-ubyte", "rename"]),
    (lambda raw: (raw / "t10k-images-idx3-ubyte").rename(raw.parent / "t10k-images-idx3-ubyte"),
     ["MNIST/t10k-images-idx3-ubyte has to be", "raw/t10k-images-idx3-ubyte"]),
    (lambda raw: (raw / "t10k-images-idx3-ubyte").unlink(), ["t10k-images-idx3-ubyte is missing"]),
    (lambda raw: (raw / "t10k-images-idx3-ubyte").rename(raw / "t10k-images-idx3-ubyte.gz"),
     ["t10k-images-idx3-ubyte.gz is damaged"]),
    (lambda raw: (raw / "train-labels-idx1-ubyte").write_bytes(
        struct.pack(">II", 2049, 7) + bytes(7)), ["20 pictures and 7 labels"])])
def test_a_wrong_file_of_mnist_is_named(tmp_path, digits_dir, no_download, capsys, change, words,
                                        flags):
    one_line(capsys, mnist(tmp_path, digits_dir, change, flags), *words)


def test_loose_files_are_not_taken_for_those_of_fashion(tmp_path, no_download, capsys):
    """Both have files of the same names, and nothing in these tells which they are."""
    write_mnist(tmp_path / "data")
    for file in (tmp_path / "data" / "MNIST" / "raw").iterdir():
        file.rename(tmp_path / "data" / file.name)
    args = arguments(tmp_path, "--data", "fashion")
    one_line(capsys, lambda: common.load_images(args, "cpu"), "cannot be downloaded")
    args = arguments(tmp_path, "--data", "mnist")
    one_line(capsys, lambda: common.load_images(args, "cpu"), "has to be", "MNIST/raw", "rename it")


def test_a_wrong_file_of_cifar_is_named(tmp_path, no_download, capsys):
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    (folder / "data_batch_1").write_bytes(b"half")
    args = arguments(tmp_path, "--data", "cifar10")
    one_line(capsys, lambda: common.load_images(args, "cpu"), "data_batch_1", "missing or damaged")
    shutil.rmtree(folder)
    (folder.parent / "cifar-10-python.tar.gz").write_bytes(b"half")
    one_line(capsys, lambda: common.load_images(args, "cpu"), "cifar-10-python.tar.gz")
