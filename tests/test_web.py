"""What a bundle for browsers holds, without a browser."""

import json
import lzma
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tiny_site import array_site, make_site

import deploykit.web
from deploykit import runtime
from deploykit.bundle import verify_bundle
from deploykit.errors import BundleError, ExportError
from deploykit.web import FOLDER, PAGE, RUNTIME, SCRIPTS, SHARED, site_files, vendored

STATIC = Path(deploykit.web.__file__).parent / "static"
MANIFEST = {"opset": 20}


@pytest.fixture(scope="module")
def site() -> dict[str, bytes]:
    return site_files(MANIFEST, {})


@pytest.fixture(scope="module")
def texts(site: dict[str, bytes]) -> dict[str, str]:
    """Our own files: what is vendored is its makers'."""
    return {
        name: data.decode() for name, data in site.items() if not name.startswith(f"{RUNTIME}/")
    }


# the folder


def test_every_static_file_ships() -> None:
    assert {path.name for path in STATIC.iterdir()} == {PAGE, "style.css", *SCRIPTS}
    assert not set(SHARED) & {path.name for path in STATIC.iterdir()}


def test_site_is_a_bundle_of_which_every_byte_is_covered(tmp_path: Path) -> None:
    bundle = make_site(tmp_path)
    manifest = verify_bundle(bundle)
    assert {PAGE, "run.py", "README.md", f"{FOLDER}/deploykit.js"} <= set(manifest["files"])
    page = bundle / FOLDER / "page.js"
    page.write_bytes(page.read_bytes() + b"\n")
    with pytest.raises(BundleError, match=r"web/page\.js"):
        verify_bundle(bundle)


def test_a_model_of_arrays_has_a_page_too(tmp_path: Path) -> None:
    assert (array_site(tmp_path) / PAGE).is_file()


def test_equal_calls_give_equal_bytes_under_plain_names(site: dict[str, bytes]) -> None:
    vendored.vendored_files.cache_clear()
    assert site_files(MANIFEST, {}) == site
    assert all(runtime.FILE_NAME.fullmatch(name) for name in site)
    assert len({name.casefold() for name in site}) == len(site)


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(ValueError, match=r"free, got index\.html"):
        site_files(MANIFEST, {"index.html": b""})


def test_an_opset_that_browsers_lack_is_refused_at_export() -> None:
    site_files({"opset": vendored.MAX_OPSET}, {})
    with pytest.raises(ExportError, match="opset: expected at most") as caught:
        site_files({"opset": vendored.MAX_OPSET + 1}, {})
    assert caught.value.opset == vendored.MAX_OPSET + 1


def test_it_loads_without_torch() -> None:
    code = "import sys; from deploykit.web import site_files; site_files({'opset': 20}, {}); "
    code += "print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {name.split(".")[0] for name in done.stdout.split()}.isdisjoint(
        {"torch", "onnx", "onnxruntime", "numpy"}
    )


# what it refers to


class References(HTMLParser):
    """Collects what a page loads, and what of it a strict policy would block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.names += [found[key] or "" for key in ("src", "href") if key in found]
        self.inline += [key for key in found if key == "style" or key.startswith("on")]
        if tag == "style" or (tag == "script" and "src" not in found):
            self.inline.append(tag)


def read_page(text: str) -> References:
    found = References()
    found.feed(text)
    return found


def imports(text: str) -> Iterator[str]:
    yield from re.findall(r'^(?:import|export)[^"\n]*from "([^"]+)"', text, re.MULTILINE)


def test_what_files_refer_to_is_there(site: dict[str, bytes], texts: dict[str, str]) -> None:
    named = read_page(texts[PAGE]).names
    assert len(named) == 4
    assert set(named) <= set(site)
    for name in SCRIPTS:
        for target in imports(texts[f"{FOLDER}/{name}"]):
            assert target.startswith("./")
            assert f"{FOLDER}/{target[2:]}" in site, f"{name}: {target}"
    in_script = set(re.findall(r'"(web/[^"]+)"', texts[f"{FOLDER}/deploykit.js"]))
    assert len(in_script) == 2
    assert in_script <= set(site)


def test_elements_that_scripts_ask_for_are_on_the_page(texts: dict[str, str]) -> None:
    ids = set(re.findall(r'id="([^"]+)"', texts[PAGE]))
    asked = set(re.findall(r'\$\("([^"]+)"\)', texts[f"{FOLDER}/page.js"]))
    assert asked
    assert asked <= ids


def addresses(text: str) -> set[str]:
    return set(re.findall(r"(?:https?:)?//[a-z0-9][a-z0-9.-]*\.[a-z]{2,}[^\s\"'`)]*", text))


def test_no_file_of_ours_names_another_host(texts: dict[str, str]) -> None:
    found = {address for text in texts.values() for address in addresses(text)}
    assert found == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert addresses('fetch("https://cdn.example.com/x.js"); url(//cdn.example.com/y)')


def test_page_has_a_strict_policy_and_nothing_inline(texts: dict[str, str]) -> None:
    page = texts[PAGE]
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy
    assert "default-src 'self'; script-src 'self' 'wasm-unsafe-eval';" in policy[1]
    assert "unsafe-inline" not in policy[1]
    assert "'unsafe-eval'" not in policy[1]
    assert read_page(page).inline == []
    assert read_page('<p onclick="f()" style="x"><script>f()</script>').inline == [
        "onclick",
        "style",
        "script",
    ]


def test_our_scripts_are_small(texts: dict[str, str]) -> None:
    assert sum(len(text.encode()) for text in texts.values()) < 80_000


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_scripts_parse(texts: dict[str, str], tmp_path: Path) -> None:
    for name, text in texts.items():
        if name.endswith(".js"):
            module = tmp_path / f"{Path(name).stem}.mjs"
            module.write_text(text)
            done = subprocess.run(["node", "--check", module], capture_output=True, check=False)
            assert done.returncode == 0, done.stderr.decode()


# onnxruntime-web


def test_vendored_files_are_those_that_were_recorded(site: dict[str, bytes]) -> None:
    record = vendored.read_record()
    assert record["package"] == "onnxruntime-web"
    assert re.fullmatch(r"\d+\.\d+\.\d+", record["version"])
    assert record["integrity"].startswith("sha512-")
    kept = {path.name for path in vendored.FOLDER.iterdir()}
    assert kept == {"vendor.json", *(f"{name}.xz" for name in record["files"])}
    assert set(record["files"]) == {*vendored.SCRIPTS, *vendored.NOTICES}
    assert b"MIT License" in site[f"{RUNTIME}/LICENSE"]
    version = f"ONNX Runtime Web v{record['version']}".encode()
    assert version in site[f"{RUNTIME}/ort.wasm.bundle.min.js"][:200]
    assert site[f"{RUNTIME}/ort-wasm-simd-threaded.wasm"].startswith(b"\0asm")


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "vendor"
    shutil.copytree(vendored.FOLDER, folder)
    monkeypatch.setattr(vendored, "FOLDER", folder)
    monkeypatch.setattr(vendored, "RECORD", folder / "vendor.json")
    vendored.vendored_files.cache_clear()
    yield folder
    vendored.vendored_files.cache_clear()


@pytest.mark.parametrize("damage", ["altered", "truncated", "missing"])
def test_an_altered_vendored_file_is_refused(copied: Path, damage: str) -> None:
    file = copied / "LICENSE.xz"
    data = lzma.decompress(file.read_bytes())
    if damage == "altered":
        file.write_bytes(lzma.compress(data + b" "))
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-20])
    else:
        file.unlink()
    with pytest.raises(BundleError, match="install deploykit again") as caught:
        site_files(MANIFEST, {})
    assert caught.value.altered == ("LICENSE.xz",)


def npm_package(tmp_path: Path) -> bytes:
    """Pack what is vendored as npm would."""
    import io
    import tarfile

    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name in vendored.SCRIPTS:
            entry = tarfile.TarInfo(f"package/dist/{name}")
            entry.size = 4
            archive.addfile(entry, io.BytesIO(b"new\n"))
    return file.getvalue()


def test_a_renewal_takes_a_tarball_of_the_recorded_integrity_only(
    copied: Path, tmp_path: Path
) -> None:
    import base64
    import hashlib

    tarball = tmp_path / "package.tgz"
    tarball.write_bytes(npm_package(tmp_path))
    before = (copied / "vendor.json").read_bytes()
    with pytest.raises(BundleError, match=r"expected sha512-.*, got sha512-"):
        vendored.main(["--tarball", str(tarball)])
    assert (copied / "vendor.json").read_bytes() == before
    integrity = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    options = ["--version", "9.9.9", "--integrity", f"sha512-{integrity}"]
    assert vendored.main(["--tarball", str(tarball), *options]) == 0
    record = json.loads((copied / "vendor.json").read_bytes())
    assert record["version"] == "9.9.9"
    assert vendored.vendored_files()["ort.wasm.bundle.min.js"] == b"new\n"


# the benchmark


@pytest.mark.parametrize(("step", "counted"), [(0.1, (2, 0)), (0.001, (2, 1))])
def test_benchmark_tells_near_ties_from_other_answers(step: float, counted: object) -> None:
    import browser  # benchmarks/browser.py

    python = {"logits": np.array([[1, 0], [0, 1], [0.5, 0.45]]), "near": step}
    found = {"logits": np.array([[1, 0], [0, 1], [0.45, 0.5]])}
    assert browser.compare(python, found) == counted


def test_benchmark_draws_every_digit_inside_the_field() -> None:
    import browser

    assert sorted(browser.STROKES) == list("0123456789")
    points = [place for lines in browser.STROKES.values() for line in lines for place in line]
    assert all(0 < one < 1 for place in points for one in place)
