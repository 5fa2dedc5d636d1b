"""What a person sees and can do on the pages of a server."""

import base64
import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from deploykit.server.openapi_schemas import PIXEL
from tests.browser.screen import LETTERS, OVERFLOWING, SIZES, SMALLEST_LETTERS
from tests.browser.stand_in import StandIn, serving
from tests.sample_models import DIGITS, PHOTOS, ROWS

IMAGE = base64.b64decode(PIXEL)
TRANSFER = """([kind, base64]) => {
    const bytes = Uint8Array.from(atob(base64), one => one.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([bytes], "a.png", {type: "image/png"}));
    const event = kind === "paste" ? new ClipboardEvent(kind, {clipboardData: data, bubbles: true})
        : new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true});
    document.body.dispatchEvent(event);
}"""
# Browsers name what they put in place of an inline script in the console.
INLINE = """() => {
    const script = document.createElement("script");
    script.textContent = "document.title = 'planted'";
    document.body.append(script);
}"""


@pytest.fixture
def server() -> Iterator[StandIn]:
    with serving(StandIn([DIGITS, PHOTOS, ROWS])) as stand_in:
        yield stand_in


def opened(
    browser: Browser, server: StandIn, path: str = "", size: str = "desk", scheme: str = "light"
) -> tuple[Page, list[str]]:
    """Open a page; return it and all that it complained about or asked of other servers."""
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.set_default_timeout(10_000)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(f"script: {error}"))
    page.on("console", lambda message: faults.append(f"console: {message.text}"))
    page.on(
        "request",
        lambda request: request.url.startswith((server.url, "blob:")) or faults.append(request.url),
    )
    page.goto(server.url + path)
    page.locator("#main:not([hidden]), details, #error:not([hidden])").first.wait_for()
    return page, faults


def draw(page: Page, *points: tuple[float, float]) -> None:
    """Draw a line through points, each from 0 to 1 from the left and from the top."""
    box = page.locator("canvas").bounding_box()
    assert box
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=5)
    page.mouse.up()


def sent_picture(server: StandIn) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(server.asked[-1][2])).convert("L"))


def lit(picture: np.ndarray) -> tuple[int, ...]:
    """Return the first and last lit row and column."""
    rows, columns = np.nonzero(picture > 128)
    return int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())


def headline(page: Page, text: str) -> None:
    expect(page.locator("#headline")).to_have_text(text)


# looks


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_pages_fit_any_screen_and_ask_nobody_else(browser, server, size, scheme) -> None:
    page, faults = opened(browser, server, "", size, scheme)
    for model in ("photos 1.0", "rows 1.0", "digits 1.0"):
        page.get_by_label("Model").select_option(model)
        expect(page.locator("#served")).to_contain_text(model)
        assert page.evaluate(OVERFLOWING) == []
    page.get_by_label("Model").select_option("photos 1.0")
    expect(page.locator("#served")).to_contain_text("photos")
    page.get_by_label("Drop an image").set_input_files(
        {"name": "a.png", "mimeType": "image/png", "buffer": IMAGE}
    )
    headline(page, "a rather long name of a thing, number 999, 90.0 %")
    page.locator(".thumbnail").wait_for()
    assert page.evaluate(OVERFLOWING) == []
    assert page.evaluate(LETTERS) >= SMALLEST_LETTERS
    page.goto(server.url + "docs")
    for summary in page.locator("summary").all()[:12]:
        summary.click()
    assert page.evaluate(OVERFLOWING) == []
    assert page.evaluate(LETTERS) >= SMALLEST_LETTERS
    assert faults == []
    page.close()


def test_an_inline_script_is_blocked_and_seen(browser, server) -> None:
    page, faults = opened(browser, server)
    page.evaluate(INLINE)
    assert page.title() != "planted"
    assert any("Content Security Policy" in fault for fault in faults)
    page.close()


# asking


def test_what_is_drawn_is_sent_white_on_black_in_the_middle(browser, server) -> None:
    page, _ = opened(browser, server)
    draw(page, (0.2, 0.2), (0.2, 0.5))
    headline(page, "9, 90.0 %")
    target, headers, _ = server.asked[-1]
    assert (target, headers["content-type"]) == ("/predict/digits?top=5", "image/png")
    picture = sent_picture(server)
    top, bottom, left, right = lit(picture)
    assert (top, bottom) == (0, picture.shape[0] - 1)  # it fills the 8 x 8 pixels
    assert abs(left + right - picture.shape[1]) <= 2
    assert picture[0, 0] == picture[-1, -1] == 0
    page.get_by_label("centre and enlarge").uncheck()
    page.get_by_role("button", name="Clear").click()
    headline(page, "Nothing was asked yet.")
    draw(page, (0.2, 0.2), (0.2, 0.5))
    headline(page, "9, 90.0 %")
    top, bottom, left, right = lit(sent_picture(server))
    assert top > 0
    assert right < picture.shape[1] / 3
    page.close()


@pytest.mark.parametrize("way", ["choose", "paste", "drop"])
def test_image_is_sent_as_it_is(browser, server, way) -> None:
    page, faults = opened(browser, server)
    if way == "choose":
        page.get_by_role("radio", name="Image").check()
        page.get_by_label("Drop an image").set_input_files(
            {"name": "a.png", "mimeType": "image/png", "buffer": IMAGE}
        )
    else:
        page.evaluate(TRANSFER, [way, PIXEL])
    headline(page, "9, 90.0 %")
    _, headers, body = server.asked[-1]
    assert (headers["content-type"], body) == ("image/png", IMAGE)
    assert faults == []
    page.close()


def test_answer_tells_classes_times_model_and_provider(browser, server) -> None:
    page, _ = opened(browser, server)
    draw(page, (0.5, 0.2), (0.5, 0.8))
    headline(page, "9, 90.0 %")
    labels = page.locator(".bars .label").all_text_contents()
    assert labels == ["9", "8", "7", "6", "5"]
    assert page.locator(".percent").all_text_contents()[-1] == "< 0.1 %"
    widths = page.locator(".bar").evaluate_all(
        "bars => bars.map(bar => bar.firstChild.offsetWidth / bar.offsetWidth)"
    )
    assert widths == pytest.approx([0.9, 0.07, 0.02, 0.01, 0], abs=0.01)
    terms = page.locator("dt").all_text_contents()
    facts = dict(zip(terms, page.locator("dd").all_text_contents(), strict=True))
    assert facts["Round trip"].endswith(" ms")
    assert facts["Server, compute"] == "0.61 ms"
    assert (facts["Model"], facts["Provider"]) == ("digits 1.0", "CPUExecutionProvider")
    page.get_by_label("Classes to rank").fill("2")
    page.get_by_label("Classes to rank").blur()
    expect(page.locator(".bars li")).to_have_count(2)
    page.close()


def test_numbers_are_asked_of_a_model_that_takes_arrays(browser, server) -> None:
    page, _ = opened(browser, server)
    page.get_by_label("Model").select_option("rows 1.0")
    numbers = page.get_by_label("Numbers as JSON")
    expect(numbers).to_have_value("[0,0,0,0]")
    expect(page.get_by_role("radio")).to_have_count(0)
    numbers.fill("[1, 2.5, 3, 4]")
    page.get_by_role("button", name="Ask the model").click()
    headline(page, "2, 90.0 %")
    target, headers, body = server.asked[-1]
    assert target == "/predict/rows?top=3"
    assert headers["content-type"] == "application/json"
    assert json.loads(body) == {"inputs": [1, 2.5, 3, 4]}
    numbers.fill("[1, 2")
    page.get_by_role("button", name="Ask the model").click()
    expect(page.get_by_role("alert")).to_contain_text("The numbers are no JSON")
    assert len(server.asked) == 1
    page.close()


def test_versions_of_one_name_are_asked_by_version(browser) -> None:
    with serving(StandIn([DIGITS, replace(DIGITS, version="2.0")])) as server:
        page, _ = opened(browser, server)
        page.get_by_label("Model").select_option("digits 2.0")
        expect(page.locator("#served")).to_contain_text("2.0")
        draw(page, (0.5, 0.2), (0.5, 0.8))
        headline(page, "9, 90.0 %")
        assert server.asked[-1][0] == "/predict/digits/versions/2.0?top=5"
        page.close()


def test_one_model_leaves_nothing_to_choose(browser) -> None:
    with serving(StandIn([DIGITS])) as server:
        page, _ = opened(browser, server)
        assert not page.get_by_label("Model").is_visible()
        page.close()


# refusals


def test_refusal_is_shown_as_the_sentence_that_it_is(browser, server) -> None:
    server.refusal = (429, "64 samples wait already; ask again in 1 s")
    page, _ = opened(browser, server)
    draw(page, (0.5, 0.2), (0.5, 0.8))
    expect(page.get_by_role("alert")).to_have_text(server.refusal[1])
    server.refusal = None
    draw(page, (0.5, 0.2), (0.5, 0.8))
    headline(page, "9, 90.0 %")
    expect(page.get_by_role("alert")).to_have_count(0)
    page.close()


def test_server_that_is_gone_is_told(browser) -> None:
    with serving(StandIn([DIGITS])) as server:
        page, _ = opened(browser, server)
    draw(page, (0.5, 0.2), (0.5, 0.8))
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer")
    page.close()


def test_token_is_asked_for_and_kept_in_memory_alone(browser) -> None:
    with serving(StandIn([DIGITS], token="right")) as server:
        page, _ = opened(browser, server)
        field = page.get_by_label("This server asks for a token")
        expect(field).to_be_focused()
        for typed in ("wrong", "right"):
            field.fill(typed)
            field.press("Enter")
            expected = page.get_by_role("alert") if typed == "wrong" else page.locator("canvas")
            expected.wait_for()
        draw(page, (0.5, 0.2), (0.5, 0.8))
        headline(page, "9, 90.0 %")
        assert not field.is_visible()
        assert page.context.storage_state() == {"cookies": [], "origins": []}
        page.reload()
        expect(field).to_be_visible()
        expect(field).to_have_value("")
        page.close()


# without a mouse


def test_page_is_used_by_keyboard_and_read_aloud(browser, server) -> None:
    page, _ = opened(browser, server)
    page.get_by_label("Model").focus()
    page.keyboard.press("Tab")
    expect(page.get_by_role("radio", name="Draw")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("radio", name="Image")).to_be_checked()
    page.keyboard.press("Tab")
    expect(page.locator("#file")).to_be_focused()
    expect(page.get_by_role("status")).to_have_text("Nothing was asked yet.")
    unnamed = page.locator("input, select, textarea, button, canvas, img").evaluate_all(
        "all => all.filter(one => !(one.labels?.length || one.textContent.trim() || one.ariaLabel))"
        ".map(one => one.outerHTML)"
    )
    assert unnamed == []
    page.close()


# the documents


def test_every_operation_is_described(browser, server) -> None:
    page, faults = opened(browser, server, "docs")
    described = server.answer("/openapi.json", {}, b"")[1]
    assert page.locator("details").count() == sum(map(len, described["paths"].values()))
    operation = page.locator("details", has_text="/predict/rows").first
    operation.locator("summary").click()
    text = operation.inner_text()
    assert '"inputs": [4 \N{MULTIPLICATION SIGN} number, -3.40e+38 to 3.40e+38]' in text
    assert "integer, 1 to 1,000; 5 by default" in text
    assert "16 to 512 bytes" in text
    for status in ("413", "422", "429", "504"):
        assert status in text
    assert "401" not in text
    assert faults == []
    page.close()


@pytest.mark.parametrize("token", [None, "right"])
def test_curl_lines_work_as_pasted(browser, token) -> None:
    curl, shell = shutil.which("curl"), shutil.which("sh")
    if not curl or not shell:
        pytest.skip("needs curl and a shell")
    with serving(StandIn([DIGITS], token=token)) as server:
        page, _ = opened(browser, server, "docs")
        for path in ("/predict/digits", "/v2/models/digits/infer"):
            page.locator("summary", has_text=path).first.click()
        lines = [
            text
            for text in page.locator("details[open] pre").all_text_contents()
            if "curl" in text and "@FILE" not in text
        ]
        for line in lines:
            done = subprocess.run(
                [shell, "-c", line],
                capture_output=True,
                check=True,
                env={"PATH": "/usr/bin:/bin", "DEPLOYKIT_TOKEN": token or ""},
            )
            assert b"error" not in done.stdout
        page.close()
    predicted = {h["content-type"]: len(b) for t, h, b in server.asked if t == "/predict/digits"}
    assert predicted == {
        "image/png": len(IMAGE),
        "application/json": len(json.dumps({"image": PIXEL}, separators=(",", ":"))),
        "application/x-npy": 128 + 64,
        "application/octet-stream": 64,
    }
    binary = next(h for _, h, _ in server.asked if "inference-header-content-length" in h)
    assert binary["content-type"] == "application/octet-stream"


def test_requests_are_tried_from_the_page(browser, server) -> None:
    page, faults = opened(browser, server, "docs")
    operation = page.locator("details", has_text="/predict/digits").first
    operation.locator("summary").click()
    operation.get_by_label("top").fill("2")
    operation.get_by_label("File").set_input_files(
        {"name": "a.png", "mimeType": "image/png", "buffer": IMAGE}
    )
    operation.get_by_role("button", name="Send").click()
    expect(operation.get_by_role("status")).to_contain_text('"label": "9"')
    assert server.asked[-1][0] == "/predict/digits?top=2"
    assert server.asked[-1][2] == IMAGE
    operation.get_by_label("Content type").select_option("application/json")
    expect(operation.get_by_role("textbox", name="JSON")).to_have_value(f'{{"image":"{PIXEL}"}}')
    operation.get_by_role("button", name="Send").click()
    expect(operation.get_by_role("status")).to_contain_text("200 in")
    assert json.loads(server.asked[-1][2]) == {"image": PIXEL}
    server.refusal = (422, "expected 8 x 8")
    operation.get_by_role("button", name="Send").click()
    expect(operation.get_by_role("status")).to_contain_text("expected 8 x 8")
    assert [fault for fault in faults if "422" not in fault] == []
    page.close()
