"""One side of exactness.py and speed.py, in a process of its own: reft-edge, or pyreft in an environment of its own.

    python contender.py reft-edge|pyreft JOB.json

It loads, says "ready", and takes one optimiser step for every line it gets: `{"seconds", "loss", "peak_mb"}`, where the peak
is of the process's resident memory since the first step ended (Linux). Both sides have the same frozen weights, initial
adapter, batches, AdamW and gradient clipping; neither uses dropout. Each imports only what its own environment has.
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Report = Callable[[float, float], None]
"""Takes a step's seconds and its loss; returns when the next step is wanted."""


def reft_edge(job: Job, report: Report) -> None:
    import torch

    from reft_edge.adapter.file import load_adapter
    from reft_edge.model.loading import load_model
    from reft_edge.model.packed_base import load_halved
    from reft_edge.model.source import ModelFolder
    from reft_edge.steering.hooks import steered
    from reft_edge.steering.interventions import Interventions
    from reft_edge.training.data import Dataset
    from reft_edge.training.frozen_base import compiled, frozen
    from reft_edge.training.passes import Passes
    from reft_edge.training.settings import Execution, StepReport, TrainSettings
    from reft_edge.training.trainer import Trainer
    from reft_edge.training.turns import Example

    torch.set_num_threads(job["threads"])
    settings = TrainSettings(**job["settings"])
    load = load_halved if settings.dtype == "bf16" else load_model
    model = load(ModelFolder(Path(job["model"]), "model"))
    rows = Dataset([Example(tuple(prompt), tuple(completion)) for prompt, completion in job["rows"]], 0, "")
    interventions = Interventions.from_adapter(load_adapter(Path(job["adapter"])))
    passes = Passes(model, interventions, rows, settings, Execution(compile=job["compiled"]))
    trainer = Trainer(model, interventions, settings, rows, torch.device("cpu"), logits=passes)
    clock = Clock(report)
    with (
        frozen(model, trainer.autocast),
        compiled(model) if job["compiled"] else nullcontext(),
        passes.attached(),
        steered(model, (trainer.interventions, 1.0)) as steering,
    ):
        clock.wait()

        def on_step(step: StepReport) -> None:
            clock.stop(step.loss)

        trainer.run(steering, on_step)


def pyreft(job: Job, report: Report) -> None:
    import pyreft as library
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    config = AutoConfig.from_pretrained(job["model"], trust_remote_code=False)
    config.rope_theta = job["rope_theta"]  # transformers 5 writes it where transformers 4 does not look
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], config=config, torch_dtype=torch.float32, trust_remote_code=False
    )
    settings, start = job["settings"], load_file(job["start"])
    kind = {"loreft": library.LoreftIntervention, "direft": library.DireftIntervention}
    groups = start["W"].shape[1]
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": settings["rank"],
            "intervention": kind[settings["intervention"]](
                embed_dim=config.hidden_size, low_rank_dimension=settings["rank"], dtype=torch.float32
            ),
        }
        for _ in range(groups)
        for layer in job["layers"]
    ]
    reft = library.get_reft_model(model, library.ReftConfig(representations=representations))
    for number, intervention in enumerate(reft.interventions.values()):
        group, layer = divmod(number, len(job["layers"]))
        copy_start(intervention, {name: tensor[layer, group] for name, tensor in start.items()})
    reft.train()
    parameters = reft.get_trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=settings["lr"], weight_decay=settings["weight_decay"])
    clock = Clock(report)
    clock.wait()
    for batch in job["batches"]:
        inputs, labels, places = padded(batch, settings, len(representations))
        _, outputs = reft(inputs, unit_locations={"sources->base": (None, places)}, labels=labels)
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings["clip"])
        optimizer.step()
        optimizer.zero_grad()
        clock.stop(float(outputs.loss.detach()))


def copy_start(intervention: Any, start: dict[str, Any]) -> None:
    """The same initial point and the same chart of rotations: torch fills the rest of its base at random."""
    import torch

    rotation = intervention.rotate_layer.parametrizations.weight
    rank = start["W"].shape[0]
    with torch.no_grad():
        intervention.learned_source.weight.copy_(start["W"])
        intervention.learned_source.bias.copy_(start["b"])
        rotation.original.copy_(-torch.eye(start["base"].shape[0], rank))
        rotation[0].base.copy_(start["base"])
        found = intervention.rotate_layer.weight
        assert torch.allclose(found, start["base"][:, :rank], atol=1e-6)


def padded(batch: list[Any], settings: dict[str, Any], interventions: int) -> tuple[Any, Any, Any]:
    """A batch as pyreft's datasets and collator make it: a padding token before every row, and behind the shorter ones."""
    import torch
    from pyreft.dataset import get_intervention_locations

    length = 1 + max(len(prompt) + len(completion) for prompt, completion in batch)
    ids, mask = torch.zeros(2, len(batch), length, dtype=torch.long).unbind()
    labels = torch.full((len(batch), length), -100)
    places = []
    for i, (prompt, completion) in enumerate(batch):
        tokens = [*prompt, *completion]
        ids[i, 1 : 1 + len(tokens)] = torch.tensor(tokens)
        mask[i, 1 : 1 + len(tokens)] = 1
        labels[i, 1 + len(prompt) : 1 + len(tokens)] = torch.tensor(completion)
        places.append(
            get_intervention_locations(
                last_position=len(prompt),
                positions=settings["positions"],
                num_interventions=interventions,
                share_weights=settings["tied"],
            )
        )
    shifted = (torch.tensor(places) + 1).permute(1, 0, 2).tolist()
    return {"input_ids": ids, "attention_mask": mask}, labels, shifted


class Clock:
    """Times steps apart from the waiting between them."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.started = 0.0

    def wait(self) -> None:
        print("ready", flush=True)
        sys.stdin.readline()
        self.started = time.perf_counter()

    def stop(self, loss: float) -> None:
        self.report(time.perf_counter() - self.started, loss)
        self.started = time.perf_counter()


def tell(seconds: float, loss: float) -> None:
    peak = peak_mb()
    print(json.dumps({"seconds": seconds, "loss": loss, "peak_mb": peak}), flush=True)
    if not sys.stdin.readline():
        sys.exit()
    if tell.first:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        tell.first = False


tell.first = True


def peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    name, path = sys.argv[1:]
    with open(path, encoding="utf-8") as file:
        job = json.load(file)
    {"reft-edge": reft_edge, "pyreft": pyreft}[name](job, tell)


if __name__ == "__main__":
    main()
