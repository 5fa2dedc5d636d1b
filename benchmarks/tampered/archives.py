"""Zip files that hold the bundle, and something that two readers may read differently."""

from __future__ import annotations

import bz2
import io
import random
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from deploykit import runtime
from tampered.bundles import Files, Mutation, file_of
from tampered.contents import Amount, flipped
from tampered.manifests import NAMES
from tampered.zip_writer import (
    CENTRAL_FIELDS,
    END_FIELDS,
    LOCAL_FIELDS,
    MADE_BY,
    MODE,
    Entry,
    entries_of,
    zip_of,
)

Tricks = Iterator[tuple[str, bytes]]
END_BYTES, UNKNOWN, ALL_ONES = 22, 2**32 - 2, 2**32 - 1
BOMB = 2**24  # bytes of zeros, which deflate to a thousandth
MODES = {
    "link": stat.S_IFLNK | 0o777,
    "folder": stat.S_IFDIR | 0o755,
    "pipe": stat.S_IFIFO | 0o644,
    "device": stat.S_IFCHR | 0o644,
    "set-user-id": stat.S_IFREG | 0o4755,
    "executable": stat.S_IFREG | 0o755,
    "none": 0,
}


def altered_archives(files: Files, drawn: random.Random, amount: Amount) -> Iterator[Mutation]:
    """Yield everything that can be done to the bytes of a zip file, and every trick we know."""
    packed = runtime.pack(files)
    entries = entries_of(files)
    kinds = {
        "zip: byte flipped": _flips(packed, files, drawn, amount),
        "zip: truncated": _cuts(packed, drawn, amount),
        "zip: lies in a header": _header_lies(entries),
        "zip: lies at the end": _end_lies(entries),
        "zip: bytes between": _between(packed, entries),
        "zip: names": _names(entries),
        "zip: kinds of files": _modes(entries),
        "zip: duplicates and overlaps": _duplicates(entries),
        "zip: another order": _orders(entries, drawn),
        "zip: compressed or encrypted": _compressed(entries),
        "zip: zip64": _zip64(packed, entries),
        "zip: too many or too large": _too_much(entries),
        "zip: by other tools": _other_tools(packed, files),
    }
    for kind, tricks in kinds.items():
        for name, data in tricks:
            if data != packed:
                yield Mutation(kind, name, partial(file_of, data))


def _flips(packed: bytes, files: Files, drawn: random.Random, amount: Amount) -> Tricks:
    """Flip bytes: of headers and names every ``step``-th, of the files fewer."""
    inside = set()
    for data in files.values():
        start = packed.index(data)
        inside |= set(range(start, start + len(data)))
    headers = [at for at in range(len(packed)) if at not in inside]
    for at in [*headers[:: amount.step], *sorted(inside)[:: amount.long_step]]:
        yield f"byte {at}", flipped(packed, at, drawn)


def _cuts(packed: bytes, drawn: random.Random, amount: Amount) -> Tricks:
    lengths = {0, 1, 4, 29, 30, *range(len(packed) - END_BYTES, len(packed))}
    lengths |= {drawn.randrange(len(packed)) for _ in range(amount.drawn)}
    for length in sorted(lengths):
        yield f"to {length} bytes", packed[:length]
        yield f"first {length} bytes gone", packed[length:]


def _with(entries: Sequence[Entry], number: int, **changes: Any) -> list[Entry]:
    changed = list(entries)
    changed[number] = replace(entries[number], **changes)
    return changed


def _lies(value: int, largest: int) -> list[int]:
    lies = {0, 1, value - 1, value + 1, value ^ 8, largest - 1, largest} - {value}
    return sorted(lie for lie in lies if 0 <= lie <= largest)


WIDE = {"crc", "packed", "size", "external", "at", "index_bytes", "index_at"}  # of four bytes


def _largest(field: str) -> int:
    return ALL_ONES if field in WIDE else 2**16 - 1


def _length(entries: Sequence[Entry]) -> int:
    """Return how many bytes entries take, and so where the next one, or the index, begins."""
    return len(zip_of(entries, listed=())) - END_BYTES


def _header_lies(entries: Sequence[Entry]) -> Tricks:
    """Let one header, or both, say something else, in every field."""
    for number, entry in enumerate(entries):
        told = entry.name.decode()
        for name in LOCAL_FIELDS:
            value = entry.fields()[name]
            for lie in _lies(value, _largest(name)):
                there = {name: lie}
                yield f"{told}: {name} {lie}", zip_of(_with(entries, number, local=there))
                both = _with(entries, number, local=there, central=there)
                yield f"{told}: {name} {lie} in both headers", zip_of(both)
        for name in CENTRAL_FIELDS:
            value = {**entry.fields(), "made_by": MADE_BY, "external": MODE}.get(name, 0)
            for lie in _lies(value, _largest(name)):
                changed = _with(entries, number, central={name: lie})
                yield f"{told}: {name} {lie} in the index", zip_of(changed)


def _end_lies(entries: Sequence[Entry]) -> Tricks:
    index_at = _length(entries)
    index_bytes = len(zip_of(entries)) - index_at - END_BYTES
    truths = {"here": len(entries), "count": len(entries)}
    truths |= {"index_bytes": index_bytes, "index_at": index_at}
    for name in END_FIELDS:
        for lie in _lies(truths.get(name, 0), _largest(name)):
            yield f"{name} {lie}", zip_of(entries, end={name: lie})
    for count in (0, 1, len(entries) - 1, len(entries) + 1):
        yield f"{count} files", zip_of(entries, end={"here": count, "count": count})


def _between(packed: bytes, entries: Sequence[Entry]) -> Tricks:
    """Hide bytes where no file is."""
    stub = b"#!/bin/sh\nexit\n"
    end = packed[-END_BYTES:]
    for told, more in {"a byte": b"\0", "a script": stub, "itself": packed, "an end": end}.items():
        yield f"{told} before", more + packed
        yield f"{told} before, with places moved", zip_of(_with(entries, 0, before=more))
        yield f"{told} behind", packed + more
        yield f"{told} before the index", zip_of(entries, gap=more)
        yield f"{told} behind the index", zip_of(entries, behind=more)
        yield f"{told} as a comment", zip_of(entries, comment=more[: 2**16 - 1])
        for number, entry in enumerate(entries):
            told_of = f"{told}, {entry.name.decode()}"
            yield f"{told_of}: behind it", zip_of(_with(entries, number, after=more))
            short = more[:1000]
            yield f"{told_of}: in its extra", zip_of(_with(entries, number, extra=short))
            both = _with(entries, number, extra=short, central_extra=short)
            yield f"{told_of}: in both extras", zip_of(both)
            yield f"{told_of}: its comment", zip_of(_with(entries, number, comment=short))
    for told, extra in EXTRAS.items():
        for number in range(len(entries)):
            yield f"{told}, file {number}", zip_of(_with(entries, number, central_extra=extra))


# APPNOTE.TXT 4.5 and 4.6: what tells of another size, time, owner or name.
EXTRAS = {
    "zip64": struct.pack("<2H3Q", 1, 24, 1, 1, 0),
    "time": struct.pack("<2HBI", 0x5455, 5, 1, 0),
    "owner": struct.pack("<2HBBIBI", 0x7875, 11, 1, 4, 0, 4, 0),
    "another name": struct.pack("<2HBI", 0x7075, 9, 1, 0) + b"run2",
    "longer than it is": struct.pack("<2H", 1, 60_000),
    "cut": b"\1",
}


def _names(entries: Sequence[Entry]) -> Tricks:
    for name in (one for one in NAMES if one != runtime.SIGNATURE):  # a bundle may hold that
        spelled = name.encode("utf-8", "surrogatepass")
        flags = {} if name.isascii() else {"flags": 0x800}
        more = Entry(spelled, b"", local=flags, central=flags)
        yield f"{name!r} too", zip_of([*entries, more])
        yield f"{name!r} first", zip_of([more, *entries])
        for number in (1, len(entries) - 1):
            renamed = _with(entries, number, name=spelled, local=flags, central=flags)
            yield f"{name!r} for file {number}", zip_of(renamed)
            yield f"{name!r} in one header", zip_of(_with(entries, number, local_name=spelled))
    for told, name in {"Latin-1": b"\xfc", "no text": b"\xff\xfe", "64 KiB": b"a" * 65535}.items():
        yield told, zip_of([*entries, Entry(name, b"")])
    for number, entry in enumerate(entries):
        inside = replace(entry, name=b"small/" + entry.name)
        yield f"file {number} in a folder", zip_of([*entries[:number], inside])
    yield "all in a folder", zip_of([replace(one, name=b"small/" + one.name) for one in entries])
    yield "with its folder", zip_of([*entries, Entry(b"golden/", b"", central={"external": 16})])


def _modes(entries: Sequence[Entry]) -> Tricks:
    for told, mode in MODES.items():
        for number, entry in enumerate(entries):
            changed = _with(entries, number, central={"external": mode << 16})
            yield f"{told}: {entry.name.decode()}", zip_of(changed)
        target = Entry(b"golden/more", b"../../outside/secret", central={"external": mode << 16})
        yield f"{told} too", zip_of([*entries, target])


def _duplicates(entries: Sequence[Entry]) -> Tricks:
    for number, entry in enumerate(entries):
        told, other = entry.name.decode(), replace(entry, data=b"other")
        yield f"{told} twice", zip_of([*entries, entry])
        yield f"{told} and another", zip_of([*entries, other])
        yield f"another {told} first", zip_of([other, *entries])
        yield f"{told} in capitals", zip_of([*entries, replace(other, name=entry.name.upper())])
        unlisted = [one for one in range(len(entries)) if one != number]
        yield f"{told} not listed", zip_of(entries, listed=unlisted)
        yield f"{told} listed twice", zip_of(entries, listed=[*range(len(entries)), number])
        yield f"another {told} not listed", zip_of([*entries, other], listed=range(len(entries)))
        hidden = [*unlisted, len(entries)]
        yield f"another {told} listed alone", zip_of([*entries, other], listed=hidden)
        for place in range(len(entries)):
            lying = _with(entries, number, central={"at": _length(entries[:place])})
            yield f"{told} at the place of file {place}", zip_of(lying)
        inner = Entry(b"more", other.local_header() + other.data)
        about = {field: other.fields()[field] for field in ("crc", "packed", "size")}
        about["at"] = _length(entries) + len(inner.local_header())
        quoted = _with([*entries, inner], number, central=about)
        yield f"{told} inside of another file", zip_of(quoted)


def _orders(entries: Sequence[Entry], drawn: random.Random) -> Tricks:
    count = len(entries)
    yield "manifest last", zip_of([*entries[1:], entries[0]])
    yield "by name", zip_of(sorted(entries, key=lambda entry: entry.name))
    for number in range(50):
        order = drawn.sample(range(count), count)
        yield f"shuffled {number}", zip_of([entries[one] for one in order])
        yield f"index shuffled {number}", zip_of(entries, listed=order)


def _compressed(entries: Sequence[Entry]) -> Tricks:
    for number, entry in enumerate(entries):
        told, size = entry.name.decode(), len(entry.data)
        crc = zlib.crc32(entry.data)
        for level in (0, 9):
            packer = zlib.compressobj(level, zlib.DEFLATED, -15)
            data = packer.compress(entry.data) + packer.flush()
            yield f"{told} deflated, level {level}", zip_of(_packed(entries, number, data, 8, crc))
        by_bzip2 = _packed(entries, number, bz2.compress(entry.data), 12, crc)
        yield f"{told} by bzip2", zip_of(by_bzip2)
        for told_flag, flag in FLAGS.items():
            changed = _with(entries, number, local={"flags": flag}, central={"flags": flag})
            yield f"{told}: {told_flag}", zip_of(changed)
        unknown = {"flags": 8, "crc": 0, "packed": 0, "size": 0}
        for magic in (b"", b"PK\7\10"):
            descriptor = magic + struct.pack("<3I", crc, size, size)
            later = _with(entries, number, local=unknown, central={"flags": 8}, after=descriptor)
            yield f"{told}: sizes behind it {len(magic)}", zip_of(later)


FLAGS = {
    "encrypted": 1,
    "sizes behind it, but none there": 8,
    "patch": 32,
    "strongly encrypted": 65,
    "name in UTF-8": 0x800,
    "headers encrypted": 0x2000,
}


def _packed(
    entries: Sequence[Entry], number: int, data: bytes, method: int, crc: int
) -> list[Entry]:
    fields = {"method": method, "crc": crc}
    size = len(entries[number].data)
    return _with(entries, number, data=data, size=size, local=fields, central=fields)


def _zip64(packed: bytes, entries: Sequence[Entry]) -> Tricks:
    """Move sizes, places and counts to where only some readers look for them."""
    unknown = {"packed": ALL_ONES, "size": ALL_ONES}
    for number, entry in enumerate(entries):
        told, size = entry.name.decode(), len(entry.data)
        for lie in (size, 0, 2**63, 2**64 - 1):
            extra = struct.pack("<2H2Q", 1, 16, lie, lie)
            both = {"local": unknown, "central": unknown, "extra": extra, "central_extra": extra}
            yield f"{told} of {lie} bytes", zip_of(_with(entries, number, **both))
        yield (
            f"{told} of unknown size",
            zip_of(_with(entries, number, local=unknown, central=unknown)),
        )
    index_at = _length(entries)
    for count in (len(entries), 0, 2**63):
        record = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, 0, index_at)
        for at in (len(packed) - END_BYTES, 0, 2**63):
            locator = struct.pack("<4sIQI", b"PK\6\7", 0, at, 1)
            for end in ({}, {"here": 65535, "count": 65535, "index_at": ALL_ONES}):
                found = zip_of(entries, behind=record + locator, end=end)
                yield f"{count} files, record at {at}, {len(end)} unknown", found


def _too_much(entries: Sequence[Entry]) -> Tricks:
    for count in (runtime.MAX_FILES, 65_535 - len(entries)):
        many = [Entry(f"more/{number}".encode(), b"") for number in range(count)]
        yield f"{count} more", zip_of([*entries, *many])
        yield f"{count} more, not listed", zip_of([*entries, *many], listed=range(len(entries)))
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = packer.compress(bytes(BOMB)) + packer.flush()
    crc = zlib.crc32(bytes(BOMB))
    for number, entry in enumerate(entries):
        fields = {"method": 8, "crc": crc}
        huge = _with(entries, number, data=bomb, size=BOMB, local=fields, central=fields)
        yield f"{entry.name.decode()} that unpacks to 16 MiB", zip_of(huge)
        sizes = {"packed": UNKNOWN, "size": UNKNOWN}
        lying = _with(entries, number, local=sizes, central=sizes)
        yield f"{entry.name.decode()} of 4 GiB that are not there", zip_of(lying)


def _other_tools(packed: bytes, files: Files) -> Tricks:
    """Write the same files as other tools do, or in other formats."""
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as writer:
            for name, data in files.items():
                writer.writestr(name, data)
        yield f"Python's zipfile, method {method}", file.getvalue()
    for mode in ("w:", "w:gz", "w:xz"):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode=mode) as writer:  # type: ignore[call-overload]
            for name, data in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                writer.addfile(entry, io.BytesIO(data))
        yield f"tar {mode}", file.getvalue()
    inner = runtime.pack({"bundle.zip": packed})
    heads = {"gzip": b"\x1f\x8b\x08", "empty zip": b"PK\5\6" + bytes(18), "split": b"PK\7\10"}
    heads |= {"only heads": b"PK\3\4" * 10_000, "text": b"bundle\n", "a zip file in one": inner}
    for told, data in heads.items():
        yield told, data
        yield f"{told}, and the bundle", data + packed
