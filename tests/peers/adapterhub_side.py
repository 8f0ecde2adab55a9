"""Run with the Python of AdapterHub's environment: what `adapters` saves and computes.

    python adapterhub_side.py MODEL FOLDER

writes to FOLDER an adapter of every case that fits the model, as `save_adapter` does, and beside each NAME.json, the case, and
NAME.npz: the logits of every prompt (an encoder's last hidden states), and of a decoder without suffix positions also what
`generate` computes with a KV cache, and of DiReFT what the library computes once it has read its own folder. FOLDER/prompts.json has the prompts.
"""

import json
import sys
from pathlib import Path

import adapters
import numpy as np
import torch
import transformers
from adapters import DiReftConfig, LoReftConfig, NoReftConfig

RANK = 3
CLASSES = {"loreft": LoReftConfig, "noreft": NoReftConfig, "nodireft": DiReftConfig}
CASES = [
    # prefix, suffix, tied, layers, safetensors, non_linearity
    ("loreft", 3, 0, False, "all", False, None),
    ("loreft", 2, 3, False, [0, 2], True, None),
    ("loreft", 2, 2, True, "all", False, None),
    ("loreft", 0, 2, False, [1], False, "relu"),
    ("noreft", 3, 1, False, "all", True, None),
    ("noreft", 1, 0, True, [2], False, "gelu"),
    ("nodireft", 1, 2, True, "all", True, None),
    ("nodireft", 0, 3, False, [0, 1], False, None),
    ("nodireft", 2, 0, False, "all", False, "leakyrelu"),
]
LENGTHS = (1, 2, 3, 4, 5, 6, 13)
NEW = 12


def prompts(model):
    random = np.random.default_rng(0)
    return [random.integers(5, min(model.config.vocab_size, 300), count).tolist() for count in LENGTHS]


@torch.no_grad()
def with_adapter(model, number, case):
    """The model with a random adapter of the case, moved as training would move it."""
    kind, prefix, suffix, tied, layers, _, act = case
    config = CLASSES[kind](
        prefix_positions=prefix,
        suffix_positions=suffix,
        tied_weights=tied,
        layers=layers,
        r=RANK,
        non_linearity=act,
    )
    adapters.init(model)
    model.add_adapter("task", config=config)
    model.set_active_adapters("task")
    torch.manual_seed(number)
    for name, parameter in model.named_parameters():
        if ".reft_layer." in name:
            keep = parameter.diagonal().clone() if name.endswith("original") else None
            parameter += torch.randn_like(parameter) * 0.3
            if keep is not None:
                parameter.diagonal().copy_(keep)
    return model.eval()


def give_cache_back(module, args, kwargs):
    """adapters 1.3.0 reads a layer's KV cache under the name that it had before transformers 4.56, and so decodes without one."""
    return args, {"past_key_value" if name == "past_key_values" else name: kwargs[name] for name in kwargs}


@torch.no_grad()
def computed(model, prefix, suffix):
    found = {}
    rows = prompts(model)
    for row in rows:
        output = model(torch.tensor([row]))
        found[f"row{len(row)}"] = (output.logits if "logits" in output else output.last_hidden_state)[
            0
        ].numpy()
    if suffix == 0 and model.can_generate():
        for layer in model.model.layers:
            layer.register_forward_pre_hook(give_cache_back, with_kwargs=True)
        ids = torch.tensor([rows[-1]])
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        found["cached"] = torch.cat(answer.logits).numpy()
        found["tokens"] = answer.sequences[0, len(rows[-1]) :].numpy()
    return found


@torch.no_grad()
def reloaded(model, folder, plain):
    """The last prompt's output with the adapter as the library reads it from the folder."""
    model.load_adapter(str(folder), load_as="again", set_active=True, use_safetensors=plain)
    output = model.eval()(torch.tensor([prompts(model)[-1]]))
    return (output.logits if "logits" in output else output.last_hidden_state)[0].numpy()


def main(model_folder, folder):
    decodes = "CausalLM" in json.loads((model_folder / "config.json").read_text())["architectures"][0]
    loader = transformers.AutoModelForCausalLM if decodes else transformers.AutoModel
    for number, case in enumerate(CASES):
        model = with_adapter(loader.from_pretrained(model_folder, dtype=torch.float32), number, case)
        kind, prefix, suffix, tied, layers, plain, act = case
        name = f"{number}-{kind}"
        model.save_adapter(str(folder / name), "task", use_safetensors=plain)
        found = computed(model, prefix, suffix)
        if kind == "nodireft":
            found["reloaded"] = reloaded(model, folder / name, plain)
        np.savez(folder / f"{name}.npz", **found)
        described = {
            "kind": kind,
            "prefix": prefix,
            "suffix": suffix,
            "tied": tied,
            "layers": layers,
            "act": act,
        }
        (folder / f"{name}.json").write_text(json.dumps(described))
    (folder / "prompts.json").write_text(json.dumps(prompts(model)))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
