"""All Python in README and docs runs as it stands there; commands, targets and links that they name exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(?P<kind>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, kind: str) -> Iterator[tuple[int, str]]:
    """The first line's number and the text of each fenced block of a kind."""
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        if found["kind"].strip() == kind:
            yield text.count("\n", 0, found.start("body")), found["body"]


_LONG = ("adding_a_model", "nouns")


def identifier(path: Path) -> str:
    return path.stem


def with_python() -> list[object]:
    """Pages with code to run; the chapter of theory, the pages behind it and two that run studies are slow."""
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    theory = index.split(":caption: Theory")[1].split("```")[0].split()
    return [
        pytest.param(page, marks=pytest.mark.slow if page.stem in (*theory, *_LONG) else (), id=page.stem)
        for page in PAGES
        if any(blocks(page, "python"))
    ]


@pytest.mark.parametrize("page", with_python())
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    namespace: dict[str, object] = {"__name__": page.stem}
    for line, code in blocks(page, "python"):
        # Blank lines in front, so that a traceback names the line in the page.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


def test_readme_leads_to_a_report_in_twelve_lines() -> None:
    (code,) = (body for _, body in blocks(ROOT / "README.md", "python"))
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 12


@pytest.mark.parametrize("page", PAGES, ids=identifier)
def test_commands_exist(page: Path) -> None:
    from toolkit.cli import app

    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    text = page.read_text(encoding="utf-8")
    code = "\n".join([*(body for _, body in blocks(page, "bash")), *re.findall(r"`([^`\n]+)`", text)])
    named = set(re.findall(r"(?:^|[\s/])elbowroom ([a-z]+)\b", code, re.MULTILINE))
    assert named <= known, f"{page.name} names {named - known}"


@pytest.mark.parametrize("page", PAGES, ids=identifier)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= targets, f"{page.name} names {named - targets}"


@pytest.mark.parametrize("page", PAGES, ids=identifier)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_options_of_the_command_line_are_all_documented() -> None:
    from toolkit.cli import app

    text = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        assert f"elbowroom {name}" in text
        for parameter in command.params:
            for option in parameter.opts:
                if option.startswith("--") and option != "--help":
                    assert f"`{option}" in text, f"{name} {option}"


def test_public_names_are_all_documented() -> None:
    import toolkit

    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name in toolkit.__all__:
        assert re.search(rf"\.{name}$", text, re.MULTILINE), f"docs/api.md lacks {name}"
