"""What docs/serve.md says of the server is so."""

import re
import shlex
from pathlib import Path

import pytest
from sample_models import DIGITS
from test_readme import blocks

from deploykit.server.meters import Meters
from deploykit.server.openapi import openapi
from deploykit.server.refusal import Refusal
from deploykit.server.routes import resolve
from deploykit.server.settings import Settings
from deploykit.server.start import BOUNDS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/serve.md").read_text()
CURL = [line for block in blocks(TEXT, "") for line in block.splitlines() if "curl " in line]


def asked(line: str) -> tuple[str, str]:
    """Return the method and the path of a curl command, the last of a pipe."""
    words = shlex.split("curl " + line.rpartition("curl ")[2])
    (url,) = [word for word in words if word.startswith("http://127.0.0.1:3000")]
    has_body = any(word.startswith("--data") for word in words)
    method = words[words.index("-X") + 1] if "-X" in words else "POST" if has_body else "GET"
    return method, url.removeprefix("http://127.0.0.1:3000").partition("?")[0]


@pytest.mark.parametrize("line", CURL)
def test_curl_asks_a_route_by_a_method_that_it_takes(line: str) -> None:
    method, path = asked(line)
    assert method in resolve(path.encode()).methods


def test_curl_lines_are_read() -> None:
    assert len(CURL) > 10
    assert asked("x | curl --data-binary @- 'http://127.0.0.1:3000/predict?top=3'") == (
        "POST",
        "/predict",
    )
    with pytest.raises(Refusal):
        resolve(asked("curl http://127.0.0.1:3000/v2/predict")[1].encode())


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading."""
    below = TEXT.partition(f"\n## {heading}\n")[2]
    table = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)
    assert table, heading
    return [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in table[0].splitlines(keepends=True)[2:]
    ]


def test_limits_are_those_of_the_server() -> None:
    told = {flag.strip("`"): default for flag, default, _ in rows("Limits") if flag != "none"}
    for flag, default in told.items():
        field, *_ = BOUNDS[flag]
        assert float(re.match(r"[0-9]+", default)[0]) == getattr(Settings, field), flag  # type: ignore[index]
    assert {"--max-body", "--max-pixels", "--queue", "--timeout", "--max-batch"} <= told.keys()


def test_statuses_are_those_of_the_description() -> None:
    document = openapi([DIGITS], Settings(("x",), token="t"))
    described = {int(status) for status in document["components"]["responses"]}
    told = {int(status) for status, _ in rows("What it answers")}
    assert described <= told
    assert told - described <= {200, 204, 404, 405}


def test_metrics_are_those_that_the_server_has() -> None:
    families = Meters().registry.collect()
    there = {
        f"{family.name}_total" if family.type == "counter" else family.name for family in families
    }
    told = {name.strip("`") for name, _ in rows("Metrics, log, traces")}
    assert told == there


def test_line_of_the_access_log_has_the_keys_that_are_written() -> None:
    source = (ROOT / "deploykit/server/exchange.py").read_text()
    written = re.findall(r'^ {12}"(\w+)":', source, re.MULTILINE)
    (line,) = [block for block in blocks(TEXT, "json") if "time" in block]
    assert re.findall(r'"(\w+)":', line) == written
