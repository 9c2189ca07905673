"""Export of the image tower as an ONNX graph with fixed keep rate and size, and any batch size."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipelines.decode.preparation import resized_side
from xray.artifacts.artifact import Artifact
from xray.artifacts.encoders import ImageEncoder, Tagger, VisionEncoder
from xray.artifacts.manifest_config import data_config, image_side
from xray.errors import ConfigError, brief
from xray.exports.common import Export, difference, sample_images, save_json, vision_of
from xray.models.token_reduction import KeepRate

OPSET = 18
FILE = "model.onnx"
CROPS = {  # by data.resize
    "shortest": "the centre, after the short side is resized",
    "squash": "the centre, after both sides are resized",
}


class ImageTower(nn.Module):
    """Image tower as one graph, from normalised float pixels to named outputs."""

    def __init__(self, encoder: VisionEncoder, keep_rate: KeepRate, clips: bool) -> None:
        super().__init__()
        self.vision, self.keep_rate, self.clips = encoder.vision, keep_rate, clips
        self.outputs, self.projection, self.head = ["features"], None, None
        if isinstance(encoder, ImageEncoder):
            self.outputs.append("embedding")
            self.projection = encoder.vision_projection
        if isinstance(encoder, Tagger):
            self.outputs.append("probabilities")
            self.head, self.activate = encoder.head, encoder.loss.activate

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Encode [B, 3, S, S] or [B, T, 3, S, S] to [B, D], and joint [B, E] or tags [B, V]."""
        cls = self.vision(pixels if self.clips else pixels[:, None], self.keep_rate).cls
        outputs = [F.normalize(cls, dim=-1)]
        if self.projection is not None:
            outputs.append(F.normalize(self.projection(cls), dim=-1))
        if self.head is not None:
            outputs.append(self.activate(self.head(cls)))
        return tuple(outputs)


def to_onnx(artifact: Artifact, out: Path, keep_rate: KeepRate | None, frames: int) -> Export:
    """Write model.onnx and config.json. frames: 1 for images, else frames per clip.

    Raises ConfigError for an impossible keep rate, and if onnx is not installed.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise ConfigError("--to onnx needs pip install 'xray-trainer[onnx]'") from error
    encoder, side = vision_of(artifact, "onnx"), image_side(artifact)
    if keep_rate is not None:
        encoder.choose(keep_rate)
    rate, reduction = encoder.keep_rate, encoder.vision.reduction
    if reduction in ("tome", "random") and encoder.vision.rates(rate):
        raise ConfigError(
            f"--to onnx has no graph for model.reduce={reduction}, only for evit: give "
            "--keep-rate 1 for all tokens"
        )
    tower = ImageTower(encoder, rate, frames > 1).eval()
    pixels = sample_images(side, frames)
    given = encoder.normalize(pixels) if frames > 1 else encoder.normalize(pixels)[:, 0]
    _write(tower, given, out / FILE)
    save_json(out / "config.json", _config(artifact, tower, side, frames))

    session = onnxruntime.InferenceSession(out / FILE, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = tower(given)
    differences: dict[str, float] = {}
    for count in (len(given), 1):  # the batch size is dynamic
        outputs = session.run(None, {"pixels": given[:count].numpy()})
        for name, theirs, mine in zip(tower.outputs, outputs, expected, strict=True):
            gap = (torch.from_numpy(theirs) - mine[:count]).abs().max().item()
            differences[name] = max(gap, differences.get(name, 0.0))
    # the traced module is also compared with the encoder that evaluation uses
    differences["features"] = max(
        differences["features"], difference(expected[0], encoder.features(pixels))
    )
    shape = f"[N, {'3' if frames == 1 else f'{frames}, 3'}, {side}, {side}]"
    code = [
        "import onnxruntime",
        "",
        'session = onnxruntime.InferenceSession("FOLDER/model.onnx")',
        f"# pixels: {shape} float32, (RGB / 255 - mean) / std by config.json",
        f'{", ".join(tower.outputs)} = session.run(None, {{"pixels": pixels}})'.replace(
            "features =", "(features,) ="
        ),
    ]
    note = f"The keep rate is {rate}: another takes another export (`--keep-rate`)."
    return Export("onnx", code, differences, [note])


def _write(tower: ImageTower, pixels: Tensor, path: Path) -> None:
    """Trace and save the graph, without the exporter's own output and warnings."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                tower,
                (pixels,),
                path,
                dynamo=True,
                opset_version=OPSET,
                input_names=["pixels"],
                output_names=tower.outputs,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter has its own exception types
        raise ConfigError(f"torch cannot write this model as ONNX: {brief(error)}") from error
    finally:
        logging.disable(logging.NOTSET)


def _config(artifact: Artifact, tower: ImageTower, side: int, frames: int) -> dict[str, Any]:
    data = data_config(artifact)
    mean, std = data.normalisation
    return {
        "input": {"name": "pixels", "side": side, "frames": frames, "dtype": "float32"},
        "outputs": tower.outputs,
        "mean": mean,
        "std": std,
        "interpolation": data.interpolation,
        "resize": data.resize if data.resizes_first else "crop",
        "crop_pct": data.crop_pct,
        "crop": CROPS.get(data.resize, "the largest centred square"),
        # before the crop: the short side, or both; the crop is resized if the picture is not
        "resized_side": resized_side(data, side) if data.resizes_first else None,
        "keep_rate": tower.keep_rate,
    }
