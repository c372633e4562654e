"""Terms that run rows of their own through the backbone: beside gradient checkpointing, and when a step fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sapt_core.methods import lfpt5
from sapt_core.pool.model import SaptModel
from sapt_core.settings import FullConfig, PETConfig, PromptConfig
from sapt_core.training import trainer
from sapt_core.versions import learning
from tests.core import lessons
from tests.core.lessons import learn
from tests.core.tiny import DictStore, lora, tiny_backbone

SEEKR: dict[str, Any] = {"name": "seekr", "layers": 2, "heads": 3, "queries": 4}
METHODS: dict[str, tuple[dict[str, Any], PETConfig | None]] = {
    "lfpt5": ({"name": "lfpt5", "max_tokens": 16}, None),
    "lfpt5 prompt": ({"name": "lfpt5", "max_tokens": 16}, PromptConfig(length=3)),
    # Of ten rows so many are kept and drawn again beside batches of four: five, four, three and fewer a step.
    "seekr 1.0": ({**SEEKR, "share": 1.0}, None),
    "seekr 0.8": ({**SEEKR, "share": 0.8}, None),
    "seekr 0.3": ({**SEEKR, "share": 0.3}, None),
    "seekr full": ({**SEEKR, "share": 0.8}, FullConfig()),
}


@pytest.fixture(autouse=True)
def _samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model cannot write."""
    monkeypatch.setattr(lfpt5, "sample", lambda *given, **rest: ({"w1 w2": "w1", "w3 w4 w5": "w3"}, {}))


@pytest.mark.parametrize(
    ("name", "case", "micro_batch_size"),
    [
        *((name, case, None) for name in ("t5", "llama") for case in METHODS),
        *(("t5", case, 3) for case in ("lfpt5", "seekr 0.8")),
    ],
)
def test_gradient_checkpointing_changes_nothing(
    name: str, case: str, micro_batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients of every step: layers that are run again read the mixture of their own pass."""
    method, pet = METHODS[case]
    pet = pet or lora(name)
    store = DictStore()
    first, _ = learn(store, 0, None, name=name, method=method, pet=pet)
    gradients: list[list[Tensor]] = []
    update = trainer._update

    def noting(optimizer: torch.optim.Optimizer, *given: Any, **options: Any) -> None:
        gradients.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])
        update(optimizer, *given, **options)

    monkeypatch.setattr(trainer, "_update", noting)
    runs, found = [], []
    for checkpointing in (False, True):
        gradients = []
        forwards = counted(monkeypatch)
        train = {"gradient_checkpointing": checkpointing, "micro_batch_size": micro_batch_size}
        found.append(learn(store, 1, first, name=name, method=method, pet=pet, train=train))
        runs.append((gradients, len(forwards)))
    (plain, once), (saving, twice) = runs
    assert twice > once, "layers were run again"
    assert len(plain) == len(saving) == 3
    for left, right in zip(plain, saving, strict=True):
        # A gradient is a sum over passes, whose order may change.
        torch.testing.assert_close(right, left, rtol=1e-4, atol=1e-5 * max(float(each.abs().max()) for each in left))
    assert any(entry.get("seekr", entry.get("writing", 0)) > 0 for entry in found[0][1])


def counted(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Grows with every pass of the first layer of the backbone that is learnt on next."""
    passes: list[nn.Module] = []

    def watched(name: str) -> PreTrainedModel:
        backbone = tiny_backbone(name)
        decodes = backbone.config.is_encoder_decoder
        part = backbone.decoder.block[0].layer[0] if decodes else backbone.model.layers[0].self_attn
        part.register_forward_pre_hook(lambda module, _: passes.append(module))
        return backbone

    monkeypatch.setattr(lessons, "tiny_backbone", watched)
    return passes


class BrokenError(Exception):
    """What fails in a step."""


def everything(backbone: PreTrainedModel) -> dict[str, Any]:
    """What a lesson may change of a backbone, and has to leave as it was."""
    modules = dict(backbone.named_modules())
    return {
        "attention": {
            name: module.config._attn_implementation for name, module in modules.items() if hasattr(module, "config")
        },
        "training": {name: module.training for name, module in modules.items()},
        "checkpointing": {name: getattr(module, "gradient_checkpointing", None) for name, module in modules.items()},
        "hooks": {
            name: [len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks)]
            for name, module in modules.items()
        },
        "weights": {name: (id(value), value.requires_grad, value.grad) for name, value in backbone.named_parameters()},
        "buffers": {name: (id(value), value.tolist()) for name, value in backbone.named_buffers()},
        "numbers": {name: value.tolist() for name, value in backbone.state_dict().items()},
    }


def breaking(backbone: PreTrainedModel, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the first step fail in the middle of the backbone, or something fail after it."""

    def broken(*given: Any, **options: Any) -> None:
        raise BrokenError

    def in_training(module: nn.Module, *given: Any) -> None:
        if module.training and (where == "forward" or torch._C._current_graph_task_id() != -1):
            raise BrokenError

    def in_measuring(model: SaptModel, *given: Any) -> Tensor:
        if any(parameter.requires_grad for parameter in backbone.parameters()):
            raise BrokenError
        return token_loss(model, *given)

    token_loss = SaptModel.token_loss
    last = backbone.decoder.block[1].layer[1] if backbone.config.is_encoder_decoder else backbone.model.layers[1].mlp
    if where in {"forward", "recomputing"}:
        last.register_forward_pre_hook(in_training)
    elif where == "update":
        monkeypatch.setattr(trainer, "_update", broken)
    elif where == "measuring heads":
        monkeypatch.setattr(SaptModel, "token_loss", in_measuring)
    else:
        monkeypatch.setattr(learning, "store_block", broken)


FAILING = {
    "sapt": ("sapt", None),
    "am_lora": ("am_lora", None),
    "l2p": ("l2p", PromptConfig(length=3)),
    **{case: METHODS[case] for case in ("lfpt5 prompt", "seekr 0.8", "seekr full")},
}


@pytest.mark.parametrize(
    ("name", "case", "where"),
    [
        *(("t5", case, where) for case in FAILING for where in ("forward", "recomputing")),
        *((name, "seekr 0.8", where) for name in ("t5", "llama") for where in ("update", "measuring heads", "storing")),
        ("llama", "seekr full", "recomputing"),
    ],
)
def test_what_fails_leaves_the_backbone_as_it_was(
    name: str, case: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, pet = FAILING[case]
    options: dict[str, Any] = {"name": name, "method": method, "pet": pet or lora(name)}
    store = DictStore()
    backbone = tiny_backbone(name).requires_grad_(False)
    with monkeypatch.context() as patches:
        patches.setattr(lessons, "tiny_backbone", lambda name: backbone)
        # Asked for attention maps, transformers puts hooks of its own on a model, once and for good.
        first, _ = learn(store, 0, None, **options)
        breaking(backbone, where, patches)
        before = everything(backbone)
        with pytest.raises(BrokenError):
            learn(store, 1, first, train={"gradient_checkpointing": True}, **options)
    after = everything(backbone)
    for what, of_modules in before.items():
        assert after[what] == of_modules, what
