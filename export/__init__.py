"""Exporting a frozen model once to ONNX with intervention ports. Needs the extra `export`."""

from reft_edge.export.build import ALGORITHMS, BLOCK_SIZES, DEVICES, PRECISIONS, Quantisation
from reft_edge.export.model import export_model

__all__ = ["ALGORITHMS", "BLOCK_SIZES", "DEVICES", "PRECISIONS", "Quantisation", "export_model"]
