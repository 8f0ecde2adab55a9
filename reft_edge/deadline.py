"""A deadline over work whose connections have no end of their own, such as a library's exchange with a server."""

from collections.abc import Callable
from threading import Thread
from typing import TypeVar

from reft_edge.errors import ReftEdgeError

Result = TypeVar("Result")


def in_time(work: Callable[[], Result], seconds: float, what: str) -> Result:
    """What `work` returns or raises.

    Raises ReftEdgeError, which begins with `what`, if it takes longer; it is then left alone, in a thread that does not
    keep the process from ending.
    """
    ended: list[Result | BaseException] = []

    def run() -> None:
        try:
            ended.append(work())
        except BaseException as error:  # raised below, in the thread that asked
            ended.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not ended:
        raise ReftEdgeError(
            f"{what} takes longer than {seconds:,.0f} s; nothing is known of how it ended: try again"
        )
    if isinstance(ended[0], BaseException):
        raise ended[0]
    return ended[0]
