"""URLs with credentials: recorded and shown without them, opened with them.

Credentials are a user and password before the host, and the parameters of a query that sign it or
hold a key (`X-Amz-Signature`, `sig`, `token`, `Expires`, ...). `conceal` removes them where a URL
enters the program and remembers them in this process; `reveal` adds them again where it is opened.
So configs, file names, digests, messages and reports never hold them. `redact` removes them from
any text, such as an error of a library, and tokens of the Hugging Face Hub, which no URL has.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Mapping
from typing import Any

from xray.errors import ConfigError

ENVIRONMENT = "XRAY_CREDENTIALS"  # URLs with their credentials, separated by spaces
WILD = "*?[{"
# user:password@, also with a "/" in the password; a port and a path with "@" are not matched
_USER = re.compile(
    r"(?P<scheme>[a-zA-Z][\w+.-]*)://"
    r"(?P<user>[^\s/?#\"<>]+@|[^\s/?#@:\"<>\[]+:(?!\d*(?:[/?#\s]|$))[^\s@\"<>]+@)"
)
_WEB = ("http", "https")  # their user name may be a token; elsewhere it may be part of the address
_ADDRESS = ("github",)  # github://organisation:repository@branch/
_QUERY = re.compile(r"\?([^\s\"'<>`|\\#]*)")
_QUERY_IN_BRACES = re.compile(r"\?([^\s\"'<>`|\\#{},]*)")
# names in lower case, without "-" and "_"
_SECRET = re.compile(
    r"x(amz|goog|oss|cos|obs|tos|bz)\w+|\w*(token|signature|secret|password|passwd|credential"
    r"|apikey|accesskey|accesskeyid|accessid|authorization)|sig|sign|key|pwd|pass|sas|jwt|auth|hmac"
    r"|expires|policy|keypairid|hashalgorithm"
)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")  # of the Hugging Face Hub
_AZURE = frozenset(  # of a query that has `sig`
    {"sv", "st", "se", "sr", "sp", "spr", "sip", "ss", "srt", "si", "skoid", "sktid", "skt", "ske"}
    | {"sks", "skv", "saoid", "suoid", "scid", "sdd", "ses"}
)


_users: dict[str, str] = {}  # URL of a folder or file -> `user:password@`
_queries: dict[str, str] = {}  # likewise -> `name=value&name=value`


def redact(text: str) -> str:
    """Return a text without the credentials of the URLs in it, and without tokens of the hub."""
    return _TOKEN.sub("hf_...", _split(text, _QUERY)[0])


def conceal(url: str) -> str:
    """Remove the credentials of a URL or URL pattern, and remember them for `reveal`."""
    if "://" not in url:
        return url
    public, user, query = _split(url, _QUERY_IN_BRACES if "{" in url else _QUERY)
    if user:
        _users[url_folder(public)] = user
    if query and "{" in url and url.find("?") < url.rfind("}"):  # a query for each shard
        for shard in _expanded(url):
            name, _, own = _split(shard, _QUERY)
            _queries[name] = own
    elif query:
        _queries[url_folder(public) if "{" in url else public.rstrip("/")] = query
    return public


def reveal(url: str) -> str:
    """Return a URL with the credentials that were remembered for it or for a folder above it."""
    user, query = _nearest(_users, url), _nearest(_queries, url)
    if not (user or query) or redact(url) != url:
        return url
    start = (url.rfind("://") if "::" in url else url.find("://")) + 3
    end = f"{'&' if '?' in url else '?'}{query}" if query else ""
    return f"{url[:start]}{user}{url[start:]}{end}"


def has_signature(pattern: str) -> bool:
    """Return True if a URL pattern has credentials in a query."""
    return bool(_split(pattern, _QUERY)[2])


def is_signed(url: str) -> bool:
    """Return True if a query was remembered for this URL alone, not for the files beside it."""
    return url in _queries


def conceal_all(value: Any, seen: dict[str, str] | None = None) -> Any:
    """Conceal every URL in nested settings: dataclasses are changed, others returned anew.

    Raises ConfigError for two URLs that differ only in their credentials, because they would be
    taken for the same data.
    """
    seen = {} if seen is None else seen
    if isinstance(value, str):
        public = conceal(value)
        if public != value and seen.setdefault(public, value) != value:
            raise ConfigError(f"{public} is set twice with different credentials: use the same")
        return public
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for item in dataclasses.fields(value):
            own = getattr(value, item.name)
            if (public := conceal_all(own, seen)) != own:
                setattr(value, item.name, public)
        return value
    if isinstance(value, Mapping):
        return {key: conceal_all(item, seen) for key, item in value.items()}
    if isinstance(value, list):
        return [conceal_all(item, seen) for item in value]
    return value


def redact_all(value: Any) -> Any:
    """Return nested containers with every text redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: redact_all(item) for key, item in value.items()}
    return [redact_all(item) for item in value] if isinstance(value, list) else value


def url_folder(pattern: str) -> str:
    """Return the part of a URL pattern that has no wildcards and no tar name."""
    head = pattern.rstrip("/")
    while head.endswith(".tar") or any(c in head for c in WILD):
        head = head.rpartition("/")[0]
    return head


def remembered() -> tuple[dict[str, str], dict[str, str]]:
    """Return the credentials of this process, for `remember` in a process that it starts."""
    return dict(_users), dict(_queries)


def remember(known: tuple[dict[str, str], dict[str, str]]) -> None:
    """Add the credentials of the process that started this one."""
    _users.update(known[0])
    _queries.update(known[1])


def environment() -> dict[str, str]:
    """Return the variable that hands this process's credentials to a new program; {} if none."""
    urls = sorted({reveal(url) for url in (*_users, *_queries)})
    return {ENVIRONMENT: " ".join(urls)} if urls else {}


class RedactingFormatter(logging.Formatter):
    """Formatter of log lines without credentials, also of other libraries' lines."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        return redact(super().format(record))


def _split(text: str, queries: re.Pattern[str]) -> tuple[str, str, str]:
    """Return (text without credentials, first user, first secret part of a query)."""
    users, secrets = list[str](), list[str]()

    def without_user(match: re.Match[str]) -> str:
        scheme, user = match["scheme"].lower(), match["user"]
        web = scheme.rpartition("+")[2] in _WEB
        if scheme in _ADDRESS or not (web or ":" in user):
            return match[0]
        users.append(user)
        return f"{match['scheme']}://"

    def without_secrets(match: re.Match[str]) -> str:
        parts = match[1].split("&")
        names = [re.sub("[-_]", "", part.partition("=")[0].lower()) for part in parts]
        azure = _AZURE if "sig" in names else frozenset[str]()
        secret = [name in azure or bool(_SECRET.fullmatch(name)) for name in names]
        own = [part for part, hidden in zip(parts, secret, strict=True) if hidden and "=" in part]
        if not own:
            return match[0]
        secrets.append("&".join(own))
        kept = [part for part in parts if part not in own]
        return f"?{'&'.join(kept)}" if kept else ""

    public = queries.sub(without_secrets, _USER.sub(without_user, text))
    return public, "".join(users[:1]), "".join(secrets[:1])


def _expanded(pattern: str) -> list[str]:
    from webdataset.shardlists import expand_urls

    try:
        return list(expand_urls(pattern))
    except (ValueError, AssertionError):  # the caller that expands it raises its error
        return []


def _nearest(known: Mapping[str, str], url: str) -> str:
    """Return the value of a URL, or of the nearest folder above it; "" if there is none."""
    head = url.rstrip("/")
    while known and "://" in head:
        if head in known:
            return known[head]
        head = head.rpartition("/")[0]
    return ""


def read_environment() -> None:
    """Remember the credentials that the environment variable gives."""
    for url in os.environ.get(ENVIRONMENT, "").split():
        conceal(url)


read_environment()
