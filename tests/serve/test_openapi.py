"""The OpenAPI document, and what becomes of those who take it at its word."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import uvicorn
from serving import Identity

from clipdit_serve.app import create_app
from clipdit_serve.batching import InProcessEngine
from clipdit_serve.settings import ServeSettings
from clipdit_serve.variants import Variants


class Listening(uvicorn.Server):
    """A server in a thread of this process."""

    def run_in_thread(self) -> threading.Thread:
        thread = threading.Thread(target=lambda: asyncio.run(self.serve()), daemon=True)
        thread.start()
        while not self.started:
            time.sleep(0.01)
        return thread


@pytest.fixture(scope="module")
def url(decoder) -> Iterator[str]:
    given = ServeSettings()
    engines = Variants({name: InProcessEngine(Identity, given) for name in ("int8", "fp32")})
    server = Listening(uvicorn.Config(create_app(engines, decoder, given), port=0, log_config=None, lifespan="on"))
    thread = server.run_in_thread()
    while engines.health().state != "ready":
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


def document(url: str) -> dict:
    return httpx2.get(f"{url}/openapi.json").json()


def test_the_document_names_every_route_and_what_it_may_answer(url: str):
    paths = document(url)["paths"]
    assert set(paths) == {
        "/v1/translate",
        "/v1/images/edits",
        "/v1/jobs",
        "/v1/jobs/{id}",
        "/v1/jobs/{id}/result",
        "/v1/jobs/{id}/events",
        "/v1/models",
        "/v1/models/{model}",
        "/livez",
        "/readyz",
        "/health",
        "/healthz",
        "/metrics",
    }
    for path in ("/v1/translate", "/v1/images/edits", "/v1/jobs"):
        operation = paths[path]["post"]
        assert {"400", "401", "404", "406", "408", "413", "415", "422", "429", "500", "503", "504"} <= set(operation["responses"])
        fields = operation["requestBody"]["content"]["multipart/form-data"]["schema"]
        assert fields["additionalProperties"] is False and "image" in fields["required"]
    create = paths["/v1/jobs"]["post"]
    assert "Location" in create["responses"]["202"]["headers"] and "200" not in create["responses"]
    assert "Idempotency-Key" in [parameter["name"] for parameter in create["parameters"]]
    events = paths["/v1/jobs/{id}/events"]["get"]
    assert list(events["responses"]["200"]["content"]) == ["text/event-stream"] and "204" in events["responses"]
    assert "Last-Event-ID" in [parameter["name"] for parameter in events["parameters"]]
    assert {"404", "406", "409", "500", "503", "504"} <= set(paths["/v1/jobs/{id}/result"]["get"]["responses"])


@pytest.mark.parametrize("cases", [20, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_no_request_that_the_document_allows_or_forbids_meets_a_server_error(url: str, cases: int, tmp_path: Path):
    """Statuses, types and bodies of the answers are those that the document promises, in all of schemathesis' phases. What is a
    picture it cannot know, so what must be accepted is left to other tests."""
    checks = "not_a_server_error status_code_conformance content_type_conformance response_schema_conformance unsupported_method"
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{url}/openapi.json", "--checks", checks.replace(" ", ",")]
    options = ["--max-examples", str(cases), "--seed", "1", "--continue-on-failure", "--warnings", "off", "--no-color"]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True)
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
