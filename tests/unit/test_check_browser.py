"""The page of a check in a real browser, opened from disk."""

import json
from collections.abc import Iterator
from pathlib import Path

import made
import pytest
from axe_core_python.selenium import Axe
from browsers import PHONE, focused, press, start_browser, wait_until
from check_page import close_and_open_again, download, find, open_page, question
from selenium import webdriver
from selenium.webdriver import Keys

from cdul_steps.data.corrections import read_corrections
from cdul_steps.tools.check import draw_sample, estimate_scores

CLASSES = ["boat", "<script>hit=1</script>", 'cat, "black"']
NAMES = [f"{i:03}.jpg" for i in range(60)] + ['a",b=x.jpg']
LATER = 10

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def check(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    training = made.make_results(folder / "results", {"train": NAMES}, CLASSES)
    draw_sample(
        scores=training / "predictions/train.parquet",
        output=folder / "a check #1",
        number=60,
        seed=0,
        threshold=None,
        only=[],
        corrections=None,
    )
    return folder / "a check #1"


@pytest.fixture(scope="module")
def questions(check) -> list[tuple[str, str, int, bool]]:
    """The questions in order: image, class, number of the picture, whether it is predicted."""
    text = (check / "data/index.js").read_text(encoding="ascii")
    found = json.loads(text.removeprefix("part(").removesuffix(");\n"))["questions"]
    return [(image_id, CLASSES[c], place, named) for image_id, c, place, named in found]


@pytest.fixture(scope="module")
def downloads(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def chromium(downloads) -> Iterator[webdriver.Chrome]:
    driver = start_browser(prefs={"download.default_directory": str(downloads)})
    yield driver
    driver.quit()


@pytest.fixture
def driver(chromium, check) -> Iterator[webdriver.Chrome]:
    """The page without answers; any console output is an error."""
    open_page(chromium, check)
    chromium.execute_script("localStorage.clear()")
    open_page(chromium, check)
    yield chromium
    assert chromium.get_log("browser") == []
    assert chromium.execute_script("return window.hit") is None


def expected_key(entry: tuple) -> str:
    """The answer that agrees with the score, so that no question is repeated."""
    return "y" if entry[3] else "n"


def test_fifty_answers_by_keyboard_outlive_the_tab(driver, check, questions, downloads):
    for entry in questions[:50]:
        assert question(driver) == f"{entry[1]}?"
        press(driver, expected_key(entry))
    assert find(driver, "status").text.startswith("50 of 60; precision so far ")
    close_and_open_again(driver, check)
    assert find(driver, "status").text.startswith("50 of 60")
    assert question(driver) == f"{questions[50][1]}?"
    for entry in questions[50:]:
        press(driver, expected_key(entry))
    assert question(driver) == "All answered: download the answers"
    file = download(driver, downloads)
    answers = read_corrections(file)
    assert answers == {(i, name): float(named) for i, name, _, named in questions}
    assert estimate_scores(file, check)["answers"] == 60


@pytest.mark.parametrize(
    ("named", "looks"),
    [(True, "nn"), (True, "nyyy"), (False, "yyy"), (False, "ynn"), (False, "yu")],
)
def test_a_surprising_answer_is_asked_until_one_leads_by_two(
    driver, questions, downloads, named, looks
):
    """Below the threshold, the score counts as one no."""
    place = next(i for i, entry in enumerate(questions) if entry[3] == named)
    others = iter([*questions[:place], *questions[place + 1 :]])
    for _ in range(place):
        press(driver, expected_key(next(others)))
    for number, look in enumerate(looks):
        again = "Look again: " if number else ""
        assert question(driver) == f"{again}{questions[place][1]}?"
        press(driver, look)
        for _ in range(LATER):
            entry = next(others)
            assert question(driver) == f"{entry[1]}?"
            press(driver, expected_key(entry))
    assert question(driver) == f"{next(others)[1]}?"
    answers = read_corrections(download(driver, downloads))
    assert answers[questions[place][:2]] == {"y": 1, "n": 0, "u": 0.5}[looks[-1]]


def test_back_takes_an_answer_back_and_u_cannot_tell(driver, questions, downloads):
    assert find(driver, "back").get_property("disabled")
    press(driver, "u", "y", "b")
    assert question(driver) == f"{questions[1][1]}?"
    press(driver, "u", Keys.BACKSPACE, "u")
    answers = read_corrections(download(driver, downloads))
    assert answers == {entry[:2]: 0.5 for entry in questions[:2]}


def test_the_photograph_is_shown_and_its_name_is_not(driver, questions):
    photograph = find(driver, "photograph")
    wait_until(driver, lambda d: photograph.get_property("naturalWidth") > 0)
    assert photograph.get_property("src").endswith(f"images/{questions[0][2]}.webp")
    assert photograph.get_dom_attribute("alt") == "photograph 1 of 60"
    assert photograph.size["height"] > 400


def test_buttons_by_tab_and_enter(driver, questions):
    press(driver, Keys.TAB)
    assert focused(driver) == find(driver, "yes")
    press(driver, Keys.TAB, Keys.ENTER)
    assert question(driver) == f"{questions[1][1]}?"
    assert focused(driver) == find(driver, "no")


def test_answers_that_cannot_be_kept_are_told(driver, check):
    script = "Storage.prototype.setItem = () => { throw new Error('full') }"
    driver.execute_script(script)
    press(driver, "y")
    assert "This browser cannot store the answers" in find(driver, "status").text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible_by_axe(scheme, driver):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    press(driver, "y")
    found = Axe().run(driver, options={"resultTypes": ["violations"]})["violations"]
    assert found == [], "\n".join(f"{v['id']}: {v['nodes'][0]['html']}" for v in found)


def test_on_a_phone_all_is_on_one_screen(check, questions):
    driver = start_browser(mobileEmulation={"deviceMetrics": PHONE})
    try:
        open_page(driver, check)
        shown = ["question", "photograph", "yes", "no", "unknown", "back", "status", "download"]
        for name in shown:
            place = find(driver, name).rect
            assert place["x"] >= 0 and place["x"] + place["width"] <= PHONE["width"], name
            assert place["y"] + place["height"] <= PHONE["height"], name
        assert find(driver, "photograph").size["height"] > 300
        assert all(find(driver, name).size["height"] >= 44 for name in ("yes", "no"))
        find(driver, "yes").click()
        wait_until(driver, lambda d: question(d).endswith(f"{questions[1][1]}?"))
    finally:
        driver.quit()


def test_a_missing_data_file_is_told(driver, check, tmp_path):
    driver.get("about:blank")
    copy = tmp_path / "check"
    copy.mkdir()
    for name in ("index.html", "check.js", "check.css", "shared.js", "shared.css", "icon.svg"):
        (copy / name).write_bytes((check / name).read_bytes())
    driver.get((copy / "index.html").as_uri())
    wait_until(driver, lambda d: question(d) != "Loading")
    assert question(driver) == "data/index.js cannot be read; draw the check again"
    assert len(driver.get_log("browser")) == 1
