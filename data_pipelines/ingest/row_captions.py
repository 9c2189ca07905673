"""Captions in the metadata of a row or of a sidecar, and their languages."""

from __future__ import annotations

from typing import Any

from data_pipelines.ingest.table_columns import CAPTION_COLUMNS, Row
from data_pipelines.text.captions import is_by_language, language_of, languages_beside
from xray.errors import BadSample

TEXT_KEYS = ("text", "raw", "caption")  # of the text in an object


def captions_in(meta: Row) -> list[str]:
    """Return the captions of the first caption column that is not empty."""
    return texts_in(meta.get(_caption_column(meta)))


def _caption_column(meta: Row) -> str:
    """Return the first caption column that is not empty, "" if there is none."""
    return next((column for column in CAPTION_COLUMNS if texts_in(meta.get(column))), "")


def texts_in(value: Any) -> list[str]:
    """Return the texts of a field: a text, an object with a text, or a list of these; else [].

    An object has its text under one of TEXT_KEYS, or has captions by language.
    """
    if isinstance(value, dict):
        found = next((value[key] for key in TEXT_KEYS if value.get(key)), None)
        value = [*value.values()] if found is None and is_by_language(value) else found
    if isinstance(value, list):
        return [text for entry in value for text in texts_in(entry)]
    return [value.strip()] if isinstance(value, str) and value.strip() else []


def captions_with_languages(meta: Row) -> list[Any]:
    """Return the captions as `captions_in`; those whose language is known as {text, language}."""
    return _with_languages(meta.get(_caption_column(meta)), language_of(meta))


def _with_languages(value: Any, language: Any) -> list[Any]:
    """Return the texts of a field, those whose language is known as {text, language}.

    language: of all of them, or a list of the languages of the field's entries; "" = not known.
    """
    if is_by_language(value):
        return [caption for own, inner in value.items() for caption in _with_languages(inner, own)]
    if isinstance(value, list):
        pairs = zip(value, languages_beside(language, len(value)), strict=True)
        return [caption for entry, own in pairs for caption in _with_languages(entry, own)]
    own = value.get("language") if isinstance(value, dict) else ""
    known = str(own or languages_beside(language, 1)[0])
    texts = texts_in(value)
    return [{"text": text, "language": known} for text in texts] if known else [*texts]


def check_captions(meta: Row) -> None:
    """Bring `caption` and `captions` into the form that training reads; raises BadSample.

    Empty ones, such as null and NaN, are removed, and an object such as {raw: ...} becomes its
    text. Captions that have languages are also given as `captions`, if they are in another column.
    """
    language = language_of(meta)
    beside = language if isinstance(language, list) else ""  # a single one is read by itself
    column = _caption_column(meta)
    if column != "captions" and not is_by_language(meta.get("captions")):
        own = _with_languages(meta.get(column), beside)
        if any(isinstance(caption, dict) for caption in own):
            meta["captions"] = meta[column] if is_by_language(meta[column]) else own
    for column in ("caption", "captions"):
        value = meta.get(column)
        entries = value if isinstance(value, list) else [value]
        wrong = [entry for entry in entries if not (texts_in(entry) or _is_null(entry))]
        if wrong:
            kind = type(wrong[0]).__name__
            raise BadSample(
                "broken caption", f"{column} must hold text, not a value of type {kind}"
            )
        if not texts_in(value):
            meta.pop(column, None)
        elif is_by_language(value):
            meta[column] = {own: _readable(inner, "") for own, inner in value.items()}
        else:
            meta[column] = _readable(value, beside)


def _readable(value: Any, language: Any) -> Any:
    """Return captions in the form that training reads: a text, {text, ...}, or a list of these."""
    entries = value if isinstance(value, list) else [value]
    plain = all(isinstance(_text_of(entry), str) for entry in entries)
    return value if plain else _with_languages(value, language)


def _text_of(entry: Any) -> Any:
    """Return the text of a caption in training's form: a text or {text, ...}."""
    return entry.get("text") if isinstance(entry, dict) else entry


def _is_null(entry: Any) -> bool:
    if isinstance(entry, dict):
        return not entry or any(key in entry for key in TEXT_KEYS)
    return entry is None or entry in ("", []) or str(entry).strip() in ("", "nan")
