"""The facts of the project agree with each other, and what its pages point to exists."""
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
from nbdev.config import get_config, read_version

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
NOTEBOOKS = sorted(NBS.glob('*.ipynb'))
WORKFLOWS = sorted((ROOT/'.github'/'workflows').glob('*.yml'))
CONFIG = get_config(ROOT)

settings = ConfigParser(delimiters=['='])
settings.read(ROOT/'settings.ini', encoding='utf-8')
facts = settings['DEFAULT']


def names(path):
    "The test ids of notebooks and pages"
    return path.name


def cells(path, kind):
    "The sources of the cells of one kind in the notebook at `path`"
    return [''.join(cell['source']) for cell in json.loads(path.read_text(encoding='utf-8'))['cells'] if cell['cell_type'] == kind]


def page_text(path):
    "The prose of a notebook or Markdown page, without its code blocks"
    text = '\n\n'.join(cells(path, 'markdown')) if path.suffix == '.ipynb' else path.read_text(encoding='utf-8')
    return re.sub(r'(```.*?```|`[^`\n]*`|<!--.*?-->)', '', text, flags=re.DOTALL)


def link_targets(path):
    "What the links and images of the page at `path` point to"
    text = page_text(path)
    return re.findall(r'\]\(\s*<?([^)\s>]+)', text) + re.findall(r'(?:src|href)="([^"]+)"', text)


def sidebar_entries(contents):
    "The files that a sidebar lists, sections within sections included, in reading order"
    for entry in contents:
        if isinstance(entry, str): yield entry
        else:
            if 'href' in entry: yield entry['href']
            yield from sidebar_entries(entry.get('contents', []))


def load_sidebar():
    "The entries of nbs/sidebar.yml"
    contents = yaml.safe_load((NBS/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    return list(sidebar_entries(contents))


def test_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8'))
    assert read_version(ROOT/'sdpo_nb') == facts['version'] == citation['version']
    assert f"## [{facts['version']}]" in (ROOT/'CHANGELOG.md').read_text(encoding='utf-8')


def test_name_is_the_same_everywhere():
    assert CONFIG.lib_name == facts['lib_name'] == CONFIG.repo


def test_torchvision_is_not_needed():
    assert not any('torchvision' in facts[key] for key in facts)
    imports = re.compile(r'^\s*(?:from|import)\s+torchvision', flags=re.MULTILINE)
    assert not [path.name for path in NOTEBOOKS if any(imports.search(source) for source in cells(path, 'code'))]


def test_console_scripts_name_functions_that_exist():
    for line in facts['console_scripts'].strip().splitlines():
        module, function = line.split('=')[1].strip().split(':')
        source = (ROOT/Path(*module.split('.'))).with_suffix('.py').read_text(encoding='utf-8')
        defined = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
        assert function in defined


def test_site_configuration():
    link = NBS/'_quarto.yml'
    assert link.is_symlink() and link.resolve() == ROOT/'_quarto.yml'
    site = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
    assert {'light', 'dark'} <= site['format']['html']['theme'].keys()
    for file in [*site['metadata-files'], site['format']['html']['css']]: assert (NBS/file).exists()


def test_every_notebook_stands_in_the_sidebar_once():
    assert sorted(load_sidebar()) == sorted(path.relative_to(NBS).as_posix() for path in NOTEBOOKS)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=names)
def test_notebook_opens_with_title_and_subtitle(path):
    assert re.match(r'# \S.*\n+> \S', cells(path, 'markdown')[0])


@pytest.mark.parametrize('path', NOTEBOOKS, ids=names)
def test_imports_stand_in_cells_of_their_own(path):
    "nbdev runs every cell that holds an import again when it makes the site"
    mixed = []
    for source in cells(path, 'code'):
        if re.search(r'^\s*[!%]', source, flags=re.MULTILINE) or source.startswith('#| hide'): continue
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body}
        if len(kinds) == 2: mixed.append(source)
    assert mixed == []


@pytest.mark.parametrize('path', [*NOTEBOOKS, *sorted(ROOT.glob('*.md'))], ids=names)
def test_links_lead_somewhere(path):
    here = re.compile(re.escape(CONFIG.git_url) + r'/(?:blob|tree|raw)/main/(\S+)')
    colab = re.compile(r'https://colab\.research\.google\.com/github/' + re.escape(f'{CONFIG.user}/{CONFIG.repo}') + r'/blob/main/(\S+)')
    broken = []
    for target in link_targets(path):
        inside = here.match(target) or colab.match(target)
        if inside: file = ROOT/inside[1].split('#')[0]
        elif re.match(r'[a-z]+:|#|//', target): continue
        else: file = path.parent/unquote(target.split('#')[0])
        if not file.exists(): broken.append(target)
    assert broken == []


@pytest.mark.parametrize('path', NOTEBOOKS, ids=names)
def test_colab_badge_opens_this_notebook(path):
    opened = [target for target in link_targets(path) if target.startswith('https://colab.research.google.com/github/')]
    assert all(target.endswith(f'/nbs/{path.name}') for target in opened)


@pytest.mark.parametrize('path', WORKFLOWS, ids=names)
def test_workflow_fits_its_schema(path):
    check_schema('vendor.github-workflows', path)


def test_citation_fits_its_schema():
    check_schema('vendor.citation-file-format', ROOT/'CITATION.cff')


def check_schema(schema, path):
    "Check the file at `path` against a schema that comes with check-jsonschema"
    done = subprocess.run([sys.executable, '-m', 'check_jsonschema', '--builtin-schema', schema, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def contents(tree):
    "The notebooks, site files and modules of a checkout: text by path"
    files = [path for folder in ('nbs', 'sdpo_nb') for path in sorted((tree/folder).rglob('*')) if path.suffix in {'.ipynb', '.py', '.yml', '.txt', '.md'}]
    return {path.relative_to(tree).as_posix(): path.read_text(encoding='utf-8') for path in files}


NBDEV = '''
from nbdev.doclinks import nbdev_export
from nbdev.clean import nbdev_clean
from nbdev.quarto import refresh_quarto_yml
nbdev_export()
nbdev_clean()
refresh_quarto_yml()
'''


def test_notebooks_are_clean_and_in_step_with_the_modules(tree):
    before = contents(tree)
    subprocess.run([sys.executable, '-c', NBDEV], cwd=tree, check=True, capture_output=True)
    after = contents(tree)
    assert [path for path in sorted(before | after) if before.get(path) != after.get(path)] == []


PROCESS = '''
from nbdev.serve import proc_nbs
proc_nbs(n_workers=0)
'''


def test_site_pages_can_be_made(tree):
    "What nbdev does before Quarto: exported cells and imports run, `show_doc` is filled in"
    done = subprocess.run([sys.executable, '-c', PROCESS], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = {path.name for path in (tree/'_proc').glob('*.ipynb')}
    assert made == {path.name for path in NOTEBOOKS}


def test_readme_is_made_from_the_index():
    assert subprocess.run([sys.executable, ROOT/'.ci'/'readme.py', '--check'], capture_output=True, text=True).returncode == 0
