"""Speed of listing and reading the same images as files, in tars and in Parquet; prints JSON.

    python benchmarks/archives.py
    python benchmarks/archives.py --images 1000 --decoded 500

A few photographs are repeated and written in the three formats. `list` is what planning does: the
reader and the fingerprint. `manifest` is the whole stage, including image headers. `read` gets the
bytes of an image and `decode` its pixels, in one thread, in manifest order and in random order, as
in training. All are images per second of processor time, the best of `--turns` in which the formats
alternate, from files cached in memory: the time of a disk or a network is not included. Parquet
files have `--row-group` images per row group, as the library datasets writes them.
"""

import argparse
import itertools
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from measuring import PHOTOS, print_result

from cdul_steps.config import Dataset
from cdul_steps.data.images import decode
from cdul_steps.data.readers import fingerprint, read_dataset
from cdul_steps.data.sources import locate
from cdul_steps.data.tables import read_table
from cdul_steps.steps.manifest import make_manifest

READERS = {"files": "folder", "tar": "webdataset", "parquet": "parquet"}


def write_forms(photos: list[Path], folder: Path, images: int, archive: int, group: int) -> None:
    """Write `files/`, `tar/` and `parquet/`, with `archive` images in each archive."""
    for form in READERS:
        (folder / form).mkdir()
    names = [f"{i:08d}.jpg" for i in range(images)]
    for name, photo in zip(names, itertools.cycle(photos), strict=False):
        shutil.copy(photo, folder / "files" / name)
    for first in range(0, images, archive):
        part, number = names[first : first + archive], f"{first // archive:05d}"
        command = ["tar", "--create", "--format=ustar", "--directory", str(folder / "files")]
        command += ["--file", str(folder / f"tar/{number}.tar"), "--files-from=-"]
        subprocess.run(command, input="\n".join(part), text=True, check=True)
        cells = [{"bytes": (folder / "files" / n).read_bytes(), "path": n} for n in part]
        table = pa.table({"image": cells})
        # No dictionary, which would store only one copy of each photograph.
        options = {"row_group_size": group, "use_dictionary": False}
        pq.write_table(table, folder / f"parquet/{number}.parquet", **options)


def read(place: str) -> None:
    """Read the bytes of an image."""
    _, open_file = locate(place)
    with open_file() as file:
        file.read()


def seconds(function: Callable[[], object]) -> float:
    """The processor time of a call, in all threads."""
    start = time.process_time()
    function()
    return time.process_time() - start


def measure(folder: Path, form: str, decoded: int) -> dict[str, float]:
    """Images per second of processor time by part, for one format."""
    output = folder / "manifest" / form / "images.parquet"
    shutil.rmtree(output.parent, ignore_errors=True)
    dataset = Dataset(
        reader=READERS[form],
        root=folder / form,
        classes=folder / "classes.txt",
        splits={"train": "."},
    )
    root, splits = Path(dataset.root), {"train": "."}
    listing = seconds(lambda: fingerprint(read_dataset(READERS[form], root, splits, ("cat",))))
    manifest = seconds(lambda: make_manifest(dataset=dataset, output=output))
    places = read_table(output, ["path"])["path"].to_pylist()
    orders = {"in order": places[:decoded], "at random": random.Random(0).sample(places, decoded)}
    found = {"list": len(places) / listing, "manifest": len(places) / manifest}
    for function, (order, part) in itertools.product((read, decode), orders.items()):
        took = seconds(lambda f=function, p=part: [*map(f, p)])
        found[f"{function.__name__}, {order}"] = decoded / took
    return found


def main() -> None:
    """Write, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--photos", type=Path, default=PHOTOS, help="folder of JPEGs")
    parser.add_argument(
        "--distinct", type=int, default=20, help="different photographs, which are repeated"
    )
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--archive", type=int, default=1000, help="images per archive")
    parser.add_argument("--row-group", type=int, default=100, help="images per row group")
    parser.add_argument("--decoded", type=int, default=1000, help="images read and decoded")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    photos = sorted(options.photos.glob("*.jpg"))[: options.distinct]
    if not photos:
        sys.exit(f"{options.photos}: no photographs (*.jpg); give their folder with --photos")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "classes.txt").write_text("cat\n")
        write_forms(photos, folder, options.images, options.archive, options.row_group)
        sizes = {
            form: sum(file.stat().st_size for file in (folder / form).iterdir()) for form in READERS
        }
        turns = [
            {form: measure(folder, form, options.decoded) for form in READERS}
            for _ in range(options.turns)
        ]
    figures = {
        form: {part: round(max(turn[form][part] for turn in turns), 1) for part in turns[0][form]}
        for form in READERS
    }
    arguments = {name: value for name, value in vars(options).items() if name != "photos"}
    print_result(
        ["pyarrow", "pillow", "simplejpeg"], **arguments, bytes=sizes, images_per_second=figures
    )


if __name__ == "__main__":
    main()
