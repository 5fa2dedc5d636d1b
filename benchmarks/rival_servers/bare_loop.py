"""Nothing but `session.run` of one sample, over and over: what a server can be held against."""

import json
import sys
import time

import numpy as np
from session import Model


def main() -> None:
    """Print calls a second and the median milliseconds of a call."""
    model, seconds = Model(), float(sys.argv[1])
    shape = (1, *model.source.shape[1:])
    sample = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for _ in range(100):
        model(sample)
    taken: list[float] = []
    begun = time.perf_counter()
    while (now := time.perf_counter()) < begun + seconds:
        model(sample)
        taken.append(time.perf_counter() - now)
    rate = len(taken) / (time.perf_counter() - begun)
    print(json.dumps({"rate": rate, "p50_ms": float(np.median(taken)) * 1e3}))


if __name__ == "__main__":
    main()
