"""pyproject's dependencies are what the product imports, no more and no less."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"gigagan", "data", "flows"}
TOOLS = {"dev"}
"""Extras of those who work on the product."""
OTHERS = {
    "pyspark": "`download.distributor = pyspark` is for clusters that have Spark",
    "urllib3": "the client of Kubernetes raises its errors",
}
"""Imported where somebody has it, and declared nowhere."""
UNSEEN = {
    "fastapi": "bounds what Prefect starts with",
    "flask-wtf": "MLflow's basic-auth imports it",
    "psycopg2-binary": "SQLAlchemy imports it for postgresql+psycopg2",
    "s3fs": "fsspec imports it for s3://",
}
"""Declared, and imported by nobody of ours."""


def names_in(file):
    """Top-level modules that a file imports, and what it says as a string."""
    imported, said = set(), set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            said.add(node.value)
    return imported, said


FILES = [file for folder in sorted(OURS) for file in (ROOT / folder).rglob("*.py")]
FOUND = [names_in(file) for file in FILES]
IMPORTED = set().union(*(imported for imported, _ in FOUND))
SAID = set().union(*(said for _, said in FOUND))
MODULES = packages_distributions()
EXTRAS = PROJECT["optional-dependencies"]


def declared(requirements):
    return {canonicalize_name(Requirement(text).name) for text in requirements}


DECLARED = declared(PROJECT["dependencies"]).union(
    *(declared(texts) for extra, texts in EXTRAS.items() if extra not in TOOLS)
)


def distributions(module):
    return {canonicalize_name(name) for name in MODULES.get(module, ())}


def test_what_the_product_imports_is_declared():
    theirs = IMPORTED - set(sys.stdlib_module_names) - OURS - set(OTHERS)
    missing = {module for module in theirs if not distributions(module) & DECLARED}
    assert not missing


def test_what_is_declared_is_imported_or_opened_by_name():
    used = set().union(*map(distributions, IMPORTED))
    named = {
        canonicalize_name(text)
        for text in SAID
        if re.fullmatch(r"[A-Za-z0-9._-]+", text) and "." not in text
    }
    named |= set().union(*map(distributions, SAID))
    assert DECLARED - used - named == set(UNSEEN)


def test_what_only_tests_import_is_a_tool():
    for name in ("torchvision", "webdataset", "efficientnet-lite-pytorch"):
        assert name in declared(EXTRAS["dev"])
        assert name not in DECLARED
