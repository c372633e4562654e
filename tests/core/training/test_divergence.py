"""Training that diverges stops at the first figure that is no finite number, and nothing inherits one."""

from __future__ import annotations

import json
import math
import traceback
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sapt_core.errors import DivergenceError, SaptError
from sapt_core.methods import sapt
from sapt_core.methods.base import packed
from sapt_core.pool.calls import Call
from sapt_core.pool.model import SaptModel
from sapt_core.training import step
from sapt_core.training.objective import Objective
from tests.core import lessons
from tests.core.tiny import DictStore, KeptCheckpoints, same_bits, sapt_model, trainable
from tests.core.training.test_trainer import learn, stochastic_model


class Faulty:
    """A term or a penalty of no effect until a step, at which its value or only its gradient is no number."""

    name = "faulty"
    weight = 1.0
    per_micro_batch = False
    runs_rows = False

    def __init__(self, at: int = 0, *, gradient_alone: bool = False) -> None:
        self.left = at
        self.gradient_alone = gradient_alone

    def draw(self, generator: torch.Generator) -> None:
        return None

    def value(self, model: SaptModel, drawn: None) -> Tensor:
        self.left -= 1
        nothing = 0 * next(iter(trained for trained in model.pool.parameters() if trained.requires_grad)).sum()
        if self.left > 0:
            return nothing
        return nothing.abs().sqrt() if self.gradient_alone else nothing / nothing.detach()

    def per_row(self, model: SaptModel, call: Call) -> Tensor:
        return self.value(model, None).reshape(1)

    def to(self, device: torch.device) -> Faulty:
        return self


def test_a_rate_that_is_too_high_is_told_with_the_step_the_rate_and_what_to_do() -> None:
    kept = KeptCheckpoints()
    with pytest.raises(DivergenceError) as caught:
        learn(sapt_model("t5"), checkpoints=kept, learning_rate=1e30)
    message = str(caught.value)
    assert message.startswith("Training has diverged at step 2 of 6: loss is nan, ")
    assert "gradient norm is nan" in message
    assert "in float32 at a learning rate of 1e+30" in message
    assert "Nothing of it is recorded: lower train.learning_rate, and run again" in message
    assert issubclass(DivergenceError, SaptError)
    assert DivergenceError.exit_code == 2
    # The first step was whole: its state may stay, for a run with it fails as this one did.
    assert [json.loads(files["state.json"])["step"] for files in kept.kept] == [1]
    for files in kept.kept:
        assert all(bool(value.isfinite().all()) for value in load_tensors(files["state.safetensors"]).values())
    with pytest.raises(DivergenceError, match="at step 2 of 6"):
        learn(sapt_model("t5"), checkpoints=KeptCheckpoints(kept.kept), learning_rate=1e30)


def test_the_message_names_what_else_may_help() -> None:
    with pytest.raises(DivergenceError, match=r"in bfloat16 .* or set train\.max_grad_norm or set train\.precision=fl"):
        learn(sapt_model("t5"), learning_rate=1e30, precision="bfloat16", max_grad_norm=None)


def test_what_the_last_step_did_is_looked_at() -> None:
    kept = KeptCheckpoints()
    with pytest.raises(DivergenceError, match="after the last of 1 steps: loss is nan"):
        learn(sapt_model("t5"), checkpoints=kept, learning_rate=1e30, epochs=0.3)
    assert not kept.kept


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("gradient_alone", [False, True])
@pytest.mark.parametrize("part", ["term", "penalty"])
def test_every_part_of_the_loss_and_the_gradient_alone_end_it(
    part: str, gradient_alone: bool, clip: float | None
) -> None:
    model, kept, faulty = sapt_model("llama"), KeptCheckpoints(), Faulty(3, gradient_alone=gradient_alone)
    objective = Objective((faulty,)) if part == "term" else Objective(penalties=(faulty,))
    found = r"gradient norm is nan\." if gradient_alone else r"faulty is nan, gradient norm is nan\."
    with pytest.raises(DivergenceError, match=rf"at step 3 of 6: {found}"):
        learn(model, objective=objective, checkpoints=kept, max_grad_norm=clip)
    assert len(kept.kept) == 2
    assert all(bool(value.isfinite().all()) for value in trainable(model).values())


def test_a_run_goes_on_from_the_last_good_checkpoint_as_if_it_had_never_diverged() -> None:
    def run(model: SaptModel, objective: Objective, kept: KeptCheckpoints) -> list[dict[str, float]]:
        return learn(model, objective=objective, checkpoints=kept)

    whole, kept = stochastic_model(), KeptCheckpoints()
    curve = run(whole, Objective((Faulty(99),)), KeptCheckpoints())
    with pytest.raises(DivergenceError, match="at step 4 of 6"):
        run(stochastic_model(), Objective((Faulty(4),)), kept)
    resumed = stochastic_model()
    assert run(resumed, Objective((Faulty(99),)), kept) == curve
    assert same_bits(trainable(resumed), trainable(whole))


@pytest.mark.parametrize("shared_attention", [True, False])
@pytest.mark.parametrize("name", ["t5", "llama"])
def test_the_device_is_waited_for_once_a_step(
    name: str, shared_attention: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a step looks at comes in one piece; each look is a wait for all that a GPU has been given to do.

    Which blocks are in use is a look of its own, before a pass, where there is something to choose by.
    """
    waits: list[str] = []
    looks = {torch.ops.aten._local_scalar_dense.default: "item", torch.ops.aten.nonzero.default: "nonzero"}

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            # The backbone's own looks at its padding are not ours to leave out.
            ours = not any("/transformers/" in frame.filename for frame in traceback.extract_stack())
            if ours and function in looks:
                waits.append(looks[function])
            return function(*args, **(kwargs or {}))

    whole, listed = step.run_step, Tensor.tolist

    def watched(*args: Any, **named: Any) -> Any:
        with Watched():
            return whole(*args, **named)

    def tolist(self: Tensor) -> Any:
        if self.is_floating_point():  # what is drawn is drawn on the CPU
            waits.append("tolist")
        return listed(self)

    monkeypatch.setattr("sapt_core.training.trainer.run_step", watched)
    monkeypatch.setattr(Tensor, "tolist", tolist)
    model = sapt_model(name)
    if not shared_attention:
        model.pool.attention = model.pool.key = None
    curve = learn(model, objective=None if shared_attention else Objective(), micro_batch_size=4, batch_size=4)
    assert waits == [*(["nonzero"] if shared_attention else []), "tolist"] * len(curve)


def test_a_task_whose_attention_is_no_number_leaves_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sapt.Sapt, "mixture", lambda *_: (math.nan,))
    store = DictStore()
    with pytest.raises(DivergenceError, match=r"After task0 the attention over the blocks is no number .* \(nan"):
        lessons.learn(store, 0, None)
    assert not store.blobs


def test_what_a_method_keeps_has_finite_numbers() -> None:
    tensors = {"a": torch.ones(2), "b": torch.tensor([1.0, math.inf]), "heads": torch.tensor([[1, 2]])}
    with pytest.raises(DivergenceError, match=r"The Fisher information holds .* in 1 of 3 tensors, first b\."):
        packed("The Fisher information", tensors)
    assert load_tensors(packed("x", {"a": torch.ones(2, 3).T}))["a"].shape == (3, 2)
