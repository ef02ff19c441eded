"""Meaning of the values, or colours, that the masks of a data set hold.

Axes: K classes.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from ..config import VALUE_SETTINGS
from ..files import IGNORE_INDEX
from .class_lists import ClassList
from .label_mapping import unpack_color

_MOST_CLASSES = 256  # more values than these are numbers of objects or measurements
_NUM_SHOWN, _MOST_COLORS = 12, 40
_BRIGHT, _NUM_BRIGHT = 200, 4  # values of smoothed edges towards 255
_NEAR = 5  # distance of such values from 0 and 255


class Meaning(NamedTuple):
    """Meaning of mask values.

    Attributes:
        tables: fields of `DataConfig` beside those that are set already.
        names: of the K classes, one for a binary task.
        names_source: `"generic"` if the names were made up.
        mask_kind: `"binary"`, or `"indices"`.
        notes: what was found and decided, one line each.
    """

    tables: dict[str, Any]
    names: tuple[str, ...]
    names_source: str
    mask_kind: str
    notes: tuple[str, ...] = ()


def explain_values(
    values: Collection[int], names: Sequence[str], names_source: str, tables: Mapping[str, Any]
) -> Meaning:
    """Find the class that each mask value stands for.

    Args:
        values: all that occur in the sample.
        names: class names; empty if the data bring none.
        names_source: where they come from.
        tables: settings that are fixed: `label_values`, `reduce_labels` and `ignore_values` among them.

    Raises:
        ValueError: if there is no meaning, or several; the message names the settings that choose.

    Examples:
        >>> from hf_segformer.data.mask_values import explain_values
        >>> explain_values([0, 255], (), "", {}).tables
        {'label_values': [0, 255]}
        >>> explain_values([0, 1, 2, 255], (), "", {}).names
        ('class 0', 'class 1', 'class 2')
    """
    counted = sorted({*values} - {*tables.get("ignore_values", ())})
    if not counted:
        raise ValueError("all sampled masks hold only ignored values: set data.ignore_values to others")
    if given := tables.get("label_values"):
        generic = ("foreground",) if len(given) == 2 else tuple(f"class {value}" for value in given)
        return _meaning({}, names or generic, names_source if names else "generic")
    if tables.get("reduce_labels"):
        highest = max((value for value in counted if value != IGNORE_INDEX), default=0)
        generic = tuple(f"class {value}" for value in range(1, highest + 1))
        return _meaning({}, names or generic, names_source if names else "generic")
    if counted[0] < 0:
        raise ValueError(
            f"masks hold {_list(counted)}: negative values mostly mark pixels without a class; set "
            f"data.ignore_values={[value for value in counted if value < 0]}, or data.label_values={counted} if they "
            "are classes"
        )
    if len(counted) > _MOST_CLASSES and len(names) < len(counted):
        raise ValueError(
            f"masks hold {len(counted)} values, {_list(counted)}: they seem to number objects or measure something; "
            "expected one value a class"
        )
    if len(names) <= 2 and _are_smoothed(counted):
        raise ValueError(
            f"masks hold {len(counted)} values from 0 to 255, {_list(counted)}: smoothed or compressed edges of black "
            "and white masks seem to have them; expected two values: store the masks again without interpolation, "
            "with 0 below 128 and 255 from there, or set data.names if each value is a class"
        )
    meaning = _explain_named(counted, names, names_source) if names else _explain_unnamed(counted)
    classes = meaning.tables.get("label_values", range(max(len(meaning.names), 2)))
    if IGNORE_INDEX in counted and IGNORE_INDEX not in classes:
        meaning = meaning._replace(notes=(*meaning.notes, f"Pixels of mask value {IGNORE_INDEX} are ignored."))
    return meaning


def _are_smoothed(counted: Sequence[int]) -> bool:
    """Return True for 0, 255 and values near both, as those of blurred edges."""
    found, bright = {*counted}, sum(_BRIGHT <= value < IGNORE_INDEX for value in counted)
    near = found & {*range(1, 1 + _NEAR)} and found & {*range(IGNORE_INDEX - _NEAR, IGNORE_INDEX)}
    return {0, IGNORE_INDEX} <= found and bool(near) and bright >= _NUM_BRIGHT


def _meaning(tables: dict[str, Any], names: Sequence[str], source: str, notes: Sequence[str] = ()) -> Meaning:
    return Meaning(tables, tuple(names), source, "binary" if len(names) == 1 else "indices", tuple(notes))


def _explain_named(counted: list[int], names: Sequence[str], source: str) -> Meaning:
    number = len(names)
    core = [value for value in counted if value != IGNORE_INDEX or number > IGNORE_INDEX]
    has_void = len(core) < len(counted)
    if number <= 2 and has_void and core in ([], [0]):
        return _meaning({"label_values": [0, IGNORE_INDEX]}, names, source, [f"Mask value 255 is {names[-1]!r}."])
    if number == 1 and len(core) == 2 and core[0] == 0 and (core[1] == 1 or not has_void):
        tables = {} if core[1] == 1 else {"label_values": core}
        return _meaning(tables, names, source, [f"Mask value {core[1]} is {names[0]!r}."])
    if not core:
        raise ValueError("all sampled masks hold only 255, which is ignored; set data.label_values if it is a class")
    if core[-1] < max(number, 2):
        absent = [f"{index} ({names[index]})" for index in range(number) if index not in core and number > 1]
        notes = [f"No sampled mask holds {', '.join(absent)}."] if absent else []
        return _meaning({}, names, source, notes)
    if core[-1] == number:
        missing = f"data.names={json.dumps([*(['?'] if core[0] == 0 else ['class 0']), *names])}"
        raise ValueError(
            f"masks hold {_list(core)}, but {source} names {number} classes. If value 1 is {names[0]!r}, set "
            f"data.reduce_labels=true (0 is ignored) or {missing}; if value {number} has no class, set "
            f"data.ignore_values=[{number}]"
        )
    for found in (core, counted):
        if len(found) == number:
            named = ", ".join(f"{value} {name}" for value, name in zip(found, names, strict=True))
            raise ValueError(
                f"masks hold {_list(found)}, not 0 to {number - 1}. If they are the classes in this order ({named}), "
                f"set data.label_values={found}"
            )
    strange = [value for value in core if value >= number]
    raise ValueError(
        f"masks hold {_list(strange)}, but {source} names {number} classes, 0 to {number - 1}: set "
        f"data.ignore_values={strange} if they have no class, else data.label_values or data.names"
    )


def _explain_unnamed(counted: list[int]) -> Meaning:
    core = [value for value in counted if value != IGNORE_INDEX]
    has_void = len(core) < len(counted)
    if core == [0] and has_void:
        return _binary(IGNORE_INDEX)
    if len(core) == 2 and core[0] == 0 and (not has_void or core[1] == 1):
        return _binary(core[1])
    if len(core) < 2:
        raise ValueError(
            f"all sampled masks hold only {_list(counted)}; expected two classes or more: set data.names and "
            "data.label_values if they are rare"
        )
    is_dense = core[-1] < 2 * len(core)
    if has_void and not is_dense:
        raise ValueError(
            f"masks hold {_list(counted)}, where 255 may be a class or ignored pixels: set "
            f"data.label_values={counted}, or data.label_values={core} to ignore it"
        )
    if is_dense and core[0] == 0:
        gaps = sorted({*range(core[-1])} - {*core})
        notes = [f"No sampled mask holds {_list(gaps)}; they are classes without pixels."] if gaps else []
        return _meaning({}, [f"class {value}" for value in range(core[-1] + 1)], "generic", notes)
    notes = [f"Mask values are {_list(core)}, not 0 and up: each that occurs is a class (data.label_values)."]
    return _meaning({"label_values": core}, [f"class {value}" for value in core], "generic", notes)


def _binary(value: int) -> Meaning:
    tables = {} if value == 1 else {"label_values": [0, value]}
    notes = [f"Masks hold 0 and one other value, {value}: a binary task, {value} is 'foreground' (data.names)."]
    return _meaning(tables, ["foreground"], "generic", notes)


def explain_colors(
    shares: Mapping[int, float], listed: ClassList | None, names: Sequence[str], source: str, tables: Mapping[str, Any]
) -> Meaning:
    """Find the class that each colour of the masks stands for.

    Args:
        shares: share of the sampled pixels of each colour, as `pack_color` gives it.
        listed: names and colours beside the data.
        names: class names; empty if the data bring none.
        source: where they come from.
        tables: settings that are fixed: `mask_colors` and `ignore_colors` among them.

    Raises:
        ValueError: if colours have no class; the message lists them, and how to name them.
    """
    if given := tables.get("mask_colors"):
        generic = ("foreground",) if len(given) == 2 else tuple(f"class {number}" for number in range(len(given)))
        return _meaning({}, names or generic, source if names else "generic")
    order = sorted(shares, key=lambda color: -shares[color])
    if listed is None:
        if all(red == green == blue for red, green, blue in map(unpack_color, order)):
            return _explain_grey([value & 255 for value in order], names, source, tables)
        raise ValueError(_unnamed_colors(order, shares))
    known = {*listed.colors, *listed.ignore_colors, *map(tuple, tables.get("ignore_colors", ()))}
    strange = [color for color in order if tuple(unpack_color(color)) not in known]
    if strange:
        raise ValueError(
            f"masks hold colours that {listed.file} does not list: {_list_colors(strange, shares)}. Add them there, or "
            f"set data.ignore_colors={[unpack_color(color) for color in strange[:_NUM_SHOWN]]} to leave them out"
        )
    ignored = [list(color) for color in listed.ignore_colors]
    ignored += [color for color in tables.get("ignore_colors", ()) if color not in ignored]
    own: dict[str, Any] = {"mask_colors": [list(color) for color in listed.colors]}
    own |= {"ignore_colors": ignored} if ignored else {}
    notes = [f"Masks hold colours; {listed.file} gives the class of each."]
    notes += [f"{len(ignored)} of the colours are ignored (data.ignore_colors)."] if ignored else []
    return _meaning(own, listed.names, listed.file, notes)


def _explain_grey(values: list[int], names: Sequence[str], source: str, tables: Mapping[str, Any]) -> Meaning:
    """Read grey colours as the values of a mask, and give them as colours."""
    meaning = explain_values(values, names, source, tables)
    number = max(len(meaning.names), 2)
    first = 1 if tables.get("reduce_labels") else 0
    given = tables.get("label_values") or meaning.tables.get("label_values")
    classes = given or list(range(first, first + number))
    ignored = [value for value in values if value not in classes]
    own: dict[str, Any] = {"mask_colors": [[value] * 3 for value in classes]}
    own |= {"ignore_colors": [[value] * 3 for value in ignored]} if ignored else {}
    # What is set for values is said in colours now.
    own |= {key: type(tables[key])() for key in VALUE_SETTINGS if tables.get(key)}
    notes = ("Masks are stored as colours, but hold grey alone: its values are the labels.", *meaning.notes)
    return meaning._replace(tables=own, notes=notes)


def _unnamed_colors(order: list[int], shares: Mapping[int, float]) -> str:
    if len(order) > _MOST_COLORS:
        return (
            f"masks hold {len(order)} colours, such as {_list_colors(order, shares)}: compression or smoothing has "
            "blurred them, or they are photos; expected one colour a class"
        )
    colors = [unpack_color(color) for color in order]
    text = json.dumps({"names": [f"class {number}" for number in range(len(order))], "colors": colors})
    return (
        f"masks hold {len(order)} colours, whose classes nobody names: {_list_colors(order, shares)}. Put classes.json "
        f"beside the data, with the right names: {text}"
    )


def _list_colors(order: Sequence[int], shares: Mapping[int, float]) -> str:
    total = sum(shares.values())
    shown = [f"{unpack_color(color)} ({100 * shares[color] / total:.3g} %)" for color in order[:_NUM_SHOWN]]
    return ", ".join(shown) + (f" and {len(order) - _NUM_SHOWN} more" if len(order) > _NUM_SHOWN else "")


def _list(values: Sequence[int]) -> str:
    rest = f" and {len(values) - _NUM_SHOWN} more" if len(values) > _NUM_SHOWN else ""
    return ", ".join(map(str, values[:_NUM_SHOWN])) + rest


__all__ = ["Meaning", "explain_colors", "explain_values"]
