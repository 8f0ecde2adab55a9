"""Ray: the server in replicas on two nodes, of which one is killed under load; answers for whole datasets."""

import shutil
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

import reft_edge
from reft_edge.errors import ReftEdgeError
from reft_edge.runtime import SteeredModel
from reft_edge.serving import ray_app
from reft_edge.serving.adapters import local_folder, places

PROMPTS = ["Who are you?", "ice", "The quick brown fox", "Water boils when it is hot"]
HEADER = "x-session-id"


@pytest.fixture(scope="module")
def adapters(device_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("first", "everywhere"):
        shutil.copy(device_folder / f"{name}.safetensors", folder)
    return folder


@pytest.fixture(scope="module")
def known(device_folder, adapters):
    """What the model answers by itself."""
    model = SteeredModel(device_folder / "export", device="cpu", threads=1)
    found = {}
    for name in (None, "first", "everywhere"):
        if name is not None:
            model.load_adapter(adapters / f"{name}.safetensors")
        for prompt in PROMPTS:
            found[prompt, name] = model.generate(prompt, name, raw=True, max_tokens=8)
    return found


def test_without_ray_the_extra_is_named(device_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for call in (lambda: ray_app(device_folder / "export"), lambda: reft_edge.ray_map(None, "smol")):
        with pytest.raises(ReftEdgeError, match=r"pip install 'reft-edge\[ray\]'"):
            call()


def test_adapters_of_a_repository_are_pulled_into_a_folder(device_folder, adapters, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("reft_edge.serving.adapters._SCHEMES", (str(tmp_path),))
    shops = [tmp_path / "one", tmp_path / "other"]
    reft_edge.push(adapters / "first.safetensors", shops[0])
    reft_edge.push(adapters / "everywhere.safetensors", shops[1])
    for _ in range(2):
        folder = local_folder(places(shops), device_folder / "export")
        assert sorted(path.stem for path in folder.glob("*.safetensors")) == ["everywhere", "first"]


def test_places_of_adapters(adapters, tmp_path):
    assert places(None) == ()
    assert places(adapters) == (str(adapters),)
    assert local_folder(places(adapters), tmp_path) == adapters
    assert places("oci://host/a") == ("oci://host/a",)
    with pytest.raises(ReftEdgeError, match="there is no folder"):
        places(tmp_path / "nothing")
    with pytest.raises(ReftEdgeError, match="is no repository"):
        places(["oci://host/a", adapters])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**options, "num_cpus": 2})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def served(cluster, device_folder, adapters):
    """The URL of two replicas, one on each node."""
    from ray import serve

    node = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    cluster.wait_for_nodes()
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port, "location": "HeadOnly"})
    application = ray_app(
        device_folder / "export",
        adapters,
        replicas=2,
        slots=4,
        name="tiny",
        deployment={"max_replicas_per_node": 1, "health_check_period_s": 2},
    )
    serve.run(application, name="reft-edge", route_prefix="/")
    yield f"http://127.0.0.1:{port}", node
    serve.shutdown()


def ask(client, prompt, name, session=None):
    body = {
        "model": "tiny" if name is None else f"tiny:{name}",
        "prompt": prompt,
        "max_tokens": 8,
        "temperature": 0,
    }
    return client.post("/v1/completions", json=body, headers={HEADER: session} if session else {})


@pytest.mark.ray
def test_every_replica_answers_as_the_model_does(served, known):
    with httpx.Client(base_url=served[0], timeout=60) as client:
        for (prompt, name), text in known.items():
            assert ask(client, prompt, name).json()["choices"][0]["text"] == text
        assert ask(client, "ice", "nobody").status_code == 404
        names = {model["id"] for model in client.get("/v1/models").json()["data"]}
        assert names == {"tiny", "tiny:first", "tiny:everywhere"}
        body = {"model": "tiny", "prompt": "ice", "max_tokens": 8, "temperature": 0, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        assert len(lines) > 4


@pytest.mark.ray
def test_a_session_stays_with_its_replica(served):
    def answered(session):
        text = client.get("/metrics", headers={HEADER: session}).text
        [count] = [line for line in text.splitlines() if line.startswith("reft_edge_request_seconds_count")]
        return float(count.split()[1])

    with httpx.Client(base_url=served[0], timeout=60) as client:
        for session in ("anna", "berta", "carl"):
            before = answered(session)
            for _ in range(6):
                assert ask(client, "Who are you?", "first", session).status_code == 200
            assert answered(session) == before + 6


@pytest.mark.ray
def test_a_node_is_killed_under_load_and_no_request_is_lost(cluster, served, known):
    url, node = served
    wanted = list(known.items()) * 25
    killed, retries = threading.Event(), []

    def one(item):
        (prompt, name), text = item
        for _ in range(60):
            try:
                with httpx.Client(base_url=url, timeout=20) as client:
                    answer = ask(client, prompt, name)
                if answer.status_code == 200:
                    return answer.json()["choices"][0]["text"] == text
                assert answer.status_code in (429, 500, 502, 503), answer.text
            except httpx.HTTPError:
                pass
            retries.append(killed.is_set())
            time.sleep(0.5)
        return False

    with ThreadPoolExecutor(6) as clients:
        answers = [clients.submit(one, item) for item in wanted]
        while sum(answer.done() for answer in answers) < 40:
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)
        killed.set()
        assert all(answer.result() for answer in answers)
    assert len(answers) == 300
    print(f"retries after the kill: {sum(retries)}")


@pytest.mark.ray
def test_datasets_are_answered_row_by_row(cluster, device_folder, adapters, known):
    import ray.data

    rows = [
        {"number": number, "prompt": prompt, "adapter": name or ""}
        for number, (prompt, name) in enumerate(known)
    ]
    rows.append({"number": 12, "prompt": "ice", "adapter": "nobody"})
    rows.append({"number": 13, "prompt": "", "adapter": "first"})
    found = reft_edge.ray_map(
        ray.data.from_items(rows),
        device_folder / "export",
        adapter_column="adapter",
        adapters=adapters,
        raw=True,
        max_tokens=8,
        batch_size=5,
        cpus=0.5,
    ).take_all()
    found.sort(key=lambda row: row["number"])
    assert [row["answer"] for row in found[:12]] == list(known.values())
    assert [row["answer_error"] for row in found[:12]] == [None] * 12
    assert "there is no adapter 'nobody'" in found[12]["answer_error"]
    assert "the prompt is empty" in found[13]["answer_error"]
    assert (found[12]["answer"], found[13]["answer"]) == (None, None)


@pytest.mark.ray
def test_adapters_as_files_and_conversations(cluster, device_folder, adapters, known):
    import ray.data

    chat = [{"role": "user", "content": "Who are you?"}]
    rows = ray.data.from_items([{"talk": chat, "file": str(adapters / "first.safetensors")}])
    options = {"prompt_column": "talk", "output_column": "said", "max_tokens": 8, "cpus": 0.5}
    [found] = reft_edge.ray_map(rows, device_folder / "export", adapter_column="file", **options).take_all()
    model = SteeredModel(device_folder / "export", device="cpu", threads=1)
    model.load_adapter(adapters / "first.safetensors")
    assert found["said"] == model.generate(chat, "first", max_tokens=8)
    with pytest.raises(ReftEdgeError, match="the dataset has no column 'prompt'; it has 'talk', 'file'"):
        reft_edge.ray_map(rows, device_folder / "export")
