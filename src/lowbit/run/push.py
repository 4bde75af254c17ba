"""Upload of a finished artifact or export to the Hugging Face Hub, verified before the first byte
leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact.files import NOTES, REPORT
from ..artifact.proof import read_report, verify
from ..errors import LowbitError

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class Pushed:
    """What lies on the Hub now.

    Attributes:
        url: of the repository, or of its branch.
        hash: of the artifact.
        tensors: number of tensors verified before the upload.
    """

    url: str
    hash: str
    tensors: int


def push(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Upload a directory to a model repository, which is made if it is not there.

    Args:
        folder: an artifact or an export; what else lies in it goes along.
        repo: "name" or "owner/name".
        private: whether a new repository is private; one that exists stays as it is.
        revision: a branch, made if it is not there.
        token: of the Hub; None takes the one that `hf auth login` stored, or HF_TOKEN.

    Raises:
        LowbitError: not a finished artifact, a bad name, no network, no permission.
        VerificationError: the artifact has changed.
    """
    from huggingface_hub import HfApi, constants

    _check_name(repo)
    report = _finished(folder)
    if constants.HF_HUB_OFFLINE:
        raise LowbitError(
            "HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it and run the same command."
        )
    done = verify(folder, loader=False)
    api = HfApi(token=token, library_name="lowbit")
    try:
        url = _upload(api, folder, report, repo, private, revision)
    # Requests, what answers them and the uploader each have errors of their own.
    except Exception as e:
        raise _sentence(e, repo, api.endpoint, token) from e
    return Pushed(url, report["hash"], done.tensors)


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise LowbitError(
            f"'{repo}' is no name of a repository: write owner/name in letters, digits, '-', '_' "
            "and '.' (not '--', not '..')."
        ) from e


def _upload(
    api: HfApi,
    folder: Path,
    report: Mapping[str, Any],
    repo: str,
    private: bool,
    revision: str | None,
) -> str:
    """Make the repository and the branch, upload the folder, and return where it is."""
    made = api.create_repo(repo, private=private or None, exist_ok=True)
    if revision is not None:
        api.create_branch(made.repo_id, branch=revision, exist_ok=True)
    api.upload_folder(
        folder_path=folder,
        repo_id=made.repo_id,
        revision=revision,
        commit_message=(
            f"{report['recipe']['scheme']}, {report['format']}, hash {report['hash'][:16]}"
        ),
        ignore_patterns=list(NOTES),
    )
    url = f"{api.endpoint}/{made.repo_id}"
    return f"{url}/tree/{revision}" if revision else url


def _finished(folder: Path) -> dict[str, Any]:
    """Return the report of a finished artifact. Raises LowbitError if it is not finished."""
    if folder.resolve().name.endswith(".partial"):
        raise LowbitError(
            f"'{folder}' is not finished: repeat the command that was making it, then push the "
            "directory without '.partial'."
        )
    report = read_report(folder)
    if "verification" not in report:
        raise LowbitError(
            f"'{folder}' is not finished: its {REPORT} says of no verification. Repeat the command "
            "that was making it."
        )
    return report


def _sentence(e: Exception, repo: str, endpoint: str, token: str | None) -> LowbitError:
    """Return what went wrong and what to do, by the Hub's status or by the kind of error."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError

    answer, status = None, None
    if isinstance(e, HfHubHTTPError):
        answer, status = e.server_message, e.response.status_code
    said = " ".join((answer or str(e) or type(e).__name__).split()).rstrip(".")
    if status == 401 and (token or get_token()) is None:
        return LowbitError(
            f"{endpoint} wants to know who pushes to '{repo}': log in with `hf auth login`, set "
            "HF_TOKEN, or give --token."
        )
    if status == 401:
        return LowbitError(
            f"{endpoint} does not take the token for '{repo}': it is wrong or has expired. Make "
            "one that may write, and give --token."
        )
    if status == 403:
        return LowbitError(
            f"the token may not write to '{repo}' on {endpoint} ({said}): take one that may, or a "
            "name of your own."
        )
    if status is not None or isinstance(e, ValueError):
        return LowbitError(
            f"{endpoint} refuses '{repo}'{f' with status {status}' if status else ''}: {said}."
        )
    return LowbitError(
        f"cannot reach {endpoint} to push '{repo}' ({type(e).__name__}: {said}). Check the network "
        "and HF_ENDPOINT, then repeat."
    )
