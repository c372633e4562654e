"""Several workers learn what one does: in its step, in a short last batch, and in what one of them makes for all."""

from __future__ import annotations

import copy
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from sapt_core.data.collate import Collator
from sapt_core.errors import DivergenceError
from sapt_core.methods import lfpt5
from sapt_core.methods.base import find_method
from sapt_core.pool.model import SaptModel
from sapt_core.training.objective import Objective
from sapt_core.training.workers import shared
from tests.core import lessons
from tests.core.tiny import PAD, VOCABULARY, DictStore, random_rows, same_bits, sapt_model, trainable
from tests.core.training.test_divergence import Faulty
from tests.core.training.test_trainer import ROWS, learn, reflection, with_both

# In batches of four the last one of an epoch has a row for one worker only.
NINE = ROWS[:9]


def with_rows(model: SaptModel) -> Objective:
    """Two terms that run rows, of which one draws three and the other two."""
    rows, collator = tuple(random_rows(5, seed=8)), Collator(PAD, model.is_encoder_decoder)
    before = tuple(
        torch.randn(len(row["answer_ids"]), VOCABULARY, generator=torch.Generator().manual_seed(1)) for row in rows
    )
    return Objective(
        (lfpt5.WritingTerm(0.5, rows, collator, 3), lfpt5.ConsistencyTerm(0.3, rows, collator, 2, before), reflection())
    )


@dataclass(frozen=True)
class Case:
    """What is learnt both by one worker and by two; ``exact`` where nothing but rounding tells them apart."""

    backbone: str
    objective: Any = lambda _: with_both()
    micro_batch_size: int | None = None
    dropout: float = 0.0

    def run(self) -> tuple[SaptModel, list[dict[str, float]], int]:
        """The model, the curve, and the most rows that a forward of the backbone saw."""
        model, widest = sapt_model(self.backbone, backbone_dropout=self.dropout, lora_dropout=self.dropout), 0

        def count(_: Any, __: Any, given: dict[str, Any]) -> None:
            nonlocal widest
            widest = max(widest, len(given["input_ids"]))

        model.backbone.register_forward_pre_hook(count, with_kwargs=True)
        objective = self.objective(model)
        curve = learn(model, objective=objective, rows=NINE, epochs=1, micro_batch_size=self.micro_batch_size)
        return model, curve, widest


CASES = {
    "whole": Case("t5"),
    "one row at a time": Case("llama", micro_batch_size=1),
    "rows of terms": Case("t5", with_rows),
    "rows of terms, one at a time": Case("llama", with_rows, micro_batch_size=1),
    "a term in every micro-batch": Case(
        "t5", lambda _: Objective((reflection(per_micro_batch=True),)), micro_batch_size=1
    ),
    "dropout": Case("t5", with_rows, dropout=0.1),
}


def one_of_two(rank: int, port: int, folder: str) -> None:
    """Body of one gloo worker, named to it as torchrun and Ray Train do."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        model, curve, widest = case.run()
        save_file(trainable(model), Path(folder, f"{name}-{rank}.safetensors"))
        found[name] = {"curve": curve, "widest": widest}
    sent, send = 0, distributed._broadcast_coalesced

    def counted(group: Any, tensors: Sequence[Tensor], *rest: Any) -> None:
        nonlocal sent
        sent += sum(tensor.numel() for tensor in tensors)
        send(group, tensors, *rest)

    distributed._broadcast_coalesced = counted
    sized = sapt_model("t5")
    learn(sized, objective=Objective(), rows=NINE[:4], epochs=1)
    distributed._broadcast_coalesced = send
    learnt = sum(value.numel() for value in trainable(sized).values())
    pool = sum(value.numel() for value in sized.pool.state_dict().values())
    found["sent"] = {"tensors": sent, "learnt": learnt, "pool": pool}
    # Of what is made, one worker makes each and all have the same, although each would have made another.
    found["shared"] = shared(3, lambda index: [index, rank])
    found["lfpt5"] = rows_with_samples(rank)
    # A figure of one worker's own rows alone is no number.
    try:
        learn(sapt_model("t5"), objective=Objective(penalties=(Faulty(3 if rank else 99),)), rows=NINE)
    except DivergenceError as error:
        found["diverged"] = str(error)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def rows_with_samples(rank: int) -> list[list[int]]:
    """Rows that LFPT5 trains on after two tasks, where what is sampled differs from worker to worker."""
    lfpt5.sample = lambda *given, **rest: ({f"w{number}": "w1" for number in range(1 + rank)}, {})  # type: ignore[assignment]
    store = DictStore()
    versions = [lessons.learn(store, 0, None, method="lfpt5")[0]]
    versions.append(lessons.learn(store, 1, versions[0], method="lfpt5")[0])
    plan = find_method("lfpt5").model_validate({"share": 0.2}).begin(lessons.lesson(versions[1], 2, store))
    return [list(row["prompt_ids"]) for row in plan.rows]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What two workers left: the folder of their weights, and each one's figures."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(one_of_two, args=(port, str(folder)), nprocs=2)
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.dropout])
def test_two_workers_learn_what_one_does(two: tuple[Path, list[dict[str, Any]]], name: str) -> None:
    folder, figures = two
    alone, curve, _ = CASES[name].run()
    states = [load_file(folder / f"{name}-{rank}.safetensors") for rank in (0, 1)]
    assert same_bits(*states)
    both = copy.deepcopy(trainable(alone))
    for parameter, value in states[0].items():
        torch.testing.assert_close(value, both[parameter], rtol=1e-3, atol=1e-3, msg=parameter)
    for rank in (0, 1):
        given = figures[rank][name]["curve"]
        # AdamW makes much of the last digit of a small gradient, which depends on the order of sums.
        assert given[0] == pytest.approx(curve[0], rel=1e-5, abs=1e-6)
        for entry, wanted in zip(given, curve, strict=True):
            assert entry == pytest.approx(wanted, rel=1e-2, abs=1e-4)


def test_workers_share_the_rows_of_terms(two: tuple[Path, list[dict[str, Any]]]) -> None:
    _, figures = two
    for rank in (0, 1):
        assert figures[rank]["rows of terms, one at a time"]["widest"] == 1
        assert figures[rank]["rows of terms"]["widest"] == 2  # of four rows, and of three that a term draws


def test_with_dropout_workers_stay_together(two: tuple[Path, list[dict[str, Any]]]) -> None:
    """Their masks differ, so the result is another than one worker's, but it is the same on both."""
    folder, figures = two
    assert same_bits(*(load_file(folder / f"dropout-{rank}.safetensors") for rank in (0, 1)))
    assert figures[0]["dropout"]["curve"] == figures[1]["dropout"]["curve"]


def test_what_one_worker_makes_all_have(two: tuple[Path, list[dict[str, Any]]]) -> None:
    _, figures = two
    assert figures[0]["shared"] == figures[1]["shared"] == [[0, 0], [1, 1], [2, 0]]
    assert shared(2, lambda index: index) == [0, 1]
    assert figures[0]["lfpt5"] == figures[1]["lfpt5"]
    assert len(figures[0]["lfpt5"]) == 10 + 1 + 2  # the first task's by rank 0, the second's by rank 1


def test_all_workers_stop_at_the_step_at_which_one_diverges(two: tuple[Path, list[dict[str, Any]]]) -> None:
    _, figures = two
    assert figures[0]["diverged"] == figures[1]["diverged"]
    assert "at step 3 of 6: faulty is nan" in figures[0]["diverged"]


def test_the_frozen_backbone_is_not_sent_to_the_workers(two: tuple[Path, list[dict[str, Any]]]) -> None:
    for found in two[1]:
        assert found["sent"]["learnt"] <= found["sent"]["tensors"] <= found["sent"]["pool"]
