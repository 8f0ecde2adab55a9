"""What reft_edge's own runtime answers, to compare the loader's answers with.

python runtime/web/test/answers.py EXPORT ANSWERS.json ADAPTER...
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from reft_edge.model.manifest import load_manifest
from reft_edge.runtime import SteeredModel

PROMPTS = ("Who are you?", "What is the capital of France?", "Name three fruits.")
TEXTS = (
    "Who are you?",
    " The  quick brown fox's\n\n\ttail; it'll jump 1,234.5 metres!",
    "Größe, naïve café — “quotes” … 日本語のテキスト 🏴‍☠️🙂 \u200bzero",
    "<|im_start|>user\nhi<|im_end|> <|start|>x<|end|>",
    "def f(x):\n    return x**2  # ünï\r\n",
)


def with_float_activations(export: Path, folder: Path) -> Path:
    """The same folder, its quantised products computed with float32 activations (accuracy level 1)."""
    shutil.copytree(export, folder, dirs_exist_ok=True)
    graph = folder / load_manifest(export).graph
    model = onnx.load(graph, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = 1
    onnx.save(model, graph)
    return folder


def main(export: Path, out: Path, adapters: list[Path], prompts: int, tokens: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = with_float_activations(export, Path(place))
        out.write_text(json.dumps(answer_all(folder, adapters, PROMPTS[:prompts], tokens)))


def answer_all(folder: Path, adapters: list[Path], prompts: Sequence[str], tokens: int) -> dict[str, Any]:
    model = SteeredModel(folder, device="cpu")
    for path in adapters:
        model.load_adapter(path)
    names = [path.stem for path in adapters]
    choices: list[dict[str, float]] = [{}, *({name: 1.0} for name in names), {names[0]: 0.5}]
    if len(names) > 1:
        choices.append({names[0]: 0.5, names[1]: -0.25})
    answers: list[dict[str, Any]] = []
    for chosen in choices:
        for prompt in prompts:
            answer = model.stream(prompt, chosen, max_tokens=tokens)
            text = answer.text()
            ids = model.encode(prompt, chosen)
            answers.append(
                {
                    "adapters": chosen,
                    "prompt": prompt,
                    "ids": ids,
                    "tokens": answer.tokens,
                    "text": text,
                    "reason": answer.finish_reason,
                    "logits": model.logits([ids], chosen)[0][-1].tolist(),
                }
            )
    encoded = [
        {
            "text": text,
            "raw": model.prompts.encode_raw(text),
            "chat": model.prompts.encode_prompt(text, "chat"),
        }
        for text in TEXTS
    ]
    return {"max_tokens": tokens, "answers": answers, "encoded": encoded}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("export", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("adapters", type=Path, nargs="+")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--tokens", type=int, default=32)
    main(**vars(parser.parse_args()))
