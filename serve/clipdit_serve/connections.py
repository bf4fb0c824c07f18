"""HTTP connections as uvicorn has them, with bounds on the head of a request: 64 KiB and half a minute.

uvicorn's parser in C (httptools), which it would choose by itself where another package brought it, takes heads of any size; the
one in Python (h11) does not. Neither minds how long a head takes.
"""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_BYTES = 64 * 2**10
"""Of a head that is not at its end; more of it is answered with 400."""

HEAD_S = 30.0
"""In which a head must arrive; its connection is closed then, seconds. As long as a body may take."""


class Connection(H11Protocol):
    """For `uvicorn.Config(http=...)`."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  (asyncio's is wider)
        super().connection_made(transport)
        self._late = self.loop.call_later(HEAD_S, transport.close)

    def data_received(self, data: bytes) -> None:
        if self._late is None and self.conn.their_state is h11.IDLE:  # the next request of a connection that is kept
            self._late = self.loop.call_later(HEAD_S, self.transport.close)
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._in_time()

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        super().connection_lost(exc)

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
