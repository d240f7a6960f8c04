"""The data and the roles of the stages' tests."""

from tests.modules import conftest

files, roles = conftest.files, conftest.roles
