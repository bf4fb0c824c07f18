"""Traces: what is told of a request, what never is, and that a real collector gets it."""

import gzip
import json
import logging
import re
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import pytest
import torch
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from serving import PNG, Gate, Identity, Running, numbered, png, served, until

from clipdit import cli
from clipdit_serve import tracing
from clipdit_serve.logs import TraceIds
from clipdit_serve.settings import ServeSettings

KEY = "a-key-of-a-test"
IMAGE = png(numbered(7))
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CONTINUED = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


class Told:
    """Spans that an application told of; `app` is its tracer provider."""

    def __init__(self):
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    def __call__(self) -> dict[str, ReadableSpan]:
        """By name, and none of them twice."""
        spans = self._exporter.get_finished_spans()
        named = {span.name: span for span in spans}
        assert len(named) == len(spans)
        self._exporter.clear()
        return named


def about(span: ReadableSpan) -> dict:
    """Its own attributes of ours, without their prefix."""
    return {
        name.removeprefix("clipdit."): value for name, value in (span.attributes or {}).items() if name.startswith("clipdit.")
    }


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None and span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.mark.anyio
async def test_a_trace_says_where_the_time_went_and_continues_the_callers(decoder, told: Told):
    model = Identity(before=lambda images: time.sleep(0.2))
    async with served(model, ServeSettings(), decoder, tracer_provider=told.provider) as (client, _):
        answer = await client.post(
            "/v1/translate?seed=5&steps=3", content=IMAGE, headers=PNG | CONTINUED | {"x-request-id": "mine"}
        )
        assert answer.status_code == 200
    spans = told()
    assert set(spans) == {"POST /v1/translate", "decode", "queue", "model", "encode"}
    root = spans["POST /v1/translate"]
    assert root.parent is not None and f"{root.parent.span_id:016x}" == PARENT
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {TRACE}  # type: ignore[union-attr]  (tests fail where it is None)
    children = [spans[name] for name in ("decode", "queue", "model", "encode")]
    assert {child.parent.span_id for child in children} == {root.context.span_id}  # type: ignore[union-attr]  (tests fail where it is None)
    times = [time for child in children for time in (child.start_time, child.end_time)]
    assert times == sorted(times)  # type: ignore[type-var]  (tests fail where it is None)
    assert 0.2 <= seconds(spans["model"]) < 1 and sum(map(seconds, children)) <= seconds(root)
    assert root.attributes is not None
    assert root.attributes["http.route"] == "/v1/translate" and root.attributes["http.response.status_code"] == 200
    assert about(root) == {"request_id": "mine"}
    assert about(spans["decode"]) == {"upload_bytes": len(IMAGE), "notes": 0}
    assert about(spans["encode"]) == {"format": "png", "width": 64, "height": 64, "answer_bytes": len(answer.content)}
    revision = answer.headers["x-clipdit-model"].partition("@")[2]
    assert about(spans["model"]) == {
        "batch_size": 1, "steps": 3, "guidance": 1.0, "backend": "fake", "precision": "float32", "revision": revision
    }  # fmt: skip


@pytest.mark.anyio
async def test_the_steps_of_a_job_belong_to_the_request_that_asked_for_it(decoder, told: Told):
    async with served(Identity(), ServeSettings(), decoder, tracer_provider=told.provider) as (client, _):
        path = (await client.post("/v1/jobs", content=IMAGE, headers=PNG)).headers["location"]
        await client.get(f"{path}/events")
        spans = told()
        root = spans["POST /v1/jobs"].context
        assert root is not None
        for name in ("decode", "queue", "model"):
            assert spans[name].parent.span_id == root.span_id  # type: ignore[union-attr]  (tests fail where it is None)
        await client.get(f"{path}/result")
    fetched = told()
    assert set(fetched) == {"GET /v1/jobs/{id}/result", "encode"}
    assert path.rpartition("/")[2] not in str([span.to_json() for span in fetched.values()])


@pytest.mark.anyio
async def test_what_went_wrong_is_told_by_its_code_where_it_happened(decoder, told: Told):
    def fail(images: torch.Tensor) -> None:
        raise RuntimeError("never")

    async with served(Identity(before=fail), ServeSettings(), decoder, tracer_provider=told.provider) as (client, _):
        await client.post("/v1/translate", content=IMAGE[:100], headers=PNG)
        spans = told()
        assert set(spans) == {"POST /v1/translate", "decode"}
        assert about(spans["decode"])["error"] == about(spans["POST /v1/translate"])["error"] == "image_damaged"
        assert spans["decode"].status.status_code.name == "ERROR"
        assert spans["POST /v1/translate"].status.status_code.name == "UNSET"  # not the server's fault
        await client.post("/v1/translate", content=IMAGE, headers=PNG)
        spans = told()
        assert about(spans["model"]) == {"error": "model_error"} and "encode" not in spans
        assert about(spans["queue"]) == {} and spans["POST /v1/translate"].status.status_code.name == "ERROR"


@pytest.mark.anyio
async def test_who_gave_up_in_the_queue_was_never_in_the_model(decoder, told: Told):
    gate = Gate()
    settings = ServeSettings(timeout_s=0.5, max_batch=1)
    async with served(Identity(before=gate), settings, decoder, tracer_provider=told.provider) as (client, engine):
        first = engine.submit(_task(), gate.reached.set)
        await until(gate.reached.is_set)
        answer = await client.post("/v1/translate", content=IMAGE, headers=PNG)
        assert answer.status_code == 504
        gate.opened.set()
        await first.answer()
    spans = told()
    assert set(spans) == {"POST /v1/translate", "decode", "queue"}
    assert about(spans["queue"]) == {"error": "cancelled"} and about(spans["POST /v1/translate"])["error"] == "deadline_exceeded"


def _task():
    from clipdit_serve.engine import Task

    return Task(image=numbered(1), seed=0)


@pytest.mark.anyio
async def test_neither_keys_nor_images_nor_what_callers_invent_is_told(decoder, told: Told):
    settings = ServeSettings(api_key=KEY)
    async with served(Identity(), settings, decoder, tracer_provider=told.provider) as (client, _):
        mine = {"authorization": f"Bearer {KEY}"}
        await client.post("/v1/translate?seed=8", content=IMAGE, headers=PNG | mine)
        everything = told()
        assert everything["POST /v1/translate"].attributes["url.query"] == "seed=8"  # type: ignore[index]  (tests fail where it is None)
        for address in (f"/v1/translate?key={KEY}", f"/v1/translate?{KEY}=1", f"/{KEY}"):
            for headers in (mine, {}, {"authorization": f"Basic {KEY}"}):
                await client.post(address, content=IMAGE, headers=PNG | headers)
                everything |= {f"{address} {headers}": span for span in told().values()}
    text = "\n".join(span.to_json() for span in everything.values())
    assert len(everything) == 5 + 9
    assert KEY not in text and "iVBOR" not in text and "PNG" not in text


@pytest.mark.anyio
async def test_probes_and_scrapes_are_not_told(decoder, told: Told):
    async with served(Identity(), ServeSettings(), decoder, tracer_provider=told.provider) as (client, _):
        for path in ("/livez", "/readyz", "/health", "/healthz", "/metrics"):
            assert (await client.get(path)).status_code == 200
    assert told() == {}


@pytest.mark.anyio
async def test_log_lines_of_a_request_say_its_trace(decoder, told: Told, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "clipdit_serve")
    caplog.handler.addFilter(TraceIds())
    async with served(Identity(), ServeSettings(), decoder, tracer_provider=told.provider) as (client, _):
        await client.post("/v1/translate", content=IMAGE, headers=PNG | CONTINUED)
    (line,) = [record for record in caplog.records if record.name == "clipdit_serve.guards"]
    root = told()["POST /v1/translate"].context
    assert root is not None
    assert (line.trace_id, line.span_id) == (TRACE, f"{root.span_id:016x}")  # type: ignore[attr-defined]  (tests fail where it is None)


ASKED = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_SERVICE_NAME": "x"},
        {"OTEL_TRACES_EXPORTER": "none"},
        ASKED | {"OTEL_TRACES_EXPORTER": "none"},
        ASKED | {"OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
    ],
)
def test_nothing_is_traced_unless_it_is_asked_for(environment: dict[str, str]):
    assert tracing.open_provider(environment) is None


@pytest.mark.parametrize(
    ("environment", "name"), [(ASKED, "clipdit"), ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SERVICE_NAME": "x"}, "x")]
)
def test_opentelemetrys_own_variables_ask_for_it(environment: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch):
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    provider = tracing.open_provider(environment)
    assert provider is not None
    assert provider.resource.attributes["service.name"] == name
    provider.shutdown()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"OTEL_TRACES_EXPORTER": "console"}, "OTEL_TRACES_EXPORTER is console; wanted otlp or none"),
        (ASKED | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL is grpc; wanted http/protobuf"),
    ],
)
def test_what_cannot_be_had_is_one_line(
    environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert cli.main(["serve", "--backend", "fake", "--port", "0"]) == cli.WRONG_INPUT
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"clipdit: {said}")


def test_without_the_extra_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(
        ValueError, match=r"^OTEL_EXPORTER_OTLP_ENDPOINT asks for traces, which need `pip install clipdit\[otel\]`"
    ):
        tracing.open_provider(ASKED)


class Collector:
    """A receiver of OTLP over HTTP: what is POSTed to /v1/traces, decoded from protobuf."""

    def __init__(self, url: str):
        self.url = url
        self.received: list[ExportTraceServiceRequest] = []

    def spans(self) -> list:
        return [
            span for request in self.received for of in request.resource_spans for in_ in of.scope_spans for span in in_.spans
        ]


@contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert (self.path, self.headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            collector.received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *words: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield collector
        server.shutdown()


def test_a_collector_gets_the_spans_of_the_real_process_and_its_log_says_the_same_trace():
    with collecting() as collector:
        settings = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
            "CLIPDIT_API_KEY": KEY,
        }
        service = Running("--linger-s", "0", environment=settings)
        headers = PNG | CONTINUED | {"authorization": f"Bearer {KEY}"}
        answer = httpx2.post(f"{service.url}/v1/translate?seed=1", content=IMAGE, headers=headers)
        assert answer.status_code == 200
        with socket.create_connection(service.address, timeout=20) as connection:  # two at once: neither is a part of the other
            connection.sendall(f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode() * 2)
            models = b""
            while models.count(b'"owned_by"') < 2:
                models += connection.recv(65536)
        service.process.terminate()  # what is not sent yet is sent now
        assert service.process.wait(20) == 0
        (line,) = [line for line in service.stop() if line.get("route") == "/v1/translate"]
        spans = {span.name: span for span in collector.spans() if span.name != "GET /v1/models"}
        others = [span for span in collector.spans() if span.name == "GET /v1/models"]
    assert [span.parent_span_id for span in others] == [b"", b""] and others[0].trace_id != others[1].trace_id
    assert set(spans) == {"POST /v1/translate", "decode", "queue", "model", "encode"}
    root = spans["POST /v1/translate"]
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, PARENT)
    assert (line["trace_id"], line["span_id"], line["request_id"]) == (TRACE, root.span_id.hex(), answer.headers["x-request-id"])
    assert all(spans[name].parent_span_id == root.span_id for name in ("decode", "queue", "model", "encode"))
    resource = {pair.key: pair.value.string_value for pair in collector.received[0].resource_spans[0].resource.attributes}
    assert resource["service.name"] == "clipdit" and re.fullmatch(r"\d+\.\d+\.\d+", resource["service.version"])
    assert KEY.encode() not in b"".join(request.SerializeToString() for request in collector.received)


@pytest.mark.slow
def test_a_collector_that_is_not_there_costs_lines_in_the_log_and_no_answer():
    service = Running("--linger-s", "0", environment=ASKED | {"OTEL_BSP_SCHEDULE_DELAY": "100"})
    for _ in range(20):
        assert httpx2.post(f"{service.url}/v1/translate", content=IMAGE, headers=PNG).status_code == 200
        time.sleep(0.05)
    service.process.terminate()
    began = time.monotonic()
    assert service.process.wait(60) == 0
    ended_s = time.monotonic() - began
    lines = [line for line in service.stop() if line["level"] != "INFO"]
    print(f"\nended after {ended_s:.1f} s; {len(lines)} lines: {json.dumps(lines[-1])[:300]}")
    assert ended_s < tracing.FLUSH_S + 5
    assert "did not take the last traces within 3 s" in [line["message"] for line in lines][-1]


@pytest.mark.slow
def test_what_traces_cost_a_request():
    """One service with a collector and one without, asked in turn; medians."""
    with collecting() as collector:
        services = [Running(environment=given) for given in ({}, {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url})]
        times_ms: list[list[float]] = [[], []]
        clients = [httpx2.Client(base_url=service.url, timeout=20) for service in services]
        for i in range(600):
            for which in (0, 1) if i % 2 else (1, 0):
                began = time.perf_counter()
                assert clients[which].post("/v1/translate?seed=1", content=IMAGE, headers=PNG).status_code == 200
                times_ms[which].append(1000 * (time.perf_counter() - began))
        for service in services:
            service.stop()
    without, with_traces = (statistics.median(times[100:]) for times in times_ms)
    print(
        f"\nmedian of a request: {without:.2f} ms without traces, {with_traces:.2f} ms with; {len(collector.spans())} spans sent"
    )
    assert len(collector.spans()) > 0
    assert with_traces < 1.5 * without + 1
