"""What a task is in a config: where its rows are, and what they are called there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from sapt_core.metric_settings import MetricList
from sapt_core.template_settings import TemplateText

HUB_REVISION = r"^[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)*$"


def _names(value: Any) -> Any:
    """``a,b,c`` from a command line is the list [a, b, c], and so is ``["a, b", c]``, for names with commas."""
    if not isinstance(value, str):
        return value
    if not value.lstrip().startswith("["):
        return [part.strip() for part in value.split(",") if part.strip()]
    try:
        return yaml.load(value, Loader=yaml.BaseLoader)  # noqa: S506 - makes text of every value, and nothing else
    except yaml.YAMLError as error:
        raise ValueError('is no list: give a,b,c or ["a, b",c]') from error


NameList = Annotated[tuple[str, ...], BeforeValidator(_names, json_schema_input_type=str | tuple[str, ...])]
"""Names, from a command line with commas between them."""

HUB_ID = r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?"


class Section(BaseModel):
    """A frozen group of fields that refuses keys it does not know."""

    # A number that is none, or no bound on one, is never meant: a rate of .inf trains to nothing.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


class ColumnsConfig(Section):
    """What a data set calls its columns."""

    input: str | None = Field(None, description="Text to read; default: input, or else prompt.")
    output: str | None = Field(
        None, description="Right answer, or a list of them; default: output, or else answer. The first one is learnt."
    )
    definition: str | None = Field(None, description="The task's instruction, the same in all rows.")
    messages: str | None = Field(
        None,
        description="Turns of a chat with role and content, in the place of input and output; default: messages, "
        "where there is no input. The last assistant turn is the answer, what stands before it the input.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> ColumnsConfig:
        if self.messages is not None and (self.input is not None or self.output is not None):
            raise ValueError("messages holds input and output: leave these out, or it")
        return self


class SplitsConfig(Section):
    """What a data set calls its splits; of a folder also the file of each, or several as part-*.csv."""

    train: str = Field("train", min_length=1, description="Rows that are learnt.")
    dev: str | None = Field(
        None,
        min_length=1,
        description="Rows that weights are chosen on; default: a share of train. No split is taken for it by its name.",
    )
    test: str | None = Field(
        None, min_length=1, description="Rows that are scored; default: test, and a fifth of train where there is none."
    )


def _numbered(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return {str(number): name for number, name in enumerate(value)}
    if not isinstance(value, dict):
        return value
    return {json.dumps(label) if isinstance(label, bool) else str(label): name for label, name in value.items()}


LabelNames = Annotated[
    dict[str, str], BeforeValidator(_numbered, json_schema_input_type=tuple[str, ...] | dict[str, str])
]


class TaskDefaults(Section):
    """What tasks may have in common; each may say otherwise."""

    splits: SplitsConfig = Field(SplitsConfig(), description="What is learnt, and what scored.")
    columns: ColumnsConfig = Field(ColumnsConfig(), description="What is read, and what answered.")
    definition: str | None = Field(None, description="Instruction before every input; default: the data's own.")
    template: TemplateText | None = Field(None, description="Prompt; default: benchmark.template.")
    metric: MetricList | None = Field(
        None, description="Score, or several with the leading one first; default: benchmark.metric."
    )
    label_names: LabelNames | None = Field(
        None,
        min_length=1,
        description="Answers by label: a list, whose first name is label 0, or a mapping. Other labels are refused. "
        "Default: the names that the data itself has.",
    )


class TaskConfig(TaskDefaults):
    """One task: where its rows are, and how they are read."""

    name: str = Field(min_length=1, description="What the pool calls it.")
    path: str | None = Field(
        None,
        min_length=1,
        description="A file, a folder, or the id of a data set on the hub; default: benchmark.data_dir/name.",
    )
    config: str | None = Field(None, min_length=1, description="Of a data set that has several (a subset).")
    revision: str | None = Field(None, pattern=HUB_REVISION, description="Hub revision (commit, branch or tag).")

    @model_serializer(mode="wrap")
    def _written(self, written: SerializerFunctionWrapHandler) -> Any:
        """A task that is nothing but a folder is its name, as configs have always had it."""
        given = {name: value for name, value in written(self).items() if name in self.model_fields_set - {"name"}}
        return {"name": self.name, **given} if given else self.name


def _tasks(value: Any) -> Any:
    named = _names(value)
    if not isinstance(named, list | tuple):
        return named
    return [each if isinstance(each, dict | TaskConfig) else {"name": each} for each in named]


TaskList = Annotated[
    tuple[TaskConfig, ...], BeforeValidator(_tasks, json_schema_input_type=str | tuple[str | TaskConfig, ...])
]
"""Tasks, each by its name alone or as a mapping."""


class TasksFile(Section):
    """The tasks of a file, with what it says of all of them."""

    tasks_file: Path | None = None
    tasks: TaskList = ()
    defaults: TaskDefaults | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values: Any) -> Any:
        return told_in_full(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _each_is_somewhere(self) -> TasksFile:
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        nowhere = [task.name for task in self.tasks if task.path is None]
        if twice or nowhere:
            told = [f"named twice: {', '.join(twice)}"] if twice else []
            told += [f"without a path: {', '.join(nowhere)}"] if nowhere else []
            raise ValueError(f"tasks {'; '.join(told)}")
        return self


def told_in_full(values: Mapping[str, Any]) -> dict[str, Any]:
    """The raw section ``benchmark`` whose tasks have what ``tasks_file`` and ``defaults`` say of them.

    Raises:
        ValueError: the file cannot be read, or is none of tasks.
    """
    shared, known = tasks_of_file(Path(values["tasks_file"])) if values.get("tasks_file") else ({}, [])
    own = _raw(values.get("defaults"))
    if not isinstance(own, dict):
        return dict(values)
    shared = {**shared, **own}
    by_name = {task["name"]: task for task in known if isinstance(task, dict) and isinstance(task.get("name"), str)}

    def full(tasks: Any) -> Any:
        entries = _tasks(tasks)
        if not isinstance(entries, list):
            return tasks
        return [_over(shared, _over(by_name.get(each.get("name"), {}), each)) for each in map(_raw, entries)]

    tasks = known if values.get("tasks") is None and known else values.get("tasks")
    if not shared and not known:
        return dict(values)
    return {
        **values,
        **({} if tasks is None else {"tasks": full(tasks)}),
        **({"unseen": full(values["unseen"])} if values.get("unseen") else {}),
        **({"defaults": shared} if shared else {}),
    }


def tasks_of_file(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """Defaults and tasks that a YAML file holds, not validated.

    Raises:
        ValueError: it cannot be read, or is none of tasks.
    """
    # A served version has these sections, and no files of them.
    from omegaconf import OmegaConf  # noqa: PLC0415
    from omegaconf.errors import OmegaConfBaseException  # noqa: PLC0415

    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError as error:
        raise ValueError(f"tasks_file {path}: no such file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"tasks_file {path}: cannot be read: {' '.join(str(error).split())}") from error
    parts = content if isinstance(content, dict) else {"tasks": content}
    tasks, shared = parts.get("tasks"), parts.get("defaults") or {}
    if set(parts) - {"tasks", "defaults"} or not isinstance(tasks, list) or not tasks or not isinstance(shared, dict):
        raise ValueError(f"tasks_file {path}: holds no tasks: give a list of them, or tasks with defaults")
    return {str(name): value for name, value in shared.items()}, [
        each if isinstance(each, dict) else {"name": each} for each in tasks
    ]


def _raw(value: Any) -> Any:
    """What was given of a section, as a mapping."""
    if isinstance(value, BaseModel):
        return {name: getattr(value, name) for name in value.model_fields_set}
    return {} if value is None else value


def _over(below: Mapping[str, Any], task: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of a task over what is said of it elsewhere; of columns and splits each by itself."""
    parts = {
        name: {**_raw(below[name]), **_raw(task[name])}
        for name in ("columns", "splits")
        if isinstance(_raw(below.get(name)), dict) and isinstance(_raw(task.get(name)), dict)
        if name in below and name in task
    }
    known = {name: value for name, value in below.items() if name in TaskConfig.model_fields}
    return {**known, **task, **parts}
