"""A reward role as transformers' sequence classification with one label.

Such a class reads its head at the last token that is not padding. Ours reads the last response token, the stop id
included; where the padding id is a stop id, the class would read the token before, so padding gets another id.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rto_lightning.backbone import ChatTokenizer
from rto_lightning.errors import UserError


def padding_token(chat: ChatTokenizer) -> str | None:
    """A special token that ends no text and stands in no chat; None if the vocabulary has none.

    Of several, the tokenizer's own for padding comes first, then one that is called so, and the unknown word, which
    some tokenizers write for others, last.
    """
    tokenizer: Any = chat.tokenizer
    prompt = chat.encode_prompt([{"role": "user", "content": "Question"}])
    used = {*chat.stop_ids, tokenizer.bos_token_id, *prompt}
    special = {int(index): token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))

    def rank(index: int) -> tuple[bool, bool, bool, int]:
        unknown = index == tokenizer.unk_token_id
        return index != tokenizer.pad_token_id, "pad" not in special[index].lower(), unknown, index

    free = sorted((index for index in special if index not in used), key=rank)
    return special[free[0]] if free else None


def as_classifier(model: PreTrainedModel, head: dict[str, Tensor], pad_id: int | None) -> tuple[PreTrainedModel, float]:
    """Put a scalar head in the place of a language model's output layer.

    Args:
        model: a causal language model; the result shares its weights.
        head: `weight` (1, H) and `bias` (1,).
        pad_id: fills padding; None leaves batches of one only.

    Returns:
        The classifier; and the bias, if the class has no place for it: its scores are lower by so much, which no
        comparison of answers sees.

    Raises:
        UserError: if transformers has no such class for the architecture.
    """
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    config.get_text_config().pad_token_id = config.pad_token_id = pad_id
    try:
        with torch.device("meta"):
            classifier: Any = AutoModelForSequenceClassification.from_config(config)
        score = classifier.score
        body = getattr(classifier, classifier.base_model_prefix)
        if not isinstance(score, nn.Linear) or type(body) is not type(model.base_model):
            raise ValueError("it is built in another way")
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"transformers has no sequence classification for {config.model_type} that could hold this role ({error}); "
            "export it without --merge."
        ) from error
    setattr(classifier, classifier.base_model_prefix, model.base_model)
    has_bias = score.bias is not None
    classifier.score = nn.Linear(score.in_features, 1, bias=has_bias)
    with torch.no_grad():
        classifier.score.weight.copy_(head["weight"])
        if has_bias:
            classifier.score.bias.copy_(head["bias"])
    return classifier.eval(), 0.0 if has_bias else float(head["bias"])
