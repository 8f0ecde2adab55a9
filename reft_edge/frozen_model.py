"""A base model in PyTorch as notebooks use it: load it, ask it, steer it, hand it to a trainer."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_edge.arguments import AdapterFile, Report, checked, scaled, silent, trusted_keys
from reft_edge.errors import ReftEdgeError
from reft_edge.extras import extra

if TYPE_CHECKING:
    from reft_edge.adapter.config import Adapter
    from reft_edge.evaluation.torch_answers import TorchClassifier, TorchDecoder
    from reft_edge.model.prompts import Message, Prompts
    from reft_edge.model.source import ModelFolder
    from reft_edge.model.texts import Text


@dataclass(eq=False)
class FrozenModel:
    """A base model in PyTorch, with its tokenizer and chat template; `reft_edge.load` makes one.

    >>> base = reft_edge.load("smollm2")
    >>> base.name, base.model.config.hidden_size > 0
    (..., True)
    >>> answer = base.generate([{"role": "user", "content": "Who are you?"}], max_tokens=8)
    """

    model: Any
    """The model of transformers, in evaluation mode, float32, its parameters frozen."""
    folder: "ModelFolder"
    """Where it was loaded from, in the Hugging Face layout."""
    prompts: "Prompts"
    device: str
    """A torch device, such as `cpu` or `cuda:0`."""
    dtype: str
    """Of its arithmetic: fp32, bf16 or auto."""
    _steered: "TorchDecoder | TorchClassifier | None" = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """For people: what was asked for, without folders."""
        return self.folder.name

    @checked
    def generate(
        self, prompt: "str | Sequence[Message]", max_tokens: int = 256, raw: bool | None = None
    ) -> str:
        """The greedy answer, special tokens left out; inside `reft_edge.steered`, with the adapters.

        `prompt`: a user message, or a list of {"role", "content"}. `max_tokens`: at most that many new tokens; fewer if the
        model's context ends before. `raw`: True takes a text as it stands, False puts it through the chat template, None
        does what the adapters were trained with (without an adapter: the template, if there is one).

        Raises ReftEdgeError for an encoder, an empty prompt, or one that leaves no room in the context.
        """
        from reft_edge.evaluation.torch_answers import TorchDecoder
        from reft_edge.model.encoders import is_encoder

        if is_encoder(self.folder):
            raise ReftEdgeError(f"{self.name} is an encoder, which generates no text; see classify")
        if max_tokens < 1:
            raise ReftEdgeError(f"max_tokens is {max_tokens}; expected 1 or more")
        if self._steered is not None:
            assert isinstance(self._steered, TorchDecoder)
            return self._generate(self._steered, prompt, max_tokens, raw)
        with self._answering([]) as decoder:
            return self._generate(decoder, prompt, max_tokens, raw)

    def _generate(
        self, decoder: "TorchDecoder", prompt: "str | Sequence[Message]", max_tokens: int, raw: bool | None
    ) -> str:
        if isinstance(prompt, str):
            form = decoder.prompt_format if raw is None else "raw" if raw else "chat"
            ids = self.prompts.encode_prompt(prompt, form)
        elif raw:
            raise ReftEdgeError("messages need the chat template; with raw=True give a text")
        else:
            ids = self.prompts.encode_chat(prompt)
        room = decoder.context_length - len(ids)
        if not ids or room < 1:
            raise ReftEdgeError(
                f"the prompt has {len(ids)} tokens; expected 1 to {decoder.context_length - 1}, so that there is room for "
                "an answer in the model's context"
            )
        (answer,) = decoder.generate([ids], min(max_tokens, room))
        return self.prompts.decode(answer)

    def classify(self, text: "Text") -> dict[str, float]:
        """The probability of every label for a text or a pair of texts; they sum to 1.

        Only inside `reft_edge.steered`, with an encoder and one adapter that has a classification head; else raises
        ReftEdgeError.
        """
        from reft_edge.evaluation.torch_answers import TorchClassifier

        if not isinstance(self._steered, TorchClassifier):
            raise ReftEdgeError(
                "to classify, load an encoder and steer it with an adapter that has a classification head"
            )
        return self._steered.probabilities([text])[0]

    @checked
    @extra("train")
    def trainable(
        self,
        adapter: str | Path | None = None,
        *,
        intervention: str | None = None,
        layers: str | int | Sequence[int] | None = None,
        rank: int | None = None,
        positions: str | None = None,
        component: str | None = None,
        tied: bool | None = None,
        act_fn: str | None = None,
        add_bias: bool | None = None,
        dropout: float = 0.0,
        seed: int | None = None,
        raw: bool = False,
    ) -> Any:
        """The model with new interventions as one module: the `model` of `transformers.Trainer` and of TRL's trainers.

        Only interventions take gradients; the base itself answers as before. The arguments are those of
        `reft_edge.train`, with its defaults. `adapter`: a file, or a folder that `save_pretrained` wrote, to be trained
        further; only `dropout` goes with it. `raw`: say so where the rows do not go through the chat template.

        The prompt of a row ends before its first label that is not -100, or where a column `prompt_lengths` says, in
        tokens; in `generate` it is what was given. Rows may be padded on either side. `save_pretrained(folder)` writes
        `adapter.safetensors`. As DPO's reference give `base.model`.

        Raises ReftEdgeError for an encoder, and for what the model cannot have; so does the module for packed rows, and
        in training for a batch that does not tell where prompts end.

        >>> base = reft_edge.load("smollm2")
        >>> module = base.trainable(rank=2, positions="f3+l3")
        >>> module.save_pretrained("trained")
        >>> with reft_edge.steered(base, "trained/adapter.safetensors"):
        ...     answer = base.generate("Who are you?", max_tokens=8)
        """
        from reft_edge.model.encoders import is_encoder
        from reft_edge.training.trainable import interventions_of, new_interventions, trainable
        from reft_edge.training.triggers import tokenised

        self.check_free()
        if is_encoder(self.folder):
            raise ReftEdgeError(f"{self.name} is an encoder; train its adapters with reft_edge.train")
        settings = {
            "intervention": intervention,
            "layers": layers,
            "rank": rank,
            "positions": positions,
            "component": component,
            "tied": tied,
            "act_fn": act_fn,
            "add_bias": add_bias,
            "seed": seed,
        }
        if adapter is None:
            form = "raw" if raw or self.prompts.template is None else "chat"
            if positions is not None:
                settings["positions"] = tokenised(positions, self.prompts)
            new = new_interventions(self.model, self.name, {**settings, "dropout": dropout}, form)
            return trainable(self.model, new)
        if given := [name for name, value in settings.items() if value is not None] + ["raw"] * raw:
            raise ReftEdgeError(f"{adapter} says what {', '.join(given)} is; leave that out, or the adapter")
        return trainable(self.model, interventions_of(self.model, adapter, dropout))

    def _answering(self, adapters: "Sequence[tuple[Adapter, float]]") -> AbstractContextManager[Any]:
        """A context with what answers, the adapters in place."""
        import torch

        from reft_edge.evaluation.torch_answers import torch_classifier, torch_decoder
        from reft_edge.model.device import chosen_dtype, torch_device
        from reft_edge.model.encoders import is_encoder, load_text_tokens
        from reft_edge.model.prompts import choose_format

        device = torch_device(self.device)
        autocast = chosen_dtype(self.dtype, device) == torch.bfloat16
        if is_encoder(self.folder):
            if len(adapters) != 1:
                raise ReftEdgeError(f"an encoder classifies with one adapter; {len(adapters)} were given")
            return torch_classifier(self.model, load_text_tokens(self.folder), *adapters[0], device, autocast)
        formats = [adapter.config.prompt_format for adapter, _ in adapters]
        form = choose_format(None, formats, self.prompts.template is not None)
        return torch_decoder(self.model, self.prompts, form, adapters, device, autocast)

    def check_free(self) -> None:
        """Raise ReftEdgeError inside `reft_edge.steered`."""
        if self._steered is not None:
            raise ReftEdgeError(
                "the model is steered already; leave that `with` block first, or give all adapters to one `steered`"
            )


@checked
@extra("train")
def load(
    model: str | Path, *, dtype: str = "fp32", device: str | None = None, report: Report = silent
) -> FrozenModel:
    """Load a base model, a decoder or an encoder, in PyTorch.

    `model`: a folder in the Hugging Face layout, a GGUF file, a Hub id, or `smollm2`. `dtype`: of its arithmetic, fp32, bf16,
    or auto (bf16 where the hardware has it); its weights are float32. `device`: a torch device, by default CUDA where there
    is one. `report` is told of steps that take seconds.

    Raises ReftEdgeError if there is no such model, it cannot be loaded, or the device cannot be used.

    >>> base = reft_edge.load("smollm2")
    >>> answer = base.generate("Who are you?", max_tokens=8)
    """
    from reft_edge.model.device import chosen_dtype, torch_device
    from reft_edge.model.encoders import load_network
    from reft_edge.model.loading import load_model_prompts
    from reft_edge.model.source import resolve_model

    place = torch_device(device)
    chosen_dtype(dtype, place)
    folder = resolve_model(str(model), report)
    prompts = load_model_prompts(folder)
    network = load_network(folder)
    return FrozenModel(network.to(place), folder, prompts, str(place), dtype)


@checked
@contextmanager
def steered(
    base: FrozenModel, *adapters: AdapterFile, require_signed: str | Path | None = None
) -> Iterator[FrozenModel]:
    """Inside the block the base answers with these adapters; behind it, as before.

    Each adapter is a file, or a pair of a file and the scale of its edits; several act at once. `require_signed`: a file of
    trusted keys, one of which must have signed every adapter.

    Raises AdapterFileError for a file that is no adapter, BaseMismatchError for one of another base, SignatureError for one
    that no trusted key signed, ReftEdgeError inside another such block; all are ReftEdgeErrors.

    >>> base = reft_edge.load("smollm2")
    >>> with reft_edge.steered(base, "pirate.safetensors"):
    ...     answer = base.generate("Who are you?", max_tokens=8)
    >>> with reft_edge.steered(base, ("pirate.safetensors", 0.5)):
    ...     half = base.generate("Who are you?", max_tokens=8)
    """
    from reft_edge.signing.signatures import load_verified

    base.check_free()
    trusted = trusted_keys(require_signed)
    loaded = [(load_verified(path, trusted)[0], scale) for path, scale in scaled(adapters)]
    with base._answering(loaded) as answering:
        base._steered = answering
        try:
            yield base
        finally:
            base._steered = None
