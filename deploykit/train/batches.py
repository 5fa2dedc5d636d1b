"""The training split as a stream of batches that depends on (seed, stage, epoch) alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deploykit.data.augment import augment
from deploykit.data.pixels import normalize
from deploykit.errors import DataError
from deploykit.seeds import stable_seed
from deploykit.train.plan import Training

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One batch on its device.

    Attributes:
        index: its place in the epoch.
        inputs: float32 ``(N, C, H, W)``, normalized; for arrays as they are.
        targets: float32 ``(N, classes)``, rows that sum to 1.
    """

    index: int
    inputs: Tensor
    targets: Tensor


class Batches:
    """Shuffled, augmented, normalized batches of the training split.

    Args:
        training: data, augmentation and seed.
        stage: part of the seed.
        batch_size: samples a batch; a rest is a smaller batch, a rest of one is left out,
            since BatchNorm has no variance of a single sample.
        device: where the batches go.
    """

    def __init__(
        self, training: Training, stage: str, batch_size: int, device: torch.device
    ) -> None:
        self._training, self._stage, self.device = training, stage, device
        self._split = training.dataset.train
        self._size = batch_size
        self._one_hot = torch.eye(len(training.dataset.classes), device=device)
        samples, rest = len(self._split), len(self._split) % batch_size
        if samples < min(2, batch_size):
            raise DataError(f"data.train: expected at least 2 samples to train on, got {samples}")
        self.samples = samples - 1 if rest == 1 and samples > 1 else samples
        self.count = -(-self.samples // batch_size)

    def example(self) -> Tensor:
        """Return a random batch of two as the module takes them."""
        shape = self._split.load(np.arange(1)).shape[1:]
        if self._training.dataset.preprocess is not None:
            shape = (shape[2], *shape[:2])
        generator = torch.Generator().manual_seed(0)
        return torch.randn(2, *shape, generator=generator).to(self.device)

    def epoch(self, epoch: int, first: int = 0) -> Generator[Batch]:
        """Yield the batches of an epoch from number ``first`` on.

        While one is worked on, a thread reads the next; nothing random happens there.
        """
        order = self._order(epoch)
        parts = [order[i * self._size : (i + 1) * self._size] for i in range(first, self.count)]
        for number, samples in enumerate(self._read_ahead(parts)):
            yield self._prepare(samples, parts[number], epoch, first + number)

    def _read_ahead(self, parts: Sequence[Indices]) -> Iterator[NDArray[np.generic]]:
        reading: deque[Future[NDArray[np.generic]]] = deque()
        with ThreadPoolExecutor(max_workers=1) as reader:
            for part in parts:
                reading.append(reader.submit(self._split.load, part))
                if len(reading) > 1:
                    yield reading.popleft().result()
            while reading:
                yield reading.popleft().result()

    def _order(self, epoch: int) -> Indices:
        seed = stable_seed(self._training.seed, self._stage, epoch, "order")
        order: Indices = np.random.default_rng(seed).permutation(len(self._split))
        return order[: self.samples]

    def _prepare(
        self, samples: NDArray[np.generic], indices: Indices, epoch: int, index: int
    ) -> Batch:
        dataset, seed = self._training.dataset, self._training.seed
        inputs = torch.from_numpy(samples).to(self.device)
        targets = self._one_hot[torch.from_numpy(self._split.labels[indices]).to(self.device)]
        if self._training.augment:
            inputs, targets = augment(
                inputs.permute(0, 3, 1, 2).to(torch.float32) / 255,
                targets,
                self._training.augment,
                seed_parts=(seed, self._stage, epoch, index),
            )
            # The deployed model sees whole pixel values, so training does too.
            inputs = (inputs * 255).round().clamp(0, 255)
        return Batch(index, normalize(inputs, dataset.preprocess), targets)
