"""An image is the same alone and at every place of every batch, with the built-in model, through the service's own engine."""

import asyncio
from pathlib import Path

import pytest
import torch
from serving import until

import clipdit
from clipdit.images import fit, read_image
from clipdit.translator import Translator
from clipdit_serve.batching import InProcessEngine
from clipdit_serve.engine import Task
from clipdit_serve.settings import ServeSettings

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

MOST = 4
"""Images in a batch; three are padded to four."""
STEPS = 2
LEVELS = 1
"""Of 255: sums of fp32 may be taken in another order in another batch, and a pixel then be rounded the other way."""


@pytest.mark.parametrize("pad", [True, False], ids=["padded", "not padded"])
async def test_an_image_is_the_same_at_every_place_of_every_batch(pad: bool):
    settings = ServeSettings(max_batch=MOST, max_wait_ms=300, pad_batches=pad, hang_s=120)
    engine = InProcessEngine(lambda: Translator.open(None, backend="eager", device="cpu"), settings)
    engine.start(lambda report: None)
    try:
        await until(lambda: engine.health().state in ("ready", "dead"), within_s=240)
        assert engine.model is not None, engine.failure
        size = engine.model.limits.native_size
        samples = sorted((Path(clipdit.__file__).parent / "assets" / "samples" / "source").iterdir())[:MOST]
        images = [fit(read_image(path), size)[0] for path in samples]
        images += [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for _ in range(MOST - len(images))]
        tasks = [Task(image=image, seed=seed, steps=STEPS) for seed, image in enumerate(images)]
        alone = [(await engine.translate(task)).image for task in tasks]
        worst, compared = 0, 0
        for number in range(2, MOST + 1):
            for first in range(MOST):
                chosen = [(first + place) % MOST for place in range(number)]
                answers = await asyncio.gather(*(engine.translate(tasks[which]) for which in chosen))
                assert {answer.batch for answer in answers} == {number}
                for which, answer in zip(chosen, answers, strict=True):
                    worst = max(worst, int((answer.image.int() - alone[which].int()).abs().max()))
                    compared += 1
        print(f"\n{compared} places: largest difference {worst} of 255")
        assert compared == sum(range(2, MOST + 1)) * MOST
        assert worst <= LEVELS
        assert int((alone[0].int() - alone[1].int()).abs().max()) > 50  # so that a mix-up would be seen
    finally:
        engine.close()
