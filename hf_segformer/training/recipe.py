"""Recipes: TOML files that say all about a training run, a table for each of its parts.

A recipe is checked whole before anything heavy is imported: a misspelt name or a value of the wrong kind is told within
a second, not after the data are read. For that the known names are read from the classes' source, as importing
`TrainingArguments` takes many seconds.
"""

import ast
import importlib.util
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..files import resolve_inside
from .data_recipe import DataRecipe

# TrainingArguments that are part of how the program works: label maps need them so, and the card comes last.
_SETTLED = ("trainer.batch_eval_metrics", "trainer.remove_unused_columns")
_LATER = ("trainer.push_to_hub",)
_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "learning_rate": 0,
    "weight_decay": 0,
}


@dataclass(frozen=True)
class LoraRecipe:
    """The table `[lora]`: train low-rank adapters (PEFT) and the head, and merge them at the end.

    Args:
        rank: of the adapters; 0 trains all weights instead.
        alpha: their scale is alpha / rank.
        dropout: on what goes into them.
        target_modules: names of the layers that get one.

    Raises:
        ValueError: if a value is out of range; the message names it as `lora.name`.
    """

    rank: int = 0
    alpha: int = 16
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["query", "value"])

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"lora.rank is {self.rank}, but it must be at least 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}, but it must lie in [0, 1)")
        if not self.target_modules:
            raise ValueError("lora.target_modules is empty: name the layers that get an adapter")


@dataclass(frozen=True)
class Recipe:
    """A whole recipe, its names and types checked.

    Args:
        tables: all of it, as TOML tables; a table that the file leaves out is empty.
        data: the pictures.
        lora: the adapters.
    """

    tables: dict[str, dict[str, Any]]
    data: DataRecipe
    lora: LoraRecipe

    @property
    def model(self) -> dict[str, Any]:
        """`variant` or `checkpoint`, and any field of `SegFormerConfig`."""
        return self.tables["model"]

    @property
    def trainer(self) -> dict[str, Any]:
        """Keywords of `TrainingArguments`."""
        return self.tables["trainer"]

    # What follows imports PyTorch, and raises a ValueError where a value is out of range.

    @property
    def augmentation(self):
        """The table `[augmentation]` as an `AugmentationConfig`."""
        from ..config import AugmentationConfig

        return AugmentationConfig(**self.tables["augmentation"])

    @property
    def loss(self):
        """The table `[loss]` as a `SegmentationLoss`."""
        from .losses import SegmentationLoss

        return SegmentationLoss(**self.tables["loss"])

    @property
    def optimization(self):
        """The table `[optimizer]` as an `OptimizerConfig`."""
        from ..config import OptimizerConfig

        return OptimizerConfig(**self.tables["optimizer"])

    @property
    def evaluation(self):
        """The table `[evaluation]` as `InferenceOptions`."""
        from ..config import InferenceOptions

        return InferenceOptions(**self.tables["evaluation"])


def read_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe, set what the command line says otherwise, and check every name and type.

    Args:
        path: the TOML file; `base = "other.toml"` at its top takes over the tables of a file beside it.
        overrides: `table.key=value`, where value is written as in TOML; a string needs no quotes.

    Raises:
        ValueError: if a table or key is unknown (the message gives the nearest right one), a value is of the wrong
            type or out of range, or the file is not TOML.
        OSError: if the file, or a folder that it names, is not there.

    Example:
        >>> from hf_segformer.training.recipe import read_recipe
        >>> read_recipe("configuration/shapes_b0.toml", ["trainer.max_steps=24"]).trainer["max_steps"]
        24
    """
    path = Path(path)
    known = _known_fields()
    tables: dict[str, dict[str, Any]] = {table: {} for table in known}
    for file in _with_bases(path):
        for table, values in _read_tables(file).items():
            if table != "base":
                _check_table(str(file), table, values, known)
                tables[table] |= values
    for text in overrides:
        table, key, value = _parse_override(text)
        _check_table(text, table, {key: value}, known)
        tables[table][key] = value
    for table, key in (("data", "source"), ("trainer", "output_dir")):
        if not tables[table].get(key):
            raise ValueError(f"{path} does not set {table}.{key}")
    _check_model(path, tables["model"])
    _check_trainer(tables["trainer"])
    data = DataRecipe(**tables["data"])
    data.check_root()
    if data.streaming and tables["trainer"].get("max_steps", 0) <= 0:
        raise ValueError("data.streaming is set, but nobody knows how long a stream is: set trainer.max_steps")
    return Recipe(tables, data, LoraRecipe(**tables["lora"]))


def _with_bases(path: Path) -> list[Path]:
    """A recipe after those that it builds on."""
    files = [path]
    while base := _read_tables(files[0]).get("base"):
        if not isinstance(base, str):
            raise ValueError(f"{files[0]}: base is {base!r}, but it must be the name of a recipe beside it")
        if Path(base).name != base:
            raise ValueError(f"{files[0]}: base is {base!r}; expected the name of a recipe beside it")
        files.insert(0, resolve_inside(files[0].parent, base))
        if files[0] in files[1:]:
            raise ValueError(f"{files[1]} builds on itself: base = {base!r}")
    return files


def _check_model(path: Path, table: dict[str, Any]) -> None:
    checkpoint = table.get("checkpoint", "")
    if checkpoint:
        # What a repository's name can not look like must be there.
        if (checkpoint.count("/") != 1 or checkpoint[0] in "./~") and not Path(checkpoint).exists():
            raise FileNotFoundError(f"there is no {checkpoint}, which model.checkpoint names")
    elif "variant" not in table:
        raise ValueError(f"{path} names no model: set model.variant (b0 to b5) or model.checkpoint")
    elif table["variant"] not in (variants := _variants()):
        raise ValueError(f"unknown model.variant {table['variant']!r}, {_hint(table['variant'], variants)}")


def _check_trainer(table: dict[str, Any]) -> None:
    """What `TrainingArguments` lets pass, and a Trainer stumbles over."""
    for name, least in _LEAST.items():
        if table.get(name, least) < least:
            raise ValueError(f"trainer.{name} is {table[name]}, but it must be at least {least}")
    if table.get("max_steps") == 0:
        raise ValueError("trainer.max_steps is 0: set a number of steps, or -1 for trainer.num_train_epochs")


def _variants() -> list[str]:
    tree = ast.parse((Path(__file__).parents[1] / "configuration_segformer.py").read_text(encoding="utf-8"))
    values = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    return list(ast.literal_eval(values["VARIANTS"]))


def _read_tables(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = get_close_matches(path.stem, [other.stem for other in path.parent.glob("*.toml")], n=1)
        raise FileNotFoundError(
            f"there is no recipe {path}" + (f": did you mean {path.parent / near[0]}.toml?" if near else "")
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error


def _parse_override(text: str) -> tuple[str, str, Any]:
    name, equals, literal = text.partition("=")
    table, dot, key = name.strip().partition(".")
    if not (equals and dot and table and key):
        raise ValueError(f"can not read {text!r}: a value is set as table.key=value, for example trainer.max_steps=24")
    try:
        value = tomllib.loads(f"value = {literal}")["value"]
    except tomllib.TOMLDecodeError as error:
        if literal.strip()[:1] in ("[", "{", '"', "'"):
            raise ValueError(f"can not read the value of {text!r} as TOML: {error}") from error
        value = literal.strip()
    return table, key, value


def _check_table(where: str, table: str, values: Any, known: dict[str, dict[str, ast.expr]]) -> None:
    if table not in known:
        raise ValueError(f"{where}: unknown table {table!r}, {_hint(table, known)}")
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {table} is {values!r}, but it must be a table, [{table}]")
    for key, value in values.items():
        name = f"{table}.{key}"
        if key not in known[table]:
            raise ValueError(
                f"{where}: unknown key {name!r}, {_hint(name, [f'{table}.{key}' for key in known[table]])}"
            )
        if name in _SETTLED:
            raise ValueError(f"{where}: {name} is settled by the program, leave it out")
        if name in _LATER:
            raise ValueError(f"{where}: {name} is left out: publish what was trained by `segformer push`")
        if not _matches(value, known[table][key]):
            wanted = ast.unparse(known[table][key])
            raise ValueError(f"{where}: {name} is {value!r} ({type(value).__name__}), but it must be {wanted}")


def _matches(value: Any, annotation: ast.expr) -> bool:
    """Whether a TOML value is of an annotated type; enumerations are checked later, by who knows their values."""
    if isinstance(annotation, ast.BinOp):
        return _matches(value, annotation.left) or _matches(value, annotation.right)
    if isinstance(annotation, ast.Subscript):
        is_kind = _matches(value, annotation.value)
        return is_kind and (not isinstance(value, list) or all(_matches(item, annotation.slice) for item in value))
    name = ast.unparse(annotation)
    return type(value).__name__ == name or (name == "float" and type(value) is int)


def _known_fields() -> dict[str, dict[str, ast.expr]]:
    """For each table its keys, and for each of these the annotation of its type."""
    text, ours = ast.Name("str"), Path(__file__).parents[1]
    return {
        "model": {
            "variant": text,
            "checkpoint": text,
            **_declared(ours / "configuration_segformer.py", "SegFormerConfig"),
        },
        "data": _declared(ours / "training" / "data_recipe.py", "DataRecipe"),
        "augmentation": _declared(ours / "config.py", "AugmentationConfig"),
        "loss": _declared(ours / "config.py", "LossConfig"),
        "optimizer": _declared(ours / "config.py", "OptimizerConfig"),
        "evaluation": _declared(ours / "config.py", "InferenceOptions"),
        "lora": _declared(ours / "training" / "recipe.py", "LoraRecipe"),
        "trainer": _declared(_package("transformers") / "training_args.py", "TrainingArguments"),
    }


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(f"the package {name} is not installed: run `make install`")
    return Path(spec.origin).parent


def _declared(source: Path, class_name: str) -> dict[str, ast.expr]:
    """The annotated public fields of a class, read from its source file."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name).body
    return {
        node.target.id: node.annotation
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id[0] != "_"
    }


def _hint(name: str, known: Iterable[str]) -> str:
    return f"did you mean {get_close_matches(name, known, n=1, cutoff=0)[0]!r}?"
