"""User names and passwords in addresses stay with who gave them, whatever becomes of the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import continual, evaluate, predict, report
from tests.pipelines.commands import QUICKSTART, TINY, Finished, Outcome

pytest_plugins = ["tests.mlflow_servers"]

Call = Callable[[Callable[[], None], list[str]], Outcome]
USER, PASSWORD = "made-up-user", "made-up-password"


def untold(outcome: Outcome, code: int) -> None:
    assert outcome.code == code, outcome.out + outcome.err
    assert "Traceback" not in outcome.err
    for secret in (USER, PASSWORD):
        assert secret not in outcome.out + outcome.err


def given(*arguments: str) -> list[str]:
    return ["--config", QUICKSTART, "--inline", *TINY, *arguments]


def test_a_run_that_succeeds(finished: Finished, call: Call) -> None:
    address = f"http://{USER}:{PASSWORD}@127.0.0.1:9000"
    places = [f"store.uri={finished.store}", f"store.endpoint_url={address}", f"tracking.uri={address}"]
    outcome = call(continual.main, given(*places))
    untold(outcome, 0)
    # What it says to type next works as it stands.
    (command,) = [line for line in outcome.out.splitlines() if line.startswith("next:")]
    assert command.endswith(f"store.uri={finished.store} store.endpoint_url=http://127.0.0.1:9000")
    untold(call(continual.main, given(*places, "--dry-run")), 0)


@pytest.mark.parametrize(
    "address",
    [
        f"http://{USER}:{PASSWORD}@127.0.0.1:PORT",
        f"http://{USER}:{PASSWORD}@127.0.0.1:PORT/path?secret={PASSWORD}",
        f"http://{USER}:{PASSWORD}@[::1",
        f"http://{USER}:{PASSWORD}@",
        f"ftp://{USER}:{PASSWORD}@127.0.0.1",
        f"http://{USER}:{PASSWORD}/x@127.0.0.1:PORT",
        f"[http://{USER}:{PASSWORD}@127.0.0.1]",
    ],
)
def test_a_run_whose_endpoint_cannot_be_used(call: Call, aws_environment: None, unused_port: int, address: str) -> None:
    endpoint = f"store.endpoint_url={address.replace('PORT', str(unused_port))}"
    outcome = call(continual.main, given("store.uri=s3://bucket/prefix", endpoint))
    untold(outcome, 3)


def test_an_endpoint_of_the_environment(
    call: Call, aws_environment: None, unused_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{USER}:{PASSWORD}@127.0.0.1:{unused_port}")
    outcome = call(continual.main, given("store.uri=s3://bucket/prefix"))
    untold(outcome, 3)
    assert f"at http://***@127.0.0.1:{unused_port}: the server does not answer" in outcome.err


def test_a_bucket_with_a_password(call: Call, aws_environment: None) -> None:
    outcome = call(continual.main, given(f"store.uri=s3://{USER}:{PASSWORD}@bucket/prefix"))
    untold(outcome, 3)
    assert "not a bucket name" in outcome.err


@pytest.mark.parametrize(
    "uri", [f"postgresql://{USER}:{PASSWORD}@host/db", f"file://{USER}:{PASSWORD}@host/runs", f"{USER}:{PASSWORD}@host"]
)
def test_a_tracking_address_of_a_kind_that_cannot_be_used(call: Call, uri: str, tmp_path: Path) -> None:
    asked = [f"store.uri={tmp_path}/store", f"tracking.uri={uri}"]
    outcome = call(predict.main, ["--version", "latest", "--input", "x", *asked])
    untold(outcome, 3)


def test_all_entrances_say_what_they_miss_without_it(call: Call, aws_environment: None, unused_port: int) -> None:
    address = f"http://{USER}:{PASSWORD}@127.0.0.1:{unused_port}"
    places = ["store.uri=s3://bucket/prefix", f"store.endpoint_url={address}", f"tracking.uri={address}"]
    config = ["--config", QUICKSTART, *TINY, *places]
    untold(call(predict.main, ["--snapshot", "0" * 64, "--input", "x", *places]), 3)
    untold(call(evaluate.main, [*config, "--snapshot", "0" * 64]), 3)
    untold(call(report.main, config), 3)
