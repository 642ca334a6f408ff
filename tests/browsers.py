"""A real browser for testing pages: headless Chromium."""

import shutil

import pytest
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.support.ui import WebDriverWait

PHONE = {"width": 360, "height": 740, "pixelRatio": 2, "touch": True}


def start_browser(**experimental: object) -> webdriver.Chrome:
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("no chromium with chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in (
        "--headless=new",
        "--no-sandbox",  # chromium refuses to run as root with it
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1280,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for name, value in experimental.items():
        options.add_experimental_option(name, value)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def wait_until(driver, holds) -> None:
    WebDriverWait(driver, 20).until(holds)


def focused(driver):
    return driver.switch_to.active_element


def press(driver, *keys: str) -> None:
    for key in keys:
        ActionChains(driver).send_keys(key).perform()
