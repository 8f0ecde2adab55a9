"""Many machines: the server as a Ray Serve application, and answers for whole datasets with Ray Data (extra `ray`)."""

from reft_edge.serving.ray_answers import ray_map
from reft_edge.serving.ray_server import ray_app

__all__ = ["ray_app", "ray_map"]
