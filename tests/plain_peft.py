"""The oracle of one role: transformers and PEFT alone, with only that adapter, a row at a time and without padding."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from rto_lightning.backbone import Sequences


def plain_model(folder: Path, adapter: Path | str | None = None, dtype: str = "float32", nf4: bool = False) -> Any:
    """A causal language model from a folder, with one adapter or none, on the CPU."""
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if nf4:
        options["device_map"] = "cpu"
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
        )
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # else a CPU with AVX512-BF16 computes in 16 bits
            module.support_avx512bf16_for_cpu = False
    model.generation_config = GenerationConfig()
    return model if adapter is None else PeftModel.from_pretrained(model, str(adapter)).eval()


def rows_without_padding(sequences: Sequences) -> Iterator[tuple[int, Tensor, int]]:
    """For each row its number, its ids (1, length) int64, and how many of them are the response."""
    for row, length in enumerate(sequences.response_lengths.tolist()):
        yield row, sequences.input_ids[row][sequences.attention_mask[row].bool()][None], length


def plain_row_logprobs(model: Any, ids: Tensor, length: int) -> Tensor:
    """Log-probabilities of the last `length` of ids (1, N), (length,), in nats."""
    logprobs: Tensor = model(ids).logits[0, -length - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, ids[0, -length:, None]).squeeze(-1)


@torch.no_grad()
def plain_logprobs(model: Any, sequences: Sequences) -> Tensor:
    """Log-probability of each response token, (B, T), in nats, 0 outside the response."""
    result = torch.zeros(sequences.response_mask.shape, dtype=model.dtype)
    for row, ids, length in rows_without_padding(sequences):
        result[row, :length] = plain_row_logprobs(model, ids, length)
    return result
