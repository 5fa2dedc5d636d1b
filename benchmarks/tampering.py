"""17,000 altered bundles, folders and zip files: `make bench-tampering`, five minutes.

Each is read as a user would, with ONNX Runtime replaced by what counts the models it is given, and
with every access to a file noted (Python's audit hooks). What writes a new manifest too is shown to
whoever has the public key of the signature. In the end the checks are switched off, one after
the other: the same alterations must then be let pass, and be counted.
"""

from __future__ import annotations

import argparse
import codecs
import itertools
import random
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

from table import Figure, publish
from tampered.archives import altered_archives
from tampered.bundles import Files, Mutation, as_folder, as_zip, read_files, seal, small_bundle
from tampered.contents import Amount, altered_contents
from tampered.manifests import SECRET
from tampered.places import altered_places
from tampered.planted import PLANTS, sample
from tampered.sealed import (
    Keys,
    Signatures,
    external_data,
    make_keys,
    sealed_anew,
    signature_of,
)
from tampered.watch import FAULTS, OPENED, PASSED, Tally

from deploykit import runtime
from deploykit.bundle import verify_bundle

SEED = 0
LEAST, SLOWEST_S, GROWTH_MIB = 10_000, 5.0, 128.0
ADDRESS_SPACE = 2**31  # bytes that may be asked for beyond what there is at the start
HUNG_S, PLANT_HUNG_S, PLANT_MOST = 30.0, 0.2, 150


@dataclass(frozen=True)
class Extent:
    """How much is done.

    Attributes:
        amount: of bytes that are flipped, and of random alterations.
        every: of so many alterations one is tried.
        least: so many must be refused.
    """

    amount: Amount
    every: int
    least: int


FULL = Extent(Amount(1, 24, 400), 1, LEAST)
TRIAL = Extent(Amount(53, 4001, 20), 11, 300)


@dataclass(frozen=True)
class Setting:
    """What alterations are made from, and who judges them.

    Attributes:
        files: of the small bundle.
        signatures: that an attacker may find.
        keys: of the bundle's owner.
        scratch: a folder for keys, private copies and one altered bundle at a time.
    """

    files: Files
    signatures: Signatures
    keys: Keys
    scratch: Path

    def tally(self, limit_s: float = HUNG_S) -> Tally:
        """Return a fresh count, with who reads for each judge."""
        readers = {
            "hashes": (runtime.read_bundle, verify_bundle),
            "runner": (verify_bundle,),
            "key": (partial(verify_bundle, key=self.keys.public),),
        }
        known = Path(runtime.__file__)  # with which `verify` compares the runner
        return Tally(readers, (known, self.keys.public, self.scratch / "private"), limit_s)

    def mutations(self, amount: Amount) -> Iterator[Mutation]:
        """Yield every alteration, the same ones each time."""
        drawn = random.Random(SEED)
        yield from altered_contents(self.files, drawn, amount)
        yield from altered_places(self.files)
        yield from altered_archives(self.files, drawn, amount)
        yield from external_data(self.files)
        yield from sealed_anew(self.files, self.signatures, drawn, amount)

    def try_all(self, mutations: Iterable[Mutation], tally: Tally) -> None:
        """Make each in a folder of its own, with a file beside it that must stay unread."""
        place = self.scratch / "case"
        with mock.patch.object(tempfile, "tempdir", str(self.scratch / "private")):
            for mutation in mutations:
                (place / "outside").mkdir(parents=True)
                (place / "outside" / "secret").write_bytes(SECRET)
                try:
                    tally.judge(mutation, place)
                finally:
                    shutil.rmtree(place)


def prepare(scratch: Path) -> Setting:
    """Make the bundle, the keys and the signatures."""
    (scratch / "private").mkdir()
    files = read_files(small_bundle(scratch))
    keys, others = make_keys(scratch, "owner"), make_keys(scratch, "other")
    signatures = Signatures(
        own=signature_of(files, keys, scratch / "own"),
        moved=signature_of(seal(files, version="0"), keys, scratch / "moved"),
        foreign=signature_of(files, others, scratch / "foreign"),
    )
    return Setting(files, signatures, keys, scratch)


def whole_that_pass(setting: Setting) -> int:
    """Count the forms of the unaltered bundle that are taken: who refuses all proves nothing."""
    signed = {**setting.files, runtime.SIGNATURE: setting.signatures.own}
    passed = 0
    for files, judge in ((setting.files, "hashes"), (signed, "hashes"), (signed, "key")):
        for form in (as_folder, as_zip):
            tally = setting.tally()
            setting.try_all([form("unaltered", "as it was", files, judge)], tally)
            # Where all else is well, `verify` wants to open the model, which it may not do here.
            passed += tally.faults[OPENED] == 1 and set(tally.faults) <= {PASSED, OPENED}
    return passed


def warm_up(setting: Setting) -> None:
    """Let Python import what reading, refusing and checking need."""
    for codec in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        codecs.lookup(codec)  # as `json` takes them where the first byte is a zero
    seen: set[str] = set()
    tally = setting.tally()
    for mutation in setting.mutations(TRIAL.amount):
        if mutation.kind not in seen:
            seen.add(mutation.kind)
            setting.try_all([mutation], tally)


def switch_off(setting: Setting) -> dict[str, tuple[Tally, bool]]:
    """Switch each check off; return what was counted, and whether all of it that must be."""
    found = {}
    for plant in PLANTS:
        tally = setting.tally(limit_s=PLANT_HUNG_S)
        chosen = sample(plant, setting.mutations(TRIAL.amount), PLANT_MOST)
        with plant.planted():
            setting.try_all(chosen, tally)
        found[plant.told] = (tally, plant.faults <= set(tally.faults))
    return found


def memory_mib() -> float:
    """Return the most memory that this process ever held."""
    per_unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / per_unit


def bound_memory() -> None:
    """Let what would take gigabytes fail."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def measure(scratch: Path, extent: Extent) -> tuple[list[Figure], list[str]]:
    """Try everything; return the rows of the table and the lines below it."""
    setting = prepare(scratch)
    whole, before_mib = whole_that_pass(setting), memory_mib()
    warm_up(setting)
    bound_memory()
    tally = setting.tally()
    chosen = itertools.islice(setting.mutations(extent.amount), None, None, extent.every)
    setting.try_all(chosen, tally)
    growth_mib = memory_mib() - before_mib
    off = switch_off(setting)
    tried, refused = tally.tried.total(), tally.refused.total()
    let_pass = off["hashes of files"][0].faults[PASSED]
    figures = [
        Figure("altered bundles", tried, "{:d}", at_least=extent.least),
        Figure("of which refused", refused, "{:d}", at_least=tried),
        *(Figure(told, tally.faults[one], "{:d}", at_most=0) for one, told in FAULTS.items()),
        Figure("slowest to be refused", tally.slowest_s, "{:.2f} s", at_most=SLOWEST_S),
        Figure("memory that they took", growth_mib, "{:.1f} MiB", at_most=GROWTH_MIB),
        Figure("unaltered bundles that are taken", whole, "{:d}", at_least=6),
        Figure("let pass with hashes switched off", let_pass, "{:d}", at_least=1),
        Figure(
            "switched-off checks that are seen",
            sum(seen for _, seen in off.values()),
            "{:d}",
            at_least=len(PLANTS),
        ),
    ]
    return figures, _details(tally, off)


def _details(tally: Tally, off: dict[str, tuple[Tally, bool]]) -> list[str]:
    """Tell what came of every kind, the first of the faults, and what was switched off."""
    lines = ["| alteration | tried | refused |", "|---|---|---|"]
    for kind, count in tally.tried.items():
        lines.append(f"| {kind} | {count} | {tally.refused[kind]} |")
    lines += ["", "| switched off | tried | counted |", "|---|---|---|"]
    for told, (found, _) in off.items():
        lines.append(f"| {told} | {found.tried.total()} | {_counted(found.faults)} |")
    lines += [""]
    lines += [f"{FAULTS[one]}: {told}" for one, all_ in tally.examples.items() for told in all_]
    return lines


def _counted(faults: Counter[str]) -> str:
    return ", ".join(f"{count} {FAULTS[one]}" for one, count in sorted(faults.items()))


def main() -> int:
    """Try everything and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trial", action="store_true", help="a few alterations; keeps no table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
        scratch = Path(folder).resolve()
        figures, details = measure(scratch, TRIAL if options.trial else FULL)
    return publish(
        "tampering",
        figures,
        about="A small bundle (a linear model on images of 4 x 4 pixels), altered as a folder and "
        "as a zip file, and read as `run.py` and `deploykit verify` do; where its manifest was "
        "written anew, as who has the public key does. ONNX Runtime is replaced by what counts "
        "the models that it is given; Python's audit hooks tell of every access to a file. "
        f"Seed {SEED}.",
        command="make bench-tampering",
        details=details,
        keep=not options.trial,
    )


if __name__ == "__main__":
    sys.exit(main())
