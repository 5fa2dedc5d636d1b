"""What a client can ask: python serving/demo.py URL FILE... (images, or .npy files for arrays).

Where the server demands a token, DEPLOYKIT_TOKEN has it.
"""

import asyncio
import os
import sys
import time

from deploykit.client import AsyncClient, Client
from deploykit.errors import DeploykitError

BURST = 100


def main(url: str, files: list[str]) -> None:
    """Ask for everything once, and for predictions many times at once."""
    token = os.environ.get("DEPLOYKIT_TOKEN") or None
    with Client(url, token) as client:
        print("ready:", client.ready())
        for model in client.models():
            about = client.metadata(model.name, model.version)
            tensors = [(one["name"], one["datatype"], one["shape"]) for one in about["inputs"]]
            print(f"{model.name} {model.version}: {model.state}, takes {tensors}")
        for file in files:
            best = client.predict(file, top=3)[0]
            ranked = ", ".join(f"{one.label} {one.probability:.4f}" for one in best.top)
            print(f"{file}: {best.label} ({ranked})")
    asyncio.run(burst(url, token, files[0]))


async def burst(url: str, token: str | None, file: str) -> None:
    """Ask many times at once; who is told 429 waits and asks again."""
    async with AsyncClient(url, token) as client:
        started = time.perf_counter()
        answers = await asyncio.gather(*(client.predict(file) for _ in range(BURST)))
        seconds = time.perf_counter() - started
    labels = {answer[0].label for answer in answers}
    print(f"{BURST} requests at once: {seconds:.2f} s, labels {sorted(labels)}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        main(sys.argv[1], sys.argv[2:])
    except DeploykitError as error:
        sys.exit(f"error: {error}")
