"""Models by name for the evaluation: artifacts, and released weights that are imported once."""

from __future__ import annotations

from data_pipelines.shards.side_files import user_cache
from xray.artifacts.artifact import Artifact, open_artifact
from xray.config.identity import hash_json
from xray.files import make_folder, making
from xray.imports.convert import import_source
from xray.imports.place import is_released
from xray.imports.source import open_source
from xray.version import __version__


def open_model(name: str, llm: str = "") -> Artifact:
    """Open an artifact, or import released weights into the user's cache, by their files' hash.

    llm: folder of an artifact's base LLM, if it has moved. Raises as `open_artifact` and
    `import_model` do.
    """
    if not is_released(name):
        return open_artifact(name, llm)
    source = open_source(name)
    key = hash_json({"xray": __version__, "files": source.hashes})
    folder = user_cache("imports") / key
    if not folder.exists():
        make_folder(folder.parent, "the cache of imports", "XDG_CACHE_HOME")
        with making(folder):
            if not folder.exists():  # another process has imported it meanwhile
                import_source(source, folder)
    return open_artifact(folder)
