"""Write, verify and load a bundle: the folder that ships.

The format and its reader are ``deploykit.runtime``, whose file is the bundle's runner; the
bytes of the single files are made in ``bundle_files`` and ``bundle_readme``. Loads without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from deploykit import __version__, runtime
from deploykit.artifacts import JsonDict, OnnxModel
from deploykit.bundle_files import Golden as Golden
from deploykit.bundle_files import golden_files, min_onnxruntime, seal
from deploykit.bundle_readme import readme
from deploykit.errors import (
    BundleError,
    DataError,
    DeploykitError,
    MissingDependency,
    VerificationError,
)
from deploykit.publish import (
    Kind,
    publish_folder,
    refuse_existing,
    told_as_usage,
    write_atomic,
)

BATCH_SIZE = 32
Format = Literal["folder", "zip"]
# Returns more files of a bundle, given its manifest so far and the files that it has.
Companion = Callable[[Mapping[str, Any], Mapping[str, bytes]], Mapping[str, bytes]]
Sample = np.ndarray | Path | str | bytes | bytearray


@dataclass(frozen=True)
class Prediction:
    """Answers for ``N`` samples.

    Attributes:
        labels: the likeliest class of each sample.
        probabilities: ``(N, classes)``, float64.
        logits: ``(N, classes)``, as the model gave them.
        classes: the class names in the order of the logits; empty where there are none.
    """

    labels: tuple[str, ...]
    probabilities: np.ndarray
    logits: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def top(self, count: int = 3) -> list[list[JsonDict]]:
        """Return the ``count`` likeliest classes of each sample, best first."""
        return [runtime.rank(one, self.classes, count) for one in self.probabilities]


@dataclass(frozen=True)
class Bundle:
    """A verified, opened bundle."""

    manifest: JsonDict
    session: Any

    def predict(self, samples: Sample | Iterable[Sample]) -> Prediction:
        """Classify samples.

        Args:
            samples: one sample or a list of them: the path or the bytes of an image file
                (``.npy`` where the model takes arrays), or an array as the model takes it;
                or one array of a whole batch.

        Returns:
            One answer a sample, in order.

        Raises:
            DataError: a sample cannot be used; it is told by its place, from 0.

        Example:
            >>> load_bundle("bundles/digits").predict("seven.png").labels
            ('7',)
        """
        rows = self._rows(samples)
        if not rows:
            raise DataError("predict: expected at least one sample, got none")
        with told_as_deploykit():
            logits = np.concatenate(
                [
                    runtime.run_model(self.session, np.stack(rows[start : start + BATCH_SIZE]))
                    for start in range(0, len(rows), BATCH_SIZE)
                ]
            )
        probabilities = runtime.softmax(logits)
        classes = tuple(self.manifest["labels"])
        best = tuple(runtime.rank(one, classes, 1)[0]["label"] for one in probabilities)
        return Prediction(best, probabilities, logits, classes)

    def _rows(self, samples: Sample | Iterable[Sample]) -> list[np.ndarray]:
        """Turn the argument into samples without batch axis; a fault tells at which one."""
        rows: list[np.ndarray] = []
        try:
            with told_as_deploykit():
                for sample in _listed(samples):
                    for row in self._read(sample):
                        rows.append(row)
        except DataError as error:
            raise DataError(f"predict: sample {len(rows)}: {error}") from error
        return rows

    def _read(self, sample: Sample) -> Iterator[np.ndarray]:
        if isinstance(sample, (bytes, bytearray)):
            yield runtime.read_sample(bytes(sample), self.manifest)
        elif isinstance(sample, (str, Path)):
            yield runtime.read_input(str(sample), self.manifest)
        elif isinstance(sample, np.ndarray):
            yield from self._checked(sample)
        else:
            raise DataError(
                "expected a path, the bytes of a file or an array, "
                f"got {type(sample).__name__}; numpy.asarray makes an array"
            )

    def _checked(self, array: np.ndarray) -> Iterator[np.ndarray]:
        spec = self.manifest["inputs"][0]
        shape, dtype = tuple(spec["shape"][1:]), np.dtype(spec["dtype"])
        batch = array[np.newaxis] if array.ndim == len(shape) else array
        # Pixels are taken as they are: floats from 0 to 1 would turn into black.
        fits = array.dtype == dtype or (
            dtype != np.uint8 and np.can_cast(array.dtype, dtype, "same_kind")
        )
        if batch.shape[1:] != shape or not fits:
            raise DataError(
                f"expected {dtype} of shape {shape} or a batch of it, "
                f"got {array.dtype} of shape {array.shape}"
            )
        return (runtime.cast_finite(row, dtype) for row in batch)


def write_bundle(
    model: OnnxModel,
    destination: Path,
    *,
    name: str,
    version: str,
    target: str,
    threads: int,
    task: str,
    measured: Mapping[str, Any],
    measured_on: Mapping[str, Any] | None,
    verified_on: Mapping[str, Any],
    tolerance: Mapping[str, Any],
    golden: Golden,
    companions: Sequence[Companion] = (),
    format: Format = "folder",
    force: bool = False,
) -> Path:
    """Write a bundle, verify it, and only then let it appear at ``destination``.

    Identical arguments give identical bytes.

    Args:
        model: one ONNX file without external data.
        destination: the bundle's folder, or its zip file.
        name: as in the recipe.
        version: of the model, such as ``1.0``.
        target: where it will run.
        threads: that latencies were measured with, and that the runner uses.
        task: as in the recipe.
        measured: accuracy, latency, size: whatever the manifest and the README tell.
        measured_on: the machine of the latencies; ``None`` where none were taken.
        verified_on: where the numerics were verified; ``targets``, those that the model is
            right for, this one among them.
        tolerance: ``max_abs`` bounds the difference of logits; ``top1``, ``steps``, ``scale``.
        golden: samples with the answers of the model.
        companions: make what ships beside the model, each given what those before it made.
        format: a folder, or a zip file of the same files.
        force: replace a bundle that stands there.

    Returns:
        ``destination``.

    Raises:
        UsageError: ``destination`` exists, or cannot be written.
        BundleError: the model cannot be opened, or has another border than its signature.
        VerificationError: the model does not give the golden answers.
    """
    refuse_existing(destination, force, kind_of(format))
    model_bytes = model.path.read_bytes()
    manifest = {
        "schema": runtime.SCHEMA,
        "name": name,
        "version": version,
        "target": target,
        "threads": threads,
        "task": task,
        "opset": model.opset,
        "min_onnxruntime": min_onnxruntime(model_bytes),
        **model.signature.to_json(),
        "measured": dict(measured),
        "measured_on": None if measured_on is None else dict(measured_on),
        "verified_on": {
            "deploykit": __version__,
            "cpu_target": runtime.detect_cpu(),  # where it is verified below
            **verified_on,
        },
        "tolerance": dict(tolerance),
    }
    contents = {runtime.MODEL: model_bytes, **golden_files(golden), runtime.RUNNER: _runner()}
    for companion in companions:
        contents.update(companion(manifest, contents))
    contents["README.md"] = readme(manifest, sorted(contents)).encode()
    files = {**contents, runtime.MANIFEST: seal(manifest, contents)}
    (_publish_zip if format == "zip" else _publish_folder)(destination, files, force)
    return destination


def kind_of(format: Format) -> Kind:
    """Return what a bundle of a format is to `publish`."""
    return "zip" if format == "zip" else "bundle"


def _publish_folder(destination: Path, files: Mapping[str, bytes], force: bool) -> None:
    with publish_folder(destination, force=force) as staging:
        for name, data in files.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_bytes(data)
        verify_bundle(staging)


def _publish_zip(destination: Path, files: Mapping[str, bytes], force: bool) -> None:
    data = runtime.pack(files)
    with TemporaryDirectory(prefix="deploykit-") as scratch:
        staged = Path(scratch) / "bundle.zip"
        staged.write_bytes(data)
        verify_bundle(staged)
    refuse_existing(destination, force, "zip")
    with told_as_usage(destination):
        destination.absolute().parent.mkdir(parents=True, exist_ok=True)
    write_atomic(destination.absolute(), data)


def verify_bundle(path: Path, key: Path | None = None) -> JsonDict:
    """Verify a bundle as strictly as can be: files, signature, runner, golden samples.

    Args:
        path: the bundle, a folder or a zip file.
        key: PEM file of the public key of who must have signed it; None: no signature is checked.

    Returns:
        The manifest.

    Raises:
        BundleError: the folder is not what its manifest says, or the runner is not the one
            that the bundle's version of deploykit ships.
        VerificationError: the model does not give the golden answers, or ``key`` has not signed it.
        UsageError: the key cannot be used.
        MissingDependency: onnxruntime is too old for the model, or model-signing is missing.
    """
    with told_as_deploykit():
        manifest, contents = runtime.read_bundle(Path(path))
        if key is not None:
            from deploykit.signing import check_manifest

            try:
                check_manifest(manifest, runtime.read_signature(Path(path)), key)
            except VerificationError as error:
                raise VerificationError(f"{path}: {error}") from error
        # A runner cannot vouch for itself. Another version's is known by its hash alone.
        same_version = manifest["verified_on"].get("deploykit") == __version__
        if same_version and contents[runtime.RUNNER] != _runner():
            raise BundleError(
                f"{path}: {runtime.RUNNER}: expected the runner of deploykit {__version__}, found "
                "another; export the bundle again",
                altered=[runtime.RUNNER],
            )
        session = runtime.open_model(manifest, contents, manifest["threads"])
        runtime.judge_here(manifest, contents, session)
    return manifest


def about_runner(manifest: Mapping[str, Any]) -> str:
    """Say that nobody compared a bundle's ``run.py``; nothing where `verify_bundle` did."""
    made_by = manifest["verified_on"].get("deploykit")
    if made_by == __version__:
        return ""
    return (
        f"{runtime.RUNNER} is that of deploykit {made_by!r}, and this is {__version__}: it was "
        "held to the manifest alone"
    )


def load_bundle(path: Path | str, threads: int | None = None) -> Bundle:
    """Open a bundle after verifying its files; what was verified is what is opened.

    On another kind of CPU than the one that verified the bundle its golden samples are run too:
    where they hold, a line on standard error may say that the bundle was not made for this CPU.

    Args:
        path: the bundle, a folder or a zip file.
        threads: of a prediction; default: those of the manifest.

    Raises:
        BundleError: the folder is not what its manifest says.
        VerificationError: the model gives other answers on this kind of CPU.
        MissingDependency: onnxruntime is too old for the model.
    """
    with told_as_deploykit():
        manifest, contents = runtime.read_bundle(Path(path))
        threads = threads or manifest["threads"]
        return Bundle(manifest, runtime.open_bundle(manifest, contents, threads))


@contextmanager
def told_as_deploykit() -> Iterator[None]:
    """Turn the runner's errors into deploykit's."""
    try:
        yield
    except runtime.BrokenBundleError as error:
        raise BundleError(str(error), error.missing, error.extra, error.altered) from error
    except runtime.RunnerError as error:
        kinds: dict[int, type[DeploykitError]] = {3: DataError, 4: VerificationError}
        raise kinds.get(error.exit_code, MissingDependency)(str(error)) from error


def _listed(samples: Sample | Iterable[Sample]) -> Iterable[Sample]:
    if isinstance(samples, (np.ndarray, Path, str, bytes, bytearray)):
        return [samples]
    try:
        return iter(samples)
    except TypeError:
        return [samples]  # type: ignore[list-item]  # refused by name


def _runner() -> bytes:
    return Path(runtime.__file__).read_bytes()
