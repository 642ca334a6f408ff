"""The page of a check in a browser, as a person uses it."""

from pathlib import Path

from browsers import wait_until
from selenium.webdriver.common.by import By


def open_page(driver, check: Path) -> None:
    driver.get("about:blank")
    driver.get((check / "index.html").as_uri())
    wait_until(driver, lambda d: find(d, "question").text != "Loading")


def find(driver, name: str):
    return driver.find_element(By.ID, name)


def question(driver) -> str:
    return find(driver, "question").text


def close_and_open_again(driver, check: Path) -> None:
    """Close the page's tab, and open the page in another one."""
    driver.switch_to.new_window("tab")
    driver.switch_to.window(driver.window_handles[0])
    driver.close()
    driver.switch_to.window(driver.window_handles[0])
    open_page(driver, check)


def download(driver, folder: Path) -> Path:
    """The file that the page gives."""
    for file in folder.iterdir():
        file.unlink()
    find(driver, "download").click()
    wait_until(driver, lambda d: (folder / "answers.csv").is_file())
    return folder / "answers.csv"
