"""onnxruntime-genai's model builder, with what it gets wrong about some architectures put right.

    python -m reft_edge.export.builder_process ARGUMENTS        the builder's own

What is changed is what the builder is told of the model, not its code: export's verification against PyTorch decides
whether the outcome is right. Seen with onnxruntime-genai 0.18 and transformers 5.23.
"""

import math
import runpy
import sys
from typing import Any

import transformers

from reft_edge.models import class_name

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
    sys.modules["transformers"].AutoConfig = _AutoConfig  # type: ignore[attr-defined]  # the import above replaced the module
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
