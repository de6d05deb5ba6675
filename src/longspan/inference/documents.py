"""Reading documents: files, standard input and the embedded default, all as one string each."""

from __future__ import annotations

import codecs
import io
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from longspan.errors import DocumentError

HTML_SUFFIXES = (".html", ".htm", ".xhtml")
# First bytes of files that people hand over as if they were text, and what to do with them.
_BINARY_KINDS = {
    b"%PDF-": "a PDF file; turn it into text first, for example with pdftotext",
    b"PK\x03\x04": "a zip archive, as .docx and .epub files are; save it as text first",
    b"\x1f\x8b": "gzip-compressed; unpack it first",
}
_PARAGRAPHS = re.compile(
    "^(address|article|aside|blockquote|br|dd|details|dialog|div|dl|dt|fieldset|figcaption|figure|footer|form|h[1-6]|header"
    "|hr|li|main|nav|ol|p|pre|section|summary|table|title|tr|ul)$"
)


@dataclass(frozen=True)
class Document:
    """A text and the name it is reported under."""

    name: str
    text: str

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise DocumentError(f"document {self.name} is empty: it holds no text.")


def read_document(path: str | Path, *, encoding: str | None = None) -> Document:
    """The document at `path`, or on standard input for "-": text and Markdown as they are, HTML without its tags.

    encoding: of the bytes; None means UTF-8, or what an HTML page declares. Line ends become "\\n", as `open` does.
    Raises FileNotFoundError, IsADirectoryError, DocumentError (empty, binary, wrong encoding), and ImportError for HTML
    without beautifulsoup4.
    """
    if str(path) == "-":
        name, data = "standard input", sys.stdin.buffer.read()
    else:
        name, path = str(path), Path(path)
        if not path.exists():
            raise FileNotFoundError(
                f"document {name} does not exist; give a text, Markdown or HTML file, or - for standard input."
            )
        if path.is_dir():
            raise IsADirectoryError(
                f"document {name} is a directory; give the files in it, for example {path / '*.txt'}."
            )
        data = path.read_bytes()
    is_html = name.lower().endswith(HTML_SUFFIXES) or data[:1024].lstrip().lower().startswith(
        (b"<!doctype html", b"<html")
    )
    return Document(name, _read_html(name, data, encoding) if is_html else _decode(name, data, encoding or "utf-8"))


def default_document() -> Document:
    """The language reference that every CPython carries: 465,000 characters in Python 3.11."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ImportError(
            "this Python has no pydoc_data.topics, the default document; name a document: longspan answer QUESTION FILE"
        ) from error
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Document(f"Python {version} language reference", "\n".join(topics.values()))


def _decode(name: str, data: bytes, encoding: str) -> str:
    for magic, kind in _BINARY_KINDS.items():
        if data.startswith(magic):
            raise DocumentError(f"document {name} is {kind}.")
    if b"\0" in data[:8192] and not encoding.lower().startswith(("utf-16", "utf16", "utf-32", "utf32")):
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise DocumentError(f"document {name} is not {encoding} but UTF-16 text; add the option --encoding utf-16.")
        raise DocumentError(
            f"document {name} is a binary file (a zero byte at offset {data.index(0)}); "
            "longspan reads text, Markdown and HTML."
        )
    try:
        text = data.decode(encoding)
    except LookupError:
        raise ValueError(
            f"unknown text encoding {encoding!r}; Python knows for example utf-8, latin-1, cp1252 and utf-16."
        ) from None
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"document {name} is not {encoding} text (byte 0x{data[error.start]:02x} at offset {error.start}); "
            "name its encoding, for example --encoding latin-1, or convert it with iconv."
        ) from None
    return io.StringIO(text.removeprefix("\ufeff"), newline=None).read()


def _read_html(name: str, data: bytes, encoding: str | None) -> str:
    """The text of a page: one line a paragraph, no scripts and styles, white space as a browser shows it."""
    try:
        from bs4 import BeautifulSoup
        from bs4.dammit import EncodingDetector
    except ImportError as error:
        raise ImportError("reading HTML needs beautifulsoup4; install it with: pip install 'longspan[html]'") from error
    html = _decode(name, data, encoding or EncodingDetector.find_declared_encoding(data, is_html=True) or "utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # XHTML read as HTML, or a page so short that it looks like a file name
        soup = BeautifulSoup(html, "html.parser")
    for hidden in soup(["script", "style", "template", "noscript"]):
        hidden.decompose()
    for string in soup.find_all(string=True):
        if string.find_parent("pre") is None:
            string.replace_with(type(string)(re.sub(r"\s+", " ", string)))
    for cell in soup(["td", "th"]):
        cell.append(" ")
    for paragraph in soup(_PARAGRAPHS):
        paragraph.insert_before("\n")
        paragraph.append("\n")
    lines = re.sub(r"[^\S\n]+\n", "\n", soup.get_text())
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"(?m)^ (?=\S)", "", lines)).strip() + "\n"
