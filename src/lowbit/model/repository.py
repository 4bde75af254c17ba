"""The files of a model: those of a local folder or of a hub repository, whatever is in them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import LowbitError
from .hub import hub_file, hub_files

_ADAPTER = "adapter_config.json"
_MERGE = "merge it into the model first (peft: merge_and_unload, then save_pretrained)"
TEMPLATES = "additional_chat_templates/"  # where transformers saves chat templates that have names


@dataclass(frozen=True)
class Repository:
    """Where a model's files are.

    Attributes:
        name: as it was given. folder: the local one, None of a hub repository. revision: hub
            branch, tag or commit.
    """

    name: str
    folder: Path | None
    revision: str | None = None

    @classmethod
    def of(cls, model: str | Path, revision: str | None = None) -> Repository:
        """The files of a model that has a config.json; of a hub, at the commit that its branch
        points at now.

        Args:
            model: a local folder or a hub repository id.

        Raises:
            LowbitError: no such folder or repository, no config.json in it, or the hub cannot be
                reached.
        """
        found = cls(str(model), Path(model) if Path(model).is_dir() else None, revision)
        if found.folder is None and Path(model).exists():
            raise LowbitError(
                f"'{model}' is a file: give the folder that holds config.json and the safetensors, "
                "or a GGUF file."
            )
        if found.folder is None and (
            str(model).startswith((".", "/", "~")) or str(model).count("/") != 1
        ):
            raise LowbitError(f"no such folder: '{model}'.")
        config = found.file("config.json")
        if config is None:
            found._refuse_bare_adapter()
            raise LowbitError(f"'{found.name}' has no config.json: {found._instead()}")
        # What is pushed to the branch later is another model.
        at_commit = found.folder is None and config.parent.parent.name == "snapshots"
        return replace(found, revision=config.parent.name) if at_commit else found

    def files(self) -> list[str]:
        """Names of all files at the top and of the named chat templates, sorted; other folders by
        their names, which end in "/".

        Raises:
            LowbitError: the hub cannot be reached.
        """
        if self.folder is not None:
            names = {p.name + "/" * p.is_dir() for p in self.folder.iterdir()}
            names |= {
                TEMPLATES + p.name for p in (self.folder / TEMPLATES).glob("*") if p.is_file()
            }
        else:
            listed = hub_files(self.name, self.revision)
            names = {
                n if "/" not in n or n.startswith(TEMPLATES) else n.partition("/")[0] + "/"
                for n in listed
            }
        return sorted(names - {TEMPLATES})

    def is_regular(self, name: str) -> bool:
        """Whether a listed name is a file with bytes, not a link that leads nowhere or a pipe; of a
        hub all are.
        """
        return self.folder is None or (self.folder / name).is_file()

    def file(self, name: str) -> Path | None:
        """Path of one file of the model, fetched from the hub if need be; None if the model has no
        such file.

        Raises:
            LowbitError: the hub cannot be reached.
        """
        if self.folder is None:
            return hub_file(self.name, name, self.revision)
        path = self.folder / name
        return path if path.is_file() else None

    def read_json(self, name: str) -> dict[str, Any]:
        """What a file that is there says.

        Raises:
            LowbitError: it holds no JSON object.
        """
        path = self.file(name)
        assert path is not None  # the caller has found it
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as e:
            raise LowbitError(f"{path} is not readable JSON ({e}). Download it again.") from e
        if not isinstance(data, dict):
            raise LowbitError(f"{path} does not hold a JSON object. Download it again.")
        return data

    def refuse_adapter(self) -> None:
        """Raise LowbitError if an adapter is there: transformers would add it to the weights, which
        it is not part of.
        """
        path = self.file(_ADAPTER)
        if path is not None:
            raise LowbitError(
                f"{path} says that an adapter belongs to these weights: {_MERGE}, or move the "
                "adapter's files away."
            )

    def _refuse_bare_adapter(self) -> None:
        path = self.file(_ADAPTER)
        if path is None:
            return
        base = self.read_json(_ADAPTER).get("base_model_name_or_path")
        of = f"'{base}'" if isinstance(base, str) and base else "a base model that it does not name"
        raise LowbitError(
            f"'{self.name}' holds an adapter of {of} and no model ({path}): {_MERGE}."
        )

    def _instead(self) -> str:
        """What a folder without a config.json may be meant for."""
        found = sorted(p.name for p in self.folder.glob("*.gguf")) if self.folder else []
        if found:
            return f"to quantize '{found[0]}' in it, give that file."
        return "is it a Hugging Face model folder?"
