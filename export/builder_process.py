"""onnxruntime-genai's model builder, with what it gets wrong about some architectures put right.

    python -m reft_edge.export.builder_process [--gguf FILE] [--context N] ARGUMENTS        the builder's own

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

import onnx_ir as ir
import transformers

from reft_edge.export.architectures import SAME_GRAPH
from reft_edge.export.carry import CARRIED, Carrying, carry_blocks
from reft_edge.export.data_file import DataFile
from reft_edge.export.deferred import Deferred, DeferredTensor, defer
from reft_edge.export.rotary import Rotation, compute_tables, frequencies_of
from reft_edge.export.rounding import Rounding, round_matrices
from reft_edge.model.checkpoint import open_checkpoint
from reft_edge.model.source import ModelFolder, class_name

_OLMO_EPSILON = 1e-5  # OlmoLayerNorm has it as a constant


def told(config: Any) -> Any:
    """The configuration as the builder understands it."""
    text = config.get_text_config()
    if text.model_type.startswith("gemma4"):
        _tell_gemma4(text)
    rope = getattr(config, "rope_parameters", None)
    if (
        isinstance(rope, dict)
        and isinstance(rope.get("full_attention"), dict)
        and config.model_type.startswith("gemma3")
    ):  # one set for each layer type
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
    config.architectures = [SAME_GRAPH.get(config.architectures[0], config.architectures[0])]
    if config.model_type == "olmo":
        config.rms_norm_eps = _OLMO_EPSILON
    return config


def _tell_gemma4(config: Any) -> None:
    """What its layers of full attention have of their own, under names that transformers had before."""
    full = config.per_layer_config["full_attention"]
    config.global_head_dim, config.num_global_key_value_heads = full.head_dim, full.num_key_value_heads
    config.allow_global_per_layer_attribute_access = True


_AUTO_CONFIG = transformers.AutoConfig
_SHORTER: list[int] = []
"""The context that was asked for, if one was."""


class _AutoConfig(_AUTO_CONFIG):  # type: ignore[misc,valid-type]
    """Stands in for transformers' class where the builder imports it; models are loaded with the original."""

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        options.pop("trust_remote_code", None)
        config = told(_AUTO_CONFIG.from_pretrained(*arguments, trust_remote_code=False, **options))
        for tokens in _SHORTER:
            config.max_position_embeddings = tokens
        return config


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
    # Without a prefix of a model with images, and with the weights of whatever release of transformers there is.
    for gemma in (builders.Gemma4Model, builders.Gemma4MoEModel):
        del gemma.load_weights
    options, sys.argv[1:] = _own_arguments(sys.argv[1:])
    if options.context is not None:
        _SHORTER.append(options.context)
    model = builders.base.Model
    sys.modules["transformers"].AutoConfig = _AutoConfig  # type: ignore[attr-defined]  # the import above replaced the module
    plain_load, rotations = model.load_weights, _note_rotations(model)
    deferred = _defer_weights(model)
    _write_streamed(model, options.gguf, options.precision, rotations)
    try:
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)
    except Exception:
        if not deferred:
            raise
        print("The builder asked for content that is not there yet; it gets all weights at once", flush=True)
        model.load_weights = plain_load
        rotations.clear()
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)


def _own_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What is for this module, and what is for the builder."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--context", type=int)
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


def _defer_weights(model_class: Any) -> list[str]:
    """Have the builder's models read weights when they are written; returns a list that gets the folders where that was done."""
    plain_load, plain_initializer = model_class.load_weights, model_class.make_initializer
    done: list[str] = []

    def load_weights(self: Any, input_path: str) -> Any:
        plainly = self.quant_type is not None or "adapter_path" in self.extra_options
        folder = Path(self.model_name_or_path)
        checkpoint = None if plainly else open_checkpoint(ModelFolder(folder, folder.name))
        if checkpoint is None:
            return plain_load(self, input_path)
        done.append(str(folder))
        return defer(checkpoint)

    def make_initializer(self: Any, tensor: Any, /, name: str, *, to: Any = None, raw: bool = False) -> None:
        if not isinstance(tensor, Deferred) or raw:
            plain_initializer(self, tensor, name, to=to, raw=raw)
            return
        stored = DeferredTensor(tensor, to or ir.DataType.FLOAT, name)
        value = self.make_value(name, stored.dtype, stored.shape)
        value.const_value = stored
        self.model.graph.register_initializer(value)

    model_class.load_weights = load_weights
    model_class.make_initializer = make_initializer
    return done


def _write_streamed(model_class: Any, gguf: Path | None, precision: str, rotations: list[Rotation]) -> None:
    """Have the builder's models write weights one after the other, quantised ones as they are quantised."""

    def save_model(self: Any, out_dir: str) -> None:
        path = Path(out_dir) / self.filename
        graph = self.model.graph
        _read_one_axis(self, graph)
        graph.sort()
        with (path.parent / f"{path.name}.data").open("wb") as file:
            data = DataFile(Path(file.name), file)
            if precision in ("int4", "int8"):
                _quantise(self, data, gguf, precision, rotations)
                graph.sort()
            print("Saving ONNX model", flush=True)
            for value in graph.initializers.values():
                data.keep(value)
        ir.save(self.model, path)

    model_class.save_model = save_model


def _read_one_axis(builder: Any, graph: ir.Graph) -> None:
    """Rotary nodes that take one position a token get the first of the three, which are the same in text."""
    positions = next((value for value in graph.inputs if value.name == "position_ids"), None)
    if positions is None or positions.shape is None or len(positions.shape) != 3:
        return
    readers = [use for use in positions.uses() if use.node.op_type == "RotaryEmbedding"]
    if readers:
        name = "/model/position_ids/Gather"
        builder.make_gather(
            name,
            ["position_ids", "/model/constants/INT64/0"],
            dtype=ir.DataType.INT64,
            shape=["batch_size", "sequence_length"],
            axis=0,
        )
        for use in readers:
            use.node.replace_input_with(use.idx, builder.values[f"{name}/output_0"])


def _quantise(
    builder: Any, data: DataFile, gguf: Path | None, precision: str, rotations: list[Rotation]
) -> None:
    graph, settings = builder.model.graph, builder.quant_attrs
    if gguf is not None:
        how = Carrying(precision, settings["accuracy_level"], whole_blocks=builder.ep == "cuda")
        carried, matrices = carry_blocks(graph, data, gguf, Path(builder.model_name_or_path), how)
        print(f"{CARRIED}{carried} of {matrices}", flush=True)
        for rotation in rotations:
            compute_tables(graph, rotation)
    rounding = Rounding(
        algorithm=builder.quantization_algo,
        bits=settings["bits"],
        bits_of={name: config["bits"] for name, config in builder.int4_customized_weight_config.items()},
        size=settings["matmul_block_size"],
        accuracy_level=settings["accuracy_level"],
        excluded=frozenset(settings["nodes_to_exclude"]),
    )
    round_matrices(graph, data, rounding, lambda name: print(f"Rounding {name}", flush=True))


if __name__ == "__main__":
    main()
