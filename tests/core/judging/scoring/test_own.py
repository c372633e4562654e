"""Metrics of the user's own: found, tried and told of before anything is trained."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sapt_core.errors import ConfigError
from sapt_core.judging.metrics import estimates, score
from sapt_core.judging.scoring import own
from sapt_core.judging.scoring.named import metric_faults, own_sources, require_sources

SOURCE = """
def first_letter(prediction, references):
    return 100.0 * any(prediction[:1] == reference[:1] for reference in references)

def no_number(prediction, references):
    return "high"

def infinite(prediction, references):
    return float("inf")

def raises(prediction, references):
    return 1 / 0

def of_three(prediction, references, sources):
    return 0.0

class Kept:
    @staticmethod
    def always(prediction, references):
        return 7

LEVEL = 3
"""


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "our_scores.py").write_text(SOURCE)
    (tmp_path / "torn_scores.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.chdir(tmp_path)
    own._function.cache_clear()
    yield tmp_path
    own._function.cache_clear()
    for name in ("our_scores", "torn_scores"):
        sys.modules.pop(name, None)


def test_a_function_in_the_working_folder_scores() -> None:
    assert score("our_scores:first_letter", ["cat", "dog"], [["car"], ["cat", "bird"]]) == 50.0
    found = estimates(["exact_match", "our_scores:Kept.always"], ["a"], [["a"]])
    assert (found["exact_match"].score, found["our_scores:Kept.always"]) == (100.0, (7.0, 7.0, 7.0))
    assert str(Path.cwd()) not in sys.path


def test_all_faults_are_told_at_once() -> None:
    names = ["our_scores:missing", "torn_scores:any", "gone.scores:any", "our_scores:no_number", "our_scores:infinite"]
    names += ["our_scores:raises", "our_scores:of_three", "our_scores:LEVEL", "rouge", "our_scores:first_letter"]
    found = metric_faults(names)
    expected = [
        "our_scores has no missing; it has: Kept, first_letter, infinite, no_number, of_three, raises",
        "module torn_scores cannot be imported: ModuleNotFoundError: No module named 'nowhere_to_be_found'",
        "module gone.scores cannot be imported",
        "gives no number: ValueError",
        "gives inf: give a finite number, 0 to 100",
        "gives no number: ZeroDivisionError",
        "does not take a prediction and its references",
        "is a int and no function",
        "there is no metric 'rouge'; did you mean rouge_l?",
    ]
    assert len(found) == len(expected)
    for fault, part in zip(found, expected, strict=True):
        assert part in fault


def test_another_file_is_another_metric(working_folder: Path) -> None:
    known = own_sources(["rouge_l", "our_scores:first_letter"])
    assert list(known) == ["our_scores:first_letter"]
    require_sources(known)
    (working_folder / "our_scores.py").write_text(SOURCE + "\n# changed\n")
    with pytest.raises(ConfigError, match="its file here is another than where the run was started"):
        require_sources(known)
    (working_folder / "our_scores.py").unlink()
    sys.modules.pop("our_scores")
    own._function.cache_clear()
    with pytest.raises(ConfigError, match="module our_scores cannot be imported"):
        require_sources(known)
