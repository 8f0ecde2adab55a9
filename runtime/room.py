"""How many tokens of KV cache the rows of a batch may have together."""

import os
import sys

from reft_edge.errors import ReftEdgeError
from reft_edge.runtime.session import GraphSession

LEAST_BUDGET = 768 << 20
"""Bytes."""
LEAST_TOKENS = 32
PREFIX_SHARE = 6
"""Of the bytes for KV caches, the part that prompts which are remembered may take: one of so many."""
SPARE = 128
"""Tokens that there must be room for beside a request's own before it starts next to others."""


def usual_budget(graph: GraphSession) -> int:
    """Bytes for the KV caches of a server: what a whole context takes, at most half of the machine's memory, and at least
    LEAST_BUDGET."""
    whole = graph.token_bytes * graph.context_length
    return max(LEAST_BUDGET, min(whole, _memory() // 2))


def tokens_in(graph: GraphSession, budget: int) -> int:
    """Tokens whose keys and values take `budget` bytes. Raises ReftEdgeError for fewer than LEAST_TOKENS."""
    tokens = budget // max(1, graph.token_bytes)
    if tokens < LEAST_TOKENS:
        raise ReftEdgeError(
            f"the memory for KV caches is {budget:,} bytes; a token of this model takes {graph.token_bytes:,}, so give at "
            f"least {LEAST_TOKENS * graph.token_bytes:,}"
        )
    return tokens


def _memory() -> int:
    """Bytes of the machine's memory; 0 where the system does not say."""
    if sys.platform == "win32":
        return 0
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return 0
