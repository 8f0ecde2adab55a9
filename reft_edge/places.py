"""Places in a model where an edit can act."""

from typing import NamedTuple

COMPONENTS = ("block", "attention", "mlp")


class Place(NamedTuple):
    """One hidden state of one layer."""

    layer: int
    component: str = "block"
    """`block`: the residual stream after the whole layer; `attention` or `mlp`: what that part gives, before it joins
    the residual stream (and before a norm or a factor that the model puts in between). pyreft's block_output,
    attention_output and mlp_output."""

    @property
    def port(self) -> str:
        """What the names of a port's inputs begin with."""
        return f"reft.layers.{self.layer}" + ("" if self.component == "block" else f".{self.component}")

    def __str__(self) -> str:
        return str(self.layer) if self.component == "block" else f"{self.layer} ({self.component})"
