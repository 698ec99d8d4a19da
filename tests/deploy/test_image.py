"""The image: how it is written, who it runs as, and where its versions come from."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import DEPLOY

ROOT = DEPLOY.parent
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def files(*patterns: str) -> list[Path]:
    """Of the repository, as git has them."""
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no checkout of git")
    return [ROOT / name for name in listed.stdout.splitlines()]


def tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"{name} is not installed: pip install 'onestage[dev]'")
    return found


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([tool("hadolint"), DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_shellcheck_finds_nothing_in_any_script() -> None:
    first = {file: file.read_bytes()[:40].split(b"\n")[0] for file in files() if file.is_file()}
    scripts = [file for file, line in first.items() if re.match(rb"#!.*\b(ba)?sh\b", line)]
    assert DEPLOY / "make_secrets.sh" in scripts and ROOT / ".ci" / "run" in scripts
    done = subprocess.run([tool("shellcheck"), *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_runs_as_nobody_in_particular_and_carries_no_build_tool(target: str) -> None:
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.M | re.S))
    bases = {name: base for base, name in re.findall(r"^FROM (\S+) AS (\S+)", DOCKERFILE, re.M)}
    assert bases[target] == "runtime" and bases["runtime"].startswith("python:")
    assert stages[target].rstrip().endswith("USER 10001") and "--uid 10001" in stages["runtime"]
    installed = re.search(r"--no-install-recommends (.*?) \\", stages["runtime"])
    assert installed is not None and installed[1] == "wget"
    assert "HEALTHCHECK" in stages["runtime"] and "org.opencontainers.image.revision" in stages["runtime"]


def test_every_package_is_the_pinned_one() -> None:
    installs = re.findall(r"(?:pip install|uv build)(?:.|\\\n)*?(?=\n[A-Z#\n]|\Z)", DOCKERFILE)
    assert len(installs) == 6
    assert all("constraint" in one or "--no-deps" in one for one in installs)


def test_rays_version_is_written_in_one_place() -> None:
    """Whatever else under deploy/ names one has to name that of constraints.txt."""
    [pinned] = re.findall(r"^ray==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.M)
    named = r"(?:rayproject/ray[\w-]*:|\bray(?:\[[\w,]*\])?==|rayVersion:\s*[\"']?)(\d+\.\d+\.\d+)"
    found = {
        (str(file), version)
        for file in files("deploy", ".ci")
        if file.is_file()
        for version in re.findall(named, file.read_text(errors="replace"))
    }
    assert {version for _, version in found} <= {pinned}, found


def test_only_what_the_image_needs_is_sent_to_the_builder() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.M) for word in line.split()[:-1]}
    assert (ROOT / ".dockerignore").read_text().startswith("*\n") and kept == copied
