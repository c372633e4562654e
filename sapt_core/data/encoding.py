"""From prompts and answers to token ids, for one backbone."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from sapt_core.data.rendering import Wording, alike, wording_of
from sapt_core.data.templates import Marked, PromptPieces, Span
from sapt_core.errors import BackboneError, DataError

NO_ROOM = "Prompts do not fit the model's input:"


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of one prompt.

    Attributes:
        prompt_ids: at most ``max_source_tokens`` ids. For an encoder-decoder with every special token that the
            tokenizer adds; for a decoder-only model with those in front (BOS) and none behind, as the answer follows.
            A chat has those of its template, and no others.
        query_start: index of the first token after the definition, so ``prompt_ids[query_start:]`` holds the rest; of
            Jinja text and of a chat the first token of the input.
        truncated: tokens were taken out of the middle of the input, or a chat's oldest turns.
        tokens: how many there were before that.
    """

    prompt_ids: list[int]
    query_start: int
    truncated: bool
    tokens: int

    @property
    def row(self) -> dict[str, Any]:
        """What a collator asks of a prompt to generate from."""
        return {"prompt_ids": self.prompt_ids, "query_start": self.query_start}


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of a prompt and of its answer.

    Attributes:
        prompt: the very one that ``PromptEncoder.prompts`` gives for the input.
        answer_ids: at most ``max_target_tokens`` ids, the last one the end of the answer: EOS, or of a chat what ends
            the model's turn.
        answer_cut: the answer was too long.
        tokens: of the whole answer, with its end.
    """

    prompt: EncodedPrompt
    answer_ids: list[int]
    answer_cut: bool
    tokens: int

    @property
    def row(self) -> dict[str, Any]:
        """What a collator asks of a row to train on."""
        return {**self.prompt.row, "answer_ids": self.answer_ids}


class _Located(NamedTuple):
    """Ids of a text without what the tokenizer adds: where its definition and its input lie, and its query begins."""

    ids: list[int]
    definition: Span
    input: Span
    query: int

    def behind(self, tokens: int) -> _Located:
        """The text less its first tokens."""
        places = (*self.definition, *self.input, self.query)
        start, end, first, last, query = (max(0, place - tokens) for place in places)
        return _Located(self.ids[tokens:], (start, end), (first, last), query)


class _Prompt(NamedTuple):
    """A prompt as text and as ids.

    Attributes:
        text: without the blanks at its end, where they go with the answer.
        before: what an answer begins with.
        located: ids of the text.
        front, back: special tokens around it.
    """

    text: str
    before: str
    located: _Located
    front: list[int]
    back: list[int]

    @property
    def tokens(self) -> int:
        """How many tokens it is before it is cut."""
        return len(self.front) + len(self.located.ids) + len(self.back)


class PromptEncoder:
    """Tokenises prompts and answers for one backbone.

    A published prompt that fits has exactly the ids of ``tokenizer(text)`` (less a final EOS for a decoder-only model).
    One that does not loses tokens from the middle of its input, down to a quarter of the room, and then from the
    middle of its definition; the words of the template always stay. A chat loses its oldest turns first.

    For a decoder-only model prompt and answer are one text, and the blank between them goes with the answer: most
    vocabularies have a blank and the word behind it as one token. So a prompt is tokenised without the blanks at its
    end, and an answer has the ids that it has in the joined text, which is tokenised once and split where the prompt
    ends. Where a vocabulary has a token across the border, which no prompt could be asked with, the prompt keeps its
    ids, and the answer with its blank is tokenised apart.

    Args:
        tokenizer: of the backbone.
        max_source_tokens: longest prompt, special tokens included.
        is_encoder_decoder: kind of the backbone.
        joined: whether prompt and answer are one text where the template leaves it open, as ``BackboneRef`` has it;
            default: as what is learnt now.

    Raises:
        BackboneError: the tokenizer has no EOS token, so no answer could end.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_source_tokens: int,
        is_encoder_decoder: bool,
        joined: bool | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise BackboneError(
                f"The tokenizer of {tokenizer.name_or_path or 'the backbone'} has no EOS token, so a model cannot "
                "learn where an answer ends: set eos_token in its tokenizer_config.json."
            )
        self.tokenizer = tokenizer
        self.max_source_tokens = max_source_tokens
        self.is_encoder_decoder = is_encoder_decoder
        self.joined = not is_encoder_decoder if joined is None else joined
        self.eos_token_id = int(tokenizer.eos_token_id)
        # What the tokenizer puts around any text: learnt from it, as classes do not say.
        bare, whole = self._ids(["a"])[0], list(tokenizer(["a"])["input_ids"][0])
        start = next(i for i in range(len(whole) + 1) if whole[i : i + len(bare)] == bare)
        self._prefix = whole[:start]
        self._suffix = whole[start + len(bare) :] if is_encoder_decoder else []
        self._loses_end = False
        self._wordings: dict[str, Wording] = {}

    def prompts(self, template: str, definition: str, inputs: Sequence[str]) -> list[EncodedPrompt]:
        """Encode the prompts of ``inputs``.

        Raises:
            BackboneError: the tokenizer lacks what the template needs.
            DataError: the words of the template alone leave no room in ``max_source_tokens``, or it cannot be filled
                in with some of the inputs.
        """
        return [self._fitted(*prompt) for prompt in self._prompts(template, definition, inputs)]

    def rows(
        self, template: str, definition: str, pairs: Sequence[tuple[str, str]], max_target_tokens: int
    ) -> list[EncodedRow]:
        """Encode inputs with their answers.

        Raises:
            BackboneError, DataError: as ``prompts``.
        """
        asked = self._prompts(template, definition, [text for text, _ in pairs])
        prompts = [prompt for prompt, _ in asked]
        frame, joins = self.wording(template).frame, self._joins(template)
        behind = frame.after if joins else ""
        answers = [prompt.before + answer + behind for prompt, (_, answer) in zip(prompts, pairs, strict=True)]
        whole = self._ids(answers)
        if self.is_encoder_decoder:
            whole = [self._prefix + ids for ids in whole]
        elif joins:
            texts = self._ids([prompt.text + answer for prompt, answer in zip(prompts, answers, strict=True)])
            whole = [
                ids[len(prompt.located.ids) :] if _begins(ids, prompt.located.ids) else apart
                for prompt, ids, apart in zip(prompts, texts, whole, strict=True)
            ]
        room, end = max_target_tokens - 1, self.eos_token_id if frame.end is None else frame.end
        return [
            EncodedRow(self._fitted(*prompt), [*ids[:room], end], len(ids) > room, len(ids) + 1)
            for prompt, ids in zip(asked, whole, strict=True)
        ]

    def wording(self, template: str) -> Wording:
        """What makes prompts of a template.

        Raises:
            BackboneError: the tokenizer lacks what it needs.
            DataError: there is no such template.
        """
        if template not in self._wordings:
            self._wordings[template] = wording_of(template, self.tokenizer)
        return self._wordings[template]

    def takes(self, template: str, definition: str, text: str) -> bool:
        """Whether a template can be filled in with an input."""
        try:
            self.wording(template).prompts(definition, [text])
        except DataError:
            return False
        return True

    def ends(self, template: str, definition: str, inputs: Sequence[str]) -> list[str]:
        """What prompts end in, all that the ids of answers behind them can depend on: the last letter, and blanks."""
        return [marked.text[-1:] + before for marked, before in self._texts(template, definition, inputs)]

    def text(self, text: str) -> list[int]:
        """Ids of a text that is no prompt of a task, with the special tokens that a prompt has."""
        return [*self._prefix, *self._ids([text])[0], *self._suffix]

    def targets(self, source: str, rows: Sequence[PromptPieces], max_tokens: int) -> list[list[int]]:
        """Texts to write: they end with EOS; over-long ones are cut as prompts are, and then at their end.

        What stands after the input is an answer, which a model may have written itself at any length.

        Args:
            source: the text that asks for them. Decoder-only, theirs goes on behind it after a blank, as an answer's.
            rows: the texts in pieces.
            max_tokens: longest text, with its EOS.
        """
        writer = copy(self)
        writer._loses_end = True
        writer.max_source_tokens = max_tokens
        writer._prefix = self._prefix if self.is_encoder_decoder else []
        writer._suffix = [self.eos_token_id]
        located = self._located_behind(source, rows)
        return [writer._fit(each, writer._prefix, writer._suffix).prompt_ids for each in located]

    def template_tokens(self, template: str, definition: str, sample: str = "") -> int:
        """Length of a prompt without its input.

        Args:
            template, definition: of the prompt.
            sample: an input that it takes, where it may not take an empty one.
        """
        (marked,) = self.wording(template).prompts(definition, [sample])
        return self._tokens_without(template, marked, [marked.input])

    def fixed_tokens(self, template: str, definition: str, sample: str) -> int:
        """Length of a prompt without its input and without what of its definition can be cut."""
        if not self.wording(template).rendered:
            return self.template_tokens(template, "")
        (marked,) = self.wording(template).prompts(definition, [sample])
        return self._tokens_without(template, marked, [marked.input, marked.definition])

    def _tokens_without(self, template: str, marked: Marked, spans: Sequence[Span]) -> int:
        text = marked.text
        for start, end in sorted(spans, reverse=True):  # the later one first: places before it stay what they are
            text = text[:start] + text[end:]
        text = text.rstrip(" ") or text if self._joins(template) else text
        return len(self._ids([text])[0] if self.wording(template).special else self.text(text))

    def _joins(self, template: str) -> bool:
        """Whether prompt and answer are tokenised as one text."""
        apart = self.wording(template).apart
        return self.joined if apart is None else not apart and not self.is_encoder_decoder

    def _prompts(self, template: str, definition: str, inputs: Sequence[str]) -> list[tuple[_Prompt, int]]:
        """Prompts, and how many tokens each had as it was asked for: a chat that is too long loses its oldest turns."""
        wording, found = self.wording(template), []
        for text, whole in zip(inputs, self._whole(template, definition, inputs), strict=True):
            prompt, left = whole, wording.shorter(text)
            while prompt.tokens > self.max_source_tokens and left is not None:
                (prompt,) = self._whole(template, definition, [left])
                left = wording.shorter(left)
            found.append((prompt, whole.tokens))
        return found

    def _texts(self, template: str, definition: str, inputs: Sequence[str]) -> list[tuple[Marked, str]]:
        """Prompts as text, and what their answers begin with."""
        wording, joins = self.wording(template), self._joins(template)
        whole = wording.prompts(definition, inputs)
        parted = [marked.without_last_blanks() if joins else (marked, "") for marked in whole]
        return [(marked, blanks + wording.frame.before if joins else "") for marked, blanks in parted]

    def _whole(self, template: str, definition: str, inputs: Sequence[str]) -> list[_Prompt]:
        wording, texts = self.wording(template), self._texts(template, definition, inputs)
        found = []
        for (marked, before), located in zip(texts, self._locate([marked for marked, _ in texts]), strict=True):
            # A text that was copied from elsewhere may begin as the tokenizer would have it begin.
            there = wording.rendered and _begins(located.ids, self._prefix)
            front = [] if wording.special or there else self._prefix
            found.append(_Prompt(marked.text, before, located, front, [] if wording.special else self._suffix))
        return found

    def _located_behind(self, source: str, rows: Sequence[PromptPieces]) -> list[_Located]:
        if not self.joined:
            return self._locate([row.marked for row in rows])
        rows = [row._replace(definition=f" {row.definition}") for row in rows]
        joined = self._locate([row._replace(definition=source + row.definition).marked for row in rows])
        before = self._ids([source])[0]
        return [
            each.behind(len(before)) if _begins(each.ids, before) else apart
            for each, apart in zip(joined, self._locate([row.marked for row in rows]), strict=True)
        ]

    def _locate(self, rows: Sequence[Marked]) -> list[_Located]:
        if not rows:
            return []
        if not self.tokenizer.is_fast:
            return [self._locate_without_offsets(row) for row in rows]
        batch = self.tokenizer(
            [row.text for row in rows], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        located = []
        for row, ids, offsets in zip(rows, batch["input_ids"], batch["offset_mapping"], strict=True):
            size = len(ids)

            def begun(place: int, offsets: Sequence[Span] = offsets, size: int = size) -> int:
                """The first token that begins there or behind it."""
                return next((i for i, (start, _) in enumerate(offsets) if start >= place), size)

            def ended(place: int, offsets: Sequence[Span] = offsets, size: int = size) -> int:
                """The first token that ends behind it."""
                return next((i for i, (_, end) in enumerate(offsets) if end > place), size)

            # A token that straddles the border belongs to the template and stays.
            first = begun(row.input[0])
            start = begun(row.definition[0])
            located.append(
                _Located(
                    ids,
                    (start, max(start, ended(row.definition[1]))),
                    (first, max(first, ended(row.input[1]))),
                    ended(row.query),
                )
            )
        return located

    def _locate_without_offsets(self, row: Marked) -> _Located:
        """For slow tokenizers: a piece reaches as far as the whole text's ids are those of the text up to there."""
        (start, end), (first, last) = row.definition, row.input
        parts = [row.text, *(row.text[:place] for place in (start, end, first, row.query)), row.text[last:]]
        whole, *before, after = self._ids(parts)
        there, defined, begun, query = (alike(whole, each) for each in before)
        ended = len(whole) - alike(whole[::-1], after[::-1])
        return _Located(whole, (there, max(there, defined)), (begun, max(begun, ended)), query)

    def _fitted(self, prompt: _Prompt, tokens: int) -> EncodedPrompt:
        fitted = self._fit(prompt.located, prompt.front, prompt.back)
        return replace(fitted, truncated=tokens > self.max_source_tokens, tokens=tokens)

    def _fit(self, located: _Located, front: list[int], back: list[int]) -> EncodedPrompt:
        """Add the special tokens and, where needed, take out the middle of the input.

        An input is cut down to a quarter of the room at most; what is then still too much comes out of the
        middle of the definition, and of a text to write at last from its end.
        """
        ids, definition, text, query = located
        tokens = len(front) + len(ids) + len(back)
        excess = tokens - self.max_source_tokens
        if excess > 0:
            spare = max(0, text[1] - text[0] - self.max_source_tokens // 4)
            from_input = min(excess, spare)
            from_definition = min(excess - from_input, definition[1] - definition[0])
            from_end = excess - from_input - from_definition
            if from_end and not self._loses_end:
                raise DataError(NO_ROOM, [no_room(self.max_source_tokens + from_end, self.max_source_tokens)])
            ids = ids[: len(ids) - from_end]
            # The later one first: places before it stay what they are.
            for span, count in sorted([(text, from_input), (definition, from_definition)], reverse=True):
                ids = _without_middle(ids, *span, count)
            query -= from_definition if definition[1] <= query else 0
        return EncodedPrompt([*front, *ids, *back], len(front) + query, excess > 0, tokens)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:  # which transformers 5.23 stumbles over
            return []
        batch = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)
        return [list(ids) for ids in batch["input_ids"]]


def no_room(needed: int, allowed: int) -> str:
    """What to tell of a prompt that cannot be cut to its room."""
    return (
        f"the template and a quarter of the room for the input take {needed} tokens, benchmark.max_source_tokens is "
        f"{allowed}: raise it"
    )


def _begins(ids: Sequence[int], before: Sequence[int]) -> bool:
    return ids[: len(before)] == before


def _without_middle(ids: list[int], start: int, end: int, excess: int) -> list[int]:
    """``ids`` less ``excess`` tokens from the middle of ``ids[start:end]``."""
    head_end = start + (end - start - excess + 1) // 2
    return [*ids[:head_end], *ids[head_end + excess :]]
