"""Do the lessons read well? Terms are explained, figures are told in words, numbers have a source, and every lesson has the same shape."""
import re
import shlex
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import typer

from tasl_lab.objectives.cards import CARDS

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
LESSONS = sorted(p for p in (NBS / "lessons").glob("*.ipynb") if re.match(r"0[1-9]|1\d", p.name))
READ = [*sorted((NBS / "lessons").glob("*.ipynb")), *sorted((NBS / "guide").glob("*.ipynb"))]
CLAIM = re.compile(r"\d(\.\d+)?\s?%|\b\d*\.\d+\b|\b\d+ (times|points)\b")
SOURCE = re.compile(r"arXiv:|\]\(|doi|\b(above|below|table|figure|picture|plot|cell|printed|recorded)\b")


def each(paths): return pytest.mark.parametrize("path", paths, ids=[p.stem for p in paths])


def cells(path): return nbformat.read(path, as_version=4).cells


def prose(path): return [c.source for c in cells(path) if c.cell_type == "markdown"]


def plain(term):
    "A term as the glossary is asked for it: small letters, singular."
    word = re.sub(r"^(a|an|the) ", "", re.sub(r"[^a-z0-9/ -]", "", term.lower().replace("\n", " ")).strip())
    for end, instead in ((r"ies$", "y"), (r"(?<=ch|sh)es$", ""), (r"(?<=[^s])s$", "")):
        if re.search(end, word): return re.sub(end, instead, word)
    return word


def bold(text): return re.findall(r"\*\*(.+?)\*\*", text, re.S)


def terms_of(path):
    "Bold words that are terms: not numbered titles, not the heads of list items, not whole sentences."
    return {plain(t) for text in prose(path) for t in bold(text) if not re.match(r"\d", t) and t[-1] not in ".:?!" and len(t.split()) <= 4}


GLOSSARY = {plain(t) for text in prose(NBS / "guide" / "01_glossary.ipynb") for t in bold(text)} | {plain(n) for c in CARDS.values() for n in (c.id, c.name)}


def unsourced(text):
    "Paragraphs and list items that state a measured number without saying where it is from; exercises ask for numbers and intervals have their level."
    text = re.sub(r"```.*?```|^ {4}.*$|\$[^$]*\$|`[^`]*`|95 %|arXiv:\d+\.\d+", lambda m: "arXiv:" if m[0].startswith("arXiv") else "", text, flags=re.S | re.M)
    return [p for p in re.split(r"\n\s*\n|\n(?=- )", text) if CLAIM.search(p) and not SOURCE.search(p) and not re.match(r"\s*\*\*\d\.", p)]


def untold(path):
    "Indices of cells whose picture has neither a `fig-alt` nor a paragraph after it."
    found, all_cells = [], cells(path)
    for i, c in enumerate(all_cells):
        shows = any({"image/png", "image/jpeg", "image/svg+xml"} & set(o.get("data", {})) for o in c.get("outputs", []))
        after = all_cells[i + 1] if i + 1 < len(all_cells) else None
        told = re.search(r"^#\|\s*fig-alt:\s*\S+", c.source, re.M) or (after and after.cell_type == "markdown" and
                any(len(p) > 20 for p in re.split(r"\n\s*\n", after.source) if not p.lstrip().startswith("#")))
        if shows and not told: found.append(i)
    return found


def test_the_checks_can_fail():
    assert unsourced("It was 12 % better.") and not unsourced("It was 12 % better (arXiv:2412.17041).") and not unsourced("`0.5` and $0.5$")
    assert plain("Probes") == plain("probe") and plain("loss") == "loss"


def test_the_table_of_the_readme_is_the_record():
    cells = pd.read_parquet(NBS / "experiments" / "results" / "classroom_cells.parquet").query("budget == 120").set_index(["arm", "task"])
    tasks = ["classification:class", "segmentation:tissue", "detection:boxes"]
    def said(arm, task):
        r = cells.loc[(arm, task)]
        return f"{r['mean']:.3f} [{r.low:.3f}, {r.high:.3f}]" + ("" if arm == "random" else f" {r.verdict_random}")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    arms = [a for a in cells.index.unique("arm")]
    assert len(arms) > 8 and all(f"| {a} | " + " | ".join(said(a, t) for t in tasks) + " |" in text for a in arms)


def commands(text):
    "What follows `tasl` in blocks of code and in quoted commands, cut at comments and at what joins two."
    blocks = re.findall(r"```(?:bash|powershell)\n(.*?)```", text, re.S) + re.findall(r"`(tasl [^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    lines = [part for b in blocks for line in b.splitlines() for part in re.split(r"\s#\s|&&", f" {line}")[:2] if not line.startswith("#")]
    return [shlex.split(m[1], posix=False) for part in lines if (m := re.search(r"(?:^|[/\\\s])tasl (.+)", part.strip()))]


def known(words, command):
    "Does the command line have this command, with these options?"
    while words and hasattr(command, "commands") and words[0] in command.commands: command, words = command.commands[words[0]], words[1:]
    if hasattr(command, "commands"): return not words or words == ["--help"]
    options = {o for q in command.get_params(typer.Context(command)) for o in (*q.opts, *q.secondary_opts)}
    return not {w for w in words if w.startswith("--")} - options


@pytest.mark.parametrize("path", [ROOT / "README.md", NBS / "index.ipynb", *sorted((NBS / "guide").glob("*.ipynb")), NBS / "lessons" / "90_teaching.ipynb"],
                         ids=lambda p: p.stem)
def test_commands_that_are_told_exist(path):
    from tasl_lab.cli import app
    told = commands(path.read_text(encoding="utf-8") if path.suffix == ".md" else "\n\n".join(prose(path)))
    assert not [" ".join(w) for w in told if not known(w, typer.main.get_command(app))] and (path.stem != "README" or len(told) > 15)
    assert not known(["nonesuch"], typer.main.get_command(app)) and not known(["demo", "--nonesuch"], typer.main.get_command(app))


def test_the_sweep_of_the_readme_is_one(tmp_path):
    from tasl_lab.batch.runner import read_notebook
    from tasl_lab.batch.sweep import plan, read_sweep
    text = re.search(r"```yaml\n(notebook:.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    (tmp_path / "sweep.yaml").write_text(text, encoding="utf-8")
    sweep = read_sweep(tmp_path / "sweep.yaml")
    assert len(plan(sweep, read_notebook(sweep.notebook))) == 4


@each(LESSONS)
def test_every_term_is_in_the_glossary(path):
    assert terms_of(path) <= GLOSSARY, f"not in the glossary: {', '.join(sorted(terms_of(path) - GLOSSARY))}"


@each(READ)
def test_every_picture_is_told_in_words(path):
    assert not untold(path), f"cells {untold(path)}: add `#| fig-alt: ...` or a paragraph below"


@each(READ)
def test_numbers_have_a_source(path):
    found = [p for text in prose(path) for p in unsourced(text)]
    assert not found, "\n".join(["numbers without a source:", *(p[:160] for p in found)])


@each(LESSONS)
def test_lessons_have_one_shape(path):
    source = cells(path)
    heads = [line[3:] for c in source if c.cell_type == "markdown" for line in c.source.splitlines() if line.startswith("## ")]
    code = [c.source for c in source if c.cell_type == "code"]
    wanted = ["Predict before you look", "Exercises", "Where this fails"]
    assert [h for h in heads if h in wanted] == wanted, heads
    assert re.match(rf"# {int(path.name[:2])}\. .+\?\n+> .+", source[0].source), "the title is `# N. Question?`, then `> summary`"
    assert any("Prediction(" in c for c in code) and any(c.startswith("Quiz(") for c in code)
    solutions = [i for i, c in enumerate(code) if "### BEGIN SOLUTION" in c]
    assert len(solutions) >= 2 and all("### END SOLUTION" in code[i] and code[i + 1].startswith("solved(") for i in solutions)
