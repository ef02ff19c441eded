"""Search of a recipe's values by the Trainer's own `hyperparameter_search`, with Optuna (the extra `search`).

Every trial trains a fresh network of the recipe with other values, on the same data, and is judged by the recipe's own
evaluation: that of the best checkpoint where the recipe keeps it (`trainer.load_best_model_at_end`), else the last one.
Only `model`, `loss`, `optimizer`, `augmentation` and `trainer` are searched: the other tables describe the task, or
belong to the whole search.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import set_seed

from ..evaluation.metrics import LOWER_IS_BETTER
from .building import build_model, build_trainer, train_samples, training_arguments, with_adapters
from .distillation import load_teacher
from .recipe import Recipe, parse_overrides
from .recipe_trainer import RecipeTrainer
from .run import prepare_data, scores_of

SEARCHED_TABLES = ("model", "loss", "optimizer", "augmentation", "trainer")

Space = Mapping[str, Sequence[Any]]
"""`table.key` -> a tuple (low, high) or (low, high, "log"), or a list of values to choose from."""

_FIXED = (
    "trainer.output_dir",
    *(f"trainer.{name}" for name in ("bf16", "fp16", "tf32", "torch_compile", "use_cpu")),  # fixed with the Trainer
    "model.num_channels",
    "loss.class_weights",
    "augmentation.custom",
    "augmentation.class_balance",
)


_LENGTHS = (
    "trainer.max_steps",
    "trainer.num_train_epochs",
    "trainer.per_device_train_batch_size",
    "trainer.gradient_accumulation_steps",
)


@dataclass(frozen=True)
class SearchResult:
    """The best trial of a search.

    Attributes:
        overrides: its values by `table.key`.
        score: its score.
        recipe: the recipe with these values.
    """

    overrides: dict[str, Any]
    score: float
    recipe: Recipe


def search(
    recipe: Recipe, space: Space, num_trials: int, *, metric: str = "mean_iou", seed: int = 0, **study: Any
) -> SearchResult:
    """Train `num_trials` networks with values that Optuna draws, and return the best.

    Args:
        recipe: description of the runs; `trainer.max_steps` is the length of each.
        space: the values that are searched, see `Space`. Bounds that are both whole numbers give whole numbers.
        num_trials: number of trainings.
        metric: one of `metrics.COUNTED_SCORES`, or `iou_NAME` of a class.
        seed: of Optuna's sampler.
        **study: keywords of `Trainer.hyperparameter_search`: `timeout`, `pruner`, `storage` and so on.

    Raises:
        ValueError: if Optuna is missing, a key is not searched, a range is impossible, or there is no such metric;
            see `run.fine_tune`.
        OSError: see `run.fine_tune`.

    Examples:
        >>> from hf_segformer.training.recipe import read_recipe
        >>> from hf_segformer.training.search import check_space
        >>> check_space({"trainer.learning_rate": (1e-4, 1e-2, "log"), "loss.dice": [0.0, 1.0]})
    """
    optuna = _optuna()
    check_space(space)
    trainer = build_search_trainer(recipe, space)
    known = scores_of(list(trainer.model.config.id2label.values()))
    if metric not in known:
        raise ValueError(f"metric is {metric!r}; expected one of {', '.join(known)}")
    sampler = study.pop("sampler", None) or optuna.samplers.TPESampler(seed=seed)
    found = trainer.hyperparameter_search(
        hp_space=lambda trial: _trainer_values(suggest(trial, space)),
        compute_objective=Objective(trainer, metric),
        n_trials=num_trials,
        direction="minimize" if metric in LOWER_IS_BETTER else "maximize",
        backend="optuna",
        sampler=sampler,
        **study,
    )
    if found is None:  # in every process but the first
        return SearchResult({}, float("nan"), recipe)
    return SearchResult(found.hyperparameters, found.objective, recipe.with_values(_as_tables(found.hyperparameters)))


class Objective:
    """Score of a trial, for `compute_objective` of `Trainer.hyperparameter_search`.

    Called after every evaluation, it gives the score of the one whose checkpoint the training keeps: with
    `load_best_model_at_end` the best by `metric_for_best_model`, otherwise the last.

    Args:
        trainer: what the search trains with.
        metric: name of the score, without `eval_`.

    Examples:
        >>> from types import SimpleNamespace
        >>> from hf_segformer.training.search import Objective
        >>> arguments = SimpleNamespace(
        ...     load_best_model_at_end=True, metric_for_best_model="mean_iou", greater_is_better=True
        ... )
        >>> objective = Objective(SimpleNamespace(args=arguments, objective=None), "mean_dice")
        >>> objective({"eval_mean_iou": 0.5, "eval_mean_dice": 0.6})
        0.6
    """

    def __init__(self, trainer: Any, metric: str):
        self.trainer, self.metric = trainer, metric
        self._judged = math.nan

    def __call__(self, metrics: Mapping[str, Any]) -> float:
        """Metrics of an evaluation -> score of the trial so far, whose last one is `trainer.objective`."""
        arguments, previous = self.trainer.args, getattr(self.trainer, "objective", None)
        if arguments.load_best_model_at_end:
            judged = metrics[f"eval_{arguments.metric_for_best_model.removeprefix('eval_')}"]
            is_better = judged > self._judged if arguments.greater_is_better else judged < self._judged
            if previous is not None and not (is_better or math.isnan(self._judged)):
                return previous
            self._judged = judged
        return metrics[f"eval_{self.metric}"]


def build_search_trainer(recipe: Recipe, space: Space) -> RecipeTrainer:
    """Build a Trainer whose `hyperparameter_search` trains the recipe with each trial's values.

    Use it for a search of your own; `hp_space` returns the values of `trainer` without their table, which the Trainer
    sets itself.

    Args:
        recipe: description of the runs.
        space: the values that are searched.

    Raises:
        ValueError: see `search`.
        OSError: see `search`.
    """
    recipe.check_trainable()
    lengths = [key for key in space if key in _LENGTHS]
    if lengths and (recipe.augmentation.final_crop_size or "augmentation.final_crop_size" in space):
        raise ValueError(
            f"{lengths[0]} is searched together with augmentation.final_crop_size, whose passes are counted from the "
            "end; expected one of the two"
        )
    arguments = training_arguments(recipe)
    data, loss = prepare_data(recipe, arguments, None)
    teacher = load_teacher(recipe.distill, data.names, data.processor) if recipe.distill.teacher else None
    set_seed(arguments.seed)
    trainer = build_trainer(build_model(recipe.model, data.names), arguments, recipe, loss, data, teacher)

    def model_init(trial: Any) -> Any:
        tried = recipe if trial is None else recipe.with_values(_as_tables(suggest(trial, space)))
        values = training_arguments(tried)
        for name in _trainer_values(dict.fromkeys(space)):  # which the Trainer has set, rounded to the type of before
            setattr(trainer.args, name, getattr(values, name))
        trainer.optimizer_config = tried.optimizer
        trainer.train_dataset = train_samples(data, tried, values)
        model = build_model(tried.model, data.names)
        model.config.palette = [list(color) for color in data.palette]
        model.loss_function = _with_weights(tried.loss, loss.class_weights)
        return with_adapters(model, tried.lora) if tried.lora.rank else model

    trainer.model_init = model_init
    return trainer


def _with_weights(loss: Any, class_weights: Any) -> Any:
    """Give a loss the class weights that were counted once, in place of the name of their scheme."""
    return replace(loss, class_weights=class_weights) if isinstance(loss.class_weights, str) else loss


def suggest(trial: Any, space: Space) -> dict[str, Any]:
    """Draw a trial's value of every key; the same ones however often it is called.

    Args:
        trial: of Optuna.
        space: the values that are searched.
    """
    return {key: _suggest_one(trial, key, values) for key, values in space.items()}


def check_space(space: Space) -> None:
    """Raise ValueError if a key cannot be searched, its range is impossible, or a bound is no value of the key."""
    if not space:
        raise ValueError("the space is empty; expected table.key and a range, such as {'loss.dice': (0.0, 1.0)}")
    for key, values in space.items():
        table = key.partition(".")[0]
        if table not in SEARCHED_TABLES or key in _FIXED:
            raise ValueError(f"{key} cannot be searched; expected a key of {', '.join(SEARCHED_TABLES)}")
        if isinstance(values, tuple):
            _check_range(key, values)
        elif not isinstance(values, list) or not values:
            raise ValueError(f"{key} is {values!r}; expected (low, high), (low, high, 'log') or a list of values")
        for value in values[:2] if isinstance(values, tuple) else values:
            found = parse_overrides([f"{key}={_as_toml(value)}"])[table][key.partition(".")[2]]
            if type(found) is not type(value):
                raise ValueError(f"{key} is {value!r}; expected {found!r}, a {type(found).__name__}")


def _check_range(key: str, values: tuple) -> None:
    numbers = all(isinstance(each, int | float) and not isinstance(each, bool) for each in values[:2])
    if not numbers or len(values) not in (2, 3) or values[2:] not in ((), ("log",)):
        raise ValueError(f"{key} is {values!r}; expected (low, high) or (low, high, 'log')")
    low, high = values[:2]
    if not all(map(math.isfinite, (low, high))):
        raise ValueError(f"{key} is {values!r}; expected finite bounds")
    if not low < high or (values[2:] and low <= 0):
        raise ValueError(f"{key} is {values!r}; expected low below high, and above 0 on a logarithmic scale")


def _suggest_one(trial: Any, key: str, values: Sequence[Any]) -> Any:
    if isinstance(values, list):
        return trial.suggest_categorical(key, values)
    low, high, *scale = values
    draw: Callable[..., Any] = (
        trial.suggest_int if isinstance(low, int) and isinstance(high, int) else trial.suggest_float
    )
    return draw(key, low, high, log=bool(scale))


def _as_tables(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        table, _, name = key.partition(".")
        tables.setdefault(table, {})[name] = value
    return tables


def _trainer_values(values: Mapping[str, Any]) -> dict[str, Any]:
    return _as_tables(values).get("trainer", {})


def _as_toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ValueError("a search needs Optuna: pip install 'hf-segformer[search]'") from error
    return optuna


__all__ = [
    "SEARCHED_TABLES",
    "Objective",
    "SearchResult",
    "Space",
    "build_search_trainer",
    "check_space",
    "search",
    "suggest",
]
