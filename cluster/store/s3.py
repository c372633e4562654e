"""A store in an S3 bucket, or in any server that speaks S3 with conditional writes."""

from __future__ import annotations

import io
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from cluster.store.base import AT_ONCE, CHUNK_BYTES, ArtifactStore, Entry
from sapt_core.errors import StoreError, StoreUnavailableError
from sapt_core.io.addresses import redacted, without_user

T = TypeVar("T")

# One PUT or COPY takes 5 GiB at most, so what is large goes in parts, a few of them in memory at a time.
_UPLOAD = TransferConfig(preferred_transfer_client="classic")
_COPY = TransferConfig(multipart_threshold=1 << 30, multipart_chunksize=1 << 28, preferred_transfer_client="classic")
_IN_PARTS = TransferConfig(multipart_threshold=1, preferred_transfer_client="classic")

_ABSENT = {"404", "NoSuchKey"}
_DENIED = {"403", "AccessDenied", "Forbidden"}
_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "AuthFailure"}
_CUT = (ResponseStreamingError, IncompleteReadError, ReadTimeoutError)
_CONFLICT_ATTEMPTS = 10
_READ_ATTEMPTS = 4

# A page of a listing has 1,000 names and comes after the one before. A sequence of 100 tasks has some 5,500 records and
# 7,000 blobs, so in a store of its own a dozen pages spare as many thousand requests. In one that hundreds share the
# pages are mostly of others: after some seconds' worth of them it is given up, and what is wanted is asked for, several
# requests at a time.
_LISTED_PAGES = 100


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
        return redacted(f"s3://{self.bucket}/{self.prefix}".rstrip("/"))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "client"}

    @cached_property
    def client(self) -> Any:
        """The boto3 client. It signs what it asks for, so a user name in the address is of no use to it.

        Threads may share it but not make it, so something is listed before several of them ask.
        """
        try:
            return boto3.client(
                "s3",
                endpoint_url=self._endpoint_url and without_user(self._endpoint_url),
                config=Config(
                    connect_timeout=10,
                    read_timeout=60,
                    retries={"mode": "standard", "total_max_attempts": 4},
                    max_pool_connections=AT_ONCE,
                ),
            )
        except (BotoCoreError, ValueError) as error:
            raise StoreError(
                f"Cannot use the store {self.uri}: {redacted(str(error))}. "
                "Mend store.endpoint_url or the AWS environment."
            ) from None  # the cause would show the address as it was given

    def check(self) -> None:
        super().check()
        name = f"probes/{uuid.uuid4().hex}"
        self._upload(name, io.BytesIO(b"parts"), _IN_PARTS)
        try:
            self._require("take an object in parts", self._read(name) == b"parts")
        finally:
            self._delete(name)

    def _write(self, name: str, data: bytes) -> None:
        self._upload(name, io.BytesIO(data))

    def _write_file(self, name: str, path: Path) -> None:
        with path.open("rb") as file:
            self._upload(name, file)

    def _upload(self, name: str, file: IO[bytes], config: TransferConfig | None = None) -> None:
        """Put a file's content there: at once, or in parts, which are an object when the last is there."""
        config = config or _UPLOAD
        self._call("write", lambda: self.client.upload_fileobj(file, self.bucket, self._key(name), Config=config))

    def _create(self, name: str, data: bytes) -> bool:
        for attempt in range(_CONFLICT_ATTEMPTS):
            try:
                self.client.put_object(Bucket=self.bucket, Key=self._key(name), Body=data, IfNoneMatch="*")
            except ClientError as error:
                code = error.response["Error"]["Code"]
                if code in {"PreconditionFailed", "412"}:
                    return False
                if code not in {"ConditionalRequestConflict", "409"}:  # another writer is at it: ask again
                    raise self._fault("write", error) from None
                time.sleep(0.05 * 2**attempt)
            except BotoCoreError as error:
                raise self._fault("write", error) from None
            else:
                return True
        raise StoreError(f"Cannot write {self._key(name)} in the store {self.uri}: other writers hold it. Run again.")

    def _read(self, name: str) -> bytes | None:
        for _ in range(_READ_ATTEMPTS):
            body = self._body(name)
            if body is None:
                return None
            try:
                with closing(body):
                    data: bytes = body.read()
                    return data
            except _CUT as error:
                fault = self._fault("read", error)
            except BotoCoreError as error:
                raise self._fault("read", error) from None
        raise fault

    def _chunks(self, name: str) -> Iterator[bytes] | None:
        body = self._body(name)
        return None if body is None else self._pieces(name, body)

    def _pieces(self, name: str, body: Any) -> Iterator[bytes]:
        seen = cuts = 0
        while True:
            try:
                with closing(body):
                    for chunk in body.iter_chunks(CHUNK_BYTES):
                        seen += len(chunk)
                        yield chunk
                return
            except _CUT as error:
                cuts += 1
                if cuts == _READ_ATTEMPTS:
                    raise self._fault("read", error) from None
            except BotoCoreError as error:
                raise self._fault("read", error) from None
            # From where it was cut off; that the whole is right is for its digest to say.
            body = self._body(name, start=seen)
            if body is None:
                raise StoreError(f"{self._key(name)} was removed from the store {self.uri} while it was read.")

    def _body(self, name: str, start: int = 0) -> Any:
        """The stream of an object from a byte on, None if there is none."""
        part = {"Range": f"bytes={start}-"} if start else {}
        return self._unless_absent(
            "read", lambda: self.client.get_object(Bucket=self.bucket, Key=self._key(name), **part)["Body"]
        )

    def _look(self, name: str) -> Entry | None:
        def look() -> Entry:
            reply = self.client.head_object(Bucket=self.bucket, Key=self._key(name))
            return Entry(name, int(reply["ContentLength"]), _age(reply["LastModified"], reply))

        return self._unless_absent("read", look)

    def _touch(self, name: str) -> bool:
        place = {"Bucket": self.bucket, "Key": self._key(name)}

        def copy_onto_itself() -> bool:
            self.client.copy(place, **place, ExtraArgs={"MetadataDirective": "REPLACE"}, Config=_COPY)
            return True

        return self._unless_absent("copy", copy_onto_itself) or False

    def _list(self, folder: str) -> list[Entry]:
        root = self._key("")
        return [
            Entry(item["Key"].removeprefix(root), item["Size"], _age(item["LastModified"], page))
            for page in self._pages(folder)
            for item in page.get("Contents", [])
            if not item["Key"].endswith("/")
        ]

    def _tags(self, folder: str) -> dict[str, str] | None:
        pages = self._pages(folder, _LISTED_PAGES)
        if pages and pages[-1].get("IsTruncated"):
            return None
        root = self._key("")
        return {item["Key"].removeprefix(root): item["ETag"] for page in pages for item in page.get("Contents", [])}

    def _delete(self, name: str) -> None:
        self._delete_key(self._key(name))

    def delete_folder(self, folder: str) -> None:
        # One by one: servers differ in the digest that they want of a list of what is to be deleted.
        for page in self._pages(folder):
            for item in page.get("Contents", []):
                self._delete_key(item["Key"])

    def _delete_key(self, key: str) -> None:
        self._call("delete", lambda: self.client.delete_object(Bucket=self.bucket, Key=key))

    def _pages(self, folder: str, at_most: int | None = None) -> list[Any]:
        asked = {"Bucket": self.bucket, "Prefix": self._key(folder) + "/"}
        pages = self.client.get_paginator("list_objects_v2")
        return self._call("list", lambda: list(islice(pages.paginate(**asked), at_most)))

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _call(self, action: str, function: Callable[[], T]) -> T:
        try:
            return function()
        except (ClientError, BotoCoreError) as error:
            raise self._fault(action, error) from None

    def _unless_absent(self, action: str, function: Callable[[], T]) -> T | None:
        try:
            return function()
        except (ClientError, BotoCoreError) as error:
            if isinstance(error, ClientError) and error.response["Error"]["Code"] in _ABSENT:
                return None
            raise self._fault(action, error) from None

    def _fault(self, action: str, error: ClientError | BotoCoreError) -> StoreError:
        """What went wrong and what to do, without credentials. The cause would show the address as it was given."""
        code = error.response["Error"]["Code"] if isinstance(error, ClientError) else ""
        kind = StoreUnavailableError if _passes(error) else StoreError
        if code == "NoSuchBucket":
            reason = "there is no such bucket. Create it, or mend store.uri."
        elif code in _CREDENTIALS:
            reason = (
                f"the credentials are refused ({code}). Mend AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
                "AWS_SESSION_TOKEN or AWS_PROFILE."
            )
        elif code in _DENIED:
            reason = (
                "permission denied. The credentials need s3:GetObject, s3:PutObject, s3:DeleteObject, s3:ListBucket "
                "and s3:AbortMultipartUpload there, or they are wrong."
            )
        elif isinstance(error, ClientError):
            reason = f"{code}: {error.response['Error'].get('Message', '')}"
        elif isinstance(error, NoCredentialsError):
            reason = "no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
        elif isinstance(error, ConnectionError | HTTPClientError):
            reason = "the server does not answer. Check store.endpoint_url and that the server runs."
        elif isinstance(error, ParamValidationError):
            reason = "that is not a bucket name. Mend store.uri (s3://bucket/prefix)."
        else:
            reason = f"{type(error).__name__}: {error}"
        return kind(redacted(f"Cannot {action} in the store {self.uri} at {self._place()}: {reason}"))

    def _place(self) -> str:
        return redacted(self.client.meta.endpoint_url)


def _passes(error: ClientError | BotoCoreError) -> bool:
    """Whether the same call may succeed later, with nothing mended."""
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return bool(status >= 500 or status == 429)
    return isinstance(error, (ConnectionError, HTTPClientError, IncompleteReadError))


def _age(modified: datetime, reply: Any) -> float:
    """Seconds since then by the server's clock, which need not be this machine's."""
    stated = reply["ResponseMetadata"]["HTTPHeaders"].get("date")
    now = parsedate_to_datetime(stated) if stated else datetime.now(UTC)
    return (now - modified).total_seconds()
