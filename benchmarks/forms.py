"""Run the workflow on the same images as files, in tars and in Parquet; print JSON.

    python benchmarks/forms.py --folder /data/forms
    python benchmarks/forms.py --folder /data/forms --images 300 --archive 100

Photographs are reduced to small JPEGs and repeated. For each of the three forms the workflow makes
the manifest, encodes with the demo's tiny CLIP, makes labels, and applies an untrained classifier.
The seconds and the peak memory of each stage are those of Snakemake's benchmark files: seconds are
summed over the jobs, memory is that of the largest job, of all its processes. `results` counts
files. The labels and the probabilities of the three forms are compared bit by bit. Images, results
and this benchmark's own figures stay in `--folder`, and the same command continues a killed run.
"""

import argparse
import csv
import sys
from pathlib import Path

import pyarrow.dataset
import torch
import yaml
from archives import READERS, write_forms
from measuring import PHOTOS, print_result
from PIL import Image
from plan import PARTS, ROOT, snakemake

from cdul_steps.config import Network
from cdul_steps.data.classes import load_classes
from cdul_steps.models.classifier import network_and_card, save_classifier

CLASSES = "config/classes/demo.yaml"
STAGES = ("manifest", "encode", "similarity", "label", "apply")
LABELS = "results/{form}/tiny-clip/final/pseudo_labels.parquet"
APPLIED = "results/{form}/applied/{form}/train"


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """The project, the images in each form, a classifier, and the config, if they are not there."""
    if (folder / "overlay.yaml").exists():
        return
    if any(folder.iterdir()):
        sys.exit(f"{folder}: is not empty, and its images are not complete; delete it")
    for part in PARTS:
        (folder / part).symlink_to(ROOT / part)
    (folder / "photos").mkdir()
    found = sorted(options.photos.glob("*.jpg"))[: options.distinct]
    if not found:
        sys.exit(f"{options.photos}: no photographs (*.jpg); give their folder with --photos")
    photos = [folder / "photos" / photo.name for photo in found]
    for photo, small in zip(found, photos, strict=True):
        with Image.open(photo) as image:
            image.thumbnail((options.size, options.size))
            image.save(small)
    write_forms(photos, folder, options.images, options.archive, group=100)
    torch.manual_seed(0)
    network, card = network_and_card(
        Network(model="test_resnet", image_size=64), list(load_classes(ROOT / CLASSES).names)
    )
    save_classifier(network, card, folder / "model")
    common = {"classes": CLASSES, "splits": {"train": "."}, "shard_size": options.shard_size}
    config = {
        "datasets": {
            form: common | {"reader": reader, "root": form, "grid": [1, 1]}
            for form, reader in READERS.items()
        },
        "apply": {form: {"model": "model", "dataset": form} for form in READERS},
        "run": {"datasets": list(READERS), "labels": ["final"]},
        # Every job would measure which engine is faster, and the bits of two engines differ.
        "runtime": {"engine": "torch", "batch_size": 2},
    }
    (folder / "overlay.yaml").write_text(yaml.safe_dump(config))


def stages(folder: Path, form: str) -> dict[str, dict[str, float]]:
    """Seconds, processor seconds and peak memory of each stage of a form, over all its jobs."""
    found = {}
    for stage in STAGES:
        place = folder / "results/benchmarks" / stage
        files = [*place.glob(f"{form}.tsv"), *place.glob(f"{form}/**/*.tsv")]
        jobs = [row for file in files for row in csv.DictReader(file.open(), delimiter="\t")]
        found[stage] = {
            "jobs": len(jobs),
            "s": round(sum(float(job["s"]) for job in jobs), 1),
            "cpu_s": round(sum(float(job["cpu_time"]) for job in jobs), 1),
            "peak_MiB": max(float(job["max_pss"]) for job in jobs),
        }
    return found


def scores(folder: Path, place: str) -> list[bytes]:
    """The columns of classes of a table or a folder of tables, as bytes."""
    table = pyarrow.dataset.dataset(folder / place).to_table().combine_chunks()
    classes = load_classes(ROOT / CLASSES).names
    return [table[name].to_numpy().tobytes() for name in classes]


def main() -> None:
    """Prepare, run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="for images and results")
    parser.add_argument("--photos", type=Path, default=PHOTOS, help="folder of JPEGs")
    parser.add_argument("--distinct", type=int, default=200, help="different photographs")
    parser.add_argument("--size", type=int, default=128, help="longer side in pixels")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--archive", type=int, default=1000, help="images per archive")
    parser.add_argument("--shard-size", type=int, default=10_000)
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, options)
    for form in READERS:
        snakemake(folder, "--rerun-incomplete", LABELS.format(form=form))
        print(f"{form}: labels made", file=sys.stderr, flush=True)
    snakemake(folder, "--rerun-incomplete", "apply")
    planning, said = snakemake(folder, "-n", "apply")
    assert "Nothing to be done" in said, said
    figures = {
        form: {
            "images": sum(1 for _ in (folder / form).iterdir()),
            "results": sum(file.is_file() for file in (folder / f"results/{form}").rglob("*")),
            "stages": stages(folder, form),
        }
        for form in READERS
    }
    same = {
        name: all(
            scores(folder, place.format(form="files")) == scores(folder, place.format(form=form))
            for form in READERS
        )
        for name, place in (("labels", LABELS), ("probabilities", APPLIED))
    }
    print_result(
        ["snakemake", "pyarrow", "torch"],
        images=options.images,
        forms=figures,
        plan=planning,
        the_same_to_the_bit=same,
    )


if __name__ == "__main__":
    main()
