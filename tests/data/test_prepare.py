import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from fastlm.data import Prepared, TokenDataset, Tokenizer, prepare, unigram_bits_per_byte
from tests.support.made_text import sentences

stages = import_module("fastlm.data.prepare")
TEXTS = sentences(300)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus.jsonl", TEXTS)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def write_corpus(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts_of(dataset: TokenDataset, tokenizer: Tokenizer) -> list[str]:
    places = zip(dataset.starts, dataset.lengths, strict=True)
    return [tokenizer.decode(dataset.gather(start + np.arange(1, length))) for start, length in places]


def same(ours: Prepared, other: Prepared) -> bool:
    return (ours.train.fingerprint, ours.held_out.fingerprint) == (other.train.fingerprint, other.held_out.fingerprint)


def test_prepare_loses_no_text_and_keeps_the_sides_apart(corpus, cache):
    prepared = prepare(corpus, cache, vocab_size=300)
    train, held_out = (texts_of(dataset, prepared.tokenizer) for dataset in (prepared.train, prepared.held_out))
    assert sorted(train + held_out) == sorted(TEXTS)
    assert not set(train) & set(held_out)
    assert train == [text for text in TEXTS if text in set(train)], "the order of the source changed"
    assert prepared.train.num_bytes == sum(len(text.encode()) for text in train)
    assert prepared.held_out.num_bytes == sum(len(text.encode()) for text in held_out)
    assert 3 <= len(held_out) <= 30


def test_prepare_trains_on_one_text_file_and_holds_out_its_end(tmp_path, cache):
    text = "".join(TEXTS)
    (tmp_path / "one.txt").write_text(text)
    prepared = prepare(tmp_path / "one.txt", cache, vocab_size=300)
    (head,) = texts_of(prepared.train, prepared.tokenizer)
    (tail,) = texts_of(prepared.held_out, prepared.tokenizer)
    assert head + tail == text
    assert 0.04 < len(tail) / len(text) < 0.11


def test_the_tokenizer_never_saw_the_held_out_text(tmp_path, cache):
    (tmp_path / "one.txt").write_text("ab " * 1000 + "\n" + "zqzqzqzq " * 16)
    prepared = prepare(tmp_path / "one.txt", cache, vocab_size=300)
    assert len(prepared.tokenizer.encode("zqzqzqzq")) == 8
    assert len(prepared.tokenizer.encode("ababab")) < 6


def test_facts_are_those_of_the_datasets(corpus, cache):
    prepared = prepare(corpus, cache, vocab_size=300)
    facts, train, held_out = prepared.facts, prepared.train, prepared.held_out
    assert facts.num_documents == len(TEXTS) == len(train) + len(held_out)
    assert facts.num_bytes == sum(len(text.encode()) for text in TEXTS) == train.num_bytes + held_out.num_bytes
    assert facts.num_tokens == train.num_tokens + held_out.num_tokens
    assert facts.num_held_out_documents == len(held_out)
    assert facts.num_held_out_bytes == held_out.num_bytes
    assert facts.vocab_size == prepared.tokenizer.vocab_size == train.vocab_size
    assert facts.tokenizer_hash == prepared.tokenizer.hash == train.tokenizer_hash == held_out.tokenizer_hash
    assert facts.unigram_bits_per_byte == unigram_bits_per_byte(train, held_out)
    assert "300 documents" in str(facts)
    assert "\n" not in str(facts)


def refuse(*arguments: object) -> None:
    raise AssertionError("the work was done again")


def test_a_second_call_reads_nothing_again(corpus, cache, monkeypatch):
    first = prepare(corpus, cache, vocab_size=300)
    monkeypatch.setattr(stages, "fill", refuse)
    monkeypatch.setattr(stages, "locked", refuse)
    second = prepare(corpus, cache, vocab_size=300)
    assert same(first, second)
    assert (first.facts.cached, second.facts.cached) == (False, True)
    assert dataclasses.replace(second.facts, cached=False) == first.facts


@pytest.mark.parametrize("change", ["text", "time", "vocab_size", "held_out", "text_field", "tokenizer"])
def test_a_changed_source_or_setting_is_prepared_anew(corpus, cache, tmp_path, change):
    first = prepare(corpus, cache, vocab_size=300)
    settings: dict[str, object] = {"vocab_size": 300}
    if change == "text":
        write_corpus(corpus, [*TEXTS, "new"])
    elif change == "time":
        os.utime(corpus, (1, 1))
    elif change == "text_field":
        corpus.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
        settings["text_field"] = "body"
    elif change == "tokenizer":
        settings["tokenizer"] = tmp_path / "own.json"
        Tokenizer.train(TEXTS, 290).save(tmp_path / "own.json")
    else:
        settings[change] = {"vocab_size": 301, "held_out": 0.2}[change]
    second = prepare(corpus, cache, **settings)
    assert not second.facts.cached
    assert same(first, second) == (change in ("time", "text_field"))


def test_the_tokenizer_is_kept_for_the_same_text_elsewhere(corpus, cache, tmp_path, monkeypatch):
    first = prepare(corpus, cache, vocab_size=300)
    monkeypatch.setattr(Tokenizer, "train", refuse)
    copy = write_corpus(tmp_path / "copy.jsonl", TEXTS)
    assert prepare(copy, cache, vocab_size=300).tokenizer.hash == first.tokenizer.hash


def test_prepare_uses_the_given_tokenizer(corpus, cache, tmp_path, monkeypatch):
    tokenizer = Tokenizer.train(TEXTS, 290)
    tokenizer.save(tmp_path / "own.json")
    monkeypatch.setattr(Tokenizer, "train", refuse)
    assert prepare(corpus, cache, tokenizer=tmp_path / "own.json").train.tokenizer_hash == tokenizer.hash


@pytest.mark.parametrize("name", ["train.tokens", "held_out.tokens", "tokenizer.json", "facts.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_cache_is_made_again(corpus, cache, name, damage):
    first = prepare(corpus, cache, vocab_size=300)
    (path,) = cache.glob(f"corpus.jsonl-*/{name}")
    content = path.read_bytes()
    path.write_bytes(content[:-3]) if damage == "cut" else path.unlink()
    second = prepare(corpus, cache, vocab_size=300)
    assert not second.facts.cached
    assert same(first, second)
    assert prepare(corpus, cache, vocab_size=300).facts.cached


def test_two_at_once_do_the_work_once(corpus, cache, monkeypatch):
    calls = []
    fill = stages.fill
    monkeypatch.setattr(stages, "fill", lambda *arguments: (calls.append(1), time.sleep(0.2), fill(*arguments))[-1])
    results: list[Prepared] = []
    workers = [
        threading.Thread(target=lambda: results.append(prepare(corpus, cache, vocab_size=300))) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 3
    assert len(calls) == 1
    assert all(same(results[0], other) for other in results)


KILLED = """
import sys, time, importlib
from fastlm.data import prepare
importlib.import_module("fastlm.data.prepare").write_facts = lambda *a: (print("half done", flush=True), time.sleep(60))
prepare(sys.argv[1], sys.argv[2], vocab_size=300)
"""


def test_a_killed_preparation_leaves_nothing_half_done(corpus, cache):
    process = subprocess.Popen([sys.executable, "-c", KILLED, corpus, cache], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half done\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(cache.glob("corpus.jsonl-*"))
    assert list(cache.glob("*.building")), "the test did not interrupt the work"
    assert not prepare(corpus, cache, vocab_size=300).facts.cached
    assert not list(cache.glob(".*.building")), "what the killed process left is still there"


def test_what_a_killed_preparation_left_is_cleared_when_another_text_is_prepared(corpus, cache, tmp_path):
    prepare(corpus, cache, vocab_size=300)
    (home,) = cache.glob("corpus.jsonl-*")
    left = cache / f".{home.name}.abc_1234.building" / "prepared"
    left.mkdir(parents=True)
    (left / "train.tokens").write_bytes(b"half")
    (cache / f".{home.name}.lock").touch()
    others = [cache / name for name in (".lock", ".theirs.lock", ".theirs-12.building", "notes-0123456789abcdef.lock")]
    for path in others:
        path.touch()  # the directory may be used by others too
    prepare(write_corpus(tmp_path / "other.jsonl", TEXTS), cache, vocab_size=300)
    assert sorted(path for path in cache.iterdir() if path.name.endswith((".lock", ".building"))) == sorted(others)
    assert home.is_dir()


def test_what_a_living_preparation_works_on_is_left_alone(corpus, cache, tmp_path):
    (home,) = (prepare(corpus, cache, vocab_size=300), *cache.glob("corpus.jsonl-*"))[1:]
    work = cache / f".{home.name}.abc_1234.building"
    work.mkdir()
    with stages.locked(cache / f".{home.name}.lock") as is_alone:
        assert is_alone
        prepare(write_corpus(tmp_path / "other.jsonl", TEXTS), cache, vocab_size=300)
        assert work.is_dir()
        assert (cache / f".{home.name}.lock").exists()
    prepare(write_corpus(tmp_path / "third.jsonl", TEXTS), cache, vocab_size=300)
    assert not work.exists()


def test_a_lock_is_one_though_its_file_is_removed_while_others_wait(tmp_path):
    path, inside, most = tmp_path / "lock", [], []

    def work() -> None:
        for _ in range(20):
            with stages.locked(path) as is_alone:
                inside.append(is_alone)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.pop()

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert most == [1] * 80
    assert not path.exists()


def test_a_tokenizer_is_stored_without_a_trace_of_its_writing(corpus, cache, monkeypatch):
    places = []
    save = Tokenizer.save
    monkeypatch.setattr(Tokenizer, "save", lambda self, path: (places.append(path.parent), save(self, path))[-1])
    prepare(corpus, cache, vocab_size=300)
    assert {place.parent.suffix for place in places} == {".building"}, "a killed process would leave its file for good"
    assert len(list((cache / "tokenizers").iterdir())) == 1


@pytest.mark.parametrize("name", ["日" * 80 + ".jsonl", "[a]*?\n.jsonl", os.fsdecode(b"-caf\xe9.jsonl")])
def test_prepare_takes_every_name_that_the_system_takes(tmp_path, cache, name):
    corpus = write_corpus(tmp_path / name, TEXTS)
    first = prepare(corpus, cache, vocab_size=300)
    second = prepare(corpus, cache, vocab_size=300)
    assert first.facts.source == name
    assert second.facts.cached
    assert same(first, second)
    home = cache / f".{stages.Plan(stages.open_source(corpus), cache, 300, None, None).home.name}"
    left = Path(f"{home}.12345678.building")
    left.mkdir()
    os.utime(corpus, (1, 1))
    prepare(corpus, cache, vocab_size=300)
    assert not left.exists()


def test_prepare_names_a_link_by_itself_and_notices_another_target(tmp_path, cache):
    for blob in ("3f7a", "9c01"):
        write_corpus(tmp_path / blob, TEXTS if blob == "3f7a" else TEXTS[1:])
    names = set()
    for blob in ("3f7a", "9c01"):
        (tmp_path / "corpus.jsonl").symlink_to(blob)
        facts = prepare(tmp_path / "corpus.jsonl", cache, vocab_size=300).facts
        assert not facts.cached
        names.add(facts.source)
        (tmp_path / "corpus.jsonl").unlink()
    assert names == {"corpus.jsonl"}


def test_facts_tell_the_share_that_was_asked_for_where_it_is_another(tmp_path, corpus, cache):
    texts = [f"{n}: " + "some words " * 4 for n in range(10)] * 30  # a copy goes with its document: a tenth at least
    facts = prepare(write_corpus(tmp_path / "copies.jsonl", texts), cache, vocab_size=300).facts
    assert "held out 10.0% where 5.0% was asked for" in str(facts)
    assert "asked" not in str(prepare(corpus, cache, vocab_size=300).facts)


def test_a_corpus_of_copies_is_refused_before_a_tokenizer_is_trained(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(Tokenizer, "train", refuse)
    corpus = write_corpus(tmp_path / "copies.jsonl", ["all the same"] * 500 + ["another text"])
    with pytest.raises(ValueError, match=r"copies.jsonl: 99.8% of the text is copies of so few documents \(1\)"):
        prepare(corpus, cache, vocab_size=300)
    assert list(cache.iterdir()) == []


def test_a_failed_preparation_leaves_nothing_half_done(corpus, cache):
    corpus.write_text(corpus.read_text() + "{")
    with pytest.raises(ValueError, match="line 301 is not JSON"):
        prepare(corpus, cache, vocab_size=300)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_progress_grows_to_the_end_of_every_stage(corpus, cache, monkeypatch):
    monkeypatch.setattr(stages, "ENCODING_BLOCK", 5000)
    seen: dict[str, list[tuple[int, int]]] = {}
    prepare(corpus, cache, vocab_size=300, on_progress=lambda stage, *at: seen.setdefault(stage, []).append(at))
    assert list(seen) == ["reading", "tokenizer", "encoding"]
    for steps in seen.values():
        done = [step for step, _ in steps]
        assert len(done) > 5
        assert done == sorted(done)
        assert all(step <= total for step, total in steps)
    done, total = seen["encoding"][-1]
    assert done == total == sum(len(text.encode()) for text in TEXTS)


def test_a_large_corpus_trains_the_tokenizer_on_a_sample(corpus, cache, monkeypatch):
    monkeypatch.setattr(stages, "SAMPLE_BYTES", 10_000)
    monkeypatch.setattr(stages, "SAMPLE_BLOCK", 100)
    trained_on = []
    train = Tokenizer.train
    monkeypatch.setattr(Tokenizer, "train", lambda texts, size: train((trained_on.append(t) or t for t in texts), size))
    prepare(corpus, cache, vocab_size=300)
    assert 5_000 < sum(map(len, trained_on)) < 15_000 < sum(map(len, TEXTS))


def test_a_text_too_short_to_hold_out_is_refused(tmp_path, cache):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"a.txt: a text of 1 byte leaves nothing to hold out; give more"):
        prepare(tmp_path / "a.txt", cache)
    assert not [path for path in cache.iterdir() if path.is_dir() and path.name != "tokenizers"]


def test_prepare_refuses_what_it_cannot_use(tmp_path, corpus, cache):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        prepare(tmp_path / "gone.txt", cache)
    with pytest.raises(FileNotFoundError, match="no such tokenizer file"):
        prepare(corpus, cache, tokenizer=tmp_path / "gone.json")
    with pytest.raises(ValueError, match="held-out share is 1"):
        prepare(corpus, cache, held_out=1.0)
    with pytest.raises(ValueError, match="vocab_size is 5"):
        prepare(corpus, cache, vocab_size=5)
