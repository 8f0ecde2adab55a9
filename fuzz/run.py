"""Fuzz every reader of strangers' files, one after the other, and report: python fuzz/run.py --minutes 30

Needs atheris (`pip install -e '.[cpu,dev,fuzz]'`, Linux). Findings are kept in fuzz/found/TARGET and make the run fail; copy
one that is mended to tests/fuzz_cases/TARGET, where it stays a test.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

from harness import MEMORY, SECONDS
from targets import TARGETS

HERE = Path(__file__).parent
_FIGURES = ("number_of_executed_units", "slowest_unit_time_sec", "peak_rss_mb")


def fuzz(name: str, seconds: int, seed: int) -> tuple[dict[str, int], list[Path], str]:
    """Figures, findings and the log's end of one target's run."""
    found, corpus, cases = (
        HERE / "found" / name,
        HERE / "corpus" / name,
        HERE.parent / "tests/fuzz_cases" / name,
    )
    found.mkdir(parents=True, exist_ok=True)
    known = set(found.iterdir())
    folders = [corpus, *([cases] if cases.is_dir() else [])]
    total: dict[str, int] = {}
    end = time.monotonic() + seconds
    while True:
        left = max(1, round(end - time.monotonic()))
        run = libfuzzer(
            name, *folders, f"-max_total_time={left}", f"-seed={seed}", f"-artifact_prefix={found}/"
        )
        for figure, value in re.findall(r"stat::(\w+):\s+(\d+)", run.stdout):
            add = figure == "number_of_executed_units"
            total[figure] = (
                int(value) + total.get(figure, 0) if add else max(int(value), total.get(figure, 0))
            )
        total["cov"] = max([total.get("cov", 0), *map(int, re.findall(r"cov: (\d+)", run.stdout))])
        new = sorted(set(found.iterdir()) - known)
        if len(new) == 1 and new[0].name.startswith(("timeout-", "slow-unit-")) and replays(name, new[0]):
            new.pop().unlink()  # the machine stood still, not the reader
            if time.monotonic() < end - 1:
                continue
        elif run.returncode and not new:
            new = [Path("(the fuzzer itself stopped)")]
        return total, new, run.stdout[-3000:]


def replays(name: str, content: Path) -> bool:
    """Whether a reader takes this input without a finding after all."""
    return libfuzzer(name, content, "-runs=1").returncode == 0


def libfuzzer(name: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    limits = [f"-timeout={SECONDS}", "-rss_limit_mb=2048", "-max_len=16384", "-print_final_stats=1"]
    return subprocess.run(
        [sys.executable, HERE / "fuzz_one.py", name, *map(str, arguments), *limits],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30, help="in all")
    parser.add_argument("--only", action="append", choices=list(TARGETS), help="repeatable")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10**6)
    given = parser.parse_args()
    names = given.only or list(TARGETS)
    seconds = max(1, round(60 * given.minutes / len(names)))
    print(
        f"{seconds} s each, at most {SECONDS} s and {MEMORY >> 20} MB beyond the input an execution, seed {given.seed}"
    )
    print(f"{'target':16}{'executions':>12}{'coverage':>10}{'slowest, s':>12}{'peak, MB':>10}  findings")
    failed = False
    for name in names:
        figures, new, log = fuzz(name, seconds, given.seed)
        runs, slowest, peak = (figures.get(figure, 0) for figure in _FIGURES)
        findings = ", ".join(path.name for path in new) or "none"
        print(f"{name:16}{runs:>12,}{figures['cov']:>10}{slowest:>12}{peak:>10}  {findings}", flush=True)
        if new:
            failed = True
            print(log, flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
