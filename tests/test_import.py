"""What importing the library brings in, and which of its parts may import which."""

import ast
from pathlib import Path

import pytest

import diffusers_dtr


PACKAGE = Path(diffusers_dtr.__file__).parent

# Seven floors of rooms: each room may import those of the floors below it, and itself.
FLOORS = [
    {
        *(
            "atomic_files",
            "call_timesteps",
            "config_types",
            "diffusers_registration",
            "evaluating",
            "extras",
            "latents",
            "noise_levels",
        ),
        *("ranges", "run_record", "user_errors"),
    },
    {"caches", "hub", "objective", "routing"},
    {"analysis", "models"},
    {"conversion", "lora_files", "pipelines", "visualization"},
    {"model_card"},
    {"training"},
    {"cli"},
]

APART = {"__init__"}


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path):
    """Rooms of this package that a file imports, anywhere in it, absolutely or relatively."""
    package = ("diffusers_dtr", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            modules = [(*module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [tuple(alias.name.split(".")) for alias in node.names]
        else:
            continue
        yield from (module[1] for module in modules if module[0] == "diffusers_dtr" and len(module) > 1)


FILES = sorted(path for path in PACKAGE.rglob("*.py") if room_of(path) not in APART)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = room_of(path)
    (floor,) = (number for number, rooms in enumerate(FLOORS) if room in rooms)
    assert set(imported_rooms(path)) <= {room}.union(*FLOORS[:floor])


def test_imports_are_seen_however_they_are_written(monkeypatch, tmp_path):
    path = tmp_path / "models" / "family.py"
    path.parent.mkdir()
    path.write_text("""
import diffusers_dtr.analysis.pictures
from diffusers_dtr import objective
from diffusers_dtr.training import data
from . import presets
from .. import routing
from ..pipelines.pipeline_dtr import DTRPipeline
from diffusers import models as theirs
def late():
    from ..hub import push
""")
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    expected = {"analysis", "objective", "training", "models", "routing", "pipelines", "hub"}
    assert set(imported_rooms(path)) == expected


def test_importing_the_library_imports_nothing_that_its_parts_of_diffusers_do_not(fresh_process):
    added = fresh_process("""
        import json, sys
        from diffusers import DDPMPipeline, DDPMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel
        before = {name.partition(".")[0] for name in sys.modules}
        import diffusers_dtr
        print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules} - before)))
    """)
    assert added == ["diffusers_dtr"]


def test_all_public_names_are_there_once():
    assert all(hasattr(diffusers_dtr, name) for name in diffusers_dtr.__all__)
    assert len(set(diffusers_dtr.__all__)) == len(diffusers_dtr.__all__)
