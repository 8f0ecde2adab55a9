"""The errors that a user can cause and act on."""


class ReftEdgeError(Exception):
    """What was wrong, what was expected and what to do; the command line prints it without a traceback."""


class AdapterFileError(ReftEdgeError):
    """An adapter file that is malformed, unsafe, or of a version this release cannot read."""


class BaseMismatchError(ReftEdgeError):
    """An adapter trained on one base model was given to another."""


class SignatureError(ReftEdgeError):
    """An adapter that is not signed, or whose signature is not to be trusted."""
