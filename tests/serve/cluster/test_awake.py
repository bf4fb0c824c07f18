"""The clock of a loop that may be kept from running."""

import asyncio
import time

import pytest

from clipdit_serve.cluster.awake import BEAT_S, AwakeClock

pytestmark = pytest.mark.anyio


async def test_it_goes_on_while_the_loop_runs_and_stands_still_while_it_does_not():
    clock = AwakeClock()
    clock.start()
    began, awake_s = time.monotonic(), clock()
    await asyncio.sleep(4 * BEAT_S)
    assert 2 * BEAT_S < clock() - awake_s <= time.monotonic() - began  # a busy machine may keep this loop waiting, too
    awake_s = clock()
    time.sleep(4)  # that is what it is about
    assert clock() - awake_s <= 2 * BEAT_S
    await asyncio.sleep(BEAT_S)
    assert clock() - awake_s < 2
    clock.stop()
