"""JSON files record by record, each with its place, in bounded memory; what cannot be read is named, not raised."""

import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from tqdm.auto import tqdm

from dpop_trainer.data.limits import RECORD, UNPACKED, longest_record
from dpop_trainer.data.records import BadRecord
from dpop_trainer.data.source_path import json_suffix

_BLOCK = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# below which no proportion is looked at
_UNPACKED_FREELY = 64 << 20
# a file's first bytes in other encodings of Unicode: their mark, or, without one, where the zeros of JSON's "{" are
_OTHER_ENCODINGS = (
    ("UTF-32", re.compile(rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff|[^\x00]\x00\x00\x00|\x00\x00\x00[^\x00]", re.DOTALL)),
    ("UTF-16", re.compile(rb"\xff\xfe|\xfe\xff|[^\x00]\x00[^\x00]\x00|\x00[^\x00]\x00[^\x00]", re.DOTALL)),
)
_SPACE = re.compile(r"[ \t\n\r]*")


class PlacedRecord(NamedTuple):
    """A record and where it stands in its file: "<path>, line 7" or "<path>, record 6"."""

    place: str
    record: dict[str, Any]


def read_json_records(
    path: Path, *, on_position: Callable[[int], object] | None = None
) -> Iterator[PlacedRecord | BadRecord]:
    """Every record of a file, in order: one per line, or, in a .json file that begins with a bracket, of one list.

    Args:
        path: the file, compressed by gzip where its name ends so.
        on_position: is told how many of the file's bytes have been read, whenever some were.

    Raises:
        ValueError: the file cannot be read or decompressed, or the list does not parse from some place on.
    """
    try:
        with (
            io.BufferedReader(_Followed(path, on_position or (lambda position: None))) as raw,
            io.BufferedReader(_Unpacked(raw, path)) if path.suffix == ".gz" else raw as opened,
        ):
            file: Any = opened
            _check_encoding(file.read(4), path)
            file.seek(0)
            if file.read(len(_BYTE_ORDER_MARK)) != _BYTE_ORDER_MARK:  # which some editors write
                file.seek(0)
            if json_suffix(path) == ".json" and _begins_with_bracket(file):
                yield from _list_records(file, path)
            else:
                yield from _line_records(file, path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a file that gzip can read, got a damaged one ({error}).") from error
    except OSError as error:
        raise ValueError(f"{path}: expected a file that can be read, got {error}.") from error


def all_records(path: Path, *, may_end_early: bool = False) -> list[PlacedRecord]:
    """Every record of a file that is to have nothing else.

    Args:
        path: the file.
        may_end_early: leave out the last line where it is none, as the end of a process may have cut it.

    Raises:
        ValueError: what is no record, by its place; or the file cannot be read.
    """
    records: list[PlacedRecord] = []
    bad: BadRecord | None = None
    for item in read_json_records(path):
        if bad is not None:
            break
        if isinstance(item, BadRecord):
            bad = item
        else:
            records.append(item)
    else:
        bad = None if may_end_early else bad
    if bad is not None:
        raise ValueError(f"{bad.place}: {bad.reason}")
    return records


def excerpt(content: bytes | str) -> str:
    """The beginning of what was found, for messages."""
    text = (content if isinstance(content, str) else content.decode("utf-8", errors="replace")).strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")


class _Followed(io.FileIO):
    """A file that tells how far it has been read."""

    def __init__(self, path: Path, on_position: Callable[[int], object]) -> None:
        super().__init__(path)
        self._on_position = on_position

    def readinto(self, buffer: Any) -> int:
        size = super().readinto(buffer)
        self._on_position(self.tell())
        return size


class _Unpacked(io.RawIOBase):
    """What gzip unpacks, as long as it is not out of all proportion to the file."""

    def __init__(self, packed: Any, path: Path) -> None:
        self._file, self._path = gzip.GzipFile(fileobj=packed), path
        self._most = max(_UNPACKED_FREELY, UNPACKED() * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        size = self._file.readinto(buffer)
        if self._file.tell() > self._most:
            raise ValueError(
                f"{self._path}: expected text, got a file that unpacks to more than {UNPACKED.told()}. If that is "
                f"what it should be, unpack it yourself or set {UNPACKED.name}."
            )
        return size


def _check_encoding(start: bytes, path: Path) -> None:
    """
    Raises:
        ValueError: the file is in another encoding than UTF-8.
    """
    name = next((name for name, first in _OTHER_ENCODINGS if first.match(start)), None)
    if name is not None:
        raise ValueError(
            f"{path}: expected UTF-8, got {name}. Convert it: iconv -f {name} -t UTF-8 {path.name} > utf8_{path.name}"
        )


def _begins_with_bracket(file: IO[bytes]) -> bool:
    start = file.tell()
    first = b""
    while block := file.read(_BLOCK):
        first = block.lstrip()[:1]
        if first:
            break
    file.seek(start)
    return first == b"["


def _line_records(file: IO[bytes], path: Path) -> Iterator[PlacedRecord | BadRecord]:
    longest = longest_record()
    for number in itertools.count(1):
        line = file.readline(longest + 1)
        if not line:
            return
        if len(line) > longest:
            beginning = line
            while line and not line.endswith(b"\n"):
                line = file.readline(_BLOCK)
            yield BadRecord(f"{path}, line {number}", _too_long(beginning))
            continue
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
            yield BadRecord(
                place,
                f"expected a JSON object, got {excerpt(line)} ({error}). Write one record per line.",
            )
            continue
        yield _placed(record, place)


def _too_long(beginning: bytes | str) -> str:
    return (
        f"expected a record of at most {RECORD.told()}, got a longer one: {excerpt(beginning[:80])}. "
        "Remove it, or cut its texts."
    )


def _list_records(file: IO[bytes], path: Path) -> Iterator[PlacedRecord | BadRecord]:
    text = _Text(file, path)
    text.take()  # the bracket
    index = 0
    if text.peek() == "]":
        text.take()
    else:
        while True:
            yield _placed(text.value(index), f"{path}, record {index}")
            separator = text.peek()
            if separator not in (",", "]"):
                raise text.error(f"a comma or the list's end after record {index}", text.position)
            text.take()
            if separator == "]":
                break
            index += 1
    if text.peek():
        raise text.error("nothing after the list's end", text.position)


def _placed(record: Any, place: str) -> PlacedRecord | BadRecord:
    if isinstance(record, dict):
        return PlacedRecord(place, record)
    return BadRecord(
        place, f"expected a JSON object with the fields of a record, got {excerpt(json.dumps(record))}. Remove it."
    )


class _Text:
    """A file's text of which only the part not parsed yet is held."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self._undecoded = b""
        self._buffer, self._ended = "", False
        self._num_lines = 0  # before the buffer
        self._decoder = json.JSONDecoder()
        self.position = 0

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            match = _SPACE.match(self._buffer, self.position)
            assert match is not None
            self.position = match.end()
            if self.position < len(self._buffer) or self._ended:
                return self._buffer[self.position : self.position + 1]
            self._read(_BLOCK)

    def take(self) -> None:
        """Go past that character."""
        self.peek()
        self.position += 1

    def value(self, index: int) -> Any:
        """The value that begins here or after white space.

        Raises:
            ValueError: there is none that parses.
        """
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self.position)
            except json.JSONDecodeError as error:
                problem: tuple[str, int] = (error.msg, error.pos)
            except (ValueError, RecursionError) as error:  # a number of too many digits, lists within lists
                raise self.error(f"record {index} ({error})", self.position) from error
            else:
                if end < len(self._buffer) or self._ended:  # a number at the buffer's end may go on behind it
                    self.position = end
                    self._forget()
                    return value
                problem = ("", end)
            if self._ended:
                raise self.error(f"record {index} ({problem[0]})", problem[1])
            if len(self._buffer) - self.position > longest_record():
                beginning = self._buffer[self.position : self.position + 80]
                raise ValueError(f"{self._path}, record {index}: {_too_long(beginning)}")
            self._read(max(_BLOCK, len(self._buffer) - self.position))  # twice as much each time: linear in all

    def error(self, what: str, position: int) -> ValueError:
        before = self._buffer[:position]
        line = self._num_lines + before.count("\n") + 1
        found = excerpt(self._buffer[position : position + 60]) if position < len(self._buffer) else "the file's end"
        return ValueError(
            f"{self._path}: expected a JSON list of records, got what does not parse (at line {line}: expected {what}, "
            f"got {found}). Correct the file, or write one record per line (.jsonl), where a bad one does not hide the "
            "rest."
        )

    def _read(self, size: int) -> None:
        block = self._file.read(size)
        self._ended = not block
        content = self._undecoded + block
        try:
            text, self._undecoded = content.decode(), b""
        except UnicodeDecodeError as error:
            # a character may be cut by the block's end
            if self._ended or error.start < len(content) - 3:
                line = self._num_lines + self._buffer.count("\n") + content[: error.start].count(b"\n") + 1
                raise ValueError(f"{self._path}, line {line}: expected UTF-8, got other bytes ({error}).") from error
            text, self._undecoded = content[: error.start].decode(), content[error.start :]
        self._buffer += text

    def _forget(self) -> None:
        if self.position > _BLOCK:
            self._num_lines += self._buffer.count("\n", 0, self.position)
            self._buffer, self.position = self._buffer[self.position :], 0


def progress(path: Path, records: Iterator) -> Iterator:
    """The records, with a bar on the terminal where reading takes longer than a few seconds."""
    yield from tqdm(records, desc=f"Reading {path.name!r}", unit=" records", delay=3, leave=False)
