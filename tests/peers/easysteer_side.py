"""Run with the Python of EasySteer's environment: what EasySteer's own steering computes, on a CPU and without vLLM.

    python easysteer_side.py SOURCES MODEL FOLDER

SOURCES is a checkout of EasySteer's vLLM. Its vllm/steer_vectors and vllm/v1/worker/gpu/steer_vector_utils.py are imported as
they are; of the rest of vLLM there are the few names below that they import. The model is a transformers one, whose layers
EasySteer hooks itself. For each spec in FOLDER/NAME.json the logits of every row of FOLDER/rows.json, [prompt, answer], go to
FOLDER/NAME.npz: the prompt in one pass, or in two parts as with chunked prefill, then the answer token by token.
"""

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
import transformers

CONTEXT = SimpleNamespace()


@dataclass
class BatchGeometry:
    """The fields that vllm/forward_context.py gives it."""

    query_start_loc: torch.Tensor
    num_computed: torch.Tensor
    num_prompt: torch.Tensor
    num_output: torch.Tensor
    req_ids: list
    token_ids: torch.Tensor
    query_start_loc_cpu: np.ndarray


def register_op(op_name, op_func, mutates_args, fake_impl):
    """A plain function in place of a custom operator; of [1, tokens, d] it takes the rows, which is what vLLM's layers give."""

    def rows(tensor, *others):
        return op_func(tensor.view(-1, tensor.shape[-1]), *others)

    setattr(torch.ops.vllm, op_name, rows)


def stand_in(sources: Path) -> None:
    """Packages of vLLM's names around EasySteer's own files."""

    def module(name: str, path: Path | None = None, **names: object) -> None:
        made = ModuleType(name)
        vars(made).update(names)
        if path is not None:
            made.__path__ = [str(path)]
        sys.modules[name] = made

    module("vllm", sources / "vllm")
    module("vllm.logger", init_logger=logging.getLogger)
    module("vllm.config", SteerVectorConfig=SimpleNamespace)
    module("vllm.utils", random_uuid=lambda: "0" * 32)
    module("vllm.utils.torch_utils", direct_register_custom_op=register_op)
    module("vllm.forward_context", get_forward_context=lambda: CONTEXT, BatchGeometry=BatchGeometry)
    for name in ("vllm.model_executor", "vllm.model_executor.layers", "vllm.v1", "vllm.v1.worker"):
        module(name, sources / name.replace(".", "/"))
    module("vllm.model_executor.layers.attention_layer_base", AttentionLayerBase=type("None_", (), {}))
    module("vllm.v1.worker.gpu", sources / "vllm/v1/worker/gpu")
    module("vllm.v1.worker.gpu.input_batch", InputBatch=SimpleNamespace)


def step(ids: list, computed: int, prompt: int):
    """vLLM's batch of one request with these tokens, after `computed` ones."""
    return SimpleNamespace(
        num_reqs=1,
        num_tokens=len(ids),
        num_computed_tokens_np=np.array([computed], np.int32),
        prefill_len_np=np.array([prompt], np.int32),
        is_prefilling_np=np.array([computed < prompt]),
        query_start_loc=torch.tensor([0, len(ids)], dtype=torch.int32),
        query_start_loc_np=np.array([0, len(ids)], np.int32),
        num_scheduled_tokens=np.array([len(ids)], np.int32),
        req_ids=["request"],
        input_ids=torch.tensor(ids),
    )


@torch.no_grad()
def logits(model, manager, request, prompt, answer, chunk):
    from vllm.v1.worker.gpu.steer_vector_utils import SteerVectorState, make_steer_vector_forward_kwargs

    state = SteerVectorState()
    state.add_request("request", request, manager)
    parts = [prompt[start : start + chunk] for start in range(0, len(prompt), chunk)] + [
        [token] for token in answer
    ]
    found, cache, computed = [], None, 0
    for ids in parts:
        kwargs = make_steer_vector_forward_kwargs(step(ids, computed, len(prompt)), state, manager=manager)
        vars(CONTEXT).clear()
        vars(CONTEXT).update(kwargs)
        output = model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
        cache, computed = output.past_key_values, computed + len(ids)
        found.append(output.logits[0])
    state.remove_request("request", manager)
    return torch.cat(found).numpy()


def main(sources: Path, model_folder: Path, folder: Path) -> None:
    stand_in(sources)
    from vllm.steer_vectors.api import SteeringSpec, to_engine_request
    from vllm.steer_vectors.payloads import (
        PAYLOAD_KINDS,
        DirectionVector,
        LinearMap,
        ReftIntervention,
        materialize,
    )
    from vllm.steer_vectors.worker_manager import WorkerSteerVectorManager

    def digest(wire, layers):
        """Of the same payload, as EasySteer's own class writes it."""
        parts = materialize(wire, "cpu", torch.float32, layers)
        kind = PAYLOAD_KINDS[wire["kind"]]
        first = next(iter(parts.values()))
        if kind is DirectionVector:
            return DirectionVector(parts).to_wire()["sha256"]
        if kind is LinearMap:
            return LinearMap(first["weight"], first["bias"]).to_wire()["sha256"]
        return ReftIntervention(**first, layer=wire["extra"]["layer"]).to_wire()["sha256"]

    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    settings = SimpleNamespace(
        max_steer_vectors=64, graph_mode="split", graph_max_rank=32, adapter_dtype=torch.float32
    )
    manager = WorkerSteerVectorManager(torch.device("cpu"), settings)
    manager.create_steer_vector_manager(model)
    rows = json.loads((folder / "rows.json").read_text())
    for path in sorted(folder.glob("*.json")):
        if path.stem == "rows":
            continue
        spec = SteeringSpec.model_validate_json(path.read_text())
        for vector in spec.vectors:
            assert vector.source or vector.data["sha256"] == digest(vector.data, vector.layers), path.stem
        again = SteeringSpec.model_validate_json(spec.model_dump_json())
        assert again == spec
        found = {}
        for number, (prompt, answer) in enumerate(rows):
            for name, chunk in (("whole", len(prompt)), ("parts", max(1, len(prompt) // 2))):
                request = to_engine_request(spec, name=path.stem, int_id=1)
                found[f"{name}{number}"] = logits(model, manager, request, prompt, answer, chunk)
        np.savez(folder / f"{path.stem}.npz", **found)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
