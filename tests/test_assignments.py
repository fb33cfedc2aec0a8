"""Every wrong solution loses its points and no right one does; the hand-out holds no solution."""
import ast
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import assignments
import grading
from assignments import EXERCISES, FILES, ROOT, Exercise, grade, grade_one, handout
from model import InputError
from solutions import SOLUTIONS

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning")
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
    with grading.installed(parsed(exercise, source), exercise.file, list(exercise.functions)):
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


def by_number(*numbers):
    return [exercise for exercise in EXERCISES if exercise.number in numbers]


# --- the table ------------------------------------------------------------------------------------

def test_the_table_is_whole():
    assert [exercise.number for exercise in EXERCISES] == list(range(1, 20))
    assert sum(exercise.points for exercise in EXERCISES) == 100
    for exercise in EXERCISES:
        assert exercise.hints and exercise.source and 1 <= exercise.difficulty <= 3
        assert all(number < exercise.number for number in exercise.builds_on)
        public = [check for check in grading.checks(exercise.number)
                  if check.__module__ == "test_public"]
        assert public and len(grading.checks(exercise.number)) > len(public)


def test_list_prints_a_line_for_each_exercise(capsys):
    assignments.main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 22 and lines[6].split()[:3] == ["6", "Whole-word", "masking"]
    assert max(map(len, lines)) <= 100


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
    (3, "no scale", "the scores lack the 1 / √d"),
    (4, "no dropout on the feed-forward", "no dropout on the feed-forward's output"),
    (8, "sample in proportion in its first draw alone", "entropy of 0 before others"),
    (9, "the same groups for ever", "not dealt into the groups at random"),
    (11, "overflow", "overflows at large logits"),
    (15, "the teacher reads the uncorrupted text", "the teacher reads the text before corruption"),
    (15, "no world size", "the factor world_size() is missing"),
    (17, "t loses its sign", "the sign of a − b"),
])
def test_a_sentence_names_the_mistake(number, name, words):
    exercise, = by_number(number)
    assert words in verdict(exercise, SOLUTIONS[number].wrong_sources()[name])


# --- the hand-out ---------------------------------------------------------------------------------

def test_no_line_of_a_solution_is_left(students):
    text = "\n".join(path.read_text() for path in sorted(students.rglob("*")) if path.is_file())
    for exercise in EXERCISES:
        removed = [(exercise.file, name) for name in exercise.functions]
        removed += [tuple(entry.split(":")) for entry in exercise.cut]
        for file, name in removed:
            original = (ROOT / file).read_text()
            first, last, _ = assignments.body_lines(original, name)
            for line in map(str.strip, original.splitlines()[first - 1:last]):
                assert len(line) <= 30 or line not in text, f"exercise {exercise.number}: {line}"


def test_the_hand_out_is_a_working_repository_with_holes(students):
    names = {path.name for path in students.rglob("*") if path.is_file()}
    assert names == {*FILES, "requirements.txt", "LICENSE", "README.md", "ASSIGNMENT.md",
                     "pytest.ini", "test_public.py"}
    check = "import stats, masking, torch\n" \
            "masking.token_entropy(torch.zeros(1, 3))"
    done = subprocess.run([sys.executable, "-c", check], cwd=students, capture_output=True,
                          text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "NotImplementedError: exercise 7: token_entropy"


def test_signatures_and_docstrings_stay(students):
    for exercise in EXERCISES:
        before, after = (ast.parse((folder / exercise.file).read_text())
                         for folder in (ROOT, students))
        for name in exercise.functions:
            old, new = grading.find(before, name), grading.find(after, name)
            assert ast.dump(old.args) == ast.dump(new.args)
            expected = exercise.docstrings.get(name, ast.get_docstring(old) or "").strip()
            assert (ast.get_docstring(new) or "") == expected


def test_a_hand_out_of_some_exercises(tmp_path):
    handout(tmp_path / "new", [7, 2, 20])
    text = (tmp_path / "new" / "masking.py").read_text()
    assert text.count("NotImplementedError(\"exercise") == 2
    headings = [line for line in (tmp_path / "new" / "ASSIGNMENT.md").read_text().splitlines()
                if line.startswith("## ")]
    assert headings == ["## 2. Corruption", "## 7. Entropy", "## 20. A strategy of your own"]


def test_the_assignment_says_what_a_student_needs(students):
    text = (students / "ASSIGNMENT.md").read_text()
    assert max(map(len, text.splitlines())) <= 105
    for exercise in EXERCISES:
        part = text.split(f"## {exercise.number}. ")[1].split("\n## ")[0]
        for needed in (exercise.title, f"{exercise.points} points", f"{exercise.minutes} minutes",
                       *exercise.functions, *exercise.forbidden,
                       f"python -m pytest -m exercise_{exercise.number}`"):
            assert needed in part


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
    """Of one file: a right solution with helpers of the student's own, and solutions that print,
    exit, end the process, write a file and start a program. All are in the folder at once."""
    source = (student / "masking.py").read_text()
    target = tmp_path / "written"
    for number, code in (
            (12, "print('gradient', 1)\n    return (embedding_grad * embedding_weight.detach()"
                 "[token_ids]).sum(-1)"),
            (2, "exit(0)"), (6, "os._exit(0)"), (9, f"open({str(target)!r}, 'w').write('x')"),
            (8, "subprocess.run(['true'])")):
        exercise, = by_number(number)
        body = f'raise NotImplementedError("exercise {number}: {exercise.functions[0]}")'
        assert body in source
        source = source.replace(body, code)
    source = source.replace('raise NotImplementedError("exercise 7: token_entropy")',
                            "return -(share(logits) * log_share(logits)).nan_to_num().sum(-1)")
    source += textwrap.dedent('''
        import os
        import subprocess
        from torch import log_softmax as log_share_of


        def share(logits):
            return log_share(logits).exp()


        def log_share(logits):
            return log_share_of(logits.float(), -1)


        print("nobody runs this line")
        ''')
    (student / "masking.py").write_text(source)
    found = {result.exercise.number: result.sentence
             for result in grade(student, by_number(1, 2, 6, 7, 8, 9, 12))}
    assert found.pop(7) is None
    assert found.pop(1) == "not done yet"
    expected = {2: "it calls exit()", 6: "it ended the process (status 0)",
                8: "it starts a program", 9: "it writes a file", 12: "it prints 'gradient 1'"}
    assert {number: words for number, words in expected.items()
            if not found[number].startswith(words)} == {}
    assert not target.exists()


def test_a_loop_without_end_is_stopped(student):
    exercise, = by_number(7)
    hand_in(student, exercise, "def token_entropy(logits):\n    while True:\n        pass\n")
    result = grade_one(exercise, student, seconds=4)
    assert result.points == 0 and "does not end within 4 s" in result.sentence


@pytest.mark.slow
def test_memory_has_a_limit(student):
    exercise, = by_number(7)
    hand_in(student, exercise, "def token_entropy(logits):\n"
                               "    return torch.ones(10 ** 11, dtype=torch.double)\n")
    assert "more memory than the grader has" in grade_one(exercise, student).sentence


def test_a_call_that_is_not_allowed(student):
    exercise, = by_number(3)
    code = "def forward(self, query_hidden, hidden, key_mask=None):\n" \
           "    return self.output(F.scaled_dot_product_attention(query_hidden, hidden, hidden))\n"
    hand_in(student, exercise, code)
    assert grade_one(exercise, student).sentence.startswith("it uses scaled_dot_product_attention")


def test_half_of_an_exercise(student):
    exercise, = by_number(17)
    text = (student / "stats.py").read_text()
    text = text.replace('raise NotImplementedError("exercise 17: paired_t_test")',
                        "return 0.0, 1.0")
    (student / "stats.py").write_text(text)
    assert grade_one(exercise, student).sentence == "not done yet: confidence_interval"


def test_a_syntax_error_costs_the_exercises_of_its_file(student):
    (student / "stats.py").write_text("def holm(p_values:\n")
    (student / "glue.py").write_bytes(b"x = 1\0\n")
    results = grade(student, by_number(7, 16, 17, 18, 19))
    assert results[0].sentence == "not done yet"
    assert results[1].sentence.startswith("glue.py cannot be read")
    assert all(result.sentence.startswith("stats.py cannot be read, line 1")
               for result in results[2:])


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

@pytest.mark.parametrize("damage, arguments, words", [
    (None, ["handout", "{folder}"], "exists and is not empty"),
    (None, ["handout", "{folder}/masking.py"], "exists and is not empty"),
    (None, ["handout", "{folder}/new", "3", "99"], "there is no exercise 99: they are 1 to 21"),
    (None, ["grade", "{folder}", "0"], "there is no exercise 0"),
    (None, ["grade", "{folder}/nowhere"], "there is no folder"),
    (lambda folder: (folder / "stats.py").unlink(), ["grade", "{folder}"], "has no stats.py"),
    (lambda folder: (folder / "distill.py").write_text("x = 1\n"), ["grade", "{folder}", "11"],
     "has no function kd_loss (exercise 11)"),
    (lambda folder: (folder / "model.py").write_text("class Block:\n    forward = None\n"),
     ["grade", "{folder}", "4"], "has no function Block.forward"),
])
def test_bad_input_is_named(student, damage, arguments, words):
    if damage:
        damage(student)
    with pytest.raises(InputError) as error:
        assignments.main([argument.format(folder=student) for argument in arguments])
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (student / "new").exists()


def test_bad_input_ends_with_status_2(student):
    script = str(Path(assignments.__file__))
    done = subprocess.run([sys.executable, script, "handout", str(student)], capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "is not empty" in done.stderr


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
            hand_in(folder, exercise, sources[turn // 2 % len(sources)])
            wrong.append(exercise.number)
    results = grade(folder, list(EXERCISES))
    assert [r.exercise.number for r in results if r.sentence] == wrong
