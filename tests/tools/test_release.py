"""tools/release/check.py, as far as it runs without installing anything."""

from pathlib import Path

from tests.tools import load

ROOT = Path(__file__).parents[2]


def test_versions_have_to_agree(tmp_path: Path) -> None:
    errors = load("check").version_errors
    (tmp_path / "fomoe_pl").mkdir()
    (tmp_path / "fomoe_pl/__init__.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "CITATION.cff").write_text("a: b\nversion: 1.2.3\nc: d\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [1.2.3] - 2026-12-01\n")
    assert errors(tmp_path) == []
    (tmp_path / "CITATION.cff").write_text("a: b\nversion: 1.2.2\nc: d\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n")
    assert [line.split(":")[0] for line in errors(tmp_path)] == ["CITATION.cff", "CHANGELOG.md"]
    assert not [line for line in errors(ROOT) if line.startswith("CITATION")]
