"""Try every text class of transformers as a backbone, and say what works.

    python -m benchmarks.backbones --table docs/backbones-table.md

Each class is built small and random, saved, read back as a user's folder is, probed, trained for three steps with LoRA
and with soft prompts, asked, stored as a version and loaded again, in a process of its own with a limit of time and of
memory. What the file has already is not tried again, so that the scan can be stopped at any time.
``--table`` writes the table of docs/backbones.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from benchmarks.tiny_configs import classes, reads_more_than_text, tiny_config
from cluster.store.local import LocalStore
from sapt_core.backbones import loading
from sapt_core.backbones.loading import load_backbone, store_backbone
from sapt_core.backbones.reference import identify, model_class, skeleton
from sapt_core.backbones.tokens import check_tokens
from sapt_core.data import load_sequence
from sapt_core.data.collate import Sharing, Together, stricter
from sapt_core.data.prepare import PreparedTask, prepare_task
from sapt_core.data.task import LearntTask
from sapt_core.errors import BackboneError, SaptError
from sapt_core.io.hashing import canonical_hash
from sapt_core.judging.decoding import answer
from sapt_core.methods.base import find_method
from sapt_core.pool.blocks.lora import find_sites, is_linear, last_names
from sapt_core.pool.model import SaptModel
from sapt_core.pool.probe.loaded import probe
from sapt_core.pool.probe.unloaded import check_embeddings, check_sites
from sapt_core.pool.probe.verdict import Verdict
from sapt_core.settings import (
    AttentionConfig,
    BackboneConfig,
    BenchmarkConfig,
    EvaluationConfig,
    LoRAConfig,
    PETConfig,
    PromptConfig,
    ReflectionConfig,
    TrainConfig,
)
from sapt_core.versions.learning import LearningSettings, Workplace, learn_task
from sapt_core.versions.loading import load_pool, load_version

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "pipelines/backbones/tiny"
SECONDS, GIBIBYTES = 180, 6  # of one class
SPREAD = 0.2  # of the random weights: enough that places and neighbours matter
LARGEST = 3_000_000  # weights of a class that was made small
ALLOWED = 5e-3  # what the probe lets pass for rounding
WHY = ("never called", "given rows of several texts without their order", "routers of experts that give no tensor")
STEPS, ROWS, LENGTHS = 3, 12, {"max_source_tokens": 48, "max_target_tokens": 6}

Word = Literal["works", "equal lengths", "one by one", "LoRA only", "refused", "not text", "not tried"]


@dataclass
class Found:
    """What became of a class.

    Attributes:
        name: the class.
        word: the verdict in a word.
        notes: why, and what else is to be known.
        seconds: that it took.
        training, answering: which rows may share a batch.
        prompts: whether soft prompts are taken.
        figures: the probe's.
        targets: last names of the linears that LoRA was on.
        unfit: last names of those that the product refuses, with the reason.
        checkpointing: whether activations can be computed again.
    """

    name: str
    word: Word
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    training: Together = "any"
    answering: Together = "any"
    prompts: bool = False
    figures: Mapping[str, float] = field(default_factory=dict)
    targets: Sequence[str] = ()
    unfit: Mapping[str, str] = field(default_factory=dict)
    checkpointing: bool = True


def main() -> None:
    """Try what has not been tried yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="classes, by commas, such as causal/llama,encoder-decoder/t5")
    parser.add_argument("--again", action="store_true", help="try them even if the file has them")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/backbones.json")
    parser.add_argument("--table", type=Path, help="Markdown file")
    arguments = parser.parse_args()
    known = classes()
    wanted = arguments.only.split(",") if arguments.only else list(known)
    unknown = [key for key in wanted if key not in known]
    if unknown:
        parser.error(f"no such class: {', '.join(unknown)}")
    results = _read(arguments.output)
    console = Console(width=200)
    left = [key for key in wanted if arguments.again or key not in results]
    if left:
        warm_up()
    for key in left:
        results[key] = asdict(apart(key))
        _write(arguments.output, results)
        console.print(
            f"{key}: {results[key]['word']} {'; '.join(results[key]['notes'])}", markup=False, highlight=False
        )
    if arguments.table:
        arguments.table.write_text(table(results))


def warm_up() -> None:
    """Import all that is needed, here and once: each class is tried in a copy of this process."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder:
        attempt("causal/llama", Path(folder))


def apart(key: str) -> Found:
    """Try a class in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_limited, args=(key, sending))
    start = time.monotonic()
    process.start()
    sending.close()
    try:
        found: Found = receiving.recv() if receiving.poll(SECONDS) else _unfinished(key, f"no end after {SECONDS} s")
    except EOFError:
        found = _unfinished(key, "its process ended")
    process.kill()
    process.join()
    found.seconds = round(time.monotonic() - start, 1)
    return found


def _unfinished(key: str, why: str) -> Found:
    return Found(classes()[key], "not tried", [why])


def _limited(key: str, answers: Any) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (GIBIBYTES * 2**30, GIBIBYTES * 2**30))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        answers.send(attempt(key, Path(folder)))


def attempt(key: str, folder: Path) -> Found:
    """Try a class here, in an empty folder."""
    found = Found(classes()[key], "works")
    if reads_more_than_text(key.partition("/")[2]):
        found.word = "not text"
        return found
    try:
        place = _loaded(key, folder)
    except SaptError as error:
        found.word, found.notes = "refused", [str(error)]
    except Exception as error:
        found.word, found.notes = "not tried", [_said(error)]
    else:
        _try_lora(found, place)
        if found.word != "refused":
            _try_prompts(found, place)
    return found


def _loaded(key: str, folder: Path) -> Workplace:
    """The class, small and random, as it comes back from a folder of its own."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(TOKENIZER)
    config = tiny_config(key, len(tokenizer))
    bare = skeleton(config)
    weights = sum(each.numel() for each in bare.parameters())
    if weights > LARGEST:
        raise ValueError(f"it was not made small: {weights:,} weights")
    check_tokens(bare, tokenizer, key.partition("/")[2])
    torch.manual_seed(0)
    _save(model_class(config).from_config(config), tokenizer, folder / "model")
    store, place = LocalStore(folder / "store"), BackboneConfig(path=str(folder / "model"))
    ref = identify(place)
    store_backbone(place, ref, store)
    return Workplace(*load_backbone(ref, store), ref, store, store.checkpoints(canonical_hash(key)))


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim in {2, 3}:
                parameter.normal_(0, SPREAD)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _try_lora(found: Found, place: Workplace) -> None:
    fit = _fit(found, place.backbone)
    verdict = None
    while fit and verdict is None:
        try:
            verdict = _probed(place, LoRAConfig(r=2, target_modules=tuple(fit)))
        except BackboneError as error:
            unreached = [each for each in fit if _refused(place, each)]
            if not unreached or len(unreached) == len(fit):
                found.word, found.notes = "refused", [str(error)]
                return
            found.unfit = {**found.unfit, **dict.fromkeys(unreached, "no gradient reaches it")}
            fit = [each for each in fit if each not in unreached]
    if verdict is None:
        found.word, found.notes = "refused", ["no linear that LoRA learns at"]
        return
    found.targets = fit
    pet = LoRAConfig(r=2, target_modules=tuple(fit))
    _tell(found, verdict)
    try:
        probe(place.backbone, place.tokenizer, pet, checkpointing=True)
    except BackboneError as error:
        found.checkpointing = False
        if "does not support" not in str(error):
            found.notes.append(str(error).partition("configured: ")[2])
    _learn(found, pet, verdict, place)


def _try_prompts(found: Found, place: Workplace) -> None:
    pet = PromptConfig(length=3)
    try:
        with torch.device("meta"):
            check_embeddings(skeleton(place.backbone.config))
        verdict = _probed(place, pet)
    except BackboneError as error:
        found.word = "LoRA only"
        found.notes.append(str(error))
        return
    found.prompts = True
    _tell(found, verdict)
    _learn(found, pet, verdict, place)


def _probed(place: Workplace, pet: PETConfig) -> Verdict:
    return probe(place.backbone, place.tokenizer, pet, checkpointing=False)


def _refused(place: Workplace, target: str) -> bool:
    try:
        _probed(place, LoRAConfig(r=2, target_modules=(target,)))
    except BackboneError:
        return True
    return False


def _fit(found: Found, model: PreTrainedModel) -> list[str]:
    """Last names of the linears that may be adapted; of others ``found`` gets the reason."""
    bare = skeleton(model.config)
    head = bare.get_output_embeddings()  # type: ignore[no-untyped-call]
    every = [name for name, module in bare.named_modules() if is_linear(module) and module is not head]
    unfit = {}
    for target in last_names(every):
        try:
            check_sites(bare, find_sites(bare, (target,)), "pet")
        except BackboneError as error:
            unfit[target] = next((why for why in WHY if why in str(error)), str(error))
    found.unfit = unfit
    return [target for target in last_names(every) if target not in unfit]


def _tell(found: Found, verdict: Verdict) -> None:
    found.training = stricter(found.training, verdict.training)
    found.answering = stricter(found.answering, verdict.answering)
    found.figures = {name: max(figure, found.figures.get(name, 0.0)) for name, figure in verdict.figures.items()}
    words: dict[Together, Word] = {"any": "works", "alike": "equal lengths", "alone": "one by one"}
    found.word = words[stricter(found.training, found.answering)]


def _learn(found: Found, pet: PETConfig, verdict: Verdict, place: Workplace) -> None:
    """Learn a task for some steps, store the version, load it again and ask both."""
    tokenizer, store = place.tokenizer, place.store
    task = _task(tokenizer, is_encoder_decoder=bool(place.backbone.config.is_encoder_decoder))
    settings = LearningSettings(
        method=find_method("sequential")(),
        pet=pet,
        attention=AttentionConfig(),
        reflection=ReflectionConfig(),
        train=TrainConfig(learning_rate=3e-3, epochs=STEPS, batch_size=ROWS, precision="float32"),
        evaluation=EvaluationConfig(),
        seed=0,
    )
    learnt = LearntTask(
        name=task.name, definition=task.definition, template=task.template, metric=task.metric, **LENGTHS
    )
    try:
        apart = replace(place, sharing=Sharing(**verdict.otherwise))
        manifest, curve = learn_task(apart, settings, task, learnt, parent=None, kept=())
        pool = load_pool(manifest, store, place.backbone)
        answers = [_answered(SaptModel(place.backbone, pool, apart.sharing), tokenizer, task)]
        loading._load_cached.cache_clear()  # so that the backbone is read again too
        answers.append(_answered(load_version(manifest, store, task.name)[0], tokenizer, task))
        if not torch.equal(*(weights for _, weights in answers)) or answers[0][0] != answers[1][0]:
            found.notes.append(f"{pet.type}: a version that is loaded again answers otherwise")
        if len({entry["loss"] for entry in curve}) == 1:
            found.notes.append(f"{pet.type}: {STEPS} steps changed nothing")
    except Exception as error:
        found.word = "refused"
        found.notes.append(f"{pet.type}: {_said(error)}")


def _answered(model: SaptModel, tokenizer: PreTrainedTokenizerBase, task: PreparedTask) -> tuple[list[str], Tensor]:
    return answer(model, tokenizer, list(task.test), EvaluationConfig(), max_new_tokens=4, precision="float32")


def _task(tokenizer: PreTrainedTokenizerBase, *, is_encoder_decoder: bool) -> PreparedTask:
    (task,) = load_sequence(BenchmarkConfig(suite="synthetic", tasks=("animal",), train_rows=ROWS, test_rows=4))
    return prepare_task(task, tokenizer, **LENGTHS, is_encoder_decoder=is_encoder_decoder)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    kept: dict[str, Any] = json.loads(path.read_text())
    return kept["classes"] if kept["transformers"] == version("transformers") else {}


def _write(path: Path, results: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"transformers": version("transformers"), "classes": results}, indent=1))
    part.replace(path)


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table in Markdown: how many of each kind, then all that were tried."""
    tried = {key: found for key, found in results.items() if found["word"] not in {"not text", "not tried"}}
    counts = Counter(found["word"] for found in tried.values())
    said = ", ".join(f"{count} {word}" for word, count in counts.most_common())
    left = Counter(found["word"] for key, found in results.items() if key not in tried)
    lines = [
        f"Made by `python -m benchmarks.backbones` with transformers {version('transformers')}. "
        f"Of {len(tried)} classes: {said}. "
        f"Left out: {left['not text']} that read pictures or sound or are parts of other models"
        + (f", {left['not tried']} that could not be made small." if left["not tried"] else "."),
        "",
        "| Class | Type | Verdict | Soft prompts | Checkpointing | Remarks |",
        "|---|---|---|---|---|---|",
    ]
    for key, found in sorted(tried.items(), key=lambda item: (item[1]["name"].lower(), item[0])):
        refused = found["word"] == "refused"
        marks = ["" if refused else "yes" if found[field] else "no" for field in ("prompts", "checkpointing")]
        cells = [found["name"], key.partition("/")[2], found["word"], *marks, _remarks(found)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _remarks(found: Mapping[str, Any]) -> str:
    unfit: dict[str, list[str]] = {}
    for name, why in found["unfit"].items():
        unfit.setdefault(why, []).append(f"`{name}`")
    parts = [f"not LoRA on {', '.join(names)}: {why}" for why, names in unfit.items()]
    beyond = [name for name, figure in found["figures"].items() if figure > ALLOWED]
    parts += [f"moves: {', '.join(beyond)}"] if beyond else []
    parts += found["notes"]
    return "; ".join(parts).replace("|", "/")


if __name__ == "__main__":
    main()
