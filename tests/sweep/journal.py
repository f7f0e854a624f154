"""What was found so far, one JSON line per model type and scenario, so that a sweep that was cut short goes on where it stopped."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from tests.sweep.check import Finding

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "sweep"
FILE = "journal.jsonl"  # in a folder of what was found
NOT_BUILT = "not built"  # a type's only verdict, under the scenario ""
_SOURCES = ("sparsify", "passes", "backends", "tests/sweep")


class Subject(NamedTuple):
    """A type of a list with an attention implementation, "sdpa" or "eager"."""

    which: str
    model_type: str
    attention: str


@dataclass(frozen=True)
class Entry:
    """scenario: "" for what is said of the type as a whole. planned: all its scenarios. part: the class of its language decoder, where only
    that was called. sees: whether it got images. trained: whether it chooses keys or blocks by itself. sources: digest of everything that
    decides the finding."""

    subject: Subject
    scenario: str
    planned: list[str]
    finding: Finding
    part: str = ""
    sees: bool = False
    trained: bool = False
    sources: str = ""

    def to_json(self) -> str:
        finding = {name: value for name, value in dataclasses.asdict(self.finding).items() if value not in (None, "", 0, {})}
        return json.dumps({**dataclasses.asdict(self), "subject": list(self.subject), "finding": finding})

    @classmethod
    def from_json(cls, text: str) -> Entry:
        values = json.loads(text)
        return cls(**{**values, "subject": Subject(*values["subject"]), "finding": Finding(**values["finding"])})


@functools.cache
def sources() -> str:
    """Digest of the compiler, of what judges it, and of the releases under it."""
    digest = hashlib.sha256(f"{torch.__version__} {transformers.__version__}".encode())
    support = [
        ROOT / "tests" / "support" / f"{name}.py" for name in ("harness", "tiny_configs", "tiny_models", "tiny_overrides", "tiny_sizes")
    ]
    for path in [*support, *(path for folder in _SOURCES for path in sorted((ROOT / folder).rglob("*.py")))]:
        if not path.name.startswith("test_"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Journal:
    """The lines of one file. Of several about one scenario the last counts."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, entry: Entry) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as stream:
            stream.write(dataclasses.replace(entry, sources=sources()).to_json() + "\n")

    def current(self) -> dict[Subject, dict[str, Entry]]:
        """What was found with these sources: by subject, by scenario."""
        found: dict[Subject, dict[str, Entry]] = {}
        for entry in self._lines():
            if entry.sources == sources():
                entries = found.setdefault(entry.subject, {})
                entries[entry.scenario] = entry
                for name in {""} if entry.scenario else {*entries} - {""}:
                    entries.pop(name, None)
        return found

    def _lines(self) -> Iterator[Entry]:
        if self.path.exists():
            yield from map(Entry.from_json, self.path.read_text().splitlines())


def open_scenarios(entries: dict[str, Entry], again: Iterable[str] = ()) -> list[str] | None:
    """Scenarios that are still to be checked; None where nothing is known of the type. again: verdicts that do not count."""
    if not entries:
        return None
    counted = {name: entry for name, entry in entries.items() if entry.finding.verdict not in again}
    if "" in entries:
        return [] if "" in counted else None
    return [name for name in next(iter(entries.values())).planned if name not in counted]


def verdict(findings: Iterable[Finding]) -> str:
    """Of a type, from those of its scenarios: what is worst, "partly" where some are rewritten and some are not."""
    found = [finding.verdict for finding in findings]
    for bad in ("wrong", "crashed", "fell back", "died", "late", NOT_BUILT):
        if bad in found:
            return bad
    ran = {one for one in found if one != "fails"}
    if not ran:
        return "fails"
    return ran.pop() if len(ran) == 1 else "partly"


def summary(entries: dict[str, Entry]) -> Any:
    """One line about a type."""
    said = [f"{name or 'type'} {e.finding.verdict} {e.finding.rewritten}/{e.finding.sites}" for name, e in entries.items()]
    notes = {e.finding.note for e in entries.values() if e.finding.note} | {r for e in entries.values() for r in e.finding.reasons}
    return f"{verdict(e.finding for e in entries.values()):9s} {', '.join(said)}  {'; '.join(sorted(notes))}"
