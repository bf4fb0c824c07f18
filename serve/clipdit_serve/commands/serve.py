"""`clipdit serve`: the HTTP service, in one process, or in many that Ray Serve watches."""

import json as json_module
import logging
import os
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

KEY = "CLIPDIT_API_KEY"
"""The environment variable that holds the key: arguments are shown to every user of a machine."""


def serve(
    *,
    model: str | None = None,
    backend: str | None = None,
    device: str | None = None,
    engine: Literal["local", "ray"] = "local",
    replicas: int | None = None,
    ingress_replicas: int | None = None,
    ray_address: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    metrics_port: int | None = None,
    metrics_host: str = "127.0.0.1",
    insecure: bool = False,
    model_name: str | None = None,
    max_batch: int = 8,
    max_wait_ms: float = 5.0,
    pad_batches: Literal["yes", "no"] | None = None,
    queue: int = 64,
    timeout_s: float = 60.0,
    size: Annotated[str | None, tyro.conf.arg(metavar="HxW|own|nearest")] = None,
    fit: Literal["pad", "crop", "stretch"] = "pad",
    decode_processes: int = 2,
    max_jobs: int = 256,
    job_keep_s: float = 600.0,
    linger_s: float = 2.0,
    drain_s: float = 30.0,
    json: bool = False,
) -> int:
    """Answer translations by HTTP: OpenAI's POST /v1/images/edits, POST /v1/translate, and jobs under /v1/jobs.

    Says in one line where, when the model is warm; SIGHUP then opens it anew, without an error for anybody. With the
    environment variable CLIPDIT_API_KEY set, every route but health and the page needs `Authorization: Bearer KEY`; without
    it only this machine can reach the service.

    Args:
        model: checkpoint or bundle; the built-in one if not given.
        backend: how to run it; the best one that can run here if not given. Several with commas between, such as
            onnx:onnx-int8,onnx:onnx-fp32, are variants that callers choose from, the first if they do not; each is a model of its
            own in memory, and they share the processors.
        device: cpu, cuda, cuda:1 ...; the best one here if not given.
        engine: local is this process; ray is Ray Serve, with its model in several processes, on several GPUs or machines.
        replicas: of the model, with --engine ray; one a GPU if not given, or one.
        ingress_replicas: processes that answer HTTP, with --engine ray; 1 if not given. More than one cannot keep jobs: say
            --max-jobs 0.
        ray_address: of a Ray cluster that runs already and serves nothing yet; a closed one on this machine is started if not
            given.
        host: address to listen at. Another than this machine's own needs CLIPDIT_API_KEY, or --insecure.
        port: likewise; 0 takes a free one.
        metrics_port: answer /metrics there, without the key, and no longer at --port; 0 takes a free one.
        metrics_host: address of that port. Whoever can reach it can read the metrics.
        insecure: let others in without a key.
        model_name: what callers name the model; the folder's name if not given.
        max_batch: images in one call of the model.
        max_wait_ms: how long the first image of a batch waits for others.
        pad_batches: bring every batch to a power of two; on CUDA if not given.
        queue: requests that may wait; more get 429 and Retry-After.
        timeout_s: from a whole upload to its answer; later ones get 504.
        size: what images are fitted to, pixels, such as 256x256; "own" is each image's own, "nearest" the one of a bundle's sizes
            that is most like it. The model's if not given.
        fit: how: pad keeps the aspect and adds a border, which is cut off again; crop keeps the centre; stretch distorts.
        decode_processes: uploads decoded at the same time.
        max_jobs: jobs that are kept, those that wait included; 0 switches jobs off.
        job_keep_s: how long a finished job is kept.
        linger_s: after SIGTERM the port stays open so long, with /readyz at 503.
        drain_s: after SIGTERM or Ctrl-C answers are waited for so long; after SIGTERM also for results to be fetched.
        json: log as JSON lines, and say the address as JSON.
    """
    import signal
    from pathlib import Path

    from clipdit.backend import BUILT_IN, locate
    from clipdit.cli import DONE, FAULT, INTERRUPTED
    from clipdit.commands.translate import parse_size
    from clipdit_serve.app import create_app
    from clipdit_serve.batching import InProcessEngine
    from clipdit_serve.decoding import DecodePool
    from clipdit_serve.heap import limit_heaps
    from clipdit_serve.logs import log_as_json, log_trace_ids
    from clipdit_serve.opening import opener
    from clipdit_serve.server import Server, bind, join_host
    from clipdit_serve.settings import ServeSettings, check_bind
    from clipdit_serve.tracing import close_provider, open_provider
    from clipdit_serve.variants import Variants

    if json:
        log_as_json()
    settings = ServeSettings(
        model_name=model_name or Path(locate(model or BUILT_IN)).name,
        api_key=os.environ.get(KEY),
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        pad_batches=None if pad_batches is None else pad_batches == "yes",
        queue=queue,
        timeout_s=timeout_s,
        size=parse_size(size),
        fit=fit,
        decode_processes=decode_processes,
        max_jobs=max_jobs,
        job_keep_s=job_keep_s,
    )
    check_bind(host, settings, insecure=insecure)
    backends = _backends(backend)
    for one in backends.values():
        _check_model(Path(locate(model or BUILT_IN)), one)

    on_ray = {"--replicas": replicas, "--ingress-replicas": ingress_replicas, "--ray-address": ray_address}
    if engine == "local" and (names := [name for name, value in on_ray.items() if value is not None]):
        raise ValueError(f"{names[0]} is an option of --engine ray; say that too, or leave it out")

    metrics_socket = None

    def say(address: str) -> None:
        line = {"url": address, "model": settings.model_name} if json else f"{settings.model_name} at {address}"
        if metrics_socket is not None:
            there = f"http://{join_host(*metrics_socket.getsockname()[:2])}/metrics"
            line = line | {"metrics": there} if isinstance(line, dict) else f"{line}, its metrics at {there}"
        print(json_module.dumps(line) if json else line, flush=True)

    if engine == "ray":
        from clipdit_serve.cluster.start import Options, start

        if len(backends) > 1:
            raise ValueError(f"--backend is {backend}; --engine ray serves one variant. Start a service for each")
        if metrics_port is not None:
            raise ValueError("--metrics-port is for --engine local; --engine ray answers /metrics at --port, with the key")
        options = Options(
            device=device,
            replicas=replicas,
            ingress_replicas=1 if ingress_replicas is None else ingress_replicas,
            address=ray_address or os.environ.get("RAY_ADDRESS"),
            host=host,
            port=port,
            linger_s=linger_s,
            drain_s=drain_s,
            json=json,
        )
        path = str(Path(locate(model)).absolute()) if model else None  # not resolved: a reload follows a link anew
        ended_by = start(opener(path, backend=backend, device=device), options, settings, hide=KEY, on_ready=say)
        return INTERRUPTED if ended_by == signal.SIGINT else DONE

    limit_heaps()
    tracer_provider = open_provider(os.environ)
    if tracer_provider is not None:
        log_trace_ids()
    if metrics_port == port != 0:
        raise ValueError(f"--metrics-port is {port}, and so is --port; choose another one, or leave it out")
    sockets = [bind(host, port)]  # before anything is opened: whoever has no port is told at once
    if metrics_port is not None:
        metrics_socket = bind(metrics_host, metrics_port, "--metrics-port")
        sockets.append(metrics_socket)
    engines = {name: InProcessEngine(opener(model, backend=one, device=device), settings) for name, one in backends.items()}
    variants, decoder = Variants(engines), DecodePool(settings)
    app = create_app(
        variants,
        decoder,
        settings,
        metrics_port=metrics_socket.getsockname()[1] if metrics_socket is not None else None,
        tracer_provider=tracer_provider,
    )
    server = Server(
        app,
        variants,
        decoder,
        sockets=sockets,
        linger_s=linger_s,
        drain_s=drain_s,
        on_ready=say,
    )
    try:
        server.run()
    finally:
        if tracer_provider is not None:
            close_provider(tracer_provider)
    failures = [one.failure for one in engines.values() if one.failure is not None]
    for failure in failures:
        if isinstance(failure, ValueError | OSError):
            raise failure
    if failures:
        return FAULT
    return INTERRUPTED if server.signal == signal.SIGINT else DONE


def _backends(names: str | None) -> dict[str, str | None]:
    """Backends by the names of their variants, the default first. ValueError where two have one name."""
    from clipdit_serve.variants import variant_name

    if names is None:
        return {"": None}
    words = names.split(",")
    backends: dict[str, str | None] = {variant_name(word): word for word in words}
    if len(backends) < len(words) or "" in backends:
        raise ValueError(f"--backend is {names}; wanted names with commas between, each once")
    return backends


def _check_model(folder: "Path", backend: str | None) -> None:
    """ValueError for what cannot be opened, from a look at its JSON: before anything is started."""
    from clipdit.backend import available_backends, backend_class

    name = (backend or "").partition(":")[0]
    reasons = {name: backend_class(name).why_not(folder)} if name else available_backends(folder, unasked=True)
    if None not in reasons.values():
        raise ValueError("; ".join(dict.fromkeys(str(reason) for reason in reasons.values())))
