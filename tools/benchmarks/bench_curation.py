"""Speed and memory of curation: matching, counting, sampling, whole passes, near-duplicates.

(a) Captions per second and core against 500,000 entries, with xray's matcher, an Aho-Corasick
automaton and a loop over entries; checks that all find the same matches. (b) Seconds and peak
memory of counting and sampling simulated matches of 100 million captions. (c) The first pass over
shards, including reading and filters, with 1 and 2 processes. (d) Near-duplicates among random
hashes, and dHash on real photos and their copies.

Alternatives take turns in one run, and a rate is that of the best round. Rates per core use CPU
time, because other work on the machine adds to wall-clock time.

    python -m tools.benchmarks.bench_curation [--tables abcd] [--rounds 3] [--data PHOTOS]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import ahocorasick
import numpy as np

from data_pipelines.curation.balance import Matches, count_entries, draw, keep_rates
from data_pipelines.curation.config import CurationConfig
from data_pipelines.curation.metadata import read_metadata
from data_pipelines.curation.phrase_matcher import PhraseMatcher
from data_pipelines.curation.tables import TextMatcher
from data_pipelines.shards.process_pool import over_shards
from data_pipelines.shards.source import Source, open_source
from data_pipelines.tags.concept_matcher import PUNCTUATION, spaced
from data_pipelines.text.captions import captions_of
from tools.benchmarks.bench_dedup import duplicates
from tools.common.fresh_process import in_fresh_process
from tools.common.media import write_shards
from tools.common.tables import Table, print_tables
from tools.common.timing import hardware

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
ENTRIES, WORDS, BATCH = 500_000, 60_000, 1_000_000
LOOPED = 10_000, 2_000  # captions and entries on which the matcher is compared with the loop
LETTERS = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))


def best_cpu(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Run all alternatives in turn and return the lowest CPU seconds of each."""
    seconds = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name] = min(seconds[name], time.process_time() - start)
    return seconds


# matching -------------------------------------------------------------------------------------


def synthetic(captions: int, entries: int) -> tuple[list[str], list[str]]:
    """Generate captions of about ten Zipf-distributed words, and entries of one to three words."""
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(2, 28)
    letters = rng.choice(LETTERS, (WORDS, 9), p=weights / weights.sum())
    sizes = rng.integers(2, 10, WORDS)
    words = list(
        dict.fromkeys("".join(row[:n]) for row, n in zip(letters, sizes.tolist(), strict=True))
    )
    ranks = (len(words) ** rng.random((captions, 14))).astype(int) - 1
    texts = []
    for row, size in zip(ranks.tolist(), rng.integers(6, 15, captions).tolist(), strict=True):
        text = " ".join(words[rank] for rank in row[:size]).capitalize()
        texts.append(text.replace(" ", ", ", 1) + " ." if size % 3 == 0 else text)
    phrases = dict.fromkeys(words)
    while len(phrases) < entries:
        for row in rng.integers(0, len(words), (entries, 3)).tolist():
            phrases[" ".join(words[rank] for rank in row[: 2 + row[0] % 2])] = None
    return texts, list(phrases)[:entries]


def real_captions(source: Source) -> list[str]:
    """Read all captions of a source."""
    captions: list[str] = []
    for shard, member in source.places():
        captions += captions_of(source.read(shard, member, ("json", "txt")))
    return captions


def entries_in(texts: list[str]) -> list[str]:
    """List all words and word pairs of texts."""
    entries = dict[str, None]()
    for text in texts:
        words = [w for w in spaced(text).split() if w not in PUNCTUATION]
        entries |= dict.fromkeys([*words, *map(" ".join, pairwise(words))])
    return list(entries)


def loop(needles: list[str], texts: list[str]) -> list[list[int]]:
    """Search every entry in every text."""
    spaced_texts = [spaced(text) for text in texts]
    return [[i for i, needle in enumerate(needles) if needle in text] for text in spaced_texts]


class AhoCorasick:
    """Matcher with pyahocorasick's automaton."""

    def __init__(self, entries: list[str]) -> None:
        self.automaton = ahocorasick.Automaton(ahocorasick.STORE_INTS)
        # in reverse order, so that the first of equal entries is added last and remains
        for number, entry in reversed(list(enumerate(entries))):
            self.automaton.add_word(spaced(entry), number)
        self.automaton.make_automaton()

    def find(self, text: str) -> list[int]:
        """Return the numbers of the entries that occur in a text."""
        return sorted({number for _, number in self.automaton.iter(spaced(text))})


def matches_of(matcher: PhraseMatcher, texts: list[str]) -> list[list[int]]:
    """Return the matched entries of each text."""
    entries, ends = matcher.find(texts)
    return [row.tolist() for row in np.split(entries, ends[:-1])]


def resident() -> float:
    """Return the resident memory of this process in MB."""
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def matching(options: argparse.Namespace) -> list[Table]:
    """Make tables (a): matching speed, and cost of building the matchers."""
    texts, entries = synthetic(50_000, ENTRIES)
    cases = {"synthetic": (texts, entries)}
    if options.data.is_dir():
        captions = real_captions(open_source("photos", str(options.data), "image"))
        occurring = entries_in(captions)[: ENTRIES // 2]
        cases["real"] = (captions, list(dict.fromkeys([*occurring, *entries]))[:ENTRIES])
    rows, builds = [], []
    for name, (texts, entries) in cases.items():
        matchers: dict[str, Any] = {}
        for kind, build in (("xray", PhraseMatcher), ("Aho-Corasick", AhoCorasick)):
            start, before = time.process_time(), resident()
            matchers[kind] = build(entries)
            seconds = time.process_time() - start
            builds.append([name, kind, f"{seconds:.1f}", f"{resident() - before:.0f}"])
        matcher, automaton = matchers["xray"], matchers["Aho-Corasick"]
        needles, few = [spaced(entry) for entry in entries], texts[:20]
        runs: dict[str, Callable[[], object]] = {
            "xray": partial(matcher.find, texts),
            "automaton": partial(lambda a, t: [a.find(text) for text in t], automaton, texts),
            "loop": partial(loop, needles, few),
        }
        seconds_of = best_cpu(runs, options.rounds)
        rates = [len(texts) / seconds_of["xray"], len(texts) / seconds_of["automaton"]]
        rates.append(len(few) / seconds_of["loop"])
        matches = matches_of(matcher, texts)
        assert matches == [automaton.find(text) for text in texts]
        assert matches[: len(few)] == loop(needles, few)
        number, size = LOOPED
        some = entries[:: len(entries) // size]
        some_matches = matches_of(PhraseMatcher(some), texts[:number])
        assert some_matches == loop([spaced(entry) for entry in some], texts[:number])
        words = np.mean([len(text.split()) for text in texts])
        hits = np.mean([len(row) for row in matches])
        cells = [f"{len(texts):,} {name}, {words:.0f} words", f"{hits:.1f}"]
        cells += [f"{rate:,.0f}" for rate in rates]
        rows.append([*cells, f"{rates[0] / rates[1]:.1f}x", f"{rates[0] / rates[2]:,.0f}x"])
    heads = ["captions", "entries per caption"]
    heads += ["xray, captions per CPU second (target >= 150,000)", "Aho-Corasick"]
    heads += ["loop over entries", "xray / Aho-Corasick", "xray / loop (target >= 1,000x)"]
    title = f"(a) Matching with {ENTRIES:,} entries. Equal to Aho-Corasick on all captions, and to "
    title += f"the loop on {LOOPED[0]:,} captions x {LOOPED[1]:,} entries and on 20 x {ENTRIES:,}"
    build_heads = ["entries", "matcher", "CPU s to build", "MB"]
    return [Table(title, heads, rows), Table("(a) Building the matchers", build_heads, builds)]


# counting and sampling ------------------------------------------------------------------------


def simulated(captions: int, entries: int) -> Iterator[Matches]:
    """Yield matches of captions, with about five Zipf-distributed entries each, in batches."""
    for start in range(0, captions, BATCH):
        rng = np.random.default_rng(start)
        size = min(BATCH, captions - start)
        ends = np.cumsum(rng.integers(1, 10, size))
        ids = (entries ** rng.random(int(ends[-1]))).astype(np.int32)
        texts = np.zeros(size, np.int32)
        yield Matches(rng.integers(-(2**63), 2**63, size), np.arange(1, size + 1), texts, ends, ids)


def measure_sampling(captions: int) -> dict[str, float]:
    """Count and sample simulated matches; return totals, seconds and peak memory in GB.

    Call it in a fresh process. The time to simulate the matches is subtracted.
    """
    entries, start = ENTRIES, time.perf_counter()
    for _ in simulated(captions, entries):
        pass
    simulation = time.perf_counter() - start
    start = time.perf_counter()
    counts = count_entries(simulated(captions, entries), entries)
    counting = time.perf_counter() - start - simulation
    start, kept = time.perf_counter(), 0
    rates = keep_rates(counts, 20_000)
    for matches in simulated(captions, entries):
        kept += int(draw(matches, rates, 0).sum())
    drawing = time.perf_counter() - start - simulation
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    result = {"matches": float(counts.sum()), "kept": kept, "counting": counting}
    return {**result, "drawing": drawing, "gigabytes": peak}


def sampling(options: argparse.Namespace) -> list[Table]:
    """Make table (b): time and memory of counting and sampling."""
    rows = []
    for captions in (options.captions // 100, options.captions // 10, options.captions):
        result = in_fresh_process(measure_sampling, captions)
        cells = [f"{captions:,}", f"{result['matches']:,.0f}", f"{result['kept']:,.0f}"]
        cells += [f"{result[name]:.1f}" for name in ("counting", "drawing")]
        rows.append([*cells, f"{result['gigabytes']:.2f}"])
    heads = ["captions", "matches", "kept at t = 20,000", "counting, s", "sampling, s"]
    title = f"(b) Counting and sampling of simulated matches with {ENTRIES:,} entries, one process"
    return [Table(title, [*heads, "peak memory, GB (target < 2)"], rows)]


# whole passes ---------------------------------------------------------------------------------


def records(texts: list[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield samples of five captions each."""
    for number in range(0, len(texts), 5):
        record = {"captions": texts[number : number + 5], "width": 640, "height": 480}
        yield f"{number:09d}", {"jpg": b"", "json": json.dumps(record).encode()}


@dataclasses.dataclass(frozen=True)
class Timed:
    """Work on a shard that returns its CPU seconds instead of its result."""

    work: TextMatcher

    def __call__(self, shard: int) -> float:
        """Process a shard and return the CPU seconds."""
        start = time.process_time()
        self.work(shard)
        return time.process_time() - start


def passes(options: argparse.Namespace) -> list[Table]:
    """Make table (c): the first pass over shards with 1 and 2 processes."""
    texts, entries = synthetic(options.texts, ENTRIES)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder, metadata = Path(temporary) / "pool", Path(temporary) / "metadata.txt"
        metadata.write_text("\n".join(entries), "utf-8")
        write_shards(folder, records(texts), 2000)
        source = open_source("pool", str(folder), "image")
        config = CurationConfig(str(metadata))
        config.filters.max_words, config.filters.min_width = 60, 200
        work = TextMatcher(source, read_metadata(str(metadata)), config)
        timed = Timed(work)
        walls: dict[int, list[float]] = {1: [], 2: []}
        steady: dict[int, list[float]] = {1: [], 2: []}
        spent: dict[int, list[float]] = {1: [], 2: []}
        for workers in [1, 2] * options.rounds:
            start, times = time.perf_counter(), []
            for seconds in over_shards(timed, len(source.manifest), workers):
                spent[workers].append(seconds)
                times.append(time.perf_counter())
            walls[workers].append(times[-1] - start)
            warm = max(1, len(times) // 4)  # the first shards include building the matcher
            rate = (len(times) - warm) * 10_000 / (times[-1] - times[warm - 1])
            steady[workers].append(rate)
        for workers in (1, 2):
            cells = [str(workers), f"{min(walls[workers]):.1f}", f"{max(steady[workers]):,.0f}"]
            cells.append(f"{max(steady[workers]) / max(steady[1]):.2f}x")
            rows.append([*cells, f"{10 * float(np.median(spent[workers])):.1f}"])
    heads = ["processes", "total s", "captions/s after building", "speed-up, wall-clock"]
    heads += ["CPU s per 100,000 captions and process"]
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    title = f"(c) First pass over {len(texts):,} captions in tars (read, filter, match); {load}"
    return [Table(title, heads, rows)]


TABLES: dict[str, Callable[[argparse.Namespace], list[Table]]] = {
    "a": matching,
    "b": sampling,
    "c": passes,
    "d": duplicates,
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", default="abcd", help="any of abcd")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--data", type=Path, default=SHARED / "captions_train", help="shards of captioned photos"
    )
    parser.add_argument(
        "--captions", type=int, default=100_000_000, help="simulated captions of table b"
    )
    parser.add_argument("--texts", type=int, default=400_000, help="captions of table c")
    parser.add_argument("--hashes", type=int, default=10_000_000, help="random hashes of table d")
    parser.add_argument("--photos", type=int, default=2000, help="photos of table d")
    parser.add_argument("--json", type=Path, help="also write the tables to this JSON file")
    options = parser.parse_args()
    if unknown := set(options.tables) - set(TABLES):
        parser.error(f"--tables: unknown table {', '.join(sorted(unknown))}: use any of abcd")
    machine = hardware("cpu")
    print(machine, flush=True)
    if not options.data.is_dir():
        print(f"--data: {options.data} is not a folder: real data is skipped", flush=True)
    tables = (table for name in options.tables for table in TABLES[name](options))
    print_tables(tables, machine, options.json)


if __name__ == "__main__":
    main()
