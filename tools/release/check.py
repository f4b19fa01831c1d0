"""What must hold before a release: `make release-check`.

The versions of package, citation and changelog agree; a wheel built from this folder, installed into a fresh
environment, trains the quickstart in an empty folder without the repository. It needs a network for pip, and some
minutes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_BITS_PER_BYTE = "3.0"


def version_errors(root: Path) -> list[str]:
    """Files whose version is not the package's."""
    found = re.search(r'__version__ = "(.+)"', (root / "fomoe_pl/__init__.py").read_text())
    version = found[1] if found else "none"
    wrong = []
    if f"\nversion: {version}\n" not in (root / "CITATION.cff").read_text():
        wrong.append(f"CITATION.cff: version is not {version}")
    if f"\n## [{version}] - " not in (root / "CHANGELOG.md").read_text():
        wrong.append(f"CHANGELOG.md: there is no section [{version}] with a date")
    return wrong


def run(*words: str | Path, folder: Path) -> None:
    """Show a command and run it."""
    print("$", *words, flush=True)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run([str(word) for word in words], cwd=folder, env=environment, check=True)


def main() -> int:
    """Check all of it; the exit status is 1 where versions differ, and a failing command's error is raised."""
    pip_args = os.environ.get("PIP_ARGS", "").split()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        binaries, empty = folder / "venv" / "bin", folder / "empty"
        empty.mkdir()
        run(sys.executable, "-m", "venv", folder / "venv", folder=folder)
        run(binaries / "pip", "wheel", "--quiet", *pip_args, "--no-deps", "--wheel-dir", folder / "dist", ROOT,
            folder=folder)  # fmt: skip
        [wheel] = (folder / "dist").glob("fomoe_pl-*.whl")
        run(ROOT / "tools/install_torch.sh", binaries / "pip", folder=folder)
        run(binaries / "pip", "install", "--quiet", *pip_args, f"{wheel}[plots]", folder=folder)
        fomoe = binaries / "fomoe"
        run(fomoe, "--version", folder=empty)
        run(fomoe, "prepare", "--source", "sample", "--output", "runs/data/sample", folder=empty)
        run(fomoe, "fit", "-c", "quickstart", folder=empty)
        run(fomoe, "validate", "-c", "quickstart", "--ckpt_path", "runs/quickstart/checkpoints/last.ckpt", folder=empty)
        run(fomoe, "compare", "runs/quickstart", "--max_bits_per_byte", MOST_BITS_PER_BYTE, folder=empty)
        run(fomoe, "export", "runs/quickstart/checkpoints/last.ckpt", "runs/quickstart/model", folder=empty)
    wrong = version_errors(ROOT)
    print("\n".join(wrong) or "the wheel trains, and versions agree")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
