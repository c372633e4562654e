"""Connect to a Ray cluster, or start a local one, and see whether it has what a run asks for."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sapt_core.errors import ClusterError
from sapt_core.io.addresses import redacted
from sapt_core.settings import ClusterConfig


@contextmanager
def connect(config: ClusterConfig, *, num_cpus: int | None = None) -> Iterator[None]:
    """Be connected to Ray: at ``cluster.address``, else RAY_ADDRESS, else a local Ray of our own.

    Meanwhile SIGTERM, by which a job is stopped, interrupts as Ctrl-C does. On leaving, disconnects, and stops
    Ray only if it was started here. Inside a process that is connected already (a Tune trial) it changes nothing.

    Args:
        config: where to connect.
        num_cpus: logical CPUs of a local Ray; default: the machine's.

    Raises:
        ClusterError: nothing answers there, it refuses the token, or Ray cannot start.
    """
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    # Ray's own default differs between its commands and versions, and is read when Ray is imported.
    os.environ.setdefault("RAY_AUTH_MODE", "token" if address == "local" or _has_token() else "disabled")
    # What the workers print reaches the console: line by line, none held back as a repetition.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    import ray  # noqa: PLC0415

    if ray.is_initialized():
        yield
        return
    _answer(address)
    options: dict[str, Any] = {"num_cpus": num_cpus, "dashboard_host": "127.0.0.1"} if address == "local" else {}
    try:
        ray.init(
            # "local" and never None, which joins whatever Ray this host started last.
            address=address,
            log_to_driver=True,  # the stages' progress
            logging_level=logging.WARNING,
            **options,
        )
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        ray.shutdown()
        if address == "local":
            raise ClusterError(f"Ray cannot start on this machine: {error}") from error
        raise ClusterError(
            f"No Ray cluster can be used at {redacted(address)}: {redacted(_first_line(error))}. Check that the "
            "cluster runs this Ray version, and that RAY_AUTH_MODE and the token (RAY_AUTH_TOKEN or "
            "~/.ray/auth_token) are the cluster's."
        ) from error
    # As Ctrl-C: Ray's own handler aborts the process, and a job that is stopped leaves its MLflow run open.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)


def check_resources(config: ClusterConfig) -> None:
    """Refuse a run whose training workers the connected cluster can never hold.

    A cluster that autoscales is measured by what it may grow to.

    Raises:
        ClusterError: with what was asked and what is there.
    """
    there, limits = capacity(), _limits()
    faults = []
    for name, field, each in (
        ("CPU", "cpus_per_worker", config.cpus_per_worker),
        ("GPU", "gpus_per_worker", config.gpus_per_worker),
    ):
        most = largest(name)
        asked = max(config.train_workers, 1) * each
        if asked > there[name]:
            faults.append(
                f"cluster.train_workers={config.train_workers} with cluster.{field}={each:g} need "
                f"{asked:g} {name}s, the cluster has {there[name]:g}"
            )
        elif each > most and not limits:
            faults.append(f"cluster.{field}={each:g}, but no node has more than {most:g} {name}s")
    if faults:
        grown = " even after autoscaling" if limits else ""
        raise ClusterError(
            f"The Ray cluster is too small{grown}: {'; '.join(faults)}. "
            "Ask for less in the cluster section, or connect to a larger cluster."
        )


def capacity() -> dict[str, float]:
    """CPUs, GPUs and bytes of memory of the connected cluster; of one that autoscales, as many as it may grow to."""
    nodes, limits = _nodes(), _limits()
    names = ("CPU", "GPU", "memory")
    return {name: max(sum(node.get(name, 0) for node in nodes), limits.get(name, 0)) for name in names}


def available() -> dict[str, float]:
    """CPUs, GPUs and bytes of memory of the connected cluster that nobody holds at this moment."""
    import ray  # noqa: PLC0415

    free = ray.available_resources()  # type: ignore[no-untyped-call]
    return {name: free.get(name, 0) for name in ("CPU", "GPU", "memory")}


def largest(name: str) -> float:
    """The most that a node of the connected cluster has of a resource."""
    return max((node.get(name, 0) for node in _nodes()), default=0)


def _nodes() -> list[dict[str, float]]:
    import ray  # noqa: PLC0415

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _limits() -> dict[str, float]:
    from ray._private.state import state  # noqa: PLC0415  the only place that knows an autoscaler's limits

    return dict(state.get_max_resources_from_cluster_config() or {})


def _has_token() -> bool:
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or Path(path or "~/.ray/auth_token").expanduser().is_file()


def _answer(address: str) -> None:
    """Find out in seconds that nothing listens at host:port; Ray itself waits for many minutes."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():  # local, auto
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"No Ray cluster answers at {redacted(address)}: {error}. "
            "cluster.address or RAY_ADDRESS must be host:port of a running head node."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
