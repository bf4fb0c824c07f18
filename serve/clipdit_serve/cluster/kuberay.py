"""The application for whoever has a cluster and a Serve config file, as KubeRay does: `import_path` is this file's `build`.

The config's `args` are the fields of `Arguments`. The key is in the environment of the process that builds, under the name that
`clipdit serve` reads.
"""

import os
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict
from ray.serve import Application

from clipdit.backend import BUILT_IN, locate
from clipdit.commands.translate import parse_size
from clipdit.translator import Translator
from clipdit_serve.cluster.application import application
from clipdit_serve.cluster.sizes import Sizes
from clipdit_serve.commands.serve import KEY
from clipdit_serve.settings import ServeSettings


class Arguments(BaseModel):
    """As the options of `clipdit serve`; what is not here is refused."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    """A path that every machine has."""
    backend: str | None = None
    device: Literal["cpu", "cuda"] | None = None
    model_name: str | None = None
    replicas: int = 1
    ingress_replicas: int = 1
    cpus: float = 1
    """Of each model; its threads are as many."""
    gpus: float = 0
    """Of each model."""
    max_batch: int = 8
    max_wait_ms: float = 5.0
    pad_batches: bool | None = None
    queue: int = 64
    timeout_s: float = 60.0
    size: str | None = None
    fit: Literal["pad", "crop", "stretch"] = "pad"
    decode_processes: int = 2
    max_jobs: int = 256
    job_keep_s: float = 600.0
    drain_s: float = 30.0
    """A replica that is stopped waits so long for its requests to be answered."""
    insecure: bool = False
    """Serve without a key."""


def build(arguments: Arguments) -> Application:
    """ValueError where there is no key, since others reach a cluster."""
    key = os.environ.get(KEY)
    if key is None and not arguments.insecure:
        raise ValueError(f"no key is set; set {KEY} in the environment of the head, or say insecure: true")
    settings = ServeSettings(
        model_name=arguments.model_name or Path(locate(arguments.model or BUILT_IN)).name,
        api_key=key,
        max_batch=arguments.max_batch,
        max_wait_ms=arguments.max_wait_ms,
        pad_batches=arguments.pad_batches,
        queue=arguments.queue,
        timeout_s=arguments.timeout_s,
        size=parse_size(arguments.size),
        fit=arguments.fit,
        decode_processes=arguments.decode_processes,
        max_jobs=arguments.max_jobs,
        job_keep_s=arguments.job_keep_s,
    )
    sizes = Sizes(models=arguments.replicas, ingresses=arguments.ingress_replicas, cpus=arguments.cpus, gpus=arguments.gpus)
    open_model = partial(Translator.open, arguments.model, backend=arguments.backend, device=arguments.device)
    return application(open_model, sizes, settings, drain_s=arguments.drain_s, json=True)
