"""The servers that tests talk to."""

import socket
import struct
import time

from tests.helpers.servers import Answer, Server

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing breaks the connection off."""


class Greeter(Server):
    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        if path == "/fault":
            raise RuntimeError("a fault of the server's own")
        return Answer(200, b"hello")


def ask(server: Server, path: str, reset: bool) -> None:
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\n\r\n".encode())
        client.recv(1)
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


def test_a_client_that_goes_is_no_error_and_a_fault_is(capfd):
    with Greeter().running() as server:
        ask(server, "/", reset=True)
        ask(server, "/fault", reset=False)
        until = time.monotonic() + 10
        told = ""
        while "a fault of the server's own" not in told and time.monotonic() < until:
            told += capfd.readouterr().err
            time.sleep(0.01)
    assert "a fault of the server's own" in told
    assert "ConnectionResetError" not in told
