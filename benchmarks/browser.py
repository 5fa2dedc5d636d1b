"""Bundles for browsers, in headless Chromium beside Python: `make bench-browser`, ten minutes.

The digits of the demo and, where CIFAR-10 lies (`--data`, `--weights`), a ResNet-20 in int8 are
served as static files, with the headers that isolate a page and without. Each page runs its
self-test and answers 200 test images that Python answers too; digits are drawn with the mouse.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from static_server import ISOLATION, serving
from table import Figure, publish

from deploykit import runtime
from deploykit.web import vendored

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).parents[1]
DEPLOYKIT = str(Path(sys.executable).with_name("deploykit"))
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
TRIAL = ("train.epochs=4", "prune=null", "quantize.epochs=1", "budget=null")
RECIPE = """\
schema: 1
name: resnet20
task: image-classification
target: cpu
data:
  source: parquet
  train: {data}/train.parquet
  validation: {data}/validation.parquet
  test: {data}/test.parquet
  size: [32, 32]
  channels: 3
  normalize: {{mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}}
  limit: {limit}
model: {{name: resnet20, weights: {weights}}}
quantize: {{mode: ptq}}
"""
MODES = {"alone": None, "isolated": ISOLATION}
OPEN = """async threads => {
    const { load } = await import("/web/deploykit.js");
    const started = performance.now();
    globalThis.model = await load(undefined, { threads, prove: false });
    return performance.now() - started;
}"""
ASK = """async files => {
    const answers = [];
    for (const file of files) {
        const bytes = Uint8Array.from(atob(file), one => one.charCodeAt(0));
        const { logits, milliseconds } = await model.predict(new Blob([bytes]));
        answers.push({ logits, ...milliseconds });
    }
    return answers;
}"""
# The strokes of each digit, from 0 to 1 from the left and from the top.
STROKES: dict[str, list[list[tuple[float, float]]]] = {
    "0": [
        [(0.5, 0.12), (0.32, 0.3), (0.3, 0.65), (0.5, 0.86), (0.7, 0.65), (0.68, 0.3), (0.5, 0.12)]
    ],
    "1": [[(0.4, 0.3), (0.52, 0.14), (0.52, 0.86)]],
    "2": [[(0.3, 0.28), (0.5, 0.14), (0.68, 0.3), (0.5, 0.58), (0.3, 0.84), (0.72, 0.84)]],
    "3": [[(0.32, 0.16), (0.64, 0.22), (0.46, 0.46), (0.68, 0.66), (0.5, 0.86), (0.3, 0.8)]],
    "4": [[(0.46, 0.14), (0.28, 0.56), (0.74, 0.56)], [(0.6, 0.34), (0.56, 0.88)]],
    "5": [
        [
            (0.68, 0.15),
            (0.36, 0.15),
            (0.34, 0.46),
            (0.6, 0.46),
            (0.68, 0.66),
            (0.52, 0.86),
            (0.3, 0.8),
        ]
    ],
    "6": [
        [
            (0.6, 0.14),
            (0.38, 0.4),
            (0.32, 0.7),
            (0.5, 0.86),
            (0.68, 0.7),
            (0.52, 0.54),
            (0.34, 0.66),
        ]
    ],
    "7": [[(0.28, 0.16), (0.72, 0.16), (0.46, 0.86)]],
    "8": [
        [
            *((0.5, 0.14), (0.34, 0.3), (0.62, 0.58), (0.64, 0.76), (0.5, 0.86)),
            *((0.36, 0.76), (0.38, 0.58), (0.66, 0.3), (0.5, 0.14)),
        ]
    ],
    "9": [[(0.66, 0.3), (0.5, 0.14), (0.34, 0.3), (0.5, 0.46), (0.66, 0.3), (0.62, 0.86)]],
}


@dataclass
class Seen:
    """What a browser did that it should not."""

    elsewhere: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)


# The sites


def run(*command: object) -> None:
    """Run a command that must succeed."""
    subprocess.run([str(word) for word in command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def make_site(folder: Path, recipe: Path, *changes: str) -> Path:
    """Compress by a recipe and export for browsers."""
    words = [word for change in changes for word in ("--set", change)]
    run(DEPLOYKIT, "compress", recipe, "--out", folder / "run", *words)
    run(DEPLOYKIT, "export", folder / "run", "--target", "web", "--out", folder / "site")
    return folder / "site"


def digit_files(count: int) -> list[bytes]:
    """Return scikit-learn's last digits as PNG files."""
    from PIL import Image
    from sklearn.datasets import load_digits

    found = []
    for image in load_digits().images[-count:]:
        file = io.BytesIO()
        Image.fromarray(np.rint(image * 255 / 16).astype(np.uint8)).save(file, "PNG")
        found.append(file.getvalue())
    return found


def cifar_files(data: Path, count: int) -> list[bytes]:
    """Return the first test images as JPEG files."""
    from pyarrow.parquet import read_table

    column = read_table(data / "test.parquet", columns=["image"])["image"][:count]
    return [one["bytes"] for one in column.to_pylist()]


# Python


def python_answers(site: Path, files: Sequence[bytes]) -> dict[str, Any]:
    """Answer with ONNX Runtime in this process, one thread."""
    manifest, contents = runtime.read_bundle(site)
    started = time.perf_counter()
    session = runtime.open_model(manifest, contents, 1)
    runtime.run_model(session, runtime.read_sample(files[0], manifest)[np.newaxis])
    first_ms = 1000 * (time.perf_counter() - started)
    samples = [runtime.read_sample(file, manifest)[np.newaxis] for file in files]
    logits, times_ms = [], []
    for sample in samples:
        before = time.perf_counter()
        logits.append(runtime.run_model(session, sample)[0])
        times_ms.append(1000 * (time.perf_counter() - before))
    near = manifest["tolerance"].get("scale") or manifest["tolerance"]["max_abs"]
    return {
        "logits": np.array(logits),
        "run_ms": median(times_ms),
        "first_ms": first_ms,
        "near": near,
    }


# The browser


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start a browser."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        raise SystemExit(f"expected one of {', '.join(BROWSERS)} on the PATH; install chromium")
    with sync_playwright() as playwright:
        # A container seldom lets root have the sandbox of its own.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=options)
        yield browser
        browser.close()


@contextmanager
def page_of(browser: Browser, site: Path, mode: str, seen: Seen, path: str = "") -> Iterator[Page]:
    """Open the page of a site in a profile of its own, with nothing kept from before."""
    with serving(site, MODES[mode]) as url:
        context = browser.new_context()
        # Of what is no page browsers ask for an icon, which would be a message of its own.
        context.route("**/favicon.ico", lambda route: route.fulfill(status=204))
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: seen.console.append(str(error)))
        page.on("console", lambda message: seen.console.append(message.text))
        page.on(
            "request",
            lambda one: one.url.startswith((url, "blob:")) or seen.elsewhere.append(one.url),
        )
        page.goto(url + path)
        yield page
        context.close()


def self_test(browser: Browser, site: Path, mode: str, seen: Seen) -> tuple[bool, str]:
    """Let the page test itself; return whether it passed, and its words."""
    with page_of(browser, site, mode, seen) as page:
        page.locator("#proof.passed, #proof.failed").wait_for()
        told = page.locator("#proof").inner_text()
    return told.startswith("Self-test passed"), told


def browser_answers(
    browser: Browser, site: Path, mode: str, files: Sequence[bytes], threads: int, seen: Seen
) -> dict[str, Any]:
    """Answer with onnxruntime-web."""
    sent = [base64.b64encode(file).decode() for file in files]
    with page_of(browser, site, mode, seen, "web/page.css") as page:
        opened_ms = page.evaluate(OPEN, threads)
        first = page.evaluate(ASK, sent[:1])[0]
        answers = page.evaluate(ASK, sent)
    return {
        "logits": np.array([one["logits"] for one in answers]),
        "run_ms": median(one["run"] for one in answers),
        "read_ms": median(one["read"] for one in answers),
        "first_ms": opened_ms + first["read"] + first["run"],
    }


def drawn_right(browser: Browser, site: Path, seen: Seen) -> str:
    """Draw every digit with the mouse; return those that are recognised."""
    right, strokes = "", 0
    with page_of(browser, site, "alone", seen) as page:
        page.locator("#proof.passed").wait_for()
        for digit, lines in STROKES.items():
            page.locator("#clear").click()
            for line in lines:
                draw(page, line)
                strokes += 1  # each is answered
                page.get_by_text(f"Median of {strokes}", exact=True).wait_for()
            right += digit if page.locator("#headline").inner_text().startswith(f"{digit},") else ""
    return right


def draw(page: Page, line: Sequence[tuple[float, float]]) -> None:
    """Draw a line in the canvas of a page."""
    box = page.locator("canvas").bounding_box()
    assert box
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in line]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=8)
    page.mouse.up()


# The figures


def compare(python: dict[str, Any], browser: dict[str, Any]) -> tuple[int, int]:
    """Return how many answers are equal, and how many of the others are no near-ties."""
    old, new = python["logits"], browser["logits"]
    best, found = old.argmax(axis=1), new.argmax(axis=1)
    rows = np.arange(len(old))
    lost = old[rows, best] - old[rows, found]
    return int((best == found).sum()), int((lost > python["near"]).sum())


def figures_of(
    name: str, browser: Browser, site: Path, files: Sequence[bytes], seen: Seen
) -> list[Figure]:
    """Examine one site in both modes."""
    python = python_answers(site, files)
    figures = [
        Figure(f"{name}, Python, 1 thread: first answer", python["first_ms"], "{:.0f} ms"),
        Figure(f"{name}, Python, 1 thread: median", python["run_ms"], "{:.3f} ms"),
    ]
    for mode, threads in (("alone", 1), ("isolated", 2)):
        passed, told = self_test(browser, site, mode, seen)
        print(f"{name}, {mode}: {told}", flush=True)
        found = browser_answers(browser, site, mode, files, threads, seen)
        equal, wrong = compare(python, found)
        apart = float(np.abs(python["logits"] - found["logits"]).max())
        which = f"{name}, {mode}, {threads} thread(s)"
        figures += [
            Figure(f"{which}: self-test passed", passed, "{:d}", at_least=1),
            Figure(
                f"{which}: top-1 as Python, of {len(files)}",
                equal,
                "{:d}",
                at_least=199 * len(files) // 200,
            ),
            Figure(f"{which}: other top-1 than a near-tie", wrong, "{:d}", at_most=0),
            Figure(f"{which}: largest difference of logits", apart),
            Figure(f"{which}: first answer, from nothing kept", found["first_ms"], "{:.0f} ms"),
            Figure(f"{which}: decoding, median", found["read_ms"], "{:.3f} ms"),
            Figure(f"{which}: model, median", found["run_ms"], "{:.3f} ms"),
            Figure(
                f"{which}: model, times Python's", found["run_ms"] / python["run_ms"], "{:.1f}x"
            ),
        ]
    return figures


def main() -> int:
    """Make the sites, open them, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--trial", action="store_true", help="a few epochs and images; keeps no table"
    )
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data/cifar10")
    parser.add_argument(
        "--weights", type=Path, default=ROOT / "../shared/weights/resnet20-12fca82f.th"
    )
    options = parser.parse_args()
    has_photos = (options.data / "test.parquet").exists()
    count = 20 if options.trial else 200
    seen = Seen()
    with tempfile.TemporaryDirectory(prefix="deploykit-") as scratch, chromium() as browser:
        folder = Path(scratch)
        digits = make_site(
            folder / "digits", ROOT / "recipes/digits.yaml", *(TRIAL if options.trial else ())
        )
        figures = figures_of("digits", browser, digits, digit_files(count), seen)
        right = drawn_right(browser, digits, seen)
        if has_photos:
            figures += resnet20_figures(options, folder, browser, count, seen)
        version = browser.version
    figures += [
        Figure("drawn digits recognised, of 10", len(right), "{:d}", at_least=9),
        Figure("requests to other origins", len(seen.elsewhere), "{:d}", at_most=0),
        Figure("messages in the console", len(seen.console), "{:d}", at_most=0),
    ]
    return publish(
        "browser",
        figures,
        about=f"Sites of `deploykit export --target web` in headless Chromium {version} "
        f"(onnxruntime-web {vendored.read_record()['version']}, WebAssembly), beside ONNX Runtime "
        "in Python. A page alone has one thread; one that is cross-origin isolated was given two.",
        command="make bench-browser",
        details=[
            f"Drawn and recognised: {' '.join(right)}.",
            *([] if has_photos else ["No ResNet-20: CIFAR-10 is not here (--data)."]),
            *(f"Seen: {one}" for one in [*seen.elsewhere, *seen.console][:10]),
        ],
        keep=not options.trial,
    )


def resnet20_figures(
    options: argparse.Namespace, folder: Path, browser: Browser, count: int, seen: Seen
) -> list[Figure]:
    """Quantize the published ResNet-20 and examine it."""
    limit = 500 if options.trial else 3000
    text = RECIPE.format(
        data=options.data.resolve(), weights=options.weights.resolve(), limit=limit
    )
    (folder / "resnet20.yaml").write_text(text)
    site = make_site(folder / "resnet20", folder / "resnet20.yaml")
    return figures_of("ResNet-20 int8", browser, site, cifar_files(options.data, count), seen)


if __name__ == "__main__":
    sys.exit(main())
