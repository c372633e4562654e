"""Addresses as people may see them: without what lets somebody in."""

from __future__ import annotations

import re
from urllib.parse import urlsplit, urlunsplit

# Up to the last @ before a slash, as a password may hold an @; past a slash, which it may not hold but does where it
# was pasted as it is; and where the scheme was forgotten.
_USER = re.compile(r"(?<=://)[^/\s]*@|(?<=://)[^/\s:@]*:(?!\d+/)[^\s@]*@|(?<![\w/.-])[\w.+-]+:[^\s/@]+@(?=[\w\[])")
_SECRET = re.compile(
    r"([?&][\w-]*(?:password|passwd|token|secret|signature|credential|access_?key|api_?key)[\w-]*=)[^&\s'\"]+",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """``text`` without the user names, passwords and tokens of the addresses in it.

    Every message, record and field that shows an address, or what a library said of one, goes through here.
    """
    return _SECRET.sub(r"\1***", _USER.sub("***@", text))


def without_user(address: str) -> str:
    """The address without the user name and password in front of its host, still one that can be used."""
    parts = urlsplit(address)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
