"""The fields of a config by their dotted names: which there are, and what their annotations say."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sapt_core.methods.base import Method, known_methods
from sapt_core.task_settings import NameList, TaskList


def kinds_of(field: FieldInfo) -> list[Any]:
    """The types that a value of the field may have: the members of a union, without what annotates them.

    A ``NameList`` or ``TaskList`` stays one, and of a method every known one is a kind.
    """
    return list(_members(field.rebuild_annotation()))


def _members(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        plain, *notes = get_args(annotation)
        # A field may say more of its names, such as how many there must be.
        listed = [each for each in (NameList, TaskList) if all(note in notes for note in get_args(each)[1:])]
        yield from listed or _members(plain)
    elif get_origin(annotation) in {Union, types.UnionType}:
        for member in get_args(annotation):
            yield from _members(member)
    elif annotation is Method:
        yield from known_methods().values()
    else:
        yield annotation


def sections_of(field: FieldInfo) -> list[type[BaseModel]]:
    """The kinds that are groups of fields themselves, also those in a list or mapping."""
    found = []
    for kind in kinds_of(field):
        listed = get_args(kind)[0] if kind is TaskList else kind
        inner = [kind] if isinstance(kind, type) else [part for part in get_args(listed) if isinstance(part, type)]
        found += [each for each in inner if issubclass(each, BaseModel)]
    return found


def is_text(field: FieldInfo) -> bool:
    """Whether a value is text, a path, one of several words, or names with commas between them."""

    def text(kind: Any) -> bool:
        words = get_args(kind) if get_origin(kind) is Literal else ()
        return kind in (str, Path, NameList, TaskList) or (bool(words) and all(isinstance(word, str) for word in words))

    kinds = [kind for kind in kinds_of(field) if kind is not types.NoneType]
    return bool(kinds) and all(map(text, kinds))


def may_be_none(field: FieldInfo) -> bool:
    """Whether null is a value of the field."""
    return types.NoneType in kinds_of(field)


def find(section: type[BaseModel], dotted: str) -> list[FieldInfo]:
    """What a dotted name may mean: one field of every kind of section on the way that has it; none if there is none."""
    sections, found = [section], list[FieldInfo]()
    for part in dotted.split("."):
        found = [each.model_fields[part] for each in sections if part in each.model_fields]
        sections = [each for field in found for each in sections_of(field)]
    return found
