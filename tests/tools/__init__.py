"""The commands under tools/ as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).parents[2] / "tools"


def load(name: str) -> ModuleType:
    """Import `tools/*/NAME.py`, as a fresh module each time."""
    [path] = TOOLS.glob(f"*/{name}.py")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # as for a script, whose own folder comes first: tools import each other
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module
