"""From text to a trained GPT: the parts put together, with defaults that fit two CPU cores.

A run directory holds the checkpoints, config.toml (the options as they were resolved), run.json, metrics.jsonl,
samples.jsonl, losses.png and the tokenizer: `load_run` and `fastlm report` need nothing else.
"""

import dataclasses
import os
import tomllib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastlm.configuration import to_toml
from fastlm.data import PackedLoader, Prepared, TokenDataset, Tokenizer, prepare
from fastlm.data.loader import check_batch
from fastlm.data.tokenizer import TOKENIZER_FILE
from fastlm.files import atomic_write
from fastlm.generation import stream
from fastlm.models import GPT, GPTConfig
from fastlm.run_checks import CONFIG_FILE, advice, check_data, check_start
from fastlm.train import Sample, TrainConfig, Trainer, TrainResult
from fastlm.train.checkpoint import CheckpointError, read_best, steps_done
from fastlm.train.checkpoint import prepare as prepare_run_directory
from fastlm.train.distributed import connect
from fastlm.train.run_lock import locked

LAG = 3  # tokens: a character of UTF-8 has up to four bytes, each perhaps a token of its own


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

    heading = "data and samples"

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
    """What the samples continue; None is "def " for stdlib, else the start of a document."""
    sample_tokens: int = 48
    """Length of the sample that is drawn after each evaluation, always by the same random numbers; 0 for none."""
    model: GPTConfig = dataclasses.field(default_factory=small_model)
    training: TrainConfig = dataclasses.field(default_factory=short_training)

    def __post_init__(self) -> None:
        if self.eval_tokens < 1:
            raise ValueError(f"eval_tokens is {self.eval_tokens}, expected at least 1")
        if self.sample_tokens < 0:
            raise ValueError(f"sample_tokens is {self.sample_tokens}, expected at least 0")
        self.data = os.path.expanduser(self.data)  # a shell leaves ~ alone in a file and behind =
        if self.prompt is None:
            self.prompt = "def " if self.data == "stdlib" else ""
        try:
            self.prompt.encode()  # what cannot be continued is told now, not after the last step
        except UnicodeEncodeError:
            raise ValueError(f"prompt is {self.prompt[:80]!a}, expected text that UTF-8 can spell") from None
        out = str(self.training.out).replace("{data}", run_name(self.data))
        self.training = dataclasses.replace(self.training, out=Path(out))


def run_name(data: str) -> str:
    """The name that a run on data gets: that of the file without its suffix, or of the folder, "texts/.." included."""
    path = Path(os.path.abspath(data))
    return path.stem if path.stem.strip(".") else path.name or "data"


def prepare_data(options: PretrainOptions, cache: Path, on_progress: Callable[[str, int, int], None]) -> Prepared:
    """Tokenised text, made once and cached.

    Before any work it refuses giant batches, an unwritable run directory, and a start that the run directory or a
    checkpoint contradicts.
    """
    check_batch(options.training.batch_size, options.model.sequence_length)
    if (ranks := connect()).is_main:
        check_start(options.training, options.model, restarts=ranks.restarts)
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
    options: PretrainOptions, data: Prepared, on_log: Callable[[str], None], on_step: Callable[[int], None]
) -> TrainResult:
    """Train, or resume training, in options.training.out."""
    training, ranks = options.training, connect()
    config = dataclasses.replace(options.model, vocab_size=data.tokenizer.vocab_size)
    with ranks.fail_together():
        if ranks.is_main:
            check_data(training, vars(options) | vars(options.model), data)

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
    model = GPT(config)
    trainer = Trainer(
        model,
        training,
        train_loader,
        eval_loader,
        # not the name of the data, which a copy or a link changes: the loader's state knows the text itself
        metadata={"model": dataclasses.asdict(config), "tokenizer": data.tokenizer.hash},
        eval_bytes=eval_loader.num_bytes,
        baseline=data.facts.unigram_bits_per_byte,
        on_log=on_log,
        on_step=on_step,
        on_evaluate=sampler(model, data.tokenizer, options) if options.sample_tokens else None,
    )
    if not ranks.is_main:
        return trainer.fit()
    trainer.log(str(data.facts))
    trainer.log(f"packing: {train_loader.report}")
    unigram = data.facts.unigram_bits_per_byte
    trainer.log(f"baseline: a unigram model (token frequencies alone) takes {unigram:.3f} bits/byte; lower is better")
    for line in advice(training, short_training(), data, ranks.world_size):
        trainer.log(line)
    trainer.log(f"run directory: {training.out}")
    with locked(training.out):  # else a second run could put its tokenizer beside the weights of the first
        data.tokenizer.save(training.out / TOKENIZER_FILE)
        save_configuration(options)
        return trainer.fit()


def sampler(model: GPT, tokenizer: Tokenizer, options: PretrainOptions) -> Callable[[int], Sample]:
    """A Trainer's on_evaluate that continues options.prompt."""
    prompt, sampling = options.prompt or "", {"temperature": 0.8, "top_k": 50, "seed": options.training.seed}

    def on_evaluate(step: int) -> Sample:
        device = next(model.parameters()).device
        return Sample(
            prompt, "".join(continuation(model, tokenizer, prompt, options.sample_tokens, device=device, **sampling))
        )

    return on_evaluate


def save_configuration(options: PretrainOptions) -> None:
    """Write config.toml of the run, keeping the one that it was trained with so far where its values differ.

    That one becomes config-<step>.toml, step being that of the newest checkpoint. Where there is such a file, another
    configuration was tried after the same checkpoint and left nothing behind: the first one is the one that led to it.
    """
    run, text = options.training.out, to_toml(options)
    path, step = run / CONFIG_FILE, steps_done(run)
    kept = run / f"config-{step}.toml"
    if step and path.exists() and not kept.exists() and _values(path.read_bytes()) != _values(text.encode()):
        path.replace(kept)
    with atomic_write(path) as handle:
        handle.write(text.encode())


def _values(toml: bytes) -> dict[str, Any] | None:
    """What a file sets, whatever its comments say; None if it is no TOML."""
    try:
        return tomllib.loads(toml.decode())
    except ValueError:
        return None


def load_run(run: Path) -> tuple[GPT, Tokenizer]:
    """The model and tokenizer of a run directory: the checkpoint with the lowest held-out loss, else the newest.

    Its weights are the averaged ones, if the run averaged them, since these are what was evaluated. A directory of
    Hugging Face, which holds a config.json, will do as well.

    Raises CheckpointError if the directory holds no checkpoint, or a tokenizer that the model was not trained with.
    """
    if (run / "config.json").exists():
        return GPT.from_pretrained(run), Tokenizer.from_pretrained(run)
    checkpoint = read_best(run)
    if checkpoint is None:
        if (run / "state.json").exists():
            raise CheckpointError(f"{run} is a checkpoint, expected the directory of its run: {run.parent.parent}")
        if run.exists() and not run.is_dir():
            raise CheckpointError(f"{run} is a file, expected the directory of a run, as given to fastlm train --out")
        raise CheckpointError(f"{run} holds no checkpoint; train one with: fastlm train --out {run}")
    if "model" not in checkpoint.metadata:
        raise CheckpointError(
            f"{run} was not trained by fastlm train: its model is of a class unknown here; in Python, load the weights "
            f"in {checkpoint.path} into that model"
        )
    try:
        model = GPT(GPTConfig(**checkpoint.metadata["model"]))
        model.load_state_dict(checkpoint.tensors.get("ema", checkpoint.tensors["model"]))
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.path} holds no GPT: {' '.join(str(error).split())}") from error
    tokenizer = Tokenizer.load(run / TOKENIZER_FILE)
    was = checkpoint.metadata.get("tokenizer", tokenizer.hash)
    if was != tokenizer.hash or tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"{run / TOKENIZER_FILE} is not the tokenizer that {checkpoint.path} was trained with: its hash is "
            f"{tokenizer.hash}, expected {was}; put that one back"
        )
    return model.eval(), tokenizer


def continuation(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    device: torch.device | str = "cpu",
    **sampling: Any,
) -> Iterator[str]:
    """Yield the continuation of prompt piece by piece, up to the end of the document; sampling as in generate.

    device   where the model is

    The text is what decoding prompt and continuation together gives: some decoders strip the first space, or the one
    before a full stop. A piece comes out once the next few tokens have not changed it: they may complete a character.
    """
    tokens = [*tokenizer.start_of_text, *tokenizer.encode(prompt)] or [tokenizer.end_of_text]
    read = torch.tensor([tokens], device=device)
    shown = tokenizer.decode(tokens)
    texts = deque([shown], maxlen=LAG + 1)  # the oldest is LAG tokens old
    for token in stream(model, read, max_new_tokens, stop_token=tokenizer.end_of_text, **sampling):
        tokens.append(int(token))
        texts.append(tokenizer.decode(tokens))
        settled = common_start(texts)
        if len(texts) > LAG and len(settled) > len(shown):
            yield settled[len(shown) :]
            shown = settled
    yield texts[-1][len(common_start([shown, texts[-1]])) :]


def common_start(texts: Iterable[str]) -> str:
    """What all texts begin with: the first and the last in order share no more than any two others."""
    first, last = min(texts), max(texts)
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]
