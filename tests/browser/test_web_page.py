"""A bundle for browsers, in a browser: the same pixels, the same answers, or a refusal."""

import base64
import io
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from static_server import ISOLATION, serving
from tiny_bundle import PREPROCESS, image_model, png_bytes
from tiny_site import array_site, make_digits_site, make_site, reseal

from deploykit import runtime
from deploykit.bundle import verify_bundle
from deploykit.bundle_files import npy_bytes, npz_bytes
from deploykit.errors import VerificationError
from deploykit.runtime import FILTERS, decode_image
from deploykit.web import vendored
from tests.browser.sample_images import (
    chunk,
    interlaced_otherwise,
    jpegs,
    other_palette,
    photo,
    pngs,
    saved,
)
from tests.browser.screen import LETTERS, OVERFLOWING, SIZES, SMALLEST_LETTERS

# Grey levels by which decoders of CMYK may differ, and what a filter that sharpens makes of one.
LEVELS = {"nearest": 1, "bilinear": 1, "bicubic": 3, "lanczos": 3}
DECODE = """async ([base, files, specs]) => {
    const { pixelsOf } = await import(base + "web/images.js");
    const { toModelPixels } = await import(base + "web/preprocess.js");
    const text = bytes => btoa(Array.from(bytes, one => String.fromCharCode(one)).join(""));
    const found = {};
    for (const [name, file] of Object.entries(files)) {
        try {
            const bytes = Uint8Array.from(atob(file), one => one.charCodeAt(0));
            const image = await pixelsOf(new Blob([bytes]));
            found[name] = specs.map(spec => text(toModelPixels(image, spec)));
        } catch (error) { found[name] = error.message; }
    }
    return found;
}"""
ANSWER = """async ([base, files, options]) => {
    const { load } = await import(base + "web/deploykit.js");
    const model = await load(base, options);
    const answers = [];
    for (const file of files) {
        const bytes = Uint8Array.from(atob(file), one => one.charCodeAt(0));
        const { label, probability, top, logits } = await model.predict(new Blob([bytes]));
        answers.push({ label, probability, logits, classes: top.length });
    }
    return { answers, environment: model.environment, proof: await model.selftest() };
}"""
LOAD = """async ([base, options]) => {
    const { load, Refusal } = await import(base + "web/deploykit.js");
    try { await load(base, options); return "loaded"; }
    catch (error) { return error instanceof Refusal ? error.message : `no refusal: ${error}`; }
}"""


@pytest.fixture(autouse=True)
def _patient() -> Iterator[None]:
    """Wait longer than a busy machine takes."""
    expect.set_options(timeout=30_000)
    yield
    expect.set_options(timeout=5_000)


@contextmanager
def opened(
    browser: Browser,
    folder: Path,
    path: str = "",
    *,
    headers: Mapping[str, str] | None = None,
    size: str = "desk",
    scheme: str = "light",
) -> Iterator[tuple[Page, str, list[str]]]:
    """Serve a folder and open a path below it; yield the page, its URL, and its faults."""
    width, height = SIZES[size]
    with serving(folder, headers) as url:
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.set_default_timeout(30_000)
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(f"script: {error}"))
        page.on("console", lambda message: faults.append(f"console: {message.text}"))
        page.on(
            "request",
            lambda one: one.url.startswith((url, "blob:")) or faults.append(one.url),
        )
        page.goto(url + path)
        yield page, url + path, faults
        page.close()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site in a folder of its own, as one among others."""
    return make_digits_site(tmp_path_factory.mktemp("web") / "models").parent


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_site(tmp_path)


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


# pixels


def specs_of(**changes: Any) -> list[dict[str, Any]]:
    """Every filter, fit and number of channels, shrinking and enlarging."""
    found = []
    for filter_, antialias, fit, channels, (height, width) in product(
        FILTERS, (True, False), ("stretch", "cover"), (1, 3), ((9, 14), (50, 41))
    ):
        if filter_ == "lanczos" and not antialias:
            continue
        found.append(
            {
                **PREPROCESS,
                "filter": filter_,
                "antialias": antialias,
                "fit": fit,
                "channels": channels,
                "height": height,
                "width": width,
                **changes,
            }
        )
    return found


def differences(
    page: Page, base: str, files: dict[str, bytes], specs: list[dict[str, Any]]
) -> dict[str, int]:
    """Return by how many grey levels the browser's pixels differ at most, file by file."""
    sent = {name: in_base64(data) for name, data in files.items()}
    found = page.evaluate(DECODE, [base, sent, specs])
    most = {}
    for name, data in files.items():
        assert isinstance(found[name], list), f"{name}: {found[name]}"
        most[name] = 0
        for spec, text in zip(specs, found[name], strict=True):
            expected = decode_image(data, spec).reshape(-1).astype(int)
            pixels = np.frombuffer(base64.b64decode(text), np.uint8).astype(int)
            most[name] = max(most[name], int(np.abs(expected - pixels).max()))
    return most


def test_png_files_give_equal_pixels_by_every_way_to_resize(browser, digits) -> None:
    with opened(browser, digits, "tiny/") as (page, base, _):
        most = differences(page, base, pngs(), specs_of())
    assert {name: one for name, one in most.items() if one} == {}


def test_jpeg_files_give_equal_pixels_but_for_cmyk(browser, digits) -> None:
    """Of CMYK, browsers make another red, green and blue."""
    files = jpegs()
    cmyk = {"JPEG, CMYK": files.pop("JPEG, CMYK")}
    with opened(browser, digits, "tiny/") as (page, base, _):
        most = differences(page, base, files, specs_of())
        for filter_, allowed in LEVELS.items():
            specs = [one for one in specs_of() if one["filter"] == filter_]
            assert max(differences(page, base, cmyk, specs).values()) <= allowed
    assert {name: one for name, one in most.items() if one} == {}


def test_other_pixels_would_be_seen(browser, digits) -> None:
    """The comparison sees a filter that is another."""
    files = {"colour": pngs()["colour, 8 bits"]}
    with opened(browser, digits, "tiny/") as (page, base, _):
        sent = {name: in_base64(data) for name, data in files.items()}
        wrong = {**specs_of()[0], "filter": "bicubic", "antialias": True}
        text = page.evaluate(DECODE, [base, sent, [wrong]])["colour"][0]
    right = decode_image(files["colour"], {**wrong, "filter": "bilinear"}).reshape(-1).astype(int)
    assert np.abs(np.frombuffer(base64.b64decode(text), np.uint8).astype(int) - right).max() > 1


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("gif", b"GIF89a" + bytes(60), "66 bytes of something else"),
        ("empty", b"", "0 bytes of something else"),
        ("cut", pngs()["colour, 8 bits"][:400], "damaged"),
        ("cut JPEG", b"\xff\xd8\xff\xe0\0\x10", "damaged"),
        ("palette", other_palette(), "its PLTE is not what"),
        ("interlaced", interlaced_otherwise(), "its head is none"),
        ("bits", pngs()["colour, 8 bits"].replace(b"IDAT", b"IDAT\xff", 1), "damaged"),
        (
            "giant",
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"\0\0\x27\x10\0\0\x27\x10\x08\2\0\0\0"),
            "at most 25000000 pixels, got 10000 x 10000",
        ),
        (
            "giant JPEG",
            b"\xff\xd8\xff\xc0\0\x11\x08\x27\x10\x27\x10" + bytes(20),
            "at most 25000000 pixels, got 10000 x 10000",
        ),
    ],
)
def test_what_is_no_image_is_refused(browser, digits, name, data, told) -> None:
    with opened(browser, digits, "tiny/") as (page, base, _):
        found = page.evaluate(DECODE, [base, {name: in_base64(data)}, specs_of()[:1]])[name]
    assert told in found


def test_an_image_that_is_still_loading_is_refused(browser, digits) -> None:
    """A browser would draw nothing, and nothing is white."""
    with opened(browser, digits, "tiny/") as (page, base, _):
        told = page.evaluate(
            """async (base) => {
                const { pixelsOf } = await import(base + "web/images.js");
                const image = new Image();
                Object.defineProperty(image, "complete", { value: false });
                [image.width, image.height] = [9, 9];
                return pixelsOf(image).catch((error) => error.message);
            }""",
            base,
        )
    assert "still loading" in told


def test_what_a_page_shows_is_taken_too(browser, digits) -> None:
    """A canvas, an image, its bitmap and its pixels: all as the file itself."""
    data = pngs()["colour, 8 bits"]
    spec = specs_of()[0]
    script = """async ([base, file, spec]) => {
        const { pixelsOf } = await import(base + "web/images.js");
        const { toModelPixels } = await import(base + "web/preprocess.js");
        const bytes = Uint8Array.from(atob(file), one => one.charCodeAt(0));
        const blob = new Blob([bytes], {type: "image/png"});
        const image = new Image();
        image.src = URL.createObjectURL(blob);
        await image.decode();
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        const context = canvas.getContext("2d");
        context.drawImage(image, 0, 0);
        const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
        const all = [image, canvas, pixels, await createImageBitmap(blob)];
        const modelPixels = async one => Array.from(toModelPixels(await pixelsOf(one), spec));
        return Promise.all(all.map(modelPixels));
    }"""
    with opened(browser, digits, "tiny/") as (page, base, _):
        found = page.evaluate(script, [base, in_base64(data), spec])
    expected = decode_image(data, spec).reshape(-1).tolist()
    assert found == [expected] * 4


# answers


def files_of(site: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((site / "golden").glob("*.png"))]


@pytest.mark.parametrize("isolated", [False, True], ids=["alone", "isolated"])
def test_answers_are_those_of_python_with_and_without_isolation(browser, digits, isolated) -> None:
    site = digits / "tiny"
    files = files_of(site)
    manifest, contents = runtime.read_bundle(site)
    pixels = np.stack([runtime.read_sample(one, manifest) for one in files])
    expected = runtime.run_model(runtime.open_model(manifest, contents, 1), pixels)
    with opened(browser, digits, "tiny/", headers=ISOLATION if isolated else None) as (
        page,
        base,
        faults,
    ):
        options = {"threads": 2}
        found = page.evaluate(ANSWER, [base, [in_base64(one) for one in files], options])
    assert found["proof"]["passed"], found["proof"]
    assert found["proof"]["samples"] == len(files)
    assert found["proof"]["greyLevels"] == 0
    environment = found["environment"]
    assert environment["crossOriginIsolated"] is isolated
    assert environment["hashesChecked"] is True
    assert vendored.read_record()["version"] in environment["runtime"]
    logits = np.array([one["logits"] for one in found["answers"]])
    assert np.abs(logits - expected).max() <= manifest["tolerance"]["max_abs"]
    for answer, row in zip(found["answers"], expected, strict=True):
        best = runtime.rank(runtime.softmax(row), manifest["labels"], 1)[0]
        assert answer["label"] == best["label"]
        assert answer["probability"] == pytest.approx(best["probability"], abs=1e-4)
        assert answer["classes"] == 10
    assert faults == []


@pytest.mark.parametrize("isolated", [False, True], ids=["alone", "isolated"])
def test_threads_compute_where_the_page_is_isolated(browser, digits, isolated) -> None:
    """The runtime of a page starts once, so this one starts it with two threads."""
    path = "tiny/?threads=2"
    with opened(browser, digits, path, headers=ISOLATION if isolated else None) as (
        page,
        _,
        faults,
    ):
        expect(page.locator("#proof")).to_contain_text("passed")
        facts = page.locator("#here").inner_text()
    assert ("not cross-origin isolated" in facts) is not isolated
    if isolated:
        assert "Threads\n2" in facts
    assert faults == []


def test_a_model_of_arrays_answers_npy_files_and_typed_arrays(browser, tmp_path) -> None:
    site = array_site(tmp_path)
    manifest, contents = runtime.read_bundle(site)
    sample = np.array([1, -2, 0.5])
    expected = runtime.run_model(
        runtime.open_model(manifest, contents, 1), sample[np.newaxis].astype(np.float32)
    )[0]
    script = """async ([base, files]) => {
        const { load } = await import(base + "web/deploykit.js");
        const model = await load(base);
        const read = file => new Blob([Uint8Array.from(atob(file), one => one.charCodeAt(0))]);
        const arrays = [new Float64Array([1, -2, 0.5]), new Float32Array(2), [1, 2, 3]];
        const asked = [...files.map(read), ...arrays, new Float32Array([1, NaN, 2])];
        const answer = one => model.predict(one).then(got => got.logits, error => error.message);
        return Promise.all(asked.map(answer));
    }"""
    wrong = npy_bytes(np.zeros(4, np.float32))
    turned = npy_bytes(np.zeros((2, 2))).replace(b"False", b"True ")
    sent = [in_base64(one) for one in (npy_bytes(sample), wrong, turned, b"PK")]
    with opened(browser, tmp_path, "tiny/") as (page, base, _):
        npy, shape, order, junk, typed, short, plain, nan = page.evaluate(script, [base, sent])
        page.locator("#file").set_input_files(
            {"name": "a.npy", "mimeType": "", "buffer": npy_bytes(sample)}
        )
        expect(page.locator("#headline")).to_contain_text("%")
        assert page.get_by_role("radio", name="Draw").is_visible() is False
    assert np.abs(np.array([npy, typed]) - expected).max() < 1e-5
    assert "expected float32 of shape (3), got 4 numbers of shape (4)" in shape
    assert "C order" in order
    assert "expected a .npy file" in junk
    assert "expected float32 of shape (3), got 2 numbers" in short
    assert "expected a .npy file or a typed array" in plain
    assert "NaN" in nan


# the proof


def refusal(browser: Browser, site: Path, **options: Any) -> str:
    with opened(browser, site.parent, f"{site.name}/web/page.css") as (page, url, _):
        told: str = page.evaluate(LOAD, [url.removesuffix("web/page.css"), options])
    return told


def test_an_unaltered_site_loads(browser, tiny) -> None:
    assert refusal(browser, tiny) == "loaded"


@pytest.mark.parametrize(
    "name",
    [
        "model.onnx",
        "web/onnxruntime/ort-wasm-simd-threaded.wasm",
        "web/onnxruntime/ort.wasm.bundle.min.js",
        "golden/000.png",
        "golden/expected.npz",
    ],
)
def test_an_altered_file_is_refused(browser, tiny, name) -> None:
    data = bytearray((tiny / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tiny / name).write_bytes(data)
    assert f"{name}: differs from manifest.json" in refusal(browser, tiny)


def test_a_missing_file_is_refused(browser, tiny) -> None:
    (tiny / "model.onnx").unlink()
    assert "model.onnx: cannot be fetched, the server answers 404" in refusal(browser, tiny)


@pytest.mark.parametrize(
    ("alter", "told"),
    [
        (
            lambda text: text.replace(b'"schema":1', b'"schema":2'),
            "schema: expected 1, got 2; a newer",
        ),
        (lambda text: text.replace(b'"name":"tiny"', b'"name":"tinu"'), "digest: differs"),
        (lambda text: text[:-1], "expected JSON"),
    ],
    ids=["schema", "name", "cut"],
)
def test_an_altered_manifest_is_refused(browser, tiny, alter, told) -> None:
    file = tiny / "manifest.json"
    file.write_bytes(alter(file.read_bytes()))
    assert told in refusal(browser, tiny)


def test_a_preprocess_that_this_version_would_not_follow_is_refused(browser, tiny) -> None:
    reseal(tiny, preprocess={**PREPROCESS, "filter": "mitchell"})
    assert "preprocess.filter: expected one of nearest" in refusal(browser, tiny)


def test_another_border_than_the_manifests_is_refused(browser, tiny) -> None:
    reseal(tiny, outputs=[{"name": "logits", "dtype": "float32", "shape": [-1, 4]}])
    assert "model.onnx: outputs: expected what manifest.json says" in refusal(browser, tiny)


def alter_outputs(site: Path, by: float) -> None:
    """Move a golden logit, and seal the bundle again."""
    with np.load(io.BytesIO((site / "golden/expected.npz").read_bytes())) as held:
        inputs, outputs = held["inputs"], held["outputs"].copy()
    outputs[1, 0] += by
    (site / "golden/expected.npz").write_bytes(npz_bytes(inputs=inputs, outputs=outputs))
    reseal(site)


def test_other_golden_answers_fail_the_self_test_as_in_python(browser, tiny) -> None:
    alter_outputs(tiny, 0.01)
    with pytest.raises(VerificationError, match=r"outputs differ by 0\.01"):
        verify_bundle(tiny)
    assert "golden: outputs differ by 0.01" in refusal(browser, tiny)
    assert refusal(browser, tiny, prove=False) == "loaded"
    with opened(browser, tiny.parent, "tiny/") as (page, _, _):
        expect(page.locator("#proof")).to_have_text(
            "Self-test failed: golden: outputs differ by 0.01000, allowed is 0.0001000. "
            "Do not trust the answers of this browser."
        )


def test_differences_within_the_tolerance_pass(browser, tiny) -> None:
    alter_outputs(tiny, 5e-5)
    verify_bundle(tiny)
    assert refusal(browser, tiny) == "loaded"


def test_another_class_counts_only_beyond_a_near_tie(browser, tiny) -> None:
    """A large tolerance lets another answer pass unless classes lie apart by more than a step."""
    with np.load(io.BytesIO((tiny / "golden/expected.npz").read_bytes())) as held:
        inputs, outputs = held["inputs"], held["outputs"].copy()
    best, worst = int(outputs[0].argmax()), int(outputs[0].argmin())
    outputs[0, [best, worst]] = outputs[0, [worst, best]]
    apart = float(outputs[0].max() - outputs[0].min())
    (tiny / "golden/expected.npz").write_bytes(npz_bytes(inputs=inputs, outputs=outputs))
    loose = {"max_abs": 100.0, "top1": True, "steps": None, "scale": apart / 2}
    reseal(tiny, tolerance=loose)
    assert "000.png: expected class" in refusal(browser, tiny)
    reseal(tiny, tolerance={**loose, "scale": 2 * apart})
    assert refusal(browser, tiny) == "loaded"


def test_pixels_off_by_two_levels_fail_the_self_test(browser, tiny) -> None:
    pixels = np.array(Image.open(tiny / "golden/000.png"))
    for step, told in ((1, "loaded"), (2, "golden/000.png: decodes differently here, by 2")):
        moved = pixels.copy()
        moved[0, 0] = pixels[0, 0] + step if pixels[0, 0] < 128 else pixels[0, 0] - step
        (tiny / "golden/000.png").write_bytes(png_bytes(moved[..., np.newaxis]))
        reseal(tiny)
        assert told in refusal(browser, tiny)


def test_sums_of_bytes_do_not_overflow(browser, tiny) -> None:
    """As they do on x86 without VNNI, which is why other weights than these are made for that."""
    weight = np.full((16, 3), 127, np.int8)
    weight[:, 1] = -128
    weight[::2, 2] = -127
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMulInteger", ["flat", "weight"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["logits"], to=TensorProto.FLOAT),
    ]
    proto = onnx.load(tiny / "model.onnx")
    held = [numpy_helper.from_array(weight, "weight")]
    graph = helper.make_graph(nodes, "sums", proto.graph.input, proto.graph.output, held)
    opset = proto.opset_import
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    (tiny / "model.onnx").write_bytes(model.SerializeToString())
    reseal(tiny)
    script = """async ([base]) => {
        const { load } = await import(base + "web/deploykit.js");
        const model = await load(base, { prove: false });
        return (await model.predict(new Uint8Array(16).fill(255))).logits;
    }"""
    with opened(browser, tiny.parent, "tiny/web/page.css") as (page, url, _):
        found = page.evaluate(script, [url.removesuffix("web/page.css")])
    assert found == [16 * 255 * 127, -16 * 255 * 128, 0]


@pytest.mark.parametrize("more", [0, 1])
def test_the_newest_opset_opens_and_the_next_does_not(browser, tmp_path, more) -> None:
    model = image_model(tmp_path / "model.onnx")
    site = make_site(tmp_path / "site", model=model)
    proto = onnx.load(site / "model.onnx")
    proto.opset_import[0].version = vendored.MAX_OPSET + more
    (site / "model.onnx").write_bytes(proto.SerializeToString())
    reseal(site)
    told = refusal(browser, site)
    assert ("onnxruntime-web cannot open it" in told) if more else (told == "loaded")


# the page


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


STROKES = {
    "1": [(0.42, 0.3), (0.52, 0.15), (0.52, 0.85)],
    "7": [(0.25, 0.18), (0.72, 0.18), (0.45, 0.85)],
    "0": [
        (0.5, 0.12),
        (0.32, 0.3),
        (0.3, 0.6),
        (0.42, 0.85),
        (0.6, 0.85),
        (0.7, 0.6),
        (0.68, 0.3),
        (0.5, 0.12),
    ],
}


def test_drawn_digits_are_recognised(browser, digits) -> None:
    with opened(browser, digits, "tiny/") as (page, _, faults):
        expect(page.locator("#proof")).to_contain_text("Self-test passed: 4 golden samples")
        for label, points in STROKES.items():
            page.get_by_role("button", name="Clear").click()
            draw(page, *points)
            expect(page.locator("#headline")).to_contain_text(f"{label}, ")
        facts = page.locator("#facts").inner_text()
        assert "Median of 3" in facts
        assert page.locator(".bars li").count() == 5
        page.locator(".thumbnail").wait_for()
    assert faults == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_page_fits_any_screen(browser, digits, size, scheme) -> None:
    with opened(browser, digits, "tiny/", size=size, scheme=scheme) as (page, _, faults):
        expect(page.locator("#proof")).to_contain_text("passed")
        for way in ("Image", "Camera", "Draw"):
            page.get_by_role("radio", name=way).check()
            assert page.evaluate(OVERFLOWING) == []
        draw(page, *STROKES["1"])
        expect(page.locator("#headline")).to_contain_text("%")
        assert page.evaluate(OVERFLOWING) == []
        assert page.evaluate(LETTERS) >= SMALLEST_LETTERS
    assert faults == []


def test_an_image_file_is_answered_and_a_bad_one_refused(browser, digits) -> None:
    file = files_of(digits / "tiny")[0]
    with opened(browser, digits, "tiny/") as (page, _, faults):
        expect(page.locator("#proof")).to_contain_text("passed")
        page.get_by_role("radio", name="Image").check()
        for data, answered in ((file, True), (b"GIF89a", False), (file, True)):
            page.locator("#file").set_input_files(
                {"name": "a.png", "mimeType": "image/png", "buffer": data}
            )
            alert = page.get_by_role("alert")
            if answered:
                expect(page.locator("#headline")).to_contain_text("%")
                expect(alert).to_be_hidden()
            else:
                expect(alert).to_contain_text("expected a PNG or JPEG image, got 6 bytes")
                expect(page.locator("#headline")).to_have_text("Nothing was asked yet.")
    assert faults == []


def launched(browser: Browser, *options: str) -> Browser:
    """Start another browser, with options."""
    path = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    return browser.browser_type.launch(executable_path=path, args=["--no-sandbox", *options])


def test_the_camera_is_asked_for_on_demand(browser, digits) -> None:
    fake = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    other = launched(browser, *fake)
    with opened(other, digits, "tiny/") as (page, _, faults):
        expect(page.locator("#proof")).to_contain_text("passed")
        page.get_by_role("radio", name="Camera").check()
        assert page.evaluate("document.getElementById('video').srcObject") is None
        page.get_by_role("button", name="Start the camera").click()
        page.get_by_role("button", name="Ask the model").click()
        expect(page.locator("#headline")).to_contain_text("%")
        page.get_by_role("radio", name="Draw").check()
        assert page.evaluate("document.getElementById('video').srcObject") is None
    other.close()
    assert faults == []


# A person who takes time to allow the camera.
LATE = """() => {
    const media = navigator.mediaDevices, real = media.getUserMedia.bind(media);
    window.streams = [];
    const allowed = new Promise((allow) => { window.allow = allow; });
    media.getUserMedia = async (wish) => {
        await allowed;
        streams.push(await real(wish));
        return streams.at(-1);
    };
}"""


# The page's policy forbids what Playwright's own waiting would compile.
UNTIL = "async () => {{ while (!({})) await new Promise((next) => setTimeout(next, 20)); }}"


@pytest.mark.parametrize("starts", [1, 2])
def test_a_camera_that_nobody_wants_any_more_is_off(browser, digits, starts) -> None:
    fake = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    other = launched(browser, *fake)
    with opened(other, digits, "tiny/") as (page, _, faults):
        expect(page.locator("#proof")).to_contain_text("passed")
        page.evaluate(LATE)
        page.get_by_role("radio", name="Camera").check()
        for _ in range(starts):
            page.get_by_role("button", name="Start the camera").click()
        if starts == 1:  # and looks elsewhere
            page.get_by_role("radio", name="Draw").check()
        page.evaluate("allow()")
        page.evaluate(UNTIL.format(f"streams.length === {starts}"))
        if starts == 2:
            page.get_by_role("button", name="Stop the camera").click()
        page.evaluate(UNTIL.format("streams.every((one) => !one.active)"))
        assert page.evaluate("document.getElementById('video').srcObject") is None
    other.close()
    assert faults == []


def test_a_camera_that_is_not_allowed_is_told(browser, digits) -> None:
    with opened(browser, digits, "tiny/") as (page, _, _):
        expect(page.locator("#proof")).to_contain_text("passed")
        page.get_by_role("radio", name="Camera").check()
        page.get_by_role("button", name="Start the camera").click()
        expect(page.get_by_role("alert")).to_contain_text("camera")


def test_a_page_of_plain_http_says_that_nothing_was_hashed(browser, digits) -> None:
    other = launched(browser, "--host-resolver-rules=MAP site.test 127.0.0.1")
    with serving(digits) as url:
        page = other.new_page()
        page.goto(url.replace("127.0.0.1", "site.test") + "tiny/")
        expect(page.locator("#proof")).to_contain_text("passed")
        expect(page.locator("#here")).to_contain_text(
            "not checked: a browser hashes only for https"
        )
    other.close()


def test_a_page_opened_as_a_file_says_what_to_do(browser, digits) -> None:
    page = browser.new_page()
    page.goto((digits / "tiny/index.html").as_uri())
    expect(page.locator("#served")).to_contain_text("python -m http.server")
    page.close()


def test_an_altered_model_is_told_on_the_page(browser, tiny) -> None:
    (tiny / "model.onnx").write_bytes((tiny / "model.onnx").read_bytes() + b"\0")
    with opened(browser, tiny.parent, "tiny/") as (page, _, _):
        expect(page.get_by_role("alert")).to_contain_text("model.onnx: differs from manifest.json")
        expect(page.locator("#main")).to_be_hidden()


def test_an_inline_script_is_blocked_and_seen(browser, tiny) -> None:
    with opened(browser, tiny.parent, "tiny/") as (page, _, faults):
        expect(page.locator("#proof")).to_contain_text("passed")
        page.evaluate(
            """() => {
            const script = document.createElement("script");
            script.textContent = "document.title = 'planted'";
            document.body.append(script);
        }"""
        )
        assert page.title() != "planted"
        assert any("Content Security Policy" in fault for fault in faults)


def test_another_origin_is_neither_asked_nor_unseen(browser, tiny) -> None:
    with opened(browser, tiny.parent, "tiny/") as (page, _, faults):
        page.evaluate("fetch('http://127.0.0.1:9/').catch(() => 0)")
        assert any("Content Security Policy" in fault for fault in faults)


def test_a_file_that_a_cache_kept_is_fetched_again(browser, tiny) -> None:
    """The site is put up anew while the browser still keeps its model."""
    script = """async ([base]) => {
        const { load } = await import(base + "web/deploykit.js");
        return (await load(base)).manifest.version;
    }"""
    keep = {"Cache-Control": "max-age=3600"}
    with opened(browser, tiny.parent, "tiny/web/page.css", headers=keep) as (page, url, _):
        base = url.removesuffix("web/page.css")
        assert page.evaluate(script, [base]) == "1.0"
        model = (tiny / "model.onnx").read_bytes()
        (tiny / "model.onnx").write_bytes(model + b"\x12\0")  # it names no producer
        reseal(tiny, version="2.0")
        assert page.evaluate(script, [base]) == "2.0"


def test_the_module_finds_its_own_site(browser, digits) -> None:
    script = """async ([base]) => {
        const { load } = await import(base + "web/deploykit.js");
        return (await load()).manifest.name;
    }"""
    with opened(browser, digits, "tiny/web/page.css") as (page, url, _):
        assert page.evaluate(script, [url.removesuffix("web/page.css")]) == "digits"


def test_a_model_answers_in_a_worker_as_in_the_page(browser, digits) -> None:
    script = """async ([base, file]) => {
        const code = `import { load } from "${base}web/deploykit.js";
            onmessage = async ({ data }) => {
                const model = await load("${base}");
                postMessage((await model.predict(data)).logits);
            };
            postMessage("ready");`;
        const url = URL.createObjectURL(new Blob([code], {type: "text/javascript"}));
        const worker = new Worker(url, {type: "module"});
        const next = () => new Promise(done => worker.onmessage = ({ data }) => done(data));
        await next();
        const answer = next();
        worker.postMessage(new Blob([Uint8Array.from(atob(file), one => one.charCodeAt(0))]));
        return answer;
    }"""
    site = digits / "tiny"
    manifest, contents = runtime.read_bundle(site)
    file = files_of(site)[0]
    sample = runtime.read_sample(file, manifest)[np.newaxis]
    expected = runtime.run_model(runtime.open_model(manifest, contents, 1), sample)[0]
    with opened(browser, digits, "tiny/web/page.css") as (page, url, _):
        found = page.evaluate(script, [url.removesuffix("web/page.css"), in_base64(file)])
    assert np.abs(np.array(found) - expected).max() < 1e-4


def test_large_photos_give_equal_pixels(browser, digits) -> None:
    spec = {**PREPROCESS, "channels": 3, "height": 224, "width": 224}
    pixels = photo(3, 800, 600)
    files = {"jpeg": saved(pixels, "JPEG"), "png": saved(pixels, "PNG", compress_level=1)}
    with opened(browser, digits, "tiny/") as (page, base, _):
        assert differences(page, base, files, [spec]) == {"jpeg": 0, "png": 0}
