"""Which replica of a Ray Serve deployment gets a request: for one session always the same, as long as it has room."""

import hashlib
import random

from ray.serve.request_router import (
    LocalityMixin,
    MultiplexMixin,
    PendingRequest,
    RequestRouter,
    RunningReplica,
)


class SessionRouter(LocalityMixin, MultiplexMixin, RequestRouter):  # type: ignore[misc]
    """Requests of one session go to one replica, which has their prefix in memory; others, and those for which it has no
    room, go where there is less to do.

    Ray's router sees a request's headers and not its body, so the header `x-session-id` names the session. Where replicas
    come or go, only the sessions of those move.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas by preference: Ray takes the least busy of the first list in which one has room."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            if session := pending_request.metadata.session_id:
                names = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
                return [[names[name]] for name in by_session(session, list(names))]
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]


def by_session(session: str, replicas: list[str]) -> list[str]:
    """Names of replicas, the one for this session first (rendezvous hashing)."""
    return sorted(replicas, key=lambda name: hashlib.sha256(f"{session}\0{name}".encode()).digest())
