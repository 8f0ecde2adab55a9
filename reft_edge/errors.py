"""The errors that a user can cause and act on."""


class ReftEdgeError(Exception):
    """What was wrong, what was expected and what to do; the command line prints it without a traceback.

    As text it has no control characters: errors quote strangers' files, and a terminal would obey what stands there.
    """

    def __str__(self) -> str:
        return "".join(
            mark if mark.isprintable() or mark == "\n" else ascii(mark)[1:-1] for mark in super().__str__()
        )


class AdapterFileError(ReftEdgeError):
    """An adapter file that is malformed, unsafe, or of a version this release cannot read."""


class BaseMismatchError(ReftEdgeError):
    """An adapter trained on one base model was given to another."""


class SignatureError(ReftEdgeError):
    """An adapter that is not signed, or whose signature is not to be trusted."""
