"""Prompts of zero-shot classification: templates with `{}` where the class name goes."""

from __future__ import annotations

from data_pipelines.ingest.labelled import place_of
from xray.errors import ConfigError, DataError
from xray.evaluation.suites.zero_shot import ZERO_SHOT, ZeroShotConfig, is_template
from xray.files import lines_of, read_text

KEY = f"eval.{ZERO_SHOT.name}.templates"


def prompt_templates(config: ZeroShotConfig, root: str) -> list[str]:
    """Return the templates that a setting names, each with `{}` where the class name goes.

    root: folder of a relative path. Raises ConfigError if open_clip is not installed or the file
    cannot be read, DataError for a line of the file without a place for the class name.
    """
    if config.templates in ("openai", "simple"):
        templates = _of_open_clip(config.templates == "openai")
    elif file := config.templates_file():
        templates = _in_file(place_of(KEY, file, root))
    else:
        given = config.templates
        templates = [given] if isinstance(given, str) else given
    return [template.replace("{c}", "{}") for template in templates]


def _of_open_clip(openai: bool) -> list[str]:
    """Return the 80 templates of CLIP's ImageNet evaluation, or the 7 of its short list."""
    try:
        from open_clip import zero_shot_metadata
    except ImportError as error:  # the settings are checked before: it is there but broken
        raise ConfigError(f"{KEY}: open_clip cannot be imported: {error}") from error
    names = "OPENAI_IMAGENET_TEMPLATES" if openai else "SIMPLE_IMAGENET_TEMPLATES"
    return [template("{}") for template in getattr(zero_shot_metadata, names)]


def _in_file(path: str) -> list[str]:
    """Read a template per line; empty lines are left out."""
    lines = enumerate(lines_of(read_text(path, KEY)), start=1)
    templates = {number: line.strip() for number, line in lines if line.strip()}
    for number, template in templates.items():
        if not is_template(template):
            raise DataError(
                f"{KEY}: {path} line {number} is {template[:40]!r}: it needs {{}} or {{c}} where "
                "the class name goes"
            )
    if not templates:
        raise DataError(f"{KEY}: {path} is empty: write a template per line")
    return [*templates.values()]
