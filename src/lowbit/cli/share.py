"""The command that gives an artifact to others."""

from __future__ import annotations

from . import options
from .app import app, out, reported


@app.command()
@reported
def push(
    folder: options.ArtifactOrExport,
    repo: options.Repository,
    private: options.Private = False,
    revision: options.Revision = None,
    token: options.Token = None,
) -> None:
    """Verify every tensor, then upload the directory to the Hugging Face Hub; prints where it is
    and its hash.
    """
    from ..run.push import push as send

    with out.status("verifying and uploading"):
        done = send(folder, repo, private=private, revision=revision, token=token)
    out.print(f"{done.url}\nhash {done.hash}, {done.tensors} tensors verified before the upload")
