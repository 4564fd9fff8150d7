"""Pipelines that carry their code: they load without the package, if it is trusted, and as before with it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.pipelines import pipeline_loading_utils
from huggingface_hub import HfApi
from tiny_dit import routed_dit


sys.path.insert(0, str(Path(__file__).parent / "models"))
from tiny_models import FAMILIES, UNET, output

import diffusers_dtr
from diffusers_dtr import DTRPipeline, add_code
from diffusers_dtr.diffusers_registration import register_instead_of_code
from diffusers_dtr.self_contained import CODE_FILE, self_contained_source


TRAP = 'raise RuntimeError("shipped code was run")\n'

shipped_classes = pytest.mark.parametrize(
    "name", ["DTRPipeline", *(family.routed_class.__name__ for family in FAMILIES)]
)


@pytest.fixture(scope="module")
def python_without_the_package(tmp_path_factory):
    """A Python that has everything that this one has, but for the package, which is installed as editable here."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # A folder that is named in a .pth file has its own .pth files ignored, and so what they install.
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "everything_else.pth").write_text("\n".join(paths))
    return folder / "bin" / "python"


@pytest.fixture
def run_without_the_package(python_without_the_package, tmp_path):
    """As `fresh_process`, but in a Python that lacks the package."""

    def run(code):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [python_without_the_package, "-c", textwrap.dedent(code)],
            cwd=tmp_path,
            env={**environment, "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def routed_pipeline(model=None, **components):
    model = routed_dit() if model is None else model
    part = "unet" if "UNet" in type(model).__name__ else "transformer"
    return DTRPipeline(DDIMScheduler(), **{part: model}, **components)


def ddpm_pipeline():
    return DDPMPipeline(UNET.routed(), DDPMScheduler())


def draw(pipeline, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(**arguments, num_inference_steps=2, generator=generator, output_type="np").images


def saved_index(folder):
    return json.loads((folder / "model_index.json").read_text())


def set_traps(folder):
    """Replaces shipped code by code that shows whether it is run."""
    for path in Path(folder).rglob(CODE_FILE):
        path.write_text(TRAP)


# ---- the files


@shipped_classes
def test_code_has_no_unused_or_undefined_names_and_needs_no_package(name, tmp_path):
    source = self_contained_source(name)
    compile(source, name, "exec")
    assert f"class {name}(" in source
    assert "from diffusers_dtr" not in source.replace(">>> from diffusers_dtr import", "")
    assert "import diffusers_dtr" not in source
    assert "Apache" in source
    path = tmp_path / CODE_FILE
    path.write_text(source)
    pytest.importorskip("ruff", reason="ruff is not installed (the extra `test` has it)")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "E9,F", path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@shipped_classes
def test_code_does_not_publish(name):
    source = self_contained_source(name)
    assert "huggingface_hub" not in source
    assert "add_code" not in source


def test_code_is_only_of_classes():
    for name in ("NoSuchModel", "routing_mask"):
        with pytest.raises(ValueError, match=rf"`class_name` must be a class of diffusers_dtr .*, got '{name}'"):
            self_contained_source(name)


def test_saving_with_code_adds_code_beside_what_is_ours(tmp_path):
    routed_pipeline().save_pretrained(tmp_path / "without")
    routed_pipeline().save_pretrained(tmp_path / "with", include_code=True)
    files = {
        name: {str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*") if path.is_file()}
        for name in ("with", "without")
    }
    assert files["with"] - files["without"] == {CODE_FILE, f"transformer/{CODE_FILE}"}
    index = saved_index(tmp_path / "with")
    assert index["_class_name"] == ["diffusers_dtr", "DTRPipeline"]
    assert index | {"_class_name": "DTRPipeline"} == saved_index(tmp_path / "without")


def test_adding_code_again_changes_nothing(tmp_path):
    routed_pipeline().save_pretrained(tmp_path)
    written = add_code(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert add_code(tmp_path) == written
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_pipeline_of_diffusers_keeps_its_class(tmp_path):
    ddpm_pipeline().save_pretrained(tmp_path)
    index = saved_index(tmp_path)
    assert add_code(tmp_path) == [tmp_path / "unet" / CODE_FILE]
    assert saved_index(tmp_path) == index


def test_a_pipeline_with_nothing_of_ours_is_refused(tmp_path):
    DDPMPipeline(UNet2DModel(**UNET.config), DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`folder` must hold a pipeline with a component of diffusers_dtr"):
        add_code(tmp_path)


def test_pushing_while_saving_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"Use `pipeline.push_to_hub\(repo_id, include_code=True\)`"):
        routed_pipeline().save_pretrained(tmp_path / "pipeline", include_code=True, push_to_hub=True)
    assert not (tmp_path / "pipeline").exists()


# ---- without the package

# What the processes without the package start with.
PRELUDE = """
    import hashlib, importlib.util, json, logging, sys
    import torch
    from diffusers import DDPMPipeline, DiffusionPipeline

    assert importlib.util.find_spec("diffusers_dtr") is None, "the package is installed here"
    logging.getLogger("diffusers").setLevel(logging.ERROR)

    def draw(pipeline, **arguments):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images = pipeline(**arguments, num_inference_steps=2, generator=generator, output_type="np").images
        return hashlib.sha256(images.tobytes()).hexdigest()
"""

COMPARE_ALL = (
    PRELUDE
    + """
    found = {{}}
    for name, arguments in torch.load({inputs!r}, weights_only=True).items():
        pipeline = DiffusionPipeline.from_pretrained("owner/" + name, trust_remote_code=True)
        with torch.no_grad():
            sample = pipeline.denoiser(**arguments).sample
        digest = hashlib.sha256(sample.numpy().tobytes()).hexdigest()
        found[name] = [type(pipeline).__name__, type(pipeline.denoiser).__name__, digest]
    ours = DiffusionPipeline.from_pretrained("owner/DTRTransformer2DModel", trust_remote_code=True)
    found["samples"] = draw(ours, class_labels=[1, "three"], guidance_scale=2.0)
    found["folder"] = draw(
        DiffusionPipeline.from_pretrained({folder!r}, trust_remote_code=True), class_labels=[1, "three"],
        guidance_scale=2.0,
    )
    for loader in (DDPMPipeline, DiffusionPipeline):
        found[loader.__name__] = draw(loader.from_pretrained("owner/ddpm", trust_remote_code=True))
    print(json.dumps(found))
"""
)


def sha256(array):
    return hashlib.sha256(array.tobytes()).hexdigest()


def test_every_family_and_pipeline_is_equal_to_the_bit_without_the_package(hub, run_without_the_package, tmp_path):
    inputs, expected = {}, {}
    for family in FAMILIES:
        name = family.routed_class.__name__
        pipeline = routed_pipeline(family.routed(), id2label={3: "three"} if name == "DTRTransformer2DModel" else None)
        pipeline.push_to_hub(f"owner/{name}", include_code=True)
        pipeline.save_pretrained(tmp_path / name, include_code=True)
        inputs[name] = family.inputs()
        # Loaded weights lie elsewhere in memory than new ones, which changes the last bits of matrix products.
        loaded = DTRPipeline.from_pretrained(tmp_path / name)
        expected[name] = ["DTRPipeline", name, sha256(output(loaded.denoiser, inputs[name]).numpy())]
        if name == "DTRTransformer2DModel":
            expected["samples"] = sha256(draw(loaded, class_labels=[1, "three"], guidance_scale=2.0))
            expected["folder"] = expected["samples"]

    ddpm_pipeline().save_pretrained(tmp_path / "ddpm")
    add_code(tmp_path / "ddpm")
    HfApi().create_repo("owner/ddpm")
    HfApi().upload_folder(repo_id="owner/ddpm", folder_path=tmp_path / "ddpm")
    samples = sha256(draw(DDPMPipeline.from_pretrained(tmp_path / "ddpm")))
    expected |= {"DDPMPipeline": samples, "DiffusionPipeline": samples}

    torch.save(inputs, tmp_path / "inputs.pt")
    folder = str(tmp_path / "DTRTransformer2DModel")
    assert run_without_the_package(COMPARE_ALL.format(inputs=str(tmp_path / "inputs.pt"), folder=folder)) == expected


def test_code_that_is_not_trusted_is_refused_and_not_run(hub, run_without_the_package, tmp_path):
    for name, pipeline in (("ours", routed_pipeline()), ("theirs", ddpm_pipeline())):
        pipeline.save_pretrained(tmp_path / name)
        add_code(tmp_path / name)
        set_traps(tmp_path / name)
        HfApi().create_repo(f"owner/{name}")
        HfApi().upload_folder(repo_id=f"owner/{name}", folder_path=tmp_path / name)
    folders = [str(tmp_path / "ours"), str(tmp_path / "theirs")]
    messages = run_without_the_package(
        PRELUDE
        + f"""
    messages = []
    for where in ["owner/ours", "owner/theirs", *{folders!r}]:
        try:
            DiffusionPipeline.from_pretrained(where)
        except Exception as error:
            messages.append(f"{{type(error).__name__}}: {{error}}")
    print(json.dumps(messages))
    """
    )
    assert len(messages) == 4
    for message in messages:
        assert message.startswith("ValueError")
        assert f"contains custom code in {CODE_FILE}" in message
        assert "Pass `trust_remote_code=True`" in message


# ---- with the package


@pytest.fixture
def code_cache(monkeypatch, tmp_path):
    """Where diffusers puts code before it runs it, and nothing else does."""
    path = tmp_path / "modules"
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(path))
    return path


@pytest.mark.parametrize("options", [{}, {"trust_remote_code": True}], ids=["untrusted", "trusted"])
def test_with_the_package_a_folder_loads_as_without_code_and_the_code_is_not_run(options, tmp_path, code_cache):
    routed_pipeline().save_pretrained(tmp_path / "ours", include_code=True)
    ddpm_pipeline().save_pretrained(tmp_path / "theirs")
    add_code(tmp_path / "theirs")
    set_traps(tmp_path)
    for loader, folder in (
        (DTRPipeline, "ours"),
        (DiffusionPipeline, "ours"),
        (DDPMPipeline, "theirs"),
        (DiffusionPipeline, "theirs"),
    ):
        pipeline = loader.from_pretrained(tmp_path / folder, **options)
        ours = folder == "ours"
        assert type(pipeline) is (DTRPipeline if ours else DDPMPipeline)
        denoiser = pipeline.transformer if ours else pipeline.unet
        assert type(denoiser) is (diffusers_dtr.DTRTransformer2DModel if ours else diffusers_dtr.DTRUNet2DModel)
    assert not code_cache.exists()


def test_with_the_package_a_pushed_pipeline_loads_from_a_hub_in_a_fresh_process(hub, fresh_process):
    routed_pipeline().push_to_hub("owner/ours", include_code=True)
    files = {file.rfilename for file in HfApi().model_info("owner/ours").siblings}
    assert {CODE_FILE, f"transformer/{CODE_FILE}"} <= files
    assert len(HfApi().list_repo_commits("owner/ours")) == 2  # the empty repository's, and one push
    found = fresh_process("""
        import json, sys, diffusers, diffusers_dtr

        loaders = (diffusers_dtr.DTRPipeline, diffusers.DiffusionPipeline)
        classes = [type(loader.from_pretrained("owner/ours")).__module__ for loader in loaders]
        print(json.dumps([classes, [name for name in sys.modules if name.startswith("diffusers_modules")]]))
    """)
    assert found == [["diffusers_dtr.pipelines.pipeline_dtr"] * 2, []]


def test_with_the_package_a_loaded_pipeline_is_saved_without_its_code_unless_asked(tmp_path):
    routed_pipeline().save_pretrained(tmp_path / "first", include_code=True)
    DTRPipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert saved_index(tmp_path / "second")["_class_name"] == "DTRPipeline"
    assert not list((tmp_path / "second").rglob(CODE_FILE))


def test_with_the_package_code_of_others_and_of_newer_classes_is_run_only_if_trusted(tmp_path, code_cache):
    ddpm_pipeline().save_pretrained(tmp_path)
    for library, class_name in (("other_library", "DTRUNet2DModel"), ("diffusers_dtr", "DTRNewerModel")):
        index = saved_index(tmp_path) | {"unet": [library, class_name]}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        (tmp_path / "unet" / f"{library}.py").write_text(
            f"from diffusers import UNet2DModel\n\n\nclass {class_name}(UNet2DModel):\n    pass\n"
        )
        with pytest.raises(ValueError, match=f"contains custom code in {library}.py"):
            DiffusionPipeline.from_pretrained(tmp_path)
        pipeline = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
        assert type(pipeline.unet).__module__ == f"diffusers_modules.local.{library}"


def test_registering_twice_changes_nothing():
    before = pipeline_loading_utils.get_class_from_dynamic_module
    register_instead_of_code()
    assert pipeline_loading_utils.get_class_from_dynamic_module is before
