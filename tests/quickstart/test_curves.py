"""What learning curves say. Reading those of real stages is in `test_stages.py`, drawing in `test_curve_figures.py`."""

import math
import random
from pathlib import Path

import yaml

from rto_lightning.quickstart.curves import first_to_reach, over_optimization, read_curve, smoothed


def curve(gold: list[float], score: list[float]) -> list[dict[str, float]]:
    pairs = zip(gold, score, strict=True)
    return [{"iteration": i, "gold": g, "score": s, "kl": 0.1 * i} for i, (g, s) in enumerate(pairs)]


def test_over_optimization_is_told() -> None:
    rising = [0.1 * i for i in range(40)]
    hump = [min(i, 40 - i) * 0.1 for i in range(40)]
    message = over_optimization(curve(hump, rising))
    assert message is not None and message.startswith("over-optimization: since iteration 20")
    assert over_optimization(curve(rising, rising)) is None
    # The gold reward fell, but so did the score: that is another trouble.
    assert over_optimization(curve(hump, hump)) is None
    # A policy that only ever got worse while the score rose: hacked from the start.
    assert over_optimization(curve([-value for value in rising], rising)) is not None


def test_noise_is_not_over_optimization() -> None:
    noisy = [1.0 + (0.3 if i % 2 else -0.3) for i in range(40)]
    assert over_optimization(curve(noisy, [0.01 * i for i in range(40)])) is None
    assert over_optimization(curve([1.0, 0.0], [0.0, 1.0])) is None
    rng = random.Random(0)
    for _ in range(20):
        flat = curve([rng.gauss(0.6, 0.12) for _ in range(60)], [rng.gauss(0.6, 0.06) for _ in range(60)])
        assert over_optimization(flat) is None


def test_samples_are_counted_where_the_settings_are_there(tmp_path: Path) -> None:
    (tmp_path / "metrics/fit").mkdir(parents=True)
    (tmp_path / "metrics/fit/metrics.csv").write_text("step,train/gold,train/kl\n0,1.5,\n,,\n3,2.5,0.25\n")
    assert read_curve(str(tmp_path)) == [{"iteration": 1, "gold": 1.5}, {"iteration": 4, "gold": 2.5, "kl": 0.25}]
    settings = {
        "data": {"init_args": {"batch_size": 16}},
        "model": {"init_args": {"rollout": {"responses_per_prompt": 4}}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert [point["samples"] for point in read_curve(str(tmp_path))] == [64, 256]


def test_averages_stand_where_their_window_ends() -> None:
    points = curve([0.0, 3.0, math.nan, 6.0], [1.0, 1.0, 2.0, 3.0])
    gold = smoothed(points, "gold", window=3)
    assert [(point["iteration"], point["gold"], point["score"]) for point in gold] == [(3, 3.0, 3.0)]
    assert [point["score"] for point in smoothed(points, "score", window=2)] == [1.0, 1.5, 2.5]
    assert smoothed(points, "gold", window=4) == []


def test_a_level_is_reached_by_an_average() -> None:
    points = curve([0.0, 4.0, 0.0, 4.0, 4.0], [0.0] * 5)
    reached = first_to_reach(points, "gold", 3.0, window=2)
    assert reached is not None and (reached["iteration"], reached["gold"]) == (4, 4.0)
    assert first_to_reach(points, "gold", 4.5, window=2) is None
