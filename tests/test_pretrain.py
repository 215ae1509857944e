"""The options of training, and what ties a run to its text."""

import dataclasses
from pathlib import Path

import pytest

from fastlm.models import GPTConfig
from fastlm.pretrain import PretrainOptions, prepare_data, pretrain
from fastlm.train import TrainConfig

TEXT = "for i in range(10):\n    print(i)\n" * 200


def options(data: Path, out: Path) -> PretrainOptions:
    model = GPTConfig(vocab_size=300, sequence_length=32, num_layers=1, num_heads=2, hidden_size=16)
    training = TrainConfig(out=out, steps=2, batch_size=2, eval_interval=0, checkpoint_interval=0)
    return PretrainOptions(data=str(data), model=model, training=training)


def run(chosen: PretrainOptions, cache: Path, lines: list[str]) -> None:
    data = prepare_data(chosen, cache, lambda stage, done, total: None)
    pretrain(chosen, data, lines.append, lambda step: None)


@pytest.mark.parametrize(("data", "out"), [("stdlib", "runs/stdlib"), ("texts/tales.jsonl", "runs/tales")])
def test_options_name_the_run_after_its_data(data, out):
    assert PretrainOptions(data=data).training.out == Path(out)


def test_options_keep_the_directory_that_was_asked_for(tmp_path):
    assert options(tmp_path / "text.txt", tmp_path / "run").training.out == tmp_path / "run"


def test_options_continue_a_definition_only_in_code():
    assert (PretrainOptions().prompt, PretrainOptions(data="tales.txt").prompt) == ("def ", "")


def test_prepare_data_refuses_giant_batches_before_any_work(tmp_path):
    chosen = options(tmp_path / "text.txt", tmp_path / "run")
    chosen = dataclasses.replace(chosen, model=dataclasses.replace(chosen.model, sequence_length=10**9))
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(ValueError, match=r"2 rows of 1,000,000,000 tokens takes 86.0 GB"):
        prepare_data(chosen, tmp_path / "cache", lambda stage, done, total: None)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


def test_pretrain_resumes_on_a_link_to_the_same_text_in_another_place(tmp_path):
    link = tmp_path / "text.txt"
    for blob in ("3f7a", "9c01"):
        (tmp_path / blob).write_text(TEXT)
        link.unlink(missing_ok=True)
        link.symlink_to(blob)
        run(options(link, tmp_path / "run"), tmp_path / "cache", lines := [])
    assert any("resumed" in line or "step 2" in line for line in lines)


def test_pretrain_refuses_to_resume_on_changed_text(tmp_path):
    text, lines = tmp_path / "text.txt", []
    chosen = options(text, tmp_path / "run")
    text.write_text(TEXT)
    run(chosen, tmp_path / "cache", lines)
    chosen = dataclasses.replace(chosen, tokenizer=tmp_path / "run" / "tokenizer.json")
    run(chosen, tmp_path / "cache", lines)  # the same text: nothing to refuse, whoever made the tokenizer
    text.write_text(TEXT.replace("range(10)", "range(11)"))
    with pytest.raises(ValueError, match="resume with the same data"):
        run(chosen, tmp_path / "cache", lines)
