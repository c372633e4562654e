from __future__ import annotations

import json
import logging
from dataclasses import replace
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sapt_core.data.encoding import EncodedRow, PromptEncoder
from sapt_core.data.facts import TaskFacts, encoded, facts_of
from sapt_core.data.prepare import check_fits, check_templates, prepare_task
from sapt_core.data.rendering import ends_of, wording_of
from sapt_core.data.rows import RowReader
from sapt_core.data.task import Example, Task
from sapt_core.data.turns import as_input, as_lines, turns_of
from sapt_core.errors import BackboneError, DataError
from sapt_core.task_settings import ColumnsConfig
from tests.core.chatty import CHATML, INSTRUCT, THINKING, chat_tokenizer

CHAT = [
    {"role": "user", "content": "alpha"},
    {"role": "assistant", "content": "beta"},
    {"role": "user", "content": "gamma"},
]


@pytest.fixture(scope="module")
def chatml() -> PreTrainedTokenizerFast:
    return chat_tokenizer()


def encoder_of(tokenizer: PreTrainedTokenizerFast, room: int = 400) -> PromptEncoder:
    return PromptEncoder(tokenizer, max_source_tokens=room, is_encoder_decoder=False)


def row_of(tokenizer: PreTrainedTokenizerFast, template: str, definition: str, text: str, answer: str) -> EncodedRow:
    (row,) = encoder_of(tokenizer).rows(template, definition, [(text, answer)], 40)
    return row


def read(tokenizer: PreTrainedTokenizerFast, row: EncodedRow) -> tuple[str, str, str]:
    """What stands before the query's part, that part, and the answer."""
    ids, start = row.prompt.prompt_ids, row.prompt.query_start
    return tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:]), tokenizer.decode(row.answer_ids)


def test_a_chat_row_is_what_the_tokenizer_makes_of_the_chat(chatml: PreTrainedTokenizerFast) -> None:
    row = row_of(chatml, "chat", "Name the colour.", "the sky", "blue")
    turns = [{"role": "user", "content": "Name the colour.\n\nthe sky"}]
    said = [*turns, {"role": "assistant", "content": "blue"}]
    assert row.prompt.prompt_ids == chatml.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    newline = chatml("\n")["input_ids"]
    assert [*row.prompt.prompt_ids, *row.answer_ids, *newline] == chatml.apply_chat_template(said, return_dict=False)
    assert read(chatml, row) == (
        "<|im_start|>user\nName the colour.\n\n", "the sky<|im_end|>\n<|im_start|>assistant\n", "blue<|im_end|>",
    )  # fmt: skip
    assert row.answer_ids[-1] == chatml.convert_tokens_to_ids("<|im_end|>") != chatml.eos_token_id
    assert ends_of("chat", chatml) == (row.answer_ids[-1],)
    assert ends_of("superni", chatml) == ()


def test_a_system_text_stands_first_and_outside_of_the_query(chatml: PreTrainedTokenizerFast) -> None:
    row = row_of(chatml, "chat: Be brief.", "", "the sky", "blue")
    assert read(chatml, row)[:2] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
        "the sky<|im_end|>\n<|im_start|>assistant\n",
    )
    own = as_input([{"role": "system", "content": "Be long."}, CHAT[0]])
    assert read(chatml, row_of(chatml, "chat: Be brief.", "", own, "blue"))[:2] == (
        "<|im_start|>system\nBe long.<|im_end|>\n<|im_start|>user\n",
        "alpha<|im_end|>\n<|im_start|>assistant\n",
    )


def test_turns_keep_their_roles(chatml: PreTrainedTokenizerFast) -> None:
    row = row_of(chatml, "chat", "Say it.", as_input(CHAT), "positive")
    assert read(chatml, row) == (
        "<|im_start|>user\nSay it.\n\n",
        "alpha<|im_end|>\n<|im_start|>assistant\nbeta<|im_end|>\n<|im_start|>user\ngamma<|im_end|>\n"
        "<|im_start|>assistant\n",
        "positive<|im_end|>",
    )


def test_blanks_around_an_answer_are_those_of_the_model_s_turn() -> None:
    tokenizer = chat_tokenizer(INSTRUCT, bos=True)
    row = row_of(tokenizer, "chat", "", "  alpha", "positive")
    said = [{"role": "user", "content": "  alpha"}, {"role": "assistant", "content": "positive"}]
    assert [*row.prompt.prompt_ids, *row.answer_ids] == tokenizer.apply_chat_template(said, return_dict=False)
    assert read(tokenizer, row) == ("<s>[INST]", " alpha [/INST]", " positive </s>")
    assert row.prompt.prompt_ids.count(tokenizer.bos_token_id) == 1
    assert ends_of("chat", tokenizer) == ()  # its own end token, at which it stops anyhow


@pytest.mark.parametrize("opened", ["", "<think>\n"])
def test_an_empty_thought_is_no_answer(opened: str) -> None:
    tokenizer = chat_tokenizer(
        THINKING.replace("assistant\n' }}{% endif %}", f"assistant\n{opened}' }}}}{{% endif %}}")
    )
    asked = tokenizer.apply_chat_template([CHAT[0]], add_generation_prompt=True, tokenize=False)
    assert asked.endswith(f"<|im_start|>assistant\n{opened}")
    row = row_of(tokenizer, "chat", "", "alpha", "positive")
    assert read(tokenizer, row)[1:] == (
        "alpha<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "positive<|im_end|>",
    )  # fmt: skip


def test_a_chat_that_asks_for_the_day_is_the_same_on_every_day() -> None:
    tokenizer = chat_tokenizer("{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + CHATML)
    text, _, _ = read(tokenizer, row_of(tokenizer, "chat", "", "alpha", "positive"))
    assert text.startswith("Today: 26 Jul 2024\n<|im_start|>user")
    assert f"{datetime.now():%d %b %Y}" not in text


def test_chats_that_are_too_long_lose_their_oldest_turns(chatml: PreTrainedTokenizerFast) -> None:
    system = {"role": "system", "content": "Be brief."}
    turns = [
        system,
        *[{**turn, "content": f"{turn['content']} {place}"} for place in range(9) for turn in CHAT[:2]],
        CHAT[2],
    ]
    whole = encoder_of(chatml, 10_000).prompts("chat", "Say it.", [as_input(turns)])[0]
    short = encoder_of(chatml, 90).prompts("chat", "Say it.", [as_input(turns)])[0]
    text = chatml.decode(short.prompt_ids)
    assert len(short.prompt_ids) <= 90 < len(whole.prompt_ids) == short.tokens
    assert (short.truncated, whole.truncated) == (True, False)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay it.\n\nalpha ")
    assert text.endswith("beta 8<|im_end|>\n<|im_start|>user\ngamma<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("<|im_start|>") == text.count("<|im_end|>") + 1
    # The last turn loses its middle, and no mark of a turn.
    long = [*turns[:-1], {"role": "user", "content": "alpha " + "beta " * 90 + "gamma"}]
    (cut,) = encoder_of(chatml, 90).prompts("chat", "Say it.", [as_input(long)])
    text = chatml.decode(cut.prompt_ids)
    assert len(cut.prompt_ids) == 90
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay it.\n\nalpha beta")
    assert text.endswith("beta gamma<|im_end|>\n<|im_start|>assistant\n")


SPACED = "{% if definition %}{{ definition }}\n{% endif %}Mail: {{ input | trim }}\nIs it good?\nAnswer: "


def test_jinja_text_is_filled_in_and_its_parts_are_found() -> None:
    tokenizer = chat_tokenizer(None, bos=True)
    row = row_of(tokenizer, SPACED, "Name it.", "  the sky ", "blue")
    text = "Name it.\nMail: the sky\nIs it good?\nAnswer: blue"
    assert [*row.prompt.prompt_ids, *row.answer_ids] == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert read(tokenizer, row) == ("<s>Name it.\nMail:", " the sky\nIs it good?\nAnswer:", " blue</s>")
    (bare,) = encoder_of(tokenizer).prompts(SPACED, "", ["alpha"])
    assert tokenizer.decode(bare.prompt_ids[: bare.query_start]) == "<s>Mail:"
    # What is copied from a model's page begins as the tokenizer would have it begin.
    (copied,) = encoder_of(tokenizer).prompts("<s>{{ input }}", "", ["alpha"])
    assert copied.prompt_ids == tokenizer("alpha")["input_ids"]


@pytest.mark.parametrize(
    ("template", "before", "query"),
    [
        ("{{ definition | upper }}: {{ input | upper }}.", "SAY IT.: ", "ALPHA BETA."),
        ("{{ input }}\n{{ definition }}", "", "alpha beta\nSay it."),
        ("Q {{ input }} Q {{ input }} A", "Q", " alpha beta Q alpha beta A"),
        ("{{ input.split()[1] }}!", "", "beta!"),
        ("{{ input[:3] }}{{ input | tojson }}", "", 'alp"alpha beta"'),
        ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", "<user>", "alpha beta"),
    ],
)
def test_whatever_a_template_does_with_an_input_it_is_found(template: str, before: str, query: str) -> None:
    tokenizer = chat_tokenizer(None)
    assert read(tokenizer, row_of(tokenizer, template, "Say it.", "alpha beta", "x"))[:2] == (before, query)


@settings(deadline=None, max_examples=40)
@given(
    text=st.text(alphabet="ab \nMail:é猫?", min_size=1).filter(str.strip),
    definition=st.text(alphabet="ab \nM:", max_size=8),
)
def test_the_places_in_jinja_text_are_exact(text: str, definition: str) -> None:
    wording = wording_of(SPACED, chat_tokenizer(None))
    (marked,) = wording.prompts(definition, [text])
    assert marked.text[slice(*marked.input)] == text.strip()
    assert marked.text[slice(*marked.definition)] == definition
    assert marked.query == marked.input[0]


def test_long_jinja_rows_lose_the_middle_of_their_input_and_then_of_their_definition() -> None:
    tokenizer = chat_tokenizer(None)
    template = "Do {{ definition }} with {{ input }} now:"
    long = "alpha " + "beta " * 60 + "gamma"
    encoder = encoder_of(tokenizer, 60)
    for definition, text in (("it", long), (long, "it"), (long, long)):
        (cut,) = encoder.prompts(template, definition, [text])
        read_back = tokenizer.decode(cut.prompt_ids)
        assert len(cut.prompt_ids) == 60
        assert read_back.startswith(f"Do {definition[:9]}")
        assert f"{definition[-2:]} with {text[:2]}" in read_back
        assert read_back.endswith(f"{text[-2:]} now:")
        assert tokenizer.decode(cut.prompt_ids[cut.query_start :]).strip().startswith(text[:2])


def test_the_published_prompt_apart_is_as_its_code_has_it() -> None:
    tokenizer = chat_tokenizer(None, bos=True)
    text = "Definition: Name it.\n\nNow complete the following example -\nInput: alpha\nOutput: "
    apart, joined = (
        row_of(tokenizer, template, "Name it.", "alpha", "blue") for template in ("superni_apart", "superni")
    )
    assert apart.prompt.prompt_ids == tokenizer(text)["input_ids"]
    assert apart.answer_ids == [*tokenizer("blue", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    both = [*joined.prompt.prompt_ids, *joined.answer_ids]
    assert both == [*tokenizer(f"{text}blue")["input_ids"], tokenizer.eos_token_id]
    assert both != [*apart.prompt.prompt_ids, *apart.answer_ids]
    assert apart.prompt.query_start == joined.prompt.query_start


def test_inputs_stand_for_turns_and_back() -> None:
    assert as_input(CHAT[:1]) == "alpha"
    for turns in (CHAT, [{"role": "system", "content": "x"}], [{"role": "user", "content": as_input(CHAT)}]):
        assert turns_of(as_input(turns)) == turns
    for text in ("alpha", "[1, 2]", "[", "[]", '[{"role": "user"}]', "[" * 100_000, '[{"role": "a", "content": 1}]'):
        assert turns_of(text) == [{"role": "user", "content": text}]
    assert as_lines(CHAT) == "user: alpha\nassistant: beta\nuser: gamma"


def test_rows_keep_turns_where_the_template_does() -> None:
    row = {"messages": [*CHAT, {"role": "assistant", "content": "delta"}, {"role": "user", "content": "bye"}]}
    kept, flat = (RowReader(ColumnsConfig(), turns=turns).read(row) for turns in (True, False))
    assert kept == Example(as_input(CHAT), ("delta",))
    assert flat == Example(as_lines(CHAT), ("delta",))
    assert RowReader(ColumnsConfig()).read({"messages": CHAT[:1]}) == (
        "messages has no turn of role assistant, the last of which is the answer: leave the row out"
    )
    assert RowReader(ColumnsConfig(), answered=False).read({"messages": CHAT[:1]}) == Example("alpha", ())


def of(name: str, template: str, *inputs: str) -> Task:
    rows = tuple(Example(text, ("blue",)) for text in inputs)
    return Task(name, "Name it.", rows, rows[:1], rows[:1], template, "rouge_l")


def test_rows_that_a_template_cannot_be_filled_in_with_are_named_together(chatml: PreTrainedTokenizerFast) -> None:
    tasks = [
        of("fine", "superni", "a"),
        of("parts", "{{ input.split('|')[1] }}", "a|b", "a", "c"),
        of("numbers", "{{ 1 / input | length }}{{ input }}", "a"),
        of("turns", "{{ messages[1].content }}", "a"),
        of("gone", "{{ input | replace('a', '') }}:", "a"),
        of("asked", "chat: Be brief.", "a"),
        of("unknown", "of_tomorrow", "a"),
    ]
    with pytest.raises(DataError) as caught:
        check_templates(tasks, chat_tokenizer(INSTRUCT), is_encoder_decoder=False)
    faults = "\n".join(caught.value.faults)
    assert not [fault for fault in caught.value.faults if fault.startswith(("fine", "numbers", "parts: train row 0"))]
    for fault in (
        "parts: train row 1: UndefinedError: list object has no element 1 (template Jinja",
        "parts: train row 2: UndefinedError",
        "which may read definition, input, messages)",
        "turns: train row 0: UndefinedError: list object has no element 1",
        "gone: train row 0: nothing of the input is left in the prompt",
        "asked: template chat: the chat template of the backbone does not take a chat of one turn with the system text "
        "'Be brief.': System role not supported",
        "unknown: there is no template 'of_tomorrow'; there are superni,",
    ):
        assert fault in faults
    with pytest.raises(DataError) as caught:
        check_templates([of("a", "chat", "a"), of("b", "chat", "b")], chat_tokenizer(None), is_encoder_decoder=False)
    assert [fault.partition(": ")[0] for fault in caught.value.faults] == ["a", "b"]
    assert "has no chat template: take an instruct model" in caught.value.faults[0]
    many = of("many", "{{ input.split('|')[1] }}", *"abcdefgh")
    with pytest.raises(DataError) as caught:
        check_templates([many], chatml, is_encoder_decoder=False)
    assert len(caught.value.faults) == 6
    assert caught.value.faults[-1] == "many: 5 more rows"
    check_templates([of("a", "chat", "a"), of("b", SPACED, "b")], chatml, is_encoder_decoder=False)


def test_what_cannot_be_filled_in_is_told_of_a_request(chatml: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError) as caught:
        encoder_of(chatml).prompts("{{ input.split('|')[1] }}", "", ["a|b", "c"])
    assert caught.value.faults == ("input 1: UndefinedError: list object has no element 1",)
    with pytest.raises(BackboneError, match="has no chat template"):
        encoder_of(chat_tokenizer(None)).prompts("chat", "", ["a"])


def test_room_is_counted_without_the_input(chatml: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    fixed = len(chatml("<|im_start|>user\nName it.\n\n<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    assert encoder_of(chatml).template_tokens("chat", "Name it.") == fixed
    taken_apart = "{{ definition.split()[0] }} {{ input.split('|')[1] }} A: "
    encoder, alone = encoder_of(chatml), len(chatml("Name  A:")["input_ids"])
    assert encoder.template_tokens(taken_apart, "Name it.", "alpha|beta") == alone
    check_fits([of("apart", taken_apart, "alpha|beta")], chatml, max_source_tokens=60, is_encoder_decoder=False)
    with pytest.raises(DataError, match="long: the template and a quarter"):
        check_fits([of("long", "chat", "a")], chatml, max_source_tokens=10, is_encoder_decoder=False)
    with caplog.at_level(logging.WARNING):
        check_fits([of("tight", "chat", "a")], chatml, max_source_tokens=fixed + 4, is_encoder_decoder=False)
    assert "tight: definition and template take" in caplog.text


def test_facts_of_a_task_are_those_of_its_rows(chatml: PreTrainedTokenizerFast) -> None:
    rows = tuple(Example(text, (answer,)) for text, answer in (("a", "x"), ("a", "y"), ("b " * 40, "x"), ("c", "y")))
    one = replace(of("one", "chat", "d"), train=rows, dev=rows[:1])
    prepared = prepare_task(one, chatml, max_source_tokens=40, max_target_tokens=2, is_encoder_decoder=False)
    facts = prepared.facts
    assert facts is not None
    made = {split: encoded(one, getattr(one, split), encoder_of(chatml, 40), 2) for split in facts.splits}
    assert facts == facts_of(one, made, chatml)
    longest = len(encoder_of(chatml).prompts("chat", one.definition, ["b " * 40])[0].prompt_ids)
    train = facts.splits["train"]
    assert (train.rows, train.prompts_cut, train.answers_cut, train.repeated) == (4, 1, 0, 1)
    assert (train.prompt_tokens[1], train.answer_tokens) == (longest, (2, 2))
    assert facts.labels == {"x": (2, 1, 0), "y": (2, 0, 0), "blue": (0, 0, 1)}
    figures, labels = json.loads(json.dumps(facts.parted()))
    assert TaskFacts.joined(figures, labels) == facts


def test_a_task_of_earlier_releases_has_the_same_digest() -> None:
    plain = of("a", "superni", "x")
    assert set(json.loads(plain.to_json())) == {"name", "definition", "train", "dev", "test", "template", "metric"}
