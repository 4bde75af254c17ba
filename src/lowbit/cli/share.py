"""The command that gives an artifact to others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from .app import app, out, reported


@app.command()
@reported
def push(
    folder: Annotated[Path, typer.Argument(help="Artifact folder, or an export of one.")],
    repo: Annotated[
        str,
        typer.Argument(
            help="Model repository on the Hugging Face Hub, owner/name; made if it is not there."
        ),
    ],
    private: Annotated[
        bool,
        typer.Option(
            "--private", help="Make a new repository private; one that exists stays as it is."
        ),
    ] = False,
    revision: Annotated[
        Optional[str], typer.Option(help="Branch, made if it is not there. Default: main.")
    ] = None,
    token: Annotated[
        Optional[str],
        typer.Option(
            help="Token that may write. Default: HF_TOKEN, or that of `hf auth login`.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Verify every tensor, then upload the directory to the Hugging Face Hub; prints where it is
    and its hash.
    """
    from ..push import push as send

    with out.status("verifying and uploading"):
        done = send(folder, repo, private=private, revision=revision, token=token)
    out.print(f"{done.url}\nhash {done.hash}, {done.tensors} tensors verified before the upload")
