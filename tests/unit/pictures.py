"""Pictures of every kind, encoded in memory, and their decoded pixels."""

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cdul_steps.data.images import ImageError, ImageStatus, decode, read_size

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def picture(width: int = 48, height: int = 32) -> Image.Image:
    """Smooth in x and y, with a red block in the top left corner."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 3, y * 5, x + y], axis=2).astype(np.uint8)
    pixels[: height // 2, : width // 3] = RED
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def save(folder: Path, data: bytes, name: str = "x.jpg") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def pixels(path: Path) -> np.ndarray:
    image = decode(path)
    assert image.mode == "RGB"
    assert image.size == read_size(path)
    return np.asarray(image)


def status_of(path: Path, function=decode, **options) -> ImageStatus:
    with pytest.raises(ImageError) as caught:
        function(path, **options)
    assert "\n" not in caught.value.detail
    return caught.value.status


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def tiff(bits: int, data: bytes, width: int, **changes: int) -> bytes:
    """A grey one-row TIFF, written by hand for variants that Pillow cannot write."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: 1, 273: 0, 277: 1, 278: 1, 279: len(data)}
    tags |= {{"photometric": 262, "sample_format": 339}[name]: v for name, v in changes.items()}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, v) for tag, v in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data
