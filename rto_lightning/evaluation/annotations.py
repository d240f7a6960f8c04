"""AlpacaEval's annotations: judgments as its `annotations.json` holds them.

A row has `instruction`, `output_1` and `generator_1` (the baseline), `output_2` and `generator_2` (the model),
`dataset`, `annotator`, and `preference`: 1 if the baseline wins, 2 if the model does, a number between if the judge is
not sure, 1.5 or 0 for a tie, null if it gave no answer. We add `games` where a preference is the mean of several.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rto_lightning.data.files import BadRow, Row
from rto_lightning.data.sources import load_table
from rto_lightning.evaluation.answers import Comparison
from rto_lightning.evaluation.judging import Judgment
from rto_lightning.evaluation.questions import read_all, refuse_ids, repeated, text_of
from rto_lightning.evaluation.win_rates import ModelResult, model_result
from rto_lightning.runs.files import written_whole

_TEXTS = ("instruction", "output_1", "output_2", "generator_1", "generator_2")
_NO_PREFERENCE = "the annotator gave no preference"


@dataclass(frozen=True)
class _Annotation:
    generators: tuple[str, str]
    annotator: str
    comparison: Comparison
    judgment: Judgment


def read_annotations(path: str) -> list[ModelResult]:
    """The results of all models that a file of annotations compares, each with one baseline.

    Raises:
        BenchmarkError: if a row is none, or a model is compared twice on an instruction.
        UserError: if the file cannot be read.
    """
    table = load_table(path)
    found: dict[tuple[str, str], list[_Annotation]] = {}
    for annotation in read_all(table, _read):
        found.setdefault(annotation.generators, []).append(annotation)
    results = []
    for (baseline, model), rows in found.items():
        twice = repeated(row.comparison.id for row in rows)
        refuse_ids(twice, f"{path} compares {model} and {baseline} on", "more than once", "leave one of each")
        annotators = ", ".join(sorted({row.annotator for row in rows}))
        comparisons, judgments = [row.comparison for row in rows], [row.judgment for row in rows]
        results.append(model_result(model, baseline, annotators, comparisons, judgments))
    return results


def annotation_rows(result: ModelResult) -> list[dict[str, Any]]:
    """The judgments of a model as annotations.

    Several games of a prompt become their mean, and stand beside it; a prompt of several messages becomes their JSON.
    """
    return [
        {
            "instruction": _instruction(comparison),
            "output_1": comparison.baseline,
            "generator_1": result.baseline,
            "dataset": comparison.category,
            "output_2": comparison.answer,
            "generator_2": result.model,
            "annotator": result.judge,
            "preference": 1.0 + sum(judgment.games) / len(judgment.games) if judgment.games else None,
            **({"games": list(judgment.games)} if len(judgment.games) > 1 else {}),
        }
        for comparison, judgment in zip(result.comparisons, result.judgments, strict=True)
    ]


def write_annotations(path: Path, results: Sequence[ModelResult]) -> None:
    """Writes the judgments of models as one file of annotations."""
    rows = [row for result in results for row in annotation_rows(result)]
    with written_whole(path, "w", encoding="utf-8") as file:
        json.dump(rows, file, ensure_ascii=False, indent=2)


def _instruction(comparison: Comparison) -> str:
    if len(comparison.prompt) == 1:
        return comparison.prompt[0]["content"]
    return json.dumps(comparison.prompt, ensure_ascii=False)


def _read(row: Row) -> _Annotation:
    for name in _TEXTS:
        text_of(row.get(name), name)
    instruction = row["instruction"]
    comparison = Comparison(
        instruction,
        [{"role": "user", "content": instruction}],
        str(row.get("dataset") or ""),
        row["output_1"],
        row["output_2"],
    )
    generators = row["generator_1"], row["generator_2"]
    judgment = _judgment(row.get("preference"))
    if (games := row.get("games")) is not None and judgment.games:
        judgment = Judgment(_games(games, judgment.games[0]))
    return _Annotation(generators, str(row.get("annotator") or "unknown"), comparison, judgment)


def _games(value: Any, mean: float) -> tuple[float, ...]:
    """What each of several games gave, whose mean is the preference."""
    numbers = value if isinstance(value, list) and value else [None]
    if not all(isinstance(game, int | float) and not isinstance(game, bool) and 0 <= game <= 1 for game in numbers):
        raise BadRow("`games` is no list of numbers between 0 and 1")
    if abs(sum(numbers) / len(numbers) - mean) > 1e-6:
        raise BadRow("`games` has another mean than `preference`")
    return tuple(map(float, numbers))


def _judgment(preference: Any) -> Judgment:
    if preference is None or (isinstance(preference, float) and preference != preference):
        return Judgment((), _NO_PREFERENCE)
    if isinstance(preference, bool) or not isinstance(preference, int | float):
        raise BadRow("`preference` is no number")
    if preference == 0:
        return Judgment((0.5,))
    if not 1 <= preference <= 2:
        raise BadRow(f"`preference` is {preference}, which is not between 1 and 2")
    return Judgment((float(preference) - 1.0,))
