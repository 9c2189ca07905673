"""Settings of `xray data curate`: metadata, filters, duplicates and balance."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from xray.errors import ConfigError


@dataclass
class FilterConfig:
    """Filters of samples and texts, applied before texts are balanced; 0 and "" = no limit.

    Limits on texts drop single texts. A sample is dropped with the last of its texts.
    """

    min_width: int = 0  # pixels; from `width` and `height` in the JSON, else from the image header
    max_width: int = 0  # pixels
    min_height: int = 0  # pixels
    max_height: int = 0  # pixels
    min_aspect: float = 0.0  # smallest width / height
    max_aspect: float = 0.0  # largest width / height
    min_words: int = 0  # words are split at spaces; in scripts without spaces, characters count
    max_words: int = 0  # largest number of words of a text
    min_chars: int = 0  # smallest number of characters of a text
    max_chars: int = 0  # largest number of characters of a text
    max_word_share: float = 0.0  # share of the most frequent word, in texts of at least 5 words
    max_run: int = 0  # equal characters in a row
    scores: str = ""  # sidecar with a float column `score`: one per sample, or one per text
    min_score: float = 0.0  # texts with a lower score, or without one, are dropped
    languages: list[str] = field(default_factory=list)  # languages to keep; [] = all
    same_text: int = 0  # copies of a text to keep in the whole pool, ignoring case and spaces
    per_field: str = ""  # a JSON field, for example `user`
    per_value: int = 0  # samples to keep for each value of `per_field`

    def validate(self) -> None:
        """Check the values; raises ConfigError naming the key to change."""
        for name, value in asdict(self).items():
            if isinstance(value, int | float) and value < 0 and name != "min_score":
                raise ConfigError(f"filters.{name}={value}: use a number above 0, or 0 = no limit")
        for name in ("width", "height", "aspect", "words", "chars"):
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if most and least > most:
                raise ConfigError(f"filters.min_{name}={least} is above filters.max_{name}={most}")
        if bool(self.per_field) != bool(self.per_value):
            raise ConfigError("filters.per_field and filters.per_value must be set together")
        if self.min_score and not self.scores:
            raise ConfigError(
                "filters.min_score needs filters.scores: set it to the name of a sidecar written "
                "by xray data scores"
            )


@dataclass
class DedupConfig:
    """Rules for duplicates; of a group of duplicates, the sample with the smallest key is kept."""

    exact: bool = False  # duplicates have equal sha256 of the media
    sha256: Literal["media", "json"] = "media"  # computed from the bytes, or read from the JSON
    perceptual: bool = False  # duplicates have close dHashes of the image or the middle frame
    distance: int = 0  # bits of the 64 of a dHash that may differ
    embeddings: str = ""  # sidecar with a float column `embeddings`; "" = do not compare them
    cosine: float = 0.95  # duplicates have embeddings with a larger cosine
    # Name -> shards of an evaluation set. Samples with the same media as one of them are dropped.
    evaluation: dict[str, str] = field(default_factory=dict)

    @property
    def media(self) -> bool:
        """True if the media must be hashed."""
        return self.exact or self.perceptual or bool(self.evaluation)

    def validate(self) -> None:
        """Check the values; raises ConfigError naming the key to change."""
        if not 0 <= self.distance <= 3:
            raise ConfigError(f"dedup.distance={self.distance}: use 0 to 3 bits")
        if not 0 < self.cosine < 1:
            raise ConfigError(f"dedup.cosine={self.cosine}: use a number between 0 and 1")


@dataclass
class CurationConfig:
    """Settings that curate a pool to the distribution of MetaCLIP (2309.16671, 2507.22062)."""

    # File with one entry per line, or JSON with a list or {language: list}. "none" = no balancing.
    metadata: str = ""
    casefold: bool = False  # ignore case
    captions: dict[str, float] = field(default_factory=dict)  # JSON field -> weight; {} = default
    texts: Literal["any", "one"] = "any"  # any: use all texts; one: draw one per sample by weight
    t: float = 20_000.0  # expected number of texts to keep per frequent entry
    # Language that t is for. Each other language gets the t that gives it the same share of
    # matches with rare entries. "" = t is for all languages.
    reference: str = ""
    language: str = "language"  # JSON field, or package.module:function from a text to its language
    fallback: str = ""  # language whose metadata serve texts of other languages; "" = drop them
    filters: FilterConfig = field(default_factory=FilterConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    seed: int = 0  # for all draws; they depend on the sample, not on the order of samples
    engine: Literal["local", "ray"] = "local"  # processes of this machine, or of a Ray cluster
    workers: int = 2  # processes

    def validate(self) -> None:
        """Check the values; raises ConfigError naming the key to change."""
        if not self.metadata:
            raise ConfigError(
                "metadata is missing: set it to a file with one entry per line, or to none for no "
                "balancing"
            )
        if not self.t > 0:
            raise ConfigError(f"t={self.t}: use the number of texts per entry, such as 20000")
        if self.workers < 1:
            raise ConfigError(f"workers={self.workers}: use at least 1")
        if any(weight <= 0 for weight in self.captions.values()):
            raise ConfigError(f"captions={self.captions}: weights must be above 0")
        self.filters.validate()
        self.dedup.validate()

    def matching_settings(self) -> dict[str, Any]:
        """Return the settings that the first pass (filters and matching) depends on."""
        settings = asdict(self)
        for name in ("t", "reference", "dedup", "engine", "workers", "metadata"):
            del settings[name]
        if self.texts == "any":
            del settings["seed"]  # the first pass draws nothing then
        return settings
