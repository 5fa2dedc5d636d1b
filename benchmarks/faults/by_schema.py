"""Requests that schemathesis derives from a server's OpenAPI document, right and wrong ones."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server_run import OTHERS
from wire import HANG_S

# Not `not_a_server_error`: a client may set a deadline that no server holds, and 504 says so.
CHECKS = (
    *("status_code_conformance", "content_type_conformance"),
    *("response_headers_conformance", "response_schema_conformance"),
)
UNDOCUMENTED = "ST103"  # a 500 among them
OTHER = "answers that the OpenAPI document does not describe"


@dataclass(frozen=True)
class Found:
    """What schemathesis found.

    Attributes:
        sent: requests.
        refused: those that were answered 4xx.
        faults: by name, how many; ``hung`` are requests that got no answer.
        told: each fault in a line.
    """

    sent: int
    refused: int
    faults: dict[str, int]
    told: tuple[str, ...]


def ask_by_schema(url: str, examples: int, seed: int, *, bounds: bool = True) -> Found:
    """Send up to ``examples`` requests an operation.

    Args:
        url: of the server.
        examples: drawn for each operation, right and wrong ones.
        seed: of the draws.
        bounds: whether to send all those too that lie at the bounds of the schemas.

    Raises:
        RuntimeError: schemathesis does not come to its end.
    """
    with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
        report = Path(folder) / "report.json"
        command = [OTHERS / "bin" / "st", "run", f"{url}/openapi.json"]
        command += [
            "--phases",
            "coverage,fuzzing" if bounds else "fuzzing",
            "--mode",
            "all",
            "--checks",
            ",".join(CHECKS),
        ]
        command += ["--max-examples", examples, "--seed", seed, "--no-shrink"]
        command += ["--continue-on-failure", "--suppress-health-check", "all"]
        command += ["--request-timeout", HANG_S, "--report", "json", "--report-json-path", report]
        done = subprocess.run(
            list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode not in (0, 1) or not report.exists():
            raise RuntimeError(f"schemathesis: exit code {done.returncode}: {done.stdout[-2000:]}")
        return read_report(json.loads(report.read_text()), done.stdout)


def read_report(report: Mapping[str, Any], output: str = "") -> Found:
    """Count what a report of schemathesis tells.

    Raises:
        RuntimeError: it did not test every operation.
    """
    if not report["complete"]:
        raise RuntimeError(f"schemathesis stopped: {report['stop_reason']}: {output[-2000:]}")
    faults: dict[str, int] = {"hung": report["test_cases"]["errored"]}
    told = [json.dumps(error)[:300] for error in report["errors"]]
    for failure in report["failures"]:
        name = "undocumented" if failure["code"] == UNDOCUMENTED else OTHER
        faults[name] = faults.get(name, 0) + failure["count"]
        where = ", ".join(failure["operations"][:3])
        told.append(f"{failure['count']} x {failure['title']} at {where}")
    rates = [phase for phases in report["valid_rates"].values() for phase in phases.values()]
    refused = sum(rate["rejected"] for rate in rates)
    return Found(report["test_cases"]["generated"], refused, faults, tuple(told))
