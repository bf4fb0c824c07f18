"""Whatever is uploaded, the service answers with the right code, quickly, and goes on."""

import resource
import time

import pytest
from bad_images import bad_images
from serving import PNG, Identity, numbered, png, served

from clipdit_serve.errors import ERRORS
from clipdit_serve.settings import ServeSettings

pytestmark = pytest.mark.anyio


async def test_every_bad_image_gets_its_code_within_seconds_and_the_service_goes_on(decoder):
    cases = bad_images()
    assert len(cases) >= 120
    wrong, slow = {}, {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with served(Identity(), ServeSettings(), decoder) as (client, _engine):
        for name, (data, wanted) in cases.items():
            began = time.perf_counter()
            answer = await client.post("/v1/translate", content=data, headers={"content-type": "image/png"})
            if (seconds := time.perf_counter() - began) > 5:
                slow[name] = seconds
            code = answer.json()["error"]["code"] if answer.status_code != 200 else None
            if (answer.status_code, code) != wanted:
                wrong[name] = (answer.status_code, answer.text[:200], wanted)
            assert code is None or ERRORS[code].status == answer.status_code
        assert (await client.post("/v1/translate", content=png(numbered(7)), headers=PNG)).status_code == 200
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"\n{len(cases)} uploads; this process grew by {grown_mib:.0f} MiB at its peak")
    assert wrong == {}
    assert slow == {}
    assert grown_mib < 300  # pixels of hostile uploads live in other processes
