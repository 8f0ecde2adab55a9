"""The `reft-edge` command: its parts are in `reft_edge.commands`, whose heavy imports happen when they run."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from reft_edge import __version__
from reft_edge.commands.add_ports import add_ports
from reft_edge.commands.bench import bench
from reft_edge.commands.chat import chat
from reft_edge.commands.compare import compare
from reft_edge.commands.console import fail, say
from reft_edge.commands.convert import convert
from reft_edge.commands.demo import demo
from reft_edge.commands.devices import devices
from reft_edge.commands.evaluate import evaluate_task
from reft_edge.commands.export import export
from reft_edge.commands.inspect import inspect
from reft_edge.commands.list import list_adapters
from reft_edge.commands.merge import merge
from reft_edge.commands.pack import pack
from reft_edge.commands.pull import pull
from reft_edge.commands.push import push
from reft_edge.commands.rollback import rollback
from reft_edge.commands.run import run
from reft_edge.commands.serve import serve
from reft_edge.commands.shrink import shrink
from reft_edge.commands.signing import keygen, sign, verify
from reft_edge.commands.streams import clean_streams
from reft_edge.commands.train import train
from reft_edge.commands.train_many import train_many
from reft_edge.commands.tune import tune
from reft_edge.errors import ReftEdgeError
from reft_edge.terminal import printable


class _Commands(TyperGroup):
    """The commands, whose outputs are clean streams from the first word to the last."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they are made of control characters
        with clean_streams():
            try:
                return super().main(*arguments, **options)
            except ReftEdgeError as error:
                fail(error)
            except Exception:
                traceback.print_exc()
            sys.exit(1)

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _printable_usage_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, *arguments: Any, **options: Any) -> Any:
        with _printable_usage_errors():
            return super().invoke(*arguments, **options)


@contextmanager
def _printable_usage_errors() -> Iterator[None]:
    """Typer prints these itself. Arguments may be the names of files, so they may hold anything."""
    try:
        yield
    except Exception as error:
        if isinstance(message := getattr(error, "message", None), str):
            error.message = printable(message)  # type: ignore[attr-defined]
        raise


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Train ReFT adapters, export the frozen model once to ONNX, and swap kilobyte-sized adapters at run time.",
    epilog="Start with `reft-edge demo`: the whole way on a real model, in a few minutes on a laptop.",
)


def _version(value: bool) -> None:
    if value:
        say(f"reft-edge {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    # What Ctrl-C cleans up, `kill` and a closed terminal do, too; under nohup the latter stays ignored.
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


_COMMANDS: tuple[tuple[str, str, Callable[..., None], str], ...] = (
    ("Make", "train", train, "train smollm2 rows.jsonl -o task.safetensors --epochs 10"),
    ("Make", "tune", tune, "tune smollm2 rows.jsonl -o best.safetensors --budget 20m"),
    ("Make", "train-many", train_many, "train-many tasks.toml"),
    ("Make", "export", export, "export smollm2 -o smol/ --precision int4"),
    ("Make", "add-ports", add_ports, "add-ports model_onnx/model.onnx -o ported/ --model MODEL"),
    ("Make", "merge", merge, "merge a.safetensors:0.7 b.safetensors:0.3 -o ab.safetensors"),
    (
        "Make",
        "convert",
        convert,
        "convert pyreft_out/ --model smollm2 --positions f7+l7 --act-fn linear --chat -o task.safetensors",
    ),
    ("Use", "run", run, 'run smol/ "Who are you?" --adapter emoji.safetensors:0.8'),
    ("Use", "eval", evaluate_task, "eval smol/ test.jsonl --adapter task.safetensors --records task.jsonl"),
    ("Use", "compare", compare, "compare base.jsonl task.jsonl"),
    ("Use", "inspect", inspect, "inspect task.safetensors --model smollm2 --data rows.jsonl -o report.html"),
    ("Use", "serve", serve, "serve smol/ --adapters tasks/"),
    ("Use", "chat", chat, "chat smol/ --adapters tasks/"),
    ("Use", "bench", bench, "bench smol/ --json"),
    ("Use", "devices", devices, "devices"),
    ("Use", "pack", pack, "pack emoji.safetensors --for smol/ -o emoji.onnx_adapter"),
    ("Use", "shrink", shrink, "shrink task.safetensors -o small.safetensors --precision fp16"),
    ("Trust", "keygen", keygen, "keygen fleet.key --expires 730d"),
    ("Trust", "sign", sign, "sign task.safetensors --key fleet.key --expires 365d"),
    ("Trust", "verify", verify, "verify task.safetensors --trusted trusted.keys"),
    ("Ship", "push", push, "push task.safetensors oci://registry.example.com/fleet/task"),
    ("Ship", "pull", pull, "pull https://example.com/adapters/ task --store tasks/"),
    ("Ship", "list", list_adapters, "list tasks/"),
    ("Ship", "rollback", rollback, "rollback tasks/ task"),
    ("Start here", "demo", demo, "demo"),
)
"""Panel of the help, name, function, and an example, in the help's order."""

for _panel, _name, _command, _example in _COMMANDS:
    app.command(_name, rich_help_panel=_panel, epilog=f"Example: `reft-edge {_example}`")(_command)
