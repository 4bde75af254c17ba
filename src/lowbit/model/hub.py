"""Files of a hub repository, from the network or from the cache."""

from __future__ import annotations

from pathlib import Path

from ..errors import LowbitError


def hub_file(model: str, name: str, revision: str | None = None) -> Path | None:
    """Download (or find in the cache) one file of a hub repository; None if the repository has no
    such file.

    Without a network, a repository whose config.json is cached has the files that are cached and no
    others.

    Raises:
        LowbitError: the repository cannot be reached or does not exist.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except LocalEntryNotFoundError as e:
        if isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str):
            return None
        raise LowbitError(
            f"'{model}' is not a local folder, and '{name}' of that hub repository is neither "
            "cached nor reachable. "
            "Check the path, or the network (HF_HUB_OFFLINE, HF_ENDPOINT)."
        ) from e
    except EntryNotFoundError:
        return None
    except (RepositoryNotFoundError, HFValidationError) as e:
        raise LowbitError(
            f"'{model}' is neither a local folder nor a hub repository you can read."
        ) from e
    except (HfHubHTTPError, OSError) as e:
        raise LowbitError(f"could not fetch '{name}' of '{model}' from the hub: {e}") from e


def hub_files(model: str, revision: str | None = None) -> list[str]:
    """Names of all files of a hub repository; without a network, of those that are cached.

    Raises:
        LowbitError: the repository does not exist or cannot be read.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        found = HfApi().model_info(model, revision=revision).siblings
        return [f.rfilename for f in found or ()]
    except (RepositoryNotFoundError, HFValidationError) as e:
        raise LowbitError(
            f"'{model}' is neither a local folder nor a hub repository you can read."
        ) from e
    except (
        Exception
    ) as e:  # of the hub, of the network, of offline mode: each has a family of its own
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
        if not isinstance(cached, str):
            raise LowbitError(f"the files of '{model}' on the hub cannot be listed: {e}") from e
        snapshot = Path(cached).parent
        return [p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()]
