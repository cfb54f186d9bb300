"""A stand-in tokenizer for tests of the loop: one word, one token, nothing learned."""

import re
from collections.abc import Iterable


class Words:
    """Words are numbered as they are met; `<...>` markers are words. Ids without a word yet are
    spelled `#id`, so that whatever a model writes can be read back."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self._ids = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<end_of_turn>": 3, "\n": 4}
        self.bos_id, self.eos_id, self.stop_ids = 2, 1, (1, 3)
        self.special_ids = {name: self._ids[name] for name in list(self._ids)[:4]}
        self.add_bos, self.chat_template = True, None

    def encode(self, text: str, *, bos: bool = False, parse_special: bool = True) -> list[int]:
        words = re.findall(r"<[a-z_]+>|\n|#\d+|[^\s<#]+", text)
        ids = [self._id(word) for word in words]
        return ids if not bos or ids[:1] == [2] else [2, *ids]

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        names = {i: word for word, i in self._ids.items()}
        shown = (names.get(i, f"#{i}") for i in ids if not (skip_special and i < 4))
        return "".join(word if word == "\n" else word + " " for word in shown).encode()

    def _id(self, word: str) -> int:
        if word.startswith("#"):
            return int(word[1:])
        assert len(self._ids) < 40, "ids from 40 on are left to the model"
        return self._ids.setdefault(word, len(self._ids))
