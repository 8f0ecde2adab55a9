"""Run with the Python of repeng's environment: what repeng itself writes, reads and computes.

python repeng_side.py save MODEL FILE.gguf LOGITS.npy    a random control vector, and the logits with it
python repeng_side.py load MODEL FILE.gguf LOGITS.npy    the logits with a control vector that repeng reads
"""

import sys

import numpy as np
import torch
import transformers
from repeng import ControlModel, ControlVector

ROW = [5, 80, 33, 12, 7, 61, 19, 20, 44, 3, 99, 15]


def main(command, model_folder, path, output):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, torch_dtype=torch.float32).eval()
    layers = model.config.num_hidden_layers
    if command == "save":
        random = np.random.default_rng(3)
        # repeng trains directions for the layers 1 to N - 1
        directions = {
            layer: random.normal(size=model.config.hidden_size).astype(np.float32)
            for layer in range(1, layers)
        }
        vector = ControlVector(model_type=model.config.model_type, directions=directions)
        vector.export_gguf(path)
    else:
        vector = ControlVector.import_gguf(path)
    controlled = ControlModel(model, sorted(vector.directions))
    controlled.set_control(vector, 1.0)
    with torch.no_grad():
        np.save(output, controlled(input_ids=torch.tensor([ROW])).logits[0].numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
