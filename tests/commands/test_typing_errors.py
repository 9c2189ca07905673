"""Mistakes in what is typed: named before torch is imported, with the nearest name that exists."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from xray.commands.common import _concealed, check_folder, split_settings
from xray.config import ModelConfig
from xray.errors import ConfigError

SUPPORT = Path(__file__).resolve().parents[1] / "support"
# (command, part of the error), run in a folder with a picture, runs/small and x.npy.
SMALL = "data.root=. text.llm=x"
WRONG = (
    ("trian mae", "Did you mean 'train'?"),
    ("data chek .", "Did you mean 'check'?"),
    ("run smal", "did you mean 'small'?"),
    ("run smal.yaml", "did you mean 'small'?"),
    ("run small", "data.root is not set: give data.root=..."),
    ("run small data.rot=x", "unknown key 'data.rot'; did you mean 'data.root'?"),
    ("run .", ". is a folder, not a recipe: xray init mine.yaml . writes a recipe"),
    (f"run small {SMALL} clip.trian.samples=3", "did you mean 'clip.train'?"),
    (f"run small {SMALL} optim.lr=3", "did you mean 'optim.base_lr' or 'optim.min_lr' or"),
    (f"run small {SMALL} crop_scale=3", "did you mean 'data.crop_scale'?"),
    (f"run small {SMALL} clip.base_lr=3", "did you mean 'clip.optim.base_lr'?"),
    (f"run small {SMALL} data.blocks=64", "give a list, such as [{KEY: VALUE}], not 64"),
    (f"run small {SMALL} eval.retrival.shards=x", "did you mean 'eval.retrieval'?"),
    (f"run small {SMALL} clip.embed_dmi=3", "did you mean 'clip.embed_dim'?"),
    (f"run small {SMALL} clip.mask_ratio=2", "clip.mask_ratio=2.0 must be in [0, 1)"),
    (f"run small {SMALL} hashtag.loss=softmx", "did you mean 'softmax'?"),
    (f"run small {SMALL} stages=[mea]", "did you mean 'mae'?"),
    (f"run small {SMALL} model=vit_b_16", "did you mean 'vit_b16'?"),
    (f"run small {SMALL} model.reduce=evt", "did you mean 'evit'?"),
    ("train mea", "did you mean 'mae'?"),
    ("train mae data.rot=x", "did you mean 'data.root'?"),
    ("train mae --recipe smal", "did you mean 'small'?"),
    ("train mae base_lr=1", "did you mean 'optim.base_lr'?"),
    ("train mae quickstart", "quickstart is a recipe: give it as --recipe quickstart"),
    ("train mae model=vit_b_16", "did you mean 'vit_b16'?"),
    ("train mae nowhere.yaml", "config file nowhere.yaml does not exist"),
    ("init mine.txt .", "must end in .yaml"),
    ("init mine.yaml phto.jpg", "did you mean 'photo.jpg'?"),
    ("init mine.yaml . --gpu h10", "did you mean 'h100'?"),
    ("plan smal", "did you mean 'small'?"),
    ("plan clip --gpu h10", "did you mean 'h100'?"),
    ("config smal", "did you mean 'small'?"),
    ("config eval eval.knn.trin=x", "did you mean 'eval.knn.train'?"),
    ("ablate stags", "did you mean 'stages'?"),
    ("ablate stages base=smal", "did you mean 'small'?"),
    ("ablate stages base=quickstart metrics=[retrival.x]", "did you mean 'retrieval'?"),
    ("eval runs/smal", "did you mean 'runs/small'?"),
    ("eval runs/small", "give one of those inside: runs/small/clip, runs/small/mae"),
    ("eval runs/small/text", "its run has not finished"),
    ("eval runs/small/clip eval.knn.trin=x", "did you mean 'eval.knn.train'?"),
    ("eval runs/small/clip --suite kn", "did you mean 'knn'?"),
    ("eval runs/small/clip --recipe smal", "did you mean 'small'?"),
    ("eval runs/small/clip --keep-rates 2", "each must be in (0, 1]"),
    ("show runs/smal photo.jpg", "did you mean 'runs/small'?"),
    ("lineage runs/smal", "did you mean 'runs/small'?"),
    ("export runs/small/clip --to tim", "did you mean 'timm'?"),
    ("export runs/small --to timm", "give one of those inside: runs/small/clip, runs/small/mae"),
    ("export runs/small", "give one of those inside: runs/small/text"),
    ("export runs/smal", "did you mean 'runs/small'?"),
    ("eval ~no_such_user/clip", "~no_such_user/clip is not an artifact: there is no such folder"),
    ("merge runs/small/clip runs/smal --alpha .5", "did you mean 'runs/small'?"),
    ("merge runs/small/clip runs/small/mae --alpha 2", "give 1 to 1,001 numbers from 0 to 1"),
    ("merge runs/small/clip runs/small/mae --soup all", "--soup all: use uniform or greedy"),
    ("merge runs/small/clip runs/small/mae --alpha 1 --suite kn", "did you mean 'knn'?"),
    ("embed runs/smal photo.jpg --out x.npy", "did you mean 'runs/small'?"),
    ("embed runs/small photo.jpg --out x.np", "must end in .parquet or .npy"),
    ("embed runs/small photo.jpg --out y.npy --dtype fp8", "--dtype fp8: use fp32"),
    ("search y.npy dog", "y.npy does not exist; did you mean 'x.npy'?"),
    ("report runs/smal", "did you mean 'runs/small'?"),
    ("debug replay runs/smal", "did you mean 'runs/small'?"),
    ("data demo d phots=3", "did you mean 'photos'?"),
    ("data pack phto.jpg out", "did you mean 'photo.jpg'?"),
    ("data pack . out short_sid=3", "did you mean 'short_side'?"),
    ("data split phto.jpg out", "did you mean 'photo.jpg'?"),
    ("data check phto.jpg", "did you mean 'photo.jpg'?"),
    ("data stats phto.jpg", "did you mean 'photo.jpg'?"),
    ("data index phto.jpg", "did you mean 'photo.jpg'?"),
    ("data tags phto.jpg", "did you mean 'photo.jpg'?"),
    ("data curate phto.jpg", "did you mean 'photo.jpg'?"),
    ("data curate . dedup.perceptul=1", "did you mean 'dedup.perceptual'?"),
    ("data metadata phto.jpg", "did you mean 'photo.jpg'?"),
    ("data scores runs/smal .", "did you mean 'runs/small'?"),
    ("data scores runs/small/clip . btch_size=3", "did you mean 'batch_size'?"),
    ("data embeddings runs/smal .", "did you mean 'runs/small'?"),
    ("data pseudo-tags runs/smal .", "did you mean 'runs/small'?"),
    ("data text-features . llm=x --init-from runs/smal", "did you mean 'runs/small'?"),
    ("data text-features .", "no LLM is named"),
)


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and stderr of each command of WRONG, without the heavy libraries."""
    folder = tmp_path_factory.mktemp("typed")
    for stage in ("clip", "mae"):
        artifact = folder / "runs" / "small" / stage / "artifact"
        artifact.mkdir(parents=True)
        sections = {name: {} for name in ("config", "inputs", "parents", "tensors", "files")}
        (artifact / "manifest.json").write_text(json.dumps({"schema": 1, **sections}))
    (folder / "runs" / "small" / "text").mkdir()
    (folder / "runs" / "small" / "text" / "config.yaml").write_text("stage: text\n")
    for name in ("photo.jpg", "x.npy"):
        (folder / name).write_bytes(b"")
    commands = json.dumps([command.split() for command, _ in WRONG])
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "without_torch.py"), commands],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = map(tuple, json.loads(done.stdout))
    return dict(zip((command for command, _ in WRONG), results, strict=True))


@pytest.mark.parametrize(("command", "message"), WRONG)
def test_a_wrong_word_is_named_before_torch_is_imported(
    errors: dict[str, tuple[int, str]], command: str, message: str
) -> None:
    code, text = errors[command]
    assert code == 2 and message in text, text
    assert text.startswith("Usage:") or len(text.splitlines()) == 1, text


def test_a_wrong_name_of_a_timm_model_has_a_hint() -> None:
    from xray.models.timm_vit import create_timm

    with pytest.raises(ConfigError, match="not a model of timm; did you mean 'vit_base_patch16_22"):
        create_timm(ModelConfig("vit_bse_patch16_224"), (224, 224))


def test_settings_are_told_from_data_by_their_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr-0.1=b" / "artifact").mkdir(parents=True)
    data = [
        "photos",
        "/a=b",
        "./a=b",
        "lr-0.1=b",
        "lr-0.1=b/artifact",
        "s3://bucket/a=b/{0..9}.tar",
    ]
    given = ["captions.llava15=1", "eval.tags.set2.shards=/x", "a.b-c.imagenet-v2=s3://u:p@b/v2"]
    assert split_settings([*data, *given]) == (data, given)
    assert _concealed(given[-1]) == given[-1]  # hidden when it is read
    with pytest.raises(ConfigError, match="is a setting: name the folder"):
        check_folder("captions.llava15=1")
    check_folder("lr-0.1=b")
