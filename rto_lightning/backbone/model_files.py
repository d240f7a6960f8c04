"""What is seen to before a folder of somebody else is read: a saved role, an adapter or a model.

Such a folder is data. It must not run code, and must not lead to files outside of itself: weights are read from
safetensors only, names in it are names of its own files, and its settings are JSON objects of a reasonable size. Only
headers are read here, never weights.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file

from rto_lightning.errors import UserError, first_line

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
MODEL_CONFIG = "config.json"

MOST_SETTINGS_BYTES = 64 * 2**20
"""Largest JSON file that is read; the longest index of a public model has 10 MB."""
MOST_HEADER_BYTES = 100 * 10**6
"""Largest header of a safetensors file, as the library has it."""

_SETTINGS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def read_settings(path: Path) -> dict[str, Any]:
    """The contents of a JSON file, which must be an object.

    Raises:
        UserError: if it is too large, is no JSON or no object, or has a key twice.
    """
    try:
        if path.stat().st_size > MOST_SETTINGS_BYTES:
            raise UserError(f"{path} has {path.stat().st_size} bytes, too many for settings; get the folder anew.")
        contents = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repetition)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); get the folder anew.") from error
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds no JSON object; get the folder anew.")
    return contents


def check_folder(folder: Path) -> None:
    """Refuse a folder that leads outside of itself. It may be a link itself, or a snapshot of the hub's cache.

    Raises:
        UserError: if a link in it leads elsewhere or nowhere, if something in it is neither file nor folder, or if
            settings of a tokenizer or of generation are no JSON object.
    """
    for entry in (*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")):
        if entry.is_symlink():
            _check_link(folder, entry)
        elif not entry.is_file() and not entry.is_dir():
            raise UserError(f"{entry} is no regular file; remove it.")
    for name in _SETTINGS:
        if (folder / name).exists():
            read_settings(folder / name)


def check_source(source: str, revision: str | None = None) -> None:
    """Refuse a model that is none, or whose settings ask for more than a model: before its tokenizer or it is loaded.

    Args:
        source: local folder or hub name.
        revision: revision on the hub.

    Raises:
        UserError: as :func:`check_folder`; also for an adapter, for attention kernels from the hub, and for weights
            that are no safetensors file.
    """
    if Path(source).is_dir():
        check_folder(Path(source))
    if find_file(source, ADAPTER_CONFIG, revision) is not None:
        # transformers would load the base model that it names, from wherever that is.
        raise UserError(f"{source} holds an adapter, where a whole model is needed; merge it, or name its base model.")
    path = find_file(source, MODEL_CONFIG, revision)
    if path is None:
        return  # loading says what is missing
    config = read_settings(path)
    for kernel in _attention_of(config):
        if "/" in kernel:
            raise UserError(
                f"{path} asks for attention code from the hub ({kernel}), which is not run; remove that line."
            )
    weights = config.get("transformers_weights")
    if weights is not None and not str(weights).endswith((".safetensors", ".safetensors.index.json")):
        raise UserError(f"{path} names the weights {weights}, which are no safetensors file; convert them.")


def weight_files(source: str, revision: str | None = None) -> dict[str, str]:
    """The safetensors file that holds each tensor of a model; on the hub they are downloaded.

    Raises:
        UserError: if there are none, if their index names files elsewhere, or if a header is damaged.
    """
    index = find_file(source, SAFE_WEIGHTS_INDEX_NAME, revision)
    single = find_file(source, SAFE_WEIGHTS_NAME, revision)
    if single is not None:  # comes first in transformers too
        return dict.fromkeys(tensor_shapes(single), str(single))
    if index is None:
        raise _no_safetensors(source, revision)
    shards = read_settings(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise UserError(f"{index} has no weight_map from tensors to files; get the folder anew.")
    paths: dict[str, str] = {}
    for shard in dict.fromkeys(shards.values()):
        check_names([shard], index)
        path = find_file(source, shard, revision)
        if path is None:
            raise UserError(f"{index} names {shard}, which is not there; get the folder anew.")
        tensor_shapes(path)
        paths[shard] = str(path)
    return {name: paths[shard] for name, shard in shards.items()}


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file, from its header.

    Raises:
        UserError: if the header is damaged, does not fit the size of the file, or has a name twice.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > min(MOST_HEADER_BYTES, path.stat().st_size):
                raise ValueError(f"its header claims {size} bytes")
            json.loads(file.read(size), object_pairs_hook=_without_repetition)
        with safe_open(path, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"{path} is no whole safetensors file ({first_line(error)}); get it anew.") from error


def find_file(source: str, name: str, revision: str | None = None) -> Path | None:
    """A file of a local folder or of a hub model, downloaded if it is not in the cache; None if there is none."""
    if Path(source).exists():
        path = Path(source) / name
        return path if path.is_file() else None
    options: dict[str, Any] = {"revision": revision or "main", "_raise_exceptions_for_missing_entries": False}
    try:
        found = cached_file(source, name, _raise_exceptions_for_connection_errors=False, **options)
    except (OSError, ValueError):  # no such model, which loading it tells
        return None
    return Path(found) if found is not None else None


def check_names(names: Iterable[str], where: Path) -> None:
    """Raise UserError for a name in a file that is not that of a file beside it."""
    for name in names:
        if Path(name).name != name or name == ".." or "\\" in name:
            raise UserError(f"{where} names the file {name!r}, which is not in its folder; get the folder anew.")


def _check_link(folder: Path, link: Path) -> None:
    home = folder.resolve()
    # In the hub's cache the files of models--OWNER--NAME/snapshots/COMMIT are links to ../../blobs.
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{link} is a link that leads nowhere; get the folder anew.") from error
    if not any(target.is_relative_to(allowed) for allowed in homes):
        raise UserError(f"{link} is a link out of its folder, to {target}; put a copy in its place.")


def _attention_of(config: Any) -> list[str]:
    """The attention implementations that a configuration, or a part of it, names."""
    if not isinstance(config, dict):
        return []
    found: list[str] = []
    for key, value in config.items():
        if key.strip("_").startswith("attn_implementation"):
            found += [str(name) for name in (value.values() if isinstance(value, dict) else [value])]
        else:
            found += _attention_of(value)
    return found


def _no_safetensors(source: str, revision: str | None) -> UserError:
    for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        if find_file(source, name, revision) is not None:
            return UserError(
                f"{source} has its weights as {name} only, a format that can run code and is not loaded; convert it by "
                f"transformers' AutoModel...from_pretrained({source!r}).save_pretrained(FOLDER)."
            )
    return UserError(f"{source} has no {SAFE_WEIGHTS_NAME}; other formats of weights are not loaded.")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    contents = dict(pairs)
    if len(contents) < len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {repeated[:100]!r} stands in it twice")
    return contents
