"""The report and the card hold together without any of their parts, and a run finds its way to the hub."""

import base64
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
import yaml
from PIL import Image
from sample_records import COMPARISON, RECORDS

from sdpo_nb import report as module
from sdpo_nb.drawing import png_bytes, save_figure
from sdpo_nb.figures import reward_map
from sdpo_nb.files import append_jsonl, write_json, write_jsonl
from sdpo_nb.report import base_licence, loading_code, model_card, push_run, run_summary, write_report

CONFIG = {
    "policy": "stabilityai/sd-turbo",
    "recipe": "sdpo",
    "reward": "0.5*a+0.5*<b>",
    "prompts": ["cat", "dog", "bat", "ant"],
    "num_steps": 8,
    "epochs": 4,
    "learning_rate": 1e-4,
    "lora_rank": 4,
    "seed": 1,
}


@pytest.fixture
def run_folder(tmp_path):
    "What a trainer leaves behind"
    folder = tmp_path / "my & run"
    write_json(folder / "config.json", CONFIG)
    write_jsonl(folder / "metrics.jsonl", RECORDS)
    write_json(
        folder / "evaluation.json",
        COMPARISON | {"own_scheduler": COMPARISON | {"n": 8, "sampler": "EulerDiscreteScheduler"}},
    )
    for name in ("step_grid", "a_thing_of_mine"):
        save_figure(reward_map([[1.0]]), folder / "pictures" / f"{name}.png")
    return folder


class Page(HTMLParser):
    "Checks that tags are balanced, and collects what the page loads"

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.images = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.loads += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "img":
            self.images.append(attributes)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_whole_and_self_contained(run_folder):
    path = write_report(run_folder)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert path == run_folder / "report.html" and "Not available" not in text
    assert "my &amp; run" in text and "&lt;b&gt;" in text and "<b>" not in text
    assert len(page.images) == 5 and all(image["alt"] for image in page.images)
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    for load in page.loads:
        Image.open(BytesIO(base64.b64decode(load.split(",")[1]))).verify()
    assert not re.search(r"url\(|@import|<script|<link", text) and "prefers-color-scheme" in text
    assert text.index("Before and after at every step count") < text.index("A thing of mine")
    assert "EulerDiscreteScheduler" in text
    assert "+1.000 at 1" in text and "from 0.000 to 1.500" in text and "learning_rate" in text
    assert not list(run_folder.glob(".report*"))


@pytest.mark.parametrize("part", ["config.json", "metrics.jsonl", "evaluation.json", "pictures"])
@pytest.mark.parametrize("damage", ["missing", "broken", "empty"])
def test_report_does_without_any_part(run_folder, monkeypatch, part, damage):
    drawn = png_bytes(reward_map([[1.0]]), 20)
    monkeypatch.setattr(module, "png_bytes", lambda figure: drawn)  # the other test draws
    path = run_folder / part
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
    elif damage == "missing":
        path.unlink()
    else:
        path.write_text('{"a": \n' if damage == "broken" else "{}" if path.suffix == ".json" else "")
    text = write_report(run_folder).read_text(encoding="utf-8")
    Page(text)
    assert text.count("Not available") == (0 if (part, damage) == ("config.json", "empty") else 1)


def test_report_of_a_run_that_has_just_begun(tmp_path):
    append_jsonl(tmp_path / "metrics.jsonl", RECORDS[0])
    assert write_report(tmp_path).read_text().count("Not available") == 3
    with pytest.raises(FileNotFoundError, match="no run folder"):
        write_report(tmp_path / "nowhere")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    "No test asks the hub: what was asked for, and one card that it answers with"
    asked = []

    def urlopen(address, timeout):
        asked.append(address)
        if "me/model" not in address:
            raise OSError("offline")
        return BytesIO(b"---\nlicense: openrail++\n---\n")

    monkeypatch.setattr(module, "urlopen", urlopen)
    return asked


def test_model_card(run_folder):
    card = model_card(run_folder)
    header, body = card.removeprefix("---\n").split("\n---\n", 1)
    header = yaml.safe_load(header)
    assert header["base_model"] == "stabilityai/sd-turbo" and header["library_name"] == "diffusers"
    assert "lora" in header["tags"]
    code = re.search(r"```python\n(.*?)```", body, flags=re.DOTALL)[1]
    compile(code, "card", "exec")
    assert "from_pretrained('stabilityai/sd-turbo')" in code and 'load_lora_weights("lora")' in code
    assert "num_inference_steps=8" in code
    told = ("| prompts | cat, dog, bat, … (4 in all) |", "| steps | before | after |", "+1.000 ± 0.100")
    assert all(text in body for text in (*told, "EulerDiscreteScheduler", "licence"))


def test_markup_of_users_stays_text(run_folder):
    "Names and prompts that look like Markdown, HTML, tables, formulas or code, in the card and on the page"
    odd = "*a*|`b`<img>\n[x](y) $$ _c_ &lt; #"
    write_json(run_folder / "config.json", CONFIG | {"reward": odd, "prompts": [odd, odd]})
    write_json(run_folder / "evaluation.json", COMPARISON | {"reward": odd, "other_rewards": {odd: COMPARISON}})
    body = model_card(run_folder).split("---\n", 2)[2]
    shown = r"\*a\*\|\`b\`\<img> \[x\](y) \$\$ \_c\_ \&lt; \#"
    assert f"trained for {shown}\n" in body and f"| reward | {shown} |" in body and f"\n{shown}, 16 fixed" in body
    assert "the reward `` *a*|`b`<img> [x](y) $$ _c_ &lt; # ``." in body
    tables = [line for line in body.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {3, 8}
    text = write_report(run_folder).read_text(encoding="utf-8")
    Page(text)
    assert "<img>" not in text and "&amp;lt; #" in text and "Not available" not in text


def test_a_licence_with_a_colon_stays_yaml(tmp_path):
    (tmp_path / "model").mkdir()
    write_json(tmp_path / "config.json", CONFIG | {"policy": str(tmp_path / "model")})
    (tmp_path / "model/README.md").write_text("---\nlicense: other\nlicense_name: 'mine: all `of` it'\n---\n")
    card = model_card(tmp_path)
    assert yaml.safe_load(card.split("---\n")[1])["license_name"] == "mine: all `of` it"


def test_pictures_are_told_in_words_and_titles_fit_a_phone(run_folder):
    page = Page(write_report(run_folder).read_text(encoding="utf-8"))
    assert any("over 16 pairs of prompt and noise" in image["alt"] for image in page.images)
    assert all(len(image["alt"]) > 10 for image in page.images)
    assert re.search(r"body \{[^}]*overflow-wrap: anywhere", module._style)


def test_the_last_words_of_a_run(run_folder, tmp_path):
    (run_folder / "lora").mkdir()
    write_report(run_folder)
    lines = run_summary(run_folder).splitlines()
    assert lines[0].startswith("taste, 16 fixed pairs") and lines[-4] == f"run folder  {run_folder}"
    assert lines[-1] == f"look at     {run_folder / 'report.html'}" and lines[-3].startswith("LoRA")
    assert run_summary(tmp_path) == f"run folder  {tmp_path}"


def test_model_card_of_the_embedded_policy_without_evaluation(tmp_path):
    write_json(tmp_path / "config.json", CONFIG | {"policy": "tiny"})
    card = model_card(tmp_path)
    assert "base_model" not in card and 'policy_folder("tiny")' in card and "has not been evaluated" in card
    with pytest.raises(FileNotFoundError):
        model_card(tmp_path / "nowhere")
    write_json(tmp_path / "config.json", {"policy": "tiny"})
    with pytest.raises(ValueError, match="lacks recipe; give the folder of a run"):
        model_card(tmp_path)


def test_the_card_carries_licence_guidance_and_place(tmp_path):
    model, config = tmp_path / "model", CONFIG | {"policy": str(tmp_path / "model"), "guidance_scale": 3.0}
    model.mkdir()
    write_json(tmp_path / "config.json", config)
    assert base_licence(str(model)) == {} and "(unknown here" in model_card(tmp_path)
    licence = "license: other\nlicense_name: sai-nc\nlicense_link: https://example.org/l\n"
    (model / "README.md").write_text(f"---\n{licence}tags:\n- x\n---\n# Model\n")
    card = model_card(tmp_path)
    assert card.startswith(f"---\n{licence}library_name: diffusers\n") and "licence\n(`sai-nc`)" in card
    assert "guidance_scale=3.0" in card and 'load_lora_weights("lora")' in card
    write_json(tmp_path / "config.json", config | {"push_to_hub": "me/mine"})
    assert 'pipe.load_lora_weights("me/mine")\n' in model_card(tmp_path)


@pytest.mark.parametrize("network, part", [("UNet2DConditionModel", "unet"), ("SD3Transformer2DModel", "transformer")])
def test_the_card_of_a_whole_denoiser_names_its_class(run_folder, network, part):
    write_json(run_folder / "config.json", CONFIG | {"lora_rank": 0})
    write_json(run_folder / "unet" / "config.json", {"_class_name": network})
    assert f'pipe.{part} = {network}.from_pretrained("unet")' in model_card(run_folder)


def test_the_card_asks_the_stock_pipeline_for_the_size_of_the_run(run_folder):
    "Else it paints what the model was published for, 1024 pixels in most families"
    assert "height=" not in model_card(run_folder)
    write_json(run_folder / "config.json", CONFIG | {"size": 512})
    assert ", height=512, width=512).images[0]" in model_card(run_folder)


def test_the_loading_code_of_the_flow_model_paints_as_its_policy_does():
    "Stock defaults would take other noise levels and add tokens of a text encoder that it lacks"
    names = {}
    *lines, last = loading_code("tiny_flow", (2, 4)).splitlines()
    exec("\n".join(line for line in lines if "lora" not in line), names)
    policy, options = names["policy"], last.split("(")[0]
    assert options == "image = pipe" and names["pipe"] is policy.pipeline
    assert "**policy.stock_options(4)" in last and len(policy.stock_options(4)["sigmas"]) == 4
    exec(last, names)
    assert names["image"].size == (32, 32)


@pytest.mark.parametrize("policy", ["tiny", "tiny_flow", "x/y"])
@pytest.mark.parametrize("place", ["lora", "me/mine"])
@pytest.mark.parametrize("whole", [None, "UNet2DConditionModel"])
def test_the_loading_code_is_python(policy, place, whole):
    for size in (None, 512):
        compile(loading_code(policy, 4, 2.0, place, whole, size=size), "card", "exec")


def test_the_licence_of_a_model_on_the_hub(offline):
    assert base_licence("me/model") == {"license": "openrail++"} and base_licence("me/gone") == {}
    assert offline[0] == "https://huggingface.co/me/model/resolve/main/README.md"


class Hub:
    "Remembers what it was asked for"

    calls = []

    def create_repo(self, name, **options):
        self.calls.append(("create", name))

    def upload_folder(self, *, repo_id, folder_path, allow_patterns=("*",), **options):
        files = [path for path in Path(folder_path).iterdir() if path.is_file()]
        sent = sorted(path.name for path in files if any(path.match(pattern) for pattern in allow_patterns))
        self.calls.append(("upload", repo_id, sent))


def test_a_finished_run_goes_to_the_hub(finished_run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    push_run(finished_run, "me/mine")
    lora = ("upload", "me/mine", ["pytorch_lora_weights.safetensors"])
    assert Hub.calls[:2] == [("create", "me/mine"), lora]
    assert {"README.md", "config.json", "metrics.jsonl", "report.html"} <= set(Hub.calls[2][2])
    assert not any(name.endswith(".pt") for name in Hub.calls[2][2])
