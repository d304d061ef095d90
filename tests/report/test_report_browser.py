"""The page in a browser: no error, no request, every picture, no sideways scrolling, toxic text only when asked for."""

import shutil

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
PAINTED = "e => { const b = e.getBoundingClientRect(); return b.width > 100 && b.height > 100 }"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root has no sandbox
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, report_page):
    """`visit(width, scheme)`: the page, opened; and what it asked for and complained of."""
    contexts = []

    def open_page(width, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        said = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url))
        page.goto(report_page.as_uri())
        return page, said

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width", [1280, 400])
def test_page_is_whole_at_every_width(visit, report_page, width):
    page, said = visit(width)
    pictures = page.locator("figure svg").all()
    assert len(pictures) == len(list(report_page.with_name("page-pictures").glob("*.svg")))
    assert all(picture.evaluate(PAINTED) for picture in pictures)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("figure svg text").first.wait_for()
    sizes = page.evaluate(
        "[...document.querySelectorAll('figure svg text')].map(t => [t.getScreenCTM(), parseFloat(t.style.fontSize)])"
        ".map(([m, size]) => Math.hypot(m.a, m.b) * size)"
    )
    assert min(sizes) >= 7.0, "letters of pictures, in pixels"
    clipped = page.evaluate(
        "[...document.querySelectorAll('main p, main li, main dd, main h2, main h3, figcaption')]"
        ".filter(e => e.getBoundingClientRect().right > innerWidth + 1).length"
    )
    assert clipped == 0
    assert said == [report_page.as_uri()], "nothing but the page itself was asked for, and nothing was wrong"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_and_lines_stand_out_in_both_themes(visit, scheme):
    page, _ = visit(1280, scheme)
    first = ground_and_ink(page)
    assert contrast(*first) >= 7
    page.locator("#theme").click()
    second = ground_and_ink(page)
    assert contrast(*second) >= 7
    assert (first[0] > first[1]) == (scheme == "light")
    assert (second[0] > second[1]) != (scheme == "light")


def ground_and_ink(page):
    """Relative luminance of the page's ground and of the first letters of a picture."""
    colours = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor,"
        " getComputedStyle(document.querySelector('figure svg text')).fill]"
    )
    return [luminance(c) for c in colours]


def luminance(colour):
    parts = [int(v) / 255 for v in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """As WCAG 2 defines it."""
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def test_toxic_text_is_blurred_until_it_is_asked_for(visit):
    page, _ = visit(1280)
    veils = page.locator(".veil")
    assert veils.count() == 4, "two toxic continuations under each of two evaluations"
    text = page.locator(".veiled").first

    def blurred():
        return text.evaluate("e => getComputedStyle(e).filter") != "none"

    assert blurred()
    assert text.get_attribute("aria-hidden") == "true"
    veils.first.click()
    assert not blurred()
    assert text.get_attribute("aria-hidden") == "false"
    veils.first.press("Enter")
    assert blurred()
    page.locator("#theme").focus()
    for _ in range(200):  # by the keyboard alone
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('veil')"):
            break
    page.keyboard.press("Space")
    assert not blurred()
    page.locator("#unveil").click()
    assert page.locator('.veil[aria-expanded="true"]').count() == 4


def test_printed_tables_fit_the_paper(visit):
    page, _ = visit(600)
    page.emulate_media(media="print")
    assert page.evaluate("[...document.querySelectorAll('table')].filter(t => t.scrollWidth > innerWidth).length") == 0


def test_printed_page_is_light_and_still_blurred(visit):
    page, _ = visit(1280, "dark")
    page.emulate_media(media="print")
    ground, ink = ground_and_ink(page)
    assert ground > ink
    assert page.locator(".veiled").first.evaluate("e => getComputedStyle(e).filter") != "none"
    assert not page.locator("#theme").is_visible()
    assert len(page.pdf()) > 10_000
