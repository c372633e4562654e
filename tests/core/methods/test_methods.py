"""Every method on a tiny sequence: learnt, kept, resumed, asked; and how one is added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from sapt_core.config.experiment import ExperimentConfig
from sapt_core.data.collate import Collator
from sapt_core.errors import SnapshotError
from sapt_core.methods.base import Lesson, Method, Plan, find_method, known_methods
from sapt_core.pool.model import SaptModel
from sapt_core.settings import FullConfig, PETConfig, PromptConfig
from sapt_core.training.objective import Objective
from sapt_core.versions.loading import load_pool
from sapt_core.versions.manifest import Manifest
from tests.core.lessons import learn, sequence
from tests.core.tiny import (
    PAD,
    T5_NAMES,
    DictStore,
    KeptCheckpoints,
    lora,
    random_rows,
    tiny_backbone,
)

CASES = [
    pytest.param(method, kind, name, id=f"{method}-{kind}-{name}")
    for method, found in known_methods().items()
    for kind in found.pet_types
    for name in ("t5", "llama")
]
# Where the defaults are made for models of billions of parameters.
OPTIONS: Mapping[str, dict[str, Any]] = {
    "lfpt5": {"max_tokens": 16},
    "seekr": {"share": 0.3, "layers": 2, "heads": 3, "queries": 4},
}
KINDS: Mapping[str, PETConfig] = {"prompt": PromptConfig(length=3), "full": FullConfig()}


@pytest.mark.parametrize(("method", "kind", "name"), CASES)
def test_every_method_learns_a_sequence_and_answers_from_its_versions(method: str, kind: str, name: str) -> None:
    store = DictStore()
    pet = lora(name) if kind == "lora" else KINDS[kind]
    options = {"name": method, **OPTIONS.get(method, {})}
    versions = sequence(store, method=options, name=name, pet=pet)
    found = find_method(method)
    last = versions[-1]
    assert [task.name for task in last.tasks] == ["task0", "task1", "task2"]
    assert len(last.blocks) == (3 if found.pool == "block per task" else 1)
    assert Manifest.from_bytes(last.to_bytes()) == last
    backbone = tiny_backbone(name)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    batch = Collator(PAD, name in T5_NAMES).prompts(random_rows(3))
    model = SaptModel(backbone, load_pool(last, store, backbone, "task1")).eval()
    assert model.generate(batch, max_new_tokens=4, do_sample=False, pad_token_id=PAD)[0].shape[0] == 3
    after = backbone.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("method", sorted(known_methods()))
def test_every_method_resumes_to_the_same_version(method: str) -> None:
    """The second task, broken off after each of its checkpoints."""
    kind = find_method(method).pet_types[0]
    pet = lora("t5") if kind == "lora" else KINDS[kind]
    store = DictStore()
    options = {"name": method, **OPTIONS.get(method, {})}
    train = {"epochs": 2, "checkpoint_every_steps": 2}
    first, _ = learn(store, 0, None, method=options, pet=pet)
    checkpoints = KeptCheckpoints()
    whole, _ = learn(store, 1, first, method=options, pet=pet, train=train, checkpoints=checkpoints)
    assert checkpoints.kept
    for count in range(1, len(checkpoints.kept) + 1):
        resumed = KeptCheckpoints(checkpoints.kept[:count])
        assert learn(store, 1, first, method=options, pet=pet, train=train, checkpoints=resumed)[0] == whole


class Toy(Method):
    """Pulls the current block to zero and counts its tasks: everything a method can do, in one class."""

    name: Literal["toy"] = "toy"
    strength: float = 2.0
    pool: ClassVar[Literal["block per task"]] = "block per task"

    def begin(self, lesson: Lesson) -> Plan:
        return Plan(lesson.rows[:6], Objective((Shrink(self.strength),)))

    def end(self, lesson: Lesson) -> Mapping[str, bytes]:
        return {"count": str(int(lesson.state("count") or b"0") + 1).encode()}


class Shrink:
    name = "shrink"
    per_micro_batch = False
    runs_rows = False

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def draw(self, generator: torch.Generator) -> None:
        return None

    def value(self, model: SaptModel, drawn: None) -> Tensor:
        return torch.stack([value.square().sum() for value in model.pool.parameters() if value.requires_grad]).sum()

    def to(self, device: torch.device) -> Shrink:
        return self


CONFIG = {"benchmark": {"suite": "synthetic"}, "backbone": {"path": "x"}}


def test_a_method_is_one_class_and_nothing_else() -> None:
    store = DictStore()
    versions = sequence(store, method={"name": "toy", "strength": 3.0})
    assert [store.get(version.state["count"]) for version in versions] == [b"1", b"2", b"3"]
    _, curve = learn(store, 2, versions[1], method={"name": "toy", "strength": 3.0})
    assert len(curve) == 2
    assert all(entry["shrink"] > 0 for entry in curve)
    config = ExperimentConfig.model_validate({**CONFIG, "method": {"name": "toy", "strength": 4}})
    assert config.method == Toy(strength=4)
    assert config.model_dump(mode="json")["method"] == {"name": "toy", "strength": 4.0}
    with pytest.raises(SnapshotError, match=r"method.strength 1.0 \(was 3.0\)"):
        learn(store, 2, versions[1], method={"name": "toy", "strength": 1.0})


def test_kinds_of_block_that_a_method_does_not_work_with_are_refused() -> None:
    with pytest.raises(ValueError, match=r"method o_lora works with pet.type lora, not prompt"):
        ExperimentConfig.model_validate({**CONFIG, "method": {"name": "o_lora"}, "pet": {"type": "prompt"}})
    with pytest.raises(ValueError, match=r"method sapt works with pet.type lora or prompt, not full"):
        ExperimentConfig.model_validate({**CONFIG, "pet": {"type": "full"}})


def test_unknown_methods_name_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"there is no method 'o_lra'; did you mean o_lora\? known: am_lora, ewc, "):
        find_method("o_lra")


@pytest.mark.parametrize("method", sorted(known_methods()))
def test_every_method_says_what_it_is_and_what_its_options_mean(method: str) -> None:
    found = find_method(method)
    if found is Toy:
        return
    assert found.summary
    fields = {name: field for name, field in found.model_fields.items() if name != "name"}
    assert all(field.description or field.annotation == Literal[1] for field in fields.values())
