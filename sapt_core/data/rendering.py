"""How a template makes prompts for the model of a tokenizer, and where an answer begins and ends in it.

Where a Jinja text or a chat template has put definition and input is found out by filling it in once more with a mark
in their place: what two texts begin and end with alike is the template's own. So it does not matter what the template
does with them.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, ClassVar, NamedTuple

from transformers import PreTrainedTokenizerBase

from sapt_core.data.templates import TEMPLATES, Marked, Span, Template
from sapt_core.data.turns import Turn, as_input, as_lines, turns_of
from sapt_core.errors import BackboneError, DataError
from sapt_core.template_settings import RENDERING_FAULTS, VARIABLES, chat_system, compiled, keeps_turns, template_fault

TITLE = "Templates cannot be filled in:"
_MARK, _OTHER = "\ue000", "\ue001"  # of private use: no text has them
_MOST_OUTLINES = 256
_LETTER = re.compile(r"\w")
_TODAY = re.compile(r"\bstrftime_now\b")
# Chat templates that ask for the day get one that stays, so that a row has the same prompt on every day.
_ONE_DAY = (
    '{%- macro strftime_now(format) %}{{ format.replace("%d", "26").replace("%b", "Jul").replace("%B", "July")'
    '.replace("%m", "07").replace("%Y", "2024").replace("%y", "24") }}{% endmacro %}'
)


class AnswerFrame(NamedTuple):
    """What stands around an answer behind its prompt.

    Attributes:
        before, after: text, such as a blank.
        end: id of the token that ends the turn; None where that is the tokenizer's own end token.
    """

    before: str = ""
    after: str = ""
    end: int | None = None


@dataclass(frozen=True)
class Wording(ABC):
    """Makes prompts.

    Attributes:
        rendered: whether an engine fills in text that is the user's or the tokenizer's.
        apart: whether a decoder-only model gets prompt and answer tokenised each by itself; None: as the version says.
        special: whether a prompt has all of its special tokens as text.
        frame: of answers.
    """

    rendered: ClassVar[bool] = False

    apart: bool | None = None
    special: bool = False
    frame: AnswerFrame = field(default_factory=AnswerFrame)

    @abstractmethod
    def prompts(self, definition: str, inputs: Sequence[str]) -> list[Marked]:
        """A prompt an input.

        Raises:
            DataError: with every input that the template cannot be filled in with; of several they count from 0.
        """

    def shorter(self, text: str) -> str | None:
        """An input that begins later, for a prompt that is too long; None where one can only be cut."""
        return None


@dataclass(frozen=True)
class Published(Wording):
    """Fixed text around definition and input."""

    template: Template = TEMPLATES["none"]

    def prompts(self, definition: str, inputs: Sequence[str]) -> list[Marked]:
        return [self.template.pieces(definition, text).marked for text in inputs]


@dataclass(frozen=True)
class _Rendered(Wording):
    """What is filled in by an engine, from the turns of an input."""

    rendered: ClassVar[bool] = True

    found: dict[Any, tuple[str, Span]] = field(default_factory=dict, compare=False)

    @abstractmethod
    def fill(self, definition: str, text: str) -> str:
        """The prompt of one input; raises one of ``RENDERING_FAULTS``."""

    @abstractmethod
    def outlines(self, text: str) -> Iterator[str]:
        """The input with marks in the place of what is the row's own: inputs that a template may take, or not."""

    def prompts(self, definition: str, inputs: Sequence[str]) -> list[Marked]:
        found, faults = [], []
        for place, text in enumerate(inputs):
            try:
                found.append(self._marked(definition, text, self.fill(definition, text)))
            except RENDERING_FAULTS as error:
                which = f"input {place}: " if len(inputs) > 1 else ""
                faults.append(f"{which}{type(error).__name__}: {' '.join(str(error).split())}")
        if faults:
            raise DataError(TITLE, faults)
        return found

    def _marked(self, definition: str, text: str, filled: str) -> Marked:
        for outline in self.outlines(text):
            try:
                return _held_against(filled, *self._outlined(definition, outline))
            except RENDERING_FAULTS:  # a template that takes its input apart may not take this one
                continue
        return Marked(filled, (0, 0), (0, len(filled)), 0)

    def _outlined(self, definition: str, outline: str) -> tuple[str, Span]:
        """The prompt of an outline, and where its definition is."""
        key = (definition, outline)
        if key not in self.found:
            if len(self.found) == _MOST_OUTLINES:
                self.found.clear()
            whole = self.fill(definition, outline)
            self.found[key] = whole, _unlike(whole, self.fill(_OTHER, outline)) if definition else (0, 0)
        return self.found[key]


@dataclass(frozen=True)
class Jinja(_Rendered):
    """The user's own text."""

    text: str = ""

    def fill(self, definition: str, text: str) -> str:
        turns = turns_of(text) if keeps_turns(self.text) else [{"role": "user", "content": text}]
        return compiled(self.text).render(dict(zip(VARIABLES, (definition, as_lines(turns), turns), strict=True)))

    def outlines(self, text: str) -> Iterator[str]:
        if keeps_turns(self.text):
            yield _outline(text)
        yield _MARK
        yield _LETTER.sub(_MARK, text)


@dataclass(frozen=True)
class Chat(_Rendered):
    """The tokenizer's own chat template.

    The definition stands in the first turn that is not the system's, before what that says. A row whose chat begins
    with a system turn has that in the place of ``system``.
    """

    tokenizer: PreTrainedTokenizerBase = field(kw_only=True)
    source: str = ""
    system: str = ""
    opening: str = ""

    def fill(self, definition: str, text: str) -> str:
        return self.apply(self._turns(definition, text), prompt=True) + self.opening

    def outlines(self, text: str) -> Iterator[str]:
        yield _outline(text)

    def shorter(self, text: str) -> str | None:
        """Without its oldest turns, up to the next one of the user."""
        turns = turns_of(text)
        front = 1 if turns[0]["role"] == "system" else 0
        later = [place for place, turn in enumerate(turns) if place > front and turn["role"] == "user"]
        return as_input([*turns[:front], *turns[later[0] :]]) if later else None

    def apply(self, turns: Sequence[Turn], *, prompt: bool) -> str:
        """The chat as text, up to where the model's turn begins or as it stands."""
        return str(
            self.tokenizer.apply_chat_template(
                [*turns], chat_template=self.source, tokenize=False, add_generation_prompt=prompt
            )
        )

    def _turns(self, definition: str, text: str) -> list[Turn]:
        turns = turns_of(text)
        if self.system and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": self.system}, *turns]
        if definition:
            place = next((place for place, turn in enumerate(turns) if turn["role"] != "system"), len(turns) - 1)
            turns[place] = {**turns[place], "content": f"{definition}\n\n{turns[place]['content']}"}
        return turns


def wording_of(template: str, tokenizer: PreTrainedTokenizerBase) -> Wording:
    """What makes prompts of a template for a tokenizer.

    Raises:
        BackboneError: the tokenizer has no chat template, or one that takes no chat of a single turn.
        DataError: there is no such template.
    """
    if (fault := template_fault(template)) is not None:
        raise DataError(TITLE, [fault])
    if template in TEMPLATES:
        published = TEMPLATES[template]
        return Published(apart=True if published.apart else None, template=published)
    system = chat_system(template)
    if system is None:
        return Jinja(apart=False, text=template)
    name = tokenizer.name_or_path or "the backbone"
    try:
        source = tokenizer.get_chat_template()
    except ValueError as error:
        raise BackboneError(
            f"template chat: the tokenizer of {name} has no chat template: take an instruct model, put the model's "
            f"own into chat_template.jinja beside its tokenizer, or give another template"
        ) from error
    source = (_ONE_DAY if _TODAY.search(source) else "") + source
    plain = Chat(apart=False, special=True, tokenizer=tokenizer, source=source, system=system)
    try:
        return _framed(plain)
    except RENDERING_FAULTS as error:
        what = f"a chat of one turn{f' with the system text {system!r}' if system else ''}"
        raise BackboneError(
            f"template chat: the chat template of {name} does not take {what}: {' '.join(str(error).split())}"
        ) from error


def ends_of(template: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end an answer to a template's prompts, beside the tokenizer's own end token.

    Raises:
        BackboneError, DataError: as ``wording_of``.
    """
    end = wording_of(template, tokenizer).frame.end
    return () if end is None else (end,)


def _framed(plain: Chat) -> Chat:
    """The same, with what stands around an answer in it.

    What is no blank between the prompt and the answer, such as the marks of an empty thought, is no answer: it becomes
    the end of the prompt.
    """
    asked = plain._turns("", _MARK)
    prompt = plain.apply(asked, prompt=True)
    whole = plain.apply([*asked, {"role": "assistant", "content": _OTHER}], prompt=False)
    before, _, after = whole.rpartition(_OTHER)
    between = before[len(prompt) :] if before.startswith(prompt) else ""
    opening, lead = (between, "") if between.strip() else ("", between)
    special = {token.content: index for index, token in plain.tokenizer.added_tokens_decoder.items() if token.special}
    ends = sorted((after.index(token), -len(token), token) for token in special if token in after)
    frame = AnswerFrame(lead)
    if ends:
        place, _, token = ends[0]
        end = special[token]
        frame = AnswerFrame(lead, after[:place], None if end == plain.tokenizer.eos_token_id else end)
    return Chat(
        apart=False,
        special=True,
        frame=frame,
        tokenizer=plain.tokenizer,
        source=plain.source,
        system=plain.system,
        opening=opening,
    )


def _outline(text: str) -> str:
    """The turns of an input with a mark for all that is said but by the system, which rows have in common."""
    return as_input([turn if turn["role"] == "system" else {**turn, "content": _MARK} for turn in turns_of(text)])


def _held_against(filled: str, outline: str, definition: Span) -> Marked:
    """A prompt with its places, by the one of an outline of its input and where that has the definition."""
    (start, end), (first, last) = definition, _unlike(filled, outline)
    longer = len(filled) - len(outline)
    if end <= first:
        there = (start, end)
    elif start + longer >= last:
        there = (start + longer, end + longer)
    else:
        there = (first, first)  # in the midst of the input, and cut with it
    return Marked(filled, there, (first, last), first)


def _unlike(text: str, other: str) -> Span:
    """Where a text is another than the other one: what both begin with and then what both end with left out."""
    start = alike(text, other)
    return start, len(text) - alike(text[start:][::-1], other[start:][::-1])


def alike(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many items two sequences have alike before the first that differs."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
