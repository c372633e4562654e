"""Words in the scripts that people write, and not in the Latin one alone."""

from __future__ import annotations

import regex

# Scripts that put no blank between words. Each of their letters counts as a word, with the marks it carries.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_PATTERN = r"(?V1)[{unspaced}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}{more}]--[{unspaced}]]+"
_WORD = regex.compile(_PATTERN.format(unspaced=_UNSPACED, more=""))
_IDENTIFIER = regex.compile(_PATTERN.format(unspaced=_UNSPACED, more="_"))


def find_words(text: str, *, identifiers: bool = False) -> list[str]:
    """Runs of letters, their marks and digits, in order; with ``identifiers`` an underscore is part of a word.

    In ASCII text they are the matches of ``[A-Za-z0-9]+``, and with ``identifiers`` those of ``\\w+``.
    """
    found: list[str] = (_IDENTIFIER if identifiers else _WORD).findall(text)
    return found
