# SPDX-License-Identifier: Apache-2.0
"""The table of comparisons with diskimage-builder."""

from __future__ import annotations

from pathlib import Path

from comparisons import Comparison, Table

PAGES = {"unseen": "never seen", "dots": "names with dots are lost", "status": "the status is another one"}


def made(name: str) -> Comparison:
    return Comparison(name=name, command=f"disk-image-create {name}")


def table(path: Path | None = None) -> Table:
    return Table(path=path, order=["first", "second", "third"], pages=PAGES)


def test_what_is_the_same_what_differs_and_what_nobody_knows_of() -> None:
    comparison = made("first")
    comparison.same("exit status", 0, 0, "0")
    comparison.differs("tree", "dots", ["/.b", "/.a", "/.b"])
    comparison.differs("lines", "status", [])
    comparison.same("names", ["a", "b"], ["a", "c"])
    assert [(row.what, row.outcome, row.detail) for row in comparison.rows] == [
        ("exit status", "equal", "0"),
        ("tree", "differs", "/.a, /.b"),
        ("names", "DIFFERS, and no page says so", ""),
    ]
    (failure,) = comparison.failures
    assert failure.splitlines()[0] == "first: names"
    assert "-['a', 'b']" in failure
    assert "+['a', 'c']" in failure


def test_cases_in_their_order_and_differences_by_number(tmp_path: Path) -> None:
    path = tmp_path / "build" / "table.txt"
    written = table(path)
    second, first = made("second"), made("first")
    second.same("exit status", 1, 1, "1")
    second.differs("tree", "dots", ["/.a"])
    first.differs("exit status", "status", ["1 there"])
    written.add(second)
    assert "1 of 3 cases" in path.read_text()
    written.add(first)
    lines = path.read_text().splitlines()
    assert lines == [
        "2 of 3 cases",
        "",
        "case    compared     outcome",
        "",
        "first   exit status  differs [2]  1 there",
        "    disk-image-create first",
        "",
        "second  exit status  equal        1",
        "        tree         differs [1]  /.a",
        "    disk-image-create second",
        "",
        "Differences, as docs/drop-in.md has them:",
        "[1]  names with dots are lost",
        "[2]  the status is another one",
    ]


def test_long_details_are_folded_below_their_beginning() -> None:
    comparison, written = made("third"), table()
    comparison.same("names", 1, 1, ", ".join(f"file-{number}" for number in range(60)))
    written.add(comparison)
    row = [line for line in written.text().splitlines() if "file-" in line]
    column = row[0].index("file-0")
    assert len(row) > 3
    assert all(line.startswith(" " * column + "file-") for line in row[1:])
    assert max(map(len, row)) <= 150
