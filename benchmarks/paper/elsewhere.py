"""Cells of a library that needs an environment of its own: one process of worker.py trains and answers."""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from worker import Job

WORKER = Path(__file__).parent.parent / "training/worker.py"
Tests = dict[str, dict[str, Any]]


def made_by(python: str, job: Job, tests: Tests, device: str) -> dict[str, Any]:
    """`losses`, `parameters`, and for each test its answers' token ids or its options' likelihoods, under `tests`.

    Raises RuntimeError with the last line that the process wrote if it fails.
    """
    generated = {name: test["asked"] for name, test in tests.items() if "asked" in test}
    whole = job | {
        "threads": torch.get_num_threads(),
        "device": device,
        "questions": {name: test["questions"] for name, test in tests.items() if "questions" in test},
        "asked": together(generated),
        "paced": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "job.json", Path(folder) / "result.json"
        given.write_text(json.dumps(whole), encoding="utf-8")
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [python, str(WORKER), str(given), str(found)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
        result = json.loads(found.read_text(encoding="utf-8"))
    answers = iter(result.get("answers", ()))
    asked = {name: [next(answers) for _ in test["prompts"]] for name, test in generated.items()}
    likelihoods = {name: result[name] for name in whole["questions"]}
    return {"losses": result["losses"], "parameters": result["parameters"], "tests": asked | likelihoods}


def together(generated: Tests) -> dict[str, Any] | None:
    """The prompts of several tests as those of one. Raises ValueError if their answers may not be of one length."""
    if not generated:
        return None
    if len({test["max_tokens"] for test in generated.values()}) > 1:
        raise ValueError(f"answers of {', '.join(generated)} have different limits")
    prompts = [prompt for test in generated.values() for prompt in test["prompts"]]
    return next(iter(generated.values())) | {"prompts": prompts}
