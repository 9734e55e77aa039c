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
    "extra_data('name') is the folder of that name under $TASL_DATA; the test is skipped, and says why, where it is absent."
    def folder(name: str) -> Path:
        top = os.environ.get("TASL_DATA")
        if not top: pytest.skip(f"needs the data set '{name}', which the repository does not carry: set TASL_DATA to its folder")
        path = Path(top) / name
        if not path.exists(): pytest.skip(f"needs the data set '{name}': {path} does not exist")
        return path
    return folder
