"""Decoder graphs that reft-edge did not build: torch.onnx's, and rounded by onnxruntime's own quantisers."""

from pathlib import Path
from typing import Any

import torch
from torch import nn


class _Decoder(nn.Module):
    """A causal language model with the inputs and outputs of an ONNX decoder."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pasts: tuple[torch.Tensor, ...] = ()
    ) -> Any:
        from transformers import DynamicCache

        if not pasts:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        cache = DynamicCache(list(zip(pasts[::2], pasts[1::2], strict=True)))
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True
        )
        presents = [part for layer in output.past_key_values.layers for part in (layer.keys, layer.values)]
        return (output.logits, *presents)


def export_dynamo(model: Any, folder: Path, cached: bool = False) -> Path:
    """`torch.onnx.export(dynamo=True)` of a model from transformers, with or without a KV cache."""
    config = model.config
    ids = torch.arange(10).reshape(2, 5) + 3
    batch, tokens, past = (torch.export.Dim(name) for name in ("batch", "tokens", "past"))
    names, outputs = ["input_ids", "attention_mask"], ["logits"]
    arguments: tuple[Any, ...] = (ids, torch.ones_like(ids))
    shapes: dict[str, Any] = {"input_ids": {0: batch, 1: tokens}, "attention_mask": {0: batch, 1: tokens}}
    if cached:
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        parts = [f"{layer}.{part}" for layer in range(config.num_hidden_layers) for part in ("key", "value")]
        names += [f"past_key_values.{part}" for part in parts]
        outputs += [f"present.{part}" for part in parts]
        pasts = tuple(torch.randn(2, config.num_key_value_heads, 4, head_size) for _ in parts)
        arguments = (ids, torch.ones(2, 9, dtype=torch.int64), pasts)
        shapes["attention_mask"] = {0: batch, 1: torch.export.Dim("total")}
        shapes["pasts"] = tuple({0: batch, 2: past} for _ in parts)
        shapes = {
            name: tuple(dict.fromkeys(part, torch.export.Dim.DYNAMIC) for part in shape)
            if isinstance(shape, tuple)
            else dict.fromkeys(shape, torch.export.Dim.DYNAMIC)
            for name, shape in shapes.items()
        }
    folder.mkdir(parents=True)
    path = folder / "model.onnx"
    with torch.no_grad():
        program = torch.onnx.export(
            _Decoder(model).eval(),
            arguments,
            dynamo=True,
            input_names=names,
            output_names=outputs,
            dynamic_shapes=shapes,
            verbose=False,
        )
    assert program is not None
    program.save(str(path))
    return path


def quantise_int8(graph: Path, folder: Path) -> Path:
    """onnxruntime's dynamic quantisation: DynamicQuantizeLinear and MatMulInteger."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder.mkdir(parents=True)
    quantize_dynamic(graph, folder / "model.onnx", weight_type=QuantType.QInt8)
    return folder / "model.onnx"


def quantise_int8_all(graph: Path, folder: Path) -> Path:
    """The same of every product, attention's own two included, by channel: what Optimum's presets do."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder.mkdir(parents=True)
    quantize_dynamic(
        graph,
        folder / "model.onnx",
        weight_type=QuantType.QInt8,
        per_channel=True,
        extra_options={"MatMulConstBOnly": False},
    )
    return folder / "model.onnx"


def quantise_int4(graph: Path, folder: Path) -> Path:
    """onnxruntime's blockwise quantisation: MatMulNBits."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    folder.mkdir(parents=True)
    quantiser = MatMulNBitsQuantizer(onnx.load(graph), block_size=32, is_symmetric=True, accuracy_level=4)
    quantiser.process()
    quantiser.model.save_model_to_file(str(folder / "model.onnx"), False)
    return folder / "model.onnx"
