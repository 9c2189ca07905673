"""Nothing that is read runs code, and nothing that is read or written lies outside its folder.

A pickle that makes a folder, `ran`, when it is loaded lies in every place that a file is read from.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from shards import jpeg, write_tar
from source_code import ROOT, files, imports
from tiny import train
from typer.testing import CliRunner, Result

from data_pipelines.curation.keep_list import keep_listed
from data_pipelines.decode.transforms import load_pixels
from data_pipelines.shards import columns
from data_pipelines.shards.bad_sample import BadSample
from data_pipelines.shards.sidecar import open_sidecar, write_sidecar
from data_pipelines.shards.source import open_source
from data_pipelines.text.captions import captions_of
from data_pipelines.text.feature_store import open_store, store_facts, store_name
from xray.artifacts.artifact import open_artifact
from xray.artifacts.language_model import Language
from xray.artifacts.lineage import lineage
from xray.commands.main import app
from xray.config import DataConfig, ModelConfig, SourceConfig, TextConfig
from xray.config.loading import read_yaml
from xray.errors import ArtifactError, ConfigError, DataError
from xray.models import VisionBackbone
from xray.models.weight_loading import load_pretrained

PACKAGES = ("xray", "stages", "data_pipelines")


class Hostile:
    """What its pickle makes when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """What is there once a pickle was loaded."""
    return tmp_path / "ran"


@pytest.fixture(params=["plain", "torch", "numpy"])
def hostile(request: pytest.FixtureRequest, ran: Path) -> bytes:
    """A pickle as pickle, torch.save and np.save write it."""
    return pickled(ran, request.param)


def pickled(ran: Path, kind: str = "torch") -> bytes:
    buffer = io.BytesIO()
    if kind == "plain":
        return pickle.dumps(Hostile(ran))
    if kind == "torch":
        torch.save(Hostile(ran), buffer)
    else:
        np.save(buffer, np.array([Hostile(ran)], object), allow_pickle=True)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def runs(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one step; the text tower is tuned whole, so that artifacts hold their own LLM."""
    root, short = tmp_path_factory.mktemp("runs"), "train.samples=12"
    train("hashtag", demo, root / "hashtag", short)
    train("text", demo, root / "text", short, "text.tune=full", "text.lora_rank=0")
    parents = [root / "hashtag" / "artifact", root / "text" / "artifact"]
    train("clip", demo, root / "clip", short, init_from=parents)
    return root


def xray(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def evaluated(artifact: Path, demo: Path) -> Result:
    sets = f"eval.retrieval={{shards: {demo / 'heldout'}}}"
    return xray("eval", artifact, sets, "--suite", "retrieval")


def refused(done: Result, name: str, ran: Path) -> None:
    """One line with the file's name, and no code run."""
    assert done.exit_code == 2, (done.output, done.exception)
    assert name in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not ran.exists()


def forge(artifact: Path, name: str, content: bytes) -> None:
    """Replace an artifact's file, and its hash in the manifest."""
    (artifact / name).write_bytes(content)
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["files"][name] = hashlib.sha256(content).hexdigest()
    (artifact / "manifest.json").write_text(json.dumps(manifest))


# pickles ----------------------------------------------------------------------------------------


def test_the_pickles_do_what_they_say(ran: Path, hostile: bytes) -> None:
    buffer = io.BytesIO(hostile)
    if hostile.startswith(b"\x93NUMPY"):
        np.load(buffer, allow_pickle=True)
    elif hostile.startswith(b"PK"):
        with zipfile.ZipFile(buffer) as archive:
            pickle.loads(archive.read(next(n for n in archive.namelist() if "data.pkl" in n)))
    else:
        pickle.load(buffer)
    assert ran.is_dir()


@pytest.mark.parametrize("name", ["backbone", "head", "text"])
def test_in_an_artifacts_weights(
    runs: Path, demo: Path, tmp_path: Path, hostile: bytes, ran: Path, name: str
) -> None:
    artifact = tmp_path / "clip"
    shutil.copytree(runs / "clip" / "artifact", artifact)
    (artifact / f"{name}.safetensors").write_bytes(hostile)
    refused(evaluated(artifact, demo), f"{name}.safetensors was changed", ran)
    forge(artifact, f"{name}.safetensors", hostile)
    refused(
        evaluated(artifact, demo), f"{name}.safetensors is not a readable safetensors file", ran
    )


def test_in_an_artifacts_other_files(runs: Path, demo: Path, tmp_path: Path, ran: Path) -> None:
    content = pickled(ran, "plain")
    for stage, name, said in (
        ("clip", "manifest.json", "manifest.json"),
        ("clip", "llm/config.json", "llm/config.json"),
        ("clip", "llm/tokenizer.json", "llm has no usable tokenizer"),
        ("clip", "llm/tokenizer_config.json", "llm/tokenizer_config.json"),
        ("hashtag", "vocabulary.json", "vocabulary.json"),
    ):
        artifact = tmp_path / stage
        shutil.copytree(runs / stage / "artifact", artifact)
        if name == "manifest.json":
            (artifact / name).write_bytes(content)
            refused(xray("lineage", artifact), said, ran)
        else:
            forge(artifact, name, content)
        if stage == "clip":
            done = evaluated(artifact, demo)
        else:
            done = xray("data", "pseudo-tags", artifact, demo / "heldout", "workers=0")
        refused(done, said, ran)
        shutil.rmtree(artifact)
    artifact = tmp_path / "clip"
    shutil.copytree(runs / "clip" / "artifact", artifact)
    carried = f"lineage/{hashlib.sha256(content).hexdigest()}.json"  # as an ancestor's manifest
    forge(artifact, carried, content)
    refused(xray("lineage", artifact, "--verify"), carried, ran)


def test_in_a_teacher_and_in_a_parent(runs: Path, demo: Path, tmp_path: Path, ran: Path) -> None:
    clip, hashtag = tmp_path / "clip", tmp_path / "hashtag"
    shutil.copytree(runs / "clip" / "artifact", clip)
    forge(clip, "head.safetensors", pickled(ran))
    with pytest.raises(
        ArtifactError, match=r"head\.safetensors is not a readable safetensors file"
    ):
        train("clip", demo, tmp_path / "out", "train.samples=12", f"clip.teacher={clip}")
    shutil.copytree(runs / "hashtag" / "artifact", hashtag)
    forge(hashtag, "backbone.safetensors", pickled(ran))
    with pytest.raises(
        ArtifactError, match=r"backbone\.safetensors is not a readable safetensors file"
    ):
        train("clip", demo, tmp_path / "out", "train.samples=12", init_from=[hashtag])
    assert not ran.exists()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("portable/00000.safetensors", "torch"), ("portable/buffers.safetensors", "numpy"),
     ("portable/index.json", "plain"), ("state.json", "torch"), ("quarantine.jsonl", "plain"),
     ("../../run.json", "plain")],
)  # fmt: skip
def test_in_a_checkpoint(
    runs: Path, demo: Path, tmp_path: Path, ran: Path, name: str, kind: str
) -> None:
    shutil.copytree(runs / "hashtag", tmp_path / "hashtag")
    shutil.rmtree(tmp_path / "hashtag" / "artifact")
    (checkpoint,) = (tmp_path / "hashtag" / "checkpoints").glob("step_*")
    assert (checkpoint / name).is_file()
    (checkpoint / name).write_bytes(pickled(ran, kind))
    where = (checkpoint / name).resolve()
    with pytest.raises((ArtifactError, ConfigError), match=rf"{where} cannot be read"):
        train("hashtag", demo, tmp_path / "hashtag", "train.samples=12")
    assert not ran.exists()


def test_in_a_config(tmp_path: Path, ran: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(pickled(ran))
    refused(xray("train", "mae", "--resume", tmp_path), "config.yaml", ran)
    for tag in ("object/apply", "object/new"):
        (tmp_path / "mine.yaml").write_text(f"a: !!python/{tag}:os.mkdir ['{ran}']\n")
        with pytest.raises(ConfigError, match=r"mine\.yaml is not valid yaml"):
            read_yaml(tmp_path / "mine.yaml")
        refused(xray("run", tmp_path / "mine.yaml"), "mine.yaml", ran)
    assert not ran.exists()


@pytest.mark.parametrize("ending", ["safetensors", "pth", "pt", "bin", "npz"])
def test_in_pretrained_weights(tmp_path: Path, ran: Path, hostile: bytes, ending: str) -> None:
    small = {"embed_dim": 32, "depth": 1, "num_heads": 2}

    def load(source: str) -> None:
        config = ModelConfig("vit_tiny_patch16_224", small, pretrained=source)
        load_pretrained(VisionBackbone(config, 32, 4), config)

    file = tmp_path / f"weights.{ending}"
    file.write_bytes(hostile)
    with pytest.raises(ArtifactError, match=rf"{file} is no readable safetensors"):
        load(str(file))
    folder = tmp_path / "timm"
    folder.mkdir()
    settings = {"architecture": "vit_tiny_patch16_224", "num_classes": 10}
    (folder / "config.json").write_text(json.dumps(settings))
    for name in (f"model.{ending}", f"pytorch_model.{ending}"):
        (folder / name).write_bytes(hostile)
        with pytest.raises(
            ConfigError, match=rf"no weights for model.pretrained=local-dir:{folder}"
        ):
            load(f"local-dir:{folder}")
        (folder / name).unlink()
    assert not ran.exists()


def test_in_open_clips_weights(tmp_path: Path, ran: Path) -> None:
    from stages.clip_teacher import load_teacher

    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "tiny-and-hostile.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-and-hostile.json")
    (tmp_path / "weights.bin").write_bytes(pickled(ran))
    name = f"open_clip:tiny-and-hostile:{tmp_path / 'weights.bin'}"
    with pytest.raises(ConfigError, match=r"weights\.bin cannot be loaded"):
        load_teacher(name, torch.device("cpu"))
    assert not ran.exists()


def llm(demo: Path, folder: Path, change: dict[str, bytes | None]) -> Callable[[], object]:
    """What loads a copy of the tiny LLM with some files replaced, or taken away."""
    shutil.copytree(demo / "llm", folder)
    for name, content in change.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
    return lambda: Language(TextConfig(str(folder), "none")).build()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.safetensors", "cannot load the weights in"),
        ("pytorch_model.bin", "pytorch_model.bin is a pickle, which is not loaded"),
        ("pytorch_model-00001-of-00002.bin", "00002.bin is a pickle, which is not loaded"),
        ("config.json", "config.json is no json"),
        ("tokenizer.json", "no usable tokenizer"),
        ("tokenizer_config.json", "tokenizer_config.json is no json"),
        ("added_tokens.json", "no usable tokenizer"),
        ("modules.json", "modules.json is no json"),
        ("1_Pooling/config.json", "config.json is no json"),
        ("generation_config.json", ""),  # not read
        ("vocab.json", ""),
        ("tokenizer.model", ""),
    ],
)
def test_in_an_llms_folder(demo: Path, tmp_path: Path, ran: Path, name: str, said: str) -> None:
    for kind in ("plain", "torch"):
        change: dict[str, bytes | None] = {name: pickled(ran, kind)}
        if name.endswith(".bin"):
            change["model.safetensors"] = None
        load = llm(demo, tmp_path / kind, change)
        if said:
            with pytest.raises(ConfigError, match=said) as error:
                load()
            assert str(tmp_path / kind) in str(error.value)
        else:
            load()
        assert not ran.exists()


def test_code_of_an_llms_folder_is_not_run(demo: Path, tmp_path: Path, ran: Path) -> None:
    """And nobody is asked whether it may."""
    code = f"import os\nos.mkdir({str(ran)!r})\n".encode()
    settings = json.loads((demo / "llm" / "config.json").read_text())
    named = {"auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    unknown = json.dumps({**settings, **named, "model_type": "unheard_of"}).encode()
    load = llm(demo, tmp_path / "unknown", {"config.json": unknown, "code.py": code})
    with pytest.raises(ConfigError, match=r"config.json names code of its own .* is not run"):
        load()
    own = json.dumps({**settings, **named}).encode()  # a family that transformers has itself
    llm(demo, tmp_path / "known", {"config.json": own, "code.py": code})()
    settings = json.loads((demo / "llm" / "tokenizer_config.json").read_text())
    named = {"auto_map": {"AutoTokenizer": ["code.Slow", "code.Fast"]}}
    own = json.dumps({**settings, **named, "tokenizer_class": "Fast"}).encode()
    llm(demo, tmp_path / "tokenizer", {"tokenizer_config.json": own, "code.py": code})()
    assert not ran.exists()


def test_in_a_vocabulary(demo: Path, tmp_path: Path, ran: Path, hostile: bytes) -> None:
    (tmp_path / "tags.json").write_bytes(hostile)
    with pytest.raises(ArtifactError, match=r"tags\.json"):
        train("hashtag", demo, tmp_path / "out", f"hashtag.vocabulary={tmp_path / 'tags.json'}")
    assert not ran.exists()


def test_beside_shards(tmp_path: Path, ran: Path, hostile: bytes) -> None:
    """Indexes, the shards' manifest, labels, a teacher's tags, keep-lists, text features."""
    folder = tmp_path / "photos"
    folder.mkdir()
    write_tar(folder / "0.tar", {f"{i}.jpg": jpeg() for i in range(3)})
    source = open_source("photos", str(folder), "image")
    facts = store_facts(source, {"llm": "x"}, {}, "bf16")
    names = ["labels-x", "teacher-x", "kept-x", store_name(facts)]
    for name in names:
        write_sidecar(source, name, lambda shard: {"ids": np.arange(3), "ends": np.arange(3)}, {})
    made = sorted(path for path in folder.iterdir() if path.suffix != ".tar")
    assert len(made) == 2 + 2 * len(names)
    for path in made:
        if path.name.startswith("0.tar."):  # of the one shard
            path.write_bytes(hostile)
    assert len(open_source("photos", str(folder), "image")) == 3  # indexed anew
    for name in names:
        found = open_sidecar(source, name)
        assert found is not None
        with pytest.raises(DataError, match=rf"0\.tar\.{name} is missing, damaged"):
            found.table(0)
    for path in made:
        path.write_bytes(hostile)
    source = open_source("photos", str(folder), "image")
    assert len(source) == 3 and all(open_sidecar(source, name) is None for name in names)
    with pytest.raises(ConfigError, match="no such keep-list"):
        keep_listed(source, SourceConfig(keep="kept-x"))
    with pytest.raises(ConfigError, match="no stored text features"):
        open_store(source, facts)
    assert not ran.exists()


def test_in_samples(tmp_path: Path, ran: Path, hostile: bytes) -> None:
    """webdataset's own decoders would load some of these by their endings."""
    endings = ("pkl", "pickle", "pyd", "pth", "pt", "npy", "npz", "ten", "tb", "cls", "json", "txt")
    samples = {f"00.{ending}": hostile for ending in ("jpg", *endings)}
    samples |= {f"01.{ending}": hostile for ending in ("mp4", "json")}
    samples |= {"02.jpg": jpeg(), "02.pkl": hostile, "02.pth": hostile, "02.txt": b"a picture"}
    folder = tmp_path / "photos"
    folder.mkdir()
    write_tar(folder / "0.tar", samples)
    source = open_source("photos", str(folder), "image")
    for shard, member in source.places():
        sample = source.sample(shard, member, 32, 1)
        if sample.key == "02":
            assert load_pixels(sample, DataConfig(), None).shape == (1, 3, 32, 32)
            assert captions_of(sample.files)[0] == "a picture"
        else:
            with pytest.raises(BadSample):
                load_pixels(sample, DataConfig(), None)
            with pytest.raises(BadSample):
                captions_of(sample.files)
    assert not ran.exists()


def test_whatever_a_library_asks_torch_for(tmp_path: Path, ran: Path) -> None:
    """DeepSpeed's own loading, too, which the project has no use for."""
    (tmp_path / "evil.pt").write_bytes(pickled(ran))
    code = """
import sys, xray.commands.main, torch
from pickle import UnpicklingError
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
for load in (lambda x: torch.load(x, weights_only=False), TorchCheckpointEngine().load):
    try:
        load(sys.argv[1])
    except UnpicklingError as error:
        print("refused", "mkdir" in str(error))
"""
    switched_off = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", code, str(tmp_path / "evil.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env=switched_off)
    assert done.stdout.count("refused True") == 2, done.stdout + done.stderr
    assert not ran.exists()


def test_runs_write_no_pickle(runs: Path) -> None:
    found = [path for path in runs.rglob("*") if path.is_file()]
    assert len(found) > 30
    for path in found:
        start = path.read_bytes()[:2]
        assert start not in (b"PK", b"\x93N") and not start.startswith(b"\x80"), path
    endings = {path.suffix for path in found if "tfevents" not in path.name}
    assert endings <= {".safetensors", ".json", ".jsonl", ".yaml", ".md", ""}, endings


# names ------------------------------------------------------------------------------------------


def test_manifests_cannot_name_files_outside(runs: Path, tmp_path: Path) -> None:
    artifact, outside = tmp_path / "artifact", tmp_path / "outside.json"
    shutil.copytree(runs / "hashtag" / "artifact", artifact)
    outside.write_text("{}")
    manifest = json.loads((artifact / "manifest.json").read_text())
    digest = hashlib.sha256(b"{}").hexdigest()
    names = ["../outside.json", str(outside), "a/../../outside.json", "lineage/../../outside.json"]
    names += ["", "."]
    for name in names:
        forged = {**manifest, "files": {**manifest["files"], name: digest}}
        (artifact / "manifest.json").write_text(json.dumps(forged))
        for use in (open_artifact, lineage):
            with pytest.raises(ArtifactError, match="names a file outside its folder"):
                use(artifact)
            with pytest.raises(ArtifactError, match="names a file outside its folder"):
                use(f"file://{artifact}")
    forged = {**manifest, "files": {**manifest["files"], "link.json": digest}}
    (artifact / "manifest.json").write_text(json.dumps(forged))
    (artifact / "link.json").symlink_to(outside)
    with pytest.raises(ArtifactError, match=r"names a file outside of it: link\.json"):
        open_artifact(artifact)
    for damaged in (
        [],
        {"schema": 1},
        {**manifest, "files": []},
        {**manifest, "parents": {"vision": {}}},
    ):
        (artifact / "manifest.json").write_text(json.dumps(damaged))
        with pytest.raises(ArtifactError, match=r"manifest\.json"):
            lineage(artifact)


def test_weights_cannot_be_named_outside_an_llms_folder(demo: Path, tmp_path: Path) -> None:
    shutil.copy(demo / "llm" / "model.safetensors", tmp_path / "outside.safetensors")
    names = {"weight_map": {"embed_tokens.weight": "../outside.safetensors"}}
    index: dict[str, bytes | None] = {
        "model.safetensors": None,
        "model.safetensors.index.json": json.dumps(names).encode(),
    }
    with pytest.raises(ConfigError, match=r"names a file outside its folder: \.\./outside"):
        llm(demo, tmp_path / "llm", index)()


def test_a_urls_manifest_cannot_name_shards_outside(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "in").mkdir(parents=True)
    write_tar(folder / "0.tar", {"0.jpg": jpeg()})
    write_tar(folder / "in" / "0.tar", {"0.jpg": jpeg()})
    assert xray("data", "index", folder).exit_code == 0
    table, facts = columns.open_columns(folder / "shards.manifest")
    table["names"], table["name_ends"] = columns.pack_texts(["../0.tar"])
    columns.save_columns(folder / "in" / "shards.manifest", table, facts)
    with pytest.raises(DataError, match=r"shards\.manifest names shards outside its folder"):
        open_source("photos", f"file://{folder}/in", "image")


def test_archives_write_nothing_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    outside, folder = tmp_path / "outside", tmp_path / "in" / "photos"
    outside.mkdir()
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "in")  # where reports go
    (outside / "kept.txt").write_text("as it was")
    paths = ["../../outside/a", str(folder / "../../outside/b"), str(outside / "c"), "../d", "e"]
    with tarfile.open(folder / "0.tar", "w") as archive:
        for path in paths:
            for ending, content in (("jpg", jpeg()), ("txt", b"words")):
                member = tarfile.TarInfo()
                member.name, member.size = f"{path}.{ending}", len(content)
                archive.addfile(member, io.BytesIO(content))
        for kind, name in ((tarfile.SYMTYPE, "link.txt"), (tarfile.LNKTYPE, "hard.txt")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(outside / "kept.txt")
            archive.addfile(member)
    (tmp_path / "metadata.txt").write_text("words\n")
    listed = tmp_path / "in" / "list.csv"
    (tmp_path / "in" / "up.jpg").write_bytes(jpeg())
    listed.write_text("file,caption,key\nphotos/../up.jpg,words,../../outside/f\n")
    before = tree(outside)
    for command in (
        ["data", "index", folder],
        ["data", "check", folder],
        ["data", "pack", listed, tmp_path / "in" / "packed"],
    ):
        done = xray(*command)
        assert done.exit_code in (0, 1), done.output
    with tarfile.open(tmp_path / "in" / "packed" / "00000.tar") as archive:
        assert all("/" not in name for name in archive.getnames())
    metadata = f"metadata={tmp_path / 'metadata.txt'}"  # what is made of it asks nobody to, either
    done = xray("data", "curate", folder, metadata, "t=9", "--out", tmp_path / "in" / "curated")
    assert done.exit_code == 2 and "would be unpacked outside of any folder" in done.stderr
    assert tree(outside) == before
    known = {"in", "outside", "cache", "metadata.txt"}
    assert {path.name for path in tmp_path.iterdir()} <= known


def tree(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in folder.rglob("*") if path.is_file()}


# the source -------------------------------------------------------------------------------------

# Results go from Ray's workers to the process that started them.
MAY_PICKLE = {"data_pipelines/curation/ray_engine.py"}
LOADERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {
    ("torch", "load"), ("torch.jit", "load"), ("pd", "read_pickle"),
    ("np", "load"), ("numpy", "load"), ("yaml", "load"), ("yaml", "unsafe_load"),
    ("os", "system"), ("os", "popen"), ("shutil", "unpack_archive"),
}  # fmt: skip


def test_nothing_loads_pickles_or_runs_text() -> None:
    for path in [path for folder in PACKAGES for path in files(folder)]:
        own = str(path.relative_to(ROOT))
        if own not in MAY_PICKLE:
            assert not LOADERS & {module.split(".")[0] for module in imports(path)}, own
        for node in ast.walk(ast.parse(path.read_text())):
            if not harmless(node, own):
                raise AssertionError(f"{own}: {ast.unparse(node)}")


def harmless(node: ast.AST, own: str) -> bool:
    """Whether a piece of a file's source calls on nothing that runs what it reads."""
    if isinstance(node, ast.keyword):
        allows = isinstance(node.value, ast.Constant) and node.value.value is True
        risky = node.arg in ("allow_pickle", "trust_remote_code", "shell")
        return not (risky and allows) and (node.arg != "weights_only" or allows)
    if isinstance(node, ast.Constant):  # in a dict of arguments
        return node.value != "trust_remote_code" or own == "xray/models/llm_folder.py"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id not in CALLS
    if isinstance(node, ast.Attribute):
        if node.attr in ("add_safe_globals", "extract", "extractall"):
            return False
        named = node.attr in {name for _, name in METHODS}
        return not named or (ast.unparse(node.value), node.attr) not in METHODS
    return True


@pytest.mark.parametrize(
    "line",
    ["eval('1')", "torch.load('x')", "np.load('x')", "f(x, allow_pickle=True)", "os.system('x')",
     "f(weights_only=False)", "f(trust_remote_code=True)", "f(**{'trust_remote_code': True})",
     "torch.serialization.add_safe_globals([x])", "archive.extractall('x')", "yaml.load(x)"],
)  # fmt: skip
def test_such_lines_would_be_found(line: str) -> None:
    assert not all(harmless(node, "xray/some.py") for node in ast.walk(ast.parse(line)))
