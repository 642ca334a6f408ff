import base64
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import BLUE, GREEN, RED, WHITE, encoded, picture, pixels, png, save, status_of, tiff
from PIL import Image, ImageFile, ImageOps
from PIL.PngImagePlugin import PngInfo

from cdul_steps.data.images import ImageError, ImageStatus, decode, read_size
from cdul_steps.limits import MAX_BYTES, MAX_PIXELS, MAX_SCANS

# pytest puts its own warning filters over the module's.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "JPEG", "GIF"])
def test_every_format_whatever_the_file_is_called(tmp_path, kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    image = picture()
    found = pixels(save(tmp_path, encoded(image, kind, **options), "x.txt"))
    # The mean, because JPEG's coarse colours are far off at edges.
    tolerance = {"JPEG": 5, "GIF": 5}.get(kind, 0)
    assert np.abs(found - np.asarray(image, dtype=int)).mean() <= tolerance


def test_progressive_jpeg(tmp_path):
    found = pixels(save(tmp_path, encoded(picture(), "JPEG", progressive=True)))
    assert np.array_equal(found, pixels(save(tmp_path, encoded(picture(), "JPEG"), "b.jpg")))


# A red and a blue half after `jpegtran -arithmetic`: Pillow reads this coding, but cannot write it.
ARITHMETIC = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgMCAgMDAwMEAwMEBQgFBQQEBQoHBwYIDAoMDAsKCwsNDhIQDQ4RDgsL"
    "EBYQERMUFRUVDA8XGBYUGBIUFRT/2wBDAQMEBAUEBQkFBQkUDQsNFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQU"
    "FBQUFBQUFBQUFBQUFBQUFBQUFBT/yQARCAAQABADAREAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/ANlJ"
    "HFQSonfCVvPGvUcZI577j4+puID/2Q=="
)


def test_arithmetic_jpeg(tmp_path):
    data = base64.b64decode(ARITHMETIC)
    assert b"\xff\xc9" in data
    found = pixels(save(tmp_path, data)).astype(int)
    assert np.abs(found[:, :8] - RED).max() <= 2 and np.abs(found[:, 8:] - BLUE).max() <= 2


def test_a_jpeg_of_many_scans_is_refused_before_it_takes_hours(tmp_path):
    data = encoded(picture(), "JPEG", progressive=True)
    last, end = data.rindex(b"\xff\xc4", 0, data.rindex(b"\xff\xda")), data.rindex(b"\xff\xd9")
    for scans, refused in ((MAX_SCANS - 20, False), (MAX_SCANS + 1, True)):
        path = save(tmp_path, data[:end] + data[last:end] * scans + data[end:])
        assert not refused or status_of(path) == ImageStatus.TOO_LARGE
        assert refused or pixels(path).shape == (32, 48, 3)
    # Data after the image, such as the video of a phone's motion photo, is not a scan.
    assert pixels(save(tmp_path, data + b"\xff\xda" * 2 * MAX_SCANS)).shape == (32, 48, 3)


def test_a_jpeg_of_several_pictures_gives_the_first(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert np.abs(pixels(save(tmp_path, data))[0, 0].astype(int) - RED).max() <= 2


def test_a_loaded_image_outlives_its_file(tmp_path):
    path = save(tmp_path, encoded(picture(), "JPEG"))
    image = decode(str(path))
    path.unlink()
    assert image.getpixel((40, 30))[0] > 100


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    path = save(tmp_path, encoded(picture(), kind, exif=exif, **options))
    # The transformation that makes each orientation upright, by its definition in EXIF.
    upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a[::-1].swapaxes(0, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: a[:, ::-1].swapaxes(0, 1),
    }[orientation](np.asarray(picture()))
    found = pixels(path)
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).mean() <= (5 if kind == "JPEG" else 0)
    image = decode(path)
    assert np.array_equal(ImageOps.exif_transpose(image), image), "orientation applied twice"


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_out_of_range_counts_as_upright(tmp_path, value):
    exif = Image.Exif()
    exif[0x0112] = value
    assert read_size(save(tmp_path, encoded(picture(), "JPEG", exif=exif))) == (48, 32)


def test_damaged_exif_counts_as_upright(tmp_path):
    text = PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n4\nno hexadecimal")
    assert pixels(save(tmp_path, encoded(picture(), "PNG", pnginfo=text))).shape == (32, 48, 3)


def test_png_orientation_after_the_pixels_is_ignored_alike(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    header = struct.pack(">IIBBBBB", 3, 2, 8, 0, 0, 0, 0)
    data = png(
        (b"IHDR", header),
        (b"IDAT", zlib.compress(bytes(8))),
        (b"eXIf", exif.tobytes()[6:]),
        (b"IEND", b""),
    )
    assert pixels(save(tmp_path, data)).shape == (2, 3, 3)


@pytest.mark.parametrize("tag", [1, 6, None])
def test_the_orientation_in_xmp_does_not_count(tmp_path, tag):
    xmp = b'<x tiff:Orientation="8"/>'
    info = {700: xmp} | ({} if tag is None else {0x0112: tag})
    path = save(tmp_path, encoded(picture(), "TIFF", tiffinfo=info))
    assert pixels(path).shape[:2] == ((48, 32) if tag == 6 else (32, 48))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB", "RGBX"])
def test_modes_become_rgb(tmp_path, mode):
    image = Image.new("RGB", (4, 3), WHITE)
    image = Image.new("LAB", (4, 3), (255, 128, 128)) if mode == "LAB" else image.convert(mode)
    found = pixels(save(tmp_path, encoded(image, "TIFF")))
    assert found.shape == (3, 4, 3)
    assert found.min() >= 254


@pytest.mark.parametrize("colour", [RED, WHITE, (0, 0, 0)])
def test_cmyk_jpeg(tmp_path, colour):
    image = Image.new("RGB", (16, 16), colour).convert("CMYK")
    found = pixels(save(tmp_path, encoded(image, "JPEG", quality=95))).astype(int)
    assert np.abs(found - colour).max() <= 3


@pytest.mark.parametrize("colour", [RED, WHITE, (10, 200, 90)])
def test_ycck_jpeg(tmp_path, colour):
    # Adobe's: Y, Cb, Cr of inverted ink, which is the inverted colour; Pillow writes CMYK only.
    ycc = ImageOps.invert(Image.new("RGB", (16, 16), colour)).convert("YCbCr").split()
    inverted = [channel.point(lambda value: 255 - value) for channel in ycc]
    image = Image.merge("CMYK", [*inverted, Image.new("L", (16, 16), 0)])
    data = encoded(image, "JPEG", quality=95)
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    found = pixels(save(tmp_path, data[:transform] + b"\2" + data[transform + 1 :])).astype(int)
    assert np.abs(found - colour).max() <= 4


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (Image.new("RGBA", (2, 2), (0, 0, 255, 0)), {}),
        (Image.new("LA", (2, 2), (0, 0)), {}),
        (Image.new("RGB", (2, 2), BLUE), {"transparency": BLUE}),
        (Image.new("L", (2, 2), 7), {"transparency": 7}),
        (Image.new("1", (2, 2), 0), {"transparency": 0}),
        (Image.new("P", (2, 2), 0), {"transparency": 0}),
    ],
    ids=lambda value: getattr(value, "mode", ""),
)
def test_transparency_is_white(tmp_path, image, options):
    assert pixels(save(tmp_path, encoded(image, "PNG", **options))).min() == 255


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_half_transparency_is_half_white(tmp_path, kind):
    image = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    options = {"lossless": True} if kind == "WEBP" else {}
    assert pixels(save(tmp_path, encoded(image, kind, **options)))[0, 0].tolist() == [255, 127, 127]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_16_bit_is_scaled_not_clipped(tmp_path, kind, mode):
    values = np.array([[0, 257, 32768, 65535]], dtype="<u2" if mode == "I;16" else ">u2")
    image = Image.frombytes(mode, (4, 1), values.tobytes())
    assert pixels(save(tmp_path, encoded(image, kind)))[0, :, 1].tolist() == [0, 1, 128, 255]


def test_16_bit_transparency_is_white(tmp_path):
    header = struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0)
    row = (b"IDAT", zlib.compress(b"\0" + struct.pack(">2H", 257, 514)))
    data = png((b"IHDR", header), (b"tRNS", struct.pack(">H", 257)), row, (b"IEND", b""))
    assert pixels(save(tmp_path, data))[0, :, 0].tolist() == [255, 2]


@pytest.mark.parametrize(
    ("bits", "kind", "colour", "row", "expected"),
    [
        (1, 0, (1,), b"\x40", [0, 255]),
        (2, 0, (1,), b"\x60", [255, 170]),
        (4, 0, (1,), b"\x12", [255, 34]),
        (16, 2, (0x1234,) * 3, struct.pack(">6H", *(0x1234,) * 3, *(0x3412,) * 3), [255, 0x34]),
    ],
)
def test_a_transparent_colour_of_any_depth_is_white(tmp_path, bits, kind, colour, row, expected):
    header = struct.pack(">IIBBBBB", 2, 1, bits, kind, 0, 0, 0)
    clear = (b"tRNS", struct.pack(f">{len(colour)}H", *colour))
    data = png((b"IHDR", header), clear, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b""))
    assert pixels(save(tmp_path, data))[0, :, 0].tolist() == expected


def test_12_bit_is_scaled_not_black(tmp_path):
    packed = int("".join(f"{value:012b}" for value in (0, 16, 2048, 4095)), 2).to_bytes(6, "big")
    assert pixels(save(tmp_path, tiff(12, packed, 4)))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(
    ("bits", "data", "changes"),
    [
        (8, bytes([0, 1, 128, 255]), {}),
        (16, struct.pack("<4H", 0, 257, 32896, 65535), {}),
        (32, struct.pack("<4f", 0, 1 / 255, 128 / 255, 1), {"sample_format": 3}),
    ],
)
def test_a_tiff_whose_zero_is_white(tmp_path, bits, data, changes):
    black = pixels(save(tmp_path, tiff(bits, data, 4, **changes)))
    white = pixels(save(tmp_path, tiff(bits, data, 4, photometric=0, **changes)))
    assert black[0, :, 0].tolist() == [0, 1, 128, 255]
    assert np.array_equal(white, 255 - black)


def test_premultiplied_grey(tmp_path):
    data = encoded(Image.new("LA", (2, 1), (100, 128)), "TIFF")
    plain, premultiplied = (b"\x52\1\3\0\1\0\0\0" + kind for kind in (b"\2\0", b"\1\0"))
    assert plain in data
    assert pixels(save(tmp_path, data)).max() == 177  # half of 100, half of white
    found = pixels(save(tmp_path, data.replace(plain, premultiplied)))
    assert np.abs(found.astype(int) - (100 + 127)).max() <= 1


def test_16_bit_rgb_png(tmp_path):
    row = b"\0" + struct.pack(">3H", 65535, 32896, 0)
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    data = png((b"IHDR", header), (b"IDAT", zlib.compress(row)), (b"IEND", b""))
    assert pixels(save(tmp_path, data))[0, 0].tolist() == [255, 128, 0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.float32([-1, 0, 1]), [0, 128, 255]),
        (np.float32([0, np.nan, 2]), [0, 0, 255]),
        (np.float32([-np.inf, 3, 5, np.inf]), [0, 0, 255, 255]),
        (np.float32([np.nan, np.inf]), [0, 0]),
        (np.float32([7, 7]), [0, 0]),
        (np.float32([-3e38, 0, 3e38]), [0, 128, 255]),
        (np.int32([-100000, 0, 100000]), [0, 128, 255]),
    ],
)
def test_floats_and_32_bit_integers_are_stretched(tmp_path, values, expected):
    path = save(tmp_path, encoded(Image.fromarray(values[None]), "TIFF"))
    assert pixels(path)[0, :, 0].tolist() == expected


def test_signalling_nan_is_not_warned_of(tmp_path):
    values = np.array([[0x7F800001, 0, 0x3F800000]], np.uint32).view(np.float32)
    path = save(tmp_path, encoded(Image.fromarray(values), "TIFF"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(path)[0, :, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_frame_is_taken(tmp_path, kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert pixels(save(tmp_path, data))[0, 0].tolist() == list(RED)


def test_missing(tmp_path):
    assert status_of(tmp_path / "none.jpg") == ImageStatus.MISSING
    assert status_of(save(tmp_path, b"x") / "x.jpg", read_size) == ImageStatus.MISSING


def test_unreadable(tmp_path, monkeypatch):
    assert status_of(tmp_path) == ImageStatus.UNREADABLE
    os.mkfifo(tmp_path / "pipe.jpg")
    assert status_of(tmp_path / "pipe.jpg") == ImageStatus.UNREADABLE
    assert status_of(tmp_path / ("x" * 300)) == ImageStatus.UNREADABLE
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    assert status_of(tmp_path / "loop.jpg") == ImageStatus.UNREADABLE

    path = save(tmp_path, encoded(picture(), "JPEG"))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    assert status_of(path) == ImageStatus.UNREADABLE


def test_not_an_image(tmp_path):
    assert status_of(save(tmp_path, b"hello, I am a text")) == ImageStatus.NOT_AN_IMAGE
    assert status_of(save(tmp_path, b"x"), read_size) == ImageStatus.NOT_AN_IMAGE
    # Pillow would open it, but only the listed formats are read.
    assert status_of(save(tmp_path, encoded(picture(), "PPM"))) == ImageStatus.NOT_AN_IMAGE
    assert status_of("nul\0byte.jpg") == ImageStatus.NOT_AN_IMAGE


@pytest.mark.parametrize("function", [decode, read_size])
def test_an_empty_file_is_truncated(tmp_path, function):
    assert status_of(save(tmp_path, b""), function) == ImageStatus.TRUNCATED


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated(tmp_path, kind, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    data = data[: max(12, int(len(data) * share))]
    assert status_of(save(tmp_path, data)) == ImageStatus.TRUNCATED


def test_too_large_is_known_before_pixels_are_allocated(tmp_path, monkeypatch):
    path = save(tmp_path, encoded(picture(), "JPEG"))
    assert decode(path, max_pixels=48 * 32).size == (48, 32)

    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    for function in (decode, read_size):
        assert status_of(path, function, max_pixels=48 * 32 - 1) == ImageStatus.TOO_LARGE


@pytest.mark.parametrize("side", [12_000, 14_000, 100_000])
def test_decompression_bomb(tmp_path, side):
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    data = png((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b""))
    path = save(tmp_path, data)
    if side == 12_000:  # Pillow only warns here
        assert read_size(path) == (side, side)
        assert status_of(path, read_size, max_pixels=10**8) == ImageStatus.TOO_LARGE
    else:
        assert status_of(path) == status_of(path, read_size) == ImageStatus.TOO_LARGE


def test_gif_that_would_allocate_on_opening(tmp_path):
    extension = b"!\xf9\x04\x08\0\0\0\0"  # disposal by background
    frame = b"," + struct.pack("<4H", 0, 0, 65535, 65535) + b"\0\x08\0;"
    data = b"GIF89a" + struct.pack("<2H", 1, 1) + b"\0\0\0" + extension + frame
    assert status_of(save(tmp_path, data), read_size) == ImageStatus.TOO_LARGE


def peak_of(code: str) -> int:
    """Peak memory of a separate Python process, in bytes."""
    # Not from getrusage, which includes the memory of this process before exec.
    code += "\nprint(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024


def test_bombs_are_refused_without_memory_for_their_pixels(tmp_path):
    side = 20_000
    packer = zlib.compressobj()
    rows = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    frame = b"," + struct.pack("<4H", 0, 0, 65535, 65535) + b"\0\x08\0;"
    canvas = struct.pack("<I", 10) + bytes(4) + b"\xff\xff\0" * 2
    bombs = {
        "whole.png": png((b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")),
        "profile.png": png(
            (b"IHDR", struct.pack(">IIBBBBB", 2, 1, 8, 0, 0, 0, 0)),
            (b"zTXt", b"a\0\0" + zlib.compress(bytes(4 * 10**7))),
            (b"iCCP", b"a\0\0" + zlib.compress(bytes(4 * 10**7))),
            (b"IDAT", zlib.compress(bytes(3))),
            (b"IEND", b""),
        ),
        "frame.gif": b"GIF89a" + struct.pack("<2H", 1, 1) + b"\0\0\0!\xf9\x04\x08\0\0\0\0" + frame,
        "canvas.webp": b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + canvas,
        "long.bmp": encoded(picture(), "BMP"),
    }
    paths = {name: save(tmp_path, data, name) for name, data in bombs.items()}
    os.truncate(paths["long.bmp"], MAX_BYTES + 1)
    statuses = {"profile.png": "ok" if pixels(paths["profile.png"]).size else ""}
    statuses |= {n: str(status_of(p)) for n, p in paths.items() if n not in statuses}
    assert statuses.pop("profile.png") == "ok"  # a profile of 40 MB is ignored
    assert set(statuses.values()) == {"too_large"}
    code = "from cdul_steps.data.images import ImageError, decode, read_size\n"
    tries = "".join(
        f"try:\n    {function}({str(path)!r})\nexcept ImageError:\n    pass\n"
        for path in paths.values()
        for function in ("decode", "read_size")
    )
    peak_of(code + tries)  # compiling modules at their first import takes more memory
    assert peak_of(code + tries) - peak_of(code) < 20e6


def test_the_limit_is_where_pillow_itself_stops():
    assert MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS


def test_decoders_print_nothing(tmp_path):
    data = bytearray(encoded(picture(), "TIFF", compression="tiff_lzw"))
    data[40:80] = bytes(range(40))  # libtiff would print the name of its temporary file on stderr
    path = save(tmp_path, bytes(data))
    many = save(
        tmp_path,
        tiff(8, bytes(4), 4).replace(
            b"\x15\x01\x03\0\1\0\0\0\1\0", b"\x15\x01\x03\0\1\0\0\0\x36\0"
        ),
        "many",
    )
    code = f"""
from cdul_steps.data.images import ImageError, decode
for path in {[str(path), str(many)]}:
    try:
        decode(path)
    except ImageError as error:
        print(error.status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (["truncated"] * 2, "")


def test_out_of_memory_is_too_large(tmp_path, monkeypatch):
    def load(self):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    path = save(tmp_path, encoded(picture(), "BMP"))
    assert status_of(path) == ImageStatus.TOO_LARGE


def test_read_size_decodes_no_pixels(tmp_path, monkeypatch):
    paths = [
        save(tmp_path, encoded(picture(), kind), kind)
        for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
    ]

    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", load)
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert {read_size(path) for path in paths} == {(48, 32)}


def test_image_error_survives_pickling():
    error = pickle.loads(pickle.dumps(ImageError(ImageStatus.TRUNCATED, "why")))
    assert (error.status, error.detail, str(error)) == ("truncated", "why", "truncated: why")


def test_no_warnings_and_no_torch(tmp_path):
    # Pillow warns about this palette image and about the size of this bomb.
    palette = Image.new("P", (2, 2))
    save(tmp_path, encoded(palette, "PNG", transparency=b"\0\x80"), "a")
    header = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 0, 0, 0, 0)
    save(tmp_path, png((b"IHDR", header), (b"IDAT", b""), (b"IEND", b"")), "b")
    code = (
        "import sys; from cdul_steps.data.images import decode, read_size\n"
        "import cdul_steps.data.readers, cdul_steps.data.classes\n"
        f"decode({str(tmp_path / 'a')!r}); print(read_size({str(tmp_path / 'b')!r}))\n"
        "assert not {'torch', 'pandas', 'pyarrow'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == "(12000, 12000)"


EXIF = Image.Exif()
EXIF[0x0112] = 6
SEEDS = [
    encoded(picture(), "JPEG", exif=EXIF),
    encoded(picture().convert("RGBA"), "PNG", exif=EXIF),
    encoded(picture(), "TIFF", exif=EXIF),
    encoded(picture(), "TIFF", compression="tiff_lzw"),
    encoded(picture(), "GIF"),
    encoded(picture(), "WEBP", exif=EXIF),
    encoded(picture().convert("P"), "BMP"),
]


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_bytes_give_an_image_or_an_image_error(tmp_path, data):
    mutated = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 8))):
        # Half of the changes hit the header, which matters most.
        last = data.draw(st.sampled_from([min(200, len(mutated)), len(mutated)])) - 1
        mutated[data.draw(st.integers(0, last))] = data.draw(st.integers(0, 255))
    path = save(tmp_path, bytes(mutated[: data.draw(st.integers(1, len(mutated)))]))
    sizes = []
    for function in (read_size, decode):
        try:
            result = function(path, max_pixels=1_000_000)
        except ImageError as error:
            assert error.status in ("truncated", "not_an_image", "too_large")
            assert error.detail
        else:
            sizes.append(getattr(result, "size", result))
    assert len(set(sizes)) <= 1
