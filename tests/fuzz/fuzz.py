"""Fuzzing in one process: ``python tests/fuzz/fuzz.py --cases 100000``.

Changed files and command lines against everything that reads them (fuzz_targets.py, fuzz_readers.py). A case is accepted, or refused by a
ValueError or OSError of one line. Anything else is a failure: another exception, a case that takes over 5 seconds of this process's time,
memory that grows by 1 GB. Each case is drawn from its number alone: ``--only NUMBER`` runs it again and shows where it fails.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
os.environ |= {"TRANSFORMERS_VERBOSITY": "critical", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

SECONDS = 5
GROWTH = 1 << 30


class Hang(BaseException):
    pass


def _hang(number, frame):
    raise Hang


class Fuzz:
    """Runs cases by their numbers."""

    def __init__(self, work: Path, seed: int = 0):
        import torch
        from fuzz_readers import readers
        from fuzz_targets import Corpus, targets

        torch.set_num_threads(1)
        corpus = Corpus(work)
        self.seed, self.targets = seed, targets(corpus) | readers(corpus)
        self.names = [name for name, (weight, _) in self.targets.items() for _ in range(weight)]
        self.failures: list[tuple[int, str, str]] = []
        self.done, self.refused, self.seconds = Counter(), Counter(), Counter()
        signal.signal(signal.SIGPROF, _hang)

    def case(self, number: int) -> None:
        draw = random.Random(f"{self.seed} {number}")
        name = draw.choice(self.names)
        self.done[name] += 1
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        began = time.process_time()
        try:
            self.targets[name][1](draw)
        except (ValueError, OSError) as error:
            self.refused[name] += 1
            if "\n" in str(error):
                self.fail(number, name, f"an error of several lines: {error}")
        except Hang:
            self.fail(number, name, f"over {SECONDS} s: {traceback.format_exc()[-1500:]}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self.fail(number, name, traceback.format_exc()[-2500:])
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            self.seconds[name] += time.process_time() - began

    def fail(self, number: int, name: str, said: str) -> None:
        self.failures.append((number, name, said))


def memory() -> int:
    """The most bytes this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as work:
        fuzz = Fuzz(Path(work), given.seed)
        for number in range(20):  # what is loaded at first use
            fuzz.case(-1 - number)
        before, began = memory(), time.time()
        numbers = range(given.first, given.first + given.cases) if given.only is None else [given.only]
        shown = 0
        for at, number in enumerate(numbers, 1):
            fuzz.case(number)
            for failed, name, said in fuzz.failures[shown:]:
                print(f"FAILED case {failed} ({name}):\n{said}", flush=True)
            shown = len(fuzz.failures)
            if at % 5000 == 0:
                print(f"{at} cases, {len(fuzz.failures)} failed, {time.time() - began:.0f} s, {memory() / 1e9:.2f} GB", flush=True)
        grown = memory() - before
    counts = f"{len(fuzz.failures)} failed, {sum(fuzz.refused.values())} refused"
    print(f"{sum(fuzz.done.values())} cases in {time.time() - began:.0f} s: {counts}, memory grew by {grown / 1e6:.0f} MB")
    for name, count in sorted(fuzz.done.items()):
        print(f"{name:>14}: {count:>6} cases, {fuzz.refused[name]:>6} refused, {1000 * fuzz.seconds[name] / count:.1f} ms of CPU each")
    return bool(fuzz.failures or grown > GROWTH)


if __name__ == "__main__":
    raise SystemExit(main())
