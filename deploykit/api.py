"""The Python functions behind the commands, on the same objects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.artifacts import JsonDict
from deploykit.bundle import Format, load_bundle
from deploykit.errors import UsageError
from deploykit.job import Run, run_recipe
from deploykit.progress import Progress
from deploykit.recipe import Recipe, load_recipe, parse_recipe
from deploykit.recipe.paths import with_absolute_paths
from deploykit.server.start import serve
from deploykit.ship import FIRST_VERSION, export_run

if TYPE_CHECKING:
    from torch import nn

    from deploykit.data import Dataset

__all__ = ["Run", "compress", "compress_recipe", "export", "load_bundle", "serve"]


SPLITS = {"train", "validation", "test"}


def compress(
    model: nn.Module | str,
    data: Any,
    *,
    out: Path | str,
    name: str = "model",
    seed: int = 0,
    target: str = "cpu",
    precision: str | None = None,
    threads: int = 1,
    weights: Path | str | None = None,
    augment: Sequence[Mapping[str, Any]] = (),
    normalize: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
    distill: Mapping[str, Any] | None = None,
    surgery: Mapping[str, Any] | None = None,
    prune: Mapping[str, Any] | None = None,
    sparsify: Mapping[str, Any] | None = None,
    cluster: Mapping[str, Any] | None = None,
    quantize: Mapping[str, Any] | None = None,
    verify: Mapping[str, Any] | None = None,
    budget: Mapping[str, Any] | None = None,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Train and compress a model of your own.

    Args:
        model: a module that takes normalized float ``(N, C, H, W)`` (or arrays) and returns
            logits; it is copied, never altered. Or a name as in a recipe's ``model.name``,
            such as ``path/to/file.py:function``: only then can another process rebuild the
            candidates of the run.
        data: a ``deploykit.data.Dataset``, or ``{"train": (x, y), "validation": (x, y), "test":
            (x, y)}`` of numpy arrays: uint8 images ``(n, H, W[, C])`` or float features; without
            ``test`` half of ``validation`` becomes it.
        out: the run's folder.
        name: of the run and its bundle.
        seed: all randomness follows from it.
        target: where the model will run.
        precision: floats that ship, as a recipe's ``precision``.
        threads: of every latency figure.
        weights: for a model given by name.
        augment: as a recipe's ``data.augment``.
        normalize: ``mean`` and ``std`` on the 0 to 1 scale, for images given as arrays.
        train: as the recipe's section of that name; None skips the stage.
        distill: likewise.
        surgery: likewise.
        prune: likewise.
        sparsify: likewise.
        cluster: likewise.
        quantize: likewise.
        verify: likewise.
        budget: likewise.
        force: replace a run that stands at ``out``.
        resume: continue an interrupted run.
        progress: who is told how far it is, such as ``deploykit.progress.ConsoleProgress()``;
            default: nobody.

    Returns:
        The finished run.

    Raises:
        BudgetError: a budget does not hold; the report stands at ``out`` all the same.
        DeploykitError: see `deploykit.errors`.

    Example:
        >>> run = compress(model, {"train": (x, y), "validation": (xv, yv), "test": (xt, yt)},
        ...                out="runs/mine", train={"epochs": 5}, quantize={"mode": "ptq"})
        >>> run.report["final"]["accuracy"]
        0.97
    """
    dataset = _dataset(data, normalize, seed)
    named = isinstance(model, str)
    recipe = _recipe(
        dataset,
        {
            "name": model if named else f"python:{type(model).__qualname__}",
            "weights": None if weights is None else str(weights),
        },
        {
            "train": train,
            "distill": distill,
            "surgery": surgery,
            "prune": prune,
            "sparsify": sparsify,
            "cluster": cluster,
            "quantize": quantize,
            "verify": verify,
            "budget": budget,
        },
        name=name,
        seed=seed,
        target=target,
        precision=precision,
        threads=threads,
        augment=[dict(one) for one in augment],
    )
    return run_recipe(
        recipe,
        Path(out),
        dataset=dataset,
        module=None if isinstance(model, str) else model,
        force=force,
        resume=resume,
        progress=progress,
    )


def compress_recipe(
    path: Path,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    force: bool = False,
    resume: bool = False,
    replay: Sequence[Mapping[str, JsonDict]] | None = None,
    progress: Progress | None = None,
    commands: Sequence[str] = (),
) -> Run:
    """Do what a recipe says.

    Args:
        path: the recipe's YAML file.
        out: the run's folder.
        overrides: ``section.key=value`` each.
        force: replace a run that stands at ``out``.
        resume: continue an interrupted run; begins one where there is none.
        replay: measurements of an earlier run to decide by: for each trial, by stage.
        progress: who is told how far it is; default: nobody.
        commands: lines that reproduce the run, for the report.

    Raises:
        DeploykitError: see `deploykit.errors`.
    """
    recipe = with_absolute_paths(load_recipe(path, overrides), path.parent)
    return run_recipe(
        recipe,
        out,
        force=force,
        resume=resume,
        replay=replay,
        progress=progress,
        commands=commands,
    )


def export(
    run: Run | Path | str,
    *,
    out: Path | str,
    target: str | None = None,
    version: str = FIRST_VERSION,
    format: Format | None = None,
    native: bool = False,
    mobile: bool = False,
    data: Any = None,
    quantize: str | None = None,
    max_drop: float | None = None,
    layout: str | None = None,
    name: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the verified bundle of a finished run, or of an ONNX file that came from elsewhere.

    Args:
        run: a run or its folder, or a file that ends in ``.onnx``.
        out: see `deploykit.ship.export_run`, which has a run's other arguments too.
        target: likewise.
        version: likewise.
        format: likewise.
        native: likewise.
        mobile: likewise.
        data: see `deploykit.foreign.export_foreign`; demanded for an ONNX file, and for it alone.
        quantize: likewise.
        max_drop: likewise.
        layout: likewise.
        name: likewise.
        force: replace a bundle that stands at ``out``.
        progress: who is told how far it is; default: nobody.

    Returns:
        ``out``.

    Raises:
        DeploykitError: see `deploykit.errors`.
    """
    path = run.path if isinstance(run, Run) else Path(run)
    shared: dict[str, Any] = {
        "target": target,
        "version": version,
        "format": format,
        "native": native,
        "mobile": mobile,
        "force": force,
        "progress": progress,
    }
    foreign = {
        "data": data,
        "quantize": quantize,
        "max_drop": max_drop,
        "layout": layout,
        "name": name,
    }
    given = {key: value for key, value in foreign.items() if value is not None}
    if path.suffix.lower() == ".onnx":
        if data is None:
            raise UsageError(
                f"{path}: expected --data beside an ONNX file, got none; name a recipe, a folder "
                "of classes, or digits: they prove the model"
            )
        from deploykit.foreign import export_foreign

        return export_foreign(path, Path(out), **given, **shared)
    if given:
        option = f"--{next(iter(given)).replace('_', '-')}"
        raise UsageError(
            f"{option}: expected a MODEL.onnx beside it, got {path}; drop it: a run has its own"
        )
    return export_run(path, Path(out), **shared)


def _dataset(data: Any, normalize: Mapping[str, Any] | None, seed: int) -> Dataset:
    from deploykit.data import Dataset, dataset_from_arrays

    if isinstance(data, Dataset):
        if normalize is not None:
            raise UsageError(
                "normalize: expected none beside a Dataset, which has its own; drop it"
            )
        return data
    if not isinstance(data, Mapping) or not {"train", "validation"} <= set(data) <= SPLITS:
        raise UsageError(
            'data: expected a Dataset or {"train": (x, y), "validation": (x, y), "test": (x, y)}, '
            f"got {sorted(data) if isinstance(data, Mapping) else type(data).__name__}"
        )
    for split, pair in data.items():
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise UsageError(
                f"data: {split}: expected (x, y), got {type(pair).__name__}; give two arrays"
            )
    return dataset_from_arrays(**data, seed=seed, **(normalize or {}))


def _recipe(
    dataset: Dataset, model: JsonDict, sections: Mapping[str, Any], **settings: Any
) -> Recipe:
    """Make the recipe that the arguments amount to, through the same checks as a file."""
    data: JsonDict = {"source": "python", "augment": settings.pop("augment")}
    if dataset.preprocess is not None:
        data["normalize"] = {key: list(dataset.preprocess[key]) for key in ("mean", "std")}
    content = {
        "schema": 1,
        **settings,
        "task": "classification" if dataset.preprocess is None else "image-classification",
        "data": data,
        "model": model,
        **{name: section for name, section in sections.items() if section is not None},
    }
    try:
        text = json.dumps(content)  # which is YAML too
    except TypeError as error:
        raise UsageError(f"compress: expected plain numbers, texts and lists: {error}") from error
    return with_absolute_paths(parse_recipe(text, (), "compress"), Path())
