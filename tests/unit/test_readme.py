"""README stays true: its file tree is the repository's, and the paths it sends a reader to exist."""

from __future__ import annotations

import re
import subprocess

from tutelage.settings import CHECKOUT

README = (CHECKOUT / "README.md").read_text()


def tree() -> list[str]:
    block = README.split("## What is where")[1].split("```")[1]
    parents: list[str] = []
    found = []
    for line in block.strip().splitlines():
        indent, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        parents[indent:] = [name.rstrip("/")]
        found.append("/".join(parents))
    return found


def tracked() -> list[str]:
    return subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout.splitlines()


def test_every_path_of_the_tree_exists() -> None:
    assert [path for path in tree() if not (CHECKOUT / path).exists()] == []


def test_every_file_and_folder_at_the_top_is_in_the_tree() -> None:
    top = {path.split("/")[0] for path in tracked() if not path.startswith(".")} - {"README.md"}
    assert top - {path.split("/")[0] for path in tree()} == set()


def test_every_module_of_the_shared_package_is_named_in_the_tree() -> None:
    inside = {path.split("/")[1] for path in tracked() if path.startswith("tutelage/")} - {"__init__.py"}
    assert inside - {path.split("/")[1] for path in tree() if path.startswith("tutelage/")} == set()


def test_where_do_i_change_points_at_files_that_exist() -> None:
    table = README.split("## Where do I change")[1].split("\n## ")[0]
    named = re.findall(r"`([\w./-]+\.(?:py|yaml))`", table)
    assert len(named) > 20
    assert [path for path in named if not (CHECKOUT / path).exists()] == []


def test_the_makefile_stays_short() -> None:
    assert len((CHECKOUT / "Makefile").read_text().splitlines()) <= 40
