"""Accuracy on a JSONL task: rows to questions, answers to right or wrong, a bootstrap interval, two runs side by side.

Kinds of rows and how each is answered (`TASKS`):

    choice   {"prompt", "choices": [...], "answer": index or text}: the likeliest choice, by its mean log-likelihood a
             token or by the sum. Also {"prompt", "answer"} whose prompt says `Answer format: a/b`; the choices are then
             "the correct answer is a" and so on.
    number   {"prompt", "answer"}: the last number of a generated text, right within 0.001 (GSM8K, SVAMP, AddSub)
    answer   {"prompt", "answer"}: what a generated text says after "the correct answer is", or, where the prompt says
             `Answer format: a/b`, the first of these names (ARC, BoolQ)
    label    {"text", "label"}: the label of an encoder's head, or the likeliest label word of a decoder

The rules for generated text are those of LLM-Adapters and of pyreft's examples (`examples/loreft/compute_metrics.py`).
Needs neither torch nor transformers: whatever answers is a `Decoder` or a `Classifier`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_edge.adapter.config import Adapter
from reft_edge.errors import ReftEdgeError
from reft_edge.evaluation.answering import Decoder, Item, OnDone, evaluate_classifier, evaluate_decoder
from reft_edge.evaluation.results import Evaluation, check_seed
from reft_edge.evaluation.tasks import Questions, as_prompts
from reft_edge.model.manifest import MANIFEST
from reft_edge.model.prompts import choose_format
from reft_edge.signing.keys import TrustedKeys
from reft_edge.signing.signatures import load_verified

if TYPE_CHECKING:
    from reft_edge.model.source import ModelFolder


@dataclass(frozen=True)
class EvalSettings:
    """How questions are answered."""

    raw: bool | None = None
    """Prompts as they stand; None does what the adapters were trained with."""
    template: str = "{text}"
    words: dict[str, str] = dataclasses.field(default_factory=dict)
    batch_size: int = 8
    max_tokens: int | None = None
    normalise: bool = True
    seed: int = 0
    device: str | None = None
    dtype: str = "fp32"
    threads: int | None = None
    trusted: TrustedKeys | None = None
    """Only adapters that one of these keys signed are used."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_tokens", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ReftEdgeError(f"{name} is {value}; expected 1 or more")
        check_seed(self.seed)


def evaluate_folder(
    folder: Path,
    questions: Questions,
    adapters: Sequence[tuple[Path, float]],
    settings: EvalSettings,
    on_done: OnDone = lambda count: None,
) -> Evaluation:
    """Answer with an exported folder in ONNX Runtime; neither torch nor transformers is imported.

    Raises ReftEdgeError for a folder, adapters or questions that do not go together.
    """
    from reft_edge.evaluation.onnx_answers import OnnxClassifier, OnnxDecoder
    from reft_edge.model.manifest import load_manifest
    from reft_edge.runtime import SteeredEncoder, SteeredModel

    device = settings.device or "auto"
    if load_manifest(folder).kind == "encoder":
        encoder = SteeredEncoder(folder, device, settings.threads, settings.trusted)
        path, scale = _only(adapters)
        classifier = OnnxClassifier(encoder, encoder.load_adapter(path), scale)
        return evaluate_classifier(classifier, questions, settings.batch_size, settings.seed, on_done)
    model = SteeredModel(folder, device, settings.threads, settings.trusted)
    scales = {
        model.load_adapter(path, name=f"{number}:{path}"): scale
        for number, (path, scale) in enumerate(adapters)
    }
    formats = [config.prompt_format for config in model.adapters.values()]
    decoder = OnnxDecoder(
        model, scales, choose_format(settings.raw, formats, model.prompts.template is not None)
    )
    return _evaluate_decoder(decoder, questions, settings, on_done)


def evaluate_any(
    model: str,
    questions: Questions,
    adapters: Sequence[tuple[Path, float]],
    settings: EvalSettings,
    on_done: OnDone = lambda count: None,
    report: Callable[[str], None] = lambda message: None,
) -> Evaluation:
    """Answer with an exported folder or a PyTorch model, whichever `model` names."""
    if (Path(model) / MANIFEST).is_file():
        return evaluate_folder(Path(model), questions, adapters, settings, on_done)
    return evaluate_model(model, questions, adapters, settings, on_done, report)


def evaluate_model(
    model: str,
    questions: Questions,
    adapters: Sequence[tuple[Path, float]],
    settings: EvalSettings,
    on_done: OnDone = lambda count: None,
    report: Callable[[str], None] = lambda message: None,
) -> Evaluation:
    """Answer with a PyTorch model, named as on the command line.

    Raises ReftEdgeError for a model, adapters or questions that do not go together.
    """
    import torch

    from reft_edge.model.encoders import load_network
    from reft_edge.model.source import resolve_model

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    folder = resolve_model(model, report)
    loaded = [(load_verified(path, settings.trusted)[0], scale) for path, scale in adapters]
    network = load_network(folder)
    return evaluate_loaded(folder, network, questions, loaded, settings, on_done)


def evaluate_loaded(
    folder: "ModelFolder",
    model: Any,
    questions: Questions,
    adapters: Sequence[tuple[Adapter, float]],
    settings: EvalSettings,
    on_done: OnDone = lambda count: None,
) -> Evaluation:
    """Answer with a PyTorch model that was loaded from `folder`, a decoder or an encoder.

    Raises ReftEdgeError for adapters or questions that do not go together with it.
    """
    import torch

    from reft_edge.evaluation.torch_answers import torch_classifier, torch_decoder
    from reft_edge.model.device import chosen_dtype, torch_device
    from reft_edge.model.encoders import is_encoder, load_text_tokens
    from reft_edge.model.loading import load_model_prompts

    device = torch_device(settings.device)
    autocast = chosen_dtype(settings.dtype, device) == torch.bfloat16
    if is_encoder(folder):
        with torch_classifier(
            model, load_text_tokens(folder), *_only(adapters), device, autocast
        ) as classifier:
            return evaluate_classifier(classifier, questions, settings.batch_size, settings.seed, on_done)
    prompts = load_model_prompts(folder)
    formats = [adapter.config.prompt_format for adapter, _ in adapters]
    prompt_format = choose_format(settings.raw, formats, prompts.template is not None)
    with torch_decoder(model, prompts, prompt_format, adapters, device, autocast) as decoder:
        return _evaluate_decoder(decoder, questions, settings, on_done)


def _evaluate_decoder(
    decoder: Decoder, questions: Questions, settings: EvalSettings, on_done: OnDone
) -> Evaluation:
    prompted = as_prompts(questions, settings.template, settings.words)
    return evaluate_decoder(
        decoder,
        prompted,
        settings.batch_size,
        settings.max_tokens,
        settings.normalise,
        settings.seed,
        on_done,
    )


def _only(adapters: Sequence[Item]) -> Item:
    if len(adapters) != 1:
        raise ReftEdgeError(f"an encoder classifies with one --adapter; {len(adapters)} were given")
    return adapters[0]
