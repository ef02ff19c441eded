"""Images of object storage, as a source of batch inference: S3, Google Cloud Storage and files, by Arrow.

Only addresses that the user gives are opened. Keys in an address (`s3://KEY:SECRET@...`) stay within the file system
object: neither names, nor errors, nor results hold them.
"""

import posixpath
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from ..data.reader_protocol import ImageSource, Kind
from ..data.readers import image_suffixes, kind_of, suffixes_of, without_suffix
from ..data.sources import FileSource, InputItem
from .options import check_address, shown_address


class StorageSource(FileSource):
    """The images of folders and objects in object storage.

    Each image is fetched once, when it is its turn.

    Args:
        addresses: `s3://BUCKET/PATH`, `gs://BUCKET/PATH` or `file:///PATH`, of an object or of a folder, which is
            searched with all below it. Keys, region and endpoint come from the environment, or as Arrow's
            `FileSystem.from_uri` reads them from the address.
        ignore_exif: see `FileSource`.
        bands: see `FileSource`.
        window: see `FileSource`.

    Attributes:
        skipped: number of objects of the folders that are not images, videos among them, by suffix.

    Raises:
        OSError: if there is no such object or folder, or it cannot be listed.
        ValueError: if an address is of another kind or a video, holds no images, two images have one name, or two
            addresses of one bucket differ in keys or options.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        ignore_exif: bool = False,
        bands: tuple[int, ...] | None = None,
        window: bool = False,
    ):
        self.skipped = Counter()
        self.bands, self.ignore_exif, self.axis, self.window = bands, ignore_exif, None, window
        self._file_systems: dict[str, Any] = {}
        self._fetched: dict[int, tuple[str, bytes]] = {}  # by thread: `kind` and then `read` need the same bytes
        found: dict[str, InputItem] = {}
        for address in addresses:
            for item in self._items_of(address):
                other = found.setdefault(item.name, item)
                if other != item:
                    folders = {posixpath.dirname(str(each.source)) for each in (other, item)}
                    remedy = "give their common folder, below which names are kept"
                    raise ValueError(
                        f"{other.source} and {item.source} would both be filed as {item.name}: "
                        f"{remedy if len(folders) > 1 else 'rename one of them'}"
                    )
        self._items = sorted(found.values())

    def kind(self, item: InputItem) -> Kind:
        """Return the kind of an image; its bytes are kept for this thread's next `read`."""
        source = self._source(item)
        self._fetched[threading.get_ident()] = (str(item.source), source.content or b"")
        return kind_of(source)

    def origin(self, item: InputItem) -> str:
        """Return the address."""
        return str(item.source)

    def _source(self, item: InputItem) -> ImageSource:
        address, content = self._fetched.pop(threading.get_ident(), ("", b""))
        if address != item.source:
            content = self._fetch(str(item.source))
        return ImageSource(content, str(item.source))

    def _fetch(self, address: str) -> bytes:
        scheme, _, path = address.partition("://")
        bucket = path.partition("/")[0]
        try:
            with self._file_systems[f"{scheme}://{bucket}"].open_input_file(path) as file:
                return file.read()
        except OSError as error:
            raise OSError(f"cannot read {address}: {_reason(error)}") from error

    def _items_of(self, address: str) -> Iterator[InputItem]:
        """Yield the images of one address, named by their paths below it."""
        from pyarrow.fs import FileSelector, FileSystem, FileType

        check_address(address)
        shown, scheme = shown_address(address), address.partition("://")[0]
        try:
            file_system, path = FileSystem.from_uri(address)
        except ValueError:  # whose message repeats the address, with its keys
            raise ValueError(f"{shown} cannot be parsed; expected {scheme}://BUCKET/PATH, percent-encoded") from None
        except OSError as error:
            raise OSError(f"{shown} cannot be opened: {_reason(error)}") from error
        bucket = f"{scheme}://{path.partition('/')[0]}"
        if not self._file_systems.setdefault(bucket, file_system).equals(file_system):
            raise ValueError(f"{shown} has other keys or options than another address of {bucket}; expected the same")
        try:
            [info] = file_system.get_file_info([path])
            if info.type == FileType.File and path.lower().endswith(suffixes_of("video")):
                raise ValueError(f"{shown} is a video; expected images: predict it from a disk, without --engine ray")
            if info.type == FileType.File:
                yield InputItem(posixpath.basename(without_suffix(path)), f"{scheme}://{path}")
                return
            if info.type == FileType.NotFound:
                raise FileNotFoundError(f"no such object or folder: {shown}")
            listed = file_system.get_file_info(FileSelector(path, recursive=True))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise OSError(f"{shown} cannot be listed: {_reason(error)}") from error
        number = 0
        for each in listed:
            below = each.path.removeprefix(path.rstrip("/") + "/")
            if each.type != FileType.File or any(part.startswith(".") for part in below.split("/")):
                continue
            if each.path.lower().endswith(image_suffixes()) and not each.path.lower().endswith(suffixes_of("video")):
                number += 1
                yield InputItem(without_suffix(below), f"{scheme}://{each.path}")
            else:
                self.skipped[posixpath.splitext(each.path)[1].lower()] += 1
        if not number:
            raise ValueError(f"{shown} holds no images ({', '.join(image_suffixes())})")


def _reason(error: OSError) -> str:
    """Message of an error, in one line."""
    return error.strerror or " ".join(str(error).split())


__all__ = ["StorageSource"]
