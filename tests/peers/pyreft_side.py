"""Run with the Python of pyreft's environment: what pyreft itself saves, loads and computes.

    python pyreft_side.py save MODEL FOLDER     adapters of every class and form, and pyreft's logits with each
    python pyreft_side.py load MODEL FOLDER     logits of every adapter folder in FOLDER, by `ReftModel.load`, and with
                                                its .bin files loaded into float32 interventions

Logits go to FOLDER/NAME.npz, an array a prompt; those of float32 interventions to FOLDER/NAME-fp32.npz.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pyreft
import torch
import transformers
from pyreft.dataset import get_intervention_locations

POSITIONS = "f3+l2"
RANK = 3
CLASSES = {
    "loreft": pyreft.LoreftIntervention,
    "noreft": pyreft.NoreftIntervention,
    "consreft": pyreft.ConsreftIntervention,
    "lobireft": pyreft.LobireftIntervention,
    "direft": pyreft.DireftIntervention,
    "nodireft": pyreft.NodireftIntervention,
}
NO_SOURCE = ("consreft", "lobireft")


def prompts(model):
    random = np.random.default_rng(0)
    return [random.integers(5, min(model.config.vocab_size, 300), n).tolist() for n in (2, 5, 13)]


def logits(reft_model, model, tied, count):
    """`[tokens, vocabulary]` of every prompt, edited at POSITIONS."""
    found = []
    for row in prompts(model):
        locations = get_intervention_locations(
            last_position=len(row), positions=POSITIONS, num_interventions=count, share_weights=tied
        )
        # -1 is where pyreft pads the location lists of a batch; a row alone needs no padding
        rows = [[[position for position in places if position >= 0]] for places in locations]
        with torch.no_grad():
            _, output = reft_model(
                {"input_ids": torch.tensor([row])}, unit_locations={"sources->base": (None, rows)}
            )
        found.append(output.logits[0].float().numpy())
    return found


def build(model, kind, tied, layers, component="block_output", act_fn=None, bias=False):
    size = model.config.hidden_size
    options = {} if kind in NO_SOURCE else {"dtype": torch.float32, "act_fn": act_fn}
    representations = [
        {
            "layer": layer,
            "component": component.format(layer=layer),
            "low_rank_dimension": RANK,
            "intervention": CLASSES[kind](embed_dim=size, low_rank_dimension=RANK, add_bias=bias, **options),
        }
        for layer in (layers if tied else layers * 2)
    ]
    reft_model = pyreft.get_reft_model(
        model, pyreft.ReftConfig(representations=representations), set_device=False
    )
    with torch.no_grad():  # as training would move them
        for intervention in reft_model.interventions.values():
            for parameter in intervention.parameters():
                keep = parameter.diagonal().clone() if parameter.shape == (size, RANK) else None
                parameter += torch.randn_like(parameter) * 0.3
                if keep is not None:
                    parameter.diagonal().copy_(keep)
    return reft_model


def save(model_folder, folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, torch_dtype=torch.float32).eval()
    layers = [0, model.config.num_hidden_layers - 1]
    cases = [
        {"kind": kind, "tied": tied, "act_fn": None, "bias": False, "component": "block_output"}
        for kind in CLASSES
        for tied in (True, False)
    ]
    cases += [
        {"kind": "loreft", "tied": False, "act_fn": "relu", "bias": False, "component": "block_output"},
        {"kind": "noreft", "tied": False, "act_fn": "gelu", "bias": True, "component": "block_output"},
        {"kind": "nodireft", "tied": True, "act_fn": "silu", "bias": True, "component": "block_output"},
        {
            "kind": "direft",
            "tied": False,
            "act_fn": "tanh",
            "bias": False,
            "component": "model.layers[{layer}].output",
        },
        {"kind": "loreft", "tied": True, "act_fn": None, "bias": False, "component": "mlp_output"},
        {"kind": "loreft", "tied": True, "act_fn": None, "bias": False, "component": "attention_output"},
    ]
    for number, case in enumerate(cases):
        torch.manual_seed(number)
        name = f"{number:02}-{case['kind']}-{'tied' if case['tied'] else 'untied'}"
        reft_model = build(
            model, case["kind"], case["tied"], layers, case["component"], case["act_fn"], case["bias"]
        )
        reft_model.save(str(folder / name))
        reft_model.save_intervention(str(folder / f"{name}-bare"))
        count = len(reft_model.interventions)
        np.savez(folder / f"{name}.npz", *logits(reft_model, model, case["tied"], count))
        (folder / f"{name}.json").write_text(json.dumps(case))
    (folder / "prompts.json").write_text(json.dumps(prompts(model)))


def load(model_folder, folder):
    for path in sorted(folder.iterdir()):
        if not (path / "config.json").is_file():
            continue
        model = transformers.AutoModelForCausalLM.from_pretrained(
            model_folder, torch_dtype=torch.float32
        ).eval()
        reft_model = pyreft.ReftModel.load(str(path), model)
        reft_model.float()
        count = len(reft_model.interventions)
        tied = not any(key.endswith("#1") for key in reft_model.interventions)
        np.savez(folder / f"{path.name}.npz", *logits(reft_model, model, tied, count))
        for key, loaded in list(reft_model.interventions.items()):
            exact = type(loaded)(
                embed_dim=model.config.hidden_size,
                low_rank_dimension=loaded.rotate_layer.weight.shape[1],
                dtype=torch.float32,
            )
            exact.load_state_dict(torch.load(path / f"intkey_{key}.bin", weights_only=True))
            reft_model.interventions[key] = exact
        np.savez(folder / f"{path.name}-fp32.npz", *logits(reft_model, model, tied, count))


if __name__ == "__main__":
    command, model_folder, folder = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    {"save": save, "load": load}[command](model_folder, Path(folder))
