"""Small tokenizers with the control tokens and templates of known model families, and the ways they treat spaces."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny import CHATML

LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% else %}{{ '<｜Assistant｜>' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
GLUED = "{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token if not add_generation_prompt }}"


def byte_level(
    template: str, special: Sequence[str], plain: Sequence[str] = (), **tokens: str
) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes.

    Args:
        template: of its chats.
        special: its special tokens; those that swallow the white space behind them end in `~`.
        plain: added tokens that are not special.
        **tokens: `bos_token` and so on.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t.rstrip("~"), rstrip=t.endswith("~"), special=True) for t in special])
    tokenizer.add_tokens([AddedToken(token) for token in plain])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **tokens)


def sentencepiece_like(template: str, spaces: str) -> PreTrainedTokenizerFast:
    """A tokenizer of letters that writes a space before a text.

    Args:
        template: of its chats.
        spaces: `first` before a text, `always` after each control token too, `legacy` as `always` but by a normalizer.
    """
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789[]/<>|_.,:!?{}*"
    names = ["<unk>", "<s>", "</s>", "▁", "\n", *letters]
    model = models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[], unk_token="<unk>")
    tokenizer = Tokenizer(model)
    if spaces == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=spaces, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names[:3]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template
    )


def full_width(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer that looks for its special tokens after full-width letters were replaced."""
    tokenizer = byte_level(template, (), eos_token="<|endoftext|>")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    names = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken(name, normalized=True, special=True) for name in names])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, chat_template=template, eos_token="<|im_end|>"
    )


HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
FAMILIES = {
    "chatml": lambda: byte_level(CHATML, ("<|im_start|>", "<|im_end|>"), eos_token="<|im_end|>"),
    "llama 3": lambda: byte_level(LLAMA_3, HEADERS, bos_token=HEADERS[0], eos_token=HEADERS[3]),
    "llama 2": lambda: sentencepiece_like(LLAMA_2, "first"),
    "llama 2, spaces always": lambda: sentencepiece_like(LLAMA_2, "always"),
    "llama 2, legacy": lambda: sentencepiece_like(LLAMA_2, "legacy"),
    "zephyr": lambda: sentencepiece_like(ZEPHYR, "first"),
    "phi 3": lambda: byte_level(PHI_3, ("<|user|>~", "<|assistant|>~", "<|end|>~"), eos_token="<|end|>"),
    "deepseek": lambda: byte_level(
        DEEPSEEK, ("<bos>", "<eos>"), ("<｜User｜>", "<｜Assistant｜>", "<think>"), bos_token="<bos>", eos_token="<eos>"
    ),
    "full width": lambda: full_width(CHATML),
    "glued": lambda: byte_level(GLUED, ("<s>", "</s>"), eos_token="</s>"),
}
"""Each makes a new tokenizer."""
