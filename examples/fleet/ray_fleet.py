"""The server on a Ray cluster: `serve run ray_fleet:app`, with REFT_EDGE_API_KEY set on the machine that says so."""

import os

from reft_edge.serving import ray_app

app = ray_app(
    os.environ.get("REFT_EDGE_MODEL", "/model"),
    os.environ.get("REFT_EDGE_ADAPTERS", "oci://registry.example.com/fleet/pirate").split(),
    replicas=2,
    slots=8,
    name="smol",
    api_key=os.environ.get("REFT_EDGE_API_KEY"),
    cpus=2,
)
