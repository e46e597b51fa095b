"""What is run by hand and rarely still finds the names it imports."""

from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [*(ROOT / "bench").rglob("*.py"), *(ROOT / "studies").rglob("*.py")]
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]


@pytest.mark.parametrize("name", sorted(name for name in MODULES if "__" not in name))
def test_a_module_imports(name):
    import_module(name)
