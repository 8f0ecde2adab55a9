"""`tune --ray` on a cluster of two nodes on this machine."""

import sys

import pytest

import reft_edge
from reft_edge.errors import ReftEdgeError
from reft_edge.files import sha256_of

ROWS = [
    {
        "prompt": f"Question {i}?" * (4 + i % 3),  # f1 edits at most half of a prompt
        "completion": ["I am well.", "ice melts", "the lazy dog", "thank you"][i % 4],
    }
    for i in range(32)
]
QUICK = {"max_steps": 4, "batch_size": 8, "dtype": "fp32", "seed": 3}


def test_without_ray_the_extra_is_named(device_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ReftEdgeError, match=r"pip install 'reft-edge\[ray\]'"):
        reft_edge.tune(device_folder / "hf", ROWS, tmp_path / "a.safetensors", ray="auto", **QUICK)


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    ray.init(address=cluster.address, log_to_driver=False)  # at the head, which stays
    node = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    cluster.wait_for_nodes()
    yield cluster, node
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.ray
def test_trials_run_on_both_nodes_and_the_best_is_kept(cluster, device_folder, tmp_path):
    output = tmp_path / "best.safetensors"
    found = reft_edge.tune(device_folder / "hf", ROWS, output, trials=6, ray=cluster[0].address, **QUICK)
    assert len(found.tried) == 6
    done = [one for one in found.tried if one.state == "done"]
    assert found.best.loss == min(one.loss for one in done)
    assert sha256_of(output) == found.best.sha256
    assert found.check.loss == pytest.approx(found.best.loss, rel=1e-4)
    assert found.default is not None
    here = reft_edge.tune(device_folder / "hf", ROWS, tmp_path / "a.safetensors", trials=1, **QUICK)
    assert here.default.loss == pytest.approx(found.default.loss, rel=1e-4)


@pytest.mark.ray
def test_a_node_that_is_lost_loses_no_trial(cluster, device_folder, tmp_path):
    cluster, node = cluster
    killed = []

    def on_trial(tried):
        if not killed:
            killed.append(tried.number)
            cluster.remove_node(node, allow_graceful=False)

    found = reft_edge.tune(
        device_folder / "hf",
        ROWS,
        tmp_path / "best.safetensors",
        trials=5,
        ray=cluster.address,
        on_trial=on_trial,
        **QUICK,
    )
    assert len(found.tried) == 5
    assert all(one.state in ("done", "worse") for one in found.tried)


@pytest.mark.ray
def test_a_process_that_is_not_in_a_cluster_joins_it_for_the_search(cluster, device_folder, tmp_path):
    import ray

    ray.shutdown()
    arguments = (device_folder / "hf", ROWS, tmp_path / "a.safetensors")
    for address in ("127.0.0.1:1", "127.0.0.1:99999999"):
        with pytest.raises(ReftEdgeError, match="there is no Ray cluster at 127"):
            reft_edge.tune(*arguments, ray=address, trials=1, **QUICK)
    found = reft_edge.tune(*arguments, ray=cluster[0].address, trials=1, **QUICK)
    assert found.best.default
    assert not ray.is_initialized()
