"""The lines of a model card that load an exported folder and run as they stand."""

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rto_lightning.export.card import Exported

_TEMPLATE = """\
chat = [{"role": "user", "content": "What is the capital of France?"}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
"""
_PLAIN = 'prompt = "What is the capital of France?"\n'
_ENCODE = 'inputs = tokenizer(prompt{answer}, add_special_tokens=False, return_tensors="pt")\n'
_GENERATE = """\
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_HEAD = """\
head = load_file({head})
hidden = model(**inputs, output_hidden_states=True).hidden_states[-1].float()
print((hidden[0, -1] @ head["weight"][0] + head["bias"][0]).item())
"""


def usage(exported: "Exported") -> str:
    """A fenced block of Python for an exported folder."""
    loader = {
        "adapter": ("peft", "AutoPeftModelForCausalLM"),
        "model": ("transformers", "AutoModelForCausalLM"),
        "classifier": ("transformers", "AutoModelForSequenceClassification"),
    }
    library, name = loader[exported.kind]
    imports = [f"from {library} import {name}", "from transformers import AutoTokenizer"]
    if library == "transformers":
        imports = [f"from transformers import {name}, AutoTokenizer"]
    lines = [
        f'model = {name}.from_pretrained("{exported.name}", dtype="auto").eval()\n',
        f'tokenizer = AutoTokenizer.from_pretrained("{exported.name}")\n',
        _TEMPLATE if exported.has_template else _PLAIN,
    ]
    scored = exported.has_head or exported.kind == "classifier"
    answer = f' + "Paris." + {json.dumps(exported.stop_token)}' if scored else ""
    lines.append(_ENCODE.format(answer=answer))
    if exported.kind == "classifier":
        lines.append("print(model(**inputs).logits.item())\n")
    elif exported.has_head:
        imports.append("from safetensors.torch import load_file")
        place = f'"{exported.name}/head.safetensors"'
        if exported.on_hub:
            imports.insert(0, "from huggingface_hub import hf_hub_download")
            place = f'hf_hub_download("{exported.name}", "head.safetensors")'
        lines.append(_HEAD.format(head=place))
    else:
        lines.append(_GENERATE)
    return "```python\n" + "\n".join(imports) + "\n\n" + "".join(lines) + "```"
