"""Files as phones and cameras write them, and files that are unusual or damaged."""

import struct
import zlib
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from pictures import RED, encoded, picture, pixels, png, save, status_of, tiff
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from cdul_steps.data import formats, images
from cdul_steps.data.images import ImageError, ImageStatus, decode

pytestmark = pytest.mark.filterwarnings("ignore")

SAMPLES = Path(__file__).with_name("samples")
"""A blue picture whose upper left quarter is red; in those called "clear" the blue is transparent,
and those called "turned" and "packed" have an orientation on their side."""
reads_jxl = pytest.mark.skipif(
    find_spec("pillow_jxl") is None, reason="pillow-jxl-plugin is absent"
)


def corners(path: Path) -> list[str]:
    """The colours at upper left, upper right, lower left and lower right."""
    found = pixels(path)[[2, 2, -3, -3], [2, -3, 2, -3]].astype(int)
    names = {"red": RED, "blue": (0, 0, 255), "white": (255, 255, 255)}
    near = [[n for n, c in names.items() if np.abs(one - c).max() < 20] for one in found]
    return [" ".join(names) for names in near]


UPRIGHT, TURNED = ["red", "blue", "blue", "blue"], ["blue", "red", "blue", "blue"]
CLEAR = ["red", "white", "white", "white"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("runs.bmp", UPRIGHT),
        ("plain.heic", UPRIGHT),
        ("turned.heic", TURNED),
        ("clear.heic", CLEAR),
        ("two.heif", UPRIGHT),
        ("ten.heic", UPRIGHT),
        *(
            pytest.param(name, expected, marks=reads_jxl)
            for name, expected in [
                ("plain.jxl", UPRIGHT),
                ("exif.jxl", UPRIGHT),
                ("packed.jxl", TURNED),
                ("clear.jxl", CLEAR),
            ]
        ),
    ],
)
def test_what_phones_make(name, expected):
    assert corners(SAMPLES / name) == expected


@pytest.mark.parametrize("name", sorted(path.name for path in SAMPLES.iterdir()))
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_phone_pictures_that_are_cut_are_refused(tmp_path, name, share):
    if name.endswith(".jxl") and find_spec("pillow_jxl") is None:
        pytest.skip("pillow-jxl-plugin is absent")
    data = (SAMPLES / name).read_bytes()
    assert status_of(save(tmp_path, data[: int(len(data) * share)])) == ImageStatus.TRUNCATED


def avif(**options) -> bytes:
    image = Image.new("RGB", (64, 48), (0, 0, 255))
    image.paste(RED, (0, 0, 32, 24))
    if options.pop("clear", False):
        image.putalpha(0)
        image.paste((*RED, 255), (0, 0, 32, 24))
    return encoded(image, "AVIF", quality=95, subsampling="4:4:4", **options)


def test_avif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert corners(save(tmp_path, avif())) == UPRIGHT
    assert corners(save(tmp_path, avif(exif=exif))) == TURNED
    assert corners(save(tmp_path, avif(clear=True))) == CLEAR
    green = Image.new("RGB", (64, 48), (0, 255, 0))
    assert corners(save(tmp_path, avif(save_all=True, append_images=[green]))) == UPRIGHT
    data = avif()
    assert status_of(save(tmp_path, data[: len(data) - 9])) == ImageStatus.TRUNCATED


def test_a_brand_that_heic_and_avif_share_is_told_by_the_others(tmp_path):
    data = avif()
    assert data[8:12] == b"avif" and b"mif1" in data[16:32]
    assert corners(save(tmp_path, data[:8] + b"mif1" + data[12:])) == UPRIGHT
    data = (SAMPLES / "plain.heic").read_bytes()
    assert data[8:12] == b"heic"
    assert corners(save(tmp_path, data[:8] + b"miaf" + data[12:])) == UPRIGHT


@pytest.mark.parametrize("name", ["plain.heic", "plain.jxl"])
def test_phone_pictures_are_refused_by_their_header(name):
    if name.endswith(".jxl") and find_spec("pillow_jxl") is None:
        pytest.skip("pillow-jxl-plugin is absent")
    for function in (decode, images.read_size):
        status = status_of(SAMPLES / name, function, max_pixels=64 * 48 - 1)
        assert status == ImageStatus.TOO_LARGE


@reads_jxl
def test_the_size_of_a_jpeg_xl_is_known_without_decoding(tmp_path):
    random = np.random.default_rng(0)
    sizes = [(8, 8), (256, 256), (160, 120), (320, 180), (1, 1), (600, 7), (40, 24), (20, 10)]
    sizes += [tuple(map(int, random.integers(1, 1200, 2))) for _ in range(20)]
    for size in sizes:
        for boxes in (False, True):
            data = encoded(Image.new("L", size), "JXL", effort=1, use_container=boxes)
            assert pixels(save(tmp_path, data)).shape[1::-1] == size


def test_jpeg_xl_without_its_plugin_says_what_to_install(monkeypatch):
    monkeypatch.setattr(formats, "READS_JXL", False)
    with pytest.raises(ImageError, match=r"^not_an_image: is JPEG XL, .*cdul-steps\[jxl\]"):
        decode(SAMPLES / "plain.jxl")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"%PDF-1.7", "is PDF, not JPEG"),
        (b"<!doctype html><html>", "is a web page, not"),
        (b'<?xml version="1.0"?>\n<svg xmlns="x">', "is SVG, not"),
        (b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer, not"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "is a film"),
        (bytes(4096), "is zeros only, not"),
        (b"?", "not_an_image: not JPEG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "truncated: is HEIC, but"),
        (b"\xff\xd8\xff", "truncated: is JPEG, but"),
    ],
)
def test_a_refusal_says_what_the_file_is(tmp_path, data, words):
    with pytest.raises(ImageError) as caught:
        decode(save(tmp_path, data))
    assert words in str(caught.value)


# --------------------------------------------------------------------------------- JPEG


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))


SCANS = [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"optimize": True}]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", SCANS, ids=str)
def test_a_jpeg_cut_and_given_an_end_marker_is_refused(tmp_path, mode, options):
    data = encoded(noise().convert(mode), "JPEG", **options)
    start = data.index(b"\xff\xda") + 20
    for share in (0.0, 0.3, 0.9):
        cut = data[: int(start + share * (len(data) - start))]
        assert status_of(save(tmp_path, cut + b"\xff\xd9")) == ImageStatus.TRUNCATED


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", SCANS, ids=str)
@pytest.mark.parametrize("lost", [1, 2])
def test_a_jpeg_that_lacks_only_its_end_marker_is_whole(tmp_path, mode, options, lost):
    data = encoded(noise().convert(mode), "JPEG", **options)
    whole = pixels(save(tmp_path, data))
    assert np.array_equal(pixels(save(tmp_path, data[:-lost])), whole)
    assert status_of(save(tmp_path, data[: -lost - 40])) == ImageStatus.TRUNCATED


def scan_ends(data: bytes) -> list[int]:
    """Where each scan of a progressive JPEG ends: at the next marker outside of it."""
    starts = [start for start, _ in formats.scans(data)]
    return [next(i for i in range(s, len(data)) if data[i] == 255 and data[i + 1]) for s in starts]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("end", [b"\xff\xd9", b""])
def test_a_progressive_jpeg_cut_between_two_scans_is_refused(tmp_path, mode, end):
    data = encoded(noise().convert(mode), "JPEG", progressive=True)
    *ends, last = scan_ends(data)
    assert len(ends) > 4 and last == len(data) - 2
    for place in ends:
        for more in range(5):
            path = save(tmp_path, data[: place + more] + end)
            assert status_of(path) == ImageStatus.TRUNCATED


def test_a_jpeg_with_noise_inside_is_refused(tmp_path):
    data = encoded(noise(), "JPEG")
    middle = len(data) // 2
    junk = np.random.default_rng(1).bytes(512).replace(b"\xff", b"\0")
    damaged = data[:middle] + junk + data[middle + len(junk) :]
    assert status_of(save(tmp_path, damaged)) == ImageStatus.TRUNCATED


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("place", np.linspace(0.05, 0.9, 9).round(2))
def test_a_jpeg_with_a_hole_is_refused(tmp_path, mode, place):
    data = encoded(picture(400, 300).convert(mode), "JPEG", quality=90)
    start = data.index(b"\xff\xda") + 20
    hole = start + int(place * (len(data) - start - 66))
    damaged = data[:hole] + bytes(64) + data[hole + 64 :]
    assert status_of(save(tmp_path, damaged)) == ImageStatus.TRUNCATED


def test_zeros_in_a_healthy_jpeg_are_no_hole(tmp_path):
    """Outside the pixels, or where the codes of a plain picture are zeros."""
    exif = Image.Exif()
    exif[0x927C] = bytes(500)
    plain = Image.new("RGB", (2000, 1000), RED)
    for options in ({"exif": exif}, {"optimize": True}, {"comment": bytes(300)}):
        data = encoded(plain, "JPEG", **options)
        assert bytes(64) in data, options
        assert pixels(save(tmp_path, data + bytes(1000))).shape == (1000, 2000, 3)


@pytest.mark.parametrize("options", [{"optimize": True}, {"progressive": True}])
def test_the_codes_of_a_thumbnail_are_not_those_of_the_picture(tmp_path, options):
    """With codes of its own, plain areas of a picture are zeros."""
    thumbnail = encoded(picture(160, 120), "JPEG")
    data = encoded(plain_but_for_a_corner(), "JPEG", exif=b"Exif\0\0" + thumbnail, **options)
    assert bytes(64) in data and thumbnail in data
    assert pixels(save(tmp_path, data)).shape == (1200, 1600, 3)


def plain_but_for_a_corner() -> Image.Image:
    plain = Image.new("RGB", (1600, 1200), "white")
    plain.paste(picture(400, 300), (500, 400))
    return plain


@pytest.mark.parametrize("padding", [b"\0", b"\0" * 300, b"ab", b"\xff\xff"])
@pytest.mark.parametrize("end", [b"\xff\xd9", b"\xff", b""], ids=["ended", "half ended", "no end"])
def test_padding_before_the_end_of_a_jpeg_is_no_damage(tmp_path, padding, end):
    data = encoded(noise(), "JPEG")
    padded = save(tmp_path, data[:-2] + padding + end, "padded")
    assert np.array_equal(pixels(padded), pixels(save(tmp_path, data)))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [*SCANS, {"subsampling": "4:2:0"}, {"keep_rgb": True}], ids=str)
def test_both_decoders_of_jpeg_give_the_same(tmp_path, mode, options):
    if mode != "RGB" and not SCANS.count(options):
        pytest.skip("RGB only")
    data = encoded(noise().convert(mode), "JPEG", **options)
    image = Image.open(BytesIO(data))
    found = formats.decode_jpeg(data, image.mode, image.size)
    assert (found.mode, found.tobytes()) == (image.mode, image.tobytes())


def test_a_jpeg_out_of_memory_is_too_large(tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(simplejpeg, "decode_jpeg", fail)
    assert status_of(save(tmp_path, encoded(noise(), "JPEG"))) == ImageStatus.TOO_LARGE


# ---------------------------------------------------------------------------------- PNG

IMAGE_DATA = (b"IDAT", zlib.compress(b"\0\1\2\3" + b"\0\4\5\6"))
HEADER = (b"IHDR", struct.pack(">IIBBBBB", 3, 2, 8, 0, 0, 0, 0))
LONG = zlib.compress(bytes(1 << 21))
SIDE = {
    "zTXt": (b"zTXt", b"Comment\0\0" + LONG),
    "iTXt": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG),
    "tEXt": (b"tEXt", b"Comment\0" + bytes(1 << 21)),
    "profile": (b"iCCP", b"icc\0\0" + LONG),
    "exif": (b"zTXt", b"Raw profile type exif\0\0" + LONG),
    "no text": (b"zTXt", b"Comment"),
    "no profile": (b"iCCP", b"icc"),
    "time": (b"tIME", b""),
}


@pytest.mark.parametrize("name", SIDE)
@pytest.mark.parametrize("wrong", [False, True], ids=["healthy", "wrong checksum"])
@pytest.mark.parametrize("after", [False, True], ids=["before the pixels", "after them"])
def test_side_data_of_a_png_do_not_matter(tmp_path, name, wrong, after):
    chunks = [HEADER, IMAGE_DATA]
    chunks.insert(1 + after, SIDE[name])
    data = png(*chunks, (b"IEND", b""))
    if wrong:
        kind, body = SIDE[name]
        checksum = zlib.crc32(kind + body).to_bytes(4)
        assert data.count(checksum) == 1
        data = data.replace(checksum, bytes(4))
    assert pixels(save(tmp_path, data))[..., 0].tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE"])
def test_a_png_whose_picture_is_damaged_is_refused(tmp_path, kind):
    data = encoded(picture().convert("P"), "PNG")
    place = data.index(kind) + 4
    damaged = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    assert status_of(save(tmp_path, damaged)) == ImageStatus.TRUNCATED


def test_a_damaged_transparency_counts_as_none(tmp_path):
    data = encoded(Image.new("P", (2, 2), 0), "PNG", transparency=0)
    place = data.index(b"tRNS") + 5
    assert pixels(save(tmp_path, data)).min() == 255
    damaged = save(tmp_path, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    assert pixels(damaged).max() == 0


# ------------------------------------------------------------------------- TIFF, GIF, BMP


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK"])
def test_tiff_planes_of_16_bits(tmp_path, order, mode):
    image = picture(32, 20).convert(mode)
    planes = np.moveaxis(np.asarray(image), 2, 0).astype(f"{order}u2") * 257
    count = len(planes)
    extra = {338: [2]} if mode == "RGBA" else {}
    tags = {256: [32], 257: [20], 258: [16] * count, 259: [1], 262: [5 if mode == "CMYK" else 2]}
    tags |= {277: [count], 278: [7], 284: [2], **extra}
    path = save(tmp_path, tiff_of(order, tags, [p.tobytes() for p in planes]))
    assert np.array_equal(pixels(path), np.asarray(image.convert("RGB")))


def tiff_of(order: str, tags: dict[int, list[int]], planes: list[bytes]) -> bytes:
    """A TIFF with its planes in strips of seven rows of `tags[256]` numbers of 16 bits."""
    step = 7 * tags[256][0] * 2
    strips = [plane[i : i + step] for plane in planes for i in range(0, len(plane), step)]
    tags = {**tags, 273: [0] * len(strips), 279: [len(strip) for strip in strips]}
    begin = 8 + 2 + 12 * len(tags) + 4
    begin += sum(4 * len(v) for v in tags.values() if len(v) > 1)
    for i, strip in enumerate(strips):
        tags[273][i] = begin + sum(map(len, strips[:i]))
        assert len(strip) % 2 == 0
    entries, values, place = b"", b"", 8 + 2 + 12 * len(tags) + 4
    for tag, numbers in sorted(tags.items()):
        body = struct.pack(f"{order}{len(numbers)}I", *numbers)
        entries += struct.pack(f"{order}HHI", tag, 4, len(numbers))
        entries += body if len(numbers) == 1 else struct.pack(f"{order}I", place + len(values))
        values += body if len(numbers) > 1 else b""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    return head + entries + bytes(4) + values + b"".join(strips)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("white", [1, 0])
def test_12_bits_of_either_order(tmp_path, order, white):
    packed = int("".join(f"{value:012b}" for value in (0, 16, 2048, 4095)), 2).to_bytes(6, "big")
    data = tiff(12, packed, 4, photometric=white)
    path = save(tmp_path, data if order == "<" else swapped(data, len(packed)))
    expected = [0, 1, 128, 255]
    assert pixels(path)[0, :, 0].tolist() == [v if white else 255 - v for v in expected]


def swapped(data: bytes, tail: int) -> bytes:
    """A little-endian TIFF of `pictures.tiff`, written big-endian."""
    offset, count = struct.unpack("<IH", data[4:10])
    entries = [struct.unpack("<HHII", data[10 + 12 * i : 22 + 12 * i]) for i in range(count)]
    head = b"MM\0*" + struct.pack(">IH", offset, count)
    packed = [struct.pack(">HHI", *e[:3]) + struct.pack(">HH", e[3], 0) for e in entries]
    return head + b"".join(packed) + bytes(4) + data[-tail:]


@pytest.mark.parametrize("values", [np.float32([[-1, 0, 1]]), np.int32([[-70000, 0, 70000]])])
def test_big_endian_numbers_of_32_bits_that_are_packed(tmp_path, values):
    data = zlib.compress(values.astype(values.dtype.newbyteorder(">")).tobytes())
    data += bytes(len(data) % 2)
    tags = {256: [3], 257: [1], 258: [32], 259: [8], 262: [1], 277: [1], 278: [1]}
    tags |= {339: [3 if values.dtype.kind == "f" else 2]}
    place = 8 + 2 + 12 * (len(tags) + 2) + 4
    tags |= {273: [place], 279: [len(data)]}
    entries = b"".join(struct.pack(">HHII", t, 4, 1, v[0]) for t, v in sorted(tags.items()))
    head = b"MM\0*" + struct.pack(">IH", 8, len(tags))
    path = save(tmp_path, head + entries + bytes(4) + data)
    assert pixels(path)[0, :, 0].tolist() == [0, 128, 255]


def test_a_colour_map_of_8_bit_values(tmp_path):
    image = picture().convert("P")
    expected = pixels(save(tmp_path, encoded(image, "TIFF")))
    assert expected.max() > 100
    data = bytearray(encoded(image, "TIFF"))
    entries = struct.unpack("<H", data[8:10])[0]
    places = range(10, 10 + 12 * entries, 12)
    place = next(p for p in places if struct.unpack("<H", data[p : p + 2])[0] == 320)
    count, start = struct.unpack("<II", data[place + 4 : place + 12])
    colours = struct.unpack(f"<{count}H", data[start : start + 2 * count])
    data[start : start + 2 * count] = struct.pack(f"<{count}H", *(c // 256 for c in colours))
    assert np.array_equal(pixels(save(tmp_path, bytes(data))), expected)


@pytest.mark.parametrize("transparency", [None, 1])
def test_what_the_first_frame_of_a_gif_does_not_cover_is_white(tmp_path, transparency):
    frame = Image.new("P", (4, 4), 0)
    frame.putpalette([255, 0, 0, 0, 0, 255])
    frame.putpixel((3, 3), 1)
    options = {} if transparency is None else {"transparency": transparency}
    data = bytearray(encoded(frame, "GIF", **options))
    data[6:10] = struct.pack("<2H", 10, 8)
    place = data.index(b"," + struct.pack("<4H", 0, 0, 4, 4))
    data[place + 1 : place + 5] = struct.pack("<2H", 2, 3)
    expected = np.full((8, 10, 3), 255)
    expected[3:7, 2:6] = RED
    expected[6, 5] = (0, 0, 255) if transparency is None else 255
    assert np.array_equal(pixels(save(tmp_path, bytes(data))), expected)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_what_the_first_frame_of_a_webp_does_not_cover_is_white(tmp_path, mode):
    frame = encoded(Image.new(mode, (16, 12), RED), "WEBP", lossless=True)[12:]
    if frame.startswith(b"VP8X"):
        frame = frame[18:]
    numbers = b"".join(n.to_bytes(3, "little") for n in (2, 3, 15, 11, 100))
    canvas = b"".join(n.to_bytes(3, "little") for n in (39, 29))
    chunks = [
        (b"VP8X", bytes([2 + 16 * (mode == "RGBA"), 0, 0, 0]) + canvas),
        (b"ICCP", b"odd"),
        (b"ANIM", bytes(6)),
        (b"ANMF", numbers + b"\0" + frame),
    ]
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for kind, data in chunks
    )
    path = save(tmp_path, b"RIFF" + struct.pack("<I", len(body)) + body)
    expected = np.full((30, 40, 3), 255)
    expected[6:18, 4:20] = RED
    assert np.array_equal(pixels(path), expected)


def bmp(bits: int, rows: bytes, width: int, height: int) -> bytes:
    """A BMP with run-length codes; colour i is grey of 10 i."""
    colours = b"".join(bytes([10 * i] * 3 + [0]) for i in range(16))
    place = 14 + 40 + len(colours)
    sizes = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 3 - bits // 4, 0, 1, 1, 16, 0)
    return b"BM" + struct.pack("<IHHI", place + len(rows), 0, 0, place) + sizes + colours + rows


@pytest.mark.parametrize(
    ("bits", "rows", "expected"),
    [
        (4, "0612 0000 0634 0001", [[3, 4, 3, 4, 3], [1, 2, 1, 2, 1]]),
        (4, "0006 1234 5600 0000 0634 0001", [[3, 4, 3, 4, 3], [1, 2, 3, 4, 5]]),
        (4, "0512 0000 0005 1234 5000 0001", [[1, 2, 3, 4, 5], [1, 2, 1, 2, 1]]),
        (4, "0211 0002 0100 0233 0000 0544 0001", [[4, 4, 4, 4, 4], [1, 1, 0, 3, 3]]),
        (8, "0601 0000 0502 0001", [[2, 2, 2, 2, 2], [1, 1, 1, 1, 1]]),
        (8, "0007 0102 0304 0506 0700 0000 0502 0001", [[2, 2, 2, 2, 2], [1, 2, 3, 4, 5]]),
        (8, "0301 0000 0502 0001", [[2, 2, 2, 2, 2], [1, 1, 1, 0, 0]]),
    ],
)
def test_runs_of_a_bmp(tmp_path, bits, rows, expected):
    found = pixels(save(tmp_path, bmp(bits, bytes.fromhex(rows), 5, 2)))
    assert (found[..., 0] // 10).tolist() == expected


@pytest.mark.parametrize("rows", ["0512 0000 05", "0512 0000", "0005 12", "0512 0001"])
def test_runs_of_a_bmp_that_end_early(tmp_path, rows):
    path = save(tmp_path, bmp(4, bytes.fromhex(rows), 5, 2))
    assert status_of(path) == ImageStatus.TRUNCATED


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_orientation_in_xmp_alone_is_not_applied(tmp_path, kind):
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    options = {"xmp": xmp}
    if kind == "PNG":
        options = {"pnginfo": PngInfo()}
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp.decode())
    elif kind == "TIFF":
        options = {"tiffinfo": {700: xmp}}
    path = save(tmp_path, encoded(picture(), kind, **options))
    assert Image.open(path).getexif()[0x0112] == 6
    assert pixels(path).shape == (32, 48, 3)


# ------------------------------------------------------------------------------ profiles

SRGB = [(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)]
PROPHOTO = [(0.7977, 0.2880, 0), (0.1352, 0.7119, 0), (0.0313, 0.0001, 0.8249)]


def icc(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(80)
    tags = {b"wtpt": white, b"desc": text, b"cprt": b"text\0\0\0\0x\0\0\0", **tags}
    head, body = bytearray(128), b""
    head[8:12], head[36:40], head[68:80] = b"\2\x40\0\0", b"acsp", white[8:]
    head[12:20] = (b"prtr" if space == b"CMYK" else b"mntr") + space
    head[20:24] = b"Lab " if space == b"CMYK" else b"XYZ "
    table, place = struct.pack(">I", len(tags)), 132 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", place + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    head[:4] = struct.pack(">I", place + len(body))
    return bytes(head) + table + body


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256)) + bytes(2)


def rgb_profile(primaries: list[tuple[float, ...]], power: float) -> bytes:
    tags = {}
    for name, colour in zip("rgb", primaries, strict=True):
        numbers = struct.pack(">3i", *(round(v * 65536) for v in colour))
        tags[f"{name}XYZ".encode()] = b"XYZ \0\0\0\0" + numbers
        tags[f"{name}TRC".encode()] = gamma(power)
    return icc(b"RGB ", tags)


def ink_profile() -> bytes:
    """The profile of a press whose inks are mid grey, and black if all are used."""
    lightness = [255, *[128] * 14, 0]
    corners = b"".join(bytes([level, 128, 128]) for level in lightness)
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix
    ramp = bytes(range(256))
    return icc(b"CMYK", {b"A2B0": table + ramp * 4 + corners + ramp * 3})


def own_srgb() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_a_profile_is_converted_to_srgb(tmp_path, kind):
    image = Image.new("RGB", (16, 16), (55, 120, 200))
    profile = rgb_profile(SRGB, 1)
    options = {"quality": 100} if kind in ("JPEG", "WEBP", "AVIF") else {}
    found = pixels(save(tmp_path, encoded(image, kind, icc_profile=profile, **options)))[8, 8]
    # The definition of sRGB, from light to pixel value.
    light = np.array([55, 120, 200]) / 255
    expected = 255 * (1.055 * light ** (1 / 2.4) - 0.055)
    assert np.abs(found - expected).max() <= (6 if options else 2)


@pytest.mark.parametrize(
    "profile",
    [own_srgb(), b"no profile" * 30, b"", ink_profile(), icc(b"GRAY", {b"kTRC": gamma(1)})],
    ids=["sRGB", "junk", "none", "of ink", "of grey"],
)
def test_pixels_stay_to_the_bit_where_a_profile_says_nothing_else(tmp_path, profile):
    path = save(tmp_path, encoded(noise(), "PNG", icc_profile=profile))
    assert np.array_equal(pixels(path), np.asarray(noise()))


def test_a_profile_does_not_touch_transparency(tmp_path):
    image = Image.new("RGBA", (2, 1), (100, 100, 100, 128))
    image.putpixel((1, 0), (100, 100, 100, 0))
    path = save(tmp_path, encoded(image, "PNG", icc_profile=rgb_profile(SRGB, 1)))
    level = 255 * (1.055 * (100 / 255) ** (1 / 2.4) - 0.055)
    half = level * 128 / 255 + 127
    assert np.abs(pixels(path)[0, :, 0] - [half, 255]).max() <= 2


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_a_grey_profile(tmp_path, mode):
    image = Image.new("L", (2, 2), 55)
    image = Image.new("I;16", (2, 2), 55 * 257) if mode == "I;16" else image.convert(mode)
    profile = icc(b"GRAY", {b"kTRC": gamma(1)})
    path = save(tmp_path, encoded(image, "PNG", icc_profile=profile))
    expected = 255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055)
    assert np.abs(pixels(path) - expected).max() <= 2


def test_a_palette_with_a_profile(tmp_path):
    image = Image.new("P", (2, 2), 0)
    image.putpalette([0, 0, 255])
    path = save(tmp_path, encoded(image, "PNG", icc_profile=rgb_profile(PROPHOTO, 1.8)))
    assert np.array_equal(pixels(path)[0, 0], [0, 0, 255]) or pixels(path)[0, 0, 0] > 0


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_a_profile_of_ink(tmp_path, kind):
    image = Image.new("CMYK", (16, 16), (0, 0, 255, 0))
    found = pixels(save(tmp_path, encoded(image, kind, icc_profile=ink_profile())))
    assert np.ptp(found.reshape(-1, 3)) <= 2 and 100 < found.mean() < 140
