"""The Hub's own rules for a model card's metadata: `license`, `datasets` and `model-index`.

They follow the Hub's documentation of cards (modelcard.md of huggingface/hub-docs, which names the required fields) and
its list of licences. The loop-back Hub answers by them, so that every push in the tests is checked.
"""

import re
from typing import Any

import yaml

# A part of https://huggingface.co/docs/hub/repositories-licenses.
LICENSES = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "openrail", "creativeml-openrail-m", "cc0-1.0"}
LICENSES |= {"cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "gpl-3.0", "agpl-3.0", "unknown", "other"}
# Of @huggingface/tasks, as far as SegFormer's cards name them.
TASKS = {"image-segmentation", "image-classification", "image-feature-extraction", "mask-generation"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def card_errors(content: str) -> list[str]:
    """List the faults for which the Hub would refuse a card; empty if it would accept it."""
    block = re.match(r"---\n(.*?)\n---(\n|\Z)", content, re.DOTALL)
    if block is None:
        return []  # the Hub warns only
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"metadata are no YAML: {error}"]
    if not isinstance(data, dict):
        return ["metadata must be an object"]
    errors = []
    if "license" in data and data["license"] not in LICENSES:
        errors.append(f'"license" must be one of the known licences, not {data["license"]!r}')
    if data.get("license") == "other" and not data.get("license_name"):
        errors.append('"license_name" is required with license other')
    for name in ("tags", "metrics"):
        if not _is_strings(data.get(name, [])):
            errors.append(f'"{name}" must be a list of strings')
    for name in ("datasets", "base_model"):
        values = data.get(name, [])
        values = [values] if isinstance(values, str) else values
        if not _is_strings(values) or not all(_HUB_ID.fullmatch(value) for value in values):
            errors.append(f'"{name}" must be ids on the Hub')
    if data.get("pipeline_tag", "image-segmentation") not in TASKS:
        errors.append(f'"pipeline_tag" is {data["pipeline_tag"]!r}')
    return errors + _index_errors(data.get("model-index", []))


def _index_errors(index: Any) -> list[str]:
    if not isinstance(index, list):
        return ['"model-index" must be a list']
    errors = []
    for place, model in enumerate(index):
        if not _text(model, "name"):
            errors.append(f'"model-index[{place}].name" is required')
        for number, result in enumerate(model.get("results") or [{}]):
            where = f"model-index[{place}].results[{number}]"
            if result.get("task", {}).get("type") not in TASKS:
                errors.append(f'"{where}.task.type" is required, a task of the Hub')
            errors += [
                f'"{where}.dataset.{key}" is required'
                for key in ("type", "name")
                if not _text(result.get("dataset"), key)
            ]
            for metric in result.get("metrics") or [{}]:
                if not _text(metric, "type") or not isinstance(metric.get("value"), int | float | str):
                    errors.append(f'"{where}.metrics" need type and value')
    return errors


def _is_strings(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _text(values: Any, key: str) -> bool:
    return isinstance(values, dict) and isinstance(values.get(key), str) and bool(values[key].strip())
