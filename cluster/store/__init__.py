"""Where blobs, records and checkpoints live: a local folder or S3.

A store is rebuilt from its ``StoreConfig`` in every process, so it holds nothing but an address.
"""

from __future__ import annotations

from pathlib import Path

from cluster.store.base import ArtifactStore
from cluster.store.local import LocalStore
from sapt_core.settings import StoreConfig

__all__ = ["ArtifactStore", "LocalStore", "open_store", "resolved"]


def open_store(config: StoreConfig) -> ArtifactStore:
    """The store a config names. Nothing is contacted or created yet: ``check`` does that.

    Raises:
        StoreError: an S3 address without a bucket name that S3 allows.
    """
    scheme, separator, rest = config.uri.partition("://")
    if separator and scheme == "s3":
        from cluster.store.s3 import S3Store  # noqa: PLC0415  boto3 only where S3 is used

        bucket, _, prefix = rest.partition("/")
        return S3Store(bucket, prefix, config.endpoint_url)
    return LocalStore(_folder(config.uri))


def resolved(config: StoreConfig) -> StoreConfig:
    """The same store, named so that a worker in another working directory finds it."""
    if config.uri.startswith("s3://"):
        return config
    return config.model_copy(update={"uri": str(_folder(config.uri))})


def _folder(uri: str) -> Path:
    return Path(uri.removeprefix("file://")).expanduser().absolute()
