"""Which functions are an exercise, how to take them out of the core, and how to put a student's in.

Code is cut by indentation alone, so it may be broken: only the broken function is lost.
"""

import re
import shlex
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
CORE = "diffusion_forcing.py"
FOREIGN = """
try:
    exec({text!r})
except BaseException as error:
    def broken(*_, problem=f"{{type(error).__name__}}: {{error}}", **__):
        raise RuntimeError(problem)
    {name} = broken
"""


def read(path):
    return path.read_text("utf-8", errors="replace")


def exercises():
    """-> {number: (names, options of pytest, points)}, from the table in README."""
    row = r"(?m)^\| (\d) \| ([^|]*) \|[^|]*\| `pytest ([^`]*)` \| \d+ \| (\d+) \|$"
    return {int(number): (re.findall(r"`([\w.]+)`", names), shlex.split(options), int(points))
            for number, names, options, points in re.findall(row, read(HERE / "README.md"))}


def unwritten():
    """-> "exercise 5: scheduling_matrix" and so on: what the core of this project lacks."""
    return re.findall(r'raise NotImplementedError\("(exercise \d: [\w.]+)"\)', read(HERE / CORE))


def definitions(code, owner=""):
    """-> {name: text} of the functions, classes, constants and imports in a module or, with an
    owner, in a class of it. The name of an import is its first line."""
    indent = "    " if owner else ""
    code = definitions(code).get(owner, "") if owner else code
    kinds = (r"(?:async +)?(?:def|class) +(\w+)", r"(\w+)(?:[\w, ]*|: *[^=\n]+)=[^=]",
             r"((?:from .+ )?import .+)")
    found, text = {}, ""
    for part in re.split(rf"(?m)^(?={indent}(?!(?:else|elif|except|finally)\b)[^\s#)\]}}])", code):
        text += part
        name = re.search(rf"(?m)^{indent}(?:{'|'.join(kinds)})", text)
        if name:  # without comments at the end: they belong to what follows
            found[name[name.lastindex]] = re.sub(r"(\n[ \t]*(#.*)?)*\Z", "\n", text, count=1)
        if name or not text.startswith(f"{indent}@"):  # a decorator belongs to what follows, too
            text = ""
    return found


def without(code, number):
    """The core without the bodies of an exercise. Docstrings stay."""
    for name in exercises()[number][0]:
        owner, _, function = name.rpartition(".")
        text = definitions(code, owner)[function]
        head, indent = re.match(r'(?s)(( *).*?:\n(?: +""".*?"""\n)?)', text).groups()
        error = f'NotImplementedError("exercise {number}: {name}")'
        code = code.replace(text, f"{head}{indent}    raise {error}\n")
    return code


def graft(ours, theirs, number):
    """Our core with the functions of an exercise from theirs, and with all that is new beside them.
    It stands at the end, statement by statement, so that what fails there fails alone."""
    names, code = exercises()[number][0], without(ours, number)
    for owner in sorted({name.rpartition(".")[0] for name in names} | {""}):
        known = definitions(ours, owner)
        for name, text in definitions(theirs, owner).items():
            whole = f"{owner}.{name}".strip(".")
            if owner:
                text = f"class theirs:\n{text}{whole} = vars(theirs)['{name}']\n"
            if whole in names or name not in known:
                code += FOREIGN.format(text=text, name=whole if name.isidentifier() else "_")
    return code
