"""Prompts as text: those of the two published suites, and where in a prompt its definition and input lie."""

from __future__ import annotations

from typing import NamedTuple

Span = tuple[int, int]


class Marked(NamedTuple):
    """A prompt, and where in it something lies. Positions count characters.

    Attributes:
        text: all of it.
        definition: where its definition is; of a published prompt with the words that announce it.
        input: where its input is. Of both a prompt that is too long can lose the middle, and of nothing else.
        query: where the part begins that a query without the definition sees.
    """

    text: str
    definition: Span
    input: Span
    query: int

    def without_last_blanks(self) -> tuple[Marked, str]:
        """The prompt less the blanks at its end, and these; one of nothing but blanks stays as it is."""
        text = self.text.rstrip(" ")
        if not text:
            return self, ""
        (start, end), (first, last), size = self.definition, self.input, len(text)
        inside = (min(start, size), min(end, size)), (min(first, size), min(last, size))
        return Marked(text, *inside, min(self.query, size)), self.text[size:]


class PromptPieces(NamedTuple):
    """One text, cut where its origin changes. Joined, they are what the model reads, or a generator writes."""

    definition: str
    before_input: str
    input: str
    after_input: str

    @property
    def marked(self) -> Marked:
        """The text, with the places of its pieces."""
        query, first = len(self.definition), len(self.definition) + len(self.before_input)
        return Marked("".join(self), (0, query), (first, first + len(self.input)), query)


class Template(NamedTuple):
    """The fixed text around a definition and an input.

    Definition and input go in as they are: published definitions of Long Sequence end in a newline or do not.

    Attributes:
        apart: whether a decoder-only model gets prompt and answer tokenised each by itself, the prompt with the blank
            at its end, as the published code has it.
    """

    before_definition: str
    before_input: str
    after_input: str
    apart: bool = False

    def pieces(self, definition: str, text: str) -> PromptPieces:
        """The prompt of one input. The definition piece carries the words that announce it."""
        return PromptPieces(self.before_definition + definition, self.before_input, text, self.after_input)


# What a task's generator writes in front of an input, and of its answer.
INPUT_MARKER, ANSWER_MARKER = "__inp__", "__ans__"

# SuperNI's zero-shot prompt, as SAPT uses it, and O-LoRA's for the Long Sequence benchmark.
_SUPERNI = Template("Definition: ", "\n\nNow complete the following example -\nInput: ", "\nOutput: ")
_LONG_SEQUENCE = Template("", "\n", "\nOutput: ")

TEMPLATES = {
    "superni": _SUPERNI,
    "superni_apart": _SUPERNI._replace(apart=True),
    "long_sequence": _LONG_SEQUENCE,
    "long_sequence_apart": _LONG_SEQUENCE._replace(apart=True),
    # A prompt that somebody wrote in full.
    "none": Template("", "", ""),
}
