"""The one training loop: plain steps, resumable at every one of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import KW_ONLY, asdict, dataclass, field
from itertools import islice
from pathlib import Path
from signal import Signals

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deploykit.artifacts import JsonDict
from deploykit.errors import Interrupted, ModelError, RecipeError
from deploykit.held_weights import Projection
from deploykit.interrupt import raise_if_stopped
from deploykit.models.weights import load_tensors
from deploykit.recipe.sections import TrainSection
from deploykit.seeds import stable_seed
from deploykit.train.batches import Batch, Batches
from deploykit.train.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from deploykit.train.determinism import deterministic, seed_device
from deploykit.train.evaluate import SetMode, device_of, evaluate
from deploykit.train.freeze import match_groups, set_mode
from deploykit.train.learner import Learner, fastest_layout, open_fabric
from deploykit.train.plan import (
    EpochRecord,
    FitResult,
    Training,
    identity,
    kept_epoch,
    trained_spans,
)
from deploykit.train.schedule import epochs_without_gain, plateau_reductions, rate_factor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
OnEpoch = Callable[[nn.Module, int, int], None]

# Enough batches to bring statistics with momentum 0.1 within 1% of the averaged weights'.
STATISTICS_BATCHES = 50


def fit(
    module: nn.Module,
    training: Training,
    *,
    stage: str,
    plan: TrainSection | None = None,
    set_mode: SetMode = set_mode,
    on_epoch: OnEpoch | None = None,
    loss: Loss | None = None,
    hold: Mapping[str, Projection] | None = None,
) -> FitResult:
    """Train a module in place and leave the chosen weights in it, in evaluation mode.

    All randomness derives from (seed, stage, epoch, step): on a CPU a training that was
    interrupted and resumed ends in the very bits of one that was not.

    Args:
        module: takes float32 batches and returns logits ``(N, classes)``; an ordinary module
            or an exported graph.
        training: data, seed, checkpoints, progress.
        stage: names the checkpoint, takes part in the seeds.
        plan: how to train; the training's own by default.
        set_mode: puts the module into training or evaluation; the third argument names the
            modules whose statistics stand still. Nothing else here touches modes.
        on_epoch: called with module, epoch and number of epochs after ``set_mode``, when
            an epoch begins and also when one is resumed in its middle.
        loss: of logits, targets ``(N, classes)`` and inputs; cross-entropy by default.
        hold: parameters that may move within a linear subspace only, with the projection onto
            it, see `deploykit.held_weights`.

    Returns:
        The course of the training; of a finished stage at once, from its checkpoint.

    Raises:
        ModelError: a pattern fits no module, the loss is not finite, the outputs have
            another shape than the labels ask for, or the checkpoint is damaged.
        UsageError: the checkpoint belongs to another training.
        Interrupted: a signal came (see `stop_on_signals`); the checkpoint is complete.

    Example:
        >>> result = fit(module, Training(dataset, plan, seed=0), stage="train")
        >>> result.torch_accuracy
        0.987
    """
    plan = plan or training.plan
    if training.augment and training.dataset.preprocess is None:
        raise RecipeError(["data.augment: expected images to augment, got arrays; remove it"])
    home = device_of(module)
    fabric = open_fabric(training.device, plan.precision)
    with deterministic(fabric.device):
        batches = Batches(training, stage, plan.batch_size, fabric.device)
        steps = math.ceil(batches.count / plan.accumulate)
        groups = match_groups(module, plan.groups)
        layout = fastest_layout(module.to(fabric.device), batches.example())
        learner = Learner(
            module,
            plan,
            groups,
            fabric=fabric,
            epoch_steps=steps,
            layout=layout,
            hold=hold or {},
        )
        run = _Fit(
            training,
            stage,
            plan,
            learner=learner,
            batches=batches,
            epoch_steps=steps,
            frozen=groups.frozen_modules,
            set_mode=set_mode,
            on_epoch=on_epoch or _nothing,
            loss=loss or _cross_entropy(plan.label_smoothing),
        )
        try:
            run.train()
        finally:
            learner.release(home)
            set_mode(module, False, frozenset())
    return FitResult(
        stage=stage,
        history=tuple(run.history),
        kept_epoch=kept_epoch(run.history, plan),
        trained=trained_spans(module, groups, len(run.history)),
        stopped_early=len(run.history) < plan.epochs,
    )


def _nothing(_module: nn.Module, _epoch: int, _epochs: int) -> None:
    pass


def _cross_entropy(smoothing: float) -> Loss:
    def loss(outputs: Tensor, targets: Tensor, _inputs: Tensor) -> Tensor:
        return cross_entropy(outputs, targets, label_smoothing=smoothing)

    return loss


@dataclass
class _Cursor:
    """Where the training stands, and the sums of the epoch until there."""

    epoch: int = 0
    batch: int = 0
    samples: int = 0
    loss_sum: float = 0.0
    correct: float = 0.0
    seconds: float = 0.0


@dataclass
class _Fit:
    """One training; all that moves but the weights is in ``cursor`` and ``history``."""

    training: Training
    stage: str
    plan: TrainSection
    _: KW_ONLY
    learner: Learner
    batches: Batches
    epoch_steps: int
    frozen: Callable[[int], frozenset[str]]
    set_mode: SetMode
    on_epoch: OnEpoch
    loss: Loss
    cursor: _Cursor = field(default_factory=_Cursor)
    history: list[EpochRecord] = field(default_factory=list)
    chosen: Mapping[str, Tensor] = field(default_factory=dict)
    finished: bool = False

    def train(self) -> None:
        """Go from the checkpoint, or the start, to the chosen weights."""
        self._resume()
        if self.finished:
            return
        progress = self.training.progress
        progress.stage_started(self.stage, self.plan.epochs, self.epoch_steps, self._step_number())
        try:
            while self.cursor.epoch < self.plan.epochs and not self._stalled():
                self._epoch()
                self._save()
        except Interrupted as stop:
            self._save()
            raise self._stopped(stop) from None
        finally:
            progress.stage_ended()
        if self.chosen:
            load_tensors(self.learner.module, self.chosen)
        self.finished = True
        self._save()

    def _stalled(self) -> bool:
        stopping = self.plan.early_stopping
        if stopping is None:
            return False
        return epochs_without_gain(self._accuracies(), stopping.min_delta) >= stopping.patience

    def _accuracies(self) -> list[float]:
        return [record.validation_accuracy for record in self.history]

    def _step_number(self) -> int:
        """Return the optimizer step of the stage; stops come between steps, never within."""
        return self.cursor.epoch * self.epoch_steps + self.cursor.batch // self.plan.accumulate

    def _rate(self, step: int) -> float:
        schedule, peak = self.plan.schedule, self.plan.optimizer.lr
        falls = plateau_reductions(self._accuracies(), schedule.patience)
        return peak * rate_factor(schedule, step, self.plan.epochs * self.epoch_steps, falls)

    def _seed(self, purpose: str, index: int) -> None:
        parts = (self.training.seed, self.stage, self.cursor.epoch, purpose, index)
        seed_device(self.batches.device, stable_seed(*parts))

    # An epoch

    def _epoch(self) -> None:
        cursor, module, started = self.cursor, self.learner.module, time.monotonic()
        self.learner.thaw(cursor.epoch)
        self.set_mode(module, True, self.frozen(cursor.epoch))
        self.on_epoch(module, cursor.epoch, self.plan.epochs)
        try:
            with closing(self.batches.epoch(cursor.epoch, cursor.batch)) as batches:
                while window := list(islice(batches, self.plan.accumulate)):
                    self._step(window)
                    raise_if_stopped(self.stage)
            accuracy, shown = self._validate()
        finally:
            cursor.seconds += time.monotonic() - started
        self._end_epoch(accuracy, shown)

    def _step(self, window: Sequence[Batch]) -> None:
        cursor, step = self.cursor, self._step_number()
        samples = sum(len(batch.targets) for batch in window)
        for batch in window:
            self._add_gradient(batch, len(batch.targets) / samples)
        self.learner.update(step, self._rate(step))
        loss, accuracy = cursor.loss_sum / cursor.samples, cursor.correct / cursor.samples
        self.training.progress.step_done(cursor.epoch, loss, accuracy)

    def _add_gradient(self, batch: Batch, share: float) -> None:
        """Add the gradient of a batch that makes up ``share`` of the step's samples."""
        cursor, targets = self.cursor, batch.targets
        self._seed("step", batch.index)
        try:
            outputs = self.learner.forward(batch.inputs)
        except (AssertionError, RuntimeError, ValueError):
            self._check_weights()  # what watches ranges fails in its own words
            raise
        self._check_outputs(outputs, targets)
        loss = self.loss(outputs, targets, batch.inputs)
        self.learner.backward(loss if share == 1 else loss * share)
        correct = (outputs.argmax(1) == targets.argmax(1)).sum()
        # One transfer: on a GPU each would wait for the step to end.
        value, hits = torch.stack((loss.detach().float(), correct.float())).tolist()
        if not math.isfinite(value):
            raise self._diverged(f"a loss of {value}")
        cursor.batch += 1
        cursor.samples += len(targets)
        cursor.loss_sum += value * len(targets)
        cursor.correct += hits

    def _end_epoch(self, accuracy: float, shown: Mapping[str, Tensor]) -> None:
        cursor = self.cursor
        record = EpochRecord(
            epoch=cursor.epoch,
            loss=cursor.loss_sum / cursor.samples,
            train_accuracy=cursor.correct / cursor.samples,
            validation_accuracy=accuracy,
            lr=self._rate((cursor.epoch + 1) * self.epoch_steps - 1),
            seconds=cursor.seconds,
        )
        self.history.append(record)
        if kept_epoch(self.history, self.plan) == cursor.epoch:
            self.chosen = shown
        self.cursor = _Cursor(epoch=cursor.epoch + 1)
        self.training.progress.epoch_done(
            record.epoch, loss=record.loss, accuracy=accuracy, lr=record.lr, seconds=record.seconds
        )

    # What an epoch has to show

    def _validate(self) -> tuple[float, Mapping[str, Tensor]]:
        """Return the validation accuracy, and the weights that reached it."""
        self._check_weights()
        module, dataset = self.learner.module, self.training.dataset
        with self._showing():
            shown = self.learner.snapshot()
            accuracy = evaluate(
                module, dataset.validation, dataset.preprocess, set_mode=self.set_mode
            )
        return accuracy, shown

    @contextmanager
    def _showing(self) -> Iterator[None]:
        """Put averaged weights in place; whatever happens, the trained ones come back."""
        trained, average = self.learner.snapshot(), self.learner.average
        try:
            if average is not None and average.active(self.cursor.epoch):
                average.copy_into_module()
                if average.needs_statistics:
                    self._estimate_statistics()
            yield
        finally:
            load_tensors(self.learner.module, trained)

    @torch.no_grad()
    def _estimate_statistics(self) -> None:
        """Let the running statistics follow the averaged weights."""
        with closing(self.batches.epoch(self.cursor.epoch)) as batches:
            for batch in islice(batches, STATISTICS_BATCHES):
                self._seed("statistics", batch.index)
                self.learner.forward(batch.inputs)
                raise_if_stopped(self.stage)

    # Faults

    @property
    def _where(self) -> str:
        return f"{self.stage}, epoch {self.cursor.epoch}, step {self.cursor.batch}"

    def _check_outputs(self, outputs: object, targets: Tensor) -> None:
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        if got != tuple(targets.shape):
            raise ModelError(
                f"{self._where}: expected the model to return logits {tuple(targets.shape)}, "
                f"one a class, got {got}; mend the model or the classes of the data"
            )

    def _check_weights(self) -> None:
        name = self.learner.first_not_finite()
        if name is not None:
            raise self._diverged(f"others in {name}")

    def _diverged(self, got: str) -> ModelError:
        lr = self.plan.optimizer.lr
        return ModelError(
            f"{self._where}: expected finite numbers, got {got}; "
            f"lower the learning rate ({lr:g}) or set train.gradient_clip"
        )

    def _stopped(self, stop: Interrupted) -> Interrupted:
        kept = "nothing is kept" if self._path is None else "--resume goes on from here"
        name = Signals(stop.signal).name
        return Interrupted(stop.signal, f"{self._where}: stopped by {name}; {kept}")

    # Checkpoints

    @property
    def _path(self) -> Path | None:
        folder = self.training.checkpoints
        return None if folder is None else folder / self.stage / "state.safetensors"

    def _identity(self) -> JsonDict:
        return identity(self.training, self.stage, self.plan, self.learner.module)

    def _save(self) -> None:
        if self._path is None:
            return
        self._check_weights()
        state = {
            "cursor": asdict(self.cursor),
            "history": [asdict(record) for record in self.history],
            "scaler": self.learner.scaler(),
            "finished": self.finished,
        }
        kinds = {**self.learner.tensors(), "chosen": self.chosen}
        if self.finished:
            kinds = {"weights": kinds["weights"]}
        write_checkpoint(self._path, Checkpoint(kinds, state), self._identity())

    def _resume(self) -> None:
        found = None if self._path is None else read_checkpoint(self._path, self._identity())
        if found is None:
            return
        self.history = [EpochRecord(**record) for record in found.state["history"]]
        self.finished = found.state["finished"]
        if self.finished:
            load_tensors(self.learner.module, found.kinds["weights"])
            return
        self.learner.load(found.kinds)
        self.learner.load_scaler(found.state["scaler"])
        self.cursor, self.chosen = _Cursor(**found.state["cursor"]), found.kinds["chosen"]
