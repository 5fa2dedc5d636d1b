"""BentoML: a service with a native method; as https://docs.bentoml.com shows."""

import bentoml
import numpy as np
from session import Model

QUIET = {"access": {"enabled": False}}


@bentoml.service(workers=1, logging=QUIET)
class One:
    """Answers an image a request."""

    def __init__(self) -> None:
        self.model = Model()

    @bentoml.api
    def predict(self, image: np.ndarray) -> np.ndarray:
        """Return the logits of pixels ``(H, W, C)``."""
        return self.model(image.astype(np.uint8)[np.newaxis])[0]


@bentoml.service(workers=1, logging=QUIET)
class Batched:
    """Answers the images of several requests together."""

    def __init__(self) -> None:
        self.model = Model()

    @bentoml.api(batchable=True, max_batch_size=32)
    def predict(self, image: np.ndarray) -> np.ndarray:
        """Return the logits of pixels ``(N, H, W, C)``."""
        return self.model(image.astype(np.uint8))
