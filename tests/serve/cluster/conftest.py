"""One service on Ray for all tests that can share one: it takes seconds to start."""

from collections.abc import Iterator

import pytest
from ray_service import RayService


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayService]:
    """Two models, one ingress, jobs."""
    running = RayService(tmp_path_factory.mktemp("orders"), "--replicas", "2", "--queue", "300", "--max-wait-ms", "5")
    yield running
    running.stop()
