"""Records of a comparison and the table that is made of them, by hand."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pipelines.comparisons.cells import Comparison, ComparisonConfig, Row
from pipelines.comparisons.records import Figures, Record, read_records
from pipelines.comparisons.table import results
from pipelines.console.machine import Machine
from pipelines.console.tables import write_between_markers
from sapt_core.errors import DataError


def test_a_file_that_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text('{"row": "x"}')
    with pytest.raises(DataError) as caught:
        read_records(tmp_path)
    assert [fault.partition(":")[0] for fault in caught.value.faults] == ["a.json", "b.json"]


def record(row: str, seed: int, ap: float, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "row": row,
        "order": 1,
        "seed": seed,
        "overrides": (),
        "method": "sapt",
        "key": f"{row}{seed}",
        "settings": f"of {row}",
        "snapshot": "5" * 64,
        "commit": "0123456789",
        "written_at": datetime(2026, 11, 24 + seed, tzinfo=UTC),
        "machine": Machine(cpu="A CPU", cores=2, gpu=None, dtype="float32"),
        "sizes": {"tasks": 2},
        "figures": Figures(ap=ap, f_ra=1.0, fwt=None if row == "plain" else 0.5, bwt=-1.0, bwt_over_t=-0.5),
        "tasks": ("task1_a", "task2_b"),
        "scores": ((10.0,), (9.0, 20.0)),
        "single": None,
        "unseen": {},
        "zero_shot": {},
        "attention": (((1.0,),), ((0.75, 0.25), (0.25 + seed / 2, 0.75 - seed / 2))),
        "seconds": {"train": 10.0 + seed, "memory": 2.0, "prepare": 7.0},
        "source_bytes": 1536,
        **changes,
    }
    return Record(**values)


def comparison(**changes: Any) -> Comparison:
    rows = (Row(name="full", note="a|b", seeds=(0, 1)), Row(name="plain", seeds=(0, 3)), Row(name="later"))
    config = ComparisonConfig(base=Path("b.yaml"), orders=(1,), rows=rows, results=Path("results"), **changes)
    return Comparison("tiny", Path("compare_tiny.yaml"), config, ())


def test_markdown_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "results.md"
    path.write_text("# Results\n<!-- compare:tiny begin -->\nold\n<!-- compare:tiny end -->\nThe end.\n")
    there = [
        record("full", 0, 10.0, single=(8.0, 20.0), trained_parameters=5000, stored_bytes=2048, forward_cost=1.2),
        record("full", 1, 12.0, single=(10.0, 22.0), trained_parameters=5000, stored_bytes=2048, forward_cost=1.3),
        record("full", 2, 99.0, settings="older", written_at=datetime(2026, 1, 1, tzinfo=UTC)),
        record("plain", 0, 5.0, source_bytes=None, seconds={"train": 4.0}),
        record("gone", 0, 5.0),
    ]
    write_between_markers(path, "compare:tiny", results(comparison(), there).markdown())
    assert path.read_text() == (
        "# Results\n<!-- compare:tiny begin -->\n"
        "| row | cells | AP | alone | F.Ra | FWT | BWT | trained | stored | forward "
        "| train s | source s | kept | note |\n"
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --- |\n"
        "| full | 2 | 11.00 ± 1.41 | 15.00 ± 1.41 | 1.00 ± 0.00 | 0.50 ± 0.00 | -1.00 ± 0.00 "
        "| 5 k | 2 KiB | × 1.25 | 10 | 2 | 1.5 KiB | a\\|b |\n"
        "| plain | 1 of 2 | 5.00 | – | 1.00 | – | -1.00 | – | – | – | 4 | 0 | – |  |\n"
        "| later | 0 of 1 | – | – | – | – | – | – | – | – | – | – | – |  |\n"
        "\n"
        "Mean ± standard deviation over a row's cells (orders and seeds). 2026-11-24 to 2026-11-25, code at 0123456. "
        "A CPU, 2 cores, float32.\n"
        "\n"
        "No record yet: plain order 1 seed 3.\n"
        "\n"
        "Left out, of other settings than the newest of its row: full order 1 seed 2.\n"
        "\n"
        "Records of rows that the comparison no longer has: gone.\n"
        "<!-- compare:tiny end -->\nThe end.\n"
    )


def test_a_table_shows_the_columns_that_are_asked_for() -> None:
    made = results(comparison(columns=("F.Ra", "AP")), [record("full", 0, 10.0)])
    assert made.header == ("row", "cells", "AP", "F.Ra", "note")
    assert made.rows[0] == ("full", "1 of 2", "10.00", "1.00", "a|b")


def test_attention_and_unseen_tasks_by_hand() -> None:
    transfer = {"unseen": {"x": (1.0, 2.0), "y": (3.0, 4.0)}, "zero_shot": {"x": 0.0, "y": 0.0}}
    there = [record("full", 0, 10.0, **transfer), record("full", 1, 12.0, **transfer), record("plain", 0, 5.0)]
    made = results(comparison(attention=True), there)
    assert made.header[7] == "unseen"
    assert made.progress == (("full", (10.0, 14.5)), ("plain", (10.0, 14.5)))
    plot = made.plot()
    assert plot is not None
    assert plot.startswith(b"\x89PNG")
    assert [row[7] for row in made.rows] == ["3.00 ± 0.00", "–", "–"]
    assert made.attention[:4] == (
        ("row", "version", "block 1", "block 2", "on task"),
        ("full order 1", "1", "1.00", "", "task1"),
        ("full order 1", "2", "0.75", "0.25", "task1"),
        ("full order 1", "2", "0.50", "0.50", "task2"),
    )
    assert "Mean attention on each task's test rows" in made.markdown()
    assert len(made.tables()) == 2
