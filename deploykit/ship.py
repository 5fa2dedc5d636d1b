"""From a Run to a Bundle: the very model that was measured, with its proof."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import BadZipFile

import numpy as np

from deploykit.artifacts import JsonDict, OnnxModel, Signature
from deploykit.bundle import Companion, Format, Golden, kind_of, write_bundle
from deploykit.bundle_files import golden_files
from deploykit.environment import environment
from deploykit.errors import BudgetError, ModelError, UsageError
from deploykit.progress import Progress
from deploykit.publish import refuse_existing
from deploykit.recipe.sections import Recipe
from deploykit.run_folder import RunFolder
from deploykit.runtime import open_session, run_model
from deploykit.targets import (
    Target,
    about_integers,
    integers_for,
    resolve_target,
    suited_targets,
)

# A golden answer may differ by this many steps of the output on another CPU of the target.
GOLDEN_STEPS = 2.0
FIRST_VERSION = "1"
VERSION = re.compile(r"[A-Za-z0-9._-]{1,64}")
NEEDED = {"final", "baseline", "drop", "budget", "environment", "details"}  # of a report.json


@dataclass(frozen=True)
class Shipment:
    """What goes into a bundle beside the recipe's own words; see `write_bundle`."""

    model: OnnxModel
    measured: JsonDict
    measured_on: JsonDict | None
    verified_on: JsonDict
    parity: JsonDict
    golden: Golden


def export_run(
    run: Path,
    out: Path,
    *,
    target: str | None = None,
    version: str = FIRST_VERSION,
    format: Format | None = None,
    native: bool = False,
    mobile: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the bundle of a finished run.

    The model is the file that the run measured, found by its hash. Only for a target that
    computes integers otherwise, or ships another precision, is it made anew: from the newest
    float candidate, and for integers from the stored calibration samples.

    Args:
        run: the folder that ``compress`` wrote.
        out: the bundle's folder, or its zip file.
        target: where it will run; default: the recipe's. A bundle for ``web`` is a web site too.
        version: of the model, by which a server tells it from others of its name.
        format: ``folder`` or ``zip``; default: as the suffix of ``out`` says.
        native: whether samples of code for C++, Android and iOS ship too.
        mobile: whether the model ships in ONNX Runtime's own format too, with the list of its
            operators, from which small builds of ONNX Runtime for phones are made.
        force: replace a bundle that stands at ``out``.
        progress: who is told what could not be proven again; default: nobody.

    Returns:
        ``out``.

    Raises:
        UsageError: ``out`` stands already, or the version is none.
        ModelError: ``run`` is not a finished run.
        VerificationError: the run's files were altered, or its model cannot be made for
            ``target``.
        BudgetError: the run's budget does not hold, or not for ``target``.
    """
    format = format or format_of(out)
    refuse_existing(out, force, kind_of(format))
    check_version(version)
    folder = RunFolder(run)
    recipe, report = folder.recipe(), _finished(folder)
    shipped = report["details"]["model"]
    made_for = resolve_target(shipped["target"])
    integers = resolve_target(shipped.get("integers") or shipped["target"])
    wanted = made_for if target is None else resolve_target(target)
    # Where the recipe asks for the same, what the run found to pay is what ships.
    precision = recipe.precision_on(wanted)
    if precision == recipe.precision_on(made_for):
        precision = shipped["precision"]
    fits = precision == shipped["precision"] and (
        precision != "int8" or _ship_as_they_are(integers, wanted)
    )
    if progress is not None and precision == "int8" and (told := about_integers(wanted)):
        progress.message(told)
    with TemporaryDirectory(prefix="deploykit-") as scratch:
        if fits:
            shipment = _as_measured(folder, report, here=wanted == made_for)
        else:
            path = Path(scratch) / "model.onnx"
            shipment = _made_anew(folder, recipe, report, wanted, precision, path)
            if progress is not None and shipment.measured["accuracy"] is None:
                progress.message(
                    f"warning: the data of {run} cannot be read again, or are others by now: "
                    f"what was made for {wanted.name} agrees with torch, but its accuracy is "
                    "unknown and was held to no budget"
                )
        return write_bundle(
            shipment.model,
            out,
            name=recipe.name,
            version=version,
            target=wanted.name,
            threads=recipe.threads,
            task=recipe.task,
            measured=shipment.measured,
            measured_on=shipment.measured_on,
            verified_on={
                **shipment.verified_on,
                "targets": suited_targets(precision, integers if fits else integers_for(wanted)),
            },
            tolerance=_tolerance(shipment.parity),
            golden=shipment.golden,
            companions=companions(wanted, native=native, mobile=mobile),
            format=format,
            force=force,
        )


def check_version(version: str) -> None:
    """Refuse what cannot stand in a URL as the version of a model.

    Raises:
        UsageError: it is not plain.
    """
    if not VERSION.fullmatch(version):
        raise UsageError(
            f"version: expected up to 64 letters, digits, '.', '_' and '-', got {version[:80]!r}"
        )


def format_of(out: Path) -> Format:
    """Return the format of a bundle that is to stand at ``out``."""
    return "zip" if out.suffix.lower() == ".zip" else "folder"


def companions(target: Target, *, native: bool, mobile: bool) -> list[Companion]:
    """Return what makes the files that ship beside a model for ``target``."""
    found: list[Companion] = []
    if native:
        from deploykit.native import native_files

        found.append(native_files)
    if mobile:
        from deploykit.mobile import mobile_files

        found.append(mobile_files)
    if target.name == "web":
        from deploykit.web import site_files

        found.append(site_files)
    return found


def _ship_as_they_are(integers: Target, wanted: Target) -> bool:
    """Whether integers that were made for one target ship to another.

    They do where a model made anew would have the same. A browser computes like no CPU in
    particular: what is right there has been trained and measured, and is not calibrated anew.
    """
    if integers.scheme in {wanted.scheme, integers_for(wanted).scheme}:
        return True
    return wanted.name == "web" and wanted.takes_integers_of(integers)


def _as_measured(folder: RunFolder, report: JsonDict, *, here: bool) -> Shipment:
    """Take the very file that the run measured; ``here`` says whether on the target."""
    final, shipped = report["final"]["name"], report["details"]["model"]
    measured_on = (report["details"].get("measured_on") or None) if here else None
    path = folder.measured_model(final, shipped["sha256"])
    return Shipment(
        OnnxModel(path, Signature.from_json(shipped["signature"]), shipped["opset"]),
        measured=_measured(report, latencies=measured_on is not None),
        measured_on=measured_on,
        verified_on=report["environment"],
        parity=report["details"]["parity"][final],
        golden=_golden(folder),
    )


def _made_anew(
    folder: RunFolder,
    recipe: Recipe,
    report: JsonDict,
    target: Target,
    precision: str,
    path: Path,
) -> Shipment:
    """Make the model anew for ``target``; its latency is unknown until it runs there."""
    from deploykit.retarget import make_for

    golden = _golden(folder)
    made = make_for(folder, recipe, target, precision, golden.inputs, path)
    session = open_session(path.read_bytes(), recipe.threads)
    return Shipment(
        made.model,
        measured={**_measured(report, latencies=False), "parity": made.parity, **made.measured},
        measured_on=None,
        verified_on=environment(),
        parity=made.parity,
        golden=replace(golden, outputs=run_model(session, golden.inputs)),
    )


def _finished(folder: RunFolder) -> JsonDict:
    """Return the report of a run that is finished and within its budget."""
    report = folder.read_json("report.json")
    if report is None:
        raise ModelError(
            f"{folder.path}: expected a finished run with report.json, found none; "
            "finish it with deploykit compress --resume"
        )
    if missing := sorted(NEEDED - set(report)):
        raise ModelError(
            f"{folder.path / 'report.json'}: expected the report of a run, got one without "
            f"{', '.join(missing)}; run compress --resume"
        )
    if not report["budget"]["passed"]:
        why = "; ".join(one["why"] for one in report["budget"]["checks"] if not one["passed"])
        raise BudgetError(f"{folder.path}: its budget does not hold: {why}; mend the recipe")
    return report


def _measured(report: Mapping[str, Any], *, latencies: bool) -> JsonDict:
    """Choose what the manifest tells; what was never taken on the target is null."""
    final, baseline = report["final"], report["baseline"]
    batches = final["latency_ms"]
    return {
        "accuracy": final["accuracy"],
        "baseline_accuracy": baseline["accuracy"],
        "accuracy_drop": report["drop"]["value"],
        "accuracy_drop_interval": report["drop"]["interval"],
        "latency_ms": batches if latencies else dict.fromkeys(batches),
        "speedup": final["speedup"] if latencies else dict.fromkeys(batches),
        "size_bytes": final["size_bytes"],
        "baseline_size_bytes": baseline["size_bytes"],
        "peak_memory_bytes": final["peak_memory_bytes"] if latencies else None,
        "normalization": report["details"].get("normalization") if latencies else None,
        "parity": report["details"]["parity"][final["name"]],
    }


def _tolerance(parity: Mapping[str, Any]) -> JsonDict:
    """Return how far a golden answer may be off: some steps of integers, a trace of floats."""
    steps = min(GOLDEN_STEPS, parity["allowed_steps"])
    return {
        "max_abs": steps * parity["scale"],
        "steps": steps,
        "scale": parity["scale"],
        "top1": True,
    }


def _golden(folder: RunFolder) -> Golden:
    """Read the samples that the run kept for its bundle.

    Raises:
        ModelError: they are not as the run wrote them.
    """
    files = sorted(path for path in folder.golden.glob("[0-9]*") if path.is_file())
    try:
        with np.load(folder.golden / "expected.npz", allow_pickle=False) as expected:
            inputs, outputs = expected["inputs"], expected["outputs"]
        golden = Golden([path.read_bytes() for path in files], inputs, outputs)
        golden_files(golden)  # refuses what is of no kind, or not one of each
    except (OSError, EOFError, TypeError, ValueError, KeyError, BadZipFile) as error:
        raise ModelError(
            f"{folder.golden}: expected the run's golden samples, got damaged ones: {error}; "
            "run compress --resume"
        ) from error
    return golden
