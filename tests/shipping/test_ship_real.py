"""Programs of others: the `oras` client from PyPI, and the CNCF Distribution registry from Debian, where it can be had."""

import os
import shutil
import socket
import subprocess
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from reft_edge.adapter.file import save_adapter
from reft_edge.shipping.oci import LAYER
from tests.adapter.test_algebra import make_adapter
from tests.commands.test_cli import call
from tests.helpers.servers import Registry

pytestmark = pytest.mark.real

ORAS = """
import sys
import oras.client
verb, host, target, *rest = sys.argv[1:]
client = oras.client.OrasClient(hostname=host, insecure=True)
if verb == "pull":
    print(client.pull(target=f"{host}/{target}", outdir=rest[0])[0])
else:
    assert client.push(target=f"{host}/{target}", files=rest).status_code == 201
"""


@pytest.fixture(scope="module")
def oras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the client."""
    folder = tmp_path_factory.mktemp("oras")
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "oras>=0.2.20"], check=True)
    return python


@contextmanager
def distribution(folder: Path) -> Iterator[str]:
    program = shutil.which("docker-registry") or shutil.which("registry")
    if program is None:
        if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
            pytest.skip("no registry program, and no Debian to take one from")
        got = subprocess.run(
            ["apt-get", "download", "docker-registry"], cwd=folder, capture_output=True, text=True
        )
        if got.returncode:
            pytest.skip(f"Debian's docker-registry could not be had: {got.stderr[-200:]}")
        subprocess.run(["dpkg", "-x", next(folder.glob("*.deb")), folder / "unpacked"], check=True)
        program = str(folder / "unpacked/usr/bin/docker-registry")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = folder / "config.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem: {{rootdirectory: {folder}/data}}\n"
        f"http:\n  addr: 127.0.0.1:{port}\n"
    )
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([program, "serve", config], stdout=log, stderr=log)
        try:
            end = time.monotonic() + 20
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    assert time.monotonic() < end, (folder / "log").read_text()
                    time.sleep(0.05)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


@contextmanager
def stand_in(folder: Path) -> Iterator[str]:
    with Registry().running() as server:
        yield server.url.removeprefix("http://")


@pytest.mark.parametrize("registry", [stand_in, distribution])
def test_oras_and_push_and_pull_understand_each_other(registry, oras, tmp_path, monkeypatch):
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    task, store = tmp_path / "task.safetensors", tmp_path / "store"
    save_adapter(make_adapter("loreft", 1), task)
    (tmp_path / "registry").mkdir()
    with registry(tmp_path / "registry") as host:

        def client(*arguments: str) -> str:
            command = [oras, "-c", ORAS, arguments[0], host, *arguments[1:]]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ})
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        call("push", task, f"oci://{host}/fleet/task")
        pulled = Path(client("pull", "fleet/task:1", str(tmp_path / "out")))
        assert pulled.name == "task.safetensors"
        assert pulled.read_bytes() == task.read_bytes()
        save_adapter(make_adapter("loreft", 2), task)
        client("push", "fleet/task:2", f"{task.name}:{LAYER}")
        assert "installed version 1" in call("pull", f"oci://{host}/fleet/task", "-s", store).stdout
        assert "installed version 2" in call("pull", f"oci://{host}/fleet/task:2", "-s", store).stdout
        assert (store / task.name).read_bytes() == task.read_bytes()
        save_adapter(make_adapter("loreft", 3), task)
        assert "task version 3" in call("push", task, f"oci://{host}/fleet/task").stdout
        assert "installed version 3" in call("pull", f"oci://{host}/fleet/task", "-s", store).stdout
