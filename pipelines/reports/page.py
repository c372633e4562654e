"""A report: one HTML page with plots, made of what the records of a sequence say."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from cluster.stages import done
from cluster.store import ArtifactStore
from cluster.store.lookups import Lookups
from pipelines.console import cli
from pipelines.reports.findings import Findings, bare_scores, collect, scored_versions
from pipelines.reports.verdict import Line
from pipelines.sequence.experiment import Experiment
from sapt_core.errors import SaptError
from sapt_core.io.hashing import canonical_hash

REPORT_VERSION = 3  # raised when equal findings give another page
FOLDER = Path("runs/report")
PAGE = "index.html"
_STAMPED = re.compile(r'<meta name="sapt-report" content="([0-9a-f]{64})((?: [\w-]+\.png)*)">')


@dataclass(frozen=True)
class Link:
    """Something of the run elsewhere: what it is, and its address where a browser can open it."""

    text: str
    address: str | None


def find(experiment: Experiment, store: ArtifactStore, version: int | None) -> Findings:
    """What the store has of an experiment.

    Args:
        experiment: what was run.
        store: where.
        version: from 1; None for the last there is.

    Raises:
        SaptError: no such version, naming those that are there.
    """
    known = Lookups(store, [experiment.key])
    records = done(experiment.graph.published, known)
    there = scored_versions(experiment, records)
    if not there:
        raise SaptError(
            f"{store.uri} holds no scored version of experiment {experiment.key[:12]}: give the config, overrides and "
            "store.uri that pipelines/continual.py ran with, or run it first. If it ran on other hardware with "
            "train.precision=auto, give the precision that it ran with."
        )
    if version is not None and not 1 <= version <= there:
        graph = experiment.graph
        learnt = [graph.tasks[place] for place in graph.lessons[:there]]
        tasks = ", ".join(f"{number} ({name})" for number, name in enumerate(learnt, 1))
        raise SaptError(f"--version {version}: scored so far are {tasks} of {len(graph.train)}; give one of them.")
    return collect(experiment, records, store, there if version is None else version, bare_scores(experiment, known))


def build(findings: Findings, verdict: Sequence[Line], links: Sequence[Link] = ()) -> dict[str, bytes]:
    """The report's files by name: the page, which needs no other, and its plots, for use elsewhere.

    Args:
        findings: all but the first lines.
        verdict: those.
        links: to the run elsewhere.
    """
    from pipelines.reports.sections import SECTIONS, Plot  # noqa: PLC0415  matplotlib, only where something is drawn

    sections = [section for make in SECTIONS if (section := make(findings)) is not None]
    plots = [part for section in sections for part in section.parts if isinstance(part, Plot)]
    matrix, config, total = findings.matrix, findings.experiment.config, len(findings.experiment.every_task)
    fwt = matrix.fwt()
    page = Environment(
        loader=PackageLoader("pipelines.reports", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page.filters["uri"] = lambda plot: f"data:image/png;base64,{b64encode(plot.png).decode()}"
    learnt = len(findings.tasks)
    state = f"All {total}" if learnt == total else f"The first {learnt} of {total}"
    html = page.get_template("report.html.jinja").render(
        title=f"{config.method.name} over {total} tasks of {config.benchmark.suite}",
        state=f"{state} tasks are learnt. Backbone {findings.experiment.backbone.path}, seed {config.seed}, "
        f"experiment {findings.experiment.key[:12]}. Last stage ended {findings.finished_at:%Y-%m-%d %H:%M} UTC.",
        verdict=verdict,
        links=links,
        figures=[
            ("AP", f"{matrix.ap():.2f}", "mean score over the tasks"),
            ("F.Ra", f"{matrix.f_ra():.2f}", "mean points lost since the best"),
            ("FWT", "–" if fwt is None else f"{fwt:+.2f}", "mean points against each task alone"),
            ("BWT", f"{matrix.bwt():+.2f}", "mean points since just learnt"),
        ],
        sections=sections,
        digest=_stamp(findings, verdict, links),
        files=[f"{plot.name}.png" for plot in plots],
    )
    return {PAGE: html.encode(), **{f"{plot.name}.png": plot.png for plot in plots}}


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Write the files, the page last: it says that the others are there.

    Raises:
        ServiceError: the folder cannot be written.
    """
    for name in sorted(files, key=lambda name: name == PAGE):
        cli.write_output(folder / name, files[name])


def standing(
    folder: Path, findings: Findings, verdict: Sequence[Line], links: Sequence[Link] = ()
) -> dict[str, bytes] | None:
    """The files of a report in ``folder`` if it was made of the same findings, verdict and links, else None."""
    try:
        page = (folder / PAGE).read_bytes()
        stamped = _STAMPED.search(page.decode(errors="replace"))
        if stamped is None or stamped[1] != _stamp(findings, verdict, links):
            return None
        return {PAGE: page, **{name: (folder / name).read_bytes() for name in stamped[2].split()}}
    except OSError:
        return None


def default_folder(experiment: Experiment, version: int | None = None) -> Path:
    """Where a report goes unless told otherwise."""
    folder = FOLDER / experiment.key[:12]
    return folder if version is None else folder / f"version-{version}"


def _stamp(findings: Findings, verdict: Sequence[Line], links: Sequence[Link]) -> str:
    said = [[*map(str, verdict)], [[link.text, link.address] for link in links]]
    return canonical_hash([REPORT_VERSION, findings.digest, *said])
