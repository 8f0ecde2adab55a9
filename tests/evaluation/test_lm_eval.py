"""lm-evaluation-harness gives the accuracy that `reft-edge eval` gives: by its own model, and over the server.

The harness is no part of the extra `dev`: pip install 'reft-edge[lm-eval]'
"""

import json
import math
import socket
import threading
import time
from contextlib import contextmanager

import pytest
import uvicorn

from reft_edge.runtime import SteeredModel
from reft_edge.runtime.serving.app import create_app
from reft_edge.runtime.serving.served import ServerSettings

pytestmark = pytest.mark.peers
lm_eval = pytest.importorskip("lm_eval")

THINGS = ["ice", "water", "a fox", "a lazy dog", "the day"]
CHOICES = [" is warm", " is cold when it melts", " jumps"]
TASK = """\
task: own_choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: "{rows}"
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    rows = [
        {"prompt": f"Number {number}: {thing}", "choices": CHOICES, "answer": (number + at) % 3}
        for number in range(6)
        for at, thing in enumerate(THINGS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"))
    return folder


def harness(model, arguments, folder, monkeypatch):
    """The harness's accuracy, and the log-likelihoods of every row's choices."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=["own_choices"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"]["own_choices"], key=lambda sample: sample["doc_id"])
    return found["results"]["own_choices"]["acc,none"], [
        [float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples
    ]


@pytest.mark.parametrize("adapter", [None, "everywhere"])
def test_all_give_one_accuracy(device_folder, rows, monkeypatch, adapter):
    import reft_edge.lm_eval

    export = device_folder / "export"
    file = None if adapter is None else device_folder / f"{adapter}.safetensors"
    files = [] if file is None else [file]
    own = reft_edge.evaluate(export, rows / "rows.jsonl", *files, raw=True, normalise=False)
    scores = [list(record.scores.values()) for record in own.records]
    arguments = {"folder": str(export), **({} if file is None else {"adapter": str(file)})}
    accuracy, likelihoods = harness("reft-edge", arguments, rows, monkeypatch)
    assert accuracy == pytest.approx(own.accuracy)
    assert likelihoods == [pytest.approx(row, abs=1e-3) for row in scores]
    if adapter is not None:
        return  # the server is not told where a prompt ends, and so edits another place
    with served(export) as url:
        arguments = {"model": "tiny", "base_url": url, "tokenizer": str(export), "max_length": 256}
        accuracy, likelihoods = harness("local-completions", arguments, rows, monkeypatch)
    assert accuracy == pytest.approx(own.accuracy)
    assert likelihoods == [pytest.approx(row, abs=1e-3) for row in scores]


@contextmanager
def served(export):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = create_app(export, None, ServerSettings("tiny"), "cpu")
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}/v1/completions"
    finally:
        server.should_exit = True
        thread.join()


def test_texts_are_written_and_scored(device_folder):
    from lm_eval.api.instance import Instance

    from reft_edge.lm_eval import ReftEdgeLM

    lm = ReftEdgeLM(str(device_folder / "export"), max_gen_toks=6)
    model = SteeredModel(device_folder / "export", device="cpu")

    def ask(kind, *arguments):
        return [Instance(kind, {}, arguments, 0)]

    expected = model.generate("Water boils", raw=True, max_tokens=6)
    assert lm.generate_until(ask("generate_until", "Water boils", {})) == [expected]
    stopped = lm.generate_until(
        ask("generate_until", "Water boils", {"until": [expected[2]], "max_gen_toks": 5})
    )
    assert expected.startswith(stopped[0])
    assert len(stopped[0]) < len(expected)
    long = "Water boils when it is hot. " * 40
    [score] = lm.loglikelihood_rolling(ask("loglikelihood_rolling", long))
    assert -math.inf < score < 0
    [(score, greedy)] = lm.loglikelihood(ask("loglikelihood", "Water boils", expected))
    assert score < 0
    assert isinstance(greedy, bool)
    assert lm.loglikelihood(ask("loglikelihood", long, expected))[0][0] < 0
