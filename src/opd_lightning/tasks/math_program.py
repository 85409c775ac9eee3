"""The program of a MathWorker: `python math_program.py TIMEOUT_SECONDS MEMORY_MB`.

Reads lines `["wanted", "said"]` and answers each with a line, 1 for equal, else 0. A comparison
that exceeds the time is stopped by an exception, one deep in a single operation by the kernel,
which ends the process. Needs nothing of the package.
"""

import json
import os
import signal
import sys
from types import FrameType

import math_verify

try:
    import resource
except ImportError:  # Windows: the asking process watches the clock
    resource = None

# Only this reader: math-verify's other one, for plain expressions, evaluates text as Python.
_READER = [
    math_verify.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
]
_GRACE_SECONDS = 1.0
_FIRST_SECONDS = 60.0  # builds the grammar's tables


class OutOfTimeError(BaseException):
    """Not an Exception, so that no handler inside the libraries takes it for a failed attempt."""


def compare(wanted: str, said: str) -> bool:
    """Return whether math-verify holds `said` equal to `wanted`, both LaTeX."""
    gold, target = (
        math_verify.parse(f"\\boxed{{{text}}}", _READER, parsing_timeout=None)
        for text in (wanted, said)
    )
    return bool(gold and target) and math_verify.verify(gold, target, timeout_seconds=None)


def limited(wanted: str, said: str, seconds: float) -> bool:
    """Return `compare`, False where it takes more than `seconds` of processor time."""
    try:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds + _GRACE_SECONDS)  # ends the process
            signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            return compare(wanted, said)
        except Exception:  # whatever a grammar or sympy makes of any text: it is no right answer
            return False
        finally:
            if hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    except OutOfTimeError:
        return False


def _out_of_time(number: int, frame: FrameType | None) -> None:
    raise OutOfTimeError


def main(seconds: float, memory_mb: int) -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    if hasattr(signal, "SIGPROF"):
        signal.signal(signal.SIGPROF, _out_of_time)
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the asking process decides
    # one comparison first: with too little memory all of them would be refused in silence
    works = limited(r"\frac{1}{2}", "0.5", _FIRST_SECONDS)
    print("ready" if works else "no", file=answers, flush=True)
    for line in sys.stdin:
        print(int(limited(*json.loads(line), seconds)), file=answers, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
