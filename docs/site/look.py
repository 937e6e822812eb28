"""Checks the built site in Debian's Chromium: `make docs`. It opens each page on a screen and a phone, in both colours.

It fails for a picture that is missing, a link or an anchor that leads nowhere, a message on the console, a request to
another host, and a page that is wider than the phone.
"""

import re
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

SITE = Path(__file__).parents[2] / "build" / "site"
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
SCREEN, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and writes no log."""

    def log_message(self, *arguments):
        """Nothing."""


@pytest.fixture(scope="module")
def address():
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=SITE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


class Look:
    """One tab of a browser, and what went wrong in it since it went to a page: messages, failures, other hosts."""

    def __init__(self, browser: Browser, address: str, size: dict = SCREEN, colours: str = "light") -> None:
        self.address, self.wrong = address, []
        self.page = browser.new_page(viewport=size, color_scheme=colours)
        self.page.set_default_timeout(120_000)  # a machine may be busy
        self.page.on("console", lambda said: self._note(said.text) if said.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self._note(str(error)))
        self.page.on("response", lambda got: self._note(f"{got.status} {got.url}") if got.status >= 400 else None)
        self.page.on("request", lambda sent: None if sent.url.startswith((address, "data:")) else self._note(sent.url))

    def _note(self, text: str) -> None:
        self.wrong.append(text)

    def at(self, name: str) -> Page:
        """Go to a page of the site."""
        self.wrong.clear()
        self.page.goto(f"{self.address}/{name}", wait_until="load")
        return self.page


@pytest.fixture(scope="module")
def screen(browser, address):
    return Look(browser, address)


def ids(file: Path) -> set[str]:
    """The anchors of a page."""
    if file not in _ids:
        _ids[file] = set(re.findall(r'\bid="?([^"\s>]+)', file.read_text()))
    return _ids[file]


_ids: dict[Path, set[str]] = {}


@pytest.mark.parametrize("name", PAGES)
def test_a_page(name, screen, address):
    page = screen.at(name)
    pictures = page.eval_on_selector_all("img", "all => all.map(i => [i.src, i.naturalWidth, i.alt])")
    assert all(width and alt for _, width, alt in pictures), pictures
    for link in page.eval_on_selector_all("a[href]", "all => all.map(a => a.href)"):
        target, anchor = urldefrag(link)
        if not target.startswith(address):
            continue
        file = SITE / unquote(target.removeprefix(address).lstrip("/"))
        file = file / "index.html" if file.is_dir() else file
        assert file.is_file(), link
        assert not anchor or file.suffix != ".html" or unquote(anchor) in ids(file), link
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], "wider than a phone"
    page.set_viewport_size(SCREEN)
    assert screen.wrong == []


def test_the_site_is_there():
    assert len(PAGES) > 30, "build it first: make docs"


def test_search_finds_a_symptom(screen):
    page = screen.at("index.html")
    page.locator(".md-search__input").click()
    page.keyboard.type("everything is silent")  # the search follows keys, and not what a script fills in
    page.locator(".md-search-result__link").first.wait_for()
    found = page.locator(".md-search-result__link").evaluate_all("all => all.map(a => a.href)")
    assert any("faq.html" in link for link in found)
    assert screen.wrong == []


@pytest.mark.parametrize(("colours", "scheme"), [("light", "default"), ("dark", "slate")])
def test_colours_follow_the_system(colours, scheme, browser, address):
    look = Look(browser, address, colours=colours)
    page = look.at("index.html")
    assert page.locator("body").get_attribute("data-md-color-scheme") == scheme
    page.locator("label.md-header__button[for^=__palette]:visible").click()
    assert page.locator("body").get_attribute("data-md-color-scheme") != scheme
    assert look.wrong == []
    page.close()


def test_a_phone_has_the_menu(browser, address):
    look = Look(browser, address, PHONE)
    page = look.at("start.html")
    page.locator("label[for=__drawer]:visible").first.click()
    page.get_by_role("link", name="Home", exact=True).first.wait_for(state="visible")  # the page itself has no link
    assert look.wrong == []
    page.close()


@pytest.mark.parametrize(("size", "colours"), [(SCREEN, "light"), (PHONE, "dark")])
def test_the_sample_report_is_a_link_away_and_can_be_looked_into(size, colours, browser, address):
    look = Look(browser, address, size, colours)
    page = look.at("report.html")
    assert page.locator(".sample").count() == 5
    page.get_by_role("link", name="Open the sample report").click()
    page.wait_for_url("**/sample_report.html")
    figure = page.locator("svg[data-curves]").first
    figure.scroll_into_view_if_needed()
    box = figure.bounding_box()
    across = [box["x"] + share * min(box["width"], size["width"]) for share in (0.4, 0.6)]
    page.mouse.move(across[0], box["y"] + 100)
    page.mouse.down()
    page.mouse.move(across[1], box["y"] + 100)
    page.mouse.up()
    held_out = page.get_by_role("button", name="eval_loss, lora")
    held_out.press("Space")
    page.locator("[name=smoothing]").press("ArrowRight")
    for _ in ("as set", "after a reload, as of a run that goes on"):
        first, last = (int(page.locator(f"[name={name}]").input_value()) for name in ("from", "to"))
        assert 0 < first < last < 40
        assert held_out.get_attribute("aria-pressed") == "false"
        assert page.locator("[name=smoothing]").input_value() == "0.02"
        figure.focus()
        figure.press("ArrowRight")
        shown = page.locator(".curves output").first.inner_text()
        assert shown.startswith(f"step {first}\n")
        assert "smoothed" in shown
        page.reload()
    page.get_by_role("button", name="Show all").click()
    assert page.locator("[name=from]").input_value() == ""
    assert held_out.get_attribute("aria-pressed") == "true"
    assert look.wrong == []
    page.close()
