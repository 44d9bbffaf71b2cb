"""Hooks of the documentation site: it also holds the README, the results and the other documents of the root.

In the repository these files are read where they lie, so their links are relative to that place. On the site everything
lies under one root, so links are moved accordingly.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
CODE_OF_CONDUCT = "CODE_OF_CONDUCT.md"
FOLDERS = ("results", "recipes", "examples", "models", "src", "tests/laws")
SHOWN = {".md", ".svg", ".html", ".yaml", ".png", ".py"}
LINK = re.compile(r"(?P<before>\]\(|(?:src|href)=\")(?P<target>[^)\s\"#]+)(?P<rest>#[^)\s\"]*)?(?P<after>[)\"])")


def on_files(files: Files, config: Any) -> Files:
    """Add the documents that lie outside docs/, at the address that `site_path` gives them."""
    outside = [ROOT / name for name in (*PAGES, CODE_OF_CONDUCT)]
    outside += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SHOWN]
    for path in outside:
        address = site_path(path)
        if path.suffix == ".md":
            files.append(File.generated(config, address, content=path.read_text(encoding="utf-8")))
        else:
            files.append(File.generated(config, address, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Move the links of a page from where its source lies in the repository to where things lie on the site."""
    source = source_of(page.file.src_uri)
    here = PurePosixPath(page.file.src_uri).parent
    return LINK.sub(lambda match: moved(match, source.parent, here), markdown)


def moved(match: re.Match[str], folder: Path, here: PurePosixPath) -> str:
    """One link, as the site needs it; a link to a file that the site does not hold becomes one to the repository."""
    target = match["target"]
    if "://" in target or target.startswith(("mailto:", "/")):
        return match[0]
    path = (folder / target).resolve()
    if not path.is_relative_to(ROOT) or not path.exists():
        return match[0]  # strict mode names it
    if path.is_dir():
        index = path / "README.md"
        if not index.is_file() or path.name not in FOLDERS:
            return match[0]
        path = index
    address = PurePosixPath(site_path(path))
    up = [".."] * len(here.parts)
    return f"{match['before']}{'/'.join([*up, str(address)])}{match['rest'] or ''}{match['after']}"


def site_path(path: Path) -> str:
    """The address of a file of the repository, below the root of the site."""
    inside = path.relative_to(ROOT)
    if inside.parts[0] == "docs":
        return PurePosixPath(*inside.parts[1:]).as_posix()
    return PAGES.get(inside.as_posix(), inside.as_posix().replace(CODE_OF_CONDUCT, "code-of-conduct.md"))


def source_of(address: str) -> Path:
    """The file of the repository behind an address of the site."""
    names = {site: name for name, site in PAGES.items()} | {"code-of-conduct.md": CODE_OF_CONDUCT}
    if address in names:
        return ROOT / names[address]
    first = PurePosixPath(address).parts[0]
    return ROOT / address if first in FOLDERS else ROOT / "docs" / address
