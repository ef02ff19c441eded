"""Mutations of files: bytes, blocks, header fields, chunks, values in JSON."""

import io
import json
import random
import struct
import zipfile
import zlib
from typing import Any

_NUMBERS = (0, 1, 2, 3, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)
_DEEP: Any = []
for _ in range(50):
    _DEEP = [_DEEP]
_VALUES = (
    None, True, False, 0, -1, 1, 2, 7, 255, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "",
    "0", "nonsense", "model-1.safetensors", "../model-1.safetensors", "/dev/zero", "é\0\ud83d", "long " * 200, [], [0],
    [1, 1, 1, 1], [-1, 0, 0, 0], [0.5] * 3, [None] * 3, ["a", "b"], {}, {"a": {"b": 1}}, {"height": 0, "width": 5},
    {"shortest_edge": 10**9}, _DEEP,
)  # fmt: skip


def mutate(content: bytes, name: str, chance: random.Random) -> tuple[bytes, bool]:
    """Damage a file's bytes in one to three ways.

    Args:
        content: of a valid file.
        name: of the file; its ending tells what it holds.
        chance: decides.

    Returns:
        the bytes, and whether they are the file's own, cut short.
    """
    if chance.random() < 0.2:
        return content[: chance.randrange(len(content))], True
    if chance.random() < 0.4 and (inner := _inside(content, name, chance)) is not None:
        return inner, False
    for _ in range(chance.randint(1, 3)):
        content = chance.choice((_flip, _flip, _number, _number, _insert, _remove, _swap, _fill))(content, chance)
    if name.endswith(".png") and chance.random() < 0.6:
        content = _right_sums(content)
    return content, False


def _inside(content: bytes, name: str, chance: random.Random) -> bytes | None:
    """Damage what a container holds and leave the container sound; None where nothing is known of the kind."""
    if name.endswith(".json"):
        return _edited(content, chance)
    if name.endswith(".safetensors"):
        (length,) = struct.unpack_from("<Q", content)
        header = _edited(content[8 : 8 + length], chance)
        return struct.pack("<Q", len(header)) + header + content[8 + length :]
    if content.startswith(b"PK"):
        return _rezipped(content, chance)
    if name.endswith(".png"):
        start, number = chance.choice(((16, 4), (20, 4))), chance.choice(_NUMBERS)
        return _right_sums(content[: start[0]] + struct.pack(">I", number % 2**32) + content[sum(start) :])
    return None


def _edited(text: bytes, chance: random.Random) -> bytes:
    """JSON with another value, another key, or a key less, somewhere; the text alone is changed, too, now and then."""
    values = json.loads(text)
    for _ in range(chance.randint(1, 2)):
        holder, key = chance.choice(list(_places(values)))
        action = chance.random()
        if action < 0.75:
            holder[key] = chance.choice(_VALUES)
        elif action < 0.9:
            del holder[key]
        elif isinstance(holder, dict):
            holder[chance.choice(("", "é", "num_labels", "__class__", "depths"))] = holder.pop(key)
        if not isinstance(values, dict) or not values:
            break
    result = json.dumps(values, ensure_ascii=chance.random() < 0.5).encode("utf-8", errors="surrogatepass")
    return b"[" * 100_000 if chance.random() < 0.02 else result


def _places(values: Any):
    """Every holder and key in nested JSON."""
    for key in list(values) if isinstance(values, dict) else range(len(values)):
        yield values, key
        if isinstance(values[key], dict | list) and values[key]:
            yield from _places(values[key])


def _rezipped(content: bytes, chance: random.Random) -> bytes:
    """A zip archive in which one member is damaged, with the right checksum."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w") as new:
        members = old.infolist()
        pickles = [member for member in members if member.filename.endswith(".pkl")]
        victim = chance.choice(pickles if chance.random() < 0.8 else members)
        for member in members:
            data = old.read(member)
            if member is victim and data:
                data = chance.choice((_flip, _number, _insert, _remove))(data, chance)
            new.writestr(member.filename, data)
    return result.getvalue()


def _place(content: bytes, chance: random.Random) -> int:
    """A position; half of them near the start, where headers are."""
    return chance.randrange(min(len(content), 96) if chance.random() < 0.5 else len(content)) if content else 0


def _flip(content: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 4, 16)) if damaged else 0):
        damaged[_place(content, chance)] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def _number(content: bytes, chance: random.Random) -> bytes:
    place, form = _place(content, chance), chance.choice(("<I", ">I", "<H", ">H", "B"))
    number = chance.choice(_NUMBERS) % (1 << 8 * struct.calcsize(form))
    return content[:place] + struct.pack(form, number) + content[place + struct.calcsize(form) :]


def _insert(content: bytes, chance: random.Random) -> bytes:
    place = _place(content, chance)
    return content[:place] + chance.randbytes(chance.choice((1, 2, 7, 300))) + content[place:]


def _remove(content: bytes, chance: random.Random) -> bytes:
    place = _place(content, chance)
    return content[:place] + content[place + chance.choice((1, 2, 7, 100)) :]


def _swap(content: bytes, chance: random.Random) -> bytes:
    first, middle, last = sorted(_place(content, chance) for _ in range(3))
    return content[:first] + content[middle:last] + content[first:middle] + content[last:]


def _fill(content: bytes, chance: random.Random) -> bytes:
    place, length = _place(content, chance), chance.choice((4, 16, 200))
    return (
        content[:place]
        + bytes([chance.choice((0, 255))]) * min(length, len(content) - place)
        + content[place + length :]
    )


def _right_sums(content: bytes) -> bytes:
    """A PNG file with right checksums, so that what is wrong in a chunk gets past them."""
    damaged, place = bytearray(content), 8
    while place + 12 <= len(damaged):
        (length,) = struct.unpack_from(">I", damaged, place)
        if place + 12 + length > len(damaged):
            break
        struct.pack_into(">I", damaged, place + 8 + length, zlib.crc32(damaged[place + 4 : place + 8 + length]))
        place += 12 + length
    return bytes(damaged)
