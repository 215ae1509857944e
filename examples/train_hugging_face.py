"""Train a GPT-2 of Hugging Face's, made from its configuration, in ten lines: packed rows, exact resume and a report.

`model.save_pretrained(directory)` then writes it as `transformers` reads it.
"""

from transformers import GPT2Config, GPT2LMHeadModel
from your_model import documents

from fastlm import CausalLM, TrainConfig, Trainer
from fastlm.data import PackedLoader
from fastlm.report import report

config = TrainConfig(out="runs/hugging-face", steps=200)
model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=128, n_embd=64, n_layer=2, n_head=4))
loader = PackedLoader(documents, batch_size=config.batch_size, sequence_length=128)
Trainer(CausalLM(model), config, loader, on_log=print).fit()
report([config.out], config.out / "report.html")
