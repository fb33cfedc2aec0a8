"""What the README and the findings page show is what the code does and what the runs found."""
import json
import math
import re
import shlex
import shutil
import statistics
from pathlib import Path

import assignments
import curves
import glue
import masking
import pytest
import stats
import torch
import train
from masking import Context, find_strategy
from model import BertConfig, BertForMaskedLM
from test_train import SMALL, corpus  # noqa: F401 (a fixture)

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests" / "data" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
FINDINGS = (RESULTS / "README.md").read_text(encoding="utf-8")
BOTH = README + FINDINGS
PAGES = pytest.mark.parametrize("page", [README, FINDINGS], ids=["README", "findings"])
FOLDERS = sorted(path.parent.name for path in RESULTS.glob("*/report.md"))


# --- what the README names exists -----------------------------------------------------------------

def test_every_option_on_the_pages_is_an_option_of_a_program(capsys):
    for main, command in ((train.main, []), (glue.main, []), (masking.main, []),
                          (stats.main, ["sweep"]), (stats.main, ["report"]),
                          (assignments.main, ["handout"]), (assignments.main, ["grade"])):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
    option = r"(?<![\w-])--[a-z][a-z0-9-]*(?![\w-])"
    known, named = re.findall(option, capsys.readouterr().out), re.findall(option, BOTH)
    assert len(named) > 20 and not set(named) - set(known)


def test_every_function_on_the_pages_stands_in_its_file():
    named = set(re.findall(r"`(\w+)\.py:([\w.]+)`", BOTH))
    for file, name in named:
        text = (ROOT / f"{file}.py").read_text(encoding="utf-8")
        for part in name.split("."):
            assert re.search(rf"^ *(def|class) {part}\b", text, flags=re.M), (file, name)
    assert len(named) > 15


def test_every_link_within_the_repository_leads_somewhere():
    for folder, page in ((ROOT, README), (RESULTS, FINDINGS)):
        links = re.findall(r"\]\((?!http)([^)#]+)", page)
        assert links and not [link for link in links if not (folder / link).exists()]


# --- the README's own strategy --------------------------------------------------------------------

@pytest.fixture
def spans(tmp_path):
    """The README's strategy in a file; its name as --masking takes it."""
    code, = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    (tmp_path / "spans.py").write_text(code)
    return f"{tmp_path}/spans.py:Spans"


def test_the_readmes_strategy_masks_runs_of_three_at_the_rate(spans, english):
    _, texts = english
    batch = texts.batch(torch.arange(400))
    config = BertConfig(vocab_size=2000, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    context = Context(0.3, BertForMaskedLM(config), texts.token_counts(),
                      texts.vocab.continuation, texts.vocab.mask_id)
    mask = find_strategy(spans)(context).mask(batch, torch.Generator().manual_seed(0))
    assert not (mask & ~batch.maskable).any()
    assert mask.sum().item() / batch.maskable.sum().item() == pytest.approx(0.3, rel=0.01)
    alone = mask[:, 1:-1] & ~mask[:, 2:] & ~mask[:, :-2]  # masked, and neither neighbour is
    assert alone.sum() < 0.06 * mask.sum()  # 0.49 if each token were drawn by itself


def test_the_readmes_strategy_trains_and_prints_what_the_readme_shows(
        spans, corpus, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    train.main(["--masking", spans, "--corpus", str(corpus), *SMALL])
    assert (tmp_path / "runs" / "Spans" / "exam.json").exists()
    block, = re.findall(r"```\n(runs/entropy: .*?)```", README, flags=re.S)
    block = block.replace("entropy", "Spans").replace("  the teacher ", "  this model (Spans) ")
    shown, printed = ({" ".join(re.sub(r"-?[\d.,]+", "#", line).split())
                       for line in text.splitlines()} for text in (block, capsys.readouterr().out))
    assert len(shown) > 4 and not shown - printed


# --- the kept runs --------------------------------------------------------------------------------

@pytest.mark.parametrize("folder", FOLDERS)
def test_a_kept_report_is_that_of_its_runs(folder, tmp_path, monkeypatch):
    """By `stats.py report FOLDER`, with options where the findings page shows them; the file
    against-NAME with `--against NAME`."""
    plain = f"python stats.py report tests/data/results/{folder}"
    shown = re.findall(rf"made by `({plain} .*?)`", " ".join(FINDINGS.split()))
    kept = [path for path in (RESULTS / folder).iterdir() if path.suffix != ".json"]
    copy = tmp_path / "tests" / "data" / "results" / folder
    shutil.copytree(RESULTS / folder, copy,
                    ignore=lambda _, names: [name for name in names if ".json" not in name])
    monkeypatch.chdir(tmp_path)
    for name in {path.stem for path in kept}:
        against = f" --against {name.removeprefix('against-')}" * name.startswith("against-")
        stats.main(shlex.split((shown[0] if shown else plain) + against)[2:])
    assert f"({folder}/report.md)" in FINDINGS
    assert all((copy / path.name).read_bytes() == path.read_bytes() for path in kept)


def test_no_kept_file_names_a_folder_of_the_machine_that_made_it():
    kept = list(RESULTS.rglob("*.json"))
    assert len(kept) > 200 and not [path for path in kept if '"/' in path.read_text()]


# --- the figures ----------------------------------------------------------------------------------
# A figure on a page is about the folder of kept runs whose report its paragraph links to, or else
# the one linked to last, or first, in its section. It must stand in this report.

def report(folder: str) -> str:
    return (RESULTS / folder / "report.md").read_text(encoding="utf-8")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def tables(text: str) -> list[list[dict[str, str]]]:
    """Every Markdown table: of each row {head of a column: cell}."""
    found = re.findall(r"^\|(.+)\n\|[-| ]+\n((?:\|.+\n)+)", text, flags=re.M)
    return [[dict(zip(cells(head), cells(row))) for row in rows.splitlines()]
            for head, rows in found]


def paragraphs(page: str):
    """Yields of each paragraph, item or table of a page its folder and its text."""
    link = r"\((?:tests/data/results/)?([\w-]+)/(?:report|against-[\w-]+)\.\w+\)"
    for section in re.split(r"^#+ ", page, flags=re.M):
        folder = next(iter(re.findall(link, section)), None)
        for paragraph in re.split(r"\n\n|\n(?=- )", section):
            folder = ([folder] + re.findall(link, paragraph))[-1]
            yield folder, paragraph + "\n"


@PAGES
def test_every_table_of_scores_is_in_its_report(page):
    checked = 0
    for folder, paragraph in paragraphs(page):
        for table in tables(paragraph):
            if "strategy" in table[0]:
                rows = [row for other in tables(report(folder)) for row in other]
                for row in table:
                    assert any(row.items() <= other.items() for other in rows), row
                checked += 1
    assert checked == len(re.findall(r"^\| strategy \|", page, flags=re.M))


def differences(folder: str | None) -> dict[str, dict[str, str]]:
    """Of each pair in a report, either way round, what may be said of `a − b`, or `a − b, task`."""
    found = {}
    for section in re.split(r"^## ", report(folder), flags=re.M)[1:] if folder else ():
        task = section.partition(",")[0]
        for row in (row for table in tables(section) for row in table):
            name = row.pop("strategy − baseline", "")
            if " − " not in name or row["95% t interval"] == "n/a":  # of one seed
                continue
            for a, b, turn in (*name.split(" − "), 1), (*name.split(" − ")[::-1], -1):
                mean = float(row["difference"])
                low, high = map(float, row["95% t interval"].strip("[]").split(","))
                mean, low, high = turn * mean, *sorted((turn * low, turn * high))
                found[f"{a} − {b}" + (f", {task}" if task != "mlm" else "")] = {
                    "difference": f"{mean:+z.4f} [{low:+z.4f}, {high:+z.4f}]",
                    "Holm p": row["Holm p"].rstrip(" *"), "MDE": row["MDE"]}
    return found


@PAGES
def test_every_difference_is_that_of_its_report(page):
    """`a − b, sst2: +0.0119 [+0.0028, +0.0211], Holm p 0.113, MDE 0.0124`: no task where it is the
    exam, and the last two where they are wanted."""
    quote = (r"([\w-]+ − [\w-]+(?:, [\w ]+)?): ([-+][\d.]+ \[.*?\])"
             r"(?:, Holm p ((?:< )?[\d.]+\d))?(?:, MDE ([\d.]+\d))?")
    wrong, checked = [], 0
    for folder, paragraph in paragraphs(page):
        for name, *said in re.findall(quote, " ".join(paragraph.split())):
            row = differences(folder).get(name, {})
            wrong += [f"{name}: {kind} is {row.get(kind)}, not {figure}"
                      for kind, figure in zip(("difference", "Holm p", "MDE"), said)
                      if figure and figure != row.get(kind)]
            checked += 1
    assert not wrong
    assert checked == len(re.findall(r"[-+]\d\.\d+ *\n? *\[", page))  # none escapes


@PAGES
def test_every_percentage_is_the_accuracy_of_the_strategy_before_it(page):
    """`entropy` ... 24.0%, of the exam."""
    wrong, checked = [], 0
    for folder, paragraph in paragraphs(page):
        if folder:
            scores = {row["strategy"]: row["accuracy"] for table in tables(report(folder))
                      for row in table if "accuracy" in row}
            for name, said in re.findall(r"`([\w-]+)`[^`]*?(\d+\.\d)%", paragraph):
                accuracy = f"{float(scores[name].split()[0]):.1%}"
                wrong += [f"{name}: {accuracy}, not {said}%"] if accuracy != f"{said}%" else []
                checked += 1
            checked -= len(re.findall(r"\d+\.\d%", paragraph))
    assert not wrong and checked == 0  # none escapes


def test_so_many_seeds_would_find_half_a_point_of_glue():
    effect, count = re.search(r"english --effect ([\d.]+)` says how many seeds would find this: "
                              r"(\d+) for `entropy` against `random`",
                              " ".join(FINDINGS.split())).groups()
    said = differences("english")["entropy − random, mean of 4 tasks"]["difference"]
    _, low, high = map(float, re.findall(r"[-+][\d.]+", said))
    sd = (high - low) / 2 * math.sqrt(3) / 4.3027  # Student's t at 2 degrees of freedom
    assert int(count) == pytest.approx(stats.seeds_needed(sd, float(effect)), abs=1)


# --- the first command ----------------------------------------------------------------------------

def first_command(name: str) -> dict:
    """A kept exam.json of the README's first command, with its teacher's metrics."""
    path = RESULTS / "first-command" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_readme_shows_what_its_first_command_printed():
    run = first_command("python-3.11.7")
    assert run["versions"]["python"] == "3.11.7" and "With Python 3.11.7" in README
    block, = re.findall(r"```\n(runs/entropy: .*?)```", README, flags=re.S)
    for title, metrics in (("word-piece frequency alone", run["baseline"]),
                           ("the teacher", run["teacher"]), ("this model (entropy)", run["last"])):
        line, = re.findall(rf"^ *{re.escape(title)} +(.*)$", block, flags=re.M)
        shares = [f"{metrics[name]:.1%}" for name in ("accuracy", "common", "middle", "rare")]
        assert line.split() == [f"{-metrics['log_likelihood']:.2f}", *shares]
    args = run["args"]
    assert f"runs/entropy: {args['steps']:,} steps, {run['seconds']:.0f} s\n" in block
    assert f"\n{sum(map(sum, run['dev']['count'])):,} held-out word pieces" in block
    masked, asked, guesses = re.search(r"masked (\S+) of the ordinary tokens \(asked for: (\S+)\), "
                                       r"([\d,]+) guesses in all", block).groups()
    assert (masked, asked) == (f"{run['masked']:.2%}", f"{args['mask_rate']:.2%}")
    tokens = args["steps"] * args["batch_size"] * (args["seq_len"] - 2)  # not [CLS] and [SEP]
    assert int(guesses.replace(",", "")) == pytest.approx(run["masked"] * tokens, rel=0.01)


def test_what_it_was_worth_to_start_from_the_teachers_first_weights():
    before = json.loads((RESULTS / "same-start.json").read_text())
    for name in ("random-kd", "entropy-kd", "entropy"):
        files = (RESULTS / "strategies" / f"mlm--runs-masking-seed--{name}--{seed}.json"
                 for seed in range(5))
        now = [json.loads(file.read_text())["last"]["accuracy"] for file in files]
        differences = [a - b for a, b in zip(before[name], now, strict=True)]
        mean, sd = statistics.mean(differences), statistics.stdev(differences)
        reach = 2.7764 * sd / math.sqrt(5)  # Student's t at 4 degrees of freedom
        said = f"`{name}` {mean:+.4f} ({mean - reach:+.4f} to {mean + reach:+.4f})"
        assert said in " ".join(FINDINGS.split())


def test_another_python_gives_the_same_within_two_points():
    run, other = first_command("python-3.11.7"), first_command("python-3.11.2")
    assert other["versions"]["python"] == "3.11.2"
    said = re.search(r"Python 3\.11\.2 .*? teacher (.{4})%, this model (.{4})%",
                     " ".join(README.split()))
    for row, figure in zip(("teacher", "last"), said.groups()):
        assert figure == f"{100 * other[row]['accuracy']:.1f}"
        assert other[row]["accuracy"] == pytest.approx(run[row]["accuracy"], abs=0.02)
    assert "XX" not in README


def test_another_processor_gives_the_same_within_two_points():
    run, other = first_command("python-3.11.7"), first_command("another-processor")
    assert other["versions"] == run["versions"]
    assert f"another processor {other['last']['accuracy']:.1%}" in " ".join(README.split())
    assert other["last"]["accuracy"] == pytest.approx(run["last"]["accuracy"], abs=0.02)


SETTINGS = ("steps", "teacher_steps", "batch_size", "lr", "mask_rate", "seq_len", "preset")


def test_the_first_commands_kept_runs_have_todays_defaults():
    defaults = vars(train.parse_args(["--masking", "entropy"]))
    for name in ("python-3.11.7", "python-3.11.2", "another-processor"):
        args = first_command(name)["args"]
        assert [args[setting] for setting in SETTINGS] == [defaults[setting]
                                                           for setting in SETTINGS]


@PAGES
@pytest.mark.parametrize("folder", ["strategies", "start", "local", "plain"])
def test_a_page_says_so_where_its_runs_have_older_settings(page, folder):
    defaults = vars(train.parse_args([]))
    runs = [json.loads(path.read_text())["args"] for path in (RESULTS / folder).glob("*.json")]
    older = any(run[name] != defaults[name] for run in runs for name in SETTINGS)
    said = "made before the exam and the default settings were changed" in " ".join(page.split())
    assert said == older


# --- the plateau ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["curves", "english-curves"])
def test_the_picture_of_the_plateau_is_that_of_its_points(name):
    """And the points' last exams are those of the kept runs."""
    panels = json.loads((RESULTS / f"{name}.json").read_text())
    assert curves.draw(panels) == (RESULTS / f"{name}.svg").read_text()
    for folder, panel in panels.items():
        for strategy, seeds in panel["curves"].items():
            for seed, points in seeds.items():
                file = next((RESULTS / folder).glob(f"mlm--*--{strategy}--{seed}.json"))
                run = json.loads(file.read_text())
                assert points[-1] == [run["args"]["steps"], run["last"]["accuracy"]]
                assert panel["frequency"] == run["baseline"]["accuracy"]


def test_the_table_of_the_two_starts_is_that_of_its_runs():
    panels = json.loads((RESULTS / "curves.json").read_text())
    table, = [table for table in tables(FINDINGS) if "way to mask" in table[0]]
    *ways, frequency = table
    steps_of_distilled = []
    for row in ways:
        name = row["way to mask"]
        for start, panel in panels.items():
            seeds = panel["curves"][name].values()
            ends = [points[-1][1] for points in seeds]
            left = [next((step for step, accuracy in points
                          if accuracy >= panel["frequency"] + 0.03), None) for points in seeds]
            said = f"{statistics.mean(ends):.4f} ± {statistics.stdev(ends):.4f}"
            assert row[start] == said
            steps = ", ".join("never" if step is None else f"{step:,}" for step in left)
            assert row[f"{start}: left at step"] == steps
            steps_of_distilled += left if start == "plain" and name.endswith("-kd") else []
    assert {row["way to mask"] for row in ways} == panels["plain"]["curves"].keys()
    assert frequency["plain"] == frequency["local"] == f"{panels['plain']['frequency']:.4f}"
    ends = {name: [points[-1][1] for points in seeds.values()]
            for name, seeds in panels["plain"]["curves"].items()}
    distilled = min(min(found) for name, found in ends.items() if name.endswith("-kd"))
    others = max(max(found) for name, found in ends.items() if not name.endswith("-kd"))
    assert len(steps_of_distilled) == 10
    assert (f"All ten distilled models leave it, between steps {min(steps_of_distilled):,} and "
            f"{max(steps_of_distilled):,}; the worst of them guesses {distilled:.3f}, the best "
            f"other model {others:.3f}") in " ".join(FINDINGS.split())


def test_on_english_the_distilled_models_and_one_other_leave_the_plateau():
    panel = json.loads((RESULTS / "english-curves.json").read_text())["english-start"]
    left = {name: [curves.left_plateau(points, panel["frequency"]) for points in seeds.values()]
            for name, seeds in panel["curves"].items()}
    local = [step for name in ("random", "entropy", "self-entropy", "random-kd")
             for step in left.pop(name)]
    assert len(local) == 12 and f"all twelve by step {max(local):,}." in " ".join(FINDINGS.split())
    distilled = {name: left.pop(name) for name in ("plain-random-kd", "plain-entropy-kd")}
    steps = ["{:,}, {:,} and {:,}".format(*found) for found in distilled.values()]
    ends = ["{:.3f}, {:.3f} and {:.3f}".format(*(points[-1][1] for points in seeds.values()))
            for seeds in map(panel["curves"].get, distilled)]
    said = (f"The six distilled models leave it at steps {steps[0]} (random masks) and {steps[1]} "
            "(entropy masks), with one exam every 800 steps, and so end far apart: they guess "
            f"{ends[0]}; {ends[1]}.")
    assert said in " ".join(FINDINGS.split())
    assert "of nine models without it one does in 8,000 steps" in " ".join(FINDINGS.split())
    (name, step), = [(name, step) for name, found in left.items() for step in found if step]
    assert name == "plain-self-entropy" and sum(map(len, left.values())) == 9
    assert "All six distilled models learn more" in README and "one of nine others" in README
    end = max(points[-1][1] for points in panel["curves"][name].values())
    assert (f"`self-entropy` does with one of three, at step {step:,}, and that model ends at "
            f"{end:.3f}") in " ".join(FINDINGS.split())


def test_no_model_of_30_000_steps_leaves_the_plateau():
    panel, = json.loads((RESULTS / "english-long.json").read_text()).values()
    ends = {}
    for path in (RESULTS / "english-long").glob("*.json"):
        run = json.loads(path.read_text())
        points = panel["curves"][run["strategy"]][str(run["seed"])]
        assert curves.left_plateau(points, panel["frequency"]) is None
        assert points[-1] == [30_000, run["last"]["accuracy"]]
        ends[run["strategy"]] = points[-1][1]
    assert (f"30,000 steps, neither leaves it (one exam every 1,000), and they guess "
            f"{ends.pop('plain-random'):.3f} and {ends.pop('plain-entropy'):.3f}"
            ) in " ".join(FINDINGS.split()) and not ends


@pytest.mark.parametrize("name, file, metric", [
    ("english-random-0-again", "english-start/mlm--*-seed--random--0.json", "accuracy"),
    ("adaptation-none-0-again", "adaptation/mrpc--*--none--0.json", "f1")])
def test_what_another_processor_changes(name, file, metric):
    again = json.loads((RESULTS / f"{name}.json").read_text())
    first, = [json.loads(path.read_text()) for path in RESULTS.glob(file)]
    same = first["args"].keys() & again["args"].keys() - {"out", "json", "windows", "teacher_steps"}
    assert all(again["args"][option] == first["args"][option] for option in same)
    said = "{:.3f}, not {:.3f}".format(*(run["last"][metric] for run in (again, first)))
    assert said in " ".join(FINDINGS.split())


def test_what_the_baseline_of_2023_hides_and_may_cost():
    hidden, gaps, said = {}, {}, " ".join(FINDINGS.split())
    for folder in ("adaptation", "specials", "longer"):  # 3 epochs, bf16 and fp32; 12 epochs, fp32
        scores = {}
        for path in (RESULTS / folder).glob("*.json"):
            run = json.loads(path.read_text())
            hidden.setdefault(run["strategy"], []).append(1000 * (run["masked"] or 0))
            scores[run["strategy"], run["seed"]] = run["last"]["f1"]
        gaps[folder] = [scores["specials", seed] - scores["random", seed]
                        for seed in range(len(scores)) if ("specials", seed) in scores]
    baseline, ours = (round(statistics.mean(hidden[name])) for name in ("specials", "random"))
    assert f"it hides {baseline}, marks included; `random` hides {ours}, and no mark." in said
    lost = -100 * min(stats.confidence_interval(gaps[name])[0] for name in ("adaptation", "longer"))
    assert f"one of {lost:.1f} points" in said
    assert f"{lost:.1f} points are possible" in README
    assert f"a loss of {lost:.1f} points is possible" in said
    grown = [after - before for before, after in zip(gaps["specials"], gaps["longer"])]
    low, high = stats.confidence_interval(grown)
    assert (f"less that after three, seed by seed, is {statistics.mean(grown):+.4f} (95% t "
            f"interval: {low:+.4f} to {high:+.4f})") in said


# --- on a GPU -------------------------------------------------------------------------------------

def kept_on_the_gpu(name: str) -> dict:
    return json.loads((RESULTS / "gpu" / f"{name}.json").read_text())


def test_the_larger_models_table_is_that_of_its_runs():
    runs, glue_runs = kept_on_the_gpu("scale"), kept_on_the_gpu("glue")
    table, = [table for table in tables(FINDINGS) if "start, strategy" in table[0]]
    *models, constant = table
    for row in models:
        name = "gpu-{}-{}-0".format(*row.pop("start, strategy").split(", "))
        run, sst2 = runs[name], glue_runs[f"gpu-sst2-{name}"]["last"]
        exams = {f"{entry['step']:,}": entry["exam"] for entry in run["log"] if "exam" in entry}
        expected = {step: exams[step]["accuracy"] for step in ("300", "600", "900", "3,000")}
        expected |= {"rare": run["last"]["rare"], "sst2": sst2["accuracy"]}
        assert row == {column: f"{value:.3f}" for column, value in expected.items()}
    assert constant["3,000"] == f"{run['baseline']['accuracy']:.3f}" and len(models) == 6
    teacher = runs["gpu-teacher-0"]["last"]["accuracy"]
    assert f"the teacher alone has {teacher:.3f}" in " ".join(FINDINGS.split())


def test_the_larger_models_are_below_the_constant_answer_on_mrpc():
    runs = [run for name, run in kept_on_the_gpu("glue").items() if "mrpc" in name]
    f1, constant = [run["last"]["f1"] for run in runs], runs[0]["baseline"]["f1"]
    assert len(runs) == 6 and max(f1) < constant
    said = (f"the F1 of all six ({min(f1):.3f} to {max(f1):.3f}) is below the constant answer's "
            f"{constant:.3f}")
    assert said in " ".join(FINDINGS.split())


def runs_of_the_defaults() -> dict[str, list[dict]]:
    """The teachers and the entropy models of the table of strategies, five seeds each."""
    return json.loads((RESULTS / "first-command" / "defaults.json").read_text())["runs"]


def test_the_table_of_the_defaults_is_that_of_its_runs():
    runs = {name.removeprefix("--vocab-size 4096 --batch-size 16 "): seeds
            for name, seeds in kept_on_the_gpu("defaults")["runs"].items()}
    runs |= runs_of_the_defaults()
    table, = [table for table in tables(FINDINGS) if "options" in table[0]]
    for row in table:
        seeds = runs.pop(row["options"].strip("`"))
        accuracy, rare, sd, spearman = ([seed[name] for seed in seeds]
                                        for name in ("accuracy", "rare", "sd", "spearman"))
        assert len(seeds) == 5
        assert row["worst accuracy"] == f"{min(accuracy):.3f}"
        assert row["mean accuracy"] == f"{statistics.mean(accuracy):.3f}"
        assert row["worst rare"] == f"{min(rare):.3f}"
        assert row["mean sd"] == f"{statistics.mean(sd):.2f}"
        assert row["mean Spearman"] == f"{statistics.mean(spearman):.2f}"
    assert not runs  # none is left out


def test_the_defaults_on_a_cpu_are_those_of_the_strategies():
    teachers, students = runs_of_the_defaults().values()
    kept = [json.loads((RESULTS / "strategies" /
                        f"mlm--runs-masking-seed--entropy--{seed}.json").read_text())["last"]
            for seed in range(5)]
    assert [run["accuracy"] for run in students] == [run["accuracy"] for run in kept]
    low, high = (end(run["accuracy"] for run in teachers) for end in (min, max))
    assert f"({low:.3f} to {high:.3f} over five seeds)" in " ".join(FINDINGS.split())


def test_berts_own_exam_is_the_measured_one():
    plain = json.loads((RESULTS / "bert-exam.json").read_text())["runs/plain-random-0"]
    said = (f"0.1 + 0.8 · {plain['frequency']:.3f} = {plain['copying']:.3f}; `plain-random` (seed "
            f"0), which has {plain['ours']:.3f} on our exam, has {plain['bert']:.3f} on BERT's")
    assert said in " ".join(FINDINGS.split())


def test_the_speed_on_the_gpu_is_the_measured_one():
    rows = {row[0]: row[1:] for row in kept_on_the_gpu("speed")["rows"]}
    table, = [table for table in tables(FINDINGS) if "tokens a second" in table[0]]
    for row in table:
        strategy, _, way = row.pop("tokens a second").partition(", ")
        for preset, speed in row.items():
            title = f"GPU {preset}, {strategy}, {way or 'eager'}: tokens/s"
            assert speed == rows[title][0]
    for preset, factor in (("small", "2.2"), ("base", "1.4")):
        assert rows[f"MLM step, {preset}, eager: reference / ours"][0] == f"{factor}×"
        assert f"{factor} times" in FINDINGS
    assert "1.4 to 2.2 times" in README
