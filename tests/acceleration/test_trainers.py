"""Accelerated models in the trainers and tools that people use: transformers.Trainer, PEFT, DDP, save and reload."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fastlm

pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers.Trainer needs it")

import tokenizers
import transformers
from torch.distributed.fsdp import fully_shard

from fastlm.acceleration.trainer_callback import ThroughputCallback
from tests.support.hugging_face import VOCABULARY, loss_and_gradients, made
from tests.support.processes import run_ranks

STEPS, T, SENTENCES = 30, 12, 16


class Sentences(torch.utils.data.Dataset):
    """Token ids whose prompts do not count, of unequal length and padded."""

    def __len__(self):
        return SENTENCES

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(3, VOCABULARY, (T,), generator=generator)
        length = int(torch.randint(6, T + 1, (), generator=generator))
        mask = (torch.arange(T) < length).long()
        labels = tokens.masked_fill(mask == 0, -100)
        labels[:2] = -100
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def trained(model, out, **changes):
    """(losses of each step, logs) of a run of transformers.Trainer."""
    options = {
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "seed": 3,
    }
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    arguments = transformers.TrainingArguments(str(out), **{**options, **quiet, **changes})
    trainer = transformers.Trainer(model, arguments, train_dataset=Sentences(), callbacks=[ThroughputCallback()])
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return torch.tensor([log["loss"] for log in logs]), logs


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_has_the_same_loss_curve(accumulation, tmp_path):
    model = made("llama")
    ours = fastlm.accelerate(copy.deepcopy(model))
    changes = {"gradient_accumulation_steps": accumulation, "max_steps": STEPS // accumulation}
    expected, _ = trained(model, tmp_path / "theirs", **changes)
    found, logs = trained(ours, tmp_path / "ours", **changes)
    assert len(found) == STEPS // accumulation
    assert expected[-1] < expected[0] - 0.3, "the run learns something"
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    assert logs[0]["num_accelerated"] == len(fastlm.accelerated(ours).swapped)
    assert all(log["tokens_per_second"] > 0 and log["peak_memory_gib"] > 0 for log in logs)


def test_trainer_evaluates_with_logits(tmp_path):
    model = fastlm.accelerate(made("llama"))
    arguments = transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = transformers.Trainer(model, arguments, eval_dataset=Sentences())
    predicted = trainer.predict(Sentences())
    assert predicted.predictions.shape == (SENTENCES, T, VOCABULARY)
    assert predicted.metrics["test_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])


SFT = {
    "padded": {},
    "packed": {"packing": True},
    "without padding": {"padding_free": True, "max_length": None},
}


@pytest.mark.parametrize("kind", SFT)
def test_trl_supervised_fine_tuning_has_the_same_loss_curve(kind, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokens = [Sentences()[index]["input_ids"][: 4 + index % 9].tolist() for index in range(SENTENCES)]
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    options = {
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_length": 16,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }

    def losses(model):
        trainer = trl.SFTTrainer(
            model,
            trl.SFTConfig(str(tmp_path), **{**options, **SFT[kind]}),
            train_dataset=datasets.Dataset.from_list([{"input_ids": ids} for ids in tokens]),
            processing_class=transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="1", eos_token="2"),
        )
        trainer.train()
        assert trainer.model.config._attn_implementation == model.config._attn_implementation
        return torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log])

    model = made("llama")
    ours = fastlm.accelerate(copy.deepcopy(model))
    assert ours.config._attn_implementation == "fastlm"
    expected, found = losses(model), losses(ours)
    assert len(found) == 8
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("adapter_first", [True, False])
def test_lora_adapters_train_alike(adapter_first):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.0
    )
    base = made("llama")
    torch.manual_seed(1)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    torch.manual_seed(1)
    if adapter_first:
        ours = fastlm.accelerate(peft.get_peft_model(copy.deepcopy(base), config))
    else:
        ours = peft.get_peft_model(fastlm.accelerate(copy.deepcopy(base)), config)
    tokens = torch.randint(3, VOCABULARY, (2, T))
    batch = {"input_ids": tokens, "labels": tokens}
    expected, found = loss_and_gradients(theirs, batch), loss_and_gradients(ours, batch)
    assert found.keys() == expected.keys()
    assert any("lora_A" in name for name in found)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert ours(**batch).logits is None
    ours.merge_and_unload()


def test_saved_models_load_without_fastlm_and_with_it(tmp_path):
    model = fastlm.accelerate(made("gpt2").eval())
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is transformers.GPT2LMHeadModel
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    tokens = torch.randint(3, VOCABULARY, (2, T))
    with torch.no_grad():
        expected = model(tokens).logits
        torch.testing.assert_close(loaded(tokens).logits, expected)
        torch.testing.assert_close(fastlm.accelerate(loaded)(tokens).logits, expected)


def ranks_train():
    """A step of the whole batch, by DDP and by FSDP2: every gradient is that of one process."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = made("llama")
    tokens = torch.randint(3, VOCABULARY, (4, T))
    share = tokens[rank * 2 : rank * 2 + 2]
    whole = loss_and_gradients(copy.deepcopy(model), {"input_ids": tokens, "labels": tokens})
    fastlm.accelerate(model)

    replica = copy.deepcopy(model)
    wrapped = DistributedDataParallel(replica)
    wrapped(input_ids=share, labels=share).loss.backward()
    for name, parameter in replica.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-5)

    for layer in (*model.model.layers, model):
        fully_shard(layer)
    output = model(input_ids=share, labels=share)
    assert output.logits is None
    output.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), whole[name], rtol=1e-4, atol=1e-5)
    dist.destroy_process_group()


def test_ddp_and_fully_shard_on_two_ranks_have_the_gradient_of_the_whole_batch(tmp_path):
    run_ranks(2, ranks_train, errors=tmp_path / "errors")
