from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from sapt_core.settings import BenchmarkConfig
from sapt_core.template_settings import TemplateText, chat_system, compiled, keeps_turns, template_fault, told

TEXT = TypeAdapter(TemplateText)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("superni", "superni"),
        ("long_sequence_apart", "long_sequence_apart"),
        ("chat", "chat"),
        ({"chat": "Be brief: one word."}, "chat: Be brief: one word."),
        ({"chat": None}, "chat"),
        ("{{ definition }}\n{{ input }}\n", "{{ definition }}\n{{ input }}\n"),
    ],
)
def test_a_template_is_one_text(given: Any, text: str) -> None:
    assert TEXT.validate_python(given) == text
    assert TEXT.dump_python(text) == text


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ("superny", "there is no template 'superny'; did you mean superni? there are superni, superni_apart, "),
        ("{{ text }} {{ colour }}", "reads colour, text, which no row has; there are definition, input, messages"),
        ("{% if x is defined %}{{ input }}{% endif %}", "reads x, which no row has"),
        ("{{ definition }}", "reads neither input nor messages"),
        ("{{ input }", "the Jinja text cannot be read: line 1: unexpected '}'"),
        ("a\n{% if input %}\n{{ input }}", "the Jinja text cannot be read: line 3: Unexpected end of template."),
        ("{{ input | shout }}", "the Jinja text cannot be read: line 1: No filter named 'shout'."),
        ("{{ [input, 'a'] | random }}", "No filter named 'random'"),
        ("{{ lipsum() }}{{ input }}", "reads lipsum"),
        ("chat: {{ input }}", "begins as a chat with a system text, which holds no Jinja"),
        ({"chatty": "x"}, "Input should be a valid string"),
    ],
)
def test_what_is_no_template_is_told(given: Any, fault: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TEXT.validate_python(given)
    assert fault in str(caught.value)


def test_faults_of_all_templates_come_together() -> None:
    tasks = [{"name": "a", "path": "x", "template": "{{ text }}"}, {"name": "b", "path": "y", "template": "{{ input }"}]
    with pytest.raises(ValidationError) as caught:
        BenchmarkConfig(suite="folder", tasks=tasks, template="superny", metric="rouge_l")
    assert [error["loc"] for error in caught.value.errors()] == [
        ("tasks", 0, "template"), ("tasks", 1, "template"), ("template",),
    ]  # fmt: skip


def test_who_keeps_turns() -> None:
    assert all(map(keeps_turns, ("chat", "chat: x", "{{ messages[0].content }}")))
    assert not any(map(keeps_turns, ("superni", "{{ input }}")))
    assert [chat_system(each) for each in ("chat", "chat: Be brief.", "superni", "{{ input }}")] == [
        "", "Be brief.", None, None,
    ]  # fmt: skip


def test_jinja_text_reaches_nothing_but_its_row() -> None:
    for text in ("{{ input.__class__.__mro__ }}", "{{ ''.__class__ }}{{ input }}", "{{ messages.append(1) }}"):
        assert template_fault(text) is None
        with pytest.raises(Exception, match=r"unsafe|undefined"):
            compiled(text).render(input="a", messages=[])


def test_a_template_in_a_line() -> None:
    assert told("superni") == "superni"
    assert told("chat: Be brief.") == "chat: Be brief."
    assert told("{{ definition }}\n\n{{ input }}") == "Jinja '{{ definition }} {{ input }}'"
    assert len(told("{{ input }}" * 99)) < 80
