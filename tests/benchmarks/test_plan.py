"""Which cells are run, and what is chosen between the stages."""

from typing import Any

from tests.benchmarks.plan import Cell, choose_configuration, choose_shared, stages
from tests.benchmarks.protocol import FULL, METHODS, Protocol, grid


def record(gold: float, kl: float = 2.0, **more: Any) -> dict[str, Any]:
    """A finished cell with gold reward and KL on validation prompts."""
    return {"validation": {"gold": gold, "kl": kl}, "error": None, "diverged": False, **more}


def run_all(protocol: Protocol, gold_of: Any) -> dict[str, dict[str, Any]]:
    """Finish every cell that becomes known, until there is no other."""
    records: dict[str, dict[str, Any]] = {}
    while True:
        known = [cell for stage in stages(protocol, records) for cell in stage.cells if cell.name not in records]
        if not known:
            return records
        records |= {cell.name: gold_of(cell) for cell in known}


def test_grid_is_the_product() -> None:
    assert grid(a=(1, 2), b=(3, 4)) == ({"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4})


def test_every_method_is_tried_equally_often_and_differently() -> None:
    assert {len(method.tried) for method in METHODS} == {4}
    for method in METHODS:
        configurations = [tuple(sorted({**method.fixed, **row}.items())) for row in method.tried]
        assert len(set(configurations)) == len(configurations), method.name
        assert len({tuple(row) for row in method.tried}) == 1, method.name


def test_cells_with_other_settings_have_other_names() -> None:
    cell = Cell("sum", 3, "ppo", {"lr": 1e-3, "lam": 0.95}, 40)
    assert cell.name.startswith("sum/ppo/seed3-")
    assert Cell("sum", 3, "ppo", {"lam": 0.95, "lr": 1e-3}, 40).name == cell.name
    others = [
        Cell("sum", 3, "ppo", {"lr": 1e-3, "lam": 1.0}, 40),
        Cell("sum", 3, "ppo", {"lr": 1e-3, "lam": 0.95}, 41),
        Cell("sum", 4, "ppo", {"lr": 1e-3, "lam": 0.95}, 40),
        Cell("requirement", 3, "ppo", {"lr": 1e-3, "lam": 0.95}, 40),
    ]
    assert len({other.name for other in [cell, *others]}) == 5


def test_a_stage_is_hidden_until_the_one_before_it_is_chosen_from() -> None:
    first = next(stages(FULL, {}))
    assert (first.letter, first.gold, len(first.cells)) == ("A", "sum", 18)
    sizes = {(stage.letter, stage.gold): len(stage.cells) for stage in stages(FULL, {})}
    assert sizes == {
        ("A", "sum"): 18,
        ("B", "sum"): 0,
        ("C", "sum"): 0,
        ("A", "requirement"): 18,
        ("B", "requirement"): 0,
        ("C", "requirement"): 0,
        ("D", "sum"): 0,
    }
    almost = {cell.name: record(1.0) for cell in first.cells[1:]}
    assert choose_shared(FULL, "sum", almost) is None


def test_the_whole_protocol_comes_to_its_announced_size() -> None:
    records = run_all(FULL, lambda cell: record(1.0))
    for stage in stages(FULL, records):
        assert len(stage.cells) == stage.size
        assert all(cell.name in records for cell in stage.cells)
    # Shared: PPO's first configuration of stage B is in A, two configurations of the sweep are in B, and RTO at PPO's
    # KL has RTO's cells in B, and in C where both choose the same configuration.
    assert len(records) == sum(stage.size for stage in stages(FULL, records)) - 2 * 3 - 2 * 3 - 2 * (12 + 5)


def test_the_configuration_of_nearest_kl_is_chosen_whatever_its_gold_reward() -> None:
    kls = {0.05: 1.0, 0.1: 2.5, 0.2: 3.0, 0.3: 9.0}

    def result_of(cell: Cell) -> dict[str, Any]:
        beta_1 = cell.settings.get("beta_1", 0.0)
        return record(beta_1, kl=kls.get(beta_1, 2.2 + 0.1 * (cell.seed - 1)))

    records = run_all(FULL, result_of)
    chosen = {
        method.name: (choose_configuration(FULL, "sum", method, records) or {})["beta_1"]
        for method in METHODS
        if method.runs_of == "rto"
    }
    assert chosen == {"rto": 0.3, "rto_at_kl": 0.1}


def test_choices_follow_the_mean_over_seeds() -> None:
    def gold_of(cell: Cell) -> dict[str, Any]:
        gold = float(cell.settings["lr"] == 1e-3) + float(cell.settings["beta_2"] == 0.05)
        if cell.settings.get("beta_1") == 0.3 and cell.settings.get("token_reward_clip") == 0.3:
            gold += 3.0 * (cell.seed == 1) - 0.5  # best in the mean, not on each seed
        return record(gold)

    records = run_all(FULL, gold_of)
    assert choose_shared(FULL, "sum", records) == {"lr": 1e-3, "beta_2": 0.05}
    rto = next(method for method in METHODS if method.name == "rto")
    assert choose_configuration(FULL, "sum", rto, records) == {
        "granularity": "token",
        "lr": 1e-3,
        "beta_2": 0.05,
        "beta_1": 0.3,
        "token_reward_clip": 0.3,
    }


def test_a_configuration_that_fails_once_is_not_chosen() -> None:
    def gold_of(cell: Cell) -> dict[str, Any]:
        if cell.settings["beta_2"] == 0.05:
            return record(9.0, diverged=cell.seed == 0)
        if cell.settings["lr"] == 1e-3:
            return record(9.0) if cell.seed else {"validation": None, "error": "ValueError", "diverged": False}
        return record(0.0)

    records = run_all(FULL, gold_of)
    assert choose_shared(FULL, "requirement", records) == {"lr": 1e-4, "beta_2": 0.2}


def test_nothing_is_chosen_where_everything_failed() -> None:
    records = run_all(FULL, lambda cell: {"validation": None, "error": "ValueError", "diverged": False})
    assert choose_shared(FULL, "sum", records) is None
    assert sum(len(stage.cells) for stage in stages(FULL, records)) == 36
