"""Puts the functions of one exercise into a working implementation and runs its checks.

`assignments.py grade` starts a copy of this file as a process of its own for every exercise,
because the code that it runs is a student's: it may never end, use up the memory, print, exit or
write files. The folder of the copy holds the implementation without this exercise's functions, so
that there is no solution to import.

    python grading.py NUMBER DIR/masking.py token_entropy

The last line of the output is JSON: null where every check holds, or the sentence of the first that
does not. The limits below stop mistakes, not malice; a course with strangers needs a container too.

A *tree* is a parsed Python file. A function is named as in "Typhoon.rates" or "budget".
"""
import ast
import functools
import importlib
import io
import json
import os
import re
import sys
import tempfile
import traceback
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch

MODULES = ("model", "masking", "distill", "train", "glue", "stats")
CPU_SECONDS = 60  # for one exercise; the reference needs about five
MEMORY = 6 * 2 ** 30  # bytes of data; the reference needs less than one GiB
FORBIDDEN = {  # audit event: what a student did, in words
    "os.remove": "removes a file", "os.rename": "renames a file", "os.mkdir": "makes a folder",
    "os.rmdir": "removes a folder", "os.truncate": "writes a file", "os.link": "writes a file",
    "os.symlink": "writes a file", "os.chmod": "changes a file",
    "shutil.rmtree": "removes a folder",
    "os.system": "starts a program", "os.exec": "starts a program", "os.fork": "starts a process",
    "os.posix_spawn": "starts a program", "subprocess.Popen": "starts a program",
    "os.kill": "sends a signal", "os.killpg": "sends a signal",
    "socket.connect": "opens a connection",
}


# --- functions in trees ---------------------------------------------------------------------------

def parse(source: bytes) -> tuple[ast.Module, dict[str, str]]:
    """Returns a file's tree, and for each function or class that is no Python what is wrong there.

    One mistake costs one function: where the file cannot be read as a whole, each statement at its
    left edge is read by itself, and of a class each method."""
    try:
        return ast.parse(source), {}
    except (SyntaxError, ValueError):  # ValueError: a zero byte
        lines = source.decode(errors="replace").split("\n")
        body, problems = readable_parts(lines, 0, len(lines))
        return ast.Module(body, []), problems


@functools.cache
def file_tree(path: str) -> ast.Module:
    """Returns the tree of a file that nobody changes."""
    return ast.parse(Path(path).read_bytes())


def readable_parts(lines: list[str], first: int, end: int,
                   owner: str = "") -> tuple[list[ast.stmt], dict[str, str]]:
    """Returns the statements of lines[first:end] that can be read, and what is wrong with others.
    owner: the class whose methods these are."""
    begins = re.compile(r" {4}[\w@]" if owner else r"[\w@]").match
    starts = [i for i in range(first, end)
              if begins(lines[i]) and not (i > first and lines[i - 1].lstrip().startswith("@"))]
    body, problems = [], {}
    for start, stop in zip(starts, [*starts[1:], end]):
        part = "\n".join(lines[start:stop])
        # Empty lines in front keep the line numbers.
        code = "\n" * (start - 1) + f"class {owner}:\n{part}" if owner else "\n" * start + part
        try:
            nodes = ast.parse(code).body
            body += nodes[0].body if owner else nodes
            continue
        except (SyntaxError, ValueError) as error:
            line = getattr(error, "lineno", None) or start + 1
            why = f"line {line}: {getattr(error, 'msg', error)}"
        if defined := re.search(r"^ *(def|class) (\w+)", part, re.MULTILINE):
            kind, name = defined.groups()
            problems[f"{owner}.{name}".lstrip(".")] = why
            if kind == "class":
                methods, inside = readable_parts(lines, start + 1, stop, name)
                body.append(ast.ClassDef(name, [], [], methods, []))
                problems |= inside
    return body, problems


def definitions(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """Returns what a module or a class defines at its top level, by name; the last one counts."""
    found = {}
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                found[alias.asname or alias.name.partition(".")[0]] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for part in ast.walk(node):
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    found[part.id] = node
    return found


def find(tree: ast.Module, name: str) -> ast.FunctionDef | None:
    """Returns the definition of a function, None where the tree has none."""
    node = tree
    for part in name.split("."):
        node = definitions(node.body).get(part)
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            return None
    return node if isinstance(node, ast.FunctionDef) else None


def used_names(node: ast.AST) -> set[str]:
    """Returns every name and attribute that a piece of code mentions."""
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return names | {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}


def library_names(node: ast.AST) -> set[str]:
    """Returns every name that a piece of code imports or takes from a module. A variable may be
    called as it likes, and so may a method of the student's own."""
    names = set()
    for part in ast.walk(node):
        if isinstance(part, (ast.Import, ast.ImportFrom)):
            paths = [getattr(part, "module", None) or "", *(alias.name for alias in part.names)]
            names.update(name for path in paths for name in path.split("."))
        elif isinstance(part, ast.Attribute) and ast.unparse(part.value) != "self":
            names.add(part.attr)
    return names


def helpers(tree: ast.Module, reference: ast.Module, names: list[str]) -> tuple[list, list]:
    """Returns what a student added and the functions `names` use: (top-level nodes, methods).

    A method comes with the name of its class. What the reference defines itself is left out: only
    an exercise's own functions may replace the reference's."""
    theirs, ours = definitions(tree.body), definitions(reference.body)
    new = {name: node for name, node in theirs.items() if name not in ours}
    methods = []
    for owner in dict.fromkeys(name.partition(".")[0] for name in names if "." in name):
        known = definitions(find_class(reference, owner).body)
        for name, node in definitions(find_class(tree, owner).body).items():
            if name not in known and isinstance(node, ast.FunctionDef):
                methods.append((owner, node))
    waiting = [find(tree, name) for name in names] + [node for _, node in methods]
    wanted = set()
    while waiting:
        for name in used_names(waiting.pop()) & (new.keys() - wanted):
            wanted.add(name)
            waiting.append(new[name])
    nodes = {id(new[name]): new[name] for name in wanted}
    return [node for node in tree.body if id(node) in nodes], methods


def find_class(tree: ast.Module, name: str) -> ast.ClassDef:
    """Returns a class of the tree."""
    return definitions(tree.body)[name]


# --- the student's functions in the reference's place ---------------------------------------------

@contextmanager
def installed(tree: ast.Module, path: str, names: list[str]):
    """The functions `names` of a student's file stand in for the reference's, in all its modules.

    The file is not run: only these functions, and what the student added for them, are compiled
    into the reference's module. Afterwards everything is as it was."""
    module = importlib.import_module(Path(path).stem)
    reference = file_tree(module.__file__)
    added, methods = helpers(tree, reference, names)
    space, before = vars(module), dict(vars(module))
    undo = []

    def compiled(node):
        local = {}
        exec(compile(ast.Module([node], []), path, "exec"), space, local)
        return local

    def replace(owner, name, value):
        undo.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, value)

    try:
        for node in added:
            space.update(compiled(node))
        for owner, node in methods:
            replace(getattr(module, owner), node.name, compiled(node)[node.name])
        for name in names:
            owner, _, function = name.rpartition(".")
            new = compiled(find(tree, name))[function]
            if owner:
                replace(getattr(module, owner), function, new)
                continue
            old = before[function]
            for other in filter(None, map(sys.modules.get, MODULES)):
                if vars(other).get(function) is old:  # `from masking import budget` made a copy
                    replace(other, function, new)
        yield
    finally:
        for owner, name, value in reversed(undo):
            delattr(owner, name) if value is None else setattr(owner, name, value)
        for name in space.keys() - before.keys():
            del space[name]


# --- the checks -----------------------------------------------------------------------------------

def checks(number: int) -> list:
    """Returns the checks of an exercise: the public ones, then the grader's own."""
    found = []
    for name in ("test_public", "test_hidden"):
        for value in list(vars(importlib.import_module(name)).values()):
            marks = [mark.name for mark in getattr(value, "pytestmark", ())]
            if f"exercise_{number}" in marks and value not in found:
                found.append(value)
    return found


def first_failure(number: int, path: str) -> str | None:
    """Returns the sentence of the first check that fails, None where all hold.

    `path` is the student's file, for the line numbers."""
    for check in checks(number):
        torch.manual_seed(0)
        printed = io.StringIO()
        try:
            with redirect_stdout(printed), redirect_stderr(io.StringIO()):
                check()
        except (Exception, SystemExit) as error:
            return sentence(error, path)
        if printed.getvalue():
            line = printed.getvalue().splitlines()[0][:60]
            return f"it prints {line!r}: take the print out"
    return None


def sentence(error: BaseException, path: str) -> str:
    """Returns what is wrong: the check's own words, or what the student's code raised and where."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    where = f" ({Path(path).name}, line {lines[-1].lineno})" if lines else ""
    message = " ".join(str(error).split())[:300]
    if isinstance(error, SystemExit):
        return f"it calls exit(){where}: return the result instead"
    if isinstance(error, AssertionError) and not lines:
        return message
    if isinstance(error, MemoryError) or "can't allocate memory" in message:
        return f"it needs more memory than the grader has{where}"
    return f"it raises {type(error).__name__}{where}: {message}"


# --- the process of its own -----------------------------------------------------------------------

def limit_resources():
    """Bounds this process's time, memory and files, where the system can do so."""
    try:
        import resource
    except ImportError:  # Windows has no such limits; there the parent's clock alone stops a loop
        return
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # pipes are not files
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def watch(path: str) -> list[str]:
    """Refuses from now on what an exercise has no need of, in calls that come from the student's
    file. Returns the list that records offences."""
    offences = []

    def from_student():
        frame = sys._getframe()
        while frame and frame.f_code.co_filename != path:
            if "importlib" in frame.f_code.co_filename:  # PyTorch makes folders when it loads parts
                return False
            frame = frame.f_back
        return frame is not None

    def hook(event, details):
        what = FORBIDDEN.get(event)
        if event == "open":
            _, _, flags = details
            writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            what = "writes a file" if flags & writing else None
        if what and from_student():
            offences.append(f"it {what}: an exercise computes its result, and nothing else")
            raise PermissionError(offences[-1])

    sys.addaudithook(hook)
    return offences


def main():
    """Prints the verdict on one exercise as the last line."""
    number, path, names = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    verdict = os.fdopen(os.dup(1), "w")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    sys.dont_write_bytecode = True
    tempfile.tempdir = os.getcwd()  # else the first use writes a file, to see which folder is good
    torch.set_num_threads(1)
    tree, _ = parse(Path(path).read_bytes())
    checks(number)  # imports everything, before the doors close
    limit_resources()
    offences = watch(path)
    try:
        with installed(tree, path, names):
            result = first_failure(number, path)
    except (Exception, SystemExit) as error:  # raised by a decorator or a default value
        result = sentence(error, path)
    verdict.write("\n" + json.dumps(offences[0] if offences else result) + "\n")
    verdict.flush()
    os._exit(0)  # whatever threads and exit handlers the student's code left behind


if __name__ == "__main__":
    main()
