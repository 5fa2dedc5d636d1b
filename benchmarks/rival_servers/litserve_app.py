"""LitServe: decode, predict, encode; as https://lightning.ai/docs/litserve shows."""

import sys

import litserve
import numpy as np
from session import Model


class Classifier(litserve.LitAPI):
    """Answers one image, or a batch that LitServe has gathered."""

    def setup(self, device: str) -> None:
        """Open the model."""
        self.model = Model()

    def decode_request(self, request: dict) -> np.ndarray:
        """Return the pixels."""
        return np.array(request["image"], np.uint8)

    def predict(self, pixels: np.ndarray) -> np.ndarray:
        """Return the logits of one image or of a batch."""
        one = pixels.ndim == 3
        logits = self.model(pixels[np.newaxis] if one else pixels)
        return logits[0] if one else logits

    def encode_response(self, output: np.ndarray) -> dict:
        """Return what is sent."""
        return {"logits": output.tolist()}


if __name__ == "__main__":
    port, batch = map(int, sys.argv[1:])
    timeout = {"batch_timeout": 0.001} if batch > 1 else {}
    api = Classifier(max_batch_size=batch, **timeout)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=port, log_level="error", generate_client_file=False)
