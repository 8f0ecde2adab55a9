"""`python -m reft_edge` is `reft-edge`."""

from reft_edge.cli import app

app()
