"""Small copies of images, for pages that show them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from cdul_steps.data.images import ImageError, decode
from cdul_steps.progress import Progress


def write_thumbnails(
    paths: Sequence[str], folder: Path, *, side: int, quality: int, max_pixels: int, what: str
) -> list[bool]:
    """Write `{place}.webp` to a new folder for every image; returns whether each could be read.

    No side exceeds `side` pixels; `quality` is WebP's, 0 to 100. `what` labels the progress.
    """
    folder.mkdir()

    def write(place: int) -> bool:
        try:
            image = decode(paths[place], max_pixels=max_pixels)
        except ImageError:
            return False
        image.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2)
        image.save(folder / f"{place}.webp", quality=quality, method=2)
        return True

    written = []
    with ThreadPoolExecutor() as pool, Progress(what, len(paths), "images") as progress:
        for done in pool.map(write, range(len(paths))):
            written.append(done)
            progress.update()
    return written
