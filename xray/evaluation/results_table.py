"""Results as a table: each measure with its interval, beside chance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product

from xray.evaluation.config import PROBES, WAYS
from xray.reports.tables import ResultTable

Measures = Mapping[str, float]
NAMES = {
    "zero_shot": "zero-shot",
    "captions": "caption to caption",
    "knn": "kNN",
    "linear_probe": "linear probe",
    "attentive_probe": "attentive probe",
    "finetune": "fine-tuning",
}
MEDIA = {"retrieval": "image", "video_retrieval": "clip"}


def title_of(suite: str, measure: str) -> str:
    """What tables call a measure: kNN top1, text to clip R@5, first 64 features."""
    if suite not in MEDIA:
        return f"{NAMES.get(suite, suite)} {measure}".replace("_", " ")
    name, slash, prefix = measure.partition("/")
    way = name.replace("image", MEDIA[suite]).replace("_", " ")
    return way + (f", first {prefix} features" if slash else "")


class _Rows:
    """A table that is being written."""

    def __init__(self, table: ResultTable) -> None:
        self.table = table

    def share(self, name: str, r: Measures, key: str, chance: float, over: str) -> None:
        """A measure and its interval in percent."""
        value = f"{100 * r[key]:.1f}"
        if _low(key) in r:
            value += f" [{100 * r[_low(key)]:.1f}, {100 * r[_high(key)]:.1f}]"
        self.table.rows.append((name, value, f"{100 * chance:.2f}", over))

    def place(self, name: str, r: Measures, key: str, chance: float, over: str) -> None:
        """A median place and its interval: no percent."""
        value = f"place {r[key]:.1f} [{r[_low(key)]:.1f}, {r[_high(key)]:.1f}]"
        self.table.rows.append((name, value, f"place {chance:.1f}", over))


def _low(key: str) -> str:
    return _with(key, "_low")


def _high(key: str) -> str:
    return _with(key, "_high")


def _with(key: str, end: str) -> str:
    """R@1/64 has its interval at R@1_low/64."""
    name, slash, prefix = key.partition("/")
    return f"{name}{end}{slash}{prefix}"


def result_table(results: Mapping[str, Measures]) -> ResultTable:
    """Each measure with its 95 % interval, beside chance, in percent."""
    table = ResultTable("Results", ("measure", "result % [95 % CI]", "chance %", "over"))
    rows = _Rows(table)
    if "zero_shot" in results:
        r = results["zero_shot"]
        over = f"{r['samples']:.0f} samples, {r['classes']:.0f} classes"
        for k in ("top1", "top5"):
            rows.share(title_of("zero_shot", k), r, k, r[f"chance_{k}"], over)
    for suite in MEDIA:
        if suite in results:
            _retrieval(rows, results[suite], suite)
    if "captions" in results:
        _captions(rows, results["captions"])
    for suite in PROBES:  # robustness has rows of its own, and no top1
        r = results.get(suite, {})
        if "top1" in r:
            over = f"{r['samples']:.0f} samples"
            rows.share(title_of(suite, "top1"), r, "top1", r["chance_top1"], over)
    tags = results.get("tags", {})
    for name in dict.fromkeys(key.split("/")[0] for key in tags):
        own = {k.split("/")[1]: v for k, v in tags.items() if k.startswith(f"{name}/")}
        _tags(rows, name, own)
    _robustness(rows, results.get("robustness", {}))
    return table


def _retrieval(rows: _Rows, r: Measures, suite: str) -> None:
    what = "pictures" if suite == "retrieval" else "clips"
    over = f"{r['images']:.0f} {what}, {r['texts']:.0f} captions"
    recalls = [name for name in r if name.startswith(WAYS)]
    prefixes = dict.fromkeys(name.partition("/")[2] for name in recalls)
    for prefix, way in product(prefixes, WAYS):
        for measure in ("R@1", "R@5", "R@10", "median_rank"):
            name = f"{way}_{measure}"
            key = f"{name}/{prefix}" if prefix else name
            if key in r:
                row = rows.place if measure == "median_rank" else rows.share
                row(title_of(suite, key), r, key, r[f"chance_{name}"], over)


def _captions(rows: _Rows, r: Measures) -> None:
    title, over = title_of("captions", "top1"), f"{r['captions']:.0f} captions"
    chance = r["chance_top1"]
    if "before_top1" in r:
        rows.share(f"{title}, before tuning", r, "before_top1", chance, over)
    rows.share(title, r, "top1", chance, over)


def _tags(rows: _Rows, name: str, r: Measures) -> None:
    both = r["samples"] + r["untagged"]
    over = f"{r['samples']:.0f} of {both:.0f} samples, {r['tags']:.0f} tags"
    rows.share(f"{name} precision@1", r, "precision@1", r["chance_precision@1"], over)
    rows.share(f"{name} recall@5", r, "recall@5", r["chance_recall@5"], over)
    for measure in [m for m in r if m == "mAP" or m.startswith("mAP[")]:
        tags = f"{r[measure.replace('mAP', 'mAP_tags')]:.0f} tags"
        rows.share(f"{name} {measure}", r, measure, r[f"random_{measure}"], tags)
    least = r["least_dead@10"] / r["vocabulary"]
    rows.share(f"{name} dead tags", r, "dead_share@10", least, f"{r['vocabulary']:.0f} tags")
    error = f"{100 * r['ece']:.1f}"
    rows.table.rows.append((f"{name} calibration error", error, "", over))


def changes(measures: Measures) -> Iterator[tuple[str, str, str, float]]:
    """(head, change, strength, accuracy) of every changed set in the results of robustness."""
    for key, value in measures.items():
        parts = key.split("/")
        if len(parts) == 3 and not parts[2].endswith(("_low", "_high")):
            yield parts[0], parts[1], parts[2], value


def _robustness(rows: _Rows, r: Measures) -> None:
    """Corruptions as the mean of their severities; everything else as it is."""
    for head in dict.fromkeys(key.split("/")[0] for key in r):
        own = {key.removeprefix(f"{head}/").replace("/", " "): value for key, value in r.items()}
        all_of_it, few = f"{own['samples']:.0f} samples", f"{own['attacked_samples']:.0f} samples"
        steps = [(change, strength) for h, change, strength, _ in changes(r) if h == head]
        corrupted = [c for c, _ in steps if c not in SHIFTS + ATTACKED]
        listed = [("clean", all_of_it)]
        listed += [(c, all_of_it) for c in (*dict.fromkeys(corrupted), "corrupted") if c in own]
        listed += [(f"{c} {s}", all_of_it) for c, s in steps if c in SHIFTS]
        listed += [("attacked_clean", few)] if "attacked_clean" in own else []
        listed += [(f"{c} {s}", few) for c, s in steps if c in ATTACKED]
        listed += [("shift", f"{own['shift_samples']:.0f} samples")] if "shift" in own else []
        for key, over in listed:
            title = TITLES.get(key, key.replace("_", " ")) + (
                "/255" if key.startswith(ATTACKED) else ""
            )
            rows.share(f"{head.replace('_', '-')}, {title}", own, key, own["chance"], over)


SHIFTS = ("resolution", "aspect")
ATTACKED = ("fgsm", "pgd", "square")
TITLES = {
    "corrupted": "mean of corruptions",
    "attacked_clean": "those attacked, clean",
    "shift": "elsewhere",
}
