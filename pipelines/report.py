"""Write what is known of a sequence as an HTML page with plots; nothing is trained, the run may be unfinished.

    python pipelines/report.py --config pipelines/configs/quickstart.yaml [key=value ...]

Reads the records of the run with this config from its store, writes a folder and logs it to the run in MLflow.
The folders of data and backbone may be gone.
"""

from __future__ import annotations

from pathlib import Path

from pipelines.console import cli, places
from pipelines.console.commands import pasted


def main() -> None:
    """Parse the command line, read the records and write the report."""
    parser = cli.parser(__doc__ or "", pasted("report", "--config", "quickstart"))
    cli.add_print_config(parser)
    parser.add_argument("--version", type=int, metavar="N", help="the state after the Nth task; default: the latest")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/report/KEY of the experiment")
    parser.add_argument("--inline", action="store_true", help="the folder alone: no MLflow")
    arguments = cli.parse(parser)

    from cluster.store import open_store
    from pipelines.reports import page
    from pipelines.reports.verdict import judge
    from pipelines.sequence.experiment import find_experiment

    experiment = find_experiment(arguments.config, arguments.overrides)
    folder = arguments.out or page.default_folder(experiment, arguments.version)
    places.check_lasting({"--out": folder}, experiment.config, inline=arguments.inline)
    cli.check_output(folder / page.PAGE)
    findings = page.find(experiment, open_store(experiment.config.store), arguments.version)
    run, registered = None, None
    links: tuple[page.Link, ...] = ()
    if not arguments.inline:
        from pipelines.running.publishing import SequenceRun, registered_as

        run = SequenceRun.find(experiment)  # refused before the work, not after it
        links = run.links()
        registered = registered_as(findings.manifest.digest, experiment, run.tracker)
    files = page.build(findings, judge(findings, registered), links)
    page.write(folder, files)
    print(f"report: {folder / page.PAGE}, after {len(findings.tasks)} of {len(experiment.every_task)} tasks")
    if run is not None:
        print(f"in MLflow: {run.log_report(files, arguments.version)} of run {run.run_id}")


if __name__ == "__main__":
    cli.run(main)
