"""Decode images with this code and with an earlier commit, alternately; print JSON.

    python benchmarks/decode.py --against v0.1.0 --images /data/VOC2007/JPEGImages

Two processes, one for each version, alternately decode a few images, so that other load affects
both equally. `ratio` is the CPU time of this code divided by that of the other, the median over
`--turns` passes over all images, and `middle_half` is their interquartile range. `differ` names the
images with different pixels or a different status.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import PHOTOS, machine

from cdul_steps.provenance import versions

ROOT = Path(__file__).parents[1]
BLOCK = 5
CHILD = """
import hashlib, json, sys, time
from cdul_steps.data.images import ImageError, decode

def decoded(path):
    try:
        return decode(path)
    except ImageError as error:
        return error.status

for line in sys.stdin:
    paths = json.loads(line)
    start = time.process_time()
    images = [decoded(path) for path in paths]
    seconds = time.process_time() - start
    found = [
        image if isinstance(image, str)
        else hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
        for image in images
    ]
    print(json.dumps([seconds, dict(zip(paths, found))]), flush=True)
"""


class Decoder:
    """A process that decodes with the code in a folder."""

    def __init__(self, code: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", CHILD],
            cwd=code,
            env={**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.found: dict[str, str] = {}

    def __call__(self, paths: list[str]) -> float:
        """CPU seconds for the images; `found` collects the results."""
        print(json.dumps(paths), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"the decoding process ended with {self.process.wait()}")
        seconds, found = json.loads(answer)
        self.found |= found
        return seconds


def main() -> None:
    """Time, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", required=True, help="a commit of this repository")
    parser.add_argument("--images", type=Path, default=PHOTOS, help="a folder of images")
    parser.add_argument("--count", type=int, default=200, help="largest number of images")
    parser.add_argument("--turns", type=int, default=10)
    options = parser.parse_args()
    paths = [str(p.absolute()) for p in sorted(options.images.rglob("*")) if p.is_file()]
    paths = paths[:: max(1, len(paths) // options.count)][: options.count]
    command = ["git", "-C", str(ROOT), "archive", options.against, "cdul_steps"]
    packed = subprocess.run(command, capture_output=True, check=True).stdout
    blocks = [paths[i : i + BLOCK] for i in range(0, len(paths), BLOCK)]
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["tar", "--extract", "-C", folder], input=packed, check=True)
        ours, theirs = Decoder(ROOT), Decoder(Path(folder))
        for decoder in (ours, theirs):  # reads every image once
            decoder(paths)
        for _ in range(options.turns):
            seconds = {ours: 0.0, theirs: 0.0}
            for number, block in enumerate(blocks):
                for decoder in (ours, theirs) if number % 2 else (theirs, ours):
                    seconds[decoder] += decoder(block)
            ratios.append(seconds[ours] / seconds[theirs])
        for decoder in (ours, theirs):
            decoder.process.stdin.close()
            decoder.process.wait()
    low, middle, high = statistics.quantiles(ratios, n=4)
    result = {
        "images": len(paths),
        "turns": options.turns,
        "ratio": round(middle, 4),
        "middle_half": [round(low, 4), round(high, 4)],
        "differ": [path for path in paths if ours.found[path] != theirs.found[path]],
        "machine": machine(),
        "software": versions("pillow", "simplejpeg"),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
