"""Tiny model folders, made once per session: one for each version of Qwen-Image-Edit."""

import pytest


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Version -> folder of the tiny model."""
    from ccmdist.models.make import make_model

    root = tmp_path_factory.mktemp("tiny-models")
    for version in ("v1", "2509", "2511"):
        make_model("tiny", version, root / version)
    return {version: root / version for version in ("v1", "2509", "2511")}


@pytest.fixture
def tiny_copy(tiny_models, tmp_path):
    """A copy of the tiny 2509 model that a test may damage."""
    import shutil

    return shutil.copytree(tiny_models["2509"], tmp_path / "model")


@pytest.fixture
def node(tmp_path, monkeypatch):
    """The folder of this user on a node of its own."""
    from ccmdist.models.node_folder import node_folder

    monkeypatch.setenv("CCMDIST_NODE_TMP", str(tmp_path / "node"))
    return node_folder()
