"""Texts to token ids by a published ``tokenizer.json``, without transformers.

The directory is untrusted: no code of it is run and nothing is fetched. What stands in ``tokenizer.json`` decides,
the begin token included, as in transformers 5; ``tokenizer_config.json`` is read for what could contradict it. Padding
and its side are no part of this: the text encoder pads, to the right.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sana_jax.errors import CheckpointError, UserError, reason_of

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
_LFS_POINTER = b"version https://git-lfs"
_AGAIN = "download or copy the tokenizer directory again"


class TokenizedText(NamedTuple):
    """A text's token ids, special ones included, and where the text was cut.

    ``end`` is the number of the text's characters that the tokens cover, None where all of it fits; ``lost_tokens``
    counts the tokens that do not.
    """

    ids: list[int]
    end: int | None = None
    lost_tokens: int = 0


class PromptTokenizer:
    """A tokenizer as ``tokenizer.json`` describes it; see ``from_directory``."""

    def __init__(self, tokenizer: Any, location: str) -> None:
        self._tokenizer = tokenizer
        self.location = location

    @classmethod
    def from_directory(
        cls, directory: str | os.PathLike[str], *, say: Callable[[str], None] = print
    ) -> PromptTokenizer:
        """Reads ``tokenizer.json`` and compares ``tokenizer_config.json`` with it.

        Raises:
            FileNotFoundError: there is no ``tokenizer.json``.
            CheckpointError: a file is damaged, or the two contradict each other.
            UserError: the tokenizers library is not installed, or the files ask for what is not supported.
        """
        directory = Path(directory)
        path = directory / TOKENIZER_FILE
        tokenizer = _read_tokenizer(path)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):
            raise UserError(
                f"{path} drops merges at random (dropout {tokenizer.model.dropout}), which no text encoder does; "
                "allowed is none: set it to null"
            )
        config = _read_config(directory / CONFIG_FILE)
        if config.get("truncation_side", "right") != "right":
            raise UserError(
                f"{directory / CONFIG_FILE}: truncation_side={config['truncation_side']!r}; the text encoder allows "
                "'right' only: mend it"
            )
        tokenizer.encode_special_tokens = config.get("split_special_tokens") is True
        _check_added_tokens(tokenizer, config, directory)
        result = cls(tokenizer, str(path))
        for line in _begin_token_notes(result, config):
            say(line)
        return result

    def encode(self, text: str, limit: int) -> TokenizedText:
        """Tokens of a text, special ones included, at most ``limit``; what is too long is cut at its end.

        Raises:
            UserError: the text is not valid Unicode.
            CheckpointError: the tokenizer fails on this text.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"prompt {text[-80:]!a} has a lone surrogate, which is not a character ({error.reason}); write it again"
            ) from error
        encoding = self._guarded(lambda: self._tokenizer.encode(text, add_special_tokens=False))
        room = max(limit - self._tokenizer.num_special_tokens_to_add(False), 0)
        lost = len(encoding) - room
        if lost > 0:
            encoding.truncate(room)
        end = max((stop for _, stop in encoding.offsets), default=0) if lost > 0 else None
        ids = self._guarded(lambda: self._tokenizer.post_process(encoding, None, True)).ids
        return TokenizedText(ids, end, max(lost, 0))

    def count(self, text: str) -> int:
        """The number of tokens of a text, special ones included."""
        return len(self.encode(text, 1 << 40).ids)

    def _guarded(self, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library's panics are BaseExceptions
            raise CheckpointError(f"{self.location} cannot tokenise a text ({reason_of(error)}); {_AGAIN}") from error


def _read_tokenizer(path: Path) -> Any:
    if not path.is_file():
        model = path.with_name("tokenizer.model")
        instead = (
            f" (the {model.name} beside it is not read: write {path.name} from it with transformers, "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...))"
            if model.is_file()
            else ""
        )
        raise FileNotFoundError(f"the tokenizer file {path} is missing{instead}; {_AGAIN}")
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise UserError("reading prompts needs the package tokenizers; install it: pip install tokenizers") from error
    content = path.read_bytes()
    if content.startswith(_LFS_POINTER):
        raise CheckpointError(f"{path} is a pointer to the tokenizer, not the tokenizer: fetch it with git lfs pull")
    try:
        return Tokenizer.from_buffer(content)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exceptions, and its panics are BaseExceptions
        raise CheckpointError(f"{path} is not a tokenizer ({reason_of(error)}); {_AGAIN}") from error


def _read_config(path: Path) -> dict[str, Any]:
    """``tokenizer_config.json``; {} where there is none."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({reason_of(error)}); {_AGAIN}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not a JSON object; {_AGAIN}")
    return config


def _check_added_tokens(tokenizer: Any, config: dict[str, Any], directory: Path) -> None:
    """Raises ``CheckpointError`` if the configuration names an added token that ``tokenizer.json`` does not have."""
    listed = config.get("added_tokens_decoder") or {}
    try:
        named = {int(number): token["content"] for number, token in listed.items()}
        differing = [f"{text!r} as {number}" for number, text in named.items() if tokenizer.token_to_id(text) != number]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{directory / CONFIG_FILE}: added_tokens_decoder is not numbers with tokens ({reason_of(error)}); {_AGAIN}"
        ) from error
    if differing:
        raise CheckpointError(
            f"{directory / CONFIG_FILE} names {', '.join(differing[:5])}, which {TOKENIZER_FILE} has not: they belong "
            f"to different tokenizers; {_AGAIN}"
        )


def _begin_token_notes(tokenizer: PromptTokenizer, config: dict[str, Any]) -> list[str]:
    """A line where the two files disagree on whether a text begins with the begin token."""
    wanted = config.get("add_bos_token")
    token = config.get("bos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(wanted, bool) or not isinstance(token, str):
        return []
    number = tokenizer._tokenizer.token_to_id(token)
    added = number is not None and number in tokenizer.encode("", 1 << 40).ids
    if added == wanted:
        return []
    return [
        f"{tokenizer.location} {'adds' if added else 'does not add'} the begin token {token}, though {CONFIG_FILE} has "
        f"add_bos_token={wanted}; the former is followed, as transformers 5 does"
    ]
