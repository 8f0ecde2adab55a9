"""mkdocs hooks: the README is the site's first page, and links to files outside of docs/ hold."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
AT_THE_ROOT = {"README.md": "index.md"} | {
    name: name for name in ("SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")
}
"""Pages of the site by their files at the repository's root."""
OUT_OF_DOCS = re.compile(r"\]\((?:\.\./|docs/)")
LINK = re.compile(r"\]\(([^)#:]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages at the repository's root, and every file outside of docs/ that a page links to."""
    for source, page in AT_THE_ROOT.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for page in list(files.documentation_pages()):
        folder = ROOT if page.src_uri in AT_THE_ROOT.values() else ROOT / "docs"
        for link in LINK.findall(page.content_string):
            target = (folder / link).resolve()
            name = target.relative_to(ROOT).as_posix()
            if target.is_file() and not name.startswith("docs/") and name not in AT_THE_ROOT:
                files.append(File.generated(config, name, abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links as they are in the repository, made those of the site, where all is in one folder."""
    return OUT_OF_DOCS.sub("](", markdown)
