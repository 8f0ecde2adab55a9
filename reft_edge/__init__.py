"""Train ReFT adapters, export the frozen model once to ONNX, swap kilobyte-sized adapters at run time."""

__version__ = "0.1.0"
