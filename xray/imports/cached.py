"""Models by name: artifacts, and released weights that are imported once.

torch is imported only to convert weights.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from data_pipelines.shards.side_files import user_cache
from xray.artifacts.artifact import Artifact, find_manifest, open_artifact
from xray.config.identity import hash_json
from xray.errors import NoArtifactError
from xray.files import make_folder, making
from xray.hub import is_hub
from xray.imports.place import REPOSITORY, is_released
from xray.version import __version__

log = logging.getLogger("xray")
REVISION = 2  # of the conversion: a higher one imports cached weights again


def open_model(name: str, llm: str = "") -> Artifact:
    """Open an artifact, or the import of released weights.

    llm: folder of an artifact's base LLM, if it has moved. Raises as `open_artifact` and
    `import_model` do.
    """
    return open_artifact(artifact_of(name), llm)


def artifact_of(name: str) -> str:
    """Return an artifact's name as it is; import released weights, and return the folder.

    Imports are in the user's cache, by the hash of the weights' files. Raises as `import_model`.
    """
    if not is_released(name):
        if not is_hub(name):
            return name
        with suppress(NoArtifactError):  # only a request tells the two apart there
            find_manifest(name)
            return name
    elif REPOSITORY.fullmatch(name) and not Path(name).exists():
        log.info("%s: there is no such folder, so it is taken for a name of the hub", name)
    from xray.imports.convert import import_source
    from xray.imports.source import open_source

    source = open_source(name)
    key = hash_json({"xray": __version__, "revision": REVISION, "files": source.hashes})
    folder = user_cache("imports") / key
    if not folder.exists():
        make_folder(folder.parent, "the cache of imports", "XDG_CACHE_HOME")
        with making(folder):
            if not folder.exists():  # another process has imported it meanwhile
                import_source(source, folder)
    return str(folder)
