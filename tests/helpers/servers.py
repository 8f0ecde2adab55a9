"""Servers on loopback that stand for the world's: static files, an OCI registry, the Hugging Face Hub."""

import base64
import hashlib
import json
import re
import socket
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit


class LoopbackServer(ThreadingHTTPServer):
    """Says nothing of a client that has gone; a fault of its own is printed."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Answer:
    """A status, headers and a body, of which perhaps only the first bytes are sent before the connection breaks."""

    def __init__(
        self, status: int, body: bytes = b"", broken_after: int | None = None, **headers: str
    ) -> None:
        self.status, self.body, self.broken_after = status, body, broken_after
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Server(ABC):
    """Answers as `answer` says and remembers every request's method, path and headers."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.url = ""

    @abstractmethod
    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        """To one request."""

    @contextmanager
    def running(self) -> Iterator["Server"]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_all(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                body = self.rfile.read(int(headers.get("content-length", 0)))
                outer.requests.append((self.command, self.path, headers))
                answer = outer.answer(self.command, self.path, headers, body)
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in answer.headers:
                    self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body[: answer.broken_after])
                if answer.broken_after is not None:
                    self.close_connection = True

            do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = handle_all  # noqa: N815

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        server = LoopbackServer(Handler)
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


@contextmanager
def raw_server(talk: Callable[[socket.socket], None]) -> Iterator[tuple[str, list[int]]]:
    """The URL of a server that talks to each connection as it likes, and the connections' numbers as they come.

    `talk` ends with the client's: it gets an OSError when that has closed the connection.
    """
    seen: list[int] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def one(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            talk(connection)

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                seen.append(len(seen))
                threading.Thread(target=one, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}", seen
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def ranged(content: bytes, headers: dict[str, str], broken_after: int | None = None) -> Answer:
    """A file's content, or the rest of it that a Range header asks for."""
    wanted = re.fullmatch(r"bytes=(\d+)-", headers.get("range", ""))
    if wanted is None:
        return Answer(200, content, broken_after)
    start = int(wanted[1])
    if start >= len(content):
        return Answer(416, b"", Content_Range=f"bytes */{len(content)}")
    place = f"bytes {start}-{len(content) - 1}/{len(content)}"
    return Answer(206, content[start:], broken_after, Content_Range=place)


class StaticServer(Server):
    """Any web server: the files of a folder. Faults are set by the tests."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.ranges = True
        self.failures: list[Answer | int] = []
        """For the next requests of adapter files: another answer, or the bytes after which the connection breaks."""
        self.replaced: dict[str, Answer] = {}
        """Other answers by path."""

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        if path in self.replaced:
            return self.replaced[path]
        broken_after = None
        if path.endswith(".safetensors") and self.failures:
            failure = self.failures.pop(0)
            if isinstance(failure, Answer):
                return failure
            broken_after = failure
        file = self.folder / path.lstrip("/")
        if not file.is_file():
            return Answer(404)
        return ranged(file.read_bytes(), headers if self.ranges else {}, broken_after)


class Registry(Server):
    """An OCI registry by the distribution spec, as far as pulls, pushes and tags go; with `login`, by tokens."""

    def __init__(self, login: str | None = None) -> None:
        super().__init__()
        self.login = login
        self.basic = False
        """Whether the login itself is asked for, in place of a token."""
        self.blobs: dict[tuple[str, str], bytes] = {}
        self.manifests: dict[tuple[str, str], tuple[str, bytes]] = {}
        self.uploads: dict[str, bytes] = {}
        self.broken_after: list[int] = []
        self.page = 2
        """Tags a page."""
        self.blob_store: str | None = None
        """Where blobs are redirected to, if they are."""

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        parts = urlsplit(path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if parts.path == "/token":
            return self._token(headers, query)
        if self.login is not None and self.basic:
            expected = "Basic " + base64.b64encode(self.login.encode()).decode()
            if headers.get("authorization") != expected:
                return Answer(401, b"{}", WWW_Authenticate='Basic realm="fake"')
        elif self.login is not None:
            writes = method in ("POST", "PUT", "PATCH")
            repository = re.match(r"/v2/(.+?)/(?:blobs|manifests|tags)/", parts.path)
            scope = f"repository:{repository[1] if repository else ''}:{'pull,push' if writes else 'pull'}"
            granted = headers.get("authorization", "").removeprefix("Bearer token-for ")
            if granted not in (scope, scope.replace(":pull", ":pull,push")):
                challenge = f'Bearer realm="{self.url}/token",service="fake",scope="{scope}"'
                return Answer(401, b"{}", WWW_Authenticate=challenge)
        return self._registry(method, parts.path, query, headers, body)

    def _token(self, headers: dict[str, str], query: dict[str, str]) -> Answer:
        assert self.login is not None
        expected = "Basic " + base64.b64encode(self.login.encode()).decode()
        if headers.get("authorization") != expected or query.get("service") != "fake":
            return Answer(401, b"{}")
        return Answer(200, json.dumps({"token": f"token-for {query['scope']}"}).encode())

    def _registry(
        self, method: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes
    ) -> Answer:
        if path == "/v2/":
            return Answer(200, b"{}")
        if found := re.fullmatch(r"/v2/(.+)/blobs/uploads/", path):
            place = f"/v2/{found[1]}/blobs/uploads/{len(self.uploads)}"
            self.uploads[place] = b""
            if "digest" in query:
                return self._store(found[1], query["digest"], body)
            return Answer(202, Location=f"{place}?state=1")
        if path in self.uploads:
            repository = path.removeprefix("/v2/").partition("/blobs/")[0]
            self.uploads[path] += body
            if method == "PATCH":
                return Answer(202, Location=f"{path}?state=2", Range=f"0-{len(self.uploads[path]) - 1}")
            assert query["state"]
            return self._store(repository, query["digest"], self.uploads[path])
        if found := re.fullmatch(r"/v2/(.+)/blobs/(sha256:[0-9a-f]{64})", path):
            content = self.blobs.get((found[1], found[2]))
            if content is None:
                return Answer(404)
            if self.blob_store is not None and method == "GET":
                return Answer(307, Location=f"{self.blob_store}/{found[2]}")
            return ranged(content, headers, self.broken_after.pop(0) if self.broken_after else None)
        if found := re.fullmatch(r"/v2/(.+)/manifests/([\w.:-]+)", path):
            return self._manifest(method, found[1], found[2], headers, body)
        if found := re.fullmatch(r"/v2/(.+)/tags/list", path):
            tags = sorted(
                tag for name, tag in self.manifests if name == found[1] and not tag.startswith("sha256:")
            )
            if not tags:
                return Answer(404, b'{"errors":[{"code":"NAME_UNKNOWN"}]}')
            rest = [tag for tag in tags if tag > query.get("last", "")]
            link = {}
            if len(rest) > self.page:
                link = {"Link": f'<{path}?last={rest[self.page - 1]}>; rel="next"'}
            return Answer(200, json.dumps({"name": found[1], "tags": rest[: self.page]}).encode(), **link)
        return Answer(404)

    def _store(self, repository: str, digest: str, content: bytes) -> Answer:
        if f"sha256:{hashlib.sha256(content).hexdigest()}" != digest:
            return Answer(400, b'{"errors":[{"code":"DIGEST_INVALID"}]}')
        self.blobs[repository, digest] = content
        return Answer(201, Location=f"/v2/{repository}/blobs/{digest}")

    def _manifest(
        self, method: str, repository: str, tag: str, headers: dict[str, str], body: bytes
    ) -> Answer:
        if method == "PUT":
            manifest = json.loads(body)
            for part in (manifest["config"], *manifest["layers"]):
                if (repository, part["digest"]) not in self.blobs:
                    return Answer(404, b'{"errors":[{"code":"MANIFEST_BLOB_UNKNOWN"}]}')
            digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
            for name in (tag, digest):
                self.manifests[repository, name] = headers["content-type"], body
            return Answer(201, Docker_Content_Digest=digest, Location=f"/v2/{repository}/manifests/{digest}")
        kind, content = self.manifests.get((repository, tag), ("", b""))
        if not kind or (kind not in headers.get("accept", "") and "*/*" not in headers.get("accept", "")):
            return Answer(404, b'{"errors":[{"code":"MANIFEST_UNKNOWN"}]}')
        return Answer(200, content, Content_Type=kind)


class Hub(Server):
    """The Hugging Face Hub's API for one model repository, as far as commits and downloads go. Large files are not
    asked for, so that contents come in the commit itself."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self.token = token
        self.repository: str | None = None
        self.private: bool | None = None
        self.commits: list[dict[str, bytes]] = []
        self.before_commit: list[dict[str, bytes]] = []
        """Commits of others that come just before the next ones."""
        self.store: str | None = None
        """Where adapter files are redirected to, if they are."""

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        allowed = headers.get("authorization") == f"Bearer {self.token}"
        if not allowed:
            return Answer(401, b'{"error":"Invalid credentials"}')
        parts = urlsplit(path)
        if parts.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if self.repository == name:
                return Answer(409, json.dumps({"url": f"{self.url}/{name}"}).encode())
            self.repository, self.private = name, asked.get("visibility") == "private" or asked.get("private")
            self.commits.append({".gitattributes": b""})
            return Answer(200, json.dumps({"url": f"{self.url}/{name}", "id": name, "name": name}).encode())
        if self.repository is None:
            return Answer(404, X_Error_Code="RepoNotFound")
        if found := re.fullmatch(rf"/api/models/{self.repository}(/revision/(.+))?", parts.path):
            files = [{"rfilename": name} for name in self.commits[-1]]
            info = {
                "_id": "1",
                "id": self.repository,
                "sha": self.sha(),
                "siblings": files,
                "private": True,
                "tags": [],
            }
            return Answer(200, json.dumps(info).encode(), Content_Type="application/json")
        if parts.path == f"/api/models/{self.repository}/preupload/main":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return Answer(200, json.dumps({"files": files}).encode(), Content_Type="application/json")
        if parts.path == f"/api/models/{self.repository}/commit/main":
            return self._commit([json.loads(line) for line in body.splitlines()])
        if found := re.fullmatch(rf"/{self.repository}/resolve/(\w+)/(.+)", parts.path):
            number = len(self.commits) if found[1] == "main" else int(found[1], 16)
            content = self.commits[number - 1].get(found[2])
            if content is None:
                return Answer(404, X_Error_Code="EntryNotFound")
            if self.store is not None and found[2].endswith(".safetensors"):
                return Answer(302, Location=f"{self.store}/{found[2]}")
            return ranged(content, headers)
        return Answer(404)

    def sha(self) -> str:
        return f"{len(self.commits):040x}"

    def _commit(self, lines: list[dict[str, Any]]) -> Answer:
        if self.before_commit:
            self.commits.append({**self.commits[-1], **self.before_commit.pop(0)})
        if lines[0]["value"].get("parentCommit") not in (None, self.sha()):
            return Answer(412, b'{"error":"A commit has happened since."}')
        added = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        self.commits.append({**self.commits[-1], **added})
        made = {
            "commitUrl": f"{self.url}/{self.repository}/commit/{self.sha()}",
            "commitOid": self.sha(),
            "success": True,
        }
        return Answer(200, json.dumps(made).encode(), Content_Type="application/json")
