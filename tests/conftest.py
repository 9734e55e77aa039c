"""What several test files share."""
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    "The repository."
    return ROOT


@pytest.fixture(scope="session")
def extra_data():
    """extra_data('name') is the folder of that name under $TASL_DATA, or under shared/data beside the repository; the test is skipped, and
    says why, where it is absent."""
    def folder(name: str) -> Path:
        path = Path(os.environ.get("TASL_DATA", ROOT.parent / "shared" / "data")) / name
        if not path.exists(): pytest.skip(f"needs the data set '{name}', which the repository does not carry: set TASL_DATA to the folder that holds it")
        return path
    return folder


@pytest.fixture
def shots(tmp_path) -> Path:
    "Where screenshots go: $TASL_SHOTS, or a folder that is thrown away."
    folder = Path(os.environ.get("TASL_SHOTS", tmp_path / "shots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
