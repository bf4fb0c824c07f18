"""How long `clipdit serve` takes around a model: one caller, a PNG of 256 x 256 px, HTTP over the loopback.

A script, because in a test's own process every call has its types checked, which costs time, too. Prints JSON: milliseconds from
the first byte of the request to the last of the answer, less what the answer says the model took; and the PNG's alone, read and
written in this process in turns, which says how fast the machine is just now.
"""

import http.client
import io
import json
import re
import statistics
import time

import torch
from PIL import Image
from serving import Running

from clipdit.fake_backend import FakeBackend
from clipdit.images import encode_image, read_image
from clipdit.translator import Translator

REQUESTS = 200
WARM_UP = 20
SIDE = 256
MODEL_MS = re.compile(r"model;dur=([\d.]+)")
"""In the header Server-Timing."""


def measure() -> dict[str, object]:
    """Requests, and the PNG alone, in turns."""
    buffer = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(buffer, "PNG")  # 256 x 256
    picture = buffer.getvalue()
    wanted = Translator(FakeBackend())(read_image(picture)[None], seeds=[1], steps=1)[0]
    words = ["--size", f"{SIDE}x{SIDE}", "--max-wait-ms", "0"]
    running = Running(*words)
    around_ms, model_ms, png_ms, right, timing = [], [], [], 0, ""
    try:
        connection = http.client.HTTPConnection(*running.address)
        for number in range(WARM_UP + REQUESTS):
            began = time.perf_counter()
            connection.request("POST", "/v1/translate?seed=1&steps=1", picture, {"content-type": "image/png"})
            answer = connection.getresponse()
            body = answer.read()
            request_s = time.perf_counter() - began
            assert answer.status == 200, body
            timing = answer.headers["server-timing"]
            began = time.perf_counter()
            encode_image(read_image(picture))
            png_s = time.perf_counter() - began
            if number >= WARM_UP:
                model_ms.append(float(MODEL_MS.findall(timing)[0]))
                around_ms.append(1000 * request_s - model_ms[-1])
                png_ms.append(1000 * png_s)
                right += torch.equal(read_image(body), wanted)
    finally:
        running.stop()
    return {
        "p50_ms": statistics.median(around_ms),
        "p99_ms": statistics.quantiles(around_ms, n=100)[-1],
        "model_ms": statistics.median(model_ms),
        "png_ms": statistics.median(png_ms),
        "right": right,
        "timing": timing,
    }


if __name__ == "__main__":
    print(json.dumps(measure()))
