# SPDX-License-Identifier: Apache-2.0
"""Manual pages and HTML of the pages in docs/*.rst, by docutils."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from docutils.core import publish_string
from docutils.writers import get_writer_class

from virt_dib import __version__

DOCS = Path(__file__).parents[1] / "docs"
_SETTINGS: Mapping[str, object] = {
    "halt_level": 2,  # a warning is an error
    "input_encoding": "utf-8",
    "output_encoding": "unicode",
    # Nothing of this machine, nor of today, gets into the pages.
    "_disable_config": True,
    "datestamp": None,
    "generator": None,
    "source_link": None,
}
_HTML_SETTINGS: Mapping[str, object] = {
    "embed_stylesheet": True,
    "stylesheet_path": "minimal.css,responsive.css",
    "initial_header_level": 2,
    "doctitle_xform": True,
}


def sources() -> list[Path]:
    """The pages, of which each becomes one manual page and one of HTML."""
    return sorted(DOCS.glob("*.rst"))


def other_names(source: Path) -> list[str]:
    """The commands that a page is about besides that of its name: its title has them all."""
    title = re.search(r"^[^=].*$", source.read_text(encoding="utf-8"), re.MULTILINE)
    return [name for name in (title[0].strip().split(", ") if title else []) if name != source.stem]


def man_page(source: Path) -> str:
    """A page for section 1 of the manual."""
    version = f":Version: {__version__}\n"
    text = source.read_text(encoding="utf-8").replace(":Manual section:", f"{version}:Manual section:")
    # Recent docutils write 'Name', which programs that make indexes of manual pages need not know.
    page = _published(text, "manpage").replace(".SH Name\n", ".SH NAME\n")
    # A page is called by one name, whatever its title is.
    return re.sub(r'^\.TH "[^"]*"', f'.TH "{source.stem.upper()}"', page, flags=re.MULTILINE)


def link_page(source: Path) -> str:
    """The manual page of another name of *source*: man reads that one instead."""
    return f".so man1/{source.stem}.1\n"


def html_page(source: Path) -> str:
    """A page that stands alone."""
    # Fields for the manual's header line.
    lines = [line for line in source.read_text(encoding="utf-8").splitlines() if not line.startswith(":Manual ")]
    return _published("\n".join(lines), "html5")


def _published(text: str, writer: str) -> str:
    settings = {**_SETTINGS, **(_HTML_SETTINGS if writer == "html5" else {})}
    return str(publish_string(text, writer=get_writer_class(writer)(), settings_overrides=settings))
