"""One training or one test of table.py, in the environment of the method's library.

    python worker.py JOB.json RESULT.json

A job holds token ids: the rows of every step, in order, with the step's learning rate, and the questions to score. So
every library sees the same batches under the same schedule, and one piece of code asks all of them the same questions.
reft-edge trains by its own loop on the same ids; it draws the same rows by itself. pyreft and
PEFT train by `fit`: AdamW without weight decay, gradients clipped to norm 1, the mean loss of the completions' tokens.
Each library is imported only in its own environment.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Job = dict[str, Any]
OnStep = Callable[[float], None]
IGNORED = -100
"""What transformers calls a token without a loss."""


@dataclass(frozen=True)
class Batch:
    """Token ids, `[batch, sequence]`, their mask, and where each row's prompt starts and ends."""

    ids: Tensor
    mask: Tensor
    starts: list[int]
    ends: list[int]


@dataclass(frozen=True)
class Adapted:
    """A model with its adapter."""

    forward: Callable[..., Any]
    """Of a Batch and a model's keyword arguments; gives the model's output."""
    model: Any
    """What continues behind a prompt that `forward` has read."""
    parameters: list[nn.Parameter]
    save: Callable[[Path], None] = lambda path: None
    detach: Callable[[], object] = lambda: None
    """Gives the base model back as it was."""


def device_of(model: Any) -> torch.device:
    found: torch.device = next(model.parameters()).device
    return found


def base_model(job: Job) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(job["model"], trust_remote_code=False)
    rope = getattr(config, "rope_parameters", None)
    if int(transformers.__version__.split(".")[0]) < 5 and rope:
        config.rope_theta = rope["rope_theta"]  # transformers 5 writes it where 4 does not look
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], config=config, torch_dtype=torch.float32, trust_remote_code=False
    )
    return model.to(job.get("device", "cpu")).eval().requires_grad_(False)


def plain(model: Any) -> Callable[..., Any]:
    return lambda batch, **more: model(input_ids=batch.ids, attention_mask=batch.mask, **more)


def open_base(job: Job, base: Any) -> Adapted:
    return Adapted(plain(base), base, [])


def open_peft(job: Job, base: Any) -> Adapted:
    from peft import LoraConfig, PeftModel, get_peft_model

    if job["train"]:
        torch.manual_seed(job["seed"])
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **job["settings"]))
    else:
        model = PeftModel.from_pretrained(base, job["adapter"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Adapted(plain(model), model, trained, model.save_pretrained, model.unload)


def open_pyreft(job: Job, model: Any) -> Adapted:
    import pyreft

    settings = job["settings"]
    torch.manual_seed(job["seed"])
    layers, size = model.config.num_hidden_layers, model.config.hidden_size
    copies = 1 if settings["tied"] else 2
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": settings["rank"],
            "intervention": pyreft.LoreftIntervention(
                embed_dim=size, low_rank_dimension=settings["rank"], dtype=torch.float32
            ),
        }
        for _ in range(copies)
        for layer in range(layers)
    ]
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations))
    if settings.get("completion") == "reflections":
        for intervention in reft.interventions.values():
            complete_by_reflections(intervention.rotate_layer.parametrizations.weight)
    first, last = settings["first"], settings["last"]

    def forward(batch: Batch, **more: Any) -> Any:
        bounds = list(zip(batch.starts, batch.ends, strict=True))
        if any(end - start < 2 * max(first, last) for start, end in bounds):
            raise ValueError("a prompt is shorter than the positions: pyreft takes as many of every row")
        prefix = [[*range(start, start + first)] for start, _ in bounds]
        suffix = [[*range(end - last, end)] for _, end in bounds]
        if settings["tied"]:
            locations = [[a + b for a, b in zip(prefix, suffix, strict=True)]] * layers
        else:
            locations = [prefix] * layers + [suffix] * layers
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, **more}
        return reft(inputs, unit_locations={"sources->base": (None, locations)})[1]

    return Adapted(forward, model, reft.get_trainable_parameters(), lambda path: reft.save(str(path)))


@torch.no_grad()
def complete_by_reflections(rotation: Any) -> None:
    """Another start for the parameters of the same R, `[d, r]`: torch's `orthogonal` trains reflections in the coordinates
    of an orthogonal matrix that begins with R; torch draws its other columns at random, here they are those of R's QR
    decomposition, the unit vectors moved by r reflections.
    """
    start = rotation[0].base[:, : rotation.original.shape[1]].clone()
    whole = torch.linalg.qr(start, mode="complete").Q
    whole[:, : start.shape[1]] = start
    rotation[0].base.copy_(whole)
    rotation.original.copy_(-torch.eye(*rotation.original.shape))


def open_reft_edge(job: Job, model: Any) -> Adapted:
    from reft_edge.adapter.file import load_adapter
    from reft_edge.steering.hooks import Steering
    from reft_edge.steering.interventions import Interventions

    interventions = Interventions.from_adapter(load_adapter(Path(job["adapter"]))).eval().to(device_of(model))
    steering = Steering(model, [(interventions, 1.0)])

    def forward(batch: Batch, **more: Any) -> Any:
        lengths = [end - start for start, end in zip(batch.starts, batch.ends, strict=True)]
        with steering.prompts(torch.tensor(lengths)):
            return model(input_ids=batch.ids, attention_mask=batch.mask, **more)

    return Adapted(forward, model, list(interventions.parameters()), detach=steering.remove)


def train_reft_edge(job: Job, model: Any, on_step: OnStep) -> None:
    """What `reft-edge train` does."""
    from reft_edge.training.data import Dataset
    from reft_edge.training.run import train
    from reft_edge.training.settings import Execution, TrainSettings
    from reft_edge.training.turns import Example

    given = {"start": "random"} | job["settings"]
    if "first" in given:
        given["positions"] = f"f{given.pop('first')}+l{given.pop('last')}"
    settings = TrainSettings(
        **given,
        prompt_format="raw",
        lr=job["lr"],
        max_steps=len(job["train"]["batches"]),
        batch_size=len(job["train"]["batches"][0]),
        seed=job["seed"],
        dtype=job["dtype"],
    )
    rows = [Example(tuple(prompt), tuple(behind)) for prompt, behind in job["train"]["rows"]]
    device = device_of(model)
    # the ideas that leave work out are exact, and more kernels: a GPU waits for those
    ideas = (
        {} if device.type == "cpu" else {"shared_prefix": False, "needed_tokens": False, "frozen_cache": 0}
    )
    train(
        model,
        Path(job["model"]).name,
        Dataset(rows, 0, ""),
        Path(job["adapter"]),
        settings,
        save_every=len(job["train"]["batches"]),
        execution=Execution(str(device), **ideas),
        on_step=lambda step: on_step(step.loss),
    )


def completions_loss(adapted: Adapted, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
    """`rows`: a prompt and its completion, as token ids."""
    batch = right_padded(rows, device_of(adapted.model))
    labels = torch.where(batch.mask.bool(), batch.ids, IGNORED)
    for row, end in zip(labels, batch.ends, strict=True):
        row[:end] = IGNORED
    loss: Tensor = adapted.forward(batch, labels=labels).loss
    return loss


def fit(
    adapted: Adapted,
    job: Job,
    on_step: OnStep,
    loss_of: Callable[[Adapted, Sequence[Any]], Tensor] = completions_loss,
) -> None:
    rows, device = job["train"]["rows"], device_of(adapted.model)
    optimizer = torch.optim.AdamW(adapted.parameters, weight_decay=0.0)
    for numbers, rate in zip(job["train"]["batches"], job["train"]["rates"], strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16, enabled=job["dtype"] == "bf16"):
            loss = loss_of(adapted, [rows[number] for number in numbers])
        loss.backward()
        nn.utils.clip_grad_norm_(adapted.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        on_step(loss.item())


def right_padded(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device | None = None
) -> Batch:
    """`rows`: a prompt and what follows it."""
    length = max(len(prompt) + len(behind) for prompt, behind in rows)
    ids, mask = torch.zeros(2, len(rows), length, dtype=torch.long).unbind()
    for i, (prompt, behind) in enumerate(rows):
        tokens = torch.tensor([*prompt, *behind])
        ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
    return Batch(ids.to(device), mask.to(device), [0] * len(rows), [len(prompt) for prompt, _ in rows])


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device | None = None) -> Batch:
    length = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(prompts), length, dtype=torch.long).unbind()
    for i, prompt in enumerate(prompts):
        ids[i, length - len(prompt) :], mask[i, length - len(prompt) :] = torch.tensor(prompt), 1
    starts = [length - len(prompt) for prompt in prompts]
    return Batch(ids.to(device), mask.to(device), starts, [length] * len(prompts))


@torch.no_grad()
def mean_likelihoods(
    adapted: Adapted, questions: Sequence[dict[str, Any]], size: int = 16
) -> list[list[float]]:
    """Of each question's options, the mean log-likelihood a token, in nats.

    Options that differ in their last token only are one pass.
    """
    device = device_of(adapted.model)
    passes: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for number, question in enumerate(questions):
        for choice, option in enumerate(question["options"]):
            passes.setdefault((number, tuple(option[:-1])), []).append(choice)
    ordered = sorted(passes, key=lambda key: len(questions[key[0]]["prompt"]) + len(key[1]))
    found = [[0.0] * len(question["options"]) for question in questions]
    for start in range(0, len(ordered), size):
        keys = ordered[start : start + size]
        batch = right_padded([(questions[number]["prompt"], shared) for number, shared in keys], device)
        wanted = torch.zeros(batch.mask.shape, dtype=torch.bool)
        for i, (end, (_, shared)) in enumerate(zip(batch.ends, keys, strict=True)):
            wanted[i, end - 1 : end + len(shared)] = True
        with only_logits_of(adapted.model, wanted.to(device)):
            logits = adapted.forward(batch, use_cache=False).logits[0].float()
        lasts = [
            [questions[number]["options"][choice][-1] for choice in passes[number, shared]]
            for number, shared in keys
        ]
        asked = [
            [[token] for token in shared] + [last] for (_, shared), last in zip(keys, lasts, strict=True)
        ]
        width = max(map(len, lasts))
        tokens = [row + row[:1] * (width - len(row)) for rows in asked for row in rows]
        known = logits.log_softmax(-1).gather(1, torch.tensor(tokens, device=device)).tolist()
        for number, shared in keys:
            mine, known = known[: 1 + len(shared)], known[1 + len(shared) :]
            before = sum(row[0] for row in mine[:-1])
            for choice, last in zip(passes[number, shared], mine[-1], strict=False):
                found[number][choice] = (before + last) / (1 + len(shared))
    return found


@contextmanager
def only_logits_of(model: Any, wanted: Tensor) -> Iterator[None]:
    """Inside the block the language-model head sees only these tokens, as one row; not by a hook, which pyvene drops."""
    head = model.get_output_embeddings()
    whole = head.forward
    head.forward = lambda hidden: whole(hidden[wanted][None])
    try:
        yield
    finally:
        head.forward = whole


@torch.no_grad()
def greedy(adapted: Adapted, asked: dict[str, Any], size: int = 25) -> list[list[int]]:
    """The greedy answer to each prompt, up to a token that ends it or `max_tokens`."""
    prompts, ends, device = asked["prompts"], set(asked["ends"]), device_of(adapted.model)
    answers: list[list[int]] = [[] for _ in prompts]
    ordered = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for start in range(0, len(ordered), size):
        numbers = ordered[start : start + size]
        batch = left_padded([prompts[number] for number in numbers], device)
        mask, running = batch.mask, [True] * len(numbers)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        last = torch.zeros(mask.shape, dtype=torch.bool, device=device)
        last[:, -1] = True
        with only_logits_of(adapted.model, last):
            output = adapted.forward(batch, position_ids=positions, use_cache=True)
        logits = output.logits[0]
        for _ in range(asked["max_tokens"]):
            tokens = logits.argmax(-1)
            for i, token in enumerate(tokens.tolist()):
                running[i] = running[i] and token not in ends
                if running[i]:
                    answers[numbers[i]].append(token)
            if not any(running):
                break
            mask = torch.cat([mask, mask.new_ones(len(numbers), 1)], 1)
            output = adapted.model(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            logits = output.logits[:, -1]
    return answers


OPEN = {"base": open_base, "peft": open_peft, "pyreft": open_pyreft, "reft-edge": open_reft_edge}


def size_of(path: Path) -> int:
    """Bytes of a file, or of a folder's files."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def trained(job: Job, model: Any, on_step: OnStep) -> Adapted:
    """The base with the adapter that a job's training makes."""
    library, path = job["library"], Path(job["adapter"])
    if library == "reft-edge":
        train_reft_edge(job, model, on_step)
        return open_reft_edge(job, model)
    adapted = OPEN[library](job, model)
    try:
        adapted.model.train()
        fit(adapted, job, on_step)
        adapted.model.eval()
        adapted.save(path)
    except BaseException:
        adapted.detach()
        raise
    return adapted


def run(job: Job) -> dict[str, Any]:
    torch.set_num_threads(job["threads"])
    losses: list[float] = []
    seconds: list[float] = []
    started = time.perf_counter()

    def on_step(loss: float) -> None:
        nonlocal started
        losses.append(loss)
        seconds.append(time.perf_counter() - started)
        if len(losses) % 10 == 0:
            print(f"step {len(losses)}: loss {loss:.4f}, {seconds[-1]:.2f} s", file=sys.stderr, flush=True)
        if job["paced"]:  # one step for each line of standard input
            print(seconds[-1], flush=True)
            sys.stdin.readline()
        started = time.perf_counter()

    model = base_model(job)
    result: dict[str, Any] = {}
    if job["train"]:
        adapted = trained(job, model, on_step)
        result = {
            "losses": losses,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "parameters": sum(parameter.numel() for parameter in adapted.parameters),
            "bytes": size_of(Path(job["adapter"])),
        }
    else:
        adapted = OPEN[job["library"]](job, model)
    for name, questions in job["questions"].items():
        result[name] = mean_likelihoods(adapted, questions)
    if job["asked"]:
        result["answers"] = greedy(adapted, job["asked"])
    return result


def main() -> None:
    job, result = map(Path, sys.argv[1:])
    found = run(json.loads(job.read_text(encoding="utf-8")))
    result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
