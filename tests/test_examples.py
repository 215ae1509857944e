"""The examples do what they say: those that train are ten lines, resume and end in a report."""

import re
import runpy
from pathlib import Path

import pytest

from fastlm.train.checkpoint import read_newest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TRAININGS = {"train_your_model.py": "runs/your-model", "train_hugging_face.py": "runs/hugging-face"}


def lines_of(source: str) -> list[str]:
    """What is no docstring, comment or blank line."""
    code = re.sub(r'^""".*?"""', "", source, flags=re.DOTALL)
    return [line for line in code.splitlines() if line.strip() and not line.strip().startswith("#")]


@pytest.mark.parametrize("name", TRAININGS)
def test_example_is_ten_lines_from_import_to_report(name):
    lines = lines_of((EXAMPLES / name).read_text())
    assert len(lines) <= 10
    assert all(";" not in line and len(line) <= 120 for line in lines)
    assert lines[-1].startswith('print("see", report([config.out]')


@pytest.mark.parametrize("name", TRAININGS)
def test_example_trains_resumes_and_reports(name, tmp_path, monkeypatch, capsys):
    if name == "train_hugging_face.py":
        pytest.importorskip("transformers")
    lines = lines_of((EXAMPLES / name).read_text().replace("steps=200", "steps=3, log_interval=1"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    Path("shortened.py").write_text("\n".join(lines))
    runpy.run_path("shortened.py")
    first = capsys.readouterr().out
    Path("shortened.py").write_text("\n".join(lines).replace("steps=3", "steps=4"))
    runpy.run_path("shortened.py")
    resumed = capsys.readouterr().out
    out = Path(TRAININGS[name])
    assert "step 3/3" in first
    assert "resumed from" in resumed
    assert read_newest(out).state["step"] == 4
    assert (out / "report.html").is_file()
    assert f"see {out}/report.html" in resumed


def test_swapped_layers_give_the_same_loss(capsys):
    runpy.run_path(str(EXAMPLES / "swap_layers.py"))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("loss "))
    losses = re.findall(r"\d+\.\d+", line)
    assert len(losses) == 2
    assert losses[0] == losses[1]


def test_packed_documents_attend_as_each_document_alone(capsys):
    runpy.run_path(str(EXAMPLES / "packed_documents.py"))
    differences = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines()]
    assert len(differences) == 4
    assert max(differences) < 1e-5
