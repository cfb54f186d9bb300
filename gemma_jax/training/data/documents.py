"""An example becomes token ids, which of them are trained, and what towers read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gemma_jax.multimodal.markers import expand_markers, place_markers
from gemma_jax.multimodal.modality import Item, Modality, check_media
from gemma_jax.multimodal.prompts import PromptReader
from gemma_jax.text import Tokenizer, chat_bos, in_gemma_format
from gemma_jax.training.data.examples import Chat, Example, Plain, has_media
from gemma_jax.training.data.spans import TokenSizes, grown, tokens_inside
from gemma_jax.training.data.turns import render_with_spans

Items = Mapping[str, list[Item]]
_TURN = "<start_of_turn>"


@dataclass(frozen=True)
class Run:
    """Says where soft tokens stand, and of what.

    Attributes:
      start, size: Of the placeholders; the token before and the one after them belong to them.
      values: What the encoder reads.
    """

    modality: str
    start: int
    size: int
    values: np.ndarray


@dataclass(frozen=True)
class Document:
    """Holds one example as a model reads it.

    Attributes:
      ids: int32 `[T]`.
      trained: bool `[T]`: the tokens that the loss counts, each as what follows the one before.
      runs: Of soft tokens, in the order of the text.
    """

    ids: np.ndarray
    trained: np.ndarray
    runs: tuple[Run, ...] = ()

    def count(self, modality: str) -> int:
        """Items of a modality."""
        return sum(run.modality == modality for run in self.runs)

    def cut(self, length: int) -> "Document":
        """The first tokens, no more than `length`: runs of soft tokens stay whole or go."""
        end = min([length, *(r.start - 1 for r in self.runs if r.start + r.size + 1 > length)])
        kept = tuple(run for run in self.runs if run.start < end)
        return Document(self.ids[:end], self.trained[:end], kept)


class DocumentReader:
    """Turns examples into documents for one model.

    Args:
      train_on, end_of_text: See `DataSettings`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        modalities: Sequence[Modality] = (),
        *,
        train_on: str = "answers",
        end_of_text: bool = True,
    ):
        self.tokenizer, self.modalities = tokenizer, tuple(modalities)
        self.prompts = PromptReader(tokenizer, self.modalities)
        self.train_on, self.end_of_text = train_on, end_of_text
        self.sizes = TokenSizes(tokenizer)

    def read(self, example: Example) -> Document:
        """The whole of it, however long.

        Raises:
          ValueError: The model cannot read it, or there is nothing in it to train on.
          OSError: A file that it names cannot be read.
        """
        document = self._chat(example) if isinstance(example, Chat) else self._plain(example)
        if self.tokenizer.bos_id in document.ids[1:]:
            raise ValueError("<bos> stands inside the text; leave it out: every row gets its own")
        if not document.trained.any():
            raise ValueError("there is nothing to train on: no answer of the model, or no token")
        return document

    def _chat(self, example: Chat) -> Document:
        messages = example.messages
        if in_gemma_format(self.tokenizer) and len(self.tokenizer.encode(_TURN)) != 1:
            raise ValueError(f"the vocabulary has no {_TURN}; give prompts and completions")
        text, spans = render_with_spans(self.tokenizer, messages, self.prompts.markers)
        media = self.prompts.media_of(messages)
        ids, items = self._expand(text, media, bos=chat_bos(self.tokenizer))
        document = self._document(ids, items)
        if self.train_on == "all" and not example.given:
            return document
        answers = [i for i, span in enumerate(spans) if span and i >= example.given]
        if self.train_on == "last_answer":
            answers = answers[-1:]
        if beyond := [i for i in answers if has_media(messages[i])]:
            raise ValueError(f"message {beyond[0]} is an answer with more than text in it")
        text, inside = grown(text, [spans[i] for i in answers], self.modalities, items)
        trained = tokens_inside(*self._spelled(document, text, inside))
        return replace(document, trained=document.trained & trained)

    def _spelled(self, document: Document, text: str, spans: list) -> tuple:
        """Sizes of the tokens, the text that they spell, and the spans in it."""
        sizes = self.sizes(document.ids.tolist())
        for run in document.runs:  # a marker in the text
            marker = next(m.marker for m in self.modalities if m.name == run.modality)
            sizes[run.start - 1] = len(marker.encode())
            sizes[run.start : run.start + run.size + 1] = 0
        bos = self.tokenizer.bos_id
        if document.ids[0] == bos and not text.startswith(self.tokenizer.decode([bos])):
            sizes[0] = 0  # put in front of a text that had none
        return sizes, text, spans

    def _plain(self, example: Plain) -> Document:
        if example.prompt is None:
            ids, items = self._expand(example.text, example.media, bos=self.tokenizer.add_bos)
            given = 0
        else:
            ids, items = self._expand(example.prompt, example.media, bos=self.tokenizer.add_bos)
            given = len(ids)
            ids = [*ids, *self.tokenizer.encode(example.text)]
        if self.end_of_text:
            ids = [*ids, self.tokenizer.eos_id]
        document = self._document(ids, items)
        if self.train_on == "all":
            return document
        return replace(document, trained=document.trained & (np.arange(len(ids)) >= given))

    def _expand(
        self, text: str, media: Mapping[str, Sequence], *, bos: bool
    ) -> tuple[list[int], Items]:
        """Ids of a text with room for its items, as a prompt has them; and the items."""
        check_media(media, self.modalities)
        for modality in reversed(self.modalities):
            text = place_markers(text, modality, len(media.get(modality.name, ())))
        items = {m.name: [m.prepare(one) for one in media.get(m.name, ())] for m in self.modalities}
        return expand_markers(self.tokenizer, text, self.modalities, items, bos=bos), items

    def _document(self, ids: Sequence[int], items: Items) -> Document:
        """With everything trained that can be: no <bos>, nothing around a soft token."""
        ids, runs = np.array(ids, np.int32), []
        for modality in self.modalities:
            item_runs = [
                (count, values)
                for item in items[modality.name]
                for count, values in zip(item.num_tokens, item.inputs)
            ]
            places = np.flatnonzero(ids == modality.placeholder)
            starts = np.cumsum([0, *(count for count, _ in item_runs)])
            if len(places) != starts[-1]:
                raise ValueError(
                    f"the text holds placeholders of {modality.items}; they come with files alone"
                )
            runs += [
                Run(modality.name, int(places[start]), count, np.asarray(values, np.float32))
                for start, (count, values) in zip(starts, item_runs)
            ]
        trained = ids != self.tokenizer.bos_id
        trained[:1] = False  # follows on nothing
        for run in runs:
            trained[run.start - 1 : run.start + run.size + 1] = False
        return Document(ids, trained, tuple(sorted(runs, key=lambda run: run.start)))
