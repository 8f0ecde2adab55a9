"""The errors that a user can cause and act on."""

from reft_edge.terminal import printable

LONGEST = 4000
"""Characters of an error's text."""


class ReftEdgeError(Exception):
    """What was wrong, what was expected and what to do; the command line prints it without a traceback.

    As text it has no control characters and an end: errors quote strangers' files, and a terminal would obey what stands
    there. Of one that is longer than LONGEST, the beginning and the end are left.
    """

    def __str__(self) -> str:
        text = printable(super().__str__())
        return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


class AdapterFileError(ReftEdgeError):
    """An adapter file that is malformed, unsafe, or of a version this release cannot read."""


class BaseMismatchError(ReftEdgeError):
    """An adapter trained on one base model was given to another."""


class SignatureError(ReftEdgeError):
    """An adapter that is not signed, or whose signature is not to be trusted."""
