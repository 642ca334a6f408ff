"""A gallery in a real browser: headless Chromium, with a page opened from disk."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import made
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from axe_core_python.selenium import Axe
from browsers import PHONE, focused, press, start_browser, wait_until
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from cdul_steps.data.corrections import read_corrections
from cdul_steps.data.tables import read_scores, write_table
from cdul_steps.steps.gallery import make_gallery

CLASSES = ["boat", "<script>hit=1</script>", "cat"]
HOSTILE = 'a"><img src=x onerror=hit=1>.jpg'
NAMES = [HOSTILE if i == 4 else f"{i:03}.jpg" for i in range(131)]


pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("made") / "results"
    return made.make_results(results, {"train": NAMES}, CLASSES)


@pytest.fixture(scope="module")
def page(training) -> str:
    folder = training.parents[4] / "a gallery #1"
    make_gallery(folder=training, split="train", output=folder)
    return (folder / "index.html").as_uri()


@pytest.fixture(scope="module")
def scores(training) -> dict[str, np.ndarray]:
    """Scores of all shown images by kind, float (images, C), and their ids."""
    tables = {
        "CLIP": training.parent / "pseudo_labels.parquet",
        "refined": training / "refined_labels.parquet",
        "classifier": training / "predictions/train.parquet",
    }
    found = {kind: read_scores(table)[2].astype(float) for kind, table in tables.items()}
    ids = read_scores(tables["CLIP"])[0]["image_id"].to_pylist()
    return found | {"id": np.array(ids)}


@pytest.fixture(scope="module")
def downloads(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def chromium(downloads) -> Iterator[webdriver.Chrome]:
    driver = start_browser(prefs={"download.default_directory": str(downloads)})
    yield driver
    driver.quit()


@pytest.fixture
def driver(chromium, page) -> Iterator[webdriver.Chrome]:
    """The newly opened page; any console output is an error."""
    chromium.get("about:blank")
    chromium.get(page)
    assert status(chromium) == "130 of 130 images, page 1 of 3"
    yield chromium
    assert chromium.get_log("browser") == []
    assert chromium.execute_script("return window.hit") is None


def status(driver) -> str:
    """The page's status line, once the images are there."""
    images = driver.find_element(By.ID, "images")
    wait_until(driver, lambda d: images.get_dom_attribute("aria-busy") == "false")
    return driver.find_element(By.ID, "status").text


def opened(driver) -> str:
    """The name of the image in the viewer, once it is open."""
    wait_until(driver, lambda d: d.find_element(By.ID, "viewer").is_displayed())
    return driver.find_element(By.ID, "viewer-title").text


def field(driver, name: str):
    return driver.find_element(By.NAME, name)


def choose(driver, name: str, text: str) -> None:
    Select(field(driver, name)).select_by_visible_text(text)


def fill(driver, name: str, value: float) -> None:
    field(driver, name).clear()
    field(driver, name).send_keys(str(value))


def cards(driver) -> list:
    return driver.find_elements(By.CSS_SELECTOR, "#images .card")


def names(driver) -> list[str]:
    """Ids of the images on the page, in order."""
    status(driver)
    script = "return [...document.querySelectorAll('#images .name')].map(e => e.textContent)"
    return driver.execute_script(script)


def in_order(ids: np.ndarray, values: np.ndarray) -> list[str]:
    """The first page by decreasing value in thousandths; ties keep the manifest's order."""
    return ids[np.argsort(-np.rint(1000 * values), kind="stable")][:60].tolist()


def test_filter_by_class_score_and_disagreement(driver, scores):
    boat = scores["classifier"][:, 0]
    choose(driver, "class", "boat")
    choose(driver, "kind", "classifier")
    choose(driver, "sort", "manifest order")
    fill(driver, "from", 0.4)
    fill(driver, "to", 0.9)
    rounded = np.rint(1000 * boat)
    fits = (rounded >= 400) & (rounded <= 900)
    assert status(driver) == f"{fits.sum()} of 130 images, page 1 of 1"
    assert names(driver) == scores["id"][fits].tolist()
    fill(driver, "differ", 0.3)
    fits &= np.rint(1000 * abs(boat - scores["CLIP"][:, 0])) >= 300
    assert names(driver) == scores["id"][fits].tolist() != []

    fill(driver, "from", 0.95)
    assert status(driver) == "0 of 130 images: widen the score range, or reset"
    driver.find_element(By.CSS_SELECTOR, "button[type=reset]").click()
    wait_until(driver, lambda d: status(d) == "130 of 130 images, page 1 of 3")


@pytest.mark.parametrize("kind", ["CLIP", "refined"])
def test_sort(kind, driver, scores):
    values, ids = scores[kind], scores["id"]
    uncertainty = 1 - abs(2 * values - 1)
    choose(driver, "kind", kind)
    assert names(driver) == in_order(ids, uncertainty.mean(1))
    choose(driver, "class", "cat")
    assert names(driver) == in_order(ids, uncertainty[:, 2])
    apart = abs(scores["classifier"] - scores["CLIP"])
    for label, by in {
        "score, highest first": values[:, 2],
        "score, lowest first": -values[:, 2],
        "change by refinement": abs(scores["refined"] - scores["CLIP"])[:, 2],
        "CLIP/classifier disagreement": apart[:, 2],
    }.items():
        choose(driver, "sort", label)
        assert names(driver) == in_order(ids, by)


def test_pages(driver):
    choose(driver, "sort", "manifest order")
    first = names(driver)
    assert len(first) == 60
    assert driver.find_element(By.ID, "previous").get_property("disabled")
    for page, count in ((2, 60), (3, 10)):
        driver.find_element(By.ID, "next").click()
        assert status(driver) == f"130 of 130 images, page {page} of 3"
        assert len(names(driver)) == count
    assert driver.find_element(By.ID, "next").get_property("disabled")
    images = driver.find_elements(By.CSS_SELECTOR, "#images img")
    assert all(image.get_dom_attribute("loading") == "lazy" for image in images)
    done = "return [...document.querySelectorAll('#images img')].every(i => i.naturalWidth > 0)"
    wait_until(driver, lambda d: d.execute_script(done))


def test_hovering_shows_the_snippets(driver):
    card = cards(driver)[1]
    grid = card.find_element(By.CSS_SELECTOR, ".grid")
    assert not grid.is_displayed()
    ActionChains(driver).move_to_element(card).perform()
    assert grid.is_displayed()
    cells = grid.find_elements(By.CSS_SELECTOR, ".snippet")
    assert len(cells) == 9
    image = card.find_element(By.TAG_NAME, "img").rect
    for i, cell in enumerate(cells):
        name, score = cell.text.split("\n")
        assert name in CLASSES and 0 <= float(score) <= 1
        assert cell.rect["x"] == pytest.approx(image["x"] + i % 3 * image["width"] / 3, abs=1)
        assert cell.rect["y"] == pytest.approx(image["y"] + i // 3 * image["height"] / 3, abs=1)
    ActionChains(driver).move_to_element(driver.find_element(By.ID, "title")).perform()
    assert not grid.is_displayed()


def test_keyboard_alone(driver):
    ActionChains(driver).send_keys(Keys.TAB).perform()
    assert focused(driver).text == "Skip to the images"
    press(driver, Keys.ENTER, Keys.TAB)
    assert focused(driver) == cards(driver)[0]
    assert cards(driver)[0].find_element(By.CSS_SELECTOR, ".grid").is_displayed()
    columns = len({card.rect["x"] for card in cards(driver)})
    press(driver, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert focused(driver) == cards(driver)[1 + columns]
    press(driver, Keys.ARROW_UP, Keys.ARROW_LEFT)
    assert focused(driver) == cards(driver)[0]

    press(driver, Keys.ENTER)
    assert opened(driver) == names(driver)[0]
    press(driver, Keys.ARROW_RIGHT)
    wait_until(driver, lambda d: opened(d) == names(d)[1])
    viewer = driver.find_element(By.ID, "viewer")
    assert len(viewer.find_elements(By.CSS_SELECTOR, ".snippet")) == 9
    rows = viewer.find_elements(By.CSS_SELECTOR, "tbody tr")
    assert {row.find_element(By.TAG_NAME, "th").text for row in rows} == set(CLASSES)
    press(driver, Keys.ESCAPE)
    assert not viewer.is_displayed()
    assert focused(driver) == cards(driver)[0]


def answer(driver, name: str) -> Select:
    """The answer field for a class of the image in the viewer."""
    viewer = driver.find_element(By.ID, "viewer")
    rows = viewer.find_elements(By.CSS_SELECTOR, "tbody tr")
    row = next(r for r in rows if r.find_element(By.TAG_NAME, "th").text == name)
    return Select(row.find_element(By.TAG_NAME, "select"))


def test_corrections_outlive_the_tab_and_go_into_a_file(driver, downloads):
    download = driver.find_element(By.ID, "download")
    assert not download.is_displayed()
    name = names(driver)[0]
    cards(driver)[0].click()
    assert opened(driver) == name
    answer(driver, "boat").select_by_visible_text("yes")
    answer(driver, "cat").select_by_visible_text("unknown")
    answer(driver, CLASSES[1]).select_by_visible_text("no")
    answer(driver, "boat").select_by_visible_text("no")
    # An arrow key in a list selects an entry and does not change the image.
    press(driver, Keys.ARROW_LEFT, Keys.ESCAPE)
    wait_until(driver, lambda d: "corrected: boat no" in cards(d)[0].text)
    assert focused(driver) == cards(driver)[0]
    driver.refresh()
    wait_until(driver, lambda d: d.find_element(By.ID, "download").is_displayed())
    cards(driver)[0].click()
    assert opened(driver) == name
    assert answer(driver, "cat").first_selected_option.text == "unknown"
    answer(driver, "cat").select_by_value("")
    press(driver, Keys.ESCAPE)
    driver.find_element(By.ID, "download").click()
    file = downloads / "corrections.csv"
    wait_until(driver, lambda d: file.is_file())
    found = read_corrections(file)
    assert found == {(name, "boat"): 0.0, (name, CLASSES[1]): 0.0}
    driver.execute_script("localStorage.clear()")


def test_corrections_of_before_are_in_the_file_too(training, driver, downloads, tmp_path):
    results = shutil.copytree(training.parents[3], tmp_path / "results")
    labels = results / training.relative_to(training.parents[3]).parent / "pseudo_labels.parquet"
    table = pq.read_table(labels)
    scores = table["boat"].to_numpy().copy()
    scores[7] = 1
    column = table.column_names.index("boat")
    table = table.set_column(column, "boat", pa.array(scores))
    corrected = pa.array([["boat"] if row == 7 else [] for row in range(len(table))])
    write_table(table.append_column("corrected", corrected), labels)
    make_gallery(folder=labels.parent, split="train", output=tmp_path / "gallery")
    driver.get((tmp_path / "gallery/index.html").as_uri())
    wait_until(driver, lambda d: d.find_element(By.ID, "download").is_displayed())
    (downloads / "corrections.csv").unlink(missing_ok=True)
    driver.find_element(By.ID, "download").click()
    wait_until(driver, lambda d: (downloads / "corrections.csv").is_file())
    found = read_corrections(downloads / "corrections.csv")
    assert found == {(table["image_id"][7].as_py(), "boat"): 1.0}


def test_labels_of_test_images_are_not_corrected(training, driver, tmp_path):
    make_gallery(folder=training, split="train", output=tmp_path / "gallery")
    index = tmp_path / "gallery/data/index.js"
    assert '"corrections":[]' in index.read_text()
    index.write_text(index.read_text().replace('"corrections":[]', '"other":[]'))
    driver.get((tmp_path / "gallery/index.html").as_uri())
    wait_until(driver, lambda d: cards(d))
    cards(driver)[0].click()
    opened(driver)
    assert not driver.find_elements(By.CSS_SELECTOR, "#viewer select")


def test_focus_goes_through_the_form_to_the_pages_to_the_images(driver):
    ActionChains(driver).send_keys(Keys.TAB).perform()
    seen = []
    for _ in range(10):
        ActionChains(driver).send_keys(Keys.TAB).perform()
        element = focused(driver)
        seen.append(element.get_dom_attribute("name") or element.get_dom_attribute("id"))
    reset = card = None
    controls = ["class", "kind", "from", "to", "differ", "sort", "truth", reset]
    assert seen == [*controls, "next", card]
    assert focused(driver) == cards(driver)[0]


def test_names_are_text_and_nothing_else(driver):
    choose(driver, "sort", "manifest order")
    assert f"train/{HOSTILE}" in names(driver)
    options = [option.text for option in Select(field(driver, "class")).options]
    assert options == ["any", *CLASSES]
    choose(driver, "class", CLASSES[1])
    card = cards(driver)[names(driver).index(f"train/{HOSTILE}")]
    assert card.accessible_name.startswith(f"train/{HOSTILE}; {CLASSES[1]} CLIP ")
    card.click()
    assert opened(driver) == f"train/{HOSTILE}"
    link = driver.find_element(By.LINK_TEXT, "Original").get_property("href")
    assert driver.find_elements(By.CSS_SELECTOR, "img[src=x], main script, dialog script") == []
    driver.get(link)
    assert driver.find_element(By.TAG_NAME, "img").size["width"] > 0
    assert driver.get_log("browser") == []


def test_an_image_in_an_archive_has_no_link(training, driver, tmp_path):
    make_gallery(folder=training, split="train", output=tmp_path / "gallery")
    for file in (tmp_path / "gallery/data").glob("page-*.js"):
        text = re.sub(r'"link":"[^"]*"', '"link":null', file.read_text())
        file.write_text(text)
    driver.get((tmp_path / "gallery/index.html").as_uri())
    assert "1 of 3" in status(driver)
    cards(driver)[0].click()
    assert opened(driver) == names(driver)[0]
    assert "pixels" in driver.find_element(By.ID, "viewer-body").text
    assert driver.find_elements(By.CSS_SELECTOR, "dialog a") == []


def test_a_script_in_the_page_would_not_run(driver):
    image = '<img src="none.png" onerror="hit=1">'
    driver.execute_script("document.body.insertAdjacentHTML('beforeend', arguments[0])", image)
    said = []

    def said_both(driver) -> bool:
        """Whether the console reports the script and the image, in any order."""
        said.extend(entry["message"] for entry in driver.get_log("browser"))
        return all(what in str(said) for what in ("Content Security Policy", "ERR_FILE_NOT_FOUND"))

    wait_until(driver, said_both)


def test_what_the_labels_are_made_with_is_said(driver):
    driver.find_element(By.TAG_NAME, "summary").click()
    text = driver.find_element(By.ID, "meaning").text
    assert "construction final; tau 0.1667 (3 times the model's own); zeta 0.05" in text
    assert "calibrated so that the labels of an image sum to it" in text


def test_the_truth_is_shown_when_asked_for(driver):
    assert driver.find_elements(By.CSS_SELECTOR, ".truth") == []
    field(driver, "truth").click()
    assert len(names(driver)) == 60
    texts = [e.text.partition(":")[0] for e in driver.find_elements(By.CSS_SELECTOR, ".truth")]
    assert len(texts) == 60
    assert set(texts) == {"truth", "truth unknown"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible_by_axe(scheme, driver):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    field(driver, "truth").click()
    # The last page, with ten images: axe needs many seconds for a full page.
    for page in (2, 3):
        driver.find_element(By.ID, "next").click()
        assert f"page {page} of 3" in status(driver)
    for in_viewer in (False, True):
        if in_viewer:
            cards(driver)[0].click()
            assert opened(driver) == names(driver)[0]
        found = Axe().run(driver, options={"resultTypes": ["violations"]})["violations"]
        assert found == [], "\n".join(f"{v['id']}: {v['nodes'][0]['html']}" for v in found)


def test_a_missing_data_file_is_told(training, driver, tmp_path):
    make_gallery(folder=training, split="train", output=tmp_path / "gallery")
    (tmp_path / "gallery/data/class-0.js").unlink()
    driver.get((tmp_path / "gallery/index.html").as_uri())
    assert "1 of 3" in status(driver)
    choose(driver, "class", "boat")
    assert status(driver) == "data/class-0.js cannot be read; build the gallery again"
    assert len(driver.get_log("browser")) == 1


def test_on_a_phone(page):
    driver = start_browser(mobileEmulation={"deviceMetrics": PHONE})
    try:
        driver.get(page)
        assert "1 of 3" in status(driver)
        assert driver.execute_script("return document.documentElement.scrollWidth") == 360
        assert len({card.rect["x"] for card in cards(driver)}) == 1
        for control in driver.find_elements(By.CSS_SELECTOR, "form select, button:not(.card)"):
            if control.is_displayed():
                assert control.rect["height"] >= 40
        cards(driver)[2].click()
        assert opened(driver) == names(driver)[2]
        viewer = driver.find_element(By.ID, "viewer")
        assert viewer.rect["width"] <= 360
        assert viewer.find_element(By.CSS_SELECTOR, ".grid").is_displayed()
        assert viewer.find_element(By.CSS_SELECTOR, "table").rect["width"] <= 360
        driver.find_element(By.ID, "close").click()
        assert not viewer.is_displayed()
        assert driver.get_log("browser") == []
    finally:
        driver.quit()


def test_what_is_not_found_is_said_and_what_was_seen_instead(chromium, tmp_path):
    context = ["tree", "river", "wall", "sky"]
    training = made.make_results(tmp_path / "results", {"train": NAMES[:40]}, context=context)
    make_gallery(folder=training, split="train", output=tmp_path / "page")
    chromium.get((tmp_path / "page/index.html").as_uri())
    choose(chromium, "sort", "manifest order")
    shown = names(chromium)
    tables = (
        training.parent / "pseudo_labels.parquet",
        training / "refined_labels.parquet",
        training / "predictions/train.parquet",
    )
    best = np.max([read_scores(table)[2].max(axis=1) for table in tables], axis=0)
    empty = best < 0.5
    assert 0 < empty.sum() < len(shown)
    for card, nothing in zip(cards(chromium), empty, strict=True):
        text = card.find_element(By.CSS_SELECTOR, ".context").text
        share, _, name = text.removeprefix("context ").partition(": ")
        assert 0 <= float(share) <= 1 and name.split()[0] in context
        assert text in card.accessible_name
        assert ("nothing found" in card.accessible_name) == nothing
        assert len(card.find_elements(By.CSS_SELECTOR, ".empty")) == nothing
    cards(chromium)[int(np.argmax(empty))].click()
    opened(chromium)
    body = chromium.find_element(By.ID, "viewer-body").text
    assert "nothing found" in body and body.count("context ") == 1
    chromium.find_element(By.ID, "close").click()
    chromium.find_element(By.TAG_NAME, "summary").click()
    assert "went to context names" in chromium.find_element(By.ID, "meaning").text
    assert chromium.get_log("browser") == []
