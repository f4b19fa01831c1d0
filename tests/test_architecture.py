"""Imports point one way, and nobody reaches into another's private names.

The arrows are in ORDER; a part may import itself and the parts below it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from fomoe_pl.strategies import REGISTERED, SiteStrategy

ROOT = Path(__file__).parents[1]
# `fomoe_pl/__main__.py` is the part `__main__`, `fomoe_pl/model/*.py` the part `model`, and so on.
ORDER = (
    "__main__",
    "cli",
    "new",
    "sweep",
    "completion",
    "console",
    "adjust",
    "folders",
    "compare",
    "hub",
    "strategies",
    "callbacks",
    "module",
    "optimizer",
    "metrics",
    "data",
    "planner",
    "costs",
    "training",
    "checkpoint",
    "federation",
    "model",
    "lightning_internals",
    "codec",
    "codec_kernels",
    "files",
    "slices",
    "remote",
    "shipped",
    "seed",
    "errors",
    "__init__",
)


def imported_names(source: str, package: list[str]) -> Iterator[str]:
    """All modules and names a source imports, absolute and dotted: `from a.b import c` gives a.b.c."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = node.module.split(".") if node.module else []
            yield from (".".join([*base, *module, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed"  # there after `import torch` already


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def violations(root: Path) -> list[str]:
    """Imports of the package under `root` that go against the arrows, as `file: why`."""
    found = []
    for path in sorted((root / "fomoe_pl").rglob("*.py")):
        file = path.relative_to(root)
        part = file.parts[1].removesuffix(".py")
        if part not in ORDER:
            found.append(f"{file}: the part {part} has no place in ORDER")
            continue
        for name in imported_names(path.read_text(), list(file.parts[:-1])):
            top, _, rest = name.partition(".")
            if top in ("tools", "tests"):
                found.append(f"{file}: nothing imports {top}")
            if part in ("costs", "planner") and within(name, "torch.distributed"):
                found.append(f"{file}: {part} is calculated without processes, so without torch.distributed")
            if top != "fomoe_pl":
                continue
            target = rest.partition(".")[0]
            target = target if target in ORDER else "__init__"
            if ORDER.index(target) < ORDER.index(part):
                found.append(f"{file}: {part} is below {target} and must not import {name}")
            if part == "federation" and target == "model" and not within(name, "fomoe_pl.model.residency"):
                found.append(f"{file}: federation knows no model class, so not {name}")
    return found


def test_imports_follow_the_arrows() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("model/moe.py", "from fomoe_pl.federation.topology import Topology"),
        ("model/moe.py", "import fomoe_pl.data"),
        ("model/moe.py", "from fomoe_pl import costs"),
        ("model/moe.py", "from ..costs import bytes"),
        ("model/backends/loop.py", "from ...data import module"),
        ("model/moe.py", "def f():\n    from fomoe_pl.cli import main"),
        ("errors.py", "from fomoe_pl.model.config import ModelConfig"),
        ("errors.py", "from .model import config"),
        ("__init__.py", "from fomoe_pl.strategies import FederatedStrategy"),
        ("federation/federation.py", "from fomoe_pl.checkpoint.content import Content"),
        ("checkpoint/saving.py", "from fomoe_pl.strategies.base import SiteStrategy"),
        ("checkpoint/content.py", "from fomoe_pl.training.context import SiteContext"),
        ("federation/layout.py", "from fomoe_pl.model.transformer import Transformer"),
        ("federation/layout.py", "from fomoe_pl.model import Transformer"),
        ("federation/layout.py", "from ..model.residency_of_others import x"),
        ("costs/time.py", "from fomoe_pl.planner.request import PlanRequest"),
        ("planner/plan.py", "import torch.distributed as dist"),
        ("costs/wire.py", "import torch.distributed as dist"),
        ("costs/wire.py", "from torch import distributed"),
        ("costs/wire.py", "from torch.distributed.fsdp import fully_shard"),
        ("costs/wire.py", "import torch\n\ntorch.distributed.get_rank()"),
        ("cli.py", "from tools.benchmarks.bench_step import main"),
        ("cli.py", "import tests.helpers"),
        ("servers/http.py", "import os"),
    ],
)
def test_planted_imports_are_refused(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / "fomoe_pl" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("cli.py", "from fomoe_pl.strategies.federated import FederatedStrategy\nfrom fomoe_pl import __version__"),
        ("model/moe.py", "from fomoe_pl.errors import ConfigError\nfrom .router import Router\nfrom ..errors import E"),
        ("federation/layout.py", "from fomoe_pl.model.residency import Residency\nimport torch.distributed as dist"),
        ("federation/layout.py", "from fomoe_pl.model import residency"),
        ("checkpoint/content.py", "from fomoe_pl.federation.federation import Federation"),
        (
            "costs/wire.py",
            "import torch\nfrom fomoe_pl.federation.placement import place\nfrom fomoe_pl.model import sizes",
        ),
    ],
)
def test_imports_along_the_arrows_are_taken(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / "fomoe_pl" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert violations(tmp_path) == []


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own(node: ast.Attribute) -> bool:
    """Whether an attribute is of the class that the code stands in, or of those that it derives from."""
    return ast.unparse(node.value) in ("self", "cls", "super()")


def defined(tree: ast.AST) -> set[str]:
    """Private names that a module gives to functions, classes, variables and its classes' attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and own(node):
            found.add(node.attr)
    return {name for name in found if private(name)}


def reaches(root: Path) -> list[str]:
    """Uses of names that are private to another module of the package under `root`, as `file:line: name`."""
    trees = {path: ast.parse(path.read_text()) for path in sorted((root / "fomoe_pl").rglob("*.py"))}
    of = {path: defined(tree) for path, tree in trees.items()}
    anywhere = set().union(*of.values())
    found = []
    for path, tree in trees.items():
        foreign = anywhere - of[path]
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and (node.level or within(node.module or "", "fomoe_pl")):
                names = [alias.name for alias in node.names if private(alias.name)]
            elif isinstance(node, ast.Attribute) and not own(node) and node.attr in foreign:
                names = [ast.unparse(node)]
            found += [f"{path.relative_to(root)}:{node.lineno}: {name}" for name in names]  # type: ignore[attr-defined]
    return found


def test_no_module_uses_anothers_private_names() -> None:
    assert reaches(ROOT) == []


@pytest.mark.parametrize(
    ("source", "n"),
    [
        ("from fomoe_pl.other import _hidden", 1),
        ("from .other import _hidden", 1),
        ("from fomoe_pl import other\nother._hidden()", 1),
        ("def f(thing):\n    return thing._kept", 1),
        ("def f(thing):\n    thing._kept = 3", 1),
        ("class A:\n    def f(self):\n        return self.thing._kept", 1),
        ("class A:\n    def f(self):\n        return self._kept + super()._kept", 0),
        ("class A:\n    def f(self, other):\n        self._kept = other._kept", 0),
        ("def f(thing):\n    return thing._of_a_library", 0),
    ],
)
def test_planted_reaches_are_found(tmp_path: Path, source: str, n: int) -> None:
    (tmp_path / "fomoe_pl").mkdir()
    (tmp_path / "fomoe_pl" / "other.py").write_text(
        "def _hidden():\n    pass\n\nclass B:\n    def __init__(self):\n        self._kept = 1\n"
    )
    (tmp_path / "fomoe_pl" / "one.py").write_text(source)
    assert len(reaches(tmp_path)) == n


def test_strategies_have_at_most_three_classes_of_their_own() -> None:
    kinds = {kind for kind, _, _ in REGISTERED.values()}
    assert kinds == {kind for kind in SiteStrategy.__subclasses__() if within(kind.__module__, "fomoe_pl")}
    for kind in kinds:
        chain = [cls.__name__ for cls in kind.__mro__ if within(cls.__module__, "fomoe_pl")]
        assert len(chain) <= 3, chain
