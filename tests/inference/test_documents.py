import builtins
import io
import sys

import pytest

from longspan.errors import DocumentError
from longspan.inference.documents import Document, default_document, read_document


def write(folder, name, data):
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_text_and_markdown_are_kept_as_they_are(tmp_path):
    text = "# Title\n\n* *one* <b>\n  two\n"
    assert read_document(write(tmp_path, "a.md", text)).text == text


def test_offsets_are_those_of_a_file_opened_by_python(tmp_path):
    path = write(tmp_path, "a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read_document(path).text == path.read_text(encoding="utf-8-sig") == "one\ntwo\nthree\n"


def test_html_loses_tags_scripts_and_comments_but_not_its_structure(tmp_path):
    page = """<!DOCTYPE html><html><head><title>A  title</title><style>p {}</style></head><body><!-- no -->
    <h1>Head</h1><p>One <b>bo</b>ld
    line &amp; more.</p><script>alert(1)</script><ul><li>a</li><li>b</li></ul>
    <table><tr><td>1</td><td>2</td></tr></table><pre>if x:\n    y()</pre></body></html>"""
    text = read_document(write(tmp_path, "a.html", page)).text
    assert text.split("\n") == [
        *("A title", "", "Head", "", "One bold line & more.", "", "a", "", "b", "", "1 2", "", "if x:", "    y()", "")
    ]


@pytest.mark.parametrize("name", ["page.HTM", "page.txt", "page"])
def test_html_is_known_by_its_suffix_or_its_first_bytes(tmp_path, name):
    assert read_document(write(tmp_path, name, "\n<!doctype HTML><p>text</p>")).text == "text\n"


def test_html_is_read_in_the_encoding_it_declares(tmp_path):
    path = write(tmp_path, "a.html", '<html><meta charset="latin-1"><p>gr\u00fcn'.encode("latin-1"))
    assert read_document(path).text == "gr\u00fcn\n"
    assert read_document(path, encoding="cp1252").text == "gr\u00fcn\n"


def test_a_dash_reads_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("gr\u00fcn".encode())))
    assert read_document("-") == Document("standard input", "gr\u00fcn")


def test_other_encodings_are_read_by_name(tmp_path):
    assert (
        read_document(write(tmp_path, "a.txt", "gr\u00fcn".encode("latin-1")), encoding="latin-1").text == "gr\u00fcn"
    )
    assert read_document(write(tmp_path, "b.txt", "gr\u00fcn".encode("utf-16")), encoding="utf-16").text == "gr\u00fcn"


def test_the_default_document_is_the_language_reference():
    document = default_document()
    assert document.name == f"Python {sys.version_info.major}.{sys.version_info.minor} language reference"
    assert len(document.text) > 100_000
    assert "assertion" in document.text


BAD_FILES = {
    "empty": (b"", "document .* is empty: it holds no text"),
    "white space": (b" \n\t\n", "is empty"),
    "html without text": (b"<html><script>x</script></html>", "is empty"),
    "binary": (b"\x7fELF\x02\0\0", r"is a binary file \(a zero byte at offset 5\)"),
    "pdf": (b"%PDF-1.7 ...", "is a PDF file; turn it into text first"),
    "zip": (b"PK\x03\x04...", "is a zip archive"),
    "gzip": (b"\x1f\x8b...", "is gzip-compressed"),
    "latin-1": (b"gr\xfcn", r"is not utf-8 text \(byte 0xfc at offset 2\); name its encoding, for example --encoding"),
    "utf-16": ("text".encode("utf-16"), "is not utf-8 but UTF-16 text; add the option --encoding utf-16"),
}


@pytest.mark.parametrize(("data", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_files_without_text_are_refused(tmp_path, data, message):
    with pytest.raises(DocumentError, match=message):
        read_document(write(tmp_path, "bad.txt", data))


def test_missing_files_and_directories_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt does not exist; give a text"):
        read_document(tmp_path / "nowhere.txt")
    with pytest.raises(IsADirectoryError, match="is a directory; give the files in it"):
        read_document(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-9", "base64"])
def test_unknown_encodings_are_refused(tmp_path, encoding):
    with pytest.raises(ValueError, match=f"unknown text encoding '{encoding}'"):
        read_document(write(tmp_path, "a.txt", "text"), encoding=encoding)


def test_html_without_its_library_names_the_extra(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without_bs4(name, *args, **kwargs):
        if name.startswith("bs4"):
            raise ModuleNotFoundError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_bs4)
    with pytest.raises(ImportError, match=r"pip install 'longspan\[html\]'"):
        read_document(write(tmp_path, "a.html", "<p>text"))
