"""Memory and time of training on a CPU: ours beside a bare loop with PEFT, and beside other settings of malloc.

    python benchmarks/training_memory.py

Two shapes, random weights: SmolLM2-135M's, whose steps take hundreds of megabytes in blocks of other sizes each time,
and the quickstart's, whose steps take a few. Every side trains the same rows in the same order in a process of its
own, LoRA on all attention projections. Sides take turns, and a round's figures are ratios to PEFT's of that round.
Linux with glibc; the peak is the kernel's (VmHWM), libraries included.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForSeq2SeqLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pipelines.console.machine import machine_of
from sapt_core.backbones.device import autocast
from sapt_core.data.collate import IGNORED_LABEL, Collator, epoch_batches
from sapt_core.io.blobs import NoCheckpoints
from sapt_core.pool.model import SaptModel
from sapt_core.pool.pool import new_pool
from sapt_core.settings import AttentionConfig, LoRAConfig, TrainConfig
from sapt_core.training import trainer
from sapt_core.training.objective import Objective

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SEED, RATE = 0, 1e-4
SIDES = ("ours", "PEFT", "ours, malloc as it is", "ours, nothing mapped")
Rows = list[dict[str, Any]]


def main() -> None:
    """Run every side in turn and write down what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["smollm2-135m", "quickstart"], action="append", help="default: both")
    parser.add_argument("--steps", type=int, help="default: 12 and 60")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/training_memory.json")
    arguments = parser.parse_args()
    found = []
    for shape in arguments.shape or ["smollm2-135m", "quickstart"]:
        steps = arguments.steps or {"smollm2-135m": 12, "quickstart": 60}[shape]
        taken: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(arguments.rounds):
            for side in SIDES:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                    taken[side].append(process.submit(measure, shape, side, steps).result())
                print(f"{shape}, {side}: {taken[side][-1]}", flush=True)
        found.append({"shape": shape, "steps": steps, "sides": {side: summary(taken, side) for side in SIDES}})
    for each in found:
        shown = Table("side", "peak, MiB", "of PEFT's", "process seconds a step", "of PEFT's", title=each["shape"])
        for side, of in each["sides"].items():
            shown.add_row(side, *(f"{of[name]:.4g}" for name in ("peak", "peak_ratio", "seconds", "seconds_ratio")))
        Console().print(shown)
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine_of(TrainConfig()).model_dump(),
        "libraries": {name: version(name) for name in ("torch", "transformers", "peft")},
        "rounds": arguments.rounds,
        "found": found,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")


def summary(taken: dict[str, list[dict[str, float]]], side: str) -> dict[str, float]:
    """Medians over the rounds."""
    found = {}
    for name in ("peak", "seconds"):
        ratios = [ours[name] / peft[name] for ours, peft in zip(taken[side], taken["PEFT"], strict=True)]
        found[name] = statistics.median(each[name] for each in taken[side])
        found[f"{name}_ratio"] = statistics.median(ratios)
    return found


def measure(shape: str, side: str, steps: int) -> dict[str, float]:
    """Train in this process: its peak memory in MiB, and the median of its steps' process seconds."""
    torch.manual_seed(SEED)
    backbone, targets, rows, batch_size = {"smollm2-135m": smollm2, "quickstart": quickstart}[shape](steps)
    moments = []

    def on_step(*_: int) -> None:
        moments.append(time.process_time())

    run = train_with_peft if side == "PEFT" else train_here
    if side == "ours, malloc as it is":
        trainer.keep_freed_memory = lambda _: None
    elif side == "ours, nothing mapped":
        trainer.keep_freed_memory = map_nothing
    run(backbone, targets, rows, batch_size, on_step)
    seconds = [after - before for before, after in pairwise(moments)]  # after the first, which makes what they find
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    return {"peak": round(peak), "seconds": round(statistics.median(seconds), 4)}


def map_nothing(_: str) -> None:
    """As releases before this one set malloc: M_MMAP_MAX is 0, and up to 2 GiB at the heap's end are kept."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)
    libc.mallopt(-1, 2**31 - 1)


def smollm2(steps: int) -> tuple[PreTrainedModel, list[str], Rows, int]:
    """30 layers of width 576; 16 rows a step of up to 192 tokens, of which the last 8 are the answer."""
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    rows = texts(16 * steps, config.vocab_size, prompt=(56, 184), answer=(8, 8))
    return LlamaForCausalLM(config), ["q_proj", "k_proj", "v_proj", "o_proj"], rows, 16


def quickstart(steps: int) -> tuple[PreTrainedModel, list[str], Rows, int]:
    """The shape of the shipped backbone, and rows as long as the quickstart's."""
    config = AutoConfig.from_pretrained(ROOT / "pipelines/backbones/tiny")
    rows = texts(16 * steps, config.vocab_size, prompt=(40, 80), answer=(2, 6))
    return AutoModelForSeq2SeqLM.from_config(config), ["q", "k", "v", "o"], rows, 16


def texts(count: int, vocabulary: int, *, prompt: tuple[int, int], answer: tuple[int, int]) -> Rows:
    """Random tokens, of random lengths."""
    draw = random.Random(SEED)
    lengths = {"prompt_ids": prompt, "answer_ids": answer}
    return [
        {name: [draw.randrange(5, vocabulary) for _ in range(draw.randint(*span))] for name, span in lengths.items()}
        for _ in range(count)
    ]


def train_here(
    backbone: PreTrainedModel, targets: list[str], rows: Rows, batch_size: int, on_step: Callable[[int, int], None]
) -> None:
    """One block of a pool with shared attention, by the product's own loop."""
    pool = new_pool(backbone, LoRAConfig(r=8, lora_alpha=16, target_modules=tuple(targets)), AttentionConfig())
    pool.add()
    model = SaptModel(backbone, pool)
    config = TrainConfig(learning_rate=RATE, epochs=1, batch_size=batch_size)
    trainer.train(
        model,
        rows,
        model.collator(0),
        config,
        seed=SEED,
        objective=Objective(),
        checkpoints=NoCheckpoints(),
        on_step=on_step,
    )


def train_with_peft(
    backbone: PreTrainedModel, targets: list[str], rows: Rows, batch_size: int, on_step: Callable[[int, int], None]
) -> None:
    """The same batches through PEFT's LoRA in a bare loop."""
    model = get_peft_model(backbone, LoraConfig(r=8, lora_alpha=16, target_modules=targets)).train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], RATE, weight_decay=0)
    collator = Collator(0, is_encoder_decoder=bool(backbone.config.is_encoder_decoder))
    for batch in epoch_batches([len(row["prompt_ids"]) + len(row["answer_ids"]) for row in rows], batch_size, SEED, 0):
        padded = collator([rows[index] for index in batch])
        assert padded.labels is not None  # noqa: S101 - a training batch has labels
        # A decoder's are of its last positions; transformers takes them of all.
        ahead = 0 if collator.is_encoder_decoder else padded.input_ids.shape[1] - padded.labels.shape[1]
        labels = torch.nn.functional.pad(padded.labels, (ahead, 0), value=IGNORED_LABEL)
        with autocast(CPU, "auto"):
            loss = model(input_ids=padded.input_ids, attention_mask=padded.attention_mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([each for each in model.parameters() if each.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        on_step(0, 0)


if __name__ == "__main__":
    main()
