"""What reft_edge's own runtime answers, to compare the loader's answers with.

python runtime/web/test/answers.py EXPORT ANSWERS.json ADAPTER...
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx

from reft_edge.manifest import load_manifest
from reft_edge.runtime import SteeredModel

PROMPTS = ("Who are you?", "What is the capital of France?", "Name three fruits.")
TEXTS = (
    "Who are you?",
    " The  quick brown fox's\n\n\ttail; it'll jump 1,234.5 metres!",
    "Größe, naïve café — “quotes” … 日本語のテキスト 🏴‍☠️🙂 \u200bzero",
    "<|im_start|>user\nhi<|im_end|> <|start|>x<|end|>",
    "def f(x):\n    return x**2  # ünï\r\n",
)
TOKENS = 32


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


def main(export: Path, out: Path, adapters: list[Path]) -> None:
    with tempfile.TemporaryDirectory() as place:
        out.write_text(json.dumps(answer_all(with_float_activations(export, Path(place)), adapters)))


def answer_all(folder: Path, adapters: list[Path]) -> dict[str, Any]:
    model = SteeredModel(folder, device="cpu")
    for path in adapters:
        model.load_adapter(path)
    names = [path.stem for path in adapters]
    choices: list[dict[str, float]] = [{}, *({name: 1.0} for name in names), {names[0]: 0.5}]
    if len(names) > 1:
        choices.append({names[0]: 0.5, names[1]: -0.25})
    answers: list[dict[str, Any]] = []
    for chosen in choices:
        for prompt in PROMPTS:
            answer = model.stream(prompt, chosen, max_tokens=TOKENS)
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
    return {"max_tokens": TOKENS, "answers": answers, "encoded": encoded}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [Path(given) for given in sys.argv[3:]])
