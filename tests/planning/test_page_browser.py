"""A plan's page in a browser: nothing fails or is loaded, the filter and the maps work, the keyboard reaches everything, phones and the
dark are served. Screenshots go to the folder that SPARSIFY_SCREENSHOTS names."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from sparsify.planning.page import data
from tests.support import plans

pytestmark = pytest.mark.slow
pytest.importorskip("selenium", reason='the browser is driven by selenium: pip install "sparsify-compiler[browser]"')

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
PLAN = plans.plan(layers=14, heads=6, length=4096)
SIZES = {"desktop": (1400, 1000), "phone": (390, 844)}


@pytest.fixture(scope="module")
def driver():
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no Chromium with its chromedriver here (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)) as started:
        yield started


@pytest.fixture
def browser(driver, tmp_path):
    """The page, opened anew on a desktop in the light."""
    (tmp_path / "report.html").write_text(PLAN.to_html(title=plans.HOSTILE), encoding="utf-8")
    driver.get_log("browser")
    show(driver, "desktop", "light")
    driver.get((tmp_path / "report.html").as_uri())
    return driver


def show(browser, size: str, scheme: str) -> None:
    width, height = SIZES[size]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})


def press(browser, *keys: str) -> None:
    for key in keys:
        browser.switch_to.active_element.send_keys(key)


def visible_rows(browser) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll('.sites tbody tr:not([hidden]) th')].map(one => one.textContent.split(' ')[0])"
    )


def test_nothing_fails_runs_or_is_loaded(browser):
    assert browser.get_log("browser") == []
    assert browser.title == f"{plans.HOSTILE} – sparsify explain"
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.find_element(By.TAG_NAME, "h1").text == plans.HOSTILE


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_phones_and_the_dark(browser, size, scheme, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    show(browser, size, scheme)
    width = SIZES[size][0]
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    # what is wider than the page scrolls by itself
    scrolls = "return [...document.querySelectorAll('.scroll')].every(one => getComputedStyle(one).overflowX == 'auto')"
    assert browser.execute_script(scrolls)
    folder = Path(os.environ.get("SPARSIFY_SCREENSHOTS") or tmp_path)
    file = folder / f"{size}-{scheme}.png"
    browser.execute_script("document.querySelector('.density').scrollIntoView()")
    browser.save_screenshot(str(file))
    shades = torch.from_numpy(image.imread(file)[..., :3].copy()).mean(-1)
    assert (shades.median() > 0.85) if scheme == "light" else (shades.median() < 0.2)
    assert shades.std() > 0.05 and browser.get_log("browser") == []


def test_the_filter_narrows_and_says_how_far(browser):
    every = visible_rows(browser)
    assert every == [d.site for d in PLAN.decisions]
    text, kind, state = (browser.find_element(By.ID, f"filter-{name}") for name in ("text", "kind", "state"))
    count = browser.find_element(By.ID, "filter-count")
    text.send_keys("Layers.1 XATTENTION")
    assert visible_rows(browser) == [f"model.layers.{layer}.self_attn" for layer in (1, 10, 11, 13)]
    assert count.text == "4 of 15 sites"
    text.clear()
    text.send_keys(" ")
    Select(kind).select_by_visible_text("feed-forward")
    assert visible_rows(browser) == ["model.layers.3.mlp"]
    Select(kind).select_by_visible_text("all")
    Select(state).select_by_visible_text("left as is")
    assert visible_rows(browser) == ["model.layers.9.self_attn"]
    Select(state).select_by_visible_text("with refusals")
    assert visible_rows(browser) == [f"model.layers.{layer}.self_attn" for layer in (0, 1, 9)]
    text.send_keys("nothing of the kind")
    assert visible_rows(browser) == [] and browser.find_element(By.ID, "filter-none").is_displayed()


def test_the_keyboard_reaches_every_control(browser):
    controls = "a[href], input, select, summary, .scroll"
    browser.execute_script(f"document.querySelectorAll('{controls}, .cell').forEach((one, i) => one.dataset.number = i)")
    wanted = browser.execute_script(f"return [...document.querySelectorAll('{controls}')].map(one => one.dataset.number)")
    reached, cells = set(), set()
    for _ in range(len(wanted) + 20):
        press(browser, Keys.TAB)
        at = browser.switch_to.active_element
        if at.tag_name == "body":
            break
        assert browser.execute_script("return getComputedStyle(arguments[0]).outlineStyle", at) != "none", at.get_attribute("outerHTML")
        (cells if "cell" in (at.get_attribute("class") or "") else reached).add(at.get_attribute("data-number"))
    assert set(wanted) <= reached
    assert len(cells) == 1, "one cell is in the order of Tab, the arrows reach the others"


def test_arrows_move_and_enter_chooses_a_map(browser):
    caption = browser.find_element(By.ID, "map-caption")
    assert caption.text.startswith("model.layers.2.self_attn, mean of 6 heads")
    browser.find_element(By.CSS_SELECTOR, ".cell").click()
    press(browser, Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert browser.switch_to.active_element.get_attribute("aria-label").startswith("layer 3, head 1: ")
    assert caption.text.startswith("model.layers.2.self_attn, head 0")
    press(browser, Keys.ENTER)
    assert caption.text.startswith("model.layers.3.self_attn, head 1")
    press(browser, Keys.HOME, Keys.END, Keys.SPACE)
    assert caption.text.startswith("model.layers.3.self_attn, head 5")
    pressed = browser.find_elements(By.CSS_SELECTOR, '.cell[aria-pressed="true"]')
    assert [one.get_attribute("aria-label").split(":")[0] for one in pressed] == ["layer 3, head 5"]


def test_the_canvas_shows_the_cells(browser):
    Select(browser.find_element(By.ID, "map-site")).select_by_visible_text("model.layers.10.self_attn")
    Select(browser.find_element(By.ID, "map-head")).select_by_visible_text("2")
    pixels = """
        const [rows, columns, canvas] = [...arguments, document.getElementById("map-canvas")];
        const [context, width, height] = [canvas.getContext("2d"), canvas.width / columns, canvas.height / rows];
        const at = (y, x) => context.getImageData((x + 0.5) * width, (y + 0.5) * height, 1, 1).data;
        return Array.from({length: rows * columns}, (_, i) => [...at(Math.floor(i / columns), i % columns)].slice(0, 3).join());
    """
    (site,) = [one for one in data.maps_data(PLAN.block_maps)["sites"] if one["label"] == "model.layers.10.self_attn"]
    colours = browser.execute_script(pixels, site["rows"], site["columns"])
    by_level = {}
    for colour, level in zip(colours, site["heads"][2], strict=True):
        by_level.setdefault(level, set()).add(colour)
    assert len(by_level) >= 3 and all(len(found) == 1 for found in by_level.values())
    assert len(set().union(*by_level.values())) == len(by_level), "each level has a shade of its own"
    brightness = [sum(map(int, next(iter(by_level[level])).split(","))) for level in sorted(by_level.keys() - {data.NOTHING})]
    assert brightness == sorted(brightness, reverse=True), "grey tells them apart: the more, the darker in the light"
