"""python -m tests.support.compatibility: writes docs/compatibility.md, families of Hugging Face under accelerate.

Every cell is measured on small models with random weights, on whatever machine runs this.
"""

import copy
import datetime
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import fastlm
from benchmarks import machine
from fastlm.acceleration.verification import InFloat64
from fastlm.ops import _dispatch
from tests.support import small_calls
from tests.support.hugging_face import ENCODERS, FAMILIES, MASKED, batches, loss_and_gradients, made, relative

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
GENERATED = 14
COLUMNS = {
    "swapped": "layers that were swapped, of all that belong to a family; attention and loss count as one layer each",
    "logits": "in evaluation: the largest error of the accelerated model over that of the original, both against "
    "float64; batches whole, padded left, padded right, packed. 1.0 is the original's own rounding; the tests "
    "allow 2, and one rounding",
    "gradients": "the same of loss and gradients in training, each over the largest value that it should have",
    "bfloat16": "the same of loss and gradients in bfloat16",
    "generate": "greedy tokens, with dynamic and static cache, without and with padding, beside the original's",
    "packed": "the largest difference between logits of documents in one row and of each alone, over the largest logit",
    "compile": 'whether `torch.compile(fullgraph=True, backend="aot_eager")` takes a training step, with the same '
    'loss; "neither": nor does it take the original',
}
INTRODUCTION = """# Families of Hugging Face under accelerate

Written by `python -m tests.support.compatibility` on {date}: {machine}, transformers {transformers}.
Small models with random weights, in fastlm's compiled code however small a call is;
`tests/acceleration/test_hugging_face.py` holds the same for every change.

"""


def main() -> int:
    vars(_dispatch).update(small_calls.of_compiled_code())
    rows = []
    for name in FAMILIES:
        torch.manual_seed(0)  # a row is the same whatever families come before it
        rows.append(row_of(name))
        print(" | ".join(rows[-1]), flush=True)
    import transformers

    heading = INTRODUCTION.format(
        date=datetime.date.today(),
        machine=f"{machine.device_name(torch.device('cpu'))}, torch {torch.__version__}",
        transformers=transformers.__version__,
    )
    meanings = table(("column", "what it says"), list(COLUMNS.items()))
    PAGE.write_text(heading + meanings + "\n" + table(("family", *COLUMNS), rows))
    return 0


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (head, ["---"] * len(head), *rows))


def row_of(name: str) -> list[str]:
    model = made(name)
    report = fastlm.accelerated(fastlm.accelerate(copy.deepcopy(model)))
    return [
        f"`{type(model).__name__}`",
        f"{len(report.swapped)} of {len(report.rows)}",
        f"{logits_error(name):.2f}",
        f"{gradients_error(name, torch.float32):.2f}",
        f"{gradients_error(name, torch.bfloat16):.2f}",
        generation(name),
        packing(name),
        compilation(name),
    ]


def both(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """(the original, the same accelerated)"""
    model = made(name, dtype)
    return model, fastlm.accelerate(copy.deepcopy(model))


def logits_error(name: str) -> float:
    """Of the accelerated model over that of the original."""
    model, ours = (each.eval() for each in both(name))
    truth = copy.deepcopy(model).double()
    errors = []
    for _, batch in batches(name):
        counts = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        with torch.no_grad():
            with InFloat64():
                expected = truth(**batch).logits[counts]
            errors.append([largest(each(**batch).logits[counts] - expected) for each in (ours, model)])
    return ratio(errors)


def gradients_error(name: str, dtype: torch.dtype) -> float:
    model, ours = both(name, dtype)
    truth = copy.deepcopy(model).double()
    errors = []
    for _, batch in batches(name):
        with InFloat64():
            expected = loss_and_gradients(truth, batch)
        truths = relative(expected, expected)
        found = [relative(loss_and_gradients(each, batch), expected) for each in (ours, model)]
        errors += [[largest(results[key] - x) for results in found] for key, x in truths.items()]
    return ratio(errors)


def largest(difference: Tensor) -> float:
    return float(difference.double().abs().max())


def ratio(errors: list[list[float]]) -> float:
    """The largest error of ours over the largest of the original's."""
    ours, originals = zip(*errors, strict=True)
    return max(ours) / max(originals)


def generation(name: str) -> str:
    if name in MASKED:
        return "not a generator"
    model, ours = (each.eval() for each in both(name))
    prompts = torch.randint(3, 99, (3, 9))
    padded = torch.ones_like(prompts)
    padded[1, :2] = padded[2, :5] = 0
    for cache in (None, "static"):
        for mask in (torch.ones_like(prompts), padded):
            options = {"max_new_tokens": GENERATED, "do_sample": False, "attention_mask": mask}
            found, expected = (each.generate(prompts, cache_implementation=cache, **options) for each in (ours, model))
            if not torch.equal(found, expected):
                return "differs"
    return "equal"


def packing(name: str) -> str:
    if name in ENCODERS:
        return "not a decoder"
    model = both(name)[1].eval()
    lengths = (5, 1, 7)
    documents = [torch.randint(3, 99, (1, length)) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        separate = torch.cat([model(document).logits for document in documents], dim=1)
        packed = model(torch.cat(documents, dim=1), position_ids=positions, use_cache=False).logits
    return f"{largest(packed - separate) / float(separate.abs().max()):.0e}"


def compilation(name: str) -> str:
    model, ours = both(name)
    _, batch = next(iter(batches(name)))
    if compiles(ours, batch):
        return "yes"
    return "no" if compiles(model, batch) else "neither"


def compiles(model: nn.Module, batch: dict[str, Tensor | bool]) -> bool:
    torch._dynamo.reset()
    compiled: Callable[..., nn.Module] = torch.compile(model, fullgraph=True, backend="aot_eager")
    try:
        found = loss_and_gradients(compiled, batch)["loss"]  # type: ignore[arg-type]
    except Exception as error:  # whatever Dynamo cannot trace
        print(f"{type(model).__name__}: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return False
    return torch.allclose(found, loss_and_gradients(model, batch)["loss"])


if __name__ == "__main__":
    sys.exit(main())
