"""Copy a data set with its photographs mirrored; their labels stay right.

python experiments/mirror.py $CDUL_TEST_DATA/voc2007/VOCdevkit/VOC2007 mirrored
"""

import shutil
import sys
from pathlib import Path

from PIL import Image, ImageOps


def copy(source: str, target: str) -> str:
    """Mirror a photograph, and copy any other file."""
    if Path(source).suffix != ".jpg":
        return shutil.copy2(source, target)
    with Image.open(source) as image:
        ImageOps.mirror(image).save(target, quality=95)
    return target


if __name__ == "__main__":
    shutil.copytree(sys.argv[1], sys.argv[2], copy_function=copy)
