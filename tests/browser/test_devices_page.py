"""What a person sees who opens the page of several devices, offline, on a desk and on a phone."""

import json

import pytest

from deploykit.fleet import write_devices
from tests.browser.screen import LETTERS, OVERFLOWING, SIZES, SMALLEST_LETTERS
from tests.browser.test_report_page import opened
from tests.test_fleet import measured


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    long = "a-device-with-a-rather-long-name.in.the.factory.example"
    values = [
        measured(),
        measured(long, 4.5, threads=4),
        measured("nuc", 0.5, target="cpu-x86-vnni", digest="b" * 64, accuracy=0.95),
    ]
    values[1]["device"]["cpu"] = (
        "A processor whose maker tells more of it than anybody wants @ 3.00GHz"
    )
    files = [folder / f"{index}.json" for index in range(len(values))]
    for file, value in zip(files, values, strict=True):
        file.write_text(json.dumps(value))
    write_devices(files, folder / "devices.html")
    return folder / "devices.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_devices_are_read_offline_on_any_screen(browser, path, size, scheme):
    page, faults = opened(browser, path, size, scheme)
    assert faults == []
    assert page.evaluate(OVERFLOWING) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(LETTERS) >= SMALLEST_LETTERS
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate(OVERFLOWING) == []
    page.close()
