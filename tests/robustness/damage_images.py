"""Damage photographs, decode them, and count how much damage is noticed; print it as JSON.

    python tests/robustness/damage_images.py /data/VOC2007/JPEGImages --count 200

Each photograph is encoded again in every format, with each kind of damage at a random position in
its image data. `refused`: it gets an error status. `harmless`: it is read, and its pixels differ by
at most two levels of 255 on average. `taken`: it is read, and they differ by more.
"""

import argparse
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np

from cdul_steps.data.images import ImageError, decode
from cdul_steps.provenance import versions

SIDE = 320
FORMATS = {
    "JPEG": {"format": "JPEG", "quality": 85},
    "JPEG, progressive": {"format": "JPEG", "quality": 85, "progressive": True},
    "JPEG, restart markers": {"format": "JPEG", "quality": 85, "restart_marker_rows": 1},
    "WebP": {"format": "WEBP", "quality": 80},
    "WebP, lossless": {"format": "WEBP", "lossless": True, "method": 0},
    "AVIF": {"format": "AVIF", "quality": 75, "speed": 9},
    "PNG": {"format": "PNG"},
}
HARMLESS = 2


def flip(data: bytes, place: int, chance: random.Random) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]


def zeros(data: bytes, place: int, chance: random.Random) -> bytes:
    size = min(512, len(data) - place - 2)
    return data[:place] + bytes(size) + data[place + size :]


def noise(data: bytes, place: int, chance: random.Random) -> bytes:
    size = min(512, len(data) - place - 2)
    return data[:place] + chance.randbytes(size) + data[place + size :]


def lose(data: bytes, place: int, chance: random.Random) -> bytes:
    return data[:place] + data[min(place + 16, len(data) - 2) :]


def end(data: bytes, place: int, chance: random.Random) -> bytes:
    """Truncate, and make the file look complete again, with an end marker or matching lengths."""
    cut = data[:place]
    if data.startswith(b"RIFF"):
        cut += bytes(place % 2)
        sizes = (len(cut) - 8).to_bytes(4, "little"), (len(cut) - 20).to_bytes(4, "little")
        return cut[:4] + sizes[0] + cut[8:16] + sizes[1] + cut[20:]
    return cut + b"\xff\xd9" if data.startswith(b"\xff\xd8") else cut


DAMAGES: dict[str, Callable[[bytes, int, random.Random], bytes]] = {
    "one bit flipped": flip,
    "512 bytes of zeros": zeros,
    "512 bytes of noise": noise,
    "16 bytes lost": lose,
    "cut and ended": end,
}


def outcome(path: Path, data: bytes, whole: np.ndarray) -> str:
    path.write_bytes(data)
    try:
        found = np.asarray(decode(path)).astype(int)
    except ImageError:
        return "refused"
    same = found.shape == whole.shape and np.abs(found - whole).mean() <= HARMLESS
    return "harmless" if same else "taken"


def main() -> None:
    """Damage, decode, count."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    files = sorted(options.photographs.glob("*.jpg"))
    found: dict[str, dict[str, Counter[str]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        for file in chance.sample(files, min(options.count, len(files))):
            photograph = decode(file)
            photograph.thumbnail((SIDE, SIDE))
            for name, settings in FORMATS.items():
                buffer = BytesIO()
                photograph.save(buffer, **settings)
                data = buffer.getvalue()
                path.write_bytes(data)
                whole = np.asarray(decode(path)).astype(int)
                # After the header, which has at most 700 bytes in every format.
                for kind, damage in DAMAGES.items():
                    place = chance.randrange(min(700, len(data) // 2), len(data) - 40)
                    counted = found.setdefault(name, {}).setdefault(kind, Counter())
                    counted[outcome(path, damage(data, place, chance), whole)] += 1
    result = {
        "photographs": min(options.count, len(files)),
        "seed": options.seed,
        "found": found,
        "software": versions("pillow", "simplejpeg"),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
