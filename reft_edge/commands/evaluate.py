"""`reft-edge eval`: accuracy on the rows of a file."""

from pathlib import Path
from typing import Annotated

import typer

from reft_edge.commands.console import (
    extra,
    plain_errors,
    print_json,
    progress_bar,
    say,
    split_scale,
    trusted_keys,
)
from reft_edge.commands.options import (
    MOST_SEED,
    Adapters,
    Columns,
    Config,
    Json,
    RequireSigned,
    TestSplit,
    Threads,
)


def evaluate_task(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|DIR",
            show_default=False,
            help="A model as for train (PyTorch), or a folder that `reft-edge export` wrote (ONNX Runtime).",
        ),
    ],
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            show_default=False,
            help="Rows: a JSONL, JSON, CSV or Parquet file, or a dataset of the Hub (hub:OWNER/NAME). Their columns are prompt "
            "and answer, with choices too, text and label, or as for train.",
        ),
    ],
    adapter: Adapters = None,
    split: TestSplit = None,
    config: Config = None,
    columns: Columns = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="choice (the likeliest), number (the last one of a generated text), answer (what it says after "
            '"the correct answer is") or label.',
            show_default="as the rows tell",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.", show_default=False)] = None,
    raw: Annotated[
        bool | None,
        typer.Option(
            "--raw/--chat",
            help="Prompts as they stand, or through the chat template.",
            show_default="as the adapter was trained",
        ),
    ] = None,
    template: Annotated[
        str,
        typer.Option(help="What a decoder is asked for a labelled text; holds {text}, {text2} for pairs."),
    ] = "{text}",
    word: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL=WORD",
            show_default=False,
            help="How a decoder says a label, spaces included; once a label.",
        ),
    ] = None,
    whole: Annotated[
        bool, typer.Option("--sum", help="Compare choices by their whole likelihood, not its mean a token.")
    ] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens to generate.", show_default="256 for number, 32 for answer"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that run together.")] = 8,
    records: Annotated[
        Path | None,
        typer.Option(help="Write what became of every row, for `compare`.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of the bootstrap.")] = 0,
    require_signed: RequireSigned = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu or cuda; for an exported folder also others that `reft-edge devices` lists.",
            show_default="cuda if there is one",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="A PyTorch model's arithmetic: fp32, bf16, or auto (bf16 where there is).")
    ] = "fp32",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure the accuracy of a model, with or without adapters, on the rows of DATA."""
    from reft_edge.commands.screen import Screen

    console = Screen(stderr=True)
    with plain_errors(), extra("train"):
        from reft_edge.evaluation.results import save_records
        from reft_edge.evaluation.run import EvalSettings, evaluate_any
        from reft_edge.evaluation.tasks import load_questions, parse_words
        from reft_edge.files import check_apart, check_place
        from reft_edge.rows.given import TESTS, parse_columns, row_source
        from reft_edge.rows.source import file_of

        settings = EvalSettings(
            raw=raw,
            template=template,
            words=parse_words(word or []),
            batch_size=batch_size,
            max_tokens=max_tokens,
            normalise=not whole,
            seed=seed,
            device=device,
            dtype=dtype,
            threads=threads,
            trusted=trusted_keys(require_signed),
        )
        adapters = [split_scale(given) for given in adapter or []]
        source = row_source(data, split, config, parse_columns(columns), TESTS, limit)
        if records is not None:
            check_apart(records, file_of(source), *(path for path, _ in adapters))
            check_place(records)
        questions = load_questions(source, task, limit)
        console.say(str(questions.read))
        with progress_bar(console, "answering", len(questions.rows)) as on_done:
            found = evaluate_any(model, questions, adapters, settings, on_done, console.say)
        if records is not None:
            save_records(found.records, records)
    if as_json:
        read = None if questions.read is None else vars(questions.read)
        print_json(
            {**{name: value for name, value in vars(found).items() if name != "records"}, "data": read}
        )
        return
    say(
        f"accuracy {found.accuracy:.4f}, 95 % interval {found.low:.4f} to {found.high:.4f}: "
        f"{found.right:,} of {found.rows:,} rows right, task {found.task}, {found.seconds:,.1f} s"
    )
    if found.unread:
        say(f"{found.unread:,} of {found.rows:,} rows gave no answer that could be read; they count as wrong")
