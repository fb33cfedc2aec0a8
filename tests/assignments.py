"""Course assignments: a hand-out without the solutions, and a grader that says what is wrong.

    python tests/assignments.py list [NUMBERS]              the table, or exercises with all rubrics
    python tests/assignments.py handout DIR [NUMBERS] [--solved NUMBERS]     what students get
    python tests/assignments.py grade DIR [NUMBERS] [--json results.json]    for Gradescope
    python tests/assignments.py band RUN RUN ...            the milestone's expected figures

The exercises are in tests/exercises/table.py, their checks beside it: test_public.py goes into the
hand-out, test_hidden.py stays here. Every exercise is blank in every hand-out, whether it is set or
not, but for those that --solved shows. Each is graded by itself: the student's function stands in a
working implementation, in a process of its own that has no solution to import (grading.py).
"""
import ast
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
EXERCISES_DIR = ROOT / "tests" / "exercises"
sys.path[:0] = [str(ROOT), str(EXERCISES_DIR)]

try:
    import numpy as np

    from grading import CPU_SECONDS, file_tree, find, helpers, library_names, parse, used_names
    from model import InputError, Parser, read_json, run_cli, write_atomic
    from table import (ALL_EXERCISES, COMMAND, EXERCISES, MILESTONE, Exercise, Milestone,
                       OpenExercise)
except ModuleNotFoundError as error:
    sys.exit(f"assignments.py: {error.name} is not installed: activate the course's environment, "
             "or pip install -r requirements.txt")

WALL_SECONDS = 5 * CPU_SECONDS  # for an exercise that waits, or on a busy machine
FILES = ("model.py", "masking.py", "distill.py", "train.py", "glue.py", "stats.py")

# --- the list -------------------------------------------------------------------------------------

BY_NUMBER = {exercise.number: exercise for exercise in ALL_EXERCISES}


def chosen(numbers: list[int]) -> list:
    """Returns the exercises of these numbers in order; of no numbers, all. Raises InputError."""
    for number in numbers:
        if number not in BY_NUMBER:
            raise InputError(f"there is no exercise {number}: they are 1 to {max(BY_NUMBER)}")
    return [BY_NUMBER[number] for number in sorted(set(numbers or BY_NUMBER))]


def show_list(numbers: list[int]):
    """Prints the table, or the exercises of these numbers with all that is the lecturer's."""
    if numbers:
        exercises = chosen(numbers)
        print("\n\n".join(described(e, exercises, lecturer=True) for e in exercises))
        return
    print(f"{'':>2}  {'exercise':43} {'points':>6} {'minutes':>7}  {'':3}  {'file':10}  builds on")
    for exercise in ALL_EXERCISES:
        e, last = exercise, "     graded by its rubric"
        if not isinstance(e, OpenExercise):
            stars, file = ("*" * e.difficulty, e.file) if isinstance(e, Exercise) else ("", "a run")
            last = f"{stars:3}  {file:10}  {', '.join(map(str, e.builds_on))}".rstrip()
        print(f"{e.number:2}  {e.title:43} {e.points:6} {e.minutes:7}  {last}")


# --- the milestone's band -------------------------------------------------------------------------

FIGURES = EXERCISES_DIR / "milestone.json"  # the exam of the reference's runs; made by `band`
PYTHONS = {"log_likelihood": 0.1, "accuracy": 0.02}  # what another Python's texts may shift
SETTINGS = ("masking", "mask_rate", "corruption", "kd_weight", "corpus", "corpus_fraction",
            "vocab_size", "seq_len", "preset", "init", "teacher", "steps", "batch_size", "lr")


def bands() -> dict[str, tuple[float, float, float, float]]:
    """Returns of each figure of the exam the mean and the sd of the reference's runs, and the
    lowest and the highest value that a right solution may have; {} before there are two runs.

    It is the interval in which a further run falls with probability 99%, mean ± t* sd √(1 + 1/n),
    wider by what another Python's documentation may shift."""
    from stats import mean_sd, t_critical
    runs, found = read_json(FIGURES)["runs"], {}
    for name, shift in PYTHONS.items() if len(runs) > 1 else ():
        mean, sd = mean_sd([run[name] for run in runs])
        reach = t_critical(len(runs) - 1, 0.01) * sd * math.sqrt(1 + 1 / len(runs)) + shift
        found[name] = (mean, sd, mean - reach, mean + reach)
    return found


def write_band(runs: list[Path]):
    """Writes FIGURES from finished runs of COMMAND with other seeds. Raises InputError where they
    differ in one of SETTINGS."""
    records = [read_json(run / "exam.json") for run in runs]
    settings = [{name: record["args"].get(name) for name in SETTINGS} for record in records]
    frequency = -records[0]["baseline"]["log_likelihood"]
    for run, other in zip(runs, settings):
        if other != settings[0]:
            raise InputError(f"{run} has other settings than {runs[0]}: give runs that differ in "
                             "their seed alone")
    lines = [{"seed": record["seed"]} | {name: record["last"][name] for name in PYTHONS}
             for record in records]
    found = {"settings": settings[0], "frequency_alone": frequency, "runs": lines}
    write_atomic(FIGURES, json.dumps(found, indent=1) + "\n")
    print(band_table())


def band_table() -> str:
    """Returns the table of what the exam must say, Markdown."""
    found = bands()
    if not found:
        return "(The expected figures are not there yet: your lecturer has them.)"
    lines = ["| the exam's \"this model\" | the reference, over seeds | yours |", "|---|---|---|"]
    frequency = read_json(FIGURES)["frequency_alone"]
    mean, sd, low, high = (abs(x) for x in found["log_likelihood"])
    lines.append(f"| loss (nats) | {mean:.2f} ± {sd:.2f} | {high:.2f} to {low:.2f} |")
    mean, sd, low, high = (100 * x for x in found["accuracy"])
    lines += [f"| accuracy | {mean:.1f}% ± {sd:.1f} | {low:.1f}% to {high:.1f}% |",
              f"| loss of \"word-piece frequency alone\" | {frequency:.2f} | about the same |"]
    return "\n".join(lines)


def milestone_fault(folder: Path) -> str | None:
    """Returns what is wrong with the run that was handed in, or None."""
    from train import exam_metrics
    path, reference = folder / "milestone" / "exam.json", read_json(FIGURES)
    if not path.is_file():
        return "not done yet"
    try:
        record = read_json(path)
        figures = exam_metrics(**{name: np.array(value) for name, value in record["dev"].items()})
        before, last = record["baseline"]["log_likelihood"], record["last"]
        settings = {name: record["args"].get(name) for name in SETTINGS}
        whole = all(abs(figures[name] - last[name]) < 1e-6 for name in PYTHONS)
    except (InputError, KeyError, TypeError, ValueError, AttributeError):
        return "milestone/exam.json is not one that train.py wrote"
    if not whole:
        return "milestone/exam.json does not fit itself: its figures are not those of its windows"
    for name, value in reference["settings"].items():
        if settings[name] != value:
            return f"the run has {name} {settings[name]}, and not {value}: {COMMAND}, and no " \
                   "other option than --seed"
    for name, (_, _, low, high) in bands().items():
        if not low <= figures[name] <= high:
            why = "this is not the run of a right solution"
            if figures["log_likelihood"] < before + PYTHONS["log_likelihood"]:
                why = "no better than word frequencies alone, so it learnt nothing of the context"
            return f"{name} is {figures[name]:.3f}, outside {low:.3f} to {high:.3f}: {why}"
    return None if bands() else "the expected figures are not there yet"


# --- the hand-out ---------------------------------------------------------------------------------

def body_lines(file: str, name: str, docstring: bool = False) -> tuple[int, int, int]:
    """Returns where a function's body is in a file of ours: its first line, after the docstring or
    with it, its last line (both counted from 1), and its indentation."""
    body = find(file_tree(str(ROOT / file)), name).body
    documented = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    first = body[0].end_lineno + 1 if documented and not docstring else body[0].lineno
    lines = (ROOT / file).read_text().splitlines()
    while lines[first - 2].lstrip().startswith("#"):  # a comment above the first statement
        first -= 1
    return first, body[-1].end_lineno, body[0].col_offset


def rewritten(file: str, bodies: dict[str, str]) -> str:
    """Returns the text of a file of ours with other bodies of functions: function -> its new body.
    A comment goes in front of the body that is there; a body with a docstring replaces that too."""
    lines, places = (ROOT / file).read_text().splitlines(), []
    for name, body in bodies.items():
        first, last, indent = body_lines(file, name, docstring=body.startswith('"""'))
        places.append((first, first - 1 if body.startswith("#") else last, " " * indent, body))
    for first, last, indent, body in sorted(places, reverse=True):  # the line numbers stay right
        lines[first - 1:last] = textwrap.indent(body, indent).splitlines()
    return "\n".join(lines) + "\n"


def blank(message: str, docstring: str = "") -> str:
    """Returns the body of a function that is to be written, under another docstring if there is
    one."""
    error = f"raise NotImplementedError({json.dumps(message, ensure_ascii=False)})"
    return f'"""{docstring.strip()}\n"""\n{error}' if docstring else error


def item(text: str) -> str:
    """Returns an item of a Markdown list."""
    return textwrap.fill(f"- {text}", 100, subsequent_indent="  ")


def assignment(exercises: list, solved: list) -> str:
    """Returns ASSIGNMENT.md."""
    files = ", ".join(FILES) + ", milestone/exam.json" * (MILESTONE in exercises)
    hand_in = item(f"Hand in {files}; not baseline_2023.py. Only the named functions count, and "
                   "what they use of your own: imports, functions, classes and constants at the "
                   "top level of the same file, and methods of the same class."
                   + " With exercises 22 to 28 hand in your text, too, and the file of your "
                   "strategy." * any(isinstance(e, OpenExercise) for e in exercises))
    parts = [f"""# Assignment

{sum(e.points for e in exercises)} points. Most exercises are one to three functions without bodies;
their docstrings give shapes, units and errors. Write a body where it says
`raise NotImplementedError("exercise N: ...")`. A blank helper is yours to write or to leave; what
"{NOT_SET}" stays blank.

Check yourself with the public part of an exercise's checks, `python -m pytest -m exercise_6` for
exercise 6. The grader has further checks: of probabilities, of extreme inputs, of gradients, of
what is passed on. It grades each exercise by itself, in a working implementation: a mistake in one
costs no point in another. Your own checks of an exercise fail until those under "Builds on" are
written.

{hand_in}
- The type of a number costs no point: Python's, numpy's or torch's, of any precision that is
  enough, in a list, a tuple or an array.
- Random numbers come from the `generator` that a function is given. No check asks for one
  particular draw; distributions are compared.
- An exercise has {CPU_SECONDS} seconds. Code that prints, exits, writes files or starts programs
  has no points: take such lines out.
- "Ours" marks a definition that is this project's, because the paper leaves it open or its text was
  not at hand. B is the batch, L tokens, M and N chosen tokens, H the width, V the vocabulary.
- [E] is Srinivasagan et al. 2026, arXiv 2605.28526; [T] is Abdurrahman et al., arXiv 2303.15619.\
"""]
    parts += [described(exercise, [*exercises, *solved]) for exercise in exercises]
    return "\n\n".join(parts) + "\n"


def described(exercise, here: list, lecturer: bool = False) -> str:
    """Returns an exercise as Markdown. here: those that the hand-out holds; lecturer: with what
    students do not get."""
    title = f"## {exercise.number}. {exercise.title}"
    if isinstance(exercise, OpenExercise):
        time = f"{exercise.minutes} minutes" if exercise.explains else \
            f"{exercise.minutes // 60} hours"
        lines = [title, "", f"{exercise.points} points, about {time}, graded by a rubric.",
                 exercise.text, ""]
        if lecturer or not exercise.explains:
            lines += [item(f"{points} point{'s' * (points > 1)}: {what}")
                      for points, what in exercise.rubric]
        return "\n".join(lines + [exercise.key] * lecturer).rstrip()
    head = f"{exercise.points} points, about {exercise.minutes} minutes"
    lines = [title, "", head, exercise.text, ""]
    if isinstance(exercise, Exercise):
        names = ", ".join(f"`{name}`" for name in exercise.functions)
        stars = "*" * exercise.difficulty
        lines[2:3] = [f"{head}, difficulty {stars} · {names} in {exercise.file}", "",
                      f"Source: {exercise.source}."]
    else:
        lines += [band_table(), ""]
    if exercise.builds_on:
        lines.append("Builds on " + ", ".join(map(str, exercise.builds_on)) + ".")
    known = {e.number for e in here}
    missing = [str(number) for number in exercise.builds_on if number not in known]
    if missing and not lecturer:
        lines.append(f"This hand-out does not set {', '.join(missing)}. Until those are written, "
                     "by you (without points) or by your lecturer, what runs them stops with 'is "
                     "not set in this hand-out'; the grader uses its own.")
    if isinstance(exercise, Milestone):
        lines += ["", f"Check the run: `python -m pytest -m exercise_{exercise.number}`"]
        return "\n".join(lines)
    if exercise.forbidden:
        calls = ", ".join(f"`{name}`" for name in exercise.forbidden)
        lines.append(f"Not allowed: {calls}.")
    lines += ["", *(item(f"Hint: {hint}") for hint in exercise.hints), "",
              f"Check: `python -m pytest -m exercise_{exercise.number}`"]
    return "\n".join(lines).replace("\n\n\n", "\n\n")


HANDOUT_README = """# minimask, the hand-out

A masked language model from scratch, five ways to choose which tokens it must guess,
distillation, GLUE, and the statistics to compare them. Some functions are yours to write: see
ASSIGNMENT.md.

    pip install -r requirements.txt
    python -m pytest -m exercise_1

| file | holds |
|---|---|
| model.py | the encoder and its heads |
| masking.py | the strategies: what to mask |
| distill.py | distillation |
| train.py | corpus, tokenizer, pretraining |
| glue.py | GLUE: loading, metrics, fine-tuning |
| stats.py | paired statistics over seeds |

A strategy of your own is a class in a file of its own, such as this falling_rate.py:

{example}
`python train.py --masking falling_rate.py:FallingRate` trains with it. `masking.Strategy` and
`masking.Batch` say what else it may look at.
"""


NOT_SET, GIVEN = "is not set in this hand-out", "the course's own solution"
HAND_IN = f"\n# exercise {MILESTONE.number}: hand in milestone/exam.json, too\n"


def handout_texts(exercises: list, solved: list) -> dict[str, str]:
    """Returns the files of the hand-out, by path: `exercises` are set, `solved` are shown."""
    bodies = {file: {} for file in FILES}
    for exercise in EXERCISES:
        for file, name in exercise.places:
            mark = f"exercise {exercise.number}: {name}"
            if exercise in solved:
                bodies[file][name] = f"# {mark}, {GIVEN}"
                continue
            if exercise not in exercises:
                mark += f" {NOT_SET}"
            elif name not in exercise.functions:
                mark += " is a helper, yours to write or to leave"
            bodies[file][name] = blank(mark, exercise.docstrings.get(name, ""))
    texts = {file: rewritten(file, new) for file, new in bodies.items()}
    texts["train.py"] += HAND_IN * (MILESTONE in exercises)  # so that grade knows that it was set
    texts |= {name: (ROOT / name).read_text() for name in ("requirements.txt", "LICENSE")}
    markers = "".join(f"    exercise_{e.number}: {e.title}\n" for e in (*EXERCISES, MILESTONE))
    texts["pytest.ini"] = f"[pytest]\ntestpaths = tests\npythonpath = .\nmarkers =\n{markers}"
    gallery = EXERCISES_DIR / "strategies"
    example = textwrap.indent((gallery / "falling_rate.py").read_text(), "    ")
    texts["README.md"] = HANDOUT_README.format(example=example)
    texts["baseline_2023.py"] = (gallery / "baseline_2023.py").read_text()
    texts["ASSIGNMENT.md"] = assignment(exercises, solved)
    texts["tests/test_public.py"] = (EXERCISES_DIR / "test_public.py").read_text()
    return texts


def handout(folder: Path, numbers: list[int], solved_numbers: list[int] = ()):
    """Writes the hand-out; of no numbers, of all that are not solved. Raises InputError where the
    folder is not empty or an exercise is both set and solved."""
    solved = chosen(solved_numbers) if solved_numbers else []
    exercises = [e for e in chosen(numbers) if numbers or e not in solved]
    if both := [str(e.number) for e in exercises if e in solved]:
        raise InputError(f"both set and solved: {', '.join(both)}: choose one")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty: choose another folder")
    for name, text in handout_texts(exercises, solved).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    print(f"{folder}: {len(exercises)} exercises, {sum(e.points for e in exercises)} points; to "
          f"grade: grade DIR {' '.join(str(e.number) for e in exercises)}")


# --- the grader -----------------------------------------------------------------------------------

class Result(NamedTuple):
    exercise: Exercise | Milestone
    sentence: str | None  # what is wrong; None where nothing is

    @property
    def points(self) -> int:
        return 0 if self.sentence else self.exercise.points


def is_undone(function: ast.FunctionDef) -> bool:
    """Returns whether a body is still the hand-out's: a docstring and a NotImplementedError."""
    body = [node for node in function.body if not (isinstance(node, ast.Expr)
                                                   and isinstance(node.value, ast.Constant))]
    return len(body) == 1 and isinstance(body[0], ast.Raise) and "NotImplementedError" in \
        used_names(body[0])


def forbidden_calls(exercise: Exercise, tree: ast.Module, reference: ast.Module) -> set[str]:
    """Returns the library calls that the exercise does not allow and the student's code has.

    The reference's own body is exempt: the product may use a fused kernel where a student shows the
    formula."""
    added, methods = helpers(tree, reference, list(exercise.functions))
    code = added + [node for _, node in methods]
    code += [find(tree, name) for name in exercise.functions
             if ast.dump(find(tree, name)) != ast.dump(find(reference, name))]
    checks = {"test_hidden", "test_public", "grading"}  # some compute what they ask for
    return set().union(*map(library_names, code)) & {*exercise.forbidden, *checks}


def written(exercise: Exercise, tree: ast.Module) -> list[str]:
    """Returns the functions that belong together: the exercise's, and its helpers in the same file
    that are not blank any more."""
    return [*exercise.functions,
            *(name for file, name in exercise.places
              if file == exercise.file and name not in exercise.functions
              and (node := find(tree, name)) and not is_undone(node))]


def fault(exercise: Exercise, path: Path) -> str | None:
    """Returns what is wrong with an exercise of a student's file before it is run, or None."""
    if not path.is_file():
        return f"{exercise.file} is not there: hand it in too"
    tree, problems = parse(path.read_bytes())
    for name in exercise.functions:
        if find(tree, name) is None:
            own = problems.get(name) or problems.get(name.partition(".")[0])
            rest = "".join(f"; {why}" for why in list(problems.values())[:1])
            return f"{exercise.file}, {own}" if own else \
                f"{exercise.file} has no function {name}{rest}"
    undone = [name for name in exercise.functions if is_undone(find(tree, name))]
    if undone:
        rest = f": {', '.join(undone)}" if len(undone) < len(exercise.functions) else ""
        return f"not done yet{rest}"
    reference = file_tree(str(ROOT / exercise.file))
    if calls := forbidden_calls(exercise, tree, reference):
        return f"it uses {', '.join(sorted(calls))}, which the exercise does not allow: write " \
               "the formula out"
    return None


def without_solution(exercise: Exercise, folder: Path):
    """Writes the implementation and the checks into a new folder, without the exercise's
    functions."""
    folder.mkdir()
    for file in FILES:
        names = [name for place, name in exercise.places if place == file]
        mark = f"exercise {exercise.number} is not here"
        (folder / file).write_text(rewritten(file, dict.fromkeys(names, blank(mark))))
    for name in ("grading.py", "test_public.py", "test_hidden.py"):
        shutil.copy(EXERCISES_DIR / name, folder)


def run_alone(exercise: Exercise, path: Path, names: list[str], folder: Path,
              seconds: float) -> str | None:
    """Runs an exercise's checks in a process of its own. Returns what is wrong, or None.

    path: the student's file; names: the functions taken from it; folder: of `without_solution`."""
    command = [sys.executable, "grading.py", str(exercise.number), str(path), *names]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    process = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"it does not end within {seconds:.0f} s: is there an endless loop?"
    if process.returncode == -24:  # SIGXCPU
        return f"it does not end within {CPU_SECONDS} s: is there an endless loop?"
    try:
        return json.loads(output.decode().splitlines()[-1])
    except (IndexError, ValueError):
        return f"it ended the process (status {process.returncode}) before the checks were over"


def grade(folder: Path, exercises: list[Exercise | Milestone],
          seconds: float = WALL_SECONDS) -> list[Result]:
    """Grades the exercises, two at a time. Raises InputError where there is no such folder."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}")
    found = {}
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(2) as pool:
        for exercise in exercises:
            if isinstance(exercise, Milestone):
                found[exercise.number] = milestone_fault(folder)
                continue
            path = (folder / exercise.file).resolve()
            found[exercise.number] = wrong = fault(exercise, path)
            if wrong is None:
                # Everything is parsed in this thread: two at once make CPython 3.11's parser fail.
                names = written(exercise, parse(path.read_bytes())[0])
                place = Path(work) / str(exercise.number)
                without_solution(exercise, place)
                found[exercise.number] = pool.submit(run_alone, exercise, path, names, place,
                                                     seconds)
        return [Result(exercise, wrong.result() if isinstance(wrong, Future) else wrong)
                for exercise, wrong in zip(exercises, found.values())]


def was_set(exercise: Exercise, folder: Path) -> bool:
    """Returns whether a hand-out asked for an exercise. One that was not set is blank and says so;
    one that was shown carries a comment, and so does train.py where the milestone was set."""
    path = folder / ("train.py" if isinstance(exercise, Milestone) else exercise.file)
    source = path.read_bytes() if path.is_file() else b""
    if isinstance(exercise, Milestone):
        return HAND_IN.strip() in source.decode(errors="replace") or (folder / "milestone").is_dir()
    tree, lines = parse(source)[0], source.decode(errors="replace").split("\n")
    functions = [node for name in exercise.functions if (node := find(tree, name))]
    marks = (NOT_SET, GIVEN)
    return not any(mark in line for node in functions
                   for line in lines[node.lineno - 1:node.end_lineno] for mark in marks)


def gradescope(results: list[Result]) -> dict:
    """Returns Gradescope's results.json."""
    return {"tests": [{
        "number": str(result.exercise.number), "name": result.exercise.title,
        "score": result.points, "max_score": result.exercise.points,
        "status": "failed" if result.sentence else "passed",
        "output": result.sentence or "right",
    } for result in results]}


def show_results(results: list[Result]):
    """Prints a line for each exercise, and the sum."""
    for result in results:
        points = f"{result.points}/{result.exercise.points}"
        print(f"{result.exercise.number:2}  {result.exercise.title:36} {points:>6}  "
              f"{result.sentence or ''}".rstrip())
    total = f"{sum(r.points for r in results)}/{sum(r.exercise.points for r in results)}"
    print(f"    {'':36} {total:>6}")


# --- command line ---------------------------------------------------------------------------------

def parse_args(argv=None):
    """Returns the arguments."""
    parser = Parser(prog="assignments.py", description="Exercises: list, hand out, grade.")
    commands = parser.add_subparsers(dest="command", required=True,
                                     metavar="{list,handout,grade,band}")
    command = commands.add_parser("list", help="the table of exercises, or some with their rubrics")
    command.add_argument("numbers", type=int, nargs="*", metavar="NUMBERS")
    for name, text in (("handout", "write what students get into a new folder"),
                       ("grade", "grade a student's folder")):
        command = commands.add_parser(name, help=text)
        command.add_argument("folder", type=Path, metavar="DIR")
        command.add_argument("numbers", type=int, nargs="*", metavar="NUMBERS",
                             help="exercises (default: all; grade: all that DIR's hand-out set)")
        if name == "handout":
            command.add_argument("--solved", type=int, nargs="+", default=[], metavar="NUMBERS",
                                 help="show our solutions of these")
    command.add_argument("--json", type=Path, metavar="FILE",
                         help="also write Gradescope's results")
    command = commands.add_parser("band", help="measure what the milestone's exam must say")
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN",
                         help="the reference's runs with seeds 0, 1, ...: finished, all else equal")
    return parser.parse_args(argv)


def main(argv=None):
    """Runs one of the four commands."""
    args = parse_args(argv)
    if args.command == "list":
        return show_list(args.numbers)
    if args.command == "band":
        return write_band(args.runs)
    if args.command == "handout":
        return handout(args.folder, args.numbers, args.solved)
    exercises = [e for e in chosen(args.numbers) if not isinstance(e, OpenExercise)
                 and (args.numbers or was_set(e, args.folder))]
    if args.numbers and not exercises:
        raise InputError("only a reader can grade these: by their rubric")
    results = grade(args.folder, exercises)
    show_results(results)
    if args.json:
        write_atomic(args.json, json.dumps(gradescope(results), indent=1) + "\n")


if __name__ == "__main__":
    run_cli(main)
