"""Servers that mean no good: exchanges without end, answers that break every rule, places where we must not be sent."""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from ipaddress import ip_address
from pathlib import Path

import httpcore
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reft_edge.adapter.file import save_adapter
from reft_edge.errors import ReftEdgeError
from reft_edge.shipping import http as shipping_http
from reft_edge.shipping import hub
from reft_edge.shipping import pull as pulling
from reft_edge.shipping.address import open_repository
from reft_edge.shipping.folder import FolderRepository
from reft_edge.shipping.http import MAX_HEADERS, Web, parse_url
from reft_edge.shipping.pull import pull
from reft_edge.shipping.release import Release, digest_of, read_goods, render_index
from reft_edge.shipping.store import DeviceStore
from reft_edge.shipping.wire import LOOPBACK, OTHER, PRIVATE, PUBLIC, Wire, zone
from tests.adapter.test_algebra import make_adapter
from tests.helpers.servers import Answer, Server, StaticServer, raw_server

BODY = b"x" * 40
RELEASE = Release("a", 1, digest_of(BODY), len(BODY))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulling, "PAUSE", 0.0)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "task.safetensors"
    save_adapter(make_adapter("loreft", 1), path)
    return path


@pytest.fixture
def store(tmp_path: Path) -> DeviceStore:
    return DeviceStore(tmp_path / "store")


@pytest.fixture
def site(tmp_path: Path, task: Path) -> Iterator[StaticServer]:
    """A web server with version 1 of `task` on it."""
    folder = tmp_path / "site"
    FolderRepository(folder).publish([read_goods(task)])
    with StaticServer(folder).running() as server:
        assert isinstance(server, StaticServer)
        yield server


# Time and size of a whole exchange


def forever(before: bytes, piece: bytes) -> Callable[[socket.socket], None]:
    """Say something, then the same again and again until the client has had enough."""

    def talk(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        connection.sendall(before)
        while piece:
            connection.sendall(piece)
            time.sleep(0.02)
        connection.recv(1)

    return talk


def reads_nothing(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    while connection.recv(1):
        time.sleep(0.02)


OK = b"HTTP/1.1 200 OK\r\n"
ENDLESS = {
    "nothing": (b"", b""),
    "status line": (b"HTTP/1.1 200 ", b"O"),
    "a header": (OK + b"X: ", b"a"),
    "headers": (OK, b"X: a\r\n"),
    "early hints": (b"", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "redirect": (b"HTTP/1.1 302 Found\r\nLocation: /x\r\nX:", b"a"),
    "body": (OK + b"Content-Length: 40\r\n\r\n", b""),
    "chunk size": (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
    "chunk extension": (OK + b"Transfer-Encoding: chunked\r\n\r\n1;", b"a"),
    "trailer": (OK + b"Transfer-Encoding: chunked\r\n\r\n28\r\n" + BODY + b"\r\n0\r\nX: ", b"a"),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_an_exchange_ends_wherever_it_drips(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping_http, "DEADLINE", 0.3)
    with raw_server(forever(*ENDLESS[kind])) as (host, _):
        web = Web(f"http://{host}/", False)
        with pytest.raises(ReftEdgeError, match=r"http://127.0.0.1.*takes longer than 0 s"):
            web.get(parse_url(f"http://{host}/"), 40)


def test_the_deadline_is_one_for_all_redirects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer alone is in time."""
    monkeypatch.setattr(shipping_http, "DEADLINE", 0.4)

    def talk(connection: socket.socket) -> None:
        while connection.recv(1 << 16):
            time.sleep(0.15)
            connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n")

    with (
        raw_server(talk) as (host, _),
        pytest.raises(ReftEdgeError, match=r"takes longer|redirects more than 5") as told,
    ):
        Web(f"http://{host}/", False).get(parse_url(f"http://{host}/"), 40)
    assert "takes longer" in str(told.value)


def test_the_login_belongs_to_the_exchange(monkeypatch, tmp_path):
    """A registry in time whose token server is not."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setattr(shipping_http, "DEADLINE", 0.3)
    with raw_server(forever(*ENDLESS["early hints"])) as (tokens, _):

        class Asks(Server):
            def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
                return Answer(401, b"", WWW_Authenticate=f'Bearer realm="http://{tokens}/token"')

        with Asks().running() as server, pytest.raises(ReftEdgeError, match="takes longer"):
            open_repository(f"oci://{server.url.removeprefix('http://')}/a").releases()


def test_a_push_to_the_hub_ends(monkeypatch, task):
    """huggingface_hub sets its connections no time."""
    ended = threading.Event()
    monkeypatch.setattr(hub, "DEADLINE", 0.1)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: ended.wait(20))
    with pytest.raises(ReftEdgeError, match=r"pushing to hf://a/b takes longer than 0 s.*try again"):
        open_repository("hf://a/b").publish([read_goods(task)])
    ended.set()


def test_the_deadline_holds_for_encryption_and_for_uploads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping_http, "DEADLINE", 0.3)
    with raw_server(lambda connection: time.sleep(5)) as (host, seen):
        with pytest.raises(ReftEdgeError, match="takes longer"):
            Web(f"https://{host}/", False).get(parse_url(f"https://{host}/"), 40)
        assert len(seen) == 1
    with raw_server(reads_nothing) as (host, _), pytest.raises(ReftEdgeError, match="takes longer"):  # noqa: SIM117
        with Web(f"http://{host}/", False).send("PUT", parse_url(f"http://{host}/"), content=bytes(64 << 20)):
            pass


@pytest.mark.parametrize(
    "kind", ["early hints", "continue", "headers", "a header", "trailer", "chunk extension"]
)
def test_what_surrounds_a_body_is_bounded(kind: str) -> None:
    """As fast as the line allows: many a megabyte in 15 minutes."""
    sent = [0]
    before, piece = ENDLESS[kind]

    def talk(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        connection.sendall(before)
        while True:
            sent[0] += connection.send(piece * 100)

    with raw_server(talk) as (host, _), pytest.raises(ReftEdgeError):
        Web(f"http://{host}/", False).get(parse_url(f"http://{host}/"), 40)
    assert sent[0] < 64 << 20, "what the kernel's buffers hold, and no more"


def test_a_count_of_bytes_ends_an_exchange() -> None:
    many = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 100
    network = httpcore.MockBackend([many] * (MAX_HEADERS // len(many) + 2))
    web = Web("http://127.0.0.1/", False, wire=Wire("127.0.0.1", network))
    with pytest.raises(ReftEdgeError, match="more than it should"):
        web.get(parse_url("http://127.0.0.1/"), 40)


def test_a_server_that_never_ends_keeps_nobody_out_of_the_store(site, store, task, monkeypatch):
    """Others pull, other adapters from the same server too, and roll back; the lock is free while it drips."""
    waiting = threading.Event()
    index = render_index([RELEASE])

    def talk(connection: socket.socket) -> None:
        if b"index.json" in connection.recv(1 << 16):
            connection.sendall(OK + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(index) + index)
            return
        waiting.set()
        end.wait(20)

    end = threading.Event()
    with raw_server(talk) as (host, _):
        results = []
        slow = threading.Thread(
            target=lambda: results.extend(pull(open_repository(f"http://{host}/"), store))
        )
        monkeypatch.setattr(pulling, "ATTEMPTS", 1)
        slow.start()
        assert waiting.wait(10)
        monkeypatch.setattr("reft_edge.shipping.locking.PATIENCE", 0.5)
        assert pull(open_repository(site.url), store)[0].status == "installed"
        save_adapter(make_adapter("loreft", 2), task)
        FolderRepository(site.folder).publish([read_goods(task)])
        assert pull(open_repository(site.url), store)[0].installed == 2
        assert store.rollback("task")[1].version == 1
        [same] = pull(open_repository(f"http://{host}/"), store)
        assert "another process has been downloading a version 1" in same.reason
        end.set()
        slow.join()
    assert [one.status for one in results] == ["failed"]


# Encryption


@pytest.fixture
def certified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ssl.SSLContext]:
    """A server's side of an encrypted connection to 127.0.0.1, whose certificate this machine trusts."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(Encoding.PEM)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "both.pem").write_bytes(private + pem)
    (tmp_path / "public.pem").write_bytes(pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "public.pem"))
    shipping_http._encryption.cache_clear()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "both.pem")
    yield context
    shipping_http._encryption.cache_clear()


def answers_encrypted(
    context: ssl.SSLContext, answer: Callable[[socket.socket], None]
) -> Callable[[socket.socket], None]:
    def talk(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as encrypted:
            answer(encrypted)

    return talk


def says_hello(connection: socket.socket) -> None:
    connection.recv(1 << 16)
    connection.sendall(OK + b"Content-Length: 5\r\n\r\nhello")


def test_encrypted_answers_arrive_and_end_in_time(certified, monkeypatch):
    with raw_server(answers_encrypted(certified, says_hello)) as (host, _):
        assert Web(f"https://{host}/", False).get(parse_url(f"https://{host}/"), 40) == b"hello"
        with pytest.raises(ReftEdgeError, match=r"https://localhost.*certificate"):
            Web("https://localhost/", False).get(
                parse_url(f"https://{host}/".replace("127.0.0.1", "localhost")), 40
            )
    monkeypatch.setattr(shipping_http, "DEADLINE", 0.5)
    for kind in ("a header", "trailer"):
        drips = answers_encrypted(certified, forever(*ENDLESS[kind]))
        with raw_server(drips) as (host, _), pytest.raises(ReftEdgeError, match="takes longer"):
            Web(f"https://{host}/", False).get(parse_url(f"https://{host}/"), 40)


def test_a_proxy_carries_encrypted_connections(certified, monkeypatch):
    """What is asked for is asked of the server, inside; the proxy is told the name and nothing else."""
    asked = []

    def tunnels(connection: socket.socket) -> None:
        asked.append(connection.recv(1 << 16))
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        answers_encrypted(certified, says_hello)(connection)

    with raw_server(tunnels) as (proxy, _):
        monkeypatch.setenv("https_proxy", f"http://me:secret@{proxy}")
        monkeypatch.setenv("no_proxy", "")
        assert Web("https://127.0.0.1/", False).get(parse_url("https://127.0.0.1/"), 40) == b"hello"
    assert asked[0].startswith(b"CONNECT 127.0.0.1:443 ")
    assert b"Basic bWU6c2VjcmV0" in asked[0]


# Answers that break the rules


RULELESS = [
    b"",
    b"\0" * 100,
    b"HTTP/0.9 hello",
    b"HTTP/1.1 999 \r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: nothing\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
    b"HTTP/1.1 200 OK\r\n\xff\xfe: \x80\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx",
    *[
        b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + place + b"\r\n\r\n"
        for place in (
            b"https://[::1",
            b"https://xn--/",
            b"https://xn--a-ecp.example/",
            b"https://" + b"a" * 64 + b".example/",
            b"https://\xc3\xa9\xe2\x80\xae.example/",
            b"https://example.com:99999/",
            b"https://example.com:-1/",
            b"//",
            b"https://",
            b"https:///x",
            b"https://..example/",
            b"gopher://example.com/",
            b"data:,x",
            b"\xff\xff\xff",
            b"https://exa mple/",
            b"https://" + b"a." * 40000,
        )
    ],
]


@pytest.mark.parametrize("answer", RULELESS, ids=range(len(RULELESS)))
def test_an_answer_that_breaks_the_rules_fails_one_adapter_alone(answer, task, store, monkeypatch):
    """The first adapter gets it, the second is installed."""
    monkeypatch.setattr(pulling, "ATTEMPTS", 1)
    content = task.read_bytes()
    good = Release("good", 1, digest_of(content), len(content))
    index = render_index([RELEASE, good])

    def talk(connection: socket.socket) -> None:
        asked = connection.recv(1 << 16)
        if b" /a/" in asked:
            connection.sendall(answer)
            return
        body = index if b"index.json" in asked else content
        connection.sendall(OK + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    with raw_server(talk) as (host, _):
        bad, whole = pull(open_repository(f"http://{host}/"), store)
    assert (bad.status, whole.status) == ("failed", "installed")
    assert bad.reason


HOSTS = st.one_of(
    st.text(max_size=70),
    st.from_regex(r"[a-z0-9.-]{0,80}(:[0-9]{0,6})?", fullmatch=True),
    st.text(alphabet="xn-.aé\u202e\u3002ß1[]:%@#?\\/", max_size=20),
)


@given(st.sampled_from(["https://", "http://", "oci://", "hf://", "", "ftp://"]), HOSTS, st.text(max_size=20))
@example("https://", "xn--", "/")
@example("oci://", "xn--/a", "")
@example("https://", "h:99999", "/")
@example("https://", "[fe80::1%25eth0]", "/")
@example("oci://", "h:99999/a", "")
@example("hf://", "a/b@\udc80", "")
@example("", "a\0b", "")
@settings(max_examples=200, deadline=None)
def test_any_address_is_a_repository_s_or_an_error(scheme: str, host: str, rest: str) -> None:
    """And so is reading from it, with no network behind."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            httpcore.SyncBackend,
            "connect_tcp",
            lambda *_, **__: httpcore.MockStream([b"HTTP/1.1 404 No\r\n\r\n"]),
        )
        patched.setattr(
            "reft_edge.shipping.wire._resolve", lambda host, port: [host.encode("idna") and "93.184.216.34"]
        )
        with pytest.raises(ReftEdgeError):
            open_repository(scheme + host + rest, plain_http=True).releases()


LOCATIONS = st.one_of(
    st.binary(max_size=60),
    HOSTS.map(lambda host: b"https://" + host.encode(errors="surrogatepass")),
    HOSTS.map(lambda host: host.encode(errors="surrogatepass")),
)


@given(LOCATIONS)
@settings(max_examples=200, deadline=None)
def test_any_location_is_followed_or_an_error(location: bytes) -> None:
    redirect = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + location + b"\r\n\r\n"
    wire = Wire("93.184.216.34", httpcore.MockBackend([redirect]))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("reft_edge.shipping.wire._resolve", lambda host, port: ["93.184.216.34"])
        with pytest.raises(ReftEdgeError):
            Web("https://93.184.216.34/", True, wire=wire).get(parse_url("http://93.184.216.34/"), 40)


@pytest.mark.parametrize(
    "realm", ["https://[", "https://xn--/", "nonsense", "https://h:99999/", "file:///etc/passwd"]
)
def test_a_token_server_s_address_that_is_none(realm, tmp_path, monkeypatch):
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))

    class Asks(Server):
        def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
            return Answer(401, b"", WWW_Authenticate=f'Bearer realm="{realm}"')

    with Asks().running() as server, pytest.raises(ReftEdgeError):
        open_repository(f"oci://{server.url.removeprefix('http://')}/a").releases()


# Where we may be sent


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("127.0.0.1", LOOPBACK),
        ("127.9.9.9", LOOPBACK),
        ("::1", LOOPBACK),
        ("::ffff:127.0.0.1", LOOPBACK),
        ("::127.0.0.1", LOOPBACK),
        ("64:ff9b::7f00:1", LOOPBACK),
        ("2002:7f00:1::", LOOPBACK),
        ("10.1.2.3", PRIVATE),
        ("172.16.0.1", PRIVATE),
        ("172.31.255.255", PRIVATE),
        ("192.168.1.1", PRIVATE),
        ("100.64.0.1", PRIVATE),
        ("fc00::1", PRIVATE),
        ("fdff::1", PRIVATE),
        ("::ffff:10.0.0.1", PRIVATE),
        ("64:ff9b::a00:1", PRIVATE),
        ("169.254.169.254", OTHER),
        ("::ffff:169.254.169.254", OTHER),
        ("fe80::1", OTHER),
        ("fe80::1%eth0", OTHER),
        ("fec0::1", OTHER),
        ("0.0.0.0", OTHER),
        ("192.0.0.192", OTHER),
        ("168.63.129.16", OTHER),
        ("100.100.100.200", OTHER),
        ("::ffff:100.100.100.200", OTHER),
        ("fd00:ec2::254", OTHER),
        ("192.88.99.1", OTHER),
        ("3fff::1", OTHER),
        ("64:ff9b:1::a00:1", OTHER),
        ("::", OTHER),
        ("224.0.0.1", OTHER),
        ("ff02::1", OTHER),
        ("255.255.255.255", OTHER),
        ("192.0.2.1", OTHER),
        ("8.8.8.8", PUBLIC),
        ("172.32.0.1", PUBLIC),
        ("2606:4700::1111", PUBLIC),
        ("64:ff9b::808:808", PUBLIC),
    ],
)
def test_where_an_address_is(address: str, place: str) -> None:
    assert zone(address) == place


FORBIDDEN = [
    "127.0.0.1",
    "127.1",
    "2130706433",
    "0x7f.1",
    "[::1]",
    "[::ffff:127.0.0.1]",
    "localhost",
    "a.localhost",
    "0.0.0.0",
    "10.0.0.1",
    "172.20.0.1",
    "192.168.0.1",
    "169.254.169.254",
    "[fe80::1]",
    "[fd00:ec2::254]",
    "inside.example",
]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Names that a stranger can point to anywhere; every connection goes to a server that says where it thinks it is."""
    table = {"repo.example": "93.184.216.34", "inside.example": "127.0.0.1", "lan.example": "192.168.7.7"}
    real = socket.getaddrinfo

    def look_up(host: str, port: object, *rest: object, **options: object) -> object:
        return real(table.get(host, host), port, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return table


class Network(httpcore.NetworkBackend):
    """Servers by the address that is connected to; the others have nothing."""

    def __init__(self, answers: dict[str, bytes]) -> None:
        self.answers = answers
        self.connected: list[str] = []

    def connect_tcp(self, host: str, port: int, *rest: object, **options: object) -> httpcore.NetworkStream:
        self.connected.append(host)
        found = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret"
        return httpcore.MockStream([self.answers.get(host, found)])


def redirect(place: str) -> bytes:
    return b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + place.encode() + b"\r\n\r\n"


def fetch(home: str, answers: dict[str, bytes], plain: bool = True) -> tuple[bytes, list[str]]:
    network = Network(answers)
    wire = Wire(parse_url(home).raw_host.decode(), network)
    try:
        return Web(home, plain, wire=wire).get(parse_url(home), 40), network.connected
    except ReftEdgeError as error:
        return str(error).encode(), network.connected


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("host", FORBIDDEN)
@pytest.mark.parametrize("port", ["", ":8080"])
def test_nobody_sends_us_to_this_machine_or_a_private_network(names, scheme, host, port):
    said, connected = fetch(
        "http://repo.example/", {"93.184.216.34": redirect(f"{scheme}://{host}{port}/admin")}
    )
    assert connected == ["93.184.216.34"]
    assert b"which a server elsewhere may not do" in said


def test_a_name_that_moves_to_this_machine_is_not_followed(names, monkeypatch):
    """The name is the one that the user gave; only the first answer came from where it was."""
    network = Network({"93.184.216.34": redirect("http://repo.example:8080/admin")})
    wire = Wire("repo.example", network)
    web = Web("http://repo.example/", True, wire=wire)

    def moves(host: str, port: int) -> list[str]:
        return ["93.184.216.34"] if port == 80 else ["127.0.0.1"]

    monkeypatch.setattr("reft_edge.shipping.wire._resolve", moves)
    with pytest.raises(ReftEdgeError, match="may not do"):
        web.get(parse_url("http://repo.example/"), 40)
    assert network.connected == ["93.184.216.34"]


@pytest.mark.parametrize(
    ("home", "found", "place"),
    [
        ("http://127.0.0.1:5000/", "127.0.0.1", "http://127.0.0.2:6000/x"),
        ("http://127.0.0.1:5000/", "127.0.0.1", "http://[::1]:6000/x"),
        ("http://localhost:5000/", "127.0.0.1", "http://127.0.0.2/x"),
        ("http://192.168.1.2/", "192.168.1.2", "http://192.168.1.3:9000/x"),
        ("http://lan.example/", "192.168.7.7", "http://10.0.0.1/x"),
        ("http://lan.example/", "192.168.7.7", "http://lan.example:8080/x"),
        ("http://127.0.0.1/", "127.0.0.1", "https://93.184.216.34/x"),
        ("http://repo.example/", "93.184.216.34", "http://8.8.8.8/x"),
    ],
)
def test_what_the_user_named_works_and_leads_to_its_own_kind(names, home, found, place):
    names["localhost"] = "127.0.0.1"
    said, connected = fetch(home, {found: redirect(place)} if place.startswith("http:") else {})
    assert said == b"secret" or b"lan.example:8080" in said or b"redirects more" in said
    assert connected[0] == found
    assert b"may not do" not in said


@pytest.mark.parametrize(
    ("home", "place"),
    [
        ("http://127.0.0.1/", "http://192.168.1.2/x"),
        ("http://127.0.0.1/", "http://169.254.169.254/x"),
        ("http://192.168.1.2/", "http://127.0.0.1/x"),
        ("http://192.168.1.2/", "http://169.254.169.254/x"),
        ("http://inside.example/", "http://127.0.0.1/x"),
        ("http://inside.example/", "http://127.0.0.2/x"),
    ],
)
def test_one_kind_of_inside_does_not_lead_to_another(names, home, place):
    first = names.get(parse_url(home).raw_host.decode(), parse_url(home).raw_host.decode())
    said, connected = fetch(home, {first: redirect(place)})
    assert connected == [first]
    assert b"may not do" in said


@pytest.mark.parametrize("place", ["http://127.0.0.1/up", "https://inside.example/up", "http://10.0.0.1/up"])
def test_uploads_and_blobs_stay_out_too(names, monkeypatch, tmp_path, task, place):
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    connected = []
    said = [b"404 No\r\n", b"404 No\r\n", b"202 Accepted\r\nLocation: " + place.encode() + b"\r\n"]

    class InTurn(httpcore.NetworkBackend):
        def connect_tcp(
            self, host: str, port: int, *rest: object, **options: object
        ) -> httpcore.NetworkStream:
            connected.append(host)
            return httpcore.MockStream(
                [b"HTTP/1.1 " + said.pop(0) + b"Connection: close\r\nContent-Length: 0\r\n\r\n"]
            )

    monkeypatch.setattr(httpcore, "SyncBackend", InTurn)
    with pytest.raises(ReftEdgeError, match="may not do"):
        open_repository("oci://repo.example/fleet", plain_http=True).publish([read_goods(task)])
    assert connected == ["93.184.216.34"] * 3
    said.append(b"307 Elsewhere\r\nLocation: " + place.encode() + b"\r\n")
    with (
        pytest.raises(ReftEdgeError, match="may not do"),
        open_repository("oci://repo.example/fleet", plain_http=True).open(RELEASE, 0),
    ):
        pass
    assert connected == ["93.184.216.34"] * 4


def test_token_servers_stay_out_too(names, monkeypatch, tmp_path):
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    answers = {
        "93.184.216.34": b'HTTP/1.1 401 No\r\nContent-Length: 0\r\nWWW-Authenticate: Bearer realm="REALM"\r\n\r\n'
    }
    for realm in ("http://127.0.0.1/token", "http://169.254.169.254/token", "https://inside.example/token"):
        network = Network({name: said.replace(b"REALM", realm.encode()) for name, said in answers.items()})
        monkeypatch.setattr(httpcore, "SyncBackend", lambda network=network: network)
        with pytest.raises(ReftEdgeError, match="may not do"):
            open_repository("oci://repo.example/fleet", plain_http=True).releases()
        assert network.connected == ["93.184.216.34"]


def test_the_system_s_proxy_is_used_and_may_be_here(names, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:3128")
    network = Network({"127.0.0.1": redirect("http://10.0.0.1/x")})
    web = Web("http://repo.example/", True, wire=Wire("repo.example", network))
    with pytest.raises(ReftEdgeError, match=r"10\.0\.0\.1.*may not do"):
        web.get(parse_url("http://repo.example/"), 40)
    assert network.connected == ["127.0.0.1"]
    monkeypatch.setenv("no_proxy", "repo.example")
    Web("http://repo.example/", True, wire=Wire("repo.example", network)).get(
        parse_url("http://repo.example/"), 40
    )
    assert network.connected[-1] == "93.184.216.34"
