"""Repositories: a folder, a static web server, an OCI registry and the Hub; what strangers say there is checked."""

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_edge.adapter.file import save_adapter
from reft_edge.errors import ReftEdgeError
from reft_edge.model.manifest import Manifest
from reft_edge.shipping import http as shipping_http
from reft_edge.shipping import pull as pulling
from reft_edge.shipping.address import open_repository
from reft_edge.shipping.folder import FolderRepository
from reft_edge.shipping.oci import parse_manifest, render_manifest
from reft_edge.shipping.parts import Parts
from reft_edge.shipping.pull import pull
from reft_edge.shipping.release import (
    MAX_INDEX,
    MAX_VERSION,
    Release,
    check_name,
    digest_of,
    parse_index,
    read_goods,
    render_index,
)
from reft_edge.shipping.repository import Repository
from reft_edge.shipping.store import DeviceStore
from reft_edge.shipping.wire import is_loopback
from reft_edge.signing.keys import generate_key, load_private_key, load_trusted
from reft_edge.signing.signatures import sign
from tests.adapter.test_algebra import make_adapter
from tests.helpers.servers import Answer, Hub, Registry, Server, StaticServer


def is_name(name: object) -> bool:
    try:
        check_name(name)
    except ReftEdgeError:
        return False
    return True


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True).filter(is_name)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=200).filter(str.isprintable)
RELEASES = st.builds(
    Release,
    name=NAMES,
    version=st.integers(1, MAX_VERSION),
    digest=st.binary(max_size=9).map(digest_of),
    size=st.integers(1, 1 << 30),
    base_name=TEXTS,
    base_fingerprint=TEXTS,
)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulling, "PAUSE", 0.0)


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    """Three adapter files, task1 to task3."""
    folder = tmp_path / "adapters"
    folder.mkdir()
    for seed in (1, 2, 3):
        save_adapter(make_adapter("loreft", seed, rank=8), folder / f"task{seed}.safetensors")
    return sorted(folder.iterdir())


@pytest.fixture
def store(tmp_path: Path) -> DeviceStore:
    return DeviceStore(tmp_path / "store")


def push(repository: Repository, path: Path, name: str = "task") -> Release:
    return repository.publish([read_goods(path, name)])[0]


def begin(store: DeviceStore, address: str, release: Release, content: bytes) -> None:
    """Leave a download that was broken off."""
    with store.changing():
        part = Parts(store, address).take(release)
        assert part is not None
        part.add(content)
        part.put_away()


# The index


@given(st.lists(RELEASES, max_size=5, unique_by=lambda release: (release.name, release.version)))
def test_an_index_reads_as_it_was_written(releases: list[Release]) -> None:
    assert parse_index(render_index(releases)) == releases


@given(RELEASES)
def test_a_manifest_reads_as_it_was_written(release: Release) -> None:
    assert parse_manifest(render_manifest(release), "latest") == release


@given(st.binary(max_size=200) | RELEASES.map(lambda release: render_index([release])[:-9]))
def test_anything_else_is_no_index(content: bytes) -> None:
    for parse in (parse_index, lambda content: parse_manifest(content, "1")):
        with pytest.raises(ReftEdgeError):
            parse(content)


@given(st.text(max_size=120))
def test_names_are_one_plain_part_of_a_path(name: str) -> None:
    try:
        check_name(name)
    except ReftEdgeError:
        return
    assert Path("store", name).parent == Path("store")
    assert name.isascii()
    assert not name.startswith((".", "-"))
    assert not set(name) & set('/\\:*?"<>|\0\n ')


@pytest.mark.parametrize(
    "name",
    [
        *[
            "",
            ".",
            "..",
            "../x",
            "a/b",
            "a\\b",
            "/etc/passwd",
            ".hidden",
            "a\n",
            "a:b",
            "é",
            "a" * 101,
            7,
            None,
        ],
        *["a.", "index.json", "Index.JSON", "nul", "CON.x", "com1"],
    ],
)
def test_names_that_are_refused(name: object) -> None:
    with pytest.raises(ReftEdgeError, match="cannot be an adapter's name"):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "7", "a" * 100, "a.b-c_d", "index", "null", "console.x", "a_", "a-"])
def test_names_that_are_taken(name: str) -> None:
    check_name(name)


ENTRY = {
    "name": "a",
    "version": 1,
    "digest": digest_of(b""),
    "size": 5,
    "base_name": "",
    "base_fingerprint": "",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../a"}, "cannot be an adapter's name"),
        ({"version": 0}, "version is 0"),
        ({"version": True}, "version is True"),
        ({"version": 1.0}, "version is 1.0"),
        ({"version": 10**10}, "version is 10000000000"),
        ({"size": 0}, "size is 0"),
        ({"size": 1 << 40}, "size is"),
        ({"digest": "sha256:" + "A" * 64}, "digest is"),
        ({"digest": "md5:00"}, "digest is"),
        ({"digest": None}, "digest is None"),
        ({"base_name": "\x1b[2J"}, "base_name is"),
        ({"base_fingerprint": "f" * 201}, "base_fingerprint is"),
        ({"path": "x"}, "not a release"),
    ],
)
def test_entries_that_are_refused(changes: dict[str, object], message: str) -> None:
    index = {"format": "reft-edge index", "version": 1, "releases": [{**ENTRY, **changes}]}
    with pytest.raises(ReftEdgeError, match=message):
        parse_index(json.dumps(index).encode())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "not a JSON object"),
        (b"{}", "not an index"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        (b" " * (MAX_INDEX + 1), "more than"),
        (b'{"format": "reft-edge index", "version": 2, "releases": []}', "version 2"),
        (b'{"format": "reft-edge index", "version": 1}', "format, version and a list"),
        (b'{"format": "reft-edge index", "version": 1, "releases": [], "more": 1}', "and no more"),
        (b'{"format": "reft-edge index", "version": 1, "version": 1, "releases": []}', "twice"),
        (render_index([Release(**ENTRY), Release(**{**ENTRY, "size": 6})]), "lists a release twice"),
    ],
)
def test_indexes_that_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(ReftEdgeError, match=message):
        parse_index(content)


def test_an_index_that_nobody_would_read_is_not_written() -> None:
    releases = [Release(**{**ENTRY, "version": number}) for number in range(1, 20_000)]
    with pytest.raises(ReftEdgeError, match="begin another repository"):
        render_index(releases)
    assert len(parse_index(render_index(releases[:7_000]))) == 7_000


# A folder, and the same behind a web server


@pytest.fixture
def site(tmp_path: Path, adapters: list[Path]) -> Iterator[StaticServer]:
    """A web server with version 1 of `task` on it."""
    folder = tmp_path / "site"
    push(FolderRepository(folder), adapters[0])
    with StaticServer(folder).running() as server:
        assert isinstance(server, StaticServer)
        yield server


def test_a_folder_that_push_made_is_pulled_from_a_web_server(site, store, adapters):
    push(FolderRepository(site.folder), adapters[1], "other")
    for address in (site.url, f"{site.url}/", f"{site.url}/index.json"):
        found = pull(open_repository(address), store)
        assert [(one.name, one.installed) for one in found] == [("other", 1), ("task", 1)]
    assert store.path("task").read_bytes() == adapters[0].read_bytes()
    assert len([path for _, path, _ in site.requests if path.endswith(".safetensors")]) == 2


def test_a_broken_download_goes_on_where_it_ended(site, store, adapters):
    size = adapters[0].stat().st_size
    site.failures = [100, 1000, Answer(503)]
    told: list[str] = []
    found = pull(open_repository(site.url), store, report=told.append)
    assert found[0].status == "installed"
    assert [headers.get("range") for _, path, headers in site.requests[1:]] == [
        None,
        "bytes=100-",
        "bytes=1100-",
        "bytes=1100-",
    ]
    assert size > 1100
    assert len(told) == 3
    assert store.path("task").read_bytes() == adapters[0].read_bytes()


def test_what_arrived_waits_for_the_next_pull(site, store, adapters, monkeypatch):
    monkeypatch.setattr(pulling, "ATTEMPTS", 2)
    site.failures = [700, 300]
    failed = pull(open_repository(site.url), store)[0]
    assert failed.status == "failed"
    parts = list(store.folder.rglob("*.part"))
    assert [part.stat().st_size for part in parts] == [1000]
    assert not store.names()
    assert pull(open_repository(site.url), store)[0].status == "installed"
    assert site.requests[-1][2]["range"] == "bytes=1000-"
    assert not list(store.folder.rglob("*.part"))


def test_a_server_without_ranges_sends_it_all_again(site, store, adapters):
    site.ranges = False
    site.failures = [500]
    assert pull(open_repository(site.url), store)[0].status == "installed"
    assert store.path("task").read_bytes() == adapters[0].read_bytes()


def test_a_wrong_beginning_is_dropped_and_a_wrong_file_refused(site, store, adapters):
    release = FolderRepository(site.folder).releases()[0]
    begin(store, site.url, release, b"of another time")
    assert pull(open_repository(site.url), store)[0].status == "installed"
    store.path("task").unlink()
    shutil.rmtree(store.folder)
    (site.folder / release.path).write_bytes(b"x" * release.size)
    failed = pull(open_repository(site.url), store)[0]
    assert failed.status == "failed"
    assert "has another content than the repository's digest says" in failed.reason
    assert not list(store.folder.rglob("*.part"))
    (site.folder / release.path).write_bytes(b"x" * (release.size + 1))
    assert "more than the" in pull(open_repository(site.url), store)[0].reason
    begin(store, site.url, release, b"y" * (release.size + 5))
    shutil.copy(adapters[0], site.folder / release.path)
    assert pull(open_repository(site.url), store)[0].status == "installed"


def test_superseded_parts_do_not_pile_up(site, store, adapters, monkeypatch):
    monkeypatch.setattr(pulling, "ATTEMPTS", 1)
    for path in (adapters[0], adapters[1], adapters[2]):
        push(FolderRepository(site.folder), path)
        site.failures = [200]
        assert pull(open_repository(site.url), store)[0].status == "failed"
        assert len(list(store.folder.rglob("*.part"))) == 1


def test_one_that_fails_leaves_the_others(site, store, adapters):
    folder = FolderRepository(site.folder)
    bad, good = push(folder, adapters[1], "bad"), push(folder, adapters[2], "good")
    (site.folder / bad.path).unlink()
    statuses = {one.name: one.status for one in pull(open_repository(site.url), store)}
    assert statuses == {"bad": "failed", good.name: "installed", "task": "installed"}


def test_what_is_no_adapter_is_not_installed(tmp_path, store):
    content = b"not an adapter, whatever its digest"
    release = Release("task", 1, digest_of(content), len(content))
    folder = tmp_path / "bad"
    (folder / "task").mkdir(parents=True)
    (folder / release.path).write_bytes(content)
    (folder / "index.json").write_bytes(render_index([release]))
    failed = pull(open_repository(str(folder)), store)[0]
    assert failed.status == "failed"
    assert "task version 1 is not a usable adapter" in failed.reason
    assert not store.names()
    assert not list(store.folder.rglob("*.part"))


def test_the_base_is_what_the_index_says_and_the_device_has(site, store, adapters):
    folder = FolderRepository(site.folder)
    right = Manifest("base", "0" * 16, "llama", "fp32", 12, 4, (0, 2), 1, 1, (1,), {})
    wrong = Manifest("other", "1" * 16, "llama", "fp32", 12, 4, (0, 2), 1, 1, (1,), {})
    assert pull(folder, store, base=wrong) == []
    refused = pull(folder, store, ["task"], base=wrong)[0]
    assert refused.status == "failed"
    assert "trained on another base model" in refused.reason
    assert pull(folder, store, base=right)[0].status == "installed"
    index = site.folder / "index.json"
    index.write_text(index.read_text().replace("0" * 16, "1" * 16))
    shutil.rmtree(store.folder)
    assert "while the repository says 1111" in pull(folder, store)[0].reason


def test_only_what_a_trusted_key_signed(site, store, adapters, tmp_path):
    generate_key(tmp_path / "fleet.key", "fleet")
    generate_key(tmp_path / "foreign.key", "foreign")
    trusted = load_trusted(tmp_path / "fleet.pub")
    repository = open_repository(site.url)
    refused = pull(repository, store, trusted=trusted)[0]
    assert refused.status == "failed"
    assert "not signed" in refused.reason
    for key, status in (("foreign", "failed"), ("fleet", "installed")):
        sign(adapters[0], load_private_key(tmp_path / f"{key}.key"))
        push(FolderRepository(site.folder), adapters[0])
        assert pull(repository, store, trusted=trusted)[0].status == status


# Strangers on the web


def test_unencrypted_connections_to_others_are_refused(store):
    for address in ("http://example.com/x/", "http://127.0.0.1.example.com/"):
        with pytest.raises(ReftEdgeError, match=r"not encrypted.*--plain-http"):
            open_repository(address).releases()
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert not is_loopback("127.0.0.1.example.com")


@pytest.mark.parametrize(
    "address",
    [
        "https://user:secret@example.com/",
        "https://example.com/?token=1",
        "https:///x",
        "ftp://x/",
        "hf://x",
        "hf://a/b/c",
        "oci://x",
        "oci://Host/Upper",
        "oci://h/a:b:c",
        "oci://h/../a",
        "oci://[::::]/a",
        "https://[bad",
        "https://h:abc/",
        "https://h\x07/",
    ],
)
def test_addresses_that_are_refused(address: str) -> None:
    with pytest.raises(ReftEdgeError, match="give "):
        open_repository(address)


class Elsewhere(Server):
    """Another host: the same address space, another port, so another origin."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.content = content

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        return Answer(200, self.content)


def test_redirects_are_followed_without_the_token(site, store, adapters, monkeypatch):
    monkeypatch.setenv("REFT_EDGE_TOKEN", "secret")
    release = FolderRepository(site.folder).releases()[0]
    with Elsewhere(adapters[0].read_bytes()).running() as other:
        site.replaced[f"/{release.path}"] = Answer(302, Location=f"{other.url}/blob")
        assert pull(open_repository(site.url), store)[0].status == "installed"
        assert all(headers["authorization"] == "Bearer secret" for _, _, headers in site.requests)
        assert [headers.get("authorization") for _, _, headers in other.requests] == [None]


def test_one_refusal_does_not_cost_the_token(site, store, adapters, monkeypatch):
    monkeypatch.setenv("REFT_EDGE_TOKEN", " secret\n")
    push(FolderRepository(site.folder), adapters[1], "another")
    site.failures = [Answer(401)]
    assert [one.status for one in pull(open_repository(site.url), store)] == ["failed", "installed"]
    assert {headers.get("authorization") for _, _, headers in site.requests} == {"Bearer secret"}


@pytest.mark.parametrize("token", ["tök", "a\nb"])
def test_a_token_that_no_header_can_carry(site, monkeypatch, token):
    monkeypatch.setenv("REFT_EDGE_TOKEN", token)
    with pytest.raises(ReftEdgeError, match="REFT_EDGE_TOKEN is no bearer token"):
        open_repository(site.url)


def test_redirects_are_bounded_and_stay_encrypted(site):
    site.replaced["/index.json"] = Answer(302, Location="/index.json")
    with pytest.raises(ReftEdgeError, match="redirects more than 5 times"):
        open_repository(site.url).releases()
    site.replaced["/index.json"] = Answer(302, Location="http://example.com/index.json")
    with pytest.raises(ReftEdgeError, match=r"example.com.*not encrypted"):
        open_repository(site.url).releases()
    site.replaced["/index.json"] = Answer(302, Location="file:///etc/passwd")
    with pytest.raises(ReftEdgeError):
        open_repository(site.url).releases()


def test_an_encrypted_server_cannot_send_us_to_this_machine() -> None:
    web = shipping_http.Web("https://example.com/", plain_http=False)
    with pytest.raises(ReftEdgeError, match="not encrypted"):
        web.check(httpx.URL("http://127.0.0.1:8080/admin"))


def test_answers_are_bounded(site, monkeypatch):
    site.replaced["/index.json"] = Answer(200, b" " * (MAX_INDEX + 10))
    with pytest.raises(ReftEdgeError, match="more than the 1,572,864 bytes"):
        open_repository(site.url).releases()
    site.replaced["/index.json"] = Answer(200, b"x", Content_Encoding="gzip")
    with pytest.raises(ReftEdgeError, match="compressed"):
        open_repository(site.url).releases()
    site.replaced["/index.json"] = Answer(200, b"{}")
    monkeypatch.setattr(shipping_http, "DEADLINE", -1.0)
    with pytest.raises(ReftEdgeError, match="takes longer"):
        open_repository(site.url).releases()


def test_a_missing_index_and_a_missing_server_are_named(site):
    with pytest.raises(ReftEdgeError, match=r"nowhere/index.json answered 404"):
        open_repository(f"{site.url}/nowhere").releases()
    site.replaced["/index.json"] = Answer(401)
    with pytest.raises(ReftEdgeError, match=r"401.*credentials"):
        open_repository(site.url).releases()
    with pytest.raises(ReftEdgeError, match=r"127.0.0.1:9/"):
        open_repository("http://127.0.0.1:9/").releases()
    with pytest.raises(ReftEdgeError, match="push to a folder"):
        open_repository(site.url).publish([])


# An OCI registry


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Registry]:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with Registry().running() as server:
        assert isinstance(server, Registry)
        yield server


def oci(registry: Registry, rest: str = "fleet/task") -> Repository:
    return open_repository(f"oci://{registry.url.removeprefix('http://')}/{rest}")


def test_an_oci_registry_holds_an_adapter_a_tag_a_version(registry, store, adapters):
    for number, path in enumerate(adapters, start=1):
        assert push(oci(registry), path).version == number
        assert pull(oci(registry), store)[0].installed == number
    assert push(oci(registry), adapters[2]).version == 3
    tags = {tag for _, tag in registry.manifests if not tag.startswith("sha256:")}
    assert tags == {"1", "2", "3", "latest"}
    assert pull(oci(registry), store, version=1)[0].installed == 1
    assert store.path("task").read_bytes() == adapters[0].read_bytes()
    assert push(oci(registry, "fleet/task:stable"), adapters[2]).version == 3
    assert pull(oci(registry, "fleet/task:stable"), store, version=None)[0].installed == 3
    manifest = json.loads(registry.manifests["fleet/task", "3"][1])
    assert manifest["artifactType"] == "application/vnd.reft-edge.adapter.v1"
    assert manifest["layers"][0]["annotations"]["org.opencontainers.image.title"] == "task.safetensors"


def test_more_versions_than_a_page_of_tags(registry, tmp_path):
    path = tmp_path / "a.safetensors"
    for number in range(1, 12):
        save_adapter(make_adapter("direft", number), path)
        assert push(oci(registry), path).version == number


def test_an_oci_repository_is_for_one_adapter(registry, store, adapters):
    push(oci(registry), adapters[0])
    with pytest.raises(ReftEdgeError, match="holds the adapter task; push other"):
        push(oci(registry), adapters[1], "other")
    with pytest.raises(ReftEdgeError, match="holds one adapter"):
        oci(registry).publish([read_goods(path) for path in adapters])
    with pytest.raises(ReftEdgeError, match="tags that are numbers"):
        push(oci(registry, "fleet/task:7"), adapters[1])
    with pytest.raises(ReftEdgeError, match="has no tag latest"):
        pull(oci(registry, "fleet/none"), store)
    with pytest.raises(ReftEdgeError, match="has no tag 9"):
        pull(oci(registry), store, version=9)


def test_a_blob_that_breaks_off_is_resumed_from_another_host(registry, store, adapters):
    push(oci(registry), adapters[0])
    registry.broken_after = [500]
    assert pull(oci(registry), store)[0].status == "installed"
    assert registry.requests[-1][2]["range"] == "bytes=500-"


def login(folder: Path, host: str, secret: str) -> None:
    config = {"auths": {host: {"auth": base64.b64encode(secret.encode()).decode()}}}
    (folder / "config.json").write_text(json.dumps(config))


def test_tokens_are_fetched_with_docker_s_login_and_stay_with_the_registry(
    store, adapters, tmp_path, monkeypatch
):
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with Registry("me:secret").running() as server, Elsewhere(adapters[0].read_bytes()).running() as other:
        assert isinstance(server, Registry)
        with pytest.raises(ReftEdgeError, match="401"):
            push(oci(server), adapters[0])
        login(tmp_path, server.url.removeprefix("http://"), "me:secret")
        push(oci(server), adapters[0])
        server.blob_store = other.url
        assert pull(oci(server), store)[0].status == "installed"
        assert [headers.get("authorization") for _, _, headers in other.requests] == [None]
        login(tmp_path, server.url.removeprefix("http://"), "me:wrong")
        with pytest.raises(ReftEdgeError, match="401"):
            pull(oci(server), store)


def test_registries_that_ask_for_the_login_itself(registry, store, adapters, tmp_path):
    registry.login, registry.basic = "me:secret", True
    with pytest.raises(ReftEdgeError, match="401"):
        push(oci(registry), adapters[0])
    login(tmp_path, registry.url.removeprefix("http://"), "me:secret")
    push(oci(registry), adapters[0])
    assert pull(oci(registry), store)[0].status == "installed"


def test_a_challenge_from_another_host_gets_no_credentials(registry, store, adapters, tmp_path):
    push(oci(registry), adapters[0])
    login(tmp_path, registry.url.removeprefix("http://"), "me:secret")

    class Greedy(Server):
        def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
            return Answer(401, b"{}", WWW_Authenticate=f'Bearer realm="{self.url}/token"')

    with Greedy().running() as greedy:
        registry.blob_store = greedy.url
        assert pull(oci(registry), store)[0].status == "failed"
        assert [path for _, path, _ in greedy.requests if path.startswith("/token")] == []
        assert all("authorization" not in headers for _, _, headers in greedy.requests)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schemaVersion": 1}, "not the manifest of an adapter"),
        ({"layers": []}, "one layer"),
        ({"layers": [7]}, "its layer is of type None"),
        (
            {"layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar"}]},
            "expected application/vnd.reft-edge",
        ),
        ({"annotations": {"org.opencontainers.image.version": "1.2"}}, "its version is '1.2'"),
        ({"annotations": {"a": 1}}, "not texts by name"),
        ({"annotations": None}, "its version is 'latest'"),
    ],
)
def test_manifests_that_are_refused(changes: dict[str, object], message: str) -> None:
    manifest = json.loads(render_manifest(Release(**ENTRY)))
    with pytest.raises(ReftEdgeError, match=message):
        parse_manifest(json.dumps({**manifest, **changes}).encode(), "latest")
    for title in ("../a.safetensors", "a.bin", ".safetensors"):
        manifest["layers"][0]["annotations"]["org.opencontainers.image.title"] = title
        with pytest.raises(ReftEdgeError, match=r"cannot be an adapter's name|is titled"):
            parse_manifest(json.dumps(manifest).encode(), "latest")


# The Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that huggingface_hub talks to; its constants are read at import, hence the attributes."""
    import huggingface_hub.constants as constants

    with Hub("hf_secret").running() as server:
        assert isinstance(server, Hub)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", server.url, raising=False)
        yield server


def test_the_hub_holds_the_same_index_in_commits(hub, store, adapters):
    repository = open_repository("hf://fleet/tasks")
    assert [push(repository, path).version for path in adapters] == [1, 2, 3]
    assert hub.private, "what nobody chose to publish"
    assert len(hub.commits) == 4
    assert push(repository, adapters[2]).version == 3
    assert len(hub.commits) == 4
    repository.publish([read_goods(path) for path in adapters])
    assert len(hub.commits) == 5
    found = pull(open_repository("hf://fleet/tasks"), store)
    assert [(one.name, one.installed) for one in found] == [
        ("task", 3),
        ("task1", 1),
        ("task2", 1),
        ("task3", 1),
    ]
    assert store.path("task").read_bytes() == adapters[2].read_bytes()
    assert pull(open_repository(f"hf://fleet/tasks@{2:040x}"), store)[0].status == "kept"


def test_a_commit_that_came_between_is_kept(hub, adapters):
    repository = open_repository("hf://fleet/tasks")
    push(repository, adapters[0])
    other = Release("other", 4, digest_of(b"x"), 1)
    hub.before_commit = [{"index.json": render_index([*repository.releases(), other])}]
    assert push(repository, adapters[1]).version == 2
    assert other in repository.releases()
    assert len(repository.releases()) == 3


def test_the_hub_s_token_is_not_sent_where_files_are_stored(hub, store, adapters):
    push(open_repository("hf://fleet/tasks"), adapters[0])
    with Elsewhere(adapters[0].read_bytes()).running() as other:
        hub.store = other.url
        assert pull(open_repository("hf://fleet/tasks"), store)[0].status == "installed"
        assert [headers.get("authorization") for _, _, headers in other.requests] == [None]


def test_the_hub_s_refusals_are_told(hub, store, adapters, monkeypatch):
    with pytest.raises(ReftEdgeError, match="answered 404"):
        pull(open_repository("hf://fleet/none"), store)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ReftEdgeError, match="401"):
        pull(open_repository("hf://fleet/tasks"), store)
    with pytest.raises(ReftEdgeError, match=r"cannot push to hf://fleet/tasks: .*401"):
        push(open_repository("hf://fleet/tasks"), adapters[0])
