# ruff: noqa: S106 - tokens of a tokenizer
"""Tiny random backbones built from configs, a word tokenizer, and stores that live in memory."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save as save_tensors
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from sapt_core.backbones.reference import BackboneRef
from sapt_core.data.collate import IGNORED_LABEL, Batch
from sapt_core.data.prepare import PreparedTask, prepare_task
from sapt_core.data.task import Example, LearntTask, Task
from sapt_core.errors import StoreError
from sapt_core.pool.model import SaptModel
from sapt_core.pool.pool import PETPool, new_pool
from sapt_core.settings import AttentionConfig, LoRAConfig, PETConfig

T = TypeVar("T")

PAD, EOS, UNK, BOS = 0, 1, 2, 3
SPECIAL = ["<pad>", "</s>", "<unk>", "<s>", "__gen__", "__inp__"]
WORDS = [*(f"w{number}" for number in range(33)), "__ans__"]
VOCABULARY = len(SPECIAL) + len(WORDS)
WIDTH = 16

T5_NAMES = {"t5", "t5_gated", "t5_narrow"}
BACKBONES = (*sorted(T5_NAMES), "llama", "qwen2")


def tiny_backbone(name: str, *, seed: int = 0, dropout: float = 0.0) -> PreTrainedModel:
    """A random model in float32, in eval mode; weights wide enough that attention and answers vary."""
    torch.manual_seed(seed)
    if name in T5_NAMES:
        options = {
            "t5": {},
            "t5_gated": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
            "t5_narrow": {"d_kv": 4, "num_heads": 3},
        }[name]
        config = T5Config(
            **{
                "vocab_size": VOCABULARY,
                "d_model": WIDTH,
                "d_ff": 24,
                "num_layers": 2,
                "d_kv": 8,
                "num_heads": 2,
                "dropout_rate": dropout,
                "pad_token_id": PAD,
                "eos_token_id": EOS,
                "decoder_start_token_id": PAD,
                **options,
            }
        )
        model: PreTrainedModel = T5ForConditionalGeneration(config)
    else:
        kind, model_class = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[name]
        config = kind(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            pad_token_id=PAD,
            eos_token_id=EOS,
            bos_token_id=BOS,
        )
        model = model_class(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3)
            elif parameter_name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model.eval()


def targets(name: str) -> tuple[str, ...]:
    return ("q", "v") if name in T5_NAMES else ("q_proj", "v_proj")


def lora(name: str, **changes: object) -> LoRAConfig:
    return LoRAConfig(**{"r": 2, "lora_alpha": 6, "target_modules": targets(name), **changes})


def fill(pool: PETPool, blocks: int, *, seed: int = 1, spread: float = 0.3) -> PETPool:
    """Add ``blocks`` blocks with random A, B and keys; the last stays the one that is being learnt."""
    torch.manual_seed(seed)
    for index in range(blocks):
        pool.add()
        state = {name: torch.randn_like(value) * spread for name, value in pool.blocks.current_state().items()}
        pool.blocks.load_current(state)
        if index < blocks - 1:
            pool.freeze()
    return pool


def sapt_model(
    name: str,
    blocks: int = 3,
    *,
    attention: AttentionConfig | None = None,
    backbone_dropout: float = 0.0,
    pet: PETConfig | None = None,
    **changes: object,
) -> SaptModel:
    """A model with random blocks: LoRA ones with ``changes``, or of the given kind."""
    backbone = tiny_backbone(name, dropout=backbone_dropout)
    pool = new_pool(backbone, pet or lora(name, **changes), attention or AttentionConfig(bottleneck=5, temperature=0.2))
    return SaptModel(backbone, fill(pool, blocks)).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words, one token each; an end-of-text token behind every text."""
    backend = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def tiny_task(number: int = 0, *, rows: int = 10, is_encoder_decoder: bool = True) -> PreparedTask:
    """Answer the first word of the input; tasks differ in their words and definition."""
    generator = torch.Generator().manual_seed(number)

    def examples(count: int) -> tuple[Example, ...]:
        drawn = []
        for _ in range(count):
            length = int(torch.randint(2, 6, (), generator=generator))
            words = [WORDS[8 * number + int(i)] for i in torch.randint(0, 8, (length,), generator=generator)]
            drawn.append(Example(" ".join(words), (words[0],)))
        return tuple(drawn)

    task = Task(f"task{number}", f"w3{number}", examples(rows), examples(4), examples(4), "superni", "exact_match")
    return prepare_task(
        task, tiny_tokenizer(), max_source_tokens=64, max_target_tokens=6, is_encoder_decoder=is_encoder_decoder
    )


def learnt_task(task: PreparedTask) -> LearntTask:
    return LearntTask(
        name=task.name,
        definition=task.definition,
        template=task.template,
        metric=task.metric,
        max_source_tokens=64,
        max_target_tokens=6,
    )


def tiny_ref(**changes: object) -> BackboneRef:
    return BackboneRef(**{"path": "tiny", "files": {"model.safetensors": "0" * 64}, **changes})


def random_rows(count: int, *, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of ragged prompts and answers, each answer with its end token."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return [int(i) for i in torch.randint(len(SPECIAL), VOCABULARY, (length,), generator=generator)]

    return [{"prompt_ids": ids(2, 9), "answer_ids": [*ids(1, 5), EOS]} for _ in range(count)]


def labels_of_every_position(batch: Batch, model: SaptModel) -> Tensor:
    """A batch's labels as the model classes want them: of a decoder-only model one a position."""
    assert batch.labels is not None
    ahead = 0 if model.is_encoder_decoder else batch.input_ids.shape[1] - batch.labels.shape[1]
    return F.pad(batch.labels, (ahead, 0), value=IGNORED_LABEL)


def trainable(model: SaptModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.pool.named_parameters() if value.requires_grad}


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return save_tensors(left) == save_tensors(right)


class DictStore:
    """``sapt_core.io.blobs.BlobStore`` in memory."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    def put(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        self.blobs.setdefault(digest, data)
        return digest

    def get(self, digest: str) -> bytes:
        data = self.blobs.get(digest)
        if data is None or hashlib.sha256(data).hexdigest() != digest:
            raise StoreError(f"Blob {digest} is missing or damaged")
        return data

    def has(self, digest: str) -> bool:
        return digest in self.blobs

    def size(self, digest: str) -> int:
        return len(self.get(digest))

    def put_file(self, path: Path, digest: str | None = None) -> str:
        return self.put(path.read_bytes())

    def fetch_to(self, digest: str, path: Path) -> None:
        path.write_bytes(self.get(digest))


class KeptCheckpoints:
    """``sapt_core.io.blobs.Checkpoints`` in memory that keeps every one."""

    def __init__(self, kept: Sequence[dict[str, bytes]] = ()) -> None:
        self.kept = list(kept)

    def load(self, read: Callable[[Path], T]) -> T | None:
        if not self.kept:
            return None
        with tempfile.TemporaryDirectory() as folder:
            for name, data in self.kept[-1].items():
                Path(folder, name).write_bytes(data)
            return read(Path(folder))

    def save(self, write: Callable[[Path], None]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            self.kept.append({path.name: path.read_bytes() for path in Path(folder).iterdir()})
