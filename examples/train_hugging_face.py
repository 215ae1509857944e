"""Train a GPT-2 of Hugging Face's, made from its configuration, in ten lines: packed rows, resume and a report."""

from transformers import GPT2Config, GPT2LMHeadModel
from your_model import documents

from fastlm import CausalLM, TrainConfig, Trainer
from fastlm.data import PackedLoader
from fastlm.report import report

config = TrainConfig(out="runs/hugging-face", steps=200)
small = GPT2Config(vocab_size=256, n_positions=128, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
loader = PackedLoader(documents, batch_size=config.batch_size, sequence_length=128)
Trainer(CausalLM(GPT2LMHeadModel(small)), config, loader, on_log=print).fit()
print("see", report([config.out], config.out / "report.html"))
