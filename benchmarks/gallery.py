"""Make a gallery of many synthetic images and print its size and load times as JSON.

    python benchmarks/gallery.py --images 10000
    python benchmarks/gallery.py --photographs /data/VOC2007/JPEGImages

Needs chromium and chromedriver. Images are coarse noise of 500 x 375 pixels; with `--photographs`
they are repeated from a folder, so that file sizes are realistic. Scores are random. Times are
seconds until every image on the screen is drawn; each is the median of `--repeat`.

`thumbnails` compares the same thumbnails as single files and as sheets of 10 x 10: a screen of 60
in random order, as after sorting.
"""

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from cdul_steps.data.images import decode
from cdul_steps.limits import MAX_PIXELS
from cdul_steps.provenance import versions
from cdul_steps.steps.gallery import make_gallery

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/unit"))
import made

CLASSES = [f"class {c}" for c in range(20)]
DRAWN = """
const [wanted, done] = arguments;
const all = () => {
  const images = [...document.querySelectorAll(wanted)];
  const seen = images.filter((image) => {
    const box = image.getBoundingClientRect();
    return box.top < innerHeight && box.bottom > 0;
  });
  const busy = document.querySelector("[aria-busy=true]");
  if (!busy && seen.length && seen.every((image) => image.complete && image.naturalWidth))
    // A loaded image is decoded only when it is painted.
    Promise.all(seen.map((image) => image.decode())).then(() => requestAnimationFrame(done));
  else requestAnimationFrame(all);
};
all();
"""


def browser() -> webdriver.Chrome:
    """A headless chromium with an empty cache."""
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(argument)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_script_timeout(120)
    return driver


def seconds(driver: webdriver.Chrome, action, images: str = "#images img") -> float:
    """Seconds from an action until the images on the screen are drawn."""
    start = time.perf_counter()
    action()
    driver.execute_async_script(DRAWN, images)
    return time.perf_counter() - start


def load_times(page: str) -> dict[str, float]:
    """Times of one visit, and the page's final memory in MB."""
    driver = browser()

    def choose(name: str, text: str):
        return lambda: Select(driver.find_element(By.NAME, name)).select_by_visible_text(text)

    try:
        found = {
            "open": seconds(driver, lambda: driver.get(page)),
            "next_page": seconds(driver, driver.find_element(By.ID, "next").click),
            "sort": seconds(driver, choose("sort", "score, highest first")),
            "class": seconds(driver, choose("class", CLASSES[7])),
            "order_of_the_manifest": seconds(driver, choose("sort", "order of the manifest")),
        }
        found["heap_MB"] = driver.execute_script("return performance.memory.usedJSHeapSize") / 1e6
        return found
    finally:
        driver.quit()


def sheets_against_files(thumbnails: Path, folder: Path, repeat: int) -> dict[str, dict]:
    """Size of the thumbnails as files and as sheets, and the time to draw 60 of them."""
    files = sorted(thumbnails.iterdir(), key=lambda file: int(file.stem))
    files = files[: len(files) // 100 * 100]
    (folder / "sheets").mkdir(parents=True)
    cell = max(max(decode(file, max_pixels=MAX_PIXELS).size) for file in files[:100])
    for number in range(len(files) // 100):
        sheet = Image.new("RGB", (10 * cell, 10 * cell))
        for place, file in enumerate(files[100 * number : 100 * number + 100]):
            thumbnail = decode(file, max_pixels=MAX_PIXELS)
            sheet.paste(thumbnail, (place % 10 * cell, place // 10 * cell))
        sheet.save(folder / f"sheets/{number}.webp", quality=75, method=2)
    chosen = random.Random(0).sample(range(len(files)), 60)
    pages = {
        "files": "".join(f"<img width=100 src='{files[i].as_uri()}'>" for i in chosen),
        "sheets": "".join(
            f"<div style='width:{cell}px;height:{cell}px;overflow:hidden;zoom:{100 / cell}'>"
            f"<img src=sheets/{i // 100}.webp style='margin:-{i % 100 // 10 * cell}px 0 0 "
            f"-{i % 10 * cell}px'></div>"
            for i in chosen
        ),
    }
    sizes = {
        "files": sum(file.stat().st_size for file in files),
        "sheets": sum(file.stat().st_size for file in (folder / "sheets").iterdir()),
    }
    found = {}
    for name, body in pages.items():
        page = folder / f"{name}.html"
        page.write_text(f"<body style='display:flex;flex-wrap:wrap'>{body}")
        times = [open_time(page) for _ in range(repeat)]
        found[name] = {"MB": sizes[name] / 1e6, "seconds": statistics.median(times)}
    return found


def open_time(page: Path) -> float:
    """Seconds until the images of a page are drawn."""
    driver = browser()
    try:
        return seconds(driver, lambda: driver.get(page.as_uri()), "img")
    finally:
        driver.quit()


def use_photographs(photographs: Path, images: Path) -> None:
    """Replace the synthetic images with links to photographs."""
    files = sorted(photographs.rglob("*.jpg"))
    for i, image in enumerate(sorted(images.iterdir())):
        image.unlink()
        image.symlink_to(files[i % len(files)])


def main() -> None:
    """Make the gallery, visit it, and print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--photographs", type=Path, help="folder of JPEG files to use instead")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        names = [f"{i:06}.jpg" for i in range(options.images)]
        folder = Path(scratch)
        training = made.make_results(folder / "results", {"train": names}, CLASSES, (500, 375))
        if options.photographs:
            use_photographs(options.photographs.resolve(), folder / "results/demo/scenes/train")
        start, cpu = time.perf_counter(), time.process_time()
        make_gallery(folder=training, split="train", output=folder / "gallery")
        making = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        making["peak_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        size = {
            part: sum(f.stat().st_size for f in (folder / "gallery" / part).rglob("*")) / 1e6
            for part in ("data", "thumbnails")
        }
        size["index.js"] = (folder / "gallery/data/index.js").stat().st_size / 1e6
        visits = [
            load_times((folder / "gallery/index.html").as_uri()) for _ in range(options.repeat)
        ]
        thumbnails = sheets_against_files(
            folder / "gallery/thumbnails", folder / "sheets", options.repeat
        )
    result = {
        "images": options.images,
        "classes": len(CLASSES),
        "photographs": bool(options.photographs),
        "making": making,
        "size_MB": size,
        "visit": {name: statistics.median(v[name] for v in visits) for name in visits[0]},
        "thumbnails": thumbnails,
        "cores": os.cpu_count(),
        "software": versions("pillow", "selenium"),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
