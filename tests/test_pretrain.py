"""The options of training, and what ties a run to its text."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from fastlm.data import Tokenizer
from fastlm.generation import generate
from fastlm.models import GPT, GPTConfig
from fastlm.pretrain import PretrainOptions, continuation, load_run, prepare_data, pretrain, run_name, sampler
from fastlm.train import TrainConfig
from fastlm.train.checkpoint import CheckpointError, read_newest

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


@pytest.mark.parametrize(
    ("data", "name"), [("..", "texts"), ("../..", "home"), (".", "now"), ("a/..", "now"), ("/", "data"), ("", "now")]
)
def test_run_name_of_a_folder_is_its_own(tmp_path, monkeypatch, data, name):
    (tmp_path / "home/texts/now").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home/texts/now")
    assert run_name(data) == name


@pytest.mark.parametrize("data", ["...txt", "..foo", "...", "a/.../", "....jsonl", "../...txt"])
def test_run_name_stays_within_the_folder_of_runs(data):
    out = PretrainOptions(data=data).training.out
    assert out.parent == Path("runs")
    assert out.name not in ("", ".", "..")


def test_options_find_data_in_the_home_directory():
    assert PretrainOptions(data="~/tales.txt").data == str(Path.home() / "tales.txt")


def test_options_refuse_a_prompt_that_no_text_can_spell_before_training():
    with pytest.raises(ValueError, match=r"prompt is 'def .udcff', expected text that UTF-8 can spell"):
        PretrainOptions(prompt="def \udcff")


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


def test_pretrain_keeps_the_configuration_of_each_part_of_a_run(tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(TEXT)
    chosen = options(text, out)
    run(chosen, tmp_path / "cache", [])
    first = (out / "config.toml").read_bytes()
    run(chosen, tmp_path / "cache", [])
    assert [path.name for path in out.glob("config*")] == ["config.toml"]
    for rate in (1e-4, 1e-5):  # neither takes a step: all are done
        training = dataclasses.replace(chosen.training, learning_rate=rate)
        run(dataclasses.replace(chosen, training=training), tmp_path / "cache", [])
        assert (out / "config-2.toml").read_bytes() == first
        assert f"learning_rate = {rate}\n" in (out / "config.toml").read_text()


def test_pretrain_refuses_to_resume_on_changed_text(tmp_path):
    text, lines = tmp_path / "text.txt", []
    chosen = options(text, tmp_path / "run")
    text.write_text(TEXT)
    run(chosen, tmp_path / "cache", lines)
    chosen = dataclasses.replace(chosen, tokenizer=tmp_path / "run" / "tokenizer.json")
    run(chosen, tmp_path / "cache", lines)  # the same text: nothing to refuse, whoever made the tokenizer
    text.write_text(TEXT.replace("range(10)", "range(11)"))
    with pytest.raises(ValueError, match=r"the text of .*text.txt is not what it was then; put it back"):
        run(chosen, tmp_path / "cache", lines)


def test_pretrain_resumes_on_the_same_text_under_another_name(tmp_path):
    lines = []
    for name in "text.txt", "copy.txt":
        (tmp_path / name).write_text(TEXT)
        run(options(tmp_path / name, tmp_path / "run"), tmp_path / "cache", lines)
    assert any(line.startswith("resumed from") for line in lines)


def test_pretrain_keeps_a_sample_after_each_evaluation(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    chosen = dataclasses.replace(options(tmp_path / "text.txt", tmp_path / "run"), prompt="for ", sample_tokens=8)
    run(chosen, tmp_path / "cache", lines := [])
    [sample] = map(json.loads, (tmp_path / "run" / "samples.jsonl").read_text().splitlines())
    assert (sample["step"], sample["prompt"]) == (2, "for ")
    assert any(line.startswith("step 2/2  sample: for") for line in lines)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["packing"].endswith("documents per row")


def test_sampler_gives_the_same_text_as_long_as_the_model_is_the_same(tmp_path):
    chosen = dataclasses.replace(options(tmp_path / "text.txt", tmp_path / "run"), prompt="once ", sample_tokens=30)
    model, tokenizer = GPT(dataclasses.replace(chosen.model, vocab_size=260)), byte_level()
    sample = sampler(model, tokenizer, chosen)
    first = sample(1)
    torch.rand(5)
    assert sample(2) == first
    torch.nn.init.normal_(model.head_weight)
    assert sample(3) != first


def test_pretrain_draws_no_sample_where_none_is_asked_for(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    chosen = dataclasses.replace(options(tmp_path / "text.txt", tmp_path / "run"), sample_tokens=0)
    run(chosen, tmp_path / "cache", [])
    assert not (tmp_path / "run" / "samples.jsonl").exists()
    with pytest.raises(ValueError, match="sample_tokens is -1, expected at least 0"):
        dataclasses.replace(chosen, sample_tokens=-1)


def test_load_run_refuses_a_checkpoint_and_the_tokenizer_of_another_run(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    run(options(tmp_path / "text.txt", tmp_path / "run"), tmp_path / "cache", [])
    load_run(tmp_path / "run")
    with pytest.raises(
        CheckpointError, match=r"step-00000002 is a checkpoint, expected the directory of its run: .*run$"
    ):
        load_run(tmp_path / "run/checkpoints/step-00000002")
    for words in ("other words", TEXT.upper()):
        Tokenizer.train([words * 30], 290).save(tmp_path / "run/tokenizer.json")
        with pytest.raises(CheckpointError, match=r"run/tokenizer.json is not the tokenizer that .*step-00000002 was"):
            load_run(tmp_path / "run")


def test_a_run_goes_on_that_was_begun_before_a_model_had_a_setting_that_is_off(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    chosen = options(tmp_path / "text.txt", tmp_path / "run")
    as_dict, later = dataclasses.asdict, ("qk_norm", "qkv_bias", "head_dim", "sliding_window")
    with monkeypatch.context() as patch:
        patch.setattr(dataclasses, "asdict", lambda x: {k: v for k, v in as_dict(x).items() if k not in later})
        run(chosen, tmp_path / "cache", [])
    run(chosen, tmp_path / "cache", lines := [])
    assert any("resumed" in line or "step 2" in line for line in lines)
    chosen = dataclasses.replace(chosen, model=dataclasses.replace(chosen.model, qk_norm=True))
    with pytest.raises(CheckpointError, match=r"was trained with model.qk_norm = None, and this run has True"):
        run(chosen, tmp_path / "cache", [])


@pytest.mark.parametrize("style", ["GPT-2", "Llama", "Qwen3"])
def test_an_exported_run_continues_a_text_in_transformers_by_the_same_tokens(tmp_path, style):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "text.txt").write_text(TEXT)
    chosen = options(tmp_path / "text.txt", tmp_path / "run")
    shape = {"vocab_size": 300, "sequence_length": 32, "num_layers": 1, "num_heads": 2, "hidden_size": 16}
    if style != "GPT-2":
        chosen.model = GPTConfig.llama(**shape, qk_norm=style == "Qwen3", head_dim=16)
    chosen.training = dataclasses.replace(chosen.training, steps=30, learning_rate=1e-2)
    run(chosen, tmp_path / "cache", [])
    model, tokenizer = load_run(tmp_path / "run")
    assert model.config.padded_vocab_size > model.config.vocab_size
    model.save_pretrained(tmp_path / "out", tokenizer=tokenizer)
    names = ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*names, "tokenizer_config.json"]

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = reader("for i", return_tensors="pt")
    drawn = theirs.generate(**asked, max_new_tokens=20)
    greedy = {"temperature": 0, "stop_token": tokenizer.end_of_text}
    assert torch.equal(generate(model, asked.input_ids, 20, **greedy), drawn)
    text = "for i" + "".join(continuation(model, tokenizer, "for i", 20, temperature=0))
    assert reader.decode(drawn[0], skip_special_tokens=True) == text
    again = "for i" + "".join(continuation(*load_run(tmp_path / "out"), "for i", 20, temperature=0))
    assert again == text


def test_save_pretrained_refuses_a_tokenizer_of_more_tokens_than_the_model_has(tmp_path):
    model = GPT(GPTConfig(vocab_size=259, sequence_length=8, num_layers=1, num_heads=1, hidden_size=8))
    with pytest.raises(ValueError, match="the tokenizer has 260 tokens and the model 259"):
        model.save_pretrained(tmp_path / "out", tokenizer=Tokenizer.train(["abcabc" * 9], 260))


def test_load_run_takes_the_averaged_weights_of_a_run_that_averaged(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    chosen = options(tmp_path / "text.txt", tmp_path / "run")
    averaging = dataclasses.replace(chosen.training, ema_decay=0.5, precision="bf16-params", device="cpu")
    run(dataclasses.replace(chosen, training=averaging), tmp_path / "cache", [])
    saved = read_newest(tmp_path / "run").tensors
    loaded = load_run(tmp_path / "run")[0].state_dict()
    assert all(torch.equal(value, saved["ema"][name]) for name, value in loaded.items())
    assert not all(torch.equal(value, saved["model"][name].float()) for name, value in loaded.items())


class Draws:
    """A model that gives these tokens in turn."""

    def __init__(self, tokens: list[int], size: int) -> None:
        self.left, self.size, self.config = list(tokens), size, GPTConfig(vocab_size=size, sequence_length=64)

    def new_cache(self, batch: int) -> None:
        return None

    def next_token_logits(self, tokens: torch.Tensor, cache: None) -> torch.Tensor:
        return torch.eye(self.size)[self.left.pop(0)][None]


def metaspace() -> Tokenizer:
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], show_progress=False)
    backend.train_from_iterator(["once upon a time it was, said he. the word's end"] * 9, trainer)
    return Tokenizer(backend.to_str().encode())


def word_piece() -> Tokenizer:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    backend.train_from_iterator(["once upon a time it was, said he. the word's end, won't it"] * 9, trainer)
    return Tokenizer(backend.to_str().encode())


def byte_level() -> Tokenizer:
    return Tokenizer.train(["once upon a time"], 260)


@pytest.mark.parametrize("tokenizer", [metaspace, word_piece, byte_level])
@pytest.mark.parametrize(
    ("prompt", "rest"),
    [
        ("once upon", " a time"),
        ("", "once upon a time"),
        ("once", " upon, said he. the word's end. it won't"),
        ("a", ""),
    ],
)
def test_continuation_is_the_text_of_prompt_and_drawn_tokens_together(tokenizer, prompt, rest):
    made = tokenizer()
    given, tokens = made.encode(prompt), made.encode(prompt + rest)
    drawn = tokens[len(given) :]
    pieces = list(continuation(Draws(drawn, made.vocab_size), made, prompt, len(drawn), temperature=0.0))
    assert made.decode(given) + "".join(pieces) == made.decode([*given, *drawn])


@pytest.mark.parametrize("rest", ["caf\u00e9", "\U0001f600!", "\ufffd", "words \ufffd", "\ufffd\ufffd and on and on"])
def test_continuation_gives_whole_characters_and_all_of_them(rest):
    made = byte_level()
    tokens = made.encode(rest)
    pieces = list(continuation(Draws(tokens, made.vocab_size), made, "", len(tokens), temperature=0.0))
    assert "".join(pieces) == rest
    assert "\ufffd" in rest or not any("\ufffd" in piece for piece in pieces)


def test_continuation_gives_out_a_character_cut_short_at_the_end():
    made = byte_level()
    tokens = made.encode("a\U0001f600")[:-1]
    pieces = continuation(Draws(tokens, made.vocab_size), made, "", len(tokens), temperature=0.0)
    assert "".join(pieces) == made.decode(tokens)


def test_compiled_training_on_packed_rows_compiles_nothing_after_the_first_step(tmp_path, monkeypatch):
    """The documents differ in number and length from batch to batch; the shapes that the compiler sees do not."""

    def compile(module: torch.nn.Module) -> None:
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    lengths = [5, 90, 7, 7, 200, 31, 64, 3, 150, 12] * 6
    (tmp_path / "texts").mkdir()
    for index, length in enumerate(lengths):
        (tmp_path / "texts" / f"{index}.txt").write_text(TEXT[index : index + length])
    chosen = options(tmp_path / "texts", tmp_path / "run")
    chosen.training = dataclasses.replace(chosen.training, steps=6, compile=True)
    data = prepare_data(chosen, tmp_path / "cache", lambda stage, done, total: None)
    graphs: list[int] = []
    torch._dynamo.utils.counters.clear()
    stats = torch._dynamo.utils.counters["stats"]
    pretrain(chosen, data, lambda line: None, lambda step: graphs.append(stats["unique_graphs"]))
    assert graphs[0] == 1
    assert graphs[:-1] == graphs[:1] * 5  # the last step is followed by an evaluation, in another mode
