"""What a device runs: an exported model in ONNX Runtime, with adapters swapped per request. Needs no torch."""

from reft_edge.runtime.constraints import Constraint
from reft_edge.runtime.encoder import Classification, SteeredEncoder
from reft_edge.runtime.engine import Engine, QueueFullError, Ticket
from reft_edge.runtime.generation import Generation
from reft_edge.runtime.logprobs import TokenScore
from reft_edge.runtime.model import SteeredModel
from reft_edge.runtime.request import Piece, Request
from reft_edge.runtime.sampling import Sampling

__all__ = [
    "Classification",
    "Constraint",
    "Engine",
    "Generation",
    "Piece",
    "QueueFullError",
    "Request",
    "Sampling",
    "SteeredEncoder",
    "SteeredModel",
    "Ticket",
    "TokenScore",
]
