import json

from tests.benchmarks import scaling_table


def test_a_row_says_how_a_stage_is_spread_and_what_that_takes(tmp_path):
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 128}
    (tmp_path / "config.json").write_text(json.dumps({**scaling_table.COMMON, **small, "vocab_size": 1000}))
    [planned] = scaling_table.planned(tmp_path, "full", 8)
    assert planned.fits and planned.spread_by == "fsdp"
    cells = scaling_table.row("tiny full", 8, planned).strip("| ").split(" | ")
    assert len(cells) == len(scaling_table.COLUMNS) and cells[:3] == ["tiny full", "8", "fsdp"]
    sent = sum(planned.seconds(phase)[0] for phase in ("rollout", "scoring", "update"))
    received = sum(made.bytes for made in planned.costs.transfers)
    assert received > 0 and abs(sent * scaling_table.RATES.link - received) < 1  # the columns leave no phase out
