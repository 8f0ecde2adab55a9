"""mkdocs hooks: the README is the site's first page, and links to files outside of docs/ hold."""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUT_OF_DOCS = {
    "README.md": "index.md",
    "examples/README.md": "examples/index.md",
    **{name: name for name in ("SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")},
}
"""Pages of the site by their files outside of docs/."""
SOURCES = {page: ROOT / source for source, page in OUT_OF_DOCS.items()}
LINK = re.compile(r"\]\(([^)#:]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/, and every file outside of docs/ that a page links to."""
    for page, source in SOURCES.items():
        files.append(File.generated(config, page, abs_src_path=str(source)))
    for page in list(files.documentation_pages()):
        for link in LINK.findall(page.content_string):
            target = _target(page.src_uri, link)
            name = _on_the_site(target)
            if target.is_file() and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links as they are in the repository, made those of the site."""
    here = PurePosixPath(page.file.src_uri).parent

    def of_the_site(link: re.Match[str]) -> str:
        target = _target(page.file.src_uri, link[1])
        return f"]({os.path.relpath(_on_the_site(target), here)}" if target.is_file() else link[0]

    return LINK.sub(of_the_site, markdown)


def _target(page: str, link: str) -> Path:
    """What a link of a page is to in the repository."""
    return (SOURCES.get(page, ROOT / "docs" / page).parent / link).resolve()


def _on_the_site(file: Path) -> str:
    name = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else file.name
    return OUT_OF_DOCS.get(name, name.removeprefix("docs/"))
