"""A store in an S3 bucket, or in any server that speaks S3 with conditional writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    NoCredentialsError,
    ParamValidationError,
)

from cluster.store.base import CHUNK_BYTES, ArtifactStore
from sapt_core.errors import StoreError

T = TypeVar("T")

_ABSENT = {"404", "NoSuchKey"}
_DENIED = {"403", "AccessDenied", "Forbidden"}
_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "AuthFailure"}
_CONFLICT_ATTEMPTS = 10
_DELETED_AT_ONCE = 1000  # S3's limit


class S3Store(ArtifactStore):
    """A store under ``s3://bucket/prefix``; credentials and region come from the AWS environment.

    Args:
        bucket: an existing bucket.
        prefix: key prefix, may be empty.
        endpoint_url: server other than AWS; default: ``AWS_ENDPOINT_URL``, else AWS.
    """

    def __init__(self, bucket: str, prefix: str = "", endpoint_url: str | None = None) -> None:
        self.bucket = bucket
        self.prefix = prefix.strip("/")
        self._endpoint_url = endpoint_url

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "client"}

    @cached_property
    def client(self) -> Any:
        """The boto3 client."""
        try:
            return boto3.client(
                "s3",
                endpoint_url=self._endpoint_url,
                config=Config(
                    connect_timeout=10, read_timeout=60, retries={"mode": "standard", "total_max_attempts": 4}
                ),
            )
        except (BotoCoreError, ValueError) as error:
            raise StoreError(
                f"Cannot use the store {self.uri}: {error}. Mend store.endpoint_url or the AWS environment."
            ) from error

    def train_storage(self) -> tuple[str, Any]:
        """Path and pyarrow file system of ``train/``, with the client's endpoint, region and credentials source."""
        from pyarrow.fs import S3FileSystem  # noqa: PLC0415

        address = urlsplit(self.client.meta.endpoint_url)
        options: dict[str, str] = {}
        if not address.netloc.endswith(".amazonaws.com"):
            options = {"endpoint_override": address.netloc, "scheme": address.scheme}
        filesystem = S3FileSystem(region=self.client.meta.region_name, **options)
        return f"{self.bucket}/{self._key('train')}", filesystem

    def _write(self, name: str, data: bytes) -> None:
        self._call("write", lambda: self.client.put_object(Bucket=self.bucket, Key=self._key(name), Body=data))

    def _write_file(self, name: str, path: Path) -> None:
        def upload() -> None:
            with path.open("rb") as file:
                self.client.upload_fileobj(file, self.bucket, self._key(name))

        self._call("write", upload)

    def _create(self, name: str, data: bytes) -> bool:
        for attempt in range(_CONFLICT_ATTEMPTS):
            try:
                self.client.put_object(Bucket=self.bucket, Key=self._key(name), Body=data, IfNoneMatch="*")
            except ClientError as error:
                code = error.response["Error"]["Code"]
                if code in {"PreconditionFailed", "412"}:
                    return False
                if code not in {"ConditionalRequestConflict", "409"}:  # another writer is at it: ask again
                    raise self._fault("write", error) from error
                time.sleep(0.05 * 2**attempt)
            except BotoCoreError as error:
                raise self._fault("write", error) from error
            else:
                return True
        raise StoreError(f"Cannot write {self._key(name)} in the store {self.uri}: other writers hold it. Run again.")

    def _read(self, name: str) -> bytes | None:
        def read() -> bytes:
            body: bytes = self.client.get_object(Bucket=self.bucket, Key=self._key(name))["Body"].read()
            return body

        return self._unless_absent("read", read)

    def _chunks(self, name: str) -> Iterator[bytes] | None:
        body = self._unless_absent(
            "read", lambda: self.client.get_object(Bucket=self.bucket, Key=self._key(name))["Body"]
        )
        return None if body is None else self._pieces(body)

    def _pieces(self, body: Any) -> Iterator[bytes]:
        try:
            yield from body.iter_chunks(CHUNK_BYTES)
        except BotoCoreError as error:
            raise self._fault("read", error) from error

    def _size(self, name: str) -> int | None:
        def size() -> int:
            return int(self.client.head_object(Bucket=self.bucket, Key=self._key(name))["ContentLength"])

        return self._unless_absent("read", size)

    def _list(self, folder: str) -> list[str]:
        root = self._key("")
        return [key.removeprefix(root) for key in self._keys(folder) if not key.endswith("/")]

    def _delete(self, name: str) -> None:
        self._call("delete", lambda: self.client.delete_object(Bucket=self.bucket, Key=self._key(name)))

    def delete_folder(self, folder: str) -> None:
        keys = self._keys(folder)
        for start in range(0, len(keys), _DELETED_AT_ONCE):
            objects = {"Objects": [{"Key": key} for key in keys[start : start + _DELETED_AT_ONCE]]}
            reply = self._call("delete", partial(self.client.delete_objects, Bucket=self.bucket, Delete=objects))
            if reply.get("Errors"):
                refused = reply["Errors"][0]
                raise StoreError(f"Cannot delete {refused['Key']} in the store {self.uri}: {refused.get('Message')}.")

    def _keys(self, folder: str) -> list[str]:
        def keys() -> list[str]:
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._key(folder) + "/"
            )
            return [item["Key"] for page in pages for item in page.get("Contents", [])]

        return self._call("list", keys)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _call(self, action: str, function: Callable[[], T]) -> T:
        try:
            return function()
        except (ClientError, BotoCoreError) as error:
            raise self._fault(action, error) from error

    def _unless_absent(self, action: str, function: Callable[[], T]) -> T | None:
        try:
            return function()
        except ClientError as error:
            if error.response["Error"]["Code"] in _ABSENT:
                return None
            raise self._fault(action, error) from error
        except BotoCoreError as error:
            raise self._fault(action, error) from error

    def _fault(self, action: str, error: ClientError | BotoCoreError) -> StoreError:
        """What went wrong and what to do, without credentials."""
        code = error.response["Error"]["Code"] if isinstance(error, ClientError) else ""
        if code == "NoSuchBucket":
            reason = f"there is no bucket {self.bucket!r}. Create it, or mend store.uri."
        elif code in _CREDENTIALS:
            reason = (
                f"the credentials are refused ({code}). Mend AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
                "AWS_SESSION_TOKEN or AWS_PROFILE."
            )
        elif code in _DENIED:
            reason = (
                "permission denied. The credentials need s3:GetObject, s3:PutObject, s3:DeleteObject and "
                "s3:ListBucket there, or they are wrong."
            )
        elif isinstance(error, ClientError):
            reason = f"{code}: {error.response['Error'].get('Message', '')}"
        elif isinstance(error, NoCredentialsError):
            reason = "no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
        elif isinstance(error, ConnectionError | HTTPClientError):
            reason = "the server does not answer. Check store.endpoint_url and that the server runs."
        elif isinstance(error, ParamValidationError):
            reason = f"{self.bucket!r} is not a bucket name. Mend store.uri (s3://bucket/prefix)."
        else:
            reason = f"{type(error).__name__}: {error}"
        return StoreError(f"Cannot {action} in the store {self.uri} at {self._place()}: {reason}")

    def _place(self) -> str:
        """The server without a user name or password that its address may hold."""
        address = urlsplit(self.client.meta.endpoint_url)
        return f"{address.scheme}://{address.netloc.rpartition('@')[2]}"
