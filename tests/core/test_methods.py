"""Every method on a tiny sequence: what it keeps, its own terms against naive formulas, and how one is added."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from sapt_core.blocks.lora import LoRABlocks
from sapt_core.collate import Collator
from sapt_core.config import ExperimentConfig
from sapt_core.errors import SnapshotError
from sapt_core.memory import choose, unpack
from sapt_core.methods import lfpt5
from sapt_core.methods.am_lora import GatedBlocks, GatedSite
from sapt_core.methods.base import Lesson, Method, Plan, find_method, known_methods
from sapt_core.methods.ewc import EWC, PARTS, Springs, diagonal_fisher
from sapt_core.methods.l2p import KeyedPrompts
from sapt_core.methods.o_lora import Orthogonality
from sapt_core.model import SaptModel
from sapt_core.pool import new_pool
from sapt_core.settings import FullConfig, LoRAConfig, PETConfig, PromptConfig, ReflectionConfig, TrainConfig
from sapt_core.snapshot import Manifest, export_block, load_pool
from sapt_core.trainer import Objective
from tests.core.lessons import TRAIN, learn, sequence
from tests.core.tiny import (
    PAD,
    T5_NAMES,
    DictStore,
    KeptCheckpoints,
    fill,
    learnt_task,
    lora,
    random_rows,
    tiny_backbone,
    tiny_task,
    tiny_tokenizer,
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


def lesson(manifest: Manifest | None, number: int, store: DictStore, *, pet: PETConfig | None = None) -> Lesson:
    """The lesson of task ``number`` on top of a version, with a new block that is not trained yet."""
    backbone = tiny_backbone("t5")
    task = tiny_task(number)
    pool = fill(new_pool(backbone, pet or lora("t5"), None), 1)
    return Lesson(
        model=SaptModel(backbone, pool),
        tokenizer=tiny_tokenizer(),
        task=task,
        learnt=learnt_task(task),
        parent=manifest,
        kept=(),
        attention=None,
        reflection=ReflectionConfig(),
        train=TrainConfig(**TRAIN),
        seed=5,
        store=store,
    )


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
    assert model.generate(batch, max_new_tokens=4, do_sample=False, pad_token_id=PAD).shape[0] == 3
    model.detach()
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


def test_an_oracle_asks_for_the_task() -> None:
    store = DictStore()
    versions = sequence(store, method="per_task")
    backbone = tiny_backbone("t5")
    for index, task in enumerate(("task0", "task1", "task2")):
        pool = load_pool(versions[-1], store, backbone, task)
        block = load_tensors(store.get(versions[-1].blocks[index]))
        assert isinstance(pool.blocks, LoRABlocks)
        assert pool.blocks.count == 1
        name, site = next(pool.blocks.named_sites())
        assert torch.equal(site.frozen_A, block[f"base_model.model.{name}.lora_A.weight"])
    with pytest.raises(SnapshotError, match=r"only where the task is told, and none is named; it knows: task0, task1"):
        load_pool(versions[-1], store, backbone)
    with pytest.raises(SnapshotError, match="it has not learnt task9"):
        load_pool(versions[-1], store, backbone, "task9")
    unseen = {"suite": "synthetic", "tasks": ["animal"], "unseen": ["stock"]}
    with pytest.raises(ValueError, match=r"leave benchmark.unseen out"):
        ExperimentConfig.model_validate({**CONFIG, "benchmark": unseen, "method": {"name": "per_task"}})


def test_an_oracles_blocks_do_not_know_of_each_other() -> None:
    """Task 2 after two others is learnt from the same start, and to the same block, as beside others."""
    store = DictStore()
    versions = sequence(store, method="per_task")
    other = learn(store, 5 % 3, learn(store, 1, None, method="per_task")[0], method="per_task")[0]
    again = learn(store, 2, other, method="per_task")[0]
    assert again.blocks[-1] == versions[-1].blocks[-1]


def test_replay_learns_kept_rows_again() -> None:
    store = DictStore()
    versions = sequence(store, method={"name": "replay", "share": 0.3})
    memories = [unpack(store.get(versions[-1].state[f"memory {index:02d}"])) for index in range(3)]
    for index, memory in enumerate(memories):
        train = [list(ids) for ids in tiny_task(index).train["prompt_ids"]]
        assert len(memory) == 3
        assert all(row["prompt_ids"] in train for row in memory)
    method = find_method("replay").model_validate({"share": 0.3})
    rows = method.begin(lesson(versions[1], 2, store)).rows
    assert [row["prompt_ids"] for row in rows[10:]] == [row["prompt_ids"] for row in memories[0] + memories[1]]
    assert len(rows) == 16


def test_multi_task_starts_afresh_on_all_rows() -> None:
    store = DictStore()
    versions = sequence(store, method="multi_task")
    rows = find_method("multi_task")().begin(lesson(versions[1], 2, store)).rows  # type: ignore[call-arg]
    assert len(rows) == 30
    still = learn(store, 2, versions[1], method="multi_task", train={"learning_rate": 1e-12})[0]
    untrained = load_tensors(store.get(still.blocks[0]))
    assert all(value.abs().max() < 1e-9 for name, value in untrained.items() if "lora_B" in name)


def test_a_share_of_the_rows() -> None:
    rows = random_rows(20)
    assert len(choose(rows, 0.1, 0)) == 2
    assert len(choose(rows, 0.001, 0)) == 1
    assert choose(rows, 1, 3) == rows
    assert choose(rows, 0.5, 1) == choose(rows, 0.5, 1) != choose(rows, 0.5, 2)


def test_orthogonality_is_the_sum_over_pairs_of_rows() -> None:
    blocks = fill(new_pool(tiny_backbone("t5"), lora("t5"), None), 3)
    model = SaptModel(tiny_backbone("t5"), blocks)
    expected = 0.0
    assert isinstance(blocks.blocks, LoRABlocks)
    for _, site in blocks.blocks.named_sites():
        assert site.lora_A is not None
        for old in site.frozen_A.tolist():
            for new in site.lora_A.tolist():
                expected += abs(sum(a * b for a, b in zip(old, new, strict=True)))
    assert Orthogonality(1.0).value(model, None).item() == pytest.approx(expected, rel=1e-5)


def test_o_lora_adds_its_blocks_up() -> None:
    """Logits equal those of a backbone whose linears hold the sum of all updates."""
    pool = fill(new_pool(tiny_backbone("t5"), lora("t5"), None), 3)
    batch = Collator(PAD, is_encoder_decoder=True)(random_rows(4))
    with torch.no_grad():
        found = SaptModel(tiny_backbone("t5"), pool).eval()(batch)
        merged = tiny_backbone("t5")
        assert isinstance(pool.blocks, LoRABlocks)
        for name, site in pool.blocks.named_sites():
            assert site.lora_A is not None
            assert site.lora_B is not None
            A, B = torch.cat([site.frozen_A, site.lora_A]), torch.cat([site.frozen_B, site.lora_B], dim=1)
            merged.get_submodule(name).weight += site.scaling * B @ A  # type: ignore[operator]
        plain = SaptModel(merged, new_pool(merged, LoRAConfig(target_modules=("q",)), None)).eval()
        plain.pool.add()
        assert torch.allclose(found, plain(batch), atol=1e-5)


@pytest.mark.parametrize("gates", ["softmax", "sigmoid"])
def test_am_lora_mixes_by_the_features_of_its_loras(gates: Literal["softmax", "sigmoid"]) -> None:
    """Token by token and block by block, from the formula; the zero LoRA takes its share of the softmax."""
    torch.manual_seed(3)
    site = GatedSite(6, 5, LoRAConfig(r=2, lora_alpha=6))
    site.gates = gates
    parts = []
    for _ in range(3):
        block = {name: torch.randn(shape) for name, shape in site.shapes.items()}
        parts.append(block)
        site.append_frozen(block)
    x = torch.randn(2, 4, 6)
    expected, opened = torch.zeros(2, 4, 5), torch.zeros(2)
    for row in range(2):
        for place in range(4):
            updates = [3.0 * b["lora_B.weight"] @ b["lora_A.weight"] @ x[row, place] for b in parts]
            scores = []
            for block, update in zip(parts, updates, strict=True):
                score = float(block["selector.weight"] @ update + block["selector.bias"])
                scores.append(score if score > 0 else 0.2 * score)
            if gates == "softmax":
                total = 1 + sum(math.exp(score) for score in scores)
                shares = [math.exp(score) / total for score in scores]
            else:
                shares = [1 / (1 + math.exp(-score)) for score in scores]
            opened[row] += sum(shares) / 4
            for share, update in zip(shares, updates, strict=True):
                expected[row, place] += share * update
    site.train()
    found = site(x, torch.ones(2, 3), torch.arange(3))
    assert torch.allclose(found, expected, atol=1e-5)
    assert site.opened is not None
    assert torch.allclose(site.opened, opened, atol=1e-5)


def test_am_loras_penalty_does_not_depend_on_micro_batches() -> None:
    curves = []
    for size in (None, 1):
        store = DictStore()
        first, _ = learn(store, 0, None, method={"name": "am_lora", "sparsity": 0.5})
        train = {"micro_batch_size": size}
        # Rows of one length: padding, which a batch decides, takes part in the mean over positions.
        curves.append(learn(store, 1, first, method={"name": "am_lora", "sparsity": 0.5}, train=train)[1])
    whole, pieces = curves
    assert all(entry["sparsity"] > 0.3 for entry in whole)
    assert [entry["loss"] for entry in whole] == pytest.approx([entry["loss"] for entry in pieces], rel=1e-2)


def test_sparsity_closes_gates() -> None:
    def opened(weight: float) -> float:
        method = {"name": "am_lora", "sparsity": weight}
        curve = learn(DictStore(), 0, None, method=method, train={"epochs": 8})[1]
        return curve[-1]["sparsity"]

    assert opened(30.0) < opened(1e-6) - 0.05


def test_a_new_lora_starts_without_changing_anything() -> None:
    store = DictStore()
    first, _ = learn(store, 0, None, method="am_lora")
    backbone = tiny_backbone("t5")
    pool = load_pool(first, store, backbone)
    pool.add()
    batch = Collator(PAD, is_encoder_decoder=True)(random_rows(4))
    assert isinstance(pool.blocks, GatedBlocks)
    for _, site in pool.blocks.named_sites():
        site.frozen_B.zero_()
    with torch.no_grad():
        model = SaptModel(backbone, pool).eval()
        found = model(batch)
        model.detach()
        bare = SaptModel(backbone, new_pool(backbone, lora("t5"), None)).eval()
        bare.pool.add()
        assert torch.allclose(found, bare(batch), atol=1e-6)


def test_fisher_information_is_the_mean_squared_gradient() -> None:
    taught = lesson(None, 0, DictStore())
    rows = taught.rows[:3]
    found = diagonal_fisher(taught, rows)
    model = taught.model
    collator = Collator(PAD, is_encoder_decoder=True)
    expected: dict[str, Tensor] = {}
    for row in rows:
        batch = collator([row])
        assert batch.labels is not None
        model.zero_grad()
        logits = model(batch).log_softmax(-1)[0]
        loss = -sum(logits[place, token] for place, token in enumerate(batch.labels[0].tolist()))
        loss.backward()  # type: ignore[union-attr]
        for name, value in model.pool.blocks.named_parameters():
            assert value.grad is not None
            expected[name] = expected.get(name, torch.zeros_like(value)) + value.grad**2 / 3
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-8) for name in found)


def test_the_springs_of_all_tasks_are_one() -> None:
    """Up to a constant, the kept sums give λ/2 Σ_i Σ F_i (θ - θ_i)², so also its gradient."""
    model = SaptModel(tiny_backbone("t5"), fill(new_pool(tiny_backbone("t5"), lora("t5"), None), 1))
    parameters = dict(model.pool.blocks.named_parameters())
    torch.manual_seed(0)
    tasks = [
        (
            {n: torch.rand_like(v) for n, v in parameters.items()},
            {n: torch.randn_like(v) for n, v in parameters.items()},
        )
        for _ in range(3)
    ]
    stiffness = {name: sum(fisher[name] for fisher, _ in tasks) for name in parameters}
    pull = {name: sum(fisher[name] * at[name] for fisher, at in tasks) for name in parameters}
    springs = Springs(1.0, stiffness, pull)  # type: ignore[arg-type]

    def naive() -> Tensor:
        parts = [(f[n] * (parameters[n] - at[n]) ** 2).sum() for f, at in tasks for n in parameters]
        return 0.5 * torch.stack(parts).sum()

    constant = (springs.value(model, None) - naive()).item()
    gradients = torch.autograd.grad(springs.value(model, None), list(parameters.values()))
    expected = torch.autograd.grad(naive(), list(parameters.values()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients, expected, strict=True))
    with torch.no_grad():
        for value in parameters.values():
            value.add_(torch.randn_like(value))
    assert (springs.value(model, None) - naive()).item() == pytest.approx(constant, rel=1e-3, abs=1e-2)


def test_ewc_keeps_two_numbers_a_parameter() -> None:
    store = DictStore()
    versions = sequence(store, method={"name": "ewc", "fisher_rows": 4})
    kept = [load_tensors(store.get(version.state["fisher"])) for version in versions]
    assert [len(each) for each in kept] == [2 * len(load_tensors(store.get(versions[0].blocks[0])))] * 3
    for name in kept[0]:
        if name.startswith(PARTS[0]):
            assert (kept[1][name] >= kept[0][name]).all()
            assert (kept[2][name] >= kept[1][name]).all()

    def moved(penalty: float) -> float:
        first, second, _ = sequence(store, method={"name": "ewc", "penalty": penalty, "fisher_rows": 4})
        blocks = [load_tensors(store.get(version.blocks[0])) for version in (first, second)]
        return sum((blocks[1][name] - blocks[0][name]).norm().item() for name in blocks[0])

    assert moved(1e9) < 0.75 * moved(1e-9)
    with pytest.raises(ValueError, match="greater than 0"):
        EWC(penalty=0)


def test_full_fine_tuning_trains_every_weight_and_gives_the_backbone_back() -> None:
    store = DictStore()
    versions = sequence(store, method="sequential", pet=FullConfig())
    backbone = tiny_backbone("t5")
    first = load_tensors(store.get(versions[0].blocks[0]))
    assert {name: tuple(value.shape) for name, value in first.items()} == {
        name: tuple(value.shape) for name, value in backbone.named_parameters()
    }
    batch = Collator(PAD, is_encoder_decoder=True)(random_rows(4))
    with torch.no_grad():
        model = SaptModel(backbone, load_pool(versions[0], store, backbone)).eval()
        found = model(batch)
        model.detach()
        loaded = tiny_backbone("t5", seed=7)
        loaded.load_state_dict(first, strict=False)
        plain = SaptModel(loaded, new_pool(loaded, LoRAConfig(target_modules=("q",)), None)).eval()
        plain.pool.add()
        assert torch.allclose(found, plain(batch), atol=1e-5)
    with pytest.raises(SnapshotError, match="no PEFT adapter"):
        export_block(versions[0], 0, store, Path("unused"))


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


def test_prog_prompt_puts_the_newest_prompt_first() -> None:
    store = DictStore()
    pet = PromptConfig(length=3)
    last = sequence(store, method="prog_prompt", pet=pet)[-1]
    backbone = tiny_backbone("t5")
    parts = [load_tensors(store.get(digest))["prompt_embeddings"] for digest in last.blocks]
    for task in range(3):
        blocks = load_pool(last, store, backbone, f"task{task}").blocks
        expected = torch.cat(parts[: task + 1][::-1])
        assert torch.equal(blocks.prompts(torch.ones(2, task + 1), torch.empty(2, 16))[1], expected)  # type: ignore[index]
    untold = sequence(store, method={"name": "prog_prompt", "told": False}, pet=pet)[-1]
    assert load_pool(untold, store, backbone).blocks.prompts(torch.ones(2, 3), torch.empty(2, 16)).shape == (2, 9, 16)  # type: ignore[union-attr]
    assert find_method("prog_prompt").model_validate({}).soft_tokens(3, 15) == 45


def test_l2p_picks_the_prompts_of_the_nearest_keys() -> None:
    backbone = tiny_backbone("t5")
    method = find_method("l2p").model_validate({"pool_size": 4, "top_n": 2})
    blocks = method.blocks(backbone, PromptConfig(length=3))
    assert isinstance(blocks, KeyedPrompts)
    torch.manual_seed(1)
    blocks.add()
    pooled = torch.randn(5, 16)
    found = blocks.prompts(torch.ones(5, 1), pooled)
    state = blocks.current_state()
    assert blocks.distance is not None
    for row in range(5):
        query = (pooled[row] - blocks.centre).tolist()
        cosines = []
        for key in state["prompt_keys"].tolist():
            dot = sum(a * b for a, b in zip(query, key, strict=True))
            cosines.append(dot / math.sqrt(sum(a * a for a in query) * sum(b * b for b in key)))
        best = sorted(range(4), key=lambda index: -cosines[index])[:2]
        assert torch.equal(found[row], torch.cat([state["prompt_embeddings"][index] for index in best]))
        assert blocks.distance[row].item() == pytest.approx(1 - sum(cosines[i] for i in best) / 2, abs=1e-5)
    with pytest.raises(ValueError, match=r"top_n=5 prompts cannot be picked from pool_size=4"):
        find_method("l2p").model_validate({"pool_size": 4})


def test_l2p_trains_keys_and_picked_prompts_alone() -> None:
    store = DictStore()
    method = {"name": "l2p", "pool_size": 4, "top_n": 1, "pull": 5.0}
    first, curve = learn(store, 0, None, method=method, pet=PromptConfig(length=2), train={"epochs": 6})
    assert curve[-1]["pull"] < curve[0]["pull"]
    second, _ = learn(store, 1, first, method=method, pet=PromptConfig(length=2))
    before, after = (load_tensors(store.get(each.blocks[0]))["prompt_embeddings"] for each in (first, second))
    moved = [(before[index] != after[index]).any().item() for index in range(4)]
    assert any(moved)
    assert not all(moved)


def test_lfpt5_replays_what_its_block_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model cannot write; what is done with clean samples is looked at with given ones."""
    asked: list[list[int]] = []

    def given(model: SaptModel, tokenizer: object, source: list[int], **rest: object) -> tuple[dict[str, str], object]:
        asked.append(list(source))
        return {"w1 w2": "w1", "w3": "w3"}, {}

    monkeypatch.setattr(lfpt5, "sample", given)
    store = DictStore()
    first, _ = learn(store, 0, None, method="lfpt5")
    taught = lesson(first, 1, store)
    method = find_method("lfpt5").model_validate({"share": 0.2})
    plan = method.begin(taught)
    assert [list(row["answer_ids"]) for row in plan.rows[10:]] == [
        taught.tokenizer(text)["input_ids"] for text in ("w1", "w3")
    ]
    prompt = taught.tokenizer.decode(plan.rows[10]["prompt_ids"])
    assert "w30" in prompt  # the earlier task's definition
    assert "w1 w2" in prompt
    assert len(asked) == 1
    writing, consistency = plan.objective.terms
    assert isinstance(writing, lfpt5.WritingTerm)
    assert isinstance(consistency, lfpt5.ConsistencyTerm)
    assert len(writing.rows) == 12
    assert writing.rows[-1]["prompt_ids"] == asked[0]
    assert consistency.value(taught.model.eval(), [0, 1]).item() == pytest.approx(0, abs=1e-5)
    pool = taught.model.pool
    pool.blocks.load_current({name: value + 0.1 for name, value in pool.blocks.current_state().items()})
    expected, tokens = 0.0, 0
    with torch.no_grad():
        for row, before in zip(consistency.rows, consistency.before, strict=True):
            now = taught.model(Collator(PAD, is_encoder_decoder=True)([row]))[0]
            for place in range(len(row["answer_ids"])):
                p, q = before[place].softmax(-1), now[place].softmax(-1)
                expected += float(
                    sum(a * (math.log(a) - math.log(b)) for a, b in zip(p.tolist(), q.tolist(), strict=True))
                )
                tokens += 1
    assert consistency.value(taught.model, [0, 1]).item() == pytest.approx(expected / tokens, rel=1e-3)
