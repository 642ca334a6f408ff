"""Formats of image files, and fixes for files that Pillow alone would decode incorrectly.

Nothing here opens a file: `images` does, and uses this module to identify the bytes.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO
from typing import BinaryIO, cast

import numpy as np
import pi_heif.options
import simplejpeg
from PIL import BmpImagePlugin, Image, ImageFile, ImageOps, ImagePalette, TiffImagePlugin

try:
    from pillow_jxl import JpegXLImagePlugin
except ImportError:  # an optional extra, because its licence is the GPL
    JpegXLImagePlugin = None

HEAD = 512
"""Bytes at the start of a file that identify its format."""
NAMES = {
    "JPEG": "JPEG",
    "PNG": "PNG",
    "WEBP": "WebP",
    "BMP": "BMP",
    "TIFF": "TIFF",
    "GIF": "GIF",
    "HEIF": "HEIC",
    "AVIF": "AVIF",
    "JXL": "JPEG XL",
}
"""The formats that can be read: Pillow's names, and names for messages."""
_SIGNATURES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF....WEBP",
    "BMP": rb"BM(?:.{12}[\x0c\x10(48@lx|]\0\0\0|.{0,15}\Z)",
    "TIFF": rb"II(?:[*+]\0|\0\*)|MM(?:\0[*+]|\*\0)",
    "GIF": rb"GIF8[79]a",
    "JXL": rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n",
}
_HEIF_BRANDS = {
    *(b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"),
    *(b"mif1", b"mif2", b"msf1", b"miaf", b"MiHE", b"MiHB"),
}
_AVIF_BRANDS = {b"avif", b"avis"}
_OTHERS = {
    "PDF": rb"%PDF",
    "a Photoshop file": rb"8BPS",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "SVG": rb"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)?(?:<!DOCTYPE svg[^>]*>\s*)?<svg",
    "a web page": rb"\s*<(?:!DOCTYPE html|html|head|body)",
    "a ZIP archive": rb"PK\x03\x04",
    "a gzip archive": rb"\x1f\x8b",
    "an icon": rb"\0\0[\x01\x02]\0",
    "a Git LFS pointer": rb"version https://git-lfs",
    "a film or another kind of ISO media": rb"....ftyp",
    "zeros only": rb"\x00{32}",
}


def format_of(head: bytes) -> str | None:
    """The format, a key of NAMES, of a file that begins with `head`; None for other files."""
    if head[4:8] == b"ftyp":
        end = min(int.from_bytes(head[:4]), len(head))
        brands = {head[8:12], *(head[place : place + 4] for place in range(16, end, 4))}
        return "AVIF" if brands & _AVIF_BRANDS else "HEIF" if brands & _HEIF_BRANDS else None
    for name, signature in _SIGNATURES.items():
        if re.match(signature, head, re.DOTALL):
            return name
    return None


def other_format(head: bytes) -> str | None:
    """A description of another kind of file that begins with `head`, if it is recognised."""
    for name, signature in _OTHERS.items():
        if re.match(signature, head, re.DOTALL | re.IGNORECASE):
            return name
    return None


# Embedded pictures that are not needed; damage in them would count as damage to the image.
pi_heif.options.THUMBNAILS = pi_heif.options.DEPTH_IMAGES = pi_heif.options.AUX_IMAGES = False

# ---------------------------------------------------------------------------------------- JPEG

_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
_END = b"\xff\xd9"
_HARMLESS = re.compile("Corrupt JPEG data: bad ICC|(\\d+) extraneous bytes before marker 0xd9")
_FEW = 2
_TABLES, _SCAN = b"\xc4", b"\xda"
_HOLE = bytes(64)
_USUAL_CODE = bytes.fromhex("100002010303020403050504040000017d")
"""Code lengths of the JPEG standard's luminance table; with it, 00 never ends a block."""
_COLOURS = {"RGB": ("RGBX", "RGBX"), "L": ("GRAY", "L"), "CMYK": ("CMYK", "CMYK;I")}


def decode_jpeg(data: bytes, mode: str, size: tuple[int, int]) -> Image.Image | None:
    """Decode a JPEG whose header states `mode` and `size`; None if only Pillow can.

    Both use libjpeg-turbo and give the same pixels, but Pillow does not report its warnings, and
    fills damaged or missing parts with grey. An image that lacks only its end marker is complete.

    Raises ValueError for a damaged image.
    """
    if mode not in _COLOURS:
        return None
    colour, raw = _COLOURS[mode]
    try:
        pixels, is_ended = simplejpeg.decode_jpeg(data, colour), True
    except ValueError as error:
        warning = str(error)
        if not warning.startswith(("Premature end", "Corrupt JPEG data")):
            return None
        if is_ended := not warning.startswith("Premature end of JPEG file"):
            if not _is_harmless(warning, data):
                raise
        else:
            data += _END[data.endswith(b"\xff") :]
        pixels = _decode_padded(data, colour)
    if _has_hole(data):
        raise ValueError("part of it was replaced by zeros")
    first, _ = next(scans(data), (len(data), b""))
    is_progressive = data.find(b"\xff\xc2", 0, first) >= 0  # the search of all data is slow
    if is_progressive and _is_unfinished(data, is_ended):
        raise ValueError("its last scans are missing")
    if pixels.shape[1::-1] != size:
        raise ValueError(f"its header states {size} pixels, its data has {pixels.shape[1::-1]}")
    image = Image.new(mode, size, None)  # not filled, as Image.frombytes would
    image.frombytes(pixels, "raw", raw, 0, 1)
    return image


def _decode_padded(data: bytes, colour: str) -> np.ndarray:
    try:
        return simplejpeg.decode_jpeg(data, colour)
    except ValueError as error:
        if not _is_harmless(str(error), data):
            raise
        return simplejpeg.decode_jpeg(data, colour, strict=False)


def _is_harmless(warning: str, data: bytes) -> bool:
    """Whether the image is complete despite libjpeg's warning: some cameras pad the end."""
    found = _HARMLESS.search(warning)
    if not found or not found[1]:
        return bool(found)
    padding = int(found[1])
    return padding <= _FEW or bytes(padding) + b"\xff\xd9" in data


def _has_hole(data: bytes) -> bool:
    """Whether there is a run of zeros that no encoder writes, as after the loss of a disk block.

    Only detected for the usual codes: with others, a plain area may be all zeros.
    """
    if _HOLE not in data:
        return False
    # A thumbnail in the EXIF data may have the usual codes when the picture has not.
    is_usual = False
    for kind, start, end in _segments(data):
        if kind == _TABLES and _USUAL_CODE in data[start:end]:
            is_usual = True
        if kind == _SCAN:
            # Zeros up to the end marker are padding.
            picture = data[end : data.find(b"\xff\xd9", end)].rstrip(b"\0")
            return is_usual and _HOLE in picture
    return False


def _segments(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The marker of each segment of a JPEG, and where its content starts and ends."""
    place = 2
    while (marker := _MARKER.search(data, place)) and marker[1] != b"\xd9":
        start = marker.end()
        place = start + int.from_bytes(data[start : start + 2])
        yield marker[1], start + 2, place


def scans(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The offset of the codes of each scan of a JPEG, and the scan's header."""
    return ((end, data[start:end]) for kind, start, end in _segments(data) if kind == _SCAN)


def _is_unfinished(data: bytes, is_ended: bool) -> bool:
    """Whether a progressive JPEG lacks scans: bits or, if it has no end marker, coefficients."""
    lowest: dict[int, list[int | None]] = {}
    for _, header in scans(data):
        *components, first, last, bits = header[1:]
        for component in components[::2]:
            numbers = lowest.setdefault(component, [None] * 64)
            numbers[first : last + 1] = [bits & 15] * (last + 1 - first)
    found = {bits for numbers in lowest.values() for bits in numbers}
    return bool(found - {0, None}) or (not is_ended and None in found)


# ----------------------------------------------------------------------------------------- PNG

_TEXT_LIMIT = 1 << 20
_PROFILE_LIMIT = 1 << 23
_EXIF_TEXT = (b"Raw profile type exif\0", b"Raw profile type APP1\0")


def plain_png(file: BinaryIO, *, whole: bool) -> tuple[BytesIO, bytes | None]:
    """The chunks of a PNG that make up its picture, and its colour profile.

    Pillow rejects an intact image because of the size or checksum of a text chunk. Without `whole`
    the pixels are left out. Damaged ancillary data is ignored, as viewers do.
    """
    kept, profile = BytesIO(), None
    kept.write(file.read(8))
    seen, colours, bits = False, 0, 0
    while len(start := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", start)
        if kind == b"IDAT" and not whole:
            kept.write(start)
            break
        if kind == b"IEND" or (seen and kind != b"IDAT"):
            break
        seen = seen or kind == b"IDAT"
        is_critical = kind[:1].isupper()
        if not is_critical and kind not in (b"tRNS", b"eXIf", b"iCCP", b"tEXt", b"zTXt"):
            file.seek(length + 4, 1)
            continue
        body, checksum = file.read(length), file.read(4)
        if kind == b"IHDR":
            bits, colours = body[8:10]
        if is_critical:
            kept.write(start + body + checksum)
        elif zlib.crc32(kind + body).to_bytes(4) != checksum:
            continue
        elif kind == b"iCCP":
            profile = _inflated(body.partition(b"\0")[2][1:], _PROFILE_LIMIT)
        elif kind == b"tRNS":
            body = _in_8_bits(body, colours, bits)
            kept.write(start + body + zlib.crc32(kind + body).to_bytes(4))
        elif kind == b"eXIf" or _is_exif_text(kind, body):
            kept.write(start + body + checksum)
    if seen:
        kept.write(struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND")))
    kept.seek(0)
    return kept, profile


_IN_8_BITS: dict[tuple[int, int], Callable[[int], int]] = {
    (0, 2): lambda level: level % 4 * 85,
    (0, 4): lambda level: level % 16 * 17,
    (2, 16): lambda level: level >> 8,
}
"""What Pillow makes of the levels of a PNG's pixels, by colour type (0: grey, 2: RGB) and bits."""


def _in_8_bits(colour: bytes, kind: int, bits: int) -> bytes:
    """The transparent colour of a PNG in the levels of the pixels that Pillow decodes.

    Pillow compares these with the unchanged colour.
    """
    change = _IN_8_BITS.get((kind, bits))
    if change is None:
        return colour
    levels = [
        change(level) for (level,) in struct.iter_unpack(">H", colour[: len(colour) // 2 * 2])
    ]
    return struct.pack(f">{len(levels)}H", *levels)


def _is_exif_text(kind: bytes, body: bytes) -> bool:
    if not body.startswith(_EXIF_TEXT) or len(body) > _TEXT_LIMIT:
        return False
    return kind == b"tEXt" or _inflated(body.partition(b"\0")[2][1:], _TEXT_LIMIT) is not None


def _inflated(packed: bytes, limit: int) -> bytes | None:
    """Data decompressed with zlib; None if it is damaged or larger than `limit`."""
    unpacker = zlib.decompressobj()
    with suppress(zlib.error):
        found = unpacker.decompress(packed, limit)
        if unpacker.eof:
            return found
    return None


# ---------------------------------------------------------------------------------------- TIFF

_COLOUR_MAP, _BITS, _PLANES, _EXTRA = 320, 258, 284, 338

# The layout of the bits depends neither on the byte order nor on whether zero is white.
for _order in (b"II", b"MM"):
    for _white in (0, 1):
        TiffImagePlugin.OPEN_INFO.setdefault((_order, _white, (1,), 1, (12,), ()), ("I;16", "I;12"))
TiffImagePlugin.OPEN_INFO.setdefault((b"MM", 1, (1,), 1, (32,), ()), ("I", "I;32B"))


def _arguments(tile: ImageFile._Tile) -> tuple:
    """The arguments of a TIFF decoder."""
    assert isinstance(tile.args, tuple)
    return tile.args


def mend_tiff(image: ImageFile.ImageFile) -> None:
    """Make Pillow decode an opened TIFF correctly.

    Uncompressed separate planes of 16 bits are also decoded by libtiff; libtiff's output has the
    machine's byte order; and a colour map may contain 8-bit values.
    """
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    tags, tile = image.tag_v2, image.tile[0]
    if tile.codec_name == "raw" and tags.get(_PLANES) == 2 and max(tags.get(_BITS, (1,))) > 8:
        # A single plane is the same as interleaved samples.
        mode = _arguments(tile)[0] if len(tags[_BITS]) == 1 else f"{image.mode};16N"
        if tags.get(_EXTRA) == (1,):
            mode = mode.replace("RGBA", "RGBa")
        area = (0, 0, *image._tile_size)
        tile = ImageFile._Tile("libtiff", area, 0, (mode, False, tags.offset))
        image.use_load_libtiff = True
    if tile.codec_name == "libtiff":
        mode, *others = _arguments(tile)
        native = re.sub(r"(;16|;32)B(?=[SF]?$)", r"\1N", mode)
        image.tile = [tile._replace(args=(native, *others))]
    colours = tags.get(_COLOUR_MAP)
    if image.mode == "P" and colours and max(colours) < 256:
        image.palette = ImagePalette.raw("RGB;L", bytes(colours))


# --------------------------------------------------------------------------------- animations


def first_frame(image: ImageFile.ImageFile, file: BinaryIO) -> tuple[int, int, int, int] | None:
    """The box of an opened image that its first frame covers; None for the whole image."""
    if image.format == "GIF":
        return image.tile[0].extents
    if image.format != "WEBP" or image.mode != "RGB":  # with alpha, the rest is transparent
        return None
    file.seek(12)
    while len(start := file.read(8)) == 8:
        kind, size = struct.unpack("<4sI", start)
        if kind == b"ANMF":
            x, y, width, height = (int.from_bytes(file.read(3), "little") for _ in range(4))
            return 2 * x, 2 * y, 2 * x + width + 1, 2 * y + height + 1
        if kind in (b"VP8 ", b"VP8L"):
            return None
        file.seek(size + size % 2, 1)
    return None


# ----------------------------------------------------------------------------------------- BMP


_EARLY = "its run-length codes end too early"


class _BmpRuns(BmpImagePlugin.BmpRleDecoder):
    """Run-length codes of 4 or 8 bits; pixels beyond the end of a row are dropped."""

    def decode(self, buffer: object) -> tuple[int, int]:
        """Set the pixels; Pillow's own decoder shifts all rows after one that is too long."""
        width, height = self.state.xsize, self.state.ysize
        pixels = bytearray(width * height)
        x = y = 0
        while y < height:
            count, value = self._read(2)
            if count:
                pair = (value >> 4, value & 15) if self.args[1] else (value, value)
                codes = bytes((pair * count)[:count])
            elif value == 0:
                x, y = 0, y + 1
                continue
            elif value == 1:
                if y < height - 1 or x < width:
                    raise ValueError(_EARLY)
                break
            elif value == 2:
                right, down = self._read(2)
                x, y = x + right, y + down
                continue
            else:
                codes = self._read(-(-value // 2) if self.args[1] else value)
                self._read(len(codes) % 2)
                if self.args[1]:
                    codes = bytes(c for byte in codes for c in (byte >> 4, byte & 15))[:value]
            kept = codes[: max(0, width - x)]
            pixels[y * width + x : y * width + x + len(kept)] = kept
            x += len(codes)
        rawmode = "L" if self.mode in ("1", "L") else "P"
        self.set_as_raw(bytes(pixels), rawmode, (0, self.args[-1]))
        return -1, 0

    def _read(self, count: int) -> bytes:
        assert self.fd is not None
        found = self.fd.read(count)
        if len(found) < count:
            raise ValueError(_EARLY)
        return found


Image.register_decoder("bmp_rle", _BmpRuns)


# ------------------------------------------------------------------------------------- JPEG XL

READS_JXL = JpegXLImagePlugin is not None
if JpegXLImagePlugin:
    JpegXLImagePlugin.DECODE_THREADS = 0  # the processes of a run already use all cores


class JxlHeader(ImageFile.ImageFile):
    """The size of an upright JPEG XL; the plugin's own class decodes the image to open it."""

    format = "JXL"

    def _open(self) -> None:
        self._size, self._mode = jxl_size(cast(BinaryIO, self.fp)), "RGB"


def load_jxl(file: BinaryIO) -> Image.Image:
    """Decode a JPEG XL."""
    image = JpegXLImagePlugin.JXLImageFile(file)
    image.load()
    if not image.jpeg:
        return image
    image.info.pop("xmp", None)
    # For a recompressed JPEG, the plugin returns the original JPEG.
    return ImageOps.exif_transpose(image)


OPENERS = {"HEIF": pi_heif.HeifImageFile, "JXL": JxlHeader}
"""Formats that `Image.open` does not know, and the classes that open them."""


class _Bits:
    """Numbers of a JPEG XL header, least significant bit first."""

    def __init__(self, data: bytes) -> None:
        self.value, self.left = int.from_bytes(data, "little"), 8 * len(data)

    def __call__(self, count: int) -> int:
        if count > self.left:
            raise ValueError("its header is cut short")
        found = self.value & ((1 << count) - 1)
        self.value >>= count
        self.left -= count
        return found

    def length(self) -> int:
        return 1 + self((9, 13, 18, 30)[self(2)])


_RATIOS = ((1, 1), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def jxl_size(file: BinaryIO) -> tuple[int, int]:
    """(width, height) of an upright JPEG XL from its header; the plugin would decode the image.

    Raises ValueError for a damaged header.
    """
    bits = _Bits(_codestream(file)[2:])
    small = bits(1)
    height = 8 * (1 + bits(5)) if small else bits.length()
    if ratio := bits(3):
        over, under = _RATIOS[ratio]
        width = height * over // under
    else:
        width = 8 * (1 + bits(5)) if small else bits.length()
    is_turned = not bits(1) and bits(1) and bits(3) >= 4
    return (height, width) if is_turned else (width, height)


def _codestream(file: BinaryIO) -> bytes:
    """The first bytes of the compressed image, which may be inside container boxes."""
    file.seek(0)
    head = file.read(2)
    if head == b"\xff\x0a":
        return head + file.read(32)
    place = 0
    while True:
        file.seek(place)
        size, kind = struct.unpack(">I4s", file.read(8).ljust(8, b"\0"))
        start = 8
        if size == 1:
            size, start = int.from_bytes(file.read(8)), 16
        if kind in (b"jxlc", b"jxlp"):
            file.seek(4 * (kind == b"jxlp"), 1)
            return file.read(34)
        if size < start:
            raise ValueError("it has no box with an image")
        place += size
