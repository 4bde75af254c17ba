"""refine(): a finished artifact polished, its codes as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..artifact.disk import copy_atomic
from ..artifact.files import RECIPE, file_hash
from ..artifact.output import claimed
from ..artifact.proof import read_report
from ..errors import LowbitError, VerificationError
from ..model.calibration import Rows
from ..model.ranks import ALONE, Ranks
from ..recipe import Recipe, load_recipe
from .asked import Asked, Options, Result
from .events import OnBlock, OnStep
from .identity import Original
from .quantize import Run
from .workplace import RESUMES, Workplace


def refine(
    folder: str | Path,
    teacher: str | Path | None = None,
    *,
    out: str | Path,
    settings: Sequence[str] = (),
    calib: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    offload: str = "auto",
    offload_dir: str | Path | None = None,
    progress: OnBlock | None = None,
    watch: OnStep | None = None,
    ranks: Ranks = ALONE,
) -> Result:
    """Polish a finished artifact and write a verified one; continue an unfinished run of the same
    command. What comes out is what its recipe with "+polish" behind it would have made.

    Args:
        folder: an artifact of `quantize`. teacher: the model it was made of, where it lies now;
            None for where it was.
        settings: "polish.option=value". calib: the same text as then, where it lies now.

    The rest is as for `quantize`.

    Raises:
        LowbitError: it is no such artifact, or polished already; the teacher or the text is not
            what it was made of; or as `quantize`.
    """
    start = Start.of(Path(folder))
    recipe, report = start.recipe(settings), start.report
    text = None if calib is None else str(calib)
    given = text, None, None, int(report["seed"]), device, (), False, None, dtype
    asked = Asked(str(teacher or report["model"]), None, recipe, *given)
    options = Options(offload, offload_dir, progress, watch, ranks)
    place = claimed(Path(out), "refine", finished=True, resumes=RESUMES, writes=ranks.first)
    with place as output:
        return Run(asked, options, output, start).result()


@dataclass(frozen=True)
class Start:
    """A finished artifact that a run begins with; a `lowbit.run.quantize.Begun`.

    Attributes:
        folder: where it lies. report: its report.json.
    """

    folder: Path
    report: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> Start:
        """Raises LowbitError if the folder is no artifact that can be polished."""
        report = read_report(folder)
        if "exported_from" in report or "original" not in report:
            raise LowbitError(
                f"'{folder}' is no artifact as quantize writes it ({report.get('format')}): refine "
                "the one that it was exported from."
            )
        return cls(folder, report)

    def recipe(self, settings: Sequence[str]) -> Recipe:
        """The artifact's recipe, and polish.

        Raises:
            LowbitError: it has that already, or a setting is about something else.
        """
        own = load_recipe(str(self.folder / RECIPE))
        if any(entry.role == "polish" for _, entry, _ in own.entries):
            raise LowbitError(
                f"'{self.folder}' is polished already: refine the artifact of its recipe without "
                "polish."
            )
        for setting in settings:
            if not setting.strip().startswith("polish."):
                raise LowbitError(
                    f"--set {setting}: the blocks are done, only polish.OPTION can be set."
                )
        polish = load_recipe("polish", settings=settings)
        last = [m for _, entry, m in polish.entries if entry.role == "polish"]
        return replace(own, methods=(*own.methods, *last), name=f"{own.name}+polish")

    def check(self, original: Original, rows: Rows, format_: str) -> None:
        """Compare what the artifact was made of with what the run has.

        Raises:
            LowbitError: another model, other rows, another format.
        """
        then = self.report["original"]["files"]
        for name in sorted({*then, *original.hashes}):
            if then.get(name) != original.hashes.get(name):
                raise LowbitError(
                    f"'{self.folder}' was not made of '{original.name}' as it is now: '{name}' is "
                    "another file. Name the model it was made of (--teacher)."
                )
        if replace(rows, further=None).sha256 != self.report["calibration"]["sha256"]:
            raise LowbitError(
                f"'{rows.source}' gives other calibration rows than '{self.folder}' was made with: "
                "name the same text (--calib), as it was."
            )
        if format_ != self.report["format"]:
            raise LowbitError(
                f"'{self.folder}' is in the format {self.report['format']}, and this version would "
                f"write {format_}: quantize anew with its recipe and '+polish'."
            )

    def give(self, place: Workplace) -> None:
        """Put the finished shards into the directory of a run that has none of them.

        Raises:
            VerificationError: a file is not what was written.
        """
        if place.finished(0) is not None:
            return
        if place.ranks.first:
            shards: Mapping[str, Any] = self.report["shards"]
            # That outside the blocks last: with it they count as given.
            for number in (*range(1, len(shards)), 0):
                name, shard = list(shards.items())[number]
                copy_atomic(self.folder / name, place.shard(number))
                if file_hash(place.shard(number)) != shard["sha256"]:
                    raise VerificationError(f"'{self.folder / name}' is not what was written.")
                place.note(number, {**self._record(number), "shard": name, **shard})
        place.ranks.broadcast(None)

    def _record(self, number: int) -> dict[str, Any]:
        """What a run noted of a shard, as far as the report repeats it."""
        if not number:
            return {"name": "outside the blocks"}
        held = list(self.report["shards"].values())[number]["tensors"]
        owners = {tensor.rpartition(".")[0] for tensor in held}
        linears = [e for e in self.report["linears"] if "skipped" not in e and e["name"] in owners]
        return {**self.report["blocks"][number - 1], "linears": linears}
