"""Masks from patch tokens: the linear probe and patch kNN, against plain loops and scikit-learn."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from in_process import invoke
from masked import masked_picture, png, write_masked
from PIL import Image
from shards import jpeg, write_tar
from torch import Tensor

from data_pipelines.decode.masks import decode_mask, load_mask
from data_pipelines.decode.transforms import load_pixels
from data_pipelines.shards.source import Sample
from xray.artifacts.artifact import Artifact, open_artifact
from xray.artifacts.encoders import VisionEncoder
from xray.artifacts.manifest_config import data_config
from xray.config import DataConfig
from xray.config.loading import build
from xray.errors import BadSample
from xray.evaluation.confidence import mean_ratio, resamples
from xray.evaluation.config import EvalConfig
from xray.evaluation.correspondence import Memory, patch_shares
from xray.evaluation.evaluator import Evaluator
from xray.evaluation.masked_tokens import pixel_counts

if TYPE_CHECKING:
    from conftest import Trained

STEPS = 30


@pytest.fixture(scope="module")
def artifact(trained: Trained) -> Artifact:
    """A backbone that keeps .7 of its tokens, by EViT."""
    return open_artifact(trained("hashtag", "train.samples=24"))


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `train` and `test` of pictures with masks, in all three forms."""
    root = tmp_path_factory.mktemp("masked")
    write_masked(root / "train", 12)
    write_masked(root / "test", 6, seed=1)
    return root


def sample(picture: bytes, mask: bytes | None, size: int = 24) -> Sample:
    files = {"jpg": picture, **({} if mask is None else {"mask.png": mask})}
    return Sample(files, "set", "image", "a", size, 1)


def evaluator(artifact: Artifact, root: Path, **sections: Any) -> Evaluator:
    return Evaluator(VisionEncoder(artifact), build(EvalConfig, sections), str(root), 0)


# masks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(51, 33), (31, 61), (23, 23)])
@pytest.mark.parametrize("resize", ["crop", "shortest", "squash"])
def test_a_mask_is_cut_like_its_picture_with_the_nearest_pixels(
    size: tuple[int, int], resize: str
) -> None:
    data = DataConfig(resize=resize, crop_pct=0.875)  # type: ignore[arg-type]
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    image, (width, height), side = Image.fromarray(values), size, 24
    nearest = Image.Resampling.NEAREST
    if resize == "crop":
        own = round(0.875 * min(size))
        left, top = (width - own) // 2, (height - own) // 2
        cut = image.crop((left, top, left + own, top + own))
        expected = cut.resize((side, side), nearest)
    else:
        short = math.floor(side / 0.875)
        across, down = short, short
        if resize == "shortest":
            shorter = min(size)
            across, down = short * width // shorter, short * height // shorter
        left, top = round((across - side) / 2), round((down - side) / 2)
        whole = image.resize((across, down), nearest)
        expected = whole.crop((left, top, left + side, top + side))
    found = load_mask(sample(jpeg(size=size), png(values)), "mask.png", data)
    assert np.array_equal(found.numpy(), np.asarray(expected))


def test_masks_may_have_a_palette_or_many_classes_but_no_colours() -> None:
    values = np.random.default_rng(0).integers(0, 21, (8, 9), dtype=np.uint8)
    paletted = Image.fromarray(values, "P")
    paletted.putpalette([*range(255, 192, -1)])
    buffer = io.BytesIO()
    paletted.save(buffer, "PNG")
    assert np.array_equal(decode_mask(buffer.getvalue()), values)
    wide = values.astype(np.uint16) * 40
    assert np.array_equal(decode_mask(png(wide)), wide)
    with pytest.raises(BadSample, match="has the channels RGB: store one channel"):
        decode_mask(png(np.zeros((4, 4, 3), np.uint8)))


# measures ---------------------------------------------------------------------------------------


def random_masks(classes: int, pictures: int = 5, side: int = 12) -> tuple[Tensor, Tensor]:
    """Predictions and masks, some of whose pixels have no class; the last class is in neither."""
    generator = torch.Generator().manual_seed(0)
    shape = pictures, side, side
    predicted = torch.randint(0, classes - 1, shape, generator=generator)
    truth = torch.where(torch.rand(shape, generator=generator) < 0.5, predicted, 1)
    return predicted, truth.masked_fill(torch.rand(shape, generator=generator) < 0.1, -1)


def test_counts_and_the_mean_iou_are_those_of_loops_and_of_scikit_learn() -> None:
    from sklearn.metrics import jaccard_score

    classes = 5
    predicted, truth = random_masks(classes)
    counts = pixel_counts(predicted, truth, classes)
    for picture in range(len(truth)):
        own, mask = predicted[picture].flatten().tolist(), truth[picture].flatten().tolist()
        pairs = list(zip(own, mask, strict=True))
        for number in range(classes):
            expected = [
                sum(p == t == number for p, t in pairs),
                sum(p == number and t >= 0 for p, t in pairs),
                sum(t == number for p, t in pairs),
            ]
            assert counts[:, picture, number].tolist() == expected
    correct, union = counts[0], counts[1] + counts[2] - counts[0]
    measures = mean_ratio("mIoU", correct, union)
    known = truth >= 0
    ious = jaccard_score(truth[known], predicted[known], average=None, labels=range(classes - 1))
    assert measures["mIoU"] == pytest.approx(ious.mean(), abs=1e-9)
    drawn, shares = [], (correct.numpy(), union.numpy())
    for times in np.concatenate(list(resamples(len(truth)))):
        again = np.repeat(np.arange(len(truth)), times)  # the pictures of a resample
        parts, wholes = (own[again, : classes - 1].sum(axis=0) for own in shares)
        drawn.append((parts / wholes).mean())
    ends = np.percentile(drawn, [2.5, 97.5])
    assert [measures["mIoU_low"], measures["mIoU_high"]] == pytest.approx(ends.tolist(), abs=1e-9)


def test_votes_of_patches_are_those_of_scikit_learn() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(80, 6, generator=generator), dim=-1)
    labels = torch.randint(0, 3, (80,), generator=generator)
    tokens = torch.randn(2, 3, 4, 6, generator=generator)
    votes = Memory(rows, F.one_hot(labels, 3).float()).votes(tokens, 7, 0.1)
    other = KNeighborsClassifier(
        7, metric="cosine", algorithm="brute", weights=lambda distance: np.exp(-distance / 0.1)
    )
    expected = other.fit(rows, labels).predict_proba(tokens.flatten(0, 2))
    assert np.allclose(votes.permute(0, 2, 3, 1).flatten(0, 2), expected, atol=1e-6)


def test_shares_of_a_patch_are_those_of_its_pixels() -> None:
    _, masks = random_masks(4)
    shares = patch_shares(masks, (3, 4), 4)
    for picture, i, j in ((0, 0, 0), (1, 2, 1), (4, 1, 3)):
        own = masks[picture, 4 * i : 4 * i + 4, 3 * j : 3 * j + 3]
        known = own[own >= 0]
        expected = [(known == c).double().mean().item() for c in range(4)]
        assert shares[picture, i, j].tolist() == pytest.approx(expected)
    assert patch_shares(torch.full((1, 4, 4), -1), (2, 2), 3).sum() == 0


# suites -----------------------------------------------------------------------------------------


def tokens_and_masks(encoder: VisionEncoder, root: Path, data: DataConfig) -> tuple[Tensor, Tensor]:
    """Encode pictures one by one, from their files."""
    tokens, masks = [], []
    for path in sorted((root / "plain" / "images" / "part").iterdir()):
        mask = (root / "plain" / "masks" / "part" / f"{path.stem}.png").read_bytes()
        own = sample(path.read_bytes(), mask, 32)
        x = encoder.normalize(load_pixels(own, data, None)[None])
        with torch.no_grad():
            dense = encoder.vision(x, encoder.keep_rate, track=True).dense()
        tokens.append(dense.half().float().reshape(4, 4, -1))
        whole = np.asarray(Image.open(io.BytesIO(mask)))
        masks.append(torch.from_numpy(whole[:, 6:50].copy()).long())  # the square in the centre
    picked = [F.interpolate(m[None, None].float(), (32, 32), mode="nearest-exact") for m in masks]
    return torch.stack(tokens), torch.cat(picked)[:, 0].long()


def test_the_probe_is_that_of_a_plain_loop(artifact: Artifact, masked: Path) -> None:
    from sklearn.metrics import jaccard_score

    sections = {"segmentation": {"train": "train/shards", "test": "test/shards", "steps": STEPS}}
    run = evaluator(artifact, masked, **sections)
    measures = run.run(["segmentation"])["segmentation"]
    encoder, data = run.sets.vision, data_config(artifact)
    tokens, truth = tokens_and_masks(encoder, masked / "train", data)
    flat = tokens.flatten(0, 2).double()
    mean, deviation = flat.mean(0).float(), flat.std(0, unbiased=False).float() + 1e-6
    torch.manual_seed(0)
    layer = torch.nn.Linear(tokens.shape[-1], 3)
    torch.nn.init.normal_(layer.weight, std=0.01)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(0)

    def logits(x: Tensor) -> Tensor:
        maps = layer((x - mean) / deviation).permute(0, 3, 1, 2)
        return F.interpolate(maps, (32, 32), mode="bilinear", align_corners=False)

    for step in range(STEPS):
        order = torch.randperm(12, generator=generator).sort().values  # 12 pictures: one batch
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(math.pi * step / STEPS)) / 2
        optimizer.zero_grad()
        F.cross_entropy(logits(tokens[order]), truth[order], ignore_index=255).backward()
        optimizer.step()
    tokens, truth = tokens_and_masks(encoder, masked / "test", data)
    predicted, known = logits(tokens).argmax(1), truth != 255
    ious = jaccard_score(truth[known], predicted[known], average=None, labels=range(3))
    own = [measures[f"IoU/{number}"] for number in range(3)]
    assert own == pytest.approx(ious.tolist(), abs=1e-4)  # a pixel on a border may round
    assert measures["mIoU"] == pytest.approx(np.mean(own), abs=1e-12)
    hits = (predicted == truth)[known].double().mean().item()
    assert measures["pixel_accuracy"] == pytest.approx(hits, abs=1e-4)
    ground = (truth[known] == 0).double().mean().item()
    assert measures["chance_pixel_accuracy"] == pytest.approx(ground, abs=1e-12)
    assert measures["chance_mIoU"] == pytest.approx(ground / 3, abs=1e-12)
    assert (measures["pictures"], measures["classes"]) == (6, 3)


def test_patch_knn_with_one_neighbour_copies_the_nearest_patch(
    artifact: Artifact, masked: Path
) -> None:
    own = {"train": "train/list.csv", "test": "test/plain", "k": 1}
    run = evaluator(artifact, masked, correspondence=own)
    run.sets.vision.keep_rate = 1.0  # patches that share a token would be equally near
    measures = run.run(["correspondence"])["correspondence"]
    encoder, data = run.sets.vision, data_config(artifact)
    known, labels = tokens_and_masks(encoder, masked / "train", data)
    asked, truth = tokens_and_masks(encoder, masked / "test", data)
    shares = []
    for picture in labels:
        for patch in picture.reshape(4, 8, 4, 8).transpose(1, 2).reshape(16, 64):
            counts = torch.tensor([(patch == c).sum() for c in range(3)])
            shares.append(counts / counts.sum())
    cosines = (
        F.normalize(asked.flatten(0, 2), dim=-1) @ F.normalize(known.flatten(0, 2), dim=-1).t()
    )
    copied = torch.stack(shares)[cosines.argmax(1)].reshape(6, 4, 4, 3).permute(0, 3, 1, 2)
    maps = F.interpolate(copied, (32, 32), mode="bilinear", align_corners=False)
    predicted, valid = maps.argmax(1), truth != 255
    for number in range(3):
        both = (predicted == number) & (truth == number)
        either = valid & ((predicted == number) | (truth == number))
        iou = both.sum().item() / either.sum().item()
        assert measures[f"IoU/{number}"] == pytest.approx(
            iou, abs=1e-4
        )  # a pixel on a border may round


def test_shards_folders_and_lists_give_the_same_table(
    artifact: Artifact, masked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patch kNN takes the sets of the probe; a folder may be a part of the folder of pictures."""
    monkeypatch.setenv("COLUMNS", "200")
    found = []
    for form in ("shards", "plain", "plain/images/part", "list.csv"):
        settings = {"train": f"train/{form}", "test": f"test/{form}", "steps": 3}
        done = invoke(
            "eval", artifact.path, f"data.root={masked}", "data.workers=0",
            f"eval.segmentation={json.dumps(settings)}", "--out", tmp_path / "r.json",
            "--suite", "segmentation,correspondence",
        )  # fmt: skip
        assert done.exit_code == 0, done.stderr
        found.append(json.loads((tmp_path / "r.json").read_text()))
        text = " ".join(done.stdout.split())
        assert "segmentation mIoU" in text and "patch kNN pixel accuracy" in text
        assert "6 pictures, 3 classes" in text and "overlap:" not in done.stdout
    assert all(own == found[0] for own in found)
    knn = found[0]["correspondence"]
    assert knn["chance_mIoU"] < knn["mIoU_low"] <= knn["mIoU"] <= knn["mIoU_high"] <= 1


def test_keep_rates_and_methods_are_compared_on_masks(
    artifact: Artifact, masked: Path, tmp_path: Path
) -> None:
    own = '{"train": "train/plain", "test": "test/plain", "steps": 3, "batch_size": 4}'
    done = invoke(
        "eval", artifact.path, f"data.root={masked}", "data.workers=0", f"eval.segmentation={own}",
        "--keep-rates", "1,.5", "--reduce", "evit,random", "--out", tmp_path / "r.json",
    )  # fmt: skip
    assert done.exit_code == 0 and "segmentation mIoU %" in " ".join(done.stdout.split())
    found = json.loads((tmp_path / "r.json").read_text())
    rates = {method: own["0.5"]["segmentation/mIoU"] for method, own in found.items()}
    assert rates["evit"] != rates["random"]


# mistakes ---------------------------------------------------------------------------------------


def test_each_mistake_is_one_line_that_names_the_picture(
    artifact: Artifact, masked: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    picture, mask = masked_picture(rng)
    wrong = {
        "small": {"a.jpg": picture, "a.mask.png": png(mask[:20])},
        "beyond": {"a.jpg": picture, "a.mask.png": png(np.full_like(mask, 30))},
        "without": {"a.jpg": picture, "a.mask.png": png(mask), "b.jpg": picture},
        "empty": {"a.jpg": picture, "a.mask.png": png(np.full_like(mask, 255))},
        "one": {"a.jpg": picture, "a.mask.png": png(np.zeros_like(mask))},
        "colours": {"a.jpg": picture, "a.mask.png": png(np.stack([mask] * 3, 2))},
    }
    for name, files in wrong.items():
        write_tar(tmp_path / name / "0.tar", files)
    shutil.copytree(masked / "test" / "plain", tmp_path / "missing")
    (tmp_path / "missing" / "masks" / "part" / "002.png").unlink()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "a.jpg").write_bytes(picture)
    list_csv = tmp_path / "list.csv"
    list_csv.write_text("path,mask\nbare/a.jpg,bare/a.png\n")
    good = masked / "train" / "shards"
    cases = (
        ("small", {}, "sample 'a' of", "it has 56 x 20 pixels, and its picture 56 x 44"),
        ("beyond", {}, "sample 'a' of", "class 30, and eval.segmentation.train gives 3: raise"),
        ("beyond", {"classes": 9}, "eval.segmentation.classes gives 9", "segmentation.ignore"),
        ("without", {}, "eval.segmentation.test: sample 'b' of", "has no mask b.mask.png"),
        ("without", {"mask": "seg.png"}, "eval.segmentation.train: sample '000'", "000.seg.png"),
        ("empty", {}, "no pixel of its masks has a class", ""),
        ("colours", {}, "sample 'a' of", "has the channels RGB"),
        ("missing", {}, "1 of 6 pictures have no mask in", "such as part/002"),
        ("missing", {"masks": "mask"}, "there is no folder of masks", "missing/mask"),
        ("bare", {}, "nor a folder images of pictures", "eval.segmentation.masks"),
        ("list.csv", {}, "data row 1: no file", "bare/a.png"),
        ("small", {"classes": 1}, "eval.segmentation.classes=1 must be 0, or at least 2", ""),
        ("small", {"steps": 0}, "steps and batch_size must be at least 1", ""),
    )
    for name, more, *messages in cases:
        settings = {"train": str(good), "test": str(tmp_path / name), "steps": 1, **more}
        asked = f"eval.segmentation={json.dumps(settings)}"
        done = invoke("eval", artifact.path, "data.workers=0", asked)
        assert done.exit_code == 2, (name, done.output)
        assert all(message in done.stderr for message in messages), done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    own = {"train": str(tmp_path / "one"), "test": str(good)}
    knn = {"train": str(good), "test": str(good), "k": 200, "memory": 250}
    for suite, settings, message in (
        ("segmentation", own, "its masks have a single class, 0"),
        ("correspondence", {**knn, "memory": 9}, "memory at least k"),
        ("correspondence", knn, "k=200 needs that many training patches with a class, there are"),
    ):
        asked = f"eval.{suite}={json.dumps(settings)}"
        done = invoke("eval", artifact.path, "data.workers=0", asked)
        assert done.exit_code == 2 and message in done.stderr, done.output
