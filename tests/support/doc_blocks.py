"""Reads the pages: fenced blocks, the commands in them, headings and links."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from paths import ROOT

DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS, *sorted((ROOT / "examples").rglob("*.md"))]
FENCE = re.compile(r'^```(\w*)(?: title="([^"]+)")?$')
LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    title: str
    """Name of the file that the block is; empty if it is none."""
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@functools.cache
def read_blocks(page: Path) -> tuple[Block, ...]:
    """Raises ValueError for a fence that is neither opened nor closed as the pages write fences."""
    found: list[Block] = []
    opened: tuple[int, str, str] | None = None
    body: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if opened is None:
            if line.lstrip().startswith("```"):
                match = FENCE.match(line)
                if match is None:
                    raise ValueError(f"{page}:{number}: {line!r} opens no fence as the pages have them")
                opened, body = (number, match[1], match[2] or ""), []
        elif line == "```":
            found.append(Block(page, *opened, "".join(f"{each}\n" for each in body)))
            opened = None
        else:
            body.append(line)
    if opened is not None:
        raise ValueError(f"{page}:{opened[0]}: a fence without an end")
    return tuple(found)


def all_blocks(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in read_blocks(page) if block.language in languages]


def prose(page: Path) -> str:
    """The page without fenced blocks, which become empty lines."""
    blank, inside = [], False
    for line in page.read_text().splitlines():
        inside ^= line.startswith("```")
        blank.append("" if inside or line.startswith("```") else line)
    return "\n".join(blank)


def links(page: Path) -> Iterator[str]:
    """Yields the targets of links and images; not those in code."""
    for _, target in LINK.findall(re.sub(r"`[^`]*`", "", prose(page))):
        yield target


def anchors(page: Path) -> set[str]:
    """The anchors of headings that a forge and the site write alike; others are left out."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {forge for text in headings if (forge := _on_a_forge(text)) == _on_the_site(text)}


def _on_a_forge(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "")).strip().lower().replace(" ", "-")


def _on_the_site(heading: str) -> str:
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower())


LOOP = re.compile(r"for \w+ in [^;]*;|\bdo\b|\bdone\b")


def commands(block: Block) -> list[str]:
    """The commands of a bash block, or those behind `$ ` of a text block: continued lines joined, loops opened."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "text":
        return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    found = []
    for line in lines:
        for part in LOOP.sub(";", line).split(";") if LOOP.search(line) else [line]:
            if (part := part.strip()) and not part.startswith(("#", ">")):
                found.append(part)
    return found
