"""What a person sees who opens report.html, offline, on a desk and on a phone."""

import pytest
from playwright.sync_api import Browser, Page

from deploykit.report import write_report
from tests.browser.screen import LETTERS, OVERFLOWING, SIZES, SMALLEST_LETTERS
from tests.sample_report import sample_report


def opened(browser: Browser, path, size: str, scheme: str = "light") -> tuple[Page, list[str]]:
    """Open a file; return the page and all that it complained about or asked for."""
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(f"script: {error}"))
    page.on("console", lambda message: faults.append(f"console: {message.text}"))
    page.on("request", lambda request: faults.append(f"request: {request.url}"))
    page.goto(path.as_uri())
    faults.remove(f"request: {path.as_uri()}")
    return page, faults


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(sample_report(), folder)
    return folder / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_report_is_read_offline_on_any_screen(browser, path, size, scheme):
    page, faults = opened(browser, path, size, scheme)
    assert faults == []
    assert page.evaluate(OVERFLOWING) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(LETTERS) >= SMALLEST_LETTERS
    for section in page.locator("section").all():
        assert section.is_visible()
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate(OVERFLOWING) == []
    page.close()


def test_charts_name_every_stage_and_trial(browser, path):
    page, _ = opened(browser, path, "desk")
    names = page.locator("#tradeoff svg").first.locator(".name").all_text_contents()
    assert names == ["train", "prune", "quantize", "trial 1"]
    page.close()


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("<script>nothing()</script>", "script: nothing is not defined"),
        ('<img src="http://127.0.0.1:9/x.png">', "request: http://127.0.0.1:9/x.png"),
    ],
)
def test_a_page_that_fails_is_seen_to_fail(browser, path, tmp_path, broken, told):
    text = path.read_text(encoding="utf-8").replace("</main>", f"{broken}</main>")
    start, end = text.index("<meta http-equiv"), text.index("<title>")
    (tmp_path / "broken.html").write_text(text[:start] + text[end:], encoding="utf-8")
    page, faults = opened(browser, tmp_path / "broken.html", "phone")
    assert told in faults
    page.close()


def test_what_stands_out_of_the_page_is_seen(browser, path, tmp_path):
    wide = '<p style="width: 500px; font-size: 5px">wide</p></main>'
    text = path.read_text(encoding="utf-8").replace("</main>", wide)
    (tmp_path / "wide.html").write_text(text, encoding="utf-8")
    page, _ = opened(browser, tmp_path / "wide.html", "phone")
    assert page.evaluate(OVERFLOWING) == ["P."]
    assert page.evaluate(LETTERS) == 5
    page.close()
