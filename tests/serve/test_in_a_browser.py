"""The page in Chromium, as people use it: with a mouse, with a keyboard, on a telephone, in the dark.

Skipped where there is no Chromium (Debian's package `chromium`). CLIPDIT_SCREENSHOT names a file for the README's picture."""

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Running, numbered, png

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here; Debian's is `apt-get install chromium`")

QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
"""It needs root's leave to run in a container, and looks nothing up by itself."""
KEY = "a-key-of-a-test"
FACE = [
    [(0.5 + 0.38 * math.cos(i / 24 * math.tau), 0.5 + 0.38 * math.sin(i / 24 * math.tau)) for i in range(25)],
    [(0.37 + 0.05 * math.cos(i / 8 * math.tau), 0.4 + 0.06 * math.sin(i / 8 * math.tau)) for i in range(9)],
    [(0.63 + 0.05 * math.cos(i / 8 * math.tau), 0.4 + 0.06 * math.sin(i / 8 * math.tau)) for i in range(9)],
    [(0.5 + 0.2 * math.cos(i / 8 * math.pi), 0.58 + 0.16 * math.sin(i / 8 * math.pi)) for i in range(9)],
]
"""Lines, in shares of the canvas."""


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    """The built-in model, and a variant that makes negatives."""
    running = Running(backend="eager,fake", environment={"CLIPDIT_API_KEY": KEY})
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def opened(service: Running, browser):
    """Opens the page; at the end it must have asked nobody else for anything, and met no error."""
    pages, asked, wrong = [], [], []

    def open_page(**looks):
        page = browser.new_page(**looks)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if "Content Security Policy" in message.text else None)
        page.goto(service.url)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert [url for url in asked if not url.startswith((service.url, "blob:" + service.url))] == []
    assert wrong == []


def draw(page, lines) -> None:
    box = page.locator("#canvas").bounding_box()
    for line in lines:
        points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in line]
        page.mouse.move(*points[0])
        page.mouse.down()
        for point in points[1:]:
            page.mouse.move(*point)
        page.mouse.up()


def give_key(page) -> None:
    """The first answer asks for it."""
    assert not page.locator("#key").is_visible()
    page.click("#go")
    page.wait_for_selector("#key", state="visible")
    assert "API key" in page.inner_text("#said")
    page.fill("#key", KEY)


def dark_share(page, selector: str) -> float:
    """Of the pixels of a canvas, or of an image."""
    return page.evaluate(
        """selector => {
          const seen = document.querySelector(selector), copy = document.createElement("canvas");
          [copy.width, copy.height] = [seen.naturalWidth || seen.width, seen.naturalHeight || seen.height];
          const paper = copy.getContext("2d");
          paper.drawImage(seen, 0, 0);
          const data = paper.getImageData(0, 0, copy.width, copy.height).data;
          let dark = 0;
          for (let i = 0; i < data.length; i += 4) dark += data[i] + data[i + 1] + data[i + 2] < 384;
          return dark / (data.length / 4);
        }""",
        selector,
    )


@pytest.mark.parametrize("scheme, width", [("light", 1100), ("dark", 390)])
def test_a_drawing_is_translated_and_laid_over_what_it_became(scheme: str, width: int, opened):
    page = opened(color_scheme=scheme, viewport={"width": width, "height": 860})
    assert page.is_disabled("#go") and page.is_disabled("#undo")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out
    draw(page, FACE)
    assert 0.01 < dark_share(page, "#canvas") < 0.1
    page.fill("#seed", "3")
    give_key(page)
    page.click("#go")
    page.wait_for_selector("#compare.ready", timeout=60_000)
    said = page.inner_text("#said")
    assert "ms, of them" in said and said.endswith("seed 3")
    size = page.evaluate("[document.getElementById('result').naturalWidth, document.getElementById('result').naturalHeight]")
    assert size == [512, 512]  # as it was drawn
    assert dark_share(page, "#source") == pytest.approx(dark_share(page, "#canvas"), abs=1e-3)
    assert page.evaluate("getComputedStyle(document.getElementById('source')).clipPath") == "inset(0px 100% 0px 0px)"
    page.locator("#shown").evaluate("slider => { slider.value = 40; slider.dispatchEvent(new Event('input')) }")
    assert page.evaluate("getComputedStyle(document.getElementById('source')).clipPath") == "inset(0px 60% 0px 0px)"
    if scheme == "light" and (path := os.environ.get("CLIPDIT_SCREENSHOT")):
        page.evaluate("document.getElementById('keylabel').classList.remove('needed'); document.activeElement.blur()")
        page.screenshot(path=path, full_page=True)


def test_the_keyboard_is_enough(opened, tmp_path: Path):
    picture = tmp_path / "picture.png"
    picture.write_bytes(png(numbered(5)))
    page = opened()
    page.set_input_files("#file", picture)  # the system's dialogue is not the page's
    page.wait_for_selector("#go:not([disabled])")
    give_key(page)
    page.focus("#seed")
    page.keyboard.type("7")
    page.keyboard.press("Tab")
    page.keyboard.type("2")  # steps
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")  # over guidance
    assert page.evaluate("document.activeElement.id") == "variant"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")  # over the key, to the button
    page.keyboard.press("Enter")
    page.wait_for_selector("#compare.ready", timeout=60_000)
    said = page.inner_text("#said")
    assert said.startswith("fake: ") and said.endswith("seed 7")
    assert page.evaluate("document.getElementById('result').naturalWidth") == 64  # the file itself was sent
    page.focus("#shown")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.evaluate("document.getElementById('compare').style.getPropertyValue('--shown')") == "3%"
    with page.expect_download() as download:
        page.focus("#save")
        page.keyboard.press("Enter")
    assert download.value.suggested_filename == "translation.png"
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("scheme, width", [("light", 1100), ("dark", 390)])
def test_a_variant_is_chosen_and_the_answer_is_its_own(scheme: str, width: int, opened):
    page = opened(color_scheme=scheme, viewport={"width": width, "height": 860}, has_touch=width < 500)
    assert page.locator("#variant option").all_inner_texts() == ["eager", "fake"]
    assert page.input_value("#variant") == "eager"  # the service's default
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    boxes = {name: page.locator(f"#{name}").bounding_box() for name in ("seed", "steps", "guidance", "variant", "go")}
    assert boxes["seed"]["y"] == boxes["steps"]["y"] == boxes["guidance"]["y"]
    assert boxes["variant"]["y"] == boxes["go"]["y"] and boxes["variant"]["height"] == boxes["go"]["height"]
    assert min(box["height"] for box in boxes.values()) >= 40  # a thumb hits it
    draw(page, FACE)
    give_key(page)
    page.fill("#steps", "2")
    dark = {}
    for name in ("eager", "fake"):
        page.select_option("#variant", name)
        page.click("#go")
        page.get_by_text(f"{name}: ").wait_for(timeout=60_000)
        page.wait_for_function("document.getElementById('result').complete")
        dark[name] = dark_share(page, "#result")
    assert dark["eager"] < 0.5 < 0.8 < dark["fake"]  # a line drawing's negative is black


def test_where_there_is_one_variant_nobody_is_asked(opened):
    page = opened()
    page.evaluate("document.querySelectorAll('#variant option').forEach(option => option.remove())")  # as the page is sent then
    assert not page.get_by_label("Variant").is_visible()
    draw(page, FACE[:1])
    page.fill("#steps", "1")
    give_key(page)
    page.click("#go")
    page.wait_for_selector("#compare.ready", timeout=60_000)
    assert page.inner_text("#said")[0].isdigit()


def test_lines_can_be_undone_erased_and_cleared(opened):
    page = opened()
    draw(page, FACE[:2])
    whole = dark_share(page, "#canvas")
    page.click("#undo")
    assert 0 < dark_share(page, "#canvas") < whole
    page.click("#eraser")
    draw(page, FACE[:1])
    assert dark_share(page, "#canvas") == 0
    assert page.get_attribute("#eraser", "aria-pressed") == "true" and page.get_attribute("#pen", "aria-pressed") == "false"
    page.click("#clear")
    assert page.is_disabled("#go") and page.is_disabled("#clear")


def test_what_goes_wrong_is_said(opened, tmp_path: Path):
    (tmp_path / "notes.png").write_text("no picture")
    page = opened()
    page.set_input_files("#file", tmp_path / "notes.png")
    page.wait_for_selector("#said.wrong")
    assert page.inner_text("#said") == "notes.png is no image that the browser can show; wanted PNG, JPEG or WebP"
    draw(page, FACE[:1])
    give_key(page)
    page.fill("#steps", "100000")
    page.click("#go")
    page.get_by_text("steps is 100000; wanted 1 to").wait_for()
    page.wait_for_selector("#go:not([disabled])")
