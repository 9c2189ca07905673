"""The hashtag stage as users run it: vocabulary, teacher, losses, evaluation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from in_process import invoke
from shards import jpeg, write_tar
from tiny import settings, train

from data_pipelines.decode.transforms import load_pixels, load_views
from data_pipelines.ingest.user_data import open_sources
from data_pipelines.shards.sidecar import Sidecar, open_sidecar
from data_pipelines.shards.source import Source, open_source
from data_pipelines.tags.labels import teacher_sidecar
from stages import stage_class
from stages.base import Parents
from stages.hashtag import HashtagModule, HashtagStage
from xray.artifacts.artifact import open_artifact
from xray.config import DataConfig
from xray.errors import ArtifactError, ConfigError
from xray.losses.tags import BinaryLoss, SoftmaxLoss
from xray.training.step_data import check_batches

SHORT = ("train.samples=36", "data.modalities=[image]", "train.save_every=0")


def run(*command: object) -> str:
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def teacher(trained: Callable[..., Path]) -> Path:
    """A hashtag artifact trained on the demo's photos with balanced tags."""
    return trained("hashtag", *SHORT, "hashtag.balance=sqrt", "hashtag.epoch_length=2")


def test_rare_tags_are_repeated(demo: Path, tmp_path: Path) -> None:
    config = settings("hashtag", demo, tmp_path, *SHORT, "hashtag.balance=sqrt")
    config.hashtag.epoch_length = 2.0
    stage = stage_class("hashtag")(config)
    source = open_source("photos", "photos", "image", str(demo))
    prepared = stage.prepare({"photos": source}, Parents())["photos"]
    assert len(prepared) == pytest.approx(2 * len(source), rel=0.1)
    assert prepared.digest != source.digest
    sample = replace(prepared.sample(0, 3, 32, 1), copy=1)
    batch = stage.collate([stage.transform(sample, None)] * 2)
    assert batch["tags"].shape == batch["weights"].shape and (batch["weights"] == 1).all()
    whole = stage.balanced["photos"].labels_of(0, 3, 0, strip=True)[0]
    assert set(batch["tags"][0].tolist()) <= set(whole.tolist())


@pytest.mark.parametrize(
    "options",
    [
        ("hashtag.loss=bce",),
        ("hashtag.loss=asymmetric", "hashtag.chunk=7"),
        ("hashtag.sampled=6", "hashtag.mixup=0.4"),
        ("hashtag.chunk=5", "hashtag.smoothing=0.1", "hashtag.cutmix=1"),
        ("hashtag.truncate=0.3", "hashtag.truncate_after=0.5"),
    ],
)
def test_all_losses_train(demo: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    artifact = train("hashtag", demo, tmp_path, *SHORT, *options)
    assert np.isfinite(artifact.manifest["metrics"]["loss"])
    top = "photos/top1_is_a_tag" in artifact.manifest["metrics"]
    assert top == ("hashtag.sampled=6" not in options)


def test_chunks_change_neither_loss_nor_gradient(demo: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = HashtagModule(settings("hashtag", demo, tmp_path, "hashtag.chunk=4"), [5] * 11)
    pixels = torch.randint(0, 256, (3, 1, 3, 32, 32), dtype=torch.uint8)
    tags = torch.tensor([[0, 4, -1], [10, -1, -1], [1, 2, 3]])
    batch = {"pixels": pixels, "tags": tags, "weights": (tags >= 0).float()}
    losses = []
    for chunk in (4, 0):
        module.loss = SoftmaxLoss(0.0, chunk)
        output = module(batch, 1.0)
        (grad,) = torch.autograd.grad(output.loss, module.head.weight)
        losses.append((output.loss, grad, output.metrics["excess"]))
    for one, other in zip(*losses, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert losses[0][2] > 0


def test_truncation_drops_doubtful_samples_not_those_with_many_tags(
    demo: Path, tmp_path: Path
) -> None:
    options = "hashtag.truncate=0.5", "hashtag.truncate_after=0"
    module = HashtagModule(settings("hashtag", demo, tmp_path, *options), [5] * 11).train()
    p = torch.tensor([0.28, 0.24, 0.24, 0.24, *[1e-6] * 7])
    with torch.no_grad():
        module.head.weight.zero_()
        module.head.bias.copy_(p.log())
    tags = torch.tensor([[0, 1, 2, 3], [0, -1, -1, -1]])
    features = {
        "cls": torch.zeros(2, module.vision.embed_dim),
        "tags": tags,
        "targets": module.loss.targets((tags >= 0).float()),
        "progress": torch.tensor(0.5),
    }
    many, one = -p[:4].log().mean(), -p[0].log()
    assert many > one and module.loss_from_features(features).loss.item() == pytest.approx(
        float(many), abs=1e-4
    )


@pytest.mark.parametrize("views", [1, 2])
def test_a_sample_is_mixed_with_another_one(demo: Path, tmp_path: Path, views: int) -> None:
    options = "hashtag.mixup=0.5", f"data.views={views}"
    module = HashtagModule(settings("hashtag", demo, tmp_path, *options), [5] * 4).train()
    seen: list[torch.Tensor] = []
    module.encode = lambda x, _: seen.append(x) or SimpleNamespace(cls=x)  # type: ignore[assignment,method-assign,func-returns-value]
    tags = torch.arange(4).repeat_interleave(views)[:, None]
    pixels = (50 * tags).to(torch.uint8).expand(-1, 3 * 32 * 32).reshape(-1, 1, 3, 32, 32)
    batch = {"pixels": pixels, "tags": tags, "weights": torch.ones(len(tags), 1)}
    features = module.features(batch, 1.0)
    own, other = features["tags"].unbind(1)
    assert torch.equal(own, tags[:, 0]) and torch.equal(other, (own - 1) % 4)
    share = features["targets"][:, :1]
    plain = module.normalize(pixels).flatten(1)
    mixed = share * plain + (1 - share) * plain.roll(views, 0)
    torch.testing.assert_close(seen[0].flatten(1), mixed)


def test_options_without_effect_in_micro_batches_of_a_sample_are_named(
    demo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = "hashtag.cutmix=1", "hashtag.truncate=0.1", "data.views=2"

    def warnings(schedule: str) -> list[str]:
        caplog.clear()
        more = f"train.micro_batch={schedule}", "data.modalities=[image]"
        config = settings("hashtag", demo, tmp_path, *options, *more)
        check_batches(HashtagStage(config), config)
        return [record.getMessage() for record in caplog.records]

    one, two = warnings("[[0.0, 4], [0.5, 2], [0.7, 1]]")
    assert one.startswith("hashtag.cutmix=1, hashtag.truncate=0.1: no effect on source photos in m")
    assert "micro-batches of 1" in one and "train.micro_batch" in one
    assert two.startswith("hashtag.cutmix=1: no effect") and "micro-batches of 2" in two
    assert warnings("4") == []


@pytest.mark.parametrize("loss", ["softmax", "bce"])
@pytest.mark.parametrize("balance", ["none", "sqrt"])
def test_a_head_starts_from_the_tag_frequencies_of_the_drawn_samples(
    demo: Path, tmp_path: Path, loss: str, balance: str
) -> None:
    """Frequencies are counted over the slots of an epoch, as the loader reads them."""
    options = f"hashtag.loss={loss}", f"hashtag.balance={balance}", "hashtag.epoch_length=3"
    config = settings("hashtag", demo, tmp_path, *options)
    names = [block.source for block in config.blocks]
    stage = HashtagStage(config)
    sources = stage.prepare(open_sources(config.data, names), Parents())
    V = len(stage.vocabulary)
    frequency = torch.zeros(V)
    for block in config.blocks:
        seen = torch.zeros(V)
        source, own = sources[block.source], stage.balanced[block.source]
        for shard, slots in enumerate(source.counts.tolist()):
            for slot in range(slots):
                sample = source.sample(shard, source.member(shard, slot), 32, 1, slot)
                ids, _ = own.labels_of(shard, sample.member, sample.copy, strip=True)
                seen[torch.tensor(ids)] += 1
        frequency += seen / own.slots * block.samples / config.global_batch
    head = stage.build(Parents()).head
    logits = head(torch.zeros(1, head.in_features))[0]
    likely = logits.softmax(dim=0) if loss == "softmax" else logits.sigmoid()
    wanted = frequency / frequency.sum() if loss == "softmax" else frequency
    assert torch.allclose(likely, wanted, atol=0.15 * float(wanted.max()))  # repeats are random


def test_softmax_targets_sum_to_at_most_1() -> None:
    weights = torch.tensor([[1.0, 1, 0], [0.2, 0.1, 0.0], [1, 0.5, 0.5]])
    expected = torch.tensor([[0.5, 0.5, 0], [0.2, 0.1, 0.0], [0.5, 0.25, 0.25]])
    assert torch.allclose(SoftmaxLoss().targets(weights), expected)
    assert torch.equal(BinaryLoss().targets(weights), weights)


def untagged(folder: Path, demo: Path) -> Path:
    """Copy the demo's first shard; remove every second sample's tags and break one photo."""
    source, files = open_source("photos", "photos", "image", str(demo)), {}
    for member in range(12):
        stored = source.read(0, member)
        content = json.loads(stored["json"])
        if member % 2:
            del content["hashtags"]
        files[f"{member:03d}.jpg"] = b"junk" if member == 4 else stored["jpg"]
        files[f"{member:03d}.json"] = json.dumps(content).encode()
    folder.mkdir()
    write_tar(folder / "0.tar", files)
    return folder


def teacher_name(output: str) -> str:
    """Read the sidecar's name from the output of pseudo-tags."""
    match = re.search(r"hashtag\.teacher=(\S+)", output)
    assert match is not None
    return match[1]


def tables_of(name: str, source: Source) -> Sidecar:
    sidecar = open_sidecar(source, teacher_sidecar(name, source, "hashtags", "hashtags", {}))
    assert sidecar is not None
    return sidecar


def test_the_stage_learns_from_a_teachers_pseudo_tags(
    demo: Path, teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="xray")
    folder = untagged(tmp_path / "mine", demo)
    command = ("data", "pseudo-tags", teacher, folder, "threshold=0.0", "top=2", "workers=0")
    output = run(*command)
    assert "6 of 6 untagged samples got tags" in output and "undecodable image: 1" in output
    name = teacher_name(output)
    source = open_source("mine", str(folder), "image")
    sidecar = tables_of(name, source)
    assert sidecar.facts["teacher"] == open_artifact(teacher).digest
    table = sidecar.table(0)
    rows = np.split(np.arange(len(table["ids"])), table["ends"][:-1])
    assert len(rows[4]) == 0
    for member, row in enumerate(rows):
        if member != 4:
            assert table["chosen"][row].sum() == 2
            assert 0 < table["scores"][row].sum() <= 1 + 1e-5
    # a second run does nothing and prints the same name
    assert teacher_name(run(*command)) == name
    again = tables_of(name, source)
    assert again.digest == sidecar.digest
    # other settings give another sidecar
    other = open_sidecar(
        source,
        teacher_sidecar(teacher_name(run(*command, "top=1")), source, "hashtags", "hashtags", {}),
    )
    assert other is not None and other.table(0)["chosen"].sum() == 11
    assert tables_of(name, source).digest == sidecar.digest

    config = (
        *SHORT, f"data.sources.photos.shards={folder}", f"hashtag.teacher={name}",
        f"hashtag.vocabulary={teacher}/vocabulary.json", "data.max_bad_fraction=0.5",
    )  # fmt: skip
    stage = stage_class("hashtag")(settings("hashtag", demo, tmp_path / "run", *config))
    prepared = stage.prepare({"photos": open_source("photos", str(folder), "image")}, Parents())
    weights = [
        stage.transform(prepared["photos"].sample(0, m, 32, 1), None)["weights"] for m in (0, 1)
    ]
    assert (weights[0] == 1).all() and (weights[1] < 0.5).all() and len(weights[1]) == 2
    manifest = train("hashtag", demo, tmp_path / "run", *config).manifest
    assert manifest["samples"] == 32
    assert manifest["inputs"]["teacher"] == open_artifact(teacher).digest

    other_tags = "data.sources.photos.tags=caption_words"
    with pytest.raises(ConfigError, match=r"has no pseudo-tags for .* with tags=caption_words"):
        train("hashtag", demo, tmp_path / "judged", *config, other_tags)
    assert teacher_name(run(*command, "tags=caption_words")) == name
    train("hashtag", demo, tmp_path / "judged", *config, other_tags)
    assert (
        "photos: 6 of 12 samples have tags of the vocabulary; the teacher dropped 0.0%"
        in caplog.text
    )
    assert "gave tags to 6 samples without" in caplog.text
    with pytest.raises(ArtifactError, match=r"hashtag.teacher=\S+ is of another vocabulary"):
        train("hashtag", demo, tmp_path / "other", *config[:-2], "hashtag.min_count=1")
    with pytest.raises(ConfigError, match="has no pseudo-tags for the shards"):
        train("hashtag", demo, tmp_path / "none", *config, "hashtag.teacher=nobody")


def test_the_tags_command_and_the_tags_evaluation(
    demo: Path, teacher: Path, tmp_path: Path
) -> None:
    out = tmp_path / "v" / "tags.json"
    text = run("data", "tags", demo / "photos", demo / "clips", "min_count=2", "--out", out)
    assert "in the vocabulary" in text and out.with_suffix(".html").stat().st_size > 10_000
    text = run("eval", teacher, f"eval.tags.heldout.shards={demo}/heldout", "--suite", "tags",
               "--out", tmp_path / "r.json")  # fmt: skip
    assert "heldout precision@1" in text and "heldout mAP" in text
    results = json.loads((tmp_path / "r.json").read_text())["tags"]
    assert results["heldout/samples"] == 24 and 0 <= results["heldout/ece"] <= 1
    result = invoke("data", "pseudo-tags", str(teacher), "threshold=2")
    assert result.exit_code == 2


def test_views_of_images_and_clips(demo: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a.jpg": jpeg(size=(90, 30)), "b.jpg": jpeg(size=(30, 40))})
    data = DataConfig(resolution=30)
    source = open_source("s", str(tmp_path), "image")
    sample = source.sample(0, 0, 30, 1)
    views = load_views(sample, data, clips=5, crops=3)
    assert views.shape == (3, 1, 3, 30, 30)
    middle = load_pixels(sample, data, None)
    assert (views[1].int() - middle.int()).abs().max() <= 2  # decoded by another JPEG library
    clips = open_source("clips", "clips", "video", str(demo))
    clip = clips.sample(0, 0, 32, 4)
    assert load_views(clip, data, clips=2, crops=3).shape == (6, 4, 3, 32, 32)
    assert torch.equal(load_views(clip, data, 1, 1)[0], load_pixels(clip, data, None))
    early, late = load_views(clip, data, 2, 1)
    assert not torch.equal(early, late)
