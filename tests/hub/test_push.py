"""Atomic publication of a folder by `push_folder`, `segformer push` and the Trainer."""

import json
import os
import re
import socket
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from hf_segformer.hub.endpoint import HANDLER_FILES
from tests.support.hub import CODE, NEEDS_AUTO_IMAGE_PROCESSOR, SEGMENTATION, WITH_SPACE, assert_refused, run_command
from tests.support.hub_server import Blob, Repository
from tests.support.remote_code import LABELS, Client, load, save

STRAY = (
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "training_args.bin",
    "notes.txt",
    "secret.py",
    "checkpoint-2/model.safetensors",
    "runs/events.out.tfevents.1",
)
MEASURED = {"metrics.json", "training.json", "curve.png", "prediction.png", "confusion.png"}


def push(folder, repo_id, **options):
    """Publish a folder; returns the commit's id and URL."""
    from unittest import mock

    from hf_segformer.hub.push import push_folder

    with mock.patch("time.sleep"):
        commit = push_folder(folder, repo_id, **options)
    return commit.oid, str(commit)


def push_and_listen(folder, repo_id):
    """Publish a folder; returns the warnings."""
    from unittest import mock

    with mock.patch("hf_segformer.hub.push.logger") as logger:
        push(folder, repo_id)
    return [call.args[0] for call in logger.warning.call_args_list]


def train_and_push(folder, repo_id, **arguments):
    """Train for two steps and publish by `Trainer.push_to_hub`; returns the model's answer."""
    import numpy
    from datasets import Dataset
    from transformers import TrainingArguments

    from hf_segformer.config import AugmentationConfig
    from hf_segformer.data.torch_datasets import EvalDataset, TrainDataset, collate
    from hf_segformer.evaluation.mean_iou import MeanIoU
    from hf_segformer.training.trainer import SegFormerTrainer
    from tests.support.remote_code import answer, new_model, new_processor

    random = numpy.random.default_rng(0)
    rows = [
        {
            "image": Image.fromarray(random.integers(0, 256, (40, 56, 3), dtype=numpy.uint8)),
            "label": Image.fromarray(random.integers(0, 3, (40, 56), dtype=numpy.uint8)),
        }
        for _ in range(4)
    ]
    data, processor, metric = Dataset.from_list(rows), new_processor(), MeanIoU(3)

    def compute_metrics(evaluation, compute_result):
        metric.add_batch(predictions=evaluation.predictions, references=evaluation.label_ids)
        return metric.compute() if compute_result else {}

    def predict(logits, labels):
        import torch

        size = labels.shape[-2:]
        return torch.nn.functional.interpolate(logits, size=size, mode="bilinear").argmax(dim=1)

    trainer = SegFormerTrainer(
        model=new_model("AutoModelForSemanticSegmentation", 0),
        args=TrainingArguments(
            output_dir=folder,
            max_steps=2,
            per_device_train_batch_size=2,
            eval_strategy="steps",
            eval_steps=2,
            logging_steps=1,
            save_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            batch_eval_metrics=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            hub_model_id=repo_id,
            **arguments,
        ),
        train_dataset=TrainDataset(data, AugmentationConfig(crop_size=32), processor, seed=0),
        eval_dataset=EvalDataset(data, processor),
        data_collator=collate,
        processing_class=processor,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=predict,
    )
    trainer.train()
    trainer.push_to_hub()
    return answer(trainer.model)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def user(hub, home):
    client = Client(home / "user", hub.url)
    yield client
    client.close()


@pytest.fixture(scope="module")
def expected():
    return {}


@pytest.fixture
def folder(author, expected, tmp_path):
    """A trained model's folder, with files that must not be published."""
    folder = tmp_path / "trained"
    expected["answer"] = author(save, SEGMENTATION, str(folder))
    for name in STRAY:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("stray")
    for name in MEASURED:
        if name.endswith(".png"):
            Image.new("RGB", (3, 2)).save(folder / name)
    names = list(LABELS.values())
    classes = [{"name": name, "iou": 0.5, "accuracy": 0.75, "pixels": 10} for name in names]
    scores = {"mean_iou": 0.5, "mean_accuracy": 0.75, "overall_accuracy": 0.8}
    (folder / "metrics.json").write_text(json.dumps({**scores, "classes": classes}))
    (folder / "training.json").write_text(json.dumps({"steps": 3}))
    return str(folder)


def test_a_push_publishes_the_files_of_the_model_and_nothing_else(hub, author, folder):
    oid, url = author(push, folder, "me/whole")
    repository = hub.repositories["me/whole"]
    belongs = {"README.md", "model.safetensors", "config.json", "preprocessor_config.json", *HANDLER_FILES}
    assert repository.files().keys() == belongs | CODE | MEASURED | {".gitattributes"}
    assert len(repository.commits) == 2  # the empty one that every repository starts with, and ours
    assert repository.branches["main"] == oid
    assert url == f"{hub.url}/me/whole/commit/{oid}"


def test_a_published_model_loads_by_repo_id_with_and_without_the_plugin(author, user, folder, expected):
    oid, _ = author(push, folder, "me/loads")
    pinned = {"trust_remote_code": True, "revision": oid, "code_revision": oid}
    for client, options in (
        (author, {}),
        (author, pinned),
        (user, pinned),
        (user, {"trust_remote_code": True}),
    ):
        _, answer = client(load, SEGMENTATION, "me/loads", **options)
        np.testing.assert_allclose(answer, expected["answer"], atol=1e-6)  # sums of another order


def test_the_card_names_the_repository_and_holds_the_measured_numbers(hub, author, folder):
    author(push, folder, "me/carded")
    card = ModelCard(hub.repositories["me/carded"].files()["README.md"].content.decode())
    assert 'from_pretrained("me/carded")' in card.text
    assert {result.metric_type: result.metric_value for result in card.data.eval_results}["mean_iou"] == 0.5


def test_example_images_are_published_and_removed_with_the_next_push(hub, author, folder):
    (Path(folder) / "examples").mkdir()
    Image.new("RGB", (3, 2)).save(Path(folder) / "examples" / "corner.png")
    author(push, folder, "me/shown")
    assert "examples/corner.png" in hub.repositories["me/shown"].files()
    (Path(folder) / "examples" / "corner.png").unlink()
    author(push, folder, "me/shown")
    assert "examples/corner.png" not in hub.repositories["me/shown"].files()


def test_an_edited_card_is_published_unchanged(hub, author, folder):
    (Path(folder) / "README.md").write_text("# Mine\n")
    author(push, folder, "me/edited")
    assert hub.repositories["me/edited"].files()["README.md"].content == b"# Mine\n"


def test_a_card_that_was_edited_on_the_hub_is_kept(hub, author, folder):
    author(push, folder, "me/kept")
    repository = hub.repositories["me/kept"]
    rendered = repository.files()["README.md"].content
    edited = rendered.replace(b"\n<!-- Rendered", b"\nMore.\n<!-- Rendered")
    licence = b"---\nlicense: mit\n---\n"  # as the Hub begins a repository
    assert edited != rendered
    theirs = b"# Theirs\n"
    for there, expected in ((edited, edited), (theirs, theirs), (rendered, rendered), (licence, rendered)):
        repository.commit("main", {**repository.files(), "README.md": Blob(there)})
        warnings = author(push_and_listen, folder, "me/kept")
        assert repository.files()["README.md"].content == expected
        kept = "README.md of me/kept was edited there and is kept; delete it there to publish a new one"
        assert warnings == ([] if expected == rendered else [kept])
    repository.commit("main", {**repository.files(), "README.md": Blob(edited)})
    (Path(folder) / "README.md").write_text("# Mine\n")
    assert not author(push_and_listen, folder, "me/kept")
    assert repository.files()["README.md"].content == b"# Mine\n"


def test_a_push_can_leave_the_handler_out(hub, author, folder):
    assert author(run_command, folder, "me/bare", "--without-handler")[0] == 0
    assert not hub.repositories["me/bare"].files().keys() & set(HANDLER_FILES)


@pytest.mark.parametrize("name", HANDLER_FILES)
def test_a_handler_of_somebody_else_is_kept(name, hub, author, folder):
    repo_id = f"me/own-{name.split('.')[0]}"
    for _ in range(2):  # its own one is replaced
        assert author(run_command, folder, repo_id)[0] == 0
    repository = hub.repositories[repo_id]
    repository.commit("main", {**repository.files(), name: Blob(b"# mine")})
    assert_refused(author, folder, repo_id, f"{repo_id} holds a {name} of its own", "--without-handler")
    assert author(run_command, folder, repo_id, "--without-handler")[0] == 0
    assert repository.files()[name].content == b"# mine"


def test_a_second_push_is_a_new_revision_without_outdated_files(hub, author, folder, tmp_path):
    author(push, folder, "me/again")
    (Path(folder) / "metrics.json").unlink()
    author(push, folder, "me/again")
    repository = hub.repositories["me/again"]
    assert len(repository.commits) == 3
    assert "metrics.json" not in repository.files()


def test_a_push_to_a_branch_leaves_main_alone(hub, author, folder):
    author(push, folder, "me/branched", private=True)
    main = hub.repositories["me/branched"].branches["main"]
    (Path(folder) / "README.md").write_text("# Mine\n")
    oid, _ = author(push, folder, "me/branched", revision="next")
    assert hub.repositories["me/branched"].branches == {"main": main, "next": oid}
    assert hub.repositories["me/branched"].private


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "'bert'"),
        (lambda folder: (folder / "config.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10"), "model.safetensors is damaged"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json"),
        (lambda folder: (folder / "modeling_segformer.py").unlink(), "modeling_segformer.py"),
        (lambda folder: (folder / "image_io_segformer.py").unlink(), "image_io_segformer.py"),
    ],
    ids=[
        "no-config",
        "another-network",
        "no-json",
        "no-weights",
        "cut-weights",
        "no-processor",
        "no-code",
        "no-import",
    ],
)
def test_a_faulty_folder_is_refused_before_any_request(spoil, word, hub, author, folder):
    spoil(Path(folder))
    before = len(hub.requests)
    assert_refused(author, folder, "me/faulty", word)
    assert len(hub.requests) == before


def test_a_name_without_an_owner_is_refused(author, folder):
    assert_refused(author, folder, "lonely", "'lonely'", "owner/name")


@pytest.mark.slow
def test_without_a_token_the_author_is_asked_to_sign_in(hub, home, folder):
    client = Client(home / "unsigned", hub.url, has_plugin=True)
    try:
        assert_refused(client, folder, "me/unsigned", "no access token", "hf auth login")
    finally:
        client.close()


@pytest.mark.slow
def test_a_rejected_token_is_an_error(hub, home, folder):
    client = Client(home / "rejected", hub.url, "hf_wrong", has_plugin=True)
    try:
        assert_refused(client, folder, "me/rejected", "rejects the access token")
    finally:
        client.close()
    assert "me/rejected" not in hub.repositories


@pytest.mark.slow
def test_no_network_is_an_error(home, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    client = Client(home / "alone", url, "hf_me", has_plugin=True)
    try:
        assert_refused(client, folder, "me/alone", "cannot be reached", url)
    finally:
        client.close()


def test_no_right_to_write_is_an_error(hub, author, folder):
    assert_refused(author, folder, "you/theirs", "no right to write to you/theirs")
    assert "you/theirs" not in hub.repositories


def test_another_network_under_the_name_is_left_as_it_is(hub, author, folder):
    hub.repositories["me/bert"] = Repository("me/bert")
    hub.repositories["me/bert"].commit("main", {"config.json": Blob(b'{"model_type": "bert"}')})
    before = dict(hub.repositories["me/bert"].branches)
    assert_refused(author, folder, "me/bert", "'bert'", "another name")
    assert hub.repositories["me/bert"].branches == before


FAILURES = [("PUT /storage/", 500), ("POST .*/commit/", 503), ("POST .*/commit/", 403), ("POST .*/preupload/", 500)]
FAILURE_NAMES = ["weights", "commit", "no-right", "start"]


@pytest.mark.parametrize(("pattern", "status"), FAILURES, ids=FAILURE_NAMES)
def test_a_failed_push_deletes_the_new_repository(pattern, status, hub, author, folder, request):
    repo_id = f"me/new-{request.node.callspec.id}"
    author(save, SEGMENTATION, folder, seed=1 + FAILURES.index((pattern, status)))  # weights that the Hub has not seen
    hub.fail(pattern, status, times=30)
    assert_refused(author, folder, repo_id, "nothing was published", "right" if status == 403 else str(status))
    assert hub.serve_all() < 30
    assert repo_id not in hub.repositories
    assert author(push, folder, repo_id)


@pytest.mark.parametrize(("pattern", "status"), FAILURES, ids=FAILURE_NAMES)
def test_a_failed_push_leaves_the_published_revision(pattern, status, hub, author, folder, request, tmp_path):
    repo_id = f"me/old-{request.node.callspec.id}"
    author(push, folder, repo_id)
    branches = dict(hub.repositories[repo_id].branches)
    author(save, SEGMENTATION, folder, seed=11 + FAILURES.index((pattern, status)))
    hub.fail(pattern, status, times=30)
    assert_refused(author, folder, repo_id, "nothing was published", options=("--revision", "next"))
    assert hub.serve_all() < 30
    assert hub.repositories[repo_id].branches == branches


def test_a_broken_connection_is_an_error(hub, author, folder):
    hub.drop("POST .*/commit/", times=30)
    assert_refused(author, folder, "me/broken", "nothing was published", "cannot be reached")
    assert hub.undrop() < 30
    assert "me/broken" not in hub.repositories


def test_the_command_says_where_it_is_and_how_to_load_just_this(hub, author, folder):
    status, out, err = author(run_command, folder, "me/command", "--private")
    oid = hub.repositories["me/command"].branches["main"]
    assert (status, err) == (0, "")
    assert f"{hub.url}/me/command/commit/{oid}" in out
    assert f'from_pretrained("me/command", revision="{oid}"' in out
    assert f'code_revision="{oid}"' in out
    assert hub.repositories["me/command"].private


@pytest.mark.parametrize(
    ("auto_class", "own_class"),
    [
        ("AutoModel", "SegFormerModel"),
        ("AutoModelForImageClassification", "SegFormerForImageClassification"),
    ],
)
def test_a_model_without_a_segmentation_head_has_its_own_class_and_no_handler(
    hub, author, folder, tmp_path, auto_class, own_class
):
    other, repo_id = str(tmp_path / "other"), f"me/{own_class}"
    author(save, auto_class, other)
    author(push, folder, repo_id)
    assert_refused(author, other, repo_id, "expected segmentation for a Space", options=(WITH_SPACE,))
    assert set(HANDLER_FILES) <= hub.repositories[repo_id].files().keys()
    status, out, _ = author(run_command, other, repo_id)
    assert status == 0
    assert not set(HANDLER_FILES) & hub.repositories[repo_id].files().keys()
    assert f"  {own_class}.from_pretrained(" in out
    assert f"  {auto_class}.from_pretrained(" in out


@NEEDS_AUTO_IMAGE_PROCESSOR
def test_a_trainer_publishes_model_processor_code_and_our_card(hub, author, user, tmp_path):
    expected = author(train_and_push, str(tmp_path / "run"), "me/trained")
    files = hub.repositories["me/trained"].files()
    belongs = {
        "README.md",
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
        "training.json",
        "curve.png",
    }
    assert files.keys() == belongs | CODE | {".gitattributes"}
    card = ModelCard(files["README.md"].content.decode())
    assert {result.metric_type for result in card.data.eval_results} >= {"mean_iou", "overall_accuracy"}
    assert 'from_pretrained("me/trained")' in card.text
    assert "| disc |" in card.text
    _, answer = user(load, SEGMENTATION, "me/trained", trust_remote_code=True)
    np.testing.assert_allclose(answer, expected, atol=1e-6)  # sums of another order


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_a_trainer_that_pushes_while_it_trains_publishes_no_token_user_or_host(hub, author, tmp_path, strategy):
    repo_id, token = f"me/{strategy}", "hf_me"
    arguments = {"push_to_hub": True, "hub_strategy": strategy, "hub_token": token, "hub_always_push": True}
    author(train_and_push, str(tmp_path / "run"), repo_id, **arguments)
    repository = hub.repositories[repo_id]
    assert len(repository.commits) > 3
    for files in repository.commits.values():
        assert not [name for name in files if Path(name).name.startswith((".segformer", ".run", "training_args"))]
        assert not [name for name, blob in files.items() if token.encode() in blob.content]
    kept = {name for name in repository.files() if name.startswith("last-checkpoint/")}
    resumed = {f"last-checkpoint/{name}" for name in ("optimizer.pt", "trainer_state.json", "model.safetensors")}
    assert kept >= resumed if strategy == "checkpoint" else not kept


def run_guide(folder):
    """Run the README's notebook, in a folder with its images."""
    import datasets
    import numpy

    os.chdir(folder)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    random = numpy.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    for split in ("train", "validation"):
        rows = [
            {
                "image": Image.fromarray(random.integers(0, 256, (96, 128, 3), dtype=numpy.uint8)),
                "label": Image.fromarray(random.integers(0, 3, (96, 128), dtype=numpy.uint8)),
            }
            for _ in range(4)
        ]
        datasets.Dataset.from_list(rows, features=features).to_parquet(f"streets/{split}.parquet")
    text = (Path(__file__).parents[2] / "docs/guides/fine-tune.md").read_text(encoding="utf-8")
    [code] = [block for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S) if "push_to_hub" in block]
    exec(compile(code, "fine-tune.md", "exec"), {"__name__": "example"})
    return len(code.splitlines())


@pytest.mark.slow
def test_the_guides_trainer_example_runs_and_publishes(hub, author, tmp_path):
    (tmp_path / "streets").mkdir()
    assert author(run_guide, str(tmp_path)) <= 25
    files = hub.repositories["me/streets"].files()
    assert ModelCard(files["README.md"].content.decode()).data.eval_results[0].metric_value >= 0
    assert {"model.safetensors", "preprocessor_config.json", "modeling_segformer.py"} <= files.keys()
