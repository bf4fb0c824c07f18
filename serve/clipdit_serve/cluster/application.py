"""The service as an application of Ray Serve."""

from collections.abc import Callable
from dataclasses import replace

from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.schema import LoggingConfig

from clipdit_serve.batching import Model
from clipdit_serve.cluster.ingress import NAME_OF_INGRESSES, Ingress
from clipdit_serve.cluster.model import ModelReplica
from clipdit_serve.cluster.sizes import OTHERS, Sizes, check_jobs
from clipdit_serve.settings import ServeSettings

LOOKS_EVERY_S, SILENT_S = 1.0, 5.0
"""Ray looks at a replica so often; one that says nothing for so long, three times, is replaced."""

BUSY_S = 20.0
"""Likewise of an ingress, which runs no model that could hang: it is silent when thousands ask at once, and whoever replaced it
then would break their connections."""

TRIES = 1
"""Of the first replicas to start, before Ray gives up. Those that replace others are tried for ever."""


def application(
    open_model: Callable[[], Model], sizes: Sizes, settings: ServeSettings, *, drain_s: float, json: bool
) -> Application:
    """Args:
    open_model: called once in each model replica.
    drain_s: a replica that is stopped waits so long for its requests to be answered.
    json: log as JSON lines.
    """
    check_jobs(sizes, settings)
    common = {
        "health_check_period_s": LOOKS_EVERY_S,
        "graceful_shutdown_timeout_s": drain_s,
        "graceful_shutdown_wait_loop_s": 0.1,
        "max_constructor_retry_count": TRIES,
        "logging_config": LoggingConfig(log_level="ERROR", enable_access_log=False),
    }
    most = sizes.model_ongoing(settings)
    models = serve.deployment(
        ModelReplica,
        name="Model",
        num_replicas=sizes.models,
        max_ongoing_requests=most,
        max_queued_requests=most,  # of one ingress: all it has, while replicas that died are replaced
        health_check_timeout_s=SILENT_S,
        ray_actor_options={"num_cpus": sizes.cpus, "num_gpus": sizes.gpus},
        **common,
    )
    ingress = serve.deployment(
        Ingress,
        name=NAME_OF_INGRESSES,
        num_replicas=sizes.ingresses,
        max_ongoing_requests=sizes.ingress_ongoing(settings),
        max_queued_requests=OTHERS,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        health_check_timeout_s=BUSY_S,
        ray_actor_options={"num_cpus": 1},
        **common,
    )
    without_key = replace(settings, api_key=None)  # of which a model has no use
    return ingress.bind(models.bind(open_model, without_key, json=json), sizes, settings, json=json)
