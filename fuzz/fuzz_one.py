"""Fuzz one target with libFuzzer's options, or run one input: python fuzz/fuzz_one.py TARGET CORPUS|FILE [-max_total_time=60 ...]."""

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))
with atheris.instrument_imports(include=["reft_edge"]):
    from harness import attempt
    from mutate import FRAMES, mutator
    from targets import make_target


def libfuzzers(content: bytes, limit: int) -> bytes:
    """A mutation of libFuzzer's own; `atheris.Mutate` of 3.0 asks another module, which is not the one that fuzzes."""
    from atheris.core_with_libfuzzer import Mutate

    return Mutate(content, limit)


def main() -> None:
    name, corpus = sys.argv[1:3]
    target = make_target(name)
    if not Path(corpus).is_file():
        Path(corpus).mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(target.seeds):
            (Path(corpus) / f"seed-{number}").write_bytes(seed)
    options = {}
    if name in FRAMES:
        options["custom_mutator"] = mutator(FRAMES[name], libfuzzers)
    atheris.Setup(
        [sys.argv[0], *sys.argv[2:]], lambda content: attempt(target.read, content) and None, **options
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
