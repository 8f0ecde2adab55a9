"""onnxruntime-genai's model builder, with what it gets wrong about some architectures put right.

    python -m reft_edge.export.builder_process [--gguf FILE] ARGUMENTS        the builder's own

What is changed is what the builder is told of the model, and with `--gguf` that its matrices are that file's own blocks
as far as they can be, and rounded only where they cannot: export's verification against PyTorch decides
whether the outcome is right. Seen with onnxruntime-genai 0.18 and transformers 5.23.
"""

import argparse
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import transformers

from reft_edge.export.carry import CARRIED, Carrying, carry_blocks
from reft_edge.export.rotary import Rotation, compute_tables, frequencies_of
from reft_edge.model.source import class_name

_OLMO_EPSILON = 1e-5  # OlmoLayerNorm has it as a constant


def told(config: Any) -> Any:
    """The configuration as the builder understands it."""
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and isinstance(
        rope.get("full_attention"), dict
    ):  # Gemma 3: one set for each layer type
        config.rope_local_base_freq = rope["sliding_attention"]["rope_theta"]
        config.rope_parameters = dict(rope["full_attention"])
    # Without layer types, transformers takes a window to hold for every layer, the builder for none.
    if getattr(config, "sliding_window", None) and getattr(config, "layer_types", None) is None:
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    # The builder looks for the norms' epsilon under one name only.
    for name in ("layer_norm_eps", "norm_eps"):
        if not hasattr(config, "rms_norm_eps") and hasattr(config, name):
            config.rms_norm_eps = getattr(config, name)
    # The builder goes by the class's name, which transformers can do without.
    if not getattr(config, "architectures", None):
        config.architectures = [class_name(config)]
    if config.model_type == "olmo":
        config.rms_norm_eps = _OLMO_EPSILON
    return config


_AUTO_CONFIG = transformers.AutoConfig


class _AutoConfig(_AUTO_CONFIG):  # type: ignore[misc,valid-type]
    """Stands in for transformers' class where the builder imports it; models are loaded with the original."""

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        options.pop("trust_remote_code", None)
        return told(_AUTO_CONFIG.from_pretrained(*arguments, trust_remote_code=False, **options))


def main() -> None:
    """Run the builder with the arguments of this process."""
    import onnxruntime_genai.models  # makes the builder's own packages importable  # noqa: F401, I001
    import builders  # type: ignore[import-not-found]

    plain_init = builders.GemmaModel.__init__

    def init(self: Any, config: Any, *arguments: Any) -> None:
        """The builder rounds the factor of the embeddings to two decimals."""
        plain_init(self, config, *arguments)
        self.embed_attrs["scale"] = math.sqrt(config.hidden_size)

    builders.GemmaModel.__init__ = init
    plain_norm = builders.OLMoModel.make_layernorm

    def layer_norm(self: Any, *arguments: Any, **options: Any) -> None:
        """OLMo normalises by mean and variance; the builder would by root mean square."""
        plain_norm(self, *arguments, **{**options, "simple": False})

    builders.OLMoModel.make_layernorm = layer_norm
    options, sys.argv[1:] = _own_arguments(sys.argv[1:])
    if options.gguf is not None:
        _carry_first(
            builders.base.Model, options.gguf, options.precision, _note_rotations(builders.base.Model)
        )
    sys.modules["transformers"].AutoConfig = _AutoConfig  # type: ignore[attr-defined]  # the import above replaced the module
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)


def _own_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What is for this module, and what is for the builder."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("-p", dest="precision")
    options, others = parser.parse_known_args(arguments)
    return options, [*others, "-p", options.precision]


def _note_rotations(model_class: Any) -> list[Rotation]:
    """A list that gets what each pair of rotary tables is computed from, once the builder has made it."""
    made: list[Rotation] = []
    plain = model_class.make_rotary_embedding_caches

    def make_caches(self: Any, **options: Any) -> Any:
        makes = self.rope_attrs["create_caches"] and self.rope_attrs["save_caches"]
        cosines, sines = plain(self, **options)
        if makes:
            frequencies = frequencies_of(self, model_class.make_rotary_embedding_caches_from_scratch)
            made.append(Rotation(cosines, sines, self.rope_attrs["cache_length"], frequencies.numpy()))
        return cosines, sines

    model_class.make_rotary_embedding_caches = make_caches
    return made


def _carry_first(model_class: Any, gguf: Path, precision: str, rotations: list[Rotation]) -> None:
    """Have the builder's models take the file's blocks before they round what is left, and compute their rotary tables."""
    plain = model_class.to_nbits

    def to_nbits(self: Any) -> Any:
        how = Carrying(precision, self.quant_attrs["accuracy_level"], whole_blocks=self.ep == "cuda")
        carried, matrices = carry_blocks(self.model.graph, gguf, Path(self.model_name_or_path), how)
        print(f"{CARRIED}{carried} of {matrices}")
        for rotation in rotations:
            compute_tables(self.model.graph, rotation)
        left = any(
            node.op_type == "MatMul" and node.inputs[1] is not None and node.inputs[1].const_value is not None
            for node in self.model.graph
        )
        return plain(self) if left else self.model

    model_class.to_nbits = to_nbits


if __name__ == "__main__":
    main()
