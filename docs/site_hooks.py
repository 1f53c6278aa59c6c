"""What MkDocs calls while `make docs` builds the site: what is not a file of docs/.

- README.md is the first page, and the pages of ``benchmarks/`` are pages of the site. Links are
  written for the repository and rewritten for the site; one to a file that is not on the site
  becomes text.
- ``reference/commands.md`` gets the help of every command, from the recording that a test compares
  with the parsers.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
DOCS, BENCHMARKS = REPOSITORY / "docs", REPOSITORY / "benchmarks"
HELP = REPOSITORY / "tests/golden/cli_help.txt"
LINK = re.compile(r"(!?)\[([^\]]+)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the first page, and the pages and pictures of ``benchmarks/``."""
    for path in [README, *sorted(BENCHMARKS.glob("*"))]:
        if path.suffix in (".md", ".png"):
            files.append(File.generated(config, _name_on_site(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the places that their files have on the site, and fill in the help."""
    here = os.path.dirname(page.file.src_uri) or "."
    source = Path(page.file.abs_src_path or DOCS).resolve().parent

    def rewritten(link: re.Match[str]) -> str:
        image, text, target, anchor = link[1], link[2], (source / link[3]).resolve(), link[4] or ""
        name = _name_on_site(target)
        if files.get_file_from_path(name):
            return f"{image}[{text}]({os.path.relpath(name, here)}{anchor})"
        return text if target.exists() else link[0]

    markdown = LINK.sub(rewritten, markdown)
    return markdown.replace("<!-- help of every command -->", _help_sections())


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that loads anything from another host."""
    if found := re.search(r'(?:src|<link[^>]+href)="(?:https?:)?//[^"]+', output):
        raise PluginError(f"{page.file.src_uri}: expected no file of another host, got {found[0]}")
    return output


def _name_on_site(path: Path) -> str:
    """Return the path that a file of the repository has on the site, if it is there."""
    if path == README:
        return "index.md"
    base = DOCS if path.is_relative_to(DOCS) else REPOSITORY
    return os.path.relpath(path, base)


def _help_sections() -> str:
    """Return a section per command, from the help texts one after the other in one file."""
    texts = re.split(r"^(?=usage: )", HELP.read_text(encoding="utf-8"), flags=re.MULTILINE)
    sections = []
    for text in texts:
        if name := re.match(r"usage: (fedpipe(?: [a-z]+)*)", text):
            sections.append(f"## {name[1]}\n\n```text\n{text.rstrip()}\n```\n")
    return "\n".join(sections)
