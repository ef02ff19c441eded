"""Recipes: TOML files that describe a training run, a table for each of its parts.

A recipe is checked completely before anything heavy is imported: a misspelt name or a value of the wrong type is
reported within a second, not after the data are read. The options' names and types are those of the dataclasses in
config.py; those of `TrainingArguments` and `SegFormerConfig`, whose import takes seconds, are read from their source.
"""

import ast
import importlib.util
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import date, time
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import (
    AugmentationConfig,
    DataConfig,
    DistillationConfig,
    EarlyStoppingConfig,
    EmaConfig,
    InferenceOptions,
    LoraConfig,
    LossConfig,
    OptimizerConfig,
    SplitConfig,
)
from ..files import resolve_inside
from .arguments import check_recipe_arguments

if TYPE_CHECKING:
    from .losses import SegmentationLoss

_OPTIONS = {
    "data": DataConfig,
    "split": SplitConfig,
    "augmentation": AugmentationConfig,
    "loss": LossConfig,
    "optimizer": OptimizerConfig,
    "evaluation": InferenceOptions,
    "lora": LoraConfig,
    "ema": EmaConfig,
    "early_stopping": EarlyStoppingConfig,
    "distill": DistillationConfig,
}
_LEAST = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "learning_rate": 0,
    "weight_decay": 0,
}
# PyTorch's loader refuses these without workers, by names that are not a recipe's.
_NEED_WORKERS = ("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context")
_NEAR = 0.7  # similarity from which on a known name is suggested for a misspelt one

_Known = dict[str, dict[str, ast.expr]]


@dataclass(frozen=True)
class Recipe:
    """A recipe whose names, types and values are checked.

    Args:
        name: the file's name without suffix.
        tables: all of it, as TOML tables; a table that the file leaves out is empty.
        data: source of images and masks.
        split: division of the training split.
        augmentation: augmentation of training images.
        optimizer: parameter groups and schedule.
        evaluation: inference options of every evaluation.
        lora: the adapters.
        ema: the average of the weights.
        early_stopping: the end of a training that gets no better.
        distill: the teacher.
        text: the TOML text of it all, comments included; empty where bases or overrides add to a file.
        trusted_code: the only value of `augmentation.custom` whose code may run.
    """

    name: str
    tables: dict[str, dict[str, Any]]
    data: DataConfig
    split: SplitConfig
    augmentation: AugmentationConfig
    optimizer: OptimizerConfig
    evaluation: InferenceOptions
    lora: LoraConfig
    ema: EmaConfig
    early_stopping: EarlyStoppingConfig
    distill: DistillationConfig
    text: str = ""
    trusted_code: str = ""

    @property
    def model(self) -> dict[str, Any]:
        """`variant` or `checkpoint`, and any field of `SegFormerConfig`."""
        return self.tables["model"]

    @property
    def trainer(self) -> dict[str, Any]:
        """Keywords of `TrainingArguments`."""
        return self.tables["trainer"]

    def with_values(self, values: Mapping[str, Mapping[str, Any]]) -> "Recipe":
        """Return the recipe with other values, by table and key, checked again.

        Raises:
            ValueError: if a value is out of range, or does not go with others.
        """
        tables = {table: {**held, **values.get(table, {})} for table, held in self.tables.items()}
        return replace(_checked(self.name, self.name, tables, ""), trusted_code=self.trusted_code)

    def check_trainable(self) -> None:
        """Raise ValueError if a setting is missing that training needs.

        A recipe that is read only for its data may lack it.
        """
        self.check_code()
        if self.lora.rank and not self.model.get("checkpoint"):
            raise ValueError("lora.rank is set, but adapters cannot train a random encoder: set model.checkpoint")
        frozen = next((name for name in ("freeze_encoder", "freeze_stages") if getattr(self.optimizer, name)), None)
        if frozen and self.lora.rank:
            raise ValueError(
                f"optimizer.{frozen} and lora.rank are both set, but adapters freeze all other weights of "
                f"the encoder: leave optimizer.{frozen} out"
            )
        if frozen and not self.model.get("checkpoint"):
            raise ValueError(f"optimizer.{frozen} is set, but the encoder is random: set model.checkpoint")

    def check_code(self) -> None:
        """Raise ValueError if `augmentation.custom` names code to run, and nobody but a file asked for it."""
        path = self.augmentation.custom
        if path and path != self.trusted_code:
            raise ValueError(
                f"augmentation.custom is {path!r} in a file, and files do not run code; expected --allow-code if you "
                f"trust it, augmentation.custom={path} on the command line, or augmentation.custom= for none"
            )

    @property
    def loss(self) -> "SegmentationLoss":
        """The table `[loss]` as a `SegmentationLoss`; this imports PyTorch."""
        from .losses import SegmentationLoss

        return SegmentationLoss(**self.tables["loss"])


def read_recipe(source: str | Path, overrides: Iterable[str] = (), allow_code: bool = False) -> Recipe:
    """Read a recipe, apply the command line's overrides, and check every name, type and value.

    Args:
        source: name of a recipe of this package, such as `camvid_b0`, or path of a TOML file. `base = "other.toml"` at
            the file's top inherits the tables of a file beside it.
        overrides: `table.key=value`, where value is written as in TOML; a string needs no quotes.
        allow_code: a training may run the code that the file names in `augmentation.custom`. What an override names
            may always run, and reading a recipe runs nothing.

    Raises:
        ValueError: if a table or key is unknown (the message gives the nearest known one), a value is of the wrong
            type or out of range, or the file is not TOML.
        OSError: if the file, or a folder that it names, does not exist.

    Examples:
        >>> from hf_segformer.training.recipe import read_recipe
        >>> read_recipe("shapes_b0", ["trainer.max_steps=24"]).trainer["max_steps"]
        24
    """
    path, overrides = find_recipe(source), list(overrides)
    tables, text = read_tables(path, (), _OPTIONS)
    trusted = tables["augmentation"].get("custom", "") if allow_code else ""
    for override in overrides:
        trusted = _parse_override(override, {}).get("augmentation", {}).get("custom", trusted)
    if overrides:
        tables, text = read_tables(path, overrides, _OPTIONS)
    return replace(_checked(str(path), path.stem, tables, text), trusted_code=trusted)


def read_tables(
    path: Path, overrides: Sequence[str], options: Mapping[str, type], command: str = "train"
) -> tuple[dict[str, dict[str, Any]], str]:
    """Read a recipe's tables with those of its bases and the overrides, and check names and types.

    Args:
        path: a TOML file.
        overrides: see `read_recipe`.
        options: the dataclass of each table, beside `[model]` and `[trainer]`.
        command: see `recipe_folder`, where bases are that are given by name.

    Returns:
        the tables, empty where nothing sets them, and the file's text; that is empty where bases or overrides add to
        it.

    Raises:
        ValueError: see `read_recipe`.
        OSError: if a base does not exist.
    """
    known, files = _known_fields(tuple(options.items())), _with_bases(path, command)
    tables: dict[str, dict[str, Any]] = {table: {} for table in known}
    for file in files:
        _merge(tables, str(file), {name: each for name, each in _read_tables(file).items() if name != "base"}, known)
    for text in overrides:
        _merge(tables, text, _parse_override(text, known), known)
    return tables, "" if len(files) > 1 or overrides else _read_text(path)


def parse_recipe(text: str, where: str, name: str) -> Recipe:
    """Check a recipe that is at hand as text, as `read_recipe` checks a file.

    Args:
        text: TOML, without `base`.
        where: what messages call it.
        name: the recipe's name.
    """
    known = _known_fields(tuple(_OPTIONS.items()))
    tables: dict[str, dict[str, Any]] = {table: {} for table in known}
    _merge(tables, where, _parse_tables(text, where), known)
    return _checked(where, name, tables, text)


def parse_overrides(overrides: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Parse `table.key=value` texts, and check names and types; the tables that none of them sets are empty.

    Raises:
        ValueError: if a table or key is unknown or a value is of the wrong type.
    """
    known = _known_fields(tuple(_OPTIONS.items()))
    tables: dict[str, dict[str, Any]] = {table: {} for table in known}
    for text in overrides:
        _merge(tables, text, _parse_override(text, known), known)
    return tables


def _merge(tables: dict[str, dict[str, Any]], where: str, added: dict[str, Any], known: "_Known") -> None:
    for table, values in added.items():
        _check_table(where, table, values, known)
        tables[table] |= values


def _checked(where: str, name: str, tables: dict[str, dict[str, Any]], text: str) -> Recipe:
    """Build a recipe from tables whose names and types are checked."""
    check_tables(where, tables)
    LossConfig(**tables["loss"])
    options = {table: _OPTIONS[table](**tables[table]) for table in _OPTIONS if table != "loss"}
    recipe = Recipe(name, tables, **options, text=text)
    recipe.data.check_root()
    if recipe.distill.teacher:
        _check_exists("distill.teacher", recipe.distill.teacher)
    if recipe.early_stopping.patience:
        _check_early_stopping(recipe.trainer, recipe.early_stopping)
    recipe.split.check_with(recipe.data)
    if recipe.data.streaming and recipe.trainer.get("max_steps", 0) <= 0:
        raise ValueError("data.streaming is set, but a stream has no length: set trainer.max_steps")
    if recipe.data.streaming and recipe.augmentation.class_balance:
        raise ValueError(
            f"augmentation.class_balance is {recipe.augmentation.class_balance}, but images of a stream cannot be "
            "drawn: set data.streaming=false, or augmentation.class_balance=0"
        )
    if recipe.data.streaming and recipe.augmentation.final_crop_size:
        raise ValueError(
            f"augmentation.final_crop_size is {recipe.augmentation.final_crop_size}, but a stream has no last passes: "
            "set data.streaming=false, or augmentation.final_crop_size=0"
        )
    if recipe.trainer.get("auto_find_batch_size") and recipe.augmentation.final_crop_size:
        raise ValueError(
            f"augmentation.final_crop_size is {recipe.augmentation.final_crop_size}, but trainer.auto_find_batch_size "
            "changes how many passes there are: set trainer.per_device_train_batch_size instead"
        )
    return recipe


def check_tables(where: str, tables: dict[str, dict[str, Any]]) -> None:
    """Check what every recipe needs: data, model, output folder, and values that a Trainer would fail on.

    Raises:
        ValueError: if something is missing or out of range.
        FileNotFoundError: if `model.checkpoint` does not exist.
    """
    for table, key in (("data", "source"), ("trainer", "output_dir")):
        if not tables[table].get(key):
            raise ValueError(f"{where} does not set {table}.{key}")
    _check_model(where, tables["model"])
    _check_trainer(tables["trainer"])


def recipe_folder(command: str = "train") -> Path:
    """The folder of this package's recipes: inside the package in a wheel, beside it in a checkout.

    Args:
        command: `"train"`, or `"pretrain"`, whose recipes have a folder of their own.
    """
    package = Path(__file__).parents[1]
    installed = package / "configuration"
    folder = installed if installed.is_dir() else package.parent / "configuration"
    return folder if command == "train" else folder / command


def list_recipes(command: str = "train") -> dict[str, str]:
    """Names of this package's recipes with the first line of their description."""
    files = sorted(recipe_folder(command).glob("*.toml"))
    return {file.stem: file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for file in files}


def find_recipe(source: str | Path, command: str = "train") -> Path:
    """Return the file of a recipe's name or path.

    Args:
        source: name or path.
        command: see `recipe_folder`.

    Raises:
        FileNotFoundError: if there is none; the message gives the nearest known one.
    """
    path = Path(source)
    is_name = path.suffix != ".toml" and path.name == str(source)
    if is_name and not path.is_file():
        path = recipe_folder(command) / f"{source}.toml"
    if not path.is_file():
        other = "pretrain" if command == "train" else "train"
        if is_name and (recipe_folder(other) / path.name).is_file():
            raise FileNotFoundError(f"{source} is no recipe of `segformer {command}`: run segformer {other} {source}")
        near = get_close_matches(path.stem, [other.stem for other in path.parent.glob("*.toml")], n=1, cutoff=_NEAR)
        known = (
            f"no folder has that name, and `segformer {command} --list` names the recipes"
            if is_name
            else "expected a TOML file"
        )
        meant = (near[0] if is_name else path.parent / f"{near[0]}.toml") if near else None
        raise FileNotFoundError(f"there is no recipe {source}: {f'did you mean {meant}?' if near else known}")
    return path


def _with_bases(path: Path, command: str) -> list[Path]:
    """A recipe after those that it inherits from."""
    files = [path]
    while base := _read_tables(files[0]).get("base"):
        if not isinstance(base, str) or Path(base).name != base:
            raise ValueError(f"{files[0]}: base is {base!r}; expected the name of a recipe beside it or a packaged one")
        beside = resolve_inside(files[0].parent, base)
        is_name = beside.suffix != ".toml" and not beside.is_file()  # of one of this package's recipes
        files.insert(0, find_recipe(recipe_folder(command) / f"{base}.toml" if is_name else beside))
        if files[0] in files[1:]:
            raise ValueError(f"{files[1]} inherits from itself: base = {base!r}")
    return files


def _check_model(where: str, table: dict[str, Any]) -> None:
    checkpoint = table.get("checkpoint", "")
    if checkpoint:
        _check_exists("model.checkpoint", checkpoint)
    elif "variant" not in table:
        raise ValueError(f"{where} names no model: set model.variant (b0 to b5) or model.checkpoint")
    elif table["variant"] not in (variants := _variants()):
        raise ValueError(f"model.variant is {table['variant']!r}; expected one of {', '.join(variants)}")


def _check_exists(key: str, source: str) -> None:
    is_hub_name = source.count("/") == 1 and source[0] not in "./~"
    if not is_hub_name and not Path(source).exists():
        raise FileNotFoundError(f"{key} is {source}, which does not exist; expected a folder or a Hub repository")


def _check_early_stopping(trainer: dict[str, Any], config: EarlyStoppingConfig) -> None:
    """Check that there are evaluations to count, and a checkpoint of each that may be the best."""
    evaluated, saved = trainer.get("eval_strategy", "no"), trainer.get("save_strategy", "steps")
    named = f"early_stopping.patience is {config.patience}, but trainer."
    if evaluated == "no":
        raise ValueError(f"{named}eval_strategy is no: set trainer.eval_strategy=steps and trainer.eval_steps")
    if not trainer.get("load_best_model_at_end", True):
        raise ValueError(f"{named}load_best_model_at_end is false; expected true: leave it out")
    steps = (trainer.get("eval_steps") or trainer.get("logging_steps", 500), trainer.get("save_steps", 500))
    if saved != "best" and (saved != evaluated or (saved == "steps" and steps[0] != steps[1])):
        evaluation, checkpoint = (
            "epoch" if each == "epoch" else number for each, number in zip((evaluated, saved), steps, strict=True)
        )
        raise ValueError(
            f"{named}save_steps is {checkpoint} and trainer.eval_steps {evaluation}; expected a checkpoint of every "
            "evaluation, to restore the best: set trainer.save_strategy=best"
        )


def _check_trainer(table: dict[str, Any]) -> None:
    """Check values that `TrainingArguments` accepts and a Trainer fails on."""
    for name, least in _LEAST.items():
        if table.get(name, least) < least:
            raise ValueError(f"trainer.{name} is {table[name]}; expected at least {least}")
    if table.get("max_steps") == 0:
        raise ValueError("trainer.max_steps is 0; expected a number of steps, or -1 for trainer.num_train_epochs")
    for name in _NEED_WORKERS:
        if table.get(name) and not table.get("dataloader_num_workers"):
            value = str(table[name]).lower()
            remedy = f"set trainer.{name}=false" if value == "true" else f"leave trainer.{name} out"
            raise ValueError(
                f"trainer.{name} is {value}; expected at least one worker, but trainer.dataloader_num_workers is 0: "
                f"set it to 1, or {remedy}"
            )


def _variants() -> list[str]:
    tree = ast.parse((Path(__file__).parents[1] / "configuration_segformer.py").read_text(encoding="utf-8"))
    values = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    return list(ast.literal_eval(values["VARIANTS"]))


def _read_tables(path: Path) -> dict[str, Any]:
    return _parse_tables(_read_text(path), str(path))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error


def _parse_tables(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where} is not TOML: {error}") from error


def _parse_override(text: str, known: "_Known") -> dict[str, Any]:
    """Parse `table.key=value`; a number or date is a text where one is expected, such as a folder named 2024."""
    name, equals, literal = text.partition("=")
    table, dot, key = name.strip().partition(".")
    if not (equals and dot and table and key):
        raise ValueError(f"override {text!r} is not readable; expected table.key=value, such as trainer.max_steps=24")
    try:
        value = tomllib.loads(f"value = {literal}")["value"]
    except tomllib.TOMLDecodeError as error:
        if literal.strip()[:1] in ("[", "{", '"', "'"):
            raise ValueError(f"the value of {text!r} is not TOML: {error}") from error
        value = literal.strip()
    wanted = known.get(table, {}).get(key)
    if isinstance(value, int | float | date | time) and not isinstance(value, bool) and wanted is not None:
        is_text = _matches("", wanted) and not (_matches(value, wanted) or _matches([], wanted))
        value = literal.strip() if is_text else value
    return {table: {key: value}}


def _check_table(where: str, table: str, values: Any, known: _Known) -> None:
    if table not in known:
        raise ValueError(f"{where}: unknown table {table!r}; {_nearest(table, known)}")
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {table} is {values!r}; expected a table, [{table}]")
    for key, value in values.items():
        if key not in known[table]:
            raise ValueError(f"{where}: unknown key '{table}.{key}'; {_nearest_key(table, key, known)}")
        if not _matches(value, known[table][key]):
            wanted = ast.unparse(known[table][key])
            raise ValueError(f"{where}: {table}.{key} is {value!r} ({type(value).__name__}); expected {wanted}")
    if table == "trainer":
        check_recipe_arguments(values)


def _nearest(name: str, names: Iterable[str]) -> str:
    near = get_close_matches(name, names, n=1, cutoff=_NEAR)
    return f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(names)}"


def _nearest_key(table: str, key: str, known: _Known) -> str:
    """A hint at a key that is spelt nearly so, or that has the word: of the table first, then of any other."""
    others = [other for other in known if other not in (table, "trainer")]
    for each in (table, *others, "trainer"):
        near = get_close_matches(key, known[each], n=1, cutoff=_NEAR)
        near += [name for name in known[each] if set(key.split("_")) <= set(name.split("_"))]
        near += [name for name in known[each] if len(key) > 4 and name.startswith(key)]
        if near:
            return f"did you mean '{each}.{near[0]}'?"
    names = known[table]
    if len(names) < 30:
        return f"expected one of {', '.join(names)}"
    kind = "transformers.TrainingArguments" if table == "trainer" else "hf_segformer.config.DataConfig"
    return f"the fields of {kind} are the keys of [{table}]"


def _matches(value: Any, annotation: ast.expr) -> bool:
    """Return True if a TOML value is of an annotated type; enumerations are checked later, by the class they are of."""
    if isinstance(annotation, ast.BinOp):
        return _matches(value, annotation.left) or _matches(value, annotation.right)
    if isinstance(annotation, ast.Subscript):
        is_kind = _matches(value, annotation.value)
        return is_kind and (not isinstance(value, list) or all(_matches(item, annotation.slice) for item in value))
    name = ast.unparse(annotation)
    return type(value).__name__ == name or (name == "float" and type(value) is int)


@cache
def _known_fields(options: tuple[tuple[str, type], ...]) -> _Known:
    """For each table its keys, and for each of these the annotation of its type."""
    text = ast.Name("str")
    model = _declared(Path(__file__).parents[1] / "configuration_segformer.py", "SegFormerConfig")
    arguments = _declared(_package("transformers") / "training_args.py", "TrainingArguments")
    return {
        "model": {"variant": text, "checkpoint": text, **model},
        **{table: _annotations(kind) for table, kind in options},
        "trainer": arguments,
    }


def _annotations(options: type) -> dict[str, ast.expr]:
    """The annotated fields of a dataclass."""
    types = {field.name: field.type for field in fields(options)}
    texts = {name: kind.__name__ if isinstance(kind, type) else str(kind) for name, kind in types.items()}
    return {name: ast.parse(text, mode="eval").body for name, text in texts.items()}


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(f"the package {name} is not installed: pip install {name}")
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


__all__ = [
    "Recipe",
    "check_tables",
    "find_recipe",
    "list_recipes",
    "parse_overrides",
    "parse_recipe",
    "read_recipe",
    "read_tables",
    "recipe_folder",
]
