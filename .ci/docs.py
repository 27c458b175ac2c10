"""Make the site in _docs, and fail where Quarto warns; `make docs` runs this.

python .ci/docs.py            # needs Quarto
python .ci/docs.py --pages    # only what Quarto is given, in _proc

nbdev processes the notebooks, .ci/pages.py mends the pages, Quarto renders them in one process that can be read here,
and what Quarto has no setting for is done at the end: the names in the search index, llms.txt, pinned scripts.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pages
import yaml

ROOT = Path(__file__).resolve().parent.parent
WARNING = re.compile(r"\b(?:WARN(?:ING)?|ERROR)\b|\[warning\]", flags=re.IGNORECASE)
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
PINNED = {"@jupyter-widgets/html-manager@*": "@jupyter-widgets/html-manager@1.0.15"}  # of ipywidgets 8.1


def read(path: Path) -> dict:
    "A JSON file"
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, value):
    "The same, back"
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def site_address() -> str:
    "Where the site will be"
    return yaml.safe_load((ROOT / "nbs" / "nbdev.yml").read_text(encoding="utf-8"))["website"]["site-url"].rstrip("/")


def page_name(stem: str) -> str:
    "The address of a notebook's page, as nbdev names it: without its number"
    return re.sub(r"^\d+[a-zA-Z0-9]*_", "", stem)


def module_of(notebook: Path) -> str | None:
    "The module that a notebook exports"
    named = re.search(r"^\s*\"#\| default_exp (\w+)", notebook.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return f"sdpo_nb.{named[1]}" if named else None


# --- before Quarto


def numbered(page: dict):
    "The reference's links to the source lead to the line"
    for cell in page["cells"]:
        for data in (output.get("data", {}) for output in cell.get("outputs", [])):
            if "text/markdown" in data:
                link = r"\[source\]\((\S+/sdpo_nb/(\w+)\.py)#(\w+)\)"
                data["text/markdown"] = re.sub(link, numbered_link, "".join(data["text/markdown"]))


def numbered_link(match: re.Match) -> str:
    "A link to where a module defines a name"
    tree = ast.parse((ROOT / "sdpo_nb" / f"{match[2]}.py").read_text(encoding="utf-8"))
    for node in tree.body:
        names = [getattr(node, "name", None), *(getattr(target, "id", None) for target in getattr(node, "targets", []))]
        if match[3] in names:
            return f"[source]({match[1]}#L{node.lineno})"
    return f"[source]({match[1]})"


def label(path: Path, page: dict) -> str:
    "What the sidebar calls a page: its number, as in the reading guide, and its title"
    number, title = re.match(r"(\d*)", path.stem)[1], front_matter(page).get("title", path.stem)
    return f"{number} {title}".strip()


def number_sidebar(file: Path, names: dict):
    "Put labels in place of the bare files of a sidebar"
    site = yaml.safe_load(file.read_text(encoding="utf-8"))
    entries = site["website"]["sidebar"]["contents"]
    listed = [one for entry in entries for one in (entry["contents"] if isinstance(entry, dict) else [entry])]
    if lost := [one for one in listed if one not in names]:
        raise SystemExit(f"nbs/sidebar.yml lists {', '.join(lost)}, which is not there: add the notebook or remove it.")
    for contents in [entries, *(entry["contents"] for entry in entries if isinstance(entry, dict))]:
        contents[:] = [dict(text=names[one], href=one) if isinstance(one, str) else one for one in contents]
    file.write_text(yaml.safe_dump(site, sort_keys=False, allow_unicode=True, width=200), encoding="utf-8")


def finish(folder: Path):
    "Mend every page that nbdev has written into a folder"
    processed = {path: read(path) for path in sorted(folder.glob("*.ipynb"))}
    for path, page in processed.items():
        pages.finish(page, path.stem, module_of(ROOT / "nbs" / path.name))
    anchors, site = {page_name(path.stem): pages.headings(page) for path, page in processed.items()}, site_address()
    for path, page in processed.items():
        for cell in page["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = pages.mend_anchors(pages.source(cell), site, anchors)
            for data in (output.get("data", {}) for output in cell.get("outputs", [])):
                if "text/markdown" in data:
                    data["text/markdown"] = pages.mend_anchors("".join(data["text/markdown"]), site, anchors)
        if path.stem == "99_api":
            numbered(page)
        write(path, page)
    number_sidebar(folder / "sidebar.yml", {path.name: label(path, page) for path, page in processed.items()})


def process() -> Path:
    "The folder of pages for Quarto, made anew"
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs

    shutil.rmtree(ROOT / "_proc", ignore_errors=True)
    refresh_quarto_yml()
    folder = proc_nbs(n_workers=0)
    finish(folder)
    return folder


# --- Quarto


def render(folder: Path) -> list:
    "Render in one process, print what Quarto says as it says it, and return its warnings; raises where it fails"
    command = ["quarto", "render", "--no-cache", "--output-dir", str(folder / "_docs")]
    said = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    warnings = []
    for line in said.stdout:
        print(line, end="", flush=True)
        if WARNING.search(line := ESCAPE.sub("", line).strip()):
            warnings.append(line)
    if said.wait():
        raise SystemExit(f"Quarto failed with status {said.returncode}; what it said stands above.")
    return warnings


# --- after Quarto


def defined(page: dict) -> dict:
    "What a page documents: the first sentence about a name by its name"
    found = {}
    for cell in page["cells"]:
        if cell["cell_type"] == "code" and re.search(r"^show_doc\(", pages.source(cell), flags=re.MULTILINE):
            for data in (output.get("data", {}) for output in cell.get("outputs", [])):
                text = "".join(data.get("text/markdown", ""))
                if heading := re.search(r"^### (\S+)$", text, flags=re.MULTILINE):
                    about = re.findall(r"^\*(.+)\*\s*$", text, flags=re.MULTILINE)
                    found[heading[1]] = pages.plain(about[0]) if about else ""
    return found


def front_matter(page: dict) -> dict:
    "Title and description of a page"
    first = pages.source(page["cells"][0]) if page["cells"] else ""
    return next(yaml.safe_load_all(first.strip("-\n ") + "\n")) or {} if first.startswith("---") else {}


def search_entries(folder: Path) -> list:
    "An entry of the search index for each name, titled by the name: Quarto's own index knows sections only"
    entries = []
    for path in sorted(folder.glob("*.ipynb")):
        page = read(path)
        for name, about in defined(page).items():
            place, title = f"{page_name(path.stem)}.html#{name.lower()}", front_matter(page).get("title", path.stem)
            entry = dict(objectID=f"{place}-name", href=place, title=name, section=title, text=f"{name}: {about}")
            entries.append(entry | dict(crumbs=[title]))
    return entries


def llms_txt(folder: Path) -> str:
    "The site in a page for language models: every chapter with its subtitle, and the address of its Markdown twin"
    site = yaml.safe_load((ROOT / "nbs" / "nbdev.yml").read_text(encoding="utf-8"))["website"]
    sidebar = yaml.safe_load((folder / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]  # with labels
    lines = [f"# {site['title']}", "", f"> {site['description']}", ""]
    for entry in sidebar["contents"]:
        if "section" in entry:
            lines += ["", f"## {entry['section']}", ""]
        for item in entry.get("contents", [entry]):
            path = folder / item["href"]
            facts = front_matter(read(path))
            address = f"{site_address()}/{page_name(path.stem)}.html.md"
            lines.append(f"- [{item['text']}]({address}): {facts.get('description', facts.get('title', ''))}")
    return "\n".join(lines) + "\n"


def complete(folder: Path, docs: Path):
    "What Quarto has no setting for"
    search = docs / "search.json"
    write(search, [*read(search), *search_entries(folder)])
    (docs / "llms.txt").write_text(llms_txt(folder), encoding="utf-8")
    for path in docs.glob("*.html"):
        text = path.read_text(encoding="utf-8")
        for loose, pinned in PINNED.items():
            text = text.replace(loose, pinned)
        path.write_text(text, encoding="utf-8")


def main(words: list):
    folder = process()
    if "--pages" in words:
        return
    warnings = render(folder)
    complete(folder, folder / "_docs")
    shutil.rmtree(ROOT / "_docs", ignore_errors=True)
    shutil.move(folder / "_docs", ROOT / "_docs")
    if warnings:
        raise SystemExit(f"Quarto warned {len(warnings)} times:\n" + "\n".join(warnings))


if __name__ == "__main__":
    main(sys.argv[1:])
