"""Shared by the tests of the service: decoding processes, which take seconds to start."""

import asyncio
from collections.abc import Iterator

import pytest
from serving import Shared

from clipdit_serve.decoding import DecodePool
from clipdit_serve.settings import ServeSettings


@pytest.fixture(scope="session")
def decoder() -> Iterator[Shared]:
    """Decoding processes with the default settings, for all tests."""
    pool = DecodePool(ServeSettings())
    asyncio.run(pool.start())
    yield Shared(pool)
    pool.close()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
