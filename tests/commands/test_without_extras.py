"""What users see when an optional package is missing, and that a device needs none of the training packages."""

import subprocess
import sys

import pytest

BLOCK = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
sys.argv = ["reft-edge", *{arguments!r}]
from reft_edge.cli import app
app()
"""


def run(blocked, *arguments):
    code = BLOCK.format(blocked=blocked, arguments=[str(argument) for argument in arguments])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")


def test_a_device_runs_without_the_training_packages(device_folder):
    blocked = ["torch", "transformers", "onnx", "onnx_ir", "accelerate", "huggingface_hub", "gguf"]
    done = run(
        blocked,
        "run",
        device_folder / "export",
        "Who are you?",
        "-a",
        device_folder / "first.safetensors",
        "--max-tokens",
        5,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_no_onnxruntime_names_the_two_extras(device_folder):
    done = run(["onnxruntime"], "run", device_folder / "export", "Who are you?")
    assert done.returncode == 1
    assert "reft-edge[cpu]" in done.stderr
    assert "reft-edge[cuda]" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("torch", ["train", "{hf}", "{hf}/config.json", "-o", "x.safetensors"], "reft-edge[train]"),
        ("optuna", ["tune", "{hf}", "{hf}/config.json", "-o", "x.safetensors"], "reft-edge[tune]"),
        ("torch", ["convert", "{hf}", "-o", "x.safetensors"], "reft-edge[train]"),
        ("onnx_ir", ["export", "{hf}", "-o", "x"], "reft-edge[export]"),
        ("onnxruntime_genai", ["export", "{hf}", "-o", "x"], "reft-edge[export]"),
        ("llguidance", ["run", "{export}", "Hi", "--json-schema", "{schema}"], "reft-edge[structured]"),
        ("optimum", ["export", "{hf}", "-o", "x", "--exporter", "optimum"], "reft-edge[optimum]"),
        ("onnx_ir", ["add-ports", "{hf}/x.onnx", "-o", "x", "--model", "{hf}"], "reft-edge[export]"),
    ],
)
def test_a_missing_extra_is_named(device_folder, tmp_path, missing, arguments, extra):
    (schema := tmp_path / "schema.json").write_text('{"type": "object"}')
    names = {"hf": device_folder / "hf", "export": device_folder / "export", "schema": schema}
    done = run([missing], *(argument.format(**names) for argument in arguments))
    assert done.returncode == 1
    assert extra in done.stderr.replace("\n", "")
    assert "Traceback" not in done.stderr
