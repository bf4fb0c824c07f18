"""A clock that stands still while its event loop is kept from running: what was not seen then is nobody's silence but our own."""

import asyncio
import time

BEAT_S = 0.25


class AwakeClock:
    """Seconds for which the loop ran on time. With thousands of callers at once a loop stands still for many seconds, and all
    that it waits for seems to be late.

    `start` it within the loop; `stop` ends it."""

    def __init__(self) -> None:
        self._awake_s, self._beat_at_s = 0.0, time.monotonic()
        self._beating: asyncio.Task | None = None

    def start(self) -> None:
        self._beating = asyncio.create_task(self._beat())

    def stop(self) -> None:
        if self._beating is not None:
            self._beating.cancel()

    def __call__(self) -> float:
        # when the loop is late, no more than two beats count: the rest it did not see
        return self._awake_s + min(time.monotonic() - self._beat_at_s, 2 * BEAT_S)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            self._awake_s, self._beat_at_s = self(), time.monotonic()
