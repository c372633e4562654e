"""The sections of a report: each is a function of the findings that gives None where there is nothing to show.

Another section is another function in ``SECTIONS``; the template shows whatever text, tables and plots
it consists of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from pipelines.console import taskrows
from pipelines.console.tables import interval
from pipelines.reports.answers import SHOWN_ROWS, Answer, cut
from pipelines.reports.findings import Findings
from pipelines.sequence.scored import Scored
from sapt_core.judging import plots
from sapt_core.judging.analysis import QUARTER_STEPS, draw
from sapt_core.judging.scoring.intervals import LEVEL, RESAMPLES

MOST_CHARACTERS = 200  # of an input or an answer
HEAVIEST = 3  # blocks of an answer


@dataclass(frozen=True)
class Table:
    """Rows of text under a head. The first column names the row; the first ``left`` columns are words, not figures."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1
    folded: bool = False


@dataclass(frozen=True)
class Plot:
    """A PNG. ``alt`` says what it shows to those who cannot see it; the tables beside it have its figures."""

    name: str
    alt: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Points:
    """A list, each entry with its head."""

    entries: tuple[tuple[str, str], ...]


Part: TypeAlias = str | Table | Plot | Points


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, tables and plots under it."""

    anchor: str
    title: str
    parts: tuple[Part, ...]


def warnings(findings: Findings) -> Section:
    """Figures beyond their limits, and what to change."""
    limits = findings.experiment.config.diagnostics
    measured = [
        f"had a score of 0 when just learnt, a loss that was still falling by more than {limits.falling:g} nats over "
        f"the last quarter of its steps, or fewer than {4 * QUARTER_STEPS} steps, too few to tell",
        "scored no better than giving always its commonest answer or, where that was scored, than the bare backbone",
        f"fell by more than {limits.forgetting:g} points",
    ]
    if findings.matrix.single is not None:
        measured.append(f"was learnt more than {limits.transfer:g} points worse than alone")
    if findings.attention is not None and findings.attention.kl[-1] is not None:
        measured.append(f"has attention more than {limits.misalignment:g} nats from where it was learnt")
    if not findings.diagnoses:
        return Section("warnings", "Warnings", (f"None: no task {_either(measured)}.",))
    alike: dict[tuple[str, str], list[str]] = {}
    for each in findings.diagnoses:
        alike.setdefault((each.kind, each.cure), []).append(f"{each.task} ({each.size})")
    entries = tuple((f"{kind}: {', '.join(tasks)}", cure) for (kind, cure), tasks in alike.items())
    return Section("warnings", "Warnings", (f"Looked for: a task that {_either(measured)}.", Points(entries)))


def scores(findings: Findings) -> Section:
    """The score matrix."""
    matrix, tasks, split = findings.matrix, findings.tasks, findings.experiment.config.evaluation.split
    rows = [
        (f"after {name}", *_padded((_estimated(each.score, each.interval) for each in row), len(tasks)))
        for name, row in zip(matrix.labels, findings.scored, strict=True)
    ]
    if matrix.single is not None:
        rows.append(("alone", *map(_one, matrix.single)))
    plot = Plot(
        "scores",
        f"Heat map of the score on each of {len(tasks)} tasks after each was learnt; the table has its figures.",
        "Read a column downwards to see how a task fares while later ones are learnt; its first cell is the task just "
        "learnt.",
        plots.score_map(tasks, matrix.rows, matrix.labels),
    )
    said = (
        f" with {LEVEL} % confidence intervals" if any(each.interval for row in findings.scored for each in row) else ""
    )
    table = Table(f"Scores, 0 to 100, on the {split} rows{said}", ("", *tasks), tuple(rows), folded=True)
    text = [_OF_INTERVALS] if said else []
    return Section("scores", "Scores", (_held_against(findings), plot, *text, table, *_other_scores(findings)))


_OF_INTERVALS = (
    f"Intervals are of a bootstrap over the rows that were scored ({RESAMPLES} draws): how far other rows of the same "
    "kind would move a score. What another seed or another order would do is not in them."
)


def _other_scores(findings: Findings) -> list[Table]:
    """A table a metric that stands beside the leading one."""
    tasks = findings.tasks
    names = dict.fromkeys(name for row in findings.scored for each in row for name in each.others)
    return [
        Table(
            f"Scores by {name} with {LEVEL} % confidence intervals",
            ("", *tasks),
            tuple(
                (f"after {task}", *_padded((_other(each, name) for each in row), len(tasks)))
                for task, row in zip(findings.matrix.labels, findings.scored, strict=True)
            ),
            folded=True,
        )
        for name in names
    ]


def _other(scored: Scored, name: str) -> str:
    each = scored.others.get(name)
    return "–" if each is None else _estimated(each.score, (each.low, each.high))


def _estimated(score: float, ends: tuple[float, float] | None) -> str:
    return _one(score) if ends is None else f"{_one(score)} ({interval(ends)})"


def _held_against(findings: Findings) -> Table:
    """What tells whether a task was learnt."""
    matrix = findings.matrix
    single: Sequence[float | None] = matrix.single or [None] * len(matrix.tasks)
    failed = {each.task for each in findings.diagnoses if each.kind == "not learnt"}
    rows = tuple(
        (
            name,
            "no" if name in failed else "yes",
            *map(_one, (matrix.rows[matrix.learnt(place)][place], constant, bare, alone, now)),
        )
        for place, (name, constant, bare, alone, now) in enumerate(
            zip(matrix.tasks, findings.constant, findings.bare, single, matrix.rows[-1], strict=True)
        )
    )
    head = ("task", "learnt", "score when just learnt", "always the commonest answer", "bare backbone", "alone", "now")
    return Table("Learnt: better than both of the baselines, as far as they are known", head, rows, left=2)


def data(findings: Findings) -> Section | None:
    """What the tasks came to as tokens, as it was counted when they were prepared."""
    known = [(name, each) for name, each in zip(findings.tasks, findings.data, strict=True) if each is not None]
    if not known:
        return None
    benchmark = findings.experiment.config.benchmark
    rows = tuple(row for name, each in known for row in taskrows.cells(name, each.facts))
    notes = [(name, "; ".join(taskrows.lines(each.facts, each.cut))) for name, each in known]
    text = (
        f"Tokens of prompts and answers (median / longest), rows that lose some to max_source_tokens="
        f"{benchmark.max_source_tokens} and max_target_tokens={benchmark.max_target_tokens}, tokens of answers that "
        "the tokenizer does not know, and rows whose input an earlier row of the split has. sapt data show has the "
        "rows themselves, token by token."
    )
    parts: list[Part] = [text, Table("Rows of every task that was prepared here", taskrows.HEAD, rows)]
    told = tuple(note for note in notes if note[1])
    return Section("data", "Data", (*parts, Points(told)) if told else tuple(parts))


def answers(findings: Findings) -> Section | None:
    """Some rows of every task, and what was answered."""
    tasks, split = findings.tasks, findings.experiment.config.evaluation.split
    shown = [[each[i] for i in draw(len(each), SHOWN_ROWS)] for each in findings.answers]
    if not any(shown):
        return None
    rows = tuple(
        (
            name,
            _told(each.prompt),
            " / ".join(map(_told, each.right)),
            _told(each.learnt),
            _told(each.now),
            _heaviest(each),
            _one(each.score),
        )
        for name, found in zip(tasks, shown, strict=True)
        for each in found
    )
    now = f"answer after {findings.matrix.labels[-1]}"
    head = ("task", "input", "right answer", "answer when just learnt", now, "made with", "score")
    text = (
        f"Some {split} rows of every task, drawn whatever was answered; texts over {MOST_CHARACTERS} characters cut. "
        f"Made with: the weights of the {HEAVIEST} heaviest blocks, where they are known. A run in MLflow has more "
        "rows, as a table: predictions.json."
    )
    table = Table(f"Up to {SHOWN_ROWS} rows a task", head, rows, left=len(head) - 1)
    return Section("answers", "Answers", (text, table))


def attention(findings: Findings) -> Section | None:
    """Which blocks each task attends to."""
    found, tasks = findings.attention, findings.tasks
    if found is None:
        return None
    blocks, split = findings.manifest.block_names, findings.experiment.config.evaluation.split
    now = f"after {findings.matrix.labels[-1]}"
    maps = [("when learnt", found.learnt), (f"{now}, {split} rows", found.test[-1])]
    if found.dev[-1] is not None and split != "dev":
        maps.insert(1, (f"{now}, dev rows", found.dev[-1]))
    parts: list[Part] = [
        "How much each block takes part in the answers to each task's inputs. Where training and use agree, the maps "
        "are alike: a task's row keeps the weights it had when it was learnt, and blocks that came later get none.",
        Plot(
            "attention",
            f"{len(maps)} heat maps of the mean weight of {len(blocks)} blocks on the inputs of {len(tasks)} tasks: "
            f"{', '.join(title for title, _ in maps)}. The table has the figures of the last two.",
            "Mean weights; every row adds up to 1. When learnt: over the rows that gave the target of the reflection.",
            plots.weight_maps(tasks, blocks, maps),
        ),
    ]
    if len(found.dev) > 1 and any(rows is not None for rows in found.dev):
        parts.append(
            Plot(
                "attention-history",
                f"{len(found.dev)} small heat maps, one a version, of the mean weight of the blocks on the dev rows.",
                "The same on the dev rows after every task: tasks down, blocks across, both oldest first.",
                plots.weight_history(tasks, found.dev, findings.matrix.labels),
            )
        )
    rows = [
        (f"{name}, {kind} rows", *map(_two, weights))
        for j, name in enumerate(tasks)
        for kind, every in {"dev": found.dev[-1], split: found.test[-1]}.items()
        if every is not None
        for weights in (every[j],)
    ]
    parts.append(Table(f"Mean weights {now}", ("inputs", *blocks), tuple(rows), folded=True))
    return Section("attention", "Attention", tuple(parts))


def alignment(findings: Findings) -> Section | None:
    """How far attention is from where it was when each task was learnt."""
    found, tasks = findings.attention, findings.tasks
    if found is None or all(row is None for row in found.kl):
        return None
    limit = findings.experiment.config.diagnostics.misalignment
    plot = Plot(
        "alignment",
        f"Heat map of the KL of each task's attention after each of {len(found.kl)} tasks; the table has its figures.",
        f"Read a column downwards. Bold, and above the line of the scale: beyond the limit of {limit:g} "
        "(diagnostics.misalignment).",
        plots.alignment_map(tasks, found.kl, limit, findings.matrix.labels),
    )
    rows = tuple(
        (f"after {name}", *(_padded(map(_three, row), len(tasks)) if row is not None else ["not measured"]))
        for name, row in zip(findings.matrix.labels, found.kl, strict=True)
    )
    return Section(
        "alignment",
        "Alignment",
        (
            "KL, in nats, of each task's attention when it was learnt from its mean attention on dev rows after every "
            "task. 0: it is where it was. The first cell of a column tells how differently held-out rows attend from "
            "those it was learnt on; what is added below, later tasks have moved.",
            plot,
            Table("KL of each task's attention, nats", ("", *tasks), rows, folded=True),
        ),
    )


def training(findings: Findings) -> Section:
    """Curves of every task."""
    trained = [
        (name, curve, ends)
        for name, curve, ends in zip(findings.matrix.labels, findings.curves, findings.gates, strict=True)
        if curve is not None
    ]
    tasks, curves = [name for name, _, _ in trained], [curve for _, curve, _ in trained]
    plot = Plot(
        "curves",
        f"A panel for each of {len(tasks)} tasks: the loss and what the method adds to it against steps on the left "
        "axis, the new block's weight "
        "on the right one. The table has their ends.",
        "A new block whose weight stays low learns little: its key starts too far from the task's inputs.",
        plots.curves(tasks, curves),
    )
    rows, terms = [], plots.terms(curves)
    for name, curve, ends in trained:
        gates = ("one block", "") if ends is None else tuple(map(_two, ends))
        first, last = curve[0], curve[-1]
        added = [_three(last[term]) if term in last else "" for term in terms]
        rows.append((name, str(len(curve)), _three(first["loss"]), _three(last["loss"]), *added, *gates))
    weights = ("weight of new block, first steps", "at the end")
    head = ("task", "steps", "first loss", "last loss", *(f"last {term}" for term in terms), *weights)
    caption = (
        "Loss in nats a label token; kl, the term of reflection, in nats, summed over earlier tasks; "
        "weights over ten steps"
    )
    return Section("training", "Training", (plot, Table(caption, head, tuple(rows))))


def pseudo_samples(findings: Findings) -> Section | None:
    """How good the pseudo-samples are, and whether that goes with what was forgotten."""
    if not any(findings.samples):
        return None
    forgotten = findings.matrix.forgotten()
    pairs = any(each is not None and "known_answers" in each.counts for each in findings.samples)
    rows = []
    for name, each, fallen in zip(findings.tasks, findings.samples, forgotten, strict=False):
        cells = ["not made"]
        if each is not None:
            counts, quality = each.counts, each.quality
            well_formed = counts["generated"] - counts["malformed"] - counts["empty"]
            cells = [f"{counts['kept']} of {counts['wanted']}", f"{well_formed} of {counts['generated']}"]
            if pairs:
                cells.append(f"{counts['known_answers']} of {counts['kept']}")
            if quality is None:
                cells.append("not measured")
            else:
                cells += [
                    _share(quality.embedding_accuracy),
                    _share(quality.word_accuracy),
                    str(counts["duplicate"] + quality.duplicates),
                    str(quality.copies),
                    f"{_one(quality.words)} / {_one(quality.real_words)}",
                    f"{quality.vocabulary} / {quality.real_vocabulary}",
                    _share(quality.known_words),
                ]
        rows.append((name, *_padded(cells, 10 if pairs else 9), _one(fallen)))
    related = findings.quality_against_forgetting()
    told = "; ".join(
        f"{label} {'not defined' if related[name] is None else f'{related[name]:+.2f}'}"
        for name, label in (("embedding_accuracy", "by embedding"), ("word_accuracy", "by words"))
    )
    head = (
        "task",
        "kept of wanted",
        "well-formed",
        *(["answers that a train row has"] if pairs else []),
        "told by embedding",
        "told by words",
        "duplicates",
        "copies",
        "words a row, pseudo / real",
        "vocabulary, pseudo / real",
        "words that are real",
        "points forgotten",
    )
    return Section(
        "pseudo-samples",
        "Pseudo-samples",
        (
            "How like the generated inputs are to the real ones. Told: share of held-out rows that a classifier tells "
            "rightly as generated or real; 50 % is chance, 100 % means that nothing real is like them. It is left out "
            "where there are fewer than ten rows of each kind. Copies repeat a train input, which makes them hard to "
            "tell but keeps private text.",
            Table("Pseudo-samples of each task but the last", head, tuple(rows)),
            f"Rank correlation (Spearman, over tasks) of how well they are told with points forgotten: {told}. "
            "Above 0: tasks with worse pseudo-samples were forgotten more. It needs three tasks that differ.",
        ),
    )


def backbone(findings: Findings) -> Section | None:
    """What was seen of the backbone before anything was learnt on it."""
    found = findings.probe
    if found is None:
        return None
    rows = tuple((name, f"{figure:.1e}") for name, figure in found.figures.items())
    table = Table(f"How far it is off; up to {found.allowed:g} is rounding", ("compared", "off by"), rows)
    text = (
        f"{found}. A few short rows went through it with a block on it, alone and beside others. Logits are off by the "
        "root of their mean square as a share of their standard deviation, gradients by the largest of the largest."
    )
    return Section("backbone", "Backbone", (text, table))


def settings(findings: Findings) -> Section:
    """Every field that counts, and what it was read from."""
    experiment = findings.experiment
    config = experiment.config.model_dump(mode="json", exclude={"store", "tracking", "cluster"})
    rows = tuple((name, "" if value is None else str(value)) for name, value in _flat(config))
    content = (
        ("experiment", experiment.key),
        ("version", findings.manifest.digest),
        ("backbone", experiment.backbone.digest),
        ("data", experiment.data_digest),
        ("config", experiment.config.digest()),
    )
    return Section(
        "settings",
        "Settings",
        (
            Table("What it was made from, by content (sha256)", ("what", "digest"), content, left=2),
            Table("Fields of the config", ("field", "value"), rows, left=2, folded=True),
        ),
    )


SECTIONS: tuple[Callable[[Findings], Section | None], ...] = (
    warnings,
    scores,
    data,
    answers,
    attention,
    alignment,
    training,
    pseudo_samples,
    backbone,
    settings,
)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, list) else value


def _padded(cells: Iterable[str], width: int) -> list[str]:
    row = list(cells)
    return [*row, *[""] * (width - len(row))]


def _told(text: str) -> str:
    """A text in bounds; an empty answer is told."""
    return cut(text, MOST_CHARACTERS) if text.strip() else "(empty)"


def _heaviest(answer: Answer) -> str:
    blocks = sorted(answer.weights.items(), key=lambda item: -item[1])[:HEAVIEST]
    return ", ".join(f"{name} {_two(weight)}" for name, weight in blocks)


def _either(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"


def _one(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _two(value: float) -> str:
    return f"{value:.2f}"


def _three(value: float) -> str:
    return f"{value:.3f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"
