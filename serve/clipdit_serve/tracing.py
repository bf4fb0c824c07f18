"""Traces by OpenTelemetry: where the time of each request went.

    POST /v1/translate       FastAPI's own span: route, status, the caller's traceparent; with the request id and the error's code
        decode               the upload, in a process of its own
        queue                until its batch begins
        model                its batch: images in it, steps, guidance, backend
        encode               the answer

A job's `queue` and `model` belong to the request that asked for it, and go on after that was answered.

What callers sent is in no attribute: neither images nor keys, and of their addresses only what the service knows.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode

from starlette.types import Scope

from clipdit_serve.engine import Answer, ModelInfo
from clipdit_serve.errors import ApiError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

logger = logging.getLogger(__name__)

TRACES_EXPORTER = "OTEL_TRACES_EXPORTER"
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"

KNOWN_PARAMETERS = frozenset(("model", "variant", "seed", "steps", "guidance", "quality", "verbose"))
"""Of queries; the values of others are not told."""

FLUSH_S = 3.0
"""At the end the last spans may take so long to send, seconds."""


def open_provider(environment: Mapping[str, str]) -> "TracerProvider | None":
    """What sends spans to the collector that OpenTelemetry's variables name; None where they name none. Its owner calls
    `close_provider`.

    Only whether, and how, is decided here: the other variables (endpoint, headers, sampler, resource ...) are read by
    OpenTelemetry's SDK itself. ValueError for what cannot be had."""
    exporter = environment.get(TRACES_EXPORTER, "").strip().lower()
    endpoint = next((name for name in ENDPOINTS if environment.get(name)), None)
    disabled = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if disabled or exporter == "none" or (not exporter and endpoint is None):
        return None
    if exporter not in ("", "otlp"):
        raise ValueError(f"{TRACES_EXPORTER} is {exporter}; wanted otlp or none")
    for name in PROTOCOLS:
        if protocol := environment.get(name):
            if protocol != PROTOCOL:
                raise ValueError(f"{name} is {protocol}; wanted {PROTOCOL}, which collectors take at port 4318")
            break
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        asked = TRACES_EXPORTER if exporter else endpoint
        raise ValueError(
            f"{asked} asks for traces, which need `pip install clipdit[otel]`; {TRACES_EXPORTER}=none goes without ({error})"
        ) from error
    named = "OTEL_SERVICE_NAME" in environment or "service.name=" in environment.get("OTEL_RESOURCE_ATTRIBUTES", "")
    own = {} if named else {"service.name": "clipdit"}
    provider = TracerProvider(resource=Resource.create({"service.version": version("clipdit"), **own}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def close_provider(provider: "TracerProvider", *, within_s: float = FLUSH_S) -> None:
    """Send what is left; for so long at most. OpenTelemetry by itself tries for a minute, longer than a service has to end."""
    closing = threading.Thread(target=provider.shutdown, daemon=True)
    closing.start()
    closing.join(within_s)
    if closing.is_alive():
        logger.warning("the collector did not take the last traces within %g s", within_s)


class Traces:
    """Records spans.

    Args:
        provider: where they go; None records nothing, at next to no cost.
    """

    def __init__(self, provider: "TracerProvider | None" = None):
        self.provider = provider
        self._tracer: Any = None
        if provider is not None:
            from opentelemetry import trace

            self._tracer = provider.get_tracer("clipdit_serve", version("clipdit"))
            self._current_span = trace.get_current_span
            self._failed = trace.Status(trace.StatusCode.ERROR)

    def request(self, scope: Scope, *, id: str, route: str, code: str | None) -> None:
        """Before the answer of a request begins, since its span ends with the answer: what FastAPI does not know, and what it
        would tell of the caller's words.

        Args:
            route: its template, "other" where there is none. code: of the error, if it is one.
        """
        if self._tracer is None:
            return
        span = self._current_span()
        if not span.is_recording():
            return
        attributes = {"clipdit.request_id": id, "url.path": route}
        if code is not None:
            attributes["clipdit.error"] = code
        if query := scope.get("query_string", b"").decode("latin-1"):
            given = parse_qsl(query, keep_blank_values=True)
            told = [(name, value) if name in KNOWN_PARAMETERS else ("other", "REDACTED") for name, value in given]
            attributes["url.query"] = urlencode(told)
        span.set_attributes(attributes)

    @contextmanager
    def span(self, name: str, **attributes: Any) -> Iterator[dict[str, Any]]:
        """Around a piece of work; attributes that are known at its end are put into the dict it gives."""
        if self._tracer is None:
            yield attributes
            return
        began_ns = time.time_ns()
        error: BaseException | None = None
        try:
            yield attributes
        except BaseException as raised:  # seen and sent on: a span tells of it, a caller who left included
            error = raised
            raise
        finally:
            self._write(name, began_ns, time.time_ns(), attributes, error)

    def watch(self) -> "Watch":
        """For one image in the engine; from now on it waits."""
        return Watch(self if self._tracer is not None else None)

    def _write(self, name: str, began_ns: int, ended_ns: int, attributes: dict[str, Any], error: BaseException | None) -> None:
        """A span of the current request."""
        span = self._tracer.start_span(
            name, start_time=began_ns, attributes={f"clipdit.{key}": value for key, value in attributes.items()}
        )
        if error is not None:
            span.set_attribute("clipdit.error", _code(error))
            if not isinstance(error, asyncio.CancelledError):
                span.set_status(self._failed)
        span.end(ended_ns)


class Watch:
    """One image in the engine: a context manager around waiting for its answer."""

    def __init__(self, traces: Traces | None):
        self._traces = traces
        self._arrived_ns = time.time_ns()
        self._started_ns: int | None = None
        self._attributes: dict[str, Any] = {}

    def on_start(self, then: Callable[[], None] = lambda: None) -> Callable[[], None]:
        """For `Engine.submit`: notes that the image got into the model, then calls `then`."""
        if self._traces is None:
            return then

        def started() -> None:
            self._started_ns = time.time_ns()
            then()

        return started

    def answered(self, answer: Answer, model: ModelInfo | None, variant: str = "") -> None:
        """What the batch was. variant: empty where there is one."""
        sampling = answer.sampling
        self._attributes = {"batch_size": answer.batch, "steps": sampling.steps, "guidance": sampling.guidance}
        self._attributes["revision"] = answer.fingerprint[:12]
        if model is not None:
            self._attributes |= {"backend": model.backend, "precision": model.precision}
        if variant:
            self._attributes["variant"] = variant

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._traces is None:
            return
        now_ns, started_ns = time.time_ns(), self._started_ns
        self._traces._write("queue", self._arrived_ns, started_ns or now_ns, {}, error if started_ns is None else None)
        if started_ns is not None:
            self._traces._write("model", started_ns, now_ns, self._attributes, error)


def _code(error: BaseException) -> str:
    """Of the error table, where it is in there."""
    if isinstance(error, ApiError):
        return error.code
    return "cancelled" if isinstance(error, asyncio.CancelledError) else type(error).__name__
