"""Train a model of your own in ten lines: packed rows, exact resume, held-out loss and a report.

Run it again and it resumes; `torchrun --nproc-per-node 2 examples/train_your_model.py` trains on two devices.
"""

from your_model import YourModel, documents

from fastlm import CausalLM, TrainConfig, Trainer
from fastlm.data import PackedLoader
from fastlm.report import report

config = TrainConfig(out="runs/your-model", steps=200)
held_out, train = (PackedLoader(d, batch_size=8, sequence_length=128) for d in (documents[:4], documents[4:]))
trainer = Trainer(CausalLM(YourModel()), config, train, held_out.one_pass(), on_log=print)
trainer.fit()
print("see", report([config.out], config.out / "report.html"))
