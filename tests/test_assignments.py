"""Every wrong solution loses its points and no right one does; the hand-out holds no solution."""
import ast
import importlib
import json
import operator
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import assignments
import grading
import masking
from assignments import (ALL_EXERCISES, EXERCISES, EXERCISES_DIR, FILES, MILESTONE, ROOT, Exercise,
                         grade, handout)
from model import InputError
from solutions import SOLUTIONS

with warnings.catch_warnings():  # of markers that the exercises' own conftest.py registers
    warnings.simplefilter("ignore")
    grading.checks(MILESTONE.number)  # imports both files
    import test_public
    from test_public import MASK, check, small_batch, small_mlm

ALL = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.number)


def parsed(exercise: Exercise, source: str) -> ast.Module:
    """Returns a solution as a tree; a method that stands alone is put into its class."""
    tree = ast.parse(source)
    owner, _, name = exercise.functions[0].rpartition(".")
    if owner and owner not in grading.definitions(tree.body):
        tree = ast.parse(f"class {owner}:\n{textwrap.indent(source, '    ')}")
    return tree


def verdict(exercise: Exercise, source: str) -> str | None:
    """Returns what the grader says of a solution, without a process of its own."""
    tree = parsed(exercise, source)
    reference = grading.file_tree(str(ROOT / exercise.file))
    if calls := assignments.forbidden_calls(exercise, tree, reference):
        return f"it uses {', '.join(calls)}"
    with grading.installed(tree, exercise.file, assignments.written(exercise, tree)):
        return grading.first_failure(exercise.number, exercise.file)


def hand_in(folder: Path, exercise: Exercise, source: str):
    """Writes a solution into a student's folder."""
    lines = (folder / exercise.file).read_text().splitlines()
    tree = parsed(exercise, source)
    for name in exercise.functions:
        old, new = grading.find(ast.parse("\n".join(lines)), name), grading.find(tree, name)
        first = min([old, *old.decorator_list], key=lambda node: node.lineno).lineno
        code = textwrap.indent(ast.unparse(new), " " * old.col_offset)
        lines[first - 1:old.end_lineno] = code.splitlines()
    (folder / exercise.file).write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """A hand-out of all exercises, untouched."""
    folder = tmp_path_factory.mktemp("course") / "handout"
    handout(folder, [])
    return folder


@pytest.fixture
def student(students, tmp_path):
    """A copy of the hand-out to write into."""
    return Path(shutil.copytree(students, tmp_path / "student"))


def public_checks(number):
    """Returns the checks of an exercise that the hand-out holds."""
    return [check for check in grading.checks(number) if check.__module__ == "test_public"]


def by_number(*numbers):
    return [exercise for exercise in EXERCISES if exercise.number in numbers]


# --- the table ------------------------------------------------------------------------------------

def test_the_table_is_whole():
    assert [exercise.number for exercise in ALL_EXERCISES] == list(range(1, 29))
    assert sum(exercise.points for exercise in EXERCISES) == 106
    for exercise in EXERCISES:
        assert exercise.hints and exercise.source and 1 <= exercise.difficulty <= 3
        assert all(number < exercise.number for number in exercise.builds_on)
        public = public_checks(exercise.number)
        assert public and len(grading.checks(exercise.number)) > len(public)


def test_list_prints_a_line_for_each_exercise(capsys):
    assignments.main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 29 and lines[6].split()[:3] == ["6", "Whole-word", "masking"]
    assert max(map(len, lines)) <= 105
    assignments.main(["list", "22", "27"])
    text = capsys.readouterr().out
    assert "(q_v − p_v) / T" in text and "compared with the plain rate" in text


def test_builds_on_names_the_exercises_that_a_students_own_checks_call():
    """The reference's functions are watched while the public checks run."""
    owner, found = {}, set()
    for exercise in EXERCISES:
        for file, name in exercise.places:
            function = operator.attrgetter(name)(importlib.import_module(Path(file).stem))
            owner[function.__code__] = exercise.number

    def watch(frame, event, argument):
        if event == "call" and frame.f_code in owner:
            found.add(owner[frame.f_code])

    for exercise in EXERCISES:
        found.clear()
        for public_check in public_checks(exercise.number):
            sys.setprofile(watch)
            public_check()
            sys.setprofile(None)
        assert sorted(found) == [*exercise.builds_on, exercise.number], exercise.title


# --- wrong and right solutions --------------------------------------------------------------------

@ALL
def test_every_wrong_solution_loses_the_points(exercise):
    wrong = SOLUTIONS[exercise.number].wrong_sources()
    assert len(wrong) >= 10
    for name, source in wrong.items():
        sentence = verdict(exercise, source)
        assert sentence, f"{name} passes"
        assert "\n" not in sentence and len(sentence) < 400


@ALL
def test_every_right_solution_keeps_the_points(exercise):
    right = SOLUTIONS[exercise.number].right
    assert len(right) >= 2
    for name, source in right.items():
        assert verdict(exercise, source) is None, name


@pytest.mark.parametrize("number, name, words", [
    (3, "softmax over the batch", "weights of a query do not sum to 1 over the keys"),
    (3, "heads put together without a transpose", "where heads are taken apart and where they are"),
    (3, "nan under the mask", "with key_mask the result is nan"),
    (11, "no weight on the labels", "with α = 1 and T = 1 the loss is KL((3/4, 1/4) ‖ (1/2, 1/2))"),
    (15, "returns the mean", "the losses of two micro-batches add up to 12.4, and the loss of one"),
    (3, "no scale", "the scores lack the 1 / √d"),
    (4, "no dropout on the feed-forward", "no dropout on the feed-forward's output"),
    (8, "sample in proportion in its first draw alone", "entropy of 0 before others"),
    (9, "the same groups for ever", "not dealt into the groups at random"),
    (11, "overflow", "overflows at large logits"),
    (15, "the teacher reads the uncorrupted text", "the teacher reads the text before corruption"),
    (15, "no world size", "the factor world_size() is missing"),
    (17, "t loses its sign", "the sign of a − b"),
    (3, "heads split without a transpose", "where heads are taken apart and where they are"),
    (5, "no dense layer", "the dense layer is left out"),
    (5, "divided by the root of H", "the products are divided by √H"),
    (7, "a small epsilon", "ln 4 = 1.38629 nats, not 1.3859"),
    (19, "a median", "the median of the n seeds, not their mean"),
])
def test_a_sentence_names_the_mistake(number, name, words):
    exercise, = by_number(number)
    assert words in verdict(exercise, SOLUTIONS[number].wrong_sources()[name])


# Wrong solutions that a student's own run must find: mistakes in a formula, the wrong text read.
IN_PUBLIC = {
    2: ["labels only where the token changed", "no random words"],
    3: ["no scale", "scaled by the whole width", "scaled by d", "queries and keys exchanged",
        "one head", "heads put together in another order", "everybody asks"],
    4: ["pre-LayerNorm", "no residual around attention", "no residual around the feed-forward",
        "the wrong residual", "a ReLU"],
    5: ["norm before the activation", "no norm", "a ReLU", "no activation", "no dense layer",
        "divided by the root of H"],
    6: ["glued over a special token"],
    8: ["the middle by a mean", "the middle of all positions", "mixed is high",
        "mixed loses an odd one"],
    9: ["nothing is hidden", "all but the group is hidden"],
    10: ["candidates are visible", "the least uncertain", "always high", "visible is forgotten"],
    11: ["no T squared", "T, not T squared", "no temperature", "a sum over positions"],
    12: ["the absolute value"],
    13: ["one mean over both", "the last batch alone"],
    14: ["spread turned around", "scaled up to the highest of all types"],
    15: ["the teacher reads the uncorrupted text", "the uncorrupted text goes in",
         "the temperature is forgotten", "a fixed temperature", "labels are what the model reads",
         "alpha is forgotten where there is a teacher", "no world size", "not divided",
         "the recipe's weight where there is a teacher"],
    16: ["two classes only", "nan of constant labels"],
    17: ["an interval of another level"],
    19: ["seeds alone", "examples alone", "a single seed a column", "each side by itself",
         "seeds without replacement", "the whole error in each tail", "a fixed level"],
    20: ["the gradient's sign", "a sum over the texts", "everything is masked",
         "labels in the order of the batch", "the text with masks", "always classes"]}


@pytest.mark.parametrize("number", IN_PUBLIC)
def test_a_students_own_run_finds_mistakes_in_a_formula(number, monkeypatch):
    exercise, = by_number(number)
    public, wrong = public_checks(number), SOLUTIONS[number].wrong_sources()
    monkeypatch.setattr(grading, "checks", lambda _: public)
    passed = [name for name in IN_PUBLIC[number] if verdict(exercise, wrong[name]) is None]
    assert passed == []


def test_a_result_far_from_every_named_mistake_is_told_by_its_size():
    right = [1.0, 2.0, 3.0, 4.0]
    with pytest.raises(AssertionError, match=r"not the formula \(it is 0.25 times the right"):
        check("head", [0.25, 0.5, 0.75, 1.0], right, {"no bias": [0.0] * 4}, "not the formula")
    with pytest.raises(AssertionError, match="head: the nearer"):
        check("head", [1.0, 2.0, 3.0, 5.0], right, {
            "one that is near": [1.0, 2.0, 3.0, 5.0003], "the nearer": [1.0, 2.0, 3.0, 5.0001]},
            "not the formula")
    check("head", np.array(right), right, {"a mistake that does not show here": right}, "wrong")


@pytest.mark.parametrize("code, words", [
    ("p = logits.double().softmax(-1)\n    print(1)\n"
     "    return -(p * p.clamp(min=1e-300).log()).sum(-1)", "it prints '1': take the print out"),
    ("exit(0)", "it calls exit()"), ("return None", "the result is None: is a return missing?")])
def test_a_sentence_names_a_bad_habit(code, words):
    exercise, = by_number(7)
    assert words in verdict(exercise, f"def token_entropy(logits):\n    {code}\n")


def test_library_calls_are_found_whatever_they_are_called():
    def used(code):
        return grading.library_names(ast.parse(code)) & {"kl_div", "distributions"}

    assert used("F.kl_div(a, b)") and used("from torch.nn.functional import kl_div as k")
    assert used("import torch.distributions as d") and used("divergence = F.kl_div")
    assert not used("kl_div = 3\nreturn kl_div + distributions[0] + self.kl_div(x)")


# --- the hand-out ---------------------------------------------------------------------------------

# Calls that functions of no exercise make as well.
NO_SECRET = {"k = budget(maskable, rate, generator)", "mean, sd = mean_sd(differences)"}


def lines_of_solutions(exercises):
    """Yields (number, line) for every line of the functions that a hand-out leaves out."""
    for exercise in exercises:
        for file, name in exercise.places:
            first, last, _ = assignments.body_lines(file, name)
            lines = (ROOT / file).read_text().splitlines()
            for line in map(str.strip, lines[first - 1:last]):
                if len(line) > 30 and line not in NO_SECRET:
                    yield exercise.number, line


def test_no_line_of_a_solution_is_left(students, tmp_path):
    """In no hand-out, whether an exercise is set or not, but for those that are shown as solved."""
    handout(tmp_path / "part", [1, 7, 11], [2, 12])
    for folder, solved in ((students, ()), (tmp_path / "part", (2, 12))):
        text = "\n".join(path.read_text() for path in sorted(folder.rglob("*")) if path.is_file())
        for number, line in lines_of_solutions(EXERCISES):
            assert (line in text) == (number in solved), f"exercise {number}: {line}"


def test_the_hand_out_is_a_working_repository_with_holes(students):
    names = {path.name for path in students.rglob("*") if path.is_file()}
    assert names == {*FILES, "requirements.txt", "LICENSE", "README.md", "ASSIGNMENT.md",
                     "pytest.ini", "test_public.py", "baseline_2023.py"}
    for file in FILES:
        ast.parse((students / file).read_text())
    assert 'raise NotImplementedError("exercise 7: token_entropy")' in \
        (students / "masking.py").read_text()


def test_signatures_and_docstrings_stay(students):
    for exercise in EXERCISES:
        before, after = (grading.file_tree(str(folder / exercise.file))
                         for folder in (ROOT, students))
        for name in exercise.functions:
            old, new = grading.find(before, name), grading.find(after, name)
            assert ast.dump(old.args) == ast.dump(new.args)
            expected = exercise.docstrings.get(name, ast.get_docstring(old) or "").strip()
            assert (ast.get_docstring(new) or "") == expected


def test_a_hand_out_of_some_exercises(tmp_path):
    handout(tmp_path / "new", [10, 7, 25], [2, 8])
    text = (tmp_path / "new" / "masking.py").read_text()
    assert '"exercise 7: token_entropy")' in text
    assert '"exercise 9: masked_entropy is not set in this hand-out")' in text
    assert "# exercise 2: corrupt, the course's own solution" in text
    assignment = (tmp_path / "new" / "ASSIGNMENT.md").read_text()
    headings = [line for line in assignment.splitlines() if line.startswith("## ")]
    assert headings == ["## 7. Entropy", "## 10. Self-entropy", "## 25. A strategy of your own"]
    assert "This hand-out does not set 1, 3, 4, 5." in assignment
    assert "milestone/exam.json" not in assignment
    assert assignment.count("This hand-out does not set") == 1


def test_what_was_handed_out_is_graded(tmp_path, capsys):
    """Not what was shown as solved, and not what stayed blank; a mistake beside a right function
    of the same file costs it nothing."""
    handout(tmp_path / "part", [12, 17, 18], [1, 2, 3])
    exercise, = by_number(18)
    hand_in(tmp_path / "part", exercise, SOLUTIONS[18].right["an array"])
    text = (tmp_path / "part" / "stats.py").read_text()
    (tmp_path / "part" / "stats.py").write_text(text.replace("def paired_t_test(",
                                                             "def paired_t_test(("))
    capsys.readouterr()
    assignments.main(["grade", str(tmp_path / "part")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[:-1]] == ["12", "17", "18"]
    assert "0/5" in lines[1] and lines[2][-1] == "3/3" and lines[3] == ["3/12"]


def test_a_milestone_that_is_not_handed_in_has_no_points(tmp_path, capsys):
    """Of a hand-out from which nothing but files came back; it was not set in the other."""
    for name, numbers, sums in ("a", [11, MILESTONE.number], 10), ("b", [11], 0):
        handout(tmp_path / name, numbers)
        assert all(path.is_file() or any(path.iterdir()) for path in (tmp_path / name).rglob("*"))
        capsys.readouterr()
        assignments.main(["grade", str(tmp_path / name)])
        exercise, = by_number(11)
        assert capsys.readouterr().out.split()[-1] == f"0/{exercise.points + sums}"


def test_the_assignment_says_what_a_student_needs(students):
    text = (students / "ASSIGNMENT.md").read_text()
    assert max(map(len, text.splitlines())) <= 105
    assert "plain rate" not in text and "(q_v − p_v) / T" not in text  # the lecturer's keys
    for exercise in EXERCISES:
        part = text.split(f"## {exercise.number}. ")[1].split("\n## ")[0]
        for needed in (exercise.title, f"{exercise.points} points", f"{exercise.minutes} minutes",
                       *exercise.functions, *exercise.forbidden,
                       f"python -m pytest -m exercise_{exercise.number}`"):
            assert needed in part
    whole = " ".join(" ".join(path.read_text().split()) for path in students.rglob("*.*"))
    for answer in ("never learns the common", "mostly says how rare", "the same positions every"):
        assert answer not in whole  # to 23 and 24
    hand_in = " ".join(text.split("- Hand in ")[1].split(". Only")[0].split())
    assert hand_in == ", ".join([*FILES, "milestone/exam.json; not baseline_2023.py"])


@pytest.mark.slow
def test_a_student_checks_an_exercise(student):
    exercise, = by_number(7)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "exercise_7"]
    before = subprocess.run(command, cwd=student, capture_output=True, text=True)
    assert before.returncode == 1 and "exercise 7: token_entropy" in before.stdout
    hand_in(student, exercise, next(iter(SOLUTIONS[7].right.values())))
    after = subprocess.run(command, cwd=student, capture_output=True, text=True)
    assert after.returncode == 0 and " passed" in after.stdout, after.stdout


# --- the grader -----------------------------------------------------------------------------------

def test_an_untouched_hand_out_has_no_points(students):
    results = grade(students, list(EXERCISES))
    assert [result.sentence for result in results] == ["not done yet"] * len(EXERCISES)
    assert sum(result.points for result in results) == 0


def test_solutions_are_graded_each_by_itself(student, tmp_path, capsys):
    """Of one file: a right solution with helpers of the student's own, and solutions that end the
    process, write a file and look for the reference. All are there at once."""
    source = (student / "masking.py").read_text()
    target = tmp_path / "written"
    for number, code in (
            (2, "import runpy\n    return runpy.run_path(__file__)['corrupt'](input_ids, mask, "
                "mask_token_id, vocab_size, split, generator, special_ids)"),
            (6, "os._exit(0)"), (12, f"open({str(target)!r}, 'w').write('x')")):
        exercise, = by_number(number)
        body = f'raise NotImplementedError("exercise {number}: {exercise.functions[0]}")'
        assert body in source
        source = source.replace(body, code)
    source = source.replace('raise NotImplementedError("exercise 7: token_entropy")',
                            "return -(share(logits) * log_share(logits)).nan_to_num().sum(LAST)")
    source += textwrap.dedent('''
        import os
        from torch import log_softmax as log_share_of

        LAST, FIRST = -1, 0


        def share(logits):
            return log_share(logits).exp()


        def log_share(logits):
            return log_share_of(logits.float(), LAST)


        print("nobody runs this line")
        ''')
    (student / "masking.py").write_text(source)
    found = {result.exercise.number: result.sentence
             for result in grade(student, by_number(1, 2, 6, 7, 12))}
    assert found.pop(7) is None
    assert found.pop(1) == "not done yet"
    expected = {2: "it raises NotImplementedError", 6: "it ended the process (status 0)",
                12: "it writes a file"}
    assert {number: words for number, words in expected.items()
            if not found[number].startswith(words)} == {}
    assert not target.exists()


def test_a_loop_without_end_is_stopped(student):
    exercise, = by_number(7)
    hand_in(student, exercise, "def token_entropy(logits):\n    while True:\n        pass\n")
    result, = grade(student, [exercise], seconds=4)
    assert result.points == 0 and "does not end within 4 s" in result.sentence


@pytest.mark.slow
def test_memory_has_a_limit(student):
    exercise, = by_number(7)
    hand_in(student, exercise, "def token_entropy(logits):\n"
                               "    return torch.ones(10 ** 11, dtype=torch.double)\n")
    assert "more memory than the grader has" in grade(student, [exercise])[0].sentence


def test_a_call_that_is_not_allowed(student):
    exercise, = by_number(3)
    code = "def forward(self, query_hidden, hidden, key_mask=None):\n" \
           "    return self.output(F.scaled_dot_product_attention(query_hidden, hidden, hidden))\n"
    hand_in(student, exercise, code)
    assert grade(student, [exercise])[0].sentence.startswith("it uses scaled_dot_product_attention")


def test_half_of_an_exercise(student):
    exercise, = by_number(17)
    text = (student / "stats.py").read_text()
    text = text.replace('raise NotImplementedError("exercise 17: paired_t_test")',
                        "return 0.0, 1.0")
    (student / "stats.py").write_text(text)
    assert grade(student, [exercise])[0].sentence == "not done yet: confidence_interval"


def test_what_cannot_be_read_costs_its_own_exercise(student):
    """A mistake in one function, a function that is not there, a file that is not there."""
    def spoil(file, old, new):
        text = (student / file).read_text()
        assert old in text
        (student / file).write_text(text.replace(old, new))

    spoil("masking.py", 'raise NotImplementedError("exercise 1: budget")', "return (rate")
    spoil("masking.py", 'raise NotImplementedError("exercise 14: Typhoon.rates")', "if rate = 1:")
    spoil("stats.py", "def holm(", "def holms(")
    (student / "glue.py").write_bytes(b"import math\0\n\ndef matthews(a, b):\n    return 0 1\n")
    (student / "distill.py").unlink()
    where = {name: next(i for i, line in enumerate((student / "masking.py").read_text().split("\n"),
                                                   1) if name in line)
             for name in ("return (rate", "if rate = 1:")}
    found = {result.exercise.number: result.sentence for result in grade(
        student, by_number(1, 2, 7, 10, 11, 13, 14, 16, 17, 18))}
    for number in (2, 7, 10, 13, 17):
        assert found.pop(number) == "not done yet"
    assert found == {
        1: f"masking.py, line {where['return (rate']}: '(' was never closed",
        14: f"masking.py, line {where['if rate = 1:']}: invalid syntax. Maybe you meant '==' or "
            "':=' instead of '='?",
        11: "distill.py is not there: hand it in too",
        16: "glue.py, line 4: invalid syntax",
        18: "stats.py has no function holm"}


def test_the_json_is_gradescopes(students, tmp_path, capsys):
    target = tmp_path / "results.json"
    assignments.main(["grade", str(students), "7", "18", "--json", str(target)])
    tests = json.loads(target.read_text())["tests"]
    assert tests == [
        {"number": "7", "name": "Entropy", "score": 0, "max_score": 3, "status": "failed",
         "output": "not done yet"},
        {"number": "18", "name": "Holm's adjustment", "score": 0, "max_score": 3,
         "status": "failed", "output": "not done yet"}]
    assert capsys.readouterr().out.splitlines()[-1].split() == ["0/6"]


# --- bad input ------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, words", [
    (["handout", "{folder}"], "exists and is not empty"),
    (["handout", "{folder}/masking.py"], "exists and is not empty"),
    (["handout", "{folder}/new", "3", "99"], "there is no exercise 99: they are 1 to 28"),
    (["grade", "{folder}", "0"], "there is no exercise 0"),
    (["grade", "{folder}/nowhere"], "there is no folder"),
    (["handout", "{folder}/new", "1", "2", "--solved", "2"], "both set and solved: 2"),
])
def test_bad_input_is_named(student, arguments, words):
    with pytest.raises(InputError) as error:
        assignments.main([argument.format(folder=student) for argument in arguments])
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (student / "new").exists()


def test_bad_input_ends_with_status_2(student, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["assignments.py", "handout", str(student)])
    with pytest.raises(SystemExit) as stop:
        assignments.run_cli(assignments.main)
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.out == ""
    assert len(output.err.splitlines()) == 1 and "is not empty" in output.err


def test_outside_the_environment_one_line_says_what_is_missing():
    command = [sys.executable, "-S", assignments.__file__, "list"]  # -S: no installed packages
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "assignments.py: numpy is not installed: activate the course's " \
                          "environment, or pip install -r requirements.txt\n"


# --- the milestone --------------------------------------------------------------------------------

@pytest.fixture
def figures(tmp_path, monkeypatch):
    """Five runs of the reference, 4.5 ± 0.02 nats and 25 ± 0.5%, and the record of a sixth."""
    monkeypatch.setattr(assignments, "FIGURES", tmp_path / "milestone.json")
    right = np.zeros((10, 3), int)
    right[:, 0] = 3
    record = {"args": {"steps": 1400, "seed": 7}, "baseline": {"log_likelihood": -6.0},
              "dev": {"right": right.tolist(), "count": np.full((10, 3), 4).tolist(),
                      "log_likelihood": [-12 * 4.53] * 10},
              "last": {"accuracy": 0.25, "log_likelihood": -4.53}}
    runs = []
    for seed, (nats, share) in enumerate([(4.48, 0.245), (4.49, 0.25), (4.5, 0.25), (4.51, 0.25),
                                          (4.52, 0.255)]):
        last = {"accuracy": share, "log_likelihood": -nats}
        runs.append(tmp_path / f"run-{seed}")
        runs[-1].mkdir()
        (runs[-1] / "exam.json").write_text(json.dumps(record | {"last": last, "seed": seed}))
    assignments.write_band(runs)
    return record


def test_the_band_is_a_prediction_interval_and_what_python_shifts(figures):
    """By hand: sd 0.0158 nats, Student's t of 4 degrees at 99% is 4.604, √(1 + 1/5) is 1.095."""
    mean, sd, low, high = assignments.bands()["log_likelihood"]
    assert (mean, sd) == (pytest.approx(-4.5), pytest.approx(0.015811, abs=1e-6))
    assert (high - low) / 2 == pytest.approx(4.6041 * 0.015811 * 1.095445 + 0.1, abs=1e-5)
    table = assignments.band_table()
    assert "| loss (nats) | 4.50 ± 0.02 | 4.32 to 4.68 |" in table
    assert '| loss of "word-piece frequency alone" | 6.00 |' in table


def test_a_student_checks_the_run(figures, student, monkeypatch):
    monkeypatch.setattr(test_public, "__file__", str(student / "tests" / "test_public.py"))
    exam, public_check = student / "milestone" / "exam.json", public_checks(MILESTONE.number)[0]
    with pytest.raises(AssertionError, match="exam.json is not there"):
        public_check()
    exam.write_text(json.dumps(figures | {"last": {"log_likelihood": -6.0}}))
    with pytest.raises(AssertionError, match="loss is 6.00, not below that of word-piece freq"):
        public_check()
    exam.write_text(json.dumps(figures))
    public_check()


@pytest.mark.parametrize("change, words", [
    ({}, None),
    ({"args": {"steps": 9000}}, "the run has steps 9000, and not 1400"),
    ({"last": {"accuracy": 0.3, "log_likelihood": -4.5}}, "does not fit itself"),
    ({"dev": 3}, "is not one that train.py wrote"),
    ({"nats": 5.95}, "outside -4.680 to -4.320: no better than word frequencies alone"),
    ({"nats": 4.0}, "outside -4.680 to -4.320: this is not the run of a right solution"),
    (None, "not done yet"),
])
def test_the_milestones_run_is_graded_by_its_exam(figures, tmp_path, change, words):
    folder = tmp_path / "student"
    (folder / "milestone").mkdir(parents=True)
    if change is not None:
        record = figures | change
        if nats := record.pop("nats", None):
            record["dev"]["log_likelihood"] = [-12 * nats] * 10
            record["last"]["log_likelihood"] = -nats
        (folder / "milestone" / "exam.json").write_text(json.dumps(record))
    result, = grade(folder, [MILESTONE])
    assert result.points == (0 if words else 10)
    assert result.sentence is None if words is None else words in result.sentence


def test_a_band_of_runs_with_other_settings_is_refused(figures, tmp_path):
    other = figures | {"args": {"steps": 3}}
    (tmp_path / "run-4" / "exam.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="run-4 has other settings than"):
        assignments.write_band([tmp_path / f"run-{i}" for i in range(5)])


def test_what_the_milestone_builds_on_is_enough_to_train(students, tmp_path):
    """Its exercises solved, all others blank: a run of a few steps ends with an exam."""
    folder = Path(shutil.copytree(students, tmp_path / "student"))
    for exercise in by_number(*MILESTONE.builds_on):
        hand_in(folder, exercise, next(iter(SOLUTIONS[exercise.number].right.values())))
    words = Path(masking.__file__).read_text().split()
    (tmp_path / "text.txt").write_text("\n\n".join(" ".join(words[i:i + 40])
                                                  for i in range(0, 4000, 40)))
    options = f"--out milestone --steps 3 --batch-size 2 --seq-len 32 --device cpu --corpus " \
              f"{tmp_path / 'text.txt'} --vocab-size 500"
    done = subprocess.run([sys.executable, "train.py", *options.split()], cwd=folder,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result, = grade(folder, [MILESTONE])  # of other settings, or before there are figures
    assert result.sentence.startswith(("the run has ", "the expected figures are not there"))


# --- the gallery of strategies --------------------------------------------------------------------

def strategy(name, batch_of, rate=0.3, **options):
    """Returns a strategy of the gallery over the small model of the exercises."""
    kind = masking.find_strategy(str(EXERCISES_DIR / "strategies" / name))
    counts = torch.bincount(batch_of.input_ids[batch_of.maskable], minlength=40)
    continuation = torch.arange(40) >= 30
    return kind(masking.Context(rate, small_mlm(), counts, continuation, MASK, **options))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["falling_rate.py:FallingRate", "spans.py:Spans", "pmi.py:PMI",
                                  "hardest.py:Hardest"])
def test_a_strategy_of_the_gallery_spends_the_budget_on_ordinary_tokens(name):
    batch = small_batch(*[20, 13, 1] * 400)
    mask = strategy(name, batch).mask(batch, generator())
    assert not (mask & ~batch.maskable).any()
    for row, tokens in enumerate((20, 13, 1)):
        share = mask[row::3].sum() / (400 * tokens)
        assert share == pytest.approx(0.3, abs=0.07 if tokens == 1 else 0.03)
    again, other = (strategy(name, batch).mask(batch, generator(seed)) for seed in (0, 1))
    assert torch.equal(mask, again) and not torch.equal(mask, other)


def test_the_falling_rate_falls_from_30_to_15_percent():
    batch = small_batch(*[20] * 200)
    falling = strategy("falling_rate.py:FallingRate", batch)
    for progress, tokens in ((0.0, 6.0), (0.5, 4.5), (1.0, 3.0)):
        falling.context.progress = progress
        assert falling.mask(batch, generator()).sum() / 200 == pytest.approx(tokens, abs=0.2)


def test_spans_are_runs_of_words_of_geometric_length():
    """At a low rate few spans meet: a lone span of n words is as likely as p (1 − p)^(n − 1)."""
    batch = small_batch(*[200] * 300)
    batch.input_ids.clamp_(max=29)  # words of one piece
    mask = strategy("spans.py:Spans", batch, rate=0.01).mask(batch, generator())
    assert (mask.sum(1) == 2).all()
    together = (mask[:, 1:] & mask[:, :-1]).any(1).double().mean()
    assert together == pytest.approx(0.8, abs=0.08)  # the first span goes on with 1 − p
    batch = small_batch(*[60] * 300)
    long = strategy("spans.py:Spans", batch, rate=0.2).mask(batch, generator())
    inside = long & (batch.input_ids >= 30) & torch.roll(batch.maskable, 1, 1)
    split = inside & ~torch.roll(long, 1, 1)  # a "##" piece without the piece before it
    assert not split.any()


def test_pmi_joins_pairs_that_occur_together():
    """In 60 of 100 texts 7 follows 6, among tokens without any order; later they go together."""
    batch = small_batch(*[12] * 100)
    batch.input_ids[batch.maskable] = batch.input_ids[batch.maskable].clamp(10, 29)
    batch.input_ids[:60, 4], batch.input_ids[:60, 5] = 6, 7
    pmi = strategy("pmi.py:PMI", batch)
    for step in range(3):
        mask = pmi.mask(batch, generator(step))
        if step == 0:
            assert not torch.equal(mask[:60, 4], mask[:60, 5])
        pmi.end_step()
    mask = pmi.mask(batch, generator(9))
    assert torch.equal(mask[:60, 4], mask[:60, 5]) and mask[:60, 4].any()
    assert not torch.equal(mask[:, 7], mask[:, 8])
    fresh = strategy("pmi.py:PMI", batch)
    fresh.load_state_dict(pmi.state_dict())
    assert torch.equal(fresh.mask(batch, generator(9)), mask)
    slots = [strategy("pmi.py:PMI", batch) for _ in range(2)]
    for one in slots:
        one.mask(batch, generator())
    sent = slots[1].new.clone()
    slots[0].end_step(lambda tensor: tensor.add_(sent))
    assert slots[0].pairs.sum() == 2 * 100 * 11


def test_the_hardest_have_the_highest_loss():
    batch = small_batch(12, 8)
    hardest = strategy("hardest.py:Hardest", batch, rate=0.25)
    mask = hardest.mask(batch, generator())
    candidates = hardest.scores > 0
    assert candidates.sum(1).tolist() == [6, 4] and mask.sum(1).tolist() == [3, 2]
    with torch.no_grad():
        logits = hardest.context.model(batch.input_ids.masked_fill(candidates, 4),
                                       batch.attention_mask)
    loss = -logits.log_softmax(-1).gather(2, batch.input_ids[..., None])[..., 0]
    for row in range(2):
        assert loss[row][mask[row]].min() > loss[row][candidates[row] & ~mask[row]].max()


def test_the_baseline_of_2023_also_masks_cls_and_sep():
    """The bug that an exercise asks for; padding it leaves alone."""
    batch = small_batch(*[12, 6] * 500)
    mask = strategy("baseline_2023.py:Baseline", batch).mask(batch, generator())
    for column in (0, 1, 13):  # [CLS], a token, and [SEP] of the long texts
        assert mask[::2, column].double().mean() == pytest.approx(0.3, abs=0.06)
    assert not mask[1::2, 8:].any()


# --- everything, as a lecturer would run it -------------------------------------------------------

@pytest.mark.slow
def test_the_reference_has_full_points():
    results = grade(ROOT, list(EXERCISES))
    assert {r.exercise.number: r.sentence for r in results if r.sentence} == {}


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(16))
def test_a_wrong_solution_costs_its_exercise_and_no_other(turn, tmp_path):
    """Of a whole repository every second exercise is wrong; eight wrong solutions of each."""
    folder, wrong = tmp_path / "student", []
    folder.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    for exercise in EXERCISES:
        if exercise.number % 2 == turn % 2:
            sources = list(SOLUTIONS[exercise.number].wrong_sources().values())
            hand_in(folder, exercise, sources[-1 - turn // 2])
            wrong.append(exercise.number)
    results = grade(folder, list(EXERCISES))
    assert [r.exercise.number for r in results if r.sentence] == wrong
