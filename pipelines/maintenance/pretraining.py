"""Pre-training of the quickstart's backbone: a tiny T5 v1.1 that learns general skills on generated text."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from statistics import mean
from string import ascii_lowercase, digits
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from sapt_core.data.lexicon import open_class_words
from sapt_core.data.synthetic import TASKS, is_test_input
from sapt_core.data.templates import TEMPLATES

PUNCTUATION = tuple(".,:;?!-'()/")
PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
GENERATE, SEPARATOR, GAP = "__gen__", "__inp__", "__gap__"

COPY_STEPS, MIX_STEPS = 1000, 1500  # at most, and exactly
COPY_BATCH, MIX_BATCH = 64, 48
RATE, EMBEDDING_RATE, WARMUP = 5e-3, 3e-3, 50
SHORTEST_RUN, LONGEST_RUN, FIRST_TOKENS = 4, 12, 100
LEARNT = 0.4  # nats a token under which the copying exercise doubles its token set
RAMP = 500  # steps over which the full mix replaces plain copying; at once, copying is lost


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-case word tokenizer over the synthetic language; other words fall into letters, so none is lost."""
    words = sorted({word for text in _closed_class_texts() for word in _words(text)} | set(open_class_words()))
    characters = (*ascii_lowercase, *digits)
    tokens = [PAD, EOS, UNK, GENERATE, SEPARATOR, GAP, *PUNCTUATION, *words]
    tokens += [c for c in characters if c not in words] + [f"##{c}" for c in characters]
    backend = Tokenizer(models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token=UNK))
    backend.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\w]"), "isolated")]
    )
    backend.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    backend.decoder = decoders.Sequence(
        [decoders.WordPiece(cleanup=False), *(decoders.Replace(f" {mark}", mark) for mark in ".,:;?!")]
    )
    backend.add_tokens([AddedToken(token, normalized=False) for token in (GENERATE, SEPARATOR, GAP)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )


def _closed_class_texts() -> Iterator[str]:
    """Texts whose words, with the open classes, make the vocabulary."""
    rng = Random(0)
    yield _prompt("", "")
    for task in TASKS.values():
        yield task.definition
        yield from (task.draw(rng)[0] for _ in range(50))
    yield from (skill(rng, ["fox", "owl", "hare"])[0] for skill in SKILLS for _ in range(10))


def _words(text: str) -> list[str]:
    return "".join(c if c.isalpha() else " " for c in text.lower()).split()


def _text(rng: Random, vocabulary: list[str]) -> list[str]:
    """Words to work on: a sentence of the synthetic language, or words drawn uniformly."""
    return _sentence(rng).split() if rng.random() < 0.6 else rng.sample(vocabulary, rng.randint(3, 10))


def _prompt(definition: str, text: str) -> str:
    return "".join(TEMPLATES["superni"].pieces(definition, text))


def _sentence(rng: Random) -> str:
    while True:
        text, _ = rng.choice(tuple(TASKS.values())).draw(rng)
        if not is_test_input(text):
            return text


def _once(words: list[str], *, last: int) -> list[int]:
    """Positions of the words that occur once, with ``last`` words after them at least."""
    return [i for i, word in enumerate(words[: len(words) - last]) if words.count(word) == 1]


def _bare(word: str) -> str:
    return word.rstrip("".join(PUNCTUATION))


def _repeat(rng: Random, words: list[str]) -> tuple[str, str, str]:
    return "Write the text again.", " ".join(words), " ".join(words)


def _follows(rng: Random, words: list[str]) -> tuple[str, str, str]:
    spot = rng.choice(_once(words, last=1) or [0])
    return f"Write the word that follows {_bare(words[spot])}.", " ".join(words), _bare(words[spot + 1])


def _precedes(rng: Random, words: list[str]) -> tuple[str, str, str]:
    spot = rng.choice([i for i in _once(words, last=0) if i > 0] or [1])
    return f"Write the word that comes before {_bare(words[spot])}.", " ".join(words), _bare(words[spot - 1])


def _between(rng: Random, words: list[str]) -> tuple[str, str, str]:
    spots = sorted(rng.sample(range(len(words)), 2))
    run = words[spots[0] : spots[1] + 1][:5]
    return f"Write the words from {_bare(run[0])} to {_bare(run[-1])}.", " ".join(words), _bare(" ".join(run))


def _say(rng: Random, words: list[str]) -> tuple[str, str, str]:
    return f"Answer {_bare(words[0])} to everything.", " ".join(words[1:]), _bare(words[0])


def _rule(rng: Random, words: list[str]) -> tuple[str, str, str]:
    answer, otherwise = rng.sample(open_class_words(), 2)
    cue = _bare(rng.choice(words))
    text = words if (there := rng.random() < 0.5) else [word for word in words if _bare(word) != cue]
    return f"Say {answer} if the text has {cue}, else {otherwise}.", " ".join(text), answer if there else otherwise


def _fill(rng: Random, words: list[str]) -> tuple[str, str, str]:
    spot = rng.randrange(len(words))
    text = " ".join([*words[:spot], GAP, *words[spot + 1 :]])
    return "Write what is missing.", text, _bare(words[spot])


SKILLS: tuple[Callable[[Random, list[str]], tuple[str, str, str]], ...] = (
    _repeat,
    _follows,
    _precedes,
    _between,
    _say,
    _rule,
    _fill,
)


def draw_example(rng: Random, vocabulary: list[str]) -> tuple[str, str]:
    """A source and a target of the general skills, one in six of them free writing."""
    kind = rng.random()
    if kind < 1 / 12:
        return GENERATE, _sentence(rng)
    words = _text(rng, vocabulary) if kind > 1 / 4 else _sentence(rng).split()
    skill = rng.choice(SKILLS)
    definition, text, answer = skill(rng, _sentence(rng).split() if skill is _fill else words)
    if kind < 1 / 6:
        return GENERATE, f"{definition}{SEPARATOR}{text}"
    if kind < 1 / 4:
        gapped = [GAP if rng.random() < 0.25 else word for word in words]
        return f"Write the full text: {' '.join(gapped)}", " ".join(words)
    if rng.random() < 1 / 4:
        return f"{definition} {text}", answer
    return _prompt(definition, text), answer


def build_model(vocabulary: int) -> T5ForConditionalGeneration:
    """T5 v1.1 shape (gated GELU, tied embeddings, no dropout): 4 encoder and 2 decoder layers of width 128."""
    return T5ForConditionalGeneration(
        T5Config(  # type: ignore[call-arg]  # decoder_start_token_id: its fields do not name it
            vocab_size=vocabulary,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=4,
            num_decoder_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        )
    )


class Exercises:
    """Batches: plain copying from a token set that grows each time it is learnt, then slowly the full mix.

    Attributes:
        tokens: size of the set that copying draws from.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = Random(seed)
        self.ids = list(range(3, len(tokenizer)))
        self.rng.shuffle(self.ids)
        self.words = list(open_class_words())
        self.tokens = FIRST_TOKENS

    def grow(self) -> bool:
        """Double the token set; False where it is the whole vocabulary already."""
        whole = self.tokens >= len(self.ids)
        self.tokens = min(2 * self.tokens, len(self.ids))
        return not whole

    def batch(self, size: int, share: float) -> dict[str, torch.Tensor]:
        """``size`` rows, about ``share`` of them from the full mix; pad id 0, labels padded with -100."""
        mixed = sum(self.rng.random() < share for _ in range(size))
        pairs = [draw_example(self.rng, self.words) for _ in range(mixed)]
        sources = [self.tokenizer(source)["input_ids"] for source, _ in pairs]
        targets = [self.tokenizer(target)["input_ids"] for _, target in pairs]
        for _ in range(size - mixed):
            run = self.rng.sample(self.ids[: self.tokens], k=self.rng.randint(SHORTEST_RUN, LONGEST_RUN))
            sources.append([*run, self.tokenizer.eos_token_id])
            targets.append(sources[-1])
        source = _pad(sources, 0)
        return {"input_ids": source, "attention_mask": (source != 0).long(), "labels": _pad(targets, -100)}


def _pad(rows: list[list[int]], value: int) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


class Optimizer:
    """Muon for the matrices, whose copying loss falls faster than under AdamW alone, and AdamW for the rest."""

    def __init__(self, model: T5ForConditionalGeneration) -> None:
        matrices: list[torch.nn.Parameter] = []
        rest: list[torch.nn.Parameter] = []
        for name, parameter in model.named_parameters():
            is_matrix = parameter.ndim == 2 and "shared" not in name and "relative_attention_bias" not in name
            (matrices if is_matrix else rest).append(parameter)
        self.parameters = [*matrices, *rest]
        self.parts = (
            (torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), RATE),
            (torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0), EMBEDDING_RATE),
        )

    def step(self, scale: float) -> None:
        """One update at ``scale`` times the peak rates; gradients are clipped before and cleared after."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, rate in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
            optimizer.step()  # type: ignore[no-untyped-call]
            optimizer.zero_grad(set_to_none=True)


def pretrain(out: Path, seed: int = 0, copy_steps: int = COPY_STEPS, mix_steps: int = MIX_STEPS) -> None:
    """Train a backbone and save it with its tokenizer under ``out``; prints its progress and its skills."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer))
    exercises, optimizer = Exercises(tokenizer, seed), Optimizer(model)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    start, losses = time.perf_counter(), deque[float](maxlen=20)

    def train(size: int, share: float, scale: float) -> None:
        loss = model(**exercises.batch(size, share)).loss
        loss.backward()
        optimizer.step(scale)
        losses.append(loss.item())

    def report(phase: str, step: int, steps: int) -> None:
        seconds = time.perf_counter() - start
        print(
            f"{phase} {step}/{steps}  loss {mean(losses):.3f}  tokens {exercises.tokens}  {seconds:.0f} s", flush=True
        )

    model.train()
    for step in range(copy_steps):
        train(COPY_BATCH, 0.0, min(1.0, (step + 1) / WARMUP))
        learnt = (step + 1) % 20 == 0 and mean(losses) < LEARNT and not exercises.grow()
        if learnt or (step + 1) % 50 == 0:
            report("copying", step + 1, copy_steps)
        if learnt:
            break
    for step in range(mix_steps):
        decay = max(0.0, (step - RAMP) / max(1, mix_steps - RAMP))
        train(MIX_BATCH, min(1.0, step / RAMP), 0.01 + 0.99 * (1 - decay))
        if (step + 1) % 50 == 0:
            report("mix", step + 1, mix_steps)
    model.train(False)
    for name, score in skill_scores(model, tokenizer, Random(seed + 1)).items():
        print(f"{name}: {score:.0f}")
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)


@torch.no_grad()
def skill_scores(
    model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, rng: Random, rows: int = 50
) -> dict[str, float]:
    """Exact match x100 of greedy answers on fresh rows of every skill."""
    words, scores = list(open_class_words()), {}
    for skill in SKILLS:
        drawn = [skill(rng, _text(rng, words)) for _ in range(rows)]
        sources = [_prompt(definition, text) for definition, text, _ in drawn]
        batch = tokenizer(sources, padding=True, return_tensors="pt")
        output: Any = model.generate(**batch, max_new_tokens=30)  # type: ignore[misc]
        answers = tokenizer.batch_decode(output, skip_special_tokens=True)
        hits = sum(answer == right for answer, (_, _, right) in zip(answers, drawn, strict=True))
        scores[skill.__name__.strip("_")] = 100 * hits / rows
    return scores
