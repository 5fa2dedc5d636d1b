"""The session that every server opens: same file, same options, from the environment."""

import os

import numpy as np
import onnxruntime

THREADS = int(os.environ.get("THREADS", "1"))


class Model:
    """A model of one input and one output."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = THREADS, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            os.environ["MODEL"], options, providers=["CPUExecutionProvider"]
        )
        self.source = self.session.get_inputs()[0]

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Return the logits of uint8 pixels ``(N, H, W, C)``."""
        return self.session.run(None, {self.source.name: batch})[0]
