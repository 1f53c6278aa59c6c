"""The reference of the configuration is what the code says."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_of_the_configuration_is_the_generated_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(DOCS)
    generated = import_module("configuration_reference").page()
    page = (DOCS / "reference/configuration.md").read_text("utf-8")
    assert page == generated, "write it anew: python docs/configuration_reference.py"
