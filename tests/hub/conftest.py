"""A loop-back Hub for each test file, and an author who has the package and may write to it."""

import pytest

from tests.support.hub_server import LoopbackHub
from tests.support.remote_code import Client


@pytest.fixture(scope="module")
def hub():
    """A Hub with the users `me` and `you`."""
    with LoopbackHub({"hf_me": "me", "hf_you": "you"}) as hub:
        yield hub


@pytest.fixture(scope="module")
def author(hub, tmp_path_factory):
    """The user `me`, in a process with the package."""
    client = Client(tmp_path_factory.mktemp("home") / "author", hub.url, "hf_me", has_plugin=True)
    yield client
    client.close()
