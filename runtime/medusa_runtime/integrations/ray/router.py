"""Ray Serve's request router for replicas that keep the caches of earlier prompts."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from medusa_runtime.integrations.ray.prefix import by_preference


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # Ray has no types for mypy
    """Sends prompts with the same start to the same replica, as long as it has room.

    1. Of the replicas with room, the one that is preferred for the start of the prompt gets the request. So a start
       that many requests share fills one replica after the other.
    2. If none has room, or the request has no prompt, the replica with the fewest requests gets it.
    """

    def initialize_state(self, *, rows: int) -> None:
        """Receives ``request_router_kwargs``.

        Args:
            rows: Requests that a replica runs at a time. With fewer it has room.
        """
        self._rows = rows

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Lists groups of replicas. Ray tries them in turn, and takes the least busy of a group.

        Args:
            candidate_replicas: The replicas that run.
            pending_request: The request. Its argument ``start`` is the start of its prompt.
        """
        if not candidate_replicas:
            return []
        start: bytes | None = None
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # wait between attempts if all are full
            start = pending_request.kwargs.get("start")
        if start is None:
            return [candidate_replicas]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        preferred = (by_name[name] for name in by_preference(start, by_name))
        return [*([replica] for replica in preferred if self._has_room(replica)), candidate_replicas]

    def _has_room(self, replica: RunningReplica) -> bool:
        requests: int = self.replica_queue_len_cache.get(replica.replica_id) or 0
        return requests < self._rows
