"""The prompts of the two suites, in pieces, so that a long row can lose some of its input and nothing else."""

from __future__ import annotations

from typing import NamedTuple


class PromptPieces(NamedTuple):
    """One prompt, cut where its origin changes. Joined, they are the text that the model reads."""

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


PSEUDO_SAMPLE_MARKER = "__inp__"

TEMPLATES = {
    # SuperNI's zero-shot prompt, as SAPT uses it.
    "superni": Template("Definition: ", "\n\nNow complete the following example -\nInput: ", "\nOutput: "),
    # O-LoRA's prompt for the Long Sequence benchmark.
    "long_sequence": Template("", "\n", "\nOutput: "),
    # A prompt that somebody wrote in full.
    "none": Template("", "", ""),
    # What a task's generator learns to write.
    "pseudo_sample": Template("", PSEUDO_SAMPLE_MARKER, ""),
}
