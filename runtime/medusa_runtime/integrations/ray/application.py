"""Builds the application: an ingress and replicas, with their options for Ray Serve."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from medusa_runtime.integrations.ray.ingress import Ingress
from medusa_runtime.integrations.ray.options import Scaling, absolute, read_arguments
from medusa_runtime.integrations.ray.replica import Replica
from medusa_runtime.integrations.ray.router import PrefixRouter
from medusa_runtime.server.settings import Settings

# Seconds after the drain in which a replica closes its service before Ray kills it.
_CLOSE_SECONDS = 5.0
# A bundle that can't be loaded will not load later. A second try helps if a volume was not mounted yet.
_TRIES = 2


def app(arguments: Mapping[str, object]) -> serve.Application:
    """The application of ``serve run medusa_runtime.integrations.ray:app bundle=FOLDER``.

    Args:
        arguments: Fields of ``Settings`` and ``Scaling`` by name, as text or in their own type.

    Raises:
        SettingError: An argument can't be used; the message says why.
    """
    return build_app(*read_arguments(arguments))


def build_app(settings: Settings, scaling: Scaling = Scaling()) -> serve.Application:  # noqa: B008  # it is frozen
    """Builds an application of Ray Serve that answers with OpenAI's API.

    Args:
        settings: The settings of the server. All nodes need the bundle at the same path.
        scaling: Number and resources of the replicas.

    Raises:
        SettingError: There is no bundle at the path.
    """
    settings = absolute(settings)
    if settings.threads is None:
        settings = dataclasses.replace(settings, threads=scaling.cpus)
    replica = serve.deployment(Replica).options(
        name="Replica",
        ray_actor_options={"num_cpus": scaling.cpus, "num_gpus": scaling.gpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=scaling.min_replicas,
            max_replicas=scaling.max_replicas,
            target_ongoing_requests=settings.rows,
        ),
        max_ongoing_requests=2 * settings.rows,  # those that run, and as many that wait, so that no row is ever idle
        max_queued_requests=settings.max_queue,
        max_constructor_retry_count=_TRIES,
        graceful_shutdown_timeout_s=settings.drain_seconds + _CLOSE_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter, request_router_kwargs={"rows": settings.rows}
        ),
    )
    ingress = serve.deployment(Ingress).options(
        name="Ingress",
        num_replicas=scaling.ingresses,
        ray_actor_options={"num_cpus": 0},  # it only forwards messages
        max_ongoing_requests=scaling.max_replicas * (2 * settings.rows + settings.max_queue) + 100,
        graceful_shutdown_timeout_s=settings.drain_seconds + _CLOSE_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
    )
    return ingress.bind(replica.bind(settings), settings, scaling)
