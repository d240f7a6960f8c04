"""What is said of an optimizer that does not exist, cannot be imported, or is none."""

import re

import pytest

from tests.cli.stub_runs import fails, stage, write

pytestmark = pytest.mark.usefixtures("stub_stages")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"model__init_args__optimizer": {"class_path": "lion.Lion", "init_args": {"lr": 1}}},
            "`model.init_args.optimizer.class_path`: cannot import lion.Lion (No module named 'lion').",
        ),
        (
            {"model__init_args__optimizer": "torch.optim.AdamX"},
            "`model.init_args.optimizer.class_path`: cannot import torch.optim.AdamX "
            "(module 'torch.optim' has no attribute 'AdamX').",
        ),
        (
            {"model__init_args__optimizer": {"class_path": "PagedAdamW8Bit"}},
            "`model.init_args.optimizer`: no class is known as PagedAdamW8Bit; did you mean PagedAdamW8bit?",
        ),
        (
            {"model__init_args__optimizer": "Xyz"},
            "`model.init_args.optimizer`: no class is known as Xyz; give its import path (`module.Class`).",
        ),
        (
            {"model__init_args__optimizer": {"class_path": "torch.nn.Linear"}},
            "`model.init_args.optimizer.class_path`: torch.nn.Linear is no Optimizer.",
        ),
        (
            {"model__init_args__optimizer": 3},
            "`model.init_args.optimizer` must be the name of a class or a mapping of `class_path` and `init_args`, "
            "not 3.",
        ),
    ],
)
def test_it_is_named_with_file(capsys, changes, sentence):
    status, error = fails(capsys, "fit", "--config", write("s.yaml", stage(**changes)))
    assert status == 2
    assert re.sub(r" line \d+", "", error) == f"s.yaml: {sentence}"


def test_a_misspelled_name_on_the_command_line(capsys):
    assert fails(capsys, "fit", "--config", write("s.yaml", stage()), "--model.optimizer=Adamw") == (
        2,
        "`model.optimizer`: no class is known as Adamw; did you mean AdamW?",
    )


def test_a_wrong_value_of_its_settings_on_the_command_line(capsys):
    assert fails(capsys, "fit", "--config", write("s.yaml", stage()), "--model.optimizer.lr=1e-4x") == (
        2,
        "`model.optimizer.lr` must be a number, not 1e-4x.",
    )


def test_a_mistake_on_the_command_line_is_not_looked_for_in_the_files(capsys):
    write("s.yaml", stage(model__init_args__optimizer={"class_path": "AdamW"}))
    assert fails(capsys, "fit", "--config", "s.yaml", "--model.optimizer=lion.Lion") == (
        2,
        "`model.optimizer.class_path`: cannot import lion.Lion (No module named 'lion').",
    )
