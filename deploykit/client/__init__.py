"""Ask a server of deploykit: predictions from images and arrays, outputs as arrays.

::

    with Client("http://127.0.0.1:3000") as client:
        client.predict("digit.png")[0].label
        client.infer(pixels, "digits")["logits"]
"""

from deploykit.client.calls import Prediction, Score, ServedModel
from deploykit.client.clients import AsyncClient, Client

__all__ = ["AsyncClient", "Client", "Prediction", "Score", "ServedModel"]
