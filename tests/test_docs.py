"""What the documentation shows, works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from snnconv.cli.main import COMMANDS
from snnconv.schedule import SCHEDULES

ROOT = Path(__file__).parents[1]


def test_the_python_page_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    program = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert "'top1_percent'" in run.stdout


def test_every_public_name_is_on_the_python_page() -> None:
    import snnconv

    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    missing = [name for name in snnconv.__all__[1:] if name not in page]
    assert not missing


@pytest.mark.parametrize(
    "script",
    [
        "generate_cli.py",
        "generate_results.py",
        "generate_performance.py",
        "generate_coverage.py",
        "generate_schedules.py",
    ],
)
def test_generated_pages_are_current(script: str) -> None:
    command = [sys.executable, str(ROOT / "docs" / script), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_recipe_on_the_data_page_is_one(tmp_path: Path) -> None:
    from snnconv.recipe import names, read_recipe

    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    first = next(iter(re.findall(r"```toml\n(.*?)```", page, re.DOTALL)))
    (tmp_path / "r.toml").write_text(first, encoding="utf-8")
    assert read_recipe(str(tmp_path / "r.toml")).channels == "bgr"
    assert all(f"`{name}`" in page and read_recipe(name).description for name in names())


def test_links_between_pages_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "model_zoo" / "RESULTS.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), (page, target)


def test_the_readme_names_only_commands_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    used = set(re.findall(r"^snnconv (\w+)", blocks, re.MULTILINE))
    assert used <= set(COMMANDS)


def test_the_concepts_page_knows_every_schedule() -> None:
    text = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in SCHEDULES)


def test_no_public_name_hides_behind_a_module() -> None:
    import snnconv

    modules = {p.stem for p in (ROOT / "snnconv").iterdir()} | {"cli", "model_zoo"}
    assert not modules & set(snnconv.__all__)
