"""The prompts of the two suites, in pieces, so that a long row can lose some of its input and nothing else."""

from __future__ import annotations

from typing import NamedTuple


class PromptPieces(NamedTuple):
    """One text, cut where its origin changes. Joined, they are what the model reads, or a generator writes."""

    definition: str
    before_input: str
    input: str
    after_input: str


class Template(NamedTuple):
    """The fixed text around a definition and an input.

    Definition and input go in as they are: published definitions of Long Sequence end in a newline or do not.
    """

    before_definition: str
    before_input: str
    after_input: str

    def pieces(self, definition: str, text: str) -> PromptPieces:
        """The prompt of one input. The definition piece carries the words that announce it."""
        return PromptPieces(self.before_definition + definition, self.before_input, text, self.after_input)


# What a task's generator writes in front of an input, and of its answer.
INPUT_MARKER, ANSWER_MARKER = "__inp__", "__ans__"

TEMPLATES = {
    # SuperNI's zero-shot prompt, as SAPT uses it.
    "superni": Template("Definition: ", "\n\nNow complete the following example -\nInput: ", "\nOutput: "),
    # O-LoRA's prompt for the Long Sequence benchmark.
    "long_sequence": Template("", "\n", "\nOutput: "),
    # A prompt that somebody wrote in full.
    "none": Template("", "", ""),
}
