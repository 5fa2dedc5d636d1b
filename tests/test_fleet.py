import copy
import json
from html.parser import HTMLParser

import pytest

from deploykit.errors import DataError, UsageError
from deploykit.fleet import gather, table_lines, write_devices
from deploykit.report import wording

VOID = {"meta"}


def measured(device="pi", latency=1.5, **changes):
    """What `bench --json` prints on one device."""
    row = {"threads": changes.get("threads", 2), "runs": 100, "samples_per_second": 900.0}
    value = {
        "schema": 1,
        "name": "digits",
        "version": "1",
        "target": "cpu-arm64",
        "digest": "a" * 64,
        "device": {
            "name": device,
            "cpu": "Cortex-A76",
            "machine": "aarch64",
            "cpu_target": "cpu-arm64",
            "features": ["asimd", "asimddp"],
            "cores": 4,
            "os": "Linux 6.6",
            "python": "3.11.2",
        },
        "onnxruntime": "1.31.1",
        "provider": "CPUExecutionProvider",
        "threads": 2,
        "latency": [
            {**row, "batch": 1, "median_ms": latency, "p90_ms": 1.2 * latency},
            {**row, "batch": 32, "median_ms": 20 * latency, "p90_ms": 24 * latency},
        ],
        "memory": {"peak_bytes": 61_000_000, "model_bytes": 2_000_000},
        "golden": {"samples": 10, "max_abs": 0.01, "grey_levels": 0.0, "passed": True},
        "accuracy": 0.9722,
    }
    return value | changes


@pytest.fixture
def write(tmp_path):
    """Write measurements to files, a.json first."""

    def write(*values):
        files = [tmp_path / f"{letter}.json" for letter in "abcdefgh"[: len(values)]]
        for file, value in zip(files, values, strict=True):
            file.write_text(value if isinstance(value, str) else json.dumps(value))
        return files

    return write


class Page(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def render(tmp_path, write):
    def render(*values):
        out = tmp_path / "devices.html"
        write_devices(write(*values), out, force=True)
        return Page(out.read_text(encoding="utf-8"))

    return render


def find_references(page):
    """Name everything by which a page would load or run something."""
    found = [tag for tag in page.tags if tag in {"script", "link", "iframe", "img", "object"}]
    for tag, name, value in page.attributes:
        if name in {"src", "href", "srcset", "data", "action", "xlink:href"} or name[:2] == "on":
            found.append(f"{tag} {name}")
        if name == "style" and ("url(" in value or "//" in value):
            found.append(f"{tag} {value}")
    style = "".join(page.texts[: page.texts.index("deploykit devices")])
    return found + [word for word in ("url(", "@import", "http", "//") if word in style]


# gathering


def test_devices_of_one_bundle_are_told_together_the_fastest_first(write):
    (model,) = gather(write(measured("slow", 9), measured("fast", 1), measured("middle", 3)))
    assert [one.value.device.name for one in model.told] == ["fast", "middle", "slow"]
    assert model.label == "digits 1"


def test_bundles_of_one_name_with_other_content_stay_apart(write):
    other = measured(digest="b" * 64, accuracy=0.5)
    models = gather(
        write(
            other, measured(), measured(version="2"), measured("nuc", digest="b" * 64, accuracy=0.5)
        )
    )
    assert [model.label for model in models] == [
        "digits 1 (aaaaaaaaaaaa)",
        "digits 1 (bbbbbbbbbbbb)",
        "digits 2",
    ]
    assert [len(model.told) for model in models] == [1, 2, 1]


def test_a_device_may_be_measured_with_several_counts_of_threads(write):
    (model,) = gather(write(measured(), measured(threads=4)))
    assert len(model.told) == 2


def test_keys_of_later_versions_are_passed_over(write):
    assert len(gather(write(measured(surprise={"a": [1]})))) == 1


def without(value, *path):
    """Leave a key out."""
    changed = copy.deepcopy(value)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return changed


def altered(new, *path):
    changed = copy.deepcopy(measured())
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return changed


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("", "expected the JSON that bench --json prints"),
        ("batch 1: median 3 ms", "expected the JSON that bench --json prints"),
        ("[]", "expected"),
        ("[" * 100_000, "expected the JSON"),
        (measured(schema=2), "schema: expected 1, got 2"),
        (without(measured(), "schema"), "schema: expected it, found none"),
        (without(measured(), "memory", "peak_bytes"), "memory.peak_bytes: expected it"),
        (altered(NAN, "latency", 0, "median_ms"), "latency.0.median_ms: expected a finite number"),
        (altered(INFINITY, "latency", 1, "p90_ms"), "latency.1.p90_ms: expected a finite number"),
        (altered(0, "latency", 0, "median_ms"), "latency.0.median_ms: expected greater than or"),
        (altered(5e-324, "latency", 0, "median_ms"), "latency.0.median_ms: expected greater than"),
        (altered(1.7e308, "latency", 0, "p90_ms"), "latency.0.p90_ms: expected less than or equal"),
        (altered(10**400, "memory", "peak_bytes"), "memory.peak_bytes: expected"),
        (altered(1, "latency", 1, "batch"), "expected one row a batch, of equal threads"),
        (altered(7, "latency", 1, "threads"), "expected one row a batch, of equal threads"),
        (altered("\x1b[31mred\u202e", "device", "name"), "device.name: expected printable text"),
        (altered("a\0", "device", "os"), "device.os: expected printable text"),
        (altered("1.5", "latency", 0, "median_ms"), "latency.0.median_ms: expected a valid number"),
        (altered(True, "threads"), "threads: expected a valid integer, got true"),
        (altered(1.5, "accuracy"), "accuracy: expected less than or equal to 1, got 1.5"),
        (altered(NAN, "accuracy"), "accuracy: expected a finite number"),
        (altered(False, "golden", "passed"), "golden.passed: expected True, got false"),
        (altered([], "latency"), "latency"),
        (altered("", "device", "name"), "device.name"),
        (altered("x" * 201, "device", "name"), "device.name"),
        (altered("A" * 64, "digest"), "digest"),
        (altered("a" * 64 + "\n", "digest"), "digest"),
    ],
)  # fmt: skip
def test_what_bench_did_not_print_is_refused_in_one_sentence_with_the_file(write, value, told):
    files = write(measured("other"), value)
    with pytest.raises(DataError) as caught:
        gather(files)
    assert str(caught.value).startswith(f"{files[1]}: ")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "big.json").write_bytes(b" " * (1 << 20) + b"{}")
    for name, told in (
        ("absent.json", "No such file"),
        ("big.json", "at most 1048576 bytes"),
        (".", "expected a file"),
    ):
        with pytest.raises(DataError, match=told) as caught:
            gather([tmp_path / name])
        assert str(tmp_path / name) in str(caught.value)


def test_a_device_that_is_there_twice_is_told_with_both_files(write):
    files = write(measured("nuc"), measured(), measured(latency=7))
    with pytest.raises(DataError) as caught:
        gather(files)
    assert str(caught.value) == (
        f"{files[2]}: expected one file a device, got 'pi' with 2 threads again, as in {files[1]}; "
        "name devices with bench --device"
    )


@pytest.mark.parametrize("changes", [{"accuracy": 0.5}, {"accuracy": None}, {"target": "web"}])
def test_two_files_that_cannot_both_be_of_one_bundle_are_refused(write, changes):
    files = write(measured("nuc"), measured(**changes))
    with pytest.raises(DataError, match="whose bundle is the same") as caught:
        gather(files)
    assert all(str(file) in str(caught.value) for file in files)


def test_no_files_are_bad_usage(tmp_path):
    with pytest.raises(UsageError, match="at least one file"):
        write_devices([], tmp_path / "x.html")


# the page


def test_page_tells_device_latency_and_accuracy(render):
    text = render(measured(), measured("nuc", 0.25)).text.replace(wording.SPACE, " ")
    for told in (
        "digits 1",
        "on 2 devices",
        "accuracy 97.22%",
        "1.50 ms",
        "p90 1.80 ms",
        "0.250 ms",
        "Cortex-A76",
        "61.0 MB",
        "10 as stored",
        "2 of 4 cores",
    ):
        assert told in text, told
    assert "None" not in text
    assert "nan" not in text.replace("provenance", "")


def test_bars_are_shares_of_the_slowest_device(render):
    page = render(measured("slow", 8), measured("fast", 2))
    widths = [value for tag, name, value in page.attributes if (tag, name) == ("i", "style")]
    assert widths == ["width:25.0%", "width:100.0%"] * 2


def test_page_loads_nothing_and_runs_nothing(render):
    assert find_references(render(measured(), measured("nuc"))) == []


@pytest.mark.parametrize(
    "planted",
    ["<script>1</script>", '<p onclick="x()"></p>', '<i style="background:url(x)"></i>'],
)
def test_the_search_for_references_finds_what_is_planted(render, tmp_path, planted):
    render(measured())
    text = (tmp_path / "devices.html").read_text(encoding="utf-8")
    assert find_references(Page(text.replace("<main>", f"<main>{planted}")))


HOSTILE = "<script>alert('&\"')</script>"


def poisoned(value):
    """Put hostile text wherever a device could have put some."""
    if isinstance(value, dict):
        return {key: value[key] if key == "digest" else poisoned(value[key]) for key in value}
    if isinstance(value, list):
        return [poisoned(inner) for inner in value]
    return HOSTILE if isinstance(value, str) else value


def test_text_of_devices_is_escaped_wherever_it_stands(render):
    page = render(
        poisoned(measured()), poisoned(measured(version="2", accuracy=0.5)) | {"digest": "b" * 64}
    )
    assert find_references(page) == []
    assert page.text.count("alert(") > 15


def test_accuracies_too_near_to_zero_for_an_axis_are_zero(render):
    page = render(measured(accuracy=5e-324), measured(accuracy=0.0) | {"digest": "b" * 64})
    assert find_references(page) == []


def test_models_are_compared_only_where_there_are_several(render):
    assert "svg" not in render(measured(), measured("nuc")).tags
    assert "svg" not in render(measured(accuracy=None), measured(version="2")).tags
    page = render(measured(), measured(version="2", accuracy=0.95, latency=0.5))
    assert page.tags.count("svg") == 2
    assert "digits 2, pi" in page.text


def test_what_stands_in_the_way_of_comparing_is_told(render):
    elsewhere = copy.deepcopy(measured("nuc", threads=1))
    elsewhere["device"]["cpu_target"] = "cpu-x86-avx2"
    elsewhere["golden"]["grey_levels"] = 1.0
    text = render(measured(), elsewhere).text
    assert "nuc is cpu-x86-avx2; the bundle was made for cpu-arm64." in text
    assert "The image decoder of nuc differs from the bundle's by one grey level." in text
    assert "Thread counts differ" in text
    assert "they say nothing about cuda" in render(measured(target="cuda")).text
    assert "warning" not in {
        value for _, name, value in render(measured()).attributes if name == "class"
    }


def test_what_was_not_measured_is_a_dash(render):
    blind = measured(accuracy=None, memory={"peak_bytes": None, "model_bytes": None})
    blind["latency"] = blind["latency"][:1]
    blind["device"] |= {"cpu": None, "cores": None, "features": []}
    text = render(blind).text
    assert f"accuracy {wording.DASH}" in text
    assert "None" not in text


# the terminal


def test_table_fits_80_columns_whatever_the_devices_say(write):
    hostile = measured(
        "a very long name of a device that nobody wants to read " * 3, onnxruntime="1" * 90
    )
    wide = measured("red", 123456.0, name="n" * 200, accuracy=None)
    lines = list(table_lines(gather(write(hostile, measured(), wide))))
    assert max(map(len, lines)) <= 80
    assert all(line.isprintable() for line in lines)
    assert any(line.startswith("pi ") and "1.50 ms" in line for line in lines)


def test_table_is_what_writing_the_page_returns(write, tmp_path):
    told = write_devices(write(measured()), tmp_path / "devices.html")
    head, columns, row = told.splitlines()
    assert head == "digits 1 for cpu-arm64: accuracy 97.22%"
    assert columns.split() == [
        "device",
        "cpu",
        "threads",
        "batch",
        "1",
        "batch",
        "32",
        "memory",
        "runtime",
    ]
    assert row.split() == [
        "pi",
        "cpu-arm64",
        "2",
        "1.50",
        "ms",
        "30.0",
        "ms",
        "61.0",
        "MB",
        "1.31.1",
    ]


# the file


def test_page_replaces_a_page_alone_and_only_if_asked(write, tmp_path):
    files, out = write(measured()), tmp_path / "devices.html"
    write_devices(files, out)
    with pytest.raises(UsageError, match="--force"):
        write_devices(files, out)
    write_devices(files, out, force=True)
    before = files[0].read_text()
    for place in (files[0], tmp_path):
        with pytest.raises(UsageError, match="expected a page to replace"):
            write_devices(files, place, force=True)
    assert files[0].read_text() == before


def test_nothing_is_written_where_a_file_is_refused(write, tmp_path):
    out = tmp_path / "devices.html"
    with pytest.raises(DataError):
        write_devices(write(measured(), "no"), out)
    assert not out.exists()


def test_a_place_that_cannot_be_written_is_told(write, tmp_path):
    with pytest.raises(UsageError, match="cannot be written"):
        write_devices(write(measured()), tmp_path / "absent/devices.html")
