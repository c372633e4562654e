"""What users name goes through every output as it is."""

from __future__ import annotations

import pytest

from pipelines.console.tables import markdown_table, text_table, wide_console

NAMES = ["[/red] a [b]", "[bold]x", ":smile:", "a|b", "`code`", "<b>", "two\nlines", "[text](there)"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_no_markup_on_a_terminal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    console = wide_console()
    console.print(name)
    console.print(text_table(name, ["row", "note"], [[name, name]]))
    out = capsys.readouterr().out
    assert all(out.count(line) >= 4 for line in name.splitlines())


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_one_cell_of_a_markdown_table(name: str) -> None:
    lines = markdown_table(["row", "AP", "note"], [[name, "1.00", name]]).splitlines()
    assert len(lines) == 3
    assert lines[2].replace("\\|", "").count("|") == 4
    assert all(f"\\{mark}" in lines[2] for mark in "|`[]<" if mark in name)
