"""Decode images by this code and by that of an earlier commit, in turns; print JSON.

    python benchmarks/decode.py --against v0.1.0 --images /data/VOC2007/JPEGImages

Each turn is a process of its own for either, one after the other, that reads all images once and
then decodes them `--repeat` times. `ratio` is the time of this code over that of the other, CPU
seconds: the median of the turns, and the middle half of them. `differ` names the images that do
not become the same pixels.
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
CHILD = """
import hashlib, json, sys, time
from cdul_steps.data.images import ImageError, decode
paths, repeat = json.load(sys.stdin)
found = {}
for path in paths:
    try:
        image = decode(path)
        found[path] = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
    except ImageError as error:
        found[path] = str(error.status)
start = time.process_time()
for path in paths * repeat:
    try:
        decode(path)
    except ImageError:
        pass
print(json.dumps([time.process_time() - start, found]))
"""


def run(code: Path, paths: list[str], repeat: int) -> tuple[float, dict[str, str]]:
    """CPU seconds of a process that decodes by the code of a folder, and what came out."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD],
        cwd=code,
        env={**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"},
        input=json.dumps([paths, repeat]),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr)
    seconds, found = json.loads(done.stdout)
    return seconds, found


def main() -> None:
    """Time, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", required=True, help="a commit of this repository")
    parser.add_argument("--images", type=Path, default=PHOTOS, help="a folder of images")
    parser.add_argument("--count", type=int, default=200, help="images at most")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=2)
    options = parser.parse_args()
    paths = [str(p.absolute()) for p in sorted(options.images.rglob("*")) if p.is_file()]
    paths = paths[:: max(1, len(paths) // options.count)][: options.count]
    command = ["git", "-C", str(ROOT), "archive", options.against, "cdul_steps"]
    packed = subprocess.run(command, capture_output=True, check=True).stdout
    ratios, ours, theirs = [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["tar", "--extract", "-C", folder], input=packed, check=True)
        for turn in range(options.turns):
            codes = [ROOT, Path(folder)] if turn % 2 else [Path(folder), ROOT]
            seconds = {}
            for code in codes:
                seconds[code], found = run(code, paths, options.repeat)
                ours, theirs = (found, theirs) if code is ROOT else (ours, found)
            ratios.append(seconds[ROOT] / seconds[Path(folder)])
    low, middle, high = statistics.quantiles(ratios, n=4)
    result = {
        "images": len(paths),
        "turns": options.turns,
        "ratio": round(middle, 4),
        "middle_half": [round(low, 4), round(high, 4)],
        "differ": [path for path in paths if ours[path] != theirs[path]],
        "machine": machine(),
        "software": versions("pillow", "simplejpeg"),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
