"""The facts of the project agree with each other, and what its pages point to exists. The site: tests/test_site.py."""

import ast
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from fastcore.nbio import nb_frontmatter, read_nb
from nbdev.config import get_config, read_version
from notebook_process import FOLDED, solution_code
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(NBS.glob("*.ipynb"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CONFIG = get_config(ROOT)

settings = ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini", encoding="utf-8")
facts = settings["DEFAULT"]


def names(path):
    "The test ids of notebooks and pages"
    return path.name


def cells(path, kind):
    "The sources of the cells of one kind in the notebook at `path`"
    return [
        "".join(cell["source"])
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == kind
    ]


def page_text(path):
    "The prose of a notebook or Markdown page, without its code blocks"
    text = "\n\n".join(cells(path, "markdown")) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    return re.sub(r"(```.*?```|`[^`\n]*`|<!--.*?-->)", "", text, flags=re.DOTALL)


def link_targets(path):
    "What the links and images of the page at `path` point to"
    text = page_text(path)
    return re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)


def sidebar_entries(contents):
    "The files that a sidebar lists, sections within sections included, in reading order"
    for entry in contents:
        if isinstance(entry, str):
            yield entry
        else:
            if "href" in entry:
                yield entry["href"]
            yield from sidebar_entries(entry.get("contents", []))


def load_sidebar(section=None):
    "The entries of nbs/sidebar.yml, or those of one section"
    contents = yaml.safe_load((NBS / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    if section:
        contents = [entry for entry in contents if isinstance(entry, dict) and entry["section"] == section]
    return list(sidebar_entries(contents))


START = ["index.ipynb", "guide.ipynb", "first_run.ipynb", "your_taste.ipynb"]  # the way in; these have no number
# The tens of a notebook's number say what it is for; the sidebar has a section for each group.
GROUPS = {
    "The method": "1",
    "The loop": "2",
    "Judging a run": "3",
    "Related methods": "4",
    "How to": "5",
    "Comparisons": "6",
    "Appendix": "09",
}
LEARN = [NBS / name for section in list(GROUPS)[:3] for name in load_sidebar(section)]
REFERENCE = "22 23 24 25 27 32 33 35".split()  # numbers of pages to look things up in: no exercises
CHAPTERS = [path for path in LEARN if path.name[:2] not in REFERENCE]
MORE = (
    "41_spo 43_lasro 45_taste 54_scorers 57_tiny_flow 59_scorers_2026 60_baselines 93_embedded_flow your_taste".split()
)
EXERCISES = [*CHAPTERS, *(NBS / f"{name}.ipynb" for name in MORE)]
RENAMED = {"viz": "31_figures", "schedules": "20_batching", "rivals": "60_baselines"}  # pages, and where they are now


def test_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert read_version(ROOT / "sdpo_nb") == facts["version"] == citation["version"]
    assert f"## [{facts['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_name_is_the_same_everywhere():
    assert CONFIG.lib_name == facts["lib_name"] == CONFIG.repo


def test_torchvision_is_not_needed():
    assert not any("torchvision" in facts[key] for key in facts)
    imports = re.compile(r"^\s*(?:from|import)\s+torchvision", flags=re.MULTILINE)
    assert not [path.name for path in NOTEBOOKS if any(imports.search(source) for source in cells(path, "code"))]


@pytest.mark.parametrize("target, minutes", [("test", "eleven minutes on two"), ("test-slow", "a quarter of an hour")])
def test_make_says_first_how_long_its_tests_take_and_where(target, minutes):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (say,) = re.findall(r"^SAY := .* -c '(.*)'$", makefile, flags=re.MULTILINE)
    (told,) = re.findall(rf'^{target}: .*\n\t@\$\(SAY\) "(.*)"\n\t.*pytest', makefile, flags=re.MULTILINE)
    command = [sys.executable, "-c", say.replace("$(VENV)", ".venv"), told]
    line = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert minutes in line and ".venv, on the CPU" in line and "cores" in line
    assert minutes in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")  # in one voice


def test_console_scripts_name_functions_that_exist():
    for line in facts["console_scripts"].strip().splitlines():
        module, function = line.split("=")[1].strip().split(":")
        source = (ROOT / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8")
        defined = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
        assert function in defined


def load_site():
    "_quarto.yml"
    return yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))


def site_files(site):
    "Everything in this project that the site's configuration names"
    pages, navbar = site["website"], site["website"]["navbar"]
    shown = [
        pages["favicon"],
        pages["open-graph"]["image"],
        pages["twitter-card"]["image"],
        *site["project"]["resources"],
    ]
    links = [item["href"] for item in [*navbar["left"], *navbar["right"]] if "://" not in item["href"]]
    return [path.lstrip("/") for path in [*site["metadata-files"], site["format"]["html"]["css"], *shown, *links]]


def test_site_configuration():
    link, site = NBS / "_quarto.yml", load_site()
    assert link.read_text(encoding="utf-8") == (ROOT / "_quarto.yml").read_text(encoding="utf-8")
    if (ROOT / ".git").exists():
        assert link.is_symlink() and link.resolve() == ROOT / "_quarto.yml"  # a source archive holds a copy
    assert {"light", "dark"} <= site["format"]["html"]["theme"].keys()
    assert [path for path in site_files(site) if not (NBS / path).exists()] == []
    assert (
        site["website"]["search"]
        and site["website"]["repo-subdir"] == NBS.name
        and "source" in site["website"]["repo-actions"]
    )
    assert [item["text"] for item in site["website"]["navbar"]["left"]] == ["Learn", "How to", "Reference", "Results"]


def test_social_card_and_icon():
    site = load_site()["website"]
    assert (
        site["open-graph"]["image"] == site["twitter-card"]["image"]
        and site["twitter-card"]["card-style"] == "summary_large_image"
    )
    assert len(site["open-graph"]["image-alt"]) > 40
    card, icon = NBS / site["open-graph"]["image"].lstrip("/"), NBS / site["favicon"]
    with Image.open(card) as picture:
        assert picture.size == (1200, 630)
    with Image.open(icon) as picture:
        assert picture.size == (64, 64)
    assert card.stat().st_size < 200_000 and icon.stat().st_size < 10_000


def test_site_is_made_by_a_pinned_quarto():
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "docs.yml").read_text(encoding="utf-8"))["jobs"]
    setups = [
        step
        for job in steps.values()
        for step in job["steps"]
        if step.get("uses", "").startswith("quarto-dev/quarto-actions/setup")
    ]
    assert len(setups) == 1
    version = str(setups[0]["with"]["version"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", version) and f"Quarto {version.rpartition('.')[0]}" in (
        ROOT / "Makefile"
    ).read_text(encoding="utf-8")


def test_every_notebook_stands_in_the_sidebar_once():
    assert sorted(load_sidebar()) == sorted(path.relative_to(NBS).as_posix() for path in NOTEBOOKS)


def test_the_sidebar_has_a_section_for_each_group_of_numbers():
    contents = yaml.safe_load((NBS / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    assert contents[: len(START)] == START
    assert [entry["section"] for entry in contents[len(START) :]] == list(GROUPS)
    for section, tens in GROUPS.items():
        numbered = [path.name for path in NOTEBOOKS if path.name[0] in tens]
        assert load_sidebar(section) == sorted(numbered), section


@pytest.mark.parametrize("tens", "0123456")
def test_the_numbers_of_a_group_have_no_gaps(tens):
    numbers = [path.name.partition("_")[0] for path in NOTEBOOKS if path.name[0] == tens]
    assert numbers == [f"{tens}{i}" for i in range(len(numbers))]


@pytest.mark.parametrize("page", RENAMED)
def test_pages_that_were_renamed_keep_their_old_address(page):
    assert f"{page}.html" in nb_frontmatter(read_nb(NBS / f"{RENAMED[page]}.ipynb")).get("aliases", [])


def test_nothing_links_to_an_old_address():
    site = re.escape(CONFIG.doc_host + CONFIG.doc_baseurl.rstrip("/"))
    old = re.compile(rf"{site}/(?:{'|'.join(RENAMED)})\.html")
    texts = {path: path.read_text(encoding="utf-8") for path in [*NOTEBOOKS, *ROOT.glob("*.md")]}
    assert [path.name for path, text in texts.items() if old.search(text)] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_notebook_opens_with_title_and_subtitle(path):
    assert re.match(r"# \S.*\n+> \S", cells(path, "markdown")[0])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_the_site_shows_exported_code(path):
    "It leaves cells that begin with `#| export` out, and shows those that begin with `#| exports`"
    assert [source for source in cells(path, "code") if re.match(r"#\|\s*export\s*$", source, flags=re.MULTILINE)] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_imports_stand_in_cells_of_their_own(path):
    "nbdev runs every cell that holds an import again when it makes the site"
    mixed = []
    for source in cells(path, "code"):
        if re.search(r"^\s*[!%]", source, flags=re.MULTILINE) or source.startswith("#| hide"):
            continue
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body}
        if len(kinds) == 2:
            mixed.append(source)
    assert mixed == []


def anchors(path):
    "What a link to the page at `path` may name: its headings as Pandoc names them, and what it defines"
    headings = re.findall(
        r"^#+ (.+)$",
        re.sub(r"```.*?```", "", "\n\n".join(cells(path, "markdown")), flags=re.DOTALL),
        flags=re.MULTILINE,
    )
    slugs = [
        re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", heading.lower()).strip()))
        for heading in headings
    ]
    return {
        *slugs,
        *(
            name.lower()
            for source in cells(path, "code")
            for name in re.findall(r"^(?:def|class) (\w+)", source, flags=re.MULTILINE)
        ),
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_links_into_pages_name_a_place(path):
    outputs = [
        "".join(output.get("data", {}).get("text/markdown", ""))
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        for output in cell.get("outputs", [])
    ]
    targets = [*link_targets(path), *re.findall(r"\]\(([^)\s]+)\)", "\n".join(outputs))]
    pages = {target.partition("#")[0] for target in targets if re.fullmatch(r"[\w.]*#[^)]+", target)}
    places = {page: anchors(NBS / page if page else path) for page in pages}
    assert [
        target
        for target in targets
        if target.partition("#")[0] in pages
        and "#" in target
        and target.partition("#")[2] not in places[target.partition("#")[0]]
    ] == []


@pytest.mark.parametrize("path", [*NOTEBOOKS, *sorted(ROOT.glob("*.md"))], ids=names)
def test_links_lead_somewhere(path):
    here = re.compile(re.escape(CONFIG.git_url) + r"/(?:blob|tree|raw)/main/(\S+)")
    colab = re.compile(
        r"https://colab\.research\.google\.com/github/"
        + re.escape(f"{CONFIG.user}/{CONFIG.repo}")
        + r"/blob/main/(\S+)"
    )
    broken = []
    for target in link_targets(path):
        inside = here.match(target) or colab.match(target)
        if inside:
            file = ROOT / inside[1].split("#")[0]
        elif re.match(r"[a-z]+:|#|//", target):
            continue
        else:
            file = path.parent / unquote(target.split("#")[0])
        if not file.exists():
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_colab_badge_opens_this_notebook(path):
    opened = [target for target in link_targets(path) if target.startswith("https://colab.research.google.com/github/")]
    assert opened and all(target.endswith(f"/nbs/{path.name}") for target in opened)
    install = next(source for source in cells(path, "code") if "pip install" in source)
    assert install.startswith("#| hide\n#| eval: false\n! [ -e /content ] && ")  # acts on Colab only


def exercises(path):
    "The cells of the chapter's exercises, from their heading to the next one"
    inside, found = False, []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        for heading in re.findall(r"^## (.+)$", source if cell["cell_type"] == "markdown" else "", flags=re.MULTILINE):
            inside = heading.strip() == "Exercises"
        if inside:
            found.append(cell)
    return found


def code_lines(source):
    "The lines of code, without directives and blank lines"
    return [line.rstrip() for line in source.splitlines() if line.strip() and not line.startswith("#|")]


@pytest.mark.parametrize("path", EXERCISES, ids=names)
def test_chapter_has_exercises_with_solutions(path):
    found = [solution_code(cell) for cell in exercises(path) if "Solution" in "".join(cell["source"])]
    assert len(found) >= 2 and all(code_lines(code) for code in found)  # test_notebooks.py runs them


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_no_solution_stands_open(path):
    "The code of a solution stands in its fold alone; Jupyter shows every code cell, whatever its directives say"
    notebook = json.loads(path.read_text(encoding="utf-8"))["cells"]
    folded = [code_lines(code) for code in map(solution_code, notebook) if code]
    shown = [code_lines("".join(cell["source"])) for cell in notebook if cell["cell_type"] == "code"]
    assert [code[:3] for code in shown if code in folded] == []
    for cell in exercises(path):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and re.search(r"(?i)\bsolution\b", source):
            assert source.startswith(FOLDED + "\n\n") and source.rstrip().endswith("\n</details>"), source[:60]


def test_solutions_are_formatted_like_cells(tmp_path):
    notebooks = {path.stem: json.loads(path.read_text(encoding="utf-8"))["cells"] for path in NOTEBOOKS}
    codes = {
        f"{stem}_{i}.py": code
        for stem, notebook in notebooks.items()
        for i, code in enumerate(filter(None, map(solution_code, notebook)))
    }
    assert len(codes) > 50
    for name, code in codes.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    form = [sys.executable, "-m", "ruff", "format", "--diff", "--isolated", "--line-length=120", tmp_path]
    assert subprocess.run(form, capture_output=True, text=True).stdout == ""


@pytest.mark.parametrize("path", [*EXERCISES, NBS / "61_results.ipynb"], ids=names)
def test_chapter_ends_with_questions(path):
    text = "\n\n".join(cells(path, "markdown"))
    assert text.count("\n## Check yourself") == 1
    assert (
        len(
            re.findall(
                r"^\s*(?:[*-]|\d+\.) +\S",
                text.partition("\n## Check yourself")[2].partition("\n## ")[0],
                flags=re.MULTILINE,
            )
        )
        >= 4
    )


# What another execution of a notebook would write differently, though nothing has changed
CHANGING = {
    "a temporary folder": r"/tmp/\w|/var/folders/|\\Temp\\",
    "a place in memory": r"\b0x[0-9a-f]{8,}",
    "a progress bar": r"\d+%\|.*\||\b(?:it|step|epoch|s)/(?:s|it|step|epoch)\b",
    "the time left": r"\d\d:\d\d left",
    "a path of this checkout": re.escape(str(ROOT)) + r"(?=[/\\])",
}
LIVE = ["35_widget.ipynb"]  # widgets, whose ids are drawn anew
WIDGET = "application/vnd.jupyter.widget-view+json"


def shown_text(output):
    "What an output shows as text or HTML; pictures inside HTML are left out"
    data = output.get("data", {})
    texts = [output.get("text", ""), *(text for kind, text in data.items() if kind.startswith("text/"))]
    return re.sub(r"base64,[\w+/=]+", "", "\n".join("".join(text) for text in texts))


def widgets_shown(notebook):
    "The ids of the widgets that the outputs show"
    outputs = [output.get("data", {}) for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return {data[WIDGET]["model_id"] for data in outputs if WIDGET in data}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_saved_outputs_hold_nothing_that_changes_by_itself(path):
    "So that executing a chapter again leaves no changes to commit"
    notebook, found = json.loads(path.read_text(encoding="utf-8")), []
    for cell in notebook["cells"]:
        for text in map(shown_text, cell.get("outputs", [])):
            found += [(cell["id"], what) for what, pattern in CHANGING.items() if re.search(pattern, text)]
    if path.name not in LIVE and (widgets_shown(notebook) or "widgets" in notebook["metadata"]):
        found.append(
            ("a widget", "a bar's: tqdm.__init__ = partialmethod(tqdm.__init__, disable=True) in the first cell")
        )
    assert found == []


@pytest.mark.parametrize("name", LIVE)
def test_the_state_of_widgets_is_stored(name):
    "JupyterLab leaves it out unless it is told otherwise; a page without it shows `model not found`"
    notebook = json.loads((NBS / name).read_text(encoding="utf-8"))
    stored = notebook["metadata"].get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {})
    lost = widgets_shown(notebook) - stored.get("state", {}).keys()
    again = f"jupyter execute --inplace nbs/{name} && nbdev-clean --fname nbs/{name}"
    assert widgets_shown(notebook) and not lost, f"the widgets' state is lost; store it with: {again}"
    twins = [output["data"] for cell in notebook["cells"] for output in cell.get("outputs", []) if "data" in output]
    assert any("data-explorer" in "".join(data.get("text/html", "")) for data in twins)  # needs no widgets


@pytest.mark.parametrize("path", CHAPTERS, ids=names)
def test_chapter_has_a_picture_and_a_reasonable_size(path):
    shown = [
        output.get("data", {})
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        for output in cell.get("outputs", [])
    ]
    assert any({"image/png", "image/svg+xml"} & data.keys() for data in shown)
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_no_error_was_saved(path):
    "Neither as an output nor as a traceback that a cell printed"
    outputs = [
        output for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] for output in cell.get("outputs", [])
    ]
    assert [output for output in outputs if output["output_type"] == "error"] == []
    assert [
        text for output in outputs if "Traceback (most recent call last)" in (text := "".join(output.get("text", "")))
    ] == []


def test_the_guide_lists_the_chapters():
    guide = link_targets(NBS / "guide.ipynb")
    rows = re.findall(r"^\| \d+ \| \[[^]]+\]\((\S+)\) \| \S.* \|$", page_text(NBS / "guide.ipynb"), flags=re.MULTILINE)
    assert [NBS / target for target in rows if NBS / target in LEARN] == LEARN
    assert set(load_sidebar()) - {"index.ipynb", "guide.ipynb", *guide} == set()
    assert sorted(rows) == sorted(set(load_sidebar()) - set(START))


def test_the_front_page_is_short_and_leads_on():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    prose = re.sub(r"^\|.*\|$|^```.*?^```$|\]\(\S+\)", "", readme, flags=re.MULTILINE | re.DOTALL)
    assert len(prose.split()) <= 600
    assert {"guide.ipynb", "58_colab.ipynb", "first_run.ipynb"} <= set(link_targets(NBS / "index.ipynb"))
    assert "Self-Distillation Policy Optimization" in readme and "](nbs/images/demo.png)" in readme


def public_names():
    "`__all__` of every module, by the module's name"
    found = {}
    for path in sorted((ROOT / facts["lib_name"]).glob("[!_]*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                found[f"{facts['lib_name']}.{path.stem}"] = ast.literal_eval(node.value)
    return found


def test_reference_lists_what_users_call_and_nothing_else():
    "Otherwise run nbs/99_api.ipynb again"
    page = json.loads((NBS / "99_api.ipynb").read_text(encoding="utf-8"))
    outputs = [output.get("data", {}) for cell in page["cells"] for output in cell.get("outputs", [])]
    shown = "\n".join("".join(data.get("text/markdown", "")) for data in outputs)
    listed = {}
    for heading, table in re.findall(r"^## (\S+)$(.*?)(?=^## |\Z)", shown, flags=re.MULTILINE | re.DOTALL):
        listed[heading] = re.findall(r"<code>(\w+)</code>", table.replace("<wbr>", ""))
        assert len(listed[heading]) == table.count("[source](")
    assert listed == public_names()


@pytest.mark.parametrize("path", WORKFLOWS, ids=names)
def test_workflow_fits_its_schema(path):
    check_schema("vendor.github-workflows", path)


def test_citation_fits_its_schema():
    check_schema("vendor.citation-file-format", ROOT / "CITATION.cff")


def check_schema(schema, path):
    "Check the file at `path` against a schema that comes with check-jsonschema"
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def contents(tree):
    "The notebooks, site files and modules of a checkout: text by path"
    files = [
        path
        for folder in ("nbs", "sdpo_nb")
        for path in sorted((tree / folder).rglob("*"))
        if path.suffix in {".ipynb", ".py", ".yml", ".txt", ".md"}
    ]
    return {path.relative_to(tree).as_posix(): path.read_text(encoding="utf-8") for path in files}


NBDEV = """
from nbdev.doclinks import nbdev_export
from nbdev.clean import nbdev_clean
from nbdev.quarto import refresh_quarto_yml
nbdev_export()
nbdev_clean()
refresh_quarto_yml()
"""


def test_notebooks_are_clean_and_in_step_with_the_modules(tree):
    before = contents(tree)
    subprocess.run([sys.executable, "-c", NBDEV], cwd=tree, check=True, capture_output=True)
    after = contents(tree)
    assert [path for path in sorted(before | after) if before.get(path) != after.get(path)] == []


def test_readme_is_made_from_the_index():
    assert (
        subprocess.run(
            [sys.executable, ROOT / ".ci" / "readme.py", "--check"], capture_output=True, text=True
        ).returncode
        == 0
    )
