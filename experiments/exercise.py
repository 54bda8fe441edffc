"""Nine exercises, to hand out and to grade. The table in README says what they are.

    python experiments/exercise.py handout ../student   this project without the solutions
    python experiments/exercise.py grade ../student     a table; ... ../student 5: one of them

Each exercise is graded alone: its functions are the student's, and so is what is new beside them
(functions, imports, constants). All else is ours, so collect only diffusion_forcing.py. The points
are shared evenly by the test functions; one with many cases must pass them all. The exit status is
0 only for full marks. Students' code has its own process, and LIMIT seconds for each exercise:
this stops accidents, not cheats. As a plugin of pytest, this file skips what is not written yet.
"""

import json
import os
import shutil
import signal
import sys
import traceback
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, Popen, TimeoutExpired
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the root of the project
from experiments.graft import (CORE, HERE, exercises, graft, read, unwritten,  # noqa: E402
                               without)

FILES = (CORE, "test_diffusion_forcing.py", "train.py", "sample.py", "data/*.py", ".pytest.ini",
         "README.md", "LICENSE", ".gitignore", "experiments/*.py", "experiments/[QR]*.md",
         "experiments/*.pt", "experiments/*.png", "experiments/*.gif", "experiments/lander.*")
PYTEST = [sys.executable, "-m", "pytest", FILES[1], "--tb=no", "--junit-xml=results.xml"]
LIMIT = 300


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skips a test if its error, or a cause of it, is that something is unwritten."""
    try:
        return (yield)
    except Exception as error:
        said = "".join(traceback.format_exception(error))
        for name in unwritten():
            if name in said:
                pytest.skip(f"waits for {name}")
        raise


pytest_runtest_setup = pytest_runtest_call  # fixtures need functions, too


def copy(folder, core):
    """Writes this project, with this core."""
    for path in (path for pattern in FILES for path in HERE.glob(pattern)):
        target = folder / path.relative_to(HERE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (folder / CORE).write_text(core, "utf-8")


def run(command, folder, limit):
    """-> how it ended, at the latest after `limit` seconds. All that it started ends with it."""
    with Popen(command, cwd=folder, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL,
               start_new_session=True) as process:
        try:
            return f"exit status {process.wait(limit)}, and no results"
        except TimeoutExpired:
            return f"no end in {limit} seconds"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def grade(theirs, number):
    """-> a row of the table: what a student's core gets for an exercise."""
    names, options, points = exercises()[number]
    with TemporaryDirectory() as folder:
        copy(Path(folder), graft(read(HERE / CORE), theirs, number))
        first, cases = run([*PYTEST, *options], folder, LIMIT), []
        with suppress(OSError, ElementTree.ParseError):
            cases, first = ElementTree.parse(Path(folder, "results.xml")).iter("testcase"), ""
    passed = {}
    for case in cases:
        name = case.get("name").partition("[")[0]
        passed[name] = passed.get(name, True) and not len(case)
        if len(case) and not first:
            first = f"{name}: {case[0].get('message')}".splitlines()[0]
    good = sum(passed.values())
    earned = round(points * good / max(1, len(passed)), 1)
    return dict(exercise=number, names=", ".join(names), points=earned, of=points, passed=good,
                tests=len(passed), failed=first)


def main(argv=None):
    p = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("command", choices=("handout", "grade"))
    p.add_argument("folder", type=Path)
    p.add_argument("number", nargs="?", type=int, choices=exercises(), help="one of them only")
    p.add_argument("--json", action="store_true", help="for programs, in place of the table")
    args = p.parse_args(argv)
    core = read(HERE / CORE)
    if unwritten():
        p.error(f"this project itself lacks {unwritten()[0]}")
    numbers = [args.number] if args.number else exercises()
    try:
        if args.command == "handout":
            if args.folder.exists() and any(args.folder.iterdir()):
                p.error(f"{args.folder} is not empty")
            for number in numbers:
                core = without(core, number)
            return copy(args.folder, core)
        theirs = read(args.folder / CORE if args.folder.is_dir() else args.folder)
    except OSError as error:
        p.error(str(error))
    rows, say = [], print if not args.json else lambda *_, **__: None
    row = "| {exercise} {names} | {points:g} of {of} | {passed} of {tests} | {failed} |"
    say("| exercise | points | tests | what failed first |\n|-|-|-|-|")
    for number in numbers:
        rows.append(grade(theirs, number))
        say(row.format(**rows[-1]), flush=True)
    total, most = (sum(row[key] for row in rows) for key in ("points", "of"))
    print(json.dumps(rows) if args.json else f"| all | {total:g} of {most} | | |")
    return total < most


if __name__ == "__main__":
    sys.exit(main())
