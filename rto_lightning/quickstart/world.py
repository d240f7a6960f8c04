"""The quickstart's world: a random tiny model, demonstrations for SFT, and prompts in three splits."""

import random
from pathlib import Path

from rto_lightning.errors import UserError
from rto_lightning.quickstart.grammar import Request, all_requests, sample_review
from rto_lightning.quickstart.jsonl import write_jsonl
from rto_lightning.quickstart.model import TinyModelSettings, write_tiny_model


def write_world(
    output_dir: str | Path,
    seed: int = 1,
    train_reviews: int = 24_000,
    validation_reviews: int = 512,
    validation_prompts: int = 96,
    test_prompts: int = 128,
    model: TinyModelSettings | None = None,
) -> None:
    """Write `model/`, `demonstrations_{train,validation}.jsonl` and `prompts_{train,validation,test}.jsonl`.

    Every request of the grammar belongs to one split, by a shuffle from the seed: the test and validation
    prompts first, the rest for training. Demonstrations answer requests of their own split only, drawn with
    replacement. A prompts row is `{"prompt": messages}`, a demonstrations row has the `response` beside it,
    as text.

    Args:
        output_dir: folder to write to; made if it is not there.
        seed: decides the weights, the splits and the reviews.
        train_reviews: demonstrations for training.
        validation_reviews: demonstrations for validation.
        validation_prompts: prompts held out for validation.
        test_prompts: prompts held out for the final table.
        model: size of the tiny model.

    Raises:
        UserError: if one of the files is there already, or the held-out prompts leave none for training.
    """
    output_dir = Path(output_dir)
    requests = all_requests()
    if min(validation_prompts, test_prompts) < 1 or validation_prompts + test_prompts >= len(requests):
        raise UserError(
            f"validation_prompts {validation_prompts} and test_prompts {test_prompts} must be at least 1 "
            f"and leave some of the grammar's {len(requests)} prompts for training; choose other numbers."
        )
    names = ["model"] + [
        f"{kind}_{split}.jsonl"
        for kind, splits in (
            ("demonstrations", ("train", "validation")),
            ("prompts", ("train", "validation", "test")),
        )
        for split in splits
    ]
    for name in names:
        if (output_dir / name).exists():
            raise UserError(f"{output_dir / name} is there already; remove it or choose another folder.")

    random.Random(f"splits {seed}").shuffle(requests)
    held_out = test_prompts + validation_prompts
    splits = {
        "test": requests[:test_prompts],
        "validation": requests[test_prompts:held_out],
        "train": requests[held_out:],
    }
    write_tiny_model(output_dir / "model", seed, model)
    for split, members in splits.items():
        write_jsonl(output_dir / f"prompts_{split}.jsonl", ({"prompt": request.messages} for request in members))
    for split, count in (("train", train_reviews), ("validation", validation_reviews)):
        rng = random.Random(f"reviews {split} {seed}")
        write_jsonl(
            output_dir / f"demonstrations_{split}.jsonl",
            (_demonstration(rng.choice(splits[split]), rng) for _ in range(count)),
        )


def _demonstration(request: Request, rng: random.Random) -> dict[str, object]:
    return {"prompt": request.messages, "response": sample_review(request, rng)}
