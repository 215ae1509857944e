import gzip
import json
import os
import tracemalloc

import pytest

from fastlm.data import documents
from fastlm.data.documents import Split, Survey, open_source, survey
from fastlm.data.tokenizer import END_OF_TEXT


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path, **options):
    return list(open_source(path, **options))


def test_stdlib_is_python_text_without_tests_or_installed_packages():
    source = open_source("stdlib")
    assert len(source.files) > 300
    names = {path.relative_to(source.root).parts[0] for path in source.files}
    assert "json" in names
    assert not names & {"site-packages", "dist-packages", "test"}
    texts = list(source)
    assert texts == list(source), "the order changed"
    assert any("def dumps(" in text for text in texts)
    assert len(texts) + len(source.skipped) <= len(source.files)


def test_stdlib_reads_the_encoding_that_a_file_declares(tmp_path):
    path = write(tmp_path / "latin.py", "# coding: latin-1\nname = 'Zoë'\n".encode("latin-1"))
    assert list(documents.read_python(path)) == ["# coding: latin-1\nname = 'Zoë'\n"]
    path = write(tmp_path / "wrong.py", b"name = '\xff'\n")
    with pytest.raises(documents.NotTextError, match=r"wrong\.py"):
        list(documents.read_python(path))


def test_a_text_file_is_one_document_unchanged(tmp_path):
    text = "first\r\n\r\n\tsecond <|endoftext|> inside a line\n\n\nno end of line"
    assert read(write(tmp_path / "a.txt", text)) == [text]


def test_lines_of_end_of_text_separate_documents(tmp_path):
    text = f"one\n{END_OF_TEXT}\n\n{END_OF_TEXT}\r\ntwo\nlines\n{END_OF_TEXT}"
    assert read(write(tmp_path / "a.txt", text)) == ["one\n", "two\nlines\n"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfhello")) == ["hello"]


@pytest.mark.parametrize("text", ["x" * 30, "line\n" * 6, "❄" * 30, "a\nbb\nccc\ndddd\neeeee\nffffff\n"])
def test_a_giant_document_goes_on_in_another_and_loses_nothing(tmp_path, monkeypatch, text):
    monkeypatch.setattr(documents, "MAX_CHARACTERS", 7)
    for path in (write(tmp_path / "a.txt", text), write(tmp_path / "a.jsonl", json.dumps({"text": text}))):
        found = read(path)
        assert "".join(found) == text
        assert max(map(len, found)) <= 7


def test_json_lines_take_the_named_field(tmp_path):
    lines = [{"text": "one", "body": "two"}, {"text": " \n", "body": "three"}, {"text": "❄", "body": "four"}]
    path = write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, lines)))
    assert read(path) == ["one", "❄"]
    assert read(path, text_field="body") == ["two", "three", "four"]


def test_json_half_of_a_surrogate_pair_becomes_the_replacement_character(tmp_path):
    path = write(tmp_path / "a.jsonl", r'{"text": "a\ud83db \ud83d\ude00"}')
    assert read(path) == ["a\ufffdb \U0001f600"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('["text"]', "line 2 is a JSON list, expected an object with a field 'text'"),
        ('{"content": "x", "id": 1}', "line 2 has no field 'text'; its fields are 'content', 'id'"),
        ("{}", "line 2 has no field 'text'; its fields are none"),
        ('{"text": 5}', "line 2: field 'text' is int, expected a string"),
    ],
)
def test_json_lines_errors_name_file_line_and_field(tmp_path, line, message):
    path = write(tmp_path / "bad.jsonl", '{"text": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl") as caught:
        read(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good\nbad\0", "line 2 holds a NUL byte"),
        (b"good\n\xff\xfe", "line 2 is not UTF-8"),
        ("good\n❄".encode()[:-1], "ends inside a UTF-8 character"),
    ],
)
def test_a_binary_file_is_an_error_that_names_file_and_line(tmp_path, content, message):
    path = write(tmp_path / "bad.txt", content)
    with pytest.raises(ValueError, match=r"bad\.txt") as caught:
        read(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_gzipped_files_read_like_plain_ones(tmp_path, name):
    content = json.dumps({"text": "some text " * 50}).encode()
    plain, packed = write(tmp_path / name, content), write(tmp_path / f"{name}.gz", gzip.compress(content))
    assert read(packed) == read(plain)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-12], lambda data: data[:20] + b"xx" + data[22:], lambda data: b"x"]
)
def test_damaged_gzip_is_one_clear_error(tmp_path, damage):
    path = write(tmp_path / "a.txt.gz", damage(gzip.compress(os.urandom(500).hex().encode())))
    with pytest.raises(ValueError, match=r"a.txt.gz: the gzip data is damaged or cut short"):
        read(path)


def test_a_folder_is_read_in_a_fixed_order_and_lists_what_is_no_text(tmp_path):
    write(tmp_path / "b.md", "from b")
    write(tmp_path / "a" / "z.jsonl", '{"text": "from z"}\n{"text": "again"}')
    write(tmp_path / "a" / "picture.png", b"\x89PNG\0\0")
    write(tmp_path / "a" / "empty.txt", "")
    write(tmp_path / ".git" / "config", "hidden")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    source = open_source(tmp_path)
    assert list(source) == ["from b", "from z", "again"]
    assert len(source.skipped) == 1
    assert "picture.png" in source.skipped[0]
    assert list(source) == ["from b", "from z", "again"]
    assert len(source.skipped) == 1, "skipped files are counted anew in each pass"


def test_a_folder_is_read_sorted_at_every_level(tmp_path):
    names = [f"{folder}/{name}.txt" for folder in "hgfabcedji" for name in "cabd"]
    for name in names:
        write(tmp_path / name, name)
    assert read(tmp_path) == sorted(names)


def test_a_bad_json_line_in_a_folder_is_still_an_error(tmp_path):
    write(tmp_path / "a.jsonl", "{")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read(tmp_path)


def test_open_source_refuses_what_is_not_there_or_not_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        open_source(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        open_source(tmp_path / "pipe")


@pytest.mark.parametrize("content", ["", " \n\t\n", "<|endoftext|>\n<|endoftext|>\n"])
def test_survey_refuses_a_corpus_without_text(tmp_path, content):
    path = write(tmp_path / "a.txt", content)
    with pytest.raises(ValueError, match=r"a.txt: no text in 1 files"):
        survey(open_source(path))


def test_survey_of_a_folder_of_pictures_says_why_it_is_empty(tmp_path):
    write(tmp_path / "x.png", b"\0")
    with pytest.raises(ValueError, match=r"no text in 1 files.*x\.png.*NUL byte"):
        survey(open_source(tmp_path))


def test_fingerprint_follows_names_sizes_and_times(tmp_path):
    path = write(tmp_path / "a.txt", "one")
    prints = {open_source(tmp_path).fingerprint()}
    assert open_source(tmp_path).fingerprint() in prints
    os.utime(path, (1, 1))
    prints.add(open_source(tmp_path).fingerprint())
    write(tmp_path / "b.txt", "two")
    prints.add(open_source(tmp_path).fingerprint())
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    prints.add(open_source(tmp_path).fingerprint())
    prints.add(open_source(tmp_path, text_field="body").fingerprint())
    assert len(prints) == 5


def test_reading_holds_one_document_at_a_time(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps({"text": "word " * 2000}) + "\n") * 1000)  # 10 MB
    tracemalloc.start()
    num_bytes = survey(open_source(path)).num_bytes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_bytes == 10_000_000
    assert peak < 1_000_000


def split_of(tmp_path, texts, fraction):
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": text}) for text in texts))
    source = open_source(path)
    split = Split.of(survey(source), fraction)
    return [split.divide(text) for text in source]


def test_split_keeps_documents_whole_and_holds_out_about_the_fraction(tmp_path):
    texts = [f"document number {n}" for n in range(2000)]
    parts = split_of(tmp_path, texts, 0.1)
    assert [head + tail for head, tail in parts] == texts
    assert all(not head or not tail for head, tail in parts)
    held_out = sum(bool(tail) for _, tail in parts)
    assert 140 < held_out < 260  # 200 expected, standard deviation 13


def test_split_puts_copies_on_one_side(tmp_path):
    texts = [f"document number {n % 50}" for n in range(1000)]
    parts = split_of(tmp_path, texts, 0.3)
    assert {head for head, _ in parts}.isdisjoint({tail for _, tail in parts} - {""})
    assert any(head for head, _ in parts)
    assert any(tail for _, tail in parts)


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5, 0.999])
@pytest.mark.parametrize("num_documents", [1, 2, 3, 20, 100])
def test_split_leaves_something_on_either_side(tmp_path, num_documents, fraction):
    texts = [f"document number {n} has several words" for n in range(num_documents)]
    parts = split_of(tmp_path, texts, fraction)
    assert [head + tail for head, tail in parts] == texts
    assert any(head for head, _ in parts)
    assert any(tail for _, tail in parts)


def test_split_cuts_a_single_text_at_a_line_near_its_end(tmp_path):
    text = "".join(f"line {n}\n" for n in range(1000))
    ((head, tail),) = split_of(tmp_path, [text], 0.05)
    assert head + tail == text
    assert head.endswith("\n")
    assert 0.04 * len(text) < len(tail) < 0.11 * len(text)


def test_split_never_holds_out_a_document_larger_than_the_share(tmp_path):
    giant = "giant " * 5000
    for n in range(20):  # whatever its hash is
        parts = split_of(tmp_path, [f"{n} {giant}", *(f"small {k}" for k in range(100))], 0.05)
        head, tail = parts[0]
        assert len(tail) < 0.06 * len(giant) < len(head)


def test_split_holds_out_at_least_the_document_of_smallest_hash():
    found = Survey(100, 10_000, smallest_hash=1 << 63, largest_hash=(1 << 64) - 1, content_hash="")
    assert Split.of(found, 0.05).threshold == (1 << 63) + 1


@pytest.mark.parametrize("fraction", [0, 1, -1, 2])
def test_split_refuses_a_fraction_outside_0_to_1(tmp_path, fraction):
    with pytest.raises(ValueError, match="held-out share"):
        split_of(tmp_path, ["a", "b"], fraction)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'fastlm\[parquet\]'"):
        read(write(tmp_path / "a.parquet", b"PAR1"))


def test_parquet_takes_the_named_column(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    texts = [f"text {n}" for n in range(1000)]
    parquet.write_table(pyarrow.table({"body": texts, "id": list(range(1000))}), path, row_group_size=100)
    assert read(path, text_field="body") == texts
    with pytest.raises(ValueError, match=r"a.parquet: has no column 'text'; its columns are body, id"):
        read(path)
    with pytest.raises(ValueError, match=r"row 1: field 'id' is int, expected a string"):
        read(path, text_field="id")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a.parquet: cannot be read as Parquet"):
        read(path, text_field="body")


def test_a_folder_called_stdlib_is_reached_by_its_path(tmp_path, monkeypatch):
    write(tmp_path / "stdlib" / "a.txt", "not Python: ❄")
    monkeypatch.chdir(tmp_path)
    assert read("./stdlib") == ["not Python: ❄"]
