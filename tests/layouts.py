"""Miniatures of the published data sets, with the layout of the originals.

`truth` maps the set's own name of a split to its images, and each image's name to the classes that
it shows.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

Truth = Mapping[str, Mapping[str, Sequence[str]]]

COCO_IDS = [i for i in range(1, 91) if i not in {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}]
"""COCO's ids of its 80 categories."""


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def draw(path: Path, size: tuple[int, int] = (24, 18)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "teal").save(path, "JPEG")


def write_voc(root: Path, truth: Truth, classes: Sequence[str]) -> list[Path]:
    """Write one year of the devkit, with class lists; returns the paths of its images."""
    main = root / "ImageSets" / "Main"
    (root / "JPEGImages").mkdir(parents=True, exist_ok=True)
    for own, images in truth.items():
        write(main / f"{own}.txt", "".join(f"{image}\n" for image in images))
        for name in classes:
            lines = (f"{i} {'1' if name in shown else '-1':>2}\n" for i, shown in images.items())
            write(main / f"{name}_{own}.txt", "".join(lines))
    return [root / "JPEGImages" / f"{i}.jpg" for images in truth.values() for i in images]


def coco_instances(
    images: Mapping[str, Sequence[str]], category_ids: Mapping[str, int], own: str
) -> dict:
    """An instances file as a dictionary; images are named by number."""
    pairs = [(int(image), name) for image, shown in images.items() for name in shown]
    return {
        "info": {"description": "COCO 2014 Dataset", "year": 2014},
        "images": [
            {"license": 5, "file_name": coco_name(own, i), "height": 18, "width": 24, "id": int(i)}
            for i in images
        ],
        "licenses": [{"id": 5, "name": "Attribution License"}],
        "annotations": [
            {
                "segmentation": [[0.5, 1.5, 10.25, 1.5, 10.25, 9.75]],
                "area": 80.4,
                "iscrowd": 0,
                "image_id": image,
                "bbox": [0.5, 1.5, 9.75, 8.25],
                "category_id": category_ids[name],
                "id": number,
            }
            for number, (image, name) in enumerate(pairs)
        ],
        "categories": [
            {"supercategory": "thing", "id": number, "name": name}
            for name, number in category_ids.items()
        ],
    }


def coco_name(own: str, image: str) -> str:
    return f"COCO_{own}_{int(image):012d}.jpg"


def write_coco(root: Path, truth: Truth, classes: Sequence[str]) -> list[Path]:
    """Write one year of COCO; returns the paths of its images."""
    category_ids = dict(zip(classes, COCO_IDS, strict=False))
    for own, images in truth.items():
        (root / own).mkdir(parents=True, exist_ok=True)
        instances = coco_instances(images, category_ids, own)
        write(root / "annotations" / f"instances_{own}.json", json.dumps(instances))
    return [root / own / coco_name(own, i) for own, images in truth.items() for i in images]


def write_nuswide(root: Path, truth: Truth, classes: Sequence[str]) -> list[Path]:
    """Write NUS-WIDE's official lists, with Windows paths; returns the paths of its images."""
    (root / "Flickr").mkdir(parents=True, exist_ok=True)
    for own, images in truth.items():
        listing = "".join(image.replace("/", "\\") + " \r\n" for image in images)
        write(root / "ImageList" / f"{own}Imagelist.txt", listing)
        for name in classes:
            values = "".join(f"{int(name in shown)}\n" for shown in images.values())
            write(root / "Groundtruth" / "TrainTestLabels" / f"Labels_{name}_{own}.txt", values)
    return [root / "Flickr" / i for images in truth.values() for i in images]


def write_nuswide_formatted(root: Path, truth: Truth, classes: Sequence[str]) -> list[Path]:
    """Write NUS-WIDE's arrays from the single-positive literature; returns the image paths."""
    (root / "Flickr").mkdir(parents=True, exist_ok=True)
    write(root / "ConceptsList" / "Concepts81.txt", "".join(f"{name} \n" for name in classes))
    for own, images in truth.items():
        labels = [[float(name in shown) for name in classes] for shown in images.values()]
        np.save(root / f"{own}_images.npy", np.array(list(images), str))
        np.save(root / f"{own}_labels.npy", np.array(labels).reshape(len(images), len(classes)))
    return [root / "Flickr" / i for images in truth.values() for i in images]


def write_nuswide_listed(file: Path, truth: Truth) -> list[Path]:
    """Write NUS-WIDE's table from the ASL literature; returns the paths of its images."""
    rows = "".join(
        f'{image},"{list(shown)}",{own}\n'
        for own, images in truth.items()
        for image, shown in images.items()
    )
    write(file, "filepath,label,split_name\n" + rows)
    return [file.parent / i for images in truth.values() for i in images]
