"""What a release needs: one version everywhere, links that work on a package index, and one distillkit per folder."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import yaml

import distillkit
from absolute_links import absolute, with_urls
from distillkit.configuration.installation import warn_of_another

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://host.example/owner/name"


def test_the_version_is_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))["workspace"]["package"]["version"]
    assert distillkit.__version__ == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version
    for lock in ("Cargo.lock", "rust/fuzz/Cargo.lock"):
        packages = tomllib.loads((ROOT / lock).read_text(encoding="utf-8"))["package"]
        ours = [
            package["version"] for package in packages if re.fullmatch("distillkit-(codec|python)", package["name"])
        ]
        assert set(ours) == {version}, lock


@pytest.mark.slow
def test_what_every_wheel_is_tried_with_holds_here() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "smoke.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_actions_are_pinned_to_commits() -> None:
    """A tag can be moved to other code, which would be run with the right to publish."""
    workflows = [path.read_text(encoding="utf-8") for path in (ROOT / ".github" / "workflows").glob("*.yml")]
    used = [line for text in workflows for line in text.splitlines() if "uses:" in line]
    assert len(used) > 5
    for line in used:
        assert re.search(r"uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line


def test_links_are_absolute_on_a_package_index() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", readme)
    found = re.findall(r"\]\(([^)]+)\)", absolute(readme, REPOSITORY, "v9"))
    assert len(targets) == len(found) > 5
    for target, link in zip(targets, found, strict=True):
        assert link == (target if re.match(r"https?:|#", target) else f"{REPOSITORY}/blob/v9/{target}")
    project = tomllib.loads(with_urls((ROOT / "pyproject.toml").read_text(encoding="utf-8"), REPOSITORY, "v9"))
    assert project["project"]["urls"]["Repository"] == REPOSITORY
    assert all(url.startswith(REPOSITORY) for url in project["project"]["urls"].values())
    assert project["tool"]["maturin"]["module-name"] == "distillkit._native"


def test_another_distillkit_in_the_same_folder_is_named(tmp_path: Path) -> None:
    package = tmp_path / "distillkit"
    for name in ("distillkit", "distillkit-0.2.0.dist-info", "distillkit_extras-3.dist-info", "numpy-2.dist-info"):
        (tmp_path / name).mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_another(str(package), "0.2.0")
        warn_of_another(str(tmp_path / "archive.zip" / "distillkit"), "0.2.0")
    (tmp_path / "distillkit-1.0.0.dist-info").mkdir()
    with pytest.warns(UserWarning, match=r"0\.2\.0.*distillkit-1\.0\.0\.dist-info.*pip uninstall distillkit"):
        warn_of_another(str(package), "0.2.0")
