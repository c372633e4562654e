"""What is left of an address where people see it."""

from __future__ import annotations

import pytest

from sapt_core.io.addresses import redacted, without_user


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://ann:s3cret@host:5000/x", "http://***@host:5000/x"),
        ("at https://token@host and http://b:p@q@host2/y", "at https://***@host and http://***@host2/y"),
        ('Could not connect to "http://a:b@host/bucket/key"', 'Could not connect to "http://***@host/bucket/key"'),
        ("s3://key:secret@bucket/prefix", "s3://***@bucket/prefix"),
        ("postgresql://db/x?user=a&password=p1&sslmode=off", "postgresql://db/x?user=a&password=***&sslmode=off"),
        ("https://h/b?X-Amz-Signature=ab12&X-Amz-Date=1", "https://h/b?X-Amz-Signature=***&X-Amz-Date=1"),
        ("https://h/b?AWSAccessKeyId=AK&Expires=1", "https://h/b?AWSAccessKeyId=***&Expires=1"),
        ("'http://h?Access_Token=t0'", "'http://h?Access_Token=***'"),
        ("http://me:pa/ss@host:9000/x", "http://***@host:9000/x"),
        ("http://host:9000/mail@example", "http://host:9000/mail@example"),
        ("http://host/mail@example", "http://host/mail@example"),
        ("'ann:s3cret@host:5000/x'", "'***@host:5000/x'"),
        ("ann@example.org", "ann@example.org"),
        ("models:/sapt@champion at 12:30", "models:/sapt@champion at 12:30"),
    ],
)
def test_redacted(text: str, expected: str) -> None:
    assert redacted(text) == expected


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://ann:s3@cret@host:9000/path", "http://host:9000/path"),
        ("https://host", "https://host"),
        ("http://a:b@[::1]:9000", "http://[::1]:9000"),
        ("nonsense", "nonsense"),
    ],
)
def test_without_user(address: str, expected: str) -> None:
    assert without_user(address) == expected
