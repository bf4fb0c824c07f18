"""`clipdit serve --engine ray`, from its options to its end."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from clipdit_serve.batching import Model
from clipdit_serve.cluster.local import cluster
from clipdit_serve.cluster.ports import check_port, free_port
from clipdit_serve.cluster.sizes import Sizes, check_jobs
from clipdit_serve.settings import ServeSettings


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says of all that is not a setting of the service."""

    device: str | None
    replicas: int | None
    """Of the model; None is one a GPU, or one."""
    ingress_replicas: int
    address: str | None
    """Of a cluster that runs already."""
    host: str
    port: int
    linger_s: float
    drain_s: float
    json: bool


def start(
    open_model: Callable[[], Model],
    options: Options,
    settings: ServeSettings,
    *,
    hide: str,
    on_ready: Callable[[str], None],
) -> int | None:
    """The signal that ended it. ValueError for what cannot be.

    Args:
        open_model: called once in each replica of the model.
        hide: an environment variable that holds a secret, and is no business of the cluster's processes.
        on_ready: called once, with the address, when the first request would be answered.
    """
    if find_spec("ray") is None:
        raise ValueError("--engine ray needs Ray; install it with pip install 'clipdit[ray]'")
    if options.device is not None and ":" in options.device:
        raise ValueError(f"--device is {options.device}; Ray gives each replica a GPU of its own: say cuda, or cpu")
    gpus = 0 if options.device == "cpu" else torch.cuda.device_count() if options.address is None else None
    asked = Sizes(models=1 if options.replicas is None else options.replicas, ingresses=options.ingress_replicas)
    check_jobs(asked, settings)
    port = options.port or free_port(options.host)
    check_port(options.host, port)

    models = options.replicas or max(1, gpus or 0)
    cores = os.cpu_count() or 1
    cpus = 1 if gpus else max(1, cores // models)
    with cluster(address=options.address, cpus=asked.ingresses + models * cpus, json=options.json, without=hide):
        # only now: Ray reads its settings from the environment when it is imported
        from clipdit_serve.cluster.application import application
        from clipdit_serve.cluster.running import Runner

        sizes = Sizes(models=models, ingresses=asked.ingresses, cpus=cpus, gpus=min(1, gpus or 0))
        if options.address is not None:
            sizes = _fitted(options, asked)
        runner = Runner(host=options.host, port=port, linger_s=options.linger_s, drain_s=options.drain_s, on_ready=on_ready)
        try:
            runner.run(application(open_model, sizes, settings, drain_s=options.drain_s, json=options.json))
        except RuntimeError as error:
            raise _cause(error) from error
    return runner.signal


def _fitted(options: Options, asked: Sizes) -> Sizes:
    """To a cluster that runs already. ValueError where it is too small, or serves something."""
    import ray
    from ray import serve

    if serve.status().applications:
        raise ValueError(f"the cluster at {options.address} serves something already; --engine ray wants one that does not")
    there = ray.cluster_resources()
    gpus = 0 if options.device == "cpu" else int(there.get("GPU", 0))
    models = options.replicas or max(1, gpus)
    spare = int(there.get("CPU", 0)) - asked.ingresses
    if spare < models or (gpus and gpus < models):
        have = f"{there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs"
        raise ValueError(
            f"the cluster has {have}; {models} models and {asked.ingresses} ingresses want one CPU each, and a GPU each"
        )
    return Sizes(models=models, ingresses=asked.ingresses, cpus=1 if gpus else spare // models, gpus=min(1, gpus))


def _cause(error: RuntimeError) -> Exception:
    """What a model replica died of while it started: ValueError for what a user causes."""
    found = re.findall(r"^(?:\w+\.)*(ValueError|\w*FileNotFoundError|OSError|PermissionError): (.+)$", str(error), re.MULTILINE)
    return ValueError(found[-1][1]) if found else error
