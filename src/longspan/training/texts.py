"""The texts that a language model learns from: a file or a folder, cut into train, dev and test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "dev", "test")
SHARES = (0.90, 0.95)  # where dev and test begin

# The files of mattmahoney.net/dc that papers report on: 90,000,000 bytes for training, 5,000,000 for dev and for test.
OFFICIAL_BYTES = {"text8": 100_000_000, "enwik8": 100_000_000}
PIECE_BYTES = 1 << 20

_NAMES = {"train": "train", "dev": "dev", "valid": "dev", "validation": "dev", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A stretch of a file: bytes start..end, which cut no character in two."""

    path: Path
    start: int
    end: int

    def pieces(self, size: int = PIECE_BYTES) -> Iterator[bytes]:
        """The bytes in pieces of about `size`. A piece ends before white space where it can, else after a character."""
        left, waiting = self.end - self.start, b""
        with self.path.open("rb") as file:
            file.seek(self.start)
            while left:
                read = file.read(min(size, left))
                if not read:
                    raise OSError(f"{self.path} became shorter while it was read")
                left -= len(read)
                waiting += read
                cut = len(waiting) if not left else _last_cut(waiting)
                if cut:
                    yield waiting[:cut]
                    waiting = waiting[cut:]


@dataclass(frozen=True, kw_only=True)
class Texts:
    """splits: the parts of "train", "dev" and "test". about: in words, how they were cut. name: of file or folder."""

    name: str
    about: str
    splits: dict[str, tuple[Part, ...]]

    def pieces(self, split: str) -> Iterator[bytes]:
        """The bytes of a split, or of "all" of them, in pieces."""
        for part in self.parts(split):
            yield from part.pieces()

    def parts(self, split: str) -> tuple[Part, ...]:
        if split != "all" and split not in self.splits:
            raise ValueError(f"split must be one of {', '.join(SPLITS)} or all; got {split!r}")
        return tuple(part for name in (SPLITS if split == "all" else (split,)) for part in self.splits[name])

    def read(self, split: str) -> bytes:
        return b"".join(self.pieces(split))


def find_texts(data: str | Path) -> Texts:
    """The texts of a file or folder, and how they are split.

    A file called text8 or enwik8 is split as papers split it, and has to be whole. A folder with train.txt, dev.txt
    (or valid.txt, validation.txt) and test.txt brings its splits. Any other file, or the *.txt files of any other
    folder one after another in the order of their names, is cut: its first 90% train, then 5% and 5%.
    Raises FileNotFoundError, and ValueError for texts that are empty, incomplete or no text.
    """
    data = Path(data)
    if not data.exists():
        raise FileNotFoundError(f"there is no file or folder {data}")
    if data.is_file():
        size = data.stat().st_size
        if data.suffix in (".zip", ".gz", ".bz2", ".xz", ".7z", ".zst"):
            raise ValueError(f"{data} is an archive: unpack it first, and name the file that was in it")
        official = OFFICIAL_BYTES.get(data.name)
        if official is not None and size != official:
            raise ValueError(
                f"{data} has {size:,} bytes and {data.name} has {official:,}: it is not whole, or another file"
            )
        about = f"the first 90% of {data.name} for training, then 5% for dev and 5% for test"
        return _cut(data.name, about, [data])
    named = {_NAMES[path.stem]: path for path in sorted(data.iterdir()) if _is_split(path)}
    if set(named) == set(SPLITS):
        splits = {split: (Part(path=named[split], start=0, end=named[split].stat().st_size),) for split in SPLITS}
        for split, (part,) in splits.items():
            if part.end == 0:
                raise ValueError(f"{named[split]} is empty")
        return Texts(name=data.name, about=", ".join(named[split].name for split in SPLITS), splits=splits)
    if named:
        raise ValueError(
            f"{data} has {', '.join(path.name for path in named.values())} and lacks "
            f"{', '.join(f'{split}.txt' for split in SPLITS if split not in named)}: give all three, or one file"
        )
    files = sorted(path for path in data.rglob("*.txt") if path.is_file())
    if not files:
        raise ValueError(f"{data} holds no .txt file")
    about = f"{len(files)} files of {data.name}, in the order of their names: 90% for training, then 5% and 5%"
    return _cut(data.name, about, files)


def _is_split(path: Path) -> bool:
    return path.stem in _NAMES and path.suffix == ".txt" and path.is_file()


def _cut(name: str, about: str, files: list[Path]) -> Texts:
    """The files one after another, cut at 90% and 95% of their bytes."""
    sizes = [path.stat().st_size for path in files]
    total = sum(sizes)
    if not total:
        raise ValueError(f"{name} is empty")
    edges = [0, *(round(share * total) for share in SHARES), total]
    splits: dict[str, tuple[Part, ...]] = {}
    for split, first, last in zip(SPLITS, edges, edges[1:], strict=False):
        parts, start = [], 0
        for path, size in zip(files, sizes, strict=True):
            begin, end = (_next_character(path, min(max(edge - start, 0), size), size) for edge in (first, last))
            if begin < end:
                parts.append(Part(path=path, start=begin, end=end))
            start += size
        splits[split] = tuple(parts)
    return Texts(name=name, about=about, splits=splits)


def _next_character(path: Path, place: int, size: int) -> int:
    """`place`, or up to 3 bytes later: where a character of UTF-8 begins."""
    with path.open("rb") as file:
        file.seek(place)
        following = file.read(3) if place < size else b""
    return place + next((skip for skip, byte in enumerate(following) if byte & 0xC0 != 0x80), 0)


def _last_cut(piece: bytes) -> int:
    space = max(piece.rfind(b" "), piece.rfind(b"\n"))
    if space > 0:
        return space
    cut = len(piece)
    while cut and piece[cut - 1] & 0xC0 == 0x80:
        cut -= 1
    return max(0, cut - 1)  # the first byte of the last character stays for the next piece
