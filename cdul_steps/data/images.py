"""Decoding of images: the one place that turns a file, or a part of an archive, into pixels.

Formats: JPEG, PNG, WebP, BMP, TIFF, GIF, HEIC, AVIF and, if its plugin is installed, JPEG XL. The
format is detected from the content, never from the file name.

Conversion to RGB, so that the pixels match what an image viewer shows:

- EXIF orientation 1 to 8 is applied; an orientation that cannot be read, or is only in XMP, counts
  as upright. HEIC, AVIF and JPEG XL store their own orientation, which is applied.
- Grey, palette, 1-bit, CMYK and YCbCr are converted, using the colour profile unless it is
  equivalent to sRGB.
- Transparency, and the area outside an animation's first frame, is composited on white.
- 12-bit and 16-bit integers are scaled to 8 bits; 32-bit integers and floats, for which no white
  level is defined, are stretched from their smallest to their largest finite value (a constant
  image is black). A TIFF whose smallest value is white is inverted.
- From an animation or a file with several pictures, the first frame or primary picture is taken.

A file is decoded completely or rejected: no half-grey truncated images, as far as a decoder can
detect. docs/images.md has the full policy.
"""

import ctypes
import errno
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageFile, UnidentifiedImageError, _imaging
from PIL.JpegImagePlugin import JpegImageFile

from cdul_steps.data import formats, remote, sources
from cdul_steps.data.colour import to_rgb
from cdul_steps.limits import MAX_BYTES, MAX_PIXELS, MAX_SCANS

# Pillow warns about odd metadata of images that decode correctly. Set once at import, because
# warnings.catch_warnings is not thread safe.
warnings.filterwarnings("ignore", module=r"PIL\.")
# Messages of Pillow and libtiff lack the file name, and the exception contains them anyway.
logging.getLogger("PIL").addHandler(logging.NullHandler())
with suppress(OSError, AttributeError):
    for _kind in ("Error", "Warning"):
        getattr(ctypes.CDLL(_imaging.__file__), f"TIFFSet{_kind}Handler")(None)

_ORIENTATION_TAG = 0x0112
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
    TRUNCATED = "truncated"  # starts like an image, but is empty, truncated, damaged or unsupported
    TOO_LARGE = "too_large"
    UNREACHABLE = "unreachable"  # a URL that cannot be fetched


class ImageError(Exception):
    """An image that cannot be read: `status` is the kind, `detail` one line for people."""

    def __init__(self, status: ImageStatus, detail: str) -> None:
        super().__init__(status, detail)  # both as arguments, for pickling
        self.status = status
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.status}: {self.detail}"


def decode(path: str | PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image to a loaded, upright 8-bit RGB image, as the module docstring describes.

    path: path of a file, place in an archive as written by `cdul_steps.data.sources`, or a URL.
    max_pixels: images whose header states a larger width times height are rejected; values above
    MAX_PIXELS have no effect.

    Raises ImageError, and no other exception, whatever the file contains.
    """
    with _opened(path, max_pixels) as (image, file):
        orientation, size = _orientation_and_size(image)
        window = formats.first_frame(image, file)
        pixels = _load(image, file)
        rgb = to_rgb(pixels, image.info.get("icc_profile"), getattr(image, "tag_v2", {}))
        if window and window != (0, 0, *rgb.size):
            frame, rgb = rgb.crop(window), Image.new("RGB", rgb.size, "white")
            rgb.paste(frame, window)
        # Pillow rotates a TIFF while loading it.
        if orientation in _TRANSPOSE and image.format != "TIFF":
            rgb = rgb.transpose(_TRANSPOSE[orientation])
        if rgb.size != size:  # views are cut by the header's size
            raise ValueError(f"its header states {size} pixels, its data has {rgb.size}")
        rgb.info = {}  # an orientation left here would be applied twice
        return rgb


def read_size(path: str | PathLike[str], *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) in pixels of the image that `decode` would return, from the header alone.

    Raises ImageError as `decode` does, for errors that the header shows.
    """
    with _opened(path, max_pixels, whole=False) as (image, _):
        return _orientation_and_size(image)[1]


def begins_as_image(path: Path) -> bool:
    """Whether a file starts like a supported image; False if it cannot be read."""
    try:
        if not path.is_file():  # opening a pipe would block forever
            return False
        with path.open("rb") as file:
            return formats.format_of(file.read(formats.HEAD)) is not None
    except OSError:
        return False


@contextmanager
def _opened(
    path: str | PathLike[str], max_pixels: int, *, whole: bool = True
) -> Iterator[tuple[ImageFile.ImageFile, BinaryIO]]:
    """Open an image; turn any error here or in the `with` block into an ImageError.

    Yields the image, with only its header read, and its file.
    """
    head = b""
    try:
        size, open_file = sources.locate(path, whole=whole)
        if size == 0:
            raise ImageError(ImageStatus.TRUNCATED, "the file is empty")
        if size > MAX_BYTES:
            raise ImageError(
                ImageStatus.TOO_LARGE, f"{size} bytes, more than the limit of {MAX_BYTES}"
            )
        with open_file() as file:
            head = file.read(formats.HEAD)
            file.seek(0)
            with _header(file, head) as image:
                width, height = image.size
                limit = min(max_pixels, MAX_PIXELS)
                if width * height > limit:
                    raise ImageError(
                        ImageStatus.TOO_LARGE,
                        f"{width} x {height} pixels, more than the limit of {limit}",
                    )
                yield image, file
    except ImageError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        detail = "no such file" if error.errno else str(error)
        raise ImageError(ImageStatus.MISSING, detail) from error
    except remote.UnreachableError as error:
        raise ImageError(ImageStatus.UNREACHABLE, _one_line(error)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(ImageStatus.TOO_LARGE, _one_line(error)) from error
    except MemoryError as error:
        raise ImageError(ImageStatus.TOO_LARGE, "not enough memory to decode it") from error
    # On hostile bytes, decoders raise exceptions of any type.
    except Exception as error:
        # Pillow's own OSErrors have no number; EINVAL is a seek to an invalid offset in the file.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise ImageError(ImageStatus.UNREADABLE, error.strerror or "") from error
        kind = formats.format_of(head)
        if kind is None:
            other = formats.other_format(head)
            known = [*formats.NAMES.values()]
            detail = f"is {other}, " * bool(other) + f"not {', '.join(known[:-1])} or {known[-1]}"
            raise ImageError(ImageStatus.NOT_AN_IMAGE, detail) from error
        # Pillow's message for an unidentified image is the file object.
        unidentified = isinstance(error, UnidentifiedImageError)
        reason = "its header cannot be read" if unidentified else _one_line(error)
        raise ImageError(
            ImageStatus.TRUNCATED,
            f"is {formats.NAMES[kind]}, but cut short, damaged or unsupported: {reason}",
        ) from error


def _header(file: BinaryIO, head: bytes) -> ImageFile.ImageFile:
    """Open an image with the format that the first bytes of the file indicate."""
    kind = formats.format_of(head)
    if kind is None:
        raise UnidentifiedImageError
    if kind == "JXL" and not formats.READS_JXL:
        raise ImageError(
            ImageStatus.NOT_AN_IMAGE, "is JPEG XL, which needs: pip install 'cdul-steps[jxl]'"
        )
    if kind == "PNG":
        chunks, profile = formats.plain_png(file, whole=False)
        image = Image.open(chunks, formats=(kind,))
        image.info["icc_profile"] = profile
    elif kind in formats.OPENERS:
        image = formats.OPENERS[kind](file)
    else:
        image = Image.open(file, formats=(kind,))
    for name in ("xmp", "XML:com.adobe.xmp"):  # Pillow would read an orientation from these
        image.info.pop(name, None)
    return image


def _load(image: ImageFile.ImageFile, file: BinaryIO) -> Image.Image:
    """The pixels of an opened image as stored in the file, in its own mode."""
    file.seek(0)
    if isinstance(image, JpegImageFile):  # files with several pictures have another class
        data = file.read()
        _check_scans(data)
        if pixels := formats.decode_jpeg(data, image.mode, image.size):
            return pixels
    elif image.format == "PNG":
        image = Image.open(formats.plain_png(file, whole=True)[0], formats=("PNG",))
    elif image.format == "TIFF":
        formats.mend_tiff(image)
    elif image.format == "JXL":
        return formats.load_jxl(file)
    image.load()
    return image


def _orientation_and_size(image: ImageFile.ImageFile) -> tuple[int, tuple[int, int]]:
    """EXIF orientation, and the size after applying it. Decodes no pixels."""
    try:
        # The base class's method, because the PNG plugin's decodes the image to find later chunks.
        orientation = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except Exception:  # as in _opened; a damaged EXIF block does not make an image unreadable
        orientation = 1
    # Pillow has already swapped the size of a TIFF according to the TIFF's own tag.
    size_is_turned = getattr(image, "tag_v2", {}).get(_ORIENTATION_TAG) in _SIDEWAYS
    if (orientation in _SIDEWAYS) != size_is_turned:
        return orientation, (image.height, image.width)
    return orientation, image.size


def _check_scans(data: bytes) -> None:
    """Raise ImageError for a JPEG with more than MAX_SCANS scans."""
    if data.count(b"\xff\xda") <= MAX_SCANS:  # almost always true, and fast
        return
    for number, _ in enumerate(formats.scans(data), 1):
        if number > MAX_SCANS:
            raise ImageError(ImageStatus.TOO_LARGE, f"more than the limit of {MAX_SCANS} scans")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
