"""Models on the Hugging Face hub, fetched into its cache on this machine."""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cache
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from sapt_core.backbones.faults import reason
from sapt_core.errors import BackboneError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REACHED_WITHIN = 10  # seconds
# Folders hold other formats of the same weights, and so do the files that Mistral names so.
_OTHER_FORMATS = ["*/*", "consolidated*.safetensors"]


@cache
def fetched(path: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The folder of a hub model's files, named by its commit.

    The hub is asked once a process, and not at all for a commit that is here already. Where it cannot be reached, what
    was fetched earlier does.

    Args:
        path: hub id.
        revision: commit, branch or tag; None is the main branch.
        patterns: of the files that are wanted.

    Raises:
        BackboneError: there is no such model, it is gated, or it can neither be reached nor was fetched before.
    """

    def snapshot(revision: str | None, *, here: bool) -> Path:
        found = snapshot_download(
            path,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=_OTHER_FORMATS,
            local_files_only=here,
        )
        return Path(found)

    if revision is not None and _COMMIT.fullmatch(revision):
        with suppress(OSError):
            return snapshot(revision, here=True)
    try:
        # Asked apart: what fetches files would try again and again, for half a minute, where no hub is reached.
        HfApi().model_info(path, revision=revision, timeout=_REACHED_WITHIN)
        return snapshot(revision, here=False)
    except GatedRepoError as error:
        raise BackboneError(
            f"backbone.path {path}: the model is gated; accept its terms on the hub, and on this machine log in "
            "(hf auth login) or set HF_TOKEN. Other machines need no token: they get the files from the store"
        ) from error
    except RevisionNotFoundError as error:
        raise BackboneError(f"backbone.revision {revision}: the hub's {path} has none of this name") from error
    except RepositoryNotFoundError as error:
        raise BackboneError(
            f"backbone.path {path}: not a model that can be loaded (no such folder, and none on the hub that this "
            "machine may read); give a folder with config.json, or a hub id (owner/name)"
        ) from error
    except (OSError, ValueError, httpx2.HTTPError) as error:
        with suppress(OSError):
            return snapshot(revision, here=True)
        raise BackboneError(
            f"backbone.path {path}: not a model that can be loaded (no such folder, and the hub cannot be reached: "
            f"{reason(error)}); give a folder with config.json, or a hub id while the hub can be reached"
        ) from error
