"""How long the service takes around a model that takes no time: one caller, a PNG of 256 x 256 px, one process.

A script, run as users run the service: in a test's own process every call has its types checked, which costs time, too. Prints
JSON: milliseconds, the PNG's alone beside them, which say how fast the machine is just now.
"""

import asyncio
import io
import json
import statistics
import time

import torch
from PIL import Image
from serving import PNG, Identity, served

from clipdit.images import encode_image, read_image
from clipdit_serve.decoding import DecodePool
from clipdit_serve.settings import ServeSettings

REQUESTS = 200


async def measure() -> dict[str, object]:
    """Requests and the PNG alone, read and written in this process, in turns."""
    buffer = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(buffer, "PNG")  # 256 x 256
    picture = buffer.getvalue()
    settings = ServeSettings(max_wait_ms=0, size=(256, 256))
    request_s, png_s, answers = [], [], []
    async with served(Identity(), settings, DecodePool(settings)) as (client, _engine):
        for _ in range(REQUESTS):
            began = time.perf_counter()
            answer = await client.post("/v1/translate", content=picture, headers=PNG)
            request_s.append(time.perf_counter() - began)
            answers.append(answer)
            began = time.perf_counter()
            encode_image(read_image(picture))
            png_s.append(time.perf_counter() - began)
    image = read_image(picture)
    return {
        "p50_ms": 1000 * statistics.median(request_s),
        "p99_ms": 1000 * statistics.quantiles(request_s, n=100)[-1],
        "png_ms": 1000 * statistics.median(png_s),
        "right": sum(answer.status_code == 200 and torch.equal(read_image(answer.content), image) for answer in answers),
        "timing": answers[-1].headers["server-timing"],
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure())))
