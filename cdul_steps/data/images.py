"""Decoding of image files: the one place that turns a file into pixels.

What is read: JPEG, PNG, WebP, BMP, TIFF and GIF, told by content, never by the file's name.

How it becomes RGB, so that the pixels are those that an image viewer shows:

- EXIF orientation 1 to 8 is applied; an orientation that cannot be read counts as upright.
- Grey, palette, 1-bit, CMYK and YCbCr are converted; colour profiles are ignored.
- Transparency is composited on white.
- 12-bit and 16-bit integers are scaled to 8 bits; 32-bit integers and floats, which have no agreed
  white, are stretched from their smallest to their largest finite value (a constant image is
  black). A TIFF whose smallest value is white is inverted.
- Of an animation or a multi-page file the first frame is taken.

A file is decoded completely or refused: no half-grey truncated images. docs/images.md has the
policy in full.
"""

import ctypes
import errno
import logging
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from cdul_steps.limits import MAX_BYTES, MAX_PIXELS, MAX_SCANS

# Pillow warns about odd metadata of images that decode well. Once at import, since
# warnings.catch_warnings is not thread safe.
warnings.filterwarnings("ignore", module=r"PIL\.")
# What Pillow and libtiff have to say of a file, without its name, is in the exception too.
logging.getLogger("PIL").addHandler(logging.NullHandler())
with suppress(OSError, AttributeError):
    for _kind in ("Error", "Warning"):
        getattr(ctypes.CDLL(Image.core.__file__), f"TIFFSet{_kind}Handler")(None)

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_SIGNATURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|BM|II[*+]\0|MM\0[*+]|GIF8[79]a", re.DOTALL
)
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
_START_OF_SCAN, _END_OF_IMAGE = b"\xda", b"\xd9"
_ORIENTATION_TAG, _BITS_TAG, _PHOTOMETRIC_TAG = 0x0112, 0x0102, 0x0106
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)


class ImageStatus(StrEnum):
    """Why an image could not be read."""

    MISSING = "missing"
    UNREADABLE = "unreadable"  # no permission, input/output error, not a regular file
    NOT_AN_IMAGE = "not_an_image"
    TRUNCATED = "truncated"  # begins as an image, but is empty, cut short, damaged or unsupported
    TOO_LARGE = "too_large"


class ImageError(Exception):
    """An image that cannot be read: `status` is the kind, `detail` one line for people."""

    def __init__(self, status: ImageStatus, detail: str) -> None:
        super().__init__(status, detail)  # both as arguments, so that it can be pickled
        self.status = status
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.status}: {self.detail}"


def decode(path: str | PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file to a loaded 8-bit RGB image, upright, as the module describes.

    max_pixels: width times height above which an image is refused on the strength of its header;
    above MAX_PIXELS it has no effect.

    Raises ImageError, and no other exception, whatever the file holds.
    """
    with _opened(path, max_pixels) as image:
        orientation, size = _orientation_and_size(image)
        if isinstance(image, JpegImageFile):  # several pictures in one file have another format
            image.fp.seek(0)
            _check_scans(image.fp.read())
        image.load()
        rgb = _to_rgb(image)
        # Pillow turns a TIFF while loading it.
        if orientation in _TRANSPOSE and image.format != "TIFF":
            rgb = rgb.transpose(_TRANSPOSE[orientation])
        if rgb.size != size:  # views are cut by the header's size
            raise ValueError(f"its header says {size} pixels, its data {rgb.size}")
        rgb.info = {}  # an orientation left here would be applied a second time
        return rgb


def read_size(path: str | PathLike[str], *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) in pixels of what `decode` would return, from the header alone.

    Raises ImageError as `decode` does, for what the header shows.
    """
    with _opened(path, max_pixels) as image:
        return _orientation_and_size(image)[1]


@contextmanager
def _opened(path: str | PathLike[str], max_pixels: int) -> Iterator[ImageFile.ImageFile]:
    """Open an image; turn whatever goes wrong here or in the `with` block into an ImageError."""
    path = Path(path)
    head = b""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise ImageError(ImageStatus.UNREADABLE, "not a regular file")
        if status.st_size == 0:
            raise ImageError(ImageStatus.TRUNCATED, "the file is empty")
        if status.st_size > MAX_BYTES:
            raise ImageError(
                ImageStatus.TOO_LARGE, f"{status.st_size} bytes, more than the limit of {MAX_BYTES}"
            )
        with path.open("rb") as file:
            head = file.read(12)
            with Image.open(file, formats=_FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise ImageError(
                        ImageStatus.TOO_LARGE,
                        f"{width} x {height} pixels, more than the limit of {max_pixels}",
                    )
                yield image
    except ImageError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError(ImageStatus.MISSING, "no such file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(ImageStatus.TOO_LARGE, _one_line(error)) from error
    except MemoryError as error:
        raise ImageError(ImageStatus.TOO_LARGE, "not enough memory to decode it") from error
    # Decoders meet hostile bytes with exceptions of any type.
    except Exception as error:
        # Pillow's own OSErrors have no number; EINVAL is a seek to an offset that a file made up.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise ImageError(ImageStatus.UNREADABLE, error.strerror) from error
        if not _SIGNATURE.match(head):
            raise ImageError(
                ImageStatus.NOT_AN_IMAGE, f"not a {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} file"
            ) from error
        # Pillow's message for an unidentified image is the file object.
        unidentified = isinstance(error, UnidentifiedImageError)
        reason = "its header cannot be read" if unidentified else _one_line(error)
        raise ImageError(
            ImageStatus.TRUNCATED, f"cut short, damaged or unsupported: {reason}"
        ) from error


def _orientation_and_size(image: ImageFile.ImageFile) -> tuple[int, tuple[int, int]]:
    """EXIF orientation, and the size after it is applied. Decodes no pixels."""
    try:
        # The base class's, since the PNG plugin's decodes the image to look for later chunks.
        orientation = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except Exception:  # as in _opened; a damaged EXIF block does not make an image unreadable
        orientation = 1
    # Pillow has turned the size of a TIFF already, if the TIFF's own tag says so.
    size_is_turned = getattr(image, "tag_v2", {}).get(_ORIENTATION_TAG) in _SIDEWAYS
    if (orientation in _SIDEWAYS) != size_is_turned:
        return orientation, (image.height, image.width)
    return orientation, image.size


def _check_scans(data: bytes) -> None:
    """Raise ImageError for a JPEG of more than MAX_SCANS scans."""
    if data.count(b"\xff" + _START_OF_SCAN) <= MAX_SCANS:  # as good as always, and fast
        return
    scans, place = 0, 2
    while marker := _JPEG_MARKER.search(data, place):
        if marker[1] == _END_OF_IMAGE:
            return
        scans += marker[1] == _START_OF_SCAN
        if scans > MAX_SCANS:
            raise ImageError(ImageStatus.TOO_LARGE, f"more than the limit of {MAX_SCANS} scans")
        place = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])


def _to_rgb(image: Image.Image) -> Image.Image:
    tags = getattr(image, "tag_v2", {})
    values = None
    if image.mode.startswith("I;16"):
        white = 4095 if tags.get(_BITS_TAG) == (12,) else 65535
        values = np.asarray(image).astype(np.uint32)
        clear = values == image.info.get("transparency", -1)
        values = ((values * 255 + white // 2) // white).astype(np.uint8)
        values[clear] = 255
    elif image.mode in ("I", "F"):
        values = _stretch(np.asarray(image).astype(np.float64))
    if values is not None:
        # Pillow inverts 8-bit TIFFs only.
        image = Image.fromarray(255 - values if tags.get(_PHOTOMETRIC_TAG) == 0 else values)
    elif image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _stretch(values: np.ndarray) -> np.ndarray:
    """Scale so that the smallest finite value is 0 and the largest 255; NaN becomes 0."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low
    return np.round(values * (255 / (high - low) if high > low else 0)).astype(np.uint8)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
