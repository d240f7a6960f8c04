"""The examples in docstrings."""

import doctest
from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch

from rto_lightning import algorithms

MODULES = [f"{algorithms.__name__}.{module.name}" for module in iter_modules(algorithms.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run_as_shown(name: str) -> None:
    module = import_module(name)
    results = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.FAIL_FAST)
    assert results.attempted > 0
    assert results.failed == 0
