"""Recipes: TOML files that say all about a training run, in the tables `[model]`, `[data]` and `[trainer]`.

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

DATA_SETS = ("shapes", "camvid")

# TrainingArguments that are part of how the program works: label maps need them so.
_SETTLED = ("trainer.batch_eval_metrics", "trainer.remove_unused_columns")


@dataclass(frozen=True)
class DataRecipe:
    """The table `[data]`: which pictures, how many, and how they are varied for training.

    Args:
        name: `"shapes"`, which are generated, or `"camvid"`, which are read from `root`.
        root: folder of real pictures, the one that holds `train/` and `trainannot/`, or its parent.
        image_size: side of a training picture in pixels: shapes are drawn at it, real pictures cropped to it.
        num_train: number of training pictures; 0 is all there are (of real ones).
        num_eval: the same for evaluation.
        seed: of the generated pictures and of their variation.
        scale: bounds of the factor by which a training picture is enlarged before it is cropped.
        jitter: how far brightness, contrast and the balance of colours vary, as a share; 0 is not at all.

    Raises:
        ValueError: if a value is out of range; the message names it as `data.name`.

    Example:
        >>> from training.recipe import DataRecipe
        >>> DataRecipe(name="shapes", num_train=100, num_eval=10).image_size
        128
    """

    name: str
    root: str = ""
    image_size: int = 128
    num_train: int = 0
    num_eval: int = 0
    seed: int = 0
    scale: list[float] = field(default_factory=lambda: [1.0, 1.0])
    jitter: float = 0.0

    def __post_init__(self):
        if self.name not in DATA_SETS:
            raise ValueError(f"unknown data.name {self.name!r}, {_hint(self.name, DATA_SETS)}")
        if self.name == "camvid" and not self.root:
            raise ValueError("data.root is not set: give the folder of the pictures as data.root=DIR")
        if self.image_size < 16:
            raise ValueError(f"data.image_size is {self.image_size}, but it must be at least 16")
        smallest = 1 if self.name == "shapes" else 0
        for name in ("num_train", "num_eval"):
            if getattr(self, name) < smallest:
                raise ValueError(f"data.{name} is {getattr(self, name)}, but it must be at least {smallest}")
        if self.seed < 0:
            raise ValueError(f"data.seed is {self.seed}, but it must be at least 0")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"data.scale is {self.scale}, but it must be [low, high] with 0 < low <= high")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"data.jitter is {self.jitter}, but it must lie in [0, 1)")


@dataclass(frozen=True)
class Recipe:
    """A whole recipe, checked.

    Args:
        model: `variant` or `checkpoint`, and any field of `SegFormerConfig`.
        data: the pictures.
        trainer: keywords of `TrainingArguments`.
    """

    model: dict[str, Any]
    data: DataRecipe
    trainer: dict[str, Any]


def read_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe, set what the command line says otherwise, and check every name and value.

    Args:
        path: the TOML file.
        overrides: `table.key=value`, where value is written as in TOML; a string needs no quotes.

    Raises:
        ValueError: if a table or key is unknown (the message gives the nearest right one), a value is of the wrong
            type or out of range, or the file is not TOML.
        OSError: if the file can not be read.

    Example:
        >>> from training.recipe import read_recipe
        >>> read_recipe("configuration/shapes_b0.toml", ["trainer.max_steps=24"]).trainer["max_steps"]
        24
    """
    path = Path(path)
    known = _known_fields()
    tables = _read_tables(path)
    for table, values in tables.items():
        _check_table(str(path), table, values, known)
    for text in overrides:
        table, key, value = _parse_override(text)
        _check_table(text, table, {key: value}, known)
        tables.setdefault(table, {})[key] = value
    model, data, trainer = (tables.get(table, {}) for table in ("model", "data", "trainer"))
    if not {"variant", "checkpoint"} & model.keys():
        raise ValueError(f"{path} names no model: set model.variant (b0 to b5) or model.checkpoint")
    for table, key in (("data", "name"), ("trainer", "output_dir")):
        if not tables.get(table, {}).get(key):
            raise ValueError(f"{path} does not set {table}.{key}")
    return Recipe(model, DataRecipe(**data), trainer)


def _read_tables(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = get_close_matches(path.stem, [other.stem for other in path.parent.glob("*.toml")], n=1)
        raise FileNotFoundError(
            f"there is no recipe {path}" + (f": did you mean {path.parent / near[0]}.toml?" if near else "")
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
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
    text = ast.Name("str")
    model = _declared(_package("hf_segformer") / "configuration_segformer.py", "SegFormerConfig")
    return {
        "model": {"variant": text, "checkpoint": text, **model},
        "data": _declared(Path(__file__), "DataRecipe"),
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
