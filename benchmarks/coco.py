"""Time and memory of reading COCO: a synthetic file of the size of instances_train2014.json.

    python benchmarks/coco.py

Prints JSON: the file size, and for the reader and for plain `json.load` seconds and MB of memory
(the reader maps the file: the system can reclaim its pages, so they are not counted).
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

IMAGES, ANNOTATIONS, CATEGORIES = 82_783, 604_907, 80
POINTS = 38
"""Mean number of corners per polygon, for a file of about 450 MB."""


def write_instances(path: Path) -> None:
    """Write an instances file with everything that the official one has for an image."""
    source = random.Random(0)
    url = "http://images.cocodataset.org/train2014/"
    with path.open("w") as file:
        file.write('{"info": {"year": 2014}, "images": [')
        for i in range(IMAGES):
            name = f"COCO_train2014_{i:012d}.jpg"
            image = {"license": 5, "file_name": name, "coco_url": url + name, "height": 480}
            image |= {"width": 640, "date_captured": "2013-11-14 16:28:13", "id": i}
            file.write(", " * (i > 0) + json.dumps(image))
        file.write('], "annotations": [')
        for i in range(ANNOTATIONS):
            corners = 2 * (3 + int(source.expovariate(1 / (POINTS - 3))))
            annotation = {
                "segmentation": [[round(640 * source.random(), 2) for _ in range(corners)]],
                "area": 702.1,
                "iscrowd": 0,
                "image_id": source.randrange(IMAGES),
                "bbox": [473.07, 395.93, 38.65, 28.67],
                "category_id": source.randint(1, CATEGORIES),
                "id": i,
            }
            file.write(", " * (i > 0) + json.dumps(annotation))
        names = [{"id": i, "name": f"class {i}"} for i in range(1, CATEGORIES + 1)]
        file.write(f'], "categories": {json.dumps(names)}}}')


def measure(how: str, root: Path) -> dict[str, float]:
    """Read the file in this process; seconds, and MB that the process uses afterwards."""
    from cdul_steps.data.readers.coco import read_coco

    start = time.perf_counter()
    if how == "reader":
        names = [f"class {i}" for i in range(1, CATEGORIES + 1)]
        kept = read_coco(root, {"train": "train2014"}, names)
        assert len(kept) == IMAGES
    else:
        with (root / "annotations/instances_train2014.json").open() as file:
            kept = json.load(file)
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()
    anonymous = int(status.partition("RssAnon:")[2].split()[0]) / 1024
    return {"seconds": round(seconds, 1), "MB": round(anonymous)}


def main() -> None:
    """Make the file, and read it each way in a separate process."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], Path(options.measure[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "annotations" / "instances_train2014.json"
        path.parent.mkdir()
        (Path(folder) / "train2014").mkdir()
        write_instances(path)
        result = {"file_MB": round(path.stat().st_size / 1e6)}
        for how in ("reader", "json.load"):
            command = [sys.executable, __file__, "--measure", how, folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            result[how] = json.loads(done.stdout)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
