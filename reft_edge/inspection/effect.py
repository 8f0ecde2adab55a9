"""What an adapter learned: how strong its edits are and where, which subspaces it writes to, what it does to predictions."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from reft_edge.adapter.config import Adapter
from reft_edge.adapter.positions import active
from reft_edge.errors import ReftEdgeError
from reft_edge.inspection.weights import Effect, TokenShift
from reft_edge.model.prompts import Prompts, decode
from reft_edge.model.texts import TextTokens, Tokens, parse_row
from reft_edge.rows.reading import read_rows
from reft_edge.rows.shapes import (
    ALPACA,
    MESSAGES,
    PAIRS,
    SHAREGPT,
    Recogniser,
    Shape,
    as_completion,
    as_pair,
)
from reft_edge.rows.source import RowSource
from reft_edge.training.turns import Example, encode_row

EDGE = 16
"""Positions that are told apart at either end of a prompt, and of an answer."""
TOP = 12
"""Tokens gained, and lost, that are named."""
_ANSWER_TOKENS = 64


_LEAST_SHIFT = 1e-4


Row = TypeVar("Row")
Report = Callable[[str], None]

_PROMPTS = Shape("prompts", ("prompt", "completion", "tools"), ("completion", "tools"))
_TEXTS = Shape("texts", ("text", "text2", "label"), ("text2", "label"))


def _silent(message: str) -> None:
    return None


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


def load_rows(
    source: RowSource, prompts: Prompts, prompt_format: str, limit: int, report: Report = _silent
) -> list[Example]:
    """The first rows as prompt and, where a row has one, completion: of a conversation its last answer, of a preference the
    chosen one.

    Raises ReftEdgeError that names the line for rows without a prompt.
    """

    def parse(shape: Shape, row: dict[str, Any]) -> Example:
        if shape is PAIRS:
            return encode_row(as_pair(row)[0], prompts, prompt_format)
        if shape is _PROMPTS and row.get("completion") is None:
            prompt = row["prompt"]
            chat = isinstance(prompt, list)
            ids = prompts.encode_chat(prompt) if chat else prompts.encode_prompt(prompt, prompt_format)
            if not ids:
                raise ReftEdgeError("the prompt is empty")
            return Example(tuple(ids), ())
        plain, start = as_completion(shape, row)
        return encode_row(plain, prompts, prompt_format, start)

    return _first(source, limit, (MESSAGES, SHAREGPT, PAIRS, ALPACA, _PROMPTS), parse, report)


def load_texts(source: RowSource, tokens: TextTokens, limit: int, report: Report = _silent) -> list[Tokens]:
    """The first texts, or pairs of texts, for an encoder; a label is not needed."""
    return _first(
        source, limit, (_TEXTS,), lambda shape, row: tokens(parse_row({**row, "label": ""})[0]), report
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

    from reft_edge.steering.hooks import check_bases
    from reft_edge.steering.interventions import Interventions
    from reft_edge.steering.likelihood import readable

    check_bases(model, [(adapter, 1.0)])
    interventions = Interventions.from_adapter(adapter).to(device).eval()
    sums: dict[tuple[str, int], tuple[float, int]] = {}
    divergences: dict[str, tuple[float, int]] = {}
    before = after = torch.zeros(())
    with torch.no_grad(), _recorded(model.to(device).eval(), interventions) as (steering, edits):
        for row in rows:
            n, inputs = _inputs(model, row, device)
            names = [position(t, n) for t in range(inputs["input_ids"].shape[1])]
            starts = [span.start(inputs["input_ids"][0, :n].tolist()) for span in adapter.config.spans]
            with steering.prompts(torch.tensor([n], device=device)), readable(model, len(names)):
                output = model(**inputs)
            for layer, relative in edits.items():
                for t, name in enumerate(names):
                    gates = zip(adapter.config.spans, starts, strict=True)
                    if any(bool(active(span, t, n, start)) for span, start in gates):
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

    from reft_edge.model.encoders import has_token_types
    from reft_edge.steering.likelihood import check_tokens

    if isinstance(row, Tokens):
        n, ids = len(row.ids), row.ids
    else:
        n, ids = len(row.prompt), row.prompt + row.completion[:_ANSWER_TOKENS][:-1]
    check_tokens(model, [ids])
    inputs = {"input_ids": torch.tensor([ids], device=device)}
    if isinstance(row, Tokens) and has_token_types(model):
        inputs["token_type_ids"] = torch.tensor([row.types], device=device)
    return n, inputs


def measure_on(model: str, adapter: Adapter, data: RowSource, limit: int, report: Report = _silent) -> Effect:
    """`measure` with a model named as on the command line and the first `limit` rows of a source."""
    from reft_edge.model.device import torch_device
    from reft_edge.model.encoders import is_encoder, load_encoder, load_text_tokens
    from reft_edge.model.loading import load_model, load_model_prompts
    from reft_edge.model.source import resolve_model

    folder = resolve_model(model, report)
    device = torch_device(None)
    if is_encoder(folder):
        texts = load_texts(data, load_text_tokens(folder), limit, report)
        return measure(load_encoder(folder), adapter, texts, None, device)
    prompts = load_model_prompts(folder)
    rows = load_rows(data, prompts, adapter.config.prompt_format, limit, report)
    return measure(load_model(folder), adapter, rows, prompts, device)


@contextmanager
def _recorded(model: Any, interventions: Any) -> Iterator[tuple[Any, dict[int, Any]]]:
    """Steering, and for every edited layer the relative length of the last pass's edits, `[tokens]`."""
    from reft_edge.model.blocks import component_module, decoder_layers
    from reft_edge.steering.hooks import steered

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
    text = decode(prompts.tokenizer, [token], special_tokens=True)
    return text if text and "\ufffd" not in text else f"{prompts.tokenizer.id_to_token(token)}#{token}"


def _first(
    source: RowSource,
    limit: int,
    known: Sequence[Shape],
    parse: Callable[[Shape, dict[str, Any]], Row],
    report: Report,
) -> list[Row]:
    recogniser = Recogniser(known)
    found = read_rows(source, lambda row: parse(recogniser(row), row))
    rows = [row for _, row in islice(found, limit)]
    if not rows:
        raise ReftEdgeError(f"{source} has no rows")
    report(str(recogniser.recognised(source)))
    return rows
