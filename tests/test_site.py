"""The site: its pages as Quarto is given them, its colours, and what is done before and after Quarto.

Quarto itself is not needed: a stand-in on the path shows that what it warns of is printed and stops the build."""

import base64
import importlib.util
import json
import os
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
import yaml
from conftest import copy_checkout
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
STYLES = re.sub(r"/\*.*?\*/", "", (NBS / "styles.css").read_text(encoding="utf-8"), flags=re.DOTALL)
SITE = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))


def load(name, folder=ROOT / ".ci"):
    "A script of .ci as a module"
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


pages = load("pages")
docs = load("docs")


# --- colours


def rules():
    "(selector, declarations) of the style sheet"
    for selectors, body in re.findall(r"([^{}]+)\{([^{}]*)\}", STYLES):
        declared = dict(re.findall(r"([\w-]+)\s*:\s*([^;]+);", body))
        values = {name: value.replace("!important", "").strip() for name, value in declared.items()}
        yield " ".join(selectors.split()), values


def theme(name):
    "The variables of a theme"
    found = {}
    for selector, declared in rules():
        if selector in (":root, .quarto-light", f".quarto-{name}"):
            found |= {key: value for key, value in declared.items() if key.startswith("--")}
    return found


def luminance(color):
    "Relative luminance of #rrggbb or #rgb, as WCAG defines it"
    digits = color.lstrip("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    channels = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def drawn(name):
    "(selector, property, colour, background) of everything that our style sheet colours in a theme"
    variables = theme(name)

    def value(text):
        text = re.sub(r"var\((--[\w-]+)\)", lambda match: variables[match[1]], text)
        return (re.findall(r"#[0-9a-fA-F]{3,6}\b", text) or [None])[0]

    other = {"light": "quarto-dark", "dark": "quarto-light"}[name]
    for selector, declared in rules():
        if other in selector or selector.startswith((":root", ".quarto-light", ".quarto-dark {")):
            continue
        page = value(declared.get("background-color", "")) or variables["--page"]
        for prop in ("color", "border", "border-left", "border-left-color", "outline"):
            if prop in declared and value(declared[prop]):
                yield selector, prop, value(declared[prop]), page


@pytest.mark.parametrize("name", ["light", "dark"])
def test_our_colours_have_the_contrast_of_wcag_aa(name):
    found = list(drawn(name))
    assert len(found) > 12 and any("summary" in selector for selector, *_ in found)
    poor = [
        (selector, prop, color, page, round(contrast(color, page), 2))
        for selector, prop, color, page in found
        if contrast(color, page) < (4.5 if prop == "color" else 3)
    ]
    assert poor == []


def test_contrast_is_that_of_wcag():
    assert round(contrast("#fff", "#000000"), 2) == 21 and round(contrast("#777777", "#ffffff"), 2) == 4.48


def test_both_themes_have_the_same_fonts_and_navigation_bar():
    bar = SITE["website"]["navbar"]
    assert contrast(bar["background"], bar["foreground"]) >= 4.5
    declared = dict(rules())
    assert bar["background"] in declared[".navbar"]["background-color"]
    assert "font-family" in declared["body"] and not re.search(r"\.quarto-dark[^{]*\{[^}]*font", STYLES)
    assert theme("light").keys() == theme("dark").keys()


# --- what does not fit


def declared_for(part):
    "Everything that is declared for selectors with these words"
    return {
        key: value for selector, declared in rules() if part in selector.split(", ") for key, value in declared.items()
    }


def test_what_is_wider_than_a_phone_scrolls_by_itself():
    formula = declared_for(".math.display")
    assert (formula["display"], formula["overflow-x"], formula["overflow-y"]) == ("block", "auto", "hidden")
    assert declared_for("select")["max-width"] == declared_for("label")["max-width"] == "100%"
    assert declared_for("main table")["overflow-x"] == declared_for("main pre")["overflow-x"] == "auto"
    assert declared_for("main img")["max-width"] == "100%"


def test_code_has_room_beside_the_copy_button():
    "950 px less margins hold 109 columns; few lines are longer, and those wrap beside the button"
    size, width = declared_for("main div.sourceCode pre")["font-size"], SITE["format"]["html"]["grid"]["body-width"]
    columns = (int(width.removesuffix("px")) - 51 - 12 - 35) / (0.602 * int(size.removesuffix("px")))
    lines = [
        len(line)
        for path in NBS.glob("*.ipynb")
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
        for line in "".join(cell["source"]).splitlines()
        if line.strip() and not line.startswith("#|")
    ]
    assert sum(length > columns for length in lines) / len(lines) < 0.08
    assert declared_for("main pre.code-with-copy")["padding-right"]


def test_quarto_is_told_what_was_found_to_be_needed():
    html = SITE["format"]["html"]
    assert html["html-table-processing"] == "none"  # else widgets lose their state
    assert SITE["format"]["commonmark"]["variant"] == "+tex_math_dollars"  # else formulas in the twins are escaped
    assert (NBS / "404.qmd").is_file()
    linked = re.findall(r"\]\((\S+\.ipynb)\)", (NBS / "404.qmd").read_text(encoding="utf-8"))
    assert linked and all((NBS / target).is_file() for target in linked)


def test_no_section_has_the_name_of_its_page():
    sidebar = yaml.safe_load((NBS / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    for section in (entry for entry in sidebar if isinstance(entry, dict)):
        titles = [
            json.loads((NBS / name).read_text(encoding="utf-8"))["cells"][0]["source"][0]
            for name in section["contents"]
        ]
        assert f"# {section['section']}" not in [title.strip() for title in titles]


# --- the pieces of .ci/pages.py


def code(text, **more):
    return dict(cell_type="code", metadata={}, source=text, outputs=more.get("outputs", []))


def prose(text):
    return dict(cell_type="markdown", metadata={}, source=text)


PICTURE = dict(output_type="display_data", data={"image/png": "AAAA"}, metadata={})


def test_a_figure_is_described_by_its_axes_and_by_what_is_said_below_it():
    chart = code("ax.plot(x, y)\nax.set(xlabel='epoch', ylabel='mean reward')", outputs=[PICTURE])
    cells = [
        prose("Here it is:"),
        chart,
        code("assert y.max() > 1"),
        prose("**It rises from $.1$ to 2 in the first ten epochs.** Then more."),
    ]
    pages.describe_figures(cells)
    first = pages.source(chart).splitlines()[0]
    assert (
        first == '#| fig-alt: "Line chart: mean reward against epoch. It rises from .1 to 2 in the first ten epochs."'
    )
    assert pages.alt_text([prose("Is it so? See the bars:"), code("draw()")], 1) == "Figure. Is it so? See the bars."


def test_an_alternative_text_in_the_cell_is_kept():
    chart = code('#| fig-alt: "mine"\nplot()', outputs=[PICTURE])
    pages.describe_figures([chart, prose("A sentence about it.")])
    assert pages.source(chart) == '#| fig-alt: "mine"\nplot()'


def test_what_a_function_of_the_page_draws_is_found():
    cells = [code("def show(x):\n    ax.hist(x)\n    ax.set_xlabel('seconds')"), code("show(1)", outputs=[PICTURE])]
    assert pages.alt_text(cells, 1).startswith("Histogram: seconds")


def test_sources_are_closed_and_say_whose_they_are():
    cell = code(
        '#| code-fold: show\n#| code-summary: "Exported source"\n#| exports: true\n@patch\ndef f(self: Cls): pass'
    )
    pages.fold_source(cell, "12_mdp")
    assert pages.source(cell).splitlines()[:2] == ["#| code-fold: true", '#| code-summary: "Source: Cls.f"']
    helper = code("def row(): ...")
    pages.fold_source(helper, "61_results")
    assert pages.source(helper).startswith("#| code-fold: true\n")


def test_the_dashes_of_a_table_follow_its_texts():
    long = "a sentence that goes on for quite a while, so that the column has to wrap at some point"
    table = f"| method | what |\n|---|---|\n| a name of three words | {long} |\n| b | {long} |\n"
    dashes = pages.space_tables(table).splitlines()[1].strip("|").split("|")
    assert len(dashes[0]) >= len("a name of three words") and len(dashes[1]) > 2 * len(dashes[0])
    assert pages.breakable("jpeg_size") == "jpeg_<wbr>size" and pages.breakable("`a_b`") == "`a_b`"
    assert pages.space_tables("```\n" + table + "```") == "```\n" + table + "```"


def test_badges_and_pictures_have_no_second_caption():
    assert pages.badge("[![Open](a.svg)](b)") == '<p><a href="b"><img src="a.svg" alt="Open"></a></p>'
    assert pages.picture("![what it shows](images/a.png)") == '![](images/a.png){fig-alt="what it shows"}'


def test_links_to_what_has_no_heading_lead_to_its_class():
    mended = pages.mend_anchors("(https://s/models.html#policy.sample)", "https://s", {"models": {"policy": "Policy"}})
    assert mended == "(https://s/models.html#policy)"
    assert pages.mend_anchors("(https://s/a.html#b)", "https://s", {"a": {"b": "b"}}) == "(https://s/a.html#b)"


# --- all pages, as Quarto is given them


@pytest.fixture(scope="module")
def processed(once):
    "The folder `_proc` of a copy of the checkout"

    def make(folder):
        tree = copy_checkout(folder / "tree")
        done = subprocess.run(
            [sys.executable, tree / ".ci/docs.py", "--pages"], cwd=tree, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]

    return once("site_pages", make) / "tree" / "_proc"


@pytest.fixture(scope="module")
def notebooks(processed):
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(processed.glob("*.ipynb"))}


def markdown_of(notebook):
    "Its prose and its Markdown outputs"
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            yield pages.source(cell)
        yield from ("".join(output.get("data", {}).get("text/markdown", "")) for output in cell.get("outputs", []))


def test_every_notebook_becomes_a_page(processed, notebooks):
    assert sorted(notebooks) == sorted(path.stem for path in NBS.glob("*.ipynb"))
    from test_project import RENAMED, site_files

    assert [file for file in site_files(SITE) if not (processed / file).exists()] == []
    texts = {stem: json.dumps(notebook, ensure_ascii=False) for stem, notebook in notebooks.items()}
    assert [stem for stem, text in texts.items() if "[[`" in text] == []  # nbdev links names in backticks
    for page, stem in RENAMED.items():
        head = notebooks[stem]["cells"][0]
        assert head["cell_type"] == "raw" and f"- {page}.html" in pages.source(head)
    assert any("def interpolate_rewards(" in pages.source(cell) for cell in notebooks["16_dense"]["cells"])


def test_every_figure_has_an_alternative_text(notebooks):
    found, poor = 0, []
    for stem, notebook in notebooks.items():
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code" and pages.images(cell):
                alt = re.search(r"^#\| fig-alt: (.+)$", pages.source(cell), flags=re.MULTILINE)
                texts = json.loads(alt[1]) if alt else ""
                for text in [texts] if isinstance(texts, str) else texts:
                    found += 1
                    poor += [(stem, text)] if len(text) < 40 or re.search(r"[$\\]|\]\(", text) else []
            for output in cell.get("outputs", []):
                html = "".join(output.get("data", {}).get("text/html", ""))
                poor += [(stem, tag) for tag in re.findall(r"<img(?![^>]*\salt=\"[^\"])[^>]*>", html)]
    assert found > 130 and poor == []


def test_figures_are_sharp_on_high_density_screens(notebooks):
    "Twice the pixels that a page shows, except for the pictures of a model, which have few"
    found, blurred, files_of_pictures = 0, [], {("50_cli", "26b5bfc8")}
    for stem, notebook in notebooks.items():
        for cell in notebook["cells"]:
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}) and "PIL" not in "".join(output["data"]["text/plain"]):
                    width = Image.open(BytesIO(base64.b64decode(output["data"]["image/png"]))).width
                    shown = output["metadata"].get("image/png", {}).get("width", width)
                    found += 1
                    blurred += [(stem, cell["id"])] if width // 2 != shown else []
    assert found > 130 and {*blurred} - files_of_pictures == set()


def test_headings_in_outputs_are_headings_of_the_page(notebooks):
    "Quarto wraps an output whose cell says when it ran; then the contents list lacks it"
    for stem, notebook in notebooks.items():
        assert not [cell for cell in notebook["cells"] if "execution" in cell.get("metadata", {})], stem
    assert "sample_trajectories" in pages.headings(notebooks["12_mdp"])
    reference = next(cell for cell in notebooks["99_api"]["cells"] if "section(chapter, module)" in pages.source(cell))
    assert "#| output: asis" in pages.source(reference) and "sdpo_nb.mdp" in pages.headings(notebooks["99_api"])


def test_the_reference_leads_to_lines(notebooks):
    text = "\n".join(markdown_of(notebooks["99_api"]))
    links = re.findall(r"\[source\]\(\S+/sdpo_nb/(\w+)\.py#(\S+)\)", text)
    assert len(links) > 200 and all(re.fullmatch(r"L\d+", place) for _, place in links)
    module, line = re.search(r"sample_<wbr>trajectories.*?/sdpo_nb/(\w+)\.py#L(\d+)\)", text).groups()
    source = (ROOT / "sdpo_nb" / f"{module}.py").read_text(encoding="utf-8").splitlines()
    assert "sample_trajectories" in "".join(source[int(line) - 1 : int(line) + 2])


def test_no_source_stands_open(notebooks):
    text = json.dumps(notebooks)
    assert "Exported source" not in text and "code-fold: show" not in text


def test_settings_stand_in_tables(notebooks):
    text = "\n".join(markdown_of(notebooks["23_config"]))
    tables = re.findall(r"^### (\w+)$(.*?)(?=^### |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    shown = {name: re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE) for name, table in tables}
    assert "learning_rate" in shown["RunConfig"] and {"credit", "gamma"} <= set(shown["TrainConfig"])
    assert not re.search(r"def TrainConfig\(", text)


def test_first_columns_are_not_squeezed(notebooks):
    "Where Pandoc divides a page of 95 characters by the dashes, no name takes more than three lines"
    tall = []
    for stem, notebook in notebooks.items():
        for text in markdown_of(notebook):
            for table in re.findall(pages.TABLE, re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
                lines = table.strip().split("\n")
                if max(map(len, lines)) > 72:
                    dashes = [len(mark) for mark in pages.table_cells(lines[1])]
                    width = 95 * dashes[0] / sum(dashes)
                    names = [pages.plain(pages.table_cells(line)[0]) for line in lines[2:]]
                    tall += [(stem, name) for name in names if len(name) < 60 and len(name) > 3 * width]
    assert tall == []


def test_links_between_pages_name_a_place(notebooks):
    "Those of nbdev, too, which links every name in backticks"
    site = docs.site_address()
    anchors = {docs.page_name(stem): pages.headings(notebook) for stem, notebook in notebooks.items()}
    dead = []
    for stem, notebook in notebooks.items():
        for text in markdown_of(notebook):
            for page, place in re.findall(re.escape(site) + r"/(\w+)\.html#([\w.]+)", text):
                dead += [] if place in anchors.get(page, ()) else [(stem, page, place)]
    assert dead == []


def test_names_are_found_by_the_search(processed):
    places = {entry["title"]: entry["href"] for entry in docs.search_entries(processed)}
    assert places["sample_trajectories"] == "mdp.html#sample_trajectories" and len(places) > 250


def test_language_models_find_every_page(processed, notebooks):
    text = docs.llms_txt(processed)
    assert text.startswith("# sdpo_nb\n\n> ")
    assert all(f"/{docs.page_name(stem)}.html.md)" in text for stem in notebooks)


def test_the_sidebar_has_the_numbers_of_the_guide(processed, notebooks):
    sidebar = yaml.safe_load((processed / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    items = [item for entry in sidebar for item in entry.get("contents", [entry])]
    assert {Path(item["href"]).stem for item in items} == set(notebooks)
    assert [
        item for item in items if item["href"][0].isdigit() and not item["text"].startswith(item["href"][:2] + " ")
    ] == []


# --- the build, with a stand-in for Quarto

QUARTO = """#!{python}
import json, pathlib, sys
docs = pathlib.Path(sys.argv[sys.argv.index("--output-dir") + 1])
docs.mkdir()
(docs / "search.json").write_text("[]")
(docs / "widget.html").write_text('<script src="https://cdn/npm/@jupyter-widgets/html-manager@*/dist/embed-amd.js">')
print({said!r}, file=sys.stderr)
"""


@pytest.fixture
def build(tmp_path, monkeypatch):
    "build(said): make the site of two pages with a Quarto that says this; the folder of the site"
    folder, programs = tmp_path / "_proc", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    page = dict(cells=[dict(cell_type="raw", source="---\ntitle: A page\n---\n", metadata={})])
    docs.write(folder / "12_mdp.ipynb", page)
    (folder / "sidebar.yml").write_text("website: {sidebar: {contents: [12_mdp.ipynb]}}", encoding="utf-8")
    docs.number_sidebar(folder / "sidebar.yml", {"12_mdp.ipynb": "12 A page"})
    monkeypatch.setattr(docs, "process", lambda: folder)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "nbdev.yml").write_bytes((NBS / "nbdev.yml").read_bytes())
    monkeypatch.setattr(docs, "ROOT", tmp_path)

    def run(said):
        (programs / "quarto").write_text(QUARTO.format(python=sys.executable, said=said))
        (programs / "quarto").chmod(0o755)
        docs.main([])
        return tmp_path / "_docs"

    return run


def test_a_site_is_completed(build, capfd):
    site = build("Output created: widget.html")
    assert "html-manager@1." in (site / "widget.html").read_text() and "[12 A page](" in (site / "llms.txt").read_text()
    assert "Output created" in capfd.readouterr().out and (site / "search.json").is_file()


@pytest.mark.parametrize(
    "said", ["WARN: Unable to resolve link target: x.ipynb", "[WARNING] Div at line 3", "ERROR: no"]
)
def test_what_quarto_warns_of_is_printed_and_stops_the_build(build, capfd, said):
    with pytest.raises(SystemExit, match=re.escape(said)):
        build(f"\x1b[33m{said}\x1b[39m")
    assert said in capfd.readouterr().out


def test_the_site_is_built_by_this():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    workflow = (ROOT / ".github" / "workflows" / "docs.yml").read_text(encoding="utf-8")
    assert ".ci/docs.py" in makefile.partition("\ndocs:")[2].partition("\n\n")[0] and "make docs" in workflow
    assert all(name in workflow for name in ("llms.txt", "404.html", "search.json", "mdp.html.md"))
