"""What libraries raise for model files that are damaged, and how it is told."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

# transformers looks at what it reads as it uses it, so a damaged file can show as any of these.
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
)

_POINTER = b"version https://git-lfs.github.com/spec/"


def reason(error: Exception) -> str:
    """An error of a library in one line; where its text alone says nothing, with its kind."""
    text = " ".join(line.strip() for line in str(error).splitlines()[:2])
    if isinstance(error, (OSError, ValueError, RuntimeError, ImportError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what git leaves in the place of a large one that was not fetched."""
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER
