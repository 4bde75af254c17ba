"""What several files of tests need set up and taken down."""

import types

import forked
import pytest
from standin import Hub


@pytest.fixture(autouse=True)
def forked_readers(request, monkeypatch):
    """Readers that this process starts do not import torch and transformers each time, but in tests
    marked ``anew``.
    """
    if "anew" in request.keywords:
        return
    from lowbit.artifact.proof import runtimes

    monkeypatch.setattr(
        runtimes,
        "subprocess",
        types.SimpleNamespace(**{**vars(runtimes.subprocess), "run": forked.run}),
    )


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A stand-in for the Hub, to which huggingface_hub in this process talks, without a token."""
    from huggingface_hub import close_session, constants

    hub = Hub()
    for name, value in {
        "ENDPOINT": hub.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    close_session()
    yield hub
    hub.stop()
