"""The Python of the README and of the pages runs, and the commands exist, so that none outlives the code."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import _parser as benchmarks_parser
from fastlm.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGE_NAMES = ("accelerate", "attention", "export", "layers", "looking")
PAGES = "".join((ROOT / "docs" / f"{name}.md").read_text() for name in PAGE_NAMES)


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


PROGRAMS = [code for code in blocks("python") if "# before" not in code]
TRAINING = (ROOT / "docs" / "training.md").read_text()
LOSSES = [code for code in blocks("python", (ROOT / "docs" / "losses.md").read_text()) if "process_group" not in code]
PROGRAMS_OF_PAGES = [*blocks("python", PAGES), "\n".join(blocks("python", TRAINING)), "\n".join(LOSSES)]
SHELL = blocks("sh", README + PAGES + TRAINING)
COMMAND_LINES = sorted({line.split("#")[0].strip() for block in SHELL for line in block.splitlines()})


@pytest.mark.parametrize("code", [*PROGRAMS, *PROGRAMS_OF_PAGES], ids=range(len(PROGRAMS) + len(PROGRAMS_OF_PAGES)))
def test_readme_python_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "program", "exec"), {"__name__": "__main__"})


def test_readme_shows_python_and_commands():
    assert len(PROGRAMS) >= 2
    assert len(PROGRAMS_OF_PAGES) >= 5
    assert len(COMMAND_LINES) >= 6


@functools.cache
def help_of(command: str) -> str:
    return subprocess.run([sys.executable, "-m", "fastlm", command, "--help"], capture_output=True, text=True).stdout


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_readme_command_exists(line):
    words = line.split()
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"no goal {words[1]}"
        return
    arguments = words[words.index("fastlm") + 1 :]
    assert arguments[0] in COMMANDS, f"no command {arguments[0]}"
    for flag in (word for word in arguments if word.startswith("--")):
        assert flag in help_of(arguments[0]), f"fastlm {arguments[0]} has no {flag}"


def test_benchmarks_page_names_every_flag_but_those_of_make_gpu():
    named = set(re.findall(r"^\| `(--[\w-]+)", (ROOT / "docs" / "benchmarks.md").read_text(), re.MULTILINE))
    flags = {flag for action in benchmarks_parser()._actions for flag in action.option_strings if flag.startswith("--")}
    assert flags - named == {"--help", "--commit", "--compile-only"}
    assert named <= flags


def test_readme_names_every_folder():
    for folder in (
        "fastlm/ops/",
        "fastlm/nn/",
        "fastlm/models/",
        "fastlm/data/",
        "fastlm/train/",
        "csrc/",
        "benchmarks/",
        "tests/",
        "examples/",
    ):
        assert folder in README
        assert (ROOT / folder).is_dir()
