"""Which decoders onnxruntime-genai's model builder can build, told before anything is loaded."""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.json_files import read_object
from reft_edge.model.source import ModelFolder, class_name

SAME_GRAPH = {
    "CwmForCausalLM": "LlamaForCausalLM",
    "Gemma4ForCausalLM": "Gemma4UnifiedForConditionalGeneration",
    "Gemma4UnifiedForCausalLM": "Gemma4UnifiedForConditionalGeneration",
    "MinistralForCausalLM": "MistralForCausalLM",
    "Qwen3_5ForCausalLM": "Qwen3_5ForConditionalGeneration",
    "SeedOssForCausalLM": "LlamaForCausalLM",
}
"""Classes whose graph is that of another class, by whose name the builder knows it."""
_LEAST_KNOWN = 10
"""Fewer names than this in the builder's source tell that it is written in another way by now."""
_EXPERTS = ("gpt_oss", "lfm2_moe")
_ELSEWHERE = (
    "export it with another tool, such as Optimum, and give that graph ports with `reft-edge add-ports`"
)


def check_text_alone(model: ModelFolder) -> None:
    """Raise ReftEdgeError for a model in which the text part is one of several, as in models that see or hear."""
    config = read_object(model.path / "config.json")
    if isinstance(config.get("text_config"), dict):
        named = config.get("architectures")
        architecture = named[0] if isinstance(named, list) and named else config.get("model_type")
        raise ReftEdgeError(
            f"{model.name} cannot be exported: {architecture!s:.100} holds a text model among other parts (text_config in its "
            "config.json); save the text model in a folder of its own, with the class of transformers whose name ends in "
            "ForCausalLM, and train and export that"
        )


def check_architecture(config: Any, name: str, quantised: bool = False) -> None:
    """Raise ReftEdgeError for a model that the builder cannot build, or not in so few bits, with the part of it that it lacks.

    `config`: of the model's text part; `name`: of the model, for people.
    """
    architecture = class_name(config)
    if lacking := _lacking(config):
        raise ReftEdgeError(f"{name} cannot be exported: {architecture} {lacking}")
    if quantised and config.model_type in _EXPERTS:
        raise ReftEdgeError(
            f"{name} cannot be exported in int4 or int8: {architecture} has experts, whose rounded weights cannot be "
            "checked against the model; choose --precision fp32 or fp16"
        )
    known = _known()
    if len(known) >= _LEAST_KNOWN and SAME_GRAPH.get(architecture, architecture) not in known:
        raise ReftEdgeError(
            f"{name} cannot be exported: onnxruntime-genai's model builder does not know {architecture}; {_ELSEWHERE}"
        )


def _lacking(config: Any) -> str:
    """What of a known architecture the builder, or ONNX Runtime's CPU, lacks; empty if nothing."""
    kind = str(config.model_type)
    types = list(getattr(config, "layers_block_type", None) or getattr(config, "layer_types", None) or ())
    if kind == "granitemoehybrid" and "linear_attention" in types:
        layers = ", ".join(str(layer) for layer, type_ in enumerate(types) if type_ == "linear_attention")
        return (
            f"has Mamba-2 layers ({layers}), which onnxruntime-genai's model builder does not build; Granite 4 models of "
            "attention alone can be exported"
        )
    if kind == "granitemoehybrid" and getattr(config, "num_local_experts", None):
        return "has experts beside its MLP, which onnxruntime-genai's model builder leaves out"
    if kind.startswith("gemma4") and getattr(config, "hidden_size_per_layer_input", None):
        return (
            "has an embedding for each layer (hidden_size_per_layer_input, as in E2B and E4B), which onnxruntime-genai's "
            "model builder leaves out; Gemma 4 models without it can be exported"
        )
    if kind.startswith("gemma4") and getattr(config, "enable_moe_block", None):
        return "has experts (enable_moe_block), whose graph was not checked here"
    if kind == "phimoe":
        return "has experts that onnxruntime-genai's model builder builds for CUDA in int4 alone"
    return ""


@cache
def _known() -> frozenset[str]:
    """Architectures in the builder's source, which does not list them for others."""
    package = find_spec("onnxruntime_genai")
    source = Path(package.origin).parent / "models/builder.py" if package and package.origin else None
    if source is None or not source.is_file():
        return frozenset()
    return frozenset(re.findall(r'architectures\[0\] == "(\w+)"', source.read_text(encoding="utf-8")))
