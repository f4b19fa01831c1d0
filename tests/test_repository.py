"""What a reader relies on: configurations explain every key, files stay readable, documents name things that exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "data").rglob("*.md"))]


def leaf_keys(node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    """Keys whose value has no keys of its own in block style: what a user changes."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            nested = isinstance(value, yaml.CollectionNode) and not value.flow_style
            yield from leaf_keys(value) if nested else [key]
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from leaf_keys(value)


def uncommented_keys(text: str) -> list[str]:
    """Leaf keys with a comment neither on their line nor on a line of its own above."""
    lines = text.splitlines()
    found = []
    for key in leaf_keys(yaml.compose(text)):
        line = key.start_mark.line
        above = lines[line - 1].strip() if line else ""
        if " #" not in lines[line] and not above.startswith("#"):
            found.append(f"line {line + 1}: {key.value}")
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_configurations_parse_and_explain_every_key(path: Path) -> None:
    text = path.read_text()
    assert isinstance(yaml.safe_load(text), dict)
    assert uncommented_keys(text) == []


def test_a_key_without_comment_is_found() -> None:
    text = """
model:
  width: 3     # explained
  # explained above
  depth: 4
  heads: 2
trainer:
  callbacks:
    - class_path: a.B  # explained
      init_args: {every: 5}
"""
    assert uncommented_keys(text) == ["line 6: heads", "line 10: init_args"]


def missing_names(document: str, folder: Path) -> list[str]:
    """Make targets, files of this repository and relative links that a document names but that do not exist."""
    makefile = (ROOT / "Makefile").read_text()
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", document, flags=re.DOTALL))
    missing = []
    for target in re.findall(r"\bmake ([a-z][a-z-]*)", code):
        if not re.search(rf"^{target}:", makefile, flags=re.MULTILINE):
            missing.append(f"make {target}")
    for file in re.findall(r"(?<![\w./-])(?:configs|tools|docs|tests|fomoe_pl)/[\w./-]+\.(?:yaml|py|md|sh)\b", code):
        if not (ROOT / file).is_file():
            missing.append(file)
    for link in re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", document):
        if not (folder / link).exists():
            missing.append(link)
    return missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_things_that_exist(path: Path) -> None:
    assert missing_names(path.read_text(), path.parent) == []


def test_a_missing_name_is_found() -> None:
    document = "```\nmake quickstart\nmake coffee\nfomoe fit -c configs/none.yaml\n```\n[a](none.md) [b](README.md#top)"
    assert missing_names(document, ROOT) == ["make coffee", "configs/none.yaml", "none.md"]
