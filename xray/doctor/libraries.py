"""Checks of the libraries that xray uses: installed, new enough, importable."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from xray import processes

State = Literal["ok", "missing", "broken"]  # missing: xray works without it
DISTRIBUTION = "xray-trainer"


@dataclass(frozen=True)
class Finding:
    """Row of the table: a checked item and the result of the check."""

    what: str
    found: str
    lacks: str = ""  # feature that does not work, or works less well, and how to fix it
    state: State = "ok"

    @classmethod
    def of(cls, what: str, found: str, lacks: str) -> Finding:
        """Make a finding that is missing if something does not work, else ok."""
        return cls(what, found, lacks, "missing" if lacks else "ok")


@dataclass(frozen=True)
class Package:
    """Library that xray uses, by the name of its module."""

    name: str
    use: str = ""  # consequence of its absence; "" if xray does not work without it
    install: str = ""  # name to install it by; "" if it equals the module's


PACKAGES = [
    *map(Package, ("torch", "torchvision", "deepspeed", "timm", "transformers", "tokenizers")),
    *map(Package, ("safetensors", "webdataset", "omegaconf", "numpy", "PIL", "av", "regex")),
    Package("decord", "PyAV reads all clips, small ones slower", "decord2"),
    Package("peft", "no LoRA: text.tune=full or none"),
    Package("pyarrow", "no .parquet lists, no xray data curate"),
    Package("fsspec", "no shards from URLs", "'fsspec[http]'"),
    Package("ahocorasick", "no xray data curate, no tags=concepts", "pyahocorasick"),
    Package("tensorboard", "runs need train.tensorboard=false"),
    Package("matplotlib", "no report.html"),
    Package("wandb", "no train.wandb", f"'{DISTRIBUTION}[wandb]'"),
    Package("onnxruntime", "no xray export --to onnx", f"'{DISTRIBUTION}[onnx]'"),
    Package("ray", "no engine=ray for xray data curate", f"'{DISTRIBUTION}[ray]'"),
    Package(
        "open_clip",
        "no open_clip model as clip.teacher, no xray export --to open_clip",
        "open_clip_torch",
    ),
]
# Imports libraries in turn and prints each result at once, because an import may end the process.
PROBE = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        module = importlib.import_module(name)
        if module.__file__ is None:  # a folder of this name, such as wandb's folder of runs
            raise ModuleNotFoundError(name=name)
        result = "ok " + str(getattr(module, "__version__", ""))
    except ModuleNotFoundError as error:
        result = ("none" if error.name == name else "bad") + " " + str(error)
    except BaseException as error:
        result = f"bad {type(error).__name__}: {error}"
    print("\\n@", name, " ".join(result.split()), flush=True)
"""


def imports(packages: Sequence[Package]) -> list[Finding]:
    """Import each library in a separate process, because an import may crash, and report it."""
    results: dict[str, str] = {}
    while remaining := [p.name for p in packages if p.name not in results]:
        done = processes.run([sys.executable, "-c", PROBE, *remaining])
        for line in done.stdout.splitlines():
            if line.startswith("@ "):
                _, name, result = line.split(" ", 2)
                results[name] = result
        not_reached = [name for name in remaining if name not in results]
        if not_reached:  # the first of them ended the process
            results[not_reached[0]] = f"bad its import ends the process ({done.returncode})"
    required = _requirements()
    return [_library(package, results[package.name], required) for package in packages]


def _library(package: Package, result: str, required: dict[str, str]) -> Finding:
    status, _, text = result.partition(" ")
    fix = f"pip install {package.install or package.name}"
    if status != "ok":
        text = "not installed" if status == "none" else text[:160]
        lacks = f"{package.use}: {fix}" if package.use else f"nothing works: {fix}"
        return Finding(package.name, text, lacks, "missing" if package.use else "broken")
    name, version = _distribution(package.name, text)
    if not _new_enough(version, required.get(name, "")):
        return Finding(
            package.name, version, f"{required[name]} is needed: {fix} --upgrade", "broken"
        )
    return Finding(package.name, f"{version} ({name})" if name != package.name else version)


def _distribution(module: str, version: str) -> tuple[str, str]:
    """Return (name, version) of the distribution of a module; if unknown, of the module."""
    for name in importlib.metadata.packages_distributions().get(module, []):
        return name.lower(), importlib.metadata.version(name)
    return module, version


def _requirements() -> dict[str, str]:
    """Return the versions that xray requires, by distribution; {} if xray is not installed."""
    try:
        from packaging.requirements import Requirement

        requirements = map(Requirement, importlib.metadata.requires(DISTRIBUTION) or [])
        return {item.name.lower(): str(item.specifier) for item in requirements}
    except ImportError:
        return {}


def _new_enough(version: str, required: str) -> bool:
    if not version or not required:
        return True
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(required).contains(version, prereleases=True)
