"""Convert pixels of any mode and colour profile to 8-bit RGB, as a viewer shows them."""

from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

_BITS_TAG, _PHOTOMETRIC_TAG = 0x0102, 0x0106
_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
_ALIKE = 2
"""Largest difference, in 8-bit levels, from sRGB of a profile that counts as sRGB."""


def to_rgb(image: Image.Image, profile: bytes | None, tags: dict) -> Image.Image:
    """A loaded image as RGB, composited on white.

    profile: an ICC profile; it is ignored if it is damaged, equivalent to sRGB, or for another
    colour space than the image's. tags: the tags of a TIFF.
    """
    image = _with_8_bits(image, tags)
    is_grey = image.mode in ("L", "LA")
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    elif image.mode not in _SPACES:
        image = image.convert("RGB")
    if profile:
        image = _in_srgb(image, profile, is_grey)
    if alpha:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    # `convert` always copies; images of Pillow's file classes hold more than pixels.
    is_done = image.mode == "RGB" and type(image) is Image.Image
    return image if is_done else image.convert("RGB")


def _with_8_bits(image: Image.Image, tags: dict) -> Image.Image:
    values = None
    if image.mode.startswith("I;16"):
        white = 4095 if tags.get(_BITS_TAG) == (12,) else 65535
        values = np.asarray(image).astype(np.uint32)
        clear = values == image.info.get("transparency", -1)
        values = ((values * 255 + white // 2) // white).astype(np.uint8)
        values[clear] = 255
    elif image.mode in ("I", "F"):
        with np.errstate(invalid="ignore"):  # NumPy warns about signalling NaNs
            values = _stretch(np.asarray(image).astype(np.float64))
    if values is not None:
        # Pillow inverts 8-bit TIFFs only.
        return Image.fromarray(255 - values if tags.get(_PHOTOMETRIC_TAG) == 0 else values)
    return image.convert("LA") if image.mode == "La" else image


def _stretch(values: np.ndarray) -> np.ndarray:
    """Scale so that the smallest finite value is 0 and the largest 255; NaN becomes 0."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low
    return np.round(values * (255 / (high - low) if high > low else 0)).astype(np.uint8)


def _in_srgb(image: Image.Image, profile: bytes, is_grey: bool) -> Image.Image:
    mode = "L" if is_grey else "CMYK" if image.mode == "CMYK" else "RGB"
    transform = _to_srgb(profile, mode)
    if transform is None:
        return image
    if image.mode == "RGBA":
        image = image.getchannel("R") if is_grey else image.convert("RGB")
    return ImageCms.applyTransform(image, transform) or image


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform of a mode's pixels to sRGB; None if they should not be changed."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        colours = _colours(mode)
        before = np.asarray(colours.convert("RGB")).astype(int)
        after = np.asarray(ImageCms.applyTransform(colours, transform))
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    return None if mode != "CMYK" and np.abs(after - before).max() <= _ALIKE else transform


def _colours(mode: str) -> Image.Image:
    """Colours from all over the space."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    bands = np.meshgrid(*[steps] * len(mode), indexing="ij")
    return Image.fromarray(np.stack(bands, axis=-1).reshape(1, -1, len(mode)), mode)
