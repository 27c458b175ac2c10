"""Write README.md from nbs/index.ipynb: prose, code and text outputs; hidden cells and pictures made by code stay out.

python .ci/readme.py            # writes README.md
python .ci/readme.py --check    # exits with 1 where it is out of step
"""

import json
import re
import sys
from pathlib import Path

root = Path(__file__).parent.parent


def outputs(cell: dict) -> str:
    "Markdown outputs as they are, plain text and what was printed as a code block."
    parts = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if output.get("name") == "stdout":
            parts.append("```\n" + "".join(output["text"]).rstrip() + "\n```")
        elif "text/markdown" in data:
            parts.append("".join(data["text/markdown"]))
        elif "text/plain" in data and "image/png" not in data:
            parts.append("```\n" + "".join(data["text/plain"]) + "\n```")
    return "\n\n".join(parts)


def render(cell: dict) -> str:
    "One cell as Markdown."
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    if re.search(r"^#\| hide", source, re.M):
        return ""
    code = "" if re.search(r"^#\| echo: false", source, re.M) else f"```python\n{source}\n```"
    return "\n\n".join(filter(None, [code, outputs(cell)]))


def readme() -> str:
    "The whole README, its links relative to the repository's root."
    cells = json.loads((root / "nbs/index.ipynb").read_text())["cells"]
    text = "\n\n".join(filter(None, map(render, cells)))
    return re.sub(r"\]\((?=\w+\.ipynb|images/)", "](nbs/", text) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(
            None
            if (root / "README.md").read_text() == readme()
            else "README.md is out of step with nbs/index.ipynb; run python .ci/readme.py"
        )
    (root / "README.md").write_text(readme())
