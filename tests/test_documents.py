"""What the documents say of the code is true of it."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
from test_import import FLOORS

import diffusers_dtr
from diffusers_dtr import hub


ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize("name", [*diffusers_dtr.__all__, *hub.__all__])
def test_every_public_name_is_explained_to_users(name):
    documents = [ROOT / "README.md", *EXAMPLES.glob("*/README.md")]
    assert any(re.search(rf"\b{name}\b", path.read_text(encoding="utf-8")) for path in documents)


def test_contributors_are_told_the_floors():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\d\. (.*(?:\n   .*)*)", text, re.MULTILINE)
    assert len(listed) == len(FLOORS)
    for line, rooms in zip(listed, FLOORS, strict=True):
        assert rooms <= {*re.findall(r"`(\w+)`", line)}


README = (ROOT / "README.md").read_text(encoding="utf-8")
PARTS = {
    part
    for row in re.findall(r"^\| `diffusers_dtr.*", README, re.MULTILINE)
    for part in re.findall(r"`(diffusers_dtr(?:\.\w+)+)`", row)
}


def used_names(path):
    """Modules of this package that a file uses names of, with the names."""
    tree, parts = ast.parse(path.read_text(encoding="utf-8")), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "diffusers_dtr":
            yield from ((node.module, alias.name) for alias in node.names)
            modules = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            parts |= {name: module for name, module in modules.items() if module in PARTS}
        elif isinstance(node, ast.Import):
            yield from (alias.name.rpartition(".")[::2] for alias in node.names if "diffusers_dtr." in alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in parts:
            yield parts[node.value.id], node.attr


def is_public(module, name):
    """Whether a name is in the `__all__` of the package, or of one of its parts that the README lists."""
    if module == "diffusers_dtr":
        routed = name in dir(diffusers_dtr) and name.startswith("DTR")
        return name in diffusers_dtr.__all__ or routed or f"{module}.{name}" in PARTS
    return module in PARTS and name in import_module(module).__all__


SCRIPTS = sorted(EXAMPLES.rglob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_examples_use_public_names_alone(path):
    assert [used for used in used_names(path) if not is_public(*used)] == []


def test_public_names_are_few_and_those_of_parts_are_there():
    models = [name for name in diffusers_dtr.__all__ if name.startswith("DTR")]
    assert len(diffusers_dtr.__all__) - len(models) <= 30
    for part in PARTS:
        module = import_module(part)
        assert [name for name in module.__all__ if not hasattr(module, name)] == []


def test_what_is_inside_a_part_is_not_public(tmp_path):
    path = tmp_path / "example.py"
    path.write_text("from diffusers_dtr import DTRPipeline, analysis as a, routing\na.gram, a.json\n")
    found = [used for used in used_names(path) if not is_public(*used)]
    assert found == [("diffusers_dtr", "routing"), ("diffusers_dtr.analysis", "json")]


def test_accelerate_is_configured_before_it_launches():
    """Without, it warns at every launch of the defaults that it takes."""
    for path in (ROOT / "README.md", *EXAMPLES.glob("*/README.md")):
        text = path.read_text(encoding="utf-8")
        words = re.findall(r"^ *accelerate (\w+)\b(?! --config_file)", text, flags=re.MULTILINE)
        assert not words or words[0] == "config", path


def test_links_between_documents_and_code_lead_somewhere():
    documents = [*ROOT.glob("*.md"), *EXAMPLES.rglob("*.md")]
    links = [
        (path, link)
        for path in documents
        for link in re.findall(r"\]\(([^)#:]+)[)#]", path.read_text(encoding="utf-8"))
    ]
    assert [(path, link) for path, link in links if not (path.parent / link).exists()] == []
    assert len(links) > 20
