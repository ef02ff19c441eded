"""The page of `segformer app`: upload an image, see its classes, select them one by one, download the mask.

Gradio builds the page, restricted to this machine: no analytics, no fonts or scripts of other hosts, and the loop-back
address unless another one is given. Uploads are kept in a temporary folder that is removed with the page.
"""

import html
import os
import shutil
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..conversion.checkpoints import fetch_members, is_repository, locate
from ..conversion.ensembles import is_ensemble
from ..hub.examples import find_example_images
from ..inference.predictor import SegFormerPredictor
from ..visualization import Color
from .session import (
    Result,
    predict_upload,
    summary,
    timing,
    write_mask,
    write_overlay,
    write_selection,
)

_OPACITY = 0.6
# Seconds between sweeps of old files and results, and for which they are kept.
_SWEEP, _KEPT = 600, 3600
# Number of the page's files that are kept for Gradio to copy.
_NEWEST = 100
_MAX_UPLOAD = "256mb"
_VISITORS = 200  # whose results are kept, some 10 MB each; the one who was away longest loses theirs
_CARD_FILES = ("README.md", "examples/*", "*.jpg", "*.jpeg", "*.png", "*.webp")
_EMPTY = "Drop an image on the right to see its classes."
_CSS = """
#head h1 { margin: 0; font-size: 1.35rem; line-height: 1.3; }
#head p, #timing p { margin: 0; opacity: .7; font-size: .9rem; }
#timing p { min-height: 1.4em; }
#image { height: min(640px, calc(100vh - 170px)); min-height: 320px; }
#image img { width: 100%; height: 100%; object-fit: contain; }
#upload .icon-wrap { display: none; }
#upload .wrap { padding-top: 18px; font-size: .9rem; line-height: 1.6; }
#classes .wrap { flex-direction: column; flex-wrap: nowrap; gap: 0; max-height: 228px; overflow-y: auto; }
#classes .wrap label { width: 100%; padding: 4px 8px; border: 0; box-shadow: none; background: none; }
#classes .wrap label:hover { background: var(--background-fill-secondary); }
#classes .wrap label span { flex: 1; margin-left: 8px; overflow-wrap: anywhere; }
#classes .wrap label::after { font-variant-numeric: tabular-nums; opacity: .7; }
#classes .wrap label span::before { content: ""; display: inline-block; width: .85em; height: .85em; margin-right: 8px;
  border-radius: 3px; box-shadow: inset 0 0 0 1px rgb(128 128 128 / .5); vertical-align: -1px; }
#swatches { display: none; }
"""


def build_app(predictor: SegFormerPredictor, title: str, examples: Any = ()) -> Any:
    """Build the page without serving it.

    Args:
        predictor: predictor of the uploads.
        title: title of the page.
        examples: paths of images and their titles, as `find_example_images` gives them.

    Returns:
        A `gradio.Blocks`.

    Raises:
        ValueError: if the model takes neither one channel nor three.
        OSError: if Gradio is not installed.
    """
    gradio = _gradio()
    num_channels = predictor.model.config.num_channels
    if num_channels not in (1, 3):
        raise ValueError(f"the model takes images of {num_channels} channels; expected 1 or 3 for a page")
    page = _Page(gradio, predictor)
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(_SWEEP, _KEPT), fill_width=True) as blocks:
        state = gradio.State(time_to_live=_KEPT)
        gradio.Markdown(f"# {_plain(title)}\n\n{summary(predictor)}", elem_id="head")
        with gradio.Row():
            with gradio.Column(scale=5, min_width=420):
                image = gradio.Image(label="Overlay", elem_id="image", interactive=False, buttons=["fullscreen"])
                time = gradio.Markdown(_EMPTY, elem_id="timing")
            with gradio.Column(scale=2, min_width=300):
                upload = gradio.File(label="Image", elem_id="upload", height=110)
                opacity = gradio.Slider(0, 1, _OPACITY, step=0.05, label="Opacity", elem_id="opacity")
                classes = gradio.CheckboxGroup(
                    label="Classes", elem_id="classes", show_select_all=True, visible=False, interactive=True
                )
                swatches = gradio.HTML(elem_id="swatches")
                with gradio.Row():
                    mask = gradio.DownloadButton("Mask", elem_id="mask", size="sm", interactive=False)
                    selection = gradio.DownloadButton(
                        "Selected classes", elem_id="selection", size="sm", interactive=False
                    )
                shelf = _shelf(gradio, list(examples))
        shown = [upload, state, image, classes, swatches, time, mask, selection]
        one: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "network"}  # of uploads and examples together
        upload.upload(page.predict, [upload, opacity], shown, **one)
        if shelf is not None:
            paths = [path for path, _ in examples]
            shelf.click(lambda index, value: page.predict(paths[index], value), [shelf, opacity], shown, **one)
        quick: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}
        classes.input(page.choose, [state, classes, opacity], [image, selection], **quick)
        opacity.input(page.fade, [state, classes, opacity], image, **quick)
    return blocks


class _Page:
    """Event handlers of the page."""

    def __init__(self, gradio: Any, predictor: SegFormerPredictor):
        self.gradio, self.predictor = gradio, predictor
        self.folders: deque[Path] = deque()

    def predict(self, path: str | Path | None, opacity: float) -> Any:
        """Predict a new image; one that fails gives a message and leaves the page as it is."""
        gradio = self.gradio
        if path is None:
            return [gradio.skip()] * 8
        try:
            result = predict_upload(self.predictor, path)
        except (ValueError, OSError) as error:
            gradio.Warning(html.escape(str(error)), title="This image cannot be predicted", duration=None)
            return [None, *[gradio.skip()] * 7]
        chosen, names, palette = list(result.pixels), self.predictor.names, self.predictor.palette
        return [
            None,  # so that the next image can be dropped
            result,
            self._file(write_overlay, result, chosen, palette, opacity),
            gradio.CheckboxGroup([(names[index], index) for index in chosen], value=chosen, visible=True),
            _swatches(result, palette),
            timing(result, self.predictor.model.device),
            gradio.DownloadButton(value=self._file(write_mask, result), interactive=True),
            gradio.DownloadButton(value=self._file(write_selection, result, chosen), interactive=True),
        ]

    def choose(self, result: Result | None, chosen: list[int], opacity: float) -> Any:
        """Select other classes."""
        if result is None:  # results are kept for an hour, of a limited number of visitors
            return self._gone(2)
        return self.fade(result, chosen, opacity), self._file(write_selection, result, chosen)

    def fade(self, result: Result | None, chosen: list[int], opacity: float) -> Any:
        """Set another opacity."""
        if result is None:
            return self.gradio.skip()
        return self._file(write_overlay, result, chosen, self.predictor.palette, opacity)

    def _gone(self, count: int) -> list[Any]:
        self.gradio.Warning("Upload the image again", title="The result is no longer kept")
        return [self.gradio.skip()] * count

    def _file(self, write: Any, *arguments: Any) -> str:
        """Write a file and return its path. Gradio copies it, so that only the newest ones are kept."""
        self.folders.append(Path(tempfile.mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR"))))
        path = write(*arguments, self.folders[-1])
        while len(self.folders) > _NEWEST:
            shutil.rmtree(self.folders.popleft(), ignore_errors=True)
        return str(path)


def _shelf(gradio: Any, examples: list[tuple[Path, str]]) -> Any:
    """Thumbnails to click on; None without examples."""
    if not examples:
        return None
    return gradio.Dataset(
        components=[gradio.Image(render=False, label="Examples")],
        samples=[[str(path)] for path, _ in examples],
        label="Examples from the model's card",
        type="index",
        layout="gallery",
        samples_per_page=6,
        elem_id="examples",
    )


def _swatches(result: Result, palette: list[Color]) -> str:
    """Colours and shares of the classes as a style sheet, since a checkbox holds nothing but its name."""
    rules, total = [], sum(result.pixels.values())
    for place, (index, pixels) in enumerate(result.pixels.items(), start=1):
        row = f"#classes .wrap label:nth-of-type({place})"
        share = 100 * pixels / total
        shown = f"{share:.1f} %" if share >= 0.05 else "< 0.1 %"
        rules.append(f"{row} span::before {{ background: rgb{palette[index]}; }}")
        rules.append(f'{row}::after {{ content: "{shown}"; }}')
    return f"<style>{' '.join(rules)}</style>"


def _plain(title: str) -> str:
    from ..hub.model_card import in_markdown

    return in_markdown(title)


def serve(
    source: str,
    *,
    revision: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    device: str | None = None,
) -> None:
    """Serve the page of a model until Ctrl-C or SIGTERM.

    Args:
        source: a folder, a file of weights or a Hub repository.
        revision: revision of the repository.
        host: address to serve on; by default only this machine can open it.
        port: port to serve on; by default the first free one from 7860 on.
        device: PyTorch device; by default the accelerator if there is one, else the CPU.

    Raises:
        ValueError: if there is no such model, it takes neither one channel nor three, or the device does not exist.
        OSError: if a file cannot be read, the port is taken, or Gradio is not installed.
    """
    _gradio()
    path = _fetched(source, revision)
    predictor = SegFormerPredictor.from_pretrained(path, device=device)
    folder = path if path.is_dir() else path.parent
    name = path.resolve().name if path.is_dir() else path.stem
    title = source if is_repository(source) else name
    with _own_folder():
        blocks = build_app(predictor, title, find_example_images(folder, skip_outside=True))
        address = launch(blocks, host, port)
        try:
            _wait_for_signal(f"{title} is at {address}   (Ctrl-C ends it)")
        finally:
            blocks.close(verbose=False)


def launch(blocks: Any, host: str = "127.0.0.1", port: int | None = None) -> str:
    """Serve a page in a thread of its own and return its address.

    Raises:
        OSError: if the port is taken, or the host is no address of this machine.
    """
    gradio = _gradio()
    try:
        _, address, _ = blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            max_file_size=_MAX_UPLOAD,
            state_session_capacity=_VISITORS,
            pwa=False,
            footer_links=[],
            theme=gradio.themes.Default(
                primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
            ),
            css=_CSS,
        )
    except OSError as error:
        where = f"port {port} of {host}" if port is not None else f"{host}, on no port from 7860 on"
        raise OSError(f"cannot serve on {where}: choose another --port or --host ({error})") from error
    return address


def _gradio() -> Any:
    """Import Gradio with its analytics disabled.

    Raises:
        OSError: if it is not installed.
    """
    if find_spec("gradio") is None:
        raise OSError("the page needs gradio, which is not installed: pip install 'hf-segformer[app]'")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    import gradio

    return gradio


def _fetched(source: str, revision: str | None) -> Path:
    """A model's folder or file; of a repository with its card and the images that a card may list.

    Raises:
        OSError: if there is no such model, or it is not accessible.
    """
    if not is_repository(source):
        return locate(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    if revision is None:
        folder = locate(source)
        revision = folder.name  # a snapshot is named by its commit
    wanted = ["*.json", "*.safetensors", *_CARD_FILES]
    below = ["*/*.json", "*/*.safetensors"]  # of a Trainer's checkpoints
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=wanted, ignore_patterns=below))
        if is_ensemble(folder):
            fetch_members(source, folder)
        return folder
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no accessible model {source}; a private or gated one needs HF_TOKEN, on a Space as a secret in "
            "its settings"
        ) from error


@contextmanager
def _own_folder() -> Iterator[None]:
    """Make Gradio and the page write to a temporary folder that is removed at the end."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="segformer-app-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield
        finally:
            os.environ.pop("GRADIO_TEMP_DIR")
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before


def _wait_for_signal(message: str) -> None:
    """Print a message, and wait for Ctrl-C or SIGTERM."""
    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        print(message, flush=True)
        while not stop.wait(0.5):
            pass
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


__all__ = ["build_app", "launch", "serve"]
