"""The report in a browser, as readers have it: nothing complains, nothing is asked of a network, tables sort, all fits."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from robust_pl.evaluation.gather import gather
from robust_pl.report.html import as_page

from .made_runs import add_analyses, add_test, add_views, make_run
from .test_html_report import EVIL, FGSM, PGD, RIGHT, WORSE

REQUIRED = os.environ.get("ROBUST_PL_BROWSER") == "required"
WIDTHS = (1400, 390)
LOOKS = count()

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs with all there is, of which one is called what no page should run."""
    root = tmp_path_factory.mktemp("runs")
    folders = [make_run(root / name, width=width) for name, width in (("first", 32), ("second", 64), (EVIL, 128))]
    for folder, clean, shift in zip(folders, (RIGHT, PGD, FGSM), (0.0, 0.125, 0.25), strict=True):
        add_test(folder, clean, {"pgd": PGD, "fgsm": FGSM}, class_names=["cat", WORSE])
        add_analyses(folder, shift=shift)
        add_views(folder)
    (folders[1] / "compute.json").write_text("{")
    path = root / "report.html"
    path.write_text(as_page(gather(folders)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; where it is not there these tests are skipped, unless ROBUST_PL_BROWSER=required."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        reason = "chromium or chromedriver is not on the path: on Debian, apt-get install chromium chromium-driver"
        if REQUIRED:
            pytest.fail(reason)
        pytest.skip(reason)
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed") if not REQUIRED else None
    if webdriver is None:
        from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(argument)
    options.page_load_strategy = "none"  # a busy machine may need longer than the driver waits
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driven = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield driven
    driven.quit()


def look(browser: Any, page: Path, width: int) -> str:
    """Open the page on a screen of this width, and wait until all plots are drawn; returns its address."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    )
    address = f"{page.as_uri()}?{next(LOOKS)}"  # tells this look from the one before
    browser.get(address)
    until = time.monotonic() + 300
    while browser.execute_script("return [location.href, document.documentElement.dataset.drawn]") != [address, "yes"]:
        assert time.monotonic() < until, "the plots were not drawn"
        time.sleep(0.05)
    return address


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_complains_nothing_is_asked_and_nothing_is_too_wide(browser: Any, page: Path, width: int) -> None:
    browser.get_log("browser"), browser.get_log("performance")
    address = look(browser, page, width)
    # Folds are opened, so that all of the page is looked at.
    browser.execute_script("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    drawn = "return document.querySelectorAll('.drawing:not([data-drawn])').length"
    until = time.monotonic() + 300
    while browser.execute_script(drawn) and time.monotonic() < until:
        time.sleep(0.05)
    assert browser.execute_script(drawn) == 0
    plots = browser.execute_script(
        "return [...document.querySelectorAll('.drawing')].map((one) => one.querySelectorAll('svg').length)"
    )
    assert len(plots) >= 12 and min(plots) >= 1
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [address]
    inner, outer = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert inner <= outer == width
    # Wide tables and long lines scroll in their own frames; nothing else reaches over the edge.
    over = """return [...document.querySelectorAll("main *")].filter((one) => !one.closest(".table, .code")
        && one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 80))"""
    assert browser.execute_script(over) == []
    # What a run is called is text, and runs nothing.
    assert EVIL in browser.find_element("css selector", "header").text


def test_a_script_that_is_not_the_pages_own_does_not_run(browser: Any, page: Path) -> None:
    """Were a name ever not escaped, this is what it would look like."""
    foul = page.with_name("foul.html")
    foul.write_text(
        page.read_text(encoding="utf-8").replace(
            "<main>", "<main><script>window.foul = 1</script><img src=x onerror='window.foul = 2'>"
        ),
        encoding="utf-8",
    )
    look(browser, foul, 1400)
    assert browser.execute_script("return window.foul") is None
    said = " ".join(entry["message"] for entry in browser.get_log("browser"))
    assert "Content Security Policy" in said


def column(browser: Any, caption: str, place: int) -> list[str]:
    return browser.execute_script(
        f"{TABLE} return [...table.tBodies[0].rows].map((row) => row.cells[arguments[1]].innerText.trim())", caption, place
    )


TABLE = "const table = [...document.querySelectorAll('table')].find((one) => one.caption.innerText === arguments[0]);"


def test_a_click_or_a_key_sorts_a_table(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    look(browser, page, 1400)
    caption = "Accuracy in % on Digits, with 95 % intervals"
    assert [text.split()[0] for text in column(browser, caption, 2)] == ["87.50", "62.50", "87.50"]
    heading = browser.execute_script(f"{TABLE} return table.tHead.rows[0].cells[2]", caption)
    button = heading.find_element("css selector", "button")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert [text.split()[0] for text in column(browser, caption, 2)] == ["62.50", "87.50", "87.50"]
    assert column(browser, caption, 0) == ["second", "first", EVIL]
    button.send_keys(Keys.ENTER)
    assert heading.get_attribute("aria-sort") == "descending"
    assert column(browser, caption, 0) == ["first", EVIL, "second"]
    # By name; and numbers as numbers, of which what is missing comes last either way.
    name = browser.execute_script(f"{TABLE} return table.tHead.rows[0].cells[0].firstElementChild", caption)
    name.click()
    assert heading.get_attribute("aria-sort") is None and column(browser, caption, 0)[1:] == ["first", "second"]
    sheet = "sheet, shares in %"
    share = browser.execute_script(f"{TABLE} return table.tHead.rows[0].cells[2].firstElementChild", sheet)
    for expected in (["25.00", "37.50", "50.00"], ["50.00", "37.50", "25.00"]):
        share.click()
        assert column(browser, sheet, 2) == [*expected, *["–"] * 3]  # noqa: RUF001


def test_dark_screens_get_dark_plots(browser: Any, page: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]})
    try:
        look(browser, page, 1400)
        shades = browser.execute_script(
            "const of = (one, key) => getComputedStyle(one)[key];"
            "return [of(document.body, 'backgroundColor'), of(document.body, 'color'),"
            " of(document.querySelector('.xtick text'), 'fill')]"
        )
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    ground, ink, tick = (sum(map(int, shade[shade.index("(") + 1 : -1].split(",")[:3])) / 3 for shade in shades)
    assert ground < 40 and ink > 200 and tick > 140


def test_print_shows_every_plot_in_the_width_of_paper(browser: Any, page: Path) -> None:
    look(browser, page, 1400)
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    widths = "return [...document.querySelectorAll('.drawing[data-drawn] .main-svg:first-child')].map((one) => one.clientWidth)"
    assert set(browser.execute_script(widths)) == {640}
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert min(browser.execute_script(widths)) != 640 or max(browser.execute_script(widths)) != 640
