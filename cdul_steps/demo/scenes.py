"""Generated pictures of simple objects, for the demo data set and for training its tiny CLIP.

Every picture is a function of a seed: `scene` has several objects and multi-label ground truth,
`single_object` has one.
"""

import csv
import math
import multiprocessing.pool
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from cdul_steps.errors import UserError

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (205, 35, 40),
    "orange": (240, 130, 25),
    "yellow": (245, 210, 45),
    "green": (50, 145, 60),
    "blue": (45, 90, 200),
    "purple": (125, 60, 165),
    "pink": (240, 120, 165),
    "brown": (130, 85, 50),
    "white": (240, 240, 235),
    "gray": (135, 140, 145),
}
DARK: Colour = (45, 40, 40)
# Smallest visible share of an object for it to count as present.
MIN_VISIBLE = 0.5
SPLITS = ("train", "test")


class _Pen:
    """Draws on a square canvas whose coordinates run from -1 to 1, y downwards."""

    def __init__(self, side: int, outline: bool) -> None:
        self.image = Image.new("RGBA", (side, side))
        self.draw = ImageDraw.Draw(self.image)
        self.half = side / 2
        self.outline = DARK if outline else None
        self.width = max(1, round(side * 0.02))

    def at(self, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [((x + 1) * self.half, (y + 1) * self.half) for x, y in points]

    def polygon(self, points: list[tuple[float, float]], fill: Colour) -> None:
        self.draw.polygon(self.at(points), fill, self.outline, self.width)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Colour) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill)

    def ellipse(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        fill: Colour,
        part: tuple[int, int] = (0, 360),
    ) -> None:
        """An ellipse, or the part of it between two angles in degrees, clockwise from 3 o'clock."""
        angles = np.deg2rad(np.linspace(*part, 40))
        self.polygon([(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles], fill)

    def line(self, points: list[tuple[float, float]], width: float, fill: Colour) -> None:
        self.draw.line(self.at(points), fill, max(1, round(width * self.half)), joint="curve")


def _shade(colour: Colour, factor: float) -> Colour:
    r, g, b = (min(255, int(v * factor)) for v in colour)
    return r, g, b


def _star(pen: _Pen, rng: Generator, main: Colour) -> None:
    inner = rng.uniform(0.36, 0.46)
    angles = np.arange(10) * math.pi / 5 - math.pi / 2
    radii = [0.97, inner] * 5
    points = [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]
    pen.polygon(points, main)
    if rng.random() < 0.4:
        pen.polygon([(x * 0.55, y * 0.55) for x, y in points], _shade(main, 1.25))


def _heart(pen: _Pen, rng: Generator, main: Colour) -> None:
    t = np.linspace(0, 2 * math.pi, 60)
    x = 0.95 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16.5 - 0.1
    pen.polygon(list(zip(x.tolist(), y.tolist(), strict=True)), main)
    if rng.random() < 0.5:
        pen.ellipse(-0.45, -0.45, 0.14, 0.2, _shade(main, 1.5))


def _house(pen: _Pen, rng: Generator, main: Colour) -> None:
    roof = _pick(rng, "red", "brown", "gray")
    eaves = rng.uniform(-0.25, -0.05)
    if rng.random() < 0.6:
        pen.box(0.38, -0.85, 0.6, -0.2, _shade(roof, 0.75))
    pen.box(-0.75, eaves, 0.75, 0.9, main)
    pen.polygon([(-0.97, eaves), (0, -0.95), (0.97, eaves)], roof)
    pen.box(-0.2, 0.35, 0.2, 0.9, _pick(rng, "brown", "blue"))
    for x in (-0.5, 0.5):
        pen.box(x - 0.16, 0.08, x + 0.16, 0.36, (250, 235, 150))


def _tree(pen: _Pen, rng: Generator, main: Colour) -> None:
    pen.box(-0.13, 0.3, 0.13, 0.97, COLOURS["brown"])
    if rng.random() < 0.5:
        for top, half in ((-0.1, 0.75), (-0.5, 0.6), (-0.95, 0.45)):
            pen.polygon([(-half, top + 0.65), (0, top), (half, top + 0.65)], main)
    else:
        for x, y in ((-0.38, -0.05), (0.38, -0.05), (0, -0.5), (0, -0.1)):
            pen.ellipse(x, y, 0.45, 0.42, main)
        if rng.random() < 0.4:
            for x, y in rng.uniform(-0.45, 0.2, (5, 2)):
                pen.ellipse(x, y, 0.08, 0.08, COLOURS["red"])


def _fish(pen: _Pen, rng: Generator, main: Colour) -> None:
    height = rng.uniform(0.42, 0.6)
    pen.polygon([(0.35, 0), (0.97, -0.5), (0.8, 0), (0.97, 0.5)], _shade(main, 0.8))
    pen.polygon([(-0.3, -0.3), (0.1, -height - 0.3), (0.35, -0.2)], _shade(main, 0.8))
    pen.ellipse(-0.2, 0, 0.75, height, main)
    for x in (-0.05, 0.2)[: rng.integers(3)]:
        pen.line([(x, -height * 0.8), (x + 0.08, 0), (x, height * 0.8)], 0.12, (245, 245, 240))
    pen.ellipse(-0.6, -0.12, 0.14, 0.14, (250, 250, 250))
    pen.ellipse(-0.63, -0.12, 0.07, 0.07, DARK)


def _car(pen: _Pen, rng: Generator, main: Colour) -> None:
    back = rng.uniform(0.45, 0.8)
    pen.polygon([(-0.6, 0.05), (-0.3, -0.5), (back - 0.25, -0.5), (back, 0.05)], main)
    middle = (back - 0.55) / 2
    glass = (190, 225, 240)
    pen.polygon([(-0.45, 0), (-0.24, -0.38), (middle - 0.05, -0.38), (middle - 0.05, 0)], glass)
    pen.polygon(
        [(middle + 0.05, 0), (middle + 0.05, -0.38), (back - 0.3, -0.38), (back - 0.12, 0)], glass
    )
    pen.polygon([(-0.97, 0.1), (-0.8, 0), (0.95, 0), (0.97, 0.42), (-0.97, 0.42)], main)
    for x in (-0.52, 0.55):
        pen.ellipse(x, 0.42, 0.24, 0.24, DARK)
        pen.ellipse(x, 0.42, 0.11, 0.11, (200, 200, 205))


def _boat(pen: _Pen, rng: Generator, main: Colour) -> None:
    sail = _pick(rng, "white", "yellow", "red")
    pen.line([(0, -0.95), (0, 0.5)], 0.08, COLOURS["brown"])
    pen.polygon([(0.08, -0.9), (0.08, 0.3), (rng.uniform(0.55, 0.85), 0.3)], sail)
    if rng.random() < 0.7:
        pen.polygon([(-0.08, -0.7), (-0.08, 0.3), (-0.6, 0.3)], _shade(sail, 0.88))
    pen.polygon([(-0.95, 0.42), (0.95, 0.42), (0.6, 0.9), (-0.6, 0.9)], main)
    if rng.random() < 0.5:
        pen.line([(-0.83, 0.55), (0.83, 0.55)], 0.08, (245, 245, 240))


def _flower(pen: _Pen, rng: Generator, main: Colour) -> None:
    leaf = COLOURS["green"]
    pen.line([(0, -0.2), (0.03, 0.97)], 0.1, leaf)
    pen.ellipse(0.26, 0.62, 0.24, 0.1, leaf)
    count = int(rng.integers(5, 9))
    start = rng.uniform(0, math.pi)
    for k in range(count):
        angle = start + 2 * math.pi * k / count
        pen.ellipse(0.4 * math.cos(angle), 0.4 * math.sin(angle) - 0.33, 0.23, 0.23, main)
    pen.ellipse(0, -0.33, 0.24, 0.24, _pick(rng, "yellow", "brown"))


def _mushroom(pen: _Pen, rng: Generator, main: Colour) -> None:
    foot = rng.uniform(0.22, 0.36)
    pen.polygon([(-0.22, 0), (0.22, 0), (foot, 0.92), (-foot, 0.92)], (240, 228, 205))
    pen.ellipse(0, 0.12, 0.92, rng.uniform(0.85, 1.05), main, (180, 360))
    for x, y in ((-0.5, -0.12), (0.05, -0.5), (0.5, -0.1), (0, -0.08))[: rng.integers(3, 5)]:
        pen.ellipse(x, y, 0.14, 0.13, (245, 245, 240))


def _umbrella(pen: _Pen, rng: Generator, main: Colour) -> None:
    pen.line([(0, -0.9), (0, 0.7), (0.08, 0.85), (0.2, 0.87), (0.3, 0.72)], 0.09, DARK)
    other = main if rng.random() < 0.4 else (245, 245, 240)
    pen.ellipse(0, 0.05, 0.97, 0.85, main, (180, 360))
    for x in (-0.65, 0, 0.65):
        pen.ellipse(x, 0.07, 0.325, 0.14, _shade(main, 0.6), (180, 360))
    pen.polygon([(-0.325, 0.02), (0, -0.8), (0.325, 0.02)], other)


def _cup(pen: _Pen, rng: Generator, main: Colour) -> None:
    angles = np.linspace(-1.7, 1.7, 20)
    pen.line([(0.5 + 0.33 * math.cos(a), 0.12 + 0.34 * math.sin(a)) for a in angles], 0.14, main)
    base = rng.uniform(0.35, 0.52)
    pen.polygon([(-0.7, -0.4), (0.52, -0.4), (base, 0.85), (-base - 0.12, 0.85)], main)
    pen.ellipse(-0.09, -0.4, 0.61, 0.17, (95, 60, 40))
    if rng.random() < 0.4:
        pen.box(-0.6, 0.1, 0.44, 0.35, _shade(main, 0.6))
    if rng.random() < 0.6:
        for x in (-0.3, 0.1):
            pen.line([(x, -0.62), (x + 0.1, -0.72), (x, -0.84), (x + 0.1, -0.95)], 0.06, (225,) * 3)


def _cat(pen: _Pen, rng: Generator, main: Colour) -> None:
    for side in (-1, 1):
        pen.polygon([(side * 0.8, 0), (side * 0.72, -0.92), (side * 0.12, -0.5)], main)
        pen.polygon([(side * 0.66, -0.3), (side * 0.64, -0.7), (side * 0.3, -0.5)], (240, 160, 170))
    pen.ellipse(0, 0.1, 0.86, 0.74, main)
    eye = _pick(rng, "green", "yellow")
    for side in (-1, 1):
        pen.ellipse(side * 0.36, -0.05, 0.17, 0.17, eye)
        pen.ellipse(side * 0.36, -0.05, 0.06, 0.15, DARK)
        for y in (0.28, 0.42):
            pen.line([(side * 0.25, 0.32), (side * 0.95, y)], 0.04, DARK)
    pen.polygon([(-0.12, 0.2), (0.12, 0.2), (0, 0.34)], (235, 110, 130))
    pen.line([(-0.2, 0.5), (0, 0.36), (0.2, 0.5)], 0.05, DARK)


# Name, how to draw it, its usual colours (80 % of the time; any colour otherwise), and how often
# it is in a scene.
_THINGS: dict[str, tuple[Callable[[_Pen, Generator, Colour], None], tuple[str, ...], float]] = {
    "boat": (_boat, ("brown", "blue", "red"), 0.9),
    "car": (_car, ("red", "blue", "white", "green"), 1.3),
    "cat": (_cat, ("orange", "gray", "brown"), 1.2),
    "cup": (_cup, ("blue", "white", "purple"), 0.8),
    "fish": (_fish, ("orange", "blue", "yellow"), 1.0),
    "flower": (_flower, ("pink", "purple", "yellow"), 1.2),
    "heart": (_heart, ("red", "pink"), 0.8),
    "house": (_house, ("white", "yellow", "orange"), 1.2),
    "mushroom": (_mushroom, ("red", "brown"), 0.7),
    "star": (_star, ("yellow", "orange"), 0.9),
    "tree": (_tree, ("green",), 1.4),
    "umbrella": (_umbrella, ("purple", "blue", "pink"), 0.8),
}
CLASSES: tuple[str, ...] = tuple(_THINGS)

# Classes that are often seen together, in real pictures as in these.
_COMPANY = {
    "boat": ("fish",),
    "car": ("house", "tree"),
    "cat": ("house", "fish"),
    "cup": ("heart", "umbrella"),
    "fish": ("boat",),
    "flower": ("tree", "mushroom", "heart"),
    "heart": ("star", "flower"),
    "house": ("tree", "car", "cat"),
    "mushroom": ("tree", "flower"),
    "star": ("heart",),
    "tree": ("house", "mushroom"),
    "umbrella": ("cup", "car"),
}


def _pick(rng: Generator, *names: str) -> Colour:
    return COLOURS[names[rng.integers(len(names))]]


def draw_object(name: str, diameter: int, rng: Generator) -> tuple[Image.Image, str]:
    """One object of class `name`, about `diameter` px across, on a transparent RGBA ground.

    Colour, details, outline, rotation and mirroring come from `rng`. Returns the picture, cropped
    to the object, and the name of its main colour, a key of `COLOURS`.
    """
    paint, usual, _ = _THINGS[name]
    names = usual if rng.random() < 0.8 else tuple(COLOURS)
    colour_name = names[rng.integers(len(names))]
    r, g, b = np.clip(np.array(COLOURS[colour_name]) + rng.integers(-22, 23, 3), 0, 255).tolist()
    pen = _Pen(2 * diameter, outline=rng.random() < 0.6)
    paint(pen, rng, (r, g, b))
    image = pen.image
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(rng.normal(0, 14), Image.Resampling.BILINEAR, expand=True).reduce(2)
    return image.crop(image.getbbox()), colour_name


def background(size: int, rng: Generator) -> Image.Image:
    """A square RGB picture without any object: gradient, texture, and strokes and blobs."""
    base = rng.uniform(60, 225) + rng.normal(0, 18, (2, 2, 3))
    image = _smooth(base, size)
    cells = int(rng.integers(3, 16))
    image += _smooth(rng.normal(0, rng.uniform(2, 18), (cells, cells, 3)), size)
    image += rng.normal(0, rng.uniform(0, 8), (size, size, 1))
    picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(0, 7)):
        colour = tuple(np.clip(rng.uniform(40, 230) + rng.normal(0, 30, 3), 0, 255).astype(int))
        x, y = rng.uniform(0, size, 2)
        dx, dy = rng.normal(0, size * 0.12, 2)
        if rng.random() < 0.6:
            bend = rng.normal(0, size * 0.05, 2)
            points = [(x, y), (x + dx + bend[0], y + dy + bend[1]), (x + 2 * dx, y + 2 * dy)]
            draw.line(points, colour, max(1, round(size * rng.uniform(0.005, 0.025))))
        else:
            rx, ry = rng.uniform(0.01, 0.05, 2) * size
            draw.ellipse((x - rx, y - ry, x + rx, y + ry), colour)
    return picture


def _smooth(cells: np.ndarray, size: int) -> np.ndarray:
    """(n, n, 3) values spread over (size, size, 3) by bilinear interpolation."""
    channels = [
        Image.fromarray(cells[..., c].astype(np.float32)).resize(
            (size, size), Image.Resampling.BILINEAR
        )
        for c in range(3)
    ]
    return np.stack([np.asarray(c) for c in channels], axis=-1).astype(np.float64)


def single_object(name: str | None, size: int, rng: Generator) -> tuple[Image.Image, str | None]:
    """A (size, size) RGB picture of one object, or of none for None, and its colour's name.

    The object is 0.25 to 1.5 frames across, and at least 60 % of both its sides are in the frame
    or fill it. The background is drawn for the frame or for one three times as wide, like that of a
    snippet.
    """
    picture = background(size * int(rng.choice([1, 3])), rng).crop((0, 0, size, size))
    if name is None:
        return picture, None
    diameter = round(size * rng.uniform(0.25, 1.5))
    thing, colour = draw_object(name, diameter, rng)
    reach = size / 2 - diameter / 10
    x, y = size / 2 + rng.uniform(-reach, reach, 2)
    picture.paste(thing, (round(x - thing.width / 2), round(y - thing.height / 2)), thing)
    return picture, colour


def scene(size: int, rng: Generator) -> tuple[Image.Image, np.ndarray]:
    """A (size, size) RGB picture of one to five objects and its (len(CLASSES),) uint8 labels.

    The first object is the largest, and each object stays at least half visible, so that exactly
    the visible objects are labelled.
    """
    picture = background(size, rng)
    owner = np.full((size, size), -1)
    areas: list[int] = []
    labels = np.zeros(len(CLASSES), np.uint8)
    weights = np.array([weight for _, _, weight in _THINGS.values()])
    count = int(rng.choice([1, 2, 3, 4, 5], p=[0.1, 0.22, 0.3, 0.25, 0.13]))
    previous = None
    for k in range(count):
        if previous is not None and rng.random() < 0.3:
            name = str(rng.choice(_COMPANY[previous]))
        else:
            name = str(rng.choice(CLASSES, p=weights / weights.sum()))
        share = rng.uniform(0.38, 0.55) if k == 0 else rng.uniform(0.22, 0.38)
        thing, _ = draw_object(name, round(size * share), rng)
        for _ in range(8):
            x = int(rng.integers(-thing.width // 6, size - thing.width * 5 // 6))
            y = int(rng.integers(-thing.height // 6, size - thing.height * 5 // 6))
            mask = Image.new("L", (size, size))
            mask.paste(thing.getchannel("A"), (x, y))
            trial = np.where(np.asarray(mask) > 127, k, owner)
            area = int((np.asarray(thing.getchannel("A")) > 127).sum())
            visible = np.bincount(trial.ravel() + 1, minlength=k + 2)[1:]
            if all(visible[j] >= MIN_VISIBLE * a for j, a in enumerate([*areas, area])):
                break
        else:
            break
        picture.paste(thing, (x, y), thing)
        owner, previous = trial, name
        areas.append(area)
        labels[CLASSES.index(name)] = 1
    return picture, labels


def _pool(processes: int | None) -> multiprocessing.pool.Pool:
    # spawn: the caller may have threads, such as torch's, that would not survive a fork.
    return multiprocessing.get_context("spawn").Pool(processes)


def _draw_group(k: int, *, size: int, seed: int) -> tuple[np.ndarray, list[str | None]]:
    rng = np.random.default_rng([seed, 2, k])
    drawn = [single_object(name, size, rng) for name in (*CLASSES, None)]
    return np.stack([np.asarray(picture) for picture, _ in drawn]), [c for _, c in drawn]


def single_objects(
    count: int, *, size: int, seed: int, processes: int | None = None
) -> tuple[np.ndarray, list[list[str | None]]]:
    """`count` pictures of each class and of none, and the names of the objects' colours.

    The pictures are (count, len(CLASSES) + 1, size, size, 3) uint8, the empty ones last; the k-th
    of a class depends only on the seed, the class and k.
    """
    with _pool(processes) as pool:
        groups = pool.map(partial(_draw_group, size=size, seed=seed), range(count), chunksize=16)
    return np.stack([pictures for pictures, _ in groups]), [colours for _, colours in groups]


def _write_scene(job: tuple[str, int], *, output: Path, seed: int, size: int) -> list[str | int]:
    split, k = job
    rng = np.random.default_rng([seed, SPLITS.index(split), k])
    picture, labels = scene(size, rng)
    path = f"{split}/{k:06d}.jpg"
    part = output / f"{path}.part"
    picture.save(part, "JPEG", quality=90)
    part.replace(output / path)
    return [path, split, *labels.tolist()]


def write_scenes(
    output: Path,
    *,
    seed: int,
    train: int,
    test: int,
    size: int = 192,
    processes: int | None = None,
) -> None:
    """Write `output/{train,test}/000000.jpg ...` and then their labels, `output/scenes.csv`.

    The CSV has the columns `path` (relative to its folder), `split` and one 0/1 column per class,
    in the order of `CLASSES`. Picture k of a split depends only on the seed, the split and k, so
    fewer pictures are a prefix of more. `size` is the side in pixels; `processes` (None: one per
    core) affects only the time.

    Raises UserError for negative counts, a size under 64 px, and a folder that contains other
    pictures.
    """
    if train < 0 or test < 0 or size < 64:
        raise UserError(
            f"cannot draw {train} train and {test} test scenes of {size} px: "
            "give counts of 0 or more and a size of at least 64"
        )
    part = output / "scenes.csv.part"
    pictures = [file for split in SPLITS for file in (output / split).glob("*")]
    if pictures and not (part.exists() or (output / "scenes.csv").exists()):
        raise UserError(f"{pictures[0]}: exists and is not a demo scene; give a new folder")
    for split in SPLITS:
        (output / split).mkdir(parents=True, exist_ok=True)
    part.touch()
    jobs = [("train", k) for k in range(train)] + [("test", k) for k in range(test)]
    work = partial(_write_scene, output=output, seed=seed, size=size)
    with _pool(processes) as pool:
        rows = pool.map(work, jobs, chunksize=32)
    with part.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "split", *CLASSES])
        writer.writerows(rows)
    part.replace(output / "scenes.csv")
