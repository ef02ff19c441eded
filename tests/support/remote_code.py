"""Processes of the Hub tests: an author who has the plugin, and users who have not.

The Hub's client reads its environment when it is imported, and imports cannot be undone, so each
part is played in a fresh process. This file imports nothing heavy at its top: the environment comes first.
"""

import contextlib
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from unittest import mock

HEIGHT, WIDTH = 40, 56
LABELS = {0: "disc", 1: "bar", 2: "ring"}


def _enter(environment: dict[str, str], folder: str, has_plugin: bool) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if not has_plugin:
        sys.modules["hf_segformer"] = None  # from now on `import` refuses it


def _import() -> None:
    import transformers  # noqa: F401


class Client:
    """A process in which functions of this module run; it comes with a home and a cache of its own.

    Args:
        home: an empty folder, where it also works.
        endpoint: the Hub's address.
        token: what it signs in with, if at all.
        has_plugin: whether `hf_segformer` can be imported.

    Attributes:
        modules: where Transformers puts a checkpoint's code before it runs.
    """

    def __init__(self, home: Path, endpoint: str, token: str | None = None, has_plugin: bool = False):
        home.mkdir()
        self.modules = home / "hf" / "modules"
        environment = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HOME": str(home),
            "OMP_NUM_THREADS": "1",
            "PATH": os.environ["PATH"],
        } | ({"HF_TOKEN": token} if token else {})
        self._pool = ProcessPoolExecutor(
            max_workers=1,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_enter,
            initargs=(environment, str(home), has_plugin),
        )
        self._pool.submit(_import)  # waits for nobody, so that several clients start at the same time

    def __call__(self, function, *arguments, **options):
        """Run a function there; returns its result, or raises its error."""
        return self._pool.submit(function, *arguments, **options).result(timeout=120)

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


def can_import(name: str) -> bool:
    """Return True if a module can be imported here."""
    with contextlib.suppress(ImportError):
        __import__(name)
        return True
    return False


def answer(model):
    """Run a model on a fixed input; returns logits, or the deepest features."""
    import torch

    pixel_values = torch.linspace(-2, 2, 3 * HEIGHT * WIDTH).reshape(1, 3, HEIGHT, WIDTH)
    with torch.no_grad():
        output = model.eval()(pixel_values)[0]
    return (output[-1] if isinstance(output, tuple) else output).numpy()


def image():
    """A fixed image, not square and not of the processor's size."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 61, 3), dtype=np.uint8))


def new_model(auto_class: str, seed: int):
    """A tiny model of the kind that an Auto class loads; the author's."""
    import torch
    import transformers

    import hf_segformer

    config = hf_segformer.SegFormerConfig(
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        id2label=LABELS,
    )
    torch.manual_seed(seed)
    return getattr(transformers, auto_class).from_config(config)


def new_processor():
    """A processor whose size is not the default; the author's."""
    import hf_segformer

    return hf_segformer.SegFormerImageProcessor(size={"height": HEIGHT, "width": WIDTH})


def publish(auto_class: str, repo_id: str, seed: int = 0, **options):
    """Push a new model and a processor; returns the model's answer."""
    model = new_model(auto_class, seed)
    model.push_to_hub(repo_id, **options)
    new_processor().push_to_hub(repo_id, **options)
    return answer(model)


def publish_impatiently(auto_class: str, repo_id: str, seed: int):
    """`publish`, with no pause before the client tries again."""
    with mock.patch("time.sleep"):
        return publish(auto_class, repo_id, seed)


def save(auto_class: str, folder: str, seed: int = 0):
    """Save a new model and a processor to a folder; returns the model's answer."""
    model = new_model(auto_class, seed)
    model.save_pretrained(folder)
    new_processor().save_pretrained(folder)
    return answer(model)


def upload(folder: str, repo_id: str, token: str) -> None:
    """Push a folder as it is."""
    from huggingface_hub import create_repo, upload_folder

    create_repo(repo_id, token=token)
    upload_folder(folder_path=folder, repo_id=repo_id, token=token)


def tag(repo_id: str, name: str) -> None:
    """Give the main branch's newest commit a name."""
    from huggingface_hub import create_tag

    create_tag(repo_id, tag=name)


def _load(auto_class: str, source: str, **options):
    import transformers

    return getattr(transformers, auto_class).from_pretrained(source, **options)


def attempt(auto_class: str, source: str, **options) -> None:
    """Load by an Auto class, for the error that it raises."""
    _load(auto_class, source, **options)


def load(auto_class: str, source: str, **options):
    """Load a model by an Auto class; returns the module its code lives in and its answer."""
    model = _load(auto_class, source, **options)
    return type(model).__module__, answer(model)


def load_config(source: str, **options):
    """Load a configuration; returns the module its code lives in, its class's name and its fields."""
    config = _load("AutoConfig", source, **options)
    return type(config).__module__, type(config).__name__, config.to_dict()


def attempt_on(version: str, auto_class: str, source: str) -> None:
    """`attempt`, as a Transformers of another version would."""
    import transformers

    # The first import of the classes' modules restores the version; they are imported before it is replaced.
    import_module(getattr(transformers, auto_class).__module__)
    with mock.patch("transformers.__version__", version):
        _load(auto_class, source, trust_remote_code=True)


def save_again(auto_class: str, source: str, folder: str, **options) -> None:
    """Load by an Auto class, save to a folder."""
    _load(auto_class, source, **options).save_pretrained(folder)


def prepare(source: str | None = None, **options):
    """Run a processor, loaded from a source or the author's own, on the image."""
    processor = _load("AutoImageProcessor", source, **options) if source else new_processor()
    return processor(image(), return_tensors="np")["pixel_values"]


def segment(source: str, **options):
    """Run a pipeline from a source on the image; returns a mask for each label."""
    from transformers import pipeline

    segments = pipeline("image-segmentation", model=source, device="cpu", **options)(image())
    return {segment["label"]: segment["mask"] for segment in segments}


def download(repo_id, folder):
    """Fetch a repository into a folder, as an endpoint does before it starts."""
    from huggingface_hub import snapshot_download

    snapshot_download(repo_id, local_dir=folder)


def answer_requests(folder, *requests):
    """Load handler.py and call it as Hugging Face's inference toolkit does; an error is answered by its text."""
    import json
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("handler", Path(folder) / "handler.py")
    sys.path.insert(0, folder)
    sys.modules["handler"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    handler, answers = module.EndpointHandler(folder), []
    for request in requests:
        try:
            answers.append(json.loads(json.dumps(handler(dict(request)))))
        except ValueError as error:
            answers.append(str(error))
    return answers
