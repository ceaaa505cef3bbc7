"""Whether there is a model where the user says, before a server or an engine starts in vain."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from trimtab.core.errors import BadInput


def check_model(model: Path | str, environment: Mapping[str, str] | None = None) -> None:
    """Refuses a folder or a name that leads to no model.

    Args:
        model: a folder with a Hugging Face model, or a model's name.
        environment: variables that the server gets over this process's own.

    Raises:
        BadInput: there is no such folder, it holds no ``config.json``, or neither this machine nor
            the hub has a model of this name.
    """
    path = Path(model)
    looks_like_path = isinstance(model, Path) or model.startswith((".", "/", "~"))
    if looks_like_path and not path.is_dir():
        raise BadInput("there is no such folder", where=str(path), fix="give a model's folder")
    if "://" in str(model):
        return  # an object store, which vLLM knows
    if not path.is_dir():
        _check_name(str(model), _offline({**os.environ, **(environment or {})}))
    elif not (path / "config.json").is_file():
        raise BadInput(
            "the folder holds no config.json",
            where=str(path),
            fix="give a Hugging Face model's folder",
        )


def _offline(environment: Mapping[str, str]) -> bool:
    return environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _check_name(name: str, offline: bool) -> None:
    """Asks for the model's configuration, a small file that vLLM reads first too."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        hf_hub_download(name, "config.json", local_files_only=offline)
    except HFValidationError:
        fault, fix = "this is neither a folder nor a model's name", "give one, such as org/model"
    except GatedRepoError:
        fault, fix = "the hub gives this model to those it has let in", "set HF_TOKEN"
    except RepositoryNotFoundError:
        fault, fix = "the hub has no such model", "look for a slip of the pen"
    except LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        fault, fix = f"the model is not on this machine, and {why}", "download it, or give a folder"
    except (EntryNotFoundError, HfHubHTTPError):
        return  # a model without a config.json, or a hub out of order: vLLM says more
    else:
        return
    raise BadInput(fault, where=f"model {name!r}", fix=fix)
