"""FastAPI: a pydantic body, a plain function, uvicorn; as https://fastapi.tiangolo.com shows."""

import sys

import numpy as np
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from session import Model


class Image(BaseModel):
    """One image, rows of pixels of channels."""

    image: list[list[list[int]]]


class Prediction(BaseModel):
    """The logits of one image."""

    logits: list[float]


app = FastAPI()
model = Model()


@app.post("/predict")
def predict(image: Image) -> Prediction:
    """Answer one image."""
    pixels = np.array(image.image, np.uint8)
    return Prediction(logits=model(pixels[np.newaxis])[0].tolist())


@app.get("/health")
def health() -> str:
    """Say that it answers."""
    return "ok"


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=False, log_level="error")
