"""A model repository on the Hugging Face Hub: the same index and files as a folder's, in its revision's root."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from reft_edge.deadline import in_time
from reft_edge.errors import ReftEdgeError
from reft_edge.shipping.http import HttpRepository
from reft_edge.shipping.release import INDEX, Goods, Release, next_releases, render_index

ATTEMPTS = 5
DEADLINE = 3600.0
"""Seconds that a push may take, its uploads included."""


class HubRepository:
    """hf://OWNER/REPO or hf://OWNER/REPO@REVISION, with the token and endpoint that huggingface_hub finds.

    Reading is plain HTTP with its bounds; commits are huggingface_hub's, each on the one it was made from.
    """

    def __init__(self, place: str, plain_http: bool = False) -> None:
        from huggingface_hub import HfApi, hf_hub_url
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import build_hf_headers, validate_repo_id

        self.address = f"hf://{place}"
        self._repo, _, revision = place.strip("/").partition("@")
        try:
            validate_repo_id(self._repo)
        except HFValidationError as error:
            raise ReftEdgeError(f"{self.address}: {error}; give hf://OWNER/REPO") from error
        if self._repo.count("/") != 1:
            raise ReftEdgeError(f"{self.address} is not a repository's address; give hf://OWNER/REPO")
        self._revision = revision or None
        self._plain_http = plain_http
        self._headers = {name.lower(): value for name, value in build_hf_headers().items()}
        self._url = partial(hf_hub_url, self._repo, INDEX)
        self._files = self._at(self._revision)
        self._api = HfApi()

    def releases(self, version: int | None = None) -> list[Release]:
        return self._files.releases(version)

    @contextmanager
    def open(self, release: Release, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        with self._files.open(release, start) as opened:
            yield opened

    def publish(self, goods: Sequence[Goods]) -> list[Release]:
        """One commit. If another one comes between, it is made anew on top of that.

        Raises ReftEdgeError, too, if that is not done after DEADLINE.
        """
        return in_time(lambda: self._publish(goods), DEADLINE, f"pushing to {self.address}")

    def _publish(self, goods: Sequence[Goods]) -> list[Release]:
        from huggingface_hub.errors import HfHubHTTPError

        attempt = 1
        try:
            self._api.create_repo(self._repo, private=True, exist_ok=True)
            while True:
                try:
                    return self._commit(goods)
                except HfHubHTTPError as error:
                    moved = error.response is not None and error.response.status_code in (409, 412)
                    if not moved or attempt == ATTEMPTS:
                        raise
                    attempt += 1
        except ReftEdgeError:
            raise
        except Exception as error:  # huggingface_hub also raises what its HTTP library does
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ReftEdgeError(f"cannot push to {self.address}: {reason}") from error

    def _commit(self, goods: Sequence[Goods]) -> list[Release]:
        from huggingface_hub import CommitOperationAdd

        info = self._api.repo_info(self._repo, revision=self._revision)
        files = {file.rfilename for file in info.siblings or []}
        known = self._at(info.sha).releases() if INDEX in files else []
        made = next_releases(known, goods)
        if all(release in known for release in made):
            return made
        contents = {release.path: item.content for release, item in zip(made, goods, strict=True)}
        contents[INDEX] = render_index(dict.fromkeys([*known, *made]))
        self._api.create_commit(
            self._repo,
            [CommitOperationAdd(path, content) for path, content in contents.items()],
            commit_message="Push " + ", ".join(str(release) for release in made),
            revision=self._revision,
            parent_commit=info.sha,
        )
        return made

    def _at(self, revision: str | None) -> HttpRepository:
        return HttpRepository(self._url(revision=revision), self._plain_http, self._headers)
