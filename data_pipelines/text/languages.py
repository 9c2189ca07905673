"""Codes of languages, as they name captions by language: en, quz, pt-BR, zh-Hans, eng_Latn."""

from __future__ import annotations

import re

ISO_639_1 = (
    "aa|ab|ae|af|ak|am|an|ar|as|av|ay|az|ba|be|bg|bh|bi|bm|bn|bo|br|bs|ca|ce|ch|co|cr|cs|cu|cv|"
    "cy|da|de|dv|dz|ee|el|en|eo|es|et|eu|fa|ff|fi|fj|fo|fr|fy|ga|gd|gl|gn|gu|gv|ha|he|hi|ho|hr|"
    "ht|hu|hy|hz|ia|id|ie|ig|ii|ik|io|is|it|iu|iw|ja|jv|ka|kg|ki|kj|kk|kl|km|kn|ko|kr|ks|ku|kv|"
    "kw|ky|la|lb|lg|li|ln|lo|lt|lu|lv|mg|mh|mi|mk|ml|mn|mr|ms|mt|my|na|nb|nd|ne|ng|nl|nn|no|nr|"
    "nv|ny|oc|oj|om|or|os|pa|pi|pl|ps|pt|qu|rm|rn|ro|ru|rw|sa|sc|sd|se|sg|sh|si|sk|sl|sm|sn|so|"
    "sq|sr|ss|st|su|sv|sw|ta|te|tg|th|ti|tk|tl|tn|to|tr|ts|tt|tw|ty|ug|uk|ur|uz|ve|vi|vo|wa|wo|"
    "xh|yi|yo|za|zh|zu"
)
# Three letters are also common keys of other data, such as url, alt and raw: so only these.
ISO_639_3 = (
    "ara|arb|ben|bul|cat|ceb|ces|cmn|dan|deu|ell|eng|est|fas|fil|fin|fra|guj|heb|hin|hrv|hun|"
    "ind|isl|ita|jav|jpn|kan|kor|lav|lit|mal|mar|msa|nld|nob|nor|pan|pes|pol|por|quz|ron|rus|"
    "slk|slv|spa|srp|swa|swe|swh|tam|tel|tgl|tha|tur|ukr|urd|vie|yor|yue|zho|zsm|zul"
)
SUFFIX = "[-_][A-Za-z0-9]{2,8}"  # region or script
LANGUAGE = re.compile(rf"({ISO_639_1}|{ISO_639_3})({SUFFIX})*|[a-z]{{3}}[-_][A-Z][a-z]{{3}}")


def is_language(code: object) -> bool:
    """Return True for the code of a language, with or without a region or script."""
    return isinstance(code, str) and bool(LANGUAGE.fullmatch(code))
