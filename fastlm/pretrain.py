"""From text to a trained GPT: the parts put together, with defaults that fit two CPU cores.

A run directory holds the checkpoints, metrics.jsonl, losses.png and the tokenizer: `load_run` needs nothing else.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastlm.data import PackedLoader, Prepared, TokenDataset, Tokenizer, prepare
from fastlm.data.loader import check_batch
from fastlm.generate import stream
from fastlm.models import GPT, GPTConfig
from fastlm.train import TrainConfig, Trainer, TrainResult
from fastlm.train.checkpoint import CheckpointError, read_best
from fastlm.train.checkpoint import prepare as prepare_run_directory
from fastlm.train.distributed import connect
from fastlm.train.run_lock import locked

TOKENIZER_FILE = "tokenizer.json"


def small_model() -> GPTConfig:
    """Learns in minutes on two CPU cores: with so little time, more tokens through a smaller model get further."""
    return GPTConfig.llama(
        vocab_size=2048, sequence_length=256, num_layers=4, num_heads=4, hidden_size=128, tie_embeddings=True
    )


def short_training() -> TrainConfig:
    """What goes with the small model."""
    return TrainConfig(out=Path("runs/{data}"), steps=700, batch_size=8, learning_rate=4e-3)


@dataclasses.dataclass
class PretrainOptions:
    """Train a GPT on text. Running the same command again resumes; every flag has a default that works."""

    config: Path | None = None
    """TOML file of these options; flags go over it."""
    data: str = "stdlib"
    """What to train on: a text, JSONL or Parquet file, a folder of them, or stdlib, Python's own library."""
    text_field: str = "text"
    """Field of a JSONL or Parquet record that holds the text."""
    held_out: float | None = None
    """Share of the text kept for evaluation; None is 5 %, but at most 16 MiB."""
    tokenizer: Path | None = None
    """A tokenizer.json to use; None trains a byte-level BPE of vocab_size tokens on the text."""
    eval_tokens: int = 65536
    """Held-out tokens that each evaluation takes, in whole documents."""
    prompt: str | None = None
    """What the sample at the end continues; None is "def " for stdlib, else the start of a document."""
    model: GPTConfig = dataclasses.field(default_factory=small_model)
    training: TrainConfig = dataclasses.field(default_factory=short_training)

    def __post_init__(self) -> None:
        if self.eval_tokens < 1:
            raise ValueError(f"eval_tokens is {self.eval_tokens}, expected at least 1")
        if self.prompt is None:
            self.prompt = "def " if self.data == "stdlib" else ""
        out = str(self.training.out).replace("{data}", Path(self.data).stem or "data")
        self.training = dataclasses.replace(self.training, out=Path(out))


def prepare_data(options: PretrainOptions, cache: Path, on_progress: Callable[[str, int, int], None]) -> Prepared:
    """Tokenised text, made once and cached; refuses an unwritable run directory or giant batches before any work."""
    check_batch(options.training.batch_size, options.model.sequence_length)
    if connect().is_main:
        prepare_run_directory(options.training.out)
    return prepare(
        options.data,
        cache,
        vocab_size=options.model.vocab_size,
        tokenizer=options.tokenizer,
        text_field=options.text_field,
        held_out=options.held_out,
        on_progress=on_progress,
    )


def pretrain(
    options: PretrainOptions, data: Prepared, on_line: Callable[[str], None], on_step: Callable[[int], None]
) -> TrainResult:
    """Train, or resume training, in options.training.out."""
    training, ranks = options.training, connect()
    config = dataclasses.replace(options.model, vocab_size=data.tokenizer.vocab_size)

    def loader(dataset: TokenDataset) -> PackedLoader:
        return PackedLoader(
            dataset,
            batch_size=training.batch_size,
            sequence_length=config.sequence_length,
            seed=training.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )

    train_loader, eval_loader = loader(data.train), loader(data.held_out.sample(options.eval_tokens)).one_pass()
    torch.manual_seed(training.seed)  # the same first weights on every rank
    trainer = Trainer(
        GPT(config),
        training,
        train_loader,
        eval_loader,
        metadata={"model": dataclasses.asdict(config), "data": data.facts.source, "tokenizer": data.tokenizer.hash},
        eval_bytes=eval_loader.num_bytes,
        baseline=data.facts.unigram_bits_per_byte,
        on_line=on_line,
        on_step=on_step,
    )
    if not ranks.is_main:
        return trainer.fit()
    on_line(str(data.facts))
    on_line(f"packing: {train_loader.report}")
    unigram = data.facts.unigram_bits_per_byte
    on_line(f"baseline: a unigram model (token frequencies alone) takes {unigram:.3f} bits/byte; lower is better")
    on_line(f"run directory: {training.out}")
    with locked(training.out):  # else a second run could put its tokenizer beside the weights of the first
        data.tokenizer.save(training.out / TOKENIZER_FILE)
        return trainer.fit()


def load_run(run: Path) -> tuple[GPT, Tokenizer]:
    """The model and tokenizer of a run directory: the checkpoint with the lowest held-out loss, else the newest.

    Raises CheckpointError if the directory holds no checkpoint.
    """
    checkpoint = read_best(run)
    if checkpoint is None:
        raise CheckpointError(f"{run} holds no checkpoint; train one with: fastlm train --out {run}")
    try:
        model = GPT(GPTConfig(**checkpoint.metadata["model"]))
        model.load_state_dict(checkpoint.model)
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.path} holds no GPT: {' '.join(str(error).split())}") from error
    return model.eval(), Tokenizer.load(run / TOKENIZER_FILE)


def continuation(model: GPT, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, **sampling: Any) -> Iterator[str]:
    """Yield the continuation of prompt piece by piece, up to the end of the document; sampling as in generate.

    A character whose bytes are spread over several tokens comes out once it is whole.
    """
    tokens = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
    drawn: list[int] = []
    shown = ""
    for token in stream(model, torch.tensor([tokens]), max_new_tokens, stop_token=tokenizer.end_of_text, **sampling):
        drawn.append(int(token))
        text = tokenizer.decode(drawn)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
