"""The libraries that this package uses: which are there, which are too old, which crash."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "missing", "broken"]  # missing: something is slower or left out without it


@dataclass(frozen=True)
class Finding:
    """A row of the table; lacks: what does not work, or less well, and what to do."""

    what: str
    found: str
    lacks: str = ""
    state: State = "ok"


DISTRIBUTION = "xray-trainer"


@dataclass(frozen=True)
class Package:
    """A library: the name it is imported by, what needs it ("" = everything), how to get it."""

    name: str
    use: str = ""
    install: str = ""


PACKAGES = [
    *map(Package, ("torch", "torchvision", "deepspeed", "timm", "transformers", "tokenizers")),
    *map(Package, ("safetensors", "webdataset", "omegaconf", "numpy", "PIL", "av", "regex")),
    Package("decord", "clips are read by PyAV alone, small ones slower", "decord2"),
    Package("peft", "no LoRA: text.tune=full or none", "peft"),
    Package("pyarrow", "no .parquet lists, no xray data curate", "pyarrow"),
    Package("fsspec", "no shards from URLs", "'fsspec[http]'"),
    Package("ahocorasick", "no xray data curate, no tags=concepts", "pyahocorasick"),
    Package("tensorboard", "train.tensorboard=false", "tensorboard"),
    Package("matplotlib", "no report.html", "matplotlib"),
    Package("wandb", "no train.wandb", f"'{DISTRIBUTION}[wandb]'"),
    Package("onnxruntime", "no xray export --to onnx", f"'{DISTRIBUTION}[onnx]'"),
    Package("ray", "no engine=ray for xray data curate", f"'{DISTRIBUTION}[ray]'"),
    Package(
        "open_clip",
        "no open_clip model as clip.teacher, no xray export --to open_clip",
        "open_clip_torch",
    ),
]
# Imports one library after another, and says of each how that went: one may end the process.
PROBE = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        found = importlib.import_module(name)
        if found.__file__ is None:  # a folder of that name, as wandb leaves behind
            raise ModuleNotFoundError(name=name)
        result = "ok " + str(getattr(found, "__version__", ""))
    except ModuleNotFoundError as error:
        result = ("none" if error.name == name else "bad") + " " + str(error)
    except BaseException as error:
        result = f"bad {type(error).__name__}: {error}"
    print("\\n@", name, " ".join(result.split()), flush=True)
"""


def imports(packages: Sequence[Package]) -> list[Finding]:
    """Each library imported, in a process of its own: one may crash it."""
    results: dict[str, str] = {}
    while left := [p.name for p in packages if p.name not in results]:
        done = subprocess.run(
            [sys.executable, "-c", PROBE, *left], capture_output=True, text=True, errors="replace"
        )
        for line in done.stdout.splitlines():
            if line.startswith("@ "):
                _, name, result = line.split(" ", 2)
                results[name] = result
        stopped = [name for name in left if name not in results]
        if stopped:
            results[stopped[0]] = f"bad its import ends the process ({done.returncode})"
    wanted = _requirements()
    return [_library(package, results[package.name], wanted) for package in packages]


def _library(package: Package, result: str, wanted: dict[str, str]) -> Finding:
    kind, _, text = result.partition(" ")
    cure = f"pip install {package.install or package.name}"
    if kind != "ok":
        text = "not installed" if kind == "none" else text[:160]
        lacks = f"{package.use}: {cure}" if package.use else f"nothing works: {cure}"
        return Finding(package.name, text, lacks, "missing" if package.use else "broken")
    name, version = _distribution(package.name, text)
    if not _new_enough(version, wanted.get(name, "")):
        return Finding(
            package.name, version, f"{wanted[name]} is needed: {cure} --upgrade", "broken"
        )
    return Finding(package.name, f"{version} ({name})" if name != package.name else version)


def _distribution(module: str, version: str) -> tuple[str, str]:
    """(name, version) of what has installed a module; a module may say its own."""
    for name in importlib.metadata.packages_distributions().get(module, []):
        return name.lower(), importlib.metadata.version(name)
    return module, version


def _requirements() -> dict[str, str]:
    """The versions that this package asks for, by distribution; {} where it is not installed."""
    try:
        from packaging.requirements import Requirement

        found = map(Requirement, importlib.metadata.requires(DISTRIBUTION) or [])
        return {item.name.lower(): str(item.specifier) for item in found}
    except ImportError:
        return {}


def _new_enough(version: str, wanted: str) -> bool:
    if not version or not wanted:
        return True
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)
