"""What pyreft calls its classes, components and tensors."""

CLASSES = {
    "LoreftIntervention": "loreft",
    "NoreftIntervention": "noreft",
    "ConsreftIntervention": "consreft",
    "LobireftIntervention": "lobireft",
    "DireftIntervention": "direft",
    "NodireftIntervention": "nodireft",
}
COMPONENTS = {"block_output": "block", "attention_output": "attention", "mlp_output": "mlp"}


ROTATION = "rotate_layer.parametrizations.weight"
