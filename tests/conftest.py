"""What several files of tests need set up and taken down."""

import subprocess
import types

import forked
import pytest
from standin import Hub


@pytest.fixture(scope="session", autouse=True)
def forked_readers():
    """Readers that this process starts do not import torch and transformers each time. Of the
    session, so that fixtures of modules start them so, too.
    """
    from lowbit.artifact.proof import runtimes

    with pytest.MonkeyPatch.context() as patch:
        launch = {**vars(subprocess), "run": forked.run}
        patch.setattr(runtimes, "subprocess", types.SimpleNamespace(**launch))
        yield


@pytest.fixture(autouse=True)
def started_anew(request, monkeypatch):
    """In tests marked ``anew`` readers are started as users start them."""
    if "anew" in request.keywords:
        from lowbit.artifact.proof import runtimes

        monkeypatch.setattr(runtimes, "subprocess", subprocess)


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
