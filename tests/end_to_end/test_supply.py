"""Installed packages: each is required and pinned, and what the documents mention exists."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
# packages for GPUs, which the tests' environment lacks
UNPINNED = {"onnxruntime-gpu", "tensorrt"}


def requirements():
    """Package → its requirements, with the extra that each belongs to."""
    groups = {"base": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    for extra, lines in groups.items():
        for line in lines:
            requirement = Requirement(line)
            if requirement.name != "infexport":
                yield extra, requirement


def pins():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    found = dict(re.fullmatch(r"([A-Za-z0-9._-]+)==([\w.!]+)", line).groups() for line in lines)
    assert len(found) == len(lines), "a package twice"
    return {canonicalize_name(name): Version(version) for name, version in found.items()}


def justified():
    rows = re.findall(r"^\| ([a-z0-9-]+) \| ([a-z, -]+) \| (\S.*\S) \|$", CONTRIBUTING, re.MULTILINE)
    return {name: (set(extras.split(", ")), why) for name, extras, why in rows if name != "package"}


def test_every_dependency_has_its_reason():
    wanted = {}
    for extra, requirement in requirements():
        wanted.setdefault(canonicalize_name(requirement.name), set()).add(extra)
    assert {name: extras for name, (extras, _) in justified().items()} == wanted


def test_every_dependency_has_its_version():
    found = pins()
    for _, requirement in requirements():
        name = canonicalize_name(requirement.name)
        if name not in UNPINNED:
            assert requirement.specifier.contains(found[name]), f"{requirement} and {found[name]}"
    assert not any(version.local or version.is_prerelease for version in found.values())


def test_all_that_is_installed_with_them_has_its_version():
    from importlib.metadata import PackageNotFoundError, distribution

    seen, waiting = {}, [("infexport", ("dev",))]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        try:
            lines = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        seen[name, extras] = lines
        for requirement in map(Requirement, lines):
            environments = [{"extra": extra} for extra in ("", *extras)]
            if requirement.marker is None or any(map(requirement.marker.evaluate, environments)):
                waiting.append((canonicalize_name(requirement.name), tuple(sorted(requirement.extras))))
    brought = {name for name, _ in seen} - {"infexport", "setuptools", "pip"}
    # torch itself pins the CUDA libraries
    unknown = {name for name in brought - pins().keys() if not re.match(r"(cuda|nvidia)-", name)}
    assert not unknown, "scripts/lock makes constraints.txt again"


def test_the_torch_that_is_named_is_the_one_that_is_pinned():
    version = pins()["torch"]
    for file in ("README.md", "scripts/lock"):
        (named,) = re.findall(r"torch==?(\d[\d.]*)", (ROOT / file).read_text())
        assert Version(named) == version, file
    assert "-c constraints.txt -e '.[dev]'" in (ROOT / "scripts" / "test").read_text()


@pytest.mark.parametrize("name", ["lock", "test"])
def test_scripts_parse(name):
    subprocess.run(["bash", "-n", ROOT / "scripts" / name], check=True)
    assert (ROOT / "scripts" / name).stat().st_mode & 0o111


DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    *(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")),
]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_of_documents_lead_somewhere(name):
    file = ROOT / name
    for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", file.read_text()):
        assert (file.parent / target).exists(), target


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", "docs/architecture.md"])
def test_what_documents_mention_is_there(name):
    text = (ROOT / name).read_text()
    for module in re.findall(
        r"`((?:system|images|bundle|inference|outputs|conversion|evaluation|cli)(?:\.\w+)+)`", text
    ):
        place = (ROOT / "infexport").joinpath(*module.split("."))
        parents = (place, place.parent)  # a module, or a name in one
        assert any(each.is_dir() or each.with_suffix(".py").is_file() for each in parents), module
    for path in re.findall(r"`((?:scripts|tests|infexport|models|custom_ops|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`([\w-]+\.(?:toml|txt|md))`", text):
        assert (ROOT / path).exists(), path
    for command in re.findall(r"`infexport ([a-z-]+)", text):
        assert (
            ROOT / "infexport" / "cli" / "commands" / f"{command.replace('-', '_')}.py"
        ).exists() or command == "--help", command
    assert "TODO" not in text


def test_limits_in_the_security_page_are_the_code_s():
    from infexport.images import decode

    text = (ROOT / "SECURITY.md").read_text()
    assert decode.MAX_PIXELS == 2**30
    assert "2³⁰ pixels" in text
    assert decode.MAX_PIXELS_VARIABLE in text
    for name in decode._FORMATS:
        assert name.replace("WEBP", "WebP").replace("JPEG2000", "JPEG 2000") in text


def test_words_of_contributing_are_in_the_code():
    for name, file in {
        "LAYOUTS": "models/infvit/checkpoint/layouts/__init__.py",
        "open_rows": "infexport/images/strips.py",
        "BACKENDS": "infexport/inference/tensorrt_libraries.py",
        "PROVIDERS": "infexport/inference/runners/onnxruntime.py",
        "MODULES": "infexport/system/dependencies.py",
    }.items():
        assert f"`{name}`" in CONTRIBUTING
        assert name in (ROOT / file).read_text()
