"""Processes that are forked from one which has imported what they need: imports are nine tenths of a tiny training or export."""

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(  # one server for all, and only what it is told before it starts counts
    [
        "reft_edge.export.builder_process",
        "onnxruntime_genai.models.builder",
        "reft_edge.commands.train",
        "reft_edge.training.run",
        "reft_edge.model.loading",
        "accelerate",
    ]
)
