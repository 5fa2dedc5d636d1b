"""What a run or a bundle holds, in a few lines for a person."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deploykit.artifacts import JsonDict
from deploykit.errors import BundleError
from deploykit.recipe.sections import COMPRESSORS
from deploykit.run_folder import RunFolder

STAGES = ("train", *COMPRESSORS, "convert")


def inspect_folder(folder: Path) -> str:
    """Describe the run or the bundle at ``folder``.

    Raises:
        BundleError: it is neither, or a bundle with a broken manifest or altered files.
        ModelError: it is a damaged run.
    """
    if folder.is_file() or (folder / "manifest.json").exists():
        return "\n".join(_bundle_lines(folder))
    if (folder / "recipe.yaml").exists():
        return "\n".join(_run_lines(RunFolder(folder)))
    raise BundleError(
        f"{folder}: expected a run with recipe.yaml or a bundle with manifest.json, found neither"
    )


def result_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Tell the result of a run: accuracy, speed, size, before and after."""
    baseline, final, drop = report["baseline"], report["final"], report["drop"]
    low, high = drop["interval"]
    yield (
        f"accuracy: {baseline['accuracy']:.2%} -> {final['accuracy']:.2%} on the test split "
        f"(drop {drop['value']:+.2%}, 95%: {low:+.2%} to {high:+.2%})"
    )
    for batch, before in baseline["latency_ms"].items():
        after = final["latency_ms"][batch]
        if after is None:
            yield f"latency at batch {batch}: not measured on the target"
            continue
        yield (
            f"latency at batch {batch}: {before:.3f} -> {after:.3f} ms, "
            f"{final['speedup'][batch]:.2f}x faster ({report['threads']} threads)"
        )
    before, after = baseline["size_bytes"], final["size_bytes"]
    yield f"size: {before:,} -> {after:,} bytes, {before / after:.2f}x smaller"


def _run_lines(run: RunFolder) -> Iterator[str]:
    recipe, report = run.recipe(), run.read_json("report.json")
    yield f"run: {recipe.name}, seed {recipe.seed}, target {recipe.target}"
    yield f"model: {recipe.model.name}; data: {recipe.data.source}"
    folders = [run, *(RunFolder(path) for path in run.path.glob("trials/*"))]
    done = [name for name in STAGES if any(one.onnx(name).exists() for one in folders)]
    if report is None:
        yield f"unfinished; stages done: {', '.join(done) or 'none'}; --resume continues it"
        return
    yield f"finished; stages: {', '.join(stage['name'] for stage in report['stages'])}"
    yield from result_lines(report)
    for decision in report["decisions"]:
        yield f"{decision['stage']}: {'kept' if decision['kept'] else 'refused'}: {decision['why']}"
    trials = report["details"].get("trials", ())
    for trial in trials if len(trials) > 1 else ():
        chosen = "chosen" if trial["chosen"] else "not chosen"
        yield f"trial {trial['number']}: {trial['told']}; {chosen}"
    yield f"budget: {'holds' if report['budget']['passed'] else 'does not hold'}"


def _bundle_lines(folder: Path) -> Iterator[str]:
    from deploykit import runtime
    from deploykit.bundle import told_as_deploykit

    with told_as_deploykit():
        manifest, _ = runtime.read_bundle(folder)
    yield (
        f"bundle: {manifest['name']} {manifest['version']}, task {manifest['task']}, "
        f"target {manifest['target']}"
    )
    for kind in ("inputs", "outputs"):
        for spec in manifest[kind]:
            name = runtime.printable(spec["name"])
            yield f"{kind[:-1]}: {name} {spec['dtype']} {spec['shape']}"
    yield f"labels: {runtime.printable(_shortened(manifest['labels']))}"
    yield from _measured_lines(manifest["measured"])
    yield (
        f"opset {manifest['opset']}, onnxruntime >= {manifest['min_onnxruntime']}, "
        f"{manifest['threads']} threads"
    )
    yield f"digest: {manifest['digest']}"
    yield runtime.about_signature(folder)
    for name, entry in sorted(manifest["files"].items()):
        yield f"  {entry['bytes']:>10,}  {name}"


def _measured_lines(measured: JsonDict) -> Iterator[str]:
    if measured.get("accuracy") is not None:
        yield f"accuracy: {measured['accuracy']:.2%} on the test split"
    for batch, latency in measured.get("latency_ms", {}).items():
        told = "not measured on the target" if latency is None else f"{latency:.3f} ms"
        yield f"latency at batch {batch}: {told}"


def _shortened(labels: list[str], count: int = 10) -> str:
    more = f" and {len(labels) - count} more" if len(labels) > count else ""
    return ", ".join(labels[:count]) + more
