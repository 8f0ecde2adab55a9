"""The base model that an adapter belongs to."""

from dataclasses import dataclass

from reft_edge.adapter.config import AdapterConfig


@dataclass(frozen=True)
class Base:
    """What an adapter file says of its base model."""

    name: str
    fingerprint: str
    hidden_size: int
    num_layers: int

    @classmethod
    def of(cls, config: AdapterConfig) -> "Base":
        """The base of an adapter."""
        return cls(config.base_name, config.base_fingerprint, config.hidden_size, config.num_layers)
