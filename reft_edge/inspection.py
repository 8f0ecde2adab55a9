"""What an adapter learned: how strong its edits are and where, which subspaces it writes to, what it does to predictions."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from reft_edge.adapter import Adapter, AdapterConfig, folded_rows
from reft_edge.algebra import Array
from reft_edge.data import Example, encode_row
from reft_edge.encoders import TextTokens, Tokens, parse_row
from reft_edge.errors import ReftEdgeError
from reft_edge.jsonl import read_rows
from reft_edge.positions import active, group_names
from reft_edge.prompts import Prompts

EDGE = 16
"""Positions that are told apart at either end of a prompt, and of an answer."""
TOP = 12
"""Tokens gained, and lost, that are named."""
_ANSWER_TOKENS = 64
_MOST_PAIRS = 200_000
"""Pairs of subspaces, some seconds of work, above which a file's own layers are not compared: no known model comes near."""
_NEGLIGIBLE = 1e-6
_LEAST_SHIFT = 1e-4

Floats = NDArray[np.float64]
Row = TypeVar("Row")


@dataclass(frozen=True)
class Overlap:
    """How far subspaces coincide: mean squared cosines of their principal angles, 0 (orthogonal) to 1 (equal)."""

    name: str
    layers: tuple[int, ...]
    shared: Floats
    """`[layers, layers]` between an adapter's own layers, `[layers]` between two adapters."""
    smallest: Floats
    """The smallest principal angles, in degrees, shaped alike."""


@dataclass(frozen=True)
class Strength:
    """Of h + hAB + bB, by layer, for one position group."""

    name: str
    gains: Floats
    """Spectral norm of AB: by how much a part of h, at most, is changed."""
    constants: Floats
    """Length of bB, what is added to every h."""


@dataclass(frozen=True)
class TokenShift:
    """One token's mean probability as the answer's first."""

    text: str
    before: float
    after: float


@dataclass(frozen=True)
class Effect:
    """What the adapter does on rows of data; positions are named by `position`."""

    rows: int
    norms: dict[str, dict[int, float]] = field(default_factory=dict)
    """By position and layer: the edit's length over the hidden state's, mean over edited tokens."""
    divergence: dict[str, float] = field(default_factory=dict)
    """By position: KL(with adapter, without) of the next token, in nats, mean over tokens."""
    gained: list[TokenShift] = field(default_factory=list)
    lost: list[TokenShift] = field(default_factory=list)


@dataclass(frozen=True)
class Inspection:
    """Everything that a report shows."""

    name: str
    size: int
    """Bytes of the file."""
    config: AdapterConfig
    parameters: int
    strengths: list[Strength]
    overlaps: list[Overlap]
    """Between the layers of each position group; empty where they are too many to compare."""
    curve: list[tuple[int, float]]
    """Training loss at steps; empty if the file has none."""
    other: str = ""
    """The adapter that it was compared with."""
    between: Overlap | None = None
    effect: Effect | None = None


def inspect_adapter(
    adapter: Adapter,
    name: str,
    size: int,
    other: tuple[str, Adapter] | None = None,
    effect: Effect | None = None,
) -> Inspection:
    """Read all that the file alone tells, beside an `effect` that was measured. Raises ReftEdgeError for an `other` adapter of another base or other layers."""
    config = adapter.config
    # in float64, whose sums cannot overflow
    wide = {name: tensor.astype(np.float64) for name, tensor in adapter.tensors.items()}
    rows_a, bias, rows_b = folded_rows(config.intervention, wide)
    names = group_names(config.positions, config.tied)
    strengths = []
    if config.act_fn == "linear":
        gains = _gains(np.zeros_like(rows_b) if rows_a is None else rows_a, rows_b)
        constants = np.linalg.norm(np.einsum("lgr,lgrd->lgd", bias, rows_b), axis=-1)
        strengths = [Strength(names[g], gains[:, g], constants[:, g]) for g in range(len(names))]
    overlaps = []
    few = len(names) * len(config.layers) ** 2 <= _MOST_PAIRS
    for group, group_name in enumerate(names if few else ()):
        bases = [orthonormal(rows) for rows in rows_b[:, group]]
        pairs = [[_overlap(a, b) for b in bases] for a in bases]
        overlaps.append(Overlap(group_name, config.layers, *np.moveaxis(np.array(pairs), -1, 0)))
    return Inspection(
        name,
        size,
        config,
        adapter.num_parameters,
        strengths,
        overlaps,
        kept_curve(config.training),
        other[0] if other else "",
        _between(adapter, other[1]) if other else None,
        effect,
    )


def kept_curve(training: dict[str, Any]) -> list[tuple[int, float]]:
    """The loss curve in a file's description, if it holds a sound one."""
    curve = training.get("curve")
    if not isinstance(curve, list):
        return []
    points = [
        (int(point[0]), float(point[1]))
        for point in curve[:1000]
        if isinstance(point, list)
        and len(point) == 2
        and all(isinstance(number, int | float) and abs(number) < 1e12 for number in point)
    ]
    return sorted(points)


def orthonormal(rows: Array) -> Floats:
    """An orthonormal basis, `[rank, d]`, of the space that the rows span; directions of no weight are left out."""
    _, singular, basis = np.linalg.svd(rows.astype(np.float64), full_matrices=False)
    kept = singular > _NEGLIGIBLE * max(float(singular.max(initial=0)), float(np.finfo(np.float32).tiny))
    found: Floats = basis[kept]
    return found


def principal_angles(a: Floats, b: Floats) -> Floats:
    """Between two orthonormal bases, in degrees, ascending."""
    cosines = np.linalg.svd(a @ b.T, compute_uv=False)
    angles: Floats = np.degrees(np.arccos(np.clip(cosines, 0, 1)))
    return angles


def position(t: int, n: int) -> str:
    """The name of token `t` of a row whose prompt has `n`: "1" is the prompt's first, "-1" its last, "+1" the first
    generated one; "…" is the middle of a prompt, and what comes late in an answer."""
    if t >= n:
        return f"+{t - n + 1}" if t - n < EDGE else "+…"
    if t < n // 2:
        return str(t + 1) if t < EDGE else "…"
    return str(t - n) if n - t <= EDGE else "…"


def position_order(name: str) -> tuple[int, int]:
    """A sort key that puts position names in reading order."""
    if name == "…":
        return (1, 0)
    if name == "+…":
        return (4, 0)
    return (3 if name.startswith("+") else 2 if name.startswith("-") else 0, int(name))


def load_rows(path: Path, prompts: Prompts, prompt_format: str, limit: int) -> list[Example]:
    """The first rows of a file as prompt and, where a row has one, completion; of a preference, the chosen answer.

    Raises ReftEdgeError that names the line for rows without a prompt.
    """

    def parse(row: Any) -> Example:
        if isinstance(row, dict) and "chosen" in row:
            example = encode_row({**row, "completion": row["chosen"]}, prompts, prompt_format)
        elif isinstance(row, dict) and isinstance(row.get("prompt"), str) and "completion" not in row:
            example = Example(tuple(prompts.encode_prompt(row["prompt"], prompt_format)), ())
        else:
            example = encode_row(row, prompts, prompt_format)
        if not example.prompt:
            raise ReftEdgeError("the prompt is empty")
        return example

    return _first(path, limit, parse)


def load_texts(path: Path, tokens: TextTokens, limit: int) -> list[Tokens]:
    """The first texts, or pairs of texts, of a file, for an encoder; a label is not needed."""
    return _first(
        path,
        limit,
        lambda row: tokens(parse_row({"label": "", **row} if isinstance(row, dict) else row)[0]),
    )


def measure(
    model: Any,
    adapter: Adapter,
    rows: Sequence[Example] | Sequence[Tokens],
    prompts: Prompts | None,
    device: Any,
) -> Effect:
    """Run the PyTorch model on the rows, a decoder's or an encoder's, with the adapter and without.

    `prompts` names tokens; None for an encoder, which predicts none. Raises ReftEdgeError for an adapter of another base.
    """
    import torch

    from reft_edge.interventions import Interventions
    from reft_edge.likelihood import readable
    from reft_edge.torch_answers import check_bases

    check_bases(model, [(adapter, 1.0)])
    interventions = Interventions.from_adapter(adapter).to(device).eval()
    sums: dict[tuple[str, int], tuple[float, int]] = {}
    divergences: dict[str, tuple[float, int]] = {}
    before = after = torch.zeros(())
    with torch.no_grad(), _recorded(model.to(device).eval(), interventions) as (steering, edits):
        for row in rows:
            n, inputs = _inputs(model, row, device)
            names = [position(t, n) for t in range(inputs["input_ids"].shape[1])]
            with steering.prompts(torch.tensor([n], device=device)), readable(model, len(names)):
                output = model(**inputs)
            for layer, relative in edits.items():
                for t, name in enumerate(names):
                    if any(bool(active(span, t, n)) for span in adapter.config.spans):
                        total, count = sums.get((name, layer), (0.0, 0))
                        sums[name, layer] = (total + float(relative[t]), count + 1)
            if prompts is None:
                continue
            with steering.off():
                base = model(**inputs).logits[0].float().log_softmax(dim=-1)
            known = output.logits[0].float().log_softmax(dim=-1)
            shifts = (known.exp() * (known - base)).sum(dim=-1).clamp(min=0)
            for name, shift in zip(names, shifts.tolist(), strict=True):
                total, count = divergences.get(name, (0.0, 0))
                divergences[name] = (total + shift, count + 1)
            before = before + base[n - 1].exp() / len(rows)
            after = after + known[n - 1].exp() / len(rows)
    norms: dict[str, dict[int, float]] = {}
    for (name, layer), (total, count) in sums.items():
        norms.setdefault(name, {})[layer] = total / count
    gained, lost = _shifts(before, after, prompts) if prompts is not None else ([], [])
    ordered = sorted(divergences, key=position_order)
    return Effect(
        len(rows),
        {name: norms[name] for name in sorted(norms, key=position_order)},
        {name: divergences[name][0] / divergences[name][1] for name in ordered},
        gained,
        lost,
    )


def _inputs(model: Any, row: Example | Tokens, device: Any) -> tuple[int, dict[str, Any]]:
    """A row's prompt length and what the model reads of it; an encoder's whole text is the prompt."""
    import torch

    from reft_edge.encoders import has_token_types
    from reft_edge.likelihood import check_tokens

    if isinstance(row, Tokens):
        n, ids = len(row.ids), row.ids
    else:
        n, ids = len(row.prompt), row.prompt + row.completion[:_ANSWER_TOKENS][:-1]
    check_tokens(model, [ids])
    inputs = {"input_ids": torch.tensor([ids], device=device)}
    if isinstance(row, Tokens) and has_token_types(model):
        inputs["token_type_ids"] = torch.tensor([row.types], device=device)
    return n, inputs


def measure_on(
    model: str, adapter: Adapter, data: Path, limit: int, report: Callable[[str], None] = lambda message: None
) -> Effect:
    """`measure` with a model named as on the command line and the first `limit` rows of a file."""
    from reft_edge.encoders import is_encoder, load_encoder, load_text_tokens
    from reft_edge.models import load_model, load_model_prompts, resolve_model
    from reft_edge.training import torch_device

    folder = resolve_model(model, report)
    device = torch_device(None)
    if is_encoder(folder):
        texts = load_texts(data, load_text_tokens(folder), limit)
        return measure(load_encoder(folder), adapter, texts, None, device)
    prompts = load_model_prompts(folder)
    rows = load_rows(data, prompts, adapter.config.prompt_format, limit)
    return measure(load_model(folder), adapter, rows, prompts, device)


@contextmanager
def _recorded(model: Any, interventions: Any) -> Iterator[tuple[Any, dict[int, Any]]]:
    """Steering, and for every edited layer the relative length of the last pass's edits, `[tokens]`."""
    from reft_edge.steering import component_module, decoder_layers, steered

    blocks = decoder_layers(model)
    modules = {
        place.layer: component_module(blocks[place.layer], place.component)
        for place in interventions.config.places
    }
    plain: dict[int, Any] = {}
    edits: dict[int, Any] = {}

    def hidden(output: Any) -> Any:
        return (output[0] if isinstance(output, tuple) else output)[0].float()

    def note_plain(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            plain[layer] = hidden(output)

        return hook

    def note_edited(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            edit = (hidden(output) - plain[layer]).norm(dim=-1)
            edits[layer] = edit / plain.pop(layer).norm(dim=-1).clamp(min=1e-12)

        return hook

    handles = [module.register_forward_hook(note_plain(layer)) for layer, module in modules.items()]
    try:
        with steered(model, (interventions, 1.0)) as steering:
            handles += [module.register_forward_hook(note_edited(layer)) for layer, module in modules.items()]
            yield steering, edits
    finally:
        for handle in handles:
            handle.remove()


def _shifts(before: Any, after: Any, prompts: Prompts) -> tuple[list[TokenShift], list[TokenShift]]:
    change = after - before
    count = min(TOP, change.numel())

    def named(ids: list[int]) -> list[TokenShift]:
        return [TokenShift(_token(prompts, i), float(before[i]), float(after[i])) for i in ids]

    gained = [i for i in change.topk(count).indices.tolist() if change[i] > _LEAST_SHIFT]
    lost = [i for i in (-change).topk(count).indices.tolist() if change[i] < -_LEAST_SHIFT]
    return named(gained), named(lost)


def _token(prompts: Prompts, token: int) -> str:
    """Its text; where that is no whole character, the tokenizer's own name of it, and its id."""
    text = prompts.tokenizer.decode([token], skip_special_tokens=False)
    return text if text and "\ufffd" not in text else f"{prompts.tokenizer.id_to_token(token)}#{token}"


def _between(adapter: Adapter, other: Adapter) -> Overlap:
    bases = {(config.base_fingerprint, config.hidden_size) for config in (adapter.config, other.config)}
    if len(bases) > 1:
        raise ReftEdgeError(
            f"the two adapters have other base models, {adapter.config.base_name} and {other.config.base_name}; "
            "subspaces of unlike models cannot be compared"
        )
    layers = tuple(sorted(set(adapter.config.layers) & set(other.config.layers)))
    if not layers:
        raise ReftEdgeError("the two adapters have no layer in common")

    def basis(of: Adapter, layer: int) -> Floats:
        rows = folded_rows(of.config.intervention, of.tensors)[2][of.config.layers.index(layer)]
        return orthonormal(rows.reshape(-1, rows.shape[-1]))

    found = np.array([_overlap(basis(adapter, layer), basis(other, layer)) for layer in layers])
    return Overlap("all positions", layers, found[:, 0], found[:, 1])


def _overlap(a: Floats, b: Floats) -> tuple[float, float]:
    if not len(a) or not len(b):
        return 0.0, 90.0
    angles = principal_angles(a, b)
    return float((np.cos(np.radians(angles)) ** 2).mean()), float(angles[0])


def _gains(rows_a: Array, rows_b: Array) -> Floats:
    """Spectral norms of AB, `[L, G]`, from the small factors of Aᵀ and B."""
    small_a, small_b = (
        np.asarray(np.linalg.qr(rows.astype(np.float64).swapaxes(-1, -2))[1]) for rows in (rows_a, rows_b)
    )
    norms: Floats = np.linalg.norm(small_a @ small_b.swapaxes(-1, -2), ord=2, axis=(-2, -1))
    return norms


def _first(path: Path, limit: int, parse: Callable[[Any], Row]) -> list[Row]:
    rows = [row for _, row in islice(read_rows(path, parse), limit)]
    if not rows:
        raise ReftEdgeError(f"{path} has no rows")
    return rows
