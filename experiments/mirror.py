"""Copy a data set with its photographs mirrored; their labels stay right.

python experiments/mirror.py $CDUL_TEST_DATA/voc2007/VOCdevkit/VOC2007 mirrored
"""

import shutil
import sys
from pathlib import Path

from PIL import Image, ImageOps


def mirror(source: str, target: str) -> str:
    with Image.open(source) as image:
        ImageOps.mirror(image).save(target, quality=95)
    return target


def copy(source: str, target: str) -> str:
    return mirror(source, target) if Path(source).suffix == ".jpg" else shutil.copy2(source, target)


if __name__ == "__main__":
    shutil.copytree(sys.argv[1], sys.argv[2], copy_function=copy)
