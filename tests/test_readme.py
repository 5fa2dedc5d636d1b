"""What the documents tell a user to type works when typed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from deploykit.cli import app
from deploykit.recipe import load_recipe, parse_recipe

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")),
]


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a language; ``""`` are those of the shell."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [content for name, content in found if name == language]


def typed(text: str) -> list[str]:
    """Return the deploykit commands of a document, in blocks and in spans of code."""
    lines = [line for block in blocks(text, "") for line in block.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.M))
    return [found[0] for one in lines + spans if (found := re.match(r"deploykit [a-z].*", one))]


def unknown_words(command: str) -> list[str]:
    """Return what the command line would not know in ``command``."""
    _, name, *rest = command.split()
    group = typer.main.get_command(app)
    found = group.commands.get(name)
    if found is None:
        return [name]
    known = {option for parameter in found.params for option in parameter.opts}
    return [word for word in rest if word.startswith("-") and word not in known]


def test_readme_shows_the_way_from_a_recipe_to_an_answer():
    shown = [command.split()[1] for command in typed((ROOT / "README.md").read_text())]
    assert shown[:4] == ["compress", "export", "verify", "predict"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_and_options_of_the_documents_exist(name):
    for command in typed((ROOT / name).read_text()):
        assert unknown_words(command) == [], command


def test_planted_command_and_option_are_seen():
    assert typed("Run `deploykit shrink x` or:\n```\ndeploykit export R --fast\n```\n") == [
        "deploykit export R --fast",
        "deploykit shrink x",
    ]
    assert unknown_words("deploykit shrink x") == ["shrink"]
    assert unknown_words("deploykit export RUN --out BUNDLE --fast") == ["--fast"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_of_the_documents_lead_somewhere(name):
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in target or ((ROOT / name).parent / target).exists(), target


def test_a_block_of_another_language_hides_none_behind_it():
    text = "```json\n{}\n```\nwords\n```\ndeploykit shrink x\n```\n"
    assert blocks(text, "") == ["deploykit shrink x\n"]
    assert typed(text) == ["deploykit shrink x"]


def test_recipe_of_the_readme_is_the_one_that_ships():
    (shown,) = blocks((ROOT / "README.md").read_text(), "yaml")
    assert parse_recipe(shown, (), "README.md") == load_recipe(ROOT / "recipes/digits.yaml")


def listed_files(architecture: str) -> set[str]:
    """Return the files of the package that the tree in the document names."""
    (tree,) = re.findall(r"^deploykit/\n(.*?)^```$", architecture, re.DOTALL | re.MULTILINE)
    found, folder = set(), ""
    for line in filter(None, tree.splitlines()):
        words = re.split(r"\s{2,}", line.strip())[0].split(", ")
        inside = line.startswith("    ")
        if words[0].endswith("/"):
            folder = words[0]
            found.add(f"{folder}__init__.py")
        else:
            found |= {f"{folder if inside else ''}{word}" for word in words}
    return found


def test_architecture_lists_every_file_of_the_package():
    package = ROOT / "deploykit"
    files = {str(file.relative_to(package)) for file in package.rglob("*.py")}
    assert listed_files((ROOT / "ARCHITECTURE.md").read_text()) == files
    assert listed_files("deploykit/\n  a.py   one\n  b/     two\n    c.py, d.py   x\n```\n") == {
        "a.py",
        "b/__init__.py",
        "b/c.py",
        "b/d.py",
    }


@pytest.mark.slow
def test_python_of_the_readme_runs_as_it_stands(tmp_path):
    (program,) = blocks((ROOT / "README.md").read_text(), "python")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    *_, answer = done.stdout.splitlines()
    assert re.fullmatch(r"\('\d',\)", answer)
    assert (tmp_path / "runs/mine/report.html").exists()
    assert (tmp_path / "bundles/mine/run.py").exists()
