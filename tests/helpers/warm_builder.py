"""The model builder forked from a process that has imported what it needs, which otherwise takes nine tenths of a tiny
export's time. The command line's own tests start it as users do."""

import os
import sys
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from tests.helpers.forks import FORKS


def start_warm_builder(arguments: Sequence[str], folder: Path) -> "WarmBuilder":
    """In place of `reft_edge.export.build.start_builder`."""
    return WarmBuilder(arguments, folder)


class WarmBuilder:
    """What export uses of a `subprocess.Popen`."""

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        reader, writer = os.pipe()
        self.stdout = os.fdopen(reader, errors="replace")
        self._process = FORKS.Process(target=_build, args=(list(arguments), str(folder), DupFd(writer)))
        self._process.start()
        os.close(writer)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def __enter__(self) -> "WarmBuilder":
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        self._process.join()


def _build(arguments: list[str], folder: str, said: Any) -> None:
    output = said.detach()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.chdir(folder)
    sys.argv = ["builder_process", *arguments]
    from reft_edge.export.builder_process import main

    main()
