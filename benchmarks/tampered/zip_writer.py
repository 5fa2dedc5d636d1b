"""Zip files written field by field, so that each of them can lie (APPNOTE.TXT 6.3.10)."""

from __future__ import annotations

import stat
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deploykit import runtime
from tampered.bundles import Files

LOCAL, CENTRAL, END = (struct.Struct(f"<4s{rest}") for rest in ("5H3I2H", "6H3I5H2I", "4H2IH"))
Fields = Mapping[str, int]
LOCAL_FIELDS = (
    *("needs", "flags", "method", "time", "date", "crc", "packed", "size"),
    *("name_bytes", "extra_bytes"),
)
CENTRAL_FIELDS = (
    *("made_by", *LOCAL_FIELDS, "comment_bytes", "disk", "internal", "external", "at"),
)
END_FIELDS = ("disk", "first_disk", "here", "count", "index_bytes", "index_at", "comment_bytes")
MADE_BY, MODE = 20 | 3 << 8, (stat.S_IFREG | 0o644) << 16
FIRST_DAY = 33  # 1980-01-01


@dataclass(frozen=True)
class Entry:
    """A file in a zip file. All that is not given is as deploykit writes it.

    Attributes:
        name: of the file, in both headers.
        data: what stands between its header and the next one.
        size: of the file when it is unpacked; default: that of the data.
        local: fields of its own header that say something else.
        central: likewise, of its header in the index.
        local_name: the name in its own header, where that is another one.
        extra: bytes behind the name in its own header.
        central_extra: likewise, in the index.
        comment: of the file, in the index.
        before: bytes before its header.
        after: bytes behind its data.
    """

    name: bytes
    data: bytes
    size: int | None = None
    local: Fields = field(default_factory=dict)
    central: Fields = field(default_factory=dict)
    local_name: bytes | None = None
    extra: bytes = b""
    central_extra: bytes = b""
    comment: bytes = b""
    before: bytes = b""
    after: bytes = b""

    def fields(self) -> dict[str, int]:
        """Return what both headers say."""
        return {
            "needs": 20,
            "flags": 0,
            "method": 0,
            "time": 0,
            "date": FIRST_DAY,
            "crc": zlib.crc32(self.data),
            "packed": len(self.data),
            "size": len(self.data) if self.size is None else self.size,
            "name_bytes": len(self.name),
            "extra_bytes": 0,
        }

    def local_header(self) -> bytes:
        """Return the header before the data, with name and extra."""
        name = self.name if self.local_name is None else self.local_name
        lengths = {"name_bytes": len(name), "extra_bytes": len(self.extra)}
        fields = {**self.fields(), **lengths, **self.local}
        return LOCAL.pack(b"PK\3\4", *(fields[one] for one in LOCAL_FIELDS)) + name + self.extra

    def central_header(self, at: int) -> bytes:
        """Return the header in the index, with name, extra and comment."""
        lengths = {"extra_bytes": len(self.central_extra), "comment_bytes": len(self.comment)}
        only = {"made_by": MADE_BY, "disk": 0, "internal": 0, "external": MODE, "at": at}
        fields = {**self.fields(), **lengths, **only, **self.central}
        header = CENTRAL.pack(b"PK\1\2", *(fields[one] for one in CENTRAL_FIELDS))
        return header + self.name + self.central_extra + self.comment


def entries_of(files: Files) -> list[Entry]:
    """Return the entries that deploykit writes."""
    names = sorted(files, key=lambda name: (name != runtime.MANIFEST, name))
    return [Entry(name.encode(), files[name]) for name in names]


def zip_of(
    entries: Sequence[Entry],
    *,
    listed: Sequence[int] | None = None,
    gap: bytes = b"",
    behind: bytes = b"",
    comment: bytes = b"",
    end: Fields | None = None,
) -> bytes:
    """Return a zip file.

    Args:
        entries: its files, in order.
        listed: which of them the index holds, and in which order; default: all.
        gap: bytes before the index.
        behind: bytes between the index and the record that ends it.
        comment: of the whole.
        end: fields of that record that say something else.
    """
    parts, places, at = [], [], 0
    for entry in entries:
        places.append(at + len(entry.before))
        part = entry.before + entry.local_header() + entry.data + entry.after
        parts.append(part)
        at += len(part)
    order = range(len(entries)) if listed is None else listed
    index = b"".join(entries[one].central_header(places[one]) for one in order)
    fields = dict.fromkeys(END_FIELDS, 0)
    fields |= {"here": len(order), "count": len(order), "index_bytes": len(index)}
    fields |= {"index_at": at + len(gap), "comment_bytes": len(comment), **(end or {})}
    last = END.pack(b"PK\5\6", *(fields[one] for one in END_FIELDS))
    return b"".join([*parts, gap, index, behind, last, comment])
