"""Processes of trainings, forked from one that has imported what they need: several as torchrun would start them.

A process's imports are nine tenths of a tiny training's time; torchrun and Accelerate themselves have tests of their own.
"""

import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import CompletedProcess

from tests.helpers.forks import FORKS


def run_ranks(
    count: int, code: Sequence[str], environment: Mapping[str, str], folder: Path, timeout: float = 240
) -> CompletedProcess[str]:
    """`python CODE` in `count` processes; the first that fails ends the others, as torchrun does.

    `code` is a script with its arguments, or `-m`, a module and its arguments. The return code is the first one that is
    not 0, in the order in which the processes ended.
    """
    with socket.socket() as free, tempfile.TemporaryDirectory() as place:
        free.bind(("127.0.0.1", 0))
        group = {
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
        }
        free.close()
        outputs = (Path(place) / "stdout", Path(place) / "stderr")
        ranks = []
        for rank in range(count):
            variables = dict(environment)
            if count > 1:
                variables |= {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            arguments = (list(code), variables, str(folder), tuple(map(str, outputs)))
            ranks.append(FORKS.Process(target=_run, args=arguments))
            ranks[-1].start()
        failed = 0
        running = {rank.sentinel: rank for rank in ranks}
        while running and not failed:
            ended = wait(list(running), timeout)
            assert ended, f"no process of {code} ended in {timeout} s"
            for sentinel in ended:
                failed = failed or running.pop(sentinel).exitcode or 0
        for rank in running.values():
            rank.terminate()
        for rank in ranks:
            rank.join()
        return CompletedProcess(list(code), failed, *(path.read_text() for path in outputs))


def _run(code: list[str], environment: dict[str, str], folder: str, outputs: tuple[str, str]) -> None:
    for descriptor, path in zip((1, 2), outputs, strict=True):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, folder)
    if code[0] == "-m":
        sys.argv = code[1:]
        runpy.run_module(code[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(code)
        runpy.run_path(code[0], run_name="__main__")
