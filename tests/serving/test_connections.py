"""Connections that say nothing, too little or too slowly, on real sockets with small limits."""

import contextlib
import json
import resource
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from typer.testing import CliRunner

from reft_edge.cli import app as cli
from reft_edge.errors import ReftEdgeError
from reft_edge.runtime.serving import bodies
from reft_edge.runtime.serving.app import create_app
from reft_edge.runtime.serving.connections import address_of, listen, make_server, most_connections
from reft_edge.runtime.serving.served import ServerSettings

LIMITS = {"most": 6, "head_seconds": 1.0, "write_seconds": 0.4}


@contextlib.contextmanager
def running(device_folder, **settings):
    """The app and the port of a server in a thread."""
    app = create_app(device_folder / "export", None, ServerSettings("tiny", **settings), "cpu")
    sockets, started = listen("127.0.0.1", 0), threading.Event()
    server = make_server(app, 1, app.state.metrics.count, started.set, **LIMITS)
    thread = threading.Thread(target=server.run, args=(sockets,))
    thread.start()
    assert started.wait(30)
    try:
        yield app, sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def connect(port, content=b""):
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(content)
    return connection


def read_to_end(connection):
    """What the server says until it closes the connection, which it must."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            said += part
    return said


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HALF = {
    "nothing": b"",
    "half of a head": HEAD,
    "half of a body": HEAD + b"Content-Length: 100\r\n\r\n{",
    "an answered request and half of another": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET",
}


@pytest.mark.parametrize("said", HALF)
def test_many_connections_that_say_little_lock_nobody_out(device_folder, said):
    with running(device_folder, api_key="k") as (_, port):
        held = [connect(port, HALF[said]) for _ in range(40)]
        for _ in range(3):
            assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        for connection in held:
            connection.close()


@pytest.mark.parametrize("said", ["nothing", "half of a head", "an answered request and half of another"])
def test_a_head_must_come_in_time(device_folder, said):
    with running(device_folder) as (_, port):
        connection = connect(port, HALF[said])
        answer = read_to_end(connection)
        assert answer.startswith(b"HTTP/1.1 200") == said.startswith("an answered")


def test_a_head_must_come_in_time_also_letter_by_letter(device_folder):
    with running(device_folder) as (_, port):
        connection = connect(port)
        connection.setblocking(False)
        for _ in range(100):
            try:
                connection.sendall(b"GET / HTTP/1.1"[:1])
                connection.recv(1)
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                return
            else:
                return
        raise AssertionError("it is still open")


def test_a_body_must_come_in_time(device_folder, monkeypatch):
    monkeypatch.setattr(bodies.Arriving.__init__, "__defaults__", (0.3,))
    with running(device_folder) as (app, port):
        connection = connect(port, HALF["half of a body"])
        assert read_to_end(connection).startswith(b"HTTP/1.1 408")
        counted = {"path": "/v1/completions", "status": "408"}
        assert app.state.metrics.registry.get_sample_value("reft_edge_requests_total", counted) == 1


def test_bodies_under_way_are_bounded_together(device_folder, monkeypatch):
    monkeypatch.setattr(bodies, "AT_ONCE", 2)
    with running(device_folder, max_body=10_000) as (_, port):
        part = HEAD + b"Content-Length: 9000\r\n\r\n" + b"a" * 8000
        held = [connect(port, part) for _ in range(3)]
        assert held[0].recv(4096).startswith(b"HTTP/1.1 408")
        body = {"model": "tiny", "prompt": "ice", "max_tokens": 1}
        assert httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body).status_code == 200
        for connection in held:
            connection.close()


def test_an_answer_that_nobody_reads_ends(device_folder):
    with running(device_folder) as (app, port):
        body = json.dumps(
            {
                "model": "tiny",
                "prompt": ["ice"] * 128,
                "n": 16,
                "max_tokens": 2,
                "stream": True,
                "logprobs": 5,
            }
        )
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
        for _ in range(1200):
            if app.state.metrics.registry.get_sample_value("reft_edge_request_seconds_count"):
                break
            time.sleep(0.05)
        else:
            raise AssertionError("the request is still under way")
        assert app.state.served.engine.running + app.state.served.engine.waiting <= 1


@pytest.mark.parametrize(
    "content",
    [b"\x00\xff\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"],
)
def test_what_is_no_http_is_answered_and_counted(device_folder, content, capfd):
    with running(device_folder) as (app, port):
        assert connect(port, content).recv(4096).startswith(b"HTTP/1.1 400")
        counted = {"path": "other", "status": "400"}
        assert app.state.metrics.registry.get_sample_value("reft_edge_requests_total", counted) == 1
    assert capfd.readouterr().err == ""


def test_paths_that_mean_nothing(device_folder):
    with running(device_folder) as (_, port):
        for path in (
            b"/%00",
            b"/%ff%fe",
            b"/v1/models/%ed%a0%80",
            b"//evil.example/..",
            b"*",
            b"http://[/x",
            b"/v1/models/" + b"a" * 5000,
        ):
            head = b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            answer = read_to_end(connect(port, head))
            assert answer.startswith(b"HTTP/1.1 404"), answer
            assert b'"error":{"message"' in answer


def test_the_port_is_taken_before_the_model_is_loaded(device_folder):
    with contextlib.closing(listen("127.0.0.1", 0)[0]) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(cli, ["serve", str(device_folder / "nowhere"), "--port", str(port)])
        assert result.exit_code == 1
        assert "choose another with --port" in " ".join(result.stderr.split())


@pytest.mark.parametrize("host", ["nowhere.invalid", "a" * 300, "\udcff", "1.2.3.4.5", ".."])
def test_hosts_that_are_none(host):
    with pytest.raises(ReftEdgeError, match="cannot listen on port 0 of"):
        listen(host, 0)


def test_localhost_is_one_port_at_every_address():
    sockets = listen("localhost", 0)
    assert len({made.getsockname()[1] for made in sockets}) == 1
    assert address_of("::1", sockets) == f"[::1]:{sockets[0].getsockname()[1]}"
    for made in sockets:
        made.close()


def test_connections_stay_below_the_limit_of_open_files(monkeypatch):
    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    assert 8 <= most_connections() < 200
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    assert most_connections() == 512
    assert limits[-1][0] > 1024


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_what_serve_prints_works(device_folder, host):
    command = [sys.executable, "-m", "reft_edge", "serve", str(device_folder / "export"), "--host", host]
    with subprocess.Popen(
        [*command, "--port", "0", "--name", "a/b"], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            url = process.stdout.readline().split(" at ")[1].split()[0]
            assert process.stdout.readline().strip() == f"curl {url}/models"
            assert httpx.get(f"{url}/models").json()["data"][0]["id"] == "a/b"
        finally:
            process.terminate()
        assert process.wait(30) is not None
