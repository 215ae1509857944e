"""The house rules that a machine can hold: who imports whom, who prints, what an import may load, what is public."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "fastlm"
MODULES = sorted(PACKAGE.rglob("*.py"))

# What each part may import of fastlm. A part is a folder, or a file directly in the package.
MAY_IMPORT = {
    "ops": {"ops"},
    "nn": {"nn", "ops"},
    "models": {"files", "models", "module_state", "nn", "ops", "wording"},
    "acceleration": {"acceleration", "nn", "ops"},
    "kernels": {"acceleration", "kernels", "ops"},
    "losses": {"ops"},
    "module_state": set(),
    "files": set(),
    "wording": set(),
    "data": {"data", "files", "wording", "_packing"},
    "train": {"train", "evaluation", "files", "module_state", "wording"},
    "evaluation": set(),
    "generation": set(),
    "doctor": {"ops", "wording"},
    "charts": set(),
    "report_style": set(),
    "report": {"charts", "files", "report_style", "train"},
    "configuration": {"wording"},
    "depth": {"models"},
    "presets": {"data", "depth", "models", "train"},
    "run_checks": {"data", "models", "train"},
    "pretrain": {"configuration", "data", "files", "generation", "models", "run_checks", "train"},
    "cli": {"configuration", "data", "doctor", "models", "presets", "pretrain", "report", "train", "wording"},
    "__main__": {"cli"},
    "__init__": {"acceleration", "evaluation", "generation", "models", "train"},
}

PUBLIC = {
    "fastlm": [
        "CausalLM",
        "GPT",
        "GPTConfig",
        "TrainConfig",
        "Trainer",
        "__version__",
        "accelerate",
        "accelerated",
        "evaluate",
        "generate",
        "restore",
        "verify",
    ],
    "fastlm.acceleration": ["Report", "Row", "accelerate", "accelerated", "restore"],
    "fastlm.kernels": ["LAYERS", "kernel_mapping", "layers"],
    "fastlm.losses": ["distillation_loss", "dpo_loss", "grpo_loss", "kto_loss", "orpo_loss", "simpo_loss"],
    "fastlm.nn": [
        "CrossEntropyLoss",
        "GELU",
        "LayerNorm",
        "LinearCrossEntropyLoss",
        "LogSoftmax",
        "MultiheadAttention",
        "RMSNorm",
        "Softmax",
    ],
    "fastlm.ops": [
        "AttentionSchedules",
        "add_layer_norm",
        "add_rms_norm",
        "apply_rotary",
        "attention",
        "bias_gelu",
        "cross_entropy",
        "explain",
        "flash_attn_func",
        "flash_attn_kvpacked_func",
        "flash_attn_qkvpacked_func",
        "flash_attn_varlen_func",
        "flash_attn_varlen_kvpacked_func",
        "flash_attn_varlen_qkvpacked_func",
        "geglu",
        "gelu",
        "layer_norm",
        "linear_cross_entropy",
        "linear_logprobs",
        "log_softmax",
        "rms_norm",
        "scaled_dot_product_attention",
        "softmax",
        "swiglu",
    ],
}


# Ops that are another in other words.
BUILT_ON_ANOTHER = ("linear_cross_entropy.py", "linear_logprobs.py", "flash_attn.py", "scaled_dot_product_attention.py")
KNOWS_ATTENTIONS_ARGUMENTS = "_dispatch.py"
OPS = [path for path in MODULES if path.parent == PACKAGE / "ops" and not path.name.startswith("_")]
DEFINITIONS = ast.FunctionDef | ast.ClassDef


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def fastlm_imports(path: Path) -> list[tuple[int, str]]:
    """(line, part) of every import of fastlm in a file; `from fastlm import x` counts as x."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write it from fastlm down"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found += [(node.lineno, name.split(".")[1]) for name in names if name.startswith("fastlm.")]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path):
    allowed = MAY_IMPORT[part_of(path)] | {"__version__"}
    wrong = [f"line {line}: {part}" for line, part in fastlm_imports(path) if part not in allowed]
    assert not wrong, f"{path.name} may import of fastlm only {sorted(allowed)}, imports {wrong}"


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in MODULES
        if path.parent == PACKAGE / "ops" and path.name not in ("__init__.py", *BUILT_ON_ANOTHER)
    ],
    ids=lambda path: path.name,
)
def test_an_op_imports_no_other_op(path):
    source = ast.parse(path.read_text())
    for node in ast.walk(source):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastlm.ops"):
            home = "".join(node.module.split(".")[2:]) or "".join(alias.name for alias in node.names)
            is_kin = path.name.startswith("attention") or path.name == KNOWS_ATTENTIONS_ARGUMENTS
            part = home.startswith(("attention_", path.stem)) and (is_kin or home.startswith(path.stem))
            assert home.startswith("_") or part, f"{path.name}:{node.lineno} imports the op {home}"


@pytest.mark.parametrize("path", OPS, ids=lambda path: path.name)
def test_the_public_functions_of_an_op_stand_last_in_its_file(path):
    definitions = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, DEFINITIONS)]
    public = [name for name in definitions if name in PUBLIC["fastlm.ops"]]
    assert definitions[len(definitions) - len(public) :] == public, f"{path.name} defines something after {public}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_cli_prints_and_reads_argv_or_the_environment(path):
    if part_of(path) in ("cli", "__main__"):
        return
    prints_on_request = path.relative_to(PACKAGE) == Path("acceleration/swapping.py")  # accelerate(verbose=True)
    reads_environment = path.relative_to(PACKAGE) == Path("train/distributed.py")
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print" or prints_on_request, (
                f"{where} prints; return the text or call back, cli.py prints"
            )
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            assert name != "sys.argv", f"{where} reads sys.argv"
            assert name not in ("os.environ", "os.getenv") or reads_environment, f"{where} reads the environment"


@pytest.mark.parametrize("module", sorted(PUBLIC))
def test_public_names_are_exactly_these(module):
    imported = __import__(module, fromlist=["__all__"])
    assert sorted(imported.__all__) == PUBLIC[module], "a new public name is a decision: change this list with it"
    for name in imported.__all__:
        assert getattr(imported, name) is not None


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_fastlm_loads_neither_torch_nor_triton():
    loaded = modules_after("import fastlm")
    assert not loaded & {"torch", "triton", "numpy", "tyro"}


def test_accelerate_loads_neither_triton_nor_transformers_before_it_is_called():
    assert not modules_after("import fastlm; fastlm.accelerate") & {"triton", "fastlm.ops", "transformers"}


def test_training_never_imports_the_command_line_library():
    assert "tyro" not in modules_after("import fastlm.train")


def test_importing_fastlm_starts_no_device_and_imports_no_compiler():
    """torch.compile's takes as long to import as all else."""
    found = "torch.cuda.is_initialized(), 'torch._dynamo' in sys.modules"
    code = f"import sys, torch, fastlm.nn, fastlm.ops, fastlm.pretrain; print({found})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_every_source_file_says_what_it_is():
    for path in MODULES:
        if path.stat().st_size:
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"
