"""A start that cannot be is refused before the data are prepared, and other data by their name."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastlm.pretrain import PretrainOptions, prepare_data
from fastlm.run_checks import advice, check_weights, options_of_run
from fastlm.train import TrainConfig
from fastlm.train.checkpoint import CheckpointError
from tests.test_pretrain import TEXT, options, run


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with text.txt, other.txt and a run on the first."""
    place = tmp_path_factory.mktemp("runs")
    (place / "text.txt").write_text(TEXT)
    (place / "other.txt").write_text(TEXT.upper())
    run(options(place / "text.txt", place / "run"), place / "cache", [])
    return place


def asked(place: Path, out: str = "new", data: str = "text.txt", **fields: object) -> PretrainOptions:
    """The options of the run with other fields, of whichever dataclass."""
    base = options(place / data, place / out)
    inner = {field.name: field.name in fields for field in dataclasses.fields(base.training)}
    training = {name: value for name, value in fields.items() if name in inner}
    model = {name: value for name, value in fields.items() if name not in inner and hasattr(base.model, name)}
    rest = {name: value for name, value in fields.items() if name not in training | model}
    training, model = dataclasses.replace(base.training, **training), dataclasses.replace(base.model, **model)
    return dataclasses.replace(base, training=training, model=model, **rest)


CHECKPOINT = "run/checkpoints/step-00000002"


@pytest.mark.parametrize(
    ("out", "fields", "message"),
    [
        ("new", {"resume": "nowhere"}, "there is no checkpoint nowhere; resume takes auto, none or its path"),
        ("new", {"resume": "{place}"}, "is no checkpoint: expected a directory such as RUN/checkpoints/step-00000100"),
        ("new", {"resume": "{place}/run"}, "run is a run: name one of its checkpoints, such as .*step-00000002"),
        ("new", {"resume": f"{{place}}/{CHECKPOINT}", "num_layers": 2}, "model.num_layers = 1, and this run has 2"),
        ("new", {"init_from": "nowhere"}, "there is no checkpoint nowhere"),
        ("new", {"init_from": "{place}/text.txt"}, "text.txt is neither a checkpoint nor a .safetensors file"),
        ("new", {"init_from": "{place}/run"}, "run is a run: name one of its checkpoints, such as .*step-00000002"),
        (
            "new",
            {"init_from": f"{{place}}/{CHECKPOINT}", "num_layers": 2},
            r"does not fit this model: \d+ missing .blocks",
        ),
        ("run", {"resume": "none"}, "holds a run up to step-00000002: resume it with auto, or choose another out"),
        ("run", {"hidden_size": 32}, "model.hidden_size = 16, and this run has 32"),
    ],
)
def test_start_that_cannot_be_is_refused_before_any_work(place, tmp_path, out, fields, message):
    fields = {name: value.format(place=place) if isinstance(value, str) else value for name, value in fields.items()}
    with pytest.raises(CheckpointError, match=message):
        prepare_data(asked(place, out, **fields), tmp_path / "cache", lambda *progress: None)
    assert not (tmp_path / "cache").exists()
    assert not (place / "new").exists()


def test_start_from_a_directory_of_hugging_face_says_who_takes_it(place, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"theirs is a model of Hugging Face.*Trainer takes GPT.from_pretrained"):
        prepare_data(
            asked(place, "new", init_from=str(tmp_path / "theirs")), tmp_path / "cache", lambda *progress: None
        )


def test_weights_may_have_another_vocabulary_until_there_is_a_tokenizer(place, tmp_path):
    check_weights(place / CHECKPOINT, asked(place, vocab_size=5000).model)
    save_file({"token_embedding.weight": torch.zeros(3)}, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match="does not fit this model"):
        check_weights(tmp_path / "odd.safetensors", asked(place).model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": "other.txt"}, "data was .*/text.txt and is .*/other.txt; give the same again"),
        ({"data": "other.txt", "tokenizer": "{place}/run/tokenizer.json"}, "data was .*, tokenizer was None and is .*"),
        ({"vocab_size": 265}, "trained on other data: vocab_size was 300 and is 265; give the same again"),
        ({"held_out": 0.5}, "held_out was None and is 0.5"),
    ],
)
def test_other_data_are_named(place, tmp_path, fields, message):
    fields = {name: value.format(place=place) if name == "tokenizer" else value for name, value in fields.items()}
    before = options_of_run(place / "run")
    for start in {"out": "run"}, {"out": tmp_path / "new", "resume": str(place / CHECKPOINT)}:
        with pytest.raises(CheckpointError, match=message):
            run(asked(place, **(start | fields)), place / "cache", [])
    assert options_of_run(place / "run") == before


def test_advice_is_given_where_a_setting_is_perhaps_not_meant(place):
    default = TrainConfig(learning_rate=4e-3)
    data = prepare_data(asked(place, data="other.txt"), place / "cache", lambda *progress: None)

    def lines(world_size: int = 1, **changes: object) -> str:
        return "\n".join(advice(dataclasses.replace(default, **changes), default, data, world_size))

    assert lines() == lines(optimizer="muon") == lines(optimizer="sgd", learning_rate=0.1) == ""
    assert "data_parallel fsdp changes nothing, as this is one process" in lines(data_parallel="fsdp")
    assert lines(world_size=2, data_parallel="fsdp") == ""
    assert "sgd usually takes a larger one; try 0.04" in lines(optimizer="sgd")
    assert "try 0.02" in lines(optimizer="adagrad")
    assert f"perhaps {place}/run/tokenizer.json" in lines(init_from=place / CHECKPOINT, out=place / "nothing")
    assert lines(init_from=place / "text.txt", out=place / "nothing") == ""
