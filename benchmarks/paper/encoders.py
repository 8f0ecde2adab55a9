"""Classification with an encoder: its tasks and methods, and how one is trained and asked.

Every method trains a linear head on the mean (or first) of the last hidden states beside its adapter: drawn as BERT's, in
the same batches, with the adapter's own learning rate and schedule. `head` trains that alone.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))

import torch
from table import Method, drawn
from tasks import Row, Task, load
from torch import Tensor, nn
from worker import Adapted, Job, OnStep, device_of, fit

from reft_edge.adapter.file import load_adapter
from reft_edge.model.encoders import load_text_tokens
from reft_edge.model.source import ModelFolder
from reft_edge.model.texts import TextTokens, Tokens, parse_row
from reft_edge.steering.heads import class_scores, pooled_states
from reft_edge.steering.hooks import Steering
from reft_edge.steering.interventions import Interventions
from reft_edge.training.classification import LabelledText, LabelledTexts
from reft_edge.training.run import train
from reft_edge.training.settings import Execution, TrainSettings

Labelled = tuple[list[int], list[int], int]
"""Token ids, their types, and the label."""


def as_it_is(row: Row) -> Row:
    return row


TASKS = (
    Task("glue-sst2", "SST-2", as_it_is, 150, 16, 250, 600, dev_file="dev", folder="sst2"),
    Task("mrpc", "MRPC", as_it_is, 300, 16, 250, 1725),
    Task("qnli", "QNLI", as_it_is, 300, 16, 250, 800, test_file="train"),
)
MATRICES = r"layer\.\d+\.(attention\.self\.(query|key|value)|intermediate\.dense|output\.dense)"
"""q, k, v and the MLP's two: those that the decoders' LoRA adapts, as BERT calls them."""


def lora(rank: int) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "target_modules": rf".*\.{MATRICES}"}


def edit(name: str, title: str, rates: tuple[float, ...], **settings: Any) -> Method:
    return Method(name, title, "reft-edge", {"rank": 4, "tied": True, **settings}, rates)


ENDS = {"positions": "f3+l3"}
ALL = {"positions": "all"}
METHODS = (
    Method("head", "the head alone", "head", {}, (1e-2, 3e-3, 3e-2)),
    edit("loreft", "LoReFT, rank 4, f3+l3", (2e-3, 6e-3, 1.5e-2), intervention="loreft", **ENDS),
    edit("direft", "DiReFT, rank 4, f3+l3", (2e-3, 6e-3, 1.5e-2), intervention="direft", **ENDS),
    edit("loreft-all", "LoReFT, rank 4, all", (2e-3, 6e-3, 1.5e-2), intervention="loreft", **ALL),
    edit(
        "post-block",
        "post-block (NoDiReFT, rank 4, all)",
        (2e-3, 6e-3, 1.5e-2),
        intervention="nodireft",
        **ALL,
    ),
    edit(
        "post-block-silu",
        "post-block with SiLU, rank 4",
        (2e-3, 6e-3, 1.5e-2),
        intervention="nodireft",
        act_fn="silu",
        **ALL,
    ),
    edit(
        "loreft-unchanged",
        "LoReFT, rank 4, f3+l3, unchanged start",
        (2e-3, 6e-3, 1.5e-2),
        intervention="loreft",
        start="unchanged",
        **ENDS,
    ),
    edit(
        "post-block-unchanged",
        "post-block, rank 4, unchanged start",
        (2e-3, 6e-3, 1.5e-2),
        intervention="nodireft",
        start="unchanged",
        **ALL,
    ),
    edit("red", "RED, all", (6e-3, 2e-3, 2e-2), intervention="red", **ALL | {"rank": 1}),
    edit("bias", "bias only, all", (1e-2, 3e-3, 3e-2), intervention="steering", **ALL | {"rank": 1}),
    Method("lora", "LoRA, rank 8", "peft", lora(8), (1e-3, 3e-3, 1e-2)),
    Method("lora-r1", "LoRA, rank 1", "peft", lora(1), (3e-3, 1e-3, 1e-2)),
    Method("dora", "DoRA, rank 8", "peft", lora(8) | {"use_dora": True}, (1e-3, 3e-3, 1e-2)),
)


def prepare(data: Path, task: Task, model: ModelFolder) -> dict[str, Any]:
    """A task's rows as token ids, to train on and to ask of."""
    tokens, parts = load_text_tokens(model), load(data, task)
    rows = {part: [labelled(tokens, row) for row in parts[part]] for part in parts}
    return {
        "rows": rows["train"],
        "tests": {"dev": {"labelled": rows["dev"]}, task.name: {"labelled": rows["test"]}},
        "steps": task.steps,
        "batch_size": task.batch_size,
    }


def labelled(tokens: TextTokens, row: Row) -> Labelled:
    text, label = parse_row(row)
    found = tokens(text)
    return list(found.ids), list(found.types), int(label)


def batches(study: dict[str, Any], seed: int) -> list[list[int]]:
    lengths = [len(ids) for ids, _, _ in study["rows"]]
    return drawn(seed, len(lengths), study["batch_size"], study["steps"], lengths)


def tokens_of(rows: Sequence[Labelled]) -> list[Tokens]:
    return [Tokens(tuple(ids), tuple(types)) for ids, types, _ in rows]


def trained(job: Job, encoder: Any, pooling: str, on_step: OnStep) -> Adapted:
    """The encoder with the adapter and the head that a job's training makes; `forward` gives `[rows, labels]`."""
    if job["library"] == "reft-edge":
        return _by_reft_edge(job, encoder, pooling, on_step)
    torch.manual_seed(job["seed"])
    head = nn.Linear(encoder.config.hidden_size, 2).to(device_of(encoder))
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    detach: Callable[[], object] = lambda: None  # noqa: E731
    if job["library"] == "peft":
        from peft import LoraConfig, get_peft_model

        detach = get_peft_model(encoder, LoraConfig(**job["settings"])).unload
    edits = [parameter for parameter in encoder.parameters() if parameter.requires_grad]

    def forward(rows: Sequence[Labelled]) -> Tensor:
        device = device_of(encoder)
        autocast = torch.is_autocast_enabled(device.type)
        pooled = pooled_states(encoder, tokens_of(rows), pooling, device, autocast)
        with torch.autocast(device.type, enabled=False):
            scores: Tensor = head(pooled)
        return scores

    adapted = Adapted(forward, encoder, [*edits, *head.parameters()], detach=detach)
    try:
        fit(adapted, job, on_step, labels_loss)
    except BaseException:
        detach()
        raise
    return adapted


def labels_loss(adapted: Adapted, rows: Sequence[Labelled]) -> Tensor:
    scores: Tensor = adapted.forward(rows)
    labels = torch.tensor([label for _, _, label in rows], device=scores.device)
    return nn.functional.cross_entropy(scores.float(), labels)


def _by_reft_edge(job: Job, encoder: Any, pooling: str, on_step: OnStep) -> Adapted:
    """What `reft-edge train --task classification` does."""
    rows = job["train"]["rows"]
    texts = zip(tokens_of(rows), (label for _, _, label in rows), strict=True)
    settings = TrainSettings(
        **{"start": "random"} | job["settings"],
        prompt_format="raw",
        pooling=pooling,
        lr=job["lr"],
        max_steps=len(job["train"]["batches"]),
        batch_size=len(job["train"]["batches"][0]),
        seed=job["seed"],
        dtype=job["dtype"],
        group_by_length=True,
    )
    device, adapter = device_of(encoder), Path(job["adapter"])
    train(
        encoder,
        Path(job["model"]).name,
        LabelledTexts([LabelledText(*text) for text in texts], ("0", "1"), ""),
        adapter,
        settings,
        save_every=settings.max_steps or 1,
        execution=Execution(str(device)),
        on_step=lambda step: on_step(step.loss),
    )
    interventions = Interventions.from_adapter(load_adapter(adapter)).eval().to(device)
    steering = Steering(encoder, [(interventions, 1.0)])

    def forward(rows: Sequence[Labelled]) -> Tensor:
        autocast = torch.is_autocast_enabled(device.type)
        with torch.autocast(device.type, enabled=False):
            return class_scores(encoder, interventions, tokens_of(rows), device, autocast)

    return Adapted(forward, encoder, list(interventions.parameters()), detach=steering.remove)


@torch.no_grad()
def answered(adapted: Adapted, rows: Sequence[Labelled], size: int, dtype: str) -> list[bool]:
    """Whether the likeliest label of each row is its own."""
    right = [False] * len(rows)
    ordered = sorted(range(len(rows)), key=lambda number: len(rows[number][0]))
    for start in range(0, len(ordered), size):
        numbers = ordered[start : start + size]
        with torch.autocast(device_of(adapted.model).type, torch.bfloat16, enabled=dtype == "bf16"):
            scores = adapted.forward([rows[number] for number in numbers])
        for number, label in zip(numbers, scores.argmax(1).tolist(), strict=True):
            right[number] = label == rows[number][2]
    return right
