"""Training, fine-tuning and recovery: one loop for all stages."""

from deploykit.interrupt import stop_on_signals
from deploykit.train.distill import distillation
from deploykit.train.evaluate import SetMode, evaluate
from deploykit.train.freeze import set_mode
from deploykit.train.loop import Loss, OnEpoch, fit
from deploykit.train.plan import EpochRecord, FitResult, TrainedSpan, Training, recovery_plan
from deploykit.train.recover import recover

__all__ = [
    "EpochRecord",
    "FitResult",
    "Loss",
    "OnEpoch",
    "SetMode",
    "TrainedSpan",
    "Training",
    "distillation",
    "evaluate",
    "fit",
    "recover",
    "recovery_plan",
    "set_mode",
    "stop_on_signals",
]
