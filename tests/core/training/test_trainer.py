"""One task's loop: its step against a naive one, resuming to the bit, and independence of batches."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sapt_core.data.collate import Collator, Sharing, epoch_batches
from sapt_core.pool.calls import Call
from sapt_core.pool.model import SaptModel
from sapt_core.settings import TrainConfig
from sapt_core.training.objective import Objective
from sapt_core.training.reflection import Memory, Reflection, StoredQueries
from sapt_core.training.trainer import step_seed, train
from tests.core.tiny import PAD, KeptCheckpoints, random_rows, same_bits, sapt_model, trainable

T = TypeVar("T")

ROWS = random_rows(11)
SLOW = {"key": 0.05, "attention": 0.05}
FLOAT32 = {"precision": "float32", "learning_rate": 0.02, "batch_size": 4, "epochs": 2, "checkpoint_every_steps": 1}


def reflection(batch_size: int = 3, *, per_micro_batch: bool = False) -> Reflection:
    generator = torch.Generator().manual_seed(5)
    memories = [
        Memory(
            StoredQueries(torch.randn(size, 16, generator=generator)),
            torch.randn(index + 1, generator=generator).softmax(dim=0),
        )
        for index, size in enumerate((6, 4))
    ]
    return Reflection(memories, batch_size, weight=0.7, per_micro_batch=per_micro_batch)


class OldWeight:
    """Half of each row's weight of the oldest block; a penalty that reaches the router."""

    weight = 0.5
    name = "old"

    def per_row(self, model: SaptModel, call: Call) -> Tensor:
        return call.weights[:, 0]


def with_both() -> Objective:
    return Objective((reflection(),), penalties=(OldWeight(),))


def learn(
    model: SaptModel,
    *,
    objective: Objective | None = None,
    checkpoints: KeptCheckpoints | None = None,
    score_dev: Callable[[], float] | None = None,
    rows: list[dict[str, list[int]]] = ROWS,
    **changes: Any,
) -> list[dict[str, float]]:
    return train(
        model,
        rows,
        Collator(PAD, model.is_encoder_decoder),
        TrainConfig(**{**FLOAT32, **changes}),
        seed=3,
        objective=objective or Objective((reflection(),)),
        checkpoints=checkpoints or KeptCheckpoints(),
        score_dev=score_dev,
    )


def assert_same(left: SaptModel, right: SaptModel, *, atol: float = 1e-5) -> None:
    other = trainable(right)
    for name, value in trainable(left).items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=atol, msg=name)


def naive_training(
    model: SaptModel,
    objective: Objective,
    *,
    rate: float,
    clip: float | None,
    decay: float = 0.0,
    falls: bool = False,
    micro_batch_size: int = 4,
) -> list[dict[str, float]]:
    """Row by row, token by token, with the published AdamW update; dropout off."""
    parameters = {name: p for name, p in model.pool.named_parameters() if p.requires_grad}
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}
    lengths = [len(row["prompt_ids"]) + len(row["answer_ids"]) for row in ROWS]
    curve = []
    order = [batch for epoch in range(2) for batch in epoch_batches(lengths, 4, 3, epoch)]
    held = objective.hold * len(order)
    for number, batch in enumerate(order):
        model.pool.hold = max(0.0, 1 - number / held) if held else 0.0
        tokens = sum(len(ROWS[i]["answer_ids"]) for i in batch)
        cross_entropy, gates = torch.zeros(()), []
        for i in batch:
            row = Collator(PAD, model.is_encoder_decoder)([ROWS[i]])
            (logits,), call = model.run(row)
            gates.append(float(call.weights[0, -1].detach()))
            answer = ROWS[i]["answer_ids"]
            for offset, token in enumerate(answer):
                cross_entropy = cross_entropy - torch.log_softmax(logits[offset], dim=-1)[token] / tokens
        divergence = torch.zeros(())
        for term in objective.terms:
            draw = torch.Generator().manual_seed(step_seed(3, "reflection", number))
            for _ in range(-(-len(batch) // micro_batch_size) if term.per_micro_batch else 1):
                divergence = divergence + term.value(model, term.draw(draw))
        weight = objective.terms[0].weight if objective.terms else 0.0
        loss = cross_entropy + weight * divergence
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        norm = torch.sqrt(sum((g**2).sum() for g in gradients.values()))
        if clip is not None and norm > clip:
            gradients = {name: g * clip / (norm + 1e-6) for name, g in gradients.items()}
        step = number + 1
        with torch.no_grad():
            for name, parameter in parameters.items():
                is_block = name.startswith("blocks.")
                own_rate = rate if is_block else rate * objective.rates.get("key", 1)
                own_rate *= (len(order) - number) / len(order) if falls else 1
                first[name] = 0.9 * first[name] + 0.1 * gradients[name]
                second[name] = 0.999 * second[name] + 0.001 * gradients[name] ** 2
                parameter.mul_(1 - own_rate * decay)
                corrected = second[name].sqrt() / (1 - 0.999**step) ** 0.5 + 1e-8
                parameter.sub_(own_rate * first[name] / (1 - 0.9**step) / corrected)
        curve.append(
            {
                "step": step,
                "loss": cross_entropy.item(),
                **({"kl": divergence.item()} if objective.terms else {}),
                "gate": sum(gates) / len(gates),
            }
        )
    model.pool.hold = 0.0
    return curve


@pytest.mark.parametrize("name", ["t5", "llama"])
@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        (Objective((reflection(),)), {}),
        (Objective(), {"max_grad_norm": None}),
        (Objective((reflection(),), SLOW, hold=0.5), {"max_grad_norm": 0.05, "weight_decay": 0.1}),
        (Objective((reflection(),), SLOW), {"schedule": "linear"}),
        (Objective((reflection(per_micro_batch=True),)), {"micro_batch_size": 2}),
    ],
)
def test_training_equals_a_naive_loop(name: str, objective: Objective, changes: dict[str, Any]) -> None:
    model, naive = sapt_model(name), sapt_model(name)
    curve = learn(model, objective=objective, **changes)
    wanted = naive_training(
        naive,
        objective,
        rate=0.02,
        clip=changes.get("max_grad_norm", 1.0),
        decay=changes.get("weight_decay", 0.0),
        falls=changes.get("schedule") == "linear",
        micro_batch_size=changes.get("micro_batch_size", 4),
    )
    assert [entry["step"] for entry in curve] == [1, 2, 3, 4, 5, 6]
    for given, entry in zip(curve, wanted, strict=True):
        assert given == pytest.approx(entry, rel=2e-3, abs=1e-4)
    # Adam divides by the gradient's size, so noise of 1e-7 in a gradient near zero is a step of up to the rate.
    assert_same(model, naive, atol=5e-3)
    moved = max(float((trainable(model)[n] - v).abs().max()) for n, v in trainable(sapt_model(name)).items())
    assert moved > 0.05


def test_a_penalty_is_the_mean_over_the_rows_of_a_step() -> None:
    """Its value, and that its gradient moves what is trained: with a great weight it falls."""
    model = sapt_model("t5")
    heavy = OldWeight()
    heavy.weight = 50.0
    curve = learn(model, objective=Objective(penalties=(heavy,)), epochs=6)
    fresh = sapt_model("t5")
    lengths = [len(row["prompt_ids"]) + len(row["answer_ids"]) for row in ROWS]
    first = epoch_batches(lengths, 4, 3, 0)[0]
    with torch.no_grad():
        _, call = fresh.run(Collator(PAD, is_encoder_decoder=True)([ROWS[i] for i in first]))
    assert curve[0]["old"] == pytest.approx(call.weights[:, 0].mean().item(), rel=1e-4)
    assert curve[-1]["old"] < 0.5 * curve[0]["old"]


def test_it_learns() -> None:
    curve = learn(sapt_model("llama"), objective=Objective(), epochs=40)
    assert curve[-1]["loss"] < 0.5 * curve[0]["loss"]


@pytest.mark.parametrize("name", ["t5", "llama"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_gradient_accumulation_changes_nothing(name: str, size: int) -> None:
    whole, parts = sapt_model(name), sapt_model(name)
    curve = learn(whole, objective=with_both(), epochs=1)
    split = learn(parts, objective=with_both(), epochs=1, micro_batch_size=size)
    assert all(0 < entry["old"] < 1 for entry in curve)
    for given, entry in zip(split, curve, strict=True):
        assert given == pytest.approx(entry, rel=1e-4, abs=1e-5)
    assert_same(whole, parts, atol=1e-4)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    # Dropout too: recomputed layers must see the same mask and the same weights.
    plain = sapt_model(name, backbone_dropout=0.1, lora_dropout=0.1)
    saving = sapt_model(name, backbone_dropout=0.1, lora_dropout=0.1)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    curve = learn(plain, epochs=1)
    saving.pool.blocks.sites[0].register_forward_hook(count)
    for given, entry in zip(learn(saving, epochs=1, gradient_checkpointing=True), curve, strict=True):
        assert given == pytest.approx(entry)
    assert calls == 2 * len(curve) + 1  # every layer did run a second time, and at the end once
    assert_same(plain, saving)
    assert not saving.backbone.is_activation_checkpointing
    assert not [module for module in saving.backbone.modules() if module._forward_hooks]


def test_the_frozen_stay_frozen() -> None:
    model = sapt_model("t5")
    learnt = set(trainable(model))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learn(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"pool.{name}" for name in learnt}


def test_the_new_block_is_let_go_linearly() -> None:
    model = sapt_model("t5")
    held: list[float] = []
    model.backbone.register_forward_pre_hook(lambda *_: held.append(model.pool.hold))
    curve = learn(model, objective=Objective(hold=0.5), epochs=4)
    # And once more at the end, to see that what was learnt has a loss.
    assert held == pytest.approx([1 - step / 6 if step < 6 else 0.0 for step in range(13)])
    assert curve[0]["gate"] == pytest.approx(1.0)
    assert model.pool.hold == 0.0


def test_the_best_dev_weights_are_kept_and_the_first_of_equals() -> None:
    model = sapt_model("t5")
    seen: list[dict[str, Tensor]] = []
    scores = iter([1.0, 5.0, 5.0, 2.0])

    def score() -> float:
        assert not model.training
        seen.append(trainable(model))
        return next(scores)

    curve = learn(model, score_dev=score, eval_every_epochs=1, epochs=3.5)
    assert [(entry["step"], entry["dev"]) for entry in curve if "dev" in entry] == [(3, 1), (6, 5), (9, 5), (10, 2)]
    assert same_bits(trainable(model), seen[1])
    assert not model.training


def test_bfloat16_autocast_runs_and_stays_near() -> None:
    plain, rough = sapt_model("t5"), sapt_model("t5")
    curve = learn(plain, epochs=1)
    autocast = learn(rough, epochs=1, precision="bfloat16")
    assert autocast[0]["loss"] == pytest.approx(curve[0]["loss"], rel=0.05)
    assert autocast[0]["loss"] != curve[0]["loss"]
    assert {value.dtype for value in trainable(rough).values()} == {torch.float32}


def stochastic_model() -> SaptModel:
    return sapt_model("t5", backbone_dropout=0.1, lora_dropout=0.2)


def deterministic_score(model: SaptModel) -> float:
    """A dev score that goes up and down with the weights, so that the best one lies in the middle."""
    total = sum(float(value.double().abs().sum()) for value in trainable(model).values())
    return (total * 997) % 1


def run_stochastic(model: SaptModel, checkpoints: Any, **changes: Any) -> list[dict[str, float]]:
    return learn(
        model,
        objective=Objective((reflection(),), {"key": 0.5, "attention": 0.5}, hold=0.5),
        checkpoints=checkpoints,
        score_dev=lambda: deterministic_score(model),
        eval_every_epochs=1,
        epochs=4,
        micro_batch_size=2,
        **changes,
    )


def test_a_run_resumed_from_any_checkpoint_equals_the_uninterrupted_one_bit_for_bit() -> None:
    whole, kept = stochastic_model(), KeptCheckpoints()
    curve = run_stochastic(whole, kept)
    assert len(curve) == 12
    assert len(kept.kept) == 11
    scores = [entry["dev"] for entry in curve if "dev" in entry]
    assert max(scores) != scores[-1]  # the weights that are kept are not the last ones
    for number in range(len(kept.kept)):
        torch.manual_seed(1000 + number)  # whatever happened in the process before
        resumed = stochastic_model()
        assert run_stochastic(resumed, KeptCheckpoints(kept.kept[: number + 1])) == curve
        assert same_bits(trainable(resumed), trainable(whole))


def test_checkpoints_are_safetensors_and_json_of_the_trainable_part_alone() -> None:
    kept, model = KeptCheckpoints(), sapt_model("t5")
    learn(model, checkpoints=kept, checkpoint_every_steps=2)
    assert [json.loads(files["state.json"])["step"] for files in kept.kept] == [2, 4]
    assert set(kept.kept[0]) == {"state.safetensors", "state.json"}
    size = sum(value.numel() for value in trainable(model).values()) * 4
    assert len(kept.kept[0]["state.safetensors"]) < 3 * size + 20_000


class FolderCheckpoints:
    """Checkpoints of a process that may be killed at any time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, read: Callable[[Path], T]) -> T | None:
        done = sorted(self.folder.glob("[0-9]*"))
        return read(done[-1]) if done else None

    def save(self, write: Callable[[Path], None]) -> None:
        partial = self.folder / "partial"
        partial.mkdir(parents=True, exist_ok=True)
        write(partial)
        partial.rename(self.folder / f"{len(list(self.folder.glob('[0-9]*'))):04d}")


def killed_run(folder: Path, kill_at: int) -> None:
    """Body of the process that kills itself in the forward of step ``kill_at`` (-1: never)."""
    torch.set_num_threads(1)
    model, forwards = stochastic_model(), 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    model.pool.blocks.sites[3].register_forward_hook(count)
    curve = run_stochastic(model, FolderCheckpoints(folder), checkpoint_every_steps=3)
    save_file(trainable(model), folder / "final.safetensors")
    (folder / "curve.json").write_text(json.dumps(curve))


@pytest.mark.chaos
def test_a_killed_process_goes_on_where_it_stopped(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from tests.core.training.test_trainer import killed_run; "
    code += "killed_run(Path(sys.argv[1]), int(sys.argv[2]))"
    root = Path(__file__).resolve().parents[3]

    def start(kill_at: int) -> int:
        command = [sys.executable, "-c", code, str(tmp_path), str(kill_at)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        return subprocess.run(command, cwd=root, env=environment, check=False, timeout=480).returncode

    assert start(15) == -signal.SIGKILL  # two micro-batches a step: in step 8, behind the checkpoint of step 6
    assert len(list(tmp_path.glob("0*"))) == 2
    assert not (tmp_path / "final.safetensors").exists()
    assert start(-1) == 0
    whole = stochastic_model()
    curve = run_stochastic(whole, KeptCheckpoints())
    assert json.loads((tmp_path / "curve.json").read_text()) == curve
    assert same_bits(load_file(tmp_path / "final.safetensors"), trainable(whole))


@pytest.mark.parametrize("together", ["alike", "alone"])
@pytest.mark.parametrize("name", ["t5", "llama"])
def test_rows_that_may_not_share_a_forward_are_learnt_all_the_same(name: str, together: Any) -> None:
    rows = [*ROWS, *ROWS[:5]]  # some of one length
    plain, kept_apart = sapt_model(name), sapt_model(name)
    kept_apart.sharing = Sharing(training=together)
    lengths: list[set[tuple[int, ...]]] = []
    inner = kept_apart.run

    def watched(batch: Any) -> Any:
        assert batch.attention_mask.all()
        lengths.append(set(batch.input_ids.shape[:1]))
        return inner(batch)

    kept_apart.run = watched  # type: ignore[method-assign]
    curves = [learn(model, rows=rows, objective=with_both(), batch_size=16) for model in (plain, kept_apart)]
    assert_same(plain, kept_apart, atol=1e-4)
    for one, other in zip(*curves, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    assert (max(max(each) for each in lengths) > 1) is (together == "alike")
