# SPDX-License-Identifier: Apache-2.0
"""The files that are installed below PREFIX/share; ``python -m generate.share [DIRECTORY]`` makes them elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

from generate import catalogue, completion, manual

COMPLETION_FILES = {
    "bash": ("bash-completion/completions", "{}"),
    "zsh": ("zsh/site-functions", "_{}"),
    "fish": ("fish/vendor_completions.d", "{}.fish"),
}
"""Where each shell looks for the completion of a command, and by what name."""
_ROOT = Path(__file__).parents[1]
_PAGES = ("*.md", "LICENSE", "docs/*.*")
"""What messages and the manual point to. They lie there as they do here, or their links would lead nowhere."""


def make(top: Path) -> dict[str, list[str]]:
    """Write all files below *top*; their paths, by the directories below PREFIX that they belong in."""
    files: dict[str, list[str]] = {}

    def write(directory: str, name: str, text: str) -> None:
        path = top / directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        files.setdefault(f"share/{directory}", []).append(str(path))

    # Part of the package itself, whose files a checkout is run from.
    catalogue.compile_all(catalogue.PACKAGE_DIR / "locale")
    for source in manual.sources():
        write("man/man1", f"{source.stem}.1", manual.man_page(source))
        write("doc/virt-dib", f"{source.stem}.html", manual.html_page(source))
        for name in manual.other_names(source):
            write("man/man1", f"{name}.1", manual.link_page(source))
    for page in sorted(path for pattern in _PAGES for path in _ROOT.glob(pattern)):
        place = Path("doc/virt-dib") / page.relative_to(_ROOT).parent
        write(str(place), page.name, page.read_text(encoding="utf-8"))
    for command in completion.COMMANDS.values():
        for shell, (directory, name) in COMPLETION_FILES.items():
            write(directory, name.format(command.name), completion.script(command, shell))
    return files


if __name__ == "__main__":
    make(Path(*(sys.argv[1:] or ["build/share"])))
