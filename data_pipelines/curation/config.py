"""How a pool of image-text samples is curated: metadata, filters, duplicates, balance."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from xray.errors import ConfigError


@dataclass
class FilterConfig:
    """What a sample or a text must be like before texts are balanced; 0 and "" = no limit.

    A limit on texts drops texts; a sample goes with the last of its texts.
    """

    min_width: int = 0  # pixels: json `width` and `height`, else the picture's header
    max_width: int = 0
    min_height: int = 0
    max_height: int = 0
    min_aspect: float = 0.0  # width / height
    max_aspect: float = 0.0
    min_words: int = 0  # of a text: between spaces, or characters of a script without spaces
    max_words: int = 0
    min_chars: int = 0
    max_chars: int = 0
    max_word_share: float = 0.0  # of the most frequent word in a text of 5 words and more
    max_run: int = 0  # equal characters in a row
    scores: str = ""  # a sidecar with a float column `score`: one per sample, or one per text
    min_score: float = 0.0  # below it, a text goes; so do texts without a score
    languages: list[str] = field(default_factory=list)  # of texts, as the data call them; [] = all
    same_text: int = 0  # texts that are equal but for case and spaces, kept of the whole pool
    per_field: str = ""  # a json field, e.g. user, ...
    per_value: int = 0  # ... and how many samples of one value of it are kept

    def validate(self) -> None:
        """Raises ConfigError naming the key to change."""
        for name, value in asdict(self).items():
            if isinstance(value, int | float) and value < 0 and name != "min_score":
                raise ConfigError(f"filters.{name}={value}: use a number above 0, or 0 = no limit")
        for name in ("width", "height", "aspect", "words", "chars"):
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if most and least > most:
                raise ConfigError(f"filters.min_{name}={least} is above filters.max_{name}={most}")
        if bool(self.per_field) != bool(self.per_value):
            raise ConfigError("filters.per_field and filters.per_value need each other")
        if self.min_score and not self.scores:
            raise ConfigError(
                "filters.min_score needs filters.scores, a sidecar of xray data scores"
            )


@dataclass
class DedupConfig:
    """Which samples are the same; of the same, the one with the smallest key is kept."""

    exact: bool = False  # equal sha256 of the media
    sha256: Literal["media", "json"] = "media"  # taken of the bytes, or read from the json
    perceptual: bool = False  # equal or close dHash of the picture or the clip's middle frame
    distance: int = 0  # bits of the 64 that may differ
    embeddings: str = ""  # a sidecar with float rows `embeddings`; "" = none
    cosine: float = 0.95  # above which two embeddings are of the same sample
    # Evaluation shards by a name for them: what has the media of one of their samples is dropped.
    evaluation: dict[str, str] = field(default_factory=dict)

    @property
    def media(self) -> bool:
        """Whether media have to be hashed."""
        return self.exact or self.perceptual or bool(self.evaluation)

    def validate(self) -> None:
        """Raises ConfigError naming the key to change."""
        if not 0 <= self.distance <= 3:
            raise ConfigError(f"dedup.distance={self.distance}: use 0 to 3 bits")
        if not 0 < self.cosine < 1:
            raise ConfigError(f"dedup.cosine={self.cosine}: use a number between 0 and 1")


@dataclass
class CurationConfig:
    """How a pool becomes a data set with MetaCLIP's distribution (2309.16671, 2507.22062)."""

    # file: one entry per line, or json: a list, or {language: list}; none = nothing is balanced
    metadata: str = ""
    casefold: bool = False  # whether case is ignored
    captions: dict[str, float] = field(default_factory=dict)  # json fields; {} = as training does
    texts: Literal["any", "one"] = "any"  # one: a text per sample, drawn by weight, stands for all
    t: float = 20_000.0  # texts per entry that are kept on average, at most
    # The language that t is for; others get the t that leaves them the same share of texts with
    # rare entries. "" = t is for all.
    reference: str = ""
    language: str = "language"  # json field, or package.module:function from a text to its language
    fallback: str = ""  # whose metadata are for languages without any; "" = their texts are dropped
    filters: FilterConfig = field(default_factory=FilterConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    seed: int = 0  # of all draws; a sample's are its own, whatever the order
    engine: Literal["local", "ray"] = "local"
    workers: int = 2  # processes

    def validate(self) -> None:
        """Raises ConfigError naming the key to change."""
        if not self.metadata:
            raise ConfigError(
                "metadata is missing: give a file with one entry per line; none balances nothing"
            )
        if not self.t > 0:
            raise ConfigError(f"t={self.t}: use the number of texts per entry, such as 20000")
        if self.workers < 1:
            raise ConfigError(f"workers={self.workers}: use at least 1")
        if any(weight <= 0 for weight in self.captions.values()):
            raise ConfigError(f"captions={self.captions}: weights are above 0")
        self.filters.validate()
        self.dedup.validate()

    def of_texts(self) -> dict[str, Any]:
        """What decides which texts are matched, and with what: the settings of the first pass."""
        settings = asdict(self)
        for name in ("t", "reference", "dedup", "engine", "workers", "metadata"):
            del settings[name]
        if self.texts == "any":
            del settings["seed"]  # it draws nothing in the first pass
        return settings
