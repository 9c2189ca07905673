"""Means of weights: exact at the ends, exact for LoRA, in little memory, with their lineage."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export_checks import rewritten
from in_process import invoke
from safetensors.torch import load_file
from torch import Tensor

import xray
from xray.artifacts.artifact import Artifact, open_artifact, write_artifact
from xray.artifacts.encoders import TextEncoder
from xray.artifacts.model_card import PURPOSES
from xray.artifacts.offers import JOINT
from xray.errors import ArtifactError, ConfigError
from xray.merging.artifact import write_mixture
from xray.merging.mixtures import Mixture, line, parse_alphas, soup
from xray.merging.parts import MixedPart, mixed

Trained = Callable[..., Path]
Varied = Callable[..., Artifact]


def tensors(artifact: Artifact) -> dict[str, Tensor]:
    """All weights by part and name."""
    parts = {part: artifact.load(part) for part in artifact.manifest["tensors"]}
    return {f"{part}/{name}": t for part, own in parts.items() for name, t in own.items()}


def hashes(artifact: Artifact) -> dict[str, str]:
    """Hashes of the weights' files."""
    files = artifact.manifest["files"].items()
    return {name: own for name, own in files if name.endswith(".safetensors")}


def test_both_ends_are_the_artifacts_bit_for_bit(
    base: Artifact, varied: Varied, tmp_path: Path
) -> None:
    other = varied(1)
    for mixture, end in zip(line([0, 1], 2), (base, other), strict=True):
        written = write_mixture(tmp_path / mixture.name, [base, other], mixture, {})
        assert hashes(written) == hashes(end) and len(hashes(end)) == 3
        assert written.manifest["parents"]["member " + "12"[int(mixture.name)]]
        assert len(written.manifest["parents"]) == 1


def test_a_mixture_is_the_weighted_mean(base: Artifact, varied: Varied, tmp_path: Path) -> None:
    others = [varied(1), varied(2)]
    (mixture,) = line([0.3], 3)
    assert mixture.weights == (0.7, 0.15, 0.15)
    written = write_mixture(tmp_path / "m", [base, *others], mixture, {"by": "alpha 0.3"})
    own, (a, b, c) = tensors(written), (tensors(x) for x in (base, *others))
    assert own.keys() == a.keys()
    for name, value in own.items():
        mean = 0.7 * a[name].double() + 0.15 * b[name].double() + 0.15 * c[name].double()
        assert torch.allclose(value.double(), mean, rtol=1e-6, atol=1e-7), name
    scales = [t["head/logit_scale"] for t in (a, b, c)]  # logarithms: the scales' geometric mean
    assert own["head/logit_scale"] == pytest.approx(
        0.7 * scales[0].item() + 0.15 * scales[1].item() + 0.15 * scales[2].item(), rel=1e-5
    )


def test_equal_weights_stay_equal(base: Artifact, varied: Varied, tmp_path: Path) -> None:
    """A frozen part is not changed by rounding, neither as a file nor as one tensor of a file."""
    changed = base.load("head")
    name = next(iter(changed))
    other = rewritten(
        base.path, tmp_path / "other", base.manifest["config"],
        {"head": {**changed, name: changed[name] + 1}},
    )  # fmt: skip
    written = write_mixture(tmp_path / "m", [base, other], line([0.7], 2)[0], {})
    for file in ("backbone.safetensors", "text.safetensors"):
        assert hashes(written)[file] == hashes(base)[file]
    head = written.load("head")
    assert [key for key in head if not head[key].equal(base.load("head")[key])] == [name]


def test_updates_of_lora_are_averaged_and_not_its_factors(
    trained: Trained, varied: Varied, tmp_path: Path
) -> None:
    first = open_artifact(trained("text", "train.samples=12"))
    others = [varied(seed, 0.1, first) for seed in (1, 2)]
    artifacts = [varied(3, 0.1, first), *others]
    mixture = Mixture("mine", (0.5, 0.2, 0.3))
    written = write_mixture(tmp_path / "m", artifacts, mixture, {})
    text = written.manifest["config"]["text"]
    assert (text["lora_rank"], text["lora_alpha"]) == (3 * 4, 3 * 32)
    own, parts = written.load("text"), [artifact.load("text") for artifact in artifacts]
    layers = [name for name in own if ".lora_A." in name]
    assert layers
    for a in layers:
        b = a.replace(".lora_A.", ".lora_B.")
        updates = [weights[b].double() @ weights[a].double() for weights in parts]
        mean = sum(w * update for w, update in zip(mixture.weights, updates, strict=True))
        assert torch.allclose(own[b].double() @ own[a].double(), mean, atol=1e-6)
        factors = sum(w * p[b] for w, p in zip(mixture.weights, parts, strict=True)) @ sum(
            w * p[a] for w, p in zip(mixture.weights, parts, strict=True)
        )
        assert not torch.allclose(factors.double(), mean, atol=1e-3)  # the mean of the factors
    encoder = TextEncoder.after(written)
    wanted = encoder.encode_text(["a large red circle"])
    scales = [getattr(module, "scaling", None) for module in encoder.text.modules()]
    assert {"default": 32 / 4} in scales and wanted.isfinite().all()
    assert xray.load(written.path, device="cpu").encode_text("a large red circle").equal(wanted)


def test_numbers_without_a_mean_must_be_equal() -> None:
    a, b = torch.arange(3), torch.arange(1, 4)
    assert mixed("ids", [(a, 0.5), (a.clone(), 0.5)]).equal(a)
    with pytest.raises(ArtifactError, match=r"ids holds torch\.int64, and differs"):
        mixed("ids", [(a, 0.5), (b, 0.5)])


def written_part(tensors: dict[str, Tensor], out: Path) -> Artifact:
    """Write an artifact with one part."""
    facts: dict[str, Any] = {"stage": "toy", "offers": [], "config": {}, "inputs": {}}
    write_artifact(out, {"backbone": tensors}, {}, facts, {}, lambda folder: "")
    return open_artifact(out)


def test_a_part_keeps_types_and_shapes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kinds = {"wide": torch.float64, "full": torch.float32, "half": torch.bfloat16}
    parts = [{name: torch.randn(3, 5, dtype=kind) for name, kind in kinds.items()} for _ in "ab"]
    more = {"scalar": torch.tensor(2.0), "none": torch.zeros(0, 4), "ids": torch.arange(5)}
    a, b = (written_part(part | more, tmp_path / n) for part, n in zip(parts, "ab", strict=True))
    part = MixedPart("backbone", [(a, 0.25), (b, 0.75)])
    part.save(tmp_path / "mixed.safetensors")
    own = load_file(tmp_path / "mixed.safetensors")
    for name, kind in kinds.items():
        mean = 0.25 * parts[0][name].double() + 0.75 * parts[1][name].double()
        tolerance = 1e-2 if name == "half" else 1e-6
        assert own[name].dtype == kind and torch.allclose(own[name].double(), mean, tolerance)
    assert all(own[name].equal(value) for name, value in more.items())
    # the header is that of safetensors itself: its bytes depend on names, types and shapes only
    content, usual = (tmp_path / "mixed.safetensors").read_bytes(), a.file("backbone.safetensors")
    start = 8 + int.from_bytes(content[:8], "little")
    assert usual.read_bytes()[:start] == content[:start]


def peak(kind: str) -> int:
    """The resident memory of this process in bytes; VmHWM is its highest value."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(own.split()[1]) for own in lines if own.startswith(f"{kind}:"))


def test_merging_takes_less_memory_than_one_artifact(tmp_path: Path) -> None:
    """Tensors are read, averaged and written one by one; read files count as memory, too."""
    size, count = 2**20, 24  # 96 MiB in all
    parts = [
        written_part(
            {f"{i}": torch.full((size,), float(i + j)) for i in range(count)}, tmp_path / n
        )
        for j, n in enumerate("ab")
    ]
    part = MixedPart("backbone", [(artifact, 0.5) for artifact in parts])
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    except OSError:
        pytest.skip("the highest memory of a process cannot be measured here")
    before = peak("VmRSS")
    part.save(tmp_path / "mixed")
    assert os.path.getsize(tmp_path / "mixed") > 4 * size * count
    assert peak("VmHWM") - before < 0.5 * 4 * size * count


def test_lineage_and_card_name_all_parents(base: Artifact, varied: Varied, tmp_path: Path) -> None:
    other = varied(1)
    path = tmp_path / "m" / "artifact"
    write_mixture(path, [base, other], line([0.25], 2)[0], {"by": "alpha 0.25"})
    words = "mean of its parents' weights: 0.75 of member 1, 0.25 of member 2 (alpha 0.25)"
    done = invoke("lineage", path, "--verify")
    assert done.exit_code == 0 and words in done.stdout
    for number, parent in enumerate((base, other), start=1):
        assert f"clip (member {number})  {parent.path}" in done.stdout
        assert f"manifest {parent.digest}" in done.stdout
    first, *parents = json.loads(invoke("lineage", path, "--json").stdout)
    assert first["parents"] == {"member 1": base.digest, "member 2": other.digest}
    assert first["mixture"]["weights"] == {"member 1": 0.75, "member 2": 0.25}
    assert "mixture" not in parents[0] and parents[0]["samples"] == base.manifest["samples"]
    card = (path / "README.md").read_text()
    assert words in card and "from clip (member 2)" in card and "license: apache-2.0" in card
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["samples"] == 0 and manifest["config"]["data"]["sources"] == {}
    (path / "manifest.json").write_text(
        json.dumps({**manifest, "mixture": {"weights": {"a": "b"}}})
    )
    with pytest.raises(ArtifactError, match="mixture cannot be read"):
        open_artifact(path)
    facts = {"imported": {}, "summary": "Imported from acme/clip, a model of open_clip."}
    imported = replace(base, manifest={**base.manifest, **facts})
    write_mixture(tmp_path / "n", [imported, other], line([0.25], 2)[0], {})
    card = (tmp_path / "n" / "README.md").read_text()
    assert "Imported" not in card and PURPOSES[JOINT] in card


def test_alphas_and_soups() -> None:
    assert parse_alphas("0:1:.25") == [0, 0.25, 0.5, 0.75, 1]
    assert parse_alphas("0:1:.1")[3] == 0.3 and len(parse_alphas("0:1:.1")) == 11
    assert parse_alphas("0:1:.3") == [0, 0.3, 0.6, 0.9]
    assert parse_alphas("1,.5,0,.5") == [0, 0.5, 1]
    for text in ("", "x", "0:1", "0:1:0", "1:0:.1", "-.1", "1.5", "nan", "0:1:1e-9", "0:1:nan"):
        with pytest.raises(ConfigError, match="--alpha"):
            parse_alphas(text)
    assert soup([2, 0], 3) == Mixture("1+3", (0.5, 0, 0.5)) and soup([1], 3).members == [1]
