"""What the documents say of the code is true of it."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
from test_import import LAYERS

import diffusers_dtr
from diffusers_dtr import hub


ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize("name", [*diffusers_dtr.__all__, *hub.__all__])
def test_every_public_name_is_explained_to_users(name):
    documents = [ROOT / "README.md", *EXAMPLES.glob("*/README.md")]
    assert any(re.search(rf"\b{name}\b", path.read_text(encoding="utf-8")) for path in documents)


def test_contributors_are_told_the_layers_in_their_order():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = text.partition("imports point down this list only")[2].partition("and the scripts")[0]
    assert re.findall(r"`(\w+)`", listed) == [*LAYERS, "cli"]


def imported_names(path):
    """Modules of this package that a file imports names from, with the names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "diffusers_dtr":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name.rpartition(".")[::2] for alias in node.names if "diffusers_dtr." in alias.name)


def is_public(module, name):
    """Whether a name is of the package or one of its parts, not of a module inside a part."""
    part = import_module(module)
    public = {*getattr(part, "__all__", vars(part))} | ({*LAYERS, *dir(part)} if module == "diffusers_dtr" else set())
    return module.count(".") <= 1 and not name.startswith("_") and name in public


SCRIPTS = sorted(path for path in EXAMPLES.rglob("*.py") if path.parent.name != "benchmarks")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_examples_use_public_names_alone(path):
    assert [imported for imported in imported_names(path) if not is_public(*imported)] == []


def test_what_is_inside_a_part_is_not_public():
    assert is_public("diffusers_dtr", "DTRPipeline")
    assert is_public("diffusers_dtr", "training")
    assert is_public("diffusers_dtr.analysis", "frechet_distance")
    assert not is_public("diffusers_dtr.analysis.estimators", "gram")
    assert not is_public("diffusers_dtr.analysis", "estimators")


def test_accelerate_is_configured_before_it_launches():
    """Without, it warns at every launch of the defaults that it takes."""
    for path in (ROOT / "README.md", *EXAMPLES.glob("*/README.md")):
        commands = re.findall(r"^ *accelerate \w+", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert not commands or commands[0].strip() == "accelerate config", path


def test_links_between_documents_and_code_lead_somewhere():
    documents = [*ROOT.glob("*.md"), *EXAMPLES.rglob("*.md")]
    links = [
        (path, link)
        for path in documents
        for link in re.findall(r"\]\(([^)#:]+)[)#]", path.read_text(encoding="utf-8"))
    ]
    assert [(path, link) for path, link in links if not (path.parent / link).exists()] == []
    assert len(links) > 20
