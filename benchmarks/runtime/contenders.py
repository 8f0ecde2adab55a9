"""One contender of speed.py, in a process of its own: loads, warms up, says so, and times a run for every line it gets.

    python contenders.py NAME JOB.json

A job has the files' paths, the prompt's token ids, the number of new tokens, and threads. A run is a prompt and greedy
decode steps; its line has the seconds to the first token and those of all later ones. Each contender imports only what
its own environment has.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

Run = Callable[[], tuple[float, float]]


def reft_edge(job: dict[str, Any], adapter: bool, folder: str) -> Run:
    from pathlib import Path

    from reft_edge.model.manifest import load_manifest
    from reft_edge.runtime.bench import timed_run
    from reft_edge.runtime.binding import Bound
    from reft_edge.runtime.model import SteeredModel
    from reft_edge.runtime.session import GraphSession

    path = Path(job[folder])
    if folder == "plain":
        graph, bound = GraphSession(path, load_manifest(path), "cpu", job["threads"]), Bound({}, {})
    else:
        model = SteeredModel(path, "cpu", job["threads"])
        graph = model.graph
        bound = model.prepare(model.load_adapter(job["adapter"]) if adapter else None)
    return lambda: timed_run(graph, bound, job["ids"], job["new"])


def genai(job: dict[str, Any]) -> Run:
    import onnxruntime_genai as og

    model = og.Model(job["genai"])
    tokens = len(job["ids"]) + job["new"] + 1

    def run() -> tuple[float, float]:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=tokens, min_length=tokens, do_sample=False)
        generator = og.Generator(model, params)
        started = time.perf_counter()
        generator.append_tokens(job["ids"])
        generator.generate_next_token()
        generator.get_next_tokens()
        first = time.perf_counter()
        for _ in range(job["new"]):
            generator.generate_next_token()
            generator.get_next_tokens()
        return first - started, time.perf_counter() - first

    return run


def llama_cpp(job: dict[str, Any], lora: bool) -> Run:
    from llama_cpp import Llama

    threads = {"n_threads": job["threads"], "n_threads_batch": job["threads"]}
    context = len(job["ids"]) + job["new"] + 8
    model = Llama(
        job["gguf"], n_ctx=context, lora_path=job["lora"] if lora else None, verbose=False, **threads
    )

    def run() -> tuple[float, float]:
        model.reset()
        started = time.perf_counter()
        tokens = model.generate(job["ids"], temp=0.0)
        next(tokens)
        first = time.perf_counter()
        for _ in range(job["new"]):
            next(tokens)
        return first - started, time.perf_counter() - first

    return run


def stamps(given: int) -> Any:
    """A streamer that notes when tokens come; the prompt, which it is handed first, is left out."""
    from transformers.generation.streamers import BaseStreamer

    class Stamps(BaseStreamer):
        def __init__(self) -> None:
            self.at: list[float] = []
            self.left = given

        def put(self, value: Any) -> None:
            if self.left:
                self.left -= value.numel()
            else:
                self.at.append(time.perf_counter())

        def end(self) -> None:
            pass

    return Stamps()


def transformers(job: dict[str, Any], adapter: bool) -> Run:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, trust_remote_code=False
    ).eval()
    if adapter:
        from reft_edge.adapter.file import load_adapter
        from reft_edge.steering.hooks import Steering
        from reft_edge.steering.interventions import Interventions

        Steering(model, [(Interventions.from_adapter(load_adapter(job["adapter"])).eval(), 1.0)])
    ids = torch.tensor([job["ids"]])
    new = {"max_new_tokens": job["new"] + 1, "min_new_tokens": job["new"] + 1, "do_sample": False}

    def run() -> tuple[float, float]:
        times = stamps(ids.numel())
        started = time.perf_counter()
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), streamer=times, **new)
        return times.at[0] - started, times.at[-1] - times.at[0]

    return run


def pyreft(job: dict[str, Any]) -> Run:
    import pyreft as library
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], torch_dtype=torch.float32, trust_remote_code=False
    )
    layers, size = model.config.num_hidden_layers, model.config.hidden_size
    interventions = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": job["rank"],
            "intervention": library.LoreftIntervention(
                embed_dim=size, low_rank_dimension=job["rank"], dtype=torch.float32
            ),
        }
        for layer in range(layers)
    ]
    reft = library.get_reft_model(model, library.ReftConfig(representations=interventions))
    reft.eval()
    ids = torch.tensor([job["ids"]])
    count, last = job["positions"], len(job["ids"])
    places = [*range(count), *range(last - count, last)]
    new = {"max_new_tokens": job["new"] + 1, "min_new_tokens": job["new"] + 1, "do_sample": False}

    def run() -> tuple[float, float]:
        times = stamps(ids.numel())
        started = time.perf_counter()
        with torch.no_grad():
            reft.generate(
                {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
                unit_locations={"sources->base": (None, [[places]] * layers)},
                intervene_on_prompt=True,
                streamer=times,
                **new,
            )
        return times.at[0] - started, times.at[-1] - times.at[0]

    return run


CONTENDERS: dict[str, Callable[[dict[str, Any]], Run]] = {
    "reft-edge, graph without ports": lambda job: reft_edge(job, False, "plain"),
    "reft-edge, no adapter": lambda job: reft_edge(job, False, "export"),
    "reft-edge, adapter": lambda job: reft_edge(job, True, "export"),
    "onnxruntime-genai": genai,
    "llama.cpp": lambda job: llama_cpp(job, False),
    "llama.cpp, LoRA": lambda job: llama_cpp(job, True),
    "transformers": lambda job: transformers(job, False),
    "transformers, adapter as hooks": lambda job: transformers(job, True),
    "pyreft, adapter": pyreft,
}


def main() -> None:
    name, path = sys.argv[1:]
    with open(path, encoding="utf-8") as file:
        run = CONTENDERS[name](json.load(file))
    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(run()), flush=True)


if __name__ == "__main__":
    main()
