"""What more blocks cost: a training step, answers, and loading, against their number.

    python benchmarks/pool.py --arch t5 --mixture soft

A random model of T5-small's width with few layers. Process time on the CPU, all numbers of blocks in turn, medians
of the rounds: other work on the machine hits them alike. A training step is given as a multiple of the first number's,
answers as the bare model's time over the pool's, loading in milliseconds a block.
``soft`` mixes all blocks for every input, ``sharp`` uses one or two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from sapt_core.data.collate import Batch
from sapt_core.pool.model import SaptModel
from sapt_core.pool.pool import PETPool, new_pool
from sapt_core.settings import AttentionConfig, LoRAConfig

ROWS, PROMPT, ANSWER, RANK = 8, 128, 16, 8
WIDTH, LAYERS, VOCABULARY = 512, 3, 8192
TARGETS = {"t5": ("q", "v"), "llama": ("q_proj", "v_proj")}
TEMPERATURES = {"soft": 1.0, "sharp": 0.01}

Call = Callable[[], Any]


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=TARGETS, default="t5")
    parser.add_argument("--mixture", choices=TEMPERATURES, default="soft")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 15, 50, 100])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    pools = {count: filled(arguments.arch, arguments.mixture, count) for count in arguments.blocks}
    bare = backbone(arguments.arch)
    steps = medians({count: training_step(*pools[count]) for count in pools}, arguments.rounds)
    for _, pool in pools.values():
        pool.freeze()
    answers = medians({0: answering(bare, None)} | {n: answering(*pools[n]) for n in pools}, arguments.rounds)
    loads = medians({count: loading(*pools[count]) for count in pools}, arguments.rounds)
    first = arguments.blocks[0]
    found = [
        {
            "blocks": count,
            "step_seconds": round(steps[count], 4),
            "step_to_first": round(steps[count] / steps[first], 3),
            "answers_seconds": round(answers[count], 4),
            "answers_bare_to_pool": round(answers[0] / answers[count], 3),
            "load_ms_a_block": round(1000 * loads[count] / count, 3),
        }
        for count in pools
    ]
    table = Table("blocks", "step, s", f"to {first}", "answers, s", "bare / pool", "load, ms a block")
    for each in found:
        table.add_row(*map(str, each.values()))
    Console().print(table)
    result = {
        "arch": arguments.arch,
        "mixture": arguments.mixture,
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "bare_answers_seconds": round(answers[0], 4),
        "by_blocks": found,
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def medians(calls: Mapping[int, Call], rounds: int) -> dict[int, float]:
    """Seconds of processor time of each call, interleaved, after one round that does not count."""
    seen: dict[int, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            if number:
                seen[name].append(time.process_time() - began)
    return {name: statistics.median(times) for name, times in seen.items()}


def backbone(arch: str) -> PreTrainedModel:
    """A random frozen model."""
    torch.manual_seed(0)
    shared: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0}
    if arch == "t5":
        sizes = {"d_model": WIDTH, "d_kv": 64, "d_ff": 2048, "num_layers": LAYERS, "num_heads": 8}
        config = T5Config(**shared, **sizes, decoder_start_token_id=0, dropout_rate=0.0)
        return T5ForConditionalGeneration(config).requires_grad_(False).eval()
    sizes = {"hidden_size": WIDTH, "intermediate_size": 1408, "num_hidden_layers": 2 * LAYERS}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shared, **sizes, **heads)).requires_grad_(False).eval()


def filled(arch: str, mixture: str, count: int) -> tuple[PreTrainedModel, PETPool]:
    """A backbone and a pool of random blocks, of which the last is being learnt."""
    model = backbone(arch)
    pet = LoRAConfig(r=RANK, target_modules=TARGETS[arch])
    pool = new_pool(model, pet, AttentionConfig(temperature=TEMPERATURES[mixture]))
    for index in range(count):
        pool.add()
        pool.blocks.load_current({name: torch.randn(shape) * 0.01 for name, shape in pool.blocks.shapes.items()})
        if index < count - 1:
            pool.freeze()
    return model, pool


def batch(model: PreTrainedModel) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (ROWS, PROMPT), generator=generator)
    labels = torch.randint(5, VOCABULARY, (ROWS, ANSWER), generator=generator)
    labels = labels if model.config.is_encoder_decoder else ids[:, -ANSWER:].clone()
    mask = torch.ones_like(ids)
    return Batch(input_ids=ids, attention_mask=mask, query_mask=mask > 0, labels=labels, left_padded=False)


def training_step(backbone: PreTrainedModel, pool: PETPool) -> Call:
    """Forward, backward and update on one batch."""
    model, rows = SaptModel(backbone, pool), batch(backbone)
    parameters: list[nn.Parameter] = [each for each in pool.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    assert rows.labels is not None  # noqa: S101 - a training batch has labels

    def step(labels: Tensor = rows.labels) -> None:
        model.token_loss(model(rows), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def answering(backbone: PreTrainedModel, pool: PETPool | None) -> Call:
    """Answers of one length to one batch, without a pool by the model itself."""
    rows = batch(backbone)
    options = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False, "pad_token_id": 0}
    if pool is not None:
        model = SaptModel(backbone, pool).eval()
        return lambda: model.generate(rows, **options)
    return lambda: backbone.generate(input_ids=rows.input_ids, attention_mask=rows.attention_mask, **options)


def loading(backbone: PreTrainedModel, pool: PETPool) -> Call:
    """Stored blocks, put into an empty pool."""
    states = [{name: torch.zeros(shape) for name, shape in pool.blocks.shapes.items()}] * pool.blocks.count
    pet = LoRAConfig(r=RANK, target_modules=TARGETS["t5" if backbone.config.is_encoder_decoder else "llama"])
    return lambda: new_pool(backbone, pet, None).blocks.append_frozen(*states)


if __name__ == "__main__":
    main()
