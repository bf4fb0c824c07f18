"""Log lines as JSON, one object a line, for whatever collects them."""

import logging

from pythonjsonlogger.json import JsonFormatter


def json_formatter() -> logging.Formatter:
    """{"time": "2026-11-26T08:00:00+0000", "level": "INFO", "logger": ..., "message": ..., and what a record brings}."""
    return JsonFormatter(
        "%(asctime)s %(levelname)s %(name)s %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S%z",
        rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
    )


def log_as_json() -> None:
    """Every handler of this process writes JSON from now on."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(json_formatter())


class TraceIds(logging.Filter):
    """Lines that belong to a request say to which trace, in hexadecimal, as the collector shows it."""

    def filter(self, record: logging.LogRecord) -> bool:
        from opentelemetry import trace

        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            record.trace_id, record.span_id = trace.format_trace_id(context.trace_id), trace.format_span_id(context.span_id)
        return True


def log_trace_ids() -> None:
    """Every handler of this process, from now on."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(TraceIds())


def log_to_stderr(json: bool) -> None:
    """In a process that the command line did not start: its own loggers from INFO, everybody else's from WARNING."""
    handler = logging.StreamHandler()
    handler.setFormatter(json_formatter() if json else logging.Formatter("%(message)s"))
    logging.getLogger().handlers[:] = [handler]
    for name in ("clipdit", "clipdit_serve"):
        logging.getLogger(name).setLevel(logging.INFO)
