import gzip
import json
import os
import random
import tracemalloc

import pytest

from fastlm.data import documents
from fastlm.data.documents import Split, open_source, survey
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


@pytest.mark.parametrize(
    "text",
    [
        "a" * 20 + END_OF_TEXT + "\n",
        END_OF_TEXT + " " * 7 + "and more text\n",
        "a" * 20 + "\ufeffb\n",
        "\n" * 50 + "a\n",
        "a\n" + "\n" * 50 + "b\n" + " " * 45,
    ],
)
def test_a_part_of_a_giant_text_is_not_judged_as_if_it_were_whole(tmp_path, monkeypatch, text):
    monkeypatch.setattr(documents, "MAX_CHARACTERS", 20)
    for path in (write(tmp_path / "a.txt", text), write(tmp_path / "a.jsonl", json.dumps({"text": text}))):
        assert "".join(read(path)) == text


def test_a_mark_behind_a_part_of_a_giant_json_line_is_text(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_CHARACTERS", 20)
    path = write(tmp_path / "a.jsonl", '\ufeff{"text": "' + "a" * 7 + '\ufeffb"}\n')  # 3 + 10 + 7 bytes before the mark
    assert "".join(read(path)) == "aaaaaaa\ufeffb"


def test_separators_among_giant_lines_still_separate(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_CHARACTERS", 20)
    path = write(tmp_path / "a.txt", f"{'a' * 50}\n{END_OF_TEXT}\n \n{END_OF_TEXT}\n{'b' * 30}\n {END_OF_TEXT} \nc")
    assert read(path) == ["a" * 20, "a" * 20, "a" * 10 + "\n", "b" * 20, "b" * 10 + "\n", "c"]


def test_white_space_without_end_is_read_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_CHARACTERS", 1000)
    monkeypatch.setattr(documents, "MAX_BLANK_PARTS", 5)
    path = write(tmp_path / "a.txt", " " * 1_000_000 + "a")
    tracemalloc.start()
    size = sum(map(len, open_source(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 1_000_001
    assert peak < 200_000


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


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("bad.txt", f"one\n{END_OF_TEXT}\ntwo\n\0".encode(), "line 4 holds a NUL byte"),
        ("bad.jsonl", b'{"text": "one"}\n{"text": "\xff"}\n', "line 2 is not UTF-8"),
        ("bad.md", f"one\n{END_OF_TEXT}\n❄".encode()[:-1], "ends inside a UTF-8 character"),
        ("bad.txt.gz", gzip.compress(b"one\n<|endoftext|>\n" + os.urandom(3000).hex().encode())[:-9], "cut short"),
    ],
)
def test_a_file_of_a_folder_is_left_out_whole_or_not_at_all(tmp_path, name, content, reason):
    write(tmp_path / "a.txt", "good")
    write(tmp_path / name, content)
    source = open_source(tmp_path)
    assert list(source) == ["good"]
    assert len(source.skipped) == 1
    assert name in source.skipped[0]
    assert reason in source.skipped[0]


def test_a_link_to_a_folder_within_a_folder_is_listed_as_left_out(tmp_path):
    write(tmp_path / "elsewhere" / "b.txt", "b")
    write(tmp_path / "corpus" / "a.txt", "a")
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    source = open_source(tmp_path / "corpus")
    assert list(source) == ["a"]
    assert len(source.skipped) == 1
    assert "linked: is a link to a folder" in source.skipped[0]


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


RECORDS = "".join(json.dumps({"text": text}) + "\n" for text in ("first", "second"))


@pytest.mark.parametrize(
    "name", ["a.JSONL", "a.NdJson", "a.json", "a.JSON", "a.jsonl.GZ", "a.ndjson.gz", "a.json.gz", "a.JSON.Gz"]
)
def test_a_suffix_says_what_a_file_holds_however_it_is_written(tmp_path, name):
    is_packed = name.lower().endswith(".gz")
    path = write(tmp_path / name, gzip.compress(RECORDS.encode()) if is_packed else RECORDS)
    assert read(path) == ["first", "second"]


@pytest.mark.parametrize(
    ("name", "target"),
    [("a.jsonl", "3f7a"), ("a.json", "3f7a.txt"), ("a.txt", "b.jsonl"), ("a.jsonl.gz", "3f7a"), ("a", "b.jsonl")],
)
def test_a_link_is_read_by_its_own_name_unless_it_has_no_suffix(tmp_path, name, target):
    content = gzip.compress(RECORDS.encode()) if name.endswith(".gz") else RECORDS
    write(tmp_path / "blobs" / target, content)
    (tmp_path / name).symlink_to(f"blobs/{target}")
    source = open_source(tmp_path / name)
    assert source.name == name
    assert list(source) == ([RECORDS] if name == "a.txt" else ["first", "second"])


@pytest.mark.parametrize(
    "content",
    [
        '[\n  {"text": "a"},\n  {"text": "b"}\n]\n',
        '[{"text": "a"}, {"text": "b"}]',
        '{\n  "text": "a"\n}\n{\n  "text": "b"\n}\n',
        '{"text": {"0": "a", "1": "b"}}',
        '{"text": "cut\n{"text": "b"}\n',
    ],
)
def test_records_in_another_form_than_lines_of_json_are_not_read_as_text_unnoticed(tmp_path, content):
    path = write(tmp_path / "corpus" / "a.json", content)
    with pytest.raises(ValueError, match=r"a.json: holds 'text' in another form than one JSON object per line"):
        read(path)
    write(tmp_path / "corpus" / "b.txt", "b")
    source = open_source(tmp_path / "corpus")
    assert list(source) == ["b"]
    assert len(source.skipped) == 1


@pytest.mark.parametrize("content", ['{\n  "name": "a package"\n}\n', "{}\n", "[1, 2]", '// a comment\n{"a": 1}\n'])
def test_a_json_file_without_records_is_text_like_any_other(tmp_path, content):
    assert read(write(tmp_path / "package.json", content)) == [content]


def test_json_lines_without_the_field_are_an_error_in_a_json_file_too(tmp_path):
    path = write(tmp_path / "a.json", '{"body": "one"}\n{"body": "two"}\n')
    with pytest.raises(ValueError, match=r"a.json: line 1 has no field 'text'; its fields are 'body'"):
        read(path)
    assert read(path, text_field="body") == ["one", "two"]


def test_a_json_file_of_one_giant_line_is_not_guessed_at(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "JSON_START", 100)
    monkeypatch.setattr(documents, "MAX_CHARACTERS", 50)
    path = write(tmp_path / "a.json", json.dumps({"text": "a" * 200}))
    with pytest.raises(ValueError, match=r"a.json: its first line has more than 100 characters; name it .jsonl"):
        read(path)


@pytest.mark.parametrize(("source", "name"), [(".", "inner"), ("..", "outer"), ("../inner/.", "inner")])
def test_a_folder_given_by_dots_has_its_own_name(tmp_path, monkeypatch, source, name):
    write(tmp_path / "outer" / "inner" / "a.txt", "a")
    monkeypatch.chdir(tmp_path / "outer" / "inner")
    assert (open_source(source).name, read(source)) == (name, ["a"])


def test_open_source_names_links_that_lead_nowhere(tmp_path):
    for link, target in (("loop", "pool"), ("pool", "loop"), ("gone.txt", "deleted.txt")):
        (tmp_path / link).symlink_to(target)
    for path in (tmp_path / "loop", tmp_path / "loop" / "a.txt"):
        with pytest.raises(OSError, match="Too many levels of symbolic links") as caught:
            open_source(path)
        assert caught.value.filename == str(path)
    with pytest.raises(FileNotFoundError, match=r"gone.txt: is a link to deleted.txt, which does not exist"):
        open_source(tmp_path / "gone.txt")
    with pytest.raises(ValueError, match=r"'a\\x00b' cannot name a file"):
        open_source("a\0b")


@pytest.mark.parametrize("content", ["", " \n\t\n", "<|endoftext|>\n<|endoftext|>\n"])
def test_survey_refuses_a_corpus_without_text(tmp_path, content):
    path = write(tmp_path / "a.txt", content)
    with pytest.raises(ValueError, match=r"a.txt: no text in 1 file"):
        survey(open_source(path))


def test_survey_of_a_folder_of_pictures_says_why_it_is_empty(tmp_path):
    write(tmp_path / "x.png", b"\0")
    with pytest.raises(ValueError, match=r"no text in 1 file.*x\.png.*NUL byte"):
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


def test_fingerprint_follows_a_link_to_another_target(tmp_path):
    for name in ("one", "two"):
        os.utime(write(tmp_path / name / "a.txt", name), (1, 1))  # same size and time
    (tmp_path / "within").mkdir()
    prints = set()
    for name in ("one", "two"):
        for link, target in (("a.txt", f"{name}/a.txt"), ("folder", name), ("within/a.txt", f"../{name}/a.txt")):
            (tmp_path / link).unlink(missing_ok=True)
            (tmp_path / link).symlink_to(target)
        prints |= {open_source(tmp_path / link).fingerprint() for link in ("a.txt", "folder", "within")}
    assert len(prints) == 6


def test_fingerprint_takes_names_that_are_not_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write(folder / os.fsdecode(b"\xff.jsonl"), RECORDS)
    prints = {
        open_source(path, text_field="t\udcff").fingerprint() for path in (folder, folder / os.fsdecode(b"\xff.jsonl"))
    }
    assert len(prints) == 2


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


def words(seed, count):
    return " ".join(random.Random(seed).choices(["one", "two", "three", "and"], k=count)) + f" {seed}"


def share_of(parts):
    """(share of the characters held out, distinct documents to train on, distinct documents held out)."""
    heads, tails = ({text for text in side if text} for side in zip(*parts, strict=True))
    assert heads.isdisjoint(tails), "a copy is on the other side"
    held_out = sum(len(tail) for _, tail in parts)
    return held_out / sum(len(head) + len(tail) for head, tail in parts), len(heads), len(tails)


@pytest.mark.parametrize(("count", "seed"), [(21, 0), (21, 1), (45, 2)])  # by the hash alone they are not near it
def test_split_of_few_documents_is_near_the_fraction(tmp_path, count, seed):
    texts = [words(f"{seed} {n}", 10 + n % 7) for n in range(count)]
    share, _, _ = share_of(split_of(tmp_path, texts, 0.05))
    assert 0.025 <= share <= 0.075


@pytest.mark.parametrize("seed", [33, 37])  # by the hash alone these are held out with all their copies
@pytest.mark.parametrize(("copies", "others"), [(600, 900), (935, 65), (90, 3000)])
def test_split_keeps_many_copies_of_a_document_for_training(tmp_path, seed, copies, others):
    copied = words(f"copied {seed}", 20)
    texts = [copied] * copies + [words(f"{seed} {n}", 20) for n in range(others)]
    parts = split_of(tmp_path, texts, 0.05)
    share, num_heads, num_tails = share_of(parts)
    assert 0.025 <= share <= 0.075
    assert min(num_heads, num_tails) >= 22
    assert parts[0] == (copied, "")


@pytest.mark.parametrize(
    ("copies", "num_copied", "others", "fraction"),
    [(989, 1, 11, 0.05), (5000, 1, 1, 0.05), (1000, 1, 0, 0.01), (500, 2, 0, 0.3), (400, 2, 3, 0.05)],
)
def test_split_refuses_a_corpus_of_copies_with_their_share(tmp_path, copies, num_copied, others, fraction):
    texts = [words(n, 8) for n in range(num_copied)] * copies + [words(f"other {n}", 8) for n in range(others)]
    with pytest.raises(ValueError, match=r"a.jsonl: \d+\.\d% of the text is copies of so few documents") as caught:
        split_of(tmp_path, texts, fraction)
    assert f"documents ({num_copied}) that" in str(caught.value)
    assert f"instead of {fraction:.2%}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("num_documents", "most"), [(10, 0.1), (50, 0.075)])
def test_split_holds_out_a_document_with_all_its_copies_where_every_document_has_as_many(tmp_path, num_documents, most):
    texts = [words(n, 20) for n in range(num_documents)] * 30
    share, num_heads, num_tails = share_of(split_of(tmp_path, texts, 0.05))
    assert 0.025 <= share <= most * 1.2
    assert num_heads + num_tails == num_documents


def test_split_cuts_every_copy_of_long_documents_alike(tmp_path):
    texts = [words(n, 1000) for n in range(3)] * 30
    parts = split_of(tmp_path, texts, 0.05)
    share, num_heads, num_tails = share_of(parts)
    assert 0.045 < share < 0.055
    assert (num_heads, num_tails) == (3, 3)
    assert [head + tail for head, tail in parts] == texts


def test_split_of_a_tiny_share_cuts_no_character_off_every_document(tmp_path):
    texts = [words(n, 8) for n in range(2000)]
    share, _, num_tails = share_of(split_of(tmp_path, texts, 1e-4))
    assert share < 0.001
    assert num_tails == 1


def test_split_of_a_tiny_share_holds_out_no_half_of_two_documents(tmp_path):
    assert share_of(split_of(tmp_path, [words(n, 40) for n in range(2)], 0.001))[0] < 0.05


def test_split_that_cuts_a_giant_holds_out_no_more_than_its_share_of_the_others(tmp_path):
    others = [words(n, 95) for n in range(5)]  # each nearly as large as the share
    parts = split_of(tmp_path, [words("giant", 1500), *others], 0.05)
    assert parts[1:] == [(text, "") for text in others]
    assert 0.025 < share_of(parts)[0] < 0.05


def test_split_finds_both_sides_of_a_text_that_ends_or_begins_blank(tmp_path):
    for text in ("words\n" * 50 + "\n" * 100, "\n" * 900 + "two words", " " * 50 + "ab" + " " * 50):
        ((head, tail),) = split_of(tmp_path, [text], 0.05)
        assert head + tail == text
        assert head.strip()
        assert tail.strip()


def test_survey_of_many_documents_is_as_large_as_of_few_and_splits_alike(tmp_path, monkeypatch):
    texts = [words(n, 8) for n in range(3000)] + [words("copied", 8)] * 2000
    source = open_source(write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": text}) for text in texts)))
    exact = survey(source)
    monkeypatch.setattr(documents, "MAX_GROUPS", 500)
    found = survey(source)
    assert len(exact.groups) == 3001
    assert 250 < len(found.groups) <= 500
    assert sum(size for size, _ in found.groups.values()) == found.num_bytes == exact.num_bytes
    split = Split.of(found, 0.05)
    parts = [split.divide(text) for text in texts]
    assert 0.04 < share_of(parts)[0] < 0.06
    assert parts[-1] == (texts[-1], "")
    monkeypatch.setattr(source, "read", lambda path, field: iter([[text] for text in reversed(texts)]))
    assert survey(source).groups == found.groups, "the order of the documents decides"


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


def test_parquet_bytes_that_are_no_text_are_an_error_that_names_file_and_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / os.fsdecode(b"caf\xe9.PARQUET")  # pyarrow itself takes no such name
    offsets = pyarrow.py_buffer(b"".join(n.to_bytes(4, "little") for n in range(401)))
    content = pyarrow.py_buffer(b"a" * 299 + b"\xff" + b"a" * 100)
    column = pyarrow.Array.from_buffers(pyarrow.string(), 400, [None, offsets, content])
    with open(path, "wb") as file:
        parquet.write_table(pyarrow.table({"text": column, "good": ["text"] * 400}), file)
    with pytest.raises(ValueError, match=r"\.PARQUET: row 300 is not UTF-8 \(invalid start byte\)"):
        read(path)
    assert read(path, text_field="good") == ["text"] * 400


def test_a_folder_called_stdlib_is_reached_by_its_path(tmp_path, monkeypatch):
    write(tmp_path / "stdlib" / "a.txt", "not Python: ❄")
    monkeypatch.chdir(tmp_path)
    assert read("./stdlib") == ["not Python: ❄"]
