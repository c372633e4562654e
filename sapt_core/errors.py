"""Errors made for people: each says what was given, what is allowed and what to do next.

A ``SaptError`` is the user's to mend, so entry points print its message without a stack trace and
exit with ``exit_code``. Everything else is a defect of ours and keeps its trace.
"""

from __future__ import annotations

from collections.abc import Sequence


class SaptError(Exception):
    """Base of all errors a user can mend. Exit code 2: bad input."""

    exit_code = 2


class FaultsError(SaptError):
    """Several faults of one kind, reported together.

    Args:
        title: one line that says what was checked.
        faults: one line a fault, each with its path or file.
    """

    def __init__(self, title: str, faults: Sequence[str]) -> None:
        self.title = title
        self.faults = tuple(faults)
        super().__init__("\n".join([title, *(f"  - {fault}" for fault in self.faults)]))

    def __reduce__(self) -> tuple[type[FaultsError], tuple[str, tuple[str, ...]]]:
        # Exceptions cross process borders in Ray; the default would call __init__ with one string.
        return type(self), (self.title, self.faults)


class ConfigError(FaultsError):
    """The experiment file or an override is wrong."""


class DataError(FaultsError):
    """Task files are missing, broken or unusable."""


class RequestError(FaultsError):
    """Rows that a version is asked with cannot be answered."""


class BackboneError(SaptError):
    """The backbone cannot be loaded or cannot carry a PET pool."""


class SnapshotError(SaptError):
    """A pool snapshot is damaged, too new, or belongs to another backbone."""


class LineageError(SaptError):
    """The registered model holds a pool that the sequence does not go on from."""


class DivergenceError(SaptError):
    """Training, or what it made, gave a figure that is no finite number: its settings make it diverge."""


class ServiceError(SaptError):
    """A service the run needs cannot be used. Exit code 3: mend the surroundings, not the input."""

    exit_code = 3


class StoreError(ServiceError):
    """The artifact store cannot be reached, read or written."""


class StoreUnavailableError(StoreError):
    """The artifact store does not answer now; asked again later it may."""


class TrackingError(ServiceError):
    """The MLflow server or its registry cannot be used."""


class ClusterError(ServiceError):
    """Ray cannot be reached or has not what the run asks for."""
