"""A chat whose cache is kept between turns."""

from collections.abc import Iterator, Mapping, Sequence

from gemma_jax.decoder.model import Gemma
from gemma_jax.inference.logits_processors import LogitsProcessor
from gemma_jax.inference.sampling import Sampling
from gemma_jax.inference.session import Session
from gemma_jax.inference.text_writer import TextWriter, write
from gemma_jax.multimodal.modality import modalities_of
from gemma_jax.multimodal.prompts import Prompt, PromptReader, encode_prompt
from gemma_jax.text import (
    Tokenizer,
    chat_stop_ids,
    in_gemma_format,
    render_chat,
    render_next,
)
from gemma_jax.vision.pan_and_scan import PanAndScan


class Conversation:
    """Chats with a model and keeps its cache between turns: each turn reads only what is new.

    Args:
      model, tokenizer: From `gemma_jax.load`; an instruction-tuned checkpoint answers best.
      max_len: Tokens the whole conversation may take; default 8,192, or the model's context.
      system: Text put in front of the first user message, or wherever the chat template puts it.
      sampling, seed: As in `generate`; `gemma_jax.load_sampling` has what the checkpoint asks for.
        Default: what the published checkpoints recommend, temperature 1, top-k 64, top-p 0.95.
      pan_and_scan, pad_audio, logits_processors: As in `generate`.

    Examples:
      >>> import gemma_jax as gj
      >>> model, tok = gj.load("checkpoints/digits")  # not trained to chat; gemma3-4b-it is
      >>> chat = gj.Conversation(model, tok, max_len=128)
      >>> answer = chat.say("Hello", max_new_tokens=4)
      >>> [message["role"] for message in chat.messages]
      ['user', 'assistant']
    """

    def __init__(
        self,
        model: Gemma,
        tokenizer: Tokenizer,
        *,
        max_len: int | None = None,
        system: str | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        pan_and_scan: PanAndScan | bool | None = None,
        pad_audio: bool = True,
        logits_processors: LogitsProcessor | Sequence[LogitsProcessor] = (),
    ):
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.messages: list[Mapping[str, object]] = []
        self._read = PromptReader(
            tokenizer, modalities_of(model.cfg, pan_and_scan=pan_and_scan, pad_audio=pad_audio)
        )
        sampling = sampling or Sampling(temperature=1.0, top_k=64, top_p=0.95)
        self._session = Session(
            model,
            1,
            max_len or min(8192, model.cfg.max_positions),
            sampling=sampling,
            seeds=seed,
            stop_ids=chat_stop_ids(tokenizer),
            logits_processors=logits_processors,
        )
        self._sampling, self._seed = sampling, seed
        self._rendered = ""  # what the cache holds as text, where the template is not Gemma's

    @property
    def sampling(self) -> Sampling:
        """How answers are chosen; may be set from turn to turn."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        self._session.sample_by(0, sampling)
        self._sampling = sampling

    def stream(self, content: str | Sequence, *, max_new_tokens: int = 1024) -> Iterator[str]:
        """Says `content`, text or a list of texts and media, and yields the answer as it comes.

        Raises:
          ValueError: The conversation has outgrown `max_len`, or an item cannot be read.
        """
        message = {"role": "user", "content": content}
        prompt = self._prompt(message)
        ids = prompt.token_ids
        room = self._session.room - len(ids) - 1
        if room < 1:
            raise ValueError(
                f"the conversation has outgrown its {self._session.max_len} tokens; start a new "
                "one, or give a larger max_len"
            )
        new = min(max_new_tokens, room)
        soft = [encode_prompt(self.model, prompt, self._read.modalities)]
        self._session.prefill([ids], soft=soft, max_new_tokens=new)
        writer = TextWriter(self.tokenizer, (), self._session.stop_ids[0])
        try:
            for _, piece in write(self._session, [writer], new, True):
                yield piece
        finally:  # also when the reader stops listening half-way
            answer = {"role": "assistant", "content": writer.text}
            self.messages += [message, answer]

    def _prompt(self, message: Mapping[str, object]) -> Prompt:
        """What the cache has not seen yet of a conversation that ends in `message`."""
        system = {"role": "system", "content": self.system} if self.system else None
        markers, first = self._read.markers, not self.messages
        if in_gemma_format(self.tokenizer):
            if first and self.tokenizer.chat_template is not None:
                return self._read.chat([*([system] if system else []), message])
            system = system if first else None
            text = render_next(message, first=first, system=system, media=markers)
            return self._read.text(text, self._read.media_of([message]), bos=False)
        conversation = [*([system] if system else []), *self.messages, message]
        text = render_chat(self.tokenizer, conversation, media=markers)
        answer = "" if first else str(self.messages[-1]["content"])
        for held in (self._rendered + answer, self._rendered + answer.strip()):
            if not first and text.startswith(held):
                self._rendered = text
                media = self._read.media_of([message])
                return self._read.text(text[len(held) :], media, bos=False)
        # A template may write earlier turns otherwise than they were said: read it all again.
        if not first:
            self._session.clear(0, seed=self._seed)
        self._rendered = text
        return self._read.chat(conversation)

    def say(self, content: str | Sequence, *, max_new_tokens: int = 1024) -> str:
        """Says `content` and returns the whole answer."""
        return "".join(self.stream(content, max_new_tokens=max_new_tokens))
