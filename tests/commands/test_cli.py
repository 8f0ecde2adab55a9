"""The command line as users type it, on tiny models."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reft_edge.adapter.file import load_adapter
from reft_edge.cli import app
from reft_edge.commands.console import split_scale
from reft_edge.errors import ReftEdgeError
from reft_edge.terminal import printable

COMMANDS = (
    "train",
    "tune",
    "train-many",
    "export",
    "add-ports",
    "merge",
    "convert",
    "run",
    "chat",
    "serve",
    "bench",
    "devices",
    "eval",
    "compare",
    "inspect",
    "pack",
    "push",
    "pull",
    "list",
    "rollback",
    "demo",
)
runner = CliRunner()


def call(*arguments: object, ok: bool = True, **options):
    result = runner.invoke(app, [str(argument) for argument in arguments], **options)
    assert (result.exit_code == 0) == ok, result.output
    assert "Traceback" not in result.output
    if result.exception is not None:
        assert isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def hf(device_folder) -> Path:
    return device_folder / "hf"


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text(
        "\n".join(json.dumps({"prompt": f"Who {i}?", "completion": "ice melts"}) for i in range(6))
    )
    return path


def test_the_whole_way(hf, rows, tmp_path):
    adapter, folder = tmp_path / "task.safetensors", tmp_path / "smol"
    trained = call(
        "train",
        hf,
        rows,
        "-o",
        adapter,
        "--max-steps",
        150,
        "--lr",
        0.03,
        "--batch-size",
        6,
        "--positions",
        "f3+l3",
        "--eval",
        rows,
    )
    assert f"wrote {adapter}" in trained.stdout
    assert "of the base's" in trained.stdout
    assert "held-out loss" in trained.stdout
    exported = call("export", hf, "-o", folder)
    assert "ports at 3 layers" in exported.stdout
    assert "bitwise equal" in exported.stdout
    base = call("run", folder, "Who 2?", "--max-tokens", 12).stdout
    steered = call("run", folder, "Who 2?", "--max-tokens", 12, "--adapter", adapter).stdout
    assert steered.startswith("ice melts")
    assert base != steered
    assert call("run", folder, "Who 2?", "--max-tokens", 12, "--adapter", f"{adapter}:0").stdout == base
    half = json.loads(
        call(
            "run",
            folder,
            "Who 2?",
            "--max-tokens",
            12,
            "-a",
            f"{adapter}:0.5",
            "-a",
            f"{adapter}:0.5",
            "--json",
        ).stdout
    )
    assert printable(half["text"]) + "\n" == steered
    assert half["finish_reason"] in ("stop", "length")
    packed = call("pack", adapter, "--for", folder, "-o", tmp_path / "task.onnx_adapter")
    assert "wrote" in packed.stdout
    assert (tmp_path / "task.onnx_adapter").stat().st_size > 1000


def test_json_of_train_and_export(hf, rows, tmp_path):
    result = json.loads(
        call(
            "train",
            hf,
            rows,
            "-o",
            tmp_path / "a.safetensors",
            "--max-steps",
            2,
            "--json",
            "--group-by-length",
            "--start",
            "unchanged",
        ).stdout
    )
    assert result["path"] == str(tmp_path / "a.safetensors")
    assert load_adapter(tmp_path / "a.safetensors").config.training["group_by_length"] is True
    assert load_adapter(tmp_path / "a.safetensors").config.training["start"] == "unchanged"
    assert result["parameters"] == load_adapter(tmp_path / "a.safetensors").num_parameters
    result = json.loads(call("export", hf, "-o", tmp_path / "e", "--layers", "0-1", "--json").stdout)
    assert result["layers"] == [0, 1]
    assert result["verification"]["rank0_bitwise"] is True


def test_quicker_passes_have_switches(hf, rows, tmp_path):
    off = ("--no-shared-prefix", "--all-tokens", "--frozen-cache", 0)
    losses = [
        json.loads(
            call(
                "train", hf, rows, "-o", tmp_path / name, "--layers", 2, "--max-steps", 3, "--json", *options
            ).stdout
        )["loss"]
        for name, options in (("plain", off), ("quick", ()), ("mapped", ("--frozen-cache-in", tmp_path)))
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mapped", "plain", "quick"]


def test_raw_training_runs_raw(hf, rows, device_folder, tmp_path):
    call("train", hf, rows, "-o", tmp_path / "raw.safetensors", "--raw", "--max-steps", 1)
    assert load_adapter(tmp_path / "raw.safetensors").config.prompt_format == "raw"

    def prompt_tokens(*options):
        return json.loads(
            call("run", device_folder / "export", "Who 2?", "--max-tokens", 1, "--json", *options).stdout
        )["prompt_tokens"]

    raw = prompt_tokens("--raw")
    assert prompt_tokens("-a", tmp_path / "raw.safetensors") == raw < prompt_tokens()
    assert prompt_tokens("-a", tmp_path / "raw.safetensors", "--chat") == prompt_tokens()


def test_prompt_from_standard_input_stop_and_stats(device_folder):
    folder = device_folder / "export"
    whole = call("run", folder, "-", "--max-tokens", 10, input="Who are you?").stdout
    assert whole == call("run", folder, "Who are you?", "--max-tokens", 10).stdout
    stopped = call("run", folder, "Who are you?", "--max-tokens", 10, "--stop", whole[3:5], "--stats")
    assert stopped.stdout.rstrip("\n") == whole[: whole.index(whole[3:5])]
    assert "tokens at" in stopped.stderr
    sampled = [
        call("run", folder, "Hi", "--temperature", 2, "--seed", 3, "--max-tokens", 8).stdout for _ in range(2)
    ]
    assert sampled[0] == sampled[1]


def test_guessing_tokens_changes_no_answer(device_folder):
    ask = ("run", device_folder / "export", "Who are you? Who are you?", "--max-tokens", 40)
    plain = call(*ask, "--no-speculate").stdout
    assert call(*ask, "--speculate").stdout == call(*ask).stdout == plain
    small = (*ask, "--cache-type", "int8")
    assert call(*small).stdout == call(*small, "--no-speculate").stdout
    wrong = call(*ask, "--cache-type", "int2", ok=False).stderr
    assert "choose one of auto, int8" in wrong.replace("\n", " ")
    encoder = call("run", device_folder / "encoder", "A", "--speculate", ok=False)
    assert "--speculate is for models that continue text" in encoder.stderr.replace("\n", " ")


def test_run_holds_an_answer_to_a_json_schema(device_folder, tmp_path):
    pytest.importorskip("llguidance")
    schema = tmp_path / "schema.json"
    schema.write_text(
        '{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],'
        ' "additionalProperties": false}'
    )
    ask = ("run", device_folder / "export", "Who are you?", "--json-schema", schema)
    assert json.loads(call(*ask).stdout)["a"] in (1, 2)
    whole = json.loads(call(*ask, "--json").stdout)
    assert whole["finish_reason"] == "stop"
    assert json.loads(whole["text"])["a"] in (1, 2)
    assert "the answer was cut after 2 tokens: raise --max-tokens" in call(*ask, "--max-tokens", 2).stderr
    for text, message in (
        ('{"properties": {"a": {"type": "int"}}}', "not usable at properties.a: Invalid type: int"),
        ("[1]", "is not a JSON object"),
        ("{", "is not valid JSON"),
    ):
        schema.write_text(text)
        assert message in call(*ask, ok=False).stderr.replace("\n", "")


def test_chat_reads_lines_and_switches(device_folder):
    lines = "Who are you?\n/adapter everywhere\nWho are you?\n"
    options = ["--max-tokens", 8, "--adapters", device_folder, "--system", "Be brief."]
    answers = call("chat", device_folder / "export", *options, input=lines).stdout.splitlines()
    assert len(answers) >= 2
    first = call(
        "chat",
        device_folder / "export",
        *options,
        "-a",
        f"{device_folder}/everywhere.safetensors:0.5",
        input="/adapters\n",
    ).stdout
    assert "* everywhere" in first
    assert call("chat", device_folder / "export", "--adapters", "/nowhere", ok=False).exit_code == 1


def test_bench_measures(device_folder):
    options = ["--prompt-tokens", 32, "--new-tokens", 4, "--repeats", 1, "--rank", 2]
    found = json.loads(call("bench", device_folder / "export", *options, "--json").stdout)
    assert found["base"]["decode_tokens_per_second"] > 0
    assert found["steered"]["time_to_first_token"] > 0
    assert 0 < found["switch_p50"] <= found["switch_p99"] < found["load_p50"] * 10
    assert found["peak_memory"] > 10**7
    table = call(
        "bench", device_folder / "export", *options, "-a", device_folder / "first.safetensors"
    ).stdout
    assert "decode, tokens/s" in table
    too_long = call("bench", device_folder / "export", "--prompt-tokens", 300, ok=False)
    assert "this model's context is 256" in " ".join(too_long.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere", "hi"], "nowhere is not an exported model"),
        (["run", "{export}", "hi", "-a", "missing.safetensors"], "cannot read adapter missing.safetensors"),
        (["run", "{export}", "hi", "-a", "{first}:strong"], "cannot read the scale 'strong'"),
        (["run", "{export}", "hi", "--top-p", "3"], "top_p is 3.0"),
        (["run", "{export}", "hi", "--device", "tpu"], "unknown device 'tpu'"),
        (["export", "{export}", "-o", "x"], "this is an exported folder"),
        (["export", "./nothing", "-o", "x"], "there is no model at ./nothing"),
        (["export", "nothing.gguf", "-o", "x"], "there is no file nothing.gguf"),
        (["export", "{hf}", "-o", "x", "--precision", "int2"], "choose one of fp32, fp16, bf16"),
        (["train", "{hf}", "none.jsonl", "-o", "x.safetensors"], "cannot read none.jsonl"),
        (["train", "{hf}", "{rows}", "-o", "x.safetensors", "--positions", "q"], "positions 'q'"),
        (["train", "{hf}", "{rows}", "-o", "no/such/x.safetensors"], "does not exist"),
        (["pack", "{first}", "--for", "nowhere", "-o", "x"], "not an exported model"),
    ],
)
def test_errors_are_one_clear_line(device_folder, rows, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    places = {
        "export": device_folder / "export",
        "hf": device_folder / "hf",
        "rows": rows,
        "first": device_folder / "first.safetensors",
    }
    result = call(*(argument.format(**places) for argument in arguments), ok=False)
    assert result.exit_code == 1
    assert "error: " in result.stderr
    assert message in result.stderr.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_base_names_both_fingerprints(device_folder, tmp_path):
    from reft_edge.model.fingerprint import fingerprint
    from reft_edge.model.loading import load_model
    from reft_edge.model.source import ModelFolder
    from tests.helpers.tiny import make_model
    from tests.helpers.torch_reference import random_adapter

    other = load_model(ModelFolder(make_model(tmp_path / "other", seed=9), "other"))
    random_adapter(other, path=tmp_path / "other.safetensors")
    result = call("run", device_folder / "export", "hi", "-a", tmp_path / "other.safetensors", ok=False)
    assert fingerprint(other) in result.stderr
    assert (
        json.loads((device_folder / "export/reft_edge.json").read_text())["base_fingerprint"] in result.stderr
    )


def test_split_scale(tmp_path):
    assert split_scale("a.safetensors") == (Path("a.safetensors"), 1.0)
    assert split_scale("a.safetensors:0.5") == (Path("a.safetensors"), 0.5)
    assert split_scale("a.safetensors:-2") == (Path("a.safetensors"), -2.0)
    assert split_scale(r"C:\adapters\a.safetensors") == (Path(r"C:\adapters\a.safetensors"), 1.0)
    odd = tmp_path / "b:1"
    odd.write_text("")
    assert split_scale(str(odd)) == (odd, 1.0)
    with pytest.raises(ReftEdgeError, match="cannot read the scale"):
        split_scale("a.safetensors:half")
    for scale in ("nan", "inf", "1e999"):
        with pytest.raises(ReftEdgeError, match="not a finite number"):
            split_scale(f"a.safetensors:{scale}")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    assert "Usage" in call(command, "--help").output


def test_help_names_commands_and_examples():
    text = call("--help").output
    assert all(command in text for command in COMMANDS)
    for command in ("train", "export", "run", "eval", "compare", "inspect", "pack", "merge", "convert"):
        assert f"reft-edge {command} " in call(command, "--help").output
    assert call("--version").output.startswith("reft-edge 0")


def fastest(code: list[str]) -> float:
    """CPU seconds of a new process, which do not depend on what else the machine does."""

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    times = []
    for _ in range(7):
        before = spent()
        subprocess.run([sys.executable, *code], check=True, capture_output=True)
        times.append(spent() - before)
    return min(times)


def test_help_is_instant():
    """About 0.25 s; the limit leaves room for a machine that is busy and slow."""
    assert fastest(["-m", "reft_edge", "--help"]) < 1.2
    code = (
        "import sys; from reft_edge.cli import app; from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print(sorted({'torch', 'transformers', 'onnx', 'onnxruntime', 'optuna', 'ray'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout == "[]\n"


def test_the_runtime_imports_fast_and_without_torch():
    assert fastest(["-c", "import reft_edge.runtime"]) < 1.2
    code = "import sys, reft_edge.runtime; print(sorted({'torch', 'transformers', 'onnx', 'onnx_ir'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        == "[]\n"
    )
