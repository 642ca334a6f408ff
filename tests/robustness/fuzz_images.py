"""Decode mutated images in a child process and count the outcomes; print them as JSON.

    python tests/robustness/fuzz_images.py --count 10000 --seed 0

Valid images of every supported format are mutated: bits, bytes and integers are changed, pieces are
cut out, doubled or taken from another image, and ends are cut off. Each image must end with `ok` or
a status. A crash, a hang, any other exception, a header whose size differs from the pixels, or more
memory than a decoder needs counts as a fault, and the image is kept in the folder --keep.
"""

import argparse
import json
import random
import resource
import select
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from cdul_steps.data.images import ImageError, decode, read_size
from cdul_steps.provenance import versions

SAMPLES = Path(__file__).parents[1] / "unit/samples"
"""Images in formats that cannot be written by this script."""
MAX_PIXELS = 10_000_000
MEMORY = 2 << 30
"""Address space of the child in bytes: enough for MAX_PIXELS in any form, many times over."""
NUMBERS = (0, 1, 2, 3, 4, 8, 16, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def corpus() -> dict[str, bytes]:
    """Valid images of every format, mode and compression, by name; small, so mostly header."""
    y, x = np.mgrid[:24, :36]
    image = Image.fromarray(np.stack([x * 6, y * 9, x + y], axis=2).astype(np.uint8))
    grey = image.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    floats = Image.fromarray(np.asarray(grey).astype(np.float32))
    clear = image.convert("RGBA")
    clear.putalpha(grey)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [image.rotate(90), image.rotate(180)]}
    made = {
        "JPEG": [(image, {"exif": exif}), (image, {"progressive": True, "exif": exif}), (grey, {})],
        "PNG": [(image, {"exif": exif}), (clear, {}), (image.convert("P"), {}), (deep, {})],
        "WEBP": [
            (image, {"exif": exif}),
            (clear, {}),
            (clear, {"lossless": True}),
            (image, frames),
        ],
        "GIF": [(image.convert("P"), {}), (image, frames), (grey, {"transparency": 0})],
        "BMP": [(image, {}), (image.convert("P"), {}), (image.convert("1"), {})],
        "TIFF": [
            *((image, {"compression": c}) for c in ("raw", "tiff_lzw", "tiff_deflate", "packbits")),
            *((image.convert("1"), {"compression": c}) for c in ("group3", "group4")),
            (image, {"compression": "jpeg"}),
            *((mode, {"exif": exif}) for mode in (deep, floats, clear, image.convert("CMYK"))),
            (image, frames),
        ],
    }
    made["AVIF"] = [(image, {"exif": exif}), (clear, {}), (image, frames)]
    made["JPEG"].append((image.convert("CMYK"), {}))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # With two primary colours exchanged, so that it is not like sRGB's.
    profile = profile.replace(b"rXYZ", b"xXYZ").replace(b"gXYZ", b"rXYZ")
    profile = profile.replace(b"xXYZ", b"gXYZ")
    for kind in ("JPEG", "PNG", "WEBP"):
        made[kind].append((image, {"icc_profile": profile}))
    made["PNG"].append((image.convert("1"), frames | {"append_images": [image.convert("1")]}))
    found = {}
    for kind, pictures in made.items():
        for number, (picture, options) in enumerate(pictures):
            buffer = BytesIO()
            picture.save(buffer, kind, **options)
            found[f"{kind}-{number}"] = buffer.getvalue()
    for number, path in enumerate(sorted(SAMPLES.iterdir())):
        found[f"{path.suffix[1:].upper()}-{number}"] = path.read_bytes()
    return found


def mutated(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """`data` after one to eight random changes, half of which hit its first 200 bytes."""
    data = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 4, 8])):
        last = min(200, len(data)) if chance.random() < 0.5 else len(data)
        place = chance.randrange(max(1, last))
        size = chance.choice([1, 2, 4, 16, 200])
        match chance.randrange(9):
            case 0 | 1:
                data[place : place + 1] = bytes([chance.randrange(256)])
            case 2:
                if data:
                    data[min(place, len(data) - 1)] ^= 1 << chance.randrange(8)
            case 3 | 4:
                order, width = chance.choice("<>"), chance.choice("HI")
                number = struct.pack(f"{order}I", chance.choice(NUMBERS))
                number = number if width == "I" else number[2:] if order == ">" else number[:2]
                data[place : place + len(number)] = number
            case 5:
                del data[place : place + size]
            case 6:
                data[place:place] = data[place : place + size] * chance.randint(1, 3)
            case 7:
                other = chance.choice(others)
                start = chance.randrange(len(other))
                data[place : place + size] = other[start : start + size]
            case 8:
                if chance.random() < 0.3:
                    del data[place:]
    return signed(data) if chance.random() < 0.7 else bytes(data)


def signed(data: bytearray) -> bytes:
    """A PNG with corrected checksums, so that decoders read on."""
    place = 8
    while data.startswith(b"\x89PNG") and place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4])
        data[end : end + 4] = zlib.crc32(data[place + 4 : end]).to_bytes(4)
        place = end + 4
    return bytes(data)


def work() -> None:
    """Decode the files named on stdin, one per line, and answer each with one line."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        path, sizes, status = Path(line.rstrip("\n")), [], "ok"
        with suppress(ImageError):
            sizes.append(read_size(path, max_pixels=MAX_PIXELS))
        try:
            sizes.append(decode(path, max_pixels=MAX_PIXELS).size)
        except ImageError as error:
            status = str(error.status)
        if len(set(sizes)) > 1:
            status = f"fault: header {sizes[0]}, pixels {sizes[1]}"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps([status, peak * 1024]), flush=True)


class Child:
    """A decoding process, which is replaced after a crash or a hang."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.noise = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.start()

    def start(self) -> None:
        command = [sys.executable, __file__, "--work"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.noise,
            text=True,
        )

    def __call__(self, path: Path) -> tuple[str, int]:
        """Status and peak memory so far in bytes; a status that begins with "fault" is one."""
        print(path, file=self.process.stdin, flush=True)
        if not select.select([self.process.stdout], [], [], self.timeout)[0]:
            self.process.kill()
            fault = f"fault: no answer within {self.timeout:g} s"
        elif answer := self.process.stdout.readline():
            status, peak = json.loads(answer)
            return status, peak
        else:
            fault = f"fault: the process ended with {self.process.wait()}"
        self.process.wait()
        self.start()
        return fault, 0


def main() -> None:
    """Mutate, decode, count."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=60, help="seconds that an image may take")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-faults"))
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work()
        return
    chance, images = random.Random(options.seed), corpus()
    statuses: dict[str, Counter] = {}
    faults, slowest, peak, begin = [], 0.0, 0, time.monotonic()
    child = Child(options.timeout)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        for number in range(options.count):
            name = chance.choice(list(images))
            data = mutated(images[name], list(images.values()), chance)
            path.write_bytes(data)
            start = time.monotonic()
            status, memory = child(path)
            slowest, peak = max(slowest, time.monotonic() - start), max(peak, memory)
            if status.startswith("fault"):
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / f"{options.seed}-{number}").write_bytes(data)
                faults.append({"number": number, "image": name, "fault": status})
                status = "fault"
            statuses.setdefault(name.partition("-")[0], Counter())[status] += 1
    child.noise.seek(0)
    noise = child.noise.readlines()
    result = {
        "count": options.count,
        "seed": options.seed,
        "faults": faults,
        "statuses": {kind: dict(sorted(found.items())) for kind, found in sorted(statuses.items())},
        "lines_on_stderr": len(noise),
        "first_on_stderr": noise[:5],
        "slowest_seconds": round(slowest, 2),
        "peak_memory_mb": round(peak / 1e6),
        "seconds": round(time.monotonic() - begin, 1),
        "software": versions("pillow", "numpy", "pi-heif", "simplejpeg"),
    }
    print(json.dumps(result, indent=2))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
