"""Checkpoints with their code: pushed by repo id, loaded where `hf_segformer` is not installed."""

import json
import shutil

import numpy as np
import pytest

from tests.support.hub import CODE, NEEDS_AUTO_IMAGE_PROCESSOR, PACKAGE, SEGMENTATION
from tests.support.hub_server import Blob, Repository
from tests.support.remote_code import (
    HEIGHT,
    LABELS,
    WIDTH,
    Client,
    attempt,
    attempt_on,
    can_import,
    load,
    load_config,
    prepare,
    publish,
    publish_impatiently,
    save,
    save_again,
    segment,
    tag,
    upload,
)

MODEL_CLASSES = ["AutoModel", "AutoModelForSemanticSegmentation", "AutoModelForImageClassification", "AutoBackbone"]
MODEL_MAP = {
    "AutoConfig": "configuration_segformer.SegFormerConfig",
    "AutoModel": "modeling_segformer.SegFormerModel",
    "AutoModelForSemanticSegmentation": "modeling_segformer.SegFormerForSemanticSegmentation",
    "AutoModelForImageClassification": "modeling_segformer.SegFormerForImageClassification",
    "AutoBackbone": "modeling_segformer.SegFormerBackbone",
}
PROCESSOR_MAP = {"AutoImageProcessor": "image_processing_segformer.SegFormerImageProcessor"}


def assert_same_answer(answer, expected):
    """Assert equality up to the order of sums, which oneDNN chooses by the addresses of weights."""
    np.testing.assert_allclose(answer, expected, rtol=0, atol=2e-6)


@pytest.fixture(scope="module")
def clients(hub, tmp_path_factory):
    """An author, signed in and with the plugin, and a user who has neither."""
    home = tmp_path_factory.mktemp("home")
    clients = Client(home / "author", hub.url, "hf_me", has_plugin=True), Client(home / "user", hub.url)
    yield clients
    for client in clients:
        client.close()


@pytest.fixture(scope="module")
def author(clients):
    return clients[0]


@pytest.fixture(scope="module")
def user(clients):
    return clients[1]


@pytest.fixture(scope="module")
def answers(author):
    """A repository of each kind of model, `me/<Auto class>`; what the pushed models answered."""
    return {name: author(publish, name, f"me/{name}") for name in MODEL_CLASSES}


@pytest.fixture(scope="module")
def folder(author, tmp_path_factory):
    """A folder as `save_pretrained` leaves it."""
    folder = tmp_path_factory.mktemp("saved") / "shapes"
    author(save, SEGMENTATION, str(folder))
    return folder


def test_a_push_carries_weights_code_and_every_auto_class(hub, answers):
    for name in MODEL_CLASSES:
        files = hub.repositories[f"me/{name}"].files()
        assert files.keys() >= {"model.safetensors", "config.json", "preprocessor_config.json"}
        assert json.loads(files["config.json"].content)["auto_map"] == MODEL_MAP
        assert json.loads(files["preprocessor_config.json"].content)["auto_map"] == PROCESSOR_MAP


def test_a_push_carries_just_the_code_of_the_package(hub, answers):
    files = hub.repositories[f"me/{SEGMENTATION}"].files()
    assert {name for name in files if name.endswith(".py")} == CODE
    for name in CODE:
        assert files[name].content == (PACKAGE / name).read_bytes()


def test_the_user_cannot_import_the_plugin(author, user):
    assert not user(can_import, "hf_segformer")
    assert author(can_import, "hf_segformer")


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_each_auto_class_loads_the_pushed_model_without_the_plugin(name, user, answers):
    module, answer = user(load, name, f"me/{name}", trust_remote_code=True)
    assert module.startswith("transformers_modules.")
    assert_same_answer(answer, answers[name])


@pytest.mark.parametrize("name", ["AutoModel", "AutoBackbone"])
def test_the_encoder_of_a_segmentation_model_loads_without_the_plugin(name, author, user, answers):
    _, expected = author(load, name, f"me/{SEGMENTATION}")
    _, answer = user(load, name, f"me/{SEGMENTATION}", trust_remote_code=True)
    assert_same_answer(answer, expected)
    assert answer.shape != answers[SEGMENTATION].shape or not np.allclose(answer, answers[SEGMENTATION])


def test_the_pushed_config_loads_without_the_plugin(user, answers):
    module, name, values = user(load_config, f"me/{SEGMENTATION}", trust_remote_code=True)
    assert module.startswith("transformers_modules.")
    assert name == "SegFormerConfig"
    assert values["hidden_sizes"] == [8, 8, 16, 16]
    assert values["id2label"] == LABELS


@NEEDS_AUTO_IMAGE_PROCESSOR
def test_the_pushed_processor_loads_without_the_plugin(author, user, answers):
    pixel_values = user(prepare, f"me/{SEGMENTATION}", trust_remote_code=True)
    assert pixel_values.shape == (1, 3, HEIGHT, WIDTH)
    np.testing.assert_array_equal(pixel_values, author(prepare))


@NEEDS_AUTO_IMAGE_PROCESSOR
def test_a_pipeline_by_repo_id_works_without_the_plugin(author, user, answers):
    masks = user(segment, f"me/{SEGMENTATION}", trust_remote_code=True)
    assert masks
    assert masks == author(segment, f"me/{SEGMENTATION}")


@pytest.mark.parametrize("flag", [{}, {"trust_remote_code": False}], ids=["unset", "false"])
def test_without_trust_nothing_loads_and_no_code_is_fetched(flag, hub, user, answers, request):
    repo_id = f"me/doubtful-{request.node.callspec.id}"
    hub.copy(f"me/{SEGMENTATION}", repo_id)
    for name in ["AutoConfig", *MODEL_CLASSES]:
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            user(attempt, name, repo_id, **flag)
    fetched = {line.split("/")[-1] for line in hub.requests if f"/{repo_id}/resolve/" in line}
    assert "config.json" in fetched
    assert not {name for name in fetched if name.endswith(".py")}


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_a_downloaded_model_can_be_published_again_with_its_code(name, user, answers, tmp_path):
    user(save_again, name, f"me/{name}", str(tmp_path), trust_remote_code=True)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == MODEL_MAP
    user(upload, str(tmp_path), f"you/{name}", token="hf_you")
    module, answer = user(load, name, f"you/{name}", trust_remote_code=True)
    assert module.startswith("transformers_modules.you.")
    assert_same_answer(answer, answers[name])


def test_borrowed_code_is_saved_with_the_model(hub, user, answers, tmp_path):
    files = hub.repositories[f"me/{SEGMENTATION}"].files()
    config = json.loads(files["config.json"].content)
    config["auto_map"] = {name: f"me/{SEGMENTATION}--{reference}" for name, reference in MODEL_MAP.items()}
    hub.repositories["you/borrower"] = Repository("you/borrower")
    hub.repositories["you/borrower"].commit(
        "main", {"config.json": Blob(json.dumps(config).encode()), "model.safetensors": files["model.safetensors"]}
    )
    user(save_again, SEGMENTATION, "you/borrower", str(tmp_path), trust_remote_code=True)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == MODEL_MAP
    _, answer = user(load, SEGMENTATION, str(tmp_path), trust_remote_code=True)
    assert_same_answer(answer, answers[SEGMENTATION])


@NEEDS_AUTO_IMAGE_PROCESSOR
def test_a_processor_that_was_pulled_and_is_saved_again_carries_its_code(user, answers, tmp_path):
    user(save_again, "AutoImageProcessor", f"me/{SEGMENTATION}", str(tmp_path), trust_remote_code=True)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["auto_map"] == PROCESSOR_MAP
    assert user(prepare, str(tmp_path), trust_remote_code=True).shape == (1, 3, HEIGHT, WIDTH)


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_with_the_plugin_no_flag_is_needed(name, author, answers):
    module, answer = author(load, name, f"me/{name}")
    assert module == "hf_segformer.modeling_segformer"
    assert_same_answer(answer, answers[name])


def test_with_the_plugin_a_downloaded_model_is_saved_with_its_code(author, answers, tmp_path):
    author(save_again, SEGMENTATION, f"me/{SEGMENTATION}", str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == MODEL_MAP
    assert (tmp_path / "modeling_segformer.py").exists()


@NEEDS_AUTO_IMAGE_PROCESSOR
def test_with_the_plugin_the_processor_needs_no_flag(author, answers):
    np.testing.assert_array_equal(author(prepare, f"me/{SEGMENTATION}"), author(prepare))


def test_with_the_plugin_its_own_code_is_used_even_where_the_flag_is_set(author, answers):
    module, _ = author(load, SEGMENTATION, f"me/{SEGMENTATION}", trust_remote_code=True)
    assert module == "hf_segformer.modeling_segformer"


def test_a_private_model_loads_for_its_owner_only(hub, author, user):
    expected = author(publish, SEGMENTATION, "me/secret", private=True)
    assert hub.repositories["me/secret"].private
    for token in (None, "hf_you"):
        with pytest.raises(OSError, match="private repository"):
            user(load, SEGMENTATION, "me/secret", trust_remote_code=True, token=token)
    _, answer = user(load, SEGMENTATION, "me/secret", trust_remote_code=True, token="hf_me")
    assert_same_answer(answer, expected)


def test_a_push_to_a_foreign_repository_is_refused(hub, author):
    with pytest.raises(Exception, match="403"):
        author(publish, SEGMENTATION, "you/shapes")
    assert "you/shapes" not in hub.repositories


def test_each_revision_and_tag_gives_its_own_weights(hub, author, user):
    first = author(publish, SEGMENTATION, "me/growing", seed=1)
    commit = hub.repositories["me/growing"].branches["main"]
    author(tag, "me/growing", "v1")
    second = author(publish, SEGMENTATION, "me/growing", seed=2)
    branch = author(publish, SEGMENTATION, "me/growing", seed=3, revision="next")
    wanted = {commit: first, "v1": first, "main": second, "next": branch}
    assert len({answer.tobytes() for answer in wanted.values()}) == 3
    for revision, expected in wanted.items():
        _, answer = user(load, SEGMENTATION, "me/growing", revision=revision, trust_remote_code=True)
        assert_same_answer(answer, expected)


@pytest.mark.parametrize("request_pattern", ["PUT /storage/", "POST .*/commit/"], ids=["weights", "commit"])
def test_an_interrupted_upload_leaves_the_previous_revision_whole(request_pattern, hub, author, user, request):
    repo_id = f"me/fragile-{request.node.callspec.id}"
    expected = author(publish, SEGMENTATION, repo_id, seed=1)
    repository = hub.repositories[repo_id]
    commit, files = repository.branches["main"], repository.files()
    hub.drop(request_pattern, times=20)
    with pytest.raises(Exception, match=r"uploading|disconnected"):
        author(publish_impatiently, SEGMENTATION, repo_id, seed=4)
    assert hub.undrop() < 20
    assert repository.branches == {"main": commit}
    assert repository.files() == files
    _, answer = user(load, SEGMENTATION, repo_id, trust_remote_code=True)
    assert_same_answer(answer, expected)
    renewed = author(publish, SEGMENTATION, repo_id, seed=4)
    assert not np.allclose(renewed, expected)
    _, answer = user(load, SEGMENTATION, repo_id, trust_remote_code=True)
    assert_same_answer(answer, renewed)


def test_an_upload_goes_on_after_one_broken_connection(hub, author, user):
    hub.drop("PUT /storage/")
    expected = author(publish_impatiently, SEGMENTATION, "me/patient", seed=5)
    assert hub.undrop() == 0
    _, answer = user(load, SEGMENTATION, "me/patient", trust_remote_code=True)
    assert_same_answer(answer, expected)


def test_a_saved_folder_carries_weights_code_and_every_auto_class(folder):
    assert {path.name for path in folder.iterdir()} == CODE | {
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
    }
    assert json.loads((folder / "config.json").read_text())["auto_map"] == MODEL_MAP
    assert json.loads((folder / "preprocessor_config.json").read_text())["auto_map"] == PROCESSOR_MAP


# Not AutoBackbone: Transformers looks every path up on the Hub there, so that no folder loads, whatever is in it.
@pytest.mark.parametrize("name", MODEL_CLASSES[:3])
def test_each_auto_class_loads_a_folder_without_the_plugin(name, author, user, tmp_path):
    expected = author(save, name, str(tmp_path))
    module, answer = user(load, name, str(tmp_path), trust_remote_code=True)
    assert module.startswith("transformers_modules.")
    assert_same_answer(answer, expected)


def test_without_trust_no_folder_loads_and_no_code_is_copied(user, folder, tmp_path):
    doubtful = shutil.copytree(folder, tmp_path / "doubtful_folder")
    for name in ["AutoConfig", *MODEL_CLASSES[:3]]:
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            user(attempt, name, str(doubtful))
    assert not list(user.modules.rglob("doubtful_folder"))
    user(attempt, "AutoConfig", str(doubtful), trust_remote_code=True)
    assert list(user.modules.rglob("doubtful_folder"))


@NEEDS_AUTO_IMAGE_PROCESSOR
def test_processor_and_pipeline_load_from_a_folder_without_the_plugin(author, user, folder):
    np.testing.assert_array_equal(user(prepare, str(folder), trust_remote_code=True), author(prepare))
    masks = user(segment, str(folder), trust_remote_code=True)
    assert masks
    assert masks == author(segment, str(folder))


@pytest.mark.parametrize(
    "name", ["AutoConfig", SEGMENTATION, pytest.param("AutoImageProcessor", marks=NEEDS_AUTO_IMAGE_PROCESSOR)]
)
@pytest.mark.slow
def test_a_transformers_that_is_too_old_is_named_in_one_line(name, hub, user, answers):
    hub.copy(f"me/{SEGMENTATION}", f"me/newer-{name}")
    with pytest.raises(ImportError) as raised:
        user(attempt_on, "4.57.0", name, f"me/newer-{name}")
    message = str(raised.value)
    assert "transformers 5.17 or newer" in message
    assert "4.57.0" in message
    assert "\n" not in message
