"""What MkDocs calls while `make docs` builds the site: what is not a file of docs/.

- The pages of ``benchmarks/`` become part of the site. Links between them and docs/ are written for
  the repository and rewritten for the site; a link to another file of the repository becomes text.
- ``reference/commands.md`` gets the help of every command, from the recording that a test compares
  with the parsers.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS, BENCHMARKS = REPOSITORY / "docs", REPOSITORY / "benchmarks"
HELP = REPOSITORY / "tests/golden/cli_help.txt"
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures of ``benchmarks/``."""
    for path in sorted(BENCHMARKS.glob("*")):
        if path.suffix in (".md", ".png"):
            name = path.relative_to(REPOSITORY).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the places that their files have on the site, and fill in the help."""
    source = Path(page.file.abs_src_path or DOCS).resolve().parent
    here = os.path.dirname(page.file.src_uri) or "."

    def rewritten(link: re.Match[str]) -> str:
        text, target, anchor = link[1], (source / link[2]).resolve(), link[3] or ""
        for folder, base in ((DOCS, DOCS), (BENCHMARKS, REPOSITORY)):
            if target.is_relative_to(folder) and target.suffix != ".py":
                return f"[{text}]({os.path.relpath(target.relative_to(base), here)}{anchor})"
        return text if target.exists() else link[0]

    markdown = LINK.sub(rewritten, markdown)
    return markdown.replace("<!-- help of every command -->", _help_sections())


def _help_sections() -> str:
    """Return a section per command, from the help texts one after the other in one file."""
    texts = re.split(r"^(?=usage: )", HELP.read_text(encoding="utf-8"), flags=re.MULTILINE)
    sections = []
    for text in texts:
        if name := re.match(r"usage: (fedpipe(?: [a-z]+)?)", text):
            sections.append(f"## {name[1]}\n\n```text\n{text.rstrip()}\n```\n")
    return "\n".join(sections)
