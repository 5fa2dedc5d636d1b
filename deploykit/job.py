"""One run in its folder: checked before anything is written, alone while it works."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.artifacts import JsonDict
from deploykit.errors import BudgetError, RecipeError, UsageError
from deploykit.interrupt import stop_on_signals
from deploykit.progress import LoggedProgress, Progress, SilentProgress
from deploykit.publish import lock_folder, refuse_existing, told_as_usage
from deploykit.recipe.sections import Recipe
from deploykit.run_folder import RunFolder, check_same_recipe
from deploykit.targets import CPU, resolve_target, why_not_here

if TYPE_CHECKING:
    from torch import nn

    from deploykit.data import Dataset


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: its folder.
        report: the content of its ``report.json``.
    """

    path: Path
    report: JsonDict


def run_recipe(
    recipe: Recipe,
    out: Path,
    *,
    dataset: Dataset | None = None,
    module: nn.Module | None = None,
    force: bool = False,
    resume: bool = False,
    replay: Sequence[Mapping[str, JsonDict]] | None = None,
    progress: Progress | None = None,
    commands: Sequence[str] = (),
) -> Run:
    """Run ``recipe`` in the folder ``out``.

    Args:
        recipe: with absolute paths.
        out: the run's folder.
        dataset: the samples, where they were given as an object; else the recipe's are read.
        module: the float model, where it was given as an object; else the recipe's is built.
        force: replace a run that stands at ``out``.
        resume: continue an interrupted run; begins one where there is none.
        replay: measurements of an earlier run to decide by: for each trial, by stage.
        progress: who is told how far it is; default: nobody.
        commands: lines that reproduce the run, for the report.

    Raises:
        UsageError: ``out`` may not be written, or another process works in it.
        DeploykitError: see `deploykit.errors`.
    """
    run, resuming = RunFolder(out), resume and (out / "recipe.yaml").is_file()
    check_latencies(recipe, replay)
    if resuming:
        check_same_recipe(run, recipe)
    elif not (run.is_empty() and (resume or force)):
        refuse_existing(out, force, "run")
    with stop_on_signals():
        from deploykit.pipeline import run_stages
        from deploykit.start import initial_candidate

        dataset = dataset or read_data(recipe)
        start = initial_candidate(recipe, dataset, module)
        # Nothing is written, and nothing old removed, before the inputs are known to be good.
        with lock_folder(out), told_as_usage(out, "mend the place, then --resume"):
            if not resuming:
                _make_room(run, force)
                run.write_recipe(recipe)
            told = LoggedProgress(progress or SilentProgress(), run.log)
            for warning in dataset.warnings:
                told.message(f"warning: {warning}")
            report = run_stages(
                recipe, run, dataset, start=start, progress=told, replay=replay, commands=commands
            )
    return Run(out, json.loads(json.dumps(report.to_json())))  # as the file has it


def read_data(recipe: Recipe) -> Dataset:
    """Load the samples that a recipe with absolute paths names."""
    from deploykit.data import load_dataset

    if recipe.data.source == "python":
        raise RecipeError(
            [
                "data.source: expected a source that can be read again, got python: this run was "
                "given its data as objects; call deploykit.compress with them"
            ]
        )
    return load_dataset(recipe.data, task=recipe.task, seed=recipe.seed, base=Path())


def check_latencies(recipe: Recipe, replay: Sequence[Mapping[str, JsonDict]] | None) -> None:
    """Refuse a speed that nothing can judge before hours of work go into it.

    Args:
        recipe: its target, stages and budget count.
        replay: latencies from elsewhere.

    Raises:
        UsageError: there is no such target, or ``replay`` is of another recipe.
        BudgetError: the recipe demands a speed-up on a target that this machine is not.
    """
    _check_machine(recipe, replayed=replay is not None)
    _check_replay(recipe, replay)


def _check_machine(recipe: Recipe, *, replayed: bool) -> None:
    """Refuse a speed that only another machine could measure."""
    target, budget, prune = resolve_target(recipe.target), recipe.budget, recipe.prune
    why = why_not_here(target)
    if prune is not None and prune.how_much[0] in {"speedup", "latency_ms"}:
        key = prune.how_much[0]
        why = why or (None if target.providers == (CPU,) else "only CPUs can be profiled")
        if why is not None:
            raise BudgetError(
                f"prune.{key}: expected a machine that is {target.name}, got another: {why}; run "
                "compress there, or ask for prune.macs or prune.channel_ratio"
            )
    if replayed or budget is None or budget.min_speedup is None:
        return
    if why is not None:
        raise BudgetError(
            f"budget.min_speedup: expected a machine that is {target.name}, got another: {why}; "
            "run compress there, give its measurements.json with --latency-table, or "
            "--set budget.min_speedup=null"
        )


def _check_replay(recipe: Recipe, replay: Sequence[Mapping[str, JsonDict]] | None) -> None:
    """Refuse measurements that lack a stage, or were taken otherwise."""
    stages = ["train", *recipe.compressors]
    if recipe.precision_on(resolve_target(recipe.target)) not in {"int8", "fp32"}:
        stages.append("convert")
    first = {} if not replay else replay[0]
    missing = [name for name in stages if replay is not None and name not in first]
    if missing:
        raise UsageError(
            f"--latency-table: expected measurements of {', '.join(missing)}, got only "
            f"{', '.join(first) or 'none'}; take a measurements.json of the same stages"
        )
    target = resolve_target(recipe.target).name
    for measured in [one for trial in replay or () for one in trial.values()]:
        taken_for, threads = measured.get("target") or target, measured["latency"]["1"]["threads"]
        if (taken_for, threads) != (target, recipe.threads):
            raise UsageError(
                f"--latency-table: expected latencies on {target} with {recipe.threads} threads, "
                f"got some on {taken_for} with {threads}; measure with this recipe on {target}"
            )


def _make_room(run: RunFolder, force: bool) -> None:
    """Empty the folder; another process may have filled it since it was looked at."""
    if not force and not run.is_empty():
        raise UsageError(f"{run.path}: another process made it meanwhile; choose another place")
    run.clear()
