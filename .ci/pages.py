"""What is done to a notebook between nbdev and Quarto, so that the site works; `.ci/docs.py` calls `finish`."""

import ast
import json
import re
from dataclasses import fields, is_dataclass
from importlib import import_module

FOLDED_PAGES = {"61_results"}  # pages of results: all of their code is helper code
KINDS = {  # what a figure is, by what its code calls; the first that is found
    "film_strip": "Film strips",
    "step_grid": "Grid of pictures before and after training",
    "similarity_map": "Map of similarities",
    "reward_map": "Map of rewards",
    "advantage_map": "Map of advantages",
    "anchor_histogram": "Histogram of anchor steps",
    "training_curves": "Curves of a training run",
    "diversity_curve": "Curves of diversity",
    "step_curves": "Curves by number of steps",
    "frontier_figure": "Paths of gain against agreement",
    "frontier_curves": "Paths of gain against agreement",
    "scatter": "Scatter plot",
    "hist": "Histogram",
    "bar": "Bar chart",
    "barh": "Bar chart",
    "errorbar": "Chart with error bars",
    "plot": "Line chart",
    "semilogy": "Line chart",
    "loglog": "Line chart",
    "imshow": "Pictures or maps",
}
LONGEST_ALT = 400  # characters
GREEK = dict(alpha="α", beta="β", gamma="γ", Delta="Δ", varepsilon="ε", epsilon="ε", eta="η", theta="θ", kappa="κ")
GREEK |= dict(lambda_="λ", mu="μ", nu="ν", pi="π", rho="ρ", sigma="σ", tau="τ", phi="φ", partial="∂", pm="±", times="×")
GREEK |= dict(nabla="∇", cdot="·", le="≤", ge="≥", approx="≈", sum="sum of ", dots="…", ldots="…", infty="∞")


def source(cell: dict) -> str:
    "The text of a cell"
    return "".join(cell["source"])


def directives(cell: dict) -> str:
    "The `#|` lines that a cell begins with"
    return re.match(r"(?:#\|.*\n?)*", source(cell))[0]


def add_directives(cell: dict, **given):
    "Put cell options of Quarto in front of a cell"
    lines = [f"#| {name.replace('_', '-')}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in given.items()]
    cell["source"] = "".join(lines) + source(cell)


def strip_execution(cell: dict):
    "nbdev notes when it ran a cell; Quarto then wraps the output, and its headings are no longer those of the page"
    cell.get("metadata", {}).pop("execution", None)


# --- code


def defined_names(code: str) -> list:
    "What a cell defines at its top level, a patched method as `Class.method`; `imports` where it imports only"
    names, nodes = [], ast.parse(code).body
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            patched = any(getattr(one, "id", "") == "patch" for one in node.decorator_list)
            owner = node.args.args[0].annotation.id + "." if patched else ""
            names.append(owner + node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return names or ["imports"]


def fold_source(cell: dict, stem: str):
    "Exported source is closed, since its signature stands above, and its fold says whose it is; results before code"
    if cell["cell_type"] != "code":
        return
    head = directives(cell)
    if 'code-summary: "Exported source"' in head:
        names = list(dict.fromkeys(defined_names(source(cell)[len(head) :])))
        summary = "Source: " + ", ".join(names[:4]) + ", …" * (len(names) > 4)
        text = source(cell).replace("code-fold: show", "code-fold: true", 1)
        cell["source"] = text.replace('"Exported source"', json.dumps(summary), 1)
    elif stem in FOLDED_PAGES and "code-fold" not in head and "echo: false" not in head:
        add_directives(cell, code_fold=True, code_summary="Code")


# --- figures


def plain(text: str) -> str:
    "Markdown as somebody would read it aloud"
    text = re.sub(r"<[^>]+>|!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"\\hat *\\?(\w)", r"\1̂", text)
    for command, symbol in GREEK.items():
        text = re.sub(rf"\\{command.rstrip('_')}(?![a-zA-Z])", symbol, text)
    text = re.sub(
        r"\\(?:mathcal|mathbb|text|bar|hat|Bigl?|Bigr?|quad|operatorname|bigl?|bigr?|left|right|[,;!])", "", text
    )
    text = re.sub(r"[$*`{}\\]", "", text)
    return " ".join(re.sub(r"(?m)^\s*(?:[-*>]|\d+\.)\s+", "", text).split())


def sentences(text: str) -> list:
    "The sentences of a piece of prose"
    return [part for part in re.split(r"(?<=[.!?:])\s+(?=[A-Z0-9“‘(])", plain(text)) if part]


def paragraphs(cell: dict) -> list:
    "The prose of a Markdown cell: no headings, tables, formulas, code or folds"
    text = re.sub(r"```.*?```|\$\$.*?\$\$|<details>.*?</details>|<!--.*?-->", "", source(cell), flags=re.DOTALL)
    blocks = [block.strip() for block in re.split(r"\n\s*\n", text)]
    return [block for block in blocks if block and not re.match(r"#|\||:::|---|\[!\[|<", block)]


def finding(cells: list, place: int) -> str:
    "What the page says about a figure: the first sentence below it, or the last above where something else follows"
    after = place + 1
    while after < len(cells) - 1 and cells[after]["cell_type"] == "code" and not cells[after].get("outputs"):
        after += 1  # a test between a figure and what is said about it
    below = cells[after] if after < len(cells) else None
    if below and below["cell_type"] == "markdown" and not source(below).startswith("#") and paragraphs(below):
        said = sentences(paragraphs(below)[0])
        return " ".join(said[: 1 if len(said[0]) > 40 else 2])
    for cell in reversed(cells[:place]):
        if cell["cell_type"] == "markdown" and paragraphs(cell):
            said = sentences(paragraphs(cell)[-1])
            return said[-1] if len(said[-1]) > 40 else " ".join(said[-2:])
    return ""


def with_functions(cells: list, place: int) -> str:
    "The code of a cell, after that of the functions of the page that it calls"
    codes = [
        re.sub(r"(?m)^\s*[!%].*$", "pass", source(cell)) for cell in cells[: place + 1] if cell["cell_type"] == "code"
    ]
    nodes = [node for code in codes for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
    called = {getattr(node.func, "id", "") for node in ast.walk(ast.parse(codes[-1])) if isinstance(node, ast.Call)}
    return "\n".join([codes[-1], *(ast.unparse(node) for node in nodes if node.name in called)])


def literal(node) -> str:
    "A text in code; what an f-string fills in becomes three dots"
    if isinstance(node, ast.JoinedStr):
        return plain("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
    return plain(node.value) if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def labels(code: str) -> dict:
    "The labels of the axes and the titles in the code of a figure, each once"
    found = {"ylabel": [], "xlabel": [], "title": []}
    for call in [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]:
        named = {word.arg: word.value for word in call.keywords}
        method = getattr(call.func, "attr", "")
        if method.startswith(("set_", "suptitle")) and call.args:
            named[method.removeprefix("set_").removeprefix("sup")] = call.args[0]
        for name, value in named.items():
            if name in found and (text := literal(value).strip("… ")):
                found[name].append(text)
    return {name: list(dict.fromkeys(texts))[:3] for name, texts in found.items()}


def figure_kind(code: str) -> str:
    "What a figure is, what its axes show, and what is written above it"
    calls = [node.func for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    names = {getattr(call, "attr", getattr(call, "id", "")) for call in calls}
    kind, found = next((text for name, text in KINDS.items() if name in names), "Figure"), labels(code)
    if found["ylabel"] and found["xlabel"]:
        kind += f": {' and '.join(found['ylabel'])} against {' and '.join(found['xlabel'])}"
    elif axis := found["ylabel"] or found["xlabel"]:
        kind += f": {', '.join(axis)}"
    return kind + (f"; titled {', '.join(found['title'])}" if found["title"] else "")


def alt_text(cells: list, place: int) -> str:
    "What somebody who does not see the figure is told: what it is, its axes, and what the page reads from it"
    text = f"{figure_kind(with_functions(cells, place)).rstrip('.')}. {finding(cells, place)}".strip().rstrip(":;,.")
    text = text if len(text) <= LONGEST_ALT else text[:LONGEST_ALT].rsplit(" ", 1)[0] + " …"
    return text if text.endswith(("?", "!", "…")) else text + "."


def images(cell: dict) -> int:
    "How many pictures a cell shows"
    kinds = [output.get("data", {}).keys() for output in cell.get("outputs", [])]
    return sum(bool({"image/png", "image/svg+xml", "image/jpeg"} & kind) for kind in kinds)


def describe_figures(cells: list):
    "Give every figure an alternative text; what stands in the cell, `#| fig-alt: …`, is left as it is"
    for place, cell in enumerate(cells):
        if cell["cell_type"] == "code" and images(cell) and "fig-alt:" not in directives(cell):
            text = alt_text(cells, place)
            add_directives(cell, fig_alt=text if images(cell) == 1 else [text] * images(cell))


# --- prose


def badge(text: str) -> str:
    "A linked picture alone in a paragraph would become a figure, and its text a caption"
    pattern = r"(?m)^\[!\[([^\]]*)\]\(([^)\s]+)\)\]\(([^)\s]+)\)$"
    return re.sub(pattern, r'<p><a href="\3"><img src="\2" alt="\1"></a></p>', text)


def picture(text: str) -> str:
    "The same of a picture, whose caption is the paragraph below it"
    return re.sub(
        r"(?m)^!\[([^\]]+)\]\(([^)\s]+)\)$",
        lambda m: f"![]({m[2]}){{fig-alt={json.dumps(m[1], ensure_ascii=False)}}}",
        text,
    )


def table_cells(line: str) -> list:
    "The cells of a line of a table"
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", re.sub(r"^\s*\||(?<!\\)\|\s*$", "", line))]


def breakable(cell: str) -> str:
    "Names with underscores may break after them; code, links and formulas are left alone"
    return cell if re.search(r"[`\[$<\\]", cell) else re.sub(r"(?<=\w)_(?=\w)", "_<wbr>", cell)


def column_width(texts: list, first: bool) -> int:
    "The share of a column: short texts stay on one line, long ones wrap; a name in the first column is not broken"
    lengths = [len(plain(text)) for text in texts[1:] or texts]  # a heading may wrap
    word = max(len(word) for text in texts for word in re.split(r"[\s/]", plain(text.replace("_<wbr>", "_ "))))
    longest = min(max(lengths), 40 if first else 28)
    return max(4, word if first else min(word, 20), longest, sum(lengths) // len(lengths)) + 2


def spaced_table(match: re.Match) -> str:
    "A table whose line of dashes says how wide its columns are: Pandoc divides the page by it"
    head, rule, *body = match[0].rstrip("\n").split("\n")
    rows, marks = [[breakable(cell) for cell in table_cells(line)] for line in (head, *body)], table_cells(rule)
    if any(len(cells) != len(marks) for cells in rows):
        return match[0]
    widths = [min(60, column_width(texts, place == 0)) for place, texts in enumerate(zip(*rows))]
    dashes = [
        (":" if mark.startswith(":") else "") + "-" * width + (":" if mark.endswith(":") else "")
        for mark, width in zip(marks, widths)
    ]
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([lines[0], "|" + "|".join(dashes) + "|", *lines[1:]]) + "\n" * match[0].endswith("\n")


TABLE = re.compile(r"(?m)^\|.*\n\|[ :|-]+\|[ \t]*(?:\n\|.*)*\n?")


def space_tables(text: str) -> str:
    "All tables of a piece of Markdown, but for those in code blocks"
    parts = re.split(r"(```.*?```)", text, flags=re.DOTALL)
    return "".join(part if part.startswith("```") else TABLE.sub(spaced_table, part) for part in parts)


def mend_prose(cell: dict):
    "Badges, pictures and tables, in Markdown cells and in outputs"
    if cell["cell_type"] == "markdown":
        cell["source"] = space_tables(picture(badge(source(cell))))
    for output in cell.get("outputs", []):
        if "text/markdown" in (data := output.get("data", {})):
            data["text/markdown"] = space_tables("".join(data["text/markdown"]))


# --- classes of settings


def field_row(field) -> str:
    "A line of the table of settings"
    facts = field.metadata
    low, above, high = (facts.get(name) for name in ("low", "above", "high"))
    least = f"≥\u00a0{low:g}" if low is not None else f">\u00a0{above:g}" if above is not None else ""
    most = f"≤\u00a0{high:g}" if high is not None and high < 1e6 else ""
    span = ", ".join(filter(None, [least, most]))
    default = "" if field.default is None else f"`{field.default!r}`".replace("|", "\\|")
    about = facts["help"].replace("|", "\\|")
    return f"| `{field.name}` | {default} | {span} | {about} |"


def settings_table(kind: type) -> str:
    "The settings that a class adds to those of its bases"
    own = [field for field in fields(kind) if field.name in vars(kind).get("__annotations__", {}) and field.metadata]
    bases = [f"`{base.__name__}`" for base in kind.__bases__ if is_dataclass(base)]
    rows = "\n".join(["| setting | default | range | meaning |", "|:--|:--|:--|:--|", *map(field_row, own)])
    return (f"All settings of {' and '.join(bases)}, and:\n\n" if bases else "") + rows


def replace_signatures(cells: list, module: str):
    "A class of settings has dozens of parameters: a table instead of its signature"
    for cell in cells:
        shown = re.search(r"^show_doc\((\w+)\)$", source(cell), flags=re.M) if cell["cell_type"] == "code" else None
        kind = getattr(import_module(module), shown[1], None) if shown else None
        if isinstance(kind, type) and is_dataclass(kind) and any("help" in field.metadata for field in fields(kind)):
            data = cell["outputs"][0]["data"]
            text = "".join(data["text/markdown"])
            data["text/markdown"] = re.sub(r"```python\n.*?```", lambda _: settings_table(kind), text, flags=re.DOTALL)


# --- places


def headings(notebook: dict) -> dict:
    "The anchors of a page: those of its headings, as Pandoc names them; `text` by anchor"
    texts = [source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    for cell in notebook["cells"]:
        texts += ["".join(output.get("data", {}).get("text/markdown", "")) for output in cell.get("outputs", [])]
    found = re.findall(r"(?m)^#{1,6} (.+?)\s*$", re.sub(r"```.*?```", "", "\n\n".join(texts), flags=re.DOTALL))
    return {
        re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", plain(text).lower()).strip())): text
        for text in found
    }


def mend_anchors(text: str, site: str, anchors: dict) -> str:
    "nbdev links methods that have no heading of their own: the links then lead to their class"

    def mend(match):
        page, anchor = match[1], match[2]
        if page not in anchors or anchor in anchors[page]:
            return match[0]
        owner = anchor.partition(".")[0]
        return f"{site}/{page}.html" + (f"#{owner}" if owner in anchors[page] else "")

    return re.sub(re.escape(site) + r"/(\w+)\.html#([\w.]+)", mend, text)


def finish(notebook: dict, stem: str, module: str | None = None):
    "All of the above but for the anchors, which need every page"
    cells = notebook["cells"]
    if module:
        replace_signatures(cells, module)
    describe_figures(cells)
    for cell in cells:
        strip_execution(cell)
        fold_source(cell, stem)
        mend_prose(cell)
