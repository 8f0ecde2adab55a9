"""A frozen model with new interventions as one module, for trainers of transformers and TRL.

`trainable` gives the model as its own class has it, with a name of its own for the interventions: everything that a
trainer asks of a model of transformers (its config, `generate`, its output embeddings, its head's forward) is that
class's. The frozen parameters are shared with the model it was made of, which answers as before.
"""

import copy
import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from reft_edge.adapter.config import AdapterConfig
from reft_edge.adapter.file import load_adapter, save_adapter
from reft_edge.errors import ReftEdgeError
from reft_edge.files import write_atomically
from reft_edge.steering.hooks import Steering, check_bases, steered
from reft_edge.steering.interventions import Interventions
from reft_edge.training.description import adapter_config
from reft_edge.training.frozen_base import checkpointed
from reft_edge.training.settings import TrainSettings, of_kind

ADAPTER_NAME = "adapter.safetensors"
"""The adapter's file in a folder that `save_pretrained` wrote."""
STATE_NAME = "model.safetensors"
"""Beside it in a trainer's checkpoint: the interventions as they are trained, from which the trainer resumes."""
_NO_LABEL = -100


class Trainable(nn.Module):
    """What `trainable` adds to the model's own class."""

    interventions: Interventions
    _steering: Steering | None
    _seen: tuple[Tensor, Tensor] | None
    """The last token ids whose prompts were told, and those prompts' lengths."""
    _checkpointing: dict[str, Any] | None

    def __call__(self, *args: Any, prompt_lengths: Tensor | None = None, **kwargs: Any) -> Any:
        """A pass of the model, edited. `prompt_lengths [rows]`: each prompt's tokens, padding left out; else `labels` tell.

        Raises ReftEdgeError where neither tells what a prompt is in training, and for packed rows.
        """
        if self._steering is not None:  # a step of `generate`
            return super().__call__(*args, **kwargs)
        _refuse_packed(kwargs)
        lengths = self._prompt_lengths(args, kwargs, prompt_lengths)
        with steered(self, (self.interventions, 1.0)) as steering:
            again = self._computing_again(steering)
            if not isinstance(again, nullcontext):
                kwargs["use_cache"] = False
            with again, nullcontext() if lengths is None else steering.prompts(lengths):
                return super().__call__(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own; the row that is given is the prompt, and all behind it is generated."""
        with steered(self, (self.interventions, 1.0)) as steering, steering.generating():
            self._steering = steering
            try:
                return super().generate(*args, **kwargs)  # type: ignore[misc]
            finally:
                self._steering = None

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ReftEdgeError: continuous batching puts several texts into one row."""
        raise ReftEdgeError(
            "continuous batching puts several texts into one row, where positions cannot be told; use `generate` "
            "(in TRL: use_transformers_paged=False)"
        )

    def train(self, mode: bool = True) -> "Trainable":
        """Interventions are trained; the frozen model keeps its dropout off."""
        super().train(mode)
        for child in self.children():
            if child is not self.interventions:
                child.eval()
        return self

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Keep only blocks' inputs for the backward pass, as transformers has it, by `use_reentrant=False`.

        Raises ReftEdgeError for `use_reentrant=True` and for `offload`.
        """
        options = dict(activation_checkpointing_kwargs or {})
        if options.pop("use_reentrant", False):
            raise ReftEdgeError(
                "gradient checkpointing of a frozen model needs use_reentrant=False; with True no gradient comes to the "
                "interventions"
            )
        if offload:
            raise ReftEdgeError("activations of a trainable adapter cannot be offloaded; leave `offload` out")
        self._checkpointing = {"every": every_n_layers, **options}

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def activation_checkpointing_disable(self) -> None:
        """Keep all for the backward pass."""
        self._checkpointing = None

    def gradient_checkpointing_disable(self) -> None:
        """The older name of `activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()

    @property
    def is_activation_checkpointing(self) -> bool:
        return self._checkpointing is not None

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self._checkpointing is not None

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> None:
        """Write the adapter as `adapter.safetensors`, the file that `reft-edge run` and all else of this package take.

        `save_directory` is made if it is not there. With an option `state_dict`, as trainers of transformers call it, the
        interventions are also written as `model.safetensors`, from which such a trainer resumes. With `push_to_hub` the
        adapter is then pushed to `repo_id`, by default the folder's name. Raises ReftEdgeError if an intervention is not
        sound or a file cannot be written.
        """
        if not is_main_process:
            return
        folder = Path(save_directory)
        self.interventions.check_sound()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ReftEdgeError(f"cannot make the folder {folder}: {error.strerror}") from error
        if "state_dict" in options:
            state = options["state_dict"] or self.state_dict()
            own = {
                name: tensor.detach().cpu().contiguous()
                for name, tensor in state.items()
                if name.startswith("interventions.")
            }
            write_atomically(folder / STATE_NAME, save_tensors(own, {"format": "pt"}))
        save_adapter(self.interventions.to_adapter(), folder / ADAPTER_NAME)
        if push_to_hub:
            self.push_to_hub(repo_id or folder.name)  # type: ignore[operator]

    def _computing_again(self, steering: Steering) -> AbstractContextManager[None]:
        """Blocks that compute again what the backward pass needs, where that is asked for and there will be such a pass."""
        if self._checkpointing is None or not self.training or not torch.is_grad_enabled():
            return nullcontext()
        options = dict(self._checkpointing)
        given = options.pop("context_fn", lambda: (nullcontext(), nullcontext()))

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            first, second = given()
            return first, _both(steering.recomputing(), second)

        return checkpointed(self, **options, context_fn=contexts)

    def _prompt_lengths(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], given: Tensor | None
    ) -> Tensor | None:
        """Of every row in tokens, padding left out; None where the whole row is the prompt."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        labels = kwargs.get("labels")
        if given is not None:
            lengths = _checked(given, ids)
        elif labels is not None:
            lengths = self._before_labels(labels, mask)
        elif self._seen is not None and ids is not None and _same(ids, self._seen[0]):
            return self._seen[1]  # the same rows again, for their logits
        elif self.training and torch.is_grad_enabled():
            raise ReftEdgeError(
                "a batch has neither `labels` nor `prompt_lengths`, so it cannot be told where its prompts end; give "
                "one of them (label smoothing and loss functions of your own take the labels away: add a column "
                "prompt_lengths, and keep it with remove_unused_columns=False where your trainer drops it)"
            )
        else:
            return None
        self._seen = None if ids is None else (ids, lengths)
        return lengths

    def _before_labels(self, labels: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens of every row before its first label that is not -100; all of them where there is none."""
        learnt = labels != _NO_LABEL
        before = learnt.long().cumsum(dim=1) == 0
        if mask is not None:
            before = before & mask[:, -labels.shape[1] :].bool().to(before.device)
        lengths = before.long().sum(dim=1)
        config = self.interventions.config
        if not bool(lengths.any()) and not any(
            span.on_generated and not span.trigger for span in config.spans
        ):
            raise ReftEdgeError(
                f"the labels leave no row a prompt, so that the positions {config.positions} edit nothing: give prompts "
                "the label -100 (in TRL: rows of prompt and completion, or assistant_only_loss=True), or train at "
                "the positions gen"
            )
        return lengths


def trainable(model: Any, interventions: Interventions) -> Any:
    """`model` and `interventions` as one module of the model's class, whose frozen parameters it shares.

    Only the interventions take gradients. `model` itself stays unsteered.
    """
    own = type(model)
    said = {"__module__": own.__module__, "__doc__": own.__doc__, "forward": _with_lengths(own.forward)}
    module = copy.copy(model)
    for name, value in vars(model).items():
        if isinstance(value, dict | set):
            setattr(module, name, value.copy())
    vars(module).pop("forward", None)  # another trainer's, bound to the model
    module.__class__ = type(own.__name__, (Trainable, own), said)
    module.requires_grad_(False)
    module._steering = module._seen = module._checkpointing = None
    module._keys_to_ignore_on_save = set(module.state_dict())  # what a trainer need not find in a checkpoint
    module.interventions = interventions.to(model.device)
    module.train(False)
    return module


def new_interventions(
    model: Any, base_name: str, settings: dict[str, Any], prompt_format: str
) -> Interventions:
    """Of fields of TrainSettings; None leaves its default. Raises ReftEdgeError for what the model cannot have."""
    given = {name: of_kind(name, value) for name, value in settings.items() if value is not None}
    chosen = TrainSettings(**given, prompt_format=prompt_format)
    config = adapter_config(model, base_name, chosen)
    return Interventions(_by_another_trainer(config), chosen.dropout, chosen.seed, chosen.start)


def interventions_of(model: Any, path: str | Path, dropout: float) -> Interventions:
    """An adapter file's, or those of the one in a folder that `save_pretrained` wrote, to be trained further.

    Raises ReftEdgeError if it is not an adapter that generates text, or of another model.
    """
    path = Path(path)
    adapter = load_adapter(path / ADAPTER_NAME if path.is_dir() else path)
    check_bases(model, [(adapter, 1.0)])
    if adapter.config.labels:
        raise ReftEdgeError("an adapter with a classification head cannot be trained by another trainer")
    return Interventions.from_adapter(
        dataclasses.replace(adapter, config=_by_another_trainer(adapter.config)), dropout
    )


def _by_another_trainer(config: AdapterConfig) -> AdapterConfig:
    versions = {package: version(package) for package in ("reft-edge", "torch", "transformers")}
    return dataclasses.replace(config, training={"versions": versions})


def _with_lengths(own: Any) -> Any:
    """The model's own forward; `prompt_lengths` is there for trainers that ask a model which columns it takes."""

    def forward(self: Trainable, *args: Any, prompt_lengths: Tensor | None = None, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    parameters = list(inspect.signature(own).parameters.values())
    more = inspect.Parameter("prompt_lengths", inspect.Parameter.KEYWORD_ONLY, default=None)
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    forward.__signature__ = inspect.Signature([*parameters[:at], more, *parameters[at:]])  # type: ignore[attr-defined]
    forward.__doc__ = own.__doc__
    return forward


def _refuse_packed(kwargs: dict[str, Any]) -> None:
    """Raise ReftEdgeError where a row holds several texts."""
    positions = kwargs.get("position_ids")
    restarts = (
        kwargs.get("attention_mask") is None
        and isinstance(positions, Tensor)
        and positions.ndim == 2
        and bool((positions.diff(dim=1) <= 0).any())
    )
    if restarts or any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "seq_idx")):
        raise ReftEdgeError(
            "a row holds several texts, so it cannot be told where each prompt begins and ends; train with packing=False "
            "and padding_free=False"
        )


def _checked(lengths: Any, ids: Tensor | None) -> Tensor:
    told = torch.as_tensor(lengths)
    if (ids is not None and told.shape != ids.shape[:1]) or told.is_floating_point():
        raise ReftEdgeError(
            f"prompt_lengths are {told.dtype} of the shape {list(told.shape)}; expected one whole number for each of the "
            f"{0 if ids is None else len(ids)} rows"
        )
    return told


def _same(ids: Tensor, others: Tensor) -> bool:
    return ids is others or (
        ids.shape == others.shape and ids.device == others.device and torch.equal(ids, others)
    )


@contextmanager
def _both(one: AbstractContextManager[Any], other: AbstractContextManager[Any]) -> Iterator[None]:
    with one, other:
        yield
