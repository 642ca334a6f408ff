"""Copy a data set with its photographs altered; their labels stay right.

    python experiments/altered.py mirrored $CDUL_TEST_DATA/voc2007/VOCdevkit/VOC2007 mirrored
    python experiments/altered.py jittered $CDUL_TEST_DATA/voc2007/VOCdevkit/VOC2007 jittered

`jittered` changes brightness, contrast and saturation by up to 40% and the hue by up to 10%, at
random, the same in every run.
"""

import shutil
import sys
from functools import partial
from pathlib import Path
from zlib import crc32

import torch
from PIL import Image, ImageOps
from torchvision.transforms import ColorJitter


def jitter(image: Image.Image, name: str) -> Image.Image:
    """Change the colours of a photograph, at random by its name."""
    torch.manual_seed(crc32(name.encode()))
    return ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)(image.convert("RGB"))


def copy(source: str, target: str, how: str) -> str:
    """Alter a photograph, and copy any other file."""
    if Path(source).suffix != ".jpg":
        return shutil.copy2(source, target)
    with Image.open(source) as image:
        changed = {"mirrored": ImageOps.mirror, "jittered": partial(jitter, name=Path(source).name)}
        changed[how](image).save(target, quality=95)
    return target


if __name__ == "__main__":
    shutil.copytree(sys.argv[2], sys.argv[3], copy_function=partial(copy, how=sys.argv[1]))
