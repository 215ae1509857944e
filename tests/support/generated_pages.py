"""Writes what README.md and docs/architecture.md say of the code: the table of ops, and a line for every file.

python -m tests.support.generated_pages        writes both; a test compares them with the code
"""

import ast
import re
from collections.abc import Callable
from pathlib import Path

from fastlm.ops._dispatch import table

ROOT = Path(__file__).resolve().parents[2]


def op_table() -> str:
    """The implementations of every op, as fastlm/ops/_dispatch.py decides them."""
    rows = [f"| {code(row.functions)} | {row.on_cpu} | {row.on_gpu} |" for row in table()]
    return "\n".join(["| `fastlm.ops` | on a CPU | on a GPU |", "|---|---|---|", *rows])


def code(functions: str) -> str:
    return re.sub(r"\w+_\w+|^\w+", lambda name: f"`{name[0]}`", functions)


def file_list() -> str:
    """The first sentence of every source file, a section for each folder."""
    sections = {}
    for path in sorted([*ROOT.glob("fastlm/**/*.py"), *ROOT.glob("csrc/*.*")]):
        if path.stat().st_size and path.name not in ("__init__.py", "__main__.py"):
            sections.setdefault(path.parent, []).append(path)
    lines = []
    for folder, paths in sections.items():
        lines += [f"### {folder.relative_to(ROOT)}/", "", "| file | what it is |", "|---|---|"]
        lines += [*(f"| `{path.name}` | {first_sentence(path)} |" for path in paths), ""]
    return "\n".join(lines).rstrip()


def first_sentence(path: Path) -> str:
    source = path.read_text()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(source)) or ""
    else:
        comment = re.match(r"(//[^\n]*\n)+", source)
        text = re.sub(r"^// ?", "", comment[0], flags=re.MULTILINE) if comment else ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[^. ]{2})(?<!et al)\. |:$", f"{paragraph} ")[0].rstrip()
    assert sentence, f"{path} does not say what it is in its first lines"
    return sentence.removesuffix(".").replace("|", "\\|")


PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "README.md": ("the table of ops", op_table),
    "docs/architecture.md": ("the list of files", file_list),
}


def updated(page: str, part: str, text: str) -> str:
    """The page with that text between the comments that mark the part."""
    begin, end = f"<!-- {part}, by python -m tests.support.generated_pages -->\n", f"\n<!-- end of {part} -->"
    before, rest = page.split(begin)
    return before + begin + text + end + rest.split(end)[1]


if __name__ == "__main__":
    for name, (part, text) in PARTS.items():
        (ROOT / name).write_text(updated((ROOT / name).read_text(), part, text()))
