"""`segformer push FOLDER REPO`: publish a model on the Hugging Face Hub."""

import argparse
from pathlib import Path


def add_push(commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "push",
        help="publish a model folder on the Hugging Face Hub",
        description="Publishes model, processor, code, model card, examples, metrics and the handler of an Inference "
        "Endpoint in one commit, or nothing.",
    )
    parser.add_argument("folder", type=Path, help="a folder with a model and its image processor, or with an ensemble")
    parser.add_argument("repository", help="owner/name; created if there is none")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--revision", metavar="BRANCH", help="publish on this branch (default: main)")
    parser.add_argument("--with-space", action="store_true", help="also publish a Space of that name with the page")
    parser.add_argument(
        "--without-handler", action="store_true", help="publish no handler.py, by which an Inference Endpoint runs"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Publish, and print how to load exactly this revision."""
    from ..conversion.ensembles import is_ensemble

    options = {
        "private": arguments.private,
        "revision": arguments.revision,
        "with_handler": not arguments.without_handler,
    }
    space, needs_token = None, False
    if arguments.with_space:
        from ..hub.space import push_folder_with_space

        commit, space, needs_token = push_folder_with_space(arguments.folder, arguments.repository, **options)
    else:
        from ..hub.push import push_folder

        commit = push_folder(arguments.folder, arguments.repository, **options)
    if is_ensemble(arguments.folder):
        print(f"published as {commit.commit_url}")
        print("load the ensemble, with the package installed:")
        print(f'  SegFormerPredictor.from_pretrained("{commit.repo_url.repo_id}")')
    else:
        _print_model(commit, arguments.folder)
    if space is not None:
        print(f"the Space is {space.repo_url}")
        if needs_token:
            print("  it needs a secret HF_TOKEN (in its settings) that may read the model")


def _print_model(commit, folder: Path) -> None:
    from ..hub.model_folder import model_kind
    from ..hub.usage_code import loading_classes

    own_class, auto_class = loading_classes(model_kind(folder))
    pinned = f'"{commit.repo_url.repo_id}", revision="{commit.oid}"'
    print(f"published as {commit.commit_url}")
    print("load exactly this revision:")
    print(f"  {own_class}.from_pretrained({pinned})")
    print("or, without the package installed:")
    print(f"  {auto_class}.from_pretrained({pinned},")
    print(f'      code_revision="{commit.oid}", trust_remote_code=True)')


__all__ = ["add_push"]
