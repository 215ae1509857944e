"""Writes what pages say of the code and of records: the table of ops, a line for every file, options, figures.

python -m tests.support.generated_pages        writes them; a test compares them with what they are made of
"""

import ast
import re
from pathlib import Path

from fastlm.ops._dispatch import table
from tests.support import configuration_page, figures

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/architecture.md", "docs/benchmarks.md", "docs/configuration.md")


def op_table() -> str:
    """The implementations of every op, as fastlm/ops/_dispatch.py decides them."""
    rows = [f"| {code(row.functions)} | {row.on_cpu} | {row.on_gpu} |" for row in table()]
    return "\n".join(["| `fastlm.ops` | on a CPU | on a GPU |", "|---|---|---|", *rows, ""])


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
    return "\n".join(lines).rstrip() + "\n"


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


def tables_of(name: str) -> dict[str, str]:
    """Each generated table of a page, by the name that its marks on the page have."""
    if name == "docs/configuration.md":
        return configuration_page.tables()
    of_code = {"README.md": {"ops": op_table()}, "docs/architecture.md": {"files": file_list()}}
    return of_code.get(name, {}) | figures.tables(name)


def updated(name: str) -> str:
    """The text of a page with every table as it should be."""
    page = (ROOT / name).read_text()
    for mark, text in tables_of(name).items():
        between = re.compile(rf"(?<=<!-- {mark} -->\n).*?(?=<!-- end of {mark} -->)", re.DOTALL)
        page, count = between.subn(lambda _, text=text: text, page)
        assert count == 1, f"{name} has {count} places for the table of {mark}"
    return page


if __name__ == "__main__":
    for name in PAGES:
        (ROOT / name).write_text(updated(name))
