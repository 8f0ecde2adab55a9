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
_FIGURES = ("number_of_executed_units", "average_exec_per_sec", "slowest_unit_time_sec", "peak_rss_mb")


def fuzz(name: str, seconds: int, seed: int) -> tuple[dict[str, str], list[Path], str]:
    """Figures, findings and the log's end of one target's run."""
    found, corpus = HERE / "found" / name, HERE / "corpus" / name
    found.mkdir(parents=True, exist_ok=True)
    known = set(found.iterdir())
    options = [
        f"-max_total_time={seconds}",
        f"-timeout={SECONDS}",
        "-rss_limit_mb=2048",
        "-max_len=16384",
        "-print_final_stats=1",
        f"-artifact_prefix={found}/",
        f"-seed={seed}",
    ]
    cases = HERE.parent / "tests/fuzz_cases" / name
    run = subprocess.run(
        [sys.executable, HERE / "fuzz_one.py", name, corpus, *([cases] if cases.is_dir() else []), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    figures = dict(re.findall(r"stat::(\w+):\s+(\d+)", run.stdout))
    coverage = re.findall(r"cov: (\d+)", run.stdout)
    figures["cov"] = coverage[-1] if coverage else "0"
    new = sorted(set(found.iterdir()) - known)
    if run.returncode and not new:
        return figures, [Path("(the fuzzer itself stopped)")], run.stdout[-3000:]
    return figures, new, run.stdout[-3000:]


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
    print(
        f"{'target':14}{'executions':>12}{'a second':>10}{'coverage':>10}{'slowest, s':>12}{'peak, MB':>10}  findings"
    )
    failed = False
    for name in names:
        figures, new, log = fuzz(name, seconds, given.seed)
        runs, speed, slowest, peak = (figures.get(figure, "?") for figure in _FIGURES)
        findings = ", ".join(path.name for path in new) or "none"
        print(
            f"{name:14}{runs:>12}{speed:>10}{figures['cov']:>10}{slowest:>12}{peak:>10}  {findings}",
            flush=True,
        )
        if new:
            failed = True
            print(log, flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
