"""What one process of a sharded base holds, printed; run by torchrun in test_distributed.py.

python -m torch.distributed.run --nproc_per_node 2 tests/helpers/sharded.py MODEL_FOLDER
"""

import sys
from pathlib import Path

import torch

from reft_edge.model.loading import load_model
from reft_edge.model.source import ModelFolder
from reft_edge.training.distributed import launched_processes

model = load_model(ModelFolder(Path(sys.argv[1]), "tiny"))
total = sum(parameter.numel() for parameter in model.parameters())
processes = launched_processes("cpu")
placed = processes.place(model, torch.device("cpu"))
held = sum(parameter.to_local().numel() for parameter in placed.parameters())
sys.stdout.write(f"{processes.rank} {processes.count} {held} {total}\n")  # at once: both write to one pipe
processes.end()
