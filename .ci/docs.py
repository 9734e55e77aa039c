"""The documentation: its sidebar, and a build with or without Quarto.

    python .ci/docs.py sidebar    write nbs/sidebar.yml from the notebooks at hand
    python .ci/docs.py build      write _docs: Quarto where it is on PATH, otherwise the plain builder below; then check every internal link

The plain builder takes the same steps as Quarto does (nbdev's processing of a notebook, then conversion to HTML) and no more: pages, an
index by floor, previous and next. Which builder ran is printed and written into _docs/builder.txt.
"""
import html
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from html.parser import HTMLParser
from multiprocessing import get_context
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import yaml

ROOT = Path(__file__).resolve().parent.parent
GROUPS = {"guide": "Guide", "00": "Ground", "01": "1 Data", "02": "2 Views", "03": "3 Encoders", "04": "4 Objectives", "05": "5 Training", "06": "6 Tasks",
          "07": "7 Alignment", "08": "8 Figures", "09": "9 Lab", "10": "10 Batch", "11": "11 Command line",
          "lessons": "Guided lessons", "experiments": "Experiments"}


@dataclass(frozen=True)
class Page:
    "One notebook of the documentation."
    source: str   # path in the notebook folder
    title: str
    summary: str

    @property
    def href(self) -> str:
        "Path of the page; the number that orders the notebook is dropped, as nbdev does."
        p = Path(self.source)
        return p.with_name(re.sub(r"^\d+[a-zA-Z0-9]*_", "", p.name.lower())).with_suffix(".html").as_posix()

    @property
    def group(self) -> str:
        first = Path(self.source).parts[0]
        return GROUPS.get(first, GROUPS.get(first[:2], "More"))


def read_page(nbs: Path, path: Path) -> Page:
    "Title and summary are the first markdown cell: `# Title`, `> summary`."
    cells = nbformat.read(path, as_version=4).cells
    text = next((c.source for c in cells if c.cell_type == "markdown"), "")
    title = re.search(r"^# +(.+)$", text, re.M)
    summary = " ".join(re.findall(r"^> ?(.+)$", text, re.M))
    return Page(path.relative_to(nbs).as_posix(), title[1] if title else path.stem, summary)


def pages(nbs: Path) -> list[Page]:
    "Every notebook in reading order: the home page, the guide, the floors, then lessons and experiments."
    found = [p for p in nbs.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(nbs).parts)]
    order = [*GROUPS]
    def key(p):
        first = p.relative_to(nbs).parts[0]
        rank = next((i for i, g in enumerate(order) if re.fullmatch(rf"{g}([a-z]*_.*)?", first)), len(order))
        return p.name != "index.ipynb", rank, p.relative_to(nbs).as_posix()
    return [read_page(nbs, p) for p in sorted(found, key=key)]


def grouped(found: list[Page]) -> dict[str, list[Page]]:
    "Pages by group, in order; the home page is in none."
    groups: dict[str, list[Page]] = {}
    for p in found:
        if p.source != "index.ipynb": groups.setdefault(p.group, []).append(p)
    return groups


def write_sidebar(root: Path) -> Path:
    "Write nbs/sidebar.yml, which Quarto reads."
    found = pages(root / "nbs")
    home = [p.source for p in found if p.source == "index.ipynb"]
    sections = [{"section": g, "contents": [p.source for p in ps]} for g, ps in grouped(found).items()]
    text = yaml.safe_dump({"website": {"sidebar": {"contents": home + sections}}}, sort_keys=False)
    path = root / "nbs" / "sidebar.yml"
    if not path.exists() or path.read_text(encoding="utf-8") != text: path.write_text(text, encoding="utf-8")
    return path


# --- the plain builder ----------------------------------------------------------------------------------------------------------------

COMMON = {"cell_type", "id", "metadata", "source"}
CELL_KEYS = {"markdown": COMMON, "code": COMMON | {"outputs", "execution_count"}}
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} | TASL Lab</title><link rel="stylesheet" href="{up}styles.css">{math}</head>
<body><nav><a href="{up}index.html">TASL Lab</a> {where}</nav>
<main>{body}</main><footer>{steps}</footer></body></html>
"""
CSS = """body { margin: 0 auto; max-width: 54rem; padding: 0 1.2rem 3rem; font: 16px/1.55 system-ui, sans-serif; color: #1d232a; }
nav, footer { padding: .8rem 0; color: #5b6670; }
nav { border-bottom: 1px solid #d8dde2; }
footer { border-top: 1px solid #d8dde2; margin-top: 2rem; display: flex; justify-content: space-between; }
a { color: #0b5394; }
h1 { margin-bottom: .2rem; }
.summary { color: #5b6670; margin-top: 0; }
pre, code { font: 13.5px/1.45 ui-monospace, monospace; }
pre { overflow-x: auto; padding: .6rem .8rem; margin: .5rem 0; }
.highlight { background: #f5f7f9; border-radius: 4px; }
.anchor-link { display: none; }
img { max-width: 100%; }
blockquote { border-left: 3px solid #c8d0d8; margin-left: 0; padding-left: .9rem; color: #404a54; }
table { border-collapse: collapse; border: 0; display: block; overflow-x: auto; max-width: 100%; }
td, th { padding: .25rem .7rem; border: 0; border-bottom: 1px solid #e2e6ea; vertical-align: top; text-align: left; }
td:first-child { min-width: 6.5rem; }
hr { border: 0; border-top: 1px solid #e2e6ea; }
"""


def said_of(directives, following) -> str:
    "The text alternative of a cell's pictures: its `fig-alt`, or else the first paragraph that follows them."
    given = next((m[1] for d in directives if (m := re.match(r"#\|\s*fig-alt:\s*(.+)", d))), "")
    after = "".join(following[0]["source"]) if following and following[0]["cell_type"] == "markdown" else ""
    paragraph = next((p for p in re.split(r"\n\s*\n", after) if p.strip() and not p.lstrip().startswith("#")), "")
    return given.strip("\"' ") or re.sub(r"\[([^]]*)\]\([^)]*\)|[*`]", r"\1", " ".join(paragraph.split()))


def starred(text: str) -> str:
    "Markdown in which nbdev's `*docstring*` stays slanted although the docstring has stars of its own: `(B, *spatial)`."
    whole = r"^\*(?![*\s])((?:[^*\n]|(?<![\w*])\*(?=\w))+)\*$"
    return re.sub(whole, lambda m: "*" + m[1].replace("*", r"\*") + "*", text, flags=re.M)


def tidy(nb) -> nbformat.NotebookNode:
    "A notebook that nbformat accepts: known keys, no directives, no raw cells; the input of `echo: false` cells gets a tag."
    cells = []
    for i, c in enumerate(nb["cells"]):
        kind = c["cell_type"]
        if kind not in CELL_KEYS: continue
        cell = {k: c[k] for k in CELL_KEYS[kind] if k in c}
        lines = "".join(c["source"]).splitlines()
        directives = [line for line in lines if line.startswith("#|")] if kind == "code" else []
        if any(re.match(r"#\|\s*hide\b|#\|\s*default_exp\b", d) for d in directives): continue
        cell["source"] = "\n".join(line for line in lines if kind != "code" or not line.startswith("#|"))
        if kind == "markdown": cell["source"] = starred(cell["source"])
        alt = said_of(directives, nb["cells"][i + 1:i + 2])
        cell["id"] = f"cell-{i}"
        cell["metadata"] = {"tags": ["hide-input"] if any(re.match(r"#\|\s*echo:\s*false", d) for d in directives) else []}
        if kind == "code":
            cell["execution_count"] = None
            for o in cell.setdefault("outputs", []):
                if o["output_type"] == "execute_result": o["execution_count"] = None
                for form in {"image/png", "image/jpeg"} & set(o.get("data", {})): o["metadata"] = {form: {"alt": alt}} if alt else {}
        cells.append(cell)
    return nbformat.from_dict({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def processed(path: Path) -> tuple[nbformat.NotebookNode, str]:
    "The notebook as nbdev documents it, or as it is with the reason why nbdev could not."
    from fastcore.nbio import read_nb
    from nbdev.processors import FilterDefaults
    os.environ["IN_TEST"], main = "1", sys.modules["__main__"]
    try:
        nb = read_nb(path)
        FilterDefaults()(nb)
        return tidy(nb), ""
    except Exception as e:
        lines = str(e).splitlines() or [type(e).__name__]
        return tidy(nbformat.read(path, as_version=4)), " ... ".join(dict.fromkeys([lines[0], lines[-1]]))
    finally: sys.modules["__main__"] = main  # nbdev runs the cells that import in a main module of their own


def without_title(nb, page: Page):
    "The notebook less its title and summary, which the page shows above it."
    for c in nb.cells:
        if c.cell_type == "markdown":
            text = re.sub(rf"\A# +{re.escape(page.title)}\n?(^>.*\n?)*", "", c.source, flags=re.M)
            if text != c.source: c.source = text
            break
    return nb


def relink(body: str, page: Page, found: list[Page]) -> str:
    "Links to notebooks become links to their pages."
    names = {p.source: p.href for p in found}
    here = Path(page.source).parent
    def replace(m):
        target, anchor = unquote(m[1]), m[2] or ""
        source = Path(os.path.normpath(here / target)).as_posix()
        if source not in names: return m[0]  # the link check names it
        return f'href="{Path(os.path.relpath(names[source], here)).as_posix()}{anchor}"'
    return re.sub(r'href="(?![a-z]+:|/)([^"#]+\.ipynb)(#[^"]*)?"', replace, body)


def render(nbs: Path, page: Page, found: list[Page]) -> tuple[str, str]:
    "The HTML of one page, and why nbdev's processing failed, if it did."
    from nbconvert import HTMLExporter
    from traitlets.config import Config
    config = Config()
    config.TagRemovePreprocessor.enabled, config.TagRemovePreprocessor.remove_input_tags = True, {"hide-input"}
    exporter = HTMLExporter(config=config, template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    nb, problem = processed(nbs / page.source)
    body = relink(exporter.from_notebook_node(without_title(nb, page))[0], page, found)
    head = f"<h1>{html.escape(page.title)}</h1><p class='summary'>{inline(page.summary)}</p>"
    math = f'<script src="{exporter.mathjax_url}" async></script>' if "$" in body else ""
    if page.source == "index.ipynb": body += index(found)
    return frame(page, found, head + body, math), problem


def inline(text: str) -> str:
    "Markdown's `code` in one line of HTML."
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def index(found: list[Page]) -> str:
    "Links to every page by group."
    def item(p): return f"<li><a href='{p.href}'>{html.escape(p.title)}</a><br>{inline(p.summary)}</li>"
    return "".join(f"<h2>{html.escape(g)}</h2><ul>{''.join(map(item, ps))}</ul>" for g, ps in grouped(found).items())


def frame(page: Page, found: list[Page], body: str, math: str) -> str:
    "The page around its body: where it stands, and the pages before and after it."
    i, here = found.index(page), Path(page.href).parent
    def link(p, words): return f'<a href="{Path(os.path.relpath(p.href, here)).as_posix()}">{words.format(html.escape(p.title))}</a>'
    before = link(found[i - 1], "&larr; {}") if i else "<span></span>"
    after = link(found[i + 1], "{} &rarr;") if i + 1 < len(found) else "<span></span>"
    where = "" if page.source == "index.ipynb" else f"/ {html.escape(page.group)} / {html.escape(page.title)}"
    return PAGE.format(title=html.escape(page.title), up="../" * len(here.parts), math=math, where=where, body=body, steps=before + after)


def build_plain(root: Path, out: Path) -> None:
    "Every page into `out`, a few at a time."
    from pygments.formatters import HtmlFormatter
    nbs, found = root / "nbs", pages(root / "nbs")
    shutil.rmtree(out, ignore_errors=True)
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 4), mp_context=get_context("spawn")) as pool:
        for page, (text, problem) in zip(found, pool.map(render, [nbs] * len(found), found, [found] * len(found))):
            (out / page.href).parent.mkdir(parents=True, exist_ok=True)
            (out / page.href).write_text(text, encoding="utf-8")
            print(f"{page.href}" + (f"  (shown as it is, nbdev could not process it: {problem})" if problem else ""), flush=True)
    style = HtmlFormatter(style="default").get_style_defs(".highlight")
    for picture in sorted(nbs.rglob("images/*.png")):
        (out / picture.relative_to(nbs)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, out / picture.relative_to(nbs))
    own = nbs / "styles.css"
    (out / "styles.css").write_text(f"{CSS}{style}\n{own.read_text(encoding='utf-8') if own.exists() else ''}", encoding="utf-8")


# --- links ----------------------------------------------------------------------------------------------------------------------------

class Links(HTMLParser):
    "What a page refers to, and what can be referred to in it."
    def __init__(self, text: str):
        super().__init__()
        self.targets, self.ids = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        self.targets += [a[k] for k in ("href", "src") if a.get(k) and tag in ("a", "img", "link", "script")]


def broken_links(out: Path) -> list[str]:
    "Internal links of the HTML pages in `out` that lead nowhere, as 'page -> link'."
    read = {p: Links(p.read_text(encoding="utf-8")) for p in sorted(out.rglob("*.html"))}
    bad = []
    for page, links in read.items():
        for link in links.targets:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc: continue
            target = Path(os.path.normpath(page.parent / unquote(parts.path))) if parts.path else page
            if target.is_dir(): target /= "index.html"
            anchor = unquote(parts.fragment)
            if not target.exists() or (anchor and target in read and anchor not in read[target].ids):
                bad.append(f"{page.relative_to(out).as_posix()} -> {link}")
    return bad


def build(root: Path = ROOT) -> int:
    "Build _docs with the builder at hand and check its links."
    write_sidebar(root)
    out, quarto = root / "_docs", shutil.which("quarto")
    if quarto:
        program = Path(sys.executable).parent / "nbdev-docs"
        if code := subprocess.run([program], cwd=root, stdin=subprocess.DEVNULL).returncode: return code
    else: build_plain(root, out)
    builder = f"Quarto ({quarto})" if quarto else "the plain builder of .ci/docs.py (Quarto is not on PATH: no search, no cross references)"
    (out / "builder.txt").write_text(("Quarto" if quarto else "plain") + "\n", encoding="utf-8")
    bad = broken_links(out)
    for line in bad: print(f"broken link: {line}")
    print(f"docs: {len(list(out.rglob('*.html')))} pages in {out.name} by {builder}; {len(bad)} broken links")
    return bool(bad)


if __name__ == "__main__":
    if sys.argv[1:] == ["sidebar"]: write_sidebar(ROOT)
    elif sys.argv[1:] == ["build"]: sys.exit(build())
    else: sys.exit("usage: python .ci/docs.py sidebar | build")
