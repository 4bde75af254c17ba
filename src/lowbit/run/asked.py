"""What a run is asked for, how it is to be carried out, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact.files import RECIPE
from ..artifact.proof import Verification
from ..errors import LowbitError
from ..grid import AnyGrid
from ..grid.names import Scheme, parse_scheme
from ..model.ranks import ALONE, Ranks
from ..recipe import Recipe, load_recipe
from ..recipe.widths import with_bits
from .events import OnBlock, OnStep


@dataclass(frozen=True)
class Asked:
    """What a user asked for; see `quantize`. It decides the artifact's bytes."""

    model: str
    scheme: str | Scheme | AnyGrid | None
    recipe: str | Recipe
    calib: str | None
    samples: int | None
    length: int | None
    seed: int
    device: str
    settings: tuple[str, ...]
    plain: bool
    bos: str | None = None
    dtype: str = "auto"
    bits: str | None = None

    @property
    def command(self) -> list[str]:
        """The words of a command that makes the same artifact. A recipe without a name is the
        recipe.toml that lies in it, whole.
        """
        out = ["lowbit", "quantize", self.model]
        if isinstance(self.recipe, str) and not self.recipe.endswith(".toml"):
            out += ["--recipe", self.recipe]
            for option, value in (
                ("--scheme", self.scheme),
                ("--calib", self.calib),
                ("--samples", self.samples),
                ("--length", self.length),
                ("--bits", self.bits),
                ("--bos", self.bos),
            ):
                if value is not None:
                    out += [option, str(value)]
            for setting in self.settings:
                out += ["--set", setting]
        else:
            out += ["--recipe", RECIPE]
        out += ["--seed", str(self.seed)]
        if self.device != "auto":
            out += ["--device", self.device]
        if self.dtype != "auto":
            out += ["--dtype", self.dtype]
        return [*out, *(["--plain"] if self.plain else []), "-o", "OUT"]

    def resolved(self) -> Recipe:
        """The recipe on the scheme.

        Raises:
            LowbitError: no such recipe, scheme or option.
        """
        scheme = self.scheme
        if isinstance(scheme, str):
            scheme = parse_scheme(scheme)
        elif scheme is not None and not isinstance(scheme, Scheme):
            scheme = Scheme(scheme)
        if isinstance(self.recipe, str):
            found = load_recipe(self.recipe, scheme=scheme, settings=self.settings)
        elif self.settings:
            raise LowbitError(
                "settings change a recipe given by name or file; change the Recipe itself instead."
            )
        else:
            found = self.recipe if scheme is None else self.recipe.with_scheme(scheme)
        return found if self.bits is None else with_bits(found, self.bits)


@dataclass(frozen=True)
class Options:
    """How a run is carried out; changes no byte of the artifact. See `quantize`."""

    offload: str = "auto"
    offload_dir: str | Path | None = None
    progress: OnBlock | None = None
    watch: OnStep | None = None
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class Result:
    """A finished artifact.

    Attributes:
        folder: where it lies.
        report: the contents of its report.json.
        verification: what was checked after writing.
        repeated: an earlier run of the same command had made it; it was only verified again.
    """

    folder: Path
    report: Mapping[str, Any]
    verification: Verification
    repeated: bool = False
